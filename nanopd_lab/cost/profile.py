"""Times steps of a real engine over a grid: the input of `nanopd-lab fit`.

    nanopd-lab profile --model smollm2 --result-filename profile.json

Plans are made by hand and run by the engine's own runner over its own pool, whose blocks are filled once, so that a
step with 1,000 tokens of past costs that step only and not the prefill before it. The scheduler's time is not in it.

All points are visited in turn, several rounds, and the median of the rounds counts: a slow moment of a shared machine
then spoils one visit of many points and not all visits of one. The first visit of each is thrown away. Where the engine
runs one step ahead (GPUs), so does the profiler, and a step's time is from one result to the next: the longer of what
host and device take. A file that a cut run left is continued.
"""

from __future__ import annotations

import gc
import itertools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from nanopd_lab.core import Chunk, Request, SamplingParams, StepPlan
from nanopd_lab.core import Sequence as EngineSequence
from nanopd_lab.cost.calibrate import MIN_ROUNDS, PROFILE_SCHEMA
from nanopd_lab.cost.files import check_schema, read_json
from nanopd_lab.cost.grid import Grid, Point, grid_for
from nanopd_lab.cost.roofline import ModelDims
from nanopd_lab.cost.transfers import profile_transfers
from nanopd_lab.engine.config import EngineConfig
from nanopd_lab.engine.engine import Engine
from nanopd_lab.provenance import provenance

VISIT_SECONDS = 0.05  # a visit repeats shorter steps, up to MOST_REPEATS times
MOST_REPEATS = 5
AHEAD_REPEATS = 3  # at least, where the engine works ahead
# Steps there before those that count. A host that launches nearly as long as the device computes sees the first results
# late, and a step shorter than it is (one of 83 ms as 50), until it has caught up and waits for one again.
MOST_LEAD_IN = 8
ON_TIME = 0.02  # of a step, waited for its result
SAVE_SECONDS = 5.0
CPU = torch.device("cpu")
COMPANIES = ("alone", "decode", "prefill")
"""What the others do while one process times: nothing, or steps of such a kind."""


