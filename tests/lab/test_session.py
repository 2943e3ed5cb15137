"""Handing in, checking, using, and getting into the engine; keeping parts from one notebook to the next."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from collections.abc import Sequence as Seq
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from nanopd_lab import LLM, SamplingParams
from nanopd_lab.engine.policies import plan_chunks
from nanopd_lab.kv import blocks_for
from nanopd_lab.lab import (
    CheckFailedError,
    Session,
    SignatureError,
    Status,
    UnknownExerciseError,
)
from nanopd_lab.lab.registry import find
from nanopd_lab.lab.store import standalone
from tests.lab.wrong_versions.engine import overshoots, recursive, shares_equally
from tests.lab.wrong_versions.kv import rounds_down, with_ceil

PROMPTS = [list(range(1, 40)), [7, 8, 9], list(range(5, 30))]
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


@pytest.fixture
def session(tmp_path: Path) -> Session:
    return Session(mode="learner", folder=tmp_path / "kept")


def tokens_of(session: Session) -> tuple[list[list[int]], LLM]:
    llm = LLM("random:tiny", device="cpu", max_num_batched_tokens=16, parts=session.parts())
    outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    return [output.outputs[0].token_ids for output in outputs], llm


# ---------------------------------------------------------------------- into the engine


def test_a_checked_part_runs_in_the_real_engine(session: Session) -> None:
    calls = []

    @session.exercise("engine.plan_chunks")
    def mine(num_decodes: int, prefills: Seq[int], budget: int) -> list[int]:
        calls.append((num_decodes, list(prefills)))
        return recursive(num_decodes, prefills, budget)

    assert session.check("engine.plan_chunks").status is Status.PASS
    calls.clear()
    got, llm = tokens_of(session)
    assert llm.engine.scheduler.chunk_policy is mine
    # Once in each step with a prompt; and steps of 16 tokens really cut prompts of 39 and 25 tokens into chunks.
    assert len(calls) == 5 < llm.stats().steps
    assert (0, [39]) in calls
    assert (0, [23]) in calls
    want, reference = tokens_of(Session(mode="reference"))
    assert reference.engine.scheduler.chunk_policy is plan_chunks
    assert got == want


def test_an_unchecked_part_stays_out_and_that_is_said(session: Session) -> None:
    session.exercise("engine.plan_chunks", recursive)
    with pytest.warns(UserWarning, match="not checked yet"):
        assert session.parts().chunk_policy is plan_chunks


def test_a_wrong_part_stays_out(session: Session) -> None:
    session.exercise("engine.plan_chunks", shares_equally)
    with pytest.raises(CheckFailedError, match="first come, first served"):
        session.check("engine.plan_chunks")
    assert session.parts().chunk_policy is plan_chunks
    assert session.use("engine.plan_chunks") is plan_chunks


def test_a_part_that_is_written_anew_must_be_checked_anew(session: Session) -> None:
    session.exercise("engine.plan_chunks", recursive)
    session.check("engine.plan_chunks")
    session.exercise("engine.plan_chunks", overshoots)
    with pytest.warns(UserWarning, match="not checked yet"):
        assert session.parts().chunk_policy is plan_chunks


def test_a_helper_is_used_but_is_no_part(session: Session) -> None:
    session.exercise("kv.blocks_for", with_ceil)
    assert session.use("kv.blocks_for") is blocks_for
    assert session.check("kv.blocks_for").status is Status.PASS
    assert session.use("kv.blocks_for") is with_ceil
    assert session.parts() == Session(mode="reference").parts()


# ---------------------------------------------------------------------- modes and messages


def test_a_stub_is_todo_and_the_reference_stands_in(session: Session) -> None:
    @session.exercise("kv.blocks_for")
    def stub(tokens: int, block_size: int) -> int:
        raise NotImplementedError("your turn")

    assert session.check("kv.blocks_for").status is Status.TODO
    assert session.use("kv.blocks_for")(34, 16) == 3


def test_reference_mode_puts_the_learners_code_aside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NANOPD_LAB_MODE", "reference")
    monkeypatch.setenv("NANOPD_LAB_FOLDER", str(tmp_path / "kept"))
    session = Session()
    assert session.exercise("kv.blocks_for", rounds_down) is blocks_for
    assert session.check("kv.blocks_for").status is Status.PASS
    assert session.use("kv.blocks_for") is blocks_for
    assert "reference mode" in session.save()
    assert "reference mode" in session.load()
    assert "reference mode" in str(session.progress())
    assert not (tmp_path / "kept").exists()


def test_a_mode_that_does_not_exist_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOPD_LAB_MODE", "teacher")
    with pytest.raises(ValueError, match="'teacher'; set it to learner or reference"):
        Session().check("kv.blocks_for")


@pytest.mark.parametrize(
    ("impl", "words"),
    [
        (lambda tokens: 0, "missing: block_size"),
        (lambda tokens, size: 0, "missing: block_size; unknown: size"),
        (lambda block_size, tokens: 0, "the order or the kind"),
        (lambda tokens, block_size, extra: 0, "unknown: extra"),
        (lambda tokens, *, block_size: 0, "the order or the kind"),
        (3, "is a function, but 3 is not"),
        (int, "is a function"),
    ],
)
def test_the_signature_is_compared_at_once(session: Session, impl: Any, words: str) -> None:
    with pytest.raises(SignatureError, match=words):
        session.exercise("kv.blocks_for", impl)


def test_names_that_do_not_exist(session: Session) -> None:
    with pytest.raises(UnknownExerciseError, match=r'did you mean "kv\.blocks_for"'):
        session.check("kv.block_for")
    with pytest.raises(UnknownExerciseError, match=r"there are kv\.blocks_for, .*engine\.plan_chunks"):
        session.hint("nothing")
    with pytest.raises(ValueError, match="run the cell with"):
        session.check("kv.blocks_for")


def test_hints_and_solution(session: Session) -> None:
    hints = {str(session.hint("kv.blocks_for", level)) for level in (1, 2, 3)}
    assert len(hints) == 3
    with pytest.raises(ValueError, match="choose 1 to 3"):
        session.hint("kv.blocks_for", 4)
    shown = str(session.solution("engine.plan_chunks"))
    assert shown.startswith("# nanopd_lab/engine/policies.py, line ")
    assert "room -= count" in shown


def test_progress_says_what_is_done_and_whose_is_in_use(session: Session) -> None:
    session.exercise("engine.plan_chunks", recursive)
    assert "unchecked" in str(session.progress())
    session.check("engine.plan_chunks")
    lines = str(session.progress()).splitlines()
    rows = {name: rest for _, name, *rest in (line.split(maxsplit=3) for line in lines[1:-1])}
    assert rows["kv.blocks_for"] == ["TODO", "the package's"]
    assert rows["engine.plan_chunks"] == ["PASS", "yours, in the engine"]
    assert lines[-1] == f"1 of {len(rows)} done"


def test_html_holds_what_the_text_holds_and_escapes_it(session: Session) -> None:
    def angry(tokens: int, block_size: int) -> str:
        return "<b>&</b>"

    report = session.examine("kv.blocks_for", angry)
    html = report._repr_html_()
    assert report.counterexample is not None
    assert "&lt;b&gt;&amp;&lt;/b&gt;" in html
    assert "<b>&</b>" not in html
    for words in ("FAIL", "angry(tokens=1, block_size=16)", "a number of blocks is an int"):
        assert words in html
    for shown in (session.progress(), session.hint("kv.blocks_for"), session.solution("kv.blocks_for")):
        assert "kv" in shown._repr_html_()


def test_a_failed_check_is_short_in_ipython(session: Session) -> None:
    session.exercise("kv.blocks_for", rounds_down)
    with pytest.raises(CheckFailedError) as error:
        session.check("kv.blocks_for")
    (line,) = error.value._render_traceback_()
    assert line == "FAIL kv.blocks_for: rounds_down(tokens=1, block_size=16) gave 0, want 1"


def test_the_lab_needs_neither_widgets_nor_figures() -> None:
    code = (
        "import sys\n"
        "for name in ('ipywidgets', 'matplotlib', 'IPython', 'pygments', 'torch'): sys.modules[name] = None\n"
        "from nanopd_lab import lab\n"
        "lab.exercise('kv.blocks_for', lambda tokens, block_size: -(-tokens // block_size))\n"
        "print(lab.check('kv.blocks_for').status, lab.solution('kv.blocks_for')._repr_html_()[:4])\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.stdout.strip() == "PASS <div", result.stderr


# ---------------------------------------------------------------------- keeping

NOTEBOOK = '''
import math
from collections.abc import Sequence
from nanopd_lab.errors import OutOfBlocks
OVERHEAD = 0

class Counter:
    """A helper of the notebook."""
    def up(self, number: float) -> int:
        return math.ceil(number) + OVERHEAD

def helper(tokens, block_size):
    if tokens < 0:
        raise OutOfBlocks("none")
    return Counter().up(tokens / block_size)

@session.exercise("kv.blocks_for")
def blocks_for(tokens: int, block_size: int) -> int:
    # my own words
    return helper(tokens, block_size)

@session.exercise("engine.plan_chunks")
def chunks(num_decodes: int, prefills: Sequence[int], budget: int) -> list[int]:
    if not prefills:
        return []
    first = min(prefills[0], budget - num_decodes)
    return [first, *chunks(num_decodes + first, prefills[1:], budget)]
'''


def run_notebook(session: Session, tmp_path: Path, text: str) -> None:
    """Run source as a notebook's cell: names live in `__main__`, the source in a file nobody imports."""
    cell = tmp_path / "cell.py"
    cell.write_text(text)
    exec(compile(text, str(cell), "exec"), {"__name__": "__main__", "session": session})


