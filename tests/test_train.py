"""The scripts as a user runs them: training, resuming, evaluating, sampling, and every error."""
import json
import os
import subprocess
import sys

import pytest
import torch

import model as nets
from conftest import ROOT, kill_after, ok

TINY = dict(STRUCT_TASK=1, STRUCT_LEN=2, DW_JRT=1, N_EMBD=32, HEAD_SIZE=16, BATCH_SIZE=8, MAX_ITERS=6, EVAL_INTERVAL=3, STRUCT_EVAL_N=10,
            LOG_INTERVAL=1, WKV_IMPL="torch", THREADS=1)


def log_of(folder):
    return [json.loads(line) for line in open(folder / "log.jsonl")]


def losses(folder):
    return {row["step"]: row["loss"] for row in log_of(folder) if row["event"] == "train"}


def test_a_run_writes_what_it_promises(run, tmp_path):
    shown = ok(run("train.py", **TINY))
    assert "dw_jrt = True   (env DW_JRT)" in shown and "n_layer = 2   (default with struct_task)" in shown
    assert all(mark in shown for mark in ("\n  IN {", "\n  GT {", "\n  PR {", "struct acc"))
    log, out = log_of(tmp_path / "out"), tmp_path / "out"
    assert log[0]["event"] == "start" and log[0]["kernel"] == "torch" and log[0]["config"]["n_embd"] == 32
    saved = torch.load(out / "ckpt.pt", weights_only=True)
    assert log[0]["parameters"] == sum(v.numel() for v in saved["model"].values())
    assert saved["step"] == 6 and saved["config"] == json.load(open(out / "config.json"))
    assert [row["step"] for row in log if row["event"] == "eval"] == [0, 3, 6]
    assert all({"struct_acc", "struct_exact", "val_loss"} <= row.keys() for row in log if row["event"] == "eval")
    assert all({"loss", "lr", "grad_norm", "ms_per_step", "tokens_per_s"} <= row.keys() for row in log if row["event"] == "train")
    assert not list(out.glob("*.tmp"))
    # Starting again never overwrites: the old checkpoint is moved aside.
    assert "moved the checkpoint" in ok(run("train.py", **TINY)) and (out / "ckpt.pt.1").exists()
    shown = ok(run("sample.py", "--ckpt=out/ckpt.pt", "--num_samples=2"))
    assert "denoiser calls" in shown and shown.count("  PR {") == 2 and "exact" in shown


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_resume_is_bit_exact(run, tmp_path, optimizer):
    settings = TINY | dict(OPTIMIZER=optimizer, STRUCT_TASK=0, REVERSE_TASK=1, REVERSE_DIGIT_MAX=6)
    ok(run("train.py", "--out_dir=whole", **settings))
    kill_after(run, 3, "cut", settings)
    ok(run("train.py", "--out_dir=cut", "--init_from=resume"))       # no other setting: they come from the checkpoint
    whole, cut = losses(tmp_path / "whole"), losses(tmp_path / "cut")
    assert len(whole) == 6 and cut == whole
    a, b = (torch.load(tmp_path / d / "ckpt.pt", weights_only=True) for d in ("whole", "cut"))
    assert all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"]) and b["step"] == 6


@pytest.mark.parametrize("half", [True, False])
def test_batched_muon_is_torchs_muon(half, monkeypatch):
    """The same steps on tall, wide and square matrices, one of them without a gradient at first, and states that either can go on from."""
    monkeypatch.setattr(nets, "muon_in_bf16", lambda device: half)
    shapes = [(16, 16), (16, 16), (48, 16), (16, 48), (16, 16), (16, 48), (1, 16)]
    options = dict(lr=0.05, weight_decay=0.1, momentum=0.9)
    g = torch.Generator().manual_seed(0)
    ours, theirs = ([torch.nn.Parameter(torch.ones(shape)) for shape in shapes] for _ in range(2))
    ours[0].requires_grad_(False), theirs[0].requires_grad_(False)
    a, b = nets.Muon(ours, **options), torch.optim.Muon(theirs, **options)
    a.step()                                       # nothing learns: nothing happens
    assert all((p == 1).all() for p in ours) and not a.state
    for step in range(4):
        if step == 3:                              # each goes on from what the other has saved
            a, b, states = nets.Muon(ours, **options), torch.optim.Muon(theirs, **options), (a.state_dict(), b.state_dict())
            a.load_state_dict(states[1]), b.load_state_dict(states[0])
        for i, (p, q) in enumerate(zip(ours, theirs)):
            if i or step > 1:
                p.grad = torch.randn(p.shape, generator=g)
                q.grad = p.grad.clone()
        a.step(), b.step()
        for p, q in zip(ours, theirs):
            assert (p - q).abs().max() <= (0.02 if half else 0.05) * options["lr"] * max(1, p.shape[0] / p.shape[1]) ** 0.5, (step, p.shape)
    assert (ours[0] - 1).abs().max() > 0.01


