"""Choosing a back end, and compiling the kernels on first use."""
import contextlib
import functools
import hashlib
import os
import platform
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

BACK_ENDS = ("auto", "cuda", "cpp", "torch", "loop")
KERNELS = {"cpu": "cpp", "cuda": "cuda"}                # device -> the compiled back end that runs there
TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"    # torch 2.11's stable ABI, for all later ones too
NONE = torch.empty(0)

def backend(device, kind=torch.float32):
    """Which of BACK_ENDS serves `device` ("cpu", "cuda", ...). WKV_IMPL forces one: ValueError with the
    compiler's last lines if it cannot be built. `auto` falls back to plain torch and says so once."""
    asked = os.environ.get("WKV_IMPL", "auto")
    if asked not in BACK_ENDS:
        raise ValueError(f"WKV_IMPL={asked!r} is unknown: choose one of {', '.join(BACK_ENDS)}")
    if asked in ("torch", "loop"):
        return asked
    if kind == torch.float64:           # the kernels are float32; float64 is for checking
        return "torch"
    own = KERNELS.get(device)
    name = own if asked == "auto" else asked
    reason = build(name) if name else f"there is no kernel for {device}"
    if not reason and name != own:
        reason = f"that kernel does not run on {device}"
    if not reason:
        return name
    if asked != "auto":
        repair = "unset it, or use WKV_IMPL=torch, which needs no compiler"
        raise ValueError(f"WKV_IMPL={asked}: {reason}; {repair}")
    say(f"wkv: plain torch on {device}, slower than a kernel: {reason}")
    return "torch"

# What torch.compiler.assume_constant_result sets (the choice is made once, outside any compiled graph),
# without its import of the whole compiler, which takes a second.
backend._dynamo_marked_constant = True

def call(kernel, numbers, tensors, eps=0.0):
    """Run a kernel on tensors, among them the contiguous buffers that it fills; None: there is none."""
    device = next(x.device for x in tensors if x is not None)
    tensors = [NONE if x is None else x.contiguous() for x in tensors]
    if KERNELS[device.type] == "cpp":
        return torch.ops.nanodir_kernel.run(kernel, numbers, eps, tensors)
    with stream_of(device) as stream:
        torch.ops.nanodir_cuda.run(kernel, (*numbers, stream), eps, tensors)

@contextlib.contextmanager
def stream_of(device):
    """Makes a GPU the current one -> its current stream as a number."""
    with torch.cuda.device(device):
        yield torch.cuda.current_stream().cuda_stream

@functools.cache
def say(line):
    """Print a line once."""
    print(line, file=sys.stderr, flush=True)

@functools.cache
def build(name):
    """Compile (first use on this machine) and load the kernels "cpp" or "cuda" -> "", or why they cannot be
    had, with the repair."""
    if name == "cuda" and not torch.version.cuda:
        return "this torch is built without CUDA"
    if name == "cuda" and not torch.cuda.is_available():
        return "torch sees no GPU (nvidia-smi, CUDA_VISIBLE_DEVICES)"
    from torch.utils.cpp_extension import get_cxx_compiler
    compiler = get_cxx_compiler()
    if not shutil.which(compiler):
        return f"the C++ compiler {compiler!r} is not installed (Debian, Ubuntu: apt install g++)"
    with contextlib.suppress(ImportError):  # ninja's wheel may be installed, yet not on PATH
        import ninja
        os.environ["PATH"] += os.pathsep + ninja.BIN_DIR
    if not shutil.which("ninja"):
        return "ninja is not installed (pip install ninja)"
    try:
        build_cuda() if name == "cuda" else build_cpp(compiler)
        return ""
    except Exception as e:                  # whatever a compiler, a disk or a loader can do
        tail = " | ".join([line for line in str(e).splitlines() if line.strip()][-3:])[-600:]
        if "-lcudart" in str(e):            # nvcc was only a link to it
            tail += "; set CUDA_HOME to the toolkit's own folder, such as /usr/local/cuda"
        return f"the {TITLES[name]} kernels did not build: {tail}"

def build_cuda():
    here = Path(__file__).parent
    sources = [*here.glob("*.cu"), here / "bindings.cpp"]
    compiled("nanodir_cuda", sources, ["-O3", TARGET, "-DDEVICE=CUDA"], ["-O3", *gpu_flags()])

def build_cpp(compiler):
    sources = list(Path(__file__).parent.glob("*.cpp"))
    flags = ["-O3", TARGET, "-fno-math-errno", "-falign-loops=64", "-Wno-psabi"]
    native = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"
    try:
        compiled("nanodir_cpp", sources, [*flags, native])
    except Exception:
        knows = subprocess.run([compiler, native, "-E", "-x", "c++", os.devnull], capture_output=True)
        if knows.returncode == 0:
            raise
        say(f"wkv: {compiler} does not know {native}, "
            "so the kernels use what every processor of this kind has, and are slower")
        compiled("nanodir_any", sources, flags)         # torch builds a name once per process

TITLES = {"cpp": "C++", "any": "C++", "cuda": "CUDA"}

