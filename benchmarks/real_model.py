"""Does a real model follow a reward tag, after how many steps, and does --emphasis help?

    python benchmarks/real_model.py --model SMOLLM2
    python benchmarks/real_model.py --model SMOLLM2 --methods dt_word_4 --steps 200 --lr 3e-4 1e-3
    python benchmarks/real_model.py --report   # the table of what has run
    python benchmarks/real_model.py --mini     # a test, not a result

SMOLLM2 is SmolLM2-135M-Instruct, as a folder or Hub id.  The prompts, "What do you think of rain?",
come from a small grammar and are split into training, tuning and test.  The reward of a reply is
sentiment(), VADER's score of its words (Hutto & Gilbert 2014; pip install vaderSentiment).

1. Replies: the model answers each training prompt 20 times, in 24 tokens: 5,280 samples.
2. Runs: each method at each of --steps and --lr, 16 sequences a step, each with a learning-rate
   schedule of its own.  0 steps: the untrained model, asked with DT's tag.
3. The base policy, and the best of 4 and of 16 of its replies.

The column "tuning" is of the tuning prompts, slope for DT and sentiment for the others: of several
learning rates, read the row where it is highest.  All else is of the test prompts.  Sentiment: the
mean reward, DT's at q95, "guided" by 0.5.  Perplexity: under the base policy.  Slope: the reward z
at q95 less that at q5, over the same difference of the z asked for.  Intervals are 95 % over
prompts; what another training seed would change is not in them.

A step takes 12 s on one slow core, so days for all of it: --methods, --steps and --lr choose, and a
later call adds to the table.  Finished runs are kept, without weights; others are resumed.
"""
from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Optional

import numpy as np
import torch

from compare import (append_rows, machine, markdown, read_rows, run_script, start, tiny_base,
                     train_each)

import common
import reward_model
from common import flag

# ---------------------------------------------------------------------------- prompts and rewards

QUESTIONS = ("What do you think of {}?", "How do you feel about {}?", "Tell me something about {}.",
             "Describe {} in one sentence.", "Why do people talk about {}?", "Write a line on {}.",
             "What comes to mind when you hear of {}?", "Is there too much {} in the world?",
             "What would a day without {} be like?", "What should I know about {}?",
             "How has {} changed over the years?", "Would you miss {}?")
TOPICS = ("rain coffee winter cooking football homework music traffic nature gardening television "
          "work silence money travel sleep chess dancing school snow tea cycling advertising fog "
          "history politics camping poetry running fashion bread mathematics shopping luck art "
          "medicine").split()


def split_prompts(cfg: Config) -> dict[str, list]:
    """The grammar's prompts as chats, drawn into "train", "tuning" and "test"."""
    system = {"role": "system", "content": ""}  # else SmolLM2's template writes its own
    prompts = [[system, {"role": "user", "content": question.format(topic)}]
               for topic in TOPICS for question in QUESTIONS]
    random.Random(0).shuffle(prompts)
    train, tuning, test = (6, 2, 4) if cfg.mini else (264, 48, 120)
    return {"train": prompts[:train], "tuning": prompts[train:train + tuning],
            "test": prompts[train + tuning:train + tuning + test]}


