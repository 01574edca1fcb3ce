"""Measure speed and quality: tables on the screen, figures in bench/.

    python bench.py --suite=wkv         the recurrence by token loop, plain torch and C++, all kernels
    python bench.py --suite=step        a training step of the main job, against the token loop
    python bench.py --suite=published   the published command lines, beside the published figures
    python bench.py --suite=tasks       the published tasks with this repository's defaults
    python bench.py --suite=flops       FLOPs per token in every direction, against a counted run
    python bench.py --suite=ablation    fusions and conditionings of a small two-way network on text
    python bench.py --suite=text        bits per character of networks of at most 1.05 M parameters
    python bench.py --suite=generate    what a block costs after 512 to 65,536 tokens of context
    python bench.py --suite=gaussian    Gaussian diffusion, one part changed at a time; masked diffusion
    python bench.py --suite=latent      texts with latents: both directions, Stage II, language kept
    python bench.py --suite=direction   milliseconds of one denoising step of the networks of --suite=flops
    python bench.py --suite=study       where DW-JRT helps: forms of seeds, tasks and text, longer rows
    python bench.py --suite=dashboard   a checklist of diffusion models, one table and one picture
    python bench.py --suite=official    tokens per second one by one, beside the rwkv package; bf16 and int8
    python bench.py --suite=convert     an autoregressive network made a block-diffusion one, or from scratch
    python bench.py --suite=score       log-likelihoods of continuations: --ckpt and --data_path=PAIRS.jsonl
    python bench.py --suite=presets     what each preset costs and reaches, and its curves
    python bench.py --suite=curves out*/log.jsonl      logs side by side: is my loss normal?
    python bench.py --suite=gpu         kernels against float64, speed and its limits, training, generation

A training run whose figures stand in its suite's JSON file is not repeated; another --out begins anew."""
from configurator import script

if __name__ == "__main__":
    script()
import collections
import concurrent.futures
import contextlib
import importlib.util
import itertools
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import timeit
from dataclasses import replace
from typing import NamedTuple

import torch
from tqdm import tqdm

import diffusion
import model as nets
from configurator import configure, one_line_errors

# ---- settings ----
suite = "step"              # which table
rounds = 3                  # [1, 1000] how often speed is measured, in turn; the median is shown
data_path = ""              # the text of those suites that learn one; empty = Python's standard library
out = "bench"               # folder of the tables as JSON
threads = 0                 # [0, 4096] CPU threads; 0 = torch's choice
jobs = 1                    # [1, 1024] training runs at a time, each with so many threads
only = ""                   # rows between ; (tasks: part of a name; text: pace = step times; gpu: parts)
ckpt = "out/ckpt.pt"        # score: the checkpoint
likelihood = ""             # score: next | confidence | left_to_right | random | bound; empty = the best
rwkv_lm = ""                # gpu: a checkout of RWKV-LM, whose own kernels are then measured in the same run
quick = False               # a twentieth of the steps and one seed: shows that a suite runs, measures nothing

# ---- training runs, their figures, tables ----

class Run(NamedTuple):
    """A run of train.py. metrics: {figure: name in the last row of the log}; start: a run to start from."""
    options: list
    metrics: dict = {}
    start: str = ""
    env: dict = {}

def train(options, folder, env={}):
    """Run train.py. ValueError for a wrong setting, RuntimeError with the last lines for what else fails."""
    command = [sys.executable, "train.py", f"--out_dir={folder}", f"--threads={threads}", "--log_sample=0"]
    env = os.environ | {"WKV_IMPL": "auto"} | env
    done = subprocess.run([*command, *options], env=env, capture_output=True, text=True)
    if done.returncode == 2:
        raise ValueError(done.stderr.strip().splitlines()[-1].removeprefix("error: "))
    if done.returncode:
        raise RuntimeError(f"{' '.join([*command, *options])} failed: {done.stderr[-400:]}")

def read_log(folder, event=""):
    """All rows of a run's log, or those of one event."""
    with open(os.path.join(folder, "log.jsonl")) as f:
        return [row for row in map(json.loads, f) if event in ("", row["event"])]

def step_ms(folder):
    """Milliseconds per training step, by interval of the log."""
    return [row["ms_per_step"] for row in read_log(folder, "train")]

def checkpoint(folder):
    return os.path.join(folder, "ckpt.pt")

