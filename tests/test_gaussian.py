"""Gaussian diffusion on embeddings against closed forms, a perfect denoiser, and the scripts."""
import json
import math
import os

import numpy as np
import pytest
import torch

import diffusion
from conftest import kill_after, ok
from diffusion import BETA_SCHEDULES, MODES, PREDICTIONS, SAMPLERS, DiffusionConfig, abar, amplitudes
from model import Denoiser, ModelConfig

SEED = lambda n=0: torch.Generator().manual_seed(n)
PLAIN = DiffusionConfig(noise_shift=1.0)


def network(V=7, **changes):
    torch.manual_seed(1)
    net = Denoiser(ModelConfig(**(dict(n_layer=2, n_embd=32, head_size=16, vocab_size=V, direction="bidirectional", time_cond="film", gaussian=True,
                                       tie_embeddings=True) | changes)))
    for p in net.parameters():             # away from the zeros of the initialisation
        p.data += 0.05 * torch.randn(p.shape)
    return net


class Perfect:
    """Knows the text x (B,T) and predicts what cfg asks for without an error."""

    def __init__(self, x, cfg, V=7, C=32):
        self.x, self.diffusion, self.cfg = x, cfg, ModelConfig(vocab_size=V)
        self.embeddings = torch.nn.functional.normalize(torch.randn(V, C, generator=SEED(8)), dim=-1) * C**0.5
        self.calls = []

    def table(self):
        return self.embeddings

    def __call__(self, x_t, t, lengths=None, x0_guess=None):
        self.calls.append(t)
        x0 = self.embeddings[self.x]
        a, s = amplitudes(t, self.diffusion)
        eps = (x_t / a - a * x0) / s.clamp_min(1e-9)
        logits = 50.0 * torch.nn.functional.one_hot(self.x, len(self.embeddings)).float()
        return type("Out", (), {"vector": PREDICTIONS[self.diffusion.prediction_type].target(x0, eps, a, s), "logits": logits})


# ---- schedules and conversions -------------------------------------------------------------------------------------------

def test_schedules_are_their_closed_forms():
    t = np.linspace(0, 1, 101)
    cosine = np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2 / np.cos(0.008 / 1.008 * np.pi / 2) ** 2
    sig = lambda z: 1 / (1 + np.exp(-z))
    ratio = -np.log(np.maximum(t, 1e-300))
    forms = {"linear": np.exp(-0.1 * t - 9.95 * t**2), "cosine": cosine, "sigmoid": (sig(3) - sig(6 * t - 3)) / (sig(3) - sig(-3)),
             "gumbel": np.where(t > 0, ratio / (1 + ratio), 1)}
    assert set(forms) == set(BETA_SCHEDULES)
    for name, form in forms.items():
        found = abar(torch.from_numpy(t), DiffusionConfig(beta_schedule=name, diffusion_steps=0, noise_shift=1.0))
        assert found.dtype == torch.float64 and np.abs(found.numpy() - np.clip(form, 1e-9, 1)).max() < 1e-12
        assert found[0] == 1 and (found.diff() < 0).all()
        shifted = abar(torch.from_numpy(t), DiffusionConfig(beta_schedule=name, diffusion_steps=0, noise_shift=5.0))
        ratio = (found / (1 - found))[1:-1] / (shifted / (1 - shifted))[1:-1]
        assert torch.allclose(ratio, torch.full_like(ratio, 25.0), rtol=1e-9)
    ddpm = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))              # its own discrete form
    found = abar(torch.arange(1, 1001) / 1000, DiffusionConfig(beta_schedule="linear", noise_shift=1.0)).numpy()
    assert np.abs(found - ddpm).max() < 0.005


def test_discrete_steps_round_up_and_wrong_levels_are_refused():
    cfg = DiffusionConfig(beta_schedule="linear", diffusion_steps=10, noise_shift=1.0)
    free = DiffusionConfig(beta_schedule="linear", diffusion_steps=0, noise_shift=1.0)
    found = abar(torch.tensor([0.0, 0.01, 0.1, 0.11, 0.2, 0.95, 1.0]), cfg)
    assert torch.allclose(found, abar(torch.tensor([0, 0.1, 0.1, 0.2, 0.2, 1, 1], dtype=torch.float64), free), rtol=1e-6)
    for bad in (-0.1, 1.5, math.nan):
        with pytest.raises(ValueError, match=r"not allowed: give values in \(0, 1\]"):
            abar(torch.tensor([0.5, bad]), cfg)


