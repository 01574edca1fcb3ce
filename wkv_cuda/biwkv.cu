// Bidirectional WKV on the GPU: forward and backward in O(T), float32, any T and C, any keys. See biwkv.cpp
// for the formulas, of which this is the same arithmetic: channels never mix, so each thread takes one and
// walks the time axis twice, once from each end.
#include "gpu.h"

namespace {

constexpr int THREADS = 32;         // a block; small, for there are few channels and many processors
constexpr int AHEAD = 8;            // tokens read at once, so that one wait for the memory serves all of them

// The reference of a scan, hi + lo: lo keeps the rounding errors of hi - w, which are all alike and would add
// up. It moves up only for an exponent that exceeds it by SLACK: until then sums stay as they are.
struct Top {
  float hi = LOWEST, lo = 0, keep, add;  // keep, add: factors of the sums so far and of the new term
  __device__ void push(float w, float x) {
    const float sunk = hi - w;
    lo += (hi - sunk) - w;
    const float d = (sunk - x) + lo;
    const bool up = d < -SLACK;
    const float e = expf(up ? d : -d);
    hi = up ? x : sunk;
    lo = up ? 0 : lo;
    keep = up ? e : 1;
    add = up ? 1 : e;
  }
};

// Walks over the tokens of a channel in either direction; f(offset, values) gets what lies there in each of
// the buffers.
template <int M, class F>
__device__ void walk(const BiWkv& p, int64_t at, bool forwards, const float* const (&from)[M], F f) {
  for (int64_t t0 = 0; t0 < p.T; t0 += AHEAD) {
    float z[AHEAD][M];
#pragma unroll
    for (int q = 0; q < AHEAD; ++q)
#pragma unroll
      for (int x = 0; x < M; ++x)
        z[q][x] = t0 + q < p.T ? from[x][at + (forwards ? t0 + q : p.T - 1 - t0 - q) * p.C] : 0.f;
#pragma unroll
    for (int q = 0; q < AHEAD; ++q)
      if (t0 + q < p.T) f(at + (forwards ? t0 + q : p.T - 1 - t0 - q) * p.C, z[q]);
  }
}

struct Sums {
  Top top;
  float num = 0, den = 0;
  __device__ void push(float w, float k, float v) {
    top.push(w, k);
    num = num * top.keep + top.add * v;
    den = den * top.keep + top.add;
  }
};

struct GradSums {                                        // see biwkv.cpp
  Top top;
  float g = 0, gy = 0, far_g = 0, far_gy = 0;
  __device__ void push(float w, float scale, float g1, float y) {
    top.push(w, scale);
    far_g = top.keep * (far_g + g);
    far_gy = top.keep * (far_gy + gy);
    g = g * top.keep + top.add * g1;
    gy = gy * top.keep + top.add * (g1 * y);
  }
};

// The sums over i > t wait in the output buffers until the walk from the left meets them.
__global__ void __launch_bounds__(THREADS) forward(const BiWkv p) {
  const int64_t id = int64_t(blockIdx.x) * THREADS + threadIdx.x, at = id / p.C * p.T * p.C + id % p.C;
  if (id >= p.B * p.C) return;
  const float w = p.w[id], u = p.u[id];
  Sums right, left;
  walk<2>(p, at, false, {p.k, p.v}, [&](int64_t o, const float* z) {
    const float top = right.top.hi + right.top.lo, rest = (right.top.hi - top) + right.top.lo;
    const float f = 1 + rest * (1 + 0.5f * rest);
    p.scale[o] = top, p.y[o] = right.num * f, p.inv[o] = right.den * f;  // f: e^rest, of a rounding error
    right.push(w, z[0], z[1]);
  });
  walk<5>(p, at, true, {p.k, p.v, p.scale, p.y, p.inv}, [&](int64_t o, const float* z) {
    const float k = z[0], v = z[1], own = u + k, top = fmaxf(fmaxf(left.top.hi, z[2]), own);
    const float l = expf((left.top.hi - top) + left.top.lo), r = expf(z[2] - top), c = expf(own - top);
    // 0: no key but -inf in the whole row
    const float den = left.den * l + z[4] * r + c, inv = den == 0 ? 0 : 1 / den;
    p.y[o] = (left.num * l + z[3] * r + c * v) * inv;
    p.inv[o] = inv;
    p.scale[o] = den == 0 ? LOWEST : -top;
    left.push(w, k, v);
  });
}

__global__ void __launch_bounds__(THREADS) backward(const BiWkv p) {
  const int64_t id = int64_t(blockIdx.x) * THREADS + threadIdx.x, at = id / p.C * p.T * p.C + id % p.C;
  if (id >= p.B * p.C) return;
  const float w = p.w[id], u = p.u[id];
  float dw = 0, du = 0;
  for (const bool first : {true, false}) {               // from the left, then from the right
    GradSums s;
    // no dv, dk yet
    const float* const from[] = {p.k, p.v, p.y, p.scale, p.inv, p.dy, first ? p.k : p.dv, first ? p.k : p.dk};
    walk<8>(p, at, first, from, [&](int64_t o, const float* z) {
      const float k = z[0], v = z[1], y = z[2], scale = z[3], g = z[5] * z[4];
      const float e = expf((k + s.top.hi) + s.top.lo);
      float dv = e * s.g, dk = v * dv - e * s.gy;
      dw -= e * (v * s.far_g - s.far_gy);
      if (first) {
        const float own = expf((u + k) + scale) * g, d = own * (v - y);
        dv += own, dk += d, du += d;
      } else {
        dv += z[6], dk += z[7];
      }
      p.dv[o] = dv, p.dk[o] = dk;
      s.push(w, scale, g, y);
    });
  }
  p.dw[id] = dw, p.du[id] = du;
}

}  // namespace

void biwkv(const Call& call) {
  const auto p = call.as<BiWkv>(4);
  launch(p.back ? backward : forward, (p.B * p.C + THREADS - 1) / THREADS, THREADS, 0,
         reinterpret_cast<void*>(call.numbers[4]), p);
}