LOCKS = collections.defaultdict(threading.Lock)          # of the folders that are being trained in

def trained(runs, name, work):
    """The folder of a run below `work`; it and its start are trained unless their checkpoints are there."""
    folder, run = os.path.join(work, f"quick {name}" if quick else name), runs[name]
    with LOCKS[folder]:
        if not os.path.exists(checkpoint(folder)):
            start = [f"--init_from={checkpoint(trained(runs, run.start, work))}"] if run.start else []
            train(run.options + start, folder, run.env)
    return folder

def quality(suite, runs, measure=lambda name, folder: {}, names=None, work=""):
    """Train those of `runs`, {name: Run}, that the suite's JSON file lacks, and keep there at once what their
    logs say and measure() finds. names: only these, and what they start from; work: the folder where the runs
    stay. -> {name: figures} of all in the file."""
    found = earlier(suite).get("runs", {})

    def figures(name):
        with contextlib.nullcontext(work) if work else tempfile.TemporaryDirectory() as place:
            folder = trained(runs, name, place)
            first, *_, last = read_log(folder)
            numbers = {"parameters": first["parameters"], "active": first["active"]}
            numbers["ms"] = statistics.median(step_ms(folder))
            numbers |= {key: last[metric] for key, metric in runs[name].metrics.items() if metric in last}
            return numbers | measure(name, folder)

    todo = [name for name in (runs if names is None else names) if name not in found]
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        going = {pool.submit(figures, name): name for name in todo}
        try:
            for done in tqdm(concurrent.futures.as_completed(going), suite, len(going), False, disable=None):
                name = going[done]
                found[name] = done.result()
                write(suite, {"runs": found})
                shown = {key: f"{x:.4f}" if isinstance(x, float) else x for key, x in found[name].items()}
                shown = [f"{key} {x}" for key, x in shown.items() if not isinstance(x, list)]
                tqdm.write(f"{name}: {', '.join(shown)}")
        finally:
            pool.shutdown(cancel_futures=True)
    return {name: found[name] for name in [*runs, *found] if name in found}

def by_name(found):
    """{"NAME, seed S": figures} -> {name: {figure: its values over the seeds}}."""
    names = {}
    for name, figures in found.items():
        for key, value in figures.items():
            names.setdefault(name.rpartition(", seed ")[0] or name, {}).setdefault(key, []).append(value)
    return names

def chosen(names):
    return [name for name in names if not only or name in only.split(";")]

def where(suite, /, processor="", vector=None, **_):
    """The file of a suite's figures, of speed by processor; a quick run must not replace measured ones."""
    kind = processor if vector is None else f"{processor} {32 * vector} bit"
    parts = [suite, re.sub("[^a-z0-9]+", "-", kind.lower()), "quick" if quick else "", "json"]
    return os.path.join(out, ".".join(filter(None, parts)))

def write(suite, result):
    """Keep a suite's figures as JSON, beside those of its runs that stand there -> its path."""
    os.makedirs(out, exist_ok=True)
    result = (earlier(suite) if "runs" in result else {}) | result
    head = {"suite": suite, "torch": torch.__version__, "threads": torch.get_num_threads()}
    with open(where(suite, **result), "w") as f:
        json.dump(head | result | head, f, indent=1)
    return f.name

def earlier(suite):
    """All figures of an earlier, perhaps unfinished suite."""
    if quick or not os.path.exists(where(suite)):
        return {}
    with open(where(suite)) as f:
        return json.load(f)

def spread(values, digits=4):
    """Mean and standard deviation as text."""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"

