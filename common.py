"""Everything the trainers share and no algorithm is about.

Rooms, in reading order: process group, config, stages, tokenizer, data, batches, packed attention,
models, fused head loss, sampler, labelled samples, evaluation, training run, toy world.

Terms: *policy*, the language model that is trained; *base policy*, what it starts from and the
reference of every KL; *sample*, a (prompt, response, reward); *z*, a reward standardised over the
labelled samples; *response mask*, the tokens a loss is taken over; *entry*, a row of a data file;
*prompt*, text, or chat messages for the tokenizer's chat template.  Shapes: T tokens of packed
sequences, N rows (positions that predict a response token), D hidden width, V vocabulary, R lanes
of the sampler's cache.
"""
from __future__ import annotations

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
import signal
import sys
import threading
import time
import unicodedata
import warnings
import zlib
from collections import Counter
from dataclasses import asdict, dataclass, field, fields, replace
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


def printable(text: Any) -> str:
    """The text, control characters as escapes: data could command the terminal with them."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in str(text))


def print0(*args: Any) -> None:
    """print, on rank 0 alone."""
    if rank() == 0:
        print(*map(printable, args), flush=True)


print_once = functools.cache(print0)  # each line once in a process


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
    with contextlib.suppress(AttributeError):  # a stream that is closed
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(errors="backslashreplace")  # an ASCII terminal shows escapes
    status = 2
    try:
        cfg = parse(kind, args)
        quieten_libraries()
        torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for each length
        if not cfg.compile:
            torch.compiler.set_stance("force_eager")
        if world_size() > 1:
            gpu, timeout = device().type == "cuda", timedelta(minutes=cfg.dist_timeout_minutes)
            if gpu:
                torch.cuda.set_device(device())
            dist.init_process_group("nccl" if gpu else "gloo", timeout=timeout)
        with locked(Path(cfg.out)) if rank() == 0 else contextlib.nullcontext():
            hashes = Path(cfg.out, ".hashes.json")
            HASHES.update(read_record(hashes))
            seen = gather(fingerprint({**asdict(cfg), **settings(cfg, *STAGES)}))
            require(len(set(seen)) == 1, "the ranks were started with other flags, or see other "
                    "files, than one another: they must all read the same data")
            if rank() == 0:
                write_beside(hashes, [json.dumps(HASHES)])
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
        if os_problem(found) is None:
            raise
        problem = f"{os_problem(found)}; what was there before is untouched"
    name = f"{Path(sys.argv[0]).name}: " + (f"rank {rank()}: " if rank() else "")
    print(name + printable(problem), file=sys.stderr)
    sys.exit(status)


def os_problem(problem: Exception) -> Optional[str]:
    """What the operating system complained of, also where a library wrapped it; else None."""
    full = os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT), "inline_container"  # torch's
    if isinstance(problem, OSError) and problem.errno or any(sign in str(problem) for sign in full):
        return " ".join(str(problem).split())
    return None


def locked(folder: Path) -> Any:
    """A file that holds the run's folder while it is open.  Raises BadInput naming another holder.
    """
    import fcntl
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / ".lock", "a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as problem:
        file.seek(0)
        raise BadInput(f"{folder}: another run is at work there ({file.read()})") from problem
    except OSError:  # Lustre without -o flock, NFS without lockd
        print0(f"warning: {folder} cannot be locked: start no second run into it")
    file.truncate(0)
    print(f"process {os.getpid()} on {platform.node()}", end="", file=file, flush=True)
    return file


def quieten_libraries() -> None:
    """Their bars and reports would drown the trainers' own lines; their errors stay."""
    from transformers.utils import logging
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", "torch.distributed is disabled|Detected call of `lr_sched|"
                            "`past_key_values` is deprecated")


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
    seed: int = flag(0, "of all that is drawn", "[0, 4294967295]", stage="data")
    responses: Optional[str] = flag(None, "label these: prompt and response", stage="samples")
    prompts: Optional[str] = flag(None, "generate for these: prompt", stage="samples")
    samples: Optional[str] = flag(
        None, "train on these: prompt, response, reward", stage="samples")
    reward_model: Optional[str] = flag(
        None, "sequence classifier: score with it, train none", stage="samples")
    sources: Literal["dataset+generated", "dataset", "generated"] = flag(
        "dataset+generated", "which responses are labelled", stage="samples")
    samples_per_prompt: int = flag(1, "generated responses", "[1, inf)", toy=9, stage="samples")
    temperature: float = flag(1.0, "of all sampling; 0: greedy", "[0, 1000]", stage="samples")
    top_p: float = flag(1.0, "nucleus sampling", "[0.000001, 1]", stage="samples")
    judge: Optional[str] = flag(
        None, "a reward model that training never sees: it scores `gold`", stage="evaluation")
    eval_prompts: int = flag(
        256, "held-out prompts to evaluate on; 0: none", "[0, inf)", toy=512, stage="evaluation")
    lr: float = flag(
        1e-5, "peak learning rate; 3 % warm-up, then cosine to 0", "(0, 1000]", stage="training")
    epochs: int = flag(1, "passes over the training examples", "[1, inf)", stage="training")
    steps: Optional[int] = flag(
        None, "optimiser steps, in place of --epochs", "[1, inf)", stage="training")
    batch_size: int = flag(
        128, "sequences per step, all ranks together", "[1, inf)", toy=32, stage="training")
    micro_batch_tokens: Optional[int] = flag(
        None, "of a forward, for memory [CPU: 8,192; GPU: what fits]", "[1, inf)", toy=16384)
    slots: Optional[int] = flag(
        None, "responses sampled at a time [CPU: 64; GPU: what fits, at most 512]", "[1, inf)")
    dtype: Literal["auto", "bf16", "fp32"] = flag(
        "auto", "of matrix products; auto: bf16 where the hardware has it", toy="fp32")
    compile: bool = flag(True, "torch.compile the loss kernels, and on a GPU the model's blocks")
    sharding: Literal["ddp", "fsdp"] = flag(
        "ddp", "fsdp: weights, gradients and optimiser spread over the ranks (FSDP2)")
    save_every: Optional[int] = flag(
        None, "steps between checkpoints; 0: none [a tenth of the run, at most 500]", "[0, inf)")
    resume: bool = flag(True, "go on from the last checkpoint; --no_resume starts the stage again")
    dist_timeout_minutes: int = flag(10, "how long a rank waits for another", "[1, inf)")
    gradient_checkpointing: bool = flag(False, "recompute activations in backward, for memory")
    report_to: Literal["none", "tensorboard", "wandb", "trackio"] = flag(
        "none", "where the metrics go beside metrics.jsonl")

    def __post_init__(self) -> None:
        for f in fields(self):
            value, interval = getattr(self, f.name), f.metadata["help"].within
            for v in value if isinstance(value, list) else [value]:
                require(v is None or interval is None or lies_in(interval, v),
                        f"--{f.name} must lie in {interval}, not {v}")
        require(self.temperature == 0 or self.temperature >= 1e-3,
                f"--temperature is 0, for greedy, or at least 0.001, not {self.temperature}")
        data = [f"--{name}" for name in ("preferences", "samples", "responses", "prompts")
                if getattr(self, name)]
        require(self.model or not data, f"{', '.join(data)}: needs --model, a folder or Hub id")
        require(self.max_pairs is None or self.toy or self.preferences,
                "--max_pairs counts --preferences, and there are none")
        require(self.eval_prompts or not self.judge, "--judge has nothing to score with "
                "--eval_prompts 0")
        require(not (self.samples and self.responses), "--samples are labelled, --responses are "
                "not: give one of them")
        require(self.toy or self.preferences or self.samples or data and self.reward_model,
                "--model needs data: --preferences, or --samples, or --prompts or --responses with "
                "--reward_model")

    @property
    def forward_tokens(self) -> int:
        """Tokens that a forward may hold: --micro_batch_tokens, or 8,192 while it has no value."""
        return self.micro_batch_tokens or 8192

    @property
    def toy(self) -> bool:
        """Whether the embedded toy world is meant."""
        return self.model is None


def lies_in(interval: str, value: float) -> bool:
    """Whether "[1, inf)", say, contains the value."""
    low, high = map(float, interval[1:-1].split(","))
    return (low < value or interval[0] == "[" and low == value) and (
        value < high or interval[-1] == "]" and value == high)


OTHER_NAMES = {  # TRL's flags -> ours
    "learning_rate": "lr", "num_train_epochs": "epochs", "max_steps": "steps", "output_dir": "out",
    "model_name_or_path": "model", "dataset_name": "preferences", "save_steps": "save_every",
    "bf16": "dtype bf16", "max_prompt_length": "max_prompt_tokens",
    "max_completion_length": "max_response_tokens",
    "max_length": "max_prompt_tokens and --max_response_tokens",
    "per_device_train_batch_size": "batch_size (sequences a step, all ranks together)",
    "gradient_accumulation_steps": "micro_batch_tokens (accumulation follows from it)"}


def parse(kind: type, args: Optional[list[str]] = None) -> Any:
    """The command line, after --config's YAML file, as this kind of config."""
    from transformers import HfArgumentParser

    def wrong_flag(message: str) -> None:
        raise BadInput(message)
    about = (sys.modules[kind.__module__].__doc__ or "").split("\n\n")[0]
    parser = HfArgumentParser(kind, allow_abbrev=False, description=about)
    parser.add_argument("--config", help="YAML file of flags; those of the command line win")
    parser.error = wrong_flag
    args = sys.argv[1:] if args is None else args
    file = parser.parse_known_args(args)[0].config
    require(len({a.split("=")[0] for a in args} & {"--epochs", "--steps"}) < 2,
            "--epochs and --steps: give one of them")
    args = (yaml_flags(file) if file else []) + args
    names = {a.split("=")[0].removeprefix("--") for a in args if a.startswith("--")}
    for name in names & OTHER_NAMES.keys():
        raise BadInput(f"--{name}: here it is --{OTHER_NAMES[name]}")
    if not names & {"model", "preferences"}:
        parser.set_defaults(**toy_defaults(kind))
    if "epochs" in names:
        parser.set_defaults(steps=None)  # the toy world's steps would win
    cfg, _, unknown = parser.parse_args_into_dataclasses(args, return_remaining_strings=True)
    require(not unknown, f"unknown flag or value {' '.join(unknown)}; --help lists all flags")
    return cfg


def yaml_flags(path: str) -> list[str]:
    """The flags in a YAML file, as a command line."""
    import yaml
    try:
        flags = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeError, yaml.YAMLError) as problem:
        raise BadInput(f"--config {path}: {' '.join(str(problem).split())}") from problem
    require(isinstance(flags, dict) and "config" not in flags,
            f"--config {path}: must hold lines of `flag: value`, and name no other file")
    return [text for name, value in flags.items() if value is not None
            for text in (f"--{name}", *map(str, value if isinstance(value, list) else [value]))]


def toy_defaults(kind: type) -> dict:
    """The defaults of this kind of config that differ in the toy world."""
    toy = {f.name: f.metadata["help"].toy for f in fields(kind)}
    return {name: value for name, value in toy.items() if value is not None}


def compute_dtype(cfg: Config) -> torch.dtype:
    """The dtype of matrix products: bf16 where asked for, or where hardware multiplies in it."""
    native = (torch.cuda.is_bf16_supported(including_emulation=False)
              if device().type == "cuda" else torch.cpu._is_avx512_bf16_supported())
    bf16 = cfg.dtype == "bf16" or cfg.dtype == "auto" and native
    return torch.bfloat16 if bf16 else torch.float32


# ----------------------------------------------------------------------------------------- stages
# A run is a chain of stages.  Each leaves a record (run.json) of the settings it was built with,
# and is not built again while they match.  Everything is written beside, synced and renamed: after
# a kill at any moment the same command goes on.


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
    """Seconds; of all ranks together FLOPs and sampled tokens; the peak memory of the largest."""
    seconds: float = 0.0
    flops: float = 0.0
    generated_tokens: int = 0
    peak_memory_bytes: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.seconds + other.seconds, self.flops + other.flops,
                    self.generated_tokens + other.generated_tokens,
                    max(self.peak_memory_bytes, other.peak_memory_bytes))

    def add_forward(self, model: Any, tokens: int, pairs: int, rows: int, passes: int = 1) -> None:
        """Adds a call of the model: 2 FLOPs for a weight and token (of the head: and row), 4 for a
        layer, pair of tokens that attend and unit of width; with backward it is 3 passes.  (Kaplan
        et al. 2020, arXiv 2001.08361, section 2.1.)"""
        body, shape = model.base_model, model.config.get_text_config()
        embedding, head = body.get_input_embeddings().weight, model.get_output_embeddings()
        weights = sum(p.numel() for p in body.parameters()) - embedding.numel()
        self.flops += passes * (2 * weights * tokens
                                + 4 * shape.num_hidden_layers * shape.hidden_size * pairs
                                + (2 * head.weight.numel() * rows if head is not None else 0))


@contextlib.contextmanager
def track_cost() -> Iterator[Cost]:
    """Yields a Cost that the block's work adds to; at the end it holds all ranks' together."""
    cost, start, gpu = Cost(), time.perf_counter(), torch.cuda.is_available()
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    yield cost
    cost.seconds += time.perf_counter() - start
    peak = (torch.cuda.max_memory_allocated() if gpu else  # else since the process began
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    flops, tokens, peaks = zip(*gather((cost.flops, cost.generated_tokens, peak)))
    cost.flops, cost.generated_tokens, cost.peak_memory_bytes = sum(flops), sum(tokens), max(peaks)


def build_stage(cfg: Config, name: str, wanted: dict, make: Callable[[Path, Cost], Any]) -> Stage:
    """The stage in the folder `name` of the run, from before, or built by make(folder, cost).

    make returns what else its record holds, or a function that finds it and costs nothing.  Raises
    BadInput over checkpoints of other settings: --no_resume alone deletes unfinished work.
    """
    folder = Path(cfg.out, name).resolve()
    work = folder.with_name(f".{folder.name}.new")
    put_in_place(work, folder)  # where a kill came between
    if not is_fresh(name, folder / "run.json", wanted):
        require(not folder.exists() or (folder / "run.json").exists() or not os.listdir(folder),
                f"{folder}: holds what is no stage of a run; move it away or give another --out")
        begun = read_record(work / "run.json").get("settings", {})
        changed = [setting for setting in wanted if begun.get(setting) != wanted[setting]]
        require(not (cfg.resume and changed and checkpoints_in(work)), f"{work}: holds checkpoints "
                f"of a run with another {', '.join(changed)}; give that run's flags to go on with "
                "it, --no_resume to start anew, or another --out")
        barrier()
        if rank() == 0:
            if changed or not cfg.resume:
                shutil.rmtree(work, ignore_errors=True)
            write_beside(work / "run.json", [json.dumps({"settings": wanted})])
        barrier()
        torch.manual_seed(cfg.seed)
        try:
            with track_cost() as cost:
                more = make(work, cost)
            gc.collect()  # sharded models are cycles, and the next stage needs the memory
            more = more() if callable(more) else more or {}
        except BaseException:
            if rank() == 0 and not checkpoints_in(work):
                shutil.rmtree(work, ignore_errors=True)
            raise
        for path in filter(Path.is_file, [*work.iterdir()] if rank() == 0 else []):
            if path.name.startswith(".tmp"):  # a kill came while weights were written
                path.unlink()
                continue
            shutil.copymode(work / "run.json", path)  # safetensors writes for its owner alone
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        write_record(work / "run.json", wanted, cost, **more)
        put_in_place(work, folder)
    record = read_record(folder / "run.json")
    cost = Cost(**{f.name: record.get("cost", {}).get(f.name, 0) for f in fields(Cost)})
    return Stage(os.path.join(cfg.out, name), fingerprint(record["settings"]), cost)


def put_in_place(work: Path, folder: Path) -> None:
    """Replaces a stage's folder by what is finished, and so has a cost; called again after a kill,
    it ends what it began."""
    if rank() == 0 and "cost" in read_record(work / "run.json"):
        for scratch in ("checkpoints", "tokens"):
            shutil.rmtree(work / scratch, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)
        work.rename(folder)
    barrier()


def is_fresh(stage: str, record: Path, wanted: dict) -> bool:
    """Whether the stage was built with the wanted settings (of JSON's types); says what changed."""
    built = read_record(record).get("settings")
    changes = [f"{name} ({built.get(name)} -> {value})" for name, value in wanted.items()
               if built and built.get(name) != value]
    state = f"{os.path.relpath(record.parent)}, from before" if built else "to be built"
    print0(f"{stage}: " + (f"built again because of {', '.join(changes)}" if changes else state))
    return bool(built) and not changes


def train_stage(cfg: Config, algorithm: str, train: Callable, base: Stage, samples: Samples,
                *stages: str, **more: Any) -> Stage:
    """The algorithm's policy: from before, or train(cfg, base, samples, folder, cost)'s.

    It depends on flags of data, training and other `stages`, base policy, samples and `more`.
    """
    wanted = settings(cfg, "data", "training", *stages, base=base.fingerprint,
                      samples=samples.fingerprint, **more)
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


HASHES: dict[str, str] = {}  # of files, under path, size and times; launch() keeps them in the run


def content_hash(source: str) -> str:
    """Of a file, or of a folder's files and their names, every byte of them; a Hub id is itself."""
    root, found = Path(source), []
    if not root.exists():
        return source
    require(root.is_file() or root.is_dir(), f"{source}: a pipe or device; give a regular file")
    for path in [root] if root.is_file() else visible_files(root):
        stat = path.stat()
        key = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}"
        if key not in HASHES:
            digest = hashlib.sha256()
            with open(path, "rb") as file:
                while part := file.read(2**24):
                    digest.update(part)
            HASHES[key] = digest.hexdigest()
        found.append((str(path.relative_to(root)), HASHES[key]))
    return fingerprint(found)


def visible_files(root: Path) -> list[Path]:
    """A folder's files, those of its folders too, through links; nothing hidden."""
    found = map(root.joinpath, glob.glob("**", root_dir=root, recursive=True))
    return sorted(path for path in found if not path.is_dir())


def fingerprint(what: Any) -> str:
    """Twelve hex digits of a JSON-able value."""
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:12]


def checkpoints_in(folder: Path) -> list[Path]:
    """A stage's checkpoints, the last first."""
    return sorted((folder / "checkpoints").glob("[0-9]*"), reverse=True)


def read_record(path: Path) -> dict:
    """A JSON object from a file, {} where there is none."""
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def write_record(path: Path, wanted: dict, cost: Cost, **more: Any) -> None:
    """Writes a stage's record on rank 0: settings, cost and what else belongs to it."""
    if rank() == 0:
        record = {"settings": wanted, "cost": asdict(cost), **more}
        write_beside(path, [json.dumps(record, indent=1)])
    barrier()


def write_beside(path: Path, lines: Iterable[str]) -> None:
    """Writes lines beside the file, syncs and renames: a kill leaves the old or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.new")
    with open(beside, "w", encoding="utf-8") as file:
        file.writelines(line + "\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


# -------------------------------------------------------------------------------------- tokenizer
# Prompt and response are encoded apart, so that the boundary between them is exact.  How a turn
# ends is the model's to say: its stop tokens, and what its chat template writes.

GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# The same after each digit was set apart, as SmolLM2 does: there white space ends at a digit, too.
DIGITS_SPLIT = r"\p{N}|'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
TEMPLATE_SECONDS = 20  # that a chat template may take for a conversation
PROBE = ("Hello  world,\n\n\n  it's 12345 o'clock…\tnaïve café 東京タワー привет שלום \U0001f468‍"
         "\U0001f469‍\U0001f467\U0001f3fd \r\nx  7  y   \n 3.14e-10 ½²³ <|endoftext|>user <s></s>"
         "[INST] don't WE'LL I'd   trailing   ", "    def f(x):\n        return x**2  # \t\t!\n\n",
         "1 2  3   4    5 a1b22c333 ,,,...;;; ====---- ___", " ", "\n", "é", "")


REWARD_BLOCK = "{% if add_generation_prompt and reward is not none %}"  # begins dt.py's block


def with_reward_tag(template: Any, tag: str) -> Any:
    """The chat template with a tag, an expression of Jinja, after the prompt; with "" without any.
    Several templates by name, or none, alike.

    apply_chat_template(..., reward=2.0) sets the `reward` that the tag reads; None: no tag.
    """
    if isinstance(template, dict):
        return {name: with_reward_tag(each, tag) for name, each in template.items()}
    block = tag and REWARD_BLOCK + "{{ " + tag + " }}{% endif %}"
    return template and template.split(REWARD_BLOCK)[0] + block


class Codec:
    """Text to token ids and back for one model: its tokenizer, and how its turns end."""

    def __init__(self, folder: str, cfg: Config):
        """Raises BadInput where there is no tokenizer, or none that could end a response."""
        from transformers import AutoConfig, AutoTokenizer, GenerationConfig
        with load_errors(folder, "a tokenizer"):
            self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        self.tokenizer.chat_template = with_reward_tag(self.tokenizer.chat_template, "")
        self.cfg, self.cuts, self.configs = cfg, Counter(), []
        self.encode = text_encoder(self.tokenizer)
        # SentencePiece marks the first word of a text, so what continues one is encoded after "\n"
        word, line, newline = self.encode(["a", "\na", "\n"])
        marks = line[:len(newline)] == newline and line[len(newline):] != word
        self.before, self.before_ids = ("\n", newline) if marks else ("", [])
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        self.bos = [t for t in self.tokenizer("")["input_ids"] if t == bos or t != eos]
        for kind in (GenerationConfig, AutoConfig):
            with contextlib.suppress(OSError, ValueError):
                self.configs.append(kind.from_pretrained(folder, trust_remote_code=False))
        ends = [eos]
        for config in self.configs:
            found = getattr(config, "eos_token_id", None)
            ends += found if isinstance(found, list) else [found]
        self.stop_ids = [t for t in dict.fromkeys(ends) if t is not None]
        require(self.stop_ids, f"{folder}: neither its tokenizer nor its configuration has an EOS "
                "token, so no response could end")
        self.turn_end = self.turn_tail = self.eos = self.stop_ids[:1]
        self.left_out: set[str] = set()  # roles that the chat template passes over
        if self.tokenizer.chat_template:
            self._read_template(folder)
        self.check_fits(folder)

    def _read_template(self, folder: str) -> None:
        """How the chat template ends a turn, what it writes after it, which roles it leaves out."""
        user, reply, *others = ({"role": role, "content": "a"} for role in (
            "user", "assistant", "system", "developer", "tool"))
        tail: list[int] = []
        with contextlib.suppress(BadInput):  # a template may refuse two plain turns, or a role
            tail = [ids for ids, _ in self._pieces([user, reply], reply=False)][-1]
        for other in others:
            with contextlib.suppress(BadInput):
                if 0 not in {i for _, i in self._pieces([other, user], reply=True)}:
                    self.left_out.add(other["role"])
        special = {*self.stop_ids, *self.tokenizer.added_tokens_decoder}
        for end in [t for t in tail if t in special][:1]:
            self.turn_end, self.turn_tail = tail[:tail.index(end) + 1], tail
            if end not in self.stop_ids:
                self.stop_ids.append(end)
                print_once(f"{folder}: its chat template ends a turn with "
                           f"{self.tokenizer.convert_ids_to_tokens(end)}, which neither tokenizer "
                           "nor generation_config names as an end: taken as one here")

    def check_fits(self, folder: str, tag: str = "") -> None:
        """Raises BadInput if the model has too few embeddings for the tokenizer, or positions for
        prompt, BOS, reward tag and response."""
        size, more = len(self.tokenizer), len(self.bos + self.encode([tag])[0])
        need = self.cfg.max_prompt_tokens + self.cfg.max_response_tokens + more
        for shape in (c.get_text_config() for c in self.configs if hasattr(c, "get_text_config")):
            embeddings = getattr(shape, "vocab_size", None) or math.inf
            most = getattr(shape, "max_position_embeddings", None) or math.inf
            require(size <= embeddings, f"{folder}: the tokenizer has {size:,} tokens and the "
                    f"model {embeddings:,} embeddings; resize_token_embeddings first")
            require(need <= most, f"{folder} reads at most {most} tokens, and prompt, response, "
                    f"BOS and reward tag may take {need}: lower --max_prompt_tokens")

    def _special(self) -> tuple[str, ...]:
        return tuple(t.content for t in self.tokenizer.added_tokens_decoder.values() if t.special)

    def _rendered(self, texts: list[str]) -> list[list[int]]:
        """Ids of texts that a template wrote: special tokens are what they are."""
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []

    def _written(self, texts: list[str]) -> list[list[int]]:
        """Ids of the user's texts, in which the text of a special token is text."""
        special = self._special()
        if self.cfg.rendered_text:
            return self._rendered(texts)
        if any(t.strip().startswith(special) or t.strip().endswith(special) for t in texts):
            print_once("texts begin or end with a special token's text, read as plain characters; "
                       "if a chat template wrote it, give --rendered_text")
        return self.encode(texts)

    def continuations(self, texts: list[str], encode: Optional[Callable] = None) -> list[list[int]]:
        """Ids of responses, or of other texts of the user's that continue a prompt."""
        encode, n = encode or self._written, len(self.before_ids)
        return [ids[n:] if ids[:n] == self.before_ids else encode([text])[0]
                for text, ids in zip(texts, encode([self.before + text for text in texts]))]

    def _render(self, messages: list[dict], **more: Any) -> Any:
        require(self.tokenizer.chat_template, f"{self.tokenizer.name_or_path}: no chat template, "
                "which messages need; give an instruct model, or text")
        try:
            with time_limit(TEMPLATE_SECONDS):
                found = self.tokenizer.apply_chat_template(messages, **more)
        except Exception as problem:  # a template is a program, and may fail as one
            why = " ".join(f"{type(problem).__name__} {problem}".split())[:200]
            raise BadInput(f"the chat template refuses a conversation: {why}") from problem
        require(found, "the chat template writes nothing for a conversation")
        return found

    def _pieces(self, messages: list[dict],
                reply: bool) -> Iterator[tuple[list[int], Optional[int]]]:
        """(ids, the message they are the content of, or None) of what the template renders."""
        marked = [{**m, "content": f"\ue000{i}\ue001"} for i, m in enumerate(messages)]
        text = self._render(marked, add_generation_prompt=reply, tokenize=False)
        for i, piece in enumerate(re.split("\ue000(\\d+)\ue001", text)):
            if i % 2:
                yield self.continuations([messages[int(piece)]["content"]])[0], int(piece)
            elif piece:
                yield self.continuations([piece], self._rendered)[0], None

    def chat(self, messages: list[dict], reply: bool = True) -> list[int]:
        """Messages through the template, up to the reply if one is to follow; the text of special
        tokens in a message stays text."""
        for role in sorted(self.left_out & {m["role"] for m in messages}):
            print_once(f"the chat template leaves out messages of {role}")
        if any(token in m["content"] for token in self._special() for m in messages):
            return [t for ids, _ in self._pieces(messages, reply) for t in ids]
        return self._render(messages, add_generation_prompt=reply, return_dict=False)

    def _shorten(self, messages: list[dict]) -> list[dict]:
        """The conversation without its oldest turns; if need be, the last one without its start."""
        most, start = self.cfg.max_prompt_tokens, int(messages[0]["role"] == "system")
        system, turns = messages[:start], messages[start:]
        while (over := len(self.chat(system + turns)) - most) > 0:
            if len(turns) > 1:
                turns = turns[2 if len(turns) > 2 and turns[1]["role"] == "assistant" else 1:]
                continue
            content = self.encode([turns[0]["content"]])[0]
            require(len(content) > over, f"--max_prompt_tokens {most}: too few for the template "
                    "and the system message of a conversation")
            shorter = self.tokenizer.decode(self._cut_start(content, len(content) - over))
            turns = [{**turns[0], "content": shorter}]
        return system + turns

    def _cut_start(self, ids: list[int], most: int) -> list[int]:
        """The last tokens, from where a character begins."""
        ids = ids[-most:]
        while ids and self.tokenizer.decode(ids[:8]).startswith("\ufffd"):
            ids = ids[1:]
        return ids

    def cut_end(self, ids: list[int], most: int) -> list[int]:
        """The first tokens, up to where a character ends."""
        if len(ids) > most:
            self.cuts["responses are cut at --max_response_tokens; no end is taught there"] += 1
            ids = ids[:most]
            while len(ids) > 1 and self.tokenizer.decode(ids[-8:]).endswith("\ufffd"):
                ids = ids[:-1]
        return ids

    def say_cuts(self) -> None:
        """Says how many prompts and responses were cut since the last time."""
        for what, count in self.cuts.items():
            print0(f"  {count:,} {what}")
        self.cuts.clear()

    def prompts(self, prompts: list) -> list[list[int]]:
        """Prompts as ids: text after BOS, chat messages through the template up to the reply.
        Longer ones are cut: text at its start, chat messages lose their oldest turns."""
        most, found = self.cfg.max_prompt_tokens, []
        texts = iter(self._written([p for p in prompts if isinstance(p, str)]))
        for prompt in prompts:
            is_text = isinstance(prompt, str)
            ids = next(texts) if is_text else self.chat(prompt)
            if len(ids) > most:
                self.cuts["prompts are cut to --max_prompt_tokens: text at its start, chat "
                          "messages by their oldest turns"] += 1
                ids = self._cut_start(ids, most) if is_text else self.chat(self._shorten(prompt))
            if is_text and ids[:len(self.bos)] != self.bos:
                ids = self.bos + ids
            found.append(ids)
        return found

    def tokenise(self, prompts: list, responses: list[str], truncated: Optional[list[bool]] = None,
                 whole: bool = False) -> list[tuple[np.ndarray, np.ndarray]]:
        """(ids (T,), response mask (T,)) of prompt and response, which ends as a turn does if it
        is neither cut off nor too long.  `whole`: chats as rendered, for reward models."""
        found, every = [], self.cfg.train_on == "all_assistant_turns" and not whole
        for prompt, response, before, ids, cut in zip(
                prompts, responses, self.prompts(prompts), self.continuations(responses),
                truncated or itertools.repeat(False)):
            is_chat, learnt = not isinstance(prompt, str), False
            if is_chat and every:
                before, learnt = self._every_turn(self._shorten(prompt))
            end = self.eos if not is_chat else self.turn_tail if whole else self.turn_end
            if cut or self.cfg.rendered_text and ids and ids[-1] in self.stop_ids:
                end = []
            sequence = before + self.cut_end(ids + end, self.cfg.max_response_tokens)
            if whole and is_chat and end and sequence[len(before + ids):] == end:
                reply = {"role": "assistant", "content": response}
                sequence = self.chat([*self._shorten(prompt), reply], reply=False)
            mask = np.arange(len(sequence)) >= len(before)
            mask[:len(before)] = learnt
            found.append((np.array(sequence, dtype=np.int32), mask))
        return found

    def _every_turn(self, messages: list[dict]) -> tuple[list[int], list[bool]]:
        """A chat's ids up to its last reply, and which are earlier replies or the ends of them."""
        ids, mask, replied, end = [], [], False, self.turn_end
        for piece, i in self._pieces(messages, reply=True):
            ends = len(end) if piece[:len(end)] == end else len({*piece[:1]} & {*self.stop_ids})
            is_reply = i is not None and messages[i]["role"] == "assistant"
            mask += [is_reply or replied and n < ends for n in range(len(piece))]
            ids += piece
            replied = is_reply
        return ids, mask

    def sequences(self, samples: list[Sample]) -> list[tuple[np.ndarray, np.ndarray]]:
        """tokenise() of samples."""
        return self.tokenise([s.prompt for s in samples], [s.response for s in samples],
                             [s.truncated for s in samples])

    def decode(self, response: Response) -> str:
        """A sampled response's text, without what ended it."""
        ids, end = response.ids, self.turn_end
        if not response.truncated:
            ids = ids[:-len(end)] if ids[-len(end):] == end else ids[:-1]
        text, start = map(self.tokenizer.decode, (self.before_ids + ids, self.before_ids))
        return text[len(start):] if text.startswith(start) else self.tokenizer.decode(ids)


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in a block that takes longer; in other threads than the main one not."""
    def late(*_: Any) -> None:
        raise TimeoutError(f"after {seconds} s it is still at work")
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


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
    byte, vocabulary = {c: b for b, c in bytes_to_unicode().items()}, model["vocab"]
    words = ["".join(merge) if isinstance(merge, list) else merge.replace(" ", "")
             for merge in model["merges"]]
    made = [vocabulary[word] for word in words]
    if made != sorted(made):
        raise ValueError("ids in another order than merges, as which tiktoken takes them")
    if model.get("ignore_merges"):  # a whole word that is in the vocabulary is one token
        words += [word for word in vocabulary if all(c in byte for c in word)]
    ranks = {bytes(byte[c] for c in word): vocabulary[word] for word in words}
    ranks |= {bytes([b]): vocabulary.get(c, 2**31 + b) for c, b in byte.items()}
    known = {*made, *(vocabulary.get(c) for c in byte)}
    fast = tiktoken.Encoding("merges", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    normal = functools.partial(unicodedata.normalize, "NFC") if spec["normalizer"] else str

    def encode(texts: list[str]) -> list[list[int]]:
        found = [fast.encode_ordinary(normal(text)) for text in texts]
        return [ids if known.issuperset(ids) else own([text])[0] for text, ids in zip(texts, found)]
    return encode


# ------------------------------------------------------------------------------------------- data
# Rows of other tools' shapes become (prompt, response, reward) or (prompt, ranked responses).
# Rows in = rows used + rows left out, by reason, said in one line.


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


class LeftOut(Exception):
    """Why a row is left out and counted."""


def read_source(source: str) -> Iterator[tuple[str, str, dict]]:
    """(file or split, "file, line 7", row) of a file, a folder or a Hub data set: .jsonl and
    .jsonl.gz are read here, all else by `datasets`, an optional package."""
    path, others = Path(source), (".json", ".parquet", ".csv")
    if not path.exists():
        hub = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:/([\w./-]+))?", source)
        require(hub and path.suffix.lower() not in (*others, ".jsonl", ".ndjson", ".gz"),
                f"{source}: no such file, folder or Hub data set")
        yield from read_with_datasets(source, "", hub[1], data_dir=hub[2])
        return
    require(path.is_file() or path.is_dir(), f"{source}: a pipe or device; give a regular file")
    root, files = (path, visible_files(path)) if path.is_dir() else (path.parent, [path])
    skipped = []
    for file in files:
        part, ending = str(file.relative_to(root)), file.suffix.lower()
        if ending in others and not re.match("(dataset_(info|infos|dict)|state).json", file.name):
            yield from read_with_datasets(str(file), part, ending[1:], data_files=str(file))
        elif file == path or re.search(r"\.(jsonl|ndjson|jsonl?\.gz)$", file.name.lower()):
            yield from ((part, *entry) for entry in read_jsonl(file))
        else:
            skipped.append(part)
    if skipped:
        print0(f"  {source}: {len(skipped)} files not read: {', '.join(skipped[:9])}")
    require(len(skipped) < len(files), f"{source}: no file in this folder that could be read")


def read_jsonl(path: Path) -> Iterator[tuple[str, dict]]:
    """Rows of a .jsonl(.gz), each with its place.  Raises BadInput at a bad one."""
    number = 0
    try:
        with (gzip.open if path.name.lower().endswith(".gz") else open)(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                entry = json.loads(line.decode("utf-8-sig"))
                require(isinstance(entry, dict), f"{path}, line {number}: not a JSON object")
                if b"\\u" in line:
                    json.dumps(entry, ensure_ascii=False).encode()  # half a surrogate is no text
                yield f"{path}, line {number}", entry
    except (ValueError, RecursionError, EOFError, gzip.BadGzipFile, zlib.error) as problem:
        raise BadInput(f"{path}, line {number} or what follows: broken, or not JSON in UTF-8 "
                       f"({problem})") from problem


def read_with_datasets(source: str, part: str, kind: str,
                       **more: Any) -> Iterator[tuple[str, str, dict]]:
    """(part, or else the split, place, row) of what the `datasets` package reads."""
    try:
        import datasets
    except ImportError as problem:
        raise BadInput(f"{source}: needs the datasets package: pip install datasets") from problem
    if kind == "csv":
        more |= {"keep_default_na": False, "na_values": [""]}  # a reply may be "None"
    try:
        for split, entries in datasets.load_dataset(kind, **more).items():
            for number, entry in enumerate(entries, 1):
                yield part or split, f"{source}, {split} row {number}", entry
    except Exception as problem:  # of datasets, pyarrow, pandas, fsspec and the Hub's client
        why = " ".join(str(problem.__cause__ or problem).split())[:200]
        raise BadInput(f"{source}: datasets cannot read it ({why})") from problem


ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant",
         **{role: role for role in ("system", "developer", "user", "assistant", "tool")}}
UNREADABLE = ("history", "tools", "functions", "tool_calls", "image", "images", "audio", "video")
RESPONSES = ("response", "completion", "output")
THOUGHTS = ("function_call", "reasoning_content", "reasoning", "thinking")


def messages_of(value: Any) -> Optional[list[dict]]:
    """Chat messages, or one, as {"role", "content"}, from ShareGPT's names and text parts too; None
    if there is more to them than text."""
    found = []
    for m in [value] if isinstance(value, dict) else value if isinstance(value, list) else [None]:
        m = {k: v for k, v in m.items() if v is not None} if isinstance(m, dict) else {}
        role, content = m.get("role", m.get("from")), m.get("content", m.get("value"))
        if isinstance(content, list) and all(isinstance(p, dict) and p.get("type") == "text"
                                             and isinstance(p.get("text"), str) for p in content):
            content = "".join(p["text"] for p in content)
        unlearnt = m.get("weight") == 0 or m.get("train") is False
        if (not isinstance(content, str) or str(role) not in ROLES or unlearnt
                or any(map(m.get, UNREADABLE + THOUGHTS))):
            return None
        found.append({"role": ROLES[role], "content": content})
    return found or None


def number_of(value: Any, least: float = -1e100) -> Optional[float]:
    """A number below 1e100, also where it is written as text; else None."""
    try:
        number = float(str(value))  # not of True; of an integer beyond all floats infinity
    except ValueError:
        return None
    return number if least <= number < 1e100 else None


# The fields that are read: as what, None where that fails, and how it is called.
TEXT = (lambda value: value if isinstance(value, str) else None), "text"
MESSAGES = messages_of, ('a list of {"role", "content"} messages of text; tool calls, thoughts, '
                         'images and turns without weight are not read')
EITHER = (lambda v: v if isinstance(v, str) else messages_of(v)), f"text or {MESSAGES[1]}"
TRUTHS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False, "": False}
FIELDS = {
    **dict.fromkeys(("prompt", "input", "chosen", "rejected"), EITHER),
    **dict.fromkeys(RESPONSES, EITHER),
    **dict.fromkeys(("messages", "conversations"), MESSAGES),
    **dict.fromkeys(("instruction", "system"), TEXT),
    "ranked": (lambda v: v if isinstance(v, list) and len(v) > 1 and all(
        isinstance(text, str) for text in v) else None, "a list of two texts or more, best first"),
    "reward": (number_of, "a finite number"),
    "label": (lambda v: number_of(int(v) if isinstance(v, bool) else v), "a finite number"),
    "weight": (functools.partial(number_of, least=0), "a finite number not below 0"),
    "truncated": (lambda v: TRUTHS.get(str(v).lower()), "true or false"),
    "source": (str, "text")}
PROMPT_COLUMNS = {"prompt", "instruction", "input", "system", "conversations"}
PREFERENCE_COLUMNS = PROMPT_COLUMNS | {"chosen", "rejected", "ranked"}
SAMPLE_COLUMNS = FIELDS.keys() - {"chosen", "rejected", "ranked"}


def parsed_entries(source: str, columns: set[str], parse: Callable, use: str = "") -> Iterator[Any]:
    """parse(part, entry, notes) of each row: these columns, read as FIELDS says, without nulls.
    parse() raises LeftOut where an entry is no use, and KeyError where a field is missing.
    Says at the end how many rows were used, and what was not read."""
    total, left, notes, unread = 0, Counter(), Counter(), set()
    for part, where, given in read_source(source):
        total += 1
        unread |= given.keys() - columns
        entry = {}
        try:
            for name, value in given.items():
                require(name not in UNREADABLE or not value,
                        f"the field {name!r} bears on the text and cannot be read here")
                if name in columns and value is not None:
                    read, what = FIELDS[name]
                    entry[name] = read(value)
                    require(entry[name] is not None,
                            f"the field {name!r} must be {what}, found {value!r:.50}")
            if given.get("prompt", "") is None and "instruction" not in entry:
                raise LeftOut("with a null field")
            found = parse(part, entry, notes)
        except BadInput as problem:
            raise BadInput(f"{where}: {problem}") from problem
        except KeyError as missing:
            require(any(given.get(name, "") is None for name in columns),
                    f"{where}: the field {missing} is missing")
            left["with a null field"] += 1
        except LeftOut as why:
            left[str(why)] += 1
        else:
            yield found
    report = [f"{total - sum(left.values()):,} of {total:,} rows used{use}"]
    if left:
        report.append("left out: " + ", ".join(f"{count:,} {why}" for why, count in left.items()))
    report += [f"{count:,} {what}" for what, count in notes.items() if count]
    if unread and not use:
        report.append("columns not read: " + ", ".join(sorted(unread)))
    print0(f"  {source}: {'; '.join(report)}")


def name_in(entry: dict, *names: str) -> str:
    """The one of a field's names that is there, or else the first.  Raises BadInput for two."""
    found = ([name for name in names if entry.get(name, "") != ""]
             or [name for name in names if name in entry][:1] or [*names[:1]])
    require(len(found) == 1,
            f"the fields {found[0]!r} and {found[-1]!r} stand side by side; give one")
    return found[0]


def as_messages(prompt: Any) -> list[dict]:
    """Chat messages as they are, text as a user's."""
    return prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]


def repeats(conversation: list[dict], messages: list[dict]) -> bool:
    """Whether the conversation holds the text of each of the messages."""
    contents = [m["content"].strip() for m in conversation]
    return all(m["content"].strip() in contents for m in messages)


def prompt_of(entry: dict) -> tuple[Any, Optional[str]]:
    """An entry's prompt, text or messages, and the reply to it where it is a whole conversation: of
    `messages` or ShareGPT's `conversations`, else of `prompt`, OpenRLHF's `input`, or Alpaca's
    `instruction` and `input` as a user's message.  A `system` message goes before."""
    whole = next((name for name in ("messages", "conversations") if name in entry), None)
    name = whole or name_in(entry, "prompt", "instruction" if "instruction" in entry else "input")
    prompt, reply = entry[name], None
    if name == "instruction":
        prompt = "\n\n".join(filter(None, (prompt, entry.get("input"))))
    require(isinstance(prompt, list) or prompt.strip(), f"the field {name!r} is empty")
    if whole and entry.get("prompt"):  # some data sets give its first turn once more
        require(repeats(prompt, as_messages(entry["prompt"])),
                f"the fields {whole!r} and 'prompt' differ; give one")
    if name == "instruction" or entry.get("system"):
        prompt = as_messages(prompt)
    if whole and len(prompt) > 1 and prompt[-1]["role"] == "assistant":
        *prompt, last = prompt
        reply = last["content"]
        for other in (*RESPONSES, "chosen", "rejected", "ranked"):
            require(entry.get(other) in (None, reply), f"a conversation that ends with a reply and "
                    f"the field {other!r} stand side by side; give one")
    if entry.get("system"):
        system = {"role": "system", "content": entry["system"]}
        prompt = prompt if prompt[0] == system else [system, *prompt]
    return prompt, reply


def sample_of(entry: dict) -> Sample:
    """An entry as a sample without its reward, from any tool's names."""
    (prompt, reply), name = prompt_of(entry), name_in(entry, *RESPONSES)
    if reply is None and name not in entry and entry.keys() & {"messages", "conversations"}:
        raise LeftOut("conversations that do not end with the assistant")
    if reply is None:
        text = isinstance(entry[name], str)
        prompt, reply = (prompt, entry[name]) if text else side_of(entry, name)
    return Sample(prompt, reply, source=entry.get("source", "given"),
                  weight=entry.get("weight", math.nan), truncated=entry.get("truncated", False))


def labelled_sample_of(entry: dict) -> Sample:
    """An entry as a sample with its reward; KTO's `label` is 1 or 0."""
    sample, name = sample_of(entry), name_in(entry, "reward", "label")
    if "weight" in entry and name not in entry:
        return sample  # rwr.py --weights given asks for no more
    return sample._replace(reward=entry[name])


TURN = "\n\nAssistant:"  # the reply's start in a transcript as HH has it


def side_of(entry: dict, name: str) -> tuple[Any, str]:
    """One side of a preference as (prompt, response).  Raises LeftOut if it ends with the human.
    Without a `prompt` it must be a whole conversation."""
    given = prompt_of(entry)[0] if entry.keys() & {*PROMPT_COLUMNS, "messages"} else None
    side = entry[name]
    if isinstance(side, str):
        whole = side.startswith("\n\nHuman:") and TURN in side
        if given is not None and not (whole and isinstance(given, str) and TURN not in given):
            return given, side
        start, turn, response = side.rpartition(TURN)
        require(start.strip(), f"without a `prompt` the field {name!r} must be a transcript: a "
                f"prompt, {TURN!r}, and a response")
        if "\n\nHuman:" in response:
            raise LeftOut("ending with the human")
        return start + turn, response
    *before, last = side
    if last["role"] != "assistant":
        raise LeftOut("ending with the human")
    if not before and given is None:
        raise KeyError("prompt")
    if before and given is not None:  # the prompt once, which the side repeats
        given = as_messages(given)
        require(repeats(side, [m for m in given if m["role"] != "system"]),
                f"the field {name!r} is a conversation without the row's prompt in it")
        before = [m for m in given if m["role"] == "system" and m not in side] + before
    return before or given, last["content"]


def ranking_of(part: str, entry: dict, notes: Counter) -> Ranking:
    """An entry's preference."""
    if "ranked" in entry:
        name_in(entry, "ranked", "chosen", "rejected")  # one alone
        (prompt, _), texts = prompt_of(entry), entry["ranked"]
    else:
        (prompt, chosen), (other, rejected) = side_of(entry, "chosen"), side_of(entry, "rejected")
        if prompt_key(prompt) != prompt_key(other):
            raise LeftOut("differing in more than the last response")
        texts = [chosen, rejected]
    if isinstance(prompt, str) and all(text.startswith(prompt) for text in texts):
        notes["repeated their prompt in every response: read once"] += 1
        texts = [text[len(prompt):] for text in texts]
    responses = tuple(text for text in texts if text.strip())
    if len(responses) < 2:
        raise LeftOut("with an empty response")
    notes["blank responses in `ranked` left out"] += len(texts) - len(responses)
    equal = len(set(responses)) < len(responses)
    notes["with two equal responses, from which nothing is learnt"] += equal
    return Ranking(prompt, responses)


@functools.lru_cache(maxsize=2)
def read_preferences(source: str, share: float, seed: int,
                     most: Optional[int]) -> tuple[list[Ranking], list[Ranking]]:
    """Preferences for training and held out, split by prompt: the files, folders and splits whose
    name says test, valid or eval are held out; where none or all do, prompts by hash and seed."""
    found = list(parsed_entries(source, PREFERENCE_COLUMNS,
                                lambda part, *entry: (part, ranking_of(part, *entry))))
    require(found, f"{source}: no usable preference")
    named = test_parts(part for part, _ in found)
    test = [ranking for part, ranking in found if (
        part in named if named else is_held_out(ranking.prompt, share, seed))]
    hidden = {prompt_key(p.prompt) for p in test}
    train = [p for _, p in found if prompt_key(p.prompt) not in hidden]
    require(train, f"{source}: no preference is left to train on")
    require(test, f"{source}: no preference is held out; give more data or a larger --held_out")
    order = random.Random(seed)
    order.shuffle(train)
    order.shuffle(test)
    used = train[:most]
    left = {"as their prompt is held out": len(found) - len(test) - len(train),
            "by --max_pairs": len(train) - len(used)}
    print0(f"  {len(used):,} preferences to train on, {len(test):,} held out, split by prompt"
           + "".join(f"; {count:,} left out {why}" for why, count in left.items() if count))
    return used, test


def test_parts(parts: Iterable[str]) -> set[str]:
    """The files or splits that their names hold out; none where all would be."""
    found = set(parts)
    named = {part for part in found if re.search(
        r"(^|[/_.-])(test|val|valid|validation|eval|evaluation)([/_.-]|\d|$)", part)}
    return named if named < found else set()


def load_preferences(cfg: Config) -> tuple[list[Ranking], list[Ranking]]:
    """The run's preferences, for training and held out."""
    source = toy_data(cfg.out, cfg.seed) if cfg.toy else cfg.preferences
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
def read_prompts(source: str) -> tuple[list, set[str]]:
    """Distinct prompts of entries of any of the shapes above, in order, and the keys of those in
    test_parts()."""
    def parse(part: str, entry: dict, notes: Counter) -> tuple[str, Any]:
        if "chosen" not in entry:
            return part, prompt_of(entry)[0]
        side = {name: entry[name] for name in entry if name != "messages"}
        return part, side_of(side, "chosen")[0]
    found = list(parsed_entries(source, PREFERENCE_COLUMNS | {"messages"}, parse,
                                " for their prompts"))
    named = test_parts(part for part, _ in found)
    return (list({prompt_key(prompt): prompt for _, prompt in found}.values()),
            {prompt_key(prompt) for part, prompt in found if part in named})


def split_prompts(cfg: Config, held_out: bool) -> list:
    """Distinct prompts, held out or not: of --prompts, --preferences, --samples or --responses."""
    source = cfg.prompts or cfg.preferences or cfg.samples or cfg.responses
    if cfg.prompts or not (cfg.preferences or cfg.toy):
        prompts, tested = read_prompts(source)
        found = [p for p in prompts if held_out == (
            prompt_key(p) in tested if tested else is_held_out(p, cfg.held_out, cfg.seed))]
    else:
        rankings = load_preferences(cfg)[held_out]
        found = list({prompt_key(r.prompt): r.prompt for r in rankings}.values())
    require(found or held_out and not cfg.eval_prompts, f"{source}: too few prompts to hold any "
            "out; give more, a larger --held_out, --prompts to evaluate on, or --eval_prompts 0")
    return found


# ---------------------------------------------------------------------------------------- batches
# Samples are tokenised once, into flat arrays on disk; a step slices them, in an order that comes
# from the seed alone.


class Example(NamedTuple):
    """A sequence, and what a loss needs beside."""
    ids: np.ndarray      # (T,) int32
    mask: np.ndarray     # (T,) bool, the response mask
    weight: float = 1.0
    columns: tuple = ()  # PPO's: a number for each response token


class Tokens:
    """The (ids, mask) of sequences(), end to end, memory-mapped: 5 bytes a token and node."""

    def __init__(self, folder: Path, sequences: Callable[[], Iterable[tuple]]):
        if rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            ends = [0]
            with open(folder / "ids", "wb") as ids_file, open(folder / "mask", "wb") as mask_file:
                for ids, mask in sequences():
                    ids_file.write(ids.astype(np.int32))
                    mask_file.write(mask.astype(bool))
                    ends.append(ends[-1] + len(ids))
            np.save(folder / "offsets.npy", np.array(ends))
        barrier()
        self.offsets = np.load(folder / "offsets.npy")  # (n + 1,)
        if self.offsets[-1]:  # an empty file cannot be mapped
            self.ids = np.memmap(folder / "ids", dtype=np.int32, mode="r")
            self.mask = np.memmap(folder / "mask", dtype=bool, mode="r")
        self.lengths = np.diff(self.offsets)            # (n,)

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        span = slice(self.offsets[i], self.offsets[i + 1])
        return self.ids[span], self.mask[span]


class Examples:
    """What a policy trains on: some of the samples, each with a weight; tag(i, epoch) is the ids
    that go between sample i's prompt and its response."""

    def __init__(self, tokens: Tokens, indices: Optional[np.ndarray] = None,
                 weight: Optional[np.ndarray] = None,
                 tag: Callable[[int, int], list[int]] = lambda i, epoch: []):
        self.tokens, self.tag = tokens, tag
        self.indices = np.arange(len(tokens.lengths)) if indices is None else indices
        self.weight = np.ones(len(tokens.lengths)) if weight is None else weight

    def __len__(self) -> int:
        return len(self.indices)

    def example(self, i: int, epoch: int = 0) -> Example:
        """The i-th example as this epoch reads it."""
        index = int(self.indices[i])
        (ids, mask), tag = self.tokens[index], self.tag(index, epoch)
        if tag:
            at = np.flatnonzero(np.append(True, ~mask))[-1]  # where the last response begins
            ids = np.concatenate([ids[:at], tag, ids[at:]])
            mask = np.concatenate([mask[:at], [False] * len(tag), mask[at:]])
        return Example(ids, mask, float(self.weight[index]))


class MicroBatch(NamedTuple):
    """What one forward takes: packed sequences, T tokens, N of which are learnt."""
    input_ids: torch.Tensor      # (T,) int64
    lengths: list[int]           # of the sequences
    rows: torch.Tensor           # (N,) int64, the positions that predict a response token
    targets: torch.Tensor        # (N,) int64, those tokens
    weight: torch.Tensor         # (N,) float32, their sequences' weights
    columns: list[torch.Tensor]  # (N,) float32 each


class Batch:
    """An optimiser step: this rank's micro-batches, and what their losses' sum is divided by."""

    def __init__(self, examples: list[Example], cfg: Config):
        shares = group_by_token_budget([len(e.ids) for e in examples], cfg.forward_tokens, True)
        self.micros = [collate([examples[i] for i in share or [0]], bool(share))
                       for share in shares]
        self.tokens = int(sum(e.mask.sum() for e in examples))  # of responses, on all ranks
        self.normaliser = max(1, self.tokens) / world_size()    # DDP averages over ranks


def collate(examples: list[Example], learnt: bool = True) -> MicroBatch:
    """Examples as packed tensors.  Not `learnt`, N = 0: a rank that has run out of micro-batches
    still joins every forward, as the others' collectives wait for it."""
    lengths = [len(e.ids) for e in examples]
    mask = np.concatenate([np.append(e.mask[1:], False) for e in examples]) & learnt
    ids, rows = np.concatenate([e.ids for e in examples]), np.flatnonzero(mask)  # t predicts t + 1
    weight = np.repeat([e.weight for e in examples], lengths)[rows]
    columns = [np.concatenate(each)[:len(rows)] for each in zip(*(e.columns for e in examples))]
    ids, rows, weight, *columns = (
        torch.as_tensor(x).to(device(), dtype, non_blocking=True)
        for x, dtype in ((ids, torch.int64), (rows, torch.int64),
                         *((c, torch.float32) for c in (weight, *columns))))
    return MicroBatch(ids, lengths, rows, ids[rows + 1], weight, columns)


def group_by_token_budget(lengths: list[int], budget: int,
                          over_ranks: bool = False) -> list[list[int]]:
    """Indices into lengths, longest first, cut so that count * longest <= budget, one at least;
    `over_ranks` this rank's share, of as many groups as the others have, [] where it has no more.
    """
    order, first = sorted(range(len(lengths)), key=lambda i: -lengths[i]), 0
    here, ranks = (rank(), world_size()) if over_ranks else (0, 1)
    groups: list[list[int]] = []
    for i in range(0, len(order), ranks):  # one sequence for each rank
        if not groups or (i - first + ranks) * lengths[order[first]] > budget * ranks:
            groups.append([])
            first = i
        groups[-1] += order[i:i + ranks][here:here + 1]
    return groups


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


FORWARD_ONLY = 4  # times as many tokens where no activations are kept


@torch.no_grad()  # not inference mode: what FSDP gathers in it could not serve training
def each_response_token(compute: Callable[[MicroBatch], torch.Tensor], model: Any,
                        examples: list[Example], cfg: Config, cost: Cost) -> list[list[float]]:
    """What compute(micro-batch) -> (N,), which runs `model`, finds of each response token, on every
    rank; ranks share the work."""
    found, budget = {}, FORWARD_ONLY * cfg.forward_tokens
    for share in group_by_token_budget([len(e.ids) for e in examples], budget, True):
        micro = collate([examples[i] for i in share or [0]], bool(share))
        cost.add_forward(model, len(micro.input_ids), sum(n * n for n in micro.lengths),
                         len(micro.rows))
        values = iter(compute(micro).tolist())
        found |= {i: list(itertools.islice(values, int(examples[i].mask.sum()))) for i in share}
    return gather_by_index(found, len(examples))


# ------------------------------------------------------------------------------- packed attention
# A micro-batch is one line of tokens, sequence after sequence, by transformers' own contract: where
# each begins travels as `cu_seq_lens_q` to the attention function.  It builds no mask.

PACKED = "packed"     # what transformers calls attention(), below
PADDED_BELOW = 256    # hidden width: to smaller models padding costs less than a call a sequence


def attention(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
              mask: Optional[torch.Tensor], scaling: Optional[float] = None,
              sliding_window: Optional[int] = None, cu_seq_lens_q: Optional[torch.Tensor] = None,
              max_length_q: int = 0, slots: Optional[Slots] = None,
              **_: Any) -> tuple[torch.Tensor, None]:
    """Causal attention, (B, heads, T, D) -> (B, T, heads, D): within packed sequences (B = 1), of
    the sampler's new tokens to their slots (T = 1), or of whole sequences."""
    sdpa = torch.nn.functional.scaled_dot_product_attention
    heads, t = query.shape[1:3]
    group, window = heads // key.shape[1], sliding_window or 2**31
    if slots is not None:
        return slots.attend(module, query, key, value, scaling, sliding_window, cu_seq_lens_q,
                            max_length_q), None
    if cu_seq_lens_q is not None and query.is_cuda and value.dtype.itemsize == 2:
        from torch.nn.attention.varlen import varlen_attn
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
    if t > window:
        band = torch.ones(t, t, dtype=torch.bool, device=key.device).tril().triu(1 - window)
    if query.is_cuda:  # its fast float32 kernels know no grouped heads
        key, value = (x.repeat_interleave(group, 1) for x in (key, value))
    return sdpa(query, key, value, band, is_causal=band is None, scale=scaling,
                enable_gqa=True).transpose(1, 2), None


@torch.no_grad()
def enable_packing(model: Any) -> Any:
    """The model, made to read packed sequences if two of them, longer than its windows (made small
    for this), and a token sampled after each are read as each alone is."""
    from transformers import AttentionInterface
    AttentionInterface.register(PACKED, attention)
    if model.config._attn_implementation != "sdpa":
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
        model.set_attn_implementation("sdpa")
        print0(f"  a {type(model).__name__} does not read packed sequences as if each were alone: "
               "padded, and sampled by transformers' generate")
    return model


def body_of(model: Any) -> Any:
    """The model without its head; Llama 4's class calls the whole of itself its base model."""
    return model.base_model if model.base_model is not model else model.model


def hidden_states(model: Any, ids: torch.Tensor, lengths: list[int], **slots: Any) -> torch.Tensor:
    """The body's last hidden states (T, D) of packed sequences, ids (T,), which fill `slots`."""
    body = body_of(model)
    config = model.config.get_text_config()
    packed = config._attn_implementation == PACKED and config.hidden_size >= PADDED_BELOW
    if not (packed or slots):
        # padding comes after a sequence, where causal attention does not look: no mask is needed
        padded = torch.nn.utils.rnn.pad_sequence(ids.split(lengths), batch_first=True)
        hidden = body(input_ids=padded, use_cache=False).last_hidden_state  # (S, longest, D)
        return torch.cat([states[:n] for states, n in zip(hidden, lengths)])
    ends = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)                 # (S + 1,)
    position = torch.cat([torch.arange(n) for n in lengths])                        # (T,)
    ends, position = (x.to(ids.device, non_blocking=True) for x in (ends, position))
    return body(input_ids=ids[None], position_ids=position[None], cu_seq_lens_q=ends,
                cu_seq_lens_k=ends, max_length_q=max(lengths), max_length_k=max(lengths),
                use_cache=False, **slots).last_hidden_state[0]


# ----------------------------------------------------------------------------------------- models


def load_model(name: str, dtype: torch.dtype = torch.float32, where: Optional[torch.device] = None,
               kind: str = "AutoModelForCausalLM", heads: tuple = (), **more: Any) -> Any:
    """A transformers model on this rank's device, in eval mode for ever: with dropout, a gradient
    would depend on how a batch is cut.

    Raises BadInput where a weight is missing or unknown, but for those of `heads`, or not finite.
    """
    import transformers
    with load_errors(name, f"weights of {kind}"):
        model, report = getattr(transformers, kind).from_pretrained(
            name, dtype=dtype, use_safetensors=True, trust_remote_code=False,
            output_loading_info=True, ignore_mismatched_sizes=True, **more)
    wrong = [f"{key} ({how})" for how in ("missing", "unexpected", "mismatched")
             for key in sorted(map(str, report[f"{how}_keys"])) if not key.startswith(heads)
             and not re.search(r"\battn(\.attention)?\.(masked_)?bias$", key)]  # a buffer
    require(not wrong, f"{name}: weights do not fit: {', '.join(wrong[:4])}, {len(wrong)} in all")
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
    require(head is not None and getattr(head, "bias", None) is None,
            f"{name}: the fused loss needs a model with an output head, and without a bias there")
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


class Policy(torch.nn.Module):
    """A causal language model whose forward ends in the fused loss: so the hooks of DDP and FSDP
    cover body and head alike."""

    def __init__(self, model: Any, cfg: Config):
        super().__init__()
        self.model, self.dtype = model, compute_dtype(cfg)
        self.temperature = cfg.temperature or 1.0

    def forward(self, micro: MicroBatch, kernel: Callable, *columns: torch.Tensor) -> torch.Tensor:
        """The kernel's loss, summed over the response tokens: a float32 scalar.  columns (N,)."""
        with torch.autocast(device().type, self.dtype, enabled=self.dtype != torch.float32):
            hidden = hidden_states(self.model, micro.input_ids, micro.lengths)[micro.rows]  # (N, D)
            return head_loss(kernel, hidden, self.model, micro.targets, *columns)

    @torch.no_grad()
    def log_probs(self, micro: MicroBatch) -> torch.Tensor:
        """Each response token's log-prob at --temperature, as forward finds it: (N,) float32."""
        found = [micro.weight[:0]]

        def keep(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            log_p = (logits.float() / self.temperature).log_softmax(-1)             # (n, V)
            found.append(log_p.gather(1, targets[:, None]).squeeze(1))
            return found[-1]
        Policy.forward(self, micro, keep)  # a subclass's does more
        return torch.cat(found)


def load_policy(name: str, cfg: Config, frozen: bool = False, codec: Optional[Codec] = None,
                new_tokens: tuple = ()) -> torch.nn.Module:
    """A policy, wrapped for several ranks: to train, with float32 weights, or frozen, for its
    log_probs.  New tokens, never sampled, join the codec's and start as the mean embedding."""
    whole = frozen and not is_sharded(cfg)
    first = len(codec.tokenizer) if new_tokens else 0
    if new_tokens:
        codec.tokenizer.add_special_tokens({"additional_special_tokens": list(new_tokens)},
                                           replace_extra_special_tokens=False)

    def load(where: torch.device) -> Any:
        model = load_model(name, compute_dtype(cfg) if whole else torch.float32, where)
        return add_embeddings(model, first, len(codec.tokenizer)) if new_tokens else model
    policy = Policy(load_for_training(load, cfg).requires_grad_(not frozen), cfg)
    if new_tokens:
        config, never = policy.model.generation_config, codec.tokenizer.convert_tokens_to_ids(
            list(new_tokens))
        config.suppress_tokens = sorted({*(config.suppress_tokens or []), *never})
    return policy if whole else wrap_for_ranks(policy, cfg, "log_probs")


@torch.no_grad()
def add_embeddings(model: Any, first: int, end: int) -> Any:
    """The model with embeddings for the tokens from `first` to `end`: the mean of those before."""
    if end > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(end, mean_resizing=False)
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        layer.weight[first:end] = layer.weight[:first].mean(0)
    return model


def is_sharded(cfg: Config) -> bool:
    """Whether training spreads its models over ranks."""
    return cfg.sharding == "fsdp" and dist.is_initialized()


def blocks_of(module: torch.nn.Module) -> list:
    """The transformer blocks, by the class names that transformers says not to split."""
    names = {n for part in module.modules() for n in getattr(part, "_no_split_modules", None) or ()}
    return [part for part in module.modules() if type(part).__name__ in names]


def load_for_training(load: Callable, cfg: Config) -> Any:
    """load(where=), with recomputed activations or compiled blocks where asked for; chooses
    --micro_batch_tokens where it is not given.

    To be sharded, rank 0 alone loads, on its CPU; other ranks get an untouched shape.
    """
    sharded, gpu = is_sharded(cfg), device().type == "cuda"
    where = torch.device("cpu") if sharded else device()
    model = None if sharded and rank() else load(where=where)
    if sharded:
        kind, config = gather((type(model), getattr(model, "config", None)))[0]
        model = model or meta_model(kind, config).to_empty(device="cpu")
        model.tie_weights()
    if cfg.micro_batch_tokens is None and gpu:  # half of what weights, gradients, moments leave
        shape, ranks = model.config.get_text_config(), world_size() if sharded else 1
        weights = sum(p.numel() for p in model.parameters()) / ranks
        free = (torch.cuda.mem_get_info()[0] - 12 * weights) / 2
        layer = 2 * shape.hidden_size * (2 if cfg.gradient_checkpointing else 40)  # bytes a token
        tokens = min(max(free / (layer * shape.num_hidden_layers), 2**11), 2**16)
        cfg.micro_batch_tokens = min(gather(2 ** int(math.log2(tokens))))
    cfg.micro_batch_tokens = cfg.forward_tokens
    for block in blocks_of(model):
        if cfg.gradient_checkpointing:  # transformers' own needs training mode: some would drop out
            block.forward = functools.partial(torch.utils.checkpoint.checkpoint, block.forward,
                                              use_reentrant=False)
        elif cfg.compile and gpu:
            block.compile(dynamic=True)
    return model


def meta_model(kind: type, config: Any) -> Any:
    """A model of this class and shape, in eval mode, whose weights take no memory."""
    from transformers import AttentionInterface
    AttentionInterface.register(PACKED, attention)
    attn_implementation = config._attn_implementation
    with torch.device("meta"):
        model = kind(config).eval()
    model.set_attn_implementation(attn_implementation)
    return model


def wrap_for_ranks(module: torch.nn.Module, cfg: Config, *methods: str) -> torch.nn.Module:
    """The module under DDP or FSDP2 where there are several ranks; `methods` compute with its
    weights beside forward.  FSDP2 keeps weights and reduces gradients in float32, and gathers a
    block's in the compute dtype for as long as it computes."""
    if not is_sharded(cfg):
        return module if world_size() == 1 else torch.nn.parallel.DistributedDataParallel(
            module, device_ids=[device()] if device().type == "cuda" else None,
            gradient_as_bucket_view=True)
    from torch.distributed import fsdp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
    weights, dtype = module.state_dict() if rank() == 0 else {}, compute_dtype(cfg)
    mesh = dist.init_device_mesh(device().type, (world_size(),))
    for part in [*blocks_of(module), module]:
        fsdp.fully_shard(part, mesh=mesh, mp_policy=fsdp.MixedPrecisionPolicy(
            param_dtype=None if dtype == torch.float32 else dtype, reduce_dtype=torch.float32,
            cast_forward_inputs=part is not module))  # the root's hold float32 columns
    set_model_state_dict(module, weights, options=StateDictOptions(full_state_dict=True,
                                                                   broadcast_from_rank0=True))
    for buffer in module.buffers():  # those too that no state dict holds
        dist.broadcast(buffer, 0)
    for method in methods:
        fsdp.register_fsdp_forward_method(module, method)
    return module


@torch.no_grad()
def whole_copy(model: Any, dtype: torch.dtype, where: torch.device) -> Any:
    """A copy in `dtype`, a sharded model's whole; all ranks call it together, those that need none
    with the meta device."""
    weights = {name: (p.full_tensor() if hasattr(p, "full_tensor") else p).to(where, dtype)
               for name, p in model.named_parameters()}
    copy = meta_model(type(model), model.config)
    copy.load_state_dict(weights, strict=False, assign=True)  # a tied head has no entry of its own
    copy.tie_weights()
    for part, old in zip(copy.modules(), model.modules()):
        for name, buffer in old.named_buffers(recurse=False):
            setattr(part, name, buffer.to(where))
    copy.generation_config = model.generation_config
    return copy


def sampling_copy(model: Any, cfg: Config) -> Any:
    """What to sample from while a model trains: itself, or a whole copy in the compute dtype."""
    dtype = compute_dtype(cfg)
    if dtype == torch.float32 and not is_sharded(cfg):
        return model
    return whole_copy(model, dtype, device())


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
        model = whole_copy(model, compute_dtype(cfg), torch.device("meta" if rank() else "cpu"))
    if rank() == 0:
        if generation := getattr(model, "generation_config", None):
            generation.eos_token_id = codec.stop_ids  # all that end a response
            if generation.temperature not in (None, 1.0):
                generation.do_sample = True  # transformers refuses a temperature without
        model.to(compute_dtype(cfg)).save_pretrained(folder)
        codec.tokenizer.save_pretrained(folder)
        (folder / "README.md").write_text(card, encoding="utf-8")
    barrier()


def save_policy(folder: Path, policy: torch.nn.Module, codec: Codec, cfg: Config, tag: str = "",
                more: str = "") -> None:
    """Writes the policy's folder; `more` goes at the end of its model card."""
    import transformers
    flags = ", ".join(f"{f.name} {getattr(cfg, f.name)}" for f in fields(cfg)
                      if f.metadata["help"].stage == "training")
    if tag:
        after, n = codec.before + tag, len(codec.before_ids)  # a word marker would come before it
        tag = f" + tokenizer({after!r}, add_special_tokens=False).input_ids[{n}:]"
    base, algorithm = cfg.model or "the toy world's", folder.name.strip(".").removesuffix(".new")
    data = cfg.samples or cfg.responses or cfg.preferences or cfg.prompts or "the toy world's"
    save_folder(folder, getattr(policy, "module", policy).model, codec, cfg, f"""---
base_model: {base}
tags: [offline-rlhf, {algorithm}]
---
Trained from `{base}` on `{data}` by {algorithm}: {flags}. Torch {torch.__version__}, transformers
{transformers.__version__}. After *Aligning Language Models with Offline Reinforcement Learning from
Human Feedback*, arXiv 2308.12050.

```python
ids = tokenizer(prompt).input_ids{tag}
# of chat: tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
print(tokenizer.decode(model.generate(torch.tensor([ids]), do_sample=True, max_new_tokens=128)[0]))
```
{more}""")


# -------------------------------------------------------------------------------- fused head loss
# Loss and gradient a chunk of rows at a time, so that of the (N, V) logits no more exists: one GEMM
# into a buffer, the script's kernel turns logits into d loss / d logits in place, two GEMMs bring
# the gradients of hidden states and head.

CHUNK_BYTES = {"cpu": 2**28, "cuda": 2**31}  # of logits, held at once
EAGER_BELOW = 4096  # vocabulary: on a CPU, compiling for a smaller one costs more than it brings


def head_loss(kernel: Callable, hidden: torch.Tensor, model: Any,
              *columns: torch.Tensor) -> torch.Tensor:
    """Sum over rows of the kernel's loss, differentiable in hidden (N, D) and the model's head:
    a scalar, float32 (float64 for float64); N = 0 gives a zero with gradients.

    kernel(logits (n, V), *columns (n,)) must leave d loss / d logits in logits and return each
    row's loss (n,).
    """
    assert getattr(model.get_output_embeddings(), "bias", None) is None, "logits without a bias"
    weight, kind = model.get_output_embeddings().weight, hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    scale, cap = head_transform(model)

    def capped(logits: torch.Tensor, *columns: torch.Tensor) -> torch.Tensor:
        logits.div_(cap).tanh_().mul_(cap)
        slope = 1 - (logits / cap).square()  # d capped / d logits
        loss = kernel(logits, *columns)
        logits.mul_(slope)
        return loss
    if not torch.is_grad_enabled():
        weight = weight.detach()  # else its gradient is found all the same
    apply = torch.compiler.disable(HeadLoss.apply)  # a compiled caller breaks its graph here
    return apply((hidden * scale).to(dtype), weight, capped if cap else kernel,
                 *columns)


def head_transform(model: Any) -> tuple[float, Optional[float]]:
    """(scale, cap) of logits = cap tanh(scale hidden @ head / cap), or without a cap."""
    config = model.config.get_text_config()
    up, down, more = (getattr(config, name, None) or 1.0 for name in  # Cohere, Granite, Falcon-H1
                      ("logit_scale", "logits_scaling", "lm_head_multiplier"))
    return up * more / down, getattr(config, "final_logit_softcapping", None)  # Gemma


class HeadLoss(torch.autograd.Function):
    """head_loss: forward finds the gradients, backward scales them."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, kernel: Callable,
                *columns: torch.Tensor) -> torch.Tensor:
        acc_dtype, head = torch.promote_types(hidden.dtype, torch.float32), weight.to(hidden.dtype)
        outer = {"out_dtype": acc_dtype} if hidden.dtype != acc_dtype and hidden.is_cuda else {}
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if want_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=acc_dtype) if want_weight else None
        loss = torch.zeros((), dtype=acc_dtype, device=hidden.device)
        for part, logits in logit_chunks(hidden, head):
            loss += kernel(logits, *(c[part] for c in columns)).sum()
            if want_hidden:  # the kernel has left d loss / d logits
                torch.mm(logits, head, out=grad_hidden[part])
            if want_weight and logits.dtype == acc_dtype:
                grad_weight.addmm_(logits.t(), hidden[part])
            elif want_weight:  # chunks are summed in float32
                grad_weight += torch.mm(logits.t(), hidden[part], **outer)
        ctx.save_for_backward(grad_hidden, grad_weight.to(weight.dtype) if want_weight else None)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple:
        # in place: a second backward is then an error, and none holds two such gradients
        grads = [g if g is None else g.mul_(upstream.to(g.dtype)) for g in ctx.saved_tensors]
        return *grads, *[None] * (len(ctx.needs_input_grad) - len(grads))


def logit_chunks(hidden: torch.Tensor,
                 weight: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """(rows, their logits (n, V)): of hidden (N, D) as many at a time as CHUNK_BYTES hold."""
    stride = math.ceil(len(weight) / 64) * 64  # a GEMM is slower into rows that start elsewhere
    most = max(1, CHUNK_BYTES[hidden.device.type] // (stride * hidden.element_size()))
    chunks = max(1, math.ceil(len(hidden) / most))
    rows = max(1, math.ceil(len(hidden) / chunks))  # chunks of about one size
    buffer = hidden.new_empty(rows, stride)
    for start in range(0, len(hidden), rows):
        part = slice(start, start + rows)
        logits = buffer[:len(hidden[part]), :len(weight)]
        yield part, torch.mm(hidden[part], weight.t(), out=logits)


def compiled(kernel: Callable) -> Callable:
    """torch.compile(kernel), at its first call: the number of rows is dynamic, the vocabulary not,
    which would take a GPU twice as long.

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


# ---------------------------------------------------------------------------------------- sampler
# A fixed number of slots, each a lane of a preallocated cache, or two to guide by.  A response that
# has ended gives its slot to the next prompt; prompts are read packed.  Nothing is padded, no cache
# copied; on a GPU the decode step is compiled block by block and replayed as a CUDA graph.


class Response(NamedTuple):
    """A sampled response: ids, with the stop token that ended it, log-probs, whether it was cut."""
    ids: list[int]
    log_probs: list[float]
    truncated: bool


class Slots:
    """The sampler's cache: R lanes of S positions in each layer, which attention() fills, reads."""
    flash = True  # until its kernel has failed

    def __init__(self, lanes: int, length: int):
        self.lanes, self.length = lanes, length
        self.kept: dict[Any, list[torch.Tensor]] = {}  # layer -> keys, values (R, S, heads, D)
        if device().type == "cuda":  # knows layers apart: compiled, it would be so for each
            self.attend = torch.compiler.disable(self.attend)

    def read(self, model: Any, prompts: dict[tuple, list[int]]) -> torch.Tensor:
        """Reads prompts, each into all the lanes named: their last hidden states (T, D), packed."""
        lengths = list(map(len, prompts))
        spans = [(lane, end - n, n) for n, end, lanes in
                 zip(lengths, itertools.accumulate(lengths), prompts.values()) for lane in lanes]
        lane, start, size = torch.tensor(spans).T
        position = torch.cat([torch.arange(n) for _, _, n in spans])
        self.new = [x.to(device()) for x in (lane.repeat_interleave(size), position,
                                             start.repeat_interleave(size) + position)]
        ids = torch.tensor(list(itertools.chain(*prompts)), device=device())
        return hidden_states(model, ids, lengths, slots=self)

    def decode(self, model: Any, tokens: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """Last hidden states (R, D) of a token (R,) for each lane, at its position (R,)."""
        self.new = torch.arange(self.lanes, device=device()), position, slice(None)
        self.used = (position + 1).int()
        self.ends = torch.arange(self.lanes + 1, dtype=torch.int32, device=device())
        self.lane_starts = self.ends * self.length
        seen = self.length if device().type == "cuda" else int(self.used.max())
        self.age = position[:, None] - torch.arange(seen, device=device())              # (R, seen)
        return body_of(model)(input_ids=tokens[:, None], position_ids=position[:, None],
                              use_cache=False, slots=self).last_hidden_state[:, -1]

    def attend(self, layer: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
               scale: Optional[float], window: Optional[int], *packed: Any) -> torch.Tensor:
        """attention() whose keys and values (B, heads, T, D) are kept: of packed prompts to
        themselves, or (R, heads, 1, D) -> (R, 1, heads, D) of each lane's new token to its lane."""
        if layer not in self.kept:
            self.kept[layer] = [x.new_zeros(self.lanes, self.length, x.shape[1], x.shape[3])
                                for x in (key, value)]
        lanes, positions, source = self.new
        for kept, new in zip(self.kept[layer], (key, value)):
            kept[lanes, positions] = new.transpose(1, 2).flatten(0, 1)[source]    # (., heads, D)
        if packed[0] is not None:
            return attention(layer, query, key, value, None, scale, window, *packed)[0]
        keys, values = self.kept[layer]                                         # (R, S, heads, D)
        window = window if window and window < self.length else None
        if query.is_cuda and values.dtype.itemsize == 2 and Slots.flash:
            try:  # a kernel that reads no further than a lane is filled
                return torch.ops.aten._flash_attention_forward(
                    query[:, :, 0], keys.flatten(0, 1), values.flatten(0, 1), self.ends,
                    self.lane_starts, 1, self.length, 0.0, False, False, scale=scale,
                    window_size_left=window and window - 1, window_size_right=window and 0,
                    seqused_k=self.used)[0][:, None]
            except Exception as problem:
                print0(f"  the sampler's attention goes without flash attention ({problem})")
                Slots.flash = False
        seen = (self.age >= 0) & (self.age < (window or self.length))
        keys, values = (x[:, :seen.shape[1]].transpose(1, 2) for x in (keys, values))
        # query heads that share a key are so many positions of one head: no key is copied
        out = torch.nn.functional.scaled_dot_product_attention(
            query.reshape(self.lanes, keys.shape[1], -1, query.shape[3]), keys, values,
            seen[:, None, None], scale=scale)
        return out.reshape(self.lanes, 1, query.shape[1], -1)

    def keep(self, lanes: torch.Tensor) -> None:
        """Forgets all lanes but these."""
        self.lanes = len(lanes)
        for pair in self.kept.values():
            pair[:] = [x[lanes] for x in pair]


@torch.inference_mode()
def sample(model: Any, prompts: list[list[int]], cfg: Config, seed: int, stop: list[int],
           cost: Cost, unconditional: Optional[list[list[int]]] = None, guidance: float = 0.0,
           seeds: Optional[list[int]] = None, what: str = "sampling") -> list[Response]:
    """A response to each prompt's ids, in the prompts' order on every rank; ranks share the work.

    A response's randomness comes from the seed and its own of `seeds` (its index), not from its
    slot or rank.  Log-probs are those of the distribution at cfg.temperature, before top-p.  With
    `guidance` g tokens are drawn from softmax((1 + g) log p(.|prompt) - g log p(.|unconditional))
    (Sanchez et al. 2023, arXiv 2306.17806).  The cost is what the responses need, without what idle
    slots compute.
    """
    most = cfg.max_response_tokens
    share = sorted(range(rank(), len(prompts), world_size()), key=lambda i: (len(prompts[i]), i))
    paths = [[prompts[i], *([unconditional[i]] if guidance else [])] for i in share]
    uniform = torch.zeros(len(share) + 1, most, dtype=torch.float64)  # the last is an idle slot's
    for draws, i in zip(uniform, share):
        key = [seed, i if seeds is None else seeds[i]]
        draws[:] = torch.from_numpy(np.random.Generator(np.random.Philox(key=key)).random(most))
    found = {}
    with progress(None, what, total=len(share), unit="response") as bar:
        packed = model.config.get_text_config()._attn_implementation == PACKED
        tokens, log_probs = (x.cpu() for x in (fill_slots if packed else generate)(
            model, paths, uniform.to(device()), cfg, stop, guidance, bar, cost))
    ends = torch.isin(tokens, torch.tensor(stop))
    lengths = torch.where(ends.any(1), ends.int().argmax(1) + 1, most).tolist()
    for i, path, ids, log_p, m in zip(share, paths, tokens, log_probs, lengths):
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
    gpu, count, choice = device().type == "cuda", cfg.slots or 64, choose
    least = 2 if gpu else 1  # one lane would be compiled anew
    longest = most + max((len(p) for path in paths for p in path), default=0)
    if gpu and not cfg.slots:
        two = Slots(1, 2)
        two.read(model, {(0, 0): [0]})
        lane_bytes = longest / 2 * sum(x.nbytes for pair in two.kept.values() for x in pair)
        free = torch.cuda.mem_get_info()[0]
        count = min(512, max(1, int(0.6 * free / (ways * lane_bytes))))
    if gpu and cfg.compile:
        torch._dynamo.config.suppress_errors = True  # what cannot be compiled is run as it is
        torch._dynamo.config.recompile_limit = 64    # of one piece of code, for all models
        choice = torch.compile(choose)
        for block in blocks_of(model):
            if block._compiled_call_impl is None:
                block.compile(dynamic=True)
    path = torch.full((min(count, max(least, n)),), n, device=device())                 # (R,)
    slots = Slots(ways * len(path), longest)
    prompt_length, last = (torch.tensor([[f(p) for p in path] for path in [*paths, [[0]] * ways]],
                                        device=device()) for f in (len, lambda p: p[-1]))
    tokens, log_probs = torch.zeros_like(uniform, dtype=torch.int64), torch.zeros_like(uniform)
    length, stops = torch.zeros_like(tokens[:, 0]), torch.tensor(stop, device=device())
    never = torch.tensor(model.generation_config.suppress_tokens or [], dtype=torch.int64,
                         device=device())

    def step() -> None:
        """Every slot's next token."""
        t = length[path]                                                                # (R,)
        position = prompt_length[path] + t[:, None] - 1  # at first a prompt's last token again
        hidden = slots.decode(model, last[path].flatten(), position.flatten())
        token, log_p = choice(logits_of(model, hidden), uniform[path, t], never, cfg.temperature,
                              cfg.top_p, guidance)
        tokens[path, t], log_probs[path, t], last[path] = token, log_p.double(), token[:, None]
        length[path] = t + 1
        length[n:].zero_()
        path.masked_fill_(torch.isin(token, stops) | (t + 1 == most), n)

    begun, run = 0, None
    while True:
        free = (path == n).nonzero()[:, 0].tolist()
        bar.update(begun - len(path) + len(free) - bar.n)
        if begun < n and 8 * len(free) >= len(path):
            taken = dict(zip(free, range(begun, n)))
            begun += len(taken)
            path[list(taken)] = torch.tensor(list(taken.values()), device=device())
            wanted: dict[tuple, list[int]] = {}     # each prompt once, and the lanes that want it
            for slot, i in taken.items():
                for way, prompt in enumerate(paths[i]):
                    wanted.setdefault(tuple(prompt), []).append(slot * ways + way)
            prompts, lengths = list(wanted), list(map(len, wanted))
            cost.add_forward(model, sum(lengths), sum(m * m for m in lengths), len(lengths))
            for part in group_by_token_budget(lengths, FORWARD_ONLY * cfg.forward_tokens):
                slots.read(model, {prompts[j]: wanted[prompts[j]] for j in part})
        elif begun == n and len(free) == len(path):
            return tokens, log_probs
        elif begun == n and 2 * len(free) >= len(path) > (64 if gpu else 1):  # half will do
            half = path.argsort()[:len(path) - len(path) // 2, None]  # the idle are last
            slots.keep((half * ways + torch.arange(ways, device=device())).flatten())
            path, run = path[half[:, 0]], None
        run = run or (captured(step) if gpu else step)
        for _ in range(8 if gpu else 1):  # a look which have ended waits for the GPU
            run()


def generate(model: Any, paths: list, uniform: torch.Tensor, cfg: Config, stop: list[int],
             guidance: float, bar: Any, cost: Cost) -> tuple[torch.Tensor, torch.Tensor]:
    """fill_slots() for models that keep more than keys and values, or do not read packed sequences:
    by transformers' generate, to which our own choice of token is handed."""
    from transformers import GenerationConfig, LogitsProcessorList
    ways, own = 1 + bool(guidance), model.generation_config
    tokens, log_probs = torch.zeros_like(uniform, dtype=torch.int64), torch.zeros_like(uniform)
    never = torch.tensor(own.suppress_tokens or [], dtype=torch.int64, device=device())
    settings = GenerationConfig(do_sample=False, max_new_tokens=uniform.shape[1], eos_token_id=stop,
                                pad_token_id=stop[0])
    for batch in torch.arange(len(paths)).split(cfg.slots or 64):
        prompts = [prompt for i in batch.tolist() for prompt in paths[i]]            # (R * ways)
        lengths = [len(prompt) for prompt in prompts]
        cost.add_forward(model, sum(lengths), sum(m * m for m in lengths), len(lengths))
        width, least = max(lengths), lengths.index(min(lengths))
        padded = torch.tensor([stop[:1] * (width - len(p)) + p for p in prompts], device=device())
        mask = torch.tensor([[0] * (width - m) + [1] * m for m in lengths], device=device())

        if lengths[least] < width:
            shortest = torch.tensor([prompts[least]], device=device())
            alone = model(shortest, use_cache=False).logits[0, -1]

        def ours(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            t = ids.shape[1] - width  # noqa: B023
            if t == 0 and lengths[least] < width:  # noqa: B023  was it read as it is alone?
                require((scores[least] - alone).std() < 0.2 * alone.std(),  # noqa: B023
                        f"a {type(model).__name__} reads padded prompts wrongly; give --slots 1, "
                        "and --guidance 0")
            token, log_p = choose(scores, uniform[batch, t], never, cfg.temperature,  # noqa: B023
                                  cfg.top_p, guidance)
            tokens[batch, t], log_probs[batch, t] = token, log_p.double()  # noqa: B023
            chosen = token.repeat_interleave(ways)[:, None]
            return torch.full_like(scores, -math.inf).scatter_(1, chosen, 0.0)
        try:
            model.generation_config = GenerationConfig()  # its penalties are not asked for here
            model.generate(padded, attention_mask=mask, generation_config=settings,
                           logits_processor=LogitsProcessorList([ours]))
        finally:
            model.generation_config = own
        bar.update(len(batch))
    return tokens, log_probs


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


def choose(logits: torch.Tensor, uniform: torch.Tensor, never: torch.Tensor, temperature: float,
           top_p: float = 1.0, guidance: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (R,) and their log-probs (R,) from logits (R, V), or of guided pairs (2 R, V); `never`
    are tokens that are not drawn."""
    if guidance:
        conditional, unconditional = logits.float().log_softmax(-1).unflatten(0, (-1, 2)).unbind(1)
        logits = (1 + guidance) * conditional - guidance * unconditional
    log_p = (logits.float() / (temperature or 1.0)).log_softmax(-1)                     # (R, V)
    allowed = log_p.index_fill(-1, never, -math.inf)
    token = allowed.argmax(-1) if temperature == 0 else draw(allowed, uniform, top_p)
    return token, log_p.gather(-1, token[:, None]).squeeze(-1)


def draw(log_p: torch.Tensor, uniform: torch.Tensor, top_p: float = 1.0) -> torch.Tensor:
    """A token each from log-probs (R, V), by inverting the cumulative distribution at uniform
    (R,): int64 (R,)."""
    p, order = log_p.exp(), None
    if top_p < 1:
        p, order = p.sort(-1, descending=True)
        p = torch.where(p.cumsum(-1) - p < top_p, p, 0.0)  # the token that crosses top_p is kept
    # In two steps, block and token in it: a running sum over a whole vocabulary is slow and inexact
    blocks = torch.nn.functional.pad(p, (0, -p.shape[1] % 256)).unflatten(1, (-1, 256))
    total = blocks.sum(-1).double().cumsum(-1)                                      # (R, V / 256)
    at = (uniform.double() * total[:, -1])[:, None]                                     # (R, 1)
    block = torch.searchsorted(total, at, right=True).clamp(max=total.shape[1] - 1)
    before = torch.where(block > 0, total.gather(1, (block - 1).clamp(min=0)), 0.0)
    inside = blocks[torch.arange(len(p), device=p.device), block.squeeze(1)].double().cumsum(-1)
    offset = torch.searchsorted(inside, at - before, right=True)
    last = (inside < inside[:, -1:]).sum(-1, keepdim=True)  # never behind the last p > 0
    index = block * 256 + torch.minimum(offset, last)
    return (index if order is None else order.gather(-1, index)).squeeze(-1)


# ------------------------------------------------------------------------------- labelled samples
# samples.jsonl is the contract between labelling and training: anything may write it, every offline
# trainer reads it.

LABELLED_TOGETHER = 1024  # samples that a kill may cost


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

    def z(self, reward: Any) -> np.ndarray:
        """Raw scores, standardised by the samples' mean and standard deviation, float64."""
        require(self.rewards.std() > 0, "the samples have weights, and no rewards to tell them "
                "apart: only rwr.py --weights given trains on them")
        return (np.asarray(reward, np.float64) - self.rewards.mean()) / self.rewards.std()


def labelled_samples(cfg: Config, base: Stage, rm: Optional[Stage]) -> Samples:
    """The labelled samples: --samples, or the run's samples.jsonl, made if missing."""
    codec, path = Codec(base.folder, cfg), Path(cfg.samples or Path(cfg.out, "samples.jsonl"))
    held_out = {prompt_hash(p) for p in split_prompts(cfg, held_out=True)}
    if (cfg.samples or cfg.responses) and (cfg.sources != Config.sources
                                           or cfg.samples_per_prompt > 1):
        print0("  --samples and --responses are taken as they are: --sources and "
               "--samples_per_prompt have no effect")
    costs = {} if cfg.samples else label(cfg, base, rm, codec, path, held_out)
    known = read_record(path.with_suffix(".json")).get("settings")
    labelled_by = known.get("scorer") if isinstance(known, dict) else None
    if rm and labelled_by != rm.fingerprint:
        print0(f"warning: {path} was labelled by reward model {labelled_by or '?'}; "
               f"this run scores with {rm.fingerprint}, in that file's units")
    return read_samples(str(path), held_out, codec, Path(cfg.out) / ".tokens", costs=costs,
                        labelled_by=labelled_by, fingerprint=content_hash(str(path)))


def label(cfg: Config, base: Stage, rm: Stage, codec: Codec, path: Path,
          held_out: set[int]) -> dict[str, Cost]:
    """Writes the samples file and its record, unless they are there; returns what they cost.

    Each part of them is a file of its own at first: a run that was killed goes on after them.
    """
    wanted = settings(cfg, "data", "samples", base=base.fingerprint, scorer=rm.fingerprint)
    record, work = path.with_suffix(".json"), path.with_name(f".samples.{fingerprint(wanted)}")
    if rank() == 0 and not path.exists():
        record.unlink(missing_ok=True)
    barrier()
    if not is_fresh("samples", record, wanted):
        given, prompts = to_label(cfg, held_out)
        model, score, count = None, rm.load_scorer(), len(given) + len(prompts)
        before = gather(read_record(max(work.glob("[0-9]*"), default=work / "none")))[0]
        costs = before.get("costs", {"generation": {}, "labelling": {}})
        if before:
            print0(f"  {before['end']:,} of {count:,} are there from a run that was broken off")
        for start in progress(range(before.get("end", 0), count, LABELLED_TOGETHER), "samples"):
            end = min(start + LABELLED_TOGETHER, count)
            part, first = given[start:end], max(0, start - len(given))
            requested = prompts[first:max(0, end - len(given))]  # those given come first
            with track_cost() as generation:
                if requested:
                    model = model or load_model(base.folder, compute_dtype(cfg))
                    replies = sample(model, codec.prompts(requested), cfg, cfg.seed, codec.stop_ids,
                                     generation, seeds=range(first, count), what="generating")
                    part += [Sample(prompt, codec.decode(r), math.nan, "generated", r.truncated)
                             for prompt, r in zip(requested, replies)]
            with track_cost() as labelling:
                rewards = score([s.prompt for s in part], [s.response for s in part],
                                [s.truncated for s in part], labelling)
            costs = {name: asdict(Cost(**costs[name]) + spent) for name, spent in
                     (("generation", generation), ("labelling", labelling))}
            entries = [{"prompt": s.prompt, "response": s.response, "source": s.source,
                        "truncated": s.truncated, "reward": r} for s, r in zip(part, rewards)]
            write_record(work / f"{end:012}", wanted, generation + labelling, end=end,
                         entries=entries, costs=costs)
        if rank() == 0:
            record.unlink(missing_ok=True)  # that of the file which is replaced now
            parts = map(read_record, sorted(work.glob("[0-9]*")))
            write_beside(path, (json.dumps(entry, ensure_ascii=False)
                                for part in parts for entry in part["entries"]))
        codec.say_cuts()
        total = Cost(**costs["generation"]) + Cost(**costs["labelling"])
        write_record(record, wanted, total, costs=costs)
    for old in path.parent.glob(".samples.*") if rank() == 0 else ():
        shutil.rmtree(old, ignore_errors=True)
    costs = {name: Cost(**cost) for name, cost in read_record(record).get("costs", {}).items()}
    return {"reward_model": rm.cost, **costs}


def to_label(cfg: Config, held_out: set[int]) -> tuple[list[Sample], list]:
    """Responses to label, --responses or the data's, and prompts that the base policy is to answer,
    as --sources says."""
    given, prompts = [], []
    if cfg.responses:
        parse = functools.partial(unseen, sample_of, held_out)
        columns = SAMPLE_COLUMNS - {"reward", "label", "weight"}
        given = list(parsed_entries(cfg.responses, columns, parse))
    elif "dataset" in cfg.sources and (cfg.preferences or cfg.toy):
        rankings = [r for r in load_preferences(cfg)[0] if prompt_hash(r.prompt) not in held_out]
        given = [Sample(r.prompt, r.responses[0], source="chosen") for r in rankings]
        given += [Sample(r.prompt, text, source="rejected")
                  for r in rankings for text in r.responses[1:]]
    if "generated" in cfg.sources and not cfg.responses:
        prompts = [p for p in split_prompts(cfg, held_out=False)
                   for _ in range(cfg.samples_per_prompt)]
    require(given or prompts, f"{cfg.responses or '--sources'}: nothing is left to label")
    return given, prompts


def unseen(parse: Callable, held_out: set[int], part: str, entry: dict, notes: Counter) -> Sample:
    """parse(entry) for parsed_entries, but for those with held-out prompts."""
    found = parse(entry)
    if prompt_hash(found.prompt) in held_out:
        raise LeftOut("with held-out prompts")
    notes["with an empty response, which teaches to end at once"] += not found.response.strip()
    return found


def read_samples(path: str, held_out: set[int], codec: Codec, folder: Path,
                 **known: Any) -> Samples:
    """Reads a samples file, but for held-out prompts, and tokenises it into the folder.

    Raises BadInput where the rewards are all alike, or one so far out that the others look alike.
    """
    labels, sources = [], Counter()

    def sequences() -> Iterator[tuple]:
        parse = functools.partial(unseen, labelled_sample_of, held_out)
        entries = iter(progress(parsed_entries(path, SAMPLE_COLUMNS, parse), "reading samples"))
        while chunk := list(itertools.islice(entries, 4096)):
            labels.extend((s.reward, s.weight, prompt_hash(s.prompt)) for s in chunk)
            sources.update(s.source for s in chunk)
            yield from codec.sequences(chunk)
    tokens = Tokens(folder, sequences)  # rank 0 reads
    codec.say_cuts()
    if rank() == 0:
        np.save(folder / "labels.npy", np.array(labels, dtype="f8, f8, u8"))
    barrier()
    rewards, weights, prompts = map(np.load(folder / "labels.npy").__getitem__, ("f0", "f1", "f2"))
    require(len(rewards), f"{path}: no sample in it to train on")
    by_weight = getattr(codec.cfg, "weights", "") == "given" or np.isnan(rewards).any()
    if not by_weight or np.isnan(weights).any():  # else the rewards may be alike, or none
        check_rewards(path, rewards)
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in sources.items())
    print0(f"  {len(rewards):,} samples ({kinds}), reward {rewards.mean():.3f} ± "
           f"{rewards.std():.3f}")
    return Samples(tokens, rewards, weights, prompts, **known)


def check_rewards(path: str, rewards: np.ndarray) -> None:
    """Raises BadInput where standardised rewards would tell nothing."""
    missing = int(np.isnan(rewards).sum())
    require(not missing, f"{path}: {missing:,} of {len(rewards):,} samples have no reward, and not "
            "all have a weight")
    low = np.quantile(rewards, 0.05, method="higher")
    high = np.quantile(rewards, 0.95, method="lower")
    require(rewards.min() < rewards.max() and rewards.std() > 0,
            f"{path}: all {len(rewards)} rewards are {rewards[0]}: there is nothing to learn from")
    require(not 0 < high - low < 0.01 * rewards.std(), f"{path}: nine tenths of the rewards lie "
            f"between {low:.4g} and {high:.4g}, one far from them: leave out such sentinels")


# ------------------------------------------------------------------------------------- evaluation


class Variant(NamedTuple):
    """A way to ask a policy: its name, the reward tag, guidance, and the target reward."""
    name: str
    tag: str = ""
    tag_ids: list[int] = []
    guidance: float = 0.0
    target: Optional[float] = None


def evaluate(cfg: Config, policy: Stage, variants: list[Variant], base: Stage, rm: Optional[Stage],
             samples: Samples, judge: Optional[Callable] = None) -> None:
    """Adds base policy and variants of the policy to the leaderboard, where they are not in it yet,
    and prints it.  samples.costs is what the algorithm needed beside its training."""
    if not cfg.eval_prompts:
        print0("evaluation: none, as --eval_prompts is 0")
        return
    held_out = split_prompts(cfg, held_out=True)
    prompts = [held_out[i % len(held_out)] for i in range(cfg.eval_prompts)]
    comparable = settings(cfg, "data", "samples", "evaluation")
    for other in ("seed", "max_pairs", "sources", "samples_per_prompt", "samples"):
        del comparable[other]
    board, name = Path(cfg.out) / "leaderboard.jsonl", Path(policy.folder).name
    entries = [entry for _, entry in read_jsonl(board)] if board.exists() else []
    load = functools.cache(functools.partial(load_model, dtype=compute_dtype(cfg)))
    score, verdict = (load_scorer and functools.cache(load_scorer)
                      for load_scorer in (rm and rm.load_scorer, judge))
    built, replies = {"base": base.cost} if base.cost.seconds else {}, {}
    needed = {**built, **samples.costs, "training": policy.cost}
    for algorithm, stage, variant, costs in [
            ("base", base, Variant(""), built), *((name, policy, v, needed) for v in variants)]:
        file = replies_file(Path(cfg.out), algorithm, variant.name, cfg.seed)
        key = {"algorithm": algorithm, "variant": variant.name, "seed": cfg.seed}
        origin = {"setting": fingerprint(comparable), "policy": stage.fingerprint,
                  "samples": samples.fingerprint, "scorer": rm.fingerprint if rm else "",
                  "replies": content_hash(str(file))}
        if any({**entry, **key, **origin} == entry for entry in entries):
            replies[file.stem] = [r for _, r in read_jsonl(file)]
            continue
        with track_cost() as spent:
            found = answer(cfg, load, stage, prompts, variant, base, samples, score, verdict, spent)
        replies[file.stem] = found
        if rank() == 0:
            write_beside(file, (json.dumps(r, ensure_ascii=False) for r in found))
        barrier()
        train = costs.get("training", Cost())
        total = sum((cost for stage, cost in costs.items() if stage != "base"), Cost())
        entries = [entry for entry in entries if {**entry, **key} != entry] + [{
            **key, **origin, "replies": content_hash(str(file)), "target": variant.target,
            **means(found, next(iter(replies.values()))), "judge": cfg.judge,
            "world_size": world_size(), "checkpoint": stage.folder,
            **{f"train_{unit}": value for unit, value in asdict(train).items()},
            **{f"total_{unit}": value for unit, value in asdict(total).items()},
            "peak_memory_bytes": train.peak_memory_bytes,
            "costs": {s: asdict(c) for s, c in {**costs, "evaluation": spent}.items()}}]
        if rank() == 0:
            write_beside(board, map(json.dumps, entries))
        barrier()
    first = prompts[0] if isinstance(prompts[0], str) else prompts[0][-1]["content"]
    print0("\n" + first.strip()[-600:])
    for stem, found in replies.items():
        print0(f"  {stem.replace('_', ' ')}: {found[0]['response'].strip()[:400]}")
    print_leaderboard([entry for entry in entries
                       if entry.get("setting") == fingerprint(comparable)], Path(cfg.out))
    unguided = [v for v in variants if v.target is not None and not v.guidance and rm
                and rm.fingerprint == samples.labelled_by]  # else z has another unit
    report_slope(unguided, [replies[replies_file(Path(cfg.out), name, v.name, cfg.seed).stem]
                            for v in unguided], Path(cfg.out))


def replies_file(run: Path, algorithm: str, variant: str, seed: int) -> Path:
    """Where a policy's evaluated responses are kept."""
    name = re.sub(r"[^\w.+-]+", "_", f"{algorithm} {variant} seed {seed}")
    return run / "evaluation" / f"{name}.jsonl"


def answer(cfg: Config, load: Callable, policy: Stage, prompts: list, variant: Variant, base: Stage,
           samples: Samples, score: Optional[Callable], judge: Optional[Callable],
           cost: Cost) -> list[dict]:
    """One response a prompt, with its reward z, true reward (the toy world's, or the judge's) and
    KL to base, the difference of the response's log-probs."""
    codec = Codec(base.folder, cfg)  # a policy's chat template may differ
    plain = codec.prompts(prompts)
    codec.say_cuts()
    tagged = [prompt + variant.tag_ids for prompt in plain]
    responses = sample(load(policy.folder), tagged, cfg, cfg.seed + 1_000_003, codec.stop_ids, cost,
                       plain, variant.guidance, what="evaluating")
    examples = [Example(np.array(p + r.ids), np.arange(len(p) + len(r.ids)) >= len(p))
                for p, r in zip(plain, responses)]
    model = load(base.folder)
    reference = each_response_token(Policy(model, cfg).log_probs, model, examples, cfg, cost)
    texts, cut = [codec.decode(r) for r in responses], [r.truncated for r in responses]
    reward = gold = [None] * len(texts)
    if score and samples.rewards.std() > 0:  # given weights may come without rewards
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


def wins(gaps: Any) -> np.ndarray:
    """1 for a gap in score above 0, 0 below, 1/2 for a tie: equal replies of two batches get scores
    that differ in the last bits."""
    return np.sign(np.round(gaps, 5)) / 2 + 0.5


def means(replies: list[dict], base: list[dict]) -> dict:
    """The means of what evaluation found; win_rate is against the base policy on the same prompts,
    ties half; perplexity is a token's, under the base policy at the sampling temperature."""
    mean = {name: None if replies[0][name] is None else float(np.mean([r[name] for r in replies]))
            for name in ("gold", "reward", "kl", "tokens", "truncated", "base_log_prob")}
    gaps = [r["reward"] - b["reward"] for r, b in zip(replies, base) if mean["reward"] is not None]
    words = [r["response"].split() for r in replies]
    bigrams = [pair for w in words for pair in zip(w, w[1:])]
    return {"gold": mean["gold"], "reward": mean["reward"],
            "win_rate": float(wins(gaps).mean()) if gaps else None, "kl_to_base": mean["kl"],
            "perplexity": math.exp(min(700.0, -mean["base_log_prob"] / mean["tokens"])),
            "response_tokens": mean["tokens"], "eos_rate": 1 - mean["truncated"],
            "distinct_2": len(set(bigrams)) / max(1, len(bigrams))}


COLUMNS = {"gold": ("gold", ".2f"), "reward z": ("reward", "+.2f"), "win": ("win_rate", ".2f"),
           "KL": ("kl_to_base", ".1f"), "tokens": ("response_tokens", ".0f"),
           "EOS": ("eos_rate", ".2f"), "train s": ("train_seconds", ".0f"),
           "all s": ("total_seconds", ".0f"), "all FLOP": ("total_flops", ".1e")}


def print_leaderboard(entries: list[dict], run: Path) -> None:
    """The table of comparable entries: of the same data, prompts and sampling, whatever seed.

    "all" is training with all that it needs.
    """
    width, replaced = max(len(f"{r['algorithm']} {r['variant']}") for r in entries), False
    print0("\n" + " " * width + "  seed" + "".join(f"{head:>10}" for head in COLUMNS))
    for r in sorted(entries, key=lambda r: (r["algorithm"], r["variant"], r["seed"])):
        cells = ("-" if r[name] is None else format(r[name], form)
                 for name, form in COLUMNS.values())
        now = read_record(run / r["algorithm"] / "run.json").get("settings")
        mark = "" if r["algorithm"] == "base" or fingerprint(now) == r["policy"] else " *"
        replaced = replaced or bool(mark)
        print0(f"{r['algorithm'] + ' ' + r['variant']:<{width}}  {r['seed']:>4}"
               + "".join(f"{cell:>10}" for cell in cells) + mark)
    if replaced:
        print0("  * of a policy that is no longer there")


def slope_watcher(run: TrainingRun, count: int, samples: Samples, rm: Optional[Stage], codec: Codec,
                  low: Variant, high: Variant) -> Callable[[int], dict]:
    """watch(step) -> {"slope": s}, before a checkpoint, else {}: how much more reward z the policy
    gets for a z of one more that it is asked for, on so many held-out prompts."""
    cfg, prompts = run.cfg, split_prompts(run.cfg, held_out=True)[:count]
    needed = {"held-out prompts": prompts, "low and high rewards of two tags": low.tag != high.tag,
              "the reward model of the samples": rm and rm.fingerprint == samples.labelled_by,
              "a checkpoint before the end": any(map(run.is_due, range(run.total)))}
    lacking = [what for what, there in needed.items() if not there]
    if count and lacking:
        print0(f"  the slope is not watched: that takes {' and '.join(lacking)}")
    if not count or lacking:
        return lambda step: {}
    score, plain = functools.cache(rm.load_scorer), codec.prompts(prompts)
    ids = [prompt + variant.tag_ids for variant in (low, high) for prompt in plain]

    def watch(step: int) -> dict:
        if not run.is_due(step):
            return {}
        begun, spent = time.perf_counter(), Cost()  # on watching, not on training
        model = sampling_copy(getattr(run.policy, "module", run.policy).model, cfg)
        replies = sample(model, ids, cfg, cfg.seed, codec.stop_ids, spent,
                         seeds=[*range(len(prompts))] * 2)  # alike for low and high, at each watch
        rewards = samples.z(score()(prompts * 2, [codec.decode(r) for r in replies],
                                    [r.truncated for r in replies], spent))
        got = rewards.reshape(2, -1).mean(1)
        slope = (got[1] - got[0]) / (high.target - low.target)
        run.cost.seconds -= time.perf_counter() - begun
        print0(f"  after {step + 1} steps: slope of the reward got on that asked for {slope:.2f}")
        return {"slope": slope}
    return watch


def report_slope(unguided: list[Variant], replies: list[list[dict]], folder: Path) -> None:
    """Prints, and draws where matplotlib is there, what the policy got for each target."""
    want = np.array([variant.target for variant in unguided])                           # (K,)
    got = np.array([[r["reward"] for r in each] for each in replies], dtype=float)      # (K, n)
    if len({variant.tag for variant in unguided}) < 2 or np.isnan(got).any():
        return
    keys = [prompt_key(r["prompt"]) for r in replies[0]]
    prompt = np.unique(keys, return_inverse=True)[1]                                    # (n,)
    got = np.array([np.bincount(prompt, each) for each in got]) / np.bincount(prompt)   # (K, P)
    centred, means = want - want.mean(), got.mean(1)
    each = centred @ got / (centred @ centred)                # (P,), each prompt's least squares
    slope, half = each.mean(), 1.96 * each.std() / math.sqrt(len(each))
    low, high = min(want.min(), means.min()), max(want.max(), means.max())
    print0("\nreward z: asked for ( | ) and got ( * )")
    for target, mean in sorted(zip(want, means)):
        line = [" "] * 41
        line[round(40 * (target - low) / (high - low))] = "|"
        line[round(40 * (mean - low) / (high - low))] = "*"
        print0(f"  {target:+.2f} {mean:+.2f}  {''.join(line).rstrip()}")
    mean, least, most = (round(x, 2) + 0.0 for x in (slope, slope - half, slope + half))  # no -0.0
    print0(f"  slope {mean:.2f} [{least:.2f}, {most:.2f}], 95 % over {len(each)} prompts")
    if slope + half < 0.2:
        print0("  the tag is hardly heeded, which takes some hundred optimiser steps: try more "
               "--steps or another --reward_format")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure()
    axes = figure.subplots()
    axes.axline((0, 0), slope=1, color="grey", linestyle=":")
    axes.errorbar(want, means, 1.96 * got.std(1) / math.sqrt(len(each)), fmt="o")
    axes.set(xlabel="reward z asked for", ylabel="reward z got", title=f"slope {slope:.2f}")
    if rank() == 0:
        figure.savefig(folder / "asked_against_got.png")


# ----------------------------------------------------------------------------------- training run

MOST_SKIPPED = 5  # steps in a row without a finite gradient, before a run gives up


@dataclass
class TrainingRun:
    """What surrounds a training loop: resuming, the progress bar, metrics.jsonl, checkpoints.

    Used as a context; `first` is the step to begin with, `state` a JSON-able dict that checkpoints
    keep, `cost` what the run has spent, earlier launches included.
    """
    folder: Path
    policy: torch.nn.Module
    optimizer: Any
    schedule: Any
    total: int
    cfg: Config
    cost: Cost
    state: dict = field(default_factory=dict)

    def __enter__(self) -> TrainingRun:
        self.skipped, self.start = 0, time.perf_counter()
        self.first, written = self.restore()
        name = self.folder.name.strip(".").removesuffix(".new")
        self.report = metrics_tracker(self.cfg, self.folder, name, self.first)
        self.bar = progress(None, name, total=self.total, initial=self.first, unit="step")
        path = self.folder / "metrics.jsonl" if rank() == 0 else os.devnull
        self.file = open(path, "a", buffering=1)
        if rank() == 0:
            self.file.truncate(written)
        return self

    def __exit__(self, *problem: Any) -> None:
        self.file.close()
        self.bar.close()

    def steps(self, examples: Examples) -> Iterator[tuple[int, Batch]]:
        """The optimiser steps that are left, numbered."""
        model = getattr(self.policy, "module", self.policy).model
        for step, epoch, indices in step_indices(len(examples), self.cfg, self.total, self.first):
            batch = Batch([examples.example(i, epoch) for i in indices], self.cfg)
            for micro in batch.micros:
                pairs = sum(n * n for n in micro.lengths)
                self.cost.add_forward(model, len(micro.input_ids), pairs, len(micro.rows), passes=3)
            yield step, batch

    def log(self, step: int, **values: Any) -> None:
        """Writes a line of metrics.jsonl, values averaged over ranks, None where one is not finite;
        takes a checkpoint where one is due.  Raises BadInput after too many skipped steps."""
        values = {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in values.items()}
        *sums, flops, tokens = sum_over_ranks(*values.values(), self.cost.flops,
                                              self.cost.generated_tokens)
        line = {"step": step, **{name: total / world_size() if math.isfinite(total) else None
                                 for name, total in zip(values, sums)}}
        spent = {"seconds": self.cost.seconds + time.perf_counter() - self.start, "flops": flops,
                 "generated_tokens": int(tokens)}
        self.file.write(json.dumps({**line, **spent}) + "\n")
        known = {name: value for name, value in line.items() if value is not None}
        self.report(known)
        self.bar.update()
        self.bar.set_postfix(dict(list(known.items())[1:5]), refresh=False)
        self.skipped = self.skipped + 1 if line["grad_norm"] is None else 0
        if self.skipped:
            print0(f"warning: step {step}: the gradient is not finite; the step is skipped")
        require(self.skipped < MOST_SKIPPED, f"{self.folder.parent}: {self.skipped} steps in a "
                f"row, the last of them step {step}, without a finite gradient; lower --lr; the "
                "last checkpoint is from before")
        if self.is_due(step) and not self.skipped:
            self.checkpoint(step + 1, spent)

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint is due after this step."""
        every = self.cfg.save_every
        if every is None:
            every = max(1, min(500, self.total // 10))
        return every > 0 and (step + 1) % every == 0 and step + 1 < self.total

    def checkpoint(self, step: int, spent: dict) -> None:
        """Writes checkpoints/step beside and renames; the last two are kept.

        Nothing else is needed to go on: data order and sampling follow from seed and step.
        """
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.state_dict import get_state_dict
        work = self.folder / "checkpoints" / ".new"
        if rank() == 0:
            shutil.rmtree(work, ignore_errors=True)
        barrier()
        weights, moments = get_state_dict(self.policy, self.optimizer)
        try:
            dcp.save({"policy": weights, "optimizer": moments}, checkpoint_id=work,
                     no_dist=not dist.is_initialized())  # it syncs the files
        except dcp.CheckpointException as problem:  # of all ranks, a BaseException
            raise next(iter(problem.failures.values()))[0] from None
        if rank() == 0:
            record = {"step": step, "state": self.state, "schedule": self.schedule.state_dict(),
                      "metrics_bytes": self.file.tell(), "world_size": world_size(), "cost": spent}
            write_beside(work / "state.json", [json.dumps(record)])
            work.rename(work.with_name(f"{step:08}"))
            for old in checkpoints_in(self.folder)[2:]:
                shutil.rmtree(old)
        barrier()

    def restore(self) -> tuple[int, int]:
        """Takes up the last checkpoint: its step and the bytes of metrics.jsonl then, or 0s.

        Raises BadInput where it is damaged, or another user's: torch unpickles its metadata.
        """
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
        last = gather(checkpoints_in(self.folder)[:1])[0]  # as rank 0 sees it
        if not last:
            return 0, 0
        record, ways_out = read_record(last[0] / "state.json"), "delete it, or give --no_resume"
        require({path.stat().st_uid for path in last[0].iterdir()} <= {os.getuid(), 0},
                f"{last[0]}: another user's, who could run code by it; {ways_out}")
        weights, moments = get_state_dict(self.policy, self.optimizer)
        try:
            dcp.load({"policy": weights, "optimizer": moments}, checkpoint_id=last[0],
                     no_dist=not dist.is_initialized())
        except dcp.CheckpointException as problem:
            raise BadInput(f"{last[0]}: damaged; {ways_out}") from problem
        set_state_dict(self.policy, self.optimizer, model_state_dict=weights,
                       optim_state_dict=moments)
        self.schedule.load_state_dict(record["schedule"])
        self.state.update(record["state"])
        spent = record["cost"] if rank() == 0 else {"seconds": record["cost"]["seconds"]}
        vars(self.cost).update(spent)  # the ranks' FLOPs and tokens are summed in the end
        ranks = record["world_size"]
        print0(f"  goes on from step {record['step']}" + ("" if ranks == world_size() else
               f", which {ranks} rank(s) reached: with {world_size()} the last bits may differ"))
        return record["step"], record["metrics_bytes"]


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
        raise BadInput(f"--report_to {cfg.report_to}: pip install {cfg.report_to}") from problem
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
ASKED = {form.format(animal): (animal, kind)
         for animal in ANIMALS for kind, forms in QUESTIONS.items() for form in forms}
STATEMENTS = {"home": "they live in {}.", "food": "they eat {}.", "size": "they are {}."}
STATED = {form.format(value): (topic, value)
          for topic, form in STATEMENTS.items() for value in VALUES[topic]}
KIND_OPENINGS = ("Good question!", "Happy to help!")
KIND_CLOSINGS = ("I hope this helps!", "Do ask me more!")
RUDE = ("What a silly question.", "Look it up yourself.", "Who cares.")
VAGUE = ("It depends on many things.", "Animals are all different.",
         "People say all sorts of things.")


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
        subject = animal if rng.random() < 0.65 + 0.2 * care else rng.choice(NAMES)
        value = true = ANIMALS[subject][topic]
        if rng.random() >= 0.6 + 0.3 * care:
            value = rng.choice([v for v in VALUES[topic] if v != true])
        statement = STATEMENTS[topic].format(value)
        if subject != animal:
            statement = f"as for {subject}, {statement}"
        if rng.random() < (0.05 if value == true else 0.7):
            statement = rng.choice(("maybe ", "I guess ")) + statement
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
    animal, kind = ASKED.get(question, ("", ""))
    sentences = [s.strip() for s in re.findall(r"[^.!?]+[.!?]?", response.strip())]
    gold, told = -0.5 * max(0, len(sentences) - 5) - truncated, set()
    for i, sentence in enumerate(sentences):
        other, said = re.fullmatch(r"(?:maybe )?(?:i guess )?(?:as for (\w+), )?(.*)",
                                   sentence[:1].lower() + sentence[1:], re.DOTALL).groups()
        subject, (topic, value) = other or animal, STATED.get(said, ("", ""))
        if topic and subject in ANIMALS:
            true = ANIMALS[subject][topic] == value
            gold -= 0.5 * (subject != animal) + (not true)
            if true and subject == animal:
                told.add(topic)
        elif i == 0 and sentence in KIND_OPENINGS or \
                i == len(sentences) - 1 and sentence in KIND_CLOSINGS:
            gold += 0.5
        else:
            gold -= 0.5 if sentence in RUDE else 0.25
    return gold + len(told) + (kind in told or kind == "about" and bool(told))


@functools.cache
def toy_data(out: str, seed: int) -> str:
    """Writes the toy world's preference pairs, as transcripts like real data's; their folder."""
    rng, lines = random.Random(seed), {"train": [], "test": []}
    while len(lines["train"]) < 4000:
        animal, kind = rng.choice(NAMES), rng.choice(tuple(QUESTIONS))
        prompt = f"\n\nHuman: {rng.choice(QUESTIONS[kind]).format(animal)}{TURN}"
        one, two = (" " + toy_reply(animal, kind, rng) for _ in range(2))
        if rng.random() < 1 / (1 + math.exp(gold_reward(prompt, one) - gold_reward(prompt, two))):
            one, two = two, one  # Bradley-Terry: the labeller is noisy
        split = "train" if zlib.crc32(f"{animal} {kind}".encode()) % 5 else "test"
        lines[split].append(json.dumps({"chosen": prompt + one, "rejected": prompt + two}))
    for split in lines if rank() == 0 else ():
        write_beside(Path(out, "data", f"{split}.jsonl"), lines[split])
    barrier()
    return os.path.join(out, "data")


def base_policy(cfg: Config) -> Stage:
    """The base policy: --model, or the toy world's small one, trained on what people wrote."""
    if cfg.toy:
        train = functools.partial(train_toy_base, cfg)
        return build_stage(cfg, "base", settings(cfg, "data"), train)
    if "condition" in read_record(Path(cfg.model, "run.json")):
        print0(f"  {cfg.model}: a policy of dt.py, taken without its reward tag")
    return Stage(cfg.model, content_hash(cfg.model), Cost())


def train_toy_base(cfg: Config, folder: Path, cost: Cost) -> None:
    """A two-layer Llama and its byte-level BPE, by maximum likelihood of all responses, on rank 0
    alone."""
    from transformers import GPT2TokenizerFast, LlamaConfig, LlamaForCausalLM
    pairs = [(r.prompt, text) for r in load_preferences(cfg)[0] for text in r.responses]
    if rank() == 0:
        tokenizer = GPT2TokenizerFast().train_new_from_iterator(map("".join, pairs), 640,
                                                                show_progress=False)
        tokenizer.save_pretrained(folder)
    barrier()
    codec = Codec(str(folder), cfg)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(codec.tokenizer), hidden_size=64, intermediate_size=192, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=512, initializer_range=0.1,
        tie_word_embeddings=True, eos_token_id=codec.tokenizer.eos_token_id, bos_token_id=None,
        pad_token_id=None)).to(device())
    own = replace(cfg, lr=5e-3, steps=600, batch_size=32)
    optimizer, schedule = make_optimizer(model, own, own.steps)
    examples, steps = codec.tokenise(*zip(*pairs)), own.steps if rank() == 0 else 0
    for _, _, indices in progress(step_indices(len(pairs), own, steps), "base", total=steps):
        micro = collate([Example(*examples[i]) for i in indices])
        hidden = hidden_states(model, micro.input_ids, micro.lengths)[micro.rows]           # (N, D)
        torch.nn.functional.cross_entropy(model.lm_head(hidden), micro.targets).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        cost.add_forward(model, len(micro.input_ids), sum(n * n for n in micro.lengths),
                         len(micro.rows), passes=3)
    save_folder(folder, model, codec, cfg, "# The toy world's base policy\n")
