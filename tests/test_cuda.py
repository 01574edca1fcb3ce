"""The GPU kernels without a GPU: compiled by nvcc, and run on the CPU by tests/cuda_on_cpu.h against the float64 twins."""
import contextlib
import ctypes
import hashlib
import itertools
import mmap
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.utils.checkpoint

import bench
import model
import test_biwkv
import test_wkv7
import wkv_cuda
from conftest import ROOT, ok
from wkv_cuda import biwkv, biwkv_loop, loader, wkv7, wkv7_loop

KERNELS = Path(ROOT, "wkv_cuda")


def emulated():
    """The kernels compiled for the CPU, loaded as the library of those for GPUs."""
    tests = Path(ROOT, "tests")
    sources = [*KERNELS.glob("*.cu"), KERNELS / "bindings.cpp", tests / "emulator.cpp"]
    flags = ["-O1", "-D_FORTIFY_SOURCE=2", "-x", "c++", "-include", str(tests / "cuda_on_cpu.h"), "-DDEVICE=CPU", loader.TARGET]
    return ctypes.CDLL(str(loader.compiled("emulated", sources, flags, with_cuda=False)))


@pytest.fixture(scope="session")
def emulator():
    if not shutil.which("g++"):
        pytest.skip("g++ compiles the emulator")
    return emulated()


@pytest.fixture
def cuda(emulator, monkeypatch):
    """CPU tensors go to the GPU kernels, through all that is Python around them."""
    monkeypatch.setitem(loader.KERNELS, "cpu", "cuda")
    monkeypatch.setattr(loader, "build", lambda name: "")
    monkeypatch.setattr(loader, "stream_of", lambda device: contextlib.nullcontext(0))
    monkeypatch.setenv("WKV_IMPL", "cuda")
    yield emulator
    emulator.emulator_order(0)
    emulator.emulator_skip(b"")


def both(x, every, dtype=torch.float32, order=0, lib=None):
    lib.emulator_order(order)
    return test_wkv7.outputs_and_gradients(wkv7, x, every, dtype)


@pytest.mark.parametrize("some", [True, False])
@pytest.mark.parametrize("every", [None, 1, 5, 16, 40])
@pytest.mark.parametrize("B,T,H,N", [(2, 37, 2, 16), (1, 41, 2, 32), (1, 33, 1, 64), (1, 18, 1, 128), (1, 1, 1, 16)])
def test_wkv7_against_the_loop_in_float64(B, T, H, N, every, some, cuda):
    x = test_wkv7.inputs(B, T, H, N)
    if not some:
        x = {k: z for k, z in x.items() if k not in ("s0", "c")}
    found = both(x, every, lib=cuda, order=T % 3)
    test_wkv7.close(found, test_wkv7.outputs_and_gradients(wkv7_loop, x, every, torch.float64), 1e-5)


def barriers(source):
    return [f"{source}:{i}" for i, line in enumerate((KERNELS / source).read_text().splitlines(), 1) if "__syncthreads" in line]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("N", [16, 32, 64, 128])
def test_no_order_of_threads_changes_a_bit(N, dtype, cuda):
    """Forwards, backwards, at random: threads of a kernel without races cannot tell. bfloat16 goes to the tensor cores but for N=128."""
    x = test_wkv7.inputs(1, 35, 2, N)
    first = both(x, 16, dtype, lib=cuda)
    for order in (1, 2, 3):
        again = both(x, 16, dtype, lib=cuda, order=order)
        assert all(torch.equal(again[name], z) for name, z in first.items()), order


@pytest.mark.parametrize("place", barriers("wkv7.cu") + barriers("wkv7_bf16.cu"))
def test_a_missing_barrier_is_caught(place, cuda):
    """Each __syncthreads of the kernels in turn does nothing: some order gives something else."""
    x, dtype = test_wkv7.inputs(1, 35, 1, 64), torch.bfloat16 if "bf16" in place else torch.float32
    right = both(x, None, dtype, lib=cuda)
    cuda.emulator_skip(place.encode())
    broken = [both(x, None, dtype, lib=cuda, order=order) for order in range(4)]
    assert any(not torch.equal(z[name], right[name]) for z in broken for name in right)


