"""What the tables rest on: FLOPs by formula against a counted run, twins of equal size, quick runs that overwrite nothing."""
import json
import math
from dataclasses import replace

import pytest
import torch

import bench
import wkv_cuda
from model import ModelConfig

SMALL = ModelConfig(n_layer=3, n_embd=64, head_size=32, vocab_size=50, block_size=16)


@pytest.mark.parametrize("changes", [dict(), dict(direction="bidirectional"), dict(direction="block", fusion="gate"),
                                     dict(direction="bidirectional", fusion="concat"), dict(mixer="attention"), dict(mixer="attention,rwkv7")])
def test_flops_by_formula_equal_a_counted_run(changes):
    if wkv_cuda.build("cpp"):
        pytest.skip("the count runs the C++ kernel")
    cfg = replace(SMALL, **changes)
    assert bench.counted_flops(cfg, 48) == pytest.approx(bench.flops_per_token(cfg, 48), rel=1e-6)


@pytest.mark.parametrize("direction", ["causal", "bidirectional"])
def test_the_attention_twin_has_as_many_parameters(direction):
    cfg = replace(SMALL, direction=direction)
    twin = bench.attention_twin(cfg)
    assert twin.mixer == "attention" and bench.parameters(twin) == pytest.approx(bench.parameters(cfg), rel=0.005)


def test_bigram_divergence_by_hand():
    x, y = torch.tensor([[3, 5, 3]]), torch.tensor([[3, 3, 3]])      # bigrams 35, 53 against twice 33, a tenth of a count each more
    assert bench.bigram_kl(x, y) == pytest.approx(math.log(0.5 / (0.1 / 2.4)))
    assert bench.bigram_kl(y, y) == pytest.approx(math.log(1 / (2.1 / 2.1)))      # only 3 occurs


def test_what_was_measured_is_not_measured_again(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "out", str(tmp_path))
    asked, runs = [], bench.earlier("text")
    for key in ("a", "b", "a"):
        bench.kept("text", key, lambda: asked.append(key) or dict(bits=1.0), runs)
    assert asked == ["a", "b"] and bench.earlier("text") == runs == {"a": {"bits": 1.0}, "b": {"bits": 1.0}}


def test_a_quick_run_replaces_no_measured_figures(run, tmp_path):
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench/flops.json").write_text("{}")
    done = run("bench.py", "--suite=flops", QUICK=1, THREADS=1)
    assert done.returncode in (0, 2), done.stderr                    # 2 where there is no compiler
    assert (tmp_path / "bench/flops.json").read_text() == "{}"
    if not done.returncode:
        rows = json.loads((tmp_path / "bench/flops.quick.json").read_text())["rows"]
        assert rows.keys() == {"causal", "block 32", "block 64", "block 128", "bidirectional", "attention twin"}
        assert all(row["off"] < 0.01 for row in rows.values())
