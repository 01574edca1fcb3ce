"""Checkpoints that commit 265c6e9 wrote, one of each objective (weights rounded to float16), with what its networks computed."""
import os

import pytest
import torch

import model as nets

FILE = os.path.join(os.path.dirname(__file__), "checkpoints_265c6e9.pt")
OLD = torch.load(FILE, weights_only=True)


@torch.no_grad()
@pytest.mark.parametrize("name", OLD)
def test_they_load_with_the_same_outputs(name, tmp_path):
    path = str(tmp_path / "ckpt.pt")
    torch.save(OLD[name]["checkpoint"], path)
    net = nets.from_pretrained(path).eval()
    x, lengths, cfg = OLD[name]["x"], torch.tensor([11, 7]), net.cfg
    normal = lambda *shape: torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    if cfg.gaussian:
        out = net(normal(2, 11, cfg.n_embd), t=torch.tensor([0.3, 0.8]), lengths=lengths)
    elif cfg.latent_dim:
        out = net(x, latent=normal(2, cfg.latent_dim), latent_t=torch.tensor([0.3, 0.0]), lengths=lengths)
    else:
        out = net(x, lengths=lengths)
    for key in OLD[name].keys() - {"checkpoint", "x"}:
        assert torch.allclose(getattr(out, key), OLD[name][key], rtol=1e-4, atol=1e-5), key


@pytest.mark.parametrize("name", ["task", "masked_mean", "ar", "block", "gaussian", "stage1_coupling", "stage2_variational"])
def test_they_are_sampled_from(name, tmp_path, run):
    torch.save(OLD[name]["checkpoint"], tmp_path / "ckpt.pt")
    done = run("sample.py", "--ckpt=ckpt.pt", "--num_samples=2", "--steps=3")
    assert done.returncode == 0, done.stderr
