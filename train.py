"""Train a diffusion language model on a synthetic task or on a text file, or evaluate one (train=0).

    STRUCT_TASK=1 DW_JRT=1 python train.py
    DATA_PATH=input.txt python train.py
    torchrun --nproc_per_node=2 train.py --data_path=input.txt         # --shard=1 where the network does not fit one GPU
"""
from configurator import on_stop, stoppable

if __name__ == "__main__":
    stoppable()
import contextlib
import dataclasses
import functools
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
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
init_from = "scratch"       # scratch | resume (go on from out_dir/ckpt.pt) | path of a checkpoint or official RWKV-7 .pth
train = True                # 0 = only evaluate (weights_path, else init_from, else out_dir/ckpt.pt)
weights_path = ""           # also write the final checkpoint here; with train=0, evaluate this one
data_path = ""              # UTF-8 text to learn, or a folder of `python data.py prepare` or latents; empty = Python's own standard library
data_bin = ""               # token files to learn instead, a name or a pattern: modded-nanogpt's, or bare uint16 as nanoGPT's
data_val_bin = ""           # ... held-out ones; empty = the last 10 %
use_external_latents = True  # texts with latents: 0 = the texts alone, for a Stage II encoder
skip_missing = False        # texts with latents: leave out those whose latent file is missing
tokenizer = "byte"          # byte | char | gpt2 | rwkv | rwkv:FILE | bpe:FILE; prepared folders know theirs, data_bin has gpt2
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
warmdown_iters = 900        # [0, 1e12] last steps, over which the rate falls linearly to 0; 0.9 max_iters unless given
grad_clip = 0.0             # [0, 1e30] largest gradient norm; 0 = no clipping
ema = 0.0                   # [0, 1) decay of an average of the weights, which is what is evaluated and sampled from; 0 = none
freeze_backbone = False     # what pretrained RWKV-7 weights hold does not learn: only what they lack: mask, latents, noise level
train_lm_head = False       # ... but the text head does
use_rwkv_lm_head = True     # pretrained weights: 0 = a text head from scratch, which learns
freeze = ""                 # parameters that do not learn: regular expressions, as emb,blocks.0
unfreeze_after_steps = 0    # [0, 1e12] from this step on ...
unfreeze_patterns = ""      # ... these learn after all (freeze=. and unfreeze_patterns=. is all of them)
dtype = "auto"              # matrix products: fp32 | bf16 (parameters and recurrence stay fp32) | auto = bf16 where it is fast
# evaluation and logging
eval_interval = 200         # [1, 1e12] steps between evaluations and checkpoints
eval_iters = 20             # [1, 1e6] batches of held-out text an evaluation takes
struct_eval_fixed = True    # tasks: always the same evaluation rows; 0 = fresh ones each time
struct_eval_seed = 1234     # [0, 9e18] tasks: their seed
struct_eval_n = 200         # [1, 1e5] tasks: how many
log_interval = 10           # [1, 1e12] steps between lines of log.jsonl
log_sample = True           # print a sample (IN / GT / PR) with each evaluation
log_win = 80                # [1, 1e6] characters of that sample
log_output = False          # at the end, continue prompt_len tokens of an evaluation row by gen_tokens
gen_tokens = 200            # [0, 1e6] ... tokens to generate
prompt_len = 16             # [0, 1e7] ... tokens given
mem_check = False           # at the end, mask everything after prompt_len of one row and print what comes back
# machine
device = "auto"             # auto | cpu | cuda | cuda:1 | mps
wkv_impl = "auto"           # auto | cuda | cpp | torch | loop: back end of the recurrence
threads = 0                 # [0, 4096] CPU threads; 0 = torch's choice
compile = False             # the network through torch.compile, worth its minute on a GPU; where it does not work the run goes on without
shard = False               # torchrun: parameters, gradients and optimizer states in pieces over the processes (FSDP2), where one cannot hold them


