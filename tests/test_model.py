"""The network: against the official package, against RWKV-LM's initialisation rules, states, padding, DW-JRT, checkpoints."""
import math
import os
from dataclasses import replace

import pytest
import torch

import model as nets
from model import Denoiser, ModelConfig, from_pretrained, load_checkpoint, parameter_kinds, save_checkpoint
from wkv_cuda import wkv7_leaky

SMALL = ModelConfig(n_layer=3, n_embd=64, head_size=16, vocab_size=11)


def randomised(cfg):
    """A network in which nothing is zero, so that every path matters."""
    net = Denoiser(cfg)
    for name, p in net.named_parameters():
        p.data += torch.randn_like(p) * (0.5 if name == "emb.weight" else 0.1)
    return net.eval()


def official(net):
    """The state dict as the official files have it: no mask row, value residual also in layer 0."""
    weights = {k: v.clone() for k, v in net.state_dict().items() if ".jrt." not in k}
    weights["emb.weight"] = weights["emb.weight"][:-1]
    for key in ("v0", "v1", "v2"):
        weights[f"blocks.0.att.{key}"] = weights[f"blocks.1.att.{key}"].clone()
    return weights


@torch.no_grad()
def test_logits_and_state_equal_the_official_package(tmp_path, monkeypatch):
    pytest.importorskip("rwkv", reason="the official package: pip install -r requirements-dev.txt")
    for key, value in dict(RWKV_V7_ON="1", RWKV_JIT_ON="0", RWKV_CUDA_ON="0").items():
        monkeypatch.setenv(key, value)
    from rwkv.model import RWKV
    net = randomised(ModelConfig(n_layer=3, n_embd=128, head_size=64, vocab_size=97))
    torch.save(official(net), tmp_path / "x.pth")
    ids = torch.randint(97, (41,))
    logits, state = RWKV(str(tmp_path / "x"), "cpu fp32").forward(ids.tolist(), None, full_output=True)
    ours = from_pretrained(str(tmp_path / "x.pth"))
    assert ours.cfg.head_size == 64 and ours.cfg.vocab_size == 97 and ours.cfg.n_layer == 3
    out = ours(ids[None])
    assert (out.logits[0] - logits).norm() / logits.norm() < 1e-4
    for layer in range(3):
        assert torch.allclose(out.state[layer].mix[0], state[3 * layer + 1], atol=1e-4)
        assert torch.allclose(out.state[layer].att_shift[0], state[3 * layer], atol=1e-4)


@torch.no_grad()
def test_token_by_token_equals_the_whole():
    net, x = randomised(SMALL), torch.randint(12, (2, 23))
    whole = net(x)
    state, logits = None, []
    for t in range(23):
        out = net(x[:, t:t + 1], state=state)
        state, logits = out.state, logits + [out.logits]
    assert torch.allclose(torch.cat(logits, 1), whole.logits, atol=1e-5)
    for a, b in zip(state, whole.state):
        assert all(torch.allclose(p, q, atol=1e-5) for p, q in zip(a[:3], b[:3]))


@pytest.mark.parametrize("inject", [None, *nets.DW_JRT_INJECT])
def test_padding_changes_nothing(inject):
    """Rows of different lengths in one batch give the logits, states and gradients of the rows alone."""
    cfg = replace(SMALL, dw_jrt=inject is not None, dw_jrt_inject=inject or "gate", dw_jrt_chunk=5 * (inject == "reverse"))
    net, lengths = randomised(cfg), torch.tensor([9, 4, 13])
    x = torch.randint(12, (3, 13))
    out = net(x, lengths=lengths)
    real = torch.arange(13) < lengths[:, None]
    (out.logits * real[:, :, None]).sum().backward()
    together = {n: p.grad.clone() for n, p in net.named_parameters()}
    net.zero_grad()
    for i, n in enumerate(lengths.tolist()):
        alone = net(x[i:i + 1, :n])
        alone.logits.sum().backward()
        assert torch.allclose(out.logits[i, :n], alone.logits[0], atol=1e-5)
        for a, b in zip(out.state, alone.state):
            assert all((p[i] - q[0]).norm() <= 1e-6 * q.norm() + 1e-6 for p, q in zip(a[:3], b[:3]))
    for n, p in net.named_parameters():
        assert torch.allclose(p.grad, together[n], rtol=1e-3, atol=1e-3), n


