"""The network: a block, its mixers, DW-JRT, noise levels, latents; then optimizers, checkpoints, the machine.

B batch, T time, C channels (n_embd), H heads, N head size, V vocabulary, L layers; noise level t in (0, 1].
"""
import ctypes
import functools
import math
import os
import pickle
import re
import sys
import time
import zipfile
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple, Optional

import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from configurator import UserError, checked, merge, section, written
from wkv_cuda import HEAD_SIZES, KeptLinear, biwkv, shift_mix, squared_relu, wkv7_leaky, wkv7_mix

@dataclass
class ModelConfig:
    n_layer: int = 4                # [1, 10000] L, blocks
    loops: int = 1                  # [1, 1000] how often all layers but the first and the last are passed
    n_embd: int = 128               # [16, 1e6] C, channels
    head_size: int = 32             # [16, 128] N, 16 | 32 | 64 | 128
    vocab_size: int = 0             # [0, 1e7] V, real tokens (the mask is one row more); 0 = as in the data
    mixer: str = "rwkv7"            # rwkv7 | biwkv | attention; rwkv7,rwkv7,attention repeats over the depth
    direction: str = ""             # who sees whom, in how many scans; empty = what the mixer does by itself
    block_size: int = 32            # [1, 1e7] n, tokens in a block
    fusion: str = "add"             # how the forward and the backward scan become one
    tie_directions: bool = False    # both scans use the same projections
    copy_back: bool = True          # causal weights loaded two-way: the backward scan starts as a copy
    time_cond: str = "none"         # how the noise level enters each block
    time_dim: int = 128             # [2, 65536] width of its sinusoidal embedding
    time_inputs: int = 1            # [1, 2] noise levels: 1 = the text's, 2 = also a latent's
    gaussian: bool = False          # takes and predicts embeddings, for Gaussian diffusion
    self_cond: bool = False         # takes an estimate of x_0 from before, too; without gaussian: soft masks
    start_token: int = -1           # [-1, 1e7] what stands before a text that is read on; -1 = the mask
    predict: str = "same"           # a token is predicted at its own place, or (next) at the one before it
    latent_dim: int = 0             # [0, 1e6] D, numbers in a latent; 0 = as in the data, if it has latents
    latent_prefix_len: int = 4      # [1, 65536] P, prefix tokens that a latent enters as
    latent_pred_from: str = "both"  # what predicts a latent: the text's outputs, the prefix's, or both
    latent_encoder: str = "none"    # Stage II: q(z|x) from the mean output (mlp) or final states (rwkv_pool)
    latent_prior: str = "fixed"     # Stage II: p(z), N(0, 1) or learned mean and variance
    norm: str = "layer"             # the norms before mixers and at the end
    tie_embeddings: bool = False    # the head is the token embedding
    ffn_shift: str = "before"       # channel mix's shift: none | before: 1 token | both: 1 per side | wide: 2
    dw_jrt: bool = False            # a layer's final state seeds the next layer's first state
    dw_jrt_inject: str = "leak"     # how the seed enters
    dw_jrt_scale: float = 3.0       # [-1e6, 1e6] factor on the seed
    dw_jrt_alpha_init: float = -1.0  # [-100, 100] gate and leak open with sigmoid(alpha), per layer and head
    dw_jrt_chunk: int = 0           # [0, 1e7] causal: a new seed every so many tokens; 0 = one for the row
    dw_jrt_layer_start: int = 1     # [0, 10000] first layer that is seeded (layer 0 has none below it)
    read_twice: bool = False        # causal: a row is read a second time, and predicted from there
    rotary: bool = False            # rwkv7: receptances and keys are turned by positions, as attention's are
    observed_first: bool = False    # causal, rotary: the scan passes the masked tokens after all others
    logit_cap: float = 0.0          # [0, 1e6] logits = cap * tanh(logits / cap); 0 = no cap
    dim_ffn: int = 0                # [0, 1e7] width of the channel mix; 0 = 4 C
    rank_w: int = 0                 # [0, 1e6] rank of the decay's low-rank path; 0 = RWKV-LM's rule
    rank_a: int = 0                 # [0, 1e6] ... of the in-context learning rate's
    rank_v: int = 0                 # [0, 1e6] ... of the value residual's
    rank_g: int = 0                 # [0, 1e6] ... of the gate's
    adapter_rank: int = 0           # [0, 1e6] RWKV-7's matrices get low-rank additions, for denoising only

# ---- what goes into a layer and comes out of it ----

class LayerState(NamedTuple):
    """All that a layer must remember of a prefix; constant in size for RWKV-7, whatever the length."""
    mix: Tensor        # rwkv7: the WKV state (B,H,N,N), float32; attention: a Cache
    att_shift: Tensor  # (B,C), the time mix's last input (rwkv7)
    ffn_shift: Tensor  # (B,C), the channel mix's last input
    seen: Optional[Tensor] = None      # rotary: (B,) the position of the token to come

class Carry(NamedTuple):
    """What a layer hands to the layer above, beside x. None: no layer has made it yet."""
    v_first: Optional[Tensor] = None       # (B,T,C), the first RWKV-7 layer's values, for the value residual
    v_first_back: Optional[Tensor] = None  # (B * blocks, n, C), those of backward scans
    seeds: Optional[list] = None           # DW-JRT: final WKV states (B,H,N,N) of the layer below, by block
    view: Optional[tuple] = None           # Attention.view, from the first attention layer

    def but(self, **new):      # of _replace torch.compile makes an empty tuple (torch 2.11)
        return Carry(**self._asdict() | new)

class Output(NamedTuple):
    logits: Optional[Tensor]   # (B,T,V), no column for the mask: it cannot be predicted; None with targets
    nats: Optional[Tensor]     # (B,T), cross-entropies of the targets
    hidden: Tensor             # (B,T,C), after the last norm
    latent: Optional[Tensor]   # (B,D), what a network with latents predicts of the noisy one it got
    vector: Optional[Tensor]   # (B,T,C), what a Gaussian network predicts
    state: list                # a LayerState for each pass through a layer, after the last token

@dataclass(frozen=True)
class Sequence:
    """The rows of one pass: the same for all layers, never changed. Block sizes are in tokens."""
    B: int
    T: int
    back_block: int               # the backward scan stays inside such blocks; 0 = there is none
    ahead: int                    # a shift to both sides stays inside such blocks
    seen_block: int               # attention: a token sees its own block and those before; 1 = causal
    seeded: bool                  # DW-JRT: do layers hand on their final states?
    piece: int                    # ... of parts of so many tokens, each seeded by its own
    finished_text: bool           # it is one: the forward scan alone
    block_states: Optional[int]   # n: keep the states at 0, n, 2n, ...
    time: Optional[Tensor]        # (B,1,C) or (B,T,C), the embedded noise level
    valid: Optional[Tensor]       # (B,T) bool, tokens that are not padding; None = all
    back_valid: Optional[Tensor]  # the same for the rows of `reverse`
    last_at: Optional[Tensor]     # (B,) index in B * T of each row's last token; None = the row's end
    padded_left: bool             # may have padding before the text, too
    turn: Optional[tuple] = None        # rotary: cos and sin, each (B,T,N/2), of the positions
    back_turn: Optional[tuple] = None   # the same for the rows of `reverse`
    seen: Optional[Tensor] = None       # rotary: of the new states
    order: Optional[tuple] = None       # observed_first: (B * T,) tokens in the scan's order, and the inverse

    @classmethod
    def of(cls, x, cfg, time, lengths, n, finished_text, block_states, has_latent, start=None, masked=None):
        """x (B,T,C); n: tokens in a block; has_latent (B,) or None: x begins with a prefix, padding in rows
        without a latent; start (B,): the first position; masked (B,T) bool."""
        (B, T), (sees, alternate) = x.shape[:2], way(cfg)
        block = 0 if sees == "causal" else min(n, T)
        if sees == "bidirectional" and not finished_text:
            block = T
        seen_block = 1 if sees == "causal" else n if finished_text else block
        seeded = cfg.dw_jrt and not finished_text
        piece = min(T, block or cfg.dw_jrt_chunk or T) if seeded else T
        valid, back_valid, last_at = real_tokens(x, lengths), None, None
        if lengths is not None:
            last_at = torch.arange(B, device=x.device) * T + lengths - 1
        if has_latent is not None:
            here = has_latent[:, None] | (torch.arange(T, device=x.device) >= cfg.latent_prefix_len)
            valid = here if valid is None else here & valid
        if block and (valid is not None or T % block):
            real = torch.ones_like(x[..., 0], dtype=torch.bool) if valid is None else valid
            back_valid = reverse_blocks(real.unsqueeze(-1), block).squeeze(-1)
        ahead = 1 if finished_text and not alternate else block or T
        seq = cls(B, T, block, ahead, seen_block, seeded, piece, finished_text, block_states, time, valid,
                  back_valid, last_at, has_latent is not None)
        if not cfg.rotary:
            return seq
        start = torch.zeros(B, dtype=torch.long, device=x.device) if start is None else start
        at = start[:, None] + torch.arange(T, device=x.device) - cfg.latent_prefix_len * seq.padded_left
        turn, back, order = rotation(at, cfg.head_size), None, None
        if block:
            back = rotation(reverse_blocks(at.unsqueeze(-1), block).squeeze(-1), cfg.head_size)
        seen = start + (T if lengths is None else lengths)
        if block_states:
            seen = at[:, ::block_states].flatten()
        if masked is not None:
            order = masked.long().argsort(dim=1, stable=True) + torch.arange(B, device=x.device)[:, None] * T
            order = order.flatten(), order.flatten().argsort()
        return replace(seq, turn=turn, back_turn=back, seen=seen, order=order)

    def turned(self, turn, **scan):
        """What Scan7.mix takes, with positions in receptances and keys, and the tokens in another order."""
        if turn is None:
            return scan
        inner = scan.get("scan") or functools.partial(wkv7_leaky, **scan)

        def placed(z, order):
            return z.flatten(0, 1).index_select(0, order).view_as(z)

        def in_order(r, w, k, v, a, b):
            r, k, a, b = (rotate(z, *(q.unsqueeze(-2) for q in turn)) for z in (r, k, a, b))
            if self.order is None:
                return inner(r, w, k, v, a, b)
            order, back = self.order
            y, s = inner(*(placed(z, order) for z in (r, w, k, v, a, b)))
            return placed(y, back), s
        return dict(scan=in_order)

    def last(self, x, before):
        """What a token shift must know of x (B,T,C) to go on: its last token (B,C); with block_states those
        before each block (B * blocks, C). before: the one before x, (B,C) or None."""
        if self.block_states:
            return before_blocks(x, before, self.block_states)
        return x[:, -1] if self.last_at is None else x.flatten(0, 1).index_select(0, self.last_at)

    def shifted(self, x):
        """x (B,T,C) for a shift by one token: padding before the text is zero."""
        return self.unpadded(x) if self.padded_left else x

    def shift_both(self, x, last, mix, reach):
        """shift_mix of x (B,T,C) with tokens on both sides; after a token only those of its block."""
        x, n = self.unpadded(x), self.ahead
        if n < self.T:                                 # each block in a row of its own
            x, last = reverse_blocks(x, n).flip(1), before_blocks(x, last, n)
        y, = shift_mix(x, last, mix, reach)
        return y.unflatten(0, (self.B, -1)).flatten(1, 2)[:, :self.T]

    def unpadded(self, x):
        """x (B,T,C) with zeros for padding, as what lies beyond a sequence's end."""
        return x if self.valid is None else x * self.valid[..., None]

    def reverse(self, x):
        """(B,T,C) -> (B * blocks, n, C): each block reversed, in a row of its own; padding is zero."""
        return reverse_blocks(self.unpadded(x), self.back_block)

    def unreverse(self, y):
        """The inverse: (B * blocks, n, C) -> (B,T,C)."""
        return y.flip(1).unflatten(0, (self.B, -1)).flatten(1, 2)[:, :self.T]

