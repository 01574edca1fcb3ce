"""Train a diffusion language model on a synthetic task or on a text file, or evaluate one (train=0).

    STRUCT_TASK=1 DW_JRT=1 python train.py
    DATA_PATH=input.txt python train.py
    torchrun --nproc_per_node=2 train.py --data_path=input.txt   # --shard=1 where it does not fit one GPU"""
from configurator import on_stop, script

if __name__ == "__main__":
    script()
import contextlib
import dataclasses
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

import data
import diffusion
import model as nets
import tasks
import wkv_cuda
from configurator import configure, one_line_errors, replace_file, short, written

# ---- settings: each is a key, KEY=value in the environment or --key=value ----
out_dir = "out"             # ckpt.pt, config.json and log.jsonl go here
init_from = "scratch"       # scratch | resume (from out_dir/ckpt.pt) | a checkpoint or official RWKV-7 .pth
train = True                # 0 = only evaluate (weights_path, else init_from, else out_dir/ckpt.pt)
weights_path = ""           # also write the final checkpoint here; with train=0, evaluate this one
data_path = ""              # text, or a folder of `python data.py prepare` or latents; empty = Python's code
data_bin = ""               # token files to learn instead: modded-nanogpt's, or bare uint16 as nanoGPT's
data_val_bin = ""           # ... held-out ones; empty = the last 10 %
use_external_latents = True  # texts with latents: 0 = the texts alone, for a Stage II encoder
skip_missing = False        # texts with latents: leave out those whose latent file is missing
tokenizer = "byte"          # byte | char | gpt2 | rwkv | rwkv:FILE | bpe:FILE; prepared folders know theirs
random_seed = 1337          # [0, 9e18] initialisation, batches and noise
# sizes
seq_len = 128               # [1, 1e7] T, tokens in a row
trim_rows = True            # tasks: cut off columns that are padding in every row of the batch
batch_size = 64             # [1, 65536] rows in the global batch of one optimizer step
device_bsz = 0              # [0, 65536] rows in a micro-batch; 0 = all that a process has
max_iters = 1000            # [1, 1e12] optimizer steps
# optimizer
optimizer = "muon"          # muon: Muon for the matrices, Adam for the rest; adamw: RWKV-LM's rules
muon_lr = 0.014             # [0, 100] muon: the blocks' matrices
adam_lr = 0.03              # [0, 100] muon: vectors and low-rank paths
ln_lr = 0.0015              # [0, 100] muon: norms
wte_lr = 0.15               # [0, 100] muon: token embedding
head_lr = 0.008             # [0, 100] muon: output head
lambda_lr = 0.05            # [0, 100] muon: DW-JRT gates
momentum_iters = 250        # [1, 1e12] muon: steps over which Muon's momentum rises from 0.85 to 0.95
learning_rate = 6e-4        # [0, 100] adamw: all (w0 twice that)
weight_decay = 0.001        # [0, 100] adamw: the big matrices
warmup_iters = 0            # [0, 1e12] steps of linear warm-up
warmdown_iters = 900        # [0, 1e12] last steps, in which the rate falls to 0; 0.9 max_iters unless given
grad_clip = 0.0             # [0, 1e30] largest gradient norm; 0 = no clipping
ema = 0.0                   # [0, 1) decay of an average of the weights, which is evaluated and sampled from
freeze_backbone = False     # what pretrained RWKV-7 weights hold does not learn, only what they lack
train_lm_head = False       # ... but the text head does
use_rwkv_lm_head = True     # pretrained weights: 0 = a text head from scratch, which learns
freeze = ""                 # parameters that do not learn: regular expressions, as emb,blocks.0
unfreeze_after_steps = 0    # [0, 1e12] from this step on ...
unfreeze_patterns = ""      # ... these learn after all (freeze=. and unfreeze_patterns=. is all of them)
dtype = "auto"              # matrix products: fp32 | bf16 (the rest is fp32) | auto = bf16 where it is fast
# evaluation and logging
eval_interval = 200         # [1, 1e12] steps between evaluations and checkpoints
eval_iters = 20             # [1, 1e6] batches of held-out text per evaluation
struct_eval_fixed = True    # tasks: always the same evaluation rows; 0 = fresh ones each time
struct_eval_seed = 1234     # [0, 9e18] tasks: their seed
struct_eval_n = 200         # [1, 1e5] tasks: how many
log_interval = 10           # [1, 1e12] steps between lines of log.jsonl
log_sample = True           # print a sample (IN / GT / PR) with each evaluation
log_win = 80                # [1, 1e6] characters of that sample
# machine
device = "auto"             # auto | cpu | cuda | cuda:1 | mps
wkv_impl = "auto"           # auto | cuda | cpp | torch | loop: back end of the recurrence
threads = 0                 # [0, 4096] CPU threads; 0 = torch's choice
compile = False             # the layers through torch.compile; where it does not work the run goes on without
recompute = False           # layers keep only their input for gradients: less memory, 1.3x the time
shard = False               # torchrun: weights, gradients, optimizer states are sharded (FSDP2)

# ---- settings that depend on others ----

def source_kind(cfg):
    """The class of the data that was asked for."""
    if tasks.chosen(cfg.as_dict()):
        return data.TaskSource
    kinds = {data.PairSource: data.has_pairs, data.ChatSource: data.has_turns}
    return next((kind for kind, fits in kinds.items() if fits(cfg.data_path)), data.TextSource)

