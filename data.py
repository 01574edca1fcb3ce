"""Text files and synthetic tasks to batches of token ids. B batch, T time, V vocabulary.

A source (TextSource, TaskSource, PairSource: texts with latents) has a `tokenizer`, and gives rows of token ids with the positions
that may be masked: `train_rows` for one step, `eval_rows` for the held-out part. A row depends on nothing but the seed, the step and its place in
the global batch, so accumulation, several processes and a resumed run all see the same data.

    python data.py prepare --data_path=FILE_or_FOLDER --tokenizer=byte --out=FOLDER   much text to token files, in little memory
    python data.py train-bpe --data_path=FILE --vocab_size=4096 --out=FILE.json       a vocabulary for --tokenizer=bpe:FILE.json
    python data.py latents --data_path=FILE --out=FOLDER             texts with 32 latents each, made without any model
    python data.py project --data_path=FOLDER --out=FOLDER2          latents of an embedder's 1024 dimensions to 32
    python data.py tokenize --data_path=FOLDER2 --tokenizer=byte     their tokens
    python data.py download shakespeare                                               or text8, or gpt2 (its vocabulary)
"""
from configurator import stoppable

if __name__ == "__main__":
    stoppable()
import ast
import bisect
import codecs
import functools
import glob
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
from configurator import SettingError, Sink, UserError, configure, nearest, one_line_errors, reading, replace_file, written

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
        """Ids -> what each shows as, one printable character for byte and char (line ends as ⏎); of several ids that are one
        character together the first has it, the others are empty."""
        ids, cells = list(map(int, ids)), []
        while len(cells) < len(ids):
            rest = ids[len(cells):len(cells) + 4]
            shown = (self.decode(rest[:n]) for n in range(1, len(rest) + 1))
            n, text = next(((n, text) for n, text in enumerate(shown, 1) if "\ufffd" not in text), (1, self.decode(rest[:1])))
            cells += [visible(text).replace("\n", "⏎"), *[""] * (n - 1)]
        return cells

    def state(self):
        return {"kind": self.kind, "alphabet": self.alphabet, **self.codec.state}


CONTROLS = {i: 0x2400 + i for i in range(32) if chr(i) not in "\n\t"} | {127: 0x2421} | dict.fromkeys(range(128, 160), 0xfffd)


def visible(text):
    """Text as a terminal may show it: control characters as their pictures, but for line ends and tabs."""
    return text.translate(CONTROLS)


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