def test_parts_and_ledger_come_back_in_another_session(session: Session, tmp_path: Path) -> None:
    run_notebook(session, tmp_path, NOTEBOOK)
    session.check("kv.blocks_for")
    session.check("engine.plan_chunks")
    session.record("00", "tokens/s", "10", "40")
    assert session.save() == "kept in kept: engine.plan_chunks, kv.blocks_for"
    kept = (session.folder / "kv.blocks_for.py").read_text()
    assert "# my own words" in kept
    assert "from nanopd_lab.errors import OutOfBlocks" in kept

    again = Session(mode="learner", folder=session.folder)
    assert again.load() == "PASS  engine.plan_chunks\nPASS  kv.blocks_for"
    assert again.use("kv.blocks_for")(34, 16) == 3
    assert again.parts().chunk_policy.__name__ == "chunks"  # type: ignore[attr-defined]
    assert "tokens/s" in str(again.ledger())
    assert tokens_of(again)[0] == tokens_of(Session(mode="reference"))[0]
    # What came back can be kept again, and says the same.
    before = {file.name: file.read_text() for file in session.folder.iterdir()}
    again.save()
    assert {file.name: file.read_text() for file in session.folder.iterdir()} == before


def test_a_kept_file_runs_in_a_process_of_its_own(session: Session, tmp_path: Path) -> None:
    run_notebook(session, tmp_path, NOTEBOOK)
    session.check("kv.blocks_for")
    session.save()
    code = (session.folder / "kv.blocks_for.py").read_text() + "\nprint(PART(33, 16))\n"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.stdout.strip() == "3", result.stderr


