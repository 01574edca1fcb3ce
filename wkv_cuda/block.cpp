// The memory-bound elementwise parts of a block on the CPU, each one pass over its rows forward and one
// backward: token shift, what goes into the recurrence and what comes out of it, squared ReLU. The formulas
// are in definitions.py.
#include <cmath>
#include "scan.h"

namespace {

// A row is a token: C contiguous floats, C a multiple of W; d... is read and written by backward only.
struct ShiftMix {
  int64_t B, T, C, n, reach, back;  // reach: 0 = all channels from the token before, else 2 reach groups
  const float *x, *last, *mix;                           // last may be null; mix (n,C)
  float* const* outs;                                    // n outputs, or their gradients
  float *dx, *dlast, *dmix;

  static ShiftMix of(const Call& call) {
    auto p = call.as<ShiftMix>(6);
    p.outs = call.buffers.data() + (p.back ? 3 + p.n : 3);
    if (p.back) p.dx = p.outs[p.n], p.dlast = p.outs[p.n + 1], p.dmix = p.outs[p.n + 2];
    return p;
  }
};

struct Wkv7Inputs {
  int64_t B, T, C, N, back;
  // v, gate, v_first, v0 may be null together
  const float *w, *a, *k, *v, *gate, *v_first, *w0, *a0, *v0, *k_k, *k_a;
  const bool* valid;                                     // a flag a row, or null
  float *w_out, *k_out, *a_out, *b_out, *v_out;          // backward reads w_out, but not w and w0
  const float *dw_out, *dk_out, *da_out, *db_out, *dv_out;
  float *dw, *da, *dk, *dv, *dgate, *dv_first, *sums;    // sums (4 or 5,C): d of w0, a0, k_k, k_a and v0

  static Wkv7Inputs of(const Call& call) { return call.as<Wkv7Inputs>(5); }
};

struct Wkv7Output {
  int64_t B, T, C, N, back;
  const float *y, *r, *k, *v, *g, *r_k, *weight, *bias;
  float* out;
  const float* dout;
  float *dy, *dr, *dk, *dv, *dg, *sums;                  // sums (3,C): d of r_k, weight, bias
  double eps;

  static Wkv7Output of(const Call& call) {
    auto p = call.as<Wkv7Output>(5);
    p.eps = call.eps;
    return p;
  }
};

struct ReadState {
  int64_t B, T, H, N, back;
  const float *q, *s, *y;                                // (B,T,H,N), y may be null; s (B,H,N,N)
  float* out;
  const float* dout;
  float *dq, *ds;

  static ReadState of(const Call& call) { return call.as<ReadState>(5); }
};

struct SquaredReLU {
  int64_t n, back;
  const float* x;
  float* y;
  const float* dy;
  float* dx;

  static SquaredReLU of(const Call& call) { return call.as<SquaredReLU>(2); }
};

// A kernel's rows, and those of its buffers that may hold bfloat16: (rows,C), from the index `written` on
// outputs.
struct Rows {
  const Call& call;
  int64_t rows, C;
  size_t written;
  int64_t beyond = 0;  // rows that are read before the first and after the last one of a range
};

void widen(const uint16_t* from, int64_t n, float* to) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t x = uint32_t(from[i]) << 16;
    std::memcpy(to + i, &x, 4);
  }
}

void narrow(const float* from, int64_t n, uint16_t* to) {
  for (int64_t i = 0; i < n; ++i) {
    uint32_t x;
    std::memcpy(&x, from + i, 4);
    const uint32_t nearest = (x + 0x7FFF + (x >> 16 & 1)) >> 16;  // ties to even; NaN could become infinite
    to[i] = (x & 0x7FFFFFFF) > 0x7F800000 ? x >> 16 | 0x40 : nearest;
  }
}

