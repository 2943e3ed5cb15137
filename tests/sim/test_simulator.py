"""Virtual time over the real controller and workers: accounts, links, faults, determinism."""

from __future__ import annotations

import math

import pytest

from nanopd_lab.cluster.actions import Limits, Send
from nanopd_lab.cluster.controller import Controller
from nanopd_lab.cluster.messages import Cancel, Capacity, Ended, Hello, Tokens
from nanopd_lab.core import FinishReason, SampledToken, SamplingParams
from nanopd_lab.router import create_policy
from nanopd_lab.sim import (
    ConstantTime,
    Kill,
    Lengths,
    LinearTime,
    LinkModel,
    SimConfig,
    SimRequest,
    SimResult,
    Simulator,
    poisson_arrivals,
)
from nanopd_lab.sim.clock import EventQueue, Kind
from nanopd_lab.sim.links import Links
from tests.cluster.symbolic import Harness, Sizes

MODEL = LinearTime(0.01, 1e-4, 1e-7, 1e-4)


def simulate(
    name: str,
    workers: int,
    requests: list[SimRequest],
    config: SimConfig | None = None,
    kills: list[Kill] = [],  # noqa: B006
) -> SimResult:
    policy, roles = create_policy(name, workers)
    return Simulator(policy, roles, MODEL, requests, config, kills).run()


def some(count: int, rate: float = 20.0, seed: int = 0) -> list[SimRequest]:
    return poisson_arrivals(count, rate, (Lengths(100, 1.0, 500), Lengths(30, 1.0, 200)), seed)


def test_one_request_by_hand() -> None:
    """100 tokens in two chunks of 64 and 36, then two decode steps, each 0.5 s."""
    policy, roles = create_policy("collocated", 1)
    config = SimConfig(max_num_batched_tokens=64)
    request = SimRequest("r", 3.0, 100, 3)
    result = Simulator(policy, roles, ConstantTime(0.5), [request], config).run()
    (record,) = result.records
    assert (record.scheduled, record.first_token, record.finished) == (3.0, 4.0, 5.0)
    assert (record.ttft_s, record.tpot_s, record.e2e_s) == (1.0, 0.5, 2.0)
    assert (record.output_tokens, result.steps, record.route) == (3, 4, "w0")
    assert record.path is not None
    assert record.path.computed_tokens == 100 + 2  # the last token's KV is never needed
    assert result.problems() == []


def test_one_hand_over_by_hand() -> None:
    """The first chunk's blocks are pulled while the second is computed; what remains of the pull is visible."""
    policy, roles = create_policy("1p1d", 2)
    config = SimConfig(
        max_num_batched_tokens=64,
        block_bytes=10,
        link=LinkModel(setup_s=0.1, block_s=0.01, bytes_per_s=100.0),
    )
    result = Simulator(policy, roles, ConstantTime(0.5), [SimRequest("r", 0.0, 100, 3)], config).run()
    (record,) = result.records
    assert record.path is not None
    assert record.first_token == 1.0
    # Four blocks from 0.5 to 1.04 s (0.1 + 0.04 + 0.4), three from 1 s (0.1 + 0.03 + 0.3); then two steps.
    assert record.finished == pytest.approx(1.43 + 2 * 0.5)
    assert record.path.transfer_visible_s == pytest.approx(0.43)
    assert (record.path.transferred_tokens, record.path.transferred_bytes) == (100, 70)
    assert result.problems() == []


def test_events_of_one_instant_have_an_order() -> None:
    queue = EventQueue()
    found: list[int] = []
    second = queue.push(1.0, Kind.LOOP, found.append, rank=2)
    first = queue.push(1.0, Kind.LOOP, found.append, rank=1)
    message = queue.push(1.0, Kind.MESSAGE, found.append)
    earlier = queue.push(0.5, Kind.WAKE, found.append)
    assert list(queue.run()) == [0.5, 1.0, 1.0, 1.0]
    assert found == [earlier, message, first, second]
    # What is scheduled for now by the last of them happens now, and turns nothing back that has happened.
    woken = queue.push(1.0, Kind.LOOP, found.append, rank=0)
    assert list(queue.run()) == [1.0]
    assert found[-1] == woken
    assert queue.processed == 5
    assert queue.passed(Kind.LOOP, 1)
    assert not queue.passed(Kind.LOOP, 3)
    with pytest.raises(ValueError, match="not before now"):
        queue.push(0.9, Kind.WAKE, found.append)


