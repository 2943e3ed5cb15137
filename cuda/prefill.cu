// Attention of many query tokens a sequence over all of its past, straight from pages: whole prompts, chunks of them,
// prompts that continue a cached prefix. The method is FlashAttention-2's (Dao 2023): a tile of queries stays in
// registers, K and V come by in tiles of KEYS tokens through shared memory, softmax goes along online.
//
// Three things are different from the textbook:
//   - the rows of a tile are (token, head of the group) pairs: TOKENS tokens times GROUP heads that share K and V. So
//     K and V travel once per group, and a short chunk still fills the rows;
//   - K and V are found through the block table, one lookup per row copied;
//   - a short chunk after a long past has few tiles and a long way to go with each. Its keys are cut into parts that
//     different blocks work on, as many as let the GPU finish first (`divide`); the block that comes last joins them.
//     All of it is computed on the device, so that one captured graph serves all lengths.
//
// Here the queries are many, so they are the 16-row side (A) of mma.m16n8k16 and K is the 8-column side (B); rung (e)
// of the decode ladder has it the other way round.
#include "join.h"
#include "paged.h"

#ifndef WARPS
#define WARPS 4
#endif
#ifndef KEYS
#define KEYS 64
#endif
#ifndef OVERHEAD
#define OVERHEAD 4  // what a part costs beside its turns, in turns
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

struct Chunk {  // what a sequence has to do in this launch
    int begin, length, context;

    DEVICE_METHOD int past() const { return context - length; }
    DEVICE_METHOD int tiles() const { return (length + TOKENS - 1) / TOKENS; }
    DEVICE_METHOD int end_of(int tile) const { return min(context, past() + (tile + 1) * TOKENS); }  // of its keys
    DEVICE_METHOD int turns() const { return (context + KEYS - 1) / KEYS; }  // of its last tile
    // A prompt's tiles differ too much in length for parts to be even, and are many when that would matter.
    DEVICE_METHOD bool divisible() const { return past() >= length; }
    DEVICE_METHOD int parts(int most_turns) const {
        return divisible() ? (turns() + most_turns - 1) / most_turns : 1;
    }
};

struct Batch {  // the kernel's parameters, in one place
    T* out;
    const T* query;
    i64 query_stride;
    const T* kv;
    i64 block_stride;
    const int* block_tables;
    int table_stride;
    const int *context_lens, *query_start;
    int sequences, kv_heads;
    float scale;
    float* partial;        // [places][ROWS][HEAD_DIM]
    float2* partial_sums;  // [places][ROWS]: (maximum, sum)
    int* counters;         // [places + 1], zero before and after; the last one counts the parts handed out
    int places;            // no division into more parts than this

    DEVICE_METHOD Chunk chunk(int s) const {  // empty for padding and for sequences that another kernel serves
        if (s < 0 || s >= sequences || context_lens[s] == 0) return {0, 0, 0};
        return {query_start[s], query_start[s + 1] - query_start[s], context_lens[s]};
    }
};

DEVICE Chunk chunk_of_lane(const Chunk& chunk, int lane) {
    return {__shfl_sync(FULL_WARP, chunk.begin, lane), __shfl_sync(FULL_WARP, chunk.length, lane),
            __shfl_sync(FULL_WARP, chunk.context, lane)};
}

struct Division {
    int turns, parts;  // the most turns of a part; parts of the whole batch
};

