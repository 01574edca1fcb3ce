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
    python bench.py --suite=gpu         kernels against float64, speed and its limits, training, generation

A training run whose figures stand in its suite's JSON file is not repeated; another --out begins anew.
"""
from configurator import stoppable

if __name__ == "__main__":
    stoppable()
import collections
import concurrent.futures
import contextlib
import functools
import importlib.util
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
import threading
import time
import timeit
from dataclasses import replace
from typing import NamedTuple

import torch
from tqdm import tqdm

import diffusion
import model as nets
import wkv_cuda
from configurator import configure, one_line_errors
from model import flops_per_token  # noqa: F401

# ---- settings ----
suite = "step"              # which table
rounds = 3                  # [1, 1000] how often speed is measured, in turn; the median is shown
data_path = ""              # the text of those suites that learn one; empty = Python's standard library
out = "bench"               # folder of the tables as JSON
threads = 0                 # [0, 4096] CPU threads; 0 = torch's choice
jobs = 1                    # [1, 1024] training runs at a time, each with so many threads
only = ""                   # rows between ; (tasks: part of a name; text: pace = step times; gpu: parts)
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
    found = earlier(suite)

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
            names.setdefault(name.rpartition(", seed ")[0], {}).setdefault(key, []).append(value)
    return names

def chosen(names):
    return [name for name in names if not only or name in only.split(";")]

def where(suite, /, processor="", vector=None, **_):
    """The file of a suite's figures, of speed by processor; a quick run must not replace measured ones."""
    kind = processor if vector is None else f"{processor} {32 * vector} bit"
    parts = [suite, re.sub("[^a-z0-9]+", "-", kind.lower()), "quick" if quick else "", "json"]
    return os.path.join(out, ".".join(filter(None, parts)))

def write(suite, result):
    """Keep a suite's figures as JSON -> its path."""
    os.makedirs(out, exist_ok=True)
    head = {"suite": suite, "torch": torch.__version__, "threads": torch.get_num_threads()}
    with open(where(suite, **result), "w") as f:
        json.dump(head | result | head, f, indent=1)
    return f.name

def earlier(suite):
    """{name: figures} of the runs of an earlier, perhaps unfinished suite."""
    if quick or not os.path.exists(where(suite)):
        return {}
    with open(where(suite)) as f:
        found = json.load(f)
    runs = next(found[key] for key in ("runs", "rows", "acc") if key in found)      # rows, acc: older files
    if isinstance(runs, dict):
        return runs
    seeds = {}
    for row in runs:
        for seed, (acc, exact) in enumerate(zip(row["acc"], row["exact"]), 1337):
            name = f"{row['task']}, {row['steps']} steps, {row['options'][0][2:]}, seed {seed}"
            seeds[name] = {"acc": acc, "exact": exact}
    return seeds

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

def pyplot():
    """matplotlib's module for pictures in files, None if it is not there."""
    try:
        import matplotlib
    except ImportError:
        return print("  (pip install matplotlib for the pictures)")
    matplotlib.use("Agg")
    return importlib.import_module("matplotlib.pyplot")

def save_figure(name, figure):
    figure.savefig(path := where(name).removesuffix("json") + "png", dpi=100)
    print(f"  picture: {path}")

def plot(name, title, curves):
    """{label: (steps, values)} as out/NAME.png, if matplotlib is there."""
    plt = pyplot()
    if plt is None:
        return
    figure, ax = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for i, (label, (steps, values)) in enumerate(curves.items()):
        ax.plot(steps, values, "-" if i < 10 else "--", label=label)        # there are ten colours
    ax.set(title=title, xlabel="step")
    ax.legend(fontsize=7, ncols=2)
    save_figure(name, figure)

# ---- quality ----

BITS = {"bits": "bits_per_char", "se": "bits_per_char_se"}

