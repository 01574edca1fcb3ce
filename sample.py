"""Sample from a checkpoint: task answers, text, infills, latents.

    python sample.py --ckpt=out/ckpt.pt             a task's checkpoint: answers to evaluation rows
    ... --prompt="ROMEO:" --length=200              text after a prompt
    ... --chat="Who is Romeo?" --save_state=FILE    an answer; --state=FILE goes on from what was read
    ... --prompt="To be" --suffix="be."             text between the two
    ... --text="ROMEO: ____, and ____"              every _ is a hole of one token (--hole: another sign)
    ... --mode=l2t --latent=file.npy                text from latents, of a network trained with latents
    ... --mode=t2l --text="To be"                   a latent from text, written to latent.npy
    ... --mode=joint                                both from nothing (stage2: z from the prior, then text)
    ... --export=FILE.pth                           the network for programs that read official RWKV-7 files
    ... --html=denoise.html --svg=denoise.svg       a page and a picture that play the denoising
    ... --watch=1                                   shows the denoising step by step"""
from configurator import script

if __name__ == "__main__":
    script()
import hashlib
import itertools
import json
import os
import re
import sys
import time
from html import escape
from pathlib import Path

import numpy as np
import torch

import data
import diffusion
import model as nets
import tasks
import wkv_cuda
from configurator import configure, one_line_errors, reading, replace_file, written

# ---- settings ----
ckpt = "out/ckpt.pt"        # checkpoint of train.py
prompt = ""                 # text to go on from
prompt_file = ""            # a file with a prompt a line, of any lengths: all are continued in one batch
chat = ""                   # a question, as a prompt in the World format: User: ..., Assistant:
state = ""                  # a file of --save_state: the prompt goes on from what was read then
save_state = ""             # file for the state after the prompt, for samplers ar and block
suffix = ""                 # text that must follow what is generated
text = ""                   # text with a _ for each token to fill in
hole = "_"                  # the sign of a hole in text: another one where the text itself has _
mode = ""                   # with latents: l2t | t2l | joint | stage2; empty = what is given tells
latent = ""                 # l2t: a .npy file of latents, (D,) or (n,D), or of what they were projected from
lead = 1.0                  # [0, 1] joint: 1 = the latent first, 0 = both at one pace
out = ""                    # t2l, joint, stage2: .npy file for latents; empty = latent.npy for t2l, else none
length = 0                  # [0, 1e7] tokens to generate after a prompt; 0 = what fits the length trained on
num_samples = 3             # [1, 1e6] samples of each prompt, all in one batch
sampler = ""                # how masks are filled; empty = what fits the objective
steps = 0                   # [0, 1e6] denoiser calls (block: per block); 0 = as the sampler needs
threshold = 0.9             # [0, 1] confidence: a draw at least this probable is kept
temperature = 1.0           # [0, 1e6] 0 = always the likeliest token
top_k = 0                   # [0, 1e8] draw from the k likeliest tokens; 0 = from all
top_p = 1.0                 # (0, 1] draw from the likeliest tokens that hold this much probability
guidance = 1.0              # [-1000, 1000] uncond + guidance (cond - uncond); 1 = none
eta = 0.0                   # [0, 1] ddim: 0 = deterministic, 1 = as random as ddpm
clamp = False               # ddpm, ddim: every estimate goes to its nearest embeddings
block_size = 0              # [0, 1e7] sampler=block: tokens of a block; 0 = as trained
seed = 1337                 # [0, 9e18] of the draws, and of a task's rows
html = ""                   # file for a page that plays the denoising
svg = ""                    # file for an animated picture of it, of the first four samples
watch = False               # show each step in the terminal
watch_delay = 0.1           # [0, 60] seconds a step stays on the screen
device = "auto"             # auto | cpu | cuda | mps
export = ""                 # .pth or .safetensors file: the network in the layout of official RWKV-7 files
wkv_impl = "auto"           # auto | cuda | cpp | torch | loop: back end of the recurrence
weights = "fp32"            # fp32 | bf16 | int8: how matrices are kept; fewer bytes are read faster

MARK, NEW, OFF = "\033[2m", "\033[1;32m", "\033[0m"     # dim: masked; green: what a step decided