@torch.no_grad()
def test_the_mask_cannot_be_predicted_and_causality():
    net, x = randomised(SMALL), torch.randint(12, (1, 20))
    out = net(x)
    assert out.logits.shape == (1, 20, 11) and net.mask_id == 11 and net.emb.weight.shape == (12, 64)
    y = x.clone()
    y[0, 12] = (y[0, 12] + 1) % 12
    changed = (net(y).logits != out.logits).any(-1)[0]
    assert not changed[:12].any() and changed[12:].all()


@torch.no_grad()
@pytest.mark.parametrize("inject", nets.DW_JRT_INJECT)
def test_dw_jrt_lets_the_left_see_the_right(inject):
    net = randomised(replace(SMALL, dw_jrt=True, dw_jrt_inject=inject, dw_jrt_chunk=3 * (inject == "reverse")))
    x = torch.randint(12, (1, 20))
    y = x.clone()
    y[0, -1] = (y[0, -1] + 1) % 12
    assert ((net(x).logits - net(y).logits).abs().amax(-1)[0] > 1e-4).all()


@pytest.mark.parametrize("inject", nets.DW_JRT_INJECT)
@pytest.mark.parametrize("carried", [False, True])
def test_dw_jrt_forms_by_their_definitions(inject, carried):
    """One layer's scan against the token loop written out as DESIGN section 4 has it, in float64."""
    cfg = replace(SMALL, dw_jrt=True, dw_jrt_inject=inject, dw_jrt_scale=1.7, dw_jrt_chunk=3 * (inject == "reverse"))
    mixer, (B, T, H, N) = randomised(cfg).blocks[1].att, (2, 7, 4, 16)
    r, w, k, v, a, b = (torch.randn(B, T, H, N) * 0.4 for _ in range(6))
    w, seed, ctx = -w.abs(), torch.randn(B, H, N, N), torch.randn(B, H, N, N) if carried else None
    gated = inject in ("gate", "reverse")
    if carried and not gated:             # they would forget what was carried
        with pytest.raises(ValueError, match="use dw_jrt_inject=gate"):
            mixer.start(ctx, seed)
        return
    y, s_end = wkv7_leaky(r, w, k, v, a, b, *mixer.start(ctx, seed))
    g = mixer.jrt.alpha.sigmoid().double()[:, None, None] if inject != "init" else None
    base = torch.zeros(B, H, N, N, dtype=torch.float64) if ctx is None else ctx.double()
    s = base + g * (1.7 * seed.double() - base) if gated else 1.7 * seed.double()
    for t in range(T):
        rt, wt, kt, vt, at, bt = (z[:, t].double() for z in (r, w, k, v, a, b))
        s = s * wt.exp()[:, :, None, :] + (s @ at[..., None]) @ bt[:, :, None, :] + vt[..., None] @ kt[:, :, None, :]
        if inject == "leak":
            s = s + g * seed.double() * (1 - wt.exp())[:, :, None, :]
        assert torch.allclose(y[:, t].double(), (s @ rt[..., None])[..., 0], atol=1e-4), t
    assert torch.allclose(s_end.double(), s, atol=1e-4)


def test_dw_jrt_gradient_flows_through_depth_and_starts_where_told():
    net = randomised(replace(SMALL, dw_jrt=True, dw_jrt_layer_start=2))
    assert [block.att.jrt is not None for block in net.blocks] == [False, False, True]
    net = randomised(replace(SMALL, dw_jrt=True))
    # The last position's embedding reaches the first position's logits only through a seed.
    x = net.emb(torch.randint(12, (1, 9))).detach().requires_grad_()
    net(x).logits[0, 0].sum().backward()
    assert x.grad[0, -1].abs().max() > 1e-6
    assert all(block.att.jrt.alpha.grad.abs().max() > 0 for block in net.blocks[1:])


@torch.no_grad()
@pytest.mark.parametrize("inject", ["gate", "reverse"])
def test_chunk_seeds_by_their_definition(inject):
    """The second layer, chunk by chunk, each from the carried state and what the layer below has after this chunk and those that come."""
    n, T = 4, 14
    net, x = randomised(replace(SMALL, n_layer=2, dw_jrt=True, dw_jrt_inject=inject, dw_jrt_scale=1.7, dw_jrt_chunk=n)), torch.randint(12, (2, 14))
    plain, (first, second) = replace(net.cfg, dw_jrt=False), net.blocks
    sequence = lambda z: nets.Sequence.of(z, plain, None, None, 1, False, None, None)
    start, jrt = first.ln0(net.emb(x)), second.att.jrt
    below, _, carry = first(start, None, sequence(start), nets.Carry())
    ends = [first(start[:, :m], None, sequence(start[:, :m]), nets.Carry())[1].mix for m in (4, 8, 12, 14)]
    rho, seeds = jrt.beta.sigmoid()[:, None, None] if inject == "reverse" else 0, ends[-1:]
    for end in ends[-2::-1]:
        seeds.insert(0, (1 - rho) * end + rho * seeds[0])
    state, ys, g = None, [], jrt.alpha.sigmoid()[:, None, None]
    second.att.jrt = None
    for at, seed in zip(range(0, T, n), seeds):
        carried = torch.zeros_like(seed) if state is None else state.mix
        s0 = (1 - g) * carried + g * 1.7 * seed
        state = nets.LayerState(s0, *(torch.zeros(2, 64), torch.zeros(2, 64)) if state is None else state[1:])
        piece = below[:, at:at + n]
        y, state, _ = second(piece, state, sequence(piece), nets.Carry(v_first=carry.v_first[:, at:at + n]))
        ys.append(y)
    second.att.jrt = jrt
    assert torch.allclose(net(x).hidden, net.ln_out(torch.cat(ys, 1)), atol=1e-5)
    assert torch.allclose(net(x).state[1].mix, state.mix, atol=1e-5)


