"""`Cluster`: many engines behind one `generate`.

with Cluster(ClusterConfig(model="smollm2", workers=3, policy="1p2d")) as cluster:
    outputs = cluster.generate(["The capital of France is"], SamplingParams(max_tokens=8, temperature=0))
    print(outputs[0].outputs[0].text, outputs[0].paths[0].route)
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from nanopd_lab.cluster.config import ClusterConfig
from nanopd_lab.cluster.driver import ClusterDriver
from nanopd_lab.cluster.outputs import ClusterOutput, RequestFailedError
from nanopd_lab.core import SamplingParams
from nanopd_lab.engine.prompts import (
    Messages,
    Prompt,
    as_batch,
    as_conversations,
    check_params,
    params_for,
    render_chat,
    tokenize,
)
from nanopd_lab.errors import InvalidRequestError
from nanopd_lab.router import Policy, Slo, Veiled

if TYPE_CHECKING:
    from nanopd_lab.bench.workload import Workload

SETTLE_S = 10.0


class Cluster(ClusterDriver):
    """Workers, a controller, and a thread that keeps both going (with `launcher="inline"` the caller's own).

    Args:
        config: see `ClusterConfig`
        clock: seconds on one clock for all workers

    Raises:
        ValueError: a setting is wrong, or a worker could not be started; nothing is left running.
    """

    def __init__(self, config: ClusterConfig, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(config, clock)
        self._serial = itertools.count()

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
        params = check_params(params)
        if timeout_s is not None and not (isinstance(timeout_s, (int, float)) and timeout_s > 0):
            raise InvalidRequestError(
                f"timeout_s is {timeout_s!r}; it must be a positive number of seconds, or None"
            )
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
        return self._submit(request_id, text, ids, params, timeout_s)

    def generate(
        self,
        prompts: Prompt | Seq[Prompt],
        sampling_params: SamplingParams | Seq[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[ClusterOutput]:
        """Continue each prompt; outputs are in the order of the prompts, with their accounts.

        Raises:
            InvalidRequestError: a prompt cannot be served; it is named, and none has been started
            ClusterBusyError: the queue is full; those that were in it are cancelled
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
            for prompt, params in zip(batch, each, strict=True):
                names.append(self.submit(prompt, params))
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
                        lost = self._requests.lost(pending - finished.keys())
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

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
