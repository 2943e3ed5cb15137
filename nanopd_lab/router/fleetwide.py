"""All workers together, as a role plan sees them when it begins, and the roles of each when it has ended."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from nanopd_lab.router.estimates import FULL, Terms
from nanopd_lab.router.policy import Role, WorkerView
from nanopd_lab.router.replay_worker import Room


class Load(NamedTuple):
    """What the workers have to do when a plan begins, all together.

    decoding, context: outputs under way, those among them that wait for a link or for room, and their tokens
    backlog_s: of prompts
    """

    decoding: int
    context: float
    backlog_s: float
    room: Room


class Fleetwide(NamedTuple):
    """Where a plan begins.

    workers, prefills: in all, and that now only prefill; 0: all are mixed
    ages: tokens that outputs under way have produced, by the bits of their prompt's length
    leftovers: outputs that would be left on workers that are to prefill, by the number of these
    stuck: that run on workers that prefill now
    ends, ended, going: what `survival` asks: lengths of outputs that have ended; of those of them that came with the
        arrivals that the plan looks at; and tokens so far of those of these that go on
    """

    workers: int
    prefills: int
    leftovers: Sequence[int]
    stuck: int
    load: Load
    ages: Mapping[int, Sequence[float]]
    ends: Sequence[int] = ()
    ended: Sequence[int] = ()
    going: Sequence[float] = ()

    @classmethod
    def of(
        cls, terms: Sequence[Terms], mean_output: float, ages: Mapping[int, Sequence[float]], now: float
    ) -> Fleetwide:
        """Of what is known of each worker, at least one."""
        views = [each.view for each in terms]
        leftovers = [0]
        for active in sorted(each.active for each in terms if each.role is not Role.PREFILL):
            leftovers.append(leftovers[-1] + active)
        stuck = sum(each.active for each in terms if each.role is Role.PREFILL)
        decoding = leftovers[-1] + stuck + sum(view.leaving for view in views)
        known = sum(view.decode_tokens - view.arriving_tokens + view.leaving_tokens for view in views)
        backlog_s = sum(max(0.0, each.free_at - now) for each in terms if each.view.prefilling)
        view = views[0]
        room = Room(view.max_num_seqs or 1 << 30, FULL * view.num_blocks * view.block_size or math.inf)
        load = Load(decoding, known + decoding * mean_output / 2, backlog_s, room)
        prefills = sum(each.role is Role.PREFILL for each in terms)
        if prefills == len(views):  # those that decode are away: all will have to be mixed
            prefills = 0
        return cls(len(views), prefills, leftovers, stuck, load, ages)

    def left_on(self, prefills: int) -> int:
        """Outputs that a change leaves on workers that are to prefill."""
        return self.leftovers[min(max(0, prefills - self.prefills), len(self.leftovers) - 1)]


def role_changes(views: Sequence[WorkerView], prefills: int) -> dict[str, Role]:
    """Roles that change if so many are to prefill, 0: all are mixed. It takes those that prefill already, and of the
    others those that decode least."""
    roles = dict.fromkeys([view.name for view in views], Role.MIXED)
    if prefills:
        sources = [view for view in views if view.role is Role.PREFILL]
        others = sorted((view for view in views if view.role is not Role.PREFILL), key=lambda v: v.decoding)
        sources.sort(key=lambda view: -view.prefill_tokens)
        chosen = {view.name for view in [*sources, *others][:prefills]}
        roles = {name: Role.PREFILL if name in chosen else Role.DECODE for name in roles}
    return {view.name: roles[view.name] for view in views if view.role is not roles[view.name]}
