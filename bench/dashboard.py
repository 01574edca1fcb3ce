"""python bench.py --suite=dashboard: what a text diffusion model is asked for, small, in one run: latents,
texts from denoised embeddings, is language kept, speed, quality against speed by block size and steps."""
import os
import time

import torch

import bench
import data
import diffusion
from bench import Run, from_file, pyplot, quality, reopened, save_figure, table, trained

latent, gaussian = from_file("latent"), from_file("gaussian")
T, LEVELS, BLOCKS, CALLS = 128, (0.2, 0.35, 0.5, 0.65, 0.8), (32, 64, 128), (2, 4, 8, 16, 32)

def runs_on(text, pairs):
    """All of bytes and 128 channels, four layers, T=128; {name: Run}."""
    steps = 10 if bench.quick else 300
    common = [f"--max_iters={steps}", "--eval_interval=100000", "--tokenizer=byte", "--eval_iters=2"]
    if bench.quick:
        common += ["--batch_size=4"]
    causal = "--direction=causal --ffn_shift=before"
    latents = ("config/latent.py --objective=sequential --latent_pred_from=text --predict=next "
               f"--ffn_shift=before --data_path={pairs}")
    rows = {"next token": ("", f"config/latent.py --objective=ar {causal} --data_path={text}"),
            "latents": ("next token", latents),
            "latents, backbone frozen": ("next token", f"{latents} --freeze_backbone=1"),
            "embeddings": ("", f"config/gaussian.py --data_path={text}"),
            "blocks": ("", "config/shakespeare.py --objective=mixture --direction=block "
                           f"--block_sizes=32,64,0 --data_path={text}")}
    return {name: Run(options.split() + common, start=start) for name, (start, options) in rows.items()}

class Judge:
    """The network of next tokens: how likely, and in features how near to held-out text, are texts?"""

    def __init__(self, folder, held_out):
        self.net, cfg = reopened(folder)
        self.exact, self.held_out = diffusion.NextToken(cfg, self.net.cfg), held_out
        self.own = self.features(held_out)

    @torch.no_grad()
    def features(self, ids):
        return diffusion.read_on(self.net)(ids).hidden.mean(1).numpy()

    def scores(self, ids):
        """-> nats per token of texts (B,T); divergence of their bigrams; MAUVE if mauve-text is installed."""
        nats = self.exact.bound(self.net, ids).mean().item()
        found = {"nats": nats, "kl": gaussian.bigram_kl(ids, self.held_out)}
        try:
            import mauve
        except ImportError:
            return found
        compared = mauve.compute_mauve(p_features=self.own, q_features=self.features(ids), verbose=False)
        return found | {"mauve": float(compared.mauve)}

@torch.no_grad()
def denoised(folder, judge, source):
    """Held-out texts noised whole, denoised in one pass, drawn by nucleus sampling; and texts from noise."""
    (net, cfg), x, draws = reopened(folder), judge.held_out, data.generator(1, 0, 3)
    found, embeddings = {"bleu": [], "right": []}, net.table()
    for level in LEVELS:
        t = torch.full(x.shape, level)
        eps = torch.randn(*x.shape, embeddings.shape[1], generator=draws)
        x_t = diffusion.embedded(x, t, eps, embeddings, cfg)[1]
        logits = diffusion.estimate(net, x_t, t, embeddings, cfg).logits
        y = diffusion.draw(logits, 1.0, 0, 0.9, draws)[0]
        found["right"].append((y == x).float().mean().item())
        found["bleu"].append(latent.overlap(source, y, x).get("bleu"))
    y = gaussian.sampled(folder, len(x), T, "ddim", 50, top_p=0.9, temperature=1.0)
    return found | judge.scores(y) | {"sample": latent.decoded(source, y)[0]}

@torch.no_grad()
def pareto(folder, judge):
    """{"block N, S calls": quality and tokens per second} of texts from one network of several sizes."""
    (net, cfg), x, found = reopened(folder), judge.held_out, {}
    objective = diffusion.OBJECTIVES[cfg.objective](cfg, net.cfg)
    nothing = torch.full(x.shape, net.mask_id)
    for n in BLOCKS:
        for calls in (c for c in CALLS if c <= n and not (bench.quick and c > 2)):
            begun = time.perf_counter()
            y = objective.fill(net, nothing, nothing != net.mask_id, data.generator(1, 0, 3), "block",
                               block_size=n, inner="first_hitting", steps=calls)
            speed = y.numel() / (time.perf_counter() - begun)
            found[f"block {n}, {calls} calls"] = judge.scores(y) | {"tokens_per_s": speed}
    return found

