"""The recurrence: every form against the token loop in float64, all outputs and every gradient by name."""
import os
import subprocess
import sys

import pytest
import torch

import wkv_cuda
from conftest import ROOT
from wkv_cuda import wkv7, wkv7_loop

NAMES = ("r", "w", "k", "v", "a", "b", "s0", "c")


def inputs(B, T, H, N, strongest=0.6):
    g = torch.Generator().manual_seed(T * N + 1)
    normal = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    uniform = lambda: torch.rand(B, T, H, N, generator=g, dtype=torch.float64)
    kk = torch.nn.functional.normalize(normal(B, T, H, N), dim=-1)
    return dict(zip(NAMES, (normal(B, T, H, N), -strongest * uniform(), 0.3 * normal(B, T, H, N), normal(B, T, H, N), -kk,
                            kk * uniform(), 0.3 * normal(B, H, N, N), 0.3 * normal(B, T, H, N))))


def outputs_and_gradients(f, x, every, dtype):
    leaves = {k: z.detach().to(dtype, copy=True).requires_grad_() for k, z in x.items()}
    y, s = f(**leaves, every=every)
    g = torch.Generator().manual_seed(3)
    sum((z * torch.randn(z.shape, generator=g, dtype=torch.float64).to(dtype)).sum() for z in (y, s)).backward()
    return {"y": y.detach(), "s": s.detach(), **{"d" + k: z.grad for k, z in leaves.items()}}


def close(found, wanted, tolerance):
    assert found.keys() == wanted.keys()
    for name, want in wanted.items():
        assert found[name].shape == want.shape, name
        error = (found[name].double() - want).norm() / want.norm().clamp_min(1e-9)
        assert error <= tolerance, f"{name}: relative error {error:.2e}"


@pytest.mark.parametrize("impl", ["cpp", "torch"])
@pytest.mark.parametrize("every", [None, 1, 5, 16, 40])
@pytest.mark.parametrize("B,T,H,N", [(2, 37, 2, 16), (1, 64, 3, 32), (1, 33, 2, 64), (1, 18, 1, 128), (1, 1, 1, 16)])
def test_against_the_loop_in_float64(impl, every, B, T, H, N, monkeypatch):
    monkeypatch.setenv("WKV_IMPL", impl)
    x = inputs(B, T, H, N)
    close(outputs_and_gradients(wkv7, x, every, torch.float32), outputs_and_gradients(wkv7_loop, x, every, torch.float64), 1e-5)


@pytest.mark.parametrize("impl", ["cpp", "torch"])
@pytest.mark.parametrize("strongest", [0.0, 8.0, 60.0, 1000.0])
def test_any_decay(impl, strongest, monkeypatch):
    """No decay at all, and decays whose products underflow inside one chunk."""
    monkeypatch.setenv("WKV_IMPL", impl)
    x = inputs(1, 40, 2, 16, strongest)
    x["w"][:, 7] = 0.0
    close(outputs_and_gradients(wkv7, x, None, torch.float32), outputs_and_gradients(wkv7_loop, x, None, torch.float64), 1e-5)


def test_loop_by_hand():
    """Two tokens of a 2x2 state (N is free in the loop), worked out on paper."""
    t = lambda *rows: torch.tensor(rows, dtype=torch.float64).view(1, len(rows), 1, 2)
    log2 = float(torch.log(torch.tensor(2.0, dtype=torch.float64)))
    y, s = wkv7_loop(r=t([1, 0], [1, 1]), w=t([0, 0], [-log2, 0]), k=t([1, 0], [0, 1]), v=t([2, 3], [5, 7]),
                     a=t([0, 0], [-1, 0]), b=t([0, 0], [0.5, 0]))
    # S_1 = v k^T = [[2,0],[3,0]]; sa = S_1 a = [-2,-3]; S_2 = [[1,0],[1.5,0]] + [-2,-3]^T [.5,0] + [5,7]^T [0,1]
    assert torch.allclose(s[0, 0], torch.tensor([[0.0, 5.0], [0.0, 7.0]], dtype=torch.float64))
    assert torch.allclose(y[0, :, 0], torch.tensor([[2.0, 3.0], [5.0, 7.0]], dtype=torch.float64))


