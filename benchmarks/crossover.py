"""When does conditioning win?  The toy world's methods against optimiser steps and labelled
samples, DT's levers and RWR's, noisier labels, a second round.

    python benchmarks/crossover.py --tune --jobs 2     # learning rates, on seeds 100 and 101
    python benchmarks/crossover.py --jobs 2            # all of it: some hours
    python benchmarks/crossover.py --jobs 16 --deadline_minutes 9   # what matters most comes first
    python benchmarks/crossover.py --jobs 0            # trains nothing: reports what is there
    python benchmarks/crossover.py --mini --out runs/mini --assets runs/mini   # a test, no result

A cell is a run of its own with its own schedule, from its seed's base policy, on one thread.
Finished cells are appended to results.jsonl in --out and not run again; after a change of the code
give another --out.  table.md goes there, crossover_steps.png and crossover_samples.png into
--assets.

- Samples: the first 10,000 are the scripts' own (four fifths written, one fifth generated, scored
  by the seed's reward model), shuffled; more are made alike, from other writers.  A smaller set is
  the beginning of a larger one.
- Noise: a Gaussian of so many standard deviations is added to the reward model's scores; `right` is
  the share of pairs of samples that the labels order as gold does.
- Random: the control, filtering by rewards that were shuffled over the samples.
- Slope: least squares of the mean score got on the z asked for, both in the labels' z, over DT's
  unguided targets.  With noise of sd s even a perfect reader of the tag has 1 / (1 + s^2).
- Learning rates: --tune tries the same five for each method at each of three step counts, at few
  samples and (but for SFT) at much noise, and takes the highest mean gold (DT's at q99); `random`
  takes filtering's.  Other cells take the nearest one's; without tuned.json all are the scripts'
  defaults.
- Levers of DT that the script does not have: `late dropout` keeps every tag in the first epoch,
  and is left out where there is no second;
  `tag's embeddings x 10` makes the updates of the tags' embeddings ten times as large, which here
  are their rows of the head too.
"""
from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import math
import multiprocessing
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Iterator, NamedTuple, Optional
from unittest import mock

import numpy as np
import torch

from crossover_report import by_seed, interval, read, report
from measure import start

import common
import dt
import mle_filter
import reward_model
import rwr
from common import Cost, Variant, flag


@dataclass
class Config:
    """How much of it, and where to."""
    seeds: list[int] = flag([0, 1, 2, 3, 4], "a world, a base policy and a reward model each")
    jobs: int = flag(1, "worker processes, one thread each; 0: only report")
    deadline_minutes: float = flag(1e6, "no cell starts later than this")
    tune: bool = flag(False, "choose the learning rates, on seeds 100 and 101, into tuned.json")
    mini: bool = flag(False, "all of it at a tiny size, in one world")
    out: str = flag("runs/crossover", "folder of worlds, results.jsonl, tuned.json and table.md")
    assets: str = flag("assets", "folder of the pictures")


class Sizes(NamedTuple):
    """How large the cells are."""
    steps: tuple = (20, 60, 200, 400, 600, 1000, 2000)
    few_steps: tuple = (200, 600, 60)        # of levers and tuning
    samples: tuple = (300, 1_000, 3_000, 10_000, 30_000, 100_000)
    main_steps: int = 600                    # of the axes other than steps
    main_samples: int = 10_000               # of the axes other than samples
    few_samples: int = 1_000                 # of tuning, at the main steps
    noise: tuple = (1.0, 2.5)                # sd: .70 and .60 of pairs right; without noise .82
    lrs: tuple = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
    prompts: int = 256                       # replies a cell
    pairs: Optional[int] = None              # preferences of each ten thousand more; None: 4,000
    per_prompt: int = 9                      # generated replies, as in the scripts
    methods: int = 6                         # of METHODS, the first
    levers: int = 99                         # of each method, at most


