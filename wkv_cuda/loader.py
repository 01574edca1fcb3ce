"""Choosing a back end, and compiling the kernels on first use."""
import contextlib
import functools
import hashlib
import os
import platform
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch

BACK_ENDS = ("auto", "cuda", "cpp", "torch", "loop")


def backend(device, kind=torch.float32):
    """Which of BACK_ENDS serves `device` ("cpu", "cuda", ...). WKV_IMPL forces one; a forced kernel that cannot be built
    raises ValueError with the compiler's last lines, `auto` falls back to plain torch and says so once."""
    asked = os.environ.get("WKV_IMPL", "auto")
    if asked not in BACK_ENDS:
        raise ValueError(f"WKV_IMPL={asked!r} is unknown: choose one of {', '.join(BACK_ENDS)}")
    if asked in ("torch", "loop"):
        return asked
    if kind == torch.float64:              # the kernels are float32; float64 is for checking
        return "torch"
    name = asked if asked != "auto" else "cpp" if device == "cpu" else "cuda"
    reason = build(name)
    if not reason:
        return name
    if asked != "auto":
        raise ValueError(f"WKV_IMPL={asked}: {reason}; unset it, or use WKV_IMPL=torch, which needs no compiler")
    say(f"wkv: plain torch on {device}, slower than a kernel: {reason}")
    return "torch"


# What torch.compiler.assume_constant_result sets (the choice is made once, outside any compiled graph), without its import of
# the whole compiler, which takes a second.
backend._dynamo_marked_constant = True


@functools.cache
def say(line):
    """Print a line once."""
    print(line, file=sys.stderr, flush=True)


@functools.cache
def build(name):
    """Compile (first use on this machine) and load the kernel -> "" or the reason why it cannot be had, with the repair."""
    if name == "cuda":
        return "there is no CUDA kernel in this version"
    sources, flags = sorted(Path(__file__).parent.glob("*.cpp"), reverse=True), ["-O3", "-march=native", "-fno-math-errno", TARGET]
    if platform.machine() in ("arm64", "aarch64"):
        flags[1] = "-mcpu=native"
    from torch.utils.cpp_extension import get_cxx_compiler, load
    compiler = get_cxx_compiler()
    if not shutil.which(compiler):
        return f"the C++ compiler {compiler!r} is not installed (Debian, Ubuntu: apt install g++)"
    with contextlib.suppress(ImportError):  # ninja's wheel may be installed, yet not on PATH
        import ninja
        os.environ["PATH"] = os.environ["PATH"] + os.pathsep + ninja.BIN_DIR
    texts = [f.read_text() for f in sorted(Path(__file__).parent.glob("*.[ch]*"))]
    key = "\0".join([*texts, *flags, torch.__version__, compiler, cpu()])
    folder = build_root() / f"cpu-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    library = folder / "nanodir_cpu.so"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "flock", "w") as f, locked(f):         # other processes wait here; the lock dies with its owner
            if not (folder / "done").exists():
                (folder / "lock").unlink(missing_ok=True)          # torch's own lock file, left by a killed build
                started = time.time()
                load("nanodir_cpu", [str(f) for f in sources], extra_cflags=flags, build_directory=str(folder), is_python_module=False)
                (folder / "done").touch()
                say(f"wkv: built the C++ kernels in {time.time() - started:.1f} s ({folder})")
                return ""
        torch.ops.load_library(str(library))
        return ""
    except Exception as e:                 # whatever a compiler, a disk or a loader can do: the caller decides
        tail = [line for line in str(e).splitlines() if line.strip()][-3:]
        return f"the C++ kernels did not build: {' | '.join(tail)[-600:]}"


def call(kernel, numbers, tensors, eps=0.0):
    """Run a kernel on contiguous tensors of its own choosing, among them the buffers that it fills; None: it needs no such."""
    torch.ops.nanodir_kernel.run(kernel, numbers, eps, [NONE if x is None else x for x in tensors])


NONE = torch.empty(0)


def operator(fake):
    """Decorates a function of tensors that calls a kernel: inside a compiled graph it is a torch operator with that fake, outside
    it is called as it is, since torch takes longer to dispatch a Python operator than these kernels often take to run."""
    def decorate(f):
        op = torch.library.custom_op("nanodir::" + f.__name__.lstrip("_"), f, mutates_args=())
        op.register_fake(fake)
        return lambda *args: op(*args) if torch.compiler.is_compiling() else f(*args)
    return decorate


def wants_grad(*args):
    return torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in args)


def run(function, op, *args):
    """op(*args), through the autograd.Function only where a gradient is wanted: to go through it takes as long as a small kernel."""
    return function.apply(*args) if wants_grad(*args) else op(*args)


TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"   # the stable ABI of torch 2.11: one source for it and all later ones


def build_root():
    """Where builds are kept: TORCH_EXTENSIONS_DIR, else the user's cache, else the temporary folder."""
    for root in (os.environ.get("TORCH_EXTENSIONS_DIR"), Path.home() / ".cache" / "nanodir"):
        if root and (os.access(root, os.W_OK) or not Path(root).exists() and os.access(Path(root).parent.parent, os.W_OK)):
            return Path(root)
    return Path(tempfile.gettempdir()) / f"nanodir-{os.getuid()}"


def cpu():
    """What -march=native depends on: a home folder may be shared by machines with different processors."""
    with contextlib.suppress(OSError, StopIteration):
        return next(line for line in open("/proc/cpuinfo") if line.startswith(("flags", "Features")))
    return platform.processor() + platform.machine()


@contextlib.contextmanager
def locked(f):
    import fcntl
    fcntl.flock(f, fcntl.LOCK_EX)
    yield
