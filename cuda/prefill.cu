// Attention of many query tokens a sequence over all of its past, straight from pages: whole prompts, chunks of them,
// prompts that continue a cached prefix. The method is FlashAttention-2's (Dao 2023): a tile of queries stays in
// registers, K and V come by in tiles of KEYS tokens through shared memory, softmax goes along online.
//
// Two things are different from the textbook:
//   - the rows of a tile are (token, head of the group) pairs: TOKENS tokens times GROUP heads that share K and V. So
//     K and V travel once per group, and a short chunk still fills the rows;
//   - K and V are found through the block table, one lookup per row copied.
//
// Here the queries are many, so they are the 16-row side (A) of mma.m16n8k16 and K is the 8-column side (B); rung (e)
// of the decode ladder has it the other way round.
#include "paged.h"

#ifndef WARPS
#define WARPS 4
#endif
#ifndef KEYS
#define KEYS 64
#endif

static_assert(sizeof(T) == 2, "tensor cores take 16-bit elements here");
constexpr int ROWS = WARPS * 16;
constexpr int TOKENS = ROWS / GROUP;  // rows past TOKENS * GROUP are idle
constexpr int PIECES = HEAD_DIM / PER_16_BYTES;
constexpr int STEPS = HEAD_DIM / 16;
constexpr int COLUMNS = KEYS / 8;
constexpr bool KEEP_QUERIES = HEAD_DIM <= 128;  // in registers; else they are read from shared memory each time
constexpr int THREADS = WARPS * 32;

DEVICE T* piece_at(T* tile, int row, int piece) {  // permuted by the row: no bank conflicts for fragments
    return tile + row * HEAD_DIM + (piece ^ (row & 7)) * PER_16_BYTES;
}

DEVICE void load_rows(T* tile, const T* kv, i64 block_stride, const int* table, int kv_head, int first, int context) {
#pragma unroll
    for (int i = threadIdx.x; i < KEYS * PIECES; i += THREADS) {
        const int row = i / PIECES, piece = i % PIECES, token = first + row;
        const bool valid = token < context;
        const int block = valid ? table[token / BLOCK_SIZE] : 0;
        async_copy16(piece_at(tile, row, piece),
                     key_row(kv, block_stride, block, kv_head, token % BLOCK_SIZE) + piece * PER_16_BYTES, valid);
    }
}