@torch.no_grad()
def test_what_is_read_twice_is_predicted_at_the_second_reading():
    net, x = randomised(replace(SMALL, read_twice=True)), torch.randint(12, (2, 9))
    once = Denoiser(replace(net.cfg, read_twice=False)).eval()
    once.load_state_dict(net.state_dict())
    assert torch.allclose(net(x).logits, once(torch.cat([x, x], 1)).logits[:, 9:], atol=1e-5)
    assert torch.equal(net(x, finished_text=True).logits, once(x, finished_text=True).logits)


def test_one_layer_works():
    Denoiser(replace(SMALL, n_layer=1))(torch.zeros(1, 3, dtype=torch.long))


# Expected values computed here from train_temp's formulas, elementwise, independently of init_weights.
def expected_vectors(C, N, L, i):
    up, down = i / (L - 1), 1 - i / L
    for n in range(C):
        z = ((n % N) - (N - 1) / 2) / ((N - 1) / 2)
        zig, lin, d = z * abs(z), n / (C - 1) - 0.5, n / C
        yield {"x_r": 1 - d ** (0.2 * down), "x_w": 1 - d ** (0.9 * down), "x_k": 1 - d ** (0.7 * down), "x_v": 1 - d ** (0.7 * down),
               "x_a": 1 - d ** (0.9 * down), "x_g": 1 - d ** (0.2 * down), "w0": -6 + 6 * (n / (C - 1)) ** (1 + up ** 0.3) + 0.5 + 2.5 * zig,
               "a0": -0.19 + 0.3 * zig + 0.4 * lin, "v0": 0.73 - 0.4 * lin, "k_k": 0.71 - 0.1 * lin, "k_a": 1.02,
               "ln_x.weight": ((1 + i) / L) ** 0.7, "ffn.x_k": 1 - d ** (down ** 4)}


def test_initialisation_of_vectors_row_by_row():
    C, N, L = 64, 16, 3
    weights = Denoiser(SMALL).state_dict()
    for i in range(L):
        for n, row in enumerate(expected_vectors(C, N, L, i)):
            for name, want in row.items():
                key = f"blocks.{i}.{name if '.' in name and name != 'ln_x.weight' else 'att.' + name}"
                if key in weights:
                    assert abs(weights[key].flatten()[n].item() - want) < 1e-5, (key, n)
                else:
                    assert (i, name) == (0, "v0")


def test_initialisation_of_matrices():
    V, C = 200, 64
    weights = Denoiser(replace(SMALL, vocab_size=V)).state_dict()

    def gain(m):   # singular values of a scaled orthogonal matrix are all its gain
        s = torch.linalg.svdvals(m)
        assert s.max() - s.min() < 1e-4
        return s.mean().item()

    assert weights["emb.weight"].abs().max() <= 1e-4 < 3 * weights["emb.weight"].std()
    assert gain(weights["head.weight"]) == pytest.approx(0.5 * math.sqrt(V / C), rel=1e-4)
    assert gain(Denoiser(SMALL).head.weight) == pytest.approx(0.5, rel=1e-4)
    for i in range(3):
        for key, want in {"att.receptance": 1, "att.key": 0.1, "att.value": 1, "ffn.key": 1}.items():
            assert gain(weights[f"blocks.{i}.{key}.weight"]) == pytest.approx(want, rel=1e-4), key
        for key in ("att.output.weight", "ffn.value.weight", "att.w1", "att.a1", "att.g1") + (("att.v1",) if i else ()):
            assert not weights[f"blocks.{i}.{key}"].any(), key
        for key in ("w2", "a2", "g2") + (("v2",) if i else ()):
            m = weights[f"blocks.{i}.att.{key}"]
            assert gain(m) == pytest.approx(0.1 * max(1, m.shape[0] / m.shape[1]) ** 0.5, rel=1e-4), key
        assert (weights[f"blocks.{i}.att.r_k"] == -0.04).all()


