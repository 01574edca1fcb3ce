"""Dialogues: what is given and what is learned, files of every kind, errors with the line, training and answering."""
import gzip
import json

import numpy as np
import pytest
import torch

import data
import diffusion
from conftest import ok
from model import Denoiser, ModelConfig

TURNS = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "One?\r\n"}, {"role": "assistant", "content": " 1 "},
         {"role": "user", "content": "Two?"}, {"role": "assistant", "content": "2"}]


class Letters:
    """A tokenizer of one id per character, with an end of text."""
    kind, eot_id, vocab_size = "letters", 0, 256
    codec = type("Codec", (), {"decode": staticmethod(lambda ids: "".join(map(chr, ids)))})

    def encode(self, text):
        return np.array([ord(c) for c in text])


def shown(row):
    """A row of a ChatSource: what is learned in capitals, as it were: between brackets."""
    ids, learned = row
    return "".join(f"[{chr(i) if i else '#'}]" if mine else chr(i) for i, mine in zip(ids.tolist(), learned.tolist())).replace("][", "")


def source(tmp_path, lines, T=64, **options):
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + "\n")
    return data.ChatSource(path, T, Letters(), **options)


def test_dialogues_as_world_writes_them(tmp_path):
    rows = source(tmp_path, [dict(messages=TURNS), dict(prompt="Hi", response="Ho\nHo"), dict(text="Plain."), dict(text="held out")], 200).train
    assert [shown(row) for row in rows] == ["System: Be brief.\n\nUser: One?\n\nAssistant:[ 1]\n\nUser: Two?\n\nAssistant:[ 2#]",
                                            "User: Hi\n\nAssistant:[ Ho\nHo#]", "[Plain.#]"]
    assert data.question("Hi") == "User: Hi\n\nAssistant:"


def test_rows_end_with_masks_that_nobody_asks_about(tmp_path):
    found = source(tmp_path, [dict(prompt="a", response="b"), dict(text="xyz"), dict(text="z")], block=8).rows([*map(tuple, [
        (np.arange(20), np.arange(20) > 9), (np.arange(3), np.arange(3) > 0)])])
    assert found.lengths.tolist() == [24, 8] and found.x.shape == (2, 24)
    assert found.x[0].tolist() == [*range(20), -1, -1, -1, -1] and found.x[1].tolist() == [0, 1, 2] + [-1] * 21
    assert found.maskable.sum(1).tolist() == [10, 2]
    rows = diffusion.Masked(diffusion.DiffusionConfig(), ModelConfig(vocab_size=300)).with_masks(found)
    assert (rows.x[0, 20:] == 300).all() and torch.equal(rows.x[0, :20], found.x[0, :20])


def test_long_dialogues_lose_their_beginning_and_short_texts_their_end(tmp_path, capsys):
    rows = source(tmp_path, [dict(prompt="x" * 50, response="answer"), dict(text="t" * 50), dict(prompt="q", response="r" * 50), dict(text="v")], 24).train
    assert [len(ids) for ids, _ in rows] == [24, 24, 24] and shown(rows[0]) == "xxxx\n\nAssistant:[ answer#]"[-24 - 2:]
    assert shown(rows[1]) == f"[{'t' * 24}]" and shown(rows[2]).startswith(":[ rrr") and "3 of 4 dialogues, longer than seq_len=24, were cut" in capsys.readouterr().out


@pytest.mark.parametrize("line, words", [
    ("{", "cannot be read .JSONDecodeError"), ("[1]", "it is not an object"), ('{"a": 1}', "it has no text, no prompt with a response, and no messages"),
    ('{"messages": []}', "it has no text"), ('{"messages": [{"role": "bot", "content": "x"}]}', "a message has role 'bot', content of str: roles are system, user, assistant"),
    ('{"messages": [{"role": "user", "content": 3}]}', "content of int"), ('{"messages": ["x"]}', "role None"), ('{"prompt": "x"}', "it has no text, no prompt"),
    ('{"prompt": "x", "response": " "}', "a response is empty"), ('{"messages": [{"role": "user", "content": "x"}]}', "does not end with a response"),
    (r'{"prompt": "\ud800", "response": "y"}', "UnicodeEncodeError")])
def test_a_bad_line_is_named(tmp_path, run, line, words):
    (tmp_path / "d.jsonl").write_text('{"prompt": "a", "response": "b"}\n' + line + "\n")
    with pytest.raises(ValueError, match=f"d.jsonl, line 2 .*{words}") as e:
        data.ChatSource(tmp_path / "d.jsonl", 64, Letters())
    assert "\n" not in str(e.value) and "give lines such as" in str(e.value)


def test_the_first_line_tells_what_a_file_is(tmp_path):
    cases = {'{"id": 1, "prompt": "a", "response": "b"}': True, '{"text": "prompt"}': False, '{"messages": []}': True, "": False}
    for line, want in cases.items():
        (tmp_path / "d.jsonl").write_text(f"\n{line}\n")
        assert data.has_turns(str(tmp_path / "d.jsonl")) == want
    (tmp_path / "d.jsonl").write_text('{"text": "a"}\n{"prompt": "a", "response": "b"}\n')
    with pytest.raises(ValueError, match="d.jsonl, line 2 .*it is a dialogue, but the first line is a text"):
        data.read_text(str(tmp_path / "d.jsonl"))