def sentiment(prompts: list, responses: list[str]) -> list[float]:
    """VADER's compound score of each response, from -1 to 1, whatever the prompt."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    analyser = SentimentIntensityAnalyzer()
    return [analyser.polarity_scores(response)["compound"] for response in responses]


GOOD, BAD = "good great happy love nice".split(), "bad sad hate awful terrible".split()


def good_words(prompts: list, responses: list[str]) -> list[float]:
    """--mini's reward, which needs no VADER: how many of a response's words are good."""
    return [float(sum(word in GOOD for word in response.split())) for response in responses]


# -------------------------------------------------------------------------------------------- runs

METHODS = {"filter": ["mle_filter.py", "--keep", 0.2], "rwr": ["rwr.py"], **{
    f"dt_{tag}_{emphasis}": ["dt.py", "--reward_format", tag, "--emphasis", emphasis,
                             "--target", "q5", "q95"]
    for tag in ("digit", "word") for emphasis in (0, 2, 4)}}
BATCH_SIZE = 16
REWARD = {False: sentiment, True: good_words}  # the key is cfg.mini


@dataclass
class Config:
    """What to run."""
    model: Optional[str] = flag(None, "folder or Hub id of an instruct model")
    out: str = flag("runs/real_model", "folder of the runs and of rows.jsonl")
    methods: list[str] = flag(list(METHODS), f"of {', '.join(METHODS)}")
    steps: list[int] = flag([0, 100, 200, 400, 800], "optimiser steps; 0: DT's tag, untrained")
    lr: list[float] = flag([1e-4, 3e-4, 1e-3], "learning rates, a run each")
    jobs: int = flag(2, "runs at a time, each on one CPU thread")
    report: bool = flag(False, "run nothing: print the table of all that has run")
    mini: bool = flag(False, "a tiny model, two methods, two steps: a test of this script")

    def __post_init__(self) -> None:
        common.require(self.model or self.mini or self.report,
                       "give --model, the folder of SmolLM2-135M-Instruct")
        common.require(set(self.methods) <= set(METHODS),
                       f"--methods: choose from {', '.join(METHODS)}")
        common.require(self.jobs > 0 and min(self.steps) >= 0 and min(self.lr) > 0,
                       "--jobs and --lr must be above 0, --steps 0 or more")
        if self.mini:
            self.out, self.methods, self.jobs = f"{self.out}/mini", ["filter", "dt_word_2"], 1
            self.steps, self.lr = [0, 2], [1e-4]


class Cell(NamedTuple):
    """A policy to train and to evaluate."""
    method: str
    steps: int
    lr: float

    def folder(self, cfg: Config) -> Path:
        """The folder of its run."""
        return Path(cfg.out, f"{self.method}-{self.steps}-{self.lr:g}")


def shared_flags(cfg: Config) -> dict:
    """The flags of all that is sampled and trained."""
    scorer = f"{Path(__file__).resolve()}:{REWARD[cfg.mini].__name__}"
    return {"model": cfg.model, "reward_model": scorer, "max_prompt_tokens": 64,
            "max_response_tokens": 24, "batch_size": BATCH_SIZE}


def write_replies(cfg: Config) -> None:
    """Writes data/train.jsonl, the base policy's replies to the training prompts with their
    rewards, and data/test.jsonl, the tuning and test prompts."""
    out = Path(cfg.out)
    lines = {split: [json.dumps({"prompt": prompt}) for prompt in prompts]
             for split, prompts in split_prompts(cfg).items()}
    common.write_beside(out / "prompts.jsonl", lines["train"])
    own = common.Config(**shared_flags(cfg), samples=str(out / "prompts.jsonl"), eval_prompts=0,
                        samples_per_prompt=3 if cfg.mini else 20, held_out=1e-9,  # none
                        out=str(out / "replies"))
    base = common.base_policy(own)
    data = common.read_data(own, base)
    rm = reward_model.for_run(own, base, data)
    common.build_stages(own, common.labelled_samples(own, base, data, rm))
    samples = (out / "replies" / "samples.jsonl").read_text().split("\n")[:-1]
    common.write_beside(out / "data" / "train.jsonl", samples)
    common.write_beside(out / "data" / "test.jsonl", lines["tuning"] + lines["test"])


def train(cell: Cell, cfg: Config) -> Cell:
    """Trains and evaluates a cell's policy by the project's script; returns the cell."""
    script, *own = METHODS[cell.method]
    steps, lr = (cell.steps, cell.lr) if cell.steps else (1, 1e-12)  # no weight moves
    prompts = split_prompts(cfg)
    shared = shared_flags(cfg)
    flags = {**shared, "judge": shared["reward_model"], "samples": Path(cfg.out, "data"),
             "lr": lr, "steps": steps, "eval_prompts": 2 * len(prompts["tuning"] + prompts["test"])}
    own += [text for name, value in flags.items() for text in (f"--{name}", value)]
    run_script(cell.folder(cfg), script, *own)
    return cell


def by_prompt(replies: list[dict], name: str) -> np.ndarray:
    """The mean of a number over the replies to each distinct prompt, (P,)."""
    keys = [common.prompt_key(reply["prompt"]) for reply in replies]
    index = np.unique(keys, return_inverse=True)[1]
    return np.bincount(index, [reply[name] for reply in replies]) / np.bincount(index)


def mean_and_half(values: np.ndarray) -> list[float]:
    """The mean, and half of its 95 % interval, of a value for each prompt (P,)."""
    return [float(values.mean()), float(1.96 * values.std(ddof=1) / math.sqrt(len(values)))]


def summary(replies: list[dict]) -> dict:
    """Sentiment of replies, and their perplexity under the base policy."""
    log_prob, tokens = (sum(r[name] for r in replies) for name in ("base_log_prob", "tokens"))
    return {"sentiment": mean_and_half(by_prompt(replies, "gold")),
            "perplexity": math.exp(-log_prob / tokens)}


def replies_to(prompts: list, folder: Path) -> dict[str, list[dict]]:
    """The replies to these prompts that a run's evaluation holds, by the name of their file."""
    keys = {common.prompt_key(prompt) for prompt in prompts}
    return {file.stem: [reply for reply in read_rows(file)
                        if common.prompt_key(reply["prompt"]) in keys]
            for file in (folder / "evaluation").glob("*.jsonl") if file.stem != "base"}


