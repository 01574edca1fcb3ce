"""RWKV-7's recurrence. B batch, T time, H heads, N head size; a state is (B,H,N,N): rows value channels, columns key channels."""
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .loader import backend, call, operator, wants_grad

HEAD_SIZES = (16, 32, 64, 128)
CHUNK = 16  # tokens between two saved states; the kernels hold the same number


def wkv7(r, w, k, v, a, b, s0=None, c=None, every=None):
    """RWKV-7 recurrence (arXiv 2503.14456, eq. 16-20; there a = -kk, b = kk * iclr).

        S_t = S_{t-1} diag(exp w_t) + (S_{t-1} a_t + c_t) b_t^T + v_t k_t^T        y_t = S_t r_t

    r, w, k, v, a, b, c: (B,T,H,N), floating point; w is the log-decay, w <= 0. s0: (B,H,N,N), zero if None.
    Returns y (B,T,H,N) in r's dtype and s in float32 (float64 for float64 inputs): the final state (B,H,N,N), or with
    `every=n` the states after 0, n, 2n, ... tokens, (B, T//n + 1, H,N,N). Everything returned is differentiable. On a GPU a bfloat16 r
    allows products in bfloat16; sums and states are in float32 always.
    ValueError: N not in HEAD_SIZES, shapes that disagree, every < 1.
    """
    if r.shape[-1] not in HEAD_SIZES:
        raise ValueError(f"head size {r.shape[-1]} is not supported: choose one of {', '.join(map(str, HEAD_SIZES))}")
    for name, x in zip("wkvabc", (w, k, v, a, b, c)):
        if x is not None and x.shape != r.shape:
            raise ValueError(f"wkv7: {name} has shape {tuple(x.shape)}, r has {tuple(r.shape)}: give all the same (B,T,H,N)")
    if s0 is not None and s0.shape != (r.shape[0], *r.shape[2:], r.shape[3]):
        raise ValueError(f"wkv7: s0 has shape {tuple(s0.shape)}, expected (B,H,N,N) = {(r.shape[0], *r.shape[2:], r.shape[3])}")
    if every is not None and every < 1:
        raise ValueError(f"wkv7: every={every} is not allowed: give a number of tokens >= 1, or None")
    kind = torch.float64 if r.dtype == torch.float64 else torch.float32
    impl = backend(r.device.type, kind)
    half = impl == "cuda"                                            # that kernel reads bfloat16 as it is, but for the state
    args = [x if x is None or half and x.dtype == torch.bfloat16 and x is not s0 else x.to(kind) for x in (r, w, k, v, a, b, s0, c)]
    with torch.autocast(r.device.type, enabled=False):               # the recurrence stays in float32
        y, s = IMPLS[impl](*args, every)
    return y.to(r.dtype), s


def wkv7_loop(r, w, k, v, a, b, s0=None, c=None, every=None):
    """The definition, one token at a time, in the inputs' dtype: the reference twin of every other form."""
    B, T, H, N = r.shape
    s = r.new_zeros(B, H, N, N) if s0 is None else s0
    ys, states = [], [s]
    for t in range(T):
        sa = torch.einsum("bhij,bhj->bhi", s, a[:, t]) + (0 if c is None else c[:, t])
        s = s * w[:, t].exp().unsqueeze(-2) + sa.unsqueeze(-1) * b[:, t].unsqueeze(-2) + v[:, t].unsqueeze(-1) * k[:, t].unsqueeze(-2)
        ys.append(torch.einsum("bhij,bhj->bhi", s, r[:, t]))
        if every and (t + 1) % every == 0:
            states.append(s)
    return torch.stack(ys, 1) if ys else torch.zeros_like(r), torch.stack(states, 1) if every else s


