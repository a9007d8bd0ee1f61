"""The paper's comparison, in the toy world: each method over several seeds, what it reaches and
what it costs.

    python benchmarks/compare.py  # about a quarter of an hour on 2 cores
    python benchmarks/compare.py --seeds 0 1 --methods dt ppo --out runs/quick --assets runs/quick

Runs the scripts with their toy defaults, one folder a seed (finished stages are kept), and writes
table.md into --out, gold_against_compute.png and asked_against_got.png into --assets; the pictures
need matplotlib.
"""
from __future__ import annotations

import contextlib
import functools
import math
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np
import torch

from measure import pyplot, start

import common
import dt
import mle_filter
import ppo_baseline
import reward_model
import rwr
from common import flag

TARGETS = ["q5", "q25", "q50", "q75", "q95", "q99"]
SCRIPTS = {"sft": (mle_filter, {"keep": 1.0}), "mle_filter": (mle_filter, {}), "rwr": (rwr, {}),
           "dt": (dt, {"target": TARGETS}), "ppo": (ppo_baseline, {})}
UNITS = {"total_flops": "FLOPs", "total_seconds": "seconds",
         "total_generated_tokens": "generated tokens"}
# 97.5 % quantiles of Student's t at 1, 2, ... degrees of freedom
T_QUANTILE = [12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14,
              2.13]


@dataclass
class Config:
    """What to compare, and where to."""
    seeds: list[int] = flag([0, 1, 2, 3, 4], "a run each, at least two")
    methods: list[str] = flag(list(SCRIPTS), f"of {', '.join(SCRIPTS)}")
    out: str = flag("runs/compare", "folder of the runs, and of the table")
    assets: str = flag("assets", "folder of the pictures")
    compile: bool = flag(True, "torch.compile the loss kernels")

    def __post_init__(self) -> None:
        common.require(len(set(self.seeds)) == len(self.seeds) > 1,
                       "--seeds: a spread needs two seeds at least, all different")
        common.require(len(self.seeds) <= len(T_QUANTILE) + 1,
                       f"--seeds: at most {len(T_QUANTILE) + 1}")
        common.require(set(self.methods) <= set(SCRIPTS),
                       f"--methods: choose from {', '.join(SCRIPTS)}")


def run(cfg: Config) -> dict[str, list[dict]]:
    """Runs what is missing; returns the leaderboard rows of each method, in the seeds' order."""
    rows: dict[str, list[dict]] = {}
    for seed in cfg.seeds:
        folder = Path(cfg.out) / f"seed{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        for method in cfg.methods:
            print(f"seed {seed}, {method}", flush=True)
            module, flags = SCRIPTS[method]
            with open(folder / "log.txt", "a") as log, contextlib.redirect_stdout(log):
                module.main(module.Config(**{**common.toy_defaults(module.Config), **flags,
                                             "seed": seed, "out": str(folder)}))
        for _, row in common.read_jsonl(folder / "leaderboard.jsonl"):
            if row["algorithm"] in ("base", *cfg.methods):
                rows.setdefault(f"{row['algorithm']} {row['variant']}".strip(), []).append(row)
    return {name: group for name, group in rows.items() if len(group) == len(cfg.seeds)}


def column(group: list[dict], name: str) -> np.ndarray:
    """One number of each seed's row."""
    return np.array([row[name] for row in group], dtype=np.float64)


def interval(differences: np.ndarray) -> str:
    """Mean and 95 % interval of paired differences, by Student's t over the seeds."""
    half = T_QUANTILE[len(differences) - 2] * differences.std(ddof=1) / math.sqrt(len(differences))
    mean = differences.mean()
    return f"{mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}]"


def table(rows: dict[str, list[dict]]) -> list[str]:
    """Markdown: means ± standard errors, the spread, paired differences to DT and PPO, and costs
    against PPO's."""
    best_dt = next((name for name in rows if name.startswith("dt target q99")), None)
    ppo = next((name for name in rows if name.startswith("ppo")), None)
    rivals = {name: rows[name] for name in (best_dt, ppo) if name}
    heads = ["", "gold", "sd over seeds", "reward z", "KL", "tokens",
             *(f"gold − {name}" for name in rivals),
             *(f"{unit}, training (in all)" for unit in UNITS.values()),
             *(["in all / PPO's"] if ppo else [])]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name, group in rows.items():
        gold = column(group, "gold")
        cells = [name, f"{gold.mean():.2f} ± {gold.std(ddof=1) / math.sqrt(len(gold)):.2f}",
                 f"{gold.std(ddof=1):.2f}",
                 *(f"{column(group, c).mean():{form}}" for c, form in
                   (("reward", ".2f"), ("kl_to_base", ".1f"), ("response_tokens", ".1f")))]
        cells += ["" if group is rival else interval(gold - column(rival, "gold"))
                  for rival in rivals.values()]
        for unit in UNITS:
            own, whole = (column(group, unit.replace("total", kind)).mean()
                          for kind in ("train", "total"))
            form = ".1e" if "flops" in unit else ",.0f"
            cells.append(f"{own:{form}} ({whole:{form}})" if name != "base" else "")
        if ppo:
            shares = [column(group, unit).mean() / column(rows[ppo], unit).mean() for unit in UNITS]
            cells.append(" / ".join(f"{share:.2f}" for share in shares) if name != "base" else "")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def order(rows: dict[str, list[dict]]) -> list[str]:
    """The paper's order, DT before RWR before filtering before SFT, as paired differences of
    gold."""
    named = [next((name for name in rows if name.startswith(start)), None)
             for start in ("dt target q99", "rwr", "mle_filter", "sft")]
    return [f"- {better} − {worse}: "
            f"{interval(column(rows[better], 'gold') - column(rows[worse], 'gold'))}"
            for better, worse in zip(named, named[1:]) if better and worse]


