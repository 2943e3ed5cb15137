// Products of few rows, as decode steps make them: y [rows x N] = x [rows x K] * W^T, W [N x K], rows <= 8 or 16.
// Each weight is used for a few multiplications only, so the time is that of reading W once, and what counts is to
// ask for it early, all the time, and to the very end:
//
//   - a block takes 16 rows of W whole; its warps share K among them and add up at the end. No part of the work has to
//     wait for another block, and there are enough blocks to fill the GPU and to end almost together;
//   - W goes from memory straight to the registers of the lane that multiplies it, 16 bytes at a time and AHEAD turns
//     ahead. Nobody else needs it, so shared memory and its barriers would only delay it;
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

using T = ELEMENT;
static_assert(sizeof(T) == 2, "tensor cores take 16-bit elements here");
constexpr int TILE = 16;
constexpr int TURN = 32;          // values of k that a warp multiplies in a turn
constexpr int NT = COLUMNS / 8;
constexpr int THREADS = WARPS * 32;
constexpr int OUTPUTS = TILE * COLUMNS;

// y, x: rows `y_stride`, `x_stride` elements apart; n a multiple of 16, k of 32; grid: n / 16 blocks.
extern "C" __global__ void __launch_bounds__(THREADS)
few_rows(T* y, i64 y_stride, const T* x, i64 x_stride, const T* w, int rows, int k) {
    __shared__ float parts[WARPS][OUTPUTS];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int turns = k / TURN, begin = turns * warp / WARPS, end = turns * (warp + 1) / WARPS;

    const T* top = w + (static_cast<i64>(blockIdx.x) * TILE + g) * k + 8 * t;
    const T* bottom = top + static_cast<i64>(8) * k;
    const T* column[NT];
#pragma unroll
    for (int c = 0; c < NT; ++c) column[c] = x + min(8 * c + g, rows - 1) * x_stride + 8 * t;

    uint4 a[AHEAD][2], b[AHEAD][NT];
#pragma unroll
    for (int i = 0; i < AHEAD; ++i)
        if (begin + i < end) {
            a[i][0] = load_once(top + (begin + i) * TURN);
            a[i][1] = load_once(bottom + (begin + i) * TURN);
        }
    begin_dependents();
    wait_for_previous();  // x is its result
#pragma unroll
    for (int i = 0; i < AHEAD; ++i)
        if (begin + i < end)
#pragma unroll
            for (int c = 0; c < NT; ++c) b[i][c] = load16(column[c] + (begin + i) * TURN);

    float acc[NT][4] = {};
    for (int turn = begin; turn < end; turn += AHEAD) {
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            if (turn + i >= end) break;
            const uint4 upper = a[i][0], lower = a[i][1];
            const u32 first[4] = {upper.x, lower.x, upper.y, lower.y}, second[4] = {upper.z, lower.z, upper.w, lower.w};
#pragma unroll
            for (int c = 0; c < NT; ++c) {
                mma_16x8x16(acc[c], first, b[i][c].x, b[i][c].y, T{});
                mma_16x8x16(acc[c], second, b[i][c].z, b[i][c].w, T{});
            }
            const int later = turn + i + AHEAD;
            if (later < end) {
                a[i][0] = load_once(top + later * TURN);
                a[i][1] = load_once(bottom + later * TURN);
#pragma unroll
                for (int c = 0; c < NT; ++c) b[i][c] = load16(column[c] + later * TURN);
            }
        }
    }

    // parts[warp]: [COLUMNS][TILE], so that neighbours in W's rows are neighbours in y.
#pragma unroll
    for (int c = 0; c < NT; ++c)
#pragma unroll
        for (int e = 0; e < 4; ++e) parts[warp][(8 * c + 2 * t + e % 2) * TILE + g + e / 2 * 8] = acc[c][e];
    __syncthreads();
    for (int i = threadIdx.x; i < OUTPUTS; i += THREADS) {
        const int row = i / TILE;
        float sum = 0;
#pragma unroll
        for (int v = 0; v < WARPS; ++v) sum += parts[v][i];
        if (row < rows) assign(y[row * y_stride + static_cast<i64>(blockIdx.x) * TILE + i % TILE], sum);
    }
}
