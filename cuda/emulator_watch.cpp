// What an instrumented kernel reports and what is made of it: bounds, initialisation, races, transactions,
// bank conflicts, divergence. The compiler's thread sanitizer calls the __tsan_ functions below before every
// load and store; its coverage pass calls __sanitizer_cov_trace_pc in every basic block.
#include "emulator_internal.h"

#include <algorithm>
#include <unordered_map>

namespace emu {

Totals totals;
char* static_shared_begin = nullptr;
char* static_shared_end = nullptr;

namespace {

constexpr uint16_t NOBODY = 0xffff;

// Who touched a byte last, for race detection; valid only where the epoch is the present one.
struct Touch {
    uint16_t writer = NOBODY, reader = NOBODY;
    uint16_t write_sync = 0, read_sync = 0;      // warp barriers that the thread had passed
    int write_epoch = 0, read_epoch = 0;
    bool several_lanes = false, several_warps = false;  // read by more than one lane of the warp, more warps
    uint64_t write_pc = 0, read_pc = 0;
};
struct Watched {
    char* begin;
    int64_t bytes;
    int region;
    bool shared;
    std::vector<bool> initialised;
    std::vector<Touch> touched;
};
struct Access {  // the n-th execution of one instruction by the lanes of a warp
    uint32_t lanes = 0;
    uint64_t address[32];
    uint16_t size[32];
};
struct Site {
    uint32_t executed[32] = {};
    int space = 0;
    bool write = false;
    std::vector<Access> accesses;
};
struct Step { uint32_t executed[32] = {}; };
struct Warp {
    std::unordered_map<uint64_t, Site> sites;
    std::unordered_map<uint64_t, Step> steps;
};

std::vector<Watched> watched;
std::vector<Warp> warps;
std::unordered_map<uint64_t, Counter> counters;
std::vector<Counter> finished_counters;
std::vector<WarpAccess> kept;
constexpr size_t MOST_KEPT = 512;
uint64_t steps_left = 0;

Watched* find(uint64_t address) {
    for (Watched& w : watched) {
        const uint64_t begin = reinterpret_cast<uint64_t>(w.begin);
        if (address >= begin && address < begin + w.bytes) return &w;
    }
    return nullptr;
}
// The nearest argument within a guard zone's reach: to say by how much an access missed it.
Watched* nearest(uint64_t address, int64_t& offset) {
    Watched* best = nullptr;
    int64_t distance = 1 << 20;
    for (Watched& w : watched) {
        const int64_t from_begin = static_cast<int64_t>(address - reinterpret_cast<uint64_t>(w.begin));
        const int64_t gap = from_begin < 0 ? -from_begin : from_begin - w.bytes;
        if (gap < distance) best = &w, distance = gap, offset = from_begin;
    }
    return best;
}
// Memory of the emulator itself: the fibre's stack, and the loaded program with its constants.
extern "C" __attribute__((visibility("hidden"))) char __ehdr_start, _end;
bool own_memory(uint64_t a) {
    const uint64_t stack = reinterpret_cast<uint64_t>(current->stack);
    if (a >= stack && a < stack + (128 << 10)) return true;
    const uint64_t begin = reinterpret_cast<uint64_t>(&__ehdr_start), end = reinterpret_cast<uint64_t>(&_end);
    if (a >= begin && a < end) return true;
    const uint64_t lanes_begin = reinterpret_cast<uint64_t>(lanes.data());
    return a >= lanes_begin && a < lanes_begin + lanes.size() * sizeof(Lane);
}

bool ordered(int other, uint16_t other_sync) {  // by a warp barrier since then
    return lanes[other].warp == current->warp && static_cast<uint16_t>(current->warp_syncs) != other_sync;
}

void check_race(Watched& w, int64_t offset, int size, bool write, uint64_t pc) {
    if (w.touched.empty()) w.touched.resize(w.bytes);
    const uint16_t me = static_cast<uint16_t>(current->index), sync = static_cast<uint16_t>(current->warp_syncs);
    const Touch* conflict = nullptr;
    int other = -1;
    for (int64_t i = offset; i < offset + size; ++i) {
        Touch& t = w.touched[i];
        if (t.write_epoch == block_epoch && t.writer != me && !ordered(t.writer, t.write_sync))
            conflict = &t, other = t.writer;
        // Two blocks never meet at a barrier: that both write one place is a race unless it is atomic.
        if (write && t.write_epoch && t.write_epoch < block_first_epoch && !w.shared) conflict = &t, other = -2;
        if (write && t.read_epoch == block_epoch &&
            (t.several_warps || (t.reader != me || t.several_lanes))) {
            const bool safe = !t.several_warps && ordered(t.reader, t.read_sync);
            if (!safe && !conflict) conflict = &t, other = t.reader == me ? -1 : t.reader;
        }
        if (conflict) {
            const uint64_t other_pc = t.write_epoch && other != t.reader ? t.write_pc : t.read_pc;
            report(RACE, pc, other >= 0 ? &lanes[other] : nullptr, other_pc, w.region, i, size);
            conflict = nullptr;
        }
        if (write) {
            t.writer = me, t.write_epoch = block_epoch, t.write_sync = sync, t.write_pc = pc;
        } else if (t.read_epoch != block_epoch) {
            t.reader = me, t.read_epoch = block_epoch, t.read_sync = sync, t.read_pc = pc;
            t.several_lanes = t.several_warps = false;
        } else if (t.reader != me) {
            if (lanes[t.reader].warp != current->warp) t.several_warps = true;
            else if (t.read_sync == sync) t.several_lanes = true;
            else t.several_lanes = false;
            t.reader = me, t.read_sync = sync, t.read_pc = pc;
        } else {
            t.read_sync = sync;
        }
    }
}

// Shared memory: 32 banks of 4 bytes. 8-byte accesses go by half warps, 16-byte ones by quarter warps.
void count_banks(const Access& a, Counter& c) {
    int size = 4;
    for (int l = 0; l < 32; ++l)
        if (a.lanes >> l & 1) size = std::max<int>(size, a.size[l]);
    const int phase_lanes = size <= 4 ? 32 : size <= 8 ? 16 : 8;
    for (int first = 0; first < 32; first += phase_lanes) {
        std::vector<uint64_t> words[32];
        size_t worst = 0;
        for (int l = first; l < first + phase_lanes; ++l) {
            if (!(a.lanes >> l & 1)) continue;
            for (uint64_t word = a.address[l] / 4; word <= (a.address[l] + a.size[l] - 1) / 4; ++word) {
                auto& bank = words[word % 32];
                if (std::find(bank.begin(), bank.end(), word) == bank.end()) bank.push_back(word);
                worst = std::max(worst, bank.size());
            }
        }
        c.passes += worst;
        if (worst > 1) c.conflicts += worst - 1;
    }
}

void count(const Access& a, uint64_t key, uint64_t pc, const Site& site) {
    Counter& c = counters[key];
    c.pc = pc, c.space = site.space, c.write = site.write;
    ++c.requests;
    std::vector<uint64_t> sectors;
    sectors.reserve(64);
    for (int l = 0; l < 32; ++l) {
        if (!(a.lanes >> l & 1)) continue;
        ++c.lanes;
        c.bytes += a.size[l];
        for (uint64_t s = a.address[l] / 32; s <= (a.address[l] + a.size[l] - 1) / 32; ++s) sectors.push_back(s);
    }
    if (site.space & 1) {
        count_banks(a, c);
    } else {
        std::sort(sectors.begin(), sectors.end());
        c.sectors += std::unique(sectors.begin(), sectors.end()) - sectors.begin();
    }
}

void keep(const Access& a, uint64_t pc, const Site& site) {
    const int first = __builtin_ctz(a.lanes);
    WarpAccess k{pc, site.space, site.write, -1, a.lanes, a.size[first], {}};
    uint64_t begin = 0;  // shared memory's addresses are offsets already
    if (!(site.space & 1)) {
        const Watched* w = find(a.address[first]);
        if (!w) return;
        k.region = w->region, begin = reinterpret_cast<uint64_t>(w->begin);
    }
    for (int l = 0; l < 32; ++l)
        if (a.lanes >> l & 1) k.offset[l] = static_cast<int64_t>(a.address[l] - begin);
    kept.push_back(k);
}

}  // namespace

void watch_begin(const Region* regions, int count, char* shared, int64_t shared_bytes, uint64_t max_steps) {
    watched.clear();
    counters.clear();
    kept.clear();
    steps_left = max_steps;
    for (int i = 0; i < count; ++i)
        watched.push_back({regions[i].begin, regions[i].bytes, i, false,
                           std::vector<bool>(regions[i].bytes, regions[i].initialised != 0), {}});
    if (shared_bytes) watched.push_back({shared, shared_bytes, -1, true, {}, {}});
    if (static_shared_begin)
        watched.push_back({static_shared_begin, static_shared_end - static_shared_begin, -1, true, {}, {}});
}

void watch_block() {
    warps.assign((lanes.size() + 31) / 32, Warp{});
    for (Watched& w : watched)
        if (w.shared) w.initialised.assign(w.bytes, false), w.touched.clear();
}

void watch_access(const void* pointer, int size, bool write, uint64_t pc, bool counted, bool atomic) {
    const uint64_t address = reinterpret_cast<uint64_t>(pointer);
    Watched* w = find(address);
    if (!w || address + size > reinterpret_cast<uint64_t>(w->begin) + w->bytes) {
        if (!w && own_memory(address)) return;
        int64_t offset = 0;
        Watched* near = nearest(address, offset);
        report(write ? OUT_OF_BOUNDS_WRITE : OUT_OF_BOUNDS_READ, pc, nullptr, 0, near ? near->region : -2, offset, size);
        abandon();  // before the access is made: the process lives on
    }
    const int64_t offset = static_cast<int64_t>(address - reinterpret_cast<uint64_t>(w->begin));
    if (size > 1 && (size & (size - 1)) == 0 && address % size) {
        report(MISALIGNED, pc, nullptr, 0, w->region, offset, size);
        abandon();
    }
    if (!write || atomic)
        for (int64_t i = offset; i < offset + size; ++i)
            if (!w->initialised[i]) {
                report(UNINITIALISED_READ, pc, nullptr, 0, w->region, i, size);
                break;
            }
    if (write)
        for (int64_t i = offset; i < offset + size; ++i) w->initialised[i] = true;
    if (!atomic) check_race(*w, offset, size, write, pc);
    if (!counted) return;
    const int space = (w->shared ? 1 : 0) + (atomic ? 2 : 0);
    Site& site = warps[current->warp].sites[pc * 8 + space * 2 + write];  // one instruction may reach both memories
    site.space = space, site.write = write;
    const uint32_t n = site.executed[current->lane]++;
    if (site.accesses.size() <= n) site.accesses.resize(n + 1);
    Access& a = site.accesses[n];
    a.lanes |= 1u << current->lane;
    a.address[current->lane] = w->shared ? static_cast<uint64_t>(offset) : address;
    a.size[current->lane] = static_cast<uint16_t>(size);
}

void watch_flush(int index) {
    Warp& warp = warps[index];
    const uint3& block = lanes[0].context.block;
    const bool first_warp = index == 0 && block.x + block.y + block.z == 0;
    for (auto& [key, site] : warp.sites) {
        for (const Access& a : site.accesses) {
            count(a, key, key / 8, site);
            if (first_warp && kept.size() < MOST_KEPT) keep(a, key / 8, site);
        }
        site.accesses.clear();
        std::fill(std::begin(site.executed), std::end(site.executed), 0);
    }
    const int existing = std::min<int>(32, static_cast<int>(lanes.size()) - 32 * index);
    for (auto& [pc, step] : warp.steps) {
        std::sort(step.executed, step.executed + existing);
        const uint32_t fewest = step.executed[0], most = step.executed[existing - 1];
        totals.steps += most;
        totals.divergent_steps += most - fewest;
        for (int l = 0; l < existing; ++l) totals.lane_steps += step.executed[l];
        std::fill(std::begin(step.executed), std::end(step.executed), 0);
    }
}

void watch_end() {
    finished_counters.clear();
    for (auto& entry : counters) finished_counters.push_back(entry.second);
    watched.clear();
}

}  // namespace emu

