"""Everything the trainers share and no algorithm is about.

Rooms, in reading order: process group, config, stages, tokenizer, data, batches, packed attention,
models, fused head loss, sampler, labelled samples, evaluation, training run, toy world.

Terms: *policy*, the language model that is trained; *base policy*, what it starts from and the
reference of every KL; *sample*, a (prompt, response, reward); *z*, a reward standardised over the
labelled samples; *response mask*, the tokens a loss is taken over.  Shapes: T tokens of packed
sequences, N rows (positions that predict a response token), D hidden width, V vocabulary, R slots
of the sampler.  A *prompt* is text, or chat messages for the tokenizer's chat template.
"""
from __future__ import annotations

import argparse
import contextlib
import errno
import functools
import gc
import glob
import gzip
import hashlib
import itertools
import json
import math
import os
import platform
import random
import re
import resource
import shutil
import sys
import time
import unicodedata
import warnings
import zlib
from collections import Counter
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, Literal, NamedTuple, Optional

import numpy as np

os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")  # probing the CPU's flags takes 10 s

import torch
import torch.distributed as dist
import torch.utils.checkpoint
from tqdm import tqdm

# ---------------------------------------------------------------------------------- process group


class BadInput(Exception):
    """What the user gave cannot be used; the message is the one sentence that says so."""


def require(condition: Any, otherwise: str) -> None:
    """Raises BadInput(otherwise) unless the condition holds."""
    if not condition:
        raise BadInput(otherwise)


def rank() -> int:
    """This process's number, 0 without torchrun."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """How many processes train together, 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", 1))


def device() -> torch.device:
    """This rank's GPU, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


def print0(*args: Any) -> None:
    """print, on rank 0 alone."""
    if rank() == 0:
        print(*map(printable, args), flush=True)


@functools.cache
def print_once(line: str) -> None:
    """print0, but each line once in a process."""
    print0("  " + line)


def printable(text: Any) -> str:
    """The text, control characters as escapes: data could command the terminal with them."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in str(text))


def barrier() -> None:
    """Waits for all ranks."""
    if dist.is_initialized():
        dist.barrier()


def sum_over_ranks(*values: Any) -> list[float]:
    """The values, each summed over all ranks, in float64."""
    total = torch.stack([torch.as_tensor(v, dtype=torch.float64, device=device()) for v in values])
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.tolist()


def gather(value: Any) -> list:
    """Every rank's value, on every rank."""
    values = [value] * world_size()
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def gather_by_index(local: dict[int, Any], total: int) -> list:
    """What the ranks found, each under its index, in order, on every rank."""
    found = {i: value for share in gather(local) for i, value in share.items()}
    return [found[i] for i in range(total)]


def progress(items: Optional[Iterable], what: str, **more: Any) -> tqdm:
    """A tqdm bar on rank 0; where stderr is no terminal, a line every 15 s at most."""
    return tqdm(items, desc=what, disable=rank() != 0, leave=False, dynamic_ncols=True, delay=1,
                mininterval=0.3 if sys.stderr.isatty() else 15, **more)


def launch(main: Callable, kind: type, args: Optional[list[str]] = None) -> None:
    """Runs main(cfg) in a process group; what goes wrong becomes one sentence and a status.

    Status 2: input that cannot be used, or a full disk.  130: Ctrl-C, finished stages stay.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # an ASCII terminal shows escapes
    cfg, status = None, 2
    try:
        cfg = parse(kind, args)
        quieten_libraries()
        torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for each length
        if world_size() > 1:
            if device().type == "cuda":
                torch.cuda.set_device(device())
            dist.init_process_group("nccl" if device().type == "cuda" else "gloo",
                                    timeout=timedelta(minutes=cfg.dist_timeout_minutes))
            seen = gather(fingerprint({**asdict(cfg), **settings(cfg, *STAGES)}))
            require(len(set(seen)) == 1, "the ranks were started with other flags, or see other "
                    "files, than one another: they must all read the same data")
        if not cfg.compile:
            torch.compiler.set_stance("force_eager")
        with locked(Path(cfg.out)) if rank() == 0 else contextlib.nullcontext():
            main(cfg)
        if dist.is_initialized():
            gc.collect()  # sharded models are cycles that hold the group
            dist.destroy_process_group()
        return
    except BadInput as found:
        problem = str(found)
    except KeyboardInterrupt:
        problem, status = "interrupted; finished stages are kept, the same command goes on", 130
    except Exception as found:
        why = os_problem(found)
        if why is None:
            raise
        where = getattr(found, "filename", None) or (cfg.out if cfg else "")
        problem = f"{where}: {why}; what was there before is untouched"
    name = f"rank {rank()}: " if rank() else ""
    print(f"{Path(sys.argv[0]).name}: {name}{printable(problem)}", file=sys.stderr)
    sys.exit(status)


def os_problem(problem: Exception) -> Optional[str]:
    """What the operating system complained of, also where a library wrapped it; else None."""
    if isinstance(problem, OSError) and problem.errno:
        return problem.strerror
    if "inline_container" in str(problem):  # torch's zip writer on a full disk
        return os.strerror(errno.ENOSPC)
    reasons = os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT)
    return next((reason for reason in reasons if reason in str(problem)), None)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the run's folder until the process ends.  Raises BadInput naming another holder."""
    import fcntl
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as problem:
            file.seek(0)
            raise BadInput(f"{folder}: another run is at work there ({file.read()})") from problem
        except OSError:  # Lustre without -o flock, NFS without lockd
            print0(f"warning: {folder} cannot be locked: start no second run into it")
        file.truncate(0)
        file.write(f"{Path(sys.argv[0]).name}, process {os.getpid()} on {platform.node()}")
        file.flush()
        try:
            yield
        finally:
            if made and os.listdir(folder) == [".lock"]:  # nothing came of it
                shutil.rmtree(folder, ignore_errors=True)


def quieten_libraries() -> None:
    """Their bars and reports would drown the trainers' own lines; their errors stay."""
    from transformers.utils import logging
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    for message in ("torch.distributed is disabled", "Detected call of `lr_scheduler.step",
                    "`past_key_values` is deprecated"):  # the name that all versions know
        warnings.filterwarnings("ignore", message=message)


# ----------------------------------------------------------------------------------------- config
# One dataclass holds the shared flags; each script inherits it and adds its algorithm's own.

STAGES = ("data", "samples", "training", "evaluation")  # "data": every stage depends on it


class Help(str):
    """A flag's help, which carries what HfArgumentParser has no field for: toy, stage, within."""


def flag(default: Any, help: str, within: Optional[str] = None, toy: Any = None,
         stage: str = "runtime") -> Any:
    """A flag: default, help, the interval its value must lie in, its default in the toy world.

    `stage` is the first stage that depends on it, one of STAGES; on "runtime" none does.
    """
    text = Help((help + ("" if toy is None else f" [toy world: {toy}]")).replace("%", "%%"))
    text.toy, text.stage, text.within = toy, stage, within
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass
class Config:
    """The flags that every script shares."""
    out: str = flag("runs/model", "the run's folder", toy="runs/toy")
    model: Optional[str] = flag(None, "base policy: folder or Hub id [none: toy world]", stage="data")
    preferences: Optional[str] = flag(None, "chosen and rejected, or ranked: file, folder, Hub id",
                                      stage="data")
    max_pairs: Optional[int] = flag(None, "use at most so many preferences", "[1, inf)", stage="data")
    held_out: float = flag(0.1, "share of prompts held out, where the data have no test split",
                           "(0, 1)", stage="data")
    max_prompt_tokens: int = flag(1024, "longer prompts lose their oldest turns, or their start",
                                  "[1, inf)", toy=64, stage="data")
    max_response_tokens: int = flag(1024, "longer responses are cut, and then carry no EOS",
                                    "[1, inf)", toy=64, stage="data")
    rendered_text: bool = flag(False, "texts were rendered by the chat template before: read the "
                               "special tokens in them", stage="data")
    train_on: Literal["last_turn", "all_assistant_turns"] = flag(
        "last_turn", "which turns of `messages` carry the loss", stage="data")
    seed: int = flag(0, "of everything that is drawn", "[0, 4294967295]", stage="data")
    responses: Optional[str] = flag(None, "label these: rows with prompt, response", stage="samples")
    prompts: Optional[str] = flag(None, "generate for these: rows with prompt", stage="samples")
    samples: Optional[str] = flag(None, "train on these: rows with prompt, response, reward",
                                  stage="samples")
    reward_model: Optional[str] = flag(None, "sequence classifier: score with it, train none",
                                       stage="samples")
    sources: Literal["dataset+generated", "dataset", "generated"] = flag(
        "dataset+generated", "which responses are labelled", stage="samples")
    samples_per_prompt: int = flag(1, "generated responses a prompt", "[1, inf)", toy=9,
                                   stage="samples")
    temperature: float = flag(1.0, "of all sampling; 0: greedy", "[0, 1000]", stage="samples")
    top_p: float = flag(1.0, "sample from the smallest set of tokens with this probability",
                        "[0.000001, 1]", stage="samples")
    judge: Optional[str] = flag(None, "a reward model that training never asks: its score is `gold`",
                                stage="evaluation")
    eval_prompts: int = flag(256, "held-out prompts evaluated on, round and round if there are "
                             "fewer; 0: none", "[0, inf)", toy=512, stage="evaluation")
    lr: float = flag(1e-5, "peak learning rate; 3 % warm-up, then cosine to 0", "(0, 1000]",
                     stage="training")
    epochs: int = flag(1, "passes over the training examples", "[1, inf)", stage="training")
    steps: Optional[int] = flag(None, "optimiser steps, in place of --epochs", "[1, inf)",
                                stage="training")
    batch_size: int = flag(128, "sequences per optimiser step, all ranks together", "[1, inf)",
                           toy=32, stage="training")
    micro_batch_tokens: Optional[int] = flag(
        None, "tokens of a forward, the memory knob [CPU: 8,192; GPU: what fits]", "[1, inf)",
        toy=16384)
    slots: Optional[int] = flag(
        None, "responses sampled at a time [CPU: 64; GPU: what fits, at most 512]", "[1, inf)")
    dtype: Literal["auto", "bf16", "fp32"] = flag(
        "auto", "of matrix products, weights stay float32; auto: bf16 where the hardware has it",
        toy="fp32")
    compile: bool = flag(True, "torch.compile the loss kernels, and on a GPU the model's blocks")
    sharding: Literal["ddp", "fsdp"] = flag(
        "ddp", "fsdp: weights, gradients and optimiser spread over the ranks (FSDP2)")
    save_every: Optional[int] = flag(None, "steps between checkpoints, two are kept; 0: none [a "
                                     "tenth of the run, at most 500]", "[0, inf)")
    resume: bool = flag(True, "go on from the last checkpoint; --no_resume starts the stage again")
    dist_timeout_minutes: int = flag(10, "how long a rank waits for another", "[1, inf)")
    gradient_checkpointing: bool = flag(
        False, "recompute activations in backward: less memory, a third more compute")
    report_to: Literal["none", "tensorboard", "wandb", "trackio"] = flag(
        "none", "where the metrics go beside metrics.jsonl")

    def __post_init__(self) -> None:
        for f in fields(self):
            value, interval = getattr(self, f.name), f.metadata["help"].within
            if interval is None or value is None:
                continue
            low, high = map(float, interval[1:-1].split(","))
            for v in value if isinstance(value, list) else [value]:
                inside = (low <= v <= high and (v > low or interval[0] == "[")
                          and (v < high or interval[-1] == "]"))
                require(inside, f"--{f.name} must lie in {interval}, not {v}")
        hint = "--model: name the base policy's folder or Hub id"
        require(self.toy or self.model, f"--preferences goes with {hint}")
        require(not self.toy or not (self.samples or self.responses or self.prompts),
                f"--samples, --responses and --prompts go with {hint}")
        require(self.toy or self.preferences or self.samples or
                (self.prompts or self.responses) and self.reward_model, "--model needs data: "
                "--preferences, or --samples, or --prompts or --responses with --reward_model")

    @property
    def toy(self) -> bool:
        """Whether the embedded toy world is meant."""
        return self.model is None and self.preferences is None


OTHER_NAMES = {  # flags of older versions and of TRL -> ours
    "patience": "dist_timeout_minutes", "tensorboard": "report_to", "learning_rate": "lr",
    "num_train_epochs": "epochs", "max_steps": "steps", "output_dir": "out", "bf16": "dtype bf16",
    "model_name_or_path": "model", "dataset_name": "preferences", "save_steps": "save_every",
    "per_device_train_batch_size": "batch_size (sequences a step, all ranks together)",
    "gradient_accumulation_steps": "micro_batch_tokens (accumulation follows from it)",
    "max_prompt_length": "max_prompt_tokens", "max_completion_length": "max_response_tokens",
    "max_length": "max_prompt_tokens and --max_response_tokens"}


def parse(kind: type, args: Optional[list[str]] = None) -> Any:
    """The command line, after --config's YAML file, as this kind of config."""
    from transformers import HfArgumentParser

    def wrong_flag(message: str) -> None:
        raise BadInput(message)
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", help="YAML file of flags; those of the command line win")
    about = (sys.modules[kind.__module__].__doc__ or "").split("\n\n")[0]
    parser = HfArgumentParser(kind, parents=[first], allow_abbrev=False, description=about)
    first.error = parser.error = wrong_flag
    file, args = first.parse_known_args(args)
    args = (yaml_flags(file.config) if file.config else []) + args
    names = {a.split("=")[0].removeprefix("--") for a in args if a.startswith("--")}
    for name in names & OTHER_NAMES.keys():
        raise BadInput(f"--{name}: here it is --{OTHER_NAMES[name]}")
    if not names & {"model", "preferences"}:
        parser.set_defaults(**toy_defaults(kind))
    if "epochs" in names:
        parser.set_defaults(steps=None)  # the toy world's steps would win
    cfg, _, unknown = parser.parse_args_into_dataclasses(args, return_remaining_strings=True)
    require(not unknown, f"unknown flag {' '.join(unknown)}; --help lists them all")
    return cfg


def yaml_flags(path: str) -> list[str]:
    """The flags in a YAML file, as a command line."""
    import yaml
    try:
        flags = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeError, yaml.YAMLError) as problem:
        raise BadInput(f"--config {path}: {' '.join(str(problem).split())}") from problem
    require(isinstance(flags, dict), f"--config {path}: must hold lines of `flag: value`")
    return [text for name, value in flags.items() if value is not None
            for text in (f"--{name}", *map(str, value if isinstance(value, list) else [value]))]


def toy_defaults(kind: type) -> dict:
    """The defaults of this kind of config that differ in the toy world."""
    toy = {f.name: f.metadata["help"].toy for f in fields(kind)}
    return {name: value for name, value in toy.items() if value is not None}


def other_config(kind: type, cfg: Config, training_flags: dict) -> Any:
    """Another script's Config for the same run: cfg's shared flags, these or default ones else."""
    own = {f.name for f in fields(kind) if f.metadata["help"].stage == "training"}
    shared = {f.name: getattr(cfg, f.name) for f in fields(Config) if f.name not in own}
    given = {name: value for name, value in training_flags.items() if name in own}
    return kind(**{**(toy_defaults(kind) if cfg.toy else {}), **shared, **given})


def compute_dtype(cfg: Config) -> torch.dtype:
    """The dtype of matrix products: bf16 where asked for, or where hardware multiplies in it."""
    gpu = device().type == "cuda"
    native = (torch.cuda.is_bf16_supported(including_emulation=False) if gpu
              else torch.cpu._is_avx512_bf16_supported())
    return torch.bfloat16 if cfg.dtype == "bf16" or cfg.dtype == "auto" and native else torch.float32


# ----------------------------------------------------------------------------------------- stages
# A run is a chain of stages.  Each leaves a record (run.json) of the settings it was built with,
# and is not built again while they match.  Everything is written beside and renamed.


class Stage(NamedTuple):
    """A finished stage: its folder (or Hub id), what identifies it, what it cost.

    A reward model's load_scorer() loads it, and returns score(prompts, responses, truncated, cost).
    """
    folder: str
    fingerprint: str
    cost: Cost
    load_scorer: Optional[Callable] = None


@dataclass
class Cost:
    """Seconds of the wall; of all ranks: seconds, FLOPs, sampled tokens; the largest's memory."""
    seconds: float = 0.0
    device_seconds: float = 0.0
    flops: float = 0.0
    generated_tokens: int = 0
    peak_memory_bytes: int = 0

    def __add__(self, other: Cost) -> Cost:
        *mine, peak = vars(self).values()
        *theirs, other_peak = vars(other).values()
        return Cost(*map(sum, zip(mine, theirs)), max(peak, other_peak))

    def add_forward(self, model: Any, tokens: int, pairs: int, rows: int, passes: int = 1) -> None:
        """Adds a transformer's call: tokens, pairs of a token and what it attends to, head rows.

        A weight costs 2 FLOPs a token, attention 4 a layer, pair and unit of width; backward twice
        as much again (passes=3).  The head costs on the rows where it runs, the input embedding is
        a look-up.  (Kaplan et al. 2020, arXiv 2001.08361, section 2.1.)
        """
        body, shape = model.base_model, model.config.get_text_config()
        embedding, head = body.get_input_embeddings().weight, model.get_output_embeddings()
        weights = sum(p.numel() for p in body.parameters()) - embedding.numel()
        self.flops += passes * (2 * weights * tokens
                                + 4 * shape.num_hidden_layers * shape.hidden_size * pairs
                                + (2 * head.weight.numel() * rows if head is not None else 0))


@contextlib.contextmanager
def track_cost() -> Iterator[Cost]:
    """Yields a Cost that the block's work adds to; at the end it holds all ranks' together."""
    cost, start, gpu = Cost(), time.perf_counter(), device().type == "cuda"
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    else:
        with contextlib.suppress(OSError):  # Linux alone can forget a process's peak
            Path("/proc/self/clear_refs").write_text("5")
    yield cost
    cost.seconds += time.perf_counter() - start
    cost.flops, tokens, cost.device_seconds = sum_over_ranks(
        cost.flops, cost.generated_tokens, cost.seconds)
    cost.generated_tokens = round(tokens)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    cost.peak_memory_bytes = max(gather(torch.cuda.max_memory_allocated() if gpu else peak))


def build_stage(cfg: Config, name: str, wanted: dict, make: Callable[[Path, Cost], Any]) -> Stage:
    """The stage in the folder `name` of the run, from before, or built by make(folder, cost).

    make returns what else its record holds, or a function that finds it and costs nothing.
    """
    folder = Path(cfg.out, name).resolve()
    if not is_fresh(name, folder / "run.json", wanted):
        torch.manual_seed(cfg.seed)
        with new_folder(folder, wanted, cfg.resume) as work:
            with track_cost() as cost:
                more = make(work, cost)
            gc.collect()  # a sharded model is full of cycles, and the next stage needs the memory
            more = more() if callable(more) else more or {}
            write_record(work / "run.json", wanted, cost, **more)
    record = read_record(folder / "run.json")
    return Stage(os.path.join(cfg.out, name), fingerprint(record["settings"]), read_cost(record))


