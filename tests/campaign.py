"""Faults, looked for by trying: command lines made from the keys themselves, damaged and crafted files, kills at any moment.

    python tests/campaign.py            all of it (a quarter of an hour on two cores), as a table
    python tests/campaign.py --part=20  a twentieth, drawn at random

Everything that is tried must end in what was asked for or in one line that begins with `error:`, with exit code 0 or 2; never in a
traceback, a crash, a process that does not end, a checkpoint that cannot be read, or a changed checkpoint where there was an error.
tests/test_campaign.py runs a small part of it.
"""
import argparse
import collections
import concurrent.futures
import hashlib
import io
import itertools
import json
import math
import os
import queue
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
from conftest import KEPT, ROOT, Zygote

import configurator
import data
import diffusion
import model as nets
import tasks

TEXT = "the cat sat on the mat, and a dog lay on the log: caf\u00e9.\n" * 60
TINY = dict(max_iters=2, n_layer=1, n_embd=32, head_size=16, batch_size=4, seq_len=32, eval_iters=1, struct_eval_n=2, threads=1, wkv_impl="torch")
JOBS = {"task": dict(struct_task=1, struct_len=4), "text": dict(data_path="t.txt"), "block": dict(data_path="t.txt", objective="block", block_size=8),
        "mixture": dict(data_path="t.txt", objective="mixture", block_sizes="4,0", n_layer=3, loops=2, self_cond=1),
        "alternate": dict(data_path="t.txt", direction="alternate", schedule="bell"),
        "gaussian": dict(data_path="t.txt", objective="gaussian"), "latent": dict(data_path="pairs")}
NUMBERS = ["-1", "0", "1", "2", "-0.5", "0.5", "7", "1e9", "1000000000", "1" + "0" * 23, "9" * 400, "nan", "inf", "-inf", "1e-300", "1e300",
           "x", "0x10", "1.5", "(1, nan)", "-1,inf"]
ENDLESS = [("max_iters", "1000000000")]            # what was asked for, and takes a year
WORDS = ["x", "", ".", "..", "/", "/nowhere/x", "[", "(((", "-" * 3000, "a" * 5000, "\u00e9", "\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16"),
         "0.4,nan", "l2t:0", "cpu", "cuda:7", "~", "t.txt", "None"]


def options(settings):
    return [f"--{key}={value}" for key, value in settings.items()]


def keys_of(script):
    """The keys of a script -> {key: configurator.Key}."""
    groups = [{"__file__": os.path.join(ROOT, script)}]
    if script == "train.py":
        groups += [nets.ModelConfig, diffusion.DiffusionConfig, tasks.settings()]
    return configurator.merge([configurator.section(g) for g in groups], {})


def values(default):
    return ["2", "maybe", "1"] if isinstance(default, bool) else NUMBERS if isinstance(default, (int, float, tuple)) else WORDS


