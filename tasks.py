"""Synthetic tasks: rows of text in which masked characters must be filled in, mostly from what comes later.
Each task is one row of TASKS; nothing else in the repository knows a task's name.

    python tasks.py            prints an example of every task, ^ under the masked characters
    python tasks.py struct     prints that one

Letters: B rows, T characters in a row, p a task's parameters. A character's id is its place in the task's
alphabet; len(alphabet) is the mask, shown as "_". Rows are padded on the right with "#"."""
import functools, itertools, random, re, sys, zlib
from types import SimpleNamespace
from typing import Callable, NamedTuple

import numpy as np

from configurator import one_line_errors

DIGITS, LETTERS = "0123456789", "abcdefghijklmnopqrstuvwxyz"
SETS = DIGITS + LETTERS + "PMRO=:;|#"
SPLITS = ("train", "eval")
MOST = 10**9 + 1   # stands for "no upper limit" in a range of allowed values

# ---- building rows. The order of the draws is part of a task: it fixes the published runs' evaluation sets.
def digits(rng, n, base=10):
    return "".join(str(rng.randint(0, base - 1)) for _ in range(n))

def masked(before, answer, after=""):
    """The row before + answer + after, and the positions of answer."""
    return before + answer + after, range(len(before), len(before) + len(answer))

def two_fields(layout):
    """The sampler of a row made of two strings of digits: layout(a, b) -> before, answer, after."""
    return lambda rng, p, split: masked(*layout(digits(rng, p.len), digits(rng, p.len)))

# ---- digits: the answer follows from the other fields of the row
def add(rng, p, split):
    a, b = digits(rng, p.len), digits(rng, p.len)
    total, i = str(int(a) + int(b)).zfill(p.len + 1), (p.len + 1 - p.mask_len) // 2
    return masked(f"{a}+{b}={total[:i]}", total[i:i + p.mask_len], total[i + p.mask_len:])

def index(rng, p, split):
    a = digits(rng, p.len)
    i = rng.randint(0, p.len - 4)
    y = a[i:i + 4]
    return masked(f"A={a}|Y=", y, f"|I={i},{i + 3}") if p.y_first else masked(f"A={a}|I={i},{i + 3}|Y=", y)

def reverse(rng, p, split):
    n = rng.randint(1, p.digit_max)
    a = str(rng.randint(0 if n == 1 else 10 ** (n - 1), 10**n - 1))
    return masked(a + ",", a[::-1])

def bidir(rng, p, split):
    a, b = digits(rng, p.len, p.base), digits(rng, p.len, p.base)
    return masked(f"{a}|", "".join(str((int(i) + int(j)) % p.base) for i, j in zip(a, b)), f"|{b}")

def perm(rng, p, split):
    a, order = digits(rng, p.len), list(range(p.len))
    rng.shuffle(order)
    return masked("P=" + "".join(map(str, order)) + "|Y=" + "".join(a[i] for i in order) + "|A=", a)

def parity(rng, p, split):
    x = digits(rng, p.block * p.blocks, base=2)
    sums = (str(x[i:i + p.block].count("1") % 2) for i in range(0, len(x), p.block))
    return f"X={x}|P=" + "".join(sums), range(2 + p.mask_pos, 2 + len(x), p.block)

def retr(rng, p, split):
    value = {key: digits(rng, p.vlen) for key in LETTERS[:p.k]}
    question = rng.choice(LETTERS[:p.k])
    return masked(";".join(f"{k}={v}" for k, v in value.items()) + "|ANS=", value[question], f"|Q={question}")

def constr(rng, p, split):
    prefix, d1, d2 = digits(rng, p.len), digits(rng, 1), digits(rng, 1)
    return masked(f"P={prefix}|M=", (prefix[-1] + (d1 + d2) * p.len)[:p.len], f"|R={d1}{d2}")

