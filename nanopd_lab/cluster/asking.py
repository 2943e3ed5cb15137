"""Asks a policy, whoever wrote it: what it raises, or an answer that cannot be, is of one request and stops nobody."""

from __future__ import annotations

import traceback
from pathlib import Path

from nanopd_lab.router import Decision, Fleet, JobView, Policy, Postponed, Role, legal_routes

_NONE: dict[str, Role] = {}


class PolicyError(ValueError):
    """A policy has failed a request; the message names it and says how."""


def ask(policy: Policy, job: JobView, workers: Fleet, now: float) -> Decision | Postponed | None:
    """The policy's answer; a route is legal once the roles that it brings are given.

    Raises:
        PolicyError: the policy raised an exception, which is the `__cause__`, or its answer is none.
    """
    try:
        return _checked(policy.choose(job, workers, now), policy.name, workers)
    except PolicyError:
        raise
    except Exception as error:
        raise PolicyError(f"policy {policy.name} failed to choose a route: {told(error)}") from error


def _checked(answer: Decision | Postponed | None, name: str, workers: Fleet) -> Decision | Postponed | None:
    if answer is None or isinstance(answer, Postponed):
        return answer
    if not isinstance(answer, Decision):
        raise PolicyError(f"policy {name} answered {answer!r}; it must return a Decision, Postponed or None")
    route, roles = answer.route, dict(answer.roles) if answer.roles else _NONE
    for worker, role in roles.items():
        if worker not in workers.names or not isinstance(role, Role):
            raise PolicyError(
                f"policy {name} gives {worker!r} the role {role!r}; workers are {', '.join(workers.names)}, "
                "roles those of router.Role"
            )
    source, target = workers.of(route.prefill), workers.of(route.decode)
    if (
        source is None
        or target is None
        or not roles.get(source.name, source.role).prefills
        or not roles.get(target.name, target.role).decodes
    ):
        raise PolicyError(
            f"policy {name} chose {route}, which the roles or the load of the workers do not allow; legal are "
            f"{', '.join(map(str, legal_routes(workers))) or 'none'}"
        )
    return answer


def told(error: Exception) -> str:
    """An exception in one line, with where it was raised."""
    *_, frame = traceback.extract_tb(error.__traceback__)
    return (
        f"{type(error).__name__}: {error} ({Path(frame.filename).name}, line {frame.lineno}, in {frame.name})"
    )
