"""Tokens and batches: nothing may depend on how a batch is cut."""
import functools
import pytest
import torch

import data
import diffusion
import tasks

TEXT = "".join(f"line {i}: grün, naïve — and so on\n" for i in range(200))


@pytest.fixture
def text_file(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8")
    return str(tmp_path / "a.txt")


def test_tokenizers_return_the_text():
    chars = data.Tokenizer("char", "".join(sorted(set(TEXT))))
    for tokenizer, count in ((data.Tokenizer("byte"), len(TEXT.encode())), (chars, len(TEXT))):
        ids = tokenizer.encode(TEXT)
        assert len(ids) == count and max(ids) < tokenizer.vocab_size and tokenizer.decode(ids) == TEXT
        assert data.Tokenizer(**tokenizer.state()).decode(ids) == TEXT
        assert tokenizer.decode([tokenizer.vocab_size]) == "_"
    with pytest.raises(ValueError, match="'@' is not in the vocabulary"):
        chars.encode("a@b")
    with pytest.raises(ValueError, match="tokenizer='words' is unknown: choose one of byte, char"):
        data.Tokenizer("words")


def test_text_holds_out_its_last_tenth(text_file):
    source = data.TextSource(text_file, 16, "byte")
    ids = TEXT.encode()
    assert bytes(source.train.tolist()) + bytes(source.val.tolist()) == ids and len(source.val) == pytest.approx(len(ids) / 10, abs=1)
    assert source.chars_per_token == len(TEXT) / len(ids) < 1
    x, maskable, lengths = source.train_rows(0, 4, 0, 4, 1)
    assert x.shape == (4, 16) and maskable.all() and lengths is None and all(bytes(r.tolist()) in ids for r in x)
    held = bytes(source.val.tolist())
    assert all(bytes(r.tolist()) in held for r in source.eval_rows(9)[0])


def test_files_that_are_no_text(tmp_path):
    (tmp_path / "short.txt").write_text("hello")
    (tmp_path / "binary").write_bytes(bytes(range(256)) * 100)
    with pytest.raises(ValueError, match="holds 5 tokens, too few.*seq_len=16.*160 tokens"):
        data.TextSource(str(tmp_path / "short.txt"), 16)
    with pytest.raises(ValueError, match=r"binary is not UTF-8 text \(byte 128\)"):
        data.TextSource(str(tmp_path / "binary"), 16)


def sources(text_file):
    name = "reverse"                                                 # rows of many lengths
    return [data.TextSource(text_file, 32), data.TaskSource(name, tasks.params(name, {k: v[0] for k, v in tasks.settings().items()}), 64)]


def flatten(steps, T, padding):
    """Micro-batches of several processes -> the rows of each step's global batch, padded to T, and the denominators' sum."""
    pad = lambda z, value=0: torch.nn.functional.pad(z, (0, T - z.shape[1]), value=value)
    row = lambda x, masked, weight, lengths: (pad(x, padding), pad(masked), pad(weight * masked))
    rows = [[torch.cat(z) for z in zip(*(row(*part) for rank in step for part in rank[0]))] for step in zip(*steps)]
    return rows, [sum(rank[1] for rank in step) for step in zip(*steps)]


@pytest.mark.parametrize("objective", diffusion.OBJECTIVES)
def test_the_global_batch_is_the_same_however_it_is_cut(text_file, objective):
    for source in sources(text_file):
        def batches(world, micro, start=0):
            return flatten([[next(b) for _ in range(3)] for b in (
                data.make_batches(source, functools.partial(diffusion.OBJECTIVES[objective].noise, schedule="linear", n=4), diffusion.stratified, 8, micro, 5, start, r, world)
                for r in range(world))], source.T, source.tokenizer.ids.get("#", 0))
        whole, total = batches(1, 8)
        for world, micro in ((1, 2), (2, 4), (4, 1)):
            rows, sums = batches(world, micro)
            assert sums == total
            assert all(torch.equal(a, b) for step, other in zip(rows, whole) for a, b in zip(step, other))
        later, _ = batches(1, 8, start=2)                            # a resumed run sees what it would have seen
        assert all(torch.equal(a, b) for a, b in zip(later[0], whole[2]))
        assert not torch.equal(whole[0][0], whole[1][0])


def test_task_rows_lengths_and_evaluation_set(text_file):
    source = sources(text_file)[1]
    x, answer, lengths = source.eval_rows(50, 1234)
    assert x.shape[1] == lengths.max() < 64 and len(set(lengths.tolist())) > 5
    pad = source.tokenizer.ids["#"]
    for row, a, n in zip(x, answer, lengths.tolist()):
        assert (row[n:] == pad).all() and row[n - 1] != pad and not a[n:].any() and a[:n].any()
    assert all(torch.equal(a, b) for a, b in zip((x, answer, lengths), source.eval_rows(50, 1234)))


def test_side_by_side_marks_mask_and_errors():
    chars = data.Tokenizer("char", "abc\n")
    target, masked, pred = torch.tensor([0, 1, 3, 2]), torch.tensor([False, True, False, True]), torch.tensor([0, 2, 3, 2])
    assert data.side_by_side(chars, target, masked, pred).splitlines() == ["  IN a_⏎_", "  GT ab⏎c", "  PR ac⏎c", "      ^"]
