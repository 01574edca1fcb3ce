"""The recurrences. The back end is chosen per call from the device and WKV_IMPL=auto|cuda|cpp|torch|loop: compiled kernels (built on
first use), a plain-torch form (any device, no compiler), or a loop over tokens (the definition)."""
from .loader import BACK_ENDS, backend, build
from .wkv7 import HEAD_SIZES, IMPLS, wkv7, wkv7_loop, wkv7_torch

__all__ = ["BACK_ENDS", "HEAD_SIZES", "IMPLS", "backend", "build", "wkv7", "wkv7_loop", "wkv7_torch"]