def test_what_is_kept_is_checked_again(session: Session, tmp_path: Path) -> None:
    run_notebook(session, tmp_path, NOTEBOOK)
    session.check("kv.blocks_for")
    session.save()
    file = session.folder / "kv.blocks_for.py"
    file.write_text(file.read_text().replace("OVERHEAD = 0", "OVERHEAD = 1"))
    again = Session(mode="learner", folder=session.folder)
    assert again.load().startswith("not used: kv.blocks_for: FAIL")
    assert again.use("kv.blocks_for") is blocks_for


def test_only_what_passed_is_kept_and_nothing_is_thrown_away(session: Session, tmp_path: Path) -> None:
    session.exercise("engine.plan_chunks", recursive)
    session.check("engine.plan_chunks")
    session.save()
    later = Session(mode="learner", folder=session.folder)
    later.exercise("kv.blocks_for", with_ceil)  # never checked
    later.record("01", "GB/s", "3", "9")
    later.save()
    kept = sorted(file.name for file in session.folder.iterdir())
    assert kept == ["engine.plan_chunks.py", "ledger.json"]
    assert list(json.loads((session.folder / "ledger.json").read_text())) == ["01"]
    assert Session(mode="learner", folder=tmp_path / "empty").load() == "nothing kept in empty yet"


def test_what_cannot_be_kept_is_named(session: Session, tmp_path: Path) -> None:
    text = "table = {}\n@session.exercise('kv.blocks_for')\ndef f(tokens, block_size):\n"
    text += "    table[tokens] = 1\n    return -(-tokens // block_size)\n"
    run_notebook(session, tmp_path, text)
    session.check("kv.blocks_for")
    with pytest.raises(ValueError, match=r"kv\.blocks_for uses `table`, a dict of the notebook"):
        session.save()
    assert not session.folder.exists()