def compiled(name, sources, flags, nvcc_flags=(), **options):
    """Compile the sources (Paths) into a library, unless that has been done before, and load it -> its path.
    Raises what the compiler does."""
    import fcntl
    from torch.utils.cpp_extension import get_cxx_compiler, load
    sources = sorted(sources, reverse=True)
    folders = sorted({f.parent for f in sources})
    texts = [f.read_text() for folder in folders for f in sorted(folder.glob("*.[ch]*"))]
    versions = torch.__version__, str(torch.version.cuda), get_cxx_compiler(), cpu()
    key = hashlib.sha256("\0".join([*texts, *flags, *nvcc_flags, *versions]).encode()).hexdigest()[:16]
    folder = build_root() / f"{name}-{key}"
    library, done = folder / f"{name}.so", folder / "done"      # done: vouches for the library
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "flock", "w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)           # other processes wait here; the lock dies with its owner
        if not done.exists() or done.read_text() != digest(library):
            (folder / "lock").unlink(missing_ok=True)           # torch's own, left by a killed build
            for old in [done, *folder.glob("*.o"), *folder.glob("*.so"), *folder.glob(".ninja*")]:
                old.unlink(missing_ok=True)
            started = time.time()
            load(name, [str(f) for f in sources], extra_cflags=flags, extra_cuda_cflags=list(nvcc_flags),
                 build_directory=str(folder), is_python_module=False, **options)
            if not digest(library):
                raise OSError(f"{get_cxx_compiler()} said that it was done, but there is no {library}")
            done.write_text(digest(library))
            title = TITLES.get(name[8:], name)
            say(f"wkv: built the {title} kernels in {time.time() - started:.1f} s ({folder})")
    torch.ops.load_library(str(library))
    return library

def digest(file):
    """Size and sha256 of a file as text, "" if there is none or nothing in it."""
    content = file.read_bytes() if file.is_file() else b""
    return f"{len(content)} {hashlib.sha256(content).hexdigest()}" if content else ""

def gpu_flags():
    """What nvcc must be told to compile for the GPU at hand and, as PTX, for later ones; for one that it does
    not know, PTX of the latest it does. ValueError: no toolkit, another CUDA than torch's, an old GPU."""
    from torch.utils.cpp_extension import CUDA_HOME
    wanted = torch.version.cuda
    if not CUDA_HOME:
        raise ValueError("there is no CUDA toolkit: "
                         f"install that of CUDA {wanted}, or set CUDA_HOME to its folder")
    nvcc = Path(CUDA_HOME, "bin", "nvcc")
    if not nvcc.exists():
        raise ValueError(f"there is no {nvcc}: set CUDA_HOME to the folder of a toolkit of CUDA {wanted}")
    ask = lambda option: subprocess.run([nvcc, option], capture_output=True, text=True, check=True).stdout
    major, minor = re.search(r"release (\d+)\.(\d+)", ask("--version")).groups()
    if major != wanted.split(".")[0]:
        raise ValueError(f"{nvcc} is of CUDA {major}.{minor}, torch of {wanted}: "
                         "set CUDA_HOME to the folder of a toolkit of that CUDA")
    major, minor = torch.cuda.get_device_capability()
    gpu = 10 * major + minor
    if gpu < 80:
        raise ValueError("the kernels need a GPU of compute capability 8.0 (A100) or later, "
                         f"{torch.cuda.get_device_name()} has {major}.{minor}")
    known = max(n for n in map(int, re.findall(r"compute_(\d+)", ask("--list-gpu-arch"))) if n <= gpu)
    codes = [f"compute_{known}", f"sm_{gpu}"] if known == gpu else [f"compute_{known}"]
    return [token for code in codes for token in ("-gencode", f"arch=compute_{known},code={code}")]

def build_root():
    """Where builds are kept: TORCH_EXTENSIONS_DIR, else the user's cache, else the temporary folder.
    OSError: the one there is another user's, who could have put any library in it."""
    home = Path(os.path.expanduser("~"))                # Path.home() raises where nobody knows
    roots = [os.environ.get("TORCH_EXTENSIONS_DIR"), home.is_absolute() and home / ".cache" / "nanodir"]
    for root in (Path(x) for x in roots if x):
        if os.access(root, os.W_OK) or not root.exists() and os.access(root.parent.parent, os.W_OK):
            return root
    me = os.getuid() if hasattr(os, "getuid") else "user"
    root = Path(tempfile.gettempdir()) / f"nanodir-{me}"
    with contextlib.suppress(FileExistsError):
        root.mkdir(mode=0o700)
    found = root.lstat()
    if not stat.S_ISDIR(found.st_mode) or me not in ("user", found.st_uid) or found.st_mode & 0o077:
        raise OSError(f"{root} is not a folder of yours alone (mode 0700): "
                      "remove it, or set TORCH_EXTENSIONS_DIR to a folder of yours")
    return root

def cpu():
    """What -march=native depends on: a home folder may be shared by machines with different processors."""
    with contextlib.suppress(OSError, StopIteration):
        return next(line for line in open("/proc/cpuinfo") if line.startswith(("flags", "Features")))
    return platform.processor() + platform.machine()
