"""One source of the CPU kernels for every processor: the machine code they become, and their values with vectors of every width."""
import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import torch

import test_biwkv
import test_block
import test_linear
import test_wkv7
import wkv_cuda
from conftest import ROOT
from wkv_cuda import loader

KERNELS = ("wkv7", "block", "biwkv", "linear")
SOURCES = [Path(ROOT, "wkv_cuda", f"{name}.cpp") for name in KERNELS]
FLAGS = ["-std=c++20", "-fno-math-errno", "-Wno-psabi"]
GCC, CLANG, ARM = "g++", "clang++", "aarch64-linux-gnu-g++"
TARGETS = {"haswell": (GCC, "-march=haswell"), "haswell, clang": (CLANG, "-march=haswell"), "skylake-avx512": (GCC, "-march=skylake-avx512"),
           "icelake-server": (GCC, "-march=icelake-server"), "x86-64": (GCC, "-march=x86-64"), "aarch64": (ARM, "-march=armv8-a")}
# what a compiler falls back on for vectors that the target does not have: one lane at a time
LANES = {GCC: r"vpextrd|vpinsrd|vextractps|vinsertps|pextrd|pinsrd|extractps|insertps", ARM: r"umov\s+w|ins\s+v\d+\.s|mov\s+v\d+\.s\[|tbl\s"}


def need(*programs):
    for program in programs:
        if not shutil.which(program):
            pytest.skip(f"{program} is not installed")


def compile_each(compiler, flags, sources, tmp_path, ending):
    """Every source apart, at the same time -> what they become."""
    outs = [tmp_path / f"{source.stem}{ending}" for source in sources]
    jobs = [subprocess.Popen([compiler, *FLAGS, *flags, source, "-o", out]) for source, out in zip(sources, outs)]
    assert not any(job.wait() for job in jobs)
    return outs


@pytest.mark.parametrize("target", TARGETS)
def test_no_vector_is_taken_apart_lane_by_lane(target, tmp_path):
    compiler, march = TARGETS[target]
    need(compiler)
    for code in compile_each(compiler, ["-O2", march, "-S"], SOURCES, tmp_path, ".s"):
        found = re.findall(rf"^\s+({LANES.get(compiler, LANES[GCC])}).*", code.read_text(), re.M)
        assert not found, (code.stem, len(found), found[:3])


def program(compiler, flags, tmp_path):
    """The kernels and tests/kernel_main.cpp as one program -> its path."""
    objects = compile_each(compiler, ["-O1", "-c", *flags], [*SOURCES, Path(ROOT, "tests", "kernel_main.cpp")], tmp_path, ".o")
    subprocess.run([compiler, *flags, *objects, "-o", tmp_path / "kernels"], check=True)
    return tmp_path / "kernels"


def through(command):
    """loader.call in a process: the kernel's buffers go in and come back."""
    def call(kernel, numbers, tensors, eps=0.0):
        tensors = [loader.NONE if x is None else x.contiguous() for x in tensors]
        raw = [x.view(-1).view(torch.uint8).numpy() if x.numel() else b"" for x in tensors]
        message = [struct.pack(f"<q{len(numbers)}qdq", len(numbers), *map(int, numbers), eps, len(raw))]
        for x, data in zip(tensors, raw):
            message += [struct.pack("<qq", len(data), x.dtype == torch.bfloat16), bytes(data)]
        done = subprocess.run([*command, kernel], input=b"".join(message), capture_output=True, check=True)
        at = 0
        for x, data in zip(tensors, raw):
            if len(data):
                x.copy_(torch.frombuffer(bytearray(done.stdout[at:at + len(data)]), dtype=x.dtype).view(x.shape))
            at += len(data)
    return call


WIDTHS = {"4 floats": (GCC, ["-march=native", "-DWIDTH=4"], []), "8 floats": (GCC, ["-march=native", "-DWIDTH=8"], []),
          "16 floats": (GCC, ["-march=native", "-DWIDTH=16"], []), "x86-64": (GCC, ["-march=x86-64"], []),
          "aarch64": (ARM, ["-static"], ["qemu-aarch64"])}


@pytest.mark.parametrize("width", WIDTHS)
def test_every_width_computes_the_definitions(width, tmp_path, monkeypatch):
    """Every kernel, forward and backward, all head sizes, against plain torch in float64; bfloat16 rows, too."""
    compiler, flags, emulator = WIDTHS[width]
    need(compiler, *emulator)
    call = through([*emulator, program(compiler, flags, tmp_path)])
    monkeypatch.setattr(wkv_cuda.operators, "call", call)
    monkeypatch.setattr(wkv_cuda.linear, "call", call)
    monkeypatch.setattr(loader, "build", lambda name: "")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    for N in wkv_cuda.HEAD_SIZES:
        x = test_wkv7.inputs(2, 21, 2, N)
        found, wanted = (test_wkv7.outputs_and_gradients(f, x, 5, dtype) for f, dtype in
                         ((wkv_cuda.wkv7, torch.float32), (wkv_cuda.wkv7_loop, torch.float64)))
        test_wkv7.close(found, wanted, 1e-5)
        for op in ("wkv7_inputs", "wkv7_output", "read_state"):
            test_block.check(*test_block.case(op, 2, 9, N, 2 * N))
        mixed = test_block.mix_case(2, 21, N, 2 * N, True)
        with torch.no_grad():
            a, b = (wkv_cuda.wkv7_mix(**test_block.in_dtype(mixed, dtype), every=5) for dtype in (torch.float32, torch.float64))
        assert all((p - q).norm() <= 1e-5 * q.norm() for p, q in zip(a, b))
    for op in test_block.OPS:
        test_block.check(*test_block.case(op, 3, 7))
    for kind in wkv_cuda.KEPT:
        for shape in test_linear.SHAPES:
            test_linear.check(kind, *shape)
    x = test_biwkv.inputs(2, 9, 20, True)                  # no multiple of any width
    test_biwkv.close(*(test_biwkv.output_and_gradients(f, x, dtype) for f, dtype in
                       ((wkv_cuda.biwkv, torch.float32), (wkv_cuda.biwkv_loop, torch.float64))))