def objective_name(cfg):
    """The objective asked for, or that of the data."""
    return cfg.objective or source_kind(cfg).objective

KEEP = ("out_dir", "init_from", "train", "weights_path", "device", "shard")   # never taken from a checkpoint

def defaults_for(cfg):
    """Defaults that depend on other settings; where a run goes on from or evaluates a checkpoint of ours, the
    settings that it was trained with; the objective's; a task's small published sizes, so that the main job
    takes about a minute."""
    path = start_path(cfg)
    cfg.saved = {}
    if path:
        cfg.saved = nets.load_checkpoint(path)
    trained = cfg.saved.get("config")
    if trained and (cfg.init_from == "resume" or not cfg.train):
        cfg.adopt(trained, KEEP, why=path)
        return
    task = tasks.chosen(cfg.as_dict())
    if not cfg.objective and data.has_pairs(cfg.data_path):
        cfg.default("objective", data.PairSource.objective, why="data_path")
    for key, value in diffusion.OBJECTIVES[objective_name(cfg)].defaults.items():
        cfg.default(key, value, why=f"objective={cfg.objective}")
    cfg.default("warmdown_iters", cfg.max_iters * 9 // 10, why="max_iters")
    # the form of DW-JRT that keeps the state which crosses blocks
    if cfg.direction and nets.DIRECTIONS[cfg.direction].sees == "block":
        cfg.default("dw_jrt_inject", "gate", why="direction")
    if cfg.data_bin and (cfg.tokenizer == "gpt2" or not cfg.given("tokenizer")):
        cfg.default("vocab_size", 50304, why="data_bin")       # GPT-2's 50257, padded as nanoGPT does
    if task:
        for key, value in dict(n_layer=2, seq_len=64, batch_size=32).items():
            cfg.default(key, value, why=f"{task}_task")

def start_path(cfg):
    """The checkpoint that a run starts from, "" for a fresh start."""
    own = os.path.join(cfg.out_dir, "ckpt.pt")
    named = {"scratch": own * (not cfg.train), "resume": own}
    return not cfg.train and cfg.weights_path or named.get(cfg.init_from, cfg.init_from)

def check_settings(cfg, saved, world, resumed):
    """What the settings must satisfy before anything is built, and long before anything is written."""
    own = os.path.join(cfg.out_dir, "ckpt.pt")
    micro = cfg.device_bsz or max(1, cfg.batch_size // world)
    if cfg.batch_size % (micro * world):
        fits = max(1, round(cfg.batch_size / (micro * world))) * micro * world
        raise ValueError(f"batch_size={cfg.batch_size} is not a multiple of device_bsz={micro} times {world} "
                         f"process(es): choose batch_size={fits}")
    if cfg.shard and cfg.compile:
        raise ValueError("shard=1 is not for compile=1: choose one of them")
    if cfg.shard and world == 1:
        raise ValueError("shard=1 splits a network over processes: start them with torchrun "
                         "--nproc_per_node=N train.py")
    check_place("out_dir", cfg.out_dir, folder=True)
    if cfg.train and cfg.weights_path:
        check_place("weights_path", cfg.weights_path, folder=False)
    needed = ("step", "config", "tokenizer", "optimizers", "model_config")
    lacking = [key for key in needed if key not in saved]
    if resumed and lacking:
        raise ValueError(f"{own} lacks {', '.join(lacking)}: only a checkpoint of train.py can be resumed, "
                         f"from others start with --init_from={own}")
    rows = cfg.batch_size
    if tasks.chosen(cfg.as_dict()):
        rows = max(rows, cfg.struct_eval_n)
    nets.in_memory(16 * rows * cfg.seq_len, f"seq_len={cfg.seq_len} with {rows} rows")

def check_place(key, path, folder):
    """ValueError unless `path` can be written: a folder that is there or can be made, or a file in one."""
    if not folder and os.path.isdir(path):
        raise ValueError(f"{key}={path} is a folder: give the name of a file")
    where, missing = os.path.abspath(path), []
    while not os.path.lexists(where) or not folder and not missing:
        where, name = os.path.split(where)
        missing.append(name)
    try:
        if not os.path.isdir(where) or not os.access(where, os.W_OK):
            raise OSError(f"{where} is not a folder that can be written")
        for name in missing:               # is one too long, with what is put behind it while it is written?
            with contextlib.suppress(FileNotFoundError):
                os.lstat(os.path.join(where, f"{name}.tmp"))
        if missing[not folder:]:           # some file systems say yes and then refuse
            os.rmdir(tempfile.mkdtemp(dir=where))      # a name that no other process has
    except OSError as e:
        raise ValueError(f"{key}={short(path)} cannot be written ({e.strerror or e}): choose another with "
                         f"--{key}") from None

# ---- processes, and what a run holds on disk ----

def launched():
    """What torchrun says of this process -> rank, world, local rank. ValueError for half of it, or for what
    cannot be."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    given = {name: os.environ[name] for name in names if name in os.environ}
    if not given:
        return 0, 1, 0
    said = ", ".join(f"{name}={value!r}" for name, value in given.items())
    repair = "start with torchrun --nproc_per_node=N train.py, or unset RANK, WORLD_SIZE and LOCAL_RANK"
    try:
        rank, world, local = (int(given[name]) for name in names)
    except (KeyError, ValueError):
        raise ValueError(f"{said}: a process needs all of RANK, WORLD_SIZE and LOCAL_RANK, whole numbers: "
                         f"{repair}") from None
    if not 0 <= rank < world or not 0 <= local < world:
        raise ValueError(f"{said}: there are no such processes: {repair}")
    if world > 1 and not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        raise ValueError(f"{said}, but no MASTER_ADDR and MASTER_PORT: {repair}")
    return rank, world, local

def lock(folder):
    """Hold a folder, if it is there, until this process ends -> the lock. ValueError: another run holds it.
    """
    if not os.path.isdir(folder):
        return None
    held = os.open(folder, os.O_RDONLY)
    try:
        import fcntl
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(held)
        raise ValueError(f"another run is writing to out_dir={folder}: wait for it, or choose another "
                         "--out_dir") from None
    except (OSError, ImportError):         # a file system or a system without locks
        pass
    return held

def print0(text):
    """Print above any progress bar; only the first process does."""
    if os.environ.get("RANK", "0") == "0":
        tqdm.write(text)

def move_aside(path):
    """Starting afresh never overwrites a finished run: its checkpoint becomes ckpt.pt.1, ckpt.pt.2, ..."""
    if os.path.exists(path):
        n = next(n for n in itertools.count(1) if not os.path.exists(f"{path}.{n}"))
        os.replace(path, f"{path}.{n}")
        print0(f"moved the checkpoint of an earlier run to {path}.{n} (--init_from=resume would have gone on "
               "from it)")

class Log:
    """log.jsonl: a dict per line. Until `open`, when the first step is certain, lines are kept back."""

    def __init__(self):
        self.file, self.lines = None, []

    def open(self, path, mode):
        """mode: "w", or "a" to go on; half a line, which a killed run or a full disk left at the end, is cut
        off."""
        if mode == "a" and os.path.exists(path):
            with open(path, "rb+") as f:
                text = f.read()
                f.truncate(text.rfind(b"\n") + 1)
        self.file = open(path, mode, encoding="utf-8")
        self.write()

    def write(self, **row):
        if row:
            self.lines.append(json.dumps(in_json(row)) + "\n")
        if self.file:
            try:
                self.file.write("".join(self.lines))
                self.file.flush()
            except OSError as e:
                raise ValueError(f"{self.file.name} cannot be written ({e.strerror}): the last checkpoint "
                                 "stays, make room and go on with --init_from=resume") from None
            self.lines.clear()

def in_json(x):
    """What JSON can say: null for numbers that are not finite."""
    if isinstance(x, dict):
        return {key: in_json(value) for key, value in x.items()}
    if isinstance(x, float) and not math.isfinite(x):
        return None
    return x

class Stop:
    """Ctrl-C and SIGTERM while training: the first asks for an end after the step, a second ends at once."""

    def __init__(self):
        self.code = 0
        on_stop(self)

    def __call__(self, signum, frame):
        if self.code:
            print("stopped at once: the last checkpoint stays as it is", file=sys.stderr)
            os._exit(128 + signum)
        self.code = 128 + signum

# ---- data and network ----

def open_source(cfg, saved):
    """The data: the chosen task, or data_bin or data_path, with the tokenizer of the checkpoint `saved`, if
    it has one."""
    old, path, T, name = saved.get("tokenizer"), cfg.data_path, cfg.seq_len, objective_name(cfg)
    kind = source_kind(cfg)
    diffusion.OBJECTIVES[name].check_source(name, kind.kind, path)
    asked = cfg.tokenizer if cfg.given("tokenizer") else ""
    if kind is data.TaskSource:
        task = tasks.chosen(cfg.as_dict())
        trim = cfg.trim_rows and not cfg.compile       # compiled shapes stay fixed
        source = kind(task, tasks.params(task, cfg.as_dict()), T, trim)
    else:
        if old:
            asked = data.agreed(asked, old, "the checkpoint")
        if kind is data.PairSource:
            source = kind(path, T, asked, cfg.use_external_latents, cfg.skip_missing)
        elif kind is data.ChatSource:
            source = kind(path, T, asked, cfg.block_size)
        else:
            source = kind(path, T, asked, cfg.data_bin, cfg.data_val_bin, cfg.vocab_size)
    if old and not data.same_vocabulary(old, source.tokenizer.state()):
        raise ValueError(f"the checkpoint's vocabulary {old['alphabet'] or old['kind']!r} is not that of the "
                         f"data ({source.tokenizer.alphabet!r}): use the task it was trained on, or start "
                         "with --init_from=scratch")
    return source

def build_model(cfg, source, path, saved):
    """The network, from scratch or with the weights of a checkpoint; its shape must be what the user asked
    for."""
    V, D = source.tokenizer.vocab_size, source.latent_dim
    if cfg.vocab_size and cfg.vocab_size < V:
        raise ValueError(f"vocab_size={cfg.vocab_size} is too small: the data has {V} tokens; leave it at 0")
    asked = cfg.pick(nets.ModelConfig, vocab_size=cfg.vocab_size or V, latent_dim=cfg.latent_dim or D)
    if D and asked.latent_dim != D:
        raise ValueError(f"latent_dim={asked.latent_dim}, but the latents of {source.name} have {D} "
                         "dimensions: leave it at 0, or make others with python data.py project "
                         f"--dim={asked.latent_dim}")
    was, kind = saved.get("model_config") or {}, diffusion.OBJECTIVES[objective_name(cfg)]
    new = kind.added(was, asked, cfg.objective, path or "init_from=scratch")
    torch.manual_seed(cfg.random_seed)     # for all, or for what the checkpoint lacks
    if not path:
        return kind.prepare(nets.Denoiser(asked), source)
    given = {key for key in nets.ModelConfig.__dataclass_fields__ if cfg.given(key) or key in new}
    changes = {key: getattr(asked, key) for key in given}
    if cfg.init_from == "resume" and cfg.train:        # what learns, not its average
        saved = {key: value for key, value in saved.items() if key != "averaged"}
    model = nets.from_pretrained(path, saved, **changes)
    if not cfg.use_rwkv_lm_head and cfg.init_from != "resume" and cfg.train:
        if model.cfg.tie_embeddings:
            raise ValueError("use_rwkv_lm_head=0 needs a head of its own, but with tie_embeddings the token "
                             "embedding is the head: leave it at 1")
        torch.nn.init.orthogonal_(model.head.weight.data, nets.head_gain(model.cfg))
    if D and model.cfg.latent_dim != D:
        raise ValueError(f"{path} knows latents of {model.cfg.latent_dim} dimensions, those of {source.name} "
                         f"have {D}: project them alike")
    if not was and model.cfg.vocab_size - V >= 128:        # official; some fill their table up
        raise ValueError(f"{path} knows {model.cfg.vocab_size:,} tokens, {source.tokenizer.kind} has "
                         f"{V:,}: use the tokenizer it was trained with, such as --tokenizer=rwkv")
    if model.cfg.vocab_size < V:
        raise ValueError(f"{path} knows {model.cfg.vocab_size} tokens, the data has {V}: use the tokenizer "
                         "it was trained with")
    return model if was.get("latent_dim") else kind.prepare(model, source)

def build_objective(cfg, model):
    """The objective on that network. ValueError where the two do not go together."""
    name = objective_name(cfg)
    settings = cfg.pick(diffusion.DiffusionConfig, objective=name)
    objective = diffusion.OBJECTIVES[name](settings, model.cfg, cfg.max_iters)
    objective.check(nets.direction(model.cfg))
    return objective

def changed_settings(cfg, before):
    """The settings given that shape the optimizers and are not those of `before`, the checkpoint's."""
    keys = ("optimizer", "freeze_backbone", *nets.ModelConfig.__dataclass_fields__)
    return [key for key in keys if cfg.given(key) and getattr(cfg, key) != before.get(key)]

class Learner(torch.nn.Module):
    """The network with its objective as one module: DistributedDataParallel and FSDP see one forward pass,
    however often the loss calls the network."""

    def __init__(self, net, objective):
        super().__init__()
        self.model, self.objective = net, objective

    def forward(self, batch, step):
        return self.objective.loss(self.model, batch, step)

    def evaluate(self, *args):
        return self.objective.evaluate(self.model, *args)

def in_bf16(cfg, device):
    return cfg.dtype == "bf16" or cfg.dtype == "auto" and nets.fast_bf16(device)

def autocast(cfg, device):
    return torch.autocast(device.type, torch.bfloat16, enabled=in_bf16(cfg, device))

def try_compile(cfg, learner, batch, device):
    """Compile the network and try it on a batch; where torch.compile does not work, say so and leave the
    network as it was."""
    nets.compile_blocks(learner.model)
    try:
        with autocast(cfg, device):
            learner(batch, 0).sum().backward()
    except Exception as e:                 # whatever a compiler, a driver or a version can do
        nets.compile_blocks(learner.model, False)
        lines = [line.strip() for line in str(e).splitlines() if line.strip()] or [""]
        print0(f"compile=1 does not work here, going on without: {type(e).__name__}: {lines[0]}")
    learner.zero_grad(set_to_none=True)

def shard_over_processes(learner):
    """Parameters are sharded, each block a group of its own (FSDP2); ln0 has one because it is used outside
    its block."""
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method       # takes a second
    # a block's state is a view, and nothing writes to it
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
    blocks = learner.model.blocks
    for module in (blocks[0].ln0, *blocks, learner):
        fully_shard(module)
    register_fsdp_forward_method(learner, "evaluate")

def gather(state):
    """A nest of tensors with the sharded ones (DTensor) put together, on the CPU of every process."""
    whole = lambda x: x.full_tensor().cpu() if hasattr(x, "full_tensor") else x
    return torch.utils._pytree.tree_map(whole, state)

def reshard_like(p, x):
    """A whole tensor x sharded as p is, if it is."""
    if not hasattr(p, "full_tensor"):
        return x
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(x, p.device_mesh, p.placements)

# ---- what learns ----

def set_trainable(cfg, model, step, unused=""):
    """Which parameters learn at this step: all but those that `freeze` names or freeze_backbone means, and
    from unfreeze_after_steps on unfreeze_patterns, too; never those that match `unused` -> their number."""
    names = [name for name, _ in model.named_parameters()]
    frozen = named(names, "freeze", cfg.freeze)
    if cfg.freeze_backbone:
        frozen |= backbone(cfg, model.cfg, names)
    if step >= cfg.unfreeze_after_steps:
        frozen -= named(names, "unfreeze_patterns", cfg.unfreeze_patterns)
    if unused:
        frozen |= {name for name in names if re.search(unused, name)}
    for name, p in model.named_parameters():
        p.requires_grad_(name not in frozen)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)

def named(names, key, patterns):
    """The names that one of the setting's patterns matches. ValueError for a pattern that matches nothing."""
    found = set()
    for pattern in filter(None, patterns.split(",")):
        try:
            mine = [name for name in names if re.search(pattern, name)]
        except re.error as e:
            raise ValueError(f"{key}={pattern!r} is not a regular expression: {e}") from None
        if not mine:
            raise ValueError(f"{key}={pattern!r} matches no parameter: the names are those of the model, "
                             f"such as {names[0]} or {names[-1]}")
        found |= set(mine)
    return found

def backbone(cfg, net, names):
    """What freeze_backbone freezes, so that finished text is read as before. The embeddings are not among it:
    one row of them, the mask's, must learn (mask_row_only)."""
    if net.fusion == "concat" and "block" in net.direction:
        raise ValueError("freeze_backbone=1 with fusion=concat would change finished text: use fusion=gate")
    head = cfg.train_lm_head or not cfg.use_rwkv_lm_head
    learn = {"emb.weight", "head.weight"} if head else {"emb.weight"}
    added = lambda name: any(part in name for part in nets.ADDED) and not name.endswith("fuse.w_f")
    return {name for name in names if name not in learn and not added(name)}

def mask_row_only(cfg, model, step):
    """freeze_backbone: of the embeddings' gradient only the mask's row stays, unless unfreeze_patterns has
    set them free."""
    patterns = filter(None, cfg.unfreeze_patterns.split(","))
    free = step >= cfg.unfreeze_after_steps and any(re.search(pattern, "emb.weight") for pattern in patterns)
    grad = model.emb.weight.grad
    if cfg.freeze_backbone and not free and grad is not None:
        row = torch.arange(len(grad), device=grad.device) == model.mask_id
        grad *= reshard_like(grad, row.unsqueeze(1))

# ---- steps ----

def lr_factor(cfg, step):
    """Linear warm-up, flat, linear warm-down that would reach 0 one step after the last."""
    up = (step + 1) / max(1, cfg.warmup_iters)
    down = (cfg.max_iters - step) / max(1, cfg.warmdown_iters)
    return min(1.0, up, down)

def set_rates(cfg, groups, base_lrs, step):
    """Learning rates of a step, and Muon's momentum, which rises from 0.85 to 0.95."""
    for group, base in zip(groups, base_lrs):
        group["lr"] = base * lr_factor(cfg, step)
        if "momentum" in group:
            group["momentum"] = 0.85 + 0.1 * min(1.0, step / cfg.momentum_iters)

def micro_batches(step, source, objective, B, device_bsz, seed, rank=0, world=1):
    """This process's rows of a step's global batch of B, in micro-batches -> [Batch], the denominators of the
    loss terms."""
    lo, hi = rank * B // world, (rank + 1) * B // world
    rows = source.train_rows(step, B, lo, hi, seed)
    draw = diffusion.Draw(data.generator(seed, step, 0), B, lo, hi, source.T)
    batch, total = objective.noise(rows, draw, step)
    parts = diffusion.split(device_bsz or hi - lo, *batch)
    return [diffusion.Batch(*part) for part in parts], total

def add_gradients(cfg, trained, learner, parts, total, step, device, world):
    """Gradients of the micro-batches, summed over processes with the last -> this process's loss terms."""
    terms = torch.zeros(total.shape, device=device)
    for i, part in enumerate(parts):
        last, waits = i == len(parts) - 1, contextlib.nullcontext()
        if cfg.shard:
            learner.set_requires_gradient_sync(last)
        elif trained is not learner and not last:
            waits = trained.no_sync()
        with waits:
            with autocast(cfg, device):
                term = trained(part.to(device), step) / total
            (term.sum() * world).backward()            # times world: DDP takes the mean over processes
        terms += term.detach()
    return terms

@dataclasses.dataclass
class Run:
    """What the functions of a run share. Once it is set up, only saved_at and reached change."""
    cfg: object
    lead: bool                             # is this the first process, which writes?
    device: torch.device
    own: str                               # the checkpoint it writes
    source: object
    objective: object
    model: torch.nn.Module
    learner: Learner
    evaluated: Learner                     # the learner, or that of the average
    averaged: object
    optimizers: list
    base_lrs: list
    projection: object                     # of the latents, for the checkpoint
    start: int
    log: Log
    saved_at: object = None                # the last checkpoint's step
    reached: str = ""                      # what the last evaluation says in short

    def way_back(self):
        """What to do when numbers are not finite any more."""
        last = "start again"
        if self.saved_at is not None:
            last = f"the last good checkpoint is {self.own} (step {self.saved_at}); go on from there"
        return f"{last} with a lower rate (--muon_lr, --learning_rate) or --grad_clip=1"

    def groups(self):
        return [group for o in self.optimizers for group in o.param_groups]

def evaluate(run, step):
    """-> {"val_loss": ..., ...}, (target, masked, predicted) of a row to show."""
    cfg = run.cfg
    if run.source.kind == "task":
        seed = cfg.struct_eval_seed if cfg.struct_eval_fixed else f"{cfg.struct_eval_seed} {step}"
        rows = run.source.eval_rows(cfg.struct_eval_n, seed)
    else:
        rows = run.source.eval_rows(cfg.batch_size * cfg.eval_iters)
    with torch.no_grad(), autocast(cfg, run.device):
        generator = data.generator(cfg.struct_eval_seed, 0, 2)
        return run.evaluated.evaluate(run.source, rows.to(run.device), generator, cfg.batch_size)

def report(run, step):
    """Evaluate, print, log."""
    metrics, sample = evaluate(run, step)
    if "alarm" in metrics:
        print0(metrics["alarm"])
    if not math.isfinite(metrics["val_loss"]):
        raise ValueError(f"the evaluation at step {step} gave val_loss={metrics['val_loss']}: "
                         f"{run.way_back()}")
    run.log.write(event="eval", step=step, **metrics)
    ends = ("_acc", "bits_per_char", "loss")
    told = next((key for end in ends for key in metrics if key.endswith(end)), "")
    run.reached = f", {told.replace('_', ' ')} {metrics.get(told, math.nan):.3f}"
    line = []
    for key, value in metrics.items():
        level = re.search(r"_(\d\.\d)$", key)
        if key.endswith("_se") or level and level[1] not in ("0.2", "0.5", "0.8", "1.0"):
            continue                       # of what is known for ten noise levels the screen shows some
        text = f"{key.replace('_', ' ')} {value:.4f}" if isinstance(value, float) else f"{key} {value}"
        if metrics.get(f"{key}_se") is not None:
            text += f" ± {metrics[f'{key}_se']:.4f}"
        line.append(text)
    print0(f"step {step}: " + ", ".join(line))
    if run.cfg.log_sample:
        print0(data.side_by_side(run.source.tokenizer, *(z.cpu() for z in sample), run.cfg.log_win))

def save(run, step):
    """Write a checkpoint. ValueError if a weight is not finite."""
    states = [o.state_dict() for o in run.optimizers]
    averages = run.averaged and run.averaged.state_dict()
    weights, states, averages = gather([run.model.state_dict(), states, averages])
    for name, x in weights.items():
        if x.is_floating_point() and not torch.isfinite(x).all():
            raise ValueError(f"after step {step} {name} holds numbers that are not finite: {run.way_back()}")
    content = dict(model=weights, model_config=dataclasses.asdict(run.model.cfg), step=step,
                   optimizers=states, config=run.cfg.as_dict(), tokenizer=run.source.tokenizer.state())
    if averages:
        content["averaged"] = averages
    if run.projection:
        content["projection"] = [torch.as_tensor(np.asarray(part)) for part in run.projection]
    if run.lead:
        nets.save_checkpoint(run.own, content)
    run.saved_at = step

def restore(optimizers, states, path, changed):
    """The optimizers go on from the states of a checkpoint, with this run's rates and other settings.
    ValueError if the states are of other parameters; `changed`: the settings that were given and are not
    those it was trained with."""
    try:
        for o, state in zip(optimizers, states, strict=True):
            settings = [{k: v for k, v in g.items() if k != "params"} for g in o.param_groups]
            o.load_state_dict(state)
            for g, mine in zip(o.param_groups, settings):
                g.update(mine)
            for p, kept in o.state.items():
                for key, value in kept.items():
                    if torch.is_tensor(value) and value.numel() not in (1, p.numel()):
                        raise ValueError("a state of another shape")
                    if torch.is_tensor(value) and value.shape == p.shape:
                        kept[key] = reshard_like(p, value)
    except Exception as e:                 # a file may hold anything
        repair = "it was written by another version of this code"
        if changed:
            repair = f"leave {', '.join(changed)} out"
        raise ValueError(f"the optimizer's state in {path} is not that of this run ({short(str(e))}): "
                         f"{repair}, or start a new run from its weights with --init_from={path} and another "
                         "--out_dir") from None

def training_bytes(model, optimizers):
    """Weights, 4 bytes each; those that learn have a gradient, and 1 (Muon) or 2 numbers of the optimizer."""
    learning = [(p.numel(), 2 - isinstance(o, nets.Muon)) for o in optimizers for group in o.param_groups
                for p in group["params"] if p.requires_grad]
    return sum(4 * p.numel() for p in model.parameters()) + sum(4 * n * (1 + kept) for n, kept in learning)

def header(cfg, model, optimizers, device):
    """The first line of log.jsonl: all that is needed to repeat the run."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return {"event": "start", "parameters": sum(n for n, _ in sizes),
            "active": sum(n for n, learns in sizes if learns), "git": commit(),
            "training_bytes": training_bytes(model, optimizers), "vocab_size": model.cfg.vocab_size,
            "torch": torch.__version__, "numpy": np.__version__, "python": sys.version.split()[0],
            "device": str(device), "threads": torch.get_num_threads(), "config": cfg.as_dict(),
            "dtype": "bf16" if in_bf16(cfg, device) else "fp32", "kernel": wkv_cuda.backend(device.type)}

def commit():
    """The commit of this code as git describes it, "none" where there is no git or no repository."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, errors="replace",
                              cwd=os.path.dirname(os.path.abspath(__file__)))
        return done.stdout.strip() or "none"
    return "none"

