"""What README.md and bench/README.md say: short, and true of the code beside them."""
import importlib
import json
import os
import re

from conftest import ROOT

import diffusion
import model
import train


def text(name):
    with open(os.path.join(ROOT, name), encoding="utf-8") as f:
        return f.read()


def rows(head):
    """The cells of the README's table whose first column is called `head`."""
    table = re.search(rf"^\| {head} \|.*\n\|[-|]+\n((?:\|.*\n)+)", text("README.md"), re.M)[1]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def names(cell):
    return re.findall(r"`([^`]+)`", cell)


def test_the_readme_is_short_and_narrow():
    assert len(text("README.md").splitlines()) <= 220
    for name in ("README.md", "bench/README.md"):
        for i, line in enumerate(text(name).splitlines(), 1):
            assert line.startswith("|") or len(line) <= 110, f"{name}:{i}"


def test_settings_have_the_defaults_that_the_readme_says():
    own = vars(train) | vars(model.ModelConfig()) | vars(diffusion.DiffusionConfig())
    found = rows("key")
    assert len(found) == 20
    for key, default, _ in found:
        value, default = own[names(key)[0]], "".join(names(default))
        assert value == type(value)(json.loads(default) if type(value) is not str else default), key


def test_what_the_readme_says_to_search_for_is_there():
    for question, files, search in rows("you ask"):
        found = "".join(text(path) for path in names(files))
        for name in names(search):
            assert "*" in name or name in found, f"{question} {name}"


def test_tables_to_add_to_hold_what_the_readme_says():
    for part, choices, where in rows("part"):
        *tables, path = names(where)
        module = importlib.import_module(path.removesuffix(".py"))
        there = {name for table in tables for name in getattr(module, table)}
        listed = re.sub(r"`\w+`(, `\w+`)*: ", "", choices)      # without the names of the settings
        assert set(names(listed)) <= there, part
        assert "17" not in choices or len(there) == 17


def test_links_and_files_named_exist():
    for name in ("README.md", "bench/README.md"):
        here = os.path.join(ROOT, os.path.dirname(name))
        for link in re.findall(r"\]\(([^)#]+)", text(name)):
            assert os.path.exists(os.path.join(here, link)), link
        for path in re.findall(r"config/\w+\.py", text(name)):
            assert os.path.exists(os.path.join(ROOT, path)) or path == "config/NAME.py", path
    for path in os.listdir(os.path.join(ROOT, "bench")):
        suite, kind = path.split(".")[0], path.split(".")[-1]     # between them the processor that was measured
        assert f"`{suite}." in text("bench/README.md") or kind not in ("json", "jsonl", "png"), path
