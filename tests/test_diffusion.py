"""Schedules, objectives, the bound and the sampler against hand-computed and exhaustive cases."""
import itertools
import math
from dataclasses import replace

import pytest
import torch

import data
import diffusion
import model
from diffusion import MASK_POLICIES, OBJECTIVES, SAMPLERS, SCHEDULES, DiffusionConfig, Logits, draw, guided, mask_tokens, stratified
from model import Denoiser, ModelConfig

SEED = lambda n=0: torch.Generator().manual_seed(n)


def objective(name, n=4, vocab_size=3, **cfg):
    """A row of OBJECTIVES for a network of that vocabulary and block size."""
    return OBJECTIVES[name](DiffusionConfig(objective=name, **cfg), ModelConfig(vocab_size=vocab_size, block_size=n))


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_run_from_0_to_1_with_the_right_slope(name):
    t = torch.linspace(0, 1, 201, dtype=torch.float64)
    m, slope = SCHEDULES[name](t)
    assert abs(m[0]) < 1e-12 and abs(m[-1] - 1) < 1e-12 and (m.diff() > 0).all()
    x = t.clone().requires_grad_()
    SCHEDULES[name](x)[0].sum().backward()
    assert torch.allclose(slope, x.grad, atol=1e-9)


def test_stratified_has_one_level_in_each_part_and_never_0():
    for n in (1, 7, 64):
        t = stratified(n, SEED(n))
        assert sorted(((t - 1e-7) * n).floor().tolist()) == list(range(n)) and 0 < t.min() and t.max() <= 1


def test_objectives_by_hand():
    maskable = torch.tensor([[True, True, False, True], [True, True, True, True]])
    t, noise = torch.tensor([0.5, 0.25]), torch.tensor([[0.4, 0.6, 0.1, 0.2], [0.2, 0.3, 0.26, 0.9]])
    hidden = torch.tensor([[True, False, False, True], [True, False, False, False]])
    masked, weight, total = objective("masked_mean").mask(maskable, t, noise)
    assert torch.equal(masked, hidden) and weight == 1 and total == 3
    masked, weight, total = objective("elbo").mask(maskable, t, noise)
    assert torch.equal(masked, hidden) and weight.flatten().tolist() == [2, 4] and total == 7
    masked, _, total = objective("task").mask(maskable, t, noise)
    assert torch.equal(masked, maskable) and total == 7


def test_mask_policies():
    """Whatever is masked together, each token is masked with probability m(t); runs have the length asked for, suffixes are suffixes."""
    u, all_of_it = torch.rand(400, 256, generator=SEED(5)), torch.ones(400, 256, dtype=torch.bool)
    for name, policy in MASK_POLICIES.items():
        noise = policy(u, all_of_it, 8)
        for rate in (0.1, 0.5, 0.9):
            masked = noise < rate
            assert masked.float().mean() == pytest.approx(rate, abs=0.02), name
            if name != "suffix":             # at every position
                assert (masked.float().mean(0) - rate).abs().max() < 0.12, name
    assert torch.equal(MASK_POLICIES["independent"](u, all_of_it, 8), u)
    together = MASK_POLICIES["spans"](u, all_of_it, 8)
    runs = (together[:, 1:] != together[:, :-1]).sum(1).add(1)
    assert 256 / runs.float().mean() == pytest.approx(8, rel=0.05)
    values = together[:, 1:][together[:, 1:] != together[:, :-1]]             # a run's level does not depend on where it begins
    assert values.mean() == pytest.approx(0.5, abs=0.01) and values.std() == pytest.approx(12**-0.5, abs=0.01)
    maskable = torch.zeros(400, 256, dtype=torch.bool)
    maskable[:, 10:20] = True
    masked = (MASK_POLICIES["suffix"](u, maskable, 8) < 0.35) & maskable
    assert set(masked.sum(1).tolist()) == {3, 4} and masked[:, 17:20].all() and not masked[:, :16].any()


def test_denoising_loss_by_hand():
    """Two symbols; the denoiser says 3/4 for symbol 1 wherever it is asked."""
    seen = []
    def denoise(x, **options):
        seen.append(x)
        return Logits(torch.tensor([0.25, 0.75]).log().expand(*x.shape, 2))
    x, masked = torch.tensor([[1, 0, 1]]), torch.tensor([[True, True, False]])
    batch = diffusion.Batch(x, masked, torch.full(x.shape, 2.0))
    loss = objective("elbo", vocab_size=2).loss(denoise, batch)
    assert loss.item() == pytest.approx(2 * (-math.log(0.75) - math.log(0.25)))
    assert seen[0].tolist() == [[2, 2, 1]]


