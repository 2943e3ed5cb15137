"""The loop of steps: plan one, launch it, take in the tokens of the last.

With `ahead` a step is planned and launched before the tokens of the one before it are known, so that the device
never waits for the host. The tokens are the same either way; without it this is the simple loop.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Protocol

from nanopd_lab.core import SampledToken, Sequence, StepPlan


class Launched(Protocol):
    """A step on its way through a device."""

    @property
    def plan(self) -> StepPlan:
        """What it computes."""
        ...

    def result(self) -> Seq[Seq[SampledToken]]:
        """Element i holds the tokens drawn behind `plan.chunks[i]`; waits for them."""
        ...


class Planner(Protocol):
    """`Scheduler`, or something around it."""

    def schedule(self) -> StepPlan | None:
        """The next step, or None if there is none before an earlier one is complete."""
        ...

    def complete(self, plan: StepPlan, sampled: Seq[Seq[SampledToken]]) -> list[Sequence]:
        """Take in a step's tokens; returns the sequences that got one or ended."""
        ...

    def roll_back(self, plan: StepPlan) -> None:
        """The step failed; of several, the one planned last is rolled back first."""
        ...


@dataclass(eq=False)
class StepLoop:
    """Runs the plans of `planner` through `launch`.

    If planning, launching or a result raises, no sequence is lost: steps that failed are rolled back, their
    sequences are queued again, and the exception goes on to the caller.
    """

    planner: Planner
    launch: Callable[[StepPlan], Launched]
    ahead: bool
    under_way: Launched | None = None

    def step(self) -> tuple[StepPlan, list[Sequence]] | None:
        """The plan that ended and the sequences it touched; None if nothing did (nothing to do, or the first step of
        several is on its way)."""
        ready, self.under_way = self.under_way, self._launch()
        if not self.ahead or (ready is None and self.under_way is None):
            ready, self.under_way = self.under_way, None
        return None if ready is None else (ready.plan, self._take_in(ready))

    def _launch(self) -> Launched | None:
        plan = self.planner.schedule()
        if plan is None:
            return None
        try:
            return self.launch(plan)
        except BaseException:
            self.planner.roll_back(plan)
            raise

    def _take_in(self, launched: Launched) -> list[Sequence]:
        try:
            sampled = launched.result()
        except BaseException:
            for lost in (self.under_way, launched):
                if lost is not None:
                    self.planner.roll_back(lost.plan)
            self.under_way = None
            raise
        return self.planner.complete(launched.plan, sampled)
