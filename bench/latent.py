"""python bench.py --suite=latent: texts with latents, both directions, Stage II, is language kept?"""
import importlib.util
import os
import statistics

import torch

import bench
import data
import diffusion
import model as nets
from bench import Run, checkpoint, chosen, quality, reopened, table, trained

# of the latents of texts
VARIANTS = {"": lambda z: z, "_shuffled": lambda z: z.roll(1, 0), "_no_latent": torch.zeros_like}

def latent_runs(text, pairs):
    """{name: Run}; the backbone learns from `text`, all others from the folder `pairs`."""
    next_token, stage2 = "sequential --predict=next --ffn_shift=before", "stage2_variational"
    rows = {"backbone": ("", "ar --direction=causal --ffn_shift=before"), "sequential": ("", "sequential"),
            "stage1_coupling": ("", "stage1_coupling"), "l2t": ("", "l2t"), "t2l": ("", "t2l"),
            "latent from text": ("", "sequential --latent_pred_from=text"),
            "latent from prefix": ("", "sequential --latent_pred_from=prefix"),
            "from the backbone": ("backbone", next_token),
            "from the backbone, frozen": ("backbone", f"{next_token} --freeze_backbone=1"),
            "embedding diffusion": ("", "gaussian --self_cond=1 --ema=0.99 --time_cond=add"),
            "stage2, fixed prior": ("sequential", stage2),
            "stage2, learned prior": ("sequential", f"{stage2} --latent_prior=learned"),
            "stage2, pooled states": ("sequential", f"{stage2} --latent_encoder=rwkv_pool"),
            "stage2, geometry": ("sequential", f"{stage2} --geom_weight=1")}
    common = ["config/latent.py", f"--max_iters={10 if bench.quick else 600}", "--eval_interval=100000"]
    if bench.quick:
        common += ["--batch_size=4", "--eval_iters=2"]
    runs = {name: Run([*common, f"--data_path={pairs}", *f"--objective={options}".split()], start=start)
            for name, (start, options) in rows.items()}
    runs["backbone"].options.append(f"--data_path={text}")
    return runs

def texts():
    """-> the folder of runs, that of texts with latents, made where there is none, and the file of texts."""
    work = os.path.join(bench.out, "local")
    pairs = os.path.join(work, "pairs.quick" if bench.quick else "pairs")
    make = ["latents", f"--data_path={bench.data_path}", f"--out={pairs}"]
    if not data.has_pairs(pairs) and data.main(make):
        raise RuntimeError("python data.py latents failed")
    return work, pairs, bench.data_path or os.path.join(pairs, "text.txt")

def suite():
    """On the validation split of python data.py latents of data_path: texts of 128 characters, 32 components
    of their n-grams. The runs stay in OUT/local."""
    (work, pairs, text), n = texts(), 8 if bench.quick else 64
    source, held_out = data.PairSource(pairs, 128), data.TextSource(text, 128, "byte").eval_rows(n * 4)[0]
    runs = latent_runs(text, pairs)

    @torch.no_grad()
    def measure(name, folder):
        found = {}
        if "backbone" in (name, runs[name].start):
            found["perplexity"] = perplexity(folder, trained(runs, "backbone", work), held_out)
        if name == "backbone":
            return found
        net, cfg = reopened(folder)
        x, _, lengths, z = source.eval_rows(n * 2 if bench.quick else 10**6)
        if net.cfg.gaussian:
            found |= gaussian_text_nats(net, cfg, x[:4 * n], z[:4 * n])
        else:
            found |= diffusion.latent_report(net, x, lengths, z, data.generator(1, 0, 2), cfg)
        found |= text_scores(net, cfg, source, x[:n], z[:n])
        if not net.cfg.gaussian and name not in ("l2t", "t2l"):
            found |= joint_scores(net, cfg, source, x, n)
        return found
    found = quality("latent", runs, measure, chosen(runs)[:3 if bench.quick else None], work)
    latent_tables(found)
    return {"runs": found}

def perplexity(folder, backbone, x):
    """Of a byte of the texts x, of what is left in a run of its causal backbone."""
    net = nets.Denoiser(nets.ModelConfig(**nets.load_checkpoint(checkpoint(backbone))["model_config"])).eval()
    weights = nets.load_checkpoint(checkpoint(folder))["model"]
    net.load_state_dict({key: w for key, w in weights.items() if key in net.state_dict()})
    exact = diffusion.NextToken(diffusion.DiffusionConfig(objective="ar"), net.cfg)
    return exact.bound(net, x).mean().exp().item()