# ---- the run ----

def introduce(cfg):
    """What is going on, for somebody who set nothing."""
    if any(map(cfg.given, cfg.keys)):
        return
    print0("nothing is set, so this learns to fill gaps in Python's own source, byte by byte: masked "
           "diffusion, about 5 minutes\non 2 cores. Ctrl-C stops it and keeps what is learned. Then try\n"
           "  python sample.py --prompt='def ' --html=denoise.html      samples, and a page that plays them\n"
           "  STRUCT_TASK=1 DW_JRT=1 python train.py                    a puzzle instead, in 1 minute\n"
           "  DATA_PATH=FILE python train.py config/shakespeare.py      a text of yours\n"
           "  python train.py --help                                    everything that can be set")

def parallel(run):
    """The learner as the steps call it: over several processes by DistributedDataParallel, unless sharded."""
    if run.cfg.shard or not dist.is_initialized():
        return run.learner
    return DistributedDataParallel(run.learner, find_unused_parameters=not run.objective.uses_all)

def agree(total, ending, device):
    """Sums of the denominators over all processes, and whether one of them is asked to stop: then all do."""
    shared = torch.cat([total.view(-1), total.new_tensor([ending])]).to(device)
    dist.all_reduce(shared)
    return shared[:-1].view_as(total), bool(shared[-1])

