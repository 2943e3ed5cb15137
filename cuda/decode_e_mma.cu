// Rung (e): tensor cores for the group. Division, copies and joining are rung (d)'s; the products change.
//
// One query against K is a matrix times a vector, which tensor cores can't speed up. The GROUP queries of one KV head
// make a matrix, though a thin one. mma.m16n8k16 multiplies 16x16 by 16x8; giving the *tokens* the 16 rows and the
// queries the 8 columns wastes the least:
//
//     scores^T [16 tokens x 8 queries]  = K   [16 tokens x 16 dims]  * Q^T [16 dims x 8 queries]     HEAD_DIM / 16 times
//     output^T [16 dims x 8 queries]   += V^T [16 dims x 16 tokens]  * P^T [16 tokens x 8 queries]   HEAD_DIM / 16 times
//
// Decode is bound by memory, so this doesn't make the products faster as much as it makes them *small*: the lanes
// stop converting, multiplying and shuffling (some 140 instructions a KB in rung (d)) and have time to ask for data.
//
// Columns beyond GROUP repeat its last query and are dropped at the end. P^T must enter as a B fragment but leaves the
// first product as a D fragment; the two differ by a transposition of 8x8 matrices, which movmatrix does.
#include "split_kv.h"

static_assert(sizeof(T) == 2, "tensor cores take 16-bit elements here; fp32 stays with rung (d)");
static_assert(GROUP <= 8, "a fragment has 8 columns for the queries");
static_assert(WARP_TOKENS % 16 == 0, "16 tokens are the rows of a fragment");
constexpr int STEPS = HEAD_DIM / 16;
constexpr int SUBTILES = WARP_TOKENS / 16;

// Same parameters, grid and shared memory as rung (d).
extern "C" __global__ void __launch_bounds__(WARPS * 32)
paged_decode_mma(T* out, const T* query, i64 query_stride, const T* kv, i64 block_stride, const int* block_tables,
                 int table_stride, const int* context_lens, int kv_heads, float scale, int sequences, float* partial,
                 float2* partial_sums, int* counters) {
    extern __shared__ __align__(128) T stages[];
    const Batch batch{out, query, query_stride, kv, block_stride, block_tables, table_stride, context_lens,
                      sequences, kv_heads, partial, partial_sums, counters};
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    T* mine = stages + warp * STAGES * STAGE_ROWS * HEAD_DIM;

    prefetch_tables(batch);
    begin_dependents();
    wait_for_previous();
    const Share share = plan(batch);
    const int tiles = share.end - share.begin;
    Cursor loading = share.start, at = share.start;
    Loader loader;

    u32 q[STEPS][2];        // Q^T as B fragments
    float acc[STEPS][4];    // output^T as D fragments: lane (g, t) has dims g and g + 8, queries 2t and 2t + 1
    float m[2], l[2];       // of queries 2t and 2t + 1; l only over this lane's tokens until the end
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
            m[0] = m[1] = minus_infinity(), l[0] = l[1] = 0;
#pragma unroll
            for (int s = 0; s < STEPS; s += 2) {  // rows: queries; four matrices: the 8-column pieces 2s … 2s + 3
                u32 r[4];
                load_matrices(r, piece_at(stage, 2 * WARP_TOKENS + min(lane % 8, GROUP - 1), 2 * s + lane / 8));
                q[s][0] = r[0], q[s][1] = r[1], q[s + 1][0] = r[2], q[s + 1][1] = r[3];
            }
#pragma unroll
            for (int s = 0; s < STEPS; ++s)
#pragma unroll
                for (int e = 0; e < 4; ++e) acc[s][e] = 0;
        }

        const int token = at.tile * TILE + warp * WARP_TOKENS;
        if (token < at.context) {
            float score[SUBTILES][2][4] = {};  // two sums each, so that consecutive products don't wait for each other
#pragma unroll
            for (int s = 0; s < STEPS; ++s)
#pragma unroll
                for (int u = 0; u < SUBTILES; ++u) {
                    u32 k[4];
                    load_matrices(k, piece_at(stage, 16 * u + lane % 16, 2 * s + lane / 16));
                    mma_16x8x16(score[u][s % 2], k, q[s][0], q[s][1], T{});
                }
            float seen[2] = {minus_infinity(), minus_infinity()};
#pragma unroll
            for (int u = 0; u < SUBTILES; ++u)
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const bool valid = token + 16 * u + g + e / 2 * 8 < at.context;
                    const float x = (score[u][0][e] + score[u][1][e]) * scale * LOG2_E;
                    score[u][0][e] = valid ? x : minus_infinity();
                    seen[e % 2] = fmaxf(seen[e % 2], score[u][0][e]);
                }
#pragma unroll
            for (int step = 4; step < 32; step *= 2) {
                seen[0] = fmaxf(seen[0], __shfl_xor_sync(FULL_WARP, seen[0], step));
                seen[1] = fmaxf(seen[1], __shfl_xor_sync(FULL_WARP, seen[1], step));
            }
            const float factor[2] = {rescale(m[0], seen[0]), rescale(m[1], seen[1])};
            l[0] *= factor[0], l[1] *= factor[1];
#pragma unroll
            for (int s = 0; s < STEPS; ++s)
#pragma unroll
                for (int e = 0; e < 4; ++e) acc[s][e] *= factor[e % 2];
#pragma unroll
            for (int u = 0; u < SUBTILES; ++u) {
                float p[4];
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    p[e] = exp2_fast(score[u][0][e] - m[e % 2]);
                    l[e % 2] += p[e];
                }
                const u32 p0 = transpose_matrix(pack2(p[0], p[1], T{})), p1 = transpose_matrix(pack2(p[2], p[3], T{}));
#pragma unroll
                for (int s = 0; s < STEPS; ++s) {
                    u32 v[4];  // V^T: transposed while loading
                    load_matrices_transposed(v, piece_at(stage, WARP_TOKENS + 16 * u + lane % 8 + lane / 16 * 8,
                                                         2 * s + lane / 8 % 2));
                    mma_16x8x16(acc[s], v, p0, p1, T{});
                }
            }
        }

        if (i + 1 == tiles || at.tile + 1 == at.tiles) {
            // The item ends here, or this block's share of it.
            const Slot part{reinterpret_cast<float*>(stage)};
#pragma unroll
            for (int step = 4; step < 32; step *= 2) {
                l[0] += __shfl_xor_sync(FULL_WARP, l[0], step);
                l[1] += __shfl_xor_sync(FULL_WARP, l[1], step);
            }
            __syncwarp();  // all lanes have read the stage that the part now overwrites
#pragma unroll
            for (int e = 0; e < 2; ++e)
                if (2 * t + e < GROUP) {
#pragma unroll
                    for (int s = 0; s < STEPS; ++s) {
                        part.row(2 * t + e)[16 * s + g] = acc[s][e];
                        part.row(2 * t + e)[16 * s + 8 + g] = acc[s][2 + e];
                    }
                    if (g == 0) part.maximum(2 * t + e) = m[e], part.sum(2 * t + e) = l[e];
                }
            finish_item(batch, share, at, share.begin + i,
                        reinterpret_cast<float*>(stages + i % STAGES * STAGE_ROWS * HEAD_DIM),
                        STAGES * STAGE_ROWS * HEAD_DIM * static_cast<int>(sizeof(T)) / 4);
        }
        at.next(batch);
    }
    clear_empty(batch);
}
