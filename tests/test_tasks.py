"""Each task's rows are taken apart by rules written anew here; the published formats by cases worked out by hand."""
import random
import re
import subprocess
import sys

import numpy as np
import pytest

import tasks
from tasks import TASKS, Task, sample_batch, score

D, L = "0123456789", "abcdefghijklmnopqrstuvwxyz"


def rows(name, n=50, split="train", seed=0, length=64, **changed):
    """n pairs (text without trailing pads, masked positions) that went through ids and back."""
    p = tasks.params(name, {f"{name}_{key}": value for key, value in changed.items()})
    ids, answer = sample_batch(name, p, length, [random.Random(seed)] * n, split)
    return [(tasks.decode(row, name, p).rstrip("#"), list(np.flatnonzero(where))) for row, where in zip(ids, answer)]


def span(start, n):
    return list(range(start, start + n))


# ---- the rule of every task: text, masked positions -> assertions

def rule_struct(s, where):
    a, b, c = re.fullmatch(r'\{"a":(\d{8}),"b":(\d{16}),"c":(\d{8})\}', s).groups()
    assert b == a + c and where == span(18, 16)


def rule_add(s, where):
    a, b, total = re.fullmatch(r"(\d{8})\+(\d{8})=(\d{9})", s).groups()
    assert int(a) + int(b) == int(total) and where == span(20, 4)


def rule_rightcopy(s, where):
    assert re.fullmatch(r"L=\d{8}\|M=(\d{8})\|R=\1", s) and where == span(13, 8)


def rule_rightrev(s, where):
    m, r = re.fullmatch(r"L=\d{8}\|M=(\d{8})\|R=(\d{8})", s).groups()
    assert list(m) == list(reversed(r)) and where == span(13, 8)


def rule_index(s, where):
    a, i, j, y = re.fullmatch(r"A=(\d{16})\|I=(\d+),(\d+)\|Y=(\d{4})", s).groups()
    assert int(j) == int(i) + 3 <= 15 and all(a[int(i) + k] == y[k] for k in range(4))
    assert where == span(len(s) - 4, 4)


def rule_reverse(s, where):
    a, b = re.fullmatch(r"(\d{1,28}),(\d{1,28})", s).groups()
    assert list(a) == list(reversed(b)) and where == span(len(a) + 1, len(a))


def rule_bidir(s, where):
    a, x, b = re.fullmatch(r"(\d{16})\|(\d{16})\|(\d{16})", s).groups()
    assert all((int(x[k]) - int(a[k]) - int(b[k])) % 10 == 0 for k in range(16)) and where == span(17, 16)


def rule_perm(s, where):
    order, y, a = re.fullmatch(r"P=(\d{8})\|Y=(\d{8})\|A=(\d{8})", s).groups()
    assert sorted(order) == list("01234567") and all(y[k] == a[int(order[k])] for k in range(8)) and where == span(24, 8)


def rule_inter(s, where):
    a, b, m = re.fullmatch(r"A=(\d{8})\|B=(\d{8})\|M=(\d{16})", s).groups()
    assert m[0::2] == a and m[1::2] == b and where == span(24, 16)


def rule_multi(s, where):
    a, c, b, d = re.fullmatch(r"A=(\d{8})\|C=(\d{8})\|B=(\d{16})\|D=(\d{16})", s).groups()
    assert b[:8] == a and b[8:] == c and list(d[:8]) == list(reversed(a)) and d[8:] == c and where == span(24, 16)


def rule_parity(s, where):
    x, parities = re.fullmatch(r"X=([01]{32})\|P=([01]{8})", s).groups()
    assert all(sum(map(int, x[4 * k:4 * k + 4])) % 2 == int(parities[k]) for k in range(8))
    assert where == [3, 7, 11, 15, 19, 23, 27, 31]