def set_up(cfg, saved, resumed, rank, world, device):
    """Data, network, objective, average, optimizers: nothing is written yet -> a Run."""
    path, own, start = start_path(cfg), os.path.join(cfg.out_dir, "ckpt.pt"), 0
    if resumed:
        start = saved["step"]
    source = open_source(cfg, saved)
    model = build_model(cfg, source, path, saved)
    model.recompute = cfg.recompute
    objective = build_objective(cfg, model)
    if not cfg.shard:                      # sharded, it may fit where the whole does not
        model.to(device)
    if cfg.train and not set_trainable(cfg, model, start):
        raise ValueError(f"freeze={cfg.freeze!r} leaves nothing that learns: freeze less, or "
                         "unfreeze_patterns from the start")
    if world > 1:
        dist.init_process_group({"cuda": "nccl"}.get(device.type, "gloo"))
    learner, averaged = Learner(model, objective), None
    evaluated = learner
    if cfg.compile:
        parts, _ = micro_batches(start, source, objective, cfg.batch_size, cfg.device_bsz, cfg.random_seed,
                                 rank, world)
        try_compile(cfg, learner, parts[0].to(device), device)
    if cfg.ema:
        averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(cfg.ema))
        if resumed and "averaged" in saved:
            averaged.load_state_dict(saved["averaged"])
        evaluated = Learner(averaged.module, objective)
    if cfg.shard:
        for part in dict.fromkeys([learner, evaluated]):       # in one order on every process
            shard_over_processes(part)
    optimizers = nets.OPTIMIZERS[cfg.optimizer](model, cfg)
    base_lrs = [group["lr"] for o in optimizers for group in o.param_groups]
    if resumed:
        restore(optimizers, saved["optimizers"], own, changed_settings(cfg, saved["config"]))
    projection = source.projection or saved.get("projection")
    run = Run(cfg, rank == 0, device, own, source, objective, model, learner, evaluated, averaged, optimizers,
              base_lrs, projection, start, Log())
    first = header(cfg, model, optimizers, device)
    run.log.write(**first)
    origin = f"weights of {path}" if path else "from scratch"
    if resumed:
        run.saved_at, origin = start, f"going on from {path} at step {start}"
    size = f"{first['parameters']:,} parameters ({first['training_bytes'] / 2**20:,.0f} MiB to train)"
    machine = f"{first['kernel']} kernel on {device}, {first['threads']} threads"
    print0(f"{source.name}: {size}, {machine}, {origin}")
    return run

