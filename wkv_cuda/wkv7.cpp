// RWKV-7 recurrence on the CPU: forward and backward, float32, any T, N in {16, 32, 64, 128}.
//
//   sa_t = S_{t-1} a_t + c_t
//   S_t  = S_{t-1} diag(exp w_t) + sa_t b_t^T + v_t k_t^T        y_t = S_t r_t
//
// Row i of S (a value channel) never mixes with another row, so rows are what is shared out among vector lanes
// (forward) and cache-sized groups (backward). Buffers are allocated by the caller; every tensor is contiguous.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <algorithm>
#include <cstring>
#include <optional>

using torch::stable::Tensor;

namespace {

constexpr int W = 16;       // floats in one vector: the compiler splits it where registers are narrower
constexpr int CHUNK = 16;   // tokens between two saved states; backward recomputes the states in between
typedef float V __attribute__((vector_size(4 * W)));
typedef int VI __attribute__((vector_size(4 * W)));
#ifdef __clang__
#define SHUFFLE(x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#else
#define SHUFFLE(x, y, ...) __builtin_shuffle(x, y, VI{__VA_ARGS__})
#endif

inline V load(const float* p) { V x; std::memcpy(&x, p, sizeof x); return x; }
inline void store(float* p, V x) { std::memcpy(p, &x, sizeof x); }

// exp(x) for x <= 0 (Cody-Waite reduction, degree-6 polynomial, about 1 ulp); below -87 it is 0.
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

struct Args {
  int64_t B, T, H, every;
  const float *r, *w, *k, *v, *a, *b, *s0, *c;           // s0, c may be null
  float *y, *s, *mid, *sa;                               // mid (B,H,ceil(T/CHUNK),N,N) and sa (B,T,H,N) may be null
  const float *dy, *ds;                                  // backward only
  float *dr, *dw, *dk, *dv, *da, *db, *ds0, *dc;
  int64_t states() const { return every ? T / every + 1 : 1; }
};

// ---- forward: lanes run over value channels i, the inner loop over key channels j; no horizontal sums ----
template <int N>
void forward(const Args& p, int64_t task) {
  constexpr int L = std::min(N, 64), G = L / W, U = G >= 4 ? 1 : 4 / G;     // U hides the latency of the adds
  const int64_t groups = N / L, i0 = task % groups * L, bh = task / groups, bi = bh / p.H, h = bh % p.H;
  const int64_t step = p.H * N, base = (bi * p.T * p.H + h) * N, chunks = (p.T + CHUNK - 1) / CHUNK;
  alignas(64) float S[N][L], ew[N], zero[N] = {};
  float* out = p.s + (p.every ? (bi * p.states() * p.H + h) : bh) * N * N;
  auto put = [&](float* dst) { for (int i = 0; i < L; ++i) for (int j = 0; j < N; ++j) dst[(i0 + i) * N + j] = S[j][i]; };
  for (int j = 0; j < N; ++j)
    for (int i = 0; i < L; ++i) S[j][i] = p.s0 ? p.s0[bh * N * N + (i0 + i) * N + j] : 0.f;
  if (p.every) put(out);
  V sa[G];
  for (int g = 0; g < G; ++g) sa[g] = V{};
  for (int j = 0; p.T && j < N; ++j)
    for (int g = 0; g < G; ++g) sa[g] += load(&S[j][g * W]) * p.a[base + j];
  for (int64_t t = 0; t < p.T; ++t) {
    const int64_t o = base + t * step;
    const float *k = p.k + o, *b = p.b + o, *r = p.r + o, *a = t + 1 < p.T ? p.a + o + step : zero;
    if (p.mid && t % CHUNK == 0) put(p.mid + (bh * chunks + t / CHUNK) * N * N);
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
        for (int g = 0; g < G; ++g) {                    // one pass updates S, reads y and prepares the next S a
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
    if (p.every && (t + 1) % p.every == 0) put(out + (t + 1) / p.every * p.H * N * N);
  }
  if (!p.every) put(out);
}

// ---- backward: lanes run over key channels j, rows i in groups of R; walks the chunks from the last to the first ----
template <int N>
void backward(const Args& p, int64_t bh) {
  constexpr int G = N / W, R = 8;                        // 2 R = 16 sums of a row group fill one sum16
  const int64_t bi = bh / p.H, h = bh % p.H, step = p.H * N, base = (bi * p.T * p.H + h) * N;
  const int64_t chunks = (p.T + CHUNK - 1) / CHUNK;
  alignas(64) float S[CHUNK + 1][R][N], D[R][N], ew[CHUNK][N];
  for (int64_t i0 = 0; i0 < N; i0 += R) {
    auto add_ds = [&](int64_t n) {
      if (!p.ds) return;
      const float* src = p.ds + ((p.every ? (bi * p.states() + n) * p.H + h : bh) * N + i0) * N;
      for (int i = 0; i < R * N; ++i) (&D[0][0])[i] += src[i];
    };
    std::memset(D, 0, sizeof D);
    if (!p.every) add_ds(0);
    for (int64_t n = chunks - 1; n >= 0; --n) {
      const int64_t t0 = n * CHUNK, len = std::min<int64_t>(CHUNK, p.T - t0);
      std::memcpy(S[0], p.mid + ((bh * chunks + n) * N + i0) * N, sizeof S[0]);
      for (int64_t q = 0; q < len; ++q) {                // the states inside this chunk once more
        const int64_t o = base + (t0 + q) * step;
        V k[G], b[G], e[G];
        for (int g = 0; g < G; ++g) {
          k[g] = load(p.k + o + g * W); b[g] = load(p.b + o + g * W); e[g] = vexp(load(p.w + o + g * W));
          store(ew[q] + g * W, e[g]);
        }
        for (int i = 0; i < R; ++i)
          for (int g = 0; g < G; ++g)
            store(&S[q + 1][i][g * W], load(&S[q][i][g * W]) * e[g] + (b[g] * p.sa[o + i0 + i] + k[g] * p.v[o + i0 + i]));
      }
      for (int64_t q = len - 1; q >= 0; --q) {
        const int64_t t = t0 + q, o = base + t * step;
        if (p.every && (t + 1) % p.every == 0) add_ds((t + 1) / p.every);
        const float *dy = p.dy + o + i0, *v = p.v + o + i0, *sa = p.sa + o + i0;
        V part[2 * R];                                   // rows' partial sums of dv (0..R-1) and of d(sa) (R..2R-1)
        for (int i = 0; i < R; ++i) {
          V pv = {}, ps = {};
          for (int g = 0; g < G; ++g) {
            V d = load(&D[i][g * W]) + load(p.r + o + g * W) * dy[i];
            store(&D[i][g * W], d);
            pv += d * load(p.k + o + g * W);
            ps += d * load(p.b + o + g * W);
          }
          part[i] = pv; part[R + i] = ps;
        }
        alignas(64) float sums[2 * R];
        store(sums, sum16(part));
        std::memcpy(p.dv + o + i0, sums, 4 * R);
        if (p.dc) std::memcpy(p.dc + o + i0, sums + R, 4 * R);
        for (int g = 0; g < G; ++g) {
          V dr = {}, dk = {}, db = {}, dw = {}, da = {}, e = load(ew[q] + g * W), a = load(p.a + o + g * W);
          for (int i = 0; i < R; ++i) {
            V d = load(&D[i][g * W]), prev = load(&S[q][i][g * W]);
            dr += load(&S[q + 1][i][g * W]) * dy[i];
            dk += d * v[i];
            db += d * sa[i];
            dw += d * prev;
            da += prev * sums[R + i];
            store(&D[i][g * W], d * e + a * sums[R + i]);
          }
          dw *= e;                                       // d/d(log-decay)
          const int64_t at = o + g * W;
          if (i0) {
            dr += load(p.dr + at); dk += load(p.dk + at); db += load(p.db + at); dw += load(p.dw + at); da += load(p.da + at);
          }
          store(p.dr + at, dr); store(p.dk + at, dk); store(p.db + at, db); store(p.dw + at, dw); store(p.da + at, da);
        }
      }
    }
    if (p.every) add_ds(0);
    if (p.ds0) std::memcpy(p.ds0 + (bh * N + i0) * N, D, sizeof D);
  }
}

template <int N>
void run(const Args& p, bool back) {
  const int64_t tasks = p.B * p.H * (back ? 1 : N / std::min(N, 64));
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t lo, int64_t hi) {
    for (int64_t i = lo; i < hi; ++i) back ? backward<N>(p, i) : forward<N>(p, i);
  });
}