def command_lines(rng):
    """(name, [script, option, ...], environment), in random order, without end."""
    train, sample = keys_of("train.py"), keys_of("sample.py")
    rows = [("train.py", key, value) for key, row in train.items() for value in values(row.default)
            if key not in ("device", "compile") and (key, value) not in ENDLESS]
    rows += [("sample.py", key, value) for key, row in sample.items() for value in values(row.default)]
    rows += [("train.py", "device", value) for value in ("x", "cuda", "cuda:9", "mps", "meta", "")]
    extra = [(["train.py", "config/x.py"], {}), (["train.py", "minus.py"], {}), (["tasks.py", "x"], {}), (["data.py"], {}), (["data.py", "x"], {}),
             (["bench.py", "--suite=text", "--data_path=none.txt", "--quick"], {}), (["bench.py", "--suite=x"], {})]
    for name in data.COMMANDS:
        for key in ("data_path", "out", "dim", "length", "val_share", "shard_tokens", "vocab_size", "max_length", "tokenizer", "pattern", "buckets"):
            extra += [(["data.py", name, "--out=made", f"--{key}={value}"], {}) for value in rng.sample(NUMBERS + WORDS, 3)]
    for half in (dict(RANK="0"), dict(WORLD_SIZE="2"), dict(RANK="0", WORLD_SIZE="0", LOCAL_RANK="0"), dict(RANK="x", WORLD_SIZE="1", LOCAL_RANK="0"),
                 dict(RANK="2", WORLD_SIZE="2", LOCAL_RANK="0"), dict(RANK="0", WORLD_SIZE="-1", LOCAL_RANK="0"), dict(LOCAL_RANK="1"),
                 dict(RANK="0", WORLD_SIZE="2", LOCAL_RANK="0")):
        extra.append((["train.py", *options(TINY | JOBS["task"])], half))
    while True:
        made = list(extra)
        for script, key, value in rows:
            if script == "train.py":
                job = rng.choice(list(JOBS))
                settings = {k: v for k, v in (TINY | JOBS[job]).items() if k != key}
                more = [f"--{k}={rng.choice(values(train[k].default))}" for k in rng.sample(list(train), rng.choice([0, 0, 1])) if k not in ("device", "compile")]
                resumed = ["--init_from=resume"] * (rng.random() < 0.15)
                made.append(([script, *options(settings), *more, *resumed, f"--{key}={value}"], {}))
            else:
                made.append(([script, f"--ckpt={rng.choice(list(JOBS))}/ckpt.pt", "--num_samples=1", "--wkv_impl=torch", f"--{key}={value}"], {}))
        rng.shuffle(made)
        yield from made


def stage(folder, zygote):
    """A folder with what command lines need: texts, a checkpoint of each job, an `out` with an earlier run."""
    (folder / "t.txt").write_text(TEXT)
    (folder / "minus.py").write_text("n_layer = " + "-" * 20000 + "1\n")
    with open(os.devnull, "w") as sys.stdout:
        data.command(["latents", f"--data_path={folder / 't.txt'}", f"--out={folder / 'pairs'}", "--dim=4", "--length=32", "--buckets=64"])
        data.command(["prepare", f"--data_path={folder / 't.txt'}", f"--out={folder / 'tokens'}"])
    sys.stdout = sys.__stdout__
    for job, settings in JOBS.items():
        done = started(zygote, folder, ["train.py", f"--out_dir={job}", *options(TINY | settings)], {})
        assert done.returncode == 0, done.stderr
    shutil.copytree(folder / "task", folder / "out", dirs_exist_ok=True)


def started(zygote, folder, words, env):
    env = {k: v for k, v in os.environ.items() if k in KEPT} | env
    files = [folder / ".stdout", folder / ".stderr"]
    return zygote.run([os.path.join(ROOT, words[0]), *words[1:]], [env], folder, files, seconds=90)


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def verdict(done, folder, before):
    """What is wrong with how a command line ended, "" if nothing."""
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    if done.returncode == -signal.SIGALRM:
        return "hang"
    if "Traceback" in done.stderr or done.returncode < 0 or done.returncode == 1:
        return "traceback"
    if done.returncode not in (0, 2) or done.returncode == 2 and len(errors) != 1:
        return "not one line"
    if done.returncode == 2 and (digest(folder / "out/ckpt.pt") != before or (folder / "out/ckpt.pt.1").exists()):
        return "lost"
    for log in folder.glob("*/log.jsonl"):
        rows = [json.loads(line, parse_constant=lambda word: math.nan) for line in open(log)]
        if done.returncode == 0 and any(isinstance(row.get("val_loss", 0.0), float) and not math.isfinite(row.get("val_loss", 0.0)) for row in rows):
            return "nonsense"
    return ""