// f(call, lo, hi) for rows lo..hi, with nothing but float32 in that call: bfloat16 goes through copies of a
// few rows at a time, which stay in the cache, so there is one f for both. Where all is float32, f gets the
// whole range.
void in_float32(const Rows& r, int64_t lo, int64_t hi,
    const std::function<void(const Call&, int64_t, int64_t)>& f) {
  const std::vector<bool>& half = r.call.half;
  const int64_t halves = std::count(half.begin(), half.end(), true);
  const int64_t few = halves ? std::max<int64_t>(1, 512 / r.C) : hi - lo;
  // 3: so that copies share no sets of the cache
  const int64_t size = ((few + 2 * r.beyond) * r.C + W - 1) / W + 3;
  std::vector<V> space(halves * size);                   // of vectors, for their alignment
  Call call = r.call;
  for (int64_t start = lo; start < hi; start += few) {
    const int64_t end = std::min(start + few, hi), o = start * r.C;
    const int64_t first = std::max<int64_t>(0, start - r.beyond) * r.C;
    V* copy = space.data();
    for (size_t i = 0; i < half.size(); ++i) {
      if (!half[i]) continue;
      float* at = reinterpret_cast<float*>(copy);
      const int64_t size_read = std::min(end + r.beyond, r.rows) * r.C - first;
      if (i < r.written) widen(reinterpret_cast<const uint16_t*>(r.call.buffers[i]) + first, size_read, at);
      call.buffers[i] = at - first;                          // where row 0 would be
      copy += size;
    }
    f(call, start, end);
    for (size_t i = r.written; i < half.size(); ++i)
      if (half[i])
        narrow(call.buffers[i] + o, end * r.C - o, reinterpret_cast<uint16_t*>(r.call.buffers[i]) + o);
  }
}

// Forward: f(p, lo, hi) for ranges of rows, none so short that starting a thread costs more than it saves.
template <class P>
void over_rows(const Rows& r, void f(const P&, int64_t, int64_t)) {
  parallel_for(r.rows, std::max<int64_t>(1, 8192 / r.C), [&](int64_t lo, int64_t hi) {
    in_float32(r, lo, hi, [&](const Call& call, int64_t from, int64_t to) { f(P::of(call), from, to); });
  });
}

// Backward: f(p, lo, hi, part) for ranges of rows whose number depends on `rows` alone. Each adds its share
// of the parameters' gradients to `part`, zeros at first; the shares are added up in order, so the result
// does not depend on the number of threads.
template <class P>
void with_sums(const Rows& r, int64_t width, float* sums, void f(const P&, int64_t, int64_t, float*)) {
  const int64_t rows = r.rows, pieces = std::max<int64_t>(16, rows / 512);
  std::vector<float> parts(pieces * width);
  const int64_t grain = std::max<int64_t>(1, pieces * 8192 / std::max<int64_t>(1, rows * r.C));
  parallel_for(pieces, grain, [&](int64_t lo, int64_t hi) {
    for (int64_t i = lo; i < hi; ++i)
      in_float32(r, rows * i / pieces, rows * (i + 1) / pieces,
          [&](const Call& call, int64_t from, int64_t to) {
        f(P::of(call), from, to, &parts[i * width]);
      });
  });
  for (int64_t j = 0; j < width; j += W) {
    V s = {};
    for (int64_t i = 0; i < pieces; ++i) s += load(&parts[i * width + j]);
    store(sums + j, s);
  }
}

inline void add(float* p, V x) { store(p, load(p) + x); }

struct Sigmoid { V s, d; };                              // value and derivative

inline Sigmoid sigmoid(V x) {
  V e = vexp(x < 0.f ? x : -x), r = 1.f / (1.f + e), s = x < 0.f ? e * r : r;
  return {x == x ? s : x, e * r * r};  // vexp drops NaN: a diverged run must not look healthy
}

// How far from its own the token is that channel c is mixed with: -1, or by groups of channels -reach..-1,
// 1..reach.
inline int64_t offset(const ShiftMix& p, int64_t c) {
  if (!p.reach) return -1;
  const int64_t group = c * 2 * p.reach / p.C;
  return group - p.reach + (group >= p.reach);
}

// That token's channel c, or null where there is none; before the first there is p.last.
inline const float* neighbour(const ShiftMix& p, int64_t row, int64_t c, int64_t d) {
  const int64_t t = row % p.T + d;
  if (t >= 0 && t < p.T) return p.x + (row + d) * p.C + c;
  return t == -1 && p.last ? p.last + row / p.T * p.C + c : nullptr;
}

void shift_mix_forward(const ShiftMix& p, int64_t lo, int64_t hi) {
  for (int64_t row = lo; row < hi; ++row)
    for (int64_t c = 0; c < p.C; c += W) {
      const float* other = neighbour(p, row, c, offset(p, c));
      V now = load(p.x + row * p.C + c), change = (other ? load(other) : V{}) - now;
      for (int64_t i = 0; i < p.n; ++i)
        store(p.outs[i] + row * p.C + c, now + change * load(p.mix + i * p.C + c));
    }
}

