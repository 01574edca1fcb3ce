"""Measure: speed of the recurrence and of a training step, quality on the synthetic tasks. Tables on the screen and in bench/.

    python bench.py --suite=wkv         the recurrence: token loop, plain torch, C++ kernel; cold build of the kernel
    python bench.py --suite=step        a training step of the main job, against the token loop
    python bench.py --suite=published   the published command lines, DW_JRT=0 and 1, beside the published figures
    python bench.py --suite=tasks       the published tasks with this repository's defaults
    python bench.py --suite=flops       FLOPs per token of every direction and the attention twin, checked against a counted run
    python bench.py --suite=ablation    fusions and conditionings of the two-way network on a small text run
    python bench.py --suite=text        bits per character of ar, blocks, two-way, seeded and attention networks, three budgets
    python bench.py --suite=generate    what a generated block costs after 512 to 65,536 tokens of context
    python bench.py --suite=gaussian    Gaussian diffusion, one part of the recipe changed at a time, beside masked diffusion
    python bench.py --suite=latent      texts with latents: both directions, Stage II, language kept, prefix against embedding diffusion
    python bench.py --suite=direction   milliseconds of one denoising step of the same
    python bench.py --suite=gpu         on a GPU: kernels against the float64 twins, their speed beside the GPU's own limits, training, generation
"""
from configurator import stoppable

if __name__ == "__main__":
    stoppable()
import contextlib
import dataclasses
import functools
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

import torch

import data
import diffusion
import model as nets
import wkv_cuda
from configurator import configure, one_line_errors

# ---- settings ----
suite = "step"              # which table
rounds = 3                  # [1, 1000] how often speed is measured, in turn; the median is shown
data_path = ""              # ablation, text: the text; empty = Python's standard library
out = "bench"               # folder of the tables as JSON
threads = 0                 # [0, 4096] CPU threads; 0 = torch's choice
only = ""                   # these rows, separated by ; (tasks: rows whose name holds it; text: pace = step times; gpu: parts)
rwkv_lm = ""                # gpu: a checkout of RWKV-LM, whose own kernels are then measured in the same run
quick = False               # a twentieth of the steps and one seed: shows that a suite runs, measures nothing


def train(*options, env=None, folder):
    """Run train.py and return its log: a list of dicts. RuntimeError with its last lines if it fails."""
    command = [sys.executable, "train.py", f"--out_dir={folder}", f"--threads={threads}", "--log_sample=0", *options]
    done = subprocess.run(command, env=os.environ | {"WKV_IMPL": "auto"} | (env or {}), capture_output=True, text=True)
    if done.returncode == 2:
        raise ValueError(done.stderr.strip().splitlines()[-1].removeprefix("error: "))
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr[-400:]}")
    with open(os.path.join(folder, "log.jsonl")) as f:
        return [json.loads(line) for line in f]


def step_ms(log):
    """Milliseconds a step, by interval of the log."""
    return [row["ms_per_step"] for row in log if row["event"] == "train"]


def spread(values):
    """Mean and standard deviation as text."""
    return f"{statistics.mean(values):.4f}" + (f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else "")


