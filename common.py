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
            gpu, timeout = device().type == "cuda", timedelta(minutes=cfg.dist_timeout_minutes)
            if gpu:
                torch.cuda.set_device(device())
            dist.init_process_group("nccl" if gpu else "gloo", timeout=timeout)
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
    name = f"{Path(sys.argv[0]).name}: " + (f"rank {rank()}: " if rank() else "")
    print(name + printable(problem), file=sys.stderr)
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
    """A flag: the interval `within` which it must lie, its default in the toy world, and the first
    stage that depends on it, one of STAGES; on "runtime" none does."""
    text = Help((help + ("" if toy is None else f" [toy world: {toy}]")).replace("%", "%%"))
    text.toy, text.stage, text.within = toy, stage, within
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass
class Config:
    """The flags that every script shares."""
    out: str = flag("runs/model", "the run's folder", toy="runs/toy")
    model: Optional[str] = flag(None, "base policy: folder or Hub id [toy world]", stage="data")
    preferences: Optional[str] = flag(
        None, "chosen and rejected, or ranked: file, folder, Hub id", stage="data")
    max_pairs: Optional[int] = flag(None, "preferences used, at most", "[1, inf)", stage="data")
    held_out: float = flag(
        0.1, "share of prompts held out, unless the data have a test split", "(0, 1)", stage="data")
    max_prompt_tokens: int = flag(
        1024, "longer prompts lose old turns, or their start", "[1, inf)", toy=64, stage="data")
    max_response_tokens: int = flag(
        1024, "longer responses are cut, and then carry no EOS", "[1, inf)", toy=64, stage="data")
    rendered_text: bool = flag(
        False, "texts hold the chat template's special tokens: read them as such", stage="data")
    train_on: Literal["last_turn", "all_assistant_turns"] = flag(
        "last_turn", "which turns of `messages` carry the loss", stage="data")
    seed: int = flag(0, "of everything that is drawn", "[0, 4294967295]", stage="data")
    responses: Optional[str] = flag(None, "label these: rows of prompt, response", stage="samples")
    prompts: Optional[str] = flag(None, "generate for these: rows of prompt", stage="samples")
    samples: Optional[str] = flag(
        None, "train on these: rows of prompt, response, reward", stage="samples")
    reward_model: Optional[str] = flag(
        None, "sequence classifier: score with it, train none", stage="samples")
    sources: Literal["dataset+generated", "dataset", "generated"] = flag(
        "dataset+generated", "which responses are labelled", stage="samples")
    samples_per_prompt: int = flag(1, "generated responses", "[1, inf)", toy=9, stage="samples")
    temperature: float = flag(1.0, "of all sampling; 0: greedy", "[0, 1000]", stage="samples")
    top_p: float = flag(
        1.0, "nucleus: the fewest tokens this probable together", "[0.000001, 1]", stage="samples")
    judge: Optional[str] = flag(
        None, "a reward model that training never sees: it scores `gold`", stage="evaluation")
    eval_prompts: int = flag(
        256, "held-out prompts evaluated on, again if there are fewer; 0: none", "[0, inf)",
        toy=512, stage="evaluation")
    lr: float = flag(
        1e-5, "peak learning rate; 3 % warm-up, then cosine to 0", "(0, 1000]", stage="training")
    epochs: int = flag(1, "passes over the training examples", "[1, inf)", stage="training")
    steps: Optional[int] = flag(
        None, "optimiser steps, in place of --epochs", "[1, inf)", stage="training")
    batch_size: int = flag(
        128, "sequences per step, all ranks together", "[1, inf)", toy=32, stage="training")
    micro_batch_tokens: Optional[int] = flag(
        None, "tokens of a forward, for memory [CPU: 8,192; GPU: what fits]", "[1, inf)", toy=16384)
    slots: Optional[int] = flag(
        None, "responses sampled at a time [CPU: 64; GPU: what fits, at most 512]", "[1, inf)")
    dtype: Literal["auto", "bf16", "fp32"] = flag(
        "auto", "of matrix products, weights stay float32; auto: bf16 where the hardware has it",
        toy="fp32")
    compile: bool = flag(True, "torch.compile the loss kernels, and on a GPU the model's blocks")
    sharding: Literal["ddp", "fsdp"] = flag(
        "ddp", "fsdp: weights, gradients and optimiser spread over the ranks (FSDP2)")
    save_every: Optional[int] = flag(
        None, "steps between checkpoints, two are kept; 0: none [a tenth of the run, at most 500]",
        "[0, inf)")
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
        require(self.temperature == 0 or self.temperature >= 1e-3,
                f"--temperature is 0, for greedy, or at least 0.001, not {self.temperature}")
        hint = "--model: name the base policy's folder or Hub id"
        require(not (self.samples and self.responses), "--samples are labelled and --responses are "
                "not: give one of them")
        require(self.toy or self.model, f"--preferences goes with {hint}")
        require(not self.toy or not (self.samples or self.responses or self.prompts),
                f"--samples, --responses and --prompts go with {hint}")
        require(self.toy or self.preferences or self.samples or
                (self.prompts or self.responses) and self.reward_model, "--model needs data: "
                "--preferences, or --samples, or --prompts or --responses with --reward_model")

    @property
    def forward_tokens(self) -> int:
        """Tokens that a forward may hold: --micro_batch_tokens, or 8,192 while it has no value."""
        return self.micro_batch_tokens or 8192

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
    if not names & {"model", "preferences", "help"} and "-h" not in args:  # help names both
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
    for name in map(str, flags):
        require(name != "config", f"--config {path}: names another file by `config`; give one")
        require(not name.startswith("no_"), f"--config {path}: in place of `{name}` write "
                f"`{name[3:]}: false`")
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
    native = (torch.cuda.is_bf16_supported(including_emulation=False)
              if device().type == "cuda" else torch.cpu._is_avx512_bf16_supported())
    bf16 = cfg.dtype == "bf16" or cfg.dtype == "auto" and native
    return torch.bfloat16 if bf16 else torch.float32


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
        *sums, peak = vars(self).values()
        *other_sums, other_peak = vars(other).values()
        return Cost(*map(sum, zip(sums, other_sums)), max(peak, other_peak))

    def add_forward(self, model: Any, tokens: int, pairs: int, rows: int, passes: int = 1) -> None:
        """Adds a transformer's call: tokens, pairs of a token and what it attends to, head rows.

        A weight costs 2 FLOPs a token, attention 4 a layer, pair and unit of width, the head the
        rows where it runs, the input embedding nothing; with backward it is 3 passes.  (Kaplan et
        al. 2020, arXiv 2001.08361, section 2.1.)
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
            gc.collect()  # sharded models are cycles, and the next stage needs the memory
            more = more() if callable(more) else more or {}
            write_record(work / "run.json", wanted, cost, **more)
    record = read_record(folder / "run.json")
    return Stage(os.path.join(cfg.out, name), fingerprint(record["settings"]), read_cost(record))


def train_stage(cfg: Config, algorithm: str, train: Callable, base: Stage, samples: Samples,
                *stages: str, **more: Any) -> Stage:
    """The algorithm's policy: from before, or train(cfg, base, samples, folder, cost)'s.

    It depends on training flags, base policy and samples, flags of other `stages`, and `more`.
    """
    wanted = settings(
        cfg, "training", *stages, seed=cfg.seed, max_prompt_tokens=cfg.max_prompt_tokens,
        max_response_tokens=cfg.max_response_tokens, rendered_text=cfg.rendered_text,
        train_on=cfg.train_on, base=base.fingerprint, samples=samples.fingerprint, **more)
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
        stat = path.stat()
        hashes.append((str(path.relative_to(root)),
                       hash_file(path, stat.st_size, stat.st_mtime_ns)))
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
    """Whether the stage was built with the wanted settings (of JSON's types); says what changed."""
    finish_interrupted_swap(record.parent)
    built = read_record(record).get("settings")
    changes = [f"{name} ({built.get(name)} -> {value})" for name, value in wanted.items()
               if built and built.get(name) != value]
    state = f"{os.path.relpath(record.parent)}, from before" if built else "to be built"
    if changes:
        state = f"built again because of {', '.join(changes)}"
    print0(f"{stage}: {state}")
    return bool(built) and not changes


@contextlib.contextmanager
def new_folder(path: Path, wanted: dict, resume: bool = True) -> Iterator[Path]:
    """Yields a folder beside `path` to write into, and renames it to `path` when all is written.

    Raises BadInput where it holds checkpoints of other settings: --no_resume alone deletes work.
    """
    work, old = path.with_name(f".{path.name}.new"), path.with_name(f".{path.name}.old")
    started = read_record(work / "started.json")
    changed = [name for name in wanted if started.get(name) != wanted[name]]
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

GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# The same after each digit was set apart, as SmolLM2 does: there white space ends at a digit, too.
DIGITS_SPLIT = r"\p{N}|'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
PROBE = ("Hello  world,\n\n\n  it's 12345 o'clock…\tnaïve café 東京タワー привет שלום \U0001f468‍"
         "\U0001f469‍\U0001f467\U0001f3fd \r\nx  7  y   \n 3.14e-10 ½²³ <|endoftext|>user <s></s>"
         "[INST] don't WE'LL I'd   trailing   ", "    def f(x):\n        return x**2  # \t\t!\n\n",
         "1 2  3   4    5 a1b22c333 ,,,...;;; ====---- ___", " ", "\n", "é", "")


class Codec:
    """Text to token ids and back for one model: its tokenizer, and how its turns end."""

    def __init__(self, folder: str, cfg: Config):
        """Raises BadInput where there is no tokenizer, or none that could end a response."""
        from transformers import AutoConfig, AutoTokenizer, GenerationConfig
        with load_errors(folder, "a tokenizer"):
            self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        self.cfg, self.said, self.cuts = cfg, set(), 0
        self.encode = text_encoder(self.tokenizer)
        self._encode_data = self._rendered if cfg.rendered_text else self.encode
        self.before, self.before_ids = self._context()
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        self.bos = [t for t in self.tokenizer("")["input_ids"] if t == bos or t != eos]
        self.configs, ends = [], [eos]
        for kind in (GenerationConfig, AutoConfig):
            with contextlib.suppress(OSError, ValueError):
                config = kind.from_pretrained(folder, trust_remote_code=False)
                self.configs.append(config)
                found = getattr(config, "eos_token_id", None)
                ends += found if isinstance(found, list) else [found]
        self.stop_ids = [t for t in dict.fromkeys(ends) if t is not None]
        require(self.stop_ids, f"{folder}: neither its tokenizer nor its configuration has an EOS "
                "token, so no response could end")
        self.eos = [self.stop_ids[0] if eos is None else eos]  # ends a response to a text prompt
        self.turn_end = self.turn_tail = self.eos              # and one to chat messages
        if self.tokenizer.chat_template:
            self._read_turn_end(folder)
        self.check_fits(folder)

    def check_fits(self, folder: str, tag: str = "") -> None:
        """Raises BadInput if the model has too few embeddings for the tokenizer, or positions for
        prompt, BOS, reward tag and response."""
        size, more = len(self.tokenizer), len(self.bos + self.encode([tag])[0])
        need = self.cfg.max_prompt_tokens + self.cfg.max_response_tokens + more
        for config in self.configs:
            shape = config.get_text_config() if hasattr(config, "get_text_config") else config
            rows = getattr(shape, "vocab_size", None) or math.inf
            most = getattr(shape, "max_position_embeddings", None) or math.inf
            require(size <= rows, f"{folder}: the tokenizer has {size:,} tokens and the model "
                    f"{rows:,} embeddings; resize_token_embeddings first")
            require(need <= most, f"{folder} reads at most {most} tokens, and prompt, response"
                    f"{', BOS' * bool(self.bos)}{', reward tag' * bool(tag)} may take {need}: "
                    "lower --max_prompt_tokens or --max_response_tokens")

    def _context(self) -> tuple[str, list[int]]:
        """Text (and its ids) to encode responses after, where a tokenizer marks the first word."""
        for text in ("", "\n", ":"):
            ids, word, line, newline = self.encode([text, text + "a", text + "\na", "\n"])
            unmarked = text or line[len(newline):] == word
            if unmarked and all(row[:len(ids)] == ids for row in (word, line)):
                return text, ids
        return "", []

    def _read_turn_end(self, folder: str) -> None:
        """What the chat template writes after a reply, and where in it the turn ends."""
        marked = [{"role": "user", "content": "\ue000"}, {"role": "assistant", "content": "\ue001"}]
        try:
            tail = self.tokenizer.apply_chat_template(marked, tokenize=False).split("\ue001")[-1]
        except Exception:  # a template that needs more than two plain turns
            return
        ids, = self._continue(self._rendered, [tail])
        special = {*self.stop_ids, *self.tokenizer.added_tokens_decoder}
        end = next((t for t in ids if t in special), None)
        if end is None:
            return
        self.turn_end, self.turn_tail = ids[:ids.index(end) + 1], ids
        if end not in self.stop_ids:
            token = self.tokenizer.convert_ids_to_tokens(end)
            print_once(f"{folder}: its chat template ends a turn with {token}, which neither its "
                       "tokenizer nor its generation_config names as an end: taken as one here")
            self.stop_ids.append(end)

    def _rendered(self, texts: list[str]) -> list[list[int]]:
        """Ids of texts that a template wrote: special tokens are what they are."""
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []

    def _continue(self, encode: Callable, texts: list[str]) -> list[list[int]]:
        """Ids of texts that continue others: no word marker at the start that was not written."""
        whole, n = encode([self.before + text for text in texts]), len(self.before_ids)
        return [row[n:] if row[:n] == self.before_ids else encode([text])[0]
                for row, text in zip(whole, texts)]

    def continuations(self, texts: list[str]) -> list[list[int]]:
        """Ids of responses, or of other texts of the user's that continue a prompt."""
        self._notice_special(texts)
        return self._continue(self._encode_data, texts)

    def _special(self) -> tuple[str, ...]:
        return tuple(t.content for t in self.tokenizer.added_tokens_decoder.values() if t.special)

    def _notice_special(self, texts: list[str]) -> None:
        """Says once if texts look rendered: they begin or end with the text of a special token."""
        if self.cfg.rendered_text or "rendered" in self.said:
            return
        special = self._special()
        count = sum(t.startswith(special) or t.rstrip().endswith(special) for t in texts)
        if special and count:
            self.said.add("rendered")
            print0(f"  {count} of {len(texts)} texts begin or end with a special token's text, read"
                   " as plain characters; if a chat template wrote it, give --rendered_text")

    def prompts(self, prompts: list, max_tokens: Optional[int] = None) -> list[list[int]]:
        """Prompts as ids: text after BOS, chat messages through the template up to the reply.
        Longer ones are cut to `max_tokens`: text at its start, chat messages lose oldest turns."""
        most = max_tokens or self.cfg.max_prompt_tokens
        plain = [p for p in prompts if isinstance(p, str)]
        self._notice_special(plain)
        encoded, found, cut = iter(self._encode_data(plain)), [], 0
        for prompt in prompts:
            is_text = isinstance(prompt, str)
            ids = next(encoded) if is_text else self.chat(prompt)
            if len(ids) > most:
                cut += 1
                ids = self._cut_start(ids, most) if is_text else \
                    self.chat(self._shorten(prompt, most))
            if is_text and ids[:len(self.bos)] != self.bos:
                ids = self.bos + ids
            found.append(ids)
        if cut and most not in self.said:
            self.said.add(most)  # PPO encodes prompts at each iteration
            print0(f"  {cut:,} of {len(prompts):,} prompts are longer than {most} tokens and were "
                   "cut: text at its start, chat messages by their oldest turns")
        return found

    def _cut_start(self, ids: list[int], most: int) -> list[int]:
        """The last tokens, from where a character begins."""
        ids = ids[-most:]
        while ids and self.tokenizer.decode(ids).startswith("\ufffd"):
            ids = ids[1:]
        return ids

    def cut_end(self, ids: list[int], most: int) -> list[int]:
        """The first tokens, up to where a character ends."""
        if len(ids) > most:
            ids, self.cuts = ids[:most], self.cuts + 1
            while len(ids) > 1 and self.tokenizer.decode(ids[-8:]).endswith("\ufffd"):
                ids = ids[:-1]
        return ids

    def say_cuts(self) -> None:
        """Says how many responses were cut since the last time."""
        if self.cuts:
            print0(f"  {self.cuts:,} responses are longer than {self.cfg.max_response_tokens} "
                   "tokens and were cut; after them no end is taught")
        self.cuts = 0

    def _shorten(self, messages: list[dict], most: int) -> list[dict]:
        """The conversation without its oldest turns; if need be, the last one without its start."""
        system = [m for m in messages[:1] if m["role"] == "system"]
        turns = messages[len(system):]
        while len(turns) > 1 and len(self.chat(system + turns)) > most:
            turns = turns[2 if len(turns) > 2 and turns[1]["role"] == "assistant" else 1:]
        while (over := len(self.chat(system + turns)) - most) > 0:
            content = self.encode([turns[0]["content"]])[0]
            require(len(content) > over, f"--max_prompt_tokens {most}: too few for the template "
                    "and the system message of a conversation")
            shorter = self.tokenizer.decode(self._cut_start(content, len(content) - over))
            turns = [{**turns[0], "content": shorter}]
        return system + turns

    def chat(self, messages: list[dict], reply: bool = True) -> list[int]:
        """Messages through the template, up to the reply if one is to follow; the text of special
        tokens in a message stays text."""
        self._notice_left_out(messages, reply)
        if any(token in m["content"] for token in self._special() for m in messages):
            return [t for ids, _ in self._pieces(messages, reply) for t in ids]
        return self._render(messages, add_generation_prompt=reply, return_dict=False)

    def _notice_left_out(self, messages: list[dict], reply: bool) -> None:
        """Says once if the template passes over messages of a role, as some do with "developer"."""
        roles = frozenset(m["role"] for m in messages)
        if roles in self.said:
            return
        self.said.add(roles)
        with contextlib.suppress(BadInput):
            shown = {i for _, i in self._pieces(messages, reply)}
            lost = sorted({m["role"] for i, m in enumerate(messages) if i not in shown})
            if lost:
                print_once(f"the chat template leaves out messages of {', '.join(lost)}")

    def _render(self, messages: list[dict], **more: Any) -> Any:
        require(self.tokenizer.chat_template is not None,
                "the data are chat messages, but the tokenizer has no chat template")
        try:
            return self.tokenizer.apply_chat_template(messages, **more)
        except Exception as problem:  # a template is a program, and may fail as one
            raise BadInput("the tokenizer's chat template refuses a conversation: "
                           + " ".join(str(problem).split())[:200]) from problem

    def _pieces(self, messages: list[dict],
                reply: bool) -> Iterator[tuple[list[int], Optional[int]]]:
        """(ids, the message they are the content of, or None) of what the template renders."""
        marked = [{**m, "content": f"\ue000{i}\ue001"} for i, m in enumerate(messages)]
        text = self._render(marked, add_generation_prompt=reply, tokenize=False)
        for i, piece in enumerate(re.split("\ue000(\\d+)\ue001", text)):
            if i % 2:
                yield self.continuations([messages[int(piece)]["content"]])[0], int(piece)
            elif piece:
                yield self._continue(self._rendered, [piece])[0], None

    def pairs(self, prompts: list, responses: list[str], truncated: Optional[list[bool]] = None,
              whole: bool = False) -> list[tuple[np.ndarray, np.ndarray]]:
        """(ids (T,), response mask (T,)) of prompt and response, which ends as a turn does if it
        is neither cut off nor too long.  `whole`: chats as rendered, for reward models."""
        found = []
        for prompt, response, before, ids, cut in zip(
                prompts, responses, self.prompts(prompts), self.continuations(responses),
                truncated or itertools.repeat(False)):
            is_chat = not isinstance(prompt, str)
            end = self.eos if not is_chat else self.turn_tail if whole else self.turn_end
            if cut or self.cfg.rendered_text and ids and ids[-1] in self.stop_ids:
                end = []
            after = self.cut_end(ids + end, self.cfg.max_response_tokens)
            row = before + after
            if whole and is_chat and end and after[len(ids):] == end:
                row = self.chat([*self._shorten(prompt, self.cfg.max_prompt_tokens),
                                 {"role": "assistant", "content": response}], reply=False)
            found.append((np.array(row, dtype=np.int32), np.arange(len(row)) >= len(before)))
        return found

    def sequences(self, samples: list[Sample]) -> list[tuple[np.ndarray, np.ndarray]]:
        """(ids, response mask) of samples, as --train_on says."""
        if self.cfg.train_on == "last_turn":
            return self.pairs([s.prompt for s in samples], [s.response for s in samples],
                              [s.truncated for s in samples])
        return [self.pairs([s.prompt], [s.response], [s.truncated])[0] if isinstance(s.prompt, str)
                else self.all_turns(s) for s in samples]

    def all_turns(self, sample: Sample) -> tuple[np.ndarray, np.ndarray]:
        """pairs() of a chat, with every assistant turn of the conversation in the mask."""
        kept, end = self._shorten(sample.prompt, self.cfg.max_prompt_tokens), self.turn_end
        if kept != sample.prompt:
            print_once(f"conversations longer than {self.cfg.max_prompt_tokens} tokens before the "
                       "last turn lose their oldest turns")
        ids, mask, ours = [], [], False
        for piece, message in self._pieces(kept, reply=True):
            learnt = 0  # tokens of the piece that end the assistant's turn before it
            if ours and piece[:len(end)] == end:
                learnt = len(end)
            elif ours and piece:
                learnt = int(piece[0] in self.stop_ids)
            ours = message is not None and kept[message]["role"] == "assistant"
            mask += [ours or i < learnt for i in range(len(piece))]
            ids += piece
        last = self.continuations([sample.response])[0] + end * (not sample.truncated)
        last = self.cut_end(last, self.cfg.max_response_tokens)
        return np.array(ids + last, dtype=np.int32), np.array(mask + [True] * len(last))

    def decode(self, response: Response) -> str:
        """A sampled response's text, without what ended it."""
        ids, end = response.ids, self.turn_end
        if not response.truncated:
            ids = ids[:-len(end)] if ids[-len(end):] == end else ids[:-1]
        text = self.tokenizer.decode(self.before_ids + ids)
        start = self.tokenizer.decode(self.before_ids)
        return text[len(start):] if text.startswith(start) else self.tokenizer.decode(ids)


@contextlib.contextmanager
def load_errors(name: str, what: str) -> Iterator[None]:
    """transformers' own errors on a folder or Hub id, as one sentence."""
    require(not Path(name, "adapter_config.json").exists(),
            f"{name}: a LoRA adapter; merge it into its base model first (peft: merge_and_unload)")
    for file in Path(name).glob("*.safetensors"):
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
    the tokenizer's own on the whole vocabulary and on hard text, else that one."""
    def own(texts: list[str]) -> list[list[int]]:
        return tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True,
                         verbose=False)["input_ids"] if texts else []
    try:
        fast = tiktoken_encoder(tokenizer, own)
        words = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
        probe = [*PROBE, *(tokenizer.convert_tokens_to_string([word]) for word in words if word),
                 " ".join(t.content for t in tokenizer.added_tokens_decoder.values())]
        return fast if fast(probe) == own(probe) else own
    except (AttributeError, KeyError, ValueError, IndexError, TypeError):
        return own  # no byte-level BPE