# A toy source: a Markov chain over 3 symbols, strings of length 4, whose exact conditionals make a perfect denoiser.
START, STEP = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.3, 0.3, 0.4]])
STRINGS = torch.tensor(list(itertools.product(range(3), repeat=4)))
PROBABILITY = START[STRINGS[:, 0]] * torch.stack([STEP[STRINGS[:, i], STRINGS[:, i + 1]] for i in range(3)]).prod(0)


def perfect(x, **options):
    """The exact marginals of every token given the visible ones."""
    fits = ((x[:, None] == STRINGS) | (x[:, None] == 3)).all(-1) * PROBABILITY               # (B, 81)
    onehot = torch.nn.functional.one_hot(STRINGS, 3).float()
    return Logits(torch.einsum("bs,stv->btv", fits / fits.sum(1, keepdim=True), onehot).clamp_min(1e-12).log())


def exhaustive_bound(x):
    """The bound on -log p(x) / T of the perfect denoiser, over all subsets of masked positions, each count equally likely."""
    T, value = x.shape[1], torch.zeros(len(x))
    for k in range(1, T + 1):
        subsets = list(itertools.combinations(range(T), k))
        for s in subsets:
            masked = torch.zeros(x.shape, dtype=torch.bool)
            masked[:, list(s)] = True
            ce = -perfect(mask_tokens(x, masked, 3)).logits.gather(-1, x[..., None])[..., 0]
            value += (ce * masked).sum(1) / k / len(subsets) / T
    return value


def test_the_bound_is_unbiased_and_above_the_entropy():
    x = STRINGS[torch.multinomial(PROBABILITY, 6000, replacement=True, generator=SEED(1))]
    found = objective("elbo").bound(perfect, x, SEED(2))
    exact, entropy = exhaustive_bound(x).mean(), -PROBABILITY[(STRINGS[:, None] == x[None]).all(-1).int().argmax(0)].log().mean() / 4
    se = found.std() / len(x) ** 0.5
    assert abs(found.mean() - exact) < 3 * se
    assert exact > entropy - 1e-6 and found.mean() > entropy - 3 * se
    true_entropy = -(PROBABILITY * PROBABILITY.log()).sum() / 4
    assert abs(entropy - true_entropy) < 0.02
    # For a perfect denoiser the bound is tight: the chain rule holds in every order, so it equals the entropy.
    assert (exhaustive_bound(STRINGS) * PROBABILITY).sum() == pytest.approx(true_entropy.item(), abs=1e-5)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_elbo_objective_agrees_with_the_exact_count_bound(schedule):
    x = STRINGS[torch.multinomial(PROBABILITY, 20000, replacement=True, generator=SEED(3))]
    t = stratified(len(x), SEED(4)).clamp_min(1e-3)
    elbo = objective("elbo", schedule=schedule)
    masked, weight, total = elbo.mask(torch.ones_like(x, dtype=torch.bool), t, torch.rand(x.shape, generator=SEED(5)))
    value = elbo.loss(perfect, diffusion.Batch(x, masked, weight.expand(x.shape))) / total
    assert value.item() == pytest.approx(exhaustive_bound(x).mean().item(), rel=0.03)


def test_draw_frequencies_temperature_and_top_k():
    logits = torch.tensor([0.6, 0.3, 0.1]).log().expand(1, 40000, 3)
    share = lambda **o: torch.bincount(draw(logits, generator=SEED(), **o)[0][0], minlength=3) / 40000
    assert torch.allclose(share(temperature=1.0, top_k=0, top_p=1), torch.tensor([0.6, 0.3, 0.1]), atol=0.01)
    sharp = torch.tensor([0.6, 0.3, 0.1]) ** 2
    assert torch.allclose(share(temperature=0.5, top_k=0, top_p=1), sharp / sharp.sum(), atol=0.01)
    assert torch.allclose(share(temperature=1.0, top_k=2, top_p=1), torch.tensor([2 / 3, 1 / 3, 0]), atol=0.01)
    assert torch.allclose(share(temperature=1.0, top_k=0, top_p=0.8), torch.tensor([2 / 3, 1 / 3, 0]), atol=0.01)
    assert torch.allclose(share(temperature=1.0, top_k=0, top_p=0.5), torch.tensor([1.0, 0, 0]), atol=0.01)
    token, sure = draw(logits, 0.0, 0, 1, None)
    assert (token == 0).all() and torch.allclose(sure, torch.tensor(0.6, dtype=torch.float64))


