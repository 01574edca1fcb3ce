"""The network: one Block, RWKV-7 time mixing with official parameter names, DW-JRT, initialisation, checkpoints.

B batch, T time, C channels (n_embd), H heads, N head size, V vocabulary, L layers; t is the noise level in (0, 1].
"""
import ctypes
import math
import os
import pickle
import sys
from dataclasses import dataclass, replace
from typing import NamedTuple, Optional

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from wkv_cuda import HEAD_SIZES, wkv7


@dataclass
class ModelConfig:
    n_layer: int = 4                # L, blocks
    n_embd: int = 128               # C, channels
    head_size: int = 32             # N, 16 | 32 | 64 | 128
    vocab_size: int = 0             # V, real tokens (the mask is one row more); 0 = what the data has
    mixer: str = "rwkv7"            # time mixer of every block
    dw_jrt: bool = False            # a layer's final state seeds the next layer's first state
    dw_jrt_inject: str = "leak"     # how the seed enters
    dw_jrt_scale: float = 10.0      # factor on the seed
    dw_jrt_alpha_init: float = 2.0  # gate and leak open with sigmoid(alpha), one alpha a layer and head
    dw_jrt_layer_start: int = 1     # first layer that is seeded (layer 0 has none below it)
    logit_cap: float = 0.0          # logits = cap * tanh(logits / cap); 0 = no cap
    dim_ffn: int = 0                # width of the channel mix; 0 = 4 C
    rank_w: int = 0                 # rank of the decay's low-rank path; 0 = RWKV-LM's rule (so for the next three)
    rank_a: int = 0                 # ... of the in-context learning rate's
    rank_v: int = 0                 # ... of the value residual's
    rank_g: int = 0                 # ... of the gate's


class LayerState(NamedTuple):
    """All a layer must remember of a prefix, whatever its length."""
    wkv: Tensor        # (B,H,N,N) float32
    att_shift: Tensor  # (B,C), the time mix's last input
    ffn_shift: Tensor  # (B,C), the channel mix's last input


class Output(NamedTuple):
    logits: Tensor             # (B,T,V), no column for the mask: it cannot be predicted
    hidden: Tensor             # (B,T,C), after the last norm
    latent: Optional[Tensor]   # (B,D) where the model has a latent head
    state: list                # one LayerState a layer, after the last token


# ---- DW-JRT: how the final state S_T of the layer below enters this layer (rows of DW_JRT_INJECT) ----

class InitSeed(nn.Module):
    """S_0 = scale * S_T."""

    def __init__(self, cfg):
        super().__init__()
        self.scale = cfg.dw_jrt_scale

    def forward(self, seed, ctx):
        """seed (B,H,N,N), ctx the carried state or None -> first state, and a leak J (B,H,N,N) or None."""
        return self.scale * seed, None


