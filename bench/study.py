"""python bench.py --suite=study: where DW-JRT helps: causal RWKV-7 with each form of seed, rows read twice,
shifts to both sides, alternating and two scans, attention; at equal steps and parameters, at equal time."""
import statistics
from dataclasses import replace

import torch

import bench
import data
import diffusion
import model as nets
import tasks
from bench import Run, by_name, chosen, parameters, pyplot, quality, save_figure, spread, table

LEAK, FIRST = dict(dw_jrt=True, dw_jrt_inject="leak"), dict(rotary=True, observed_first=True)
CHUNKS = dict(dw_jrt=True, dw_jrt_inject="reverse", dw_jrt_chunk=8, dw_jrt_scale=1.0, dw_jrt_alpha_init=0.0)
TWO_WAY = dict(direction="bidirectional", tie_directions=True)      # untied, its channel mix would be small
NETWORKS = {   # fields of ModelConfig beside direction=causal
    "causal": {}, "causal, positions": dict(rotary=True),
    "seed: gate": dict(dw_jrt=True, dw_jrt_inject="gate"), "seed: leak": LEAK, "seeds of chunks": CHUNKS,
    "read twice": dict(read_twice=True), "observed first": FIRST, "wide shift": dict(ffn_shift="wide"),
    "wide shift, seed: leak": LEAK | dict(ffn_shift="wide"),
    "wide shift, observed first": FIRST | dict(ffn_shift="wide"),
    "alternate": dict(direction="alternate"),
    "two-way": TWO_WAY, "two-way, positions": TWO_WAY | dict(rotary=True),
    "attention": dict(mixer="attention", direction="bidirectional")}
# task: (trained and measured with, measured again with: longer rows, fuller sets, more holes)
TASKS = {"struct": ({}, dict(len=12)), "rightcopy": ({}, dict(len=12)), "rightrev": ({}, dict(len=12)),
         "index": ({}, dict(len=24)), "add": ({}, dict(len=12)), "kvsort": (dict(n_test=4), dict(n_test=7)),
         "permfill": (dict(n_test=6), dict(n_test=10)), "sudoku": ({}, dict(holes_test=12)),
         "text": ({}, dict(len=256))}
RATES = (0.007, 0.014, 0.028)      # of Muon, tried with every network: this is the grid
TUNED_ON = ("struct", "rightrev", "kvsort")
SIZES = {"task": nets.ModelConfig(n_layer=2, direction="causal", vocab_size=32),
         "text": nets.ModelConfig(direction="causal", vocab_size=65, dim_ffn=592, rank_w=16, rank_a=16,
                                  rank_v=16, rank_g=32)}

def options(network, task, steps, seed, rate):
    """Of train.py: the network with as many parameters as the causal one."""
    base = SIZES["text" if task == "text" else "task"]
    cfg = replace(base, **NETWORKS[network])
    spare = round((parameters(base) - parameters(cfg)) / (2 * cfg.n_embd * cfg.n_layer))
    given = {"direction": "causal", "ffn_shift": "before"} | NETWORKS[network]
    given |= dict(dim_ffn=(base.dim_ffn or 4 * base.n_embd) + spare, max_iters=steps, random_seed=seed)
    given |= dict(muon_lr=rate * (2 if task == "text" else 1), eval_interval=100000)
    if task == "text":
        start = ["config/shakespeare.py", f"--data_path={bench.data_path}"]
    else:
        start = [f"--{task}_task=1", *(f"--{task}_{key}={value}" for key, value in TASKS[task][0].items())]
    return start + [f"--{key}={value}" for key, value in given.items()]

def longer(task, folder):
    """Accuracy, exact match or bits of a run on the second kind of rows."""
    net, cfg = bench.reopened(folder)
    objective, draws = diffusion.OBJECTIVES[cfg.objective or "task"](cfg, net.cfg), data.generator(1234, 0, 2)
    own, other = TASKS[task]
    with torch.no_grad():
        if task == "text":
            source, n = data.TextSource(bench.data_path, other["len"], "char"), 8 if bench.quick else 640
            nats = (objective.bound(net, part, draws) for part in source.eval_rows(n)[0].split(64))
            return {"longer": source.report(nats)["bits_per_char"]}
        settings = tasks.params(task, {f"{task}_{key}": value for key, value in (own | other).items()})
        source = data.TaskSource(task, settings, 128)
        found, _ = objective.evaluate(net, source, source.eval_rows(200, 1234), draws, 64)
    return {"longer": found[f"{task}_acc"], "longer_exact": found[f"{task}_exact"]}

def studied(runs):
    """{name: (task, Run)} trained, measured and kept -> {name: figures}."""
    def measure(name, folder):
        return longer(runs[name][0], folder)
    return quality("study", {name: run for name, (_, run) in runs.items()}, measure)