def rule_retr(s, where):
    *values, found, q = re.fullmatch(r"a=(\d{4});b=(\d{4});c=(\d{4});d=(\d{4})\|ANS=(\d{4})\|Q=([a-d])", s).groups()
    assert found == values["abcd".index(q)] and where == span(32, 4)


def rule_constr(s, where):
    prefix, m, d1, d2 = re.fullmatch(r"P=(\d{8})\|M=(\d{8})\|R=(\d)(\d)", s).groups()
    assert m == prefix[7] + d1 + d2 + d1 + d2 + d1 + d2 + d1 and where == span(13, 8)


def rule_kvsort(s, where):
    m, order, right = re.fullmatch(r"P=\|M=(.+)\|R=O=(\d{10});(.+)", s).groups()
    assert sorted(m.split(";")) == sorted(right.split(";")) and sorted(order) == list(D)
    places = [order.index(pair[0]) for pair in m.split(";")]
    assert places == sorted(places) and len(set(places)) == len(places) and where == span(5, len(m))
    assert all(re.fullmatch(r"\d:[a-z]", pair) for pair in m.split(";"))


def rule_permfill(s, where):
    m, order, right = re.fullmatch(r"P=########\|M=([0-9a-f]+)\|R=O=([0-9a-f]{16});([0-9a-f]+)", s).groups()
    assert sorted(m) == sorted(right) and [order.index(c) for c in m] == sorted(order.index(c) for c in m)
    assert len(set(order)) == 16 and len(set(m)) == len(m)
    assert set(where) < set(span(13, len(m))) and len(where) == len(m) - 2   # two anchors


def rule_sudoku(s, where):
    grid = np.array(list(re.fullmatch(r"P=########\|M=([1-4]{16})", s)[1])).reshape(4, 4)
    quarters = [grid[y:y + 2, x:x + 2].ravel() for y in (0, 2) for x in (0, 2)]
    assert all(sorted(unit) == list("1234") for unit in [*grid, *grid.T, *quarters])
    assert set(where) <= set(span(13, 16)) and 4 <= len(where) <= 8


def rule_qa(s, where):
    x, y, z = re.fullmatch(r"Q:(\d+)\+(\d+)=\?\|A:(\d+)", s).groups()
    assert int(x) + int(y) == int(z) and max(int(x), int(y)) <= 99
    assert where in (span(len(s) - len(z), len(z)), span(2, len(x + y) + 3))


@pytest.mark.parametrize("split", ["train", "eval"])
@pytest.mark.parametrize("name", list(TASKS))
def test_rows_obey_the_rule_and_fit_in_64(name, split):
    for text, where in rows(name, 200, split):
        globals()[f"rule_{name}"](text, where)
    tasks.check(name, tasks.params(name, {}), 64)


@pytest.mark.parametrize("name", list(TASKS))
def test_table(name):
    p = tasks.params(name, {})
    chars = tasks.alphabet(name, p)
    assert "#" in chars and "_" not in chars and len(set(chars)) == len(chars)
    assert TASKS[name].params and "\n" not in TASKS[name].about
    ids, answer = sample_batch(name, p, 64, (random.Random(i) for i in range(5)), "train")
    assert ids.shape == answer.shape == (5, 64) and ids.dtype == np.int64 and answer.dtype == bool
    assert ids.max() < len(chars) and answer.any(axis=1).all()
    again, where = sample_batch(name, p, 64, (random.Random(i) for i in range(5)), "train")
    assert (ids == again).all() and (answer == where).all()                       # same generator, same row
    one, _ = sample_batch(name, p, 64, [random.Random(3)], "train")
    assert (one[0] == ids[3]).all()                                               # whatever the batch it comes in
    assert len({row.tobytes() for row in ids}) == 5


# ---- the published formats, by hand

class Digits(random.Random):
    """Hands out the given numbers, and fails when it is asked for one that cannot be drawn."""
    def __init__(self, *numbers):
        super().__init__(0)
        self.numbers = list(numbers)

    def randint(self, a, b):
        number = self.numbers.pop(0)
        assert a <= number <= b
        return number


