"""Text and latent: the prefix that may be absent, pretrained weights, objectives, samplers, folders, and what is refused."""
import json
import os
import random
import subprocess
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

import data
import diffusion
import model as nets
from conftest import kill_after, ok
from test_model import official
from test_pairs import WORDS

SMALL = nets.ModelConfig(n_layer=2, n_embd=32, head_size=16, vocab_size=11, direction="bidirectional", time_cond="film", time_inputs=2, latent_dim=5)
DIFF = diffusion.DiffusionConfig()


def opened(net):
    """Zero-initialised parameters get values, so that everything matters."""
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn(p.shape))
    return net.eval()


def generator(seed=1):
    return torch.Generator().manual_seed(seed)


WAYS = [{}, dict(direction="causal", latent_pred_from="text"), dict(mixer="attention", direction=""), dict(mixer="biwkv", direction=""), dict(dw_jrt=True),
        dict(ffn_shift="both"), dict(direction="alternate"), dict(predict="next"), dict(time_cond="adaln_zero", latent_prefix_len=1), dict(mixer="rwkv7,attention", norm="rms")]


@pytest.mark.parametrize("changes", WAYS, ids=str)
@torch.no_grad()
def test_a_row_without_a_latent_is_a_row_of_plain_text(changes):
    """Rows of zeros beside rows with latents, of several lengths: as if the prefix were not there; and a row alone is the row in a batch."""
    net = opened(nets.Denoiser(replace(SMALL, **changes)))
    x, lengths = torch.randint(12, (4, 9)), torch.tensor([9, 4, 9, 6])
    z, s = torch.randn(4, 5), torch.tensor([0.3, 0.7, 0.0, 1.0])
    z[1:3] = 0
    out, plain = net(x, latent=z, latent_t=s, lengths=lengths), net(x, latent_t=s, lengths=lengths)
    for i, n in enumerate(lengths):
        assert torch.allclose(out.logits[i, :n], plain.logits[i, :n], atol=1e-5) == (i in (1, 2))
        alone = net(x[i:i + 1, :n], latent=z[i:i + 1], latent_t=s[i:i + 1])
        assert torch.allclose(alone.logits[0], out.logits[i, :n], atol=1e-5)
        assert torch.allclose(alone.latent[0], out.latent[i], atol=1e-5)
    assert out.logits.shape == (4, 9, 11) and out.latent.shape == (4, 5) and out.hidden.shape == (4, 9, 32)


@pytest.mark.parametrize("seen", ["text", "prefix", "both"])
def test_what_the_latent_is_predicted_from(seen):
    """In a network of no layers that mix, `text` cannot see the latent and `prefix` cannot see the text."""
    net = opened(nets.Denoiser(replace(SMALL, latent_pred_from=seen)))
    for block in net.blocks:
        for p in (block.att.output.weight, block.ffn.value.weight):
            p.data.zero_()
    x, z = torch.randint(11, (1, 6)), torch.randn(1, 5)
    base = net(x, latent=z).latent
    assert torch.equal(net(x, latent=2 * z).latent, base) == (seen == "text")
    assert torch.equal(net((x + 1) % 11, latent=z).latent, base) == (seen == "prefix")


@pytest.mark.parametrize("kind", ["pth", "safetensors"])
@torch.no_grad()
def test_pretrained_logits_are_unchanged_at_first(tmp_path, kind):
    """Official weights, two-way, film, a latent prefix and guidance 1: what the causal network says, bit for bit without latents."""
    plain = opened(nets.Denoiser(nets.ModelConfig(n_layer=2, n_embd=32, head_size=16, vocab_size=11)))
    path = str(tmp_path / f"x.{kind}")
    if kind == "pth":
        torch.save(official(plain), path)
    else:
        pytest.importorskip("safetensors.torch").save_file({k: v.contiguous() for k, v in official(plain).items()}, path)
    net = nets.from_pretrained(path, direction="bidirectional", time_cond="film", time_inputs=2, latent_dim=5, predict="next").eval()
    x = torch.randint(11, (3, 8))
    said, known = plain(x).logits, net(x).logits
    assert torch.equal(known[:, 1:], said[:, :-1])                      # position t holds what the AR network says after t tokens
    for guidance in (1.0, 3.0):
        denoise = diffusion.with_latent(net, torch.zeros(3, 5), guidance)
        assert torch.allclose(denoise(x).logits[:, 1:], said[:, :-1], atol=1e-5)
    assert not torch.allclose(diffusion.with_latent(net, torch.ones(3, 5))(x).logits[:, 1:], said[:, :-1], atol=1e-3)