@pytest.mark.parametrize("impl", ["cpp", "torch", "loop"])
def test_padding_is_the_identity(impl, monkeypatch):
    monkeypatch.setenv("WKV_IMPL", impl)
    x = {k: z.float() for k, z in inputs(2, 21, 2, 16).items()}
    padded = {k: z if k == "s0" else torch.nn.functional.pad(z, (0, 0, 0, 0, 0, 9)) for k, z in x.items()}
    y, s = wkv7(**x)
    yp, sp = wkv7(**padded)
    assert torch.equal(sp, s) if impl != "torch" else torch.allclose(sp, s, atol=1e-5)
    assert torch.allclose(yp[:, :21], y, atol=1e-5)


@pytest.mark.parametrize("impl", ["cpp", "torch"])
def test_pieces_equal_the_whole(impl, monkeypatch):
    monkeypatch.setenv("WKV_IMPL", impl)
    x = {k: z.float() for k, z in inputs(1, 50, 2, 32).items()}
    y, s = wkv7(**x)
    first = {k: z if k == "s0" else z[:, :19] for k, z in x.items()}
    ya, sa = wkv7(**first)
    yb, sb = wkv7(**({k: z[:, 19:] for k, z in x.items() if k != "s0"} | {"s0": sa}))
    assert torch.allclose(torch.cat([ya, yb], 1), y, atol=1e-5) and torch.allclose(sb, s, atol=1e-5)


def test_bfloat16_in_and_out(monkeypatch):
    monkeypatch.setenv("WKV_IMPL", "cpp")
    x = {k: z.bfloat16() for k, z in inputs(1, 30, 2, 32).items()}
    y, s = wkv7(**x)
    want, _ = wkv7_loop(**{k: z.double() for k, z in x.items()})
    assert y.dtype == torch.bfloat16 and s.dtype == torch.float32
    assert (y.double() - want).norm() / want.norm() < 5e-3


def test_strided_inputs_and_gradients(monkeypatch):
    """Heads come as views of (B,T,C); gradients may arrive expanded (from .sum())."""
    monkeypatch.setenv("WKV_IMPL", "cpp")
    x = {k: z.float() for k, z in inputs(2, 20, 2, 16).items()}
    views = {k: z if k == "s0" else z.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for k, z in x.items()}
    wkv7(**views)[0].sum().backward()
    plain = {k: z.clone().requires_grad_() for k, z in x.items()}
    wkv7_loop(**plain)[0].sum().backward()
    for k in "rwkvabc":
        assert torch.allclose(views[k].grad, plain[k].grad, atol=1e-4), k


def test_operator_registration(monkeypatch):
    monkeypatch.setenv("WKV_IMPL", "cpp")
    wkv_cuda.backend("cpu")
    x = [z.float().requires_grad_() for z in inputs(1, 18, 2, 16).values()]
    utils = ("test_schema", "test_faketensor", "test_autograd_registration")
    for every in (0, 6):
        torch.library.opcheck(torch.ops.nanodir.wkv7, (x, (every, 1, 1), 0.0), test_utils=utils)


def test_compile_sees_through(monkeypatch):
    monkeypatch.setenv("WKV_IMPL", "cpp")
    x = {k: z.float() for k, z in inputs(1, 18, 2, 16).items()}
    compiled = torch.compile(lambda **kw: wkv7(**kw)[0] * 2, fullgraph=True, backend="aot_eager")
    leaves = {k: z.clone().requires_grad_() for k, z in x.items()}
    y = compiled(**leaves)
    y.sum().backward()
    plain = {k: z.clone().requires_grad_() for k, z in x.items()}
    (wkv7(**plain)[0] * 2).sum().backward()
    assert torch.allclose(y, wkv7(**x)[0] * 2, atol=1e-5)
    assert torch.allclose(leaves["w"].grad, plain["w"].grad, atol=1e-5)


