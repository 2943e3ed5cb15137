// Products of some rows, 17 to 64, as decode steps of larger batches make them: y [rows x N] = x [rows x K] * W^T (+ r).
// Reading W is still most of the work, but x is no longer small beside it: if every warp took it from the caches
// (`few_rows.cu`), it would cost more than W. So both go through shared memory, where the warps of a block share x.
//
//   - CLUSTER blocks take TILE_N rows of W together, each a part of K, and add up in each other's shared memory (in the order
//     of k, whoever comes when). So there are enough blocks to fill the GPU whatever N is, and nothing goes through memory.
//   - A block's part of K comes in slices of BK. STAGES - 1 of them are always under way. Long slices, since memory likes to
//     be read in long pieces, and as many stages as shared memory holds: few blocks that ask for much are faster than many.
//   - W doesn't depend on the kernel before: all but one of the stages are asked for before that one has ended.
//   - The products are Hopper's (`warpgroup.h`), which read both operands from shared memory by themselves. Elsewhere they
//     are those of a warp.
#include "warpgroup.h"

#ifndef ELEMENT
#define ELEMENT bfloat16
#endif
#ifndef COLUMNS  // the most rows of x
#define COLUMNS 64
#endif
#ifndef TILE_N
#define TILE_N 64
#endif
#ifndef BK
#define BK 128
#endif
#ifndef STAGES
#define STAGES 6
#endif
#ifndef CLUSTER  // more than one: sm_90
#define CLUSTER 1
#endif

using T = ELEMENT;
static_assert(sizeof(T) == 2, "tensor cores take 16-bit elements here");
constexpr int THREADS = 128;                       // a warpgroup
constexpr int MT = TILE_N / 64, NT = COLUMNS / 8;  // fragments of a warp: 16 rows of W, 8 rows of x each
constexpr int FRAGMENTS = MT * NT, MINE = (FRAGMENTS + CLUSTER - 1) / CLUSTER;
constexpr int PANEL = 64;                          // values of k side by side in shared memory: 128 bytes
constexpr int PIECES = BK / 8;                     // of 16 bytes in a row of a slice
constexpr int ROW_STEP = THREADS / PIECES;         // rows that all threads together copy at a time
constexpr int STAGE = (TILE_N + COLUMNS) * BK;     // elements
static_assert(TILE_N % 64 == 0 && NT % 2 == 0 && BK % PANEL == 0 && ROW_STEP % 8 == 0 && COLUMNS % ROW_STEP == 0);
static_assert(CLUSTER == 1 || TILE_N * COLUMNS * 4 <= STAGES * STAGE * 2, "parts fit in the stages");

// A stage holds W's slice, then x's, each as panels of 64 values of k in rows of 128 bytes. The 16-byte pieces of a row are
// permuted by the row: eight rows read at one column come from eight groups of banks.
template <int ROWS> DEVICE int place_of(int row, int piece) {
    return piece / 8 * ROWS * PANEL + row * PANEL + (piece % 8 ^ (row & 7)) * 8;
}

// acc += W's slice times x's.
DEVICE void multiply(float (&acc)[MT][NT][4], const T* weights, const T* columns, bool first) {
    const int warp = threadIdx.x / 32;
#ifdef NANOPD_WARPGROUP
    (void)warp;
    begin_products();
#pragma unroll
    for (int step = 0; step < BK / 16; ++step)
#pragma unroll
        for (int m = 0; m < MT; ++m)
            add_product(acc[m], operand_at(weights + (step / 4 * TILE_N + 64 * m) * PANEL + step % 4 * 16),
                        operand_at(columns + step / 4 * COLUMNS * PANEL + step % 4 * 16), step > 0 || !first, T{});
    commit_products();
#else
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int step = 0; step < BK / 16; ++step) {
        u32 a[MT][4], b[NT / 2][4];
#pragma unroll
        for (int m = 0; m < MT; ++m)
            load_matrices(a[m], weights + place_of<TILE_N>(64 * m + 16 * warp + lane % 16, 2 * step + lane / 16));
#pragma unroll
        for (int c = 0; c < NT / 2; ++c)
            load_matrices(b[c], columns + place_of<COLUMNS>(16 * c + lane % 8 + lane / 16 * 8, 2 * step + lane / 8 % 2));
#pragma unroll
        for (int m = 0; m < MT; ++m)
#pragma unroll
            for (int c = 0; c < NT; ++c)
                mma_16x8x16(acc[m][c], a[m], b[c / 2][c % 2 * 2], b[c / 2][c % 2 * 2 + 1], T{});
    }
#endif
}

