"""Shortest walks on a graph: a small task that was not designed here, its reward a Python function.

    python benchmarks/random_walks.py                         # about ten minutes on 2 cores
    python benchmarks/random_walks.py --report                # the table of what has run
    python benchmarks/random_walks.py --tune                  # how the learning rates were chosen
    python benchmarks/random_walks.py --mini --out runs/mini  # a test, not a result

trlx's "random walks", itself after Chen et al. 2021 (arXiv 2106.01345), written anew from its
description.  A directed graph has 21 nodes, one of which is the goal; each edge exists with
probability 0.1.  A prompt is a start node, a response the nodes walked through, a letter each.
1,000 walks are logged: random moves from random starts, to the goal or to the tenth node.  The
reward of a walk is its optimality() against the shortest one, in [0, 1].  There is one graph; a
seed draws walks, first weights and all that training draws.

The base policy, a Llama of three layers, learns all logged walks.  Each method is a script of this
project, unchanged, starts from there and takes the same number of optimiser steps.  PPO takes walks
of its own, 2,560 in 320 steps; all others see only the logged ones.

Evaluation is the mean over all 20 starts, sampled at temperature 1.  As in trlx nothing is held
out: the starts are the whole task, and the question is what a method makes of the logged walks.
--held_out 0.2 sets about four starts apart, from which no walk is trained on (walks from elsewhere
pass through them), and adds a column for those alone.
"""
from __future__ import annotations

import json
import random
import string
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from compare import (append_rows, machine, markdown, read_rows, run_script, shown, start, tiny_base,
                     train_each)

import common
from common import Cost, flag

# ------------------------------------------------------------------------------------------ world

NODES = string.ascii_lowercase[:21]
GOAL, STARTS = NODES[0], NODES[1:]
MOST_MOVES = 9  # of a walk of 10 nodes


def draw_graph(seed: int, chance: float = 0.1) -> dict[str, str]:
    """The nodes that each node leads to: one at least, and none from the goal."""
    rng, graph = random.Random(seed), {GOAL: ""}
    for node in STARTS:
        others = NODES.replace(node, "")
        chosen = [other for other in others if rng.random() < chance]
        graph[node] = "".join(chosen) if chosen else rng.choice(others)
    return graph


def moves_to_goal(graph: dict[str, str]) -> dict[str, int]:
    """The fewest moves from each node to the goal, by a breadth-first search from there."""
    moves, reached = {GOAL: 0}, [GOAL]
    for target in reached:  # grows on the way
        for node in graph:
            if target in graph[node] and node not in moves:
                moves[node] = moves[target] + 1
                reached.append(node)
    return moves


GRAPH = draw_graph(seed=0)  # the goal is 1 to 6 moves away; a random walk gets there in 38 of 100
FEWEST = moves_to_goal(GRAPH)


def optimality(prompts: list[str], responses: list[str]) -> list[float]:
    """Rewards in [0, 1]: (10 - moves) / (10 - fewest moves) of a walk that ends at the goal.

    1 for a shortest walk.  0 for one that has not reached the goal after 9 moves, that stops before
    it, or that has a move along no edge, such as any from the goal on.
    """
    return [optimality_of(start, moves) for start, moves in zip(prompts, responses)]


def optimality_of(node: str, moves: str) -> float:
    """The optimality of one walk from a node."""
    best = MOST_MOVES + 1 - FEWEST[node]
    for move in moves:
        if move not in GRAPH[node]:
            return 0.0
        node = move
    if node != GOAL or len(moves) > MOST_MOVES:
        return 0.0
    return (MOST_MOVES + 1 - len(moves)) / best


def random_walk(rng: random.Random) -> dict[str, str]:
    """A logged walk: random moves from a random start."""
    node = prompt = rng.choice(STARTS)
    response = ""
    while node != GOAL and len(response) < MOST_MOVES:
        node = rng.choice(GRAPH[node])
        response += node
    return {"prompt": prompt, "response": response}


# ---------------------------------------------------------------------------------------- methods

