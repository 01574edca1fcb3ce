// RWKV-7 recurrence forward on the CPU, float32, any T, N in {16, 32, 64, 128}: for the recurrence alone and
// for the whole time mix.
//
//   sa_t = S_{t-1} a_t + c_t
//   S_t  = S_{t-1} diag(exp w_t) + sa_t b_t^T + v_t k_t^T        y_t = S_t r_t
//
// Row i of S (a value channel) never mixes with another row, so rows are what is shared out among vector
// lanes (forward) and cache-sized groups (backward).
#pragma once
#include "kernels.h"

// Some rows of one head's state, 64 at most, walking along the tokens, as many rows at a time as registers
// hold: lanes run over value channels i, the inner loop over key channels j, so there are no horizontal sums.
template <int N>
struct Scan {
  // U hides the latency of the adds
  static constexpr int L = std::min(N, 64), G = std::min(REGISTERS / 8, L / W), U = std::max(1, 2 / G);
  static constexpr int ROWS = G * W;
  alignas(64) float S[L / ROWS][N][ROWS];
  const int64_t i0;                                      // the first of the rows

  Scan(const float* s0, int64_t i0) : i0(i0) {
    for (int i = 0; i < L; ++i)
      for (int j = 0; j < N; ++j) S[i / ROWS][j][i % ROWS] = s0 ? s0[(i0 + i) * N + j] : 0.f;
  }

  void put(float* to) const {
    for (int i = 0; i < L; i += W)
      for (int j = 0; j < N; j += W) transpose(&S[i / ROWS][j][i % ROWS], ROWS, to + (i0 + i) * N + j, N);
  }

  // Tokens t..end of the head whose token 0 lies at `base`, step floats apart; before(t) is called in front
  // of each.
  template <class F>
  void run(const Wkv7& p, int64_t base, int64_t step, int64_t t, int64_t end, F before) {
    alignas(64) float ew[N], zero[N] = {}, sa[L];        // sa: S a of the token to come
    V first[L / W] = {};
    for (int j = 0; t < end && j < N; ++j) {
      const float aj = p.a[base + t * step + j];
      for (int i = 0; i < L; i += W) first[i / W] += load(&S[i / ROWS][j][i % ROWS]) * aj;
    }
    for (int i = 0; i < L; i += W) store(sa + i, first[i / W]);
    for (; t < end; ++t) {
      before(t);
      const int64_t o = base + t * step;
      for (int j = 0; j < N; j += W) store(ew + j, vexp(load(p.w + o + j)));
      for (int i = 0; i < L; i += ROWS) advance(p, o, i, ew, t + 1 < end ? p.a + o + step : zero, sa + i);
    }
  }

  // One token for the rows i..i+ROWS: updates S, reads y and prepares the next S a in one pass. Not inlined:
  // GCC would keep the constants of vexp in registers that this loop needs.
  __attribute__((noinline)) void advance(const Wkv7& p, int64_t o, int i, const float* ew, const float* a,
                                         float* sa) {
    const float *k = p.k + o, *b = p.b + o, *r = p.r + o;
    float (*s)[ROWS] = S[i / ROWS];
    V x[G], v[G], y[U][G] = {}, next[U][G] = {};
    for (int g = 0; g < G; ++g) {
      x[g] = load(sa + g * W);
      v[g] = load(p.v + o + i0 + i + g * W);
      if (p.c) x[g] += load(p.c + o + i0 + i + g * W);
      if (p.sa) store(p.sa + o + i0 + i + g * W, x[g]);
    }
    for (int j = 0; j < N; j += U)
      for (int u = 0; u < U; ++u) {
        // once, whatever S might overlap
        const float e = ew[j + u], bj = b[j + u], kj = k[j + u], rj = r[j + u], aj = a[j + u];
        for (int g = 0; g < G; ++g) {
          V z = load(&s[j + u][g * W]) * e + (x[g] * bj + v[g] * kj);
          store(&s[j + u][g * W], z);
          y[u][g] += z * rj;
          next[u][g] += z * aj;
        }
      }
    for (int g = 0; g < G; ++g) {
      for (int u = 1; u < U; ++u) { y[0][g] += y[u][g]; next[0][g] += next[u][g]; }
      store(p.y + o + i0 + i + g * W, y[0][g]);
      store(sa + g * W, next[0][g]);
    }
  }
};
