"""One HTML page about a run, without external files: table, curves, reward distributions,
conversations side by side.

    python benchmarks/report.py --out runs/toy                 # writes runs/toy/report.html

The pictures need matplotlib; without it the table and the conversations still come.
"""
from __future__ import annotations

import html
import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable

import numpy as np

from compare import pyplot, start

import common
from common import flag

COLUMNS = {"gold": ".2f", "reward": "+.2f", "win_rate": ".2f", "kl_to_base": ".1f",
           "response_tokens": ".0f", "eos_rate": ".2f", "train_seconds": ".0f",
           "total_seconds": ".0f", "total_flops": ".1e"}
STYLE = """
:root { color-scheme: light dark; --line: #8884; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; }
svg { width: 100%; height: auto; min-width: 36rem; }
article { border: 1px solid var(--line); padding: .5rem 1rem; margin: 1rem 0; }
.replies { display: grid; gap: .75rem;
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
    heads = [name for name in COLUMNS if any(row[name] is not None for row in rows)]
    lines = [["", *(name.replace("_", " ") for name in heads)]]
    for row in rows:
        lines.append([name_of(row), *("–" if row[name] is None else format(row[name], COLUMNS[name])
                                      for name in heads)])
    cells = ("".join(f"<td>{html.escape(cell)}</td>" for cell in line) for line in lines)
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in cells) + "</table>"


def picture(draw: Callable, height: float = 3.6) -> str:
    """What draw(figure) draws, as SVG in colours for light and dark pages; "" without matplotlib.
    """
    plt, grey = pyplot(), "#808080"
    if plt is None:
        return ""
    with plt.rc_context({"text.color": grey, "axes.labelcolor": grey, "axes.edgecolor": grey,
                         "xtick.color": grey, "ytick.color": grey, "axes.grid": True,
                         "grid.alpha": 0.25, "legend.framealpha": 0, "legend.fontsize": 8}):
        figure = plt.figure(figsize=(10, height), layout="constrained")
        draw(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True)
        plt.close(figure)
    return buffer.getvalue()[buffer.getvalue().index("<svg"):]


def draw_compute(figure: Any, rows: list[dict], value: str) -> None:
    """Reward against what a policy took, with all that it needs."""
    for axis, unit in zip(figure.subplots(1, 2, sharey=True), ("total_flops", "total_seconds")):
        for i, row in enumerate(rows):
            if row["algorithm"] == "base":
                axis.axhline(row[value], linestyle=":", color="#808080")
            else:
                axis.plot(row[unit], row[value], "osD^vP*X"[i % 8], label=name_of(row))
        axis.set_xlabel(unit.replace("_", " "))
    figure.axes[0].set_ylabel(value)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right upper")


def draw_curves(figure: Any, curves: dict[str, list[dict]]) -> None:
    """Each training's loss, or PPO's score, step by step."""
    axes = figure.subplots(1, len(curves), squeeze=False)[0]
    for axis, (name, steps) in zip(axes, curves.items()):
        value = "score" if "score" in steps[0] else "loss"
        axis.plot([step["step"] for step in steps], [step[value] for step in steps], linewidth=1)
        axis.set(title=name, xlabel="step", ylabel=value)


def draw_rewards(figure: Any, replies: dict[str, list[dict]]) -> None:
    """How the rewards of each policy's replies are spread."""
    axis = figure.subplots()
    for name, rows in replies.items():
        axis.hist([row["reward"] for row in rows], bins=np.linspace(-4, 4, 41), histtype="step",
                  density=True, label=name)
    axis.set_xlabel("reward z of held-out replies")
    figure.legend(loc="outside right upper")


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
                     f'<div class="replies">{said}</div></article>')
    return "".join(parts)


def main(cfg: Config) -> None:
    """Reads the run's files and writes report.html beside them."""
    folder = Path(cfg.out)
    board = folder / "leaderboard.jsonl"
    common.require(board.exists(), f"{board}: not there; train and evaluate something first")
    rows = [row for _, row in common.read_jsonl(board)]
    rows = [row for row in rows if row["comparable"] == rows[0]["comparable"]]  # the newest first
    replies = {}
    for row in rows:
        file = re.sub(r"[^\w.+-]+", "_", name_of(row))  # as common.evaluate() calls it
        replies[name_of(row)] = [reply for _, reply in common.read_jsonl(
            folder / "evaluation" / f"{file}.jsonl")]
    curves = {path.parent.name: [step for _, step in common.read_jsonl(path)]
              for path in sorted(folder.glob("[!.]*/metrics.jsonl"))}
    known = [name for name in ("gold", "reward") if all(row[name] is not None for row in rows)]
    parts = {"Policies": table(rows),
             "Reward against compute": known and picture(
                 lambda figure: draw_compute(figure, rows, known[0])),
             "Training": curves and picture(lambda figure: draw_curves(figure, curves), 2.6),
             "Rewards": "reward" in known and picture(
                 lambda figure: draw_rewards(figure, replies)),
             "What each said": conversations(replies, cfg.conversations)}
    body = "".join(f'<section><h2>{head}</h2><div class="wide">{part}</div></section>'
                   for head, part in parts.items() if part)
    common.write_beside(folder / "report.html", [
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{cfg.out}</title>'
        f"<style>{STYLE}</style></head><body><h1>{html.escape(cfg.out)}</h1>{body}</body></html>"])
    print(f"{folder / 'report.html'}: {len(rows)} policies, {len(curves)} trainings")


if __name__ == "__main__":
    start(main, Config)
