import json
import os
import socket
import subprocess
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


def ok(done):
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def kill_after(step, out_dir, settings, cwd):
    """Run train.py and kill it as soon as the checkpoint of `step` is written: os._exit leaves no time to tidy up."""
    script = os.path.join(ROOT, "train.py")
    code = (f"import os, sys, model; sys.argv = ['train.py', '--out_dir={out_dir}']\n"
            "save = model.save_checkpoint\n"
            f"def killer(path, content):\n    save(path, content)\n    content['step'] == {step} and os._exit(9)\n"
            f"model.save_checkpoint = killer\nexec(compile(open({script!r}).read(), {script!r}, 'exec'), {{'__name__': '__main__', '__file__': {script!r}}})")
    env = os.environ | {k: str(v) for k, v in settings.items()} | {"PYTHONPATH": ROOT}
    assert subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True).returncode == 9


# A process that has imported torch and does nothing but fork: a script then starts in a tenth of a second instead of two.
ZYGOTE = """
import json, os, runpy, signal, sys, traceback
import numpy, torch, torch.utils.cpp_extension, tqdm
for line in sys.stdin:
    job, children = json.loads(line), []
    for env in job["envs"]:
        if child := os.fork():
            children.append(child)
            continue
        if children:
            job["stdout"] = job["stderr"] = os.devnull
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(os.open(job["stdout"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
        os.dup2(os.open(job["stderr"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        os.environ.clear()
        os.environ.update(env)
        os.chdir(job["cwd"])
        signal.alarm(120)
        sys.argv, sys.path[0], code = job["argv"], os.path.dirname(job["argv"][0]), 0
        try:
            runpy.run_path(job["argv"][0], run_name="__main__")
        except SystemExit as e:
            code = e.code if isinstance(e.code, int) else 0 if e.code is None else 1
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush(); sys.stderr.flush()
        os._exit(code)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    print(next((code for code in codes if code), 0), flush=True)
"""


@pytest.fixture(scope="session")
def zygote():
    process = subprocess.Popen([sys.executable, "-c", ZYGOTE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    yield process
    process.stdin.close()
    process.wait()


@pytest.fixture
def run(tmp_path, zygote):
    """Run a script of the repository as a user would -> CompletedProcess; ranks: in so many processes, as torchrun would, with the first one's output."""
    def call(script, *options, ranks=1, **env):
        keep = ("PATH", "HOME", "LANG", "TMPDIR", "TORCH_EXTENSIONS_DIR", "VIRTUAL_ENV")
        env = {k: v for k, v in os.environ.items() if k in keep} | {k: str(v) for k, v in env.items()}
        argv, files = [os.path.join(ROOT, script), *map(str, options)], [str(tmp_path / name) for name in (".stdout", ".stderr")]
        envs = [env]
        if ranks > 1:
            with socket.socket() as s:
                s.bind(("127.0.0.1", 0))
                world = dict(WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(s.getsockname()[1]))
            envs = [env | world | dict(RANK=str(i), LOCAL_RANK=str(i)) for i in range(ranks)]
        zygote.stdin.write(json.dumps(dict(argv=argv, envs=envs, cwd=str(tmp_path), stdout=files[0], stderr=files[1])) + "\n")
        zygote.stdin.flush()
        code = int(zygote.stdout.readline())
        return subprocess.CompletedProcess(argv, code, *(open(f, encoding="utf-8").read() for f in files))
    return call