# ---- sets: the answer is the right-hand side, sorted by the order given there; evaluated on other sizes
def draw_set(rng, p, split, extra=0):
    """Keys of a set, then `extra` more, and an order of all the other keys of the pool."""
    pool = (DIGITS + LETTERS)[:p.keys]
    count = rng.randint(p.n_min, p.n_max) if split == "train" else p.n_test
    drawn = rng.sample(pool, count + extra)
    order = rng.sample(pool, p.keys) if p.use_order else pool
    return drawn[:count], drawn[count:], [key for key in order if key not in drawn[count:]]

def set_row(p, answer, order, right):
    shown = "O=" + "".join(order) + ";" if p.use_order else ""
    return masked("P=" + "#" * p.pad + "|M=", answer, "|R=" + shown + right)

def kvsort(rng, p, split):
    keys, noise, order = draw_set(rng, p, split, p.noise)   # the order leaves the noise out: one right answer
    pair = {key: key + ":" + rng.choice(LETTERS) for key in keys + noise}
    answer = [key if p.keys_only else pair[key] for key in sorted(keys, key=order.index)]
    right = ";".join(pair[key] for key in rng.sample(keys + noise, len(pair)))
    separator = "" if p.keys_only and not p.keys_sep else ";"
    return set_row(p, separator.join(answer), order, right)

def permfill(rng, p, split):
    items, _, order = draw_set(rng, p, split)
    text, answer = set_row(p, "".join(sorted(items, key=order.index)), order, "".join(items))
    anchors = rng.sample(answer, min(p.anchor_k, len(items) - 1)) if p.anchor else []   # one stays masked
    return text, [i for i in answer if i not in anchors]

def set_limits(p):
    spare = p.keys - max(p.n_max, p.n_test) if p.use_order else 0   # without an order nothing tells it apart
    return {"keys": range(1, 37), "n_min": range(1, p.keys + 1), "n_max": range(p.n_min, p.keys + 1),
            "n_test": range(1, p.keys + 1), "noise": range(max(0, spare) + 1), "anchor_k": range(MOST),
            "pad": range(MOST)}

# ---- several right answers: these have a `valid`
def is_grid(g):
    lines = [g[i:i + 4] for i in (0, 4, 8, 12)] + [g[i::4] for i in range(4)]
    quarters = [g[i:i + 2] + g[i + 4:i + 6] for i in (0, 2, 8, 10)]
    return all(set(unit) == set("1234") for unit in lines + quarters)

@functools.cache
def base_grids():
    """The 12 grids whose first row is 1234. Renaming their digits gives all 288, each equally often."""
    rows = ["".join(row) for row in itertools.permutations("1234")]
    return [grid for rest in itertools.product(rows, repeat=3) if is_grid(grid := "1234" + "".join(rest))]

def sudoku(rng, p, split):
    grid = rng.choice(base_grids()).translate(str.maketrans("1234", "".join(rng.sample("1234", 4))))
    holes = rng.randint(p.holes_min, p.holes_max) if split == "train" else p.holes_test
    text, cells = masked("P=" + "#" * p.pad + "|M=", grid)
    return text, cells[:holes] if p.mask_mode == "prefix" else sorted(rng.sample(cells, holes))

def qa_split(x, y):
    """The pool that owns x+y, for ever: about one pair in ten is for evaluation, y+x goes where x+y goes."""
    return SPLITS[zlib.crc32(f"{min(x, y)}+{max(x, y)}".encode()) % 10 == 0]

def qa(rng, p, split):
    pairs = ((rng.randint(0, p.synth_a_max), rng.randint(0, p.synth_b_max)) for _ in itertools.count())
    x, y = next(pair for pair in pairs if qa_split(*pair) == split)
    if p.mode == "qa" or p.mode == "both" and rng.random() < 0.5:
        return masked(f"Q:{x}+{y}=?|A:", str(x + y))
    return masked("Q:", f"{x}+{y}=?", f"|A:{x + y}")

def qa_valid(text, p, mask):
    found = re.fullmatch(r"Q:(0|[1-9]\d*)\+(0|[1-9]\d*)=\?\|A:(0|[1-9]\d*)#*", text)
    x, y, z = map(int, found.groups()) if found else (0, 0, -1)
    return x + y == z and x <= p.synth_a_max and y <= p.synth_b_max

