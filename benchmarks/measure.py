"""What the benchmarks share: contenders timed in turn, their medians and spread, a JSON line that the README quotes."""
from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any, Callable

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def machine() -> dict:
    """What the figures were taken on."""
    packages = {}
    for name in ("torch", "transformers", "trl", "liger_kernel", "cut_cross_entropy"):
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pass
    cpu = Path("/proc/cpuinfo").read_text() if os.path.exists("/proc/cpuinfo") else ""
    model = next((line.split(":")[1].strip() for line in cpu.splitlines() if line.startswith("model name")),
                 platform.processor())
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"date": str(date.today()), "cpu": model, "cores": os.cpu_count(), "gpu": gpu,
            "bfloat16 in hardware": "avx512_bf16" in cpu,
            "threads": torch.get_num_threads(), **packages}


def call(folder: Path, script: str, *flags: object) -> None:
    """A script's run into a folder, in a process of its own; what it says goes into the folder's log."""
    print(f"{folder}: {script} {' '.join(map(str, flags))}", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "log.txt", "a") as log:
        done = subprocess.run([sys.executable, str(ROOT / script), "--out", str(folder), *map(str, flags)],
                              stdout=log, stderr=log)
    if done.returncode:
        sys.exit(f"{script} ended with status {done.returncode}: see {folder}/log.txt")


def synchronize() -> None:
    """Waits for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def in_turn(contenders: dict[str, Callable], repeats: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Calls every contender once (that first call compiles, and is told apart), then each in turn `repeats` times.

    Each turn begins with another contender: who follows whom decides what is left in the caches and in the heap.
    """
    first: dict[str, float] = {}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(repeats + 1):
        order = list(contenders)
        for name in order[turn % len(order):] + order[:turn % len(order)]:
            call = contenders[name]
            synchronize()
            start = time.perf_counter()
            call()
            synchronize()
            took = time.perf_counter() - start
            if turn:
                seconds[name].append(took)
            else:
                first[name] = took
    return seconds, first


def ratio(seconds: dict[str, list[float]], theirs: str, ours: str) -> str:
    """How many times longer theirs takes than ours, turn by turn: the median, and the least and the most."""
    each = np.array(seconds[theirs]) / np.array(seconds[ours])
    return f"{np.median(each):.2f} ({each.min():.2f}–{each.max():.2f})"


def memory_above(call: Callable) -> int:
    """Bytes that a call needs at its peak, beyond what is held before it."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def record(benchmark: str, rows: list[dict], file: str) -> None:
    """Appends a line with the machine and all rows to a JSON-lines file."""
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    with open(file, "a") as f:
        f.write(json.dumps({"benchmark": benchmark, **machine(), "rows": rows}) + "\n")


@functools.cache
def pyplot() -> Any:
    """matplotlib.pyplot, which draws into files; None, and once a line that says so, where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        print("the pictures need matplotlib: pip install matplotlib")
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt


def markdown(rows: list[dict[str, Any]]) -> str:
    """Rows of equal keys as a Markdown table."""
    heads = list(rows[0])
    lines = [heads, ["---"] * len(heads), *([str(row[h]) for h in heads] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
