// The few things that CUDA C++ and the emulator spell differently: 16-bit floats, whole 16-byte accesses,
// asynchronous copies and tensor-core instructions. A kernel that includes this file and nothing else is
// compiled by NVRTC for a GPU (no toolkit headers needed: that is why the 16-bit types are our own) and by
// the host compiler for the emulator.
#pragma once
#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#define NANOPD_GPU 1
#else
#include "emulator.h"
#endif

using u16 = unsigned short;
using u32 = unsigned int;
using i64 = long long;
using u64 = unsigned long long;

struct float16 { u16 bits; };
struct bfloat16 { u16 bits; };

#define FULL_WARP 0xffffffffu
#define DEVICE static __forceinline__ __device__
#define DEVICE_METHOD __forceinline__ __device__

// ---- conversions ------------------------------------------------------------------------------------------

DEVICE float to_float(float x) { return x; }
DEVICE float to_float(bfloat16 x) { return __uint_as_float(static_cast<u32>(x.bits) << 16); }

#ifdef NANOPD_GPU
DEVICE float to_float(float16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}
DEVICE float16 to_float16(float x) {
    float16 y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
}
// Two values in one register, `low` in the lower half: how tensor cores take their operands.
DEVICE u32 pack2(float low, float high, float16) {
    u32 r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}
DEVICE u32 pack2(float low, float high, bfloat16) {
    u32 r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}
DEVICE bfloat16 to_bfloat16(float x) {
    bfloat16 y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
}
DEVICE float exp2_fast(float x) {  // 2 ulp, exp2(-inf) = 0
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
#else
DEVICE float to_float(float16 h) {
    const u32 sign = (h.bits & 0x8000u) << 16, exponent = (h.bits >> 10) & 31, fraction = h.bits & 1023;
    if (exponent == 31) return __uint_as_float(sign | 0x7f800000u | (fraction << 13));
    if (exponent == 0) {
        const float x = static_cast<float>(fraction) * 5.9604644775390625e-8f;  // 2^-24
        return sign ? -x : x;
    }
    return __uint_as_float(sign | ((exponent + 112) << 23) | (fraction << 13));
}
DEVICE float16 to_float16(float x) {  // round to nearest, ties to even
    const u32 u = __float_as_uint(x), sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return {static_cast<u16>(sign | 0x7e00u)};
    if (magnitude >= 0x477ff000u) return {static_cast<u16>(sign | 0x7c00u)};
    if (magnitude < 0x38800000u) {  // becomes subnormal: let the FPU round at 2^-24
        const float y = __uint_as_float(magnitude) + 0.5f;
        return {static_cast<u16>(sign | (__float_as_uint(y) - 0x3f000000u))};
    }
    const u32 rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1) - 0x38000000u;
    return {static_cast<u16>(sign | (rounded >> 13))};
}
DEVICE bfloat16 to_bfloat16(float x) {
    const u32 u = __float_as_uint(x);
    if ((u & 0x7fffffffu) > 0x7f800000u) return {static_cast<u16>((u >> 16) | 0x40u)};
    return {static_cast<u16>((u + 0x7fffu + ((u >> 16) & 1)) >> 16)};
}
DEVICE u32 pack2(float low, float high, float16) {
    return to_float16(low).bits | static_cast<u32>(to_float16(high).bits) << 16;
}
DEVICE u32 pack2(float low, float high, bfloat16) {
    return to_bfloat16(low).bits | static_cast<u32>(to_bfloat16(high).bits) << 16;
}
DEVICE float exp2_fast(float x) { return exp2f(x); }
#endif

DEVICE void assign(float& y, float x) { y = x; }
DEVICE void assign(float16& y, float x) { y = to_float16(x); }
DEVICE void assign(bfloat16& y, float x) { y = to_bfloat16(x); }

DEVICE float minus_infinity() { return __uint_as_float(0xff800000u); }

// ---- 16 bytes at a time -----------------------------------------------------------------------------------

DEVICE uint4 load16(const void* p) { return *static_cast<const uint4*>(p); }
DEVICE void store16(void* p, const uint4& v) { *static_cast<uint4*>(p) = v; }
// Between blocks. Counting in releases what this thread's block wrote before its last barrier, and acquires what the
// blocks that counted in earlier released; what another block wrote is then read past the first-level cache.
#ifdef NANOPD_GPU
DEVICE int count_in(int* counter) {
    int before;
    asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
    return before;
}
DEVICE float4 load_of_others(const float4* p) { return __ldcg(p); }
DEVICE float2 load_of_others(const float2* p) { return __ldcg(p); }
DEVICE void prefetch_l2(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }
#else
DEVICE int count_in(int* counter) { return atomicAdd(counter, 1); }
DEVICE float4 load_of_others(const float4* p) { return *p; }
DEVICE float2 load_of_others(const float2* p) { return *p; }
DEVICE void prefetch_l2(const void*) {}
#endif

// ---- a kernel and the one before it (programmatic dependent launch, sm_90) -----------------------------------
// A kernel that was launched so may begin while the one before it still runs. It must not touch what that one writes
// (or reads, if it writes there itself) before `wait_for_previous`, which every block must call: the kernel after this
// one relies on it. `begin_dependents` lets that one begin, once all blocks have called it or ended.
#if defined(NANOPD_GPU) && defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
DEVICE void wait_for_previous() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
DEVICE void begin_dependents() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
#else
DEVICE void wait_for_previous() {}
DEVICE void begin_dependents() {}
#endif

