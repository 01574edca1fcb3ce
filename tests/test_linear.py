"""Matrices kept in few bits: the kernel and plain torch against float64, and a network that generates with them."""
import pytest
import torch

import diffusion
import model
import wkv_cuda
from wkv_cuda import KeptLinear

SHAPES = [(1, 64, 8), (3, 768, 40), (32, 100, 13), (2, 16, 1)]       # rows, inputs, outputs; not all are multiples of a line


def kept_as(weight, kind):
    """What the numbers of a matrix become, by the definition: float64."""
    if kind == "int8":
        scale = weight.abs().amax(1, keepdim=True) / 127
        return (weight / scale).round().double() * scale.double()
    return weight.to(wkv_cuda.KEPT[kind]).double()


def check(kind, rows, K, N):
    weight, x = torch.randn(N, K), torch.randn(rows, K)
    found, want = KeptLinear(weight, kind)(x), x.double() @ kept_as(weight, kind).T
    assert found.shape == want.shape and found.dtype == x.dtype
    assert (found - want).norm() <= 2e-6 * want.norm()


@pytest.mark.parametrize("impl", ["cpp", "torch"])
@pytest.mark.parametrize("kind", wkv_cuda.KEPT)
def test_kept_matrices_against_float64(kind, impl, monkeypatch):
    monkeypatch.setenv("WKV_IMPL", impl)
    for shape in [*SHAPES, (70, 64, 5)]:                             # 70: more rows than the kernel is for
        check(kind, *shape)


def test_a_matrix_keeps_its_shape_zeros_and_memory():
    weight = torch.randn(6, 100)
    weight[2] = 0
    for kind, size in dict(fp32=4, bf16=2, int8=1).items():
        kept = KeptLinear(weight, kind)
        assert kept.weight.numel() * kept.weight.element_size() == 6 * 128 * size      # 128: whole lines
        assert kept.plain().shape == weight.shape and (kept(torch.randn(2, 3, 100))[..., 2] == 0).all()
    assert torch.equal(KeptLinear(weight, "fp32").plain(), weight)


@pytest.mark.parametrize("direction", ["causal", "block"])
def test_a_network_generates_the_same_text_with_float32_weights_kept(direction):
    """And the same distribution, nearly, with fewer bits."""
    cfg = model.ModelConfig(n_layer=2, n_embd=64, vocab_size=50, direction=direction, block_size=4)
    nets = {kind: model.Denoiser(cfg).eval() for kind in ("plain", *wkv_cuda.KEPT)}
    for p in nets["plain"].parameters():
        p.data += 0.1 * torch.randn_like(p)
    for kind in wkv_cuda.KEPT:
        nets[kind].load_state_dict(nets["plain"].state_dict())
        model.keep_weights(nets[kind], kind)
    x = torch.full((2, 12), 50)
    x[:, :3] = torch.randint(50, (2, 3))
    sampler = diffusion.SAMPLERS["ar" if direction == "causal" else "block"]
    with torch.no_grad():
        texts = {kind: sampler(net, x, x != 50, 50, torch.Generator().manual_seed(1), block_size=4, temperature=0.0)
                 for kind, net in nets.items()}
        logits = {kind: net(x).logits for kind, net in nets.items()}
    assert torch.equal(texts["plain"], texts["fp32"])
    for kind, tolerance in dict(fp32=1e-5, bf16=0.02, int8=0.06).items():
        assert (logits[kind] - logits["plain"]).norm() <= tolerance * logits["plain"].norm(), kind
