"""One cluster over three hosts: tokens, clocks, a cable that is pulled, a host that is killed. See `ray_hosts`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from nanopd_lab import LLM, Cluster, SamplingParams
from nanopd_lab.cluster.actions import Limits
from nanopd_lab.cluster.launcher import WorkerLauncher
from nanopd_lab.cluster.ray_launcher import RayStarter
from nanopd_lab.cluster.ray_options import RayOptions
from nanopd_lab.cluster.starter import WorkerStartError
from tests.cluster.launched import ENGINE, GREEDY, PATIENCE_S, alone, finish, start, tokens_of, wait_for
from tests.cluster.ray_hosts import AHEAD_S, Hosts, hosts, why_not
from tests.engine.test_token_identity import prompts

pytest.importorskip("ray", reason="launcher 'ray' needs the extra dist")
BATCH = prompts([900, 40, 500, 90], seed=5)
# Of so many steps that trouble comes while they are under way, however late a busy machine lets it come.
LONG = SamplingParams(max_tokens=1000, temperature=0, ignore_eos=True)
# Longer than a busy machine keeps a worker from its beats, shorter than Ray takes to give a host up.
HEARTBEAT_S = 8.0


@pytest.fixture(scope="module")
def three() -> Iterator[Hosts]:
    if reason := why_not():
        pytest.skip(reason)
    from nanopd_lab.cluster.ray_session import RaySession

    with hosts(others=2, cpus=8) as made:
        session = RaySession.acquire(RayOptions(address=made.address, host=made.head))
        yield made
        session.release()


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("random:tiny", device="cpu", **ENGINE)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def cluster(three: Hosts) -> Iterator[Cluster]:
    """A prefill and two decode workers, each on another host.

    Ray spreads as well as it can: on two hosts where it has not heard of the third for a moment.
    """
    import ray

    options = RayOptions(address=three.address, host=three.head, placement="spread")
    limits = Limits(heartbeat_s=HEARTBEAT_S, max_attempts=10)
    deadline = time.monotonic() + PATIENCE_S
    while True:
        while sum(node["Alive"] for node in ray.nodes()) < 3:
            assert time.monotonic() < deadline, "the hosts don't join"
            time.sleep(0.1)
        with start("1p2d", 3, launcher="ray", ray=options, limits=limits, max_restarts=9) as cluster:
            if len(set(places(cluster).values())) == 3:
                yield cluster
                return
        assert time.monotonic() < deadline, "Ray does not spread workers"


def places(cluster: Cluster) -> dict[str, str]:
    """The host of each worker."""
    assert isinstance(cluster.launcher, WorkerLauncher)
    starter = cluster.launcher.starter
    assert isinstance(starter, RayStarter)
    return {name: here.address for name, here in starter.places().items()}


def serve(cluster: Cluster, llm: LLM, trouble: Callable[[], Any]) -> list[Any]:
    """Requests under way on all workers when the trouble begins; their tokens are right all the same."""
    names = [cluster.submit(prompt, LONG) for prompt in BATCH]
    wait_for(cluster, lambda: min(tokens_of(cluster, name) for name in names[1:]) >= 2)
    trouble()
    outputs = finish(cluster, names)
    assert [outputs[name].outputs[0].token_ids for name in names] == alone(llm, BATCH, LONG)
    paths = [path for name in names for path in outputs[name].paths]
    assert not [problem for path in paths for problem in path.problems()]
    cluster.check_integrity()
    return [attempt.failure for path in paths for attempt in path.attempts if attempt.failure]


def test_tokens_and_times_over_three_clocks(cluster: Cluster, llm: LLM) -> None:
    began = time.monotonic()
    outputs = cluster.generate(BATCH, GREEDY, use_tqdm=False)
    ended = time.monotonic()
    assert [output.outputs[0].token_ids for output in outputs] == alone(llm, BATCH, GREEDY)
    assert isinstance(cluster.launcher, WorkerLauncher)
    errors = {}
    for name, address in places(cluster).items():
        offset, errors[name] = cluster.launcher.clock_of(name)
        assert abs(offset - AHEAD_S * (int(address.rpartition(".")[2]) - 1)) <= errors[name] + 1e-6
        assert errors[name] < AHEAD_S / 50  # half of what a message and its answer take
    for output in outputs:
        (path,) = output.paths
        (attempt,) = path.attempts
        assert attempt.route.prefill != attempt.route.decode
        assert path.transferred_tokens > 0
        assert attempt.prefill is not None
        assert attempt.decode is not None
        source, target = attempt.prefill, attempt.decode
        pulls = [each for pull in target.pulls for each in pull]
        for name, times in (
            (attempt.route.prefill, [source.scheduled, source.sampled]),
            (attempt.route.decode, [target.reserved, target.adopted, *pulls]),
        ):
            for moment in times:
                assert moment is not None
                # The clocks are a thousand seconds apart; they were known less well when it was translated.
                assert began - 2 * errors[name] - 1.0 < moment < ended + 2 * errors[name] + 1.0
    cluster.check_integrity()


def test_a_cable_is_pulled(three: Hosts, cluster: Cluster, llm: LLM) -> None:
    victim = next(name for name in ("w1", "w2") if places(cluster)[name] in three.others)
    address = places(cluster)[victim]
    failures = serve(cluster, llm, lambda: three.pull_cable(address))
    assert any(f"worker {victim} was silent for {HEARTBEAT_S} s" in failure for failure in failures)
    three.plug_cable(address)
    wait_for(cluster, lambda: len(cluster.workers()) == 3)
    serve(cluster, llm, lambda: None)


def test_a_host_is_killed(three: Hosts, cluster: Cluster, llm: LLM) -> None:
    victim = next(name for name in ("w2", "w1", "w0") if places(cluster)[name] in three.others)
    address = places(cluster)[victim]
    serve(cluster, llm, lambda: three.kill(address))
    # Again, on a host that is left.
    wait_for(cluster, lambda: len(cluster.workers()) == 3 and address not in places(cluster).values())
    serve(cluster, llm, lambda: None)


def test_no_room_is_said_with_what_there_is(three: Hosts, cluster: Cluster) -> None:
    options = RayOptions(address=three.address, host=three.head, num_cpus=100, place_timeout_s=0.5)
    with pytest.raises(
        WorkerStartError,
        match=r"no room for 2 workers with 100 CPU each.*have \d+ CPU in all, of which \d+ CPU free",
    ):
        start(launcher="ray", ray=options)
    nowhere = RayOptions(
        address=three.address, host=three.head, nodes=("10.0.0.1", "10.0.0.2"), place_timeout_s=0.5
    )
    with pytest.raises(WorkerStartError, match=r"on the nodes 10\.0\.0\.1, 10\.0\.0\.2"):
        start(launcher="ray", ray=nowhere)


def test_nothing_stays_reserved(three: Hosts, cluster: Cluster) -> None:
    """What Ray says of it is a moment old."""
    import ray

    def reserved() -> float:
        return ray.cluster_resources()["CPU"] - ray.available_resources()["CPU"]

    wait_for(cluster, lambda: reserved() == 3)
    with start(launcher="ray", ray=RayOptions(address=three.address, host=three.head)) as second:
        assert second.generate(BATCH[:1], GREEDY, use_tqdm=False)[0].finished
        wait_for(cluster, lambda: reserved() == 5)
    wait_for(cluster, lambda: reserved() == 3)
