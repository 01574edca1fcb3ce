// RWKV-7 recurrence on tensor cores, for what is bfloat16 anyway: forward and backward, N in {16, 32, 64},
// products in bfloat16, sums and states in float32.
//
// A chunk of 16 tokens at once. W_t is the sum of the chunk's log-decays up to token t, U_t that before it, M
// that up to its middle;
//   a^_t = e^{U_t - M} a_t,  r^_t = e^{W_t - M} r_t,  b^_t = e^{M - W_t} b_t,  k^_t = e^{M - W_t} k_t,
//   S^ = S diag(e^M)
// with S the state at the chunk's start, and rows of matrices being tokens:
//   SA = S a + c = (1 - AB)^-1 (a^ S^^T + AK V + C)          AB = a^ b^^T and AK = a^ k^^T below the diagonal
//   Y  = r^ S^^T + RB SA + RK V                              RB = r^ b^^T and RK = r^ k^^T up to the diagonal
//   next S = (S^ + SA^T b^ + V^T k^) diag(e^{W_16 - M})
// Backward, D the gradient of the next S, D^ = D diag(e^{W_16 - M}), Z the gradient of S a + c:
//   Z  = (1 - AB)^-T (RB^T dY + b^ D^^T)                     dV = RK^T dY + AK^T Z + k^ D^^T
//   da^ = Z S^ + dAB b^ + dAK k^      dr^ = dY S^ + dRB b^ + dRK k^
//   dAB = Z SA^T, dAK = Z V^T, dRB = dY SA^T, dRK = dY V^T, cut as above
//   db^ = SA D^ + dAB^T a^ + dRB^T r^      dk^ = V D^ + dAK^T a^ + dRK^T r^
//   gradient of S = (D^ + Z^T a^ + dY^T r^) diag(e^M)
// Decays below e^-10 count as e^-10, an error far below that of bfloat16, so that e^{8 * 10} is the largest
// factor.
#include "gpu.h"

namespace {

using Half = uint16_t;
constexpr float STRONGEST = 10;
constexpr int Q = CHUNK + 8;  // from row to row of 16 x 16 matrices, as P of others: banks do not collide

template <int N>
struct alignas(16) Chunk {                               // in shared memory
  static constexpr int P = N + 8;
  Half a[CHUNK][P], r[CHUNK][P], b[CHUNK][P], k[CHUNK][P], v[CHUNK][P];                 // a^, r^, b^, k^, V
  Half ak[CHUNK][Q], rb[CHUNK][Q], rk[CHUNK][Q], inverse[CHUNK][Q];  // AK, RB, RK, (1 - AB)^-1
  float ab[CHUNK][CHUNK + 1], start[N], end[N];  // AB, e^M, e^{W_16 - M}
};

template <int N>
struct BackChunk : Chunk<N> {
  using Chunk<N>::P;
  Half sa[CHUNK][P], dy[CHUNK][P], z[CHUNK][P], s[N][P], d[N][P];                       // SA, dY, Z, S^, D^
  Half dab[CHUNK][Q], dak[CHUNK][Q], drb[CHUNK][Q], drk[CHUNK][Q];
  // rel[t]: the decay from the middle to before t
  float rel[CHUNK + 1][P], gw[CHUNK][P], gu[CHUNK][P], gl[CHUNK][P], both[N / 16][N];
  uint32_t cut[2][N];                                    // what `take` returns
};

__device__ int lane() { return threadIdx.x % 32; }
__device__ int warp() { return threadIdx.x / 32; }
__device__ uint32_t word(const Half* x) { return *reinterpret_cast<const uint32_t*>(x); }
__device__ uint32_t words(const Half* x, int stride) { return x[0] | static_cast<uint32_t>(x[stride]) << 16; }
__device__ Half half_of(float x) { return static_cast<Half>(pack(x, 0)); }
__device__ float float_of(Half x) { return __uint_as_float(static_cast<uint32_t>(x) << 16); }

// What a lane holds of a 16 x 16 left factor that starts at x, as it lies there or transposed.
__device__ void left(uint32_t (&to)[4], const Half* x, int stride) {
#pragma unroll
  for (int e = 0; e < 4; ++e)
    to[e] = word(x + (lane() / 4 + e % 2 * 8) * stride + lane() % 4 * 2 + e / 2 * 8);
}
__device__ void left_transposed(uint32_t (&to)[4], const Half* x, int stride) {
#pragma unroll
  for (int e = 0; e < 4; ++e)
    to[e] = words(x + (lane() % 4 * 2 + e / 2 * 8) * stride + lane() / 4 + e % 2 * 8, stride);
}
// Two neighbouring results (16 x 8) as a left factor.
__device__ void left_of(uint32_t (&to)[4], const float (&x)[4], const float (&y)[4]) {
  to[0] = pack(x[0], x[1]), to[1] = pack(x[2], x[3]), to[2] = pack(y[0], y[1]), to[3] = pack(y[2], y[3]);
}
// d += left x (16 x 8), or left x^T where x (8 x 16) is transposed.
__device__ void multiply(float (&d)[4], const uint32_t (&left)[4], const Half* x, int stride) {
  const Half* at = x + lane() % 4 * 2 * stride + lane() / 4;
  mma(d, left, {words(at, stride), words(at + 8 * stride, stride)});
}
__device__ void multiply_transposed(float (&d)[4], const uint32_t (&left)[4], const Half* x, int stride) {
  const Half* at = x + lane() / 4 * stride + lane() % 4 * 2;
  mma(d, left, {word(at), word(at + 8)});
}

// Row and column of element e of a result.
__device__ int row_of(int e) { return lane() / 4 + e / 2 * 8; }
__device__ int col_of(int e) { return lane() % 4 * 2 + e % 2; }

// A warp has 16 rows of the state, value channels 16 warp(), ...: N / 8 results side by side.
template <int N>
struct Rows {
  float x[N / 8][4];