@pytest.mark.parametrize("name", PREDICTIONS)
def test_predictions_convert_exactly(name):
    x0, eps = torch.randn(2, 4, 5, 8, generator=SEED(), dtype=torch.float64)
    share = torch.rand(4, 5, 1, generator=SEED(1), dtype=torch.float64) * 0.98 + 0.01
    a, s = share.sqrt(), (1 - share).sqrt()
    x = a * x0 + s * eps
    assert torch.allclose(PREDICTIONS[name].x0(PREDICTIONS[name].target(x0, eps, a, s), x, a, s), x0, atol=1e-12)


# ---- the bound -----------------------------------------------------------------------------------------------------------

class Source:
    """Knows that tokens are drawn one by one with probabilities p, and nothing else: with token_evidence the best denoiser there is."""
    cfg = ModelConfig(vocab_size=2)

    def __init__(self, p, C=8):
        self.p, self.embeddings = torch.tensor(p), torch.tensor([[1.0], [-1.0]]).expand(2, C)

    def table(self):
        return self.embeddings

    def __call__(self, x_in, t, lengths=None, x0_guess=None):
        return type("Out", (), {"logits": self.p.log().expand(*x_in.shape[:2], 2)})


def integrated(p, cfg, n, C=8):
    """The bound of Source for two opposite embeddings, summed over all n steps, the noise integrated on a grid: prior, steps, tokens."""
    share = abar(torch.arange(1, n + 1) / n, cfg).numpy()[max(1, math.ceil(n * diffusion.LEAST - 1e-6)) - 1:]
    snr, grid = share / (1 - share), np.linspace(-9, 9, 4001)
    density = np.exp(-grid**2 / 2) / np.exp(-grid**2 / 2).sum()
    odds = lambda r: 2 * np.sqrt(r * C) * (np.sqrt(r * C) + grid)    # log odds of a token against the other from x_t alone, given the token
    error = lambda r: sum(q * (density * C * (1 - np.tanh((odds(r) + np.log(q / (1 - q))) / 2)) ** 2).sum() for q in p)
    steps = sum((snr[i - 1] - snr[i]) / 2 * error(snr[i]) for i in range(1, len(snr)))
    tokens = sum(q * (density * np.log1p(np.exp(-odds(snr[0]) - np.log(q / (1 - q))))).sum() for q in p)
    return 0.5 * C * (-share[-1] - np.log1p(-share[-1]) + share[-1]), steps, tokens


@pytest.mark.parametrize("schedule, shift", [("cosine", 2.0), ("gumbel", 2.0), ("linear", 1.0)])
@pytest.mark.parametrize("n, spread", [(50, 0.0), (1000, 0.0), (50, 3.0), (1000, 7.5)])
def test_the_bound_is_the_integral_and_for_the_best_denoiser_the_entropy(schedule, shift, n, spread):
    """What all noise levels together tell of a token is its entropy (I-MMSE: Guo, Shamai & Verdu 2005)."""
    p = (0.3, 0.7)
    cfg = DiffusionConfig(objective="gaussian", diffusion_mode="tokens", token_evidence=True, beta_schedule=schedule, noise_shift=shift, diffusion_steps=n,
                          noise_spread=spread)
    whole, entropy = integrated(p, cfg, n), -sum(q * math.log(q) for q in p)
    x = (torch.rand(4000, 6, generator=SEED()) > p[0]).long()
    nats, gains, levels = diffusion.Gaussian(cfg, Source.cfg).bound(Source(p), x, SEED(1), draws=20)
    exact = sum(whole)
    assert nats.mean().item() == pytest.approx(exact, abs=4 * nats.std().item() / 4000**0.5 + 1e-4)
    assert exact > entropy - 1e-6 and (n == 50 or exact < entropy + 0.01)
    assert gains.mean().item() == pytest.approx(whole[1], abs=5 * gains.std().item() / 480_000**0.5) and len(levels) == len(gains) == 480_000
    wrong = diffusion.Gaussian(cfg, Source.cfg).bound(Source((0.6, 0.4)), x, SEED(1), draws=20)[0]
    assert wrong.mean() > nats.mean() + 0.1                          # who believes in another source pays for it


