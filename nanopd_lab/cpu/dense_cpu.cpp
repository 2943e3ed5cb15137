// Products with weights, and RMS norm: what a step does outside attention.
//
// A product of a few tokens with a weight matrix is bound by reading the weights. Libraries are made for
// large products: oneDNN re-orders a bf16 weight in every call, and reads a re-ordered one at two thirds of
// what the memory gives. Here the weights stay as the model has them, [out, in], and are streamed once. How
// many tokens this is the faster way for is the processor's matter, see `model/inference.py`.
#include <cmath>
#include <cstdlib>
#include <vector>

#include "vector.h"

namespace {

// Rows of weights are too short for the processor's own prefetching: ask for those of the next tiles.
constexpr int kAhead = 16;

// Sixteen sums at a time: kRows tokens by kCols = 16 / kRows output features, each widened weight used
// kRows times. Lane r * kCols + c of the result is token r, feature c. Weights are asked for ahead of the
// first tokens only: for the others they are in the cache, and asking takes a load's place.
template <typename T, int kRows, int kCols, bool kFirst>
f32x16 tile(const float* x, const T* weight, int64_t in) {
  f32x16 acc[16] = {};
  for (int64_t k = 0; k < in; k += 32) {
    f32x16 w[kCols][2];
    for (int c = 0; c < kCols; ++c) {
      if (kFirst) {
        // Both cache lines of 32 floats; where few rows wait for the memory alone, the second one comes by itself.
        constexpr size_t kBytes = kRows < 4 ? 64 : 32 * sizeof(T);
        for (size_t line = 0; line < kBytes; line += 64)
          __builtin_prefetch((const char*)(weight + (c + kAhead) * in + k) + line);
      }
      load32(weight + c * in + k, &w[c][0], &w[c][1]);
    }
    for (int r = 0; r < kRows; ++r)
      for (int half = 0; half < 2; ++half) {
        const f32x16 a = load16(x + r * in + k + half * 16);
        for (int c = 0; c < kCols; ++c) acc[r * kCols + c] += a * w[c][half];
      }
  }
  return sum_each(acc);
}

template <typename T, int kRows, bool kFirst>
void features(const float* x, const T* weight, const T* bias, T* y, int64_t in, int64_t out, int64_t begin,
              int64_t end) {
  constexpr int kCols = 16 / kRows;
  for (int64_t n = begin; n < end; n += kCols) {
    f32x16 sums = tile<T, kRows, kCols, kFirst>(x, weight + n * in, in);
    if (bias)
      for (int i = 0; i < 16; ++i) sums[i] += to_float(bias[n + i % kCols]);
    T rounded[16];
    store16(sums, rounded);
    for (int r = 0; r < kRows; ++r) std::memcpy(y + r * out + n, rounded + r * kCols, kCols * sizeof(T));
  }
}

// Sixteen features for all rows while their weights are in the cache. A row's sums are added in the same
// order however many rows there are, so a token's result does not depend on its batch.
template <typename T>
void linear(const T* x, const T* weight, const T* bias, T* y, int64_t rows, int64_t in, int64_t out) {
  // In the order in which load32 hands out the weights. Of vectors, as they begin where a cache line does: one that
  // crosses it is read twice, and this is two thirds as fast.
  std::vector<f32x16> wide(rows * in / 16);
  float* const a = (float*)wide.data();
  for (int64_t k = 0; k < rows * in; k += 32) load32(x + k, &wide[k / 16], &wide[k / 16 + 1]);
#pragma omp parallel for schedule(static)
  for (int64_t n = 0; n < out; n += 16) {
    int64_t r = 0;
    if (rows >= 4) {
      features<T, 4, true>(a, weight, bias, y, in, out, n, n + 16);
      for (r = 4; r + 4 <= rows; r += 4)
        features<T, 4, false>(a + r * in, weight, bias, y + r * out, in, out, n, n + 16);
    }
    for (; r + 2 <= rows; r += 2) features<T, 2, true>(a + r * in, weight, bias, y + r * out, in, out, n, n + 16);
    for (; r < rows; ++r) features<T, 1, true>(a + r * in, weight, bias, y + r * out, in, out, n, n + 16);
  }
}

// As Hugging Face computes it: normalise in float32, round to T, then multiply by the weight.
template <typename T>
void rms_norm(const T* x, const T* weight, T* y, int64_t rows, int64_t dim, float eps) {
  const int64_t whole = dim / 16 * 16;
#pragma omp parallel for schedule(static) if (rows >= 64)
  for (int64_t r = 0; r < rows; ++r) {
    const T* in = x + r * dim;
    T* out = y + r * dim;
    f32x16 squares = {};
    for (int64_t d = 0; d < whole; d += 16) {
      const f32x16 v = load16(in + d);
      squares += v * v;
    }
    float lanes[16], sum = 0;
    store16(squares, lanes);
    for (int i = 0; i < 16; ++i) sum += lanes[i];
    for (int64_t d = whole; d < dim; ++d) sum += to_float(in[d]) * to_float(in[d]);
    const float scale = 1.0f / std::sqrt(sum / float(dim) + eps);
    for (int64_t d = 0; d < whole; d += 16) {
      T rounded[16];
      store16(load16(in + d) * scale, rounded);
      store16(load16(weight + d) * load16(rounded), out + d);
    }
    for (int64_t d = whole; d < dim; ++d) {
      T rounded;
      from_float(to_float(in[d]) * scale, &rounded);
      from_float(to_float(weight[d]) * to_float(rounded), out + d);
    }
  }
}

}  // namespace

extern "C" {

// y[rows][out] = x[rows][in] W[out][in]^T + bias, everything contiguous; dtype 0 float32, 1 bfloat16;
// `in` is a multiple of 32, `out` of 16.
void dense_linear(const void* x, const void* weight, const void* bias, void* y, int64_t rows, int64_t in,
                  int64_t out, int dtype) {
  if (dtype == 0) linear((const float*)x, (const float*)weight, (const float*)bias, (float*)y, rows, in, out);
  else
    linear((const BFloat16*)x, (const BFloat16*)weight, (const BFloat16*)bias, (BFloat16*)y, rows, in, out);
}

void dense_rms_norm(const void* x, const void* weight, void* y, int64_t rows, int64_t dim, float eps, int dtype) {
  if (dtype == 0) rms_norm((const float*)x, (const float*)weight, (float*)y, rows, dim, eps);
  else rms_norm((const BFloat16*)x, (const BFloat16*)weight, (BFloat16*)y, rows, dim, eps);
}
}
