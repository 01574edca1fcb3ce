// The CPU kernels as torch operators that write into buffers of the caller, through torch's stable ABI: its headers compile in a
// second, where torch/extension.h takes half a minute. Shapes, dtypes and gradients are the business of __init__.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <optional>
#include "kernels.h"

using torch::stable::Tensor;

void parallel_for(int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& f) {
  torch::stable::parallel_for(0, n, grain, f);
}

namespace {

const float* in(const Tensor& x) { return static_cast<const float*>(x.const_data_ptr()); }
const float* in(const std::optional<Tensor>& x) { return x ? in(*x) : nullptr; }
float* mut(const Tensor& x) { return static_cast<float*>(x.mutable_data_ptr()); }
float* mut(const std::optional<Tensor>& x) { return x ? mut(*x) : nullptr; }

Wkv7 inputs(const Tensor& r, const Tensor& w, const Tensor& k, const Tensor& v, const Tensor& a, const Tensor& b, int64_t every) {
  Wkv7 p{};
  p.B = r.size(0); p.T = r.size(1); p.H = r.size(2); p.N = r.size(3); p.every = every;
  p.r = in(r); p.w = in(w); p.k = in(k); p.v = in(v); p.a = in(a); p.b = in(b);
  return p;
}

void wkv7_forward(Tensor r, Tensor w, Tensor k, Tensor v, Tensor a, Tensor b, std::optional<Tensor> s0, std::optional<Tensor> c,
                  int64_t every, Tensor y, Tensor s, std::optional<Tensor> mid, std::optional<Tensor> sa) {
  Wkv7 p = inputs(r, w, k, v, a, b, every);
  p.s0 = in(s0); p.c = in(c); p.y = mut(y); p.s = mut(s); p.mid = mut(mid); p.sa = mut(sa);
  wkv7(p, false);
}

void wkv7_backward(Tensor r, Tensor w, Tensor k, Tensor v, Tensor a, Tensor b, Tensor mid, Tensor sa, int64_t every, Tensor dy,
                   std::optional<Tensor> ds, Tensor dr, Tensor dw, Tensor dk, Tensor dv, Tensor da, Tensor db,
                   std::optional<Tensor> ds0, std::optional<Tensor> dc) {
  Wkv7 p = inputs(r, w, k, v, a, b, every);
  p.mid = mut(mid); p.sa = mut(sa); p.dy = in(dy); p.ds = in(ds);
  p.dr = mut(dr); p.dw = mut(dw); p.dk = mut(dk); p.dv = mut(dv); p.da = mut(da); p.db = mut(db); p.ds0 = mut(ds0); p.dc = mut(dc);
  wkv7(p, true);
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