def try_command_lines(n, rng, report):
    """n command lines on two forking helpers, each in a folder of its own."""
    lines, places = itertools.islice(command_lines(rng), n), queue.Queue()
    with tempfile.TemporaryDirectory() as root, Zygote() as a, Zygote() as b, concurrent.futures.ThreadPoolExecutor(2) as pool:
        master = Path(root, "master")
        master.mkdir()
        stage(master, a)
        for i, zygote in enumerate((a, b)):
            places.put((zygote, Path(root, str(i))))

        def one(line):
            (words, env), (zygote, folder) = line, places.get()
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(master, folder)
            done = started(zygote, folder, words, env)
            report("command lines", verdict(done, folder, digest(master / "out/ckpt.pt")), " ".join(words)[:400] + f" {env or ''}", done.stderr)
            places.put((zygote, folder))
        list(pool.map(one, lines))


# ---- files: readers called directly, in processes of a limited memory ---------------------------------------------------

def torch_bytes(content):
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def npy(array):
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def readers(folder):
    """name -> (the good file, a function that reads it)."""
    text = lambda path, *more: data.TextSource(str(path), 16, *more)
    return {
        "checkpoint": (folder / "text/ckpt.pt", lambda: open_checkpoint(folder / "text/ckpt.pt")),
        "latent checkpoint": (folder / "latent/ckpt.pt", lambda: open_checkpoint(folder / "latent/ckpt.pt")),
        "text": (folder / "t.txt", lambda: text(folder / "t.txt", "char")),
        "meta.json": (folder / "tokens/meta.json", lambda: text(folder / "tokens")),
        "shard": (folder / "tokens/train_000000.bin", lambda: text(folder / "tokens").train_rows(0, 4, 0, 4, 1)),
        "pairs json": (folder / "pairs/train_data.json", lambda: data.PairSource(str(folder / "pairs"), 16)),
        "latent": (folder / "pairs/latents/train/000003.npy", lambda: data.PairSource(str(folder / "pairs"), 16)),
        "tokens npz": (folder / "pairs/train/000000.npz", lambda: data.PairSource(str(folder / "pairs"), 16)),
        "projection": (folder / "pairs/projection.npz", lambda: data.PairSource(str(folder / "pairs"), 16)),
        "tokenizer.json": (folder / "pairs/tokenizer.json", lambda: data.PairSource(str(folder / "pairs"), 16)),
        "config file": (folder / "c.py", lambda: configurator.configure(nets.ModelConfig, argv=[str(folder / "c.py")], env={}, show=False)),
        "vocabulary": (folder / "b.json", lambda: data.Tokenizer(f"bpe:{folder / 'b.json'}").encode("the cat")),
        "token file": (folder / "t.bin", lambda: data.TextSource("", 16, "byte", data_bin=str(folder / "t.bin"))),
        "jsonl": (folder / "t.jsonl", lambda: text(folder / "t.jsonl"))}


def open_checkpoint(path):
    """As sample.py and a resumed train.py open one."""
    saved = nets.load_checkpoint(str(path))
    configurator.configure(nets.ModelConfig, diffusion.DiffusionConfig, tasks.settings(), {"seq_len": (128, "[1, 1e7]")}, argv=[], env={}, show=False,
                           choices=nets.CHOICES | diffusion.CHOICES, adjust=lambda cfg: cfg.adopt(saved.get("config", {}), (), str(path)))
    with configurator.reading(path, "its tokenizer is damaged"):
        data.Tokenizer(**saved["tokenizer"])
    nets.from_pretrained(str(path), saved)


