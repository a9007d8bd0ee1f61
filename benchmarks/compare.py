"""The paper's comparison, in the toy world: each method over several seeds, what it reaches and
what it costs.

    python benchmarks/compare.py                          # a quarter of an hour on 2 cores
    python benchmarks/compare.py --seeds 0 1 --out runs/quick
    python benchmarks/compare.py --mini --out runs/mini   # a test, not a result

Runs the scripts with their toy defaults, one folder per seed (finished stages are used again), and
writes table.md into --out.  The other benchmarks import from here what they share: command lines,
the machine's description, intervals, tables, files of rows, running the scripts.
"""
from __future__ import annotations

import contextlib
import functools
import importlib
import json
import math
import multiprocessing
import os
import platform
import re
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, Optional

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common
import dt
import mle_filter
import ppo_baseline
import reward_model
import rwr
from common import flag

METHODS = {"sft": ["mle_filter.py", "--keep", 1.0], "mle_filter": ["mle_filter.py"],
           "rwr": ["rwr.py"],
           "dt": ["dt.py", "--target", "q5", "q25", "q50", "q75", "q95", "q99"],
           "ppo": ["ppo_baseline.py"]}
UNITS = (("total_flops", "FLOPs", ".1e"), ("total_seconds", "seconds", ",.0f"))


@dataclass
class Config:
    """What to compare, and where to."""
    seeds: list[int] = flag([0, 1, 2, 3, 4], "random seeds: a world and a run of each method for "
                            "every one")
    out: str = flag("runs/compare", "folder of the runs and of table.md")
    mini: bool = flag(False, "a step or two of each method, on one seed: a test of this script")


# --------------------------------------------------------------------- what the benchmarks share


def start(main: Callable, kind: type) -> None:
    """Runs main(cfg), cfg of this kind from the command line; unusable input or a package that is
    missing becomes one line and status 2."""
    from transformers import HfArgumentParser
    about = (sys.modules[kind.__module__].__doc__ or "").split("\n\n")[0]
    parser = HfArgumentParser(kind, allow_abbrev=False, description=about)
    try:
        cfg, = parser.parse_args_into_dataclasses()
        common.quieten_libraries()
        torch.backends.cuda.enable_cudnn_sdp(False)  # as the scripts do
        main(cfg)
    except (common.BadInput, ModuleNotFoundError) as problem:
        print(f"{Path(sys.argv[0]).name}: {problem}", file=sys.stderr)
        sys.exit(2)


def machine() -> dict:
    """Date, commit, machine and versions that a measurement belongs to."""
    import transformers
    git = subprocess.run(["git", "-C", str(ROOT), "describe", "--always", "--dirty"],
                         capture_output=True, text=True)
    info = Path("/proc/cpuinfo")
    name = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return {"date": str(date.today()), "commit": git.stdout.strip(),
            "cpu": name[1] if name else platform.processor(), "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "torch": torch.__version__, "transformers": transformers.__version__}


# 97.5 % quantiles of Student's t at 1, 2, ... degrees of freedom
T_QUANTILE = [12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14,
              2.13]


def interval(values: Iterable[float]) -> tuple[float, float]:
    """Mean, and half of its 95 % interval by Student's t; NaN where there are too few values."""
    values = np.array(list(values), dtype=np.float64)
    if len(values) < 2:
        return float(values[0]) if len(values) else math.nan, math.nan
    t = T_QUANTILE[min(len(values) - 2, len(T_QUANTILE) - 1)]
    return float(values.mean()), float(t * values.std(ddof=1) / math.sqrt(len(values)))


def shown(values: Iterable[float], sign: str = "") -> str:
    """Mean ± half of the 95 % interval, with a plus where `sign` is "+"; "" where there is none."""
    mean, half = interval(values)
    if math.isnan(mean):
        return ""
    return f"{mean:{sign}.2f}" + ("" if math.isnan(half) else f" ± {half:.2f}")


def markdown(rows: list[dict[Any, Any]]) -> str:
    """Rows as a Markdown table; a cell is empty where a row lacks that key."""
    heads = list(dict.fromkeys(key for row in rows for key in row))
    cells = [heads, ["---"] * len(heads), *([row.get(head, "") for head in heads] for row in rows)]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in cells)


def read_rows(file: Path) -> list[dict]:
    """The rows of a JSONL file, if it exists; a line that a kill broke off is left out."""
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return [json.loads(line) for line in lines]


def append_rows(file: Path, rows: list[dict]) -> None:
    """Adds rows to a JSONL file."""
    with open(file, "a") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)


def train_each(train: Callable, cells: list, cfg: Any) -> Iterator[Any]:
    """What train(cell, cfg) returns for each cell, in order; --jobs at a time, each on one thread,
    in processes of their own if there are several."""
    if cfg.jobs == 1:
        yield from (train(cell, cfg) for cell in cells)
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(cfg.jobs, spawn, torch.set_num_threads, (1,)) as pool:
        yield from pool.map(train, cells, [cfg] * len(cells))


