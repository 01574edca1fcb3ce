"""Sample from a checkpoint: task answers, text, infills, latents.

    python sample.py --ckpt=out/ckpt.pt                                    a task's checkpoint: answers to evaluation rows
    python sample.py --ckpt=out/ckpt.pt --prompt="ROMEO:" --length=200     text after a prompt
    python sample.py --ckpt=out/ckpt.pt --prompt="To be" --suffix="be."    text between the two
    python sample.py --ckpt=out/ckpt.pt --text="ROMEO: ____, and ____"     every _ is a hole of one token (--hole chooses another sign)
    python sample.py --ckpt=out/ckpt.pt --mode=l2t --latent=file.npy       text from latents (of a network trained on texts with latents)
    python sample.py --ckpt=out/ckpt.pt --mode=t2l --text="To be"          a latent from text, written to latent.npy
    python sample.py --ckpt=out/ckpt.pt --mode=joint                       both from nothing (stage2: z from the prior, then text)
    ... --watch=1 shows the denoising step by step
"""
from configurator import stoppable

if __name__ == "__main__":
    stoppable()
import itertools
import os
import sys
import time

import numpy as np
import torch

import data
import diffusion
import model as nets
import tasks
import wkv_cuda
from configurator import configure, one_line_errors, reading, written

# ---- settings ----
ckpt = "out/ckpt.pt"        # checkpoint of train.py
prompt = ""                 # text to go on from
prompt_file = ""            # a file with a prompt a line, of any lengths: all are continued in one batch
suffix = ""                 # text that must follow what is generated
text = ""                   # text with a _ for each token to fill in
hole = "_"                  # the sign of a hole in text: another one where the text itself has _
mode = ""                   # with latents: l2t | t2l | joint | stage2; empty = what is given tells
latent = ""                 # l2t: a .npy file of a latent (D,) or several (n,D), or of the vectors that latents were projected from
lead = 1.0                  # [0, 1] joint: 1 = the latent first, 0 = both at one pace
out = ""                    # t2l, joint and stage2: the .npy file to write latents to; empty = latent.npy for t2l, none for others
length = 0                  # [0, 1e7] tokens to generate after a prompt; 0 = what fits the length trained on
num_samples = 3             # [1, 1e6] samples of each prompt, all in one batch
sampler = ""                # how masks are filled; empty = block or ar for networks trained so, confidence for others (with latents: first_hitting)
steps = 0                   # [0, 1e6] denoiser calls (block: of each block); 0 = what the sampler asks for, at most one a token; ddpm, ddim: 50
threshold = 0.9             # [0, 1] confidence: a draw at least this probable is kept
temperature = 1.0           # [0, 1e6] 0 = always the likeliest token
top_k = 0                   # [0, 1e8] draw from the k likeliest tokens; 0 = from all
top_p = 1.0                 # (0, 1] draw from the likeliest tokens that hold this much probability
guidance = 1.0              # [-1000, 1000] uncond + guidance (cond - uncond), uncond not seeing the given text; 1 = none
eta = 0.0                   # [0, 1] ddim: 0 = deterministic, 1 = as random as ddpm
clamp = False               # ddpm, ddim: every estimate goes to its nearest embeddings
block_size = 0              # [0, 1e7] sampler=block: tokens of a block; 0 = as trained
seed = 1337                 # [0, 9e18] of the draws, and of a task's rows
watch = False               # show each step in the terminal
watch_delay = 0.1           # [0, 60] seconds a step stays on the screen
device = "auto"             # auto | cpu | cuda | mps
wkv_impl = "auto"           # auto | cuda | cpp | torch | loop: back end of the recurrence

MARK, NEW, OFF = "\033[2m", "\033[1;32m", "\033[0m"     # dim for the masked part, green for what a step decided


