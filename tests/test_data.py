"""Tokens and batches: nothing may depend on how a batch is cut."""
import hashlib
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest
import torch

import data
import diffusion
import model as nets
import tasks
import train
from conftest import ROOT, ok

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
    x, maskable, lengths, _ = source.train_rows(0, 4, 0, 4, 1)
    assert x.shape == (4, 16) and maskable.all() and lengths is None and all(bytes(r.tolist()) in ids for r in x)
    held = bytes(source.val.tolist())
    assert all(bytes(r.tolist()) in held for r in source.eval_rows(9)[0])


def test_files_that_are_no_text(tmp_path):
    (tmp_path / "short.txt").write_text("hello")
    (tmp_path / "binary").write_bytes(bytes(range(256)) * 100)
    with pytest.raises(ValueError, match="holds 5 tokens, too few.*seq_len=16.*160 tokens"):
        data.TextSource(str(tmp_path / "short.txt"), 16)
    (tmp_path / "empty").write_text("")
    for kind in ("byte", "char", ""):
        with pytest.raises(ValueError, match="empty holds 0 tokens, too few"):
            data.TextSource(str(tmp_path / "empty"), 16, kind)
    with pytest.raises(ValueError, match=r"binary is not UTF-8 text \(byte 128\)"):
        data.TextSource(str(tmp_path / "binary"), 16)


def sources(text_file):
    name = "reverse"                                                 # rows of many lengths
    return [data.TextSource(text_file, 32), data.TaskSource(name, tasks.params(name, {k: v[0] for k, v in tasks.settings().items()}), 64)]


def flatten(steps, T, padding):
    """Micro-batches of several processes -> the rows of each step's global batch, padded to T, and the denominators' sum."""
    pad = lambda z, value=0: torch.nn.functional.pad(z, (0, T - z.shape[1]), value=value)
    row = lambda b: (pad(b.x, padding), pad(b.masked), pad(b.weight * b.masked), *([] if b.eps is None else [pad((b.eps * b.masked[..., None]).sum(-1))]),
                     *(z for z in (b.z, b.s, b.z_eps) if z is not None))
    rows = [[torch.cat(z) for z in zip(*(row(part) for rank in step for part in rank[0]))] for step in zip(*steps)]
    return rows, [sum(rank[1] for rank in step) for step in zip(*steps)]


@pytest.mark.parametrize("objective", diffusion.OBJECTIVES)
def test_the_global_batch_is_the_same_however_it_is_cut(text_file, objective):
    kind, net = diffusion.OBJECTIVES[objective], nets.ModelConfig(vocab_size=300, block_size=4, n_embd=3, latent_dim=6)
    if "pairs" not in kind.sources:
        net.latent_dim = 0
    row = kind(diffusion.DiffusionConfig(objective=objective, mask_policy="spans"), net)
    for source in sources(text_file):
        def batches(world, micro, start=0):
            share = lambda rank: [train.micro_batches(step, source, row, 8, micro, 5, rank, world) for step in range(start, start + 3)]
            return flatten([share(rank) for rank in range(world)], source.T, source.tokenizer.ids.get("#", 0))
        whole, total = batches(1, 8)
        for world, micro in ((1, 2), (2, 4), (4, 1)):
            rows, sums = batches(world, micro)
            assert all(torch.equal(a, b) for a, b in zip(sums, total))
            assert all(torch.equal(a, b) for step, other in zip(rows, whole) for a, b in zip(step, other))
        later, _ = batches(1, 8, start=2)                            # a resumed run sees what it would have seen
        assert all(torch.equal(a, b) for a, b in zip(later[0], whole[2]))
        assert not torch.equal(whole[0][0], whole[1][0])


# ---- tokenizers of other libraries ---------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def bpe_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bpe")
    (folder / "a.txt").write_text(TEXT + "the quick brown fox\n" * 50, encoding="utf-8")
    data.train_bpe(str(folder / "a.txt"), 400, str(folder / "b.json"))
    return str(folder / "b.json")