def test_a_variable_of_the_part_is_not_one_of_the_notebook(session: Session, tmp_path: Path) -> None:
    """IPython's `_` is whatever came out last; and a notebook has its own `count`."""
    text = "_ = count = [1]\n@session.exercise('kv.blocks_for')\ndef f(tokens, block_size):\n    count = 0\n"
    text += "    for _ in range(0, tokens, block_size):\n        count += 1\n    return count\n"
    run_notebook(session, tmp_path, text)
    session.check("kv.blocks_for")
    session.save()
    assert Session(mode="learner", folder=session.folder).load() == "PASS  kv.blocks_for"


def test_a_helper_under_another_name_is_kept_under_both(session: Session, tmp_path: Path) -> None:
    text = "def up(x): return int(-(-x // 1))\nround_up = up\n@session.exercise('kv.blocks_for')\n"
    run_notebook(
        session, tmp_path, text + "def f(tokens, block_size):\n    return round_up(tokens / block_size)\n"
    )
    session.check("kv.blocks_for")
    session.save()
    assert Session(mode="learner", folder=session.folder).load() == "PASS  kv.blocks_for"


def test_a_source_text_is_kept_as_it_is() -> None:
    text = '__global__ void copy(float *x) { /* "quotes" \\n */ }\n'
    namespace: dict[str, Any] = {}
    exec(standalone(text, "kernels.copy"), namespace)
    assert namespace["PART"] == text


def test_a_notebooks_variable_named_like_an_argument_is_not_needed(session: Session, tmp_path: Path) -> None:
    text = "tokens = block_size = count = object()\nOFFSET = 0\n"
    text += "@session.exercise('kv.blocks_for')\ndef f(tokens, block_size):\n"
    text += "    def up():\n        return -(-tokens // block_size)\n"
    text += "    count = sum(up() for _ in range(1))\n    return count + OFFSET\n"
    run_notebook(session, tmp_path, text)
    session.check("kv.blocks_for")
    assert session.save() == "kept in kept: kv.blocks_for"
    assert "OFFSET = 0" in (session.folder / "kv.blocks_for.py").read_text()
    assert Session(mode="learner", folder=session.folder).load() == "PASS  kv.blocks_for"


@pytest.mark.parametrize(
    "text", ["def (", "x = 1", "1 / 0", "import sys; sys.exit(1)", b"\xff\xfe"], ids=lambda text: repr(text)
)
def test_a_broken_file_does_not_keep_the_others_out(session: Session, text: str | bytes) -> None:
    """A notebook's first cell loads: it must run whatever an outage or an editor has left."""
    session.exercise("engine.plan_chunks", recursive)
    session.check("engine.plan_chunks")
    session.save()
    for name in ("kv.blocks_for.py", "ledger.json"):
        (session.folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    again = Session(mode="learner", folder=session.folder)
    said = again.load().splitlines()
    assert said[0].startswith("not used: ")
    assert "ledger.json cannot be read" in said[0]
    assert said[1] == "PASS  engine.plan_chunks"
    assert said[2].startswith("not used: kv.blocks_for: ")
    assert said[2].endswith("mend it, or delete it")
    with pytest.raises(ValueError, match=r"ledger\.json cannot be read"):
        again.save()


@pytest.mark.parametrize("impl", [lambda tokens, block_size: -(-tokens // block_size), partial(blocks_for)])
def test_what_is_no_def_passes_and_cannot_be_kept(session: Session, impl: Any) -> None:
    session.exercise("kv.blocks_for", impl)
    assert session.check("kv.blocks_for").status is Status.PASS
    with pytest.raises(ValueError, match=r"kv\.blocks_for is .*; write it as a def"):
        session.save()


def leaves(*_: Any) -> int:
    sys.exit(3)


@pytest.mark.parametrize(
    ("name", "result", "words"),
    [
        ("kv.blocks_for", lambda *_: torch.zeros(3), "cannot be compared"),
        ("attention.gather", lambda *_: (each for each in ()), "cannot be compared"),
        ("bench.arrivals", lambda *_: torch.zeros(()), "cannot be compared"),
        ("kv.blocks_for", leaves, "SystemExit: 3"),
        ("cost.features", leaves, "SystemExit: 3"),
    ],
)
def test_a_result_of_any_kind_is_wrong_and_no_fault_of_the_check(
    session: Session, name: str, result: Any, words: str
) -> None:
    def impl(*args: Any, **kwargs: Any) -> Any:
        return result(*args, *kwargs.values())

    impl.__signature__ = inspect.signature(find(name).reference)  # type: ignore[attr-defined]
    session.exercise(name, impl)
    with pytest.raises(CheckFailedError, match=words):
        session.check(name)
    assert session.use(name) is find(name).reference
