"""The memory-bound elementwise parts of a block, fused: one kernel forward and one backward each on the CPU, plain torch elsewhere.
B batch, T time, C channels, N head size. Parameters are given as (C,) or in any shape of C elements, such as (1,1,C).

Arithmetic is in float32 (float64 for float64 inputs). What the linears give or take under autocast, the kernels read and write as
the bfloat16 it is there, and so its gradients; everything else is converted to float32 first.
"""
import math
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .loader import backend, call, operator, run, wants_grad
from .wkv7 import HEAD_SIZES, _wkv7, _wkv7_backward, wkv7


def shift_mix(x, last, mix, reach=0):
    """Token shift: x mixed with the token before it, n times -> list of n (B,T,C) in x's dtype, or where CPU autocast is on and x
    float32, in the dtype that the linears are going to make it.

        out[i] = x + (prev - x) * mix[i]        prev_t = x_{t-1}, prev_0 = last

    reach: with r > 0 the channels are 2 r equal groups, each mixed with another token, r before it to r after it; zeros beyond last and
    the end. 1 is BiShift, as in Vision-RWKV.
    x: (B,T,C); last: (B,C), zeros if None; mix: (n,C), or any shape of n*C elements.
    """
    if last is not None and last.shape != (x.shape[0], x.shape[2]):
        raise ValueError(f"shift_mix: last has shape {tuple(last.shape)}, expected (B,C) = {(x.shape[0], x.shape[2])}")
    if reach < 0 or x.shape[2] % max(1, 2 * reach):
        raise ValueError(f"shift_mix: reach={reach} needs {2 * reach} groups of channels, C = {x.shape[2]} is no multiple of that")
    if mix.numel() % x.shape[2]:
        raise ValueError(f"shift_mix: mix has {mix.numel()} elements, expected a multiple of C = {x.shape[2]}")
    kind, dtype = _kind(x), x.dtype
    if dtype == torch.float32 and x.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
    x, last, mix = _to(kind, x, last, mix)
    if x.shape[2] % (16 * max(1, 2 * reach)) == 0 and _kernel(x.device, kind):       # 16 floats are a vector of the kernel
        out = list(run(ShiftMix, _shift_mix, x, last, mix, reach, dtype == torch.bfloat16))
    else:
        out = shift_mix_torch(x, last, mix, reach)
    return [z.to(dtype) for z in out]


def shift_mix_torch(x, last, mix, reach=0):
    """The definition of shift_mix, in the inputs' dtype."""
    offsets, T = [d for d in range(-reach, reach + 1) if d] or [-1], x.shape[1]
    last = torch.zeros_like(x[:, :1]) if last is None else last.unsqueeze(1)
    around = F.pad(torch.cat([last, x], 1), (0, 0, max(1, reach) - 1, reach))       # from max(1, reach) tokens before to reach after
    other = [z[:, max(1, reach) + d:][:, :T] for d, z in zip(offsets, around.chunk(len(offsets), -1))]
    change = torch.cat(other, -1) - x
    return [torch.addcmul(x, change, m) for m in mix.reshape(-1, x.shape[-1])]


