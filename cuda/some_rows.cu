// Products of some rows, 17 to 64, as decode steps of larger batches make them: y [rows x N] = x [rows x K] * W^T (+ r).
// Reading W is still most of the work, but x is no longer small beside it: taken from the caches by each warp that needs
// it (`few_rows.cu`), it would cost as much as W. So here both go through shared memory, where all warps of a block
// share x, and a block takes TILE_N rows of W, so that x comes from the L2 cache rows / TILE_N times as fast as W from memory.
//
// Dividing. N / TILE_N tiles of K / BK slices are laid end to end, and each block takes an equal number of slices in a
// row: any grid is evenly loaded (Osama et al., "Stream-K", PPoPP 2023). A tile that several blocks share is added up
//
//   - CLUSTER > 1 (sm_90): in the shared memory of a cluster of that many blocks, which take a tile together: each adds
//     up its part of the tile;
//   - otherwise in a workspace, by the block that comes last. Nobody waits for another block.
//
// Either way in the order of k, whoever comes when: the result doesn't depend on it.
//
// Filling. STAGES stages of shared memory; W for all but one of them is asked for before the kernel before this one has
// ended. Shared memory should hold two blocks (of this kernel and of the next): then memory is never idle between them.
#include "warpgroup.h"

#ifndef ELEMENT
#define ELEMENT bfloat16
#endif
#ifndef COLUMNS  // the most rows of x
#define COLUMNS 64
#endif
#ifndef TILE_N
#define TILE_N 128
#endif
#ifndef BK
#define BK 64
#endif
#ifndef STAGES
#define STAGES 4
#endif
#ifndef WARPS
#define WARPS 4
#endif
#ifndef BLOCKS  // that a multiprocessor should hold
#define BLOCKS 1
#endif
#ifndef CLUSTER
#define CLUSTER 1
#endif
#ifndef LINE  // bytes of W that the L2 cache fetches at a time
#define LINE 128
#endif
#ifndef L2_AHEAD  // slices of W that are asked into the L2 cache, behind the stages, before the kernel before has ended
#define L2_AHEAD 0
#endif

using T = ELEMENT;
static_assert(sizeof(T) == 2, "tensor cores take 16-bit elements here");
constexpr int THREADS = WARPS * 32;
constexpr int MT = TILE_N / 16 / WARPS, NT = COLUMNS / 8, FRAGMENTS = MT * NT;
constexpr int PIECES = BK / 8;                     // of 16 bytes in a row of a stage
constexpr int ROW_STEP = THREADS / PIECES;         // rows that all threads together copy at a time
constexpr int STAGE = (TILE_N + COLUMNS) * BK;     // elements
constexpr int PANEL = 64;                          // values of k side by side in shared memory: 128 bytes
static_assert(MT * 16 * WARPS == TILE_N && WARPS % 4 == 0 && NT % 2 == 0 && ROW_STEP % 8 == 0 && BK % PANEL == 0);
static_assert(TILE_N % ROW_STEP == 0, "all threads copy W all the time");
static_assert(CLUSTER == 1 || TILE_N * COLUMNS * 4 <= STAGES * STAGE * 2, "parts fit in the stages");

// A stage holds W's slice, then x's, each as panels of 64 values of k, in rows of 128 bytes. The 16-byte pieces of a row are
// permuted by the row: eight rows read at one column come from eight groups of banks.
template <int ROWS> DEVICE int place_of(int row, int piece) {
    return piece / 8 * ROWS * PANEL + row * PANEL + (piece % 8 ^ (row & 7)) * 8;
}
// The first of the 16 rows of W that are fragment m of a warp.
DEVICE int rows_of(int warp, int m) { return (warp / 4 * MT + m) * 64 + warp % 4 * 16; }

struct Share {  // as in split_kv.h
    int each, longer, begin, end;
    DEVICE_METHOD int begin_of(int block) const { return block * each + min(block, longer); }
    DEVICE_METHOD int owner(int slice) const {
        const int in_longer = longer * (each + 1);
        return slice < in_longer ? slice / (each + 1) : longer + (slice - in_longer) / each;
    }
};