def gaussian_text_nats(net, cfg, x, z):
    """Of embedding diffusion, whose cross-entropy is not a bound: the mean over noise levels, per token."""
    found, z, every = {}, diffusion.clean_latent(net, z), torch.ones_like(x, dtype=torch.bool)
    for suffix, variant in VARIANTS.items():
        draws = data.generator(1, 0, 2)
        report, found["alarm"] = diffusion.gaussian_report(net, x, every, None, draws, cfg, latent=variant(z))
        found[f"text_nats{suffix}"] = statistics.mean(v for key, v in report.items() if key.startswith("ce_"))
    return found

def text_scores(net, cfg, source, x, z):
    """`overlap` of texts sampled from latents with the texts x, for each of VARIANTS."""
    if not importlib.util.find_spec("sacrebleu"):
        return {}
    if net.latent_encoder is not None:
        z = net.posterior(x)[0]
    found, options = {}, dict(steps=50, temperature=0.5)
    options["sampler"] = "ddim" if net.cfg.gaussian else "first_hitting"
    for suffix, variant in VARIANTS.items():
        ids = diffusion.sample_text_from_latent(net, variant(z), 128, data.generator(2, 0, 3), cfg, **options)
        found |= {f"{name}{suffix}": score for name, score in overlap(source, ids, x).items()}
    return found

def overlap(source, y, x):
    """BLEU and chrF of texts y against x, ids (n,T) each, in %; nothing without sacrebleu."""
    try:
        import sacrebleu
    except ImportError:
        return {}
    texts, truth = decoded(source, y), [decoded(source, x)]
    return {"bleu": sacrebleu.corpus_bleu(texts, truth, force=True).score,
            "chrf": sacrebleu.corpus_chrf(texts, truth).score}

def joint_scores(net, cfg, source, x, n):
    """How n texts and latents sampled together fit: the share of the latents that are further from a text's
    own than the one sampled with it; the divergence of the texts' bigrams from those of x."""
    ids, z = diffusion.sample_joint(net, n, 128, data.generator(1, 0, 3), cfg, 64, temperature=0.7)
    texts = decoded(source, ids)
    if net.latent_encoder is not None:
        own = net.posterior(ids)[0]
    else:
        grams = data.ngrams(texts, len(source.projection[0]))
        own = torch.from_numpy(data.Projection(*source.projection)(grams))
    far = torch.cdist(own, z)
    nearer = (far.diagonal()[:, None] < far).sum(1) / (n - 1)
    kl = bench.from_file("gaussian").bigram_kl(ids, x)
    return {"joint_nearer": nearer.mean().item(), "joint_kl": kl, "sample": texts[0]}

def decoded(source, ids):
    return list(map(source.tokenizer.decode, ids.tolist()))

def latent_tables(found):
    def having(key):
        return {name: run for name, run in found.items() if key in run}

    def variants(key, form):
        return " / ".join(f"{{{key}{suffix}:{form}}}" for suffix in VARIANTS)
    rows = having("text_nats")
    for name, run in having("latent_mse").items():
        rows[name] = run | {"of_mean": run["latent_mse"] / run["latent_mse_of_mean"]}
    cells = ["{of_mean:.3f} | {latent_rank:.1%}", variants("text_nats", ".3f"), variants("bleu", ".1f"),
             variants("chrf", ".1f"), "{joint_nearer:.0%} | {joint_kl:.3f}"]
    table("texts and latents, validation split (right latent / shuffled / none)",
          "run | latent MSE of mean's | median rank | text, nats per token | BLEU | chrF | joint nearer | "
          "bigram KL", " | ".join(cells), rows)
    table("Stage II", "run | KL, nats per text | active units | text, nats per token: z / none",
          "{kl:.2f} | {active_units} | {text_nats:.3f} / {text_nats_no_latent:.3f}", having("kl"))
    rows = having("perplexity")
    table("perplexity per byte, causal backbone", "run | perplexity", "{perplexity:.2f}", rows)
    for name, run in having("sample").items():
        print(f"  --- {name}: {run['sample']!r}")
