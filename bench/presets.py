"""python bench.py --suite=presets: what each preset costs and reaches, and the curves of its training, beside
which --suite=curves sets those of other runs. One run after the other, each with all cores."""
import math
import os
import tempfile

import bench
import data
from bench import Run, read_log, table

PRESETS = {   # what stands behind `python train.py`: its options
    "(nothing set)": [], "--struct_task=1 --dw_jrt=1": ["--struct_task=1", "--dw_jrt=1"],
    "config/rwkv_adamw.py": ["config/rwkv_adamw.py", "--struct_task=1", "--dw_jrt=1"],
    "config/published.py": ["config/published.py", "--struct_task=1", "--dw_jrt=1", "--dw_jrt_scale=20"],
    "config/shakespeare.py": ["config/shakespeare.py"], "config/block.py": ["config/block.py"],
    "config/gaussian.py": ["config/gaussian.py"],
    "config/gaussian.py config/gaussian_evidence.py": ["config/gaussian.py", "config/gaussian_evidence.py"],
    "config/birwkv_llada.py": ["config/birwkv_llada.py"], "config/latent.py": ["config/latent.py"]}
REACHED = "struct_acc", "bits_per_char", "text_nats"

def curves(name, folder):
    """Of a run's log: [step, loss], [step, what it reaches], minutes of its steps, memory, settings."""
    first, *rows = read_log(folder)
    train, evals = ([row for row in rows if row["event"] == event] for event in ("train", "eval"))
    key = next((key for key in REACHED if key in evals[-1]), "val_loss")
    steps = [row["step"] + 1 for row in train]
    ms = sum(row["ms_per_step"] * n for row, n in zip(train, (b - a for a, b in zip([0, *steps], steps))))
    return {"loss": [[row["step"], round(row["loss"], 4)] for row in train], "reached": key,
            "evals": [[row["step"], round(row[key], 4)] for row in evals], "minutes": ms / 60e3,
            "memory_bytes": max(row["memory_bytes"] for row in train), "vocab_size": first["vocab_size"],
            "kind": kind_of(first["config"]), "steps": steps[-1]}

def kind_of(config):
    """Runs with the same one have losses that can be compared: objective, task, tokenizer."""
    tasks = [key for key, on in config.items() if key.endswith("_task") and on]
    return f"{config['objective'] or 'default'}, {tasks[0] if tasks else config['tokenizer']}"

def at(curve, step):
    """[[step, value]] -> the value at the step nearest to it, None if there is none within a tenth of it."""
    near, value = min(curve, key=lambda point: abs(point[0] - step))
    return value if abs(near - step) <= max(10, 0.1 * step) else None

def suite():
    with tempfile.TemporaryDirectory() as work:
        pairs = os.path.join(work, "latents")
        data.latents(bench.data_path, pairs, length=128)
        runs = {}
        for name in bench.chosen(PRESETS)[:2 if bench.quick else None]:
            few = ["--max_iters=10", "--batch_size=4", "--eval_iters=1"] if bench.quick else []
            options = PRESETS[name] + few
            path = pairs if name == "config/latent.py" else bench.data_path
            if "--struct_task=1" not in options and path and name != "(nothing set)":
                options = [*options, f"--data_path={path}"]
            runs[name] = Run(options)
        found = bench.quality("presets", runs, curves)
    shown(found)
    return {"runs": found}

def shown(found):
    rows = {name: dict(steps=run["steps"], minutes=run["minutes"], MiB=run["memory_bytes"] / 2**20,
                       parameters=run["parameters"], first=run["loss"][0][1], lnV=math.log(run["vocab_size"]),
                       at_100=at(run["loss"], 100) or math.nan,
                       reached=f"{run['reached'].replace('_', ' ')} {run['evals'][-1][1]:.3f}")
            for name, run in found.items()}
    table("presets",
          "python train.py | parameters | steps | minutes | MiB | loss at step 0 | ln V | at 100 | reaches",
          "{parameters:.2M} | {steps} | {minutes:.1f} | {MiB:.0f} | {first:.2f} | {lnV:.2f} | {at_100:.2f} | "
          "{reached}", rows)
