"""A Markdown page about a run: the leaderboard, and what each policy replied.

    python benchmarks/report.py --out runs/toy                 # writes runs/toy/report.md
"""
from __future__ import annotations

import html
import re
from dataclasses import dataclass
from pathlib import Path

from compare import markdown, read_rows, start

import common
from common import flag

COLUMNS = {"gold": ".2f", "reward": "+.2f", "win_rate": ".2f", "kl_to_base": ".1f",
           "response_tokens": ".0f", "eos_rate": ".2f", "total_seconds": ".0f",
           "total_flops": ".1e"}
PROMPTS = 20  # held-out ones that are shown


@dataclass
class Config:
    """Which run."""
    out: str = flag("runs/toy", "the run's folder; report.md is written into it")


def number(value: float | None, form: str) -> str:
    """A number in this format; "" where it was not measured."""
    return "" if value is None else format(value, form)


def one_line(text: str) -> str:
    """Text that stays as it is in a Markdown table."""
    return html.escape(" ".join(text.split()), quote=False).replace("|", "\\|")


def main(cfg: Config) -> None:
    """Reads the run's files and writes report.md beside them."""
    folder = Path(cfg.out)
    rows = read_rows(folder / "leaderboard.jsonl")
    common.require(rows, f"{folder}/leaderboard.jsonl: not there; evaluate something first")
    board, replies = [], {}
    for row in rows:
        if row["comparable"] == rows[0]["comparable"]:  # the newest comes first
            name = f"{row['algorithm']} {row['variant']}".strip()
            board.append({"": name, **{key.replace("_", " "): number(row[key], form)
                                       for key, form in COLUMNS.items()}})
            file = re.sub(r"[^\w.+-]+", "_", name) + ".jsonl"  # as common.evaluate() names it
            replies[name] = read_rows(folder / "evaluation" / file)
    parts = [f"# {cfg.out}", markdown(board)]
    for same_prompt in list(zip(*replies.values()))[:PROMPTS]:
        prompt = same_prompt[0]["prompt"]
        if not isinstance(prompt, str):
            prompt = " ".join(f"{m['role']}: {m['content']}" for m in prompt)
        parts += [f"### {one_line(prompt)}", markdown([
            {"": name, "reward": number(reply["reward"], "+.2f"),
             "reply": one_line(reply["response"]) + " …" * reply["truncated"]}
            for name, reply in zip(replies, same_prompt)])]
    common.write_beside(folder / "report.md", ["\n\n".join(parts)])
    print(f"{folder}/report.md: {len(replies)} policies")


if __name__ == "__main__":
    start(main, Config)