def test_pulls_that_share_a_link_take_twice_as_long() -> None:
    queue = EventQueue()
    ends: dict[object, float] = {}
    links = Links(LinkModel(bytes_per_s=100.0), queue, lambda flow: ends.update({flow.payload: queue.now}))
    links.start("a", "b", 1, 100, "first")
    links.start("a", "c", 1, 100, "shares its source")
    links.start("d", "e", 1, 100, "alone")
    late = "shares the target of the first"
    queue.push(1.5, Kind.FAULT, lambda _: links.start("x", "b", 1, 50, late) and None)
    for _ in queue.run():
        pass
    assert ends["alone"] == pytest.approx(1.0)
    assert ends["shares its source"] == pytest.approx(2.0)
    assert ends["first"] == pytest.approx(2.0)
    # 25 bytes beside the first, at half the speed, the other 25 alone.
    assert ends["shares the target of the first"] == pytest.approx(2.25)


@pytest.mark.parametrize("name", ["collocated", "1p2d", "round-robin", "least-loaded"])
def test_routes_and_accounts_are_those_of_the_real_launcher(name: str) -> None:
    """The same jobs through `InlineLauncher`, with blocks whose content is checked, take the same routes and tokens."""
    lengths = [(5 + 7 * i % 30, 1 + 3 * i % 11) for i in range(20)]
    limits = Limits(heartbeat_s=math.inf, max_jobs=1_000)
    policy, roles = create_policy(name, 3)
    harness = Harness(policy, roles, Sizes(num_blocks=200, caching=False), limits)
    requests = []
    for i, (prompt, output) in enumerate(lengths):
        params = SamplingParams(max_tokens=output, ignore_eos=True)
        harness.submit(f"r{i}", [i + 1] * prompt, params)
        requests.append(SimRequest(f"r{i}", 0.0, prompt, output))
    harness.run()
    config = SimConfig(
        num_blocks=200, block_size=4, max_num_batched_tokens=8, max_num_seqs=6, limits=limits, message_s=1e-6
    )
    result = simulate(name, 3, requests, config)
    assert result.problems() == []
    for record in result.records:
        real, path = harness.settled[record.request_id, 0].path, record.path
        assert path is not None
        assert str(real.route) == record.route
        for figure in (
            "prompt_tokens",
            "output_tokens",
            "computed_tokens",
            "transferred_tokens",
            "cached_tokens",
        ):
            assert getattr(real, figure) == getattr(path, figure), f"{record.request_id}: {figure}"


@pytest.mark.parametrize("name", ["collocated", "2p2d"])
def test_the_same_seed_gives_the_same_result_to_the_bit(name: str) -> None:
    first, again = (simulate(name, 4, some(200, seed=7)) for _ in range(2))
    assert repr(first) == repr(again)
    assert repr(simulate(name, 4, some(200, seed=8))) != repr(first)


@pytest.mark.parametrize("name", ["collocated", "2p2d", "round-robin"])
def test_everything_is_accounted_for_under_preemption_and_kills(name: str) -> None:
    requests = some(300, rate=40.0)
    config = SimConfig(num_blocks=60, block_bytes=1000, link=LinkModel(0.001, 0.0, 1e6))
    kills = [Kill(2.0, "w0", 1.0), Kill(4.0, "w3", 0.5), Kill(4.1, "w2", None)]
    result = simulate(name, 4, requests, config, kills)
    assert result.problems() == []
    assert len(result.records) == len(requests)
    assert len(result.workers) == 4 + 2
    assert sum(worker.preemptions for worker in result.workers) > 0
    assert any(len(record.path.attempts) > 1 for record in result.records if record.path)
    for record, request in zip(result.records, requests, strict=True):
        assert record.request_id == request.request_id
        if record.ok:
            assert record.output_tokens == request.output_tokens
            assert record.arrival <= record.first_token <= record.finished  # type: ignore[operator]
        else:
            assert record.error