def test_low_rank_sizes_follow_the_rule():
    shapes = {k: tuple(v.shape) for k, v in Denoiser(ModelConfig(n_layer=2, n_embd=768, head_size=64, vocab_size=5)).state_dict().items()}
    assert [shapes[f"blocks.1.att.{k}1"][1] for k in "wavg"] == [64, 64, 32, 128]        # the official 0.1B model's


def test_parameter_kinds_follow_train_temp():
    rows = {n: (kind, scale, decayed) for n, _, kind, scale, decayed in parameter_kinds(Denoiser(replace(SMALL, dw_jrt=True)))}
    assert rows["blocks.1.att.w0"] == ("vector", 2.0, False)
    assert {n for n, row in rows.items() if row[1] != 1.0} == {f"blocks.{i}.att.w0" for i in range(3)}
    assert rows["blocks.1.att.jrt.alpha"] == ("scalar", 1.0, False)
    assert rows["emb.weight"] == ("emb", 1.0, True) and rows["head.weight"] == ("head", 1.0, True)
    assert {n for n, row in rows.items() if row[2]} == {"emb.weight", "head.weight"} | {
        f"blocks.{i}.{m}.weight" for i in range(3) for m in ("att.receptance", "att.key", "att.value", "att.output", "ffn.key", "ffn.value")}
    assert rows["blocks.0.att.ln_x.weight"][0] == rows["ln_out.bias"][0] == "norm" and rows["blocks.0.att.w1"][0] == "vector"


@pytest.mark.parametrize("change,words", [(dict(n_embd=100), "n_embd=100 is not a multiple of head_size=16"),
                                          (dict(head_size=24, n_embd=48), "head_size=24 is not supported: choose one of 16, 32, 64, 128")])
def test_impossible_configs(change, words):
    with pytest.raises(ValueError, match=words):
        Denoiser(replace(SMALL, **change))


