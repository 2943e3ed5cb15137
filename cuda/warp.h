// Reductions without shared memory: lanes hand their registers to each other.
#pragma once
#include "portable.h"

// Sum of x over each group of WIDTH neighbouring lanes (2, 4, 8, 16 or 32), which every lane of the group gets. All
// lanes of the warp must call it. After the step of s each lane holds the sum over lanes that differ in the bits done.
template <int WIDTH> DEVICE float group_sum(float x) {
#pragma unroll
    for (int step = WIDTH / 2; step > 0; step /= 2) x += __shfl_xor_sync(FULL_WARP, x, step);
    return x;
}

DEVICE float warp_max(float x) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(FULL_WARP, x, step));
    return x;
}
