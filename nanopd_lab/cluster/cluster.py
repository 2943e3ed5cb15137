"""`Cluster`: many engines behind one `generate`.

with Cluster(ClusterConfig(model="smollm2", workers=3, policy="1p2d")) as cluster:
    outputs = cluster.generate(["The capital of France is"], SamplingParams(max_tokens=8, temperature=0))
    print(outputs[0].outputs[0].text, outputs[0].paths[0].route)
"""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Container, Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from nanopd_lab.cluster.accounts import PathReport
from nanopd_lab.cluster.actions import Emit, Settled
from nanopd_lab.cluster.config import ClusterConfig
from nanopd_lab.cluster.controller import Controller
from nanopd_lab.cluster.host import StepRecord
from nanopd_lab.cluster.inline import InlineLauncher
from nanopd_lab.cluster.launcher import Starter, WorkerLauncher
from nanopd_lab.cluster.looking import Look
from nanopd_lab.cluster.process import ProcessStarter
from nanopd_lab.cluster.starting import process_context
from nanopd_lab.cluster.worker_loop import WorkerSpec
from nanopd_lab.core import FinishReason, Logprob, SamplingParams
from nanopd_lab.engine.detokenizer import Detokenizer
from nanopd_lab.engine.outputs import CompletionOutput, RequestMetrics, RequestOutput
from nanopd_lab.engine.prompts import (
    Messages,
    Prompt,
    as_batch,
    as_conversations,
    params_for,
    render_chat,
    tokenize,
)
from nanopd_lab.errors import InvalidRequestError
from nanopd_lab.router import Policy, Role, Slo, Veiled, WorkerView

if TYPE_CHECKING:
    from nanopd_lab.bench.workload import Workload

SETTLE_S = 10.0


class RequestFailedError(ValueError):
    """A request ended with an error: its deadline, its attempts, or what the model returned."""


@dataclass
class ClusterOutput(RequestOutput):
    """As `RequestOutput`, and for each sample where its tokens came from."""

    paths: list[PathReport] = field(default_factory=list)

    @property
    def settled(self) -> bool:
        """True once the accounts are complete: every worker has given back what it held of the request."""
        return self.finished and bool(self.paths) and all(path.complete for path in self.paths)

    @property
    def num_cached_prompt_tokens(self) -> int:
        """Tokens of the prompt that nobody had to compute: found in the prefix cache where its prefill began.
        `num_cached_tokens` is of all samples and counts what the decode worker had as well. 0 until `settled`."""
        usages = (attempt.prefill for path in self.paths[:1] for attempt in path.attempts)
        return next((usage.first_cached for usage in usages if usage is not None), 0)


@dataclass(eq=False)
class _Sample:
    index: int
    text: Detokenizer | None
    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    cumulative: float = 0.0
    finish: FinishReason | None = None
    stop_reason: int | str | None = None
    error: str | None = None


@dataclass(eq=False)
class _Tracked:
    request_id: str
    prompt: str | None
    prompt_ids: list[int]
    params: SamplingParams
    metrics: RequestMetrics
    samples: list[_Sample]
    paths: dict[int, PathReport] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        return all(sample.finish is not None for sample in self.samples)


