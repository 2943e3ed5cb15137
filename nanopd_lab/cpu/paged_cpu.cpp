// Paged attention for a few query tokens per sequence (decode steps) on a CPU.
//
// K and V of one block and one KV head lie together, [block_size][head_dim], so a page is read as one
// contiguous stream, once for all query heads of its group. Each context is cut into partitions of a fixed
// number of blocks: threads share long sequences, and because the cuts do not depend on the batch, neither
// does the result. Partial results are merged by their maxima and sums (FlashDecoding's split-KV).
#include <algorithm>
#include <cmath>
#include <vector>

#include "vector.h"

namespace {

constexpr int kPartition = 256;  // tokens a partition holds at most

struct Problem {
  const void* query;            // [tokens, heads, dim], contiguous
  const void* kv;               // one layer's view, [blocks, 2, kv_heads, block_size, dim]
  void* out;                    // like query
  const int32_t* block_tables;  // [sequences, max_blocks]
  const int32_t* query_start;   // [sequences + 1]
  const int32_t* context_lens;  // [sequences]
  int64_t block_stride, kv_stride;  // elements between blocks, and between a block's K and V
  int64_t sequences, max_blocks, heads, kv_heads, dim, block_size;
  float scale;
};

struct Work {
  int32_t token, sequence, kv_head, begin, end;
};

// A page is too short for the processor's own prefetching: ask for the same row of the next page.
template <typename T>
inline void prefetch_row(const T* row, int dim) {
  for (int at = 0; at < dim * int(sizeof(T)); at += 64) __builtin_prefetch(reinterpret_cast<const char*>(row) + at);
}

// One partition of one query token's context, for one KV head and its kGroup query heads (0: any number):
// the unnormalised output, the scores' maximum and the sum of their exponentials, per head.
template <typename T, int kDim, int kGroup>
void attend_partition(const Problem& p, const Work& w, float* out, float* max_out, float* sum_out) {
  const int dim = kDim ? kDim : int(p.dim), lanes = dim / 16;
  const int group = kGroup ? kGroup : int(p.heads / p.kv_heads);
  const int size = int(p.block_size), count = w.end - w.begin;
  const T* q = static_cast<const T*>(p.query) + (int64_t(w.token) * p.heads + int64_t(w.kv_head) * group) * dim;
  const T* head = static_cast<const T*>(p.kv) + w.kv_head * int64_t(size) * dim;
  const int32_t* table = p.block_tables + int64_t(w.sequence) * p.max_blocks;
  constexpr int kMaxLanes = kDim ? kDim / 16 : 32, kMaxGroup = kGroup ? kGroup : 64;
  alignas(64) float score[(kPartition + 16) * kMaxGroup];  // [token][head]
  alignas(64) float by_head[kMaxGroup][kPartition];
  f32x16 reg[kMaxGroup][kMaxLanes];  // first the query, then the output
  f32x16 dots[16];                   // products whose lanes are still to be added up
  int pending = 0, done = 0;

  for (int g = 0; g < group; ++g)
    for (int i = 0; i < lanes; ++i) reg[g][i] = load16(q + g * dim + i * 16) * p.scale;
  const int last = (w.end - 1) / size;
  for (int t = 0, block = w.begin / size; t < count; ++block) {
    const T* row = head + table[block] * p.block_stride;
    const T* next = head + table[std::min(block + 1, last)] * p.block_stride;
    for (int r = 0; r < size && t < count; ++r, ++t, row += dim, next += dim) {
      prefetch_row(next, dim);
      f32x16 dot[kMaxGroup];
      for (int g = 0; g < group; ++g) dot[g] = f32x16{};
      for (int i = 0; i < lanes; ++i) {
        const f32x16 k = load16(row + i * 16);
        for (int g = 0; g < group; ++g) dot[g] += reg[g][i] * k;
      }
      for (int g = 0; g < group; ++g) {
        dots[pending++] = dot[g];
        if (pending == 16) {
          store16(sum_each(dots), score + done);
          done += 16;
          pending = 0;
        }
      }
    }
  }
  for (int i = pending; i < 16; ++i) dots[i] = f32x16{};
  store16(sum_each(dots), score + done);
  const int padded = (count + 15) / 16 * 16;
  for (int g = 0; g < group; ++g) {
    float* s = by_head[g];
    float top = score[g];
    for (int t = 0; t < count; ++t) {
      s[t] = score[t * group + g];
      top = s[t] > top ? s[t] : top;
    }
    for (int t = count; t < padded; ++t) s[t] = top;
    f32x16 total = {};
    for (int t = 0; t < padded; t += 16) {
      const f32x16 e = exp_nonpositive(load16(s + t) - top);
      store16(e, s + t);
      total += e;
    }
    float lane[16], sum = float(count - padded);  // the padding added exp(0) each
    store16(total, lane);
    for (int i = 0; i < 16; ++i) sum += lane[i];
    max_out[g] = top;
    sum_out[g] = sum;
  }
  for (int g = 0; g < group; ++g)
    for (int i = 0; i < lanes; ++i) reg[g][i] = f32x16{};
  for (int t = 0, block = w.begin / size; t < count; ++block) {
    const T* row = head + table[block] * p.block_stride + p.kv_stride;
    const T* next = head + table[std::min(block + 1, last)] * p.block_stride + p.kv_stride;
    for (int r = 0; r < size && t < count; ++r, ++t, row += dim, next += dim) {
      prefetch_row(next, dim);
      for (int i = 0; i < lanes; ++i) {
        const f32x16 v = load16(row + i * 16);
        for (int g = 0; g < group; ++g) reg[g][i] += v * by_head[g][t];
      }
    }
  }
  for (int g = 0; g < group; ++g)
    for (int i = 0; i < lanes; ++i) store16(reg[g][i], out + g * dim + i * 16);
}

template <typename T>
using Kernel = void (*)(const Problem&, const Work&, float*, float*, float*);

template <typename T, int kDim>
Kernel<T> choose_group(int group) {
  switch (group) {
    case 1: return attend_partition<T, kDim, 1>;
    case 2: return attend_partition<T, kDim, 2>;
    case 3: return attend_partition<T, kDim, 3>;
    case 4: return attend_partition<T, kDim, 4>;
    case 8: return attend_partition<T, kDim, 8>;
    default: return attend_partition<T, kDim, 0>;
  }
}

template <typename T>
void attend(const Problem& p) {
  const int group = int(p.heads / p.kv_heads), dim = int(p.dim);
  const int step = std::max<int>(1, kPartition / int(p.block_size)) * int(p.block_size);  // whole blocks
  std::vector<Work> work;
  for (int32_t s = 0; s < p.sequences; ++s) {
    const int length = p.query_start[s + 1] - p.query_start[s];
    for (int i = 0; i < length; ++i) {
      const int context = p.context_lens[s] - length + i + 1;
      for (int32_t h = 0; h < p.kv_heads; ++h)
        for (int begin = 0; begin < context; begin += step)
          work.push_back({p.query_start[s] + i, s, h, begin, std::min(context, begin + step)});
    }
  }
  const size_t row = size_t(group) * dim;
  std::vector<float> partial(work.size() * row), top(work.size() * group), sum(work.size() * group);
  const Kernel<T> kernel = dim == 64    ? choose_group<T, 64>(group)
                           : dim == 128 ? choose_group<T, 128>(group)
                                        : choose_group<T, 0>(group);
  // A few pages are read faster than a second thread wakes up.
  const bool parallel = int64_t(work.size()) * step > 4 * kPartition;
#pragma omp parallel for schedule(dynamic, 4) if (parallel)
  for (size_t i = 0; i < work.size(); ++i)
    kernel(p, work[i], &partial[i * row], &top[i * group], &sum[i * group]);

  for (size_t first = 0, last; first < work.size(); first = last) {  // the partitions of one token and KV head
    for (last = first + 1; last < work.size() && work[last].begin != 0;) ++last;
    const Work& w = work[first];
    T* out = static_cast<T*>(p.out) + int64_t(w.token) * p.heads * dim + w.kv_head * row;
    for (int g = 0; g < group; ++g) {
      float best = top[first * group + g], total = 0;
      for (size_t i = first + 1; i < last; ++i) best = std::max(best, top[i * group + g]);
      for (size_t i = first; i < last; ++i) {
        float& weight = top[i * group + g];
        weight = std::exp(weight - best);
        total += weight * sum[i * group + g];
      }
      for (int d = 0; d < dim; d += 16) {
        f32x16 x = {};
        for (size_t i = first; i < last; ++i) x += load16(&partial[i * row + g * dim + d]) * top[i * group + g];
        store16(x / total, out + g * dim + d);
      }
    }
  }
}

}  // namespace

extern "C" {

// dtype: 0 float32, 1 bfloat16. dim is a multiple of 16, at most 512; block_size at most 256.
void paged_attend(const Problem* problem, int dtype) {
  if (dtype == 0) attend<float>(*problem);
  else attend<BFloat16>(*problem);
}

// Rows of K and V, [tokens, kv_heads, dim] with strides in bytes, to their slots.
void paged_store(const char* key, const char* value, char* kv, const int64_t* slots, int64_t tokens,
                 int64_t kv_heads, int64_t row_bytes, int64_t block_size, int64_t key_token, int64_t key_head,
                 int64_t value_token, int64_t value_head, int64_t block_bytes, int64_t kv_bytes) {
  for (int64_t t = 0; t < tokens; ++t) {
    char* target = kv + slots[t] / block_size * block_bytes + slots[t] % block_size * row_bytes;
    for (int64_t h = 0; h < kv_heads; ++h, target += block_size * row_bytes) {
      std::memcpy(target, key + t * key_token + h * key_head, row_bytes);
      std::memcpy(target + kv_bytes, value + t * value_token + h * value_head, row_bytes);
    }
  }
}
}
