"""Sample from a checkpoint: task answers, text, infills.

    python sample.py --ckpt=out/ckpt.pt                                    a task's checkpoint: answers to evaluation rows
    python sample.py --ckpt=out/ckpt.pt --prompt="ROMEO:" --length=200     text after a prompt
    python sample.py --ckpt=out/ckpt.pt --text="ROMEO: ____, and ____"     every _ is a hole of one character
    ... --watch=1 shows the denoising step by step
"""
import os
import sys
import time

import torch

import data
import diffusion
import model as nets
import tasks
import wkv_cuda
from configurator import configure, one_line_errors

# ---- settings ----
ckpt = "out/ckpt.pt"        # checkpoint of train.py
prompt = ""                 # text to go on from
text = ""                   # text with a _ for each character to fill in
length = 0                  # characters to generate after the prompt; 0 = what fits the length trained on
num_samples = 3             # rows, all in one batch
sampler = "confidence"      # how masks are filled
steps = 0                   # largest number of denoiser calls for a window; 0 = as many as the threshold asks for
threshold = 0.9             # a draw at least this probable is kept
temperature = 1.0           # 0 = always the likeliest token
top_k = 0                   # draw from the k likeliest tokens; 0 = from all
seed = 1337                 # of the draws, and of a task's rows
watch = False               # show each step in the terminal
watch_delay = 0.1           # seconds a step stays on the screen
device = "auto"             # auto | cpu | cuda | mps
wkv_impl = "auto"           # auto | cuda | cpp | torch | loop: back end of the recurrence

MARK, NEW, OFF = "\033[2m", "\033[1;32m", "\033[0m"     # dim for the masked part, green for what a step decided


class Counted:
    """The model as the samplers want it: ids -> logits, counting its calls."""

    def __init__(self, model, lengths=None):
        self.model, self.lengths, self.calls = model, lengths, 0

    def __call__(self, x):
        self.calls += 1
        return self.model(x, lengths=self.lengths).logits


def watcher(tokenizer, mask_id):
    """Prints the first row after every step: masks dim, what the step decided green."""
    def step(x, fresh):
        cells = zip(tokenizer.characters(x[0]), x[0].tolist(), fresh[0].tolist())
        print("  " + "".join(paint(c, MARK if i == mask_id else NEW if f else "") for c, i, f in cells), flush=True)
        time.sleep(watch_delay)
    return step


def paint(c, colour):
    return colour + c + OFF if colour and sys.stdout.isatty() else c


def fill(model, tokenizer, x, known, lengths=None):
    """Fill x (B,T) where not known with the chosen sampler, and report what it took."""
    denoise, begun = Counted(model, lengths), time.perf_counter()
    options = dict(steps=steps, threshold=threshold, temperature=temperature, top_k=top_k)
    y = diffusion.SAMPLERS[sampler](denoise, x, known, model.mask_id, data.generator(seed, 0, 3),
                                    watch=watcher(tokenizer, model.mask_id) if watch else None, **options)
    taken, n = time.perf_counter() - begun, int((~known).sum())
    print(f"{n} tokens in {denoise.calls} denoiser calls, {n / max(1, denoise.calls):.1f} a call, {n / taken:.0f} tokens/s")
    return y


@torch.no_grad()
def main(cfg):
    os.environ["WKV_IMPL"] = wkv_impl
    nets.tune_cpu()
    dev = torch.device(device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    saved = nets.load_checkpoint(ckpt)
    if "tokenizer" not in saved:
        raise ValueError(f"{ckpt} has no tokenizer: give a checkpoint of train.py")
    if num_samples < 1 or length < 0 or temperature < 0:
        raise ValueError("num_samples must be at least 1, length and temperature at least 0")
    model, tokenizer = nets.from_pretrained(ckpt, saved).to(dev).eval(), data.Tokenizer(**saved["tokenizer"])
    train_keys = saved["config"]
    task = tasks.chosen(train_keys)
    if task and not prompt and not text:
        source = data.TaskSource(task, tasks.params(task, train_keys), train_keys["seq_len"])
        x, masked, lengths = source.eval_rows(num_samples, seed)
        y = fill(model, tokenizer, x.to(dev), ~masked.to(dev), lengths if lengths is None else lengths.to(dev)).cpu()
        for row in zip(x, masked, y):
            print(data.side_by_side(tokenizer, *row) + "\n")
        score = tasks.score(task, source.params, x.numpy(), y.numpy(), masked.numpy())
        print(f"{task}: accuracy {score['acc']:.4f}, exact {score['exact']:.4f} of {num_samples} rows")
        return
    if text and prompt:
        raise ValueError("give --prompt or --text, not both: --text may hold a prompt, followed by one _ for each character")
    if text and "_" not in text:
        raise ValueError(f"--text={text!r} has no hole: write a _ for each character to fill in")
    encode = lambda piece: torch.from_numpy(tokenizer.encode(piece).astype("int64"))
    if text:
        hole = torch.full((1,), model.mask_id)
        x = torch.cat([torch.cat([encode(piece), hole]) for piece in text.split("_")])[:-1]
    else:
        start = encode(prompt)
        x = torch.cat([start, torch.full((length or max(1, train_keys["seq_len"] - len(start)),), model.mask_id)])
    x = x.to(dev).expand(num_samples, -1)
    known = x != model.mask_id
    y = fill(model, tokenizer, x, known)
    for row, k in zip(y.tolist(), known.tolist()):
        body = tokenizer.decode(row) if not sys.stdout.isatty() else "".join(
            paint(c, "" if was else NEW) for c, was in zip(tokenizer.characters(row), k)).replace("⏎", "\n")
        print("---\n" + body)


if __name__ == "__main__":
    with one_line_errors():
        main(configure(globals(), show=False, families=("WKV_*",), choices=dict(
            sampler=diffusion.SAMPLERS, wkv_impl=wkv_cuda.BACK_ENDS)))