class Counted:
    """The network as samplers call it, counting its calls; lengths: (B,) real tokens of each row, unless a
    call gives others."""

    def __init__(self, model, lengths=None):
        self.model, self.lengths, self.calls, self.carried = model, lengths, 0, 0
        self.cfg, self.table, self.mask_id = model.cfg, model.table, model.mask_id

    def __call__(self, x, lengths=None, **options):
        self.calls += 1
        if lengths is None and self.lengths is not None and "state" not in options:
            lengths = self.lengths.repeat(len(x) // len(self.lengths))       # guidance doubles the rows
        out = self.model(x, lengths=lengths, **options)
        if options.get("state") is not None:       # bytes per row of what was carried to this call
            self.carried = nets.state_bytes(options["state"]) // len(x)
        return out

def watcher(tokenizer, mask_id):
    """Prints the first row after every step: masks dim, what the step decided green."""
    def step(x, fresh, sure):
        line = ""
        for cell, i, new in zip(tokenizer.characters(x[0]), x[0].tolist(), fresh[0].tolist()):
            line += paint(cell, MARK if i == mask_id else NEW if new else "")
        print("  " + line, flush=True)
        time.sleep(watch_delay)
    return step if watch else None

class Recorder:
    """What a sampler shows step by step, for the page and the picture. x, known: (B,T), lengths (B,) or None.
    steps[i]: for each call the changes of row i, flat: place, id, how sure in percent; id -1: masked."""

    def __init__(self, tokenizer, mask_id, x, known, lengths, also=None):
        self.tokenizer, self.mask_id, self.also = tokenizer, mask_id, also
        self.lengths = [x.shape[1]] * len(x) if lengths is None else lengths.tolist()
        self.x = x.masked_fill(~known, mask_id).cpu()
        self.given = diffusion.prefix_length(known).tolist()
        self.first, self.sure = self.x, torch.full(x.shape, -100)
        self.steps = [[] for _ in x]

    def __call__(self, x, fresh, sure):
        if self.also:
            self.also(x, fresh, sure)
        x, sure = x.cpu(), (100 * sure.cpu()).long().clamp(0, 99)
        changed = (x != self.x) | fresh.cpu() & ((sure - self.sure).abs() >= 10)
        for i, n in enumerate(self.lengths):
            places = changed[i, :n].nonzero()[:, 0].tolist()
            self.steps[i].append([z for at in places for z in (at, self.id(x[i, at]), int(sure[i, at]))])
        self.x, self.sure = x, torch.where(changed, sure, self.sure)

    def id(self, token):
        return -1 if token == self.mask_id else int(token)

    def finish(self, y, about, sampler, block=0, state=0):
        """y (B,T): what came out. Writes the files html and svg."""
        kind = "gaussian" if sampler in diffusion.GAUSSIAN_STEPS else sampler
        if not torch.equal(self.x, y):             # what a sampler changed after its last step
            self(y, torch.zeros_like(y, dtype=torch.bool), torch.ones(y.shape))
        samples = [self.sample(i, row) for i, row in enumerate(y)]
        told = dict(kind=kind, block=block, state=state, samples=samples)
        if html:
            replace_file(html, page(told, self.tokenizer, about).encode())
        if svg:
            replace_file(svg, picture(samples[:4], self.tokenizer, kind).encode())
        print("played in " + " and ".join(filter(None, (html, svg))))

    def sample(self, i, y):
        """Row i, which became y (T,), up to its end of text."""
        n, eot, given = self.lengths[i], self.tokenizer.eot_id, self.given[i]
        if eot in y[given:n].tolist():
            n = given + y[given:n].tolist().index(eot) + 1
        cut = lambda step: [z for at in range(0, len(step), 3) if step[at] < n for z in step[at:at + 3]]
        text = list(map(data.visible, self.tokenizer.pieces(y[:n].tolist())))
        return dict(ids=[self.id(z) for z in self.first[i, :n]], start=given,
                    steps=list(map(cut, self.steps[i])), text=text)

def watching(tokenizer, mask_id, x, known, lengths=None):
    """What watches the sampling of rows x (B,T) where not known (B,T): a Recorder for a page or a picture."""
    shows = watcher(tokenizer, mask_id)
    return Recorder(tokenizer, mask_id, x, known, lengths, shows) if html or svg else shows

def page(told, tokenizer, about):
    """One file without anything from elsewhere; without JavaScript it shows the final texts."""
    ids = {z for s in told["samples"] for z in [*s["ids"], *(z for step in s["steps"] for z in step[1::3])]}
    told["tokens"] = {i: data.visible(tokenizer.decode([i])) for i in sorted(ids) if i >= 0}
    line = '<div class="read" hidden><div class="bar"><i></i></div><span></span></div>'
    texts = "".join(f'<div><div class="text" id="s{i}">{escape("".join(s["text"]))}</div>{line}</div>'
                    for i, s in enumerate(told["samples"]))
    content = json.dumps(told, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    template = Path(__file__).with_name("config").joinpath("denoise.html").read_text(encoding="utf-8")
    parts = {"TITLE": "nanoDiR: a text is denoised", "ABOUT": escape(about), "TEXTS": texts, "DATA": content}
    return re.sub(r"\$([A-Z]+)", lambda m: parts[m[1]], template)

WIDE, HIGH, COLUMNS = 8.43, 20, 72       # of a character, pixels; characters in a line
STYLE = """text{font:14px ui-monospace,Menlo,Consolas,monospace;fill:#1c1f24;white-space:pre}.m{fill:#d0d5db}
.p{fill:#fdfdfb}@media(prefers-color-scheme:dark){text{fill:#e6e8ea}.m{fill:#3a4048}.p{fill:#14171b}}"""

def picture(samples, tokenizer, kind, rest=3.0):
    """An animated SVG that goes round; a program that does not animate shows the final texts."""
    seconds, drawn, row = min(8.0, max(len(s["steps"]) for s in samples)), [], 0
    for sample in samples:
        column = 0
        for text, life in zip(sample["text"], lives(sample, 16 if kind == "gaussian" else 10**6, seconds)):
            width = max(1, len(text.rstrip("\n")))
            if column + width > COLUMNS:
                column, row = 0, row + 1
            drawn += cell(tokenizer, text, life, 12 + column * WIDE, 14 + row * HIGH, width)
            column += width
            if text.endswith("\n"):
                column, row = 0, row + 1
        row += 1.5
    size = f'{24 + COLUMNS * WIDE:.0f} {18 + row * HIGH:.0f}'
    clock = f'<animate id="l" attributeName="opacity" values="0;0" dur="{seconds + rest}s" begin="0s;l.end"/>'
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}"><style>{STYLE}</style>'
            f'<rect class="p" width="100%" height="100%" rx="8"/>'
            f'<rect width="1" height="1" opacity="0">{clock}</rect>{"".join(drawn)}</svg>')

