"""Versions of the exercises on workers that hand a sequence over."""

from __future__ import annotations

from tests.lab.wrong_versions.base import Version

# ---------------------------------------------------------------------- what to pull


def missing_ignores_under_way(offered, arrived, under_way):
    return [p for p in range(offered) if p not in arrived]


def missing_ignores_arrived(offered, arrived, under_way):
    return [p for p in range(offered) if p not in under_way]


def missing_behind_the_last(offered, arrived, under_way):
    first = max(arrived | under_way, default=-1) + 1
    return list(range(first, offered))


def missing_by_count(offered, arrived, under_way):
    return list(range(len(arrived) + len(under_way), offered))


def missing_one_too_many(offered, arrived, under_way):
    return [p for p in range(offered + 1) if p not in arrived and p not in under_way]


def missing_one_too_few(offered, arrived, under_way):
    return [p for p in range(offered - 1) if p not in arrived and p not in under_way]


def missing_waits_for_pulls(offered, arrived, under_way):
    return [] if under_way else [p for p in range(offered) if p not in arrived]


def missing_one_at_a_time(offered, arrived, under_way):
    return [p for p in range(offered) if p not in arrived and p not in under_way][:1]


def missing_a_set(offered, arrived, under_way):
    return set(range(offered)) - arrived - under_way


def missing_last_first(offered, arrived, under_way):
    return sorted(set(range(offered)) - arrived - under_way, reverse=True)


def missing_eats(offered, arrived, under_way):
    under_way.update(arrived)
    return [p for p in range(offered) if p not in under_way]


_asked: set[int] = set()


def missing_remembers(offered, arrived, under_way):
    found = [p for p in range(offered) if p not in arrived and p not in under_way and p not in _asked]
    _asked.update(found)
    return found


def missing_either(offered, arrived, under_way):
    return [p for p in range(offered) if p not in arrived or p not in under_way]


def missing_from_one(offered, arrived, under_way):
    return [p for p in range(1, offered) if p not in arrived and p not in under_way]


def missing_at_most_64(offered, arrived, under_way):
    return [p for p in range(min(offered, 64)) if p not in arrived and p not in under_way]


def missing_loop(offered, arrived, under_way):
    found = []
    for position in range(offered):
        if position in arrived or position in under_way:
            continue
        found.append(position)
    return found


def missing_sets(offered, arrived, under_way):
    return sorted(set(range(offered)) - set(arrived) - set(under_way))


# ---------------------------------------------------------------------- leases


class RenewsByDuration:
    def __init__(self, terms, now):
        self.terms, self.until = terms, now + terms.duration

    def renew(self, now):
        if not self.expired(now):
            self.until = max(self.until, now + self.terms.duration)

    def expired(self, now):
        return now >= self.until


class Shortens(RenewsByDuration):
    def renew(self, now):
        if not self.expired(now):
            self.until = now + self.terms.extension


class AddsUp(RenewsByDuration):
    def renew(self, now):
        if not self.expired(now):
            self.until += self.terms.extension


class BringsBack(RenewsByDuration):
    def renew(self, now):
        self.until = max(self.until, now + self.terms.extension)


class LastsOneTooLong(RenewsByDuration):
    def renew(self, now):
        if not self.expired(now):
            self.until = max(self.until, now + self.terms.extension)

    def expired(self, now):
        return now > self.until


class TheOtherWayRound(LastsOneTooLong):
    def expired(self, now):
        return now < self.until


class ForgetsToReturn(LastsOneTooLong):
    def expired(self, now):
        now >= self.until  # noqa: B015


class RenewsOnce(RenewsByDuration):
    renewed = False

    def renew(self, now):
        if not self.expired(now) and not self.renewed:
            self.renewed = True
            self.until = max(self.until, now + self.terms.extension)


class AskingRenews(LastsOneTooLong):
    def expired(self, now):
        gone = now >= self.until
        if not gone:
            self.until = max(self.until, now + self.terms.extension)
        return gone


class CountsFromZero(LastsOneTooLong):
    def __init__(self, terms, now):
        self.terms, self.until = terms, terms.duration

    def expired(self, now):
        return now >= self.until


class NoUntil(RenewsByDuration):
    def __init__(self, terms, now):
        self.terms, self.end = terms, now + terms.duration

    def renew(self, now):
        if not self.expired(now):
            self.end = max(self.end, now + self.terms.extension)

    def expired(self, now):
        return now >= self.end


class FourSeconds(RenewsByDuration):
    def renew(self, now):
        if not self.expired(now):
            self.until = max(self.until, now + 4.0)


class Shared:
    until = 0.0

    def __init__(self, terms, now):
        self.terms = terms
        Shared.until = now + terms.duration

    def renew(self, now):
        if not self.expired(now):
            Shared.until = max(self.until, now + self.terms.extension)

    def expired(self, now):
        return now >= self.until


class RenewsAtTheEnd(RenewsByDuration):
    def renew(self, now):
        if now <= self.until:
            self.until = max(self.until, now + self.terms.extension)


class Plain:
    def __init__(self, terms, now):
        self.terms = terms
        self.until = now + terms.duration

    def renew(self, now):
        if now < self.until:
            self.until = max(self.until, now + self.terms.extension)

    def expired(self, now):
        return not now < self.until


class Sticky:
    """Remembers that it has run out."""

    def __init__(self, terms, now):
        self.until, self.extension, self.gone = now + terms.duration, terms.duration * 2 / 3, False

    def renew(self, now):
        if self.expired(now):
            return
        later = now + self.extension
        if later > self.until:
            self.until = later

    def expired(self, now):
        self.gone = self.gone or now >= self.until
        return self.gone


WRONG: dict[str, list[tuple[Version, str]]] = {
    "cluster.missing_blocks": [
        (missing_ignores_under_way, "is on its way already"),
        (missing_ignores_arrived, "has arrived already"),
        (missing_behind_the_last, "is offered, not here and not on its way"),
        (missing_by_count, "has arrived already"),
        (missing_one_too_many, "is not offered"),
        (missing_one_too_few, "is offered, not here and not on its way"),
        (missing_waits_for_pulls, "is offered, not here and not on its way"),
        (missing_one_at_a_time, "is offered, not here and not on its way"),
        (missing_a_set, "return a list"),
        (missing_last_first, "rising order"),
        (missing_eats, "the caller still needs under_way"),
        (missing_remembers, "is offered, not here and not on its way"),
        (missing_either, "has arrived already"),
        (missing_from_one, "block 0 is offered"),
        (missing_at_most_64, "is offered, not here and not on its way"),
    ],
    "cluster.lease": [
        (RenewsByDuration, "a renewal is good for 4 s"),
        (Shortens, "a renewal never shortens it"),
        (AddsUp, "a renewal"),
        (BringsBack, "may be somebody else's"),
        (LastsOneTooLong, "from then on it counts as expired"),
        (TheOtherWayRound, "not reached yet"),
        (ForgetsToReturn, "is a `return` missing?"),
        (RenewsOnce, "a renewal is good for 4 s"),
        (AskingRenews, "asking changes nothing"),
        (CountsFromZero, "it begins at 100"),
        (NoUntil, "the worker reads `until`"),
        (FourSeconds, "a renewal is good for 20 s"),
        (Shared, "each has its own `until`"),
        (RenewsAtTheEnd, "may be somebody else's"),
    ],
}
RIGHT: dict[str, list[Version]] = {
    "cluster.missing_blocks": [missing_loop, missing_sets],
    "cluster.lease": [Plain, Sticky],
}
