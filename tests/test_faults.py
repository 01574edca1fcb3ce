"""Kinds of fault that were found by trying, each with an example of every kind; campaign.py looks for more."""
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import configurator
import data
import model as nets
from conftest import KEPT, ROOT, ok
from wkv_cuda import loader

TINY = dict(STRUCT_TASK=1, STRUCT_LEN=4, N_LAYER=1, N_EMBD=32, HEAD_SIZE=16, BATCH_SIZE=4, SEQ_LEN=32, STRUCT_EVAL_N=2, THREADS=1,
            WKV_IMPL="torch", LOG_INTERVAL=1, LOG_SAMPLE=0)
TEXT = "the cat sat on the mat, and a dog lay on the log.\n" * 60


def rows(folder, event):
    return [row for row in map(json.loads, open(folder / "log.jsonl")) if row["event"] == event]


def popen(words, cwd, **env):
    env = {k: v for k, v in os.environ.items() if k in KEPT} | {k: str(v) for k, v in env.items()}
    command = [sys.executable, os.path.join(ROOT, words[0]), *words[1:]]
    return subprocess.Popen(command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


# ---- A. wrong numbers ----

def test_characters_and_loss_are_counted_over_the_same_text(tmp_path):
    """36,000 ASCII characters and 2,800 of three bytes: the held-out tenth is all of three bytes a character."""
    (tmp_path / "t.txt").write_text("a" * 36_000 + "\u6f22" * 2_800, encoding="utf-8")
    source = data.TextSource(str(tmp_path / "t.txt"), 32)
    assert source.bytes_per_token == 1 and source.chars_per_token == pytest.approx(1 / 3)
    data.command(["prepare", f"--data_path={tmp_path / 't.txt'}", f"--out={tmp_path / 'p'}"])
    prepared = data.TextSource(str(tmp_path / "p"), 32)
    assert (prepared.chars_per_token, prepared.bytes_per_token) == pytest.approx((1 / 3, 1))
    assert prepared.val[np.arange(len(prepared.val))].tolist() == source.val.tolist()
    np.array(list("b".encode() * 40_000 + "\u6f22".encode() * 2000), "<u2").tofile(tmp_path / "t.bin")
    bins = data.TextSource("", 32, "byte", data_bin=str(tmp_path / "t.bin"))
    assert len(bins.val) < 6000 and bins.chars_per_token == pytest.approx(1 / 3, rel=0.01)     # all of them of such characters


def test_a_run_that_is_further_than_max_iters_is_left_alone(run, tmp_path):
    ok(run("train.py", "--max_iters=4", **TINY))
    before = {f: (tmp_path / "out" / f).read_bytes() for f in os.listdir(tmp_path / "out")}
    for n in (2, 4):
        assert f"at step 4 already, max_iters={n}" in ok(run("train.py", "--init_from=resume", f"--max_iters={n}"))
    assert before == {f: (tmp_path / "out" / f).read_bytes() for f in os.listdir(tmp_path / "out")}


def test_settings_given_at_a_resume_are_used(run, tmp_path):
    adam = TINY | dict(OPTIMIZER="adamw", WEIGHT_DECAY=0.5)
    ok(run("train.py", "--max_iters=2", **adam))
    ok(run("train.py", "--init_from=resume", "--max_iters=3", "--weight_decay=0.25"))
    saved = torch.load(tmp_path / "out/ckpt.pt", weights_only=True)
    assert {g["weight_decay"] for o in saved["optimizers"] for g in o["param_groups"]} == {0.25, 0.0}
    done = run("train.py", "--init_from=resume", "--max_iters=4", "--optimizer=muon")
    assert done.returncode == 2 and "leave optimizer out" in done.stderr


@pytest.mark.parametrize("script", ["train.py", "sample.py", "bench.py"])
def test_every_numeric_key_has_a_range(script):
    from campaign import keys_of
    keys = keys_of(script)
    without = [key for key, row in keys.items() if type(row.default) in (int, float, tuple) and not row.interval]
    assert not without and all(row.default in row.interval for row in keys.values() if type(row.default) in (int, float))
    assert all(row.interval is None for row in keys.values() if isinstance(row.default, (bool, str)))


def test_ranges_of_numbers_and_of_lists():
    group = {"n": (2, "[1, 10] whole"), "x": (0.5, "(0, 1) a share"), "many": ((1.0,), "(0, 1] several")}
    good = configurator.configure(group, argv=["--n=10", "--x=0.25", "--many=0.5,1"], env={}, show=False)
    assert (good.n, good.x, good.many) == (10, 0.25, (0.5, 1.0))
    for bad in ("--n=0", "--n=11", "--n=1" + "0" * 30, "--x=0", "--x=1", "--x=inf", "--x=nan", "--many=0.5,0", "--many=0.5,nan", "--many=(1, -inf)"):
        with pytest.raises(configurator.SettingError, match="must be in|expected"):
            configurator.configure(group, argv=[bad], env={}, show=False)


def test_what_is_not_finite_never_becomes_a_checkpoint(run, tmp_path):
    ok(run("train.py", "--max_iters=2", **TINY))
    done = run("train.py", "--init_from=resume", "--max_iters=40", "--eval_interval=1", *[f"--{k}=100" for k in (
        "muon_lr", "adam_lr", "wte_lr", "head_lr", "ln_lr")], "--dw_jrt_scale=1e6", "--warmdown_iters=0")
    assert done.returncode == 2 and done.stderr.count("error: ") == 1
    assert "not finite" in done.stderr or "the loss is" in done.stderr or "val_loss" in done.stderr
    last = torch.load(tmp_path / "out/ckpt.pt", weights_only=True)
    assert all(torch.isfinite(v).all() for v in last["model"].values())


def test_few_windows_give_no_deviation(run, tmp_path):
    (tmp_path / "t.txt").write_text(TEXT[:700])
    text = {k: v for k, v in TINY.items() if "STRUCT" not in k} | dict(DATA_PATH="t.txt", MAX_ITERS=1, EVAL_ITERS=3, SEQ_LEN=64)
    assert "windows 7" in ok(run("train.py", **text))
    for line in open(tmp_path / "out/log.jsonl"):
        json.loads(line, parse_constant=lambda word: pytest.fail(word))            # NaN is not JSON
    last = rows(tmp_path / "out", "eval")[-1]
    assert last["bits_per_char_se"] is None and last["windows"] == 7 and last["disjoint"] == 1 and last["bits_per_char"] > 0


def test_positions_are_whole_numbers():
    """float32 has no whole numbers above 2**24."""
    source = data.TextSource.__new__(data.TextSource)
    source.T, source.val = 8, range(3 * 10**8)
    source.windows = lambda ids, start: start
    start = source.eval_rows(1001)
    assert start[0] == 0 and start[-1] == 3 * 10**8 - 8 and (start.diff() - (3 * 10**8 - 8) / 1000).abs().max() <= 1


# ---- B. work lost or put at risk ----

@pytest.mark.parametrize("options", [["--freeze=."], ["--objective=ar"], ["--weights_path=out"], ["--weights_path=/proc/x/y"],
                                     ["--device=cuda:9"], ["--latent_dim=1"], ["--n_layer=9999", "--n_embd=65536"], ["--sequential_schedule=x", "--objective=sequential"],
                                     ["--unfreeze_patterns=((", "--freeze=emb"]])
def test_an_error_changes_nothing_in_out_dir(run, tmp_path, options):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/ckpt.pt").write_bytes(b"precious")
    (tmp_path / "out/log.jsonl").write_bytes(b"{}\n")
    done = run("train.py", "--max_iters=2", *options, **TINY)
    assert done.returncode == 2 and done.stderr.count("error: ") == 1 and "Traceback" not in done.stderr
    assert sorted(os.listdir(tmp_path / "out")) == ["ckpt.pt", "log.jsonl"]
    assert (tmp_path / "out/ckpt.pt").read_bytes() == b"precious" and (tmp_path / "out/log.jsonl").read_bytes() == b"{}\n"


def test_evaluation_adds_to_the_log(run, tmp_path):
    ok(run("train.py", "--max_iters=1", **TINY))
    before = (tmp_path / "out/log.jsonl").read_text()
    ok(run("train.py", "--train=0"))
    after = (tmp_path / "out/log.jsonl").read_text()
    assert after.startswith(before) and len(after) > len(before)


def test_without_git_and_without_a_home(run, tmp_path):
    (tmp_path / "bin").mkdir()
    for name in ("env", "sh"):
        (tmp_path / "bin" / name).symlink_to(f"/usr/bin/{name}")
    ok(run("train.py", "--max_iters=1", PATH=str(tmp_path / "bin"), HOME="", TORCH_EXTENSIONS_DIR="", **TINY))
    assert rows(tmp_path / "out", "start")[0]["git"] == "none"


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_printing_never_ends_a_run(run, tmp_path, encoding):
    (tmp_path / "t.txt").write_text("\u6f22\u5b57 \u00e9\u2014\U0001f600\n" * 400, encoding="utf-8")
    text = {k: v for k, v in TINY.items() if "STRUCT" not in k} | dict(DATA_PATH="t.txt", MAX_ITERS=1, EVAL_ITERS=1, TOKENIZER="char", LOG_SAMPLE=1)
    ok(run("train.py", fresh=True, PYTHONIOENCODING=encoding, **text))
    ok(run("sample.py", "--prompt=\u6f22", fresh=True, PYTHONIOENCODING=encoding))


def test_a_reader_that_goes_away_ends_nothing(tmp_path):
    child = popen(["train.py", "--max_iters=3"], tmp_path, **TINY | dict(LOG_SAMPLE=1))
    child.stdout.close()
    child.stderr.close()
    assert child.wait(60) == 0 and torch.load(tmp_path / "out/ckpt.pt", weights_only=True)["step"] == 3


def test_a_folder_has_one_run(tmp_path):
    first = popen(["train.py", "--max_iters=100000"], tmp_path, **TINY)
    while not (tmp_path / "out/ckpt.pt").exists():
        time.sleep(0.05)
    second = popen(["train.py", "--max_iters=2"], tmp_path, **TINY)
    _, said = second.communicate(timeout=60)
    assert second.returncode == 2 and "another run is writing to out_dir=out" in said
    first.send_signal(signal.SIGINT)
    shown, said = first.communicate(timeout=60)
    assert first.returncode == 130 and "--init_from=resume goes on" in shown and "Traceback" not in said
    step = torch.load(tmp_path / "out/ckpt.pt", weights_only=True)["step"]
    assert 0 < step < 100000 and f"stopped after step {step}" in shown


@pytest.mark.parametrize("half", [dict(RANK=0), dict(WORLD_SIZE=2), dict(RANK=0, WORLD_SIZE=0, LOCAL_RANK=0), dict(RANK="x", WORLD_SIZE=1, LOCAL_RANK=0),
                                  dict(RANK=0, WORLD_SIZE=-1, LOCAL_RANK=0), dict(RANK=0, WORLD_SIZE=2, LOCAL_RANK=0), dict(LOCAL_RANK=0)])
def test_half_of_a_launcher(run, half):
    done = run("train.py", "--max_iters=1", **TINY | half)
    assert done.returncode == 2 and done.stderr.count("error: ") == 1 and "torchrun" in done.stderr


def test_stopped_and_resumed_it_is_the_same_run(run, tmp_path):
    settings = TINY | dict(MAX_ITERS=400, EVAL_INTERVAL=1000)
    ok(run("train.py", "--out_dir=whole", **settings))
    child = popen(["train.py"], tmp_path, **settings)
    while not (tmp_path / "out/ckpt.pt").exists():
        time.sleep(0.01)
    child.send_signal(signal.SIGTERM)
    shown, said = child.communicate(timeout=60)
    assert child.returncode in (143, 0) and "Traceback" not in said
    if child.returncode:
        ok(run("train.py", "--init_from=resume"))
    losses = [{row["step"]: row["loss"] for row in rows(tmp_path / d, "train")} for d in ("whole", "out")]
    assert losses[0] == losses[1] and len(losses[0]) == 400
    for script in ("sample.py", "data.py"):                        # before anything is done
        child = popen([script, "--ckpt=whole/ckpt.pt"] if script == "sample.py" else [script, "latents", "--out=p"], tmp_path)
        time.sleep(0.3)
        child.send_signal(signal.SIGINT)
        _, said = child.communicate(timeout=60)
        assert child.returncode in (130, 0, -signal.SIGINT) and (child.returncode != 130 or said.count("stopped by Ctrl-C") == 1)


def test_a_full_disk_gets_one_line_and_keeps_what_was_there(tmp_path):
    path = tmp_path / "ckpt.pt"
    nets.save_checkpoint(str(path), {"x": torch.ones(10)})
    code = (f"import sys, resource; sys.path.insert(0, {ROOT!r}); import torch, model\n"
            "from configurator import one_line_errors\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
            f"with one_line_errors(): model.save_checkpoint({str(path)!r}, {{'x': torch.ones(10**6)}})")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "ckpt.pt of 4,0" in done.stderr, done.stderr
    assert os.listdir(tmp_path) == ["ckpt.pt"] and len(nets.load_checkpoint(str(path))["x"]) == 10


def test_writing_follows_no_link(tmp_path):
    (tmp_path / "victim").write_text("whole")
    (tmp_path / "a.tmp").symlink_to(tmp_path / "victim")
    configurator.replace_file(tmp_path / "a", b"new")
    assert (tmp_path / "victim").read_text() == "whole" and (tmp_path / "a").read_bytes() == b"new" and not (tmp_path / "a.tmp").is_symlink()


def test_half_a_line_of_the_log_is_cut_off(run, tmp_path):
    ok(run("train.py", "--max_iters=1", **TINY))
    with open(tmp_path / "out/log.jsonl", "a") as f:
        f.write('{"event": "train", "st')
    ok(run("train.py", "--init_from=resume", "--max_iters=2"))
    assert [row["step"] for row in rows(tmp_path / "out", "train")] == [0, 1]


@pytest.mark.parametrize("damage", [lambda f: f.write_bytes(b""), lambda f: f.write_bytes(f.read_bytes()[:5000]), lambda f: f.unlink()],
                         ids=["empty", "truncated", "gone"])
def test_a_damaged_library_is_built_again(tmp_path, monkeypatch, damage, request):
    source = tmp_path / "one.cpp"
    source.write_text(f"int one() {{ return 1; }}  // {request.node.name}: torch builds a source once a process\n")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "ext"))
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    name = f"nanodir_{request.node.callspec.id}"
    built = loader.compiled(name, [source], ["-O0"])
    size = built.stat().st_size
    damage(built)
    code = (f"import sys; sys.path.insert(0, {ROOT!r}); from wkv_cuda import loader; import torch, pathlib\n"
            f"torch.ops.load_library = lambda path: None; loader.compiled({name!r}, [pathlib.Path({str(source)!r})], ['-O0'])")
    for said in ("built the", ""):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        lines = [line for line in done.stderr.splitlines() if "No CUDA runtime" not in line]      # torch's, without a GPU
        assert done.returncode == 0 and said in "".join(lines) and (said or not lines) and built.stat().st_size == size


