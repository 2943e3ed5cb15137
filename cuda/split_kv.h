// What rungs (d) and (e) share: how work is divided, how K and V get to shared memory, how parts are joined.
//
// Dividing. The batch is a list of items (sequence, KV head), each a row of tiles of TILE tokens. Laid end to
// end they are `total` tiles; each of B blocks takes total / B of them in a row, the first total % B blocks one
// more, wherever item borders fall. So all blocks get the same work, to one tile, for any mixture of lengths.
// (Work-centric partitioning: Osama et al., "Stream-K", PPoPP 2023; splitting a sequence: "Flash-Decoding", Dao
// et al. 2023.)
//
//        item 0        item 1   item 2                 item 3
//     |...............|......|...........................|.......|
//     |  block 0   |  block 1   |  block 2   |  block 3   | block 4 |
//
// The division is computed by every warp from context_lens on the device: the host need not know the lengths,
// so one captured CUDA graph serves every step.
//
// Joining. A block that holds all of an item writes the output. Otherwise it writes a partial (maximum, sum,
// output) to its own place in the workspace and counts itself in at the item's counter; the block that comes last
// joins the parts. No second kernel, no waiting. A block begins at most one split item that continues beyond it
// and ends at most one that began before it, so two places a block suffice whatever the batch.
#pragma once
#include "join.h"
#include "mapping.h"
#include "warp.h"

#ifndef WARPS
#define WARPS 4
#endif
#ifndef WARP_TOKENS
#define WARP_TOKENS 16
#endif
#ifndef STAGES
#define STAGES 3
#endif

constexpr int TILE = WARPS * WARP_TOKENS;
constexpr int TURNS = WARP_TOKENS * PIECES / 32;    // that a warp needs to copy a tile of K
constexpr int AT_ONCE = 32 / LANES;                 // rows that a warp works on at a time
constexpr int STAGE_ROWS = 2 * WARP_TOKENS + GROUP;  // K, V and, for the first tile of an item, the queries
constexpr int PADDED = HEAD_DIM + 4;                // keeps the joining's writes out of each other's banks
static_assert(GROUP * (PADDED + 2) * 4 <= STAGE_ROWS * HEAD_DIM * static_cast<int>(sizeof(T)), "parts fit in a stage");
static_assert(WARP_TOKENS % BLOCK_SIZE == 0 || BLOCK_SIZE % WARP_TOKENS == 0, "a step starts at a known offset");

struct Batch {  // the kernel's parameters, in one place
    T* out;
    const T* query;
    i64 query_stride;
    const T* kv;
    i64 block_stride;
    const int* block_tables;
    int table_stride;
    const int* context_lens;
    int sequences, kv_heads;
    float* partial;       // [2 * blocks][GROUP][HEAD_DIM]
    float2* partial_sums;  // [2 * blocks][GROUP]: (maximum, sum)
    int* counters;        // [sequences * kv_heads], zero before and after
};

DEVICE int tiles_of(int context) { return (context + TILE - 1) / TILE; }

struct Cursor {  // one tile: which item it belongs to and which of its tiles it is
    int sequence, kv_head, tile, tiles, context;

    DEVICE_METHOD void next(const Batch& batch) {
        if (++tile < tiles) return;
        tile = 0;
        if (++kv_head < batch.kv_heads) return;
        kv_head = 0;
        do {  // padding of a captured batch: sequences without context have no tiles
            ++sequence;
            context = sequence < batch.sequences ? batch.context_lens[sequence] : 1;
        } while (context == 0);
        tiles = tiles_of(context);
    }
};

struct Share {
    int each, longer;  // tiles of a block; how many blocks have one more
    int begin, end;
    Cursor start;

    DEVICE_METHOD int begin_of(int block) const { return block * each + min(block, longer); }
    DEVICE_METHOD int owner(int tile) const {  // the block whose share holds this tile
        const int in_longer = longer * (each + 1);
        return tile < in_longer ? tile / (each + 1) : longer + (tile - in_longer) / each;
    }
};

// The chain context lengths -> block ids -> K and V is three trips to memory, one after the other, before anything can
// be computed. While the first is under way, all blocks together pull the block tables into the L2 cache.
DEVICE void prefetch_tables(const Batch& batch) {
    constexpr int LINE = 128 / 4;
    const i64 entries = static_cast<i64>(batch.sequences) * batch.table_stride;
    const i64 mine = (static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x) * LINE;
    if (mine < entries && entries <= (1 << 18)) prefetch_l2(batch.block_tables + mine);
}