@pytest.mark.parametrize("steps,most,more", [(3, 2e-4, {}), (20, 2e-6, dict(OPTIMIZER="adamw")), (3, 2e-4, dict(OBJECTIVE="gaussian", DW_JRT=0, SELF_COND=1, EMA=0.9, FREEZE="emb", UNFREEZE_AFTER_STEPS=1, UNFREEZE_PATTERNS="."))])
def test_accumulation_and_two_processes_give_the_same_run(run, tmp_path, steps, most, more):
    settings = TINY | dict(DTYPE="fp32", STRUCT_TASK=0, REVERSE_TASK=1, REVERSE_DIGIT_MAX=6, MAX_ITERS=steps, EVAL_INTERVAL=100) | more
    ok(run("train.py", "--out_dir=one", **settings))
    ok(run("train.py", "--out_dir=parts", "--device_bsz=2", **settings))
    if more:
        done = run("train.py", "--out_dir=two", "--device_bsz=2", ranks=2, **settings)
    else:
        done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29611",
                               os.path.join(ROOT, "train.py"), "--out_dir=two", "--device_bsz=2"], cwd=tmp_path, capture_output=True, text=True,
                              env=os.environ | {k: str(v) for k, v in settings.items()})
    assert ok(done).count(f"step {steps}:") == 1
    one = losses(tmp_path / "one")
    for other in ("parts", "two"):
        assert losses(tmp_path / other).keys() == one.keys()
        for step, loss in losses(tmp_path / other).items():
            assert loss == pytest.approx(one[step], rel=most), (other, step)


def test_a_network_in_pieces_learns_the_same(run, tmp_path):
    settings = TINY | dict(DTYPE="fp32", STRUCT_TASK=0, REVERSE_TASK=1, REVERSE_DIGIT_MAX=6, MAX_ITERS=4, EVAL_INTERVAL=10, WARMDOWN_ITERS=1,
                           EMA=0.9, DEVICE_BSZ=2)
    ok(run("train.py", "--out_dir=whole", **settings))

    ok(run("train.py", "--out_dir=split", "--shard=1", "--max_iters=2", ranks=2, **settings))
    ok(run("train.py", "--out_dir=split", "--shard=1", "--init_from=resume", ranks=2, **settings))
    one, two = losses(tmp_path / "whole"), losses(tmp_path / "split")
    assert len(two) == 4 and all(two[step] == pytest.approx(loss, rel=2e-3) for step, loss in one.items())
    saved = torch.load(tmp_path / "split" / "ckpt.pt", weights_only=True)
    assert all(type(v) is torch.Tensor for part in (saved["model"], saved["averaged"]) for v in part.values())
    ok(run("train.py", TRAIN=0, WEIGHTS_PATH="split/ckpt.pt", OUT_DIR="again", THREADS=1))
    assert log_of(tmp_path / "again")[-1]["val_loss"] == pytest.approx(log_of(tmp_path / "split")[-1]["val_loss"], rel=1e-5)


