"""When does conditioning win, and do extreme rewards, drawn more often, bring it forward?

The toy world's methods against optimiser steps; DT with --emphasis P, which draws a sample in
proportion to 1 + |z|^P, against DT without; filtering and RWR with the same draw; then few samples,
noisy labels, no dropped tags, the paper's long tag, and three controls.

    python benchmarks/crossover.py --tune             # learning rates and P, on seeds 100 and 101
    python benchmarks/crossover.py --seeds 0 2 4 6 8  # what matters most comes first; on another
    python benchmarks/crossover.py --seeds 1 3 5 7 9  #   core at the same time
    python benchmarks/crossover.py --report           # table.md and the picture; trains nothing
    python benchmarks/crossover.py --mini --out runs/mini --assets runs/mini   # a test, no result

A cell is a run of its own with its own schedule, from its seed's base policy, on one thread.
Finished cells are appended to results.jsonl in --out and not run again: the same command resumes.

- Samples: so many of the scripts' own labelled samples, in an order of their own.
- Noise: a Gaussian of so many standard deviations is added to the reward model's scores; `right` is
  the share of neighbouring samples that the labels order as gold does.
- Learning rates: --tune tries each for every method at four step counts, and at the last of them
  with few samples and with the most noise, and takes the highest mean gold (DT's at q99).  Other
  cells take the nearest one's; without tuned.json all are the scripts' defaults.
- P: of 1, 2 and 4 the one whose DT has the highest gold at q99, averaged over the step counts of
  --tune, each P at its own best rates, drawn in proportion to |z|^P (`no floor`).  Filtering and
  RWR with the draw take the rates that they have without, other controls DT's.
- Controls: `no floor` draws in proportion to |z|^P, `upper half` to 1 + max(z, 0)^P; `loss weights`
  draws each sample once and multiplies its loss by 1 + |z|^P, of mean 1.
- Slope: least squares of the mean score got on the z asked for, both in the labels' z, over the
  targets q5, q50, q95 and q99.  With noise of sd s even a perfect reader has 1 / (1 + s^2).
"""
from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import tempfile
import time
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple, Optional
from unittest import mock

import numpy as np
import torch

from compare import (append_rows, interval, machine, markdown, read_rows, shown, shrink_toy_world,
                     start)

import common
import dt
import mle_filter
import reward_model
import rwr
from common import Cost, flag


@dataclass
class Config:
    """How much of it, and where to."""
    seeds: Optional[list[int]] = flag(None, "a world, a base policy and a reward model each; "
                                      "omitted: 0 to 9, with --tune 100 and 101")
    tune: bool = flag(False, "choose learning rates and P, into tuned.json")
    report: bool = flag(False, "write table.md and the picture from the cells that are finished")
    mini: bool = flag(False, "a few cells of two steps")
    out: str = flag("runs/crossover", "folder of worlds, results.jsonl, tuned.json and table.md")
    assets: str = flag("assets", "folder of the picture")


RIVALS = ("filter 0.05", "filter 0.2", "RWR")


class Sizes(NamedTuple):
    """How large the cells are."""
    seeds: tuple = tuple(range(10))
    few_seeds: tuple = tuple(range(5))  # for what is asked last
    tuning_seeds: tuple = (100, 101)
    steps: tuple = (20, 60, 120, 200, 600, 2000)
    few_steps: tuple = (120, 600)     # under other conditions than the main ones
    few_rivals: tuple = RIVALS        # under the same
    tuned_steps: tuple = (60, 120, 200, 600)
    samples: int = 10_000
    few_samples: int = 1_000
    noise: tuple = (1.0, 2.5)         # sd: labels right on .71 and .60 of pairs
    lrs: tuple = (1e-3, 3e-3, 1e-2)
    prompts: int = 256                # replies to each target


MINI = Sizes(seeds=(0,), tuning_seeds=(0,), steps=(2,), few_steps=(2,), few_rivals=("RWR",),
             tuned_steps=(2,), samples=300, few_samples=200, noise=(2.5,), lrs=(3e-3,), prompts=4)