def tiktoken_encoder(tokenizer: Any, own: Callable) -> Callable[[list[str]], list[list[int]]]:
    """tiktoken's encoder from a byte-level BPE's merges.  Raises ValueError for other kinds.
    Texts with a byte that the vocabulary lacks or a word that no merge makes are left to own()."""
    import tiktoken
    from transformers.convert_slow_tokenizer import bytes_to_unicode
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    model, splitter = spec["model"], spec["pre_tokenizer"]
    match splitter.get("pretokenizers", [splitter]):
        case [{"type": "ByteLevel", "use_regex": True, "add_prefix_space": False}]:
            pattern = GPT2_SPLIT
        case [{"type": "Digits", "individual_digits": True},
              {"type": "ByteLevel", "use_regex": True, "add_prefix_space": False}]:
            pattern = DIGITS_SPLIT
        case [{"type": "Split", "behavior": "Isolated", "pattern": {"Regex": pattern}},
              {"type": "ByteLevel", "use_regex": False, "add_prefix_space": False}]:
            pass
        case _:
            raise ValueError("another pre-tokenizer")
    if spec["normalizer"] not in (None, {"type": "NFC"}):
        raise ValueError("another normalizer")
    character = bytes_to_unicode()
    byte = {c: b for b, c in character.items()}
    words = [character[b] for b in range(256)]
    words += ["".join(merge) if isinstance(merge, list) else merge.replace(" ", "")
              for merge in model["merges"]]
    merged = len(set(words))
    if model.get("ignore_merges"):  # a whole word that is in the vocabulary is one token
        words += [word for word in model["vocab"] if all(c in byte for c in word)]
    words = list(dict.fromkeys(words))  # tiktoken merges by rank: the order of the merges
    ranks = {bytes(byte[c] for c in word): rank for rank, word in enumerate(words)}
    ids = [model["vocab"].get(word) for word in words]
    fast = tiktoken.Encoding("merges", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    normal = functools.partial(unicodedata.normalize, "NFC") if spec["normalizer"] else str

    def encode(texts: list[str]) -> list[list[int]]:
        found = [fast.encode_ordinary(normal(text)) for text in texts]
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
SAMPLE_COLUMNS = PROMPT_COLUMNS | {"messages", "response", "completion", "output", "reward",
                                   "label", "weight", "truncated", "source"}
DATASETS_OWN = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
UNREADABLE = ("history", "tools", "functions", "tool_calls", "image", "images", "audio", "video")


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
    """(file or split, "file, line 7", row) of a file, a folder or a Hub data set: .jsonl and
    .jsonl.gz are read here, all else by `datasets`, an optional package."""
    path, others = Path(source), (".json", ".parquet", ".csv")
    if not path.exists():
        hub = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:/([\w./-]+))?", source)
        require(hub and path.suffix.lower() not in (*others, ".jsonl", ".ndjson", ".gz"),
                f"{source}: no such file, folder or Hub data set")
        yield from read_with_datasets(source, hub[1], data_dir=hub[2])
        return
    require(path.is_file() or path.is_dir(), f"{source}: a pipe or device; give a regular file")
    root, files = (path, visible_files(path)) if path.is_dir() else (path.parent, [path])
    skipped = []
    for file in files:
        part, ending = str(file.relative_to(root)), file.suffix.lower()
        if ending in others and file.name not in DATASETS_OWN:
            text = {"keep_default_na": False, "na_values": [""]} if ending == ".csv" else {}
            for _, place, row in read_with_datasets(  # a reply in a .csv may be "None"
                    str(file), ending[1:], data_files=str(file), **text):
                yield part, place, row
        elif file == path or re.search(r"\.(jsonl|ndjson|jsonl?\.gz)$", file.name.lower()):
            yield from ((part, place, row) for place, row in read_jsonl(file))
        else:
            skipped.append(part)
    if skipped:
        print0(f"  {source}: not read: {', '.join(skipped[:9])}{' …' * (len(skipped) > 9)}")
    require(len(skipped) < len(files),
            f"{source}: no .jsonl, .json, .parquet or .csv file in this folder")


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
        raise BadInput(f"{path}, after line {number}: the gzip file is broken "
                       f"({problem})") from problem