def suite():
    """In less than half an hour on two cores; the runs stay in OUT/local."""
    n, (work, pairs, text) = 8 if bench.quick else 256, latent.texts()
    work = os.path.join(work, "dashboard")
    source = data.TextSource(text, T, "byte")
    held_out, runs = source.eval_rows(n)[0], runs_on(text, pairs)
    judge = Judge(trained(runs, "next token", work), held_out)

    def with_latents(folder):
        (net, cfg), texts = reopened(folder), data.PairSource(pairs, T)
        x, _, lengths, z = texts.eval_rows(10 * n)
        found = {"perplexity": latent.perplexity(folder, trained(runs, "next token", work), held_out)}
        found |= diffusion.latent_report(net, x, lengths, z, data.generator(1, 0, 2), cfg)
        return found | latent.text_scores(net, cfg, texts, x[:64], z[:64])

    def next_token(folder):
        return {"perplexity": latent.perplexity(folder, folder, held_out)} | judge.scores(held_out)
    measures = {"next token": next_token, "latents": with_latents,
                "latents, backbone frozen": with_latents,
                "embeddings": lambda folder: denoised(folder, judge, source),
                "blocks": lambda folder: {"pareto": pareto(folder, judge)}}

    @torch.no_grad()
    def measure(name, folder):
        return measures[name](folder)
    found = quality("dashboard", runs, measure, work=work)
    speed = gaussian.denoising_ms()
    shown(found, speed)
    return {"runs": found, "speed": speed}

def shown(found, speed):
    """The table and the picture."""
    z, frozen = found["latents"], found["latents, backbone frozen"]
    free, blocks, before = found["embeddings"], found["blocks"]["pareto"], found["next token"]["perplexity"]

    def with_frozen(figure):
        """figure(run) of `latents`, and in brackets with the backbone frozen."""
        return f"{figure(z)} ({figure(frozen)})"
    mauve = f"{free['mauve']:.3f}" if "mauve" in free else "none (pip install mauve-text)"
    rows = {"latent from text, squared error, of the mean's (backbone frozen)":
                with_frozen(lambda run: f"{run['latent_mse'] / run['latent_mse_of_mean']:.3f}"),
            "text from its latent, BLEU / chrF": f"{z.get('bleu', 0):.2f} / {z.get('chrf', 0):.1f}",
            f"perplexity per byte of next tokens, {before:.2f} before latents, after (backbone frozen)":
                with_frozen(lambda run: f"{run['perplexity']:.2f}"),
            "texts from noise, 50 steps, top_p 0.9: nats per byte (of held-out text)":
                f"{free['nats']:.2f} ({found['next token']['nats']:.2f})",
            "... their bigrams' divergence": f"{free['kl']:.3f}",
            "... MAUVE (features of our own network)": mauve}
    rows |= {f"a step at 512 tokens, ms: {name}": f"{ms:.1f}" for name, ms in speed.items()}
    table("the dashboard", "what | figure", "{x}", {name: {"x": x} for name, x in rows.items()})
    table("texts in blocks: likelier texts are not always better ones, so see the divergence, too",
          "block, calls per block | nats per byte | bigram divergence | MAUVE | tokens per second",
          "{nats:.3f} | {kl:.3f} | {mauve:.3f} | {tokens_per_s:.0f}", blocks)
    plt = pyplot()
    if plt is None:
        return
    figure, ((a, b), (c, d)) = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
    for n in BLOCKS:
        speeds, kls = zip(*((row["tokens_per_s"], row["kl"]) for key, row in blocks.items()
                            if key.startswith(f"block {n},")))
        a.plot(speeds, kls, "o-", label=f"blocks of {n}")
    a.set(title="quality against speed, by calls", xlabel="tokens per second", xscale="log",
          ylabel="bigram divergence, nats")
    a.set_xticks([1000, 3000, 10000, 30000], labels=["1k", "3k", "10k", "30k"])
    a.minorticks_off()
    a.legend()
    b.plot(LEVELS, [100 * x for x in free["right"]], "o-", label="tokens right, %")
    if None not in free["bleu"]:
        b.plot(LEVELS, free["bleu"], "s-", label="BLEU, %")
    b.set(title="from denoised embeddings", xlabel="noise level")
    b.legend()
    c.barh(list(speed), list(speed.values()))
    c.set(title="a denoising step at 512 tokens, ms")
    words = ["text_nats", "text_nats_shuffled", "text_nats_no_latent"]
    errors = [z[f"{word}_se"] or 0 for word in words]
    d.errorbar(["its own", "another's", "none"], [z[word] for word in words], errors, fmt="o", capsize=6)
    d.set(title="text given a latent: nats per byte", xlim=(-0.5, 2.5))
    save_figure("dashboard", figure)
