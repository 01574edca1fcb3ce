// RWKV-7 recurrence forward on the CPU, float32, any T, N in {16, 32, 64, 128}: for the recurrence alone and for the whole time mix.
//
//   sa_t = S_{t-1} a_t + c_t
//   S_t  = S_{t-1} diag(exp w_t) + sa_t b_t^T + v_t k_t^T        y_t = S_t r_t
//
// Row i of S (a value channel) never mixes with another row, so rows are what is shared out among vector lanes
// (forward) and cache-sized groups (backward).
#pragma once
#include "kernels.h"

// Some rows of one head's state, 64 at most, walking along the tokens: lanes run over value channels i, the inner loop over key
// channels j, so there are no horizontal sums.
template <int N>
struct Scan {
  static constexpr int L = std::min(N, 64), G = L / W, U = G >= 4 ? 1 : 4 / G;     // U hides the latency of the adds
  alignas(64) float S[N][L];
  const int64_t i0;                                      // the first of the rows

  Scan(const float* s0, int64_t i0) : i0(i0) {
    for (int j = 0; j < N; ++j)
      for (int i = 0; i < L; ++i) S[j][i] = s0 ? s0[(i0 + i) * N + j] : 0.f;
  }

  void put(float* to) const {
    for (int i = 0; i < L; ++i)
      for (int j = 0; j < N; ++j) to[(i0 + i) * N + j] = S[j][i];
  }

  // Tokens t..end of the head whose token 0 lies at `base`, step floats apart; before(t) is called in front of each.
  template <class F>
  void run(const Wkv7& p, int64_t base, int64_t step, int64_t t, int64_t end, F before) {
    alignas(64) float ew[N], zero[N] = {};
    V sa[G] = {};
    for (int j = 0; t < end && j < N; ++j)
      for (int g = 0; g < G; ++g) sa[g] += load(&S[j][g * W]) * p.a[base + t * step + j];
    for (; t < end; ++t) {
      before(t);
      const int64_t o = base + t * step;
      const float *k = p.k + o, *b = p.b + o, *r = p.r + o, *a = t + 1 < end ? p.a + o + step : zero;
      for (int j = 0; j < N; j += W) store(ew + j, vexp(load(p.w + o + j)));
      V v[G], y[U][G], next[U][G];
      for (int g = 0; g < G; ++g) {
        v[g] = load(p.v + o + i0 + g * W);
        if (p.c) sa[g] += load(p.c + o + i0 + g * W);
        if (p.sa) store(p.sa + o + i0 + g * W, sa[g]);
        for (int u = 0; u < U; ++u) y[u][g] = next[u][g] = V{};
      }
      for (int j = 0; j < N; j += U)
        for (int u = 0; u < U; ++u)
          for (int g = 0; g < G; ++g) {                  // one pass updates S, reads y and prepares the next S a
            V s = load(&S[j + u][g * W]) * ew[j + u] + (sa[g] * b[j + u] + v[g] * k[j + u]);
            store(&S[j + u][g * W], s);
            y[u][g] += s * r[j + u];
            next[u][g] += s * a[j + u];
          }
      for (int g = 0; g < G; ++g) {
        for (int u = 1; u < U; ++u) { y[0][g] += y[u][g]; next[0][g] += next[u][g]; }
        store(p.y + o + i0 + g * W, y[0][g]);
        sa[g] = next[0][g];
      }
    }
  }
};