def random_text(rng, n):
    """Letters, spaces, line ends, digits and marks of many scripts, in runs as text has them."""
    kinds = ["abcdefgh", "ABC", "0123456789", " ", "  \n", "\n\n", "\t", ".,;'!?", "äöüß", "\u4e2d\u6587\u5b57", "\u3000\u00a0\u2028",
             "🙂👩‍👧", "\0\x1f", "<|endoftext|>", "'s 're", "_"]
    return "".join("".join(rng.choices(rng.choice(kinds), k=rng.randint(1, 8))) for _ in range(n))


@pytest.fixture(scope="module")
def world():
    pytest.importorskip("rwkv")
    return data.Tokenizer("rwkv")


@pytest.mark.parametrize("kind", ["byte", "char", "rwkv", "bpe"])
def test_any_text_comes_back(kind, bpe_file):
    if kind == "rwkv":
        pytest.importorskip("rwkv")
    rng = random.Random(1)
    texts = ["", " ", "\n", TEXT, *(random_text(rng, rng.randint(1, 300)) for _ in range(60))]
    tokenizer = data.Tokenizer({"bpe": f"bpe:{bpe_file}"}.get(kind, kind), "".join(sorted(set("".join(texts)))) if kind == "char" else "")
    again = data.Tokenizer(**json.loads(json.dumps(tokenizer.state())))      # plain values only
    assert again.vocab_size == tokenizer.vocab_size and again.eot_id == tokenizer.eot_id and again.kind == kind
    for text in texts:
        ids = tokenizer.encode(text)
        assert isinstance(ids, np.ndarray) and ids.ndim == 1 and tokenizer.decode(ids) == text
        assert tokenizer.eot_id not in ids.tolist()
        assert not len(ids) or 0 <= ids.min() and ids.max() < tokenizer.vocab_size
        assert np.array_equal(again.encode(text), ids)
        assert tokenizer.decode([*ids[:3].tolist(), tokenizer.vocab_size]).endswith("_")
    assert tokenizer.characters(tokenizer.encode("a\n"))[-1].endswith("⏎")


def test_rwkv_world_is_the_package_s_own_tokenizer(world):
    theirs = pytest.importorskip("rwkv.rwkv_tokenizer")
    theirs = theirs.TRIE_TOKENIZER(os.path.join(os.path.dirname(theirs.__file__), data.World.NAME))
    rng = random.Random(2)
    raw = [bytes(rng.randrange(256) for _ in range(rng.randint(1, 400))) for _ in range(100)]           # mostly invalid UTF-8
    raw += [random_text(rng, 200).encode() for _ in range(50)] + [TEXT.encode(), b" " * 1000, b"\xe4\xb8" * 50, bytes(range(256)) * 3]
    raw += [b"".join(rng.choices(list(theirs.token2idx), k=300)) for _ in range(30)]                   # every length of token
    for b in raw:
        ids = world.codec.encode_bytes(b)
        assert ids == theirs.encodeBytes(b) and b"".join(map(world.codec.words.get, ids)) == b
    assert world.vocab_size == 65536 and world.eot_id == 0 and world.decode([0]) == "<|endoftext|>"


def test_gpt2_is_tiktoken_and_never_downloads(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    import tiktoken
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: pytest.fail("tiktoken would download"))
    none = data.Tokenizer("gpt2")
    assert (none.vocab_size, none.eot_id, none.decode([5, 50256, 50257])) == (50257, 50256, "<5><50256>_")
    assert none.decode([1]) == "<1>" and capsys.readouterr().out.count("shown as numbers") == 1
    with pytest.raises(ValueError, match="gpt2 vocabulary is not in tiktoken's cache: run `python data.py download gpt2`"):
        none.encode("a")
    with pytest.raises(ValueError, match="the checkpoint's gpt2 vocabulary .abc. is not"):
        data.Tokenizer(**none.state() | {"sha256": "abc"})
    monkeypatch.undo()
    if not (real := data.Tokenizer("gpt2")).codec.found:
        pytest.skip("no gpt2 vocabulary in tiktoken's cache")
    for text in (TEXT, random_text(random.Random(3), 300)):
        assert real.encode(text).tolist() == tiktoken.get_encoding("gpt2").encode_ordinary(text) and real.decode(real.encode(text)) == text


