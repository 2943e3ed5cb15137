// Hopper's products of a warpgroup (sm_90a): four warps start them together, both operands are read from shared memory, and
// the sums arrive while the warps do something else.
//
//   D [64 x N] (+)= A [64 x 16] * B [N x 16]^T, A and B: rows of 128 bytes whose 16-byte pieces are permuted by the row
//   (piece ^ row % 8), eight rows after eight, from addresses in multiples of 1024
//   with more = 0, D is the product alone
//
// Warp w of the group holds rows 16w … 16w + 15 of D, as the fragments of mma.m16n8k16 side by side (portable.h).
// (PTX ISA, "Asynchronous Warpgroup Level Matrix Multiply-Accumulate".)
#pragma once
#include "portable.h"

#if defined(NANOPD_GPU) && defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define NANOPD_WARPGROUP 1

// What follows reads what threads have written (by themselves or by cp.async) before it.
DEVICE void publish_to_products() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
DEVICE void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
DEVICE void wait_for_products() { asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory"); }

// The operand that begins at p: 1024 bytes from eight rows to the next eight, pieces permuted over 128 bytes.
DEVICE u64 operand_at(const void* p) {
    return static_cast<u64>((shared_address(p) & 0x3ffff) >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}

#define SUMS(c) "+f"(d[c][0]), "+f"(d[c][1]), "+f"(d[c][2]), "+f"(d[c][3])
#define PRODUCT(TYPE, N, PLACES, A, B, ONE, ...)                                                                        \
    asm volatile("{.reg .pred p; setp.ne.b32 p, " ONE ", 0;\n wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE "." TYPE \
                 " {" PLACES "}, " A ", " B ", p, 1, 1, 0, 0;}"                                                            \
                 : __VA_ARGS__ : "l"(a), "l"(b), "r"(more))
#define PLACES16 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define PLACES24 PLACES16 ",%16,%17,%18,%19,%20,%21,%22,%23"
#define PLACES32 PLACES24 ",%24,%25,%26,%27,%28,%29,%30,%31"
#define PRODUCTS(T, TYPE)                                                                                                 \
    DEVICE void add_product(float (&d)[4][4], u64 a, u64 b, int more, T) {                                                       \
        PRODUCT(TYPE, "32", PLACES16, "%16", "%17", "%18", SUMS(0), SUMS(1), SUMS(2), SUMS(3));                           \
    }                                                                                                                     \
    DEVICE void add_product(float (&d)[6][4], u64 a, u64 b, int more, T) {                                                       \
        PRODUCT(TYPE, "48", PLACES24, "%24", "%25", "%26", SUMS(0), SUMS(1), SUMS(2), SUMS(3), SUMS(4), SUMS(5));         \
    }                                                                                                                     \
    DEVICE void add_product(float (&d)[8][4], u64 a, u64 b, int more, T) {                                                       \
        PRODUCT(TYPE, "64", PLACES32, "%32", "%33", "%34", SUMS(0), SUMS(1), SUMS(2), SUMS(3), SUMS(4), SUMS(5), SUMS(6), \
                SUMS(7));                                                                                                 \
    }
PRODUCTS(bfloat16, "bf16")
PRODUCTS(float16, "f16")
#undef PRODUCTS
#undef PRODUCT
#undef SUMS
#endif