// Upwards, as the processor prefetches best. Where all channels come from the row before, a row adds what it
// sends back, sum_i mix_i g_i, to that row's dx; otherwise it fetches what was sent to it.
void shift_mix_backward(const ShiftMix& p, int64_t lo, int64_t hi, float* dmix) {
  auto sent = [&](int64_t row, int64_t c) {
    V sum = {};
    for (int64_t i = 0; i < p.n; ++i) sum += load(p.outs[i] + row * p.C + c) * load(p.mix + i * p.C + c);
    return sum;
  };
  for (int64_t row = lo; row < hi; ++row) {
    const int64_t o = row * p.C, t = row % p.T, b = row / p.T;
    for (int64_t c = 0; c < p.C; c += W) {
      const int64_t d = offset(p, c), from = t - d;
      const float* other = neighbour(p, row, c, d);
      V change = (other ? load(other) : V{}) - load(p.x + o + c), dx = {}, dother = {};
      for (int64_t i = 0; i < p.n; ++i) {
        V g = load(p.outs[i] + o + c), to_other = g * load(p.mix + i * p.C + c);
        dx += g - to_other;
        dother += to_other;
        add(dmix + i * p.C + c, g * change);
      }
      if (p.reach) {
        store(p.dx + o + c, from >= 0 && from < p.T ? dx + sent(row - d, c) : dx);
        if (t == 0 && p.dlast)
          store(p.dlast + b * p.C + c, d < 0 && -1 - d < p.T ? sent(row - 1 - d, c) : V{});
        continue;
      }
      store(p.dx + o + c, dx);
      if (t && row > lo) add(p.dx + o - p.C + c, dother);
      else if (t == 0 && p.dlast) store(p.dlast + b * p.C + c, dother);
    }
  }
  // the row after the last one is another range's
  for (int64_t c = 0; !p.reach && hi > lo && hi % p.T && c < p.C; c += W)
    add(p.dx + (hi - 1) * p.C + c, sent(hi, c));
}

constexpr float STRONGEST = -0.606530660f;               // -exp(-0.5), the log-decay's bound
constexpr float TINY = 1e-12f;                           // F.normalize's eps

constexpr int MOST = 128 / W;                             // vectors in a head

void inputs_forward(const Wkv7Inputs& p, int64_t lo, int64_t hi) {
  const int64_t N = p.N, G = N / W;
  for (int64_t o = lo * p.C; o < hi * p.C; o += p.C) {
    const bool pad = p.valid && !p.valid[o / p.C];
    for (int64_t h = 0; h < p.C; h += N) {
      V k[MOST], kk[MOST], square = {};
      for (int g = 0; g < G; ++g) {
        const int64_t c = h + g * W;
        k[g] = load(p.k + o + c);
        kk[g] = k[g] * load(p.k_k + c);
        square += kk[g] * kk[g];
        if (p.gate) {
          V v = load(p.v + o + c);
          V gate = sigmoid(load(p.v0 + c) + load(p.gate + o + c)).s;
          store(p.v_out + o + c, v + (load(p.v_first + o + c) - v) * gate);
        }
      }
      const float scale = 1.f / std::max(std::sqrt(total(square)[0]), TINY);
      for (int g = 0; g < G; ++g) {
        const int64_t c = h + g * W;
        V w = sigmoid(load(p.w0 + c) + load(p.w + o + c)).s * STRONGEST;
        V iclr = sigmoid(load(p.a0 + c) + load(p.a + o + c)).s;
        V out = k[g] * (1.f + (iclr - 1.f) * load(p.k_a + c)), unit = kk[g] * scale;
        store(p.w_out + o + c, pad ? V{} : w);
        store(p.k_out + o + c, pad ? V{} : out);
        store(p.a_out + o + c, pad ? V{} : -unit);
        store(p.b_out + o + c, pad ? V{} : unit * iclr);
      }
    }
  }
}

