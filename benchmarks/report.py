"""One HTML page about a run, without external files: table, curves, reward distributions,
conversations side by side.

    python benchmarks/report.py --out runs/toy                 # writes runs/toy/report.html

The pictures need matplotlib; without it the table and the conversations still come.
"""
from __future__ import annotations

import html
import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable

import numpy as np

import crossover_report
from measure import pyplot, start
from paired import comparable

import common
from common import flag

UNITS = {"total_flops": "FLOPs, with all that it needs", "total_seconds": "seconds"}
COLUMNS = {"gold": ".2f", "reward": "+.2f", "win_rate": ".2f", "kl_to_base": ".1f",
           "response_tokens": ".0f", "distinct_2": ".3f", "eos_rate": ".2f", "train_seconds": ".0f",
           "total_seconds": ".0f", "total_flops": ".1e"}
STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; text-align: right; white-space: nowrap;
         border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; }
h1 { overflow-wrap: anywhere; }
svg { width: 100%; height: auto; min-width: 36rem; }
article { border: 1px solid var(--line); border-radius: .5rem; padding: .5rem 1rem;
          margin: 1rem 0; }
.prompt { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--soft); padding: .5rem; }
.replies { display: grid; gap: .75rem;
           grid-template-columns: repeat(auto-fit, minmax(min(18rem, 100%), 1fr)); }
.replies p { margin: .2rem 0; white-space: pre-wrap; overflow-wrap: anywhere; }
small { opacity: .7; }
"""


@dataclass
class Config:
    """Which run, and how much of it."""
    out: str = flag("runs/toy", "the run's folder; report.html is written into it")
    crossover: str = flag("runs/crossover", "crossover.py's folder; its curves are shown, if there")
    conversations: int = flag(20, "held-out prompts that are shown with every policy's reply")


def text(value: Any) -> str:
    """A value as HTML text, its control characters shown as escapes."""
    return html.escape(common.printable(value))


def read(path: Path) -> list[dict]:
    """A file's rows; none where there is no file."""
    return [row for _, row in common.read_jsonl(path)] if path.exists() else []


def name_of(row: dict) -> str:
    """How a leaderboard row is called."""
    return f"{row['algorithm']} {row['variant']} (seed {row['seed']})".replace("  ", " ")


def table(rows: list[dict]) -> str:
    """The leaderboard."""
    shown = {c: form for c, form in COLUMNS.items() if any(r.get(c) is not None for r in rows)}
    head = "".join(f"<th>{c.replace('_', ' ')}</th>" for c in shown)
    body = "".join("<tr><td>" + text(name_of(r)) + "</td>"
                   + "".join(f"<td>{'–' if r.get(c) is None else format(r[c], form)}</td>"
                             for c, form in shown.items()) + "</tr>" for r in rows)
    return f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table>"


