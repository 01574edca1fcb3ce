"""Measure: speed of the kernels and of a training step, quality on tasks and on text. Tables on the screen, figures in bench/.

    python bench.py --suite=wkv         the recurrence: token loop, plain torch, C++ kernel; cold build of the kernel
    python bench.py --suite=step        a training step of the main job, against the token loop
    python bench.py --suite=published   the published command lines, DW_JRT=0 and 1, beside the published figures
    python bench.py --suite=tasks       the published tasks with this repository's defaults
    python bench.py --suite=flops       FLOPs per token of every direction and of attention, against a counted run
    python bench.py --suite=ablation    fusions and conditionings of a small two-way network on text, 300 steps
    python bench.py --suite=text        bits per character of networks of at most 1.05 M parameters, three budgets of steps
    python bench.py --suite=generate    what a generated block costs after 512 to 65,536 tokens of context
    python bench.py --suite=gaussian    Gaussian diffusion, one part of the recipe changed at a time, beside masked diffusion
    python bench.py --suite=latent      texts with latents: both directions, Stage II, language kept, embedding diffusion
    python bench.py --suite=direction   milliseconds of one denoising step of the networks of --suite=flops
    python bench.py --suite=gpu         kernels against float64, speed beside the GPU's limits, training, generation

A training run whose figures stand in the suite's JSON file is not repeated: a stopped suite goes on, another --out begins anew.
"""
from configurator import stoppable

if __name__ == "__main__":
    stoppable()
import contextlib
import functools
import itertools
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
import timeit
from dataclasses import replace
from typing import NamedTuple

import torch

import data
import diffusion
import model as nets
import wkv_cuda
from configurator import configure, one_line_errors

# ---- settings ----
suite = "step"              # which table
rounds = 3                  # [1, 1000] how often speed is measured, in turn; the median is shown
data_path = ""              # ablation, text, gaussian, latent: the text; empty = Python's standard library
out = "bench"               # folder of the tables as JSON
threads = 0                 # [0, 4096] CPU threads; 0 = torch's choice
only = ""                   # rows, separated by ; (tasks: whose name holds it; text: pace = step times; gpu: parts)
rwkv_lm = ""                # gpu: a checkout of RWKV-LM, whose own kernels are then measured in the same run
quick = False               # a twentieth of the steps and one seed: shows that a suite runs, measures nothing

# ---- training runs, their figures and tables ----

class Run(NamedTuple):
    """A run of train.py. metrics: {figure: name in the last row of the log}; start: the run whose checkpoint it starts from."""
    options: list
    metrics: dict = {}
    start: str = ""
    env: dict = {}

def train(options, folder, env={}):
    """Run train.py. ValueError for a wrong setting, RuntimeError with the last lines for what else fails."""
    command = [sys.executable, "train.py", f"--out_dir={folder}", f"--threads={threads}", "--log_sample=0", *options]
    done = subprocess.run(command, env=os.environ | {"WKV_IMPL": "auto"} | env, capture_output=True, text=True)
    if done.returncode == 2:
        raise ValueError(done.stderr.strip().splitlines()[-1].removeprefix("error: "))
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr[-400:]}")

def read_log(folder, event=""):
    """All rows of a run's log, or those of one event."""
    with open(os.path.join(folder, "log.jsonl")) as f:
        return [row for row in map(json.loads, f) if event in ("", row["event"])]

def step_ms(folder):
    """Milliseconds per training step, by interval of the log."""
    return [row["ms_per_step"] for row in read_log(folder, "train")]

def checkpoint(folder):
    return os.path.join(folder, "ckpt.pt")

def trained(runs, name, work):
    """The folder of a run below `work`. It and what it starts from are trained unless their checkpoints are there."""
    folder, run = os.path.join(work, f"quick {name}" if quick else name), runs[name]
    if not os.path.exists(checkpoint(folder)):
        start = [f"--init_from={checkpoint(trained(runs, run.start, work))}"] if run.start else []
        train(run.options + start, folder, run.env)
    return folder

def quality(suite, runs, measure=lambda name, folder: {}, names=None, work=""):
    """Train those of `runs`, {name: Run}, that the suite's JSON file lacks, and write their figures there at once: their
    metrics and what measure() finds. names: only these, and what they start from; work: the folder where the runs stay.
    -> {name: figures} of all in the file."""
    found = earlier(suite)
    for name in runs if names is None else names:
        if name in found:
            continue
        with contextlib.nullcontext(work) if work else tempfile.TemporaryDirectory() as place:
            folder = trained(runs, name, place)
            first, *_, last = read_log(folder)
            figures = {"parameters": first["parameters"], "active": first["active"], "ms": statistics.median(step_ms(folder))}
            figures |= {key: last[metric] for key, metric in runs[name].metrics.items() if metric in last}
            found[name] = figures | measure(name, folder)
        write(suite, {"runs": found})
        print(f"{name}: " + ", ".join(f"{k} {v}" for k, v in found[name].items() if not isinstance(v, list)), flush=True)
    return found

def earlier(suite):
    """{name: figures} of the runs of an earlier, perhaps unfinished suite."""
    if quick or not os.path.exists(where(suite)):
        return {}
    with open(where(suite)) as f:
        found = json.load(f)
    runs = found.get("runs") or found.get("rows") or found["acc"]          # older files of ablation, tasks and published
    if isinstance(runs, dict):
        return runs
    return {f"{row['task']}, {row['steps']} steps, {row['options'][0][2:]}, seed {1337 + i}": dict(acc=acc, exact=exact)
            for row in runs for i, (acc, exact) in enumerate(zip(row["acc"], row["exact"]))}

def where(suite, /, processor="", vector=None, **_):
    """The file of a suite's figures; speed by processor; a quick run must not replace measured figures."""
    kind = processor if vector is None else f"{processor} {32 * vector} bit"
    parts = [suite, re.sub(r"[^a-z0-9]+", "-", kind.lower()), "quick" if quick else "", "json"]
    return os.path.join(out, ".".join(filter(None, parts)))

def write(suite, result):
    """Keep a suite's figures as JSON -> its path."""
    os.makedirs(out, exist_ok=True)
    path, head = where(suite, **result), {"suite": suite, "torch": torch.__version__, "threads": torch.get_num_threads()}
    with open(path, "w") as f:
        json.dump(head | result | head, f, indent=1)
    return path

def chosen(names):
    return [name for name in names if not only or name in only.split(";")]

def if_quick(*options):
    return list(options) if quick else []

def seeded(runs, seeds):
    """{name: Run} with each of `seeds` seeds."""
    return {f"{name}, seed {seed}": run._replace(options=[*run.options, f"--random_seed={seed}"])
            for seed in range(1337, 1337 + seeds) for name, run in runs.items()}

def by_name(found):
    """{name, seed S: figures} -> {name: {figure: its values over the seeds}}."""
    names = {}
    for name, run in found.items():
        for key, value in run.items():
            names.setdefault(name.rpartition(", seed ")[0], {}).setdefault(key, []).append(value)
    return names

def spread(values):
    """Mean and standard deviation as text."""
    return f"{statistics.mean(values):.4f}" + (f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else "")