def run_script(folder: Path, script: str, *flags: object) -> None:
    """Runs one of the project's scripts into a folder, with what it prints in log.txt there.
    Raises BadInput if it fails."""
    folder.mkdir(parents=True, exist_ok=True)
    module, args = importlib.import_module(Path(script).stem), ["--out", str(folder), *flags]
    file = folder / "log.txt"
    try:
        with open(file, "a") as log, contextlib.redirect_stdout(log), \
                contextlib.redirect_stderr(log):
            common.launch(module.main, module.Config, list(map(str, args)))
    except SystemExit as stop:
        last = file.read_text().splitlines()[-1]
        raise common.BadInput(f"{script} failed: {last} (all of it: {file})") from stop


def shrink_toy_world() -> None:
    """For --mini: 150 preference pairs, short replies, one or two steps of training."""
    common.BASE_STEPS = 2
    common.TOY |= {"samples_per_prompt": 1, "max_response_tokens": 8, "eval_prompts": 8}
    for script in (reward_model, mle_filter, rwr, dt):
        script.TOY["steps"] = 2
    ppo_baseline.TOY |= {"steps": 1, "rollout_batch_size": 16, "batch_size": 8}
    toy_data = common.toy_data

    @functools.cache
    def first_pairs(out: str, seed: int) -> str:
        folder = toy_data(out, seed)
        for file in Path(folder).glob("*.jsonl"):
            common.write_beside(file, file.read_text().splitlines()[:150])
        return folder
    common.toy_data = first_pairs


def tiny_base(folder: str, texts: list[str], vocabulary: int = 400, seed: int = 0,
              template: Optional[str] = None, **shape: Any) -> common.Stage:
    """A Llama of random weights, of a tiny shape unless given another, and a tokenizer of these
    texts, saved in a folder."""
    from transformers import GPT2TokenizerFast, LlamaConfig, LlamaForCausalLM
    tokenizer = GPT2TokenizerFast().train_new_from_iterator(texts, vocabulary, show_progress=False)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    with torch.device(common.device()):
        LlamaForCausalLM(LlamaConfig(**{
            "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64,
            "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 8192,
            "eos_token_id": tokenizer.eos_token_id, **shape})).save_pretrained(folder)
    return common.Stage(folder, {"model": "random"})


# ------------------------------------------------------------------------------------ comparison


def run(cfg: Config) -> dict[str, list[dict]]:
    """Runs what is missing; returns the leaderboard rows of each method, in the seeds' order."""
    rows: dict[str, list[dict]] = {}
    for seed in cfg.seeds[:1] if cfg.mini else cfg.seeds:
        folder = Path(cfg.out) / f"{'mini' if cfg.mini else 'seed'}{seed}"
        for method, (script, *flags) in METHODS.items():
            print(f"seed {seed}, {method}", flush=True)
            run_script(folder, script, "--seed", seed, *flags)
        for row in read_rows(folder / "leaderboard.jsonl"):
            rows.setdefault(f"{row['algorithm']} {row['variant']}".strip(), []).append(row)
    return rows


def column(group: list[dict], name: str) -> np.ndarray:
    """One number of each seed's row."""
    return np.array([row[name] for row in group], dtype=np.float64)


def named(rows: dict[str, list[dict]], start: str) -> str:
    """The first policy whose name starts so."""
    return next(name for name in rows if name.startswith(start))


def table(rows: dict[str, list[dict]]) -> str:
    """Markdown: gold over the seeds, its difference from PPO's paired by seed, and costs."""
    ppo, lines = rows[named(rows, "ppo")], []
    for name in sorted(rows, key=lambda name: ["base", *METHODS].index(name.split()[0])):
        gold = column(rows[name], "gold")
        line = {"": name, "gold": shown(gold), "sd over seeds": f"{gold.std(ddof=1):.2f}"
                if len(gold) > 1 else "", "reward z": f"{column(rows[name], 'reward').mean():.2f}",
                "KL to base": f"{column(rows[name], 'kl_to_base').mean():.1f}",
                "gold − PPO's": shown(gold - column(ppo, "gold"), "+")}
        if name != "base":
            for unit, label, form in UNITS:
                spent, by_ppo = column(rows[name], unit).mean(), column(ppo, unit).mean()
                line[label] = f"{spent:{form}} ({spent / by_ppo:.2f})"
        lines.append(line)
    return markdown(lines)


def order(rows: dict[str, list[dict]]) -> list[str]:
    """The paper's order, DT > RWR > filtering > SFT, as paired differences of gold."""
    names = [named(rows, start) for start in ("dt target q99", "rwr", "mle_filter", "sft")]
    return [f"- {better} − {worse}: "
            f"{shown(column(rows[better], 'gold') - column(rows[worse], 'gold'), '+')}"
            for better, worse in zip(names, names[1:])]


def main(cfg: Config) -> None:
    """Runs the methods, prints and writes the table."""
    if cfg.mini:
        shrink_toy_world()
    rows = run(cfg)
    about = ", ".join(f"{name} {value}" for name, value in machine().items())
    lines = [f"{about}; seeds {', '.join(map(str, cfg.seeds))}: mean ± half of the 95 % interval; "
             "differences are paired by seed; costs include all that a method needs, in brackets "
             "as a share of PPO's.", "", table(rows), "", *order(rows)]
    common.write_beside(Path(cfg.out) / "table.md", lines)
    print("\n".join(lines))


if __name__ == "__main__":
    start(main, Config)