def test_gpt2_with_a_vocabulary_in_the_cache(monkeypatch, tmp_path):
    """Small stand-ins for the vocabulary's files, where tiktoken keeps them."""
    import tiktoken
    from tiktoken_ext import openai_public
    stand_in = tiktoken.Encoding("small", pat_str=openai_public.r50k_pat_str, special_tokens={"<|endoftext|>": 50256},
                                 mergeable_ranks={bytes([i]): i for i in range(256)} | {b" a": 256, b"the": 257})
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tiktoken, "get_encoding", {"gpt2": stand_in}.get)
    monkeypatch.setattr(data.GPT2, "FILES", {name: hashlib.sha256(name.encode()).hexdigest() for name in data.GPT2.FILES})
    for name in data.GPT2.FILES:
        url = f"https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{name}"
        (tmp_path / hashlib.sha1(url.encode()).hexdigest()).write_text(name)
    tokenizer = data.Tokenizer("gpt2")
    assert tokenizer.encode("b a").tolist() == [98, 256] and tokenizer.decode([98, 256, 50256, 50300]) == "b a<|endoftext|>_"
    text = random_text(random.Random(4), 400)
    ids, rest = [], text
    while rest:                                                      # in parts as prepare reads: the same ids
        used = data.word_end(rest[:300]) if len(rest) > 300 else len(rest)
        ids, rest = ids + tokenizer.encode(rest[:used]).tolist(), rest[used:]
    assert ids == tokenizer.encode(text).tolist() and tokenizer.decode(ids) == text
    monkeypatch.setattr(data, "PIECE", 300)
    assert ids == tokenizer.encode(text).tolist()
    (tmp_path / hashlib.sha1(url.encode()).hexdigest()).write_text("damaged")
    assert not data.Tokenizer("gpt2").codec.found