class Cluster:
    """Workers, a controller, and a thread that keeps both going (with `launcher="inline"` the caller's own).

    Args:
        config: see `ClusterConfig`
        clock: seconds on one clock for all workers

    Raises:
        ValueError: a setting is wrong, or a worker could not be started; nothing is left running.
    """

    def __init__(self, config: ClusterConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self.config = config
        self.clock = clock
        policy, roles = config.route_policy()
        limits = config.limits
        if config.launcher == "inline":  # workers are silent there for as long as nobody gives them a turn
            limits = replace(limits, heartbeat_s=math.inf)
        self.controller = Controller(policy, dict(zip(config.names, roles, strict=True)), limits)
        self._numbers = itertools.count()
        self._serial = itertools.count()
        self._tracked: dict[str, _Tracked] = {}
        self._fresh: dict[
            str, _Tracked
        ] = {}  # changed since the last poll; outputs are made when somebody looks
        self._watchers: list[deque[ClusterOutput]] = []
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._closed = False
        self._crash: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._owner: threading.Thread | None = None  # of an inline cluster, see `alone`
        self.launcher: InlineLauncher | WorkerLauncher
        if config.launcher == "inline":
            self.launcher = self._start_inline()
        else:
            if config.launcher == "process":
                process_context(map(str, config.worker_devices()))  # imports beside the tokenizer's loading
            self.tokenizer, self.vocab_size = _vocabulary(config.model)
            self.launcher = self._start_actors(roles) if config.launcher == "ray" else self._start_processes()
            self._thread = threading.Thread(target=self._drive, name="nanopd-controller", daemon=True)
            self._thread.start()

    def _start_inline(self) -> InlineLauncher:
        from nanopd_lab.cluster.build import build_host
        from nanopd_lab.transfer.registry import create_transport

        config = self.config
        devices = dict(zip(config.names, config.worker_devices(), strict=True))
        pools: dict[str, Any] = {}
        loaded: dict[Any, Any] = {}
        lives: dict[str, int] = {}
        copying = config.parts.copying
        transport_name = "inproc" if copying else config.transport

        def start(name: str) -> Any:
            lives[name] = lives.get(name, -1) + 1
            device = devices[name]
            transport = create_transport(
                transport_name, devices=list(devices.values()), one_process=True, pools=pools, **copying
            )
            host, model = build_host(
                name, config.engine_config(str(device)), transport, config.terms, life=lives[name],
                trace=config.trace, loaded=loaded.get(device), clock=self.clock, parts=config.parts,
            )  # fmt: skip
            loaded[device] = model
            self.tokenizer, self.vocab_size = model.tokenizer, model.geometry.vocab_size
            return host

        return InlineLauncher(self.controller, start, config.names, self.clock, config.max_restarts)

    def _start_processes(self) -> WorkerLauncher:
        from nanopd_lab.transfer.registry import check_transport

        config = self.config
        devices = config.worker_devices()
        check_transport(config.transport, devices)
        threads = config.worker_threads() if devices[0].type == "cpu" else config.threads
        named = tuple(map(str, devices))
        return self._launch(ProcessStarter(named), named, threads)

    def _start_actors(self, roles: Seq[Role]) -> WorkerLauncher:
        from nanopd_lab.cluster.ray_launcher import RayStarter
        from nanopd_lab.transfer.registry import check_transport

        config = self.config
        check_transport(config.transport, [])  # the name; what it joins is known when the workers are placed
        kinds = {device.partition(":")[0] for device in config.devices or ()}
        threads = config.worker_threads() if config.ray.address is None else config.threads or 1
        starter = RayStarter(config.ray, config.names, roles, kinds, threads)
        return self._launch(
            starter, ("cpu",) * config.workers, threads
        )  # a worker's device is where Ray puts it

    def _launch(self, starter: Starter, devices: tuple[str, ...], threads: int | None) -> WorkerLauncher:
        config = self.config
        specs = [
            WorkerSpec(
                name=name,
                config=config.engine_config(device),
                transport=config.transport,
                devices=devices,
                terms=config.terms,
                threads=threads,
                trace=config.trace,
            )
            for name, device in zip(config.names, devices, strict=True)
        ]
        return WorkerLauncher(
            self.controller, starter, specs, config.max_restarts, config.start_timeout_s, self.clock
        )

    # ------------------------------------------------------------------ the caller's side

    def submit(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        request_id: str | None = None,
        timeout_s: float | None = None,
    ) -> str:
        """Queue a request and return its id at once; `poll` tells what becomes of it.

        Raises:
            InvalidRequestError: it can never be served
            ClusterBusyError: the queue is full
            ClusterDownError: no worker is left
        """
        params = params or SamplingParams()
        text, ids = tokenize(prompt, self.tokenizer, self.vocab_size, self.config.model)
        if params.stop_strings and self.tokenizer is None:
            raise InvalidRequestError(
                f"{self.config.model} has no tokenizer; use stop_token_ids instead of stop"
            )
        if params.seed is None and not params.greedy:
            from nanopd_lab.model.sampling import request_seed

            # What one engine would give its nth request; signed, as `SamplingParams` wants it.
            seed = request_seed(self.config.seed, next(self._serial))
            params = replace(params, seed=seed - (1 << 64) if seed >= 1 << 63 else seed)
        else:
            next(self._serial)
        with self._lock:
            self._check_usable()
            name = request_id or f"cluster-{next(self._numbers)}"
            now = self.clock()
            self.controller.validate(ids, params)
            if name in self._tracked:
                raise InvalidRequestError(f"request id {name!r} is already in use")
            samples = [_Sample(index, self._reader(ids, params)) for index in range(params.n)]
            tracked = _Tracked(name, text, ids, params, RequestMetrics(now), samples)
            deadline = now + (self.config.request_timeout_s if timeout_s is None else timeout_s)
            submitted = 0
            self._tracked[name] = tracked
            try:
                for index in range(params.n):
                    self.controller.submit(name, tuple(ids), params, now, deadline, index)
                    submitted += 1
            except ValueError:
                del self._tracked[name]
                if submitted:
                    self.controller.cancel(name, now)
                raise
            self._collect()
        self._wake()
        return name

    def cancel(self, request_id: str) -> None:
        """End a request; what it has stays. Unknown ids are ignored."""
        with self._lock:
            self.controller.cancel(request_id, self.clock())
            self._collect()
        self._wake()

    def poll(self, timeout: float = 0.0, wanted: Container[str] | None = None) -> list[ClusterOutput]:
        """Requests that have got tokens, have ended or have settled since the last call; waits up to `timeout`
        seconds for some.

        Args:
            wanted: only of these; what has become of others stays for whoever asks for them

        Raises:
            ValueError: the cluster is closed.
            RuntimeError: its controller has stopped.
        """
        self._check_usable()

        def ready() -> list[str]:
            return [name for name in self._fresh if wanted is None or name in wanted]

        if self._thread is None:
            deadline = self.clock() + timeout
            while True:
                self._take(self.launcher.step())  # type: ignore[union-attr]
                if ready() or self.clock() >= deadline:
                    break
        with self._changed:
            if timeout > 0 and self._thread is not None and not ready():
                self._changed.wait(timeout)
            self._check_crash()
            return [self._output(self._fresh.pop(name)) for name in ready()]

    def generate(
        self,
        prompts: Prompt | Seq[Prompt],
        sampling_params: SamplingParams | Seq[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[ClusterOutput]:
        """Continue each prompt; outputs are in the order of the prompts, with their accounts.

        Raises:
            InvalidRequestError: a prompt cannot be served; it is named, and none has been started
            RequestFailedError: a request ended with an error; the others are cancelled
        """
        batch = as_batch(prompts)
        each = params_for(batch, sampling_params)
        for number, (prompt, params) in enumerate(zip(batch, each, strict=True)):
            try:
                ids = tokenize(prompt, self.tokenizer, self.vocab_size, self.config.model)[1]
                self.controller.validate(ids, params)
            except InvalidRequestError as error:
                raise InvalidRequestError(f"prompt {number}: {error}") from None
        names: list[str] = []
        outputs: dict[str, ClusterOutput] = {}
        try:
            names += [self.submit(prompt, params) for prompt, params in zip(batch, each, strict=True)]
            for output in self.stream(names, use_tqdm):
                outputs[output.request_id] = output
                for sample in output.outputs:
                    if sample.error is not None:
                        raise RequestFailedError(f"prompt {names.index(output.request_id)}: {sample.error}")
        except BaseException:
            for name in names:
                self.cancel(name)
            raise
        return [outputs[name] for name in names]

    def stream(self, request_ids: Seq[str], use_tqdm: bool = False) -> Iterator[ClusterOutput]:
        """Outputs of these requests as they grow, until all have settled.

        Raises:
            InvalidRequestError: one is unknown, or somebody else has read all of it.
        """
        pending = set(request_ids)
        bar = tqdm(
            total=len(pending),
            desc="Processed prompts",
            unit="prompt",
            disable=not use_tqdm,
            dynamic_ncols=True,
        )
        finished: dict[str, float] = {}
        with bar:
            while pending:
                outputs = self.poll(0.1, pending)
                if not outputs:
                    with self._lock:
                        lost = pending - self._tracked.keys() - self._fresh.keys() - finished.keys()
                    if lost:
                        raise InvalidRequestError(
                            f"request {min(lost)!r} is not under way: it was never submitted, or all of it has been "
                            "read already"
                        )
                for output in outputs:
                    if output.finished and output.request_id not in finished:
                        finished[output.request_id] = self.clock()
                        bar.update()
                    if output.settled:
                        pending.discard(output.request_id)
                    yield output
                # A worker that is slow to give blocks back need not hold the caller up.
                pending -= {
                    name for name in pending & set(finished) if self.clock() - finished[name] > SETTLE_S
                }

    def chat(
        self,
        messages: Messages | Seq[Messages],
        sampling_params: SamplingParams | Seq[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[ClusterOutput]:
        """Answer one conversation or many, each a list of `{"role": …, "content": …}`."""
        prompts = [
            render_chat(each, self.tokenizer, self.config.model) for each in as_conversations(messages)
        ]
        return self.generate(prompts, sampling_params, use_tqdm)

    def bench(self, workload: Workload, slo: Slo | None = None, **options: Any) -> dict[str, Any]:
        """Serve a workload at its times; returns the result that `nanopd-lab bench` writes.

        Args:
            slo: objectives, for goodput
            options: as of `LoadOptions`
        """
        from nanopd_lab.bench.serving import bench_cluster  # a driver of clusters, above them

        return bench_cluster(self, workload, slo, **options)

    def use_policy(self, policy: str | Policy, **settings: Any) -> None:
        """Route by another policy from now on; the workers go on with what they have loaded.

        Args:
            policy: as of `ClusterConfig`
            settings: others of `ClusterConfig` that only a policy looks at: `cost_model`, `goodput`

        Raises:
            ValueError: requests are under way, a worker is gone for good, or a setting is wrong; nothing has changed.
        """
        config = replace(self.config, policy=policy, **settings)
        chosen, roles = config.route_policy()
        with self._lock:
            self._check_usable()
            self.controller.use_policy(chosen, dict(zip(config.names, roles, strict=True)), self.clock())
            self.config = config
            self._collect()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Meanwhile only this thread may use an inline cluster, which computes in whoever's thread polls; others get a
        ValueError instead of a race. One over processes is for all, and stays so."""
        with self._lock:
            self._check_usable()
            self._owner = threading.current_thread() if self._thread is None else None
        try:
            yield
        finally:
            self._owner = None

    @contextmanager
    def veiled(self) -> Iterator[None]:
        """Meanwhile the policy does not see how long outputs may be, see `Veiled`: for requests that end just there."""
        with self._lock:
            policy = self.controller.policy
            veiled = policy if isinstance(policy, Veiled) else Veiled(policy)
            self.controller.exchange(veiled)
        try:
            yield
        finally:
            with self._lock:
                if self.controller.policy is veiled:  # and not what is left to one worker
                    self.controller.exchange(policy)

    # ------------------------------------------------------------------ looking inside

    def workers(self) -> list[WorkerView]:
        """The workers that are up, as the policy sees them."""
        with self._lock:
            return self.controller.views()

    @contextmanager
    def watched(self) -> Iterator[Callable[[], Look]]:
        """Meanwhile a function that tells what the workers have and which requests have settled, whoever polls.

        It may be called from any thread; a few times a second costs the cluster nothing that could be measured.
        """
        ended: deque[ClusterOutput] = deque()

        def look() -> Look:
            with self._lock:
                self.check_open()
                taken = [ended.popleft() for _ in range(len(ended))]
                queued, running = self.controller.queue_length, len(self._tracked)
                return Look(self.clock(), queued, running, taken, self.controller.look())

        with self._lock:
            self._watchers = [*self._watchers, ended]
        try:
            yield look
        finally:
            with self._lock:
                self._watchers = [each for each in self._watchers if each is not ended]

    def steps(self) -> dict[str, list[StepRecord]]:
        """With `trace=True`: every worker's steps since the last call, for timelines."""
        with self._lock:
            if isinstance(self.launcher, WorkerLauncher):
                found = self.launcher.steps()
                self._collect()
                return found
            taken = {}
            for name, host in self.launcher.hosts.items():
                taken[name], host.steps = host.steps or [], []
            return taken

    @property
    def longest(self) -> int:
        """Most tokens of a prompt with its output that a worker takes.

        Raises:
            ClusterDownError: no worker is left.
        """
        with self._lock:
            return self.controller.longest

    def check_open(self) -> None:
        """Raise ValueError if it is closed, RuntimeError if its controller has stopped."""
        if self._closed:
            raise ValueError("the cluster is closed; make a new one")
        self._check_crash()

    def check_integrity(self) -> None:
        """Raise AssertionError if a worker has lost a block, or holds one although nothing runs."""
        with self._lock:
            self._check_owner()
            self.controller.check_integrity()
            if isinstance(self.launcher, WorkerLauncher):
                wrong = [text for text in self.launcher.ask("check").values() if text]
                self._collect()
                assert not wrong or self.controller.num_unsettled, "; ".join(wrong)
                return
            for host in self.launcher.hosts.values():
                host.core.check_integrity()

    def close(self) -> None:
        """Stop all workers. Requests that have not finished are lost. Safe to call twice."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        if self._thread is not None:
            self._wake()
            self._thread.join(timeout=30)
        self.launcher.close()

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ------------------------------------------------------------------ the driver

    def _drive(self) -> None:
        assert isinstance(self.launcher, WorkerLauncher)
        try:
            while True:
                with self._lock:
                    if self._closed:
                        return
                    self.launcher.pump(0.0)
                    self._collect()
                    timeout = self.launcher.until_due(1.0)
                self.launcher.wait(timeout)
        except BaseException as error:
            with self._changed:
                self._crash = error
                self._changed.notify_all()

    def _wake(self) -> None:
        if isinstance(self.launcher, WorkerLauncher):
            self.launcher.wake()

    def _collect(self) -> None:
        self.launcher.collect()
        events, self.launcher.events = self.launcher.events, []
        self._take(events)

    def _take(self, events: Seq[Any]) -> None:
        """Turn the controller's events into outputs."""
        touched: dict[str, _Tracked] = {}
        for event in events:
            tracked = self._tracked.get(event.request_id)
            if tracked is None:
                continue
            touched[event.request_id] = tracked
            if isinstance(event, Settled):
                tracked.paths[event.index] = event.path
            elif isinstance(event, Emit):
                self._read(tracked, tracked.samples[event.index], event)
        if not touched:
            return
        with self._changed:
            self._fresh |= touched
            self._changed.notify_all()
        for name, tracked in touched.items():
            if len(tracked.paths) == len(tracked.samples):
                self._tracked.pop(name, None)
                for watcher in self._watchers:
                    watcher.append(self._output(tracked))

    def _read(self, tracked: _Tracked, sample: _Sample, event: Emit) -> None:
        if sample.finish is not None:
            return  # ended at a stop string, before the controller knew
        now = self.clock()
        if event.tokens and tracked.metrics.first_token_time is None:
            tracked.metrics.first_token_time = now
        stopped = None
        for number, token in enumerate(event.tokens):
            sample.tokens.append(token.token)
            sample.times.append(now)
            sample.cumulative += token.logprob
            if token.top_logprobs is not None:
                sample.logprobs.append(token.top_logprobs)
            # A stop token is part of token_ids but not of the text.
            ends = event.finish_reason is FinishReason.STOP and number == len(event.tokens) - 1
            if sample.text and not ends:
                stopped = sample.text.push(token.token)
                if stopped:
                    break
        if sample.text and event.finish_reason is not None and not stopped:
            stopped = sample.text.end()
        if stopped:
            sample.finish, sample.stop_reason = FinishReason.STOP, stopped
            if event.finish_reason is None:
                self.controller.finish(tracked.request_id, sample.index, FinishReason.STOP, now, stopped)
        elif event.finish_reason is not None:
            sample.finish, sample.stop_reason, sample.error = (
                event.finish_reason,
                event.stop_reason,
                event.error,
            )
        if tracked.finished and tracked.metrics.finished_time is None:
            tracked.metrics.finished_time = now

    def _output(self, tracked: _Tracked) -> ClusterOutput:
        metrics = tracked.metrics
        paths = [tracked.paths[index] for index in sorted(tracked.paths)]
        metrics.num_computed_tokens = sum(path.computed_tokens for path in paths)
        metrics.num_cached_tokens = sum(path.cached_tokens for path in paths)
        scheduled = [a.prefill.scheduled for path in paths for a in path.attempts if a.prefill]
        metrics.first_scheduled_time = min((each for each in scheduled if each is not None), default=None)
        return ClusterOutput(
            request_id=tracked.request_id,
            prompt=tracked.prompt,
            prompt_token_ids=tracked.prompt_ids,
            outputs=[self._completion(tracked, sample) for sample in tracked.samples],
            finished=tracked.finished,
            metrics=metrics,
            paths=paths if len(paths) == len(tracked.samples) else [],
        )

    def _completion(self, tracked: _Tracked, sample: _Sample) -> CompletionOutput:
        logprobs = None
        if tracked.params.logprobs is not None:
            logprobs = [
                {token: entry._replace(decoded_token=self._decode(token)) for token, entry in top.items()}
                for top in sample.logprobs
            ]
        return CompletionOutput(
            index=sample.index,
            text=sample.text.text if sample.text else "",
            token_ids=list(sample.tokens),
            cumulative_logprob=sample.cumulative if logprobs is not None else None,
            logprobs=logprobs,
            finish_reason=str(sample.finish) if sample.finish else None,
            stop_reason=sample.stop_reason,
            error=sample.error,
            token_times=sample.times,
        )

    def _decode(self, token: int) -> str | None:
        return None if self.tokenizer is None else self.tokenizer.decode([token])

    def _reader(self, ids: list[int], params: SamplingParams) -> Detokenizer | None:
        if self.tokenizer is None or not params.detokenize:
            return None
        return Detokenizer(
            self.tokenizer,
            ids,
            params.stop_strings,
            params.include_stop_str_in_output,
            params.min_tokens,
        )

    def _check_usable(self) -> None:
        self.check_open()
        self._check_owner()

    def _check_owner(self) -> None:
        owner = self._owner
        if owner is not None and owner is not threading.current_thread():
            raise ValueError(
                f"thread {owner.name} has this inline cluster to itself: a cockpit is running, say; stop it first"
            )

    def _check_crash(self) -> None:
        if self._crash is not None:
            raise RuntimeError(f"the controller stopped: {self._crash}") from self._crash


def _vocabulary(model: str) -> tuple[Any, int]:
    """The tokenizer, or None, and the number of tokens, without loading weights."""
    from nanopd_lab.model.loading import load_tokenizer, read_config, resolve_folder
    from nanopd_lab.model.shapes import shape_config

    if model.startswith("random:"):
        return None, int(shape_config(model.removeprefix("random:")).vocab_size)
    path = resolve_folder(model)
    return load_tokenizer(path), int(read_config(path, model).vocab_size)