void dispatch(const Args& p, int64_t N, bool back) {
  switch (N) {
    case 16: return run<16>(p, back);
    case 32: return run<32>(p, back);
    case 64: return run<64>(p, back);
    case 128: return run<128>(p, back);
  }
  STD_TORCH_CHECK(false, "wkv7: N must be 16, 32, 64 or 128");
}

const float* in(const Tensor& x) { return static_cast<const float*>(x.const_data_ptr()); }
const float* in(const std::optional<Tensor>& x) { return x ? in(*x) : nullptr; }
float* mut(const Tensor& x) { return static_cast<float*>(x.mutable_data_ptr()); }
float* mut(const std::optional<Tensor>& x) { return x ? mut(*x) : nullptr; }

Args inputs(const Tensor& r, const Tensor& w, const Tensor& k, const Tensor& v, const Tensor& a, const Tensor& b, int64_t every) {
  Args p{};
  p.B = r.size(0); p.T = r.size(1); p.H = r.size(2); p.every = every;
  p.r = in(r); p.w = in(w); p.k = in(k); p.v = in(v); p.a = in(a); p.b = in(b);
  return p;
}

void wkv7_forward(Tensor r, Tensor w, Tensor k, Tensor v, Tensor a, Tensor b, std::optional<Tensor> s0, std::optional<Tensor> c,
                  int64_t every, Tensor y, Tensor s, std::optional<Tensor> mid, std::optional<Tensor> sa) {
  Args p = inputs(r, w, k, v, a, b, every);
  p.s0 = in(s0); p.c = in(c); p.y = mut(y); p.s = mut(s); p.mid = mut(mid); p.sa = mut(sa);
  dispatch(p, r.size(3), false);
}