struct Output {
    T* y;
    i64 y_stride;
    const T* r;
    i64 r_stride;
    int rows, n;

    // A fragment's four sums of this lane: of W's rows `at` + g and + 8, x's rows `first` + 2t and + 1. Neighbours in y are
    // neighbours in W's rows, so pairs are transposed within the warp first.
    DEVICE_METHOD void write(const float4& sum, int at, int first) const {
        const int lane = threadIdx.x % 32, row = first + lane / 4;
        const float d[4] = {sum.x, sum.y, sum.z, sum.w};
        const bool inside = row < rows && at < n;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int column = at + 8 * half + lane % 4 * 2;
            float low = d[2 * half], high = d[2 * half + 1];
            if (r != nullptr) {
                u32 pair = 0;
                if (inside) pair = *reinterpret_cast<const u32*>(r + row * r_stride + column);
                pair = transpose_matrix(pair);
                low += to_float(T{static_cast<u16>(pair)}), high += to_float(T{static_cast<u16>(pair >> 16)});
            }
            const u32 pair = transpose_matrix(pack2(low, high, T{}));
            if (inside) *reinterpret_cast<u32*>(y + row * y_stride + column) = pair;
        }
    }
};

// y, r, x: rows `…_stride` elements apart (even ones); r may be null; n a multiple of 16, k of BK.
// partial: [2 * blocks][FRAGMENTS][THREADS] float4; counters: one a tile, zero before and after. Neither with CLUSTER > 1,
// where the grid is CLUSTER blocks a tile.
#if CLUSTER > 1
extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, BLOCKS)
#else
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
#endif
some_rows(T* y, i64 y_stride, const T* x, i64 x_stride, const T* w, const T* r, i64 r_stride, int rows, int n, int k,
          float4* partial, int* counters) {
    extern __shared__ __align__(1024) T stages[];
    const int warp = threadIdx.x / 32;
    const int slices = k / BK, tiles = (n + TILE_N - 1) / TILE_N, block = blockIdx.x;
    const Output output{y, y_stride, r, r_stride, rows, n};

    Share share{};
    if (CLUSTER > 1) {
        const int first = block / CLUSTER * slices, rank = block % CLUSTER;
        share.begin = first + slices * rank / CLUSTER, share.end = first + slices * (rank + 1) / CLUSTER;
    } else {
        share.each = tiles * slices / static_cast<int>(gridDim.x), share.longer = tiles * slices % static_cast<int>(gridDim.x);
        share.begin = share.begin_of(block), share.end = share.begin_of(block + 1);
    }
    const int count = share.end - share.begin;

    // Which pieces this thread copies: `piece` of rows row, row + ROW_STEP …
    const int row = threadIdx.x / PIECES, piece = threadIdx.x % PIECES;
    const int place_w = place_of<TILE_N>(row, piece), place_x = TILE_N * BK + place_of<COLUMNS>(row, piece);
    const u64 policy = used_once();
    struct Cursor {
        int tile, slice;
    };
    const Cursor start{share.begin / slices, share.begin % slices};
    const auto advance = [&](Cursor& c) {
        if (++c.slice == slices) c.slice = 0, ++c.tile;
    };
    const auto load_w = [&](T* stage, const Cursor& c) {
        const T* from = w + (static_cast<i64>(c.tile) * TILE_N + row) * k + c.slice * BK + piece * 8;
        const int left = n - c.tile * TILE_N - row;
#pragma unroll
        for (int i = 0; i < TILE_N / ROW_STEP; ++i)
            async_copy16_once<LINE>(stage + place_w + i * ROW_STEP * PANEL, from + static_cast<i64>(i) * ROW_STEP * k,
                              i * ROW_STEP < left, policy);
    };
    const auto load_x = [&](T* stage, const Cursor& c) {
        const T* from = x + row * x_stride + c.slice * BK + piece * 8;
#pragma unroll
        for (int i = 0; i < (COLUMNS + ROW_STEP - 1) / ROW_STEP; ++i)
            if (COLUMNS % ROW_STEP == 0 || i * ROW_STEP + row < COLUMNS)
                async_copy16(stage + place_x + i * ROW_STEP * PANEL, from + i * ROW_STEP * x_stride,
                             i * ROW_STEP + row < rows);
    };

    Cursor loading = start;
#pragma unroll
    for (int s = 0; s < STAGES - 1; ++s)
        if (s < count) load_w(stages + s * STAGE, loading), advance(loading);
    if (L2_AHEAD) {
        Cursor ahead = loading;
        for (int s = STAGES - 1; s < min(count, STAGES - 1 + L2_AHEAD); ++s, advance(ahead))
            for (int line = threadIdx.x; line < TILE_N * (BK / 64); line += THREADS) {
                const i64 at = static_cast<i64>(ahead.tile) * TILE_N + line / (BK / 64);
                if (at < n) prefetch_l2(w + at * k + ahead.slice * BK + line % (BK / 64) * 64);
            }
    }
    begin_dependents();
    wait_for_previous();  // x and r are its results
    loading = start;
#pragma unroll
    for (int s = 0; s < STAGES - 1; ++s) {
        if (s < count) load_x(stages + s * STAGE, loading), advance(loading);
        async_commit();  // W of all of these stages with the first
    }

    float acc[MT][NT][4] = {};
    Cursor at = start;
    int stage = 0;
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
        async_wait<STAGES - 2>();
#ifdef NANOPD_WARPGROUP
        publish_to_products();
#endif
        __syncthreads();  // the slice is there for all, and all have finished with the one before
        const T* weights = stages + stage * STAGE;
        const T* columns = weights + TILE_N * BK;
        const auto load_next = [&] {
            if (i + STAGES - 1 < count) {
                T* to = stages + (stage == 0 ? STAGES - 1 : stage - 1) * STAGE;
                load_w(to, loading);
                load_x(to, loading);
                advance(loading);
            }
            async_commit();  // also when empty: the wait counts groups
        };
#ifdef NANOPD_WARPGROUP
        begin_products();
#pragma unroll
        for (int step = 0; step < BK / 16; ++step)
#pragma unroll
            for (int m = 0; m < MT; ++m)
                add_product(acc[m], operand_at(weights + step / 4 * TILE_N * PANEL + (warp / 4 * MT + m) * 64 * PANEL + step % 4 * 16),
                            operand_at(columns + step / 4 * COLUMNS * PANEL + step % 4 * 16), step > 0 || i > 0 && at.slice > 0, T{});
        commit_products();
        load_next();
        wait_for_products();
#else
        const int lane = threadIdx.x % 32;
        u32 a[2][MT][4], b[2][NT / 2][4];
        const auto load_fragments = [&](u32(&a_to)[MT][4], u32(&b_to)[NT / 2][4], int step) {
#pragma unroll
            for (int m = 0; m < MT; ++m)
                load_matrices(a_to[m], weights + place_of<TILE_N>(rows_of(warp, m) + lane % 16, 2 * step + lane / 16));
#pragma unroll
            for (int c = 0; c < NT / 2; ++c)
                load_matrices(b_to[c], columns + place_of<COLUMNS>(16 * c + lane % 8 + lane / 16 * 8, 2 * step + lane / 8 % 2));
        };
        load_fragments(a[0], b[0], 0);
        load_next();
#pragma unroll
        for (int step = 0; step < BK / 16; ++step) {
            if (step + 1 < BK / 16) load_fragments(a[(step + 1) % 2], b[(step + 1) % 2], step + 1);
#pragma unroll
            for (int m = 0; m < MT; ++m)
#pragma unroll
                for (int c = 0; c < NT; ++c)
                    mma_16x8x16(acc[m][c], a[step % 2][m], b[step % 2][c / 2][c % 2 * 2], b[step % 2][c / 2][c % 2 * 2 + 1],
                                T{});
        }
#endif
        if (++stage == STAGES) stage = 0;
        const Cursor done = at;
        advance(at);
        if (CLUSTER > 1 || (i + 1 < count && at.slice != 0)) continue;

        // The tile ends here, or this block's share of it.
        const int first = done.tile * slices, last = first + slices - 1;
        const bool whole = first >= share.begin && last < share.end;
        bool complete = whole;
        if (!whole) {
            const int mine = 2 * block + (first >= share.begin ? 1 : 0);
#pragma unroll
            for (int f = 0; f < FRAGMENTS; ++f) {
                const float(&d)[4] = acc[f / NT][f % NT];
                partial[(static_cast<i64>(mine) * FRAGMENTS + f) * THREADS + threadIdx.x] = make_float4(d[0], d[1], d[2], d[3]);
            }
            __shared__ int arrived;
            const int owner = share.owner(first), owners = share.owner(last) - owner + 1;
            __syncthreads();
            if (threadIdx.x == 0) {
                arrived = count_in(counters + done.tile) + 1;
                if (arrived == owners) atomicExch(counters + done.tile, 0);  // ready for the next launch
            }
            __syncthreads();
            complete = arrived == owners;
            if (complete) {
#pragma unroll
                for (int f = 0; f < FRAGMENTS; ++f)
#pragma unroll
                    for (int e = 0; e < 4; ++e) acc[f / NT][f % NT][e] = 0;
#pragma unroll 1
                for (int o = 0; o < owners; ++o) {  // only the first owner has the tile's beginning
                    const int slot = 2 * (owner + o) + (o == 0 ? 1 : 0);
                    const float4* from = partial + static_cast<i64>(slot) * FRAGMENTS * THREADS + threadIdx.x;
                    float4 part[FRAGMENTS];
#pragma unroll
                    for (int f = 0; f < FRAGMENTS; ++f) part[f] = load_of_others(from + f * THREADS);
#pragma unroll
                    for (int f = 0; f < FRAGMENTS; ++f) {
                        float(&d)[4] = acc[f / NT][f % NT];
                        d[0] += part[f].x, d[1] += part[f].y, d[2] += part[f].z, d[3] += part[f].w;
                    }
                }
            }
        }
        if (complete) {
#pragma unroll
            for (int f = 0; f < FRAGMENTS; ++f) {
                const float(&d)[4] = acc[f / NT][f % NT];
                output.write(make_float4(d[0], d[1], d[2], d[3]), done.tile * TILE_N + rows_of(warp, f / NT), f % NT * 8);
            }
        }
#ifndef NANOPD_WARPGROUP
#pragma unroll
        for (int f = 0; f < FRAGMENTS; ++f)
#pragma unroll
            for (int e = 0; e < 4; ++e) acc[f / NT][f % NT][e] = 0;
#endif
    }