def read_with_datasets(source: str, kind: str, **more: Any) -> Iterator[tuple[str, str, dict]]:
    """(split, place, row) of what the `datasets` package reads."""
    try:
        import datasets
    except ImportError as problem:
        raise BadInput(f"{source}: needs the datasets package: pip install datasets") from problem
    try:
        for split, rows in datasets.load_dataset(kind, **more).items():
            for number, row in enumerate(rows, 1):
                yield split, f"{source}, {split} row {number}", row
    except Exception as problem:  # of datasets, pyarrow, pandas, fsspec and the Hub's client
        why = " ".join(str(problem.__cause__ or problem).split())[:200]
        raise BadInput(f"{source}: datasets cannot read it ({why})") from problem


def parsed_rows(source: str, columns: set[str], parse: Callable) -> Iterator[Any]:
    """parse(part, place, row, notes) of each row; a text is the reason why the row is left out.
    Says at the end how many rows were used, and what was not read."""
    asks, unread, left, notes = {"prompt", "instruction"}, set(), Counter(), Counter()
    total = 0
    for part, place, given in read_source(source):
        total += 1
        unread |= given.keys() - columns
        row = {name: value for name, value in given.items() if value is not None}
        null = (given.keys() - row.keys()) & columns
        for name in UNREADABLE:
            require(not row.get(name), f"{place}: the field {name!r} bears on the text and cannot "
                    "be read here")
        try:
            found = "with a null field" if asks & null and not asks & row.keys() else \
                parse(part, place, row, notes)
        except BadInput as problem:
            if not null or "is missing" not in str(problem):
                raise
            found = "with a null field"
        if isinstance(found, str):
            left[found] += 1
        else:
            yield found
    said = [f"{total - sum(left.values()):,} of {total:,} rows used"]
    if left:
        said.append("left out: " + ", ".join(f"{count:,} {why}" for why, count in left.items()))
    said += [f"{count:,} {what}" for what, count in notes.items() if count]
    if unread:
        said.append("columns not read: " + ", ".join(sorted(unread)))
    print0(f"  {source}: {'; '.join(said)}")


def text_of(place: str, row: dict, name: str, kinds: tuple = (str,), what: str = "text") -> Any:
    """row[name], of one of these kinds.  Raises BadInput naming file, line and field."""
    require(name in row, f"{place}: the field {name!r} is missing")
    require(isinstance(row[name], kinds),
            f"{place}: the field {name!r} must be {what}, found {type(row[name]).__name__}")
    return row[name]


def number_of(place: str, row: dict, name: str) -> float:
    """row[name] as a finite number, also where it is written as text."""
    given = text_of(place, row, name, (int, float, str), "a number")
    value = math.nan
    with contextlib.suppress(ValueError):
        value = float(str(given))  # an integer beyond all floats becomes inf
    require(isinstance(given, float) or not math.isnan(value),
            f"{place}: the field {name!r} must be a number, found {given!r}")
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
        more = any(map(m.get, (*UNREADABLE, "function_call", "reasoning_content", "reasoning",
                               "thinking")))
        more = more or m.get("weight") == 0 or m.get("train") is False  # a turn not to be learnt
        if isinstance(content, str) and str(role) in ROLES and not more:
            found.append({"role": ROLES[role], "content": content})
    require(found and len(found) == len(value), f'{place}: the field {name!r} must be text or a '
            'list of {"role", "content"} messages of text; tool calls, thoughts, images and turns '
            'without weight are not read')
    return found


def as_messages(prompt: Any) -> list[dict]:
    """A prompt as chat messages: text is the user's."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def prompt_of(place: str, row: dict) -> Any:
    """A row's prompt, text or messages: `prompt`, OpenRLHF's `input`, Alpaca's `instruction` and
    `input` as a user's message; a `system` message goes before."""
    if "instruction" in row:
        parts = [text_of(place, row, n) for n in ("instruction", "input") if row.get(n)]
        require(parts and "prompt" not in row,
                f"{place}: the field 'instruction' must be text, and stand without 'prompt'")
        prompt = as_messages("\n\n".join(parts))
    else:
        names = ("prompt", "input", "conversations", "messages")
        name = next((n for n in names if n in row), "prompt")
        require(name != "prompt" or not row.get("input"),
                f"{place}: the fields 'prompt' and 'input' stand side by side; give one")
        prompt = text_of(place, row, name, (str, list), "text or chat messages")
        require(prompt if isinstance(prompt, list) else prompt.strip(),
                f"{place}: the field {name!r} is empty")
        prompt = messages_of(place, name, prompt) if isinstance(prompt, list) else prompt
    if row.get("system"):
        before, prompt = [{"role": "system", "content": text_of(place, row, "system")}], \
            as_messages(prompt)
        return prompt if prompt[:1] == before else before + prompt
    return prompt


def conversation_of(place: str, row: dict) -> Optional[list[dict]]:
    """A row's `messages` or `conversations` after its `system` message, or None."""
    name = next((name for name in ("messages", "conversations") if name in row), None)
    return name and prompt_of(place, {"prompt": messages_of(place, name, row[name]),
                                      "system": row.get("system")})


def sample_of(place: str, row: dict) -> Sample | str:
    """A row as a sample without its reward, from any tool's names; or why there is none in it."""
    messages = conversation_of(place, row)
    name = next((n for n in ("response", "completion", "output") if n in row), "response")
    if messages and (name not in row or messages[-1]["role"] == "assistant"):
        require(row.get(name) in (None, messages[-1]["content"]), f"{place}: a conversation that "
                f"ends with a reply and the field {name!r} stand side by side; give one")
        if messages[-1]["role"] != "assistant" or len(messages) < 2:
            return "conversations that do not end with the assistant"
        prompt, response = messages[:-1], messages[-1]["content"]
    else:
        prompt = messages or prompt_of(place, row)
        response = text_of(place, row, name, (str, list))
        if isinstance(response, list):
            reply = messages_of(place, name, response)
            require(len(reply) == 1,
                    f"{place}: the field {name!r} must be one message, found {len(reply)}")
            response = reply[0]["content"]
    cut = str(row.get("truncated", False)).lower()
    require(cut in ("true", "1", "1.0", "false", "0", "0.0", ""),
            f"{place}: the field 'truncated' must be true or false, found {row.get('truncated')!r}")
    weight = number_of(place, row, "weight") if "weight" in row else math.nan
    require(not weight < 0, f"{place}: the field 'weight' must not be below 0, found {weight}")
    return Sample(prompt, response, source=str(row.get("source", "given")),
                  truncated=cut in ("true", "1", "1.0"), weight=weight)


def labelled_sample_of(place: str, row: dict) -> Sample | str:
    """A row as a sample with its reward; KTO's `label` is 1 or 0."""
    sample = sample_of(place, row)
    if isinstance(sample, str):
        return sample
    if "reward" not in row and "label" in row:
        row = {"reward": int(row["label"]) if isinstance(row["label"], bool) else row["label"]}
    if "reward" not in row and "weight" in row:
        return sample  # rwr.py --weights given asks for no more
    return sample._replace(reward=number_of(place, row, "reward"))


def side_of(place: str, row: dict, name: str) -> Optional[tuple[Any, str]]:
    """One side of a preference as (prompt, response); None if it ends with the human.
    Without a `prompt` it must be a whole conversation."""
    value = text_of(place, row, name, (str, list, dict), "text or chat messages")
    given = prompt_of(place, row) if row.keys() & PROMPT_COLUMNS else None
    if isinstance(value, str):
        whole = value.startswith("\n\nHuman:") and TURN in value
        if given is not None and not (whole and isinstance(given, str) and TURN not in given):
            return given, value
        start, turn, response = value.rpartition(TURN)
        require(turn, f"{place}: the field {name!r} has no {TURN!r}: without a `prompt` it must be "
                "a transcript")
        require(start.strip(), f"{place}: the prompt of {name!r} is empty")
        return None if "\n\nHuman:" in response else (start + turn, response)
    value = messages_of(place, name, [value] if isinstance(value, dict) else value)
    *before, reply = value
    if reply["role"] != "assistant":
        return None
    require(before or given is not None, f"{place}: the field {name!r} is a reply to nothing: the "
            "field 'prompt' is missing")
    if not before:
        return given, reply["content"]
    if given is not None:  # the prompt once, whether the side repeats it or goes on from it
        given = as_messages(given)
        asked = [m["content"].strip() for m in given if m["role"] != "system"]
        said = [m["content"].strip() for m in value]
        repeated = any(said[i:i + len(asked)] == asked for i in range(len(said)))
        require(repeated or value[0]["role"] != given[-1]["role"],
                f"{place}: the field {name!r} is a conversation without the row's prompt in it")
        before = [m for m in given if not repeated
                  or m["role"] == "system" and m not in value] + before
    return before, reply["content"]


def ranking_of(part: str, place: str, row: dict, notes: Counter) -> Ranking | str:
    """A row's preference, or why it is none."""
    if "ranked" in row:
        prompt, ranked = prompt_of(place, row), row["ranked"]
        require(isinstance(ranked, list) and len(ranked) > 1
                and all(isinstance(text, str) for text in ranked),
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
    """Preferences for training and held out, split by prompt: the files, folders and splits that
    `named` matches are held out, or else, or if all are, prompts by hash and seed."""
    def parse(part: str, place: str, row: dict, notes: Counter) -> Any:
        found = ranking_of(part, place, row, notes)
        return found if isinstance(found, str) else (part, found)
    found = list(parsed_rows(source, PREFERENCE_COLUMNS, parse))
    require(found, f"{source}: no usable preference")
    named = r"(^|[/_.-])(test|val|valid|validation|eval|evaluation)([/_.-]|\d|$)"
    is_test = {part: bool(re.search(named, part)) for part, _ in found}
    by_name = len({*is_test.values()}) == 2
    test, rest = [], []
    for part, ranking in found:
        held_out = is_test[part] if by_name else is_held_out(ranking.prompt, share, seed)
        (test if held_out else rest).append(ranking)
    hidden = {prompt_key(p.prompt) for p in test}
    train = [p for p in rest if prompt_key(p.prompt) not in hidden]
    require(train, f"{source}: no preference is left to train on")
    require(test, f"{source}: no preference is held out; give more data or a larger --held_out")
    order = random.Random(seed)
    order.shuffle(train)
    order.shuffle(test)
    used = train[:most]
    left = {"as their prompt is held out": len(rest) - len(train),
            "by --max_pairs": len(train) - len(used)}
    print0(f"  {len(used):,} preferences to train on, {len(test):,} held out, split by prompt"
           + "".join(f"; {count:,} left out {why}" for why, count in left.items() if count))
    return used, test


def load_preferences(cfg: Config) -> tuple[list[Ranking], list[Ranking]]:
    """The run's preferences, for training and held out."""
    source = toy_data(cfg) if cfg.toy else cfg.preferences
    return read_preferences(source, cfg.held_out, cfg.seed, cfg.max_pairs)


def prompt_key(prompt: Any) -> str:
    """A prompt as a string that identifies it."""
    return prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True)