def good_files(folder):
    (folder / "c.py").write_text('"""Sizes."""\nn_layer = 2\nn_embd = 64\nmixer = "rwkv7"  # which\ndw_jrt_scale = -1.5e0\n')
    (folder / "t.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in TEXT.splitlines()))
    (folder / "t.bin").write_bytes((np.arange(3000) % 256).astype("<u2").tobytes())
    with open(os.devnull, "w") as sys.stdout:
        data.command(["train-bpe", f"--data_path={folder / 't.txt'}", "--vocab_size=300", f"--out={folder / 'b.json'}"])
    sys.stdout = sys.__stdout__


def mutate(content, rng):
    """Bytes, damaged in one of the ways that disks, networks and editors damage them."""
    raw, at = bytearray(content), rng.randrange(max(1, len(content)))
    n = rng.choice([1, 2, 8, 64, 1000])
    kind = rng.randrange(8)
    if kind == 0:
        for _ in range(n):
            raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del raw[at:]
    elif kind == 2:
        del raw[at:at + n]
    elif kind == 3:
        raw[at:at] = bytes(rng.randrange(256) for _ in range(n))
    elif kind == 4:
        raw[at:at + n] = bytes(min(n, len(raw) - at))
    elif kind == 5:
        raw[at:at] = raw[at:at + n]
    elif kind == 6:
        digits = [i for i, byte in enumerate(raw) if 48 <= byte < 58]
        for i in rng.sample(digits, min(len(digits), rng.choice([1, 3]))):
            raw[i:i + 1] = rng.choice([b"9", b"0", b"99999999999", b"-1", b"1e99"])
    else:
        raw = bytearray(rng.choice([b"", b"\x80\x04", b"{}", b"[]", b"null", b"[" * 100_000, b"PK\x03\x04", b"\x93NUMPY\x01\x00\xff\xff", b"\xff\xfe" * 20]))
    return bytes(raw)


def wrong_values():
    return [None, -1, 0, 10**9, 10**23, 1.5, math.nan, "x", [], {}, [[1]], True, "\0", 2**40]


def crafted(folder):
    """(name, reader, the bytes of the file): well formed, and wrong inside."""
    saved = torch.load(folder / "text/ckpt.pt", weights_only=True)
    checkpoint = lambda **change: ("checkpoint", torch_bytes(saved | change))
    for key in saved:
        for value in wrong_values():
            yield f"{key}={value!r:.20}", *checkpoint(**{key: value})
        yield f"without {key}", "checkpoint", torch_bytes({k: v for k, v in saved.items() if k != key})
    for key in ("n_layer", "n_embd", "head_size", "vocab_size", "mixer", "direction", "dim_ffn", "rank_w", "latent_dim"):
        for value in wrong_values():
            yield f"model_config.{key}={value!r:.20}", *checkpoint(model_config=saved["model_config"] | {key: value})
    yield "a newer version", *checkpoint(model_config=saved["model_config"] | dict(of_tomorrow=1))
    for key in ("objective", "seq_len", "struct_task", "noise_levels", "drop_given"):
        for value in wrong_values():
            yield f"config.{key}={value!r:.20}", *checkpoint(config=saved["config"] | {key: value})
    for value in wrong_values():
        yield f"tokenizer.kind={value!r:.20}", *checkpoint(tokenizer=saved["tokenizer"] | dict(kind=value))
        yield f"tokenizer.alphabet={value!r:.20}", *checkpoint(tokenizer=dict(kind="char", alphabet=value))
    weights, w = saved["model"], saved["model"]["emb.weight"]
    odd = {"sparse": w.to_sparse(), "expanded": torch.zeros(1).expand(10**7, 10**4), "complex": w.to(torch.complex64), "int": w.long(), "bool": w > 0,
           "nan": w * math.nan, "scalar": torch.zeros(()), "empty": torch.zeros(0), "text": "x", "list": [1.0], "flat": w.flatten(),
           "quantised": torch.quantize_per_tensor(w, 0.1, 0, torch.qint8), "five": w[None, None, None]}
    for name, value in odd.items():
        yield f"emb.weight {name}", *checkpoint(model=weights | {"emb.weight": value})
        yield f"official emb.weight {name}", "checkpoint", torch_bytes(weights | {"emb.weight": value})
    yield "a layer of 10**9", *checkpoint(model=weights | {"blocks.999999999.att.w0": w})
    yield "official, a layer of 10**9", "checkpoint", torch_bytes(weights | {"blocks.999999999.att.w0": w})
    for prefix in ("module.", "_forward_module.", "model."):
        yield f"prefix {prefix}", "checkpoint", torch_bytes({"state_dict": {prefix + k: v for k, v in weights.items()}})
    meta = json.loads((folder / "tokens/meta.json").read_text())
    for key in (*meta, "train.shards", "train.tokens", "val.chars"):
        outer, _, inner = key.partition(".")
        for value in wrong_values():
            new = meta | {outer: value if not inner else meta[outer] | {inner: value}}
            yield f"meta {key}={value!r:.20}", "meta.json", json.dumps(new).encode()
    for name in ("../train_000000.bin", "/etc/passwd", "train_000000.bin\0"):
        yield f"shard {name!r}", "meta.json", json.dumps(meta | {"train": meta["train"] | dict(shards=[[name, 3]])}).encode()
    for name in ("../../t.txt", "/etc/passwd", 3, [], "\0", ""):
        yield f"latent_path {name!r}", "pairs json", json.dumps([{"text": "x", "latent_path": name}]).encode()
    for name, raw in {"400 GB": npy(np.zeros(4, "f4")).replace(b"(4,), ", b"(99999999999,), "), "objects": npy(np.array([{}], object)),
                      "text": npy(np.array(["a"])), "nan": npy(np.full(4, math.nan, "f4")), "matrix": npy(np.zeros((4, 4)))}.items():
        yield f"latent {name}", "latent", raw
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("input_ids.npy", npy(np.zeros(10**7, np.uint32)))
        z.writestr("attention_mask.npy", npy(np.zeros(10**7, bool)))
    yield "a compressed npz", "tokens npz", file.getvalue()
    yield "deep json", "pairs json", b"[" * 200_000
    yield "deep config", "config file", b"n_layer = " + b"-" * 20_000 + b"1"
    for line in (b"{}", b'{"text": 3}', b"[]", b'{"text": "\\ud800"}', b"x", b'{"text": "' + b"\\u0000" * 10):
        yield f"jsonl {line!r:.20}", "jsonl", line * 3


def read_one(read):
    """-> what is wrong with how a reader took a file, "" if nothing."""
    try:
        read()
    except (ValueError, OSError) as e:
        return "not one line" if "\n" in str(e).strip() else ""
    except SystemExit:
        return ""
    except Exception as e:
        return "" if configurator.too_large(e) else f"traceback {type(e).__name__}: {str(e)[:200]}"
    return ""


def try_files(what, cases, folder, report):
    """(name, reader, bytes) of each case, in a child process for each hundred: a crash is found, too."""
    table, cases = readers(folder), iter(cases)
    while batch := list(itertools.islice(cases, 100)):
        out = folder / ".verdicts"
        out.write_text("")
        if not (child := os.fork()):
            resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30))
            sys.stdout = sys.stderr = open(os.devnull, "w")
            with open(out, "a") as f:
                for name, reader, content in batch:
                    path, read = table[reader]
                    good = path.read_bytes()
                    path.write_bytes(content)
                    signal.alarm(60)
                    begun = time.time()
                    bad = read_one(read)
                    f.write(json.dumps([bad or "hang" * (time.time() - begun > 30)]) + "\n")
                    f.flush()
                    path.write_bytes(good)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        verdicts = [json.loads(line)[0] for line in out.read_text().splitlines()]
        if code:
            verdicts.append("hang" if code == -signal.SIGALRM else f"crash {code}")
        for (name, reader, content), bad in zip(batch, verdicts):
            report(what, bad.split(" ")[0], f"{reader}: {name}", bad)
        if code:                                   # what the killed child left damaged, and the cases after it
            path = table[batch[len(verdicts) - 1][1]][0]
            shutil.copy(folder.parent / "master" / path.relative_to(folder), path)
            cases = itertools.chain(batch[len(verdicts):], cases)