def train_stage(cfg: Config, algorithm: str, train: Callable, base: Stage, samples: Samples,
                *stages: str, **more: Any) -> Stage:
    """The algorithm's policy: from before, or train(cfg, base, samples, folder, cost)'s.

    It depends on training flags, base policy and samples, flags of other `stages`, and `more`.
    """
    names = ("seed", "max_prompt_tokens", "max_response_tokens", "rendered_text", "train_on")
    wanted = settings(cfg, "training", *stages, **{name: getattr(cfg, name) for name in names},
                      base=base.fingerprint, samples=samples.fingerprint, **more)
    return build_stage(cfg, algorithm, wanted, functools.partial(train, cfg, base, samples))


def settings(cfg: Config, *stages: str, **more: Any) -> dict:
    """The flags these stages depend on, and more; files stand as hashes of what is in them."""
    found = {f.name: getattr(cfg, f.name) for f in fields(cfg)
             if f.metadata["help"].stage in stages}
    for name in ("model", "preferences", "responses", "prompts", "samples", "reward_model",
                 "judge"):
        if found.get(name):
            found[name] = content_hash(found[name])
    return {**found, **more}


def content_hash(source: str) -> str:
    """Of a file, or of a folder's files and their names, every byte of them; a Hub id is itself."""
    root = Path(source)
    if not root.exists():
        return source
    require(root.is_file() or root.is_dir(), f"{source}: a pipe or device; give a regular file")
    hashes = []
    for path in [root] if root.is_file() else visible_files(root):
        size, changed = path.stat().st_size, path.stat().st_mtime_ns
        hashes.append((str(path.relative_to(root)), hash_file(path, size, changed)))
    return fingerprint(hashes)


@functools.cache
def hash_file(path: Path, size: int, changed: int) -> str:
    """Of all bytes of a file of this size and time of change: read once by a process."""
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(2**24):
            found.update(part)
    return found.hexdigest()


def visible_files(root: Path) -> list[Path]:
    """A folder's files, those of its folders too, through links; nothing hidden."""
    found = map(root.joinpath, glob.glob("**", root_dir=root, recursive=True))
    return sorted(path for path in found if not path.is_dir())


def fingerprint(what: Any) -> str:
    """Twelve hex digits of a JSON-able value."""
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:12]


def read_record(path: Path) -> dict:
    """A JSON object from a file, {} where there is none."""
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def read_cost(record: dict) -> Cost:
    """The cost in a stage's record; what other versions and programs wrote there is passed over."""
    cost = record.get("cost")
    known = cost if isinstance(cost, dict) else {}
    return Cost(**{f.name: known[f.name] for f in fields(Cost) if f.name in known})


def is_fresh(stage: str, record: Path, wanted: dict) -> bool:
    """Whether the stage was built with the wanted settings; says so, or which ones changed."""
    finish_interrupted_swap(record.parent)
    built, wanted = read_record(record).get("settings") or {}, json.loads(json.dumps(wanted))
    changes = [f"{name} ({built.get(name)} -> {value})" for name, value in wanted.items()
               if built.get(name) != value]
    if built and changes:
        print0(f"{stage}: built again because of {', '.join(changes)}")
    else:
        where = f"{os.path.relpath(record.parent)}, from before"
        print0(f"{stage}: {where if built else 'to be built'}")
    return bool(built) and not changes


@contextlib.contextmanager
def new_folder(path: Path, wanted: dict, resume: bool = True) -> Iterator[Path]:
    """Yields a folder beside `path` to write into, and renames it to `path` when all is written.

    An unfinished stage's checkpoints in it are gone on from.  Raises BadInput where they are of
    other settings: work is deleted only when --no_resume says so.
    """
    work, old = path.with_name(f".{path.name}.new"), path.with_name(f".{path.name}.old")
    started, asked = read_record(work / "started.json"), json.loads(json.dumps(wanted))
    changed = [name for name in asked if started.get(name) != asked[name]]
    require(not (resume and changed and any(checkpoints_in(work))), f"{work}: holds checkpoints "
            f"of a run with another {', '.join(changed)}; give that run's flags to go on with it, "
            "--no_resume to start anew, or another --out")
    barrier()
    if rank() == 0:
        if changed or not resume:
            shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True, exist_ok=True)
        for stray in work.glob(".tmp*"):  # a kill while weights were written
            stray.unlink()
        write_beside(work / "started.json", [json.dumps(wanted)])
    barrier()
    try:
        yield work
    except BaseException:
        if rank() == 0 and not any(checkpoints_in(work)):
            shutil.rmtree(work, ignore_errors=True)
        raise
    barrier()
    if rank() == 0:
        for file in filter(Path.is_file, work.iterdir()):
            shutil.copymode(work / "started.json", file)  # safetensors writes for its owner alone
            with open(file, "rb") as written:
                os.fsync(written.fileno())
        shutil.rmtree(old, ignore_errors=True)
        if path.exists():
            path.rename(old)
        work.rename(path)
    finish_interrupted_swap(path)


def finish_interrupted_swap(path: Path) -> None:
    """Ends the replacement of a folder, wherever a kill may have broken it off."""
    old, started = path.with_name(f".{path.name}.old"), path / "started.json"
    if rank() == 0:
        if old.exists() and not path.exists():
            old.rename(path)
        if started.exists():  # else the folder is whole, or was never a stage's
            for scratch in (old, path / "checkpoints", path / "tokens"):
                shutil.rmtree(scratch, ignore_errors=True)
            started.unlink()
    barrier()


def checkpoints_in(folder: Path) -> list[Path]:
    """A stage's checkpoints, the last first."""
    return sorted((folder / "checkpoints").glob("[0-9]*"), reverse=True)


def write_beside(path: Path, lines: Iterable[str]) -> None:
    """Writes lines beside the file and renames: a kill leaves the old or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.new")
    with open(beside, "w", encoding="utf-8") as file:
        file.writelines(line + "\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def write_record(path: Path, wanted: dict, cost: Cost, **more: Any) -> None:
    """Writes a stage's record on rank 0: settings, cost and what else belongs to it."""
    record = {"settings": wanted, "cost": asdict(cost), "torch": torch.__version__,
              "world_size": world_size(), **more}
    if rank() == 0:
        write_beside(path, [json.dumps(record, indent=1)])
    barrier()


# -------------------------------------------------------------------------------------- tokenizer
# Prompt and response are encoded apart, so that the boundary between them is exact.  How a turn
# ends is the model's to say: its stop tokens, and what its chat template writes.

GPT2_SPLIT = (r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
# The same after each digit was set apart, as SmolLM2 does: there white space ends at a digit, too.
DIGITS_SPLIT = (r"\p{N}|'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+"
                r"|\s+(?![^\s\p{N}])|\s+")
PROBE = ("Hello  world,\n\n\n  it's 12345 o'clock…\tnaïve café 東京タワー привет שלום \U0001f468‍"
         "\U0001f469‍\U0001f467\U0001f3fd \r\nx  7  y   \n 3.14e-10 ½²³ <|endoftext|>user <s></s>"
         "[INST] don't WE'LL I'd   trailing   ", "    def f(x):\n        return x**2  # \t\t!\n\n",
         "1 2  3   4    5 a1b22c333 ,,,...;;; ====---- ___", " ", "\n", "é", "")


class Codec:
    """Text to token ids and back for one model: its tokenizer, and how its turns end."""

    def __init__(self, folder: str, cfg: Config):
        """Raises BadInput where the folder or Hub id has no tokenizer that could end a response."""
        from transformers import AutoTokenizer
        with load_errors(folder, "a tokenizer"):
            self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        self.cfg, self.said = cfg, set()
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        self.bos = [t for t in self.tokenizer("")["input_ids"] if t == bos or t != eos]
        self.encode = text_encoder(self.tokenizer)
        self.before, self.before_ids = self._context()
        self.configs, told = saved_configs(folder), [eos]
        for t in (getattr(config, "eos_token_id", None) for config in self.configs[::-1]):
            told += t if isinstance(t, list) else [t]
        self.stop_ids = list(dict.fromkeys(t for t in told if t is not None))
        require(self.stop_ids, f"{folder}: neither its tokenizer nor its configuration has an EOS "
                "token, so no response could end")
        self.eos = [self.stop_ids[0] if eos is None else eos]  # ends a response to a text prompt
        self.turn_end = self.turn_tail = self.eos              # and one to chat messages
        if self.tokenizer.chat_template:
            self._read_turn_end(folder)
        self.check_fits(folder)

    def check_fits(self, folder: str, tag: str = "") -> None:
        """Raises BadInput if the tokenizer has more tokens than the model has embeddings, or prompt,
        BOS, reward tag and response are longer together than its positions."""
        cfg, longer = self.cfg, self.bos + self.encode([tag])[0]
        need = cfg.max_prompt_tokens + cfg.max_response_tokens + len(longer)
        for config in self.configs:
            shape = config.get_text_config() if hasattr(config, "get_text_config") else config
            rows, most = (getattr(shape, name, None) or math.inf
                          for name in ("vocab_size", "max_position_embeddings"))
            require((size := len(self.tokenizer)) <= rows, f"{folder}: the tokenizer has {size:,} "
                    f"tokens and the model {rows:,} embeddings; resize_token_embeddings first")
            require(need <= most, f"{folder} reads at most {most} tokens, and prompt, response"
                    f"{', BOS' * bool(self.bos)}{', reward tag' * bool(tag)} may take {need}: "
                    "lower --max_prompt_tokens or --max_response_tokens")

    def _context(self) -> tuple[str, list[int]]:
        """Text (and its ids) to encode responses after, where a tokenizer marks the first word."""
        for text in ("", "\n", ":"):
            ids = self.encode([text])[0]
            after = [self.encode([text + probe])[0] for probe in ("a", "\na")]
            if all(row[:len(ids)] == ids for row in after):
                if text or self.encode(["\na"])[0][len(self.encode(["\n"])[0]):] == after[0]:
                    return text, ids
        return "", []

    def _read_turn_end(self, folder: str) -> None:
        """What the chat template writes after an assistant's turn, and where in it the turn ends."""
        marked = [{"role": "user", "content": "\ue000"}, {"role": "assistant", "content": "\ue001"}]
        try:
            tail = self.tokenizer.apply_chat_template(marked, tokenize=False).split("\ue001")[-1]
        except Exception:  # a template that needs more than two plain turns
            tail = ""
        ids = self._template_ids(tail)
        special = {*self.stop_ids, *self.tokenizer.added_tokens_decoder}
        end = next((i for i, t in enumerate(ids) if t in special), None)
        if end is None:
            return
        self.turn_end, self.turn_tail = ids[:end + 1], ids
        if ids[end] not in self.stop_ids:
            token = self.tokenizer.convert_ids_to_tokens(ids[end])
            print_once(f"{folder}: its chat template ends a turn with {token}, which neither its "
                       "tokenizer nor its generation_config names as an end: taken as one here")
            self.stop_ids.append(ids[end])

    def _template_ids(self, text: str) -> list[int]:
        """Ids of text that a template wrote: special tokens are what they are."""
        ids = self.tokenizer(self.before + text, add_special_tokens=False)["input_ids"]
        return ids[len(self.before_ids):] if ids[:len(self.before_ids)] == self.before_ids else \
            self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def continuations(self, texts: list[str]) -> list[list[int]]:
        """Ids of texts that continue others: no word marker at the start that was not written."""
        if self.cfg.rendered_text:
            return [self._template_ids(text) for text in texts]
        self.notice_special_text(texts)
        if not self.before:
            return self.encode(texts)
        whole, n = self.encode([self.before + text for text in texts]), len(self.before_ids)
        return [row[n:] if row[:n] == self.before_ids else self.encode([text])[0]
                for row, text in zip(whole, texts)]

    def notice_special_text(self, texts: list[str]) -> None:
        """Says once if texts look rendered: they begin or end with the text of a special token."""
        special = tuple(t.content for t in self.tokenizer.added_tokens_decoder.values() if t.special)
        count = sum(t.startswith(special) or t.rstrip().endswith(special) for t in texts)
        if special and count and "rendered" not in self.said:
            self.said.add("rendered")
            print0(f"  {count} of {len(texts)} texts begin or end with a special token's text, which "
                   "is read as plain characters; if a chat template wrote it, give --rendered_text")

    def prompts(self, prompts: list, max_tokens: Optional[int] = None) -> list[list[int]]:
        """Prompts as ids: text after BOS, chat messages through the template up to the reply.

        Longer ones are cut to `max_tokens`: text at its start, chat messages lose oldest turns.
        """
        most = max_tokens or self.cfg.max_prompt_tokens
        plain = [p for p in prompts if isinstance(p, str)]
        if self.cfg.rendered_text:
            texts = iter(self.tokenizer(plain, add_special_tokens=False)["input_ids"] if plain else [])
        else:
            self.notice_special_text(plain)
            texts = iter(self.encode(plain))
        found, cut = [], 0
        for prompt in prompts:
            ids = next(texts) if isinstance(prompt, str) else self.chat(prompt)
            if len(ids) > most:
                cut += 1
                ids = self._cut_start(ids, most) if isinstance(prompt, str) else \
                    self.chat(self._shorten(prompt, most))
            there = not isinstance(prompt, str) or ids[:len(self.bos)] == self.bos
            found.append(ids if there else self.bos + ids)
        if cut and most not in self.said:
            self.said.add(most)  # PPO encodes prompts at each iteration
            print0(f"  {cut:,} of {len(prompts):,} prompts are longer than {most} tokens and were "
                   "cut: text at its start, chat messages by their oldest turns")
        return found

    def _cut_start(self, ids: list[int], most: int) -> list[int]:
        """The last tokens, from where a character begins."""
        ids = ids[-most:]
        broken = self.tokenizer.decode(ids)
        while ids and broken.startswith("\ufffd"):
            ids = ids[1:]
            broken = self.tokenizer.decode(ids)
        return ids

    def cut_end(self, ids: list[int], most: int) -> list[int]:
        """The first tokens, up to where a character ends."""
        cut = ids[:most]
        while len(cut) > 1 and len(ids) > most and self.tokenizer.decode(cut[-8:]).endswith("\ufffd"):
            cut = cut[:-1]
        return cut

    def _shorten(self, messages: list[dict], most: int) -> list[dict]:
        """The conversation without its oldest turns; the last one, if need be, without its start."""
        system = [m for m in messages[:1] if m["role"] == "system"]
        turns = messages[len(system):]
        while len(turns) > 1 and len(self.chat(system + turns)) > most:
            turns = turns[2 if len(turns) > 2 and turns[1]["role"] == "assistant" else 1:]
        while (over := len(self.chat(system + turns)) - most) > 0:
            content = self.encode([turns[0]["content"]])[0]
            require(len(content) > over, f"--max_prompt_tokens {most}: too few for the chat template "
                    "and the system message of a conversation")
            shorter = self.tokenizer.decode(self._cut_start(content, len(content) - over))
            turns = [{**turns[0], "content": shorter}]
        return system + turns

    def chat(self, messages: list[dict], reply: bool = True) -> list[int]:
        """Messages through the template, up to where the reply begins if one is to follow;
        the text of special tokens in a message stays text."""
        special = [t.content for t in self.tokenizer.added_tokens_decoder.values() if t.special]
        if any(token in m["content"] for m in messages for token in special):
            return [t for ids, _ in self._pieces(messages, reply) for t in ids]
        return self._render(messages, add_generation_prompt=reply, return_dict=False)

    def _render(self, messages: list[dict], **more: Any) -> Any:
        require(self.tokenizer.chat_template is not None,
                "the data are chat messages, but the tokenizer has no chat template")
        try:
            return self.tokenizer.apply_chat_template(messages, **more)
        except Exception as problem:  # a template is a program, and may fail as one
            raise BadInput("the tokenizer's chat template refuses a conversation: "
                           + " ".join(str(problem).split())[:200]) from problem

    def _pieces(self, messages: list[dict], reply: bool) -> Iterator[tuple[list[int], Optional[int]]]:
        """(ids, the message they are the content of, or None) of what the template renders."""
        marked = [{**m, "content": f"\ue000{i}\ue001"} for i, m in enumerate(messages)]
        text = self._render(marked, add_generation_prompt=reply, tokenize=False)
        for i, piece in enumerate(re.split("\ue000(\\d+)\ue001", text)):
            if i % 2:
                yield self.continuations([messages[int(piece)]["content"]])[0], int(piece)
            elif piece:
                yield self._template_ids(piece), None

    def pairs(self, prompts: list, responses: list[str], truncated: Optional[list[bool]] = None,
              whole: bool = False) -> list[tuple[np.ndarray, np.ndarray]]:
        """(ids (T,), response mask (T,)) of prompt and response, the response ended as a turn ends
        unless it is cut off, or longer than --max_response_tokens.

        `whole`: as the template renders the whole conversation, which is what reward models read.
        """
        most, broken = self.cfg.max_response_tokens, truncated or [False] * len(responses)
        found = []
        for prompt, response, before, ids, cut in zip(
                prompts, responses, self.prompts(prompts), self.continuations(responses), broken):
            end = self.eos if isinstance(prompt, str) else self.turn_tail if whole else self.turn_end
            ended = ids[-1:] and ids[-1] in self.stop_ids and self.cfg.rendered_text
            after = self.cut_end(ids if cut or ended else ids + end, most)
            row = before + after
            if whole and after[len(ids):] == end and not isinstance(prompt, str):
                row = self.chat([*self._shorten(prompt, self.cfg.max_prompt_tokens),
                                 {"role": "assistant", "content": response}], reply=False)
            found.append((np.array(row, dtype=np.int32), np.arange(len(row)) >= len(before)))
        return found

    def sequences(self, samples: list[Sample]) -> list[tuple[np.ndarray, np.ndarray]]:
        """(ids, response mask) of samples, as --train_on says."""
        if self.cfg.train_on == "last_turn":
            return self.pairs([s.prompt for s in samples], [s.response for s in samples],
                              [s.truncated for s in samples])
        return [self.all_turns(s.prompt, s.response, s.truncated) if isinstance(s.prompt, list) else
                self.pairs([s.prompt], [s.response], [s.truncated])[0] for s in samples]

    def all_turns(self, prompt: list[dict], response: str,
                  truncated: bool) -> tuple[np.ndarray, np.ndarray]:
        """pairs(), with every assistant turn of the conversation in the mask."""
        kept, end = self._shorten(prompt, self.cfg.max_prompt_tokens), self.turn_end
        if kept != prompt:
            print_once(f"conversations longer than {self.cfg.max_prompt_tokens} tokens before the "
                       "last turn lose their oldest turns")
        messages = [*kept, {"role": "assistant", "content": response}]
        ids, mask, ours = [], [], False
        for piece, message in self._pieces(messages, reply=False):
            learnt = len(end) if piece[:len(end)] == end else len({*piece[:1]} & {*self.stop_ids})
            learnt *= ours  # tokens of the piece that end the assistant's turn before it
            ours = message is not None and messages[message]["role"] == "assistant"
            if message == len(kept):
                break
            mask += [ours or i < learnt for i in range(len(piece))]
            ids += piece
        last = self.cut_end(piece if truncated else piece + end, self.cfg.max_response_tokens)
        return np.array(ids + last, dtype=np.int32), np.array(mask + [True] * len(last))

    def decode(self, response: Response) -> str:
        """A sampled response's text, without what ended it."""
        ids, end = response.ids, self.turn_end
        if not response.truncated:
            ids = ids[:-len(end)] if ids[-len(end):] == end else ids[:-1]
        text = self.tokenizer.decode(self.before_ids + ids)
        start = self.tokenizer.decode(self.before_ids)
        return text[len(start):] if text.startswith(start) else self.tokenizer.decode(ids)


def saved_configs(folder: str) -> list:
    """A model's config and generation config: those that there are."""
    from transformers import AutoConfig, GenerationConfig
    found = []
    for kind, more in ((AutoConfig, {"trust_remote_code": False}), (GenerationConfig, {})):
        with contextlib.suppress(OSError, ValueError):
            found.append(kind.from_pretrained(folder, **more))
    return found


@contextlib.contextmanager
def load_errors(name: str, what: str) -> Iterator[None]:
    """transformers' own errors on a folder or Hub id, as one sentence."""
    folder = Path(name)
    require(not (folder / "adapter_config.json").exists(),
            f"{name}: a LoRA adapter; merge it into its base model first (peft: merge_and_unload)")
    for file in folder.glob("*.safetensors") if folder.is_dir() else ():
        with open(file, "rb") as f:
            require(not f.read(20).startswith(b"version https://git"),
                    f"{file}: a git-lfs pointer, not weights; run git lfs pull")
    try:
        yield
    except BadInput:
        raise
    except Exception as problem:  # of many libraries, safetensors' own among them
        if os_problem(problem) and not isinstance(problem, OSError):
            raise
        why = str(problem).strip().split("\n")[0][:200]
        raise BadInput(f"{name}: not a folder or Hub id with {what} that transformers can load "
                       f"({type(problem).__name__}: {why})") from problem


@functools.lru_cache(maxsize=8)
def text_encoder(tokenizer: Any) -> Callable[[list[str]], list[list[int]]]:
    """The encoder of plain texts, special tokens' text as text: tiktoken's if it proves equal to
    the tokenizer's own on its whole vocabulary and on hard text, else the tokenizer's."""
    def own(texts: list[str]) -> list[list[int]]:
        return tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True,
                         verbose=False)["input_ids"] if texts else []
    try:
        fast = tiktoken_encoder(tokenizer, own)
        words = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
        probe = [*PROBE, *map(tokenizer.convert_tokens_to_string, ([w] for w in words if w)),
                 " ".join(t.content for t in tokenizer.added_tokens_decoder.values())]
        return fast if fast(probe) == own(probe) else own
    except (AttributeError, KeyError, ValueError, IndexError, TypeError):
        return own  # no byte-level BPE


