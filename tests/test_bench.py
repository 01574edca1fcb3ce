"""What the tables rest on: FLOPs by formula against a counted run, baselines of equal size, quick runs that overwrite nothing."""
import json
import math
import os
from dataclasses import replace

import pytest
import torch

import bench
import model
import wkv_cuda
from conftest import ok
from model import ModelConfig

SMALL = ModelConfig(n_layer=3, n_embd=64, head_size=32, vocab_size=50, block_size=16)


@pytest.mark.parametrize("changes", [dict(), dict(direction="bidirectional"), dict(direction="block", fusion="gate"),
                                     dict(direction="bidirectional", fusion="concat"), dict(mixer="attention"), dict(mixer="attention,rwkv7"),
                                     dict(direction="alternate"), dict(direction="alternate_block")])
def test_flops_by_formula_equal_a_counted_run(changes):
    if wkv_cuda.build("cpp"):
        pytest.skip("the count runs the C++ kernel")
    cfg = replace(SMALL, **changes)
    assert bench.from_file("flops").counted_flops(cfg, 48) == pytest.approx(model.flops_per_token(cfg, 48), rel=1e-6)


@pytest.mark.parametrize("direction", ["causal", "bidirectional"])
def test_the_attention_baseline_has_as_many_parameters(direction):
    cfg = replace(SMALL, direction=direction)
    baseline = bench.attention_baseline(cfg)
    assert baseline.mixer == "attention" and bench.parameters(baseline) == pytest.approx(bench.parameters(cfg), rel=0.005)


def test_bigram_divergence_by_hand():
    x, y = torch.tensor([[3, 5, 3]]), torch.tensor([[3, 3, 3]])      # bigrams 35, 53 against twice 33, a tenth of a count each more
    assert bench.from_file("gaussian").bigram_kl(x, y) == pytest.approx(math.log(0.5 / (0.1 / 2.4)))
    assert bench.from_file("gaussian").bigram_kl(y, y) == pytest.approx(math.log(1 / (2.1 / 2.1)))      # only 3 occurs


def test_what_was_measured_is_not_measured_again(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "out", str(tmp_path))
    asked, runs = [], {name: bench.Run([]) for name in ("a", "b")}
    log = [dict(event="start", parameters=9, active=8), dict(event="train", ms_per_step=3.0), dict(event="eval")]
    monkeypatch.setattr(bench, "train", lambda options, folder, env: asked.append(os.path.basename(folder)))
    monkeypatch.setattr(bench, "read_log", lambda folder, event="": [row for row in log if event in ("", row["event"])])
    for names in (["a"], ["b", "a"], ["a"]):
        found = bench.quality("text", runs, lambda name, folder: dict(bits=1.0), names)
    row = dict(parameters=9, active=8, ms=3.0, bits=1.0)
    assert asked == ["a", "b"] and bench.earlier("text")["runs"] == found == {"a": row, "b": row}
    bench.write("text", {"runs": found, "pace": 3})
    bench.write("text", {"runs": found})                             # --only: the pace is not measured
    assert bench.earlier("text")["pace"] == 3


def test_a_run_starts_from_another(tmp_path, monkeypatch):
    """Which is trained before it, unless its checkpoint is there."""
    asked = []
    monkeypatch.setattr(bench, "train", lambda options, folder, env: asked.append((os.path.basename(folder), options)))
    runs = {"a": bench.Run(["--x"]), "b": bench.Run(["--y"], start="a")}
    bench.trained(runs, "b", str(tmp_path))
    start = f"--init_from={tmp_path / 'a' / 'ckpt.pt'}"
    assert asked == [("a", ["--x"]), ("b", ["--y", start])]
    (tmp_path / "a").mkdir()
    (tmp_path / "a/ckpt.pt").touch()
    bench.trained(runs, "b", str(tmp_path))
    assert asked[2:] == [("b", ["--y", start])]


@pytest.mark.parametrize("suite,count", [("published", 2), ("tasks", 61), ("ablation", 10), ("text", 84), ("gaussian", 27), ("latent", 14)])
def test_the_figures_on_file_are_read_and_nothing_of_them_is_trained_again(suite, count, tmp_path, monkeypatch, capsys):
    """Every suite of training runs prints its tables from the JSON files in bench/, of this version or the one before."""
    found = bench.earlier(suite)["runs"]
    assert len(found) == count and all(isinstance(row, dict) for row in found.values())
    if suite in ("published", "tasks", "ablation"):
        monkeypatch.setattr(bench, "train", None)
        assert bench.SUITES[suite]() == {"runs": found}
        assert len(capsys.readouterr().out.splitlines()) > 5


def test_numbers_in_tables(capsys):
    bench.table("title", "name | size | rate | both", "{size:.2M} | {0[a.b]:.1%} | {x:.1f} / {size}",
                {"one": {"size": 981120, "a.b": 0.5}, "two": {"x": 2, "size": 3}})
    assert capsys.readouterr().out.split() == "title name size rate both one 0.98 M 50.0% two 0.00 M 2.0 / 3".split()