// Every warp computes the same: each lane tries one number of parts for the longest sequence, and what it would take.
// Parts go round in waves as long as the longest part; joining asks for the parts one after the other.
DEVICE Division divide(const Batch& batch) {
    const int lane = threadIdx.x % 32, slots = gridDim.x;
    int longest = 1;
    for (int s = lane; s < batch.sequences; s += 32) {
        const Chunk chunk = batch.chunk(s);
        if (chunk.divisible()) longest = max(longest, chunk.turns());
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) longest = max(longest, __shfl_xor_sync(FULL_WARP, longest, step));
    const int tried = lane + 1 + lane * lane * slots / (1024 * batch.kv_heads);  // up to one for each slot
    const int turns = (longest + tried - 1) / tried;

    int count = 0, most_turns = 1, most_parts = 1;
    float work = 0;
    for (int base = 0; base < batch.sequences; base += 32) {
        const Chunk mine = batch.chunk(base + lane);
        for (u32 left = __ballot_sync(FULL_WARP, mine.length > 0); left; left &= left - 1) {
            const Chunk chunk = chunk_of_lane(mine, __ffs(static_cast<int>(left)) - 1);
            const int parts = chunk.parts(turns), each = (chunk.turns() + parts - 1) / parts;
            const int of_chunk = batch.kv_heads * chunk.tiles() * parts;
            count += of_chunk;
            work += static_cast<float>(of_chunk) * (each + OVERHEAD);
            most_turns = max(most_turns, each), most_parts = max(most_parts, parts);
        }
    }
    const float wave = most_turns + OVERHEAD;
    const bool allowed = lane == 0 || count <= batch.places;
    const float cost = allowed ? ceilf(work / (slots * wave)) * wave + 0.25f * most_parts : -minus_infinity();
    float least = cost;
#pragma unroll
    for (int step = 16; step > 0; step /= 2) least = fminf(least, __shfl_xor_sync(FULL_WARP, least, step));
    const int best = __ffs(static_cast<int>(__ballot_sync(FULL_WARP, cost == least))) - 1;
    return {__shfl_sync(FULL_WARP, turns, best), __shfl_sync(FULL_WARP, count, best)};
}

struct Job {
    Chunk chunk;
    int sequence, kv_head, tile, part, parts, number;
};

// The part of that number: last sequence first, in it the longest tile first.
DEVICE Job find(const Batch& batch, int most_turns, int number) {
    const int lane = threadIdx.x % 32;
    int before = 0;
    for (int base = 0;; base += 32) {
        const Chunk mine = batch.chunk(batch.sequences - 1 - base - lane);
        const int count = batch.kv_heads * mine.tiles() * mine.parts(most_turns);
        int upto = count;
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
            const int left = __shfl_up_sync(FULL_WARP, upto, step);
            if (lane >= step) upto += left;
        }
        const u32 beyond = __ballot_sync(FULL_WARP, before + upto > number);
        if (beyond) {
            const int found = __ffs(static_cast<int>(beyond)) - 1;
            const Chunk chunk = chunk_of_lane(mine, found);
            const int parts = chunk.parts(most_turns);
            const int into = number - before - __shfl_sync(FULL_WARP, upto - count, found);
            const int item = into / parts;
            return {chunk, batch.sequences - 1 - base - found, item % batch.kv_heads,
                    chunk.tiles() - 1 - item / batch.kv_heads, into % parts, parts, number};
        }
        before += __shfl_sync(FULL_WARP, upto, 31);
    }
}

// The rows of a tile that are in use: (token, head) pairs.
DEVICE int rows_of(const Job& job) { return min(TOKENS, job.chunk.length - job.tile * TOKENS) * GROUP; }

DEVICE T* output_of(const Batch& batch, const Job& job, int row) {
    const int token = job.chunk.begin + job.tile * TOKENS + row / GROUP, head = job.kv_head * GROUP + row % GROUP;
    return batch.out + (static_cast<i64>(token) * batch.kv_heads * GROUP + head) * HEAD_DIM;
}