# ---- C. files that are well formed and wrong inside ----

def test_prefixes_and_wrappers_of_other_trainers(tmp_path):
    net = nets.Denoiser(nets.ModelConfig(n_layer=1, n_embd=32, head_size=16, vocab_size=8, direction="causal", rank_w=8, rank_a=8, rank_g=8))
    weights = dict(net.state_dict()) | {"emb.weight": net.emb.weight.detach()[:-1]}
    x = torch.randint(8, (2, 9))
    for wrap in (lambda w: w, lambda w: {"state_dict": {f"_forward_module.{k}": v for k, v in w.items()}},
                 lambda w: {"model": {f"module._orig_mod.{k}": v for k, v in w.items()}, "epoch": 3}):
        torch.save(wrap(weights), tmp_path / "w.pth")
        found = nets.from_pretrained(str(tmp_path / "w.pth"), direction="causal")
        assert torch.equal(found(x).logits, net(x).logits)


def test_sizes_are_checked_before_memory_is_taken(tmp_path):
    for sizes in (dict(n_layer=10**9), dict(n_embd=2**20, head_size=64), dict(vocab_size=10**9)):
        with pytest.raises(ValueError, match="takes at least"):
            nets.Denoiser(nets.ModelConfig(**dict(vocab_size=8) | sizes))
    file = io.BytesIO()
    np.save(file, np.zeros(4, "f4"))
    (tmp_path / "huge.npy").write_bytes(file.getvalue().replace(b"(4,), ", b"(99999999999,), "))
    with pytest.raises(ValueError, match="claims float32"):
        data.load_array(tmp_path / "huge.npy")
    np.savez_compressed(tmp_path / "bomb.npz", input_ids=np.zeros(10**6))
    with pytest.raises(ValueError, match="compressed"):
        data.load_array(tmp_path / "bomb.npz", ("input_ids",))