EMPHASES = (0.0, 1.0, 2.0, 4.0)
QUANTILES = ("q5", "q50", "q95", "q99")                             # the slope is fitted to these
LEVELS = ("-2", "-1.5", "-1", "-0.5", "0", "0.5", "1", "1.5", "2")  # nine targets, a digit each
METHODS = {"DT": (dt, {}), "filter 0.05": (mle_filter, {"keep": 0.05}),
           "filter 0.2": (mle_filter, {"keep": 0.2}), "RWR": (rwr, {})}
CONTROLS = ("no floor", "upper half", "loss weights")
CONDITIONS = {"no dropout": {"condition_dropout": 0.0, "guidance": [0.0]},
              "long tag": {"reward_format": "decimal"}}  # flags of DT


class Job(NamedTuple):
    """A training run and its evaluation."""
    method: str
    steps: int
    samples: int
    emphasis: float = 0.0
    variant: str = ""  # of DT: one of CONTROLS or CONDITIONS
    noise: float = 0.0
    seed: int = 0
    lr: float = 0.0


# ---------------------------------------------------------------------------------- which cells


def plan(seeds: list[int], size: Sizes, tuned: dict) -> list[Job]:
    """All cells, what matters most first, each for all seeds in turn, the last ones for few."""
    both, at, few = (0.0, tuned.get("emphasis", 2.0)), size.samples, size.few_steps
    first, last = size.steps[:-1] or size.steps, size.steps[-1:]
    jobs = [Job("base", 0, at)]
    jobs += [Job("DT", steps, at, e) for steps in first for e in both]
    jobs += [Job(rival, steps, at) for steps in first for rival in RIVALS]
    side = [Job("DT", steps, at, both[1], control) for steps in few for control in CONTROLS]
    side += [Job("DT", steps, at, e) for steps in last for e in both]
    side += [Job(rival, steps, at) for steps in last for rival in RIVALS]
    for samples, noise in [(size.few_samples, 0.0), *((at, noise) for noise in size.noise)]:
        side += [Job("DT", steps, samples, e, "", noise) for steps in few for e in both]
        side += [Job(rival, few[-1], samples, 0.0, "", noise) for rival in size.few_rivals]
    side += [Job("DT", steps, at, e, condition) for steps in few for condition in CONDITIONS
             for e in both]
    side += [Job(rival, steps, at, both[1]) for steps in few for rival in size.few_rivals]
    cells = [(job, seed) for job in jobs for seed in seeds]
    cells += [(job, seed) for job in side for seed in seeds if seed in size.few_seeds]
    return [job._replace(seed=seed, lr=learning_rate(job, tuned))
            for job, seed in dict.fromkeys(cells)]


def plan_tuning(seeds: list[int], size: Sizes, tuned: dict) -> list[Job]:
    """The cells of --tune; once P is chosen, those that need to know it, too."""
    places = [(steps, size.samples, 0.0) for steps in size.tuned_steps]
    hard = [(size.tuned_steps[-1], size.few_samples, 0.0),
            (size.tuned_steps[-1], size.samples, size.noise[-1])]
    plain = [("DT", 0.0, ""), *((rival, 0.0, "") for rival in RIVALS)]
    drawn = [("DT", e, "no floor") for e in EMPHASES[1:]]
    cells = [*product(places, plain + drawn), *product(hard, plain)]
    if "emphasis" in tuned:
        cells += product(places, [("DT", tuned["emphasis"], "")])
    return [Job(method, steps, samples, emphasis, variant, noise, seed, lr)
            for (steps, samples, noise), (method, emphasis, variant) in cells
            for lr in size.lrs for seed in seeds]