def bigram_kl(x, y):
    """KL divergence, nats, of the bigrams of x from those of y, both (B,T) ids; a tenth of a count is added
    to y's, for every pair of tokens that occur."""
    V = int(max(x.max(), y.max())) + 1
    pairs = ((z[:, :-1] * V + z[:, 1:]).flatten() for z in (x, y))
    p, q = (torch.bincount(ids, minlength=V * V).double().view(V, V) for ids in pairs)
    here = torch.cat([x.flatten(), y.flatten()]).unique()
    p, q = p[here][:, here], q[here][:, here] + 0.1
    p, q = p / p.sum(), q / q.sum()
    return torch.xlogy(p, p / q).sum().item()

def reopened(folder):
    """The network of a run, and its DiffusionConfig."""
    saved = nets.load_checkpoint(checkpoint(folder))
    return nets.from_pretrained(folder, saved).eval(), diffusion.trained_with(saved["config"])

# ---- speed on a CPU ----

BASELINE = "attention baseline"

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

def processor():
    """The processor, floats in one of its vectors, and its measured peak with the threads at hand, FLOP/s in
    float32 of multiply-adds on registers; zeros where there is no C++ kernel."""
    found = {"processor": platform.processor() or platform.machine(), "vector": 0, "peak_flops": 0.0}
    with contextlib.suppress(OSError, StopIteration), open("/proc/cpuinfo") as f:
        line = next(line for line in f if line.startswith(("model name", "CPU part")))
        found["processor"] = line.split(":")[1].strip()
    if wkv_cuda.build("cpp"):
        return found
    from wkv_cuda.loader import call
    n, workers = 10**5 if quick else 10**7, torch.get_num_threads()
    sums = torch.full((workers, 16), torch.nan)
    seconds = min(timeit.repeat(lambda: call("peak", (workers, n), (sums,)), number=1))
    width = int(sums[0].isfinite().sum())
    chains = 12 if width == 8 or width == 4 and platform.machine() == "x86_64" else 24
    peak = 2 * chains * width * workers * n / seconds
    print(f"\n  {found['processor']}, vectors of {width} floats, fp32 peak {peak / 1e9:.0f} GFLOP/s")
    return found | {"vector": width, "peak_flops": peak}

def recurrence_inputs(B, T, H, N, dtype=torch.float32, device="cpu"):
    """r, w, k, v, a, b as a network gives them to wkv7."""
    options = dict(generator=torch.Generator(device).manual_seed(0), device=device)
    normal, uniform = (functools.partial(f, B, T, H, N, **options) for f in (torch.randn, torch.rand))
    kk = torch.nn.functional.normalize(normal(), dim=-1)
    x = normal(), -0.6 * uniform(), 0.3 * normal(), normal(), -kk, kk * uniform()
    return [z.to(dtype).requires_grad_() for z in x]

