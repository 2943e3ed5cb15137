// What the two halves of the emulator's runtime share: emulator_run.cpp (fibres, barriers, warp operations)
// and emulator_watch.cpp (what instrumented loads, stores and basic blocks report).
#pragma once
#include <cstdint>
#include <vector>

#include "emulator.h"

namespace emu {

enum Finding : int {
    OUT_OF_BOUNDS_READ, OUT_OF_BOUNDS_WRITE, UNINITIALISED_READ, RACE, MISALIGNED, BLOCK_DEADLOCK, WARP_DEADLOCK,
    DIVERGENT_BARRIER, SHUFFLE_FROM_ABSENT_LANE, TOO_MANY_STEPS, CRASH
};

// Mirrored by ctypes in nanopd_lab/kernels/emulator.py.
struct Report {
    int kind, size;
    int block[3], thread[3], other_thread[3];
    int region;        // index of the argument; -1 shared memory, -2 neither
    int waiting, missing;
    int64_t offset;    // bytes into the region
    uint64_t pc, other_pc;
};
struct Counter {  // of one instruction: what all warps together did there
    uint64_t pc;
    int space, write;              // space: 0 global, 1 shared, 2 atomic on global, 3 atomic on shared
    uint64_t requests;             // warp-wide accesses
    uint64_t lanes, bytes;         // lanes that took part, bytes they asked for
    uint64_t sectors;              // 32-byte sectors touched (global)
    uint64_t passes, conflicts;    // shared-memory passes, and those beyond the fewest possible
};
// One access of warp 0 of block 0, lane by lane: what a picture of it is drawn from.
struct WarpAccess {
    uint64_t pc;
    int space, write, region;     // space as above; region: index of the argument, -1 shared memory
    uint32_t lanes;
    int32_t bytes;                 // that a lane asked for
    int64_t offset[32];            // bytes from the beginning of the region
};
struct Totals {
    uint64_t block_barriers, warp_operations;  // per block, per warp
    uint64_t steps, divergent_steps, lane_steps;  // basic blocks executed by warps; by part of a warp; by lanes
};
struct Region {
    char* begin;
    int64_t bytes;
    int initialised;
};

struct PendingCopy { void* to; const void* from; int bytes, valid; uint64_t pc; };

struct Lane {
    void* stack_pointer = nullptr;
    char* stack = nullptr;
    Context context;
    int index = 0, warp = 0, lane = 0;
    bool finished = false, waiting = false, at_block_barrier = false;
    uint64_t pc = 0;                 // where it waits
    uint32_t warp_syncs = 0;
    // One warp operation in flight: its arguments, then its result.
    uint32_t mask = 0;
    int operation = 0, operand = 0, width = 32;
    uint64_t value = 0, result = 0;
    uint32_t words[6] = {}, out[4] = {};
    float accumulator[4] = {};
    const void* row = nullptr;
    // cp.async: copies since the last commit, and the groups committed.
    std::vector<PendingCopy> uncommitted;
    std::vector<std::vector<PendingCopy>> groups;
};

extern Lane* current;          // the fibre that runs
extern std::vector<Lane> lanes;  // of the block that runs
extern int block_epoch;          // rises at every block barrier and every new block
extern int block_first_epoch;
extern bool watching;

[[noreturn]] void abandon();  // ends the launch from within a fibre
void report(Finding kind, uint64_t pc, const Lane* other = nullptr, uint64_t other_pc = 0, int region = -2,
            int64_t offset = 0, int size = 0, int waiting = 0, int missing = 0);

// emulator_watch.cpp
void watch_begin(const Region* regions, int count, char* shared, int64_t shared_bytes, uint64_t max_steps);
void watch_block();                            // a new block: shared memory is uninitialised again
void watch_access(const void* address, int size, bool write, uint64_t pc, bool count = true, bool atomic = false);
void watch_flush(int warp);                    // all lanes of the warp have met: account for what they did
void watch_end();
extern Totals totals;
extern char* static_shared_begin;
extern char* static_shared_end;

#define EMU_PC (reinterpret_cast<uint64_t>(__builtin_return_address(0)) - 1)

}  // namespace emu
