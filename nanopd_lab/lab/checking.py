"""What checks are made of: call an implementation on one case, and say precisely what is wrong with it.

    got = call(impl, tokens=34, block_size=16)
    expect(got == 3, "the last 2 tokens need a block of their own", want=3)

A check is a plain function `check_x(impl)`: the notebooks and pytest share it. Where one call is not enough,
`Steps` does the same for a sequence of operations on one object.
"""

from __future__ import annotations

import copy
import dataclasses
import linecache
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

LIMIT_S = 5.0
_UNSET = object()


class Counterexample(AssertionError):  # noqa: N818 - what it is, and the word the course uses
    """The first case that an implementation gets wrong: how it was called, what came back, what should have.

    `where` is the line of the implementation that raised, if one did; `before` is what was done before the
    call, or what case it is, one line each. Without `inputs`, `called` is the call as it was written.
    """

    def __init__(
        self,
        called: str,
        inputs: dict[str, Any] | None,
        got: str,
        want: str,
        why: str = "",
        where: str = "",
        before: Sequence[str] = (),
    ) -> None:
        self.called, self.inputs, self.got, self.want = called, inputs, got, want
        self.why, self.where, self.before = why, where, tuple(before)
        super().__init__(str(self))

    @property
    def call(self) -> str:
        """The call as one would write it."""
        if self.inputs is None:
            return self.called
        inputs = ", ".join(f"{name}={compact(value)}" for name, value in self.inputs.items())
        # A description in words is no function that could be called.
        return f"{self.called}({inputs})" if inputs or self.called.isidentifier() else self.called

    def rows(self) -> list[tuple[str, str]]:
        """(label, text) of what is shown, in order."""
        rows = [("" if number else "after", line) for number, line in enumerate(self.before)]
        rows += [("call", self.call), ("got", self.got), ("want", self.want)]
        rows += [("at", self.where)] if self.where else []
        return rows + ([("why", self.why)] if self.why else [])

    def __str__(self) -> str:
        return "\n".join(f"  {label:<5} {text}" for label, text in self.rows())


class NotWrittenError(NotImplementedError):
    """The implementation is, or comes upon, a stub."""


class CannotCheckError(RuntimeError):
    """Something that a check needs is not here, a compiler for example; the message says how to get it."""


class _Late(BaseException):
    """Raised in an implementation that takes too long; not an Exception, so that `except Exception` lets it by."""


_current = threading.local()  # the case under way, so that `expect` can name its inputs


def call(
    impl: Callable[..., Any],
    *,
    may_change: Sequence[str] = (),
    limit_s: float = LIMIT_S,
    called: str | None = None,
    **inputs: Any,
) -> Any:
    """Call `impl(**inputs)` on copies of the inputs, and return what it returns.

    Args:
        may_change: arguments that the exercise says are changed in place
        limit_s: seconds before a call counts as never ending (only where signals work: the main thread)
        called: what the call is shown as; the implementation's own name if omitted

    Raises:
        Counterexample: it raised, took too long, changed an argument it should have left alone, or returned the
            very list that the call before returned
        NotWrittenError: it is a stub
    """
    previous = getattr(_current, "got", _UNSET)
    called = str(called or getattr(impl, "__name__", type(impl).__name__))
    _current.called, _current.inputs, _current.got = called, inputs, _UNSET
    mine = copy.deepcopy(inputs)

    def wrong(got: str, want: str, **more: str) -> Counterexample:
        return Counterexample(called, inputs, got, want, **more)

    got = _attempt(impl, (), mine, limit_s, wrong)
    for argument, value in inputs.items():
        if argument not in may_change and not same(mine[argument], value):
            raise Counterexample(
                called,
                inputs,
                f"{argument} = {compact(mine[argument])} afterwards",
                f"{argument} as it was",
                f"the caller still needs {argument}: work on a copy",
            )
    if isinstance(got, list) and got is previous:
        why = "whoever still has that list sees it change: make a new one in each call"
        raise wrong("the very list that the call before returned", "a list of its own", why=why)
    _current.got = got
    return got


def expect(condition: bool, why: str, want: Any, got: Any = _UNSET) -> None:
    """Raise a `Counterexample` about the latest `call` unless `condition` holds.

    Args:
        why: one sentence a learner can act on
        want: the right result
        got: what to show; the latest call's result if omitted
    """
    if condition:
        return
    got = _current.got if got is _UNSET else got
    if got is None and want is not None:
        why = "nothing was returned; is a `return` missing?"
    raise Counterexample(_current.called, _current.inputs, compact(got), compact(want), why)


