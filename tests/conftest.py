import json
import os
import socket
import subprocess
import sys

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "passive")                # threads that wait take no processor from the other worker
import torch  # noqa: E402

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """Two workers where pytest-xdist is there and nobody chose otherwise (-n 0: one): most tests keep one core busy."""
    if getattr(config.option, "numprocesses", 0) is None and not (config.option.usepdb or "PYTEST_XDIST_WORKER" in os.environ):
        config.option.numprocesses, config.option.dist = 2, "worksteal"


@pytest.fixture(autouse=True)
def fresh_environment(monkeypatch):
    """Tests must not depend on the caller's settings."""
    monkeypatch.delenv("WKV_IMPL", raising=False)
    torch.manual_seed(0)


def ok(done):
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def kill_after(run, step, out_dir, settings):
    """Run train.py and kill it as soon as the checkpoint of `step` is written: os._exit leaves no time to tidy up."""
    script = os.path.join(ROOT, "train.py")
    code = (f"import os, runpy, sys, model\nsys.argv = ['train.py', '--out_dir={out_dir}']\n"
            "save = model.save_checkpoint\n"
            f"def killer(path, content):\n    save(path, content)\n    content['step'] == {step} and os._exit(9)\n"
            f"model.save_checkpoint = killer\nrunpy.run_path({script!r}, run_name='__main__')")
    done = run(code, **settings)
    assert done.returncode == 9, done.stderr[-2000:]


# A process that has imported torch and does nothing but fork: a script then starts in a tenth of a second instead of two.
ZYGOTE = """
import json, os, runpy, signal, sys, traceback
import numpy, torch, torch._dynamo, torch.distributed, torch.utils.cpp_extension, tqdm
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
        signal.alarm(job["seconds"])
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


class Zygote:
    """Starts scripts by forking; a context manager."""

    def __enter__(self):
        self.process = subprocess.Popen([sys.executable, "-c", ZYGOTE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        return self

    def __exit__(self, *error):
        self.process.stdin.close()
        self.process.wait()

    def run(self, argv, envs, cwd, files, seconds=120):
        """A script's command line, in one process for each of the environments `envs` -> CompletedProcess, with the first one's output,
        which goes to the two `files`; after so many seconds it is killed by SIGALRM."""
        job = dict(argv=list(map(str, argv)), envs=envs, cwd=str(cwd), stdout=str(files[0]), stderr=str(files[1]), seconds=seconds)
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        code = int(self.process.stdout.readline())
        said = (open(f, encoding="utf-8", errors="replace").read() for f in files)
        return subprocess.CompletedProcess(argv, code, *said)


@pytest.fixture(scope="session")
def zygote():
    with Zygote() as started:
        yield started


KEPT = ("PATH", "HOME", "LANG", "TMPDIR", "TORCH_EXTENSIONS_DIR", "VIRTUAL_ENV")      # of the environment


@pytest.fixture
def run(tmp_path, zygote):
    """Run a script of the repository (or lines of Python) as a user would -> CompletedProcess; ranks: in so many processes, as torchrun would,
    with the first one's output; fresh: in a process that was not forked."""
    def call(script, *options, ranks=1, fresh=False, **env):
        if "\n" in script:
            (tmp_path / ".code.py").write_text(f"import sys; sys.path.insert(0, {ROOT!r})\n{script}")
            script = tmp_path / ".code.py"
        env = {k: v for k, v in os.environ.items() if k in KEPT} | {k: str(v) for k, v in env.items()}
        argv, envs = [os.path.join(ROOT, script), *map(str, options)], [env]
        if fresh:
            return subprocess.run([sys.executable, *argv], cwd=tmp_path, env=env, capture_output=True, text=True, errors="replace")
        if ranks > 1:
            with socket.socket() as s:
                s.bind(("127.0.0.1", 0))
                world = dict(WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(s.getsockname()[1]))
            envs = [env | world | dict(RANK=str(i), LOCAL_RANK=str(i)) for i in range(ranks)]
        return zygote.run(argv, envs, tmp_path, [tmp_path / ".stdout", tmp_path / ".stderr"])
    return call
