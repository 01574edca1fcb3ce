"""Directions, fusions, conditioning and mixers: who may see whom, what is unchanged, what carries over."""
import os
from dataclasses import replace

import pytest
import torch

import model as nets
from conftest import ROOT, ok
from model import Denoiser, ModelConfig, from_pretrained, save_checkpoint
from wkv_cuda import shift_mix

SMALL = ModelConfig(n_layer=3, n_embd=32, head_size=16, vocab_size=11, block_size=5)
BLOCK = replace(SMALL, direction="block", dw_jrt_inject="gate", dw_jrt_scale=1.5)
NETS = {                                      # every network that is block-causal
    "add": BLOCK, "gate": replace(BLOCK, fusion="gate"), "concat": replace(BLOCK, fusion="concat"), "tied": replace(BLOCK, tie_directions=True),
    "dw_jrt": replace(BLOCK, dw_jrt=True), "alternate": replace(BLOCK, direction="alternate_block", ffn_shift="none"),
    "wide": replace(BLOCK, ffn_shift="wide"), "rotary": replace(BLOCK, rotary=True), "alternate, rotary": replace(BLOCK, direction="alternate_block", rotary=True), "alternate, wide": replace(BLOCK, direction="alternate_block", ffn_shift="wide"),
    "alternate, dw_jrt": replace(BLOCK, direction="alternate_block", dw_jrt=True, time_cond="film"), "film": replace(BLOCK, time_cond="film"), "attention": replace(BLOCK, mixer="attention"),
    "hybrid": replace(BLOCK, mixer="attention,rwkv7,rwkv7", dw_jrt=True, norm="rms", tie_embeddings=True, time_cond="adaln_zero"),
    "alternate hybrid": replace(BLOCK, mixer="attention,rwkv7,rwkv7", direction="alternate_block")}
WHOLE = {"block": "bidirectional", "alternate_block": "alternate"}     # the same where a block is everything


def randomised(cfg):
    """A network in which nothing is zero, so that every path matters."""
    net = Denoiser(cfg)
    for name, p in net.named_parameters():
        p.data += torch.randn_like(p) * (0.5 if name == "emb.weight" else 0.1)
    return net.eval()


def ids(B, T):
    return torch.randint(12, (B, T))


def flat(state):
    """All tensors of a state, in order."""
    parts = [z for layer in state for part in layer for z in (part if isinstance(part, tuple) else [part])]
    return [z for z in parts if z is not None]


@torch.no_grad()
@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("T", [15, 13])
def test_later_blocks_never_change_earlier_logits(name, T):
    net, x = randomised(NETS[name]), ids(1, T)
    whole = net(x).logits
    for at in range(T):
        y = x.clone()
        y[0, at] = (y[0, at] + 1 + at % 11) % 12
        changed = (net(y).logits != whole).any(-1)[0]
        first = at // 5 * 5
        assert not changed[:first].any(), at                         # bit-equal
        assert changed[first:min(first + 5, T)].all(), at            # and inside the block everybody sees everybody


@torch.no_grad()
@pytest.mark.parametrize("name", NETS)
def test_a_block_of_everything_is_bidirectional(name):
    net, x = randomised(replace(NETS[name], block_size=64)), ids(2, 13)
    both = Denoiser(replace(NETS[name], direction=WHOLE[NETS[name].direction])).eval()
    both.load_state_dict(net.state_dict())
    assert torch.allclose(net(x).logits, both(x).logits, atol=1e-6)
    y = x.clone()
    y[:, -1] = (y[:, -1] + 1) % 12
    assert (both(y).logits != both(x).logits).any(-1).all()          # the first token sees the last