WHOLE = [name for name in SAMPLERS if name not in ("block", "ar", *diffusion.GAUSSIAN_STEPS)]


def noise_net(V):
    """A denoiser that knows nothing but is the same for the same input."""
    return lambda z, **options: Logits(torch.randn(*z.shape, V, generator=SEED(int(z.sum()))))


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("length", [1, 5, 16])
@pytest.mark.parametrize("steps", [0, 1, 3, 7, 40])
def test_every_sampler_fills_everything_and_keeps_what_is_known(name, length, steps):
    x, known = torch.randint(7, (3, length), generator=SEED(8)), torch.rand(3, length, generator=SEED(9)) < 0.4
    known[0] = True                                                    # a row with nothing to do
    calls, net = [], noise_net(7)
    def denoise(z):
        calls.append(z)
        return net(z)
    sample = lambda: SAMPLERS[name](denoise, x, known, 7, SEED(10), steps=steps, threshold=0.8)
    y = sample()
    used = len(calls)
    assert (y[known] == x[known]).all() and ((0 <= y) & (y < 7)).all()
    assert used <= (steps or length)
    if name in ("topk", "first_hitting") and not steps:
        assert used == (~known).sum(1).max()                           # one token a call
    assert torch.equal(y, sample())


def test_confidence_follows_the_threshold():
    """A sure denoiser is done in one call, an unsure one takes a token a call."""
    x, known = torch.zeros(1, 6, dtype=torch.long), torch.zeros(1, 6, dtype=torch.bool)
    calls = []
    for scale, want in ((50.0, 1), (0.0, 6)):
        calls.clear()
        SAMPLERS["confidence"](lambda z: calls.append(1) or Logits(scale * torch.nn.functional.one_hot(z * 0 + 2, 4).float()), x, known, 4,
                               SEED())
        assert len(calls) == want


def test_confidence_prefers_likely_strings():
    """Keeping the surest draw first sharpens: samples of a perfect denoiser are likelier than the source's own."""
    nothing = torch.zeros(4000, 4, dtype=torch.bool)
    rows = SAMPLERS["confidence"](perfect, nothing.long(), nothing, 3, SEED(1), threshold=1.1)
    assert PROBABILITY[(STRINGS[:, None] == rows).all(-1).int().argmax(0)].log().mean() > (PROBABILITY * PROBABILITY.log()).sum() + 0.2


@pytest.mark.parametrize("name", ["ancestral", "first_hitting"])
def test_unbiased_samplers_give_the_source_for_a_perfect_denoiser(name):
    """One token a call, any order: the chain rule. `confidence` and `topk` sharpen instead, see above."""
    nothing = torch.zeros(20000, 4, dtype=torch.bool)
    rows = SAMPLERS[name](perfect, nothing.long(), nothing, 3, SEED(1), steps=0 if name == "first_hitting" else 200)
    share = torch.bincount((STRINGS[:, None] == rows).all(-1).int().argmax(0), minlength=81) / 20000
    assert (share - PROBABILITY).abs().max() < 0.015 and (share - PROBABILITY).abs().sum() < 0.12


def test_guidance_by_hand():
    x, known = torch.tensor([[0, 1, 3]]), torch.tensor([[True, False, False]])
    denoise = lambda z, **options: Logits(torch.nn.functional.one_hot(z, 4).float())
    assert guided(denoise, known, 3, 1) is denoise
    found = guided(denoise, known, 3, 2.0)(x).logits
    assert found[0].tolist() == [[2, 0, 0, -1], [0, 1, 0, 0], [0, 0, 0, 1]]


# ---- with a small network: exact likelihoods, and block diffusion whose training state is its inference state ----

