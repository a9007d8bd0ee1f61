"""Plain language on a real model: a setting where the truth is known, labels are noisy, and samples
are many.

    python benchmarks/reading.py --model SMOLLM2 --transcripts PAIRS.jsonl.gz --out runs/reading

The prompts are the first human turns of HH transcripts; the model itself answers each several
times, and with --logged the transcripts' own first replies are added.  Gold is Flesch's reading
ease of a reply, in tens, less 2 if it is unfinished, 3 if shorter than 15 words, 2 if it has no
word of the prompt.  A noisy labeller ranks each prompt's replies by gold; a reward model learns
from the ranks, labels the replies, and each method learns from those, SFT, the control, too.  Then:
what each policy gets of gold on held-out prompts, and how it games it.  (The pictures need
matplotlib.)

Every stage that is finished is kept; a call that was broken off goes on.  Seeds after the first
share the first one's replies, ranks and reward model: they vary the order of the data, the dropped
tags, which of the held-out prompts are asked first, and the replies to them.
"""
from __future__ import annotations

import contextlib
import json
import math
import os
import random
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from measure import call, machine, markdown, pyplot, record, start
from paired import boards, by_prompt, difference, leaderboard, replies, table

import common
import report
import reward_model
from common import flag

TARGETS = ["none", "q5", "q50", "q95", "5.00", "q99"]
SCRIPTS = {"sft": ["mle_filter.py", "--keep", "1.0"],
           "mle_filter": ["mle_filter.py", "--keep", "0.2"],
           "best_of_n": ["mle_filter.py", "--keep", "0.01", "--per_prompt"], "rwr": ["rwr.py"],
           "dt": ["dt.py", "--target", *TARGETS, "--guidance", "0.5", "1", "2", "--reward_step",
                  "0.5"],
           "ppo": ["ppo_baseline.py", "--rollout_batch_size", "64", "--batch_size", "16",
                   "--ppo_epochs", "2"]}
COMMON_WORDS = set("what some with that this have from your about would could should they them "
                   "there when where which will does into like want know tell give make need "
                   "please just been were their then than most best good ever more".split())


@dataclass
class Config:
    """What to run."""
    model: str = flag(None, "folder or Hub id of an instruct model")
    transcripts: str = flag(None, "HH transcripts, whose first human turns are the prompts")
    out: str = flag("runs/reading", "folder of the data, of a run for each seed, and of the table")
    seeds: list[int] = flag([0, 1, 2], "the first one runs every method, the others those of "
                            "--again")
    methods: list[str] = flag(list(SCRIPTS), f"of {', '.join(SCRIPTS)}")
    again: list[str] = flag(["sft", "mle_filter", "rwr", "dt"], "methods of the later seeds")
    replies: int = flag(4, "of the model to each prompt")
    logged: bool = flag(False, "learn from the transcripts' own first replies too")
    held_out: float = flag(0.2, "share of the prompts that nothing is trained on")
    noise: float = flag(1.0, "scale of the labeller's Gumbel noise, in gold: Bradley-Terry at that "
                        "temperature")
    temperature: float = flag(0.7, "of all sampling")
    max_response_tokens: int = flag(64, "of every reply")
    rm_lr: float = flag(2e-4, "of the reward model; at 3e-5 it learns next to nothing from so few")
    lr: float = flag(5e-4, "of the offline methods")
    batch_size: int = flag(32, "sequences per optimiser step, of the offline methods")
    reward_format: str = flag("digit", "of DT's tag: digit, decimal or token")
    steps: list[str] = flag([], "optimiser steps, in place of a pass over all: a number for all "
                            "offline methods, or sft=31; of PPO, iterations in place of 8")
    jobs: int = flag(1, "methods trained and evaluated at a time", "[1, inf)")
    threads: int = flag(0, "CPU threads of each; 0: torch's choice", "[0, inf)")
    ppo_lr: float = flag(3e-5, "of PPO, its critic included")
    eval_prompts: int = flag(256, "held-out prompts that every policy answers")
    compile: bool = flag(True, "torch.compile the loss kernels")

    def __post_init__(self) -> None:
        common.require(bool(self.model and self.transcripts), "give --model and --transcripts")
        common.require(self.methods[:1] != ["best_of_n"],
                       "--methods: best_of_n learns from what another has labelled")
        common.require(all(re.fullmatch(rf"(({'|'.join(SCRIPTS)})=)?\d+", pair)
                           for pair in self.steps), "--steps takes 1000 or sft=31, say")
        common.require({*self.methods, *self.again} <= set(SCRIPTS),
                       f"--methods: choose from {', '.join(SCRIPTS)}")


