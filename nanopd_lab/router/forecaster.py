"""What a layout of workers can be expected to serve at a rate, by formula.

    Forecaster(outlook, Workload.of(prompt_lengths, output_lengths)).forecast(Layout(5, 3), rate)

To first order n_P/n_D = λE[T_prefill]/ρ_P : λE[out]·t(B*)/(B*·ρ_D), with B* the largest batch whose steps meet TPOT. As
objectives are about each request and not about means, this goes one order further:

prefill  M/G/c (`queueing`): requests go to the worker with the least to do; a service is the sum of a prompt's chunks.
         Under load prompts share steps, which saves reading weights and costs the first of them some waiting.
decode   The batch B settles where the tokens asked for are the tokens made: λE[out] = B/t(B) (Little's law). It swings
         as that of a shared processor, Var B = B/(1 − g), with g the share of a step that grows with B.
mixed    Every step carries the decodes. A prompt takes steps of t(B, chunk), and if prompts take a share u of the time
         from those that decode, a token takes t(B)/(1 − u) and an output spreads as a delayed busy period does.
link     The last chunk's blocks are waited for, and what a slow link has left of the others; cards are shared.

Not in it: bursts (arrivals are Poisson), lengths that go together, preemption, prefix caches, the minutes in which a
system fills or drains. The simulator has all of these; this takes a millisecond.
"""

from __future__ import annotations

import math

import numpy as np

from nanopd_lab.router.crowds import blindness, crowding, queued_services, shared_services, swing_of
from nanopd_lab.router.layouts import Forecast, Layout, Workload
from nanopd_lab.router.outlook import Outlook
from nanopd_lab.router.queueing import (
    Array,
    Service,
    Waiting,
    mean,
    normal_below,
    sum_below,
    waiting,
)
from nanopd_lab.router.worker_times import WorkerTimes

SHARE = 0.9
# Of a batch's variance so much is left in its mean over a request's life, if all live as long.
WINDOW = 2 / 3


