"""Real preferences on a real model, with a judge: all stages, and whether the methods can be
told apart.

    python benchmarks/hh.py --model SMOLLM2 --preferences PAIRS.jsonl.gz --out runs/hh

The pairs are split by prompt into three: from one the run's reward model learns, from another the
judge, which training never asks, and on the third both are tested and every policy answers.  The
judge's verdict is the leaderboard's `gold`: where a policy's reward rises and its gold does not, it
has learnt to please its reward model.  Seeds after the first share its reward model and samples:
they vary the order of the data, the dropped tags, which of the test prompts are asked first, and
the replies to them.  Finished stages stay.
"""
from __future__ import annotations

import itertools
import json
import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Iterable, Optional

import numpy as np

from measure import call, machine, markdown, record, start
from paired import boards, by_prompt, replies, table

import common
from common import flag

SCRIPTS = {"sft": ["mle_filter.py", "--keep", "1.0"],
           "mle_filter": ["mle_filter.py", "--keep", "0.25"], "rwr": ["rwr.py"],
           "dt": ["dt.py", "--target", "q5", "q50", "q99"],
           "ppo": ["ppo_baseline.py", "--rollout_batch_size", "64", "--batch_size", "16",
                   "--ppo_epochs", "2"]}
COLUMNS = {"kl_to_base": ".1f", "perplexity": ".1f", "response_tokens": ".0f", "eos_rate": ".2f",
           "distinct_2": ".3f", "train_seconds": ".0f", "train_flops": ".1e"}
# a rough list of words
EVASIVE = re.compile(r"\b(sorry|not sure|I don[’']t|can[’']t|cannot)\b", re.IGNORECASE)


@dataclass
class Config:
    """What to run."""
    model: str = flag(None, "folder or Hub id of a causal language model")
    preferences: str = flag(None, "preference pairs, as the trainers take them")
    out: str = flag("runs/hh", "folder of the data, the judge, the run and the tables")
    seeds: list[int] = flag([0, 1, 2], "a run each")
    methods: list[str] = flag(list(SCRIPTS), f"of {', '.join(SCRIPTS)}")
    max_pairs: Optional[int] = flag(None, "pairs that the run learns from, and the judge, at most")
    sources: str = flag("dataset+generated",
                        "what is labelled and learnt from: dataset, or a generated reply too")
    eval_prompts: int = flag(320, "test prompts that every policy answers")
    max_prompt_tokens: int = flag(192, "longer prompts are cut on the left")
    max_response_tokens: int = flag(64, "longer responses are cut on the right")
    rm_lr: float = flag(2e-4, "of judge and reward model")
    rm_epochs: int = flag(2, "their passes over the pairs")
    lr: float = flag(3e-4, "of the offline methods")
    steps: Optional[int] = flag(None, "optimiser steps of each offline method, in place of a pass "
                                "over its replies")
    ppo_lr: float = flag(3e-5, "of PPO, its critic included")
    ppo_steps: int = flag(8, "PPO's iterations")
    compile: bool = flag(True, "torch.compile the loss kernels")

    def __post_init__(self) -> None:
        common.require(bool(self.model and self.preferences), "give --model and --preferences")
        common.require(set(self.methods) <= set(SCRIPTS),
                       f"--methods: choose from {', '.join(SCRIPTS)}")


def split(cfg: Config, out: Path) -> None:
    """Two fifths of the prompts for the run, two for the judge, one to test both on: data/ and
    judge-data/."""
    origin = out / "origin.txt"
    if origin.exists():
        common.require(origin.read_text().strip() == cfg.preferences,
                       f"{out}: its data are of other --preferences; take another --out")
        return
    parts: dict[str, list[str]] = {"run": [], "judge": [], "test": []}
    pairs = common.read_preferences(cfg.preferences, 0.1, 0, None)
    for prompt, responses in itertools.chain(*pairs):
        fifth = zlib.crc32(common.prompt_key(prompt).encode()) % 5
        row = json.dumps({"prompt": prompt, "ranked": responses})
        parts["test" if fifth == 0 else "judge" if fifth < 3 else "run"].append(row)
    for folder, rows in (("data", parts["run"]), ("judge-data", parts["judge"])):
        common.write_beside(out / folder / "train.jsonl", rows)
        common.write_beside(out / folder / "test.jsonl", parts["test"])
    common.write_beside(origin, [cfg.preferences])


