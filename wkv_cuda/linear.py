"""Matrices kept in few bits, for inference: what limits a network that makes one token at a time is how fast
its weights come from memory."""
import torch
import torch.nn.functional as F

from .loader import backend, call
from .operators import wants_grad

KEPT = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
FEW = 32        # rows that the kernel is for: with more, a product of matrices in float32 is faster

class KeptLinear(torch.nn.Module):
    """x W^T, x (...,K) floating point -> (...,N) in x's dtype, W (N,K) kept as a row of KEPT; int8 with a
    scale for each row, its largest number / 127. On a CPU the weights lie as linear.cpp reads them."""

    def __init__(self, weight, kind):
        super().__init__()
        self.K, kept, scale = weight.shape[1], weight.detach().float(), None
        if kind == "int8":
            scale = kept.abs().amax(1).clamp_min(1e-30) / 127
            kept = (kept / scale[:, None]).round()
        kept = kept.to(KEPT[kind])
        self.parts = 4 // kept.itemsize
        if kept.device.type == "cpu":
            kept = F.pad(kept, (0, -self.K % 64)).unflatten(1, (-1, self.parts, 16)).mT.flatten(1)
        self.register_buffer("weight", kept.contiguous())
        self.register_buffer("scale", scale)

    def plain(self):
        """W (N,K), but for its scale."""
        if self.weight.device.type != "cpu":
            return self.weight
        return self.weight.unflatten(1, (-1, 16, self.parts)).mT.flatten(1)[:, :self.K]

    def forward(self, x):
        rows, (N, K) = x.numel() // self.K, self.weight.shape
        if rows > FEW or wants_grad(x) or backend(x.device.type, x.dtype) != "cpp":
            y = F.linear(x, self.plain().to(x.dtype))
            return y if self.scale is None else y * self.scale.to(x.dtype)
        y = torch.empty(*x.shape[:-1], N)
        given = x.float() if K == self.K else F.pad(x.float(), (0, K - self.K))
        call("linear", (rows, K, N, self.parts), (given, self.weight, self.scale, y))
        return y.to(x.dtype)