void inputs_backward(const Wkv7Inputs& p, int64_t lo, int64_t hi, float* sums) {
  const int64_t N = p.N, G = N / W;
  float *dw0 = sums, *da0 = sums + p.C, *dk_k = sums + 2 * p.C, *dk_a = sums + 3 * p.C, *dv0 = sums + 4 * p.C;
  for (int64_t o = lo * p.C; o < hi * p.C; o += p.C) {
    const bool pad = p.valid && !p.valid[o / p.C];
    for (int64_t h = 0; h < p.C; h += N) {
      V k[MOST], kk[MOST], square = {}, along = {};
      Sigmoid iclr[MOST];
      for (int g = 0; g < G; ++g) {
        const int64_t c = h + g * W;
        if (p.gate) {
          const Sigmoid gate = sigmoid(load(p.v0 + c) + load(p.gate + o + c));
          V dv = load(p.dv_out + o + c), to_first = dv * gate.s;
          V dgate = dv * (load(p.v_first + o + c) - load(p.v + o + c)) * gate.d;
          store(p.dv + o + c, dv - to_first);
          store(p.dv_first + o + c, to_first);
          store(p.dgate + o + c, dgate);
          add(dv0 + c, dgate);
        }
        k[g] = load(p.k + o + c);
        kk[g] = k[g] * load(p.k_k + c);
        square += kk[g] * kk[g];
        iclr[g] = sigmoid(load(p.a0 + c) + load(p.a + o + c));
        along += kk[g] * (load(p.db_out + o + c) * iclr[g].s - load(p.da_out + o + c));
      }
      const float norm = std::sqrt(total(square)[0]), scale = 1.f / std::max(norm, TINY);
      // the length does not matter above eps
      const float back = norm > TINY ? total(along)[0] * scale * scale : 0.f;
      for (int g = 0; g < G; ++g) {
        const int64_t c = h + g * W;
        V k_a = load(p.k_a + c), less = iclr[g].s - 1.f, dk = load(p.dk_out + o + c);
        V db = load(p.db_out + o + c);
        V dkk = (db * iclr[g].s - load(p.da_out + o + c) - kk[g] * back) * scale;
        V w = load(p.w_out + o + c), dw = load(p.dw_out + o + c) * w * (1.f - w * (1.f / STRONGEST));
        V da = (db * kk[g] * scale + dk * k[g] * k_a) * iclr[g].d;
        store(p.dw + o + c, pad ? V{} : dw);
        store(p.da + o + c, pad ? V{} : da);
        store(p.dk + o + c, pad ? V{} : dkk * load(p.k_k + c) + dk * (1.f + less * k_a));
        if (pad) continue;
        add(dw0 + c, dw);
        add(da0 + c, da);
        add(dk_k + c, dkk * k[g]);
        add(dk_a + c, dk * k[g] * less);
      }
    }
  }
}

// One head of one row of y, normalised, and its r k r_k summed: what both directions start from.
struct Head {
  V y[MOST], bonus;
  float scale;                                           // 1 / standard deviation

  Head(const Wkv7Output& p, int64_t o, int64_t h) {
    const int64_t N = p.N, G = N / W;
    V sum = {}, square = {};
    bonus = V{};
    for (int g = 0; g < G; ++g) {
      const int64_t c = h + g * W;
      y[g] = load(p.y + o + c);
      sum += y[g];
      bonus += load(p.r + o + c) * load(p.k + o + c) * load(p.r_k + c);
    }
    bonus = total(bonus);
    const V mean = total(sum) * (1.f / float(N));
    for (int g = 0; g < G; ++g) { y[g] -= mean; square += y[g] * y[g]; }
    scale = 1.f / std::sqrt(total(square)[0] * (1.f / float(N)) + float(p.eps));
    for (int g = 0; g < G; ++g) y[g] *= scale;
  }
};

void output_forward(const Wkv7Output& p, int64_t lo, int64_t hi) {
  const int64_t N = p.N, G = N / W;
  for (int64_t o = lo * p.C; o < hi * p.C; o += p.C)
    for (int64_t h = 0; h < p.C; h += N) {
      const Head head(p, o, h);
      for (int g = 0; g < G; ++g) {
        const int64_t c = h + g * W;
        V z = head.y[g] * load(p.weight + c) + load(p.bias + c) + head.bonus * load(p.v + o + c);
        store(p.out + o + c, z * load(p.g + o + c));
      }
    }
}