def before_blocks(x, before, n):
    """x (B,T,C), the token before it (B,C) or None -> the one before each block of n, (B * blocks, C)."""
    before = torch.zeros_like(x[:, 0]) if before is None else before
    return torch.cat([before[:, None], x[:, n - 1:x.shape[1] - 1:n]], 1).flatten(0, 1)

def reverse_blocks(x, n):
    """(B,T,C) -> (B * blocks, n, C): each block of n tokens reversed, the last one filled up with zeros."""
    if pad := -x.shape[1] % n:
        x = F.pad(x, (0, 0, 0, pad))
    return x.unflatten(1, (-1, n)).flatten(0, 1).flip(1)

def real_tokens(x, lengths):
    """x (B,T,...) with rows of `lengths` (B,) -> (B,T) bool, tokens that are not padding; None: all."""
    return None if lengths is None else torch.arange(x.shape[1], device=x.device) < lengths[:, None]

def mean_over(h, real):
    """h (B,T,C), real (B,T) bool or None for all -> (B,C), the mean over the real tokens."""
    if real is None:
        return h.mean(1)
    return (h * real.unsqueeze(-1)).sum(1) / real.sum(1, keepdim=True)

def state_bytes(state):
    """What a state, or any nest of tensors, takes in memory."""
    if torch.is_tensor(state):
        return state.numel() * state.element_size()
    return sum(map(state_bytes, state)) if isinstance(state, (list, tuple)) else 0

# ---- DW-JRT: how the final state S_T of the layer below enters this layer (rows of DW_JRT_INJECT) ----

class InitSeed(nn.Module):
    """S_0 = scale * S_T."""
    keeps_context = False      # is a carried state still there behind the seed? With blocks it must be

    def __init__(self, cfg):
        super().__init__()
        self.scale = cfg.dw_jrt_scale

    @classmethod
    def check(cls, cfg):
        if (direction(cfg) == "block" or cfg.dw_jrt_chunk) and not cls.keeps_context:
            raise ValueError(f"dw_jrt_inject={cfg.dw_jrt_inject} forgets the state that crosses blocks and "
                             "chunks: choose dw_jrt_inject=gate")

    def gather(self, seeds):
        """The states after the layer below's pieces -> a seed for each piece."""
        return seeds

    def forward(self, seed, ctx):
        """seed (B,H,N,N), ctx the carried state or None -> first state, and a leak J (B,H,N,N) or None."""
        return self.scale * seed, None