def kernel_jobs(B, T, C, N):
    """Every operator of wkv_cuda, as a network calls it in training -> {name: (function, its tensors)}."""
    def normal(n, *shape):
        return [torch.randn(*shape).requires_grad_() for _ in range(n)]
    rows, heads = (B, T, C), (B, T, C // N, N)
    return {"wkv7": (wkv_cuda.wkv7, recurrence_inputs(*heads)),
            "wkv7_mix": (lambda *x: wkv_cuda.wkv7_mix(*x, 64e-5, None, N), normal(8, *rows) + normal(8, C)),
            "wkv7_inputs": (lambda *x: wkv_cuda.wkv7_inputs(*x, None, N), normal(6, *rows) + normal(5, C)),
            "wkv7_output": (lambda *x: wkv_cuda.wkv7_output(*x, 64e-5, N), normal(5, *rows) + normal(3, C)),
            "shift_mix": (lambda x, m: wkv_cuda.shift_mix(x, None, m), [*normal(1, *rows), *normal(1, 6, C)]),
            "shift_mix, wide": (lambda x, m: wkv_cuda.shift_mix(x, None, m, 2),
                                [*normal(1, *rows), *normal(1, 1, C)]),
            "read_state": (wkv_cuda.read_state, normal(1, B, C // N, N, N) + normal(2, *heads)),
            "squared_relu": (wkv_cuda.squared_relu, normal(1, B, T, 4 * C)),
            "biwkv": (lambda w, *x: wkv_cuda.biwkv(w.sigmoid(), *x), normal(2, C) + normal(2, *rows))}

def outputs(y):
    return tuple(y) if isinstance(y, (list, tuple)) else (y,)

def kernel_ms(f, x, impls, times, keep=False):
    """Of f(*x) -> {back end: [milliseconds forward, forward and backward]}. keep: forward alone keeps what
    backward needs, too."""
    def job(impl, backward):
        os.environ["WKV_IMPL"] = impl
        with torch.set_grad_enabled(keep or backward):
            y = [z for z in outputs(f(*x)) if z.requires_grad]
            if backward:
                torch.autograd.grad(y, x, [torch.ones_like(z) for z in y], allow_unused=True)
    ways = itertools.product(impls, (False, True))
    ms = alternated({way: functools.partial(job, *way) for way in ways}, times)
    os.environ["WKV_IMPL"] = "auto"
    return {impl: [ms[impl, False], ms[impl, True]] for impl in impls}

def all_kernels():
    """Milliseconds of every kernel and of plain torch -> {name: pairs forward, forward and backward}."""
    sizes = {"main job": (32, 64, 128, 32), "text": (64, 128, 128, 32), "N = 64": (8, 512, 256, 64)}
    found, rows = {}, {}
    for size, shape in sizes.items():
        for name, (f, x) in kernel_jobs(*shape).items():
            pairs = list(zip(*kernel_ms(f, x, ("cpp", "torch"), 19).values()))
            forward, both = (f"{cpp:.2f} / {plain:.2f} ({plain / cpp:.1f}x)" for cpp, plain in pairs)
            found[f"{name}, {size}"] = pairs
            rows[f"{name}, {size}"] = dict(forward=forward, both=both)
    table("kernel / plain torch, ms (times as fast)", "kernel | forward | forward+backward",
          "{forward} | {both}", rows)
    return found

def suite_wkv():
    """The recurrence, then all kernels at three sizes; and what a first use costs."""
    if reason := wkv_cuda.build("cpp"):
        raise ValueError(f"nothing to measure: {reason}")
    B, T, H, N = 8, 512, 4, 64
    x = recurrence_inputs(B, T, H, N)
    ms = kernel_ms(lambda *x: wkv_cuda.wkv7(*x)[0], x, ("loop", "torch", "cpp"), 5 * rounds, keep=True)
    # FLOPs per channel and step: 9 N forward; 5 N to compute the states again and 19 N backward
    cpu, work = processor(), B * T * H * N * N
    reached = [flops * work / t * 1e3 / cpu["peak_flops"] for flops, t in zip((9, 33), ms["cpp"])]
    print(f"  the C++ kernel reaches {reached[0]:.0%} of it forward, {reached[1]:.0%} forward and backward")
    table(f"wkv7 at (B,T,H,N) = ({B},{T},{H},{N}), {torch.get_num_threads()} threads, ms",
          "back end | forward | forward+backward | faster than the loop",
          "{f:.1f} | {both:.1f} | {faster:.1f}x",
          {impl: dict(f=f, both=both, faster=ms["loop"][1] / both) for impl, (f, both) in ms.items()})
    kernels = all_kernels()
    with tempfile.TemporaryDirectory() as folder:
        code = ("import time, torch, wkv_cuda, torch.utils.cpp_extension\n"
                "t = time.time(); assert not wkv_cuda.build('cpp')\nprint(time.time() - t)")
        env = os.environ | {"TORCH_EXTENSIONS_DIR": folder}
        build = float(subprocess.check_output([sys.executable, "-c", code], env=env))
    start = time.perf_counter()
    subprocess.check_output([sys.executable, "train.py", "--help"])
    helped = time.perf_counter() - start
    print(f"  cold build of the kernel {build:.1f} s; python train.py --help {helped:.1f} s")
    return {**cpu, "reached": reached, "kernels": kernels, "ms": ms, "cold_build_s": build, "help_s": helped}

def suite_step():
    """L=2, C=128, N=32, T=64, 32 rows, by back end and micro-batch. The first row is what the published
    script does: a loop over all 64 tokens; the others leave out the columns that are padding in every row."""
    kinds = {"loop, 4 x 8, all 64 tokens": ("loop", 8, 0), "loop, 4 x 8": ("loop", 8, 1),
             "torch, 4 x 8": ("torch", 8, 1), "cpp, 4 x 8": ("cpp", 8, 1), "cpp, 1 x 32": ("cpp", 32, 1)}
    runs = {}
    for kind, (impl, rows, trim) in kinds.items():
        steps = 50 if quick or impl == "loop" else 120
        options = ["--struct_task=1", "--dw_jrt=1", "--eval_interval=1000", f"--max_iters={steps}"]
        runs[kind] = Run([*options, f"--device_bsz={rows}", f"--trim_rows={trim}"], env={"WKV_IMPL": impl})
    ms = training_ms(runs, skip=3)
    every, loop, *_ = ms.values()
    table("training step of STRUCT_TASK=1 DW_JRT=1 python train.py, ms",
          "back end, micro-batches | ms per step | faster than the loop | ... of all tokens",
          "{t:.1f} | {loop:.1f}x | {all:.1f}x",
          {kind: dict(t=t, loop=loop / t, all=every / t) for kind, t in ms.items()})
    return {**processor(), "ms": ms}

def parameters(cfg):
    with torch.device("meta"):
        return sum(p.numel() for p in nets.Denoiser(cfg).parameters())

def attention_baseline(cfg, direction="bidirectional"):
    """Attention with as many parameters as cfg: the channel mix takes what the time mix does not need."""
    baseline = replace(cfg, mixer="attention", direction="bidirectional", dw_jrt=False, ffn_shift="none")
    spare = round((parameters(cfg) - parameters(baseline)) / (2 * cfg.n_embd * cfg.n_layer))
    return replace(baseline, dim_ffn=(cfg.dim_ffn or 4 * cfg.n_embd) + spare, direction=direction)

def directions():
    """Every direction at C=256, N=64, four layers, and attention of the two-way network's size."""
    base = nets.ModelConfig(n_layer=4, n_embd=256, head_size=64, vocab_size=256, direction="causal")
    blocks = {f"block {n}": replace(base, direction="block", block_size=n) for n in (32, 64, 128)}
    two_way, alternate = replace(base, direction="bidirectional"), replace(base, direction="alternate")
    return {"causal": base, **blocks, "alternate": alternate, "bidirectional": two_way,
            BASELINE: attention_baseline(two_way)}

def from_file(name):
    """The suite of bench/NAME.py, which imports what it needs of this file."""
    sys.modules.setdefault("bench", sys.modules[__name__])
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "bench", f"{name}.py")
    spec = importlib.util.spec_from_file_location(f"bench_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

SUITES = {"wkv": suite_wkv, "step": suite_step}
SUITES |= {name: lambda name=name: from_file(name).suite()
           for name in ("published", "tasks", "flops", "ablation", "text", "generate", "gaussian", "latent",
                        "direction", "study", "dashboard", "gpu")}

def main():
    if threads:
        torch.set_num_threads(threads)
    nets.tune_cpu()
    print(f"\nwritten to {write(suite, SUITES[suite]())}")

if __name__ == "__main__":
    with one_line_errors():
        configure(globals(), show=False, families=(), choices=dict(suite=SUITES))
        main()
