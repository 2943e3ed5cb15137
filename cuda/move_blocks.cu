// Moves whole KV blocks, all layers of each at once: in the block-major cache a block is one contiguous piece, so
// copy-on-write, gathering blocks for a transfer and scattering received ones are the same kernel.
//
//   copy     from and to are the cache, both lists given
//   gather   `to` is a contiguous buffer: to_ids is null, item i goes to place i
//   scatter  `from` is a contiguous buffer: from_ids is null
//   pull     `from` is another pool, perhaps on another GPU or of another process (its memory mapped here): all blocks
//            in one launch, where a copy for each would cost more to launch than to do
#include "portable.h"

constexpr int THREADS = 256;
constexpr int IN_FLIGHT = 4;  // 16-byte loads that a thread asks for before it stores the first

// Strides are in 16-byte units; grid (pieces, blocks), every block of threads walks over its share of one KV block.
extern "C" __global__ void __launch_bounds__(THREADS)
move_blocks(const uint4* from, i64 from_stride, const i64* from_ids, uint4* to, i64 to_stride, const i64* to_ids,
            int block_pieces) {
    const int item = blockIdx.y;
    const uint4* source = from + (from_ids ? from_ids[item] : item) * from_stride;
    uint4* target = to + (to_ids ? to_ids[item] : item) * to_stride;
    const int step = gridDim.x * THREADS;
    for (int first = blockIdx.x * THREADS + threadIdx.x; first < block_pieces; first += step * IN_FLIGHT) {
        uint4 piece[IN_FLIGHT];
#pragma unroll
        for (int i = 0; i < IN_FLIGHT; ++i)
            if (first + i * step < block_pieces) piece[i] = load16(source + first + i * step);
#pragma unroll
        for (int i = 0; i < IN_FLIGHT; ++i)
            if (first + i * step < block_pieces) store16(target + first + i * step, piece[i]);
    }
}