def tiktoken_encoder(tokenizer: Any, own: Callable) -> Callable[[list[str]], list[list[int]]]:
    """tiktoken's encoder from a byte-level BPE's merges.  Raises ValueError for other kinds.

    Texts with a byte that the vocabulary lacks, or with a word that no merge makes (Llama 3 has
    some), are left to own().
    """
    import tiktoken
    from transformers.convert_slow_tokenizer import bytes_to_unicode
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    steps = spec["pre_tokenizer"].get("pretokenizers", [spec["pre_tokenizer"]])
    kinds = [s["type"] for s in steps]
    if kinds == ["ByteLevel"] and steps[0]["use_regex"]:
        pattern = GPT2_SPLIT
    elif kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"] and steps[1]["use_regex"]:
        pattern = DIGITS_SPLIT
    elif (kinds == ["Split", "ByteLevel"] and steps[0]["behavior"] == "Isolated"
          and not steps[1]["use_regex"]):
        pattern = steps[0]["pattern"]["Regex"]
    else:
        raise ValueError(f"pre-tokenizer {kinds}")
    if spec["normalizer"] not in (None, {"type": "NFC"}) or any(s.get("add_prefix_space")
                                                                for s in steps):
        raise ValueError("normalizer")
    character = bytes_to_unicode()
    byte = {c: b for b, c in character.items()}
    tokens = [bytes([b]) for b in range(256)]
    for merge in spec["model"]["merges"]:
        left, right = merge if isinstance(merge, list) else merge.split(" ")
        tokens.append(bytes(byte[c] for c in left + right))
    vocabulary = spec["model"]["vocab"]
    merged = len(set(tokens))
    if spec["model"].get("ignore_merges"):  # a whole word that is in the vocabulary is one token
        tokens += [bytes(byte[c] for c in word) for word in vocabulary if all(c in byte for c in word)]
    ranks: dict[bytes, int] = {}
    for token in tokens:  # tiktoken merges by rank: the order of the merges, whatever the ids
        ranks.setdefault(token, len(ranks))
    ids = [vocabulary.get("".join(character[b] for b in token)) for token in ranks]
    encoding = tiktoken.Encoding("merges", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    normal = functools.partial(unicodedata.normalize, "NFC") if spec["normalizer"] else str

    def encode(texts: list[str]) -> list[list[int]]:
        found = [encoding.encode_ordinary(normal(text)) for text in texts]
        return [own([text])[0] if any(t >= merged or ids[t] is None for t in row)
                else [ids[t] for t in row] for text, row in zip(texts, found)]
    return encode


# ------------------------------------------------------------------------------------------- data
# Rows of other tools' shapes become (prompt, response, reward) or (prompt, ranked responses).
# Rows in = rows used + rows left out, by reason, said in one line.

TURN = "\n\nAssistant:"  # the reply's start in a transcript as HH has it
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant",
         **{role: role for role in ("system", "developer", "user", "assistant", "tool")}}
PROMPT_COLUMNS = {"prompt", "instruction", "input", "system", "conversations"}
PREFERENCE_COLUMNS = PROMPT_COLUMNS | {"chosen", "rejected", "ranked"}
SAMPLE_COLUMNS = PROMPT_COLUMNS | {"messages", "conversations", "response", "completion", "output",
                                   "reward", "label", "weight", "truncated", "source"}
UNREADABLE = {"history", "tools", "functions", "tool_calls", "image", "images", "audio", "video"}
TEST_SPLIT = r"(^|[/_.-])(test|val|valid|validation|eval|evaluation)([/_.-]|\d|$)"


class Ranking(NamedTuple):
    """A prompt and two responses or more, the one that people liked best first."""
    prompt: Any
    responses: tuple[str, ...]


class Sample(NamedTuple):
    """A response to a prompt; `truncated`: it was broken off, and carries no EOS."""
    prompt: Any
    response: str
    reward: float = math.nan
    source: str = "given"
    truncated: bool = False
    weight: float = math.nan


def read_source(source: str) -> Iterator[tuple[str, str, dict]]:
    """(file or split, "file, line 7", row) of a file, a folder or a Hub data set.

    .jsonl and .jsonl.gz are read here, all else by `datasets`, an optional package.
    """
    path = Path(source)
    if not path.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+(/[\w./-]+)?", source) and \
            not re.search(r"\.(jsonl?|ndjson|gz|parquet|csv)$", source.lower()):
        owner, name, *part = source.split("/", 2)
        yield from read_with_datasets(source, f"{owner}/{name}", data_dir=part[0] if part else None)
        return
    require(path.exists(), f"{source}: no such file, folder or Hub data set")
    require(path.is_file() or path.is_dir(), f"{source}: a pipe or device; give a regular file")
    files = visible_files(path) if path.is_dir() else [path]
    kinds = {file: next((kind for ending, kind in (
        (".jsonl", "jsonl"), (".jsonl.gz", "jsonl"), (".ndjson", "jsonl"), (".json.gz", "jsonl"),
        (".json", "json"), (".parquet", "parquet"), (".csv", "csv"))
        if file.name.lower().endswith(ending)), "jsonl" if path.is_file() else None) for file in files}
    rest = [str(file.relative_to(path)) for file in files if not kinds[file]]
    if rest:
        print0(f"  {source}: not read: {', '.join(rest[:9])}{' …' * (len(rest) > 9)}")
    require(any(kinds.values()), f"{source}: no .jsonl, .json, .parquet or .csv file in this folder")
    for file, kind in kinds.items():
        part = str(file.relative_to(path)) if path.is_dir() else file.name
        if kind == "jsonl":
            yield from ((part, place, row) for place, row in read_jsonl(file))
        elif kind:
            rows = read_with_datasets(str(file), kind, data_files=str(file))
            yield from ((part, place, row) for _, place, row in rows)


def read_jsonl(path: Path) -> Iterator[tuple[str, dict]]:
    """Rows of a .jsonl(.gz), each with its place.  Raises BadInput at a bad one."""
    number = 0
    try:
        with (gzip.open if path.name.lower().endswith(".gz") else open)(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                require(isinstance(row, dict), f"{path}, line {number}: not a JSON object but a "
                        f"{type(row).__name__}")
                if b"\\u" in line:
                    json.dumps(row, ensure_ascii=False).encode()  # half a surrogate pair is no text
                yield f"{path}, line {number}", row
    except UnicodeError as problem:
        raise BadInput(f"{path}, line {number}: not UTF-8 ({problem.reason})") from problem
    except (ValueError, RecursionError) as problem:
        raise BadInput(f"{path}, line {number}: not JSON ({problem})") from problem
    except (EOFError, gzip.BadGzipFile, zlib.error) as problem:
        raise BadInput(f"{path}, after line {number}: the gzip file is broken ({problem})") from problem


def read_with_datasets(source: str, kind: str, **more: Any) -> Iterator[tuple[str, str, dict]]:
    """(split, place, row) of what the `datasets` package reads."""
    try:
        import datasets
    except ImportError as problem:
        raise BadInput(f"{source}: needs the datasets package: pip install datasets") from problem
    try:
        splits = datasets.load_dataset(kind, **more)
        for split, rows in splits.items():
            for number, row in enumerate(rows, 1):
                yield split, f"{source}, {split} row {number}", row
    except BadInput:
        raise
    except Exception as problem:  # of datasets, pyarrow, pandas, fsspec and the Hub's client
        why = " ".join(str(problem.__cause__ or problem).split())[:200]
        raise BadInput(f"{source}: datasets cannot read it ({why})") from problem


def parsed_rows(source: str, columns: set[str], parse: Callable) -> Iterator[Any]:
    """parse(part, place, row, notes) of each row; a text in place of a result is the reason why
    the row is left out.  Says at the end how many rows were used, and what was not read."""
    total, used, reasons, unread, notes = 0, 0, Counter(), set(), Counter()
    for part, place, row in read_source(source):
        total += 1
        unread |= row.keys() - columns
        bad = [name for name in UNREADABLE if row.get(name)]
        require(not bad, f"{place}: the field {(bad or [''])[0]!r} bears on the text and cannot be "
                "read here")
        null = {name for name, value in row.items() if value is None} & columns
        row = {name: value for name, value in row.items() if value is not None}
        try:
            asks = {"prompt", "instruction"}
            found = "with a null field" if asks & null and not asks & row.keys() else \
                parse(part, place, row, notes)
        except BadInput as problem:
            if not null or "is missing" not in str(problem):
                raise
            found = "with a null field"
        if isinstance(found, str):
            reasons[found] += 1
        else:
            used += 1
            yield found
    left = ", ".join(f"{count:,} {why}" for why, count in reasons.items())
    said = "".join(f"; {count:,} {what}" for what, count in notes.items() if count)
    print0(f"  {source}: {used:,} of {total:,} rows used" + (f"; left out: {left}" if left else "")
           + said + (f"; columns not read: {', '.join(sorted(unread))}" if unread else ""))


def text_of(place: str, row: dict, name: str, kinds: tuple = (str,), what: str = "text") -> Any:
    """row[name], of one of these kinds.  Raises BadInput naming file, line and field."""
    require(name in row, f"{place}: the field {name!r} is missing")
    require(isinstance(row[name], kinds),
            f"{place}: the field {name!r} must be {what}, found {type(row[name]).__name__}")
    return row[name]


def number_of(place: str, row: dict, name: str) -> float:
    """row[name] as a finite number, also where it is written as text."""
    value = text_of(place, row, name, (int, float, str), "a number")
    try:
        value = float(value)
    except (ValueError, OverflowError):
        value = math.nan if isinstance(value, str) else math.inf
    require(not math.isnan(value) or not isinstance(row[name], str),
            f"{place}: the field {name!r} must be a number, found {row[name]!r}")
    require(abs(value) < 1e300, f"{place}: the field {name!r} must be finite, found {value}")
    return value


def messages_of(place: str, name: str, value: Any) -> list[dict]:
    """Chat messages as {"role", "content"}, from ShareGPT's names and text parts too."""
    found = []
    for m in value if isinstance(value, list) else []:
        m = {k: v for k, v in m.items() if v is not None} if isinstance(m, dict) else {}
        role, content = m.get("role", m.get("from")), m.get("content", m.get("value"))
        if isinstance(content, list) and all(isinstance(p, dict) and p.get("type") == "text"
                                             and isinstance(p.get("text"), str) for p in content):
            content = "".join(p["text"] for p in content)
        if isinstance(content, str) and isinstance(role, str) and role in ROLES and not any(
                map(m.get, (*UNREADABLE, "function_call", "reasoning_content", "thinking"))):
            found.append({"role": ROLES[role], "content": content})
    require(found and len(found) == len(value), f'{place}: the field {name!r} must be text or a list '
            'of {"role", "content"} messages of text; tool calls, thoughts and images are not read')
    return found


def prompt_of(place: str, row: dict) -> Any:
    """A row's prompt, text or messages: `prompt`; OpenRLHF's `input`; Alpaca's `instruction` and
    `input`, as a user's message; a `system` message goes before."""
    if "instruction" in row:
        parts = [text_of(place, row, n) for n in ("instruction", "input") if row.get(n)]
        prompt: Any = [{"role": "user", "content": "\n\n".join(parts)}]
        require(parts and "prompt" not in row, f"{place}: the field 'instruction' must be text, and "
                "stand without 'prompt'")
    else:
        name = next((n for n in ("prompt", "input", "conversations", "messages")
                     if n in row), "prompt")
        require(name != "prompt" or not row.get("input"),
                f"{place}: the fields 'prompt' and 'input' stand side by side; give one")
        prompt = text_of(place, row, name, (str, list), "text or chat messages")
        require(prompt if isinstance(prompt, list) else prompt.strip(),
                f"{place}: the field {name!r} is empty")
        prompt = messages_of(place, name, prompt) if isinstance(prompt, list) else prompt
    if row.get("system"):
        before = [{"role": "system", "content": text_of(place, row, "system")}]
        prompt = before + ([{"role": "user", "content": prompt}] if isinstance(prompt, str)
                           else prompt)
    return prompt


def sample_of(place: str, row: dict) -> Sample | str:
    """A row as a sample without its reward, from any tool's names; or why there is none in it."""
    whole = next((name for name in ("messages", "conversations") if name in row), None)
    if whole:
        before = [{"role": "system", "content": row["system"]}] if row.get("system") else []
        messages = before + messages_of(place, whole, row[whole])
        if messages[-1]["role"] != "assistant" or len(messages) < 2:
            return "conversations that do not end with the assistant"
        prompt, response = messages[:-1], messages[-1]["content"]
    else:
        name = next((n for n in ("response", "completion", "output") if n in row), "response")
        prompt, response = prompt_of(place, row), text_of(place, row, name, (str, list))
        if isinstance(response, list):
            reply = messages_of(place, name, response)
            require(len(reply) == 1, f"{place}: the field {name!r} must be one message, found "
                    f"{len(reply)}")
            response = reply[0]["content"]
    cut = row.get("truncated", False)
    known = {True: True, False: False, "true": True, "false": False, "1": True, "0": False, "": False}
    cut = known.get(cut.lower() if isinstance(cut, str) else cut if isinstance(cut, int) else None)
    require(cut is not None, f"{place}: the field 'truncated' must be true or false, found "
            f"{row.get('truncated')!r}")
    weight = number_of(place, row, "weight") if "weight" in row else math.nan
    require(not weight < 0, f"{place}: the field 'weight' must not be below 0, found {weight}")
    return Sample(prompt, response, math.nan, str(row.get("source", "given")), cut, weight)


def labelled_sample_of(place: str, row: dict) -> Sample | str:
    """A row as a sample with its reward; KTO's `label` is 1 or 0."""
    sample = sample_of(place, row)
    if isinstance(sample, str):
        return sample
    if "reward" not in row and isinstance(row.get("label"), (bool, int)):
        return sample._replace(reward=float(row["label"]))
    require(not isinstance(row.get("reward"), bool),
            f"{place}: the field 'reward' must be a number, found bool")
    return sample._replace(reward=number_of(place, row, "reward"))


def side_of(place: str, row: dict, name: str) -> Optional[tuple[Any, str]]:
    """One side of a preference as (prompt, response); None if it ends with the human.

    Without a `prompt` it must be a whole conversation.
    """
    value = text_of(place, row, name, (str, list, dict), "text or chat messages")
    given = prompt_of(place, row) if row.keys() & PROMPT_COLUMNS else None
    if isinstance(value, str):
        if given is not None:
            return given, value
        start, turn, response = value.rpartition(TURN)
        require(turn, f"{place}: the field {name!r} has no {TURN!r}: without a `prompt` it must be a "
                "transcript")
        require(start.strip(), f"{place}: the prompt of {name!r} is empty")
        return None if "\n\nHuman:" in response else (start + turn, response)
    value = messages_of(place, name, [value] if isinstance(value, dict) else value)
    if value[-1]["role"] != "assistant":
        return None
    if len(value) == 1:  # a reply alone
        require(given is not None, f"{place}: the field {name!r} is a reply to nothing: the field "
                "'prompt' is missing")
        return given, value[0]["content"]
    if given is not None:  # the prompt once, whether the side repeats it or goes on from it
        given = given if isinstance(given, list) else [{"role": "user", "content": given}]
        asked = [m["content"].strip() for m in given if m["role"] != "system"]
        said = [m["content"].strip() for m in value]
        there = any(said[i:i + len(asked)] == asked for i in range(len(said)))
        require(there or value[0]["role"] != given[-1]["role"],
                f"{place}: the field {name!r} is a conversation without the row's prompt in it")
        value = [m for m in given if not there or m["role"] == "system" and m not in value] + value
    return value[:-1], value[-1]["content"]


def ranking_of(part: str, place: str, row: dict, notes: Counter) -> Ranking | str:
    """A row's preference, or why it is none."""
    if "ranked" in row:
        prompt, ranked = prompt_of(place, row), row["ranked"]
        require(isinstance(ranked, list) and len(ranked) > 1 and all(isinstance(t, str)
                                                                     for t in ranked),
                f"{place}: the field 'ranked' must be a list of two texts or more, best first")
        said = tuple(text for text in ranked if text.strip())
        notes["blank responses in `ranked` left out"] += len(ranked) - len(said)
        return Ranking(prompt, said) if len(said) > 1 else "with an empty response"
    sides = [side_of(place, row, name) for name in ("chosen", "rejected")]
    if None in sides:
        return "ending with the human"
    (prompt, chosen), (other, rejected) = sides
    if prompt_key(prompt) != prompt_key(other):
        return "differing in more than the last response"
    if isinstance(prompt, str) and chosen.startswith(prompt) and rejected.startswith(prompt):
        notes["repeated their prompt in both sides: read once"] += 1
        chosen, rejected = chosen[len(prompt):], rejected[len(prompt):]
    if not (chosen.strip() and rejected.strip()):
        return "with an empty response"
    notes["with two equal responses, from which nothing is learnt"] += chosen == rejected
    return Ranking(prompt, (chosen, rejected))


@functools.lru_cache(maxsize=2)
def read_preferences(source: str, share: float, seed: int,
                     most: Optional[int]) -> tuple[list[Ranking], list[Ranking]]:
    """Preferences for training and held out, split by prompt.

    Files, folders and splits named test, val, valid, validation, eval or evaluation are held out;
    where there are none, or nothing else, prompts are held out by hash and seed.
    """
    found = list(parsed_rows(source, PREFERENCE_COLUMNS, lambda part, *rest: (
        (part, result) if isinstance(result := ranking_of(part, *rest), Ranking) else result)))
    require(found, f"{source}: no usable preference")
    is_test = {part: bool(re.search(TEST_SPLIT, part)) for part, _ in found}
    split = any(is_test.values()) and not all(is_test.values())
    train, test = [], []
    for part, ranking in found:
        hidden = is_test[part] if split else is_held_out(ranking.prompt, share, seed)
        (test if hidden else train).append(ranking)
    seen = {prompt_key(p.prompt) for p in test}
    kept = [p for p in train if prompt_key(p.prompt) not in seen]
    require(kept, f"{source}: no preference is left to train on")
    require(test, f"{source}: no preference is held out; give more data or a larger --held_out")
    order = random.Random(seed)
    order.shuffle(kept)
    order.shuffle(test)
    leaked = len(train) - len(kept)
    print0(f"  {len(kept[:most]):,} preferences to train on, {len(test):,} held out, split by prompt"
           + (f"; {leaked:,} left out as their prompt is held out" if leaked else "")
           + (f"; {len(kept) - most:,} left out by --max_pairs" if most and len(kept) > most else ""))
    return kept[:most], test


def load_preferences(cfg: Config) -> tuple[list[Ranking], list[Ranking]]:
    """The run's preferences, for training and held out."""
    source = toy_data(cfg) if cfg.toy else cfg.preferences
    return read_preferences(source, cfg.held_out, cfg.seed, cfg.max_pairs)


def prompt_key(prompt: Any) -> str:
    """A prompt as a string that identifies it."""
    return prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True)


