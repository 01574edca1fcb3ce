"""Schedules, objectives, the bound and the sampler against hand-computed and exhaustive cases."""
import itertools
import math

import pytest
import torch

from diffusion import OBJECTIVES, SAMPLERS, SCHEDULES, denoising_loss, draw, exact_count_bound, extend, mask_tokens, stratified

SEED = lambda n=0: torch.Generator().manual_seed(n)


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
    masked, weight, total = OBJECTIVES["masked_mean"](maskable, t, noise, "linear")
    assert torch.equal(masked, hidden) and weight == 1 and total == 3
    masked, weight, total = OBJECTIVES["elbo"](maskable, t, noise, "linear")
    assert torch.equal(masked, hidden) and weight.flatten().tolist() == [2, 4] and total == 7
    masked, _, total = OBJECTIVES["task"](maskable, t, noise, "linear")
    assert torch.equal(masked, maskable) and total == 7


def test_denoising_loss_by_hand():
    """Two symbols; the denoiser says 3/4 for symbol 1 wherever it is asked."""
    seen = []
    def denoise(x):
        seen.append(x)
        return torch.tensor([0.25, 0.75]).log().expand(*x.shape, 2)
    x, masked = torch.tensor([[1, 0, 1]]), torch.tensor([[True, True, False]])
    loss = denoising_loss(denoise, x, masked, torch.tensor([[2.0]]), 2)
    assert loss.item() == pytest.approx(2 * (-math.log(0.75) - math.log(0.25)))
    assert seen[0].tolist() == [[2, 2, 1]]


# A toy source: a Markov chain over 3 symbols, strings of length 4, whose exact conditionals make a perfect denoiser.
START, STEP = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.3, 0.3, 0.4]])
STRINGS = torch.tensor(list(itertools.product(range(3), repeat=4)))
PROBABILITY = START[STRINGS[:, 0]] * torch.stack([STEP[STRINGS[:, i], STRINGS[:, i + 1]] for i in range(3)]).prod(0)


def perfect(x):
    """The exact marginals of every token given the visible ones."""
    fits = ((x[:, None] == STRINGS) | (x[:, None] == 3)).all(-1) * PROBABILITY               # (B, 81)
    onehot = torch.nn.functional.one_hot(STRINGS, 3).float()
    return torch.einsum("bs,stv->btv", fits / fits.sum(1, keepdim=True), onehot).clamp_min(1e-12).log()


def exhaustive_bound(x):
    """The bound on -log p(x) / T of the perfect denoiser, over all subsets of masked positions, each count equally likely."""
    T, value = x.shape[1], torch.zeros(len(x))
    for k in range(1, T + 1):
        subsets = list(itertools.combinations(range(T), k))
        for s in subsets:
            masked = torch.zeros(x.shape, dtype=torch.bool)
            masked[:, list(s)] = True
            ce = -perfect(mask_tokens(x, masked, 3)).gather(-1, x[..., None])[..., 0]
            value += (ce * masked).sum(1) / k / len(subsets) / T
    return value


def test_the_bound_is_unbiased_and_above_the_entropy():
    x = STRINGS[torch.multinomial(PROBABILITY, 6000, replacement=True, generator=SEED(1))]
    found = exact_count_bound(perfect, x, 3, SEED(2))
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
    masked, weight, total = OBJECTIVES["elbo"](torch.ones_like(x, dtype=torch.bool), t, torch.rand(x.shape, generator=SEED(5)), schedule)
    value = denoising_loss(perfect, x, masked, weight, 3) / total
    assert value.item() == pytest.approx(exhaustive_bound(x).mean().item(), rel=0.03)


def test_draw_frequencies_temperature_and_top_k():
    logits = torch.tensor([0.6, 0.3, 0.1]).log().expand(1, 40000, 3)
    share = lambda **o: torch.bincount(draw(logits, generator=SEED(), **o)[0][0], minlength=3) / 40000
    assert torch.allclose(share(temperature=1.0, top_k=0), torch.tensor([0.6, 0.3, 0.1]), atol=0.01)
    sharp = torch.tensor([0.6, 0.3, 0.1]) ** 2
    assert torch.allclose(share(temperature=0.5, top_k=0), sharp / sharp.sum(), atol=0.01)
    assert torch.allclose(share(temperature=1.0, top_k=2), torch.tensor([2 / 3, 1 / 3, 0]), atol=0.01)
    token, sure = draw(logits, 0.0, 0, None)
    assert (token == 0).all() and torch.allclose(sure, torch.tensor(0.6, dtype=torch.float64))


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("length", [1, 5, 16])
@pytest.mark.parametrize("steps", [0, 1, 3, 7, 40])
def test_every_sampler_fills_everything_and_keeps_what_is_known(name, length, steps):
    x, known = torch.randint(7, (3, length), generator=SEED(8)), torch.rand(3, length, generator=SEED(9)) < 0.4
    known[0] = True                                                    # a row with nothing to do
    calls = []
    def denoise(z):
        calls.append(z)
        return torch.randn(*z.shape, 7, generator=SEED(int(z.sum())))
    sample = lambda: SAMPLERS[name](denoise, x, known, 7, SEED(10), steps=steps, threshold=0.8)
    y = sample()
    used = len(calls)
    assert (y[known] == x[known]).all() and ((0 <= y) & (y < 7)).all()
    assert used <= (min(steps, length) if steps else length)
    assert torch.equal(y, sample())


def test_confidence_follows_the_threshold():
    """A sure denoiser is done in one call, an unsure one takes a token a call."""
    x, known = torch.zeros(1, 6, dtype=torch.long), torch.zeros(1, 6, dtype=torch.bool)
    calls = []
    for scale, want in ((50.0, 1), (0.0, 6)):
        calls.clear()
        SAMPLERS["confidence"](lambda z: calls.append(1) or scale * torch.nn.functional.one_hot(z * 0 + 2, 4).float(), x, known, 4, SEED())
        assert len(calls) == want


def test_confidence_prefers_likely_strings():
    """Keeping the surest draw first sharpens: samples of a perfect denoiser are likelier than the source's own."""
    nothing = torch.zeros(4000, 4, dtype=torch.bool)
    rows = SAMPLERS["confidence"](perfect, nothing.long(), nothing, 3, SEED(1), threshold=1.1)
    assert PROBABILITY[(STRINGS[:, None] == rows).all(-1).int().argmax(0)].log().mean() > (PROBABILITY * PROBABILITY.log()).sum() + 0.2


def test_extend_goes_past_the_window():
    denoise = lambda z: torch.randn(*z.shape, 7, generator=SEED(int(z.sum())))
    prompt = torch.randint(7, (2, 5), generator=SEED(1))
    for n in (1, 8, 30):
        y = extend(denoise, prompt, n, 8, 7, SEED(2))
        assert y.shape == (2, 5 + n) and torch.equal(y[:, :5], prompt) and (y < 7).all()
