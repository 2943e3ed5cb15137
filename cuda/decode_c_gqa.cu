// Rung (c): K and V once per group. In grouped-query attention GROUP query heads share a KV head; here one block
// takes a sequence and a *KV* head and serves all its query heads from the same loaded row, which divides the
// bytes read by GROUP. It also asks for several rows before it uses the first (UNROLL loads of K and of V), so
// that more bytes are on their way at a time: bandwidth is bytes in flight over latency (Little's law).
//
// What is left: a block per (sequence, KV head) is few blocks for a small batch, and the longest sequence of a
// ragged batch keeps one multiprocessor busy when all others are done.
#include "paged.h"
#include "warp.h"

constexpr int WARPS = 4;
constexpr int AT_ONCE = 32 / LANES;
constexpr int STREAMS = WARPS * AT_ONCE;
constexpr int SLICE = VECTORS * PER_16_BYTES;
constexpr int UNROLL = VECTORS == 1 ? 4 : 2;

// Same parameters as rung (a); grid (kv_heads, sequences), 128 threads, no dynamic shared memory.
extern "C" __global__ void __launch_bounds__(WARPS * 32)
paged_decode_gqa(T* out, const T* query, i64 query_stride, const T* kv, i64 block_stride, const int* block_tables,
                 int table_stride, const int* context_lens, int kv_heads, float scale) {
    __shared__ float outputs[STREAMS][HEAD_DIM];
    __shared__ float maxima[GROUP][STREAMS], sums[GROUP][STREAMS];

    const int kv_head = blockIdx.x, sequence = blockIdx.y;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int stream = warp * AT_ONCE + lane / LANES, slice = lane % LANES * PER_16_BYTES;
    const int context = context_lens[sequence];
    const int* table = block_tables + static_cast<i64>(sequence) * table_stride;

    float q[GROUP][SLICE], acc[GROUP][SLICE] = {}, m[GROUP], l[GROUP] = {};
#pragma unroll
    for (int h = 0; h < GROUP; ++h) {
        const T* q_row = query + sequence * query_stride + (kv_head * GROUP + h) * HEAD_DIM + slice;
        m[h] = minus_infinity();
#pragma unroll
        for (int v = 0; v < VECTORS; ++v) {
            float x[PER_16_BYTES];
            unpack(load16(q_row + v * LANES * PER_16_BYTES), x, T{});
#pragma unroll
            for (int i = 0; i < PER_16_BYTES; ++i) q[h][v * PER_16_BYTES + i] = x[i] * scale * LOG2_E;
        }
    }

    for (int first = warp * AT_ONCE; first < context; first += UNROLL * STREAMS) {
        uint4 k_raw[UNROLL][VECTORS], v_raw[UNROLL][VECTORS];
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
            const int token = first + u * STREAMS + lane / LANES;
            const bool valid = token < context;
            const T* k = kv;
            if (valid) k = key_row(kv, block_stride, table[token / BLOCK_SIZE], kv_head, token % BLOCK_SIZE) + slice;
#pragma unroll
            for (int v = 0; v < VECTORS; ++v) {
                const T* piece = k + v * LANES * PER_16_BYTES;
                k_raw[u][v] = valid ? load16(piece) : make_uint4(0, 0, 0, 0);
                v_raw[u][v] = valid ? load16(piece + value_offset(kv_heads)) : make_uint4(0, 0, 0, 0);
            }
        }
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
            const bool valid = first + u * STREAMS + lane / LANES < context;
            float x[SLICE], score[GROUP] = {};
#pragma unroll
            for (int v = 0; v < VECTORS; ++v)
                unpack(k_raw[u][v], reinterpret_cast<float(&)[PER_16_BYTES]>(x[v * PER_16_BYTES]), T{});
#pragma unroll
            for (int h = 0; h < GROUP; ++h) {
#pragma unroll
                for (int i = 0; i < SLICE; ++i) score[h] += q[h][i] * x[i];
                score[h] = group_sum<LANES>(score[h]);
            }
#pragma unroll
            for (int v = 0; v < VECTORS; ++v)
                unpack(v_raw[u][v], reinterpret_cast<float(&)[PER_16_BYTES]>(x[v * PER_16_BYTES]), T{});
#pragma unroll
            for (int h = 0; h < GROUP; ++h) {
                const float factor = rescale(m[h], valid ? score[h] : minus_infinity());
                const float p = valid ? exp2_fast(score[h] - m[h]) : 0.0f;
                l[h] = l[h] * factor + p;
#pragma unroll
                for (int i = 0; i < SLICE; ++i) acc[h][i] = acc[h][i] * factor + p * x[i];
            }
        }
    }

#pragma unroll
    for (int h = 0; h < GROUP; ++h)
        if (lane % LANES == 0) maxima[h][stream] = m[h], sums[h][stream] = l[h];
#pragma unroll
    for (int h = 0; h < GROUP; ++h) {  // one head after the other through the same shared memory
        __syncthreads();
#pragma unroll
        for (int v = 0; v < VECTORS; ++v)
#pragma unroll
            for (int i = 0; i < PER_16_BYTES; ++i)
                outputs[stream][v * LANES * PER_16_BYTES + slice + i] = acc[h][v * PER_16_BYTES + i];
        __syncthreads();
        float largest = minus_infinity();
        for (int s = 0; s < STREAMS; ++s) largest = fmaxf(largest, maxima[h][s]);
        for (int d = threadIdx.x; d < HEAD_DIM; d += WARPS * 32) {
            float total = 0, sum = 0;
            for (int s = 0; s < STREAMS; ++s) {
                if (sums[h][s] == 0) continue;
                const float weight = exp2_fast(maxima[h][s] - largest);
                total += weight * outputs[s][d], sum += weight * sums[h][s];
            }
            const i64 row = static_cast<i64>(sequence) * gridDim.x * GROUP + kv_head * GROUP + h;
            assign(out[row * HEAD_DIM + d], sum > 0 ? total / sum : 0.0f);
        }
    }
}