class Counted:
    """The model as the samplers want it, counting its calls; lengths: (B,) real tokens of each row, unless a call gives others."""

    def __init__(self, model, lengths=None):
        self.model, self.lengths, self.calls, self.carried = model, lengths, 0, 0

    def __call__(self, x, lengths=None, **options):
        self.calls += 1
        if lengths is None and self.lengths is not None and "state" not in options:
            lengths = self.lengths.repeat(len(x) // len(self.lengths))       # guidance doubles the rows
        out = self.model(x, lengths=lengths, **options)
        if options.get("state") is not None:       # bytes a row of what was carried to this call
            self.carried = nets.state_bytes(options["state"]) // len(x)
        return out

    @property
    def cfg(self):
        return self.model.cfg

    def table(self):
        return self.model.table()


def watcher(tokenizer, mask_id):
    """Prints the first row after every step: masks dim, what the step decided green."""
    def step(x, fresh):
        cells = zip(tokenizer.characters(x[0]), x[0].tolist(), fresh[0].tolist())
        print("  " + "".join(paint(c, MARK if i == mask_id else NEW if f else "") for c, i, f in cells), flush=True)
        time.sleep(watch_delay)
    return step


def paint(c, colour):
    return colour + c + OFF if colour and sys.stdout.isatty() else c


def fill(model, tokenizer, x, known, name, layout, lengths=None, diff=None):
    """Fill x (B,T) where not known with the sampler `name`, and report what it took. diff: what a Gaussian network was trained with."""
    counted, begun = Counted(model, lengths), time.perf_counter()
    denoise = counted
    options = dict(steps=steps, threshold=threshold, temperature=temperature, top_k=top_k, top_p=top_p,
                   watch=watcher(tokenizer, model.mask_id) if watch else None)
    if name in ("block", "ar"):
        options["eot"] = tokenizer.eot_id
    if name == "block":
        options |= dict(block_size=block_size or model.cfg.block_size, layout=layout)
    if diff:
        options |= dict(cfg=diff, eta=eta, clamp=clamp, guidance=guidance, lengths=lengths, steps=steps or min(50, diff.diffusion_steps or 50))
    else:
        denoise = diffusion.guided(counted, known, model.mask_id, guidance)
    y = diffusion.SAMPLERS[name](denoise, x, known, model.mask_id,
                                 data.generator(seed, 0, 3), **options)
    assert (y[known] == x[known]).all() and (y != model.mask_id).all()
    taken, n = time.perf_counter() - begun, int((~known).sum())
    print(f"{n} tokens in {counted.calls} denoiser calls, {n / max(1, counted.calls):.1f} a call, {n / taken:.0f} tokens/s ({name}"
          + (f", from a state of {counted.carried:,} bytes a row)" if counted.carried else ")"))
    return y


def body(tokenizer, ids, was, mask_id):
    """A row as text; in a terminal with what was generated in green, and without control characters."""
    if not sys.stdout.isatty():
        return tokenizer.decode(ids)
    runs = itertools.groupby(zip(ids, was), lambda pair: pair[1] == mask_id)
    return "".join(paint(data.visible(tokenizer.decode([i for i, _ in run])), NEW if new else "") for new, run in runs)


def settings_of(config):
    """The settings a checkpoint was trained with, a dict -> all that matter here. SettingError for one that cannot be."""
    groups = nets.ModelConfig, diffusion.DiffusionConfig, tasks.settings(), {"seq_len": (128, "[1, 1e7]")}
    return configure(*groups, argv=[], env={}, show=False, choices=nets.CHOICES | diffusion.CHOICES,
                     adjust=lambda cfg: cfg.adopt(config, (), ckpt)).as_dict()


def prompts_of_file():
    lines = data.read_text(prompt_file)[1].split("\n")
    return lines[:-1] if lines[-1] == "" else lines


def rows_of_text(tokenizer, mask_id, T):
    """What is asked for -> x (B,T) with masks, lengths (B,) or None where all rows are full."""
    encode = lambda piece: torch.from_numpy(tokenizer.encode(piece).astype("int64"))
    masks = lambda n: torch.full((n,), mask_id)
    if sum(map(bool, (text, prompt or suffix, prompt_file))) > 1:
        raise ValueError("give --prompt (with --suffix), --prompt_file or --text, not several: --text may hold a prompt before its holes")
    if len(hole) != 1:
        raise ValueError(f"hole={hole!r} is not allowed: give one character")
    if text and hole not in text:
        raise ValueError(f"--text={text!r} has no hole: write a {hole} for each token to fill in")
    if text:
        rows = [torch.cat([torch.cat([encode(piece), masks(1)]) for piece in text.split(hole)])[:-1]]
    else:
        prompts = [prompt]
        if prompt_file:
            prompts = prompts_of_file()
            if not prompts:
                raise ValueError(f"prompt_file={prompt_file} is empty: write a prompt a line")
        ends = encode(suffix)
        rows = [torch.cat([start := encode(p), masks(length or max(1, T - len(start) - len(ends))), ends]) for p in prompts]
    rows = [row for row in rows for _ in range(num_samples)]
    lengths = torch.tensor([len(row) for row in rows])
    x = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=0)
    return x, lengths if lengths.min() < x.shape[1] else None