// This block has written a part. Whoever comes last adds them all up, in the order of the keys.
DEVICE void join_parts(const Batch& batch, const Job& job) {
    __shared__ int arrived;
    __syncthreads();  // the part is complete
    const int first = job.number - job.part;
    if (threadIdx.x == 0) arrived = count_in(batch.counters + first) + 1;
    __syncthreads();
    if (arrived != job.parts) return;
    if (threadIdx.x == 0) atomicExch(batch.counters + first, 0);  // ready for the next launch

    constexpr int AT_ONCE = 8;  // parts asked for at a time: the loads are long, the arithmetic is nothing
    const int rows = rows_of(job);
    for (int i = threadIdx.x * 4; i < rows * HEAD_DIM; i += THREADS * 4) {
        const int row = i / HEAD_DIM;
        Part total = empty_part();
#pragma unroll 1
        for (int p = 0; p < job.parts; p += AT_ONCE) {
            Part part[AT_ONCE + 1];
            part[AT_ONCE] = total;
#pragma unroll
            for (int c = 0; c < AT_ONCE; ++c) {
                part[c] = empty_part();
                if (p + c >= job.parts) continue;
                const i64 place = static_cast<i64>(first + p + c) * ROWS;
                const float2 sums = load_of_others(batch.partial_sums + place + row);
                part[c].m = sums.x, part[c].l = sums.y;
                part[c].o = load_of_others(reinterpret_cast<const float4*>(batch.partial + place * HEAD_DIM + i));
            }
            total = join(part);
        }
        const float by = 1.0f / total.l;
        store4(output_of(batch, job, row) + i % HEAD_DIM, total.o.x * by, total.o.y * by, total.o.z * by, total.o.w * by);
    }
}