@pytest.mark.parametrize("name, settings, numbers, text, where", [
    ("struct", {"len": 2}, [1, 2, 3, 4], '{"a":12,"b":1234,"c":34}', [12, 13, 14, 15]),
    ("add", {"len": 4, "mask_len": 2}, [0, 0, 0, 7, 0, 0, 0, 5], "0007+0005=00012", [11, 12]),
    ("add", {"len": 4, "mask_len": 4}, [9, 9, 9, 9, 0, 0, 0, 1], "9999+0001=10000", [10, 11, 12, 13]),
    ("add", {"len": 4, "mask_len": 3}, [1, 2, 3, 4, 1, 1, 1, 1], "1234+1111=02345", [11, 12, 13]),
    ("add", {"len": 8}, [9] * 16, "99999999+99999999=199999998", [20, 21, 22, 23]),
    ("rightcopy", {"len": 3}, [1, 2, 3, 4, 5, 6], "L=123|M=456|R=456", [8, 9, 10]),
    ("rightrev", {"len": 3}, [1, 2, 3, 4, 5, 6], "L=123|M=654|R=456", [8, 9, 10]),
    ("index", {"len": 6}, [5, 4, 3, 2, 1, 0, 2], "A=543210|I=2,5|Y=3210", [17, 18, 19, 20]),
    ("index", {"len": 6, "y_first": True}, [5, 4, 3, 2, 1, 0, 0], "A=543210|Y=5432|I=0,3", [11, 12, 13, 14]),
    ("index", {"len": 16}, [7] * 16 + [12], "A=7777777777777777|I=12,15|Y=7777", [29, 30, 31, 32]),
    ("reverse", {}, [3, 120], "120,021", [4, 5, 6]),
    ("bidir", {"len": 2, "base": 5}, [4, 1, 3, 0], "41|21|30", [3, 4]),
    ("inter", {"len": 2}, [1, 2, 3, 4], "A=12|B=34|M=1324", [12, 13, 14, 15]),
    ("multi", {"len": 2}, [1, 2, 3, 4], "A=12|C=34|B=1234|D=2134", [12, 13, 14, 15]),
    ("parity", {"block": 3, "blocks": 2, "mask_pos": 2}, [1, 1, 1, 0, 1, 1], "X=111011|P=10", [4, 7]),
    ("constr", {"len": 4}, [1, 2, 3, 4, 8, 9], "P=1234|M=4898|R=89", [9, 10, 11, 12]),
])
def test_formats_by_hand(name, settings, numbers, text, where):
    p = tasks.params(name, {f"{name}_{key}": value for key, value in settings.items()})
    rng = Digits(*numbers)
    ids, answer = sample_batch(name, p, 64, [rng], "eval")
    assert tasks.decode(ids[0], name, p) == text.ljust(64, "#") and list(np.flatnonzero(answer[0])) == where
    assert rng.numbers == []
    shown = tasks.decode(ids[0], name, p, answer[0])
    assert shown == "".join("_" if i in where else c for i, c in enumerate(text.ljust(64, "#")))


def test_vocabulary_of_the_published_struct_runs():
    p = tasks.params("struct", {})
    assert tasks.alphabet("struct", p) == '0123456789abc{}:,"#'
    assert tasks.decode([0, 9, 18, 19], "struct", p) == "09#_"                    # the mask is the id after the last
    assert tasks.alphabet("bidir", tasks.params("bidir", {"bidir_base": 3})) == "012|#"
    assert tasks.alphabet("retr", tasks.params("retr", {"retr_k": 2})) == "0123456789ab=;|QANS#"


def test_struct_evaluation_set_is_the_published_one():
    state = random.getstate()
    try:
        random.seed(1234)
        published = []
        for _ in range(200):
            a = [str(random.randint(0, 9)) for _ in range(8)]
            c = [str(random.randint(0, 9)) for _ in range(8)]
            published.append('{"a":%s,"b":%s,"c":%s}' % ("".join(a), "".join(a + c), "".join(c)))
    finally:
        random.setstate(state)
    assert [text for text, _ in rows("struct", 200, "eval", seed=1234)] == published