def prompt_hash(prompt: Any) -> int:
    """64 bits that identify a prompt, where its text would take too much memory."""
    digest = hashlib.blake2b(prompt_key(prompt).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


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
        prompt = conversation_of(place, row) or prompt_of(place, row)
        if isinstance(prompt, list) and len(prompt) > 1 and prompt[-1]["role"] == "assistant":
            prompt = prompt[:-1]
        return (prompt,)  # a text would be a reason to leave the row out
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
            "out; give more, a larger --held_out, --prompts to evaluate on, or --eval_prompts 0")
    return found


# ---------------------------------------------------------------------------------------- batches
# Samples are tokenised once, into flat arrays on disk; a step slices them.  The order of the data
# and the cut into steps come from the seed alone; ranks and micro-batches share out a step's work.


class Example(NamedTuple):
    """A sequence, and what a loss needs beside: `columns` hold a number for each response token."""
    ids: np.ndarray   # (T,) int32
    mask: np.ndarray  # (T,) bool, the response mask
    weight: float = 1.0
    columns: tuple = ()


class Tokens:
    """Many sequences end to end, memory-mapped: 5 bytes a token, shared by the ranks of a node."""

    def __init__(self, folder: Path, sequences: Callable[[], Iterable[tuple]]):
        """Rank 0 writes the (ids, mask) of sequences(); all ranks open what it wrote."""
        if rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            lengths, starts = [], []
            with open(folder / "ids", "wb") as ids_file, open(folder / "mask", "wb") as mask_file:
                for ids, mask in sequences():
                    ids_file.write(ids.astype(np.int32))
                    mask_file.write(mask.astype(bool))
                    lengths.append(len(ids))
                    last = len(mask) - int(np.append(~mask.astype(bool)[::-1], True).argmax())
                    starts.append((last, int(mask.sum())))  # before the last response; learnt
            np.save(folder / "offsets.npy", np.cumsum([0, *lengths], dtype=np.int64))
            np.save(folder / "starts.npy", np.array(starts, dtype=np.int32))
        barrier()
        self.ids = np.memmap(folder / "ids", dtype=np.int32, mode="r")
        self.mask = np.memmap(folder / "mask", dtype=bool, mode="r")
        self.offsets = np.load(folder / "offsets.npy")                                  # (n + 1,)
        self.lengths = np.diff(self.offsets)                                            # (n,)
        self.prompt_lengths, self.response_tokens = np.load(folder / "starts.npy").T    # (n,) each

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
    columns: list[torch.Tensor]  # (N,) float32 each, of Example.columns: PPO's alone


@dataclass
class Batch:
    """One optimiser step: this rank's micro-batches, and what their losses' sum is divided by."""
    micros: list[MicroBatch]
    lengths: list[int]  # of this rank's sequences
    tokens: int         # response tokens, all ranks
    normaliser: float   # sum of weight * response tokens over all ranks, / ranks: DDP averages


def make_batch(lengths: list[int], response_tokens: Any, weights: Any, cfg: Config,
               read: Callable[[int], Example]) -> Batch:
    """A step over examples of these lengths, numbers of response tokens, and weights; read(i) is
    called for this rank's share alone."""
    shares = shard_micro_batches(lengths, cfg.forward_tokens)
    micros = [collate([read(i) for i in share or [0]], learnt=bool(share)) for share in shares]
    total = float(np.dot(weights, response_tokens))
    return Batch(micros, [lengths[i] for share in shares for i in share],
                 int(np.sum(response_tokens)),
                 (total if total > 1e-20 else 1.0) / world_size())  # weights may vanish: no 0 / 0


def collate(examples: list[Example], learnt: bool = True) -> MicroBatch:
    """Examples as packed tensors.  Without `learnt` N = 0: a rank that has run out of micro-batches
    still joins every forward, as the others' collectives wait for it."""
    ids = torch.from_numpy(np.concatenate([e.ids for e in examples]).astype(np.int64))      # (T,)
    mask = np.concatenate([np.append(e.mask[1:], False) for e in examples])  # t predicts t + 1
    rows = torch.from_numpy((mask & learnt).nonzero()[0])                                   # (N,)
    weight = np.repeat([e.weight for e in examples], [e.mask[1:].sum() for e in examples])
    columns = [weight, *map(np.concatenate, zip(*(e.columns for e in examples)))]
    ids, rows, targets, weight, *columns = (t.to(device(), non_blocking=True) for t in (
        ids, rows, ids[rows + 1],
        *(torch.as_tensor(c, dtype=torch.float32)[:len(rows)] for c in columns)))
    return MicroBatch(ids, [len(e.ids) for e in examples], rows, targets, weight, columns)


def group_by_token_budget(lengths: list[int], budget: int,
                          which: Optional[list[int]] = None) -> list[list[int]]:
    """`which` indices into lengths, or all, longest first, cut so that count * longest <= budget,
    one at least."""
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)) if which is None else which, key=lambda i: -lengths[i]):
        if not groups or (len(groups[-1]) + 1) * lengths[groups[-1][0]] > budget:
            groups.append([])
        groups[-1].append(i)
    return groups


def shard_micro_batches(lengths: list[int], budget: int) -> list[list[int]]:
    """This rank's micro-batches of a step.  All ranks get as many; [] where one has none left."""
    by_length = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    cuts = [group_by_token_budget(lengths, budget, by_length[r::world_size()])
            for r in range(world_size())]
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
              max_length_q: int = 0, slots: Optional[Slots] = None,
              **_: Any) -> tuple[torch.Tensor, None]:
    """Causal attention (B, heads, T, D) -> (B, T, heads, D): within packed sequences (B = 1), of
    the sampler's new tokens to their slots (T = 1), or of whole sequences."""
    sdpa = torch.nn.functional.scaled_dot_product_attention
    heads, t = query.shape[1:3]
    if slots is not None:
        return slots.attend(module, query, key, value, scaling, sliding_window, cu_seq_lens_q,
                            max_length_q), None
    if cu_seq_lens_q is not None and query.is_cuda and value.dtype.itemsize == 2:
        from torch.nn.attention.varlen import varlen_attn
        group, window = heads // key.shape[1], sliding_window or max_length_q
        q, k, v = (x[0].transpose(0, 1).to(value.dtype) for x in (query, key, value))  # (T, ., D)
        return varlen_attn(
            q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), cu_seq_lens_q,
            cu_seq_lens_q, max_length_q, max_length_q, scale=scaling,
            window_size=(window - 1 if window < max_length_q else -1, 0))[None], None
    if cu_seq_lens_q is not None:
        each = zip(*(x.split(cu_seq_lens_q.diff().tolist(), dim=2) for x in (query, key, value)))
        return torch.cat([attention(module, *qkv, None, scaling, sliding_window)[0]
                          for qkv in each], dim=1), None
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
    windows = [(part, name, value) for part in [model.config.get_text_config(), *model.modules()]
               for name in ("sliding_window", "attention_chunk_size")
               if isinstance(value := getattr(part, name, None), int)]
    vocabulary = model.get_input_embeddings().num_embeddings
    a, b = (torch.arange(24, device=model.device) * 1009 % vocabulary).split([9, 15])
    try:
        for part, name, _ in windows:
            setattr(part, name, 6)
        alone = [model.base_model(input_ids=ids[None]).last_hidden_state[0] for ids in (a, b)]
        model.set_attn_implementation(PACKED)
        slots = Slots(2, 16)
        packed = slots.read(model, {tuple(a[:-1].tolist()): [0], tuple(b[:-1].tolist()): [1]})
        last = slots.decode(model, torch.stack([a[-1], b[-1]]),
                            torch.tensor([8, 14], device=model.device))
        ours, theirs = torch.cat([packed[:8], last[:1], packed[8:], last[1:]]), torch.cat(alone)
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
               "padded, and read anew for each token that it samples")
    return model


def body_of(model: Any) -> Any:
    """The model without its head; Llama 4's class calls the whole of itself its base model."""
    return model.base_model if model.base_model is not model else model.model


def read_packed(model: Any, ids: torch.Tensor, lengths: list[int], **more: Any) -> torch.Tensor:
    """The body's last hidden states (T, D) of packed sequences, ids (T,)."""
    ends = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)                 # (S + 1,)
    position = torch.cat([torch.arange(n) for n in lengths])                        # (T,)
    ends, position = (x.to(ids.device, non_blocking=True) for x in (ends, position))
    return body_of(model)(
        input_ids=ids[None], position_ids=position[None], cu_seq_lens_q=ends, cu_seq_lens_k=ends,
        max_length_q=max(lengths), max_length_k=max(lengths),
        **{"use_cache": False, **more}).last_hidden_state[0]