class GateSeed(InitSeed):
    """S_0 = ctx + g * (scale * S_T - ctx), g = sigmoid(alpha), alpha learned per head."""
    keeps_context = True

    def __init__(self, cfg):
        super().__init__(cfg)
        self.alpha = nn.Parameter(torch.full((cfg.n_embd // cfg.head_size,), float(cfg.dw_jrt_alpha_init)))

    def forward(self, seed, ctx):
        g = self.alpha.sigmoid()[:, None, None]
        if ctx is None:
            return g * self.scale * seed, None
        return torch.lerp(ctx, self.scale * seed, g), None

class ReverseSeed(GateSeed):
    """GateSeed, from a reverse scan over the end states E of this chunk and of those after it,
    B_c = E_c + sigmoid(beta) * (B_{c+1} - E_c), beta learned per head."""

    def __init__(self, cfg):
        super().__init__(cfg)
        self.beta = nn.Parameter(torch.zeros_like(self.alpha))

    @classmethod
    def check(cls, cfg):
        if not cfg.dw_jrt_chunk:
            raise ValueError("dw_jrt_inject=reverse scans chunks: give dw_jrt_chunk, as 8")

    def gather(self, seeds):
        rho, *gathered = self.beta.sigmoid()[:, None, None], seeds[-1]
        for end in reversed(seeds[:-1]):
            gathered.append(torch.lerp(end, gathered[-1], rho))
        return gathered[::-1]

class LeakSeed(GateSeed):
    """S_0 = scale * S_T; each step adds J diag(1 - exp w_t), J = g * S_T: the seed refills what decays."""
    keeps_context = False

    def forward(self, seed, ctx):
        return self.scale * seed, self.alpha.sigmoid()[:, None, None] * seed

DW_JRT_INJECT = {"init": InitSeed, "gate": GateSeed, "leak": LeakSeed, "reverse": ReverseSeed}

# ---- two scans become one: (forward, backward), each (B,T,C) -> (B,T,C). As made, the forward one alone
# ---- passes: a causal checkpoint loaded two-way gives the same logits; init_weights opens both ----

class AddFusion(nn.Module):
    """w_f y_f + w_b y_b, both weights learned per channel."""

    def __init__(self, cfg):
        super().__init__()
        self.w_f, self.w_b = nn.Parameter(torch.ones(cfg.n_embd)), nn.Parameter(torch.zeros(cfg.n_embd))

    def forward(self, f, b):
        return torch.addcmul(f * self.w_f, b, self.w_b)

class GateFusion(nn.Module):
    """y_f + (2 sigmoid(W [y_f, y_b]) - 1) y_b: a gate from both scans, which starts at 0."""

    def __init__(self, cfg):
        super().__init__()
        self.gate = nn.Linear(2 * cfg.n_embd, cfg.n_embd, bias=False)
        nn.init.zeros_(self.gate.weight)

    def forward(self, f, b):
        gate = torch.tanh(0.5 * self.gate(torch.cat([f, b], -1)))      # 2 sigmoid(x) - 1 = tanh(x / 2)
        return torch.addcmul(f, gate, b)

class ConcatFusion(nn.Module):
    """W [y_f, y_b], W starting as [1, 0]."""

    def __init__(self, cfg):
        super().__init__()
        self.mix = nn.Linear(2 * cfg.n_embd, cfg.n_embd, bias=False)
        nn.init.eye_(self.mix.weight)

    def forward(self, f, b):
        return self.mix(torch.cat([f, b], -1))

FUSIONS = {"add": AddFusion, "gate": GateFusion, "concat": ConcatFusion}

# ---- the noise level: rows give (shift, scale, gate) for both halves of a block, zero at first ----

class Condition(NamedTuple):
    """h -> h (1 + scale) + shift before a half of the block, y -> y (1 + gate) after it; None: left out."""
    shift: Optional[Tensor] = None
    scale: Optional[Tensor] = None
    gate: Optional[Tensor] = None

    def before(self, h):
        h = h if self.scale is None else torch.addcmul(h, h, self.scale)
        return h if self.shift is None else h + self.shift

    def after(self, y):
        return y if self.gate is None else torch.addcmul(y, y, self.gate)

def zeros(linear):
    """A Linear that gives 0 at first."""
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear

class NoCond(nn.Module):
    """The block does not see the noise level."""
    parts = 0

    def __init__(self, cfg):
        super().__init__()
        if self.parts:
            self.proj = zeros(nn.Linear(cfg.n_embd, 2 * self.parts * cfg.n_embd))

    def forward(self, time):
        """time (B,1,C) or (B,T,C) -> a Condition for the mixer and one for the channel mix."""
        if not self.parts:
            return Condition(), Condition()
        first, second = self.proj(F.silu(time)).chunk(2, -1)
        return Condition(*first.chunk(self.parts, -1)), Condition(*second.chunk(self.parts, -1))

class AddCond(NoCond):
    parts = 1      # shift

class Film(NoCond):
    parts = 2      # shift and scale (arXiv 1709.07871)

class AdaLNZero(NoCond):
    """DiT's (arXiv 2212.09748), but the gate is 1 + what is learned from 0: pretrained weights stay as they
    are; from scratch the output matrices are zero, which makes each block the identity, as in DiT."""
    parts = 3      # shift, scale and gate

TIME_CONDS = {"none": NoCond, "add": AddCond, "film": Film, "adaln_zero": AdaLNZero}

class TimeEmbedding(nn.Module):
    """Noise levels t in [0, 1] -> (..., C): sinusoids of 1000 t (DDPM's steps), an MLP per input, added."""

    def __init__(self, cfg):
        super().__init__()
        self.half, C = cfg.time_dim // 2, cfg.n_embd
        self.mlps = nn.ModuleList(nn.Sequential(nn.Linear(cfg.time_dim, C), nn.SiLU(), nn.Linear(C, C))
                                  for _ in range(cfg.time_inputs))

    @staticmethod
    def wanted(cfg):
        """Does any part of this network look at the noise level?"""
        return cfg.time_cond != "none" or any(TIME_MIXERS[name].wants_time for name in pattern(cfg))

    @classmethod
    def check(cls, cfg):
        if cfg.time_dim < 2 or cfg.time_dim % 2:
            raise ValueError(f"time_dim={cfg.time_dim} is not allowed: give an even number")
        if cfg.gaussian and not cls.wanted(cfg):
            raise ValueError("a Gaussian network must know the noise level: choose time_cond=add, film or "
                             "adaln_zero")

    def forward(self, *levels):
        freqs = torch.exp(-math.log(10_000) * torch.arange(self.half, device=levels[0].device) / self.half)
        angles = [1000 * t.float().unsqueeze(-1) * freqs for t in levels]
        return sum(mlp(torch.cat([x.cos(), x.sin()], -1)) for mlp, x in zip(self.mlps, angles))

# ---- mixers ----

class Mixer(nn.Module):
    """Lets tokens see each other. A new one: a subclass with __init__(self, cfg, layer), a TIME_MIXERS row,

        forward(x, state, seq, carry) -> y, mix, shift, carry

    x: (B,T,C), normed and conditioned; state: the layer's LayerState after the tokens before x, or None;
    seq: the Sequence that x is; carry: the Carry of the layer below. y: (B,T,C), to be added to the residual;
    mix, shift: the new LayerState's mix and att_shift, or None; carry: for the layer above."""
    directions = ("bidirectional", "causal", "block")      # what it can do; the first: what it does by itself
    wants_time = False                                     # does it use seq.time?

def low_ranks(cfg, first):
    """{path: rank} of a scan's low-rank paths, by RWKV-LM's rule if the config has none. The value residual
    (v) mixes towards the first layer's values, so that layer has none."""
    def rank(chosen, factor):
        return chosen or max(32, round(factor * cfg.n_embd**0.5 / 32) * 32)
    paths = {"w": rank(cfg.rank_w, 2.5), "a": rank(cfg.rank_a, 2.5), "g": rank(cfg.rank_g, 5)}
    return paths if first else paths | {"v": rank(cfg.rank_v, 1.7)}

def times(x, w):
    """x w, also where keep_weights has made w a KeptLinear."""
    return w(x) if isinstance(w, KeptLinear) else x @ w

class Linear(nn.Linear):
    """x W^T, and where adapter_rank says so a low-rank addition (LoRA, arXiv 2106.09685), 0 at first. Only
    denoising has it: finished text is read as by the network that was adapted, and so are its states."""

    def __init__(self, cfg, n_in, n_out):
        super().__init__(n_in, n_out, bias=False)
        self.kept = self.down = self.up = None
        if cfg.adapter_rank:
            self.down = nn.Parameter(torch.randn(cfg.adapter_rank, n_in) * n_in**-0.5)
            self.up = nn.Parameter(torch.zeros(n_out, cfg.adapter_rank))

    def forward(self, x, finished_text):
        y = super().forward(x) if self.kept is None else self.kept(x)
        if self.down is None or finished_text:
            return y
        return y + F.linear(F.linear(x, self.down), self.up)

class Scan7(nn.Module):
    """One scan of RWKV-7 time mixing (arXiv 2503.14456, section 4) up to the output matrix, with names and
    shapes of the official x070. `like`: another scan whose projections this one uses instead of its own."""

    def __init__(self, cfg, first, like=None):
        super().__init__()
        C, self.H, self.N = cfg.n_embd, cfg.n_embd // cfg.head_size, cfg.head_size
        names = ["x_r", "x_w", "x_k", "x_v", "x_a", "x_g", "w0", "a0", "k_k", "k_a"]
        for name in names if first else [*names, "v0"]:
            setattr(self, name, nn.Parameter(torch.empty(1, 1, C)))
        self.r_k = nn.Parameter(torch.empty(self.H, self.N))
        self.ln_x = nn.GroupNorm(self.H, C, eps=64e-5)
        self.like = (like,)             # in a tuple: the parameters belong to the other one
        if like is None:
            for name, D in low_ranks(cfg, first).items():
                setattr(self, name + "1", nn.Parameter(torch.empty(C, D)))
                setattr(self, name + "2", nn.Parameter(torch.empty(D, C)))
            self.receptance, self.key, self.value = (Linear(cfg, C, C) for _ in range(3))

    def mix(self, x, last, valid, v_first, finished_text=False, **scan):
        """x (B,T,C), last (B,C) the one before, valid (B,T) or None -> (B,T,C) to project, state, its values.
        scan: s0, leak and every, as wkv7_leaky takes them, or `scan` to call instead of it."""
        m = self if self.like[0] is None else self.like[0]
        mixes = torch.cat([self.x_r, self.x_w, self.x_k, self.x_v, self.x_a, self.x_g])
        xr, xw, xk, xv, xa, xg = shift_mix(x, last, mixes)
        projections = (m.receptance, xr), (m.key, xk), (m.value, xv)
        r, k, v = (linear(z, finished_text) for linear, z in projections)
        w = times(torch.tanh(times(xw, m.w1)), m.w2)        # log-decay in (-0.607, 0), eq. 4 of the paper
        a = times(times(xa, m.a1), m.a2)                    # in-context learning rate
        g = times(torch.sigmoid(times(xg, m.g1)), m.g2)
        gate, v0 = None, None
        if v_first is not None:                             # the value residual
            gate, v0 = times(times(xv, m.v1), m.v2), self.v0
        y, s = wkv7_mix(r, w, a, k, v, gate, v_first, g, self.w0, self.a0, v0, self.k_k, self.k_a, self.r_k,
                        self.ln_x.weight, self.ln_x.bias, self.ln_x.eps, valid, self.N, **scan)
        return y, s, v

class RWKV7(Mixer, Scan7):
    """A forward scan over the whole sequence and, unless causal, a backward scan inside each block; where
    directions alternate, one of the two, in turn from layer to layer."""
    directions = ("causal", "bidirectional", "block")

    def __init__(self, cfg, layer):
        first = not scans_below(cfg, layer)
        super().__init__(cfg, first)
        self.output = Linear(cfg, cfg.n_embd, cfg.n_embd)
        seeded = cfg.dw_jrt and not first and layer >= cfg.dw_jrt_layer_start
        self.jrt = DW_JRT_INJECT[cfg.dw_jrt_inject](cfg) if seeded else None
        self.back = self.fuse = None
        self.backward = scans_back(cfg, layer)
        if two_scans(cfg):
            plain = replace(cfg, adapter_rank=0)         # it learns whole
            self.back = Scan7(plain, first, like=self if cfg.tie_directions else None)
            self.fuse = FUSIONS[cfg.fusion](cfg)

    def forward(self, x, state, seq, carry):
        if self.backward:
            return self.from_the_end(x, seq, carry)
        last, s0 = (None, None) if state is None else (state.att_shift, state.mix)
        seeds = carry.seeds or [None] * -(-seq.T // seq.piece)
        if len(seeds) == 1:
            s0, leak = self.start(s0, seeds[0])
            scan = dict(s0=s0, leak=leak, every=seq.block_states)
        else:
            scan = dict(scan=lambda *inputs: self.scan_pieces(inputs, s0, seq, seeds))
        y, s, v = self.mix(seq.shifted(x), last, seq.valid, carry.v_first, seq.finished_text,
                           **seq.turned(seq.turn, **scan))
        ends = [s] if len(seeds) == 1 else s           # the state after each piece
        s = ends[-1]
        if seq.block_states:                           # states at block starts are rows of their own
            s = s[:, :-(-seq.T // seq.block_states)].flatten(0, 1)
        if seq.seeded:
            carry = carry.but(seeds=ends)
        if carry.v_first is None:
            carry = carry.but(v_first=v)
        if self.fuse and seq.finished_text:
            y = self.fuse(y, torch.zeros_like(y))
        elif self.fuse:
            z, _, v = self.back.mix(seq.reverse(x), None, seq.back_valid, carry.v_first_back,
                                    **seq.turned(seq.back_turn))
            if carry.v_first_back is None:
                carry = carry.but(v_first_back=v)
            y = self.fuse(y, seq.unreverse(z))
        return self.output(y, seq.finished_text), s, seq.last(x, last), carry

    def from_the_end(self, x, seq, carry):
        """A backward scan alone, inside each block: no state goes on from it but DW-JRT's seeds."""
        v_first, s0, leak = carry.v_first_back, None, None
        if v_first is None:
            v_first = seq.reverse(carry.v_first)
        if carry.seeds:                                # a row for each block, as in seq.reverse
            s0, leak = self.start(None, torch.stack(carry.seeds, 1).flatten(0, 1))
        y, s, _ = self.mix(seq.reverse(x), None, seq.back_valid, v_first, seq.finished_text,
                           **seq.turned(seq.back_turn, s0=s0, leak=leak))
        carry = carry.but(v_first_back=v_first)
        if seq.seeded:
            carry = carry.but(seeds=list(s.unflatten(0, (seq.B, -1)).unbind(1)))
        return self.output(seq.unreverse(y), seq.finished_text), None, None, carry

    def start(self, s0, seed):
        """s0: carried state, seed: the layer below's final one, (B,H,N,N) or None -> first state, leak."""
        if self.jrt is None or seed is None:
            return s0, None
        if s0 is not None and not self.jrt.keeps_context:
            raise ValueError("this form of DW-JRT forgets the carried state: "
                             "use dw_jrt_inject=gate for blocks and for going on from a state")
        return self.jrt(seed, s0)

    def scan_pieces(self, inputs, s0, seq, seeds):
        """The recurrence on (r, w, k, v, a, b), each (B,T,H,N), from s0, every piece with its own seed
        -> y (B,T,H,N), the states after the pieces."""
        n, ys, ends = seq.piece, [], []
        if self.jrt is not None and seeds[0] is not None:
            seeds = self.jrt.gather(seeds)
        for i, (seed, *piece) in enumerate(zip(seeds, *(z.split(n, 1) for z in inputs))):
            y, end = wkv7_leaky(*piece, *self.start(s0, seed))
            if i and seq.valid is not None:            # a row that has ended is not seeded again
                end = torch.where(seq.valid[:, i * n, None, None, None], end, s0)
            s0 = end
            ys.append(y)
            ends.append(end)
        return torch.cat(ys, 1), ends

class BiWKV(Mixer):
    """BiWKV attention (Vision-RWKV, arXiv 2403.02308) after a BiShift; the noise level moves its weights,
    decay and bonus."""
    directions = ("bidirectional",)
    wants_time = True

    def __init__(self, cfg, layer):
        super().__init__()
        C = cfg.n_embd
        for name in ("x_r", "x_k", "x_v"):
            setattr(self, name, nn.Parameter(torch.empty(1, 1, C)))
        self.decay, self.bonus = nn.Parameter(torch.empty(C)), nn.Parameter(torch.empty(C))
        self.time, self.shift_time = zeros(nn.Linear(C, 2 * C)), zeros(nn.Linear(C, 3 * C))
        self.receptance, self.key, self.value, self.output = (nn.Linear(C, C, bias=False) for _ in range(4))
        self.ln_x = nn.LayerNorm(C)

    def forward(self, x, state, seq, carry):
        if state is not None:
            raise ValueError("mixer=biwkv sees the whole sequence at once and carries no state: "
                             "feed it whole, or use mixer=rwkv7")
        around, = shift_mix(seq.unpadded(x), None, torch.ones_like(self.x_r), reach=1)
        shares = zip((self.x_r, self.x_k, self.x_v), self.shift_time(F.silu(seq.time)).chunk(3, -1))
        xr, xk, xv = (torch.addcmul(x, around - x, share + change) for share, change in shares)
        r, k, v = torch.sigmoid(self.receptance(xr)), self.key(xk), self.value(xv)
        if seq.valid is not None:
            k = k.masked_fill(~seq.valid[..., None], -math.inf)
        time = seq.time[:, 0] if seq.time.shape[1] == 1 else mean_over(seq.time.float(), seq.valid)
        dw, du = self.time(F.silu(time)).float().chunk(2, -1)                    # (B,C)
        y = biwkv(F.softplus(self.decay + dw), self.bonus + du, k, v)
        return self.output(r * self.ln_x(y)), None, None, carry

class Cache(NamedTuple):
    """Attention's state."""
    keys: Tensor                # (B,H,P,N)
    values: Tensor              # (B,H,P,N)
    real: Tensor                # (B,P) bool, which are not padding
    block: Optional[int] = None  # noisy blocks of this size each see what is before them; None: x sees all

class Attention(Mixer):
    """The baseline: softmax attention, rotary positions (arXiv 2104.09864), normalised queries and keys."""

    def __init__(self, cfg, layer):
        super().__init__()
        C, self.H, self.N = cfg.n_embd, cfg.n_embd // cfg.head_size, cfg.head_size
        self.query, self.key, self.value, self.output = (nn.Linear(C, C, bias=False) for _ in range(4))

    def forward(self, x, state, seq, carry):
        past, rows = None if state is None else state.mix, x
        in_blocks = past is not None and past.block is not None
        if in_blocks:                                  # (B * blocks, n, C) -> (B, blocks * n, C)
            rows = x.unflatten(0, (past.keys.shape[0], -1)).flatten(1, 2)
        if carry.view is None:
            view = self.view_of_blocks if in_blocks else self.view
            carry = carry.but(view=view(rows, past, seq))
        turn, real, mask, causal = carry.view
        projections = (self.query, self.key, self.value)
        q, k, v = (f(rows).unflatten(-1, (self.H, self.N)).transpose(1, 2) for f in projections)
        q, k = (rotate(F.rms_norm(z, (self.N,)), *turn) for z in (q, k))
        if past is not None:
            k, v = torch.cat([past.keys, k], 2), torch.cat([past.values, v], 2)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        y = self.output(y.transpose(1, 2).flatten(2).view(x.shape))
        return y, past if in_blocks else Cache(k, v, real, seq.block_states), None, carry

    def view(self, x, past, seq):
        """x (B,T,C), the P tokens of `past` before it -> rotary cos and sin, each (T, N/2) or (B,1,T,N/2);
        real keys (B, P + T); those that a query sees (B, 1, T, P + T), None = all; causal or not."""
        T, n, P, at = seq.T, seq.seen_block, 0, torch.arange(seq.T, device=x.device)
        real = torch.ones_like(x[..., 0], dtype=torch.bool) if seq.valid is None else seq.valid
        turn = rotation(at, self.N)
        if past is not None:
            turn, P = rotation((past.real.sum(1, keepdim=True) + at).unsqueeze(1), self.N), past.real.shape[1]
            real = torch.cat([past.real, real], 1)
        if seq.valid is None and not P and (n == 1 or n >= T):
            return turn, real, None, n == 1
        key = torch.arange(-P, T, device=x.device)
        return turn, real, real[:, None, None] & (key // n <= (at // n)[:, None]), False

    def view_of_blocks(self, x, past, seq):
        """x (B, blocks * n, C), noisy: a block sees itself and clean ones before it (BD3-LM, section 3.2)."""
        at, key = (torch.arange(z, device=x.device) for z in (x.shape[1], past.keys.shape[2]))
        query, key = at // past.block, key // past.block
        noisy = (query[:, None] == query).expand(len(x), 1, -1, -1)
        if seq.valid is not None:
            noisy = noisy & seq.valid.view(len(x), 1, 1, -1)
        clean = past.real[:, None, None] & (key < query[:, None])
        return rotation(at, self.N), past.real, torch.cat([clean, noisy], -1), False

def rotation(at, N):
    """Positions -> cos and sin of the angles of rotary embeddings (theta 10,000)."""
    angles = at.unsqueeze(-1).float() * 10_000 ** -(torch.arange(N // 2, device=at.device) / (N // 2))
    return angles.cos(), angles.sin()

def rotate(x, cos, sin):
    """Rotary positions: x (...,N); cos, sin (...,N/2), which broadcast against it."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1).to(x.dtype)

TIME_MIXERS = {"rwkv7": RWKV7, "biwkv": BiWKV, "attention": Attention}

def pattern(cfg):
    """The mixer of every layer."""
    names = cfg.mixer.split(",")
    return [names[i % len(names)] for i in range(cfg.n_layer)]

def order(cfg):
    """The layers in the order in which they are passed: those between the first and the last cfg.loops times.
    """
    first, *others = range(cfg.n_layer)
    return [first, *others[:-1] * cfg.loops, *others[-1:]]

class Direction(NamedTuple):
    sees: str                # a token sees: causal, those before; block, also its block's; bidirectional, all
    alternate: bool = False  # RWKV-7: one scan a layer, forward and backward in turn, in place of two

DIRECTIONS = {"causal": Direction("causal"), "bidirectional": Direction("bidirectional"),
              "block": Direction("block"), "alternate": Direction("bidirectional", True),
              "alternate_block": Direction("block", True)}

def way(cfg):
    """The Direction that was chosen, or what the mixers do by themselves."""
    return DIRECTIONS[cfg.direction or TIME_MIXERS[pattern(cfg)[0]].directions[0]]

def direction(cfg):
    """Who sees whom: causal, block or bidirectional."""
    return way(cfg).sees

def two_scans(cfg):
    """Does every RWKV-7 layer scan in both directions?"""
    sees, alternate = way(cfg)
    return sees != "causal" and not alternate

def scans_below(cfg, layer):
    """The number of RWKV-7 layers below this one."""
    return sum(issubclass(TIME_MIXERS[name], RWKV7) for name in pattern(cfg)[:layer])

def scans_back(cfg, layer):
    """Does this layer scan from the end alone? Every second RWKV-7 layer does where directions alternate."""
    mine = issubclass(TIME_MIXERS[pattern(cfg)[layer]], RWKV7)
    return mine and way(cfg).alternate and scans_below(cfg, layer) % 2 == 1

# ---- latents: a vector beside the text ----

class LatentPrefix(nn.Module):
    """A latent as P prefix tokens, each with a type embedding. Holds the training latents' mean and scale."""

    def __init__(self, cfg):
        super().__init__()
        self.project = nn.Linear(cfg.latent_dim, cfg.latent_prefix_len * cfg.n_embd)
        self.type_emb = nn.Parameter(torch.randn(cfg.latent_prefix_len, cfg.n_embd))
        self.register_buffer("mean", torch.zeros(cfg.latent_dim))
        self.register_buffer("std", torch.ones(()))        # one for all: distances stay in proportion

    @staticmethod
    def check(cfg):
        if direction(cfg) == "block":
            raise ValueError("latents stand before whole rows: choose direction=bidirectional or causal")
        if direction(cfg) == "causal" and cfg.latent_pred_from == "prefix":
            raise ValueError("latent_pred_from=prefix: in a causal network the prefix does not see the text; "
                             "choose text or both, or direction=bidirectional")
        if cfg.latent_dim < 1 or cfg.latent_prefix_len < 1:
            raise ValueError(f"latent_dim={cfg.latent_dim}, latent_prefix_len={cfg.latent_prefix_len}: "
                             "give at least 1 each")

    def forward(self, z):
        """z (B,D), noisy -> (B,P,C)."""
        return self.project(z).unflatten(-1, self.type_emb.shape) + self.type_emb

    def normalise(self, z):
        """Latents (B,D) of a file -> mean 0, mean variance 1; rows of zeros, which are no latent, stay so."""
        return (z - self.mean) / self.std * (z != 0).any(-1, keepdim=True)

    def restore(self, z):
        """The inverse."""
        return z * self.std + self.mean

class LatentHead(nn.Module):
    """Predicts the latent from the mean of the text's outputs, from the prefix's outputs, or from both."""

    def __init__(self, cfg):
        super().__init__()
        C = cfg.n_embd
        self.text, self.prefix = cfg.latent_pred_from != "prefix", cfg.latent_pred_from != "text"
        width = C * (self.text + cfg.latent_prefix_len * self.prefix)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * C), nn.GELU(), nn.Linear(2 * C, cfg.latent_dim))

    def forward(self, prefix, text):
        """prefix (B,P,C), text (B,C) -> (B,D)."""
        if not self.prefix:
            return self.mlp(text)
        return self.mlp(torch.cat([text, prefix.flatten(1)], -1) if self.text else prefix.flatten(1))

class TextLatentEncoder(nn.Module):
    """q(z|x) of Stage II, a Gaussian: clean text -> mu and log variance. mlp: from the mean of its outputs;
    rwkv_pool: from every layer's final WKV state, each head read by a learned query."""

    def __init__(self, cfg):
        super().__init__()
        C, self.query, width = cfg.n_embd, None, cfg.n_embd
        if cfg.latent_encoder == "rwkv_pool":
            self.layers = [at for at, i in enumerate(order(cfg))
                           if pattern(cfg)[i] == "rwkv7" and not scans_back(cfg, i)]
            self.query = nn.Parameter(torch.randn(len(self.layers), C // cfg.head_size, cfg.head_size))
            width = C * len(self.layers)
        self.ln, self.mlp = nn.LayerNorm(width), nn.Sequential(nn.Linear(width, 2 * C), nn.GELU())
        self.mu, self.logvar = (nn.Linear(2 * C, cfg.latent_dim) for _ in range(2))
        nn.init.zeros_(self.logvar.weight)
        nn.init.constant_(self.logvar.bias, -2.0)

    @staticmethod
    def check(cfg):
        if not cfg.latent_dim:
            raise ValueError(f"latent_encoder={cfg.latent_encoder} needs a network with latents: "
                             "give latent_dim")
        if cfg.latent_encoder == "rwkv_pool" and "rwkv7" not in pattern(cfg):
            raise ValueError("latent_encoder=rwkv_pool reads RWKV-7 states, "
                             f"which mixer={cfg.mixer} has not: choose latent_encoder=mlp")

    def forward(self, out, lengths=None):
        """out: the Output for clean text -> mu, logvar, each (B,D)."""
        if self.query is None:
            h = mean_over(out.hidden, real_tokens(out.hidden, lengths))
        else:
            states = torch.stack([out.state[i].mix.float() for i in self.layers], 1)
            h = torch.einsum("blhij,lhj->blhi", states, self.query).flatten(1)
        h = self.mlp(self.ln(h))
        return self.mu(h), self.logvar(h).clamp(-10, 10)

class LatentPrior(nn.Module):
    """p(z) of Stage II: N(0, 1), or a Gaussian whose mean and variance are learned."""

    def __init__(self, cfg):
        super().__init__()
        make = nn.Parameter if cfg.latent_prior == "learned" else nn.Buffer
        self.mu, self.logvar = (make(torch.zeros(cfg.latent_dim)) for _ in range(2))

    def sample(self, eps):
        """eps (B,D), standard normal -> z (B,D)."""
        return self.mu + (0.5 * self.logvar).exp() * eps

# ---- the block and the network ----

NORMS = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}
FFN_SHIFTS = {"none": None, "before": 0, "both": 1, "wide": 2}       # how many tokens each way; 0 = only back
CHOICES = {"direction": DIRECTIONS, "ffn_shift": FFN_SHIFTS, "fusion": FUSIONS, "time_cond": TIME_CONDS,
           "norm": NORMS, "dw_jrt_inject": DW_JRT_INJECT, "predict": ("same", "next"),
           "latent_pred_from": ("text", "prefix", "both"), "latent_encoder": ("none", "mlp", "rwkv_pool"),
           "latent_prior": ("fixed", "learned")}

class ChannelMix(nn.Module):
    """RWKV-7 channel mixing: token shift and a squared-ReLU MLP."""

    def __init__(self, cfg, layer):
        super().__init__()
        self.x_k = nn.Parameter(torch.empty(1, 1, cfg.n_embd)) if cfg.ffn_shift != "none" else None
        self.reach, width = FFN_SHIFTS[cfg.ffn_shift], cfg.dim_ffn or 4 * cfg.n_embd
        self.backward = cfg.ffn_shift == "before" and scans_back(cfg, layer)      # the token after, then
        self.key, self.value = Linear(cfg, cfg.n_embd, width), Linear(cfg, width, cfg.n_embd)

    def forward(self, x, state, seq):
        k, last = x, None if state is None else state.ffn_shift
        if self.reach:
            k = seq.shift_both(x, last, self.x_k, self.reach)
        elif self.backward:
            k = seq.unreverse(*shift_mix(seq.reverse(x), None, self.x_k))
        elif self.x_k is not None:
            k, = shift_mix(seq.shifted(x), last, self.x_k)
        y = self.value(squared_relu(self.key(k, seq.finished_text)), seq.finished_text)
        return y, None if self.backward else seq.last(x, last)

class Block(nn.Module):
    """x + mixer(x), then x + channel mix(x), each normed and conditioned on the noise level."""

    def __init__(self, cfg, layer):
        super().__init__()
        if layer == 0:
            self.ln0 = norm(cfg)
        self.ln1, self.ln2, self.cond = norm(cfg), norm(cfg), TIME_CONDS[cfg.time_cond](cfg)
        self.att, self.ffn = TIME_MIXERS[pattern(cfg)[layer]](cfg, layer), ChannelMix(cfg, layer)

    @staticmethod
    def check(cfg):
        for name in pattern(cfg):
            if name not in TIME_MIXERS:
                raise ValueError(f"mixer={cfg.mixer!r}: {name!r} is unknown: "
                                 f"choose from {', '.join(TIME_MIXERS)}")
            if direction(cfg) not in (can := TIME_MIXERS[name].directions):
                raise ValueError(f"direction={direction(cfg)!r} is not for mixer={name}: "
                                 f"choose one of {', '.join(can)}")

    def forward(self, x, state, seq, carry):
        """x (B,T,C), the layer's state or None, seq, carry -> x, state after the last token, new carry."""
        cond1, cond2 = self.cond(seq.time)
        y, mix, att_shift, carry = self.att(cond1.before(self.ln1(x)), state, seq, carry)
        x = x + cond1.after(y)
        y, ffn_shift = self.ffn(cond2.before(self.ln2(x)), state, seq)
        return x + cond2.after(y), LayerState(mix, att_shift, ffn_shift, seq.seen), carry

def norm(cfg):
    return NORMS[cfg.norm](cfg.n_embd, eps=1e-5)

EVEN = 128                  # losses are taken of a multiple of so many tokens: oneDNN keeps kernels by size
MOST_LOGITS = 1 << 25       # so many stand in memory at a time while a loss is computed, on a GPU 8 times

class Denoiser(nn.Module):
    """Predicts every token of a partly masked sequence.

        out = model(x, t=None, latent=None, latent_t=None, state=None, lengths=None, finished_text=False,
                    block_states=None, block_size=None, x0_guess=None, targets=None)

    x: (B,T) ids, mask_id where masked, or (B,T,C) embeddings.
    t: noise level (B,) or (B,T); None: the share of masks in each row (in each block, if there are blocks).
    latent: (B,D), where cfg.latent_dim: normalised, with the noise of level latent_t (B,), None = 0; a prefix
    of P tokens. A row of zeros has none, and its text gives what it gives without `latent`.
    state: the `out.state` after a prefix, to go on from. A causal network takes text in parts of any length,
    one of blocks in whole blocks, a bidirectional one takes x as one block: state flows only forward.
    lengths: (B,) tokens of each row, the rest being padding on the right, which changes nothing: neither the
    row's logits nor its state, nor what DW-JRT seeds.
    finished_text: x is clean text, read for its state: the forward scan alone (attention: by blocks), without
    seeds. Its logits are those of the next tokens, whatever cfg.predict says of masked ones.
    block_states=n: a pass of finished text whose `out.state` holds the states at 0, n, 2n, ... < T, for
    B * ceil(T / n) rows: if the same text follows as rows of n tokens, (B * ceil(T / n), n), each block goes
    on from the finished text before it. All at once, this is what going on block by block from a carried
    state gives.
    block_size: tokens in a block in this pass, where there are blocks; None: cfg.block_size.
    x0_guess: where cfg.self_cond, an estimate of the clean embeddings (B,T,C), without cfg.gaussian logits
    (B,T,V) of the clean tokens; None for none.
    targets: (B,T) ids, -1 for none: their cross-entropies are wanted in place of logits; (B,0): neither."""

    recompute = False           # activation checkpointing, of blocks

    def __init__(self, cfg):
        super().__init__()
        if torch.get_default_device().type == "cpu":
            shape = f"n_layer={cfg.n_layer}, n_embd={cfg.n_embd}, vocab_size={cfg.vocab_size}"
            in_memory(weight_bytes(cfg), f"a network of {shape}")
        self.check(cfg)
        self.cfg, self.mask_id = cfg, cfg.vocab_size
        self.emb = nn.Embedding(cfg.vocab_size + 1, cfg.n_embd)       # the last row is the mask
        self.time = TimeEmbedding(cfg) if TimeEmbedding.wanted(cfg) else None
        if cfg.gaussian:
            self.enter = nn.Linear((1 + cfg.self_cond) * cfg.n_embd, cfg.n_embd, bias=False)
            self.vector = nn.Linear(cfg.n_embd, cfg.n_embd)
        elif cfg.self_cond:
            self.soft_mask = nn.Parameter(torch.tensor([0.3, 2.0, 1.5]))
        if cfg.latent_dim:
            self.latent_prefix, self.latent_head = LatentPrefix(cfg), LatentHead(cfg)
            self.latent_encoder = self.latent_prior = None
            if cfg.latent_encoder != "none":
                self.latent_encoder, self.latent_prior = TextLatentEncoder(cfg), LatentPrior(cfg)
        self.blocks = nn.ModuleList(Block(cfg, i) for i in range(cfg.n_layer))
        self.order = order(cfg)
        self.reads_causally = scans_below(cfg, cfg.n_layer) == cfg.n_layer and not way(cfg).alternate
        self.ln_out = norm(cfg)
        if not cfg.tie_embeddings:
            self.head = nn.Linear(cfg.n_embd, cfg.vocab_size, bias=False)
        init_weights(self)

    @staticmethod
    def check(cfg):
        """ValueError, in one line with the repair, for a config that no network can be built from."""
        N = cfg.head_size
        if N not in HEAD_SIZES:
            sizes = ", ".join(map(str, HEAD_SIZES))
            raise ValueError(f"head_size={N} is not supported: choose one of {sizes}")
        if cfg.n_embd < 1 or cfg.n_embd % N:
            raise ValueError(f"n_embd={cfg.n_embd} is not a multiple of head_size={N}: "
                             f"choose {max(1, round(cfg.n_embd / N)) * N}")
        for key, rows in CHOICES.items():
            if (value := getattr(cfg, key)) not in rows and (key, value) != ("direction", ""):
                raise ValueError(f"{key}={value!r} is unknown: choose one of {', '.join(rows)}")
        if cfg.start_token >= max(1, cfg.vocab_size):
            raise ValueError(f"start_token={cfg.start_token} is not one of the {cfg.vocab_size} tokens: "
                             "give one of them, or -1 for the mask")
        for key in ("n_layer", "block_size"):
            if getattr(cfg, key) < 1:
                raise ValueError(f"{key}={getattr(cfg, key)} is not allowed: give at least 1")
        Block.check(cfg)
        TimeEmbedding.check(cfg)
        for key in ("dw_jrt_chunk", "read_twice"):
            if getattr(cfg, key) and (direction(cfg) != "causal" or cfg.latent_dim):
                raise ValueError(f"{key}={getattr(cfg, key):d} is for direction=causal without latents: "
                                 "leave it out")
        fits = cfg.rotary and direction(cfg) == "causal"
        if cfg.observed_first and (not fits or cfg.gaussian or cfg.dw_jrt_chunk or cfg.read_twice):
            raise ValueError("observed_first=1 is for masks, in causal networks that know positions: "
                             "--direction=causal --rotary=1, without dw_jrt_chunk and read_twice")
        if cfg.latent_dim:
            LatentPrefix.check(cfg)
        if cfg.latent_encoder != "none":
            TextLatentEncoder.check(cfg)
        if cfg.dw_jrt:
            DW_JRT_INJECT[cfg.dw_jrt_inject].check(cfg)

    def forward(self, x, t=None, latent=None, latent_t=None, state=None, lengths=None,
                finished_text=False, block_states=None, block_size=None, x0_guess=None, targets=None):
        cfg, has_latent = self.cfg, None
        n = min(block_states or block_size or cfg.block_size, x.shape[1])
        finished_text = finished_text or block_states is not None
        time = self.embed_time(x, t, latent_t, lengths, n)                       # (B,1,C) or (B,T,C) or None
        masked = x == self.mask_id if cfg.observed_first and not finished_text else None
        x = self.embed(x, time, x0_guess)                                        # (B,T,C)
        if latent is not None:
            wrong = not cfg.latent_dim or latent.shape[1:] != (cfg.latent_dim,)
            if wrong or state is not None or finished_text:
                takes = f"(B,{cfg.latent_dim})" if cfg.latent_dim else "none"
                raise ValueError(f"a latent of shape {tuple(latent.shape)}: this network takes {takes}, "
                                 "and only with whole rows, not with a state")
            has_latent = (latent != 0).any(-1)                                   # (B,)
            x, time, lengths = self.add_prefix(latent, x, time, lengths)         # (B,P+T,C)
            masked = None if masked is None else F.pad(masked, (cfg.latent_prefix_len, 0))
        twice, rows = None, lengths
        if cfg.read_twice and not finished_text:
            x, time, rows, twice = self.doubled(x, time, lengths)
        seen = None if state is None else state[0].seen
        seq = Sequence.of(x, cfg, time, rows, n, finished_text, block_states, has_latent, seen, masked)
        x, carry, states = self.blocks[0].ln0(x), Carry(), []
        for at, i in enumerate(self.order):
            x, s, carry = self.through(self.blocks[i], x, None if state is None else state[at], seq, carry)
            states.append(s)
        if twice is not None:
            x = x.gather(1, twice[..., None].expand(-1, -1, x.shape[2]))
        return self.heads(self.ln_out(x), lengths, has_latent, states, finished_text, targets)

    def through(self, block, *args):
        """A block; with `recompute`, what it computes is computed again for gradients and not kept."""
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False)
        return block(*args)

    def doubled(self, x, time, lengths):
        """Each row twice (read twice: JRT, arXiv 2407.05483), the second time right after its last real token
        -> x (B,2T,C), time, lengths, and where the second reading is, (B,T)."""
        B, T, C = x.shape
        at, n = torch.arange(2 * T, device=x.device).expand(B, -1), T if lengths is None else lengths[:, None]
        source = torch.where(at < n, at, at - n).clamp_max(T - 1)
        again = lambda z: z.gather(1, source[..., None].expand(-1, -1, C))
        time = time if time is None or time.shape[1] == 1 else again(time.expand(-1, T, -1))
        return again(x), time, None if lengths is None else 2 * lengths, at[:, :T] + n

    def embed_time(self, x, t, latent_t, lengths, n):
        """The noise level, given or counted, embedded: (B,1,C) or (B,T,C); None where nothing looks at it."""
        if self.time is None:
            return None
        if t is None:
            if x.is_floating_point():
                raise ValueError("embeddings do not tell how noisy they are: give t")
            n = n if direction(self.cfg) == "block" else x.shape[1]
            t = mask_share(x == self.mask_id, n, lengths)
        t = t.unsqueeze(1) if t.dim() == 1 else t
        if self.cfg.time_inputs == 1:
            return self.time(t)
        latent_t = torch.zeros_like(t[:, 0]) if latent_t is None else latent_t
        return self.time(t, latent_t.unsqueeze(1))

    def embed(self, x, time, x0_guess):
        """Ids (B,T) or embeddings (B,T,C) -> (B,T,C)."""
        if not x.is_floating_point():
            return self.emb(x) if x0_guess is None else self.soften(x, x0_guess)
        if self.cfg.self_cond:
            x = torch.cat([x, torch.zeros_like(x) if x0_guess is None else x0_guess], -1)
        return self.enter(x) + time if self.cfg.gaussian else x

    def soften(self, x, logits):
        """Soft masks (arXiv 2510.17206): ids (B,T), logits (B,T,V) of an earlier pass -> (B,T,C), where for a
        mask stands a mix of its embedding and that of the three likeliest tokens, the surer the less mask.

            (1 - l) e_mask + l sum_3 p e,   l = s sigmoid(k (c - H)), H the entropy in nats; s, k, c learned
        """
        s, k, c = self.soft_mask
        logp = logits.log_softmax(-1)
        p, likely = logp.exp().topk(min(3, logits.shape[-1]))
        entropy = -(logp.exp() * logp).sum(-1)
        share = (s * torch.sigmoid(k * (c - entropy)) * (x == self.mask_id)).unsqueeze(-1)
        guess = (self.emb(likely) * (p / p.sum(-1, keepdim=True)).unsqueeze(-1)).sum(-2)
        return torch.lerp(self.emb(x), guess, share)

    def add_prefix(self, latent, x, time, lengths):
        """The latents' P tokens before the text, with its mean noise level -> x (B,P+T,C), time, lengths."""
        P = self.cfg.latent_prefix_len
        x = torch.cat([self.latent_prefix(latent).to(x.dtype), x], 1)
        if time is not None and time.shape[1] > 1:
            time = torch.cat([time.mean(1, keepdim=True).expand(-1, P, -1), time], 1)
        return x, time, None if lengths is None else lengths + P

    def heads(self, h, lengths, has_latent, states, finished_text, targets):
        """h (B,T,C), after the last norm, or (B,P+T,C) where has_latent (B,) is not None -> Output."""
        cfg, P, prefix, latent = self.cfg, self.cfg.latent_prefix_len, None, None
        if has_latent is not None:
            prefix, h = h.split([P, h.shape[1] - P], 1)                          # (B,P,C), (B,T,C)
            lengths = None if lengths is None else lengths - P
        shown = h
        if cfg.predict == "next" and not finished_text:
            # the first token has none before it, but perhaps a latent
            first = h[:, :1]
            if prefix is not None:
                first = torch.where(has_latent[:, None, None], prefix[:, -1:], first)
            shown = torch.cat([first, h[:, :-1]], 1)
        if cfg.latent_dim:
            text = mean_over(h, real_tokens(h, lengths))                         # (B,C)
            if prefix is None:
                prefix, has_latent = h.new_zeros(len(h), P, cfg.n_embd), h.new_ones(len(h))
            latent = self.latent_head(prefix * has_latent[:, None, None], text).float()      # (B,D)
        logits = self.logits(shown) if targets is None else None                 # (B,T,V)
        nats = self.nats(shown, targets) if targets is not None and targets.shape[1] else None     # (B,T)
        return Output(logits, nats, h, latent, self.vector(h) if cfg.gaussian else None, states)

    def logits(self, h):
        """(...,C) -> (...,V), float32."""
        cap, tied = self.cfg.logit_cap, self.cfg.tie_embeddings
        logits = (F.linear(h, self.emb.weight[:-1]) if tied else self.head(h)).float()
        return cap * torch.tanh(logits / cap) if cap else logits

    def nats(self, h, targets):
        """h (B,T,C), targets (B,T), -1 for none -> their cross-entropies (B,T), 0 for none. Logits are made
        for a part of them at a time, MOST_LOGITS numbers, and once more for backward: all would be 1 GiB for
        4,096 tokens of 65,536."""
        where, n = targets >= 0, max(1, MOST_LOGITS * (8 if h.is_cuda else 1) // self.cfg.vocab_size)
        at = where.flatten().nonzero()[:, 0]
        at = F.pad(at, (0, -len(at) % EVEN))               # the first row again, which is not scattered
        parts = list(zip(*(z.flatten(0, 1).index_select(0, at).split(n) for z in (h, targets))))
        part = lambda h, ids: F.cross_entropy(self.logits(h), ids, reduction="none", ignore_index=-1)
        if len(parts) > 1 and torch.is_grad_enabled():
            part = functools.partial(checkpoint, part, use_reentrant=False)
        nats = torch.cat([part(*z) for z in parts])
        return h.new_zeros(targets.shape, dtype=torch.float32).masked_scatter(where, nats)

    def table(self):
        """The V tokens' embeddings, each of length sqrt(C): what Gaussian diffusion noises and rounds to."""
        return F.normalize(self.emb.weight[:-1].float(), dim=-1) * self.cfg.n_embd**0.5

    def posterior(self, x, lengths=None):
        """Stage II's q(z|x), x (B,T) clean text -> mu, log variance (B,D), the text's mean output (B,C)."""
        out = self(x, lengths=lengths)
        mu, logvar = self.latent_encoder(out, lengths)
        return mu.float(), logvar.float(), mean_over(out.hidden, real_tokens(x, lengths)).float()

def mask_share(masked, n, lengths):
    """masked (B,T) bool -> the share of masked tokens in each block of n, (B,T), or (B,) for one block."""
    (B, T), real = masked.shape, real_tokens(masked, lengths)
    real = torch.ones_like(masked) if real is None else real
    count, of = (F.pad(z.float(), (0, -T % n)).view(B, -1, n).sum(-1) for z in (masked & real, real))
    share = count / of.clamp_min(1)
    return share[:, 0] if n >= T else share.repeat_interleave(n, 1)[:, :T]

def weight_bytes(cfg):
    """At least what the weights take in memory, bytes, before anything is built."""
    C, embeddings = cfg.n_embd, 1 if cfg.tie_embeddings else 2
    layer = 4 * C * C + 2 * C * (cfg.dim_ffn or 4 * C)
    if "rwkv7" in cfg.mixer:
        layer += 2 * C * (cfg.rank_w + cfg.rank_a + cfg.rank_g)
    outside = cfg.vocab_size * C * embeddings + cfg.latent_dim * cfg.latent_prefix_len * C
    return 4 * (cfg.n_layer * layer + outside)

def flops_per_token(cfg, T):
    """Of one forward pass: 2 per multiply-add of the matrix products, 9 N per channel for one step of a scan
    (S a, the decay, two outer products, S r), 4 C T for attention over T keys; elementwise work, norms and
    the embedding are left out."""
    C, mixers = cfg.n_embd, pattern(cfg)
    total = 2 * C * cfg.vocab_size + len(order(cfg)) * 4 * C * (cfg.dim_ffn or 4 * C)
    for layer in order(cfg):
        mixer = mixers[layer]
        if mixer == "rwkv7":
            ranks = sum(low_ranks(cfg, first="rwkv7" not in mixers[:layer]).values())
            scan = 2 * (3 * C * C + 2 * C * ranks) + 9 * C * cfg.head_size
            total += scan + 2 * C * C
            if two_scans(cfg):
                total += scan + {"gate": 4 * C * C, "concat": 4 * C * C}.get(cfg.fusion, 0)
        else:
            total += 8 * C * C + 4 * C * T * (mixer == "attention")
    return total

def in_memory(need, what):
    """ValueError if `need` bytes are more than this machine has."""
    try:
        have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):      # a system that does not say
        return
    if need > have:
        raise UserError(f"{what} takes at least {need / 2**30:,.1f} GiB, "
                        f"this machine has {have / 2**30:.1f}: choose smaller sizes")

# ---- initialisation, parameter kinds, optimizers: RWKV-LM's RWKV-v7/train_temp ----

def head_gain(cfg):
    return 0.5 * max(1, cfg.vocab_size / cfg.n_embd) ** 0.5

def initial(cfg):
    """{name: f(p, i)}: what parameter p of layer i starts as; what has no row keeps what its module set."""
    C, N, L = cfg.n_embd, cfg.head_size, cfg.n_layer
    n = torch.arange(C)
    ddd, linear = n / C, n / max(1, C - 1) - 0.5
    zigzag = ((n % N) - (N - 1) / 2) / ((N - 1) / 2)
    zigzag = zigzag * zigzag.abs()

    def full(value):
        return lambda p, i: torch.full(p.shape, float(value))

    def orthogonal(gain):
        return lambda p, i: nn.init.orthogonal_(torch.empty(p.shape), gain)

    def low_rank(p, i):                    # the second half of such a path
        return nn.init.orthogonal_(torch.empty(p.shape), 0.1 * max(1, p.shape[0] / p.shape[1]) ** 0.5)

    def shift(power):
        return lambda p, i: 1 - ddd ** (power * (1 - i / L))

    def decay(p, i):
        return -6 + 6 * (n / max(1, C - 1)) ** (1 + (i / max(1, L - 1)) ** 0.3) + 0.5 + zigzag * 2.5

    rows = {
        "emb.weight": lambda p, i: torch.empty(p.shape).uniform_(-1e-4, 1e-4),
        "head.weight": orthogonal(head_gain(cfg)),
        "att.x_r": shift(0.2), "att.x_w": shift(0.9), "att.x_k": shift(0.7),
        "att.x_v": shift(0.7), "att.x_a": shift(0.9), "att.x_g": shift(0.2),
        "att.w0": decay,
        "att.a0": lambda p, i: -0.19 + zigzag * 0.3 + linear * 0.4,
        "att.v0": lambda p, i: 0.73 - linear * 0.4,
        "att.k_k": lambda p, i: 0.71 - linear * 0.1,
        "att.k_a": full(1.02), "att.r_k": full(-0.04),
        **{f"att.{q}1": full(0) for q in "wavg"}, **{f"att.{q}2": low_rank for q in "wavg"},
        "att.decay": lambda p, i: torch.logspace(-2, 0.5, C).expm1().log(),    # softplus: 0.01 ... 3 / token
        "att.bonus": lambda p, i: math.log(0.3) + zigzag * 0.5,
        "att.fuse.w_b": full(1), "att.fuse.mix.weight": lambda p, i: torch.eye(C).repeat(1, 2),
        "att.query.weight": orthogonal(1.0), "att.receptance.weight": orthogonal(1.0),
        "att.key.weight": orthogonal(0.1), "att.value.weight": orthogonal(1.0), "att.output.weight": full(0),
        "att.ln_x.weight": lambda p, i: torch.full((C,), ((1 + i) / L) ** 0.7), "att.ln_x.bias": full(0),
        "att.jrt.alpha": full(cfg.dw_jrt_alpha_init), "att.jrt.beta": full(0),
        "ffn.x_k": lambda p, i: 1 - ddd ** ((1 - i / L) ** 4),
        "ffn.key.weight": orthogonal(1.0), "ffn.value.weight": full(0),
        **{f"{ln}.weight": full(1) for ln in ("ln0", "ln1", "ln2", "ln_out")},
        **{f"{ln}.bias": full(0) for ln in ("ln0", "ln1", "ln2", "ln_out")},
    }
    if cfg.tie_embeddings:                 # the table must be able to be a head
        rows["emb.weight"] = orthogonal(0.5)
    return rows

def init_weights(model):
    rows = initial(model.cfg)
    for name, p in model.named_parameters():
        i, row = 0, name
        if name.startswith("blocks."):     # blocks.3.att.back.key.weight: row att.key.weight, layer 3
            _, i, row = name.split(".", 2)
        if make := rows.get(row.replace("att.back.", "att.")):
            p.data.copy_(make(p, int(i)).view(p.shape))

def parameter_kinds(model):
    """[(name, parameter, kind, lr multiplier, decayed)]: what an optimizer must know of each parameter.

    kind: emb, head (also a tied embedding), matrix (a block's big ones), norm (and biases), scalar (DW-JRT
    gates), vector (all else: shifts, low-rank paths). As in RWKV-LM's train_temp, w0 learns at twice the rate
    and weight decay touches only `.weight` matrices."""
    def kind(name):
        if name in ("emb.weight", "head.weight"):
            return "head" if model.cfg.tie_embeddings else name.split(".")[0]
        if ".ln" in name or name.startswith("ln_") or name.endswith(".bias"):
            return "norm"
        if "jrt" in name:
            return "scalar"
        return "matrix" if name.endswith(".weight") else "vector"

    return [(n, p, kind(n), 2.0 if "att.w0" in n else 1.0, n.endswith(".weight") and p.squeeze().dim() >= 2)
            for n, p in model.named_parameters()]

class Muon(torch.optim.Muon):
    """torch.optim.Muon with adjust_lr_fn="original", its Newton-Schulz iterations batched over matrices of
    one shape: the same update in half the time, where matrices are small and many."""

    @torch.no_grad()
    def step(self):
        if any(hasattr(p, "full_tensor") for group in self.param_groups for p in group["params"]):
            return super().step()                      # sharded parameters take torch's own way
        for group in self.param_groups:
            params, grads, means, alike = [], [], [], {}
            self._init_group(group, params, grads, means)
            if not params:                             # none of them learns at present
                continue
            torch._foreach_lerp_(means, grads, 1 - group["momentum"])
            if group["weight_decay"]:
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            for p, update in zip(params, torch._foreach_lerp(grads, means, group["momentum"])):
                rate = group["lr"] * max(1, p.shape[0] / p.shape[1]) ** 0.5
                if p.shape[0] > p.shape[1]:            # tall ones lie down
                    p, update = p.mT, update.mT
                alike.setdefault(p.shape, []).append((p, update, rate))
            for shape, rows in alike.items():
                n = max(1, 2**24 // shape.numel())     # large ones fill the machine by themselves
                for at in range(0, len(rows), n):
                    params, updates, rates = zip(*rows[at:at + n])
                    for p, update, rate in zip(params, self.orthogonal(updates, group), rates):
                        p.add_(update, alpha=-rate)

    def orthogonal(self, updates, group):
        """Matrices of one shape, none tall -> (n, rows, columns), near the nearest semi-orthogonal ones."""
        x = torch.stack(updates)
        x = x.bfloat16() if muon_in_bf16(x.device) else x.float()
        x /= x.norm(dim=(1, 2), keepdim=True).clamp(min=group["eps"])
        a, b, c = group["ns_coefficients"]
        for _ in range(group["ns_steps"]):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return x

def muon_in_bf16(device):
    """Are Newton-Schulz iterations in bfloat16, as torch's? On a CPU in float32, which costs 6 % of a step
    where bfloat16 is fast: otherwise rounding grows until one process and two are no longer the same run."""
    return device.type != "cpu" and fast_bf16(device)

def muon_rows(model, cfg):
    """Muon (arXiv 2502.16982) for the blocks' matrices, Adam for the rest, a rate per kind of parameter."""
    rates = dict(emb=cfg.wte_lr, head=cfg.head_lr, norm=cfg.ln_lr, scalar=cfg.lambda_lr, vector=cfg.adam_lr)
    groups = {}
    for _, p, kind, scale, _ in parameter_kinds(model):
        groups.setdefault((kind, scale), []).append(p)
    matrices = groups.pop(("matrix", 1.0))
    adam = [dict(params=ps, lr=rates[kind] * scale) for (kind, scale), ps in groups.items()]
    return [torch.optim.Adam(adam, betas=(0.9, 0.99), fused=True),
            Muon(matrices, lr=cfg.muon_lr, weight_decay=0.0)]

def adamw_rows(model, cfg):
    """AdamW as RWKV-LM's train_temp sets it up: w0 at twice the rate, decay on the big matrices only."""
    groups = {}
    for name, p, _, scale, decayed in parameter_kinds(model):
        if cfg.freeze_backbone and name == "emb.weight":       # its tokens' rows must stay as they are
            decayed = False
        groups.setdefault((scale, decayed), []).append(p)
    rows = [dict(params=ps, lr=cfg.learning_rate * scale, weight_decay=cfg.weight_decay if decayed else 0.0)
            for (scale, decayed), ps in groups.items()]
    return [torch.optim.AdamW(rows, betas=(0.9, 0.99), eps=1e-18, fused=True)]

OPTIMIZERS = {"muon": muon_rows, "adamw": adamw_rows}      # (model, cfg with train.py's rates) -> [optimizer]

# ---- checkpoints: plain tensors and dicts, written whole or not at all ----

# What RWKV-7 weights have at least, and in how many dimensions.
OFFICIAL = {"emb.weight": 2, "head.weight": 2, "ln_out.weight": 1, "blocks.0.ln0.weight": 1,
            "blocks.0.att.r_k": 2, "blocks.0.att.w1": 2, "blocks.0.att.a1": 2, "blocks.0.att.g1": 2,
            "blocks.0.ffn.key.weight": 2}
OLDER = {"time_maa_x": "RWKV-6 (x060)", "time_mix_k": "RWKV-4 or RWKV-5"}    # told by a name
WRAPPERS = ("state_dict", "model_state_dict", "model", "module")     # where trainers put the weights,
PREFIXES = ("module.", "_orig_mod.", "_forward_module.", "model.")   # and what they put before their names
SHAPES = ("n_layer", "n_embd", "head_size", "vocab_size", "dim_ffn", "mixer",
          "rank_w", "rank_a", "rank_v", "rank_g")
# What pretrained weights may lack: DW-JRT, backward scan, noise level, latents; only DW-JRT changes logits.
ADDED = (".jrt.", ".back.", ".fuse.", ".down", ".up", ".cond.", "time.", "enter.", "vector.", "latent_")

def save_checkpoint(path, content):
    """Written whole or not at all (configurator.written). UserError if the folder cannot be written."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with written(path) as f:
        torch.save(content, f)

def load_checkpoint(path):
    """A file of tensors -> dict on the CPU. ValueError, in one line, if it is missing, truncated or foreign.
    Its claims of size are compared with the file before memory is taken."""
    path = str(path)
    if not os.path.isfile(path):
        raise ValueError(f"checkpoint {path} does not exist: train first, or give a .pt or .pth file")
    content, size = read_tensors(path), os.path.getsize(path)
    if not isinstance(content, dict) or not any(isinstance(v, (Tensor, dict)) for v in content.values()):
        raise ValueError(f"checkpoint {path} holds no weights: give a checkpoint of train.py or an official "
                         "RWKV-7 .pth")
    if "model_config" not in content:
        content = unwrapped(content)
    if "model_config" not in content:
        if all(isinstance(x, Tensor) for x in content.values()):
            check_weights(content, size, path)
        return content
    for key in ("model", "averaged"):
        if key in content:
            check_weights(content[key], size, path)
    for key, kind in dict(model_config=dict, step=int, config=dict, tokenizer=dict, optimizers=list).items():
        value = content.get(key, kind())
        if not isinstance(value, kind) or key == "step" and not 0 <= value < 2**63:
            raise ValueError(f"checkpoint {path} has a {key} that cannot be: it is damaged")
    if "model" not in content:
        raise ValueError(f"checkpoint {path} holds no weights: it is damaged")
    return content

def read_tensors(path):
    """What torch.save or safetensors wrote; ValueError, in one line, for anything else."""
    try:
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file
            return load_file(path)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as z:
                size = os.path.getsize(path)
                if any(m.compress_type != zipfile.ZIP_STORED or m.file_size > size for m in z.infolist()):
                    raise ValueError("it is compressed")
        return torch.load(path, map_location="cpu", weights_only=True)
    except ImportError:
        raise ValueError(f"{path} needs the safetensors package: pip install safetensors, or give the .pth "
                         "file") from None
    except pickle.UnpicklingError as e:
        raise ValueError(f"checkpoint {path} is not a file of plain tensors and is not loaded, for safety: "
                         f"{str(e).split('.')[0]}") from None
    except Exception as e:                 # a foreign file can make its reader fail in any way
        raise ValueError(f"checkpoint {path} cannot be read ({' '.join(str(e).split())[:80]}): "
                         "it is truncated or no checkpoint") from None

def unwrapped(content):
    """The weights in another trainer's file, under their own names."""
    while inner := next((content[key] for key in WRAPPERS if isinstance(content.get(key), dict)), None):
        content = inner
    while content:
        prefix = next((p for p in PREFIXES if all(str(name).startswith(p) for name in content)), None)
        if prefix is None:
            break
        content = {name.removeprefix(prefix): value for name, value in content.items()}
    return content

def check_weights(weights, size, path):
    """ValueError unless `weights` are plain dense tensors, together no larger than `size` bytes, the file."""
    def dense(x):
        return (isinstance(x, Tensor) and x.layout == torch.strided and x.device.type != "meta"
                and not x.is_quantized and not x.is_complex())

    named = isinstance(weights, dict) and weights and all(isinstance(name, str) for name in weights)
    odd = next((name for name, x in weights.items() if not dense(x)), None) if named else None
    if not named or odd:
        what = f"{odd} is {type(weights[odd]).__name__}, " if odd else ""
        raise ValueError(f"checkpoint {path} must map names to plain dense tensors ({what}sparse and "
                         "quantised ones are not read): "
                         "give a checkpoint of train.py or an official RWKV-7 .pth")
    if (claim := state_bytes(list(weights.values()))) > size:
        raise ValueError(f"checkpoint {path} claims tensors of {claim:,} bytes, the file has {size:,}: "
                         "it is damaged")

def block_numbers(weights):
    """-> the numbers of a state dict's blocks, as text, and whether one is missing between 0 and the last."""
    blocks = {name.split(".")[1] for name in weights if name.startswith("blocks.") and name.count(".") > 1}
    return blocks, blocks != set(map(str, range(len(blocks))))

def own_config(content, path):
    """ModelConfig of a checkpoint of train.py. ValueError for fields of a newer version, for values of
    another type, and for sizes that are not those of its weights."""
    given, weights, rows = content["model_config"], content["model"], merge([section(ModelConfig)], {})
    if newer := [str(key) for key in given if key not in rows]:
        raise ValueError(f"checkpoint {path} was written by another version of this code, which has "
                         f"{', '.join(newer[:4])}: use that one")
    cfg = ModelConfig(**{key: checked(key, value, rows[key], path) for key, value in given.items()})
    blocks, holes = block_numbers(weights)
    table = tuple(weights["emb.weight"].shape) if "emb.weight" in weights else ()
    if holes or len(blocks) != cfg.n_layer or table != (cfg.vocab_size + 1, cfg.n_embd):
        raise ValueError(f"checkpoint {path} is damaged: it says n_layer={cfg.n_layer}, n_embd={cfg.n_embd}, "
                         f"vocab_size={cfg.vocab_size}, "
                         f"its weights are {len(blocks)} blocks and an embedding of {table}")
    return cfg

def official_config(weights, path, **overrides):
    """ModelConfig of an official RWKV-7 state dict, from its shapes. ValueError names missing keys."""
    if older := next((what for key, what in OLDER.items() if f"blocks.0.att.{key}" in weights), ""):
        raise ValueError(f"{path} is {older}, this code reads RWKV-7 (x070): give weights of that version")
    if missing := [k for k in OFFICIAL if k not in weights]:
        raise ValueError(f"{path} is neither a checkpoint of train.py nor RWKV-7 weights: "
                         f"it lacks {', '.join(missing)}")
    check_weights(weights, math.inf, path)
    found = {k: z if z.dim() == OFFICIAL[k] else z.squeeze() for k, z in weights.items() if k in OFFICIAL}
    shapes = {k.removeprefix("blocks.0."): z.shape for k, z in found.items()}
    if flat := [k for k, dims in OFFICIAL.items() if found[k].dim() != dims]:
        raise ValueError(f"{path} is not RWKV-7 weights: {flat[0]} has shape {tuple(weights[flat[0]].shape)}")
    blocks, holes = block_numbers(weights)
    if holes:
        raise ValueError(f"{path} is not RWKV-7 weights: "
                         f"blocks are missing between 0 and {max(blocks, key=len)[:12]}")
    (V, C), v1 = shapes["emb.weight"], weights.get("blocks.1.att.v1")
    own = dict(n_layer=len(blocks), n_embd=C, head_size=shapes["att.r_k"][1], vocab_size=V,
               dim_ffn=shapes["ffn.key.weight"][0], rank_w=shapes["att.w1"][1], rank_a=shapes["att.a1"][1],
               rank_g=shapes["att.g1"][1], rank_v=0 if v1 is None else v1.squeeze().shape[1])
    refuse_other_shapes(path, "the file", overrides, own)
    return ModelConfig(**({"start_token": 0} | overrides | own))

def refuse_other_shapes(path, what, asked, own):
    """ValueError for settings that are not those of the file; 0 stands for the file's."""
    if clash := [f"{k}={asked[k]} ({what} has {v})" for k, v in own.items() if asked.get(k, v) not in (v, 0)]:
        raise ValueError(f"{path} has another shape than asked for: {', '.join(clash)}; "
                         "leave these settings out")

def from_pretrained(path, content=None, /, **overrides):
    """A Denoiser from an own checkpoint or an official RWKV-7 .pth; overrides: ModelConfig fields but SHAPES.
    An official file has no row for the mask, which starts as that of token 0, the end of text, and stands
    before a text; and no DW-JRT gates and what else is ADDED: those start as at initialisation.
    content: from load_checkpoint, if known. ValueError, in one line, also for files of another shape."""
    content = load_checkpoint(path) if content is None else content
    if "model_config" in content:
        cfg, weights = own_config(content, path), content["model"]
        if "averaged" in content:              # what was evaluated while training
            averaged = content["averaged"].items()
            weights = {k.removeprefix("module."): v for k, v in averaged if k != "n_averaged"}
        own = {k: getattr(cfg, k) for k in SHAPES}
        refuse_other_shapes(f"checkpoint {path}", "the checkpoint", overrides, own)
        model = Denoiser(replace(cfg, **(overrides | own)))
    else:
        weights = dict(content)
        model = Denoiser(official_config(weights, path, **overrides))
        table = weights["emb.weight"].squeeze()
        weights["emb.weight"] = torch.cat([table, table[:1]])
        for key in ("v0", "v1", "v2"):          # official files carry them; layer 0 never uses them
            weights.pop(f"blocks.0.att.{key}", None)
    load_weights(model, weights, path)
    return model

def official_weights(model, dtype=torch.float32):
    """The weights as official RWKV-7 files have them; the mask's row is left out. ValueError for a network
    that is another one, or more."""
    cfg, own = model.cfg, asdict(ModelConfig())
    same = ("loops", "time_cond", "gaussian", "self_cond", "latent_dim", "norm", "tie_embeddings",
            "ffn_shift", "dw_jrt", "read_twice", "rotary", "observed_first", "logit_cap", "adapter_rank")
    other = [f"{key}={getattr(cfg, key)}" for key in same if getattr(cfg, key) != own[key]]
    if set(pattern(cfg)) != {"rwkv7"} or direction(cfg) != "causal":
        other = [f"mixer={cfg.mixer}", f"direction={direction(cfg)}", *other]
    if other:
        raise ValueError("the official layout is for causal RWKV-7 alone, this network has "
                         f"{', '.join(other)}: keep the checkpoint")
    weights, C, rank = dict(model.state_dict()), cfg.n_embd, low_ranks(cfg, first=False)["v"]
    weights["emb.weight"] = weights["emb.weight"][:-1]
    for key, shape in dict(v0=(1, 1, C), v1=(C, rank), v2=(rank, C)).items():      # never used
        weights[f"blocks.0.att.{key}"] = torch.zeros(shape)
    return {name: x.to(dtype).cpu().contiguous() for name, x in weights.items()}

def load_weights(model, weights, path):
    """Copy a state dict into the model, whatever its dtype; ValueError unless only ADDED ones are absent."""
    own = model.state_dict()
    for name, module in model.named_modules():
        if name.endswith(".fuse"):         # a causal checkpoint: at first the forward scan alone
            own |= {f"{name}.{k}": v for k, v in type(module)(model.cfg).state_dict().items()}
    if model.cfg.copy_back:
        sources = {k: k.replace(".back.", ".") for k in own}
        weights = {k: weights[source] for k, source in sources.items() if source in weights} | weights
    if broken := [k for k, v in weights.items() if k in own and not torch.isfinite(v).all()]:
        raise ValueError(f"{path} holds NaN or infinite numbers in {', '.join(broken[:4])}: "
                         "the run that wrote it diverged; use an earlier checkpoint")
    found = {k: weights[k] for k in own if k in weights}
    complaints = {"lacks": [k for k in own if k not in weights and not any(part in k for part in ADDED)],
                  "has unknown": [k for k in weights if k not in own and ".jrt." not in k],
                  "has another shape in": [f"{k} {tuple(v.shape)} for {tuple(own[k].shape)}"
                                           for k, v in found.items() if v.numel() != own[k].numel()]}
    for what, keys in complaints.items():
        if keys:
            more = f" and {len(keys) - 4} more" if len(keys) > 4 else ""
            raise ValueError(f"{path} {what} {', '.join(keys[:4])}{more}: it was made by another model; "
                             "give the settings it was trained with")
    model.load_state_dict(own | {k: v.reshape(own[k].shape).to(own[k].dtype) for k, v in found.items()})

def keep_weights(model, kind):
    """For inference alone: the matrices of the blocks and the head are kept as `kind`, a row of KEPT."""
    for module in [*model.modules()]:
        if isinstance(module, Linear):
            module.kept, module.weight = KeptLinear(module.weight, kind), None
        for name, p in [*module.named_parameters(recurse=False)] if isinstance(module, Scan7) else []:
            if re.fullmatch("[wavg][12]", name):
                delattr(module, name)
                setattr(module, name, KeptLinear(p.mT, kind))
    if not model.cfg.tie_embeddings:
        model.head = KeptLinear(model.head.weight, kind)

# ---- the machine ----

def compile_blocks(model, on=True):
    """torch.compile for each block where gradients are wanted, or take it back. Blocks share their code: it
    is compiled for the first and once for all others; the whole network would take a minute per 10 layers."""
    def compiled(plain):
        fast = torch.compile(plain, dynamic=False)         # with shapes left open it takes minutes
        return lambda *args: (fast if torch.is_grad_enabled() else plain)(*args)

    for block in model.blocks:
        block._compiled_call_impl = compiled(block._call_impl) if on else None

class Replayed:
    """A network's forward for samplers on a GPU, whose kernels end before Python has started the next: of
    each shape the first call runs as ever, the second is recorded (a CUDA graph), the others replay it."""
    KEPT = 4               # shapes; an attention cache has new ones in every block

    def __init__(self, forward):
        self.forward, self.records = forward, {}

    def __call__(self, *args, **options):
        targets = options.get("targets")
        if torch.is_grad_enabled() or targets is not None and targets.numel():     # these wait for the GPU
            return self.forward(*args, **options)
        given, tree = pytree.tree_flatten((args, options))
        shape = [(z.shape, z.dtype) if torch.is_tensor(z) else z for z in given]
        shape = *options, *shape, torch.is_autocast_enabled("cuda")
        known, record = shape in self.records, self.records.pop(shape, None)
        record = self.records[shape] = record or (self.record(given, tree) if known else None)
        if len(self.records) > self.KEPT:
            del self.records[next(iter(self.records))]     # the one used least recently
        if record is None:
            return self.forward(*args, **options)
        replay, kept, out = record
        for z, new in zip(*(filter(torch.is_tensor, part) for part in (kept, given))):
            z.copy_(new)
        replay()
        return pytree.tree_map_only(Tensor, torch.clone, out)

    def record(self, given, tree):
        """What replays a call, what it reads and what it writes."""
        kept = [z.clone() if torch.is_tensor(z) else z for z in given]
        args, options = pytree.tree_unflatten(kept, tree)
        graph, on = torch.cuda.CUDAGraph(), torch.is_autocast_enabled("cuda")
        with torch.cuda.graph(graph), torch.autocast("cuda", enabled=on, cache_enabled=False):
            out = self.forward(*args, **options)       # no cache: what it keeps is gone before the replay
        return graph.replay, kept, out

def product_flops(device, dtype):
    """FLOP/s of a large product of matrices: what MFU is a share of."""
    n, seconds = 1024 if device.type == "cpu" else 8192, []
    x = torch.ones(n, n, dtype=dtype, device=device)
    for _ in range(3):
        begun = time.perf_counter()
        (x @ x)[0, 0].item()
        seconds.append(time.perf_counter() - begun)
    return 2 * n**3 / min(seconds)

def peak_memory(device):
    """Bytes that this process has taken at most: of the GPU, else of the machine; 0 where nobody counts."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if os.path.exists("/proc/self/status"):                # getrusage counts what was before exec, too
        with open("/proc/self/status") as f:
            return 1024 * sum(map(int, re.findall(r"VmHWM:\s+(\d+)", f.read())))
    try:
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    except ImportError:
        return 0

def fast_bf16(device):
    """Does this device multiply bf16 matrices natively?"""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    tests = (getattr(torch.cpu, f"_is_{what}_supported", bool) for what in ("avx512_bf16", "amx_tile"))
    return device.type == "cpu" and any(test() for test in tests)

def open_device(name, local=0):
    """auto | cpu | cuda | cuda:1 | mps -> torch.device; local: which GPU "cuda" is. ValueError for others."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(f"cuda:{local}" if name == "cuda" else name)
        torch.zeros(1, device=device).cpu()
        return device
    except Exception as e:                 # what a build of torch, a driver or a wrong name can raise
        there = ", ".join(["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))])
        said = (str(e) or type(e).__name__).splitlines()[0]
        raise ValueError(f"device={name} cannot be used here ({said[:100]}): there is {there}") from None

def tune_cpu():
    """Two settings that make a training step 1.5x faster; both leave results as exact as before.

    glibc hands large freed blocks back to the kernel, so that every step pays for fresh pages: keep them. MKL
    is slow at float32 products on AMD: allowing bf16 sends them to oneDNN, which still computes in float32
    where there is no bf16 matrix unit (AMX). A product tells; if it comes out rounded, the setting is taken
    back."""
    torch.set_flush_denormal(True)
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-3, 1 << 30)        # M_MMAP_THRESHOLD
        libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD
    if hasattr(torch.backends.mkldnn, "matmul"):
        before = torch.backends.mkldnn.matmul.fp32_precision
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
        x = torch.full((512, 512), 1 + 2**-12)             # bf16 has no such number
        if not torch.equal(x @ torch.eye(512), x):
            torch.backends.mkldnn.matmul.fp32_precision = before
