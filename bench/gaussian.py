"""python bench.py --suite=gaussian: Gaussian diffusion, one part changed at a time; masked diffusion."""
import functools
import statistics
from dataclasses import replace

import torch

import bench
import data
import diffusion
import model as nets
from bench import (Run, alternated, attention_baseline, chosen, from_file, pyplot,
                   quality, read_log, reopened, save_figure, step_ms, table, table_of_ms)

def bigram_kl(x, y):
    """KL divergence, nats, of the bigrams of x from those of y, both (B,T) ids; a tenth of a count is added
    to y's, for every pair of tokens that occur."""
    V = int(max(x.max(), y.max())) + 1
    pairs = ((z[:, :-1] * V + z[:, 1:]).flatten() for z in (x, y))
    p, q = (torch.bincount(ids, minlength=V * V).double().view(V, V) for ids in pairs)
    here = torch.cat([x.flatten(), y.flatten()]).unique()
    p, q = p[here][:, here], q[here][:, here] + 0.1
    p, q = p / p.sum(), q / q.sum()
    return torch.xlogy(p, p / q).sum().item()

@torch.no_grad()
def sampled(folder, rows, length, sampler, steps, **options):
    """`rows` unconditional samples of a run -> ids (rows,length). options: of the sampler."""
    net, cfg = reopened(folder)
    x, draws = torch.full((rows, length), net.mask_id), data.generator(1, 0, 3)
    if sampler in diffusion.GAUSSIAN_STEPS:
        options["cfg"] = cfg
    return diffusion.SAMPLERS[sampler](net, x, x != net.mask_id, net.mask_id, draws, steps=steps, **options)

def gaussian_runs():
    """The whole runs, and those of 200 steps with one part changed: two dicts {name: options}."""
    gaussian = "config/gaussian.py"
    seeds = {f"gaussian, seed {seed}": f"{gaussian} --random_seed={seed}" for seed in (1337, 1338, 1339)}
    # as many parameters and as much time as the 1000 steps of config/gaussian.py
    masked = "config/shakespeare.py --direction=bidirectional --ffn_shift=both --dim_ffn=592"
    whole = seeds | {"masked": f"{masked} --schedule=linear --max_iters=1400"}
    # as long as 900 steps of masked diffusion with config/shakespeare.py, in bench/text.json
    evidence = f"{gaussian} config/gaussian_evidence.py --max_iters=930 --eval_iters=40 --eval_interval=1000"
    whole |= {f"evidence, seed {seed}": f"{evidence} --random_seed={seed}" for seed in (1337, 1338, 1339)}
    changes = {"mixed, x0, cosine": "",
               "mse alone": "config/gaussian_mse.py", "tokens alone": "config/gaussian_tokens.py",
               "epsilon": "--prediction_type=epsilon", "v_prediction": "--prediction_type=v_prediction",
               "linear": "--beta_schedule=linear", "sigmoid": "--beta_schedule=sigmoid",
               "a prefix is given": "--mask_policy=suffix --drop_given=0", "all is noised": "--drop_given=1",
               "curriculum": "config/gaussian_curriculum.py", "embeddings thaw": "config/gaussian_thaw.py",
               "clipped, no self-conditioning": "config/gaussian_clip.py", "no EMA": "--ema=0",
               "alternate": "--direction=alternate",
               "evidence in tokens alone": "--diffusion_mode=tokens --token_evidence=1",
               "... and Gumbel levels": "--diffusion_mode=tokens --token_evidence=1 --beta_schedule=gumbel "
                                        "--noise_shift=5",
               "adaln_zero": "--time_cond=adaln_zero", "biwkv, noise in the shift": "config/birwkv_llada.py",
               "attention": "--mixer=attention --ffn_shift=none --dim_ffn=476"}
    short = f"{gaussian} --max_iters=200 --eval_interval=40"
    return whole, {name: f"{short} {change}" for name, change in changes.items()}

