"""Texts and synthetic tasks to batches of token ids. B batch, T time, V vocabulary, D numbers in a latent.

A source (TextSource, ChatSource for dialogues, TaskSource, PairSource for texts with latents) has a
`tokenizer` and two methods:
train_rows(step, B, lo, hi, seed), rows lo..hi of the global batch of B, and eval_rows(n, seed), rows of the
held-out part. Both give ids (n,T) int64, which of them may be masked (n,T) bool, lengths (n,) or None where
all rows are full, and of a PairSource latents (n,D). A row depends on nothing but the seed, the step and its
place in the global batch, so accumulation, several processes and a resumed run all see the same data.

    python data.py prepare --data_path=TEXT --tokenizer=byte --out=FOLDER   files, any size, to token files
    python data.py train-bpe --data_path=TEXT --vocab_size=4096 --out=X.json    for --tokenizer=bpe:X.json
    python data.py latents --data_path=TEXT --out=FOLDER           texts with 32 latents each, without a model
    python data.py project --data_path=FOLDER --out=FOLDER2        an embedder's 1024 dimensions to 32 latents
    python data.py tokenize --data_path=FOLDER2 --tokenizer=byte   their tokens
    python data.py download shakespeare                            or text8, or gpt2 (its vocabulary)"""
from configurator import script

if __name__ == "__main__":
    script()
import ast
import codecs
import functools
import glob
import gzip
import hashlib
import importlib.util
import inspect
import io
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
import zlib
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple, Optional

import numpy as np
import torch
from tqdm import tqdm

import tasks
from configurator import (SettingError, UserError, configure, nearest, one_line_errors, reading, replace_file,
                          short, written)

SPLITS = ("train", "val")           # of a prepared text
PAIRS = ("train", "validation")     # of texts with latents
PIECE = 1 << 18                     # bytes of text that are tokenized at a time
SHARD = 4096                        # texts with latents in a token file, and in memory at a time

# ---- sources -----------------------------------------------------------------------------------------------

class Rows(NamedTuple):
    """B rows of T tokens as sources give them; None where there is no such thing."""
    x: torch.Tensor                         # (B,T) int64 ids
    maskable: torch.Tensor                  # (B,T) bool
    lengths: Optional[torch.Tensor] = None  # (B,) real tokens, None where all rows are full
    z: Optional[torch.Tensor] = None        # (B,D) latents, rows of zeros for none

    def to(self, device):
        return Rows(*(part if part is None else part.to(device) for part in self))

def drawn(size, step, B, lo, hi, seed):
    """Which of `size` rows are lo..hi of a step's global batch of B: random numbers (hi-lo,)."""
    return torch.randint(size, (B,), generator=generator(seed, step, 1))[lo:hi]

def evenly(size, n):
    """n of `size` rows, spread evenly, all if there are fewer: numbers."""
    n = min(n, size)
    return torch.arange(n) * (size - 1) // max(1, n - 1)

class TextSource:
    """Text: a file in memory, a folder of `python data.py prepare`, or token files of others, data_bin and
    data_val_bin (read_bins). Rows are random windows of T tokens, any of which may be masked. tokenizer: a
    Tokenizer, a setting, or "" for what fits."""
    kind, objective, latent_dim, projection = "text", "masked_mean", 0, None

    def __init__(self, path, T, tokenizer="", data_bin="", data_val_bin="", vocab_size=0):
        if data_bin:
            opened = open_bins(data_bin, data_val_bin, path, tokenizer, vocab_size)
        elif path and os.path.isdir(path):
            opened = open_prepared(path, tokenizer)
        else:
            opened = open_text(path, tokenizer)
        self.T = T
        self.name, self.tokenizer, self.train, self.val, (self.chars_per_token, self.bytes_per_token) = opened
        if min(len(self.train), len(self.val)) < T:
            n = len(self.train) + len(self.val)
            raise ValueError(f"{self.name} holds {n} tokens, too few: the held-out part ({len(self.val)}) "
                             f"must hold seq_len={T}; give a text of at least {10 * T} tokens, or a smaller "
                             "--seq_len")

    def train_rows(self, step, B, lo, hi, seed):
        return self.windows(self.train, drawn(len(self.train) - self.T + 1, step, B, lo, hi, seed))

    def eval_rows(self, n, seed=None):
        """n windows spread evenly over the held-out part, each another (fewer, if it has fewer)."""
        return self.windows(self.val, evenly(len(self.val) - self.T + 1, n))

    def windows(self, ids, start):
        x = ids[start[:, None] + torch.arange(self.T)].long()
        return Rows(x, torch.ones_like(x, dtype=torch.bool))

    def disjoint(self):
        """So many rows of the held-out part share no token."""
        return len(self.val) // self.T

    def report(self, batches, title="bound"):
        """Bounds, an iterable of (rows,) nats per token -> val_loss, their mean, bits per character, byte and
        token with standard errors: None where too few windows are disjoint to tell."""
        bar = tqdm(batches, title, leave=False, disable=None, unit="batch")
        batches = [nats.double().cpu() for nats in bar]
        nats, means = torch.cat(batches).mean().item(), torch.stack([b.mean() for b in batches])
        rows, disjoint = sum(map(len, batches)), self.disjoint()
        se = None
        if min(disjoint, rows) >= 8 and len(means) > 1:    # mask counts are stratified over a batch
            se = means.std().item() / len(means) ** 0.5
        elif min(disjoint, rows) >= 8:
            se = batches[0].std().item() / rows ** 0.5
        found = {"val_loss": nats, "windows": rows, "disjoint": min(disjoint, rows)}
        units = {"char": self.chars_per_token, "byte": self.bytes_per_token, "token": 1}
        for unit, per_token in units.items():
            if not math.isnan(per_token):          # token files without a vocabulary do not say
                bits = 1 / math.log(2) / per_token
                found[f"bits_per_{unit}"] = nats * bits
                found[f"bits_per_{unit}_se"] = None if se is None else se * bits
        return found