@pytest.mark.parametrize("prediction, mode", [*((p, "mixed") for p in PREDICTIONS), ("x0", "tokens")])
def test_who_knows_the_text_pays_for_the_ends_alone(prediction, mode):
    cfg = DiffusionConfig(objective="gaussian", prediction_type=prediction, diffusion_mode=mode)
    x = torch.randint(7, (3, 12), generator=SEED(2))
    nats = diffusion.Gaussian(cfg, ModelConfig(vocab_size=7)).bound(Perfect(x, cfg), x, SEED(1))[0]
    assert (nats >= 0).all() and (nats < 0.01).all()


def test_fitted_noise_levels_are_those_that_were_put_in():
    """Gains as dense as the levels of beta_schedule=gumbel at noise_shift=4: found again, with scale 1."""
    share = abar(torch.linspace(0.0005, 0.9995, 2000), DiffusionConfig(beta_schedule="gumbel", noise_shift=4.0, diffusion_steps=0))
    found = diffusion.level_fit(torch.log(1 / share - 1), torch.ones(2000))
    assert found["fitted_noise_shift"] == pytest.approx(4, rel=0.02) and found["fitted_scale"] == pytest.approx(1, rel=0.02)


# ---- samplers --------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("rule", ["ddpm", "ddim"])
@pytest.mark.parametrize("prediction, mode", [*((p, "mixed") for p in PREDICTIONS), ("x0", "diffusion"), ("x0", "tokens")])
@pytest.mark.parametrize("steps, eta, clamp", [(1, 0.0, False), (7, 0.0, False), (7, 0.5, True), (100, 1.0, False)])
def test_a_perfect_denoiser_gives_the_text(rule, prediction, mode, steps, eta, clamp):
    cfg = DiffusionConfig(prediction_type=prediction, diffusion_mode=mode, diffusion_steps=100)
    x = torch.randint(7, (3, 12), generator=SEED(2))
    net, known = Perfect(x, cfg), torch.rand(3, 12, generator=SEED(3)) < 0.3
    given = torch.where(known, x, 7)
    y = SAMPLERS[rule](net, given, known, 7, SEED(4), cfg=cfg, steps=steps, eta=eta, clamp=clamp)
    assert torch.equal(y, x) and len(net.calls) == steps
    assert all((t[known] == 0).all() and (t[~known] > 0).all() for t in net.calls)


def test_ddim_keeps_the_noise_it_was_given():
    """Deterministic DDIM with a perfect x_0 goes along x_s = sqrt(abar_s) x_0 + sqrt(1 - abar_s) eps, and ends in x_0 exactly."""
    x0, eps = torch.randn(2, 3, 4, 8, generator=SEED(), dtype=torch.float64)
    x, at = 0.3**0.5 * x0 + 0.7**0.5 * eps, 0.3
    for as_ in (0.5, 0.9, 1.0):
        x = diffusion.ddim(x0, x, at, as_, 0.0, None)
        assert torch.allclose(x, as_**0.5 * x0 + (1 - as_) ** 0.5 * eps, atol=1e-12)
        at = as_
    assert torch.allclose(x, x0, atol=1e-12)


@pytest.mark.parametrize("at, as_", [(0.3, 0.6), (1e-4, 0.01), (0.9, 1.0)])
def test_ddpm_has_its_mean_and_variance_and_ddim_1_the_same(at, as_):
    x0, x_t = torch.full((200_000, 1, 1), 1.5, dtype=torch.float64), torch.full((200_000, 1, 1), -0.7, dtype=torch.float64)
    beta = 1 - at / as_
    mean = (math.sqrt(as_) * beta * 1.5 + math.sqrt(at / as_) * (1 - as_) * -0.7) / (1 - at)
    var = beta * (1 - as_) / (1 - at)
    for x in (diffusion.ddpm(x0, x_t, at, as_, 0.0, SEED(1)), diffusion.ddim(x0, x_t, at, as_, 1.0, SEED(2))):
        assert x.mean().item() == pytest.approx(mean, abs=4 * math.sqrt(var / 2e5) + 1e-12)
        assert x.var().item() == pytest.approx(var, rel=0.02, abs=1e-12)