def wkv7_inputs(w, a, k, v, gate, v_first, w0, a0, v0, k_k, k_a, valid, head_size):
    """From the projections to what the recurrence takes -> (w, k, v, a, b), all (B,T,C) and float32 (float64 for float64 inputs).

        w' = -exp(-1/2) sigmoid(w0 + w)     iclr = sigmoid(a0 + a)      v' = v + (v_first - v) sigmoid(v0 + gate)
        kk = (k * k_k) / its norm over each head (at least 1e-12)       k' = k (1 + (iclr - 1) k_a)
        returned a = -kk, b = kk * iclr; where `valid` is False w', k', a, b are 0, which leaves the state as it is

    w, a, k, v, gate, v_first: (B,T,C), floating point; w0, a0, v0, k_k, k_a: C elements; valid: (B,T) bool or None.
    gate, v_first and v0 are None together: then v' is v, in its own dtype.
    """
    _check("wkv7_inputs", w, head_size, dict(a=a, k=k, v=v, gate=gate, v_first=v_first), dict(w0=w0, a0=a0, v0=v0, k_k=k_k, k_a=k_a), valid)
    kind = _kind(w)
    kernel = _kernel(w.device, kind)
    rows = (w, a, k, *((None, None, None) if gate is None else (v, gate, v_first)))
    args = *_to(kind, *rows, half=kernel), *_to(kind, w0, a0, v0, k_k, k_a), valid, head_size
    if kernel:
        w, k, a, b, *mixed = run(Wkv7Inputs, _wkv7_inputs, *args)
        return w, k, *(mixed or [v]), a, b
    with torch.autocast(w.device.type, enabled=False):
        w, k, mixed, a, b = wkv7_inputs_torch(*args)
    return w, k, v if gate is None else mixed, a, b


def wkv7_inputs_torch(w, a, k, v, gate, v_first, w0, a0, v0, k_k, k_a, valid, head_size):
    """The definition of wkv7_inputs, in the inputs' dtype."""
    w0, a0, v0, k_k, k_a = (p if p is None else p.flatten() for p in (w0, a0, v0, k_k, k_a))
    w = -math.exp(-0.5) * torch.sigmoid(w0 + w)
    iclr = torch.sigmoid(a0 + a)
    if gate is not None:
        v = v + (v_first - v) * torch.sigmoid(v0 + gate)
    kk = F.normalize((k * k_k).unflatten(-1, (-1, head_size)), dim=-1).flatten(-2)
    k = k * (1 + (iclr - 1) * k_a)
    if valid is not None:
        w, k, kk = (z.masked_fill(~valid.unsqueeze(-1), 0) for z in (w, k, kk))
    return w, k, v, -kk, kk * iclr


def wkv7_mix(r, w, a, k, v, gate, v_first, g, w0, a0, v0, k_k, k_a, r_k, weight, bias, eps, valid, head_size, s0=None, every=None,
             leak=None, scan=None):
    """All of RWKV-7's time mixing between the projections: wkv7_inputs, wkv7_leaky, wkv7_output -> (B,T,C), and the state or states that
    the recurrence returns. scan: what to call as the recurrence, (r, w, k, v, a, b), each (B,T,H,N) -> y, s, in place of wkv7_leaky.

    The kernels run without what autograd would put between them; where no gradient is wanted, one kernel does it all for a few tokens
    at a time, and nothing in between leaves the cache.
    """
    _check("wkv7_mix", r, head_size, dict(w=w, a=a, k=k, v=v, gate=gate, v_first=v_first, g=g),
           dict(w0=w0, a0=a0, v0=v0, k_k=k_k, k_a=k_a, r_k=r_k, weight=weight, bias=bias), valid, dict(s0=s0, leak=leak))
    if every is not None and every < 1 or leak is not None and (s0 is None or every is not None):
        raise ValueError(f"wkv7_mix: every={every} is not allowed: give a number of tokens >= 1, or None; with a leak None, and an s0")
    kind = _kind(r)
    tensors = (r, w, a, k, v, gate, v_first, g, w0, a0, v0, k_k, k_a, r_k, weight, bias)
    grads = wants_grad(*tensors, s0, leak)
    few = lambda: not torch.compiler.is_compiling() and r.shape[0] * r.shape[2] // head_size < torch.get_num_threads()
    if scan or not _kernel(r.device, kind) or not grads and (leak is not None or few()):             # a head is a thread's
        heads = lambda z: z.unflatten(-1, (-1, head_size))
        w, k, v, a, b = wkv7_inputs(w, a, k, v, gate, v_first, w0, a0, v0, k_k, k_a, valid, head_size)
        z = map(heads, (r, w, k, v, a, b))
        y, s = scan(*z) if scan else wkv7_leaky(*z, s0, leak, every)
        return wkv7_output(y.flatten(2), r, k, v, g, r_k, weight, bias, eps, head_size), s
    args = *_to(kind, *tensors[:8], half=True), *_to(kind, *tensors[8:]), valid, *_to(kind, s0)
    if grads:
        return Wkv7Mix.apply(*args, *_to(kind, leak), eps, head_size, every or 0)
    return tuple(_wkv7_mix(*args, eps, head_size, every or 0))


