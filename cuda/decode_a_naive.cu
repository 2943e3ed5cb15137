// Rung (a): one thread block per sequence and query head, all scores in shared memory. Naive on purpose: it is
// what one writes first, and the design of many teaching kernels. Three passes, as softmax is written on paper:
//
//   scores   a thread takes a token and walks along its K row: neighbouring threads read addresses HEAD_DIM
//            elements apart, so a warp's load touches 32 sectors where 4 would do;
//   softmax  two reductions over the block;
//   output   a thread takes a dimension and walks along the tokens: coalesced, but only HEAD_DIM threads work.
//
// What it costs: K and V are read once per *query* head (GROUP times too often), few loads are in flight, one
// long sequence occupies a few multiprocessors while the others idle, and the scores limit the context.
#include "paged.h"
#include "warp.h"

constexpr int THREADS = 128;

// out, query: [sequences, heads, HEAD_DIM], query rows `query_stride` elements apart; grid (heads, sequences);
// dynamic shared memory: 4 bytes for each token of the longest context.
extern "C" __global__ void __launch_bounds__(THREADS)
paged_decode_naive(T* out, const T* query, i64 query_stride, const T* kv, i64 block_stride, const int* block_tables,
                   int table_stride, const int* context_lens, int kv_heads, float scale) {
    extern __shared__ float scores[];
    __shared__ float q[HEAD_DIM];
    __shared__ float reduced[2][THREADS / 32];

    const int head = blockIdx.x, sequence = blockIdx.y, kv_head = head / GROUP;
    const int context = context_lens[sequence];
    const int* table = block_tables + static_cast<i64>(sequence) * table_stride;
    const T* q_row = query + sequence * query_stride + head * HEAD_DIM;
    T* out_row = out + (static_cast<i64>(sequence) * gridDim.x + head) * HEAD_DIM;

    for (int d = threadIdx.x; d < HEAD_DIM; d += THREADS) q[d] = to_float(q_row[d]) * scale * LOG2_E;
    __syncthreads();

    float largest = minus_infinity();
    for (int token = threadIdx.x; token < context; token += THREADS) {
        const T* k = key_row(kv, block_stride, table[token / BLOCK_SIZE], kv_head, token % BLOCK_SIZE);
        float score = 0;
        for (int d = 0; d < HEAD_DIM; ++d) score += q[d] * to_float(k[d]);
        scores[token] = score;
        largest = fmaxf(largest, score);
    }
    largest = warp_max(largest);
    if (threadIdx.x % 32 == 0) reduced[0][threadIdx.x / 32] = largest;
    __syncthreads();
    for (int w = 0; w < THREADS / 32; ++w) largest = fmaxf(largest, reduced[0][w]);

    float sum = 0;
    for (int token = threadIdx.x; token < context; token += THREADS) {
        scores[token] = exp2_fast(scores[token] - largest);
        sum += scores[token];
    }
    sum = group_sum<32>(sum);
    if (threadIdx.x % 32 == 0) reduced[1][threadIdx.x / 32] = sum;
    __syncthreads();
    sum = 0;
    for (int w = 0; w < THREADS / 32; ++w) sum += reduced[1][w];

    for (int d = threadIdx.x; d < HEAD_DIM; d += THREADS) {
        float total = 0;
        for (int token = 0; token < context; ++token) {
            const T* k = key_row(kv, block_stride, table[token / BLOCK_SIZE], kv_head, token % BLOCK_SIZE);
            total += scores[token] * to_float(k[value_offset(kv_heads) + d]);
        }
        assign(out_row[d], context > 0 ? total / sum : 0.0f);
    }
}
