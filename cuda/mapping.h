// Which lane copies what. A warp brings a tile of WARP_TOKENS rows (one token's K, or V, each) to shared memory. A row
// lies in one piece in global memory, PIECES times 16 bytes; in each turn every lane copies one of those pieces.
//
// Any mapping that copies every piece once is right. It is fast when the lanes of a turn read *neighbouring* pieces:
// memory moves whole sectors of 32 bytes, and 32 lanes times 16 bytes are 16 sectors at the least. A lane that walks
// along a row of its own makes 32 of them, each of them moved twice, for one half and later for the other.
#pragma once
#include "paged.h"

constexpr int PIECES = HEAD_DIM / PER_16_BYTES;  // 16-byte pieces of a row: 8, 16, 32 or 64

struct Place {
    int row, piece;  // 0 … WARP_TOKENS - 1, 0 … PIECES - 1
};

// What `lane` copies in turn `turn` (0 … WARP_TOKENS * PIECES / 32 - 1).
DEVICE Place place_of(int lane, int turn) {
    const int index = turn * 32 + lane;
    return {index / PIECES, index % PIECES};
}