PPO_UPDATES = 16  # optimiser steps of an iteration: 4 passes over 128 walks, 32 at a time
METHODS = {
    "filter_5": ["mle_filter.py", "--keep", 0.05],
    "filter_20": ["mle_filter.py", "--keep", 0.2],
    "rwr": ["rwr.py"],
    "dt": ["dt.py", "--reward_format", "digit", "--emphasis", 0],
    "dt_emphasis": ["dt.py", "--reward_format", "digit", "--emphasis", 4],
    "ppo": ["ppo_baseline.py", "--rollout_batch_size", 128, "--ppo_epochs", 4, "--kl_coef", 0,
            "--critic_lr", 2e-3]}
GUIDANCE = 0.5
BASE_STEPS, BASE_LR = 400, 3e-3
TUNING_SEEDS = [100, 101]
GRID = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
# The best on TUNING_SEEDS, by: python benchmarks/random_walks.py --tune
LR = {"filter_5": 3e-4, "filter_20": 3e-4, "rwr": 3e-3, "dt": 1e-2, "dt_emphasis": 3e-3,
      "ppo": 3e-4}


@dataclass
class Config:
    """What to run."""
    seeds: list[int] = flag([0, 1, 2, 3, 4], "random seeds: walks, a base policy and a run of each "
                            "method for every one")
    methods: list[str] = flag(list(METHODS), f"of {', '.join(METHODS)}")
    steps: int = flag(320, f"optimiser steps of each method, a multiple of {PPO_UPDATES}")
    held_out: float = flag(1e-9, "share of starts from which no walk is trained on; 1e-9: none")
    out: str = flag("runs/random_walks", "folder of the runs and of rows.jsonl; finished runs in "
                    "it are not run again")
    jobs: int = flag(2, "runs at a time, each on one CPU thread")
    tune: bool = flag(False, f"run the grid of learning rates, on seeds {TUNING_SEEDS}")
    report: bool = flag(False, "run nothing: print the table of what has run")
    mini: bool = flag(False, "a few steps of two methods: a test of this script")

    def __post_init__(self) -> None:
        common.require(set(self.methods) <= set(METHODS),
                       f"--methods: choose from {', '.join(METHODS)}")
        common.require(self.steps > 0 and self.steps % PPO_UPDATES == 0,
                       f"--steps must be a multiple of {PPO_UPDATES}")
        if self.tune:
            self.seeds = TUNING_SEEDS
        if self.mini:
            self.seeds, self.methods = [0], ["dt_emphasis", "ppo"]
            self.steps, self.jobs = PPO_UPDATES, 1


class Cell(NamedTuple):
    """A policy to train and to evaluate."""
    method: str  # "base", or one of METHODS
    seed: int
    lr: float

    def folder(self, cfg: Config) -> Path:
        """The folder of its run."""
        return Path(cfg.out, f"seed{self.seed}", f"{self.method}-{self.lr:g}-{cfg.steps}")

    def policy(self, cfg: Config) -> Path:
        """The folder of the trained policy, the only one in that of the run."""
        record, = self.folder(cfg).glob("[!.]*/run.json")
        return record.parent


def make_world(home: Path, seed: int) -> None:
    """Writes a seed's logged walks and its model of random weights."""
    rng = random.Random(seed)
    walks = [json.dumps(random_walk(rng)) for _ in range(1000)]
    tiny_base(str(home / "untrained"), walks, 257, seed, hidden_size=64, intermediate_size=192,
              num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=64,
              tie_word_embeddings=True, bos_token_id=None, pad_token_id=None)
    common.write_beside(home / "walks.jsonl", walks)


def train(cell: Cell, cfg: Config) -> Cell:
    """Trains a cell's policy by the project's script; returns the cell."""
    home, steps = Path(cfg.out, f"seed{cell.seed}"), cfg.steps
    if cell.method == "base":
        model, script, own = home / "untrained", "mle_filter.py", ["--keep", 1.0]
        steps = PPO_UPDATES if cfg.mini else BASE_STEPS
    else:
        model = Cell("base", cell.seed, BASE_LR).policy(cfg)
        script, *own = METHODS[cell.method]
    if cell.method == "ppo":
        steps //= PPO_UPDATES
    run_script(cell.folder(cfg), script, *own, "--model", model, "--samples", home / "walks.jsonl",
               "--reward_model", f"{Path(__file__).resolve()}:optimality", "--lr", cell.lr,
               "--steps", steps, "--batch_size", 32, "--seed", cell.seed,
               "--held_out", cfg.held_out, "--max_prompt_tokens", 8, "--max_response_tokens",
               MOST_MOVES + 1, "--eval_prompts", 0, "--save_every", 0, "--dtype", "fp32")
    return cell