def test_closed_forms():
    mu, logvar, pm, pl = torch.randn(4, 50, 3).double()
    std = lambda v: (v / 2).exp()
    mine = diffusion.kl_divergence(mu, logvar, pm, pl)
    assert torch.allclose(mine, kl_divergence(Normal(mu, std(logvar)), Normal(pm, std(pl))))
    zero = torch.zeros_like(mu)
    assert torch.allclose(diffusion.kl_divergence(mu, logvar, zero, zero), 0.5 * (mu**2 + logvar.exp() - logvar - 1))
    assert diffusion.kl_divergence(mu, logvar, mu, logvar).abs().max() < 1e-12
    z = torch.randn(6, 4)
    turn = torch.linalg.qr(torch.randn(4, 4))[0]
    assert diffusion.geometry(3 * z @ turn + 1, z).max() < 1e-8             # distances in proportion
    assert diffusion.geometry(z, torch.randn(6, 9)).min() > 1e-3
    by_hand = torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([[0.0], [2.0], [3.0]])      # 1, 3, 2 of mean 2; 2, 3, 1 of mean 2
    assert torch.allclose(diffusion.geometry(*by_hand), torch.tensor([0.25, 0.5, 0.25]) / 2, atol=1e-4)


def coupled(name, cfg):
    return diffusion.OBJECTIVES[name](replace(cfg, objective=name), SMALL)


def test_reparameterisation_and_the_terms_of_stage_ii():
    """Against the definition, from a network that says what it was given; gradients reach mu, logvar and the prior."""
    mu, logvar = torch.randn(2, 6, 5, requires_grad=True).unbind()
    prior, seen = [torch.zeros(5, requires_grad=True), torch.zeros(5, requires_grad=True)], {}

    class Net:
        mask_id, latent_prior = 11, SimpleNamespace(mu=prior[0], logvar=prior[1])
        posterior = staticmethod(lambda x, lengths: (mu, logvar, x[:, :3].float()))

        def __call__(self, x, latent, latent_t, lengths, targets=None):
            seen.update(x=x, z=latent, t=latent_t)
            return SimpleNamespace(logits=latent.sum() + torch.zeros(6, 7, 11))
    x, masked, eps = torch.randint(11, (6, 7)), torch.rand(6, 7) < 0.5, torch.randn(6, 5)
    s = torch.tensor([0.0, 1, 0, 0, 0, 0])
    cfg = replace(DIFF, kl_weight=0.5, kl_warmup=4, geom_weight=2.0, free_bits=0.0)
    batch = diffusion.Batch(x, masked, torch.ones(x.shape), s=s, z_eps=eps)
    terms = lambda step=99, **more: coupled("stage2_variational", replace(cfg, **more)).loss(Net(), batch, step)
    got = terms()
    assert torch.allclose(seen["z"], (mu + (logvar / 2).exp() * eps) * (1 - s[:, None])) and (seen["z"][1] == 0).all() and (seen["t"] == 0).all()
    assert torch.equal(seen["x"], torch.where(masked, 11, x))
    kl = diffusion.kl_divergence(mu, logvar, *prior)
    assert got[0].item() == pytest.approx(masked.sum().item() * np.log(11), rel=1e-5)
    assert torch.allclose(got[1], 0.5 * kl.sum() / 7) and torch.allclose(got[2], 2 * diffusion.geometry(mu, x[:, :3].float()).sum())
    assert torch.allclose(terms(step=0)[1], 0.125 * kl.sum() / 7) and terms(geom_weight=0.0)[2] == 0            # warm-up: a quarter of it
    assert torch.allclose(terms(free_bits=2.0)[1], 0.5 * kl.clamp_min(2).sum() / 7)
    own = torch.autograd.grad(0.5 * kl.sum() / 7, prior, retain_graph=True)
    for bits in (0.0, 50.0):                                               # what is free for the encoder is not for the prior
        found = torch.autograd.grad(terms(free_bits=bits)[1], prior, retain_graph=True)
        assert all(torch.allclose(a, b, atol=1e-6) and a.abs().min() > 0 for a, b in zip(found, own))
    assert not torch.autograd.grad(terms(free_bits=50.0)[1], mu, retain_graph=True)[0].any()
    assert torch.allclose(torch.autograd.grad(got[1], mu)[0], torch.autograd.grad(0.5 * kl.sum() / 7, mu)[0])