# ---- the table
class Task(NamedTuple):
    sample: Callable    # (rng, p, split) -> the row's text without padding, the ascending positions to mask
    alphabet: str | Callable    # the characters of all rows, with the pad "#", without "_"; or p -> them
    params: dict        # name -> default; "len" of task "x" is the setting x_len. The first sets the length
    about: str          # one line
    limits: Callable = lambda p: {}     # p -> {name: allowed values, range or tuple}; other integers: >= 1
    valid: Callable | None = None       # (padded text, p, mask (T,)) -> is it as right as the target?

# The defaults fit 64 characters. future-seed's kvsort and permfill sort by an order of all 36 keys
# (keys=36 pad=8 n_min=3 n_max=6 n_test=10): such rows need SEQ_LEN of 133 and 75.
TASKS = {
    "struct": Task(two_fields(lambda a, c: (f'{{"a":{a},"b":', a + c, f',"c":{c}}}')), DIGITS + 'abc{}:,"#',
                   {"len": 8}, '{"a":A,"b":AC,"c":C}: join the neighbours on both sides'),
    "add": Task(add, DIGITS + "+=#", {"len": 8, "mask_len": 4}, "A+B=S: the middle digits of a sum",
                lambda p: {"mask_len": range(1, p.len + 2)}),
    "rightcopy": Task(two_fields(lambda l, r: (f"L={l}|M=", r, f"|R={r}")), DIGITS + "LMR=|#", {"len": 8},
                      "L=l|M=r|R=r: copy what comes later"),
    "rightrev": Task(two_fields(lambda l, r: (f"L={l}|M=", r[::-1], f"|R={r}")), DIGITS + "LMR=|#",
                     {"len": 8}, "L=l|M=reverse(r)|R=r: reverse what comes later"),
    "index": Task(index, DIGITS + "AIY=|#,", {"len": 16, "y_first": False},
                  "A=a|I=i,i+3|Y=a[i..i+3]: look up a span", lambda p: {"len": range(4, MOST)}),
    "reverse": Task(reverse, DIGITS + ",#", {"digit_max": 28}, "a,reverse(a): of any number of digits"),
    "bidir": Task(bidir, lambda p: DIGITS[:p.base] + "|#", {"len": 16, "base": 10},
                  "a|x|b: x = (a + b) mod base, digit by digit", lambda p: {"base": range(2, 11)}),
    "perm": Task(perm, DIGITS + "PYA=|#", {"len": 8}, "P=order|Y=a in that order|A=a: undo a permutation",
                 lambda p: {"len": range(1, 11)}),
    "inter": Task(two_fields(lambda a, b: (f"A={a}|B={b}|M=", "".join(map("".join, zip(a, b))))),
                  DIGITS + "ABM=|#", {"len": 8}, "A=a|B=b|M=a1 b1 a2 b2 ..: interleave"),
    "multi": Task(two_fields(lambda a, c: (f"A={a}|C={c}|B=", a + c, f"|D={a[::-1]}{c}")),
                  DIGITS + "ABCD=|#", {"len": 8}, "A=a|C=c|B=ac|D=reverse(a)c: join two fields"),
    "parity": Task(parity, "01XP=|#", {"block": 4, "blocks": 8, "mask_pos": 1},
                   "X=bits|P=parity of each block: restore a bit", lambda p: {"mask_pos": range(p.block)}),
    "retr": Task(retr, lambda p: DIGITS + LETTERS[:p.k] + "=;|QANS#", {"k": 4, "vlen": 4},
                 "a=..;b=..|ANS=value|Q=key: look up the key asked for at the end",
                 lambda p: {"k": range(1, 27)}),
    "constr": Task(constr, DIGITS + "PMR=|#", {"len": 8},
                   "P=p|M=last of p, then d1 d2 d1 ..|R=d1d2: meet both sides"),
    "kvsort": Task(kvsort, SETS, {"keys": 10, "n_min": 2, "n_max": 4, "n_test": 5, "noise": 0,
                                  "use_order": True, "keys_only": False, "keys_sep": True, "pad": 0},
                   "M=sorted pairs|R=O=order;pairs: sort by the order at the end", set_limits),
    "permfill": Task(permfill, SETS, {"keys": 16, "n_min": 3, "n_max": 6, "n_test": 10, "use_order": True,
                                      "anchor": True, "anchor_k": 2, "pad": 8},
                     "M=sorted items|R=O=order;items: sort, some places given (anchors)", set_limits),
    "sudoku": Task(sudoku, "1234PM=|#", {"pad": 8, "holes_min": 4, "holes_max": 8, "holes_test": 8,
                                         "mask_mode": "random"},
                   "M=a 4x4 grid, row by row: every row, column and quarter holds 1234",
                   lambda p: {"pad": range(MOST), "holes_min": range(1, 17), "holes_test": range(1, 17),
                              "holes_max": range(p.holes_min, 17), "mask_mode": ("random", "prefix")},
                   lambda text, p, mask: is_grid(text[p.pad + 5:p.pad + 21])),
    "qa": Task(qa, "#+0123456789:=?AQ|", {"synth_a_max": 99, "synth_b_max": 99, "mode": "both"},
               "Q:x+y=?|A:z: the answer, or the question; evaluated on sums never trained on",
               lambda p: {"synth_a_max": range(9, MOST), "synth_b_max": range(9, MOST),   # no empty pool
                          "mode": ("both", "qa", "aq")}, qa_valid),
}