# ---- parameters that change the row

def test_kvsort_options():
    for text, where in rows("kvsort", 50, "eval", keys=10, n_test=3, noise=2):    # noise: keys that the order leaves out
        m, order, right = re.fullmatch(r"P=\|M=(.+)\|R=O=(\d{8});(.+)", text).groups()
        pairs = right.split(";")
        assert len(pairs) == 5 and m.split(";") == sorted((x for x in pairs if x[0] in order), key=lambda x: order.index(x[0]))
    for text, where in rows("kvsort", 20, "eval", keys_only=True, keys_sep=False, pad=3):
        m, order, right = re.fullmatch(r"P=###\|M=(\d{5})\|R=O=(\d{10});(.+)", text).groups()
        assert sorted(m, key=order.index) == list(m) and where == span(8, 5) and set(m) == {x[0] for x in right.split(";")}
    for text, where in rows("kvsort", 20, "eval", use_order=False, keys_only=True, keys=36):
        assert re.fullmatch(r"P=\|M=(\w;){4}\w\|R=(\w:[a-z];){4}\w:[a-z]", text)
        m = text[5:14].split(";")
        assert m == sorted(m, key=(D + L).index)


def test_sets_of_the_later_published_runs_need_133_and_75():
    wide = dict(keys=36, pad=8, n_min=3, n_max=6, n_test=10)
    for name, need in (("kvsort", 133), ("permfill", 75)):
        p = tasks.params(name, {f"{name}_{key}": value for key, value in wide.items()})
        tasks.check(name, p, need)
        with pytest.raises(ValueError, match=f"SEQ_LEN={need - 1}.*--seq_len={need}"):
            tasks.check(name, p, need - 1)


def test_sizes_differ_between_training_and_evaluation():
    counts = {split: {len(text.split("|R=")[0].split(";")) for text, _ in rows("kvsort", 200, split)} for split in tasks.SPLITS}
    assert counts == {"train": {2, 3, 4}, "eval": {5}}
    assert {len(where) for _, where in rows("permfill", 100, "train", anchor=False)} == {3, 4, 5, 6}
    assert {len(where) for _, where in rows("permfill", 100, "eval")} == {8}
    assert {len(where) for _, where in rows("permfill", 100, "train", anchor_k=9)} == {1}    # never all visible
    assert {len(where) for _, where in rows("sudoku", 200, "train")} == {4, 5, 6, 7, 8}
    assert {len(where) for _, where in rows("sudoku", 50, "eval", holes_test=12)} == {12}
    assert all(where == span(13, 8) for _, where in rows("sudoku", 20, "eval", mask_mode="prefix"))
    assert len({tuple(where) for _, where in rows("sudoku", 20, "eval")}) > 10


def test_qa_pools_are_disjoint():
    pair = {split: {tuple(map(int, re.findall(r"\d+", text)))[:2] for text, _ in rows("qa", 4000, split)} for split in tasks.SPLITS}
    both_ways = pair["train"] | {(y, x) for x, y in pair["train"]}
    assert not both_ways & pair["eval"] and len(pair["eval"]) > 500 and len(pair["train"]) > 2000
    share = np.mean([tasks.qa_split(x, y) == "eval" for x in range(100) for y in range(100)])
    assert 0.07 < share < 0.13
    tasks.check("qa", tasks.params("qa", {"qa_synth_a_max": 9, "qa_synth_b_max": 9}), 64)    # the smallest pools allowed
    asked = {mode: {bool(where[0] > 2) for _, where in rows("qa", 100, mode=mode)} for mode in ("qa", "aq", "both")}
    assert asked == {"qa": {True}, "aq": {False}, "both": {True, False}}


# ---- score