def test_published_command_line_then_evaluation_of_its_weights(run, tmp_path):
    published = dict(STRUCT_TASK=1, STRUCT_EVAL=1, STRUCT_LEN=8, TRAIN=1, GEN_TOKENS=1, SEQ_LEN=64, N_LAYER=2, N_EMBD=128, HEAD_SIZE=32,
                     BATCH_SIZE=32, DEVICE_BSZ=8, MAX_ITERS=4, EVAL_INTERVAL=2, EVAL_ITERS=2, WARMDOWN_ITERS=2, DW_JRT=1, DW_JRT_SCALE=20,
                     WEIGHTS_PATH="weights/a.pt", PYTHONUNBUFFERED=1)
    ok(run("train.py", **published))
    trained = log_of(tmp_path / "out")[-1]
    shown = ok(run("train.py", **(published | dict(TRAIN=0, STRUCT_EVAL_FIXED=1, STRUCT_EVAL_N=200, STRUCT_EVAL_SEED=1234, OUT_DIR="again"))))
    assert f"struct acc {trained['struct_acc']:.4f}" in shown
    assert log_of(tmp_path / "again")[-1]["struct_exact"] == trained["struct_exact"]
    shown = ok(run("train.py", TRAIN=0, WEIGHTS_PATH="weights/a.pt", OUT_DIR="bare", MEM_CHECK=1, LOG_OUTPUT=1, GEN_TOKENS=9))
    assert f"struct acc {trained['struct_acc']:.4f}" in shown     # the rest is sample.py's, the names stay accepted


def test_text_end_to_end(run, tmp_path):
    (tmp_path / "input.txt").write_text("the cat sat on the mat. a dog sat on the log.\n" * 100)
    small = dict(DATA_PATH="input.txt", SEQ_LEN=32, N_LAYER=2, N_EMBD=32, HEAD_SIZE=16, BATCH_SIZE=8, MAX_ITERS=30, EVAL_INTERVAL=15, EVAL_ITERS=2,
                 WKV_IMPL="torch", THREADS=1, TOKENIZER="char")
    ok(run("train.py", **small))
    evals = [row for row in log_of(tmp_path / "out") if row["event"] == "eval"]
    assert evals[-1]["bits_per_char"] < 0.8 * evals[0]["bits_per_char"] and evals[-1]["bits_per_char_se"] > 0
    shown = ok(run("sample.py", "--text=the c__ sat", "--num_samples=2", "--seed=3"))
    lines = [line for line in shown.splitlines() if line.startswith("the c")]
    assert len(lines) == 2 and all(len(line) == 11 and line.endswith(" sat") and "_" not in line for line in lines)
    assert ok(run("sample.py", "--text=the c__ sat", "--num_samples=2", "--seed=3")).split("---")[1:] == shown.split("---")[1:]
    shown = ok(run("sample.py", "--prompt=a dog", "--length=20", "--num_samples=1", "--watch=1", "--watch_delay=0", "--threshold=1", "--steps=5"))
    assert "20 tokens in 5 denoiser calls" in shown and sum(line.startswith("  a dog") for line in shown.splitlines()) == 5
    refused = run("sample.py", "--prompt=a dog", "--length=40")
    assert refused.returncode == 2 and "a row of 45 tokens" in refused.stderr and "seq_len=32" in refused.stderr
    # Bytes, bf16, masked runs, going on from weights with another objective.
    ok(run("train.py", "--out_dir=fine", "--init_from=out/ckpt.pt", "--objective=elbo", "--mask_policy=spans", "--dtype=bf16", "--max_iters=2", **{k: v for k, v in small.items() if k != "MAX_ITERS"}))


def test_one_network_for_every_mode_end_to_end(run, tmp_path):
    """objective=mixture with soft masks and looped layers: learns in each mode, resumes, is sampled from in each, and measured in each order."""
    (tmp_path / "input.txt").write_text("the cat sat on the mat. a dog sat on the log.\n" * 100)
    small = dict(DATA_PATH="input.txt", SEQ_LEN=32, N_LAYER=3, N_EMBD=32, HEAD_SIZE=16, BATCH_SIZE=8, MAX_ITERS=8, EVAL_INTERVAL=4, EVAL_ITERS=2, LOOPS=2,
                 WKV_IMPL="torch", THREADS=1, TOKENIZER="char", OBJECTIVE="mixture", SELF_COND=1, SCHEDULE="bell", LOG_INTERVAL=1, DEVICE_BSZ=4)
    ok(run("train.py", "--out_dir=whole", **small))
    first, *_, last = [row for row in log_of(tmp_path / "whole") if row["event"] == "eval"]
    for mode in ("1", "4", "16", "all"):
        assert last[f"bits_per_char_block_{mode}"] < first[f"bits_per_char_block_{mode}"] and last[f"bits_per_char_block_{mode}_se"] > 0
    kill_after(run, 4, "cut", small)
    ok(run("train.py", "--out_dir=cut", "--init_from=resume"))
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    for sampler, calls in (("ar", 32), ("block", 33), ("confidence", 32), ("topk", 32)):
        shown = ok(run("sample.py", "--ckpt=whole/ckpt.pt", "--num_samples=2", f"--sampler={sampler}", "--threshold=1"))
        assert f"64 tokens in {calls} denoiser calls" in shown
    shown = ok(run("train.py", "--train=0", "--out_dir=whole", "--likelihood=order"))
    assert all(f"bits per char {rule} block 16" in shown for rule in ("confidence", "left to right", "random"))