def wkv7_leaky(r, w, k, v, a, b, s0=None, leak=None, every=None):
    """wkv7 with J diag(1 - exp w_t) added to the state at every step, `leak` being J (B,H,N,N), None for none: the plain recurrence on
    S - J, with what J gives written and read on top. Where there is a leak, s0 is given and `every` is not."""
    if leak is None:
        return wkv7(r, w, k, v, a, b, s0, every=every)
    y, u = wkv7(r, w, k, v, a, b, s0 - leak, c=read_state(leak, a))
    return read_state(leak, r, y), u + leak


def wkv7_output(y, r, k, v, g, r_k, weight, bias, eps, head_size):
    """From what the recurrence returns to the output projection's input, (B,T,C) in r's dtype.

        out = (GroupNorm(y) + (sum over the head of r k r_k) v) g

    GroupNorm is over each head's N channels of one token, with `weight`, `bias` and `eps`.
    y, r, k, v, g: (B,T,C), floating point; r_k, weight, bias: C elements.
    """
    _check("wkv7_output", y, head_size, dict(r=r, k=k, v=v, g=g), dict(r_k=r_k, weight=weight, bias=bias))
    kind, dtype = _kind(y), r.dtype
    kernel = _kernel(y.device, kind)
    args = *_to(kind, y, r, k, v, g, half=kernel), *_to(kind, r_k, weight, bias), eps, head_size
    if kernel:
        out = run(Wkv7Output, _wkv7_output, *args)
    else:
        with torch.autocast(y.device.type, enabled=False):
            out = wkv7_output_torch(*args)
    return out.to(dtype)