def learning_rate(job: Job, tuned: dict) -> float:
    """The tuned one of the method's nearest cell; the script's default where there is none."""
    def distance(cell: Job) -> float:
        return (100 * (cell.variant not in ("", job.variant)) + 50 * (cell.variant != job.variant)
                + 10 * (cell.emphasis != job.emphasis)
                + abs(math.log(cell.steps / job.steps)) + abs(math.log(cell.samples / job.samples))
                + abs(math.log((1 + cell.noise) / (1 + job.noise))))
    if job.method == "base":
        return 0.0
    cells = [Job(*cell) for cell in tuned.get("cells", []) if cell[0] == job.method]
    return min(cells, key=distance).lr if cells else METHODS[job.method][0].TOY["lr"]


def choose(rows: list[dict], size: Sizes) -> dict:
    """Each cell with its best learning rate, where all were tried on all seeds; and P."""
    cells, gold = [], {}
    for cell in dict.fromkeys(job_of(row)._replace(seed=0, lr=0.0) for row in rows):
        tried = {}
        for lr in size.lrs:
            each = by_seed(rows, "gold", **{**cell._asdict(), "lr": lr, "seed": size.tuning_seeds})
            if len(each) == len(size.tuning_seeds):
                tried[lr] = float(np.mean(list(each.values())))
        if len(tried) == len(size.lrs):
            print(*cell[:6], {lr: round(mean, 2) for lr, mean in tried.items()})
            cells.append(cell._replace(lr=max(tried, key=tried.get)))
            gold[cell] = max(tried.values())
    by_emphasis = {e: [gold.get(Job("DT", steps, size.samples, e, "no floor" if e else ""))
                       for steps in size.tuned_steps] for e in EMPHASES}
    print("gold at q99 at each step count, by P:", by_emphasis)
    if None in sum(by_emphasis.values(), []):
        return {"cells": cells}
    return {"cells": cells, "emphasis": max(EMPHASES[1:], key=lambda e: sum(by_emphasis[e]))}


# ---------------------------------------------------------------------------------------- cells


def toy(script: Any, **flags: Any) -> Any:
    """A script's Config with the toy world's defaults."""
    return script.Config(**{**common.TOY, **script.TOY, **flags})


