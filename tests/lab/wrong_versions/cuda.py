"""Versions of the exercises in CUDA C++."""

# ruff: noqa: E501 (lines of C++)

from __future__ import annotations

from tests.lab.wrong_versions.base import CudaVersion, Version


def place(name: str, body: str) -> CudaVersion:
    return CudaVersion(name, f"\nDEVICE Place place_of(int lane, int turn) {{\n{body}\n}}\n")


def group(name: str, body: str) -> CudaVersion:
    return CudaVersion(name, f"\ntemplate <int WIDTH> DEVICE float group_sum(float x) {{\n{body}\n}}\n")


def join(name: str, body: str, before: str = "") -> CudaVersion:
    return CudaVersion(
        name, f"\n{before}template <int N> DEVICE Part join(const Part (&part)[N]) {{\n{body}\n}}\n"
    )


XOR = "__shfl_xor_sync(FULL_WARP, x, step)"

PLACES_WRONG = [
    (
        place("a_row_each_lane", "    return {lane % WARP_TOKENS, lane / WARP_TOKENS * (PIECES / 2) + turn};"),
        "32 sectors for 32 lanes",
    ),
    (
        place(
            "a_stretch_each_lane",
            "    const int index = lane * (WARP_TOKENS * PIECES / 32) + turn;\n"
            "    return {index / PIECES, index % PIECES};",
        ),
        "32 sectors for 32 lanes",
    ),
    (place("ignores_the_turn", "    return {lane / PIECES, lane % PIECES};"), "in turn 0 copies it already"),
    (
        place("sixteen_pieces_always", "    const int i = turn * 32 + lane;\n    return {i / 16, i % 16};"),
        "a place in the tile",
    ),
    (
        place("turns_from_one", "    const int i = (turn + 1) * 32 + lane;\n    return {i / PIECES, i % PIECES};"),
        "row 16, piece 0",
    ),
    (
        place("a_byte_for_an_index", "    signed char i = turn * 32 + lane;\n    return {i / PIECES, i % PIECES};"),
        "a place in the tile",
    ),
    (
        place("swapped", "    const int i = turn * 32 + lane;\n    return {i % PIECES, i / PIECES};"),
        "a place in the tile",
    ),
    (
        place("half_the_warp", "    const int i = turn * 16 + lane;\n    return {i / PIECES, i % PIECES};"),
        "copies it already",
    ),
    (
        place("the_block_instead", "    const int i = turn * 32 + threadIdx.x;\n    return {i / PIECES, i % PIECES};"),
        "use `lane`, not threadIdx",
    ),
    (
        place("overflows", "    const int i = (turn * 32 + lane) * 134217728;\n    return {i / 134217728 / PIECES, i / 134217728 % PIECES};"),
        "a place in the tile",
    ),
    (place("threadIdx_for_the_lane", "    const int i = turn * 32 + threadIdx.x % 32;\n    return {i / PIECES, i % PIECES};"),
     "use `lane`, not threadIdx"),
    (place("forgets_to_return", "    const int i = turn * 32 + lane;"), "no return statement"),
    (place("divides_by_zero", "    return {lane / (turn - turn), lane};"), "an integer was divided by zero"),
    (place("jumps_into_nowhere", "    auto f = reinterpret_cast<int (*)()>(8);\n    return {f(), lane};"), "broke off (SIGSEGV)"),
    (place("does_not_compile", "    return {lane / PIECES, lane % PIECE};"), "PIECE"),
    (place("reads_wild", "    const int* p = nullptr;\n    return {p[lane], turn};"), "out-of-bounds read"),
    (CudaVersion("another_name", "\nDEVICE Place place(int lane, int turn) { return {0, 0}; }\n"), "must define place_of"),
]  # fmt: skip

PLACES_RIGHT = [
    place(  # neighbours are rows apart, yet whole sectors are read: 16 a turn
        "columns_first",
        "    const int index = turn * 32 + lane;\n    return {index % WARP_TOKENS, index / WARP_TOKENS};",
    ),
    place(
        "rows_first",
        "    if (PIECES >= 32) return {turn / (PIECES / 32), turn % (PIECES / 32) * 32 + lane};\n"
        "    return {turn * (32 / PIECES) + lane / PIECES, lane % PIECES};",
    ),
    place(
        "backwards",
        "    const int last = WARP_TOKENS * PIECES - 1;\n    const int i = last - (turn * 32 + lane);\n"
        "    return {i / PIECES, i % PIECES};",
    ),
    place(
        "bits",
        "    unsigned i = turn << 5 | lane, shift = 0;\n    while ((1 << shift) < PIECES) ++shift;\n"
        "    return {int(i >> shift), int(i & (PIECES - 1))};",
    ),
]