// 16 bytes that nobody needs again: they leave the first-level cache to others.
#ifdef NANOPD_GPU
DEVICE uint4 load_once(const void* p) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}
#else
DEVICE uint4 load_once(const void* p) { return load16(p); }
#endif

DEVICE void store4(float* p, float a, float b, float c, float d) {
    *reinterpret_cast<float4*>(p) = make_float4(a, b, c, d);
}
template <class T> DEVICE void store4(T* p, float a, float b, float c, float d) {
    *reinterpret_cast<uint2*>(p) = make_uint2(pack2(a, b, T{}), pack2(c, d, T{}));
}

// The 4 floats or 8 16-bit floats of a 16-byte load, as floats.
DEVICE void unpack(const uint4& v, float (&x)[4], float) {
    x[0] = __uint_as_float(v.x), x[1] = __uint_as_float(v.y), x[2] = __uint_as_float(v.z), x[3] = __uint_as_float(v.w);
}
template <class T> DEVICE void unpack(const uint4& v, float (&x)[8], T) {
    const u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        x[2 * i] = to_float(T{static_cast<u16>(words[i])});
        x[2 * i + 1] = to_float(T{static_cast<u16>(words[i] >> 16)});
    }
}

// ---- asynchronous copies to shared memory (sm_80): issue, commit a group, wait until at most N are left -----

#ifdef NANOPD_GPU
DEVICE u32 shared_address(const void* p) { return static_cast<u32>(__cvta_generic_to_shared(p)); }
// Copies 16 bytes; where `valid` is false it writes zeros and reads nothing.
DEVICE void async_copy16(void* shared, const void* global, bool valid = true) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
                 "r"(valid ? 16 : 0) : "memory");
}
// The same for what nobody needs again: it is the first to leave the L2 cache.
DEVICE u64 used_once() {
    u64 policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}
DEVICE void async_copy16_once(void* shared, const void* global, bool valid, u64 policy) {
    asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2, %3;" ::"r"(shared_address(shared)),
                 "l"(global), "r"(valid ? 16 : 0), "l"(policy) : "memory");
}
DEVICE void async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> DEVICE void async_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }
#else
DEVICE void async_copy16(void* shared, const void* global, bool valid = true) {
    emu::async_copy(shared, global, 16, valid ? 16 : 0);
}
DEVICE u64 used_once() { return 0; }
DEVICE void async_copy16_once(void* shared, const void* global, bool valid, u64) {
    async_copy16(shared, global, valid);
}
DEVICE void async_commit() { emu::async_commit(); }
template <int N> DEVICE void async_wait() { emu::async_wait(N); }
#endif

// ---- clusters: blocks that run together and reach each other's shared memory (sm_90) --------------------------

#if defined(NANOPD_GPU) && defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
// What the block of that rank has at this place of its shared memory.
DEVICE float4 load_of_cluster(const float4* p, int rank) {
    u32 at;
    float4 v;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(at) : "r"(shared_address(p)), "r"(rank));
    asm volatile("ld.shared::cluster.v4.f32 {%0,%1,%2,%3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(at) : "memory");
    return v;
}
#endif

// ---- tensor cores -----------------------------------------------------------------------------------------
// Fragments of mma.m16n8k16, lane = 4 * g + t (PTX ISA, "Matrix Fragments for mma.m16n8k16"):
//   A 16x16: a0 (row g, columns 2t, 2t+1), a1 (row g+8, same), a2 (row g, columns 2t+8, 2t+9), a3 (row g+8)
//   B 16x8:  b0 (rows 2t, 2t+1, column g), b1 (rows 2t+8, 2t+9, column g)
//   D 16x8:  d0, d1 (row g, columns 2t, 2t+1), d2, d3 (row g+8)

#ifdef NANOPD_GPU
DEVICE void mma_16x8x16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, bfloat16) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
DEVICE void mma_16x8x16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, float16) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// Four 8x8 matrices of 16-bit values; lane i gives the address of row i % 8 of matrix i / 8.
DEVICE void load_matrices(u32 (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}
DEVICE void load_matrices_transposed(u32 (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}
// An 8x8 matrix of 16-bit values held as a fragment, transposed within the warp.
DEVICE u32 transpose_matrix(u32 x) {
    u32 y;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}
#else
template <class T> struct is_bfloat { static constexpr bool value = false; };
template <> struct is_bfloat<bfloat16> { static constexpr bool value = true; };
template <class T> DEVICE void mma_16x8x16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, T) {
    const u32 b[2] = {b0, b1};
    emu::mma_16x8x16(d, a, b, is_bfloat<T>::value);
}
DEVICE void load_matrices(u32 (&r)[4], const void* row) { emu::load_matrices(r, row, false); }
DEVICE void load_matrices_transposed(u32 (&r)[4], const void* row) { emu::load_matrices(r, row, true); }
DEVICE u32 transpose_matrix(u32 x) { return emu::transpose_matrix(x); }
#endif