def guarded(x, end):
    """A copy of x that lies between two pages that must not be touched, right before (end) or right after one."""
    size, page = x.numel() * x.element_size(), mmap.PAGESIZE
    pages = -(-size // page)
    memory = mmap.mmap(-1, (pages + 2) * page)
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for at in (base, base + (pages + 1) * page):
        assert not ctypes.CDLL(None).mprotect(ctypes.c_void_p(at), page, 0)
    offset = page + end * (pages * page - size)
    return torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=offset).view(x.shape).copy_(x)


def run_guarded():
    """Every kernel on guarded buffers; a process that touches anything else dies."""
    emulated()
    loader.KERNELS["cpu"], loader.build = "cuda", lambda name: ""

    def call(kernel, numbers, tensors, eps):
        tensors = [x if x is None else x.contiguous() for x in tensors]
        for end in (True, False):
            copies = [None if x is None or not x.numel() else guarded(x, end) for x in tensors]
            torch.ops.nanodir_cuda.run(kernel, (*numbers, 0), 0.0, [loader.NONE if x is None else x for x in copies])
        for x, copy in zip(tensors, copies):
            if copy is not None:
                x.copy_(copy)
    wkv_cuda.operators.call = call
    for T, N, every, dtype in itertools.product((7, 33), (16, 64, 128), (None, 16), (torch.float32, torch.bfloat16)):
        test_wkv7.outputs_and_gradients(wkv7, test_wkv7.inputs(1, T, 1, N), every, dtype)
    test_biwkv.output_and_gradients(biwkv, test_biwkv.inputs(3, 21, 24), torch.float32)
    print("all done")


def test_nothing_outside_the_buffers_is_touched(emulator):
    env = os.environ | {"PYTHONPATH": os.path.join(ROOT, "tests"), "WKV_IMPL": "cuda"}
    done = subprocess.run([sys.executable, "-c", "import test_cuda; test_cuda.run_guarded()"], env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "all done\n"), done.stderr[-1000:]


def test_the_emulator_refuses_what_hangs_a_gpu(emulator, tmp_path):
    """Divergent barriers and shuffles, and writes past shared memory, each in a kernel of its own."""
    words = {"if (threadIdx.x) __syncthreads();": "left before a barrier", "if (threadIdx.x) __shfl_sync(~0u, 1.f, 0);": "not all lanes",
             "shared_memory()[threadIdx.x] = 0;": "past shared memory"}
    cases = "".join(f"__global__ void kernel{i}(int) {{ {code} }}\n" for i, code in enumerate(words))
    tries = "".join(f"  try {{ launch(kernel{i}, 1, 64, 128, nullptr, 1); puts(\"\"); }} catch (std::exception& e) {{ puts(e.what()); }}\n"
                    for i in range(len(words)))
    (tmp_path / "bad.cpp").write_text(f"#include <cstdio>\n#include \"cuda_on_cpu.h\"\n{cases}int main() {{\n{tries}}}\n")
    subprocess.run(["g++", "-std=c++17", "-I", str(Path(ROOT, "tests")), tmp_path / "bad.cpp", "-o", tmp_path / "bad"], check=True)
    said = subprocess.run([tmp_path / "bad"], capture_output=True, text=True).stdout.splitlines()
    assert len(said) == len(words) and all(word in line for word, line in zip(words.values(), said)), said


@pytest.mark.parametrize("strongest", [0.0, 60.0, 1000.0])
def test_any_decay(strongest, cuda):
    x = test_wkv7.inputs(1, 40, 2, 16, strongest)
    x["w"][:, 7] = 0.0
    test_wkv7.close(both(x, None, lib=cuda), test_wkv7.outputs_and_gradients(wkv7_loop, x, None, torch.float64), 1e-5)