  template <class F>
  __device__ void each(F f) {  // f(element, its right neighbour, their row, the first one's column)
#pragma unroll
    for (int n = 0; n < N / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; e += 2) f(x[n][e], x[n][e + 1], 16 * warp() + row_of(e), 8 * n + col_of(e));
  }
  __device__ void zero() { each([](float& x, float& y, int, int) { x = y = 0; }); }
  __device__ void scale(const float* by) {
    each([&](float& x, float& y, int, int j) { x *= by[j], y *= by[j + 1]; });
  }
  __device__ void load(const float* from) {
    each([&](float& x, float& y, int i, int j) {
      const float2 z = *reinterpret_cast<const float2*>(from + i * N + j);
      x = z.x, y = z.y;
    });
  }
  __device__ void add(const float* from) {
    Rows z;
    z.load(from);
#pragma unroll
    for (int n = 0; n < N / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) x[n][e] += z.x[n][e];
  }
  __device__ void store(float* to) {
    each([&](float x, float y, int i, int j) { *reinterpret_cast<float2*>(to + i * N + j) = {x, y}; });
  }
  __device__ void factors(uint32_t (&to)[N / 16][4]) const {
#pragma unroll
    for (int m = 0; m < N / 16; ++m) left_of(to[m], x[2 * m], x[2 * m + 1]);
  }
};

// d += rows x^T, x (8 x N).
template <int N>
__device__ void multiply_rows(float (&d)[4], const uint32_t (&rows)[N / 16][4], const Half* x) {
#pragma unroll
  for (int m = 0; m < N / 16; ++m) multiply_transposed(d, rows[m], x + 16 * m, Chunk<N>::P);
}

// The tokens of a chunk as they lie in global memory, copied to shared memory while the block works on the
// chunk before. After the last token come identity steps.
enum { W_, A_, R_, B_, K_, V_, SA_, DY_ };
template <int N, int VECTORS>
struct Tokens {
  static constexpr int SHARED = VECTORS * CHUNK * N * 4;
  char* raw;

  __device__ static bool half_(unsigned half, int i) {
    constexpr int bit[] = {W, A, R, B, K, V, SA, DY};
    return half >> bit[i] & 1;
  }
  __device__ char* vector(int i) const { return raw + i * CHUNK * N * 4; }