class Forecaster:
    """See the module. What depends on neither rate nor layout is worked out once and kept.

    Args:
        outlook: how long steps and pulls take, and what is promised
        workload: lengths
        max_num_seqs, num_blocks: of each worker; 0 blocks: as many as are asked for
        ahead: workers plan a step while the one before runs, as `SimConfig.ahead`
        share: of the requests that must get what they were promised, for `capacity`

    Raises:
        ValueError: a share outside (0, 1), or no place for a sequence.
    """

    def __init__(
        self,
        outlook: Outlook,
        workload: Workload,
        *,
        max_num_seqs: int = 256,
        num_blocks: int = 0,
        ahead: bool = True,
        share: float = SHARE,
    ) -> None:
        if not 0 < share < 1:
            raise ValueError(f"share is {share}; a share of requests lies between 0 and 1 (0.9, not 90)")
        if max_num_seqs < 1 or num_blocks < 0:
            raise ValueError(
                f"max_num_seqs is {max_num_seqs}, num_blocks {num_blocks}; a worker needs a place and room"
            )
        self.outlook, self.workload, self.ahead, self.share = outlook, workload, ahead, share
        self.times = WorkerTimes(outlook, workload, max_num_seqs, num_blocks)

    def unloaded(self) -> tuple[float, float]:
        """(TTFT that `share` of the prompts meet, TPOT) of requests that nobody disturbs, s."""
        alone = np.sort(self.times.beside(0).alone)
        within = math.ceil(self.share * len(alone) - 1e-9) - 1
        return float(alone[within]), self.times.decode_step_s(1) if self.times.mean_gaps else 0.0

    # ---- one layout at one rate ------------------------------------------------------------------------

    def forecast(self, layout: Layout, rate: float) -> Forecast:
        """What to expect of `layout` at `rate` requests a second; an attainment of 0 where the queues grow for ever.

        Raises:
            ValueError: a layout with no worker for some of the work, or a rate that is not positive.
        """
        if not 0 < rate < math.inf:
            raise ValueError(f"rate is {rate} requests/s; it must be positive and finite")
        layout.check()
        return self._mixed(layout, rate) if layout.mixed else self._split(layout, rate)

    def _split(self, layout: Layout, rate: float) -> Forecast:
        times = self.times
        prompts = times.beside(0)
        load, services = shared_services(rate / layout.prefills, prompts.alone, prompts.full, layout.prefills)
        batch = times.batch_of(rate / layout.decodes * times.mean_gaps)
        link_load, handover, swing = self._handover(layout, rate, mean(services))
        if load >= 1 or batch >= times.places or link_load >= 1:
            fits = float(batch < times.places)
            return Forecast(
                layout, rate, float(load < 1), fits, 0.0, fits, math.inf, math.inf, load, batch, link_load
            )
        queue = queued_services(rate / layout.prefills, services, prompts.full)
        wait = waiting(layout.prefills, load, Service.of(services), queued=queue)
        step_s, growth = times.step_s(batch + 1 / layout.decodes)
        variance = swing_of(batch, growth / step_s * batch, layout.decodes)
        # A decode worker hears of the blocks, and then that they have arrived.
        handover += 2 * self._until_planned(step_s, batch)
        ttft, ttft_met = self._ttft(wait, services, prompts.full, queue[0], 0.0)
        met, tpot = self._outputs(step_s, growth, variance, 0.0, 0.0, wait, services, handover, swing)
        room = self._room(batch, variance)
        return Forecast(layout, rate, ttft_met, *met, room, ttft, tpot, load, batch, link_load)

    def _mixed(self, layout: Layout, rate: float) -> Forecast:
        times, workers = self.times, layout.mixed
        per_worker, batch = rate / workers, 0.0
        for _ in range(10):
            prompts = times.beside(min(batch, times.places))
            load, services = shared_services(per_worker, prompts.alone, prompts.full, 1)
            part = min(load, 1.0) ** 2
            extra = part * prompts.full_extra + (1 - part) * prompts.alone_extra
            crowded = crowding(batch + load, workers)
            taken = per_worker * mean(extra) * crowded
            before = batch
            batch = times.batch_of(per_worker * times.mean_gaps / (1 - taken)) if taken < 1 else math.inf
            if batch == math.inf or abs(batch - before) <= 1e-3 * batch:
                break
        if load >= 1 or batch >= times.places:
            fits = float(batch < times.places)
            return Forecast(layout, rate, float(load < 1), fits, 0.0, fits, math.inf, math.inf, load, batch)
        blind = blindness(batch, workers)
        queue = queued_services(per_worker, services, prompts.full)
        uneven = 1 / workers + (1 - 1 / workers) * blind**2 / 3
        service = Service.of(services)
        # A long prompt slows the worker's decodes down, so that jobs end elsewhere and requests follow them there.
        shunned = (1 - 1 / workers) * (1 - service.mean_s**2 / service.square_s2)
        wait = waiting(
            1,
            load,
            service,
            probability=load * blind * (1 - shunned),
            queued=queue,
            unevenness=uneven,
        )
        step_s, growth = times.step_s(batch + 1 / workers)
        variance = swing_of(batch, growth / step_s * batch, workers)
        sync = self._until_planned(step_s, batch)
        ttft, ttft_met = self._ttft(wait, services, prompts.full, uneven * queue[0], sync)
        each = Service.of(extra)
        squares = each.square_s2 - each.mean_s**2 * (1 - 1 / workers - blind**4)
        squares *= per_worker * crowded
        met, tpot = self._outputs(step_s, growth, variance, taken, squares, wait, services + sync)
        room = self._room(batch, variance)
        return Forecast(layout, rate, ttft_met, *met, room, ttft, tpot, load, batch)

    # ---- parts -----------------------------------------------------------------------------------------

    def _until_planned(self, step_s: float, batch: float) -> float:
        """Mean time until what has come during a decode step is in one: the rest of it, and of one planned already."""
        return step_s * (0.5 + self.ahead) * min(1.0, batch)

    def _ttft(
        self, wait: Waiting, services: Array, full: Array, load: float, sync: float
    ) -> tuple[float, float]:
        """(mean TTFT, share of prompts whose first token comes in time).

        Who waits shares its step with prompts that come meanwhile, up to a step's budget: waiting grows by as much.
        """
        prompts = self.times.prompts
        others = (-prompts % self.outlook.max_num_batched_tokens) * float(full.sum() / prompts.sum())
        shared = wait.probability * min(load * wait.mean_s, mean(others)) if wait.probability else 0.0
        ttft_s = wait.overall_s + shared + mean(services) + sync
        limit = self.outlook.slo.ttft_s
        if limit == math.inf:
            return ttft_s, 1.0
        slack = limit - services - sync
        left = np.where(slack > 0, np.maximum(slack / (1 + load), slack - others), slack)
        return ttft_s, mean(wait.within(left))

    def _outputs(
        self,
        step_s: float,
        growth: float,
        variance: float,
        taken: float,
        squares: float,
        wait: Waiting,
        first: Array,
        handover: float = 0.0,
        swing: float = 0.0,
    ) -> tuple[tuple[float, float], float]:
        """((share that meets TPOT, share that meets E2E), mean TPOT).

        Args:
            step_s, growth, variance: of a decode step; of a step for one sequence more; of the batch
            taken, squares: λE[X] and λE[X²] of the time X that a prompt takes from those that decode
            wait, first: of prompts, waiting and then the rest of TTFT, `[prompts]`
            handover, swing: from the first token on until the second is begun, and its variance
        """
        slo, gaps = self.outlook.slo, self.times.gaps
        some = gaps > 0
        work = gaps * step_s
        # The time of work D that is interrupted at rate λ for X: mean D/(1 - u), variance D·λE[X²]/(1 - u)³.
        expected = np.where(some, work / (1 - taken) + handover, 1e-9)
        spread = WINDOW * variance * (gaps * growth / (1 - taken)) ** 2 + work * squares / (1 - taken) ** 3
        spread += swing
        tpot_s = mean(expected[some] / gaps[some]) if some.any() else 0.0
        tpot_met = e2e_met = 1.0
        if slo.tpot_s < math.inf:
            tpot_met = mean(np.where(some, sum_below(slo.tpot_s * gaps, expected, spread), 1.0))
        if slo.e2e_s < math.inf:
            left = slo.e2e_s - np.where(some, expected, 0.0)[:, None] - first[None, :]
            e2e_met = mean(wait.within(left.ravel()))
        return (tpot_met, e2e_met), tpot_s

    def _room(self, batch: float, variance: float) -> float:
        """Share of time in which the batch fits the places."""
        return float(normal_below(np.asarray((self.times.places - batch) / math.sqrt(max(variance, 1e-9)))))

    def _handover(self, layout: Layout, rate: float, prefill_s: float) -> tuple[float, float, float]:
        """(load of the busiest cards, mean seconds from the first token on until all blocks are there, their variance).

        A card that is shared gives a pull 1 − load of itself on average (processor sharing); what that adds swings by
        about 0.6 of itself (fitted to simulations).
        """
        transfer, outlook, prompt = self.outlook.transfer, self.outlook, self.times.mean_prompt
        if transfer is None:
            return 0.0, 0.0, 0.0
        blocks = prompt / outlook.block_size + 0.5
        sending = blocks * outlook.block_bytes / transfer.bytes_per_s
        load = rate / min(layout.prefills, layout.decodes) * sending
        if load >= 1:
            return load, math.inf, math.inf
        chunks = max(1.0, math.ceil(prompt / outlook.max_num_batched_tokens))
        alone, shared = (
            max(each / chunks, each - prefill_s * (chunks - 1) / chunks)
            for each in (sending, sending / (1 - load))
        )
        setup = transfer.setup_s + blocks / chunks * transfer.block_s
        return load, setup + shared, (0.6 * (shared - alone)) ** 2

    def ceiling(self, layout: Layout) -> float:
        """Requests a second at which prefill, decode or the links are full, whatever is promised."""
        times = self.times
        decode = times.most_tokens_per_s / times.mean_gaps if times.mean_gaps else math.inf
        prefill = 1 / float(times.beside(0).full.mean())
        if layout.mixed:
            return layout.mixed * min(decode, prefill)
        link, _, _ = self._handover(layout, 1e-9, 0.0)
        return min(layout.decodes * decode, layout.prefills * prefill, 1e-9 / link if link else math.inf)