SMALL = ModelConfig(n_layer=2, n_embd=32, head_size=16, vocab_size=3, block_size=4)
BLOCKWISE = {"causal": {}, "dw_jrt": dict(dw_jrt=True, dw_jrt_inject="gate"), "two-way": dict(direction="block"),
             "two-way, dw_jrt": dict(direction="block", dw_jrt=True, dw_jrt_inject="gate", fusion="concat"),
             "time": dict(direction="bidirectional", time_cond="film"), "attention": dict(mixer="attention", direction="block"),
             "attention, no shift": dict(mixer="attention", direction="bidirectional", ffn_shift="none"),
             "hybrid": dict(mixer="attention,rwkv7", direction="block"), "wide": dict(direction="block", ffn_shift="wide"),
             "two-way, wide": dict(direction="bidirectional", ffn_shift="wide"), "alternate, two-way": dict(direction="alternate"),
             "alternate": dict(direction="alternate_block"), "alternate, wide": dict(direction="alternate_block", ffn_shift="wide"),
             "looped": dict(direction="block", n_layer=3, loops=2), "causal, wide": dict(ffn_shift="wide"), "rotary": dict(direction="block", rotary=True),
             "observed first": dict(rotary=True, observed_first=True, ffn_shift="both"), "twice": dict(read_twice=True),
             "chunks": dict(dw_jrt=True, dw_jrt_inject="reverse", dw_jrt_chunk=2)}


def network(n=4, **changes):
    net = Denoiser(ModelConfig(**{**vars(SMALL), **changes, "block_size": n}))
    for name, p in net.named_parameters():
        p.data += torch.randn(p.shape, generator=SEED(len(name))) * (0.5 if name == "emb.weight" else 0.1)
    return net.eval()


@torch.no_grad()
@pytest.mark.parametrize("name,changes,n", [("ar", {}, 0), ("ar", dict(mixer="attention", direction="causal"), 0)]
                         + [("block", changes, 1) for changes in BLOCKWISE.values()])
def test_probabilities_of_all_strings_sum_to_1(name, changes, n):
    nll = objective(name, n or 4).bound(network(n or 4, **changes), STRINGS, SEED()) * 4
    assert nll.neg().exp().sum().item() == pytest.approx(1, abs=1e-6 if "mixer" not in changes else 1e-5)


@pytest.mark.parametrize("name,net,cfg,words", [
    ("ar", {}, dict(likelihood="order"), "likelihood=order is for masked text"), ("task", {}, dict(likelihood="order"), "leave likelihood out"),
    ("ar", dict(self_cond=True), {}, "self_cond=1 is not for objective=ar"), ("b3d", dict(self_cond=True), {}, "leave self_cond out"),
    ("mixture", {}, dict(mask_policy="suffix"), "choose spans or independent"), ("gaussian", dict(gaussian=True), dict(token_evidence=True), "choose diffusion_mode=tokens"),
    *(("b3d", {key: value}, {}, f"leave .*{key}") for key, value in dict(ffn_shift="wide", observed_first=True, read_twice=True).items()),
    ("mixture", {}, dict(block_sizes=(1, 4)), "need next_weight > 0")])
def test_what_does_not_go_together(name, net, cfg, words):
    form = objective(name, **cfg)
    form.net_cfg = replace(form.net_cfg, **net)
    with pytest.raises(ValueError, match=words):
        form.check("causal" if form.causal else "bidirectional" if form.gaussian else "block")


def test_answers_in_several_calls_are_decided_surest_first():
    """A network that is sure of even places at first, and of odd ones from their left neighbours: all at once odd ones are wrong."""
    class Source:
        kind = "task"
        score = staticmethod(lambda x, predicted, masked: {"t_exact": float((predicted == x).all())})

    def net(x, lengths=None):
        calls.append(x.clone())
        logits = torch.zeros(*x.shape, 3)
        even = torch.arange(x.shape[1]) % 2 == 0
        logits[:, even, 1] = 9.0
        known = torch.where(even, False, x.roll(1, 1) == 1)
        logits[known] = torch.tensor([0.0, 0.0, 5.0])
        return diffusion.Logits(logits)
    x = torch.tensor([[1, 2, 1, 2, 1, 2]] * 3)
    rows = (x, torch.ones_like(x, dtype=torch.bool), None, None)
    for steps, right, number in ((1, 0.0, 1), (2, 1.0, 3), (0, 1.0, None)):
        calls, form = [], objective("task", answer_steps=steps)
        metrics, (_, _, predicted) = form.evaluate_answers(net, Source, rows, SEED(), 2)
        assert metrics["t_exact"] == right and (number is None or len(calls) == 2 * number), steps


@torch.no_grad()
@pytest.mark.parametrize("rule", diffusion.ORDERS)
@pytest.mark.parametrize("name,changes,n", [("masked_mean", dict(direction="bidirectional"), 4), ("elbo", dict(direction="alternate"), 4),
                                            ("masked_mean", dict(mixer="attention"), 4), ("block", dict(direction="block"), 2),
                                            ("block", dict(direction="alternate_block", ffn_shift="wide"), 3), ("b3d", {}, 2)])
