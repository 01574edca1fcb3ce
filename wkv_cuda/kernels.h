// What the CPU kernels share. They know nothing of torch, whose headers take longer to compile than they do:
// bindings.cpp hands them plain pointers to contiguous float32 buffers, all allocated by the caller. Only
// block.cpp takes bfloat16 ones, too.
#pragma once
#include <algorithm>
#include <functional>
#include <initializer_list>
#include <utility>
#include "call.h"

// Calls f(lo, hi) on torch's threads for pieces of 0..n of at least `grain`.
void parallel_for(int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& f);

// One source for every processor: W floats fill one vector register of the target, and loops keep as many
// vectors at hand as it has registers for. GCC takes wider vectors apart lane by lane. -DWIDTH=4 (or 8)
// builds a narrower one, to test it where it is not native.
#ifndef WIDTH
#if defined(__AVX512F__)
#define WIDTH 16
#elif defined(__AVX__)
#define WIDTH 8
#else
#define WIDTH 4
#endif
#endif
constexpr int W = WIDTH;
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int REGISTERS = 32;
#else
constexpr int REGISTERS = 16;
#endif
typedef float V __attribute__((vector_size(4 * W)));
typedef int VI __attribute__((vector_size(4 * W)));

inline V load(const float* p) { V x; std::memcpy(&x, p, sizeof x); return x; }
// x in a register of its own: GCC would read it from memory again for each use.
inline V held(V x) {
#if defined(__AVX512F__)
  asm("" : "+v"(x));
#elif defined(__x86_64__) && (WIDTH == 4 || WIDTH == 8 && defined(__AVX__))
  asm("" : "+x"(x));
#elif defined(__aarch64__) && WIDTH == 4
  asm("" : "+w"(x));
#endif
  return x;
}

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

// Lane i of the result is lane pick(i) of x followed by y.
template <class Pick, int... I>
inline V shuffle(V x, V y, Pick pick, std::integer_sequence<int, I...>) {
#ifdef __clang__
  return __builtin_shufflevector(x, y, pick(I)...);
#else
  return __builtin_shuffle(x, y, VI{pick(I)...});
#endif
}
constexpr auto LANES = std::make_integer_sequence<int, W>();

// Lanes in groups of h: the even groups of x and y side by side (odd = 0), or their odd ones (odd = h).
template <int h, int odd>
inline V groups(V x, V y) {
  return shuffle(x, y, [](int i) { return (i / h % 2 ? W + i - h : i) + odd; }, LANES);
}

// Adds up the lanes of W vectors at once: lane q of the result is the sum over x[q], at a third of the cost
// of W separate sums.
template <int h = 1>
inline V lane_sums(V* x) {
  if constexpr (h == W) {
    return x[0];
  } else {
    for (int q = 0; q < W; q += 2 * h) x[q] = groups<h, 0>(x[q], x[q + h]) + groups<h, h>(x[q], x[q + h]);
    return lane_sums<2 * h>(x);
  }
}

// Lane q of x[p] becomes lane p of x[q].
template <int h = 1>
inline void transpose(V (&x)[W]) {
  if constexpr (h < W) {
    for (int q = 0; q < W; ++q)
      if (q / h % 2 == 0) {
        const V even = groups<h, 0>(x[q], x[q + h]);
        x[q + h] = groups<h, h>(x[q], x[q + h]);
        x[q] = even;
      }
    transpose<2 * h>(x);
  }
}

// A square of W rows and columns, whose rows lie `step` floats apart, to another.
inline void transpose(const float* from, int64_t step, float* to, int64_t to_step) {
  V x[W];
  for (int q = 0; q < W; ++q) x[q] = load(from + q * step);
  transpose(x);
  for (int q = 0; q < W; ++q) store(to + q * to_step, x[q]);
}

// The sum over the lanes, in every lane.
template <int h = W / 2>
inline V total(V x) {
  if constexpr (h == 0) return x;
  else return total<h / 2>(x + shuffle(x, x, [](int i) { return i ^ h; }, LANES));
}

void shift_mix(const Call&);
void wkv7_inputs(const Call&);
void wkv7_output(const Call&);
void wkv7_mix(const Call&);
void read_state(const Call&);
void squared_relu(const Call&);
void linear(const Call&);
void peak(const Call&);

constexpr struct { const char* name; void (*kernel)(const Call&); } CPU_KERNELS[] = {
    {"wkv7", wkv7}, {"biwkv", biwkv}, {"shift_mix", shift_mix},
    {"wkv7_inputs", wkv7_inputs}, {"wkv7_output", wkv7_output},
    {"wkv7_mix", wkv7_mix}, {"read_state", read_state}, {"squared_relu", squared_relu},
    {"linear", linear}, {"peak", peak}};