using namespace emu;

extern "C" int emu_counters(const Counter** out) {
    *out = finished_counters.data();
    return static_cast<int>(finished_counters.size());
}
extern "C" int emu_accesses(const WarpAccess** out) {
    *out = kept.data();
    return static_cast<int>(kept.size());
}
extern "C" uint64_t emu_base() { return reinterpret_cast<uint64_t>(&__ehdr_start); }

extern "C" void __sanitizer_cov_trace_pc() {
    if (!watching || !current) return;
    if (steps_left-- == 0) {
        report(TOO_MANY_STEPS, EMU_PC);
        abandon();
    }
    ++warps[current->warp].steps[EMU_PC].executed[current->lane];
}

#define EMU_TSAN(N)                                                                                       \
    extern "C" void __tsan_read##N(void* p) { if (watching) watch_access(p, N, false, EMU_PC); }           \
    extern "C" void __tsan_write##N(void* p) { if (watching) watch_access(p, N, true, EMU_PC); }           \
    extern "C" void __tsan_unaligned_read##N(void* p) { if (watching) watch_access(p, N, false, EMU_PC); } \
    extern "C" void __tsan_unaligned_write##N(void* p) { if (watching) watch_access(p, N, true, EMU_PC); }
EMU_TSAN(1)
EMU_TSAN(2)
EMU_TSAN(4)
EMU_TSAN(8)
EMU_TSAN(16)
extern "C" void __tsan_read_range(void* p, long n) { if (watching) watch_access(p, static_cast<int>(n), false, EMU_PC); }
extern "C" void __tsan_write_range(void* p, long n) { if (watching) watch_access(p, static_cast<int>(n), true, EMU_PC); }
extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