class ChatSource(TextSource):
    """Dialogues and texts of a .jsonl file, see `turns`, each a row: what is given is never masked, responses
    are learned, and once the end of the text. After it, up to the end of a block, stand masks that nobody
    asks about, -1 here: where a text ends is not told by its masks. Of rows longer than T tokens the oldest
    go first. The last tenth is held out. tokenizer: as for TextSource; it must have an end of text."""
    kind = "chat"

    def __init__(self, path, T, tokenizer="", block=32):
        self.name, self.T, self.block, self.cut = str(path), T, block, 0
        self.tokenizer = Tokenizer(tokenizer or "byte") if isinstance(tokenizer, str) else tokenizer
        if self.tokenizer.eot_id is None:
            raise ValueError(f"tokenizer={self.tokenizer.kind} has no end of text, which dialogues need: "
                             "choose rwkv or gpt2, or make one with python data.py train-bpe")
        lines = ((i, line) for i, line in enumerate(lines_of(path), 1) if line.strip())
        rows = [self.row(record(path, line, f"line {i}", use=turns)) for i, line in lines]
        if len(rows) < 2:
            raise ValueError(f"{path} holds {len(rows)} dialogues: give at least 2, a tenth is held out")
        if self.cut:
            print(f"{path}: {self.cut} of {len(rows)} dialogues, longer than seq_len={T}, were cut")
        held_out = max(1, len(rows) // 10)
        self.train, self.val = rows[:-held_out], rows[-held_out:]
        found = np.concatenate([ids[learned] for ids, learned in self.val])
        found = found[found != self.tokenizer.eot_id].tolist()
        self.chars_per_token, self.bytes_per_token = per_token(self.tokenizer, found)

    def row(self, parts):
        """[(text, learned)] -> ids (n,) int64, which are learned (n,)."""
        ids, learned = [], []
        for mine, run in itertools.groupby(parts, lambda part: part[1]):
            ids += self.tokenizer.encode("".join(text for text, _ in run)).tolist()
            learned += [mine] * (len(ids) - len(learned))
        ids, learned = np.array([*ids, self.tokenizer.eot_id]), np.array([*learned, True])
        drop = min(max(0, len(ids) - self.T), max(0, int(learned.argmax()) - 1))
        self.cut += len(ids) > self.T
        return ids[drop:drop + self.T], learned[drop:drop + self.T]

    def disjoint(self):
        return len(self.val)

    def rows(self, rows):
        lengths = torch.tensor([min(self.T, -(-len(ids) // self.block) * self.block) for ids, _ in rows])
        x = torch.full((len(rows), int(lengths.max())), -1)
        maskable = torch.zeros(x.shape, dtype=torch.bool)
        for i, (ids, learned) in enumerate(rows):
            x[i, :len(ids)], maskable[i, :len(ids)] = torch.from_numpy(ids), torch.from_numpy(learned)
        return Rows(x, maskable, None if lengths.min() == x.shape[1] else lengths)

    def train_rows(self, step, B, lo, hi, seed):
        return self.rows([self.train[i] for i in drawn(len(self.train), step, B, lo, hi, seed).tolist()])

    def eval_rows(self, n, seed=None):
        """n dialogues spread evenly over the held-out part, all if it has fewer."""
        return self.rows([self.val[i] for i in evenly(len(self.val), n).tolist()])

class TaskSource:
    """A synthetic task of tasks.TASKS: only the answer may be masked. `params`: the task's, of tasks.params.

    Rows are padded with # to T. The padding is told by `lengths`, not by its token, and the network passes
    over it; with `trim`, columns that are padding in every row are cut off, since they can change nothing."""
    kind, objective, latent_dim, projection = "task", "task", 0, None

    def __init__(self, name, params, T, trim=True):
        tasks.check(name, params, T)
        self.name, self.params, self.T, self.trim = name, params, T, trim
        self.tokenizer = Tokenizer("char", tasks.alphabet(name, params))

    def train_rows(self, step, B, lo, hi, seed):
        return self.draw([random.Random((seed << 64) + step * B + i) for i in range(lo, hi)], "train")

    def eval_rows(self, n, seed):
        """n rows from one stream, as the published runs draw them."""
        return self.draw([random.Random(seed)] * n, "eval")

    def draw(self, rngs, split):
        ids, answer = map(torch.from_numpy, tasks.sample_batch(self.name, self.params, self.T, rngs, split))
        real = ids != self.tokenizer.ids["#"]       # no row ends in a # of its own
        lengths = (real * torch.arange(1, self.T + 1)).max(1).values
        longest = int(lengths.max()) if self.trim else self.T
        return Rows(ids[:, :longest], answer[:, :longest], lengths if lengths.min() < longest else None)

    def score(self, x, predicted, masked):
        """Accuracy and exact match of predicted answers, all (B,T) -> {NAME_acc: ..., NAME_exact: ...}."""
        found = tasks.score(self.name, self.params, *(z.cpu().numpy() for z in (x, predicted, masked)))
        return {f"{self.name}_{key}": value for key, value in found.items()}

# Texts with latents lie in folders of DiffRwkv's layout:
# train_data.json, validation_data.json   [{"text": ..., "latent_path": "latents/train/000000.npy"}, ...]
# latents/train/*.npy                     one vector (D,) each
# train/*.npz                             input_ids and attention_mask (n,T), in the order of the JSON file
# tokenizer.json                          the tokenizer whose ids they are
# projection.npz                          the Projection that made the latents

class Projection(NamedTuple):
    """F features -> D latents, principal components of a training set: (x - mean) components / scale. The
    mean variance of a latent is 1; the scale is one for all, so that distances keep their proportions."""
    mean: np.ndarray            # (F,)
    components: np.ndarray      # (F,D)
    scale: np.ndarray           # ()

    def __call__(self, x):
        return ((x - self.mean) @ self.components / self.scale).astype(np.float32)

class Split(NamedTuple):
    """One split of a PairSource."""
    ids: np.ndarray          # (n,T) uint32
    lengths: torch.Tensor    # (n,)
    z: np.ndarray            # (n,D) float32
    use: torch.Tensor        # (m,) the rows that are there whole

class PairSource:
    """Texts with latents, a folder of `python data.py latents`, project and tokenize. Rows are whole texts,
    cut to T tokens, with their latents as they are in the files, zeros where an entry has no latent_path. All
    is read once, file by file, into temporary files that are mapped to memory: a set may be larger than that.

    use_latents=False leaves the latents out. skip_missing: texts whose latent file is missing are left out
    and counted. ValueError for missing, truncated or pickled files, for NaN, latents of several dimensions,
    and token files of another number of texts."""
    kind, objective = "pairs", "stage1_coupling"
    chars_per_token = bytes_per_token = math.nan

    def __init__(self, folder, T, tokenizer="", use_latents=True, skip_missing=False):
        self.name, self.T = folder, T
        file, repair = Path(folder, "tokenizer.json"), f"python data.py tokenize --data_path={folder}"
        if not file.is_file():
            raise ValueError(f"{folder} has no tokens yet: {repair}")
        with reading(folder, f"its tokenizer.json is damaged, {repair}"):
            self.tokenizer = agreed(tokenizer, json.loads(file.read_bytes()), folder)
        self.train, self.val = train, val = [self.read(split, use_latents, skip_missing) for split in PAIRS]
        self.latent_dim = train.z.shape[1]
        if val.z.shape[1] != self.latent_dim or not len(train.use) or not len(val.use):
            raise ValueError(f"{folder}: {len(train.use)} training texts with latents of {self.latent_dim} "
                             f"dimensions, {len(val.use)} for validation with {val.z.shape[1]}: both must "
                             "have texts, and latents of one dimension")
        file = Path(folder, "projection.npz")
        self.projection = load_array(file, Projection._fields) if file.is_file() and use_latents else None

    def read(self, split, use_latents, skip_missing):
        entries = read_entries(self.name, split)
        n = len(entries)
        ids, lengths = self.read_tokens(split, n)
        z, there = np.zeros((n, 0), np.float32), np.ones(n, bool)
        if use_latents:
            z, there = read_vectors(self.name, entries, skip_missing, optional=True)
        if not there.all():
            print(f"{self.name}: {n - there.sum()} of {n} {split} texts are left out: no latent files")
        use = torch.from_numpy(there & (lengths > 0)).nonzero()[:, 0]
        return Split(ids, torch.from_numpy(lengths), z, use)

    def read_tokens(self, split, n):
        """-> ids (n,T) uint32, lengths (n,)."""
        ids, lengths, at = temp_array((n, self.T), np.uint32), np.zeros(n, np.int64), 0
        for f in sorted(Path(self.name, split).glob("*.npz")):
            x, mask = load_array(f, ("input_ids", "attention_mask"))
            mask = mask.astype(bool)
            if x.dtype.kind not in "iu" or x.size and x.min() < 0:
                raise ValueError(f"{f}: input_ids are {x.dtype}, or negative: make the tokens again")
            if x.shape != mask.shape or x.ndim != 2 or (mask[:, 1:] > mask[:, :-1]).any():
                raise ValueError(f"{f}: input_ids {x.shape} and attention_mask {mask.shape} must be (texts, "
                                 "tokens), padded at the end")
            x = x * mask
            check_ids(f, x, self.tokenizer.vocab_size)
            if at + len(x) <= n:
                ids[at:at + len(x), :x.shape[1]] = x[:, :self.T]
                lengths[at:at + len(x)] = mask[:, :self.T].sum(1)
            at += len(x)
        if at != n:
            raise ValueError(f"{self.name}/{split} holds tokens of {at} texts, {split}_data.json has {n}: "
                             f"python data.py tokenize --data_path={self.name}")
        return ids, lengths

    def rows(self, part, index):
        index = part.use[index]
        lengths = part.lengths[index]
        maskable = torch.arange(int(lengths.max())) < lengths[:, None]
        x = torch.from_numpy(part.ids[index.numpy(), :maskable.shape[1]].astype(np.int64))
        z = torch.from_numpy(part.z[index.numpy()]) if part.z.shape[1] else None
        return Rows(x, maskable, None if maskable.all() else lengths, z)

    def train_rows(self, step, B, lo, hi, seed):
        return self.rows(self.train, drawn(len(self.train.use), step, B, lo, hi, seed))

    def eval_rows(self, n, seed=None):
        """n texts spread evenly over the validation split (all, if it has fewer)."""
        return self.rows(self.val, evenly(len(self.val.use), n))

    def moments(self):
        """-> mean (D,) of the training latents that are there, and the root of their mean variance."""
        first, second, n = 0.0, 0.0, 0
        for index in self.train.use.split(SHARD):
            z = self.train.z[index.numpy()].astype(np.float64)
            z = z[(z != 0).any(1)]
            first, second, n = first + z.sum(0), second + (z**2).sum(0), n + len(z)
        mean = first / max(1, n)
        variance = max(1e-12, float((second / max(1, n) - mean**2).mean()))
        return torch.as_tensor(mean, dtype=torch.float32), torch.tensor(variance ** 0.5)

# ---- batches -----------------------------------------------------------------------------------------------

def generator(seed, step, stream):
    """An independent random stream for each (seed, step, stream)."""
    state = np.random.SeedSequence([seed, step, stream]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))

# ---- readers: what a file holds is read, or refused in one line --------------------------------------------

def one_line_end(text):
    """Line ends of every system -> those of Unix."""
    return text.replace("\r\n", "\n").replace("\r", "\n")

def is_jsonl(path):
    return str(path).lower().endswith((".jsonl", ".jsonl.gz", ".zst"))

class Zst(io.RawIOBase):
    """What a .zst file holds, which must be whole; it can be sought forward."""

    def __init__(self, path, make):
        self.file, self.make, self.frame, self.text, self.at = open(path, "rb"), make, None, b"", 0

    def readinto(self, buffer):
        while not self.text:
            raw = self.file.read(PIECE)
            if not raw and self.frame:
                raise ValueError("its last frame is cut")
            if not raw:
                return 0
            while raw:
                self.frame = self.frame or self.make()
                self.text += self.frame.decompress(raw)
                raw, self.frame = self.frame.unused_data, None if self.frame.eof else self.frame
        part, self.text = self.text[:len(buffer)], self.text[len(buffer):]
        buffer[:len(part)] = part
        self.at += len(part)
        return len(part)

    def tell(self):
        return self.at

    def seek(self, at, whence=0):
        while self.at < at and self.readinto(bytearray(min(PIECE, at - self.at))):
            pass
        return self.at

    readable = seekable = lambda self: True

def opened(path):
    """A file, for reading its bytes; .gz and .zst are unpacked on the way."""
    if str(path).lower().endswith(".gz"):
        return gzip.open(path)
    if not str(path).lower().endswith(".zst"):
        return open(path, "rb")
    try:
        import zstandard
    except ImportError:
        raise UserError(f"{path} needs the zstandard package: pip install zstandard") from None
    return io.BufferedReader(Zst(path, lambda: zstandard.ZstdDecompressor().decompressobj()), PIECE)

@functools.lru_cache
def text_size(path, size, time):
    """Bytes of a file of `size` bytes, unpacked; time: when it last changed."""
    if not str(path).lower().endswith((".gz", ".zst")):
        return size
    with reading(path, "it is truncated or damaged"), opened(path) as f:
        return sum(map(len, iter(lambda: f.read(PIECE), b"")))

def decode(raw, path, at=0, last=True):
    """Bytes of the file `path` from byte `at` on -> str, without half a character at the end."""
    try:
        return codecs.utf_8_decode(raw, "strict", last)[0]
    except UnicodeDecodeError as e:
        raise ValueError(f"{path} is not UTF-8 text (byte {at + e.start}): give a plain text file") from None

ROLES = {"system": "System", "user": "User", "assistant": "Assistant"}
FORMS = ('{"text": ...}, {"prompt": ..., "response": ...} or '
         '{"messages": [{"role": "user", "content": ...}, ...]}')

def turns(found):
    """An object of one of FORMS -> [(text, whether it is learned)], a dialogue as RWKV World writes them.
    ValueError for anything else."""
    if not isinstance(found, dict):
        raise ValueError("it is not an object")
    messages = found.get("messages")
    if isinstance(found.get("text"), str):
        return [(one_line_end(found["text"]), True)]
    if {"prompt", "response"} <= found.keys():
        messages = [dict(role="user", content=found["prompt"]),
                    dict(role="assistant", content=found["response"])]
    if not isinstance(messages, list) or not messages:
        raise ValueError("it has no text, no prompt with a response, and no messages")
    parts = []
    for message in messages:
        message = message if isinstance(message, dict) else {}
        role, content = message.get("role"), message.get("content")
        if role not in ROLES or not isinstance(content, str):
            raise ValueError(f"a message has role {short(role)}, content of {type(content).__name__}: "
                             f"roles are {', '.join(ROLES)}, contents text")
        if role == "assistant" and not content.strip():
            raise ValueError("a response is empty")
        head = "\n\n" * bool(parts) + f"{ROLES[role]}:"
        parts += [(head, False), (f" {one_line_end(content).strip()}", role == "assistant")]
    if not parts[-1][1]:
        raise ValueError("it does not end with a response of the assistant")
    return parts

def plain(found):
    """The text of an object without turns: where the first line has none, no other may have any."""
    parts = turns(found)
    if len(parts) > 1:
        raise ValueError("it is a dialogue, but the first line is a text: begin the file with a dialogue")
    return parts[0][0]

def question(content):
    """What a network that was trained on dialogues answers."""
    return "".join(text for text, _ in turns(dict(prompt=content, response="-"))[:3])

def record(path, line, place, use=lambda found: "".join(text for text, _ in turns(found))):
    """What `use` makes of a line of a .jsonl file, its text. ValueError if it is not one of FORMS."""
    with reading(f"{path}, {place}", f"give lines such as {FORMS}"):
        found = json.loads(line)
        json.dumps(found, ensure_ascii=False).encode()      # half of a surrogate pair is not text
        return use(found)

def lines_of(path):
    """The lines of a .jsonl file, bytes."""
    with reading(path, "it is truncated or damaged"), opened(path) as f:
        yield from f

def has_turns(path):
    """Is it a .jsonl file of dialogues? The first line tells."""
    if not is_jsonl(path) or not os.path.isfile(path):
        return False
    for line in filter(bytes.strip, lines_of(path)):
        return record(path, line, "line 1", lambda found: isinstance(found, dict) and "text" not in found)
    return False

def read_text(path):
    """A UTF-8 file -> (name, str); with no path the source of Python's own standard library, which every
    machine has. Of a .jsonl file the texts of its lines, a line end after each. A byte order mark is left
    out, and line ends become \\n."""
    if not path:
        text = ""
        for f in sorted(Path(os.__file__).parent.glob("*.py")):
            if len(text) < 2_000_000:
                text += f.read_text(encoding="utf-8", errors="replace")
        return "standard library", text
    with opened(path) as f:
        text = one_line_end(decode(f.read().removeprefix(codecs.BOM_UTF8), path))
    if is_jsonl(path):
        lines = enumerate(text.split("\n"), 1)
        text = "".join(record(path, line, f"line {i}", plain) + "\n" for i, line in lines if line.strip())
    return str(path), text

def alphabet(*texts):
    """The characters of all texts, in order: what a char tokenizer is made from."""
    return "".join(sorted(set().union(*texts)))

def per_token(tokenizer, ids):
    """A list of ids -> [characters, bytes] that one stands for on average; nan where no vocabulary tells."""
    if not ids:
        return [math.nan] * 2
    text = tokenizer.codec.decode(ids)
    return [len(text) / len(ids), len(text.encode()) / len(ids)]

def open_text(path, tokenizer):
    """A text, its last tenth held out -> name, tokenizer, train, val, [characters, bytes] per token."""
    name, text = read_text(path)
    if isinstance(tokenizer, str):
        tokenizer = Tokenizer(tokenizer or "byte", alphabet(text) if tokenizer == "char" else "")
    ids = torch.from_numpy(tokenizer.encode(text).astype(np.int32))
    cut = len(ids) * 9 // 10
    for cut in range(cut, min(cut + 4, len(ids))):      # a character has at most four parts: not within one
        if not tokenizer.codec.decode(ids[cut:cut + 8].tolist()).startswith("\ufffd"):
            break
    return name, tokenizer, ids[:cut], ids[cut:], per_token(tokenizer, ids[cut:].tolist())

def check_ids(name, ids, V, at=0):
    """ValueError if one of the ids, the first of which is number `at` of `name`, is not below V."""
    if ids.size and ids.max() >= V:
        raise ValueError(f"{name}: token id {ids.max()} at position {at + int(ids.argmax())} is past the "
                         f"vocabulary of {V}: give the tokenizer it was made with, or a larger --vocab_size")

class Tokens:
    """Arrays of ids (files in memory maps) read as one: positions (n,T) -> ids (n,T) int64, all below V."""

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
        wrong = ids >= self.V
        if wrong.any():
            check_ids("the data", ids[wrong][:1], self.V, int(at[wrong][0]))
        return torch.from_numpy(ids)

MAGIC, VERSION = 20240520, 1        # the header of modded-nanogpt's .bin files

def read_bins(pattern, V, raw):
    """Token files by name or pattern -> Tokens. modded-nanogpt: int32[256] header (magic, version, count,
    zeros), then uint16 ids; with `raw` also bare uint16 ids, as nanoGPT writes them. ValueError for another
    header, a cut file, an id not below V."""
    parts = []
    for f in sorted(glob.glob(pattern)) or [pattern]:
        size, head = os.path.getsize(f), np.fromfile(f, "<i4", 256)
        modded = len(head) == 256 and head[0] == MAGIC
        other_header = len(head) == 256 and not head[3:].any()
        if modded and (head[1] != VERSION or size != 1024 + 2 * int(head[2])):
            raise ValueError(f"{f}: the header says version {head[1]} and {head[2]} tokens, expected version "
                             f"{VERSION} and the {(size - 1024) / 2:g} that the file holds: copy it again")
        if not modded and (not raw or other_header or size % 2 or not size):
            raise ValueError(f"{f} is not a token file: it begins with {head[:1]}, not with [{MAGIC}] "
                             "(modded-nanogpt); for bare uint16 ids (nanoGPT) name their --tokenizer; for "
                             "text use --data_path")
        parts.append(np.memmap(f, "<u2", "r", offset=1024 if modded else 0))
        for at in range(0, len(parts[-1]), 1 << 24):        # a file may be larger than memory
            check_ids(f, parts[-1][at:at + (1 << 24)], V, at)
    return Tokens(parts, V)

def open_bins(data_bin, data_val_bin, path, tokenizer, vocab_size):
    """Token files (without data_val_bin the last tenth is held out) -> what open_text returns, with the
    characters and bytes per token of samples from all over the held-out part."""
    raw = bool(tokenizer)
    if tokenizer == "char":         # nanoGPT's ids: the sorted characters of its text
        if not path:
            raise ValueError(f"{data_bin}: --tokenizer=char needs the text it was made from as --data_path, "
                             "for its alphabet (meta.pkl is not read: unpickling a file may run anything)")
        tokenizer = Tokenizer("char", alphabet(read_text(path)[1]))
    elif isinstance(tokenizer, str):
        tokenizer = Tokenizer(tokenizer or "gpt2")
    V = max(tokenizer.vocab_size, vocab_size)
    train = read_bins(data_bin, V, raw)
    cut = len(train) * 9 // 10
    if data_val_bin:
        val = read_bins(data_val_bin, V, raw)
    else:
        train, val = train.cut(0, cut), train.cut(cut, len(train))
    shown = []
    if tokenizer.codec.found:
        starts = np.arange(64)[:, None] * max(0, len(val) - 1024) // 63
        shown = val[starts + np.arange(min(1024, len(val)))].flatten().tolist()
    known = [i for i in shown if i < tokenizer.vocab_size]
    return data_bin, tokenizer, train, val, per_token(tokenizer, known)

def read_meta(file, repair):
    """meta.json of a folder that `python data.py prepare` wrote or began -> dict."""
    with reading(file, repair):
        meta = json.loads(file.read_bytes())
        if not {"source", "settings", "tokenizer", "dtype", "done", *SPLITS} <= meta.keys():
            raise UserError(f"{file} is not of `python data.py prepare`: {repair}")
    return meta

def open_prepared(folder, tokenizer):
    """A folder of `python data.py prepare` -> what open_text returns."""
    file, repair = Path(folder, "meta.json"), "prepare the text anew, into another folder"
    if not file.is_file():
        hint = ""
        if Path(folder, "train.bin").is_file():
            hint = "; nanoGPT's train.bin and val.bin are read by --data_bin and --data_val_bin"
        raise ValueError(f"{folder} has no meta.json: a folder of texts is prepared first, python data.py "
                         f"prepare --data_path={folder} --out=FOLDER, then --data_path=FOLDER{hint}")
    meta = read_meta(file, repair)
    if not meta["done"]:
        raise UserError(f"{folder} is not finished: start `python data.py prepare` once more, it goes on")
    with reading(folder, f"its meta.json is damaged, {repair}"):
        tokenizer = agreed(tokenizer, meta["tokenizer"], folder)
        train, val = (Tokens(open_shards(folder, meta, split), tokenizer.vocab_size) for split in SPLITS)
        last = meta["val"] if meta["val"]["tokens"] else meta["train"]
        return folder, tokenizer, train, val, [last[unit] / last["tokens"] for unit in ("chars", "bytes")]

def open_shards(folder, meta, split):
    """The token files of a split of a prepared folder -> [np.memmap]."""
    kind, shards = meta["dtype"], []
    if kind not in ("uint16", "uint32"):
        raise ValueError(f"its numbers are {kind!r}, not uint16 or uint32")
    for name, n in meta[split]["shards"]:
        if not re.fullmatch(rf"{split}_\d+\.bin", name):
            raise ValueError(f"{name!r} is not the name of a shard")
        size = os.path.getsize(Path(folder, name))
        if size != n * np.dtype(kind).itemsize:
            raise UserError(f"{folder}/{name} holds {size} bytes, not {n} tokens of {kind}: prepare it again")
        shards.append(np.memmap(Path(folder, name), kind, "r"))
    return shards

def has_pairs(folder):
    """Is it a folder of texts with latents?"""
    return bool(folder) and Path(folder, f"{PAIRS[0]}_data.json").is_file()

def read_entries(folder, split):
    """The entries of FOLDER/SPLIT_data.json, a list of {"text": ..., "latent_path": ...}."""
    file = Path(folder, f"{split}_data.json")
    if not file.is_file():
        raise ValueError(f"{file} does not exist: `python data.py latents --data_path=TEXT --out={folder}`")
    with reading(file, "make it again"):
        entries = json.loads(file.read_text(encoding="utf-8-sig"))
    for entry in entries if isinstance(entries, list) else [None]:
        good = isinstance(entry, dict) and isinstance(entry.get("text"), str)
        if not good or not isinstance(entry.get("latent_path") or "", str):
            raise ValueError(f'{file} must be a list of entries such as '
                             f'{{"text": "...", "latent_path": "latents/{split}/000000.npy"}}')
        name = entry.get("latent_path") or ""
        if os.path.isabs(name) or ".." in Path(name).parts or "\0" in name:
            raise ValueError(f"{file}: latent_path={name!r} leaves the folder: give paths below {folder}")
    return entries

def read_vectors(folder, entries, skip_missing=False, optional=False):
    """The latent files of n entries -> vectors (n,D) float32 in a temporary file, zeros where there is none;
    (n,) bool, False where one is lacking. ValueError for that unless skip_missing, for vectors of several
    lengths, and for NaN. optional: an entry without a latent_path does not lack one."""
    paths = [Path(folder, entry["latent_path"]) if entry.get("latent_path") else None for entry in entries]
    there = np.array([path.is_file() if path else optional for path in paths], bool)
    if not there.all() and not skip_missing:
        lacking = [str(paths[i] or f"entry {i} has no latent_path") for i in np.flatnonzero(~there)]
        raise ValueError(f"{len(lacking)} of {len(paths)} entries have no latent file "
                         f"({first_three(lacking)}): make them, or leave the texts out: --skip_missing=1")
    vectors = np.zeros((len(paths), 0), np.float32)
    for i, path in enumerate(paths):
        if not path or not there[i]:
            continue
        v = load_array(path)
        if not vectors.size and v.ndim == 1:
            vectors = temp_array((len(paths), len(v)), np.float32)
        if v.shape != vectors.shape[1:]:
            raise ValueError(f"{path} has shape {v.shape}, others {vectors.shape[1:]}: give one dimension")
        if not np.isfinite(v).all():
            raise ValueError(f"{path} holds NaN or infinite numbers: make it again")
        vectors[i] = v
    return vectors, there

def first_three(names):
    """For a message: three names and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

def load_array(path, keys=None):
    """A .npy array, or the arrays `keys` of a .npz. ValueError in one line for what is missing, truncated,
    compressed, claims more than the file holds, or would run code."""
    if not os.path.isfile(path):
        raise ValueError(f"{path} does not exist")
    size, found = os.path.getsize(path), []
    with reading(path, "it is truncated or damaged, make it again"):
        if keys is None:
            with open(path, "rb") as f:
                return read_npy(f, size)
        with zipfile.ZipFile(path) as z:
            if not {f"{key}.npy" for key in keys} <= set(z.namelist()):
                raise ValueError(f"{path} must hold {' and '.join(keys)}: make it again")
            for member in (z.getinfo(f"{key}.npy") for key in keys):
                if member.compress_type != zipfile.ZIP_STORED or member.file_size > size:
                    raise ValueError("it is compressed, write it with numpy.savez")
                with z.open(member) as f:
                    found.append(read_npy(f, member.file_size))
    return found

def read_npy(f, size):
    """An open .npy file of `size` bytes -> its numbers; what it claims to hold must be what it holds."""
    header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    shape, _, dtype = header[np.lib.format.read_magic(f)](f)
    if dtype.kind not in "fiub":
        raise ValueError("it is not an array of numbers, or one of pickled objects, which are never loaded")
    if f.tell() + math.prod(shape) * dtype.itemsize != size:
        raise ValueError(f"it claims {dtype} {shape} and holds {size} bytes: it is truncated or damaged")
    f.seek(0)
    return np.load(f, allow_pickle=False)

def temp_array(shape, kind):
    """An array in an unnamed temporary file, which the system drops when nobody uses it any more."""
    if not math.prod(shape):
        return np.zeros(shape, kind)
    return np.memmap(tempfile.TemporaryFile(), kind, "w+", shape=shape)

# ---- tokenizers: a row of KINDS turns text into ids and back; the rest of the code sees Tokenizer ----------

class Bytes:
    """UTF-8 bytes."""
    vocab_size, eot_id, state = 256, None, {}
    found = True                    # the vocabulary is on this machine

    def __init__(self, alphabet="", file=""):
        pass

    def encode(self, text):
        return np.frombuffer(text.encode(), np.uint8)

    def decode(self, ids):
        return bytes(ids).decode(errors="replace")

class Chars(Bytes):
    """One id per character of `alphabet`."""

    def __init__(self, alphabet="", file=""):
        self.alphabet, self.vocab_size = alphabet, len(alphabet)
        points = [ord(c) for c in alphabet]
        # Code point -> id; the last entry stands for all larger ones.
        self.table = np.full(max(points, default=0) + 2, -1, np.int32)
        self.table[points] = np.arange(len(points))

    def encode(self, text):
        points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
        ids = self.table[np.minimum(points, len(self.table) - 1)]
        if len(ids) and ids.min() < 0:
            unknown = min(set(text) - set(self.alphabet))
            raise ValueError(f"character {unknown!r} is not in the vocabulary of {self.vocab_size} "
                             "characters: leave it out, or train with --tokenizer=byte, which knows all")
        return ids

    def decode(self, ids):
        return "".join(map(self.alphabet.__getitem__, ids))

def word_end(text):
    """How many characters of a text give the same tokens whatever follows. No token of the known vocabularies
    holds a letter or digit and then a space or line end, so that a text can be cut there."""
    for place in (r"(?s).*[^\W_](?=[ \r\n])", r"(?s).*\S(?=\s)", r"(?s).*[^\r]"):
        if cut := re.match(place, text):
            return cut.end()
    return len(text)

class Words(Bytes):
    """A vocabulary of another library, which takes 500 bytes per token: a long text is encoded in parts."""

    def encode(self, text):
        ids, at = [], 0
        while len(text) - at > PIECE:
            end = at + word_end(text[at:at + PIECE])
            ids.append(self.merge(text[at:end]))
            at = end
        return np.concatenate([*ids, self.merge(text[at:])])

class GPT2(Words):
    """GPT-2's vocabulary, from tiktoken's own cache; read when first needed."""
    vocab_size, eot_id, told = 50257, 50256, False
    # name -> sha256
    FILES = {"vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
             "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"}
    URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
    state = {"sha256": FILES["vocab.bpe"]}

    def __init__(self, alphabet="", file="", sha256=state["sha256"]):
        if sha256 != self.state["sha256"]:
            ours = self.state["sha256"]
            raise ValueError(f"the checkpoint's gpt2 vocabulary ({sha256[:12]}) is not tiktoken's "
                             f"({ours[:12]}): use the data and the program it was trained with")

    @functools.cached_property
    def found(self):
        """tiktoken would silently download what its cache lacks, or holds damaged: so look first."""
        default = Path(tempfile.gettempdir(), "data-gym-cache")
        cache = os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR", default))
        files = {Path(cache, hashlib.sha1((self.URL + name).encode()).hexdigest()): digest
                 for name, digest in self.FILES.items()}
        return cache != "" and all(file.is_file() and hashlib.sha256(file.read_bytes()).hexdigest() == digest
                                   for file, digest in files.items())

    @functools.cached_property
    def encoding(self):
        import tiktoken
        return tiktoken.get_encoding("gpt2")

    def merge(self, text):
        if not self.found:
            raise ValueError("the gpt2 vocabulary is not in tiktoken's cache: run `python data.py download "
                             "gpt2` (with a network), or copy the cache of another machine and set "
                             "TIKTOKEN_CACHE_DIR to it, or choose another --tokenizer")
        return np.array(self.encoding.encode_ordinary(text), np.int32)

    def decode(self, ids):
        if self.found:
            return self.encoding.decode(ids)
        if not self.told:
            self.told = True
            print("no gpt2 vocabulary in tiktoken's cache: tokens are shown as numbers; `python data.py "
                  "download gpt2` gets it")
        return "".join(f"<{i}>" for i in ids)

class World(Bytes):
    """RWKV World: greedy longest match over bytes, by the published file; ids 0 (end of text) to 65535."""
    vocab_size, eot_id = 65536, 0
    NAME = "rwkv_vocab_v20230424.txt"

    def __init__(self, alphabet="", file="", sha256=""):
        places, package = [file], importlib.util.find_spec("rwkv")
        if package and (sha256 or not file):        # a checkpoint's file may have moved
            places += [str(Path(folder, self.NAME)) for folder in package.submodule_search_locations]
        path = next(filter(os.path.isfile, places), None)
        if not path:
            raise ValueError(f"no RWKV vocabulary {file or self.NAME}: give it as --tokenizer=rwkv:FILE, or "
                             "pip install rwkv, which has it")
        raw = Path(path).read_bytes()
        digest = hashlib.sha256(raw).hexdigest()
        if sha256 and sha256 != digest:
            raise ValueError(f"{path} ({digest[:12]}) is not the checkpoint's RWKV vocabulary "
                             f"({sha256[:12]}): give that one")
        self.state = {"file": os.path.abspath(file) if file else "", "sha256": digest}
        self.words = {0: b"<|endoftext|>"}          # id -> bytes
        self.trie = {}                              # nested dicts: byte -> node, -1 -> id of the bytes so far
        try:
            for line in raw.decode().strip().split("\n"):
                self.add(*re.fullmatch(r"(\d+) (.*) (\d+)\s*", line).groups())
        except (ValueError, SyntaxError, TypeError, AttributeError):
            line = len(self.words)
            raise ValueError(f"{path} is not an RWKV vocabulary (line {line}): give {self.NAME}") from None
        for byte in range(256):
            if -1 not in self.trie.get(byte, {}):
                raise ValueError(f"{path}, of RWKV, has no token for byte {byte}: take {self.NAME}")

    def add(self, i, literal, length):
        """A line of the file, such as `33 '!' 1`: id, literal of text or bytes, number of bytes."""
        i, word, node = int(i), ast.literal_eval(literal.strip()), self.trie
        word = word.encode() if isinstance(word, str) else word
        if len(word) != int(length) or not word or not 0 < i < self.vocab_size:
            raise ValueError(i)
        for byte in word:
            node = node.setdefault(byte, {})
        node[-1], self.words[i] = i, word

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

    def decode(self, ids):
        return b"".join(self.words.get(i, "\ufffd".encode()) for i in ids).decode(errors="replace")

class BPE(Words):
    """A JSON file of Hugging Face's tokenizers, such as train-bpe writes; checkpoints keep its text."""

    def __init__(self, alphabet="", file="", json=""):
        import tokenizers
        if not json and not file:
            raise ValueError("tokenizer='bpe' needs a file, bpe:FILE.json, made by `python data.py "
                             "train-bpe`")
        try:
            json = json or Path(file).read_text(encoding="utf-8")
            self.bpe = tokenizers.Tokenizer.from_str(json)
        except OSError as e:
            raise ValueError(f"bpe:{file}: {e.strerror}; `python data.py train-bpe` makes one") from None
        except Exception as e:                      # from_str raises plain Exception
            file = file or "the vocabulary"
            raise ValueError(f"{file} is not a JSON file of the tokenizers library ({e})") from None
        self.bpe.no_truncation()
        self.bpe.no_padding()
        self.bpe.encode_special_tokens = True       # <|endoftext|> in a text is text
        self.state, ids = {"json": json}, self.bpe.get_vocab()
        self.vocab_size = max(ids.values()) + 1
        self.eot_id = next((ids[s] for s in ("<|endoftext|>", "</s>", "<eos>", "[SEP]") if s in ids), None)

    def merge(self, text):
        return np.array(self.bpe.encode_batch_fast([text], add_special_tokens=False)[0].ids, np.int32)

    def decode(self, ids):
        return self.bpe.decode(ids, skip_special_tokens=False)

KINDS = {"byte": Bytes, "char": Chars, "gpt2": GPT2, "rwkv": World, "bpe": BPE}

class Tokenizer:
    """Text <-> ids. kind: a row of KINDS, or rwkv:FILE or bpe:FILE; alphabet: the characters of `char`.

    encode(str) -> 1-D array of ids, or ValueError; vocab_size; eot_id, the id of end of text or None;
    state(), of str only, is what a checkpoint keeps: Tokenizer(**state) is the same one, or a ValueError."""

    def __init__(self, kind, alphabet="", file="", **state):
        self.kind, colon, given = kind.partition(":")
        if self.kind not in KINDS or colon and self.kind not in ("rwkv", "bpe"):
            names = ", ".join([*KINDS, "rwkv:FILE", "bpe:FILE"])
            raise ValueError(f"tokenizer={kind!r} is unknown: choose one of {names}")
        self.alphabet, self.codec = alphabet, KINDS[self.kind](alphabet, given or file, **state)
        self.ids = {c: i for i, c in enumerate(alphabet)}
        self.vocab_size, self.eot_id = self.codec.vocab_size, self.codec.eot_id
        self.encode = self.codec.encode

    def decode(self, ids):
        """Ids (a mask id, or any past the vocabulary, shows as _) -> str."""
        runs = itertools.groupby(map(int, ids), lambda i: i < self.vocab_size)
        return "".join(self.codec.decode(list(run)) if known else "_" * len(list(run)) for known, run in runs)

    def pieces(self, ids):
        """Ids -> what each adds to the text; of several that are one character together the last has it."""
        found, told = [], ""
        for n in range(1, len(ids) + 1):
            text = self.decode(ids[:n])
            if text.endswith("\ufffd") and n < len(ids):
                text = told
            found.append(text[len(told):])
            told = text
        return found

    def characters(self, ids):
        """Ids -> what each shows as, one printable character for byte and char (line ends as ⏎); of several
        ids that are one character together the first has it, the others are empty."""
        ids, cells = list(map(int, ids)), []
        while len(cells) < len(ids):
            rest = ids[len(cells):len(cells) + 4]
            shown = [self.decode(rest[:n]) for n in range(1, len(rest) + 1)]
            n = next((n for n, text in enumerate(shown, 1) if "\ufffd" not in text), 1)
            cells += [visible(shown[n - 1]).replace("\n", "⏎"), *[""] * (n - 1)]
        return cells

    def state(self):
        return {"kind": self.kind, "alphabet": self.alphabet, **self.codec.state}

def same_vocabulary(a, b):
    """Whether two states give the same ids, wherever their vocabulary files lie."""
    return {**a, "file": ""} == {**b, "file": ""}

def agreed(asked, state, owner):
    """The tokenizer of `state`, which `owner` (a checkpoint, a folder) goes by. ValueError if `asked`, a
    Tokenizer or a setting, is another one; "" asks for nothing, `char` for the alphabet that there is."""
    if isinstance(asked, str):
        kind, _, file = asked.partition(":")
        if kind in ("", state["kind"]) and not (kind == "bpe" and file):
            return Tokenizer(**(state | {"file": file} if file else state))
        asked = Tokenizer(asked)
    if not same_vocabulary(asked.state(), state):
        have, want = (f"{s['kind']} {s['alphabet']!r}".removesuffix(" ''") for s in (state, asked.state()))
        raise ValueError(f"{owner} has another vocabulary ({have}) than was asked for ({want}): leave "
                         "--tokenizer out, or use data and a checkpoint that go together")
    return asked

CONTROLS = dict.fromkeys(range(128, 160), 0xfffd) | {i: 0x2400 + i for i in range(32)} | {127: 0x2421}
CONTROLS |= {ord(c): c for c in "\n\t"} | dict.fromkeys((0xfffe, 0xffff), 0xfffd)

def visible(text):
    """Text as a terminal may show it: control characters as their pictures, but for line ends and tabs."""
    return text.translate(CONTROLS)

def side_by_side(tokenizer, target, masked, pred, width=10**6):
    """IN, GT and PR of one row, `width` characters around its mask, and ^ under what is wrong. All (T,)."""
    first = int(masked.nonzero()[0]) if masked.any() else 0
    start = max(0, min(first - width // 4, len(target) - width))
    here, hidden = slice(start, start + width), target.masked_fill(masked, tokenizer.vocab_size)
    rows = [tokenizer.characters(ids[here]) for ids in (hidden, target, pred)]
    rows.append(["^" if wrong else " " for wrong in (pred != target)[here]])
    wide = [max(map(len, column)) for column in zip(*rows)]     # a token may show as several characters
    lines = [name + "".join(cell.ljust(w) for cell, w in zip(row, wide))
             for name, row in zip(("  IN ", "  GT ", "  PR ", "     "), rows)]
    marks = lines.pop().rstrip()
    return "\n".join(lines + [marks] if marks else lines)

# ==== training needs nothing below: the commands ============================================================

PATTERN = "*.txt,*.md,*.jsonl,*.jsonl.gz,*.jsonl.zst"

def text_files(data_path, pattern=PATTERN):
    """A file, or those below a folder whose names fit one of the patterns, in order -> [[path, size, time]],
    which tells whether any of them changed, and the paths of the folder's other files."""
    if not data_path:
        raise ValueError("--data_path is missing: give a text file, or a folder with texts")
    files, others = [str(data_path)], []
    if os.path.isdir(data_path):
        below = sorted(str(f) for f in Path(data_path).rglob("*") if f.is_file())
        patterns = [p.strip().lower() for p in pattern.split(",")]
        files = [f for f in below if any(fnmatch(os.path.basename(f).lower(), p) for p in patterns)]
        others = sorted(set(below) - set(files))
    stats = [(f, stat.st_size, stat.st_mtime_ns) for f, stat in zip(files, map(os.stat, files))]
    found = [[f, text_size(f, size, time), time] for f, size, time in stats]
    if not any(size for _, size, _ in found):
        raise ValueError(f"{data_path} holds no text: give a text file that is not empty, or a folder with "
                         f"files like {pattern} (--pattern chooses others)")
    return found, others

def progress(found, what):
    """A progress bar over the bytes of files."""
    return tqdm(total=sum(size for _, size, _ in found), unit="B", unit_scale=True, desc=what, disable=None)

class Region(NamedTuple):
    """Bytes begin..end of a text file. closed: the end of text comes after it."""
    path: str
    begin: int
    end: int
    closed: bool

def regions(found, val_share):
    """[path, size, time] of each file -> {split: [Region]}: the last val_share of all bytes is held out."""
    cut, out = int(sum(size for _, size, _ in found) * (1 - val_share)), {split: [] for split in SPLITS}
    for path, size, _ in found:
        begin, closed = start_of(path), len(found) > 1 and not is_jsonl(path)
        here = min(max(cut, begin), size)
        if begin < here < size:
            here = next_start(path, here)
        if begin < here:
            out["train"].append(Region(path, begin, here, closed and here == size))
        if here < size:
            out["val"].append(Region(path, here, size, closed))
        cut -= size
    return out

def start_of(path):
    """Where the text of a file begins: after a byte order mark."""
    with opened(path) as f:
        return 3 if f.read(3) == codecs.BOM_UTF8 else 0

def next_start(path, at):
    """The first place from byte `at` on that is not within a character or line end, or a .jsonl line."""
    with opened(path) as f:
        f.seek(at - 1)
        if is_jsonl(path):
            f.readline()
            return f.tell()
        before, *after = f.read(5)
    if before == ord("\r") and after[0] == ord("\n"):
        return at + 1
    return at + next((i for i, byte in enumerate(after) if byte & 0xC0 != 0x80), 0)

def pieces(region, offset=0):
    """A region from byte `offset` on, up to PIECE bytes at a time (a line of a .jsonl file) -> (offset,
    bytes, text), cut where it may be tokenized in parts. A line end follows the text of each .jsonl line."""
    path, at, end, _ = region
    at = offset or at
    with reading(path, "it must not change while it is read"), opened(path) as f:
        while at < end:
            f.seek(at)
            if is_jsonl(path):
                line = f.readline()
                n, text = len(line), record(path, line, f"byte {at}") + "\n" if line.strip() else ""
            else:
                raw = f.read(min(PIECE, end - at))
                last = at + len(raw) >= end
                text = decode(raw, path, at, last)
                text = text if last else text[:word_end(text)]
                n, text = len(text.encode()), one_line_end(text)
            if not n:
                raise ValueError(f"{path} ended at byte {at} of {end}: it must not change while it is read")
            yield at, n, text
            at += n

def read_all(found, what):
    """The text of every piece of the files, with a progress bar."""
    with progress(found, what) as bar:
        for region in regions(found, 0)["train"]:
            for _, n, text in pieces(region):
                yield text
                bar.update(n)

def prepare(data_path="", tokenizer="", out="", val_share=0.1, shard_tokens=100_000_000, pattern=PATTERN):
    """Text of any size -> folder `out` of token shards and meta.json, in bounded memory. If stopped, it goes
    on from its last shard.

    tokenizer: byte (the default), char, gpt2, rwkv, rwkv:FILE or bpe:FILE. Of a folder those files are read
    whose names fit the pattern; of .jsonl files the "text" of each line. Line ends become \\n, a byte order
    mark is left out. After each file of a folder and each text of a .jsonl file comes the end of text, if the
    tokenizer has one."""
    if not out:
        raise ValueError("--out is missing: give the folder to write")
    found, others = text_files(data_path, pattern)
    if others:
        print(f"left out, since their names do not fit --pattern={pattern}: {first_three(others)}")
    settings = dict(val_share=val_share, shard_tokens=shard_tokens)
    start = go_on if Path(out, "meta.json").exists() else begin
    tok, meta = start(data_path, tokenizer, out, found, settings)
    before, begun = sum(meta[split]["tokens"] for split in SPLITS), time.perf_counter()
    with progress(found, f"{tok.kind} tokens") as bar:
        for split, parts in regions(found, val_share).items():
            write_split(out, split, parts, tok, meta, bar)
    if text_files(data_path, pattern)[0] != found:
        raise ValueError(f"{data_path} changed while it was read: delete {out} and start again")
    save_meta(out, meta, done=True)
    train, val = (meta[split]["tokens"] for split in SPLITS)
    speed = (train + val - before) / (time.perf_counter() - begun)
    print(f"{out}: {train:,} training and {val:,} held-out tokens in {meta['dtype']}, vocabulary "
          f"{tok.vocab_size:,}, {speed:,.0f} tokens/s; try: python train.py --data_path={out}")

def begin(data_path, tokenizer, out, found, settings):
    """Make the folder `out` with a meta.json that names no shard yet -> Tokenizer, meta."""
    tok = Tokenizer(tokenizer or "byte")
    if tok.kind == "char":
        tok = Tokenizer("char", alphabet(*map(set, read_all(found, "alphabet"))))
    tok.encode("")                  # a vocabulary that is not there is an error before the work
    meta = {split: dict(shards=[], tokens=0, chars=0, bytes=0, at=[0, 0, 0]) for split in SPLITS}
    kind = "uint16" if tok.vocab_size <= 1 << 16 else "uint32"
    meta.update(tokenizer=tok.state(), dtype=kind, settings=settings, source=found, done=False)
    os.makedirs(out, exist_ok=True)
    save_meta(out, meta)
    return tok, meta

def go_on(data_path, tokenizer, out, found, settings):
    """The same for a folder that was begun, which must be from the same files with the same settings."""
    meta = read_meta(Path(out, "meta.json"), f"delete {out}, or give another --out")
    if meta["source"] != found:
        raise ValueError(f"{data_path} has changed (name, size or time) since {out} was begun from it: "
                         f"delete {out}, or give another --out")
    if meta["settings"] != settings:
        raise ValueError(f"{out} was begun with {meta['settings']}, not {settings}: use those, delete {out}, "
                         "or give another --out")
    return agreed(tokenizer, meta["tokenizer"], out), meta

def save_meta(out, meta, **changes):
    meta.update(changes)
    replace_file(Path(out, "meta.json"), json.dumps(meta).encode())

def write_split(out, split, parts, tok, meta, bar):
    """Write the shards of one split that are still missing. meta.json names a shard once it is whole, with
    the place where the next one begins."""
    mine, full = meta[split], meta["settings"]["shard_tokens"]
    end = [len(parts), 0, 0]
    blocks = tokens_of(parts, tok, mine, bar)
    place, ids = next(blocks, (end, ()))
    while len(ids):
        name, n = f"{split}_{len(mine['shards']):06d}.bin", 0
        with written(Path(out, name)) as shard:
            while len(ids) and n < full:
                some, ids = ids[:full - n], ids[full - n:]
                shard.write(some.astype(meta["dtype"]).tobytes())
                n, place = n + len(some), [*place[:2], place[2] + len(some)]
                if not len(ids):
                    place, ids = next(blocks, (end, ()))
        mine.update(shards=mine["shards"] + [[name, n]], tokens=mine["tokens"] + n, at=place)
        save_meta(out, meta)
    mine["at"] = end
    save_meta(out, meta)

def tokens_of(parts, tok, mine, bar):
    """The tokens of a split piece by piece, from mine["at"] on -> (place, ids), where a place is [region,
    offset of a piece, tokens of it written already]. Once all of a piece is taken, `mine` counts its text."""
    first, offset, skip = mine["at"]
    bar.update(sum(part.end - part.begin for part in parts[:first]))
    for i, part in itertools.islice(enumerate(parts), first, None):
        bar.update(max(0, offset - part.begin))
        for at, n, text in pieces(part, offset):
            closed = tok.eot_id is not None and part.closed and at + n == part.end
            if tok.eot_id is not None and is_jsonl(part.path):
                closed, text = bool(text), text[:-1]
            ids = tok.encode(text)
            if closed:
                ids = np.append(ids, tok.eot_id)
            if skip < len(ids):
                yield [i, at, skip], ids[skip:]
            mine["chars"] += len(text)
            mine["bytes"] += len(text.encode())
            bar.update(n)
            skip = max(0, skip - len(ids))
        offset = 0

def latents(data_path="", out="", dim=32, length=128, tokenizer="byte", val_share=0.1, buckets=2048):
    """Latents without any model: passages of `length` characters of a text (default: Python's standard
    library), their hashed n-grams, and the `dim` principal components of those -> folder `out` with texts,
    latents and tokens. The last val_share of the text is held out."""
    if not out or buckets < dim:
        raise ValueError(f"out={out!r}, dim={dim}, buckets={buckets}: give the folder to write as --out, and "
                         "at least as many buckets as latents")
    os.makedirs(out, exist_ok=True)
    if not data_path:
        data_path = str(Path(out, "text.txt"))
        replace_file(data_path, read_text("")[1].encode())
    parts = dict(zip(PAIRS, regions(text_files(data_path)[0], val_share).values()))

    def chunks(split):
        return ((texts, ngrams(texts, buckets)) for texts in in_chunks(passages(parts[split], length)))
    _, counts = write_latents(out, dim, chunks)
    print(f"{out}: {counts[0]:,} training and {counts[1]:,} validation texts with {dim} latents each")
    tokenize(out, tokenizer, length)

def project(data_path="", out="", dim=32):
    """Vectors of many dimensions (a text embedder's 1024) in this layout -> the same texts with `dim`
    principal components of them in folder `out`. The components are fitted on the training split alone."""
    if not out or os.path.realpath(out) == os.path.realpath(data_path):
        raise ValueError(f"data_path={data_path!r}, out={out!r}: give the folder to read, and another --out")

    def chunks(split):
        entries = read_entries(data_path, split)
        vectors, _ = read_vectors(data_path, entries)
        for i in range(0, len(entries), SHARD):
            yield [entry["text"] for entry in entries[i:i + SHARD]], vectors[i:i + SHARD]
    projection, counts = write_latents(out, dim, chunks)
    print(f"{out}: {counts[0]:,} training and {counts[1]:,} validation texts, {len(projection.mean)} "
          f"dimensions to {dim}; try: python data.py tokenize --data_path={out}")

def tokenize(data_path="", tokenizer="byte", max_length=128, local_files_only=True):
    """The texts of a folder in this layout -> token files beside them (at most max_length tokens of each).
    Nothing is downloaded unless local_files_only=0 allows it, and then only a vocabulary."""
    if tokenizer == "gpt2" and not local_files_only:
        download("gpt2")
    texts = {split: [entry["text"] for entry in read_entries(data_path, split)] for split in PAIRS}
    tok = Tokenizer(tokenizer, alphabet(*itertools.chain(*texts.values())) if tokenizer == "char" else "")
    tok.encode("")
    for split, mine in texts.items():
        folder = Path(data_path, split)
        folder.mkdir(exist_ok=True)
        for old in folder.glob("*.npz"):
            if re.fullmatch(r"\d{6}\.npz", old.name):       # what this command writes, nothing else
                old.unlink()
        for i, part in enumerate(in_chunks(tqdm(mine, desc=f"{split} tokens", unit="text", disable=None))):
            ids, mask = np.zeros((len(part), max_length), np.uint32), np.zeros((len(part), max_length), bool)
            for text, x, m in zip(part, ids, mask):
                row = tok.encode(text)[:max_length]
                x[:len(row)], m[:len(row)] = row, True
            save_arrays(folder / f"{i:06d}.npz", input_ids=ids, attention_mask=mask)
    replace_file(Path(data_path, "tokenizer.json"), json.dumps(tok.state()).encode())
    print(f"{data_path}: {len(texts['train']):,} + {len(texts['validation']):,} texts of at most "
          f"{max_length} {tok.kind} tokens, vocabulary {tok.vocab_size:,}")

def in_chunks(items, n=SHARD):
    """Lists of n items, the last one shorter."""
    items = iter(items)
    while chunk := list(itertools.islice(items, n)):
        yield chunk

def passages(parts, length):
    """Regions -> texts of `length` characters in them; what is left at the end of a region is dropped."""
    for region in parts:
        rest = ""
        for *_, text in pieces(region):
            rest += text
            cut = len(rest) // length * length
            yield from (rest[i:i + length] for i in range(0, cut, length))
            rest = rest[cut:]

def ngrams(texts, buckets):
    """Texts -> (n,buckets) float32: how often words and runs of 2 to 4 characters occur, hashed, as log(1 +
    count), each row of length 1."""
    out = np.zeros((len(texts), buckets), np.float32)
    for row, text in zip(out, texts):
        low = f" {' '.join(text.lower().split())} "
        grams = [low[i:i + n] for n in (2, 3, 4) for i in range(len(low) - n + 1)] + low.split()
        row += np.bincount([zlib.crc32(g.encode()) % buckets for g in grams], minlength=buckets)
    out = np.log1p(out)
    return out / np.maximum(np.linalg.norm(out, axis=1, keepdims=True), 1e-9)

def fit_projection(chunks, dim):
    """Chunks (n,F) of a training set -> its Projection to `dim` latents. ValueError if it has fewer."""
    n, first, second = 0, 0.0, 0.0
    for x in chunks:
        x = np.asarray(x, np.float64)
        n, first, second = n + len(x), first + x.sum(0), second + x.T @ x
    if n <= dim or np.size(first) < dim:
        raise ValueError(f"dim={dim} latents from {n} vectors of {np.size(first)} features: give more texts "
                         "or a smaller --dim")
    mean = first / n
    values, vectors = np.linalg.eigh(second / n - np.outer(mean, mean))
    values, vectors = values[::-1][:dim], vectors[:, ::-1][:, :dim]
    signs = np.sign(vectors[np.abs(vectors).argmax(0), np.arange(dim)])     # eigenvectors have none
    scale = np.float32(max(values.mean(), 1e-12) ** 0.5)
    return Projection(mean.astype(np.float32), (vectors * signs).astype(np.float32), scale)

def write_latents(out, dim, chunks):
    """chunks(split) -> (texts, vectors (n,F)), chunk by chunk. Writes to `out` the texts with `dim` principal
    components of their vectors -> the Projection, [number of texts of each split]."""
    components = tqdm(chunks("train"), desc="components", unit="chunk", disable=None)
    projection = fit_projection((x for _, x in components), dim)
    counts = [write_pairs(out, split, projection, chunks(split)) for split in PAIRS]
    save_arrays(Path(out, "projection.npz"), **projection._asdict())
    return projection, counts

def write_pairs(out, split, projection, chunks):
    """The JSON file and the .npy files of a split; the JSON file comes last -> number of texts."""
    n, folder = 0, Path(out, "latents", split)
    folder.mkdir(parents=True, exist_ok=True)
    with written(Path(out, f"{split}_data.json")) as f:
        f.write(b"[")
        for texts, x in tqdm(chunks, desc=f"{split} latents", unit="chunk", disable=None):
            for text, latent in zip(texts, projection(x)):
                np.save(folder / f"{n:06d}.npy", latent)
                entry = {"text": text, "latent_path": f"latents/{split}/{n:06d}.npy"}
                f.write(b",\n" if n else b"\n")
                f.write(json.dumps(entry, ensure_ascii=False).encode())
                n += 1
        f.write(b"\n]\n")
    return n

def save_arrays(path, **arrays):
    content = io.BytesIO()
    np.savez(content, **arrays)
    replace_file(path, content.getbuffer())

def train_bpe(data_path="", vocab_size=4096, out="", pattern=PATTERN):
    """Byte-level BPE (any text comes back as it was) of the tokenizers library; <|endoftext|> is id 0."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers
    if vocab_size < 257 or not out:
        raise ValueError(f"vocab_size={vocab_size}, out={out!r}: give at least 257 (the bytes and the end of "
                         "text), and the file to write as --out")
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(read_all(text_files(data_path, pattern)[0], "words"), trainer)
    replace_file(out, bpe.to_str().encode())
    print(f"{out}: {bpe.get_vocab_size()} tokens; try: python train.py --data_path={data_path} "
          f"--tokenizer=bpe:{out}")

DOWNLOADS = {   # name -> address, size and sha256 of what is fetched, size of the text
    "shakespeare": (
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        1_115_394, "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed", 1_115_394),
    "text8": ("https://mattmahoney.net/dc/text8.zip",
              31_344_016, "a6640522afe85d1963ad56c05b0ede0a0c000dddc9671758a6cc09b7a38e5232", 100_000_000)}

def download(name="", out=""):
    """Fetch a text, check it, write it to `out` (NAME.txt); or gpt2, the vocabulary, to tiktoken's cache."""
    if name == "gpt2":
        try:
            return print(f"gpt2: {GPT2().encoding.n_vocab} tokens, in tiktoken's cache")
        except Exception as e:                      # whatever its HTTP library raises
            why = type(e).__name__
            raise ValueError(f"cannot fetch the gpt2 vocabulary ({why}): is there a network?") from None
    if name not in DOWNLOADS:
        raise ValueError(f"download {name!r} is unknown: choose one of {', '.join([*DOWNLOADS, 'gpt2'])}")
    address, size, digest, text_size = DOWNLOADS[name]
    out, text = out or f"{name}.txt", fetch(name, address, size, digest)
    if zipfile.is_zipfile(io.BytesIO(text)):
        with zipfile.ZipFile(io.BytesIO(text)) as z, z.open(z.namelist()[0]) as f:
            text = f.read(text_size + 1)
    if len(text) != text_size:
        raise ValueError(f"{address} unpacks to {len(text)} bytes, not {text_size}: try again later")
    replace_file(out, text)
    print(f"{out}: {text_size:,} bytes, sha256 as expected; try: python train.py --data_path={out}")

def fetch(name, address, size, digest):
    """What an address gives -> bytes; ValueError if they are not the `size` with the sha256 `digest`."""
    got = bytearray()
    try:
        with (urllib.request.urlopen(address, timeout=30) as r,
              tqdm(total=size, unit="B", unit_scale=True, desc=name, disable=None) as bar):
            while len(got) <= size and (block := r.read(1 << 16)):
                got += block
                bar.update(len(block))
    except OSError as e:
        why = getattr(e, "reason", e)
        raise ValueError(f"cannot fetch {address} ({why}): is there a network? Or copy the file") from None
    if len(got) != size or hashlib.sha256(got).hexdigest() != digest:
        more = " or more" if len(got) > size else ""
        raise ValueError(f"{address} gave {len(got)} bytes{more}, not the {size} with the sha256 expected: "
                         "try again later")
    return bytes(got)

COMMANDS = {"prepare": prepare, "train-bpe": train_bpe, "latents": latents, "project": project,
            "tokenize": tokenize, "download": download}
OPTIONS = {     # of the commands: what each means, numbers with the values they may have
    "data_path": "the text, a file or a folder; project, tokenize: a folder of texts with latents",
    "out": "the file or folder to write",
    "tokenizer": "byte | char | gpt2 | rwkv | rwkv:FILE | bpe:FILE",
    "val_share": "[0, 1) share of the text that is held out, its end",
    "shard_tokens": "[1, 1e12] tokens in a file",
    "pattern": "names of the files of a folder that are read, several separated by commas",
    "vocab_size": "[257, 1e7] tokens: the bytes, the end of text, and what is learned",
    "dim": "[1, 1e6] numbers in a latent",
    "length": "[1, 1e7] characters in a text",
    "buckets": "[1, 1e7] features of a text before the projection",
    "max_length": "[1, 1e7] tokens of a text that are kept",
    "local_files_only": "0: a vocabulary may be downloaded",
    "name": "shakespeare | text8 | gpt2"}

def command(argv):
    """Run a command line, `COMMAND [--key=value ...]`."""
    if argv[:1] in (["-h"], ["--help"]):
        return print(f"{__doc__}\npython data.py COMMAND --help lists the options of {', '.join(COMMANDS)}")
    if not argv:
        raise SettingError(f"no command: choose one of {', '.join(COMMANDS)}; see python data.py --help")
    name, *rest = argv
    if name not in COMMANDS:
        near = nearest(name, COMMANDS)
        hint = f"did you mean {near!r}? " if near else ""
        raise SettingError(f"unknown command {name!r}: {hint}choose one of {', '.join(COMMANDS)}")
    call = COMMANDS[name]
    rows = {key: (p.default, OPTIONS[key]) for key, p in inspect.signature(call).parameters.items()}
    if "name" in rows and rest and not rest[0].startswith("-"):     # download shakespeare
        rest[0] = f"--name={rest[0]}"
    if "-h" in rest or "--help" in rest:
        print(f"python data.py {name}: {inspect.cleandoc(call.__doc__)}\n")
    ours = {key: os.environ[key] for key in ("DATA_PATH", "TOKENIZER") if key in os.environ}
    call(**configure(rows, argv=rest, env=ours, show=False).as_dict())

def main(argv):
    """A command line -> exit code: 0, or 2 after one line for what a user can cause."""
    try:
        with one_line_errors("what is finished is kept; the same command goes on or starts again"):
            command(argv)
    except SystemExit as end:
        return end.code or 0
    return 0

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