def table(title, head, rows):
    """Print aligned columns."""
    cells = [head] + [[str(c) for c in row] for row in rows]
    wide = [max(len(row[i]) for row in cells) for i in range(len(head))]
    print(f"\n{title}")
    for row in cells:
        print("  " + "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, wide))), flush=True)


def plot(name, title, xlabel, curves, **axes):
    """{label: (xs, ys)} as out/NAME.png, if matplotlib is there."""
    if not curves:
        return
    try:
        import matplotlib
    except ImportError:
        return print("  (pip install matplotlib for the curves)")
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, ax = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for i, (label, (xs, ys)) in enumerate(curves.items()):
        ax.plot(xs, ys, "-" if i < 10 else "--", label=label)        # there are ten colours
    ax.set(title=title, xlabel=xlabel, **axes)
    ax.legend(fontsize=7, ncols=2)
    os.makedirs(out, exist_ok=True)
    path = os.path.join(out, f"{name}{'.quick' * quick}.png")
    figure.savefig(path, dpi=100)
    print(f"  curves: {path}")


def processor():
    """What figures of speed must be read beside: the processor, floats in one of its vectors, and its measured peak with the threads at hand,
    FLOP/s in float32 of multiply-adds on registers; zeros where there is no C++ kernel."""
    with contextlib.suppress(OSError, StopIteration):
        name = next(line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith(("model name", "CPU part")))
    found = {"processor": locals().get("name") or platform.processor() or platform.machine(), "vector": 0, "peak_flops": 0.0}
    if wkv_cuda.build("cpp"):
        return found
    from wkv_cuda.loader import call
    n, pieces, best = 10**5 if quick else 10**7, torch.get_num_threads(), math.inf
    sums = torch.full((pieces, 16), torch.nan)
    for _ in range(5):
        start = time.perf_counter()
        call("peak", (pieces, n), (sums,))
        best = min(best, time.perf_counter() - start)
    width = int(sums[0].isfinite().sum())
    chains = 12 if width == 8 or width == 4 and platform.machine() == "x86_64" else 24
    return found | {"vector": width, "peak_flops": 2 * chains * width * pieces * n / best}


SIZES = {"main job": (32, 64, 128, 32), "text": (64, 128, 128, 32), "N = 64": (8, 512, 256, 64)}      # B, T, C, N


def kernel_jobs(B, T, C, N):
    """Every operator of wkv_cuda at a size -> {name: (function of tensors, those tensors)}, as a network calls them in training."""
    normal = lambda *shape: torch.randn(*shape).requires_grad_()
    rows, vectors = (lambda n: [normal(B, T, C) for _ in range(n)]), (lambda n: [normal(C) for _ in range(n)])
    heads = lambda n: [normal(B, T, C // N, N) for _ in range(n)]
    kk = torch.nn.functional.normalize(torch.randn(B, T, C // N, N), dim=-1)
    scan = [*heads(1), (-0.6 * torch.rand(B, T, C // N, N)).requires_grad_(), *heads(2), (-kk).requires_grad_(), (kk * 0.5).requires_grad_()]
    state = normal(B, C // N, N, N)
    return {"wkv7": (lambda *x: wkv_cuda.wkv7(*x), scan),
            "wkv7_mix": (lambda *x: wkv_cuda.wkv7_mix(*x, 64e-5, None, N), rows(8) + vectors(8)),
            "wkv7_inputs": (lambda *x: wkv_cuda.wkv7_inputs(*x, None, N), rows(6) + vectors(5)),
            "wkv7_output": (lambda *x: wkv_cuda.wkv7_output(*x, 64e-5, N), rows(5) + vectors(3)),
            "shift_mix": (lambda x, m: wkv_cuda.shift_mix(x, None, m), [normal(B, T, C), normal(6, C)]),
            "shift_mix, wide": (lambda x, m: wkv_cuda.shift_mix(x, None, m, 2), [normal(B, T, C), normal(1, C)]),
            "read_state": (wkv_cuda.read_state, [state, *heads(2)]),
            "squared_relu": (wkv_cuda.squared_relu, [normal(B, T, 4 * C)]),
            "biwkv": (lambda w, *x: wkv_cuda.biwkv(w.sigmoid(), *x), vectors(2) + rows(2))}


def kernel_table():
    """Milliseconds of every kernel beside its plain-torch form, in turn: without gradients, and forward and backward."""
    rows, found = [], {}
    for size, shape in SIZES.items():
        for name, (f, x) in kernel_jobs(*shape).items():
            seen = {(impl, back): [] for impl in ("cpp", "torch") for back in (False, True)}
            for i in range(2 if quick else 20):                      # the first warms up
                for (impl, back), times in seen.items():
                    os.environ["WKV_IMPL"] = impl
                    start = time.perf_counter()
                    with torch.set_grad_enabled(back):
                        y = f(*x)
                        if back:
                            y = [z for z in (y if isinstance(y, (list, tuple)) else [y]) if z.requires_grad]
                            torch.autograd.grad(y, x, [torch.ones_like(z) for z in y], allow_unused=True)
                    if i:
                        times.append((time.perf_counter() - start) * 1e3)
            ms = {key: statistics.median(times) for key, times in seen.items()}
            pairs = [(ms["cpp", back], ms["torch", back]) for back in (False, True)]
            found[f"{name}, {size}"] = pairs
            rows.append([f"{name}, {size}", *(f"{a:.2f} / {b:.2f} ({b / a:.1f}x)" for a, b in pairs)])
    os.environ["WKV_IMPL"] = "auto"
    table("kernel / plain torch, ms (times as fast)", ["kernel", "forward", "forward+backward"], rows)
    return found


def suite_wkv():
    """The recurrence at (B,T,H,N) = (8,512,4,64), float32, and what a first use costs."""
    B, T, H, N = 8, 512, 4, 64
    g = torch.Generator().manual_seed(0)
    r, k, v = (torch.randn(B, T, H, N, generator=g) * 0.3 for _ in range(3))
    w = -0.6 * torch.rand(B, T, H, N, generator=g)
    kk = torch.nn.functional.normalize(torch.randn(B, T, H, N, generator=g), dim=-1)
    inputs = [x.requires_grad_() for x in (r, w, k, v, -kk, kk * torch.rand(B, T, H, N, generator=g))]
    dy = torch.randn(B, T, H, N, generator=g)
    seen = {impl: ([], []) for impl in ("loop", "torch", "cpp")}
    if reason := wkv_cuda.build("cpp"):
        raise ValueError(f"nothing to measure: {reason}")
    for i in range(2 if quick else rounds + 1):                      # in turn, so that a slow spell of the machine hits all; the first warms up
        for impl, (forward, both) in seen.items():
            for _ in range(1 if impl == "loop" else 5):
                start = time.perf_counter()
                y, _ = wkv_cuda.IMPLS[impl](*inputs)
                middle = time.perf_counter()
                torch.autograd.grad(y, inputs, dy)
                if i:
                    forward.append(middle - start)
                    both.append(time.perf_counter() - start)
    ms = {impl: [statistics.median(times) * 1e3 for times in pair] for impl, pair in seen.items()}
    cpu, size = processor(), B * T * H * N * N
    # a channel takes 9 N forward, 5 N to compute the states again and 19 N backward
    reached = [flops * size / ms["cpp"][i] * 1e3 / cpu["peak_flops"] for i, flops in enumerate((9, 33))]
    print(f"\n  {cpu['processor']}, vectors of {cpu['vector']} floats, fp32 peak {cpu['peak_flops'] / 1e9:.0f} GFLOP/s: the C++ kernel reaches "
          f"{reached[0]:.0%} of it forward, {reached[1]:.0%} forward and backward")
    table(f"wkv7 at (B,T,H,N) = ({B},{T},{H},{N}), {torch.get_num_threads()} threads, ms",
          ["back end", "forward", "forward+backward", "faster than the loop"],
          [[impl, f"{f:.1f}", f"{fb:.1f}", f"{ms['loop'][1] / fb:.1f}x"] for impl, (f, fb) in ms.items()])
    with tempfile.TemporaryDirectory() as folder:
        code = ("import time, torch, wkv_cuda, torch.utils.cpp_extension\nt = time.time(); assert not wkv_cuda.build('cpp')\n"
                "print(time.time() - t)")
        run = subprocess.run([sys.executable, "-c", code], env=os.environ | {"TORCH_EXTENSIONS_DIR": folder}, text=True,
                             capture_output=True, check=True)
        start = time.perf_counter()
        subprocess.run([sys.executable, "train.py", "--help"], capture_output=True, check=True)
        helped = time.perf_counter() - start
    print(f"  cold build of the kernel {float(run.stdout):.1f} s; python train.py --help {helped:.1f} s")
    return {**cpu, "reached": reached, "kernels": kernel_table(), "ms": ms, "cold_build_s": float(run.stdout), "help_s": helped}


def suite_step():
    """A training step of the main job (L=2, C=128, N=32, T=64, 32 rows), by back end and micro-batch. The first row is what the
    published script does: a loop over all 64 tokens; the others leave out the columns that are padding in every row."""
    kinds = {"loop, 4 x 8, all 64 tokens": ("loop", 8, 0), "loop, 4 x 8": ("loop", 8, 1), "torch, 4 x 8": ("torch", 8, 1),
             "cpp, 4 x 8": ("cpp", 8, 1), "cpp, 1 x 32": ("cpp", 32, 1)}
    seen = {kind: [] for kind in kinds}
    for _ in range(1 if quick else rounds):
        for kind, (impl, rows, trim) in kinds.items():
            with tempfile.TemporaryDirectory() as folder:
                log = train("--struct_task=1", "--dw_jrt=1", f"--device_bsz={rows}", f"--trim_rows={trim}", "--eval_interval=1000",
                            f"--max_iters={50 if quick or impl == 'loop' else 120}", env={"WKV_IMPL": impl}, folder=folder)
            seen[kind] += step_ms(log)[3:]
    ms = {kind: statistics.median(times) for kind, times in seen.items()}
    table("training step of STRUCT_TASK=1 DW_JRT=1 python train.py, ms",
          ["back end, micro-batches", "ms a step", "faster than the loop", "... of all tokens"],
          [[kind, f"{t:.1f}", f"{ms['loop, 4 x 8'] / t:.1f}x", f"{ms['loop, 4 x 8, all 64 tokens'] / t:.1f}x"] for kind, t in ms.items()])
    cpu = processor()
    print(f"  {cpu['processor']}, vectors of {cpu['vector']} floats, fp32 peak {cpu['peak_flops'] / 1e9:.0f} GFLOP/s")
    return {**cpu, "ms": ms}


PUBLISHED = {200: (0.5181, 0.6191), 400: (0.3281, 0.6531), 600: (0.5494, 0.7262), 800: (0.5525, 0.8153), 999: (0.5444, 0.9244)}


def suite_published():
    """The published command lines of `struct` with only the script's name changed, one seed, accuracy by step."""
    found, shorter = {}, 20 if quick else 1
    for jrt in (0, 1):
        with tempfile.TemporaryDirectory() as folder:
            env = dict(STRUCT_TASK="1", STRUCT_EVAL="1", STRUCT_LEN="8", TRAIN="1", GEN_TOKENS="1", SEQ_LEN="64", N_LAYER="2", N_EMBD="128",
                       HEAD_SIZE="32", BATCH_SIZE="32", DEVICE_BSZ="8", MAX_ITERS=str(1000 // shorter),
                       EVAL_INTERVAL=str(200 // shorter), EVAL_ITERS="20",
                       WARMDOWN_ITERS="200", DW_JRT=str(jrt), DW_JRT_SCALE="20", WEIGHTS_PATH=os.path.join(folder, "struct.pt"))
            found[jrt] = {row["step"] * shorter: row["struct_acc"] for row in train(env=env, folder=folder) if row["event"] == "eval"}
    last = lambda step: 1000 if step == 999 else step
    rows = [[step, old[0], f"{found[0][last(step)]:.4f}", old[1], f"{found[1][last(step)]:.4f}"] for step, old in PUBLISHED.items()]
    table("struct acc, published command lines", ["step", "DW_JRT=0 published", "here", "DW_JRT=1 published", "here"], rows)
    return {"acc": found}


SEEDED, TWO_WAY = ["--dw_jrt=1"], ["--direction=bidirectional"]
TASK_ROWS = [("struct", 1000, 3, SEEDED, "0.5919 / 0.0000"), ("struct", 200, 3, SEEDED, "0.7450"), ("rightcopy", 200, 3, SEEDED, "0.7181"),
             ("rightrev", 200, 3, SEEDED, "0.7731"), ("index", 1000, 1, SEEDED, "0.34 (200 steps)"), ("add", 1000, 1, SEEDED, "0.11 (200 steps)"),
             ("struct", 1000, 3, ["--objective=gaussian"], ""), ("struct", 200, 3, TWO_WAY, ""), ("rightcopy", 200, 3, TWO_WAY, ""),
             ("rightrev", 200, 3, TWO_WAY, "")]


def suite_tasks():
    """Accuracy and exact match on the fixed evaluation set after training with the defaults: one causal scan with DW_JRT=1, two-way."""
    rows, found = [], []
    for task, steps, seeds, options, old in TASK_ROWS:
        if only not in f"{task}, {steps} steps, {options[0][2:]}":
            continue
        steps, seeds = (steps // 20, 1) if quick else (steps, seeds)
        acc, exact = [], []
        for seed in range(seeds):
            with tempfile.TemporaryDirectory() as folder:
                last = train(f"--{task}_task=1", *options, f"--max_iters={steps}", "--eval_interval=100000",
                             f"--random_seed={1337 + seed}", folder=folder)[-1]
            acc.append(last[f"{task}_acc"])
            exact.append(last[f"{task}_exact"])
        rows.append([f"{task}, {steps} steps, {options[0][2:]}", seeds, spread(acc), spread(exact), old])
        found.append(dict(task=task, steps=steps, options=options, acc=acc, exact=exact))
        print("  ".join(map(str, rows[-1])), flush=True)
    table("default settings, mean ± standard deviation over seeds", ["task", "seeds", "accuracy", "exact", "published"], rows)
    return {"rows": found}


def parameters(cfg):
    return sum(p.numel() for p in nets.Denoiser(cfg).parameters())


def attention_twin(cfg, **changes):
    """The attention network with as many parameters as cfg's: the channel mix takes what the time mix does not need."""
    twin = dataclasses.replace(cfg, mixer="attention", direction="bidirectional", dw_jrt=False, ffn_shift="none", **changes)
    spare = parameters(cfg) - parameters(twin)
    return dataclasses.replace(twin, dim_ffn=(twin.dim_ffn or 4 * twin.n_embd) + round(spare / (2 * twin.n_embd * twin.n_layer)))


def flops_per_token(cfg, T):
    """Of one forward pass: 2 a multiply-add of the matrix products, 9 N a channel for one step of a scan (S a, the decay, two outer
    products, S r), 4 C T for attention over T keys. Elementwise work, norms and the embedding are left out."""
    C, D, total = cfg.n_embd, cfg.dim_ffn or 4 * cfg.n_embd, 2 * cfg.n_embd * cfg.vocab_size
    for layer, mixer in enumerate(nets.pattern(cfg)):
        if mixer == "rwkv7":
            ranks = sum(nets.low_ranks(cfg, first="rwkv7" not in nets.pattern(cfg)[:layer]).values())
            scan = 2 * (3 * C * C + 2 * C * ranks) + 9 * C * cfg.head_size
            two = nets.direction(cfg) != "causal"
            total += scan * (1 + two) + 2 * C * C + two * {"add": 0, "gate": 4 * C * C, "concat": 4 * C * C}[cfg.fusion]
        else:
            total += 8 * C * C + 4 * C * T * (mixer == "attention")
        total += 4 * C * D
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


def directions():
    """The networks that two suites compare: C=256, N=64, four layers, and attention with the two-way network's parameters."""
    base = nets.ModelConfig(n_layer=4, n_embd=256, head_size=64, vocab_size=256)
    ways = {"causal": dataclasses.replace(base, direction="causal")}
    ways |= {f"block {n}": dataclasses.replace(base, direction="block", block_size=n) for n in (32, 64, 128)}
    ways["bidirectional"] = dataclasses.replace(base, direction="bidirectional")
    return ways | {"attention twin": attention_twin(ways["bidirectional"])}


def suite_flops():
    """FLOPs per token of one denoising step, from the config, and how far a counted run is from it."""
    if reason := wkv_cuda.build("cpp"):
        raise ValueError(f"the count runs the C++ kernel: {reason}")
    lengths, rows, found = (512, 2048, 8192), [], {}
    for name, cfg in directions().items():
        flops = {T: flops_per_token(cfg, T) for T in lengths}
        off = max(abs(counted_flops(cfg, T) / flops[T] - 1) for T in (lengths[:1] if quick else lengths))
        rows.append([name, f"{parameters(cfg) / 1e6:.2f} M", *(f"{f / 1e6:.2f}" for f in flops.values()), f"{off:.1%}"])
        found[name] = {"flops": flops, "off": off}
    table("MFLOP a token, one denoising step", ["network", "parameters", *(f"T={T}" for T in lengths), "counted run differs by"], rows)
    return {"rows": found}


def suite_direction():
    """Milliseconds of one denoising step at batch 1, every network in turn, and as a multiple of the attention twin's."""
    lengths = (512, 2048) if quick else (512, 2048, 8192, 16384)
    networks = {name: nets.Denoiser(cfg).eval() for name, cfg in directions().items()}
    seen = {}
    for T in lengths:
        x = torch.randint(256, (1, T))
        for i in range(2 if quick else 1 + max(3, rounds * 12288 // (T + 512))):   # the first warms up
            for name, net in networks.items():
                start = time.perf_counter()
                with torch.inference_mode():
                    net(x)
                if i:
                    seen.setdefault((name, T), []).append(time.perf_counter() - start)
    ms = {name: {T: statistics.median(seen[name, T]) * 1e3 for T in lengths} for name in networks}
    table(f"one denoising step, batch 1, C=256, N=64, four layers, {torch.get_num_threads()} threads: ms (multiple of the attention twin)",
          ["network", *(f"T={T}" for T in lengths)],
          [[name, *(f"{t:.1f} ({t / ms['attention twin'][T]:.2f}x)" for T, t in row.items())] for name, row in ms.items()])
    return {**processor(), "ms": ms}


ABLATION = {f"fusion={f}, tied={t}": [f"--fusion={f}", f"--tie_directions={t}"] for f in nets.FUSIONS for t in (0, 1)}
ABLATION |= {f"time_cond={c}": [f"--time_cond={c}"] for c in nets.TIME_CONDS}


def suite_ablation():
    """Fusions and conditionings on real text (data_path, or Python's standard library): a small bidirectional network, 300 steps.
    A spike is a step whose gradient norm is over twice the median of the ten before it, counted after step 50."""
    rows, found = [], {}
    for name, options in ABLATION.items():
        with tempfile.TemporaryDirectory() as folder:
            log = train(*options, f"--data_path={data_path}", "--direction=bidirectional", "--n_layer=3", "--n_embd=128",
                        "--seq_len=128", "--batch_size=16", f"--max_iters={15 if quick else 300}", "--log_interval=1",
                        "--eval_interval=100000", f"--eval_iters={2 if quick else 20}", folder=folder)
        steps, last = [row for row in log if row["event"] == "train"], log[-1]
        norms = [row["grad_norm"] for row in steps]
        spikes = sum(norms[i] > 2 * statistics.median(norms[i - 10:i]) for i in range(50, len(norms)))
        rows.append([name, f"{log[0]['parameters'] / 1e3:.0f} k", f"{last['bits_per_char']:.3f} ± {last['bits_per_char_se']:.3f}",
                     f"{statistics.mean(row['loss'] for row in steps[-50:]):.3f}", spikes, f"{max(norms[50:] or norms):.1f}",
                     f"{statistics.median(row['ms_per_step'] for row in steps):.0f}"])
        found[name] = dict(parameters=log[0]["parameters"], bits=last["bits_per_char"], se=last["bits_per_char_se"], spikes=spikes,
                           loss=[round(row["loss"], 4) for row in steps], grad_norm=[round(n, 3) for n in norms])
        print("  ".join(map(str, rows[-1])), flush=True)
    table("bidirectional RWKV-7 on text, 300 steps (loss curves and gradient norms are in the JSON file)",
          ["setting", "parameters", "bits a character", "last loss", "spikes", "largest norm", "ms a step"], rows)
    return {"rows": found}


ONE_SIDED = ["--tie_directions=1", "--ffn_shift=before"]
TEXT = {"ar": ["--objective=ar", "--direction=causal", "--ffn_shift=before"],
        **{f"{how} {n}": [f"--objective={how}", "--direction=block", f"--block_size={n}", *ONE_SIDED]
           for how in ("block", "block_elbo") for n in (4, 16, 64)},
        "b3d 16": ["--objective=b3d", "--direction=causal", "--block_size=16", "--ffn_shift=before"],
        "bidirectional, elbo": ["--objective=elbo", "--direction=bidirectional", *ONE_SIDED],
        "bidirectional": ["--direction=bidirectional", *ONE_SIDED],
        **{f"bidirectional, ffn_shift={shift}": ["--direction=bidirectional", f"--ffn_shift={shift}"] for shift in ("both", "wide")},
        **{f"{name}{more}": ["--direction=causal", "--ffn_shift=before", *seeded, *options]
           for more, options in (("", []), (", 8 layers", ["--n_layer=8", "--n_embd=96", "--dim_ffn=352"]))
           for name, seeded in (("causal + DW-JRT", ["--dw_jrt=1"]), ("causal", []))},
        **{f"causal + DW-JRT, {more}": ["--direction=causal", "--ffn_shift=before", "--dw_jrt=1", option]
           for more, option in (("scale 20", "--dw_jrt_scale=20"), ("open gates", "--dw_jrt_alpha_init=2"))},
        **{f"attention{name}": ["--mixer=attention", "--dim_ffn=683", f"--ffn_shift={shift}", "--muon_lr=0.04"]
           for name, shift in (("", "none"), (", ffn_shift=both", "both"), (", ffn_shift=wide", "wide"))}}


def kept(suite, key, measure, runs):
    """runs[key], from measure() unless it is there already; written to the JSON file at once, so that a stopped suite goes on."""
    if key not in runs:
        runs[key] = measure()
        write(suite, {"runs": runs})
        print(key + ": " + ", ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in runs[key].items()), flush=True)
    return runs[key]


def earlier(suite):
    """The runs of an earlier, perhaps unfinished suite."""
    path = os.path.join(out, f"{suite}.json")
    if quick or not os.path.exists(path):
        return {}
    with open(path) as f:
        return json.load(f)["runs"]


def chosen(names):
    return [name for name in names if not only or name in only.split(";")]


def suite_text():
    """Bits per character on held-out text (data_path), by objective and network: at most 1.05 M parameters, T=128, 64 rows a step,
    three budgets of steps; three seeds of the longest. What is in the JSON file already is not run again."""
    budgets, runs = ((15, 1),) if quick else ((600, 3), (300, 1), (150, 1)), earlier("text")

    def measure():
        with tempfile.TemporaryDirectory() as folder:
            log = train("config/shakespeare.py", *TEXT[name], f"--data_path={data_path}", f"--max_iters={steps}", f"--random_seed={seed}",
                        "--eval_interval=100000", folder=folder, *(["--batch_size=4", "--eval_iters=2"] * quick))
        return dict(name=name, steps=steps, seed=seed, bits=log[-1]["bits_per_char"], se=log[-1]["bits_per_char_se"],
                    parameters=log[0]["parameters"])
    for steps, seeds in budgets:
        for seed in range(1337, 1337 + seeds):
            for name in chosen(TEXT):
                kept("text", f"{name}, {steps} steps, seed {seed}", measure, runs)
    rows = []
    for name in dict.fromkeys(run["name"] for run in runs.values()):
        mine = [run for run in runs.values() if run["name"] == name]
        by = {steps: [run["bits"] for run in mine if run["steps"] == steps] for steps, _ in budgets}
        rows.append([name, f"{mine[0]['parameters'] / 1e6:.3f} M", *(spread(bits) if bits else "" for bits in by.values()),
                     f"{statistics.mean(run['se'] for run in mine):.4f}"])
    table("bits a character, mean ± standard deviation over seeds; the evaluation's own standard error",
          ["network", "parameters", *(f"{steps} steps" for steps, _ in budgets), "evaluation s.e."], rows)
    pace = text_pace() if only in ("", "pace") else {}
    if pace:
        table("a training step alone on the machine, in turn, ms", ["network", "ms"], [[name, f"{ms:.0f}"] for name, ms in pace.items()])
    return {"runs": runs, "ms": pace}


def text_pace():
    """Milliseconds of a training step of the two networks that stand for equal time, in turn."""
    seen = {"bidirectional, ffn_shift=wide": [], "attention": []}
    for _ in range(1 if quick else rounds):
        for name, times in seen.items():
            with tempfile.TemporaryDirectory() as folder:
                log = train("config/shakespeare.py", *TEXT[name], f"--data_path={data_path}", "--eval_interval=100000", "--eval_iters=1",
                            f"--max_iters={20 if quick else 50}", folder=folder, *["--batch_size=4"] * quick)
            times += step_ms(log)[2:]
    return {name: statistics.median(times) for name, times in seen.items()}


GAUSSIAN = {"mixed, x0, cosine": [], "mse alone": ["config/gaussian_mse.py"], "tokens alone": ["config/gaussian_tokens.py"],
            **{p: [f"--prediction_type={p}"] for p in ("epsilon", "v_prediction")}, **{s: [f"--beta_schedule={s}"] for s in ("linear", "sigmoid")},
            "a prefix is given": ["--mask_policy=suffix", "--drop_given=0"], "all is noised": ["--drop_given=1"],
            "curriculum": ["config/gaussian_curriculum.py"], "embeddings thaw": ["config/gaussian_thaw.py"],
            "clipped, no self-conditioning": ["config/gaussian_clip.py"], "no EMA": ["--ema=0"], "adaln_zero": ["--time_cond=adaln_zero"],
            "biwkv": ["config/birwkv_llada.py"], "attention": ["--mixer=attention", "--ffn_shift=none", "--dim_ffn=476"]}
MASKED = ["config/shakespeare.py", "--ffn_shift=both", "--max_iters=1400"]    # as long as config/gaussian.py takes for its 1000 steps


def bigram_kl(x, y):
    """KL divergence, nats, of the bigrams of x from those of y, both (B,T) ids; a tenth of a count is added to y's, for every pair of
    tokens that occur."""
    V = int(max(x.max(), y.max())) + 1
    p, q = (torch.bincount((z[:, :-1] * V + z[:, 1:]).flatten(), minlength=V * V).double().view(V, V) for z in (x, y))
    here = torch.cat([x.flatten(), y.flatten()]).unique()
    p, q = p[here][:, here], q[here][:, here] + 0.1
    p, q = p / p.sum(), q / q.sum()
    return torch.xlogy(p, p / q).sum().item()


@torch.no_grad()
def sampled(folder, rows, length, **options):
    """`rows` unconditional samples of a run -> ids (rows,length)."""
    saved = nets.load_checkpoint(os.path.join(folder, "ckpt.pt"))
    net = nets.from_pretrained("the run", saved).eval()
    diff = diffusion.trained_with(saved["config"])
    x = torch.full((rows, length), net.mask_id)
    name = options.pop("sampler", diffusion.OBJECTIVES[diff.objective or "masked_mean"].sampler)
    options |= dict(cfg=diff) if name in diffusion.GAUSSIAN_STEPS else {}
    return diffusion.SAMPLERS[name](net, x, x != net.mask_id, net.mask_id, data.generator(1, 0, 3), **options)


def suite_gaussian():
    """Gaussian diffusion on held-out text (data_path): config/gaussian.py as it is, three seeds, beside masked diffusion of equal parameters
    and time; then, 200 steps each, one part of it changed at a time: what rounds rightly by noise level, and the divergence of the
    samples' bigrams from held-out text's. Milliseconds of a denoising step at N = 512, beside the attention twin."""
    runs, rows, length = earlier("gaussian"), 4 if quick else 64, 128
    source = data.TextSource(data_path, length, "char")
    held_out = source.eval_rows(len(source.val) // length)[0]
    kl = lambda y: bigram_kl(y, held_out)

    def measure():
        with tempfile.TemporaryDirectory() as folder:
            log = train(*options, f"--data_path={data_path}", folder=folder, *(["--batch_size=4", "--eval_iters=1", "--max_iters=10"] * quick))
            evals, ms = [row for row in log if row["event"] == "eval"], step_ms(log)
            last = evals[-1]
            found = dict(parameters=log[0]["parameters"], ms=statistics.median(ms), minutes=statistics.mean(ms) * last["step"] / 6e4)
            found |= {k: last[k] for k in ("round_acc_0.1", "round_acc_0.2", "round_acc_0.5", "round_acc_1.0", "bits_per_char") if k in last}
            if "bits_per_char" in last:
                for rule, n in (("topk", 50), ("first_hitting", 0)):
                    found[f"kl, {rule}"] = kl(sampled(folder, rows, length, sampler=rule, steps=n))
            else:
                counts = (10, 20, 50, 100, 200) if name.endswith("seed 1337") else (50,)
                found |= {f"kl, {n} steps": kl(sampled(folder, rows, length, steps=n)) for n in counts}
                found["kl, ddpm"] = kl(sampled(folder, rows, length, steps=50, sampler="ddpm"))
                found |= dict(curve=[(row["step"], row["round_acc_0.5"]) for row in evals], alarms=sum("alarm" in row for row in evals[1:]))
        return found
    budget = {f"gaussian, seed {seed}": ["config/gaussian.py", f"--random_seed={seed}"] for seed in (1337, 1338, 1339)} | {"masked": MASKED}
    parts = {name: ["config/gaussian.py", *changes, "--max_iters=200", "--eval_interval=40"] for name, changes in GAUSSIAN.items()}
    for name in chosen(budget | parts) if not quick else ("gaussian, seed 1337", "masked", "mse alone"):
        options = (budget | parts)[name]
        kept("gaussian", name, measure, runs)
    number = lambda run, key: f"{run[key]:.3f}" if key in run else ""
    own = kl(source.train_rows(0, rows, 0, rows, 1)[0])
    title = f"whole runs; divergence of {rows} samples' bigrams from held-out text's, nats ({rows} rows of training text: {own:.3f})"
    for title, names in ((title, budget), ("200 steps each, one part changed", parts)):
        lines = []
        for name, run in runs.items():
            if name in names:
                first, other = ("topk", "first_hitting") if "kl, topk" in run else ("50 steps", "ddpm")
                keys = *(f"round_acc_{t}" for t in ("0.2", "0.5", "1.0")), f"kl, {first}", f"kl, {other}"
                lines.append([name, f"{run['parameters'] / 1e6:.2f} M", f"{run['minutes']:.1f}", *(number(run, key) for key in keys),
                              run.get("alarms", "")])
        table(title, ["setting", "parameters", "minutes", "right at t = 0.2", "0.5", "1", "divergence, ddim or topk", "ddpm or one by one",
                      "alarms"], lines)
    first = runs.get("gaussian, seed 1337", {})
    table("divergence by sampling steps (DDIM)", ["steps", "divergence"],
          [[key[4:-6], f"{v:.3f}"] for key, v in first.items() if key.endswith("steps")])
    plot("gaussian", "tokens that round rightly at t = 0.5", "step", {name: zip(*runs[name]["curve"]) for name in parts if name in runs})
    speed = denoising_speed()
    table("50 denoising steps at N = 512, batch 1, ms a step", ["network", "ms"], [[k, f"{v:.1f}"] for k, v in speed.items()])
    return {"runs": runs, "speed": speed}


@torch.no_grad()
def denoising_speed():
    """Milliseconds of one of 50 DDIM steps at 512 tokens, untrained networks of C=256, N=64, four layers, in turn."""
    base = dataclasses.replace(directions()["bidirectional"], gaussian=True, time_cond="adaln_zero", tie_embeddings=True)
    networks = {"rwkv7, bidirectional": base, "biwkv": dataclasses.replace(base, mixer="biwkv"), "attention twin": attention_twin(base)}
    seen, x, steps = {}, torch.full((1, 512), 256), 5 if quick else 50
    for i in range(2 if quick else 4):
        for name, cfg in networks.items():
            net = networks[name] = nets.Denoiser(cfg).eval() if isinstance(cfg, nets.ModelConfig) else cfg
            start = time.perf_counter()
            diffusion.SAMPLERS["ddim"](net, x, x != 256, 256, torch.Generator().manual_seed(0), cfg=diffusion.DiffusionConfig(), steps=steps)
            if i:
                seen.setdefault(name, []).append((time.perf_counter() - start) / steps * 1e3)
    return {name: statistics.median(times) for name, times in seen.items()}


LATENT = {   # name -> the run it goes on from, and settings; a name may be anything, --only takes those names
    "backbone": ("", ["--objective=ar", "--direction=causal", "--ffn_shift=before"]),
    "sequential": ("", ["--objective=sequential"]), "stage1_coupling": ("", ["--objective=stage1_coupling"]),
    "l2t": ("", ["--objective=l2t"]), "t2l": ("", ["--objective=t2l"]),
    "latent from text": ("", ["--objective=sequential", "--latent_pred_from=text"]),
    "latent from prefix": ("", ["--objective=sequential", "--latent_pred_from=prefix"]),
    "from the backbone": ("backbone", ["--objective=sequential", "--predict=next", "--ffn_shift=before"]),
    "from the backbone, frozen": ("backbone", ["--objective=sequential", "--predict=next", "--ffn_shift=before", "--freeze_backbone=1"]),
    "embedding diffusion": ("", ["--objective=gaussian", "--self_cond=1", "--ema=0.99", "--time_cond=add"]),
    "stage2, fixed prior": ("sequential", ["--objective=stage2_variational"]),
    "stage2, learned prior": ("sequential", ["--objective=stage2_variational", "--latent_prior=learned"]),
    "stage2, pooled states": ("sequential", ["--objective=stage2_variational", "--latent_encoder=rwkv_pool"]),
    "stage2, geometry": ("sequential", ["--objective=stage2_variational", "--geom_weight=1"])}


def suite_latent():
    """Texts with latents (python data.py latents of data_path: 128 characters each, 32 components of their n-grams), validation split: how well
    each is told from the other, whether samples fit, Stage II, and whether a pretrained backbone keeps its language. The runs stay in
    OUT/local, so that those which go on from others find them."""
    work, runs, steps, n = os.path.join(out, "local"), earlier("latent"), 10 if quick else 600, 8 if quick else 64
    pairs = os.path.join(work, "pairs.quick" if quick else "pairs")
    text = data_path or os.path.join(pairs, "text.txt")
    if not data.has_pairs(pairs) and data.main(["latents", f"--data_path={data_path}", f"--out={pairs}"]):
        raise RuntimeError("python data.py latents failed")
    source = data.PairSource(pairs, 128)
    projection, buckets = data.Projection(*source.projection), len(source.projection[0])
    place = lambda name: os.path.join(work, ("quick " if quick else "") + name)
    texts = lambda ids: [source.tokenizer.decode(row.tolist()) for row in ids]
    ckpt = lambda name: os.path.join(place(name), "ckpt.pt")

    def trained(name):
        first, options = LATENT[name]
        if not os.path.exists(ckpt(name)):
            if first:
                trained(first)
            mine = [f"--init_from={ckpt(first)}"] * bool(first) + [f"--data_path={text if name == 'backbone' else pairs}"]
            train("config/latent.py", *options, *mine, f"--max_iters={steps}", "--eval_interval=100000", folder=place(name),
                  *(["--batch_size=4", "--eval_iters=2"] * quick))
        return nets.load_checkpoint(ckpt(name))

    def perplexity(saved):
        """Of a byte, of what is left of the causal backbone, on held-out text."""
        cfg = nets.ModelConfig(**(nets.load_checkpoint(ckpt("backbone"))["model_config"]))
        net = nets.Denoiser(cfg).eval()
        net.load_state_dict({k: v for k, v in saved["model"].items() if k in net.state_dict()})
        x = data.TextSource(text, 128, "byte").eval_rows(n * 4)[0]
        return diffusion.exact_nll(net, x, net.mask_id).mean().exp().item()

    @torch.no_grad()
    def measure():
        saved = trained(name)
        log = [json.loads(line) for line in open(os.path.join(place(name), "log.jsonl"))]
        ms = statistics.median(step_ms(log))
        found = dict(parameters=log[0]["parameters"], active=log[0]["active"], ms=ms)
        if name == "backbone":
            return found | dict(perplexity=perplexity(saved))
        net, diff, g = nets.from_pretrained(name, saved).eval(), diffusion.trained_with(saved["config"]), data.generator(1, 0, 3)
        x, _, lengths, z = source.eval_rows(n * 2 if quick else 10**6)
        stage2 = net.latent_encoder is not None
        if net.cfg.gaussian:               # its cross-entropy is no bound: the mean over noise levels
            rows, latent = x[:4 * n], diffusion.clean_latent(net, z[:4 * n])
            for key, given in (("", latent), ("_shuffled", latent.roll(1, 0)), ("_no_latent", torch.zeros_like(latent))):
                report, alarm = diffusion.gaussian_report(net, rows, torch.ones_like(rows, dtype=torch.bool), None, data.generator(1, 0, 2),
                                                          diff, latent=given)
                found |= {f"text_nats{key}": statistics.mean(v for k, v in report.items() if k.startswith("ce_")), "alarm": alarm}
        else:
            found |= diffusion.latent_report(net, x, lengths, z, data.generator(1, 0, 2), diff)
        if LATENT[name][0] == "backbone":
            found["perplexity"] = perplexity(saved)
        mu = net.posterior(x[:n])[0] if stage2 else z[:n]
        rule = "ddim" if net.cfg.gaussian else "first_hitting"
        l2t = lambda q: texts(diffusion.sample_text_from_latent(net, q, 128, data.generator(2, 0, 3), diff, rule, steps=50, temperature=0.5))
        truth = texts(x[:n])
        for key, q in (("", mu), ("_shuffled", mu.roll(1, 0)), ("_no_latent", torch.zeros_like(mu))):
            found |= {f"{metric}{key}": score for metric, score in overlap(l2t(q), truth).items()}
        if not net.cfg.gaussian and name not in ("l2t", "t2l"):
            ids, sampled_z = diffusion.sample_joint(net, n, 128, g, diff, 64, temperature=0.7)
            own = torch.from_numpy(projection(data.ngrams(texts(ids), buckets)))
            if stage2:
                own = net.posterior(ids)[0]
            far = torch.cdist(own, sampled_z)              # against every other sampled latent: random ones
            nearer = (far.diagonal()[:, None] < far).sum(1) / (n - 1)
            found |= {"joint_nearer": nearer.mean().item(), "joint_kl": bigram_kl(ids, x), "sample": texts(ids[:1])[0]}
        return found
    for name in chosen(LATENT)[:3 if quick else None]:
        kept("latent", name, measure, runs)
    number = lambda run, key, scale=1.0, digits=3: f"{scale * run[key]:.{digits}f}" if key in run else ""
    ratio = lambda run: f"{run['latent_mse'] / run['latent_mse_of_mean']:.3f}" if "latent_mse" in run else ""
    three = lambda run, key, digits: " / ".join(number(run, key + end, 1, digits) for end in ("", "_shuffled", "_no_latent")) if key in run else ""
    table("texts and latents, validation split (right latent / shuffled / none)",
          ["run", "latent MSE of mean's", "median rank, %", "text, nats a token", "BLEU", "chrF", "joint nearer, %", "bigram KL"],
          [[name, ratio(run), number(run, "latent_rank", 100, 1), three(run, "text_nats", 3), three(run, "bleu", 1), three(run, "chrf", 1),
            number(run, "joint_nearer", 100, 0), number(run, "joint_kl")] for name, run in runs.items() if "text_nats" in run])
    table("Stage II", ["run", "KL, nats a text", "active units", "text, nats a token: z / none"],
          [[name, number(run, "kl", 1, 2), run["active_units"], f"{run['text_nats']:.3f} / {run['text_nats_no_latent']:.3f}"]
           for name, run in runs.items() if "kl" in run])
    table("perplexity of a byte, causal backbone", ["run", "perplexity"],
          [[name, number(run, "perplexity", 1, 2)] for name, run in runs.items() if "perplexity" in run])
    for name, run in runs.items():
        if "sample" in run:
            print(f"  --- {name}: {run['sample']!r}")
    return {"runs": runs}


def overlap(texts, truth):
    """BLEU and chrF of texts against the true ones, in %, by the sacrebleu package, if it is there."""
    try:
        import sacrebleu
    except ImportError:
        return {}
    return {"bleu": sacrebleu.corpus_bleu(texts, [truth], force=True).score, "chrf": sacrebleu.corpus_chrf(texts, [truth]).score}


def suite_generate():
    """What a block of 32 tokens costs after a context of given length, untrained networks (C=256, N=64, four layers), 8 denoiser calls
    and, with a cache, one clean pass a block: RWKV-7 from its carried state, the attention twin from its cache of keys and values,
    and reading everything again in every call."""
    n, calls, base = 32, 8, nets.ModelConfig(n_layer=4, n_embd=256, head_size=64, vocab_size=256, block_size=32, direction="block")
    rwkv = nets.Denoiser(base).eval()
    twin = nets.Denoiser(dataclasses.replace(attention_twin(base), direction="block")).eval()
    jobs, contexts = {}, (64, 512) if quick else (512, 4096, 16384, 65536)
    for B in (1, 2 if quick else 32):
        for context in contexts:
            if B * context > 32 * 4096 and B > 1:
                continue
            text, mask = torch.randint(256, (B, context)), torch.full((B, n), 256)
            for name, net in (("rwkv7, carried state", rwkv), ("attention, cache", twin)):
                state = None
                with torch.inference_mode():
                    for piece in text.split(256, 1):               # attention scores of longer pieces would fill the memory
                        state = net(piece, state=state, clean=True).state
                one = lambda net=net, state=state, mask=mask: [net(mask, state=state) for _ in range(calls)] + [net(mask, state=state, clean=True)]
                jobs[name, B, context] = one, 1, nets.state_bytes(state)
            whole = torch.cat([text, mask], 1)
            jobs["rwkv7, all again", B, context] = (lambda whole=whole: rwkv(whole)), calls, nets.state_bytes(whole)
    times = {key: [] for key in jobs}
    for i in range(2 if quick else 20):                              # in turn; what takes long, less often
        for key, (one, scale, _) in jobs.items():
            if not times[key] or sum(times[key]) < 2 * scale:
                start = time.perf_counter()
                with torch.inference_mode():
                    one()
                times[key].append((time.perf_counter() - start) * scale)
    rows, found = [], {}
    for (name, B, context), (_, _, size) in jobs.items():
        ms = statistics.median(times[name, B, context]) * 1e3
        found[f"{name}, batch {B}, context {context}"] = dict(ms=ms, cache_bytes=size)
        rows.append([name, B, context, f"{ms:.1f}", f"{B * n / ms * 1e3:.0f}", calls, f"{size / B / 1024:.0f}"])
    first, last = (found[f"rwkv7, carried state, batch 1, context {c}"]["ms"] for c in (contexts[0], contexts[-1]))
    table("one block of 32 tokens", ["network", "batch", "context", "ms a block", "tokens/s", "calls", "cache KiB a row"], rows)
    print(f"  rwkv7 from its carried state: a block at {contexts[-1]} tokens of context takes {last / first:.2f}x one at {contexts[0]}")
    return {"rows": found, "ratio": last / first}


def recurrence_inputs(B, T, H, N, dtype, device):
    """r, w, k, v, a, b as a network gives them to wkv7."""
    g = torch.Generator(device).manual_seed(0)
    normal = lambda: torch.randn(B, T, H, N, generator=g, device=device)
    uniform = lambda: torch.rand(B, T, H, N, generator=g, device=device)
    kk = torch.nn.functional.normalize(normal(), dim=-1)
    return [x.to(dtype).requires_grad_() for x in (normal(), -0.6 * uniform(), 0.3 * normal(), normal(), -kk, kk * uniform())]


def gpu_parity(limits, device):
    """Relative errors of the kernels against the definitions in float64 on the same, perhaps rounded, inputs; every output, every gradient."""
    def errors(f, twin, names, x):
        found, wanted = [], []
        for op, leaves, to in ((f, x, found), (twin, [z.detach().double().requires_grad_() for z in x], wanted)):
            out = op(*leaves)
            out = out if isinstance(out, tuple) else (out,)
            g = torch.Generator(device).manual_seed(1)
            grads = [torch.randn(z.shape, generator=g, device=device).to(y.dtype).to(z.dtype) for y, z in zip(found or out, out)]
            to += [*out, *torch.autograd.grad(out, leaves, grads)]
        return {name: ((a.double() - b).norm() / b.norm()).item() for name, a, b in zip(names, found, wanted)}
    rows, T, names = {}, 50 if quick else 200, "y s dr dw dk dv da db ds0 dc".split()
    for dtype in (torch.float32, torch.bfloat16):
        for N in wkv_cuda.HEAD_SIZES:
            for every in (None, 5, 16):
                x = recurrence_inputs(2, T + 1, 3, N, dtype, device)
                s0, c = (0.3 * torch.randn(*shape, device=device) for shape in ((2, 3, N, N), x[0].shape))
                x += [s0.requires_grad_(), c.to(dtype).requires_grad_()]
                ops = (lambda *x, op=op: op(*x, every=every) for op in (wkv_cuda.wkv7, wkv_cuda.wkv7_loop))
                rows[f"wkv7 N={N}{f' every={every}' if every else ''} {str(dtype)[6:]}"] = errors(*ops, names, x)
    k, v = (torch.randn(2, T, 48, device=device) for _ in range(2))
    x = [z.requires_grad_() for z in (torch.rand(2, 48, device=device), torch.randn(2, 48, device=device), k, v)]
    rows["biwkv float32"] = errors(wkv_cuda.biwkv, wkv_cuda.biwkv_loop, ("y", "dw", "du", "dk", "dv"), x)
    table("relative error against float64, allowed 1e-5 (float32) and 2e-2 (bfloat16)", ["kernel", "largest", "of"],
          [[name, f"{max(row.values()):.1e}", max(row, key=row.get)] for name, row in rows.items()])
    if bad := [name for name, row in rows.items() if not max(row.values()) <= (2e-2 if "bfloat16" in name else 1e-5)]:
        raise ValueError(f"the kernels are wrong on this GPU, so that nothing else is measured: {', '.join(bad)}; WKV_IMPL=torch does without them")
    return rows


def gpu_ms(f, device):
    """Median milliseconds of f(), which is called once before."""
    times = []
    for i in range(3 if quick else 12):
        begin, end = (torch.Event(device, enable_timing=True) for _ in range(2))
        begin.record()
        f()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times[1:])


def gpu_limits(device):
    """What the GPU itself does: bytes/s of a copy, FLOP/s of a matrix product in bfloat16."""
    size = 2**20 if quick else 2**30
    x, y = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    n = 512 if quick else 8192
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    found = {"bytes_per_s": 2 * size / gpu_ms(lambda: y.copy_(x), device) * 1e3, "flops": 2 * n**3 / gpu_ms(lambda: a @ a, device) * 1e3}
    print(f"\n  this GPU copies {found['bytes_per_s'] / 1e9:.0f} GB/s and multiplies {found['flops'] / 1e12:.1f} TFLOP/s in bfloat16", flush=True)
    return found


def official_kernels(folder):
    """RWKV-LM's own training kernels from a checkout of it -> {name: function of r, w, k, v, a, b as wkv7 takes them}: head size 64, T a multiple
    of 16, bfloat16; their w goes through a sigmoid in the kernel. ValueError where a file is missing."""
    from torch.utils.cpp_extension import load
    flags, found = ["-O3", "--use_fast_math", "--extra-device-vectorization", "-D_N_=64", "-D_CHUNK_LEN_=16"], {}
    for name, files in {"rwkv7_clampw": ("rwkv7_clampw.cu", "rwkv7_clampw.cpp"),
                        "rwkv7_clampw_v3": ("rwkv7_clampw_v3_for_h100.cu", "rwkv7_clampw_v3.cpp")}.items():
        sources = [os.path.join(folder, "RWKV-v7", "train_temp", "cuda", f) for f in files]
        if missing := [f for f in sources if not os.path.isfile(f)]:
            raise ValueError(f"rwkv_lm={folder}: there is no {missing[0]}: give the folder of a checkout of github.com/BlinkDL/RWKV-LM")
        load(name, sources, is_python_module=False, extra_cuda_cflags=flags)
        op = getattr(torch.ops, name)

        class Official(torch.autograd.Function):
            @staticmethod
            def forward(ctx, *x, op=op):
                B, T, H, N = x[0].shape
                y, sa = torch.empty_like(x[0]), torch.empty_like(x[0], dtype=torch.float32)
                s = sa.new_empty(B, H, T // 16, N, N)
                op.forward(*x, y, s, sa)
                ctx.save_for_backward(*x, s, sa)
                return y

            @staticmethod
            def backward(ctx, dy, op=op):
                *x, s, sa = ctx.saved_tensors
                grads = [torch.empty_like(z) for z in x]
                op.backward(*x, dy.contiguous(), s, sa, *grads)
                return tuple(grads)
        found[name] = Official.apply
    return found


def gpu_recurrence(limits, device):
    """wkv7 at (B,T,H,N) = (8,T,32,64) in bfloat16: forward for inference, forward and backward for training; beside fla where it is
    installed, and RWKV-LM's kernels from a checkout of it (rwkv_lm). Bytes are those that must move at least (inputs, output, gradients, and
    what forward keeps for backward), FLOPs 9 N a channel forward and 19 N backward, without what is computed again."""
    B, H, N = (1, 2, 64) if quick else (8, 32, 64)
    impls = {wkv_cuda.backend(device): lambda *x: wkv_cuda.wkv7(*x)[0]}
    try:                                   # the function that fla's chunk_rwkv7 calls; its own arguments differ between versions
        from fla.ops.generalized_delta_rule import chunk_dplr_delta_rule
        impls["fla"] = lambda r, w, k, v, a, b: chunk_dplr_delta_rule(q=r, k=k, v=v, a=a, b=b, gk=w, scale=1.0, output_final_state=False)[0]
    except ImportError as e:
        print(f"  fla's chunk_rwkv7 is not measured: {e} (pip install flash-linear-attention)")
    if rwkv_lm:
        impls |= official_kernels(rwkv_lm)
    else:
        print("  RWKV-LM's kernels are not measured: give a checkout of github.com/BlinkDL/RWKV-LM as --rwkv_lm=FOLDER")
    rows, found = [], {}
    for T in (64, 128) if quick else (512, 1024, 2048, 4096, 8192, 16384):
        x = recurrence_inputs(B, T, H, N, torch.bfloat16, device)
        dy, size = torch.randn_like(x[0]), x[0].numel()
        kept = size * (4 + 4 * N / 16)
        work = {"forward": (14 * size, 9 * N * size), "forward+backward": (14 * size + 2 * kept + 26 * size, 28 * N * size)}
        for name, f in impls.items():
            def forward():
                with torch.no_grad():
                    f(*x)
            for what, job in (("forward", forward), ("forward+backward", lambda: torch.autograd.grad(f(*x), x, dy))):
                ms = gpu_ms(job, device)
                bytes_per_s, flops = (z / ms * 1e3 for z in work[what])
                found[f"{name}, {what}, T={T}"] = dict(ms=ms, bytes_per_s=bytes_per_s, flops=flops)
                rows.append([f"{name}, {what}", T, f"{ms:.3f}", f"{bytes_per_s / 1e9:.0f}", f"{bytes_per_s / limits['bytes_per_s']:.1%}",
                             f"{flops / 1e12:.2f}", f"{flops / limits['flops']:.1%}"])
    table(f"wkv7 at (B,T,H,N) = ({B},T,{H},{N}), bfloat16",
          ["back end", "T", "ms", "GB/s", "of a copy", "TFLOP/s", "of a matrix product"], rows)
    return found


def training_step(cfg, batch, T, device):
    """What one step takes -> (parameters, milliseconds, most bytes of memory)."""
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
    return sum(p.numel() for p in net.parameters()), gpu_ms(step, device), torch.accelerator.max_memory_allocated()


def gpu_training(size, T, limits, device):
    """A training step (masked tokens, AdamW, bfloat16 products, torch.compile) of networks of about 124 M or 1.5 B parameters on rows of
    T tokens: one causal scan, two-way, and the attention twin. MFU is against the measured matrix product."""
    V, (L, C, tokens) = 50304, {"124M": (12, 768, 16384), "1.5B": (24, 2048, 4096)}[size]
    if quick:
        L, C, tokens, T = 2, 64, 128, 64
    rows, found = [], {}
    base = nets.ModelConfig(n_layer=L, n_embd=C, head_size=16 if quick else 64, vocab_size=V, tie_embeddings=True, direction="causal")
    two_way = dataclasses.replace(base, direction="bidirectional")
    with torch.device("meta"):             # only counts parameters
        twin = attention_twin(two_way)
    for name, cfg in {"causal": base, "bidirectional": two_way, "attention twin": twin}.items():
        torch.accelerator.empty_cache()
        started = time.perf_counter()
        try:
            count, ms, memory = training_step(cfg, tokens // T, T, device)
        except torch.OutOfMemoryError:
            print(f"  {size} {name}: {tokens // T} x {T} tokens do not fit this GPU", flush=True)
            continue
        speed = tokens / ms * 1e3
        mfu = 3 * flops_per_token(cfg, T) * speed / limits["flops"]
        found[name] = dict(parameters=count, ms=ms, tokens_per_s=speed, memory_bytes=memory, mfu=mfu)
        rows.append([name, f"{count / 1e6:.0f} M", f"{tokens // T} x {T}", f"{ms:.1f}", f"{speed:.0f}",
                     f"{memory / 2**30:.1f}", f"{mfu:.1%}", f"{time.perf_counter() - started:.0f}"])
        print(f"  {', '.join(rows[-1])}", flush=True)
    table(f"a training step, {size}", ["network", "parameters", "batch", "ms", "tokens/s", "GiB", "MFU", "s with compilation"], rows)
    return found


@torch.inference_mode()
def gpu_generation(limits, device):
    """Tokens/s of blocks of 32 after 1024 tokens, 8 denoiser calls and a clean pass each, 124 M parameters, bfloat16 products."""
    n, calls, context = 32, 8, 64 if quick else 1024
    L, C, N, V = (2, 64, 16, 256) if quick else (12, 768, 64, 50304)
    base = nets.ModelConfig(n_layer=L, n_embd=C, head_size=N, vocab_size=V, tie_embeddings=True, block_size=n, direction="block")
    with torch.device("meta"):
        twin = dataclasses.replace(attention_twin(base), direction="block")
    rows, found = [], {}
    for name, cfg in (("rwkv7, carried state", base), ("attention, cache", twin)):
        with torch.device(device):
            net = nets.Denoiser(cfg).eval()
        for B in (1, 2 if quick else 32):
            text, mask = torch.randint(V, (B, context), device=device), torch.full((B, n), V, device=device)
            with torch.autocast(torch.device(device).type, torch.bfloat16):
                state = net(text, clean=True).state
                def block():
                    for _ in range(calls):
                        net(mask, state=state)
                    net(mask, state=state, clean=True)
                ms = gpu_ms(block, device)
            found[f"{name}, batch {B}"] = dict(ms=ms, tokens_per_s=B * n / ms * 1e3)
            rows.append([name, B, f"{ms:.1f}", f"{B * n / ms * 1e3:.0f}"])
    table("one block of 32 tokens", ["network", "batch", "ms", "tokens/s"], rows)
    return found


GPU_PARTS = {"parity": gpu_parity, "wkv7": gpu_recurrence, "generation": gpu_generation}
GPU_PARTS |= {f"training {size} {T}": functools.partial(gpu_training, size, T) for size in ("124M", "1.5B") for T in (1024, 4096)}


def suite_gpu():
    """The parts asked for, each kept as soon as it is measured, beside what is on file for this GPU. ValueError without one."""
    if not torch.cuda.is_available():
        raise ValueError("suite=gpu measures a GPU, and torch sees none (nvidia-smi, CUDA_VISIBLE_DEVICES, a CUDA build of torch)")
    if reason := wkv_cuda.build("cuda"):
        raise ValueError(f"nothing to measure: {reason}")
    found = {"processor": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    with contextlib.suppress(OSError):
        found = json.load(open(where("gpu", found))) | found
    limits = found["limits"] = gpu_limits("cuda")
    for name in chosen(GPU_PARTS):
        found[name] = GPU_PARTS[name](limits, "cuda")
        write("gpu", found)
    return found


SUITES = {"wkv": suite_wkv, "step": suite_step, "published": suite_published, "tasks": suite_tasks, "flops": suite_flops,
          "direction": suite_direction, "ablation": suite_ablation, "text": suite_text, "generate": suite_generate, "gaussian": suite_gaussian,
          "latent": suite_latent, "gpu": suite_gpu}


def where(name, result):
    """The file of a suite's figures, those of a processor's speed under its name; a quick run must not replace measured ones."""
    kind = result.get("processor", "") + (f" {32 * result['vector']} bit" if "vector" in result else "")
    kind = re.sub(r"[^a-z0-9]+", "-", kind.lower())
    return os.path.join(out, ".".join([name, *filter(None, [kind]), *["quick"] * quick, "json"]))


def write(name, result):
    """Keep a suite's figures as JSON -> its path."""
    os.makedirs(out, exist_ok=True)
    path = where(name, result)
    with open(path, "w") as f:
        head = {"suite": name, "torch": torch.__version__, "threads": torch.get_num_threads()}
        json.dump(head | result | head, f, indent=1)
    return path


def main():
    if threads:
        torch.set_num_threads(threads)
    nets.tune_cpu()
    print(f"\nwritten to {write(suite, SUITES[suite]())}")


if __name__ == "__main__":
    with one_line_errors():
        configure(globals(), show=False, families=(), choices=dict(suite=SUITES))
        main()