def read_latent(model, projection):
    """The file `latent` -> (n,D), projected if it holds what latents were projected from. ValueError for anything else."""
    z = data.load_array(latent)
    z = z[None] if z.ndim == 1 else z
    if z.ndim == 2 and projection and z.shape[1] == len(projection.mean) != model.cfg.latent_dim:
        z = projection(z)
    if z.ndim != 2 or z.shape[1] != model.cfg.latent_dim or z.dtype.kind != "f" or not np.isfinite(z).all():
        also = f" (or {len(projection.mean)}, which are projected)" if projection else ""
        raise ValueError(f"{latent} holds {z.dtype} {z.shape}: this network takes finite numbers, {model.cfg.latent_dim} a latent{also}")
    return torch.from_numpy(z.astype(np.float32))


def with_latents(model, tokenizer, saved, T):
    """What `mode` asks for of a network with latents, printed and written."""
    diff, g, dev, begun = diffusion.trained_with(saved["config"]), data.generator(seed, 0, 3), model.emb.weight.device, time.perf_counter()
    stage2 = model.latent_encoder is not None
    asked = mode or ("l2t" if latent else "stage2" if stage2 else "joint")
    if asked == "joint" and stage2 or asked == "stage2" and not stage2:
        raise ValueError(f"mode={asked} is not for a network trained with objective={saved['config']['objective']}: choose "
                         + ("stage2, l2t or t2l" if stage2 else "joint, l2t or t2l"))
    if asked == "l2t" and not latent or latent and asked != "l2t":
        raise ValueError(f"mode={asked}, latent={latent!r}: mode=l2t takes a .npy file as --latent, the others none")
    gaussian = diffusion.OBJECTIVES[saved["config"]["objective"]].gaussian
    rules = diffusion.GAUSSIAN_STEPS if gaussian else diffusion.DECISIONS
    rule = sampler or ("ddim" if gaussian else "first_hitting")
    if sampler and sampler not in rules:
        raise ValueError(f"sampler={sampler} is not for texts with latents of this network: choose one of {', '.join(rules)}")
    if gaussian and asked != "l2t":
        raise ValueError(f"mode={asked} is not for a network trained with objective=gaussian, which is given its latents: choose l2t")
    draws = dict(temperature=temperature, guidance=guidance)
    texts = draws | dict(top_k=top_k, top_p=top_p, threshold=threshold, watch=watcher(tokenizer, model.mask_id) if watch else None)
    n = length or T
    if n > T:
        raise ValueError(f"length={n} is longer than the seq_len={T} this network was trained on: give at most that")
    if asked == "t2l":
        given = prompts_of_file() if prompt_file else [text or prompt]
        rows = [torch.from_numpy(tokenizer.encode(q).astype("int64"))[:T] for q in given]
        if not rows or not min(map(len, rows)):
            raise ValueError("mode=t2l needs text: give --text, or --prompt_file with a text a line, none of them empty")
        lengths = torch.tensor([len(row) for row in rows])
        x = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        z = diffusion.sample_latent_from_text(model, x.to(dev), g, diff, steps or min(50, diff.diffusion_steps or 50), eta,
                                              lengths=None if lengths.min() == x.shape[1] else lengths.to(dev), **draws)
    elif asked == "l2t":
        z = read_latent(model, data.Projection(*(q.numpy() for q in saved["projection"])) if "projection" in saved else None)
        z = z.repeat_interleave(num_samples, 0)
        texts |= dict(eta=eta, clamp=clamp) if gaussian else {}
        x = diffusion.sample_text_from_latent(model, z.to(dev), n, g, diff, rule, steps=steps, **texts)
    else:
        x, z = diffusion.sample_joint(model, num_samples, n, g, diff, steps or min(64, diff.diffusion_steps or 64), lead, rule, eta, **texts)
    if asked != "t2l":
        for row in x.cpu().tolist():
            print("---\n" + body(tokenizer, row, [model.mask_id] * len(row), model.mask_id))
    path = out or "latent.npy" * (asked == "t2l")
    print(f"{len(z)} {'latents' if asked == 't2l' else 'texts'} in {time.perf_counter() - begun:.1f} s ({asked})"
          + (f", latents {tuple(z.shape)} in {path}" if path else ""))
    if path:
        with written(path) as f:
            np.save(f, z.cpu().float().numpy())


