"""Text files and synthetic tasks to batches of token ids. B batch, T time, V vocabulary.

A source (TextSource, TaskSource) has a `tokenizer`, and gives rows of token ids with the positions that may be masked:
`train_rows` for one step, `eval_rows` for the held-out part. A row depends on nothing but the seed, the step and its place in
the global batch, so accumulation, several processes and a resumed run all see the same data.
"""
import itertools
import random

import numpy as np
import torch

import tasks


class Tokenizer:
    """Text <-> ids. kind: `byte` (UTF-8 bytes, V = 256) or `char` (one id a character; `alphabet` holds them in order)."""

    def __init__(self, kind, alphabet=""):
        if kind not in KINDS:
            raise ValueError(f"tokenizer={kind!r} is unknown: choose one of {', '.join(KINDS)}")
        self.kind, self.alphabet = kind, alphabet
        self.ids = {c: i for i, c in enumerate(alphabet)}
        self.vocab_size = len(alphabet) if kind == "char" else 256

    def encode(self, text):
        """str -> 1-D array of ids; ValueError names a character that is not in the alphabet."""
        if self.kind == "byte":
            return np.frombuffer(text.encode(), np.uint8)
        if strange := sorted(set(text) - self.ids.keys()):
            raise ValueError(f"character {strange[0]!r} is not in the vocabulary of {self.vocab_size} characters: "
                             "leave it out, or train with --tokenizer=byte, which knows every character")
        return np.fromiter(map(self.ids.__getitem__, text), np.int32, len(text))

    def decode(self, ids):
        """Ids (a mask id shows as _) -> str."""
        ids = [int(i) for i in ids]
        if self.kind == "byte":
            return b"".join(bytes([i]) if i < 256 else b"_" for i in ids).decode(errors="replace")
        return "".join(self.alphabet[i] if i < self.vocab_size else "_" for i in ids)

    def characters(self, ids):
        """Ids -> one printable character each (line ends as ⏎)."""
        return [self.decode([i]).replace("\n", "⏎") for i in ids]

    def state(self):
        """What a checkpoint keeps of it: Tokenizer(**state) is the same one."""
        return {"kind": self.kind, "alphabet": self.alphabet}


KINDS = ("byte", "char")


class TextSource:
    """One text file; the last 10 % are held out. Rows are random windows of T tokens, any of which may be masked."""
    objective = "masked_mean"

    def __init__(self, path, T, tokenizer="byte"):
        try:
            with open(path, encoding="utf-8") as f:
                text = f.read()
        except UnicodeDecodeError as e:
            raise ValueError(f"{path} is not UTF-8 text (byte {e.start}): give a plain text file") from None
        self.T, self.name = T, str(path)
        if isinstance(tokenizer, str):
            tokenizer = Tokenizer(tokenizer, "".join(sorted(set(text))) if tokenizer == "char" else "")
        self.tokenizer = tokenizer
        ids = torch.from_numpy(tokenizer.encode(text).astype(np.int32))
        cut = len(ids) * 9 // 10
        self.train, self.val = ids[:cut], ids[cut:]
        if len(self.val) < T:
            raise ValueError(f"{path} holds {len(ids)} tokens, too few: the held-out last 10 % must hold seq_len={T}; "
                             f"give a text of at least {10 * T} tokens, or a smaller --seq_len")
        self.chars_per_token = len(text) / len(ids)

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

    Rows are padded with # to T. The padding is told by `lengths`, not by its token, and the network passes it over; columns
    that are padding in every row are cut off, since they can change nothing. lengths is None where all rows are then full.
    """
    objective = "task"

    def __init__(self, name, params, T):
        tasks.check(name, params, T)
        self.name, self.params, self.T = name, params, T
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
        longest = int(lengths.max())
        return ids[:, :longest], answer[:, :longest], lengths if lengths.min() < longest else None


def generator(seed, step, stream):
    """An independent random stream for each (seed, step, stream)."""
    state = np.random.SeedSequence([seed, step, stream]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


def make_batches(source, objective, schedule, stratified, B, device_bsz, seed, start=0, rank=0, world=1):
    """Endless: for each step from `start`, this process's micro-batches, a list of (x, masked, weight, lengths), and the
    denominator of its loss. Noise is drawn for the whole global batch of B rows, of which rank takes its share.

    objective: a row of diffusion.OBJECTIVES; stratified: diffusion.stratified. lengths is None where all rows are full.
    """
    lo, hi = rank * B // world, (rank + 1) * B // world
    for step in itertools.count(start):
        x, maskable, lengths = source.train_rows(step, B, lo, hi, seed)
        g = generator(seed, step, 0)
        t, noise = stratified(B, g)[lo:hi], torch.rand(B, source.T, generator=g)[lo:hi, :x.shape[1]]
        masked, weight, denominator = objective(maskable, t, noise, schedule)
        weight = torch.as_tensor(weight).expand(masked.shape)
        yield list(split(device_bsz, x, masked, weight, lengths)), denominator


def split(n, *tensors):
    """Micro-batches of n rows of tensors that belong together; None stays None."""
    return zip(*(itertools.repeat(None) if z is None else z.split(n) for z in tensors))


def side_by_side(tokenizer, target, masked, pred, width=10**6):
    """IN, GT and PR of one row, `width` characters around its mask, and ^ under what is wrong. All (T,)."""
    first = int(masked.nonzero()[0]) if masked.any() else 0
    start = max(0, min(first - width // 4, len(target) - width))
    line = lambda ids: "".join(tokenizer.characters(ids[start:start + width]))
    marks = "".join(" ^"[int(w)] for w in (pred != target)[start:start + width]).rstrip()
    hidden = target.masked_fill(masked, tokenizer.vocab_size)
    return "\n".join([f"  IN {line(hidden)}", f"  GT {line(target)}", f"  PR {line(pred)}"] + [f"     {marks}"] * bool(marks))