def first_turn(text: str) -> str:
    """The first turn of a transcript, or of what is left of one."""
    return re.split(r"\n\n(?:Human|Assistant):", text.removeprefix("\n\nHuman:"))[0].strip()


def syllables(word: str) -> int:
    """Groups of vowels, a silent e apart; one at least."""
    groups = len(re.findall(r"[aeiouy]+", word))
    return max(1, groups - (word.endswith("e") and not word.endswith(("le", "ee"))))


def measures(prompt: str, response: str, truncated: bool) -> dict[str, float]:
    """What gold is made of."""
    words = re.findall(r"[a-z]+(?:'[a-z]+)?", response.lower())
    sentences = max(1, len(re.findall(r"[.!?]+(?=\s|$)", response)))
    asked = {w[:5] for w in re.findall(r"[a-z]{4,}", prompt.lower()) if w not in COMMON_WORDS}
    a_sentence, a_word = len(words) / sentences, sum(map(syllables, words)) / max(1, len(words))
    ease = 206.835 - 1.015 * a_sentence - 84.6 * a_word
    return {"ease": min(max(ease, 0.0), 100.0) if words else 0.0, "unfinished": float(truncated),
            "short": float(len(words) < 15),
            "off the prompt": float(bool(asked) and not asked & {w[:5] for w in words}),
            "words a sentence": a_sentence, "syllables a word": a_word}


def gold(prompt: list[dict], response: str, truncated: bool) -> float:
    """The truth about a reply, which training never sees."""
    m = measures(prompt[-1]["content"], response, truncated)
    return m["ease"] / 10 - 2 * m["unfinished"] - 3 * m["short"] - 2 * m["off the prompt"]


def first_replies(transcripts: str) -> list[tuple[str, str]]:
    """(first human turn, the reply that it got) of every transcript."""
    def parse(part: str, row: dict, notes: object) -> list[str]:
        texts = []
        for name in ("chosen", "rejected"):
            with contextlib.suppress(common.LeftOut):
                texts.append("".join(common.side_of(row, name)))
        return texts
    rows = common.parsed_entries(transcripts, common.PREFERENCE_COLUMNS, parse)
    return list(dict.fromkeys((first_turn(text), first_turn(text.split("\n\nAssistant:", 1)[1]))
                              for row in rows for text in row))


def as_trained(replies: list[str], codec: common.Codec, most: int) -> list[tuple[str, bool]]:
    """Replies as training cuts them to `most` tokens, and whether it does."""
    return [(codec.decode(common.Response(codec.cut_end(ids, most), [], True)), True)
            if len(ids) >= most else (reply, False)
            for reply, ids in zip(replies, codec.continuations(replies))]


def write_data(cfg: Config, folder: Path) -> None:
    """Replies to every prompt, ranked by the noisy labeller: train.jsonl and test.jsonl."""
    prompts = common.read_prompts(cfg.transcripts)[0]
    common.require(all(isinstance(p, str) for p in prompts),
                   f"{cfg.transcripts}: transcripts are text, not messages")
    turns = dict.fromkeys(map(first_turn, prompts))
    common.write_beside(folder.parent / "prompts.jsonl", (
        json.dumps({"prompt": [{"role": "user", "content": turn}]}) for turn in turns if turn))
    sampling = common.Config(
        model=cfg.model, prompts=str(folder.parent / "prompts.jsonl"), reward_model="gold",
        sources="generated", samples_per_prompt=cfg.replies, held_out=0.001, eval_prompts=0,
        max_prompt_tokens=128, temperature=cfg.temperature, out=str(folder.parent),
        max_response_tokens=cfg.max_response_tokens + 4)  # so that what was cut off is cut again
    base, truth = (common.Stage(name, common.content_hash(name), common.Cost(), lambda:
                                lambda *rows: list(map(gold, *rows[:3])))
                   for name in (cfg.model, "gold"))
    common.labelled_samples(sampling, base, truth)
    written = common.read_jsonl(folder.parent / "samples.jsonl")
    said = [(row["prompt"][-1]["content"], row["response"]) for _, row in written]
    said += first_replies(cfg.transcripts) if cfg.logged else []
    codec, rng, most = common.Codec(cfg.model, sampling), random.Random(0), cfg.max_response_tokens
    ranked: dict[str, list[tuple[float, str]]] = {}
    for (turn, reply), (seen, cut) in zip(said, as_trained([r for _, r in said], codec, most)):
        noise = -cfg.noise * math.log(-math.log(rng.random()))
        ranked.setdefault(turn, []).append((gold([{"content": turn}], seen, cut) + noise, reply))
    lines: dict[str, list[str]] = {"train": [], "test": []}
    for turn, rows in ranked.items():
        best_first = [reply for _, reply in sorted(rows, reverse=True) if reply.strip()]
        if turn and len(best_first) > 1:
            prompt = [{"role": "user", "content": turn}]
            split = "test" if common.is_held_out(prompt, cfg.held_out, 0) else "train"
            lines[split].append(json.dumps({"prompt": prompt, "ranked": best_first}))
    for split, texts in lines.items():
        common.write_beside(folder / f"{split}.jsonl", texts)
    common.write_beside(folder / "settings.txt", [data_settings(cfg)])


