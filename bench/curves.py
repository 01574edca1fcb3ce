"""python bench.py --suite=curves out*/log.jsonl: the logs of runs side by side, and of the presets that learn
the same (bench/presets.json): is my loss normal?"""
import json
import math
import os

import bench
from bench import from_file, pyplot, save_figure, table

def references():
    here = os.path.join(os.path.dirname(os.path.abspath(__file__)), "presets.json")
    if not os.path.exists(here):
        return {}
    with open(here) as f:
        return json.load(f)["runs"]

def suite():
    if not bench.LOGS:
        raise ValueError("no log: give some, python bench.py --suite=curves out*/log.jsonl")
    presets, mine = from_file("presets"), {}
    for path in bench.LOGS:
        try:
            folder = os.path.dirname(os.path.abspath(path))
            mine[os.path.basename(folder)] = presets.curves("", folder)
        except (OSError, ValueError, KeyError, IndexError) as e:
            raise ValueError(f"{path} is not a log of train.py with an evaluation "
                             f"({type(e).__name__}): train first") from None
    kinds = {run["kind"] for run in mine.values()}
    known = {name: run for name, run in references().items() if run["kind"] in kinds}
    rows = {}
    for name, run in mine.items():
        same = [ref for ref in known.values() if ref["kind"] == run["kind"]]
        normal = [presets.at(ref["loss"], 100) for ref in same]
        normal = [f"{value:.2f}" for value in normal if value is not None]
        value = presets.at(run["loss"], 100)
        rows[name] = dict(kind=run["kind"], first=run["loss"][0][1], lnV=math.log(run["vocab_size"]),
                          later="" if value is None else f"{value:.2f}", normal=" or ".join(normal),
                          last=f"{run['reached'].replace('_', ' ')} {run['evals'][-1][1]:.3f}",
                          theirs=" or ".join(f"{ref['evals'][-1][1]:.3f}" for ref in same))
    table("is my loss normal?",
          "run | learns | loss at step 0 | ln V | at 100 | of presets | reaches | of presets",
          "{kind} | {first:.2f} | {lnV:.2f} | {later} | {normal} | {last} | {theirs}", rows)
    drawn(mine, known)
    return {"runs": mine}

def drawn(mine, known):
    """Losses and what evaluations say, the presets' in grey."""
    plt = pyplot()
    if plt is None:
        return
    figure, axes = plt.subplots(2, 1, figsize=(8, 9), layout="constrained")
    for key, ax in zip(("loss", "evals"), axes):
        for name, run in known.items():
            ax.plot(*zip(*run[key]), "--", color="0.6", label=f"preset {name}")
        for name, run in mine.items():
            ax.plot(*zip(*run[key]), label=name)
        ax.set(title=dict(loss="training loss", evals="evaluation")[key], xlabel="step")
    axes[1].set_ylabel(", ".join({run["reached"].replace("_", " ") for run in mine.values()}))
    axes[0].legend(fontsize=10)
    save_figure("curves", figure)