COMMENTS = {   # of the parameters, for --help, numbers with their widest range
    "len": "[1, 4000] digits in a field", "mask_len": "[1, 4001] masked digits of the sum",
    "y_first": "put Y before I, as the original script does", "digit_max": "[1, 4000] most digits",
    "base": "[2, 10] digits run from 0 to base - 1", "block": "[1, 4000] bits in a block",
    "blocks": "[1, 4000] number of blocks", "mask_pos": "[0, 4000] the masked bit of each block",
    "k": "[1, 26] number of keys", "vlen": "[1, 4000] digits in a value", "anchor_k": "[0, 36] how many",
    "keys": "[1, 36] draw keys from the first ones of 0-9a-z", "n_min": "[1, 36] smallest set in training",
    "n_max": "[1, 36] largest set in training", "n_test": "[1, 36] size of the set in evaluation",
    "noise": "[0, 36] pairs that the order leaves out", "pad": "[0, 4000] pads before the answer",
    "use_order": "give a random order (0: always 0-9a-z)", "keys_only": "answer with the keys alone",
    "keys_sep": "separate such keys by ;", "anchor": "leave some places of the answer visible",
    "synth_a_max": "[9, 1e9] largest x", "synth_b_max": "[9, 1e9] largest y",
    "holes_min": "[1, 16] fewest holes in training", "holes_max": "[1, 16] most holes in training",
    "holes_test": "[1, 16] holes in evaluation", "mask_mode": "holes: random | prefix",
    "mode": "mask the answer (qa), the question (aq) or both by turns",
}

# ---- what the other files call
def get(name):
    """The Task of that name. ValueError: there is none."""
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}: choose one of {' '.join(TASKS)}")
    return TASKS[name]

def settings():
    """Every setting of every task: key -> (default, comment). Task x has x_task and x_<parameter>."""
    out = {}
    for name, task in TASKS.items():
        out[f"{name}_task"] = False, f"train on the task {name} (python tasks.py shows all of them)"
        for key, value in task.params.items():
            limits, space, text = COMMENTS.get(key, key).rpartition("] ")
            out[f"{name}_{key}"] = value, f"{limits}{space}{name}: {text}"
    return out

def chosen(settings):
    """The task whose x_task is true in settings (key -> value), or None. ValueError: there are two."""
    on = [name for name in TASKS if settings.get(f"{name}_task")]
    if len(on) > 1:
        raise ValueError(f"two tasks at once: {on[0]}_task=1 and {on[1]}_task=1: set only one")
    return on[0] if on else None

def params(name, settings):
    """The parameters p of a task from settings (key -> value), x_len as p.len; defaults for those missing."""
    defaults = get(name).params
    return SimpleNamespace(**{key: settings.get(f"{name}_{key}", value) for key, value in defaults.items()})

