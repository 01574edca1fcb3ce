"""Text files and synthetic tasks to batches of token ids. B batch, T time, V vocabulary.

A source (TextSource, TaskSource) has a `tokenizer`, and gives rows of token ids with the positions that may be masked:
`train_rows` for one step, `eval_rows` for the held-out part. A row depends on nothing but the seed, the step and its place in
the global batch, so accumulation, several processes and a resumed run all see the same data.

    python data.py prepare --data_path=FILE_or_FOLDER --tokenizer=byte --out=FOLDER   much text to token files, in little memory
    python data.py train-bpe --data_path=FILE --vocab_size=4096 --out=FILE.json       a vocabulary for --tokenizer=bpe:FILE.json
    python data.py download shakespeare                                               or text8, or gpt2 (its vocabulary)
"""
import argparse
import ast
import codecs
import functools
import glob
import hashlib
import importlib.util
import inspect
import itertools
import json
import math
import os
import random
import re
import sys
import tempfile
import time
import urllib.request
import zipfile
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import tasks

# ---- tokenizers: a row of KINDS turns text into ids and back; Tokenizer is what the rest of the code sees ---------------


class Bytes:
    """UTF-8 bytes."""
    vocab_size, eot_id, state = 256, None, {}

    def __init__(self, alphabet="", file=""):
        pass

    def encode(self, text):
        return np.frombuffer(text.encode(), np.uint8)

    def encode_part(self, text):
        """The beginning of a longer text -> (ids that what follows cannot change, number of characters they stand for)."""
        return self.encode(text), len(text)

    def decode(self, ids):
        return bytes(ids).decode(errors="replace")


class Chars(Bytes):
    """One id a character of `alphabet`."""

    def __init__(self, alphabet="", file=""):
        self.alphabet, self.vocab_size = alphabet, len(alphabet)
        points = [ord(c) for c in alphabet]
        self.table = np.full(max(points, default=0) + 2, -1, np.int32)      # code point -> id; the last entry: no such character
        self.table[points] = np.arange(len(points))

    def encode(self, text):
        points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
        ids = self.table[np.minimum(points, len(self.table) - 1)]
        if len(ids) and ids.min() < 0:
            raise ValueError(f"character {min(set(text) - set(self.alphabet))!r} is not in the vocabulary of {self.vocab_size} "
                             "characters: leave it out, or train with --tokenizer=byte, which knows every character")
        return ids

    def decode(self, ids):
        return "".join(map(self.alphabet.__getitem__, ids))


class Words(Bytes):
    """What a pattern splits into words before bytes are merged. No word of the known patterns ends in a letter or digit and
    goes on with a space or line end, so that a text cut there gives the same ids as the whole."""

    def encode_part(self, text):
        cut = re.match(r"(?s).*[^\W_](?=[ \n])", text) or re.match(r"(?s).*\S(?=\s)", text)
        cut = cut.end() if cut else len(text)                               # no space in all of a piece: cut anywhere
        return self.merge(text[:cut]), cut

    def encode(self, text):
        ids, at = [], 0
        while len(text) - at > PIECE:                                       # the libraries take some 500 bytes a token
            part, n = self.encode_part(text[at:at + PIECE])
            ids, at = [*ids, part], at + n
        return np.concatenate([*ids, self.merge(text[at:])])


class GPT2(Words):
    """GPT-2's vocabulary by tiktoken, from tiktoken's own cache; read when first needed, since token files do without it."""
    vocab_size, eot_id, told = 50257, 50256, False
    FILES = {"vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",   # name -> sha256
             "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"}
    state = {"sha256": FILES["vocab.bpe"]}

    def __init__(self, alphabet="", file="", sha256=state["sha256"]):
        if sha256 != self.state["sha256"]:
            raise ValueError(f"the checkpoint's gpt2 vocabulary ({sha256[:12]}) is not tiktoken's ({self.state['sha256'][:12]}): "
                             "use the data and the program it was trained with")

    @functools.cached_property
    def found(self):
        """tiktoken would silently download what its cache lacks, or holds damaged: so look first."""
        cache = os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR", Path(tempfile.gettempdir(), "data-gym-cache")))
        url = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
        files = [(Path(cache, hashlib.sha1((url + name).encode()).hexdigest()), digest) for name, digest in self.FILES.items()]
        return cache != "" and all(f.is_file() and hashlib.sha256(f.read_bytes()).hexdigest() == digest for f, digest in files)

    @functools.cached_property
    def encoding(self):
        import tiktoken
        return tiktoken.get_encoding("gpt2")

    def merge(self, text):
        if not self.found:
            raise ValueError("the gpt2 vocabulary is not in tiktoken's cache: run `python data.py download gpt2` (with a network), or copy "
                             "the cache of another machine and set TIKTOKEN_CACHE_DIR to it, or choose another --tokenizer")
        return np.array(self.encoding.encode_ordinary(text), np.int32)

    def decode(self, ids):
        if self.found:
            return self.encoding.decode(ids)
        if not self.told:
            print("no gpt2 vocabulary in tiktoken's cache: tokens are shown as numbers; `python data.py download gpt2` gets it")
        self.told = True
        return "".join(f"<{i}>" for i in ids)