void wkv7_backward(Tensor r, Tensor w, Tensor k, Tensor v, Tensor a, Tensor b, Tensor mid, Tensor sa, int64_t every, Tensor dy,
                   std::optional<Tensor> ds, Tensor dr, Tensor dw, Tensor dk, Tensor dv, Tensor da, Tensor db,
                   std::optional<Tensor> ds0, std::optional<Tensor> dc) {
  Args p = inputs(r, w, k, v, a, b, every);
  p.mid = mut(mid); p.sa = mut(sa); p.dy = in(dy); p.ds = in(ds);
  p.dr = mut(dr); p.dw = mut(dw); p.dk = mut(dk); p.dv = mut(dv); p.da = mut(da); p.db = mut(db); p.ds0 = mut(ds0); p.dc = mut(dc);
  dispatch(p, r.size(3), true);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(nanodir_kernel, m) {
  m.def("wkv7_forward(Tensor r, Tensor w, Tensor k, Tensor v, Tensor a, Tensor b, Tensor? s0, Tensor? c, int every, "
        "Tensor(a!) y, Tensor(b!) s, Tensor(c!)? mid, Tensor(d!)? sa) -> ()");
  m.def("wkv7_backward(Tensor r, Tensor w, Tensor k, Tensor v, Tensor a, Tensor b, Tensor mid, Tensor sa, int every, Tensor dy, "
        "Tensor? ds, Tensor(a!) dr, Tensor(b!) dw, Tensor(c!) dk, Tensor(d!) dv, Tensor(e!) da, Tensor(f!) db, "
        "Tensor(g!)? ds0, Tensor(h!)? dc) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(nanodir_kernel, CPU, m) {
  m.impl("wkv7_forward", TORCH_BOX(&wkv7_forward));
  m.impl("wkv7_backward", TORCH_BOX(&wkv7_backward));
}