@pytest.mark.parametrize("mode", ["stage1_coupling", "l2t", "t2l"])
def test_modes_noise_and_learn_what_they_say(mode):
    """The two terms by hand; gradients reach what a mode uses and nothing that it calls unused."""
    net, how = opened(nets.Denoiser(SMALL)), diffusion.COUPLINGS[mode]
    x, z = torch.randint(11, (64, 7)), torch.randn(64, 5)
    z[3] = 0                                                               # a text without a latent
    t, u, s = torch.rand(64), torch.rand(64, 7), torch.rand(64)
    cfg = replace(DIFF, drop_given=0.25, latent_loss_weight=3.0, sequential_schedule=f"{mode}:1", mode_weights=(2.0,))
    objective = coupled("sequential", cfg)
    masked, total, z_in, s_in = objective.couple(torch.ones(64, 7, dtype=torch.bool), t, u, z, s, mode)
    dropped = s * 4096 % 1 < 0.25
    assert 4 < dropped.sum() < 30 and (s_in == 0).all() == (mode == "l2t")
    assert ((z_in == 0).all(1) == (dropped & how.text | (z == 0).all(1))).all()
    assert torch.equal(masked, (u < t[:, None]) if how.text else dropped[:, None].expand(64, 7))
    assert total.tolist() == [masked.sum(), (z_in != 0).any(1).sum()]
    eps = torch.randn(64, 5)
    got = objective.loss(net, diffusion.Batch(x, masked, torch.ones(x.shape), z=z_in, s=s_in, z_eps=eps))
    a = diffusion.cosine_beta(s_in.double().mul(1000).ceil() / 1000).clamp(1e-9, 1).sqrt().float()[:, None]
    has = (z_in != 0).any(1)
    out = net(x.masked_fill(masked, 11), latent=a * (a * z_in + (1 - a**2).sqrt() * eps) * has[:, None], latent_t=s_in)
    text = torch.nn.functional.cross_entropy(out.logits[masked], x[masked], reduction="sum")
    latent = (out.latent - z_in).square().mean(1)[has].sum()
    assert torch.allclose(got, torch.stack([2 * text * how.text, 6 * latent * how.latent]), rtol=1e-4)
    got.sum().backward()
    names = {name for name, p in net.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert ("head.weight" in names) == how.text and any("latent_head" in n for n in names) == how.latent
    assert {"latent_prefix.project.weight", "latent_prefix.type_emb", "emb.weight", "blocks.0.cond.proj.weight"} <= names


def test_sequential_goes_round():
    cfg = replace(DIFF, sequential_schedule="l2t:2,t2l:1", mode_weights=(1, 0.5))
    assert [coupled("sequential", cfg).mode(i) for i in range(4)] == [("l2t", 1), ("l2t", 1), ("t2l", 0.5), ("l2t", 1)]
    assert coupled("t2l", cfg).mode(7) == ("t2l", 1)
    for bad in ("l2t", "l2t:0", "x:3", "stage2_variational:1", "l2t:-1", ""):
        with pytest.raises(ValueError, match="MODE:STEPS"):
            diffusion.read_schedule(replace(cfg, sequential_schedule=bad))
    assert diffusion.read_schedule(replace(cfg, mode_weights=(2.0,))) == [("l2t", 2, 2.0), ("t2l", 1, 2.0)]
    with pytest.raises(ValueError, match="one for each of the 2 parts"):
        diffusion.read_schedule(replace(cfg, mode_weights=(1.0, 1.0, 1.0)))


class Knows:
    """A network that knows the latent z and the text x, whatever noisy things it is given."""
    mask_id, latent_encoder = 11, None

    def __init__(self, x, z):
        self.x, self.z, self.calls = x, z, []
        self.latent_prefix = SimpleNamespace(mean=torch.zeros(z.shape[1]), std=torch.ones(()), restore=lambda q: 2 * q + 1, normalise=lambda q: (q - 1) / 2)

    def __call__(self, x, latent=None, latent_t=None, lengths=None, targets=None):
        self.calls.append((x, latent, latent_t))
        rows = len(x) // len(self.x)
        logits = 50 * torch.nn.functional.one_hot(self.x, 11).float().repeat(rows, 1, 1)
        return SimpleNamespace(logits=logits, latent=self.z.repeat(rows, 1))


@pytest.mark.parametrize("steps, eta, lead, rule", [(1, 0.0, 1.0, "topk"), (7, 0.0, 0.0, "topk"), (10, 1.0, 1.0, "confidence"), (6, 0.0, 0.5, "ancestral"),
                                                    (33, 0.5, 1.0, "first_hitting")])
def test_a_perfect_network_gives_text_and_latent(steps, eta, lead, rule):
    x, z = torch.randint(11, (3, 13)), torch.randn(3, 4)
    net = Knows(x, z)
    text, latent = diffusion.sample_joint(net, 3, 13, generator(), DIFF, steps, lead, rule, eta)
    assert torch.equal(text, x) and torch.allclose(latent, 2 * z + 1, atol=1e-5) and len(net.calls) == steps
    levels = torch.stack([c[2] for c in net.calls])[:, 0]
    share = torch.stack([(c[0] == 11).float().mean() for c in net.calls])
    assert levels[0] == 1 and share[0] == 1 and (levels.diff() <= 0).all() and (share.diff() <= 0).all()
    if lead == 1 and steps > 6:
        assert (share[:steps // 2] == 1).all() and (levels[-(steps // 2):] == 0).all()
    assert torch.allclose(diffusion.sample_latent_from_text(net, x, generator(), DIFF, steps, eta, guidance=2.0), 2 * z + 1, atol=1e-5)
    got = diffusion.sample_text_from_latent(net, 2 * z + 1, 13, generator(), DIFF, rule, steps=steps)
    assert torch.equal(got, x) and torch.allclose(net.calls[-1][1], z)


@torch.no_grad()
def test_samplers_of_a_real_network():
    """No mask is left, the same seed gives the same, guidance 1 is no guidance bit for bit, given tokens stay, temperature 0 is sure."""
    net = opened(nets.Denoiser(SMALL))
    z, x = torch.randn(3, 5), torch.randint(11, (3, 12))
    l2t = lambda **more: diffusion.sample_text_from_latent(net, z, 12, generator(), DIFF, **more)
    assert torch.equal(l2t(), l2t(guidance=1.0)) and (l2t() < 11).all() and not torch.equal(l2t(), l2t(guidance=5.0))
    known = torch.rand(3, 12) < 0.4
    assert torch.equal(l2t(x=x, known=known)[known], x[known])
    t2l = lambda seed=1, **more: diffusion.sample_latent_from_text(net, x, generator(seed), DIFF, 5, **more)
    assert torch.equal(t2l(), t2l(guidance=1.0)) and not torch.equal(t2l(), t2l(guidance=2.0)) and not torch.equal(t2l(), t2l(seed=2))
    assert torch.allclose(t2l(temperature=0.0), t2l(seed=2, temperature=0.0))
    joint = lambda **more: diffusion.sample_joint(net, 3, 12, generator(), DIFF, 8, **more)
    a, b, c = joint(), joint(guidance=1.0), joint(guidance=3.0, lead=0.3)
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and (c[0] < 11).all() and torch.isfinite(c[1]).all()
    with pytest.raises(ValueError, match="steps=2000 is more than"):
        diffusion.sample_latent_from_text(net, x, generator(), DIFF, 2000)
    with pytest.raises(ValueError, match="conditions dropped"):
        diffusion.sample_text_from_latent(net, z, 12, generator(), replace(DIFF, drop_given=0.0), guidance=2.0)
    with pytest.raises(ValueError, match=r"\(3, 4\): this network takes \(B,5\)"):
        diffusion.sample_text_from_latent(net, z[:, :4], 12, generator(), DIFF)
    with pytest.raises(ValueError, match=r"takes \(B,5\), and only with whole rows"):
        net(x, latent=z, state=[None, None])


@pytest.mark.parametrize("encoder", ["mlp", "rwkv_pool"])
@torch.no_grad()
def test_encoders_see_the_text_and_not_its_padding(encoder):
    net = opened(nets.Denoiser(replace(SMALL, latent_encoder=encoder, latent_prior="learned")))
    x, lengths = torch.randint(11, (3, 9)), torch.tensor([9, 5, 7])
    mu, logvar, text = net.posterior(x, lengths)
    assert mu.shape == logvar.shape == (3, 5) and text.shape == (3, 32)
    alone = net.posterior(x[1:2, :5])
    assert all(torch.allclose(a[1:2], b, atol=1e-5) for a, b in zip((mu, logvar, text), alone))
    assert not torch.allclose(mu, net.posterior((x + 1) % 11, lengths)[0], atol=1e-3)
    assert {"latent_prior.mu", "latent_prior.logvar"} <= dict(net.named_parameters()).keys()
    z = diffusion.sample_latent_from_text(net, x, generator(), DIFF, temperature=0.0, lengths=lengths)
    assert torch.allclose(z, mu)
    _, z = diffusion.sample_joint(net, 400, 3, generator(), DIFF, 2)
    assert torch.allclose(z.mean(0), net.latent_prior.mu, atol=0.3) and torch.allclose(z.std(0), (net.latent_prior.logvar / 2).exp(), rtol=0.2)


def test_the_report_by_hand():
    """A network that knows the latents exactly but says a text is what its neighbour's latent stands for."""
    x, z = torch.randint(11, (8, 6)), torch.randn(8, 5)
    found = diffusion.latent_report(Knows(x, z / 2 - 0.5), x, None, z, generator(), DIFF, n=8)
    assert found["latent_mse"] < 1e-9 and found["latent_rank"] == 0 and found["text_nats"] == pytest.approx(0, abs=1e-6)
    far = diffusion.latent_report(Knows(x, -z / 2 - 0.5), x, None, z, generator(), DIFF, n=8)
    assert far["latent_mse"] == pytest.approx(4 * far["latent_mse_of_mean"], rel=0.5) and far["latent_rank"] > 0.3
    lengths = torch.tensor([6, 2] * 4)
    masked, weight = diffusion.exact_count(torch.arange(6) < lengths[:, None], generator())
    assert not masked[1::2, 2:].any() and torch.allclose(weight.sum(1), torch.ones(8)) and masked.any(1).all()


# ---- folders and scripts ----

@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("pairs"), random.Random(5)
    (folder / "a.txt").write_text(" ".join(rng.choice(WORDS) for _ in range(4_000)))
    assert data.main(["latents", f"--data_path={folder / 'a.txt'}", f"--out={folder / 'p'}", "--dim=6", "--length=40", "--buckets=256"]) == 0
    return folder / "p"


def changed(pairs, tmp_path, edit):
    """A copy of the folder, edited."""
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", pairs, copy], check=True)
    edit(copy)
    return copy


def test_rows_are_texts_with_their_latents(pairs):
    source = data.PairSource(str(pairs), 32)
    entries = data.read_entries(pairs, "train")
    x, maskable, lengths, z = source.train_rows(3, 16, 0, 16, 1)
    assert x.shape == (16, 32) and lengths is None and maskable.all() and z.shape == (16, 6)
    texts = [e["text"] for e in entries]
    for row, latent in zip(x, z):
        i = next(i for i, t in enumerate(texts) if t.startswith(source.tokenizer.decode(row.tolist())))
        assert np.array_equal(np.load(pairs / entries[i]["latent_path"]), latent.numpy())
    assert torch.equal(source.train_rows(3, 16, 4, 9, 1)[3], z[4:9])
    mean, std = source.moments()
    every = np.stack([np.load(pairs / e["latent_path"]) for e in entries])
    assert np.allclose(mean, every.mean(0), atol=1e-5) and std.item() == pytest.approx((every - every.mean(0)).std(), rel=1e-4)
    none = data.PairSource(str(pairs), 32, use_latents=False)
    assert none.latent_dim == 0 and torch.equal(none.train_rows(3, 16, 0, 16, 1)[0], x)


def test_texts_without_a_latent_and_of_several_lengths(pairs, tmp_path):
    def edit(copy):
        entries = data.read_entries(copy, "train")
        del entries[2]["latent_path"]
        for e in entries:
            e["text"] = e["text"][:1 + len(e["text"]) // (1 + len(e["text"].split()) % 3)]
        entries[5]["text"] = ""
        (copy / "train_data.json").write_text(json.dumps(entries))
        assert data.main(["tokenize", f"--data_path={copy}", "--max_length=50"]) == 0
    copy = changed(pairs, tmp_path, edit)
    source, entries = data.PairSource(str(copy), 64), data.read_entries(copy, "train")
    assert 5 not in source.train.use and 2 in source.train.use and len(source.train.use) == len(entries) - 1
    x, maskable, lengths, z = source.rows(source.train, torch.arange(8))
    assert (z[2] == 0).all() and (z[:2] != 0).any() and lengths.tolist() == [len(entries[i]["text"]) for i in source.train.use[:8]]
    assert torch.equal(maskable.sum(1), lengths) and x.shape[1] == lengths.max()
    assert torch.equal(data.PairSource(str(pairs), 64).moments()[0].isfinite(), torch.ones(6, dtype=torch.bool))


def spoil(name, content):
    def edit(copy):
        (copy / name).write_bytes(content if isinstance(content, bytes) else content((copy / name).read_bytes()))
    return edit


def array(value):
    def edit(copy):
        np.save(copy / "latents/train/000003.npy", value, allow_pickle=True)
    return edit


REFUSED = {
    "missing": (lambda c: os.remove(c / "latents/train/000003.npy"), r"1 of \d+ entries have no latent file \(.*000003.npy\).*--skip_missing=1"),
    "dimension": (array(np.ones(7, np.float32)), r"000003.npy has shape \(7,\)"),
    "NaN": (array(np.full(6, np.nan, np.float32)), "000003.npy holds NaN"),
    "truncated .npy": (spoil("latents/train/000003.npy", lambda b: b[:90]), "000003.npy cannot be read"),
    "pickled": (array(np.array([{}], object)), "one of pickled objects, which are never loaded"),
    "truncated .npz": (spoil("train/000000.npz", lambda b: b[:200]), "000000.npz cannot be read"),
    "no mask": (lambda c: np.savez(c / "train/000000.npz", input_ids=np.ones((3, 4), int)), "must hold input_ids and attention_mask"),
    "other texts": (lambda c: np.savez(c / "train/000000.npz", input_ids=np.ones((3, 4), int), attention_mask=np.ones((3, 4), int)), "holds tokens of 3 texts"),
    "left padding": (lambda c: np.savez(c / "train/000000.npz", input_ids=np.ones((2, 2), int), attention_mask=np.array([[0, 1], [1, 1]])), "padded at the end"),
    "vocabulary": (lambda c: np.savez(c / "train/000000.npz", input_ids=np.full((3, 4), 300), attention_mask=np.ones((3, 4), int)), "token id 300 .* past the vocabulary of 256"),
    "no tokens": (lambda c: os.remove(c / "tokenizer.json"), "has no tokens yet: python data.py tokenize"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_folders_that_are_refused(pairs, tmp_path, what):
    edit, words = REFUSED[what]
    copy = changed(pairs, tmp_path, edit)
    with pytest.raises(ValueError, match=words):
        data.PairSource(str(copy), 32)
    if what == "missing":
        source = data.PairSource(str(copy), 32, skip_missing=True)
        assert 3 not in source.train.use and 2 in source.train.use


TINY = dict(N_LAYER=2, N_EMBD=32, HEAD_SIZE=16, BATCH_SIZE=8, MAX_ITERS=8, EVAL_INTERVAL=4, EVAL_ITERS=2, LOG_INTERVAL=1, SEQ_LEN=32, THREADS=1, WKV_IMPL="torch",
            DTYPE="fp32", OBJECTIVE="sequential", LATENT_PREFIX_LEN=2)


def log_of(folder):
    return [json.loads(line) for line in open(folder / "log.jsonl")]


def losses(folder):
    return [(row["step"], row["loss"], row["mode"]) for row in log_of(folder) if row["event"] == "train"]


def test_from_folder_to_both_stages_and_back(run, pairs, tmp_path):
    """Sequential, killed and resumed bit for bit; Stage II from it; every way to sample; what the scripts refuse."""
    settings = TINY | dict(DATA_PATH=pairs)
    ok(run("train.py", "--out_dir=whole", **settings))
    kill_after(run, 4, "cut", settings)
    ok(run("train.py", "--out_dir=cut", "--init_from=resume"))
    whole = losses(tmp_path / "whole")
    assert losses(tmp_path / "cut") == whole and [mode for _, _, mode in whole] == ["stage1_coupling"] * 2 + ["l2t", "t2l"] + ["stage1_coupling"] * 2 + ["l2t", "t2l"]
    saved, again = (torch.load(tmp_path / d / "ckpt.pt", weights_only=True) for d in ("whole", "cut"))
    assert all(torch.equal(saved["model"][k], again["model"][k]) for k in saved["model"])
    source = data.PairSource(str(pairs), 32)
    assert torch.equal(saved["model"]["latent_prefix.mean"], source.moments()[0]) and len(saved["projection"]) == 3
    log = [row for row in log_of(tmp_path / "whole") if row["event"] == "train"]
    heads = {row["mode"]: row["active"] for row in log}
    total = log_of(tmp_path / "whole")[0]["parameters"]
    count = lambda part: sum(v.numel() for k, v in saved["model"].items() if k.startswith(part))
    assert heads == {"stage1_coupling": total, "l2t": total - count("latent_head"), "t2l": total - count("head.")}
    assert all(row["loss"] == pytest.approx(row["loss_text"] + row["loss_latent"], rel=1e-5) for row in log)
    eval_row = log_of(tmp_path / "whole")[-1]
    assert {"latent_mse", "latent_mse_of_mean", "latent_rank", "text_nats", "text_nats_shuffled", "text_nats_no_latent"} <= eval_row.keys()
    again = ok(run("train.py", "--train=0", "--out_dir=again", "--weights_path=whole/ckpt.pt"))
    assert f"text nats {eval_row['text_nats']:.4f}" in again

    sample = lambda *options: run("sample.py", "--num_samples=2", "--length=20", "--wkv_impl=torch", *options)
    shown = ok(sample("--ckpt=whole/ckpt.pt", "--out=j.npy", "--html=j.html", "--svg=j.svg"))
    assert (tmp_path / "j.html").stat().st_size > 5000 and "played in j.html and j.svg" in shown and "2 texts in" in shown
    assert shown.count("---") == 2 and "(joint)" in shown and np.load(tmp_path / "j.npy").shape == (2, 6)
    (tmp_path / "two.txt").write_text("the cat sat\nking and queen on the mat\n")
    assert "(2, 6) in latent.npy" in ok(sample("--ckpt=whole/ckpt.pt", "--mode=t2l", "--prompt_file=two.txt", "--steps=5", "--temperature=0"))
    one = np.load(tmp_path / "latent.npy")
    ok(sample("--ckpt=whole/ckpt.pt", "--mode=t2l", "--text=the cat sat", "--steps=5", "--temperature=0"))
    assert np.allclose(np.load(tmp_path / "latent.npy"), one[:1], atol=1e-4)
    assert ok(sample("--ckpt=whole/ckpt.pt", "--mode=l2t", "--latent=latent.npy", "--guidance=2", "--top_k=5")).count("---") == 2
    np.save(tmp_path / "wide.npy", np.random.rand(256).astype("f4"))               # n-grams: projected with what the checkpoint keeps
    assert "(l2t)" in ok(sample("--ckpt=whole/ckpt.pt", "--latent=wide.npy", "--html=l.html")) and (tmp_path / "l.html").exists()
    done = sample("--ckpt=whole/ckpt.pt", "--mode=t2l", "--text=the cat", "--html=l.html")
    assert done.returncode == 2 and "plays texts, mode=t2l gives latents: leave it out" in done.stderr
    assert "there is no folder none" in sample("--ckpt=whole/ckpt.pt", "--html=none/l.html").stderr
    assert "denoiser calls" in ok(sample("--ckpt=whole/ckpt.pt", "--text=the c__ sat"))     # an infill without a latent

    kill_after(run, 4, "two", dict(INIT_FROM="whole/ckpt.pt", DATA_PATH=pairs, **{k: v for k, v in TINY.items() if not k.startswith(("N_", "HEAD", "LATENT"))},
                              LATENT_PRIOR="learned", GEOM_WEIGHT=0.1, FREE_BITS=0.01, KL_WARMUP=4, FREEZE_BACKBONE=1, UNFREEZE_AFTER_STEPS=6,
                              UNFREEZE_PATTERNS="blocks.1") | dict(OBJECTIVE="stage2_variational"))
    ok(run("train.py", "--out_dir=two", "--init_from=resume"))
    first, second = saved["model"], torch.load(tmp_path / "two" / "ckpt.pt", weights_only=True)["model"]
    same = {k for k in first if torch.equal(first[k], second[k])}
    assert {"blocks.0.att.key.weight", "blocks.0.ffn.key.weight", "ln_out.weight", "head.weight"} <= same and "blocks.1.att.key.weight" not in same
    assert torch.equal(first["emb.weight"][:-1], second["emb.weight"][:-1]) and not torch.equal(first["emb.weight"][-1], second["emb.weight"][-1])
    assert second["latent_prior.mu"].abs().max() > 0
    last = log_of(tmp_path / "two")[-1]
    assert {"kl", "active_units", "text_nats", "text_nats_no_latent"} <= last.keys() and "latent_mse" not in last
    assert ok(sample("--ckpt=two/ckpt.pt")).count("---") == 2
    ok(sample("--ckpt=two/ckpt.pt", "--mode=t2l", "--text=a cat"))
    ok(sample("--ckpt=two/ckpt.pt", "--mode=l2t", "--latent=latent.npy"))

    np.save(tmp_path / "short.npy", np.ones(4, "f4"))
    for script, options, words in [
            ("sample.py", ["--ckpt=whole/ckpt.pt", "--latent=short.npy"], "6 per latent (or 256, which are projected)"),
            ("sample.py", ["--ckpt=whole/ckpt.pt", "--latent=none.npy"], "none.npy does not exist"),
            ("sample.py", ["--ckpt=whole/ckpt.pt", "--mode=stage2"], "choose joint or l2t or t2l"),
            ("sample.py", ["--ckpt=two/ckpt.pt", "--mode=joint"], "choose stage2 or l2t or t2l"),
            ("sample.py", ["--ckpt=whole/ckpt.pt", "--mode=l2t"], "takes a .npy file as --latent"),
            ("sample.py", ["--ckpt=whole/ckpt.pt", "--mode=t2l"], "needs text"),
            ("sample.py", ["--ckpt=whole/ckpt.pt", "--length=99"], "more than seq_len=32"),
            ("sample.py", ["--ckpt=whole/ckpt.pt", "--mode=joint", "--chat=Who?"], "chat=Who? is for texts without latents"),
            ("sample.py", ["--ckpt=whole/ckpt.pt", "--save_state=s.pt"], "save_state=s.pt is for texts without latents"),
            ("sample.py", ["--ckpt=whole/ckpt.pt", "--mode=joint", "--prompt=To be"], "prompt=To be is not for mode=joint"),
            ("sample.py", ["--ckpt=whole/ckpt.pt", "--prompt=the", "--length=4", "--out=z.npy"], "out=z.npy is for latents"),
            ("train.py", [f"--data_path={pairs}", "--objective=masked_mean"], "is not for data_path="),
            ("train.py", ["--objective=l2t"], "python data.py latents"),
            ("train.py", [f"--data_path={pairs}", "--objective=stage2_variational"], "goes on from a network of Stage I"),
            ("train.py", [f"--data_path={pairs}", "--latent_dim=9"], "latents of"),
            ("train.py", [f"--data_path={pairs}", "--freeze=nothing_like_it"], "matches no parameter"),
            ("train.py", [f"--data_path={pairs}", "--sequential_schedule=l2t", "--objective=sequential"], "MODE:STEPS"),
            ("train.py", [f"--data_path={pairs}", "--direction=block"], "latents stand before whole rows"),
            ("train.py", [f"--data_path={pairs}", "--direction=causal", "--latent_pred_from=prefix"], "the prefix does not see the text"),
            ("train.py", [f"--data_path={pairs}", "--latent_encoder=rwkv_pool", "--mixer=attention"], "which mixer=attention has not")]:
        done = run(script, *options)
        assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1, (options, done.stderr)
    assert torch.load(tmp_path / "whole" / "ckpt.pt", weights_only=True)["step"] == 8           # nothing was lost


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_frozen_backbone_is_bit_equal_after_training(run, pairs, tmp_path, optimizer):
    """From official weights, two-way: what the file holds stays, what it lacks learns; with a text head from scratch, that learns, too."""
    plain = opened(nets.Denoiser(nets.ModelConfig(n_layer=2, n_embd=32, head_size=16, vocab_size=256)))
    file = official(plain)
    torch.save(file, tmp_path / "x.pth")
    settings = {k: v for k, v in TINY.items() if not k.startswith(("N_", "HEAD"))}
    settings |= dict(DATA_PATH=pairs, INIT_FROM="x.pth", FREEZE_BACKBONE=1, OPTIMIZER=optimizer, MAX_ITERS=3, EMA=0.5, PREDICT="next", WARMDOWN_ITERS=0)
    ok(run("train.py", "--out_dir=a", **settings))
    ok(run("train.py", "--out_dir=b", "--use_rwkv_lm_head=0", **settings))
    ok(run("train.py", "--out_dir=c", "--train_lm_head=1", **settings))
    for folder, head_learns in (("a", False), ("b", True), ("c", True)):
        saved = torch.load(tmp_path / folder / "ckpt.pt", weights_only=True)
        for weights in (saved["model"], {k.removeprefix("module."): v for k, v in saved["averaged"].items()}):
            for name in file.keys() - {"emb.weight", "blocks.0.att.v0", "blocks.0.att.v1", "blocks.0.att.v2"}:
                assert torch.equal(weights[name].flatten(), file[name].flatten()) != (head_learns and name == "head.weight"), (folder, name)
            assert torch.equal(weights["emb.weight"][:256], file["emb.weight"])
        fresh = nets.from_pretrained(str(tmp_path / "x.pth"), direction="bidirectional", time_cond="film", time_inputs=2, latent_dim=6)
        learned = {k for k, v in fresh.state_dict().items() if v.shape == saved["model"][k].shape and not torch.equal(v, saved["model"][k])}
        assert any("cond" in k for k in learned) and any("latent_head" in k for k in learned) and any(".fuse." in k for k in learned)
    norm = lambda d: torch.load(tmp_path / d / "ckpt.pt", weights_only=True)["model"]["head.weight"].norm()
    assert log_of(tmp_path / "a")[0]["active"] < log_of(tmp_path / "c")[0]["active"] and norm("b") != norm("c")


def test_two_processes_give_the_same_run(run, pairs, tmp_path):
    settings = TINY | dict(DATA_PATH=pairs, MAX_ITERS=4, EVAL_INTERVAL=10)
    ok(run("train.py", "--out_dir=one", **settings))
    ok(run("train.py", "--out_dir=parts", "--device_bsz=2", **settings))
    ok(run("train.py", "--out_dir=two", ranks=2, **settings))
    one = losses(tmp_path / "one")
    for other in ("parts", "two"):
        for (step, loss, mode), (_, want, _) in zip(losses(tmp_path / other), one, strict=True):
            assert loss == pytest.approx(want, rel=2e-4), (other, step, mode)