def lives(sample, frames, seconds):
    """What each token of a sample is: [(second, id that it is from then on)], in so many frames at most."""
    steps, now = sample["steps"], list(sample["ids"])
    n, found = min(frames, len(steps)), [[(0.0, i)] for i in now]
    keep = {round((k + 1) * len(steps) / n) - 1 for k in range(n)}
    for k, step in enumerate(steps):
        for place, token in zip(step[::3], step[1::3]):
            now[place] = token
        for life, token in zip(found, now) if k in keep else ():
            if life[-1][1] != token:
                life.append(((k + 1) / len(steps) * seconds, token))
    return found

def cell(tokenizer, text, life, x, y, width):
    """A token that ends as `text`; life: [(second, id that it is from then on)] -> parts of the picture."""
    during = '<set attributeName="{}" to="{}" begin="l.begin+{:.2f}s" dur="{:.2f}s"/>'.format
    place, found = f'visibility="hidden" x="{x:.1f}" y="{y}"', []
    for (begin, token), (end, _) in zip(life, life[1:]):
        shows = during("visibility", "visible", begin, end - begin)
        if token < 0:
            size = f'width="{width * WIDE - 1.5:.1f}" height="16" rx="2"'
            found.append(f'<rect class="m" {place} {size}>{shows}</rect>')
        else:
            was = escape(data.visible(tokenizer.decode([token]))[:width])
            found.append(f'<text {place} dy="13">{was}{shows}</text>')
    if text.strip():
        last, hidden = life[-1][0], ""
        if last:
            hidden = during("visibility", "hidden", 0, last) + during("fill", "#0a7f3f", last, 0.8)
        found.append(f'<text x="{x:.1f}" y="{y}" dy="13">{escape(text.strip(chr(10)))}{hidden}</text>')
    return found