def suite():
    """What rounds rightly by noise level, and how far samples' bigrams are from those of held-out text."""
    rows, length = 4 if bench.quick else 64, 128
    source = data.TextSource(bench.data_path, length, "char")
    held_out = source.eval_rows(len(source.val) // length)[0]
    whole, parts = gaussian_runs()
    metrics = ["bits_per_char", "bits_per_char_se", *(f"round_acc_{t}" for t in (0.1, 0.2, 0.5, 1.0))]
    metrics = {name: name for name in metrics}
    more = [f"--data_path={bench.data_path}"]
    if bench.quick:
        more += ["--batch_size=4", "--eval_iters=1", "--max_iters=10"]
    runs = {name: Run(options.split() + more, metrics) for name, options in (whole | parts).items()}
    names = ["gaussian, seed 1337", "masked", "mse alone"] if bench.quick else chosen(runs)

    def measure(name, folder):
        evals = read_log(folder, "eval")
        found = {"minutes": statistics.mean(step_ms(folder)) * evals[-1]["step"] / 6e4}
        if name == "masked":
            rules = {"topk": ("topk", 50), "first_hitting": ("first_hitting", 0)}
        else:
            counts = (10, 20, 50, 100, 200) if name.endswith("seed 1337") else (50,)
            rules = {f"{n} steps": ("ddim", n) for n in counts} | {"ddpm": ("ddpm", 50)}
            found["curve"] = [(row["step"], row["round_acc_0.5"]) for row in evals]
            found["alarms"] = sum("alarm" in row for row in evals[1:])
        for key, rule in rules.items():
            found[f"kl, {key}"] = bigram_kl(sampled(folder, rows, length, *rule), held_out)
        return found
    found = quality("gaussian", runs, measure, names)
    own = bigram_kl(source.train_rows(0, rows, 0, rows, 1)[0], held_out)
    gaussian_tables(found, whole, parts, f"{rows} samples' bigrams from held-out text's, nats "
                                         f"({rows} rows of training text: {own:.3f})")
    speed = denoising_ms()
    table_of_ms("50 denoising steps at N = 512, batch 1, ms per step", speed)
    return {"runs": found, "speed": speed}

def gaussian_tables(found, whole, parts, divergence):
    same = {"kl, topk": "kl, 50 steps", "kl, first_hitting": "kl, ddpm"}     # they share a column
    rows = {name: {same.get(key, key): value for key, value in run.items()} for name, run in found.items()}
    titles = {f"whole runs; divergence of {divergence}": whole, "200 steps each, one part changed": parts}
    for title, names in titles.items():
        table(title, "setting | parameters | minutes | bits | right at t = 0.2 | 0.5 | 1 | "
              "divergence, ddim or topk | ddpm or one by one | alarms",
              "{parameters:.2M} | {minutes:.1f} | {bits_per_char:.3f} | "
              "{0[round_acc_0.2]:.3f} | {0[round_acc_0.5]:.3f} | "
              "{0[round_acc_1.0]:.3f} | {kl, 50 steps:.3f} | {kl, ddpm:.3f} | {alarms}",
              {name: run for name, run in rows.items() if name in names})
    for name in ("gaussian, seed 1337", "evidence, seed 1337"):
        table(f"{name}: divergence by sampling steps (DDIM)", "steps | divergence", "{kl:.3f}",
              {key[4:-6]: {"kl": kl} for key, kl in found.get(name, {}).items() if key.endswith("steps")})
    curves = {name: found[name]["curve"] for name in parts if name in found}
    if curves:
        plot("gaussian", "share of tokens that round rightly at t = 0.5", curves)

@torch.no_grad()
def denoising_ms():
    """Milliseconds of one of 50 DDIM steps at 512 tokens, untrained networks of C=256, N=64, four layers."""
    two_way = from_file("direction").directions()["bidirectional"]
    base = replace(two_way, gaussian=True, time_cond="adaln_zero", tie_embeddings=True)
    biwkv, attention = replace(base, mixer="biwkv"), attention_baseline(base)
    configs = {"rwkv7, bidirectional": base, "biwkv": biwkv, "attention baseline": attention}
    options = dict(cfg=diffusion.DiffusionConfig(), steps=5 if bench.quick else 50)
    x = torch.full((1, 512), 256)

    def job(net):
        diffusion.SAMPLERS["ddim"](net, x, x != 256, 256, torch.Generator().manual_seed(0), **options)
    jobs = {name: functools.partial(job, nets.Denoiser(cfg).eval()) for name, cfg in configs.items()}
    return {name: ms / options["steps"] for name, ms in alternated(jobs, 3).items()}

def plot(name, title, curves):
    """{label: [(step, value), ...]} as out/NAME.png, if matplotlib is there: the first in black, in colour
    the six that end farthest from it, the others in grey."""
    plt = pyplot()
    if plt is None:
        return
    figure, ax = plt.subplots(figsize=(8, 4.5), layout="constrained")
    end = {label: curve[-1][1] for label, curve in curves.items()}
    first, *others = curves
    apart = sorted(others, key=lambda label: -abs(end[label] - end[first]))[:6]
    for label in set(others) - set(apart):
        ax.plot(*zip(*curves[label]), color="0.8", linewidth=1)
    for label in sorted([first, *apart], key=end.get, reverse=True):
        ax.plot(*zip(*curves[label]), label=label, **{"color": "black"} if label == first else {})
    ax.set(title=title, xlabel="step", ylim=0)
    figure.legend(loc="outside right upper")
    save_figure(name, figure)