def test_with_no_data_at_all_it_learns_the_standard_library(run, tmp_path):
    shown = ok(run("train.py", MAX_ITERS=1, N_LAYER=1, N_EMBD=32, BATCH_SIZE=4, SEQ_LEN=16, EVAL_ITERS=1, WKV_IMPL="torch", THREADS=1))
    assert "standard library: " in shown and "bits per char" in shown


@pytest.mark.parametrize("options,env,words", [
    (["--n_layers=3"], TINY, "did you mean 'n_layer'"),
    (["--max_iters=many"], TINY, "max_iters = 'many'"),
    ([], TINY | dict(STRUCT_TSK_TASK=1), "STRUCT_TSK_TASK"),
    ([], TINY | dict(ADD_TASK=1), "struct_task=1 and add_task=1"),
    (["--seq_len=20"], TINY | dict(STRUCT_LEN=8), "SEQ_LEN=20"),
    (["--n_embd=40"], TINY, "n_embd=40 is not a multiple of head_size=16"),
    (["--head_size=20"], TINY, "head_size=20 is not supported: choose one of 16, 32, 64, 128"),
    (["--device_bsz=3"], TINY, "batch_size=8 is not a multiple of device_bsz=3"),
    (["--dw_jrt_inject=gates"], TINY, "did you mean 'gate'"),
    (["--init_from=nowhere.pt"], TINY, "nowhere.pt does not exist"),
    (["--init_from=resume"], TINY, "out/ckpt.pt does not exist"),
    (["--train=0"], TINY, "out/ckpt.pt does not exist"),
    (["--out_dir=/proc/nowhere"], TINY, "/proc/nowhere"),
    (["--max_iters=0"], TINY, "max_iters = 0"),
    (["--shard=1"], TINY, "torchrun --nproc_per_node"),
    ([], dict(DATA_PATH="no.txt"), "no.txt: No such file"),
    ([], TINY | dict(WKV_IMPL="cpp", CXX="no-such-compiler", TORCH_EXTENSIONS_DIR="ext"), "no-such-compiler"),
    ([], TINY | dict(WKV_IMPL="cpu"), "must be one of auto"),
    (["--muon_lr=inf"], TINY, "must be in [0, 100]"), (["--grad_clip=-1"], TINY, "must be in [0, 1e+30]"),
    (["--seq_len=999999999999999999999999"], TINY, "must be in"), (["--freeze=."], TINY, "leaves nothing that learns"),
], ids=lambda v: str(v)[:40] if isinstance(v, (list, str)) else "")
def test_bad_input_gets_one_line_and_exit_code_2(run, tmp_path, options, env, words):
    done = run("train.py", *options, **env)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode == 2 and len(errors) == 1 and words in errors[0], done.stderr[-600:]
    assert "Traceback" not in done.stderr