MINI = Sizes(steps=(1, 3), few_steps=(3,), samples=(200, 8_250), main_steps=3, main_samples=200,
             few_samples=100, noise=(1.0,), lrs=(3e-3, 1e-2), prompts=8, pairs=50, per_prompt=1,
             methods=2, levers=1)
TUNING_SEEDS = [100, 101]
SLOPE = ("q5", "q50", "q95", "q99")  # targets that it is fitted to
TARGETS = ("q5", "q50", "q90", "q95", "5.00", "q99")
METHODS = {"DT": (dt, {}), "filter 0.2": (mle_filter, {"keep": 0.2}),
           "filter 0.05": (mle_filter, {"keep": 0.05}), "RWR": (rwr, {}),
           "SFT": (mle_filter, {"keep": 1.0}), "random 0.2": (mle_filter, {"keep": 0.2})}
# Flags in place of the defaults; lr_times, steps_times, late_dropout and tag_embeddings_times are
# this file's.
LEVERS = {
    "DT": {"special token": {"reward_format": "token"},
           "decimal in 0.5s": {"reward_format": "decimal", "reward_step": 0.5},
           "the paper's tag": {"reward_format": "decimal", "reward_step": 0.01},
           "lr x 0.5": {"lr_times": 0.5}, "lr x 2": {"lr_times": 2}, "lr x 4": {"lr_times": 4},
           "no dropout": {"condition_dropout": 0.0, "guidance": [0.0]},
           "late dropout": {"late_dropout": True},
           "tag's embeddings x 10": {"tag_embeddings_times": 10},
           "batch 8, 4 x steps": {"batch_size": 8, "steps_times": 4}},
    "RWR": {"cap 20": {"w_max": 20.0},
            "beta 0.1": {"beta": 0.1}, "beta 0.3": {"beta": 0.3}, "beta 0.5": {"beta": 0.5}}}


class Job(NamedTuple):
    """A training run and its evaluation."""
    axis: str
    seed: int
    method: str
    steps: int
    samples: int
    lr: float = 0.0
    noise: float = 0.0
    setting: str = ""  # a lever's name
    flags: dict = {}   # and its flags

    @property
    def key(self) -> str:
        return json.dumps(self)


def toy(module: Any, **flags: Any) -> Any:
    """A script's Config with the toy world's defaults."""
    return module.Config(**{**common.toy_defaults(module.Config), **flags})


def learning_rate(method: str, steps: int, samples: int, noise: float, tuned: dict) -> float:
    """The tuned one of the nearest cell; the script's default where there is none."""
    def distance(tried: list) -> float:
        return (abs(math.log(tried[0] / steps)) + abs(math.log(tried[1] / samples))
                + abs(math.log((1 + tried[2]) / (1 + noise))))
    tried = tuned.get("filter 0.2" if method == "random 0.2" else method, [])
    return min(tried, key=distance)[3] if tried else toy(METHODS[method][0]).lr


