"""Exercises in CUDA C++: each a `__device__` function that stands in a header of `cuda/`.

A check has two stages. A small kernel calls the function on inputs from which one sees what is wrong; then the real
paged attention is built around it and compared with float64. Both are emulated, watched, and where there is a GPU
they run there as well.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from nanopd_lab.kernels.errors import CompilerMissingError, KernelCompileError, KernelFaultError
from nanopd_lab.kernels.report import RunResult
from nanopd_lab.kernels.run import run
from nanopd_lab.kernels.sources import CudaText, definition, replaced, with_headers
from nanopd_lab.lab import cuda
from nanopd_lab.lab.checking import CannotCheckError, Counterexample, NotWrittenError
from nanopd_lab.lab.registry import Exercise

PLACE_OF = definition("mapping.h", "place_of")
GROUP_SUM = definition("warp.h", "group_sum")
JOIN = definition("join.h", "join")


# ---------------------------------------------------------------------- building and running a learner's source


class _Source:
    """A learner's text in the place of the package's, and everything that can go wrong as a `Counterexample`."""

    def __init__(self, own: CudaText, text: str, name: str, signature: str) -> None:
        if cuda.is_stub(text):
            raise NotWrittenError(name)
        if note := cuda.missing():
            raise CannotCheckError(note)
        self.name, self.text, self.headers = name, text, replaced(own, text)
        if not cuda.mentions(text, name):
            raise self.wrong("nothing of that name", signature, f"the source must define {name}")

    def wrong(
        self, got: str, want: str, why: str, where: str = "", called: str = "", **inputs: Any
    ) -> Counterexample:
        return Counterexample(called or self.name, inputs, got, want, why, where)

    def launch(
        self,
        harness: str,
        grid: int,
        block: int,
        args: Sequence[Any],
        defines: dict[str, object] | None = None,
    ) -> Iterator[RunResult]:
        """The harness, emulated and then on a GPU if there is one."""
        source = with_headers(harness, self.headers, "check.cu")
        for device in self._devices():
            options: dict[str, Any] = {"device": device, "defines": defines, "name": "check.cu"}
            with _Faults(self):
                yield run(source, "check", grid, block, args, max_steps=cuda.MAX_STEPS, **options)

    def attend(
        self, rung: str, dtype: str, head_dim: int, group: int, contexts: Sequence[int]
    ) -> Iterator[RunResult]:
        """Paged attention with the learner's function in it, against float64."""
        import torch

        from nanopd_lab.kernels import emulated, reference
        from nanopd_lab.kernels.problems import make_problem

        element = getattr(torch, dtype)
        p = make_problem(element, head_dim, 16, group, 1, contexts)
        for device in self._devices():
            with _Faults(self):
                out, result = emulated.paged_decode(
                    rung, *p.decode_args, instrument=True, headers=self.headers, device=device,
                    max_steps=8 * cuda.MAX_STEPS,
                )  # fmt: skip
            error, limit = reference.relative_error(out, p.wanted()), reference.TOLERANCES[element]
            if error > limit:
                raise self.wrong(
                    f"relative error {error:.1e}", f"at most {limit:.0e}",
                    f"alone it looked right, but paged attention built around it (rung {rung}, {dtype}) is wrong",
                    called=f"attention over {list(contexts)} tokens with your {self.name}",
                )  # fmt: skip
            yield result

    @staticmethod
    def _devices() -> list[str]:
        return ["emulator", "cuda"] if cuda.has_gpu() else ["emulator"]


class _Faults:
    """Turns what a compiler or the emulator finds into a `Counterexample`."""

    def __init__(self, source: _Source) -> None:
        self.source = source

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        text = self.source.text
        if isinstance(error, CompilerMissingError):
            raise CannotCheckError(str(error)) from None
        if isinstance(error, KernelCompileError):
            where, _, why = cuda.compiler_says(error, text, most=1).partition("\n")
            raise self.source.wrong("it does not compile", "a function", why.strip(), where[:150]) from None
        if isinstance(error, KernelFaultError):
            # A missing barrier may show as a read of what is not there yet, too; the race says it better.
            finding = min(error.findings, key=lambda finding: finding.kind != "race")
            where, _, why = cuda.fault(finding, text).partition("\n")
            raise self.source.wrong(
                where.partition(" at ")[0], "no fault", why.strip()[:150], where.partition(" at ")[2]
            )