def test_a_quick_run_replaces_no_measured_figures(run, tmp_path):
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench/flops.json").write_text("{}")
    done = run("bench.py", "--suite=flops", QUICK=1, THREADS=1)
    assert done.returncode in (0, 2), done.stderr                    # 2 where there is no compiler
    assert (tmp_path / "bench/flops.json").read_text() == "{}"
    if not done.returncode:
        rows = json.loads((tmp_path / "bench/flops.quick.json").read_text())["rows"]
        assert rows.keys() == {"causal", "block 32", "block 64", "block 128", "alternate", "bidirectional", "attention baseline"}
        assert all(row["off"] < 0.01 for row in rows.values())


LIBRARIES = []      # kept to the end: torch.export still asks for operators whose library is gone (torch 2.11)


def test_official_kernels_are_called_as_they_are_declared(tmp_path, monkeypatch):
    """Against stand-ins with the signatures of RWKV-LM's .cpp files, which compute what wkv7 defines; a file that is missing is named."""
    with pytest.raises(ValueError, match="rwkv7_clampw.cu"):
        bench.from_file("gpu").official_kernels(str(tmp_path))
    folder = tmp_path / "RWKV-v7" / "train_temp" / "cuda"
    folder.mkdir(parents=True)

    def official(r, w, *rest):
        return wkv_cuda.wkv7_loop(r, -math.exp(-0.5) * torch.sigmoid(w), *rest)[0]

    def forward(*args):
        *x, y, s, sa = args
        assert s.shape == (2, 3, 2, 64, 64) and sa.dtype == torch.float32
        y.copy_(official(*(z.float() for z in x)))

    def backward(*args):
        x, dy, grads = args[:6], args[6], args[9:]
        with torch.enable_grad():
            x = [z.detach().float().requires_grad_() for z in x]
            for to, z in zip(grads, torch.autograd.grad(official(*x), x, dy.float())):
                to.copy_(z)

    def load(name, sources, is_python_module, extra_cuda_cflags):
        assert "-D_N_=64" in extra_cuda_cflags and len(sources) == 2
        library = torch.library.Library(name, "DEF")
        LIBRARIES.append(library)
        for op, f, given, written in (("forward", forward, 6, 3), ("backward", backward, 9, 6)):
            args = [f"Tensor x{i}" for i in range(given)] + [f"Tensor({chr(97 + i)}!) y{i}" for i in range(written)]
            library.define(f"{op}({', '.join(args)}) -> ()")
            library.impl(op, f, "CPU")
    monkeypatch.setattr("torch.utils.cpp_extension.load", load)
    for name in ("rwkv7_clampw.cu", "rwkv7_clampw.cpp", "rwkv7_clampw_v3_for_h100.cu", "rwkv7_clampw_v3.cpp"):
        (folder / name).touch()
    x = bench.from_file("wkv").recurrence_inputs(2, 32, 3, 64, torch.bfloat16, "cpu")
    for f in bench.from_file("gpu").official_kernels(str(tmp_path)).values():
        y, want = f(*x), official(*(z.float() for z in x))
        assert torch.allclose(y.float(), want, rtol=2e-2, atol=2e-2)
        dy = torch.randn_like(y)
        for found, wanted in zip(torch.autograd.grad(f(*x), x, dy), torch.autograd.grad(want, x, dy.float())):
            assert found.dtype == torch.bfloat16 and torch.allclose(found.float(), wanted.float(), rtol=2e-2, atol=2e-2)


def test_logs_are_set_beside_those_of_presets(tmp_path, run, monkeypatch):
    """By hand: a log of two steps, a preset that learns the same and one that learns another thing."""
    start = dict(event="start", vocab_size=10, config=dict(objective="", struct_task=True, tokenizer="byte"))
    train = [dict(event="train", step=step, loss=loss, ms_per_step=60.0, memory_bytes=2**20) for step, loss in ((0, 2.25), (99, 1.5))]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (start, *train, dict(event="eval", step=100, struct_acc=0.75))))
    presets = bench.from_file("presets")
    found = presets.curves("", str(tmp_path / "mine"))
    assert found["loss"] == [[0, 2.25], [99, 1.5]] and found["evals"] == [[100, 0.75]] and found["reached"] == "struct_acc"
    assert found["minutes"] == pytest.approx(100 * 60 / 60e3) and found["kind"] == "default, struct_task" and found["steps"] == 100
    assert presets.at(found["loss"], 100) == 1.5 and presets.at(found["loss"], 50) is None
    said = ok(run("bench.py", "--suite=curves", "mine/log.jsonl", "--out=there"))
    assert "mine" in said and "2.30" in said and "1.50" in said and "struct acc 0.750" in said                # ln 10
    for words, options in (("no log: give some", []), ("is not a log of train.py", ["none/log.jsonl"])):
        done = run("bench.py", "--suite=curves", *options)
        assert done.returncode == 2 and words in done.stderr and len(done.stderr.strip().splitlines()) == 1