def test_errors_of_a_run_are_one_line(tmp_path, run):
    (tmp_path / "d.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    for options, words in ((["--tokenizer=byte"], "tokenizer=byte has no end of text"), (["--objective=gaussian"], "objective=gaussian is not for data_path=d.jsonl")):
        done = run("train.py", "--data_path=d.jsonl", "--max_iters=1", *options)
        assert done.returncode == 2 and words in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_compressed_files_are_read_and_prepared(tmp_path, run, ending):
    """The same tokens, also after a stop; and a damaged file is one line."""
    raw = "".join(json.dumps({"text": f"line {i} of many"}) + "\n" for i in range(3000)).encode()
    packed = {".jsonl": lambda: raw, ".jsonl.gz": lambda: gzip.compress(raw)}.get(ending)
    if packed is None:
        zstandard = pytest.importorskip("zstandard", reason="pip install zstandard")
        packed = zstandard.ZstdCompressor().compress(raw[:9000]) + zstandard.ZstdCompressor().compress(raw[9000:])     # two frames
    else:
        packed = packed()
    (tmp_path / f"t{ending}").write_bytes(packed)
    (tmp_path / "plain.jsonl").write_bytes(raw)
    assert data.read_text(str(tmp_path / f"t{ending}"))[1] == data.read_text(str(tmp_path / "plain.jsonl"))[1]
    ok(run("data.py", "prepare", f"--data_path=t{ending}", "--out=a", "--shard_tokens=10000"))
    ok(run("data.py", "prepare", "--data_path=plain.jsonl", "--out=b", "--shard_tokens=10000"))
    for shard in sorted(p.name for p in (tmp_path / "b").glob("*.bin")):
        assert (tmp_path / "a" / shard).read_bytes() == (tmp_path / "b" / shard).read_bytes()
    meta = json.loads((tmp_path / "a/meta.json").read_text())
    assert meta["train"]["tokens"] + meta["val"]["tokens"] == sum(len(json.loads(line)["text"]) + 1 for line in raw.splitlines())
    if ending != ".jsonl":
        (tmp_path / f"cut{ending}").write_bytes(packed[:len(packed) // 2])
        done = run("data.py", "prepare", f"--data_path=cut{ending}", "--out=c")
        assert done.returncode == 2 and "cannot be read" in done.stderr and "it is truncated or damaged" in done.stderr


def test_a_network_learns_to_answer(tmp_path, run):
    """Trained in blocks on three questions, it answers each with its own answer, and ends."""
    answers = dict(red="rose", green="leaf", blue="sky")
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(dict(prompt=q, response=a)) + "\n" for _ in range(20) for q, a in answers.items()))
    ok(run("data.py", "train-bpe", "--data_path=d.jsonl", "--vocab_size=290", "--out=bpe.json"))
    said = ok(run("train.py", "--data_path=d.jsonl", "--tokenizer=bpe:bpe.json", "--objective=block", "--direction=block", "--block_size=8", "--seq_len=32",
                  "--n_layer=2", "--n_embd=64", "--batch_size=12", "--max_iters=60", "--eval_iters=1"))
    assert "bits per char" in said
    for q, a in answers.items():
        assert f"User: {q}\n\nAssistant: {a}<|endoftext|>\n" in ok(run("sample.py", f"--chat={q}", "--num_samples=1", "--temperature=0", "--length=16"))
    assert "Assistant: sky<|endoftext|>" in ok(run("sample.py", "--ckpt=out/ckpt.pt", "--chat=blue", "--num_samples=1", "--temperature=0", "--length=16", "--weights=int8"))


@torch.no_grad()
def test_padding_has_no_effect_on_a_dialogue(tmp_path):
    """The bound of each row alone is its bound beside longer ones."""
    lines = [dict(prompt="a" * n, response="b" * (n + 2)) for n in (1, 9, 20)] + [dict(text="end")]
    mine = source(tmp_path, lines, 64, block=8)
    net = Denoiser(ModelConfig(n_layer=2, n_embd=32, vocab_size=256, direction="block", block_size=8)).eval()
    form = diffusion.Blocks(diffusion.DiffusionConfig(objective="block"), net.cfg)
    together, alone = form.with_masks(mine.rows(mine.train)), [form.with_masks(mine.rows([row])) for row in mine.train]
    masked = together.maskable & (torch.rand(together.x.shape) < 0.7)
    nats = form.nats(net, together.x, masked, together.lengths)
    for i, rows in enumerate(alone):
        n = rows.x.shape[1]
        assert torch.allclose(form.nats(net, rows.x, masked[i:i + 1, :n], rows.lengths), nats[i:i + 1, :n], atol=1e-5) and not nats[i, n:].any()