class World(Bytes):
    """RWKV World: greedy longest match over bytes, from the published vocabulary file; ids 0 (end of text) to 65535."""
    vocab_size, eot_id, longest = 65536, 0, 128
    NAME = "rwkv_vocab_v20230424.txt"

    def __init__(self, alphabet="", file="", sha256=""):
        package = importlib.util.find_spec("rwkv")
        places = [file] * bool(file) + [str(Path(p, self.NAME)) for p in (package.submodule_search_locations if package else ())]
        path = next(filter(os.path.isfile, places if sha256 or not file else [file]), None)     # a checkpoint's file may have moved
        if not path:
            raise ValueError(f"no RWKV vocabulary {file or self.NAME}: give it as --tokenizer=rwkv:FILE, or pip install rwkv, which has it")
        raw = Path(path).read_bytes()
        found = hashlib.sha256(raw).hexdigest()
        if sha256 and sha256 != found:
            raise ValueError(f"{path} ({found[:12]}) is not the checkpoint's RWKV vocabulary ({sha256[:12]}): give that one")
        self.state = {"file": os.path.abspath(file) if file else "", "sha256": found}
        self.words, self.trie = {}, {}                                      # id -> bytes; nested dicts byte -> node, id at key -1
        try:
            for line in raw.decode().strip().split("\n"):
                i, word, length = line[:line.index(" ")], line[line.index(" "):line.rindex(" ")], line[line.rindex(" "):]
                word = ast.literal_eval(word.strip())
                word = word.encode() if isinstance(word, str) else word
                if len(word) != int(length) or not 0 < len(word) <= self.longest or not 0 < int(i) < self.vocab_size:
                    raise ValueError(line)
                node = self.trie
                for byte in word:
                    node = node.setdefault(byte, {})
                node[-1] = int(i)
                self.words[int(i)] = word
        except (ValueError, SyntaxError, TypeError):
            raise ValueError(f"{path} is no RWKV vocabulary (line {len(self.words) + 1}): give {self.NAME}") from None
        if missing := [b for b in range(256) if -1 not in self.trie.get(b, {})]:
            raise ValueError(f"{path} is no complete RWKV vocabulary (no token for byte {missing[0]}): give {self.NAME}")

    def encode_bytes(self, raw):
        """Any bytes -> list of ids."""
        ids, at, end = [], 0, len(raw)
        while at < end:
            node, i = self.trie, at
            while i < end and (node := node.get(raw[i])) is not None:
                i += 1
                if -1 in node:
                    token, at = node[-1], i
            ids.append(token)
        return ids

    def encode(self, text):
        return np.array(self.encode_bytes(text.encode()), np.int32)

    def encode_part(self, text):
        """A token is certain once the longest one would still have fitted in."""
        raw = text.encode()
        ids = self.encode_bytes(raw)
        ends = np.cumsum([0] + [len(self.words[i]) for i in ids])
        n = int(np.searchsorted(ends, len(raw) - self.longest, side="right"))
        while n and ends[n] < len(raw) and raw[ends[n]] & 0xC0 == 0x80:     # not within a character
            n -= 1
        return np.array(ids[:n], np.int32), len(raw[:ends[n]].decode())

    def decode(self, ids):
        return b"".join(self.words.get(i, b"<|endoftext|>" if i == 0 else "\ufffd".encode()) for i in ids).decode(errors="replace")


class BPE(Words):
    """A JSON file of Hugging Face's tokenizers, such as train-bpe writes; checkpoints keep its text."""

    def __init__(self, alphabet="", file="", json=""):
        import tokenizers
        if not json and not file:
            raise ValueError("tokenizer='bpe' needs its file: write bpe:FILE.json; `python data.py train-bpe` makes one")
        try:
            json = json or Path(file).read_text(encoding="utf-8")
            self.bpe = tokenizers.Tokenizer.from_str(json)
        except OSError as e:
            raise ValueError(f"tokenizer='bpe:{file}': {e.strerror}; `python data.py train-bpe` makes one") from None
        except Exception as e:                                              # from_str raises plain Exception
            raise ValueError(f"{file or 'the vocabulary'} is no JSON file of the tokenizers library ({e})") from None
        self.bpe.no_truncation()
        self.bpe.no_padding()
        self.bpe.encode_special_tokens = True                               # <|endoftext|> in a text is text
        vocabulary, self.state = self.bpe.get_vocab(), {"json": json}
        self.vocab_size = max(vocabulary.values()) + 1
        self.eot_id = next((vocabulary[s] for s in ("<|endoftext|>", "</s>", "<eos>", "[SEP]") if s in vocabulary), None)

    def merge(self, text):
        return np.array(self.bpe.encode_batch_fast([text], add_special_tokens=False)[0].ids, np.int32)

    def decode(self, ids):
        return self.bpe.decode(ids, skip_special_tokens=False)