def prompt_hash(prompt: Any) -> int:
    """64 bits that identify a prompt, where its text would take too much memory."""
    return int.from_bytes(hashlib.blake2b(prompt_key(prompt).encode(), digest_size=8).digest(), "big")


def is_held_out(prompt: Any, share: float, seed: int) -> bool:
    """Whether a prompt is held out: a matter of prompt and seed, so that all scripts agree."""
    return zlib.crc32(f"{seed} {prompt_key(prompt)}".encode()) / 2**32 < share


@functools.lru_cache(maxsize=4)
def read_prompts(source: str) -> list:
    """Distinct prompts of rows that have one, in any of the shapes above, in order."""
    def parse(part: str, place: str, row: dict, notes: Counter) -> Any:
        if "chosen" in row:
            side = side_of(place, row, "chosen")
            return side[:1] if side else "ending with the human"
        prompt = prompt_of(place, row)
        return (prompt[:-1] if len(prompt) > 1 and isinstance(prompt, list)
                and prompt[-1]["role"] == "assistant" else prompt,)
    columns = PREFERENCE_COLUMNS | SAMPLE_COLUMNS
    return list({prompt_key(p): p for p, in parsed_rows(source, columns, parse)}.values())


def split_prompts(cfg: Config, held_out: bool) -> list:
    """Distinct prompts, held out or not: of --prompts, --preferences, --samples or --responses."""
    source = cfg.prompts or cfg.preferences or cfg.samples or cfg.responses
    if cfg.prompts or not (cfg.preferences or cfg.toy):
        found = [p for p in read_prompts(source)
                 if is_held_out(p, cfg.held_out, cfg.seed) == held_out]
    else:
        rankings = load_preferences(cfg)[held_out]
        found = list({prompt_key(r.prompt): r.prompt for r in rankings}.values())
    require(found or held_out and not cfg.eval_prompts, f"{source}: too few prompts to hold any "
            "out; give more or a larger --held_out, or --prompts to evaluate on, or --eval_prompts 0")
    return found


# ---------------------------------------------------------------------------------------- batches
# Samples are tokenised once, into flat arrays on disk; a step slices them.  The order of the data
# and the cut into steps come from the seed alone; ranks and micro-batches share out a step's work.


class Example(NamedTuple):
    """A sequence's ids (T,) int32, its response mask (T,) bool, and what its tokens weigh.

    `columns` are numbers that each have one for each response token.
    """
    ids: np.ndarray
    mask: np.ndarray
    weight: float = 1.0
    columns: tuple = ()


class Tokens:
    """Many sequences end to end, memory-mapped: 5 bytes a token, shared by the ranks of a node."""

    def __init__(self, folder: Path, sequences: Callable[[], Iterable[tuple]]):
        """Rank 0 writes the (ids, mask) of sequences(); all ranks open what it wrote."""
        if rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            lengths, starts = [0], []
            with open(folder / "ids", "wb") as ids_file, open(folder / "mask", "wb") as mask_file:
                for ids, mask in sequences():
                    ids_file.write(ids.astype(np.int32).tobytes())
                    mask_file.write(mask.astype(bool).tobytes())
                    lengths.append(len(ids))
                    starts.append((int(mask.argmax()) if mask.any() else len(ids), int(mask.sum())))
            np.save(folder / "offsets.npy", np.cumsum(lengths, dtype=np.int64))
            np.save(folder / "starts.npy", np.array(starts, dtype=np.int32))
        barrier()
        self.ids = np.memmap(folder / "ids", dtype=np.int32, mode="r")
        self.mask = np.memmap(folder / "mask", dtype=bool, mode="r")
        self.offsets = np.load(folder / "offsets.npy")                          # (n + 1,)
        self.prompt_lengths, self.response_tokens = np.load(folder / "starts.npy").T    # (n,) each
        self.lengths = np.diff(self.offsets)                                    # (n,)

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        span = slice(self.offsets[i], self.offsets[i + 1])
        return self.ids[span], self.mask[span]


class Examples:
    """What a policy trains on: some rows of Tokens, each with a weight, and a tag before its reply.

    tag(i, epoch) is the ids that go between sample i's prompt and its response.
    """

    def __init__(self, tokens: Tokens, rows: Optional[np.ndarray] = None,
                 weight: Optional[np.ndarray] = None,
                 tag: Callable[[int, int], list[int]] = lambda i, epoch: []):
        self.tokens, self.tag = tokens, tag
        self.rows = np.arange(len(tokens.lengths)) if rows is None else rows
        self.weight = np.ones(len(tokens.lengths)) if weight is None else weight

    def __len__(self) -> int:
        return len(self.rows)

    def example(self, i: int, epoch: int = 0) -> Example:
        """The i-th example as this epoch reads it."""
        row = int(self.rows[i])
        ids, mask = self.tokens[row]
        tag, at = self.tag(row, epoch), self.tokens.prompt_lengths[row]
        if tag:
            ids, mask = np.insert(ids, at, tag), np.insert(mask, at, [False] * len(tag))
        return Example(ids, mask, float(self.weight[row]))


@dataclass
class MicroBatch:
    """What one forward takes: packed sequences, T tokens, N of which are learnt."""
    input_ids: torch.Tensor      # (T,) int64
    lengths: list[int]           # of the sequences
    rows: torch.Tensor           # (N,) int64, the positions that predict a response token
    targets: torch.Tensor        # (N,) int64, those tokens
    weight: torch.Tensor         # (N,) float32, their sequences' weights
    columns: list[torch.Tensor]  # of (N,) float32


@dataclass
class Batch:
    """One optimiser step: this rank's micro-batches, and what their losses' sum is divided by."""
    micros: list[MicroBatch]
    lengths: list[int]  # of this rank's sequences
    tokens: int         # response tokens, all ranks
    normaliser: float   # sum of weight * response tokens over all ranks, / ranks: DDP averages


def make_batch(lengths: list[int], tokens: Any, weights: Any, cfg: Config,
               read: Callable[[int], Example]) -> Batch:
    """A step over examples of these lengths and response tokens; this rank reads its own alone."""
    shares = shard_micro_batches(lengths, cfg.micro_batch_tokens or 8192)
    micros = [collate([read(i) for i in share] or [empty_example(read(0))]) for share in shares]
    total = float(np.dot(np.asarray(weights, dtype=np.float64), tokens))
    return Batch(micros, [lengths[i] for share in shares for i in share], int(np.sum(tokens)),
                 (total if total > 1e-20 else 1.0) / world_size())  # weights may vanish: no 0 / 0


def empty_example(example: Example) -> Example:
    """The example, nothing of it learnt: a rank without work takes part in a step with it."""
    return example._replace(mask=np.zeros_like(example.mask), columns=((),) * len(example.columns))


def collate(examples: list[Example]) -> MicroBatch:
    """Examples as packed tensors."""
    ids = torch.from_numpy(np.concatenate([e.ids for e in examples]).astype(np.int64))      # (T,)
    mask = np.concatenate([np.append(e.mask[1:], False) for e in examples])  # t predicts t + 1
    rows = torch.from_numpy(mask.nonzero()[0])                                              # (N,)
    weight = np.repeat([e.weight for e in examples], [e.mask[1:].sum() for e in examples])
    columns = [np.concatenate(column) for column in zip(*(e.columns for e in examples))]
    ids_, rows_, targets, weight_, *rest = (t.to(device(), non_blocking=True) for t in (
        ids, rows, ids[rows + 1], *(torch.as_tensor(c, dtype=torch.float32)
                                    for c in (weight, *columns))))
    return MicroBatch(ids_, [len(e.ids) for e in examples], rows_, targets, weight_, rest)


def group_by_token_budget(lengths: list[int], budget: int) -> list[list[int]]:
    """Indices into lengths, longest first, cut so that count * longest <= budget, one at least."""
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not groups or (len(groups[-1]) + 1) * lengths[groups[-1][0]] > budget:
            groups.append([])
        groups[-1].append(i)
    return groups


def shard_micro_batches(lengths: list[int], budget: int) -> list[list[int]]:
    """This rank's micro-batches of a step.  All ranks get as many; [] where one has none left."""
    by_length = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    shares = [by_length[r::world_size()] for r in range(world_size())]
    cuts = [[[share[i] for i in group] for group in
             group_by_token_budget([lengths[i] for i in share], budget)] for share in shares]
    most = max(map(len, cuts))
    return cuts[rank()] + [[]] * (most - len(cuts[rank()]))


def count_steps(examples: int, cfg: Config) -> int:
    """Optimiser steps of a run."""
    return cfg.steps or cfg.epochs * math.ceil(examples / cfg.batch_size)


def step_indices(examples: int, cfg: Config, steps: int,
                 first: int = 0) -> Iterator[tuple[int, int, np.ndarray]]:
    """(step, epoch, its examples) from the `first` step on; each epoch has an order of its own."""
    per_epoch = math.ceil(examples / cfg.batch_size)
    for step in range(first, steps):
        epoch, start = step // per_epoch, step % per_epoch * cfg.batch_size
        if step == first or start == 0:
            order = np.random.default_rng((cfg.seed, epoch)).permutation(examples)
        yield step, epoch, order[start:start + cfg.batch_size]


def print_plan(examples: int, cfg: Config) -> None:
    """The resolved arithmetic, before training."""
    steps = count_steps(examples, cfg)
    print0(f"  {examples:,} sequences; {steps:,} steps of {cfg.batch_size} over {world_size()} "
           f"rank(s), {steps / math.ceil(examples / cfg.batch_size):.2f} epochs; at most "
           f"{cfg.micro_batch_tokens:,} tokens a forward; "
           f"{str(compute_dtype(cfg)).removeprefix('torch.')} on {device()}")


# ------------------------------------------------------------------------------- packed attention
# A micro-batch is one row of tokens, sequence after sequence, by transformers' own contract: where
# each begins travels as `cu_seq_lens_q` to the attention function.  It builds no mask.

PACKED = "packed"     # what transformers calls attention(), below
PADDED_BELOW = 256    # hidden width: to smaller models padding costs less than a call a sequence