def test_probabilities_in_any_fixed_order_sum_to_1(name, changes, n, rule):
    """The random order must be the same for all strings, as it is for a row that is sampled."""
    net, form = network(n, **changes), objective(name, n)
    nll = torch.cat([form.in_order(net, x[None], rule, SEED(7))[0] for x in STRINGS]) * 4
    assert nll.neg().exp().sum().item() == pytest.approx(1, abs=1e-5)
    if rule == "left_to_right" and name not in ("block", "b3d"):       # and left to right it is the chain rule, written out
        first, masked = 0.0, torch.ones(81, 4, dtype=torch.bool)
        for i in range(4):
            logits = form.through(net, STRINGS, masked).logits[:, i].log_softmax(-1)
            first, masked[:, i] = first - logits.gather(1, STRINGS[:, i:i + 1])[:, 0], False
        assert torch.allclose(nll, first.double(), atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name,n", [("elbo", 4), ("block", 2), ("block", 3), ("block", 4)])
def test_bounds_on_a_source_of_known_entropy(name, n):
    """The estimator against all masks, for an untrained network: the mean within 3 standard errors, and above the entropy."""
    net = network(n, direction="block" if name == "block" else "bidirectional")
    x = STRINGS[torch.multinomial(PROBABILITY, 4000, replacement=True, generator=SEED(1))]
    found, exact = objective(name, n).bound(net, x, SEED(2)), torch.zeros(81)
    spans = [(0, 4)] if name == "elbo" else [(i, min(i + n, 4)) for i in range(0, 4, n)]
    for lo, hi in spans:
        for k in range(1, hi - lo + 1):
            subsets = list(itertools.combinations(range(lo, hi), k))
            for s in subsets:
                masked = torch.zeros(81, 4, dtype=torch.bool)
                masked[:, list(s)] = True
                logits = net(mask_tokens(STRINGS, masked, 3)).logits if name == "elbo" else recomputed(net, STRINGS, masked, lo, hi)
                ce = torch.nn.functional.cross_entropy(logits.flatten(0, 1), STRINGS.flatten(), reduction="none").view(81, 4)
                exact += (ce * masked).sum(1) / k / len(subsets) / 4
    truth = (PROBABILITY * exact).sum()
    assert abs(found.mean() - truth) < 3 * found.std() / 4000**0.5
    assert truth > -(PROBABILITY * PROBABILITY.log()).sum() / 4


def recomputed(net, x, masked, lo, hi):
    """Logits of one block, its state from reading the clean text before it again."""
    state = net(x[:, :lo], finished_text=True).state if lo else None
    out = torch.zeros(*x.shape, 3)
    out[:, lo:hi] = net(mask_tokens(x, masked, 3)[:, lo:hi], state=state).logits
    return out


@torch.no_grad()
@pytest.mark.parametrize("name", BLOCKWISE)
@pytest.mark.parametrize("T", [12, 10, 4, 3])
def test_all_blocks_at_once_equal_block_by_block(name, T):
    """What training sees is what sampling sees: the state of finished text, carried from block to block."""
    net, x = network(**BLOCKWISE[name]), torch.randint(3, (2, T), generator=SEED(3))
    masked = torch.rand(2, T, generator=SEED(4)) < 0.6
    whole = objective("block").through(net, x, masked).logits
    noisy, state = mask_tokens(x, masked, 3), None
    for lo in range(0, T, 4):
        assert torch.allclose(net(noisy[:, lo:lo + 4], state=state).logits, whole[:, lo:lo + 4], atol=1e-5)
        assert torch.allclose(recomputed(net, x, masked, lo, min(lo + 4, T))[:, lo:lo + 4], whole[:, lo:lo + 4], atol=1e-5)
        state = net(x[:, lo:lo + 4], state=state, finished_text=True).state


@pytest.mark.parametrize("name", ["masked_mean", "ar", "block", "mixture", "b3d"])
@pytest.mark.parametrize("changes", [{}, dict(tie_embeddings=True, logit_cap=5.0)])
def test_losses_and_gradients_without_all_logits_at_once(name, changes, monkeypatch):
    """A network that gets targets against one that gives all logits, whose cross-entropies are taken here."""
    direction = dict(masked_mean="bidirectional", ar="causal", b3d="causal").get(name, "block")
    net, form = network(3, direction=direction, **changes), objective(name, 3, block_sizes=(3, 0), next_weight=0.5)
    x, masked = torch.randint(3, (4, 7), generator=SEED(3)), torch.rand(4, 7, generator=SEED(4)) < 0.6
    batch = diffusion.Batch(x, masked, torch.rand(4, 7), block=torch.tensor([3, 0, 3, 0]), learned=torch.ones_like(masked))
    monkeypatch.setattr(model, "MOST_LOGITS", 3 * 4)                   # four tokens at a time
    found = {}
    for kind, f in dict(targets=net, logits=WithLogits(net)).items():
        net.zero_grad()
        loss = form.loss(f, batch).sum()
        loss.backward()
        found[kind] = loss.item(), torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])
        with torch.no_grad():
            found[kind] += form.parts[3].bound(f, x, SEED(5)) if name == "mixture" else form.bound(f, x, SEED(5)),
    (a, da, bound), (b, db, other) = found.values()
    assert a == pytest.approx(b, rel=1e-5) and torch.allclose(da, db, atol=1e-5) and torch.allclose(bound, other, atol=1e-5)


