"""python bench.py --suite=direction: milliseconds of one denoising step of the networks of --suite=flops."""
import functools

import torch

import bench
import model as nets
from bench import BASELINE, alternated, directions, from_file, table

def suite():
    """In fp32, and where it is fast in bf16."""
    found, half = from_file("wkv").processor(), nets.fast_bf16(torch.device("cpu"))
    return {**found, "ms": direction_ms(False), "bf16_ms": direction_ms(True) if half else {}}

@torch.inference_mode()
def direction_ms(half):
    """{network: {T: milliseconds}} of one denoising step; half: bfloat16 matrix products."""
    networks, ms, rows = {name: nets.Denoiser(cfg).eval() for name, cfg in directions().items()}, {}, {}
    for T in (512, 2048) if bench.quick else (512, 2048, 8192, 16384):
        x = torch.randint(256, (1, T))
        jobs = {name: functools.partial(net, x) for name, net in networks.items()}
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            spent = alternated(jobs, max(3, bench.rounds * 12288 // (T + 512)))
        for name, t in spent.items():
            ms.setdefault(name, {})[T] = t
    for name, row in ms.items():
        rows[name] = {f"T={T}": f"{t:.1f} ({t / ms[BASELINE][T]:.2f}x)" for T, t in row.items()}
    table(f"one denoising step, batch 1, C=256, N=64, four layers, {torch.get_num_threads()} threads, "
          f"{'bf16' if half else 'fp32'}: ms (multiple of attention's)",
          " | ".join(["network", *rows[BASELINE]]), " | ".join(f"{{{T}}}" for T in rows[BASELINE]), rows)
    return ms
