// Products of few rows, as decode steps make them: y [rows x N] = x [rows x K] * W^T (+ r), W [N x K], rows <= COLUMNS.
// Each weight is used for a few multiplications only, so the time is that of reading W once, and what counts is to
// ask for it early, all the time, and to the very end:
//
//   - a block takes TILE rows of W whole; its warps share K among them and add up at the end. No part of the work has to
//     wait for another block, and there are enough blocks to fill the GPU and to end almost together;
//   - W goes from memory straight to the registers of the lane that multiplies it, 16 bytes at a time and AHEAD turns
//     ahead. Nobody else needs it, so shared memory and its barriers would only delay it;
//   - x comes from the caches: all blocks of a multiprocessor walk through it in the same order;
//   - W doesn't depend on the kernel before: the first turns are asked for before that one has ended.
//
// Tensor cores want their operands spread over the lanes in 4-byte pieces, not 16: lane (g, t) holds columns 2t, 2t + 1
// and 2t + 8, 2t + 9 of rows g and g + 8. But the order of k doesn't matter to a sum, as long as W and x have the same:
// let the lane's 8 consecutive values stand for those columns of two products.
//
//     memory:    k = 8t  8t+1 | 8t+2  8t+3 | 8t+4  8t+5 | 8t+6  8t+7
//     product:   first, 2t    | first, 2t+8| second, 2t | second, 2t+8
#include "portable.h"

#ifndef ELEMENT
#define ELEMENT bfloat16
#endif
#ifndef COLUMNS
#define COLUMNS 8
#endif
#ifndef WARPS
#define WARPS 8
#endif
#ifndef AHEAD
#define AHEAD 4
#endif
#ifndef X_AHEAD  // turns that x is asked for ahead; divides AHEAD, 0 for not at all
#define X_AHEAD AHEAD
#endif
#ifndef ROW_TILES
#define ROW_TILES 1
#endif

using T = ELEMENT;
static_assert(sizeof(T) == 2, "tensor cores take 16-bit elements here");
constexpr int MT = ROW_TILES, TILE = 16 * MT;
constexpr int TURN = 32;          // values of k that a warp multiplies in a turn
constexpr int NT = COLUMNS / 8;
constexpr int THREADS = WARPS * 32;
constexpr int OUTPUTS = TILE * COLUMNS;

// y, r, x: rows `…_stride` elements apart; r may be null; n a multiple of TILE, k of 32; grid: n / TILE blocks.
extern "C" __global__ void __launch_bounds__(THREADS)
few_rows(T* y, i64 y_stride, const T* x, i64 x_stride, const T* w, const T* r, i64 r_stride, int rows, int k) {
    __shared__ float parts[WARPS][OUTPUTS];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int turns = k / TURN, begin = turns * warp / WARPS, end = turns * (warp + 1) / WARPS;

    const T* weights = w + (static_cast<i64>(blockIdx.x) * TILE + g) * k + 8 * t;
    const i64 eight_rows = static_cast<i64>(8) * k;
    const T* column[NT];
#pragma unroll
    for (int c = 0; c < NT; ++c) column[c] = x + min(8 * c + g, rows - 1) * x_stride + 8 * t;

    uint4 a[AHEAD][2 * MT], b[X_AHEAD ? X_AHEAD : 1][NT];
    const auto load_weights = [&](uint4(&to)[2 * MT], int turn) {
#pragma unroll
        for (int m = 0; m < 2 * MT; ++m) to[m] = load_once(weights + m * eight_rows + turn * TURN);
    };
    const auto load_x = [&](uint4(&to)[NT], int turn) {
#pragma unroll
        for (int c = 0; c < NT; ++c) to[c] = load16(column[c] + turn * TURN);
    };
#pragma unroll
    for (int i = 0; i < AHEAD; ++i)
        if (begin + i < end) load_weights(a[i], begin + i);
    begin_dependents();
    wait_for_previous();  // x and r are its results
#pragma unroll
    for (int i = 0; i < X_AHEAD; ++i)
        if (begin + i < end) load_x(b[i], begin + i);

    float acc[MT][NT][4] = {};
    for (int turn = begin; turn < end; turn += AHEAD) {
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            if (turn + i >= end) break;
            uint4(&columns)[NT] = b[X_AHEAD ? i % (X_AHEAD ? X_AHEAD : 1) : 0];
            if (!X_AHEAD) load_x(columns, turn + i);
#pragma unroll
            for (int m = 0; m < MT; ++m) {
                const uint4 upper = a[i][2 * m], lower = a[i][2 * m + 1];
                const u32 first[4] = {upper.x, lower.x, upper.y, lower.y};
                const u32 second[4] = {upper.z, lower.z, upper.w, lower.w};
#pragma unroll
                for (int c = 0; c < NT; ++c) {
                    mma_16x8x16(acc[m][c], first, columns[c].x, columns[c].y, T{});
                    mma_16x8x16(acc[m][c], second, columns[c].z, columns[c].w, T{});
                }
            }
            if (turn + i + AHEAD < end) load_weights(a[i], turn + i + AHEAD);
            if (X_AHEAD && turn + i + X_AHEAD < end) load_x(columns, turn + i + X_AHEAD);
        }
    }

    // parts[warp]: [COLUMNS][TILE], so that neighbours in W's rows are neighbours in y.
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
        for (int c = 0; c < NT; ++c)
#pragma unroll
            for (int e = 0; e < 4; ++e)
                parts[warp][(8 * c + 2 * t + e % 2) * TILE + 16 * m + g + e / 2 * 8] = acc[m][c][e];
    __syncthreads();
    for (int i = threadIdx.x; i < OUTPUTS; i += THREADS) {
        const int row = i / TILE;
        const i64 at = static_cast<i64>(blockIdx.x) * TILE + i % TILE;
        if (row >= rows) break;
        float sum = r == nullptr ? 0.0f : to_float(r[row * r_stride + at]);
#pragma unroll
        for (int v = 0; v < WARPS; ++v) sum += parts[v][i];
        assign(y[row * y_stride + at], sum);
    }
}
