// Bidirectional WKV on the CPU: forward and backward in O(T), float32, any T and C, any keys.
//
//   y_t = sum_i e^{l(t,i)} v_i / sum_i e^{l(t,i)},
//   l(t,i) = k_i - (|t-i|-1) w for i != t, and u + k_t for i = t
//
// Channels never mix, so each task takes 16 of them in the lanes of a vector and walks the time axis twice,
// once from each end. Sums of exponentials are kept as (reference, sum times e^-reference); the reference
// follows the largest exponent.
#include "kernels.h"

namespace {

V load(const float* p, int64_t n) {                      // the first n lanes; C need not be a multiple of 16
  if (n >= W) return ::load(p);
  V x = {};
  std::memcpy(&x, p, 4 * n);
  return x;
}
void store(float* p, V x, int64_t n) { n >= W ? ::store(p, x) : void(std::memcpy(p, &x, 4 * n)); }

// The reference of a scan, hi + lo. Over a thousand tokens the rounding errors of hi - w, all alike, would
// add up to 1e-3: lo keeps them. The reference moves up only for an exponent that exceeds it by SLACK: until
// then the sums stay as they are, where multiplying them by nearly 1 for each token would add up rounding
// errors again.
struct Top {
  V hi = V{} + LOWEST, lo = {};
  struct Weights { V keep, add; };                       // of the sums so far and of the new term
  Weights push(V w, V x) {  // one token on: everything decays, then a term with exponent x enters
    V sunk = hi - w, zero = {}, one = zero + 1.f;
    lo += (hi - sunk) - w;
    V d = (sunk - x) + lo, e = vexp(d < -SLACK ? d : -d);
    hi = d < -SLACK ? x : sunk;
    lo = d < -SLACK ? zero : lo;
    return {d < -SLACK ? e : one, d < -SLACK ? one : e};
  }
};

struct Sums {
  Top top;
  V num = {}, den = {};
  void push(V w, V k, V v) {
    auto [keep, add] = top.push(w, k);
    num = num * keep + add * v;
    den = den * keep + add;
  }
};

// The sums over i > t wait in the output buffers until the walk from the left meets them.
void forward(const BiWkv& p, int64_t at, int64_t row, int64_t n) {
  V w = load(p.w + row, n), u = load(p.u + row, n), zero = {};
  Sums right, left;
  for (int64_t t = p.T - 1; t >= 0; --t) {
    const int64_t o = at + t * p.C;
    V top = right.top.hi + right.top.lo, rest = (right.top.hi - top) + right.top.lo;
    V f = 1.f + rest * (1.f + 0.5f * rest);              // e^rest, of a rounding error
    store(p.scale + o, top, n); store(p.y + o, right.num * f, n); store(p.inv + o, right.den * f, n);
    right.push(w, load(p.k + o, n), load(p.v + o, n));
  }
  for (int64_t t = 0; t < p.T; ++t) {
    const int64_t o = at + t * p.C;
    V k = load(p.k + o, n), v = load(p.v + o, n), own = u + k, rtop = load(p.scale + o, n);
    V top = left.top.hi > rtop ? left.top.hi : rtop;
    top = own > top ? own : top;
    V l = vexp((left.top.hi - top) + left.top.lo), r = vexp(rtop - top), c = vexp(own - top);
    V den = left.den * l + load(p.inv + o, n) * r + c;
    V inv = den == 0 ? zero : 1.f / den;                 // 0: no key but -inf in the whole row
    V y = (left.num * l + load(p.y + o, n) * r + c * v) * inv;
    V seen = own + w;                                    // vexp(NaN) is 0, yet a NaN must not go unseen
    store(p.y + o, seen == seen ? y : seen, n);
    store(p.inv + o, inv, n);
    store(p.scale + o, den == 0 ? zero + LOWEST : -top, n);
    left.push(w, k, v);
  }
}

// With g_t = dy_t / den_t and e(t,i) = e^{l(t,i) - top_t}:
//   dv_i = sum_t e(t,i) g_t      dk_i = sum_t e(t,i) g_t (v_i - y_t)
//   dw = sum_{t,i != t} -(|t-i|-1) e(t,i) g_t (v_i - y_t)
// so a walk carries the sums over the t behind it of g_t and g_t y_t, and both once more weighted with
// |t-i|-1.
struct GradSums {
  Top top;
  V g = {}, gy = {}, far_g = {}, far_gy = {};
  void push(V w, V scale, V g1, V y) {
    auto [keep, add] = top.push(w, scale);
    far_g = keep * (far_g + g);
    far_gy = keep * (far_gy + gy);
    g = g * keep + add * g1;
    gy = gy * keep + add * (g1 * y);
  }
};

void backward(const BiWkv& p, int64_t at, int64_t row, int64_t n) {
  V w = load(p.w + row, n), u = load(p.u + row, n), dw = {}, du = {};
  for (bool first : {true, false}) {                     // from the left, then from the right
    GradSums s;
    for (int64_t j = 0; j < p.T; ++j) {
      const int64_t o = at + (first ? j : p.T - 1 - j) * p.C;
      V k = load(p.k + o, n), v = load(p.v + o, n), y = load(p.y + o, n), scale = load(p.scale + o, n);
      V g = load(p.dy + o, n) * load(p.inv + o, n), e = vexp((k + s.top.hi) + s.top.lo);
      V dv = e * s.g, dk = v * dv - e * s.gy;
      dw -= e * (v * s.far_g - s.far_gy);
      if (first) {
        V own = vexp((u + k) + scale) * g, d = own * (v - y);
        dv += own; dk += d; du += d;
      } else {
        dv += load(p.dv + o, n); dk += load(p.dk + o, n);
      }
      store(p.dv + o, dv, n); store(p.dk + o, dk, n);
      s.push(w, scale, g, y);
    }
  }
  store(p.dw + row, dw, n); store(p.du + row, du, n);
}

}  // namespace

void biwkv(const Call& call) {
  const auto p = call.as<BiWkv>(4);
  const int64_t groups = (p.C + W - 1) / W;
  parallel_for(p.B * groups, 1, [&](int64_t lo, int64_t hi) {
    for (int64_t i = lo; i < hi; ++i) {
      const int64_t b = i / groups, c = i % groups * W;
      (p.back ? backward : forward)(p, b * p.T * p.C + c, b * p.C + c, p.C - c);
    }
  });
}