@pytest.mark.parametrize("change,words", [
    (dict(N=24), ["head size 24", "16, 32, 64, 128"]), (dict(every=0), ["every=0"]),
    (dict(s0=torch.zeros(1, 2, 8, 8)), ["s0", "(1, 2, 8, 8)"]), (dict(k=torch.zeros(1, 3, 2, 16)), ["k has shape", "(1, 3, 2, 16)"])])
def test_errors_name_value_and_allowed(change, words):
    change = dict(change)
    x = {k: z.float() for k, z in inputs(1, 4, 2, change.pop("N", 16)).items()}
    with pytest.raises(ValueError) as e:
        wkv7(**(x | change))
    assert all(word in str(e.value) for word in words) and "\n" not in str(e.value)


def in_a_fresh_process(code, **env):
    return subprocess.run([sys.executable, "-c", f"import sys; sys.path.insert(0, {ROOT!r})\n{code}"], text=True, capture_output=True,
                          env={k: v for k, v in os.environ.items() if k != "WKV_IMPL"} | {k: str(v) for k, v in env.items()})


USE = "import torch, wkv_cuda\nprint(wkv_cuda.backend('cpu'), wkv_cuda.wkv7(*[torch.zeros(1, 3, 1, 16)] * 6)[0].shape)"


def test_no_compiler_falls_back_with_one_line(tmp_path):
    done = in_a_fresh_process(USE, CXX="no-such-compiler", TORCH_EXTENSIONS_DIR=tmp_path)
    assert done.stdout.startswith("torch ") and done.returncode == 0
    said = [line for line in done.stderr.splitlines() if "No CUDA runtime" not in line]        # which is torch's own, without a GPU
    assert len(said) == 1 and "no-such-compiler" in said[0]


def test_no_compiler_forced_is_an_error(tmp_path):
    done = in_a_fresh_process(USE, CXX="no-such-compiler", TORCH_EXTENSIONS_DIR=tmp_path, WKV_IMPL="cpp")
    assert done.returncode and "WKV_IMPL=torch" in done.stderr.splitlines()[-1]


def test_build_survives_a_stale_lock_and_shares_with_others(tmp_path):
    """Two processes at once, one build; torch's own lock file, as a killed build leaves it, hangs nobody."""
    start = lambda: subprocess.Popen([sys.executable, "-c", f"import sys; sys.path.insert(0, {ROOT!r})\n{USE}"], text=True,
                                     stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                     env=os.environ | {"TORCH_EXTENSIONS_DIR": str(tmp_path), "WKV_IMPL": "cpp"})
    pair = [start(), start()]
    results = [p.communicate(timeout=120) for p in pair]
    assert all(out.startswith("cpp ") for out, _ in results), results
    assert sum("built the C++ kernels" in err for _, err in results) == 1
    (folder,) = tmp_path.iterdir()
    (folder / "done").unlink()
    (folder / "lock").touch()
    out, err = start().communicate(timeout=120)
    assert out.startswith("cpp ")


def test_a_compiler_that_does_not_know_this_processor_builds_for_all(tmp_path):
    compiler = tmp_path / "c++-of-old"
    compiler.write_text("#!/bin/sh\ncase \"$*\" in *native*) echo error: bad value for -march= switch >&2; exit 1;; esac\nexec g++ -O0 \"$@\"\n")
    compiler.chmod(0o755)
    code = "import wkv_cuda; print(wkv_cuda.build('cpp') or wkv_cuda.backend('cpu'))"
    done = in_a_fresh_process(code, TORCH_EXTENSIONS_DIR=tmp_path / "ext", CXX=compiler)
    assert done.stdout == "cpp\n" and "does not know -m" in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_a_source_that_does_not_compile_is_reported(tmp_path):
    code = ("import wkv_cuda, pathlib\n"
            f"p = pathlib.Path({str(tmp_path)!r}) / 'wkv7.cpp'; p.write_text('int broken( {{')\n"
            "import wkv_cuda.loader\nwkv_cuda.loader.__file__ = str(p.with_name('loader.py'))\nprint(wkv_cuda.build('cpp'))")
    done = in_a_fresh_process(code, TORCH_EXTENSIONS_DIR=tmp_path / "ext")
    assert "did not build" in done.stdout and "\n" not in done.stdout.strip()
