"""python bench.py --suite=tasks: the published tasks with this repository's defaults."""
import bench
from bench import Run, by_name, quality, spread, table

def suite():
    """Accuracy and exact match on the fixed evaluation set."""
    tasks = {  # name: seeds, published accuracy, the run that it goes on from
        "struct, 1000 steps, dw_jrt=1": (3, "0.5919 / 0.0000"), "struct, 200 steps, dw_jrt=1": (3, "0.7450"),
        "rightcopy, 200 steps, dw_jrt=1": (3, "0.7181"), "rightrev, 200 steps, dw_jrt=1": (3, "0.7731"),
        "index, 1000 steps, dw_jrt=1": (1, "0.34 (200 steps)"),
        "add, 1000 steps, dw_jrt=1": (1, "0.11 (200 steps)"),
        "struct, 1000 steps, objective=gaussian": (3, ""),
        "struct, 200 steps, direction=bidirectional": (3, ""),
        "rightcopy, 200 steps, direction=bidirectional": (3, ""),
        "rightrev, 200 steps, direction=bidirectional": (3, "")}
    deep = "direction=causal ffn_shift=wide n_layer=3"
    sudoku = ("direction=bidirectional answer_steps=0 "
              "sudoku_holes_min=1 sudoku_holes_max=14 sudoku_holes_test=12")
    tasks |= {"struct, 1000 steps, rotary=1 observed_first=1": (3, ""),
              f"struct, 1000 steps, dw_jrt=1 {deep}": (3, ""),
              "index, 1000 steps, rotary=1 observed_first=1": (3, ""),
              f"index, 1000 steps, rotary=1 observed_first=1 {deep}": (3, ""),
              "index, 1000 steps, direction=bidirectional": (1, ""),
              "index, 1000 steps, direction=bidirectional rotary=1": (3, ""),
              "add, 1000 steps, mixer=attention n_layer=4": (3, ""),
              "add, 1000 steps, rotary=1 observed_first=1 n_layer=4": (1, ""),
              "add, 1000 steps, add_mask_len=9 mixer=attention n_layer=4": (3, ""),
              "add, 700 steps, add_mask_len=9 mixer=attention n_layer=4": (3, ""),
              "add, 300 steps, mixer=attention n_layer=4":
                  (3, "", "add, 700 steps, add_mask_len=9 mixer=attention n_layer=4"),
              "add, 1000 steps, add_mask_len=9 direction=bidirectional rotary=1 n_layer=4": (3, ""),
              f"sudoku, 1000 steps, {sudoku}": (3, "0.551 in future-seed, 12 layers")}
    runs, published = {}, {}
    for name, (seeds, published[name], *start) in tasks.items():
        task, steps, option = name.split(", ")
        steps = int(steps.split()[0]) // (20 if bench.quick else 1)
        options = [f"--{task}_task=1", *(f"--{part}" for part in option.split())]
        options += [f"--max_iters={steps}", "--eval_interval=100000"]
        metrics = {"acc": f"{task}_acc", "exact": f"{task}_exact"}
        for seed in range(1337, 1337 + (1 if bench.quick else seeds)):
            before = [f"{name}, seed {seed}" for name in start]
            runs[f"{name}, seed {seed}"] = Run([*options, f"--random_seed={seed}"], metrics, *before)
    found, rows = quality("tasks", runs, names=[name for name in runs if bench.only in name]), {}
    for name, run in by_name(found).items():
        acc, exact = spread(run["acc"]), spread(run["exact"])
        rows[name] = dict(seeds=len(run["acc"]), acc=acc, exact=exact, published=published.get(name, ""))
    table("default settings, mean ± standard deviation over seeds",
          "task | seeds | accuracy | exact | published", "{seeds} | {acc} | {exact} | {published}", rows)
    return {"runs": found}