class WithLogits:
    """A network that knows nothing of targets."""

    def __init__(self, net):
        self.net, self.reads_causally = net, net.reads_causally

    def __call__(self, x, targets=None, **options):
        return self.net(x, **options)


@pytest.mark.parametrize("name", ["masked_mean", "ar", "block", "mixture"])
def test_padding_and_what_is_given_are_not_learned(name):
    """Rows whose middle part is asked for: what comes after it has no effect, and the bound is about that part alone."""
    direction = dict(masked_mean="bidirectional", ar="causal").get(name, "block")
    net, form = network(3, direction=direction), objective(name, 3, block_sizes=(3, 0), next_weight=0.5)
    x, lengths = torch.randint(3, (4, 10), generator=SEED(3)), torch.tensor([10, 7, 5, 4])
    maskable = (torch.arange(10) >= 3) & (torch.arange(10) < lengths[:, None])
    other = x.masked_fill(torch.arange(10) >= lengths[:, None], 1)
    losses, bounds = [], []
    for z in (x, other):
        batch, total = form.noise(data.Rows(z, maskable, lengths), diffusion.Draw(SEED(4), 4, 0, 4, 10), 0)
        assert not (batch.masked & ~maskable).any()
        losses.append(form.loss(net, batch) / total)
        losses[-1].sum().backward()
        part = form.parts[3] if name == "mixture" else form
        bounds.append(part.bound(net, z, SEED(5), maskable, lengths))
    assert torch.allclose(losses[0], losses[1]) and torch.allclose(bounds[0], bounds[1], atol=1e-6)
    for i, n in enumerate(lengths.tolist()):                          # a row is what it is alone, without padding
        exact = form.parts[1] if name == "mixture" else form
        if name in ("ar", "mixture"):
            alone = exact.bound(net, x[i:i + 1, :n], None, maskable[i:i + 1, :n])
            assert torch.allclose(alone, exact.bound(net, x, None, maskable, lengths)[i], atol=1e-5)
    if name in ("ar", "mixture"):
        read = torch.nn.functional.pad(x[:1, :-1], (1, 0), value=3)    # the mask stands for the start
        nats = torch.nn.functional.cross_entropy(net(read, finished_text=True, block_size=1).logits[0, 3:], x[0, 3:])
        assert nats.item() == pytest.approx(exact.bound(net, x, None, maskable, lengths)[0].item(), abs=1e-5)


@torch.no_grad()
def test_finished_text_tells_next_tokens_whatever_predict_says():
    """So a network whose masks are predicted at the place before them learns the same next tokens as any other."""
    x = torch.randint(3, (2, 8), generator=SEED(3))
    same, other = network(4, direction="block"), network(4, direction="block", predict="next")
    other.load_state_dict(same.state_dict())
    assert torch.equal(same(x, finished_text=True).logits, other(x, finished_text=True).logits)
    assert not torch.equal(same(x).logits, other(x).logits)