def plan(cfg: Config, size: Sizes, tuned: dict) -> list[Job]:
    """All cells, what matters most first, each for all seeds in turn."""
    at, n, jobs, ours = size.main_steps, size.main_samples, [], list(METHODS)[:size.methods]

    def add(axis: str, method: str, steps: int, samples: int = n, **more: Any) -> None:
        if method in METHODS:
            found = learning_rate(method, steps, samples, more.get("noise", 0.0), tuned)
            more.setdefault("lr", found)
        jobs.extend(Job(axis, seed, method, steps, samples, **more) for seed in cfg.seeds)
    if cfg.tune:
        for steps, samples, noise in [*((steps, n, 0.0) for steps in sorted(size.few_steps)),
                                      (at, size.few_samples, 0.0), (at, n, size.noise[-1])]:
            for method in ours[:4] if noise else ours[:5]:
                for lr in size.lrs:
                    add("tune", method, steps, samples, lr=lr, noise=noise)
        return jobs

    def add_samples(methods: list[str], counts: tuple) -> None:
        for samples in counts:
            for method in methods if samples != n else ():  # n: the axis of steps has that cell
                add("samples", method, at, samples)
    contenders, controls = ours[:4], ours[4:]
    add("steps", "base", 0)
    for steps in size.steps:
        for method in contenders:
            add("steps", method, steps)
    add_samples(contenders, size.samples[:-1])
    for noise in size.noise:
        for method in contenders:
            add("noise", method, at, noise=noise)
    for method in contenders[:2]:
        add("round 2", method, at)
    for steps in size.steps:
        for method in controls:
            add("steps", method, steps)
    add_samples(contenders, size.samples[-1:])
    for method in contenders[2:]:
        add("round 2", method, at)
    add_samples(controls, size.samples)
    for steps in size.few_steps:
        for method, levers in LEVERS.items():
            for name, flags in list(levers.items())[:size.levers]:
                second_epoch = steps * toy(METHODS[method][0]).batch_size > n
                if second_epoch or "late_dropout" not in flags:
                    add("levers", method, steps, setting=name, flags=flags)
    return jobs


# ------------------------------------------------------------------------------------------ cells