class World:
    """A seed's base policy, reward model and labelled samples, in a folder."""

    def __init__(self, folder: str, seed: int):
        run = toy(common, out=folder, seed=seed)
        self.base = common.base_policy(run)
        self.codec = common.Codec(self.base.path, run)
        self.data = common.read_data(run, self.base)
        rm = reward_model.for_run(run, self.base, self.data)
        samples = common.labelled_samples(run, self.base, self.data, rm)
        common.build_stages(run, rm, samples)
        self.samples, self.score = samples.load(), rm.load()
        self.rows = [row for _, row in common.read_jsonl(Path(samples.path))]

    def labelled(self, count: int, noise: float, folder: Path) -> tuple[common.Samples, float]:
        """So many samples, and the share of pairs that their labels order as gold does."""
        rng = np.random.default_rng(0)
        order = rng.permutation(len(self.rows))[:count]
        rewards = self.samples.rewards[order]
        rewards = rewards + noise * rewards.std() * rng.standard_normal(len(order))
        rows = [self.rows[i] for i in order]
        gold = common.gold_reward(*([row[name] for row in rows]
                                    for name in ("prompt", "response", "truncated")))
        agree = np.sign(np.diff(gold)) * np.sign(np.diff(rewards))
        tokens = common.Tokens(folder, lambda: (self.samples.tokens[i] for i in order))
        samples = common.Samples(tokens, rewards, self.samples.weights[order],
                                 self.samples.prompts[order])
        return samples, float((agree[agree != 0] > 0).mean())

    def train(self, job: Job, samples: common.Samples, folder: Path) -> Any:
        """Trains the job's policy into the folder; returns its Config."""
        script, flags = METHODS[job.method]
        shared = {"lr": job.lr, "steps": job.steps, "seed": job.seed, "save_every": 0}
        own_draw = job.method == "DT" and job.variant not in CONTROLS
        if job.method == "DT":  # the controls have another draw
            flags = {**CONDITIONS.get(job.variant, {}), "emphasis": job.emphasis * own_draw}
        cfg = toy(script, **shared, **flags)
        z, prepare = samples.z(samples.rewards), script.prepare

        def prepare_with_draw(*args: Any) -> common.Examples:
            examples = prepare(*args)
            kept = z[examples.indices]
            size = np.maximum(kept, 0) if job.variant == "upper half" else np.abs(kept)
            chance = size ** job.emphasis + (job.variant != "no floor")
            if job.emphasis:  # as dt.py draws with --emphasis
                examples.draw = lambda epoch: np.random.default_rng((job.seed, epoch, 1)).choice(
                    len(chance), len(chance), p=chance / chance.sum())
            return examples
        if own_draw:
            script.train(cfg, self.base, samples, folder, Cost())
        elif job.variant == "loss weights":  # RWR's loop with DT's tags
            examples, weight = dt.prepare(samples, self.codec, cfg), 1 + np.abs(z) ** job.emphasis
            examples.weight = weight / weight.mean()
            with mock.patch.object(rwr, "prepare", lambda *_: examples):
                rwr.train(toy(rwr, **shared), self.base, samples, folder, Cost())
        else:
            with mock.patch.object(script, "prepare", prepare_with_draw):
                script.train(cfg, self.base, samples, folder, Cost())
        return cfg

    def evaluate(self, job: Job, samples: common.Samples, folder: str, cfg: Any,
                 size: Sizes) -> dict:
        """Mean gold and z of replies to held-out prompts, DT's for each target, and its slope."""
        held_out, model = self.data.held_out_prompts, common.load_model(folder)
        prompts = [held_out[i % len(held_out)] for i in range(size.prompts)]
        plain = [self.codec.prompt(prompt) for prompt in prompts]

        @functools.cache
        def ask(tag_ids: tuple[int, ...] = (), guidance: float = 0.0) -> tuple[float, float]:
            tagged = [[*ids, *tag_ids] for ids in plain]
            replies = common.sample(model, tagged, cfg, cfg.seed + 1_000_003, self.codec.stop_ids,
                                    Cost(), cfg.eval_temperature, plain, guidance)
            texts, cut = zip(*((self.codec.decode(r), r.truncated) for r in replies))
            z = samples.z(self.score(prompts, texts, cut, Cost()))
            return float(np.mean(common.gold_reward(prompts, texts, cut))), float(z.mean())
        if job.method != "DT":
            return dict(zip(("gold", "z"), ask()))
        row, asked, got = {}, [], []
        for name in (*(LEVELS if job.seed in size.seeds else ()), *QUANTILES):
            variant = dt.ask_for(name, samples, self.codec, cfg)
            row[f"gold {name}"], row[f"z {name}"] = ask(tuple(variant.tag_ids))
            asked, got = [*asked, variant.target], [*got, row[f"z {name}"]]
        if cfg.condition_dropout:
            row["gold guided"], row["z guided"] = ask(tuple(variant.tag_ids), 0.5)  # q99
        slope = np.polyfit(asked[-len(QUANTILES):], got[-len(QUANTILES):], 1)[0]
        return {"gold": row["gold q99"], "slope": float(slope), **row}


world = functools.cache(World)


def run(job: Job, cfg: Config, size: Sizes) -> dict:
    """A job's row."""
    with open(os.devnull, "w") as null, contextlib.redirect_stdout(null), \
            contextlib.redirect_stderr(null), tempfile.TemporaryDirectory() as folder:
        name = f"{'mini' if cfg.mini else 'seed'}{job.seed}"
        home = world(f"{cfg.out}/{name}", job.seed)
        begun = time.process_time()
        samples, right = home.labelled(job.samples, job.noise, Path(folder, "tokens"))
        policy, used = home.base.path, toy(common, seed=job.seed)
        if job.method != "base":
            policy, used = folder, home.train(job, samples, Path(folder))
        row = home.evaluate(job, samples, policy, used, size)
    return {**job._asdict(), "right": round(right, 4), **row,
            "cpu_seconds": round(time.process_time() - begun, 1)}


