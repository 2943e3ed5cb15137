// Rung (b): one pass. Still one block per sequence and query head, but
//
//   - a warp reads whole rows, 16 bytes a lane: LANES lanes share a token, so a load is coalesced;
//   - the query stays in registers, each lane keeps the slice that belongs to its 16 bytes of K;
//   - softmax goes along online: when a larger score turns up, what was summed so far is scaled down
//     (Milakov and Gimelshein 2018; Dao et al., FlashAttention, 2022). No score is ever stored, so any context fits.
//
// Each group of LANES lanes has its own running (maximum, sum, output); they are joined once at the end.
#include "paged.h"
#include "warp.h"

constexpr int WARPS = 4;
constexpr int AT_ONCE = 32 / LANES;        // tokens that a warp reads in one load
constexpr int STREAMS = WARPS * AT_ONCE;   // independent online softmaxes in the block
constexpr int SLICE = VECTORS * PER_16_BYTES;

// Same parameters as rung (a); grid (heads, sequences), 128 threads, no dynamic shared memory.
extern "C" __global__ void __launch_bounds__(WARPS * 32)
paged_decode_online(T* out, const T* query, i64 query_stride, const T* kv, i64 block_stride, const int* block_tables,
                    int table_stride, const int* context_lens, int kv_heads, float scale) {
    __shared__ float outputs[STREAMS][HEAD_DIM];
    __shared__ float maxima[STREAMS], sums[STREAMS];

    const int head = blockIdx.x, sequence = blockIdx.y, kv_head = head / GROUP;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int stream = warp * AT_ONCE + lane / LANES, slice = lane % LANES * PER_16_BYTES;
    const int context = context_lens[sequence];
    const int* table = block_tables + static_cast<i64>(sequence) * table_stride;
    const T* q_row = query + sequence * query_stride + head * HEAD_DIM;

    float q[VECTORS][PER_16_BYTES], acc[VECTORS][PER_16_BYTES] = {}, m = minus_infinity(), l = 0;
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
        unpack(load16(q_row + v * LANES * PER_16_BYTES + slice), q[v], T{});
#pragma unroll
        for (int i = 0; i < PER_16_BYTES; ++i) q[v][i] *= scale * LOG2_E;
    }

    // All lanes of a warp make the same number of turns: the shuffles below need them all.
    for (int first = warp * AT_ONCE; first < context; first += STREAMS) {
        const int token = first + lane / LANES;
        const bool valid = token < context;
        const T* k = kv;
        if (valid) k = key_row(kv, block_stride, table[token / BLOCK_SIZE], kv_head, token % BLOCK_SIZE) + slice;
        uint4 k_raw[VECTORS], v_raw[VECTORS];
#pragma unroll
        for (int v = 0; v < VECTORS; ++v) {
            k_raw[v] = valid ? load16(k + v * LANES * PER_16_BYTES) : make_uint4(0, 0, 0, 0);
            v_raw[v] = valid ? load16(k + value_offset(kv_heads) + v * LANES * PER_16_BYTES) : make_uint4(0, 0, 0, 0);
        }
        float x[PER_16_BYTES], score = 0;
#pragma unroll
        for (int v = 0; v < VECTORS; ++v) {
            unpack(k_raw[v], x, T{});
#pragma unroll
            for (int i = 0; i < PER_16_BYTES; ++i) score += q[v][i] * x[i];
        }
        score = group_sum<LANES>(score);
        if (!valid) score = minus_infinity();

        const float factor = rescale(m, score), p = valid ? exp2_fast(score - m) : 0.0f;
        l = l * factor + p;
#pragma unroll
        for (int v = 0; v < VECTORS; ++v) {
            unpack(v_raw[v], x, T{});
#pragma unroll
            for (int i = 0; i < PER_16_BYTES; ++i) acc[v][i] = acc[v][i] * factor + p * x[i];
        }
    }

#pragma unroll
    for (int v = 0; v < VECTORS; ++v)
#pragma unroll
        for (int i = 0; i < PER_16_BYTES; ++i) outputs[stream][v * LANES * PER_16_BYTES + slice + i] = acc[v][i];
    if (lane % LANES == 0) maxima[stream] = m, sums[stream] = l;
    __syncthreads();

    float largest = minus_infinity();
    for (int s = 0; s < STREAMS; ++s) largest = fmaxf(largest, maxima[s]);
    for (int d = threadIdx.x; d < HEAD_DIM; d += WARPS * 32) {
        float total = 0, sum = 0;
        for (int s = 0; s < STREAMS; ++s) {
            if (sums[s] == 0) continue;  // a stream that got no token
            const float weight = exp2_fast(maxima[s] - largest);
            total += weight * outputs[s][d], sum += weight * sums[s];
        }
        T result;
        assign(result, sum > 0 ? total / sum : 0.0f);
        out[(static_cast<i64>(sequence) * gridDim.x + head) * HEAD_DIM + d] = result;
    }
}