@torch.no_grad()
def main(cfg):
    os.environ["WKV_IMPL"] = wkv_impl
    nets.tune_cpu()
    dev = nets.open_device(device)
    saved = nets.load_checkpoint(ckpt)
    if "tokenizer" not in saved:
        raise ValueError(f"{ckpt} has no tokenizer: give a checkpoint of train.py")
    train_keys = settings_of(saved["config"])
    rows, T = num_samples * (len(prompts_of_file()) if prompt_file else 1), length or train_keys["seq_len"]
    nets.in_memory(8 * rows * T * max(1, saved["model_config"].get("vocab_size", 1)), f"num_samples={num_samples}, length={length}")
    with reading(ckpt, "its tokenizer is damaged"):
        tokenizer = data.Tokenizer(**saved["tokenizer"])
    model = nets.from_pretrained(ckpt, saved).to(dev).eval()
    saved["config"] = train_keys
    task, trained = tasks.chosen(train_keys), train_keys.get("objective") or "masked_mean"
    fits = diffusion.OBJECTIVES[trained].sampler
    name, layout = sampler or fits, "b3d" if trained == "b3d" else "block"
    gaussian = lambda sampler: sampler in diffusion.GAUSSIAN_STEPS
    diff = diffusion.trained_with(train_keys) if gaussian(fits) else None
    if (name == "ar") != (fits == "ar") or gaussian(name) != gaussian(fits):
        raise ValueError(f"sampler={name} is not for a network trained with objective={trained}: leave sampler out")
    if guidance != 1 and name in ("block", "ar"):
        raise ValueError(f"guidance={guidance:g} is for whole sequences, sampler={name} goes on from a state: leave it at 1")
    if task and not (prompt or suffix or prompt_file or text):
        source = data.TaskSource(task, tasks.params(task, train_keys), train_keys["seq_len"])
        x, masked, lengths = source.eval_rows(num_samples, seed)
        y = fill(model, tokenizer, x.to(dev), ~masked.to(dev), name, layout, lengths if lengths is None else lengths.to(dev), diff).cpu()
        for row in zip(x, masked, y):
            print(data.side_by_side(tokenizer, *row) + "\n")
        score = tasks.score(task, source.params, x.numpy(), y.numpy(), masked.numpy())
        print(f"{task}: accuracy {score['acc']:.4f}, exact {score['exact']:.4f} of {num_samples} rows")
        return
    if mode or latent or model.cfg.latent_dim and not (diff or prompt or suffix or prompt_file or text):
        if not model.cfg.latent_dim:
            raise ValueError(f"mode={mode or 'l2t'} needs a network trained on texts with latents, {ckpt} is none: leave mode and latent out")
        return with_latents(model, tokenizer, saved, train_keys["seq_len"])
    x, lengths = rows_of_text(tokenizer, model.mask_id, train_keys["seq_len"])
    if x.shape[1] > train_keys["seq_len"] and name not in ("block", "ar"):
        raise ValueError(f"a row of {x.shape[1]} tokens, given and to generate, is longer than the seq_len={train_keys['seq_len']} this network was "
                         "trained on, and it sees a row whole: give less, or train with --objective=block or ar, which go on without end")
    y = fill(model, tokenizer, x.to(dev), x.to(dev) != model.mask_id, name, layout, lengths if lengths is None else lengths.to(dev), diff).cpu()
    for row, was, n in zip(y, x, [x.shape[1]] * len(x) if lengths is None else lengths.tolist()):
        ids, eot = row[:n].tolist(), tokenizer.eot_id
        ids = ids[:ids.index(eot) + 1] if eot in ids else ids                  # the text ends where it says so
        print("---\n" + body(tokenizer, ids, was.tolist(), model.mask_id))


if __name__ == "__main__":
    with one_line_errors():
        main(configure(globals(), show=False, families=("WKV_*",), prefix="SAMPLE_", choices=dict(
            sampler=["", *diffusion.SAMPLERS], mode=["", "l2t", "t2l", "joint", "stage2"], wkv_impl=wkv_cuda.BACK_ENDS)))
