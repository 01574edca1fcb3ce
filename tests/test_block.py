"""The fused parts of a block: the kernels in float32 against their plain-torch definitions in float64, outputs and every gradient."""
import ctypes
import functools
import gc
import itertools
import re

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import model
import wkv_cuda
from wkv_cuda import read_state, shift_mix, squared_relu, wkv7_inputs, wkv7_mix, wkv7_output

ROWS = ("w", "a", "k", "v", "gate", "v_first")
PARAMETERS = ("w0", "a0", "v0", "k_k", "k_a")


def leaves(B, T, C, rows, parameters):
    g = torch.Generator().manual_seed(T * C + 1)
    normal = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    return {**{n: normal(B, T, C) for n in rows}, **{n: normal(1, 1, C) for n in parameters}}


def case(op, B=2, T=5, N=32, C=128, some=True):
    """-> (function of named tensors, those tensors in float64); `some`: with the optional inputs."""
    if op.startswith("shift_mix"):
        n, reach = int(op.split()[1]), {"both": 1, "wide": 2}.get(op.split()[-1], 0)
        x = leaves(B, T, C, ["x"], []) | {"mix": torch.rand(n, C, dtype=torch.float64)}
        x |= {"last": torch.randn(B, C, dtype=torch.float64)} if some else {}
        return lambda x, mix, last=None: shift_mix(x, last, mix, reach), x
    if op == "wkv7_inputs":
        x = leaves(B, T, C, ROWS if some else ROWS[:4], PARAMETERS)
        if not some:
            del x["v0"]
        valid = torch.arange(T) < torch.tensor([T] + [max(1, T - 2)] * (B - 1)).unsqueeze(1) if some else None
        return lambda **x: wkv7_inputs(*(x.get(n) for n in ROWS + PARAMETERS), valid, N), x
    if op == "wkv7_output":
        x = leaves(B, T, C, ("y", "r", "k", "v", "g"), ("r_k", "weight", "bias"))
        return lambda **x: wkv7_output(**x, eps=64e-5, head_size=N), x
    if op == "read_state":
        x = {n: z.unflatten(-1, (-1, N)) for n, z in leaves(B, T, C, ["q", "y"] if some else ["q"], []).items()}
        return read_state, x | {"s": torch.randn(B, C // N, N, N, dtype=torch.float64, generator=torch.Generator().manual_seed(4))}
    return squared_relu, leaves(B, T, C + 3, ["x"], [])              # any length: here no multiple of a vector's


def outputs_and_gradients(f, x, dtype):
    x = {n: z.to(dtype, copy=True).requires_grad_() for n, z in x.items()}
    out = f(**x)
    out = list(out) if isinstance(out, (list, tuple)) else [out]
    g = torch.Generator().manual_seed(3)
    sum((z * torch.randn(z.shape, generator=g, dtype=torch.float64).to(dtype)).sum() for z in out).backward()
    return {f"output {i}": z.detach() for i, z in enumerate(out)}, {"d" + n: z.grad for n, z in x.items()}


def close(found, wanted, tolerance):
    for name, want in wanted.items():
        assert found[name].shape == want.shape and found[name].is_contiguous(), name
        error = (found[name].double() - want).norm() / want.norm().clamp_min(1e-9)
        assert error <= tolerance, f"{name}: relative error {error:.2e}"


def check(f, x):
    """The kernel in float32 against the definition, which is what float64 gets."""
    found, wanted = outputs_and_gradients(f, x, torch.float32), outputs_and_gradients(f, x, torch.float64)
    close(found[0], wanted[0], 1e-6)
    close(found[1], wanted[1], 1e-5)


OPS = ("shift_mix 1", "shift_mix 6", "shift_mix 6 both", "shift_mix 2 wide", "wkv7_inputs", "wkv7_output", "read_state", "squared_relu")
HEADS = [(16, 48), (32, 128), (64, 64), (128, 256)]


@pytest.fixture(params=["cpp", "torch"])
def impl(request, monkeypatch):
    monkeypatch.setenv("WKV_IMPL", request.param)


@pytest.mark.parametrize("some", [True, False])
@pytest.mark.parametrize("B,T", [(2, 1), (3, 7), (1, 45), (40, 33)])
@pytest.mark.parametrize("op", OPS)
def test_against_the_definition_in_float64(op, B, T, some, impl):
    check(*case(op, B, T, some=some))


@pytest.mark.parametrize("N,C", HEADS)
@pytest.mark.parametrize("op", ["wkv7_inputs", "wkv7_output", "read_state"])
def test_head_sizes(op, N, C, impl):
    check(*case(op, 2, 9, N, C))


@pytest.mark.parametrize("op", OPS)
def test_gradients_of_the_definitions(op):
    f, x = case(op, 2, 3, 16, 16)
    names = list(x)
    assert torch.autograd.gradcheck(lambda *z: f(**dict(zip(names, z))), [x[n].requires_grad_() for n in names])


MIXED = ("r", "w", "a", "k", "v", "gate", "v_first", "g")


def mix_case(B, T, N, C, some):
    """wkv7_mix's arguments in float64: everything it takes, or nothing optional."""
    x = leaves(B, T, C, MIXED, PARAMETERS + ("r_k", "weight", "bias"))
    rest = dict(eps=64e-5, valid=None, head_size=N, s0=None)
    if some:
        rest |= dict(valid=torch.arange(T) < torch.tensor([T, max(1, T - 2)] * (B // 2)).unsqueeze(1),
                     s0=torch.randn(B, C // N, N, N, dtype=torch.float64, generator=torch.Generator().manual_seed(2)))
    else:
        x |= dict(gate=None, v_first=None, v0=None)
    return x | rest


def in_dtype(x, dtype):
    return {n: z.to(dtype) if torch.is_tensor(z) and z.is_floating_point() else z for n, z in x.items()}


@pytest.mark.parametrize("N", wkv_cuda.HEAD_SIZES)
@pytest.mark.parametrize("T, every", [(1, None), (5, 2), (16, 16), (33, None), (37, 1), (40, 8)])
@pytest.mark.parametrize("some", [True, False])
def test_the_fused_mix_is_the_three_steps(N, T, every, some, monkeypatch):
    """Outputs and every state of the one kernel against the definitions in float64."""
    calls = []
    kernel = wkv_cuda.block.WKV7_MIX
    monkeypatch.setattr(kernel, "forward", lambda *a, f=kernel.forward: calls.append(1) or f(*a))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)         # fused where there is a head for every thread
    x = mix_case(2, T, N, 2 * N, some)
    with torch.no_grad():
        found, wanted = (wkv7_mix(**in_dtype(x, dtype), every=every) for dtype in (torch.float32, torch.float64))
        half = {n: z.bfloat16() if n in MIXED and z is not None else z for n, z in in_dtype(x, torch.float32).items()}
        found_half = wkv7_mix(**half, every=every)
        wanted_half = wkv7_mix(**in_dtype(half, torch.float64), every=every)
    assert len(calls) == 2                   # float64 goes through the three steps
    for name, a, b, c, d in zip(("out", "state"), found, wanted, found_half, wanted_half):
        assert a.shape == b.shape == c.shape
        assert (a - b).norm() <= 1e-5 * b.norm(), name
        assert (c.double() - d).norm() <= 5e-3 * d.norm(), name
    assert found_half[0].dtype == torch.bfloat16 and found_half[1].dtype == torch.float32


def with_gradients(x, used, **options):
    """wkv7_mix's outputs and the gradients of all tensors given, where only the outputs in `used` are used."""
    leaf = {n: z.detach().clone().requires_grad_() if torch.is_tensor(z) and z.is_floating_point() else z for n, z in x.items()}
    out = wkv7_mix(**leaf, **options)
    g = torch.Generator().manual_seed(3)
    given = [torch.randn(z.shape, generator=g).bfloat16().to(z.dtype) for z in out]
    torch.autograd.backward([out[i] for i in used], [given[i] for i in used])
    return ({i: out[i].detach() for i in used},
            {"d" + n: z.grad for n, z in leaf.items() if torch.is_tensor(z) and z.requires_grad and z.grad is not None})


@pytest.mark.parametrize("used", [(0, 1), (0,), (1,)])
@pytest.mark.parametrize("kind, every", [("least", None), ("all", None), ("all", 4), ("leak", None)])
@pytest.mark.parametrize("N, T", [(16, 1), (32, 37), (64, 16), (128, 5)])
def test_gradients_of_the_mix(N, T, kind, every, used):
    """Every output and gradient of the kernels one after the other, in float32 and with bfloat16 rows, against float64."""
    x = mix_case(2, T, N, 2 * N, kind != "least")
    if kind == "leak":
        x["leak"] = 0.5 * torch.randn(x["s0"].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    f = functools.partial(with_gradients, used=used, every=every)
    found, wanted = f(in_dtype(x, torch.float32)), f(in_dtype(x, torch.float64))
    half = {n: z.bfloat16() if n in MIXED and z is not None else z for n, z in in_dtype(x, torch.float32).items()}
    found_half, wanted_half = f(half), f(in_dtype(half, torch.float64))
    assert wanted[1].keys() >= {"d" + n for n, z in x.items() if torch.is_tensor(z) and z.is_floating_point()} or 0 not in used
    for i, tolerance, tolerance_half in ((0, 1e-5, 5e-3), (1, 1e-4, 2e-2)):
        for name, want in wanted[i].items():
            assert (found[i][name] - want).norm() <= tolerance * want.norm() + 1e-9, name
            want, got = wanted_half[i][name], found_half[i][name]
            assert (got.double() - want).norm() <= tolerance_half * want.norm() + 1e-9, name
            if i:
                assert got.dtype == half[name[1:]].dtype and got.shape == half[name[1:]].shape, name
        assert all(not z.any() for name, z in found[i].items() if name not in wanted[i])


def test_a_mix_of_wrong_shapes_never_reaches_a_kernel():
    x = in_dtype(mix_case(2, 9, 32, 64, True), torch.float32)
    for change, words in ((dict(s0=torch.zeros(2, 2, 32, 16)), "s0 has shape (2, 2, 32, 16), expected (B,H,N,N) = (2, 2, 32, 32)"),
                          (dict(leak=torch.zeros(1, 2, 32, 32)), "leak has shape (1, 2, 32, 32)"), (dict(every=0), "every=0"),
                          (dict(s0=None, leak=torch.zeros(2, 2, 32, 32)), "leak"), (dict(valid=torch.ones(2, 8).bool()), "valid"),
                          (dict(v0=None), "v0")):
        for grad in (True, False):
            x["r"].requires_grad_(grad)
            with pytest.raises(ValueError, match=re.escape(words)):
                wkv7_mix(**x | change)


def test_extreme_inputs(monkeypatch):
    """Saturated sigmoids, keys of length zero, and NaN, which must not be lost."""
    monkeypatch.setenv("WKV_IMPL", "cpp")
    f, x = case("wkv7_inputs")
    for name, far in (("w", 30.0), ("a", -30.0), ("gate", 200.0)):
        x[name][:, ::2] *= far
    check(f, x)
    x["k"][0, 1, :32] = 0
    w, k, v, a, b = f(**{n: z.float() for n, z in x.items()})
    assert not a[0, 1, :32].any() and not b[0, 1, :32].any() and all(z.isfinite().all() for z in (w, k, v, a, b))
    for name, out in (("w", 0), ("a", 1), ("gate", 2), ("k", 3)):
        bad = {n: z.float() for n, z in x.items()}
        bad[name][0, 0, 0] = float("nan")
        assert f(**bad)[out][0, 0, 0].isnan(), name
    assert squared_relu(torch.tensor([float("nan"), -1.0, 2.0])).isnan().tolist() == [True, False, False]


def test_any_width(monkeypatch):
    monkeypatch.setenv("WKV_IMPL", "cpp")
    x = torch.randn(2, 5, 20)
    assert torch.equal(shift_mix(x, None, torch.zeros(3, 20))[2], x)


@pytest.mark.parametrize("op", OPS)
def test_threads_change_nothing(op):
    f, x = case(op, 8, 33)
    before = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(outputs_and_gradients(f, x, torch.float32))
    finally:
        torch.set_num_threads(before)
    for one, other in itertools.combinations(results, 2):
        assert all(torch.equal(a[n], b[n]) for a, b in zip(one, other) for n in a)


@pytest.mark.parametrize("op", OPS)
def test_bfloat16_views_and_unused_outputs(op, impl):
    f, x = case(op)
    x = {n: z.bfloat16() for n, z in x.items()}
    views = {n: z.transpose(0, -1).contiguous().transpose(0, -1).requires_grad_() for n, z in x.items()}
    with torch.autocast("cpu", torch.bfloat16):
        out = f(**views)
    out = list(out) if isinstance(out, (list, tuple)) else [out]
    assert {z.dtype for z in out} == {torch.float32 if op == "wkv7_inputs" else torch.bfloat16}
    out[0].sum().backward()                                          # an expanded gradient for one output, none for the others
    exact = {n: z.double().requires_grad_() for n, z in x.items()}
    want = f(**exact)
    want = want[0] if isinstance(want, (list, tuple)) else want
    want.sum().backward()
    assert (out[0].double() - want).norm() / want.norm() < 5e-3
    for n, z in exact.items():
        if z.grad is not None and z.grad.norm() > 0:
            assert (views[n].grad.double() - z.grad).norm() / z.grad.norm() < 1e-2, n


HALVES = {"shift_mix": (), "wkv7_inputs": ROWS, "wkv7_output": ("r", "g"), "read_state": ("q", "y"), "squared_relu": ("x",)}   # bfloat16 under autocast


def autocast_case(op, *args, **kwargs):
    """As `case`, the named tensors being bfloat16 as the linears give them, the others float32."""
    f, x = case(op, *args, **kwargs)
    return f, {n: z.bfloat16() if n in HALVES[op.split()[0]] else z.float() for n, z in x.items()}


def under_autocast(f, x):
    """-> outputs and gradients, each in the dtype it comes in, for output gradients that both dtypes hold exactly."""
    leaf = {n: z.detach().clone().requires_grad_() for n, z in x.items()}
    with torch.autocast("cpu", torch.bfloat16):
        out = f(**leaf)
    out = list(out) if isinstance(out, (list, tuple)) else [out]
    g = torch.Generator().manual_seed(3)
    torch.autograd.backward(out, [torch.randn(z.shape, generator=g).bfloat16().to(z.dtype) for z in out])
    return {f"output {i}": z.detach() for i, z in enumerate(out)}, {"d" + n: z.grad for n, z in leaf.items()}


@pytest.mark.parametrize("some", [True, False])
@pytest.mark.parametrize("B,T,N,C", [(2, 1, 16, 48), (3, 7, 32, 128), (3, 45, 64, 64), (2, 9, 128, 768)])
@pytest.mark.parametrize("op", OPS)
def test_autocast_reads_and_writes_bfloat16(op, B, T, N, C, some, impl):
    f, x = autocast_case(op, B, T, N, C, some)
    (out, grads), want = under_autocast(f, x), under_autocast(f, {n: z.double() for n, z in x.items()})
    close(out, want[0], 4e-3)
    close(grads, want[1], 2e-2)
    dtypes = [torch.float32] * 5 if op == "wkv7_inputs" else [torch.bfloat16] * len(out)
    if op == "wkv7_inputs" and not some:
        dtypes[2] = torch.bfloat16                                   # v comes back as it was given
    assert [z.dtype for z in out.values()] == dtypes
    assert {n: g.dtype for n, g in grads.items()} == {"d" + n: z.dtype for n, z in x.items()}


@pytest.mark.parametrize("op", OPS)
def test_bfloat16_gradients_accumulate(op, impl):
    f, x = autocast_case(op)
    once = under_autocast(f, x)[1]
    leaf = {n: z.requires_grad_() for n, z in x.items()}
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            out = f(**leaf)
        out = list(out) if isinstance(out, (list, tuple)) else [out]
        g = torch.Generator().manual_seed(3)
        torch.autograd.backward(out, [torch.randn(z.shape, generator=g).bfloat16().to(z.dtype) for z in out])
    assert all(torch.equal(z.grad, 2 * once["d" + n]) for n, z in leaf.items())


def test_any_mixture_of_dtypes(impl):
    for op in ("wkv7_inputs", "wkv7_output"):
        f, x = case(op)
        x = {n: z.to((torch.bfloat16, torch.float32, torch.float16)[i % 3]) for i, (n, z) in enumerate(x.items())}
        found, want = under_autocast(f, x), under_autocast(f, {n: z.double() for n, z in x.items()})
        close(found[0], want[0], 4e-3)
        close(found[1], want[1], 2e-2)
        assert all(found[1]["d" + n].dtype == z.dtype for n, z in x.items())


def test_rounding_to_bfloat16(monkeypatch):
    """To nearest, ties to even, as torch rounds; NaN stays NaN whatever its bits, infinity infinity."""
    monkeypatch.setenv("WKV_IMPL", "cpp")
    edge = torch.tensor([0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, 0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7FFFFFFF, 0x00018000, 0])
    x = torch.cat([edge, edge - 2**31, torch.randint(-2**31, 2**31, (2**16 - 20,))]).int().view(torch.float32).view(1, -1, 64)
    with torch.autocast("cpu", torch.bfloat16):
        y, = shift_mix(x, None, torch.zeros(64))
    known = x + 0 * (torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1) - x)              # what the mix makes of infinities
    assert y.dtype == torch.bfloat16 and torch.equal(y.isnan(), known.isnan())
    assert torch.equal(y[~y.isnan()], known.bfloat16()[~y.isnan()])


def test_denoiser_under_autocast(impl):
    torch.manual_seed(0)
    m = model.Denoiser(model.ModelConfig(n_layer=2, n_embd=64, head_size=16, vocab_size=11))
    for p in m.parameters():                                         # leave the zeros of initialisation
        p.data += 0.05 * torch.randn_like(p)
    x, lengths = torch.randint(0, 12, (3, 37)), torch.tensor([37, 20, 1])
    exact = m(x, lengths=lengths).logits
    with torch.autocast("cpu", torch.bfloat16):
        logits = m(x, lengths=lengths).logits
    real = torch.arange(37) < lengths[:, None]
    assert (logits - exact)[real].norm() / exact[real].norm() < 3e-2
    logits.square().sum().backward()
    for name, p in m.named_parameters():
        assert p.grad is not None and p.grad.dtype == torch.float32 and p.grad.isfinite().all(), name


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("some", [True, False])
@pytest.mark.parametrize("op", OPS)
def test_operator_registration(op, some, half, monkeypatch):
    """opcheck on every operator that a compiled function calls, with what it is given there."""
    monkeypatch.setenv("WKV_IMPL", "cpp")
    wkv_cuda.backend("cpu")
    import torch._dynamo  # noqa: F401  (it looks is_compiling up when it is imported: that must be the real one)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    called = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, f, types, args=(), kwargs=None):
            if f.namespace == "nanodir":
                called.append((f, args))
            return f(*args, **(kwargs or {}))
    with Record():
        if half:
            under_autocast(*autocast_case(op, some=some))
        else:
            outputs_and_gradients(*case(op, some=some), torch.float32)
    monkeypatch.undo()
    assert [f._opname for f, _ in called] == [op.split()[0], op.split()[0] + "_backward"]
    for f, args in called:
        torch.library.opcheck(f, args, test_utils=("test_schema", "test_faketensor"))


def test_compile_sees_through(monkeypatch):
    monkeypatch.setenv("WKV_IMPL", "cpp")
    (f, x), (g, y) = case("wkv7_inputs"), case("wkv7_output")

    def all_four(mix, last, r_k, weight, bias, **x):
        r, h = shift_mix(x["k"], last, mix)
        w, k, v, a, b = f(**x)
        return squared_relu(g(y=w + a * b, r=r, k=k, v=v, g=h, r_k=r_k, weight=weight, bias=bias))
    x |= {n: y[n] for n in ("r_k", "weight", "bias")} | {"mix": torch.rand(2, 128), "last": torch.randn(2, 128)}
    compiled = outputs_and_gradients(torch.compile(all_four, fullgraph=True, backend="aot_eager"), x, torch.float32)
    for found, want in zip(compiled, outputs_and_gradients(all_four, x, torch.float32)):
        assert found.keys() == want.keys() and all(torch.allclose(found[n], want[n], rtol=1e-4, atol=1e-4) for n in want)
    x = {n: z.bfloat16() if n in ROWS else z.float() for n, z in x.items()}
    compiled = under_autocast(torch.compile(all_four, fullgraph=True, backend="aot_eager"), x)
    for found, want in zip(compiled, under_autocast(all_four, x)):
        assert {n: z.dtype for n, z in found.items()} == {n: z.dtype for n, z in want.items()}
        assert all((found[n] - z).norm() <= 1e-2 * z.norm() for n, z in want.items())


@pytest.mark.parametrize("grad", [True, False])
def test_a_whole_network_compiles(grad, monkeypatch):
    """In one graph, with DW-JRT's leak, padding and the C++ kernels in it."""
    monkeypatch.setenv("WKV_IMPL", "cpp")
    torch._dynamo.reset()
    torch.manual_seed(0)
    net = model.Denoiser(model.ModelConfig(n_layer=2, n_embd=64, head_size=16, vocab_size=11, dw_jrt=True))
    for p in net.parameters():
        p.data += 0.05 * torch.randn_like(p)
    x, lengths, found = torch.randint(12, (2, 21)), torch.tensor([21, 9]), []
    for f in (net, torch.compile(net, fullgraph=True, backend="aot_eager")):
        net.zero_grad()
        with torch.set_grad_enabled(grad):
            logits = f(x, lengths=lengths).logits
        if grad:
            logits.square().mean().backward()
        found.append({"logits": logits.detach()} | {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and len(found[0]) > 50 * grad
    assert all(torch.allclose(found[1][n], z, rtol=1e-3, atol=1e-5) for n, z in found[0].items())


class MallInfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks".split()]
    _fields_ += [(name, ctypes.c_size_t) for name in ("fordblks", "keepcost")]


def test_a_call_leaves_no_memory_behind(monkeypatch):
    """Small leaks keep the heap from being whole: 48 bytes per call once made a training run grow by 14 MB per step."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallinfo2"):
        pytest.skip("this C library does not tell what is in use")
    libc.mallinfo2.restype = MallInfo
    monkeypatch.setenv("WKV_IMPL", "cpp")
    x = torch.randn(2, 4, 16, requires_grad=True)

    def in_use(calls):
        for _ in range(calls):
            torch.autograd.grad(squared_relu(x).sum(), x)
        gc.collect()
        return libc.mallinfo2().uordblks
    before = in_use(200)
    assert (in_use(1000) - before) / 1000 < 8


@pytest.mark.parametrize("op,change,words", [
    ("shift_mix 1", dict(last=torch.zeros(1, 128)), ["last", "(1, 128)"]), ("shift_mix 1", dict(mix=torch.zeros(3, 5)), ["mix", "15"]),
    ("wkv7_inputs", dict(k=torch.zeros(1, 5, 128)), ["k has shape", "(1, 5, 128)"]), ("wkv7_inputs", dict(v0=None), ["v0"]),
    ("wkv7_output", dict(r_k=torch.zeros(64)), ["r_k", "64", "128"]),
    ("read_state", dict(s=torch.zeros(2, 4, 32, 16)), ["s (2, 4, 32, 16)", "(2, 5, 4, 32)"]),
    ("read_state", dict(y=torch.zeros(2, 5, 128)), ["y (2, 5, 128)", "(2, 5, 4, 32)"])])
def test_errors_name_value_and_allowed(op, change, words):
    f, x = case(op)
    with pytest.raises(ValueError) as e:
        f(**{n: z.float() for n, z in x.items()} | change)
    assert all(word in str(e.value) for word in words) and "\n" not in str(e.value)