def test_a_short_campaign(tmp_path):
    code = f"import sys; sys.path[:0] = [{os.path.join(ROOT, 'tests')!r}, {ROOT!r}]; import campaign; sys.exit(bool(campaign.main(40, {os.getpid()})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


# ---- D. security ----

def test_the_temporary_build_folder_is_ours_alone(tmp_path, monkeypatch):
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setenv("HOME", "/nowhere/at/all")
    monkeypatch.setattr(loader.tempfile, "gettempdir", lambda: str(tmp_path))
    root = loader.build_root()
    assert root.parent == tmp_path and root.stat().st_mode & 0o777 == 0o700
    root.chmod(0o777)
    with pytest.raises(OSError, match="yours alone"):
        loader.build_root()
    root.rmdir()
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    root.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="yours alone"):
        loader.build_root()


# ---- E. what people expect ----

def test_every_reader_takes_a_text_alike(tmp_path):
    """A byte order mark, line ends of Windows, a home folder; of JSONL the texts."""
    plain, windows = tmp_path / "a.txt", tmp_path / "b.txt"
    plain.write_bytes(TEXT.encode())
    windows.write_bytes(b"\xef\xbb\xbf" + TEXT.replace("\n", "\r\n").encode())
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"text": line, "id": 1}) + "\n" for line in TEXT.splitlines()))
    ids = lambda source: torch.cat([source.train[np.arange(len(source.train))], source.val[np.arange(len(source.val))]]).tolist()
    wanted = list(TEXT.encode())
    for path in (plain, windows, tmp_path / "c.jsonl"):
        assert data.read_text(path)[1] == TEXT
        out = tmp_path / f"{path.name}.tokens"
        for pieces in (1 << 18, 100):
            data.PIECE, before = pieces, data.PIECE
            assert data.main(["prepare", f"--data_path={path}", f"--out={out}{pieces}", "--shard_tokens=500"]) == 0
            data.PIECE = before
            assert ids(data.TextSource(f"{out}{pieces}", 16)) == wanted


