"""Texts with latents: the commands that make them, the layout, and what is refused."""
import json
import random

import numpy as np
import pytest

import data

WORDS = "the a cat dog sat ran on under mat log king sword speaks love war peace night day".split()


@pytest.fixture
def text(tmp_path):
    rng = random.Random(5)
    (tmp_path / "a.txt").write_text(" ".join(rng.choice(WORDS) for _ in range(12_000)) + " \u00e9nd")
    return str(tmp_path / "a.txt")


def test_principal_components_are_numpys():
    """Against the singular value decomposition, in chunks of any size; distances keep their proportions."""
    x = np.random.default_rng(1).normal(size=(300, 20)) @ np.random.default_rng(2).normal(size=(20, 20)) + 3
    one = data.fit_projection([x], 5)
    many = data.fit_projection([x[:7], x[7:100], x[100:]], 5)
    assert all(np.allclose(a, b, atol=1e-4) for a, b in zip(one, many))
    u, s, v = np.linalg.svd(x - x.mean(0), full_matrices=False)
    z = one(x)
    assert z.shape == (300, 5) and z.dtype == np.float32
    assert np.allclose(np.abs(z * one.scale), np.abs(u[:, :5] * s[:5]), atol=1e-3)
    assert (z**2).mean() == pytest.approx(1, rel=1e-3) and np.allclose(z.mean(0), 0, atol=1e-4)
    with pytest.raises(ValueError, match="dim=30 latents from 300 vectors of 20 features"):
        data.fit_projection([x], 30)


def test_ngrams_by_hand():
    a, b, c = data.ngrams(["ab", "AB ", "xy"], 1 << 16)
    assert np.array_equal(a, b) and a @ c == 0 and np.linalg.norm(a) == pytest.approx(1)
    assert (a > 0).sum() == 6                                        # " a", "ab" (twice: also a word), "b ", " ab", "ab ", " ab "


def test_latents_from_any_text(text, tmp_path, capsys):
    out = tmp_path / "pairs"
    assert data.main(["latents", f"--data_path={text}", f"--out={out}", "--dim=8", "--length=64", "--buckets=256", "--tokenizer=char"]) == 0
    train, held = (data.read_entries(out, split) for split in data.PAIRS)
    whole = open(text).read()
    assert "".join(e["text"] for e in train) == whole[:64 * len(train)] and all(len(e["text"]) == 64 for e in held)
    assert len(held) == pytest.approx(len(train) / 9, rel=0.05)
    vectors, there = data.read_vectors(out, train)
    assert there.all() and vectors.shape == (len(train), 8)
    projection = data.Projection(*data.load_array(out / "projection.npz", ("mean", "components", "scale")))
    assert np.allclose(projection(data.ngrams([e["text"] for e in train[:9]], 256)), vectors[:9], atol=1e-5)
    ids, mask = data.load_array(out / "train/000000.npz", ("input_ids", "attention_mask"))
    tok = data.Tokenizer(**json.loads((out / "tokenizer.json").read_text()))
    assert ids.shape == mask.shape == (len(train), 64) and mask.all() and tok.decode(ids[3].tolist()) == train[3]["text"]
    # Other tokens, cut and padded; then a smaller projection of what is there.
    assert data.main(["tokenize", f"--data_path={out}", "--max_length=70"]) == 0
    ids, mask = data.load_array(out / "train/000000.npz", ("input_ids", "attention_mask"))
    assert ids.shape == (len(train), 70) and mask.sum(1).tolist() == [len(e["text"].encode()) for e in train]
    assert data.main(["project", f"--data_path={out}", f"--out={tmp_path / 'small'}", "--dim=3"]) == 0
    small, _ = data.read_vectors(tmp_path / "small", data.read_entries(tmp_path / "small", "train"))
    assert small.shape == (len(train), 3)
    again = data.fit_projection([vectors], 3)
    assert np.allclose(small, again(vectors), atol=1e-4)


def test_what_is_refused(text, tmp_path, capsys):
    out = tmp_path / "pairs"
    assert data.main(["latents", f"--data_path={text}", f"--out={out}", "--dim=4", "--length=64", "--buckets=64"]) == 0
    entries, at = data.read_entries(out, "train"), lambda i: out / f"latents/train/{i:06d}.npy"

    def refused(*words, skip=False):
        with pytest.raises(ValueError) as e:
            data.read_vectors(out, entries, skip)
        assert all(word in str(e.value) for word in words), e.value
    good = np.load(at(1))
    for broken, words in ((np.zeros(5, np.float32), ("000001.npy has shape (5,)", "(4,)")), (np.array([1, 2, np.nan, 4]), ("000001.npy", "NaN"))):
        np.save(at(1), broken)
        refused(*words)
    np.save(at(1), np.array([{"a": 1}], dtype=object), allow_pickle=True)
    refused("000001.npy", "one of pickled objects, which are never loaded")
    np.save(at(1), good)
    at(1).write_bytes(at(1).read_bytes()[:-3])
    refused("000001.npy", "truncated")
    at(1).unlink()
    at(2).unlink()
    refused(f"2 of {len(entries)} entries have no latent file", "000001.npy", "--skip_missing=1")
    vectors, there = data.read_vectors(out, entries, skip_missing=True)
    assert len(vectors[there]) == there.sum() == len(entries) - 2
    (tmp_path / "cut.npz").write_bytes((out / "train/000000.npz").read_bytes()[:100])
    for call, words in ((lambda: data.load_array(tmp_path / "cut.npz", ("input_ids",)), "truncated"),
                        (lambda: data.load_array(out / "train/000000.npz", ("tokens",)), "must hold tokens"),
                        (lambda: data.load_array(tmp_path / "none.npy"), "does not exist"),
                        (lambda: data.read_entries(tmp_path, "train"), "data.py latents")):
        with pytest.raises(ValueError, match=words):
            call()
    for content, words in (("[1", "cannot be read .JSONDecodeError"), ('[{"latent_path": "x"}]', "must be a list of entries")):
        (tmp_path / "train_data.json").write_text(content)
        with pytest.raises(ValueError, match=words):
            data.read_entries(tmp_path, "train")
    for options in (["latents", "--dim=0", "--out=x"], ["project", "--data_path=a", "--out=a"], ["tokenize", f"--data_path={out}", "--max_length=0"],
                    ["latents", f"--data_path={text}", f"--out={tmp_path / 'b'}", "--dim=200", "--length=5000", "--buckets=300"]):
        capsys.readouterr()
        assert data.main(options) == 2 and len(capsys.readouterr().err.strip().splitlines()[-1:]) == 1