  template <int BYTES>
  __device__ static void copy(char* to, const char* from, const Wkv7& p, const Head& at, int64_t t0) {
    constexpr int PIECES = N * BYTES / 16;               // of a token
#pragma unroll
    for (int i = 0; i < BYTES / 2; ++i) {
      const int e = i * 2 * N + threadIdx.x;
      const int64_t t = t0 + e / PIECES;
      const bool there = t >= 0 && t < p.T;
      copy16(to + 16 * e, from + (at.base + (there ? t : 0) * at.step) * BYTES + e % PIECES * 16, there);
    }
  }
  __device__ void fetch(const Wkv7& p, unsigned half, const Head& at, int64_t t0) const {
    const float* from[] = {p.w, p.a, p.r, p.b, p.k, p.v, p.sa, p.dy};
#pragma unroll
    for (int i = 0; i < VECTORS; ++i)
      if (half_(half, i)) copy<2>(vector(i), reinterpret_cast<const char*>(from[i]), p, at, t0);
      else copy<4>(vector(i), reinterpret_cast<const char*>(from[i]), p, at, t0);
  }
  // f(q, x) for the eight tokens that a thread turns into numbers: one channel, half of the chunk
  __device__ static int channel() { return threadIdx.x % N; }
  __device__ static int side() { return threadIdx.x / N; }
  template <class F>
  __device__ void each(unsigned half, int i, F f) const {
    const int first = side() * 8 * N + channel();
    float x[8];
    if (half_(half, i)) {
#pragma unroll
      for (int q = 0; q < 8; ++q) x[q] = float_of(reinterpret_cast<const Half*>(vector(i))[first + q * N]);
    } else {
#pragma unroll
      for (int q = 0; q < 8; ++q) x[q] = reinterpret_cast<const float*>(vector(i))[first + q * N];
    }
#pragma unroll
    for (int q = 0; q < 8; ++q) f(q, x[q]);
  }
};

template <int N> using ForwardTokens = Tokens<N, V_ + 1>;
template <int N> using BackTokens = Tokens<N, DY_ + 1>;

// A chunk that has been fetched, as the products take it -> bit q: token q of the thread's has a decay below
// the strongest.
template <int N, int VECTORS, class C>
__device__ uint32_t take(const Tokens<N, VECTORS>& x, unsigned half, C& c) {
  const int j = x.channel(), t = x.side() * 8;
  float before[9] = {}, e[9], grow[8];                   // e[q]: the decay from the middle to before token q
  uint32_t cut = 0;
  x.each(half, W_, [&](int q, float w) {
    if (w < -STRONGEST) cut |= 1u << q;
    before[q + 1] = before[q] + (w < -STRONGEST ? -STRONGEST : w);                    // a NaN stays one
  });
  const float middle = t ? 0 : before[8];
  (t ? c.end : c.start)[j] = expf(before[8]);
#pragma unroll
  for (int q = 0; q < 9; ++q) e[q] = expf(before[q] - middle);
#pragma unroll
  for (int q = 0; q < 8; ++q) grow[q] = expf(middle - before[q + 1]);
  x.each(half, A_, [&](int q, float a) { c.a[t + q][j] = half_of(e[q] * a); });
  x.each(half, R_, [&](int q, float r) { c.r[t + q][j] = half_of(e[q + 1] * r); });
  x.each(half, B_, [&](int q, float b) { c.b[t + q][j] = half_of(grow[q] * b); });
  x.each(half, K_, [&](int q, float k) { c.k[t + q][j] = half_of(grow[q] * k); });
  x.each(half, V_, [&](int q, float v) { c.v[t + q][j] = half_of(v); });
  if constexpr (VECTORS > DY_) {
    x.each(half, SA_, [&](int q, float sa) { c.sa[t + q][j] = half_of(sa); });
    x.each(half, DY_, [&](int q, float dy) { c.dy[t + q][j] = half_of(dy); });
#pragma unroll
    for (int q = 0; q < 8; ++q) c.rel[t + q][j] = e[q];
    if (t) c.rel[CHUNK][j] = e[8];
  }
  return cut;
}

// AB, AK, RB and RK, shared out among the warps.
template <int N>
__device__ void pairs(Chunk<N>& c) {
  for (int job = warp(); job < 4; job += N / 16) {
    const Half *x = job < 2 ? c.a[0] : c.r[0], *y = job % 2 ? c.k[0] : c.b[0];
    float d[2][4] = {};
#pragma unroll
    for (int m = 0; m < N; m += 16) {
      uint32_t l[4];
      left(l, x + m, c.P);
#pragma unroll
      for (int n = 0; n < 2; ++n) multiply_transposed(d[n], l, y + 8 * n * c.P + m, c.P);
    }
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int t = row_of(e), s = 8 * n + col_of(e);
        const float z = s < t + (job > 1) ? d[n][e] : 0;
        if (!job) c.ab[t][s] = z;
        else (job == 1 ? c.ak : job == 2 ? c.rb : c.rk)[t][s] = half_of(z);
      }
  }
}