def scores(replies: dict[str, list[dict]], folder: Path) -> dict:
    """What a run's replies show, DT's with its slope."""
    if len(replies) == 1:  # no DT, which answers to each target
        only, = replies.values()
        return summary(only)
    target = {entry["variant"]: entry["target"]
              for entry in read_rows(folder / "leaderboard.jsonl")}
    low, high = (by_prompt(replies[f"dt_target_{name}"], "reward") for name in ("q5", "q95"))
    slope = (high - low) / (target["target q95"] - target["target q5"])                 # (P,)
    return {"slope": mean_and_half(slope), **summary(replies["dt_target_q95"]),
            "guided": summary(replies["dt_target_q95_guidance_0.5"])}


def row_of(cell: Cell, cfg: Config) -> dict:
    """A row: the scores on the test prompts and, as "tuning", the score on the tuning prompts by
    which to choose the learning rate."""
    folder, prompts = cell.folder(cfg), split_prompts(cfg)
    tuning, test = (scores(replies_to(prompts[split], folder), folder)
                    for split in ("tuning", "test"))
    return {**cell._asdict(), **machine(), "threads": 1,
            "tuning": tuning.get("slope", tuning["sentiment"]), **test}


def best_of_n(cfg: Config) -> list[dict]:
    """A row for the base policy and for the best of 4 and 16 of its replies to each test prompt."""
    prompts = split_prompts(cfg)["test"]
    own = common.Config(**shared_flags(cfg), samples=cfg.out)  # which wants data; none is read
    codec = common.Codec(cfg.model, own)
    model = common.load_model(cfg.model, common.compute_dtype(own))
    drawn = []  # 16 replies to every prompt
    for seed in range(16):
        replies = common.sample(model, [codec.prompt(prompt) for prompt in prompts], own,
                                2_000_003 + seed, codec.stop_ids, common.Cost(), temperature=1.0)
        gold = REWARD[cfg.mini]([], [codec.decode(reply) for reply in replies])
        drawn.append([{"prompt": prompt, "gold": score, "tokens": len(reply.ids),
                       "base_log_prob": sum(reply.log_probs)}
                      for prompt, reply, score in zip(prompts, replies, gold)])
    rows = []
    for name, n in ("base", 1), ("best of 4", 4), ("best of 16", 16):
        best = [max(each, key=lambda reply: reply["gold"]) for each in zip(*drawn[:n])]
        rows.append({**Cell(name, 0, 0.0)._asdict(), **machine(), **summary(best)})
    return rows


