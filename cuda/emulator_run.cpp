// The emulator's scheduler: one fibre a CUDA thread, block barriers, warp operations, deadlock detection.
#include "emulator_internal.h"

#include <dlfcn.h>
#include <signal.h>
#include <sys/mman.h>

#include <cstdlib>
#include <cstring>
#if (defined(__x86_64__) || defined(__aarch64__)) && !defined(EMU_UCONTEXT)
#define EMU_ASSEMBLY 1
#else
#include <ucontext.h>  // any other processor, or -DEMU_UCONTEXT to test this path
#endif

extern "C" void emu_entry(void** args);
extern "C" int emu_parameters(int* sizes, char* kinds);

// ---- switching stacks -------------------------------------------------------------------------------------
// Saves the callee-saved registers on the old stack and restores them from the new one. No system call, no
// signal mask: some nanoseconds, where swapcontext takes hundreds.
extern "C" void emu_switch(void** save, void* load);
#if defined(EMU_ASSEMBLY) && defined(__x86_64__)
asm(R"(
.text
.globl emu_switch
.hidden emu_switch
.type emu_switch, @function
emu_switch:
    pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
    ret
.size emu_switch, .-emu_switch
)");
#elif defined(EMU_ASSEMBLY) && defined(__aarch64__)
asm(R"(
.text
.globl emu_switch
.hidden emu_switch
.type emu_switch, %function
emu_switch:
    sub sp, sp, #160
    stp x19, x20, [sp, #0];   stp x21, x22, [sp, #16];  stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48];  stp x27, x28, [sp, #64];  stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96];    stp d10, d11, [sp, #112]; stp d12, d13, [sp, #128]; stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp, #0];   ldp x21, x22, [sp, #16];  ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48];  ldp x27, x28, [sp, #64];  ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96];    ldp d10, d11, [sp, #112]; ldp d12, d13, [sp, #128]; ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
.size emu_switch, .-emu_switch
)");
#endif

namespace emu {

Context* context = nullptr;
Lane* current = nullptr;
std::vector<Lane> lanes;
int block_epoch = 0, block_first_epoch = 0;
bool watching = false;

namespace {

constexpr size_t STACK_BYTES = 128 * 1024;
constexpr int MAX_REPORTS = 64;
enum Operation { SHUFFLE, VOTE, BARRIER, LOAD_MATRICES, TRANSPOSE, MMA_HALF, MMA_BFLOAT };

void* scheduler_stack = nullptr;
void** kernel_args = nullptr;
char* dynamic_arena = nullptr;
char* stack_pool = nullptr;
size_t stack_pool_threads = 0;
bool abandoned = false;
std::vector<Report> reports;
std::vector<uint32_t> existing;  // per warp, the lanes that the launch created

#ifndef EMU_ASSEMBLY
std::vector<ucontext_t> contexts;
ucontext_t scheduler_context;
#endif

void to_scheduler() {
#ifdef EMU_ASSEMBLY
    emu_switch(&current->stack_pointer, scheduler_stack);
#else
    swapcontext(&contexts[current->index], &scheduler_context);
#endif
}

void fibre_main() {
    emu_entry(kernel_args);
    current->finished = true;
    to_scheduler();
    abort();  // a finished fibre is never resumed
}

void prepare(Lane& lane) {
    char* top = lane.stack + STACK_BYTES;
#if defined(EMU_ASSEMBLY) && defined(__x86_64__)
    // After six pops and the return, rsp must be 8 modulo 16, as after a call.
    void** slot = reinterpret_cast<void**>(top) - 2;
    *slot = reinterpret_cast<void*>(&fibre_main);
    lane.stack_pointer = slot - 6;
#elif defined(EMU_ASSEMBLY) && defined(__aarch64__)
    char* frame = top - 160;
    memset(frame, 0, 160);
    reinterpret_cast<void**>(frame)[11] = reinterpret_cast<void*>(&fibre_main);  // x30
    lane.stack_pointer = frame;
#else
    ucontext_t& c = contexts[lane.index];
    getcontext(&c);
    c.uc_stack.ss_sp = lane.stack;
    c.uc_stack.ss_size = STACK_BYTES;
    c.uc_link = nullptr;
    makecontext(&c, &fibre_main, 0);
    (void)top;
#endif
}

void resume(Lane& lane) {
    current = &lane;
    context = &lane.context;
#ifdef EMU_ASSEMBLY
    emu_switch(&scheduler_stack, lane.stack_pointer);
#else
    swapcontext(&scheduler_context, &contexts[lane.index]);
#endif
}

float half_to_float(uint16_t h) {
    const uint32_t sign = (h & 0x8000u) << 16, exponent = (h >> 10) & 31, fraction = h & 1023;
    if (exponent == 0) {
        const float x = static_cast<float>(fraction) * 5.9604644775390625e-8f;
        return sign ? -x : x;
    }
    const uint32_t bits = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | (fraction << 13);
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
float bfloat_to_float(uint16_t b) {
    const uint32_t bits = static_cast<uint32_t>(b) << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

// D = A B + D for the fragments that 32 lanes hold; layouts in portable.h.
void resolve_mma(Lane* w, bool bfloat) {
    auto value = [bfloat](uint32_t word, int high) {
        const uint16_t bits = static_cast<uint16_t>(word >> (16 * high));
        return bfloat ? bfloat_to_float(bits) : half_to_float(bits);
    };
    float a[16][16], b[16][8];
    for (int l = 0; l < 32; ++l) {
        const int g = l / 4, t = l % 4;
        for (int h = 0; h < 2; ++h) {
            a[g][2 * t + h] = value(w[l].words[0], h);
            a[g + 8][2 * t + h] = value(w[l].words[1], h);
            a[g][2 * t + 8 + h] = value(w[l].words[2], h);
            a[g + 8][2 * t + 8 + h] = value(w[l].words[3], h);
            b[2 * t + h][g] = value(w[l].words[4], h);
            b[2 * t + 8 + h][g] = value(w[l].words[5], h);
        }
    }
    for (int l = 0; l < 32; ++l)
        for (int i = 0; i < 4; ++i) {
            const int row = l / 4 + 8 * (i / 2), column = 2 * (l % 4) + (i & 1);
            float sum = w[l].accumulator[i];
            for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
            w[l].accumulator[i] = sum;
        }
}

void resolve(Lane* w, uint32_t mask, uint32_t present) {
    int first = __builtin_ctz(mask & present);
    const int operation = w[first].operation;
    uint32_t ballot = 0;
    for (int l = 0; l < 32; ++l)
        if ((mask & present) >> l & 1) ballot |= static_cast<uint32_t>(w[l].value != 0) << l;
    if (operation == MMA_HALF || operation == MMA_BFLOAT) {
        resolve_mma(w, operation == MMA_BFLOAT);
        return;
    }
    for (int l = 0; l < 32; ++l) {
        if (!((mask & present) >> l & 1)) continue;
        Lane& lane = w[l];
        switch (operation) {
        case SHUFFLE: {
            const int base = l & ~(lane.width - 1), last = base + lane.width - 1, kind = lane.operand >> 16;
            const int operand = static_cast<int16_t>(lane.operand & 0xffff);
            int source = kind == IDX ? base + (operand & (lane.width - 1)) : kind == UP ? l - operand
                       : kind == DOWN ? l + operand : l ^ operand;
            if (source < base || source > last) source = l;
            if (!((mask & present) >> source & 1)) {
                current = &lane;
                report(SHUFFLE_FROM_ABSENT_LANE, lane.pc, nullptr, 0, -2, source);
                source = l;
            }
            lane.result = w[source].value;
            break;
        }
        case VOTE: lane.result = ballot; break;
        case BARRIER: ++lane.warp_syncs; break;
        case LOAD_MATRICES:
            for (int m = 0; m < 4; ++m) {
                auto at = [&](int row, int column) {
                    return static_cast<const uint16_t*>(w[8 * m + row].row)[column];
                };
                const int g = l / 4, t = l % 4;
                lane.out[m] = lane.operand ? at(2 * t, g) | static_cast<uint32_t>(at(2 * t + 1, g)) << 16
                                           : at(g, 2 * t) | static_cast<uint32_t>(at(g, 2 * t + 1)) << 16;
            }
            break;
        case TRANSPOSE: {
            const int g = l / 4, t = l % 4;
            auto at = [&](int row, int column) {
                return static_cast<uint16_t>(w[4 * row + column / 2].words[0] >> (16 * (column & 1)));
            };
            lane.out[0] = at(2 * t, g) | static_cast<uint32_t>(at(2 * t + 1, g)) << 16;
            break;
        }
        }
    }
}

// A lane arrives at a warp operation; the last one of the mask resolves it for all.
void meet(uint32_t mask, int operation, uint64_t pc) {
    Lane& me = *current;
    me.mask = mask, me.operation = operation, me.pc = pc;
    const uint32_t present = existing[me.warp];
    const int first = me.warp * 32;
    uint32_t arrived = 1u << me.lane;
    for (int l = 0; l < 32; ++l)
        if (present >> l & 1) {
            const Lane& other = lanes[first + l];
            if (other.waiting && !other.at_block_barrier && other.mask == mask && other.operation == operation)
                arrived |= 1u << l;
        }
    if ((arrived & mask & present) != (mask & present)) {
        me.waiting = true;
        to_scheduler();
        return;
    }
    Lane* warp = &lanes[first];
    resolve(warp, mask, present);
    current = &me;
    for (int l = 0; l < 32; ++l)
        if ((mask & present) >> l & 1) warp[l].waiting = false;
    ++totals.warp_operations;
    if (watching && (mask & present) == present) watch_flush(me.warp);
}

void release_block() {
    for (Lane& lane : lanes) lane.waiting = lane.at_block_barrier = false;
    ++block_epoch;
    ++totals.block_barriers;
    if (watching)
        for (size_t w = 0; w < existing.size(); ++w) watch_flush(static_cast<int>(w));
}

void report_deadlock() {
    int at_barrier = 0, unfinished = 0;
    Lane* first = nullptr;
    for (Lane& lane : lanes) {
        unfinished += !lane.finished;
        if (lane.at_block_barrier && !first) first = &lane;
        at_barrier += lane.at_block_barrier;
    }
    if (first) {  // name one thread that is missing: one that waits elsewhere, else one that has returned
        const Lane* absent = nullptr;
        for (Lane& lane : lanes)
            if (!lane.at_block_barrier && (!absent || (absent->finished && !lane.finished))) absent = &lane;
        current = first;
        report(BLOCK_DEADLOCK, first->pc, absent, absent && !absent->finished ? absent->pc : 0, -2, 0, 0, at_barrier,
               static_cast<int>(lanes.size()) - at_barrier);
    }
    for (Lane& lane : lanes) {
        if (!lane.waiting || lane.at_block_barrier) continue;
        int waiting = 0, wanted = __builtin_popcount(lane.mask & existing[lane.warp]);
        const Lane* absent = nullptr;
        bool leader = true;
        for (int l = 0; l < 32; ++l) {
            if (!((lane.mask & existing[lane.warp]) >> l & 1)) continue;
            Lane& other = lanes[lane.warp * 32 + l];
            const bool same = other.waiting && !other.at_block_barrier && other.mask == lane.mask && other.pc == lane.pc;
            if (same && other.lane < lane.lane) leader = false;
            waiting += same;
            if (!same && !absent) absent = &other;
        }
        if (!leader) continue;
        current = &lane;
        report(WARP_DEADLOCK, lane.pc, absent, absent && !absent->finished ? absent->pc : 0, -2, 0, 0, waiting,
               wanted - waiting);
    }
}

#if defined(__linux__) && (defined(__x86_64__) || defined(__aarch64__))
// A kernel that divides an integer by zero, or runs off the end of a function without `return`, would take the process
// with it. Its signal sends the fibre to `crashed` instead, at the top of its stack: a finding like any other.
constexpr int CRASHES[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP};
constexpr int CRASH_COUNT = sizeof CRASHES / sizeof *CRASHES;
struct sigaction handlers_before[CRASH_COUNT];
uint64_t crash_pc = 0;
int crash_signal = 0;

void crashed() {
    Dl_info here{}, there{};
    dladdr(reinterpret_cast<void*>(&crashed), &here);
    const bool ours = dladdr(reinterpret_cast<void*>(crash_pc), &there) && there.dli_fbase == here.dli_fbase;
    report(CRASH, ours ? crash_pc : reinterpret_cast<uint64_t>(&crashed), nullptr, 0, -2, 0, crash_signal);
    abandon();
}

void on_crash(int signal_number, siginfo_t*, void* where) {
    auto& at = static_cast<ucontext_t*>(where)->uc_mcontext;
#ifdef __x86_64__
    auto &pc = at.gregs[REG_RIP], &stack = at.gregs[REG_RSP];
    const uint64_t below_top = 8;  // as after a call
#else
    auto &pc = at.pc, &stack = at.sp;
    const uint64_t below_top = 16;
#endif
    const auto begin = reinterpret_cast<uint64_t>(stack_pool), sp = static_cast<uint64_t>(stack);
    if (!stack_pool || sp < begin || sp >= begin + stack_pool_threads * STACK_BYTES) {  // not a kernel's: die of it
        signal(signal_number, SIG_DFL);
        return;
    }
    crash_pc = pc, crash_signal = signal_number;
    pc = reinterpret_cast<uint64_t>(&crashed);
    stack = reinterpret_cast<uint64_t>(current->stack + STACK_BYTES) - below_top;
}

struct CatchCrashes {
    CatchCrashes() {
        struct sigaction ours{};
        ours.sa_sigaction = on_crash;
        ours.sa_flags = SA_SIGINFO;
        for (int i = 0; i < CRASH_COUNT; ++i) sigaction(CRASHES[i], &ours, &handlers_before[i]);
    }
    ~CatchCrashes() {
        for (int i = 0; i < CRASH_COUNT; ++i) sigaction(CRASHES[i], &handlers_before[i], nullptr);
    }
};
#else
struct CatchCrashes {
    CatchCrashes() {}
};
#endif

}  // namespace

void report(Finding kind, uint64_t pc, const Lane* other, uint64_t other_pc, int region, int64_t offset, int size,
            int waiting, int missing) {
    for (const Report& r : reports)  // one report a place and kind
        if (r.kind == kind && r.pc == pc && r.other_pc == other_pc) return;
    if (reports.size() >= MAX_REPORTS) return;
    Report r{};
    r.kind = kind, r.size = size, r.region = region, r.offset = offset, r.pc = pc, r.other_pc = other_pc;
    r.waiting = waiting, r.missing = missing;
    const Context& c = current->context;
    const int block[3] = {int(c.block.x), int(c.block.y), int(c.block.z)};
    const int thread[3] = {int(c.thread.x), int(c.thread.y), int(c.thread.z)};
    memcpy(r.block, block, sizeof block);
    memcpy(r.thread, thread, sizeof thread);
    if (other) {
        const uint3& t = other->context.thread;
        const int o[3] = {int(t.x), int(t.y), int(t.z)};
        memcpy(r.other_thread, o, sizeof o);
    } else {
        r.other_thread[0] = -1;
    }
    reports.push_back(r);
}

void abandon() {
    abandoned = true;
    to_scheduler();
    abort();
}

void* dynamic_shared() { return dynamic_arena; }

void block_barrier() {
    Lane& me = *current;
    me.pc = EMU_PC;
    int arrived = 1;
    for (const Lane& lane : lanes) {
        arrived += lane.at_block_barrier;
        if (watching && lane.at_block_barrier && lane.pc != me.pc) report(DIVERGENT_BARRIER, me.pc, &lane, lane.pc);
    }
    if (arrived == static_cast<int>(lanes.size())) {
        release_block();
        return;
    }
    me.waiting = me.at_block_barrier = true;
    to_scheduler();
}

uint64_t shuffle(uint32_t mask, uint64_t value, int kind, int operand, int width) {
    current->value = value, current->operand = kind << 16 | (operand & 0xffff), current->width = width;
    Lane* me = current;
    meet(mask, SHUFFLE, EMU_PC);
    return me->result;
}
uint32_t vote(uint32_t mask, bool predicate) {
    Lane* me = current;
    me->value = predicate;
    meet(mask, VOTE, EMU_PC);
    return static_cast<uint32_t>(me->result);
}
void warp_barrier(uint32_t mask) { meet(mask, BARRIER, EMU_PC); }
uint32_t active_mask() {
    uint32_t mask = 0;
    for (int l = 0; l < 32; ++l)
        if (existing[current->warp] >> l & 1 && !lanes[current->warp * 32 + l].finished) mask |= 1u << l;
    return mask;
}
void load_matrices(uint32_t* r, const void* row, bool transpose) {
    Lane* me = current;
    if (watching) watch_access(row, 16, false, EMU_PC);
    me->row = row, me->operand = transpose;
    meet(~0u, LOAD_MATRICES, EMU_PC);
    memcpy(r, me->out, 16);
}
uint32_t transpose_matrix(uint32_t value) {
    Lane* me = current;
    me->words[0] = value;
    meet(~0u, TRANSPOSE, EMU_PC);
    return me->out[0];
}
void mma_16x8x16(float* d, const uint32_t* a, const uint32_t* b, bool bfloat) {
    Lane* me = current;
    memcpy(me->words, a, 16);
    memcpy(me->words + 4, b, 8);
    memcpy(me->accumulator, d, 16);
    meet(~0u, bfloat ? MMA_BFLOAT : MMA_HALF, EMU_PC);
    memcpy(d, me->accumulator, 16);
}

// A copy is made when it is waited for and not earlier, so that a missing wait or barrier shows.
void async_copy(void* to, const void* from, int bytes, int valid) {
    if (watching && valid) watch_access(from, valid, false, EMU_PC);
    current->uncommitted.push_back({to, from, bytes, valid, EMU_PC});
}
void async_commit() {
    current->groups.push_back(std::move(current->uncommitted));
    current->uncommitted.clear();
}
void async_wait(int groups_left) {
    auto& groups = current->groups;
    size_t done = groups.size() > static_cast<size_t>(groups_left) ? groups.size() - groups_left : 0;
    for (size_t i = 0; i < done; ++i)
        for (const PendingCopy& c : groups[i]) {
            if (watching) watch_access(c.to, c.bytes, true, c.pc);
            memcpy(c.to, c.from, c.valid);
            memset(static_cast<char*>(c.to) + c.valid, 0, c.bytes - c.valid);
        }
    groups.erase(groups.begin(), groups.begin() + done);
}

void copy(void* to, const void* from, int bytes) {
    if (watching) {
        watch_access(from, bytes, false, EMU_PC);
        watch_access(to, bytes, true, EMU_PC);
    }
    memcpy(to, from, bytes);
}

uint64_t atomic(void* address, int bytes, uint64_t operand, uint64_t compare, int operation) {
    if (watching) watch_access(address, bytes, true, EMU_PC, true, true);
    uint64_t old = 0, now = operand;
    memcpy(&old, address, bytes);
    if (operation == ADD_INT) now = old + operand;
    else if (operation == MAX_INT) now = int32_t(old) > int32_t(operand) ? old : operand;
    else if (operation == MIN_INT) now = int32_t(old) < int32_t(operand) ? old : operand;
    else if (operation == CAS) now = old == compare ? operand : old;
    else if (operation == ADD_FLOAT) {
        float a, b;
        memcpy(&a, &old, 4);
        memcpy(&b, &operand, 4);
        a += b;
        now = 0;
        memcpy(&now, &a, 4);
    }
    memcpy(address, &now, bytes);
    return old;
}

}  // namespace emu

using namespace emu;

// Weak: a kernel without static shared memory has no such section.
extern "C" __attribute__((weak, visibility("hidden"))) char __start_emu_shared, __stop_emu_shared;

// Runs a launch. Returns the number of findings (see emu_reports).
extern "C" int emu_launch(void** args, const int* grid, const int* block, int64_t shared_bytes, const Region* regions,
                          int region_count, int watch, uint64_t max_steps) {
    const int threads = block[0] * block[1] * block[2];
    kernel_args = args, abandoned = false, watching = watch != 0;
    reports.clear();
    totals = Totals{};
    if (stack_pool_threads < static_cast<size_t>(threads)) {
        if (stack_pool) munmap(stack_pool, stack_pool_threads * STACK_BYTES);
        stack_pool = static_cast<char*>(mmap(nullptr, threads * STACK_BYTES, PROT_READ | PROT_WRITE,
                                             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
        if (stack_pool == MAP_FAILED) { stack_pool = nullptr, stack_pool_threads = 0; return -1; }
        stack_pool_threads = threads;
    }
    // A guard on both sides: an access past the end of shared memory is seen, not a crash of the process.
    constexpr int64_t GUARD = 1 << 16;
    std::vector<char> arena(shared_bytes + 2 * GUARD + 128);
    dynamic_arena = arena.data() + GUARD + (128 - reinterpret_cast<uintptr_t>(arena.data() + GUARD) % 128) % 128;
    static_shared_begin = &__start_emu_shared, static_shared_end = &__stop_emu_shared;
    if (!static_shared_begin) static_shared_end = nullptr;
    if (watching) watch_begin(regions, region_count, dynamic_arena, shared_bytes, max_steps);

    lanes.assign(threads, Lane{});
    existing.assign((threads + 31) / 32, 0);
    for (int i = 0; i < threads; ++i) existing[i / 32] |= 1u << (i % 32);
#ifndef EMU_ASSEMBLY
    contexts.resize(threads);
#endif
    CatchCrashes catch_crashes;
    for (int z = 0; z < grid[2] && !abandoned; ++z)
        for (int y = 0; y < grid[1] && !abandoned; ++y)
            for (int x = 0; x < grid[0] && !abandoned; ++x) {
                // All-ones bytes are NaN in every float type: unwritten shared memory poisons what reads it.
                memset(dynamic_arena, 0xff, shared_bytes);
                if (static_shared_begin) memset(static_shared_begin, 0xff, static_shared_end - static_shared_begin);
                block_first_epoch = ++block_epoch;
                for (int i = 0; i < threads; ++i) {
                    Lane& lane = lanes[i];
                    lane.finished = lane.waiting = lane.at_block_barrier = false;
                    lane.index = i, lane.warp = i / 32, lane.lane = i % 32, lane.warp_syncs = 0;
                    lane.groups.clear();
                    lane.uncommitted.clear();
                    lane.stack = stack_pool + i * STACK_BYTES;
                    lane.context.thread = {unsigned(i % block[0]), unsigned(i / block[0] % block[1]),
                                           unsigned(i / block[0] / block[1])};
                    lane.context.block = {unsigned(x), unsigned(y), unsigned(z)};
                    lane.context.block_dim = dim3(block[0], block[1], block[2]);
                    lane.context.grid_dim = dim3(grid[0], grid[1], grid[2]);
                    prepare(lane);
                }
                if (watching) watch_block();
                for (bool progress = true; progress && !abandoned;) {
                    progress = false;
                    for (Lane& lane : lanes) {
                        if (lane.finished || lane.waiting) continue;
                        progress = true;
                        resume(lane);
                        if (abandoned) break;
                    }
                }
                for (const Lane& lane : lanes)
                    if (!lane.finished && !abandoned) {
                        report_deadlock();
                        abandoned = true;
                    }
                if (watching)
                    for (size_t w = 0; w < existing.size(); ++w) watch_flush(static_cast<int>(w));
            }
    if (watching) watch_end();
    watching = false;  // what is called between launches is nobody's access
    return static_cast<int>(reports.size());
}
extern "C" const Report* emu_reports() { return reports.data(); }
extern "C" const Totals* emu_totals() { return &totals; }