// (1 - AB)^-1 column by column, by the first warp: both halves of it do the same.
template <int N>
__device__ void invert(Chunk<N>& c) {
  if (warp()) return;
  const int j = lane() % CHUNK;
  float x[CHUNK];
#pragma unroll
  for (int t = 0; t < CHUNK; ++t) {
    x[t] = t == j;
#pragma unroll
    for (int s = 0; s < t; ++s) x[t] += c.ab[t][s] * x[s];
    if (lane() < CHUNK) c.inverse[t][j] = half_of(x[t]);
  }
}

template <int N>
__global__ void __launch_bounds__(2 * N) forward(const Wkv7 p, const unsigned half) {
  auto& c = *reinterpret_cast<Chunk<N>*>(shared_memory());
  const Head at(p);
  const int own = 16 * warp();
  Rows<N> s;
  s.zero();
  if (p.s0) s.load(p.s0 + at.bh * N * N);
  const ForwardTokens<N> next{reinterpret_cast<char*>(&c + 1)};
  next.fetch(p, half, at, 0);
  copied();
  __syncthreads();
  for (int64_t t0 = 0; t0 < p.T; t0 += CHUNK) {
    if (p.mid) s.store(p.mid + at.mid(p, t0 / CHUNK));
    if (p.every && t0 % p.every == 0) s.store(p.s + at.state(p, t0 / p.every));
    take(next, half, c);
    __syncthreads();
    next.fetch(p, half, at, t0 + CHUNK);
    pairs(c);
    s.scale(c.start);
    __syncthreads();
    invert(c);
    // from here on transposed: rows are value channels, columns tokens
    uint32_t rows[N / 16][4], v[4], sa[4];
    float x[2][4], y[2][4];
    s.factors(rows);
    left_transposed(v, c.v[0] + own, c.P);
    // f(its number, its result, its element in the tensors) of a token that there is
    const auto each = [&](auto f) {
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          if (const int64_t t = t0 + 8 * n + col_of(e); t < p.T)
            f(n, e, at.base + t * at.step + own + row_of(e));
    };
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) x[n][e] = y[n][e] = 0;
    if (p.c) each([&](int n, int e, int64_t o) { x[n][e] = get(p.c, half >> C & 1, o); });
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      multiply_rows<N>(x[n], rows, c.a[8 * n]);
      multiply_transposed(x[n], v, c.ak[8 * n], Q);
      multiply_rows<N>(y[n], rows, c.r[8 * n]);
      multiply_transposed(y[n], v, c.rk[8 * n], Q);
    }
    __syncthreads();
    left_of(sa, x[0], x[1]);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) x[n][e] = 0;
      multiply_transposed(x[n], sa, c.inverse[8 * n], Q);
    }
    left_of(sa, x[0], x[1]);
#pragma unroll
    for (int n = 0; n < 2; ++n) multiply_transposed(y[n], sa, c.rb[8 * n], Q);
    each([&](int n, int e, int64_t o) {
      if (p.sa) p.sa[o] = x[n][e];
      put(p.y, half >> Y & 1, o, y[n][e]);
    });
#pragma unroll
    for (int n = 0; n < N / 8; ++n) {
      multiply(s.x[n], sa, c.b[0] + 8 * n, c.P);
      multiply(s.x[n], v, c.k[0] + 8 * n, c.P);
    }
    s.scale(c.end);
    copied();
    __syncthreads();
  }
  if (!p.every || p.T % p.every == 0) s.store(p.s + at.state(p, p.every ? p.T / p.every : 0));
}

