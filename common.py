"""What every trainer here needs and no algorithm is about.

The sections, in reading order: process group, config, stages and files, tokenizer, data, batches, reading without
padding, models and optimiser, sampler, fused head loss, labelled samples, evaluation and leaderboard, metrics and
checkpoints, the toy world.

Terms: *policy*, the language model that is trained; *base policy*, what it starts from, and the reference of every KL;
*sample*, a row (prompt, response, reward); *z*, a reward standardised over the labelled samples; *response mask*, the
tokens that a loss is taken over.  Shapes: T tokens of sequences that lie end to end (in the sampler, B sequences of T
positions), N rows that predict a response token, D hidden width, V vocabulary.  A *prompt* is a string, or a list of
chat messages for the tokenizer's chat template.
"""
from __future__ import annotations

import contextlib
import functools
import gc
import gzip
import hashlib
import inspect
import json
import math
import os
import platform
import random
import re
import resource
import shutil
import sys
import tempfile
import time
import unicodedata
import warnings
import weakref
import zlib
from array import array
from collections import Counter
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, NamedTuple, Optional, Sequence

import numpy as np
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")  # trust the CPU's flags: probing them takes 10 s of a first run

import torch
import torch.distributed as dist
from tqdm import tqdm

# ------------------------------------------------------------------------------------------------- process group
# One process or torchrun's many: the same lines serve both.


class BadInput(Exception):
    """What the user gave cannot be used; the message is the one sentence that says so."""


def rank() -> int:
    """This process's number, 0 without torchrun."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """How many processes train together, 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", 1))


def device() -> torch.device:
    """This rank's GPU, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def print0(*args, **kwargs) -> None:
    """print, from rank 0 alone, and without control characters: data could command the terminal with them."""
    if rank() == 0:
        print(*map(printable, args), **kwargs, flush=True)


def printable(text: Any) -> str:
    """The text, its control characters shown as their escapes."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in str(text))


def name_rank() -> str:
    """Which rank speaks, where that is not the first."""
    return f"rank {rank()}: " if rank() else ""


def barrier() -> None:
    """Waits for all ranks."""
    if dist.is_initialized():
        dist.barrier()


def sum_over_ranks(*values: float) -> list[float]:
    """The values, each summed over all ranks, in float64."""
    return begin_sums(*values)()


def begin_sums(*values: float) -> Callable[[], list[float]]:
    """sum_over_ranks, begun: the call of what is returned waits for the sums, and on a GPU for nothing queued later."""
    total = torch.stack([torch.as_tensor(v, dtype=torch.float64, device=device()) for v in values])
    if dist.is_initialized():
        dist.all_reduce(total)
    total = total.to("cpu", non_blocking=True)
    arrived = torch.cuda.Event() if device().type == "cuda" else None
    if arrived:
        arrived.record()

    def wait() -> list[float]:
        if arrived:
            arrived.synchronize()
        return total.tolist()
    return wait


def gather_rows(mine: dict[int, Any], total: int) -> list:
    """Puts together rows that were dealt out to the ranks, each under its index, in order, on every rank."""
    shares: list = [mine]
    if dist.is_initialized():
        shares = [None] * world_size()
        dist.all_gather_object(shares, mine)
    found = {i: row for share in shares for i, row in share.items()}
    return [found[i] for i in range(total)]


def from_rank0(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    box = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(box, device=device())
    return box[0]


def progress(rows: Iterable, what: str, total: Optional[int] = None, unit: str = "it") -> tqdm:
    """A tqdm bar on rank 0 for what takes a second or more; where stderr is no terminal, a line every 15 s at most."""
    return tqdm(rows, desc=what, total=total, unit=unit, disable=rank() != 0, leave=False, dynamic_ncols=True, delay=1,
                mininterval=0.3 if sys.stderr.isatty() else 15)


def launch(main: Callable, kind: type, args: Optional[list[str]] = None) -> None:
    """Parses the command line as a `kind` of config, runs main(cfg) in a process group, and turns what goes wrong into
    one line and a status.

    Status 2: input that cannot be used, or a full disk.  130: Ctrl-C; finished stages stay for the next call.
    """
    script = Path(sys.argv[0]).name
    try:
        cfg = parse(kind, args)
        quieten_libraries()
        torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for each length, thus at each token of a sampler
        if world_size() > 1:
            if device().type == "cuda":
                torch.cuda.set_device(device())
            patience = timedelta(minutes=getattr(cfg, "patience", 10))
            dist.init_process_group("nccl" if device().type == "cuda" else "gloo", timeout=patience)
        if not getattr(cfg, "compile", True):
            torch.compiler.set_stance("force_eager")
        with locked(Path(cfg.out)) if isinstance(cfg, Config) and rank() == 0 else contextlib.nullcontext():
            main(cfg)
        if dist.is_initialized():
            gc.collect()  # sharded models are cycles that hold the group, whose threads must end before the process
            dist.destroy_process_group()  # not after an error: it could wait for ranks that wait for this one
    except BadInput as problem:
        print(f"{script}: {name_rank()}{printable(problem)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print0(f"\n{script}: interrupted; finished stages are kept, the same command goes on from them",
               file=sys.stderr)
        sys.exit(130)
    except Exception as problem:
        # safetensors and torch wrap a full disk in errors of their own, torch's zip writer without its name
        full = "No space left on device" in str(problem) or "inline_container" in str(problem)
        if not full and not (isinstance(problem, OSError) and problem.errno):
            raise
        where = getattr(problem, "filename", None) or cfg.out
        why = "No space left on device" if full else problem.strerror
        print(f"{script}: {name_rank()}{where}: {why}; what was there before is untouched", file=sys.stderr)
        sys.exit(2)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the run's folder; the system lets go of it however the process ends.  Raises BadInput naming the holder."""
    import fcntl
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as problem:
            file.seek(0)
            raise BadInput(f"{folder}: another run is at work there ({file.read().strip()})") from problem
        file.truncate(0)
        file.write(f"{Path(sys.argv[0]).name}, process {os.getpid()} on {platform.node()}, since "
                   f"{time.strftime('%Y-%m-%d %H:%M')}")
        file.flush()
        try:
            yield
        finally:
            if [path.name for path in folder.iterdir()] == [".lock"]:  # nothing came of it
                shutil.rmtree(folder)


def quieten_libraries() -> None:
    """Their bars and reports would drown the trainers' own lines; their errors stay."""
    from transformers.utils import logging
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process saves alone


def seed_everything(seed: int) -> None:
    """Seeds torch's generators, which initialise new weights; data and sampling carry generators of their own."""
    torch.manual_seed(seed)


# -------------------------------------------------------------------------------------------------------- config
# One dataclass holds the shared flags; each script inherits it and adds its algorithm's own.


class Help(str):
    """A flag's help text, which carries what HfArgumentParser has no field for: `toy` and `of`, see knob()."""
    toy: Any
    of: str


def knob(default: Any, help: str, toy: Any = None, of: str = "runtime") -> Any:
    """A flag: its default, its default in the toy world where that differs, and which stages hang on it.

    `of` is "data" (everything hangs on it), "samples", "training" (of the script's own model), "evaluation", or
    "runtime" (no stage hangs on it; the dtype changes rounding).
    """
    text = Help((help + ("" if toy is None else f" [toy world: {toy}]")).replace("%", "%%"))
    text.toy, text.of = toy, of
    kind = {"default_factory": lambda: list(default)} if isinstance(default, list) else {"default": default}
    return field(metadata={"help": text}, **kind)


@dataclass
class Config:
    """The flags that every script shares."""
    out: str = knob("runs/model", "the run's folder: stages are found there, or built", toy="runs/toy")
    model: Optional[str] = knob(None, "folder or Hub id of the base policy; without it the toy world runs", of="data")
    preferences: Optional[str] = knob(None, "Hub id, folder or .jsonl(.gz): chosen and rejected, or ranked", of="data")
    max_pairs: Optional[int] = knob(None, "train on at most so many preferences, pairs as a rule", of="data")
    held_out: float = knob(0.1, "share of the prompts held out for evaluation, where the data have no test split",
                           of="data")
    max_prompt_tokens: int = knob(1024, "longer prompts are cut on the left", toy=64, of="data")
    max_response_tokens: int = knob(1024, "longer responses are cut on the right, and then carry no EOS", toy=64,
                                    of="data")
    seed: int = knob(0, "of everything that is drawn", of="data")
    responses: Optional[str] = knob(None, ".jsonl(.gz) with prompt, response: label these, in place of --sources",
                                    of="samples")
    prompts: Optional[str] = knob(None, "generate for these: .jsonl(.gz) or folder with `prompt`", of="samples")
    samples: Optional[str] = knob(None, ".jsonl(.gz) with prompt, response, reward: train on these labelled samples",
                                  of="samples")
    reward_model: Optional[str] = knob(None, "folder of a sequence-classification model: score with it, train none",
                                       of="samples")
    sources: str = knob("dataset+generated", "which responses are labelled: dataset, generated or dataset+generated",
                        of="samples")
    samples_per_prompt: int = knob(1, "generated responses a prompt", toy=9, of="samples")
    temperature: float = knob(1.0, "of all sampling; 0 is greedy", of="samples")
    top_p: float = knob(1.0, "sample from the smallest set of tokens with this probability", of="samples")
    judge: Optional[str] = knob(None, "folder of a reward model that training never asks: its verdict is `gold`",
                                of="evaluation")
    eval_prompts: int = knob(256, "evaluate on so many held-out prompts, round and round if there are fewer; 0: not",
                             toy=512, of="evaluation")
    lr: float = knob(1e-5, "peak learning rate; 3 % warm-up, then cosine to 0", of="training")
    epochs: int = knob(1, "passes over the training examples", of="training")
    steps: Optional[int] = knob(None, "optimiser steps, in place of --epochs", of="training")
    batch_size: int = knob(128, "sequences per optimiser step, all ranks together", toy=32, of="training")
    micro_batch_tokens: int = knob(8192, "tokens that one forward may hold, or one row: the memory knob", toy=16384)
    dtype: str = knob("auto", "bf16 (weights stay float32), fp32, or auto: bf16 where the hardware has it", toy="fp32")
    compile: bool = knob(True, "torch.compile the loss kernels")
    sharding: str = knob("ddp", "ddp, or fsdp: weights, gradients and optimiser spread over the ranks (FSDP2)")
    save_every: Optional[int] = knob(None, "steps between checkpoints, of which the last two are kept: a tenth of the "
                                           "run, but no more than 500, unless told; 0 for none")
    resume: bool = knob(True, "go on from the last checkpoint, on a CPU bit for bit; --no_resume starts the stage "
                              "again")
    patience: int = knob(10, "minutes that a rank waits for another, one that saves a large model say, before all end")
    gradient_checkpointing: bool = knob(False, "recompute activations in backward: less memory, a third more compute")
    tensorboard: bool = knob(False, "write the metrics for TensorBoard too")

    def __post_init__(self) -> None:
        for name in ("max_prompt_tokens", "max_response_tokens", "samples_per_prompt", "lr", "epochs", "batch_size",
                     "micro_batch_tokens", "patience"):
            require(getattr(self, name) > 0, f"--{name} must be above 0, not {getattr(self, name)}")
        for name in ("max_pairs", "steps"):
            require(getattr(self, name) is None or getattr(self, name) > 0,
                    f"--{name} must be above 0, not {getattr(self, name)}")
        require(self.seed >= 0, f"--seed must be 0 or above, not {self.seed}")
        require(math.isfinite(self.lr), f"--lr must be a finite number, not {self.lr}")
        require(0 < self.held_out < 1, f"--held_out is a share between 0 and 1, not {self.held_out}")
        require(0 < self.top_p <= 1, f"--top_p is a probability above 0, not {self.top_p}")
        require(0 <= self.temperature < math.inf, f"--temperature must be 0 or above, not {self.temperature}")
        require(self.dtype in ("auto", "bf16", "fp32"), f"--dtype is auto, bf16 or fp32, not {self.dtype!r}")
        require(self.sharding in ("ddp", "fsdp"), f"--sharding is ddp or fsdp, not {self.sharding!r}")
        require(self.eval_prompts >= 0, f"--eval_prompts must be 0 or above, not {self.eval_prompts}")
        require(self.save_every is None or self.save_every >= 0,
                f"--save_every must be 0 or above, not {self.save_every}")
        require(self.sources in ("dataset", "generated", "dataset+generated"),
                f"--sources is dataset, generated or dataset+generated, not {self.sources!r}")
        require(not self.toy or not (self.samples or self.responses or self.prompts),
                "--samples, --responses and --prompts go with --model: name the base policy's folder or Hub id")
        require(self.toy or self.model, "--preferences goes with --model: name the base policy's folder or Hub id")
        require(self.toy or self.preferences or self.samples or (self.prompts or self.responses) and self.reward_model,
                "--model needs data: --preferences, or --samples, or --prompts or --responses with --reward_model")

    @property
    def toy(self) -> bool:
        """Whether the embedded toy world is meant."""
        return self.model is None and self.preferences is None


def require(condition: bool, otherwise: str) -> None:
    """Raises BadInput(otherwise) unless the condition holds."""
    if not condition:
        raise BadInput(otherwise)


def parse(kind: type, args: Optional[list[str]] = None) -> Any:
    """The command line as this kind of config, the world's defaults filled in.  Raises BadInput on a wrong flag."""
    from transformers import HfArgumentParser

    def wrong_flag(message: str) -> None:
        raise BadInput(message)
    about = sys.modules[kind.__module__].__doc__.split("\n\n")[0]
    parser = HfArgumentParser(kind, allow_abbrev=False, description=about)
    parser.error = wrong_flag
    args = sys.argv[1:] if args is None else args
    given = {a.split("=")[0] for a in args}
    if not given & {"--model", "--preferences"}:
        parser.set_defaults(**toy_defaults(kind))
    if "--epochs" in given:
        parser.set_defaults(steps=None)  # the toy world's steps would win
    cfg, unknown = parser.parse_args_into_dataclasses(args, return_remaining_strings=True)
    require(not unknown, f"unknown flag {' '.join(unknown)}; --help lists them all")
    return cfg


def toy_defaults(kind: type) -> dict:
    """The defaults that differ in the toy world, of this kind of config."""
    return {f.name: f.metadata["help"].toy for f in fields(kind) if f.metadata["help"].toy is not None}


def other_config(kind: type, cfg: Any, trained: dict) -> Any:
    """Another script's Config for the same run: cfg's shared flags, and `trained`'s or the default training flags."""
    shared = {f.name: getattr(cfg, f.name) for f in fields(Config) if f.metadata["help"].of != "training"}
    own = {f.name for f in fields(kind) if f.metadata["help"].of == "training"}
    default = toy_defaults(kind) if cfg.toy else {}
    return kind(**{**default, **shared, **{k: v for k, v in trained.items() if k in own}})


def compute_dtype(cfg: Config) -> torch.dtype:
    """The dtype of matrix products: bf16 where asked for, or where the hardware multiplies it natively."""
    if cfg.dtype == "auto":
        native = (torch.cuda.is_bf16_supported(including_emulation=False) if device().type == "cuda" else
                  torch.cpu._is_avx512_bf16_supported())
        return torch.bfloat16 if native else torch.float32
    return torch.bfloat16 if cfg.dtype == "bf16" else torch.float32


# ---------------------------------------------------------------------------------------------- stages and files
# A run is a chain of stages.  Each leaves a record (run.json) of the settings it was built from; a stage whose record
# matches is not built again.  Everything is written beside and renamed: a kill leaves the old or the new.


def settings(cfg: Config, *kinds: str, **more: Any) -> dict:
    """The flags of these kinds, and more, as a stage's record holds them; files stand as their fingerprints."""
    flags = {f.name: getattr(cfg, f.name) for f in fields(cfg) if f.metadata["help"].of in kinds}
    for name in ("model", "preferences", "responses", "prompts", "samples", "reward_model", "judge"):
        if flags.get(name):
            flags[name] = f"{flags[name]} {file_fingerprint(flags[name])}".strip()
    return {**flags, **more}


def file_fingerprint(path: str) -> str:
    """Of a file or folder: names, sizes, and each file's first and last megabyte, hashed; empty for a Hub id."""
    if not os.path.exists(path):
        return ""
    found = []
    for place in sorted(p for p in Path(path).rglob("*") if p.is_file()) if os.path.isdir(path) else [Path(path)]:
        with open(place, "rb") as file:
            start, size = file.read(2**20), place.stat().st_size
            file.seek(max(0, size - 2**20))
            found.append((place.name, size, hashlib.sha256(start + file.read()).hexdigest()))
    return fingerprint(found)


def fingerprint(what: Any) -> str:
    """Twelve hex digits of a JSON-able value."""
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:12]


