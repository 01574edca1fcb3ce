"""The bidirectional WKV of Vision-RWKV. B batch, T time, C channels."""
import torch

from .definitions import biwkv_loop, biwkv_torch
from .loader import backend
from .operators import Kernel, kind_of, like

def biwkv(w, u, k, v):
    """Bidirectional WKV (Vision-RWKV, arXiv 2403.02308, eq. 3): a weighted mean over all tokens, nearer ones
    counting more.

        y_t = sum_i e^{l(t,i)} v_i / sum_i e^{l(t,i)}        l(t,i) = k_i - (|t-i|-1) w for i != t, and u +
        k_t for i = t

    w (decay rate, >= 0) and u (bonus of the token itself): (C,), or (B,C) for values of each sample's own. k,
    v: (B,T,C), floating point. A position with k = -inf (padding) has no part in any mean; where no position
    has one, y = 0 and gradients are 0. w, u and v are finite. Returns y (B,T,C) in v's dtype, computed in
    float32 (float64 for float64 v), differentiable in all four. ValueError: shapes that disagree."""
    if k.ndim != 3 or k.shape != v.shape:
        raise ValueError(f"biwkv: k has shape {tuple(k.shape)}, v has {tuple(v.shape)}: both are (B,T,C)")
    B, _, C = k.shape
    for name, x in (("w", w), ("u", u)):
        if x.shape not in ((C,), (B, C)):
            raise ValueError(f"biwkv: {name} has shape {tuple(x.shape)}: "
                             f"give (C,) = {(C,)} or (B,C) = {(B, C)}")
    kind = kind_of(v)
    args = [x.to(kind) for x in (w, u, k, v)]
    with torch.autocast(v.device.type, enabled=False):              # exponents stay in float32
        return IMPLS[backend(v.device.type, kind)](*args).to(v.dtype)

class BiWkv(Kernel):
    """w, u, k, v -> y, and the denominators for backward."""
    arity, visible = 4, 1

    def size(self, inputs, numbers):
        return inputs[2].shape

    def outputs(self, inputs, numbers):
        v = inputs[3]
        return like(v, v, v)

    def keep(self, inputs, out):
        return *inputs, *out

BIWKV = BiWkv("biwkv")

def _biwkv_kernel(w, u, k, v):
    w, u = (x.expand(k.shape[0], -1) for x in (w, u))               # whose gradient sums over B
    return BIWKV(w, u, k, v)[0]

IMPLS = {"cpp": _biwkv_kernel, "cuda": _biwkv_kernel, "torch": biwkv_torch, "loop": biwkv_loop}