# ---------------------------------------------------------------------- which lane copies what

TILES = (  # element, its bytes, HEAD_DIM, WARP_TOKENS
    ("bfloat16", 2, 128, 16), ("bfloat16", 2, 64, 8), ("float", 4, 64, 16),
    ("float16", 2, 256, 16), ("float", 4, 256, 8),
)  # fmt: skip
PLACE_CHECK = """
#include "mapping.h"
extern "C" __global__ void check(int* rows, int* pieces) {
    const int warp = threadIdx.x / 32, lane = warp == 0 ? threadIdx.x % 32 : 31 - threadIdx.x % 32;
    const int to = (warp * gridDim.x + blockIdx.x) * 32 + lane;
    const Place place = place_of(lane, blockIdx.x);
    rows[to] = place.row, pieces[to] = place.piece;
}
"""


def check_place_of(impl: str) -> int:
    """Every piece of five kinds of tiles once, 16 sectors in each turn; then rungs (d) and (e) with it."""
    source = _Source(PLACE_OF, impl, "place_of", "Place place_of(int lane, int turn)")
    cases = 0
    for element, size, head_dim, rows in TILES:
        pieces = head_dim * size // 16
        turns = rows * pieces // 32
        defines: dict[str, object] = {"ELEMENT": element, "HEAD_DIM": head_dim, "WARP_TOKENS": rows}
        where = [cuda.empty((2, turns, 32), "int32") for _ in range(2)]
        for result in source.launch(PLACE_CHECK, turns, 64, where, defines):
            _check_places(source, np.stack(result.outputs, -1), rows, pieces)
            cases += 32 * turns
    for rung, dtype, contexts in (("split", "float32", (128, 5)), ("mma", "bfloat16", (70, 0, 33))):
        for result in source.attend(rung, dtype, 64, 3, contexts):
            cases += sum(contexts)
            moved = [c for c in result.counters.lines if c.file == "split_kv.h" and c.bytes == 16 * c.lanes]
            loads = [c for c in moved if (c.space, c.kind) == ("global", "read") and c.requests > 16]
            if any(32 * c.sectors > 1.3 * c.bytes for c in loads):
                raise source.wrong(
                    "more sectors than needed in the real kernel", "16 a turn", "see the counters"
                )
    return cases


