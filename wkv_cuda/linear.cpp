// y = x W^T for a few rows of x, as where tokens are generated one by one: each weight is read once, which is
// what takes the time. W is in float32, bfloat16, or int8 with a scale per row, in lines of 64 bytes: each of
// the 16 words of a line holds 1, 2 or 4 weights, those of inputs that lie 16 apart, the first one lowest.
#include "kernels.h"

namespace {

struct Linear {
  int64_t M, K, N, parts;                                // x (M,K), W (N,K), so many weights in a word
  const float *x, *w, *scale;                            // scale (N), or null
  float* y;                                              // (M,N)
};

// Weight `part` of each word, as float32.
template <int parts, int part>
inline V weight(VI words) {
  if constexpr (parts == 1) return (V)words;
  else if constexpr (parts == 2) return (V)(part ? words & int(0xFFFF0000) : words << 16);
  else return __builtin_convertvector((words << (24 - 8 * part)) >> 24, V);
}

template <int parts, int part, int count>
inline void add_parts(V (&sum)[count], const VI (&words)[count], const float* x) {
  if constexpr (part < parts) {
    const V q = load(x + 16 * part);
    for (int r = 0; r < count; ++r) sum[r] += weight<parts, part>(words[r]) * q;
    add_parts<parts, part + 1>(sum, words, x);
  }
}

// `count` rows of W from w on, each of `step` words, times one row of x.
template <int parts, int count>
inline void dots(const float* w, int64_t step, const float* x, const float* scale, float* y) {
  constexpr int U = 16 / W > 1 ? 2 : 1;                  // sums at a time: they hide the latency of the adds
  V sum[U][count] = {};
  for (int64_t i = 0; i < step; i += 16)
    for (int lane = 0; lane < 16; lane += W) {
      VI words[count];
      for (int r = 0; r < count; ++r) std::memcpy(&words[r], w + r * step + i + lane, sizeof(VI));
      add_parts<parts, 0>(sum[lane / W % U], words, x + i * parts + lane);
    }
  for (int r = 0; r < count; ++r) {
    const V s = total(U > 1 ? sum[0][r] + sum[U - 1][r] : sum[0][r]) * (scale ? scale[r] : 1.f);
    std::memcpy(y + r, &s, sizeof *y);
  }
}

template <int parts>
void rows(const Linear& p, int64_t lo, int64_t hi) {
  constexpr int R = REGISTERS / 4;                       // rows of W at a time
  const int64_t step = p.K / parts;
  for (int64_t n = lo; n < hi; n += R)
    for (int64_t m = 0; m < p.M; ++m) {
      const int64_t count = std::min<int64_t>(R, hi - n);
      const float *w = p.w + n * step, *x = p.x + m * p.K, *scale = p.scale ? p.scale + n : nullptr;
      float* y = p.y + m * p.N + n;
      if (count == R) dots<parts, R>(w, step, x, scale, y);
      else for (int64_t r = 0; r < count; ++r)
        dots<parts, 1>(w + r * step, step, x, scale ? scale + r : nullptr, y + r);
    }
}

}  // namespace

void linear(const Call& call) {
  const auto p = call.as<Linear>(4);
  const auto f = p.parts == 1 ? rows<1> : p.parts == 2 ? rows<2> : rows<4>;
  const int64_t grain = std::max<int64_t>(8, (1 << 15) / p.K / 8 * 8);
  parallel_for(p.N, grain, [&](int64_t lo, int64_t hi) { f(p, lo, hi); });
}