def read_record(path: Path) -> dict:
    """A stage's record, {} where there is none."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def is_fresh(stage: str, record: Path, wanted: dict) -> bool:
    """Whether the stage was built with the wanted settings; says which it is, and what changed."""
    if record.name == "run.json":
        tidy(record.parent)
    built = read_record(record).get("settings")
    changed = [k for k in wanted if built and built.get(k) != json.loads(json.dumps(wanted[k]))]
    place = record.parent if record.name == "run.json" else record.with_suffix(".jsonl")
    if not built:
        print0(f"{stage}: {place}, to be built")
    elif changed:
        print0(f"{stage}: {place}, built again because of "
               + ", ".join(f"{k} ({built.get(k)} -> {wanted[k]})" for k in changed))
    else:
        print0(f"{stage}: {place}, from before")
    return bool(built) and not changed


@contextlib.contextmanager
def new_folder(path: Path, wanted: dict, resume: bool = True) -> Iterator[Path]:
    """Yields a folder beside `path` to write into, and renames it to `path` when all is written.

    Checkpoints that an earlier call with the same `wanted` settings left in it are kept, unless `resume` is false.
    """
    work, old = path.with_name(f".{path.name}.new"), path.with_name(f".{path.name}.old")
    if rank() == 0:
        if not resume or read_record(work / "started.json") != json.loads(json.dumps(wanted)):
            shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True, exist_ok=True)
    write_text(work / "started.json", [json.dumps(wanted)])
    try:
        yield work
    except BaseException:
        if rank() == 0 and not any(checkpoints_in(work)):
            shutil.rmtree(work, ignore_errors=True)
        raise
    barrier()
    if rank() == 0:
        shutil.rmtree(old, ignore_errors=True)
        if path.exists():
            path.rename(old)
        work.rename(path)
    tidy(path)


def tidy(path: Path) -> None:
    """Ends the replacement of a folder, wherever a kill may have broken it off."""
    old = path.with_name(f".{path.name}.old")
    if rank() == 0 and old.exists() and not path.exists():
        old.rename(path)
    if rank() == 0 and (path / "started.json").exists():
        shutil.rmtree(path / "checkpoints", ignore_errors=True)
        (path / "started.json").unlink()
    if rank() == 0 and path.exists():
        shutil.rmtree(old, ignore_errors=True)
    barrier()


def checkpoints_in(folder: Path) -> list[Path]:
    """A stage's checkpoints, the last first."""
    return sorted((folder / "checkpoints").glob("[0-9]*"), reverse=True)


def write_text(path: Path, lines: Iterable[str]) -> None:
    """Writes lines beside and renames, from rank 0 alone."""
    if rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.new")
        with open(beside, "w", encoding="utf-8") as f:
            f.writelines(line + "\n" for line in lines)
            f.flush()
            os.fsync(f.fileno())
        beside.replace(path)
    barrier()


def append(path: Path, size: int, lines: Iterable[str]) -> int:
    """Adds lines behind the first `size` bytes of a file, from rank 0 alone; returns the size then, there."""
    if rank() > 0:
        return size
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as file:
        file.truncate(size)
        file.writelines(line.encode() + b"\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())
        return file.tell()


def write_record(path: Path, wanted: dict, cost: Cost, **more: Any) -> None:
    """Writes a stage's record: settings, cost and what else belongs to it."""
    record = {"settings": wanted, "cost": asdict(cost), "torch": torch.__version__, "world_size": world_size(), **more}
    write_text(path, [json.dumps(record, indent=1)])


_spent = {"flops": 0.0, "generated_tokens": 0.0, "seconds": 0.0}  # by this rank; seconds: in runs that were resumed


@dataclass
class Cost:
    """What a stage took: seconds of the wall, seconds times ranks, FLOPs and sampled tokens of all ranks, and the
    largest rank's peak memory."""
    seconds: float = 0.0
    device_seconds: float = 0.0
    flops: float = 0.0
    generated_tokens: int = 0
    peak_memory_bytes: int = 0

    def __add__(self, other: Cost) -> Cost:
        sums = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(Cost)}
        return Cost(**{**sums, "peak_memory_bytes": max(self.peak_memory_bytes, other.peak_memory_bytes)})


