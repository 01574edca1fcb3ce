"""Official weights: what conversion leaves as it was, adapters, the way back into the official layout, states in files."""
import functools
import os
from dataclasses import replace

import pytest
import torch

import diffusion
import model
from conftest import ROOT, ok
from model import Denoiser, ModelConfig, from_pretrained, load_checkpoint, official_weights, save_checkpoint

CAUSAL = ModelConfig(n_layer=3, n_embd=64, head_size=32, vocab_size=300, direction="causal", start_token=0)
TEXT = "".join(f"{i} times {i + 1} is {i * (i + 1)}.\n" for i in range(400))


def randomised(cfg, seed=0):
    torch.manual_seed(seed)
    net = Denoiser(cfg)
    for name, p in net.named_parameters():
        p.data += torch.randn_like(p) * (0.5 if name == "emb.weight" else 0.05)
    return net.eval()


@pytest.fixture
def pretrained(tmp_path):
    """A network in the official layout."""
    net = randomised(CAUSAL)
    save_checkpoint(str(tmp_path / "official.pth"), official_weights(net))
    return net


@torch.no_grad()
@pytest.mark.parametrize("changes", [dict(direction="block"), dict(direction="block", adapter_rank=4), dict(direction="bidirectional", fusion="gate"),
                                     dict(direction="block", fusion="concat", predict="next", adapter_rank=4, block_size=4),
                                     dict(direction="block", tie_directions=True)])
def test_a_converted_network_starts_as_the_causal_one(pretrained, tmp_path, changes):
    """Logits of masked rows, of finished text, and states; the mask is the token that stands before a text."""
    net, x = from_pretrained(str(tmp_path / "official.pth"), **changes), torch.randint(300, (2, 12))
    causal = from_pretrained(str(tmp_path / "official.pth"), direction="causal", predict=net.cfg.predict)
    assert torch.equal(net.emb.weight[300], net.emb.weight[0]) and net.cfg.start_token == 0
    x[:, 4:7] = 300
    for options in (dict(), dict(finished_text=True)):
        ours, theirs = net(x, **options), causal(x, **options)
        assert torch.equal(ours.logits, theirs.logits)
        assert all(torch.equal(a.mix, b.mix) for a, b in zip(ours.state, theirs.state))


@torch.no_grad()
def test_adapters_change_denoising_alone():
    net = randomised(replace(CAUSAL, direction="block", adapter_rank=4))
    bare = Denoiser(replace(net.cfg, adapter_rank=0)).eval()
    bare.load_state_dict({k: v for k, v in net.state_dict().items() if k in bare.state_dict()})
    x = torch.randint(300, (2, 12))
    assert torch.equal(net(x, finished_text=True).logits, bare(x, finished_text=True).logits)
    assert not torch.allclose(net(x).logits, bare(x).logits, atol=1e-3)
    w, mine = net.blocks[1].ffn.key, torch.randn(5, 64)
    assert torch.allclose(w(mine, False), mine @ (w.weight + w.up @ w.down).T, atol=1e-4)


def test_conversion_with_a_frozen_backbone_leaves_next_tokens_bit_equal(pretrained, tmp_path, run):
    """By the command of config/convert.py; the mixture's block 1 is the autoregressive likelihood."""
    (tmp_path / "t.txt").write_text(TEXT)
    ok(run("data.py", "train-bpe", "--data_path=t.txt", "--vocab_size=300", "--out=bpe.json"))
    small = ["--tokenizer=bpe:bpe.json", "--data_path=t.txt", "--seq_len=32", "--batch_size=4", "--eval_iters=1", "--dtype=fp32", "--wkv_impl=torch"]
    before = ok(run("train.py", "--train=0", "--init_from=official.pth", "--objective=ar", "--out_dir=eval", *small))
    done = run("train.py", os.path.join(ROOT, "config/convert.py"), "--init_from=official.pth", "--fusion=concat", *small)
    assert done.returncode == 2 and "use fusion=gate" in done.stderr.splitlines()[-1]      # its weights of the forward scan would learn
    ok(run("train.py", os.path.join(ROOT, "config/convert.py"), "--init_from=official.pth", "--max_iters=4", "--adapter_rank=4", *small))
    saved = load_checkpoint(str(tmp_path / "out/ckpt.pt"))
    after = from_pretrained(str(tmp_path / "out/ckpt.pt"), saved).eval()
    for name, p in pretrained.state_dict().items():
        assert torch.equal(saved["model"][name][:len(p) - (name == "emb.weight")], p[:len(p) - (name == "emb.weight")]), name
    moved = {part for part in (".back.", ".fuse.gate", ".up") for name in saved["model"] if part in name and saved["model"][name].any()}
    assert moved == {".back.", ".fuse.gate", ".up"}
    x = torch.randint(300, (3, 32))
    with torch.no_grad():
        nats = [diffusion.NextToken(diffusion.DiffusionConfig(objective="ar"), net.cfg).bound(net, x) for net in (pretrained, after)]
    assert torch.equal(*nats)
    assert "freeze_backbone" not in before and len(before.split("bits per char ")) == 2


def test_recompute_gives_the_same_gradients_and_keeps_less():
    net, x, kept = randomised(replace(CAUSAL, direction="block", dw_jrt=True, dw_jrt_inject="gate")), torch.randint(300, (2, 32)), {}

    def saved(z, kind):
        kept[kind] = kept.get(kind, 0) + z.numel()
        return z
    gradients = {}
    for kind in (False, True):
        net.zero_grad()
        net.recompute = kind
        with torch.autograd.graph.saved_tensors_hooks(functools.partial(saved, kind=kind), lambda z: z):
            net(x).logits.square().mean().backward()
        gradients[kind] = [p.grad for p in net.parameters() if p.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(*gradients.values(), strict=True)) and kept[True] < 0.4 * kept[False]


