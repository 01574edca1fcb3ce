"""A part of every kind, one class or function and one table row each, used through the real scripts without an edit elsewhere."""
import os

import pytest
from conftest import ROOT, ok

# name -> the row, and the options that choose it (of train.py; of sample.py)
ROWS = {
    "objective": ("""
class Half(diffusion.Masked):
    \"\"\"Exactly half of the tokens are masked.\"\"\"
    def mask(self, maskable, t, u):
        masked = maskable & (u < 0.5)
        return masked, 2.0, masked.sum()
diffusion.OBJECTIVES["half"] = Half""", ["--objective=half"], []),
    "schedule": ("diffusion.SCHEDULES['square'] = lambda t: (t * t, 2 * t)", ["--schedule=square"], []),
    "sampler": ("""
def last(sure, masked, pace, left, generator, threshold):
    return diffusion.best(torch.arange(masked.shape[1]).expand_as(sure).float(), masked, pace)
diffusion.SAMPLERS["last"] = functools.partial(diffusion.decode, last)""", [], ["--sampler=last"]),
    "mixer": ("""
class Mean(model.Mixer):
    \"\"\"Every token gets a projection of the row's mean.\"\"\"
    directions = ("bidirectional",)
    def __init__(self, cfg, layer):
        super().__init__()
        self.value = torch.nn.Linear(cfg.n_embd, cfg.n_embd)
    def forward(self, x, state, seq, carry):
        return self.value(x.mean(1, keepdim=True)).expand_as(x), None, None, carry
model.TIME_MIXERS["mean"] = Mean""", ["--mixer=mean"], []),
    "fusion": ("""
class Average(torch.nn.Module):
    def __init__(self, cfg):
        super().__init__()
    def forward(self, f, b):
        return (f + b) / 2
model.FUSIONS["average"] = Average""", ["--direction=bidirectional", "--fusion=average"], []),
    "conditioning": ("""
class Scale(model.NoCond):
    parts = 2
model.TIME_CONDS["scale"] = Scale""", ["--time_cond=scale"], []),
    "seed form": ("""
class Weak(model.InitSeed):
    def forward(self, seed, ctx):
        return 0.1 * seed, None
model.DW_JRT_INJECT["weak"] = Weak""", ["--dw_jrt=1", "--dw_jrt_inject=weak"], []),
    "optimizer": ("model.OPTIMIZERS['sgd'] = lambda net, cfg: [torch.optim.SGD(net.parameters(), lr=cfg.learning_rate)]",
                  ["--optimizer=sgd"], []),
    "tokenizer": ("""
class Shouts(data.Bytes):
    def encode(self, text):
        return super().encode(text.upper())
data.KINDS["shouts"] = Shouts""", ["--tokenizer=shouts"], []),
    "task": ("""
def double(rng, p, split):
    a = str(rng.randint(1, 9))
    return f"{a}>{a}{a}", [2, 3]
tasks.TASKS["double"] = tasks.Task(double, "0123456789>#", {"len": 1}, "a digit, twice")""", ["--double_task=1"], []),
}
SMALL = ["--n_layer=2", "--n_embd=32", "--head_size=16", "--seq_len=32", "--batch_size=4", "--eval_iters=1", "--eval_interval=2",
         "--struct_eval_n=4", "--log_interval=1", "--wkv_impl=torch"]


@pytest.mark.parametrize("part", ROWS)
def test_a_row_is_all_that_a_new_part_needs(part, run, tmp_path):
    row, options, more = ROWS[part]
    (tmp_path / "t.txt").write_text("the cat sat on the mat and the rat ran\n" * 60)
    text = [] if part == "task" else ["--data_path=t.txt"]

    def script(name, *argv):
        path = os.path.join(ROOT, name)
        return run(f"import functools, runpy, torch\nimport data, diffusion, model, tasks\nsys.argv[0] = {path!r}\n{row}\n"
                   f"runpy.run_path({path!r}, run_name='__main__')", *argv)
    ok(script("train.py", *SMALL, *text, *options, "--max_iters=2", "--warmdown_iters=2"))
    shown = ok(script("train.py", "--init_from=resume", "--max_iters=4", "--warmdown_iters=2"))
    assert "step 4: val loss" in shown
    assert "step 4: val loss" in ok(script("train.py", "--train=0", "--eval_iters=1"))
    shown = ok(script("sample.py", "--ckpt", "--num_samples=1", *([] if part == "task" else ["--prompt=the", "--length=8"]), *more))
    assert "denoiser calls" in shown and ("accuracy" in shown) == (part == "task")