def hidden_states(model: Any, ids: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """The body's last hidden states (T, D) of packed sequences, ids (T,): packed or padded."""
    config = model.config.get_text_config()
    if config._attn_implementation == PACKED and config.hidden_size >= PADDED_BELOW:
        return read_packed(model, ids, lengths)
    # padding comes after a sequence, where causal attention does not look: no mask is needed
    padded = torch.nn.utils.rnn.pad_sequence(ids.split(lengths), batch_first=True)
    hidden = body_of(model)(input_ids=padded, use_cache=False).last_hidden_state  # (S, longest, D)
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
    causal = "Causal" in kind
    with load_errors(name, "a causal language model" if causal else
                     "a reward model (sequence classification, num_labels=1)"):
        model, report = getattr(transformers, kind).from_pretrained(
            name, dtype=dtype, use_safetensors=True, trust_remote_code=False,
            output_loading_info=True, ignore_mismatched_sizes=True, **more)
    for what, found, allowed in (("lacks", "missing", drawn), ("has unknown", "unexpected", spare),
                                 ("has misshapen", "mismatched", drawn)):
        wrong = sorted(k for k in map(str, report[f"{found}_keys"]) if not k.startswith(allowed)
                       and not re.search(r"\battn(\.attention)?\.(masked_)?bias$", k))  # a buffer
        require(not wrong, f"{name}: {what} weights: {', '.join(wrong[:4])} ({len(wrong)} in all)")
    bad = [n for n, p in model.named_parameters() if not p.sum().isfinite()]
    require(not bad, f"{name}: {bad and bad[0]} holds NaN or infinite weights")
    model = enable_packing(model.to(where or device()).eval())
    if causal:
        check_linear_head(name, model)
    return model


@torch.no_grad()
def check_linear_head(name: str, model: Any) -> None:
    """Raises BadInput unless logits are hidden states times head, scaled or soft-capped."""
    head = model.get_output_embeddings()
    require(head is not None, f"{name}: the model has no output head")
    ids = torch.arange(8, device=model.device) % model.get_input_embeddings().num_embeddings
    ours = logits_of(model, hidden_states(model, ids, [8]))
    theirs = model(input_ids=ids[None], use_cache=False).logits[0].float()
    require(torch.allclose(ours, theirs, rtol=1e-2, atol=1e-3 * float(theirs.abs().max())),
            f"{name}: its logits are not hidden states times head, which the fused loss needs")


def logits_of(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    """The head's logits (N, V) float32 of last hidden states (N, D)."""
    scale, cap = head_transform(model)
    logits = model.get_output_embeddings()(hidden).float() * scale
    return cap * (logits / cap).tanh() if cap else logits


def autocast(dtype: torch.dtype) -> Any:
    """Matrix products in this dtype, whatever the weights'; nothing to do for float32."""
    return torch.autocast(device().type, dtype, enabled=dtype != torch.float32)


class Policy(torch.nn.Module):
    """A causal language model whose forward ends in the fused loss, so that the hooks of DDP and
    FSDP cover body and head alike."""

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
    shape = model.config.get_text_config()
    if any(getattr(shape, f"{kind}_experts", 0) for kind in ("num", "num_local", "n_routed")):
        print0("  a mixture of experts: its auxiliary loss, which balances the router, is left out")
    choose_micro_batch(model, cfg)
    return wrap_for_ranks(Policy(model, cfg), cfg)


def load_reference(name: str, cfg: Config) -> Policy:
    """A policy that stays as it is, for its log_probs: sharded where the trained one is."""
    if not is_sharded(cfg):
        return Policy(load_model(name, compute_dtype(cfg)), cfg)
    model = load_for_training(functools.partial(load_model, name), cfg).requires_grad_(False)
    return wrap_for_ranks(Policy(model, cfg), cfg, "log_probs")


def choose_micro_batch(model: Any, cfg: Config) -> None:
    """Sets --micro_batch_tokens where it was not given: half of a GPU's free memory, after weights,
    gradients and moments, over the bytes of activations a token, as a power of two."""
    if cfg.micro_batch_tokens is None and device().type == "cuda":
        shape, ranks = model.config.get_text_config(), world_size() if is_sharded(cfg) else 1
        weights = sum(p.numel() for p in model.parameters()) / ranks
        free = torch.cuda.mem_get_info()[0] - 12 * weights
        layer = 2 * shape.hidden_size * (2 if cfg.gradient_checkpointing else 40)  # bytes a token
        tokens = max(1, free / 2 / (layer * shape.num_hidden_layers))
        cfg.micro_batch_tokens = min(gather(2 ** int(min(max(math.log2(tokens), 11), 16))))
    cfg.micro_batch_tokens = cfg.forward_tokens


def is_sharded(cfg: Config) -> bool:
    """Whether training spreads its models over ranks."""
    return cfg.sharding == "fsdp" and world_size() > 1


def blocks_of(module: torch.nn.Module) -> list:
    """The transformer blocks, by the class names that transformers says not to split."""
    names = {n for part in module.modules() for n in getattr(part, "_no_split_modules", None) or ()}
    return [part for part in module.modules() if type(part).__name__ in names]


def load_for_training(load: Callable, cfg: Config) -> Any:
    """load(where=), with recomputed activations or compiled blocks where asked for.

    To be sharded, rank 0 loads on its CPU, and other ranks get an untouched shape: a node holds the
    whole weights once.
    """
    sharded = is_sharded(cfg)
    if rank() == 0 or not sharded:
        model = load(where=torch.device("cpu") if sharded else device())
    if sharded:
        kind, config = gather((type(model), model.config) if rank() == 0 else None)[0]
        if rank() > 0:
            model = meta_model(kind, config).to_empty(device="cpu").eval()
            model.tie_weights()
    for block in blocks_of(model):
        if cfg.gradient_checkpointing:  # transformers' own needs training mode: some would drop out
            block.forward = functools.partial(torch.utils.checkpoint.checkpoint, block.forward,
                                              use_reentrant=False)
        elif cfg.compile and device().type == "cuda":
            block.compile(dynamic=True)
    return model


def meta_model(kind: type, config: Any) -> Any:
    """A model of this class and shape whose weights take no memory."""
    from transformers import AttentionInterface
    AttentionInterface.register(PACKED, attention)
    attn_implementation = config._attn_implementation
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
    return torch.nn.parallel.DistributedDataParallel(
        module, device_ids=[device()] if device().type == "cuda" else None,
        gradient_as_bucket_view=True)


def shard(module: torch.nn.Module, dtype: torch.dtype, methods: tuple) -> torch.nn.Module:
    """The module under FSDP2, each transformer block by itself, with rank 0's weights: kept, and
    gradients reduced, in float32; gathered in `dtype` for as long as a block computes."""
    from torch.distributed import fsdp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
    weights = module.state_dict() if rank() == 0 else {}
    mesh = dist.init_device_mesh(device().type, (world_size(),))
    for part in [*blocks_of(module), module]:
        # the root holds embedding and head, which the fused loss reads; its inputs stay as they are
        fsdp.fully_shard(part, mesh=mesh, mp_policy=fsdp.MixedPrecisionPolicy(
            param_dtype=None if dtype == torch.float32 else dtype, reduce_dtype=torch.float32,
            cast_forward_inputs=part is not module))
    set_model_state_dict(module, weights, options=StateDictOptions(full_state_dict=True,
                                                                   broadcast_from_rank0=True))
    for buffer in module.buffers():
        dist.broadcast(buffer, 0)
    for method in methods:
        fsdp.register_fsdp_forward_method(module, method)
    return module


@torch.no_grad()
def whole_copy(model: Any, dtype: torch.dtype, where: torch.device, keep: bool = True) -> Any:
    """A copy of a model in `dtype`, a sharded one whole again (None unless `keep`); all ranks must
    call it together."""
    weights = {}
    for name, weight in model.named_parameters():
        weight = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
        if keep:
            weights[name] = weight.to(where, dtype)
    if not keep:
        return None
    copy = meta_model(type(model), model.config)
    copy.load_state_dict(weights, strict=False, assign=True)  # a tied head has no entry of its own
    copy.tie_weights()
    for part, old in zip(copy.modules(), model.modules()):
        for name, buffer in old.named_buffers(recurse=False):
            setattr(part, name, buffer.to(where))
    copy.generation_config = model.generation_config
    return copy.eval()


def make_optimizer(model: torch.nn.Module, cfg: Config, steps: int) -> tuple[Any, Any]:
    """AdamW with decay on matrices only, and its schedule: 3 % warm-up, then cosine to 0."""
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        [{"params": [p for p in weights if p.dim() >= 2], "weight_decay": 0.1},
         {"params": [p for p in weights if p.dim() < 2], "weight_decay": 0.0}],
        lr=cfg.lr, betas=(0.9, 0.99), fused=True)
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
    flags = [(f.name, getattr(cfg, f.name)) for f in fields(cfg)
             if f.metadata["help"].stage == "training"]
    if tag:
        after, n = codec.before + tag, len(codec.before_ids)  # a word marker would come before it
        tag = f" + tokenizer({after!r}, add_special_tokens=False).input_ids" + f"[{n}:]" * bool(n)
    card = MODEL_CARD.format(
        more=more, tag=tag, algorithm=folder.name.strip(".").removesuffix(".new"),
        flags=", ".join(f"{name} {value}" for name, value in flags if value is not None),
        torch=torch.__version__, transformers=transformers.__version__,
        base=cfg.model or "the toy world's",
        data=cfg.samples or cfg.responses or cfg.preferences or cfg.prompts or "the toy world's")
    save_folder(folder, getattr(policy, "module", policy).model, codec, cfg, card)


# -------------------------------------------------------------------------------- fused head loss
# Loss and gradient in one pass over the logits, a chunk of rows at a time: one GEMM into a scratch
# buffer, the script's kernel turns logits into d loss / d logits in place, two GEMMs bring the
# gradients of hidden states and head.  Of the (N, V) logits no more than a chunk exists.

CHUNK_BYTES = {"cpu": 2**28, "cuda": 2**31}  # of logits, held at once
EAGER_BELOW = 4096  # vocabulary: on a CPU, compiling for a smaller one costs more than it brings
FORWARD_ONLY = 4    # times as many tokens where no activations are kept
_scratch: dict = {}


def head_loss(kernel: Callable, hidden: torch.Tensor, model: Any,
              *columns: torch.Tensor) -> torch.Tensor:
    """Sum over rows of the kernel's loss, differentiable in the hidden states and the model's head.

    hidden (N, D), columns (N,) each.  kernel(logits (n, V), *columns (n,)) must leave d loss /
    d logits in logits and return each row's loss (n,).  A scalar, float32 (float64 for float64);
    N = 0 gives a zero with gradients.
    """
    head, kind = model.get_output_embeddings(), hidden.device.type
    dtype = (torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind)
             else head.weight.dtype)
    scale, cap = head_transform(model)
    apply = torch.compiler.disable(HeadLoss.apply)  # a compiled caller breaks its graph here
    return apply((hidden * scale).to(dtype), head.weight, getattr(head, "bias", None), kernel, cap,
                 *columns)


def head_transform(model: Any) -> tuple[float, float]:
    """(scale, cap) of logits = cap tanh(scale hidden @ head / cap), cap = 0 for none: Cohere,
    Granite and Falcon-H1 scale, Gemma caps."""
    config = model.config.get_text_config()
    up, down, more = (getattr(config, name, None) or 1.0
                      for name in ("logit_scale", "logits_scaling", "lm_head_multiplier"))
    return up * more / down, getattr(config, "final_logit_softcapping", None) or 0.0


class HeadLoss(torch.autograd.Function):
    """head_loss: forward finds the gradients, backward scales them."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor],
                kernel: Callable, cap: float, *columns: torch.Tensor) -> torch.Tensor:
        wide, head = torch.promote_types(hidden.dtype, torch.float32), weight.to(hidden.dtype)
        outer = {"out_dtype": wide} if hidden.dtype != wide and hidden.is_cuda else {}
        want_weight, grad_weight = ctx.needs_input_grad[1], None
        grad_hidden = torch.empty_like(hidden)
        grad_bias = None if bias is None else torch.zeros_like(bias, dtype=wide)
        loss = torch.zeros((), dtype=wide, device=hidden.device)
        for part, logits in logit_chunks(hidden, head, bias, cap):
            slope = 1 - (logits / cap).square() if cap else None    # d capped / d logits
            loss += kernel(logits, *(c[part] for c in columns)).sum()
            logits = logits.mul_(slope) if cap else logits          # now d loss / d logits
            torch.mm(logits, head, out=grad_hidden[part])
            if want_weight and grad_weight is not None and logits.dtype == wide:
                grad_weight.addmm_(logits.t(), hidden[part])
            elif want_weight:  # chunks are summed in float32
                product = torch.mm(logits.t(), hidden[part], **outer).to(wide)
                grad_weight = product if grad_weight is None else grad_weight.add_(product)
            if bias is not None:
                grad_bias += logits.sum(0, dtype=wide)
        if want_weight and grad_weight is None:  # no rows
            grad_weight = torch.zeros_like(weight)
        ctx.grads = [g if g is None else g.to(like.dtype) for g, like in
                     ((grad_hidden, hidden), (grad_weight, weight), (grad_bias, bias))]
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple:
        if ctx.grads is None:
            raise RuntimeError("backward through a fused head loss twice: its gradients are spent")
        grads, ctx.grads = ctx.grads, None
        grads = [g if g is None else g.mul_(upstream.to(g.dtype)) for g in grads]
        return *grads, *[None] * (len(ctx.needs_input_grad) - len(grads))


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
        with torch.inference_mode(False):  # else a sampler's buffer could not serve training
            _scratch[key] = torch.empty(rows * stride, dtype=hidden.dtype, device=hidden.device)
    for start in range(0, len(hidden), max(1, rows)):
        part = slice(start, start + rows)
        logits = _scratch[key][:len(hidden[part]) * stride].view(-1, stride)[:, :len(weight)]
        torch.mm(hidden[part], weight.t(), out=logits)
        if bias is not None:
            logits += bias.to(logits.dtype)
        if cap:
            logits.div_(cap).tanh_().mul_(cap)
        yield part, logits


def compiled(kernel: Callable) -> Callable:
    """torch.compile(kernel), at its first call: the compiler's import takes seconds.  The number of
    rows is dynamic, the vocabulary is not: were both, a GPU would take twice as long.

    Uncompiled for a small vocabulary on a CPU, and, with a warning, where no C++ compiler is found.
    """
    once = functools.cache(lambda: torch.compile(kernel))

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


def log_probs(model: Any, micro: MicroBatch, temperature: float) -> torch.Tensor:
    """Each response token's log-prob (N,), float32; needs no gradient."""
    hidden = hidden_states(model, micro.input_ids, micro.lengths)[micro.rows]               # (N, D)
    head, (scale, cap) = model.get_output_embeddings(), head_transform(model)
    chunks = logit_chunks(hidden * scale, head.weight.to(hidden.dtype), getattr(head, "bias", None),
                          cap)
    found = [-torch.nn.functional.cross_entropy(logits.float() / temperature, micro.targets[part],
                                                reduction="none") for part, logits in chunks]
    return torch.cat(found) if found else torch.zeros(0)


@torch.no_grad()  # not inference mode: what FSDP gathers in it could not serve training
def each_response_token(compute: Callable[[MicroBatch], torch.Tensor], model: Any,
                        examples: list[Example], cfg: Config, cost: Cost) -> list[list[float]]:
    """What compute(micro-batch) -> (N,) finds of each response token, by `model`, in the examples'
    order on every rank; ranks share the work."""
    found: dict[int, list[float]] = {}
    budget = FORWARD_ONLY * cfg.forward_tokens
    for share in shard_micro_batches([len(e.ids) for e in examples], budget):
        micro = collate([examples[i] for i in share or [0]], learnt=bool(share))
        cost.add_forward(model, len(micro.input_ids), sum(n * n for n in micro.lengths),
                         len(micro.rows))
        values = iter(compute(micro).tolist())
        for i in share:
            found[i] = list(itertools.islice(values, int(examples[i].mask.sum())))
    return gather_by_index(found, len(examples))


def response_log_probs(model: Any, examples: list[Example], cfg: Config,
                       cost: Cost) -> list[list[float]]:
    """Each response token's log-prob at cfg.temperature."""
    compute = functools.partial(log_probs, model, temperature=cfg.temperature or 1.0)
    return each_response_token(compute, model, examples, cfg, cost)


# ---------------------------------------------------------------------------------------- sampler
# A fixed number of slots, rows of a preallocated cache.  A response that has ended gives its slot
# to the next prompt; prompts are read packed.  Nothing is padded, no cache copied; on a GPU the
# decode step is compiled block by block and replayed as a CUDA graph.


class Response(NamedTuple):
    """A sampled response: ids, with the stop token that ended it, log-probs, whether it was cut."""
    ids: list[int]
    log_probs: list[float]
    truncated: bool