GROUPS_WRONG = [
    (
        group("only_sixteen_lanes", f"    for (int step = 8; step > 0; step /= 2) x += {XOR};\n    return x;"),
        "group_sum<8>(lane=0)",
    ),
    (
        group("starts_at_the_width", f"    for (int step = WIDTH; step > 0; step /= 2) x += {XOR};\n    return x;"),
        "too much is added",
    ),
    (
        group("stops_early", f"    for (int step = WIDTH / 2; step > 1; step /= 2) x += {XOR};\n    return x;"),
        "not all 8 lanes of the group arrive",
    ),
    (
        group("wrong_offset", f"    for (int step = WIDTH / 2; step > 0; step -= 2) x += {XOR};\n    return x;"),
        "group_sum<8>(lane=0)",
    ),
    (
        group(
            "only_the_first_lane",
            "    for (int step = WIDTH / 2; step > 0; step /= 2) x += __shfl_down_sync(FULL_WARP, x, step, WIDTH);\n"
            "    return x;",
        ),
        "every lane of the group must get it",
    ),
    (
        group(
            "lane_zero_for_all",
            "    for (int step = WIDTH / 2; step > 0; step /= 2) x += __shfl_down_sync(FULL_WARP, x, step, WIDTH);\n"
            "    return __shfl_sync(FULL_WARP, x, 0);",
        ),
        "lanes 8-15, once each",
    ),
    (
        group("always_the_warp", f"    for (int step = 16; step > 0; step /= 2) x += {XOR};\n    return x;"),
        "lanes once 0-31",
    ),
    (
        group(
            "last_lane_for_all",
            "    for (int step = WIDTH / 2; step > 0; step /= 2) x += __shfl_down_sync(FULL_WARP, x, step, WIDTH);\n"
            "    return __shfl_sync(FULL_WARP, x, WIDTH - 1, WIDTH);",
        ),
        "group_sum<8>(lane=0)",
    ),
    (
        group(
            "half_of_the_warp_calls",
            f"    if (threadIdx.x % 32 < 16)\n        for (int step = WIDTH / 2; step > 0; step /= 2) x += {XOR};\n    return x;",
        ),
        "warp deadlock",
    ),
    (
        group(
            "no_barrier",
            "    __shared__ float box[64];\n    const int me = threadIdx.x % 64, first = me / WIDTH * WIDTH;\n"
            "    box[me] = x;\n    float sum = 0;\n    for (int i = 0; i < WIDTH; ++i) sum += box[first + i];\n    return sum;",
        ),
        "got   race",
    ),
    (
        group(
            "no_second_barrier",
            "    __shared__ float box[64];\n    const int me = threadIdx.x % 64, first = me / WIDTH * WIDTH;\n"
            "    box[me] = x;\n    __syncwarp();\n    float sum = 0;\n"
            "    for (int i = 0; i < WIDTH; ++i) sum += box[first + i];\n    return sum;",
        ),
        "got   race",
    ),
    (
        group(
            "waits_for_the_block",
            "    __shared__ float box[128];\n    const int me = threadIdx.x, first = me / WIDTH * WIDTH;\n    __syncthreads();\n"
            "    box[me] = x;\n    __syncthreads();\n    float sum = 0;\n"
            "    for (int i = 0; i < WIDTH; ++i) sum += box[first + i];\n    return sum;",
        ),
        "block deadlock",
    ),
    (
        group(
            "one_warp_s_memory",
            "    __shared__ float box[32];\n    const int me = threadIdx.x % 32, first = me / WIDTH * WIDTH;\n    __syncwarp();\n"
            "    box[me] = x;\n    __syncwarp();\n    float sum = 0;\n"
            "    for (int i = 0; i < WIDTH; ++i) sum += box[first + i];\n    return sum;",
        ),
        "got   race",
    ),
    (
        group("whole_numbers", "    int sum = x;\n    for (int step = WIDTH / 2; step > 0; step /= 2) "
              "sum += __shfl_xor_sync(FULL_WARP, sum, step);\n    return sum;"),
        "not for fractions",
    ),
    (
        group("half_a_mask", "    for (int step = WIDTH / 2; step > 0; step /= 2) x += __shfl_xor_sync(0xffffu, x, step);\n"
              "    return x;"),
        "mask",
    ),
    (
        group("sixteen_bits", "    x = to_float(to_bfloat16(x));\n    for (int step = WIDTH / 2; step > 0; step /= 2) "
              f"x += {XOR};\n    return x;"),
        "not for fractions",
    ),
    (group("nothing", "    return x;"), "not all 8 lanes of the group arrive"),
    (group("never_ends", f"    for (int step = WIDTH / 2; step >= 0; step /= 2) x += {XOR};\n    return x;"), "too many steps"),
    (
        group(
            "up_instead",
            "    for (int step = 1; step < WIDTH; step *= 2) x += __shfl_up_sync(FULL_WARP, x, step, WIDTH);\n    return x;",
        ),
        "group_sum<8>(lane=0)",
    ),
    (group("does_not_compile", f"    for (step = WIDTH / 2; step > 0; step /= 2) x += {XOR};\n    return x;"), "step"),
]  # fmt: skip

