import os
import sys

import pytest
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)


@pytest.fixture(autouse=True)
def fresh_environment(monkeypatch):
    """Tests must not depend on the caller's settings."""
    monkeypatch.delenv("WKV_IMPL", raising=False)
    torch.manual_seed(0)


@pytest.fixture
def run(tmp_path):
    """Run a script of the repository as a user would -> CompletedProcess. Settings that tests share: small and quiet."""
    import subprocess

    def call(script, *options, **env):
        clean = {k: v for k, v in os.environ.items() if k in ("PATH", "HOME", "LANG", "TMPDIR", "TORCH_EXTENSIONS_DIR", "VIRTUAL_ENV")}
        return subprocess.run([sys.executable, os.path.join(ROOT, script), *map(str, options)], cwd=tmp_path, text=True,
                              capture_output=True, timeout=120, env=clean | {k: str(v) for k, v in env.items()})
    return call