// SPARE: some warps have no rows. Asking that in the loop costs full tiles 6 %, so they have a copy of the loop.
template <bool SPARE>
DEVICE void attend(const Batch& batch, const Job& job, T* shared) {
    T* queries = shared;
    T* keys = shared + ROWS * HEAD_DIM;       // two tiles, one being read while the other is filled
    T* values = keys + 2 * KEYS * HEAD_DIM;   // likewise
    constexpr int BUFFER = KEYS * HEAD_DIM;

    const int past = job.chunk.past(), first_token = job.tile * TOKENS, rows = rows_of(job);
    const int end = job.chunk.end_of(job.tile);  // of the keys that anyone sees
    const int turns = (end + KEYS - 1) / KEYS;
    const int first = turns * job.part / job.parts, last = turns * (job.part + 1) / job.parts;
    const int* table = batch.block_tables + static_cast<i64>(job.sequence) * batch.table_stride;
    const T* v_base = batch.kv + value_offset(batch.kv_heads);
    const i64 block_stride = batch.block_stride;

    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    for (int i = threadIdx.x; i < ROWS * PIECES; i += THREADS) {
        const int row = i / PIECES, piece = i % PIECES, token = job.chunk.begin + first_token + row / GROUP;
        const bool valid = row < rows;
        const T* from = batch.query + (valid ? token : 0) * batch.query_stride + (job.kv_head * GROUP + row % GROUP) * HEAD_DIM;
        async_copy16(piece_at(queries, row, piece), from + piece * PER_16_BYTES, valid);
    }
    load_rows(keys + first % 2 * BUFFER, batch.kv, block_stride, table, job.kv_head, first * KEYS, end);
    async_commit();
    load_rows(values + first % 2 * BUFFER, v_base, block_stride, table, job.kv_head, first * KEYS, end);
    async_commit();

    u32 q[KEEP_QUERIES ? STEPS : 1][4];
    float acc[2 * STEPS][4] = {}, m[2] = {minus_infinity(), minus_infinity()}, l[2] = {0, 0};
    // The position of this lane's two rows (g and g + 8 of the warp's 16): keys after it are not theirs to see.
    const int row = warp * 16 + g;
    const bool busy = !SPARE || warp * 16 < rows;  // the others only copy
    const int position[2] = {past + first_token + row / GROUP, past + first_token + (row + 8) / GROUP};
    for (int i = first; i < last; ++i) {
        async_wait<1>();  // K of this turn
        __syncthreads();
        if (i + 1 < last) load_rows(keys + (i + 1) % 2 * BUFFER, batch.kv, block_stride, table, job.kv_head, (i + 1) * KEYS, end);
        async_commit();
        float score[COLUMNS][4] = {};
        if (busy) {
            if (KEEP_QUERIES && i == first)
#pragma unroll
                for (int s = 0; s < STEPS; ++s)
                    load_matrices(q[KEEP_QUERIES ? s : 0], piece_at(queries, warp * 16 + lane % 16, 2 * s + lane / 16));

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
                    score[c][e] = all_visible || key <= position[e / 2] ? score[c][e] * (batch.scale * LOG2_E) : minus_infinity();
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
        }

        async_wait<1>();  // V of this turn
        __syncthreads();
        if (i + 1 < last) load_rows(values + (i + 1) % 2 * BUFFER, v_base, block_stride, table, job.kv_head, (i + 1) * KEYS, end);
        async_commit();
        if (busy) {
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
    }

    async_wait<0>();  // also where there was no turn

#pragma unroll
    for (int r = 0; r < 2; ++r) {
        l[r] += __shfl_xor_sync(FULL_WARP, l[r], 1);
        l[r] += __shfl_xor_sync(FULL_WARP, l[r], 2);
        const int mine = row + 8 * r;
        if (mine >= rows) continue;
        if (job.parts == 1) {
            T* to = output_of(batch, job, mine) + 2 * t;
#pragma unroll
            for (int d = 0; d < 2 * STEPS; ++d)
                *reinterpret_cast<u32*>(to + 8 * d) = pack2(acc[d][2 * r] / l[r], acc[d][2 * r + 1] / l[r], T{});
        } else {
            const i64 place = static_cast<i64>(job.number) * ROWS + mine;
            float* to = batch.partial + place * HEAD_DIM + 2 * t;
#pragma unroll
            for (int d = 0; d < 2 * STEPS; ++d)
                *reinterpret_cast<float2*>(to + 8 * d) = make_float2(acc[d][2 * r], acc[d][2 * r + 1]);
            if (t == 0) batch.partial_sums[place] = make_float2(m[r], l[r]);
        }
    }
    if (job.parts > 1) join_parts(batch, job);
}

// out: [tokens, heads, HEAD_DIM]; query: the same shape, rows `query_stride` apart; sequence s owns the rows
// query_start[s] … query_start[s + 1], its last tokens; one of context 0 is left alone. The grid is what the GPU holds
// at once: its blocks take parts until none is left. Dynamic shared memory: (ROWS + 4 * KEYS) * HEAD_DIM elements.
extern "C" __global__ void __launch_bounds__(THREADS, HEAD_DIM == 128 ? 1 : 2)
paged_prefill(T* out, const T* query, i64 query_stride, const T* kv, i64 block_stride, const int* block_tables,
              int table_stride, const int* context_lens, const int* query_start, int kv_heads, float scale,
              int sequences, float* partial, float2* partial_sums, int* counters, int places) {
    extern __shared__ __align__(128) T shared[];
    __shared__ int following[2];  // in turn, so that no thread finds the next one's in its place
    begin_dependents();
    wait_for_previous();
    const Batch batch{out, query, query_stride, kv, block_stride, block_tables, table_stride, context_lens, query_start,
                      sequences, kv_heads, scale, partial, partial_sums, counters, places};
    const Division division = divide(batch);
    int round = 0;
    for (int number = blockIdx.x; number < division.parts; number = following[round ^= 1]) {
        if (threadIdx.x == 0) {  // known early, so that nobody waits for it
            const int taken = atomicAdd(counters + places, 1);
            following[round ^ 1] = gridDim.x + taken;
            if (taken == division.parts - 1) atomicExch(counters + places, 0);  // nobody asks again in this launch
        }
        const Job job = find(batch, division.turns, number);
        rows_of(job) > ROWS - 16 ? attend<false>(batch, job, shared) : attend<true>(batch, job, shared);
        __syncthreads();
    }
}