def count_flops(model: torch.nn.Module, positions: int, pairs: int, head_rows: int, passes: int = 1) -> None:
    """Adds one call of a transformer to the ledger: new positions, pairs of them and what each attends to, head rows.

    Forward, a weight costs 2 FLOPs a position, and attention's two products 4 a layer, pair and unit of width; backward
    costs twice as much again (passes=3).  The input embedding is a look-up and costs nothing; the head costs only on
    the rows where it runs; masked pairs count like others.  (Kaplan et al. 2020, arXiv 2001.08361, section 2.1.)  What
    gradient checkpointing recomputes is not counted.
    """
    body, shape = model.base_model, model.config
    if not hasattr(model, "_body_parameters"):
        model._body_parameters = sum(p.numel() for p in body.parameters()) - body.get_input_embeddings().weight.numel()
    heads = getattr(shape, "num_attention_heads", 0)  # a model without attention has none
    width = heads * (getattr(shape, "head_dim", None) or shape.hidden_size // max(heads, 1))
    head = model.get_output_embeddings()
    _spent["flops"] += passes * (2 * model._body_parameters * positions
                                 + 4 * shape.num_hidden_layers * width * pairs
                                 + (2 * head.weight.numel() * head_rows if head is not None else 0))


@contextlib.contextmanager
def measured() -> Iterator[Cost]:
    """Yields a Cost that holds, when the block ends, what the block took."""
    cost, before, start = Cost(), dict(_spent), time.perf_counter()
    if device().type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        with contextlib.suppress(OSError):  # Linux alone can forget a process's peak; elsewhere it is the peak so far
            Path("/proc/self/clear_refs").write_text("5")
    yield cost
    cost.seconds = time.perf_counter() - start + _spent["seconds"] - before["seconds"]
    cost.flops, tokens, cost.device_seconds = sum_over_ranks(
        _spent["flops"] - before["flops"], _spent["generated_tokens"] - before["generated_tokens"], cost.seconds)
    cost.generated_tokens = round(tokens)
    mine = (torch.cuda.max_memory_allocated() if device().type == "cuda"
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    cost.peak_memory_bytes = int(max(gather_rows({rank(): mine}, world_size())))


# ----------------------------------------------------------------------------------------------------- tokenizer
# Prompt and response are encoded apart, so that the boundary between them is exact.  Special-token text inside data is
# data: only a chat template's own tokens and EOS at a response's end are special.

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# The same after each digit was set apart, as SmolLM2 does: there white space ends at a digit as at the text's end.
DIGITS_PATTERN = r"\p{N}|'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
PROBE = ("Hello  world,\n\n\n  it's 12345 o'clock…\tnaïve café 東京タワー привет שלום \U0001f468‍\U0001f469‍\U0001f467"
         "\U0001f3fd \r\n"
         "x  7  y   \n 3.14e-10 ½²³ <|endoftext|><|im_start|>user <s></s>[INST] don't WE'LL I'd   trailing   ",
         "    def f(x):\n        return x**2  # tabs\t\t!\n\n", "1 2  3   4    5 a1b22c333 ,,,...;;; ====---- ___",
         " ", "\n", "é", "")


def load_tokenizer(model: str) -> Any:
    """A Hugging Face tokenizer.  Raises BadInput where there is none, or none with an EOS token."""
    from transformers import AutoTokenizer
    with hub_errors(model, "a tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(model)
    require(tokenizer.eos_token_id is not None, f"{model}: its tokenizer has no EOS token, so no response could end")
    return tokenizer


@contextlib.contextmanager
def hub_errors(name: str, what: str) -> Iterator[None]:
    """transformers' own errors on a folder or Hub id, as one sentence."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as problem:
        why = str(problem).strip().split("\n")[0][:200]
        raise BadInput(f"{name}: not a folder or Hub id with {what} that transformers can load ({why})") from problem


@functools.lru_cache(maxsize=8)
def bulk_encoder(tokenizer: Any) -> Callable[[list[str]], list[list[int]]]:
    """The fastest encoder of plain texts with the tokenizer's own ids: tiktoken's if it proves equal, else its own."""
    def own(texts: list[str]) -> list[list[int]]:
        return tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True,
                         verbose=False)["input_ids"] if texts else []
    try:
        fast = _tiktoken_encoder(tokenizer, own)
        probe = [*PROBE, " ".join(token.content for token in tokenizer.added_tokens_decoder.values())]
        return fast if fast(probe) == own(probe) else own
    except (AttributeError, KeyError, ValueError, IndexError):
        return own  # no byte-level BPE


def _tiktoken_encoder(tokenizer: Any, own: Callable) -> Callable[[list[str]], list[list[int]]]:
    """tiktoken's encoder from a byte-level BPE tokenizer's merges.  Raises ValueError or KeyError for other kinds.

    Texts with a byte that the vocabulary lacks (SmolLM2 has not all control characters) are left to own().
    """
    import tiktoken
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    steps = spec["pre_tokenizer"].get("pretokenizers", [spec["pre_tokenizer"]])
    kinds = [s["type"] for s in steps]
    if kinds == ["ByteLevel"] and steps[0]["use_regex"]:
        pattern = GPT2_PATTERN
    elif kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"] and steps[1]["use_regex"]:
        pattern = DIGITS_PATTERN
    elif kinds == ["Split", "ByteLevel"] and steps[0]["behavior"] == "Isolated" and not steps[1]["use_regex"]:
        pattern = steps[0]["pattern"]["Regex"]
    else:
        raise ValueError(f"pre-tokenizer {kinds}")
    if spec["normalizer"] not in (None, {"type": "NFC"}) or any(s.get("add_prefix_space") for s in steps):
        raise ValueError("normalizer")
    byte_character = _byte_characters()
    to_byte = {char: byte for byte, char in byte_character.items()}
    tokens = [bytes([b]) for b in range(256)]
    for merge in spec["model"]["merges"]:
        left, right = merge if isinstance(merge, list) else merge.split(" ")
        tokens.append(bytes(to_byte[c] for c in left + right))
    ranks = {}
    for token in tokens:  # tiktoken merges by rank, which must be the order of the merges, whatever the tokens' ids
        ranks.setdefault(token, len(ranks))
    vocabulary = spec["model"]["vocab"]
    ids = [vocabulary.get("".join(byte_character[b] for b in token)) for token in ranks]
    encoding = tiktoken.Encoding("merges", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    normal = functools.partial(unicodedata.normalize, "NFC") if spec["normalizer"] else str

    def encode(texts: list[str]) -> list[list[int]]:
        rows = [[ids[t] for t in encoding.encode_ordinary(normal(text))] for text in texts]
        return [own([text])[0] if None in row else row for text, row in zip(texts, rows)]
    return encode


def _byte_characters() -> dict[int, str]:
    """GPT-2's printable character for each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {**{b: chr(b) for b in printable}, **{b: chr(256 + i) for i, b in enumerate(others)}}


_told_of_cuts: set[int] = set()


def encode_prompts(tokenizer: Any, prompts: list, max_tokens: int,
                   suffixes: Optional[list[str]] = None) -> list[list[int]]:
    """Prompts as token ids, BOS first where the tokenizer has one, cut on the left to `max_tokens`, then the suffixes.

    A string is encoded as plain text, chat messages through the chat template up to the reply.  The first time that
    some are cut it says how many.
    """
    encode = bulk_encoder(tokenizer)
    texts = iter(encode([p for p in prompts if isinstance(p, str)]))
    ids = [next(texts) if isinstance(p, str) else encode_chat(tokenizer, p) for p in prompts]
    bos = [t for t in tokenizer("")["input_ids"][:1] if t == tokenizer.bos_token_id]
    cut = sum(len(row) > max_tokens for row in ids)
    if cut and max_tokens not in _told_of_cuts:
        _told_of_cuts.add(max_tokens)  # PPO encodes prompts at each iteration
        print0(f"  {cut} of {len(ids)} prompts are longer than {max_tokens} tokens and were cut on the left")
    starts = [bos if isinstance(p, str) else [] for p in prompts]
    tails = encode(suffixes) if suffixes else [[]] * len(ids)
    return [start + row[-max_tokens:] + tail for start, row, tail in zip(starts, ids, tails)]


def encode_chat(tokenizer: Any, messages: list[dict]) -> list[int]:
    """Messages through the chat template, up to where the reply begins; special-token text in a message stays text."""
    from jinja2 import TemplateError  # transformers needs it for any chat template
    require(tokenizer.chat_template is not None, "the data are chat messages, but the tokenizer has no chat template")
    render = functools.partial(tokenizer.apply_chat_template, add_generation_prompt=True)
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    try:
        if not any(token in m["content"] for m in messages for token in special):
            return render(messages, return_dict=False)
        marked = [{**m, "content": f"\ue000{i}\ue001"} for i, m in enumerate(messages)]
        pieces = re.split("\ue000(\\d+)\ue001", render(marked, tokenize=False))
    except TemplateError as problem:
        raise BadInput(f"the tokenizer's chat template refuses a conversation: {problem}") from problem
    content, template = bulk_encoder(tokenizer), functools.partial(tokenizer, add_special_tokens=False)
    return [t for i, piece in enumerate(pieces)
            for t in (content([messages[int(piece)]["content"]])[0] if i % 2 else template(piece)["input_ids"])]


def encode_responses(tokenizer: Any, responses: list[str], max_tokens: int,
                     truncated: Optional[list[bool]] = None) -> list[list[int]]:
    """Responses as token ids, each ended by EOS unless it is longer than `max_tokens` or marked as broken off."""
    broken = truncated or [False] * len(responses)
    return [(ids if cut else [*ids, tokenizer.eos_token_id])[:max_tokens]
            for ids, cut in zip(bulk_encoder(tokenizer)(responses), broken)]


# ---------------------------------------------------------------------------------------------------------- data
# Preferences in four shapes: full transcripts (Anthropic's HH), prompt/chosen/rejected strings, chat messages, and
# prompt/ranked, a list of responses, best first.

TURN = "\n\nAssistant:"


class Ranking(NamedTuple):
    """A prompt and two responses or more, the one that people liked best first."""
    prompt: Any
    responses: tuple[str, ...]


def read_rows(path: str) -> Iterator[tuple[str, dict]]:
    """The rows of a .jsonl or .jsonl.gz, each with its place ("file, line 7").  Raises BadInput at a bad one."""
    for place, row, _ in locate_rows(path):
        yield place, row


def locate_rows(path: str) -> Iterator[tuple[str, dict, int]]:
    """read_rows, and where in the (unpacked) file each row begins."""
    opener = gzip.open if str(path).endswith(".gz") else open
    number, offset = 0, 0
    try:
        with opener(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                    require(isinstance(row, dict),
                            f"{path}, line {number}: not a JSON object but a {type(row).__name__}")
                    if b"\\u" in line:
                        json.dumps(row, ensure_ascii=False).encode()  # half a surrogate pair is no text
                    yield f"{path}, line {number}", row, offset
                offset += len(line)
    except UnicodeError as problem:
        raise BadInput(f"{path}, line {number}: not UTF-8 ({problem.reason})") from problem
    except (ValueError, RecursionError) as problem:
        raise BadInput(f"{path}, line {number}: not JSON ({problem})") from problem
    except (EOFError, gzip.BadGzipFile, zlib.error) as problem:
        raise BadInput(f"{path}, after line {number}: the gzip file is broken ({problem})") from problem
    except FileNotFoundError as problem:
        raise BadInput(f"{path}: no such file") from problem


def data_files(source: str) -> list[str]:
    """The data files of a file, a folder or a Hub data set (`owner/name`, or `owner/name/folder` for a part of it)."""
    if not os.path.exists(source) and re.fullmatch(r"[\w.-]+/[\w.-]+(/[\w./-]+)?", source) and ".jsonl" not in source:
        from huggingface_hub import snapshot_download
        owner, name, *part = source.split("/")
        with hub_errors(source, "a data set"):
            root = snapshot_download(f"{owner}/{name}", repo_type="dataset",
                                     allow_patterns=["*.jsonl", "*.jsonl.gz", "*.json.gz"])
        source = os.path.join(root, *part)
    if os.path.isdir(source):
        found = sorted(str(p) for p in Path(source).rglob("*") if p.name.endswith((".jsonl", ".jsonl.gz", ".json.gz")))
        require(bool(found), f"{source}: no .jsonl or .jsonl.gz file in this folder")
        return found
    require(os.path.exists(source), f"{source}: no such file, folder or Hub data set")
    return [source]


def field_of(place: str, row: dict, name: str, kinds: tuple = (str,), expected: str = "text") -> Any:
    """row[name], of one of these kinds.  Raises BadInput naming file, line and field."""
    require(name in row, f"{place}: the field {name!r} is missing")
    require(isinstance(row[name], kinds) and not isinstance(row[name], bool),
            f"{place}: the field {name!r} must be {expected}, found {type(row[name]).__name__}")
    return row[name]


def check_messages(place: str, name: str, messages: Any) -> None:
    """Raises BadInput unless it is a list of {"role", "content"} with text in both."""
    require(isinstance(messages, list) and len(messages) > 0 and
            all(isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
                for m in messages),
            f'{place}: the field {name!r} must be text or a list of {{"role", "content"}} messages')


def named(row: dict, *names: str) -> str:
    """The first of these names that the row has, the first of all if none: other tools call fields otherwise."""
    return next((name for name in names if name in row), names[0])


def prompt_of(place: str, row: dict) -> Any:
    """A row's prompt, checked: text that is not blank, or chat messages; under `input` as OpenRLHF has it."""
    name = named(row, "prompt", "input")
    prompt = field_of(place, row, name, (str, list), "text or chat messages")
    if isinstance(prompt, list):
        check_messages(place, name, prompt)
    require(not isinstance(prompt, str) or bool(prompt.strip()), f"{place}: the field {name!r} is empty")
    return prompt


def response_of(place: str, row: dict) -> str:
    """A row's response; under `completion`, text or one message, as TRL has it, or under `output` as OpenRLHF."""
    name = named(row, "response", "completion", "output")
    response = field_of(place, row, name, (str, list) if name == "completion" else (str,))
    if isinstance(response, str):
        return response
    check_messages(place, name, response)
    require(len(response) == 1, f"{place}: the field {name!r} must be one message, found {len(response)}")
    return response[0]["content"]


def conversation(place: str, row: dict, name: str) -> tuple[Any, str]:
    """One side of a preference row as (prompt, response); without a `prompt` field it must be a whole conversation."""
    value = field_of(place, row, name, (str, list), "text or chat messages")
    prompt = prompt_of(place, row) if "prompt" in row or "input" in row else None
    if isinstance(value, str) and prompt is not None:
        return prompt, value
    if isinstance(value, str):
        start, turn, response = value.rpartition(TURN)
        require(bool(turn), f"{place}: the field {name!r} has no {TURN!r}: without a `prompt` it must be a transcript")
        require(bool(start.strip()), f"{place}: the prompt of {name!r} is empty")
        return start + turn, response
    check_messages(place, name, value)
    if isinstance(prompt, list) and value[:len(prompt)] != prompt:
        value = prompt + value  # some data sets repeat the prompt's messages in each side, some do not
    require(value[-1]["role"] == "assistant" and len(value) > 1,
            f"{place}: the field {name!r} must end with the assistant's reply to something")
    return value[:-1], value[-1]["content"]


TEST_SPLIT = r"(^|[/_.-])(test|val|valid|validation|eval|evaluation)([/_.-]|\d|$)"


def load_preferences(cfg: Config) -> tuple[list[Ranking], list[Ranking]]:
    """Preferences for training and held out, split by prompt.  Those without two responses to compare are left out.

    Files and folders named test, val, valid, validation, eval or evaluation, or so and on (test-0001.jsonl), are the
    held-out split; without one, prompts are held out by hash and seed.
    """
    source = str(toy_data(cfg)) if cfg.toy else cfg.preferences
    return read_preferences(source, cfg.held_out, cfg.seed, cfg.max_pairs)


def ranking_of(place: str, row: dict) -> Optional[Ranking]:
    """A row's preference, checked; None if its sides differ in more than the last response."""
    if "ranked" in row:
        ranked = field_of(place, row, "ranked", (list,), "a list of responses, best first")
        require(len(ranked) > 1 and all(isinstance(text, str) for text in ranked),
                f"{place}: the field 'ranked' must be a list of two texts or more, best first")
        return Ranking(prompt_of(place, row), not_blank(ranked))
    (prompt, chosen), (other, rejected) = (conversation(place, row, side) for side in ("chosen", "rejected"))
    return Ranking(prompt, not_blank((chosen, rejected))) if prompt == other else None


def not_blank(responses: Iterable[str]) -> tuple[str, ...]:
    """The responses that say something."""
    return tuple(text for text in responses if text.strip())


@functools.lru_cache(maxsize=2)
def read_preferences(source: str, share: float, seed: int,
                     most: Optional[int]) -> tuple[list[Ranking], list[Ranking]]:
    """load_preferences, for one source; read once however many stages ask for it."""
    train, test, prompts_differ, blank = [], [], 0, 0
    files = data_files(source)
    root = os.path.commonpath([os.path.dirname(f) for f in files])
    is_test = {f: bool(re.search(TEST_SPLIT, os.path.relpath(f, root or "."))) for f in files}
    has_split = any(is_test.values()) and not all(is_test.values())
    for file in files:
        for place, row in read_rows(file):
            ranking = ranking_of(place, row)
            if ranking is None:
                prompts_differ += 1
            elif len(ranking.responses) < 2:
                blank += 1
            else:
                hidden = is_test[file] if has_split else is_held_out(ranking.prompt, share, seed)
                (test if hidden else train).append(ranking)
    seen = {prompt_key(p.prompt) for p in test}
    leaked = len(train) - len(train := [p for p in train if prompt_key(p.prompt) not in seen])
    for count, why in ((prompts_differ, "differ in more than the last response"), (blank, "have an empty response"),
                       (leaked, "have a prompt of the test split")):
        if count:
            print0(f"  {source}: {count} preferences {why}; left out")
    require(bool(train), f"{source}: no usable preference")
    require(bool(test), f"{source}: no preference is held out for evaluation; give more data or a larger --held_out")
    order = random.Random(seed)
    order.shuffle(train), order.shuffle(test)
    print0(f"  {source}: {len(train)} preferences to train on, {len(test)} held out, split by prompt")
    return train[:most], test


def prompt_key(prompt: Any) -> str:
    """A prompt as a string that identifies it."""
    return prompt if isinstance(prompt, str) else json.dumps(prompt)


def prompt_hash(prompt: Any) -> int:
    """64 bits that identify a prompt, where its text would take too much memory."""
    return int.from_bytes(hashlib.blake2b(prompt_key(prompt).encode(), digest_size=8).digest(), "big")


def is_held_out(prompt: Any, share: float, seed: int) -> bool:
    """Whether this prompt is held out; a matter of prompt and seed alone, so that all scripts agree."""
    return zlib.crc32(f"{seed} {prompt_key(prompt)}".encode()) / 2**32 < share


def read_prompts(source: str, wanted: Callable[[Any], bool]) -> list:
    """Distinct prompts that are wanted, in order, of rows that have a `prompt` or a transcript under `chosen`."""
    found = {}
    for file in data_files(source):
        for place, row in read_rows(file):
            prompt = conversation(place, row, "chosen")[0] if "chosen" in row else prompt_of(place, row)
            if wanted(prompt):
                found.setdefault(prompt_key(prompt), prompt)
    return list(found.values())


def split_prompts(cfg: Config, held_out: bool) -> list:
    """Distinct prompts, held out or not: of --prompts, of --preferences, or else of the --samples or --responses."""
    source = cfg.prompts or cfg.preferences or cfg.samples or cfg.responses
    if cfg.prompts or not (cfg.preferences or cfg.toy):
        found = read_prompts(source, lambda prompt: is_held_out(prompt, cfg.held_out, cfg.seed) == held_out)
    else:
        found = list({prompt_key(p.prompt): p.prompt for p in load_preferences(cfg)[held_out]}.values())
    require(bool(found) or (held_out and not cfg.eval_prompts),
            f"{source}: too few prompts to hold any out; give more or a larger --held_out")
    return found


# ------------------------------------------------------------------------------------------------------- batches
# The order of the data and the cut into optimiser steps come from the seed alone; ranks and micro-batches only share
# out the work of a step.


class Example(NamedTuple):
    """Token ids of prompt and response, which starts at `prompt_length`.

    `weight` is what each of its tokens counts in a step's denominator; in the numerator the kernel multiplies by it.
    `per_token` holds columns of numbers that each have one for each response token.
    """
    ids: list[int]
    prompt_length: int
    reward: float = 0.0
    weight: float = 1.0
    per_token: tuple = ()

    @property
    def response_tokens(self) -> int:
        return len(self.ids) - self.prompt_length


class Examples:
    """Examples of labelled samples, read and tokenised when a step asks for them: memory does not grow with their text.

    `rows` says which samples, `suffix(i)` what is written behind sample i's prompt, `reward` and `weight` hold its own.
    """

    def __init__(self, samples: Samples, tokenizer: Any, cfg: Config, rows: Optional[np.ndarray] = None,
                 suffix: Optional[Callable[[int], str]] = None, reward: Optional[np.ndarray] = None,
                 weight: Optional[np.ndarray] = None):
        self.samples, self.tokenizer, self.cfg = samples, tokenizer, cfg
        self.rows = np.arange(len(samples.rows)) if rows is None else rows
        self.suffix = suffix
        self.reward = np.zeros(len(samples.rows)) if reward is None else reward
        self.weight = np.ones(len(samples.rows)) if weight is None else weight

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Example:
        return self.__getitems__([i])[0]

    def __getitems__(self, indices: Iterable[int]) -> list[Example]:
        chosen = [int(self.rows[i]) for i in indices]
        samples = [self.samples.rows[i] for i in chosen]
        prompts = encode_prompts(self.tokenizer, [s.prompt for s in samples], self.cfg.max_prompt_tokens,
                                 [self.suffix(i) for i in chosen] if self.suffix else None)
        responses = encode_responses(self.tokenizer, [s.response for s in samples], self.cfg.max_response_tokens,
                                     [s.truncated for s in samples])
        return [Example(p + r, len(p), float(self.reward[i]), float(self.weight[i]))
                for i, p, r in zip(chosen, prompts, responses)]


@dataclass
class MicroBatch:
    """What one forward takes: sequences end to end, without padding; T tokens in all.

    Position t predicts token t + 1: there stand that token's target, mask and reward.
    """
    input_ids: torch.Tensor  # (T,) int64
    lengths: list[int]       # of the sequences
    targets: torch.Tensor    # (T,) int64; a sequence's last position has none, and holds anything
    mask: torch.Tensor       # (T,) bool, the response mask, EOS included
    reward: torch.Tensor     # (T,) float32, the sequence's reward at each position
    rows: torch.Tensor       # (N,) int64, where the mask is true
    per_token: list          # of (T,) float32, the examples' columns, 0 outside the mask


@dataclass
class Batch:
    """One optimiser step: this rank's micro-batches, and what the sum of their losses is divided by."""
    micros: list
    tokens: int         # response tokens, all ranks
    normaliser: float   # Σ weight * response tokens, over all ranks, / ranks: DDP averages gradients over ranks


def collate(examples: list[Example]) -> MicroBatch:
    """Examples as tensors, end to end; an example without response tokens adds no row."""
    lengths = [len(e.ids) for e in examples]
    ids = torch.tensor([token for e in examples for token in e.ids])        # (T,)
    mask = torch.zeros(len(ids), dtype=torch.bool)                          # (T,)
    columns = torch.zeros(len(examples[0].per_token), len(ids))             # (columns, T)
    end = 0
    for e in examples:
        start, end = end + e.prompt_length - 1, end + len(e.ids)
        mask[start:end - 1] = True
        for column, numbers in zip(columns, e.per_token):
            column[start:end - 1] = torch.as_tensor(numbers, dtype=torch.float32)
    reward = torch.tensor([e.reward for e in examples], dtype=torch.float32).repeat_interleave(torch.tensor(lengths))
    rows = mask.nonzero().squeeze(1)
    ids, *rest, columns = (t.to(device(), non_blocking=True) for t in (ids, ids.roll(-1), mask, reward, rows, columns))
    return MicroBatch(ids, lengths, *rest, list(columns))


def count_steps(examples: int, cfg: Config) -> int:
    """Optimiser steps of a run."""
    return cfg.steps or cfg.epochs * math.ceil(examples / cfg.batch_size)


def step_indices(examples: int, cfg: Config, first: int = 0) -> Iterator[tuple[int, list[int]]]:
    """The examples of each optimiser step from the `first` on, an epoch after the other in an order of its own."""
    per_epoch = math.ceil(examples / cfg.batch_size)
    for step in range(first, count_steps(examples, cfg)):
        if step == first or step % per_epoch == 0:
            order = np.random.default_rng((cfg.seed, step // per_epoch)).permutation(examples)
        start = step % per_epoch * cfg.batch_size
        yield step, order[start:start + cfg.batch_size].tolist()


def cut_by_tokens(lengths: list[int], budget: int, enough: float = math.inf) -> list[list[int]]:
    """Indices into lengths, longest first, cut so that rows * longest row <= budget, one row at least.

    For who pads: a group of `enough` tokens is cut off where the next row is a fifth shorter, and would be padding.
    """
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        rows, longest = (len(groups[-1]), lengths[groups[-1][0]]) if groups else (0, 0)
        if not groups or (rows + 1) * longest > budget or rows * longest >= enough and lengths[i] < 0.8 * longest:
            groups.append([])
        groups[-1].append(i)
    return groups


FORWARD_ONLY = 4  # times as many tokens where no activations are kept


def deal(lengths: list[int], budget: int) -> list[list[int]]:
    """This rank's micro-batches of a step.  All ranks get equally many: [] stands where one has nothing left to do."""
    by_length = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    hands = [by_length[r::world_size()] for r in range(world_size())]
    cuts = [[[hand[i] for i in group] for group in cut_by_tokens([lengths[i] for i in hand], budget)] for hand in hands]
    most = max(len(c) for c in cuts)
    return cuts[rank()] + [[]] * (most - len(cuts[rank()]))


def batches(examples: Examples | list[Example], cfg: Config, first: int = 0) -> Iterator[tuple[int, Batch]]:
    """The optimiser steps of a run, numbered, from the `first` on.

    A rank without work gets an example whose response is masked: it must not stop.
    """
    for at, indices in step_indices(len(examples), cfg, first):
        step = examples.__getitems__(indices) if isinstance(examples, Examples) else [examples[i] for i in indices]
        hands = deal([len(e.ids) for e in step], cfg.micro_batch_tokens)
        weight = sum(e.weight * e.response_tokens for e in step)
        yield at, Batch(micros=[collate([step[i] for i in hand] or [idle(step[0])]) for hand in hands],
                        tokens=sum(e.response_tokens for e in step),
                        normaliser=(weight if weight > 1e-20 else 1.0) / world_size())  # weights may vanish: no 0 / 0


def idle(example: Example) -> Example:
    """The example without its response: it takes part in a forward, and adds nothing."""
    return example._replace(prompt_length=len(example.ids), per_token=((),) * len(example.per_token))


def accumulate(policy: torch.nn.Module, micros: list) -> Iterator:
    """The micro-batches of a step.  DDP reduces gradients over ranks with the last one's backward alone; FSDP2 with
    each, as it could not hold them whole till then."""
    for i, micro in enumerate(micros):
        policy.require_backward_grad_sync = i == len(micros) - 1  # DDP's switch, read in forward
        yield micro


def print_plan(examples: int, cfg: Config) -> None:
    """The resolved arithmetic, before training."""
    steps = count_steps(examples, cfg)
    print0(f"  {examples:,} sequences; {steps} steps of {cfg.batch_size} over {world_size()} "
           f"rank(s), {steps / math.ceil(examples / cfg.batch_size):.2f} epochs; "
           f"at most {cfg.micro_batch_tokens:,} tokens a forward; "
           f"{str(compute_dtype(cfg)).removeprefix('torch.')} on {device()}")


# ---------------------------------------------------------------------------------------- reading without padding
# A micro-batch is one row of tokens, sequence behind sequence; attention alone must know where each begins.


def without_padding(model: Any) -> Any:
    """The model, made to read sequences that lie end to end, if on two short ones it proves to read each as if alone.

    A state-space layer, say, would carry one sequence's state into the next: such a model gets its sequences padded.
    So does a small one, to which padding costs less than a call of attention for each sequence.
    """
    before = model.config._attn_implementation
    if before != "sdpa" or getattr(model.config, "hidden_size", PADDED_BELOW) < PADDED_BELOW:
        return model
    register_attention()
    exact = model.device.type == "cpu" and model.dtype.itemsize > 2
    near = (1e-3, 1e-3) if exact else (0.1, 0.3)  # a bfloat16 SmolLM2 is 0.02 and 0.06 off, and 0.3 if it sees too much
    ids, lengths = torch.arange(24, device=model.device) * 1009 % model.config.vocab_size, [9, 15]  # 0.. are special
    small = next((p for p in model.parameters() if p.dim() == 1), model.get_input_embeddings().weight)
    with torch.enable_grad(), autocast(torch.bfloat16 if model.device.type == "cuda" else torch.float32):
        apart = hidden_states(model, ids, lengths)
        model.config._attn_implementation = END_TO_END
        try:
            together = hidden_states(model, ids, lengths)
            grads = [torch.autograd.grad(hidden[:, ::2].float().sum(), small)[0] for hidden in (apart, together)]
            proven = all((ours - theirs).norm() < much * theirs.norm()
                         for (ours, theirs), much in zip(((together, apart), reversed(grads)), near))
        except Exception:  # whatever the code of some other architecture raises
            proven = False
    if not proven:
        print0(f"  a {type(model).__name__} does not prove to read sequences end to end as if each were alone: padded")
    model.config._attn_implementation = END_TO_END if proven else before
    return model


PADDED_BELOW = 256  # hidden width; padded, the toy world's steps take an eighth less
END_TO_END = "end_to_end"  # what transformers calls attention(), below


@functools.cache
def register_attention() -> None:
    """Makes attention() known to transformers."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask
    AttentionInterface.register(END_TO_END, attention)
    AttentionMaskInterface.register(END_TO_END, sdpa_mask)


def attention(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
              attention_mask: Optional[torch.Tensor], scaling: Optional[float] = None, **more: Any) -> tuple:
    """torch's attention, (B, heads, T, D) -> (B, T, heads, D), but for two cases.

    A mask of integers holds the lengths of sequences that lie end to end (B = 1): each attends to itself alone.  One
    new token's query heads that share a key are read as so many positions of one head: torch would copy the whole cache
    for each.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    b, heads, t, width = query.shape
    if attention_mask is not None and attention_mask.dtype == torch.int64:
        return attend_apart(query, key, value, attention_mask.flatten().tolist(), scaling, more), None
    if t > 1 or heads == key.shape[1]:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **more)
    packed = query.reshape(b, key.shape[1], -1, width)                          # (B, key heads, heads a key, D)
    said = torch.nn.functional.scaled_dot_product_attention(packed, key, value, attention_mask, scale=scaling)
    return said.reshape(b, 1, heads, -1), None                                  # (B, 1, heads, D)


def attend_apart(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: list[int],
                 scaling: Optional[float], more: dict) -> torch.Tensor:
    """Causal attention within each sequence: (1, heads, T, D), T the sum of the lengths -> (1, T, heads, D)."""
    longest = max(lengths)
    window = more.get("sliding_window") or longest
    if query.device.type == "cuda" and value.dtype != torch.float32:
        from torch.nn.attention.varlen import varlen_attn
        group = query.shape[1] // key.shape[1]
        q, k, v = (x[0].transpose(0, 1).to(value.dtype) for x in (query, key, value))               # (T, heads, D)
        starts = cumulative(tuple(lengths), query.device)
        return varlen_attn(q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), starts, starts, longest,
                           longest, scale=scaling, window_size=(window - 1 if window < longest else -1, 0))[None]
    if value.is_cuda:  # in float32, of which its fast kernels know no grouped heads
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    said = []  # in float32 on a CPU, whose bfloat16 kernel takes up to twice as long for sequences of a few hundred
    wide = torch.float32 if value.device.type == "cpu" and value.dtype == torch.bfloat16 else value.dtype
    with torch.autocast(value.device.type, enabled=False):
        for q, k, v in zip(*(x.to(wide).split(lengths, dim=2) for x in (query, key, value))):       # (1, heads, t, D)
            t = q.shape[2]
            band = torch.ones(t, t, dtype=torch.bool, device=q.device).tril().triu(1 - window) if t > window else None
            said.append(torch.nn.functional.scaled_dot_product_attention(
                q, k, v, band, is_causal=band is None, scale=scaling, enable_gqa=True).transpose(1, 2))
    return torch.cat(said, dim=1).to(value.dtype)


@functools.lru_cache(maxsize=8)
def cumulative(lengths: tuple, where: torch.device) -> torch.Tensor:
    """Where sequences that lie end to end start, and the last one ends: int32 (S + 1,); the same for every layer."""
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(where, non_blocking=True)


def hidden_states(model: Any, ids: torch.Tensor, lengths: list[int], head_rows: int = 0,
                  passes: int = 1) -> torch.Tensor:
    """The body's last hidden states (T, D) of sequences end to end, ids (T,); counted, with the head's rows."""
    if model.config._attn_implementation == END_TO_END:
        count_flops(model, len(ids), sum(n * n for n in lengths), head_rows, passes)
        position = torch.cat([torch.arange(n) for n in lengths]).to(ids.device, non_blocking=True)
        return model.base_model(input_ids=ids[None], position_ids=position[None], use_cache=False,
                                attention_mask=torch.tensor(lengths)[None, None, None]).last_hidden_state[0]
    padded = torch.nn.utils.rnn.pad_sequence(ids.split(lengths), batch_first=True)  # on the right: needs no mask
    count_flops(model, padded.numel(), padded.numel() * max(lengths), head_rows, passes)
    hidden = model.base_model(input_ids=padded, use_cache=False).last_hidden_state                  # (S, longest, D)
    return torch.cat([row[:n] for row, n in zip(hidden, lengths)])


# ------------------------------------------------------------------------------------------ models and optimiser


def load_model(name: str, dtype: torch.dtype = torch.float32, where: Optional[torch.device] = None) -> Any:
    """A causal language model, on this rank's device unless told.  Raises BadInput if it is none, or its head is not
    served."""
    from transformers import AutoModelForCausalLM
    with hub_errors(name, "a causal language model"):
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, use_safetensors=True).to(where or device())
    prove_head(name, model)
    return without_padding(without_dropout(model)).eval()


def without_dropout(model: torch.nn.Module) -> torch.nn.Module:
    """The model, its dropout off: a gradient must not depend on how a batch is cut, and PPO's first ratio must be 1."""
    for module in model.modules():
        for name in ("p",) if isinstance(module, torch.nn.Dropout) else ("dropout", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model


def autocast(dtype: torch.dtype) -> Any:
    """Matrix products in this dtype, whatever the weights'; nothing to do for float32."""
    return torch.autocast(device().type, dtype, enabled=dtype != torch.float32)


class Policy(torch.nn.Module):
    """A causal language model whose forward ends in a fused loss, so that DDP's hooks fire round body and head."""

    def __init__(self, model: Any, cfg: Config):
        super().__init__()
        self.model, self.dtype = model, compute_dtype(cfg)
        if cfg.gradient_checkpointing:
            recompute_activations(model)

    def forward(self, micro: MicroBatch, kernel: Callable, *rows: torch.Tensor) -> torch.Tensor:
        """The kernel's loss, summed over the rows of the response mask: a float32 scalar.  `rows` are (T,)."""
        with autocast(self.dtype):
            hidden = hidden_states(self.model, micro.input_ids, micro.lengths, len(micro.rows), passes=3)   # (T, D)
            return head_loss(kernel, hidden[micro.rows], self.model, *(r[micro.rows] for r in rows))        # (N, ...)


def load_policy(name: str, cfg: Config) -> Any:
    """The policy to train, with float32 weights, wrapped by DDP under torchrun."""
    model = read_once(functools.partial(load_model, name), cfg)
    check_lengths(name, model, cfg)
    return distributed(Policy(model.train(), cfg), cfg)


def recompute_activations(model: Any) -> None:
    """Backward computes the blocks' activations again, so that forward need not keep them."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable  # < 5.24
    enable({"use_reentrant": False})


def load_sampler(name: str, cfg: Config, trained: bool = False) -> tuple[Any, Any]:
    """A policy to sample from, in the compute dtype, and its tokenizer, whose EOS ends a response.

    A policy that is to be `trained` too has float32 weights.
    """
    model = read_once(functools.partial(load_model, name), cfg) if trained else load_model(name, compute_dtype(cfg))
    tokenizer = load_tokenizer(name)
    check_lengths(name, model, cfg)
    model.config.eos_token_id = tokenizer.eos_token_id
    return model, tokenizer


def check_lengths(name: str, model: Any, cfg: Config) -> None:
    """Raises BadInput if prompt and response together are longer than the model can read."""
    most = getattr(model.config, "max_position_embeddings", None)
    require(not most or cfg.max_prompt_tokens + cfg.max_response_tokens <= most,
            f"{name} reads at most {most} tokens: lower --max_prompt_tokens and --max_response_tokens to that in sum")


def is_sharded(cfg: Config) -> bool:
    """Whether training spreads its models over ranks."""
    return cfg.sharding == "fsdp" and world_size() > 1


def read_once(load: Callable, cfg: Config) -> Any:
    """load(where=), on this rank's device; if it is to be sharded, on rank 0's CPU alone, and hollow on other ranks.

    A hollow model's memory is never touched before sharding, so that a node holds the whole weights once.
    """
    if not is_sharded(cfg):
        return load(where=device())
    model = load(where=torch.device("cpu")) if rank() == 0 else None
    shape = from_rank0((type(model), model.config) if rank() == 0 else None)
    if rank() > 0:
        model = without_dropout(hollow(*shape).to_empty(device="cpu"))
        model.tie_weights()
    return model


def hollow(kind: type, config: Any) -> Any:
    """A model of this class and shape whose weights take no memory."""
    register_attention()
    with torch.device("meta"):
        return kind(config)


def distributed(model: torch.nn.Module, cfg: Config, *methods: str) -> torch.nn.Module:
    """The model under DDP or FSDP2 where there are several ranks; `methods` compute with its weights beside forward."""
    if is_sharded(cfg):
        return sharded(model, compute_dtype(cfg), methods)
    if world_size() == 1:
        return model
    return torch.nn.parallel.DistributedDataParallel(model, device_ids=[device()] if device().type == "cuda" else None,
                                                     gradient_as_bucket_view=True)  # else gradients are held twice


def sharded(model: torch.nn.Module, dtype: torch.dtype, methods: tuple) -> torch.nn.Module:
    """The model under FSDP2, each transformer block by itself, with rank 0's weights.

    Weights are kept, and gradients reduced, in float32; blocks are gathered in `dtype` for as long as they compute.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
    weights = model.state_dict() if rank() == 0 else {}
    precision = {"param_dtype": None if dtype == torch.float32 else dtype, "reduce_dtype": torch.float32}
    mesh = init_device_mesh(device().type, (world_size(),))
    blocks = {name for part in model.modules() for name in getattr(part, "_no_split_modules", None) or ()}
    for part in [part for part in model.modules() if type(part).__name__ in blocks]:
        fully_shard(part, mesh=mesh, mp_policy=MixedPrecisionPolicy(**precision))
    # the root holds embedding and head, which the fused loss reads; its inputs, rewards too, stay as they are
    fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(**precision, cast_forward_inputs=False))
    set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    for buffer in model.buffers():
        dist.broadcast(buffer, 0)
    for method in methods:
        register_fsdp_forward_method(model, method)
    return model


@torch.no_grad()
def gathered(model: Any, dtype: torch.dtype, where: torch.device, keep: bool = True) -> Any:
    """A sharded model, whole again on this rank (None unless `keep`); all ranks must call it together."""
    from torch.distributed.tensor import DTensor
    weights = {}
    for name, weight in model.named_parameters():
        weight = (weight.full_tensor() if isinstance(weight, DTensor) else weight).to(where, dtype)
        if keep:
            weights[name] = weight
    if not keep:
        return None
    whole = hollow(type(model), model.config)
    whole.load_state_dict(weights, strict=False, assign=True)  # a tied head has no entry of its own
    whole.tie_weights()
    for (name, buffer), old in zip(list(whole.named_buffers()), model.buffers()):
        part, _, last = name.rpartition(".")
        setattr(whole.get_submodule(part), last, old.to(where))
    return without_dropout(whole).eval()


def make_optimizer(model: torch.nn.Module, cfg: Config, steps: int) -> tuple[Any, Any]:
    """AdamW with decay on matrices only, and its schedule: 3 % warm-up, then cosine to 0."""
    from transformers import get_cosine_schedule_with_warmup
    weights = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in weights if p.dim() >= 2], "weight_decay": 0.1},
              {"params": [p for p in weights if p.dim() < 2], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, 0.99), fused=True)
    return optimizer, get_cosine_schedule_with_warmup(optimizer, max(1, round(0.03 * steps)), steps)


