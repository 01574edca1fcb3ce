"""python bench.py --suite=convert: an autoregressive network, trained here on the Python files of torch and
saved as official RWKV-7 weights are, becomes a block-diffusion model by config/convert.py; one from scratch
beside it, as many steps."""
import os
import subprocess
import sys

import torch

import bench
import data
import diffusion
import model as nets
from bench import Run, by_name, checkpoint, chosen, quality, spread, table, trained

BLOCKS = (1, 4, 16)
METRICS = {f"block {n}": f"bits_per_char_block_{n}" for n in BLOCKS}
SEEDS = (1337, 1338, 1339)
ALL = ["--freeze_backbone=0", "--adapter_rank=0", "--next_weight=0.5"]       # learns
# beside what config/convert.py says: does it begin with the pretrained weights? and options
KINDS = {"converted, all learns": (True, ALL), "converted, backbone frozen": (True, []),
         "from scratch": (False, ALL)}

def command(*arguments):
    subprocess.run([sys.executable, *arguments], check=True)

def common(work):
    """The text, its tokenizer and the sizes: 5.7 M parameters."""
    vocabulary, tokens = os.path.join(work, "bpe.json"), os.path.join(work, "tokens")
    if not os.path.exists(os.path.join(tokens, "meta.json")):
        code = os.path.join(torch.__path__[0], "nn" if bench.quick else "")     # 46 MB, the same for everyone
        text = [f"--data_path={bench.data_path or code}", "--pattern=*.py,*.txt,*.md"]
        command("data.py", "train-bpe", *text, "--vocab_size=1024", f"--out={vocabulary}")
        command("data.py", "prepare", *text, f"--tokenizer=bpe:{vocabulary}", f"--out={tokens}")
    size = ["--batch_size=4", "--eval_iters=1"] if bench.quick else ["--batch_size=16", "--eval_iters=10"]
    return [f"--data_path={tokens}", f"--tokenizer=bpe:{vocabulary}", "--seq_len=128", *size,
            "--eval_interval=100000", "--start_token=0", "--recompute=0"]

def shapes():
    return ["--n_layer=6", f"--n_embd={64 if bench.quick else 256}", "--head_size=64"]

@torch.no_grad()
def kept(work):
    """Bits per character of the pretrained network by kind of weights."""
    saved, found = nets.load_checkpoint(checkpoint(work)), {}
    source = data.TextSource(saved["config"]["data_path"], 128)
    for kind in ("fp32", "bf16", "int8"):
        net = nets.from_pretrained("pretrained", saved).eval()
        nets.keep_weights(net, kind)
        form = diffusion.NextToken(diffusion.DiffusionConfig(objective="ar"), net.cfg)
        rows = source.eval_rows(32 if bench.quick else 320).x
        found[kind] = source.report(form.bound(net, x) for x in rows.split(16))["bits_per_char"]
    return found

def suite():
    work = os.path.join(bench.out, "convert-runs" + "-quick" * bench.quick)     # kept: a suite can go on
    os.makedirs(work, exist_ok=True)
    rows, steps = common(work), (8, 4) if bench.quick else (1000, 100)
    causal = [*rows, *shapes(), "--objective=ar", "--direction=causal", f"--max_iters={steps[0]}"]
    runs = {"pretrained": Run(causal, {"block 1": "bits_per_char"})}
    found = quality("convert", runs, work=work)
    pretrained, official = trained(runs, "pretrained", work), os.path.join(work, "official.pth")
    if not os.path.exists(official):
        command("sample.py", f"--ckpt={checkpoint(pretrained)}", f"--export={official}")
    for name in chosen(KINDS):
        start, options = KINDS[name]
        begin = [f"--init_from={official}"] if start else shapes()
        for seed in SEEDS[:1] if bench.quick else SEEDS:
            mine = [*begin, f"--max_iters={steps[1]}", f"--random_seed={seed}", *options]
            runs[f"{name}, seed {seed}"] = Run(["config/convert.py", *rows, *mine], METRICS)
    found |= quality("convert", {name: run for name, run in runs.items() if name != "pretrained"})
    shown = lambda key, values: spread(values, 3) if key in METRICS else values[0]
    cells = {name: {key: shown(key, values) for key, values in figures.items()}
             for name, figures in by_name(found).items()}
    table("bits per character: exact (block 1), at most (4 and 16)",
          "network | parameters | that learn | ms per step | block 1 | block 4 | block 16",
          "{parameters:.1M} | {active:.1M} | {ms:.0f} | {block 1} | {block 4} | {block 16}", cells)
    bits = kept(pretrained)
    table("the pretrained network by kind of weights", "weights | bits per character", "{bits:.4f}",
          {kind: {"bits": value} for kind, value in bits.items()})
    return {"runs": found, "kept": bits}
