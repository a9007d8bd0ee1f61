"""Tables and pictures of crossover.py's results."""
from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from compare import T_QUANTILE
from measure import markdown, pyplot

import common


def read(file: Path) -> list[dict]:
    """Result rows; a line that a kill broke off is left out."""
    lines = file.read_text().splitlines() if file.exists() else []
    return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]


def by_seed(rows: list[dict], value: str, **where: Any) -> dict[int, float]:
    """A value of the rows that are so, by seed."""
    return {row["seed"]: row[value] for row in rows
            if value in row and all(row[name] == wanted for name, wanted in where.items())}


def interval(values: Any) -> tuple[float, float]:
    """Mean, and half of its 95 % interval by Student's t; NaN where it cannot be told."""
    values = np.array(list(values), dtype=np.float64)
    if len(values) < 2:
        return float(values.sum()) if len(values) else math.nan, math.nan
    t = T_QUANTILE[min(len(values) - 2, len(T_QUANTILE) - 1)]
    return float(values.mean()), float(t * values.std(ddof=1) / math.sqrt(len(values)))


def shown(values: Any, sign: str = "") -> str:
    """Mean ± half of the interval."""
    mean, half = interval(values)
    return "" if math.isnan(mean) else f"{mean:{sign}.2f}" + (
        "" if math.isnan(half) else f" ± {half:.2f}")


def paired(one: dict[int, float], other: dict[int, float]) -> list[float]:
    """Differences, seed by seed."""
    return [one[seed] - other[seed] for seed in one if seed in other]


def table(title: str, rows: list[dict], down: str, across: str, value: str = "gold",
          against: Any = None) -> str:
    """Markdown: a value over seeds; in brackets its change from the line where `down` is
    `against`."""
    columns = list(dict.fromkeys(r[across] for r in rows if value in r))
    lines, columns = [], sorted(columns) if across == "steps" else columns
    for here in sorted({r[down] for r in rows if value in r}):
        line = {down: here or ("none" if down == "setting" else here)}
        for column in columns:
            found = by_seed(rows, value, **{down: here, across: column})
            line[str(column)] = shown(found.values())
            if against is not None and here != against:
                plain = by_seed(rows, value, **{down: against, across: column})
                line[str(column)] += f" ({shown(paired(found, plain), '+')})"
        lines.append(line)
    return f"## {title}\n\n{markdown(lines)}" if lines else ""


def turns(rows: list[dict], x: str) -> str:
    """Where DT beats both filters by more than the interval, and where its slope rises."""
    def at(method: str, value: str = "gold") -> dict[int, dict[int, float]]:
        found = {v: by_seed(rows, value, method=method, **{x: v})
                 for v in sorted({r[x] for r in rows})}
        return {v: seeds for v, seeds in found.items() if seeds}
    lines, filters = [], (at("filter 0.2"), at("filter 0.05"))
    for method in "DT q99", "DT guided":
        ahead = {}
        for v, own in at(method).items():
            leads = [paired(own, f[v]) for f in filters if v in f]
            if leads:
                ahead[v] = all(mean > half for mean, half in map(interval, leads))
                least = min(leads, key=lambda lead: interval(lead)[0])
                lines.append(f"- {v:,} {x}: {method} − the better filter {shown(least, '+')}")
        first = next((v for i, v in enumerate(ahead) if all(list(ahead.values())[i:])), None)
        if ahead:
            lines.append(f"- **{method} " + (f"is ahead of both filters from {first:,} {x} on**"
                         if first else "does not end ahead of both filters**"))
    slopes = list(at("DT q99", "slope").items())
    rises = [(interval(paired(b[1], a[1]))[0], a, b) for a, b in zip(slopes, slopes[1:])]
    if rises:
        _, (low, before), (high, after) = max(rises, key=lambda rise: rise[0])
        lines.append(f"- DT's slope rises most from {low:,} to {high:,} {x}: "
                     f"{shown(before.values())} to {shown(after.values())}")
    return "\n".join(lines)


CAPTIONS = {"steps": "Gold, and how DT heeds its tag, by optimiser steps (10,000 samples)",
            "samples": "Gold, and how DT heeds its tag, by labelled samples (600 steps)"}
