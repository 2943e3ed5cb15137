// CUDA C++ on a CPU: what a kernel's source needs so that the host C++ compiler can build it unmodified.
//
// Every CUDA thread is a fibre (its own stack, switched in a few nanoseconds); one block runs at a time, on
// one OS thread, so a run is deterministic. A fibre runs until it meets a barrier, a warp operation or its
// end. The runtime behind these declarations is emulator_run.cpp and emulator_watch.cpp;
// it is compiled once and linked to each kernel.
//
// Two ways to build a kernel (nanopd_lab/kernels/emulator.py does it):
//   fast          plain -O2, only the results matter; shared memory starts as NaNs, so a read of memory that
//                 nobody wrote still shows.
//   instrumented  -fsanitize=thread -fsanitize-coverage=trace-pc, with the runtime supplying those entry
//                 points itself: every load, store and basic block of the *unmodified* source reports in.
//
// What differs from a GPU: blocks run one after the other (a block that waits for another never ends), lanes
// don't run in lock step between barriers, __activemask() names all lanes that still live.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#define NANOPD_EMULATOR 1
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))
#define __constant__ static const
// One section holds all static shared memory, so that the runtime can poison and watch it as a whole.
#define __shared__ static __attribute__((section("emu_shared")))

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct uint3 { unsigned x, y, z; };

namespace emu {

struct Context { uint3 thread, block; dim3 block_dim, grid_dim; };
extern Context* context;  // of the fibre that runs now

// Runtime entry points. Each is a real call, so that its return address names the kernel's source line.
void* dynamic_shared();
void block_barrier();
uint64_t shuffle(uint32_t mask, uint64_t value, int kind, int operand, int width);
uint32_t vote(uint32_t mask, bool predicate);           // the ballot of the lanes in `mask`
void warp_barrier(uint32_t mask);
uint32_t active_mask();
void copy(void* to, const void* from, int bytes);       // one access of `bytes` on either side
void async_copy(void* shared, const void* global, int bytes, int valid_bytes);
void async_commit();
void async_wait(int groups_left);
void load_matrices(uint32_t* r, const void* row, bool transpose);
uint32_t transpose_matrix(uint32_t value);
void mma_16x8x16(float* d, const uint32_t* a, const uint32_t* b, bool bfloat);
uint64_t atomic(void* address, int bytes, uint64_t operand, uint64_t compare, int operation);
enum { IDX, UP, DOWN, XOR };
enum { ADD_INT, ADD_FLOAT, MAX_INT, MIN_INT, EXCHANGE, CAS };

// Moves a 16- or 8-byte vector as one access, as the GPU does; a plain struct copy would be split.
template <class T> struct Whole {
    static __forceinline__ void move(T* to, const T* from) { copy(to, from, sizeof(T)); }
};

template <class F> struct Signature;
template <class... A> struct Signature<void (*)(A...)> {
    static constexpr int count = sizeof...(A);
    static void sizes(int* out) { int i = 0; ((out[i++] = sizeof(A)), ...); }
    static void kinds(char* out) {
        int i = 0;
        ((out[i++] = kind_of<A>()), ...);
    }
    template <class T> static char kind_of() {
        if constexpr (is_pointer<T>::value) return 'p';
        else if constexpr (is_same<T, float>::value || is_same<T, double>::value) return 'f';
        else return 'i';
    }
    template <class T> struct is_pointer { static constexpr bool value = false; };
    template <class T> struct is_pointer<T*> { static constexpr bool value = true; };
    template <class T, class U> struct is_same { static constexpr bool value = false; };
    template <class T> struct is_same<T, T> { static constexpr bool value = true; };
    // Reads the launch's own argument list: not the kernel's doing, so not watched.
    __attribute__((no_sanitize("thread"))) static void call(void (*f)(A...), void** args) { apply<0, A...>(f, args); }
    template <int I, class First, class... Rest, class... Done>
    __attribute__((no_sanitize("thread"))) static void apply(void (*f)(A...), void** args, Done... done) {
        if constexpr (sizeof...(Rest) == 0) f(done..., *static_cast<First*>(args[I]));
        else apply<I + 1, Rest...>(f, args, done..., *static_cast<First*>(args[I]));
    }
};

}  // namespace emu

#define threadIdx (emu::context->thread)
#define blockIdx (emu::context->block)
#define blockDim (emu::context->block_dim)
#define gridDim (emu::context->grid_dim)
static constexpr int warpSize = 32;

// Vector types whose copies stay whole. Trivial default construction keeps `__shared__ float4 x[64];` legal.
#define EMU_VECTOR4(NAME, T)                                                                         \
    struct alignas(sizeof(T) * 4) NAME {                                                             \
        T x, y, z, w;                                                                                \
        NAME() = default;                                                                            \
        __forceinline__ NAME(T a, T b, T c, T d) : x(a), y(b), z(c), w(d) {}                         \
        __forceinline__ NAME(const NAME& o) { emu::Whole<NAME>::move(this, &o); }                    \
        __forceinline__ NAME& operator=(const NAME& o) { emu::Whole<NAME>::move(this, &o); return *this; } \
    };                                                                                               \
    static __forceinline__ NAME make_##NAME(T a, T b, T c, T d) { return NAME(a, b, c, d); }