def test_what_a_dead_worker_had_sampled_is_kept() -> None:
    """One request, killed in the middle of a run; the other worker goes on behind the tokens that it had."""
    result = simulate("collocated", 2, [SimRequest("r", 0.0, 16, 100)], None, [Kill(0.5, "w0")])
    (record,) = result.records
    assert record.ok
    assert record.path is not None
    first, second = record.path.attempts
    assert 20 < first.new_tokens < 60
    assert first.new_tokens + second.new_tokens == 100
    assert second.known_tokens == 16 + first.new_tokens


def test_a_shared_prefix_is_found_in_the_cache() -> None:
    requests = [SimRequest(f"r{i}", float(i), 64, 4, prefix=1, prefix_tokens=48) for i in range(3)]
    config = SimConfig(enable_prefix_caching=True)
    paths = [record.path for record in simulate("collocated", 1, requests, config).records]
    assert [path.cached_tokens for path in paths if path] == [0, 48, 48]


def test_what_cannot_be_served_is_refused_with_the_reason() -> None:
    requests = [SimRequest("long", 0.0, 5000, 10), SimRequest("short", 0.1, 50, 10)]
    result = simulate("collocated", 1, requests, SimConfig(num_blocks=100))
    long, short = result.records
    assert not long.ok
    assert "num" not in long.finish_reason
    assert "5000" in str(long.error)
    assert short.ok
    assert result.problems() == []


def test_a_deadline_ends_a_request() -> None:
    result = simulate("collocated", 1, [SimRequest("r", 0.0, 50, 1000, deadline=0.5)])
    (record,) = result.records
    assert "deadline" in str(record.error)
    assert 0 < record.output_tokens < 1000 or record.first_token is not None
    assert record.finished == pytest.approx(0.5)
    assert result.problems() == []


def test_bad_requests_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        SimRequest("r", 0.0, 0, 1)
    with pytest.raises(ValueError, match="prefix 0 of 9 tokens"):
        SimRequest("r", 0.0, 4, 1, prefix_tokens=9)
    with pytest.raises(ValueError, match="same request_id"):
        simulate("collocated", 1, [SimRequest("r", 0.0, 1, 1)] * 2)
    policy, roles = create_policy("collocated", 1)
    instant = Simulator(policy, roles, ConstantTime(0.0), [SimRequest("r", 0.0, 1, 1)])
    with pytest.raises(ValueError, match="must give seconds > 0"):
        instant.run()
    with pytest.raises(ValueError, match="positive"):
        LinkModel(bytes_per_s=0.0)


@pytest.mark.parametrize("skip", [True, False])
def test_a_worker_that_plans_ahead_lets_newcomers_wait_a_step_longer(skip: bool) -> None:
    """Steps of 1 s. The second request comes during the third step: it could be in the fourth, which is planned."""
    requests = [
        SimRequest("first", 0.0, 4, 10),
        SimRequest("second", 2.5, 4, 3),
        SimRequest("alone", 20.25, 4, 2),
    ]

    def ttfts(ahead: bool) -> list[float | None]:
        config = SimConfig(num_blocks=100, ahead=ahead, skip=skip)
        result = Simulator(*create_policy("collocated", 1), ConstantTime(1.0), requests, config).run()
        assert not result.problems()
        return [record.ttft_s for record in result.records]

    assert ttfts(ahead=False) == [1.0, 1.5, 1.0]
    assert ttfts(ahead=True) == [1.0, 2.5, 1.0]  # an idle worker plans at once


def test_who_told_of_the_last_token_is_not_told_to_drop_the_request() -> None:
    """A route over two workers, and a source whose first token is the last one: only the target hears of it."""
    policy, roles = create_policy("1p1d", 2)
    controller = Controller(policy, dict(zip(["p", "d"], roles, strict=True)))
    for name in ("p", "d"):
        controller.handle(name, Hello(Capacity(100, 4, 8, 64, 100)), 0.0)
    controller.submit("r", [1] * 5, SamplingParams(max_tokens=1), 0.0)
    begin, controller.actions = controller.actions, []
    (key,) = {action.message.key for action in begin if isinstance(action, Send)}
    controller.handle("p", Tokens(key, 0, (SampledToken(7),), FinishReason.LENGTH), 1.0)
    controller.handle("p", Ended(key), 1.0)
    told = [(each.worker, each.message) for each in controller.actions if isinstance(each, Send)]
    assert told == [("d", Cancel(key))]
    controller.handle("d", Ended(key), 2.0)
    assert controller.num_unsettled == 0
    controller.check_integrity()