def test_score_by_hand():
    p = tasks.params("struct", {"struct_len": 1})
    target = np.array([[1, 2, 3, 4], [5, 6, 7, 8], [1, 1, 1, 1]])
    answer = np.array([[0, 1, 1, 0], [1, 1, 0, 0], [0, 0, 0, 1]], dtype=bool)
    pred = np.array([[9, 2, 3, 9], [5, 0, 7, 8], [1, 1, 1, 0]])      # rows: 2 of 2 right (the rest is not asked), 1 of 2, 0 of 1
    assert score("struct", p, target, pred, answer) == {"acc": pytest.approx(3 / 5), "exact": pytest.approx(1 / 3)}
    assert score("struct", p, target, target, answer) == {"acc": 1.0, "exact": 1.0}
    with pytest.raises(ValueError, match="no masked position"):
        score("struct", p, target, pred, np.zeros_like(answer))


def ids_of(name, p, text):
    return np.array([[tasks.alphabet(name, p).index(c) for c in text]])


def test_sudoku_counts_any_grid_that_keeps_the_given_cells():
    p = tasks.params("sudoku", {})
    def row(grid):
        return ids_of("sudoku", p, f"P=########|M={grid}".ljust(32, "#"))
    target, other = row("1234" "3412" "2143" "4321"), row("2134" "3412" "1243" "4321")
    answer = target != other                                             # the four cells in which 1 and 2 may change places
    assert answer.sum() == 4
    assert score("sudoku", p, target, target, answer) == {"acc": 1.0, "exact": 1.0}
    assert score("sudoku", p, target, other, answer) == {"acc": 0.0, "exact": 1.0}
    given = answer.copy()
    given[0, np.flatnonzero(answer[0])[0]] = False                       # now `other` changes a given cell
    assert score("sudoku", p, target, other, given)["exact"] == 0.0
    wrong = row("1134" "3412" "2143" "4321")
    assert score("sudoku", p, target, wrong, answer) == {"acc": 0.75, "exact": 0.0}
    rows_and_columns_only = row("1234" "2341" "3412" "4123")             # a Latin square whose quarters fail
    everywhere = np.zeros_like(answer)
    everywhere[0, 13:29] = True
    assert score("sudoku", p, target, rows_and_columns_only, everywhere)["exact"] == 0.0
    assert score("sudoku", p, target, other, everywhere)["exact"] == 1.0
    unfilled = np.where(answer, len(tasks.alphabet("sudoku", p)), target)
    assert score("sudoku", p, target, unfilled, answer)["exact"] == 0.0