KINDS = {"byte": Bytes, "char": Chars, "gpt2": GPT2, "rwkv": World, "bpe": BPE}


class Tokenizer:
    """Text <-> ids. kind: a row of KINDS, or rwkv:FILE or bpe:FILE; `alphabet`: the characters of `char`, in order.

    encode(str) -> 1-D array of ids, or ValueError; vocab_size; eot_id, the id of end of text or None; state(), of str only, is
    what a checkpoint keeps: Tokenizer(**state) is the same one, or a ValueError says why it cannot be.
    """

    def __init__(self, kind, alphabet="", file="", **state):
        self.kind, colon, given = kind.partition(":")
        if self.kind not in KINDS or colon and self.kind not in ("rwkv", "bpe"):
            raise ValueError(f"tokenizer={kind!r} is unknown: choose one of {', '.join(KINDS)} (also rwkv:FILE, bpe:FILE)")
        self.alphabet, self.codec = alphabet, KINDS[self.kind](alphabet, given or file, **state)
        self.ids = {c: i for i, c in enumerate(alphabet)}
        self.vocab_size, self.eot_id, self.encode = self.codec.vocab_size, self.codec.eot_id, self.codec.encode

    def decode(self, ids):
        """Ids (a mask id, or any past the vocabulary, shows as _) -> str."""
        runs = itertools.groupby(map(int, ids), lambda i: i < self.vocab_size)
        return "".join(self.codec.decode(list(run)) if known else "_" * len(list(run)) for known, run in runs)

    def characters(self, ids):
        """Ids -> what each shows as, one printable character for byte and char (line ends as ⏎)."""
        return [self.decode([i]).replace("\n", "⏎") for i in ids]

    def state(self):
        return {"kind": self.kind, "alphabet": self.alphabet, **self.codec.state}


def same_vocabulary(a, b):
    """Whether two states give the same ids, wherever their vocabulary files lie."""
    return {**a, "file": ""} == {**b, "file": ""}


def agreed(asked, state, owner):
    """The tokenizer of `state`, which `owner` (a checkpoint, a folder) goes by. ValueError if `asked`, a Tokenizer or a setting, is
    another one; "" asks for nothing, `char` for the alphabet that there is."""
    if isinstance(asked, str):
        kind, _, file = asked.partition(":")
        if kind in ("", state["kind"]) and not (kind == "bpe" and file):
            return Tokenizer(**state | ({"file": file} if file else {}))
        asked = Tokenizer(asked)
    if not same_vocabulary(asked.state(), state):
        have, want = (f"{kind} {letters!r}" if letters else kind for kind, letters in (
            (state["kind"], state["alphabet"]), (asked.kind, asked.alphabet)))
        raise ValueError(f"{owner} has another vocabulary ({have}) than was asked for ({want}): leave --tokenizer out, or use data and "
                         "a checkpoint that go together")
    return asked


# ---- sources ------------------------------------------------------------------------------------------------------------


def read_text(path):
    """A UTF-8 file, or with no path the source text of Python's own standard library, which every machine has -> (name, str)."""
    if not path:
        found, total = [], 0
        for f in sorted(Path(os.__file__).parent.glob("*.py")):
            if total < 2_000_000:
                found.append(f.read_text(encoding="utf-8", errors="replace"))
                total += len(found[-1])
        return "standard library", "".join(found)
    try:
        with open(path, encoding="utf-8") as f:
            return str(path), f.read()
    except UnicodeDecodeError as e:
        raise ValueError(f"{path} is not UTF-8 text (byte {e.start}): give a plain text file") from None


def alphabet(*texts):
    """The characters of all texts, in order: what a char tokenizer is made from."""
    return "".join(sorted(set().union(*texts)))


