"""What the benchmarks share: a start, contenders timed in turn, their medians and spread, a JSON
line that the README quotes."""
from __future__ import annotations

import functools
import gc
import importlib.metadata
import json
import math
import os
import platform
import signal
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

import common


def start(main: Callable, kind: type) -> None:
    """Runs main(cfg) on the command line; input that cannot be used becomes a line and a status."""
    try:
        cfg = common.parse(kind)
        common.quieten_libraries()
        torch.backends.cuda.enable_cudnn_sdp(False)  # as the scripts do
        if not getattr(cfg, "compile", True):
            torch.compiler.set_stance("force_eager")
        main(cfg)
    except common.BadInput as problem:
        print(f"{Path(sys.argv[0]).name}: {common.printable(problem)}", file=sys.stderr)
        sys.exit(2)


def machine() -> dict:
    """What the figures were taken on."""
    packages = {}
    for name in ("torch", "transformers", "trl", "liger_kernel", "cut_cross_entropy",
                 "quack_kernels"):
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pass
    cpu = Path("/proc/cpuinfo").read_text() if os.path.exists("/proc/cpuinfo") else ""
    model = next((line.split(":")[1].strip() for line in cpu.splitlines()
                  if line.startswith("model name")), platform.processor())
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"date": str(date.today()), "cpu": model, "cores": os.cpu_count(), "gpu": gpu,
            "bfloat16 in hardware": "avx512_bf16" in cpu,
            "threads": torch.get_num_threads(), **packages}


def call(folder: Path, script: str, *flags: object) -> None:
    """A script's run into a folder, in a process of its own; it talks into the folder's log."""
    print(f"{folder}: {script} {' '.join(map(str, flags))}", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "log.txt", "a") as log:
        done = subprocess.run([sys.executable, str(ROOT / script), "--out", str(folder),
                               *map(str, flags)], stdout=log, stderr=log)
    if done.returncode:
        sys.exit(f"{script} ended with status {done.returncode}: see {folder}/log.txt")


def synchronize() -> None:
    """Waits for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_of(call: Callable, *args: Any) -> tuple[float, Any]:
    """How long a call takes, its work on the GPU included; and its result."""
    synchronize()
    begin = time.perf_counter()
    result = call(*args)
    synchronize()
    return time.perf_counter() - begin, result


def median_seconds(call: Callable, repeats: int = 10) -> float:
    """The median of so many calls after a first one that compiles; on a GPU by its own clock."""
    call()
    if not torch.cuda.is_available():
        return float(np.median([seconds_of(call)[0] for _ in range(repeats)]))
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for begin, end in marks:
        begin.record()
        call()
        end.record()
    synchronize()
    return float(np.median([begin.elapsed_time(end) for begin, end in marks])) / 1000


@functools.cache
def gemm_rate(n: int) -> float:
    """FLOP/s of a large bfloat16 product."""
    a, b = (torch.randn(n, n, dtype=torch.bfloat16, device=common.device()) for _ in range(2))
    return 2 * n**3 / median_seconds(lambda: a @ b)


@functools.cache
def bandwidth(size: int) -> float:
    """Bytes/s of a large copy, read and written."""
    a, b = (torch.empty(size, dtype=torch.uint8, device=common.device()) for _ in range(2))
    return 2 * size / median_seconds(lambda: b.copy_(a))


def in_turn(contenders: dict[str, Callable],
            repeats: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Calls every contender once (that first call compiles, and is told apart), then each in turn
    `repeats` times.

    Each turn begins with another: who follows whom decides what is left in caches and heap.
    """
    first: dict[str, float] = {}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(repeats + 1):
        order = list(contenders)
        for name in order[turn % len(order):] + order[:turn % len(order)]:
            took, _ = seconds_of(contenders[name])
            if turn:
                seconds[name].append(took)
            else:
                first[name] = took
    return seconds, first


def ratio(seconds: dict[str, list[float]], theirs: str, ours: str) -> str:
    """How many times longer theirs takes than ours, turn by turn: median, least and most."""
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
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024


class TimeIsUp(BaseException):
    """A part has had its time; no `except Exception` on the way must swallow it."""


class Bench:
    """Measurements in parts that have a time limit each; rows go to a file as they come."""

    def __init__(self, minutes: float, out: str, mini: bool):
        self.out, self.mini, self.rows, self.part = out, mini, [], ""
        self.end = time.monotonic() + 60 * minutes
        Path(out).parent.mkdir(parents=True, exist_ok=True)

        def alarm(*_: Any) -> None:
            raise TimeIsUp
        signal.signal(signal.SIGALRM, alarm)

    def run(self, part: str, measures: Callable[[Bench], None], seconds: float) -> None:
        """One part: nothing begins after so many seconds; what has begun may overrun by half."""
        self.part, left = part, self.end - time.monotonic()
        self.until = time.monotonic() + min(seconds, left)
        signal.setitimer(signal.ITIMER_REAL, max(0.1, min(1.5 * seconds, left)))
        try:
            measures(self)
        except TimeIsUp:
            self.write("the rest", stopped="out of time")
        except Exception as problem:  # one part's trouble is not another's
            self.write("the rest", error=repr(problem)[:300])
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            self.clear()

    def measure(self, what: str, find: Callable[..., dict], *args: Any) -> None:
        """Writes what find(*args) returns, or what went wrong."""
        if time.monotonic() > self.until:
            return self.write(what, skipped="no time left")
        begin = time.monotonic()
        try:
            self.write(what, **find(*args), took_s=time.monotonic() - begin)
        except Exception as problem:
            self.write(what, error=f"{type(problem).__name__}: {problem}"[:300])
        self.clear()

    def clear(self) -> None:
        """Gives memory back."""
        gc.collect()
        torch.cuda.empty_cache()

    def write(self, what: str, **values: Any) -> None:
        """A row into the file, and on the screen."""
        row = {"part": self.part, "what": what, **{name: rounded(v) for name, v in values.items()}}
        self.rows.append(row)
        with open(self.out, "a") as file:
            file.write(json.dumps(row) + "\n")
        print(", ".join(f"{k} {v}" for k, v in row.items()), flush=True)

    def few(self, full: Any, mini: Any) -> Any:
        """A size, or --mini's."""
        return mini if self.mini else full


def rounded(value: Any) -> Any:
    """A number to four digits, as JSON has it."""
    if not isinstance(value, (float, torch.Tensor, np.floating)):
        return value
    return float(f"{float(value):.4g}") if math.isfinite(value) else str(float(value))


def record(benchmark: str, rows: list[dict], file: str) -> None:
    """Appends a line with the machine and all rows to a JSON-lines file."""
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    with open(file, "a") as f:
        f.write(json.dumps({"benchmark": benchmark, **machine(), "rows": rows}) + "\n")


@functools.cache
def pyplot() -> Any:
    """matplotlib.pyplot, which draws into files; where it is not installed None, and once a
    line."""
    try:
        import matplotlib
    except ImportError:
        print("the pictures need matplotlib: pip install matplotlib")
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt


def markdown(rows: list[dict[str, Any]]) -> str:
    """Rows as a Markdown table; a cell is empty where a row has not that key."""
    heads = list(dict.fromkeys(key for row in rows for key in row))
    lines = [heads, ["---"] * len(heads), *([str(row.get(h, "")) for h in heads] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
