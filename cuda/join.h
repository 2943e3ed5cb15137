// Joining the parts of one softmax. A part is what somebody found out about *some* of the tokens: the largest score m
// (times LOG2_E), the sum l of exp2(score - m) and the sum o of exp2(score - m) * V, not divided by anything yet. Parts
// with different m are not on one scale; moved to the largest m, they add. (Flash-Decoding, Dao et al. 2023; the same
// step within a sequence is Milakov and Gimelshein's, 2018.)
#pragma once
#include "portable.h"

struct Part {
    float m, l;
    float4 o;  // four dimensions of the head: a thread takes care of four
};

// Of no token at all.
DEVICE Part empty_part() { return {minus_infinity(), 0.0f, make_float4(0, 0, 0, 0)}; }

// to += weight * x
DEVICE void add_scaled(float4& to, const float4& x, float weight) {
    to.x += weight * x.x, to.y += weight * x.y, to.z += weight * x.z, to.w += weight * x.w;
}

// The part of all the tokens together. Any of the N may be empty, and all of them.
template <int N> DEVICE Part join(const Part (&part)[N]) {
    Part total = empty_part();
#pragma unroll
    for (int i = 0; i < N; ++i) total.m = fmaxf(total.m, part[i].m);
    if (total.m == minus_infinity()) return total;  // -inf - -inf below would be NaN
#pragma unroll
    for (int i = 0; i < N; ++i) {
        const float weight = exp2_fast(part[i].m - total.m);  // 0 for an empty one
        total.l += weight * part[i].l;
        add_scaled(total.o, part[i].o, weight);
    }
    return total;
}