def wkv7_torch(r, w, k, v, a, b, s0=None, c=None, every=None):
    """Chunks of up to 16 tokens as matrix products and one triangular solve (the WY form of the delta rule), any device.

    Inside a chunk, exp(W_t - W_i) is split at the middle into exp(W_t - M) exp(M - W_i), W the summed log-decay. The chunk
    is made shorter where a strong decay would overflow that split, so the result is exact for any w <= 0.
    """
    B, T, H, N = r.shape
    strongest = -float(w.detach().min()) if w.numel() else 0.0
    L, limit = CHUNK, 80 if r.dtype == torch.float32 else 700        # exp(limit) still fits the dtype
    while L > 1 and L * strongest > limit:
        L //= 2
    n = min(every or T, T) or 1            # one segment a returned state; each is padded to whole chunks by identity steps
    pad, tail = -n % L, -T % n
    def chunked(x):                        # (B,T,H,N) -> (B,H,chunks,L,N)
        x = F.pad(x, (0, 0, 0, 0, 0, tail)).unflatten(1, (-1, n))
        x = F.pad(x, (0, 0, 0, 0, 0, pad)).flatten(1, 2)
        return x.unflatten(1, (-1, L)).permute(0, 3, 1, 2, 4)
    c_ = 0 if c is None else chunked(c)
    r, w, k, v, a, b = map(chunked, (r, w, k, v, a, b))
    W = w.cumsum(-2)                       # decay from the chunk's start to after token t
    before, end = W - w, W[..., -1:, :]    # ... to before token t; ... to the end
    mid = W[..., (L - 1) // 2, None, :]
    to_a, to_r, inv = (before - mid).clamp_max(limit).exp() * a, (W - mid).exp() * r, (mid - W).exp()
    kb = torch.cat([inv * b, inv * k], -2).mT
    ab, ak = (m.tril(-1) for m in (to_a @ kb).split(L, -1))
    rb, rk = (m.tril() for m in (to_r @ kb).split(L, -1))
    both = torch.cat([before.exp() * a, ak @ v + c_], -1)
    P, Q = torch.linalg.solve_triangular(-ab, both, upper=False, unitriangular=True).split(N, -1)   # (1 - ab)^-1
    tail_decay = (end - W).exp()
    kd, bd, wd = tail_decay * k, tail_decay * b, end.exp()
    grow = v.mT @ kd                       # what a chunk adds whatever the state before it
    s = r.new_zeros(B, H, N, N) if s0 is None else s0
    starts, sas = [], []
    for i in range(r.shape[2]):            # the only sequential part: one state a chunk
        sa = P[:, :, i] @ s.mT + Q[:, :, i]
        starts.append(s)
        sas.append(sa)
        s = s * wd[:, :, i] + (sa.mT @ bd[:, :, i] + grow[:, :, i])
    if not starts:
        return torch.zeros(B, T, H, N, dtype=r.dtype, device=r.device), s.unsqueeze(1) if every else s
    y = (W.exp() * r) @ torch.stack(starts, 2).mT + rb @ torch.stack(sas, 2) + rk @ v
    y = y.permute(0, 2, 3, 1, 4).flatten(1, 2).unflatten(1, (-1, n + pad))[:, :, :n].flatten(1, 2)[:, :T]
    if every:
        per = (n + pad) // L
        s = torch.stack((starts + [s])[::per][: T // every + 1], 1)
    return y, s


# ---- the kernels as torch operators: buffers, fakes and gradients in one place for every compiled back end ----

def _wkv7_buffers(r, w, k, v, a, b, s0, c, every, save):
    B, T, H, N = r.shape
    states = (B, T // every + 1, H, N, N) if every else (B, H, N, N)
    single = lambda *shape: r.new_empty(shape, dtype=torch.float32)
    return [r.new_empty(r.shape), single(*states)] + ([single(B, H, -(-T // CHUNK), N, N), single(*r.shape)] if save else [])


@operator(_wkv7_buffers)
def _wkv7(r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, s0: Optional[Tensor], c: Optional[Tensor],
          every: int, save: bool) -> list[Tensor]:
    """y, s and, with save, what backward needs: the states at the start of each chunk, and S a + c."""
    args = [x if x is None else x.contiguous() for x in (r, w, k, v, a, b, s0, c)]
    out = _wkv7_buffers(*args, every, save)
    call("wkv7", (*r.shape, every, False), (*args, *out, *[None] * (10 if save else 12)))
    return out


def _wkv7_grads(r, w, k, v, a, b, mid, sa, every, dy, ds, has_s0, has_c):
    B, T, H, N = r.shape
    return [x.new_empty(x.shape) for x in (r, w, k, v, a, b)] + [mid.new_empty(B, H, N, N)] * has_s0 + [sa.new_empty(sa.shape)] * has_c


@operator(_wkv7_grads)
def _wkv7_backward(r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, mid: Tensor, sa: Tensor, every: int,
                   dy: Optional[Tensor], ds: Optional[Tensor], has_s0: bool, has_c: bool) -> list[Tensor]:
    dy = torch.zeros_like(r) if dy is None else dy
    *args, dy, ds = (x if x is None else x.contiguous() for x in (r, w, k, v, a, b, dy, ds))
    grads = _wkv7_grads(*args, mid, sa, every, dy, ds, has_s0, has_c)
    call("wkv7", (*r.shape, every, True), (*args, None, None, None, None, mid, sa, dy, ds, *grads[:6], grads[6] if has_s0 else None,
                                           grads[-1] if has_c else None))
    return grads


class _Wkv7(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        y, s, *saved = _wkv7(*args)
        ctx.save_for_backward(*args[:6], *saved)
        ctx.every, ctx.given = args[8], [x is not None for x in args[6:8]]
        ctx.set_materialize_grads(False)
        return y, s

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, ds):
        grads = _wkv7_backward(*ctx.saved_tensors, ctx.every, dy, ds, *ctx.given)
        has_s0, has_c = ctx.given
        return *grads[:6], grads[6] if has_s0 else None, grads[-1] if has_c else None, None, None


def _wkv7_kernel(r, w, k, v, a, b, s0=None, c=None, every=None):
    if wants_grad(r, w, k, v, a, b, s0, c):
        return _Wkv7.apply(r, w, k, v, a, b, s0, c, every or 0, True)
    return tuple(_wkv7(r, w, k, v, a, b, s0, c, every or 0, False))


IMPLS = {"cpp": _wkv7_kernel, "cuda": _wkv7_kernel, "torch": wkv7_torch, "loop": wkv7_loop}