STYLES = {"DT q99": ("C3", "o-"), "DT guided": ("C1", "o-"), "DT q95": ("C3", ":"),
          "DT q50": ("C5", ":"), "DT q5": ("C4", ":"), "filter 0.2": ("C0", "s-"),
          "filter 0.05": ("C9", "s-"), "RWR": ("C2", "^-"), "SFT": ("C7", "--"),
          "random 0.2": ("C8", "--")}


def of_axis(rows: list[dict], axis: str) -> list[dict]:
    """An axis' rows; those that the axis of steps has already are taken from there."""
    found = [r for r in rows if r["axis"] == axis]
    if axis == "steps":
        return found
    at = {r["steps"] for r in found}
    return found + [r for r in rows if r["axis"] == "steps" and r["steps"] in at]


def draw(figure: Any, rows: list[dict], x: str) -> None:
    """Gold of each method, and DT's slope, with 95 % intervals, against x."""
    left, right = figure.subplots(1, 2, width_ratios=(2, 1))
    rows = of_axis(rows, x)
    ticks = sorted({r[x] for r in rows if r[x]})
    for axis, value, name in [(left, "gold", n) for n in STYLES] + [(right, "slope", "DT q99")]:
        at = sorted({r[x] for r in rows if r["method"] == name})
        if len(at) < 2:
            continue  # no line to draw
        mean, half = np.array([interval(by_seed(rows, value, method=name, **{x: v}).values())
                               for v in at]).T
        color, style = STYLES[name]
        axis.plot(at, mean, style, color=color, label=name, markersize=4)
        axis.fill_between(at, mean - half, mean + half, color=color, alpha=0.15)
    for axis, label in (left, "gold reward"), (right, "DT's slope: z got on z asked"):
        axis.set(ylabel=label, xlabel="optimiser steps" if x == "steps" else "labelled samples")
        axis.semilogx(), axis.grid(alpha=0.3)
        axis.set_xticks([], minor=True)
        axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks], fontsize=7)
    left.legend(fontsize=7, ncols=2)
    right.set_ylim(-0.1, 1.1)
    figure.supxlabel(CAPTIONS[x], fontsize=9)


def report(rows: list[dict], out: Path, assets: Path) -> None:
    """Writes table.md into `out`, the pictures into `assets`."""
    seeds = ", ".join(map(str, sorted({r["seed"] for r in rows})))
    parts = [f"{len(rows)} rows, seeds {seeds}; mean ± half of the 95 % interval over seeds; "
             "changes, in brackets, are paired by seed."]
    for x in CAPTIONS:
        here = of_axis(rows, x)
        parts += [table(f"Gold against {x}", here, x, "method"),
                  table(f"Reward z against {x}", here, x, "method", "z"),
                  table(f"DT's slope against {x}", here, x, "method", "slope"), turns(here, x)]
    for method in "DT q99", "DT guided", "RWR":
        here = [r for r in of_axis(rows, "levers") if r["method"] == method]
        parts += [table(f"{method}'s levers: {value} at each step count", here, "setting", "steps",
                        value, "") for value in ("gold", "slope")]
    noise = [r for r in of_axis(rows, "noise") if r["method"] not in ("SFT", "random 0.2")]
    for title, value in ("Gold", "gold"), ("DT's slope", "slope"), ("Pairs ordered right", "right"):
        parts.append(table(f"{title}, with noise in the labels", noise, "noise", "method", value))
    again = {r["method"] for r in rows if r["axis"] == "round 2"}
    second = [r for r in of_axis(rows, "round 2") if r["method"] in again]
    parts.append(table("A second round", second, "setting", "method", against=""))
    text = "\n\n".join(filter(None, parts))
    common.write_beside(out / "table.md", [text])
    print(text)
    plt = pyplot()
    for x in CAPTIONS if plt else ():
        if not any(r["method"] == "DT q99" for r in of_axis(rows, x)):
            continue
        figure = plt.figure(figsize=(11, 4.4), layout="constrained")
        draw(figure, rows, x)
        assets.mkdir(parents=True, exist_ok=True)
        figure.savefig(assets / f"crossover_{x}.png", dpi=110)
        plt.close(figure)
