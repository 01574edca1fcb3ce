"""The bidirectional WKV: every form against the pairwise definition in float64, output and every gradient by name."""
import math

import pytest
import torch

import wkv_cuda
from wkv_cuda import biwkv, biwkv_loop, biwkv_torch

INF = torch.inf


def inputs(B, T, C, per_sample=False, keys=2.0, decay=1.0):
    """Float64, of values that float32 holds exactly: a key of 50 rounded to float32 is off by 2e-6 before any kernel sees it."""
    g = torch.Generator().manual_seed(T * C + 1)
    uniform = lambda *shape: torch.rand(*shape, generator=g).double()
    normal = lambda *shape: torch.randn(*shape, generator=g).double()
    own = (B, C) if per_sample else (C,)
    return {"w": (decay * uniform(*own)).float().double(), "u": normal(*own), "k": (keys * (2 * uniform(B, T, C) - 1)).float().double(),
            "v": normal(B, T, C)}


def output_and_gradients(f, x, dtype, real=None):
    """`real` (B,T,1): where the output counts."""
    leaves = {k: z.detach().to(dtype, copy=True).requires_grad_() for k, z in x.items()}
    y = f(**leaves)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    y.backward(dy if real is None else dy * real)
    return {"y": y.detach(), **{"d" + k: z.grad for k, z in leaves.items()}}


def close(found, wanted, tolerance=1e-5):
    assert found.keys() == wanted.keys()
    for name, want in wanted.items():
        assert found[name].shape == want.shape, name
        error = (found[name].double() - want).norm() / want.norm().clamp_min(0.1)      # some gradients are 0 in theory
        assert error <= tolerance, f"{name}: relative error {error:.2e}"


def test_loop_by_hand():
    """Three tokens of one channel, w = log 2, u = log 3, weights e^k = 1, 2, 4."""
    t = lambda *values: torch.tensor(values, dtype=torch.float64).view(1, -1, 1)
    w, u = (torch.tensor([math.log(a)], dtype=torch.float64) for a in (2.0, 3.0))
    y = biwkv_loop(w, u, t(1, 2, 4).log(), t(1, 10, 100))
    # token 0: itself 3*1, its neighbour 2, the far one 4/2; token 1: 1, 3*2, 4; token 2: 1/2, 2, 3*4
    wanted = t((3 * 1 + 2 * 10 + 2 * 100) / 7, (1 * 1 + 6 * 10 + 4 * 100) / 11, (0.5 * 1 + 2 * 10 + 12 * 100) / 14.5)
    assert torch.allclose(y, wanted)


@pytest.mark.parametrize("impl", ["cpp", "torch"])
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("C", [16, 24, 48])
@pytest.mark.parametrize("T", [1, 2, 7, 33, 64])
def test_against_the_loop_in_float64(impl, per_sample, T, C, monkeypatch):
    monkeypatch.setenv("WKV_IMPL", impl)
    x = inputs(2, T, C, per_sample)
    wanted = output_and_gradients(biwkv_loop, x, torch.float64)
    close(output_and_gradients(biwkv, x, torch.float32), wanted)
    if impl == "torch":
        close(output_and_gradients(biwkv, x, torch.float64), wanted, 1e-12)


@pytest.mark.parametrize("keys", [2.0, 50.0, 300.0])
@pytest.mark.parametrize("decay", [0.0, 1e-3, 30.0])
def test_any_key_and_any_decay(keys, decay, monkeypatch):
    x = inputs(2, 40, 16, True, keys, decay)
    wanted = output_and_gradients(biwkv_loop, x, torch.float64)
    for impl in ("cpp", "torch"):
        monkeypatch.setenv("WKV_IMPL", impl)
        close(output_and_gradients(biwkv, x, torch.float32), wanted)


@pytest.mark.parametrize("keys,decay", [(2.0, 0.0), (50.0, 0.0), (50.0, 1e-3), (50.0, 0.05), (50.0, 30.0), (500.0, 1e-3)])
def test_long_sequences_of_large_keys(keys, decay, monkeypatch):
    """4096 tokens: rounding errors of a decay must not add up (a plain running maximum is off by 1e-4 at decay 1e-3)."""
    x = inputs(1, 4096, 16, False, keys, decay)
    wanted = output_and_gradients(biwkv_torch, x, torch.float64)
    for impl in ("cpp", "torch"):
        monkeypatch.setenv("WKV_IMPL", impl)
        close(output_and_gradients(biwkv, x, torch.float32), wanted)


@pytest.mark.parametrize("impl", ["cpp", "torch", "loop"])
def test_padding_has_no_part(impl, monkeypatch):
    """Ragged rows, padded on the right with k = -inf: each equals the row alone; one row is all padding."""
    monkeypatch.setenv("WKV_IMPL", impl)
    lengths, T = (21, 1, 0, 13, 2), 21
    x = inputs(len(lengths), T, 16, True)
    real = (torch.arange(T) < torch.tensor(lengths).unsqueeze(1)).unsqueeze(-1)
    x["k"] = x["k"].masked_fill(~real, -INF)
    found = output_and_gradients(biwkv, x, torch.float32, real)
    assert all(z.isfinite().all() for z in found.values())
    for b, n in enumerate(lengths):
        alone = {k: z[b:b + 1] if z.ndim == 2 else z[b:b + 1, :n] for k, z in x.items()}
        dy = torch.randn(x["v"].shape, generator=torch.Generator().manual_seed(3))[b:b + 1, :n]
        leaves = {k: z.detach().to(torch.float32).requires_grad_() for k, z in alone.items()}
        y = biwkv(**leaves)
        y.backward(dy)
        row = {"y": found["y"][b:b + 1, :n]} | {"d" + k: found["d" + k][b:b + 1] if k in "wu" else found["d" + k][b:b + 1, :n] for k in x}
        close(row, {"y": y.detach().double()} | {"d" + k: z.grad.double() for k, z in leaves.items()}, 1e-6)
        for name in ("dk", "dv"):
            assert not found[name][b, n:].any()
    assert not found["y"][2].any() and not any(found["d" + k][2].any() for k in x)
    assert torch.allclose(found["y"][1], x["v"][1, :1].float())      # the only key there is, also seen from the padding


