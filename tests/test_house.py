"""The shape of the repository: which file may import which, and that importing does nothing."""
import ast
import os
import subprocess
import sys

from conftest import ROOT

import diffusion

OURS = {"configurator", "wkv_cuda", "model", "diffusion", "data", "tasks", "train", "sample", "bench"}
MAY_IMPORT = {"configurator": set(), "tasks": {"configurator"}, "wkv_cuda": set(), "diffusion": set(), "model": {"wkv_cuda", "configurator"}, "data": {"tasks", "configurator"},
              "train": OURS - {"sample", "bench"}, "sample": OURS - {"train", "bench"}, "bench": OURS - {"train", "sample"}}


def imports(path):
    for node in ast.walk(ast.parse(open(path).read())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split(".")[0]


def path_of(name):
    return os.path.join(ROOT, "wkv_cuda/__init__.py" if name == "wkv_cuda" else f"{name}.py")


def test_imports_point_one_way():
    for name, allowed in MAY_IMPORT.items():
        assert set(imports(path_of(name))) & OURS <= allowed, name
    assert {f[:-3] for f in os.listdir(ROOT) if f.endswith(".py")} == OURS - {"wkv_cuda"}
    for name in ("diffusion", "wkv_cuda"):
        third_party = set(imports(path_of(name))) - set(sys.stdlib_module_names)
        assert third_party <= {"torch", "ninja"}, name


def test_importing_has_no_side_effects(tmp_path):
    """No build, no seeding, no reading of settings from the environment (a bad one would raise), no output."""
    code = ("import torch; before = torch.random.get_rng_state()\n"
            f"import sys; sys.path.insert(0, {ROOT!r})\n"
            "import configurator, tasks, wkv_cuda, diffusion, model, data\n"
            "assert torch.equal(before, torch.random.get_rng_state())\n"
            "assert 'torch.utils.cpp_extension' not in sys.modules")
    env = os.environ | {"WKV_IMPL": "nonsense", "STRUCT_TASK": "nonsense", "TORCH_EXTENSIONS_DIR": str(tmp_path / "ext")}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not (tmp_path / "ext").exists()


def source_files():
    for folder, _, files in os.walk(ROOT):
        if os.path.relpath(folder, ROOT).split(os.sep)[0] in (".git", ".venv", "venv", "out", "tests"):
            continue
        yield from (os.path.join(folder, f) for f in files if f.endswith((".py", ".cpp", ".cu", ".h")))


def lines(*names):
    return sum(len(open(os.path.join(ROOT, name), encoding="utf-8").readlines()) for name in names)


def test_every_line_of_code_is_readable():
    for path in source_files():
        for i, line in enumerate(open(path, encoding="utf-8"), 1):
            assert len(line.rstrip("\n")) <= 110, f"{path}:{i}"


def test_every_function_fits_a_screen():
    for path in source_files():
        for f in ast.walk(ast.parse(open(path, encoding="utf-8").read())) if path.endswith(".py") else ():
            if isinstance(f, ast.FunctionDef):
                limit = 110 if (f.name, os.path.basename(path)) == ("main", "train.py") else 60
                assert f.end_lineno - f.lineno < limit, f"{path}: {f.name}"


def test_train_names_no_objective_and_hardly_branches():
    train, sample = (open(path_of(name), encoding="utf-8").read() for name in ("train", "sample"))
    assert sum(isinstance(node, ast.IfExp) for node in ast.walk(ast.parse(train))) <= 12
    for text in (train, sample):
        branches = [line for line in text.splitlines() if line.lstrip().startswith(("if ", "elif ", "while "))]
        branches = [line for line in branches if "direction" not in line]        # that may be "block", too
        names = set(diffusion.OBJECTIVES) - {"task", "l2t", "t2l"}       # kinds of data, and modes that a user gives
        assert not [line for line in branches if any(f'"{name}"' in line for name in names)]
        assert not [line for line in branches if ".gaussian" in line or "stage2" in line]


def test_the_house_does_not_grow():
    """The goal is 4,550 lines at top level and 800 of Python in wkv_cuda; not reached yet.
    Conversion, dialogues, states, export, pages and losses without all logits took 500 lines; before it was 6,750."""
    assert lines(*(f"{name}.py" for name in OURS - {"wkv_cuda"})) <= 7250
    assert lines(*(f"wkv_cuda/{f}" for f in os.listdir(os.path.join(ROOT, "wkv_cuda")) if f.endswith(".py"))) <= 1040
    shown = subprocess.run([sys.executable, path_of("train"), "--help"], capture_output=True, text=True, check=True).stdout
    assert shown.count("\n  --") <= 150
