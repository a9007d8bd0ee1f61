"""How sure one can be of a run's differences: policies on the same held-out prompts, with 95 %
intervals.

    python benchmarks/paired.py --runs runs/hh  # one run, or the seeds of one
    python benchmarks/paired.py --runs runs/hh --column reward

A prompt is the unit: what a policy got on it is averaged over replies and seeds, and differences
are taken prompt by prompt.  The last column is the power of it all: the difference that such an
experiment sees four times in five.  What a training run with another seed would have done is not in
the intervals: look at the means run by run.
"""
from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Optional

import numpy as np

from measure import markdown, start

import common
from common import flag

SEEN = 1.96 + 0.84  # standard errors: two-sided 5 %, with 80 % power


@dataclass
class Config:
    """Which runs, and what to compare."""
    runs: list[str] = flag(["runs/toy"], "folders of runs with the same held-out prompts, a seed "
                           "each")
    column: str = flag("gold", "gold, of the toy world or --judge, or reward")
    against: str = flag("base", "the policy that all are held against, by the start of its name")


def comparable(run: str) -> tuple[list[dict], int]:
    """A run's leaderboard rows that compare with the newest, in the table's order; and how many do
    not."""
    file = Path(run) / "leaderboard.jsonl"
    rows = [row for _, row in common.read_jsonl(file)] if file.exists() else []
    common.require(bool(rows), f"{run}: no leaderboard.jsonl there; train something first")
    alike = [row for row in rows if row.get("setting") == rows[-1].get("setting")]
    order = sorted(alike, key=lambda row: (row["algorithm"], row["variant"], row["seed"]))
    return order, len(rows) - len(alike)


def leaderboard(run: str) -> dict[str, dict]:
    """A run's comparable rows by name; of several seeds, the last."""
    return {f"{row['algorithm']} {row['variant']}".strip(): row for row in comparable(run)[0]}


def boards(folders: list[str]) -> dict[str, list[tuple[str, dict]]]:
    """Each policy's leaderboard rows with their folders, a seed once: two folders of a seed share
    the base policy's."""
    found: dict[str, dict[int, tuple[str, dict]]] = {}
    for folder in folders:
        for name, row in leaderboard(folder).items():
            found.setdefault(name, {}).setdefault(row["seed"], (folder, row))
    return {name: list(having.values()) for name, having in found.items()}


def replies(run: str, row: dict) -> list[dict]:
    """What a policy said in evaluation."""
    file = common.replies_file(Path(run), row["algorithm"], row["variant"], row["seed"])
    return [reply for _, reply in common.read_jsonl(file)]


def by_prompt(runs: list[str],
              value: Callable[[dict], Optional[float]]) -> dict[str, list[dict[str, float]]]:
    """For each policy, for each run that has it: each prompt's mean value."""
    found: dict[str, list[dict[str, float]]] = {}
    for run in runs:
        for name, row in leaderboard(run).items():
            got: dict[str, list[float]] = {}
            for reply in replies(run, row):
                got.setdefault(common.prompt_key(reply["prompt"]), []).append(value(reply))
            if any(v is None for each in got.values() for v in each):
                continue
            means = {prompt: float(np.mean(each)) for prompt, each in got.items()}
            # two runs of one seed share the base policy's replies
            if means not in found.setdefault(name, []):
                found[name].append(means)
    return found


def difference(ours: list[dict], theirs: list[dict]) -> tuple[float, float, int]:
    """Mean difference over the prompts that both have, its standard error, and how many prompts
    those are."""
    ours, theirs = ({prompt: np.mean([run[prompt] for run in runs if prompt in run])
                     for prompt in set().union(*runs)} for runs in (ours, theirs))
    each = np.array([ours[prompt] - theirs[prompt]
                     for prompt in sorted(ours.keys() & theirs.keys())])
    common.require(len(each) > 1, "the policies have not two prompts in common")
    return float(each.mean()), float(each.std(ddof=1)) / math.sqrt(len(each)), len(each)


def table(found: dict[str, list[dict]], against: str) -> list[dict]:
    """A row a policy: its mean, run by run, and its difference to another with interval and
    power."""
    rival = next((name for name in found if name.startswith(against)), None)
    common.require(rival is not None, f"--against: no policy's name starts with {against!r}, of "
                   f"{', '.join(found)}")
    rows = []
    for name, runs in found.items():
        means = [float(np.mean(list(run.values()))) for run in runs]
        row = {"policy": name, "mean": f"{np.mean(means):.2f}",
               "run by run": ", ".join(f"{mean:.2f}" for mean in means) if len(means) > 1 else "",
               f"− {rival} [95 %]": "", "prompts": "", "seen 4 in 5 times": ""}
        if name != rival:
            mean, error, prompts = difference(runs, found[rival])
            row |= {f"− {rival} [95 %]": f"{mean:+.2f} [{mean - 1.96 * error:+.2f}, "
                    f"{mean + 1.96 * error:+.2f}]", "prompts": prompts,
                    "seen 4 in 5 times": f"{SEEN * error:.2f}"}
        rows.append(row)
    return rows


def main(cfg: Config) -> None:
    """Prints the table."""
    found = by_prompt(cfg.runs, lambda reply: reply.get(cfg.column))
    common.require(bool(found), f"--column {cfg.column}: no policy has it in {', '.join(cfg.runs)}")
    print(markdown(table(found, cfg.against)))


if __name__ == "__main__":
    start(main, Config)