void output_backward(const Wkv7Output& p, int64_t lo, int64_t hi, float* sums) {
  const int64_t N = p.N, G = N / W;
  float *dr_k = sums, *dweight = sums + p.C, *dbias = sums + 2 * p.C;
  for (int64_t o = lo * p.C; o < hi * p.C; o += p.C)
    for (int64_t h = 0; h < p.C; h += N) {
      const Head head(p, o, h);
      V dy[MOST], mean = {}, along = {}, dbonus = {};
      for (int g = 0; g < G; ++g) {
        const int64_t c = h + g * W;
        V v = load(p.v + o + c), weight = load(p.weight + c), dout = load(p.dout + o + c);
        V dz = dout * load(p.g + o + c);
        store(p.dg + o + c, dout * (head.y[g] * weight + load(p.bias + c) + head.bonus * v));
        store(p.dv + o + c, dz * head.bonus);
        dbonus += dz * v;
        add(dbias + c, dz);
        add(dweight + c, dz * head.y[g]);
        dy[g] = dz * weight;
        mean += dy[g];
        along += dy[g] * head.y[g];
      }
      mean = total(mean) * (1.f / float(N));
      along = total(along) * (1.f / float(N));
      dbonus = total(dbonus);
      for (int g = 0; g < G; ++g) {
        const int64_t c = h + g * W;
        V r = load(p.r + o + c), k = load(p.k + o + c), r_k = load(p.r_k + c) * dbonus;
        store(p.dy + o + c, (dy[g] - mean - head.y[g] * along) * head.scale);
        store(p.dr + o + c, k * r_k);
        store(p.dk + o + c, r * r_k);
        add(dr_k + c, r * k * dbonus);
      }
    }
}

// The whole time mix between the projections, forward only: a head's tokens a few at a time through
// inputs_forward, the scan and output_forward, so that what lies between them never leaves the cache.
struct Wkv7Mix {
  int64_t B, T, H, N, every;
  const float* rows[8];  // r, w, a, k, v, gate, v_first, g: (B,T,C), float32 or bfloat16
  const float *w0, *a0, *v0, *k_k, *k_a, *r_k, *weight, *bias;
  const bool* valid;
  const float* s0;
  float *out, *s;
};

template <int N>
void mix(const Wkv7Mix& p, const Call& call, int64_t bh) {
  constexpr int M = 16, WRITTEN = 18;                   // WRITTEN: the buffer `out`
  enum { R, LOGDECAY, A, K, VALUE, GATE, FIRST, OUTPUT };   // of p.rows
  const int64_t bi = bh / p.H, h = bh % p.H, C = p.H * N, c = h * N, states = p.every ? p.T / p.every + 1 : 1;
  alignas(64) float in[8][M][N], made[7][M][N];          // made: w, k, a, b, v, y, output
  std::vector<Scan<N>> scans;
  for (int64_t i0 = 0; i0 < N; i0 += Scan<N>::L) scans.emplace_back(p.s0 ? p.s0 + bh * N * N : nullptr, i0);
  auto put = [&](const Scan<N>& scan, int64_t n) { scan.put(p.s + ((bi * states + n) * p.H + h) * N * N); };
  for (int64_t t0 = 0; t0 < p.T; t0 += M) {
    const int64_t len = std::min<int64_t>(M, p.T - t0);
    for (int i = 0; i < 8; ++i)
      for (int64_t t = 0; p.rows[i] && t < len; ++t) {
        const int64_t o = (bi * p.T + t0 + t) * C + c;
        if (call.half[i]) widen(reinterpret_cast<const uint16_t*>(p.rows[i]) + o, N, in[i][t]);
        else std::memcpy(in[i][t], p.rows[i] + o, sizeof in[i][t]);
      }
    const float* gate = p.rows[GATE] ? *in[GATE] : nullptr;
    Wkv7Inputs q{1, len, N, N, 0, *in[LOGDECAY], *in[A], *in[K], *in[VALUE], gate, *in[FIRST],
                 p.w0 + c, p.a0 + c, gate ? p.v0 + c : nullptr, p.k_k + c, p.k_a + c,
                 p.valid ? p.valid + bi * p.T + t0 : nullptr,
                 *made[0], *made[1], *made[2], *made[3], *made[4]};
    inputs_forward(q, 0, len);
    Wkv7 z{};
    z.r = *in[R]; z.w = *made[0]; z.k = *made[1]; z.v = gate ? *made[4] : *in[VALUE];
    z.a = *made[2]; z.b = *made[3]; z.y = *made[5];
    // what is copied next is fetched while the scan computes
    const int64_t ahead = (bi * p.T + t0 + M) * C + c;
    for (Scan<N>& scan : scans)
      scan.run(z, 0, N, 0, len, [&](int64_t t) {
        for (int i = 0; i < 8; ++i)
          for (int64_t byte = 0, size = call.half[i] ? 2 : 4; p.rows[i] && byte < N * size; byte += 64)
            __builtin_prefetch(reinterpret_cast<const char*>(p.rows[i]) + (ahead + t * C) * size + byte);
        if (p.every && (t0 + t) % p.every == 0) put(scan, (t0 + t) / p.every);
      });
    Wkv7Output u{1, len, N, N, 0, z.y, z.r, z.k, z.v, *in[OUTPUT], p.r_k + c, p.weight + c, p.bias + c,
                 *made[6]};
    u.eps = call.eps;
    output_forward(u, 0, len);
    for (int64_t t = 0; t < len; ++t) {
      const int64_t o = (bi * p.T + t0 + t) * C + c;
      if (call.half[WRITTEN]) narrow(made[6][t], N, reinterpret_cast<uint16_t*>(p.out) + o);
      else std::memcpy(p.out + o, made[6][t], sizeof made[6][t]);
    }
  }
  for (const Scan<N>& scan : scans)
    if (!p.every || p.T % p.every == 0) put(scan, states - 1);
}