template <int N>
__global__ void __launch_bounds__(2 * N) backward(const Wkv7 p, const unsigned half) {
  constexpr int P = Chunk<N>::P;
  auto& c = *reinterpret_cast<BackChunk<N>*>(shared_memory());
  const Head at(p);
  const int own = 16 * warp();
  Rows<N> d;
  const auto add_ds = [&](int64_t n) { if (p.ds) d.add(p.ds + at.state(p, n)); };
  d.zero();
  if (!p.every) add_ds(0);
  const BackTokens<N> next{reinterpret_cast<char*>(&c + 1)};
  next.fetch(p, half, at, (at.chunks - 1) * CHUNK);
  copied();
  __syncthreads();
  for (int64_t n0 = at.chunks - 1; n0 >= 0; --n0) {
    const int64_t t0 = n0 * CHUNK;
    if (p.every && (t0 + CHUNK) % p.every == 0 && t0 + CHUNK <= p.T) add_ds((t0 + CHUNK) / p.every);
    Rows<N> s;                                           // the chunk's first state
    s.load(p.mid + at.mid(p, n0));
    const uint32_t cut = take(next, half, c);
    __syncthreads();
    c.cut[next.side()][next.channel()] = cut;
    next.fetch(p, half, at, t0 - CHUNK);
    pairs(c);
    float both[N / 8][2] = {};                           // sums of D^ S^ over the rows
    d.scale(c.end);
    s.scale(c.start);
    s.each([&](float x, float y, int i, int j) { *reinterpret_cast<uint32_t*>(&c.s[i][j]) = pack(x, y); });
    d.each([&](float x, float y, int i, int j) { *reinterpret_cast<uint32_t*>(&c.d[i][j]) = pack(x, y); });
#pragma unroll
    for (int n = 0; n < N / 8; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& x = both[n][e];
        x = d.x[n][e] * s.x[n][e] + d.x[n][e + 2] * s.x[n][e + 2];
#pragma unroll
        for (int apart = 4; apart < 32; apart *= 2) x += __shfl_xor_sync(ALL, x, apart);
        if (lane() < 4) c.both[warp()][8 * n + col_of(e)] = x;
      }
    __syncthreads();
    invert(c);
    // transposed, as in forward: Z and dV
    uint32_t rows[N / 16][4], dy[4], z[4];
    float x[2][4] = {}, dv[2][4] = {};
    d.factors(rows);
    left_transposed(dy, c.dy[0] + own, P);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      multiply(x[n], dy, c.rb[0] + 8 * n, Q);
      multiply_rows<N>(x[n], rows, c.b[8 * n]);
      multiply(dv[n], dy, c.rk[0] + 8 * n, Q);
      multiply_rows<N>(dv[n], rows, c.k[8 * n]);
    }
    __syncthreads();
    left_of(z, x[0], x[1]);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) x[n][e] = 0;
      multiply(x[n], z, c.inverse[0] + 8 * n, Q);
    }
    left_of(z, x[0], x[1]);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      multiply(dv[n], z, c.ak[0] + 8 * n, Q);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int t = 8 * n + col_of(e), i = own + row_of(e);
        c.z[t][i] = half_of(x[n][e]);
        if (t0 + t >= p.T) continue;
        const int64_t o = at.base + (t0 + t) * at.step + i;
        put(p.dv, half >> DV & 1, o, dv[n][e]);
        if (p.dc) p.dc[o] = x[n][e];
      }
    }
