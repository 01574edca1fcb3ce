"""python bench.py --suite=text: bits per character of networks of at most 1.05 M parameters."""
import statistics

import bench
from bench import BITS, Run, by_name, chosen, quality, spread, table, table_of_ms, training_ms

def text_networks():
    """{name: options beside config/shakespeare.py}."""
    causal, two_way = "--direction=causal --ffn_shift=before", "--direction=bidirectional"
    one_sided, deep = "--tie_directions=1 --ffn_shift=before", "--n_layer=8 --n_embd=96 --dim_ffn=352"
    attention = "--mixer=attention --dim_ffn=683 --muon_lr=0.04"
    blocks = {f"{objective} {n}": f"--objective={objective} --direction=block --block_size={n} {one_sided}"
              for objective in ("block", "block_elbo") for n in (4, 16, 64)}
    plain = {"ar": f"--objective=ar {causal}", **blocks,
             "b3d 16": f"--objective=b3d --block_size=16 {causal}",
             "bidirectional, elbo": f"--objective=elbo {two_way} {one_sided}",
             "bidirectional": f"{two_way} {one_sided}",
             "bidirectional, ffn_shift=both": f"{two_way} --ffn_shift=both",
             "bidirectional, ffn_shift=wide": f"{two_way} --ffn_shift=wide",
             "causal + DW-JRT": f"{causal} --dw_jrt=1", "causal": causal,
             "causal + DW-JRT, 8 layers": f"{causal} --dw_jrt=1 {deep}",
             "causal, 8 layers": f"{causal} {deep}",
             "causal + DW-JRT, scale 20": f"{causal} --dw_jrt=1 --dw_jrt_scale=20",
             "causal + DW-JRT, open gates": f"{causal} --dw_jrt=1 --dw_jrt_alpha_init=2",
             "attention": f"{attention} --ffn_shift=none",
             "attention, ffn_shift=both": f"{attention} --ffn_shift=both",
             "attention, ffn_shift=wide": f"{attention} --ffn_shift=wide"}
    plain = {name: f"--schedule=linear --next_weight=0 --dim_ffn=592 {row}" for name, row in plain.items()}
    attention, twice = f"{attention} {two_way}", "--self_cond=1 --loops=2"
    bells = {"bidirectional": f"{two_way} --dim_ffn=592", "alternate": "", "attention": attention,
             "alternate, soft masks, loops=2": twice,
             "attention, soft masks, loops=2": f"{attention} {twice}",
             "block 4, next token": "--objective=block --direction=block --block_size=4 --dim_ffn=592",
             "block 16, next token": "--objective=block --direction=block --block_size=16 --dim_ffn=592",
             "mixture": "--objective=mixture --direction=block --dim_ffn=592", "causal": causal,
             "causal, seeds of chunks": f"{causal} --dw_jrt=1 --dw_jrt_inject=reverse --dw_jrt_chunk=8 "
                                        "--dw_jrt_scale=1 --dw_jrt_alpha_init=0",
             "causal, wide shift": "--direction=causal",
             "causal, observed first, wide shift": "--direction=causal --rotary=1 --observed_first=1"}
    return plain | {f"{name}, bell": options for name, options in bells.items()}

def suite():
    """T=128, 64 rows per step; and the step times of networks that are compared at equal time."""
    budgets = {15: 1} if bench.quick else {600: 3, 300: 1, 150: 1}         # steps: seeds
    common = ["config/shakespeare.py", f"--data_path={bench.data_path}", "--eval_interval=100000"]
    small = ["--batch_size=4", "--eval_iters=2"] if bench.quick else []
    networks = {name: [*common, *small, *options.split()] for name, options in text_networks().items()}
    runs, metrics = {}, BITS | {f"bits {n}": f"bits_per_char_block_{n}" for n in (1, 4, 16, "all")}
    budgets = [(name, *budget) for budget in budgets.items() for name in chosen(networks)]
    # as long as 600 of two scans take
    budgets += [(name, 900, 3) for name in chosen(["alternate, bell"]) if not bench.quick]
    for name, steps, seeds in budgets:
        for seed in range(1337, 1337 + seeds):
            options = [*networks[name], f"--max_iters={steps}", f"--random_seed={seed}"]
            runs[f"{name}, {steps} steps, seed {seed}"] = Run(options, metrics)
    found, rows, modes, errors = quality("text", runs), {}, {}, {}
    for name, run in by_name(found).items():
        network, budget = name.rsplit(", ", 1)
        if "bits" not in run:
            modes[name] = {key: spread(values) for key, values in run.items() if key.startswith("bits")}
            continue
        errors[network] = errors.get(network, []) + run["se"]
        row = rows.setdefault(network, {"parameters": run["parameters"][0]})
        row |= {budget: spread(run["bits"]), "se": statistics.mean(errors[network])}
    budgets = [f"{steps} steps" for steps in sorted({steps for _, steps, _ in budgets}, reverse=True)]
    table("bits per character, mean ± standard deviation over seeds; the evaluation's own standard error",
          " | ".join(["network", "parameters", *budgets, "evaluation s.e."]),
          " | ".join(["{parameters:.3M}", *(f"{{{budget}}}" for budget in budgets), "{se:.4f}"]), rows)
    table("one network for all modes, bits per character", "network | next token | block 4 | block 16 | row",
          "{bits 1} | {bits 4} | {bits 16} | {bits all}", modes)
    if bench.only not in ("", "pace"):
        return {"runs": found}
    more = ["--eval_iters=1", f"--max_iters={20 if bench.quick else 50}"]
    names = [f"{name}, bell" for name in ("bidirectional", "alternate", "alternate, soft masks, loops=2",
                                          "attention", "attention, soft masks, loops=2", "mixture")]
    pace = {name: Run([*networks[name], *more]) for name in names}
    pace = training_ms(pace, skip=2)
    table_of_ms("a training step alone on the machine, in turn, ms", pace, "{ms:.0f}")
    return {"runs": found, "ms": pace}
