"""RWKV-7's recurrence. B batch, T time, H heads, N head size; a state is (B,H,N,N): rows value channels,
columns key channels."""
import torch

from .definitions import CHUNK, HEAD_SIZES, wkv7_loop, wkv7_torch
from .loader import backend
from .operators import Kernel, expect, kind_of, like, wants_grad

def wkv7(r, w, k, v, a, b, s0=None, c=None, every=None):
    """RWKV-7 recurrence (arXiv 2503.14456, eq. 16-20; there a = -kk, b = kk * iclr).

        S_t = S_{t-1} diag(exp w_t) + (S_{t-1} a_t + c_t) b_t^T + v_t k_t^T        y_t = S_t r_t

    r, w, k, v, a, b, c: (B,T,H,N), floating point; w is the log-decay, w <= 0. s0: (B,H,N,N), zero if None.
    Returns y (B,T,H,N) in r's dtype and s in float32 (float64 for float64 inputs): the final state (B,H,N,N),
    or with `every=n` the states after 0, n, 2n, ... tokens, (B, T//n + 1, H,N,N). Everything returned is
    differentiable. On a GPU a bfloat16 r allows products in bfloat16; sums and states are in float32 always.
    ValueError: N not in HEAD_SIZES, shapes that disagree, every < 1."""
    B, _, H, N = r.shape
    if N not in HEAD_SIZES:
        raise ValueError(f"head size {N} is not supported: choose one of {', '.join(map(str, HEAD_SIZES))}")
    expect("wkv7", "r's (B,T,H,N)", r.shape, w=w, k=k, v=v, a=a, b=b, c=c)
    expect("wkv7", "(B,H,N,N)", (B, H, N, N), s0=s0)
    if every is not None and every < 1:
        raise ValueError(f"wkv7: every={every} is not allowed: give a number of tokens >= 1, or None")
    kind = kind_of(r)
    impl = backend(r.device.type, kind)

    def converted(x):                      # the GPU kernel reads bfloat16 as it is
        if x is None or impl == "cuda" and x.dtype == torch.bfloat16:
            return x
        return x.to(kind)

    args = [converted(x) for x in (r, w, k, v, a, b)]
    s0 = s0 if s0 is None else s0.to(kind)
    with torch.autocast(r.device.type, enabled=False):              # the recurrence stays in float32
        y, s = IMPLS[impl](*args, s0, converted(c), every)
    return y.to(r.dtype), s

class Wkv7(Kernel):
    """r, w, k, v, a, b, s0, c; numbers: every or 0, whether to save, whether there is a c -> y, s and what is
    saved for backward: the states at the start of each chunk, and S a + c."""
    arity, visible, materialize = 8, 2, False

    def size(self, inputs, numbers):
        return *inputs[0].shape, numbers[0]

    def outputs(self, inputs, numbers):
        r, (every, save, _) = inputs[0], numbers
        B, T, H, N = r.shape
        shapes = [(B, T // every + 1, H, N, N) if every else (B, H, N, N)]
        if save:
            shapes += [(B, H, -(-T // CHUNK), N, N), r.shape]
        return like(r) + [r.new_empty(shape, dtype=torch.float32) for shape in shapes]

    def keep(self, inputs, out):
        return *inputs[:7], None, None, None, *out[2:]

    def grads(self, inputs, numbers):
        r = inputs[0]
        dc = r.new_empty(r.shape if numbers[2] else 0, dtype=torch.float32)
        return [*like(*inputs[:7]), dc]

    def differentiate(self, saved, dout, numbers, eps=0.0):
        dy, ds = dout
        dy = torch.zeros_like(saved[0]) if dy is None else dy
        return super().differentiate(saved, (dy, ds), numbers)

WKV7 = Wkv7("wkv7")

def _wkv7_kernel(r, w, k, v, a, b, s0=None, c=None, every=None):
    tensors = (r, w, k, v, a, b, s0, c)
    return tuple(WKV7(*tensors, numbers=(every or 0, int(wants_grad(*tensors)), int(c is not None))))

IMPLS = {"cpp": _wkv7_kernel, "cuda": _wkv7_kernel, "torch": wkv7_torch, "loop": wkv7_loop}