def begin(run, held, resumed):
    """The first step can be taken: from here on out_dir is this run's -> the lock on it."""
    cfg = run.cfg
    if run.lead:
        os.makedirs(cfg.out_dir, exist_ok=True)
        held = held or lock(cfg.out_dir)
        if not resumed:
            move_aside(run.own)
        run.log.open(os.path.join(cfg.out_dir, "log.jsonl"), "a" if resumed else "w")
        replace_file(os.path.join(cfg.out_dir, "config.json"), json.dumps(cfg.as_dict(), indent=2).encode())
    if not resumed:
        save(run, 0)
    return held

def end(run, step, stopped):
    """The last checkpoint. stopped: the exit code of a signal that asked for an end before the last step."""
    cfg = run.cfg
    if not stopped:
        report(run, step)
    save(run, step)
    if dist.is_initialized():
        dist.destroy_process_group()
    if stopped:
        print0(f"stopped after step {step} of {cfg.max_iters}, which {run.own} holds: the same command with "
               "--init_from=resume goes on")
        raise SystemExit(stopped)
    copied = f", copied to {cfg.weights_path}" if cfg.weights_path else ""
    if cfg.weights_path and run.lead:
        os.makedirs(os.path.dirname(cfg.weights_path) or ".", exist_ok=True)
        with written(cfg.weights_path) as to, open(run.own, "rb") as checkpoint:
            shutil.copyfileobj(checkpoint, to)
    print0(f"checkpoint {run.own}{copied}; try: python sample.py --ckpt={cfg.weights_path or run.own}")

