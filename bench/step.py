"""python bench.py --suite=step: a training step of the main job by back end, and the published form of it."""
import bench
from bench import Run, from_file, table, training_ms

def suite():
    """L=2, C=128, N=32, T=64, 32 rows, by back end and micro-batch. The first row is what the published
    script does: a loop over all 64 tokens; the others leave out the columns that are padding in every row."""
    kinds = {"loop, 4 x 8, all 64 tokens": ("loop", 8, 0), "loop, 4 x 8": ("loop", 8, 1),
             "torch, 4 x 8": ("torch", 8, 1), "cpp, 4 x 8": ("cpp", 8, 1), "cpp, 1 x 32": ("cpp", 32, 1)}
    runs = {}
    for kind, (impl, rows, trim) in kinds.items():
        steps = 50 if bench.quick or impl == "loop" else 120
        options = ["--struct_task=1", "--dw_jrt=1", "--eval_interval=1000", f"--max_iters={steps}"]
        runs[kind] = Run([*options, f"--device_bsz={rows}", f"--trim_rows={trim}"], env={"WKV_IMPL": impl})
    ms = training_ms(runs, skip=3)
    every, loop, *_ = ms.values()
    table("training step of STRUCT_TASK=1 DW_JRT=1 python train.py, ms",
          "back end, micro-batches | ms per step | faster than the loop | ... of all tokens",
          "{t:.1f} | {loop:.1f}x | {all:.1f}x",
          {kind: dict(t=t, loop=loop / t, all=every / t) for kind, t in ms.items()})
    return {**from_file("wkv").processor(), "ms": ms}
