"""One HTML page about a run, without external files: the leaderboard, and what each policy said,
side by side.

    python benchmarks/report.py --out runs/toy                 # writes runs/toy/report.html
"""
from __future__ import annotations

import html
import re
from dataclasses import dataclass
from pathlib import Path

from compare import start

import common
from common import flag

COLUMNS = {"gold": ".2f", "reward": "+.2f", "win_rate": ".2f", "kl_to_base": ".1f",
           "response_tokens": ".0f", "eos_rate": ".2f", "train_seconds": ".0f",
           "total_seconds": ".0f", "total_flops": ".1e"}
STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; display: block; overflow-x: auto; }
td { padding: .25rem .7rem; border-bottom: 1px solid #8884; }
article { border: 1px solid #8884; padding: .5rem 1rem; margin: 1rem 0; }
.side { display: grid; gap: .75rem;
        grid-template-columns: repeat(auto-fit, minmax(min(18rem, 100%), 1fr)); }
p { white-space: pre-wrap; overflow-wrap: anywhere; }
"""


@dataclass
class Config:
    """Which run, and how much of it."""
    out: str = flag("runs/toy", "the run's folder; report.html is written into it")
    conversations: int = flag(20, "held-out prompts that are shown with every policy's reply")


def name_of(row: dict) -> str:
    """A leaderboard row's policy."""
    return f"{row['algorithm']} {row['variant']}".strip()


def table(rows: list[dict]) -> str:
    """The leaderboard."""
    lines = [["", *(name.replace("_", " ") for name in COLUMNS)]]
    for row in rows:
        lines.append([name_of(row), *("–" if row[name] is None else format(row[name], form)
                                      for name, form in COLUMNS.items())])
    cells = ("".join(f"<td>{html.escape(cell)}</td>" for cell in line) for line in lines)
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in cells) + "</table>"


def conversations(replies: dict[str, list[dict]], count: int) -> str:
    """The first prompts, with the reply of every policy."""
    parts = []
    for i, first in enumerate(next(iter(replies.values()))[:count]):
        prompt = first["prompt"] if isinstance(first["prompt"], str) else "\n".join(
            f"{m['role']}: {m['content']}" for m in first["prompt"])
        said = ""
        for name, rows in replies.items():
            reward = "" if rows[i]["reward"] is None else f" {rows[i]['reward']:+.2f}"
            cut = " …" if rows[i]["truncated"] else ""
            said += (f"<div><b>{html.escape(name)}</b>{reward}"
                     f"<p>{html.escape(rows[i]['response'].strip())}{cut}</p></div>")
        parts.append(f"<article><p>{html.escape(prompt.strip())}</p>"
                     f"<div class='side'>{said}</div></article>")
    return "\n".join(parts)


def main(cfg: Config) -> None:
    """Reads the run's files and writes report.html beside them."""
    folder = Path(cfg.out)
    board = folder / "leaderboard.jsonl"
    common.require(board.exists(), f"{board}: not there; train and evaluate something first")
    rows = [row for _, row in common.read_jsonl(board)]
    rows = [row for row in rows if row["comparable"] == rows[0]["comparable"]]  # the newest first
    replies = {}
    for row in rows:
        file = re.sub(r"[^\w.+-]+", "_", name_of(row)) + ".jsonl"  # as common.evaluate() names it
        replies[name_of(row)] = [r for _, r in common.read_jsonl(folder / "evaluation" / file)]
    common.write_beside(folder / "report.html", [
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{html.escape(cfg.out)}"
        f"</title><style>{STYLE}</style><h1>{html.escape(cfg.out)}</h1>", table(rows),
        "<h2>What each said</h2>", conversations(replies, cfg.conversations)])
    print(f"{folder / 'report.html'}: {len(rows)} policies")


if __name__ == "__main__":
    start(main, Config)