def test_home_is_spelt_out():
    cfg = configurator.configure({"data_path": ("", ""), "prompt": ("", "")}, argv=["--data_path=~/x", "--prompt=~/x"], env={}, show=False)
    assert cfg.data_path == os.path.expanduser("~/x") and cfg.prompt == "~/x"


def test_a_folder_of_texts(run, tmp_path):
    (tmp_path / "texts").mkdir()
    for name in ("a.txt", "b.md", "c.png", "d.py"):
        (tmp_path / "texts" / name).write_text(TEXT)
    done = run("train.py", DATA_PATH="texts", MAX_ITERS=1)
    assert done.returncode == 2 and "python data.py prepare --data_path=texts --out=FOLDER" in done.stderr
    shown = ok(run("data.py", "prepare", "--out=o", DATA_PATH="texts"))
    assert "left out" in shown and "c.png" in shown and "d.py" in shown and "b.md" not in shown.split("left out")[1].splitlines()[0]
    assert "d.py" not in ok(run("data.py", "prepare", "--data_path=texts", "--out=o2", "--pattern=*.py,*.PNG,*.txt,*.md"))


def test_prompts_holes_and_the_environment(run, tmp_path):
    (tmp_path / "t.txt").write_text("if __name__ == x: caf\u00e9\n" * 100, encoding="utf-8")
    text = {k: v for k, v in TINY.items() if "STRUCT" not in k} | dict(DATA_PATH="t.txt", MAX_ITERS=1, EVAL_ITERS=1)
    ok(run("train.py", **text))
    shown = ok(run("sample.py", "--ckpt", "--num_samples=1", "--hole=?", "--text=if __name__ == ?:", TEXT="from elsewhere", SEED="x"))
    assert "if __name__ == " in shown and "1 tokens" in shown
    shown = ok(run("sample.py", "--prompt=a", "--num_samples=1", "--length=2", SAMPLE_SEED="3"))
    assert "seed = 3   (env SAMPLE_SEED)" in shown
    done = run("sample.py", "--prompt=a", "--objective=block")
    assert done.returncode == 2