def test_vocabulary_files_that_are_wrong(tmp_path, world, bpe_file, monkeypatch):
    (tmp_path / "v.txt").write_text("1 'a' 1\n2 __import__('os').abort() 1\n")
    (tmp_path / "few.txt").write_text("1 'a' 1\n")
    (tmp_path / "b.json").write_text("{}")
    for kind, words in (("rwkv:none.txt", "no RWKV vocabulary none.txt: give it as --tokenizer=rwkv:FILE"), ("bpe", "bpe:FILE.json"),
                        (f"rwkv:{tmp_path}/v.txt", r"not an RWKV vocabulary \(line 2\)"), ("bpe:none.json", "No such file"),
                        (f"rwkv:{tmp_path}/few.txt", "no token for byte 0"), (f"bpe:{tmp_path}/b.json", "b.json is not a JSON file of"),
                        ("byte:a", "tokenizer='byte:a' is unknown")):
        with pytest.raises(ValueError, match=words) as e:
            data.Tokenizer(kind)
        assert "\n" not in str(e.value)
    with pytest.raises(ValueError, match="is not the checkpoint's RWKV vocabulary"):
        data.Tokenizer(**world.state() | {"sha256": "abc"})
    assert data.Tokenizer(**world.state() | {"file": "moved.txt"}).encode("abc").tolist() == world.encode("abc").tolist()
    monkeypatch.setattr(data.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install rwkv"):
        data.Tokenizer("rwkv")
    byte, bpe = data.Tokenizer("byte"), data.Tokenizer(f"bpe:{bpe_file}")
    assert data.agreed("", bpe.state(), "x").encode("abc").tolist() == bpe.encode("abc").tolist()
    assert data.agreed("char", {"kind": "char", "alphabet": "ab"}, "x").alphabet == "ab" and data.agreed(byte, byte.state(), "x") is byte
    for asked, state in (("byte", bpe.state()), (f"bpe:{bpe_file}", byte.state()), ("char", byte.state()), (byte, bpe.state())):
        with pytest.raises(ValueError, match="the checkpoint has another vocabulary .* leave --tokenizer out"):
            data.agreed(asked, state, "the checkpoint")


# ---- prepared folders ----------------------------------------------------------------------------------------------------

def ids_of(folder, split):
    meta = json.loads((folder / "meta.json").read_text())
    return np.concatenate([np.fromfile(folder / name, meta["dtype"]) for name, _ in meta[split]["shards"]] or [[]]), meta


@pytest.mark.parametrize("kind", ["byte", "char", "rwkv", "bpe"])
def test_prepared_shards_are_the_direct_encoding(tmp_path, kind, bpe_file, monkeypatch):
    if kind == "rwkv":
        pytest.importorskip("rwkv")
    rng = random.Random(5)
    text = "".join(rng.choice([TEXT[k:k + 60], random_text(rng, 10)]) for k in rng.choices(range(6000), k=300))
    (tmp_path / "a.txt").write_bytes(text.encode())
    monkeypatch.setattr(data, "PIECE", 1111)                         # many pieces, cut anywhere in a character
    setting = f"bpe:{bpe_file}" if kind == "bpe" else kind
    data.prepare(str(tmp_path / "a.txt"), setting, str(tmp_path / "out"), shard_tokens=777)
    train, meta = ids_of(tmp_path / "out", "train")
    val, _ = ids_of(tmp_path / "out", "val")
    cut = meta["train"]["bytes"]
    tokenizer = data.Tokenizer(**meta["tokenizer"])
    monkeypatch.setattr(data, "PIECE", 1 << 30)                      # the libraries get the whole
    first, second = text.encode()[:cut].decode(), text.encode()[cut:].decode()
    assert abs(cut - 0.9 * len(text.encode())) < 5 and meta["done"] and meta["dtype"] == "uint16"
    assert np.array_equal(train, tokenizer.encode(first)) and np.array_equal(val, tokenizer.encode(second))
    for split, part in (("train", first), ("val", second)):
        shards = [n for _, n in meta[split]["shards"]]
        assert set(shards[:-1]) <= {777} and sum(shards) == meta[split]["tokens"]
        assert meta[split]["chars"] == len(part) and meta[split]["bytes"] == len(part.encode())
    source = data.TextSource(str(tmp_path / "out"), 100)             # rows cross shards; every split of a batch draws the same
    assert source.chars_per_token == len(second) / len(val) and source.bytes_per_token == len(second.encode()) / len(val)
    x, maskable, lengths, _ = source.train_rows(3, 64, 0, 64, 1)
    start = torch.randint(len(train) - 99, (64,), generator=data.generator(1, 3, 1))
    assert np.array_equal(x, train[start[:, None] + torch.arange(100)]) and maskable.all() and lengths is None and x.dtype == torch.int64
    assert torch.equal(x[10:20], source.train_rows(3, 64, 10, 20, 1)[0])
    assert np.array_equal(source.eval_rows(2)[0], np.stack([val[:100], val[-100:]]))
    data.prepare(str(tmp_path / "a.txt"), setting, str(tmp_path / "out"), shard_tokens=777)            # done: nothing changes
    assert np.array_equal(train, ids_of(tmp_path / "out", "train")[0])


def test_a_folder_of_texts_and_a_large_vocabulary(tmp_path, world):
    for name, text in (("b.txt", "second " * 300), ("a.txt", "first " * 100), ("c/d.txt", "third " * 100), ("not.rst", "no")):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_text(text)
    data.prepare(str(tmp_path / "in"), "rwkv", str(tmp_path / "out"))
    train, val = (world.decode(ids_of(tmp_path / "out", split)[0]) for split in data.SPLITS)
    assert train + val == "".join(t + "<|endoftext|>" for t in ("first " * 100, "second " * 300, "third " * 100))
    wide = "".join(map(chr, range(0x20000, 0x20000 + 70000)))        # more characters than uint16 counts
    (tmp_path / "wide.txt").write_text(wide, encoding="utf-8")
    data.prepare(str(tmp_path / "wide.txt"), "char", str(tmp_path / "wide"))
    ids, meta = ids_of(tmp_path / "wide", "val")
    assert meta["dtype"] == "uint32" and ids.max() == 69999
    assert data.TextSource(str(tmp_path / "wide"), 50).eval_rows(2)[0].max() == 69999


MEMORY = """
import sys
sys.path.insert(0, sys.argv[1])
import data
peak = lambda: next(int(x.split()[1]) // 1024 for x in open("/proc/self/status") if x.startswith("VmHWM"))
base = peak()                         # not getrusage: its peak counts the parent's memory at the fork too
assert data.main(sys.argv[2:]) == 0
print("MEMORY", base, peak())
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads the peak memory from /proc")
def test_prepare_in_bounded_memory_killed_and_resumed(tmp_path):
    line = "".join(f"{i} is a number, naïve as it is.\n" for i in range(30000)).encode()
    with open(tmp_path / "big.txt", "wb") as f:
        while f.tell() < 60_000_000:
            f.write(line)
    whole = np.fromfile(tmp_path / "big.txt", np.uint8)
    command = [sys.executable, "-c", MEMORY, ROOT, "prepare", f"--data_path={tmp_path}/big.txt", f"--out={tmp_path}/out",
               "--shard_tokens=1_000_003"]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    begun = time.time()
    while not (tmp_path / "out/train_000003.bin").exists() and time.time() < begun + 60:
        time.sleep(0.002)
    first.send_signal(signal.SIGKILL)
    first.wait()
    meta = json.loads((tmp_path / "out/meta.json").read_text())
    assert 2 < len(meta["train"]["shards"]) < 50 and not meta["done"]
    with pytest.raises(ValueError, match="out is not finished: start `python data.py prepare` once more"):
        data.TextSource(str(tmp_path / "out"), 16)
    kept = (tmp_path / "out/train_000000.bin").stat().st_mtime_ns
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    base, peak = map(int, done.stdout.split("MEMORY")[1].split())
    print(f"peak {peak} MB, of which {base} MB are imports")
    assert peak < 700 and peak - base < 60                           # MB; torch alone is most of it, with CUDA even more so
    train, meta = ids_of(tmp_path / "out", "train")
    assert kept == (tmp_path / "out/train_000000.bin").stat().st_mtime_ns
    assert np.array_equal(np.concatenate([train, ids_of(tmp_path / "out", "val")[0]]), whole) and meta["done"]
    assert meta["train"]["chars"] == len(train.astype(np.uint8).tobytes().decode()) and not (tmp_path / "out/shard.tmp").exists()


@pytest.mark.parametrize("stop", [1, 2, 6, 7])
def test_stopped_anywhere_it_goes_on_to_the_same_bytes(tmp_path, bpe_file, monkeypatch, stop):
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text(TEXT[i * 1000:], encoding="utf-8")
    monkeypatch.setattr(data, "PIECE", 1500)
    job = lambda out: data.prepare(str(tmp_path), f"bpe:{bpe_file}", str(out), shard_tokens=900)
    job(tmp_path / "whole")
    replace, left = os.replace, [stop]
    def failing(a, b):
        if str(b).endswith(".bin"):
            left[0] -= 1
            if not left[0]:
                raise KeyboardInterrupt
        replace(a, b)
    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(KeyboardInterrupt):
        job(tmp_path / "parts")
    job(tmp_path / "parts")
    same = lambda folder: {f.name: f.read_bytes() for f in folder.iterdir()}
    assert same(tmp_path / "parts") == same(tmp_path / "whole")


def test_what_prepare_refuses(tmp_path, text_file, capsys):
    def job(*options, path=text_file):
        return ["prepare", f"--data_path={path}", f"--out={tmp_path}/out", *options]
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "binary").write_bytes(bytes(range(256)) * 9000)
    (tmp_path / "late").write_bytes(b"a" * 3_000_000 + b"\xff")
    (tmp_path / "folder").mkdir()
    for argv, words in (
            (job(path=tmp_path / "empty.txt"), "empty.txt holds no text"), (job(path=tmp_path / "folder"), "folder holds no text"),
            (job("--tokenizer=char", path=tmp_path / "binary"), "binary is not UTF-8 text (byte 128)"),
            (job("--tokenizer=char", path=tmp_path / "late"), "late is not UTF-8 text (byte 3000000)"),
            (job(path=tmp_path / "none"), "none: No such file"), (job(path=""), "--data_path is missing"),
            (job("--val_share=1"), "val_share = 1.0"), (job("--shard_tokens=0"), "shard_tokens = 0"), (job("--out="), "--out"),
            (job("--tokenizer=words"), "tokenizer='words' is unknown"), (job("--tokenizer=bpe:none"), "train-bpe"), (["prepar"], "'prepare'"),
            ([], "--help"), (job("--outt=a"), "'outt'"), (job("--val_share=a"), "'a'"),
            (["download", "all"], "choose one of shakespeare, text8, gpt2"), (["train-bpe", "--vocab_size=9", "--out=a"], "vocab_size = 9"),
            (["train-bpe", "--out=a"], "--data_path")):
        assert data.main(argv) == 2, argv
        lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
        assert len(lines) == 1 and words in lines[0], (argv, lines)
    assert not (tmp_path / "out").exists()
    assert data.main(job()) == 0 and data.main(job()) == 0
    for change, words in ((["--val_share=0.2"], "was begun with"), (["--tokenizer=char"], "another vocabulary (byte) than was asked for (char)")):
        assert data.main(job(*change)) == 2 and words in capsys.readouterr().err
    os.utime(text_file, (1, 1))
    assert data.main(job()) == 2 and "a.txt has changed (name, size or time) since" in capsys.readouterr().err


def test_folders_that_are_not_prepared(tmp_path, text_file):
    (tmp_path / "nanogpt").mkdir()
    (tmp_path / "nanogpt/train.bin").write_bytes(b"\1\0" * 100)
    (tmp_path / "nanogpt/meta.pkl").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match="nanogpt has no meta.json: .*prepare.*nanoGPT's train.bin and val.bin are read by --data_bin"):
        data.TextSource(str(tmp_path / "nanogpt"), 16)
    (tmp_path / "nanogpt/meta.json").write_text("{}")
    with pytest.raises(ValueError, match="meta.json is not of `python data.py prepare`"):
        data.TextSource(str(tmp_path / "nanogpt"), 16)
    data.prepare(text_file, "byte", str(tmp_path / "out"), shard_tokens=1000)
    with pytest.raises(ValueError, match="out has another vocabulary .byte. than was asked for .char 'ab'."):
        data.TextSource(str(tmp_path / "out"), 16, data.Tokenizer("char", "ab"))
    with pytest.raises(ValueError, match="too few: .* seq_len=900"):
        data.TextSource(str(tmp_path / "out"), 900)
    shard = tmp_path / "out/train_000001.bin"
    good = shard.read_bytes()
    shard.write_bytes(b"\xff" * len(good))                           # a damaged disk: seen when it is read
    with pytest.raises(ValueError, match="token id 65535 at position 1.* is past the vocabulary of 256"):
        [data.TextSource(str(tmp_path / "out"), 16).train_rows(i, 64, 0, 64, 1) for i in range(9)]
    shard.write_bytes(good[:-2])
    with pytest.raises(ValueError, match="train_000001.bin holds 1998 bytes, not 1000 tokens of uint16"):
        data.TextSource(str(tmp_path / "out"), 16)


class Bomb:
    def __reduce__(self):
        return pytest.fail, ("a pickle was loaded",)


# ---- token files of others -----------------------------------------------------------------------------------------------

def modded(path, ids, magic=20240520, version=1, count=None):
    """The format of modded-nanogpt, by hand."""
    header = np.zeros(256, np.int32)
    header[:3] = magic, version, len(ids) if count is None else count
    path.write_bytes(header.tobytes() + np.asarray(ids, np.uint16).tobytes())
    return str(path)


def test_modded_nanogpt_files(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    ids = np.random.default_rng(0).integers(0, 50257, 5000)
    for i in range(3):
        modded(tmp_path / f"train_{i}.bin", ids[i * 1500:(i + 1) * 1500])
    modded(tmp_path / "val.bin", ids[4500:])
    source = data.TextSource("", 64, "", str(tmp_path / "train_*.bin"), str(tmp_path / "val.bin"), 50304)
    assert (len(source.train), len(source.val), source.tokenizer.kind) == (4500, 500, "gpt2") and np.isnan(source.chars_per_token)
    assert np.array_equal(source.train[np.arange(4500)], ids[:4500])
    x = source.train_rows(0, 200, 0, 200, 1)[0]
    assert all(any(np.array_equal(row, ids[k:k + 64]) for k in np.flatnonzero(ids == int(row[0]))) for row in x)
    one = data.TextSource("", 50, "gpt2", str(tmp_path / "val.bin"))             # the last tenth held out
    assert (len(one.train), len(one.val)) == (450, 50) and np.array_equal(one.eval_rows(1)[0][0], ids[-50:])
    bad = tmp_path / "bad.bin"
    for words, make in ((r"begins with \[7\], not with \[20240520\]", lambda: modded(bad, ids, magic=7)),
                        ("version 2 and 5000 tokens, expected version 1", lambda: modded(bad, ids, version=2)),
                        ("version 1 and 5001 tokens, expected version 1 and the 5000", lambda: modded(bad, ids, count=5001)),
                        (r"not a token file: it begins with \[\]", lambda: bad.write_bytes(b"")),
                        ("bad.bin: token id 60000 at position 17 is past the vocabulary of 50304: give",
                         lambda: modded(bad, [*ids[:17], 60000, *ids]))):
        make()
        with pytest.raises(ValueError, match=words) as e:
            data.TextSource("", 64, "", str(bad), "", 50304)
        assert "\n" not in str(e.value)
    modded(bad, ids, magic=20991231)
    with pytest.raises(ValueError, match="not a token file"):           # an unknown header is not taken for tokens
        data.TextSource("", 64, "gpt2", str(bad), "", 50304)
    with pytest.raises(FileNotFoundError):
        data.TextSource("", 64, "", str(tmp_path / "none_*.bin"))


def test_nanogpt_files(tmp_path, text_file):
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(Bomb()))
    letters = sorted(set(TEXT))
    ids = np.array([letters.index(c) for c in TEXT], np.uint16)
    cut = len(ids) * 9 // 10
    ids[:cut].tofile(tmp_path / "train.bin")
    ids[cut:].tofile(tmp_path / "val.bin")
    files = str(tmp_path / "train.bin"), str(tmp_path / "val.bin")
    source, plain = data.TextSource(text_file, 64, "char", *files), data.TextSource(text_file, 64, "char")
    assert torch.equal(source.train_rows(5, 9, 0, 9, 2)[0], plain.train_rows(5, 9, 0, 9, 2)[0])
    assert source.tokenizer.state() == plain.tokenizer.state() and source.chars_per_token == 1
    for path, tokenizer, words in (("", "char", "needs the text it was made from as --data_path.*meta.pkl is not read"),
                                   ("", "", "not a token file.*name their --tokenizer")):
        with pytest.raises(ValueError, match=words):
            data.TextSource(path, 64, tokenizer, *files)


# ---- commands and training -----------------------------------------------------------------------------------------------

def test_train_bpe_then_train_then_sample(run, tmp_path, text_file):
    data.train_bpe(text_file, 300, str(tmp_path / "b.json"))
    data.prepare(text_file, f"bpe:{tmp_path}/b.json", str(tmp_path / "folder"), val_share=0.2)
    small = dict(N_LAYER=1, N_EMBD=32, BATCH_SIZE=4, SEQ_LEN=16, MAX_ITERS=2, EVAL_ITERS=1, WKV_IMPL="torch", THREADS=1)
    assert "bits per char" in ok(run("train.py", DATA_PATH="folder", **small))
    (tmp_path / "b.json").unlink()                                   # the checkpoint holds the vocabulary
    assert "line" in ok(run("sample.py", "--prompt=line 5", "--length=5", "--num_samples=1", "--wkv_impl=torch"))
    done = run("train.py", "--init_from=resume", "--tokenizer=byte", DATA_PATH=text_file, WKV_IMPL="torch")
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1
    assert "the checkpoint has another vocabulary (bpe) than was asked for (byte)" in done.stderr
    modded(tmp_path / "t.bin", np.arange(3000) % 50257)
    shown = ok(run("train.py", DATA_BIN="t.bin", TIKTOKEN_CACHE_DIR=tmp_path, **small))
    assert "vocab_size = 50304   (default with data_bin)" in shown and "shown as numbers" in shown


def test_download_checks_what_it_got(tmp_path, monkeypatch, capsys):
    (tmp_path / "served").write_bytes(b"text " * 100)
    with zipfile.ZipFile(tmp_path / "served.zip", "w") as z:
        z.writestr("text", b"text " * 100)
    sha = lambda name: hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
    zipped = (tmp_path / "served.zip").stat().st_size
    rows = {"plain": (f"file://{tmp_path}/served", 500, sha("served"), 500),
            "zipped": (f"file://{tmp_path}/served.zip", zipped, sha("served.zip"), 500),
            "other": (f"file://{tmp_path}/served", 500, sha("served.zip"), 500),
            "longer": (f"file://{tmp_path}/served", 100, sha("served"), 500),
            "bomb": (f"file://{tmp_path}/served.zip", zipped, sha("served.zip"), 499),
            "offline": ("http://127.0.0.1:9/a.txt", 500, sha("served"), 500)}
    monkeypatch.setattr(data, "DOWNLOADS", rows)
    for name in ("plain", "zipped"):
        assert data.main(["download", name, f"--out={tmp_path}/{name}.txt"]) == 0
        assert (tmp_path / f"{name}.txt").read_bytes() == b"text " * 100
    for name, words in (("other", "500 bytes, not the 500 with the sha256 expected"),
                        ("longer", "500 bytes or more, not the 100 with"), ("bomb", "unpacks to 500 bytes, not 499"), ("offline", "cannot fetch http://127.0.0.1:9/a.txt")):
        assert data.main(["download", name, f"--out={tmp_path}/{name}.txt"]) == 2
        assert words in capsys.readouterr().err and not (tmp_path / f"{name}.txt").exists()


def test_task_rows_lengths_and_evaluation_set(text_file):
    source = sources(text_file)[1]
    x, answer, lengths, _ = source.eval_rows(50, 1234)
    assert x.shape[1] == lengths.max() < 64 and len(set(lengths.tolist())) > 5
    pad = source.tokenizer.ids["#"]
    for row, a, n in zip(x, answer, lengths.tolist()):
        assert (row[n:] == pad).all() and row[n - 1] != pad and not a[n:].any() and a[:n].any()
    assert all(torch.equal(a, b) for a, b in zip((x, answer, lengths), source.eval_rows(50, 1234)))


def test_side_by_side_marks_mask_and_errors():
    chars = data.Tokenizer("char", "abc\n")
    target, masked, pred = torch.tensor([0, 1, 3, 2]), torch.tensor([False, True, False, True]), torch.tensor([0, 2, 3, 2])
    assert data.side_by_side(chars, target, masked, pred).splitlines() == ["  IN a_⏎_", "  GT ab⏎c", "  PR ac⏎c", "      ^"]


def test_side_by_side_of_tokens_of_several_characters(world):
    target, pred = (torch.from_numpy(world.encode(s).astype(np.int64)) for s in ("The dog ran\n", "The horse ran\n"))
    masked = torch.tensor([False, True, False, False])
    assert data.side_by_side(world, target, masked, pred).splitlines() == [
        "  IN The_      ran⏎", "  GT The dog   ran⏎", "  PR The horse ran⏎", "        ^"]