def paint(text, colour):
    return colour + text + OFF if colour and sys.stdout.isatty() else text

def body(tokenizer, ids, was, mask_id):
    """A row as text; in a terminal with what was generated in green, and without control characters."""
    if not sys.stdout.isatty():
        return tokenizer.decode(ids)
    out = ""
    for new, run in itertools.groupby(zip(ids, was), lambda pair: pair[1] == mask_id):
        out += paint(data.visible(tokenizer.decode([i for i, _ in run])), NEW if new else "")
    return out

def settings_of(config):
    """The settings a checkpoint was trained with, a dict -> all that matter here. SettingError for one that
    cannot be."""
    groups = nets.ModelConfig, diffusion.DiffusionConfig, tasks.settings(), {"seq_len": (128, "[1, 1e7]")}
    return configure(*groups, argv=[], env={}, show=False, choices=nets.CHOICES | diffusion.CHOICES,
                     adjust=lambda cfg: cfg.adopt(config, (), ckpt)).as_dict()

def lines_of(path):
    """The lines of a prompt file."""
    if found := data.read_text(path)[1]:
        return found.removesuffix("\n").split("\n")
    raise ValueError(f"prompt_file={path} is empty: write a prompt per line")

def rows_of_text(tokenizer, mask_id, T, prompts):
    """What is asked for -> x (B,T) with masks, lengths (B,) or None where all rows are full. prompts: a list
    of texts."""
    encode = lambda piece: torch.from_numpy(tokenizer.encode(piece).astype("int64"))
    masks = lambda n: torch.full((n,), mask_id)
    if len(hole) != 1:
        raise ValueError(f"hole={hole!r} is not allowed: give one character")
    if text and hole not in text:
        raise ValueError(f"--text={text!r} has no hole: write a {hole} for each token to fill in")
    rows, end = [], encode(suffix)
    for p in prompts:
        start = encode(p)
        rows.append(torch.cat([start, masks(length or max(1, T - len(start) - len(end))), end]))
    if text:
        pieces = [torch.cat([encode(piece), masks(1)]) for piece in text.split(hole)]
        rows = [torch.cat(pieces)[:-1]]
    return padded([row for row in rows for _ in range(num_samples)])

def padded(rows):
    """Rows of ids -> x (B,T), lengths (B,) or None where all rows are full."""
    lengths = torch.tensor([len(row) for row in rows])
    x = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return x, None if lengths.min() == x.shape[1] else lengths

def fill(model, objective, tokenizer, x, lengths, known):
    """Fill x (B,T) where not known, and report what it took -> x on the CPU."""
    device, begun = model.emb.weight.device, time.perf_counter()
    x, known, lengths = (z if z is None else z.to(device) for z in (x, known, lengths))
    counted, name = Counted(model, lengths), sampler or objective.sampler
    options = dict(sampler=name, steps=steps, threshold=threshold, temperature=temperature, top_k=top_k,
                   top_p=top_p, guidance=guidance, eta=eta, clamp=clamp, block_size=block_size,
                   eot=tokenizer.eot_id, lengths=lengths,
                   watch=watching(tokenizer, model.mask_id, x, known, lengths))
    if save_state and not state and not known[:, 0].all():
        raise ValueError(f"save_state={save_state} is for the state after a prompt: give --prompt or --chat")
    if state or save_state:
        check_stateful(model, name)
        context = opened_state(model, name) if state else diffusion.Context(start=objective.start_id)
        options["context"] = context
    y = objective.fill(counted, x, known, data.generator(seed, 0, 3), **options)
    if save_state:
        write_state(model, name, context)
    assert (y[known] == x[known]).all() and (y != model.mask_id).all()
    taken, n = time.perf_counter() - begun, int((~known).sum())
    carried = f", from a state of {counted.carried:,} bytes per row" if counted.carried else ""
    print(f"{n} tokens in {counted.calls} denoiser calls, {n / max(1, counted.calls):.1f} per call, "
          f"{n / taken:.0f} tokens/s ({name}{carried})")
    if html or svg:
        about = f"{n} tokens in {counted.calls} denoiser calls, {name}, by {ckpt}"
        size = (block_size or model.cfg.block_size) * (name == "block")
        options["watch"].finish(y.cpu(), about, name, size, counted.carried)
    return y.cpu()

