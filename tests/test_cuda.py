"""The GPU kernels without a GPU: compiled by nvcc, and run on the CPU by tests/cuda_on_cpu.h against the float64 twins."""
import contextlib
import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import test_biwkv
import test_wkv7
from conftest import ROOT
from wkv_cuda import biwkv, biwkv_loop, loader, wkv7, wkv7_loop

KERNELS = Path(ROOT, "wkv_cuda")


@pytest.fixture(scope="session")
def emulator():
    if not shutil.which("g++"):
        pytest.skip("g++ compiles the emulator")
    tests = Path(ROOT, "tests")
    sources = [*KERNELS.glob("*.cu"), KERNELS / "bindings.cpp", tests / "emulator.cpp"]
    flags = ["-O1", "-x", "c++", "-include", str(tests / "cuda_on_cpu.h"), "-DDEVICE=CPU", loader.TARGET]
    return ctypes.CDLL(str(loader.compiled("emulated", sources, flags, with_cuda=False)))


@pytest.fixture
def cuda(emulator, monkeypatch):
    """CPU tensors go to the GPU kernels, through all that is Python around them."""
    monkeypatch.setitem(loader.KERNELS, "cpu", "cuda")
    monkeypatch.setattr(loader, "build", lambda name: "")
    monkeypatch.setattr(loader, "stream_of", lambda device: contextlib.nullcontext(0))
    monkeypatch.setenv("WKV_IMPL", "cuda")
    yield emulator
    emulator.emulator_order(0)
    emulator.emulator_skip(0)


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