def bfloat16_errors(B, T, H, N, every, which, strongest=0.6):
    """Relative errors of outputs and gradients where the inputs `which` are bfloat16, against the twin on the same rounded inputs."""
    x = {k: z.bfloat16().double() if k in which else z for k, z in test_wkv7.inputs(B, T, H, N, strongest).items()}
    leaves = {k: z.to(torch.bfloat16 if k in which else torch.float32).requires_grad_() for k, z in x.items()}
    twins = {k: z.clone().requires_grad_() for k, z in x.items()}
    found, wanted = wkv7(**leaves, every=every), wkv7_loop(**twins, every=every)
    g = torch.Generator().manual_seed(3)
    grads = [torch.randn(z.shape, generator=g).to(z.dtype) for z in found]
    torch.autograd.backward(found, grads)
    torch.autograd.backward(wanted, [z.double() for z in grads])
    assert found[0].dtype == leaves["r"].dtype and found[1].dtype == torch.float32
    assert all(z.grad.dtype == z.dtype for z in leaves.values())
    pairs = dict(zip("ys", zip(found, wanted))) | {"d" + k: (leaves[k].grad, twins[k].grad) for k in x}
    return {name: ((a.double() - b).norm() / b.norm()).item() for name, (a, b) in pairs.items()}


@pytest.mark.parametrize("which", ["kv", "wkab", "c"])
def test_any_input_may_be_bfloat16(which, cuda):
    """What comes back of it is, too, and is off by no more than its rounding; with r in float32 the sums are exact."""
    for name, error in bfloat16_errors(1, 37, 1, 32, None, which).items():
        assert error <= (3e-3 if name[-1] in which and name[0] == "d" else 1e-5), f"{name}: relative error {error:.2e}"


@pytest.mark.parametrize("which", ["r", "rv", "rwkvabc"])
@pytest.mark.parametrize("every", [None, 5, 16, 32])
@pytest.mark.parametrize("B,T,H,N", [(2, 37, 2, 16), (1, 48, 2, 32), (1, 33, 1, 64), (1, 5, 1, 64), (1, 18, 1, 128)])
def test_bfloat16(B, T, H, N, every, which, cuda):
    """On tensor cores, but for N=128 and states in the middle of a chunk."""
    for name, error in bfloat16_errors(B, T, H, N, every, which).items():
        assert error <= 1e-2, f"{name}: relative error {error:.2e}"


@pytest.mark.parametrize("strongest", [0.0, 8.0, 60.0, 1000.0])
def test_any_decay_in_bfloat16(strongest, cuda):
    for name, error in bfloat16_errors(1, 40, 1, 32, None, "rwkvab", strongest).items():
        assert error <= 1e-2, f"{name}: relative error {error:.2e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_nan_does_not_go_unseen(dtype, cuda):
    for name in "rwkvab":
        x = {k: z.to(dtype) for k, z in test_wkv7.inputs(1, 20, 1, 32).items() if k in "rwkvab"}
        x[name][0, 9, 0, 3] = torch.nan
        assert wkv7(**x)[0][0, 9:].isnan().any(), name


def test_bfloat16_errors_do_not_grow_with_length(cuda):
    for name, error in bfloat16_errors(1, 400, 1, 16, None, "rwkvab").items():
        assert error <= 1e-2, f"{name}: relative error {error:.2e}"


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("T,C", [(1, 16), (7, 24), (33, 48), (64, 40)])
def test_biwkv_against_the_loop_in_float64(per_sample, T, C, cuda):
    x = test_biwkv.inputs(2, T, C, per_sample)
    test_biwkv.close(test_biwkv.output_and_gradients(biwkv, x, torch.float32), test_biwkv.output_and_gradients(biwkv_loop, x, torch.float64))


@pytest.mark.parametrize("keys,decay", [(2.0, 0.0), (50.0, 1e-3), (300.0, 30.0)])
def test_biwkv_any_key_and_any_decay(keys, decay, cuda):
    x = test_biwkv.inputs(2, 40, 16, True, keys, decay)
    test_biwkv.close(test_biwkv.output_and_gradients(biwkv, x, torch.float32), test_biwkv.output_and_gradients(biwkv_loop, x, torch.float64))


def test_biwkv_long_sequences_of_large_keys(cuda):
    x = test_biwkv.inputs(1, 4096, 16, False, 50.0, 1e-3)
    wanted = test_biwkv.output_and_gradients(lambda **x: test_biwkv.biwkv_torch(**x), x, torch.float64)
    test_biwkv.close(test_biwkv.output_and_gradients(biwkv, x, torch.float32), wanted)