def refuse(names, why):
    """ValueError for one of the settings `names` that is given, though it would do nothing."""
    for name in names.split():
        if globals()[name]:
            raise ValueError(f"{name}={globals()[name]} {why}: leave it out")

def weights_digest(model):
    """Tells networks apart, as text: a state means nothing to another one."""
    told = torch.cat([model.emb.weight[:64].flatten(), model.ln_out.weight]).float().cpu()
    return hashlib.sha256(told.numpy().tobytes()).hexdigest()

def check_stateful(model, name):
    if name not in diffusion.STATEFUL or set(nets.pattern(model.cfg)) != {"rwkv7"}:
        raise ValueError(f"state and save_state are for the samplers {' and '.join(diffusion.STATEFUL)} and "
                         f"mixer=rwkv7, not for sampler={name}, mixer={model.cfg.mixer}: leave them out")

def write_state(model, name, context):
    """The state after the prompt, which all rows have in common, to the file save_state."""
    layers = [{key: z[:1].clone() for key, z in layer._asdict().items() if z is not None}
              for layer in context.state or []]
    last = None if context.last is None else context.last[:1].clone()
    told = dict(sampler=name, network=weights_digest(model))
    nets.save_checkpoint(save_state, told | dict(state=layers, last=last))
    print(f"state after the prompt: {save_state}")

def opened_state(model, name):
    """The file `state` -> a Context. ValueError for one of another network or sampler."""
    found = nets.read_tensors(state) if os.path.isfile(state) else {}
    known = isinstance(found, dict) and found.get("network") == weights_digest(model)
    if not known or found.get("sampler") != name:
        raise ValueError(f"state={state} is not of this network with sampler={name}: make one with "
                         "--save_state=FILE and a prompt")
    with reading(state, "make it anew with --save_state"):
        layers = [nets.LayerState(**layer) for layer in found["state"]]
        shapes = [[z.shape for z in layer if z is not None] for layer in layers]
        last, device = found["last"], model.emb.weight.device
        whole = model(torch.zeros(1, 1, dtype=torch.long, device=device), finished_text=True).state
        if shapes != [[z.shape for z in layer if z is not None] for layer in whole]:
            raise ValueError("its layers have other shapes")
    moved = lambda z: z.to(device) if torch.is_tensor(z) else z
    return diffusion.Context([nets.LayerState(*map(moved, layer)) for layer in layers], last=moved(last))

def write_official(model, tokenizer):
    """The network to the file `export`."""
    if weights == "int8":
        raise ValueError("weights=int8 is not for the official layout: choose fp32 or bf16")
    kept = nets.official_weights(model, wkv_cuda.KEPT[weights])
    if export.endswith(".safetensors"):
        with reading(export, "pip install safetensors, or give a .pth file"):
            from safetensors.torch import save
        with written(export) as f:
            f.write(save(kept))
    else:
        nets.save_checkpoint(export, kept)
    start = "" if model.cfg.start_token == 0 else "; before a text it had the mask, others have token 0"
    n = sum(map(torch.numel, kept.values()))
    print(f"{export}: {n:,} numbers in {weights}, {tokenizer.kind} tokens{start}")

def answer_task(model, objective, tokenizer, name, settings):
    """Answers to rows of the task's evaluation set, with a score."""
    source = data.TaskSource(name, tasks.params(name, settings), settings["seq_len"])
    refuse("length out", "is not for a task's answers")
    x, masked, lengths, _ = source.eval_rows(num_samples, seed)
    y = fill(model, objective, tokenizer, x, lengths, ~masked)
    for row in zip(x, masked, y):
        print(data.side_by_side(tokenizer, *row) + "\n")
    got = source.score(x, y, masked)
    print(f"{name}: accuracy {got[f'{name}_acc']:.4f}, exact {got[f'{name}_exact']:.4f} of {len(x)} rows")

