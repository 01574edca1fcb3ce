"""python bench.py --suite=official: tokens one by one, as when a text is generated, from random weights in
the layout of official RWKV-7 files: this repository by kind of weights, beside the rwkv package."""
import contextlib
import functools
import os
import sys
import tempfile

import torch

import bench
import model as nets
from bench import alternated, from_file, parameters, table

SIZES = {"0.1B": (12, 768), "0.4B": (24, 1024)}             # layers, channels
QUICK = {"tiny": (2, 128)}
TOKENS = 8                                                  # in a timed piece

def random_weights(layers, channels, path):
    """As a trained network's: no matrix is zero."""
    cfg = nets.ModelConfig(n_layer=layers, n_embd=channels, head_size=64, direction="causal",
                           vocab_size=1000 if bench.quick else 65536)
    net = nets.Denoiser(cfg)
    for p in net.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.02)
    nets.save_checkpoint(path, nets.official_weights(net, torch.bfloat16))
    return parameters(cfg)

def package(path):
    """The rwkv package's network as a function of token and state; None if it is not installed."""
    os.environ |= {"RWKV_V7_ON": "1", "RWKV_JIT_ON": "1", "RWKV_CUDA_ON": "0"}
    try:
        from rwkv.model import RWKV
    except ImportError:
        return print("  (pip install rwkv for the comparison)")
    with contextlib.redirect_stdout(sys.stderr):
        net = RWKV(path.removesuffix(".pth"), "cpu fp32")
    return lambda i, state: net.forward([i], state)

def ours(path, kind):
    net = nets.from_pretrained(path, direction="causal").eval()
    nets.keep_weights(net, kind)

    def step(i, state):
        out = net(torch.tensor([[i]]), state=state, finished_text=True)
        return out.logits[0, -1], out.state
    return step

@torch.no_grad()
def piece(step):
    """TOKENS tokens one after the other -> the last one's logits."""
    state = None
    for i in range(1, TOKENS + 1):
        logits, state = step(i, state)
    return logits

def measured(steps, title, n, workers):
    """{name: step} of a network of n parameters, with so many threads -> rows of the table."""
    torch.set_num_threads(workers)
    rows = {}
    logits = {name: piece(step) for name, step in steps.items()}
    first, fp32 = next(iter(logits.values())), logits["nanoDiR, fp32"]
    jobs = {name: functools.partial(piece, step) for name, step in steps.items()}
    ms = alternated(jobs, 5 * bench.rounds)
    for name, taken in ms.items():
        speed = 1e3 * TOKENS / taken
        rows[f"{title}, {name}"] = row = dict(
            parameters=n, tokens_per_s=speed, ratio=ms[next(iter(ms))] / taken,
            to_fp32=ms["nanoDiR, fp32"] / taken,
            off=((logits[name] - (first if "fp32" in name else fp32)).norm() / fp32.norm()).item())
        print(f"  {title}, {name}: {row['tokens_per_s']:.1f} tokens/s", flush=True)
    return rows

def suite():
    found, rows = dict(from_file("wkv").processor()), {}
    for size, shape in (QUICK if bench.quick else SIZES).items():
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "x.pth")
            n = random_weights(*shape, path)
            steps = {"rwkv package, fp32": package(path)}
            steps |= {f"nanoDiR, {kind}": ours(path, kind) for kind in ("fp32", "bf16", "int8")}
        steps = {name: step for name, step in steps.items() if step}
        for workers in (1, 2):
            rows |= measured(steps, f"{size}, threads {workers}", n, workers)
    table("tokens one by one; the logits' distance from the package's, or of fewer bits from fp32",
          "network | parameters | tokens/s | times the package | times own fp32 | logits differ by",
          "{parameters:.0M} | {tokens_per_s:.1f} | {ratio:.2f} | {to_fp32:.2f} | {off:.1e}", rows)
    return {**found, "rows": rows}