class World:
    """A seed's base policy, reward model and samples, built once in a folder for all processes."""

    def __init__(self, out: str, seed: int, size: Sizes):
        self.seed, self.size, self.folder = seed, size, Path(out) / f"seed{seed}"
        self.toy = toy(common, out=str(self.folder), seed=seed, samples_per_prompt=size.per_prompt)
        with self.alone():
            self.base = common.base_policy(self.toy)
            self.rm = reward_model.for_run(self.toy, self.base)
            if not (self.folder / "data" / "test.jsonl").exists():
                common.toy_data(self.toy.out, self.toy.seed)
        self.scorer = functools.cache(self.rm.load_scorer)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """One process at a time builds in the folder."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / ".building", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def config(self, module: Any, **flags: Any) -> Any:
        """A script's Config that takes this world as a model and data of one's own."""
        return toy(module, **{"model": self.base.folder, "preferences": str(self.folder / "data"),
                              "reward_model": self.rm.folder, "seed": self.seed, "save_every": 0,
                              "slots": 128, **flags})

    def part(self, k: int) -> list[dict]:
        """The k-th ten thousand labelled samples, shuffled, from writers of their own."""
        folder = self.folder / f"more{k}" if k else self.folder
        with self.alone():
            if not (folder / "samples.json").exists():
                common.labelled_samples(self.more(folder, k) if k else self.toy, self.base, self.rm)
        rows = [row for _, row in common.read_jsonl(folder / "samples.jsonl")]
        return [rows[i] for i in np.random.default_rng(k).permutation(len(rows))]

    def more(self, folder: Path, k: int) -> Any:
        """The Config that labels other writers' replies as the toy world's own run does."""
        seed = self.seed + 1000 * k
        data = common.toy_data(str(folder), seed)
        return self.config(common, out=str(folder), seed=seed, preferences=data,
                           max_pairs=self.size.pairs, samples_per_prompt=self.size.per_prompt)

    def rows(self, count: int) -> list[dict]:
        """The first so many samples."""
        found, k = [], 0
        while len(found) < count:
            found += self.part(k)
            k += 1
        return found[:count]

    def read(self, rows: list[dict], rewards: Any) -> common.Samples:
        """These samples with these rewards, by the scripts' own --samples."""
        folder = tempfile.mkdtemp()
        cfg = self.config(common, out=folder, samples=f"{folder}/labelled.jsonl")
        common.write_beside(Path(cfg.samples), [json.dumps({**row, "reward": float(reward)})
                                                for row, reward in zip(rows, rewards)])
        return common.labelled_samples(cfg, self.base, None)

    def train(self, job: Job, samples: common.Samples, folder: str) -> Any:
        """Trains the job's policy into the folder; returns its Config."""
        module, own = METHODS[job.method]
        flags = {**own, "lr": job.lr, "steps": job.steps, "seed": job.seed, **job.flags}
        flags["lr"] *= flags.pop("lr_times", 1)
        flags["steps"] *= flags.pop("steps_times", 1)
        late, times = flags.pop("late_dropout", False), flags.pop("tag_embeddings_times", 1)
        cfg = self.config(module, **flags)
        os.makedirs(folder)
        with contextlib.ExitStack() as patches:
            if late:
                patches.enter_context(mock.patch.object(dt, "prepare", prepare_late))
            if times > 1:
                patches.enter_context(faster_rows(self.tag_tokens(cfg, samples), times))
            module.train(cfg, self.base, samples, Path(folder), Cost())
        return cfg

    def tag_tokens(self, cfg: Any, samples: common.Samples) -> list[int]:
        """The tokens that DT's tags are made of."""
        z, codec = samples.z(samples.rewards), common.Codec(self.base.folder, cfg)
        edges = dt.bin_edges(samples)
        tags = {dt.reward_tag(reward, edges, cfg) for reward in z}
        return sorted({token for tag in tags for token in dt.tag_ids(tag, codec)})

    def answer(self, folder: str, cfg: Any, prompts: list[str], way: Variant) -> list[dict]:
        """A policy's replies, with the reward model's score and gold."""
        codec, model = common.Codec(folder, cfg), common.load_model(folder, torch.float32)
        plain = codec.prompts(prompts)
        replies = common.sample(model, [ids + way.tag_ids for ids in plain], cfg,
                                cfg.seed + 1_000_003, codec.stop_ids, Cost(), plain, way.guidance)
        texts, cut = [codec.decode(r) for r in replies], [r.truncated for r in replies]
        return [{"prompt": p, "response": t, "truncated": c, "reward": score,
                 "gold": common.gold_reward(p, t, c)}
                for p, t, c, score in zip(prompts, texts, cut,
                                          self.scorer()(prompts, texts, cut, Cost()))]

    def evaluate(self, job: Job, samples: common.Samples, folder: str, cfg: Any) -> list[dict]:
        """A row for each way to ask the policy: gold and z of its replies to held-out prompts."""
        prompts, rows = repeated(common.split_prompts(cfg, True), self.size.prompts), {}
        for way in self.ways_to_ask(job.method, samples, cfg):
            replies = self.answer(folder, cfg, prompts, way)
            gold = np.array([r["gold"] for r in replies])
            rows[way.name] = {"method": way.name, "asked": way.target, "gold": float(gold.mean()),
                              "gold_error": float(gold.std() / math.sqrt(len(gold))),
                              "z": float(samples.z([r["reward"] for r in replies]).mean())}
        if job.method == "DT":
            asked, got = zip(*((row["asked"], row["z"]) for row in
                               (rows[f"DT {name}"] for name in SLOPE)))
            rows["DT q99"]["slope"] = float(np.polyfit(asked, got, 1)[0])
        return list(rows.values())

    def ways_to_ask(self, method: str, samples: common.Samples, cfg: Any) -> list[Variant]:
        """The ways to ask a policy; the last is the best."""
        if method != "DT":
            return [Variant(method)]
        codec = common.Codec(self.base.folder, cfg)
        ways = [dt.ask(name, samples, codec, cfg)._replace(name=f"DT {name}") for name in TARGETS]
        return ways + [ways[-1]._replace(name="DT guided", guidance=g) for g in cfg.guidance if g]

    def second_round(self, job: Job, samples: common.Samples, folder: str) -> list[dict]:
        """Replies of the best policy of a first round, labelled; then the same training, from the
        base policy, on them alone and with the old ones."""
        cfg = self.train(job, samples, f"{folder}/first")
        prompts = repeated(common.split_prompts(cfg, False), job.samples)
        best = self.ways_to_ask(job.method, samples, cfg)[-1]
        new, rows = self.answer(f"{folder}/first", cfg, prompts, best), []
        for setting, kept in ("new", new), ("old and new", self.rows(job.samples) + new):
            again = self.read(kept, [row["reward"] for row in kept])
            cfg = self.train(job, again, f"{folder}/{setting}")
            rows += [{**row, "setting": setting}
                     for row in self.evaluate(job, again, f"{folder}/{setting}", cfg)]
        return rows


