"""The memory-bound elementwise parts of a block, fused: one kernel forward and one backward each on the CPU,
plain torch elsewhere. B batch, T time, C channels, N head size. Parameters are given as (C,) or in any shape
of C elements, such as (1,1,C).

Arithmetic is in float32 (float64 for float64 inputs). What the linears give or take under autocast, the
kernels read and write as the bfloat16 it is there, and so its gradients; everything else is converted to
float32 first."""
import functools

import torch

from .definitions import (HEAD_SIZES, Parameters, Projected, read_state_torch, shift_mix_torch,
                          squared_relu_torch, time_mix, wkv7_output_torch)
from .loader import backend
from .operators import Kernel, expect, kind_of, like, wants_grad
from .wkv7 import WKV7, wkv7

def shift_mix(x, last, mix, reach=0):
    """Token shift: x mixed with the token before it, n times -> list of n (B,T,C) in x's dtype, or where CPU
    autocast is on and x float32, in the dtype that the linears are going to make it.

        out[i] = x + (prev - x) * mix[i]        prev_t = x_{t-1}, prev_0 = last

    reach: with r > 0 the channels are 2 r equal groups, each mixed with another token, r before it to r after
    it; zeros beyond last and the end. 1 is BiShift, as in Vision-RWKV.
    x: (B,T,C); last: (B,C), zeros if None; mix: (n,C), or any shape of n*C elements."""
    B, _, C = x.shape
    groups = max(1, 2 * reach)
    expect("shift_mix", "(B,C)", (B, C), last=last)
    if reach < 0 or C % groups:
        raise ValueError(f"shift_mix: reach={reach} needs {2 * reach} groups of channels, "
                         f"C = {C} is not a multiple of that")
    if mix.numel() % C:
        raise ValueError(f"shift_mix: mix has {mix.numel()} elements, expected a multiple of C = {C}")
    (kind, kernel), dtype = _choose(x), x.dtype
    if dtype == torch.float32 and x.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
    args = _to(kind, x, last, mix)
    if kernel and C % (16 * groups) == 0:                           # 16 floats are a vector of the kernel
        out = SHIFT_MIX(*args, numbers=(mix.numel() // C, reach, int(dtype == torch.bfloat16)))
    else:
        out = shift_mix_torch(*args, reach)
    return [z.to(dtype) for z in out]

def wkv7_inputs(w, a, k, v, gate, v_first, w0, a0, v0, k_k, k_a, valid, head_size):
    """time_mix up to its `scan` -> (w, k, v, a, b), all (B,T,C) and float32 (float64 for float64 inputs).

    The arguments are those of time_mix, each floating point. gate, v_first and v0 are None together: then v
    comes back as it is, in its own dtype."""
    x = Projected(None, w, a, k, v, gate, v_first, None)
    p = Parameters(w0, a0, v0, k_k, k_a, None, None, None)
    _check("wkv7_inputs", w, head_size, x, p, valid)
    kind, kernel = _choose(w)
    if kernel:
        rows = _to(kind, w, a, k, *_value_residual(x), half=True)
        w, k, a, b, mixed = WKV7_INPUTS(*rows, *_to(kind, *p[:5]), valid, numbers=(head_size,))
    else:
        w, k, mixed, a, b = time_mix(_to(kind, *x), _to(kind, *p), 0.0, valid, head_size, None)
    return w, k, v if gate is None else mixed, a, b

def _value_residual(x):
    """v, gate and v_first as the kernel takes them: v without a gate is not its business."""
    return (x.v, x.gate, x.v_first) if x.gate is not None else (None, None, None)

def wkv7_mix(r, w, a, k, v, gate, v_first, g, w0, a0, v0, k_k, k_a, r_k, weight, bias, eps, valid, head_size,
             s0=None, every=None, leak=None, scan=None):
    """RWKV-7's time mix between the projections, time_mix in definitions.py -> (B,T,C) in r's dtype, and what
    the recurrence returns as states. scan: the recurrence in place of wkv7_leaky with s0, leak and every.

    The kernels run without what autograd would put between them; where no gradient is wanted, one kernel does
    all for a few tokens at a time, and nothing in between leaves the cache."""
    x = Projected(r, w, a, k, v, gate, v_first, g)
    p = Parameters(w0, a0, v0, k_k, k_a, r_k, weight, bias)
    _check("wkv7_mix", r, head_size, x, p, valid, s0=s0, leak=leak)
    if every is not None and every < 1 or leak is not None and (s0 is None or every is not None):
        raise ValueError(f"wkv7_mix: every={every} is not allowed: give a number of tokens >= 1, or None; "
                         "with a leak None, and an s0")
    kind, kernel = _choose(r)
    recurrence = scan or functools.partial(wkv7_leaky, s0=s0, leak=leak, every=every)
    if not kernel:
        return _portable_mix(x, p, eps, valid, head_size, recurrence)
    grads = wants_grad(*x, *p, s0, leak)
    if scan or not grads and (leak is not None or _few_heads(r, head_size)):
        w, k, v, a, b = wkv7_inputs(*x[1:7], *p[:5], valid, head_size)
        y, s = recurrence(*(z.unflatten(-1, (-1, head_size)) for z in (r, w, k, v, a, b)))
        return wkv7_output(y.flatten(2), r, k, v, g, *p[5:], eps, head_size), s
    inputs = *_to(kind, *x, half=True), *_to(kind, *p), valid, *_to(kind, s0)
    numbers = (head_size, every or 0)
    if grads:
        return WKV7_MIX.apply(numbers, eps, *inputs, *_to(kind, leak))
    return tuple(WKV7_MIX.forward(inputs, numbers, eps))

def _portable_mix(x, p, eps, valid, head_size, recurrence):
    """time_mix in float32; but the recurrence gets r and v as they are: its GPU kernel reads bfloat16."""
    kind, heads = kind_of(x.r), lambda z: z.unflatten(-1, (-1, head_size))

    def scan(r, w, k, v, a, b):
        y, s = recurrence(heads(x.r), w, k, v if x.gate is not None else heads(x.v), a, b)
        return y.to(kind), s

    y, s = time_mix(_to(kind, *x), _to(kind, *p), eps, valid, head_size, scan)
    return y.to(x.r.dtype), s

def _few_heads(r, head_size):
    """Whether a thread would get no head: then the one kernel, which gives threads whole heads, is slower."""
    heads = r.shape[0] * r.shape[2] // head_size
    return not torch.compiler.is_compiling() and heads < torch.get_num_threads()

def wkv7_leaky(r, w, k, v, a, b, s0=None, leak=None, every=None):
    """wkv7 with J diag(1 - exp w_t) added to the state at every step, `leak` being J (B,H,N,N), None for
    none: the plain recurrence on S - J, with what J gives written and read on top. With a leak goes an s0 and
    no `every`."""
    if leak is None:
        return wkv7(r, w, k, v, a, b, s0, every=every)
    y, u = wkv7(r, w, k, v, a, b, s0 - leak, c=read_state(leak, a))
    return read_state(leak, r, y), u + leak

def wkv7_output(y, r, k, v, g, r_k, weight, bias, eps, head_size):
    """time_mix from what its `scan` returns, y (B,T,C) -> (B,T,C) in r's dtype.

        out = (GroupNorm(y) + (sum over the head of r k r_k) v) g
    """
    x = Projected(r, None, None, k, v, None, None, g)
    p = Parameters(None, None, None, None, None, r_k, weight, bias)
    _check("wkv7_output", y, head_size, x, p)
    kind, kernel = _choose(y)
    args = *_to(kind, y, r, k, v, g, half=kernel), *_to(kind, r_k, weight, bias)
    if kernel:
        out, = WKV7_OUTPUT(*args, numbers=(head_size,), eps=eps)
    else:
        out = wkv7_output_torch(*args, eps, head_size)
    return out.to(r.dtype)

def read_state(s, q, y=None):
    """What a state that stays as it is gives every token: y_t + s q_t -> (B,T,H,N), in y's dtype, or where it
    is None in q's.

    s: (B,H,N,N), value by key channels; q, y: (B,T,H,N), floating point. DW-JRT's leak reads its seed so."""
    B, _, H, N = q.shape
    if s.shape != (B, H, N, N) or y is not None and y.shape != q.shape:
        given = None if y is None else tuple(y.shape)
        raise ValueError(f"read_state: s {tuple(s.shape)} and y {given} do not fit q, "
                         f"(B,T,H,N) = {tuple(q.shape)}")
    dtype = (q if y is None else y).dtype
    kind, kernel = _choose(q)
    kernel = kernel and N in HEAD_SIZES
    s, (q, y) = s.to(kind), _to(kind, q, y, half=kernel)
    out = READ_STATE(q, s, y)[0] if kernel else read_state_torch(s, q, y)    # whose product autocast may have
    return out.to(dtype)

def squared_relu(x):
    """relu(x)^2 -> like x, of any shape and floating dtype."""
    kind, kernel = _choose(x)
    z, = _to(kind, x, half=kernel)
    out = SQUARED_RELU(z)[0] if kernel else squared_relu_torch(z)
    return out.to(x.dtype)

def _to(kind, *args, half=False):
    """half: bfloat16 may stay, as the kernel reads it."""
    return [x if x is None or half and x.dtype == torch.bfloat16 else x.to(kind) for x in args]

def _choose(x):
    """-> the dtype of the arithmetic, and whether the C++ kernels do it."""
    kind = kind_of(x)
    return kind, backend(x.device.type, kind) == "cpp"

def _check(op, rows, head_size, x, p, valid=None, **states):
    """ValueError for what the kernels must not get."""
    (B, T, C), N = rows.shape, head_size
    if head_size not in HEAD_SIZES or C % head_size:
        raise ValueError(f"{op}: head size {head_size} is not supported for C = {C}: "
                         f"choose one of {', '.join(map(str, HEAD_SIZES))} that divides C")
    expect(op, "(B,T,C)", (B, T, C), **x._asdict())
    expect(op, "(B,H,N,N)", (B, C // N, N, N), **states)
    for name, z in p._asdict().items():
        if z is not None and z.numel() != C:
            raise ValueError(f"{op}: {name} has {z.numel()} elements, expected C = {C}")
    if len({z is None for z in (x.gate, x.v_first, p.v0)}) > 1:
        raise ValueError(f"{op}: gate, v_first and v0 go together: give all three or None three times")
    if valid is not None and (valid.shape != (B, T) or valid.dtype != torch.bool):
        raise ValueError(f"{op}: valid is {valid.dtype} {tuple(valid.shape)}, expected bool (B,T) = {(B, T)}")

# ---- the kernels ----

class ShiftMix(Kernel):
    """x, last, mix; numbers: n rows of mix, reach, whether the n outputs are bfloat16."""
    arity = 3

    def size(self, inputs, numbers):
        return *inputs[0].shape, *numbers[:2]

    def outputs(self, inputs, numbers):
        n, _, half = numbers
        return like(*[inputs[0]] * n, dtype=torch.bfloat16 if half else None)

class Wkv7Inputs(Kernel):
    """w, a, k, v, gate, v_first, w0, a0, v0, k_k, k_a, valid; numbers: N -> w, k, a, b, v (empty without a
    gate). The log-decay holds its own derivative, so that it is kept in place of w, whose gradient has a's
    dtype."""
    arity = 12

    def outputs(self, inputs, numbers):
        w, gate = inputs[0], inputs[4]
        return like(w, w, w, w, gate, dtype=torch.float32)

    def keep(self, inputs, out):
        return out[0], *inputs[1:], out[0], None, None, None, None

    def grads(self, inputs, numbers):
        a0 = inputs[7]
        return [*like(inputs[1], *inputs[1:6]), a0.new_empty(5, a0.numel())]    # 5: w0, a0, k_k, k_a, v0

    def differentiate(self, saved, dout, numbers, eps=0.0):
        *grads, sums = super().differentiate(saved, dout, numbers)
        dw0, da0, dk_k, dk_a, dv0 = sums.unbind()
        return *grads, *_shaped((dw0, da0, dv0, dk_k, dk_a), saved[6:11]), None

class Wkv7Output(Kernel):
    """y, r, k, v, g, r_k, weight, bias; numbers: N; eps."""
    arity = 8

    def outputs(self, inputs, numbers):
        return like(inputs[1])

    def grads(self, inputs, numbers):
        r_k = inputs[5]
        return [*like(*inputs[:5]), r_k.new_empty(3, r_k.numel())]              # 3: r_k, weight, bias

    def differentiate(self, saved, dout, numbers, eps=0.0):
        *grads, sums = super().differentiate(saved, dout, numbers, eps)
        return *grads, *_shaped(sums.unbind(), saved[5:8])

def _shaped(grads, parameters):
    return [None if p is None else d.view(p.shape) for d, p in zip(grads, parameters)]

class ReadState(Kernel):
    """q, s, y."""
    arity = 3

    def size(self, inputs, numbers):
        return inputs[0].shape

    def outputs(self, inputs, numbers):
        q, _, y = inputs
        return like(q if y is None else y)

    def keep(self, inputs, out):
        return *inputs[:2], None, None                              # y, the output

    def grads(self, inputs, numbers):
        return like(*inputs[:2])

    def differentiate(self, saved, dout, numbers, eps=0.0):
        return *super().differentiate(saved, dout, numbers), dout[0]

class SquaredReLU(Kernel):
    def size(self, inputs, numbers):
        return inputs[0].numel(),

class Wkv7Mix(Kernel):
    """Projected, Parameters, valid, s0; numbers: N, every or 0; eps. With gradients, and then a leak as the
    last input, it is the kernels of its steps one after the other."""
    materialize = False

    def size(self, inputs, numbers):
        B, T, C = inputs[0].shape
        return B, T, C // numbers[0], *numbers

    def outputs(self, inputs, numbers):
        r, (N, every) = inputs[0], numbers
        B, T, C = r.shape
        states = [T // every + 1] if every else []
        return [*like(r), r.new_empty(B, *states, C // N, N, N, dtype=torch.float32)]

    def compute(self, inputs, numbers, eps=0.0):
        x, p = Projected(*inputs[:8]), Parameters(*inputs[8:16])
        valid, s0, leak = inputs[16:]
        N, every = numbers
        heads = lambda z: z.unflatten(-1, (-1, N))
        inputs = (x.w, x.a, x.k, *_value_residual(x), *p[:5], valid)
        (w, k, a, b, v), of_inputs = WKV7_INPUTS.compute(inputs, (N,))
        r, v = x.r.float(), v if x.gate is not None else x.v.float()
        start, c = s0, None
        if leak is not None:
            start = s0 - leak
            c, = READ_STATE.forward((heads(a), leak, None), (), 0.0)
        scanned = (*map(heads, (r, w, k, v, a, b)), start, c)
        (y, s), of_scan = WKV7.compute(scanned, (every, 1, int(c is not None)))
        if leak is not None:
            y, = READ_STATE.forward((heads(r), leak, y), (), 0.0)
            s = s + leak
        out, of_output = WKV7_OUTPUT.compute((y.flatten(2), x.r, k, v, x.g, *p[5:]), (N,), eps)
        return (*out, s), (*of_inputs, *of_scan, *of_output, leak)

    def differentiate(self, saved, dout, numbers, eps=0.0):
        (N, every), (dout, ds) = numbers, dout
        of_inputs, of_scan, of_output, leak = saved[:17], saved[17:29], saved[29:38], saved[38]
        r, dleak = of_output[1], None
        dout = torch.zeros_like(r) if dout is None else dout
        dy, dr, dk_out, dv_out, dg, *dp_out = WKV7_OUTPUT.differentiate(of_output, [dout], (N,), eps)
        dy = dy.unflatten(-1, (-1, N))
        numbers = (every, 1, int(leak is not None))
        dq, dw, dk, dv, da, db, ds0, dc = WKV7.differentiate(of_scan, (dy, ds), numbers)
        if leak is not None:
            q, a = of_scan[0], of_scan[4]
            more, dleak = READ_STATE.backward((q, leak, None), [None], [dy], (), 0.0)
            dq += more
            more, other = READ_STATE.backward((a, leak, None), [None], [dc], (), 0.0)
            da += more
            dleak += other - ds0
            dleak = dleak if ds is None else dleak + ds
        dw, dk, dv, da, db = (z.flatten(2) for z in (dw, dk, dv, da, db))
        dr = (dq.flatten(2) + dr).to(dr.dtype)      # in place it would take three times as long in bfloat16
        dk += dk_out
        dv += dv_out
        made = WKV7_INPUTS.differentiate(of_inputs, (dw, dk, da, db, dv), (N,))
        dw, da, dk, dv_in, dgate, dv_first, *dp, _ = made
        dv = dv if of_inputs[4] is None else dv_in
        return dr, dw, da, dk, dv, dgate, dv_first, dg, *dp, *dp_out, None, ds0, dleak

SHIFT_MIX = ShiftMix("shift_mix")
WKV7_INPUTS = Wkv7Inputs("wkv7_inputs")
WKV7_OUTPUT = Wkv7Output("wkv7_output")
WKV7_MIX = Wkv7Mix("wkv7_mix")
READ_STATE = ReadState("read_state")
SQUARED_RELU = SquaredReLU("squared_relu")