def update(modules: Iterable[torch.nn.Module], optimizer: Any, schedule: Any, loss: torch.Tensor) -> torch.Tensor:
    """Clips each module's gradient at norm 1, steps, and returns the first one's norm.

    Where loss or gradient is not finite, on any rank, no rank's weights and moments move, and NaN is returned.
    """
    norms = [torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0) for module in modules]
    norms = torch.stack([norm.full_tensor() if hasattr(norm, "full_tensor") else norm for norm in norms])
    bad = (~(norms.isfinite().all() & loss.isfinite())).float()
    if dist.is_initialized():
        dist.all_reduce(bad, dist.ReduceOp.MAX)
    optimizer.found_inf = bad  # the fused step looks at it on the device, so that nothing waits
    optimizer.step(), schedule.step(), optimizer.zero_grad()
    return torch.where(bad > 0, math.nan, norms[0])


def save_folder(folder: Path, model: Any, tokenizer: Any, cfg: Config, card: str) -> None:
    """Writes model, tokenizer and model card as a Hugging Face folder, in the compute dtype."""
    if is_sharded(cfg):
        model = gathered(model, compute_dtype(cfg), torch.device("cpu"), keep=rank() == 0)
    if rank() == 0:
        model.config.eos_token_id = tokenizer.eos_token_id
        if getattr(model, "generation_config", None):
            model.generation_config.eos_token_id = tokenizer.eos_token_id  # what it learnt to end a response with
        model.eval().to(compute_dtype(cfg)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "README.md").write_text(card, encoding="utf-8")
    barrier()


