"""What the kernels compute, in plain torch and in the dtype of the inputs.

B batch, T time, C channels, H heads, N head size, C = H N; a state is (B,H,N,N): value by key channels.
wkv7_torch and biwkv_torch compute what the loops of the same name define, in fewer steps. These functions
run where there is no kernel, and the kernels are tested against them in float64.
"""
import math
from typing import NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

HEAD_SIZES = (16, 32, 64, 128)
CHUNK = 16      # tokens between two saved states; the kernels hold the same number
LOWEST = -1e30  # reference of an empty sum: finite, so that no difference of two references is inf - inf

class Projected(NamedTuple):
    """What RWKV-7's linears and low-rank paths make of a layer's input, each (B,T,C)."""
    r: Tensor                   # receptance: what is read from the state
    w: Tensor                   # decay, without w0 and the sigmoid
    a: Tensor                   # in-context learning rate, without a0 and the sigmoid
    k: Tensor                   # key
    v: Tensor                   # value
    gate: Optional[Tensor]      # of the value residual; None in the first layer, as v_first and v0
    v_first: Optional[Tensor]   # the first layer's v
    g: Tensor                   # gate of the output

class Parameters(NamedTuple):
    """The parameters between those projections and the output matrix: each has C elements, in any shape."""
    w0: Tensor
    a0: Tensor
    v0: Optional[Tensor]
    k_k: Tensor
    k_a: Tensor
    r_k: Tensor
    weight: Tensor              # of the group norm, as bias
    bias: Tensor

def time_mix(x, p, eps, valid, head_size, scan):
    """RWKV-7's time mix (arXiv 2503.14456, section 4), from the projections to what the output matrix takes
    -> (B,T,C), state.

    x: Projected; p: Parameters; eps: the group norm's; valid: (B,T) bool or None, False where a token is
    padding and leaves the state as it is. scan: the recurrence, such as wkv7_loop, of r, w, k, v, a, b, each
    (B,T,H,N) -> y, state; None: return what it takes, (w, k, v, a, b), each (B,T,C)."""
    r, w, a, k, v, gate, v_first, g = x
    w0, a0, v0, k_k, k_a, r_k, weight, bias = (z if z is None else z.flatten() for z in p)
    heads = lambda z: z.unflatten(-1, (-1, head_size))

    w = -math.exp(-0.5) * torch.sigmoid(w0 + w)              # log of the decay, in (-0.607, 0)
    iclr = torch.sigmoid(a0 + a)                             # in-context learning rate
    if gate is not None:
        v = v + (v_first - v) * torch.sigmoid(v0 + gate)     # value residual
    kk = F.normalize(heads(k * k_k), dim=-1).flatten(-2)     # removal key, of length 1 in each head
    k = k * (1 + (iclr - 1) * k_a)                           # replacement key
    if valid is not None:
        w, k, kk = (z.masked_fill(~valid.unsqueeze(-1), 0) for z in (w, k, kk))
    a, b = -kk, kk * iclr
    if scan is None:
        return w, k, v, a, b

    # S_t = S_{t-1} (diag(exp w_t) - kk_t (iclr_t kk_t)^T) + v_t k_t^T        y_t = S_t r_t
    y, state = scan(*map(heads, (r, w, k, v, a, b)))

    norm = F.group_norm(y.flatten(0, 1).flatten(1), y.shape[2], weight, bias, eps).view_as(r)
    bonus = heads(r * k * r_k).sum(-1, keepdim=True) * heads(v)   # what the token gives itself
    return (norm + bonus.flatten(-2)) * g, state