def one_line_end(text):
    """Line ends of every system -> those of Unix."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def record(path, line, number):
    """A line of a .jsonl file -> the text in it. ValueError if it is not an object with a text."""
    with reading(f"{path}, {number}", 'give lines such as {"text": "..."}'):
        found = json.loads(line)
        if not isinstance(found, dict) or not isinstance(found.get("text"), str):
            raise ValueError("it has no text")
        found["text"].encode()                                              # half of a surrogate pair is not text
        return one_line_end(found["text"])


def read_text(path):
    """A UTF-8 file, or with no path the source text of Python's own standard library, which every machine has -> (name, str).
    Of a .jsonl file the texts of its lines, a line end after each. A byte order mark is left out, line ends become \\n."""
    if not path:
        found, total = [], 0
        for f in sorted(Path(os.__file__).parent.glob("*.py")):
            if total < 2_000_000:
                found.append(f.read_text(encoding="utf-8", errors="replace"))
                total += len(found[-1])
        return "standard library", "".join(found)
    raw = Path(path).read_bytes()
    try:
        text = one_line_end(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as e:
        raise ValueError(f"{path} is not UTF-8 text (byte {e.start}): give a plain text file") from None
    if is_jsonl(path):
        lines = enumerate(text.split("\n"), 1)
        text = "".join(record(path, line, f"line {i}") + "\n" for i, line in lines if line.strip())
    return str(path), text


def is_jsonl(path):
    return str(path).lower().endswith(".jsonl")


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
    starts = np.arange(64)[:, None] * max(0, len(val) - 1024) // 63         # pieces from all over what is evaluated
    shown = val[starts + np.arange(min(1024, len(val)))].flatten().tolist() if getattr(tokenizer.codec, "found", True) else []
    return data_bin, tokenizer, train, val, per_token(tokenizer, [i for i in shown if i < tokenizer.vocab_size])


def per_token(tokenizer, ids):
    """A list of ids -> [characters, bytes] that one stands for on average; nan where no vocabulary tells."""
    if not ids:
        return [math.nan] * 2
    text = tokenizer.codec.decode(ids)
    return [len(text) / len(ids), len(text.encode()) / len(ids)]


def open_prepared(folder, tokenizer):
    """A folder of `python data.py prepare` -> what open_bins returns."""
    file = Path(folder, "meta.json")
    if not file.is_file():
        nanogpt = "; nanoGPT's train.bin and val.bin are read by --data_bin and --data_val_bin" * Path(folder, "train.bin").is_file()
        raise ValueError(f"{folder} has no meta.json: a folder of texts is prepared first, "
                         f"python data.py prepare --data_path={folder} --out=FOLDER, then --data_path=FOLDER{nanogpt}")
    with reading(folder, "its meta.json is damaged, prepare the text anew, into another folder"):
        meta = json.loads(file.read_bytes())
        if not {"tokenizer", "done", *SPLITS} <= meta.keys():
            raise UserError(f"{file} is not of `python data.py prepare`: prepare the text anew, into another folder")
        if not meta["done"]:
            raise UserError(f"{folder} is not finished: start `python data.py prepare` once more, it goes on where it was stopped")
        tokenizer, parts = agreed(tokenizer, meta["tokenizer"], folder), {}
        if meta["dtype"] not in ("uint16", "uint32"):
            raise ValueError(f"its numbers are {meta['dtype']!r}, not uint16 or uint32")
        for split in SPLITS:
            for name, n in meta[split]["shards"]:
                if not re.fullmatch(rf"{split}_\d+\.bin", name):
                    raise ValueError(f"{name!r} is not the name of a shard")
                if (size := os.path.getsize(Path(folder, name))) != n * np.dtype(meta["dtype"]).itemsize:
                    raise UserError(f"{folder}/{name} holds {size} bytes, not {n} tokens of {meta['dtype']}: prepare the folder again")
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
    cut = len(ids) * 9 // 10
    for cut in range(cut, min(cut + 4, len(ids))):         # a character has at most four parts: not within one
        if not tokenizer.codec.decode(ids[cut:cut + 8].tolist()).startswith("\ufffd"):
            break
    return name, tokenizer, ids[:cut], ids[cut:], per_token(tokenizer, ids[cut:].tolist())


class Rows(NamedTuple):
    """B rows of T tokens as sources give them; None where there is no such thing."""
    x: torch.Tensor                         # (B,T) int64 ids
    maskable: torch.Tensor                  # (B,T) bool
    lengths: Optional[torch.Tensor] = None  # (B,) real tokens, None where all rows are full
    z: Optional[torch.Tensor] = None        # (B,D) latents, rows of zeros for none

    def to(self, device):
        return Rows(*(part if part is None else part.to(device) for part in self))


class TextSource:
    """Text: a file in memory, a folder of `python data.py prepare`, or data_bin and data_val_bin, token files of others (read_bins).
    Rows are random windows of T tokens, any of which may be masked. tokenizer: a Tokenizer, a setting, or "" for what fits."""
    kind, objective, latent_dim, projection = "text", "masked_mean", 0, None

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
        """n windows spread evenly over the held-out part, each another (fewer, if it has fewer): always the same."""
        last = len(self.val) - self.T
        n = min(n, last + 1)
        return self.windows(self.val, torch.arange(n) * last // max(1, n - 1))

    def windows(self, ids, start):
        x = ids[start[:, None] + torch.arange(self.T)].long()
        return Rows(x, torch.ones_like(x, dtype=torch.bool))

    def report(self, batches):
        """Bounds, a list of (rows,) float64 nats per token -> val_loss, their mean, and bits per character, byte and token with
        standard errors."""
        nats, means = torch.cat(batches).mean().item(), torch.stack([b.mean() for b in batches])
        rows, disjoint = sum(map(len, batches)), len(self.val) // self.T        # as many windows share no token
        se = None                                  # a deviation of a few says nothing
        if min(disjoint, rows) >= 8:               # mask counts are stratified over a batch, so batches are independent
            se = means.std() / len(means) ** 0.5 if len(means) > 1 else batches[0].std() / rows**0.5
            se = se.item()
        found = {"val_loss": nats, "windows": rows, "disjoint": min(disjoint, rows)}
        for unit, per_token in (("char", self.chars_per_token), ("byte", self.bytes_per_token), ("token", 1)):
            if not math.isnan(per_token):          # token files without a vocabulary do not say how many characters they hold
                bits = 1 / math.log(2) / per_token
                found |= {f"bits_per_{unit}": nats * bits, f"bits_per_{unit}_se": None if se is None else se * bits}
        return found


class TaskSource:
    """A synthetic task of tasks.TASKS: only the answer may be masked. `params`: the task's, as tasks.params gives them.

    Rows are padded with # to T. The padding is told by `lengths`, not by its token, and the network passes it over; with `trim`,
    columns that are padding in every row are cut off, since they can change nothing. lengths is None where all rows are full.
    """
    kind, objective, latent_dim, projection = "task", "task", 0, None

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
        return Rows(ids[:, :longest], answer[:, :longest], lengths if lengths.min() < longest else None)

    def score(self, x, predicted, masked):
        """Accuracy and exact match of predicted answers, all (B,T) -> {NAME_acc: ..., NAME_exact: ...}."""
        found = tasks.score(self.name, self.params, *(z.cpu().numpy() for z in (x, predicted, masked)))
        return {f"{self.name}_{key}": value for key, value in found.items()}


def generator(seed, step, stream):
    """An independent random stream for each (seed, step, stream)."""
    state = np.random.SeedSequence([seed, step, stream]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


def has_pairs(folder):
    """Is it a folder of texts with latents?"""
    return bool(folder) and Path(folder, f"{PAIRS[0]}_data.json").is_file()


class Split(NamedTuple):
    """One split of a PairSource."""
    ids: np.ndarray          # (n,T) uint32
    lengths: torch.Tensor    # (n,)
    z: np.ndarray            # (n,D) float32
    use: torch.Tensor        # (m,) the rows that are there whole


class PairSource:
    """Texts with latents, a folder of `python data.py latents`, project and tokenize. Rows are whole texts, cut to T tokens, with their
    latents (D,) as they are in the files; a text whose entry has no latent_path has a row of zeros. All is read once, file by file, into
    temporary files that are mapped to memory: a set may be larger than that.

    use_latents=False leaves the latents out. skip_missing: entries whose latent file is missing are left out, and counted. ValueError for
    missing, truncated or pickled files, for NaN, latents of several dimensions, and token files of another number of texts.
    """
    kind, objective = "pairs", "stage1_coupling"
    chars_per_token = bytes_per_token = math.nan

    def __init__(self, folder, T, tokenizer="", use_latents=True, skip_missing=False):
        self.name, self.T = folder, T
        file = Path(folder, "tokenizer.json")
        if not file.is_file():
            raise ValueError(f"{folder} has no tokens yet: python data.py tokenize --data_path={folder}")
        with reading(folder, f"its tokenizer.json is damaged, python data.py tokenize --data_path={folder}"):
            self.tokenizer = agreed(tokenizer, json.loads(file.read_bytes()), folder)
        self.train, self.val = (self.read(folder, split, use_latents, skip_missing) for split in PAIRS)
        self.latent_dim = self.train.z.shape[1]
        if self.val.z.shape[1] != self.latent_dim or not len(self.train.use) or not len(self.val.use):
            raise ValueError(f"{folder}: {len(self.train.use)} training texts with latents of {self.latent_dim} dimensions, {len(self.val.use)} for "
                             f"validation with {self.val.z.shape[1]}: both must have texts, and latents of one dimension")
        file = Path(folder, "projection.npz")
        self.projection = load_array(file, Projection._fields) if file.is_file() and use_latents else None

    def read(self, folder, split, use_latents, skip_missing):
        """-> ids (n,T) uint32, lengths (n,), latents (n,D) float32, and which of the n rows to use: a Split."""
        entries = read_entries(folder, split)
        n, at, use, files = len(entries), 0, np.ones(len(entries), bool), sorted(Path(folder, split).glob("*.npz"))
        ids, lengths, z, lacking = mapped((n, self.T), np.uint32), np.zeros(n, np.int64), None, 0
        for f in files:
            x, mask = load_array(f, ("input_ids", "attention_mask"))
            mask = mask.astype(bool)
            if x.dtype.kind not in "iu" or x.size and x.min() < 0:
                raise ValueError(f"{f}: input_ids are {x.dtype}, or negative: make the tokens again")
            if x.shape != mask.shape or x.ndim != 2 or (mask[:, 1:] > mask[:, :-1]).any():
                raise ValueError(f"{f}: input_ids {x.shape} and attention_mask {mask.shape} must be (texts, tokens), padded at the end")
            if mask.any() and (most := x[mask].max()) >= self.tokenizer.vocab_size:
                raise past_vocabulary(f, most, int((x == most).argmax()), self.tokenizer.vocab_size)
            if at + len(x) <= n:
                ids[at:at + len(x), :x.shape[1]] = (x * mask)[:, :self.T]
                lengths[at:at + len(x)] = mask[:, :self.T].sum(1)
            at += len(x)
        if at != n:
            raise ValueError(f"{folder}/{split} holds tokens of {at} texts, {split}_data.json has {n}: "
                             f"python data.py tokenize --data_path={folder}")
        for at in range(0, n, SHARD) if use_latents else ():
            mine = [at + i for i, e in enumerate(entries[at:at + SHARD]) if e.get("latent_path")]
            kept, vectors, missing = read_vectors(folder, [entries[i] for i in mine], skip_missing)
            there = {id(e) for e in kept}
            use[[i for i in mine if id(entries[i]) not in there]] = False
            if len(vectors):
                z = mapped((n, vectors.shape[1]), np.float32) if z is None else z
                if z.shape[1] != vectors.shape[1]:
                    raise ValueError(f"{folder}: latents of {z.shape[1]} and of {vectors.shape[1]} dimensions: give one")
                z[[i for i in mine if use[i]]] = vectors
            lacking += missing
        if lacking:
            print(f"{folder}: {lacking} of {n} {split} texts are left out, their latent files are missing")
        z = np.zeros((n, 0), np.float32) if z is None else z
        return Split(ids, torch.from_numpy(lengths), z, torch.from_numpy(use & (lengths > 0)).nonzero()[:, 0])

    def rows(self, part, index):
        """-> ids (n,T) int64, maskable (n,T) bool, lengths (n,) or None where all rows are full, latents (n,D)."""
        index = part.use[index]
        lengths = part.lengths[index]
        longest = int(lengths.max())
        x = torch.from_numpy(part.ids[index.numpy(), :longest].astype(np.int64))
        z = torch.from_numpy(part.z[index.numpy()]) if part.z.shape[1] else None
        return Rows(x, torch.arange(longest) < lengths[:, None], None if lengths.min() == longest else lengths, z)

    def train_rows(self, step, B, lo, hi, seed):
        """Rows lo..hi of the global batch of B, drawn at random."""
        return self.rows(self.train, torch.randint(len(self.train.use), (B,), generator=generator(seed, step, 1))[lo:hi])

    def eval_rows(self, n, seed=None):
        """n texts spread evenly over the validation split (all, if it has fewer): always the same."""
        n, size = min(n, len(self.val.use)), len(self.val.use)
        return self.rows(self.val, torch.arange(n) * (size - 1) // max(1, n - 1))

    def moments(self):
        """-> mean (D,) of the training latents, and the root of their mean variance, over those that are there."""
        first, second, n = 0.0, 0.0, 0
        for index in self.train.use.split(SHARD):
            z = self.train.z[index.numpy()].astype(np.float64)
            z = z[(z != 0).any(1)]
            first, second, n = first + z.sum(0), second + (z**2).sum(0), n + len(z)
        mean = first / max(1, n)
        return torch.as_tensor(mean, dtype=torch.float32), torch.tensor(max(1e-12, float((second / max(1, n) - mean**2).mean())) ** 0.5)


def mapped(shape, kind):
    """An array in an unnamed temporary file, which the system drops when nobody uses it any more."""
    return np.memmap(tempfile.TemporaryFile(), kind, "w+", shape=shape) if math.prod(shape) else np.zeros(shape, kind)


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


def text_files(data_path, pattern="*.txt,*.md,*.jsonl"):
    """A file, or those below a folder whose names fit one of the patterns, in order -> [[path, size, time]], which tells whether
    any of them changed."""
    if not data_path:
        raise ValueError("--data_path is missing: give a text file, or a folder with texts")
    files = [str(data_path)]
    if os.path.isdir(data_path):
        fits = lambda f: any(fnmatch(f.name.lower(), p.strip().lower()) for p in pattern.split(","))
        files = sorted(str(f) for f in Path(data_path).rglob("*") if f.is_file() and fits(f))
    found = [[f, os.stat(f).st_size, os.stat(f).st_mtime_ns] for f in files]
    if not any(size for _, size, _ in found):
        raise ValueError(f"{data_path} holds no text: give a text file that is not empty, or a folder with files like {pattern} "
                         "(--pattern chooses others)")
    return found


def left_out(data_path, found, pattern):
    """Say which files of a folder are not read."""
    taken = {f for f, _, _ in found}
    if others := sorted(str(f) for f in Path(data_path).rglob("*") if f.is_file() and str(f) not in taken):
        shown = ", ".join(others[:3]) + f" and {len(others) - 3} more" * (len(others) > 3)
        print(f"left out, since their names do not fit --pattern={pattern}: {shown}")


def pieces(path, begin, end, tokenizer=None):
    """Bytes begin..end of a UTF-8 file, PIECE at a time (of a .jsonl file, a line) -> (offset, bytes read, text), or with a tokenizer
    (offset, bytes read, ids, text). The ids are those of the whole text: a piece ends where what follows cannot change them."""
    if is_jsonl(path):
        yield from records(path, begin, end, tokenizer)
        return
    with open(path, "rb") as f:
        while begin < end:
            f.seek(begin)
            raw = f.read(min(PIECE, end - begin))
            last = begin + len(raw) >= end
            raw = raw[:-1] if raw.endswith(b"\r") and not last else raw      # its other half may follow
            try:
                text, n = codecs.utf_8_decode(raw, "strict", last)
            except UnicodeDecodeError as e:
                raise ValueError(f"{path} is not UTF-8 text (byte {begin + e.start}): give a plain text file") from None
            if not raw:
                raise ValueError(f"{path} ended at byte {begin} of {end}: it must not change while it is read")
            whole, text = text, one_line_end(text)
            if not tokenizer:
                yield begin, n, text
            else:
                ids, used = (tokenizer.encode(text), len(text)) if last else tokenizer.codec.encode_part(text)
                if used < len(text):                                        # \r\n became one character
                    pairs = [m.start() - k for k, m in enumerate(re.finditer("\r\n", whole))]
                    n = len(whole[:used + bisect.bisect_left(pairs, used)].encode())
                yield begin, n, ids, text[:used]
            begin += n


def records(path, begin, end, tokenizer=None):
    """The same for a .jsonl file. After each text comes the end of text, or a line end where the tokenizer has none."""
    with open(path, "rb") as f:
        f.seek(begin)
        while begin < end:
            line = f.readline()
            if not line:
                raise ValueError(f"{path} ended at byte {begin} of {end}: it must not change while it is read")
            eot = tokenizer.eot_id if tokenizer else None
            text = record(path, line, f"byte {begin}") + "\n" * (eot is None) if line.strip() else ""
            if not tokenizer:
                yield begin, len(line), text
            else:
                yield begin, len(line), np.append(tokenizer.encode(text), [eot] * (eot is not None and bool(line.strip()))), text
            begin += len(line)


def read_all(found, what):
    """The text of every piece of the files, with a progress bar."""
    with tqdm(total=sum(size for _, size, _ in found), unit="B", unit_scale=True, desc=what) as bar:
        for f, size, _ in found:
            for _, n, text in pieces(f, start_of(f), size):
                yield text
                bar.update(n)


def start_of(path):
    """Where the text of a file begins: after a byte order mark."""
    with open(path, "rb") as f:
        return 3 if f.read(3) == codecs.BOM_UTF8 else 0


def regions(found, val_share):
    """[path, size, time] of each file -> {split: [(path, begin, end)]}: the last val_share of all bytes is held out."""
    at, cut, out = 0, int(sum(size for _, size, _ in found) * (1 - val_share)), {split: [] for split in SPLITS}
    for path, size, _ in found:
        begin = start_of(path)
        here = min(max(cut - at, begin), size)
        with open(path, "rb") as f:
            if begin < here < size and is_jsonl(path):                      # not within a line
                f.seek(here - 1)
                f.readline()
                here = f.tell()
            elif begin < here < size:                                       # not within a character, nor a line end
                f.seek(here - 1)
                before, *after = f.read(5)
                here += next((i for i, byte in enumerate(after) if byte & 0xC0 != 0x80), 0)
                here += before == 13 and after[0] == 10
        out["train"] += [(path, begin, here)] * (here > begin)
        out["val"] += [(path, here, size)] * (here < size)
        at += size
    return out


def prepare(data_path="", tokenizer="", out="", val_share=0.1, shard_tokens=100_000_000, pattern="*.txt,*.md,*.jsonl"):
    """Text of any size -> folder `out` of token shards and meta.json, in bounded memory. Stopped, it goes on from its last shard.

    tokenizer: byte (the default), char, gpt2, rwkv, rwkv:FILE or bpe:FILE. Of a folder those files are read whose names fit the
    pattern; of .jsonl files the "text" of each line. Line ends become \\n, a byte order mark is left out. After each file of a
    folder and each text of a .jsonl file comes the end of text, if the tokenizer has one.
    """
    if not out:
        raise ValueError("--out is missing: give the folder to write")
    found = text_files(data_path, pattern)
    if os.path.isdir(data_path):
        left_out(data_path, found, pattern)
    file, settings = Path(out, "meta.json"), dict(val_share=val_share, shard_tokens=shard_tokens)
    if file.exists():
        with reading(file, f"delete {out}, or give another --out"):
            meta = json.loads(file.read_bytes())
            if not {"source", "settings", "tokenizer", "dtype", *SPLITS} <= meta.keys():
                raise ValueError("it is not of `python data.py prepare`")
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
        try:
            for split, parts in regions(found, val_share).items():
                write_split(out, split, parts, tok, meta, len(found) > 1, save, bar)
        finally:
            Path(out, "shard.tmp").unlink(missing_ok=True)
    if text_files(data_path, pattern) != found:
        raise ValueError(f"{data_path} changed while it was read: delete {out} and start again")
    meta["done"] = True
    save()
    n, seconds = sum(meta[split]["tokens"] for split in SPLITS), time.perf_counter() - begun
    print(f"{out}: {meta['train']['tokens']:,} training and {meta['val']['tokens']:,} held-out tokens in {meta['dtype']}, vocabulary "
          f"{tok.vocab_size:,}, {(n - before) / seconds:,.0f} tokens/s; try: python train.py --data_path={out}")


def write_split(out, split, parts, tok, meta, several, save, bar):
    """The shards of one split, from mine["at"] = [region, offset of a piece, tokens of it already written] on."""
    mine, full, shard = meta[split], meta["settings"]["shard_tokens"], None
    first, offset, skip = mine["at"]

    def finish(at):
        nonlocal shard
        name = f"{split}_{len(mine['shards']):06d}.bin"
        shard.finish(Path(out, name))
        n, shard = shard.size // np.dtype(meta["dtype"]).itemsize, None
        mine.update(shards=mine["shards"] + [[name, n]], tokens=mine["tokens"] + n, at=at)
        save()

    bar.update(sum(end - begin for _, begin, end in parts[:first]))
    for i, (path, begin, end) in list(enumerate(parts))[first:]:
        bar.update(max(0, offset - begin))
        for at, n, ids, text in pieces(path, offset or begin, end, tok):
            if several and tok.eot_id is not None and at + n == os.path.getsize(path) and not is_jsonl(path):
                ids = np.append(ids, tok.eot_id)
            while skip < len(ids):
                if not shard:
                    shard, room = Sink(Path(out, "shard")), full
                some = ids[skip:skip + room].astype(meta["dtype"])
                shard.write(some.tobytes())
                skip, room = skip + len(some), room - len(some)
                if not room:
                    finish([i, at, skip])                                   # mine["chars"] are those before this piece, as a rerun needs
            mine["chars"] += len(text)
            mine["bytes"] += len(text.encode())
            bar.update(n)
            skip = 0
        offset = 0
    if shard:
        finish([len(parts), 0, 0])
    mine["at"] = [len(parts), 0, 0]
    save()


# ---- texts with latent vectors, in the layout of DiffRwkv ----------------------------------------------------------------
# DIR/train_data.json            [{"text": ..., "latent_path": "latents/train/000000.npy"}, ...]; DIR/validation_data.json likewise
# DIR/latents/train/*.npy        one vector each
# DIR/train/*.npz                input_ids and attention_mask (n,T), the rows in the order of the JSON file; DIR/tokenizer.json whose ids they are
# DIR/projection.npz             mean (F,), components (F,D) and scale that made the latents of F features

PAIRS = ("train", "validation")
SHARD = 4096                                                                # rows of a token file, and of what is in memory at a time


class Projection(NamedTuple):
    """F features -> D latents, by the principal components of a training set: (x - mean) components / scale, scale such that the mean
    variance of a latent is 1 (one for all, so that distances stay what they are)."""
    mean: np.ndarray
    components: np.ndarray
    scale: np.ndarray

    def __call__(self, x):
        return ((x - self.mean) @ self.components / self.scale).astype(np.float32)


def fit_projection(chunks, dim):
    """Chunks (n,F) of a training set, read once, in any number -> its Projection to `dim` latents. ValueError if it has fewer."""
    n, first, second = 0, 0.0, 0.0
    for x in chunks:
        x = np.asarray(x, np.float64)
        n, first, second = n + len(x), first + x.sum(0), second + x.T @ x
    if n <= dim or np.size(first) < dim:
        raise ValueError(f"dim={dim} latents from {n} vectors of {np.size(first)} features: give more texts, or a smaller --dim")
    values, vectors = np.linalg.eigh(second / n - np.outer(first / n, first / n))
    values, vectors = values[::-1][:dim], vectors[:, ::-1][:, :dim]
    vectors = vectors * np.sign(vectors[np.abs(vectors).argmax(0), np.arange(dim)])          # eigenvectors have no sign of their own
    return Projection((first / n).astype(np.float32), vectors.astype(np.float32), np.float32(max(values.mean(), 1e-12) ** 0.5))


def load_array(path, keys=None):
    """A .npy array, or the arrays `keys` of a .npz. ValueError in one line for what is missing, truncated, compressed, claims more than
    the file holds, or would run code."""
    if not os.path.isfile(path):
        raise ValueError(f"{path} does not exist")
    with reading(path, "it is truncated or damaged, make it again"):
        if keys is None:
            with open(path, "rb") as f:
                return read_npy(f, os.path.getsize(path))
        with zipfile.ZipFile(path) as z:
            found = []
            for key in keys:
                if f"{key}.npy" not in z.namelist():
                    raise ValueError(f"{path} must hold {' and '.join(keys)}: make it again")
                member = z.getinfo(f"{key}.npy")
                if member.compress_type != zipfile.ZIP_STORED or member.file_size > os.path.getsize(path):
                    raise ValueError("it is compressed, write it with numpy.savez")
                with z.open(member) as f:
                    found.append(read_npy(f, member.file_size))
            return found


def read_npy(f, size):
    """An open .npy file of `size` bytes -> its numbers; what it claims to hold must be what it holds."""
    version = np.lib.format.read_magic(f)
    header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
    shape, _, dtype = header(f)
    if dtype.kind not in "fiub":
        raise ValueError("it is not an array of numbers, or one of pickled objects, which are never loaded")
    if f.tell() + math.prod(shape) * dtype.itemsize != size:
        raise ValueError(f"it claims {dtype} {shape} and holds {size} bytes: it is truncated or damaged")
    f.seek(0)
    return np.load(f, allow_pickle=False)


def ngrams(texts, buckets):
    """Texts -> (n,buckets) float32: how often words and runs of 2 to 4 characters occur, hashed, as log(1 + count), each row of length 1."""
    out = np.zeros((len(texts), buckets), np.float32)
    for row, text in zip(out, texts):
        low = f" {' '.join(text.lower().split())} "
        grams = [low[i:i + n] for n in (2, 3, 4) for i in range(len(low) - n + 1)] + low.split()
        row += np.bincount([zlib.crc32(g.encode()) % buckets for g in grams], minlength=buckets)
    out = np.log1p(out)
    return out / np.maximum(np.linalg.norm(out, axis=1, keepdims=True), 1e-9)


def passages(parts, length):
    """Regions of files -> the texts in them, each of `length` characters; what is left over at the end of a region is dropped."""
    for path, begin, end in parts:
        rest = ""
        for _, _, text in pieces(path, begin, end):
            rest += text
            cut = len(rest) // length * length
            yield from (rest[i:i + length] for i in range(0, cut, length))
            rest = rest[cut:]


def in_chunks(items, n=SHARD):
    items = iter(items)
    while chunk := list(itertools.islice(items, n)):
        yield chunk


def write_pairs(out, split, chunks):
    """(texts, latents (n,D)) chunk by chunk -> the JSON file and the .npy files of a split; the JSON file comes last -> how many."""
    n, folder = 0, Path(out, "latents", split)
    folder.mkdir(parents=True, exist_ok=True)
    with written(Path(out, f"{split}_data.json")) as f:
        for texts, vectors in chunks:
            for text, vector in zip(texts, vectors):
                np.save(folder / f"{n:06d}.npy", vector.astype(np.float32))
                entry = json.dumps({"text": text, "latent_path": f"latents/{split}/{n:06d}.npy"}, ensure_ascii=False)
                f.write(((",\n" if n else "[\n") + entry).encode())
                n += 1
        f.write(b"\n]\n" if n else b"[]\n")
    return n


def save_projection(out, projection):
    content = io.BytesIO()
    np.savez(content, **projection._asdict())
    replace_file(Path(out, "projection.npz"), content.getvalue())


def latents(data_path="", out="", dim=32, length=128, tokenizer="byte", val_share=0.1, buckets=2048):
    """Latents without any model: passages of `length` characters of a text (default: Python's standard library), their hashed n-grams, and
    the `dim` principal components of those -> folder `out` with texts, latents and tokens. The last val_share of the text is held out."""
    if not out or buckets < dim:
        raise ValueError(f"out={out!r}, dim={dim}, buckets={buckets}: give the folder to write as --out, and as many buckets as latents")
    os.makedirs(out, exist_ok=True)
    if not data_path:
        data_path = str(Path(out, "text.txt"))
        replace_file(data_path, read_text("")[1].encode())
    parts = regions(text_files(data_path), val_share)
    features = lambda split: ((texts, ngrams(texts, buckets)) for texts in in_chunks(passages(parts[split], length)))
    projection = fit_projection((x for _, x in tqdm(features("train"), desc="n-grams", unit="chunk")), dim)
    counts = [write_pairs(out, to, ((texts, projection(x)) for texts, x in tqdm(features(split), desc=f"{to} latents", unit="chunk")))
              for split, to in zip(SPLITS, PAIRS)]
    save_projection(out, projection)
    print(f"{out}: {counts[0]:,} training and {counts[1]:,} validation texts with {dim} latents each")
    tokenize(out, tokenizer, length)


def project(data_path="", out="", dim=32):
    """Vectors of many dimensions (a text embedder's 1024) in this layout -> the same texts with `dim` principal components of them in folder
    `out`. The components are fitted on the training split alone."""
    if not out or os.path.realpath(out) == os.path.realpath(data_path):
        raise ValueError(f"data_path={data_path!r}, out={out!r}: give the folder to read, and another one to write as --out")
    chunks = {split: lambda split=split: (read_vectors(data_path, part)[:2] for part in in_chunks(read_entries(data_path, split)))
              for split in PAIRS}
    projection = fit_projection((x for _, x in tqdm(chunks["train"](), desc="components", unit="chunk")), dim)
    os.makedirs(out, exist_ok=True)
    counts = [write_pairs(out, split, (([e["text"] for e in part], projection(x)) for part, x in chunks[split]())) for split in PAIRS]
    save_projection(out, projection)
    print(f"{out}: {counts[0]:,} training and {counts[1]:,} validation texts, {len(projection.mean)} dimensions to {dim}; "
          f"try: python data.py tokenize --data_path={out}")


def tokenize(data_path="", tokenizer="byte", max_length=128, local_files_only=True):
    """The texts of a folder in this layout -> token files beside them (at most max_length tokens of each). Nothing is downloaded unless
    local_files_only=0 allows it, and then only a vocabulary that is not on the machine."""
    if tokenizer == "gpt2" and not local_files_only:
        download("gpt2")
    texts = {split: [entry["text"] for entry in read_entries(data_path, split)] for split in PAIRS}
    tok = Tokenizer(tokenizer, alphabet(*texts["train"], *texts["validation"]) if tokenizer == "char" else "")
    tok.encode("")
    for split, mine in texts.items():
        folder = Path(data_path, split)
        folder.mkdir(exist_ok=True)
        for old in folder.glob("*.npz"):
            if re.fullmatch(r"\d{6}\.npz", old.name):                       # what this command writes, nothing else
                old.unlink()
        for i, part in enumerate(in_chunks(tqdm(mine, desc=f"{split} tokens", unit="text"))):
            rows = [tok.encode(text)[:max_length] for text in part]
            ids, mask = np.zeros((len(rows), max_length), np.uint32), np.zeros((len(rows), max_length), bool)
            for row, (x, m) in zip(rows, zip(ids, mask)):
                x[:len(row)], m[:len(row)] = row, True
            np.savez(folder / f"{i:06d}.npz", input_ids=ids, attention_mask=mask)
    replace_file(Path(data_path, "tokenizer.json"), json.dumps(tok.state()).encode())
    print(f"{data_path}: {len(texts['train']):,} + {len(texts['validation']):,} texts of at most {max_length} {tok.kind} tokens, vocabulary "
          f"{tok.vocab_size:,}")


def read_entries(folder, split):
    """The entries of DIR/SPLIT_data.json, a list of {"text": ..., "latent_path": ...}."""
    file = Path(folder, f"{split}_data.json")
    if not file.is_file():
        raise ValueError(f"{file} does not exist: `python data.py latents --data_path=TEXT --out={folder}` makes such a folder")
    with reading(file, "make it again"):
        entries = json.loads(file.read_text(encoding="utf-8-sig"))
    good = lambda e: isinstance(e, dict) and isinstance(e.get("text"), str) and isinstance(e.get("latent_path") or "", str)
    if not isinstance(entries, list) or not all(map(good, entries)):
        raise ValueError(f'{file} must be a list of entries such as {{"text": "...", "latent_path": "latents/{split}/000000.npy"}}')
    for name in filter(None, (e.get("latent_path") for e in entries)):
        if os.path.isabs(name) or ".." in Path(name).parts or "\0" in name:
            raise ValueError(f"{file}: latent_path={name!r} leaves the folder: give paths below {folder}")
    return entries


def read_vectors(folder, entries, skip_missing=False):
    """-> (entries with a latent file, their vectors (n,D) float32, how many are without). ValueError for entries without one, unless they
    may be skipped, for vectors of several lengths, and for NaN."""
    path = lambda entry: entry.get("latent_path") and Path(folder, entry["latent_path"])
    lacking = [str(path(e) or f"entry {i} has no latent_path") for i, e in enumerate(entries) if not path(e) or not path(e).is_file()]
    if lacking and not skip_missing:
        raise ValueError(f"{len(lacking)} of {len(entries)} entries have no latent file ({', '.join(lacking[:3])}{', ...' * (len(lacking) > 3)}): "
                         "make them, or leave those texts out with --skip_missing=1")
    entries = [e for e in entries if path(e) and path(e).is_file()]
    vectors = [load_array(path(e)) for e in entries]
    for e, v in zip(entries, vectors):
        if v.ndim != 1 or v.shape != vectors[0].shape:
            raise ValueError(f"{path(e)} has shape {v.shape}, {path(entries[0])} has {vectors[0].shape}: give vectors of one dimension")
        if not np.isfinite(v).all():
            raise ValueError(f"{path(e)} holds NaN or infinite numbers: make it again")
    return entries, np.stack(vectors).astype(np.float32) if vectors else np.zeros((0, 0), np.float32), len(lacking)


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


DOWNLOADS = {   # name -> address, size and sha256 of what is fetched, size of the text
    "shakespeare": ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt", 1_115_394,
                    "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed", 1_115_394),
    "text8": ("https://mattmahoney.net/dc/text8.zip", 31_344_016,
              "a6640522afe85d1963ad56c05b0ede0a0c000dddc9671758a6cc09b7a38e5232", 100_000_000)}


def download(name="", out=""):
    """Fetch a text, check it, and write it to `out` (NAME.txt); or gpt2, the vocabulary, to tiktoken's cache."""
    if name == "gpt2":
        try:
            return print(f"gpt2: {GPT2().encoding.n_vocab} tokens, in tiktoken's cache")
        except Exception as e:                                              # whatever its HTTP library raises
            raise ValueError(f"cannot fetch the gpt2 vocabulary ({type(e).__name__}): is there a network?") from None
    if name not in DOWNLOADS:
        raise ValueError(f"download {name!r} is unknown: choose one of {', '.join([*DOWNLOADS, 'gpt2'])}")
    address, size, digest, text_size = DOWNLOADS[name]
    out, got = out or f"{name}.txt", bytearray()
    try:
        with urllib.request.urlopen(address, timeout=30) as r, tqdm(total=size, unit="B", unit_scale=True, desc=name) as bar:
            while len(got) <= size and (block := r.read(1 << 16)):
                got += block
                bar.update(len(block))
    except OSError as e:
        raise ValueError(f"cannot fetch {address} ({getattr(e, 'reason', e)}): is there a network? Or fetch it elsewhere") from None
    if len(got) != size or hashlib.sha256(got).hexdigest() != digest:
        raise ValueError(f"{address} gave {len(got)} bytes{' or more' * (len(got) > size)}, not the {size} with the sha256 expected: "
                         "try again later")
    text = bytes(got)
    if zipfile.is_zipfile(io.BytesIO(text)):
        with zipfile.ZipFile(io.BytesIO(text)) as z, z.open(z.namelist()[0]) as f:
            text = f.read(text_size + 1)
    if len(text) != text_size:
        raise ValueError(f"{address} unpacks to {len(text)} bytes, not {text_size}: try again later")
    replace_file(out, text)
    print(f"{out}: {text_size:,} bytes, sha256 as expected; try: python train.py --data_path={out}")


COMMANDS = {"prepare": prepare, "train-bpe": train_bpe, "latents": latents, "project": project, "tokenize": tokenize,
            "download": download}


OPTIONS = {   # of the commands: what each means, numbers with the values they may have
    "data_path": "the text, a file or a folder; project, tokenize: a folder of texts with latents", "out": "the file or folder to write",
    "tokenizer": "byte | char | gpt2 | rwkv | rwkv:FILE | bpe:FILE", "val_share": "[0, 1) share of the text that is held out, its end",
    "shard_tokens": "[1, 1e12] tokens in a file", "pattern": "names of the files of a folder that are read, several separated by commas",
    "vocab_size": "[257, 1e7] tokens: the bytes, the end of text, and what is learned", "dim": "[1, 1e6] numbers in a latent",
    "length": "[1, 1e7] characters in a text", "buckets": "[1, 1e7] features of a text before the projection",
    "max_length": "[1, 1e7] tokens of a text that are kept", "local_files_only": "0: a vocabulary may be downloaded",
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
        raise SettingError(f"unknown command {name!r}: " + (f"did you mean {near!r}? " if near else "")
                           + f"choose one of {', '.join(COMMANDS)}")
    call = COMMANDS[name]
    rows = {key: (p.default, OPTIONS[key]) for key, p in inspect.signature(call).parameters.items()}
    if "name" in rows and rest and not rest[0].startswith("-"):             # download shakespeare
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