def curve(folder: Path, row: dict) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """A PPO run, iteration by iteration: what was spent before each rollout, with all it needs, and
    its gold reward."""
    steps = [step for _, step in common.read_jsonl(folder / "ppo" / "metrics.jsonl")]
    training = row["costs"]["training"]
    spent = {"total_flops": "flops", "total_seconds": "seconds",
             "total_generated_tokens": "tokens"}
    x = {}
    for unit, name in spent.items():
        each = np.array([step[name] for step in steps], dtype=np.float64)
        so_far = np.cumsum(each) if name == "tokens" else each
        before = row[unit] - training[unit.removeprefix("total_")]
        scale = 1 if name == "tokens" else training[unit.removeprefix("total_")] / so_far[-1]
        x[unit] = before + np.concatenate([[0.0], so_far[:-1]]) * scale
    return x, np.array([step["gold"] for step in steps])


def on_training_prompts(seed: int, cfg: Config) -> float:
    """Gold of guided DT on the prompts that PPO's rollouts answer: like must be held against
    like."""
    flags = {**common.toy_defaults(dt.Config), "seed": seed,
             "out": str(Path(cfg.out) / f"seed{seed}")}
    run = dt.Config(**flags)
    base = common.base_policy(run)
    samples = common.labelled_samples(run, base, reward_model.for_run(run, base))
    prompts = common.split_prompts(run, held_out=False)
    variant = dt.ask(TARGETS[-1], samples, common.Codec(f"{run.out}/dt", run), run)
    variant = variant._replace(guidance=run.guidance[0])
    policy = common.Stage(f"{run.out}/dt", "", common.Cost())
    load = functools.cache(lambda place: common.load_model(place, common.compute_dtype(run)))
    replies = common.answer(run, load, policy, prompts * 4, variant, base, samples, None, None,
                            common.Cost())
    return float(np.mean([r["gold"] for r in replies]))


def catching_up(rows: dict[str, list[dict]], cfg: Config) -> list[str]:
    """What PPO had spent, against all that guided DT took, when its rollouts reached DT's gold on
    the same prompts."""
    dt_rows, ppo_rows = (next(rows[name] for name in reversed(rows) if name.startswith(start))
                         for start in ("dt", "ppo"))
    lines = []
    for dt_row, ppo_row in zip(dt_rows, ppo_rows):
        seed = ppo_row["seed"]
        file = Path(cfg.out) / f"seed{seed}" / "log.txt"
        with open(file, "a") as log, contextlib.redirect_stdout(log):
            goal = on_training_prompts(seed, cfg)
        spent, gold = curve(Path(cfg.out) / f"seed{seed}", ppo_row)
        smooth = np.convolve(gold, np.ones(3) / 3, mode="valid")  # of three iterations
        if (smooth < goal).all():
            lines.append(f"- seed {seed}: PPO's rollouts never reach guided DT's {goal:.2f} on the "
                         f"training prompts")
            continue
        i = int(np.argmax(smooth >= goal)) + 2
        shares = ", ".join(f"{spent[unit][i] / dt_row[unit]:.2f} of its {label}"
                           for unit, label in UNITS.items())
        lines.append(f"- seed {seed}: PPO's rollouts reach guided DT's {goal:.2f} on the training "
                     f"prompts at iteration {i}, after {shares}")
    return lines


