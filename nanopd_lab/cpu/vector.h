// Sixteen floats at a time, with the vector extensions that GCC and Clang share: one AVX-512 register, or
// whatever the processor has instead.
#pragma once
#include <cstdint>
#include <cstring>

typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));

struct BFloat16 { uint16_t bits; };  // the upper half of a float

inline float to_float(float x) { return x; }
inline float to_float(BFloat16 x) {
  uint32_t wide = uint32_t(x.bits) << 16;
  float out;
  std::memcpy(&out, &wide, 4);
  return out;
}
inline void from_float(float x, float* out) { *out = x; }
inline void from_float(float x, BFloat16* out) {  // to nearest, ties to even; NaN stays NaN
  uint32_t wide;
  std::memcpy(&wide, &x, 4);
  if ((wide & 0x7fffffff) > 0x7f800000) wide |= 0x00400000;
  else wide += 0x7fff + ((wide >> 16) & 1);
  out->bits = uint16_t(wide >> 16);
}

inline f32x16 load16(const float* p) {
  f32x16 x;
  std::memcpy(&x, p, 64);
  return x;
}
inline f32x16 load16(const BFloat16* p) {
  u16x16 half;
  std::memcpy(&half, p, 32);
  return (f32x16)(__builtin_convertvector(half, u32x16) << 16);
}
inline void store16(f32x16 x, float* p) { std::memcpy(p, &x, 64); }
inline void store16(f32x16 x, BFloat16* p) {  // to nearest, ties to even; NaN stays NaN
  const u32x16 bits = (u32x16)x;
  const u32x16 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const u16x16 half = __builtin_convertvector(x == x ? rounded : (bits >> 16 | 0x40), u16x16);
  std::memcpy(p, &half, 32);
}
// 32 values as two vectors: floats in order, bf16 as its even and its odd ones, which costs one operation each.
inline void load32(const float* p, f32x16* a, f32x16* b) {
  *a = load16(p);
  *b = load16(p + 16);
}
inline void load32(const BFloat16* p, f32x16* even, f32x16* odd) {
  u32x16 both;
  std::memcpy(&both, p, 64);
  *even = (f32x16)(both << 16);
  *odd = (f32x16)(both & 0xffff0000u);
}
// Adds up two vectors at once: lane pairs of `a` in the even lanes of the result, those of `b` in the odd ones.
inline f32x16 add_pairs(f32x16 a, f32x16 b) {
  const f32x16 low = __builtin_shufflevector(a, b, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30);
  const f32x16 high = __builtin_shufflevector(a, b, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
  return low + high;
}
inline f32x16 add_quads(f32x16 a, f32x16 b) {
  const f32x16 low = __builtin_shufflevector(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
  const f32x16 high = __builtin_shufflevector(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  return low + high;
}
inline f32x16 add_eights(f32x16 a, f32x16 b) {
  const f32x16 low = __builtin_shufflevector(a, b, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27);
  const f32x16 high = __builtin_shufflevector(a, b, 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
  return low + high;
}
inline f32x16 add_halves(f32x16 a, f32x16 b) {
  const f32x16 low = __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
  const f32x16 high = __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  return low + high;
}
// Sixteen horizontal sums for 45 instructions: lane i of the result is the sum of v[i]'s lanes.
inline f32x16 sum_each(const f32x16* v) {
  f32x16 pairs[8], quads[4];
  for (int i = 0; i < 8; ++i) pairs[i] = add_pairs(v[2 * i], v[2 * i + 1]);
  for (int i = 0; i < 4; ++i) quads[i] = add_quads(pairs[2 * i], pairs[2 * i + 1]);
  return add_halves(add_eights(quads[0], quads[1]), add_eights(quads[2], quads[3]));
}
// exp(x) for x <= 0, to 2 ulp: 2^n e^f with Cephes' polynomial for e^f; below -87 the answer is e^-87.
inline f32x16 exp_nonpositive(f32x16 x) {
  x = x < -87.0f ? f32x16{} - 87.0f : x;
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
  const f32x16 n = (x * 1.44269504f + magic) - magic;
  const f32x16 f = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // Cody-Waite reduction by n ln 2
  f32x16 p = f * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * f + 8.3334519073e-3f;
  p = p * f + 4.1665795894e-2f;
  p = p * f + 1.6666665459e-1f;
  p = p * f + 5.0000001201e-1f;
  p = p * f * f + f + 1.0f;
  return p * (f32x16)((__builtin_convertvector(n, i32x16) + 127) << 23);
}
