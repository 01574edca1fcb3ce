// RWKV-7 recurrence on the CPU: forward (scan.h) and backward.
#include <thread>
#include "scan.h"

namespace {

// A head's token is N floats, and its tokens lie too far apart for the processor to foresee where it reads
// (write = 0) or writes next.
template <int N, int write>
inline void fetch(std::initializer_list<const float*> rows, int64_t at) {
  for (const float* x : rows)
    for (int j = 0; j < N; j += 16) __builtin_prefetch(x + at + j, write);        // a cache line holds 16
}

// Heads first..last of a row of the batch, a chunk of tokens at a time: what a chunk of several heads reads
// lies side by side.
template <int N>
void forward(const Wkv7& p, int64_t bi, int64_t first, int64_t last) {
  const int64_t step = p.H * N, chunks = (p.T + CHUNK - 1) / CHUNK;
  std::vector<Scan<N>> scans;
  for (int64_t h = first; h < last; ++h)
    for (int i0 = 0; i0 < N; i0 += Scan<N>::L)
      scans.emplace_back(p.s0 ? p.s0 + (bi * p.H + h) * N * N : nullptr, i0);
  for (int64_t t0 = 0; t0 <= p.T; t0 += CHUNK)
    for (size_t i = 0; i < scans.size(); ++i) {
      Scan<N>& scan = scans[i];
      const int64_t h = first + i * Scan<N>::L / N, bh = bi * p.H + h, end = std::min(t0 + CHUNK, p.T);
      auto put = [&](int64_t n) { scan.put(p.s + ((bi * p.states() + n) * p.H + h) * N * N); };
      if (p.mid && t0 < p.T) scan.put(p.mid + (bh * chunks + t0 / CHUNK) * N * N);
      scan.run(p, (bi * p.T * p.H + h) * N, step, t0, end, [&](int64_t t) {
        fetch<N, 0>({p.r, p.w, p.k, p.v, p.a, p.b}, (bi * p.T * p.H + h) * N + (t + CHUNK) * step);
        fetch<N, 1>({p.y, p.sa ? p.sa : p.y}, (bi * p.T * p.H + h) * N + (t + CHUNK) * step);
        if (p.every && t % p.every == 0) put(t / p.every);
      });
      if (end == p.T && t0 + CHUNK > p.T && (!p.every || p.T % p.every == 0)) put(p.states() - 1);
    }
}

// ---- backward: lanes are key channels j; chunk by chunk from the last to the first, rows i in groups ----
// Chunks are the outer loop, so that what a chunk reads and writes stays in the cache while its row groups
// pass over it. The loops are functions of their own and read what they share before they write, so that a
// compiler can keep it in registers.

template <int N> constexpr int R = std::min(N, 2048 / N);  // what a group takes fits the L2 cache
template <int N> using Rows = float (*)[N];              // rows of the state, or of its gradient

// S_t from S_{t-1}, for the rows i.. of token o.
template <int N>
__attribute__((noinline)) void step(const float (*from)[N], Rows<N> to, const float* ew, const float* k,
                                    const float* b, const float* sa, const float* v) {
  constexpr int P = std::min(N / W, 2);
  for (int j = 0; j < N; j += P * W) {
    V e[P], kj[P], bj[P];
    for (int x = 0; x < P; ++x) {
      const int at = j + x * W;
      e[x] = load(ew + at); kj[x] = load(k + at); bj[x] = load(b + at);
    }
    for (int i = 0; i < R<N>; ++i) {
      const float si = sa[i], vi = v[i];
      for (int x = 0; x < P; ++x)
        store(&to[i][j + x * W], load(&from[i][j + x * W]) * e[x] + (bj[x] * si + kj[x] * vi));
    }
  }
}

// What y_t sends to S_t enters its gradient D; then the sums over j: dv_i = D_i k and d(sa)_i = D_i b.
template <int N>
__attribute__((noinline)) void rows(Rows<N> D, const float* r, const float* k, const float* b,
    const float* dy, float* dv, float* dsa) {
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

// A chunk's tokens of one head side by side, and their gradients. Where they come from they lie so many bytes
// apart that they crowd each other out of a few sets of the cache.
template <int N>
struct Chunk {
  alignas(64) float r[CHUNK][N], ew[CHUNK][N], k[CHUNK][N], v[CHUNK][N], a[CHUNK][N], b[CHUNK][N],
      sa[CHUNK][N], dy[CHUNK][N];
  alignas(64) float dr[CHUNK][N], dw[CHUNK][N], dk[CHUNK][N], dv[CHUNK][N], da[CHUNK][N], db[CHUNK][N],
      dsa[CHUNK][N];
};

// The sums over the rows i, and D of the token before.
template <int N>
__attribute__((noinline)) void columns(Chunk<N>& c, int64_t q, int64_t i0, const float (*prev)[N],
    const float (*now)[N], Rows<N> D) {
  const float *dy = c.dy[q] + i0, *v = c.v[q] + i0, *sa = c.sa[q] + i0, *dsa = c.dsa[q] + i0;
  constexpr int P = std::min(N / W, REGISTERS / 16);
  for (int j = 0; j < N; j += P * W) {
    V dr[P] = {}, dk[P] = {}, db[P] = {}, dw[P] = {}, da[P] = {}, e[P], a[P];
    for (int x = 0; x < P; ++x) { e[x] = load(c.ew[q] + j + x * W); a[x] = load(c.a[q] + j + x * W); }
    for (int i = 0; i < R<N>; ++i) {
      const float dyi = dy[i], vi = v[i], si = sa[i], di = dsa[i];
      for (int x = 0; x < P; ++x) {
        const V d = held(load(&D[i][j + x * W])), before = held(load(&prev[i][j + x * W]));
        dr[x] += load(&now[i][j + x * W]) * dyi;
        dk[x] += d * vi;
        db[x] += d * si;
        dw[x] += d * before;
        da[x] += before * di;
        store(&D[i][j + x * W], d * e[x] + a[x] * di);
      }
    }
    for (int x = 0; x < P; ++x) {
      const int at = j + x * W;
      dw[x] *= e[x];                                     // d/d(log-decay)
      if (i0) {
        dr[x] += load(c.dr[q] + at); dk[x] += load(c.dk[q] + at); db[x] += load(c.db[q] + at);
        dw[x] += load(c.dw[q] + at); da[x] += load(c.da[q] + at);
      }
      store(c.dr[q] + at, dr[x]); store(c.dk[q] + at, dk[x]); store(c.db[q] + at, db[x]);
      store(c.dw[q] + at, dw[x]); store(c.da[q] + at, da[x]);
    }
  }
}

template <int N> struct Gradient { alignas(64) float of[N][N] = {}; };        // of a head's state

template <int N>
void backward(const Wkv7& p, int64_t bi, int64_t first, int64_t last) {
  const int64_t stride = p.H * N, chunks = (p.T + CHUNK - 1) / CHUNK;
  alignas(64) float S[CHUNK + 1][R<N>][N];
  Chunk<N> c;
  std::vector<Gradient<N>> all(last - first);
  auto add_ds = [&](int64_t n, int64_t h, int64_t i0, int rows) {  // that of the returned state number n
    if (!p.ds) return;
    const float* src = p.ds + (((bi * p.states() + n) * p.H + h) * N + i0) * N;
    float* to = &all[h - first].of[i0][0];
    for (int i = 0; i < rows * N; ++i) to[i] += src[i];
  };
  for (int64_t h = first; !p.every && h < last; ++h) add_ds(0, h, 0, N);
  for (int64_t n = chunks - 1; n >= 0; --n)
    for (int64_t h = first; h < last; ++h) {
      const int64_t t0 = n * CHUNK, len = std::min<int64_t>(CHUNK, p.T - t0);
      const int64_t base = ((bi * p.T + t0) * p.H + h) * N;
      const float* mid = p.mid + ((bi * p.H + h) * chunks + n) * N * N;
      for (int64_t q = 0; q < len; ++q) {
        const int64_t o = base + q * stride;
        if (n) fetch<N, 0>({p.r, p.w, p.k, p.v, p.a, p.b, p.sa, p.dy}, o - CHUNK * stride);
        fetch<N, 1>({p.dr, p.dw, p.dk, p.dv, p.da, p.db}, o);
        for (int j = 0; j < N; j += W) {
          store(c.r[q] + j, load(p.r + o + j)); store(c.ew[q] + j, vexp(load(p.w + o + j)));
          store(c.k[q] + j, load(p.k + o + j)); store(c.v[q] + j, load(p.v + o + j));
          store(c.a[q] + j, load(p.a + o + j)); store(c.b[q] + j, load(p.b + o + j));
          store(c.sa[q] + j, load(p.sa + o + j)); store(c.dy[q] + j, load(p.dy + o + j));
        }
      }
      for (int64_t i0 = 0; i0 < N; i0 += R<N>) {
        Rows<N> D = all[h - first].of + i0;
        if (n) fetch<R<N> * N, 0>({mid}, (i0 - N) * N);  // the chunk before
        std::memcpy(S[0], mid + i0 * N, sizeof S[0]);
        for (int64_t q = 0; q < len; ++q)                // the states inside this chunk once more
          step<N>(S[q], S[q + 1], c.ew[q], c.k[q], c.b[q], c.sa[q] + i0, c.v[q] + i0);
        for (int64_t q = len - 1; q >= 0; --q) {
          if (p.every && (t0 + q + 1) % p.every == 0) add_ds((t0 + q + 1) / p.every, h, i0, R<N>);
          rows<N>(D, c.r[q], c.k[q], c.b[q], c.dy[q] + i0, c.dv[q] + i0, c.dsa[q] + i0);
          columns<N>(c, q, i0, S[q], S[q + 1], D);
        }
      }
      for (int64_t q = 0; q < len; ++q) {
        const int64_t o = base + q * stride;
        for (int j = 0; j < N; j += W) {
          store(p.dr + o + j, load(c.dr[q] + j)); store(p.dw + o + j, load(c.dw[q] + j));
          store(p.dk + o + j, load(c.dk[q] + j)); store(p.dv + o + j, load(c.dv[q] + j));
          store(p.da + o + j, load(c.da[q] + j)); store(p.db + o + j, load(c.db[q] + j));
          if (p.dc) store(p.dc + o + j, load(c.dsa[q] + j));
        }
      }
    }
  for (int64_t h = first; h < last; ++h) {
    if (p.every) add_ds(0, h, 0, N);
    if (p.ds0) std::memcpy(p.ds0 + (bi * p.H + h) * N * N, all[h - first].of, sizeof all[0].of);
  }
}

// Heads of a row of the batch go together as long as that leaves four pieces of work for every processor.
template <int N>
void run(const Wkv7& p) {
  const int64_t fair = p.B * p.H / (4 * std::max(1u, std::thread::hardware_concurrency()));
  const int64_t some = std::max<int64_t>(1, std::min<int64_t>({p.H, fair, 256 / N}));
  const int64_t groups = (p.H + some - 1) / some;
  parallel_for(p.B * groups, 1, [&](int64_t lo, int64_t hi) {
    for (int64_t i = lo; i < hi; ++i) {
      const int64_t first = i % groups * some, last = std::min(first + some, p.H);
      p.back ? backward<N>(p, i / groups, first, last) : forward<N>(p, i / groups, first, last);
    }
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