def run_of(network, task, steps, seed, rate):
    metrics = {"acc": f"{task}_acc", "exact": f"{task}_exact"}
    if task == "text":
        metrics = {"bits": "bits_per_char"}
    small = ["--batch_size=4", "--eval_iters=2"] if bench.quick else []
    return task, Run(options(network, task, steps, seed, rate) + small, metrics)

def suite():
    """The rate is chosen for each network on seed 1, from one grid; figures are of three other seeds."""
    networks, few = chosen(NETWORKS)[:2 if bench.quick else None], bench.quick
    steps = {task: 10 if few else 300 if task == "text" else 400 for task in TASKS}
    tasks_, seeds = (("struct", "text"), (1337,)) if few else (TASKS, (1337, 1338, 1339))
    grid = {(network, rate): [f"tuning {network}, rate {rate}, {task}, seed 1" for task in TUNED_ON]
            for network in networks for rate in (RATES[:1] if few else RATES)}
    tuning = {name: run_of(network, task, 10 if few else 300, 1, rate)
              for (network, rate), names in grid.items() for task, name in zip(TUNED_ON, names)}
    found = studied(tuning)
    best = {}
    for network in networks:
        score = {rate: statistics.mean(found[name]["acc"] for name in names)
                 for (mine, rate), names in grid.items() if mine == network}
        best[network] = max(score, key=score.get)
    table("the rate of each network", "network | rate", "{rate}",
          {network: {"rate": rate} for network, rate in best.items()})

    def all_runs(title, steps):
        """steps: {(network, task): number}."""
        return {f"{network}, {task}, {title}, seed {seed}": run_of(network, task, n, seed, best[network])
                for (network, task), n in steps.items() for seed in seeds}
    same = {(network, task): steps[task] for task in tasks_ for network in networks}
    found |= studied(all_runs("equal steps", same))

    # the pace of all, in turn; the networks of all tasks have one size, and are measured on struct
    pace = {f"{network}, {kind}, pace, seed {turn}": run_of(network, kind, 5 if few else n, 1, best[network])
            for turn in (1, 2, 3) for kind, n in (("struct", 60), ("text", 20)) for network in networks}
    found |= studied(pace)

    def ms(network, task):
        """Of a step."""
        name = f"{network}, {'text' if task == 'text' else 'struct'}, pace, seed"
        return statistics.median(found[f"{name} {turn}"]["ms"] for turn in (1, 2, 3))
    ratio = {key: ms("causal", key[1]) / ms(*key) for key in same} if "causal" in networks else {}
    timed = {key: max(2, round(steps[key[1]] * x)) for key, x in ratio.items() if abs(x - 1) > 0.1}
    found |= studied(all_runs("equal time", timed))
    shown(by_name(found), networks, tasks_, same, timed)
    return {"runs": found}

def shown(found, networks, tasks_, same, timed):
    """A table for equal steps, longer rows, equal time; the picture of the first two."""
    def cell(run, kind):
        values = run.get({"": "acc", "longer": "longer"}[kind], run.get("bits", []))
        return spread(values, 3) if values else ""

    for kind, title, way, which in (("", "equal steps: accuracy, bits per character", "equal steps", same),
                                    ("longer", "longer rows, fuller sets, more holes", "equal steps", same),
                                    ("", "equal time, where it differs", "equal time", timed)):
        rows = {}
        for network in networks:
            keys = {task: f"{network}, {task}, {way}" for task in tasks_ if (network, task) in which}
            rows[network] = {task: cell(found[key], kind) for task, key in keys.items() if key in found}
        table(title, " | ".join(["network", *tasks_]), " | ".join(f"{{{task}}}" for task in tasks_), rows)
    exact = {network: {task: spread(found[key]["exact"], 3) for task in tasks_
                       if "exact" in found.get(key := f"{network}, {task}, equal steps", {})}
             for network in networks}
    table("equal steps: exact match of whole rows", " | ".join(["network", *tasks_]),
          " | ".join(f"{{{task}}}" for task in tasks_), exact)
    picture(found, networks, [task for task in tasks_ if task != "text"])

def picture(found, networks, tasks_):
    plt = pyplot()
    if plt is None:
        return
    figure, axes = plt.subplots(1, 2, figsize=(11, 0.4 * len(networks) + 1.5), sharey=True,
                                layout="constrained")
    titles = "as trained", "longer rows, fuller sets, more holes"
    for ax, key, title in zip(axes, ("acc", "longer"), titles):
        part = [[statistics.mean(found[f"{network}, {task}, equal steps"][key]) for task in tasks_]
                for network in networks]
        ax.imshow(part, vmin=0, vmax=1, aspect="auto", cmap="viridis")
        ax.grid(False)
        for i, row in enumerate(part):
            for j, x in enumerate(row):
                ax.text(j, i, f"{x:.2f}", ha="center", va="center", color="w" if x < 0.6 else "k")
        ax.set(title=title, xticks=range(len(tasks_)), xticklabels=tasks_, yticks=range(len(networks)),
               yticklabels=networks)
        ax.tick_params(axis="x", rotation=30)
    save_figure("study", figure)
