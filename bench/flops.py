"""python bench.py --suite=flops: FLOPs per token in every direction, against a counted run."""
import math

import torch

import bench
import model as nets
import wkv_cuda
from bench import from_file, parameters, table

def counted_flops(cfg, T):
    """The same, counted by torch.utils.flop_counter in a pass that is really run."""
    from torch.utils.flop_counter import FlopCounterMode
    def kernel(name, numbers, *args, **kwargs):                      # their numbers: B, T, H, N, ...
        return 9 * math.prod(numbers[:3]) * numbers[3] ** 2 if name in ("wkv7", "wkv7_mix") else 0
    def attention(q, k, v, *args, **kwargs):                         # torch counts attention on GPUs only
        return 4 * math.prod(q) * k[2]
    formulas = {torch.ops.nanodir_kernel.run: kernel,
                torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention}
    net = nets.Denoiser(cfg).eval()
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        net(torch.zeros(1, T, dtype=torch.long))
    return counter.get_total_flops() / T

def suite():
    if reason := wkv_cuda.build("cpp"):
        raise ValueError(f"the count runs the C++ kernel: {reason}")
    found, rows, lengths = {}, {}, (512, 2048, 8192)
    for name, cfg in from_file("direction").directions().items():
        flops = {T: nets.flops_per_token(cfg, T) for T in lengths}
        counted = lengths[:1] if bench.quick else lengths
        off = max(abs(counted_flops(cfg, T) / flops[T] - 1) for T in counted)
        found[name] = {"flops": flops, "off": off}
        rows[name] = {"parameters": parameters(cfg), "off": off, **{f"T={T}": flops[T] for T in lengths}}
    table("FLOPs per token, one denoising step",
          "network | parameters | T=512 | T=2048 | T=8192 | counted run differs by",
          "{parameters:.2M} | {T=512:.2M} | {T=2048:.2M} | {T=8192:.2M} | {off:.1%}", rows)
    return {"rows": found}