// Every warp computes its block's share; all lanes get the same.
DEVICE Share plan(const Batch& batch) {
    const int lane = threadIdx.x % 32;
    int sum = 0;
    for (int s = lane; s < batch.sequences; s += 32) sum += tiles_of(batch.context_lens[s]);
#pragma unroll
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(FULL_WARP, sum, step);  // of integers

    Share share{};
    const int total = sum * batch.kv_heads, block = blockIdx.x;
    share.each = total / gridDim.x, share.longer = total % gridDim.x;
    share.begin = share.begin_of(block), share.end = share.begin_of(block + 1);
    if (share.begin == share.end) return share;

    int before = 0;  // tiles of a head in the sequences already passed
    for (int base = 0;; base += 32) {
        const int context = base + lane < batch.sequences ? batch.context_lens[base + lane] : 0;
        const int tiles = tiles_of(context);
        int upto = tiles;
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
            const int left = __shfl_up_sync(FULL_WARP, upto, step);
            if (lane >= step) upto += left;
        }
        const u32 beyond = __ballot_sync(FULL_WARP, (before + upto) * batch.kv_heads > share.begin);
        if (beyond) {
            const int found = __ffs(static_cast<int>(beyond)) - 1;
            share.start.sequence = base + found;
            share.start.context = __shfl_sync(FULL_WARP, context, found);
            share.start.tiles = __shfl_sync(FULL_WARP, tiles, found);
            const int into = share.begin - (before + __shfl_sync(FULL_WARP, upto - tiles, found)) * batch.kv_heads;
            share.start.kv_head = into / share.start.tiles;
            share.start.tile = into % share.start.tiles;
            return share;
        }
        before += __shfl_sync(FULL_WARP, upto, 31);
    }
}

// Outputs of padding sequences are zeros.
DEVICE void clear_empty(const Batch& batch) {
    const int row = batch.kv_heads * GROUP * HEAD_DIM;
    for (int s = blockIdx.x; s < batch.sequences; s += gridDim.x)
        if (batch.context_lens[s] == 0)
            for (int i = threadIdx.x; i < row; i += blockDim.x) assign(batch.out[static_cast<i64>(s) * row + i], 0.0f);
}

// Row r of a stage begins at r * HEAD_DIM; its 16-byte pieces are permuted by the row, so that eight rows read at one
// column (tensor-core fragments are) come from eight different groups of banks.
DEVICE T* piece_at(T* stage, int row, int piece) {
    return stage + row * HEAD_DIM + (piece ^ (row & 7)) * PER_16_BYTES;
}

// Issues a warp's copies; remembers 32 block ids at a time, one a lane, and asks for the next 32 ahead of need.
struct Loader {
    int window, ids, next_ids;

    DEVICE_METHOD int ids_at(const Batch& batch, const Cursor& at, int which) const {
        const int index = which * 32 + threadIdx.x % 32;
        const int* table = batch.block_tables + static_cast<i64>(at.sequence) * batch.table_stride;
        return index * BLOCK_SIZE < at.context ? table[index] : 0;
    }

    // This warp's part of the tile: WARP_TOKENS rows of K, as many of V, zeros past the context.
    DEVICE_METHOD void load(const Batch& batch, const Cursor& at, T* stage, bool first_of_item) {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        const int token = at.tile * TILE + warp * WARP_TOKENS, block = token / BLOCK_SIZE;
        if (first_of_item || block / 32 != window) {
            const bool known = !first_of_item && block / 32 == window + 1;
            window = block / 32;
            ids = known ? next_ids : ids_at(batch, at, window);
            next_ids = ids_at(batch, at, window + 1);
        }
        const i64 to_values = value_offset(batch.kv_heads);
#pragma unroll
        for (int turn = 0; turn < TURNS; ++turn) {
            const Place place = place_of(lane, turn);
            const int id = __shfl_sync(FULL_WARP, ids, (block + place.row / BLOCK_SIZE) % 32);
            const int offset = (token % BLOCK_SIZE + place.row) % BLOCK_SIZE;
            const T* k = key_row(batch.kv, batch.block_stride, id, at.kv_head, offset) + place.piece * PER_16_BYTES;
            const bool valid = token + place.row < at.context;
            async_copy16(piece_at(stage, place.row, place.piece), k, valid);
            async_copy16(piece_at(stage, WARP_TOKENS + place.row, place.piece), k + to_values, valid);
        }
        if (!first_of_item) return;
        const T* q = batch.query + at.sequence * batch.query_stride + at.kv_head * GROUP * HEAD_DIM;
        for (int i = lane; i < GROUP * PIECES; i += 32)
            async_copy16(piece_at(stage, 2 * WARP_TOKENS + i / PIECES, i % PIECES), q + i * PER_16_BYTES);
    }
};