class Figure(float):
    """A number that can be formatted with a unit: f"{Figure(981120):.2M}" is "0.98 M"."""
    def __format__(self, form):
        scale = {"k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}.get(form[-1:])
        return f"{self / scale:{form[:-1]}f} {form[-1]}" if scale else super().__format__(form or "g")

def table(title, head, cells, rows):
    """Print {name: figures, a dict or a number}. head, cells: titles and formats of the columns, separated by |; in a format, {0} is
    the number or the dict. A cell whose figures are missing stays empty."""
    lines = [head.split(" | ")]
    for name, row in rows.items():
        known = {key: Figure(v) if isinstance(v, (int, float)) else v for key, v in (row if isinstance(row, dict) else {"": row}).items()}
        lines.append([name])
        for cell in cells.split(" | "):
            try:
                lines[-1].append(cell.format(known.get("", known), **known))
            except KeyError:
                lines[-1].append("")
    left, *widths = (max(map(len, column)) for column in zip(*lines))
    print(f"\n{title}")
    for name, *row in lines:
        print("  ".join(["", name.ljust(left), *(cell.rjust(width) for cell, width in zip(row, widths))]), flush=True)

def plot(name, title, curves):
    """{label: (steps, values)} as out/NAME.png, if matplotlib is there."""
    try:
        import matplotlib
    except ImportError:
        return print("  (pip install matplotlib for the curves)")
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, ax = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for i, (label, (steps, values)) in enumerate(curves.items()):
        ax.plot(steps, values, "-" if i < 10 else "--", label=label)        # there are ten colours
    ax.set(title=title, xlabel="step")
    ax.legend(fontsize=7, ncols=2)
    figure.savefig(where(name).replace(".json", ".png"), dpi=100)

# ---- quality: tasks ----

def suite_published():
    """One seed, accuracy by step."""
    shorter = 20 if quick else 1
    settings = ("STRUCT_TASK=1 STRUCT_EVAL=1 STRUCT_LEN=8 TRAIN=1 GEN_TOKENS=1 SEQ_LEN=64 N_LAYER=2 N_EMBD=128 HEAD_SIZE=32 "
                f"BATCH_SIZE=32 DEVICE_BSZ=8 MAX_ITERS={1000 // shorter} EVAL_INTERVAL={200 // shorter} EVAL_ITERS=20 "
                "WARMDOWN_ITERS=200 DW_JRT_SCALE=20")
    env = dict(setting.split("=") for setting in settings.split())
    with tempfile.TemporaryDirectory() as weights:
        runs = {jrt: Run([], env=env | {"DW_JRT": jrt, "WEIGHTS_PATH": f"{weights}/{jrt}.pt"}) for jrt in "01"}
        found = quality("published", runs, lambda name, folder: {
            str(row["step"] * shorter): row["struct_acc"] for row in read_log(folder, "eval")})
    published = {200: (0.5181, 0.6191), 400: (0.3281, 0.6531), 600: (0.5494, 0.7262), 800: (0.5525, 0.8153), 1000: (0.5444, 0.9244)}
    rows = {str(step): dict(old0=old[0], old1=old[1], new0=found["0"][str(step)], new1=found["1"][str(step)])
            for step, old in published.items()}
    table("struct acc, published command lines", "step | DW_JRT=0 published | here | DW_JRT=1 published | here",
          "{old0} | {new0:.4f} | {old1} | {new1:.4f}", rows)
    return {"runs": found}

def suite_tasks():
    """Accuracy and exact match on the fixed evaluation set."""
    dw_jrt, two_way, gaussian = "dw_jrt=1", "direction=bidirectional", "objective=gaussian"
    rows = [("struct", 1000, 3, dw_jrt, "0.5919 / 0.0000"), ("struct", 200, 3, dw_jrt, "0.7450"),
            ("rightcopy", 200, 3, dw_jrt, "0.7181"), ("rightrev", 200, 3, dw_jrt, "0.7731"),
            ("index", 1000, 1, dw_jrt, "0.34 (200 steps)"), ("add", 1000, 1, dw_jrt, "0.11 (200 steps)"),
            ("struct", 1000, 3, gaussian, ""), ("struct", 200, 3, two_way, ""), ("rightcopy", 200, 3, two_way, ""),
            ("rightrev", 200, 3, two_way, "")]
    runs, published = {}, {}
    for task, steps, seeds, option, accuracy in rows:
        steps, seeds = (steps // 20, 1) if quick else (steps, seeds)
        name = f"{task}, {steps} steps, {option}"
        published[name] = accuracy
        options = [f"--{task}_task=1", f"--{option}", f"--max_iters={steps}", "--eval_interval=100000"]
        if only in name:
            runs |= seeded({name: Run(options, {"acc": f"{task}_acc", "exact": f"{task}_exact"})}, seeds)
    found = quality("tasks", runs)
    rows = {name: dict(seeds=len(run["acc"]), acc=spread(run["acc"]), exact=spread(run["exact"]), old=published.get(name, ""))
            for name, run in by_name(found).items()}
    table("default settings, mean ± standard deviation over seeds", "task | seeds | accuracy | exact | published",
          "{seeds} | {acc} | {exact} | {old}", rows)
    return {"runs": found}

# ---- quality: text ----

BITS = {"bits": "bits_per_char", "se": "bits_per_char_se"}

def suite_ablation():
    """A spike is a step whose gradient norm is over twice the median of the ten before it, counted after step 50."""
    common = (f"--direction=bidirectional --n_layer=3 --n_embd=128 --seq_len=128 --batch_size=16 --max_iters={15 if quick else 300} "
              f"--log_interval=1 --eval_interval=100000 --eval_iters={2 if quick else 20}").split()
    changes = [f"fusion={f}, tied={t}" for f in nets.FUSIONS for t in (0, 1)] + [f"time_cond={c}" for c in nets.TIME_CONDS]
    runs = {}
    for name in changes:
        options = ["--" + option.replace("tied", "tie_directions") for option in name.split(", ")]
        runs[name] = Run([*options, f"--data_path={data_path}", *common], BITS)

    def measure(name, folder):
        steps = read_log(folder, "train")
        norms = [row["grad_norm"] for row in steps]
        spikes = sum(norms[i] > 2 * statistics.median(norms[i - 10:i]) for i in range(50, len(norms)))
        return dict(spikes=spikes, loss=[round(row["loss"], 4) for row in steps], grad_norm=[round(n, 3) for n in norms])
    found = quality("ablation", runs, measure)
    rows = {name: run | dict(last=statistics.mean(run["loss"][-50:]), largest=max(run["grad_norm"][50:] or run["grad_norm"]))
            for name, run in found.items()}
    table("bidirectional RWKV-7 on text, 300 steps (loss curves and gradient norms are in the JSON file)",
          "setting | parameters | bits per character | last loss | spikes | largest norm | ms per step",
          "{parameters:.0k} | {bits:.3f} ± {se:.3f} | {last:.3f} | {spikes} | {largest:.1f} | {ms:.0f}", rows)
    return {"runs": found}

def text_networks():
    """{name: options beside config/shakespeare.py}."""
    causal, one_sided = "--direction=causal --ffn_shift=before", "--tie_directions=1 --ffn_shift=before"
    two_way, deep = "--direction=bidirectional", "--n_layer=8 --n_embd=96 --dim_ffn=352"
    attention = "--mixer=attention --dim_ffn=683 --muon_lr=0.04"
    blocks = {f"{objective} {n}": f"--objective={objective} --direction=block --block_size={n} {one_sided}"
              for objective in ("block", "block_elbo") for n in (4, 16, 64)}
    return {"ar": f"--objective=ar {causal}", **blocks, "b3d 16": f"--objective=b3d --block_size=16 {causal}",
            "bidirectional, elbo": f"--objective=elbo {two_way} {one_sided}", "bidirectional": f"{two_way} {one_sided}",
            "bidirectional, ffn_shift=both": f"{two_way} --ffn_shift=both",
            "bidirectional, ffn_shift=wide": f"{two_way} --ffn_shift=wide",
            "causal + DW-JRT": f"{causal} --dw_jrt=1", "causal": causal,
            "causal + DW-JRT, 8 layers": f"{causal} --dw_jrt=1 {deep}", "causal, 8 layers": f"{causal} {deep}",
            "causal + DW-JRT, scale 20": f"{causal} --dw_jrt=1 --dw_jrt_scale=20",
            "causal + DW-JRT, open gates": f"{causal} --dw_jrt=1 --dw_jrt_alpha_init=2",
            "attention": f"{attention} --ffn_shift=none", "attention, ffn_shift=both": f"{attention} --ffn_shift=both",
            "attention, ffn_shift=wide": f"{attention} --ffn_shift=wide"}

def suite_text():
    """T=128, 64 rows per step, three seeds of the longest budget; and step times of the two networks to compare at equal time."""
    budgets = {15: 1} if quick else {600: 3, 300: 1, 150: 1}         # steps: seeds
    common = ["config/shakespeare.py", f"--data_path={data_path}", "--eval_interval=100000", *if_quick("--batch_size=4")]
    networks = {name: common + options.split() for name, options in text_networks().items()}
    runs = {}
    for steps, seeds in budgets.items():
        more = [f"--max_iters={steps}", *if_quick("--eval_iters=2")]
        runs |= seeded({f"{name}, {steps} steps": Run(networks[name] + more, BITS) for name in chosen(networks)}, seeds)
    found, rows = quality("text", runs), {}
    for name, run in by_name(found).items():
        network, budget = name.rsplit(", ", 1)
        row = rows.setdefault(network, {"parameters": run["parameters"][0], "errors": []})
        row[budget] = spread(run["bits"])
        row["errors"] += run["se"]
        row["error"] = statistics.mean(row["errors"])
    columns = [f"{steps} steps" for steps in budgets]
    table("bits per character, mean ± standard deviation over seeds; the evaluation's own standard error",
          " | ".join(["network", "parameters", *columns, "evaluation s.e."]),
          " | ".join(["{parameters:.3M}", *(f"{{{column}}}" for column in columns), "{error:.4f}"]), rows)
    if only not in ("", "pace"):
        return {"runs": found, "ms": {}}
    more = ["--eval_iters=1", f"--max_iters={20 if quick else 50}"]
    pace = training_ms({name: Run(networks[name] + more) for name in ("bidirectional, ffn_shift=wide", "attention")}, skip=2)
    table("a training step alone on the machine, in turn, ms", "network | ms", "{0:.0f}", pace)
    return {"runs": found, "ms": pace}

# ---- quality: Gaussian diffusion ----

def bigram_kl(x, y):
    """KL divergence, nats, of the bigrams of x from those of y, both (B,T) ids; a tenth of a count is added to y's, for every
    pair of tokens that occur."""
    V = int(max(x.max(), y.max())) + 1
    p, q = (torch.bincount((z[:, :-1] * V + z[:, 1:]).flatten(), minlength=V * V).double().view(V, V) for z in (x, y))
    here = torch.cat([x.flatten(), y.flatten()]).unique()
    p, q = p[here][:, here], q[here][:, here] + 0.1
    p, q = p / p.sum(), q / q.sum()
    return torch.xlogy(p, p / q).sum().item()

def reopened(folder):
    """The network of a run, and its DiffusionConfig."""
    saved = nets.load_checkpoint(checkpoint(folder))
    return nets.from_pretrained(folder, saved).eval(), diffusion.trained_with(saved["config"])

@torch.no_grad()
def sampled(folder, rows, length, sampler, steps):
    """`rows` unconditional samples of a run -> ids (rows,length)."""
    net, cfg = reopened(folder)
    x, draws = torch.full((rows, length), net.mask_id), data.generator(1, 0, 3)
    options = dict(cfg=cfg) if sampler in diffusion.GAUSSIAN_STEPS else {}
    return diffusion.SAMPLERS[sampler](net, x, x != net.mask_id, net.mask_id, draws, steps=steps, **options)

def gaussian_runs():
    """Whole runs and those of 200 steps with one part changed: two dicts {name: options}."""
    changes = {"mixed, x0, cosine": "", "mse alone": "config/gaussian_mse.py", "tokens alone": "config/gaussian_tokens.py",
               "epsilon": "--prediction_type=epsilon", "v_prediction": "--prediction_type=v_prediction",
               "linear": "--beta_schedule=linear", "sigmoid": "--beta_schedule=sigmoid",
               "a prefix is given": "--mask_policy=suffix --drop_given=0", "all is noised": "--drop_given=1",
               "curriculum": "config/gaussian_curriculum.py", "embeddings thaw": "config/gaussian_thaw.py",
               "clipped, no self-conditioning": "config/gaussian_clip.py", "no EMA": "--ema=0",
               "adaln_zero": "--time_cond=adaln_zero", "biwkv": "config/birwkv_llada.py",
               "attention": "--mixer=attention --ffn_shift=none --dim_ffn=476"}
    parts = {name: f"config/gaussian.py {change} --max_iters=200 --eval_interval=40" for name, change in changes.items()}
    whole = {f"gaussian, seed {seed}": f"config/gaussian.py --random_seed={seed}" for seed in (1337, 1338, 1339)}
    # as many parameters, and steps that take as long as the 1000 of config/gaussian.py
    return whole | {"masked": "config/shakespeare.py --ffn_shift=both --max_iters=1400"}, parts

def suite_gaussian():
    """What rounds rightly by noise level, and how far the bigrams of samples are from those of held-out text."""
    rows, length = 4 if quick else 64, 128
    source = data.TextSource(data_path, length, "char")
    held_out = source.eval_rows(len(source.val) // length)[0]
    whole, parts = gaussian_runs()
    metrics = {key: key for key in ("round_acc_0.1", "round_acc_0.2", "round_acc_0.5", "round_acc_1.0", "bits_per_char")}
    common = [f"--data_path={data_path}", *if_quick("--batch_size=4", "--eval_iters=1", "--max_iters=10")]
    runs = {name: Run(options.split() + common, metrics) for name, options in (whole | parts).items()}

    def measure(name, folder):
        evals = read_log(folder, "eval")
        found = {"minutes": statistics.mean(step_ms(folder)) * evals[-1]["step"] / 6e4}
        if "bits_per_char" in evals[-1]:
            rules = {"topk": ("topk", 50), "first_hitting": ("first_hitting", 0)}
        else:
            counts = (10, 20, 50, 100, 200) if name == "gaussian, seed 1337" else (50,)
            rules = {f"{n} steps": ("ddim", n) for n in counts} | {"ddpm": ("ddpm", 50)}
            found["curve"] = [(row["step"], row["round_acc_0.5"]) for row in evals]
            found["alarms"] = sum("alarm" in row for row in evals[1:])
        for key, rule in rules.items():
            found[f"kl, {key}"] = bigram_kl(sampled(folder, rows, length, *rule), held_out)
        return found
    names = ["gaussian, seed 1337", "masked", "mse alone"] if quick else chosen(runs)
    found = quality("gaussian", runs, measure, names)
    own = bigram_kl(source.train_rows(0, rows, 0, rows, 1)[0], held_out)
    gaussian_tables(found, whole, parts, f"{rows} samples' bigrams from held-out text's, nats ({rows} rows of training text: {own:.3f})")
    speed = denoising_ms()
    table("50 denoising steps at N = 512, batch 1, ms per step", "network | ms", "{0:.1f}", speed)
    return {"runs": found, "speed": speed}

def gaussian_tables(found, whole, parts, divergence):
    head = ("setting | parameters | minutes | right at t = 0.2 | 0.5 | 1 | divergence, ddim or topk | ddpm or one by one | alarms")
    cells = ("{parameters:.2M} | {minutes:.1f} | {0[round_acc_0.2]:.3f} | {0[round_acc_0.5]:.3f} | {0[round_acc_1.0]:.3f} | "
             "{kl, 50 steps:.3f} | {kl, ddpm:.3f} | {alarms}")
    masked = {"kl, topk": "kl, 50 steps", "kl, first_hitting": "kl, ddpm"}      # rules of masked diffusion stand in these columns
    rows = {name: {masked.get(key, key): value for key, value in run.items()} for name, run in found.items()}
    for title, names in {f"whole runs; divergence of {divergence}": whole, "200 steps each, one part changed": parts}.items():
        table(title, head, cells, {name: run for name, run in rows.items() if name in names})
    by_steps = {key[4:-6]: kl for key, kl in found.get("gaussian, seed 1337", {}).items() if key.endswith("steps")}
    table("divergence by sampling steps (DDIM)", "steps | divergence", "{0:.3f}", by_steps)
    curves = {name: zip(*found[name]["curve"]) for name in parts if name in found}
    if curves:
        plot("gaussian", "tokens that round rightly at t = 0.5", curves)

@torch.no_grad()
def denoising_ms():
    """Milliseconds of one of 50 DDIM steps at 512 tokens, untrained networks of C=256, N=64, four layers, in turn."""
    base = replace(directions()["bidirectional"], gaussian=True, time_cond="adaln_zero", tie_embeddings=True)
    configs = {"rwkv7, bidirectional": base, "biwkv": replace(base, mixer="biwkv"), BASELINE: attention_baseline(base)}
    x, cfg, steps = torch.full((1, 512), 256), diffusion.DiffusionConfig(), 5 if quick else 50

    def job(net):
        diffusion.SAMPLERS["ddim"](net, x, x != 256, 256, torch.Generator().manual_seed(0), cfg=cfg, steps=steps)
    ms = alternated({name: functools.partial(job, nets.Denoiser(config).eval()) for name, config in configs.items()}, 3)
    return {name: total / steps for name, total in ms.items()}

# ---- quality: texts with latents ----

def latent_runs(texts, pairs):
    """{name: Run}; the backbone learns from `texts`, all others from `pairs`."""
    common = [f"--max_iters={10 if quick else 600}", "--eval_interval=100000", *if_quick("--batch_size=4", "--eval_iters=2")]

    def run(objective, options="", start="", path=pairs):
        options = [f"--objective={objective}", *options.split(), f"--data_path={path}"]
        return Run(["config/latent.py", *options, *common], start=start)
    next_token = "--predict=next --ffn_shift=before"
    return {"backbone": run("ar", "--direction=causal --ffn_shift=before", path=texts), "sequential": run("sequential"),
            "stage1_coupling": run("stage1_coupling"), "l2t": run("l2t"), "t2l": run("t2l"),
            "latent from text": run("sequential", "--latent_pred_from=text"),
            "latent from prefix": run("sequential", "--latent_pred_from=prefix"),
            "from the backbone": run("sequential", next_token, "backbone"),
            "from the backbone, frozen": run("sequential", f"{next_token} --freeze_backbone=1", "backbone"),
            "embedding diffusion": run("gaussian", "--self_cond=1 --ema=0.99 --time_cond=add"),
            "stage2, fixed prior": run("stage2_variational", start="sequential"),
            "stage2, learned prior": run("stage2_variational", "--latent_prior=learned", "sequential"),
            "stage2, pooled states": run("stage2_variational", "--latent_encoder=rwkv_pool", "sequential"),
            "stage2, geometry": run("stage2_variational", "--geom_weight=1", "sequential")}

def suite_latent():
    """On the validation split of python data.py latents of data_path: 128 characters each, 32 components of their n-grams. The runs
    stay in OUT/local, so that those which start from others find them."""
    work, n = os.path.join(out, "local"), 8 if quick else 64
    pairs = os.path.join(work, "pairs.quick" if quick else "pairs")
    if not data.has_pairs(pairs) and data.main(["latents", f"--data_path={data_path}", f"--out={pairs}"]):
        raise RuntimeError("python data.py latents failed")
    texts = data_path or os.path.join(pairs, "text.txt")
    source, held_out = data.PairSource(pairs, 128), data.TextSource(texts, 128, "byte").eval_rows(n * 4)[0]
    runs = latent_runs(texts, pairs)

    @torch.no_grad()
    def measure(name, folder):
        found = {}
        if "backbone" in (name, runs[name].start):
            found["perplexity"] = perplexity(folder, trained(runs, "backbone", work), held_out)
        if name == "backbone":
            return found
        net, cfg = reopened(folder)
        x, _, lengths, z = source.eval_rows(n * 2 if quick else 10**6)
        if net.cfg.gaussian:
            found |= gaussian_text_nats(net, cfg, x[:4 * n], z[:4 * n])
        else:
            found |= diffusion.latent_report(net, x, lengths, z, data.generator(1, 0, 2), cfg)
        found |= text_scores(net, cfg, source, x[:n], z[:n])
        if not net.cfg.gaussian and name not in ("l2t", "t2l"):
            found |= joint_scores(net, cfg, source, x, n)
        return found
    found = quality("latent", runs, measure, chosen(runs)[:3 if quick else None], work)
    latent_tables(found)
    return {"runs": found}

VARIANTS = {"": lambda z: z, "_shuffled": lambda z: z.roll(1, 0), "_no_latent": torch.zeros_like}       # of the latents of texts

def perplexity(folder, backbone, x):
    """Of a byte of the texts x, of what is left in a run of its causal backbone."""
    net = nets.Denoiser(nets.ModelConfig(**nets.load_checkpoint(checkpoint(backbone))["model_config"])).eval()
    weights = nets.load_checkpoint(checkpoint(folder))["model"]
    net.load_state_dict({key: w for key, w in weights.items() if key in net.state_dict()})
    return diffusion.exact_nll(net, x, net.mask_id).mean().exp().item()

def gaussian_text_nats(net, cfg, x, z):
    """Nats per token of embedding diffusion, whose cross-entropy is not a bound: the mean over noise levels."""
    found, z = {}, diffusion.clean_latent(net, z)
    for suffix, variant in VARIANTS.items():
        report, found["alarm"] = diffusion.gaussian_report(net, x, torch.ones_like(x, dtype=torch.bool), None,
                                                           data.generator(1, 0, 2), cfg, latent=variant(z))
        found[f"text_nats{suffix}"] = statistics.mean(v for k, v in report.items() if k.startswith("ce_"))
    return found

def text_scores(net, cfg, source, x, z):
    """BLEU and chrF, in %, of texts sampled from latents against the texts x; by the sacrebleu package, if it is there."""
    try:
        import sacrebleu
    except ImportError:
        return {}
    z = net.posterior(x)[0] if net.latent_encoder is not None else z
    rule = "ddim" if net.cfg.gaussian else "first_hitting"
    found, truth = {}, [decoded(source, x)]
    for suffix, variant in VARIANTS.items():
        texts = decoded(source, diffusion.sample_text_from_latent(
            net, variant(z), 128, data.generator(2, 0, 3), cfg, rule, steps=50, temperature=0.5))
        found[f"bleu{suffix}"] = sacrebleu.corpus_bleu(texts, truth, force=True).score
        found[f"chrf{suffix}"] = sacrebleu.corpus_chrf(texts, truth).score
    return found

def joint_scores(net, cfg, source, x, n):
    """How n texts and latents sampled together fit: the share of the sampled latents that are further from a text's own latent than
    the one that was sampled with it, and the divergence of the texts' bigrams from those of x."""
    ids, z = diffusion.sample_joint(net, n, 128, data.generator(1, 0, 3), cfg, 64, temperature=0.7)
    texts = decoded(source, ids)
    if net.latent_encoder is not None:
        own = net.posterior(ids)[0]
    else:
        own = torch.from_numpy(data.Projection(*source.projection)(data.ngrams(texts, len(source.projection[0]))))
    far = torch.cdist(own, z)
    nearer = (far.diagonal()[:, None] < far).sum(1) / (n - 1)
    return {"joint_nearer": nearer.mean().item(), "joint_kl": bigram_kl(ids, x), "sample": texts[0]}

def decoded(source, ids):
    return [source.tokenizer.decode(row.tolist()) for row in ids]

def latent_tables(found):
    having = lambda key: {name: run for name, run in found.items() if key in run}
    for run in having("latent_mse").values():
        run["latent_ratio"] = run["latent_mse"] / run["latent_mse_of_mean"]
    variants = lambda key, form: " / ".join(f"{{{key}{suffix}:{form}}}" for suffix in VARIANTS)
    table("texts and latents, validation split (right latent / shuffled / none)",
          "run | latent MSE of mean's | median rank | text, nats per token | BLEU | chrF | joint nearer | bigram KL",
          "{latent_ratio:.3f} | {latent_rank:.1%} | " + variants("text_nats", ".3f") + " | " + variants("bleu", ".1f") + " | "
          + variants("chrf", ".1f") + " | {joint_nearer:.0%} | {joint_kl:.3f}", having("text_nats"))
    table("Stage II", "run | KL, nats per text | active units | text, nats per token: z / none",
          "{kl:.2f} | {active_units} | {text_nats:.3f} / {text_nats_no_latent:.3f}", having("kl"))
    table("perplexity per byte, causal backbone", "run | perplexity", "{perplexity:.2f}", having("perplexity"))
    for name, run in having("sample").items():
        print(f"  --- {name}: {run['sample']!r}")

# ---- speed on a CPU ----

BASELINE = "attention baseline"

def alternated(jobs, times, seconds=math.inf):
    """{name: function} -> {name: median milliseconds of a call}. The functions are called in turn, so that a slow spell of the
    machine hits all: so many times, unless they have taken so many seconds; the first call warms up."""
    spent = {name: [] for name in jobs}
    for _ in range(2 if quick else times + 1):
        for name, job in jobs.items():
            if sum(spent[name]) < seconds:
                start = time.perf_counter()
                job()
                spent[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(values[1:] or values) for name, values in spent.items()}

def training_ms(runs, skip):
    """{name: Run} -> {name: median milliseconds of a training step}, in turn, without the first `skip` intervals of each log."""
    spent = {name: [] for name in runs}
    for _ in range(1 if quick else rounds):
        for name, run in runs.items():
            with tempfile.TemporaryDirectory() as folder:
                train(run.options, folder, run.env)
                spent[name] += step_ms(folder)[skip:]
    return {name: statistics.median(values) for name, values in spent.items()}

def processor():
    """What figures of speed must be read beside: the processor, floats in one of its vectors, and its measured peak with the threads
    at hand, FLOP/s in float32 of multiply-adds on registers; zeros where there is no C++ kernel."""
    found = {"processor": platform.processor() or platform.machine(), "vector": 0, "peak_flops": 0.0}
    with contextlib.suppress(OSError, StopIteration), open("/proc/cpuinfo") as f:
        found["processor"] = next(line.split(":")[1].strip() for line in f if line.startswith(("model name", "CPU part")))
    if wkv_cuda.build("cpp"):
        return found
    from wkv_cuda.loader import call
    n, workers = 10**5 if quick else 10**7, torch.get_num_threads()
    sums = torch.full((workers, 16), torch.nan)
    best = min(timeit.repeat(lambda: call("peak", (workers, n), (sums,)), number=1))
    width = int(sums[0].isfinite().sum())
    chains = 12 if width == 8 or width == 4 and platform.machine() == "x86_64" else 24
    found |= {"vector": width, "peak_flops": 2 * chains * width * workers * n / best}
    print(f"\n  {found['processor']}, vectors of {width} floats, fp32 peak {found['peak_flops'] / 1e9:.0f} GFLOP/s")
    return found

def recurrence_inputs(B, T, H, N, dtype=torch.float32, device="cpu"):
    """r, w, k, v, a, b as a network gives them to wkv7."""
    g = torch.Generator(device).manual_seed(0)
    normal = lambda: torch.randn(B, T, H, N, generator=g, device=device)
    uniform = lambda: torch.rand(B, T, H, N, generator=g, device=device)
    kk = torch.nn.functional.normalize(normal(), dim=-1)
    return [x.to(dtype).requires_grad_() for x in (normal(), -0.6 * uniform(), 0.3 * normal(), normal(), -kk, kk * uniform())]

def kernel_jobs(B, T, C, N):
    """Every operator of wkv_cuda at a size -> {name: (function of tensors, those tensors)}, as a network calls them in training."""
    normal = lambda n, *shape: [torch.randn(*shape).requires_grad_() for _ in range(n)]
    rows, heads = (B, T, C), (B, T, C // N, N)
    return {"wkv7": (wkv_cuda.wkv7, recurrence_inputs(*heads)),
            "wkv7_mix": (lambda *x: wkv_cuda.wkv7_mix(*x, 64e-5, None, N), normal(8, *rows) + normal(8, C)),
            "wkv7_inputs": (lambda *x: wkv_cuda.wkv7_inputs(*x, None, N), normal(6, *rows) + normal(5, C)),
            "wkv7_output": (lambda *x: wkv_cuda.wkv7_output(*x, 64e-5, N), normal(5, *rows) + normal(3, C)),
            "shift_mix": (lambda x, m: wkv_cuda.shift_mix(x, None, m), normal(1, *rows) + normal(1, 6, C)),
            "shift_mix, wide": (lambda x, m: wkv_cuda.shift_mix(x, None, m, 2), normal(1, *rows) + normal(1, 1, C)),
            "read_state": (wkv_cuda.read_state, normal(1, B, C // N, N, N) + normal(2, *heads)),
            "squared_relu": (wkv_cuda.squared_relu, normal(1, B, T, 4 * C)),
            "biwkv": (lambda w, *x: wkv_cuda.biwkv(w.sigmoid(), *x), normal(2, C) + normal(2, *rows))}

def outputs(y):
    return tuple(y) if isinstance(y, (list, tuple)) else (y,)

def call_kernel(f, x, impl, backward, grad=None):
    """f(*x) by one back end, and perhaps its gradients; grad: whether forward keeps what backward needs, without going there."""
    os.environ["WKV_IMPL"] = impl
    with torch.set_grad_enabled(grad or backward):
        y = f(*x)
        if backward:
            y = [z for z in outputs(y) if z.requires_grad]
            torch.autograd.grad(y, x, [torch.ones_like(z) for z in y], allow_unused=True)

def kernel_ms():
    """Milliseconds of every kernel and of its plain-torch form: without gradients, and forward and backward."""
    sizes = {"main job": (32, 64, 128, 32), "text": (64, 128, 128, 32), "N = 64": (8, 512, 256, 64)}      # B, T, C, N
    found = {}
    for size, shape in sizes.items():
        for name, (f, x) in kernel_jobs(*shape).items():
            ways = itertools.product((False, True), ("cpp", "torch"))
            ms = alternated({way: functools.partial(call_kernel, f, x, way[1], way[0]) for way in ways}, 19)
            found[f"{name}, {size}"] = [[ms[back, "cpp"], ms[back, "torch"]] for back in (False, True)]
    rows = {name: dict(a=a, b=b, x=b / a, c=c, d=d, y=d / c) for name, ((a, b), (c, d)) in found.items()}
    table("kernel / plain torch, ms (times as fast)", "kernel | forward | forward+backward",
          "{a:.2f} / {b:.2f} ({x:.1f}x) | {c:.2f} / {d:.2f} ({y:.1f}x)", rows)
    return found

def suite_wkv():
    """The recurrence and all other kernels, and what a first use costs."""
    if reason := wkv_cuda.build("cpp"):
        raise ValueError(f"nothing to measure: {reason}")
    B, T, H, N = 8, 512, 4, 64
    f, x = lambda *x: wkv_cuda.wkv7(*x)[0], recurrence_inputs(B, T, H, N)
    ways = itertools.product(("loop", "torch", "cpp"), (False, True))
    ms = alternated({way: functools.partial(call_kernel, f, x, *way, grad=True) for way in ways}, 5 * rounds)
    ms = {impl: [ms[impl, False], ms[impl, True]] for impl in ("loop", "torch", "cpp")}
    cpu, kernels = processor(), kernel_ms()
    os.environ["WKV_IMPL"] = "auto"
    # FLOPs per channel and step: 9 N forward, 5 N to compute the states again and 19 N backward
    reached = [n * B * T * H * N * N / spent * 1e3 / cpu["peak_flops"] for n, spent in zip((9, 33), ms["cpp"])]
    print(f"  the C++ kernel reaches {reached[0]:.0%} of it forward, {reached[1]:.0%} forward and backward")
    table(f"wkv7 at (B,T,H,N) = ({B},{T},{H},{N}), {torch.get_num_threads()} threads, ms", 
          "back end | forward | forward+backward | faster than the loop", "{forward:.1f} | {both:.1f} | {faster:.1f}x",
          {impl: dict(forward=f, both=b, faster=ms["loop"][1] / b) for impl, (f, b) in ms.items()})
    python = functools.partial(subprocess.run, capture_output=True, text=True, check=True)
    with tempfile.TemporaryDirectory() as folder:
        code = ("import time, torch, wkv_cuda, torch.utils.cpp_extension\n"
                "t = time.time(); assert not wkv_cuda.build('cpp')\nprint(time.time() - t)")
        built = python([sys.executable, "-c", code], env=os.environ | {"TORCH_EXTENSIONS_DIR": folder})
    helped = timeit.timeit(lambda: python([sys.executable, "train.py", "--help"]), number=1)
    print(f"  cold build of the kernel {float(built.stdout):.1f} s; python train.py --help {helped:.1f} s")
    return {**cpu, "reached": reached, "kernels": kernels, "ms": ms, "cold_build_s": float(built.stdout), "help_s": helped}

def suite_step():
    """L=2, C=128, N=32, T=64, 32 rows, by back end and micro-batch. The first row is what the published script does: a loop over
    all 64 tokens; the others leave out the columns that are padding in every row."""
    def run(impl, rows, trim):
        steps = 50 if quick or impl == "loop" else 120
        return Run(["--struct_task=1", "--dw_jrt=1", f"--device_bsz={rows}", f"--trim_rows={trim}", f"--max_iters={steps}",
                    "--eval_interval=1000"], env={"WKV_IMPL": impl})
    ms = training_ms({"loop, 4 x 8, all 64 tokens": run("loop", 8, 0), "loop, 4 x 8": run("loop", 8, 1),
                      "torch, 4 x 8": run("torch", 8, 1), "cpp, 4 x 8": run("cpp", 8, 1), "cpp, 1 x 32": run("cpp", 32, 1)}, skip=3)
    table("training step of STRUCT_TASK=1 DW_JRT=1 python train.py, ms", 
          "back end, micro-batches | ms per step | faster than the loop | ... of all tokens", "{ms:.1f} | {loop:.1f}x | {all:.1f}x",
          {name: dict(ms=t, loop=ms["loop, 4 x 8"] / t, all=ms["loop, 4 x 8, all 64 tokens"] / t) for name, t in ms.items()})
    return {**processor(), "ms": ms}

def parameters(cfg):
    with torch.device("meta"):
        return sum(p.numel() for p in nets.Denoiser(cfg).parameters())

def attention_baseline(cfg):
    """The attention network with as many parameters as cfg's: the channel mix takes what the time mix does not need."""
    baseline = replace(cfg, mixer="attention", direction="bidirectional", dw_jrt=False, ffn_shift="none")
    spare = parameters(cfg) - parameters(baseline)
    return replace(baseline, dim_ffn=(cfg.dim_ffn or 4 * cfg.n_embd) + round(spare / (2 * cfg.n_embd * cfg.n_layer)))

def directions():
    """C=256, N=64, four layers, in every direction, and attention with the two-way network's parameters -> {name: ModelConfig}."""
    base = nets.ModelConfig(n_layer=4, n_embd=256, head_size=64, vocab_size=256, direction="causal")
    blocks = {f"block {n}": replace(base, direction="block", block_size=n) for n in (32, 64, 128)}
    two_way = replace(base, direction="bidirectional")
    return {"causal": base, **blocks, "bidirectional": two_way, BASELINE: attention_baseline(two_way)}

def flops_per_token(cfg, T):
    """Of one forward pass: 2 per multiply-add of the matrix products, 9 N per channel for one step of a scan (S a, the decay, two
    outer products, S r), 4 C T for attention over T keys. Elementwise work, norms and the embedding are left out."""
    C, mixers = cfg.n_embd, nets.pattern(cfg)
    total = 2 * C * cfg.vocab_size + len(mixers) * 4 * C * (cfg.dim_ffn or 4 * C)
    for layer, mixer in enumerate(mixers):
        if mixer != "rwkv7":
            total += 8 * C * C + 4 * C * T * (mixer == "attention")
            continue
        ranks = sum(nets.low_ranks(cfg, first="rwkv7" not in mixers[:layer]).values())
        scan = 2 * (3 * C * C + 2 * C * ranks) + 9 * C * cfg.head_size
        total += scan + 2 * C * C
        if nets.direction(cfg) != "causal":
            total += scan + {"add": 0, "gate": 4 * C * C, "concat": 4 * C * C}[cfg.fusion]
    return total

def counted_flops(cfg, T):
    """The same, counted by torch.utils.flop_counter in a pass that is really run."""
    from torch.utils.flop_counter import FlopCounterMode
    def kernel(name, numbers, *args, **kwargs):                      # their numbers: B, T, H, N, ...
        return 9 * math.prod(numbers[:3]) * numbers[3] ** 2 if name in ("wkv7", "wkv7_mix") else 0
    def attention(q, k, v, *args, **kwargs):                         # torch counts attention on GPUs only
        return 4 * math.prod(q) * k[2]
    formulas = {torch.ops.nanodir_kernel.run: kernel, torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention}
    net = nets.Denoiser(cfg).eval()
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        net(torch.zeros(1, T, dtype=torch.long))
    return counter.get_total_flops() / T

def suite_flops():
    if reason := wkv_cuda.build("cpp"):
        raise ValueError(f"the count runs the C++ kernel: {reason}")
    lengths, found = (512, 2048, 8192), {}
    for name, cfg in directions().items():
        flops = {f"T={T}": flops_per_token(cfg, T) for T in lengths}
        counted = {f"T={T}": counted_flops(cfg, T) for T in lengths[:1 if quick else 3]}
        off = max(abs(counted[key] / flops[key] - 1) for key in counted)
        found[name] = {"parameters": parameters(cfg), "off": off, **flops}
    table("FLOP per token, one denoising step", " | ".join(["network | parameters", *flops, "counted run differs by"]),
          " | ".join(["{parameters:.2M}", *(f"{{{key}:.2M}}" for key in flops), "{off:.1%}"]), found)
    return {"rows": found}

@torch.inference_mode()
def suite_direction():
    lengths = (512, 2048) if quick else (512, 2048, 8192, 16384)
    networks = {name: nets.Denoiser(cfg).eval() for name, cfg in directions().items()}
    ms = {name: {} for name in networks}
    for T in lengths:
        x = torch.randint(256, (1, T))
        jobs = {name: functools.partial(net, x) for name, net in networks.items()}
        for name, spent in alternated(jobs, max(3, rounds * 12288 // (T + 512))).items():
            ms[name][T] = spent
    rows = {name: {f"T={T}": f"{t:.1f} ({t / ms[BASELINE][T]:.2f}x)" for T, t in row.items()} for name, row in ms.items()}
    table(f"one denoising step, batch 1, C=256, N=64, four layers, {torch.get_num_threads()} threads: ms (multiple of attention's)",
          " | ".join(["network", *rows[BASELINE]]), " | ".join(f"{{{column}}}" for column in rows[BASELINE]), rows)
    return {**processor(), "ms": ms}

# ---- speed of generation ----

def block_networks(L, C, N, V):
    """RWKV-7 in blocks of 32 tokens and attention with as many parameters -> {name: ModelConfig}."""
    rwkv = nets.ModelConfig(n_layer=L, n_embd=C, head_size=N, vocab_size=V, tie_embeddings=V > 256, block_size=32, direction="block")
    return {"rwkv7, carried state": rwkv, "attention, cache": replace(attention_baseline(rwkv), direction="block")}

def block_job(net, B, context, calls=8):
    """A function that generates a block of 32 tokens after `context` of them: denoiser calls and a clean pass; and its cache."""
    text = torch.randint(net.mask_id, (B, context), device=net.head.weight.device)
    mask = torch.full((B, 32), net.mask_id, device=net.head.weight.device)
    state = None
    for part in text.split(256, 1):        # attention scores of longer parts would fill the memory
        state = net(part, state=state, clean=True).state

    def block():
        for _ in range(calls):
            net(mask, state=state)
        net(mask, state=state, clean=True)
    return block, state

@torch.inference_mode()
def suite_generate():
    """Untrained networks (C=256, N=64, four layers); 8 denoiser calls per block and, with a cache, one clean pass."""
    networks = {name: nets.Denoiser(cfg).eval() for name, cfg in block_networks(4, 256, 64, 256).items()}
    contexts = (64, 512) if quick else (512, 4096, 16384, 65536)
    jobs, found = {}, {}
    for B, context in itertools.product((1, 2 if quick else 32), contexts):
        if B > 1 and B * context > 32 * 4096:
            continue
        end = f"batch {B}, context {context}"
        for name, net in networks.items():
            jobs[f"{name}, {end}"], state = block_job(net, B, context)
            found[f"{name}, {end}"] = {"batch": B, "calls": 1, "cache_bytes": nets.state_bytes(state)}
        whole = torch.randint(256, (B, context + 32))
        jobs[f"rwkv7, all again, {end}"] = functools.partial(networks["rwkv7, carried state"], whole)
        found[f"rwkv7, all again, {end}"] = {"batch": B, "calls": 8, "cache_bytes": nets.state_bytes(whole)}
    for name, ms in alternated(jobs, 19, seconds=2).items():
        run = found[name]
        run["ms"] = ms * run["calls"]
        run |= {"tokens_per_s": run["batch"] * 32 / run["ms"] * 1e3, "KiB_per_row": run["cache_bytes"] / run["batch"] / 1024}
    table("one block of 32 tokens, 8 denoiser calls", "network | ms per block | tokens/s | cache KiB per row",
          "{ms:.1f} | {tokens_per_s:.0f} | {KiB_per_row:.0f}", found)
    first, last = (found[f"rwkv7, carried state, batch 1, context {n}"]["ms"] for n in (contexts[0], contexts[-1]))
    print(f"  rwkv7 from its carried state: a block at {contexts[-1]} tokens of context takes {last / first:.2f}x one at {contexts[0]}")
    return {"rows": found, "ratio": last / first}

# ---- speed on a GPU ----

def relative_errors(f, reference, names, x):
    """Of outputs and gradients of f against the reference in float64 on the same, perhaps rounded, inputs -> {name: error}."""
    exact = [z.detach().double().requires_grad_() for z in x]
    y, wanted = outputs(f(*x)), outputs(reference(*exact))
    g = torch.Generator(x[0].device).manual_seed(1)
    grads = [torch.randn(z.shape, generator=g, device=z.device).to(z.dtype) for z in y]
    found = [*y, *torch.autograd.grad(y, x, grads)]
    wanted = [*wanted, *torch.autograd.grad(wanted, exact, [z.double() for z in grads])]
    return {name: ((a.double() - b).norm() / b.norm()).item() for name, a, b in zip(names, found, wanted)}

def gpu_parity(limits, device):
    """Relative errors of the kernels against their definitions, every output, every gradient. ValueError if any is too large."""
    rows, T, normal = {}, 50 if quick else 200, functools.partial(torch.randn, device=device)
    for dtype, N, every in itertools.product((torch.float32, torch.bfloat16), wkv_cuda.HEAD_SIZES, (None, 5, 16)):
        x = recurrence_inputs(2, T + 1, 3, N, dtype, device)
        x += [(0.3 * normal(2, 3, N, N)).requires_grad_(), (0.3 * normal(*x[0].shape)).to(dtype).requires_grad_()]
        ops = (functools.partial(op, every=every) for op in (wkv_cuda.wkv7, wkv_cuda.wkv7_loop))
        name = f"wkv7 N={N}{f' every={every}' if every else ''} {str(dtype)[6:]}"
        rows[name] = relative_errors(*ops, "y s dr dw dk dv da db ds0 dc".split(), x)
    x = [torch.rand(2, 48, device=device), normal(2, 48), normal(2, T, 48), normal(2, T, 48)]
    x = [z.requires_grad_() for z in x]
    rows["biwkv float32"] = relative_errors(wkv_cuda.biwkv, wkv_cuda.biwkv_loop, ("y", "dw", "du", "dk", "dv"), x)
    table("relative error against float64, allowed 1e-5 (float32) and 2e-2 (bfloat16)", "kernel | largest | of",
          "{largest:.1e} | {of}", {name: dict(largest=max(row.values()), of=max(row, key=row.get)) for name, row in rows.items()})
    bad = [name for name, row in rows.items() if not max(row.values()) <= (2e-2 if "bfloat16" in name else 1e-5)]
    if bad:
        raise ValueError(f"the kernels are wrong on this GPU, so that nothing else is measured: {', '.join(bad)}; "
                         "WKV_IMPL=torch does without them")
    return rows

def gpu_ms(f, device):
    """Median milliseconds of f(), which is called once before."""
    times = []
    for _ in range(3 if quick else 12):
        begin, end = (torch.Event(device, enable_timing=True) for _ in range(2))
        begin.record()
        f()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times[1:])

def gpu_limits(device):
    """What the GPU itself does: bytes/s of a copy, FLOP/s of a matrix product in bfloat16."""
    size, n = (2**20, 512) if quick else (2**30, 8192)
    x, y = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    bytes_per_s = 2 * size / gpu_ms(lambda: y.copy_(x), device) * 1e3
    flops = 2 * n**3 / gpu_ms(lambda: a @ a, device) * 1e3
    print(f"\n  this GPU copies {bytes_per_s / 1e9:.0f} GB/s and multiplies {flops / 1e12:.1f} TFLOP/s in bfloat16", flush=True)
    return {"bytes_per_s": bytes_per_s, "flops": flops}

def official_kernels(folder):
    """RWKV-LM's own training kernels from a checkout of it -> {name: function of r, w, k, v, a, b as wkv7 takes them}: head size 64,
    T a multiple of 16, bfloat16; their w goes through a sigmoid in the kernel. ValueError where a file is missing."""
    from torch.utils.cpp_extension import load
    flags = ["-O3", "--use_fast_math", "--extra-device-vectorization", "-D_N_=64", "-D_CHUNK_LEN_=16"]
    found = {}
    for name, files in {"rwkv7_clampw": ("rwkv7_clampw.cu", "rwkv7_clampw.cpp"),
                        "rwkv7_clampw_v3": ("rwkv7_clampw_v3_for_h100.cu", "rwkv7_clampw_v3.cpp")}.items():
        sources = [os.path.join(folder, "RWKV-v7", "train_temp", "cuda", f) for f in files]
        if missing := [f for f in sources if not os.path.isfile(f)]:
            raise ValueError(f"rwkv_lm={folder}: there is no {missing[0]}: "
                             "give the folder of a checkout of github.com/BlinkDL/RWKV-LM")
        load(name, sources, is_python_module=False, extra_cuda_cflags=flags)
        found[name] = functools.partial(Official.apply, getattr(torch.ops, name))
    return found

class Official(torch.autograd.Function):
    """The operators `forward` and `backward` of RWKV-LM."""

    @staticmethod
    def forward(ctx, op, *x):
        B, T, H, N = x[0].shape
        y, sa = torch.empty_like(x[0]), torch.empty_like(x[0], dtype=torch.float32)
        s = sa.new_empty(B, H, T // 16, N, N)
        op.forward(*x, y, s, sa)
        ctx.op = op
        ctx.save_for_backward(*x, s, sa)
        return y

    @staticmethod
    def backward(ctx, dy):
        *x, s, sa = ctx.saved_tensors
        grads = [torch.empty_like(z) for z in x]
        ctx.op.backward(*x, dy.contiguous(), s, sa, *grads)
        return None, *grads

def recurrences(device):
    """{name: function of wkv7's inputs}: ours, fla's where it is installed, RWKV-LM's from a checkout."""
    found = {wkv_cuda.backend(device): lambda *x: wkv_cuda.wkv7(*x)[0]}
    try:                                   # the function that fla's chunk_rwkv7 calls; its own arguments differ between versions
        from fla.ops.generalized_delta_rule import chunk_dplr_delta_rule as fla
        found["fla"] = lambda r, w, k, v, a, b: fla(q=r, k=k, v=v, a=a, b=b, gk=w, scale=1.0, output_final_state=False)[0]
    except ImportError as e:
        print(f"  fla's chunk_rwkv7 is not measured: {e} (pip install flash-linear-attention)")
    if rwkv_lm:
        return found | official_kernels(rwkv_lm)
    print("  RWKV-LM's kernels are not measured: give a checkout of github.com/BlinkDL/RWKV-LM as --rwkv_lm=FOLDER")
    return found

def gpu_recurrence(limits, device):
    """Forward for inference, forward and backward for training. Bytes are those that must move at least (inputs, output, gradients,
    and what forward keeps for backward), FLOPs 9 N per channel forward and 19 N backward, without what is computed again."""
    B, H, N = (1, 2, 64) if quick else (8, 32, 64)
    impls, found = recurrences(device), {}
    for T in (64, 128) if quick else (512, 1024, 2048, 4096, 8192, 16384):
        x = recurrence_inputs(B, T, H, N, torch.bfloat16, device)
        dy, size = torch.randn_like(x[0]), x[0].numel()
        kept = size * (4 + 4 * N / 16)
        for name, f in impls.items():
            forward = torch.no_grad()(functools.partial(f, *x))
            both = lambda: torch.autograd.grad(f(*x), x, dy)
            for way, job, size_moved, flops in (("forward", forward, 14 * size, 9 * N * size),
                                                ("forward+backward", both, 40 * size + 2 * kept, 28 * N * size)):
                ms = gpu_ms(job, device)
                bytes_per_s, flops = size_moved / ms * 1e3, flops / ms * 1e3
                found[f"{name}, {way}, T={T}"] = dict(ms=ms, bytes_per_s=bytes_per_s, of_copy=bytes_per_s / limits["bytes_per_s"],
                                                      flops=flops, of_product=flops / limits["flops"])
    table(f"wkv7 at (B,T,H,N) = ({B},T,{H},{N}), bfloat16", "back end | ms | B/s | of a copy | FLOP/s | of a matrix product",
          "{ms:.3f} | {bytes_per_s:.0G} | {of_copy:.1%} | {flops:.2T} | {of_product:.1%}", found)
    return found

def training_step(cfg, batch, T, device):
    """(milliseconds, most bytes of memory) of a step: masked tokens, AdamW, bfloat16 products, torch.compile."""
    with torch.device(device):
        net = nets.Denoiser(cfg)
        x, masked = torch.randint(cfg.vocab_size, (batch, T)), torch.rand(batch, T) < 0.5
    torch.compiler.reset()                 # what has been compiled for other networks counts towards a limit
    nets.compile_blocks(net)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True)

    def step():
        with torch.autocast(x.device.type, torch.bfloat16):
            logits = net(diffusion.mask_tokens(x, masked, net.mask_id)).logits
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), x.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    step()
    torch.accelerator.reset_peak_memory_stats()
    return gpu_ms(step, device), torch.accelerator.max_memory_allocated()

def gpu_training(size, T, limits, device):
    """A step of networks of about 124 M or 1.5 B parameters on rows of T tokens. MFU is against the measured matrix product."""
    V, (L, C, tokens) = 50304, {"124M": (12, 768, 16384), "1.5B": (24, 2048, 4096)}[size]
    if quick:
        L, C, tokens, T = 2, 64, 128, 64
    base = nets.ModelConfig(n_layer=L, n_embd=C, head_size=16 if quick else 64, vocab_size=V, tie_embeddings=True, direction="causal")
    two_way, found = replace(base, direction="bidirectional"), {}
    for name, cfg in {"causal": base, "bidirectional": two_way, BASELINE: attention_baseline(two_way)}.items():
        torch.accelerator.empty_cache()
        started = time.perf_counter()
        try:
            ms, memory = training_step(cfg, tokens // T, T, device)
        except torch.OutOfMemoryError:
            print(f"  {size} {name}: {tokens // T} x {T} tokens do not fit this GPU", flush=True)
            continue
        speed = tokens / ms * 1e3
        found[name] = dict(parameters=parameters(cfg), ms=ms, tokens_per_s=speed, memory_bytes=memory,
                           mfu=3 * flops_per_token(cfg, T) * speed / limits["flops"], total_s=time.perf_counter() - started)
        print(f"  {size} {name}: {ms:.1f} ms, {memory / 2**30:.1f} GiB", flush=True)
    table(f"a training step on {tokens // T} x {T} tokens, {size}",
          "network | parameters | ms | tokens/s | bytes | MFU | s with compilation",
          "{parameters:.0M} | {ms:.1f} | {tokens_per_s:.0f} | {memory_bytes:.1G} | {mfu:.1%} | {total_s:.0f}", found)
    return found

@torch.inference_mode()
def gpu_generation(limits, device):
    """Blocks of 32 after 1024 tokens, 8 denoiser calls and a clean pass each, 124 M parameters, bfloat16 products."""
    networks, found = block_networks(*((2, 64, 16, 256) if quick else (12, 768, 64, 50304))), {}
    for (name, cfg), B in itertools.product(networks.items(), (1, 2 if quick else 32)):
        with torch.device(device), torch.autocast(torch.device(device).type, torch.bfloat16):
            block, _ = block_job(nets.Denoiser(cfg).eval(), B, 64 if quick else 1024)
            ms = gpu_ms(block, device)
        found[f"{name}, batch {B}"] = dict(ms=ms, tokens_per_s=B * 32 / ms * 1e3)
    table("one block of 32 tokens", "network | ms | tokens/s", "{ms:.1f} | {tokens_per_s:.0f}", found)
    return found

def suite_gpu():
    """The parts asked for, each kept as soon as it is measured, beside what is on file for this GPU. ValueError without one."""
    if not torch.cuda.is_available():
        raise ValueError("suite=gpu measures a GPU, and torch sees none (nvidia-smi, CUDA_VISIBLE_DEVICES, a CUDA build of torch)")
    if reason := wkv_cuda.build("cuda"):
        raise ValueError(f"nothing to measure: {reason}")
    parts = {"parity": gpu_parity, "wkv7": gpu_recurrence, "generation": gpu_generation}
    for size, T in itertools.product(("124M", "1.5B"), (1024, 4096)):
        parts[f"training {size} {T}"] = functools.partial(gpu_training, size, T)
    found = {"processor": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    with contextlib.suppress(OSError), open(where("gpu", **found)) as f:
        found = json.load(f) | found
    found["limits"] = gpu_limits("cuda")
    for name in chosen(parts):
        found[name] = parts[name](found["limits"], "cuda")
        write("gpu", found)
    return found

# ---- all of it ----

SUITES = {"wkv": suite_wkv, "step": suite_step, "published": suite_published, "tasks": suite_tasks, "flops": suite_flops,
          "direction": suite_direction, "ablation": suite_ablation, "text": suite_text, "generate": suite_generate,
          "gaussian": suite_gaussian, "latent": suite_latent, "gpu": suite_gpu}

def main():
    if threads:
        torch.set_num_threads(threads)
    nets.tune_cpu()
    print(f"\nwritten to {write(suite, SUITES[suite]())}")

if __name__ == "__main__":
    with one_line_errors():
        configure(globals(), show=False, families=(), choices=dict(suite=SUITES))
        main()