# ---- kills: SIGKILL, SIGTERM and Ctrl-C at any moment, and the run goes on as if nothing had been -----------------------

def try_kills(n, rng, report):
    settings = TINY | JOBS["task"] | dict(max_iters=40, eval_interval=5, log_interval=1, batch_size=8)
    losses = lambda folder: {row["step"]: row["loss"] for row in map(json.loads, open(folder / "out/log.jsonl")) if row["event"] == "train"}
    with tempfile.TemporaryDirectory() as root:
        env = {k: v for k, v in os.environ.items() if k in KEPT} | dict(OMP_NUM_THREADS="1")
        command = [sys.executable, os.path.join(ROOT, "train.py"), *options(settings)]
        whole, cut = Path(root, "whole"), Path(root, "cut")
        whole.mkdir()
        subprocess.run(command, cwd=whole, env=env, check=True, capture_output=True)
        wanted, killed = losses(whole), 0
        while killed < n:
            shutil.rmtree(cut, ignore_errors=True)
            cut.mkdir()
            bad, said, tries = "", "", rng.choice([1, 2, 3])
            for _ in range(tries):
                more = ["--init_from=resume"] * (cut / "out/ckpt.pt").exists()
                child = subprocess.Popen([*command, *more], cwd=cut, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
                time.sleep(rng.uniform(0.5, 4.5))
                how = rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
                child.send_signal(how)
                _, said = child.communicate(timeout=120)
                killed += 1
                if child.returncode not in (0, -signal.SIGKILL, 143, 130) or "Traceback" in said:
                    bad = bad or f"traceback {child.returncode}"
            more = ["--init_from=resume"] * (cut / "out/ckpt.pt").exists()
            done = subprocess.run([*command, *more], cwd=cut, env=env, capture_output=True, text=True)
            left = [f.name for f in (cut / "out").iterdir() if f.name.endswith(".tmp")]
            if done.returncode or losses(cut) != wanted or left:
                bad = bad or "lost"
            report("kills", bad.split(" ")[0], f"{how.name} {bad}", said + done.stderr[-500:], tries)


def main(part, seed):
    torch.set_num_threads(1)                       # a pool of threads would hang the children that are forked below
    rng, seen, bad = random.Random(seed), collections.Counter(), collections.Counter()

    def report(kind, verdict, name, said, tries=1):
        seen[kind] += tries
        if verdict:
            bad[kind, verdict] += 1
            print(f"{kind}: {verdict}: {name}\n    {said[-600:]}", flush=True)
        elif seen[kind] % 100 == 0:
            print(f"{kind}: {seen[kind]} tried", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as root, Zygote() as zygote:
        folder = Path(root, "master")
        folder.mkdir()
        stage(folder, zygote)
        good_files(folder)
        shutil.copytree(folder, Path(root, "work"))
        folder, names = Path(root, "work"), list(readers(folder))
        some = lambda: ((f"damaged {i}", name, mutate(readers(folder)[name][0].read_bytes(), rng)) for i in range(3000 // part) for name in [rng.choice(names)])
        try_files("damaged files", some(), folder, report)
        cases = list(crafted(folder))
        try_files("crafted files", rng.sample(cases, len(cases) // part), folder, report)
    try_command_lines(2000 // part, rng, report)
    try_kills(100 // part, rng, report)
    words = ("traceback", "crash", "hang", "nonsense", "lost", "not one line")
    print("\n| tried | number | " + " | ".join(words) + " |\n|---|---|" + "---|" * len(words))
    for kind, n in seen.items():
        print(f"| {kind} | {n} | " + " | ".join(str(bad[kind, word]) for word in words) + " |")
    return sum(bad.values())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    sys.exit(bool(main(**vars(parser.parse_args()))))
