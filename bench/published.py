"""python bench.py --suite=published: the published command lines, beside the published figures."""
import tempfile

import bench
from bench import Run, quality, read_log, table

def suite():
    """One seed, accuracy by step."""
    published = {"200": (0.5181, 0.6191), "400": (0.3281, 0.6531), "600": (0.5494, 0.7262),
                 "800": (0.5525, 0.8153), "999": (0.5444, 0.9244)}
    shorter = 20 if bench.quick else 1
    settings = ("STRUCT_TASK=1 STRUCT_EVAL=1 STRUCT_LEN=8 TRAIN=1 GEN_TOKENS=1 SEQ_LEN=64 N_LAYER=2 "
                f"N_EMBD=128 HEAD_SIZE=32 BATCH_SIZE=32 DEVICE_BSZ=8 MAX_ITERS={1000 // shorter} "
                f"EVAL_ITERS=20 EVAL_INTERVAL={200 // shorter} WARMDOWN_ITERS=200 DW_JRT_SCALE=20")

    def measure(name, folder):
        return {str(row["step"] * shorter): row["struct_acc"] for row in read_log(folder, "eval")}
    with tempfile.TemporaryDirectory() as weights:
        runs = {jrt: f"{settings} DW_JRT={jrt} WEIGHTS_PATH={weights}/{jrt}.pt" for jrt in "01"}
        runs = {jrt: Run([], env=dict(pair.split("=") for pair in env.split())) for jrt, env in runs.items()}
        found = quality("published", runs, measure)
    rows = {}
    for step, (old0, old1) in published.items():
        new0, new1 = (found[jrt]["1000" if step == "999" else step] for jrt in "01")
        rows[step] = dict(old0=old0, old1=old1, new0=new0, new1=new1)
    table("struct acc, published command lines",
          "step | DW_JRT=0 published | here | DW_JRT=1 published | here",
          "{old0} | {new0:.4f} | {old1} | {new1:.4f}", rows)
    return {"runs": found}
