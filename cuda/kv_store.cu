// Writes K and V of a flat batch into the block-major cache: token t goes to slot slots[t], that is to block
// slot / BLOCK_SIZE, offset slot % BLOCK_SIZE. A negative slot is padding and is skipped (batches that run as a
// CUDA graph are padded to the graph's size). One thread moves 16 bytes of K and 16 of V.
#include "paged.h"

constexpr int PIECES = HEAD_DIM / PER_16_BYTES;  // 16-byte pieces of a row

// key, value: [tokens, kv_heads, HEAD_DIM], rows `key_stride` and `value_stride` elements apart (they may be slices
// of one fused product); grid: enough blocks of 256 threads for tokens * kv_heads * PIECES.
extern "C" __global__ void __launch_bounds__(256)
kv_store(T* kv, i64 block_stride, const T* key, i64 key_stride, const T* value, i64 value_stride, const i64* slots,
         int tokens, int kv_heads) {
    const i64 index = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x;
    const int per_token = kv_heads * PIECES;
    const int token = static_cast<int>(index / per_token), piece = static_cast<int>(index % per_token);
    if (token >= tokens) return;
    // The row is asked for before the slot is known: two latencies that overlap.
    const uint4 k = load16(key + token * key_stride + piece * PER_16_BYTES);
    const uint4 v = load16(value + token * value_stride + piece * PER_16_BYTES);
    const i64 slot = slots[token];
    if (slot < 0) return;
    const int head = piece / PIECES, part = piece % PIECES;
    T* to = kv + slot / BLOCK_SIZE * block_stride
          + (static_cast<i64>(head) * BLOCK_SIZE + slot % BLOCK_SIZE) * HEAD_DIM + part * PER_16_BYTES;
    store16(to, k);
    store16(to + value_offset(kv_heads), v);
}