def wkv7_output_torch(y, r, k, v, g, r_k, weight, bias, eps, head_size):
    """The definition of wkv7_output, in the inputs' dtype."""
    heads = lambda z: z.unflatten(-1, (-1, head_size))
    norm = F.group_norm(y.flatten(0, 1), y.shape[-1] // head_size, weight.flatten(), bias.flatten(), eps).view_as(y)
    bonus = heads(r * k * r_k.flatten()).sum(-1, keepdim=True) * heads(v)
    return (norm + bonus.flatten(-2)) * g


def read_state(s, q, y=None):
    """What a state that stays as it is gives every token: y_t + s q_t -> (B,T,H,N), in y's dtype, or where it is None in q's.

    s: (B,H,N,N), value by key channels; q, y: (B,T,H,N), floating point. The leak of DW-JRT reads its seed so.
    """
    if s.shape != (q.shape[0], *q.shape[2:], q.shape[3]) or y is not None and y.shape != q.shape:
        raise ValueError(f"read_state: s {tuple(s.shape)} and y {y if y is None else tuple(y.shape)} do not fit q, (B,T,H,N) = {tuple(q.shape)}")
    kind, dtype = _kind(q), (q if y is None else y).dtype
    kernel = q.shape[-1] in HEAD_SIZES and _kernel(q.device, kind)
    args = *_to(kind, s), *_to(kind, q, y, half=kernel)
    return (run(ReadState, _read_state, *args) if kernel else read_state_torch(*args)).to(dtype)     # matrix products: autocast may have them


def read_state_torch(s, q, y=None):
    """The definition of read_state, in the inputs' dtype."""
    read = torch.einsum("bhij,bthj->bthi", s, q).contiguous()
    return read if y is None else y + read


def squared_relu(x):
    """relu(x)^2 -> like x, of any shape and floating dtype."""
    kind = _kind(x)
    kernel = _kernel(x.device, kind)
    z, = _to(kind, x, half=kernel)
    return (run(SquaredReLU, _squared_relu, z) if kernel else squared_relu_torch(z)).to(x.dtype)


def squared_relu_torch(x):
    """The definition of squared_relu, in x's dtype."""
    return x.relu().square()


def _kind(x):
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _to(kind, *args, half=False):
    """half: bfloat16 may stay, as the kernel reads it."""
    return [x if x is None or half and x.dtype == torch.bfloat16 else x.to(kind) for x in args]


def _kernel(device, kind):
    return backend(device.type, kind) == "cpp"


def _check(op, x, head_size, tensors, parameters, valid=None, states={}):
    """The kernels trust every shape, so a wrong one must not get past here."""
    if head_size not in HEAD_SIZES or x.shape[-1] % head_size:
        raise ValueError(f"{op}: head size {head_size} is not supported for C = {x.shape[-1]}: "
                         f"choose one of {', '.join(map(str, HEAD_SIZES))} that divides C")
    for name, z in tensors.items():
        if z is not None and z.shape != x.shape:
            raise ValueError(f"{op}: {name} has shape {tuple(z.shape)}, expected (B,T,C) = {tuple(x.shape)}")
    for name, z in parameters.items():
        if z is not None and z.numel() != x.shape[-1]:
            raise ValueError(f"{op}: {name} has {z.numel()} elements, expected C = {x.shape[-1]}")
    given = tensors | parameters
    if len({given.get(name) is None for name in ("gate", "v_first", "v0")}) > 1:
        raise ValueError(f"{op}: gate, v_first and v0 go together: give all three or None three times")
    if valid is not None and (valid.shape != x.shape[:2] or valid.dtype != torch.bool):
        raise ValueError(f"{op}: valid is {valid.dtype} {tuple(valid.shape)}, expected bool (B,T) = {tuple(x.shape[:2])}")
    shape = (x.shape[0], x.shape[2] // head_size, head_size, head_size)
    for name, z in states.items():
        if z is not None and z.shape != shape:
            raise ValueError(f"{op}: {name} has shape {tuple(z.shape)}, expected (B,H,N,N) = {shape}")


# ---- the kernels: buffers, operators for compiled graphs, gradients ----

def _like(x, dtype=None):
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def _rows(x, N, back):
    return x.shape[0] * x.shape[1], x.shape[2], N, back


def _dense(*args):
    return [x if x is None else x.contiguous() for x in args]


def _shift_mix_buffers(x, last, mix, reach, half):
    return [_like(x, torch.bfloat16 if half else None) for _ in range(mix.numel() // x.shape[-1])]


@operator(_shift_mix_buffers)
def _shift_mix(x: Tensor, last: Optional[Tensor], mix: Tensor, reach: int, half: bool) -> list[Tensor]:
    out = _shift_mix_buffers(x, last, mix, reach, half)
    call("shift_mix", (*x.shape, len(out), reach, False), (*_dense(x, last, mix), None, None, None, *out))
    return out


def _shift_mix_grads(x, last, mix, reach, dout):
    return [_like(x), _like(mix)] + ([] if last is None else [_like(last)])


@operator(_shift_mix_grads)
def _shift_mix_backward(x: Tensor, last: Optional[Tensor], mix: Tensor, reach: int, dout: list[Tensor]) -> list[Tensor]:
    dx, dmix, *dlast = grads = _shift_mix_grads(x, last, mix, reach, dout)
    call("shift_mix", (*x.shape, len(dout), reach, True), (*_dense(x, last, mix), dx, *(dlast or [None]), dmix, *_dense(*dout)))
    return grads


class ShiftMix(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, last, mix, reach, half):
        ctx.save_for_backward(x, last, mix)
        ctx.reach = reach
        return tuple(_shift_mix(x, last, mix, reach, half))

    @staticmethod
    @once_differentiable
    def backward(ctx, *dout):
        dx, dmix, *dlast = _shift_mix_backward(*ctx.saved_tensors, ctx.reach, list(dout))
        return dx, *(dlast or [None]), dmix, None, None


def _wkv7_inputs_buffers(w, a, k, v, gate, v_first, w0, a0, v0, k_k, k_a, valid, N):
    return [_like(w, torch.float32) for _ in range(4 if gate is None else 5)]


@operator(_wkv7_inputs_buffers)
def _wkv7_inputs(w: Tensor, a: Tensor, k: Tensor, v: Optional[Tensor], gate: Optional[Tensor], v_first: Optional[Tensor], w0: Tensor,
                 a0: Tensor, v0: Optional[Tensor], k_k: Tensor, k_a: Tensor, valid: Optional[Tensor], N: int) -> list[Tensor]:
    args = (w, a, k, v, gate, v_first, w0, a0, v0, k_k, k_a, valid)
    w, k, a, b, *v = out = _wkv7_inputs_buffers(*args, N)
    call("wkv7_inputs", _rows(w, N, False), (*_dense(*args), w, k, a, b, *(v or [None]), *[None] * 12))
    return out


def _wkv7_inputs_grads(w_out, a, k, v, gate, v_first, a0, v0, k_k, k_a, valid, N, dout):
    """Those of w (in a's dtype: w itself is not kept), a, k; of w0, a0, k_k, k_a and v0 as rows of one tensor; of v, gate, v_first."""
    return [_like(a), _like(a), _like(k), a0.new_empty(len(dout), a.shape[-1])] + [_like(z) for z in (v, gate, v_first) if z is not None]


@operator(_wkv7_inputs_grads)
def _wkv7_inputs_backward(w_out: Tensor, a: Tensor, k: Tensor, v: Optional[Tensor], gate: Optional[Tensor], v_first: Optional[Tensor],
                          a0: Tensor, v0: Optional[Tensor], k_k: Tensor, k_a: Tensor, valid: Optional[Tensor], N: int,
                          dout: list[Tensor]) -> list[Tensor]:
    args = (w_out, a, k, v, gate, v_first, a0, v0, k_k, k_a, valid)
    dw, da, dk, sums, *rest = grads = _wkv7_inputs_grads(*args, N, dout)
    dw_out, dk_out, da_out, db_out, *dv_out = _dense(*dout)
    w_out, a, k, v, gate, v_first, a0, v0, k_k, k_a, valid = _dense(*args)
    call("wkv7_inputs", _rows(a, N, True), (None, a, k, v, gate, v_first, None, a0, v0, k_k, k_a, valid, w_out, None, None, None, None,
                                            dw_out, dk_out, da_out, db_out, *(dv_out or [None]), dw, da, dk, sums, *(rest or [None] * 3)))
    return grads


class Wkv7Inputs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w, a, k, v, gate, v_first, w0, a0, v0, k_k, k_a, valid, N):
        out = _wkv7_inputs(w, a, k, v, gate, v_first, w0, a0, v0, k_k, k_a, valid, N)
        ctx.save_for_backward(out[0], a, k, v, gate, v_first, a0, v0, k_k, k_a, valid)      # the log-decay holds its own derivative
        ctx.N, ctx.shapes = N, [None if p is None else p.shape for p in (w0, a0, k_k, k_a, v0)]
        return tuple(out)

    @staticmethod
    @once_differentiable
    def backward(ctx, *dout):
        dw, da, dk, sums, *rest = _wkv7_inputs_backward(*ctx.saved_tensors, ctx.N, list(dout))
        dw0, da0, dk_k, dk_a, *dv0 = (d.view(shape) for d, shape in zip(sums.unbind(), ctx.shapes))
        return dw, da, dk, *(rest or [None] * 3), dw0, da0, *(dv0 or [None]), dk_k, dk_a, None, None


@operator(lambda y, r, *args: _like(r))
def _wkv7_output(y: Tensor, r: Tensor, k: Tensor, v: Tensor, g: Tensor, r_k: Tensor, weight: Tensor, bias: Tensor, eps: float,
                 N: int) -> Tensor:
    out = _like(r)
    call("wkv7_output", _rows(y, N, False), (*_dense(y, r, k, v, g, r_k, weight, bias), None, out, *[None] * 7), eps)
    return out


def _wkv7_output_grads(y, r, k, v, g, r_k, *args):
    """Those of y, r, k, v, g, and those of r_k, weight, bias as rows of one tensor."""
    return [_like(z) for z in (y, r, k, v, g)] + [r_k.new_empty(3, y.shape[-1])]


@operator(_wkv7_output_grads)
def _wkv7_output_backward(y: Tensor, r: Tensor, k: Tensor, v: Tensor, g: Tensor, r_k: Tensor, weight: Tensor, bias: Tensor, eps: float,
                          N: int, dout: Tensor) -> list[Tensor]:
    grads = _wkv7_output_grads(y, r, k, v, g, r_k)
    call("wkv7_output", _rows(y, N, True), (*_dense(y, r, k, v, g, r_k, weight, bias), dout.contiguous(), None, *grads, None), eps)
    return grads


class Wkv7Output(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        *tensors, ctx.eps, ctx.N = args
        ctx.save_for_backward(*tensors)
        return _wkv7_output(*args)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        args = ctx.saved_tensors
        *grads, sums = _wkv7_output_backward(*args, ctx.eps, ctx.N, dout)
        return *grads, *(d.view(p.shape) for d, p in zip(sums.unbind(), args[5:])), None, None


@operator(lambda s, q, y: _like(q if y is None else y))
def _read_state(s: Tensor, q: Tensor, y: Optional[Tensor]) -> Tensor:
    out = _like(q if y is None else y)
    s, q, y = _dense(s, q, y)
    call("read_state", (*q.shape, False), (q, y, None, s, out, None, None))
    return out


@operator(lambda s, q, dout: [_like(s), _like(q)])
def _read_state_backward(s: Tensor, q: Tensor, dout: Tensor) -> list[Tensor]:
    ds, dq = grads = [_like(s), _like(q)]
    s, q, dout = _dense(s, q, dout)
    call("read_state", (*q.shape, True), (q, None, dout, s, None, dq, ds))
    return grads


class ReadState(torch.autograd.Function):
    @staticmethod
    def forward(ctx, s, q, y):
        ctx.save_for_backward(s, q)
        return _read_state(s, q, y)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        return *_read_state_backward(*ctx.saved_tensors, dout), dout if ctx.needs_input_grad[2] else None


class Wkv7Mix(torch.autograd.Function):
    """wkv7_mix: the kernels' forward passes one after the other, then their backward passes."""

    @staticmethod
    def forward(ctx, r, w, a, k, v, gate, v_first, g, w0, a0, v0, k_k, k_a, r_k, weight, bias, valid, s0, leak, eps, N, every):
        heads = lambda z: z.unflatten(-1, (-1, N))
        rows = (w, a, k, None if gate is None else v, gate, v_first)
        w_, k_, a_, b_, *mixed = _wkv7_inputs(*rows, w0, a0, v0, k_k, k_a, valid, N)
        q, v_ = r.float(), mixed[0] if mixed else v.float()
        c = None if leak is None else _read_state(leak, heads(a_), None)
        start = s0 if leak is None else s0 - leak
        y, s, mid, sa = _wkv7(*map(heads, (q, w_, k_, v_, a_, b_)), start, c, every, True)
        if leak is not None:
            y, s = _read_state(leak, heads(q), y), s + leak
        ctx.save_for_backward(r, g, r_k, weight, bias, q, w_, k_, v_, a_, b_, y, mid, sa, leak, *rows[1:], a0, v0, k_k, k_a, valid)
        ctx.eps, ctx.N, ctx.every, ctx.has_s0, ctx.v = eps, N, every, s0 is not None, v.dtype
        ctx.shapes = [None if p is None else p.shape for p in (w0, a0, k_k, k_a, v0)]
        ctx.set_materialize_grads(False)
        return _wkv7_output(y.flatten(2), r, k_, v_, g, r_k, weight, bias, eps, N), s

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, ds):
        r, g, r_k, weight, bias, q, w_, k_, v_, a_, b_, y, mid, sa, leak, *inputs = ctx.saved_tensors
        heads, dleak = lambda z: z.unflatten(-1, (-1, ctx.N)), None
        dout = torch.zeros_like(r) if dout is None else dout
        dy, dr, dk, dv, dg, sums = _wkv7_output_backward(y.flatten(2), r, k_, v_, g, r_k, weight, bias, ctx.eps, ctx.N, dout)
        dq, dw_, dk_, dv_, da_, db_, *rest = _wkv7_backward(*map(heads, (q, w_, k_, v_, a_, b_)), mid, sa, ctx.every, heads(dy), ds,
                                                            ctx.has_s0, leak is not None)
        ds0 = rest[0] if ctx.has_s0 else None
        if leak is not None:
            dleak, more = _read_state_backward(leak, heads(q), heads(dy))
            dq += more
            other, more = _read_state_backward(leak, heads(a_), rest[1])
            da_ += more
            dleak += other - ds0
            dleak = dleak if ds is None else dleak + ds
        dr = (dq.flatten(2) + dr).to(dr.dtype)                # in place it would take three times as long in bfloat16
        dk_, dv_ = dk_.flatten(2).add_(dk), dv_.flatten(2).add_(dv)
        made = [dw_.flatten(2), dk_, da_.flatten(2), db_.flatten(2)] + ([] if inputs[2] is None else [dv_])
        dw, da, dk, more, *mixed = _wkv7_inputs_backward(w_, *inputs, ctx.N, made)
        dw0, da0, dk_k, dk_a, *dv0 = (d.view(shape) for d, shape in zip(more.unbind(), ctx.shapes))
        dr_k, dweight, dbias = (d.view(p.shape) for d, p in zip(sums.unbind(), (r_k, weight, bias)))
        dv, dgate, dv_first = mixed or (dv_.to(ctx.v), None, None)
        return (dr, dw, da, dk, dv, dgate, dv_first, dg, dw0, da0, *(dv0 or [None]), dk_k, dk_a, dr_k, dweight, dbias, None, ds0, dleak,
                None, None, None)


def _wkv7_mix_buffers(r, w, a, k, v, gate, v_first, g, w0, a0, v0, k_k, k_a, r_k, weight, bias, valid, s0, eps, N, every):
    B, T, C = r.shape
    return [_like(r), w0.new_empty(B, *([T // every + 1] if every else []), C // N, N, N)]


@operator(_wkv7_mix_buffers)
def _wkv7_mix(r: Tensor, w: Tensor, a: Tensor, k: Tensor, v: Tensor, gate: Optional[Tensor], v_first: Optional[Tensor], g: Tensor,
              w0: Tensor, a0: Tensor, v0: Optional[Tensor], k_k: Tensor, k_a: Tensor, r_k: Tensor, weight: Tensor, bias: Tensor,
              valid: Optional[Tensor], s0: Optional[Tensor], eps: float, N: int, every: int) -> list[Tensor]:
    args = (r, w, a, k, v, gate, v_first, g, w0, a0, v0, k_k, k_a, r_k, weight, bias, valid, s0)
    out = _wkv7_mix_buffers(*args, eps, N, every)
    call("wkv7_mix", (*r.shape[:2], r.shape[2] // N, N, every), (*_dense(*args), *out), eps)
    return out


@operator(_like)
def _squared_relu(x: Tensor) -> Tensor:
    y = _like(x)
    call("squared_relu", (x.numel(),), (x.contiguous(), None, y))
    return y


@operator(lambda x, dy: _like(x))
def _squared_relu_backward(x: Tensor, dy: Tensor) -> Tensor:
    dx = _like(x)
    call("squared_relu", (x.numel(),), (x.contiguous(), dy.contiguous(), dx))
    return dx


class SquaredReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return _squared_relu(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return _squared_relu_backward(*ctx.saved_tensors, dy)
