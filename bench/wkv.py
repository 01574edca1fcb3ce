"""python bench.py --suite=wkv: the recurrence, then every kernel, by back end; the processor and its peak."""
import contextlib
import functools
import itertools
import os
import platform
import subprocess
import sys
import tempfile
import time
import timeit

import torch

import bench
import wkv_cuda
from bench import alternated, table

def recurrence_inputs(B, T, H, N, dtype=torch.float32, device="cpu"):
    """r, w, k, v, a, b as a network gives them to wkv7."""
    options = dict(generator=torch.Generator(device).manual_seed(0), device=device)
    normal, uniform = (functools.partial(f, B, T, H, N, **options) for f in (torch.randn, torch.rand))
    kk = torch.nn.functional.normalize(normal(), dim=-1)
    x = normal(), -0.6 * uniform(), 0.3 * normal(), normal(), -kk, kk * uniform()
    return [z.to(dtype).requires_grad_() for z in x]

def outputs(y):
    return tuple(y) if isinstance(y, (list, tuple)) else (y,)

def processor():
    """The processor, floats in one of its vectors, and its measured peak with the threads at hand, FLOP/s in
    float32 of multiply-adds on registers; zeros where there is no C++ kernel."""
    found = {"processor": platform.processor() or platform.machine(), "vector": 0, "peak_flops": 0.0}
    with contextlib.suppress(OSError, StopIteration), open("/proc/cpuinfo") as f:
        line = next(line for line in f if line.startswith(("model name", "CPU part")))
        found["processor"] = line.split(":")[1].strip()
    if wkv_cuda.build("cpp"):
        return found
    from wkv_cuda.loader import call
    n, workers = 10**5 if bench.quick else 10**7, torch.get_num_threads()
    sums = torch.full((workers, 16), torch.nan)
    seconds = min(timeit.repeat(lambda: call("peak", (workers, n), (sums,)), number=1))
    width = int(sums[0].isfinite().sum())
    chains = 12 if width == 8 or width == 4 and platform.machine() == "x86_64" else 24
    peak = 2 * chains * width * workers * n / seconds
    print(f"\n  {found['processor']}, vectors of {width} floats, fp32 peak {peak / 1e9:.0f} GFLOP/s")
    return found | {"vector": width, "peak_flops": peak}

def kernel_jobs(B, T, C, N):
    """Every operator of wkv_cuda, as a network calls it in training -> {name: (function, its tensors)}."""
    def normal(n, *shape):
        return [torch.randn(*shape).requires_grad_() for _ in range(n)]
    rows, heads = (B, T, C), (B, T, C // N, N)
    return {"wkv7": (wkv_cuda.wkv7, recurrence_inputs(*heads)),
            "wkv7_mix": (lambda *x: wkv_cuda.wkv7_mix(*x, 64e-5, None, N), normal(8, *rows) + normal(8, C)),
            "wkv7_inputs": (lambda *x: wkv_cuda.wkv7_inputs(*x, None, N), normal(6, *rows) + normal(5, C)),
            "wkv7_output": (lambda *x: wkv_cuda.wkv7_output(*x, 64e-5, N), normal(5, *rows) + normal(3, C)),
            "shift_mix": (lambda x, m: wkv_cuda.shift_mix(x, None, m), [*normal(1, *rows), *normal(1, 6, C)]),
            "shift_mix, wide": (lambda x, m: wkv_cuda.shift_mix(x, None, m, 2),
                                [*normal(1, *rows), *normal(1, 1, C)]),
            "read_state": (wkv_cuda.read_state, normal(1, B, C // N, N, N) + normal(2, *heads)),
            "squared_relu": (wkv_cuda.squared_relu, normal(1, B, T, 4 * C)),
            "biwkv": (lambda w, *x: wkv_cuda.biwkv(w.sigmoid(), *x), normal(2, C) + normal(2, *rows))}

def kernel_ms(f, x, impls, times, keep=False):
    """Of f(*x) -> {back end: [milliseconds forward, forward and backward]}. keep: forward alone keeps what
    backward needs, too."""
    def job(impl, backward):
        os.environ["WKV_IMPL"] = impl
        with torch.set_grad_enabled(keep or backward):
            y = [z for z in outputs(f(*x)) if z.requires_grad]
            if backward:
                torch.autograd.grad(y, x, [torch.ones_like(z) for z in y], allow_unused=True)
    ways = itertools.product(impls, (False, True))
    ms = alternated({way: functools.partial(job, *way) for way in ways}, times)
    os.environ["WKV_IMPL"] = "auto"
    return {impl: [ms[impl, False], ms[impl, True]] for impl in impls}

def all_kernels():
    """Milliseconds of every kernel and of plain torch -> {name: pairs forward, forward and backward}."""
    sizes = {"main job": (32, 64, 128, 32), "text": (64, 128, 128, 32), "N = 64": (8, 512, 256, 64)}
    found, rows = {}, {}
    for size, shape in sizes.items():
        for name, (f, x) in kernel_jobs(*shape).items():
            pairs = list(zip(*kernel_ms(f, x, ("cpp", "torch"), 19).values()))
            forward, both = (f"{cpp:.2f} / {plain:.2f} ({plain / cpp:.1f}x)" for cpp, plain in pairs)
            found[f"{name}, {size}"] = pairs
            rows[f"{name}, {size}"] = dict(forward=forward, both=both)
    table("kernel / plain torch, ms (times as fast)", "kernel | forward | forward+backward",
          "{forward} | {both}", rows)
    return found

def suite():
    """The recurrence, then all kernels at three sizes; and what a first use costs."""
    if reason := wkv_cuda.build("cpp"):
        raise ValueError(f"nothing to measure: {reason}")
    B, T, H, N = 8, 512, 4, 64
    x = recurrence_inputs(B, T, H, N)
    ms = kernel_ms(lambda *x: wkv_cuda.wkv7(*x)[0], x, ("loop", "torch", "cpp"), 5 * bench.rounds, keep=True)
    # FLOPs per channel and step: 9 N forward; 5 N to compute the states again and 19 N backward
    cpu, work = processor(), B * T * H * N * N
    reached = [flops * work / t * 1e3 / cpu["peak_flops"] for flops, t in zip((9, 33), ms["cpp"])]
    print(f"  the C++ kernel reaches {reached[0]:.0%} of it forward, {reached[1]:.0%} forward and backward")
    table(f"wkv7 at (B,T,H,N) = ({B},{T},{H},{N}), {torch.get_num_threads()} threads, ms",
          "back end | forward | forward+backward | faster than the loop",
          "{f:.1f} | {both:.1f} | {faster:.1f}x",
          {impl: dict(f=f, both=both, faster=ms["loop"][1] / both) for impl, (f, both) in ms.items()})
    kernels = all_kernels()
    with tempfile.TemporaryDirectory() as folder:
        code = ("import time, torch, wkv_cuda, torch.utils.cpp_extension\n"
                "t = time.time(); assert not wkv_cuda.build('cpp')\nprint(time.time() - t)")
        env = os.environ | {"TORCH_EXTENSIONS_DIR": folder}
        build = float(subprocess.check_output([sys.executable, "-c", code], env=env))
    start = time.perf_counter()
    subprocess.check_output([sys.executable, "train.py", "--help"])
    helped = time.perf_counter() - start
    print(f"  cold build of the kernel {build:.1f} s; python train.py --help {helped:.1f} s")
    return {**cpu, "reached": reached, "kernels": kernels, "ms": ms, "cold_build_s": build, "help_s": helped}