def prepare_late(samples: common.Samples, codec: common.Codec, cfg: Any) -> common.Examples:
    """dt.prepare with no tag dropped in the first epoch."""
    some, whole = (PREPARE(samples, codec, replace(cfg, condition_dropout=share, guidance=[0.0]))
                   for share in (cfg.condition_dropout, 0.0))
    return common.Examples(samples.tokens,
                           tag=lambda i, epoch: (some if epoch else whole).tag(i, epoch))


PREPARE = dt.prepare


def faster_rows(rows: list[int], times: float) -> Any:
    """While it is open, optimizers change these rows of the embeddings so many times as much."""
    make = common.make_optimizer

    def make_faster(policy: Any, *more: Any) -> tuple:
        optimizer, schedule = make(policy, *more)
        weight, before = policy.model.get_input_embeddings().weight, []
        optimizer.register_step_pre_hook(lambda *_: before.append(weight.detach()[rows]))

        def extend(*_: Any) -> None:
            old = before.pop()
            with torch.no_grad():
                weight[rows] = old + times * (weight[rows] - old)
        optimizer.register_step_post_hook(extend)
        return optimizer, schedule
    return mock.patch.object(common, "make_optimizer", make_faster)


def repeated(prompts: list, count: int) -> list:
    """So many prompts, each as often as another."""
    return (prompts * math.ceil(count / len(prompts)))[:count]


world = functools.cache(World)


@functools.lru_cache(maxsize=3)
def labelled(home: World, count: int, noise: float, shuffled: bool) -> tuple:
    """So many samples, and the share of pairs that their labels order as gold does."""
    rows, rng = home.rows(count), np.random.default_rng((home.seed, count))
    rewards = np.array([row["reward"] for row in rows])
    rewards += noise * rewards.std() * rng.standard_normal(count)
    if shuffled:
        rng.shuffle(rewards)
    gold = [common.gold_reward(r["prompt"], r["response"], r["truncated"]) for r in rows[:5000]]
    order = np.sign(np.diff(gold)) * np.sign(np.diff(rewards[:5000]))
    return home.read(rows, rewards), float((order[order != 0] > 0).mean())


def run(job: Job, cfg: Config, deadline: float) -> Optional[list[dict]]:
    """A job's rows; None where it is too late to begin."""
    if time.time() > deadline:
        return None
    with open(Path(cfg.out) / "log.txt", "a") as log, contextlib.redirect_stdout(log), \
            contextlib.redirect_stderr(log), tempfile.TemporaryDirectory() as folder:
        home = world(cfg.out, 0 if cfg.mini else job.seed, MINI if cfg.mini else Sizes())
        begun = time.process_time()
        samples, right = labelled(home, job.samples, job.noise, job.method.startswith("random"))
        if job.method == "base":
            rows = home.evaluate(job, samples, home.base.folder,
                                 home.config(common, seed=job.seed))
        elif job.axis == "round 2":
            rows = home.second_round(job, samples, folder)
        else:
            policy = f"{folder}/policy"
            rows = home.evaluate(job, samples, policy, home.train(job, samples, policy))
    known = {**job._asdict(), "job": job.key, "right": right,
             "cpu_seconds": round(time.process_time() - begun, 2)}
    return [{**known, **row} for row in rows]


def begin(scratch: str) -> None:
    """A worker's start: one thread, scratch files where the parent removes them; no compiling,
    which takes longer than it saves."""
    tempfile.tempdir = scratch
    torch.set_num_threads(1)
    torch.compiler.set_stance("force_eager")
    common.quieten_libraries()