@pytest.mark.parametrize("impl", ["cpp", "torch", "loop"])
def test_padding_anywhere_with_gradients_from_everywhere(impl, monkeypatch):
    """Holes and padding on the left too, and outputs at those places used: against the pairs of real tokens in float64."""
    monkeypatch.setenv("WKV_IMPL", impl)
    x = inputs(3, 19, 16)
    x["k"][0, :6], x["k"][1, 4:15], x["k"][2] = -INF, -INF, -INF
    found = output_and_gradients(biwkv, x, torch.float32)
    close(found, output_and_gradients(biwkv_loop, x, torch.float64))
    assert not found["dk"][x["k"] == -INF].any() and not found["dv"][x["k"] == -INF].any()


@pytest.mark.parametrize("impl", ["cpp", "torch", "loop"])
def test_both_directions_count_alike(impl, monkeypatch):
    monkeypatch.setenv("WKV_IMPL", impl)
    x = {k: z.float() for k, z in inputs(2, 30, 16).items()}
    flipped = biwkv(x["w"], x["u"], x["k"].flip(1), x["v"].flip(1)).flip(1)
    assert torch.allclose(flipped, biwkv(**x), atol=1e-6)


@pytest.mark.parametrize("impl", ["cpp", "torch"])
def test_a_nan_does_not_go_unseen(impl, monkeypatch):
    monkeypatch.setenv("WKV_IMPL", impl)
    for name in "wukv":
        x = {k: z.float() for k, z in inputs(1, 9, 16).items()}
        x[name][..., 3] = torch.nan
        bad = biwkv(**x).isnan()
        assert bad[..., 3].all() and bad.sum() == 9, name


def test_empty_sequence(monkeypatch):
    for impl in ("cpp", "torch", "loop"):
        monkeypatch.setenv("WKV_IMPL", impl)
        assert biwkv(torch.ones(16), torch.ones(16), torch.ones(2, 0, 16), torch.ones(2, 0, 16)).shape == (2, 0, 16)


def test_bfloat16_in_and_out(monkeypatch):
    monkeypatch.setenv("WKV_IMPL", "cpp")
    x = {k: z.bfloat16() for k, z in inputs(2, 30, 16).items()}
    with torch.autocast("cpu", torch.bfloat16):
        y = biwkv(**x)
    want = biwkv_loop(**{k: z.double() for k, z in x.items()})
    assert y.dtype == torch.bfloat16 and (y.double() - want).norm() / want.norm() < 5e-3


def test_strided_inputs_and_gradients(monkeypatch):
    """Inputs may be views of (B,C,T); gradients may arrive expanded (from .sum())."""
    monkeypatch.setenv("WKV_IMPL", "cpp")
    x = {k: z.float() for k, z in inputs(2, 20, 16).items()}
    views = {k: (z.mT.contiguous().mT if z.ndim == 3 else z).requires_grad_() for k, z in x.items()}
    biwkv(**views).sum().backward()
    plain = {k: z.detach().clone().requires_grad_() for k, z in x.items()}
    biwkv_loop(**plain).sum().backward()
    for k in x:
        assert torch.allclose(views[k].grad, plain[k].grad, atol=1e-5), k


def test_operator_registration(monkeypatch):
    monkeypatch.setenv("WKV_IMPL", "cpp")
    wkv_cuda.backend("cpu")
    x = [z.float().requires_grad_() for z in inputs(2, 18, 16, True).values()]
    torch.library.opcheck(torch.ops.nanodir.biwkv, (x, (), 0.0), test_utils=("test_schema", "test_faketensor", "test_autograd_registration"))


@pytest.mark.parametrize("impl", ["cpp", "torch"])
def test_compile_sees_through(impl, monkeypatch):
    monkeypatch.setenv("WKV_IMPL", impl)
    torch._dynamo.reset()                  # the choice of a back end is made once in a compiled graph
    x = inputs(2, 9, 16)
    compiled = torch.compile(lambda **kw: biwkv(**kw), fullgraph=True, backend="aot_eager")
    close(output_and_gradients(compiled, x, torch.float32), output_and_gradients(biwkv_loop, x, torch.float64))


@pytest.mark.parametrize("change,words", [
    (dict(w=torch.zeros(8)), ["w has shape (8,)", "(16,)", "(2, 16)"]), (dict(u=torch.zeros(3, 16)), ["u has shape (3, 16)", "(2, 16)"]),
    (dict(v=torch.zeros(2, 5, 16)), ["v has (2, 5, 16)", "(2, 4, 16)"]), (dict(k=torch.zeros(4, 16)), ["k has shape (4, 16)", "(B,T,C)"])])
def test_errors_name_value_and_allowed(change, words):
    with pytest.raises(ValueError) as e:
        biwkv(**({k: z.float() for k, z in inputs(2, 4, 16).items()} | change))
    assert all(word in str(e.value) for word in words) and "\n" not in str(e.value)