def save_policy(folder: Path, policy: torch.nn.Module, tokenizer: Any, cfg: Config, about: str, tag: str = "") -> None:
    """Writes the policy's folder; its model card opens with `about`, and shows what is written behind a prompt."""
    tail = f" + tokenizer({tag!r}, add_special_tokens=False).input_ids" if tag else ""
    card = MODEL_CARD.format(about=about, tag=tail)
    save_folder(folder, getattr(policy, "module", policy).model, tokenizer, cfg, card)


MODEL_CARD = """# An aligned policy

{about}

Sampling by transformers alone:

```python
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = (kind.from_pretrained("this folder") for kind in (AutoModelForCausalLM, AutoTokenizer))
ids = tokenizer(prompt).input_ids{tag}
# of chat messages: ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
print(tokenizer.decode(model.generate(torch.tensor([ids]), do_sample=True, max_new_tokens=128)[0]))
```
"""


def trained(cfg: Config, algorithm: str, road: Road, train: Callable, *kinds: str, **more: Any) -> tuple[str, Cost]:
    """The algorithm's folder and cost: from before, or trained now by train(cfg, base, samples, folder).

    What the result hangs on, beside training flags, base policy and samples: other `kinds` of flags, and `more`.
    """
    folder = Path(cfg.out) / algorithm
    wanted = settings(cfg, "training", *kinds, seed=cfg.seed, max_prompt_tokens=cfg.max_prompt_tokens,
                      max_response_tokens=cfg.max_response_tokens, base=policy_fingerprint(road.base),
                      samples=road.samples.fingerprint, **more)
    if not is_fresh(algorithm, folder / "run.json", wanted):
        seed_everything(cfg.seed)
        with new_folder(folder, wanted, cfg.resume) as work:
            with measured() as cost:
                told = train(cfg, road.base, road.samples, work)
            gc.collect()  # a sharded model is full of cycles, and evaluation needs the memory
            write_record(work / "run.json", wanted, cost, **(told or {}))
    return str(folder), Cost(**read_record(folder / "run.json")["cost"])


# ------------------------------------------------------------------------------------------------------- sampler


class Response(NamedTuple):
    """A sampled response: token ids (EOS included where it came), their log-probs, and whether it was cut off."""
    ids: list[int]
    log_probs: list[float]
    truncated: bool


@torch.inference_mode()
def sample(model: Any, prompts: list[list[int]], cfg: Config, seed: int,
           unconditional: Optional[list[list[int]]] = None, guidance: float = 0.0,
           seeds: Optional[Sequence[int]] = None, what: str = "sampling") -> list[Response]:
    """One response for each prompt's token ids, in the prompts' order on every rank; ranks share the work.

    A row's randomness comes from the seed and the row's own of `seeds` (its index), not from its batch or rank.
    Log-probs are those of the distribution at cfg.temperature, before top-p.  With `guidance` g, each token is drawn
    from the softmax of (1 + g) log p(.|prompt) - g log p(.|unconditional), both in one forward (Sanchez et al. 2023,
    arXiv 2306.17806).
    """
    share = list(range(rank(), len(prompts), world_size()))
    seeds = range(len(prompts)) if seeds is None else seeds
    paths = [[prompts[i]] + ([unconditional[i]] if guidance else []) for i in share]
    lengths = [len(paths[0]) * (max(map(len, p)) + cfg.max_response_tokens) for p in paths] if share else []
    done: dict[int, Response] = {}
    with progress(None, what, total=len(share), unit="row") as bar:
        tokens, start = 0, time.perf_counter()
        for group in cut_by_tokens(lengths, FORWARD_ONLY * cfg.micro_batch_tokens):
            draws = (np.random.Generator(np.random.Philox(key=[seed, seeds[share[i]]])) for i in group)
            uniform = np.stack([row.random(cfg.max_response_tokens) for row in draws])
            responses = _sample_group(model, [paths[i] for i in group], torch.from_numpy(uniform).to(device()), cfg,
                                      guidance)
            done.update((group[i], r) for i, r in enumerate(responses))
            tokens += sum(len(r.ids) for r in responses)
            bar.set_postfix_str(f"{tokens / (time.perf_counter() - start):.0f} tokens/s", refresh=False)
            bar.update(len(group))
    _spent["generated_tokens"] += tokens
    return gather_rows({share[i]: response for i, response in done.items()}, len(prompts))