def test_all_288_grids_come_up():
    def fill(cells):                                                     # every grid, by depth-first search
        if len(cells) == 16:
            return {"".join(cells)}
        r, c = divmod(len(cells), 4)
        seen = {d for i, d in enumerate(cells) if i // 4 == r or i % 4 == c or (i // 8, i % 4 // 2) == (r // 2, c // 2)}
        return set().union(*(fill(cells + [d]) for d in "1234" if d not in seen))
    every = fill([])
    assert len(every) == 288
    assert {text[13:29] for text, _ in rows("sudoku", 6000, length=32)} == every


def test_qa_counts_any_right_question():
    p = tasks.params("qa", {})
    def exact(target, pred, start, n):
        answer = np.zeros((1, 20), dtype=bool)
        answer[0, start:start + n] = True
        return score("qa", p, ids_of("qa", p, target.ljust(20, "#")), ids_of("qa", p, pred.ljust(20, "#")), answer)["exact"]
    assert exact("Q:17+5=?|A:22", "Q:17+5=?|A:22", 2, 6) == 1
    assert exact("Q:17+5=?|A:22", "Q:13+9=?|A:22", 2, 6) == 1
    assert exact("Q:17+5=?|A:22", "Q:4+18=?|A:22", 2, 6) == 1
    assert exact("Q:17+5=?|A:22", "Q:17+6=?|A:22", 2, 6) == 0
    assert exact("Q:17+5=?|A:22", "Q:17+6=?|A:23", 2, 6) == 0            # a given character has changed
    assert exact("Q:17+5=?|A:22", "Q:+22=?=|A:22", 2, 6) == 0
    assert exact("Q:17+5=?|A:22", "Q:17+5=?|A:23", 11, 2) == 0
    assert exact("Q:17+5=?|A:122", "Q:117+5=|A:122", 2, 6) == 0


# ---- settings and errors

def test_settings():
    table = tasks.settings()
    assert table["struct_task"][0] is False and table["struct_len"][0] == 8
    assert table["index_len"][0] == 16 and table["add_mask_len"][0] == 4 and table["reverse_digit_max"][0] == 28
    assert len(table) == sum(1 + len(task.params) for task in TASKS.values())     # no two tasks share a key
    assert all(isinstance(comment, str) and comment and "\n" not in comment for _, comment in table.values())
    assert all(key in tasks.COMMENTS for task in TASKS.values() for key in task.params)
    assert set(tasks.COMMENTS) == {key for task in TASKS.values() for key in task.params}


def test_chosen():
    values = {key: default for key, (default, _) in tasks.settings().items()}
    assert tasks.chosen(values) is None and tasks.chosen({}) is None
    assert tasks.chosen(values | {"add_task": True}) == "add"
    with pytest.raises(ValueError, match="two tasks at once: struct_task=1 and add_task=1: set only one"):
        tasks.chosen(values | {"add_task": True, "struct_task": True})


def test_params():
    p = tasks.params("add", {"add_len": 5, "struct_len": 3, "seq_len": 64})
    assert vars(p) == {"len": 5, "mask_len": 4}


@pytest.mark.parametrize("key, value, said", [
    ("struct_len", 0, "1 or more"), ("add_mask_len", 10, "1 to 9"), ("add_mask_len", 0, "1 to 9"), ("index_len", 3, "4 or more"),
    ("bidir_base", 11, "2 to 10"), ("bidir_base", 1, "2 to 10"), ("perm_len", 11, "1 to 10"), ("retr_k", 27, "1 to 26"),
    ("retr_vlen", 0, "1 or more"), ("parity_block", 0, "1 or more"), ("parity_mask_pos", 4, "0 to 3"),
    ("reverse_digit_max", -1, "1 or more"),
    ("kvsort_keys", 37, "1 to 36"), ("kvsort_n_test", 11, "1 to 10"), ("kvsort_n_max", 1, "2 to 10"), ("kvsort_noise", 6, "0 to 5"),
    ("permfill_n_min", 0, "1 to 16"), ("permfill_anchor_k", -1, "0 or more"), ("sudoku_holes_max", 3, "4 to 16"),
    ("sudoku_holes_test", 17, "1 to 16"), ("sudoku_mask_mode", "none", "random or prefix"), ("qa_mode", "x", "both or qa or aq"),
    ("qa_synth_a_max", 8, "9 or more"),
])
def test_parameter_errors(key, value, said):
    name = key.split("_")[0]
    message = re.escape(f"{key}={value} is not allowed: set --{key} to {said}") + "$"
    p = tasks.params(name, {key: value})
    with pytest.raises(ValueError, match=message):
        tasks.check(name, p, 64)
    with pytest.raises(ValueError, match=message):
        sample_batch(name, p, 64, [random.Random(0)], "train")


def test_noise_needs_an_order():
    with pytest.raises(ValueError, match="kvsort_noise=1 is not allowed"):
        tasks.check("kvsort", tasks.params("kvsort", {"kvsort_noise": 1, "kvsort_use_order": False}), 64)


def test_other_errors():
    p = tasks.params("struct", {"struct_len": 20})
    message = re.escape("struct: a row of 96 characters exceeds SEQ_LEN=64: set --seq_len=96, or a smaller --struct_len")
    with pytest.raises(ValueError, match=message):
        sample_batch("struct", p, 64, [random.Random(0)], "train")
    with pytest.raises(ValueError, match=message):
        tasks.check("struct", p, 64)
    sample_batch("struct", p, 96, [random.Random(0)], "train")
    with pytest.raises(ValueError, match="unknown split 'val'"):
        sample_batch("struct", p, 96, [random.Random(0)], "val")
    with pytest.raises(ValueError, match="unknown task 'strukt': choose one of struct add"):
        tasks.params("strukt", {})


@pytest.mark.parametrize("name, settings, longest", [
    ("reverse", {"reverse_digit_max": 400}, 801),       # a row this long comes up once in 400
    ("index", {"index_len": 100}, 117), ("qa", {"qa_synth_a_max": 999, "qa_synth_b_max": 9}, 16),
    ("kvsort", {"kvsort_n_max": 10}, 99),
])
def test_check_finds_the_longest_row(name, settings, longest):
    p = tasks.params(name, settings)
    tasks.check(name, p, longest)
    with pytest.raises(ValueError, match=f"a row of {longest} characters exceeds SEQ_LEN={longest - 1}"):
        tasks.check(name, p, longest - 1)


# ---- the house

def test_a_new_row_works_everywhere(monkeypatch, capsys):
    monkeypatch.setitem(TASKS, "dummy", Task(lambda rng, p, split: ("ab" * p.len, [1, 3]), "ab#", {"len": 2}, "for the test"))
    assert tasks.settings()["dummy_len"] == (2, "[1, 4000] dummy: digits in a field") and "dummy_task" in tasks.settings()
    assert tasks.chosen({"dummy_task": True}) == "dummy"
    p = tasks.params("dummy", {"dummy_len": 3})
    tasks.check("dummy", p, 6)
    ids, answer = sample_batch("dummy", p, 8, [random.Random(0)] * 2, "eval")
    assert ids.tolist() == [[0, 1, 0, 1, 0, 1, 2, 2]] * 2
    assert tasks.decode(ids[0], "dummy", p, answer[0]) == "a_a_ab##"
    assert score("dummy", p, ids, np.array([ids[0], 1 - ids[1]]), answer) == {"acc": 0.5, "exact": 0.5}
    with pytest.raises(ValueError, match="dummy_len=0 .* 1 or more"):
        tasks.check("dummy", tasks.params("dummy", {"dummy_len": 0}), 8)
    tasks.main(["dummy"])
    assert capsys.readouterr().out.splitlines()[1:3] == [" " * 11 + "abab", " " * 12 + "^ ^"]
    tasks.main(TASKS)
    assert "for the test" in capsys.readouterr().out


def test_command_line():
    def run(*arguments):
        return subprocess.run([sys.executable, "tasks.py", *arguments], capture_output=True, text=True)
    every = run()
    heads = [line.split()[0] for line in every.stdout.splitlines() if line and line[0] != " "]
    assert every.returncode == 0 and heads == list(TASKS)
    _, text, marks = run("struct").stdout.rstrip("\n").splitlines()
    under = [text[i] for i, mark in enumerate(marks) if mark == "^"]
    assert '"b":' + "".join(under) + ',"c"' in text and len(under) == 16
    wrong = run("strukt")
    assert wrong.returncode == 2 and wrong.stdout == "" and wrong.stderr.startswith("error: unknown task 'strukt'")
    assert wrong.stderr.count("\n") == 1


def test_import_is_light_and_has_no_side_effects():
    code = ("import random, sys; import numpy as np; random.seed(5); np.random.seed(5); a = random.getstate(), str(np.random.get_state())\n"
            "import tasks; assert a == (random.getstate(), str(np.random.get_state())); assert 'torch' not in sys.modules\n"
            "p = tasks.params('struct', {}); tasks.sample_batch('struct', p, 64, [random.Random(0)], 'train'); "
            "assert a[0] == random.getstate()")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "", done.stderr