#if CLUSTER > 1
    // Each block leaves its part in its own shared memory and adds up a share of the fragments.
    float4* parts = reinterpret_cast<float4*>(stages);
    __syncthreads();  // all have finished with the stages
#pragma unroll
    for (int f = 0; f < FRAGMENTS; ++f) {
        const float(&d)[4] = acc[f / NT][f % NT];
        parts[f * THREADS + threadIdx.x] = make_float4(d[0], d[1], d[2], d[3]);
    }
    cluster_barrier();
    constexpr int MINE = (FRAGMENTS + CLUSTER - 1) / CLUSTER;
    float4 sum[MINE];
#pragma unroll
    for (int j = 0; j < MINE; ++j) {
        const int f = min(block % CLUSTER * MINE + j, FRAGMENTS - 1);
        sum[j] = make_float4(0, 0, 0, 0);
#pragma unroll
        for (int rank = 0; rank < CLUSTER; ++rank) {
            const float4 part = load_of_cluster(parts + f * THREADS + threadIdx.x, rank);
            sum[j].x += part.x, sum[j].y += part.y, sum[j].z += part.z, sum[j].w += part.w;
        }
    }
    cluster_arrive();
#pragma unroll
    for (int j = 0; j < MINE; ++j) {
        const int f = block % CLUSTER * MINE + j;
        if (f < FRAGMENTS) output.write(sum[j], start.tile * TILE_N + rows_of(warp, f / NT), f % NT * 8);
    }
    cluster_wait();  // others may still read this block's shared memory
#endif
}
