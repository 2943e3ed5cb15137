// Writes K and V of a flat batch into the block-major cache: token t goes to slot slots[t], that is to block
// slot / BLOCK_SIZE, offset slot % BLOCK_SIZE. A negative slot is padding and is skipped (batches that run as a
// CUDA graph are padded to the graph's size). One thread moves 16 bytes of K and of V.
#include "paged.h"

constexpr int PIECES = HEAD_DIM / PER_16_BYTES;  // 16-byte pieces of a row

// key, value: [tokens, kv_heads, HEAD_DIM], rows `key_stride` and `value_stride` elements apart (they may be slices
// of one fused product); grid: enough blocks for tokens * kv_heads * PIECES threads.
extern "C" __global__ void
kv_store(T* kv, i64 block_stride, const T* key, i64 key_stride, const T* value, i64 value_stride, const i64* slots,
         int tokens, int kv_heads) {
    begin_dependents();
    wait_for_previous();
    const u32 per_token = kv_heads * PIECES, index = blockIdx.x * blockDim.x + threadIdx.x;
    const u32 token = index / per_token, piece = index % per_token;
    if (token >= static_cast<u32>(tokens)) return;
    // All three are asked for before the first is used.
    const uint4 k = load16(key + token * key_stride + piece * PER_16_BYTES);
    const uint4 v = load16(value + token * value_stride + piece * PER_16_BYTES);
    const i64 slot = slots[token];
    if (slot < 0) return;
    T* to = kv + slot / BLOCK_SIZE * block_stride + piece % PIECES * PER_16_BYTES
          + (static_cast<i64>(piece / PIECES) * BLOCK_SIZE + slot % BLOCK_SIZE) * HEAD_DIM;
    store16(to, k);
    store16(to + value_offset(kv_heads), v);
}