class Tokens:
    """Arrays of ids (np.memmap of files) read as one: at (n,T) int64 positions -> (n,T) int64 ids, all below V."""

    def __init__(self, parts, V):
        self.parts, self.V = parts, V
        self.ends = np.cumsum([0] + [len(p) for p in parts])

    def __len__(self):
        return int(self.ends[-1])

    def cut(self, lo, hi):
        return Tokens([p[max(lo - a, 0):max(hi - a, 0)] for p, a in zip(self.parts, self.ends)], self.V)

    def __getitem__(self, at):
        at = np.asarray(at)
        part, ids = np.searchsorted(self.ends, at, side="right") - 1, np.empty(at.shape, np.int64)
        for i in np.unique(part):
            here = part == i
            ids[here] = self.parts[i][at[here] - self.ends[i]]
        if ids.size and ids.max() >= self.V:
            raise past_vocabulary("the data", ids.max(), at.flat[ids.argmax()], self.V)
        return torch.from_numpy(ids)


def past_vocabulary(name, value, position, V):
    return ValueError(f"{name}: token id {value} at position {position} is past the vocabulary of {V}: give the tokenizer that the file "
                      "was made with, or a larger --vocab_size")


MAGIC, VERSION = 20240520, 1                                                # the header of modded-nanogpt's .bin files


def read_bins(pattern, V, raw):
    """Token files by name or pattern -> Tokens. modded-nanogpt: int32[256] header (magic, version, count, zeros), then uint16 ids;
    with `raw` also bare uint16 ids, as nanoGPT writes them. ValueError for another header, a cut file, an id not below V."""
    parts, files = [], sorted(glob.glob(pattern)) or [pattern]
    for f in files:
        size, head = os.path.getsize(f), np.fromfile(f, "<i4", 256)
        modded = len(head) == 256 and head[0] == MAGIC
        if modded:
            if head[1] != VERSION or size != 1024 + 2 * int(head[2]):
                raise ValueError(f"{f}: the header says version {head[1]} and {head[2]} tokens, expected version {VERSION} and the "
                                 f"{(size - 1024) / 2:g} that the file holds: copy it again")
        elif not raw or len(head) == 256 and not head[3:].any() or size % 2 or not size:
            raise ValueError(f"{f} is no token file: it begins with {head[:1]}, not with [{MAGIC}] as modded-nanogpt's; for bare "
                             "uint16 ids, as nanoGPT writes them, name their --tokenizer; for text use --data_path")
        parts.append(np.memmap(f, "<u2", "r", offset=1024 if modded else 0))
        for at in range(0, len(parts[-1]), 1 << 24):                        # in pieces: a file may be larger than memory
            piece = parts[-1][at:at + (1 << 24)]
            if piece.max() >= V:
                raise past_vocabulary(f, piece.max(), at + int(piece.argmax()), V)
    return Tokens(parts, V)


def open_bins(data_bin, data_val_bin, path, tokenizer, vocab_size):
    """-> name, tokenizer, train, val (the last tenth without data_val_bin), [characters, bytes] of a token (nan: no vocabulary)."""
    raw = bool(tokenizer)
    if tokenizer == "char":                                                 # nanoGPT's ids: the sorted characters of its text
        if not path:
            raise ValueError(f"{data_bin}: --tokenizer=char needs the text it was made from as --data_path, for its alphabet (meta.pkl is "
                             "not read: unpickling a file may run anything)")
        tokenizer = Tokenizer("char", alphabet(read_text(path)[1]))
    if isinstance(tokenizer, str):
        tokenizer = Tokenizer(tokenizer or "gpt2")
    V = max(tokenizer.vocab_size, vocab_size)
    train = read_bins(data_bin, V, raw)
    cut = len(train) * 9 // 10
    train, val = (train, read_bins(data_val_bin, V, raw)) if data_val_bin else (train.cut(0, cut), train.cut(cut, len(train)))
    shown = val[np.arange(min(len(val), 1 << 16))].tolist() if getattr(tokenizer.codec, "found", True) else []
    text = tokenizer.decode(i for i in shown if i < tokenizer.vocab_size)
    return data_bin, tokenizer, train, val, [len(text) / len(shown), len(text.encode()) / len(shown)] if len(shown) else [math.nan] * 2


def open_prepared(folder, tokenizer):
    """A folder of `python data.py prepare` -> what open_bins returns."""
    file = Path(folder, "meta.json")
    if not file.is_file():
        nanogpt = "; nanoGPT's train.bin and val.bin are read by --data_bin and --data_val_bin" * Path(folder, "train.bin").is_file()
        raise ValueError(f"{folder} has no meta.json: give the folder that `python data.py prepare` wrote{nanogpt}")
    meta = json.loads(file.read_text())
    if not {"tokenizer", "done", *SPLITS} <= meta.keys():
        raise ValueError(f"{file} is not of `python data.py prepare`: prepare the text anew, into another folder")
    if not meta["done"]:
        raise ValueError(f"{folder} is not finished: start `python data.py prepare` once more, it goes on where it was stopped")
    tokenizer, parts = agreed(tokenizer, meta["tokenizer"], folder), {}
    for split in SPLITS:
        for name, n in meta[split]["shards"]:
            if (size := os.path.getsize(Path(folder, name))) != n * np.dtype(meta["dtype"]).itemsize:
                raise ValueError(f"{folder}/{name} holds {size} bytes, not {n} tokens of {meta['dtype']}: prepare the folder again")
        shards = [np.memmap(Path(folder, name), meta["dtype"], "r") for name, _ in meta[split]["shards"]]
        parts[split] = Tokens(shards, tokenizer.vocab_size)
    last = meta["val"] if meta["val"]["tokens"] else meta["train"]
    return folder, tokenizer, parts["train"], parts["val"], [last["chars"] / last["tokens"], last["bytes"] / last["tokens"]]