def test_biwkv_padding_and_nan(cuda):
    x = test_biwkv.inputs(3, 19, 16)
    x["k"][0, :6], x["k"][1, 4:15], x["k"][2] = -torch.inf, -torch.inf, -torch.inf
    found = test_biwkv.output_and_gradients(biwkv, x, torch.float32)
    test_biwkv.close(found, test_biwkv.output_and_gradients(biwkv_loop, x, torch.float64))
    assert not found["dk"][x["k"] == -torch.inf].any()
    for name in "wukv":
        x = {k: z.float() for k, z in test_biwkv.inputs(1, 9, 16).items()}
        x[name][..., 3] = torch.nan
        bad = biwkv(**x).isnan()
        assert bad[..., 3].all() and bad.sum() == 9, name


def test_empty_sequences(cuda):
    y, s = wkv7(*[torch.ones(2, 0, 1, 16)] * 6, s0=torch.full((2, 1, 16, 16), 3.0))
    assert y.shape == (2, 0, 1, 16) and (s == 3).all()
    assert wkv7(*[torch.ones(0, 5, 1, 16)] * 6)[0].shape == (0, 5, 1, 16)
    assert biwkv(torch.ones(16), torch.ones(16), torch.ones(2, 0, 16), torch.ones(2, 0, 16)).shape == (2, 0, 16)


def test_operator_registration(cuda):
    """With bfloat16 among the inputs, which the other kernels never see."""
    x = [(z.bfloat16() if i in (0, 3) else z.float()).requires_grad_() for i, z in enumerate(test_wkv7.inputs(1, 18, 2, 16).values())]
    utils = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.nanodir.wkv7, (x, (6, 1, 1), 0.0), test_utils=utils)
    y, _, mid, sa = torch.ops.nanodir.wkv7(x, (6, 1, 1), 0.0)
    saved = [z.detach() for z in x[:7]] + [None], [None, None, mid, sa]
    torch.library.opcheck(torch.ops.nanodir.wkv7_backward, (*saved, [y, None], (6, 1, 1), 0.0), test_utils=utils)