@torch.no_grad()
@pytest.mark.parametrize("ending, kind", [(".pth", "fp32"), (".pth", "bf16"), (".safetensors", "fp32")])
def test_export_and_back(tmp_path, run, ending, kind):
    if ending == ".safetensors":
        pytest.importorskip("safetensors", reason="pip install safetensors")
    (tmp_path / "t.txt").write_text(TEXT)
    ok(run("train.py", "--data_path=t.txt", "--objective=ar", "--direction=causal", "--n_layer=2", "--n_embd=32", "--max_iters=3", "--eval_iters=1",
           "--seq_len=32", "--batch_size=4", "--start_token=0", "--wkv_impl=torch"))
    said = ok(run("sample.py", f"--export=x{ending}", f"--weights={kind}", "--wkv_impl=torch"))
    assert f"numbers in {kind}, byte tokens\n" in said
    ours, back = from_pretrained(str(tmp_path / "out/ckpt.pt")), from_pretrained(str(tmp_path / f"x{ending}"), direction="causal")
    x = torch.randint(256, (2, 20))
    want, found = ours(x).logits, back(x).logits
    assert torch.equal(want, found) if kind == "fp32" else torch.allclose(want, found, atol=0.02)


def test_what_cannot_be_exported_says_why(tmp_path, run):
    for changes in (dict(direction="block"), dict(dw_jrt=True), dict(adapter_rank=2), dict(mixer="attention", direction="causal"), dict(tie_embeddings=True)):
        with pytest.raises(ValueError, match="the official layout is for causal RWKV-7 alone, this network has .*: keep the checkpoint"):
            official_weights(Denoiser(replace(CAUSAL, **changes)))


def test_foreign_official_files(tmp_path, run, pretrained):
    older = {"emb.weight": torch.zeros(9, 8), "blocks.0.att.time_maa_x": torch.zeros(8)}
    save_checkpoint(str(tmp_path / "x060.pth"), older)
    with pytest.raises(ValueError, match="x060.pth is RWKV-6 .x060., this code reads RWKV-7"):
        from_pretrained(str(tmp_path / "x060.pth"))
    net = Denoiser(replace(CAUSAL, adapter_rank=4))
    save_checkpoint(str(tmp_path / "a.pt"), dict(model=net.state_dict(), model_config=vars(net.cfg), step=0))
    with pytest.raises(ValueError, match=r"another shape in blocks.0.att.receptance.down \(4, 64\) for \(2, 64\)"):
        from_pretrained(str(tmp_path / "a.pt"), adapter_rank=2)
    (tmp_path / "t.txt").write_text(TEXT)
    done = run("train.py", "--init_from=official.pth", "--data_path=t.txt", "--max_iters=1")
    assert done.returncode == 0, "300 tokens are 256 filled up"
    save_checkpoint(str(tmp_path / "large.pth"), official_weights(Denoiser(replace(CAUSAL, vocab_size=1000))))
    done = run("train.py", "--init_from=large.pth", "--data_path=t.txt", "--max_iters=1", "--out_dir=other")
    assert done.returncode == 2 and "large.pth knows 1,000 tokens, byte has 256: use the tokenizer" in done.stderr


# ---- states ----

@pytest.mark.parametrize("objective, direction", [("block", "block"), ("ar", "causal")])
def test_a_state_goes_on_as_the_text_would(tmp_path, run, objective, direction):
    """A prompt in two halves with a state in between gives what it gives whole."""
    (tmp_path / "t.txt").write_text(TEXT)
    ok(run("train.py", f"--objective={objective}", f"--direction={direction}", "--data_path=t.txt", "--n_layer=2", "--n_embd=32", "--max_iters=30",
           "--eval_iters=1", "--seq_len=32", "--batch_size=4", "--block_size=4", "--wkv_impl=torch"))
    sample = functools.partial(run, "sample.py", "--num_samples=2", "--length=12", "--wkv_impl=torch")
    whole = ok(sample("--prompt=20 times 21 is")).split("---\n")[1:]
    ok(sample("--prompt=20 times", "--save_state=s.pt"))
    second = ok(sample("--prompt= 21 is", "--state=s.pt", "--save_state=t.pt")).split("---\n")[1:]
    assert [text.removeprefix("20 times") for text in whole] == second
    third = ok(sample("--state=t.pt")).split("---\n")[1:]
    assert [text.removeprefix(" 21 is") for text in second] == third
    for wrong, words in ((["--save_state=x.pt"], "is for the state after a prompt"), (["--state=no.pt"], "state='no.pt'|state=no.pt is not of this"),
                         (["--state=s.pt", "--ckpt=other.pt"], "other.pt does not exist")):
        done = sample(*wrong)
        assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1
    content = torch.load(tmp_path / "s.pt", weights_only=True)
    torch.save(content | {"network": "another"}, tmp_path / "foreign.pt")
    torch.save(content | {"state": content["state"][:1]}, tmp_path / "cut.pt")
    assert "is not of this network" in sample("--state=foreign.pt").stderr and "cut.pt cannot be read" in sample("--state=cut.pt").stderr
    assert model.state_bytes([[*layer.values()] for layer in content["state"]]) == 2 * 4 * (32 * 32 + 2 * 32)      # layers * (one head's state and two shifts)