class Figure(float):
    """A number that can be formatted with a unit: f"{Figure(981120):.2M}" is "0.98 M"."""
    def __format__(self, form):
        scale = {"k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}.get(form[-1:])
        return f"{self / scale:{form[:-1]}f} {form[-1]}" if scale else super().__format__(form or "g")

def table(title, head, cells, rows):
    """Print {name: {figure: value}}. head, cells: titles and formats of the columns, separated by |; {0} in a
    format is the dict of figures. A cell whose figures are missing stays empty."""
    lines = [head.split(" | ")]
    for name, figures in rows.items():
        known = {key: Figure(x) if isinstance(x, (int, float)) else x for key, x in figures.items()}
        lines.append([name])
        for cell in cells.split(" | "):
            try:
                lines[-1].append(cell.format(known, **known))
            except KeyError:
                lines[-1].append("")
    left, *widths = (max(map(len, column)) for column in zip(*lines))
    print(f"\n{title}")
    for name, *row in lines:
        print("  ".join(["", name.ljust(left), *map(str.rjust, row, widths)]), flush=True)

def table_of_ms(title, ms, form="{ms:.1f}"):
    table(title, "network | ms", form, {name: {"ms": value} for name, value in ms.items()})

STYLE = {"font.size": 12, "axes.grid": True, "grid.alpha": 0.3, "lines.linewidth": 2,    # legible on a phone
         "axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 100, "legend.frameon": False}

def pyplot():
    """matplotlib's module for pictures in files, None if it is not there."""
    try:
        import matplotlib
    except ImportError:
        return print("  (pip install matplotlib for the pictures)")
    matplotlib.use("Agg")
    matplotlib.rcParams.update(STYLE)
    return importlib.import_module("matplotlib.pyplot")

def save_figure(name, figure):
    os.makedirs(out, exist_ok=True)
    figure.savefig(path := where(name).removesuffix("json") + "png", dpi=100)
    print(f"  picture: {path}")

BITS = {"bits": "bits_per_char", "se": "bits_per_char_se"}

def reopened(folder):
    """The network of a run, and its DiffusionConfig."""
    saved = nets.load_checkpoint(checkpoint(folder))
    return nets.from_pretrained(folder, saved).eval(), diffusion.trained_with(saved["config"])

# ---- speed on a CPU ----

def alternated(jobs, times, seconds=math.inf):
    """{name: function} -> {name: median milliseconds of a call}. They are called in turn, so that a slow
    spell of the machine hits all, so many times or until they took so many seconds. The first warms up."""
    spent = {name: [] for name in jobs}
    for _ in range(2 if quick else times + 1):
        for name, job in jobs.items():
            if sum(spent[name]) < seconds:
                spent[name].append(timeit.timeit(job, number=1))
    return {name: 1e3 * statistics.median(values[1:] or values) for name, values in spent.items()}

def training_ms(runs, skip):
    """{name: Run} -> {name: median milliseconds of a step}, in turn, without a log's first intervals."""
    spent = {name: [] for name in runs}
    for _, (name, run) in itertools.product(range(1 if quick else rounds), runs.items()):
        with tempfile.TemporaryDirectory() as folder:
            train(run.options, folder, run.env)
            spent[name] += step_ms(folder)[skip:]
    return {name: statistics.median(values) for name, values in spent.items()}

def parameters(cfg):
    with torch.device("meta"):
        return sum(p.numel() for p in nets.Denoiser(cfg).parameters())

def attention_baseline(cfg, direction="bidirectional"):
    """Attention with as many parameters as cfg: the channel mix takes what the time mix does not need."""
    baseline = replace(cfg, mixer="attention", direction="bidirectional", dw_jrt=False, ffn_shift="none")
    spare = round((parameters(cfg) - parameters(baseline)) / (2 * cfg.n_embd * cfg.n_layer))
    return replace(baseline, dim_ffn=(cfg.dim_ffn or 4 * cfg.n_embd) + spare, direction=direction)

def from_file(name):
    """The suite of bench/NAME.py, which imports what it needs of this file."""
    sys.modules.setdefault("bench", sys.modules[__name__])
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "bench", f"{name}.py")
    spec = importlib.util.spec_from_file_location(f"bench_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

SUITES = {name: lambda name=name: from_file(name).suite()
          for name in ("wkv", "step", "published", "tasks", "flops", "ablation", "text", "generate",
                       "gaussian", "latent", "direction", "study", "dashboard", "official", "convert",
                       "score", "presets", "curves", "gpu")}

LOGS = []           # curves: those named on the command line

def main():
    if threads:
        torch.set_num_threads(threads)
    nets.tune_cpu()
    print(f"\nwritten to {write(suite, SUITES[suite]())}")

if __name__ == "__main__":
    with one_line_errors():
        LOGS = [word for word in sys.argv[1:] if word.endswith(".jsonl") and not word.startswith("-")]
        words = filter(lambda word: word not in LOGS, sys.argv[1:])
        configure(globals(), argv=list(words), show=False, families=(), choices=dict(suite=SUITES))
        main()
