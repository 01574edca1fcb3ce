"""Masked (absorbing) text diffusion: noise schedules, objectives, the likelihood bound, samplers.

B batch, T time, V vocabulary; t in (0, 1] is the noise level, m(t) the share of tokens masked at t, m(1) = 1.
`denoise` is any callable ids (B,T) -> logits (B,T,V); nothing here knows the network. Randomness is passed in.
"""
import math

import torch
import torch.nn.functional as F

# ---- schedules: t -> (m(t), m'(t)), with m(0) = 0 and m(1) = 1 ----


def linear(t):
    """m(t) = t (MDLM, arXiv 2406.07524, the log-linear schedule)."""
    return t, torch.ones_like(t)


def cosine(t):
    """m(t) = 1 - cos(pi t / 2) (Nichol & Dhariwal 2021, as a masking rate): few masks for small t."""
    return 1 - torch.cos(math.pi / 2 * t), math.pi / 2 * torch.sin(math.pi / 2 * t)


def sigmoid(t, width=3.0):
    """m(t) = a sigmoid between -width and width, rescaled to run from 0 to 1 (Jabri et al. 2023)."""
    s, lo, hi = torch.sigmoid(width * (2 * t - 1)), torch.sigmoid(t.new_tensor(-width)), torch.sigmoid(t.new_tensor(width))
    return (s - lo) / (hi - lo), 2 * width * s * (1 - s) / (hi - lo)


SCHEDULES = {"linear": linear, "cosine": cosine, "sigmoid": sigmoid}


def stratified(n, generator):
    """n noise levels in (0, 1], one in each n-th of the interval (low discrepancy: VDM, arXiv 2107.00630, app. I)."""
    return 1 - (torch.rand((), generator=generator) + torch.arange(n)) / n % 1


def mask_tokens(x, masked, mask_id):
    """x (B,T) ids, masked (B,T) bool -> x with mask_id where masked."""
    return x.masked_fill(masked, mask_id)


# ---- objectives: (maskable (B,T) bool, t (B,), noise (B,T) uniform, schedule) -> masked (B,T) bool, weight, denominator ----
# The loss is the sum over masked tokens of weight * cross-entropy, divided by the denominator summed over the whole global
# batch: so it is the same however the batch is cut into micro-batches and processes.


def masked_mean(maskable, t, noise, schedule):
    """Mean cross-entropy over the masked tokens, every mask rate. Not a bound."""
    masked = maskable & (noise < SCHEDULES[schedule](t)[0][:, None])
    return masked, 1.0, masked.sum()


def elbo(maskable, t, noise, schedule):
    """MDLM's bound (arXiv 2406.07524, eq. 10) in nats a token: cross-entropy weighted by m'(t) / m(t)."""
    rate, slope = SCHEDULES[schedule](t)
    return maskable & (noise < rate[:, None]), (slope / rate)[:, None], maskable.sum()


def task(maskable, t, noise, schedule):
    """All maskable tokens masked, mean cross-entropy: a synthetic task's answer, predicted in one step."""
    return maskable, 1.0, maskable.sum()


OBJECTIVES = {"masked_mean": masked_mean, "elbo": elbo, "task": task}


def denoising_loss(denoise, x, masked, weight, mask_id):
    """Sum over the masked tokens of weight * cross-entropy (nats); x, masked (B,T), weight broadcastable to (B,T)."""
    logits = denoise(mask_tokens(x, masked, mask_id))[masked]
    loss = F.cross_entropy(logits, x[masked], reduction="none")
    weight = torch.as_tensor(weight, device=x.device).expand(masked.shape)[masked]
    return (loss * weight).sum()


def exact_count_bound(denoise, x, mask_id, generator):
    """Per row, an unbiased estimate of the bound on -log p(x) / T in nats a token -> (B,).

    Draws the number of masked tokens k uniformly from 1..T (stratified over the rows), masks k positions at random, and
    takes the mean cross-entropy over those k (LLaDA, arXiv 2502.09992, eq. 14): equal in expectation to the integral over t
    of the ELBO under every schedule, with far less variance than random mask rates.
    """
    B, T = x.shape
    k = (stratified(B, generator) * T).ceil().clamp(1, T)
    rank = torch.rand(B, T, generator=generator).argsort(1).argsort(1)
    masked = (rank < k[:, None]).to(x.device)
    logits = denoise(mask_tokens(x, masked, mask_id))
    loss = F.cross_entropy(logits.flatten(0, 1), x.flatten(), reduction="none").view(B, T)
    return (loss * masked).sum(1) / masked.sum(1)


# ---- samplers: (denoise, x (B,T), known (B,T) bool, mask_id, generator, ...) -> x without a mask; known tokens stay ----


def draw(logits, temperature, top_k, generator):
    """(B,T,V) logits -> a token for each position and its probability at temperature 1, both (B,T).

    Gumbel-max in float64: in float32 the noise is cut off, which lowers entropy (arXiv 2409.02908). temperature 0 = argmax.
    """
    logits = logits.double()
    if top_k:
        logits = logits.masked_fill(logits < logits.topk(min(top_k, logits.shape[-1])).values[..., -1:], -math.inf)
    score = logits
    if temperature > 0:
        noise = torch.rand(logits.shape, generator=generator, dtype=torch.float64).to(logits.device)
        score = logits / temperature - torch.log(-torch.log(noise.clamp(1e-300, 1 - 1e-16)))
    token = score.argmax(-1)
    return token, logits.softmax(-1).gather(-1, token.unsqueeze(-1)).squeeze(-1)


@torch.no_grad()
def confidence(denoise, x, known, mask_id, generator, steps=0, threshold=0.95, temperature=1.0, top_k=0, watch=None):
    """Confidence-parallel decoding: each step keeps every draw whose probability reaches `threshold`, and at least one a row.

    steps > 0 bounds the denoiser calls: then at least an even share of what was masked at first is kept each step.
    watch(x, fresh) is called after every step, fresh (B,T) the tokens just decided.
    """
    x = mask_tokens(x, ~known, mask_id)
    masked = ~known
    share = (masked.sum(1) + steps - 1) // steps if steps else torch.ones_like(masked.sum(1))
    while masked.any():
        token, sure = draw(denoise(x), temperature, top_k, generator)
        sure = sure.masked_fill(~masked, -1)
        rank = sure.argsort(dim=1, descending=True, stable=True).argsort(1)
        fresh = masked & ((sure >= threshold) | (rank < share[:, None]))
        x, masked = torch.where(fresh, token, x), masked & ~fresh
        if watch:
            watch(x, fresh)
    return x


SAMPLERS = {"confidence": confidence}


def extend(denoise, prompt, n, length, mask_id, generator, sampler="confidence", **options):
    """prompt (B,P) and n more tokens, in windows of `length` of which at least half is new -> (B, P+n)."""
    x = prompt
    while (left := prompt.shape[1] + n - x.shape[1]) > 0:
        context = x[:, max(0, x.shape[1] - length // 2):]
        new = min(left, length - context.shape[1])
        known = torch.arange(length, device=x.device).expand(x.shape[0], -1) < context.shape[1]
        window = SAMPLERS[sampler](denoise, F.pad(context, (0, length - context.shape[1])), known, mask_id, generator, **options)
        x = torch.cat([x, window[:, context.shape[1]:context.shape[1] + new]], 1)
    return x