class Steps:
    """Operations on one object that is changed by them; a counterexample tells what led up to it.

    Args:
        start: how the object was made, as one would write it
    """

    def __init__(self, start: str) -> None:
        self.done = [start]
        self._text, self._got = start, ""

    def do(
        self,
        text: str,
        operation: Callable[..., Any],
        *args: Any,
        raises: type[Exception] | None = None,
        possible: str = "",
    ) -> Any:
        """Call `operation(*args)`, which is written `text`; returns what it returns.

        Args:
            raises: it must raise this, and anything else is wrong; the exception is returned
            possible: why it can be done, shown if it raises all the same

        Raises:
            Counterexample, NotWrittenError: as `call`
        """
        if self._got:
            self.done.append(f"{self._text} gave {self._got}" if self._got != "None" else self._text)
        self._text, self._got = text, "nothing yet"

        def wrong(got: str, want: str, why: str = possible, where: str = "") -> Counterexample:
            return self._wrong(got, want, why=why, where=where)

        got = _attempt(operation, args, {}, LIMIT_S, wrong, raises)
        self._got = type(got).__name__ if raises else compact(got)
        return got

    def expect(self, condition: bool, why: str, want: Any, got: Any = _UNSET) -> None:
        """Raise a `Counterexample` about the latest operation unless `condition` holds; texts stay as they are."""
        if not condition:
            texts = [value if isinstance(value, str) else compact(value) for value in (got, want)]
            raise self._wrong(self._got if got is _UNSET else texts[0], texts[1], why=why)

    def _wrong(self, got: str, want: str, **more: str) -> Counterexample:
        return Counterexample(self._text, None, got, want, before=self.done, **more)


def _attempt(
    operation: Callable[..., Any],
    args: Sequence[Any],
    kwargs: dict[str, Any],
    limit_s: float,
    wrong: Callable[..., Counterexample],
    raises: type[Exception] | None = None,
) -> Any:
    """Call it within the limit; what it raises becomes a counterexample, unless it is what it should raise."""
    want = raises.__name__ if raises else "an answer"
    try:
        with _limit(limit_s):
            got = operation(*args, **kwargs)
    except _Late:
        why = "is there a loop that never ends?"
        raise wrong(f"no answer after {limit_s:g} s", want, why=why) from None
    except (Exception, SystemExit) as error:  # which would end the notebook's kernel, or be swallowed by it
        where, line = _origin(error)
        if isinstance(error, NotImplementedError) and (not line or "NotImplementedError" in line):
            raise NotWrittenError(str(error)) from error
        if raises and isinstance(error, raises):
            return error
        raise wrong(f"{type(error).__name__}: {error}", want, where=where) from error
    if raises:
        raise wrong(compact(got), want, why=f"this must raise {want}")
    return got


def same(left: Any, right: Any) -> bool:
    """Equal in value, also for tensors and for containers of them."""
    if left is right:
        return True
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(same(a, b) for a, b in zip(left, right, strict=True))
    if dataclasses.is_dataclass(left):
        fields = [field.name for field in dataclasses.fields(left) if field.compare]
        return all(same(getattr(left, name), getattr(right, name)) for name in fields)
    if hasattr(left, "shape"):  # torch or numpy, NaN equal to itself
        return left.shape == right.shape and bool(
            ((left == right) | ((left != left) & (right != right))).all()
        )
    if type(left).__eq__ is object.__eq__:
        return same(getattr(left, "__dict__", None), getattr(right, "__dict__", None))
    return bool(left == right)


def compact(value: Any, width: int = 96) -> str:
    """A value on one short line; a tensor with its shape, anything long cut in the middle."""
    if hasattr(value, "shape") and hasattr(value, "tolist"):
        text = f"{type(value).__name__}{list(value.shape)} {_flat(value)}"
    else:
        text = " ".join(repr(value).split())
    if len(text) > width:
        half = (width - 3) // 2
        text = f"{text[:half]} … {text[-half:]}"
    return text


def _flat(value: Any) -> str:
    numbers = value.reshape(-1)[:6].tolist()
    shown = ", ".join(f"{number:.4g}" if isinstance(number, float) else str(number) for number in numbers)
    return f"[{shown}{', …' if value.reshape(-1).shape[0] > 6 else ''}]"


def _origin(error: BaseException) -> tuple[str, str]:
    """('line 3: x = blocks[i]', that line) where the error was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    # The first frame is `_attempt` above; without another the implementation was never entered.
    if len(frames) < 2:
        return "", ""
    line = frames[-1].line or linecache.getline(frames[-1].filename, frames[-1].lineno or 0).strip()
    return f"{frames[-1].name}, line {frames[-1].lineno}: {line}", line


@contextmanager
def _limit(seconds: float) -> Iterator[None]:
    """Interrupt what takes longer. Gives a timer that was already running (pytest-timeout's) its turn again."""
    main = threading.current_thread() is threading.main_thread()
    if not main or not hasattr(signal, "setitimer"):
        yield
        return

    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise _Late

    handler = signal.signal(signal.SIGALRM, interrupt)
    # It repeats: a bare `except:` in a loop may swallow the first.
    before = signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *before)
        signal.signal(signal.SIGALRM, handler)