def open_text(path, tokenizer):
    """A text in memory, its last tenth held out -> what open_bins returns."""
    name, text = read_text(path)
    if isinstance(tokenizer, str):
        tokenizer = Tokenizer(tokenizer or "byte", alphabet(text) if tokenizer == "char" else "")
    ids = torch.from_numpy(tokenizer.encode(text).astype(np.int32))
    cut, n = len(ids) * 9 // 10, max(1, len(ids))
    return name, tokenizer, ids[:cut], ids[cut:], [len(text) / n, len(text.encode()) / n]


class TextSource:
    """Text: a file in memory, a folder of `python data.py prepare`, or data_bin and data_val_bin, token files of others (read_bins).
    Rows are random windows of T tokens, any of which may be masked. tokenizer: a Tokenizer, a setting, or "" for what fits."""
    objective = "masked_mean"

    def __init__(self, path, T, tokenizer="", data_bin="", data_val_bin="", vocab_size=0):
        self.T = T
        self.name, self.tokenizer, self.train, self.val, per_token = (
            open_bins(data_bin, data_val_bin, path, tokenizer, vocab_size) if data_bin else
            open_prepared(path, tokenizer) if path and os.path.isdir(path) else open_text(path, tokenizer))
        self.chars_per_token, self.bytes_per_token = per_token
        if min(len(self.train), len(self.val)) < T:
            n = len(self.train) + len(self.val)
            raise ValueError(f"{self.name} holds {n} tokens, too few: the held-out part ({len(self.val)}) must hold seq_len={T}; "
                             f"give a text of at least {10 * T} tokens, or a smaller --seq_len")

    def train_rows(self, step, B, lo, hi, seed):
        """Rows lo..hi of the global batch of B -> ids (hi-lo, T) int64, maskable (hi-lo, T) bool, no lengths: all are full."""
        start = torch.randint(len(self.train) - self.T + 1, (B,), generator=generator(seed, step, 1))[lo:hi]
        return self.windows(self.train, start)

    def eval_rows(self, n, seed=None):
        """n windows spread evenly over the held-out part: always the same."""
        return self.windows(self.val, torch.linspace(0, len(self.val) - self.T, n).long())

    def windows(self, ids, start):
        x = ids[start[:, None] + torch.arange(self.T)].long()
        return x, torch.ones_like(x, dtype=torch.bool), None


class TaskSource:
    """A synthetic task of tasks.TASKS: only the answer may be masked. `params`: the task's, as tasks.params gives them.

    Rows are padded with # to T. The padding is told by `lengths`, not by its token, and the network passes it over; with `trim`,
    columns that are padding in every row are cut off, since they can change nothing. lengths is None where all rows are full.
    """
    objective = "task"

    def __init__(self, name, params, T, trim=True):
        tasks.check(name, params, T)
        self.name, self.params, self.T, self.trim = name, params, T, trim
        self.tokenizer = Tokenizer("char", tasks.alphabet(name, params))

    def train_rows(self, step, B, lo, hi, seed):
        """Rows lo..hi of the global batch of B -> ids (hi-lo, T) int64, maskable (hi-lo, T) bool, lengths (hi-lo,) or None."""
        return self.draw([random.Random((seed << 64) + step * B + i) for i in range(lo, hi)], "train")

    def eval_rows(self, n, seed):
        """n rows from one stream, as the published runs draw them: with the same seed always the same rows."""
        return self.draw([random.Random(seed)] * n, "eval")

    def draw(self, rngs, split):
        ids, answer = map(torch.from_numpy, tasks.sample_batch(self.name, self.params, self.T, rngs, split))
        real = ids != self.tokenizer.ids["#"]                       # no row ends in a # of its own
        lengths = (real * torch.arange(1, self.T + 1)).max(1).values
        longest = int(lengths.max()) if self.trim else self.T
        return ids[:, :longest], answer[:, :longest], lengths if lengths.min() < longest else None