// Where a warp leaves its part of an item for the others: the stage that it has just used up.
struct Slot {
    float* base;
    DEVICE_METHOD float* row(int head) const { return base + head * PADDED; }
    DEVICE_METHOD float& maximum(int head) const { return base[GROUP * PADDED + head]; }
    DEVICE_METHOD float& sum(int head) const { return base[GROUP * PADDED + GROUP + head]; }
    DEVICE_METHOD Part part(int head, int d) const {
        return {maximum(head), sum(head), *reinterpret_cast<const float4*>(row(head) + d)};
    }
};

DEVICE void write_output(T* out, const Part& part) {
    const float scale = 1.0f / part.l;
    store4(out, part.o.x * scale, part.o.y * scale, part.o.z * scale, part.o.w * scale);
}

// All warps have filled their Slot (of which warp 0's is `parts`, each next one `stride` floats on): joins
// them into the output, or into the workspace when other blocks hold tiles of the item too.
DEVICE void finish_item(const Batch& batch, const Share& share, const Cursor& at, int number, float* parts, int stride) {
    __shared__ int arrived;
    __syncthreads();
    const int first = number - at.tile, last = first + at.tiles - 1;  // the item's tiles in the batch's numbering
    const bool whole = first >= share.begin && last < share.end;
    const int place = 2 * blockIdx.x + (first >= share.begin ? 1 : 0);
    const i64 row = (static_cast<i64>(at.sequence) * batch.kv_heads + at.kv_head) * GROUP;

    for (int i = threadIdx.x * 4; i < GROUP * HEAD_DIM; i += WARPS * 32 * 4) {
        const int head = i / HEAD_DIM, d = i % HEAD_DIM;
        Part parts_of_warps[WARPS];
#pragma unroll
        for (int w = 0; w < WARPS; ++w) parts_of_warps[w] = Slot{parts + w * stride}.part(head, d);
        const Part total = join(parts_of_warps);
        if (whole) {
            write_output(batch.out + row * HEAD_DIM + i, total);
        } else {
            const i64 slot = static_cast<i64>(place) * GROUP;
            *reinterpret_cast<float4*>(batch.partial + slot * HEAD_DIM + i) = total.o;
            if (d == 0) batch.partial_sums[slot + head] = make_float2(total.m, total.l);
        }
    }
    __syncthreads();  // parts may be overwritten now, and this block's partial is complete
    if (whole) return;

    const int owner = share.owner(first), owners = share.owner(last) - owner + 1;
    int* counter = batch.counters + at.sequence * batch.kv_heads + at.kv_head;
    if (threadIdx.x == 0) arrived = count_in(counter) + 1;
    __syncthreads();
    if (arrived != owners) return;
    if (threadIdx.x == 0) atomicExch(counter, 0);  // ready for the next launch

    constexpr int CHUNK = 8;  // partials asked for at a time: the loads are long, the arithmetic is nothing
    for (int i = threadIdx.x * 4; i < GROUP * HEAD_DIM; i += WARPS * 32 * 4) {
        const int head = i / HEAD_DIM;
        Part total = empty_part();
#pragma unroll 1
        for (int o = 0; o < owners; o += CHUNK) {
            Part part[CHUNK + 1];
            part[CHUNK] = total;
#pragma unroll
            for (int c = 0; c < CHUNK; ++c) {  // only the first owner has the item's beginning
                const i64 slot = static_cast<i64>(2 * (owner + o + c) + (o + c == 0 ? 1 : 0)) * GROUP;
                part[c] = empty_part();
                if (o + c >= owners) continue;
                const float2 sums = load_of_others(batch.partial_sums + slot + head);
                part[c].m = sums.x, part[c].l = sums.y;
                part[c].o = load_of_others(reinterpret_cast<const float4*>(batch.partial + slot * HEAD_DIM + i));
            }
            total = join(part);
        }
        write_output(batch.out + row * HEAD_DIM + i, total);
    }
}
