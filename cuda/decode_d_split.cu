// Rung (d): split-KV with the work divided evenly over the multiprocessors, and asynchronous copies in stages.
// The arithmetic is rung (c)'s. What changes is where the data comes from and who does what (split_kv.h):
//
//   - every block gets the same number of tiles, so a small batch fills the GPU and a long sequence among short ones
//     delays nobody;
//   - cp.async brings K and V to shared memory while earlier tiles are worked on. Registers hold only what is being
//     computed, so STAGES - 1 tiles a warp are always on their way. Each warp has its own stages: no block barrier
//     in the loop.
#include "split_kv.h"

constexpr int SLICE = VECTORS * PER_16_BYTES;

// out: [sequences, heads, HEAD_DIM]; grid: as many blocks as the GPU holds at once; WARPS * 32 threads; dynamic
// shared memory WARPS * STAGES * STAGE_ROWS * HEAD_DIM elements. Workspace: see Batch.
extern "C" __global__ void __launch_bounds__(WARPS * 32)
paged_decode_split(T* out, const T* query, i64 query_stride, const T* kv, i64 block_stride, const int* block_tables,
                   int table_stride, const int* context_lens, int kv_heads, float scale, int sequences, float* partial,
                   float2* partial_sums, int* counters) {
    extern __shared__ __align__(128) T stages[];
    const Batch batch{out, query, query_stride, kv, block_stride, block_tables, table_stride, context_lens,
                      sequences, kv_heads, partial, partial_sums, counters};
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    T* mine = stages + warp * STAGES * STAGE_ROWS * HEAD_DIM;

    prefetch_tables(batch);
    begin_dependents();
    wait_for_previous();
    const Share share = plan(batch);
    const int tiles = share.end - share.begin;
    Cursor loading = share.start, at = share.start;
    Loader loader;

    float q[GROUP][SLICE], acc[GROUP][SLICE], m[GROUP], l[GROUP];
    // The first STAGES - 1 turns only load. (One place that loads keeps the code short: it, too, comes from memory.)
#pragma unroll 1
    for (int turn = 0; turn < tiles + STAGES - 1; ++turn) {
        const int i = turn - (STAGES - 1);
        if (i >= 0) async_wait<STAGES - 2>();
        __syncwarp();  // the tile is there for all lanes, and all have finished with the one before
        if (turn < tiles) {
            loader.load(batch, loading, mine + turn % STAGES * STAGE_ROWS * HEAD_DIM, turn == 0 || loading.tile == 0);
            loading.next(batch);
        }
        async_commit();  // also when empty: the wait counts groups
        if (i < 0) continue;
        T* stage = mine + i % STAGES * STAGE_ROWS * HEAD_DIM;

        if (i == 0 || at.tile == 0) {
#pragma unroll
            for (int h = 0; h < GROUP; ++h) {
                m[h] = minus_infinity(), l[h] = 0;
#pragma unroll
                for (int v = 0; v < VECTORS; ++v) {
                    float x[PER_16_BYTES];
                    unpack(load16(piece_at(stage, 2 * WARP_TOKENS + h, v * LANES + lane % LANES)), x, T{});
#pragma unroll
                    for (int e = 0; e < PER_16_BYTES; ++e) {
                        q[h][v * PER_16_BYTES + e] = x[e] * scale * LOG2_E;
                        acc[h][v * PER_16_BYTES + e] = 0;
                    }
                }
            }
        }

        const int token = at.tile * TILE + warp * WARP_TOKENS;
#pragma unroll 2
        for (int r = 0; r < WARP_TOKENS && token + r < at.context; r += AT_ONCE) {
            const int row = r + lane / LANES;
            const bool valid = token + row < at.context;
            float x[SLICE], score[GROUP] = {};
#pragma unroll
            for (int v = 0; v < VECTORS; ++v)
                unpack(load16(piece_at(stage, row, v * LANES + lane % LANES)),
                       reinterpret_cast<float(&)[PER_16_BYTES]>(x[v * PER_16_BYTES]), T{});
#pragma unroll
            for (int h = 0; h < GROUP; ++h) {
#pragma unroll
                for (int e = 0; e < SLICE; ++e) score[h] += q[h][e] * x[e];
                score[h] = group_sum<LANES>(score[h]);
            }
#pragma unroll
            for (int v = 0; v < VECTORS; ++v)
                unpack(load16(piece_at(stage, WARP_TOKENS + row, v * LANES + lane % LANES)),
                       reinterpret_cast<float(&)[PER_16_BYTES]>(x[v * PER_16_BYTES]), T{});
#pragma unroll
            for (int h = 0; h < GROUP; ++h) {
                const float factor = rescale(m[h], valid ? score[h] : minus_infinity());
                const float p = valid ? exp2_fast(score[h] - m[h]) : 0.0f;
                l[h] = l[h] * factor + p;
#pragma unroll
                for (int e = 0; e < SLICE; ++e) acc[h][e] = acc[h][e] * factor + p * x[e];
            }
        }

        if (i + 1 == tiles || at.tile + 1 == at.tiles) {
            // The item ends here, or this block's share of it: join the warp's AT_ONCE streams, then the warps.
            const Slot part{reinterpret_cast<float*>(stage)};
            __syncwarp();
#pragma unroll
            for (int h = 0; h < GROUP; ++h) {
                float largest = m[h];
#pragma unroll
                for (int step = LANES; step < 32; step *= 2)
                    largest = fmaxf(largest, __shfl_xor_sync(FULL_WARP, largest, step));
                const float weight = m[h] == minus_infinity() ? 0.0f : exp2_fast(m[h] - largest);
                float sum = l[h] * weight;
#pragma unroll
                for (int step = LANES; step < 32; step *= 2) sum += __shfl_xor_sync(FULL_WARP, sum, step);
#pragma unroll
                for (int e = 0; e < SLICE; ++e) {
                    float x = acc[h][e] * weight;
#pragma unroll
                    for (int step = LANES; step < 32; step *= 2) x += __shfl_xor_sync(FULL_WARP, x, step);
                    const int piece = e / PER_16_BYTES * LANES + lane % LANES;
                    if (lane < LANES) part.row(h)[piece * PER_16_BYTES + e % PER_16_BYTES] = x;
                }
                if (lane == 0) part.maximum(h) = largest, part.sum(h) = sum;
            }
            finish_item(batch, share, at, share.begin + i,
                        reinterpret_cast<float*>(stages + i % STAGES * STAGE_ROWS * HEAD_DIM),
                        STAGES * STAGE_ROWS * HEAD_DIM * static_cast<int>(sizeof(T)) / 4);
        }
        at.next(batch);
    }
    clear_empty(batch);
}