def work(jobs: list[Job], cfg: Config, size: Sizes, file: Path) -> None:
    """Runs the jobs that are not in the file yet; appends each one's row as it ends."""
    done = set(map(job_of, read_rows(file)))
    missing = [job for job in jobs if job not in done]
    known = {name: machine()[name] for name in ("date", "commit", "cpu", "torch")}
    for i, job in enumerate(missing):
        row = {**run(job, cfg, size), **known}
        append_rows(file, [row])
        print(f"{i + 1} of {len(missing)}: {job}: gold {row['gold']:.2f}", flush=True)


def job_of(row: dict) -> Job:
    """The job of a result row."""
    return Job(*(row[name] for name in Job._fields))


# --------------------------------------------------------------------------------------- report

LINES = {"DT: slope": ("DT", "slope"), "DT: gold at q50": ("DT", "gold q50"),
         "DT: gold at q95": ("DT", "gold q95"), "DT: gold at q99": ("DT", "gold q99"),
         "DT: the same, guided by 0.5": ("DT", "gold guided"),
         **{f"{rival}: gold": (rival, "gold") for rival in RIVALS}}


def by_seed(rows: list[dict], value: str, **where: Any) -> dict[int, float]:
    """A value of the rows that are so, by seed; a tuple in `where` stands for any of its items."""
    def matches(row: dict) -> bool:
        return value in row and all(row[name] in (wanted if isinstance(wanted, tuple) else [wanted])
                                    for name, wanted in where.items())
    return {row["seed"]: row[value] for row in rows if matches(row)}


def paired(one: dict[int, float], other: dict[int, float]) -> str:
    """Mean ± half of the 95 % interval of the differences, seed by seed."""
    return shown([one[seed] - other[seed] for seed in one if seed in other], "+")


def table(rows: list[dict], columns: dict[Any, dict], minus: Optional[dict] = None) -> str:
    """Markdown: each of LINES under each column's conditions, and guided DT's lead over the rivals
    without the draw; with `minus` the differences from what it is under those and `minus`."""
    lines = []
    for label, (method, value) in LINES.items():
        line, lead = {"": label}, {"": f"guided DT − {method}"}
        for head, where in columns.items():
            values = by_seed(rows, value, method=method, **where)
            line[head] = shown(values.values())
            lead[head] = paired(by_seed(rows, "gold guided", method="DT", **where), by_seed(
                rows, value, method=method, **{**where, "emphasis": 0.0}))
            if minus:
                before = by_seed(rows, value, method=method, **{**where, **minus})
                line[head] = paired(values, before)
        lines += [line, lead] if method in RIVALS and not minus else [line]
    return markdown([line for line in lines if any(list(line.values())[1:])])