def picture(draw: Callable, height: float = 3.6) -> str:
    """What draw(figure) draws, as SVG in colours that serve dark and light pages; empty without
    matplotlib."""
    plt = pyplot()
    if plt is None:
        return ""
    grey = "#808080"
    with plt.rc_context({"text.color": grey, "axes.labelcolor": grey, "axes.edgecolor": grey,
                         "xtick.color": grey, "ytick.color": grey, "axes.grid": True,
                         "grid.alpha": 0.25, "legend.framealpha": 0,
                         "axes.prop_cycle": plt.cycler(color=plt.cm.tab20.colors),
                         "svg.hashsalt": "fixed", "legend.fontsize": 8}):
        figure = plt.figure(figsize=(10, height), layout="constrained")
        draw(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
        plt.close(figure)
    return buffer.getvalue()[buffer.getvalue().index("<svg"):]


def draw_compute(figure: Any, rows: list[dict], value: str, units: dict[str, str]) -> None:
    """Reward, with what error of it a row may have, against what a policy took, in each of the
    units."""
    for axis, (unit, label) in zip(figure.subplots(1, len(units), sharey=True, squeeze=False)[0],
                                   units.items()):
        for i, row in enumerate(r for r in rows if r["algorithm"] != "base"):
            axis.errorbar(row[unit], row[value], row.get(f"{value}_error", 0.0),
                          fmt="osD^vP*X"[i % 8], label=name_of(row))
        for row in rows:
            if row["algorithm"] == "base":
                axis.axhline(row[value], linestyle=":", color="#808080")
        axis.set_xlabel(label)
    figure.axes[0].set_ylabel(value)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right upper")


def draw_asked(figure: Any, rows: list[dict], values: list[str]) -> None:
    """What DT got of each of the values, with what error of it a row may have, against what it was
    asked for."""
    plain = sorted((r for r in rows if "guidance" not in r["variant"]), key=lambda r: r["target"])
    guided = [r for r in rows if "guidance" in r["variant"]]
    for axis, value in zip(figure.subplots(1, len(values), squeeze=False)[0], values):
        for shown, style, label in (plain, "o-", "DT"), (guided, "D", "guided"):
            axis.errorbar([r["target"] for r in shown], [r[value] for r in shown],
                          [r.get(f"{value}_error", 0.0) for r in shown], fmt=style, label=label)
        axis.set_xlabel("reward z asked for"), axis.set_ylabel(f"{value} obtained"), axis.legend()


def draw_curves(figure: Any, curves: dict[str, list[dict]]) -> None:
    """Each training's loss, or PPO's score, step by step."""
    for i, name in enumerate(curves):
        axis = figure.add_subplot(math.ceil(len(curves) / 3), 3, i + 1)
        value = "score" if "score" in curves[name][0] else "loss"
        axis.plot([s["step"] for s in curves[name]], [s[value] for s in curves[name]], linewidth=1)
        axis.set_title(name, fontsize=9), axis.set_xlabel("step"), axis.set_ylabel(value)


def draw_rewards(figure: Any, replies: dict[str, list[dict]]) -> None:
    """How the rewards of each policy's replies are spread."""
    axis = figure.subplots()
    for name, rows in replies.items():
        values = [r["reward"] for r in rows if r["reward"] is not None]
        if values:
            axis.hist(values, bins=np.linspace(-4, 4, 41), histtype="step", density=True,
                      label=name)
    axis.set_xlabel("reward z of held-out replies")
    figure.legend(loc="outside right upper")


def conversations(replies: dict[str, list[dict]], count: int) -> str:
    """The first prompts, with the reply of every policy that was asked it."""
    parts, asked = [], {name: {common.prompt_key(r["prompt"]): r for r in rows}
                        for name, rows in replies.items()}
    for key, first in list(next(iter(asked.values())).items())[:count]:
        prompt = first["prompt"] if isinstance(first["prompt"], str) else "\n".join(
            f"{m['role']}: {m['content']}" for m in first["prompt"])
        said = "".join(
            f"<div><b>{text(name)}</b> "
            f"<small>{'' if r['reward'] is None else format(r['reward'], '+.2f')}</small>"
            f"<p>{text(r['response'].strip())}{' …' if r['truncated'] else ''}</p></div>"
            for name, rows in asked.items() if (r := rows.get(key)))
        parts.append(f'<article><p class="prompt">{text(prompt.strip())}</p>'
                     f'<div class="replies">{said}</div></article>')
    return "".join(parts)


def main(cfg: Config) -> None:
    """Reads the run's files and writes report.html beside them."""
    folder = Path(cfg.out)
    rows, left_out = comparable(cfg.out)
    replies = {name_of(r): read(common.replies_file(folder, r["algorithm"], r["variant"],
                                                    r["seed"])) for r in rows}
    replies = {name: said for name, said in replies.items() if said}
    curves = {p.parent.name: read(p) for p in sorted(folder.glob("[!.]*/metrics.jsonl"))}
    cells = crossover_report.read(Path(cfg.crossover) / "results.jsonl")
    asked = [r for r in rows if r.get("target") is not None]
    known = [value for value in ("reward", "gold") if all(r.get(value) is not None for r in rows)]
    drawn = {"Reward against compute": known and picture(
                 lambda f: draw_compute(f, rows, known[-1], UNITS)),
             "Asked for and obtained": asked and known and picture(
                 lambda f: draw_asked(f, asked, known)),
             "Training": curves and picture(lambda f: draw_curves(f, curves),
                                            height=2.4 * math.ceil(len(curves) / 3)),
             "Rewards": "reward" in known and picture(lambda f: draw_rewards(f, replies)),
             **{f"Toy world: {caption}": crossover_report.of_axis(cells, x) and picture(
                 lambda f, x=x: crossover_report.draw(f, cells, x), height=4.4)
                for x, caption in crossover_report.CAPTIONS.items()},
             "What each said": replies and conversations(replies, cfg.conversations)}
    body = "".join(f'<section><h2>{head}</h2><div class="wide">{part}</div></section>'
                   for head, part in [("Policies", table(rows)), *drawn.items()] if part)
    common.write_beside(folder / "report.html", [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>{text(folder.name)}</title><style>{STYLE}</style></head>'
        f"<body><h1>{text(folder)}</h1>{body}</body></html>"])
    print(f"{folder / 'report.html'}: {len(rows)} policies, {len(curves)} trainings"
          + (f"; {left_out} rows of other data or settings are left out" if left_out else ""))


if __name__ == "__main__":
    start(main, Config)