def data_settings(cfg: Config) -> str:
    """What the data hang on."""
    return json.dumps({name: getattr(cfg, name) for name in (
        "model", "transcripts", "replies", "logged", "held_out", "noise", "temperature",
        "max_response_tokens")})


def run(cfg: Config) -> list[str]:
    """Runs what is missing, each script in a process of its own; returns the runs' folders, one for
    each seed and method.

    The first seed's folder holds the reward model and the labelled samples, which all learn from.
    """
    out = Path(cfg.out)
    there = out / "data" / "settings.txt"
    common.require(not there.exists() or there.read_text().strip() == data_settings(cfg),
                   f"{out}: its replies are of other settings; take another --out")
    if not there.exists():
        write_data(cfg, out / "data")
    shared = ["--model", cfg.model, "--preferences", out / "data", "--sources", "dataset",
              "--max_prompt_tokens", 128, "--max_response_tokens", cfg.max_response_tokens,
              "--temperature", cfg.temperature, "--eval_prompts", cfg.eval_prompts,
              *([] if cfg.compile else ["--no_compile"])]
    first = out / f"seed{cfg.seeds[0]}"
    call(first, "reward_model.py", *shared, "--lr", cfg.rm_lr, "--batch_size", 16, "--seed",
         cfg.seeds[0])
    label(common.parse(common.Config, [*map(str, shared), "--seed", str(cfg.seeds[0]), "--out",
                                       str(first)]))
    known = dict(pair.split("=") for pair in cfg.steps if "=" in pair)
    steps = {**dict.fromkeys(SCRIPTS, next((n for n in cfg.steps if "=" not in n), None)),
             "ppo": 8, **known}
    runs = {}
    for seed in cfg.seeds:
        for method in cfg.methods if seed == cfg.seeds[0] else cfg.again:
            rates = (["--lr", cfg.ppo_lr, "--critic_lr", cfg.ppo_lr] if method == "ppo" else
                     ["--lr", cfg.lr, "--batch_size", cfg.batch_size])
            rates += ["--steps", steps[method]] if steps[method] else []
            rates += ["--reward_format", cfg.reward_format] if method == "dt" else []
            runs[out / f"seed{seed}-{method}"] = [
                *SCRIPTS[method], *shared, "--samples", first / "samples.jsonl", "--reward_model",
                first / "rm", *rates, "--seed", seed]
    if cfg.threads:
        os.environ["OMP_NUM_THREADS"] = str(cfg.threads)
    with ThreadPoolExecutor(cfg.jobs) as pool:
        list(pool.map(lambda item: call(item[0], *item[1]), runs.items()))
    return list(map(str, runs))


def label(cfg: common.Config) -> None:
    """The labelled samples of the run whose reward model is there."""
    base = common.base_policy(cfg)
    common.labelled_samples(cfg, base, reward_model.for_run(cfg, base))


def composition(folders: list[str]) -> list[dict]:
    """What each policy's replies are made of, over all seeds, and what its training took, on the
    first."""
    rows: dict[str, dict] = {}
    for name, having in boards(folders).items():
        said = [reply for folder, row in having for reply in replies(folder, row)]
        parts = [measures(r["prompt"][-1]["content"], r["response"], r["truncated"]) for r in said]
        mean = {part: float(np.mean([p[part] for p in parts])) for part in parts[0]}
        own = {column: float(np.mean([row[column] for _, row in having])) for column in
               ("reward", "perplexity", "kl_to_base", "response_tokens", "distinct_2")}
        rows[name] = {"policy": name, "reward z": f"{own['reward']:+.2f}",
                      "reading ease": f"{mean['ease']:.0f}",
                      "words a sentence": f"{mean['words a sentence']:.1f}",
                      "syllables a word": f"{mean['syllables a word']:.2f}",
                      **{f"{part} %": f"{100 * mean[part]:.0f}"
                         for part in ("unfinished", "short", "off the prompt")},
                      "perplexity": f"{own['perplexity']:.1f}", "KL": f"{own['kl_to_base']:.1f}",
                      "tokens": f"{own['response_tokens']:.0f}",
                      "distinct-2": f"{own['distinct_2']:.3f}",
                      "training s": f"{having[0][1]['train_seconds']:.0f}",
                      "training FLOPs": f"{having[0][1]['train_flops']:.1e}"}
    return list(rows.values())