def main(cfg):
    # processes and machine
    rank, world, local = launched()
    parent, device = os.getppid(), nets.open_device(cfg.device, local)
    os.environ["WKV_IMPL"] = cfg.wkv_impl
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    nets.tune_cpu()

    # the run, from scratch or from a checkpoint
    resumed, saved, cfg.saved = cfg.train and cfg.init_from == "resume", cfg.saved, None
    check_settings(cfg, saved, world, resumed)
    held = cfg.train and rank == 0 and lock(cfg.out_dir)
    if resumed and saved["step"] >= cfg.max_iters:
        open_source(cfg, saved)            # other data than it was trained on would be an error
        return print0(f"the run in {cfg.out_dir}/ckpt.pt is at step {saved['step']} already, "
                      f"max_iters={cfg.max_iters}: nothing to do; to train it further give a larger "
                      "--max_iters")
    introduce(cfg)
    run = set_up(cfg, saved, resumed, rank, world, device)
    if not cfg.train:
        report(run, saved.get("step", 0))
        os.makedirs(cfg.out_dir, exist_ok=True)
        return run.lead and run.log.open(os.path.join(cfg.out_dir, "log.jsonl"), "a")
    del saved
    model, objective, start = run.model, run.objective, run.start
    trained, active, unused_before = parallel(run), set_trainable(cfg, model, start), ""
    kind = torch.bfloat16 if in_bf16(cfg, device) else torch.float32
    flops, peak = 3 * nets.flops_per_token(model.cfg, cfg.seq_len), world * nets.product_flops(device, kind)

    bar = tqdm(range(start, cfg.max_iters), initial=start, total=cfg.max_iters, unit="step",
               disable=not run.lead, dynamic_ncols=True, mininterval=0.1 if sys.stderr.isatty() else 10)
    stop, clock, since, positions = Stop(), time.perf_counter(), start, 0
    for step in bar:
        if world > 1 and os.getppid() != parent:
            raise ValueError("the launcher of this process is gone, so it ends: start again with "
                             "--init_from=resume")
        # 1. evaluation and checkpoint, with the training clock stopped
        if step == 0 or step % cfg.eval_interval == 0 and step > start:
            paused = time.perf_counter()
            report(run, step)
            if step:
                save(run, step)
            clock += time.perf_counter() - paused
        # 2. learning rates, and what learns
        set_rates(cfg, run.groups(), run.base_lrs, step)
        if step == cfg.unfreeze_after_steps > 0:
            now = set_trainable(cfg, model, step)
            print0(f"step {step}: {active:,} parameters learned so far, {now:,} from here on")
            trained, unused_before = parallel(run), None
        if (unused := objective.unused(step)) != unused_before:
            active, unused_before = set_trainable(cfg, model, step, unused), unused
        # 3. gradients: micro-batches add up to the mean over the global batch
        parts, total = micro_batches(step, run.source, objective, cfg.batch_size, cfg.device_bsz,
                                     cfg.random_seed, rank, world)
        ending = bool(stop.code)
        if world > 1:
            total, ending = agree(total, ending, device)
        total = total.to(device).clamp_min(1)
        terms = add_gradients(cfg, trained, run.learner, parts, total, step, device, world)
        positions += world * sum(part.x.numel() for part in parts)
        if world > 1:
            dist.all_reduce(terms)
        loss = terms.sum().item()
        if not math.isfinite(loss):
            raise ValueError(f"the loss is {loss} at step {step}: {run.way_back()}")
        # 4. clipping
        mask_row_only(cfg, model, step)
        logged, norm = (step + 1) % cfg.log_interval == 0 or step == start, None
        if cfg.grad_clip or logged:
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf)
        # 5. the step
        if step == start:
            held = begin(run, held, resumed)
        for o in run.optimizers:
            o.step()
            o.zero_grad(set_to_none=True)
        if run.averaged:
            run.averaged.update_parameters(model)
        # 6. the log
        if logged:
            seconds, extra = time.perf_counter() - clock, objective.describe(step)
            extra |= {f"loss_{name}": term for name, term in zip(objective.terms, terms.view(-1).tolist())}
            ms = seconds / (step + 1 - since) * 1e3
            row = dict(loss=loss, **extra, active=active, lr=run.groups()[-1]["lr"],
                       grad_norm=gather(norm).item(), ms_per_step=ms, tokens_per_s=positions / seconds,
                       mfu=flops * positions / seconds / peak, memory_bytes=nets.peak_memory(device))
            run.log.write(event="train", step=step, **row)
            clock, since, positions = time.perf_counter(), step + 1, 0
            shown = f"loss {loss:.3f}{run.reached}, {row['tokens_per_s']:,.0f} tokens/s"
            bar.set_postfix_str(shown, refresh=False)
        if ending:
            break
    bar.close()
    end(run, step + 1, step + 1 < cfg.max_iters and (stop.code or 143))

FIRST = ("out_dir", "init_from", "data_path", "tokenizer", "seq_len", "batch_size", "max_iters", "n_layer",
         "n_embd", "head_size", "mixer", "direction", "dw_jrt", "objective", "optimizer", "muon_lr",
         "learning_rate", "eval_interval", "device", "dtype")   # what --help shows first
# names of the original experiments that have no effect here; sample.py continues prompts
IGNORED = ("*_eval", "mem_check", "log_output", "gen_tokens", "prompt_len")

if __name__ == "__main__":
    with one_line_errors("no checkpoint was written since the last one that was announced"):
        choices = dict(nets.CHOICES | diffusion.CHOICES, optimizer=nets.OPTIMIZERS,
                       dtype=["auto", "fp32", "bf16"], wkv_impl=wkv_cuda.BACK_ENDS)
        settings = configure(globals(), nets.ModelConfig, diffusion.DiffusionConfig, tasks.settings(),
                             adjust=defaults_for, show=os.environ.get("RANK", "0") == "0", choices=choices,
                             first=FIRST, ignored=IGNORED)
        main(settings)
    on_stop(signal.SIG_IGN)                # all is done and written: nothing to stop any more