def write_text(model, objective, tokenizer, T, prompts):
    """Text after prompts, between a prompt and a suffix, or in holes."""
    refuse("out", "is for latents, not for texts alone")
    x, lengths = rows_of_text(tokenizer, model.mask_id, T, prompts)
    if x.shape[1] > T and (sampler or objective.sampler) not in diffusion.STATEFUL:
        raise ValueError(f"a row of {x.shape[1]} tokens, given and to generate, is longer than the "
                         f"seq_len={T} this network was trained on, and it sees a row whole: give less, or "
                         "train with --objective=block or ar, which go on without end")
    y, eot = fill(model, objective, tokenizer, x, lengths, x != model.mask_id), tokenizer.eot_id
    ends = [x.shape[1]] * len(x) if lengths is None else lengths.tolist()
    for row, was, n in zip(y, x, ends):
        ids = row[:n].tolist()
        if eot in ids:                     # the text ends where it says so
            ids = ids[:ids.index(eot) + 1]
        print("---\n" + body(tokenizer, ids, was.tolist(), model.mask_id))

def read_latent(model, projection):
    """The file `latent` -> (n,D), projected if it holds what latents were projected from. ValueError for
    anything else."""
    z, D = np.atleast_2d(data.load_array(latent)), model.cfg.latent_dim
    if z.ndim == 2 and projection and z.shape[1] == len(projection.mean) != D:
        z = projection(z)
    if z.ndim != 2 or z.shape[1] != D or z.dtype.kind != "f" or not np.isfinite(z).all():
        also = f" (or {len(projection.mean)}, which are projected)" if projection else ""
        raise ValueError(f"{latent} holds {z.dtype} {z.shape}: this network takes finite numbers, {D} per "
                         f"latent{also}")
    return torch.from_numpy(z.astype(np.float32))

def write_latents(model, objective, tokenizer, saved, T, prompts):
    """What `mode` asks for of a network with latents, printed and written."""
    refuse("chat state save_state suffix block_size", "is for texts without latents")
    asked = mode or ("l2t" if latent else objective.modes[0])
    device, begun = model.emb.weight.device, time.perf_counter()
    if asked not in objective.modes:
        raise ValueError(f"mode={asked} is not for a network of objective={objective.cfg.objective}: choose "
                         + " or ".join(objective.modes))
    if (asked == "l2t") != bool(latent):
        raise ValueError(f"mode={asked}, latent={latent!r}: mode=l2t takes a .npy file as --latent, the "
                         "others none")
    if asked != "t2l":
        refuse("prompt prompt_file text", f"is not for mode={asked}")
    rule = sampler or objective.latent_sampler
    if not objective.fits_latent(rule):
        rules = filter(objective.fits_latent, diffusion.SAMPLERS)
        raise ValueError(f"sampler={sampler} is not for texts with latents of this network: choose one of "
                         f"{', '.join(rules)}")
    n, g, diff = length or T, data.generator(seed, 0, 3), objective.cfg
    if n > T:
        raise ValueError(f"length={n} is more than seq_len={T} of this network: give at most that")
    draws = dict(temperature=temperature, guidance=guidance, steps=steps, eta=eta)
    texts = draws | dict(top_k=top_k, top_p=top_p, threshold=threshold)
    x, blank = None, lambda rows: torch.full((rows, n), model.mask_id)
    watch_all = lambda rows: watching(tokenizer, model.mask_id, y := blank(rows), y != model.mask_id)
    if asked == "t2l":
        refuse("html svg", "plays texts, mode=t2l gives latents")
        given = [text] if text else prompts
        rows = [torch.from_numpy(tokenizer.encode(q).astype("int64"))[:T] for q in given]
        if not min(map(len, rows)):
            raise ValueError("mode=t2l needs text: give --text, or --prompt_file with a text per line, none "
                             "of them empty")
        ids, lengths = (q if q is None else q.to(device) for q in padded(rows))
        z = diffusion.sample_latent_from_text(model, ids, g, diff, lengths=lengths, **draws)
    elif asked == "l2t":
        kept = saved.get("projection")
        projection = kept and data.Projection(*(q.numpy() for q in kept))
        z = read_latent(model, projection).repeat_interleave(num_samples, 0)
        texts |= dict(sampler=rule, clamp=clamp, watch=watch_all(len(z)))
        x = diffusion.sample_text_from_latent(model, z.to(device), n, g, diff, **texts)
    else:
        texts |= dict(lead=lead, rule=rule, watch=watch_all(num_samples))
        x, z = diffusion.sample_joint(model, num_samples, n, g, diff, **texts)
    for row in [] if x is None else x.cpu().tolist():
        print("---\n" + body(tokenizer, row, [model.mask_id] * len(row), model.mask_id))
    path, kind = (out or "latent.npy", "latents") if x is None else (out, "texts")
    if html or svg:
        texts["watch"].finish(x.cpu(), f"{len(z)} texts ({asked}, {rule}), by {ckpt}", rule)
    where = f", latents {tuple(z.shape)} in {path}" if path else ""
    print(f"{len(z)} {kind} in {time.perf_counter() - begun:.1f} s ({asked}){where}")
    if path:
        with written(path) as f:
            np.save(f, z.cpu().float().numpy())