// c[m][n] (+)= sum over k < K of a[m am + k ak] b[k bk + n], for m < M and n < G W: sums stay in registers.
template <int M, int G>
inline void tile(int64_t K, const float* a, int64_t am, int64_t ak, const float* b, int64_t bk, float* c,
                 int64_t cm, bool more) {
  V sum[M][G] = {};
  for (int64_t k = 0; k < K; ++k) {
    V x[G];
    for (int g = 0; g < G; ++g) x[g] = held(load(b + k * bk + g * W));
    for (int m = 0; m < M; ++m)
      for (int g = 0; g < G; ++g) sum[m][g] += x[g] * a[m * am + k * ak];
  }
  for (int m = 0; m < M; ++m)
    for (int g = 0; g < G; ++g) {
      float* to = c + m * cm + g * W;
      store(to, more ? load(to) + sum[m][g] : sum[m][g]);
    }
}

// The same for any M and for n < N.
void product(int64_t N, int64_t M, int64_t K, const float* a, int64_t am, int64_t ak, const float* b,
    int64_t bk, float* c, int64_t cm, bool more) {
  // half of the registers hold sums; every N is a multiple of 16
  constexpr int G = std::min(2, 16 / W), R = REGISTERS / 2 / G;
  for (int64_t n = 0; n < N; n += G * W) {
    int64_t m = 0;
    for (; m + R <= M; m += R) tile<R, G>(K, a + m * am, am, ak, b + n, bk, c + m * cm + n, cm, more);
    for (; m < M; ++m) tile<1, G>(K, a + m * am, am, ak, b + n, bk, c + m * cm + n, cm, more);
  }
}

// Tokens lo..hi, all of one row of the batch: as matrix products over them, head by head.
void read_forward(const ReadState& p, int64_t lo, int64_t hi) {
  alignas(64) float turned[128 * 128];
  const int64_t N = p.N, C = p.H * N, row = lo / p.T;
  for (int64_t h = 0; h < p.H; ++h) {
    const float* s = p.s + (row * p.H + h) * N * N;
    for (int64_t i = 0; i < N; i += W)
      for (int64_t j = 0; j < N; j += W) transpose(s + i * N + j, N, turned + j * N + i, N);
    const int64_t o = lo * C + h * N;
    if (p.y)
      for (int64_t t = 0; t < hi - lo; ++t) std::memcpy(p.out + o + t * C, p.y + o + t * C, 4 * N);
    product(N, hi - lo, N, p.q + o, C, 1, turned, N, p.out + o, C, p.y);
  }
}