@pytest.mark.parametrize("self_cond", [False, True])
def test_guidance(self_cond):
    """1 is no guidance, bit for bit; 0 ignores what is given; known tokens stay at any scale."""
    net = network(self_cond=self_cond).eval()
    cfg = DiffusionConfig(diffusion_steps=20)
    x = torch.randint(7, (2, 10), generator=SEED(2))
    known = torch.arange(10).expand(2, -1) < 4
    run = lambda **o: SAMPLERS["ddim"](net, x, known, 7, SEED(5), cfg=cfg, steps=5, **o)
    with torch.no_grad():
        assert torch.equal(run(), run(guidance=1.0))
        assert any(not torch.equal(run(), run(guidance=g)) for g in (0.0, 4.0, 20.0))
        for g in (0.0, 3.0):
            y = run(guidance=g)
            assert torch.equal(y[known], x[known]) and (y < 7).all()
    with pytest.raises(ValueError, match="conditions dropped"):
        SAMPLERS["ddim"](net, x, known, 7, SEED(5), cfg=DiffusionConfig(drop_given=0.0), steps=5, guidance=2.0)
    with pytest.raises(ValueError, match="steps=21 is more than the diffusion_steps=20"):
        SAMPLERS["ddpm"](net, x, known, 7, SEED(5), cfg=cfg, steps=21)


# ---- loss ------------------------------------------------------------------------------------------------------------------

def gaussian(cfg):
    return diffusion.Gaussian(cfg, ModelConfig(vocab_size=7))