def slope(folders: list[str], value: str) -> str:
    """How much more DT gives, in z or gold, for a z of one more that it is asked for; at the
    quantiles, by prompt."""
    found: dict[str, list[tuple[float, float]]] = {}
    for folder in folders:
        for name, row in leaderboard(folder).items():
            if name.startswith("dt target q") and "guidance" not in name:
                for reply in replies(folder, row):
                    got = reply["reward"] if value == "reward" else gold(
                        reply["prompt"], reply["response"], reply["truncated"])
                    points = found.setdefault(common.prompt_key(reply["prompt"]), [])
                    points.append((row["target"], got))
    each = np.array([np.polyfit(*zip(*points), 1)[0] for points in found.values()])
    return interval(float(each.mean()), each.std(ddof=1) / math.sqrt(len(each)))


def pictures(folders: list[str], found: dict[str, dict[str, list[dict]]], out: Path) -> None:
    """compute.svg and asked.svg: what was found of gold, and of reward, with 95 % intervals,
    against the training's FLOPs and against what DT was asked for."""
    if pyplot() is None:
        return
    rows = []
    for name, having in boards(folders).items():
        rows.append({**having[0][1], "seed": ", ".join(str(row["seed"]) for _, row in having)})
        for value in found:
            runs = found[value][name]
            mean, error, _ = difference(runs, [{prompt: 0.0 for run in runs for prompt in run}])
            rows[-1] |= {value: mean, f"{value}_error": 1.96 * error}
    asked = [row for row in rows if row["target"] is not None]
    at_the_top = [row for row in rows if row["target"] is None
                  or row["variant"].startswith("target q99")]
    units = {"train_flops": "FLOPs of the training alone"}
    common.write_beside(out / "compute.svg", [report.picture(
        lambda figure: report.draw_compute(figure, at_the_top, "gold", units))])
    if asked:
        common.write_beside(out / "asked.svg", [report.picture(
            lambda figure: report.draw_asked(figure, asked, list(found)))])


def interval(mean: float, error: float) -> str:
    """A mean and its 95 % interval."""
    return f"{mean:+.2f} [{mean - 1.96 * error:+.2f}, {mean + 1.96 * error:+.2f}]"


def main(cfg: Config) -> None:
    """Runs, prints and records the tables, and writes them into --out."""
    print(machine())
    folders = run(cfg)
    rewards = by_prompt(folders, lambda r: r["reward"])
    found = by_prompt(folders, lambda r: gold(r["prompt"], r["response"], r["truncated"]))
    golds, parts = table(found, "sft" if "sft" in cfg.methods else "base"), composition(folders)
    order = []
    for starts in (("dt target q99", "rwr"), ("dt target q99", "mle_filter keep 0.2"),
                   ("rwr", "mle_filter keep 0.2"), ("dt target q99", "ppo")):
        ours, theirs = (next((name for name in found if name.startswith(start)), None)
                        for start in starts)
        if ours and theirs:
            mean, error, _ = difference(found[ours], found[theirs])
            order.append(f"- {ours} − {theirs}: {interval(mean, error)}")
    first = Path(cfg.out) / f"seed{cfg.seeds[0]}"
    right = json.loads((first / "rm" / "run.json").read_text())["report"]
    lines = [f"Gold on held-out prompts; reward model right on {right['accuracy']:.3f} of held-out "
             f"pairs, longer wins {right['longer_wins']:.3f}", "", markdown(golds), "", *order, ""]
    if any(name.startswith("dt target q") for name in found):
        lines += [f"- slope of DT's reward z on the z asked for: {slope(folders, 'reward')}",
                  f"- slope of its gold: {slope(folders, 'gold')}", ""]
    lines.append(markdown(parts))
    print("\n".join(lines))
    common.write_beside(Path(cfg.out) / "table.md", lines)
    record("reading", golds + parts, str(Path(cfg.out) / "reading.jsonl"))
    pictures(folders, {"reward": rewards, "gold": found}, Path(cfg.out))


if __name__ == "__main__":
    start(main, Config)
