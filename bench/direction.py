"""python bench.py --suite=direction: milliseconds of one denoising step of the networks of --suite=flops."""
import functools
from dataclasses import replace

import torch

import bench
import model as nets
from bench import alternated, attention_baseline, from_file, table

def directions():
    """Every direction at C=256, N=64, four layers, and attention of the two-way network's size."""
    base = nets.ModelConfig(n_layer=4, n_embd=256, head_size=64, vocab_size=256, direction="causal")
    blocks = {f"block {n}": replace(base, direction="block", block_size=n) for n in (32, 64, 128)}
    two_way, alternate = replace(base, direction="bidirectional"), replace(base, direction="alternate")
    return {"causal": base, **blocks, "alternate": alternate, "bidirectional": two_way,
            "attention baseline": attention_baseline(two_way)}

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
    attention = ms["attention baseline"]
    for name, row in ms.items():
        rows[name] = {f"T={T}": f"{t:.1f} ({t / attention[T]:.2f}x)" for T, t in row.items()}
    table(f"one denoising step, batch 1, C=256, N=64, four layers, {torch.get_num_threads()} threads, "
          f"{'bf16' if half else 'fp32'}: ms (multiple of attention's)",
          " | ".join(["network", *rows["causal"]]), " | ".join(f"{{{T}}}" for T in rows["causal"]), rows)
    return ms
