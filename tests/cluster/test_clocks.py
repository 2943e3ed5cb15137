"""What is known of another machine's clock is true, whatever the messages met with on their way."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanopd_lab.cluster.clocks import ClockOffset, Ping, Pong, clock_identity, on_our_clock
from nanopd_lab.cluster.host import StepRecord
from nanopd_lab.cluster.messages import Beat, Ended, Usage

DRIFT = 1e-3
seconds = st.floats(0, 5, allow_nan=False)


@dataclass
class Clock:
    """Another machine's, beside true time: its rate may change whenever it likes, within what is allowed."""

    reads: float
    at: float = 0.0

    def advance(self, now: float, rate: float) -> float:
        self.reads += (now - self.at) * (1 + rate)
        self.at = now
        return self.reads


exchange = st.tuples(seconds, seconds, seconds, seconds, *[st.floats(-DRIFT, DRIFT)] * 4)


@given(st.floats(-1e5, 1e5), st.lists(exchange, min_size=1, max_size=12))
def test_the_true_offset_lies_within_the_error(start: float, exchanges: list[tuple[float, ...]]) -> None:
    theirs, ours, known = Clock(start), 0.0, ClockOffset(DRIFT)
    for idle, there, busy, back, *rates in exchanges:
        ours += idle
        theirs.advance(ours, rates[0])
        sent = ours
        ours += there
        received = theirs.advance(ours, rates[1])
        ours += busy
        replied = theirs.advance(ours, rates[2])
        ours += back
        true = theirs.advance(ours, rates[3]) - ours
        known.observe(Pong(sent, received, replied), ours)
        offset, error = known.read(ours)
        assert abs(offset - true) <= error + 1e-7  # what floats of this size lose
    later = ours + 1000.0
    true = theirs.advance(later, DRIFT) - later
    offset, error = known.read(later)
    assert abs(offset - true) <= error + 1e-7


def test_a_quick_answer_is_worth_more_than_a_slow_one() -> None:
    known = ClockOffset(0.0)
    known.observe(Pong(0.0, 101.0, 101.0), 3.0)
    assert known.read(3.0).error_s == pytest.approx(1.5)
    known.observe(Pong(4.0, 104.001, 104.001), 4.002)
    assert known.read(5.0) == pytest.approx((100.0, 0.001))
    known.observe(Pong(6.0, 108.0, 108.0), 9.0)  # says less than is known
    assert known.read(9.0) == pytest.approx((100.0, 0.001))


def test_nothing_is_said_of_a_clock_that_was_never_asked() -> None:
    with pytest.raises(ValueError, match="no exchange"):
        ClockOffset().read(0.0)


def test_accounts_and_steps_come_on_our_clock() -> None:
    usage = Usage(computed=5, scheduled=1000.0, sampled=1001.0, pulls=((1000.25, 1000.5),))
    moved = on_our_clock(Ended("k", usage), 1000.0)
    assert moved == Ended("k", Usage(computed=5, scheduled=0.0, sampled=1.0, pulls=((0.25, 0.5),)))
    assert usage.scheduled == 1000.0
    beat = Beat(0, 0, 0, 0, 0, 0, 0)
    assert on_our_clock(beat, 1000.0) is beat
    assert StepRecord(1000.0, 1001.0, ()).shifted(-1000.0) == StepRecord(0.0, 1.0, ())


def test_a_process_of_another_time_namespace_has_another_clock() -> None:
    """The kernel's own: the same machine, another `time.monotonic()`."""
    ahead = 5000
    apart = ["unshare", "--time", "--monotonic", str(ahead), "--fork"]
    if shutil.which("unshare") is None or subprocess.run([*apart, "true"], capture_output=True).returncode:
        pytest.skip("this system makes no time namespaces for us")
    script = (
        "import sys, time\n"
        "from nanopd_lab.cluster.clocks import clock_identity\n"
        "print(clock_identity(), flush=True)\n"
        "for _ in sys.stdin: print(time.monotonic(), flush=True)\n"
    )
    known = ClockOffset()
    with subprocess.Popen(
        [*apart, sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
        env=dict(os.environ),
    ) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        assert other.stdout.readline().strip() != clock_identity()
        for _ in range(10):
            ping = Ping(time.monotonic())
            other.stdin.write("\n")
            theirs = float(other.stdout.readline())
            known.observe(Pong(ping.sent, theirs, theirs), time.monotonic())
    offset, error = known.read(time.monotonic())
    assert abs(offset - ahead) <= error + 1e-6
    assert clock_identity() == clock_identity() != ""