def test_a_terminal_gets_characters_and_no_control(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sample.py"])
    import sample
    tokenizer = data.Tokenizer("byte")
    ids = list("caf\u00e9 \x1b[31m\u0007!".encode())
    monkeypatch.setattr(sample.sys.stdout, "isatty", lambda: True, raising=False)
    shown = sample.body(tokenizer, ids, ids, 256)
    assert shown == "caf\u00e9 \u241b[31m\u2407!"
    assert "".join(tokenizer.characters(list("\u00e9\u6f22".encode()))) == "\u00e9\u6f22"


def test_workers_end_with_their_launcher(tmp_path):
    env = {k: v for k, v in os.environ.items() if k in KEPT} | {k: str(v) for k, v in TINY.items()}
    with open(tmp_path / "said", "w") as said:
        launcher = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29617",
                                     os.path.join(ROOT, "train.py"), "--max_iters=1000000"], cwd=tmp_path, env=env, stdout=said, stderr=said)
    while not (tmp_path / "out/ckpt.pt").exists() and launcher.poll() is None:
        time.sleep(0.05)
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    launcher.kill()
    launcher.wait()
    for _ in range(400):
        left = [pid for pid in children if Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes()]
        if not left:
            break
        time.sleep(0.05)
    assert len(children) >= 2 and not left and "launcher of this process is gone" in (tmp_path / "said").read_text()