@torch.no_grad()
def main(cfg):
    os.environ["WKV_IMPL"] = wkv_impl
    nets.tune_cpu()
    for path in filter(None, (html, svg, save_state, export)):
        if (folder := os.path.dirname(path)) and not os.path.isdir(folder):
            raise ValueError(f"{path} cannot be written: there is no folder {folder}")
    device, saved = nets.open_device(cfg.device), nets.load_checkpoint(ckpt)
    if "tokenizer" not in saved:
        raise ValueError(f"{ckpt} has no tokenizer: give a checkpoint of train.py")
    trained = settings_of(saved["config"])
    if sum(map(bool, (text, prompt or suffix, prompt_file, chat))) > 1:
        raise ValueError("give --prompt (with --suffix), --prompt_file, --chat or --text, not several: "
                         "--text may hold a prompt before its holes")
    prompts, T = lines_of(prompt_file) if prompt_file else [prompt], trained["seq_len"]
    if chat:
        prompts = ["\n\n" * bool(state) + data.question(chat)]
    size = num_samples * len(prompts) * (length or T) * max(1, saved["model_config"].get("vocab_size", 1))
    nets.in_memory(8 * size, f"num_samples={num_samples}, length={length}")
    with reading(ckpt, "its tokenizer is damaged"):
        tokenizer = data.Tokenizer(**saved["tokenizer"])
    model = nets.from_pretrained(ckpt, saved).to(device).eval()
    if export:
        return write_official(model, tokenizer)
    nets.keep_weights(model, weights)
    if device.type == "cuda":
        model.forward = nets.Replayed(model.forward)
    task = tasks.chosen(trained)
    kind = data.TaskSource if task else data.TextSource
    name = trained["objective"] or kind.objective
    objective = diffusion.OBJECTIVES[name](diffusion.trained_with(trained | {"objective": name}), model.cfg)
    with_latents = (mode or latent) and objective.fits_latent(sampler)
    if sampler and not objective.fits(sampler) and not with_latents:
        raise ValueError(f"sampler={sampler} is not for a network trained with objective={name}: leave "
                         "sampler out")
    texts = prompt or suffix or prompt_file or text or chat
    if task and not texts:
        answer_task(model, objective, tokenizer, task, trained)
    elif mode or latent or objective.latents and not texts:
        if not model.cfg.latent_dim:
            raise ValueError(f"mode={mode or 'l2t'} needs a network trained on texts with latents, {ckpt} is "
                             "not one: leave mode and latent out")
        write_latents(model, objective, tokenizer, saved, T, prompts)
    else:
        write_text(model, objective, tokenizer, T, prompts)

if __name__ == "__main__":
    with one_line_errors():
        names = dict(sampler=["", *diffusion.SAMPLERS], mode=["", "l2t", "t2l", "joint", "stage2"],
                     wkv_impl=wkv_cuda.BACK_ENDS, weights=wkv_cuda.KEPT)
        main(configure(globals(), show=False, families=("WKV_*",), prefix="SAMPLE_", choices=names))