def work(cfg: Config, jobs: list[Job], file: Path) -> None:
    """Runs the jobs that are not in the file yet; appends each one's rows as it ends."""
    done = {row.get("job") for row in read(file)}
    missing = [job for job in jobs if job.key not in done]
    os.environ.update(CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")  # of the workers
    begun, late = time.time(), 0
    with tempfile.TemporaryDirectory(dir=cfg.out) as scratch, ProcessPoolExecutor(
            cfg.jobs, multiprocessing.get_context("spawn"), begin, (scratch,)) as pool:
        ends = {pool.submit(run, job, cfg, begun + 60 * cfg.deadline_minutes): job
                for job in missing}
        for i, end in enumerate(as_completed(ends)):
            try:
                rows = end.result()
            except Exception as problem:  # one cell's trouble is not another's
                print(f"{ends[end].key}: {type(problem).__name__}: {problem}", flush=True)
                continue
            late += rows is None
            if rows:
                with open(file, "a") as f:
                    f.write("".join(json.dumps(row) + "\n" for row in rows))
                print(f"{i + 1} of {len(missing)}, {time.time() - begun:.0f} s: {ends[end].key} "
                      f"{rows[-1]['method']}: gold {rows[-1]['gold']:.2f}", flush=True)
    if late:
        print(f"out of time: the same command does the {late} jobs that are left")


def choose(rows: list[dict], file: Path) -> None:
    """Writes the learning rate of the highest mean gold for each method, step and sample count, and
    noise, where all rates have been tried on all seeds."""
    tuned, rates = {}, sorted({row["lr"] for row in rows})
    for method in list(METHODS)[:5]:
        name = "DT q99" if method == "DT" else method
        for cell in sorted({(r["steps"], r["samples"], r["noise"]) for r in rows}):
            where = {"method": name, **dict(zip(("steps", "samples", "noise"), cell))}
            found = {lr: by_seed(rows, "gold", lr=lr, **where) for lr in rates}
            gold = {lr: interval(seeds.values())[0] for lr, seeds in found.items()
                    if set(seeds) == set(TUNING_SEEDS)}
            if len(gold) == len(rates):
                tuned.setdefault(method, []).append([*cell, max(gold, key=gold.get)])
            elif gold:
                print("not all tried yet, so not chosen from: ", end="")
            if gold:
                print(f"{name}, {cell[0]} steps, {cell[1]:,} samples, noise {cell[2]:g}: "
                      + ", ".join(f"lr {lr:g}: gold {g:.2f}" for lr, g in gold.items()))
    common.write_beside(file, [json.dumps(tuned)])


def latest(rows: list[dict]) -> list[dict]:
    """A row for each cell: the last, where its learning rate has been chosen anew."""
    cell = ("axis", "seed", "method", "steps", "samples", "noise", "setting")
    return list({tuple(row[name] for name in cell): row for row in rows}.values())


def main(cfg: Config) -> None:
    """Runs what is missing, then reports, or chooses learning rates."""
    out, cfg.seeds = Path(cfg.out), TUNING_SEEDS if cfg.tune else cfg.seeds
    out.mkdir(parents=True, exist_ok=True)
    jobs = plan(cfg, MINI if cfg.mini else Sizes(), common.read_record(out / "tuned.json"))
    if cfg.jobs:
        work(cfg, jobs, out / "results.jsonl")
    wanted = {job.key for job in jobs}
    rows = [row for row in read(out / "results.jsonl")
            if row.get("job") in wanted or not (cfg.jobs or cfg.tune)
            and row["axis"] != "tune" and row["seed"] in cfg.seeds]
    common.require(rows, f"{out}/results.jsonl: no such cells there yet")
    if cfg.tune:
        choose(rows, out / "tuned.json")
    else:
        report(latest(rows), out, Path(cfg.assets))


if __name__ == "__main__":
    start(main, Config)
