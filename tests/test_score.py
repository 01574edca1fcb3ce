"""Log-likelihoods of continuations: they are probabilities, they are what the definition says, and lm-evaluation-harness gets them."""
import json
import re

import pytest
import torch

import bench
import data
import model
from conftest import ROOT, ok

TEXT = "".join(f"{i} and {i + 1} are {2 * i + 1}.\n" for i in range(300))
KINDS = {"ar": ["--direction=causal"], "block": ["--direction=block", "--next_weight=0"], "masked_mean": ["--direction=bidirectional"],
         "mixture": ["--direction=block", "--block_sizes=4,8"]}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, zygote):
    folder = tmp_path_factory.mktemp("score")
    (folder / "t.txt").write_text(TEXT)
    for name, options in KINDS.items():
        argv = [f"{ROOT}/train.py", f"--objective={name}", f"--out_dir={name}", "--data_path=t.txt", "--tokenizer=char", "--n_layer=2", "--n_embd=32",
                "--max_iters=40", "--eval_iters=1", "--seq_len=32", "--batch_size=8", "--block_size=4", "--wkv_impl=torch", *options]
        ok(zygote.run(argv, [{}], folder, [folder / "out.txt", folder / "err.txt"]))
    return folder


@pytest.fixture(scope="module")
def Scorer():
    return bench.from_file("score").Scorer


@pytest.mark.parametrize("name", KINDS)
def test_probabilities_of_all_continuations_sum_to_1(checkpoints, Scorer, name):
    """Of one and of two characters, whatever they are scored together with; the likelihood of two is the product where the order is left to right."""
    scorer = Scorer(checkpoints / name / "ckpt.pt", "" if name in ("ar", "mixture") else "left_to_right")
    alphabet, context = data.alphabet(TEXT), "7 and 8 are"
    one = scorer.pairs([(context, c) for c in alphabet])
    assert sum(torch.tensor(p).exp() for p, _ in one).item() == pytest.approx(1, abs=1e-4)
    assert sum(greedy for _, greedy in one) == 1 and max(one)[1]
    two = scorer.pairs([(context, f"1{c}") for c in alphabet] + [("10 and 11 " * (1 if name == "masked_mean" else 3), "11")])[:-1]
    if name != "masked_mean":                  # there a row of 13 tokens is not one of 12 with another one after it
        first = dict(zip(alphabet, one))["1"][0]
        share = sum(torch.tensor(p - first).exp() for p, _ in two).item()
        assert share == pytest.approx(1, abs=1e-3) or name == "block" and share == pytest.approx(1, abs=0.5)