def test_checkpoints_are_atomic_and_safe(tmp_path, monkeypatch):
    path = str(tmp_path / "deep" / "ckpt.pt")
    save_checkpoint(path, {"step": 3, "x": torch.ones(2)})
    assert load_checkpoint(path)["step"] == 3 and os.listdir(tmp_path / "deep") == ["ckpt.pt"]
    monkeypatch.setattr(torch, "save", lambda content, f: (f.write(b"half"), (_ for _ in ()).throw(KeyboardInterrupt())))
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(path, {"step": 4})
    assert load_checkpoint(path)["step"] == 3                        # killed while writing: the old one is whole

    class Evil:
        def __reduce__(self):
            return os.system, ("touch " + str(tmp_path / "pwned"),)
    monkeypatch.undo()
    torch.save({"model": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="not a file of plain tensors"):
        load_checkpoint(str(tmp_path / "evil.pt"))
    assert not (tmp_path / "pwned").exists()


def test_foreign_checkpoints_get_one_line(tmp_path):
    weights = official(Denoiser(replace(SMALL, n_embd=32)))
    cases = {"missing": (None, "does not exist"), "empty": (b"", "cannot be read|not a file"), "text": (b"hello", "not a file|cannot be read"),
             "other": ({"layer.weight": torch.ones(2)}, "lacks emb.weight, head.weight"), "nothing": ({"a": 1}, "holds no weights"),
             "partial": ({k: v for k, v in weights.items() if "att.r_k" not in k}, "lacks blocks.0.att.r_k"),
             "hole": ({k: v for k, v in weights.items() if k != "blocks.1.ffn.x_k"}, "lacks blocks.1.ffn.x_k"),
             "extra": (weights | {"blocks.1.more": torch.ones(1)}, "unknown blocks.1.more"),
             "shape": (weights | {"ln_out.weight": torch.ones(5)}, r"another shape in ln_out.weight \(5,\) for \(32,\)")}
    for name, (content, words) in cases.items():
        path = str(tmp_path / name)
        if isinstance(content, bytes):
            open(path, "wb").write(content)
        elif content:
            torch.save(content, path)
        with pytest.raises(ValueError, match=words) as e:
            from_pretrained(path)
        assert "\n" not in str(e.value), name
    torch.save(weights, tmp_path / "good")
    cut = open(tmp_path / "good", "rb").read()
    for share in (0.3, 0.9, 0.999):
        open(tmp_path / "cut", "wb").write(cut[:int(len(cut) * share)])
        with pytest.raises(ValueError, match="truncated|not a file"):
            from_pretrained(str(tmp_path / "cut"))
    with pytest.raises(ValueError, match=r"n_embd=64 \(the file has 32\)"):
        from_pretrained(str(tmp_path / "good"), n_embd=64)


def test_official_weights_in_bf16_with_dw_jrt_on_top(tmp_path):
    net = randomised(replace(SMALL, n_embd=32))
    torch.save({k: v.bfloat16() for k, v in official(net).items()}, tmp_path / "x.pth")
    seeded = from_pretrained(str(tmp_path / "x.pth"), dw_jrt=True, dw_jrt_alpha_init=-1.0)
    assert seeded.cfg.dw_jrt and seeded.blocks[1].att.jrt.alpha.eq(-1).all() and seeded.emb.weight.dtype == torch.float32
    assert torch.equal(seeded.blocks[1].att.key.weight, net.blocks[1].att.key.weight.bfloat16().float())


class Again(nets.Replayed):
    """Replayed where there is no GPU: a replay computes the call anew, out of and into the same memory."""
    def record(self, given, tree):
        kept = [z.clone() if torch.is_tensor(z) else z for z in given]
        args, options = nets.pytree.tree_unflatten(kept, tree)
        out = self.forward(*args, **options)
        tensors = lambda z: [x for x in nets.pytree.tree_leaves(z) if torch.is_tensor(x)]
        return lambda: [a.copy_(b) for a, b in zip(tensors(out), tensors(self.forward(*args, **options)))], kept, out


@pytest.mark.parametrize("kind, device", [(Again, "cpu"), (nets.Replayed, "cuda")])
@pytest.mark.parametrize("mixer", ["rwkv7", "attention"])
def test_replayed_calls_give_what_plain_ones_give(mixer, kind, device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    net = randomised(nets.ModelConfig(n_layer=2, n_embd=32, head_size=16, vocab_size=9, mixer=mixer, direction="block",
                                      block_size=4)).to(device).eval()
    plain, replayed, kept = net.forward, kind(net.forward), []
    g = torch.Generator().manual_seed(0)
    for _ in range(4):
        x = torch.randint(10, (3, 8), generator=g).to(device)
        lengths = torch.randint(1, 9, (3,), generator=g).to(device)
        with torch.no_grad():
            before = plain(x, finished_text=True).state
            calls = [dict(), dict(lengths=lengths), dict(state=before), dict(finished_text=True, targets=x[:, :0])]
            for options in calls:
                kept.append((replayed(x, **options), plain(x, **options)))
    assert len(replayed.records) == 4 and all(replayed.records.values())
    for got, wanted in kept:               # none was overwritten by a later replay
        for a, b in zip(*(nets.pytree.tree_leaves(z) for z in (got, wanted)), strict=True):
            assert torch.equal(a, b) if torch.is_tensor(a) else a == b
    assert replayed(x).logits.grad_fn is not None       # with gradients nothing is replayed
    with torch.no_grad():
        assert torch.equal(replayed(x, targets=x % 9).nats, plain(x, targets=x % 9).nats)
        replayed(x[:, :4])
    assert len(replayed.records) == 4 and list(replayed.records.values())[-1] is None


def test_targets_of_no_tokens_leave_out_the_head():
    net = randomised(nets.ModelConfig(n_layer=1, n_embd=32, head_size=16, vocab_size=9))
    x = torch.randint(10, (2, 5))
    out = net(x, targets=x[:, :0])
    assert out.logits is None and out.nats is None and torch.equal(out.hidden, net(x).hidden)


def test_losses_of_many_numbers_of_tokens_have_few_sizes(monkeypatch):
    net, sizes = randomised(nets.ModelConfig(n_layer=1, n_embd=32, head_size=16, vocab_size=9)), []
    x, logits = torch.randint(10, (3, 90)), net.logits
    wanted = torch.nn.functional.cross_entropy(net(x).logits.flatten(0, 1), x.flatten() % 9, reduction="none").view(3, 90)
    monkeypatch.setattr(net, "logits", lambda h: (sizes.append(len(h)), logits(h))[1])
    for n in (1, 127, 128, 129, 270):
        asked = torch.zeros(270).index_fill(0, torch.randperm(270)[:n], 1).view(3, 90) > 0
        nats = net(x, targets=(x % 9).masked_fill(~asked, -1)).nats
        assert torch.allclose(nats, wanted * asked, atol=1e-5)
    assert sizes == [128, 128, 128, 256, 384]