def alphabet(name, p):
    """The characters of a task in the order of their ids; the mask is one more id, len(alphabet)."""
    chars = get(name).alphabet
    return chars(p) if callable(chars) else chars

def check_params(name, p):
    """ValueError for the first parameter that is outside its allowed values."""
    limits = get(name).limits(p)
    for key, value in vars(p).items():
        allowed = limits.get(key, range(1, MOST) if type(value) is int else (value,))
        if value not in allowed:
            said = " or ".join(allowed) if isinstance(allowed, tuple) else f"{allowed[0]} to {allowed[-1]}"
            said = said.replace(f"to {MOST - 1}", "or more")
            raise ValueError(f"{name}_{key}={value} is not allowed: set --{name}_{key} to {said}")

def sample_batch(name, p, length, rngs, split):
    """One row from each random.Random in rngs; an object that stands there again goes on where it was.
    Returns ids, int64 (B,length), nothing masked, and answer, bool (B,length), True at the positions to mask.
    ValueError: unknown name or split, a parameter not allowed, a row longer than length."""
    check_params(name, p)
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: choose one of {' '.join(SPLITS)}")
    rows = [get(name).sample(rng, p, split) for rng in rngs]
    longest = max((len(text) for text, _ in rows), default=0)
    if longest > length:
        shorter = f"set --seq_len={longest}, or a smaller --{name}_{next(iter(get(name).params))}"
        raise ValueError(f"{name}: a row of {longest} characters exceeds SEQ_LEN={length}: {shorter}")
    to_id = {char: i for i, char in enumerate(alphabet(name, p))}
    ids = np.full((len(rows), length), to_id["#"], dtype=np.int64)
    answer = np.zeros((len(rows), length), dtype=bool)
    for i, (text, where) in enumerate(rows):
        ids[i, :len(text)] = [to_id[char] for char in text]
        answer[i, list(where)] = True
    return ids, answer

class Upper(random.Random):
    """Draws the upper end half of the time, so that the longest row there is comes up soon."""
    def randint(self, a, b):
        return b if self.random() < 0.5 else super().randint(a, b)

def check(name, p, length):
    """Fail early: ValueError if a parameter is not allowed, or if a row can be longer than length."""
    rng = Upper(0)
    for split in ("eval", "train"):   # the sets of evaluation are the larger ones: name their length first
        sample_batch(name, p, length, [rng] * 50, split)

def decode(ids, name, p, mask=None):
    """The text of one row of ids (T,), with "_" for the mask id and where mask, bool (T,), is True."""
    chars = alphabet(name, p) + "_"
    return "".join(chars[i] for i in (ids if mask is None else np.where(mask, len(chars) - 1, ids)))

def score(name, p, target, pred, answer):
    """target, pred: ids (B,T); answer: bool (B,T). acc: share of right tokens among the masked. exact: share
    of rows with all of them right or, where several answers are, of valid rows that keep what was given."""
    target, pred, answer = np.asarray(target), np.asarray(pred), np.asarray(answer, dtype=bool)
    if not answer.any():
        raise ValueError(f"{name}: no masked position to score")
    right, valid = target == pred, get(name).valid
    exact = (right | ~answer).all(axis=1)
    for i in np.flatnonzero(~exact) if valid else ():
        exact[i] = right[i, ~answer[i]].all() and valid(decode(pred[i], name, p), p, answer[i])
    return {"acc": float(right[answer].mean()), "exact": float(exact.mean())}

def main(names):
    """Print an example of each task."""
    if "-h" in names or "--help" in names:
        return print(f"{__doc__.strip()}\n\ntasks: {' '.join(TASKS)}")
    for name in names or TASKS:
        task = get(name)
        text, answer = task.sample(random.Random(1), params(name, {}), "train")
        marks = "".join("^" if i in answer else " " for i in range(max(answer) + 1))
        print(f"{name:11}{task.about}   ({len(text)} characters, {len(answer)} masked)")
        print(f"{'':11}{text}\n{'':11}{marks}\n")

if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