def test_nvcc_compiles_the_kernels():
    """For A100 and H100; registers that spill would make the tiles pointless. What has been compiled once is not compiled again."""
    if not shutil.which("nvcc"):
        pytest.skip("no nvcc: the kernels are only emulated")
    command = "nvcc -O3 -std=c++17 --expt-relaxed-constexpr -Xptxas -v -gencode arch=compute_80,code=[sm_80,sm_90] -fatbin -o /dev/null".split()
    sources = sorted(KERNELS.glob("*.cu"))
    key = hashlib.sha256(b"".join(map(Path.read_bytes, sources + sorted(KERNELS.glob("*.h")))) + subprocess.check_output(["nvcc", "--version"]))
    said = loader.build_root() / f"nvcc-{key.hexdigest()[:16]}.txt"
    if not said.exists():
        jobs = [subprocess.Popen([*command, source], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for source in sources]
        lines = [job.communicate()[0] for job in jobs]
        assert not any(job.returncode for job in jobs), "".join(lines)[-2000:]
        said.parent.mkdir(parents=True, exist_ok=True)
        said.write_text("".join(lines))
    assert "warning" not in said.read_text()
    spills = re.findall(r"(\d+) bytes spill loads", said.read_text())
    assert len(spills) == 2 * (2 * 4 + 2 * 3 + 2) and max(map(int, spills)) <= 512     # 2 GPUs; forward and backward; head sizes


TOOLS = dict(home="/opt/cuda", version="13.0", gpu=(9, 0), nvcc="release 13.0, V13.0.88", archs="compute_80\ncompute_90\ncompute_120")


@pytest.mark.parametrize("change,words", [
    (dict(home=None), ["no CUDA toolkit", "13.0", "CUDA_HOME"]), (dict(nvcc=None), ["/bin/nvcc", "CUDA_HOME"]),
    (dict(nvcc="release 12.8, V12.8.1"), ["12.8", "13.0", "CUDA_HOME"]), (dict(version=None), ["built without CUDA"]),
    (dict(gpu=None), ["sees no GPU", "nvidia-smi"]), (dict(gpu=(7, 5)), ["8.0", "a GPU has 7.5"]), (dict(ninja=None), ["ninja", "pip install ninja"])])
def test_what_is_missing_is_named_with_its_repair(change, words, tmp_path, monkeypatch):
    flags_for(TOOLS | change, tmp_path, monkeypatch)
    monkeypatch.setattr(loader, "build", loader.build.__wrapped__)
    if "ninja" in change:
        monkeypatch.setattr(loader.shutil, "which", lambda name, which=shutil.which: None if name == "ninja" else which(name))
    reason = loader.build("cuda")
    assert all(word in reason for word in words) and "\n" not in reason, reason
    monkeypatch.setenv("WKV_IMPL", "cuda")
    with pytest.raises(ValueError, match="WKV_IMPL=torch"):
        loader.backend("cuda")


def test_a_toolkit_without_its_library_is_named(tmp_path, monkeypatch):
    flags_for(TOOLS, tmp_path, monkeypatch)
    def fails(*args, **options):
        raise RuntimeError("/usr/bin/ld: cannot find -lcudart: No such file or directory")
    monkeypatch.setattr(loader, "compiled", fails)
    assert "set CUDA_HOME to the toolkit's own folder" in loader.build.__wrapped__("cuda")


@pytest.mark.parametrize("gpu,flags", [((9, 0), ["compute_90", "sm_90"]), ((8, 6), ["compute_80"]), ((15, 0), ["compute_120"])])
def test_only_the_gpu_at_hand_is_built_for(gpu, flags, tmp_path, monkeypatch):
    """Flags are separate tokens; for a GPU that nvcc does not know there is PTX."""
    arch = flags[0]
    assert flags_for(TOOLS | dict(gpu=gpu), tmp_path, monkeypatch)() == [
        token for kind in flags for token in ("-gencode", f"arch={arch},code={kind}")]


def flags_for(tools, folder, monkeypatch):
    """loader.gpu_flags on a machine with these tools; nvcc is a script that answers."""
    from torch.utils import cpp_extension
    home = tools["home"] and folder / "cuda"
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", home and str(home))
    monkeypatch.setattr(torch.version, "cuda", tools["version"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(tools["version"] and tools["gpu"]))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: tools["gpu"])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    if tools["nvcc"]:
        (folder / "cuda/bin").mkdir(parents=True)
        nvcc = folder / "cuda/bin/nvcc"
        nvcc.write_text(f"#!/bin/sh\n[ $1 = --version ] && echo 'Cuda compilation tools, {tools['nvcc']}' || echo '{tools['archs']}'\n")
        nvcc.chmod(0o755)
    return loader.gpu_flags


@pytest.mark.parametrize("asked,device", [("cuda", "cpu"), ("cpp", "cuda")])
def test_a_kernel_is_not_forced_on_another_device(asked, device, monkeypatch):
    monkeypatch.setenv("WKV_IMPL", asked)
    monkeypatch.setattr(loader, "build", lambda name: "")
    with pytest.raises(ValueError, match=f"WKV_IMPL={asked}: that kernel does not run on {device}; .*WKV_IMPL=torch"):
        loader.backend(device)


# ---- what training wraps around the operators ----

def tiny(**changes):
    return model.Denoiser(model.ModelConfig(**dict(n_layer=2, n_embd=32, head_size=16, vocab_size=11) | changes))


@pytest.mark.parametrize("changes", [dict(dw_jrt=True), dict(mixer="biwkv"), dict(direction="bidirectional")])
def test_a_network_trains_on_the_gpu_kernels(changes, cuda, monkeypatch):
    """Loss and gradients equal those of plain torch; the fused CPU parts of a block are not used."""
    for kernel in (wkv_cuda.block.SHIFT_MIX, wkv_cuda.block.WKV7_INPUTS, wkv_cuda.block.WKV7_OUTPUT, wkv_cuda.block.WKV7_MIX,
                   wkv_cuda.block.READ_STATE, wkv_cuda.block.SQUARED_RELU):
        monkeypatch.setattr(kernel, "forward", None)
    net, x = tiny(**changes), torch.randint(11, (2, 21))
    found = {}
    for impl in ("cuda", "torch"):
        monkeypatch.setenv("WKV_IMPL", impl)
        net.zero_grad()
        net(x).logits.square().mean().backward()
        found[impl] = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    assert found["cuda"].keys() == found["torch"].keys() and len(found["cuda"]) > 20
    for name, z in found["torch"].items():
        assert torch.allclose(found["cuda"][name], z, rtol=1e-3, atol=1e-6), name


def test_autocast_and_checkpointing(cuda):
    """In bfloat16, and with activations computed again in the backward pass: the same gradients, to the bit."""
    net, x = tiny(dw_jrt=True), torch.randint(11, (2, 21))
    with torch.autocast("cpu", torch.bfloat16):
        net(x).logits.float().square().mean().backward()
    once = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        logits = torch.utils.checkpoint.checkpoint(lambda x: net(x).logits, x, use_reentrant=False)
        logits.float().square().mean().backward()
    assert all(torch.equal(p.grad, once[name]) for name, p in net.named_parameters() if p.grad is not None)
    assert all(z.isfinite().all() for z in once.values()) and any(z.any() for z in once.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compile_sees_through(dtype, cuda):
    torch._dynamo.reset()
    x = {k: z.to(dtype) for k, z in test_wkv7.inputs(1, 18, 2, 16).items()}
    compiled = torch.compile(lambda **kw: wkv7(**kw)[0] * 2, fullgraph=True, backend="aot_eager")
    found = {}
    for name, f in (("compiled", compiled), ("plain", lambda **kw: wkv7(**kw)[0] * 2)):
        leaves = {k: z.clone().requires_grad_() for k, z in x.items()}
        y = f(**leaves)
        y.float().sum().backward()
        found[name] = [y, *(z.grad for z in leaves.values())]
    assert all(torch.equal(a, b) for a, b in zip(*found.values()))


def test_a_whole_network_compiles(cuda):
    """In one graph, with its kernels in it."""
    torch._dynamo.reset()
    net, x, found = tiny(n_layer=1), torch.randint(11, (2, 21)), []
    for call in (net, torch.compile(net, fullgraph=True, backend="aot_eager")):
        net.zero_grad()
        call(x).logits.square().mean().backward()
        found.append({name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None})
    assert all(torch.allclose(found[1][name], z, rtol=1e-3, atol=1e-6) for name, z in found[0].items())


def test_compile_turns_itself_off(run):
    """Where there is no compiler, training goes on without one, and says so once."""
    done = run("train.py", STRUCT_TASK=1, N_LAYER=1, N_EMBD=32, HEAD_SIZE=16, MAX_ITERS=1, STRUCT_EVAL_N=2, WKV_IMPL="torch", THREADS=1, COMPILE=1,
               CXX="no-such-compiler", DTYPE="fp32", fresh=True)
    assert ok(done) and sum("compile=1 does not work here" in line for line in done.stdout.splitlines()) == 1


# ---- bench.py --suite=gpu ----

def test_nothing_is_measured_of_kernels_that_are_wrong(cuda, monkeypatch, capsys):
    monkeypatch.setattr(bench, "quick", True)
    monkeypatch.setattr(wkv_cuda, "HEAD_SIZES", (64,))
    rows = bench.from_file("gpu").parity({}, "cpu")
    assert len(rows) == 7 and max(rows["wkv7 N=64 bfloat16"].values()) > 1e-4 > max(rows["wkv7 N=64 float32"].values()) > 0
    cuda.emulator_skip(barriers("wkv7.cu")[0].encode())
    cuda.emulator_order(1)
    with pytest.raises(ValueError, match="wrong on this GPU.*wkv7 N=64 float32"):
        bench.from_file("gpu").parity({}, "cpu")


def test_the_suite_needs_a_gpu(run):
    done = run("bench.py", "--suite=gpu", CUDA_VISIBLE_DEVICES="", QUICK=1)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "sees none" in done.stderr