def test_checkpoints_of_another_shape_or_task_or_kind(run, tmp_path):
    ok(run("train.py", **TINY | dict(MAX_ITERS=1)))
    (tmp_path / "cut.pt").write_bytes((tmp_path / "out/ckpt.pt").read_bytes()[:-2000])
    (tmp_path / "foreign.pt").write_text("not a checkpoint")
    for options, words in ((["--init_from=resume", "--n_embd=64"], "n_embd=64 (the checkpoint has 32)"),
                           (["--init_from=out/ckpt.pt", "--struct_task=0", "--add_task=1"], "vocabulary"),
                           (["--init_from=cut.pt"], "cut.pt"), (["--init_from=foreign.pt"], "foreign.pt")):
        done = run("train.py", *options, **{k: v for k, v in TINY.items() if k != "N_EMBD"})
        assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr, (options, done.stderr[-500:])
        assert torch.load(tmp_path / "out/ckpt.pt", weights_only=True)["step"] == 1   # nothing is lost
    for options, words in ((["--ckpt=none.pt"], "none.pt does not exist"), (["--text=abc"], "no hole"), (["--prompt=xyz"], "'x' is not in the vocabulary"),
                           (["--prompt=1", "--text=1_"], "not several"), (["--sampler=best"], "confidence, topk, ancestral"), (["--num_samples=0"], "num_samples"),
                           (["--length=9"], "length=9 is not for a task's answers: leave it out")):
        done = run("sample.py", *options)
        assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr, (options, done.stderr[-500:])


def test_a_long_text_needs_no_larger_state(run, tmp_path):
    (tmp_path / "input.txt").write_text("the cat sat on the mat. a dog sat on the log.\n" * 100)
    ok(run("train.py", os.path.join(ROOT, "config/block.py"), "--max_iters=1", "--n_layer=2", "--n_embd=32", "--head_size=16", "--batch_size=4",
           "--seq_len=32", "--eval_iters=1", "--threads=1", "--data_path=input.txt"))
    said = [ok(run("sample.py", "--prompt=the ", f"--length={n}", "--num_samples=2", "--steps=1")) for n in (32, 640)]
    sizes = [line.split("state of ")[1] for shown in said for line in shown.splitlines() if "state of" in line]
    assert len(sizes) == 2 and sizes[0] == sizes[1]
    wkv, shifts = 2 * 2 * 16 * 16 * 4, 2 * 2 * 32 * 4                # (layers, heads, N, N) and two vectors a layer, in bytes
    assert sizes[0].startswith(f"{wkv + shifts:,} bytes per row")


@pytest.mark.parametrize("preset", sorted(f for f in os.listdir(os.path.join(ROOT, "config")) if f.endswith(".py")))
def test_every_preset_runs(run, tmp_path, preset):
    (tmp_path / "input.txt").write_text("the cat sat on the mat. a dog sat on the log.\n" * 100)
    tiny = ["--max_iters=1", "--n_layer=2", "--n_embd=32", "--head_size=16", "--batch_size=4", "--device_bsz=2", "--seq_len=32", "--eval_iters=1", "--threads=1"]
    path = "input.txt"
    if preset == "latent.py":
        path = "pairs"
        ok(run("data.py", "latents", "--data_path=input.txt", "--out=pairs", "--dim=4", "--length=32"))
    ok(run("train.py", os.path.join(ROOT, "config", preset), *tiny, f"--data_path={path}", WKV_IMPL="torch"))
    ok(run("sample.py", "--num_samples=1", "--length=8", "--prompt=the "))


def test_help_lists_every_key(run):
    shown = ok(run("train.py", "--help"))
    for key in ("--dw_jrt_scale", "--struct_len", "--add_mask_len", "--muon_lr", "--kvsort_n_max", "--schedule"):
        assert key in shown


def test_a_first_run_says_what_it_does_and_what_next(tmp_path, run):
    """And the bar shows what the last evaluation said. Where anything is set, nothing is explained."""
    code = ("import runpy, sys, train as t\nsys.argv = ['train.py']\n"
            "t.set_up = lambda cfg, *more: (_ for _ in ()).throw(ValueError('far enough'))\n"
            "from configurator import configure\nimport diffusion, model, tasks\n"
            "cfg = configure(vars(t), model.ModelConfig, diffusion.DiffusionConfig, tasks.settings(), argv=sys.argv[1:] + ARGV, adjust=t.defaults_for)\n"
            "t.introduce(cfg)\n")
    said = ok(run("ARGV = []\n" + code))
    assert "nothing is set, so this learns to fill gaps" in said and "python sample.py --prompt='def ' --html=denoise.html" in said
    assert "nothing is set" not in ok(run("ARGV = ['--max_iters=3']\n" + code))
    done = run("train.py", "--struct_task=1", "--max_iters=3", "--log_interval=1", "--struct_eval_n=5", "--wkv_impl=torch")
    ok(done)
    assert "struct acc 0." in done.stderr and "tokens/s" in done.stderr