GROUPS_RIGHT = [
    group("from_one_up", f"    for (int step = 1; step < WIDTH; step *= 2) x += {XOR};\n    return x;"),
    group(
        "down_and_back",
        "    for (int step = WIDTH / 2; step > 0; step /= 2) x += __shfl_down_sync(FULL_WARP, x, step, WIDTH);\n"
        "    return __shfl_sync(FULL_WARP, x, 0, WIDTH);",
    ),
    group(
        "one_after_the_other",
        "    float sum = 0;\n    for (int i = 0; i < WIDTH; ++i) sum += __shfl_sync(FULL_WARP, x, i, WIDTH);\n    return sum;",
    ),
    group(
        "shared_memory",
        "    __shared__ float box[1024];\n    const int me = threadIdx.x, first = me / WIDTH * WIDTH;\n    __syncwarp();\n"
        "    box[me] = x;\n    __syncwarp();\n    float sum = 0;\n"
        "    for (int i = 0; i < WIDTH; ++i) sum += box[first + i];\n    return sum;",
    ),
    CudaVersion(
        "recursive",
        "\ntemplate <int WIDTH> DEVICE float group_sum(float x) {\n    if constexpr (WIDTH == 1) return x;\n"
        "    else return group_sum<WIDTH / 2>(x + __shfl_xor_sync(FULL_WARP, x, WIDTH / 2));\n}\n",
    ),
]

LARGEST = "    float largest = minus_infinity();\n    for (int i = 0; i < N; ++i) largest = fmaxf(largest, part[i].m);\n"
STOP = "    if (largest == minus_infinity()) return empty_part();\n"
TOTAL = "    Part total{largest, 0.0f, make_float4(0, 0, 0, 0)};\n"


def loop(weight: str, sum_of: str = "weight * part[i].l", o: str = "weight") -> str:
    return (
        f"    for (int i = 0; i < N; ++i) {{\n        const float weight = {weight};\n        total.l += {sum_of};\n"
        f"        add_scaled(total.o, part[i].o, {o});\n    }}\n"
    )


GOOD = loop("exp2_fast(part[i].m - largest)")
DIVIDE = "    total.o.x /= total.l, total.o.y /= total.l, total.o.z /= total.l, total.o.w /= total.l;\n    return total;"