def evaluate(cell: Cell, cfg: Config) -> list[dict]:
    """A row for each way to ask a trained policy: means over all starts."""
    folder, rows = str(cell.policy(cfg)), []
    record = common.read_record(Path(folder, "run.json"))
    own = common.Config(model=folder, samples=folder, max_prompt_tokens=8, dtype="fp32",
                        max_response_tokens=MOST_MOVES + 1, seed=cell.seed, held_out=cfg.held_out)
    hidden = common.held_out_hashes([("", common.Sample(start)) for start in STARTS], own)
    codec, model = common.Codec(folder, own), common.load_model(folder)
    prompts = list(STARTS) * (2 if cfg.mini else 50)
    plain = [codec.prompt(prompt) for prompt in prompts]
    tagged = [ids + codec.continuation(record.get("reward_tag", "")) for ids in plain]
    unseen = np.array([common.prompt_hash(prompt) in hidden for prompt in prompts])
    for guidance in (0.0, GUIDANCE) if "reward_tag" in record else (0.0,):
        replies = common.sample(model, tagged, own, cell.seed + 1_000_003, codec.stop_ids, Cost(),
                                1.0, plain, guidance)
        reward = np.array(optimality(prompts, [codec.decode(reply) for reply in replies]))
        rows.append({**cell._asdict(), "guidance": guidance, "steps": cfg.steps,
                     "held_out": cfg.held_out, "optimality": float(reward.mean()),
                     "unseen": float(reward[unseen].mean()) if unseen.any() else None,
                     "seconds": record["cost"]["seconds"], **machine()})
    return rows


def finished(cfg: Config) -> list[dict]:
    """The rows of rows.jsonl with these settings."""
    return [row for row in read_rows(Path(cfg.out, "rows.jsonl")) if row["steps"] == cfg.steps
            and row["held_out"] == cfg.held_out and row["seed"] in cfg.seeds]


def run(cfg: Config) -> None:
    """Trains and evaluates what is missing, and appends it to rows.jsonl."""
    for seed in cfg.seeds:
        home = Path(cfg.out, f"seed{seed}")
        if not (home / "walks.jsonl").exists():
            make_world(home, seed)
    done = {(row["method"], row["seed"], row["lr"]) for row in finished(cfg)}
    bases = [Cell("base", seed, BASE_LR) for seed in cfg.seeds]
    others = [Cell(method, seed, lr) for seed in cfg.seeds for method in cfg.methods
              for lr in (GRID if cfg.tune else [LR[method]])]
    for cells in bases, others:
        missing = [cell for cell in cells if cell not in done]
        for cell in train_each(train, missing, cfg):
            rows = evaluate(cell, cfg)
            append_rows(Path(cfg.out, "rows.jsonl"), rows)
            print(*cell, *(f"{row['optimality']:.3f}" for row in rows), flush=True)


def table(rows: list[dict], cfg: Config) -> str:
    """Markdown: each method, and with --tune each of its rates, over the seeds."""
    groups, order = {}, ["base", *METHODS]
    for row in sorted(rows, key=lambda row: order.index(row["method"])):
        name = row["method"] + (f", guided by {row['guidance']:g}" if row["guidance"] else "")
        name += f", lr {row['lr']:g}" if cfg.tune else ""
        groups.setdefault(name, []).append(row)
    lines = []
    for name, group in groups.items():
        line = {"": name, "optimality": shown(row["optimality"] for row in group)}
        if cfg.held_out > 1e-9:
            line["unseen starts"] = shown(row["unseen"] for row in group)
        lines.append({**line, "training s": f"{np.mean([row['seconds'] for row in group]):.0f}"})
    return markdown(lines)


def main(cfg: Config) -> None:
    """Runs what is missing; prints the table."""
    if not cfg.report:
        torch.set_num_threads(1)
        run(cfg)
    rows = finished(cfg)
    common.require(rows, f"{cfg.out}: no row of these settings yet")
    print(f"\n`python {' '.join(sys.argv)}`, {rows[-1]['date']}, commit {rows[-1]['commit']}, "
          f"{rows[-1]['cpu']}; mean ± half of the 95 % interval over seeds {cfg.seeds}\n")
    print(table(rows, cfg))


if __name__ == "__main__":
    start(main, Config)
