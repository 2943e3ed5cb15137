// The smallest logit that top_p keeps: the largest x of a row such that the tokens with logits >= x weigh at least
// `target` together. To sort a vocabulary for it takes milliseconds, and to look first whether the likeliest tokens
// suffice makes the host wait for the device.
//
// Logits are at most 0 here (the row's largest is subtracted), so the bits of their magnitudes, read as integers, are in
// order, the likeliest first. A block searches its row for the place where the sum reaches the target, four parts a turn:
//
//     low ......... cut 0 ......... cut 1 ......... cut 2 ......... high
//     what lies before low is summed up already; what lies behind cut 2 does not matter in this turn
//
// 31 bits take 16 turns. All read the logits (from L2, mostly), but only the first few the weights of more than a few
// tokens. Sums are in double and in an order that depends on the row alone, so equal rows have equal results.
#include "portable.h"

#ifndef WARPS
#define WARPS 32
#endif

constexpr int THREADS = WARPS * 32, AHEAD = 4, CUTS = 3;
constexpr u32 MAGNITUDE = 0x7fffffffu, INFINITE = 0x7f800000u;
static_assert(WARPS >= CUTS && WARPS <= 32);

DEVICE double warp_sum(double x) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(FULL_WARP, x, step);
    return x;
}

// threshold: [rows], -infinity where all tokens together don't reach the target; logits, weights: [rows, vocab],
// contiguous; target: [rows]; grid: a block for each row.
extern "C" __global__ void __launch_bounds__(THREADS)
top_p(float* threshold, const float* logits, const float* weights, const double* target, int vocab) {
    __shared__ double parts[CUTS][WARPS], sums[CUTS];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const float* x = logits + static_cast<i64>(blockIdx.x) * vocab;
    const float* w = weights + static_cast<i64>(blockIdx.x) * vocab;
    const double wanted = target[blockIdx.x];
    const int pieces = vocab % 4 == 0 ? vocab / 4 : 0;  // else rows don't begin at multiples of 16 bytes

    u32 low = 0, high = INFINITE;  // the place lies in [low, high]
    double below = 0;              // weight of what lies before low
    while (low < high) {
        const u32 quarter = (high - low) / 4;
        const u32 cut[CUTS] = {low + quarter, low + (high - low) / 2, high - 1 - quarter};
        double sum[CUTS] = {};
        const auto matters = [&](u32 key) { return key >= low && key <= cut[2]; };  // NaN lies behind all
        const auto add = [&](u32 key, float weight) {
            if (!matters(key)) return;
            sum[2] += weight;
            if (key <= cut[1]) sum[1] += weight;
            if (key <= cut[0]) sum[0] += weight;
        };
        for (int i = threadIdx.x; i < pieces; i += THREADS * AHEAD) {
            uint4 key[AHEAD];
#pragma unroll
            for (int j = 0; j < AHEAD; ++j) {
                const int at = i + j * THREADS;
                key[j] = at < pieces ? load16(x + 4 * at) : make_uint4(MAGNITUDE, MAGNITUDE, MAGNITUDE, MAGNITUDE);
            }
#pragma unroll
            for (int j = 0; j < AHEAD; ++j) {
                const u32 a = key[j].x & MAGNITUDE, b = key[j].y & MAGNITUDE;
                const u32 c = key[j].z & MAGNITUDE, d = key[j].w & MAGNITUDE;
                if (!(matters(a) || matters(b) || matters(c) || matters(d))) continue;
                const uint4 weight = load16(w + 4 * (i + j * THREADS));
                add(a, __uint_as_float(weight.x));
                add(b, __uint_as_float(weight.y));
                add(c, __uint_as_float(weight.z));
                add(d, __uint_as_float(weight.w));
            }
        }
        for (int i = 4 * pieces + threadIdx.x; i < vocab; i += THREADS) add(__float_as_uint(x[i]) & MAGNITUDE, w[i]);

#pragma unroll
        for (int j = 0; j < CUTS; ++j) {
            sum[j] = warp_sum(sum[j]);
            if (lane == 0) parts[j][warp] = sum[j];
        }
        __syncthreads();
        if (warp < CUTS) {
            const double all = warp_sum(lane < WARPS ? parts[warp][lane] : 0.0);
            if (lane == 0) sums[warp] = all;
        }
        __syncthreads();
        if (below + sums[0] >= wanted) {
            high = cut[0];
        } else if (below + sums[1] >= wanted) {
            low = cut[0] + 1, high = cut[1], below += sums[0];
        } else if (below + sums[2] >= wanted) {
            low = cut[1] + 1, high = cut[2], below += sums[1];
        } else {
            low = cut[2] + 1, below += sums[2];
        }
    }
    if (threadIdx.x == 0) threshold[blockIdx.x] = __uint_as_float(low | 0x80000000u);
}