JOINS_WRONG = [
    (join("no_rescaling", LARGEST + STOP + TOTAL + loop("1.0f") + "    return total;"), "is on another scale"),
    (join("divides_here_already", LARGEST + STOP + TOTAL + GOOD + DIVIDE), "divided by nothing here"),
    (
        join("divides_each", LARGEST + STOP + TOTAL + loop("exp2_fast(part[i].m - largest)", o="weight / part[i].l") + "    return total;"),
        "divided by nothing here",
    ),
    (join("no_thought_of_empty_ones", LARGEST + TOTAL + GOOD + "    return total;"), "-inf - -inf is NaN"),
    (
        join("the_wrong_exponential", LARGEST + STOP + TOTAL + loop("__expf(part[i].m - largest)") + "    return total;"),
        "is on another scale",
    ),
    (
        join("upside_down", LARGEST + STOP + TOTAL + loop("exp2_fast(largest - part[i].m)") + "    return total;"),
        "exp2 of a large number is inf",
    ),
    (
        join("forgets_the_sum", LARGEST + STOP + TOTAL + loop("exp2_fast(part[i].m - largest)", sum_of="part[i].l") + "    return total;"),
        "is on another scale",
    ),
    (
        join("forgets_the_output", LARGEST + STOP + TOTAL + loop("exp2_fast(part[i].m - largest)", o="1.0f") + "    return total;"),
        "is on another scale",
    ),
    (
        join("no_largest", "    Part total{0.0f, 0.0f, make_float4(0, 0, 0, 0)};\n" + loop("exp2_fast(part[i].m)") + "    return total;"),
        "join<",
    ),
    (
        join("largest_from_zero", "    float largest = 0;\n    for (int i = 0; i < N; ++i) largest = fmaxf(largest, part[i].m);\n"
             + TOTAL + GOOD + "    return total;"),
        "without a token",
    ),
    (
        join("first_is_largest", "    const float largest = part[0].m;\n" + STOP + TOTAL + GOOD + "    return total;"),
        "is the largest m of the parts",
    ),
    (
        join("skips_the_last", LARGEST + STOP + TOTAL + GOOD.replace("i < N", "i < N - 1") + "    return total;"),
        "join<1>",
    ),
    (
        join("one_too_many", LARGEST.replace("i < N", "i <= N") + STOP + TOTAL + GOOD + "    return total;"),
        "join<",
    ),
    (
        join("only_two", "    const float largest = fmaxf(part[0].m, part[N > 1].m);\n" + STOP + TOTAL
             + GOOD.replace("i < N", "i < 2 && i < N") + "    return total;"),
        "join<3>",
    ),
    (
        join("only_x", LARGEST + STOP + TOTAL + "    for (int i = 0; i < N; ++i) {\n"
             "        const float weight = exp2_fast(part[i].m - largest);\n        total.l += weight * part[i].l;\n"
             "        total.o.x += weight * part[i].o.x;\n    }\n    return total;"),
        "l and o add",
    ),
    (
        join("keeps_no_maximum", LARGEST + STOP + "    Part total = empty_part();\n" + GOOD + "    return total;"),
        "join<",
    ),
    (
        join("whole_numbers", LARGEST + STOP + TOTAL + loop("exp2_fast((int)(part[i].m - largest))") + "    return total;"),
        "join<",
    ),
    (
        join("drops_small_ones", LARGEST + STOP + TOTAL + loop("part[i].m - largest < -8.0f ? 0.0f : exp2_fast(part[i].m - largest)")
             + "    return total;"),
        "is on another scale",
    ),
    (join("static_total", LARGEST + STOP + "    static Part total = empty_part();\n    total.m = largest;\n" + GOOD
          + "    return total;"), "got   race"),
    (join("does_not_compile", LARGEST + "    return largest;"), "could not convert"),
]  # fmt: skip

TWO = """DEVICE Part join_two(const Part& a, const Part& b) {
    if (a.l == 0) return b;
    if (b.l == 0) return a;
    const float m = a.m > b.m ? a.m : b.m, wa = exp2_fast(a.m - m), wb = exp2_fast(b.m - m);
    return {m, wa * a.l + wb * b.l, make_float4(wa * a.o.x + wb * b.o.x, wa * a.o.y + wb * b.o.y,
                                               wa * a.o.z + wb * b.o.z, wa * a.o.w + wb * b.o.w)};
}
"""

JOINS_RIGHT = [
    join("two_at_a_time", "    Part total = part[0];\n    for (int i = 1; i < N; ++i) total = join_two(total, part[i]);\n    return total;", TWO),
    join(
        "online",
        "    float m = -1e30f, l = 0, o[4] = {0, 0, 0, 0};\n    for (int i = 0; i < N; ++i) {\n"
        "        if (part[i].l == 0) continue;\n        const float old = rescale_by(m, part[i].m);\n"
        "        const float w = exp2_fast(part[i].m - m);\n        l = l * old + w * part[i].l;\n"
        "        const float x[4] = {part[i].o.x, part[i].o.y, part[i].o.z, part[i].o.w};\n"
        "        for (int k = 0; k < 4; ++k) o[k] = o[k] * old + w * x[k];\n    }\n"
        "    return {m, l, make_float4(o[0], o[1], o[2], o[3])};",
        "DEVICE float rescale_by(float& m, float seen) {\n    const float to = fmaxf(m, seen), factor = exp2_fast(m - to);\n"
        "    m = to;\n    return factor;\n}\n",
    ),
    join(
        "weights_first",
        LARGEST + "    float w[N];\n    for (int i = 0; i < N; ++i)\n"
        "        w[i] = part[i].m == minus_infinity() ? 0.0f : exp2_fast(part[i].m - largest);\n" + TOTAL
        + loop("w[i]") + "    return total;",
    ),
]  # fmt: skip

WRONG: dict[str, list[tuple[Version, str]]] = {
    "cuda.place_of": PLACES_WRONG,
    "cuda.group_sum": GROUPS_WRONG,
    "cuda.join": JOINS_WRONG,
}
RIGHT: dict[str, list[Version]] = {
    "cuda.place_of": PLACES_RIGHT,
    "cuda.group_sum": GROUPS_RIGHT,
    "cuda.join": JOINS_RIGHT,
}
