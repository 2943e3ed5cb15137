// Writes K and V of a flat batch into the block-major cache: token t goes to slot slots[t], that is to block
// slot / BLOCK_SIZE, offset slot % BLOCK_SIZE. A negative slot is padding and is skipped (batches that run as a
// CUDA graph are padded to the graph's size). One thread moves PER_THREAD times 16 bytes of K and of V.
#include "paged.h"

constexpr int PIECES = HEAD_DIM / PER_16_BYTES;  // 16-byte pieces of a row
constexpr int PER_THREAD = 2;

// key, value: [tokens, kv_heads, HEAD_DIM], rows `key_stride` and `value_stride` elements apart (they may be slices
// of one fused product); grid: enough blocks of 256 threads for tokens * kv_heads * PIECES / PER_THREAD.
extern "C" __global__ void __launch_bounds__(256)
kv_store(T* kv, i64 block_stride, const T* key, i64 key_stride, const T* value, i64 value_stride, const i64* slots,
         int tokens, int kv_heads) {
    begin_dependents();
    wait_for_previous();
    const int per_token = kv_heads * PIECES;
    const i64 pieces = static_cast<i64>(tokens) * per_token;
    const i64 first = static_cast<i64>(blockIdx.x) * blockDim.x * PER_THREAD + threadIdx.x;
    uint4 k[PER_THREAD], v[PER_THREAD];
    i64 slot[PER_THREAD];
#pragma unroll
    for (int i = 0; i < PER_THREAD; ++i) {  // everything is asked for before the first is used
        const i64 index = first + i * blockDim.x;
        slot[i] = -1;
        if (index >= pieces) continue;
        const int token = static_cast<int>(index / per_token), piece = static_cast<int>(index % per_token);
        k[i] = load16(key + token * key_stride + piece * PER_16_BYTES);
        v[i] = load16(value + token * value_stride + piece * PER_16_BYTES);
        slot[i] = slots[token];
    }
#pragma unroll
    for (int i = 0; i < PER_THREAD; ++i) {
        if (slot[i] < 0) continue;
        const int piece = static_cast<int>((first + i * blockDim.x) % per_token);
        T* to = kv + slot[i] / BLOCK_SIZE * block_stride + piece % PIECES * PER_16_BYTES
              + (static_cast<i64>(piece / PIECES) * BLOCK_SIZE + slot[i] % BLOCK_SIZE) * HEAD_DIM;
        store16(to, k[i]);
        store16(to + value_offset(kv_heads), v[i]);
    }
}
