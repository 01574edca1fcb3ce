"""The recurrences and what surrounds them in a block. The back end is chosen per call from the device and
WKV_IMPL=auto|cuda|cpp|torch|loop: compiled kernels (built on first use), a plain-torch form (any device, no
compiler), or, for the recurrences, a loop over tokens (the definition)."""
from .biwkv import biwkv
from .block import read_state, shift_mix, squared_relu, wkv7_inputs, wkv7_leaky, wkv7_mix, wkv7_output
from .definitions import HEAD_SIZES, biwkv_loop, biwkv_torch, wkv7_loop, wkv7_torch
from .linear import KEPT, KeptLinear
from .loader import BACK_ENDS, backend, build
from .wkv7 import IMPLS, wkv7

__all__ = ["BACK_ENDS", "HEAD_SIZES", "IMPLS", "KEPT", "KeptLinear", "backend", "biwkv", "biwkv_loop",
           "biwkv_torch", "build", "read_state", "shift_mix", "squared_relu", "wkv7", "wkv7_inputs",
           "wkv7_leaky", "wkv7_loop", "wkv7_mix", "wkv7_output", "wkv7_torch"]
