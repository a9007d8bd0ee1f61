"""How cost grows with ranks, sequence length and samples, and what a script's start takes.

    python benchmarks/scaling.py --model SMOLLM2

Each row is a run of mle_filter.py on made-up labelled samples, read off its metrics.jsonl and
run.json: tokens are response tokens, as it trains on them; the first two steps, which compile, are
left out.
"""
from __future__ import annotations

import functools
import json
import os
import random
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from measure import machine, markdown, record, seconds_of, start

import common
from common import flag

ROOT = Path(__file__).resolve().parent.parent
WORDS = ("the a of river small large otter lives eats plants meat and in what where how good "
         "help").split()


@dataclass
class Config:
    """What to vary, and from where."""
    model: str = flag(None, "folder or Hub id of a causal language model")
    ranks: list[int] = flag([1, 2], "processes, each with the cores' share of threads")
    lengths: list[int] = flag([1, 2, 4], "multiples of --words")
    samples: list[int] = flag([1, 2, 4, 8], "multiples of --rows")
    words: int = flag(60, "words of a response")
    rows: int = flag(10_000, "labelled samples")
    batch_size: int = flag(16, "sequences per optimiser step")
    steps: int = flag(8, "optimiser steps of a run; the first two are not counted")
    threads: int = flag(2, "CPU threads, shared out among the ranks")
    out: str = flag("runs/benchmarks/scaling.jsonl", "file that a line of results is added to")
    compile: bool = flag(True, "torch.compile our kernels")

    def __post_init__(self) -> None:
        common.require(bool(self.model), "give --model")
        common.require(self.steps > 6, "--steps: a median needs five counted steps, so at least 7")


def write_samples(path: Path, rows: int, words: int) -> None:
    """Labelled samples of made-up words, half of them as long as `words`, half of uneven length
    below that."""
    rng = random.Random(0)
    with open(path, "w") as file:
        for i in range(rows):
            length = words if i % 2 else rng.randrange(words // 2, words)
            text = " ".join(rng.choice(WORDS) for _ in range(length))
            file.write(json.dumps({"prompt": f"Human: {i}, {rng.choice(WORDS)}?", "response": text,
                                   "reward": rng.gauss(0, 1)}) + "\n")


def run(cfg: Config, folder: Path, ranks: int, sharding: str, length: int, samples: int) -> dict:
    """One run of mle_filter.py: tokens a second, step by step, and the peak memory of a rank's
    training."""
    words, rows = cfg.words * length, cfg.rows * samples
    file, out = folder / f"{words}-{rows}.jsonl", folder / f"{ranks}-{sharding}-{words}-{rows}"
    if not file.exists():
        write_samples(file, rows, words)
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    flags = ["--model", cfg.model, "--samples", file, "--out", out, "--keep", "1.0", "--steps",
             cfg.steps, "--batch_size", cfg.batch_size, "--eval_prompts", "1",
             "--max_prompt_tokens", "64", "--max_response_tokens", 2 * words, "--save_every", "0",
             "--sharding", sharding]
    threads = str(max(1, cfg.threads // ranks))
    subprocess.run([sys.executable, *(torchrun if ranks > 1 else []), str(ROOT / "mle_filter.py"),
                    *map(str, flags)], check=True, stdout=subprocess.DEVNULL,
                   env={**os.environ, "OMP_NUM_THREADS": threads})
    lines = [line for _, line in common.read_jsonl(out / "sft" / "metrics.jsonl")]
    rate = [b["tokens"] / (b["seconds"] - a["seconds"]) for a, b in zip(lines[1:], lines[2:])]
    cost = json.loads((out / "sft" / "run.json").read_text())["cost"]
    return {"ranks": ranks, "sharding": sharding if ranks > 1 else "", "words": words,
            "samples": rows, "samples file MB": f"{file.stat().st_size / 1e6:.0f}",
            "tokens/s": f"{np.median(rate):.0f} ({min(rate):.0f}–{max(rate):.0f})",
            "peak MiB a rank": f"{cost['peak_memory_bytes'] / 2**20:.0f}"}


def bytes_a_row(cfg: Config, folder: Path) -> dict:
    """What a labelled sample costs in memory and on disk, and how long it takes to be checked and
    tokenised."""
    file, rows = folder / "index.jsonl", 10 * cfg.rows
    write_samples(file, rows, 60)
    codec = common.Codec(cfg.model, common.Config(model=cfg.model, samples=str(file),
                                                  max_prompt_tokens=64, max_response_tokens=128))
    read = functools.partial(common.read_samples, fingerprint="", labelled_by=None, costs={})
    seconds, _ = seconds_of(read, str(file), set(), codec, folder / "tokens")
    held = sum(np.load(folder / "tokens" / f"{name}.npy").nbytes
               for name in ("labels", "offsets", "starts"))
    on_disk = sum(path.stat().st_size for path in (folder / "tokens").iterdir())
    return {"rows": rows, "file bytes a row": round(file.stat().st_size / rows),
            "tokens bytes a row": round(on_disk / rows), "memory bytes a row": round(held / rows),
            "microseconds a row, at start": f"{seconds / rows * 1e6:.0f}"}


def start_up(repeats: int = 7) -> dict:
    """Seconds of `dt.py --help`, and of importing torch and the argument parser alone, in turn."""
    bare = "import torch, transformers; from transformers import HfArgumentParser"
    seconds: dict[str, list[float]] = {"imports": [], "help": []}
    for _ in range(repeats):
        for name, command in (("imports", ["-c", bare]), ("help", [str(ROOT / "dt.py"), "--help"])):
            command = [sys.executable, *command]
            spent, _ = seconds_of(lambda command=command: subprocess.run(
                command, check=True, stdout=subprocess.DEVNULL))
            seconds[name].append(spent)
    beyond = np.array(seconds["help"]) - np.array(seconds["imports"])
    return {"dt.py --help s": f"{np.median(seconds['help']):.2f}",
            "imports alone s": f"{np.median(seconds['imports']):.2f}",
            "beyond s": f"{np.median(beyond):.2f} ({beyond.min():.2f}–{beyond.max():.2f})"}


def main(cfg: Config) -> None:
    """Varies one thing at a time, and prints a table of each."""
    print(machine())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        grid = dict.fromkeys([(r, kind, 1, 1) for r in cfg.ranks for kind in ("ddp", "fsdp")[:r]]
                             + [(1, "ddp", n, 1) for n in cfg.lengths] + [(1, "ddp", 1, n)
                                                                          for n in cfg.samples])
        runs = []
        for point in grid:
            runs.append(run(cfg, folder, *point))
            print(runs[-1], flush=True)
        others = [bytes_a_row(cfg, folder), start_up()]
    for rows in (runs, others[:1], others[1:]):
        print("\n" + markdown(rows))
    record("scaling", runs + others, cfg.out)


if __name__ == "__main__":
    start(main, Config)