def generator(seed, step, stream):
    """An independent random stream for each (seed, step, stream)."""
    state = np.random.SeedSequence([seed, step, stream]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


def make_batches(source, noise, stratified, B, device_bsz, seed, start=0, rank=0, world=1, channels=0):
    """Endless: for each step from `start`, this process's micro-batches, a list of (x, masked, weight, lengths, eps), and the
    denominator of its loss. Noise is drawn for the whole global batch of B rows, of which rank takes its share.

    noise: (step, maskable, t, uniform noise) -> masked, weight, denominator, as a row of diffusion.OBJECTIVES has it; stratified:
    diffusion.stratified. lengths is None where all rows are full. eps: (B,T,channels) normal noise, None without channels.
    """
    lo, hi = rank * B // world, (rank + 1) * B // world
    for step in itertools.count(start):
        x, maskable, lengths = source.train_rows(step, B, lo, hi, seed)
        g = generator(seed, step, 0)
        t, u = stratified(B, g)[lo:hi], torch.rand(B, source.T, generator=g)[lo:hi, :x.shape[1]]
        masked, weight, denominator = noise(step, maskable, t, u)
        weight = torch.as_tensor(weight).expand(masked.shape)
        eps = torch.randn(B, source.T, channels, generator=g)[lo:hi, :x.shape[1]] if channels else None
        yield list(split(device_bsz, x, masked, weight, lengths, eps)), denominator


def split(n, *tensors):
    """Micro-batches of n rows of tensors that belong together; None stays None."""
    return zip(*(itertools.repeat(None) if z is None else z.split(n) for z in tensors))


def side_by_side(tokenizer, target, masked, pred, width=10**6):
    """IN, GT and PR of one row, `width` characters around its mask, and ^ under what is wrong. All (T,)."""
    first = int(masked.nonzero()[0]) if masked.any() else 0
    start = max(0, min(first - width // 4, len(target) - width))
    hidden, here = target.masked_fill(masked, tokenizer.vocab_size), slice(start, start + width)
    rows = [tokenizer.characters(ids[here]) for ids in (hidden, target, pred)] + [[" ^"[int(w)] for w in (pred != target)[here]]]
    wide = [max(map(len, column)) for column in zip(*rows)]                 # a token of several characters takes a wide column
    lines = [name + "".join(c.ljust(w) for c, w in zip(row, wide)) for name, row in zip(("  IN ", "  GT ", "  PR ", "     "), rows)]
    return "\n".join(lines[:3] + [lines[3].rstrip()] * bool(lines[3].strip()))


# ---- commands -----------------------------------------------------------------------------------------------------------

SPLITS, PIECE = ("train", "val"), 1 << 18                                   # PIECE: bytes of text in memory at a time


def text_files(data_path):
    """A file, or the .txt files below a folder, in order -> [[path, size, time]], which tells whether any of them changed."""
    if not data_path:
        raise ValueError("--data_path is missing: give a text file, or a folder with .txt files")
    files = sorted(map(str, Path(data_path).rglob("*.txt"))) if os.path.isdir(data_path) else [str(data_path)]
    found = [[f, os.stat(f).st_size, os.stat(f).st_mtime_ns] for f in files]
    if not any(size for _, size, _ in found):
        raise ValueError(f"{data_path} holds no text: give a text file that is not empty, or a folder with .txt files")
    return found


def pieces(path, begin, end, tokenizer=None):
    """Bytes begin..end of a UTF-8 file, PIECE at a time -> (offset, bytes, text), or with a tokenizer (offset, bytes, ids, characters).
    The ids are those of the whole text: a piece ends where what follows cannot change them."""
    with open(path, "rb") as f:
        while begin < end:
            f.seek(begin)
            raw = f.read(min(PIECE, end - begin))
            last = begin + len(raw) >= end
            try:
                text, n = codecs.utf_8_decode(raw, "strict", last)
            except UnicodeDecodeError as e:
                raise ValueError(f"{path} is not UTF-8 text (byte {begin + e.start}): give a plain text file") from None
            if not raw:
                raise ValueError(f"{path} ended at byte {begin} of {end}: it must not change while it is read")
            if not tokenizer:
                yield begin, n, text
            else:
                ids, used = (tokenizer.encode(text), len(text)) if last else tokenizer.codec.encode_part(text)
                n = n if used == len(text) else len(text[:used].encode())
                yield begin, n, ids, used
            begin += n


def read_all(found, what):
    """The text of every piece of the files, with a progress bar."""
    with tqdm(total=sum(size for _, size, _ in found), unit="B", unit_scale=True, desc=what) as bar:
        for f, size, _ in found:
            for _, n, text in pieces(f, 0, size):
                yield text
                bar.update(n)


def regions(found, val_share):
    """[path, size, time] of each file -> {split: [(path, begin, end)]}: the last val_share of all bytes is held out."""
    at, cut, out = 0, int(sum(size for _, size, _ in found) * (1 - val_share)), {split: [] for split in SPLITS}
    for path, size, _ in found:
        here = min(max(cut - at, 0), size)
        with open(path, "rb") as f:
            f.seek(here)
            here += next((i for i, byte in enumerate(f.read(4)) if byte & 0xC0 != 0x80), 0)      # not within a character
        out["train"] += [(path, 0, here)] * (here > 0)
        out["val"] += [(path, here, size)] * (here < size)
        at += size
    return out


def replace_file(path, content):
    """Write all or nothing: killed at any moment, the old file is there or the new one."""
    with open(f"{path}.tmp", "wb") as f:
        f.write(content)
        f.flush()
        os.fsync(f.fileno())
    os.replace(f"{path}.tmp", path)


def prepare(data_path="", tokenizer="", out="", val_share=0.1, shard_tokens=100_000_000):
    """Text of any size -> folder `out` of token shards and meta.json, in bounded memory. Stopped, it goes on from its last shard.

    tokenizer: byte (the default), char, gpt2, rwkv, rwkv:FILE or bpe:FILE. The bytes of the text are taken
    as they are. After each file of a folder comes the end of text, if the tokenizer has one.
    """
    if not out or not 0 <= val_share < 1 or shard_tokens < 1:
        raise ValueError(f"out={out!r}, val_share={val_share}, shard_tokens={shard_tokens}: give the folder to write as --out, a share "
                         "from 0 up to 1, and at least 1 token a shard")
    found = text_files(data_path)
    file, settings = Path(out, "meta.json"), dict(val_share=val_share, shard_tokens=shard_tokens)
    if file.exists():
        meta = json.loads(file.read_text())
        if meta["source"] != found:
            raise ValueError(f"{data_path} has changed (name, size or time) since {out} was begun from it: delete {out}, or give "
                             "another --out")
        if meta["settings"] != settings:
            raise ValueError(f"{out} was begun with {meta['settings']}, not {settings}: use those, delete {out}, or give another --out")
        tok = agreed(tokenizer, meta["tokenizer"], out)
    else:
        tok = Tokenizer(tokenizer or "byte")
        if tok.kind == "char":
            tok = Tokenizer("char", alphabet(*map(set, read_all(found, "alphabet"))))
        tok.encode("")                                                      # a vocabulary that is not there is an error before the work
        meta = {split: dict(shards=[], tokens=0, chars=0, bytes=0, at=[0, 0, 0]) for split in SPLITS}
        meta.update(tokenizer=tok.state(), dtype="uint16" if tok.vocab_size <= 1 << 16 else "uint32", settings=settings, source=found,
                    done=False)
        os.makedirs(out, exist_ok=True)
    save = lambda: replace_file(file, json.dumps(meta).encode())
    save()
    begun, before = time.perf_counter(), sum(meta[split]["tokens"] for split in SPLITS)
    with tqdm(total=sum(size for _, size, _ in found), unit="B", unit_scale=True, desc=f"{tok.kind} tokens") as bar:
        for split, parts in regions(found, val_share).items():
            write_split(out, split, parts, tok, meta, len(found) > 1, save, bar)
    if text_files(data_path) != found:
        raise ValueError(f"{data_path} changed while it was read: delete {out} and start again")
    meta["done"] = True
    save()
    n, seconds = sum(meta[split]["tokens"] for split in SPLITS), time.perf_counter() - begun
    print(f"{out}: {meta['train']['tokens']:,} training and {meta['val']['tokens']:,} held-out tokens in {meta['dtype']}, vocabulary "
          f"{tok.vocab_size:,}, {(n - before) / seconds:,.0f} tokens/s; try: python train.py --data_path={out}")


def write_split(out, split, parts, tok, meta, several, save, bar):
    """The shards of one split, from mine["at"] = [region, offset of a piece, tokens of it already written] on."""
    mine, full, tmp, shard = meta[split], meta["settings"]["shard_tokens"], Path(out, "shard.tmp"), None
    first, offset, skip = mine["at"]

    def finish(at):
        shard.flush()
        os.fsync(shard.fileno())
        n = shard.tell() // np.dtype(meta["dtype"]).itemsize
        shard.close()
        name = f"{split}_{len(mine['shards']):06d}.bin"
        os.replace(tmp, Path(out, name))
        mine.update(shards=mine["shards"] + [[name, n]], tokens=mine["tokens"] + n, at=at)
        save()

    mine["bytes"] = sum(end - begin for _, begin, end in parts)
    bar.update(sum(end - begin for _, begin, end in parts[:first]))
    for i, (path, begin, end) in list(enumerate(parts))[first:]:
        bar.update(max(0, offset - begin))
        for at, n, ids, chars in pieces(path, offset or begin, end, tok):
            if several and tok.eot_id is not None and at + n == os.path.getsize(path):
                ids = np.append(ids, tok.eot_id)
            while skip < len(ids):
                if not shard or shard.closed:
                    shard, room = open(tmp, "wb"), full
                some = ids[skip:skip + room].astype(meta["dtype"])
                shard.write(some.tobytes())
                skip, room = skip + len(some), room - len(some)
                if not room:
                    finish([i, at, skip])                                   # mine["chars"] are those before this piece, as a rerun needs
            mine["chars"] += chars
            bar.update(n)
            skip = 0
        offset = 0
    if shard and not shard.closed:
        finish([len(parts), 0, 0])
    mine["at"] = [len(parts), 0, 0]
    save()


def train_bpe(data_path="", vocab_size=4096, out=""):
    """Byte-level BPE (any text comes back as it was), trained by the tokenizers library; <|endoftext|> is id 0."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers
    if vocab_size < 257 or not out:
        raise ValueError(f"vocab_size={vocab_size}, out={out!r}: give at least 257 (the bytes and the end of text), and the file to "
                         "write as --out")
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bpe.train_from_iterator(read_all(text_files(data_path), "words"), trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    replace_file(out, bpe.to_str().encode())
    print(f"{out}: {bpe.get_vocab_size()} tokens; try: python train.py --data_path={data_path} --tokenizer=bpe:{out}")


DOWNLOADS = {   # name -> address, hash and size of the text
    "shakespeare": ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
                    "sha256", "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed", 1_115_394),
    "text8": ("http://mattmahoney.net/dc/text8.zip", "md5", "3bea1919949baf155f99411df5fada7e", 100_000_000)}


def download(name, out=""):
    """Fetch a text, check it, and write it to `out` (NAME.txt); or gpt2, the vocabulary, to tiktoken's cache."""
    if name == "gpt2":
        try:
            return print(f"gpt2: {GPT2().encoding.n_vocab} tokens, in tiktoken's cache")
        except Exception as e:                                              # whatever its HTTP library raises
            raise ValueError(f"cannot fetch the gpt2 vocabulary ({type(e).__name__}): is there a network?") from None
    if name not in DOWNLOADS:
        raise ValueError(f"download {name!r} is unknown: choose one of {', '.join([*DOWNLOADS, 'gpt2'])}")
    address, kind, digest, size = DOWNLOADS[name]
    out = out or f"{name}.txt"
    try:
        with urllib.request.urlopen(address, timeout=30) as r, open(f"{out}.tmp", "wb") as f, tqdm(
                total=int(r.headers.get("Content-Length") or 0), unit="B", unit_scale=True, desc=name) as bar:
            while block := r.read(1 << 16):
                f.write(block)
                bar.update(len(block))
    except OSError as e:
        raise ValueError(f"cannot fetch {address} ({getattr(e, 'reason', e)}): is there a network? Or fetch it elsewhere") from None
    raw = Path(f"{out}.tmp").read_bytes()
    if zipfile.is_zipfile(f"{out}.tmp"):
        with zipfile.ZipFile(f"{out}.tmp") as z:
            raw = z.read(z.namelist()[0])
    if len(raw) != size or hashlib.new(kind, raw).hexdigest() != digest:
        raise ValueError(f"{address} gave {len(raw)} bytes, not the {size} with the {kind} expected: see {out}.tmp, and try again later")
    replace_file(out, raw)
    print(f"{out}: {size:,} bytes, {kind} as expected; try: python train.py --data_path={out}")


COMMANDS = {"prepare": prepare, "train-bpe": train_bpe, "download": download}


class OneLine(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(f"{message}; see `python {self.prog} --help`")


def main(argv):
    """A command line -> exit code: 0, or 2 after one line for what a user can cause."""
    parser = OneLine("data.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    rows = parser.add_subparsers(dest="command", required=True, metavar="{" + ",".join(COMMANDS) + "}", parser_class=OneLine)
    for name, call in COMMANDS.items():
        row = rows.add_parser(name, help=call.__doc__.splitlines()[0], description=call.__doc__, allow_abbrev=False)
        for p in inspect.signature(call).parameters.values():
            if p.default is p.empty:
                row.add_argument(p.name)
            else:
                names = dict.fromkeys((f"--{p.name}", f"--{p.name.replace('_', '-')}"))
                row.add_argument(*names, type=type(p.default), default=p.default, help=f"default {p.default!r}")
    try:
        options = vars(parser.parse_args(argv))
        COMMANDS[options.pop("command")](**options)
    except (ValueError, OSError) as e:
        known = isinstance(e, OSError) and e.filename and e.strerror
        print("error:", f"{e.filename}: {e.strerror}" if known else " ".join(str(e).split()), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
