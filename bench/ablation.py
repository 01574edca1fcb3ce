"""python bench.py --suite=ablation: fusions and conditionings of a small two-way network on text."""
import statistics

import bench
import model as nets
from bench import BITS, Run, quality, read_log, table

def suite():
    """A spike is a gradient norm over twice the median of the ten steps before it, counted after step 50."""
    common = ["--direction=bidirectional", "--n_layer=3", "--n_embd=128", "--seq_len=128", "--batch_size=16",
              f"--max_iters={15 if bench.quick else 300}", f"--eval_iters={2 if bench.quick else 20}",
              "--log_interval=1", "--eval_interval=100000", f"--data_path={bench.data_path}"]
    runs = {f"fusion={f}, tied={t}": Run([f"--fusion={f}", f"--tie_directions={t}", *common], BITS)
            for f in nets.FUSIONS for t in (0, 1)}
    runs |= {f"time_cond={c}": Run([f"--time_cond={c}", *common], BITS) for c in nets.TIME_CONDS}

    def measure(name, folder):
        steps = read_log(folder, "train")
        norms = [row["grad_norm"] for row in steps]
        spikes = sum(norms[i] > 2 * statistics.median(norms[i - 10:i]) for i in range(50, len(norms)))
        losses = [round(row["loss"], 4) for row in steps]
        return dict(spikes=spikes, loss=losses, grad_norm=[round(norm, 3) for norm in norms])
    found, rows = quality("ablation", runs, measure), {}
    for name, run in found.items():
        norms = run["grad_norm"]
        rows[name] = run | dict(last=statistics.mean(run["loss"][-50:]), largest=max(norms[50:] or norms))
    table("bidirectional RWKV-7 on text, 300 steps (loss curves, gradient norms: see the JSON file)",
          "setting | parameters | bits per character | last loss | spikes | largest norm | ms per step",
          "{parameters:.0k} | {bits:.3f} ± {se:.3f} | {last:.3f} | {spikes} | {largest:.1f} | "
          "{ms:.0f}", rows)
    return {"runs": found}