class GateSeed(InitSeed):
    """S_0 = ctx + g * (scale * S_T - ctx), g = sigmoid(alpha), alpha learned per head."""

    def __init__(self, cfg):
        super().__init__(cfg)
        self.alpha = nn.Parameter(torch.full((cfg.n_embd // cfg.head_size,), float(cfg.dw_jrt_alpha_init)))

    def forward(self, seed, ctx):
        g = self.alpha.sigmoid()[:, None, None]
        return (g * self.scale * seed if ctx is None else torch.lerp(ctx, self.scale * seed, g)), None


class LeakSeed(GateSeed):
    """S_0 = scale * S_T, and every step adds J diag(1 - exp w_t), J = g * S_T: what decays is refilled from the seed."""

    def forward(self, seed, ctx):
        return self.scale * seed, self.alpha.sigmoid()[:, None, None] * seed


DW_JRT_INJECT = {"init": InitSeed, "gate": GateSeed, "leak": LeakSeed}


# ---- mixers ----

def token_shift(x, last):
    """The input one token earlier: (B,T,C), with `last` (B,C) before the first token (zeros if None)."""
    last = torch.zeros_like(x[:, :1]) if last is None else last.unsqueeze(1).to(x.dtype)
    return torch.cat([last, x[:, :-1]], 1)


class RWKV7(nn.Module):
    """RWKV-7 time mixing (arXiv 2503.14456, section 4): names, shapes and arithmetic of the official x070."""

    def __init__(self, cfg, layer):
        super().__init__()
        C, H, N = cfg.n_embd, cfg.n_embd // cfg.head_size, cfg.head_size
        self.layer, self.H, self.N = layer, H, N
        rank = lambda chosen, factor: chosen or max(32, round(factor * C**0.5 / 32) * 32)
        for name in ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g", "w0", "a0", "k_k", "k_a"):
            setattr(self, name, nn.Parameter(torch.empty(1, 1, C)))
        paths = {"w": rank(cfg.rank_w, 2.5), "a": rank(cfg.rank_a, 2.5), "g": rank(cfg.rank_g, 5)}
        if layer > 0:                   # the value residual mixes towards layer 0's values, so layer 0 has none
            self.v0 = nn.Parameter(torch.empty(1, 1, C))
            paths["v"] = rank(cfg.rank_v, 1.7)
        for name, D in paths.items():
            setattr(self, name + "1", nn.Parameter(torch.empty(C, D)))
            setattr(self, name + "2", nn.Parameter(torch.empty(D, C)))
        self.r_k = nn.Parameter(torch.empty(H, N))
        self.receptance, self.key, self.value, self.output = (nn.Linear(C, C, bias=False) for _ in range(4))
        self.ln_x = nn.GroupNorm(H, C, eps=64e-5)
        seeded = cfg.dw_jrt and layer >= max(1, cfg.dw_jrt_layer_start)
        self.jrt = DW_JRT_INJECT[cfg.dw_jrt_inject](cfg) if seeded else None

    def forward(self, x, state, shared):
        B, T, C = x.shape
        heads = lambda z: z.unflatten(-1, (self.H, self.N))
        xx = token_shift(x, None if state is None else state.att_shift) - x
        xr, xw, xk, xv, xa, xg = (torch.addcmul(x, xx, m) for m in (self.x_r, self.x_w, self.x_k, self.x_v, self.x_a, self.x_g))

        r, k, v = self.receptance(xr), self.key(xk), self.value(xv)
        w = self.w0 + torch.tanh(xw @ self.w1) @ self.w2
        w = -math.exp(-0.5) * torch.sigmoid(w.float())                # log-decay in (-0.607, 0): eq. 4 of the paper
        a = torch.sigmoid(self.a0 + (xa @ self.a1) @ self.a2)         # in-context learning rate
        g = torch.sigmoid(xg @ self.g1) @ self.g2
        if self.layer == 0:
            shared.v_first = v
        else:
            v = v + (shared.v_first - v) * torch.sigmoid(self.v0 + (xv @ self.v1) @ self.v2)
        kk = F.normalize(heads(k * self.k_k), dim=-1)
        k = k * (1 + (a - 1) * self.k_a)

        r, w, k, v, a = map(heads, (r, w, k, v, a))
        if shared.valid is not None:                                  # padding is the identity step: it never touches the state
            w, k, kk = (z * shared.valid[:, :, None, None] for z in (w, k, kk))
        y, wkv = self.scan(r, w, k, v, -kk, kk * a, None if state is None else state.wkv, shared.seed)
        shared.seed = wkv
        y = self.ln_x(y.flatten(0, 1).flatten(1)).view(B, T, C)
        y = y + ((r * k * self.r_k).sum(-1, keepdim=True) * v).flatten(2)
        return self.output(y * g), wkv, shared.last(x)

    def scan(self, r, w, k, v, a, b, s0, seed):
        if self.jrt is None or seed is None:
            return wkv7(r, w, k, v, a, b, s0)
        s0, leak = self.jrt(seed, s0)
        if leak is None:
            return wkv7(r, w, k, v, a, b, s0)
        read = lambda q: torch.einsum("bhij,bthj->bthi", leak, q.float())
        y, u = wkv7(r, w, k, v, a, b, s0 - leak, c=read(a))           # the plain recurrence on U = S - J
        return y + read(r).to(y.dtype), u + leak


TIME_MIXERS = {"rwkv7": RWKV7}
CHOICES = {"mixer": TIME_MIXERS, "dw_jrt_inject": DW_JRT_INJECT}


class SquaredReLU(torch.autograd.Function):
    """relu(x)^2, with two passes over memory in backward where autograd would take four."""

    @staticmethod
    def forward(ctx, x):
        x = x.relu()
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, g):
        return (g * ctx.saved_tensors[0]).mul_(2)


class ChannelMix(nn.Module):
    """RWKV-7 channel mixing: token shift and a squared-ReLU MLP."""

    def __init__(self, cfg):
        super().__init__()
        self.x_k = nn.Parameter(torch.empty(1, 1, cfg.n_embd))
        self.key = nn.Linear(cfg.n_embd, cfg.dim_ffn or 4 * cfg.n_embd, bias=False)
        self.value = nn.Linear(cfg.dim_ffn or 4 * cfg.n_embd, cfg.n_embd, bias=False)

    def forward(self, x, state, shared):
        k = torch.addcmul(x, token_shift(x, None if state is None else state.ffn_shift) - x, self.x_k)
        return self.value(SquaredReLU.apply(self.key(k))), shared.last(x)


class Block(nn.Module):
    def __init__(self, cfg, layer):
        super().__init__()
        if layer == 0:
            self.ln0 = nn.LayerNorm(cfg.n_embd)
        self.ln1, self.ln2 = nn.LayerNorm(cfg.n_embd), nn.LayerNorm(cfg.n_embd)
        self.att, self.ffn = TIME_MIXERS[cfg.mixer](cfg, layer), ChannelMix(cfg)

    def forward(self, x, state, shared):
        y, wkv, att_shift = self.att(self.ln1(x), state, shared)
        x = x + y
        y, ffn_shift = self.ffn(self.ln2(x), state, shared)
        return x + y, LayerState(wkv, att_shift, ffn_shift)


class Shared:
    """What the layers of one pass hand each other."""

    def __init__(self, x, lengths):
        self.v_first = None            # layer 0's values, for the value residual
        self.seed = None               # final state of the layer below, for DW-JRT
        self.valid, self.last = None, lambda z: z[:, -1]
        if lengths is not None:
            rows = torch.arange(len(x), device=x.device)
            self.valid = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
            self.last = lambda z: z[rows, lengths - 1]


class Denoiser(nn.Module):
    """Predicts every token of a partly masked sequence.

        out = model(x, t=None, state=None, lengths=None)      x: (B,T) ids, mask_id where masked, or (B,T,C) embeddings

    state: the `out.state` after a prefix, to go on from; with it a sequence can be fed in pieces of any length.
    lengths: (B,) tokens of each row, the rest being padding on the right, which changes nothing: not the row's logits, nor
    its state, nor what DW-JRT seeds.
    """

    def __init__(self, cfg):
        super().__init__()
        check_config(cfg)
        self.cfg, self.mask_id = cfg, cfg.vocab_size
        self.emb = nn.Embedding(cfg.vocab_size + 1, cfg.n_embd)       # the last row is the mask
        self.blocks = nn.ModuleList(Block(cfg, i) for i in range(cfg.n_layer))
        self.ln_out = nn.LayerNorm(cfg.n_embd)
        self.head = nn.Linear(cfg.n_embd, cfg.vocab_size, bias=False)
        init_weights(self)

    def forward(self, x, t=None, state=None, lengths=None):
        x = self.emb(x) if not x.is_floating_point() else x
        x = self.blocks[0].ln0(x)
        shared, states = Shared(x, lengths), []
        for i, block in enumerate(self.blocks):
            x, s = block(x, None if state is None else state[i], shared)
            states.append(s)
        hidden = self.ln_out(x)
        logits = self.head(hidden).float()
        if self.cfg.logit_cap:
            logits = self.cfg.logit_cap * torch.tanh(logits / self.cfg.logit_cap)
        return Output(logits, hidden, None, states)


def check_config(cfg):
    """ValueError, in one line with the repair, for a config no network can be built from."""
    if cfg.head_size not in HEAD_SIZES:
        raise ValueError(f"head_size={cfg.head_size} is not supported: choose one of {', '.join(map(str, HEAD_SIZES))}")
    if cfg.n_embd < 1 or cfg.n_embd % cfg.head_size:
        raise ValueError(f"n_embd={cfg.n_embd} is not a multiple of head_size={cfg.head_size}: "
                         f"choose {max(1, round(cfg.n_embd / cfg.head_size)) * cfg.head_size}")


# ---- initialisation and parameter kinds: RWKV-LM's RWKV-v7/train_temp ----

def init_weights(model):
    cfg = model.cfg
    C, N, V, L = cfg.n_embd, cfg.head_size, cfg.vocab_size, cfg.n_layer
    n = torch.arange(C)
    ddd, linear = n / C, n / max(1, C - 1) - 0.5
    zigzag = ((n % N) - (N - 1) / 2) / ((N - 1) / 2)
    zigzag = zigzag * zigzag.abs()

    def orthogonal(p, gain):
        return nn.init.orthogonal_(torch.empty(p.shape), gain)

    def lora(p):   # the second half of a low-rank path
        return orthogonal(p, 0.1 * max(1, p.shape[0] / p.shape[1]) ** 0.5)

    def shift(power):
        return lambda p, i: 1 - ddd ** (power * (1 - i / L))

    zeros, ones = (lambda p, i: torch.zeros(p.shape)), (lambda p, i: torch.ones(p.shape))
    rows = {
        "emb.weight": lambda p, i: torch.empty(p.shape).uniform_(-1e-4, 1e-4),
        "head.weight": lambda p, i: orthogonal(p, 0.5 * max(1, V / C) ** 0.5),
        "att.x_r": shift(0.2), "att.x_w": shift(0.9), "att.x_k": shift(0.7),
        "att.x_v": shift(0.7), "att.x_a": shift(0.9), "att.x_g": shift(0.2),
        "att.w0": lambda p, i: -6 + 6 * (n / max(1, C - 1)) ** (1 + (i / max(1, L - 1)) ** 0.3) + 0.5 + zigzag * 2.5,
        "att.a0": lambda p, i: -0.19 + zigzag * 0.3 + linear * 0.4,
        "att.v0": lambda p, i: 0.73 - linear * 0.4,
        "att.k_k": lambda p, i: 0.71 - linear * 0.1,
        "att.k_a": lambda p, i: torch.full((C,), 1.02),
        "att.r_k": lambda p, i: torch.full(p.shape, -0.04),
        **{f"att.{q}1": zeros for q in "wavg"}, **{f"att.{q}2": lambda p, i: lora(p) for q in "wavg"},
        "att.receptance.weight": lambda p, i: orthogonal(p, 1.0),
        "att.key.weight": lambda p, i: orthogonal(p, 0.1),
        "att.value.weight": lambda p, i: orthogonal(p, 1.0),
        "att.output.weight": zeros,
        "att.ln_x.weight": lambda p, i: torch.full((C,), ((1 + i) / L) ** 0.7), "att.ln_x.bias": zeros,
        "att.jrt.alpha": lambda p, i: torch.full(p.shape, float(cfg.dw_jrt_alpha_init)),
        "ffn.x_k": lambda p, i: 1 - ddd ** ((1 - i / L) ** 4),
        "ffn.key.weight": lambda p, i: orthogonal(p, 1.0),
        "ffn.value.weight": zeros,
        **{f"{ln}.weight": ones for ln in ("ln0", "ln1", "ln2", "ln_out")},
        **{f"{ln}.bias": zeros for ln in ("ln0", "ln1", "ln2", "ln_out")},
    }
    for name, p in model.named_parameters():
        block, i = name.startswith("blocks."), int(name.split(".")[1]) if name.startswith("blocks.") else 0
        p.data.copy_(rows[name.split(".", 2)[2] if block else name](p, i).view(p.shape))


def parameter_kinds(model):
    """[(name, parameter, kind, lr multiplier, decayed)]: what an optimizer must know of each parameter.

    kind: emb, head, matrix (a block's big matrices), norm, scalar (DW-JRT gates), vector (all else: shifts, low-rank paths).
    As in RWKV-LM's train_temp, w0 learns at twice the rate and weight decay touches only `.weight` matrices.
    """
    def kind(name, p):
        if name in ("emb.weight", "head.weight"):
            return name.split(".")[0]
        if ".ln" in name or name.startswith("ln_"):
            return "norm"
        return "scalar" if "jrt" in name else "matrix" if name.endswith(".weight") else "vector"

    return [(n, p, kind(n, p), 2.0 if "att.w0" in n else 1.0, n.endswith(".weight") and p.squeeze().dim() >= 2)
            for n, p in model.named_parameters()]


# ---- checkpoints: plain tensors and dicts, written whole or not at all ----

def save_checkpoint(path, content):
    """Atomic: a temporary file beside it, flushed to disk, then renamed. OSError if the folder cannot be written."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(path + ".tmp", "wb") as f:
        torch.save(content, f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(path + ".tmp", path)


def load_checkpoint(path):
    """A file of tensors -> dict on the CPU. ValueError in one line if it is missing, truncated or no such file."""
    if not os.path.isfile(path):
        raise ValueError(f"checkpoint {path} does not exist: train first, or give the path of a .pt or .pth file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:
        raise ValueError(f"checkpoint {path} is not a file of plain tensors and is not loaded, for safety: {str(e).split('.')[0]}") from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as e:
        raise ValueError(f"checkpoint {path} cannot be read ({' '.join(str(e).split())[:80]}): it is truncated or no checkpoint") from None
    if not isinstance(content, dict) or not any(isinstance(v, (Tensor, dict)) for v in content.values()):
        raise ValueError(f"checkpoint {path} holds no weights: give a checkpoint of train.py or an official RWKV-7 .pth")
    return content


OFFICIAL = ("emb.weight", "head.weight", "ln_out.weight", "blocks.0.ln0.weight", "blocks.0.att.r_k", "blocks.0.att.w1",
            "blocks.0.att.a1", "blocks.0.att.g1", "blocks.0.ffn.key.weight")


def official_config(weights, path, **overrides):
    """ModelConfig of an official RWKV-7 state dict, read from its shapes. ValueError names the keys that are missing."""
    if missing := [k for k in OFFICIAL if k not in weights]:
        raise ValueError(f"{path} is neither a checkpoint of train.py nor RWKV-7 weights: it lacks {', '.join(missing)}")
    shape = lambda key: weights[key].squeeze().shape
    (V, C), (_, N), v1 = shape("emb.weight"), shape("blocks.0.att.r_k"), weights.get("blocks.1.att.v1")
    own = dict(n_layer=1 + max(int(k.split(".")[1]) for k in weights if k.startswith("blocks.")), n_embd=C, head_size=N,
               vocab_size=V, dim_ffn=shape("blocks.0.ffn.key.weight")[0], rank_w=shape("blocks.0.att.w1")[1],
               rank_a=shape("blocks.0.att.a1")[1], rank_g=shape("blocks.0.att.g1")[1], rank_v=0 if v1 is None else v1.squeeze().shape[1])
    if clash := [f"{k}={overrides[k]} (the file has {v})" for k, v in own.items() if overrides.get(k, v) not in (v, 0)]:
        raise ValueError(f"{path} has another shape than asked for: {', '.join(clash)}; leave these settings out")
    return ModelConfig(**(overrides | own))


def from_pretrained(path, **overrides):
    """A Denoiser from an own checkpoint or an official RWKV-7 .pth; overrides: fields of ModelConfig that are no shapes.

    An official file has no row for the mask and no DW-JRT gates: those start as at initialisation. ValueError, in one line,
    for a file that is missing, truncated, foreign, or of another shape.
    """
    content = load_checkpoint(path)
    if "model" in content:
        cfg, weights = ModelConfig(**content["model_config"]), content["model"]
        if clash := [f"{k}={v} (the checkpoint has {getattr(cfg, k)})" for k, v in overrides.items()
                     if k in SHAPES and v not in (getattr(cfg, k), 0)]:
            raise ValueError(f"checkpoint {path} has another shape than asked for: {', '.join(clash)}; leave these settings out")
        cfg = replace(cfg, **{k: v for k, v in overrides.items() if k not in SHAPES})
        model = Denoiser(cfg)
    else:
        weights = {k.removeprefix("_orig_mod."): v for k, v in content.items()}
        model = Denoiser(official_config(weights, path, **overrides))
        mask_row = model.emb.weight.detach()[-1:]
        weights["emb.weight"] = torch.cat([weights["emb.weight"].squeeze().to(mask_row), mask_row])
        for key in ("v0", "v1", "v2"):          # official files carry them; layer 0 never uses them
            weights.pop(f"blocks.0.att.{key}", None)
    load_weights(model, weights, path)
    return model


SHAPES = ("n_layer", "n_embd", "head_size", "vocab_size", "dim_ffn", "rank_w", "rank_a", "rank_v", "rank_g", "mixer")


def load_weights(model, weights, path):
    """Copy a state dict into the model, whatever its dtype; only DW-JRT's parameters may be absent. ValueError else."""
    own = model.state_dict()
    missing = [k for k in own if k not in weights and ".jrt." not in k]
    strange = [k for k in weights if k not in own and ".jrt." not in k]
    wrong = [f"{k} {tuple(weights[k].shape)} for {tuple(v.shape)}" for k, v in own.items()
             if k in weights and weights[k].numel() != v.numel()]
    for what, keys in (("lacks", missing), ("has unknown", strange), ("has another shape in", wrong)):
        if keys:
            raise ValueError(f"{path} {what} {', '.join(keys[:4])}{f' and {len(keys) - 4} more' if len(keys) > 4 else ''}: "
                             "it was made by another model; give the settings it was trained with")
    model.load_state_dict({k: weights[k].reshape(v.shape).to(v.dtype) if k in weights else v for k, v in own.items()})


def tune_cpu():
    """Two settings that made a training step 1.5x faster here; both leave results as exact as before.

    glibc hands large freed blocks back to the kernel, so that every step pays for fresh pages again: keep them. And MKL runs
    float32 products without AVX-512 on AMD, where oneDNN has it; allowing bf16 routes them there, and oneDNN then still
    computes in float32, unless there is AMX, for which nothing is changed.
    """
    torch.set_flush_denormal(True)
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-3, 1 << 30)       # M_MMAP_THRESHOLD
        libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD
    if hasattr(torch.backends.mkldnn, "matmul") and not torch.cpu._is_amx_tile_supported():
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
