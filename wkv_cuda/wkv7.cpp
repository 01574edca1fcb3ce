// RWKV-7 recurrence on the CPU: forward (scan.h) and backward.
#include "scan.h"

namespace {

// A head's token is N floats, and its tokens lie too far apart for the processor to foresee where it reads (write = 0) or writes next.
template <int N, int write>
inline void fetch(std::initializer_list<const float*> rows, int64_t at) {
  for (const float* x : rows)
    for (int j = 0; j < N; j += W) __builtin_prefetch(x + at + j, write);
}

template <int N>
void forward(const Wkv7& p, int64_t task) {
  const int64_t groups = N / Scan<N>::L, bh = task / groups, bi = bh / p.H, h = bh % p.H;
  const int64_t step = p.H * N, base = (bi * p.T * p.H + h) * N, chunks = (p.T + CHUNK - 1) / CHUNK;
  Scan<N> scan(p.s0 ? p.s0 + bh * N * N : nullptr, task % groups * Scan<N>::L);
  float* out = p.s + (p.every ? (bi * p.states() * p.H + h) : bh) * N * N;
  scan.run(p, base, step, 0, p.T, [&](int64_t t) {
    fetch<N, 0>({p.r, p.w, p.k, p.v, p.a, p.b}, base + (t + 4) * step);
    fetch<N, 1>({p.y, p.sa ? p.sa : p.y}, base + (t + 4) * step);
    if (p.mid && t % CHUNK == 0) scan.put(p.mid + (bh * chunks + t / CHUNK) * N * N);
    if (p.every && t % p.every == 0) scan.put(out + t / p.every * p.H * N * N);
  });
  if (!p.every) scan.put(out);
  else if (p.T % p.every == 0) scan.put(out + p.T / p.every * p.H * N * N);
}

// ---- backward: lanes run over key channels j; chunk by chunk from the last to the first, rows i in groups of R ----
// Chunks are the outer loop, so that what a chunk reads and writes stays in the cache while its row groups pass over it.
template <int N>
void backward(const Wkv7& p, int64_t bh) {
  constexpr int G = N / W, R = N > 32 ? 16 : N;
  constexpr int Q = 8, P = std::min(G, 2);               // 2 Q = 16 sums of Q rows fill one sum16; P vectors share what they read
  const int64_t bi = bh / p.H, h = bh % p.H, step = p.H * N, base = (bi * p.T * p.H + h) * N;
  const int64_t chunks = (p.T + CHUNK - 1) / CHUNK, next = std::min(bh + 1, p.B * p.H - 1);
  const int64_t other = (next / p.H * p.T * p.H + next % p.H) * N + (chunks - 1) * CHUNK * step;       // the next head's last chunk
  alignas(64) float S[CHUNK + 1][R][N], all[N][N], ew[CHUNK][N];               // all: the gradient of the state
  auto add_ds = [&](int64_t n, float (*D)[N], int64_t i0, int rows) {          // that of the returned state number n
    if (!p.ds) return;
    const float* src = p.ds + ((p.every ? (bi * p.states() + n) * p.H + h : bh) * N + i0) * N;
    for (int i = 0; i < rows * N; ++i) (&D[0][0])[i] += src[i];
  };
  std::memset(all, 0, sizeof all);
  if (!p.every) add_ds(0, all, 0, N);
  for (int64_t n = chunks - 1; n >= 0; --n) {
    const int64_t t0 = n * CHUNK, len = std::min<int64_t>(CHUNK, p.T - t0);
    for (int64_t q = 0; q < len; ++q)
      for (int j = 0; j < N; j += W) store(ew[q] + j, vexp(load(p.w + base + (t0 + q) * step + j)));
    for (int64_t i0 = 0; i0 < N; i0 += R) {
      float (*D)[N] = all + i0;
      fetch<R * N, 0>({p.mid}, ((n ? bh * chunks + n - 1 : next * chunks + chunks - 1) * N + i0) * N);
      std::memcpy(S[0], p.mid + ((bh * chunks + n) * N + i0) * N, sizeof S[0]);
      for (int64_t q = 0; q < len; ++q) {                // the states inside this chunk once more
        const int64_t o = base + (t0 + q) * step;
        if (!i0) fetch<N, 1>({p.dr, p.dw, p.dk, p.dv, p.da, p.db}, o);
        for (int g = 0; g < G; ++g) {
          const V k = load(p.k + o + g * W), b = load(p.b + o + g * W), e = load(ew[q] + g * W);
          for (int i = 0; i < R; ++i)
            store(&S[q + 1][i][g * W], load(&S[q][i][g * W]) * e + (b * p.sa[o + i0 + i] + k * p.v[o + i0 + i]));
        }
      }
      for (int64_t q = len - 1; q >= 0; --q) {
        const int64_t t = t0 + q, o = base + t * step;
        if (!i0) fetch<N, 0>({p.r, p.w, p.k, p.v, p.a, p.b, p.sa, p.dy}, n ? o - CHUNK * step : other + q * step);
        if (p.every && (t + 1) % p.every == 0) add_ds((t + 1) / p.every, D, i0, R);
        const float *dy = p.dy + o + i0, *v = p.v + o + i0, *sa = p.sa + o + i0;
        alignas(64) float dsa[R], sums[2 * Q];
        for (int i = 0; i < R; i += Q) {
          V part[2 * Q] = {};                            // rows' partial sums of dv (0..Q-1) and of d(sa) (Q..2Q-1)
          for (int j = 0; j < Q; ++j)
            for (int g = 0; g < G; ++g) {
              const V d = load(&D[i + j][g * W]) + load(p.r + o + g * W) * dy[i + j];
              store(&D[i + j][g * W], d);
              part[j] += d * load(p.k + o + g * W);
              part[Q + j] += d * load(p.b + o + g * W);
            }
          store(sums, sum16(part));
          std::memcpy(p.dv + o + i0 + i, sums, 4 * Q);
          std::memcpy(dsa + i, sums + Q, 4 * Q);
        }
        if (p.dc) std::memcpy(p.dc + o + i0, dsa, sizeof dsa);
        for (int g = 0; g < G; g += P) {
          V dr[P] = {}, dk[P] = {}, db[P] = {}, dw[P] = {}, da[P] = {}, e[P], a[P];
          for (int x = 0; x < P; ++x) { e[x] = load(ew[q] + (g + x) * W); a[x] = load(p.a + o + (g + x) * W); }
          for (int i = 0; i < R; ++i)
            for (int x = 0; x < P; ++x) {
              const int j = (g + x) * W;
              const V d = load(&D[i][j]), prev = load(&S[q][i][j]);
              dr[x] += load(&S[q + 1][i][j]) * dy[i];
              dk[x] += d * v[i];
              db[x] += d * sa[i];
              dw[x] += d * prev;
              da[x] += prev * dsa[i];
              store(&D[i][j], d * e[x] + a[x] * dsa[i]);
            }
          for (int x = 0; x < P; ++x) {
            const int64_t at = o + (g + x) * W;
            dw[x] *= e[x];                               // d/d(log-decay)
            if (i0) {
              dr[x] += load(p.dr + at); dk[x] += load(p.dk + at); db[x] += load(p.db + at); dw[x] += load(p.dw + at); da[x] += load(p.da + at);
            }
            store(p.dr + at, dr[x]); store(p.dk + at, dk[x]); store(p.db + at, db[x]); store(p.dw + at, dw[x]); store(p.da + at, da[x]);
          }
        }
      }
    }
  }
  if (p.every) add_ds(0, all, 0, N);
  if (p.ds0) std::memcpy(p.ds0 + bh * N * N, all, sizeof all);
}

template <int N>
void run(const Wkv7& p) {
  const int64_t tasks = p.B * p.H * (p.back ? 1 : N / std::min(N, 64));
  parallel_for(tasks, 1, [&](int64_t lo, int64_t hi) {
    for (int64_t i = lo; i < hi; ++i) p.back ? backward<N>(p, i) : forward<N>(p, i);
  });
}

}  // namespace

void wkv7(const Call& call) {
  const auto p = call.as<Wkv7>(6);
  switch (p.N) {
    case 16: return run<16>(p);
    case 32: return run<32>(p);
    case 64: return run<64>(p);
    case 128: return run<128>(p);
  }
}