@pytest.mark.parametrize("mode", MODES)
def test_the_loss_of_a_perfect_denoiser_is_its_rounding(mode):
    cfg = DiffusionConfig(diffusion_mode=mode, token_loss_weight=0.5)
    x, masked = torch.randint(7, (3, 12), generator=SEED(2)), torch.rand(3, 12, generator=SEED(3)) < 0.5
    net = Perfect(x, cfg)
    eps = torch.randn(3, 12, 32, generator=SEED(4))
    value = gaussian(cfg).loss(net, diffusion.Batch(x, masked, 0.7 * masked, eps=eps))
    logits = 50.0 * torch.nn.functional.one_hot(x, 7) if mode == "tokens" else net.embeddings[x] @ net.embeddings.T / 32**0.5
    ce = torch.nn.functional.cross_entropy(logits[masked].float(), x[masked], reduction="sum")
    assert value.item() == pytest.approx({"diffusion": 0.0, "mixed": 0.5 * ce.item(), "tokens": ce.item()}[mode], rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("changes", [{}, dict(self_cond=True), dict(mixer="biwkv", time_cond="none", norm="rms"), dict(mixer="attention")])
@pytest.mark.parametrize("mode", MODES)
def test_gradients_reach_what_should_learn(changes, mode):
    net, cfg = network(**changes), DiffusionConfig(diffusion_mode=mode)
    x, eps = torch.randint(7, (4, 9), generator=SEED(2)), torch.randn(4, 9, 32, generator=SEED(4))
    masked = torch.ones(4, 9, dtype=torch.bool)
    levels = torch.rand(4, 9, generator=SEED(6)).clamp_min(0.05)
    gaussian(cfg).loss(net, diffusion.Batch(x, masked, levels, eps=eps)).backward()
    idle = {n for n, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum()}
    assert not {n for n in idle if not (mode == "tokens" and n.startswith("vector.")) and not n.endswith(".v0")}, idle
    assert (net.emb.weight.grad[:-1].abs().sum(1) > 0).all() and net.emb.weight.grad[-1].abs().sum() == 0


def test_given_tokens_are_clean_and_rows_alone_are_rows_together():
    """What is given enters without noise at level 0; padding changes nothing."""
    net = network(time_cond="adaln_zero").eval()
    x = torch.randint(7, (2, 10), generator=SEED(2))
    t = torch.full((2, 10), 0.6)
    t[:, :3] = 0
    eps = torch.randn(2, 10, 32, generator=SEED(4))
    x0, x_t = diffusion.embedded(x, t, eps, net.table(), PLAIN)
    assert torch.equal(x_t[:, :3], x0[:, :3]) and not torch.equal(x_t[:, 3:], x0[:, 3:])
    assert torch.allclose(net.table().norm(dim=-1), torch.full((7,), 32**0.5), rtol=1e-5)
    with torch.no_grad():
        for changed in ({}, dict(mixer="biwkv"), dict(direction="alternate")):
            net = network(**changed).eval()
            both = net(x_t, t=t, lengths=torch.tensor([10, 6])).vector
            alone = net(x_t[1:, :6], t=t[1:, :6]).vector
            assert torch.allclose(both[1:, :6], alone, atol=1e-5)


def test_the_report_sees_a_collapse():
    cfg, x = DiffusionConfig(), torch.randint(7, (16, 20), generator=SEED(2))
    masked = torch.ones_like(x, dtype=torch.bool)
    net = Perfect(x, cfg)
    net.emb = torch.nn.Embedding(8, 32)
    found, alarm = diffusion.gaussian_report(net, x, masked, None, SEED(3), cfg)
    assert not alarm and found["round_acc_0.2"] == found["round_acc_1.0"] == 1 and found["mse_0.5"] < 1e-6 and found["drift_0.5"] < 1e-4
    wrong = Perfect(torch.zeros_like(x), cfg)
    wrong.emb = net.emb
    _, alarm = diffusion.gaussian_report(wrong, x, masked, None, SEED(3), cfg)
    assert "COLLAPSE" in alarm and "one token" in alarm and "token_loss_weight" in alarm
    net.embeddings = net.embeddings[:1] + 0.2 * net.embeddings           # told apart still, at the lowest level
    net.embeddings = torch.nn.functional.normalize(net.embeddings, dim=-1) * 32**0.5
    _, alarm = diffusion.gaussian_report(net, x, masked, None, SEED(3), DiffusionConfig(diffusion_mode="tokens"))
    assert "one direction" in alarm


# ---- the scripts -----------------------------------------------------------------------------------------------------------

TINY = dict(STRUCT_TASK=1, N_LAYER=2, N_EMBD=32, HEAD_SIZE=16, BATCH_SIZE=4, STRUCT_EVAL_N=6, THREADS=1, OBJECTIVE="gaussian", DTYPE="fp32")


def log_of(folder):
    with open(os.path.join(folder, "log.jsonl")) as f:
        return [json.loads(line) for line in f]


def test_train_resume_and_sample(run, tmp_path):
    """With the average of the weights, a curriculum, frozen embeddings that thaw: killed and resumed it is the same run."""
    more = dict(MAX_ITERS=8, EVAL_INTERVAL=3, EMA=0.5, WARMDOWN_ITERS=5, FREEZE="emb", UNFREEZE_AFTER_STEPS=4, UNFREEZE_PATTERNS="emb", NOISE_LEVELS="0.4,1",
                SELF_COND=1, LOG_INTERVAL=1)
    shown = ok(run("train.py", "--out_dir=whole", **TINY | more))
    assert "step 4:" in shown and "from here on" in shown
    for step in (3, 6):                        # before and after the embeddings thaw
        kill_after(run, step, "cut", TINY | more | (dict(INIT_FROM="resume") if step > 3 else {}))
    ok(run("train.py", "--out_dir=cut", "--init_from=resume"))
    loss = lambda d: {row["step"]: row["loss"] for row in log_of(tmp_path / d) if row["event"] == "train"}
    assert loss("cut").keys() == loss("whole").keys() and loss("cut") == loss("whole")
    a, b = (torch.load(tmp_path / d / "ckpt.pt", weights_only=True) for d in ("whole", "cut"))
    assert all(torch.equal(a["averaged"][k], b["averaged"][k]) for k in a["averaged"])
    assert not torch.equal(a["averaged"]["module.ln_out.weight"], a["model"]["ln_out.weight"])
    last = log_of(tmp_path / "whole")[-1]
    assert {"mse_0.2", "ce_0.2", "round_acc_0.2", "drift_1.0", "cosine_0.5", "embedding_norm_mean", "struct_exact"} <= last.keys()
    for options in ((), ("--sampler=ddpm", "--temperature=0.7", "--top_p=0.9", "--guidance=2", "--clamp=1"), ("--eta=0.5", "--steps=3", "--watch=1", "--watch_delay=0")):
        assert "struct: accuracy" in ok(run("sample.py", "--ckpt=whole/ckpt.pt", "--num_samples=2", *options))
    for options, words in ((["--steps=2000"], "diffusion_steps=1000"), (["--sampler=confidence"], "sampler=confidence is not for"),):
        done = run("sample.py", "--ckpt=whole/ckpt.pt", *options)
        assert done.returncode == 2 and words in done.stderr, done.stderr[-300:]


def test_text_and_its_errors(run, tmp_path):
    (tmp_path / "input.txt").write_text("the cat sat on the mat. a dog sat on the log.\n" * 100)
    small = dict(DATA_PATH="input.txt", SEQ_LEN=32, N_LAYER=2, N_EMBD=32, HEAD_SIZE=16, BATCH_SIZE=8, MAX_ITERS=3, EVAL_ITERS=1, THREADS=1, TOKENIZER="char",
                 OBJECTIVE="gaussian")
    ok(run("train.py", **small | dict(DROP_GIVEN=0)))
    shown = ok(run("sample.py", "--text=the c__ sat", "--num_samples=1", "--seed=3", "--steps=4"))
    line = next(line for line in shown.splitlines() if line.startswith("the c"))
    assert len(line) == 11 and line.endswith(" sat") and "_" not in line
    done = run("sample.py", "--text=the c__ sat", "--guidance=2")
    assert done.returncode == 2 and "conditions dropped" in done.stderr
    for options, words in ((["--beta_schedule=square"], "linear, cosine, sigmoid"), (["--prediction_type=x1"], "epsilon, x0, v_prediction"),
                           (["--diffusion_mode=all"], "diffusion, mixed, tokens"), (["--freeze=head9"], "matches no parameter"),
                           (["--noise_levels=0.5,2"], "must be in (0, 1]"), (["--ema=1"], "must be in [0, 1)"), (["--time_cond=none"], "must know the noise level"),
                           (["--direction=block"], "whole rows"), (["--objective=elbo", "--gaussian=1", "--time_cond=add"], "gaussian=0")):
        done = run("train.py", *options, "--out_dir=bad", **{k: v for k, v in small.items() if f"--{k.lower()}=" not in options[0]})
        assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr, (options, done.stderr[-500:])
    # Embeddings that are no numbers are named before anything is trained on them.
    saved = torch.load(tmp_path / "out/ckpt.pt", weights_only=True)
    saved["model"]["emb.weight"][2, 3] = math.nan
    torch.save(saved, tmp_path / "nan.pt")
    done = run("sample.py", "--ckpt=nan.pt", "--text=the c__ sat")
    assert done.returncode == 2 and "emb.weight" in done.stderr and "NaN" in done.stderr


@torch.no_grad()
@pytest.mark.parametrize("evidence", [False, True])
def test_tokens_on_their_way_are_seen_by_their_own_evidence_alone(evidence):
    """With noise_spread and evidence the estimate of a token does not depend on the noise of another one that is between noise and text."""
    net = Denoiser(ModelConfig(n_layer=1, n_embd=32, vocab_size=9, gaussian=True, time_cond="add", direction="bidirectional", tie_embeddings=True)).eval()
    for p in net.parameters():
        p.data += 0.2 * torch.randn_like(p)
    cfg = diffusion.DiffusionConfig(objective="gaussian", diffusion_mode="tokens", token_evidence=evidence, noise_spread=8.0, diffusion_steps=0)
    x, t = torch.randint(9, (1, 6)), torch.tensor([[0.0, 0.4, 0.5, 1.0, 0.03, 0.6]])
    found = []
    for seed in (1, 2):
        eps = torch.randn(1, 6, 32, generator=SEED(1))
        eps[:, 2] = torch.randn(32, generator=SEED(seed))
        _, x_t = diffusion.embedded(x, t, eps, net.table(), cfg)
        found.append(diffusion.estimate(net, x_t, t, net.table(), cfg))
    same = (found[0].logits == found[1].logits).all(-1)[0].tolist()
    assert same == ([True, True, False, True, True, True] if evidence else [False] * 6)
    assert torch.equal(found[0].guess, found[1].guess) == evidence