#define EMU_VECTOR2(NAME, T)                                                                         \
    struct alignas(sizeof(T) * 2) NAME {                                                             \
        T x, y;                                                                                      \
        NAME() = default;                                                                            \
        __forceinline__ NAME(T a, T b) : x(a), y(b) {}                                               \
        __forceinline__ NAME(const NAME& o) { emu::Whole<NAME>::move(this, &o); }                    \
        __forceinline__ NAME& operator=(const NAME& o) { emu::Whole<NAME>::move(this, &o); return *this; } \
    };                                                                                               \
    static __forceinline__ NAME make_##NAME(T a, T b) { return NAME(a, b); }
EMU_VECTOR4(float4, float)
EMU_VECTOR4(int4, int)
EMU_VECTOR4(uint4, unsigned)
EMU_VECTOR2(float2, float)
EMU_VECTOR2(int2, int)
EMU_VECTOR2(uint2, unsigned)

#define __syncthreads() emu::block_barrier()
static __forceinline__ void __syncwarp(unsigned mask = 0xffffffffu) { emu::warp_barrier(mask); }
static __forceinline__ unsigned __activemask() { return emu::active_mask(); }
static __forceinline__ void __threadfence() {}
static __forceinline__ void __threadfence_block() {}
static __forceinline__ unsigned __ballot_sync(unsigned mask, int p) { return emu::vote(mask, p != 0); }
static __forceinline__ int __any_sync(unsigned mask, int p) { return emu::vote(mask, p != 0) != 0; }
static __forceinline__ int __all_sync(unsigned mask, int p) { return emu::vote(mask, p == 0) == 0; }

#define EMU_SHUFFLE(NAME, KIND)                                                                      \
    template <class T> static __forceinline__ T NAME(unsigned mask, T v, int operand, int width = 32) { \
        static_assert(sizeof(T) <= 8, "a shuffle moves at most 8 bytes");                            \
        uint64_t raw = 0;                                                                            \
        __builtin_memcpy(&raw, &v, sizeof(T));                                                       \
        raw = emu::shuffle(mask, raw, emu::KIND, operand, width);                                    \
        __builtin_memcpy(&v, &raw, sizeof(T));                                                       \
        return v;                                                                                    \
    }
EMU_SHUFFLE(__shfl_sync, IDX)
EMU_SHUFFLE(__shfl_up_sync, UP)
EMU_SHUFFLE(__shfl_down_sync, DOWN)
EMU_SHUFFLE(__shfl_xor_sync, XOR)

#define EMU_ATOMIC(NAME, T, OP)                                                                      \
    static __forceinline__ T NAME(T* p, T v) {                                                       \
        uint64_t raw = 0;                                                                            \
        __builtin_memcpy(&raw, &v, sizeof(T));                                                       \
        raw = emu::atomic(p, sizeof(T), raw, 0, emu::OP);                                            \
        __builtin_memcpy(&v, &raw, sizeof(T));                                                       \
        return v;                                                                                    \
    }
EMU_ATOMIC(atomicAdd, int, ADD_INT)
EMU_ATOMIC(atomicAdd, unsigned, ADD_INT)
EMU_ATOMIC(atomicAdd, unsigned long long, ADD_INT)
EMU_ATOMIC(atomicAdd, float, ADD_FLOAT)
EMU_ATOMIC(atomicMax, int, MAX_INT)
EMU_ATOMIC(atomicMin, int, MIN_INT)
EMU_ATOMIC(atomicExch, int, EXCHANGE)
EMU_ATOMIC(atomicExch, unsigned, EXCHANGE)
static __forceinline__ int atomicCAS(int* p, int compare, int v) {
    return static_cast<int>(emu::atomic(p, 4, static_cast<uint32_t>(v), static_cast<uint32_t>(compare), emu::CAS));
}

template <class T> static __forceinline__ T __ldg(const T* p) { return *p; }
#define __expf expf  // names that the C library keeps for itself
#define __logf logf
static __forceinline__ float __fdividef(float a, float b) { return a / b; }
static __forceinline__ float rsqrtf(float x) { return 1.0f / sqrtf(x); }
static __forceinline__ unsigned __float_as_uint(float x) { unsigned u; __builtin_memcpy(&u, &x, 4); return u; }
static __forceinline__ float __uint_as_float(unsigned u) { float x; __builtin_memcpy(&x, &u, 4); return x; }
static __forceinline__ int __popc(unsigned x) { return __builtin_popcount(x); }
static __forceinline__ int __ffs(int x) { return __builtin_ffs(x); }
static __forceinline__ int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
#define EMU_MINMAX(T)                                                        \
    static __forceinline__ T min(T a, T b) { return b < a ? b : a; }         \
    static __forceinline__ T max(T a, T b) { return a < b ? b : a; }
EMU_MINMAX(int)
EMU_MINMAX(unsigned)
EMU_MINMAX(long long)
EMU_MINMAX(float)

// nanopd_lab appends EMU_ENTRY(kernel) to the source: an entry point that takes untyped arguments.
#define EMU_ENTRY(KERNEL)                                                                            \
    extern "C" __attribute__((visibility("default"), no_sanitize("thread"))) void emu_entry(void** args) { \
        emu::Signature<decltype(&KERNEL)>::call(&KERNEL, args);                                      \
    }                                                                                                \
    extern "C" __attribute__((visibility("default"))) int emu_parameters(int* sizes, char* kinds) {  \
        emu::Signature<decltype(&KERNEL)>::sizes(sizes);                                             \
        emu::Signature<decltype(&KERNEL)>::kinds(kinds);                                             \
        return emu::Signature<decltype(&KERNEL)>::count;                                             \
    }