def wkv7_output_torch(y, r, k, v, g, r_k, weight, bias, eps, head_size):
    """The last lines of time_mix, for the kernel that computes no more than them; y (B,T,C)."""
    heads = lambda z: z.unflatten(-1, (-1, head_size))
    r_k, weight, bias = (z.flatten() for z in (r_k, weight, bias))
    norm = F.group_norm(y.flatten(0, 1), y.shape[-1] // head_size, weight, bias, eps).view_as(y)
    bonus = heads(r * k * r_k).sum(-1, keepdim=True) * heads(v)
    return (norm + bonus.flatten(-2)) * g

def read_state_torch(s, q, y=None):
    """s (B,H,N,N) read by every token: y_t + s q_t, each (B,T,H,N); y None: 0."""
    read = torch.einsum("bhij,bthj->bthi", s, q).contiguous()
    return read if y is None else y + read

def shift_mix_torch(x, last, mix, reach=0):
    """See block.py's shift_mix."""
    T = x.shape[1]
    offsets = [d for d in range(-reach, reach + 1) if d] or [-1]
    farthest = max(1, reach)
    last = torch.zeros_like(x[:, :1]) if last is None else last.unsqueeze(1)
    around = F.pad(torch.cat([last, x], 1), (0, 0, farthest - 1, reach))
    groups = around.chunk(len(offsets), -1)
    other = torch.cat([z[:, farthest + d:][:, :T] for d, z in zip(offsets, groups)], -1)
    change = other - x
    return [torch.addcmul(x, change, m) for m in mix.reshape(-1, x.shape[-1])]

def squared_relu_torch(x):
    return x.relu().square()

def wkv7_loop(r, w, k, v, a, b, s0=None, c=None, every=None):
    """The recurrence of wkv7, one token at a time: the definition of every other form."""
    B, T, H, N = r.shape
    s = r.new_zeros(B, H, N, N) if s0 is None else s0
    ys, states = [], [s]
    for t in range(T):
        sa = torch.einsum("bhij,bhj->bhi", s, a[:, t])
        if c is not None:
            sa = sa + c[:, t]
        decayed = s * w[:, t].exp().unsqueeze(-2)
        s = decayed + sa.unsqueeze(-1) * b[:, t].unsqueeze(-2) + v[:, t].unsqueeze(-1) * k[:, t].unsqueeze(-2)
        ys.append(torch.einsum("bhij,bhj->bhi", s, r[:, t]))
        if every and (t + 1) % every == 0:
            states.append(s)
    y = torch.stack(ys, 1) if ys else torch.zeros_like(r)
    return y, torch.stack(states, 1) if every else s

def wkv7_torch(r, w, k, v, a, b, s0=None, c=None, every=None):
    """Chunks of up to 16 tokens as matrix products and one triangular solve (the WY form of the delta rule).

    Inside a chunk, exp(W_t - W_i), W the summed log-decay, is split at the middle into exp(W_t - M) exp(M -
    W_i). Chunks are shorter where a strong decay would overflow that split: the result is exact for any w <=
    0."""
    B, T, H, N = r.shape
    strongest = -float(w.detach().min()) if w.numel() else 0.0
    limit = 80 if r.dtype == torch.float32 else 700                 # exp(limit) still fits the dtype
    L = CHUNK
    while L > 1 and L * strongest > limit:
        L //= 2
    n = min(every or T, T) or 1    # a segment per returned state, padded to whole chunks by identity steps
    pad, tail = -n % L, -T % n

    def chunked(x):                        # (B,T,H,N) -> (B,H,chunks,L,N)
        x = F.pad(x, (0, 0, 0, 0, 0, tail)).unflatten(1, (-1, n))
        x = F.pad(x, (0, 0, 0, 0, 0, pad)).flatten(1, 2)
        return x.unflatten(1, (-1, L)).permute(0, 3, 1, 2, 4)

    c = 0 if c is None else chunked(c)
    r, w, k, v, a, b = map(chunked, (r, w, k, v, a, b))
    W = w.cumsum(-2)                       # decay from the chunk's start to after token t
    before, end = W - w, W[..., -1:, :]    # ... to before token t; ... to the end
    mid = W[..., (L - 1) // 2, None, :]
    to_a, to_r, inv = (before - mid).clamp_max(limit).exp() * a, (W - mid).exp() * r, (mid - W).exp()
    kb = torch.cat([inv * b, inv * k], -2).mT
    ab, ak = (m.tril(-1) for m in (to_a @ kb).split(L, -1))
    rb, rk = (m.tril() for m in (to_r @ kb).split(L, -1))
    both = torch.cat([before.exp() * a, ak @ v + c], -1)
    PQ = torch.linalg.solve_triangular(-ab, both, upper=False, unitriangular=True)     # (1 - ab)^-1 both
    P, Q = PQ.split(N, -1)
    tail_decay = (end - W).exp()
    kd, bd, wd = tail_decay * k, tail_decay * b, end.exp()
    grow = v.mT @ kd                       # what a chunk adds whatever the state before it
    s = r.new_zeros(B, H, N, N) if s0 is None else s0
    starts, sas = [], []
    for i in range(r.shape[2]):            # the only sequential part: one state per chunk
        sa = P[:, :, i] @ s.mT + Q[:, :, i]
        starts.append(s)
        sas.append(sa)
        s = s * wd[:, :, i] + (sa.mT @ bd[:, :, i] + grow[:, :, i])
    if not starts:
        return r.new_zeros(B, T, H, N), s.unsqueeze(1) if every else s
    y = (W.exp() * r) @ torch.stack(starts, 2).mT + rb @ torch.stack(sas, 2) + rk @ v
    y = y.permute(0, 2, 3, 1, 4).flatten(1, 2).unflatten(1, (-1, n + pad))[:, :, :n].flatten(1, 2)[:, :T]
    if every:
        per = (n + pad) // L
        s = torch.stack((starts + [s])[::per][: T // every + 1], 1)
    return y, s

def biwkv_loop(w, u, k, v):
    """The definition of biwkv: every pair of tokens, O(T^2) memory."""
    t = torch.arange(k.shape[1], device=k.device)
    distance = (t.unsqueeze(1) - t).abs().unsqueeze(-1)
    w, u = (x.unsqueeze(-2).unsqueeze(-2) for x in (w, u))
    k = k.unsqueeze(1)
    logits = torch.where(distance == 0, k + u, k - (distance - 1) * w)                # (B,T,T,C)
    empty = (logits == -torch.inf).all(2, keepdim=True)
    weights = logits.masked_fill(empty, 0.0).softmax(2).masked_fill(empty, 0.0)
    return (weights * v.unsqueeze(1)).sum(2)

def biwkv_torch(w, u, k, v):
    """O(T) work and memory in about 2 sqrt(T) steps: a scan inside all chunks at once, then one over chunks,
    from the left and, on reversed copies, from the right."""
    B, T, C = k.shape
    if not k.numel():
        return k * v * (w + u).unsqueeze(-2)                        # nothing, yet differentiable
    L = math.isqrt(T - 1) + 1
    ones = torch.stack([v, torch.ones_like(v)])    # what a key weighs: numerator and denominator

    def chunked(x, value):                 # (...,B,T,C) -> (...,2 directions,B,chunks,L,C)
        both = torch.stack([x, x.flip(-2)], -4)
        return F.pad(both, (0, 0, 0, -T % L), value=value).unflatten(-2, (-1, L))

    keys, terms = chunked(k, -torch.inf).unbind(-2), chunked(ones, 0.0).unbind(-2)
    m, sums = torch.full_like(keys[0], LOWEST), torch.zeros_like(terms[0])
    inside = []                            # before each token of a chunk: sums over its earlier tokens
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
    decay = -steps * w.unsqueeze(-2).unsqueeze(-2)
    m, sums = _merge(m, decay, sums, *(torch.stack(x, -2) for x in zip(*inside)))
    (left, right), (sums, sums_right) = (x.flatten(-3, -2)[..., :T, :].unbind(-4) for x in (m, sums))
    m, sums = _merge(left, 0.0, sums, right.flip(-2), sums_right.flip(-2))
    num, den = _merge(k, u.unsqueeze(-2), ones, m, sums)[1]
    return num / den.masked_fill(den == 0, 1.0)                     # 0 / 1 where no position has a key

def _merge(m, shift, sums, n, more):
    """e^{m + shift} sums + e^n more -> (reference, sums / e^reference). The reference is the larger exponent
    and a constant: no gradient need flow through it. m - top comes first: it is exact where the two are
    close."""
    top = torch.maximum(m + shift, n).detach().clamp_min(LOWEST)
    return top, ((m - top) + shift).exp() * sums + (n - top).exp() * more