def test_next_tokens_by_hand(checkpoints, Scorer):
    scorer = Scorer(checkpoints / "ar/ckpt.pt")
    ids = torch.tensor([scorer.tokenizer.encode("3 and 4 are 7").tolist()])
    with torch.no_grad():
        logp = scorer.net(torch.cat([torch.tensor([[scorer.net.mask_id]]), ids[:, :-1]], 1)).logits.log_softmax(-1)
    want = logp[0, 9:].gather(-1, ids[0, 9:, None]).sum().item()
    assert scorer.pairs([("3 and 4 a", "re 7")])[0][0] == pytest.approx(want, abs=1e-4)
    assert scorer.pairs([("3 and 4 ", "are 7")])[0][0] == pytest.approx(scorer.pairs([("3 and 4", " are 7")])[0][0], abs=1e-6)
    assert scorer.pairs([("", "")]) == [(0.0, True)]
    whole = logp[0].gather(-1, ids[0, :, None]).sum().item()
    assert scorer.pairs([("", "3 and 4 are 7")])[0][0] == pytest.approx(whole, abs=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", ["block", "masked_mean"])
def test_the_bound_is_the_mean_over_all_orders(checkpoints, Scorer, name):
    """The exact likelihood in a random order, over many orders, is the bound (DUEL, arXiv 2603.01367): two estimates of one number."""
    scorer, pair = Scorer(checkpoints / name / "ckpt.pt", "bound", draws=1200), ("20 and 21 are", " 41.\n")
    (bound, greedy), = scorer.pairs([pair])
    ids, given = scorer.encoded(*pair)
    x = torch.tensor([ids])
    asked = torch.arange(len(ids))[None] >= given
    orders = torch.cat([scorer.objective.in_order(scorer.net, x, "random", torch.Generator().manual_seed(i), asked, torch.tensor([len(ids)]))[0]
                        for i in range(150)]) * asked.sum()
    assert greedy is None and abs(bound + orders.mean()) < 4 * orders.std() / 150**0.5 + 0.3
    assert Scorer(checkpoints / name / "ckpt.pt").way == "confidence"


def test_generation_ends_where_it_is_told_to(checkpoints, Scorer):
    for name in ("ar", "mixture", "block", "masked_mean"):
        text = Scorer(checkpoints / name / "ckpt.pt").generate("7 and 8 are", dict(until=["\n"], max_gen_toks=12))
        assert "\n" not in text and len(text) <= 12


def test_the_suite_and_its_errors(checkpoints, run, tmp_path):
    lines = [dict(context="2 and 3 are", continuation=" 5."), dict(context="2 and 3 are", choices=[" 5.", " qqq"[:1] + "."], answer=0)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    score = lambda *options: run("bench.py", "--suite=score", f"--ckpt={checkpoints}/ar/ckpt.pt", f"--data_path={tmp_path}/p.jsonl", *options)
    assert "next" in ok(score()) and "bits per character" in ok(score())
    found = json.loads((tmp_path / "bench/score.json").read_text())
    assert found["summary"]["pairs"] == 3 and 0 <= found["summary"]["acc"] <= 1 and len(found["rows"][1]["logp"]) == 2
    for line, words in (('{"context": 1}', "line 1 .*it has no context"), ('{"context": "a"}', "no continuation"), ("x", "line 1 cannot be read"),
                        ('{"context": "a", "choices": ["b"], "answer": 1}', "answer=1 is not the number")):
        (tmp_path / "p.jsonl").write_text(line)
        done = score()
        assert done.returncode == 2 and re.search(words, done.stderr) and len(done.stderr.strip().splitlines()) == 1, done.stderr
    (tmp_path / "p.jsonl").write_text(json.dumps(lines[0]))
    assert "likelihood='confidence' is not for objective=ar" in score("--likelihood=confidence").stderr
    assert "give a .jsonl file" in score("--data_path=p.txt").stderr and "does not exist" in score("--ckpt=none.pt").stderr


def test_lm_evaluation_harness_gets_the_same(checkpoints, Scorer, tmp_path):
    """By the class of bench/README.md, on a task in a local file."""
    lm_eval = pytest.importorskip("lm_eval", reason="pip install lm-eval")
    namespace = {}
    exec(re.search(r"```python\n(.*?lm_eval.*?)```", open(f"{ROOT}/bench/README.md").read(), re.S)[1], namespace)
    rows = [dict(context=f"{i} and {i + 1} are", choices=[f" {2 * i + 1}.", f" {2 * i}."], answer=0) for i in range(10, 20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "sums.yaml").write_text(f"""task: sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path}/rows.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
target_delimiter: ""
metric_list: [{{metric: acc}}]
""")
    from lm_eval.tasks import TaskManager
    net = namespace["NanoDiR"](str(checkpoints / "ar/ckpt.pt"))
    result = lm_eval.simple_evaluate(model=net, tasks=["sums"], task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False), bootstrap_iters=0)
    mine = Scorer(checkpoints / "ar/ckpt.pt").pairs([(row["context"], c) for row in rows for c in row["choices"]])
    right = sum(mine[2 * i][0] > mine[2 * i + 1][0] for i in range(10)) / 10
    assert result["results"]["sums"]["acc,none"] == pytest.approx(right)
    logged = [[float(resp[0][0]) for resp in sample["resps"]] for sample in result["samples"]["sums"]]
    assert torch.allclose(torch.tensor(sorted(logged)), torch.tensor(sorted([mine[2 * i][0], mine[2 * i + 1][0]] for i in range(10))), atol=1e-5)