// y, r, x: rows `…_stride` elements apart, an even number (x: a multiple of 8); r may be null; n a multiple of 16, k of BK;
// grid: CLUSTER blocks for each TILE_N rows of W, the last of which may be fewer.
#if CLUSTER > 1
extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS)
#else
extern "C" __global__ void __launch_bounds__(THREADS)
#endif
some_rows(T* y, i64 y_stride, const T* x, i64 x_stride, const T* w, const T* r, i64 r_stride, int rows, int n, int k) {
    extern __shared__ __align__(1024) T stages[];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int tile = blockIdx.x / CLUSTER * TILE_N, rank = blockIdx.x % CLUSTER;
    const int slices = k / BK, begin = slices * rank / CLUSTER, count = slices * (rank + 1) / CLUSTER - begin;

    // The pieces that this thread copies: `piece` of rows row, row + ROW_STEP …
    const int row = threadIdx.x / PIECES, piece = threadIdx.x % PIECES;
    const T* weights = w + static_cast<i64>(tile + row) * k + begin * BK + piece * 8;
    const T* columns = x + row * x_stride + begin * BK + piece * 8;
    const u64 policy = used_once();
    const auto load_w = [&](T* stage, int slice) {
#pragma unroll
        for (int i = 0; i < TILE_N; i += ROW_STEP)
            async_copy16_once(stage + place_of<TILE_N>(row, piece) + i * PANEL, weights + static_cast<i64>(i) * k + slice * BK,
                              tile + row + i < n, policy);
    };
    const auto load_x = [&](T* stage, int slice) {
#pragma unroll
        for (int i = 0; i < COLUMNS; i += ROW_STEP)
            async_copy16(stage + TILE_N * BK + place_of<COLUMNS>(row, piece) + i * PANEL, columns + i * x_stride + slice * BK,
                         row + i < rows);
    };
#pragma unroll
    for (int s = 0; s < STAGES - 1; ++s)
        if (s < count) load_w(stages + s * STAGE, s);
    begin_dependents();
    wait_for_previous();  // x and r are its results
#pragma unroll
    for (int s = 0; s < STAGES - 1; ++s) {
        if (s < count) load_x(stages + s * STAGE, s);
        async_commit();  // W of all of these stages with the first
    }

    float acc[MT][NT][4] = {};  // of W's rows tile + 64m + 16 * warp …, x's rows 8c …
    int stage = 0;
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
        async_wait<STAGES - 2>();
#ifdef NANOPD_WARPGROUP
        publish_to_products();
#endif
        __syncthreads();  // the slice is there for all, and all have finished with the one before
        const T* now = stages + stage * STAGE;
        multiply(acc, now, now + TILE_N * BK, i == 0);
        if (i + STAGES - 1 < count) {
            T* next = stages + (stage == 0 ? STAGES - 1 : stage - 1) * STAGE;
            load_w(next, i + STAGES - 1);
            load_x(next, i + STAGES - 1);
        }
        async_commit();  // also when empty: the wait counts groups
#ifdef NANOPD_WARPGROUP
        wait_for_products();
#endif
        if (++stage == STAGES) stage = 0;
    }

    // Which fragments this block adds up and writes: MINE of them. Neighbours in y are neighbours in W's rows, of which a
    // fragment's lane has 8 apart: 8x8 matrices are transposed within the warp, r's on the way in and y's on the way out.
    const auto row_of = [&](int f) { return f % NT * 8 + lane / 4; };
    const auto column_of = [&](int f, int half) { return tile + f / NT * 64 + warp * 16 + 8 * half + lane % 4 * 2; };
    u32 residual[MINE][2];
#pragma unroll
    for (int j = 0; j < MINE; ++j)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int f = rank * MINE + j, column = column_of(f, half);
            const bool inside = r != nullptr && f < FRAGMENTS && row_of(f) < rows && column < n;
            residual[j][half] = inside ? *reinterpret_cast<const u32*>(r + row_of(f) * r_stride + column) : 0;
        }
    float sum[MINE][4];
#if CLUSTER > 1
    float4* parts = reinterpret_cast<float4*>(stages);
    __syncthreads();  // all have finished with the stages
#pragma unroll
    for (int f = 0; f < FRAGMENTS; ++f) {
        const float(&d)[4] = acc[f / NT][f % NT];
        parts[f * THREADS + threadIdx.x] = make_float4(d[0], d[1], d[2], d[3]);
    }
    cluster_arrive();
    cluster_wait();
#pragma unroll
    for (int j = 0; j < MINE; ++j) {
        const int f = min(rank * MINE + j, FRAGMENTS - 1);
        sum[j][0] = sum[j][1] = sum[j][2] = sum[j][3] = 0;
#pragma unroll
        for (int other = 0; other < CLUSTER; ++other) {
            const float4 part = load_of_cluster(parts + f * THREADS + threadIdx.x, other);
            sum[j][0] += part.x, sum[j][1] += part.y, sum[j][2] += part.z, sum[j][3] += part.w;
        }
    }
    cluster_arrive();
#else
#pragma unroll
    for (int f = 0; f < FRAGMENTS; ++f)
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[f][e] = acc[f / NT][f % NT][e];
#endif
#pragma unroll
    for (int j = 0; j < MINE; ++j)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int f = rank * MINE + j, column = column_of(f, half);
            const u32 add = transpose_matrix(residual[j][half]);
            const float low = sum[j][2 * half] + to_float(T{static_cast<u16>(add)});
            const float high = sum[j][2 * half + 1] + to_float(T{static_cast<u16>(add >> 16)});
            const u32 pair = transpose_matrix(pack2(low, high, T{}));
            if (f < FRAGMENTS && row_of(f) < rows && column < n)
                *reinterpret_cast<u32*>(y + row_of(f) * y_stride + column) = pair;
        }
#if CLUSTER > 1
    cluster_wait();  // the others have read this block's shared memory
#endif
}