def draw(rows: list[dict], p: float, file: Path) -> None:
    """Gold and DT's slope against steps, with 95 % intervals."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(2, 1))
    curves = [(left, f"{rival}: gold", 0.0, "s-", f"C{i}") for i, rival in enumerate(RIVALS)]
    for e, style in ((0.0, "o--"), (p, "o-")):
        curves += [(left, "DT: gold at q99", e, style, "C3"),
                   (left, "DT: the same, guided by 0.5", e, style, "C4"),
                   (right, "DT: slope", e, style, "C3")]
    for axis, label, e, style, color in curves:
        method, value = LINES[label]
        steps = sorted({row["steps"] for row in rows if row["method"] == method})
        mean, half = np.array([interval(by_seed(rows, value, method=method, emphasis=e,
                                                steps=n).values()) for n in steps]).T
        axis.plot(steps, mean, style, color=color, label=f"{label}, P = {e:g}")
        axis.fill_between(steps, mean - half, mean + half, color=color, alpha=0.15)
        axis.set(xlabel="optimiser steps", xscale="log")
        axis.set_xticks(steps, [f"{n:,}" for n in steps])
    left.set_ylabel("gold reward")
    right.set_ylabel("z got on z asked for")
    for axis in (left, right):
        axis.legend(fontsize=7)
        axis.grid(alpha=0.3)
    figure.savefig(file, dpi=110)


def report(rows: list[dict], size: Sizes, out: Path, assets: Path) -> None:
    """Writes table.md into `out`, crossover_steps.png into `assets`."""
    p = max(row["emphasis"] for row in rows)
    main_place = ("", size.samples, 0.0)
    places = dict.fromkeys((row["variant"], row["samples"], row["noise"]) for row in rows)
    plain = [row for row in rows if (row["variant"], row["samples"], row["noise"]) == main_place]
    seeds, commits = (", ".join(sorted({str(row[name]) for row in rows}))
                      for name in ("seed", "commit"))
    base = by_seed(plain, "gold", method="base")
    parts = [f"{len(rows)} cells, seeds {seeds}, commits {commits}: mean ± half of the 95 % "
             f"interval over seeds. The base policy has gold {shown(base.values())}."]
    for e in (0.0, p):
        steps = {n: {"steps": n, "emphasis": e} for n in size.steps}
        parts += [f"## P = {e:g}, by steps", table(plain, steps)]
    parts += [f"## P = {p:g} minus P = 0, by steps", table(plain, steps, {"emphasis": 0.0})]
    both = {f"{n} steps, P = {e:g}": {"steps": n, "emphasis": e}
            for n in size.steps for e in (0.0, p)}
    levels = [{"z asked for": level, **{
        head: shown(by_seed(plain, f"z {level}", **where).values())
        for head, where in both.items()}} for level in LEVELS]
    parts += ["## z got for each z asked for", markdown(levels)]
    for place in places:
        if place == main_place:
            continue
        named = dict(zip(("variant", "samples", "noise"), place))
        here = {head: {**where, **named} for head, where in both.items()
                if where["steps"] in size.few_steps}
        with_p = {head: where for head, where in here.items() if where["emphasis"]}
        minus, what = {"emphasis": 0.0}, "P = 0"
        if place[0] in CONTROLS:
            minus, what = {"variant": ""}, "DT with --emphasis"
        right = [row["right"] for row in rows if (row["samples"], row["noise"]) == place[1:]]
        parts += [f"## {place[0] or 'DT and rivals'}, {place[1]:,} samples, noise {place[2]:g} "
                  f"({np.mean(right):.2f} of pairs right)", table(rows, here),
                  f"minus {what}:", table(rows, with_p, minus)]
    common.write_beside(out / "table.md", ["\n\n".join(parts)])
    print("\n\n".join(parts))
    assets.mkdir(parents=True, exist_ok=True)
    draw(plain, p, assets / "crossover_steps.png")


def main(cfg: Config) -> None:
    """Runs what is missing, or chooses learning rates and P, or reports."""
    out, size = Path(cfg.out), MINI if cfg.mini else Sizes()
    if cfg.mini:
        shrink_toy_world()
    seeds = cfg.seeds or (size.tuning_seeds if cfg.tune else size.seeds)
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    tuned, file = common.read_record(out / "tuned.json"), out / "results.jsonl"
    for _ in range(2 if cfg.tune else 0):  # the second time with the P that the first has chosen
        work(plan_tuning(seeds, size, tuned), cfg, size, file)
        tuned = choose(read_rows(file), size)
        common.write_beside(out / "tuned.json", [json.dumps(tuned)])
    jobs = plan(seeds, size, tuned)
    if cfg.report:
        rows = [row for row in read_rows(file) if job_of(row) in set(jobs)]
        common.require(rows, f"{file}: none of these cells yet")
        report(rows, size, out, Path(cfg.assets))
    elif not cfg.tune:
        work(jobs, cfg, size, file)


if __name__ == "__main__":
    start(main, Config)
