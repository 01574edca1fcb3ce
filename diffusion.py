"""Text diffusion, masked (absorbing) and Gaussian (on embeddings): noise, objectives, bounds, samplers.

B batch, T time, V vocabulary, C channels, D numbers in a latent; t in (0, 1] is the noise level, m(t) the
share of tokens masked at t, m(1) = 1. A network is any callable (ids (B,T), lengths=None, state=None,
finished_text=False, block_states=None, block_size=None, targets=None) that returns an object with `logits`
(B,T,V) and `state`, such as model.Denoiser; only block diffusion uses four of these. With targets it may
give `nats` (B,T), their cross-entropies, in place of logits. Gaussian diffusion calls it as
(x_t (B,T,C), t (B,T), x0_guess=estimate or None, lengths=None) and reads `vector` (B,T,C) or `logits`.
Randomness is passed in."""
import functools
import math
from dataclasses import dataclass, fields, replace
from typing import Callable, NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

@dataclass
class DiffusionConfig:
    objective: str = ""             # how it is trained; empty = task for a task, masked_mean for text
    schedule: str = "linear"        # masking rate m(t); gaussian: in training the share t of the noise levels
    mask_policy: str = "independent"  # which tokens are masked (gaussian: noised) together in training
    block_sizes: tuple = (4, 16, 0, 0)  # [0, 1e7] mixture: each row draws its blocks' size; 0 = the whole row
    next_weight: float = 0.0        # [0, 1e6] block, mixture: of next tokens' loss, where clean text is read
    mask_span: int = 8              # [1, 1e7] mask_policy=spans: mean length of a run, tokens
    beta_schedule: str = "cosine"   # gaussian: the share of signal abar(t)
    noise_spread: float = 0.0       # [0, 1e6] gaussian: a token is denoised in 1 / (1 + spread) of the time
    token_evidence: bool = False    # gaussian: what x_t alone tells of its token joins input and logits
    noise_shift: float = 6.0        # (0, 1e6] gaussian: factor on the noise's amplitude against the signal's
    likelihood: str = "bound"       # evaluation: also (order) the exact one in fixed orders of unmasking
    answer_steps: int = 1           # [0, 1e7] a task's answer: network calls, surest first; 0 = one per token
    diffusion_steps: int = 1000     # [0, 1e9] gaussian: t has so many values; 0 = it is continuous
    prediction_type: str = "x0"     # gaussian: what the network predicts
    diffusion_mode: str = "mixed"   # gaussian: diffusion = MSE; tokens = cross-entropy; mixed = both
    token_loss_weight: float = 1.0  # [0, 1e6] gaussian: of the predicted x_0's cross-entropy
    drop_given: float = 0.1         # [0, 1] gaussian, latents: rows without their condition, for guidance
    noise_levels: tuple = (1.0,)    # (0, 1] gaussian: largest t, as 0.4,0.7,1: each equally long
    latent_noise_shift: float = 1.0  # (0, 1e6] latents: as noise_shift; the rest is as for gaussian
    text_loss_weight: float = 1.0   # [0, 1e6] latents: of the text's cross-entropy
    latent_loss_weight: float = 1.0  # [0, 1e6] latents: of the latent's MSE
    sequential_schedule: str = "stage1_coupling:2,l2t:1,t2l:1"  # sequential: MODE:STEPS, over and over
    mode_weights: tuple = (1.0,)    # [0, 1e6] ... factors on their losses, as 1,1,0.5; one = for all
    kl_weight: float = 1.0          # [0, 1e6] stage2_variational: of the KL; 1 = the bound
    kl_warmup: int = 0              # [0, 1e12] ... steps over which it rises from 0
    free_bits: float = 0.5          # [0, 1e6] ... nats of KL per text that each dimension has for nothing
    geom_weight: float = 0.0        # [0, 1e6] ... distances between latents should follow those between texts

def trained_with(config):
    """The DiffusionConfig in a checkpoint's settings, a dict that holds others, too, and may lack newer keys.
    """
    return DiffusionConfig(**{f.name: config[f.name] for f in fields(DiffusionConfig) if f.name in config})

# ---- masking rates: t -> (m(t), m'(t)), with m(0) = 0 and m(1) = 1 ----

def linear(t):
    """m(t) = t (MDLM, arXiv 2406.07524, the log-linear schedule)."""
    return t, torch.ones_like(t)

def cosine(t):
    """m(t) = 1 - cos(pi t / 2) (Nichol & Dhariwal 2021, as a masking rate): few masks for small t."""
    return 1 - torch.cos(math.pi / 2 * t), math.pi / 2 * torch.sin(math.pi / 2 * t)

def bell(t, mean=0.4, deviation=0.2):
    """The quantiles of a normal distribution cut off at 0 and 1: most rates near `mean` (as in arXiv
    2605.13026)."""
    lo, hi = torch.special.ndtr((torch.tensor([0.0, 1.0], device=t.device).double() - mean) / deviation)
    z = torch.special.ndtri(lo + t.double() * (hi - lo))
    slope = deviation * (hi - lo) * math.sqrt(2 * math.pi) * (z**2 / 2).exp()
    return (mean + deviation * z).clamp(0, 1).to(t.dtype), slope.to(t.dtype)

def sigmoid(t, width=3.0):
    """m(t) = a sigmoid between -width and width, rescaled to run from 0 to 1 (Jabri et al. 2023)."""
    s = torch.sigmoid(width * (2 * t - 1))
    lo, hi = torch.sigmoid(t.new_tensor(-width)), torch.sigmoid(t.new_tensor(width))
    return (s - lo) / (hi - lo), 2 * width * s * (1 - s) / (hi - lo)

SCHEDULES = {"linear": linear, "cosine": cosine, "sigmoid": sigmoid, "bell": bell}

# ---- which tokens of a row are masked together: (u (B,T) uniform, maskable (B,T), span) -> u (B,T) ----

def independent(u, maskable, span):
    """Each token by itself: the forward process that the bounds are about."""
    return u

def spans(u, maskable, span):
    """Runs of `span` tokens on average share their fate, as in a text with holes (SpanBERT, arXiv
    1907.10529).

    Each token is still masked with probability m(t): whether a run begins is told by a uniform number of its
    own."""
    begins = second_uniform(u) < 1 / span
    begins[:, 0] = True
    first = torch.where(begins, torch.arange(u.shape[1]), 0).cummax(1).values
    return u.gather(1, first)

def suffix(u, maskable, span):
    """The last m(t) of each row: what a text needs that goes on from a prompt."""
    rank = maskable.long().cumsum(1)
    return 1 - (rank - u[:, :1]) / rank[:, -1:].clamp_min(1)

MASK_POLICIES = {"independent": independent, "spans": spans, "suffix": suffix}

def second_uniform(u):
    """Uniform numbers that do not depend on the uniform numbers u: their lower digits."""
    return u * 4096 % 1

def mask_tokens(x, masked, mask_id):
    """x (B,T) ids, masked (B,T) bool -> x with mask_id where masked."""
    return x.masked_fill(masked, mask_id)

# ---- what a step of training gets ----

class Batch(NamedTuple):
    """Noised rows, B of T tokens; None where there is no such thing."""
    x: Tensor                          # (B,T) ids, without noise
    masked: Tensor                     # (B,T) bool, what the loss is about
    weight: Tensor                     # (B,T) of the cross-entropies; Gaussian diffusion: noise levels
    lengths: Optional[Tensor] = None   # (B,) real tokens, None where all rows are full
    eps: Optional[Tensor] = None       # (B,T,C) normal noise for embeddings
    z: Optional[Tensor] = None         # (B,D) latents, rows of zeros for none
    s: Optional[Tensor] = None         # (B,) their noise levels
    z_eps: Optional[Tensor] = None     # (B,D) normal noise for them
    block: Optional[Tensor] = None     # (B,) tokens in a block, for objective=mixture
    learned: Optional[Tensor] = None   # (B,T) bool, tokens that next-token losses are about

    def each(self, f):
        """f of every tensor that there is."""
        return Batch(*(None if z is None else f(z) for z in self))

    def to(self, device):
        return self.each(lambda z: z.to(device, non_blocking=True))