class StepTimer:
    """Runs a point's plan on an engine and times it.

    Args:
        engine: idle; what its pool holds is lost
        clock: seconds
    """

    def __init__(self, engine: Engine, clock: Callable[[], float] = time.perf_counter) -> None:
        assert not engine.has_unfinished, "the engine has requests under way"
        self.engine = engine
        self.clock = clock
        # Memory that nobody has written may hold numbers that are slow or not finite.
        pool = engine.cache.tensor
        generator = torch.Generator().manual_seed(0)
        block = torch.randn(pool.shape[1:], generator=generator).to(pool.dtype).to(pool.device)
        pool.copy_(block.expand_as(pool))

    def plan(self, point: Point) -> StepPlan:
        """A plan with a sequence for each chunk, which owns blocks as in a pool that is used from its start."""
        size, used, chunks = self.engine.config.block_size, 0, []
        vocab = self.engine.loaded.geometry.vocab_size
        params = SamplingParams(temperature=0, max_tokens=1 << 20, ignore_eos=True, detokenize=False)
        for number, chunk in enumerate(point.chunks):
            end = chunk.past + chunk.count
            known = [(7 * number + 13 * place) % vocab for place in range(end + (chunk.samples == 0))]
            decode = chunk.count == 1 and chunk.past > 0
            request = Request(f"profiled-{number}", known[: chunk.past] if decode else known, params)
            sequence = EngineSequence(request, tokens=known, num_computed=chunk.past)
            count = -(-end // size)
            sequence.blocks = list(range(used, used + count))
            used += count
            chunks.append(Chunk(sequence, chunk.past, chunk.count, chunk.samples))
        assert used <= self.engine.cache.num_blocks, f"{point} needs {used} blocks"
        return StepPlan(0, tuple(chunks))

    def seconds(self, point: Point, repeats: int) -> float:
        """Median of so many steps in a row; where the engine works ahead others run before them, see MOST_LEAD_IN.

        Raises:
            RuntimeError: the model's logits were not finite.
        """
        plan, runner, times = self.plan(point), self.engine.runner, []
        if not self.engine.loop.ahead:
            for _ in range(repeats):
                begun = self.clock()
                sampled = runner.execute(plan)
                times.append(self.clock() - begun)
        else:
            before = runner.launch(plan)
            under_way = runner.launch(plan)
            before.result()
            begun, lead_in = self.clock(), MOST_LEAD_IN
            while len(times) < repeats:
                following = runner.launch(plan)
                launched = self.clock()
                sampled = under_way.result()
                now = self.clock()
                if lead_in:
                    late = now - launched < ON_TIME * (now - begun)
                    lead_in = lead_in - 1 if late else 0
                else:
                    times.append(now - begun)
                begun, under_way = now, following
            under_way.result()
        if wrong := [token.error for tokens in sampled for token in tokens if token.error]:
            raise RuntimeError(f"{point.kind} of {len(point.chunks)} chunks: {wrong[0]}")
        return statistics.median(times)


@dataclass(frozen=True)
class Together:
    """Processes that profile at once, each kind of steps beside steps of the same kind. Between their rounds one of
    them times a few steps while the others wait, run decode steps, and run prefills, one after the other: what is
    compared are times of one moment, as a shared machine's speed changes.

    barrier: that all of them wait at
    few: the steps; prefills and decodes
    times: this process is the one that times them
    """

    barrier: Barrier
    few: Grid
    times: bool


def profile(
    model: str = "smollm2",
    *,
    device: str = "auto",
    dtype: str = "float32",
    quick: bool = False,
    rounds: int = 3,
    result: Path | None = None,
    grid: Grid | None = None,
    transfers: bool = True,
    together: Together | None = None,
    progress: bool = True,
    **engine_options: Any,
) -> dict[str, Any]:
    """The whole record; written to `result` as it grows, and continued from there.

    Args:
        quick: a smaller grid
        rounds: visits of each point that count, at least 3
        grid: another one than `grid_for` the device
        transfers: time pulls of KV blocks too, by every transport between every pair of GPUs (or on the CPU)
        together: other processes of this host profile as well; the one that times a few steps in other company has them
            in `company`
        engine_options: further fields of `EngineConfig`, for example cuda_graphs=False

    Raises:
        ValueError: fewer than 3 rounds, a bad setting, or a `result` that is not a profile with the same settings.
    """
    if rounds < MIN_ROUNDS:
        raise ValueError(f"rounds is {rounds}; a median takes at least {MIN_ROUNDS}")
    known = None
    if result is not None and result.exists():
        known = read_json(result)
        check_schema(known, PROFILE_SCHEMA, result.name, "it is no profile to continue; name another file")
    settings: dict[str, Any] = {"model": model, "dtype": dtype, **engine_options}
    cuda = device != "cpu" and torch.cuda.is_available()
    grid = grid or grid_for("cuda" if cuda else "cpu", quick)
    settings |= {
        "device": torch.cuda.get_device_name(None if device in ("auto", "cuda") else device)
        if cuda
        else "cpu",
        "threads": torch.get_num_threads(),
        "grid": json.loads(json.dumps(asdict(grid))),
    }
    if known is not None:
        _check_settings(known["settings"], settings, result)
    config = EngineConfig(
        model,
        device=device,
        dtype=dtype,
        enable_prefix_caching=False,
        max_num_batched_tokens=max(grid.prefill_counts) + max(grid.batches),
        max_num_seqs=max(grid.batches) + 2,
        **engine_options,
    )
    engine = Engine(config)

    def points_of(each: Grid) -> list[Point]:
        return each.points(
            config.max_num_batched_tokens, engine.cache.num_blocks, engine.max_model_len, config.block_size
        )

    points = points_of(grid)
    record = known or {
        "schema": PROFILE_SCHEMA,
        "provenance": provenance(),
        "settings": settings,
        "block_size": config.block_size,
        "block_bytes": engine.cache.shape.block_bytes,
        "dims": _dims(engine, model),
        "captured": _captured(engine),
        "ahead": engine.loop.ahead,
        "points": [{**point.to_record(), "seconds": []} for point in points],
    }
    if [Point.from_record(row) for row in record["points"]] != points:
        raise ValueError(
            f"{result} has other steps than this engine can hold; name another file, or delete it"
        )
    timer = StepTimer(engine)
    meeting = None if together is None else _Meeting(timer, together, points_of(together.few))
    if meeting is not None and meeting.together.times:
        record["company"] = meeting.rows
    _visit(timer, record["points"], rounds, lambda: _save(record, result), meeting, progress)
    if transfers and "transfers" not in record:
        shape = engine.cache.shape
        del engine, timer, meeting  # its pool makes room for those of the transports
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()
        devices = [torch.device("cuda", n) for n in range(torch.cuda.device_count())] if cuda else [CPU]
        record["transfers"] = profile_transfers(shape, devices, progress=progress)
        _save(record, result)
    return record


class _Meeting:
    """What processes that profile at once do together, see `Together`. All of them call the same in the same order.

    rows: the few steps with their times alone ("alone") and beside others in "decode" steps and in "prefill" ones
    """

    def __init__(self, timer: StepTimer, together: Together, few: Sequence[Point]) -> None:
        self.together = together
        self.rows = [{**point.to_record(), **{company: [] for company in COMPANIES}} for point in few]
        self._timer, self._few = timer, few

    def wait(self) -> None:
        """For the others."""
        self.together.barrier.wait()

    def few_steps(self) -> None:
        """Time the few steps, or be company to the one that does."""
        self.wait()
        for company in COMPANIES:
            if self.together.times:
                for row in self.rows:
                    repeats = _repeats(row[company][-1]) if row[company] else 1
                    row[company].append(self._timer.seconds(Point.from_record(row), repeats))
            else:
                self._run_until_met([point for point in self._few if point.kind == company])
            self.wait()

    def _run_until_met(self, points: Sequence[Point]) -> None:
        """Run these steps, if any, until somebody waits or has failed."""
        barrier = self.together.barrier
        for point in itertools.cycle(points):
            if barrier.n_waiting or barrier.broken:
                return
            self._timer.seconds(point, 1)


def _visit(
    timer: StepTimer,
    rows: Sequence[dict[str, Any]],
    rounds: int,
    save: Callable[[], None],
    meeting: _Meeting | None,
    progress: bool,
) -> None:
    """Fill in what is missing, a round at a time."""
    left = [row for row in rows if len(row["seconds"]) < rounds]
    visits = sum(rounds - len(row["seconds"]) for row in left) + len(left)
    repeats: dict[int, int] = {}
    least = AHEAD_REPEATS if timer.engine.loop.ahead else 1
    saved = time.monotonic()
    with tqdm(total=visits, desc="profile", unit="visit", disable=not progress) as bar:
        for row in left:  # thrown away: compiles, touches memory, says how long a step is
            seconds = timer.seconds(Point.from_record(row), 1)
            repeats[id(row)] = max(least, _repeats(seconds))
            bar.update()
        if meeting is not None:
            meeting.few_steps()
        for number in range(rounds):
            kind = ""
            for row in left:
                if len(row["seconds"]) > number:
                    continue
                if meeting is not None and row["kind"] != kind:
                    meeting.wait()  # so that a step has steps of its own kind beside it
                kind = row["kind"]
                row["seconds"].append(timer.seconds(Point.from_record(row), repeats[id(row)]))
                bar.update()
                if time.monotonic() - saved > SAVE_SECONDS:
                    save()
                    saved = time.monotonic()
            if meeting is not None:
                meeting.few_steps()
    save()


def _repeats(seconds: float) -> int:
    """Of a step that takes so long, in one visit."""
    return max(1, min(MOST_REPEATS, round(VISIT_SECONDS / seconds)))


def _save(record: dict[str, Any], path: Path | None) -> None:
    if path is None:
        return
    # Written beside and moved, so that a run that is cut leaves a whole file.
    beside = path.with_name(path.name + ".part")
    rows = ",\n".join("  " + json.dumps(row) for row in record["points"])
    head = json.dumps({**record, "points": None}, indent=1)
    beside.write_text(head.replace('"points": null', f'"points": [\n{rows}\n ]') + "\n")
    beside.replace(path)


def _check_settings(known: dict[str, Any], wanted: dict[str, Any], path: Path | None) -> None:
    differ = [name for name in {**known, **wanted} if known.get(name) != wanted.get(name)]
    if differ:
        name = differ[0]
        raise ValueError(
            f"{path} was made with {name} = {known.get(name)!r}, not {wanted.get(name)!r}; it is not continued: "
            "name another file, or delete it"
        )


def _captured(engine: Engine) -> dict[str, list[int]]:
    """What CUDA graphs pad steps to; empty without them."""
    graphs = engine.runner.graphs
    if graphs is None:
        return {"batches": [], "tokens": []}
    return {
        "batches": [step.layout.sequences for step in graphs.decode],
        "tokens": sorted({step.layout.tokens for step in [*graphs.whole, *graphs.pieces]}),
    }


def _dims(engine: Engine, model: str) -> dict[str, Any]:
    itemsize = engine.cache.shape.dtype.itemsize
    return asdict(ModelDims.from_config(engine.loaded.model.config, name=model, weight_itemsize=itemsize))
