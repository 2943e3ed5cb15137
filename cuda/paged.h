// Where a token's K and V lie in the block-major cache [num_blocks, layers, 2, kv_heads, BLOCK_SIZE, HEAD_DIM].
// A kernel gets one layer's view: inside a block everything of that layer is contiguous, from block to block
// it is `block_stride` elements. ELEMENT, HEAD_DIM, BLOCK_SIZE and GROUP (query heads per KV head) are
// compile-time constants, so that the compiler unrolls every loop over them.
#pragma once
#include "portable.h"

#ifndef ELEMENT
#define ELEMENT bfloat16
#endif
#ifndef HEAD_DIM
#define HEAD_DIM 128
#endif
#ifndef BLOCK_SIZE
#define BLOCK_SIZE 16
#endif
#ifndef GROUP
#define GROUP 4
#endif

using T = ELEMENT;
constexpr int PER_16_BYTES = 16 / static_cast<int>(sizeof(T));
// A row of K (one token, one head) is read by LANES lanes, 16 bytes each, VECTORS times.
constexpr int LANES = HEAD_DIM / PER_16_BYTES < 32 ? HEAD_DIM / PER_16_BYTES : 32;
constexpr int VECTORS = HEAD_DIM / PER_16_BYTES / LANES;
constexpr float LOG2_E = 1.4426950408889634f;  // exp(x) = exp2(x * LOG2_E): the hardware has exp2

// First element of K of `token` (its offset in the block) and `kv_head` in block `block`.
DEVICE const T* key_row(const T* kv, i64 block_stride, int block, int kv_head, int offset) {
    return kv + block * block_stride + (static_cast<i64>(kv_head) * BLOCK_SIZE + offset) * HEAD_DIM;
}
// V lies this many elements after K.
DEVICE i64 value_offset(int kv_heads) { return static_cast<i64>(kv_heads) * BLOCK_SIZE * HEAD_DIM; }

// Joins a partial softmax (maximum m, sum l) with the maximum `seen` of new scores; returns what the old sums
// must be multiplied by. Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018).
DEVICE float rescale(float& m, float seen) {
    const float joined = fmaxf(m, seen);
    const float factor = joined == m ? 1.0f : exp2_fast(m - joined);  // also where both are -inf
    m = joined;
    return factor;
}