def accuracy(name: str, folder: Path) -> str:
    """How often a reward model is right on the test pairs."""
    found = json.loads((folder / "run.json").read_text())["report"]
    longer = found["longer_wins"]
    return (f"- {name}: right on {found['accuracy']:.3f} ± {found['error']:.3f} of "
            f"{found['held_out_pairs']} pairs, {'longer' if longer >= 0.5 else 'shorter'} wins "
            f"{max(longer, 1 - longer):.3f}")


def evasive(responses: Iterable[str]) -> str:
    """How many of them do not answer, by their words, in per cent."""
    return f"{100 * np.mean([bool(EVASIVE.search(response)) for response in responses]):.0f}"


def describe(name: str, having: list[tuple[str, dict]]) -> dict:
    """What a policy's replies are like, and what its training took, as means over its runs:
    (folder, row) of each."""
    mean = {column: float(np.mean([row[column] for _, row in having])) for column in COLUMNS}
    said = [reply for folder, row in having for reply in replies(folder, row)]
    gold, cut_off = (np.array([reply[key] for reply in said]) for key in ("gold", "truncated"))
    return {"policy": name, "judge's sd": f"{gold.std():.2f}",
            "judge, of ended": f"{gold[~cut_off].mean():.2f}",
            "of cut off": f"{gold[cut_off].mean():.2f}",
            **{column: f"{mean[column]:{form}}" for column, form in COLUMNS.items()},
            "evasive %": evasive(reply["response"] for reply in said)}


def run(cfg: Config, out: Path) -> list[str]:
    """Runs what is missing, each script in a process of its own; returns the runs' folders, a seed
    each."""
    split(cfg, out)
    shared = ["--model", cfg.model, "--max_prompt_tokens", cfg.max_prompt_tokens,
              "--max_response_tokens", cfg.max_response_tokens,
              *([] if cfg.compile else ["--no_compile"]),
              *(["--max_pairs", cfg.max_pairs] if cfg.max_pairs else [])]
    train = ["--lr", cfg.rm_lr, "--epochs", cfg.rm_epochs, "--batch_size", 16, "--seed",
             cfg.seeds[0]]
    call(out / "judge", "reward_model.py", *shared, "--preferences", out / "judge-data", *train)
    shared += ["--preferences", out / "data"]
    call(out, "reward_model.py", *shared, *train)
    shared += ["--judge", out / "judge" / "rm", "--eval_prompts", cfg.eval_prompts]
    offline = ["--lr", cfg.lr, "--batch_size", 16, *(["--steps", cfg.steps] if cfg.steps else [])]
    online = ["--lr", cfg.ppo_lr, "--critic_lr", cfg.ppo_lr, "--steps", cfg.ppo_steps]
    folders = [out if seed == cfg.seeds[0] else out / f"seed{seed}" for seed in cfg.seeds]
    for seed, folder in zip(cfg.seeds, folders):
        given = (["--sources", cfg.sources] if folder == out else
                 ["--samples", out / "samples.jsonl", "--reward_model", out / "rm"])
        for method in cfg.methods:
            call(folder, *SCRIPTS[method], *shared, *given,
                 *(online if method == "ppo" else offline), "--seed", seed)
    return list(map(str, folders))


def main(cfg: Config) -> None:
    """Runs, prints and records the tables, and writes them into --out."""
    print(machine())
    out = Path(cfg.out)
    folders = run(cfg, out)
    ranked = [row["ranked"] for _, row in common.read_jsonl(out / "data" / "train.jsonl")]
    lines = [accuracy("reward model", out / "rm"), accuracy("judge", out / "judge" / "rm"),
             f"- evasive: {evasive(best for best, *_ in ranked)} % of the preferred replies, "
             f"{evasive(worst for *_, worst in ranked)} % of the others"]
    rows = []
    for column, what in (("gold", "the judge's score"), ("reward", "the training reward, z")):
        found = by_prompt(folders, lambda reply, column=column: reply[column])
        means = table(found, "sft" if "sft" in cfg.methods else "base")
        lines += ["", f"{what}:", "", markdown(means)]
        rows += [{"of": column, **row} for row in means]
    described = [describe(name, having) for name, having in boards(folders).items()]
    lines += ["", markdown(described)]
    print("\n".join(lines))
    common.write_beside(out / "table.md", lines)
    record("hh", rows + described, str(out / "hh.jsonl"))


if __name__ == "__main__":
    start(main, Config)