void read_backward(const ReadState& p, int64_t lo, int64_t hi) {
  constexpr int M = 32;                                  // tokens at a time, copied side by side
  alignas(64) float q[M * 128], dout[M * 128];
  const int64_t N = p.N, C = p.H * N, row = lo / p.T;
  for (int64_t h = 0; h < p.H; ++h)
    for (int64_t t = lo; t < hi; t += M) {
      const int64_t o = t * C + h * N, at = (row * p.H + h) * N * N, len = std::min<int64_t>(M, hi - t);
      for (int64_t i = 0; i < len; ++i) {
        std::memcpy(q + i * N, p.q + o + i * C, 4 * N);
        std::memcpy(dout + i * N, p.dout + o + i * C, 4 * N);
      }
      product(N, len, N, dout, N, 1, p.s + at, N, p.dq + o, C, false);
      product(N, N, len, dout, 1, N, q, N, p.ds + at, N, true);
    }
}

// y = relu(x)^2, or dx = 2 relu(x) dy.
void squares(const SquaredReLU& p, int64_t lo, int64_t hi) {
  float* to = p.back ? p.dx : p.y;
  for (int64_t i = lo; i < hi; ++i) {
    const float z = p.x[i] < 0.f ? 0.f : p.x[i];         // written so that NaN stays NaN
    to[i] = z * (p.back ? 2.f * p.dy[i] : z);
  }
}

}  // namespace

void shift_mix(const Call& call) {
  const auto p = ShiftMix::of(call);
  const Rows r{call, p.B * p.T, p.C, p.back ? size_t(3 + 2 * p.n) : 3, std::max<int64_t>(1, p.reach)};
  if (!p.back) return over_rows(r, shift_mix_forward);
  with_sums(r, p.n * p.C, p.dmix, shift_mix_backward);
}

void wkv7_inputs(const Call& call) {
  const auto p = Wkv7Inputs::of(call);
  const Rows r{call, p.B * p.T, p.C, 12};
  if (!p.back) return over_rows(r, inputs_forward);
  with_sums(r, (p.gate ? 5 : 4) * p.C, p.sums, inputs_backward);
}

void wkv7_output(const Call& call) {
  const auto p = Wkv7Output::of(call);
  const Rows r{call, p.B * p.T, p.C, p.back ? 10u : 8u};
  if (!p.back) return over_rows(r, output_forward);
  with_sums(r, 3 * p.C, p.sums, output_backward);
}

void wkv7_mix(const Call& call) {
  const auto p = call.as<Wkv7Mix>(5);
  const auto one = p.N == 16 ? mix<16> : p.N == 32 ? mix<32> : p.N == 64 ? mix<64> : mix<128>;
  parallel_for(p.B * p.H, 1, [&](int64_t lo, int64_t hi) {
    for (int64_t i = lo; i < hi; ++i) one(p, call, i);
  });
}

void read_state(const Call& call) {
  const auto p = ReadState::of(call);
  const auto f = p.back ? read_backward : read_forward;
  parallel_for(p.B, 1, [&](int64_t lo, int64_t hi) {                 // a state's gradient is one thread's
    if (p.back) std::fill(p.ds + lo * p.H * p.N * p.N, p.ds + hi * p.H * p.N * p.N, 0.f);
    for (int64_t row = lo; row < hi; ++row)
      in_float32({call, p.B * p.T, p.H * p.N, p.back ? 5u : 3u}, row * p.T, (row + 1) * p.T,
                 [&](const Call& c, int64_t from, int64_t to) { f(ReadState::of(c), from, to); });
  });
}

void squared_relu(const Call& call) {
  const auto p = SquaredReLU::of(call);
  over_rows({call, p.n, 1, p.back ? 3u : 1u}, squares);
}

// What bench.py holds the other kernels against: x = x a + b on registers alone, in each of `numbers[0]`
// pieces numbers[1] times over 3/4 of the registers. The buffer has 16 floats a piece, of which the first W
// get the sums.
void peak(const Call& call) {
  parallel_for(call.numbers[0], 1, [&](int64_t lo, int64_t hi) {
    for (int64_t i = lo; i < hi; ++i) {
      constexpr int CHAINS = REGISTERS * 3 / 4;
      V x[CHAINS], sum = {};
      for (int c = 0; c < CHAINS; ++c) x[c] = V{} + float(c);
      for (int64_t n = 0; n < call.numbers[1]; ++n) {
#pragma GCC unroll 32
        for (int c = 0; c < CHAINS; ++c) x[c] = x[c] * 0.999f + 1e-3f;
      }
      for (int c = 0; c < CHAINS; ++c) sum += x[c];
      store(call.buffers[0] + 16 * i, sum);
    }
  });
}
