// RWKV-7 recurrence on the CPU: forward (scan.h) and backward.
#include "scan.h"

namespace {

// A head's token is N floats, and its tokens lie too far apart for the processor to foresee where it reads (write = 0) or writes next.
template <int N, int write>
inline void fetch(std::initializer_list<const float*> rows, int64_t at) {
  for (const float* x : rows)
    for (int j = 0; j < N; j += 16) __builtin_prefetch(x + at + j, write);        // a cache line holds 16
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
// Chunks are the outer loop, so that what a chunk reads and writes stays in the cache while its row groups pass over it. The loops are
// functions of their own and read what they share before they write, so that a compiler can keep it in registers.

template <int N> constexpr int R = std::min(N, 2048 / N);                     // what a group takes fits the L2 cache
template <int N> using Rows = float (*)[N];              // rows of the state, or of its gradient

// S_t from S_{t-1}, for the rows i.. of token o.
template <int N>
__attribute__((noinline)) void step(const float (*from)[N], Rows<N> to, const float* ew, const float* k, const float* b, const float* sa,
                                    const float* v) {
  constexpr int P = std::min(N / W, 2);
  for (int j = 0; j < N; j += P * W) {
    V e[P], kj[P], bj[P];
    for (int x = 0; x < P; ++x) { e[x] = load(ew + j + x * W); kj[x] = load(k + j + x * W); bj[x] = load(b + j + x * W); }
    for (int i = 0; i < R<N>; ++i) {
      const float si = sa[i], vi = v[i];
      for (int x = 0; x < P; ++x) store(&to[i][j + x * W], load(&from[i][j + x * W]) * e[x] + (bj[x] * si + kj[x] * vi));
    }
  }
}

// What y_t sends to S_t enters its gradient D; then the sums over j: dv_i = D_i k and d(sa)_i = D_i b.
template <int N>
__attribute__((noinline)) void rows(Rows<N> D, const float* r, const float* k, const float* b, const float* dy, float* dv, float* dsa) {
  constexpr int Q = std::max(REGISTERS / 4, W / 2);      // rows at once, two sums each
  for (int i = 0; i < R<N>; i += Q) {
    V sums[2 * Q] = {}, dyi[Q];
    for (int x = 0; x < Q; ++x) dyi[x] = V{} + dy[i + x];
    for (int j = 0; j < N; j += W) {
      const V rj = load(r + j), kj = load(k + j), bj = load(b + j);
      for (int x = 0; x < Q; ++x) {
        const V d = load(&D[i + x][j]) + rj * dyi[x];
        store(&D[i + x][j], d);
        sums[x] += d * kj;
        sums[Q + x] += d * bj;
      }
    }
    alignas(64) float out[2 * Q];
    for (int x = 0; x < 2 * Q; x += W) store(out + x, lane_sums(sums + x));
    std::memcpy(dv + i, out, 4 * Q);
    std::memcpy(dsa + i, out + Q, 4 * Q);
  }
}

// The sums over the rows i, and D of the token before.
template <int N>
__attribute__((noinline)) void columns(const Wkv7& p, int64_t o, const float (*prev)[N], const float (*now)[N], Rows<N> D, const float* ew,
                                       const float* dy, const float* v, const float* sa, const float* dsa, bool more) {
  constexpr int P = std::min(N / W, REGISTERS / 16);
  for (int j = 0; j < N; j += P * W) {
    V dr[P] = {}, dk[P] = {}, db[P] = {}, dw[P] = {}, da[P] = {}, e[P], a[P];
    for (int x = 0; x < P; ++x) { e[x] = load(ew + j + x * W); a[x] = load(p.a + o + j + x * W); }
    for (int i = 0; i < R<N>; ++i) {
      const float dyi = dy[i], vi = v[i], si = sa[i], di = dsa[i];
      for (int x = 0; x < P; ++x) {
        const V d = load(&D[i][j + x * W]), before = load(&prev[i][j + x * W]);
        dr[x] += load(&now[i][j + x * W]) * dyi;
        dk[x] += d * vi;
        db[x] += d * si;
        dw[x] += d * before;
        da[x] += before * di;
        store(&D[i][j + x * W], d * e[x] + a[x] * di);
      }
    }
    for (int x = 0; x < P; ++x) {
      const int64_t at = o + j + x * W;
      dw[x] *= e[x];                                     // d/d(log-decay)
      if (more) {
        dr[x] += load(p.dr + at); dk[x] += load(p.dk + at); db[x] += load(p.db + at); dw[x] += load(p.dw + at); da[x] += load(p.da + at);
      }
      store(p.dr + at, dr[x]); store(p.dk + at, dk[x]); store(p.db + at, db[x]); store(p.dw + at, dw[x]); store(p.da + at, da[x]);
    }
  }
}

template <int N>
void backward(const Wkv7& p, int64_t bh) {
  const int64_t bi = bh / p.H, h = bh % p.H, stride = p.H * N, base = (bi * p.T * p.H + h) * N;
  const int64_t chunks = (p.T + CHUNK - 1) / CHUNK, next = std::min(bh + 1, p.B * p.H - 1);
  const int64_t other = (next / p.H * p.T * p.H + next % p.H) * N + (chunks - 1) * CHUNK * stride;     // the next head's last chunk
  alignas(64) float S[CHUNK + 1][R<N>][N], all[N][N], ew[CHUNK][N];            // all: the gradient of the state
  auto add_ds = [&](int64_t n, Rows<N> D, int64_t i0, int rows) {              // that of the returned state number n
    if (!p.ds) return;
    const float* src = p.ds + ((p.every ? (bi * p.states() + n) * p.H + h : bh) * N + i0) * N;
    for (int i = 0; i < rows * N; ++i) (&D[0][0])[i] += src[i];
  };
  std::memset(all, 0, sizeof all);
  if (!p.every) add_ds(0, all, 0, N);
  for (int64_t n = chunks - 1; n >= 0; --n) {
    const int64_t t0 = n * CHUNK, len = std::min<int64_t>(CHUNK, p.T - t0);
    for (int64_t q = 0; q < len; ++q)
      for (int j = 0; j < N; j += W) store(ew[q] + j, vexp(load(p.w + base + (t0 + q) * stride + j)));
    for (int64_t i0 = 0; i0 < N; i0 += R<N>) {
      Rows<N> D = all + i0;
      fetch<R<N> * N, 0>({p.mid}, ((n ? bh * chunks + n - 1 : next * chunks + chunks - 1) * N + i0) * N);
      std::memcpy(S[0], p.mid + ((bh * chunks + n) * N + i0) * N, sizeof S[0]);
      for (int64_t q = 0; q < len; ++q) {                // the states inside this chunk once more
        const int64_t o = base + (t0 + q) * stride;
        if (!i0) fetch<N, 1>({p.dr, p.dw, p.dk, p.dv, p.da, p.db}, o);
        step<N>(S[q], S[q + 1], ew[q], p.k + o, p.b + o, p.sa + o + i0, p.v + o + i0);
      }
      for (int64_t q = len - 1; q >= 0; --q) {
        const int64_t t = t0 + q, o = base + t * stride;
        if (!i0) fetch<N, 0>({p.r, p.w, p.k, p.v, p.a, p.b, p.sa, p.dy}, n ? o - CHUNK * stride : other + q * stride);
        if (p.every && (t + 1) % p.every == 0) add_ds((t + 1) / p.every, D, i0, R<N>);
        alignas(64) float dsa[R<N>];
        rows<N>(D, p.r + o, p.k + o, p.b + o, p.dy + o + i0, p.dv + o + i0, dsa);
        if (p.dc) std::memcpy(p.dc + o + i0, dsa, sizeof dsa);
        columns<N>(p, o, S[q], S[q + 1], D, ew[q], p.dy + o + i0, p.v + o + i0, p.sa + o + i0, dsa, i0);
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
