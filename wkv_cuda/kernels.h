// What the CPU kernels share. They know nothing of torch, whose headers take longer to compile than they do: bindings.cpp hands
// them plain pointers to contiguous float32 buffers, all allocated by the caller. Only block.cpp takes bfloat16 ones, too.
#pragma once
#include <algorithm>
#include <functional>
#include <initializer_list>
#include "call.h"

// Calls f(lo, hi) on torch's threads for pieces of 0..n of at least `grain`.
void parallel_for(int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& f);

constexpr int W = 16;       // floats in one vector: the compiler splits it where registers are narrower
typedef float V __attribute__((vector_size(4 * W)));
typedef int VI __attribute__((vector_size(4 * W)));
#ifdef __clang__
#define SHUFFLE(x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#else
#define SHUFFLE(x, y, ...) __builtin_shuffle(x, y, VI{__VA_ARGS__})
#endif

inline V load(const float* p) { V x; std::memcpy(&x, p, sizeof x); return x; }
inline void store(float* p, V x) { std::memcpy(p, &x, sizeof x); }

// exp(x) for x <= 88 (Cody-Waite reduction, degree-6 polynomial, about 1 ulp); below -87 it is 0.
inline V vexp(V x) {
  V z = x * 1.44269504f + 12582912.f;                    // round to nearest by the 1.5 * 2^23 trick
  VI n = (VI)z - 0x4B400000;
  z -= 12582912.f;
  V f = (x - z * 0.693359375f) + z * 2.12194440e-4f;
  V p = 1.3888889e-3f * f + 8.3333333e-3f;
  p = p * f + 4.1666667e-2f; p = p * f + 1.6666667e-1f; p = p * f + 0.5f;
  p = p * f * f + f + 1.f;
  return (V)((VI)(V)((VI)p + (n << 23)) & (x >= -87.f));
}

// Adds up the lanes of 16 vectors at once: lane q of the result is the sum over x[q]. A tree of interleaving adds
// costs a third of sixteen separate horizontal sums.
inline V sum16(V* x) {
  for (int q = 0; q < 16; q += 2)
    x[q] = SHUFFLE(x[q], x[q + 1], 0,16,2,18,4,20,6,22,8,24,10,26,12,28,14,30) + SHUFFLE(x[q], x[q + 1], 1,17,3,19,5,21,7,23,9,25,11,27,13,29,15,31);
  for (int q = 0; q < 16; q += 4)
    x[q] = SHUFFLE(x[q], x[q + 2], 0,1,16,17,4,5,20,21,8,9,24,25,12,13,28,29) + SHUFFLE(x[q], x[q + 2], 2,3,18,19,6,7,22,23,10,11,26,27,14,15,30,31);
  for (int q = 0; q < 16; q += 8)
    x[q] = SHUFFLE(x[q], x[q + 4], 0,1,2,3,16,17,18,19,8,9,10,11,24,25,26,27) + SHUFFLE(x[q], x[q + 4], 4,5,6,7,20,21,22,23,12,13,14,15,28,29,30,31);
  return SHUFFLE(x[0], x[8], 0,1,2,3,4,5,6,7,16,17,18,19,20,21,22,23) + SHUFFLE(x[0], x[8], 8,9,10,11,12,13,14,15,24,25,26,27,28,29,30,31);
}

void shift_mix(const Call&);
void wkv7_inputs(const Call&);
void wkv7_output(const Call&);
void wkv7_mix(const Call&);
void read_state(const Call&);
void squared_relu(const Call&);
