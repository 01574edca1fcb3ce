"""The bidirectional WKV of Vision-RWKV. B batch, T time, C channels."""
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .loader import backend, call

LOWEST = -1e30  # reference of an empty sum: finite, so that no difference of two references is inf - inf


def biwkv(w, u, k, v):
    """Bidirectional WKV (Vision-RWKV, arXiv 2403.02308, eq. 3): a weighted mean over all tokens, nearer ones counting more.

        y_t = sum_i e^{l(t,i)} v_i / sum_i e^{l(t,i)}        l(t,i) = k_i - (|t-i|-1) w for i != t, and u + k_t for i = t

    w (decay rate, >= 0) and u (bonus of the token itself): (C,), or (B,C) for values of each sample's own. k, v: (B,T,C), floating
    point. A position with k = -inf (padding) has no part in any mean; where no position has one, y = 0 and gradients are 0.
    w, u and v are finite. Returns y (B,T,C) in v's dtype, computed in float32 (float64 for float64 v), differentiable in all four.
    ValueError: shapes that disagree.
    """
    if k.ndim != 3 or k.shape != v.shape:
        raise ValueError(f"biwkv: k has shape {tuple(k.shape)}, v has {tuple(v.shape)}: give both the same (B,T,C)")
    B, _, C = k.shape
    for name, x in (("w", w), ("u", u)):
        if x.shape not in ((C,), (B, C)):
            raise ValueError(f"biwkv: {name} has shape {tuple(x.shape)}: give (C,) = {(C,)} or (B,C) = {(B, C)}")
    kind = torch.float64 if v.dtype == torch.float64 else torch.float32
    args = [x.to(kind) for x in (w, u, k, v)]
    with torch.autocast(v.device.type, enabled=False):               # exponents stay in float32
        return IMPLS[backend(v.device.type, kind)](*args).to(v.dtype)


def biwkv_loop(w, u, k, v):
    """The definition: every pair of tokens, O(T^2) memory, in the inputs' dtype: the reference twin of every other form."""
    t = torch.arange(k.shape[1], device=k.device)
    distance = (t.unsqueeze(1) - t).abs().unsqueeze(-1)
    w, u = (x.unsqueeze(-2).unsqueeze(-2) for x in (w, u))
    k = k.unsqueeze(1)
    logits = torch.where(distance == 0, k + u, k - (distance - 1) * w)                # (B,T,T,C)
    empty = (logits == -torch.inf).all(2, keepdim=True)
    weights = logits.masked_fill(empty, 0.0).softmax(2).masked_fill(empty, 0.0)
    return (weights * v.unsqueeze(1)).sum(2)


def biwkv_torch(w, u, k, v):
    """O(T) work and memory in about 2 sqrt(T) steps, any device: a scan inside all chunks at once, then one over the chunks,
    from the left and, on reversed copies, from the right."""
    B, T, C = k.shape
    if not k.numel():
        return k * v * (w + u).unsqueeze(-2)                         # nothing, yet differentiable
    L = math.isqrt(T - 1) + 1
    ones = torch.stack([v, torch.ones_like(v)])                      # what a key weighs: numerator and denominator
    def chunked(x, value):                 # (...,B,T,C) -> (...,2 directions,B,chunks,L,C)
        return F.pad(torch.stack([x, x.flip(-2)], -4), (0, 0, 0, -T % L), value=value).unflatten(-2, (-1, L))
    keys, terms = chunked(k, -torch.inf).unbind(-2), chunked(ones, 0.0).unbind(-2)
    m, sums = torch.full_like(keys[0], LOWEST), torch.zeros_like(terms[0])
    inside = []                            # before each token of a chunk: the sums over earlier tokens of the chunk
    for key, term in zip(keys, terms):
        inside.append((m, sums))
        m, sums = _merge(m, -w.unsqueeze(-2), sums, key, term)
    totals = zip(m.unbind(-2), sums.unbind(-2))
    m, sums = torch.full_like(m[..., 0, :], LOWEST), torch.zeros_like(sums[..., 0, :])
    before = []                            # before each chunk: the sums over all earlier chunks
    for total in totals:
        before.append((m, sums))
        m, sums = _merge(m, -L * w, sums, *total)
    m, sums = (torch.stack(x, -2).unsqueeze(-2) for x in zip(*before))
    steps = torch.arange(L, device=w.device, dtype=w.dtype).unsqueeze(-1)
    m, sums = _merge(m, -steps * w.unsqueeze(-2).unsqueeze(-2), sums, *(torch.stack(x, -2) for x in zip(*inside)))
    (left, right), (sums, sums_right) = (x.flatten(-3, -2)[..., :T, :].unbind(-4) for x in (m, sums))
    m, sums = _merge(left, 0.0, sums, right.flip(-2), sums_right.flip(-2))
    num, den = _merge(k, u.unsqueeze(-2), ones, m, sums)[1]
    return num / den.masked_fill(den == 0, 1.0)                      # 0 / 1 where no position has a key


def _merge(m, shift, sums, n, more):
    """e^{m + shift} sums + e^n more -> (reference, sums / e^reference). The reference is the larger exponent and a constant: no
    gradient need flow through it. m - top comes first: it is exact where the two are close."""
    top = torch.maximum(m + shift, n).detach().clamp_min(LOWEST)
    return top, ((m - top) + shift).exp() * sums + (n - top).exp() * more


# ---- the kernel as torch operators: buffers, fakes and gradients, as in wkv7.py ----

@torch.library.custom_op("nanodir::biwkv", mutates_args=())
def _biwkv(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    out = _biwkv_buffers(w, u, k, v)
    call("biwkv", (*k.shape, False), (*(x.contiguous() for x in (w, u, k, v)), *out, *[None] * 5))
    return out


@_biwkv.register_fake
def _biwkv_buffers(w, u, k, v):
    return v.new_empty(v.shape), v.new_empty(v.shape), v.new_empty(v.shape)


@torch.library.custom_op("nanodir::biwkv_backward", mutates_args=())
def _biwkv_backward(w: Tensor, u: Tensor, k: Tensor, v: Tensor, y: Tensor, scale: Tensor, inv: Tensor, dy: Tensor) -> list[Tensor]:
    grads = _biwkv_grads(w, u, k, v, y, scale, inv, dy)
    call("biwkv", (*k.shape, True), (*(x.contiguous() for x in (w, u, k, v, y, scale, inv, dy)), *grads))
    return grads


@_biwkv_backward.register_fake
def _biwkv_grads(w, u, k, v, y, scale, inv, dy):
    return [x.new_empty(x.shape) for x in (w, u, k, v)]


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs, *output)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _grads(ctx, dy, *_):
    return tuple(torch.ops.nanodir.biwkv_backward(*ctx.saved_tensors, dy))


_biwkv.register_autograd(_grads, setup_context=_setup)


def _biwkv_kernel(w, u, k, v):
    w, u = (x.expand(k.shape[0], -1) for x in (w, u))                # whose gradient sums over B
    return torch.ops.nanodir.biwkv(w, u, k, v)[0]


IMPLS = {"cpp": _biwkv_kernel, "cuda": _biwkv_kernel, "torch": biwkv_torch, "loop": biwkv_loop}
