"""The shape of the repository: which file may import which, and that importing does nothing."""
import ast
import os
import subprocess
import sys

from conftest import ROOT

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


def test_every_line_of_code_is_readable():
    for folder, _, files in os.walk(ROOT):
        if os.path.relpath(folder, ROOT).split(os.sep)[0] in (".git", ".venv", "venv", "out", "tests"):
            continue
        for f in files:
            if f.endswith((".py", ".cpp", ".cu")):
                for i, line in enumerate(open(os.path.join(folder, f)), 1):
                    assert len(line) <= 150, f"{f}:{i}"