def split(n, *tensors):
    """Tensors that belong together, or None, -> tuples of n rows of each."""
    count = next(-(-len(z) // n) for z in tensors if z is not None)
    return zip(*([None] * count if z is None else z.split(n) for z in tensors))

def stratified(n, generator):
    """n noise levels in (0, 1], one in each n-th of the interval (low discrepancy: VDM, arXiv 2107.00630,
    app. I)."""
    return 1 - (torch.rand((), generator=generator) + torch.arange(n)) / n % 1

class Draw:
    """The random numbers of one step for rows lo..hi of the global batch of B rows of T tokens.

    They are drawn for all B rows, so that a row's noise does not depend on which process has it."""

    def __init__(self, generator, B, lo, hi, T):
        self.generator, self.B, self.mine, self.T = generator, B, slice(lo, hi), T

    def levels(self):
        """(hi-lo,) noise levels, stratified over the global batch."""
        return stratified(self.B, self.generator)[self.mine]

    def shuffled_levels(self):
        """The same in random order: independent of what `levels` gave."""
        levels = stratified(self.B, self.generator)
        return levels[torch.randperm(self.B, generator=self.generator)][self.mine]

    def uniform(self, columns):
        """(hi-lo, columns): rows that have been cut see the numbers that they would have seen whole."""
        return torch.rand(self.B, self.T, generator=self.generator)[self.mine, :columns]

    def normal(self, columns, channels):
        """(hi-lo, columns, channels)."""
        return torch.randn(self.B, self.T, channels, generator=self.generator)[self.mine, :columns]

    def normal_latent(self, dimensions):
        """(hi-lo, dimensions)."""
        return torch.randn(self.B, dimensions, generator=self.generator)[self.mine]

# ---- likelihood bounds: random masks whose weighted cross-entropies add up to the bound ----

def exact_count(maskable, generator):
    """Masks (B,T) among the n tokens of each row that are `maskable` (B,T), and the weights that make a sum
    of cross-entropies an unbiased estimate of the bound on -log p of these n tokens, divided by n.

    Draws the number of masked tokens k uniformly from 1..n (stratified over the rows), masks k of them at
    random, and takes the mean over those k (LLaDA, arXiv 2502.09992, eq. 14): equal in expectation to the
    integral over t of the ELBO under every schedule, with far less variance than random mask rates."""
    levels = stratified(len(maskable), generator)
    levels = levels[torch.randperm(len(levels), generator=generator)]      # each row can get each level
    k = (levels * maskable.sum(1)).ceil().clamp(min=1)
    order = torch.rand(maskable.shape, generator=generator).masked_fill(~maskable, 2)
    masked = maskable & (order.argsort(1).argsort(1) < k[:, None])
    return masked, masked / k[:, None]

# In which order are tokens revealed? (log p (B,T,V), u (B,T) uniform, drawn once) -> (B,T), highest first.
ORDERS = {"confidence": lambda logp, u: logp.amax(-1),
          "left_to_right": lambda logp, u: -torch.arange(u.shape[1]).to(u).expand_as(u),
          "random": lambda logp, u: u}

def relabelled(metrics, label):
    """What metrics say of bits, {"bits_per_char": ..., "bits_per_char_se": ...}, with a label each."""
    found = {}
    for key, value in metrics.items():
        if key.startswith("bits_per"):
            name = key.removesuffix("_se")
            found[f"{name}_{label}{key.removeprefix(name)}"] = value
    return found

NONE = -1       # a target that nothing is asked of

def asked(x, where):
    """The targets (B,T): x where it is asked for, NONE elsewhere."""
    return x.masked_fill(~where, NONE)

def token_nats(out, targets):
    """The cross-entropies (B,T) of targets (B,T), 0 where they are NONE, by what a network gave."""
    if getattr(out, "nats", None) is not None:
        return out.nats
    logits, ids = out.logits.flatten(0, 1), targets.flatten()
    return F.cross_entropy(logits, ids, ignore_index=NONE, reduction="none").view_as(targets)

class Predicted(NamedTuple):
    """What is predicted for rows (B,T): one of the two."""
    logits: Optional[Tensor] = None    # (B,T,V)
    nats: Optional[Tensor] = None      # (B,T), of targets

# ---- objectives ----

class Objective:
    """One way to train and to use a network. A new one: a subclass and its row in OBJECTIVES.

    cfg: DiffusionConfig; net_cfg: the network's ModelConfig; steps: of the whole training, for schedules."""
    defaults = {}            # of other settings, where the user gives none
    sources = ("text", "task")  # kinds of data that it can learn from
    sampler = "confidence"   # the row of SAMPLERS that is used unless another one is asked for
    modes = ()               # what sample.py can do with latents, the default first ...
    latent_sampler = "first_hitting"    # ... and by which sampler
    terms = ()               # names of the loss terms, each with a denominator of its own; none: a number
    gaussian = False         # is noise put on embeddings?
    latents = False          # does it learn texts together with latents?
    causal = False           # is it for networks that see only what is before?
    uses_all = True          # does every step use every parameter? (DistributedDataParallel must know)
    soft = False             # can it use a network that takes an estimate from before (self_cond)?
    ordered = False          # can its likelihood be taken in an order of unmasking?

    def __init__(self, cfg, net_cfg, steps=1):
        self.cfg, self.net_cfg, self.steps, self.mask_id = cfg, net_cfg, steps, net_cfg.vocab_size
        self.start_id = self.mask_id if net_cfg.start_token < 0 else net_cfg.start_token

    # -- what it asks for, and refuses --

    @classmethod
    def check_source(cls, name, kind, path):
        """ValueError where data of this kind (task, text, pairs: texts with latents) cannot be learned so."""
        if kind in cls.sources:
            return
        if kind == "task":
            raise ValueError(f"objective={name} is for text: a task has its own, leave objective out")
        others = ", ".join(key for key, row in OBJECTIVES.items() if "pairs" in row.sources)
        path = path or "empty"
        raise ValueError(f"objective={name} is not for data_path={path}: texts with latents (python data.py "
                         f"latents --out=FOLDER) go with {others}, plain text with the others")

    @classmethod
    def added(cls, was, asked, name, start):
        """The keys of ModelConfig that this objective sets anew in a network whose checkpoint has the config
        `was`, a dict, empty for a fresh start. asked: the ModelConfig wanted; start: what the run starts
        from. ValueError where it cannot."""
        return ()

    def check(self, direction):
        """ValueError where it would measure nothing meaningful on this network, which runs in that direction.
        """
        name, net = self.cfg.objective, self.net_cfg
        if self.gaussian != net.gaussian:
            raise ValueError(f"objective={name} needs a network with gaussian={int(self.gaussian)}: leave "
                             "gaussian out, or start with --init_from=scratch")
        if net.self_cond and not self.soft:
            raise ValueError(f"self_cond=1 is not for objective={name}: leave self_cond out")
        if self.cfg.likelihood == "order" and not self.ordered:
            raise ValueError(f"likelihood=order is for masked text, objective={name} unmasks nothing step by "
                             "step: leave likelihood out")
        if net.predict == "next" and (self.causal or self.gaussian):
            raise ValueError(f"predict=next is not for objective={name}, which says itself what is predicted "
                             "where: leave predict out")
        if net.latent_dim and "pairs" not in self.sources:
            raise ValueError(f"latent_dim={net.latent_dim} is not for objective={name}, which knows no "
                             "latents: leave latent_dim out")
        if self.causal and (direction != "causal" or net.dw_jrt):
            raise ValueError(f"objective={name} needs a network that sees only what is before: "
                             "--direction=causal and --dw_jrt=0")

    @staticmethod
    def prepare(net, source):
        """A new network takes from the data the mean and the scale of the training latents, if there are any
        -> net."""
        if net.cfg.latent_dim and source.latent_dim:
            mean, std = source.moments()
            net.latent_prefix.mean.copy_(mean)
            net.latent_prefix.std.copy_(std)
        return net

    def with_masks(self, rows):
        """Rows with the mask where the data has -1: a place after the end of a text."""
        return rows._replace(x=rows.x.masked_fill(rows.x < 0, self.mask_id))

    # -- training --

    def noise(self, rows, draw, step):
        """rows: data.Rows; draw: Draw -> a Batch, and the denominators of the loss terms, a tensor (terms,)
        or ().

        A loss is a sum divided by its denominator, which is summed over the whole global batch: so it is the
        same however the batch is cut into micro-batches and processes."""
        raise NotImplementedError

    def loss(self, net, batch, step):
        """-> the sums over the batch, (terms,) or ()."""
        raise NotImplementedError

    def policy(self, u, maskable):
        """u (B,T) uniform -> (B,T), alike where mask_policy noises tokens together; the lowest first."""
        return MASK_POLICIES[self.cfg.mask_policy](u, maskable, self.cfg.mask_span)

    def unused(self, step):
        """A regular expression: the parameters that this step does not use, which are frozen meanwhile; ""
        for none."""
        return ""

    def describe(self, step):
        """What the log says of this step."""
        return {}

    # -- evaluation and sampling --

    def evaluate(self, net, source, rows, generator, size):
        """rows: held-out data.Rows, `size` at a time -> {"val_loss": nats, ...}, and (target, masked,
        predicted) to show, each (T,). Called without gradients."""
        raise NotImplementedError

    def fits(self, sampler):
        """Can that row of SAMPLERS be used with a network trained so?"""
        return sampler != "ar" and sampler not in GAUSSIAN_STEPS

    def fits_latent(self, sampler):
        """The same for texts with latents."""
        return sampler in DECISIONS

    def fill(self, net, x, known, generator, sampler="", **options):
        """x (B,T) -> x with what is not known (B,T) sampled. options: those of the samplers, and guidance."""
        raise NotImplementedError

class Masked(Objective):
    """Mean cross-entropy over the masked tokens, every mask rate. Not a bound."""
    sources = ("text", "task", "chat")
    layout = "block"         # how its samplers lay out a block, see `block`
    ordered = soft = True

    def noise(self, rows, draw, step):
        rows, t, u = self.with_masks(rows), draw.levels(), draw.uniform(rows.x.shape[1])
        masked, weight, total = self.mask(rows.maskable, t, u)
        return Batch(rows.x, masked, torch.as_tensor(weight).expand(masked.shape), rows.lengths), total

    def mask(self, maskable, t, u):
        """maskable (B,T), t (B,) levels, u (B,T) uniform -> masked (B,T), the weight of each cross-entropy,
        the denominator."""
        masked = maskable & (self.policy(u, maskable) < SCHEDULES[self.cfg.schedule](t)[0][:, None])
        return masked, 1.0, masked.sum()

    def through(self, net, x, masked, lengths=None, soft=True, **options):
        """The network on x (B,T) with masks -> what each masked token is predicted with, an object with
        logits, or with nats, if there are targets (B,T) among the options. Here the whole row is seen."""
        return self.predict(net, mask_tokens(x, masked, self.mask_id), soft, lengths=lengths, **options)

    def nats(self, net, x, masked, lengths=None, soft=True):
        """-> (B,T), the cross-entropy of each masked token, 0 for the others."""
        targets = asked(x, masked)
        return token_nats(self.through(net, x, masked, lengths, soft, targets=targets), targets)

    def predict(self, net, x, soft=True, **options):
        """-> the Output for x (B,T). A network with soft masks sees in them what a first pass predicts."""
        if soft and self.net_cfg.self_cond:
            with torch.no_grad():
                options["x0_guess"] = net(x, **options | {"targets": None}).logits
        return net(x, **options)

    def loss(self, net, batch, step=0):
        """The sum over the masked tokens of weight * cross-entropy, nats."""
        soft = step % 2                                    # it must know plain masks, too
        return (self.nats(net, batch.x, batch.masked, batch.lengths, soft) * batch.weight).sum()

    def bound(self, net, x, generator=None, maskable=None, lengths=None):
        """Rows x (B,T) of `lengths` tokens (B,), None if full -> an upper bound on -log p of the `maskable`
        (B,T) ones, None for all, given the others, (B,) nats per token."""
        maskable = torch.ones_like(x, dtype=torch.bool) if maskable is None else maskable
        masked, weight = (z.to(x.device) for z in self.counted(maskable.cpu(), generator))
        return (self.nats(net, x, masked, lengths) * weight).sum(1)

    def counted(self, maskable, generator):
        """-> the masks of the bound and their weights, (B,T)."""
        return exact_count(maskable, generator)

    def in_order(self, net, x, rule, generator, maskable=None, lengths=None):
        """As bound, but -log p itself, where one token of each block is revealed at a time, next the one that
        a row of ORDERS says: exact for a sampler of that order (DUEL, arXiv 2603.01367). And whether each row
        is what that sampler gives at temperature 0, (B,) bool."""
        (B, T), n = x.shape, self.block_length(x.shape[1])
        rows = lambda z, fill: F.pad(z, (0, -T % n), value=fill).view(-1, n)
        masked = torch.ones_like(x, dtype=torch.bool) if maskable is None else maskable.clone()
        u, count = torch.rand(B, T, generator=generator).to(x.device), masked.sum(1)
        one, nats = x.new_ones(B * -(-T // n)), x.new_zeros(B, dtype=torch.float64)
        greedy = x.new_ones(B, dtype=torch.bool)
        while masked.any():
            logp = self.through(net, x, masked, lengths).logits.log_softmax(-1)
            fresh = best(rows(ORDERS[rule](logp, u), -math.inf), rows(masked, False), one)
            fresh = fresh.view(B, -1)[:, :T] & masked
            nats -= (logp.gather(-1, x.unsqueeze(-1)).squeeze(-1) * fresh).sum(1)
            greedy &= ((logp.argmax(-1) == x) | ~fresh).all(1)
            masked &= ~fresh
        return nats / count, greedy

    def block_length(self, T):
        """So many of a row's T tokens are denoised together."""
        return T

    def evaluate(self, net, source, rows, generator, size):
        if source.kind == "task":
            return self.evaluate_answers(net, source, rows, generator, size)
        x, maskable, lengths, _ = self.with_masks(rows)
        parts = lambda: split(size, x, maskable, lengths)
        share = lambda mine: mine.sum(1) * (len(x) / maskable.sum())       # rows count by their tokens
        metrics = source.report(self.bound(net, a, generator, m, n) * share(m) for a, m, n in parts())
        for rule in ORDERS if self.cfg.likelihood == "order" else ():
            nats = (self.in_order(net, a, rule, generator, m, n)[0] * share(m) for a, m, n in parts())
            metrics |= relabelled(source.report(nats, f"likelihood, {rule}"), rule)
        masked = (torch.rand(x[0].shape, generator=generator) < 0.3).to(x.device) & maskable[0]
        one = None if lengths is None else lengths[:1]
        filled = self.predict(net, mask_tokens(x[:1], masked, self.mask_id), False, lengths=one)
        return metrics, (x[0], masked, torch.where(masked, filled.logits[0].argmax(-1), x[0]))

    def evaluate_answers(self, net, source, rows, generator, size):
        """A task's answers: loss with all of a row's answer masked; accuracy, exact match of the likeliest
        tokens, in answer_steps network calls."""
        x, masked, lengths, _ = rows
        logits = torch.cat([self.through(net, *part).logits for part in split(size, x, masked, lengths)])
        predicted = torch.where(masked, logits.argmax(-1), x)
        if self.cfg.answer_steps != 1:
            options = dict(steps=self.cfg.answer_steps, temperature=0.0)
            predicted = torch.cat([self.fill(functools.partial(net, lengths=n), a, ~m, generator, **options)
                                   for a, m, n in split(size, x, masked, lengths)])
        loss = F.cross_entropy(logits[masked], x[masked]).item()
        return {"val_loss": loss, **source.score(x, predicted, masked)}, (x[0], masked[0], predicted[0])

    def fill(self, net, x, known, generator, sampler="", guidance=1.0, block_size=0, eot=None, context=None,
             **options):
        """block_size: 0 = as trained; eot: the id after which a row gets nothing else, and a Context, for
        samplers that go on from a state."""
        name = sampler or self.sampler
        if name in STATEFUL and guidance != 1:
            raise ValueError(f"guidance={guidance:g} is for whole sequences, sampler={name} goes on from a "
                             "state: leave it at 1")
        if name in STATEFUL:
            options |= dict(eot=eot, context=context or Context(start=self.start_id))
        if name == "block":
            n = block_size or self.net_cfg.block_size
            net = functools.partial(net, block_size=n)
            options |= dict(block_size=n, layout=self.layout)
        options["soft"] = self.soft and self.net_cfg.self_cond and guidance == 1
        net = guided(net, known, self.mask_id, guidance)
        return SAMPLERS[name](net, x, known, self.mask_id, generator, **options)

class Elbo(Masked):
    """MDLM's bound (arXiv 2406.07524, eq. 10), nats per token: cross-entropy weighted by m'(t) / m(t)."""

    def mask(self, maskable, t, u):
        rate, slope = SCHEDULES[self.cfg.schedule](t.view(len(t), -1))         # t may be (B,T), too
        return maskable & (self.policy(u, maskable) < rate), slope / rate, maskable.sum()

class Task(Masked):
    """All maskable tokens are masked, mean cross-entropy: a task's answer in one step."""
    ordered = False

    def mask(self, maskable, t, u):
        return maskable, 1.0, maskable.sum()

class NextToken(Task):
    """Autoregressive: each token from those before it, for causal networks. Its bound is exact."""
    sources, sampler, causal, soft = ("text", "chat"), "ar", True, False

    def fits(self, sampler):
        return sampler == "ar"

    def through(self, net, x, masked, lengths=None, soft=False, **options):
        """What stands before a text, then all tokens but the last."""
        return read_on(net)(F.pad(x[:, :-1], (1, 0), value=self.start_id), lengths=lengths, **options)

    def counted(self, maskable, generator):
        """All: the bound is -log p itself."""
        return maskable, maskable / maskable.sum(1, keepdim=True)

class Blocks(Masked):
    """Block diffusion whose training state is its inference state (BD3-LM, arXiv 2503.09573). Mean
    cross-entropy: the bound's weights 1 / t let single tokens rule a step's gradient, and what is trained so
    has the worse bound."""
    sources, sampler, terms = ("text", "chat"), "block", ("masked", "next")
    defaults = {"dw_jrt_inject": "gate",       # the form of DW-JRT that keeps the state which crosses blocks
                "next_weight": 0.5}

    def check(self, direction):
        super().check(direction)
        if self.cfg.mask_policy == "suffix":
            raise ValueError("mask_policy=suffix masks the end of a whole row, "
                             f"objective={self.cfg.objective} masks in each block: choose spans or "
                             "independent")

    def block_length(self, T):
        return min(T, self.net_cfg.block_size)

    def levels(self, t, T):
        """t (B,) -> (B,T), a level for each block; a tenth of the blocks is fully masked, as all are when
        their denoising starts."""
        n = self.block_length(T)
        golden = torch.arange(-(-T // n), dtype=torch.float64) * (5**0.5 - 1) / 2
        u = ((t[:, None] + golden) % 1).float()            # well spread over a row's blocks, too
        t = torch.where(u > 0.9, 1.0, 1 - u / 0.9 * (1 - 1e-3))
        return t.repeat_interleave(n, 1)[:, :T]

    def mask(self, maskable, t, u):
        rate = SCHEDULES[self.cfg.schedule](self.levels(t, maskable.shape[1]))[0]
        masked = maskable & (self.policy(u, maskable) < rate)
        if self.net_cfg.block_size == 1:                   # a token alone teaches nothing unless it is masked
            masked = maskable
        return masked, 1.0, masked.sum()

    def through(self, net, x, masked, lengths=None, soft=True, targets=None):
        """Every block given the clean blocks before it.

        One clean pass gives the state at each block's start; all noisy blocks then go on from there at once,
        as B * ceil(T / n) short rows. A block sees exactly what it sees when a text is generated block by
        block."""
        return self.passes(net, x, masked, lengths, soft, targets)[0]

    def passes(self, net, x, masked, lengths=None, soft=True, targets=None, following=None):
        """-> what `through` gives, and the Output of the clean pass, with targets `following`; None where the
        row is one block."""
        (B, T), n = x.shape, self.net_cfg.block_size
        noisy = mask_tokens(x, masked, self.mask_id)
        if n >= T:
            return self.predict(net, noisy, soft, lengths=lengths, block_size=n, targets=targets), None
        clean = net(x, block_states=n, targets=x[:, :0] if following is None else following)
        rows = lambda z, fill: z if z is None else F.pad(z, (0, -T % n), value=fill).view(-1, n)
        if lengths is None and T % n:
            lengths = x.new_full((B,), T)
        if lengths is not None:                            # a block of padding alone is one token, unused
            begins = torch.arange(0, T, n, device=x.device)
            lengths = (lengths[:, None] - begins).clamp(1, n).flatten()
        out = self.predict(net, rows(noisy, self.mask_id), soft, state=clean.state, lengths=lengths,
                           block_size=n, targets=rows(targets, NONE))
        joined = lambda z: z if z is None else z.unflatten(0, (B, -1)).flatten(1, 2)[:, :T]
        return Predicted(joined(out.logits), joined(getattr(out, "nats", None))), clean

    def noise(self, rows, draw, step):
        batch, total = super().noise(rows, draw, step)
        return batch._replace(learned=rows.maskable), torch.stack([total, self.followers(rows.maskable)])

    def followers(self, learned):
        """How many tokens are predicted from the one before."""
        return learned[:, 1:].sum() * (self.cfg.next_weight > 0)

    def loss(self, net, batch, step=0):
        targets, following = asked(batch.x, batch.masked), self.following(batch)
        out, clean = self.passes(net, batch.x, batch.masked, batch.lengths, step % 2, targets, following)
        nats = (token_nats(out, targets) * batch.weight).sum()
        return torch.stack([nats, self.next_nats(net, batch, following, clean)])

    def following(self, batch):
        """The targets (B,T) of next-token losses; None: there are none."""
        if not self.cfg.next_weight:
            return None
        return F.pad(asked(batch.x, batch.learned)[:, 1:], (0, 1), value=NONE)

    def next_nats(self, net, batch, following, clean=None):
        """next_weight times the sum of the cross-entropies of `following` (B,T), each predicted where the
        token before it is read: two-way RWKV-7 has these predictions from its clean pass."""
        if following is None:
            return batch.x.new_zeros((), dtype=torch.float32)
        if clean is None or not net.reads_causally:
            clean = read_on(net)(batch.x, lengths=batch.lengths, targets=following)
        return self.cfg.next_weight * token_nats(clean, following).sum()

    def counted(self, maskable, generator):
        """The sum of the blocks' own bounds; with blocks of one token it is -log p(x) / T itself."""
        (B, T), n = maskable.shape, self.block_length(maskable.shape[1])
        blocks = F.pad(maskable, (0, -T % n)).view(-1, n)
        masked, weight = exact_count(blocks, generator)
        masked, weight = (z.view(B, -1)[:, :T] for z in (masked, weight * blocks.sum(1, keepdim=True)))
        return masked, weight / maskable.sum(1, keepdim=True)

class BlockElbo(Blocks):
    """The bound of each block given those before it (BD3-LM, arXiv 2503.09573, eq. 8)."""
    defaults = {"dw_jrt_inject": "gate"}

    def mask(self, maskable, t, u):
        return Elbo.mask(self, maskable, self.levels(t, maskable.shape[1]), u)

class Mixture(Blocks):
    """One network for every mode: each row draws the size of its blocks, which may be the whole row
    (BlockGen, arXiv 2606.02241), and every row also learns the next token, as a clean text (next_weight).
    With each size it is measured and sampled as Blocks of that size, with size 1 as NextToken."""
    defaults, uses_all = Blocks.defaults | {"direction": "block", "next_weight": 1.5}, False

    def __init__(self, cfg, net_cfg, steps=1):
        super().__init__(cfg, net_cfg, steps)
        sized = {n: replace(net_cfg, block_size=n or 10**7) for n in (1, *cfg.block_sizes)}
        self.parts = {n: (NextToken if n == 1 else Blocks)(cfg, mine, steps) for n, mine in sized.items()}

    def check(self, direction):
        super().check(direction)
        if 1 in self.cfg.block_sizes and not self.cfg.next_weight:
            raise ValueError("block_sizes with a 1 need next_weight > 0, from which rows of size 1 learn: "
                             "leave the 1 or next_weight out")

    def noise(self, rows, draw, step):
        rows, t, u = self.with_masks(rows), draw.levels(), draw.uniform(rows.x.shape[1])
        sizes = torch.tensor(self.cfg.block_sizes)         # in turn: so each has stratified levels, too
        block = sizes[(torch.arange(draw.B)[draw.mine] + step) % len(sizes)]
        masked = torch.zeros_like(rows.maskable)
        for n in set(self.cfg.block_sizes) - {1}:
            mine = block == n
            masked[mine] = self.parts[n].mask(rows.maskable[mine], t[mine], u[mine])[0]
        more = dict(block=block, learned=rows.maskable)
        batch = Batch(rows.x, masked, torch.ones(masked.shape), rows.lengths, **more)
        return batch, torch.stack([masked.sum(), self.followers(rows.maskable)])

    def loss(self, net, batch, step=0):
        none, terms = batch.x.new_zeros((), dtype=torch.float32), []
        present = set(batch.block.tolist())
        for n in filter(present.__contains__, self.parts):
            rows = batch.each(lambda z: z[batch.block == n])
            if n == 1:
                terms.append(torch.stack([none, self.next_nats(net, rows, self.following(rows))]))
            else:
                terms.append(self.parts[n].loss(net, rows, step))
        return sum(terms)

    def evaluate(self, net, source, rows, generator, size):
        """The bits of each block size, as those of objective=block; val_loss: their mean."""
        losses, found = [], {}
        for n, part in self.parts.items():
            metrics, sample = part.evaluate(net, source, rows, generator, size)
            losses.append(metrics["val_loss"])
            found |= relabelled(metrics, f"block_{n or 'all'}")
        return {"val_loss": sum(losses) / len(losses), **found}, sample

    def fits(self, sampler):
        return sampler == "ar" or super().fits(sampler)

    def fill(self, net, x, known, generator, sampler="", block_size=0, **options):
        """block: of block_size, 0 = the largest trained; confidence and others: the row as one block."""
        name, n = sampler or self.sampler, block_size or max(self.cfg.block_sizes) or x.shape[1]
        if name not in STATEFUL:
            net = functools.partial(net, block_size=x.shape[1])
        return super().fill(net, x, known, generator, name, block_size=n, **options)

class B3D(Blocks):
    """Blocks from one causal stream [masked][masked][clean] per block, read at the second copy (B3D-RWKV,
    arXiv 2605.25969); here the state that a block starts from has seen the masked copies before it as well.
    For causal networks."""
    sources, causal, defaults, layout, terms, soft = ("text",), True, {}, "b3d", (), False
    noise, loss = Masked.noise, Masked.loss

    def check(self, direction):
        super().check(direction)
        net = self.net_cfg
        if net.ffn_shift in ("both", "wide") or net.observed_first or net.read_twice:
            raise ValueError("objective=b3d is for networks that see nothing ahead, else masked tokens would "
                             "see the next clean ones: leave ffn_shift, observed_first, read_twice out")

    def through(self, net, x, masked, lengths=None, soft=False, targets=None):
        (B, T), n = x.shape, self.net_cfg.block_size
        blocks = lambda z, fill: F.pad(z, (0, -T % n), value=fill).view(B, -1, n)
        noisy = blocks(mask_tokens(x, masked, self.mask_id), self.mask_id)
        stream = torch.stack([noisy, noisy, blocks(x, self.mask_id)], 2)
        second = lambda z: z.unflatten(1, stream.shape[1:])[:, :, 1].flatten(1, 2)[:, :T]
        if targets is None:
            return Predicted(second(net(stream.flatten(1)).logits))
        unread = torch.full_like(noisy, NONE)
        read_at = torch.stack([unread, blocks(targets, NONE), unread], 2).flatten(1)
        return Predicted(nats=second(token_nats(net(stream.flatten(1), targets=read_at), read_at)))

# ---- Gaussian diffusion: x_t = sqrt(abar) x_0 + sqrt(1 - abar) eps, x_0 the normalised embeddings ----
# Schedules: t in [0, 1] -> abar(t), the share of signal left (of variance), abar(0) = 1; t may be continuous.

def linear_beta(t):
    """DDPM's beta from 1e-4 to 0.02 over 1000 steps (arXiv 2006.11239), in the limit of many: exp(-(0.1 t +
    9.95 t^2)) (arXiv 2011.13456)."""
    return torch.exp(-(0.1 * t + 9.95 * t**2))

def cosine_beta(t, s=0.008):
    """Nichol & Dhariwal (arXiv 2102.09672, eq. 17)."""
    return (torch.cos((t + s) / (1 + s) * math.pi / 2) / math.cos(s / (1 + s) * math.pi / 2)) ** 2

def sigmoid_beta(t, start=-3.0, end=3.0):
    """Jabri et al. (arXiv 2212.11972, algorithm 1)."""
    lo, hi = (1 / (1 + math.exp(-z)) for z in (start, end))
    return (hi - torch.sigmoid(t * (end - start) + start)) / (hi - lo)

def gumbel_beta(t):
    """Signal to noise -ln t: so the logarithm of noise to signal has a Gumbel distribution, as what the
    levels tell of tokens has (LangFlow; measured here by `level_fit`). noise_shift gives it its place."""
    return 1 / (1 - 1 / t.log())

BETA_SCHEDULES = {"linear": linear_beta, "cosine": cosine_beta, "sigmoid": sigmoid_beta,
                  "gumbel": gumbel_beta}

def abar(t, cfg):
    """t in [0, 1], any shape -> abar(t) in float64, at least 1e-9; t is rounded up to the next of
    cfg.diffusion_steps steps, if any. ValueError for t outside.

    With noise_shift the signal-to-noise ratio is divided by its square (simple diffusion, arXiv 2301.11093,
    section 2.1). An embedding of C channels can be told from V others in noise of sqrt(C / 2 ln V) times its
    amplitude: unshifted, most levels teach nothing."""
    if not bool(((t >= 0) & (t <= 1)).all()):
        raise ValueError(f"noise level t={t.min().item():.4g} ... {t.max().item():.4g} is not allowed: give "
                         "values in (0, 1]; 0 is for what is given")
    t = t.double()
    if cfg.diffusion_steps:
        t = (t * cfg.diffusion_steps - 1e-6).ceil().clamp_min(0) / cfg.diffusion_steps
    share = BETA_SCHEDULES[cfg.beta_schedule](t).clamp(1e-9, 1)
    return share / (share + (1 - share) * cfg.noise_shift**2)

LEAST = 0.03    # the level at which tokens are read off; below it nothing is learned but rare, large errors

def on_the_way(t):
    """Levels t -> bool: is the token not read off yet?"""
    return t > 1.01 * LEAST

def token_levels(t, u, cfg):
    """Levels t of rows, (B,1) or a number, u (B,T) uniform -> (B,T), each token's own level: it goes from 1
    to LEAST while t passes through 1 / (1 + noise_spread) of [0, 1], from a moment set by u.

    With 0 all tokens are denoised together; the larger, the more each is decided alone, its context either
    clean or unknown, as in masked diffusion. The bound holds for every such path."""
    return ((1 + cfg.noise_spread) * t - cfg.noise_spread * u).clamp(LEAST, 1)

def amplitudes(t, cfg):
    """t (B,T) -> sqrt(abar) and sqrt(1 - abar), each (B,T,1) float32."""
    share = abar(t, cfg).unsqueeze(-1)
    return share.sqrt().float(), (1 - share).sqrt().float()

class Prediction(NamedTuple):
    target: Callable      # (x_0, eps, a, s) -> what the network is to predict
    x0: Callable          # (prediction, x_t, a, s) -> x_0; a = sqrt(abar), s = sqrt(1 - abar)

PREDICTIONS = {
    "epsilon": Prediction(lambda x0, eps, a, s: eps, lambda p, x, a, s: (x - s * p) / a),
    "x0": Prediction(lambda x0, eps, a, s: x0, lambda p, x, a, s: p),
    # arXiv 2202.00512
    "v_prediction": Prediction(lambda x0, eps, a, s: a * eps - s * x0, lambda p, x, a, s: a * x - s * p)}
MODES = {"diffusion": (True, False), "mixed": (True, True), "tokens": (False, True)}     # MSE? cross-entropy?

def rounding(x0, table):
    """x_0 (...,C) -> logits (...,V) by scalar products. Embeddings have one length: the likeliest token is
    the nearest."""
    with torch.autocast(x0.device.type, enabled=False):
        return x0 @ table.T * table.shape[1] ** -0.5

class Estimate(NamedTuple):
    x0: Tensor            # (B,T,C)
    logits: Tensor        # (B,T,V)
    vector: Optional[Tensor]   # (B,T,C), the prediction itself; None for diffusion_mode=tokens
    a: Tensor             # its amplitudes
    s: Tensor
    guess: Tensor         # (B,T,C), what a second pass may know

def estimate(net, x_t, t, table, cfg, **options):
    """x_t (B,T,C) at levels t (B,T) -> an Estimate.

    The network gets a x_t, the best linear guess of x_0, so that what is all noise does not drown what is
    known (as EDM's c_in, arXiv 2206.00364, section 5). With token_evidence it gets the best guess of all from
    x_t alone, and log p(x_t | token), up to a constant, is added to its logits: it learns what context tells.
    With noise_spread, too, a token between noise and text is seen by none but its own evidence."""
    a, s = amplitudes(t, cfg)
    x_in, evidence = a * x_t, 0.0
    if cfg.token_evidence:
        with torch.autocast(x_t.device.type, enabled=False):
            evidence = a / s.square().clamp_min(1e-6) * (x_t @ table.T)        # embeddings have one length
            x_in = evidence.softmax(-1) @ table
    hidden = on_the_way(t) if cfg.token_evidence and cfg.noise_spread else None
    if hidden is not None:
        x_in, t = torch.where(hidden.unsqueeze(-1), table.mean(0), x_in), t.masked_fill(hidden, 1.0)
    out = net(x_in, t=t, **options)
    if not MODES[cfg.diffusion_mode][0]:
        context, logits = out.logits.float(), out.logits.float() + evidence
        with torch.autocast(logits.device.type, enabled=False):
            x0 = guess = logits.softmax(-1) @ table
            if hidden is not None:
                guess = torch.where(hidden.unsqueeze(-1), context.softmax(-1) @ table, x0)
        return Estimate(x0, logits, None, a, s, guess)
    vector = out.vector.float()
    x0 = PREDICTIONS[cfg.prediction_type].x0(vector, x_t, a, s)
    # Where a is nearly 0 an error in eps becomes a huge one in x_0: no longer than twice an embedding.
    x0 = x0 * (2 * table.shape[1] ** 0.5 / x0.norm(dim=-1, keepdim=True).clamp_min(1e-6)).clamp_max(1)
    return Estimate(x0, rounding(x0, table), vector, a, s, x0)

def refined(net, x_t, t, table, cfg, **options):
    """As estimate; with self_cond that of a first pass goes in, without a gradient (arXiv 2208.04202)."""
    if net.cfg.self_cond:
        with torch.no_grad():
            options["x0_guess"] = estimate(net, x_t, t, table, cfg, **options).guess
    return estimate(net, x_t, t, table, cfg, **options)

def embedded(x, t, eps, table, cfg):
    """Tokens x (B,T), levels t (B,T) with 0 for what is given -> x_0 and x_t, (B,T,C)."""
    x0 = F.embedding(x, table)
    a, s = amplitudes(t, cfg)
    return x0, a * x0 + s * eps

class Gaussian(Objective):
    """Noise on the embeddings; the loss is the MSE of the prediction (per channel) and token_loss_weight
    times the cross-entropy.

    What may not be masked is given without noise; in a text, where all may, a random share is given, which
    mask_policy chooses. A share drop_given of the rows is noised whole and has no latent, so that guidance
    has something to compare with."""
    defaults = dict(gaussian=True, direction="bidirectional", time_cond="adaln_zero", tie_embeddings=True)
    sources, modes, sampler, latent_sampler = ("text", "task", "pairs"), ("l2t",), "ddim", "ddim"
    gaussian, uses_all, soft = True, False, True

    def fits(self, sampler):
        return sampler in GAUSSIAN_STEPS

    fits_latent = fits

    def check(self, direction):
        super().check(direction)
        if direction == "block":
            raise ValueError(f"objective={self.cfg.objective} denoises whole rows: choose "
                             "--direction=bidirectional or causal")
        if self.cfg.token_evidence and self.cfg.diffusion_mode != "tokens":
            raise ValueError("token_evidence=1 is for an estimate by logits, "
                             f"diffusion_mode={self.cfg.diffusion_mode} predicts vectors: choose "
                             "diffusion_mode=tokens")

    def max_noise(self, step):
        """The largest noise level at a step: those of noise_levels for an equal share of the steps each."""
        tops = self.cfg.noise_levels
        return tops[min(len(tops) - 1, step * len(tops) // self.steps)]

    def noise(self, rows, draw, step):
        x, T, D = rows.x, rows.x.shape[1], self.net_cfg.latent_dim
        t, u = SCHEDULES[self.cfg.schedule](draw.levels())[0], draw.uniform(T)
        t = t.clamp_min(1e-3) * self.max_noise(step)
        eps = draw.normal(T, self.net_cfg.n_embd)
        masked, dropped = self.mask(rows.maskable, u)
        levels = t[:, None]
        if self.cfg.noise_spread:                          # who has arrived has nothing to learn
            levels = token_levels(levels, draw.uniform(T), self.cfg)
            masked = masked & on_the_way(levels)
        batch = Batch(x, masked, levels * (masked | dropped), rows.lengths, eps)
        if D:
            batch = batch._replace(z=latents_of(rows, D) * ~dropped)
        return batch, masked.sum()

    def mask(self, maskable, u):
        """maskable (B,T), u (B,T) uniform -> what the loss is about (B,T), which rows are noised whole (B,1).
        """
        dropped = second_uniform(u[:, :1]) < self.cfg.drop_given
        text = maskable.all(1, keepdim=True)
        noised = self.policy(u, maskable) < second_uniform(u[:, -1:])
        return maskable & (~text | dropped | noised), dropped

    def loss(self, net, batch, step=0):
        options = dict(lengths=batch.lengths)
        if batch.z is not None:
            options["latent"] = net.latent_prefix.normalise(batch.z)
        rule = refined if step % 2 else estimate           # it must do without an estimate, too
        terms = self.terms_per_token(rule, net, batch.x, batch.weight, batch.eps, **options)
        return sum(self.scale(name, terms) * term[batch.masked].sum() for name, term in terms.items())

    def scale(self, name, terms):
        """token_loss_weight for a cross-entropy that stands beside an MSE."""
        return self.cfg.token_loss_weight if name == "ce" and len(terms) > 1 else 1.0

    def terms_per_token(self, rule, net, x, t, eps, **options):
        """{"mse": (B,T), "ce": (B,T)}, those that diffusion_mode has. rule: refined or estimate; options:
        lengths, latent."""
        cfg, table = self.cfg, net.table()
        x0, x_t = embedded(x, t, eps, table, cfg)
        found = rule(net, x_t, t, table, cfg, **options)
        terms = {}
        if found.vector is not None:       # detached: else embeddings move to what is easily predicted
            target = PREDICTIONS[cfg.prediction_type].target(x0.detach(), eps, found.a, found.s)
            terms["mse"] = (found.vector - target).square().mean(-1)
        if MODES[cfg.diffusion_mode][1]:
            nats = F.cross_entropy(found.logits.flatten(0, 1), x.flatten(), reduction="none")
            terms["ce"] = nats.view_as(x)
        return terms

    def evaluate(self, net, source, rows, generator, size):
        """gaussian_report's numbers, of the first `size` rows of a text, and the bound of all; for a task
        accuracy and exact match of its answers by DDIM in 20 steps."""
        x, masked, lengths, _ = rows
        shown, task, latent, few = masked, source.kind == "task", {}, rows
        if not task:
            shown = (torch.rand(x.shape, generator=generator) < 0.3).to(x.device)
            few = type(rows)(*next(split(size, *rows)))
        if net.cfg.latent_dim:
            latent = dict(latent=clean_latent(net, latents_of(few, net.cfg.latent_dim)))
        metrics, alarm = gaussian_report(net, few.x, few.maskable, few.lengths, generator, self.cfg, **latent)
        if source.kind == "text":
            draws = 2 + round(self.cfg.noise_spread / 8)       # the fewer tokens a level is about, the more
            found = (self.bound(net, part, generator, draws) for part in x.split(size))
            bounds, gains, levels = zip(*found)
            metrics |= source.report(bounds) | level_fit(torch.cat(levels), torch.cat(gains))
        if not task:
            x, shown, lengths = x[:1], shown[:1], None if lengths is None else lengths[:1]
        options = dict(cfg=self.cfg, steps=noise_steps(self.cfg, default=20))
        options |= {key: z[:1] for key, z in latent.items()}
        predicted = torch.cat([SAMPLERS["ddim"](net, a, ~m, net.mask_id, generator, lengths=n, **options)
                               for a, m, n in split(size, x, shown, lengths)])
        if task:
            metrics |= source.score(x, predicted, masked)
        if alarm:
            metrics["alarm"] = alarm
        return metrics, (x[0], shown[0], predicted[0])

    def bound(self, net, x, generator, draws=2):
        """Full rows x (B,T) -> an upper bound on -log p(x) / T of each, (B,) nats per token; and of each of
        draws * B noise levels what it adds, and ln(noise / signal) there.

        The variational bound of as many steps as the network knows, else 1000 (VDM, arXiv 2107.00630, eq. 11
        to 15), noise_spread times more: the sum over steps from t to s of (SNR(s) - SNR(t)) / 2 |x_0 -
        estimate(x_t)|^2, of which `draws` are taken per row, stratified; x_1 against the normal distribution;
        and the tokens given x_t at the level LEAST."""
        cfg, table, B = self.cfg, net.table(), len(x)
        n, C = round((cfg.diffusion_steps or 1000) * (1 + cfg.noise_spread)), table.shape[1]
        share, u, x0 = abar(torch.ones(1), cfg), torch.rand(x.shape, generator=generator), table[x]
        prior = 0.5 * C * (-share - torch.log1p(-share) + share)                 # |x_0|^2 = C
        total, gains, levels = prior.repeat(B).to(x.device), [], []
        step = (stratified(draws * B, generator) * (n - 1)).ceil().clamp_min(1)
        step = step[torch.randperm(draws * B, generator=generator)].split(B)
        levels_at = lambda step: token_levels((step[:, None] + 1) / n, u, cfg)

        def noised(t):
            eps = torch.randn(x0.shape, generator=generator).to(x.device)
            return embedded(x, t.to(x.device), eps, table, cfg)[1], t.to(x.device)
        for at in step:
            t, before = levels_at(at), levels_at(at - 1)
            ratio, next_ratio = (share / (1 - share) for share in (abar(t, cfg), abar(before, cfg)))
            x_t, t = noised(t)
            error = (refined(net, x_t, t, table, cfg).x0 - x0).square().sum(-1)
            gains.append((n - 1) / 2 * (next_ratio - ratio).to(x.device) * error)
            levels.append(-ratio.log())
        x_t, t = noised(levels_at(torch.zeros(B)))
        a, s = amplitudes(t, cfg)
        logits = a / s.square() * (x_t @ table.T)          # any decoder is allowed; the network knows more
        if cfg.token_evidence:
            logits = estimate(net, x_t, t, table, cfg).logits
        total = total + token_nats(Predicted(logits), x).mean(1) + torch.stack(gains).mean((0, 2))
        return total, torch.cat(gains).cpu().flatten(), torch.cat(levels).flatten()

    def fill(self, net, x, known, generator, sampler="", **options):
        name = sampler or self.sampler
        return SAMPLERS[name](net, x, known, self.mask_id, generator, cfg=self.cfg, **options)

def level_fit(levels, gains):
    """ln(noise / signal) and what is learned there, (n,) each -> by moments the noise_shift with which
    beta_schedule=gumbel has its levels where most is learned, and that distribution's scale, where it has 1.
    """
    share = gains / gains.sum()
    mean = (share * levels).sum()
    scale = (share * (levels - mean).square()).sum().sqrt() * math.sqrt(6) / math.pi
    place = mean - 0.5772 * scale
    return {"fitted_noise_shift": (place / 2).exp().item(), "fitted_scale": scale.item()}

LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)

@torch.no_grad()
def gaussian_report(net, x, masked, lengths, generator, cfg, **latent):
    """What tells how embedding diffusion is doing, on rows x (B,T) noised where `masked` -> ({name: number},
    alarm or "").

    At each of LEVELS: each loss term; round_acc, the share of tokens that the estimated x_0 rounds to
    rightly; drift and cosine, the distance of x_0 to the nearest embedding (in embedding lengths) and the
    cosine with it. And the lengths of the raw embeddings and their largest mean cosine. val_loss is the mean
    over the levels. latent: latent=(B,D), normalised, to be given."""
    table, found, alarm, losses = net.table(), {}, "", []
    for level in LEVELS:
        numbers, token = at_level(net, x, masked, lengths, level, table, generator, cfg, **latent)
        found |= {f"{name}_{level}": value for name, value in numbers.items()}
        weight = cfg.token_loss_weight if "mse" in numbers else 1
        losses.append(numbers.get("mse", 0) + weight * numbers.get("ce", 0))
        most = token[masked].bincount().max().item() / masked.sum().item()
        common = x[masked].bincount().max().item() / masked.sum().item()
        if level <= 0.5 and most > 0.9 and common < 0.5:
            alarm = alarm or f"at noise level {level} one token takes {most:.0%} of what is rounded"
    similar = table @ table.T / table.shape[1]
    mean_cosine = (similar.sum() - len(table)) / max(1, len(table) * (len(table) - 1))
    length = net.emb.weight[:-1].norm(dim=-1)
    found |= {f"embedding_norm_{name}": getattr(length, name)().item() for name in ("min", "mean", "max")}
    found["embedding_mean_cosine"] = mean_cosine.item()
    if mean_cosine > 0.9:
        alarm = alarm or f"the embeddings have nearly one direction (mean cosine {mean_cosine:.2f})"
    if alarm:
        alarm = (f"COLLAPSE: {alarm}: raise token_loss_weight, use diffusion_mode=mixed, or freeze the "
                 "embeddings (freeze=emb)")
    return {"val_loss": sum(losses) / len(losses), **found}, alarm

def at_level(net, x, masked, lengths, level, table, generator, cfg, **latent):
    """One noise level of gaussian_report -> {name: number}, and the tokens (B,T) that the estimate rounds to.
    """
    t = level * masked.float()
    eps = torch.randn(*x.shape, table.shape[1], generator=generator).to(x.device)
    _, x_t = embedded(x, t, eps, table, cfg)
    x0, logits, vector, a, s, _ = refined(net, x_t, t, table, cfg, lengths=lengths, **latent)
    token, found = logits.argmax(-1), {}
    near = F.embedding(token, table)
    if vector is not None:
        target = PREDICTIONS[cfg.prediction_type].target(F.embedding(x, table), eps, a, s)
        found["mse"] = (vector - target).square().mean(-1)[masked].mean().item()
    if MODES[cfg.diffusion_mode][1]:
        found["ce"] = F.cross_entropy(logits[masked], x[masked]).item()
    found["round_acc"] = (token == x)[masked].float().mean().item()
    found["drift"] = ((x0 - near).norm(dim=-1) / table.shape[1] ** 0.5)[masked].mean().item()
    found["cosine"] = F.cosine_similarity(x0, near, dim=-1)[masked].mean().item()
    return found, token

# ---- text and latent: a vector z with a noise level of its own (UniDiffuser, arXiv 2303.06555) ----

def latents_of(rows, D):
    """The latents (B,D) of data.Rows: zeros, which stand for none, where there are none."""
    if rows.z is None:
        return rows.x.new_zeros(len(rows.x), D, dtype=torch.float32)
    return rows.z

def latent_cfg(cfg):
    """The Gaussian settings for a latent."""
    return replace(cfg, noise_shift=cfg.latent_noise_shift)

def latent_amplitudes(s, cfg):
    """As amplitudes, for a latent's levels s (B,): each (B,1)."""
    return (q.squeeze(1) for q in amplitudes(s[:, None], latent_cfg(cfg)))

def estimate_latent(net, x, z_t, s, cfg, lengths=None):
    """Text x (B,T), a normalised noisy latent z_t (B,D) of level s (B,) -> the network's Output, and its z_0
    (B,D)."""
    a, b = latent_amplitudes(s, cfg)
    out = net(x, latent=a * z_t, latent_t=s, lengths=lengths)
    return out, PREDICTIONS[cfg.prediction_type].x0(out.latent, z_t, a, b)

class Coupling(NamedTuple):
    """What a mode noises, and therefore learns to predict."""
    text: bool
    latent: bool
    unused: str = ""     # a regular expression: parameters that this mode does not use, frozen while it runs

COUPLINGS = {"stage1_coupling": Coupling(True, True),
             "l2t": Coupling(True, False, r"^latent_head\."),
             "t2l": Coupling(False, True, r"^head\."),
             "stage2_variational": Coupling(True, False, r"^latent_head\.")}

class Coupled(Masked):
    """Stage I: texts and latents. Each step has a mode, a row of COUPLINGS: the objective itself, or with
    objective=sequential those of sequential_schedule in turn. The loss is the masked text's cross-entropy and
    the latent's MSE (mean over D)."""
    defaults = dict(direction="bidirectional", time_cond="film", time_inputs=2, grad_clip=1.0)
    sources, terms, latents, uses_all = ("pairs",), ("text", "latent"), True, False
    ordered = soft = False
    modes = ("joint", "l2t", "t2l")

    def __init__(self, cfg, net_cfg, steps=1):
        super().__init__(cfg, net_cfg, steps)
        self.schedule = [(cfg.objective, 1, 1.0)]
        if cfg.objective == "sequential":
            self.schedule = read_schedule(cfg)

    @classmethod
    def added(cls, was, asked, name, start):
        if was.get("latent_dim"):
            return ()
        if not asked.latent_dim:
            raise ValueError(f"objective={name} needs latents: leave use_external_latents at 1, or give "
                             "latent_dim")
        return ("latent_dim", *cls.defaults)

    def mode(self, step):
        """-> the mode of a step, and the factor on its loss."""
        step %= sum(steps for _, steps, _ in self.schedule)
        for mode, steps, weight in self.schedule:
            if step < steps:
                return mode, weight
            step -= steps

    def unused(self, step):
        return COUPLINGS[self.mode(step)[0]].unused

    def describe(self, step):
        return {"mode": self.mode(step)[0]}

    def noise(self, rows, draw, step):
        t, u = draw.levels(), draw.uniform(rows.x.shape[1])
        z, s = latents_of(rows, self.net_cfg.latent_dim), draw.shuffled_levels()
        z_eps = draw.normal_latent(self.net_cfg.latent_dim)
        masked, total, z, s = self.couple(rows.maskable, t, u, z, s, self.mode(step)[0])
        return Batch(rows.x, masked, torch.ones(masked.shape), rows.lengths, None, z, s, z_eps), total

    def couple(self, maskable, t, u, z, s, mode):
        """t, s (B,): levels of text and latent; u (B,T) uniform; z (B,D), rows of zeros for none -> masked
        (B,T), the two denominators, z, s. What is dropped (drop_given) has z = 0 if it is the latent, all
        masks if it is the text."""
        masked = self.mask(maskable, t, u)[0]
        dropped, has = second_uniform(s) < self.cfg.drop_given, (z != 0).any(-1)
        if not COUPLINGS[mode].text:
            masked = maskable & dropped[:, None]
        else:
            z = z * ~dropped[:, None]
            has = has & ~dropped
        if not COUPLINGS[mode].latent:
            s = torch.zeros_like(s)
        return masked, torch.stack([masked.sum(), has.sum()]), z, s

    def loss(self, net, batch, step=0):
        mode, scale = self.mode(step)
        z = net.latent_prefix.normalise(batch.z)
        has = (z != 0).any(-1)
        a, b = latent_amplitudes(batch.s, self.cfg)
        z_t = (a * z + b * batch.z_eps) * has[:, None]
        x, masked = batch.x, batch.masked
        seen = mask_tokens(x, masked, net.mask_id)
        targets = asked(x, masked)
        out = net(seen, latent=a * z_t, latent_t=batch.s, lengths=batch.lengths, targets=targets)
        text = latent = out.latent.new_zeros(())
        if COUPLINGS[mode].text:
            text = token_nats(out, targets).sum()
        if COUPLINGS[mode].latent:
            target = PREDICTIONS[self.cfg.prediction_type].target(z, batch.z_eps, a, b)
            latent = (out.latent - target).square().mean(-1)[has].sum()
        return scale * torch.stack([self.cfg.text_loss_weight * text, self.cfg.latent_loss_weight * latent])

    def evaluate(self, net, source, rows, generator, size):
        """latent_report, and one text with a third masked, filled in with its latent."""
        z = latents_of(rows, net.cfg.latent_dim)
        metrics = latent_report(net, rows.x, rows.lengths, z, generator, self.cfg, size)
        row = rows.x[0]
        if rows.lengths is not None:
            row = row[:int(rows.lengths[0])]
        masked = (torch.rand(row.shape, generator=generator) < 0.3).to(row.device)
        if net.latent_encoder is not None:
            z = net.posterior(row[None])[0]
        else:
            z = net.latent_prefix.normalise(z[:1])
        filled = net(row[None].masked_fill(masked, net.mask_id), latent=z).logits[0].argmax(-1)
        return metrics, (row, masked, torch.where(masked, filled, row))

class Variational(Coupled):
    """Stage II: the text alone is masked, z = mu + sigma eps comes from the encoder (arXiv 1312.6114); a
    share drop_given of the rows is masked text without a latent. Loss terms: reconstruction (cross-entropy
    given z), KL in nats per token, geometry."""
    defaults = Coupled.defaults | dict(latent_encoder="mlp", use_external_latents=False)
    modes, terms = ("stage2", "l2t", "t2l"), ("text", "kl", "geom")

    @classmethod
    def added(cls, was, asked, name, start):
        if not was.get("latent_dim"):
            raise ValueError(f"objective={name} goes on from a network of Stage I, with latents, which "
                             f"{start} is not: give its checkpoint as --init_from")
        return ("latent_encoder",) if was.get("latent_encoder") == "none" else ()

    def couple(self, maskable, t, u, z, s, mode):
        """s: 1 for rows that go without a latent."""
        masked, _, count = self.mask(maskable, t, u)
        rows = torch.tensor(len(t))
        return masked, torch.stack([count, rows, rows]), z, (second_uniform(s) < self.cfg.drop_given).float()

    def loss(self, net, batch, step=0):
        """KL: at least free_bits per dimension (arXiv 1606.04934, here per text), its weight rising over
        kl_warmup steps."""
        cfg, x, masked, lengths = self.cfg, batch.x, batch.masked, batch.lengths
        mu, logvar, text = net.posterior(x, lengths)
        z = mu + (0.5 * logvar).exp() * batch.z_eps
        seen, latent = mask_tokens(x, masked, net.mask_id), z * (1 - batch.s[:, None])
        targets = asked(x, masked)
        out = net(seen, latent=latent, latent_t=torch.zeros_like(batch.s), lengths=lengths, targets=targets)
        nats = token_nats(out, targets).sum()
        prior = net.latent_prior.mu, net.latent_prior.logvar
        kl = kl_divergence(mu, logvar, *(q.detach() for q in prior)).clamp_min(cfg.free_bits)
        # free bits are the encoder's: a learned prior always learns
        alone = kl_divergence(mu.detach(), logvar.detach(), *prior)
        kl = (kl + alone - alone.detach()).sum(1)
        tokens = x.shape[1] if lengths is None else lengths
        kl = (kl / tokens).sum()           # per token, as the reconstruction is
        rising = cfg.kl_weight * min(1.0, (step + 1) / max(1, cfg.kl_warmup))
        geom = geometry(mu, text.detach()).sum() if cfg.geom_weight else kl.new_zeros(())
        return torch.stack([cfg.text_loss_weight * nats, rising * kl, cfg.geom_weight * geom])

def kl_divergence(mu, logvar, prior_mu, prior_logvar):
    """KL of diagonal Gaussians, nats per dimension (B,D): arXiv 1312.6114, app. B, for any prior."""
    apart = (mu - prior_mu).square() / prior_logvar.exp()
    return 0.5 * (prior_logvar - logvar + (logvar - prior_logvar).exp() + apart - 1)

def geometry(z, text):
    """How far distances between latents z (B,D) are from those between texts (B,C), each as a share of its
    mean: (B,), the mean squared difference of a row's distances to the others. 0 if and only if they are in
    proportion."""
    if len(z) < 3:
        return z.new_zeros(len(z))
    away = ~torch.eye(len(z), dtype=torch.bool, device=z.device)

    def distances(q):
        d = (q[:, None] - q[None]).square().sum(-1).add(1e-9).sqrt()
        return d / d[away].mean()
    return ((distances(z) - distances(text)).square() * away).sum(1) / (len(z) - 1)

def read_schedule(cfg):
    """sequential_schedule and mode_weights -> [(mode, steps, weight)]. ValueError for an unknown mode or
    another number of weights."""
    parts = [part.split(":") for part in cfg.sequential_schedule.split(",")]
    allowed = [name for name in COUPLINGS if name != "stage2_variational"]
    for part in parts:
        name, steps = part[0], part[-1]
        if len(part) != 2 or name not in allowed or not steps.isdecimal() or not 0 < int(steps) < 10**12:
            raise ValueError(f"sequential_schedule: {':'.join(part)!r} is not allowed: give MODE:STEPS, as "
                             "stage1_coupling:2,l2t:1,t2l:1")
    weights = cfg.mode_weights
    if len(weights) == 1:
        weights = weights * len(parts)
    if len(weights) != len(parts):
        raise ValueError(f"mode_weights={cfg.mode_weights}: give one number, or one for each of the "
                         f"{len(parts)} parts of sequential_schedule")
    return [(mode, int(steps), weight) for (mode, steps), weight in zip(parts, weights)]

@torch.no_grad()
def latent_report(net, x, lengths, z, generator, cfg, n=64):
    """What tells how text and latents hang together, on rows x (B,T) with latents z (B,D), n at a time ->
    {name: number}.

    text_nats: the bound on the text (as exact_count) with its own latent, with another row's (shuffled), with
    none. The rest: encoder_report for a network with a Stage II encoder, whose mu is then z, else
    prediction_report."""
    B, T = x.shape
    if net.latent_encoder is not None:
        found, z = encoder_report(net, x, lengths, n)
    else:
        z = net.latent_prefix.normalise(z)
        found = prediction_report(net, x, lengths, z, generator, cfg, n)
    real = torch.arange(T) < (torch.full((B,), T) if lengths is None else lengths.cpu())[:, None]
    masked, weight = (q.to(x.device) for q in exact_count(real, generator))
    seen, targets = mask_tokens(x, masked, net.mask_id), asked(x, masked)
    for name, latent in (("", z), ("_shuffled", z.roll(1, 0)), ("_no_latent", torch.zeros_like(z))):
        nats = torch.cat([(token_nats(net(a, latent=c, lengths=m, targets=b), b) * w).sum(1)
                          for a, b, c, w, m in split(n, seen, targets, latent, weight, lengths)])
        found[f"text_nats{name}"] = nats.mean().item()
        found[f"text_nats{name}_se"] = (nats.std() / B**0.5).item() if B > 1 else None
    return {"val_loss": found["text_nats"] + found.get("latent_mse", found.get("kl", 0.0) / T)} | found

def encoder_report(net, x, lengths, n):
    """kl, in nats per text; active_units, the dimensions whose mu has over 0.01 of the prior's variance over
    texts (arXiv 1509.00519, section 4.2) -> {name: number}, mu (B,D)."""
    mu, logvar = (torch.cat(q) for q in zip(*(net.posterior(a, m)[:2] for a, m in split(n, x, lengths))))
    kl = kl_divergence(mu, logvar, net.latent_prior.mu, net.latent_prior.logvar)
    active = mu.var(0) > 0.01 * net.latent_prior.logvar.exp()
    found = {"kl": kl.sum(1).mean().item(), "kl_largest": kl.mean(0).max().item()}
    return found | {"active_units": int(active.sum())}, mu

def prediction_report(net, x, lengths, z, generator, cfg, n):
    """latent_mse: of the latent predicted from text and pure noise, latent_mse_of_mean: of the training mean;
    latent_rank: the median share of rows whose latent is nearer to the prediction than the text's own."""
    B = len(x)
    noise = torch.randn(z.shape, generator=generator).to(x.device)
    one = x.new_ones(B, dtype=torch.float32)
    parts = split(n, x, noise, one, lengths)
    z0 = torch.cat([estimate_latent(net, a, e, s, cfg, m)[1] for a, e, s, m in parts])
    far, variance = torch.cdist(z0, z), net.latent_prefix.std.item() ** 2
    nearer = (far < far.diagonal()[:, None]).sum(1).float()
    return {"latent_mse": (z0 - z).square().mean().item() * variance,
            "latent_mse_of_mean": z.square().mean().item() * variance,
            "latent_rank": (nearer.median() / B).item()}

OBJECTIVES = {"masked_mean": Masked, "elbo": Elbo, "task": Task, "ar": NextToken,
              "block": Blocks, "block_elbo": BlockElbo, "b3d": B3D, "mixture": Mixture, "gaussian": Gaussian,
              "stage1_coupling": Coupled, "l2t": Coupled, "t2l": Coupled, "sequential": Coupled,
              "stage2_variational": Variational}
CHOICES = {"schedule": SCHEDULES, "mask_policy": MASK_POLICIES, "objective": OBJECTIVES,
           "likelihood": ("bound", "order"), "beta_schedule": BETA_SCHEDULES,
           "prediction_type": PREDICTIONS, "diffusion_mode": MODES}

# ---- samplers: (net, x (B,T), known (B,T), mask_id, generator, ...) -> x (B,T); known tokens stay ----

class Logits(NamedTuple):
    logits: Tensor

def draw(logits, temperature, top_k, top_p, generator):
    """(B,T,V) logits -> a token for each position and its probability at temperature 1, both (B,T).

    Gumbel-max in float64: in float32 the noise is cut off, which lowers entropy (arXiv 2409.02908).
    temperature 0 = argmax. top_k and top_p (nucleus, arXiv 1904.09751) leave out what is unlikely at
    temperature 1; 0 and 1 leave out nothing."""
    logits = logits.double()
    if top_k:
        least = logits.topk(min(top_k, logits.shape[-1])).values[..., -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    if top_p < 1:
        p, order = logits.softmax(-1).sort(-1, descending=True)
        drop = torch.zeros_like(p, dtype=torch.bool).scatter(-1, order, p.cumsum(-1) - p >= top_p)
        logits = logits.masked_fill(drop, -math.inf)
    score = logits
    if temperature > 0:
        noise = torch.rand(logits.shape, generator=generator, dtype=torch.float64).to(logits.device)
        score = logits / temperature - torch.log(-torch.log(noise.clamp(1e-300, 1 - 1e-16)))
    token = score.argmax(-1)
    return token, logits.softmax(-1).gather(-1, token.unsqueeze(-1)).squeeze(-1)

def guide(conditional, free, scale):
    """Classifier-free guidance (arXiv 2207.12598): from what is predicted without the condition past what is
    with it."""
    return free + scale * (conditional - free)

def guided(net, known, mask_id, scale):
    """Guidance on what is known: the unconditional side has it masked. scale 1 is no guidance."""
    if scale == 1:
        return net

    def both(x, state=None, **options):
        if state is not None:
            raise ValueError("guidance is for whole sequences: with sampler=block leave it at 1")
        conditional, free = net(torch.cat([x, mask_tokens(x, known, mask_id)]), **options).logits.chunk(2)
        return Logits(guide(conditional, free, scale))
    return both

def check_guidance(guidance, cfg):
    if guidance != 1 and not cfg.drop_given:
        raise ValueError(f"guidance={guidance:g} needs a network that was trained with some conditions "
                         "dropped (drop_given > 0): leave guidance at 1")

def decode(rule, net, x, known, mask_id, generator, steps=0, threshold=0.95, temperature=1.0, top_k=0,
           top_p=1.0, soft=False, watch=None, **unused):
    """The loop of all samplers of whole sequences: draw every masked token, keep what `rule` picks, until
    none is masked.

    rule(sure (B,T) probabilities of the draws, masked (B,T), pace (B,), left, generator, threshold) -> (B,T)
    bool, what to keep; pace: tokens that a row must decide in this call to be done in `steps` calls (0: one
    per token); left: calls to go, this one included. soft: each call sees in the masks what the one before
    predicted. watch(x, fresh, sure) is called after every step, fresh (B,T) the tokens just decided."""
    x, masked = mask_tokens(x, ~known, mask_id), ~known
    first = masked.sum(1)
    calls, call, before = steps or int(first.max()), 0, {}
    while masked.any():
        logits = net(x, **before).logits
        token, sure = draw(logits, temperature, top_k, top_p, generator)
        before = {"x0_guess": logits} if soft else {}
        after = first + (-first * (call + 1)).div(calls, rounding_mode="floor")    # may still be masked then
        pace = (masked.sum(1) - after.clamp_min(0)).clamp_min(1)
        fresh = masked & rule(sure, masked, pace, calls - call, generator, threshold)
        x, masked, call = torch.where(fresh, token, x), masked & ~fresh, call + 1
        if watch:
            watch(x, fresh, sure)
    return x

def best(score, masked, count):
    """The `count` (B,) masked positions of highest score in each row."""
    order = score.masked_fill(~masked, -math.inf).argsort(dim=1, descending=True, stable=True)
    return order.argsort(1) < count[:, None]

def confidence(sure, masked, pace, left, generator, threshold):
    """Confidence-parallel decoding (Fast-dLLM, arXiv 2505.22618): every draw whose probability reaches
    `threshold`, at least one per row, and as many of the surest as the pace asks for."""
    return (sure >= threshold) | best(sure, masked, pace)

def topk(sure, masked, pace, left, generator, threshold):
    """Low-confidence remasking (LLaDA, arXiv 2502.09992): an even number of tokens per call, the surest."""
    return best(sure, masked, pace)

def ancestral(sure, masked, pace, left, generator, threshold):
    """The reverse process in equal steps of t (MDLM, arXiv 2406.07524, eq. 7): of what is masked at t a share
    (t - s) / t is decided by s, all of it at s = 0."""
    return torch.rand(sure.shape, generator=generator).to(sure.device) < 1 / max(1, left)

def first_hitting(sure, masked, pace, left, generator, threshold):
    """A uniformly random order, one token per call: exactly the reverse process, without the calls in which
    nothing changes (arXiv 2409.02908, section 4). With fewer `steps`, several at once."""
    return best(torch.rand(sure.shape, generator=generator).to(sure.device), masked, pace)

def prefix_length(known):
    """known (B,T) -> (B,), how many tokens each row begins with are known."""
    return (~known).long().cumsum(1).eq(0).sum(1)

def read(net, x, **options):
    """The state after finished text x (B,T): no logits are made for that."""
    return net(x, finished_text=True, targets=x[:, :0], **options).state

@dataclass
class Context:
    """What samplers that go on from a state begin with; they note here what they had after what is known."""
    state: Optional[list] = None       # of so many rows as are sampled, or of one
    start: int = -1                    # ar: the token before the first one; -1 = the mask
    last: Optional[Tensor] = None      # ar: (B,1), the token that the state has not read yet

    def rows(self, n):
        """The state for n rows."""
        copied = lambda z: z.expand(n, *z.shape[1:]).contiguous()
        return torch.utils._pytree.tree_map_only(Tensor, copied, self.state)

def block(net, x, known, mask_id, generator, block_size=32, inner="confidence", layout="block", eot=None,
          context=None, **options):
    """Block diffusion from a cache of constant size: the known prefix is read once; then each block of n is
    denoised by the sampler `inner` from the carried state, and its finished text moves the state on. What a
    block costs does not depend on what came before it. Rows may have prefixes of different lengths: a row's
    first block begins after its own. `steps` is per block. layout: that of the objective the network was
    trained with, block or b3d. eot: a row that has produced it gets nothing else after it."""
    T, n = x.shape[1], block_size
    x, known = F.pad(mask_tokens(x, ~known, mask_id), (0, n), value=mask_id), F.pad(known, (0, n))
    start = prefix_length(known)
    watch, context = options.pop("watch", None), context or Context()
    state = context.state = prefix_state(net, x[:, :int(start.max())], start, context.rows(len(x)))
    ended = torch.zeros_like(start, dtype=torch.bool)
    while (start < T).any():
        at = start[:, None] + torch.arange(n, device=x.device)
        real, fixed = at < T, known.gather(1, at)
        lengths = None if real.all() else real.sum(1).clamp_min(1)     # what lies past the end is padding
        given, piece = fixed | ~real | ended[:, None], x.gather(1, at)
        if eot is not None:
            piece = piece.masked_fill(ended[:, None] & ~fixed, eot)
        denoise = from_state(net, state, lengths, n, layout)
        inside = watch and functools.partial(watch_block, watch, x, at, given)
        done = SAMPLERS[inner](denoise, piece, given, mask_id, generator, watch=inside, **options)
        done = torch.where(given, piece, done)                         # whatever is past the end
        if eot is not None:
            after = (done == eot).long().cumsum(1) - (done == eot).long() > 0
            done = done.masked_fill(after & ~fixed & real, eot)
            ended |= (done == eot).any(1)
        x, start = x.scatter(1, at, done), (start + n).clamp_max(T)
        if (start < T).any():
            state = read(net, done, state=state, lengths=lengths)
    return x[:, :T]

def watch_block(watch, x, at, given, *piece):
    """watch for whole rows x (B,T+n), of which a block, at (B,n), is as a sampler of blocks says."""
    T, none = x.shape[1] - at.shape[1], torch.zeros_like(x)
    whole = x, none.bool(), none.double()
    piece = torch.where(given, x.gather(1, at), piece[0]), *piece[1:]
    watch(*(z.scatter(1, at, part.to(z.dtype))[:, :T] for z, part in zip(whole, piece)))

def from_state(net, state, lengths, n, layout):
    """The network on blocks of n that go on from a state."""
    def call(z, **options):
        if layout == "b3d":
            return Logits(net(torch.cat([z, z], 1), state=state).logits[:, n:])
        return net(z, state=state, lengths=lengths, **options)
    return call

def prefix_state(net, x, lengths, before=None):
    """The state after the first `lengths` (B,) tokens of x (B,P), which may be 0, gone on from the state
    `before`, None at a text's beginning; None if there is nothing before."""
    if not x.shape[1]:
        return before
    state, trees = read(net, x, lengths=lengths.clamp_min(1), state=before), torch.utils._pytree
    there = lambda z: (lengths > 0).view(-1, *[1] * (z.dim() - 1))
    newer = lambda z, old: torch.where(there(z), z, old) if torch.is_tensor(z) else z
    before = trees.tree_map_only(Tensor, torch.zeros_like, state) if before is None else before
    return trees.tree_map(newer, state, before)

def read_on(net):
    """The network as one of next tokens: each sees what is before it, whatever the direction."""
    return functools.partial(net, finished_text=True, block_size=1)

def ar(net, x, known, mask_id, generator, temperature=1.0, top_k=0, top_p=1.0, watch=None, eot=None,
       context=None, **unused):
    """Token by token from left to right, for networks trained with objective=ar; the state is all that is
    carried. What is known of all rows from the beginning on is read at once."""
    x, B, context, net = mask_tokens(x, ~known, mask_id), len(x), context or Context(), read_on(net)
    state, start = context.rows(B), mask_id if context.start < 0 else context.start
    last = x.new_full((B, 1), start) if context.last is None else context.last.expand(B, 1)
    given = int(prefix_length(known).min())
    if given:
        state = read(net, torch.cat([last, x[:, :given - 1]], 1), state=state)
        last = x[:, given - 1:given]
    context.state, context.last = state, last
    ended = torch.zeros_like(known[:, :1])
    for i in range(given, x.shape[1]):
        out = net(last, state=state)
        (token, sure), state = draw(out.logits, temperature, top_k, top_p, generator), out.state
        if eot is not None:
            token = token.masked_fill(ended, eot)
            ended |= token == eot
        last = torch.where(known[:, i:i + 1], x[:, i:i + 1], token)
        fresh = torch.zeros_like(known)
        fresh[:, i] = ~known[:, i]
        x = torch.where(fresh, last, x)
        if watch:
            watch(x, fresh, sure.expand(x.shape))
    return x

# ---- Gaussian samplers: one step from x_t to x_s, s < t ----
# (x_0 (B,T,C), x_t, abar_t, abar_s, eta, generator) -> x_s; the abars are numbers, or (B,T,1).

def ddpm(x0, x_t, at, as_, eta, generator):
    """The posterior q(x_s | x_t, x_0) (DDPM, arXiv 2006.11239, eq. 6-7); eta is not used."""
    beta = 1 - at / as_
    mean = as_**0.5 * beta / (1 - at) * x0 + (at / as_) ** 0.5 * (1 - as_) / (1 - at) * x_t
    return mean + (beta * (1 - as_) / (1 - at)) ** 0.5 * normal(x_t, generator)

def ddim(x0, x_t, at, as_, eta, generator):
    """DDIM (arXiv 2010.02502, eq. 12 and 16): eta 0 is deterministic, 1 has DDPM's variance."""
    sigma = eta * ((1 - as_) / (1 - at) * (1 - at / as_)) ** 0.5
    eps = (x_t - at**0.5 * x0) / (1 - at) ** 0.5
    x = as_**0.5 * x0 + torch.as_tensor(1 - as_ - sigma**2).clamp_min(0) ** 0.5 * eps
    return x + sigma * normal(x_t, generator) if eta else x

def normal(like, generator):
    return torch.randn(like.shape, generator=generator).to(like.device)

def noise_steps(cfg, steps=0, default=50):
    """How many steps to take from noise to text: `steps`, or where it is 0 `default`, or fewer if the network
    knows fewer."""
    return steps or min(default, cfg.diffusion_steps or default)

def descent(cfg, steps):
    """[(t, s, abar(t), abar(s))] of `steps` steps from noise level t = 1 to 0. ValueError for more than
    cfg.diffusion_steps."""
    if cfg.diffusion_steps and steps > cfg.diffusion_steps:
        raise ValueError(f"steps={steps} is more than the diffusion_steps={cfg.diffusion_steps} the network "
                         "was trained with: give at most those")
    levels = [i / steps for i in range(steps, -1, -1)]
    if cfg.diffusion_steps:
        levels = [math.ceil(t * cfg.diffusion_steps - 1e-6) / cfg.diffusion_steps for t in levels]
    share = abar(torch.tensor(levels), cfg).tolist()
    return list(zip(levels, levels[1:], share, share[1:]))

def denoise_vectors(rule, net, x, known, mask_id, generator, cfg=None, steps=0, eta=0.0, clamp=False,
                    guidance=1.0, temperature=0.0, top_k=0, top_p=1.0, lengths=None, watch=None, latent=None,
                    **unused):
    """The loop of all samplers of Gaussian diffusion. x (B,T), known (B,T) -> x without a mask; known tokens
    stay, and the network sees them without noise.

    net: the network itself (its table() is needed); steps: from noise to text, evenly spaced in t. clamp:
    every estimate of x_0 goes to its nearest embedding (Diffusion-LM, arXiv 2205.14217, section 4.2).
    guidance: on x_0, the unconditional side having what is given noised, too, and no latent. temperature 0
    rounds to the nearest embedding, otherwise tokens are drawn from the last estimate's logits (top_k,
    top_p)."""
    check_guidance(guidance, cfg)
    steps, table = descent(cfg, noise_steps(cfg, steps)), net.table()
    given, clean = known.unsqueeze(-1), F.embedding(x.masked_fill(~known, 0), table)
    x_t = normal(clean, generator)
    options = dict(lengths=lengths)
    if latent is not None:
        options["latent"] = latent
    x0_guess = free_guess = None
    if cfg.noise_spread:
        u = torch.rand(x.shape, generator=generator).to(x.device)
    for t, s, at, as_ in steps:
        level, seen = x_t.new_full(x.shape, t), torch.where(given, clean, x_t)
        if cfg.noise_spread:
            level, after = (token_levels(q, u, cfg) for q in (t, s))
            at, as_ = (abar(q, cfg).float().unsqueeze(-1) for q in (level, after))
        levels = level.masked_fill(known, 0)
        x0, logits, *_, x0_guess = estimate(net, seen, levels, table, cfg, x0_guess=x0_guess, **options)
        if guidance != 1:
            noised = torch.where(given, at**0.5 * clean + (1 - at) ** 0.5 * normal(clean, generator), x_t)
            blind = dict(lengths=lengths, x0_guess=free_guess)
            free, free_logits, *_, free_guess = estimate(net, noised, level, table, cfg, **blind)
            x0, logits = guide(x0, free, guidance), guide(logits, free_logits, guidance)
        if clamp:
            x0 = F.embedding(logits.argmax(-1), table)
        if watch:
            sure, token = logits.softmax(-1).max(-1)
            watch(torch.where(known, x, token), ~known, sure)
        x_t = GAUSSIAN_STEPS[rule](x0, x_t, at, as_, eta, generator) if s else x0
    return torch.where(known, x, draw(logits, temperature, top_k, top_p, generator)[0])

GAUSSIAN_STEPS = {"ddpm": ddpm, "ddim": ddim}
DECISIONS = {rule.__name__: rule for rule in (confidence, topk, ancestral, first_hitting)}
SAMPLERS = {name: functools.partial(decode, rule) for name, rule in DECISIONS.items()}
SAMPLERS |= {"block": block, "ar": ar}
SAMPLERS |= {rule: functools.partial(denoise_vectors, rule) for rule in GAUSSIAN_STEPS}
STATEFUL = ("block", "ar")   # these go on from a state, past the length of the rows trained on

# ---- text and latent. net: a Denoiser with latents; z (B,D) as in the files trained on ----

def clean_latent(net, z):
    """Latents z (B,D) -> as the network takes them, normalised. ValueError for another dimension."""
    if z.shape[1:] != net.latent_prefix.mean.shape:
        D = len(net.latent_prefix.mean)
        raise ValueError(f"latents of shape {tuple(z.shape)}: this network takes (B,{D})")
    if net.latent_encoder is not None:     # an encoder's are normalised already
        return z
    return net.latent_prefix.normalise(z)

def with_latent(net, z, guidance=1.0):
    """The network as samplers call it, with the normalised clean latents z (B,D) before every row; the
    unconditional side of guidance has no latent."""
    def call(x, lengths=None, **options):
        if guidance == 1:
            return net(x, latent=z, lengths=lengths, **options)
        twice = lambda q: q if q is None else torch.cat([q, q])
        both = torch.cat([z, torch.zeros_like(z)])
        logits = net(twice(x), latent=both, lengths=twice(lengths), **options).logits
        return Logits(guide(*logits.chunk(2), guidance))
    return call

def sample_text_from_latent(net, z, length, generator, cfg, sampler="first_hitting", guidance=1.0, x=None,
                            known=None, **options):
    """L2T: latents z (B,D) -> token ids (B,length), by a row of SAMPLERS with its options (steps,
    temperature, top_k, top_p, watch).

    x (B,length), known (B,length) bool: tokens that are given besides. ValueError for z of another dimension,
    for guidance on a network trained with drop_given=0."""
    check_guidance(guidance, cfg)
    z = clean_latent(net, z)
    if x is None:
        x = torch.full((len(z), length), net.mask_id, device=z.device)
        known = torch.zeros_like(x, dtype=torch.bool)
    if sampler in GAUSSIAN_STEPS:
        options |= dict(cfg=cfg, guidance=guidance, latent=z)
        return SAMPLERS[sampler](net, x, known, net.mask_id, generator, **options)
    return SAMPLERS[sampler](with_latent(net, z, guidance), x, known, net.mask_id, generator, **options)

def sample_latent_from_text(net, x, generator, cfg, steps=0, eta=0.0, guidance=1.0, temperature=1.0,
                            lengths=None):
    """T2L: token ids x (B,T), rows of `lengths` (B,) tokens if given -> a sampled latent of each, (B,D), by
    DDIM.

    temperature: factor on the noise it starts from (0: near the mean of what fits the text). guidance: the
    unconditional side has the text masked. A Stage II network samples q(z|x), whose deviation temperature
    scales."""
    check_guidance(guidance, cfg)
    noise = torch.randn(len(x), len(net.latent_prefix.mean), generator=generator).to(x.device)
    if net.latent_encoder is not None:
        mu, logvar, _ = net.posterior(x, lengths)
        return mu + temperature * (0.5 * logvar).exp() * noise
    z_t = temperature * noise
    for t, after, at, as_ in descent(latent_cfg(cfg), noise_steps(cfg, steps)):
        s = z_t.new_full((len(x),), t)
        z0 = estimate_latent(net, x, z_t, s, cfg, lengths)[1]
        if guidance != 1:
            blind = torch.full_like(x, net.mask_id)
            z0 = guide(z0, estimate_latent(net, blind, z_t, s, cfg, lengths)[1], guidance)
        z_t = ddim(z0, z_t, at, as_, eta, generator) if after else z0
    return net.latent_prefix.restore(z_t)

def sample_joint(net, rows, length, generator, cfg, steps=0, lead=1.0, rule="first_hitting", eta=0.0,
                 guidance=1.0, temperature=1.0, top_k=0, top_p=1.0, threshold=0.95, watch=None):
    """Text and latent together from nothing -> token ids (rows,length) and latents (rows,D), in `steps`
    network calls (0: 64).

    lead: 1 = the latent first, in half of the calls, then the text in the other half; 0 = both from noise to
    clean at one pace; between, the latent is that much ahead. rule: confidence, topk, ancestral or
    first_hitting, which tokens are kept. guidance: each against a network that sees nothing of the other. A
    Stage II network draws z from its prior, then the text from z."""
    device, D = net.latent_prefix.mean.device, len(net.latent_prefix.mean)
    steps = noise_steps(cfg, steps, default=64)
    x = torch.full((rows, length), net.mask_id, device=device)
    z_t = torch.randn(rows, D, generator=generator).to(device)
    if net.latent_encoder is not None:
        z = net.latent_prior.sample(z_t)
        options = dict(steps=steps, temperature=temperature, top_k=top_k, top_p=top_p, watch=watch)
        return sample_text_from_latent(net, z, length, generator, cfg, rule, guidance, **options), z
    check_guidance(guidance, cfg)
    clipped = lambda level: min(1.0, max(0.0, level))
    for i in range(steps):
        now, after = (1 + lead) * i / steps, (1 + lead) * (i + 1) / steps
        s, s_next, t_next = clipped(1 - now), clipped(1 - after), clipped(1 - (after - lead))
        level = z_t.new_full((rows,), s)
        out, z0 = estimate_latent(net, x, z_t, level, cfg)
        logits = out.logits
        if guidance != 1:
            noise = torch.randn(rows, D, generator=generator).to(device)
            blind = estimate_latent(net, x, noise, torch.ones_like(level), cfg)[0].logits
            alone = estimate_latent(net, torch.full_like(x, net.mask_id), z_t, level, cfg)[1]
            logits, z0 = guide(logits, blind, guidance), guide(z0, alone, guidance)
        masked = x == net.mask_id
        pace = (masked.sum(1) - math.ceil(length * t_next - 1e-6)).clamp_min(0)
        if bool(pace.any()):
            token, sure = draw(logits, temperature, top_k, top_p, generator)
            fresh = masked
            if i + 1 < steps:
                fresh = masked & DECISIONS[rule](sure, masked, pace, steps - i, generator, threshold)
            x = torch.where(fresh, token, x)
            if watch:
                watch(x, fresh, sure)
        if s:
            at, as_ = abar(torch.tensor([s, s_next]), latent_cfg(cfg)).tolist()
            z_t = ddim(z0, z_t, at, as_, eta, generator) if s_next else z0
    return x, net.latent_prefix.restore(z_t)