#pragma unroll
    for (int n = 0; n < N / 8; ++n) {
      multiply(d.x[n], z, c.a[0] + 8 * n, P);
      multiply(d.x[n], dy, c.r[0] + 8 * n, P);
    }
    d.scale(c.start);
    __syncthreads();
    // gradients of AB, AK, RB and RK, shared out among the warps
    for (int job = warp(); job < 4; job += N / 16) {
      const Half *l = job < 2 ? c.z[0] : c.dy[0], *r = job % 2 ? c.v[0] : c.sa[0];
      float g[2][4] = {};
#pragma unroll
      for (int m = 0; m < N; m += 16) {
        uint32_t f[4];
        left(f, l + m, P);
#pragma unroll
        for (int n = 0; n < 2; ++n) multiply_transposed(g[n], f, r + 8 * n * P + m, P);
      }
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int t = row_of(e), s = 8 * n + col_of(e);
          (job == 0 ? c.dab : job == 1 ? c.dak : job == 2 ? c.drb : c.drk)[t][s] =
              half_of(s < t + (job > 1) ? g[n][e] : 0);
        }
    }
    __syncthreads();
    // the rest with tokens as rows; a warp has 16 key channels, the first is `own`
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const int col = own + 8 * n;
      float ga[4] = {}, gr[4] = {}, gb[4] = {}, gk[4] = {}, far[4];
      uint32_t f[4];
      const auto over_values = [&](float (&to)[4], const Half* x, const Half* y) {
#pragma unroll
        for (int m = 0; m < N; m += 16) {
          left(f, x + m, P);
          multiply(to, f, y + m * P + col, P);
        }
      };
      const auto over_tokens = [&](float (&to)[4], const Half* x, const Half* y) {
        left(f, x, Q);
        multiply(to, f, y + col, P);
      };
      const auto over_later = [&](float (&to)[4], const Half* x, const Half* y) {
        left_transposed(f, x, Q);
        multiply(to, f, y + col, P);
      };
      over_values(ga, c.z[0], c.s[0]), over_tokens(ga, c.dab[0], c.b[0]), over_tokens(ga, c.dak[0], c.k[0]);
      over_values(gr, c.dy[0], c.s[0]), over_tokens(gr, c.drb[0], c.b[0]), over_tokens(gr, c.drk[0], c.k[0]);
      over_values(gb, c.sa[0], c.d[0]);
      over_values(gk, c.v[0], c.d[0]);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int t = row_of(e), j = col + col_of(e);
        far[e] = float_of(c.b[t][j]) * gb[e] + float_of(c.k[t][j]) * gk[e];
      }
      over_later(gb, c.dab[0], c.a[0]), over_later(gb, c.drb[0], c.r[0]);
      over_later(gk, c.dak[0], c.a[0]), over_later(gk, c.drk[0], c.r[0]);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int t = row_of(e), j = col + col_of(e);
        c.gu[t][j] = float_of(c.a[t][j]) * ga[e];
        c.gw[t][j] = float_of(c.r[t][j]) * gr[e] - float_of(c.b[t][j]) * gb[e] - float_of(c.k[t][j]) * gk[e];
        c.gl[t][j] = far[e];
        const float after = c.rel[t + 1][j], grow = 1 / after;
        ga[e] *= c.rel[t][j], gr[e] *= after, gb[e] *= grow, gk[e] *= grow;
      }
#pragma unroll
      for (int e = 0; e < 4; e += 2) {
        if (t0 + row_of(e) >= p.T) continue;
        const int64_t o = at.base + (t0 + row_of(e)) * at.step + col + col_of(e);
        put(p.da, half >> DA & 1, o, ga[e], ga[e + 1]);
        put(p.dr, half >> DR & 1, o, gr[e], gr[e + 1]);
        put(p.db, half >> DB & 1, o, gb[e], gb[e + 1]);
        put(p.dk, half >> DK & 1, o, gk[e], gk[e + 1]);
      }
    }
    copied();
    __syncthreads();
    // dw_s: what all W_t with t >= s and U_t with t > s get, and what W_16 gets
    if (threadIdx.x < N) {
      const int j = threadIdx.x;
      float sum = 0;
#pragma unroll
      for (int i = 0; i < N / 16; ++i) sum += c.both[i][j];
#pragma unroll
      for (int t = 0; t < CHUNK; ++t) sum += c.gl[t][j];
#pragma unroll
      for (int t = CHUNK - 1; t >= 0; --t) {
        sum += c.gw[t][j];
        if (t0 + t < p.T) {
          const int64_t o = at.base + (t0 + t) * at.step + j;
          put(p.dw, half >> DW & 1, o, c.cut[t / 8][j] >> t % 8 & 1 ? 0 : sum);
        }
        sum += c.gu[t][j];
      }
    }
  }
  if (p.every) add_ds(0);
  if (p.ds0) d.store(p.ds0 + at.bh * N * N);
}

template <int N>
bool run(const Wkv7& p, unsigned half, void* stream) {
  constexpr int64_t BACK = sizeof(BackChunk<N>) + BackTokens<N>::SHARED;
  if (p.back) launch(backward<N>, p.B * p.H, 2 * N, BACK, stream, p, half);
  else launch(forward<N>, p.B * p.H, 2 * N, sizeof(Chunk<N>) + ForwardTokens<N>::SHARED, stream, p, half);
  return true;
}

}  // namespace

bool wkv7_bf16(const Wkv7& p, unsigned half, void* stream) {
  if (!(half >> R & 1) || p.every % CHUNK) return false;
  for (const float* x : {p.w, p.a, p.r, p.b, p.k, p.v, static_cast<const float*>(p.sa), p.dy})
    // a view that starts anywhere: copy16 takes no such
    if (reinterpret_cast<uintptr_t>(x) % 16) return false;
  switch (p.N) {
    case 16: return run<16>(p, half, stream);
    case 32: return run<32>(p, half, stream);
    case 64: return run<64>(p, half, stream);
    default: return false;
  }
}