// out: [tokens, heads, HEAD_DIM]; query: the same shape, rows `query_stride` apart; sequence s owns the rows
// query_start[s] … query_start[s + 1], its last tokens. grid (tiles of the longest query, kv_heads, sequences);
// dynamic shared memory: (ROWS + 4 * KEYS) * HEAD_DIM elements.
extern "C" __global__ void __launch_bounds__(THREADS)
paged_prefill(T* out, const T* query, i64 query_stride, const T* kv, i64 block_stride, const int* block_tables,
              int table_stride, const int* context_lens, const int* query_start, int kv_heads, float scale) {
    extern __shared__ __align__(128) T shared[];
    begin_dependents();
    wait_for_previous();
    T* queries = shared;
    T* keys = shared + ROWS * HEAD_DIM;       // two tiles, one being read while the other is filled
    T* values = keys + 2 * KEYS * HEAD_DIM;   // likewise
    constexpr int BUFFER = KEYS * HEAD_DIM;

    const int kv_head = blockIdx.y, sequence = blockIdx.z;
    const int begin = query_start[sequence], length = query_start[sequence + 1] - begin;
    const int tile = (length + TOKENS - 1) / TOKENS - 1 - static_cast<int>(blockIdx.x);  // the longest first
    if (tile < 0) return;
    if (context_lens[sequence] == 0) return;  // a sequence that another kernel serves, or padding
    const int context = context_lens[sequence], past = context - length;
    const int first_token = tile * TOKENS, end = min(context, past + first_token + TOKENS);  // keys that anyone sees
    const int* table = block_tables + static_cast<i64>(sequence) * table_stride;
    const T* v_base = kv + value_offset(kv_heads);
    const int heads = kv_heads * GROUP;

    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    for (int i = threadIdx.x; i < ROWS * PIECES; i += THREADS) {
        const int row = i / PIECES, piece = i % PIECES, token = first_token + row / GROUP;
        const bool valid = row < TOKENS * GROUP && token < length;
        const T* from = query + (begin + (valid ? token : 0)) * query_stride + (kv_head * GROUP + row % GROUP) * HEAD_DIM;
        async_copy16(piece_at(queries, row, piece), from + piece * PER_16_BYTES, valid);
    }
    load_rows(keys, kv, block_stride, table, kv_head, 0, end);
    async_commit();
    load_rows(values, v_base, block_stride, table, kv_head, 0, end);
    async_commit();

    u32 q[KEEP_QUERIES ? STEPS : 1][4];
    float acc[2 * STEPS][4] = {}, m[2] = {minus_infinity(), minus_infinity()}, l[2] = {0, 0};
    // The position of this lane's two rows (g and g + 8 of the warp's 16): keys after it are not theirs to see.
    const int row = warp * 16 + g;
    const int position[2] = {past + first_token + row / GROUP, past + first_token + (row + 8) / GROUP};

    const int turns = (end + KEYS - 1) / KEYS;
    for (int i = 0; i < turns; ++i) {
        async_wait<1>();  // K of this turn
        __syncthreads();
        if (i + 1 < turns) load_rows(keys + (i + 1) % 2 * BUFFER, kv, block_stride, table, kv_head, (i + 1) * KEYS, end);
        async_commit();
        if (KEEP_QUERIES && i == 0)
#pragma unroll
            for (int s = 0; s < STEPS; ++s)
                load_matrices(q[KEEP_QUERIES ? s : 0], piece_at(queries, warp * 16 + lane % 16, 2 * s + lane / 16));

        float score[COLUMNS][4] = {};
#pragma unroll
        for (int s = 0; s < STEPS; ++s) {
            u32(&a)[4] = q[KEEP_QUERIES ? s : 0];
            if (!KEEP_QUERIES) load_matrices(a, piece_at(queries, warp * 16 + lane % 16, 2 * s + lane / 16));
#pragma unroll
            for (int c = 0; c < COLUMNS; c += 2) {
                u32 k[4];  // tokens 8c … 8c + 15 by dims 16s … 16s + 15
                load_matrices(k, piece_at(keys + i % 2 * BUFFER, 8 * c + lane % 8 + lane / 16 * 8, 2 * s + lane / 8 % 2));
                mma_16x8x16(score[c], a, k[0], k[1], T{});
                mma_16x8x16(score[c + 1], a, k[2], k[3], T{});
            }
        }

        const bool all_visible = (i + 1) * KEYS <= past + first_token + 1;  // not so in the last turns only
        float seen[2] = {minus_infinity(), minus_infinity()};
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int key = i * KEYS + 8 * c + 2 * t + e % 2;
                score[c][e] = all_visible || key <= position[e / 2] ? score[c][e] * (scale * LOG2_E) : minus_infinity();
                seen[e / 2] = fmaxf(seen[e / 2], score[c][e]);
            }
        float factor[2], base[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            seen[r] = fmaxf(seen[r], __shfl_xor_sync(FULL_WARP, seen[r], 1));
            seen[r] = fmaxf(seen[r], __shfl_xor_sync(FULL_WARP, seen[r], 2));
            factor[r] = rescale(m[r], seen[r]);
            base[r] = m[r] == minus_infinity() ? 0.0f : m[r];
            l[r] *= factor[r];
        }
#pragma unroll
        for (int d = 0; d < 2 * STEPS; ++d)
#pragma unroll
            for (int e = 0; e < 4; ++e) acc[d][e] *= factor[e / 2];
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                score[c][e] = exp2_fast(score[c][e] - base[e / 2]);
                l[e / 2] += score[c][e];
            }

        async_wait<1>();  // V of this turn
        __syncthreads();
        if (i + 1 < turns) load_rows(values + (i + 1) % 2 * BUFFER, v_base, block_stride, table, kv_head, (i + 1) * KEYS, end);
        async_commit();
#pragma unroll
        for (int c = 0; c < COLUMNS; c += 2) {  // D fragments of the scores are A fragments of the next product
            const u32 p[4] = {pack2(score[c][0], score[c][1], T{}), pack2(score[c][2], score[c][3], T{}),
                              pack2(score[c + 1][0], score[c + 1][1], T{}), pack2(score[c + 1][2], score[c + 1][3], T{})};
#pragma unroll
            for (int d = 0; d < STEPS; ++d) {
                u32 v[4];
                load_matrices_transposed(v, piece_at(values + i % 2 * BUFFER, 8 * c + lane % 16, 2 * d + lane / 16));
                mma_16x8x16(acc[2 * d], p, v[0], v[1], T{});
                mma_16x8x16(acc[2 * d + 1], p, v[2], v[3], T{});
            }
        }
    }

#pragma unroll
    for (int r = 0; r < 2; ++r) {
        l[r] += __shfl_xor_sync(FULL_WARP, l[r], 1);
        l[r] += __shfl_xor_sync(FULL_WARP, l[r], 2);
        const int mine = row + 8 * r, token = first_token + mine / GROUP;
        if (mine >= TOKENS * GROUP || token >= length) continue;
        T* to = out + (static_cast<i64>(begin + token) * heads + kv_head * GROUP + mine % GROUP) * HEAD_DIM + 2 * t;
#pragma unroll
        for (int d = 0; d < 2 * STEPS; ++d)
            *reinterpret_cast<u32*>(to + 8 * d) = pack2(acc[d][2 * r] / l[r], acc[d][2 * r + 1] / l[r], T{});
    }
}