def over_optimisation(cfg: Config) -> list[str]:
    """Whether PPO's gold reward falls while its score rises: the last fifth of the iterations and
    the best fifth."""
    lines = []
    for seed in cfg.seeds:
        file = Path(cfg.out) / f"seed{seed}" / "ppo" / "metrics.jsonl"
        steps = [s for _, s in common.read_jsonl(file)]
        width = max(1, len(steps) // 5)
        gold, score = ([np.mean([s[name] for s in steps[i:i + width]])
                        for i in range(len(steps) - width + 1)] for name in ("gold", "score"))
        variance = np.mean([s["explained_variance"] for s in steps[-width:]])
        lines.append(f"- PPO, seed {seed}: gold {gold[-1]:.2f} in the last fifth, {max(gold):.2f} "
                     f"in its best, score {score[-1]:+.2f} and {score[int(np.argmax(gold))]:+.2f}; "
                     f"explained variance {variance:.2f}")
    return lines


def draw_compute(plt, rows: dict[str, list[dict]], cfg: Config, file: Path) -> None:
    """Gold reward against FLOPs, seconds and generated tokens, all that a method needs
    included."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.2), sharey=True)
    shown = {name: group for name, group in rows.items() if name != "base"
             and not name.startswith(("ppo", "dt"))}
    shown.update({name: group for name, group in rows.items() if name.startswith("dt target q99")})
    for axis, (unit, label) in zip(axes, UNITS.items()):
        for i, (name, group) in enumerate(shown.items()):
            gold = column(group, "gold")
            axis.errorbar(column(group, unit).mean(), gold.mean(),
                          gold.std(ddof=1) / math.sqrt(len(gold)), fmt="osD^vP"[i % 6], capsize=3,
                          label=name, color=f"C{i + 1}")
        for name, group in rows.items():
            if name.startswith("ppo"):
                curves = [curve(Path(cfg.out) / f"seed{row['seed']}", row) for row in group]
                for x, y in curves:
                    axis.plot(x[unit], y, color="C0", alpha=0.25, linewidth=1)
                length = min(len(y) for _, y in curves)
                axis.plot(np.mean([x[unit][:length] for x, _ in curves], 0),
                          np.mean([y[:length] for _, y in curves], 0), color="C0",
                          label=f"{name}, rollouts (training prompts)")
                gold = column(group, "gold")
                axis.errorbar(column(group, unit).mean(), gold.mean(),
                              gold.std(ddof=1) / math.sqrt(len(gold)), fmt="*", capsize=3,
                              color="C0", markersize=11, label=f"{name}, held out")
        axis.axhline(column(rows["base"], "gold").mean(), color="grey", linestyle=":", label="base")
        axis.set_xlabel(f"{label}, with all that is needed")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("gold reward")
    axes[-1].legend(fontsize=8, loc="lower right")
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def draw_asked(plt, rows: dict[str, list[dict]], file: Path) -> None:
    """What DT got against what it was asked for: the reward model's z, and gold."""
    plain = sorted((group for name, group in rows.items() if name.startswith("dt")
                    and "guidance" not in name), key=lambda group: column(group, "target").mean())
    asked = [column(group, "target").mean() for group in plain]
    figure, axes = plt.subplots(1, 2, figsize=(9, 4))
    labels = ("reward z obtained", "gold reward obtained")
    for axis, name, label in zip(axes, ("reward", "gold"), labels):
        got = [column(group, name) for group in plain]
        axis.errorbar(asked, [g.mean() for g in got],
                      [g.std(ddof=1) / math.sqrt(len(g)) for g in got], marker="o", capsize=3,
                      label="DT")
        axis.axhline(column(rows["base"], name).mean(), color="grey", linestyle=":", label="base")
        axis.set_xlabel("reward z asked for"), axis.set_ylabel(label), axis.grid(alpha=0.3)
    axes[0].plot(asked, asked, color="grey", linewidth=1, label="got = asked")
    for axis in axes:
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def main(cfg: Config) -> None:
    """Runs, prints and writes the table, draws the pictures."""
    rows = run(cfg)
    lines = [f"{len(cfg.seeds)} seeds ({', '.join(map(str, cfg.seeds))}), mean ± standard error; "
             f"differences are paired by seed, with 95 % intervals; torch {torch.__version__}, "
             f"{torch.get_num_threads()} thread(s), {date.today()}", "", *table(rows), "",
             *order(rows), ""]
    if "ppo" in cfg.methods:
        lines += over_optimisation(cfg)
    if {"dt", "ppo"} <= set(cfg.methods):
        lines += ["", *catching_up(rows, cfg)]
    common.write_beside(Path(cfg.out) / "table.md", lines)
    print("\n".join(lines))
    plt = pyplot()
    if plt is None:
        return
    Path(cfg.assets).mkdir(parents=True, exist_ok=True)
    draw_compute(plt, rows, cfg, Path(cfg.assets) / "gold_against_compute.png")
    if "dt" in cfg.methods:
        draw_asked(plt, rows, Path(cfg.assets) / "asked_against_got.png")
    print(f"pictures: {cfg.assets}/")


if __name__ == "__main__":
    start(main, Config)