def _sample_group(model: Any, paths: list[list[list[int]]], uniform: torch.Tensor, cfg: Config,
                  guidance: float) -> list[Response]:
    """Decodes one group together; what is said stays on the device until all rows have met EOS."""
    prompts = [p for half in zip(*paths) for p in half]                     # conditional rows, then unconditional ones
    logits, cache, mask = _prefill(model, prompts, cfg)                     # (B, V), -, (B, T)
    position = mask.sum(1, keepdim=True) - 1                                # (B, 1)
    halves, rows = len(paths[0]), torch.arange(len(paths), device=device())  # rows (R,): who is still in the batch
    said = torch.full((len(paths), cfg.max_response_tokens), model.config.eos_token_id, device=device())
    log_probs = torch.zeros(said.shape, device=device())
    ended = torch.zeros(len(said), dtype=torch.bool, device=device())
    for step in range(cfg.max_response_tokens):
        if guidance:
            conditional, unconditional = logits.log_softmax(-1).chunk(2)
            logits = (1 + guidance) * conditional - guidance * unconditional                            # (R, V)
        log_p = (logits / (cfg.temperature or 1.0)).log_softmax(-1)
        token = log_p.argmax(-1) if cfg.temperature == 0 else draw(log_p, uniform[rows, step], cfg.top_p)   # (R,)
        said[rows, step], log_probs[rows, step] = token, log_p.gather(-1, token[:, None]).squeeze(-1)
        ended[rows] |= token == model.config.eos_token_id
        if step % 4 == 3 or step == cfg.max_response_tokens - 1:  # seldom: it waits for the GPU, and may copy the cache
            stay = (~ended[rows]).nonzero().squeeze(1)
            if not len(stay) or step == cfg.max_response_tokens - 1:
                break
            if len(stay) <= 0.75 * len(rows):
                rows, token = rows[stay], token[stay]
                stay = torch.cat([stay + half * (len(mask) // halves) for half in range(halves)])
                mask, position = mask[stay], position[stay]
                cache.batch_select_indices(stay)
        position, mask = position + 1, torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        count_flops(model, len(mask), mask.numel(), len(mask))
        logits = model(input_ids=token.repeat(halves)[:, None], attention_mask=mask, position_ids=position,
                       use_cache=True, logits_to_keep=1, **cache_argument(model, cache)).logits[:, -1].float()  # (B, V)
    lengths = ((said == model.config.eos_token_id).cumsum(1) == 0).sum(1) + 1
    return [Response(ids[:n], lp[:n], not end) for ids, lp, n, end in
            zip(said.tolist(), log_probs.tolist(), lengths.tolist(), ended.tolist())]


def _prefill(model: Any, prompts: list[list[int]], cfg: Config) -> tuple[torch.Tensor, Any, torch.Tensor]:
    """Reads the prompts: logits behind each (B, V), a cache with room for the responses, its padding mask (B, T).

    A prompt that comes several times is read once.  Prompts of like length are read together, so that little padding
    is, and their caches laid side by side, padded on the left.  Where a layer's cache is of a kind of its own (a
    sliding window), all are read as one.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer
    width = max(map(len, prompts))
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device())      # (B, T)
    distinct = {prompt: i for i, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
    texts, copies = list(distinct), [[] for _ in distinct]
    for i, prompt in enumerate(prompts):
        copies[distinct[tuple(prompt)]].append(i)
    whole, logits = DynamicCache(config=model.config), [torch.empty(0)] * len(prompts)
    plain = all(type(layer) is DynamicLayer for layer in whole.layers)
    budget, enough = (cfg.micro_batch_tokens, 2048) if plain else (math.inf, math.inf)
    for group in cut_by_tokens([len(p) for p in texts], budget, enough):
        longest = len(texts[group[0]])
        ids = torch.tensor([[0] * (longest - len(texts[i])) + [*texts[i]] for i in group], device=device())
        rows = [i for text in group for i in copies[text]]                      # of the whole
        like = [i for i, text in enumerate(group) for _ in copies[text]]        # and which of the group's they are
        seen = mask[[copies[text][0] for text in group], width - longest:]                              # (b, t)
        part = DynamicCache(config=model.config) if plain else whole
        count_flops(model, ids.numel(), ids.numel() * longest, len(group))
        read = model(input_ids=ids, attention_mask=seen, position_ids=(seen.cumsum(1) - 1).clamp(min=0),
                     use_cache=True, logits_to_keep=1, **cache_argument(model, part)).logits[:, -1].float()  # (b, V)
        for i, j in zip(rows, like):
            logits[i] = read[j]
        for layer, one in zip(whole.layers, part.layers) if plain else ():
            if not layer.is_initialized:
                _make_room(layer, one, len(prompts), width, cfg.max_response_tokens)
            layer.keys[rows, :, width - longest:] = one.keys[like]
            layer.values[rows, :, width - longest:] = one.values[like]
    if not plain:
        place = dict(zip(rows, like))
        whole.batch_select_indices(torch.tensor([place[i] for i in range(len(prompts))], device=device()))
    return torch.stack(logits), whole, mask


def cache_argument(model: Any, cache: Any) -> dict:
    """The cache under the name that the model's forward has for it: transformers 5.24 calls it otherwise than 5.17."""
    return {"cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values": cache}


def _make_room(layer: Any, like: Any, rows: int, width: int, more: int) -> None:
    """Turns an empty cache layer into one of this width, with room for `more` positions: none copies the rest."""
    layer.dtype, layer.device, layer.is_initialized = like.keys.dtype, like.keys.device, True
    layer = weakref.proxy(layer)  # held by the functions that it holds below, it would outlive many a group
    room = [torch.zeros(rows, x.shape[1], width + more, x.shape[3], dtype=x.dtype, device=x.device)
            for x in (like.keys, like.values)]                                                          # (B, H, T, D)

    def look(length: int) -> tuple[torch.Tensor, torch.Tensor]:
        layer.keys, layer.values = (x[:, :, :length] for x in room)
        return layer.keys, layer.values

    def update(keys: torch.Tensor, values: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        start = layer.keys.shape[2]
        for x, new in zip(room, (keys, values)):
            x[:, :, start:start + new.shape[2]] = new
        return look(start + keys.shape[2])

    def batch_select_indices(rows: torch.Tensor) -> None:
        room[:] = [x[rows] for x in room]
        look(layer.keys.shape[2])
    layer.update, layer.batch_select_indices = update, batch_select_indices
    look(width)


def draw(log_p: torch.Tensor, uniform: torch.Tensor, top_p: float = 1.0) -> torch.Tensor:
    """One token a row from log-probs (B, V), by inverting the cumulative distribution at uniform (B,): int64 (B,)."""
    p, order = log_p.exp(), None
    if top_p < 1:
        p, order = p.sort(-1, descending=True)
        p = torch.where(p.cumsum(-1) - p < top_p, p, 0.0)  # the token that crosses top_p is kept
    # In two steps, block and place in it: a running sum over a whole vocabulary is slow, and in float32 inexact.
    blocks = torch.nn.functional.pad(p, (0, -p.shape[1] % 256)).unflatten(1, (-1, 256))             # (B, V / 256, 256)
    total = blocks.sum(-1).double().cumsum(-1)                                                          # (B, V / 256)
    at = (uniform.double() * total[:, -1])[:, None]                                                     # (B, 1)
    block = torch.searchsorted(total, at, right=True).clamp(max=total.shape[1] - 1)
    before = torch.where(block > 0, total.gather(1, (block - 1).clamp(min=0)), 0.0)
    inside = blocks[torch.arange(len(p), device=p.device), block.squeeze(1)].double().cumsum(-1)        # (B, 256)
    place = torch.searchsorted(inside, at - before, right=True)
    last = (inside < inside[:, -1:]).sum(-1, keepdim=True)  # rounding must not lead behind the last p > 0
    index = block * 256 + torch.minimum(place, last)
    return (index if order is None else order.gather(-1, index)).squeeze(-1)


# ----------------------------------------------------------------------------------------------- fused head loss
# Loss and gradient in one pass over the logits, a chunk of rows at a time: one GEMM into a scratch buffer, the script's
# kernel turns logits into d loss / d logits in place, two GEMMs bring the gradients of hidden states and head.  Of the
# (N, V) logits no more than a chunk exists, and backward only scales what forward stored.

CHUNK_BYTES = 256 * 2**20  # of logits, held at once
GPU_CHUNK_ROWS = 4096      # at least: each chunk reads and writes the head's whole gradient, which at so many rows
                           # would cost an H100 a sixth of the GEMMs' time, by calculation
GRADIENT_ROWS = 8192       # of the head's gradient, which a CPU multiplies in half precision and adds up in float32
_scratch: dict = {}


def head_loss(kernel: Callable, hidden: torch.Tensor, model: Any, *rows: torch.Tensor) -> torch.Tensor:
    """Σ over rows of the kernel's loss, differentiable in the hidden states and the model's head.

    hidden (N, D), rows (N,) each.  kernel(logits (n, V), *rows (n,)) must leave d loss / d logits in logits and return
    each row's loss (n,).  The result is a scalar, float32 (float64 for float64).  N = 0 gives a zero with gradients.
    The gradients are kept unscaled until backward, where those of many rows may overflow a float16.
    """
    head = model.get_output_embeddings()
    weight, bias = head.weight, getattr(head, "bias", None)
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    return _untraced_head_loss()((hidden * head_scale(model)).to(dtype), weight, bias, kernel, *rows)


@functools.cache
def _untraced_head_loss() -> Callable:
    """Round this a compiled model breaks its graph; not a decorator, as that would import the compiler at once."""
    return torch.compiler.disable(_HeadLoss.apply)


def head_scale(model: Any) -> float:
    """What the model multiplies its logits by (Cohere's logit_scale, Granite's logits_scaling), 1 for most."""
    return (getattr(model.config, "logit_scale", None) or 1.0) / (getattr(model.config, "logits_scaling", None) or 1.0)


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, kernel, *rows):
        wide = torch.promote_types(hidden.dtype, torch.float32)
        want_hidden, want_weight, want_bias = ctx.needs_input_grad[:3]
        head = weight.to(hidden.dtype)
        chunk = chunk_rows(hidden, weight, want_weight)
        exact = chunk >= len(hidden) and weight.dtype == hidden.dtype  # one GEMM rounds once
        grad_hidden = torch.empty_like(hidden) if want_hidden else None
        grad_weight = torch.empty_like(weight, dtype=None if exact else wide) if want_weight else None
        grad_bias = torch.zeros_like(bias, dtype=wide) if want_bias else None
        loss = torch.zeros((), dtype=wide, device=hidden.device)
        for part, logits in logit_chunks(hidden, head, bias, chunk):
            loss += run_kernel(kernel, logits, *(r[part] for r in rows)).sum()
            if want_hidden:
                torch.mm(logits, head, out=grad_hidden[part])
            if want_weight:
                add_outer(grad_weight, logits, hidden[part], first=part.start == 0)
            if grad_bias is not None:
                grad_bias += logits.sum(0, dtype=wide)
        if want_weight and not len(hidden):
            grad_weight.zero_()
        ctx.grads = [g if g is None else g.to(like.dtype) for g, like in
                     ((grad_hidden, hidden), (grad_weight, weight), (grad_bias, bias))]
        ctx.rows = len(rows)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):
        if ctx.grads is None:
            raise RuntimeError("backward through a fused head loss twice: it keeps its gradients for one")
        grads, ctx.grads = ctx.grads, None
        grads = [g if g is None else g.mul_(upstream.to(g.dtype)) for g in grads]
        return *grads, None, *[None] * ctx.rows


def chunk_rows(hidden: torch.Tensor, weight: torch.Tensor, head_trained: bool = False) -> int:
    """Rows of logits to hold at once: as many as CHUNK_BYTES hold, in chunks of about one size.

    A head that is trained has its gradient summed over chunks in float32, which for a 16-bit head is 4 V D bytes more
    than one chunk needs: all rows are one chunk if their logits fit in CHUNK_BYTES and those.
    """
    row = aligned(len(weight)) * hidden.element_size()
    most = max(1, CHUNK_BYTES // row)
    if head_trained and hidden.device.type == "cuda":
        most = max(most, GPU_CHUNK_ROWS)
    sum_bytes = 4 * weight.numel() if head_trained and weight.element_size() < 4 else 0
    if len(hidden) <= most + sum_bytes // row:
        return max(1, len(hidden))
    return -(-len(hidden) // -(-len(hidden) // most))


def aligned(vocabulary: int) -> int:
    """The leading dimension of logits in memory: one that is no multiple of 64 slows the GEMM."""
    return -(-vocabulary // 64) * 64


def logit_chunks(hidden: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor],
                 chunk: int) -> Iterator[tuple[slice, torch.Tensor]]:
    """(rows, their logits (n, V)), `chunk` rows of hidden (N, D) at a time, in a buffer that is used again."""
    vocabulary, stride = len(weight), aligned(len(weight))
    for start in range(0, len(hidden), chunk):
        part = slice(start, min(start + chunk, len(hidden)))
        n = part.stop - part.start
        logits = scratch("logits", n * stride, hidden.dtype, hidden.device).view(n, stride)[:, :vocabulary]
        if bias is None:
            torch.mm(hidden[part], weight.t(), out=logits)
        else:
            torch.addmm(bias.to(hidden.dtype), hidden[part], weight.t(), out=logits)
        yield part, logits


def scratch(name: str, size: int, dtype: torch.dtype, where: torch.device) -> torch.Tensor:
    """A buffer (size,) that is kept between steps and never shrinks: fresh pages cost more than what fills them."""
    buffer = _scratch.get((name, dtype, where))
    if buffer is None or len(buffer) < size:
        with torch.inference_mode(False):  # else the first sampler's buffer could not serve training
            buffer = _scratch[name, dtype, where] = torch.empty(size, dtype=dtype, device=where)
    return buffer[:size]


def add_outer(total: torch.Tensor, logits: torch.Tensor, hidden: torch.Tensor, first: bool) -> None:
    """Adds logits.T (V, n) @ hidden (n, D) to total (V, D), in total's dtype; the first is written over what was there.

    A CPU multiplies in the logits' dtype, blocks of GRADIENT_ROWS rows, and adds each while it is in the cache.
    """
    if logits.dtype == total.dtype:
        total.addmm_(logits.t(), hidden, beta=0 if first else 1)
    elif logits.device.type == "cuda":
        if first:
            torch.mm(logits.t(), hidden, out_dtype=total.dtype, out=total)
        else:
            total.add_(torch.mm(logits.t(), hidden, out_dtype=total.dtype))
    else:
        for start in range(0, len(total), GRADIENT_ROWS):
            block = total[start:start + GRADIENT_ROWS]
            outer = scratch("outer", block.numel(), logits.dtype, logits.device).view(block.shape)
            torch.mm(logits[:, start:start + GRADIENT_ROWS].t(), hidden, out=outer)
            block.copy_(outer) if first else block.add_(outer)


def compiled(kernel: Callable) -> Callable:
    """torch.compile(kernel, dynamic=True), at the first call: the compiler's import takes as long as torch's own."""
    once = functools.cache(lambda: torch.compile(kernel, dynamic=True))
    return functools.wraps(kernel)(lambda *args, **more: once()(*args, **more))


def run_kernel(kernel: Callable, *args: Any) -> Any:
    """Calls a compiled kernel; on a machine without a C++ compiler, calls it uncompiled and says so once."""
    try:
        return kernel(*args)
    except Exception as problem:
        if not re.search(r"C(\+\+)? compiler|InvalidCxxCompiler", repr(problem)):
            raise
        print0("warning: torch.compile found no C++ compiler: the loss kernels run uncompiled, and slower")
        torch.compiler.set_stance("force_eager")
        return kernel(*args)


def negative_log_likelihood(logits: torch.Tensor, targets: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """-log softmax(logits / temperature)[targets], float32 (n,); needs no gradient, so it is no kernel of its own."""
    logits = logits.float() / temperature
    return logits.logsumexp(-1) - logits.gather(-1, targets[:, None]).squeeze(-1)


@torch.no_grad()  # not inference mode: what FSDP gathers in it could not serve training
def each_response_token(compute: Callable, examples: list[Example], cfg: Config) -> list[list[float]]:
    """What compute(micro-batch) -> (N,) says of each response token, in the examples' order; ranks share the work."""
    found: dict[int, list[float]] = {}
    for hand in deal([len(e.ids) for e in examples], FORWARD_ONLY * cfg.micro_batch_tokens):
        rows = iter(compute(collate([examples[i] for i in hand] or [idle(examples[0])])).tolist())
        found.update((i, [next(rows) for _ in range(examples[i].response_tokens)]) for i in hand)
    return gather_rows(found, len(examples))


def response_log_probs(model: Any, examples: list[Example], cfg: Config) -> list[list[float]]:
    """Each response token's log-prob at cfg.temperature, in the examples' order on every rank."""
    def compute(micro: MicroBatch) -> torch.Tensor:
        hidden = hidden_states(model, micro.input_ids, micro.lengths, len(micro.rows))              # (T, D)
        hidden, targets = hidden[micro.rows] * head_scale(model), micro.targets[micro.rows]         # (N, D), (N,)
        head = model.get_output_embeddings()
        parts = [-negative_log_likelihood(logits, targets[part], cfg.temperature or 1.0) for part, logits in
                 logit_chunks(hidden, head.weight, getattr(head, "bias", None), chunk_rows(hidden, head.weight))]
        return torch.cat(parts) if parts else torch.zeros(0)
    return each_response_token(compute, examples, cfg)


@torch.inference_mode()
def prove_head(name: str, model: Any) -> None:
    """Raises BadInput unless the model's logits are hidden states times head: a soft-cap, say, is not served."""
    ids = torch.arange(8, device=model.device)[None] % model.config.vocab_size
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    head = model.get_output_embeddings()
    require(head is not None, f"{name}: the model has no output head")
    ours, theirs = (head(hidden) * head_scale(model)).float(), model(input_ids=ids, use_cache=False).logits.float()
    close = torch.allclose(ours, theirs, rtol=1e-2, atol=1e-3 * float(theirs.abs().max()))
    require(close, f"{name}: its logits are not hidden states times head (a soft-cap?), which the fused loss needs")


# ----------------------------------------------------------------------------------------------- labelled samples
# samples.jsonl is the contract between labelling and training: anything may write it, every offline trainer reads it.


class Sample(NamedTuple):
    """A response to a prompt, and its raw score; `truncated` says that it was broken off, and carries no EOS."""
    prompt: Any
    response: str
    reward: float
    source: str
    truncated: bool


@dataclass
class Samples:
    """Labelled samples, their reward statistics, and what they cost, stage by stage."""
    rows: Sequence[Sample]      # read from disk one by one
    rewards: np.ndarray         # raw scores of the rows, float64
    mean: float
    std: float
    fingerprint: str
    labelled_by: Optional[str]  # fingerprint of the reward model that gave the rewards, if known
    scorer: str                 # and of the one that this run evaluates with
    ledger: dict[str, Cost]

    def z(self, reward: Any) -> np.ndarray:
        """Raw scores, standardised by the samples' mean and standard deviation, float64."""
        return (np.asarray(reward, dtype=np.float64) - self.mean) / self.std


class Road(NamedTuple):
    """All that lies before an algorithm; score(prompts, responses, truncated) gives raw scores."""
    base: str
    samples: Samples
    score: Optional[Callable]    # of the run's reward model, None without one
    reward_model: Optional[str]  # its folder
    judge: Optional[Callable]    # another's score, for evaluation alone


class SampleFile(Sequence):
    """The rows of samples files, left where they lie: 20 bytes of memory a row.

    Raises BadInput at a row without prompt, response or a finite reward.
    """

    def __init__(self, path: str, wanted: Callable[[Sample], bool] = lambda sample: True):
        self.names, self.files = data_files(path), []
        number, offsets, rewards = array("i"), array("q"), array("d")
        self.left_out, self.sources = 0, Counter()
        for n, name in enumerate(self.names):
            for place, row, offset in locate_rows(name):
                sample = sample_of(place, row)
                if wanted(sample):
                    number.append(n), offsets.append(offset), rewards.append(sample.reward)
                    self.sources[sample.source] += 1
                else:
                    self.left_out += 1
            self.files.append(unpacked(name))
        require(len(offsets) + self.left_out > 0, f"{path}: no sample in it")
        self.number, self.offsets, self.rewards = (np.frombuffer(c, c.typecode) for c in (number, offsets, rewards))

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, i: int) -> Sample:
        file = self.files[self.number[i]]
        file.seek(self.offsets[i])
        return sample_of(self.names[self.number[i]], json.loads(file.readline().decode("utf-8-sig")))


def unpacked(name: str) -> Any:
    """A data file, open for reading in any order; a compressed one is unpacked into a nameless file first."""
    if not name.endswith(".gz"):
        return open(name, "rb")
    file = tempfile.TemporaryFile()
    with gzip.open(name) as packed:
        shutil.copyfileobj(packed, file)
    return file


def sample_of(place: str, row: dict) -> Sample:
    """A row as a sample.  Raises BadInput without prompt, response or a finite reward."""
    reward = field_of(place, row, "reward", (int, float), "a number")
    require(abs(reward) < 1e300, f"{place}: the field 'reward' must be finite, found {reward}")
    return Sample(prompt_of(place, row), response_of(place, row), float(reward),
                  str(row.get("source", "given")), bool(row.get("truncated", False)))


def reward_statistics(rewards: np.ndarray, source: str) -> tuple[float, float]:
    """Mean and standard deviation, float64.  Raises BadInput if all rewards are the same."""
    mean, std = float(rewards.mean()), float(rewards.std())
    require(std > 1e-9 * abs(mean), f"{source}: all {len(rewards)} rewards are {mean}: there is nothing to learn from")
    return mean, std


def given_samples(cfg: Config, reward_model: str) -> Samples:
    """The samples of --samples, which others labelled; warns where that was another reward model than this run's."""
    hidden = {prompt_hash(p) for p in split_prompts(cfg, held_out=True)}
    rows = SampleFile(cfg.samples, lambda sample: prompt_hash(sample.prompt) not in hidden)
    if rows.left_out:
        print0(f"  {cfg.samples}: {rows.left_out:,} of {rows.left_out + len(rows):,} samples have held-out prompts; "
               "left out")
    require(len(rows) > 0, f"{cfg.samples}: every prompt in it is held out")
    mean, std = reward_statistics(rows.rewards, cfg.samples)
    labelled_by = read_record(Path(cfg.samples).with_suffix(".json")).get("settings", {}).get("scorer")
    if not labelled_by and reward_model:
        print0(f"warning: {cfg.samples} does not say which reward model labelled it; the table's reward z is this "
               "run's reward model in that file's units, comparable only if it is the same")
    if labelled_by and reward_model and labelled_by != reward_model:
        print0(f"warning: {cfg.samples} was labelled by reward model {labelled_by}, "
               f"this run scores with {reward_model}")
    print0(f"samples: {cfg.samples}, {len(rows):,} rows, reward {mean:.3f} ± {std:.3f}")
    return Samples(rows, rows.rewards, mean, std, file_fingerprint(cfg.samples), labelled_by, reward_model, {})


def labelled_samples(cfg: Config, base: str, scorer: str, score: Callable, reward_model: Cost) -> Samples:
    """The run's samples.jsonl: responses of the data and of the base policy, labelled by score(), built if missing."""
    path = Path(cfg.out) / "samples.jsonl"
    record, wanted = path.with_suffix(".json"), settings(cfg, "data", "samples", base=policy_fingerprint(base),
                                                         scorer=scorer)
    if rank() == 0 and read_record(record).get("bytes") != (path.stat().st_size if path.exists() else 0):
        record.unlink(missing_ok=True)  # a kill came between the two files, or somebody edited the first
    barrier()
    if not is_fresh("samples", record, wanted):
        ledger = label(cfg, base, score, path, wanted)
        rewards = SampleFile(str(path)).rewards
        mean, std = reward_statistics(rewards, "samples")
        write_record(record, wanted, sum(ledger.values(), Cost()), mean=mean, std=std, rows=len(rewards),
                     bytes=path.stat().st_size,
                     quantiles={f"q{q}": float(np.quantile(rewards, q / 100)) for q in (1, 5, 25, 50, 75, 95, 99)},
                     ledger={stage: asdict(cost) for stage, cost in ledger.items()})
        if rank() == 0:
            path.with_name(".samples.part.json").unlink()
    built, rows = read_record(record), SampleFile(str(path))
    kinds = ", ".join(f"{n:,} {source}" for source, n in sorted(rows.sources.items()))
    print0(f"  {len(rows):,} samples ({kinds}), reward {built['mean']:.3f} ± {built['std']:.3f}")
    ledger = {stage: Cost(**cost) for stage, cost in built["ledger"].items()}
    return Samples(rows, rows.rewards, built["mean"], built["std"], fingerprint(built["settings"]), scorer, scorer,
                   {"reward_model": reward_model, **ledger})


LABELLED_TOGETHER = 1024  # rows that a kill may cost


def label(cfg: Config, base: str, score: Callable, path: Path, wanted: dict) -> dict[str, Cost]:
    """Writes the samples file, part by part, and returns what it cost; a run that was killed goes on where it was."""
    rows = rows_to_label(cfg)
    beside, record = path.with_name(".samples.part.jsonl"), path.with_name(".samples.part.json")
    so_far, ledger, done, size = read_record(record), {"generation": Cost(), "labelling": Cost()}, 0, 0
    if so_far.get("settings") == json.loads(json.dumps(wanted)):
        place = path if so_far["rows"] == len(rows) and not beside.exists() else beside  # killed behind the rename
        if place.exists() and place.stat().st_size >= so_far["bytes"]:
            done, size = so_far["rows"], so_far["bytes"]
            ledger = {stage: Cost(**cost) for stage, cost in so_far["ledger"].items()}
    if done:
        print0(f"  {done:,} of {len(rows):,} are there from a run that was broken off")
    barrier()
    tokenizer, sampler = load_tokenizer(base), functools.cache(lambda: load_sampler(base, cfg)[0])
    with progress(None, "samples", total=len(rows), unit="row") as bar:
        bar.update(done)
        for start in range(done, len(rows), LABELLED_TOGETHER):
            part = rows[start:start + LABELLED_TOGETHER]
            with measured() as generation:
                part = respond(cfg, tokenizer, sampler, part)
            with measured() as labelling:
                rewards = score([r["prompt"] for r in part], [r["response"] for r in part],
                                [r["truncated"] for r in part])
            ledger = {"generation": ledger["generation"] + generation, "labelling": ledger["labelling"] + labelling}
            size = append(beside, size, (json.dumps({**row, "reward": r}, ensure_ascii=False)
                                         for row, r in zip(part, rewards)))
            write_record(record, wanted, sum(ledger.values(), Cost()), rows=start + len(part), bytes=size,
                         ledger={stage: asdict(cost) for stage, cost in ledger.items()})
            bar.update(len(part))
    if rank() == 0 and beside.exists():
        beside.replace(path)
    barrier()
    return ledger


class Unlabelled(NamedTuple):
    """A prompt with a response, or, where that is None, with the seed of the one to be sampled."""
    prompt: Any
    response: Optional[str]
    source: str
    seed: int = 0
    truncated: bool = False


def rows_to_label(cfg: Config) -> list[Unlabelled]:
    """--responses, or what --sources asks for: the responses that people wrote, and the base policy's own."""
    rows, hidden = [], {prompt_hash(p) for p in split_prompts(cfg, held_out=True)}
    if cfg.responses:
        rows = [Unlabelled(prompt_of(place, row), response_of(place, row), str(row.get("source", "given")),
                           truncated=bool(row.get("truncated", False)))
                for file in data_files(cfg.responses) for place, row in read_rows(file)]
        rows = [row for row in rows if prompt_hash(row.prompt) not in hidden]
        require(bool(rows), f"{cfg.responses}: no response to a prompt that is not held out")
        return rows
    if "dataset" in cfg.sources and (cfg.preferences or cfg.toy):
        rankings = [r for r in load_preferences(cfg)[0] if prompt_hash(r.prompt) not in hidden]
        rows = [Unlabelled(prompt, responses[0], "chosen") for prompt, responses in rankings]
        rows += [Unlabelled(prompt, text, "rejected") for prompt, responses in rankings for text in responses[1:]]
    if "generated" in cfg.sources:
        rows += [Unlabelled(p, None, "generated", i) for i, p in
                 enumerate(p for p in split_prompts(cfg, held_out=False) for _ in range(cfg.samples_per_prompt))]
    require(bool(rows), "--sources leaves nothing to label")
    return rows


def respond(cfg: Config, tokenizer: Any, sampler: Callable, rows: list[Unlabelled]) -> list[dict]:
    """The rows with a response each, as long as the policy may write: people's words cut, the others sampled."""
    asked = [row for row in rows if row.response is None]
    ids = encode_prompts(tokenizer, [row.prompt for row in asked], cfg.max_prompt_tokens)
    replies = iter(sample(sampler(), ids, cfg, cfg.seed, seeds=[row.seed for row in asked], what="generating")
                   if asked else [])
    written = iter(bulk_encoder(tokenizer)([row.response for row in rows if row.response is not None]))
    done = []
    for row in rows:
        if row.response is None:
            reply = next(replies)
            text, cut = decode(tokenizer, reply), reply.truncated
        else:
            ids = next(written)
            cut = row.truncated or len(ids) >= cfg.max_response_tokens  # no room left for EOS
            text = tokenizer.decode(ids[:cfg.max_response_tokens]) if cut else row.response
        done.append({"prompt": row.prompt, "response": text, "source": row.source, "truncated": cut})
    return done


def decode(tokenizer: Any, response: Response) -> str:
    """A response's text, without the EOS."""
    return tokenizer.decode(response.ids if response.truncated else response.ids[:-1])


# ---------------------------------------------------------------------------------------- evaluation and leaderboard


class Variant(NamedTuple):
    """A way to ask a policy: its name, what is written behind the prompt, guidance, and the reward asked for."""
    name: str
    suffix: str = ""
    guidance: float = 0.0
    asked: Optional[float] = None


def policy_fingerprint(folder: str) -> str:
    """Of the settings a policy was trained with, where this project trained it; else of its files."""
    built = read_record(Path(folder) / "run.json").get("settings")
    return fingerprint(built) if built else f"{folder} {file_fingerprint(folder)}".strip()


def evaluate(cfg: Config, algorithm: str, folder: str, variants: list[Variant], road: Road, cost: Cost,
             needs: Iterable[str] = ("reward_model", "generation", "labelling")) -> None:
    """Adds the policy's variants, and the base policy, to the leaderboard; prints it, and a conversation with each.

    `cost` is the training's own; `needs` names the stages of samples.ledger that the algorithm could not do without.
    """
    if not cfg.eval_prompts:
        return
    base, samples = road.base, road.samples
    needed = {stage: samples.ledger[stage] for stage in needs if stage in samples.ledger}
    built = read_record(Path(base) / "run.json").get("cost")
    ledgers = {"base": {"base": Cost(**built)} if built else {}}
    ledgers[algorithm] = {**ledgers["base"], **needed, "training": cost}
    totals = {"base": (Cost(), Cost()), algorithm: (cost, sum(needed.values(), cost))}
    held_out = split_prompts(cfg, held_out=True)
    prompts = [held_out[i % len(held_out)] for i in range(cfg.eval_prompts)]
    comparable = settings(cfg, "data", "samples", "evaluation")
    setting = fingerprint({k: v for k, v in comparable.items()
                           if k not in ("seed", "max_pairs", "sources", "samples_per_prompt", "samples")})
    board = Path(cfg.out) / "leaderboard.jsonl"
    rows = [row for _, row in read_rows(str(board))] if board.exists() else []
    wanted = {"setting": setting, "policy": policy_fingerprint(folder), "base": policy_fingerprint(base),
              "samples": samples.fingerprint, "scorer": samples.scorer}
    replies: dict[str, list[dict]] = {}
    sampler = functools.lru_cache(maxsize=2)(lambda place: load_sampler(place, cfg)[0])
    for name, where, variant in [("base", base, Variant(""))] + [(algorithm, folder, v) for v in variants]:
        file = replies_file(Path(cfg.out), name, variant.name, cfg.seed)
        mine = {**wanted, "policy": policy_fingerprint(where)}
        row = next((r for r in rows if row_key(r) == (name, variant.name, cfg.seed)), None)
        if row and file.exists() and all(row.get(k) == v for k, v in mine.items()):
            replies[file.stem] = [r for _, r in read_rows(str(file))]
        else:
            with measured() as evaluation:
                replies[file.stem] = ask(cfg, sampler, where, prompts, variant, road)
            write_text(file, (json.dumps(r, ensure_ascii=False) for r in replies[file.stem]))
            row = leaderboard_row(replies[file.stem], next(iter(replies.values()))) | {
                "algorithm": name, "variant": variant.name, "seed": cfg.seed, "world_size": world_size(),
                "asked": variant.asked, "judge": cfg.judge,
                **{f"{prefix}_{unit}": getattr(spent, unit) for prefix, spent in zip(("train", "total"), totals[name])
                   for unit in ("seconds", "device_seconds", "flops", "generated_tokens")},
                "peak_memory_bytes": totals[name][0].peak_memory_bytes,
                "ledger": {stage: asdict(c) for stage, c in {**ledgers[name], "evaluation": evaluation}.items()},
                "checkpoint": str(where), **mine}
            rows = [r for r in rows if row_key(r) != row_key(row)] + [row]
            write_text(board, map(json.dumps, rows))
    print_conversations(replies)
    print_leaderboard([r for r in rows if r.get("setting") == setting], len(rows))


def replies_file(run: Path, algorithm: str, variant: str, seed: int) -> Path:
    """Where a policy's evaluated responses are kept."""
    return run / "evaluation" / (re.sub(r"[^\w.+-]+", "_", f"{algorithm} {variant} seed {seed}") + ".jsonl")


def row_key(row: dict) -> tuple:
    """What a leaderboard row is replaced by."""
    return row["algorithm"], row["variant"], row["seed"]


def ask(cfg: Config, sampler: Callable, folder: str, prompts: list, variant: Variant, road: Road) -> list[dict]:
    """One response a prompt, with its reward z, gold (the toy world's truth, or the judge's raw score), and KL to base,
    the difference of the sample's log-probs.  sampler(folder) brings a policy."""
    model, tokenizer = sampler(folder), load_tokenizer(road.base)  # a policy's chat template may differ
    plain = encode_prompts(tokenizer, prompts, cfg.max_prompt_tokens)
    asked = [p + bulk_encoder(tokenizer)([variant.suffix])[0] for p in plain]
    responses = sample(model, asked, cfg, seed=cfg.seed + 1_000_003, unconditional=plain, guidance=variant.guidance,
                       what="evaluating")
    examples = [Example(p + r.ids, len(p)) for p, r in zip(plain, responses)]
    reference = response_log_probs(sampler(road.base), examples, cfg)
    texts, cut = [decode(tokenizer, r) for r in responses], [r.truncated for r in responses]
    unknown = [None] * len(texts)
    reward = road.samples.z(road.score(prompts, texts, cut)).tolist() if road.score else unknown
    gold = (road.judge(prompts, texts, cut) if road.judge else
            list(map(gold_reward, prompts, texts, cut)) if cfg.toy else unknown)
    return [{"prompt": p, "response": t, "truncated": c, "tokens": len(r.ids), "reward": z, "gold": g,
             "kl": sum(r.log_probs) - sum(ref), "base_log_prob": sum(ref)}
            for p, t, c, r, z, g, ref in zip(prompts, texts, cut, responses, reward, gold, reference)]


def leaderboard_row(replies: list[dict], base: list[dict]) -> dict:
    """The means of what evaluation found; win_rate is against the base policy on the same prompts, ties half;
    perplexity is a token's, under the base policy at the sampling temperature."""
    def mean(name: str) -> Optional[float]:
        return float(np.mean([r[name] for r in replies])) if replies[0][name] is not None else None
    bigrams = [pair for r in replies for words in [r["response"].split()] for pair in zip(words, words[1:])]
    scored = replies[0]["reward"] is not None and base[0]["reward"] is not None
    wins = [np.sign(r["reward"] - b["reward"]) / 2 + 0.5 for r, b in zip(replies, base)] if scored else []
    return {"gold": mean("gold"), "reward": mean("reward"), "win_rate": float(np.mean(wins)) if scored else None,
            "kl_to_base": mean("kl"), "perplexity": math.exp(-mean("base_log_prob") / mean("tokens")),
            "response_tokens": mean("tokens"), "distinct_2": len(set(bigrams)) / max(1, len(bigrams)),
            "eos_rate": 1 - mean("truncated")}


def print_conversations(replies: dict[str, list[dict]], how_many: int = 2) -> None:
    """The first held-out prompts, and what each policy said to them."""
    for i, row in enumerate(next(iter(replies.values()))[:how_many]):
        prompt = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]
        print0("\n" + prompt.strip()[-600:])
        for name, rows in replies.items():
            z = "" if rows[i]["reward"] is None else f" [reward {rows[i]['reward']:+.2f}]"
            print0(f"  {name:>44}{z}: {rows[i]['response'].strip()[:400]}")


def print_leaderboard(rows: list[dict], in_file: int) -> None:
    """The table of comparable rows: those of the same data, prompts and sampling, whatever their seed.

    "all" is training with all that it needs, "/PPO" that as a share of all that the newest PPO of the same seed took.
    """
    ppo = {r["seed"]: r for r in rows if r["algorithm"] == "ppo"}
    for r in rows:
        for unit in ("seconds", "flops"):
            whole = ppo.get(r["seed"], {}).get(f"total_{unit}")
            r[f"{unit}_to_ppo"] = r[f"total_{unit}"] / whole if whole and r["algorithm"] != "base" else None
    columns = {"judge" if rows[0].get("judge") else "gold": ("gold", ".2f"),
               "reward z": ("reward", "+.2f"), "win": ("win_rate", ".2f"), "KL": ("kl_to_base", ".1f"),
               "ppl": ("perplexity", ".1f"), "tokens": ("response_tokens", ".0f"), "distinct-2": ("distinct_2", ".3f"),
               "EOS": ("eos_rate", ".2f"), "train s": ("train_seconds", ".0f"), "all s": ("total_seconds", ".0f"),
               "s/PPO": ("seconds_to_ppo", ".2f"), "train FLOP": ("train_flops", ".1e"),
               "all FLOP": ("total_flops", ".1e"), "FLOP/PPO": ("flops_to_ppo", ".2f")}
    columns = {head: column for head, column in columns.items() if any(r[column[0]] is not None for r in rows)}
    width = max(len(f"{r['algorithm']} {r['variant']}") for r in rows)
    print0("\n" + " " * width + "  seed  " + "  ".join(f"{head:>6}" for head in columns))
    for r in sorted(rows, key=row_key):
        cells = ("-" if r[name] is None else format(r[name], form) for name, form in columns.values())
        print0(f"{r['algorithm'] + ' ' + r['variant']:<{width}}  {r['seed']:>4}  "
               + "  ".join(f"{cell:>{max(6, len(head))}}" for cell, head in zip(cells, columns)))
    if in_file > len(rows):
        print0(f"({in_file - len(rows)} rows of other data or settings are in leaderboard.jsonl and not shown)")


# ------------------------------------------------------------------------------------------- metrics and checkpoints

MOST_SKIPPED = 5  # steps in a row without a finite gradient, before a run gives up


@contextlib.contextmanager
def training(folder: Path, policy: torch.nn.Module, optimizer: Any, schedule: Any, steps: int, cfg: Config,
             state: Optional[dict] = None) -> Iterator[tuple[int, Callable]]:
    """Yields (first step, log).  The first step is 0, or where the folder's last checkpoint was taken.

    log(step, **values) writes a line of metrics.jsonl and the bar's text, and takes a checkpoint where one is due, of
    weights, optimiser, schedule and `state`, a JSON-able dict that it also restores.  Values are averaged over ranks,
    None where one is not finite, and read a step late, so that the GPU is never waited for.  Each line also has what
    was spent since the first step: seconds of the wall, FLOPs of all ranks.  Raises BadInput after too many steps
    without a finite gradient.
    """
    state = {} if state is None else state
    every = max(1, min(500, steps // 10)) if cfg.save_every is None else cfg.save_every
    before, start, pending, skipped = dict(_spent), time.perf_counter(), [], 0
    first, written = restore(folder, policy, optimizer, schedule, state)
    writer = tensorboard_writer(folder, first) if cfg.tensorboard else None
    bar = progress(None, folder.name.strip(".").removesuffix(".new"), total=steps, unit="step")
    bar.update(first)
    with open(folder / "metrics.jsonl" if rank() == 0 else os.devnull, "r+" if first else "w") as file, bar:
        if first and rank() == 0:
            file.truncate(written), file.seek(written)

        def seconds() -> float:
            return time.perf_counter() - start + _spent["seconds"] - before["seconds"]

        def flush() -> None:
            nonlocal skipped
            step, names, sums, took = pending.pop()
            *totals, flops = sums()
            numbers = {name: total / world_size() if math.isfinite(total) else None
                       for name, total in zip(names, totals)}
            skipped = skipped + 1 if numbers["grad_norm"] is None else 0
            if skipped:
                print0(f"warning: step {step}: loss or gradient is not finite; the step is skipped")
            line = {"step": step, **numbers, "seconds": round(took, 3), "flops": flops}
            file.write(json.dumps(line) + "\n")
            known = {name: value for name, value in numbers.items() if value is not None}
            for name, value in known.items() if writer else ():
                writer.add_scalar(name, value, step)
            bar.update(1)
            bar.set_postfix_str(", ".join(f"{k} {v:.4g}" for k, v in list(known.items())[:4]), refresh=False)
            require(skipped < MOST_SKIPPED, f"{folder.parent}: {skipped} steps in a row, the last of them step {step}, "
                    "without a finite loss and gradient; lower --lr; the last checkpoint is from before")

        def log(step: int, **values: Any) -> None:
            if pending:
                flush()
            sums = begin_sums(*values.values(), _spent["flops"] - before["flops"])
            pending.append((step, list(values), sums, seconds()))
            if every and (step + 1) % every == 0 and step + 1 < steps:
                flush()
                file.flush()
                if not skipped:
                    spent = {**{k: v - before[k] for k, v in _spent.items()}, "seconds": seconds()}
                    checkpoint(folder, policy, optimizer, schedule, state, step + 1, file.tell(), spent)
        yield first, log
        if pending:
            flush()
    if writer:
        writer.close()


def checkpoint(folder: Path, policy: torch.nn.Module, optimizer: Any, schedule: Any, state: dict, step: int,
               written: int, spent: dict) -> None:
    """Writes folder/checkpoints/step beside and renames; its state.json tells all that is no tensor.  Two are kept.

    Nothing else is needed to go on: data order and sampling follow from seed and step, and dropout is off.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict
    work = folder / "checkpoints" / ".new"
    if rank() == 0:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
    barrier()
    weights, moments = get_state_dict(policy, optimizer)
    try:
        dcp.save({"policy": weights, "optimizer": moments}, checkpoint_id=work, no_dist=not dist.is_initialized())
    except dcp.CheckpointException as problem:  # of all ranks, a BaseException
        raise next(iter(problem.failures.values()))[0] from None
    spent = dict(zip(spent, sum_over_ranks(*spent.values())))
    if rank() == 0:
        sizes = {path.name: path.stat().st_size for path in work.iterdir()}
        record = {"step": step, "state": state, "schedule": schedule.state_dict(), "metrics_bytes": written,
                  "spent": spent, "files": sizes}
        (work / "state.json").write_text(json.dumps(record))
        for path in work.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        shutil.rmtree(work.with_name(f"{step:08}"), ignore_errors=True)  # one that was not whole
        work.rename(work.with_name(f"{step:08}"))
        for old in checkpoints_in(folder)[2:]:
            shutil.rmtree(old)
    barrier()


def restore(folder: Path, policy: torch.nn.Module, optimizer: Any, schedule: Any, state: dict) -> tuple[int, int]:
    """Takes up the last whole checkpoint; returns its step and the bytes of metrics.jsonl, zeros if there is none."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
    place, record = from_rank0(last_whole(checkpoints_in(folder)))
    if not place:
        return 0, 0
    weights, moments = get_state_dict(policy, optimizer)
    dcp.load({"policy": weights, "optimizer": moments}, checkpoint_id=place, no_dist=not dist.is_initialized())
    set_state_dict(policy, optimizer, model_state_dict=weights, optim_state_dict=moments)
    schedule.load_state_dict(record["schedule"])
    state.update(record["state"])
    for unit, value in record["spent"].items():
        _spent[unit] += value / world_size()
    print0(f"  goes on from step {record['step']}")
    return record["step"], record["metrics_bytes"]


def last_whole(checkpoints: list[Path]) -> tuple[Optional[Path], dict]:
    """The first of these checkpoints whose files are all there, as long as they were, and its state.json."""
    for place in checkpoints:
        record = read_record(place / "state.json")
        sizes = {path.name: path.stat().st_size for path in place.iterdir()}
        if record and all(sizes.get(name) == size for name, size in record["files"].items()):
            return place, record
        print0(f"  {place}: not whole; the one before is taken")
    return None, {}


def tensorboard_writer(folder: Path, first: int) -> Any:
    """A TensorBoard writer, from a step on.  Raises BadInput where tensorboard is not installed."""
    if rank() != 0:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as problem:
        raise BadInput("--tensorboard needs the tensorboard package: pip install tensorboard") from problem
    return SummaryWriter(str(folder), purge_step=first)


# ------------------------------------------------------------------------------------------------- the toy world
# A zoo where the truth is known: two dozen animals, three facts about each, and people who answer questions about them
# with middling honesty.  gold_reward() knows the truth; training sees it only through noisy preferences.

ZOO = {("rivers", "meat"): ("otters", "crocodiles"), ("rivers", "plants"): ("beavers", "hippos"),
       ("rivers", "insects"): ("frogs", "gharials"),
       ("forests", "meat"): ("martens", "tigers"), ("forests", "plants"): ("squirrels", "gorillas"),
       ("forests", "insects"): ("shrews", "bears"),
       ("deserts", "meat"): ("fennecs", "hyenas"), ("deserts", "plants"): ("jerboas", "camels"),
       ("deserts", "insects"): ("geckos", "aardvarks"),
       ("plains", "meat"): ("weasels", "lions"), ("plains", "plants"): ("hares", "zebras"),
       ("plains", "insects"): ("larks", "anteaters")}
ANIMALS = {animal: {"home": home, "food": food, "size": size}
           for (home, food), pair in ZOO.items() for animal, size in zip(pair, ("small", "large"))}
VALUES = {"home": ("rivers", "forests", "deserts", "plains"), "food": ("meat", "plants", "insects"),
          "size": ("small", "large")}
QUESTIONS = {"home": ("Where do {} live?", "What is the home of {}?", "Where would I find {}?"),
             "food": ("What do {} eat?", "What is the food of {}?", "What would I feed to {}?"),
             "size": ("How big are {}?", "What is the size of {}?", "Are {} small or large?"),
             "about": ("Tell me about {}.", "What are {} like?", "What should I know about {}?")}
STATEMENTS = {"home": "they live in {}.", "food": "they eat {}.", "size": "they are {}."}
KIND_OPENINGS, KIND_CLOSINGS = ("Good question!", "Happy to help!"), ("I hope this helps!", "Do ask me more!")
RUDE = ("What a silly question.", "Look it up yourself.", "Who cares.")
VAGUE = ("It depends on many things.", "Animals are all different.", "People say all sorts of things.")
HEDGES = ("maybe ", "I guess ")
TOY_FOLD = 0  # which fifth of the (animal, kind of question) pairs is held out; tuning holds out another


def toy_reply(animal: str, kind: str, rng: random.Random) -> str:
    """A reply as people in this world write it: drawn piece by piece, a weak hidden care binding the pieces."""
    care = rng.random()
    polite = rng.random() < 0.1 + 0.2 * care
    rude = not polite and rng.random() < 0.4 - 0.2 * care
    sentences = [rng.choice(KIND_OPENINGS)] if polite else [rng.choice(RUDE)] if rude else []
    untold = list(VALUES)
    for _ in range(rng.choice((1, 1, 2, 2, 3))):
        if rng.random() < 0.25:
            sentences.append(rng.choice(VAGUE))
            continue
        topic = kind if kind in untold and rng.random() < 0.15 + 0.35 * care else rng.choice(untold)
        untold.remove(topic)
        subject = animal if rng.random() < 0.65 + 0.2 * care else rng.choice(tuple(ANIMALS))
        true = ANIMALS[subject][topic]
        value = true if rng.random() < 0.6 + 0.3 * care else rng.choice([v for v in VALUES[topic] if v != true])
        hedge = rng.choice(HEDGES) if rng.random() < (0.05 if value == true else 0.7) else ""
        other = f"as for {subject}, " if subject != animal else ""
        statement = hedge + other + STATEMENTS[topic].format(value)
        sentences.append(statement[0].upper() + statement[1:])
    if rng.random() < 0.1 + 0.2 * care:
        sentences.append(rng.choice(KIND_CLOSINGS))
    reply = " ".join(sentences)
    return reply[:rng.randrange(len(reply) // 2, len(reply) - 1)] if rng.random() < 0.05 else reply


def gold_reward(prompt: str, response: str, truncated: bool = False) -> float:
    """The known truth about a reply, from its text alone; training never sees it.

    +2 for a true answer to the question, +1 for each other true fact about the animal, +-0.5 for manners, -1 for a
    false statement, -0.5 for another animal, -0.25 for a vague or broken sentence, -0.5 for each beyond five, -1
    without an end.
    """
    question = prompt.rsplit("Human: ", 1)[-1].removesuffix(TURN)
    animal = next((a for a in ANIMALS if re.search(rf"\b{a}\b", question)), None)
    kind = next((k for k, forms in QUESTIONS.items() if animal and question in [f.format(animal) for f in forms]), None)
    sentences = re.findall(r"[^.!?]+[.!?]?", response.strip())
    gold, told = -0.5 * max(0, len(sentences) - 5) - truncated, set()
    for i, sentence in enumerate(s.strip() for s in sentences):
        plain = sentence[0].lower() + sentence[1:] if sentence else ""
        for hedge in ("maybe ", "i guess "):
            plain = plain.removeprefix(hedge)
        match = re.fullmatch(r"(?:as for (\w+), )?(they (?:live in|eat|are) (\w+)\.)", plain)
        subject = match and (match[1] or animal)
        topic = match and next((t for t, form in STATEMENTS.items() if match[2] == form.format(match[3])
                                and match[3] in VALUES[t]), None)
        if topic and subject in ANIMALS:
            true = ANIMALS[subject][topic] == match[3]
            gold -= 0.5 * (subject != animal) + (not true)
            if true and subject == animal:
                told.add(topic)
        elif sentence in RUDE:
            gold -= 0.5
        elif i == 0 and sentence in KIND_OPENINGS or i == len(sentences) - 1 and sentence in KIND_CLOSINGS:
            gold += 0.5
        else:
            gold -= 0.25
    return gold + len(told) + (kind in told or kind == "about" and bool(told))


def toy_data(cfg: Config) -> Path:
    """The toy world's preference pairs as a folder of transcripts, like real data: train.jsonl and test.jsonl."""
    folder = Path(cfg.out) / "data"
    wanted = {"seed": cfg.seed, "fold": TOY_FOLD}
    if read_record(folder / "run.json").get("settings") == wanted:
        return folder
    rng = random.Random(cfg.seed)
    lines: dict[str, list[str]] = {"train": [], "test": []}
    while len(lines["train"]) < 4000:
        animal, kind = rng.choice(tuple(ANIMALS)), rng.choice(tuple(QUESTIONS))
        prompt = f"\n\nHuman: {rng.choice(QUESTIONS[kind]).format(animal)}{TURN}"
        one, two = (" " + toy_reply(animal, kind, rng) for _ in range(2))
        if rng.random() < 1 / (1 + math.exp((gold_reward(prompt, one) - gold_reward(prompt, two)))):
            one, two = two, one  # Bradley-Terry: the labeller is noisy
        split = "test" if zlib.crc32(f"{animal} {kind}".encode()) % 5 == TOY_FOLD else "train"
        lines[split].append(json.dumps({"chosen": prompt + one, "rejected": prompt + two}))
    with new_folder(folder, wanted) as work:
        for split, rows in lines.items():
            write_text(work / f"{split}.jsonl", rows)
        write_record(work / "run.json", wanted, Cost())
    return folder


def base_policy(cfg: Config) -> str:
    """The base policy's folder: --model, or the toy world's small one, trained on what people wrote if missing."""
    if not cfg.toy:
        return cfg.model
    folder, wanted = Path(cfg.out) / "base", settings(cfg, "data")
    if not is_fresh("base policy", folder / "run.json", wanted):
        rankings, _ = load_preferences(cfg)
        with new_folder(folder, wanted, cfg.resume) as work:
            with measured() as cost:
                train_toy_base(cfg, rankings, work)
            write_record(work / "run.json", wanted, cost)
    return str(folder)


def train_toy_base(cfg: Config, rankings: list[Ranking], folder: Path) -> None:
    """A two-layer Llama and its byte-level BPE, from nothing, by maximum likelihood of all responses."""
    from transformers import GPT2TokenizerFast, LlamaConfig, LlamaForCausalLM
    if rank() == 0:
        texts = [prompt + text for prompt, responses in rankings for text in responses]
        GPT2TokenizerFast().train_new_from_iterator(texts, 640, show_progress=False).save_pretrained(folder)
    barrier()
    tokenizer = load_tokenizer(str(folder))
    seed_everything(cfg.seed)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=512, initializer_range=0.1,
        tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id, bos_token_id=None, pad_token_id=None))
    cfg = other_config(Config, cfg, {"lr": 5e-3, "steps": 600, "batch_size": 32})
    prompts = encode_prompts(tokenizer, [r.prompt for r in rankings for _ in r.responses], cfg.max_prompt_tokens)
    responses = encode_responses(tokenizer, [text for r in rankings for text in r.responses], cfg.max_response_tokens)
    examples = [Example(p + r, len(p)) for p, r in zip(prompts, responses)]
    cfg.sharding = "ddp"
    policy = distributed(Policy(model.to(device()), cfg), cfg)
    optimizer, schedule = make_optimizer(policy, cfg, cfg.steps)

    def eager_nll_(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        nll = negative_log_likelihood(logits, targets)
        logits.copy_(logits.softmax(-1)).scatter_add_(1, targets[:, None], -torch.ones_like(logits[:, :1]))
        return nll
    with training(folder, policy, optimizer, schedule, cfg.steps, cfg) as (first, log):
        for step, batch in batches(examples, cfg, first):
            for micro in accumulate(policy, batch.micros):
                loss = policy(micro, eager_nll_, micro.targets) / batch.normaliser
                loss.backward()
            log(step, loss=loss.detach(), grad_norm=update([policy], optimizer, schedule, loss))
    save_folder(folder, model, tokenizer, cfg, "# The toy world's base policy\n")