def attention(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
              mask: Optional[torch.Tensor], scaling: Optional[float] = None,
              sliding_window: Optional[int] = None, cu_seq_lens_q: Optional[torch.Tensor] = None,
              max_length_q: int = 0, slot_age: Optional[torch.Tensor] = None,
              **_: Any) -> tuple[torch.Tensor, None]:
    """Causal attention (B, heads, T, D) -> (B, T, heads, D): within packed sequences (B = 1), of
    the sampler's new tokens to their slots (T = 1), or of whole sequences."""
    sdpa = torch.nn.functional.scaled_dot_product_attention
    b, heads, t, width = query.shape
    if cu_seq_lens_q is not None and query.is_cuda and value.dtype.itemsize == 2:
        from torch.nn.attention.varlen import varlen_attn
        group, window = heads // key.shape[1], sliding_window or max_length_q
        q, k, v = (x[0].transpose(0, 1).to(value.dtype) for x in (query, key, value))  # (T, heads, D)
        return varlen_attn(
            q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), cu_seq_lens_q,
            cu_seq_lens_q, max_length_q, max_length_q, scale=scaling,
            window_size=(window - 1 if window < max_length_q else -1, 0))[None], None
    if cu_seq_lens_q is not None:
        lengths = cu_seq_lens_q.diff().tolist()
        return torch.cat([attention(module, *qkv, None, scaling, sliding_window)[0]
                          for qkv in zip(*(x.split(lengths, dim=2) for x in (query, key, value)))],
                         dim=1), None
    if t == 1:  # query heads that share a key are so many positions of one head: no key is copied
        query, seen = query.reshape(b, key.shape[1], -1, width), None
        if slot_age is not None:                            # (B, 1, 1, S), how long ago, < 0: never
            seen = slot_age >= 0
            seen = seen & (slot_age < sliding_window) if sliding_window else seen
        return sdpa(query, key, value, seen, scale=scaling).reshape(b, 1, heads, -1), None
    band = None
    if sliding_window and t > sliding_window:
        band = torch.ones(t, t, dtype=torch.bool, device=key.device).tril().triu(1 - sliding_window)
    if query.is_cuda:  # its fast float32 kernels know no grouped heads
        key, value = (x.repeat_interleave(heads // x.shape[1], 1) for x in (key, value))
    return sdpa(query, key, value, band, is_causal=band is None, scale=scaling,
                enable_gqa=True).transpose(1, 2), None


@torch.no_grad()
def enable_packing(model: Any) -> Any:
    """The model, made to read packed sequences, if it proves to: two of them, longer than its
    windows (made small for this), and a token sampled after each, are read as each alone is."""
    from transformers import AttentionInterface
    AttentionInterface.register(PACKED, attention)
    before = model.config._attn_implementation
    if before != "sdpa":
        return model
    vocabulary, windows = model.get_input_embeddings().num_embeddings, []
    for part in [model.config.get_text_config(), *model.modules()]:
        for name in ("sliding_window", "attention_chunk_size"):
            if isinstance(value := getattr(part, name, None), int):
                windows.append((part, name, value))
                setattr(part, name, 6)
    ids = torch.arange(24, device=model.device) * 1009 % vocabulary
    a, b = ids[:9], ids[9:]
    try:
        alone = [model.base_model(input_ids=s[None]).last_hidden_state[0] for s in (a, b)]
        model.set_attn_implementation(PACKED)
        slots = Slots(2, 16)
        slots.place([len(a) - 1, len(b) - 1], [0, 1])
        packed = read_packed(model, torch.cat([a[:-1], b[:-1]]), [len(a) - 1, len(b) - 1],
                             past_key_values=slots.cache, use_cache=True)
        last = slots.decode(model.base_model, torch.stack([a[-1], b[-1]])).last_hidden_state[:, 0]
        ours, theirs = torch.cat([packed, last]), torch.cat([alone[0][:-1], alone[1][:-1],
                                                              alone[0][-1:], alone[1][-1:]])
        near = 1e-3 if model.dtype.itemsize > 2 and model.device.type == "cpu" else 0.1
        proven = (ours - theirs).float().norm() < near * theirs.float().norm()
    except Exception:  # whatever the code of some other architecture raises
        proven = False
    finally:
        for part, name, value in windows:
            setattr(part, name, value)
    if not proven:
        model.set_attn_implementation(before)
        print0(f"  a {type(model).__name__} does not read packed sequences as if each were alone: "
               "padded, and sampled by transformers' generate")
    return model


def read_packed(model: Any, ids: torch.Tensor, lengths: list[int], **more: Any) -> torch.Tensor:
    """The body's last hidden states (T, D) of packed sequences, ids (T,)."""
    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(
        ids.device, non_blocking=True)                                                  # (S + 1,)
    position = torch.cat([torch.arange(n) for n in lengths]).to(ids.device, non_blocking=True)
    body = model.base_model if model.base_model is not model else model.model
    return body(input_ids=ids[None], position_ids=position[None], cu_seq_lens_q=ends,
                cu_seq_lens_k=ends, max_length_q=max(lengths), max_length_k=max(lengths),
                **{"use_cache": False, **more}).last_hidden_state[0]


def hidden_states(model: Any, ids: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """The body's last hidden states (T, D) of the sequences whose ids (T,) stand end to end."""
    config = model.config.get_text_config()
    if config._attn_implementation == PACKED and config.hidden_size >= PADDED_BELOW:
        return read_packed(model, ids, lengths)
    padded = torch.nn.utils.rnn.pad_sequence(ids.split(lengths), batch_first=True)  # needs no mask
    body = model.base_model if model.base_model is not model else model.model
    hidden = body(input_ids=padded, use_cache=False).last_hidden_state          # (S, longest, D)
    return torch.cat([row[:n] for row, n in zip(hidden, lengths)])


# ----------------------------------------------------------------------------------------- models


def load_model(name: str, dtype: torch.dtype = torch.float32, where: Optional[torch.device] = None,
               kind: str = "AutoModelForCausalLM", drawn: tuple = (), spare: tuple = (),
               **more: Any) -> Any:
    """A transformers model on this rank's device, in eval mode: dropout and routers that draw are
    off for ever, so that a gradient does not depend on how a batch is cut.

    Raises BadInput where weights are missing, but for those `drawn` anew, where there are others
    than the model has, but for `spare` ones, or where one is not finite.
    """
    import transformers
    with load_errors(name, "a causal language model" if "Causal" in kind else
                     "a reward model (sequence classification, num_labels=1)"):
        model, report = getattr(transformers, kind).from_pretrained(
            name, dtype=dtype, use_safetensors=True, trust_remote_code=False,
            output_loading_info=True, ignore_mismatched_sizes=True, **more)
    for what, keys, allowed in (("lacks", report["missing_keys"], drawn),
                                ("has unknown", report["unexpected_keys"], spare),
                                ("has misshapen", report["mismatched_keys"], drawn)):
        wrong = sorted(k for k in map(str, keys) if not k.startswith(allowed or ("\0",))
                       and not re.search(r"\battn(\.attention)?\.(masked_)?bias$", k))  # buffers
        require(not wrong, f"{name}: {what} weights: {', '.join(wrong[:4])} ({len(wrong)} in all)")
    bad = [n for n, p in model.named_parameters() if not p.sum().isfinite()]
    require(not bad, f"{name}: {bad and bad[0]} holds NaN or infinite weights")
    model = enable_packing(model.to(where or device()).eval())
    if "Causal" in kind:
        check_linear_head(name, model)
    return model


@torch.no_grad()
def check_linear_head(name: str, model: Any) -> None:
    """Raises BadInput unless logits are hidden states times head, scaled or soft-capped."""
    head = model.get_output_embeddings()
    require(head is not None, f"{name}: the model has no output head")
    ids = torch.arange(8, device=model.device) % model.get_input_embeddings().num_embeddings
    scale, cap = head_transform(model)
    ours = head(hidden_states(model, ids, [8])).float() * scale
    ours = cap * (ours / cap).tanh() if cap else ours
    theirs = model(input_ids=ids[None], use_cache=False).logits[0].float()
    require(torch.allclose(ours, theirs, rtol=1e-2, atol=1e-3 * float(theirs.abs().max())),
            f"{name}: its logits are not hidden states times head, which the fused loss needs")


def autocast(dtype: torch.dtype) -> Any:
    """Matrix products in this dtype, whatever the weights'; nothing to do for float32."""
    return torch.autocast(device().type, dtype, enabled=dtype != torch.float32)


class Policy(torch.nn.Module):
    """A causal language model whose forward ends in a fused loss: DDP's and FSDP's hooks fire round
    body and head alike."""

    def __init__(self, model: Any, cfg: Config):
        super().__init__()
        self.model, self.dtype = model, compute_dtype(cfg)

    def forward(self, micro: MicroBatch, kernel: Callable, *columns: torch.Tensor) -> torch.Tensor:
        """The kernel's loss, summed over the response tokens: a float32 scalar.  columns (N,)."""
        with autocast(self.dtype):
            hidden = hidden_states(self.model, micro.input_ids, micro.lengths)[micro.rows]  # (N, D)
            return head_loss(kernel, hidden, self.model, micro.targets, *columns)

    def log_probs(self, micro: MicroBatch, temperature: float = 1.0) -> torch.Tensor:
        """Each response token's log-prob (N,) float32, as forward finds it; needs no gradient."""
        with autocast(self.dtype):
            return log_probs(self.model, micro, temperature)


def load_policy(name: str, cfg: Config) -> torch.nn.Module:
    """The policy to train, with float32 weights, wrapped for several ranks."""
    model = load_for_training(functools.partial(load_model, name), cfg)
    choose_micro_batch(model, cfg)
    return wrap_for_ranks(Policy(model, cfg), cfg)


def load_reference(name: str, cfg: Config) -> Policy:
    """A policy that stays as it is, for its log_probs: sharded where the trained one is."""
    if not is_sharded(cfg):
        return Policy(load_model(name, compute_dtype(cfg)), cfg)
    model = load_for_training(functools.partial(load_model, name), cfg).requires_grad_(False)
    return shard(Policy(model, cfg), compute_dtype(cfg), ("log_probs",))


def choose_micro_batch(model: Any, cfg: Config) -> None:
    """Sets --micro_batch_tokens where it was not given: half of a GPU's free memory, after weights,
    gradients and moments, over the bytes of activations a token, as a power of two."""
    if cfg.micro_batch_tokens is None and device().type == "cuda":
        shape, ranks = model.config.get_text_config(), world_size() if is_sharded(cfg) else 1
        weights = sum(p.numel() for p in model.parameters())
        free = torch.cuda.mem_get_info()[0] - 12 * weights / ranks
        layer = 2 * shape.hidden_size * (2 if cfg.gradient_checkpointing else 40)  # bytes a token
        tokens = max(1, free / 2 / (layer * shape.num_hidden_layers))
        cfg.micro_batch_tokens = 2 ** int(min(max(math.log2(tokens), 11), 16))
        cfg.micro_batch_tokens = min(gather(cfg.micro_batch_tokens))
    cfg.micro_batch_tokens = cfg.micro_batch_tokens or 8192


def is_sharded(cfg: Config) -> bool:
    """Whether training spreads its models over ranks."""
    return cfg.sharding == "fsdp" and world_size() > 1


def load_for_training(load: Callable, cfg: Config) -> Any:
    """load(where=), with recomputed activations or compiled blocks where asked for.

    To be sharded, rank 0 loads on its CPU, and other ranks get an untouched shape: a node holds the
    whole weights once.
    """
    model = load(where=torch.device("cpu") if is_sharded(cfg) else device()) \
        if rank() == 0 or not is_sharded(cfg) else None
    if is_sharded(cfg):
        shape = gather(rank() == 0 and (type(model), model.config,
                                        model.config._attn_implementation))[0]
        if rank() > 0:
            model = meta_model(*shape).to_empty(device="cpu").eval()
            model.tie_weights()
    names = {name for part in model.modules() for name in getattr(part, "_no_split_modules", None) or ()}
    blocks = [part for part in model.modules() if type(part).__name__ in names]
    if cfg.gradient_checkpointing:
        for block in blocks:  # transformers' own needs training mode, in which some drop out
            block.forward = functools.partial(torch.utils.checkpoint.checkpoint, block.forward,
                                              use_reentrant=False)
    elif cfg.compile and device().type == "cuda":
        for block in blocks:
            block.compile(dynamic=True)
    return model


def meta_model(kind: type, config: Any, attn_implementation: str) -> Any:
    """A model of this class and shape whose weights take no memory."""
    from transformers import AttentionInterface
    AttentionInterface.register(PACKED, attention)
    with torch.device("meta"):
        model = kind(config)
    model.set_attn_implementation(attn_implementation)
    return model


def wrap_for_ranks(module: torch.nn.Module, cfg: Config, *methods: str) -> torch.nn.Module:
    """The module under DDP or FSDP2 where there are several ranks; `methods` compute with its
    weights beside forward."""
    if is_sharded(cfg):
        return shard(module, compute_dtype(cfg), methods)
    if world_size() == 1:
        return module
    ids = [device()] if device().type == "cuda" else None
    return torch.nn.parallel.DistributedDataParallel(module, device_ids=ids,
                                                     gradient_as_bucket_view=True)


def shard(module: torch.nn.Module, dtype: torch.dtype, methods: tuple) -> torch.nn.Module:
    """The module under FSDP2, each transformer block by itself, with rank 0's weights: kept, and
    gradients reduced, in float32; gathered in `dtype` for as long as a block computes."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import (MixedPrecisionPolicy, fully_shard,
                                        register_fsdp_forward_method)
    weights = module.state_dict() if rank() == 0 else {}
    precision = {"param_dtype": None if dtype == torch.float32 else dtype,
                 "reduce_dtype": torch.float32}
    mesh = init_device_mesh(device().type, (world_size(),))
    names = {n for part in module.modules() for n in getattr(part, "_no_split_modules", None) or ()}
    for part in [part for part in module.modules() if type(part).__name__ in names]:
        fully_shard(part, mesh=mesh, mp_policy=MixedPrecisionPolicy(**precision))
    # the root holds embedding and head, which the fused loss reads; its inputs stay as they are
    fully_shard(module, mesh=mesh,
                mp_policy=MixedPrecisionPolicy(**precision, cast_forward_inputs=False))
    set_model_state_dict(module, weights, options=StateDictOptions(full_state_dict=True,
                                                                   broadcast_from_rank0=True))
    for buffer in module.buffers():
        dist.broadcast(buffer, 0)
    for method in methods:
        register_fsdp_forward_method(module, method)
    return module


@torch.no_grad()
def whole_copy(model: Any, dtype: torch.dtype, where: torch.device, keep: bool = True) -> Any:
    """A copy of a model in `dtype`, a sharded one whole again (None unless `keep`); all ranks must
    call it together."""
    weights = {}
    for name, weight in model.named_parameters():
        weight = (weight.full_tensor() if hasattr(weight, "full_tensor") else weight).to(where, dtype)
        if keep:
            weights[name] = weight
    if not keep:
        return None
    copy = meta_model(type(model), model.config, model.config._attn_implementation)
    copy.load_state_dict(weights, strict=False, assign=True)  # a tied head has no entry of its own
    copy.tie_weights()
    for (name, _), old in zip(list(copy.named_buffers()), model.buffers()):
        part, _, last = name.rpartition(".")
        setattr(copy.get_submodule(part), last, old.to(where))
    copy.generation_config = model.generation_config
    return copy.eval()


def make_optimizer(model: torch.nn.Module, cfg: Config, steps: int) -> tuple[Any, Any]:
    """AdamW with decay on matrices only, and its schedule: 3 % warm-up, then cosine to 0."""
    weights = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in weights if p.dim() >= 2], "weight_decay": 0.1},
              {"params": [p for p in weights if p.dim() < 2], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, 0.99), fused=True)
    warmup = max(1, round(0.03 * steps))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup  # the first step moves the weights, too
        return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def save_folder(folder: Path, model: Any, codec: Codec, cfg: Config, card: str) -> None:
    """Writes model, tokenizer and model card as a Hugging Face folder, in the compute dtype."""
    if is_sharded(cfg):
        model = whole_copy(model, compute_dtype(cfg), torch.device("cpu"), keep=rank() == 0)
    if rank() == 0:
        if getattr(model, "generation_config", None):
            model.generation_config.eos_token_id = codec.stop_ids  # all that end a response
            if model.generation_config.temperature not in (None, 1.0):
                model.generation_config.do_sample = True  # transformers refuses it without
        model.to(compute_dtype(cfg)).save_pretrained(folder)
        codec.tokenizer.save_pretrained(folder)
        (folder / "README.md").write_text(card, encoding="utf-8")
    barrier()


MODEL_CARD = """---
base_model: {base}
tags: [offline-rlhf, {algorithm}]
---
# An aligned policy

Trained from `{base}` on `{data}` by {algorithm}: {flags}. Torch {torch}, transformers {transformers}.
After *Aligning Language Models with Offline Reinforcement Learning from Human Feedback*, arXiv
2308.12050.

```python
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = (kind.from_pretrained("this folder") for kind in (AutoModelForCausalLM, AutoTokenizer))
ids = tokenizer(prompt).input_ids{tag}
# of chat messages: tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
print(tokenizer.decode(model.generate(torch.tensor([ids]), do_sample=True, max_new_tokens=128)[0]))
```
{more}"""  # noqa: E501


def save_policy(folder: Path, policy: torch.nn.Module, codec: Codec, cfg: Config, tag: str = "",
                more: str = "") -> None:
    """Writes the policy's folder; `more` goes at the end of its model card."""
    import transformers
    flags = {f.name: getattr(cfg, f.name) for f in fields(cfg) if f.metadata["help"].stage == "training"}
    after, n = codec.before + tag, len(codec.before_ids)  # a word marker would come before the tag
    tail = f" + tokenizer({after!r}, add_special_tokens=False).input_ids" + f"[{n}:]" * bool(n)
    card = MODEL_CARD.format(
        more=more, tag=tail if tag else "",
        algorithm=folder.name.strip(".").removesuffix(".new"), torch=torch.__version__,
        flags=", ".join(f"{k} {v}" for k, v in flags.items() if v is not None),
        transformers=transformers.__version__, base=cfg.model or "the toy world's",
        data=cfg.samples or cfg.responses or cfg.preferences or cfg.prompts or "the toy world's")
    save_folder(folder, getattr(policy, "module", policy).model, codec, cfg, card)


# -------------------------------------------------------------------------------- fused head loss
# Loss and gradient in one pass over the logits, a chunk of rows at a time: one GEMM into a scratch
# buffer, the script's kernel turns logits into d loss / d logits in place, two GEMMs bring the
# gradients of hidden states and head.  Of the (N, V) logits no more than a chunk exists.

CHUNK_BYTES = {"cpu": 2**28, "cuda": 2**31}  # of logits, held at once
EAGER_BELOW = 4096  # vocabulary: on a CPU, compiling for a smaller one costs more than it brings
_scratch: dict = {}


def head_loss(kernel: Callable, hidden: torch.Tensor, model: Any,
              *columns: torch.Tensor) -> torch.Tensor:
    """Sum over rows of the kernel's loss, differentiable in the hidden states and the model's head.

    hidden (N, D), columns (N,) each.  kernel(logits (n, V), *columns (n,)) must leave d loss /
    d logits in logits and return each row's loss (n,).  The result is a scalar, float32 (float64
    for float64).  N = 0 gives a zero with gradients.
    """
    head, kind = model.get_output_embeddings(), hidden.device.type
    dtype = (torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind)
             else head.weight.dtype)
    scale, cap = head_transform(model)
    apply = torch.compiler.disable(HeadLoss.apply)  # round it a compiled model breaks its graph
    return apply((hidden * scale).to(dtype), head.weight, getattr(head, "bias", None), kernel, cap,
                 *columns)


def head_transform(model: Any) -> tuple[float, float]:
    """(scale, cap) of logits = cap tanh(scale hidden @ head / cap), cap = 0 for none: Cohere,
    Granite and Falcon-H1 scale, Gemma caps."""
    config = model.config.get_text_config()
    up, down = (getattr(config, name, None) or 1.0 for name in ("logit_scale", "logits_scaling"))
    up *= getattr(config, "lm_head_multiplier", None) or 1.0
    return up / down, getattr(config, "final_logit_softcapping", None) or 0.0


class HeadLoss(torch.autograd.Function):
    """head_loss: forward finds the gradients, backward scales them."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor],
                kernel: Callable, cap: float, *columns: torch.Tensor) -> torch.Tensor:
        wide, head = torch.promote_types(hidden.dtype, torch.float32), weight.to(hidden.dtype)
        want_hidden, want_weight, want_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if want_hidden else None
        grad_weight, outer = None, {"out_dtype": wide} if hidden.dtype != wide and hidden.is_cuda else {}
        grad_bias = torch.zeros_like(bias, dtype=wide) if want_bias else None
        loss = torch.zeros((), dtype=wide, device=hidden.device)
        for part, logits in logit_chunks(hidden, head, bias, cap):
            slope = 1 - (logits / cap).square() if cap else None    # d capped / d logits
            loss += kernel(logits, *(c[part] for c in columns)).sum()
            logits = logits.mul_(slope) if cap else logits          # now d loss / d logits
            if want_hidden:
                torch.mm(logits, head, out=grad_hidden[part])
            if want_weight and grad_weight is not None and logits.dtype == wide:
                grad_weight.addmm_(logits.t(), hidden[part])
            elif want_weight:  # chunks are summed in float32
                product = torch.mm(logits.t(), hidden[part], **outer).to(wide)
                grad_weight = product if grad_weight is None else grad_weight.add_(product)
            if want_bias:
                grad_bias += logits.sum(0, dtype=wide)
        if want_weight and grad_weight is None:  # no rows
            grad_weight = torch.zeros_like(weight)
        ctx.grads = [g if g is None else g.to(like.dtype) for g, like in
                     ((grad_hidden, hidden), (grad_weight, weight), (grad_bias, bias))]
        ctx.columns = len(columns)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple:
        if ctx.grads is None:
            raise RuntimeError("backward through a fused head loss twice: its gradients are spent")
        grads, ctx.grads = ctx.grads, None
        grads = [g if g is None else g.mul_(upstream.to(g.dtype)) for g in grads]
        return *grads, None, None, *[None] * ctx.columns


def logit_chunks(hidden: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor],
                 cap: float) -> Iterator[tuple[slice, torch.Tensor]]:
    """(rows, their logits (n, V)): of hidden (N, D) as many at a time as CHUNK_BYTES hold.

    The buffer is kept between steps: fresh pages cost more than what fills them.  Its rows start at
    multiples of 64, without which the GEMM is slower.
    """
    stride, key = -(-len(weight) // 64) * 64, (hidden.dtype, hidden.device)
    most = max(1, CHUNK_BYTES[hidden.device.type] // (stride * hidden.element_size()))
    rows = -(-len(hidden) // max(1, -(-len(hidden) // most)))  # chunks of about one size
    if key not in _scratch or len(_scratch[key]) < rows * stride:
        with torch.inference_mode(False):  # else the first sampler's buffer could not serve training
            _scratch[key] = torch.empty(rows * stride, dtype=hidden.dtype, device=hidden.device)
    for start in range(0, len(hidden), max(1, rows)):
        part = slice(start, min(start + rows, len(hidden)))
        n = part.stop - start
        logits = _scratch[key][:n * stride].view(n, stride)[:, :len(weight)]
        torch.mm(hidden[part], weight.t(), out=logits)
        if bias is not None:
            logits += bias.to(logits.dtype)
        if cap:
            logits.div_(cap).tanh_().mul_(cap)
        yield part, logits


def compiled(kernel: Callable) -> Callable:
    """torch.compile(kernel), at its first call: the compiler's import takes seconds.  Compiled for a
    vocabulary and any number of rows: with both left open a GPU takes twice as long.

    Left as it is for a small vocabulary on a CPU, and, said once, without a C++ compiler.
    """
    options = {"split_reductions": False}  # of a few rows only would it pay to split them
    once = functools.cache(lambda: torch.compile(kernel, options=options))

    @functools.wraps(kernel)
    def call(logits: torch.Tensor, *args: Any, **more: Any) -> Any:
        if logits.device.type == "cpu" and logits.shape[1] < EAGER_BELOW:
            return kernel(logits, *args, **more)
        for column in (logits, *args):
            torch._dynamo.maybe_mark_dynamic(column, 0)
        try:
            return once()(logits, *args, **more)
        except Exception as problem:
            if not re.search(r"C(\+\+)? compiler|InvalidCxxCompiler", repr(problem)):
                raise
            print0("warning: torch.compile found no C++ compiler: the loss kernels run uncompiled")
            torch.compiler.set_stance("force_eager")
            return kernel(logits, *args, **more)
    return call


def negative_log_likelihood(logits: torch.Tensor, targets: torch.Tensor,
                            temperature: float = 1.0) -> torch.Tensor:
    """-log softmax(logits / temperature)[targets], float32 (n,); needs no gradient."""
    logits = logits.float() / temperature
    return logits.logsumexp(-1) - logits.gather(-1, targets[:, None]).squeeze(-1)


FORWARD_ONLY = 4  # times as many tokens where no activations are kept


@torch.no_grad()  # not inference mode: what FSDP gathers in it could not serve training
def each_response_token(compute: Callable[[MicroBatch], torch.Tensor], model: Any,
                        examples: list[Example], cfg: Config, cost: Cost) -> list[list[float]]:
    """What compute(micro-batch) -> (N,) finds of each response token, by `model`; ranks share the
    work."""
    found: dict[int, list[float]] = {}
    plain = [e._replace(columns=()) for e in examples]
    budget = FORWARD_ONLY * (cfg.micro_batch_tokens or 8192)
    for share in shard_micro_batches([len(e.ids) for e in plain], budget):
        micro = collate([plain[i] for i in share] or [empty_example(plain[0])])
        cost.add_forward(model, len(micro.input_ids), sum(n * n for n in micro.lengths),
                         len(micro.rows))
        values = iter(compute(micro).tolist())
        found.update((i, [next(values) for _ in range(int(plain[i].mask.sum()))]) for i in share)
    return gather_by_index(found, len(plain))


def log_probs(model: Any, micro: MicroBatch, temperature: float) -> torch.Tensor:
    """Each response token's log-prob (N,), float32."""
    hidden = hidden_states(model, micro.input_ids, micro.lengths)[micro.rows]               # (N, D)
    head, (scale, cap) = model.get_output_embeddings(), head_transform(model)
    chunks = logit_chunks(hidden * scale, head.weight.to(hidden.dtype), getattr(head, "bias", None), cap)
    parts = [-negative_log_likelihood(logits, micro.targets[part], temperature)
             for part, logits in chunks]
    return torch.cat(parts) if parts else torch.zeros(0)


def response_log_probs(model: Any, examples: list[Example], cfg: Config,
                       cost: Cost) -> list[list[float]]:
    """Each response token's log-prob at cfg.temperature, in the examples' order on every rank."""
    return each_response_token(lambda micro: log_probs(model, micro, cfg.temperature or 1.0), model,
                               examples, cfg, cost)


# ---------------------------------------------------------------------------------------- sampler
# A fixed number of slots, each a row of a preallocated cache at a position of its own.  A response
# that has ended gives its slot to the next prompt; prompts are read packed.  No left padding, no
# copies of the cache; on a GPU the decode step is a CUDA graph.


class Response(NamedTuple):
    """A sampled response: ids (the stop token included where it came), log-probs, was it cut off."""
    ids: list[int]
    log_probs: list[float]
    truncated: bool


class Slots:
    """The sampler's cache: R rows of S positions, in each layer, and where new tokens go."""

    def __init__(self, rows: int, length: int):
        from transformers.cache_utils import Cache, CacheLayerMixin
        slots = self

        class Layer(CacheLayerMixin):
            """One layer's keys and values, (R, heads, S, D)."""
            is_sliding = False

            def lazy_initialization(self, keys: torch.Tensor, values: torch.Tensor) -> None:
                self.is_initialized = True
                self.keys, self.values = (x.new_zeros(rows, x.shape[1], length, x.shape[3])
                                          for x in (keys, values))

            def update(self, keys: torch.Tensor, values: torch.Tensor, *_: Any, **__: Any) -> tuple:
                if not self.is_initialized:
                    self.lazy_initialization(keys, values)
                for kept, new in ((self.keys, keys), (self.values, values)):
                    new = new.transpose(1, 2).flatten(0, 1)                     # (B * T, heads, D)
                    new = new if slots.source is None else new[slots.source]
                    kept[slots.rows, :, slots.positions] = new
                if slots.seen is None:  # packed prompts attend to themselves
                    return keys, values
                return self.keys[:, :, :slots.seen], self.values[:, :, :slots.seen]

            def get_seq_length(self) -> int:
                return 0

            def get_max_length(self) -> int:
                return length

            def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
                return length, 0
        self.length, self.cache = length, Cache(layer_class_to_replicate=Layer)
        self.position = torch.zeros(rows, dtype=torch.int64, device=device())   # (R,) of each's last
        self.every = torch.arange(rows, device=device())
        self.rows = self.positions = self.source = self.seen = None

    def place(self, lengths: list[int], copies: list[int] | list[list[int]]) -> None:
        """The next forward reads packed prompts of these lengths, each for the slots `copies`."""
        rows, positions, source, start, ends = [], [], [], 0, {}
        for n, slots in zip(lengths, copies):
            for slot in slots if isinstance(slots, list) else [slots]:
                rows.append(torch.full((n,), slot))
                positions.append(torch.arange(n))
                source.append(torch.arange(start, start + n))
                ends[slot] = n - 1
            start += n
        self.position[list(ends)] = torch.tensor(list(ends.values()), device=device())
        self.rows, self.positions, self.source = (torch.cat(x).to(device())
                                                  for x in (rows, positions, source))
        self.seen = None

    def decode(self, model: Any, tokens: torch.Tensor, seen: Optional[int] = None) -> Any:
        """The model's output on one new token a slot, (R,)."""
        self.position += 1
        self.rows, self.positions, self.source = self.every, self.position, None
        self.seen = seen or self.length
        age = self.position[:, None] - torch.arange(self.seen, device=device())          # (R, S)
        return model(input_ids=tokens[:, None], position_ids=self.position[:, None], use_cache=True,
                     past_key_values=self.cache, slot_age=age[:, None, None])

    def keep(self, rows: torch.Tensor) -> None:
        """Forgets all slots but these."""
        for layer in self.cache.layers:
            layer.keys, layer.values = layer.keys[rows], layer.values[rows]
        self.position, self.every = self.position[rows], torch.arange(len(rows), device=device())


@torch.inference_mode()
def sample(model: Any, prompts: list[list[int]], cfg: Config, seed: int, stop: list[int], cost: Cost,
           unconditional: Optional[list[list[int]]] = None, guidance: float = 0.0,
           seeds: Optional[list[int]] = None, what: str = "sampling") -> list[Response]:
    """One response for each prompt's ids, in the prompts' order on every rank; ranks share the work.

    A row's randomness comes from the seed and the row's own of `seeds` (its index), not from its
    slot or rank.  Log-probs are those of the distribution at cfg.temperature, before top-p.  With
    `guidance` g each token is drawn from softmax((1 + g) log p(.|prompt) - g log p(.|unconditional))
    (Sanchez et al. 2023, arXiv 2306.17806).
    """
    share = sorted(range(rank(), len(prompts), world_size()), key=lambda i: (len(prompts[i]), i))
    paths = [[prompts[i], *([unconditional[i]] if guidance else [])] for i in share]
    uniform = [np.random.Generator(np.random.Philox(key=[seed, i if seeds is None else seeds[i]]))
               for i in share]
    packed = model.config.get_text_config()._attn_implementation == PACKED
    with progress(None, what, total=len(share), unit="row") as bar:
        found = (sample_with_slots if packed else sample_with_generate)(
            model, paths, uniform, cfg, stop, guidance, bar, cost)
    for path, response in zip(paths, found):
        for prompt in path:
            n, m = len(prompt), len(response.ids)
            cost.add_forward(model, m - 1, (m - 1) * (2 * n + m) // 2, m - 1)
    cost.generated_tokens += sum(len(r.ids) for r in found)
    return gather_by_index(dict(zip(share, found)), len(prompts))


def choose(logits: torch.Tensor, uniform: torch.Tensor, cfg: Config,
           guidance: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (R,) and their log-probs (R,) from logits (R, V), or (2 R, V) of guided rows."""
    if guidance:
        conditional, unconditional = logits.float().log_softmax(-1).chunk(2)
        logits = (1 + guidance) * conditional - guidance * unconditional
    log_p = (logits.float() / (cfg.temperature or 1.0)).log_softmax(-1)                 # (R, V)
    token = log_p.argmax(-1) if cfg.temperature == 0 else draw(log_p, uniform, cfg.top_p)
    return token, log_p.gather(-1, token[:, None]).squeeze(-1)


def slot_count(model: Any, length: int, prompts: int, cfg: Config) -> int:
    """Slots that --slots, or a GPU's free memory, allows; no more than there are prompts."""
    most = cfg.slots or 64
    if device().type == "cuda" and not cfg.slots:
        shape = model.config.get_text_config()
        heads = getattr(shape, "num_key_value_heads", None) or shape.num_attention_heads
        width = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
        token = 2 * shape.num_hidden_layers * heads * width * model.dtype.itemsize
        most = min(512, int(0.6 * torch.cuda.mem_get_info()[0] / (token * length)))
    return max(1, min(most, prompts))


def sample_with_slots(model: Any, paths: list, uniform: list, cfg: Config, stop: list[int],
                      guidance: float, bar: Any, cost: Cost) -> list[Response]:
    """sample(), for models that read packed sequences; paths (R, 1 or 2) are prompts."""
    most, ways = cfg.max_response_tokens, 1 + bool(guidance)
    longest = max((len(p) for path in paths for p in path), default=0)
    count = slot_count(model, ways * (longest + most), len(paths), cfg)
    slots = Slots(ways * count, -(-(longest + most) // 64) * 64)
    stops = torch.tensor(stop, device=device())
    at = torch.arange(count, device=device())
    tokens, step = (torch.zeros(count, dtype=torch.int64, device=device()) for _ in range(2))
    said = torch.zeros(count, most, dtype=torch.int64, device=device())
    log_probs, draws = torch.zeros(count, most, device=device()), torch.zeros(
        count, most, dtype=torch.float64, device=device())
    ended = torch.ones(count, dtype=torch.bool, device=device())

    def record(logits: torch.Tensor, rows: torch.Tensor) -> None:
        """Draws the rows' next tokens; those of ended rows change nothing that counts."""
        here = step[rows]
        token, log_p = choose(logits, draws[rows, here], cfg, guidance)
        fresh = ~ended[rows]
        said[rows, here] = torch.where(fresh, token, said[rows, here])
        log_probs[rows, here] = torch.where(fresh, log_p, log_probs[rows, here])
        tokens[rows] = token
        ended[rows] |= torch.isin(token, stops) | (here == most - 1)
        step[rows] += ~ended[rows]

    def decode(seen: int) -> None:
        before = slots.position.clone()
        record(slots.decode(model, tokens.repeat(ways), seen).logits[:, -1], at)
        slots.position.copy_(torch.where(ended.repeat(ways), before, slots.position))

    def refill(free: list[int], queue: list[int]) -> list[int]:
        """Reads the next prompts into free slots: equal ones once, some thousand tokens at a time."""
        taken, queue = queue[:len(free)], queue[len(free):]
        group: dict[tuple, list[int]] = {}
        draws[free[:len(taken)]] = torch.from_numpy(np.array([uniform[i].random(most) for i in taken])
                                                    ).to(device())
        for slot, i in zip(free, taken):
            holder[slot] = i
            for way, prompt in enumerate(paths[i]):
                group.setdefault(tuple(prompt), []).append(way * count + slot)
        prompts = list(group)
        for part in group_by_token_budget([len(p) for p in prompts],
                                          FORWARD_ONLY * (cfg.micro_batch_tokens or 8192)):
            lengths = [len(prompts[j]) for j in part]
            slots.place(lengths, [group[prompts[j]] for j in part])
            cost.add_forward(model, sum(lengths), sum(n * n for n in lengths), len(lengths))
            ids = torch.tensor([t for j in part for t in prompts[j]], device=device())
            hidden = read_packed(model, ids, lengths, past_key_values=slots.cache, use_cache=True)
            head, (scale, cap) = model.get_output_embeddings(), head_transform(model)
            last = head(hidden[torch.tensor(lengths).cumsum(0) - 1]) * scale            # (S, V)
            last = cap * (last / cap).tanh() if cap else last
            for j, row in zip(part, last.float()):
                first[group[prompts[j]]] = row
        rows = torch.tensor(free[:len(taken)], device=device())
        ended[rows], step[rows] = False, 0
        record(first[torch.cat([way * count + rows for way in range(ways)])], rows)
        return queue

    first = torch.zeros(ways * count, model.get_output_embeddings().weight.shape[0], device=device())
    holder, queue, graphs = [-1] * count, list(range(len(paths))), {}
    found: dict[int, Response] = {}
    look = 8 if device().type == "cuda" else 4  # steps between looks, which wait for the GPU
    while True:
        done = [slot for slot, end in enumerate(ended.tolist()) if end and holder[slot] >= 0]
        for slot, n, ids, log_p in zip(done, *(x[done].tolist() for x in (step, said, log_probs))):
            found[holder[slot]] = Response(ids[:n + 1], log_p[:n + 1], ids[n] not in stop)
            holder[slot] = -1
        bar.update(len(done))
        free = [slot for slot in range(count) if holder[slot] < 0]
        if queue and free:
            queue = refill(free, queue)
            continue
        live = [slot for slot in range(count) if holder[slot] >= 0]
        if not live:
            slots.cache.layers.clear()  # a cycle holds them, and the memory is wanted now
            return [found[i] for i in range(len(paths))]
        if len(live) <= count * (0.5 if device().type == "cuda" else 0.75):  # none is left to take over
            rows = torch.tensor(live, device=device())
            slots.keep(torch.cat([way * count + rows for way in range(ways)]))
            tokens, step, said, log_probs, draws, ended = (
                x[rows] for x in (tokens, step, said, log_probs, draws, ended))
            count, holder, at, graphs = len(live), [holder[i] for i in live], at[:len(live)], {}
        block = 256 if device().type == "cuda" else 32
        seen = min(slots.length, -(-(int(slots.position.max()) + look + 2) // block) * block)
        for _ in range(look):
            run_captured(decode, seen, graphs)


def run_captured(step: Callable[[int], None], seen: int, graphs: dict) -> None:
    """step(seen), from its second time on, on a GPU, as a CUDA graph; eagerly where that fails."""
    if device().type != "cuda" or graphs.get(seen, 0) is None:
        step(seen)
    elif seen not in graphs:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step(seen)  # a real one, which warms up what must not be captured
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                step(seen)  # is recorded, not run
            graphs[seen] = graph
        except Exception as problem:
            torch.cuda.synchronize()
            graphs[seen] = None
            print0(f"  the decode step cannot be a CUDA graph, and runs eagerly ({problem})")
    else:
        graphs[seen].replay()


def sample_with_generate(model: Any, paths: list, uniform: list, cfg: Config, stop: list[int],
                         guidance: float, bar: Any, cost: Cost) -> list[Response]:
    """sample(), for models that keep more than keys and values: transformers' generate, to which
    our own choice of token is handed."""
    from transformers import GenerationConfig, LogitsProcessorList
    ways, found, own = 1 + bool(guidance), [], model.generation_config
    for start in range(0, len(paths), cfg.slots or 64):
        group = paths[start:start + (cfg.slots or 64)]
        prompts = [p for way in zip(*group) for p in way]                               # (ways * R)
        width, log_probs = max(map(len, prompts)), []
        cost.add_forward(model, sum(map(len, prompts)), sum(len(p)**2 for p in prompts), len(prompts))
        draws = torch.from_numpy(np.stack([u.random(cfg.max_response_tokens) for u in
                                           uniform[start:start + len(group)]])).to(device())
        ids = torch.tensor([[stop[0]] * (width - len(p)) + list(p) for p in prompts], device=device())
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device())

        def ours(said: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            if not log_probs and len(prompts[0]) < width:  # was it read as it is alone?
                first = torch.tensor(prompts[:1], device=device())
                alone = model(first, use_cache=False).logits[0, -1]
                require((scores[0] - alone).std() < 0.2 * alone.std(), f"a {type(model).__name__} "
                        "reads padded prompts wrongly; give --slots 1, and --guidance 0")
            token, log_p = choose(scores, draws[:, len(log_probs)], cfg, guidance)
            log_probs.append(log_p)
            return torch.full_like(scores, -math.inf).scatter_(1, token.repeat(ways)[:, None], 0.0)
        try:
            model.generation_config = GenerationConfig()  # its penalties are not asked for here
            said = model.generate(ids, attention_mask=mask, logits_processor=LogitsProcessorList(
                [ours]), generation_config=GenerationConfig(
                    do_sample=False, max_new_tokens=cfg.max_response_tokens, eos_token_id=stop,
                    pad_token_id=stop[0]))[:len(group), width:].tolist()
        finally:
            model.generation_config = own
        table = torch.stack(log_probs, 1).tolist()
        for row, log_p in zip(said, table):
            n = next((i + 1 for i, t in enumerate(row) if t in stop), len(row))
            found.append(Response(row[:n], log_p[:n], row[n - 1] not in stop))
        bar.update(len(group))
    return found


def draw(log_p: torch.Tensor, uniform: torch.Tensor, top_p: float = 1.0) -> torch.Tensor:
    """One token a row from log-probs (R, V), by inverting the cumulative distribution at uniform
    (R,): int64 (R,)."""
    p, order = log_p.exp(), None
    if top_p < 1:
        p, order = p.sort(-1, descending=True)
        p = torch.where(p.cumsum(-1) - p < top_p, p, 0.0)  # the token that crosses top_p is kept
    # In two steps, block and place in it: a running sum over a whole vocabulary is slow and inexact
    blocks = torch.nn.functional.pad(p, (0, -p.shape[1] % 256)).unflatten(1, (-1, 256))
    total = blocks.sum(-1).double().cumsum(-1)                                          # (R, V / 256)
    at = (uniform.double() * total[:, -1])[:, None]                                     # (R, 1)
    block = torch.searchsorted(total, at, right=True).clamp(max=total.shape[1] - 1)
    before = torch.where(block > 0, total.gather(1, (block - 1).clamp(min=0)), 0.0)
    inside = blocks[torch.arange(len(p), device=p.device), block.squeeze(1)].double().cumsum(-1)
    place = torch.searchsorted(inside, at - before, right=True)
    last = (inside < inside[:, -1:]).sum(-1, keepdim=True)  # never behind the last p > 0
    index = block * 256 + torch.minimum(place, last)
    return (index if order is None else order.gather(-1, index)).squeeze(-1)


# ------------------------------------------------------------------------------- labelled samples
# samples.jsonl is the contract between labelling and training: anything may write it, every offline
# trainer reads it.


@dataclass
class Samples:
    """Labelled samples, tokenised, with their rewards, and what they cost, by stage."""
    tokens: Tokens
    rewards: np.ndarray         # (n,) float64, raw scores
    weights: np.ndarray         # (n,) float64, NaN where the file has none
    prompts: np.ndarray         # (n,) uint64, equal where the prompt is
    fingerprint: str
    labelled_by: Optional[str]  # fingerprint of the reward model that gave the rewards, if known
    costs: dict[str, Cost]

    @property
    def mean(self) -> float:
        return float(self.rewards.mean())

    @property
    def std(self) -> float:
        return float(self.rewards.std())

    def z(self, reward: Any) -> np.ndarray:
        """Raw scores, standardised by the samples' mean and standard deviation, float64."""
        return (np.asarray(reward, dtype=np.float64) - self.mean) / self.std


def read_samples(path: str, hidden: set[int], codec: Codec, folder: Path, **known: Any) -> Samples:
    """Reads a samples file, but for rows with `hidden` prompts, and tokenises it into the folder.

    Raises BadInput where the rewards are all alike, or one is so far out that all others look alike.
    """
    table: list[tuple] = []

    def parse(part: str, place: str, row: dict, notes: Counter) -> Any:
        found = labelled_sample_of(place, row)
        seen = isinstance(found, Sample) and prompt_hash(found.prompt) in hidden
        return "with held-out prompts" if seen else found

    def sequences() -> Iterator[tuple]:
        rows = iter(progress(parsed_rows(path, SAMPLE_COLUMNS, parse), "reading samples"))
        while chunk := list(itertools.islice(rows, 4096)):
            table.extend((s.reward, s.weight, prompt_hash(s.prompt), s.source) for s in chunk)
            yield from codec.sequences(chunk)
    tokens = Tokens(folder, sequences)
    if rank() == 0:
        require(table, f"{path}: no sample in it to train on")
        rewards, weights, prompts, sources = zip(*table)
        check_rewards(path, np.array(rewards))
        np.savez(folder / "labels.npz", rewards=rewards, weights=weights,
                 prompts=np.array(prompts, dtype=np.uint64))
        kinds = ", ".join(f"{n:,} {kind}" for kind, n in Counter(sources).items())
        print0(f"  {len(table):,} samples ({kinds}), reward {np.mean(rewards):.3f} ± "
               f"{np.std(rewards):.3f}")
    barrier()
    with np.load(folder / "labels.npz") as labels:
        return Samples(tokens, labels["rewards"], labels["weights"], labels["prompts"], **known)


def check_rewards(path: str, rewards: np.ndarray) -> None:
    """Raises BadInput where standardised rewards would tell nothing."""
    low, high = (np.quantile(rewards, q, method=m) for q, m in ((.05, "higher"), (.95, "lower")))
    require(rewards.min() < rewards.max() and rewards.std() > 0, f"{path}: all {len(rewards)} "
            f"rewards are {rewards[0]}: there is nothing to learn from")
    require(not 0 < high - low < 0.01 * rewards.std(), f"{path}: rewards from {rewards.min():.4g} to "
            f"{rewards.max():.4g}, of which nine tenths lie between {low:.4g} and {high:.4g}: leave "
            "out such sentinels, or clip them")


def labelled_samples(cfg: Config, base: Stage, rm: Optional[Stage]) -> Samples:
    """The labelled samples: --samples, or the run's samples.jsonl, built if missing: responses of
    the data and of the base policy, scored by the reward model."""
    hidden = {prompt_hash(p) for p in split_prompts(cfg, held_out=True)}
    codec, folder = Codec(base.folder, cfg), Path(cfg.out) / ".tokens"
    if cfg.samples:
        known = read_record(Path(cfg.samples).with_suffix(".json")).get("settings")
        labelled_by = known.get("scorer") if isinstance(known, dict) else None
        if rm and labelled_by != rm.fingerprint:
            print0(f"warning: {cfg.samples} "
                   + (f"was labelled by reward model {labelled_by}" if labelled_by else
                      "does not say which reward model labelled it")
                   + f"; this run scores with {rm.fingerprint}, in that file's units")
        return read_samples(cfg.samples, hidden, codec, folder, costs={}, labelled_by=labelled_by,
                            fingerprint=content_hash(cfg.samples))
    path = Path(cfg.out) / "samples.jsonl"
    record, wanted = path.with_suffix(".json"), settings(
        cfg, "data", "samples", base=base.fingerprint, scorer=rm.fingerprint)
    if rank() == 0 and read_record(record).get("bytes") != (path.stat().st_size if path.exists()
                                                           else 0):
        record.unlink(missing_ok=True)  # a kill came between the two, or somebody edited the first
    barrier()
    if not is_fresh("samples", record, wanted):
        costs = label(cfg, base, rm, path, wanted, hidden)
        write_record(record, wanted, sum(costs.values(), Cost()), bytes=path.stat().st_size,
                     costs={stage: asdict(cost) for stage, cost in costs.items()})
        if rank() == 0:
            path.with_name(".samples.part.json").unlink(missing_ok=True)
    built = read_record(record)
    costs = {stage: Cost(**cost) for stage, cost in built["costs"].items()}
    return read_samples(str(path), set(), codec, folder, labelled_by=rm.fingerprint,
                        costs={"reward_model": rm.cost, **costs},
                        fingerprint=fingerprint(built["settings"]))


LABELLED_TOGETHER = 1024  # rows that a kill may cost


def label(cfg: Config, base: Stage, rm: Stage, path: Path, wanted: dict,
          hidden: set[int]) -> dict[str, Cost]:
    """Writes the samples file, part by part; a run that was killed goes on where it was."""
    rows = rows_to_label(cfg, hidden)
    beside, record = path.with_name(".samples.part.jsonl"), path.with_name(".samples.part.json")
    so_far, costs, done, size = read_record(record), {"generation": Cost(), "labelling": Cost()}, 0, 0
    if so_far.get("settings") == json.loads(json.dumps(wanted)):
        whole = so_far["rows"] == len(rows) and not beside.exists()  # killed after the rename
        place = path if whole else beside
        if place.exists() and place.stat().st_size >= so_far["bytes"]:
            done, size = so_far["rows"], so_far["bytes"]
            costs = {stage: Cost(**cost) for stage, cost in so_far["costs"].items()}
            print0(f"  {done:,} of {len(rows):,} are there from a run that was broken off")
    barrier()
    codec = Codec(base.folder, cfg)
    sampler = functools.cache(lambda: load_model(base.folder, compute_dtype(cfg)))
    score = rm.load_scorer()
    for start in progress(range(done, len(rows), LABELLED_TOGETHER), "samples"):
        part = rows[start:start + LABELLED_TOGETHER]
        with track_cost() as generation:
            part = respond(cfg, codec, sampler, part, generation)
        with track_cost() as labelling:
            rewards = score([s.prompt for s in part], [s.response for s in part],
                            [s.truncated for s in part], labelling)
        costs = {"generation": costs["generation"] + generation,
                 "labelling": costs["labelling"] + labelling}
        if rank() == 0:
            with open(beside, "ab") as file:
                file.truncate(size)  # a kill may have left half a part
                for s, reward in zip(part, rewards):
                    row = {"prompt": s.prompt, "response": s.response, "source": s.source,
                           "truncated": s.truncated, "reward": reward}
                    file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
                size = file.tell()
        write_record(record, wanted, sum(costs.values(), Cost()), rows=start + len(part), bytes=size,
                     costs={stage: asdict(cost) for stage, cost in costs.items()})
    if rank() == 0 and beside.exists():
        beside.replace(path)
    barrier()
    return costs


def rows_to_label(cfg: Config, hidden: set[int]) -> list[Sample]:
    """--responses, or what --sources asks for: responses that people wrote, and prompts for the
    base policy's own: their `response` is None, and `reward` the number that seeds it."""
    def parse(part: str, place: str, row: dict, notes: Counter) -> Any:
        found = sample_of(place, row)
        unseen = isinstance(found, str) or prompt_hash(found.prompt) not in hidden
        return found if unseen else "with held-out prompts"
    rows: list[Sample] = []
    if cfg.responses:
        rows = list(parsed_rows(cfg.responses, SAMPLE_COLUMNS - {"reward", "label", "weight"}, parse))
        require(rows, f"{cfg.responses}: no response to a prompt that is not held out")
        return rows
    if "dataset" in cfg.sources and (cfg.preferences or cfg.toy):
        rankings = [r for r in load_preferences(cfg)[0] if prompt_hash(r.prompt) not in hidden]
        rows = [Sample(r.prompt, r.responses[0], source="chosen") for r in rankings]
        rows += [Sample(r.prompt, text, source="rejected") for r in rankings for text in r.responses[1:]]
    if "generated" in cfg.sources:
        prompts = [p for p in split_prompts(cfg, held_out=False) for _ in range(cfg.samples_per_prompt)]
        rows += [Sample(p, None, i, "generated") for i, p in enumerate(prompts)]
    require(rows, "--sources leaves nothing to label")
    return rows


def respond(cfg: Config, codec: Codec, sampler: Callable, rows: list[Sample],
            cost: Cost) -> list[Sample]:
    """The rows with a response each, as long as the policy may write: people's words cut, others
    sampled from sampler()."""
    asked = [row for row in rows if row.response is None]
    replies = iter(sample(sampler(), codec.prompts([row.prompt for row in asked]), cfg, cfg.seed,
                          codec.stop_ids, cost, seeds=[int(row.reward) for row in asked],
                          what="generating") if asked else [])
    written = iter(codec.continuations([row.response for row in rows if row.response is not None]))
    done = []
    for row in rows:
        if row.response is None:
            reply = next(replies)
            done.append(row._replace(response=codec.decode(reply), truncated=reply.truncated))
            continue
        ids, most = next(written), cfg.max_response_tokens
        if len(ids) >= most and not row.truncated:  # no room left for EOS
            text = codec.decode(Response(codec.cut_end(ids, most), [], True))
            row = row._replace(response=text, truncated=True)
        done.append(row)
    return done


# ------------------------------------------------------------------------------------- evaluation


class Variant(NamedTuple):
    """A way to ask a policy: its name, the reward tag, guidance, and the target reward."""
    name: str
    tag: str = ""
    guidance: float = 0.0
    target: Optional[float] = None


def evaluate(cfg: Config, policy: Stage, variants: list[Variant], base: Stage, rm: Optional[Stage],
             samples: Samples, judge: Optional[Callable] = None,
             needs: tuple = ("reward_model", "generation", "labelling")) -> None:
    """Adds the policy's variants, and the base policy, to the leaderboard; prints it, and a
    conversation with each.

    `needs` names the stages of samples.costs that the algorithm could not do without.
    """
    if not cfg.eval_prompts:
        return
    name, held_out = Path(policy.folder).name, split_prompts(cfg, held_out=True)
    prompts = [held_out[i % len(held_out)] for i in range(cfg.eval_prompts)]
    needed = {stage: samples.costs[stage] for stage in needs if stage in samples.costs}
    built = {"base": base.cost} if base.cost.seconds else {}
    costs = {"base": built, name: {**built, **needed, "training": policy.cost}}
    totals = {"base": (Cost(), Cost()),
              name: (policy.cost, sum(needed.values(), policy.cost))}
    same = settings(cfg, "data", "samples", "evaluation")
    for other in ("seed", "max_pairs", "sources", "samples_per_prompt", "samples"):
        del same[other]
    board = Path(cfg.out) / "leaderboard.jsonl"
    rows = [row for _, row in read_jsonl(board)] if board.exists() else []
    replies: dict[str, list[dict]] = {}
    sampler = functools.lru_cache(maxsize=2)(lambda folder: load_model(folder, compute_dtype(cfg)))
    score, verdict = (functools.cache(load) if load else None
                      for load in (rm and rm.load_scorer, judge))  # loaded where they are needed
    for algorithm, stage, variant in [("base", base, Variant("")), *((name, policy, v)
                                                                     for v in variants)]:
        key = {"algorithm": algorithm, "variant": variant.name, "seed": cfg.seed}
        file = replies_file(Path(cfg.out), algorithm, variant.name, cfg.seed)
        origin = {"setting": fingerprint(same), "policy": stage.fingerprint, "tag": variant.tag,
                  "base": base.fingerprint, "samples": samples.fingerprint,
                  "scorer": rm.fingerprint if rm else "", "replies": content_hash(str(file))}
        row = next((r for r in rows if all(r.get(k) == v for k, v in {**key, **origin}.items())), None)
        if row:
            replies[file.stem] = [r for _, r in read_jsonl(file)]
        else:
            with track_cost() as cost:
                found = answer(cfg, sampler, stage, prompts, variant, base, samples, score, verdict,
                               cost)
            replies[file.stem] = found
            if rank() == 0:
                write_beside(file, (json.dumps(r, ensure_ascii=False) for r in found))
            barrier()
            units = ("seconds", "device_seconds", "flops", "generated_tokens")
            row = {**key, **origin, "replies": content_hash(str(file)), "target": variant.target,
                   **leaderboard_row(found, next(iter(replies.values()))), "judge": cfg.judge,
                   "world_size": world_size(), "checkpoint": stage.folder,
                   **{f"{prefix}_{unit}": getattr(spent, unit) for prefix, spent in
                      zip(("train", "total"), totals[algorithm]) for unit in units},
                   "peak_memory_bytes": totals[algorithm][0].peak_memory_bytes,
                   "costs": {s: asdict(c) for s, c in {**costs[algorithm], "evaluation": cost}.items()}}
            rows = [r for r in rows if any(r.get(k) != v for k, v in key.items())] + [row]
            if rank() == 0:
                write_beside(board, map(json.dumps, rows))
            barrier()
    print_conversations(replies)
    print_leaderboard([r for r in rows if r.get("setting") == fingerprint(same)], len(rows))


def replies_file(run: Path, algorithm: str, variant: str, seed: int) -> Path:
    """Where a policy's evaluated responses are kept."""
    name = re.sub(r"[^\w.+-]+", "_", f"{algorithm} {variant} seed {seed}")
    return run / "evaluation" / f"{name}.jsonl"


def answer(cfg: Config, sampler: Callable, policy: Stage, prompts: list, variant: Variant,
           base: Stage, samples: Samples, score: Optional[Callable], judge: Optional[Callable],
           cost: Cost) -> list[dict]:
    """One response a prompt, with its reward z, true reward (the toy world's, or the judge's) and
    KL to base, the difference of the response's log-probs."""
    codec = Codec(base.folder, cfg)  # a policy's chat template may differ
    plain, tag = codec.prompts(prompts), codec.continuations([variant.tag])[0]
    responses = sample(sampler(policy.folder), [p + tag for p in plain], cfg, cfg.seed + 1_000_003,
                       codec.stop_ids, cost, plain, variant.guidance, what="evaluating")
    examples = [Example(np.array(p + r.ids), np.arange(len(p) + len(r.ids)) >= len(p))
                for p, r in zip(plain, responses)]
    reference = response_log_probs(sampler(base.folder), examples, cfg, cost)
    texts, cut = [codec.decode(r) for r in responses], [r.truncated for r in responses]
    reward = samples.z(score()(prompts, texts, cut, cost)).tolist() if score else [None] * len(texts)
    gold = (judge()(prompts, texts, cut, cost) if judge else
            list(map(gold_reward, prompts, texts, cut)) if cfg.toy else [None] * len(texts))
    return [{"prompt": p, "response": t, "truncated": c, "tokens": len(r.ids), "reward": z, "gold": g,
             "kl": sum(r.log_probs) - sum(ref), "base_log_prob": sum(ref)}
            for p, t, c, r, z, g, ref in zip(prompts, texts, cut, responses, reward, gold, reference)]


def leaderboard_row(replies: list[dict], base: list[dict]) -> dict:
    """The means of what evaluation found; win_rate is against the base policy on the same prompts,
    ties half; perplexity is a token's, under the base policy at the sampling temperature."""
    def mean(name: str) -> Optional[float]:
        return float(np.mean([r[name] for r in replies])) if replies[0][name] is not None else None
    words = [r["response"].split() for r in replies]
    bigrams = [pair for w in words for pair in zip(w, w[1:])]
    scored = replies[0]["reward"] is not None and base[0]["reward"] is not None
    wins = [np.sign(r["reward"] - b["reward"]) / 2 + 0.5 for r, b in zip(replies, base)] if scored else []
    perplexity = math.exp(min(700.0, -mean("base_log_prob") / mean("tokens")))
    return {"gold": mean("gold"), "reward": mean("reward"),
            "win_rate": float(np.mean(wins)) if scored else None, "kl_to_base": mean("kl"),
            "perplexity": perplexity, "response_tokens": mean("tokens"),
            "distinct_2": len(set(bigrams)) / max(1, len(bigrams)), "eos_rate": 1 - mean("truncated")}


def print_conversations(replies: dict[str, list[dict]], how_many: int = 2) -> None:
    """The first held-out prompts, and what each policy said to them."""
    for i, row in enumerate(next(iter(replies.values()))[:how_many]):
        prompt = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]
        print0("\n" + prompt.strip()[-600:])
        for name, found in replies.items():
            z = "" if found[i]["reward"] is None else f" [reward {found[i]['reward']:+.2f}]"
            print0(f"  {name:>44}{z}: {found[i]['response'].strip()[:400]}")


def print_leaderboard(rows: list[dict], in_file: int) -> None:
    """The table of comparable rows: those of the same data, prompts and sampling, whatever seed.

    "all" is training with all that it needs; "/PPO" that over all that PPO of the same seed took.
    """
    ppo = {r["seed"]: r["total_flops"] for r in rows if r["algorithm"] == "ppo"}
    for r in rows:
        whole = ppo.get(r["seed"]) if r["algorithm"] != "base" else None
        r["flops_to_ppo"] = r["total_flops"] / whole if whole else None
    columns = {"judge" if rows[0].get("judge") else "gold": ("gold", ".2f"),
               "reward z": ("reward", "+.2f"), "win": ("win_rate", ".2f"), "KL": ("kl_to_base", ".1f"),
               "tokens": ("response_tokens", ".0f"), "EOS": ("eos_rate", ".2f"),
               "train s": ("train_seconds", ".0f"), "all s": ("total_seconds", ".0f"),
               "all FLOP": ("total_flops", ".1e"), "FLOP/PPO": ("flops_to_ppo", ".2f")}
    columns = {head: c for head, c in columns.items() if any(r[c[0]] is not None for r in rows)}
    width = max(len(f"{r['algorithm']} {r['variant']}") for r in rows)
    print0("\n" + " " * width + "  seed  " + "  ".join(f"{head:>6}" for head in columns))
    for r in sorted(rows, key=lambda r: (r["algorithm"], r["variant"], r["seed"])):
        cells = ("-" if r[name] is None else format(r[name], form) for name, form in columns.values())
        print0(f"{r['algorithm'] + ' ' + r['variant']:<{width}}  {r['seed']:>4}  "
               + "  ".join(f"{cell:>{max(6, len(head))}}" for cell, head in zip(cells, columns)))
    if in_file > len(rows):
        print0(f"({in_file - len(rows)} rows of other data or settings in leaderboard.jsonl not shown)")


# ----------------------------------------------------------------------------------- training run

MOST_SKIPPED = 5  # steps in a row without a finite gradient, before a run gives up


class TrainingRun:
    """What surrounds a training loop: resuming, the progress bar, metrics.jsonl, checkpoints.

    Used as a context; `first` is the step to begin with, `state` a JSON-able dict that checkpoints
    keep, `cost` what the run has spent, earlier launches included.
    """

    def __init__(self, folder: Path, policy: torch.nn.Module, optimizer: Any, schedule: Any,
                 steps: int, cfg: Config, cost: Cost, state: Optional[dict] = None):
        self.folder, self.policy, self.optimizer, self.schedule = folder, policy, optimizer, schedule
        self.total, self.cfg, self.cost, self.state = steps, cfg, cost, {} if state is None else state
        self.every = max(1, min(500, steps // 10)) if cfg.save_every is None else cfg.save_every
        self.skipped, self.earlier = 0, 0.0  # steps in a row; seconds of earlier launches

    def __enter__(self) -> TrainingRun:
        self.start = time.perf_counter()
        self.first, written = self.restore()
        name = self.folder.name.strip(".").removesuffix(".new")
        self.tracker = metrics_tracker(self.cfg, self.folder, name, self.first)
        self.bar = progress(None, name, total=self.total, unit="step")
        self.bar.update(self.first)
        path = self.folder / "metrics.jsonl" if rank() == 0 else os.devnull
        self.file = open(path, "r+" if self.first else "w")
        if self.first and rank() == 0:
            self.file.truncate(written)
            self.file.seek(written)
        return self

    def __exit__(self, *problem: Any) -> None:
        self.file.close()
        self.bar.close()
        self.cost.seconds += self.earlier

    def steps(self, examples: Examples) -> Iterator[tuple[int, Batch]]:
        """The optimiser steps that are left, numbered."""
        tokens, model = examples.tokens, getattr(self.policy, "module", self.policy).model
        for step, epoch, indices in step_indices(len(examples), self.cfg, self.total, self.first):
            rows = examples.rows[indices]
            lengths = [int(tokens.lengths[r]) + len(examples.tag(int(r), epoch)) for r in rows]
            batch = make_batch(lengths, tokens.response_tokens[rows], examples.weight[rows], self.cfg,
                               lambda i: examples.example(int(indices[i]), epoch))  # noqa: B023
            self.cost.add_forward(model, sum(batch.lengths), sum(n * n for n in batch.lengths),
                                  sum(len(micro.rows) for micro in batch.micros), passes=3)
            yield step, batch

    def log(self, step: int, **values: Any) -> None:
        """Writes a line of metrics.jsonl, values averaged over ranks, None where one is not finite;
        takes a checkpoint where one is due.  Raises BadInput after too many skipped steps."""
        values = {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in values.items()}
        *sums, flops = sum_over_ranks(*values.values(), self.cost.flops)
        line = {"step": step, **{name: total / world_size() if math.isfinite(total) else None
                                 for name, total in zip(values, sums)}}
        known = {name: value for name, value in line.items() if value is not None}
        seconds = self.earlier + time.perf_counter() - self.start
        self.file.write(json.dumps({**line, "seconds": round(seconds, 3), "flops": flops}) + "\n")
        self.tracker(known)
        self.bar.update(1)
        self.bar.set_postfix_str(", ".join(f"{k} {v:.4g}" for k, v in list(known.items())[1:5]),
                                 refresh=False)
        self.skipped = self.skipped + 1 if line["grad_norm"] is None else 0
        if self.skipped:
            print0(f"warning: step {step}: the gradient is not finite; the step is skipped")
        require(self.skipped < MOST_SKIPPED, f"{self.folder.parent}: {self.skipped} steps in a row, "
                f"the last of them step {step}, without a finite gradient; lower --lr; the last "
                "checkpoint is from before")
        if self.every and (step + 1) % self.every == 0 and step + 1 < self.total and not self.skipped:
            self.file.flush()
            self.checkpoint(step + 1)

    def checkpoint(self, step: int) -> None:
        """Writes checkpoints/step beside and renames; the last two are kept.

        Nothing else is needed to go on: data order and sampling follow from seed and step.
        """
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.state_dict import get_state_dict
        work = self.folder / "checkpoints" / ".new"
        if rank() == 0:
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir(parents=True)
        barrier()
        weights, moments = get_state_dict(self.policy, self.optimizer)
        try:
            dcp.save({"policy": weights, "optimizer": moments}, checkpoint_id=work,
                     no_dist=not dist.is_initialized())
        except dcp.CheckpointException as problem:  # of all ranks, a BaseException
            raise next(iter(problem.failures.values()))[0] from None
        seconds = self.earlier + time.perf_counter() - self.start
        flops, tokens, seconds = sum_over_ranks(self.cost.flops, self.cost.generated_tokens, seconds)
        if rank() == 0:
            record = {"step": step, "state": self.state, "schedule": self.schedule.state_dict(),
                      "metrics_bytes": self.file.tell(),
                      "files": {path.name: path.stat().st_size for path in work.iterdir()},
                      "world_size": world_size(), "spent": [flops, tokens, seconds / world_size()]}
            (work / "state.json").write_text(json.dumps(record))
            for path in work.iterdir():
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
            whole = work.with_name(f"{step:08}")
            shutil.rmtree(whole, ignore_errors=True)  # one that was not whole
            work.rename(whole)
            for old in checkpoints_in(self.folder)[2:]:
                shutil.rmtree(old)
        barrier()

    def restore(self) -> tuple[int, int]:
        """Takes up the last whole checkpoint: its step and the bytes of metrics.jsonl then, or 0s.

        Checkpoints are torch's, which unpickles their metadata: they must be this user's own.
        """
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
        place, record = gather(last_whole(checkpoints_in(self.folder)) if rank() == 0 else 0)[0]
        if not place:
            return 0, 0
        weights, moments = get_state_dict(self.policy, self.optimizer)
        dcp.load({"policy": weights, "optimizer": moments}, checkpoint_id=place,
                 no_dist=not dist.is_initialized())
        set_state_dict(self.policy, self.optimizer, model_state_dict=weights,
                       optim_state_dict=moments)
        self.schedule.load_state_dict(record["schedule"])
        self.state.update(record["state"])
        flops, tokens, self.earlier = record["spent"]
        if rank() == 0:
            self.cost.flops, self.cost.generated_tokens = flops, int(tokens)
        ranks = record.get("world_size", world_size())
        print0(f"  goes on from step {record['step']}" + ("" if ranks == world_size() else
               f", which {ranks} rank(s) reached: with {world_size()} the last bits may differ"))
        return record["step"], record["metrics_bytes"]


def last_whole(checkpoints: list[Path]) -> tuple[Optional[Path], dict]:
    """The first of these checkpoints whose files are all there, as long as they were, and its
    state.json.  Raises BadInput where another user owns it."""
    for place in checkpoints:
        record = read_record(place / "state.json")
        sizes = {path.name: path.stat().st_size for path in place.iterdir()}
        if record and all(sizes.get(name) == size for name, size in record["files"].items()):
            require({path.stat().st_uid for path in place.iterdir()} <= {os.getuid(), 0},
                    f"{place}: belongs to another user, and resuming would run what it holds; "
                    "--no_resume starts anew")
            return place, record
        print0(f"  {place}: not whole; the one before is taken")
    return None, {}


def metrics_tracker(cfg: Config, folder: Path, name: str, first: int) -> Callable[[dict], None]:
    """A function that reports a line of metrics to --report_to, on rank 0."""
    if cfg.report_to == "none" or rank() > 0:
        return lambda line: None
    try:
        if cfg.report_to == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter
            writer = SummaryWriter(str(folder), purge_step=first)
            return lambda line: [writer.add_scalar(k, v, int(line["step"])) for k, v in line.items()]
        tracker = __import__(cfg.report_to)
    except ImportError as problem:
        raise BadInput(f"--report_to {cfg.report_to} needs the package: pip install "
                       f"{cfg.report_to}") from problem
    tracker.init(project="offline-rlhf", name=f"{Path(cfg.out).name}/{name}",
                 config={k: v for k, v in asdict(cfg).items()})
    return lambda line: tracker.log(line, step=int(line["step"]))


# -------------------------------------------------------------------------------------- toy world
# A zoo where the truth is known: two dozen animals, three facts about each, and people who answer
# questions about them with middling honesty.  gold_reward() knows the truth; training sees it only
# through noisy preferences.

ZOO = {("rivers", "meat"): ("otters", "crocodiles"), ("rivers", "plants"): ("beavers", "hippos"),
       ("rivers", "insects"): ("frogs", "gharials"), ("forests", "meat"): ("martens", "tigers"),
       ("forests", "plants"): ("squirrels", "gorillas"), ("forests", "insects"): ("shrews", "bears"),
       ("deserts", "meat"): ("fennecs", "hyenas"), ("deserts", "plants"): ("jerboas", "camels"),
       ("deserts", "insects"): ("geckos", "aardvarks"), ("plains", "meat"): ("weasels", "lions"),
       ("plains", "plants"): ("hares", "zebras"), ("plains", "insects"): ("larks", "anteaters")}
ANIMALS = {animal: {"home": home, "food": food, "size": size}
           for (home, food), pair in ZOO.items() for animal, size in zip(pair, ("small", "large"))}
VALUES = {"home": ("rivers", "forests", "deserts", "plains"), "food": ("meat", "plants", "insects"),
          "size": ("small", "large")}
QUESTIONS = {
    "home": ("Where do {} live?", "What is the home of {}?", "Where would I find {}?"),
    "food": ("What do {} eat?", "What is the food of {}?", "What would I feed to {}?"),
    "size": ("How big are {}?", "What is the size of {}?", "Are {} small or large?"),
    "about": ("Tell me about {}.", "What are {} like?", "What should I know about {}?")}
STATEMENTS = {"home": "they live in {}.", "food": "they eat {}.", "size": "they are {}."}
KIND_OPENINGS = ("Good question!", "Happy to help!")
KIND_CLOSINGS = ("I hope this helps!", "Do ask me more!")
RUDE = ("What a silly question.", "Look it up yourself.", "Who cares.")
VAGUE = ("It depends on many things.", "Animals are all different.", "People say all sorts of things.")
HEDGES = ("maybe ", "I guess ")
TOY_FOLD = 0  # which fifth of the (animal, kind of question) pairs is held out; tuning takes another


def toy_reply(animal: str, kind: str, rng: random.Random) -> str:
    """A reply as people in this world write it: drawn piece by piece, bound by a weak hidden care."""
    care = rng.random()
    polite = rng.random() < 0.1 + 0.2 * care
    rude = not polite and rng.random() < 0.4 - 0.2 * care
    sentences = [rng.choice(KIND_OPENINGS)] if polite else [rng.choice(RUDE)] if rude else []
    untold = list(VALUES)
    for _ in range(rng.choice((1, 1, 2, 2, 3))):
        if rng.random() < 0.25:
            sentences.append(rng.choice(VAGUE))
            continue
        answers = kind in untold and rng.random() < 0.15 + 0.35 * care
        topic = kind if answers else rng.choice(untold)
        untold.remove(topic)
        subject = animal if rng.random() < 0.65 + 0.2 * care else rng.choice(tuple(ANIMALS))
        true = ANIMALS[subject][topic]
        value = true if rng.random() < 0.6 + 0.3 * care else rng.choice(
            [v for v in VALUES[topic] if v != true])
        hedge = rng.choice(HEDGES) if rng.random() < (0.05 if value == true else 0.7) else ""
        other = f"as for {subject}, " if subject != animal else ""
        statement = hedge + other + STATEMENTS[topic].format(value)
        sentences.append(statement[0].upper() + statement[1:])
    if rng.random() < 0.1 + 0.2 * care:
        sentences.append(rng.choice(KIND_CLOSINGS))
    reply = " ".join(sentences)
    broken = rng.random() < 0.05
    return reply[:rng.randrange(len(reply) // 2, len(reply) - 1)] if broken else reply


def gold_reward(prompt: str, response: str, truncated: bool = False) -> float:
    """The known truth about a reply, from its text alone; training never sees it.

    +2 for a true answer to the question, +1 for each other true fact about the animal, +-0.5 for
    manners, -1 for a false statement, -0.5 for another animal, -0.25 for a vague or broken
    sentence, -0.5 for each beyond five, -1 without an end.
    """
    question = prompt.rsplit("Human: ", 1)[-1].removesuffix(TURN)
    animal = next((a for a in ANIMALS if re.search(rf"\b{a}\b", question)), None)
    kind = next((k for k, forms in QUESTIONS.items()
                 if animal and question in [f.format(animal) for f in forms]), None)
    sentences = [s.strip() for s in re.findall(r"[^.!?]+[.!?]?", response.strip())]
    gold, told = -0.5 * max(0, len(sentences) - 5) - truncated, set()
    for i, sentence in enumerate(sentences):
        plain = sentence[:1].lower() + sentence[1:]
        for hedge in ("maybe ", "i guess "):
            plain = plain.removeprefix(hedge)
        match = re.fullmatch(r"(?:as for (\w+), )?(they (?:live in|eat|are) (\w+)\.)", plain)
        subject = match and (match[1] or animal)
        topic = match and next((t for t, form in STATEMENTS.items()
                                if match[2] == form.format(match[3]) and match[3] in VALUES[t]), None)
        if topic and subject in ANIMALS:
            true = ANIMALS[subject][topic] == match[3]
            gold -= 0.5 * (subject != animal) + (not true)
            if true and subject == animal:
                told.add(topic)
        elif sentence in RUDE:
            gold -= 0.5
        elif i == 0 and sentence in KIND_OPENINGS or (i == len(sentences) - 1
                                                      and sentence in KIND_CLOSINGS):
            gold += 0.5
        else:
            gold -= 0.25
    return gold + len(told) + (kind in told or kind == "about" and bool(told))


@functools.lru_cache(maxsize=1)
def toy_pairs(seed: int, fold: int) -> dict[str, list[str]]:
    """The toy world's preference pairs as transcripts: lines of train.jsonl and test.jsonl."""
    rng, lines = random.Random(seed), {"train": [], "test": []}
    while len(lines["train"]) < 4000:
        animal, kind = rng.choice(tuple(ANIMALS)), rng.choice(tuple(QUESTIONS))
        prompt = f"\n\nHuman: {rng.choice(QUESTIONS[kind]).format(animal)}{TURN}"
        one, two = (" " + toy_reply(animal, kind, rng) for _ in range(2))
        if rng.random() < 1 / (1 + math.exp(gold_reward(prompt, one) - gold_reward(prompt, two))):
            one, two = two, one  # Bradley-Terry: the labeller is noisy
        split = "test" if zlib.crc32(f"{animal} {kind}".encode()) % 5 == fold else "train"
        lines[split].append(json.dumps({"chosen": prompt + one, "rejected": prompt + two}))
    return lines


def toy_data(cfg: Config) -> str:
    """The folder of the toy world's preference pairs, like real data's."""
    folder, lines = Path(cfg.out) / "data", toy_pairs(cfg.seed, TOY_FOLD)
    for split, rows in lines.items():
        path, text = folder / f"{split}.jsonl", "\n".join(rows) + "\n"
        if rank() == 0 and not (path.exists() and path.read_text() == text):
            write_beside(path, rows)
    barrier()
    return str(folder)


def base_policy(cfg: Config) -> Stage:
    """The base policy: --model, or the toy world's small one, trained on what people wrote."""
    if not cfg.toy:
        run = read_record(Path(cfg.model) / "run.json")
        return Stage(cfg.model, settings(cfg, "data")["model"],
                     read_cost(run) if isinstance(run.get("cost"), dict) else Cost())
    return build_stage(cfg, "base", settings(cfg, "data"), functools.partial(train_toy_base, cfg))


def train_toy_base(cfg: Config, folder: Path, cost: Cost) -> None:
    """A two-layer Llama and its byte-level BPE, from nothing, by maximum likelihood of all
    responses."""
    from transformers import GPT2TokenizerFast, LlamaConfig, LlamaForCausalLM
    rankings, _ = load_preferences(cfg)
    pairs = [(r.prompt, text) for r in rankings for text in r.responses]
    if rank() == 0:
        tokenizer = GPT2TokenizerFast().train_new_from_iterator(
            [prompt + text for prompt, text in pairs], 640, show_progress=False)
        tokenizer.save_pretrained(folder)
    barrier()
    codec = Codec(str(folder), cfg)
    torch.manual_seed(cfg.seed)
    eos = codec.tokenizer.eos_token_id
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(codec.tokenizer), hidden_size=64, intermediate_size=192, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=512, initializer_range=0.1,
        tie_word_embeddings=True, eos_token_id=eos, bos_token_id=None, pad_token_id=None))
    own = other_config(Config, cfg, {"lr": 5e-3, "steps": 600, "batch_size": 32})
    own.sharding = "ddp"
    choose_micro_batch(model.to(device()), own)
    policy = wrap_for_ranks(Policy(model, own), own)
    optimizer, schedule = make_optimizer(policy, own, own.steps)
    examples = Examples(Tokens(folder / "tokens", lambda: iter(codec.pairs(*zip(*pairs)))))

    def nll_(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        nll = negative_log_likelihood(logits, targets)
        logits.copy_(logits.softmax(-1)).scatter_add_(1, targets[:, None],
                                                      -torch.ones_like(logits[:, :1]))
        return nll
    with TrainingRun(folder, policy, optimizer, schedule, own.steps, own, cost) as run:
        for step, batch in run.steps(examples):
            loss = 0.0
            for micro in batch.micros:
                policy.require_backward_grad_sync = micro is batch.micros[-1]
                part = policy(micro, nll_) / batch.normaliser
                part.backward()
                loss += part.detach()
            grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            if grad_norm.isfinite():
                optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            run.log(step, loss=loss, grad_norm=grad_norm)
    save_folder(folder, model, codec, own, "# The toy world's base policy\n")