def rows_so_far(cfg: Config) -> list[dict]:
    """The rows of rows.jsonl."""
    return read_rows(Path(cfg.out, "rows.jsonl"))


def run(cells: list[Cell], cfg: Config) -> None:
    """Trains and evaluates the cells that have no row yet, and then drops their weights."""
    done = {tuple(row[name] for name in Cell._fields) for row in rows_so_far(cfg)}
    missing = [cell for cell in dict.fromkeys(cells) if cell not in done]
    for cell in train_each(train, missing, cfg):
        row = row_of(cell, cfg)
        append_rows(Path(cfg.out, "rows.jsonl"), [row])
        for weights in cell.folder(cfg).glob("*/*.safetensors"):
            weights.unlink()  # half a gigabyte, which nothing reads again
        print(*cell, *(f"{name} {row[name][0]:.3f}" for name in ("slope", "sentiment")
                       if name in row), flush=True)


def cells_to_train(cfg: Config) -> list[Cell]:
    """Each method at each step count and learning rate, those with few steps first.  Untrained,
    emphasis changes nothing: dt_word_0 stands for dt_word_4."""
    trained = [Cell(method, steps, lr) for steps in sorted(cfg.steps) if steps
               for method in cfg.methods for lr in cfg.lr]
    formats = {method[:-1] + "0" for method in cfg.methods if method.startswith("dt")}
    return [Cell(method, 0, 0.0) for method in sorted(formats) if 0 in cfg.steps] + trained


def table(rows: list[dict]) -> str:
    """Markdown: what has run, by steps."""
    def shown(pair: Optional[list[float]]) -> str:
        return f"{pair[0]:.2f} ± {pair[1]:.2f}" if pair else ""
    lines = []
    for row in sorted(rows, key=lambda row: row["steps"]):  # else as they came
        guided = row.get("guided", {})
        lines.append({
            "steps": row["steps"], "method": row["method"], "lr": f"{row['lr']:g}",
            "tuning": shown(row.get("tuning")), "slope": shown(row.get("slope")),
            "sentiment": shown(row["sentiment"]), "perplexity": f"{row['perplexity']:.1f}",
            "guided: sentiment": shown(guided.get("sentiment")),
            "guided: perplexity": f"{guided['perplexity']:.1f}" if guided else "",
            "commit": row["commit"]})
    return markdown(lines)


def run_all(cfg: Config) -> None:
    """Everything before the table, as far as it is missing."""
    REWARD[cfg.mini]([], [])  # if VADER is missing, now is the time to say so
    torch.set_num_threads(cfg.jobs)
    if cfg.mini:
        text = " ".join((GOOD + BAD) * 9)
        cfg.model = tiny_base(f"{cfg.out}/tiny", [text], template="{% for m in messages %}"
                              "{{ m['content'] + eos_token }}{% endfor %}").path
    if not Path(cfg.out, "data", "test.jsonl").exists():
        write_replies(cfg)
    run(cells_to_train(cfg), cfg)
    if not any(row["method"] == "base" for row in rows_so_far(cfg)):
        append_rows(Path(cfg.out, "rows.jsonl"), best_of_n(cfg))


def main(cfg: Config) -> None:
    """Runs what is missing; prints the table."""
    if not cfg.report:
        run_all(cfg)
    rows = rows_so_far(cfg)
    common.require(rows, f"{cfg.out}: no row yet")
    print("\nmean ± half of the 95 % interval over prompts\n\n" + table(rows))


if __name__ == "__main__":
    start(main, Config)