class Muon(torch.optim.Muon):
    """torch.optim.Muon with adjust_lr_fn="original", the Newton-Schulz iterations of all matrices of one shape as batched products: the same
    update in half the time, where matrices are small and many. Parameters in pieces (FSDP) take torch's own way."""

    @torch.no_grad()
    def step(self):
        if any(hasattr(p, "full_tensor") for group in self.param_groups for p in group["params"]):
            return super().step()
        for group in self.param_groups:
            params, grads, means, alike = [], [], [], {}
            self._init_group(group, params, grads, means)
            if not params:                             # none of them learns at present
                continue
            torch._foreach_lerp_(means, grads, 1 - group["momentum"])
            if group["weight_decay"]:
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            for p, update in zip(params, torch._foreach_lerp(grads, means, group["momentum"])):
                tall = p.shape[0] > p.shape[1]         # tall ones lie down
                alike.setdefault(tuple(sorted(p.shape)), []).append((p.mT if tall else p, update.mT if tall else update, p.shape[0] / p.shape[1]))
            for shape, some in alike.items():
                n = max(1, 2**24 // math.prod(shape))  # large ones fill the machine by themselves
                for part in (some[i:i + n] for i in range(0, len(some), n)):
                    for (p, _, ratio), update in zip(part, self.orthogonal([update for _, update, _ in part], group)):
                        p.add_(update, alpha=-group["lr"] * max(1, ratio) ** 0.5)

    def orthogonal(self, updates, group):
        """Matrices of one shape, none of them tall -> (n, rows, columns), near their nearest semi-orthogonal ones."""
        x = torch.stack(updates)
        x = x.bfloat16() if muon_in_bf16(x.device) else x.float()
        x /= x.norm(dim=(1, 2), keepdim=True).clamp(min=group["eps"])
        a, b, c = group["ns_coefficients"]
        for _ in range(group["ns_steps"]):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return x


def muon_in_bf16(device):
    """Are the Newton-Schulz iterations in bfloat16, as torch's? On a CPU in float32, which costs 6 % of a step where bfloat16 is
    fast: else rounding grows until one process and two are no longer the same run."""
    return device.type != "cpu" and nets.fast_bf16(device)


def muon_rows(model):
    """Muon (arXiv 2502.16982) for the blocks' matrices, Adam for the rest, a rate for each kind of parameter."""
    rates = dict(emb=wte_lr, head=head_lr, norm=ln_lr, scalar=lambda_lr, vector=adam_lr)
    groups = {}
    for _, p, kind, scale, _ in nets.parameter_kinds(model):
        groups.setdefault((kind, scale), []).append(p)
    matrices = groups.pop(("matrix", 1.0))
    adam = [dict(params=ps, lr=rates[kind] * scale) for (kind, scale), ps in groups.items()]
    return [torch.optim.Adam(adam, betas=(0.9, 0.99), fused=True),
            Muon(matrices, lr=muon_lr, weight_decay=0.0)]


def adamw_rows(model):
    """AdamW as RWKV-LM's train_temp sets it up: w0 at twice the rate, decay on the big matrices only."""
    groups = {}
    for name, p, _, scale, decayed in nets.parameter_kinds(model):
        decayed = decayed and not (freeze_backbone and name == "emb.weight")       # its tokens' rows must stay as they are
        groups.setdefault((scale, decayed), []).append(p)
    return [torch.optim.AdamW([dict(params=ps, lr=learning_rate * scale, weight_decay=weight_decay * decayed)
                               for (scale, decayed), ps in groups.items()], betas=(0.9, 0.99), eps=1e-18, fused=True)]


OPTIMIZERS = {"muon": muon_rows, "adamw": adamw_rows}


def defaults_for(cfg):
    """Defaults that depend on other settings: a task's small published sizes, so that the main job takes about a minute; and
    where a run goes on from or evaluates a checkpoint of ours, the settings that it was trained with."""
    path = start_path(cfg)
    cfg.saved = nets.load_checkpoint(path) if path else {}
    if trained := (cfg.init_from == "resume" or not cfg.train) and cfg.saved.get("config"):
        cfg.adopt(trained, _KEEP, why=path)
        return
    if diffusion.OBJECTIVES[cfg.objective or "task"].gaussian:
        for key, value in dict(gaussian=True, direction="bidirectional", time_cond="adaln_zero", tie_embeddings=True).items():
            cfg.default(key, value, why=f"objective={cfg.objective}")
    if not cfg.objective and data.has_pairs(cfg.data_path):
        cfg.default("objective", data.PairSource.objective, why="data_path")
    if diffusion.OBJECTIVES[cfg.objective or "task"].latent:
        for key, value in dict(direction="bidirectional", time_cond="film", time_inputs=2, grad_clip=1.0).items():
            cfg.default(key, value, why=f"objective={cfg.objective}")
    if cfg.objective == "stage2_variational":
        for key, value in dict(latent_encoder="mlp", use_external_latents=False).items():
            cfg.default(key, value, why=f"objective={cfg.objective}")
    cfg.default("warmdown_iters", cfg.max_iters * 9 // 10, why="max_iters")
    for key, blocks in (("direction", cfg.direction == "block"), ("objective", cfg.objective in ("block", "block_elbo"))):
        if blocks:                         # the form of DW-JRT that keeps the state which crosses blocks
            cfg.default("dw_jrt_inject", "gate", why=key)
    if cfg.data_bin and (cfg.tokenizer == "gpt2" or not cfg.given("tokenizer")):    # GPT-2's 50257, padded as nanoGPT does
        cfg.default("vocab_size", 50304, why="data_bin")
    if task := tasks.chosen(cfg.as_dict()):
        for key, value in dict(n_layer=2, seq_len=64, batch_size=32).items():
            cfg.default(key, value, why=f"{task}_task")


_KEEP = ("out_dir", "init_from", "train", "weights_path", "device", "shard", "log_output", "mem_check")


def start_path(cfg):
    """The checkpoint that a run starts from, "" for a fresh start."""
    own = os.path.join(cfg.out_dir, "ckpt.pt")
    if not cfg.train:
        return cfg.weights_path or {"scratch": own, "resume": own}.get(cfg.init_from, cfg.init_from)
    return {"scratch": "", "resume": own}.get(cfg.init_from, cfg.init_from)


def lr_factor(step):
    """Linear warm-up, flat, linear warm-down that would reach 0 one step after the last."""
    return min(1.0, (step + 1) / max(1, warmup_iters), (max_iters - step) / max(1, warmdown_iters))


def open_source(cfg, saved):
    """The data: the chosen task, or data_bin or data_path, with the tokenizer of the checkpoint `saved`, if it has one."""
    old = saved.get("tokenizer")
    if task := tasks.chosen(cfg.as_dict()):
        source = data.TaskSource(task, tasks.params(task, cfg.as_dict()), seq_len, trim_rows and not compile)
    else:
        asked = tokenizer if cfg.given("tokenizer") else ""
        asked = data.agreed(asked, old, "the checkpoint") if old else asked
        pairs, chosen = data.has_pairs(data_path), diffusion.OBJECTIVES[cfg.objective or "task"]
        if pairs != bool(chosen.latent) and not (pairs and chosen.gaussian):
            latent = ", ".join(k for k, o in diffusion.OBJECTIVES.items() if o.latent)
            raise ValueError(f"objective={cfg.objective or 'masked_mean'} is not for data_path={data_path or 'empty'}: texts with latents "
                             f"(python data.py latents --out=FOLDER) go with {latent} and gaussian, plain text with the others")
        source = (data.PairSource(data_path, seq_len, asked, use_external_latents, skip_missing) if pairs else
                  data.TextSource(data_path, seq_len, asked, data_bin, data_val_bin, cfg.vocab_size))
    if old and not data.same_vocabulary(old, source.tokenizer.state()):
        raise ValueError(f"the checkpoint's vocabulary {old['alphabet'] or old['kind']!r} is not that of the data "
                         f"({source.tokenizer.alphabet!r}): use the task it was trained on, or start with --init_from=scratch")
    return source


def build_model(cfg, source, path, saved):
    """The network, from scratch or with the weights of a checkpoint; its shape must be what the user asked for."""
    V = source.tokenizer.vocab_size
    if cfg.vocab_size and cfg.vocab_size < V:
        raise ValueError(f"vocab_size={cfg.vocab_size} is too small: the data has {V} tokens; leave it at 0")
    chosen, D = diffusion.OBJECTIVES[cfg.objective or source.objective], getattr(source, "latent_dim", 0)
    asked = cfg.pick(nets.ModelConfig, vocab_size=cfg.vocab_size or V, latent_dim=cfg.latent_dim or D)
    if D and asked.latent_dim != D:
        raise ValueError(f"latent_dim={asked.latent_dim}, but the latents of {source.name} have {D} dimensions: leave it at 0, or make others with "
                         f"python data.py project --dim={asked.latent_dim}")
    was = saved.get("model_config") or {}
    fresh = chosen.latent and not was.get("latent_dim")        # latents come to a network that has none
    if cfg.objective == "stage2_variational" and fresh:
        raise ValueError("objective=stage2_variational goes on from a network of Stage I, with latents, which "
                         f"{path or 'init_from=scratch'} is not: give its checkpoint as --init_from")
    if fresh and not asked.latent_dim:
        raise ValueError(f"objective={cfg.objective} needs latents: leave use_external_latents at 1, or give latent_dim")
    if not path:
        torch.manual_seed(random_seed)
        return with_moments(nets.Denoiser(asked), source)
    new = set(nets.ModelConfig.__dataclass_fields__ if fresh else ["latent_encoder"] * (was.get("latent_encoder") == "none"))
    wanted = lambda k: cfg.given(k) or k in new and cfg.sources[k] == f"default with objective={cfg.objective}"
    given = {k: getattr(asked, k) for k in nets.ModelConfig.__dataclass_fields__ if wanted(k)} | (dict(latent_dim=asked.latent_dim) if fresh else {})
    if init_from == "resume" and train:        # what learns, not its average
        saved = {key: value for key, value in saved.items() if key != "averaged"}
    torch.manual_seed(random_seed)                 # for what the checkpoint lacks
    model = nets.from_pretrained(path, saved, **given)
    if not use_rwkv_lm_head and init_from != "resume" and train:
        if model.cfg.tie_embeddings:
            raise ValueError("use_rwkv_lm_head=0 needs a head of its own, but with tie_embeddings the token embedding is the head: leave it at 1")
        torch.nn.init.orthogonal_(model.head.weight.data, nets.head_gain(model.cfg))
    if D and model.cfg.latent_dim != D:
        raise ValueError(f"{path} knows latents of {model.cfg.latent_dim} dimensions, those of {source.name} have {D}: project them alike")
    if fresh:
        with_moments(model, source)
    if model.cfg.vocab_size < V:
        raise ValueError(f"{path} knows {model.cfg.vocab_size} tokens, the data has {V}: use the tokenizer it was trained with")
    return model


def with_moments(model, source):
    """The mean and the scale of the training latents go into the network, and so into its checkpoint."""
    if model.cfg.latent_dim and getattr(source, "latent_dim", 0):
        mean, std = source.moments()
        model.latent_prefix.mean.copy_(mean)
        model.latent_prefix.std.copy_(std)
    return model


def task_rows(source, step):
    """The rows a task is evaluated on: always the same, or with struct_eval_fixed=0 others at each step."""
    return source.eval_rows(struct_eval_n, struct_eval_seed if struct_eval_fixed else f"{struct_eval_seed} {step}")


@torch.no_grad()
def evaluate(denoise, source, bound, mask_id, device, step):
    """-> ({"val_loss": ..., and acc and exact for a task, or bits a character, byte and token with standard errors}, sample to print)."""
    if isinstance(source, data.TaskSource):
        x, masked, lengths = task_rows(source, step)
        logits = torch.cat([denoise(diffusion.mask_tokens(a, m, mask_id).to(device), lengths=n if n is None else n.to(device)).logits.cpu()
                            for a, m, n in data.split(batch_size, x, masked, lengths)])
        loss = torch.nn.functional.cross_entropy(logits[masked], x[masked]).item()
        pred = torch.where(masked, logits.argmax(-1), x)
        score = tasks.score(source.name, source.params, x.numpy(), pred.numpy(), masked.numpy())
        return {"val_loss": loss, **{f"{source.name}_{k}": v for k, v in score.items()}}, (x[0], masked[0], pred[0])
    x, _, _ = source.eval_rows(eval_iters * batch_size)
    g = data.generator(struct_eval_seed, 0, 2)
    batches = [bound(denoise, a.to(device), mask_id, g).double().cpu() for a in x.split(batch_size)]
    nats, means = torch.cat(batches).mean().item(), torch.stack([b.mean() for b in batches])
    disjoint = len(source.val) // source.T             # as many windows share no token
    se = None                                          # a deviation of a few says nothing
    if min(disjoint, len(x)) >= 8:                     # mask counts are stratified over a batch, so batches are independent
        spread = means.std() / len(means) ** 0.5 if len(means) > 1 else batches[0].std() / len(x) ** 0.5
        se = spread.item()
    metrics = {"val_loss": nats, "windows": len(x), "disjoint": min(disjoint, len(x))}
    for unit, per_token in (("char", source.chars_per_token), ("byte", source.bytes_per_token), ("token", 1)):
        if not math.isnan(per_token):      # token files without a vocabulary do not say how many characters they hold
            bits = 1 / math.log(2) / per_token
            metrics |= {f"bits_per_{unit}": nats * bits, f"bits_per_{unit}_se": None if se is None else se * bits}
    masked = torch.rand(x[0].shape, generator=g) < 0.3
    pred = torch.where(masked, denoise(diffusion.mask_tokens(x[:1], masked, mask_id).to(device)).logits[0].argmax(-1).cpu(), x[0])
    return metrics, (x[0], masked, pred)


@torch.no_grad()
def evaluate_gaussian(net, source, diff, device, step):
    """The same for Gaussian diffusion -> (diffusion.gaussian_report's numbers; for a task acc and exact of its answers by DDIM, too; for a text
    the infilling of one row only, and perhaps an alarm), sample to print."""
    g, task = data.generator(struct_eval_seed, 0, 2), isinstance(source, data.TaskSource)
    if task:
        x, masked, lengths = task_rows(source, step)
        shown = masked
    else:
        x, masked, lengths, *z = source.eval_rows(batch_size)
        shown = torch.rand(x.shape, generator=g) < 0.3
    send = lambda z: z if z is None else z.to(device)
    latent = dict(latent=diffusion.clean_latent(net, send(z[0]))) if not task and z and net.cfg.latent_dim else {}
    with autocast(device):
        metrics, alarm = diffusion.gaussian_report(net, send(x), send(masked), send(lengths), g, diff, **latent)
        rows = slice(None) if task else slice(1)
        first = {name: z[:1] for name, z in latent.items()}
        fill = functools.partial(diffusion.SAMPLERS["ddim"], net, cfg=diff, steps=min(20, diff.diffusion_steps or 20), **first)
        pred = torch.cat([fill(send(a), ~send(m), net.mask_id, g, lengths=send(n)).cpu()
                          for a, m, n in data.split(batch_size, x[rows], shown[rows], lengths if lengths is None else lengths[rows])])
    if task:
        score = tasks.score(source.name, source.params, x.numpy(), pred.numpy(), masked.numpy())
        metrics |= {f"{source.name}_{k}": v for k, v in score.items()}
    return metrics | ({"alarm": alarm} if alarm else {}), (x[0], shown[0], pred[0])


@torch.no_grad()
def evaluate_latent(net, source, diff, device):
    """-> diffusion.latent_report on validation texts, and one of them with a third masked, filled in with its latent."""
    g = data.generator(struct_eval_seed, 0, 2)
    x, _, lengths, z = source.eval_rows(eval_iters * batch_size)
    send = lambda q: q if q is None else q.to(device)
    z = z if z.shape[1] else z.new_zeros(len(x), net.cfg.latent_dim)
    with autocast(device):
        metrics = diffusion.latent_report(net, send(x), send(lengths), send(z), g, diff, batch_size)
        row = x[0][:None if lengths is None else int(lengths[0])]
        masked = torch.rand(row.shape, generator=g) < 0.3
        fill = row[None].masked_fill(masked, net.mask_id).to(device)
        z = net.posterior(send(row[None]))[0] if net.latent_encoder is not None else net.latent_prefix.normalise(send(z[:1]))
        pred = torch.where(masked, net(fill, latent=z).logits[0].argmax(-1).cpu(), row)
    return metrics, (row, masked, pred)


def log_header(cfg, model, device):
    """The first line of log.jsonl: all that is needed to repeat the run."""
    count = lambda ps: sum(p.numel() for p in ps)
    return {"event": "start", "parameters": count(model.parameters()),
            "active": count(p for p in model.parameters() if p.requires_grad), "git": commit(),
            "torch": torch.__version__, "numpy": np.__version__, "python": sys.version.split()[0], "device": str(device),
            "dtype": "bf16" if in_bf16(device) else "fp32",
            "kernel": wkv_cuda.backend(device.type), "threads": torch.get_num_threads(), "config": cfg.as_dict()}


def commit():
    """The commit of this code as git describes it, "none" where there is no git or no repository."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, errors="replace",
                              cwd=os.path.dirname(os.path.abspath(__file__)))
        return done.stdout.strip() or "none"
    return "none"


def in_bf16(device):
    return dtype == "bf16" or dtype == "auto" and nets.fast_bf16(device)


def autocast(device):
    return torch.autocast(device.type, torch.bfloat16, enabled=in_bf16(device))


def try_compile(model, device, rows, tell):
    """Compile the network and try it on a batch of that shape; where torch.compile does not work, say so and leave the network as it was."""
    nets.compile_blocks(model)
    try:
        with autocast(device):
            model(torch.zeros(rows, seq_len, dtype=torch.long, device=device)).logits.sum().backward()
    except Exception as e:                 # whatever a compiler, a driver or a version can do
        nets.compile_blocks(model, False)
        lines = [line.strip() for line in str(e).splitlines() if line.strip()]
        tell(f"compile=1 does not work here, going on without: {type(e).__name__}: {lines[0] if lines else ''}")
    model.zero_grad(set_to_none=True)


class Learner(torch.nn.Module):
    """The network and its loss as one module: one forward of DistributedDataParallel or FSDP, however often the loss calls the network. Given a
    function in place of a batch it calls that, which makes parameters whole that FSDP holds in pieces."""

    def __init__(self, model, loss):
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, batch, **options):
        if callable(batch):
            return batch()
        given = {name: value for name, value in batch._asdict().items() if value is not None}
        return self.loss(self.model, **given, **options)


def split(learner):
    """Parameters become pieces, one a process, each block a group of its own (FSDP2); ln0 has one because it is used outside its block."""
    from torch.distributed.fsdp import fully_shard                       # here, since it takes a second to import
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")     # a block's state is one, and nothing writes to it
    blocks = learner.model.blocks
    for module in (blocks[0].ln0, *blocks, learner):
        fully_shard(module)


def whole(state):
    """A nest of tensors with those in pieces (DTensor) put together, on the CPU of every process."""
    return torch.utils._pytree.tree_map(lambda x: x.full_tensor().cpu() if hasattr(x, "full_tensor") else x, state)


def like(p, x):
    """A whole tensor x in the pieces that p is in, if it is."""
    if not hasattr(p, "full_tensor"):
        return x
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(x, p.device_mesh, p.placements)


def restore(optimizers, states, path, changed):
    """The optimizers go on from the states of a checkpoint, with this run's rates and other settings. ValueError if the
    states are of other parameters; `changed`: the settings that were given and are not those it was trained with."""
    try:
        for o, state in zip(optimizers, states, strict=True):
            settings = [{k: v for k, v in g.items() if k != "params"} for g in o.param_groups]
            o.load_state_dict(state)
            for g, mine in zip(o.param_groups, settings):
                g.update(mine)
            for p, kept in o.state.items():
                kept |= {k: like(p, v) for k, v in kept.items() if torch.is_tensor(v) and v.shape == p.shape}
                if any(torch.is_tensor(v) and v.numel() not in (1, p.numel()) for v in kept.values()):
                    raise ValueError("a state of another shape")
    except Exception as e:                 # a file may hold anything
        settings = f"leave {', '.join(changed)} out" if changed else "it was written by another version of this code"
        raise ValueError(f"the optimizer's state in {path} is not that of this run ({short(str(e))}): {settings}, or start a "
                         f"new run from its weights with --init_from={path} and another --out_dir") from None


def thaw(model, step, unused=""):
    """Which parameters learn at this step: all but those that `freeze` names or freeze_backbone means, and from unfreeze_after_steps on
    unfreeze_patterns, too; never those that match `unused` -> their number. ValueError for a pattern that matches nothing."""
    names = [name for name, _ in model.named_parameters()]
    named = lambda key, patterns: {name for q in filter(None, patterns.split(",")) for name in matching(key, q, names)}
    still = named("freeze", freeze) | (backbone(names) if freeze_backbone else set())
    still -= named("unfreeze_patterns", unfreeze_patterns) if step >= unfreeze_after_steps else set()
    still |= {name for name in names if unused and re.search(unused, name)}
    for name, p in model.named_parameters():
        p.requires_grad_(name not in still)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def backbone(names):
    """What freeze_backbone freezes. The embeddings are not among it, since one row of them, the mask's, must learn: mask_row_only."""
    return {name for name in names if name != "emb.weight" and not any(part in name for part in nets.ADDED)
            and (name != "head.weight" or use_rwkv_lm_head and not train_lm_head)}


def mask_row_only(model, step):
    """freeze_backbone: of the embeddings' gradient only the mask's row stays, unless unfreeze_patterns has set them free."""
    free = step >= unfreeze_after_steps and any(re.search(q, "emb.weight") for q in filter(None, unfreeze_patterns.split(",")))
    grad = model.emb.weight.grad
    if freeze_backbone and not free and grad is not None:
        grad *= like(grad, (torch.arange(len(grad), device=grad.device) == model.mask_id).unsqueeze(1))


def matching(key, pattern, names):
    try:
        found = [name for name in names if re.search(pattern, name)]
    except re.error as e:
        raise ValueError(f"{key}={pattern!r} is no regular expression: {e}") from None
    if not found:
        raise ValueError(f"{key}={pattern!r} matches no parameter: the names are those of the model, such as {names[0]} or {names[-1]}")
    return found


def check_objective(diff, source, cfg):
    """-> the row of OBJECTIVES. ValueError where it would measure nothing meaningful on this network or these data."""
    name = diff.objective
    chosen = diffusion.OBJECTIVES[name]
    if chosen.gaussian != cfg.gaussian:
        raise ValueError(f"objective={name} needs a network with gaussian={int(chosen.gaussian)}: leave gaussian out, "
                         "or start with --init_from=scratch")
    if (chosen.gaussian or chosen.latent) and (mem_check or log_output):
        raise ValueError(f"mem_check and log_output are for masks, not for objective={name}: use sample.py")
    if chosen.latent and name == "sequential":
        diffusion.read_schedule(diff)
    if cfg.predict == "next" and (name in ("ar", "b3d") or chosen.gaussian):
        raise ValueError(f"predict=next is not for objective={name}, which says itself what is predicted where: leave predict out")
    if cfg.latent_dim and not (chosen.latent or chosen.gaussian):
        raise ValueError(f"latent_dim={cfg.latent_dim} is not for objective={name}, which knows no latents: leave latent_dim out")
    if chosen.gaussian and nets.direction(cfg) == "block":
        raise ValueError(f"objective={name} denoises whole rows: choose --direction=bidirectional or causal")
    if chosen.causal and (nets.direction(cfg) != "causal" or cfg.dw_jrt):
        raise ValueError(f"objective={name} needs a network that sees only what is before: --direction=causal and --dw_jrt=0")
    if diff.mask_policy == "suffix" and chosen.sampler == "block":
        raise ValueError(f"mask_policy=suffix masks the end of a whole row, objective={name} masks in each block: choose spans or independent")
    if chosen.text and isinstance(source, data.TaskSource):
        raise ValueError(f"objective={name} is for text: a task has its own, leave objective out")
    return chosen


def launched():
    """What torchrun says of this process -> rank, world, local rank. ValueError for half of it, or for what cannot be."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    given = {name: os.environ[name] for name in names if name in os.environ}
    if not given:
        return 0, 1, 0
    said = ", ".join(f"{name}={value!r}" for name, value in given.items())
    repair = "start with torchrun --nproc_per_node=N train.py, or unset RANK, WORLD_SIZE and LOCAL_RANK"
    try:
        rank, world, local = (int(given[name]) for name in names)
    except (KeyError, ValueError):
        raise ValueError(f"{said}: a process needs all of RANK, WORLD_SIZE and LOCAL_RANK, whole numbers: {repair}") from None
    if not 0 <= rank < world or not 0 <= local < world:
        raise ValueError(f"{said}: there are no such processes: {repair}")
    if world > 1 and not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        raise ValueError(f"{said}, but no MASTER_ADDR and MASTER_PORT: {repair}")
    return rank, world, local


def check_place(key, path, folder):
    """ValueError unless `path` can be written: a folder that is there or can be made, or a file in such a one."""
    where = path if folder else os.path.dirname(path) or "."
    if not folder and os.path.isdir(path):
        raise ValueError(f"{key}={path} is a folder: give the name of a file")
    missing = None
    while not os.path.lexists(where):
        missing, where = where, os.path.dirname(where) or "."
    try:
        if not os.path.isdir(where) or not os.access(where, os.W_OK):
            raise OSError(f"{where} is not a folder that can be written")
        if missing:                        # some file systems say yes and then refuse
            os.mkdir(missing)
            os.rmdir(missing)
    except OSError as e:
        raise ValueError(f"{key}={path} cannot be written ({e.strerror or e}): choose another with --{key}") from None


def lock(folder):
    """Hold a folder, if it is there, until this process ends -> the lock. ValueError: another run holds it."""
    if not os.path.isdir(folder):
        return None
    held = os.open(folder, os.O_RDONLY)
    try:
        import fcntl
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(held)
        raise ValueError(f"another run is writing to out_dir={folder}: wait for it, or choose another --out_dir") from None
    except (OSError, ImportError):         # a file system or a system without locks
        pass
    return held


def move_aside(path, tell):
    """Starting afresh never overwrites a finished run: its checkpoint becomes ckpt.pt.1, ckpt.pt.2, ..."""
    if os.path.exists(path):
        n = next(n for n in itertools.count(1) if not os.path.exists(f"{path}.{n}"))
        os.replace(path, f"{path}.{n}")
        tell(f"moved the checkpoint of an earlier run to {path}.{n} (--init_from=resume would have gone on from it)")


def open_log(path, mode):
    """log.jsonl for writing; at its end, if a run was killed or the disk was full while it wrote, may stand half a line: cut off."""
    if mode == "a" and os.path.exists(path):
        with open(path, "rb+") as f:
            text = f.read()
            f.truncate(text.rfind(b"\n") + 1)
    return open(path, mode, encoding="utf-8")


def in_json(x):
    """What JSON can say: null for numbers that are not finite."""
    if isinstance(x, dict):
        return {key: in_json(value) for key, value in x.items()}
    return None if isinstance(x, float) and not math.isfinite(x) else x


class Stop:
    """Ctrl-C and SIGTERM while training: the first asks for an end after the step at hand, a second one ends at once."""

    def __init__(self):
        self.code = 0
        on_stop(self)

    def __call__(self, signum, frame):
        if self.code:
            print("stopped at once: the last checkpoint stays as it is", file=sys.stderr)
            os._exit(128 + signum)
        self.code = 128 + signum


def finish(source, model, denoise, device, tell):
    """What mem_check and log_output ask for: one row recalled from its first prompt_len tokens; a continuation."""
    x = source.eval_rows(1, struct_eval_seed)[0]
    if mem_check:
        known = torch.arange(x.shape[1]) < prompt_len
        pred = torch.where(known, x, denoise(diffusion.mask_tokens(x, ~known, model.mask_id).to(device)).logits.argmax(-1).cpu())
        tell(f"MEM acc: {(pred == x)[:, prompt_len:].float().mean():.4f}")
        tell(f"GT:\n{source.tokenizer.decode(x[0])}\nPR:\n{source.tokenizer.decode(pred[0])}")
    if log_output:
        y = diffusion.extend(denoise, x[:, :prompt_len].to(device), gen_tokens, seq_len, model.mask_id,
                             data.generator(random_seed, 0, 3), temperature=0.8, top_k=2)
        tell(f"Output:\n{source.tokenizer.decode(y[0])}")


def main(cfg):
    rank, world, local = launched()
    dev = nets.open_device(device, local)
    lead, parent = rank == 0, os.getppid()
    tell = (lambda *a: tqdm.write(" ".join(map(str, a)))) if lead else (lambda *a: None)
    os.environ["WKV_IMPL"] = wkv_impl
    if threads:
        torch.set_num_threads(threads)
    nets.tune_cpu()

    # what the settings must satisfy before anything is built, and long before anything is written
    micro = device_bsz or max(1, batch_size // world)
    if batch_size % (micro * world):
        raise ValueError(f"batch_size={batch_size} is not a multiple of device_bsz={micro} times {world} process(es): "
                         f"choose batch_size={max(1, round(batch_size / (micro * world))) * micro * world}")
    if shard and (world == 1 or compile):
        raise ValueError("shard=1 is not for compile=1: choose one of them" if compile else
                         "shard=1 splits a network over processes: start them with torchrun --nproc_per_node=N train.py")
    path, own = start_path(cfg), os.path.join(out_dir, "ckpt.pt")
    saved, resumed = cfg.saved, train and init_from == "resume"
    check_place("out_dir", out_dir, folder=True)
    if train and weights_path:
        check_place("weights_path", weights_path, folder=False)
    held = lock(out_dir) if train and lead else None
    if resumed and (lacking := [key for key in ("step", "config", "tokenizer", "optimizers", "model_config") if key not in saved]):
        raise ValueError(f"{own} lacks {', '.join(lacking)}: only a checkpoint of train.py can be resumed, from others start with --init_from={own}")
    start = saved["step"] if resumed else 0
    rows = max(batch_size, struct_eval_n if tasks.chosen(cfg.as_dict()) else 1)
    nets.in_memory(16 * rows * seq_len, f"seq_len={seq_len} with {rows} rows")
    source = open_source(cfg, saved)
    model = build_model(cfg, source, path, saved)
    if resumed and start >= max_iters:
        return tell(f"the run in {own} is at step {start} already, max_iters={max_iters}: nothing to do; "
                    "to train it further give a larger --max_iters")
    model = model if shard else model.to(dev)          # in pieces it may fit where the whole does not
    if world > 1:
        dist.init_process_group("nccl" if dev.type == "cuda" else "gloo")
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(ema)) if ema else None
    final = averaged.module if averaged else model     # what is evaluated
    def denoise(*args, **options):
        with autocast(dev):
            return final(*args, **options)
    diff = cfg.pick(diffusion.DiffusionConfig, objective=cfg.objective or source.objective)
    chosen = check_objective(diff, source, model.cfg)
    if chosen.latent:
        learner = Learner(model, functools.partial(chosen.latent, cfg=diff))
    elif chosen.gaussian:
        learner = Learner(model, functools.partial(diffusion.gaussian_loss, cfg=diff))
    else:
        bound = functools.partial(chosen.bound, n=model.cfg.block_size)
        learner = Learner(model, functools.partial(diffusion.loss, chosen.logits, mask_id=model.mask_id, n=model.cfg.block_size))
    active = thaw(model, start)
    if train and not active:
        raise ValueError(f"freeze={freeze!r} leaves nothing that learns: freeze less, or unfreeze_patterns from the start")
    replicas = world > 1 and not shard
    parallel = lambda: DistributedDataParallel(learner, find_unused_parameters=chosen.gaussian or bool(chosen.latent)) if replicas else learner
    if compile:
        try_compile(model, dev, micro, tell)
    if averaged and "averaged" in saved and resumed:
        averaged.load_state_dict(saved["averaged"])
    holder = Learner(averaged.module, None) if averaged else learner
    if shard:
        for part in dict.fromkeys([learner, holder]):          # in one order on every process
            split(part)
    trained = parallel()
    optimizers = OPTIMIZERS[optimizer](model)
    peaks = [g["lr"] for o in optimizers for g in o.param_groups]
    if resumed:
        changed = [k for k in ("optimizer", "freeze_backbone", *nets.ModelConfig.__dataclass_fields__)
                   if cfg.given(k) and getattr(cfg, k) != saved["config"].get(k)]
        restore(optimizers, saved["optimizers"], own, changed)
    groups = [g for o in optimizers for g in o.param_groups]
    covered = sorted(id(p) for g in groups for p in g["params"])
    assert covered == sorted(map(id, model.parameters())), "the optimizers must cover each parameter once"
    header = log_header(cfg, model, dev)
    tell(f"{source.name}: {header['parameters']:,} parameters, {header['kernel']} kernel on {dev}, {header['threads']} threads, "
         + (f"going on from {path} at step {start}" if start else f"weights of {path}" if path else "from scratch"))
    log, rows = None, []

    def record(**row):
        """A line of log.jsonl; until the first step is certain, kept back."""
        if row:
            rows.append(json.dumps(in_json(row)) + "\n")
        if log:
            try:
                log.write("".join(rows))
                log.flush()
            except OSError as e:
                raise ValueError(f"{log.name} cannot be written ({e.strerror}): the last checkpoint stays, make room and go on with "
                                 "--init_from=resume") from None
            rows.clear()

    def begin():
        """The first step can be taken: from here on out_dir is this run's."""
        nonlocal log, held
        if lead:
            os.makedirs(out_dir, exist_ok=True)
            held = held or train and lock(out_dir)
            if train and not resumed:
                move_aside(own, tell)
            log = open_log(os.path.join(out_dir, "log.jsonl"), "w" if train and not resumed else "a")
            record()
        if train and lead:
            replace_file(os.path.join(out_dir, "config.json"), json.dumps(cfg.as_dict(), indent=2).encode())
        if train and not resumed:
            checkpoint(0)
    record(**header)

    def measure(step):
        """-> metrics, and a sample to print."""
        if chosen.gaussian:
            return evaluate_gaussian(final, source, diff, dev, step)
        if chosen.latent:
            return evaluate_latent(final, source, diff, dev)
        return evaluate(denoise, source, bound, model.mask_id, dev, step)

    def report(step):
        """Evaluate, print, log."""
        metrics, sample = holder(lambda: measure(step))
        if "alarm" in metrics:
            tell(metrics["alarm"])
        if not math.isfinite(metrics["val_loss"]):
            raise ValueError(f"the evaluation at step {step} gave val_loss={metrics['val_loss']}: {way_back()}")
        record(event="eval", step=step, **metrics)
        line = []
        for k, v in metrics.items():       # of what is known for ten noise levels the screen shows three
            if not k.endswith("_se") and (k[-4:-1] != "_0." or k[-3:] in ("0.2", "0.5", "0.8")):
                se = f" ± {metrics[k + '_se']:.4f}" if metrics.get(k + "_se") is not None else ""
                line.append(f"{k.replace('_', ' ')} {v:.4f}{se}" if isinstance(v, float) else f"{k} {v}")
        tell(f"step {step}: " + ", ".join(line))
        if log_sample:
            tell(data.side_by_side(source.tokenizer, *sample, log_win))

    def way_back():
        last = f"the last good checkpoint is {own} (step {saved_at}); go on from there" if saved_at is not None else "start again"
        return f"{last} with a lower rate (--muon_lr, --learning_rate) or --grad_clip=1"

    def checkpoint(step):
        nonlocal saved_at
        weights, states, mean = whole([model.state_dict(), [o.state_dict() for o in optimizers], averaged.state_dict() if averaged else None])
        if broken := [name for name, x in weights.items() if x.is_floating_point() and not torch.isfinite(x).all()]:
            raise ValueError(f"after step {step} {broken[0]} holds numbers that are not finite: {way_back()}")
        if lead:
            more = {"averaged": mean} if averaged else {}
            if getattr(source, "projection", None):
                more["projection"] = [torch.from_numpy(np.asarray(part)) for part in source.projection]
            elif "projection" in saved:
                more["projection"] = saved["projection"]
            nets.save_checkpoint(own, dict(model=weights, **more, model_config=dataclasses.asdict(model.cfg), step=step,
                                           optimizers=states, config=cfg.as_dict(),
                                           tokenizer=source.tokenizer.state()))
        saved_at = step

    saved_at = start if resumed else None
    if not train:
        report(saved.get("step", 0))
        begin()
        return holder(lambda: finish(source, model, denoise, dev, tell))

    tops = cfg.noise_levels
    top = lambda step: tops[min(len(tops) - 1, step * len(tops) // max_iters)]
    mode_of = lambda step: diffusion.mode_at(step, diff.objective, diff) if chosen.latent else ("", 1.0)
    noise = lambda step, maskable, t, u, *latent: chosen.noise(maskable, t * top(step), u, diff, model.cfg.block_size, *latent,
                                                               *[mode_of(step)[0]] * bool(chosen.latent))
    batches = data.make_batches(source, noise, diffusion.stratified, batch_size, micro, random_seed, start, rank, world,
                                model.cfg.n_embd if chosen.gaussian else 0, model.cfg.latent_dim)
    bar = tqdm(range(start, max_iters), initial=start, total=max_iters, unit="step", disable=not lead, dynamic_ncols=True)
    clock, since, before, positions = time.perf_counter(), start, "", 0
    stop = Stop()
    for step in bar:
        if world > 1 and os.getppid() != parent:
            raise ValueError("the launcher of this process is gone, so it ends: start again with --init_from=resume")
        # 1. learning rates
        for g, peak in zip(groups, peaks):
            g["lr"] = peak * lr_factor(step)
            if "momentum" in g:                    # Muon's rises from 0.85 to 0.95 over its first steps
                g["momentum"] = 0.85 + 0.1 * min(1.0, step / momentum_iters)
        # 2. evaluation and checkpoint, with the training clock stopped
        if step % eval_interval == 0 and step > start or step == 0:
            paused = time.perf_counter()
            report(step)
            if step:
                checkpoint(step)
            clock += time.perf_counter() - paused
        if step == unfreeze_after_steps > 0:
            tell(f"step {step}: {active:,} parameters learned so far, {thaw(model, step):,} from here on")
            trained, before = parallel(), ""
        options, (mode, scale) = {}, mode_of(step)
        if mode:                                   # what a mode does not use is frozen while it runs
            options = dict(mode=mode, scale=scale, step=step)
            if mode != before:
                active, before = thaw(model, step, diffusion.COUPLINGS[mode].unused), mode
        # 3. gradients: micro-batches add up to the mean over the global batch
        parts, total = next(batches)
        ending = bool(stop.code)
        if world > 1:                              # all processes stop after the same step
            shared = torch.cat([total.view(-1), total.new_tensor([ending])]).to(dev)
            dist.all_reduce(shared)
            total, ending = shared[:-1].view_as(total), bool(shared[-1])
        total = total.to(dev).clamp_min(1)
        terms = torch.zeros(total.shape, device=dev)
        for i, part in enumerate(parts):
            part = data.Batch(*(z if z is None else z.to(dev, non_blocking=True) for z in part))
            positions += part.x.numel() * world
            last = i == len(parts) - 1
            if shard:
                learner.set_requires_gradient_sync(last)
            with trained.no_sync() if replicas and not last else contextlib.nullcontext():
                with autocast(dev):
                    term = trained(part, **options) / total
                (term.sum() * world).backward()    # times world, because DDP takes the mean over processes
            terms += term.detach()
        if world > 1:
            dist.all_reduce(terms)
        loss = terms.sum()
        if not math.isfinite(loss.item()):
            raise ValueError(f"the loss is {loss.item()} at step {step}: {way_back()}")
        # 4. clipping
        mask_row_only(model, step)
        logged = (step + 1) % log_interval == 0 or step == start
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf) if grad_clip or logged else None
        # 5. the step
        if step == start:
            begin()
        for o in optimizers:
            o.step()
            o.zero_grad(set_to_none=True)
        if averaged:
            averaged.update_parameters(model)
        # 6. log
        if logged:
            ms = (time.perf_counter() - clock) / (step + 1 - since) * 1e3
            named = dict(zip((f"loss_{name}" for name in chosen.terms), terms.view(-1).tolist())) | (dict(mode=mode, active=active) if mode else {})
            record(event="train", step=step, loss=loss.item(), **named, lr=groups[-1]["lr"], grad_norm=whole(norm).item(), ms_per_step=ms,
                   tokens_per_s=positions / (time.perf_counter() - clock))
            clock, since, positions = time.perf_counter(), step + 1, 0
            bar.set_postfix_str(f"loss {loss.item():.3f}, {ms:.0f} ms/step", refresh=False)
        if ending and step + 1 < max_iters:
            bar.close()
            checkpoint(step + 1)
            tell(f"stopped after step {step + 1} of {max_iters}, which {own} holds: the same command with --init_from=resume goes on")
            if world > 1:
                dist.destroy_process_group()
            raise SystemExit(stop.code or 143)
    bar.close()
    report(max_iters)
    checkpoint(max_iters)
    if weights_path and lead:
        os.makedirs(os.path.dirname(weights_path) or ".", exist_ok=True)
        with written(weights_path) as f, open(own, "rb") as source_file:
            shutil.copyfileobj(source_file, f)
    tell(f"checkpoint {own}" + (f", copied to {weights_path}" if weights_path else "")
         + f"; try: python sample.py --ckpt={weights_path or own}")
    holder(lambda: finish(source, model, denoise, dev, tell))
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    with one_line_errors("no checkpoint was written since the last one that was announced"):
        main(configure(globals(), nets.ModelConfig, diffusion.DiffusionConfig, tasks.settings(), adjust=defaults_for,
                       first=("struct_task", "data_path", "out_dir", "init_from", "tokenizer", "objective", "direction", "mixer",
                              "dw_jrt", "n_layer", "n_embd", "head_size", "seq_len", "batch_size", "max_iters", "optimizer",
                              "muon_lr", "eval_interval", "device", "compile"),
                       ignored=("*_eval",),
                       show=os.environ.get("RANK", "0") == "0",
                       choices=dict(nets.CHOICES | diffusion.CHOICES, optimizer=OPTIMIZERS, dtype=["auto", "fp32", "bf16"],
                                    wkv_impl=wkv_cuda.BACK_ENDS)))
    on_stop(signal.SIG_IGN)                # all is done and written: nothing to stop any more