@pytest.mark.parametrize("name", ["two-way, dw_jrt", "attention"])
def test_block_loss_reaches_every_parameter_and_no_later_block(name):
    net, x = network(**BLOCKWISE[name]), torch.randint(3, (2, 12), generator=SEED(3))
    masked = torch.rand(2, 12, generator=SEED(4)) < 0.6
    objective("block").loss(net, diffusion.Batch(x, masked, torch.ones(x.shape))).sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for n, p in net.named_parameters() if not n.endswith("blocks.0.att.v0"))
    before = objective("block").through(net, x, masked).logits
    for at in range(12):                                               # a clean token changes the blocks after its own, masked or not
        y = x.clone()
        y[:, at] = (y[:, at] + 1) % 3
        changed = (objective("block").through(net, y, masked | (torch.arange(12) == at)).logits
                   != objective("block").through(net, x, masked | (torch.arange(12) == at)).logits).any(-1).any(0)
        assert not changed[:(at // 4 + 1) * 4].any() and changed[(at // 4 + 1) * 4:].all()
    assert torch.isfinite(before).all()


@pytest.mark.parametrize("changes", [BLOCKWISE["two-way, dw_jrt"], BLOCKWISE["alternate, wide"], BLOCKWISE["attention"], BLOCKWISE["wide"]])
def test_a_mixture_is_its_specialists(changes):
    """Rows take block sizes in turn; loss, bound and samples of each are those of objective=block with that size, or of ar."""
    net, mixture = network(2, **changes), objective("mixture", 2, block_sizes=(1, 3, 0), next_weight=0.7)
    x, T = torch.randint(3, (9, 7), generator=SEED(3)), 7
    batch, total = mixture.noise(data.Rows(x, x >= 0), diffusion.Draw(SEED(1), 12, 3, 12, T), step=1)
    assert batch.block.tolist() == [3, 0, 1] * 3 and total.tolist() == [batch.masked.sum(), 54]
    assert not batch.masked[2::3].any() and batch.masked[:2].any(1).all() and not batch.masked[:2].all()
    alone = {1: objective("ar"), 3: objective("block", 3), 0: objective("block", T)}
    rows = [diffusion.Batch(*(None if z is None else z[i:i + 1] for z in batch)) for i in range(9)]
    parts = [alone[n].loss(net, row)[0] for n, row in zip(batch.block.tolist(), rows) if n != 1]
    found = mixture.loss(net, batch)
    assert torch.allclose(found[0], sum(parts), rtol=1e-5)
    after = [net(x[:, :i], finished_text=True, block_size=1).logits[:, -1].log_softmax(-1) for i in range(1, 7)]
    ahead = torch.stack(after, 1).gather(-1, x[:, 1:].unsqueeze(-1))
    assert torch.allclose(found[1], -0.7 * ahead.sum(), rtol=1e-4)
    halves = [mixture.loss(net, diffusion.Batch(*part)) for part in diffusion.split(4, *batch)]
    assert torch.allclose(sum(halves), found, rtol=1e-5)
    known, options = torch.rand(9, 7, generator=SEED(4)) < 0.3, dict(temperature=1.0)
    with torch.no_grad():
        for n in (1, 3, 0):
            assert torch.allclose(mixture.parts[n].bound(net, x, SEED(2)), alone[n].bound(net, x, SEED(2)), atol=1e-5)
        for asked, one in (("ar", {}), ("block", dict(block_size=3)), ("confidence", {})):
            y = mixture.fill(net, x, known, SEED(5), asked, **options)
            sized = Denoiser(replace(net.cfg, block_size=one.get("block_size", T))).eval()
            sized.load_state_dict(net.state_dict())
            assert torch.equal(y, SAMPLERS[asked](sized, x, known, 3, SEED(5), **one, **options)), asked
            assert (y[known] == x[known]).all() and (y < 3).all()


@pytest.mark.parametrize("name,n", [("masked_mean", 8), ("block", 3), ("mixture", 3)])
def test_soft_masks(name, n):
    """Where the first pass is sure, a mask is nearly the token; every second step is plain; sampling feeds each call's logits to the next."""
    net, form = network(n, direction="block", self_cond=True), objective(name, n, block_sizes=(3, 0))
    form.net_cfg.self_cond = True
    for part in getattr(form, "parts", {}).values():
        part.net_cfg.self_cond = True
    plain = network(n, direction="block")
    plain.load_state_dict(net.state_dict(), strict=False)
    x, masked = torch.randint(3, (2, 6), generator=SEED(3)), torch.tensor([[True, False] * 3] * 2)
    batch = diffusion.Batch(x, masked, torch.ones(x.shape), block=torch.tensor([3, 0]))
    losses = [form.loss(net, batch, step).sum() for step in (0, 1)]
    assert losses[0] == objective(name, n, block_sizes=(3, 0)).loss(plain, batch, 0).sum() != losses[1]
    losses[1].backward()
    assert net.soft_mask.grad.abs().min() > 0
    with torch.no_grad():
        net.soft_mask.copy_(torch.tensor([1.0, 50.0, 0.5]))            # s, k, c: nothing is left of a mask that is sure
        sure = torch.nn.functional.one_hot(x, 3) * 100.0
        assert torch.allclose(net(mask_tokens(x, masked, 3), x0_guess=sure).logits, net(x).logits, atol=1e-4)
        unsure = net(mask_tokens(x, masked, 3), x0_guess=torch.zeros(2, 6, 3)).logits
        assert torch.allclose(unsure, net(mask_tokens(x, masked, 3)).logits, atol=1e-4)
        seen = []
        spy = lambda z, **options: (seen.append(options.get("x0_guess")), net(z, **options))[1]
        form.fill(spy, x, ~masked, SEED(1), "topk" if name != "block" else "block", steps=3)
        assert seen[0] is None and any(guess is not None for guess in seen)


@torch.no_grad()
@pytest.mark.parametrize("name", ["two-way, dw_jrt", "attention"])
@pytest.mark.parametrize("B", [1, 8])
def test_the_cache_after_many_blocks_equals_reading_everything_again(name, B):
    """After 1, 10 and 100 blocks, with prompts of different lengths."""
    net, n = network(**BLOCKWISE[name]), 4
    start = torch.randint(1, 9, (B,), generator=SEED(5))
    text = torch.randint(3, (B, 8 + 100 * n), generator=SEED(6))
    probe, rows = torch.full((B, n), 3), torch.arange(B)[:, None]
    state = diffusion.prefix_state(net, text[:, :int(start.max())], start)
    for blocks in range(1, 101):
        piece = text[rows, start[:, None] + (blocks - 1) * n + torch.arange(n)]
        state = net(piece, state=state, finished_text=True).state
        if blocks in (1, 10, 100):
            cached = net(probe, state=state).logits
            for i, s in enumerate(start.tolist()):
                if "attention" in name:                                # its blocks count from where they began
                    fresh = net(text[i:i + 1, :s], finished_text=True).state
                    for lo in range(s, s + blocks * n, n):
                        fresh = net(text[i:i + 1, lo:lo + n], state=fresh, finished_text=True).state
                else:
                    fresh = net(text[i:i + 1, :s + blocks * n], finished_text=True).state
                assert (net(probe[:1], state=fresh).logits - cached[i]).abs().max() <= 1e-4


@torch.no_grad()
@pytest.mark.parametrize("n", [1, 3, 4, 16])
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("layout", ["block", "b3d"])
@pytest.mark.parametrize("inner", WHOLE)
def test_block_sampling_fills_everything_and_keeps_what_is_known(n, steps, layout, inner):
    net = network(n, **BLOCKWISE["causal" if layout == "b3d" else "two-way"])
    x, known = torch.randint(3, (3, 11), generator=SEED(8)), torch.zeros(3, 11, dtype=torch.bool)
    known[0, :5] = known[1, :2] = known[1, 7:9] = True                   # unequal prompts, one row with none, a known part further on
    sample = lambda: SAMPLERS["block"](net, x, known, 3, SEED(1), block_size=n, inner=inner, steps=steps, layout=layout)
    y = sample()
    assert y.shape == x.shape and (y[known] == x[known]).all() and ((0 <= y) & (y < 3)).all() and torch.equal(y, sample())


@torch.no_grad()
def test_samplers_stop_at_the_end_of_text():
    nothing = torch.zeros(2, 20, dtype=torch.bool)
    for name, net, options in (("block", network(4, direction="block"), dict(block_size=4)), ("ar", network(), {})):
        calls = []
        def denoise(*args, **kw):
            calls.append(1)
            return net(*args, **kw)
        y = SAMPLERS[name](denoise, nothing.long(), nothing, 3, SEED(1), eot=2, **options)
        for row in y.tolist():
            if 2 in row:
                assert set(row[row.index(2):]) == {2}
        assert (y != 3).all()


@torch.no_grad()
def test_ar_sampling_follows_the_exact_probabilities():
    net, nothing = network(), torch.zeros(20000, 4, dtype=torch.bool)
    rows = SAMPLERS["ar"](net, nothing.long(), nothing, 3, SEED(1))
    share = torch.bincount((STRINGS[:, None] == rows).all(-1).int().argmax(0), minlength=81) / 20000
    truth = (-4 * objective("ar").bound(net, STRINGS)).exp()
    assert (share - truth).abs().max() < 0.015 and (share - truth).abs().sum() < 0.12