class Slots:
    """The sampler's cache: R rows of S positions in each layer.  attention() fills and reads it."""
    flash = True  # until its kernel has failed

    def __init__(self, rows: int, length: int):
        self.rows, self.length = rows, length
        self.kept: dict[Any, list[torch.Tensor]] = {}  # layer -> keys, values (R, S, heads, D)

    def read(self, model: Any, prompts: dict[tuple, list[int]]) -> torch.Tensor:
        """Reads prompts, each into all the rows named: their last hidden states (T, D), packed."""
        lengths = list(map(len, prompts))
        spans = [(row, end - n, n) for n, end, rows in
                 zip(lengths, itertools.accumulate(lengths), prompts.values()) for row in rows]
        row, start, size = torch.tensor(spans).T
        position = torch.cat([torch.arange(n) for _, _, n in spans])
        self.new = [x.to(device()) for x in (row.repeat_interleave(size), position,
                                             start.repeat_interleave(size) + position)]
        ids = torch.tensor(list(itertools.chain(*prompts)), device=device())
        return read_packed(model, ids, lengths, slots=self)

    def decode(self, model: Any, tokens: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """Last hidden states (R, D) of a token (R,) for each row, at its position (R,)."""
        self.new = torch.arange(self.rows, device=device()), position, slice(None)
        self.used = (position + 1).int()
        self.ends = torch.arange(self.rows + 1, dtype=torch.int32, device=device())
        self.row_ends = self.ends * self.length
        seen = self.length if device().type == "cuda" else int(self.used.max())
        self.age = position[:, None] - torch.arange(seen, device=device())              # (R, seen)
        return body_of(model)(input_ids=tokens[:, None], position_ids=position[:, None],
                              use_cache=False, slots=self).last_hidden_state[:, -1]

    def attend(self, layer: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
               scale: Optional[float], window: Optional[int], *packed: Any) -> torch.Tensor:
        """attention() whose keys and values (B, heads, T, D) are kept: of packed prompts to
        themselves, or (R, heads, 1, D) -> (R, 1, heads, D) of each row's new token to its row."""
        if layer not in self.kept:
            self.kept[layer] = [x.new_zeros(self.rows, self.length, x.shape[1], x.shape[3])
                                for x in (key, value)]
        rows, positions, source = self.new
        for kept, new in zip(self.kept[layer], (key, value)):
            kept[rows, positions] = new.transpose(1, 2).flatten(0, 1)[source]    # (., heads, D)
        if packed[0] is not None:
            return attention(layer, query, key, value, None, scale, window, *packed)[0]
        keys, values = self.kept[layer]                                         # (R, S, heads, D)
        window = window if window and window < self.length else None
        if query.is_cuda and values.dtype.itemsize == 2 and Slots.flash:
            try:  # a kernel that reads no further than a row has come
                return torch.ops.aten._flash_attention_forward(
                    query[:, :, 0], keys.flatten(0, 1), values.flatten(0, 1), self.ends,
                    self.row_ends, 1, self.length, 0.0, False, False, scale=scale,
                    window_size_left=window and window - 1, window_size_right=window and 0,
                    seqused_k=self.used)[0][:, None]
            except Exception as problem:
                print0(f"  the sampler's attention goes without flash attention ({problem})")
                Slots.flash = False
        seen = (self.age >= 0) & (self.age < (window or self.length))
        keys, values = (x[:, :seen.shape[1]].transpose(1, 2) for x in (keys, values))
        # query heads that share a key are so many positions of one head: no key is copied
        out = torch.nn.functional.scaled_dot_product_attention(
            query.reshape(self.rows, keys.shape[1], -1, query.shape[3]), keys, values,
            seen[:, None, None], scale=scale)
        return out.reshape(self.rows, 1, query.shape[1], -1)

    def keep(self, rows: torch.Tensor) -> None:
        """Forgets all rows but these."""
        self.rows = len(rows)
        for pair in self.kept.values():
            pair[:] = [x[rows] for x in pair]


class Rereader:
    """In place of Slots, for models that keep more than keys and values, or do not read packed
    sequences: it reads all of every row anew for each token.  Slow, and right for them all."""

    def __init__(self, rows: int, length: int):
        self.ids = torch.zeros(rows, length, dtype=torch.int64, device=device())        # (R, S)

    def read(self, model: Any, prompts: dict[tuple, list[int]]) -> None:
        for prompt, rows in prompts.items():
            self.ids[rows, :len(prompt)] = torch.tensor(prompt, device=device())

    def decode(self, model: Any, tokens: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        row = torch.arange(len(tokens), device=device())
        self.ids[row, position] = tokens
        whole = self.ids[:, :int(position.max()) + 1]  # padded behind, where no row looks
        return body_of(model)(input_ids=whole, use_cache=False).last_hidden_state[row, position]

    def keep(self, rows: torch.Tensor) -> None:
        self.ids = self.ids[rows]


@torch.inference_mode()
def sample(model: Any, prompts: list[list[int]], cfg: Config, seed: int, stop: list[int],
           cost: Cost, unconditional: Optional[list[list[int]]] = None, guidance: float = 0.0,
           seeds: Optional[list[int]] = None, what: str = "sampling") -> list[Response]:
    """A response to each prompt's ids, in the prompts' order on every rank; ranks share the work.

    A row's randomness comes from the seed and the row's own of `seeds` (its index), not from its
    slot or rank.  Log-probs are those of the distribution at cfg.temperature, before top-p.  With
    `guidance` g tokens are drawn from softmax((1 + g) log p(.|prompt) - g log p(.|unconditional))
    (Sanchez et al. 2023, arXiv 2306.17806).  The cost is what the responses need, without what idle
    slots compute.
    """
    most = cfg.max_response_tokens
    share = sorted(range(rank(), len(prompts), world_size()), key=lambda i: (len(prompts[i]), i))
    paths = [[prompts[i], *([unconditional[i]] if guidance else [])] for i in share]
    uniform = torch.zeros(len(share) + 1, most, dtype=torch.float64)  # the last is an idle slot's
    for row, i in zip(uniform, share):
        key = [seed, i if seeds is None else seeds[i]]
        row[:] = torch.from_numpy(np.random.Generator(np.random.Philox(key=key)).random(most))
    found = {}
    with progress(None, what, total=len(share), unit="row") as bar:
        said, log_probs = (x.cpu() for x in fill_slots(
            model, paths, uniform.to(device()), cfg, stop, guidance, bar, cost))
    ends = torch.isin(said, torch.tensor(stop))
    lengths = torch.where(ends.any(1), ends.int().argmax(1) + 1, most).tolist()
    for i, path, ids, log_p, m in zip(share, paths, said, log_probs, lengths):
        found[i] = Response(ids[:m].tolist(), log_p[:m].tolist(), int(ids[m - 1]) not in stop)
        for n in map(len, path):
            cost.add_forward(model, m - 1, (m - 1) * (2 * n + m) // 2, m - 1)
        cost.generated_tokens += m
    return gather_by_index(found, len(prompts))


def fill_slots(model: Any, paths: list, uniform: torch.Tensor, cfg: Config, stop: list[int],
               guidance: float, bar: Any, cost: Cost) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and log-probs (n + 1, most) for n paths, each a prompt, or two to guide by.

    All state belongs to paths; a slot has but its path's index, n where it is idle.
    """
    (n, most), ways = (len(paths), uniform.shape[1]), 1 + bool(guidance)
    packed = model.config.get_text_config()._attn_implementation == PACKED
    gpu, count, choice = device().type == "cuda" and packed, cfg.slots or 64, choose
    least = 2 if gpu else 1  # one row would be compiled anew
    longest = most + max((len(p) for path in paths for p in path), default=0)
    if gpu and not cfg.slots:
        two = Slots(1, 2)
        two.read(model, {(0, 0): [0]})
        row = longest / 2 * sum(x.nbytes for pair in two.kept.values() for x in pair)
        count = min(512, max(1, int(0.6 * torch.cuda.mem_get_info()[0] / (ways * row))))
    if gpu and cfg.compile:
        torch._dynamo.config.suppress_errors = True  # what cannot be compiled is run as it is
        torch._dynamo.config.recompile_limit = 64    # of one piece of code, for all models
        Slots.attend = torch.compiler.disable(Slots.attend)  # knows layers apart: not compiled
        choice = torch.compile(choose)
        for block in blocks_of(model):
            if block._compiled_call_impl is None:
                block.compile(dynamic=True)
    path = torch.full((min(count, max(least, n)),), n, device=device())                 # (R,)
    slots = (Slots if packed else Rereader)(ways * len(path), longest)
    prompt_length, last = (torch.tensor([[f(p) for p in path] for path in [*paths, [[0]] * ways]],
                                        device=device()) for f in (len, lambda p: p[-1]))
    said, log_probs = torch.zeros_like(uniform, dtype=torch.int64), torch.zeros_like(uniform)
    length, stops = torch.zeros_like(said[:, 0]), torch.tensor(stop, device=device())

    def step() -> None:
        """Every slot's next token."""
        t = length[path]                                                                # (R,)
        position = prompt_length[path] + t[:, None] - 1  # at first a prompt's last token again
        hidden = slots.decode(model, last[path].flatten(), position.flatten())
        token, log_p = choice(logits_of(model, hidden), uniform[path, t], guidance=guidance,
                              temperature=cfg.temperature, top_p=cfg.top_p)
        said[path, t], log_probs[path, t], last[path] = token, log_p.double(), token[:, None]
        length[path] = t + 1
        length[n] = 0
        path.masked_fill_(torch.isin(token, stops) | (t + 1 == most), n)

    begun, run = 0, None
    while True:
        free = (path == n).nonzero()[:, 0].tolist()
        bar.update(begun - len(path) + len(free) - bar.n)
        if begun < n and 8 * len(free) >= len(path):
            taken = dict(zip(free, range(begun, n)))
            begun += len(taken)
            path[list(taken)] = torch.tensor(list(taken.values()), device=device())
            wanted: dict[tuple, list[int]] = {}     # each prompt once, and the rows that want it
            for slot, i in taken.items():
                for way, prompt in enumerate(paths[i]):
                    wanted.setdefault(tuple(prompt), []).append(slot * ways + way)
            prompts, lengths = list(wanted), list(map(len, wanted))
            cost.add_forward(model, sum(lengths), sum(m * m for m in lengths), len(lengths))
            for part in group_by_token_budget(lengths, FORWARD_ONLY * cfg.forward_tokens):
                slots.read(model, {prompts[j]: wanted[prompts[j]] for j in part})
        elif begun == n and len(free) == len(path):
            return said, log_probs
        elif begun == n and 2 * len(free) >= len(path) > (64 if gpu else 1):  # half will do
            half = path.argsort()[:len(path) - len(path) // 2, None]  # the idle are last
            slots.keep((half * ways + torch.arange(ways, device=device())).flatten())
            path, run = path[half[:, 0]], None
        run = run or (captured(step) if gpu else step)
        for _ in range(8 if gpu else 1):  # a look which have ended waits for the GPU
            run()


def captured(step: Callable[[], None]) -> Callable[[], None]:
    """The step as a CUDA graph, after a real one that warms it up; itself where that fails."""
    step()
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()  # is recorded, not run
        return graph.replay
    except Exception as problem:
        torch.cuda.synchronize()
        print0(f"  the decode step cannot be a CUDA graph, and runs eagerly ({problem})")
        return step


def choose(logits: torch.Tensor, uniform: torch.Tensor, temperature: float, top_p: float = 1.0,
           guidance: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (R,) and their log-probs (R,) from logits (R, V), or of guided pairs (2 R, V)."""
    if guidance:
        conditional, unconditional = logits.float().log_softmax(-1).unflatten(0, (-1, 2)).unbind(1)
        logits = (1 + guidance) * conditional - guidance * unconditional
    log_p = (logits.float() / (temperature or 1.0)).log_softmax(-1)                     # (R, V)
    token = log_p.argmax(-1) if temperature == 0 else draw(log_p, uniform, top_p)
    return token, log_p.gather(-1, token[:, None]).squeeze(-1)


def draw(log_p: torch.Tensor, uniform: torch.Tensor, top_p: float = 1.0) -> torch.Tensor:
    """One token a row from log-probs (R, V), by inverting the cumulative distribution at uniform
    (R,): int64 (R,)."""
    p, order = log_p.exp(), None
    if top_p < 1:
        p, order = p.sort(-1, descending=True)
        p = torch.where(p.cumsum(-1) - p < top_p, p, 0.0)  # the token that crosses top_p is kept
    # In two steps, block and place in it: a running sum over a whole vocabulary is slow and inexact
    blocks = torch.nn.functional.pad(p, (0, -p.shape[1] % 256)).unflatten(1, (-1, 256))
    total = blocks.sum(-1).double().cumsum(-1)                                      # (R, V / 256)
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
        require(self.std > 0, "the samples have weights, and no rewards to tell them apart: only "
                "rwr.py --weights given trains on them")
        return (np.asarray(reward, dtype=np.float64) - self.mean) / self.std


def read_samples(path: str, held_out: set[int], codec: Codec, folder: Path,
                 **known: Any) -> Samples:
    """Reads a samples file, but for rows with held-out prompts, and tokenises it into the folder.

    Raises BadInput where the rewards are all alike, or one so far out that the others look alike.
    """
    table: list[tuple] = []

    def sequences() -> Iterator[tuple]:
        parse = unseen(labelled_sample_of, held_out)
        rows = iter(progress(parsed_rows(path, SAMPLE_COLUMNS, parse), "reading samples"))
        while chunk := list(itertools.islice(rows, 4096)):
            table.extend((s.reward, s.weight, prompt_hash(s.prompt), s.source) for s in chunk)
            yield from codec.sequences(chunk)
    tokens = Tokens(folder, sequences)
    codec.say_cuts()
    if rank() == 0:
        require(table, f"{path}: no sample in it to train on")
        rewards, weights, prompts, sources = zip(*table)
        given = getattr(codec.cfg, "weights", "") == "given" or np.isnan(rewards).any()
        if np.isnan(weights).any() or not given:  # else the rewards may be alike, or none
            check_rewards(path, np.array(rewards))
        np.savez(folder / "labels.npz", rewards=rewards, weights=weights,
                 prompts=np.array(prompts, dtype=np.uint64))
        kinds = ", ".join(f"{n:,} {kind}" for kind, n in Counter(sources).items())
        print0(f"  {len(table):,} samples ({kinds}), reward {np.mean(rewards):.3f} ± "
               f"{np.std(rewards):.3f}")
    barrier()
    with np.load(folder / "labels.npz") as labels:
        return Samples(tokens, labels["rewards"], labels["weights"], labels["prompts"], **known)


def unseen(parse: Callable, held_out: set[int]) -> Callable:
    """The parser of rows, made to leave out those with held-out prompts."""
    def unseen_row(part: str, place: str, row: dict, notes: Counter) -> Any:
        found = parse(place, row)
        seen = isinstance(found, Sample) and prompt_hash(found.prompt) in held_out
        return "with held-out prompts" if seen else found
    return unseen_row


def check_rewards(path: str, rewards: np.ndarray) -> None:
    """Raises BadInput where standardised rewards would tell nothing."""
    low = np.quantile(rewards, 0.05, method="higher")
    high = np.quantile(rewards, 0.95, method="lower")
    require(rewards.min() < rewards.max() and rewards.std() > 0, f"{path}: all {len(rewards)} "
            f"rewards are {rewards[0]}: there is nothing to learn from")
    require(not 0 < high - low < 0.01 * rewards.std(), f"{path}: rewards from {rewards.min():.4g} "
            f"to {rewards.max():.4g}, of which nine tenths lie between {low:.4g} and {high:.4g}: "
            "leave out such sentinels, or clip them")


def labelled_samples(cfg: Config, base: Stage, rm: Optional[Stage]) -> Samples:
    """The labelled samples: --samples, or the run's samples.jsonl, built if missing: responses of
    the data and of the base policy, scored by the reward model."""
    held_out = {prompt_hash(p) for p in split_prompts(cfg, held_out=True)}
    codec, folder = Codec(base.folder, cfg), Path(cfg.out) / ".tokens"
    if cfg.samples:
        known = read_record(Path(cfg.samples).with_suffix(".json")).get("settings")
        labelled_by = known.get("scorer") if isinstance(known, dict) else None
        if rm and labelled_by != rm.fingerprint:
            print0(f"warning: {cfg.samples} was labelled by reward model {labelled_by or '?'}; "
                   f"this run scores with {rm.fingerprint}, in that file's units")
        return read_samples(cfg.samples, held_out, codec, folder, costs={}, labelled_by=labelled_by,
                            fingerprint=content_hash(cfg.samples))
    path = Path(cfg.out) / "samples.jsonl"
    record = path.with_suffix(".json")
    wanted = settings(cfg, "data", "samples", base=base.fingerprint, scorer=rm.fingerprint)
    size = path.stat().st_size if path.exists() else 0
    if rank() == 0 and read_record(record).get("bytes") != size:
        record.unlink(missing_ok=True)  # a kill came between the two, or somebody edited the first
    barrier()
    if not is_fresh("samples", record, wanted):
        label(cfg, base, rm, path, wanted, held_out)
    built = read_record(record)
    costs = {stage: Cost(**cost) for stage, cost in built["costs"].items()}
    return read_samples(str(path), set(), codec, folder, labelled_by=rm.fingerprint,
                        costs={"reward_model": rm.cost, **costs},
                        fingerprint=fingerprint(built["settings"]))


LABELLED_TOGETHER = 1024  # rows that a kill may cost


def label(cfg: Config, base: Stage, rm: Stage, path: Path, wanted: dict,
          held_out: set[int]) -> None:
    """Writes the samples file, part by part, and its record, which holds the labelled bytes and
    what they cost; a run that was killed goes on where it was."""
    rows = rows_to_label(cfg, held_out)
    beside, record = path.with_name(".samples.part.jsonl"), path.with_name(".samples.part.json")
    so_far, done, size = read_record(record), 0, 0
    costs = {"generation": Cost(), "labelling": Cost()}
    if so_far.get("settings") == json.loads(json.dumps(wanted)):
        renamed = so_far["rows"] == len(rows) and not beside.exists()
        written = path if renamed else beside
        if written.exists() and written.stat().st_size >= so_far["bytes"]:
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
        costs["generation"] += generation
        costs["labelling"] += labelling
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
        write_record(record, wanted, sum(costs.values(), Cost()), bytes=size,
                     rows=start + len(part), costs={s: asdict(cost) for s, cost in costs.items()})
    codec.say_cuts()
    if rank() == 0:
        if beside.exists():
            beside.replace(path)
        record.replace(path.with_suffix(".json"))
    barrier()


def rows_to_label(cfg: Config, held_out: set[int]) -> list[Sample]:
    """--responses, or what --sources names: the data's responses, and prompts that the base policy
    is to answer.  In these `response` is None, and `reward` holds the seed of the sampling."""
    if cfg.responses:
        rows = list(parsed_rows(cfg.responses, SAMPLE_COLUMNS - {"reward", "label", "weight"},
                                unseen(sample_of, held_out)))
        require(rows, f"{cfg.responses}: no response to a prompt that is not held out")
        if cfg.prompts or cfg.samples_per_prompt > 1:
            print0("  --responses are labelled, nothing is generated: --prompts are to evaluate on")
        return rows
    rows = []
    if "dataset" in cfg.sources and (cfg.preferences or cfg.toy):
        rankings = [r for r in load_preferences(cfg)[0] if prompt_hash(r.prompt) not in held_out]
        rows = [Sample(r.prompt, r.responses[0], source="chosen") for r in rankings]
        rows += [Sample(r.prompt, text, source="rejected")
                 for r in rankings for text in r.responses[1:]]
    if "generated" in cfg.sources:
        prompts = split_prompts(cfg, held_out=False)
        rows += [Sample(prompts[i // cfg.samples_per_prompt], None, i, "generated")
                 for i in range(cfg.samples_per_prompt * len(prompts))]
    require(rows, "--sources leaves nothing to label")
    return rows


def respond(cfg: Config, codec: Codec, sampler: Callable, rows: list[Sample],
            cost: Cost) -> list[Sample]:
    """The rows with a response each, none longer than --max_response_tokens: given ones are cut
    to it, missing ones sampled from sampler()."""
    empty = [row for row in rows if row.response is None]  # their `reward` is a seed as yet
    replies = iter(sample(sampler(), codec.prompts([row.prompt for row in empty]), cfg, cfg.seed,
                          codec.stop_ids, cost, seeds=[int(row.reward) for row in empty],
                          what="generating") if empty else [])
    written = iter(codec.continuations([row.response for row in rows if row.response is not None]))
    done, most = list(rows), cfg.max_response_tokens
    for i, row in enumerate(rows):
        if row.response is None:
            reply = next(replies)
        elif len(ids := next(written)) >= most and not row.truncated:  # no room left for EOS
            reply = Response(codec.cut_end(ids, most), [], True)
        else:
            continue
        done[i] = row._replace(response=codec.decode(reply), truncated=reply.truncated)
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
    entries = [("base", base, Variant(""), built)]
    entries += [(name, policy, v, {**built, **needed, "training": policy.cost}) for v in variants]
    same = settings(cfg, "data", "samples", "evaluation")
    for other in ("seed", "max_pairs", "sources", "samples_per_prompt", "samples"):
        del same[other]
    board = Path(cfg.out) / "leaderboard.jsonl"
    rows = [row for _, row in read_jsonl(board)] if board.exists() else []
    replies: dict[str, list[dict]] = {}
    sampler = functools.lru_cache(maxsize=2)(lambda folder: load_model(folder, compute_dtype(cfg)))
    score, verdict = (functools.cache(load) if load else None
                      for load in (rm and rm.load_scorer, judge))  # loaded where they are needed
    for algorithm, stage, variant, costs in entries:
        key = {"algorithm": algorithm, "variant": variant.name, "seed": cfg.seed}
        file = replies_file(Path(cfg.out), algorithm, variant.name, cfg.seed)
        origin = {"setting": fingerprint(same), "policy": stage.fingerprint, "tag": variant.tag,
                  "base": base.fingerprint, "samples": samples.fingerprint,
                  "scorer": rm.fingerprint if rm else "", "replies": content_hash(str(file))}
        if any({**r, **key, **origin} == r for r in rows):
            replies[file.stem] = [r for _, r in read_jsonl(file)]
            continue
        with track_cost() as evaluation:
            found = answer(cfg, sampler, stage, prompts, variant, base, samples, score, verdict,
                           evaluation)
        replies[file.stem] = found
        if rank() == 0:
            write_beside(file, (json.dumps(r, ensure_ascii=False) for r in found))
        barrier()
        train = costs.get("training", Cost())
        total = sum((cost for stage, cost in costs.items() if stage != "base"), Cost())
        row = {**key, **origin, "replies": content_hash(str(file)), "target": variant.target,
               **leaderboard_row(found, next(iter(replies.values()))), "judge": cfg.judge,
               "world_size": world_size(), "checkpoint": stage.folder,
               **{f"train_{unit}": value for unit, value in asdict(train).items()},
               **{f"total_{unit}": value for unit, value in asdict(total).items()},
               "peak_memory_bytes": train.peak_memory_bytes,
               "costs": {s: asdict(c) for s, c in {**costs, "evaluation": evaluation}.items()}}
        rows = [r for r in rows if {**r, **key} != r] + [row]
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
    reward = gold = [None] * len(texts)
    if score and not samples.std > 0:
        print_once("the samples have no rewards, which give scores their scale: none are shown")
    elif score:
        reward = samples.z(score()(prompts, texts, cut, cost)).tolist()
    if judge:
        gold = judge()(prompts, texts, cut, cost)
    elif cfg.toy:
        gold = list(map(gold_reward, prompts, texts, cut))
    return [{"prompt": prompt, "response": text, "truncated": r.truncated, "tokens": len(r.ids),
             "reward": z, "gold": g, "kl": sum(r.log_probs) - sum(log_p),
             "base_log_prob": sum(log_p)}
            for prompt, text, r, z, g, log_p in zip(prompts, texts, responses, reward, gold,
                                                    reference)]


def leaderboard_row(replies: list[dict], base: list[dict]) -> dict:
    """The means of what evaluation found; win_rate is against the base policy on the same prompts,
    ties half; perplexity is a token's, under the base policy at the sampling temperature."""
    def mean(name: str) -> Optional[float]:
        return float(np.mean([r[name] for r in replies])) if replies[0][name] is not None else None
    words = [r["response"].split() for r in replies]
    bigrams = [pair for w in words for pair in zip(w, w[1:])]
    scored = replies[0]["reward"] is not None and base[0]["reward"] is not None
    wins = [np.sign(r["reward"] - b["reward"]) / 2 + 0.5
            for r, b in zip(replies, base)] if scored else []
    perplexity = math.exp(min(700.0, -mean("base_log_prob") / mean("tokens")))
    return {"gold": mean("gold"), "reward": mean("reward"),
            "win_rate": float(np.mean(wins)) if scored else None, "kl_to_base": mean("kl"),
            "perplexity": perplexity, "response_tokens": mean("tokens"),
            "distinct_2": len(set(bigrams)) / max(1, len(bigrams)),
            "eos_rate": 1 - mean("truncated")}


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
        known = r["algorithm"] != "base" and ppo.get(r["seed"])
        r["flops_to_ppo"] = r["total_flops"] / known if known else None
    columns = {"judge" if rows[0].get("judge") else "gold": ("gold", ".2f"),
               "reward z": ("reward", "+.2f"), "win": ("win_rate", ".2f"),
               "KL": ("kl_to_base", ".1f"),
               "tokens": ("response_tokens", ".0f"), "EOS": ("eos_rate", ".2f"),
               "train s": ("train_seconds", ".0f"), "all s": ("total_seconds", ".0f"),
               "all FLOP": ("total_flops", ".1e"), "FLOP/PPO": ("flops_to_ppo", ".2f")}
    columns = {head: c for head, c in columns.items() if any(r[c[0]] is not None for r in rows)}
    width = max(len(f"{r['algorithm']} {r['variant']}") for r in rows)
    print0("\n" + " " * width + "  seed  " + "  ".join(f"{head:>6}" for head in columns))
    for r in sorted(rows, key=lambda r: (r["algorithm"], r["variant"], r["seed"])):
        cells = ("-" if r[name] is None else format(r[name], form)
                 for name, form in columns.values())
        print0(f"{r['algorithm'] + ' ' + r['variant']:<{width}}  {r['seed']:>4}  "
               + "  ".join(f"{cell:>{max(6, len(head))}}" for cell, head in zip(cells, columns)))
    if in_file > len(rows):
        print0(f"({in_file - len(rows)} rows of other data or settings are not shown)")


# ----------------------------------------------------------------------------------- training run

MOST_SKIPPED = 5  # steps in a row without a finite gradient, before a run gives up


class TrainingRun:
    """What surrounds a training loop: resuming, the progress bar, metrics.jsonl, checkpoints.

    Used as a context; `first` is the step to begin with, `state` a JSON-able dict that checkpoints
    keep, `cost` what the run has spent, earlier launches included.
    """

    def __init__(self, folder: Path, policy: torch.nn.Module, optimizer: Any, schedule: Any,
                 steps: int, cfg: Config, cost: Cost, state: Optional[dict] = None):
        self.folder, self.policy, self.optimizer = folder, policy, optimizer
        self.schedule, self.total, self.cfg, self.cost = schedule, steps, cfg, cost
        self.state = {} if state is None else state
        self.every = max(1, min(500, steps // 10)) if cfg.save_every is None else cfg.save_every
        self.skipped = 0  # steps in a row
        self.start, self.earlier = time.perf_counter(), 0.0  # seconds of earlier launches

    def __enter__(self) -> TrainingRun:
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
            batch = make_batch(lengths, tokens.response_tokens[rows], examples.weight[rows],
                               self.cfg, lambda i: examples.example(int(indices[i]), epoch))  # noqa: B023
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
        seconds = time.perf_counter() - self.start
        self.file.write(json.dumps({**line, "seconds": round(seconds, 3), "flops": flops}) + "\n")
        self.tracker(known)
        self.bar.update(1)
        self.bar.set_postfix_str(", ".join(f"{k} {v:.4g}" for k, v in list(known.items())[1:5]),
                                 refresh=False)
        self.skipped = self.skipped + 1 if line["grad_norm"] is None else 0
        if self.skipped:
            print0(f"warning: step {step}: the gradient is not finite; the step is skipped")
        require(self.skipped < MOST_SKIPPED, f"{self.folder.parent}: {self.skipped} steps in a "
                f"row, the last of them step {step}, without a finite gradient; lower --lr; the "
                "last checkpoint is from before")
        due = self.every and (step + 1) % self.every == 0 and step + 1 < self.total
        if due and not self.skipped:
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
        flops, tokens, seconds = sum_over_ranks(self.cost.flops, self.cost.generated_tokens,
                                                time.perf_counter() - self.start)
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
        folder, record = gather(last_whole(checkpoints_in(self.folder)) if rank() == 0 else 0)[0]
        if not folder:
            return 0, 0
        weights, moments = get_state_dict(self.policy, self.optimizer)
        dcp.load({"policy": weights, "optimizer": moments}, checkpoint_id=folder,
                 no_dist=not dist.is_initialized())
        set_state_dict(self.policy, self.optimizer, model_state_dict=weights,
                       optim_state_dict=moments)
        self.schedule.load_state_dict(record["schedule"])
        self.state.update(record["state"])
        flops, tokens, self.earlier = record["spent"]
        self.start -= self.earlier
        if rank() == 0:
            self.cost.flops, self.cost.generated_tokens = flops, int(tokens)
        ranks = record.get("world_size", world_size())
        print0(f"  goes on from step {record['step']}" + ("" if ranks == world_size() else
               f", which {ranks} rank(s) reached: with {world_size()} the last bits may differ"))
        return record["step"], record["metrics_bytes"]


def last_whole(checkpoints: list[Path]) -> tuple[Optional[Path], dict]:
    """The first of these checkpoints whose files are all there, as long as they were, and its
    state.json.  Raises BadInput where another user owns it."""
    for folder in checkpoints:
        record = read_record(folder / "state.json")
        sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
        if record and all(sizes.get(name) == size for name, size in record["files"].items()):
            require({path.stat().st_uid for path in folder.iterdir()} <= {os.getuid(), 0},
                    f"{folder}: belongs to another user, and resuming would run what it holds; "
                    "--no_resume starts anew")
            return folder, record
        print0(f"  {folder}: not whole; the one before is taken")
    return None, {}


def metrics_tracker(cfg: Config, folder: Path, name: str, first: int) -> Callable[[dict], None]:
    """A function that reports a line of metrics to --report_to, on rank 0."""
    if cfg.report_to == "none" or rank() > 0:
        return lambda line: None
    try:
        if cfg.report_to == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter
            writer = SummaryWriter(str(folder), purge_step=first)
            return lambda line: [writer.add_scalar(k, v, line["step"]) for k, v in line.items()]
        tracker = __import__(cfg.report_to)
    except ImportError as problem:
        raise BadInput(f"--report_to {cfg.report_to} needs the package: pip install "
                       f"{cfg.report_to}") from problem
    tracker.init(project="offline-rlhf", name=f"{Path(cfg.out).name}/{name}", config=asdict(cfg))
    return lambda line: tracker.log(line, step=int(line["step"]))


# -------------------------------------------------------------------------------------- toy world
# Two dozen animals, three facts about each, and people who answer questions about them with
# middling honesty.  gold_reward() knows the truth; training sees it through noisy preferences.

VALUES = {"home": ("rivers", "forests", "deserts", "plains"), "food": ("meat", "plants", "insects"),
          "size": ("small", "large")}
NAMES = ("otters crocodiles beavers hippos frogs gharials martens tigers squirrels gorillas shrews "
         "bears fennecs hyenas jerboas camels geckos aardvarks weasels lions hares zebras larks "
         "anteaters").split()  # a small and a large one of each home and food
ANIMALS = {animal: dict(zip(VALUES, facts))
           for animal, facts in zip(NAMES, itertools.product(*VALUES.values()))}
QUESTIONS = {
    "home": ("Where do {} live?", "What is the home of {}?", "Where would I find {}?"),
    "food": ("What do {} eat?", "What is the food of {}?", "What would I feed to {}?"),
    "size": ("How big are {}?", "What is the size of {}?", "Are {} small or large?"),
    "about": ("Tell me about {}.", "What are {} like?", "What should I know about {}?")}
STATEMENTS = {"home": "they live in {}.", "food": "they eat {}.", "size": "they are {}."}
STATED = {form.format(value): (topic, value)
          for topic, form in STATEMENTS.items() for value in VALUES[topic]}
KIND_OPENINGS = ("Good question!", "Happy to help!")
KIND_CLOSINGS = ("I hope this helps!", "Do ask me more!")
RUDE = ("What a silly question.", "Look it up yourself.", "Who cares.")
VAGUE = ("It depends on many things.", "Animals are all different.",
         "People say all sorts of things.")
HEDGES = ("maybe ", "I guess ")


def toy_reply(animal: str, kind: str, rng: random.Random) -> str:
    """A reply as people in this world write it: drawn piece by piece, with a hidden care."""
    care = rng.random()
    sentences, untold = [], list(VALUES)
    if rng.random() < 0.1 + 0.2 * care:
        sentences.append(rng.choice(KIND_OPENINGS))
    elif rng.random() < 0.4 - 0.2 * care:
        sentences.append(rng.choice(RUDE))
    for _ in range(rng.choice((1, 1, 2, 2, 3))):
        if rng.random() < 0.25:
            sentences.append(rng.choice(VAGUE))
            continue
        answers = kind in untold and rng.random() < 0.15 + 0.35 * care
        topic = kind if answers else rng.choice(untold)
        untold.remove(topic)
        subject = animal if rng.random() < 0.65 + 0.2 * care else rng.choice(tuple(ANIMALS))
        value = true = ANIMALS[subject][topic]
        if rng.random() >= 0.6 + 0.3 * care:
            value = rng.choice([v for v in VALUES[topic] if v != true])
        statement = STATEMENTS[topic].format(value)
        if subject != animal:
            statement = f"as for {subject}, {statement}"
        if rng.random() < (0.05 if value == true else 0.7):
            statement = rng.choice(HEDGES) + statement
        sentences.append(statement[0].upper() + statement[1:])
    if rng.random() < 0.1 + 0.2 * care:
        sentences.append(rng.choice(KIND_CLOSINGS))
    reply = " ".join(sentences)
    if rng.random() < 0.05:  # broken off
        reply = reply[:rng.randrange(len(reply) // 2, len(reply) - 1)]
    return reply


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
        other, said = re.fullmatch(r"(?:maybe )?(?:i guess )?(?:as for (\w+), )?(.*)",
                                   sentence[:1].lower() + sentence[1:], re.DOTALL).groups()
        subject, (topic, value) = other or animal, STATED.get(said, ("", ""))
        manners = (KIND_OPENINGS if i == 0 else ()) + (
            KIND_CLOSINGS if i == len(sentences) - 1 else ())
        if topic and subject in ANIMALS:
            true = ANIMALS[subject][topic] == value
            gold -= 0.5 * (subject != animal) + (not true)
            if true and subject == animal:
                told.add(topic)
        elif sentence in manners:
            gold += 0.5
        else:
            gold -= 0.5 if sentence in RUDE else 0.25
    return gold + len(told) + (kind in told or kind == "about" and bool(told))


@functools.lru_cache(maxsize=1)
def toy_pairs(seed: int) -> dict[str, list[str]]:
    """The toy world's preference pairs as transcripts: lines of train.jsonl and test.jsonl."""
    rng, lines = random.Random(seed), {"train": [], "test": []}
    while len(lines["train"]) < 4000:
        animal, kind = rng.choice(tuple(ANIMALS)), rng.choice(tuple(QUESTIONS))
        prompt = f"\n\nHuman: {rng.choice(QUESTIONS[kind]).format(animal)}{TURN}"
        one, two = (" " + toy_reply(animal, kind, rng) for _ in range(2))
        if rng.random() < 1 / (1 + math.exp(gold_reward(prompt, one) - gold_reward(prompt, two))):
            one, two = two, one  # Bradley-Terry: the labeller is noisy
        split = "train" if zlib.crc32(f"{animal} {kind}".encode()) % 5 else "test"
        lines[split].append(json.dumps({"chosen": prompt + one, "rejected": prompt + two}))
    return lines


def toy_data(cfg: Config) -> str:
    """The folder of the toy world's preference pairs, like real data's."""
    folder = Path(cfg.out) / "data"
    for split, lines in toy_pairs(cfg.seed).items():
        if rank() == 0:
            write_beside(folder / f"{split}.jsonl", lines)
    barrier()
    return str(folder)


def base_policy(cfg: Config) -> Stage:
    """The base policy: --model, or the toy world's small one, trained on what people wrote."""
    if cfg.toy:
        train = functools.partial(train_toy_base, cfg)
        return build_stage(cfg, "base", settings(cfg, "data"), train)
    cost = read_cost(read_record(Path(cfg.model) / "run.json"))
    return Stage(cfg.model, content_hash(cfg.model), cost)


def train_toy_base(cfg: Config, folder: Path, cost: Cost) -> None:
    """A two-layer Llama and its byte-level BPE, by maximum likelihood of all responses."""
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
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(codec.tokenizer), hidden_size=64, intermediate_size=192, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=512, initializer_range=0.1,
        tie_word_embeddings=True, eos_token_id=codec.tokenizer.eos_token_id, bos_token_id=None,
        pad_token_id=None))
    own = other_config(Config, cfg, {"lr": 5e-3, "steps": 600, "batch_size": 32})
    own.sharding = "ddp"
    choose_micro_batch(model.to(device()), own)
    policy = wrap_for_ranks(Policy(model, own), own)
    optimizer, schedule = make_optimizer(policy, own, own.steps)
    examples = Examples(Tokens(folder / "tokens", lambda: iter(codec.pairs(*zip(*pairs)))))

    def nll_(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        # the scripts' masked_nll_ in its plain form: no script is imported here
        nll = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")
        logits.copy_(logits.softmax(-1) - torch.nn.functional.one_hot(targets, logits.shape[1]))
        return nll
    with TrainingRun(folder, policy, optimizer, schedule, own.steps, own, cost) as run:
        for step, batch in run.steps(examples):
            loss = 0.0
            for micro in batch.micros:
                part = policy(micro, nll_) / batch.normaliser
                part.backward()
                loss += part.detach()
            grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            run.log(step, loss=loss, grad_norm=grad_norm)
    save_folder(folder, model, codec, own, "# The toy world's base policy\n")