@torch.no_grad()
@pytest.mark.parametrize("name", NETS)
def test_block_by_block_with_a_carried_state_equals_the_whole(name):
    net, x = randomised(NETS[name]), ids(3, 13)
    whole, state, logits = net(x), None, []
    for piece in x.split(5, 1):
        out = net(piece, state=state)
        state, logits = out.state, logits + [out.logits]
    assert torch.allclose(torch.cat(logits, 1), whole.logits, atol=1e-5)
    for a, b in zip(flat(state), flat(whole.state), strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    if "attention" not in NETS[name].mixer:                          # constant size
        assert [z.shape for z in flat(state)] == [z.shape for z in flat(net(x[:, :5]).state)]


@torch.no_grad()
def test_a_bidirectional_model_takes_a_piece_as_one_block():
    block = randomised(BLOCK)
    both = Denoiser(replace(BLOCK, direction="bidirectional")).eval()
    both.load_state_dict(block.state_dict())
    x = ids(1, 10)
    again = both(x[:, 5:], state=both(x[:, :5]).state)
    assert torch.allclose(again.logits, block(x).logits[:, 5:], atol=1e-5)


RAGGED = NETS | {"causal attention": replace(SMALL, mixer="attention", direction="causal"), "biwkv": replace(SMALL, mixer="biwkv"),
                 "bidirectional": replace(SMALL, direction="bidirectional", dw_jrt=True, time_cond="add"),
                 "alternate wide": replace(SMALL, direction="alternate", ffn_shift="wide"), "causal wide": replace(SMALL, ffn_shift="wide"),
                 "chunks": replace(SMALL, dw_jrt=True, dw_jrt_inject="reverse", dw_jrt_chunk=3), "twice": replace(SMALL, read_twice=True, time_cond="film"),
                 "observed first": replace(SMALL, rotary=True, observed_first=True, ffn_shift="wide"), "seed, rotary": replace(SMALL, rotary=True, dw_jrt=True),
                 "twice, wide": replace(SMALL, read_twice=True, ffn_shift="wide", dw_jrt=True)}


@pytest.mark.parametrize("name", RAGGED)
def test_rows_of_different_lengths_equal_the_rows_alone(name):
    """Logits, states and gradients."""
    net, lengths, x = randomised(RAGGED[name]), torch.tensor([9, 4, 13]), ids(3, 13)
    out = net(x, lengths=lengths)
    real = torch.arange(13) < lengths[:, None]
    (out.logits * real[:, :, None]).square().sum().backward()
    together = {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()
    for i, n in enumerate(lengths.tolist()):
        alone = net(x[i:i + 1, :n])
        alone.logits.square().sum().backward()
        assert (out.logits[i, :n] - alone.logits[0]).norm() <= 1e-5 * alone.logits.norm()
        for a, b in zip(flat(out.state), flat(alone.state), strict=True):
            if a.shape[2:3] != (13,) and a.shape[1:] != (13,):       # attention's cache keeps padding, marked as such
                assert (a[i] - b[0]).float().norm() <= 1e-5 * b.float().norm()
    for n, p in net.named_parameters():
        if n in together:
            assert (p.grad - together[n]).norm() <= 1e-4 * p.grad.norm() + 1e-5, n


@torch.no_grad()
def test_a_cache_with_padding_goes_on_like_rows_alone():
    """Attention: unequal prompts in one batch, then one more block."""
    net, x, lengths, new = randomised(NETS["attention"]), ids(2, 10), torch.tensor([10, 5]), ids(2, 5)
    out = net(new, state=net(x, lengths=lengths).state)
    for i, n in enumerate(lengths.tolist()):
        alone = net(torch.cat([x[i:i + 1, :n], new[i:i + 1]], 1)).logits[0, n:]
        assert torch.allclose(out.logits[i], alone, atol=1e-5)


@torch.no_grad()
def test_the_backward_scan_is_the_forward_scan_of_the_reversed_text():
    causal = randomised(replace(SMALL, ffn_shift="none"))
    both = Denoiser(replace(causal.cfg, direction="bidirectional"))
    weights, x = causal.state_dict(), ids(2, 9)
    for key in both.state_dict():
        if ".back." in key:
            weights[key] = weights[key.replace(".back.", ".")]
        if key.endswith(("fuse.w_f", "fuse.w_b")):
            weights[key] = torch.full((32,), float(key.endswith("b")))
    both.load_state_dict(weights)
    assert torch.allclose(both(x).logits, causal(x.flip(1)).logits.flip(1), atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, dict(dw_jrt=True), dict(ffn_shift="none"), dict(ffn_shift="wide")])
def test_alternating_scans_see_both_sides_from_the_second_layer_on(changes):
    """One layer sees what is before, two see every token."""
    cfg = replace(SMALL, direction="alternate", **changes)
    for layers in (1, 2, 3):
        net, x, sees = randomised(replace(cfg, n_layer=layers)), ids(1, 9), []
        for at in range(9):
            y = x.clone()
            y[0, at] = (y[0, at] + 1) % 12
            sees.append((net(y).logits != net(x).logits).any(-1)[0])
        sees, reach = torch.stack(sees, 1), nets.FFN_SHIFTS[cfg.ffn_shift] or 0       # (token, what it sees)
        if layers == 1:
            assert torch.equal(sees, torch.ones(9, 9).tril(reach).bool())
        else:
            assert sees.all()


@torch.no_grad()
def test_every_second_layer_is_the_same_layer_on_the_reversed_text():
    """Written with a causal network's two layers, the second one on the row turned around."""
    net, x = randomised(replace(SMALL, direction="alternate", n_layer=2)), torch.randn(2, 9, 32)
    causal = Denoiser(replace(SMALL, n_layer=2)).eval()
    causal.load_state_dict(net.state_dict())
    seq, (first, second) = nets.Sequence.of(x, causal.cfg, None, None, 1, False, None, None), causal.blocks
    below, _, carry = first(first.ln0(x), None, seq, nets.Carry())
    above, _, _ = second(below.flip(1), None, seq, nets.Carry(v_first=carry.v_first.flip(1)))
    assert torch.allclose(net(x).hidden, net.ln_out(above.flip(1)), atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("fusion", nets.FUSIONS)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("copy_back", [False, True])
def test_a_causal_checkpoint_loaded_two_way_is_unchanged(tmp_path, fusion, tied, copy_back):
    net, x, path = randomised(SMALL), ids(2, 13), str(tmp_path / "c.pt")
    save_checkpoint(path, {"model": net.state_dict(), "model_config": vars(net.cfg)})
    two = from_pretrained(path, direction="bidirectional", fusion=fusion, tie_directions=tied, copy_back=copy_back, time_cond="film")
    assert torch.allclose(two(x).logits, net(x).logits, atol=1e-5)
    assert torch.equal(two.blocks[1].att.back.x_k, net.blocks[1].att.x_k) == copy_back
    assert hasattr(two.blocks[1].att.back, "key") != tied
    block = two.blocks[0].att
    for p in block.fuse.parameters():                                # and the second scan matters as soon as the fusion learns
        p += 0.1
    assert not torch.allclose(two(x).logits, net(x).logits, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("mixer", nets.TIME_MIXERS)
@pytest.mark.parametrize("time_cond", nets.TIME_CONDS)
def test_conditioning_is_a_no_op_at_first_and_then_is_not(mixer, time_cond):
    cfg = replace(SMALL, mixer=mixer)
    net, plain, x = randomised(replace(cfg, time_cond=time_cond)), Denoiser(cfg).eval(), ids(2, 9)
    for name, p in net.named_parameters():
        if ".cond." in name:
            p.zero_()
    plain.load_state_dict({k: v for k, v in net.state_dict().items() if k in plain.state_dict()})
    lo, hi = torch.tensor([0.1, 0.1]), torch.tensor([0.9, 0.9])
    assert torch.allclose(net(x, lo).logits, plain(x, lo).logits, atol=1e-5)
    if time_cond != "none":
        assert torch.allclose(net(x, hi).logits, plain(x, hi).logits, atol=1e-5)
        for name, p in net.named_parameters():
            p += 0.1 * torch.randn_like(p) * (".cond." in name)
        assert not torch.allclose(net(x, lo).logits, net(x, hi).logits, atol=1e-3)
        each = torch.cat([net(x[:1], lo[:1]).logits, net(x[1:], hi[1:]).logits])
        assert torch.allclose(net(x, torch.stack([lo[0], hi[1]])).logits, each, atol=1e-5)    # per sample
        if mixer != "biwkv":                                         # per token, too
            assert torch.allclose(net(x, lo[:, None].expand(2, 9)).logits, net(x, lo).logits, atol=1e-5)


@torch.no_grad()
def test_the_noise_level_is_the_share_of_masks_unless_given():
    net, x = randomised(replace(SMALL, time_cond="film", direction="block")), torch.full((1, 12), 3)
    x[0, [0, 6, 7, 8, 11]] = 11                                      # blocks of 5: 1/5, 3/5, and 1/2 of the last two tokens
    t = torch.tensor([[0.2] * 5 + [0.6] * 5 + [0.5] * 2])
    assert torch.equal(net(x).logits, net(x, t).logits)
    assert torch.equal(nets.mask_share(x == 11, 12, torch.tensor([9])), torch.tensor([4 / 9]))
    with pytest.raises(ValueError, match="give t"):
        net(torch.randn(1, 4, 32))


@torch.no_grad()
def test_two_noise_levels_are_combined():
    net, x, t = randomised(replace(SMALL, time_cond="film", time_inputs=2)), ids(1, 6), torch.tensor([0.5])
    outs = [net(x, a, latent_t=b).logits for a in (t, t / 2) for b in (t, t / 2)]
    assert all(not torch.allclose(p, q, atol=1e-4) for i, p in enumerate(outs) for q in outs[:i])


@torch.no_grad()
def test_biwkv_sees_both_sides_and_decay_follows_the_noise_level():
    net, x = randomised(replace(SMALL, mixer="biwkv")), ids(1, 9)
    for at in (0, 8):
        y = x.clone()
        y[0, at] = (y[0, at] + 1) % 12
        assert (net(y, torch.ones(1)).logits != net(x, torch.ones(1)).logits).any(-1).all()
    assert not torch.allclose(net(x, torch.full((1,), 0.1)).logits, net(x, torch.ones(1)).logits, atol=1e-4)
    shifted, = shift_mix(torch.arange(12.0).view(1, 3, 4), None, torch.ones(4), reach=1)
    assert shifted.tolist() == [[[0, 0, 6, 7], [0, 1, 10, 11], [4, 5, 0, 0]]]
    shifted, = shift_mix(torch.arange(12.0).view(1, 3, 4), torch.full((1, 4), -1.0), torch.ones(4), reach=2)
    assert shifted.tolist() == [[[0, -1, 6, 11], [-1, 1, 10, 0], [0, 5, 0, 0]]]


@torch.no_grad()
@pytest.mark.parametrize("ffn_shift", ["both", "wide"])
@pytest.mark.parametrize("changes", [{}, dict(tie_directions=True), dict(mixer="attention"), dict(mixer="biwkv"), dict(mixer="rwkv7,attention")])
def test_a_shift_from_both_sides(changes, ffn_shift):
    """Another network, each token sees all others, padding changes nothing."""
    cfg = replace(SMALL, n_embd=32, head_size=16, direction="bidirectional", ffn_shift=ffn_shift, **changes)
    net, x = randomised(cfg), ids(2, 9)
    plain = Denoiser(replace(cfg, ffn_shift="before")).eval()
    plain.load_state_dict(net.state_dict())
    assert not torch.allclose(plain(x).logits, net(x).logits, atol=1e-3)
    ragged = net(x, lengths=torch.tensor([9, 6])).logits
    assert torch.allclose(ragged[1, :6], net(x[1:, :6]).logits[0], atol=1e-5) and torch.allclose(ragged[0], net(x[:1]).logits[0], atol=1e-5)
    for at in (0, 4, 8):
        y = x.clone()
        y[:, at] = (y[:, at] + 1) % 12
        assert (net(y).logits != net(x).logits).any(-1).all()


@torch.no_grad()
@pytest.mark.parametrize("mixer", ["rwkv7", "attention"])
@pytest.mark.parametrize("ffn_shift", ["before", "both", "wide"])
def test_a_causal_network_looks_ahead_by_its_shifts_alone(mixer, ffn_shift):
    """Reach tokens a layer; what is read as finished text sees nothing ahead, so that its state goes on."""
    cfg, x, T = replace(SMALL, mixer=mixer, direction="causal", ffn_shift=ffn_shift, n_layer=2), ids(1, 12), 12
    net, seen = randomised(cfg), {}
    for finished in (False, True):
        sees = []
        for at in range(T):
            y = x.clone()
            y[0, at] = (y[0, at] + 1) % 12
            sees.append((net(y, finished_text=finished).logits != net(x, finished_text=finished).logits).any(-1)[0])
        seen[finished] = torch.stack(sees, 1)                         # (token, what it sees)
    ahead = 2 * nets.FFN_SHIFTS[ffn_shift]
    assert torch.equal(seen[False], torch.ones(T, T).tril(ahead).bool())
    assert torch.equal(seen[True], torch.ones(T, T).tril().bool())
    parts = net(x[:, 5:], state=net(x[:, :5], finished_text=True).state, finished_text=True)
    assert torch.allclose(parts.logits, net(x, finished_text=True).logits[:, 5:], atol=1e-5)


@torch.no_grad()
def test_observed_tokens_come_first_and_masks_see_them_all():
    """One scan a layer; the token shifts, which follow the text, are left out."""
    net, T = randomised(replace(SMALL, rotary=True, observed_first=True, ffn_shift="none")), 9
    for block in net.blocks:
        for name in ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g"):
            getattr(block.att, name).zero_()
    x, masked = ids(1, T) % 11, torch.tensor([0, 1, 0, 0, 1, 1, 0, 1, 0]).bool()
    x[0, masked] = net.mask_id
    order = torch.cat([torch.arange(T)[~masked], torch.arange(T)[masked]])
    sees = torch.zeros(T, T, dtype=torch.bool)
    for at in range(T):
        hook = net.emb.register_forward_hook(lambda module, inputs, out, at=at: out + (torch.arange(T) == at)[None, :, None] * 0.1)
        moved = net(x).logits
        hook.remove()
        sees[:, at] = (moved != net(x).logits).any(-1)[0]
    rank = order.argsort()
    assert torch.equal(sees, rank[None, :] <= rank[:, None])
    swapped = x.clone()
    swapped[0, [0, 2]] = x[0, [2, 0]]
    assert x[0, 0] == x[0, 2] or (net(swapped).logits != net(x).logits)[0, 1:].any()      # where they stand matters


@torch.no_grad()
def test_rotary_positions_by_their_definition():
    """Pairs of channels as complex numbers, turned by t 10000^(-j / (N / 2)), in float64, one token at a time."""
    B, T, H, N = 2, 7, 2, 16
    r, w, k, v, a, b = (torch.randn(B, T, H, N, dtype=torch.float64) * 0.4 for _ in range(6))
    w, first = -w.abs(), torch.tensor([3, 11])
    seq = nets.Sequence.of(torch.zeros(B, T, 32), replace(SMALL, rotary=True), None, None, 1, False, None, None, start=first)
    y, s = seq.turned(seq.turn)["scan"](r, w, k, v, a, b)
    s0 = torch.zeros(B, H, N, N, dtype=torch.float64)
    for t in range(T):
        turn = torch.polar(torch.ones(1).double(), (first + t)[:, None].double() * 10_000.0 ** -(torch.arange(N // 2).double() / (N // 2)))[:, None]
        def turned(z):
            z = torch.complex(z[:, t, :, :N // 2], z[:, t, :, N // 2:]) * turn
            return torch.cat([z.real, z.imag], -1)
        rt, kt, at, bt = map(turned, (r, k, a, b))
        s0 = s0 * w[:, t].exp()[:, :, None] + (s0 @ at[..., None]) @ bt[:, :, None] + v[:, t, ..., None] @ kt[:, :, None]
        assert torch.allclose(y[:, t], (s0 @ rt[..., None])[..., 0], atol=1e-5)
    assert torch.allclose(s, s0, atol=1e-5) and seq.seen.tolist() == [10, 18]


@torch.no_grad()
def test_rms_norm_and_tied_embeddings():
    net, x = randomised(replace(SMALL, norm="rms", tie_embeddings=True)), ids(1, 5)
    assert not any(k.startswith("head") or ("ln1" in k and k.endswith("bias")) for k in net.state_dict())
    out = net(x)
    assert torch.allclose(out.logits, out.hidden @ net.emb.weight[:11].T, atol=1e-5) and out.logits.shape[-1] == 11
    kinds = {n: kind for n, _, kind, _, _ in nets.parameter_kinds(net)}
    assert kinds["emb.weight"] == "head"


@pytest.mark.parametrize("change,words", [
    (dict(mixer="rwkv8"), "'rwkv8' is unknown: choose from rwkv7, biwkv, attention"), (dict(block_size=0), "block_size=0 is not allowed"),
    (dict(mixer="biwkv", direction="causal"), "direction='causal' is not for mixer=biwkv: choose one of bidirectional"),
    (dict(direction="block", dw_jrt=True), "dw_jrt_inject=leak forgets .* choose dw_jrt_inject=gate"),
    (dict(dw_jrt=True, dw_jrt_chunk=4), "choose dw_jrt_inject=gate"), (dict(dw_jrt=True, dw_jrt_inject="reverse"), "give dw_jrt_chunk"),
    (dict(observed_first=True), "knows? positions: --direction=causal --rotary=1"), (dict(observed_first=True, rotary=True, read_twice=True), "observed_first=1"),
    (dict(direction="alternate", dw_jrt_chunk=4), "dw_jrt_chunk=4 is for direction=causal"), (dict(latent_dim=4, read_twice=True), "read_twice=1 is for"), (dict(time_dim=3), "time_dim=3")])
def test_impossible_networks(change, words):
    with pytest.raises(ValueError, match=words):
        Denoiser(replace(SMALL, **change))


ROWS = """
import runpy, sys, torch, model
class Half(model.RWKV7):
    def forward(self, x, state, seq, carry):
        y, *rest = super().forward(x, state, seq, carry)
        return y / 2, *rest
class Mean(model.AddFusion):
    def forward(self, f, b):
        return (f + b) / 2
class Twice(model.NoCond):
    parts = 1
    def forward(self, time):
        a, b = super().forward(time)
        return model.Condition(a.shift * 2), b
class Quarter(model.InitSeed):
    def forward(self, seed, ctx):
        return seed / 4, None
model.TIME_MIXERS["half"], model.FUSIONS["mean"], model.TIME_CONDS["twice"], model.DW_JRT_INJECT["quarter"] = Half, Mean, Twice, Quarter
sys.argv = ["train.py"] + {options!r}
runpy.run_path({train!r}, run_name="__main__")
"""


@pytest.mark.parametrize("row", ["mixer=half", "fusion=mean", "time_cond=twice", "dw_jrt_inject=quarter"])
def test_a_dummy_row_trains_without_another_edit(run, row):
    options = ["--struct_task=1", "--struct_len=2", "--n_embd=32", "--head_size=16", "--batch_size=4", "--max_iters=2", "--struct_eval_n=4",
               "--direction=bidirectional", "--dw_jrt=1", "--wkv_impl=torch", "--threads=1", f"--{row}"]
    shown = ok(run(ROWS.format(options=options, train=os.path.join(ROOT, "train.py"))))
    assert "step 2: val loss" in shown and row.replace("=", " = '") in shown