def _check_places(source: _Source, found: np.ndarray, rows: int, pieces: int) -> None:
    """found: `[2 warps, turns, 32 lanes, (row, piece)]`."""
    taken: dict[tuple[int, int], tuple[int, int]] = {}
    tile = f"the tile has rows 0 to {rows - 1} and pieces 0 to {pieces - 1}"

    def wrong(lane: int, turn: int, got: Any, want: str, why: str) -> Counterexample:
        return source.wrong(got, want, why, lane=lane, turn=turn)

    for turn, lane in np.ndindex(found.shape[1:3]):
        row, piece = (int(n) for n in found[0, turn, lane])
        got = f"row {row}, piece {piece}"
        if not (0 <= row < rows and 0 <= piece < pieces):
            raise wrong(lane, turn, got, "a place in the tile", f"{tile}, {rows * pieces // 32} turns")
        if (row, piece) in taken:
            other_turn, other_lane = taken[row, piece]
            why = f"lane {other_lane} in turn {other_turn} copies it already, so another piece is left out"
            raise wrong(lane, turn, got, f"a piece that nobody else has; {tile}", why)
        taken[row, piece] = turn, lane
        if (found[1, turn, lane] != found[0, turn, lane]).any():
            raise wrong(
                lane, turn, f"{got} in warp 0, another place in warp 1", got, "use `lane`, not threadIdx"
            )
    for turn, places in enumerate(found[0]):
        offsets = 16 * (pieces * places[:, 0] + places[:, 1])
        sectors = len(set((offsets // 32).tolist()))
        if sectors > 16:
            apart = int(abs(offsets[1] - offsets[0]))
            raise source.wrong(
                f"{sectors} sectors for 32 lanes", "16 sectors: 32 x 16 bytes, in sectors of 32",
                f"right, but not coalesced: lanes 0 and 1 read {apart} bytes apart, and half of what moves is unused",
                called=f"place_of(lane=0 … 31, turn={turn}), {rows} rows of {pieces} pieces",
            )  # fmt: skip


# ---------------------------------------------------------------------- the sum over neighbouring lanes

WIDTHS = (8, 16, 32, 4, 2)
GROUP_SUM_CHECK = """
#include "warp.h"
extern "C" __global__ void check(const float* x, float* y) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x, n = gridDim.x * blockDim.x;
    y[i] = group_sum<8>(x[i]);
    y[n + i] = group_sum<16>(x[i]);
    y[2 * n + i] = group_sum<32>(x[i]);
    y[3 * n + i] = group_sum<4>(x[i]);
    y[4 * n + i] = group_sum<2>(x[i]);
    // Warps go their own ways: one may ask more often than another.
    y[5 * n + i] = threadIdx.x < 32 ? group_sum<8>(x[i]) : 0.0f;
}
"""


def check_group_sum(impl: str) -> int:
    """Which lanes' values arrive in which lane, for five widths; fractions; then rungs (b), (c) and (d) with it."""
    source = _Source(GROUP_SUM, impl, "group_sum", "template <int WIDTH> float group_sum(float x)")
    # Block j: lane j has 1 in warp 0, 1000 in warp 1, and all others 0. What comes out says whose values went in.
    units = np.eye(32, dtype=np.float32)
    x = np.stack([np.concatenate([row, 1000 * row]) for row in units])
    fractions = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)
    x = np.concatenate([x, fractions])
    count = 0
    args = [x, cuda.empty((6, *x.shape))]
    for result in source.launch(GROUP_SUM_CHECK, len(x), 64, args):
        for width, y in zip((*WIDTHS, 8), result.outputs[1], strict=True):
            _check_units(source, width, y[:32, :32].T)
            count += 32 * 32
        for width, y in zip(WIDTHS, result.outputs[1], strict=False):
            want = fractions.astype(float).reshape(8, -1, width).sum(-1).repeat(width).reshape(8, 64)
            off = np.abs(y[32:] - want) > 1e-5
            if off.any() or not np.isfinite(y).all():
                block, lane = (int(n) for n in np.argwhere(off | ~np.isfinite(y[32:]))[0])
                raise source.wrong(
                    f"{y[32 + block, lane]:.6g}", f"{want[block, lane]:.6g}",
                    "right for ones and zeros, not for fractions",
                    called=f"group_sum<{width}>", lane=lane % 32,
                )  # fmt: skip
            count += off.size
    for rung, dtype in (("online", "float32"), ("gqa", "float16"), ("split", "float32")):
        for _ in source.attend(rung, dtype, 64, 3, (70, 1, 33)):
            count += 104
    return count


def _check_units(source: _Source, width: int, times: np.ndarray) -> None:
    """times: `[lane, whose]`, how often lane `whose` is in the sum that `lane` got."""
    for lane in range(32):
        first = lane // width * width
        want = np.zeros(32)
        want[first : first + width] = 1
        if (times[lane] == want).all():
            continue
        parts = [
            f"{name} {_ranges(np.flatnonzero(times[lane] == n))}"
            for n, name in ((1, "once"), (2, "twice"), (4, "four times"), (8, "eight times"))
            if (times[lane] == n).any()
        ]
        got = "lanes " + ", ".join(parts) if parts else f"{times[lane].sum():g} in all"
        if lane != first and (times[first] == _row(first, width)).all():
            why = f"lane {first} has the whole sum, but every lane of the group must get it"
        elif times[lane].sum() > width:
            why = "too much is added: which lanes are already in the sum after each step?"
        elif len(np.flatnonzero(times[lane])) < width:
            why = f"not all {width} lanes of the group arrive; halving the distance takes log2({width}) steps"
        else:
            why = "the values come from other lanes than the group's"
        raise source.wrong(
            got, f"lanes {first}-{first + width - 1}, once each", why, called=f"group_sum<{width}>", lane=lane
        )


def _row(first: int, width: int) -> np.ndarray:
    return np.repeat([0, 1, 0], [first, width, 32 - first - width])


def _ranges(numbers: np.ndarray) -> str:
    """0-3, 8, 10"""
    groups = np.split(numbers, np.flatnonzero(np.diff(numbers) != 1) + 1)
    shown = [str(g[0]) if len(g) == 1 else f"{g[0]}-{g[-1]}" for g in groups]
    return ", ".join(shown[:6]) + (", …" if len(shown) > 6 else "")


# ---------------------------------------------------------------------- joining the parts of a softmax

COUNTS = (1, 2, 3, 9)
JOIN_CHECK = """
#include "join.h"
template <int N> DEVICE void one(const float* in, float* out) {
    Part part[N];
    for (int i = 0; i < N; ++i) {
        const float* p = in + 6 * i;
        part[i] = Part{p[0], p[1], make_float4(p[2], p[3], p[4], p[5])};
    }
    const Part all = join(part);
    out[0] = all.m, out[1] = all.l, out[2] = all.o.x, out[3] = all.o.y, out[4] = all.o.z, out[5] = all.o.w;
}
extern "C" __global__ void check(const float* in, float* out, int cases) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= cases) return;
    one<1>(in + 54 * i, out + 24 * i);
    one<2>(in + 54 * i, out + 24 * i + 6);
    one<3>(in + 54 * i, out + 24 * i + 12);
    one<9>(in + 54 * i, out + 24 * i + 18);
}
"""
EMPTY = (-math.inf, 0.0)


def check_join(impl: str) -> int:
    """Worked examples with equal, unequal, far and empty parts, then random ones; then rungs (d) and (e) with it."""
    source = _Source(JOIN, impl, "join", "template <int N> Part join(const Part (&part)[N])")
    random = np.random.default_rng(0)
    cases = [*_joins(random)]
    table = np.zeros((len(cases), 9, 6), np.float32)
    for row, parts in zip(table, cases, strict=True):
        for i in range(9):
            largest, total = parts[i] if i < len(parts) else EMPTY
            row[i] = (largest, total, *(total * random.integers(-8, 9, 4) / 8))
    args = [table, cuda.empty((len(cases), 4, 6)), len(cases)]
    for result in source.launch(JOIN_CHECK, -(-len(cases) // 64), 64, args):
        order = [(case, which) for case in range(len(cases)) for which in range(4)]
        for case, which in sorted(order, key=lambda pair: (pair[0] >= 12, COUNTS[pair[1]] == 9, pair[0])):
            _check_join(source, table[case, : COUNTS[which]], result.outputs[1][case, which])
    for rung, dtype, contexts in (("split", "float32", (130, 7, 40)), ("mma", "bfloat16", (1, 70, 0, 150))):
        for _ in source.attend(rung, dtype, 64, 3, contexts):
            pass
    return 4 * len(cases) + 6


def _joins(random: np.random.Generator) -> Iterator[list[tuple[float, float]]]:
    """(m, l) of each part; fewer than nine are filled up with empty ones."""
    yield [(0.0, 1.0), (0.0, 2.0)]
    yield [(1.0, 1.0), (0.0, 1.0)]
    yield [(0.0, 1.0), (1.0, 1.0)]
    yield [(2.0, 3.0), (0.0, 4.0), (1.0, 2.0)]
    yield [(3.0, 1.5)]
    yield [EMPTY, (-2.0, 1.0)]
    yield [EMPTY, EMPTY, (5.0, 2.0)]
    yield []
    yield [(-300.0, 1.0), (-301.0, 1.0)]
    yield [(300.0, 1.0), (-300.0, 1.0), (299.0, 1.0)]
    yield [(-300.0, 1.0), (300.0, 1.0)]
    yield [(0.0, 100_000.0), (-9.0, 1.0)]
    for _ in range(60):
        count = int(random.integers(1, 10))
        scale = random.choice([1.0, 10.0, 200.0])
        parts = [
            (float(scale * random.standard_normal()), float(1 + 99 * random.random())) for _ in range(count)
        ]
        yield [EMPTY if random.random() < 0.2 else part for part in parts]


def _check_join(source: _Source, parts: np.ndarray, got: np.ndarray) -> None:
    m, rest = parts[:, 0].astype(float), parts[:, 1:].astype(float)
    largest = m.max()
    weights = np.exp2(m - largest) if np.isfinite(largest) else np.zeros(len(m))
    want = np.array([largest, *(weights[:, None] * rest).sum(0)])
    if np.isfinite(largest):
        with np.errstate(all="ignore"):  # on the wanted scale, whichever m was chosen
            on_scale = got[1:].astype(float) * np.exp2(float(got[0]) - largest)
        limit = 1e-5 * (weights[:, None] * abs(rest)).sum(0).max()
        right = bool(np.isfinite(got).all() and (np.abs(on_scale - want[1:]) <= limit).all())
    else:
        right = bool(got[0] < -1e9 and (got[1:] == 0).all())
    if right:
        return
    empty = np.isneginf(m)
    if not empty.all() and np.isneginf(got[0]):
        why = "m of the whole is the largest m of the parts, wherever it stands"
    elif np.isnan(got).any() or np.isinf(got[1:]).any():
        why = "-inf - -inf is NaN, and exp2 of a large number is inf: subtract the largest m, and mind empty parts"
    elif empty.all():
        why = "parts without a token make a part without a token: m = -inf, and zeros"
    elif empty.any() and len(set(m[~empty])) == 1 and not (~empty).sum() > 1:
        why = "an empty part (m = -inf, l = 0) changes nothing"
    elif len(set(m[~empty])) > 1:
        why = "a part with a smaller m is on another scale: its l and o count exp2(m - largest m) times"
    else:
        why = "parts of equal m are on one scale: l and o add, and are divided by nothing here"
    raise source.wrong(_shown(got), _shown(want), why, called=f"join<{len(parts)}>", parts=_List(parts))


def _shown(part: np.ndarray) -> str:
    o = ", ".join(f"{x:.3g}" for x in part[2:])
    return f"m={part[0]:.4g}, l={part[1]:.4g}, o=({o})"


class _List:
    """Parts as (m, l, o.x), short."""

    def __init__(self, parts: np.ndarray) -> None:
        self.text = ", ".join(f"(m={p[0]:.4g}, l={p[1]:.4g}, o.x={p[2]:.3g})" for p in parts)

    def __repr__(self) -> str:
        return self.text


EXERCISES = (
    Exercise(
        name="cuda.place_of",
        notebook="04",
        reference=PLACE_OF,
        check=check_place_of,
        hints=(
            "In a turn, 32 lanes read at the same moment. Memory answers in sectors of 32 bytes, and a piece has 16: "
            "when should lane 1 read the piece right after lane 0's, and when not?",
            "Number all pieces of the tile in the order in which they lie in memory: 0, 1, 2, …, row after row. The "
            "first turn takes numbers 0 to 31, the second 32 to 63. Then turn a number into a row and a piece.",
            "`const int index = turn * 32 + lane;` The row is `index / PIECES`, the piece `index % PIECES`; return "
            "`{row, piece}`.",
        ),
    ),
    Exercise(
        name="cuda.group_sum",
        notebook="04",
        reference=GROUP_SUM,
        check=check_group_sum,
        hints=(
            "`__shfl_xor_sync(FULL_WARP, x, s)` gives you x of the lane whose number differs from yours in the bits of "
            "s. If you both add what you got, you both know the sum of two. What must s be next?",
            "After the step with s = 4 each lane holds a sum of two lanes, 4 apart. A step with s = 2 adds another "
            "pair's sum, s = 1 the last. Which s come for WIDTH lanes, and with which one does it begin?",
            "`for (int step = WIDTH / 2; step > 0; step /= 2) x += __shfl_xor_sync(FULL_WARP, x, step);` and return x.",
        ),
    ),
    Exercise(
        name="cuda.join",
        notebook="04",
        reference=JOIN,
        check=check_join,
        hints=(
            "Only sums on the same scale can be added. Each part is on the scale of its own m. Choose one scale for "
            "all, such that nothing overflows.",
            "First loop: the largest m of all the parts. Second loop: a part counts `exp2_fast(part[i].m - largest)` "
            "times; l and o are added with that weight, and `add_scaled` does it for the four of o. What is the weight "
            "when all parts are empty?",
            "`Part total = empty_part();`, then `total.m = fmaxf(total.m, part[i].m)` over all i; if it is still "
            "`minus_infinity()`, return total; then for each i `weight = exp2_fast(part[i].m - total.m)`, "
            "`total.l += weight * part[i].l`, `add_scaled(total.o, part[i].o, weight)`; return total. Divide nowhere.",
        ),
    ),
)
