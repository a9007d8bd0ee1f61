"""What the trainers share, none of it about one algorithm; in sections, by banners.

Terms: *policy*, the language model that is trained; *base policy*, the model it starts from and the
reference of every KL; *sample*, a (prompt, response, reward); *z*, a reward in standard deviations
from the mean of the labelled samples; *response mask*, the tokens that the loss is taken over;
*prompt*, text, or chat messages for the tokenizer's chat template.  Shapes: T tokens of packed
sequences, N rows (positions that predict a response token), D hidden width, V vocabulary, R slots
of the sampler, L lanes of its cache (R, or 2 R with guidance).
"""
from __future__ import annotations

import contextlib
import copy
import csv
import fcntl
import functools
import gc
import gzip
import hashlib
import importlib.util
import inspect
import itertools
import json
import math
import os
import random
import re
import shutil
import sys
import time
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
    """Input that cannot be used; the message is the one sentence that the user reads."""


def require(condition: Any, otherwise: str) -> None:
    """Raises BadInput(otherwise) unless the condition holds."""
    if not condition:
        raise BadInput(otherwise)


def rank() -> int:
    """This process's number; 0 without torchrun."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """How many processes train together; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", 1))


def device() -> torch.device:
    """This rank's GPU, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


def print0(*args: Any) -> None:
    """print, on rank 0 alone."""
    if rank() == 0:
        print(*args, flush=True)


print_once = functools.cache(print0)  # each line once in a process


def barrier() -> None:
    """Waits for all ranks."""
    if dist.is_initialized():
        dist.barrier()


def sum_over_ranks(*values: Any) -> list[float]:
    """Each value summed over all ranks, in float64."""
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
    """The ranks' values in the order of their indices, on every rank."""
    values = {i: value for share in gather(local) for i, value in share.items()}
    return [values[i] for i in range(total)]


def progress(items: Optional[Iterable], what: str, **options: Any) -> tqdm:
    """A tqdm bar on rank 0; where stderr is no terminal, a line every 15 s at most."""
    return tqdm(items, desc=what, disable=rank() != 0, leave=False, dynamic_ncols=True, delay=1,
                mininterval=0.3 if sys.stderr.isatty() else 15, **options)


def launch(main: Callable, config_class: type, args: Optional[list[str]] = None) -> None:
    """Runs main(cfg) in a process group, cfg from the command line.  Bad input and errors of the
    operating system end in one sentence and status 2, Ctrl-C in 130."""
    try:
        cfg = parse(config_class, args)
        quieten_libraries()
        torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for each length
        if world_size() > 1:
            if torch.cuda.is_available():
                torch.cuda.set_device(device())
            dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo",
                                    timeout=timedelta(hours=2))  # rank 0 loads or reads alone
        Path(cfg.out).mkdir(parents=True, exist_ok=True)
        with open(Path(cfg.out, ".lock"), "w") as lock:
            if rank() == 0:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError as problem:
                    raise BadInput(f"{cfg.out}: another run is at work there") from problem
                except OSError:
                    pass  # a file system without locks
            main(cfg)
        if dist.is_initialized():
            gc.collect()  # sharded models are cycles that hold the group
            dist.destroy_process_group()
        return
    except BadInput as problem:
        message, status = str(problem), 2
    except OSError as problem:
        message, status = f"{problem}; the same command resumes", 2
    except KeyboardInterrupt:
        message, status = "interrupted; the same command resumes", 130
    script = Path(sys.argv[0]).name + (f", rank {rank()}" if rank() else "")
    print(f"{script}: {message}", file=sys.stderr)
    sys.exit(status)


def quieten_libraries() -> None:
    """Turns off transformers' progress bars and reports; its errors stay."""
    from transformers.utils import logging
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", "torch.distributed is disabled|Detected call of `lr_sched|"
                            "`past_key_values` is deprecated")


# ----------------------------------------------------------------------------------------- config
# One dataclass holds the shared flags; each script inherits it and adds its algorithm's own.

TOY = {"out": "runs/toy", "max_prompt_tokens": 64, "max_response_tokens": 64, "batch_size": 32,
       "micro_batch_tokens": 16384, "samples_per_prompt": 9, "eval_prompts": 512, "dtype": "fp32"}


def flag(default: Any, help: str) -> Any:
    """A dataclass field that becomes a command-line flag."""
    metadata = {"help": help.replace("%", "%%")}  # argparse formats help texts
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class Config:
    """The flags that every script shares."""
    out: str = flag("runs/model", "folder of the run")
    model: Optional[str] = flag(None, "base policy: folder or Hub id; omitted: the toy world")
    preferences: Optional[str] = flag(None, "chosen and rejected: file, folder or Hub id")
    samples: Optional[str] = flag(
        None, "prompt, response, reward: file, folder or Hub id; the base policy generates a "
        "missing response, the reward model scores a missing reward")
    columns: list[str] = flag([], "the data's column names, ours=theirs: prompt=question; "
                              "prompt=instruction+input joins two by a blank line")
    reward_model: Optional[str] = flag(
        None, "a sequence classifier's folder or Hub id, or FILE.py:FUNCTION, a function "
        "(prompts, responses) -> scores; omitted: trained on --preferences")
    judge: Optional[str] = flag(None, "the same, to score `gold` in evaluation alone")
    held_out: float = flag(0.1, "share of prompts held out, unless the data have a test split")
    max_prompt_tokens: int = flag(1024, "longer prompts are left out")
    max_response_tokens: int = flag(1024, "longer responses are cut and taught without an end")
    samples_per_prompt: int = flag(1, "responses generated to each prompt of --preferences, and to "
                                   "each row of --samples without one")
    temperature: float = flag(1.0, "sampling temperature of labelled samples and PPO's rollouts")
    eval_temperature: float = flag(1.0, "sampling temperature of evaluation; 0: greedy")
    eval_prompts: int = flag(256, "held-out prompts to evaluate on; 0: no evaluation")
    seed: int = flag(0, "random seed")
    lr: float = flag(1e-5, "peak learning rate; 3 % warm-up, then cosine to 0")
    epochs: int = flag(1, "passes over the training examples")
    steps: Optional[int] = flag(None, "optimiser steps, in place of --epochs")
    batch_size: int = flag(128, "sequences per optimiser step, all ranks together")
    micro_batch_tokens: int = flag(8192, "maximum tokens per forward pass; lower it if memory runs "
                                   "out, raise it on a large GPU")
    dtype: Literal["auto", "bf16", "fp32"] = flag(
        "auto", "compute dtype; auto: bf16 where the hardware supports it")
    sharding: Literal["ddp", "fsdp"] = flag(
        "ddp", "fsdp: weights, gradients and optimiser state spread over the ranks (FSDP2)")
    gradient_checkpointing: bool = flag(False, "recompute activations in backward, for memory")
    save_every: Optional[int] = flag(
        None, "steps between checkpoints; 0: none; omitted: a tenth of the run, at most 500")
    report_to: Literal["none", "tensorboard", "wandb"] = flag(
        "none", "tracker that gets the metrics, beside metrics.jsonl")

    evaluation_flags = ()  # a script's own flags that its training does not depend on

    def __post_init__(self) -> None:
        least = {"samples_per_prompt": 0, "temperature": 0, "eval_temperature": 0,
                 "eval_prompts": 0, "seed": 0, "save_every": 0, "max_prompt_tokens": 1,
                 "max_response_tokens": 1, "epochs": 1, "steps": 1, "batch_size": 1,
                 "micro_batch_tokens": 1}
        for name, lowest in least.items():
            value = getattr(self, name)
            require(value is None or value >= lowest, f"--{name} must be at least {lowest}")
        for f in fields(self):
            value = getattr(self, f.name)
            numbers = value if isinstance(value, list) else [value]
            for number in numbers:
                require(not isinstance(number, float) or math.isfinite(number),
                        f"--{f.name} must be a finite number, not {number}")
        require(0 < self.held_out < 1, f"--held_out must lie in (0, 1), not {self.held_out}")
        require(self.lr > 0, f"--lr must be above 0, not {self.lr}")
        has_data = bool(self.preferences or self.samples)
        require(self.toy != has_data,
                "--model goes with --preferences or --samples; without all three: the toy world")
        column_names(self.columns)  # raises BadInput for a mistyped one

    @property
    def toy(self) -> bool:
        """Whether the run is in the embedded toy world."""
        return self.model is None

    def training_flags(self) -> dict:
        """The flags that a trained policy depends on: learning rate, steps and the script's own."""
        others = {f.name for f in fields(Config)} - {"lr", "epochs", "steps", "batch_size"}
        others |= set(self.evaluation_flags)
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in others}


def parse(config_class: type, args: Optional[list[str]] = None) -> Any:
    """The command line, after --config's YAML file, as a config.

    Raises BadInput for unknown flags and values out of range.
    """
    from transformers import HfArgumentParser

    def refuse(message: str) -> None:
        raise BadInput(message)
    script = sys.modules[config_class.__module__]
    about = (script.__doc__ or "").split("\n\n")[0]
    parser = HfArgumentParser(config_class, allow_abbrev=False, description=about)
    parser.add_argument("--config", help="YAML file of flags; the command line wins")
    parser.error = refuse
    args = sys.argv[1:] if args is None else args
    typed = {arg.split("=")[0][2:] for arg in args if arg.startswith("--")}
    file = parser.parse_known_args(args)[0].config
    in_file = yaml_flags(file) if file else {}
    exclusive = {"epochs", "steps"}
    if typed & exclusive:
        in_file = {name: values for name, values in in_file.items() if name not in exclusive}
    given = typed | in_file.keys()
    require(not exclusive <= given, "--epochs and --steps: give one of them")
    toy = {} if "model" in given else TOY | script.TOY
    if "epochs" in given:
        toy.pop("steps", None)
    parser.set_defaults(**toy)
    file_args = [arg for name, values in in_file.items() for arg in (f"--{name}", *values)]
    cfg, _, unknown = parser.parse_args_into_dataclasses(file_args + args,
                                                         return_remaining_strings=True)
    require(not unknown, f"unknown flag or value {' '.join(unknown)}; --help lists all flags")
    return cfg


def yaml_flags(path: str) -> dict[str, list[str]]:
    """The values of each flag in a YAML file."""
    import yaml
    try:
        flags = dict(yaml.safe_load(Path(path).read_text(encoding="utf-8")))
    except (OSError, TypeError, ValueError, yaml.YAMLError) as problem:
        raise BadInput(f"--config {path}: must hold lines of `flag: value`") from problem
    return {name: [str(v) for v in (value if isinstance(value, list) else [value])]
            for name, value in flags.items() if value is not None}


def compute_dtype(cfg: Config) -> torch.dtype:
    """The dtype of matrix products: --dtype, auto resolved."""
    if device().type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = torch.cpu._is_avx512_bf16_supported()
    bf16 = cfg.dtype == "bf16" or (cfg.dtype == "auto" and native)
    return torch.bfloat16 if bf16 else torch.float32


# ----------------------------------------------------------------------------------------- stages
# A run is a chain of stages: base policy, reward model, labelled samples, policy.  Each leaves a
# record of the settings that it depends on.  A finished stage is used again, or refused if it was
# made with other settings; only the script's own policy is trained anew.  A stage is made beside
# its place and renamed: after a kill the same command resumes.


@dataclass
class Cost:
    """Seconds, and the FLOPs of all ranks together."""
    seconds: float = 0.0
    flops: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.seconds + other.seconds, self.flops + other.flops)

    def add_forward(self, model: Any, tokens: int, passes: int = 1) -> None:
        """Adds 2 FLOPs for each token and weight outside the embedding; training is 3 passes.
        (Kaplan et al. 2020, arXiv 2001.08361, section 2.1.)"""
        if not hasattr(model, "weights_outside_embedding"):
            model.weights_outside_embedding = model.num_parameters(exclude_embeddings=True)
        self.flops += passes * 2 * model.weights_outside_embedding * tokens


@dataclass
class Stage:
    """A step of a run: where its result is, all that it depends on, how to make and to load it.

    `path` is a folder, samples.jsonl, or what the user gave (then make is None).  make(work, cost)
    writes the result to `work` and returns what else its record holds.  `shared` stages serve
    other scripts too, and are never replaced.
    """
    path: str
    settings: dict
    make: Optional[Callable[[Path, Cost], Optional[dict]]] = None
    load: Optional[Callable[[], Any]] = None
    shared: bool = True

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.settings)

    @property
    def work(self) -> Path:
        """Where it is made: the folder .dt, or the file .samples.jsonl."""
        return Path(self.path).with_name("." + Path(self.path).name)

    @property
    def spent(self) -> Cost:
        """What it took to make; nothing for what the user gave."""
        if self.make is None:
            return Cost()
        return Cost(**read_record(record_of(self.path))["cost"])


def record_of(place: Any) -> Path:
    """Where the record of a stage's path or work is: run.json in a folder, .samples.json for
    samples.jsonl, finished or not.  Only a complete stage's has a cost."""
    place = Path(place)
    return place.with_name(".samples.json") if place.suffix == ".jsonl" else place / "run.json"


def build_stages(cfg: Config, *stages: Optional[Stage]) -> None:
    """Makes the stages that do not exist yet, in order.

    Raises BadInput, before anything is made, if work of other settings is in the way.
    """
    missing = [stage for stage in stages if stage and stage.make and not is_finished(stage)]
    for stage in missing:
        build_stage(cfg, stage)


def is_finished(stage: Stage) -> bool:
    """Whether the stage's result exists, made with its settings.

    Raises BadInput if work that may not be replaced is in the way.
    """
    path, work = Path(stage.path), stage.work
    if path.exists():
        record = read_record(record_of(path))
        require("cost" in record,
                f"{path}: exists, and has no record of a run; move it, or give another --out")
        changes = differences(record["settings"], stage.settings)
        if not changes:
            if stage.shared:
                content = content_hash(str(path), MODEL_FILES)
                require(content == record.get("content"), f"{path}: was changed since a run made "
                        "it; give it by its own flag and another --out, or delete it to make it "
                        "anew")
            shutil.rmtree(path / "replaced", ignore_errors=True)  # if a kill has left it
            print0(f"{path.stem}: {path}, from before")
            return True
        require(not stage.shared, f"{path}: was made with other settings: {changes}; give another "
                "--out, or delete it to make it anew")
        print0(f"{path.stem}: trained anew, because {changes}")
    begun = read_record(record_of(work)) if work.exists() else {}
    work_differs = differences(begun.get("settings", {}), stage.settings)
    is_valuable = "cost" in begun or work.is_file() or checkpoints_in(work)
    require(not (work_differs and is_valuable), f"{work}: holds unfinished work of other "
            f"settings: {work_differs}; give its settings to finish it, another --out, or delete "
            "it")
    return False


def differences(before: dict, now: dict) -> str:
    """Each setting that differs, with both values; "" if none does."""
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return ", ".join(f"{name} was {before.get(name)}, now {now.get(name)}" for name in names)


def build_stage(cfg: Config, stage: Stage) -> None:
    """Makes a stage, or resumes what a kill has left of it, and moves it into its place."""
    path, work = Path(stage.path), stage.work
    record = read_record(record_of(work)) if work.exists() else {}
    barrier()  # all ranks have read it
    if record.get("settings") != stage.settings:
        record = {"settings": stage.settings}
        if rank() == 0:
            shutil.rmtree(work, ignore_errors=True)  # without a checkpoint, so of no value
            write_beside(record_of(work), [json.dumps(record)])
        barrier()
    if "cost" not in record:
        torch.manual_seed(cfg.seed)
        cost, start = Cost(), time.perf_counter()
        extra = stage.make(work, cost) or {}
        cost.seconds += time.perf_counter() - start
        [cost.flops] = sum_over_ranks(cost.flops)
        gc.collect()  # sharded models are cycles, and the next stage needs the memory
        content = content_hash(str(work), MODEL_FILES)
        record = {**record, "content": content, "cost": asdict(cost), **extra}
    if rank() == 0:
        write_beside(record_of(work), [json.dumps(record, indent=1)])
        for scratch in ("checkpoints", "tokens"):
            shutil.rmtree(work / scratch, ignore_errors=True)
        if path.exists():  # the script's policy of other settings
            path.rename(work / "replaced")
        work.rename(path)
        shutil.rmtree(path / "replaced", ignore_errors=True)
    barrier()


def policy_stage(cfg: Config, algorithm: str, train: Callable, base: Stage, samples: Stage,
                 **depends_on: Any) -> Stage:
    """The algorithm's policy, made by train(cfg, base, samples, folder, cost); it depends on the
    flags of data and training, on base policy and samples, and on `depends_on`."""
    path = os.path.join(cfg.out, algorithm)
    require(Path(base.path).resolve() != Path(path).resolve(),
            f"--model {base.path}: this run's policy would replace it; give another --out")
    settings = {**data_settings(cfg), **cfg.training_flags(), "base": base.fingerprint,
                "samples": samples.fingerprint, **depends_on}
    return Stage(path, settings, shared=False,
                 make=lambda folder, cost: train(cfg, base, samples.load(), folder, cost))


def data_settings(cfg: Config) -> dict:
    """The settings that every stage depends on; files stand as hashes of their content."""
    names = ("columns", "held_out", "max_prompt_tokens", "max_response_tokens", "seed")
    return {"model": content_hash(cfg.model, MODEL_FILES),
            "preferences": content_hash(cfg.preferences),
            **{name: getattr(cfg, name) for name in names}}


MODEL_FILES = ("*.safetensors", "config.json", "generation_config.json", "*token*.json", "*.jinja",
               "*.model", "vocab*", "merges.txt")


DATA_FILES = ("**/*.jsonl", "**/*.jsonl.gz", "**/*.json", "**/*.parquet", "**/*.csv")


@functools.cache
def content_hash(source: Optional[str], patterns: tuple[str, ...] = DATA_FILES) -> Optional[str]:
    """Twelve hex digits of the hash of a file, or of a folder's files that match; rank 0 reads
    them, about a gigabyte a second.  A Hub id is returned as it is."""
    if not source or not Path(source).exists():
        return source
    root = Path(source)
    digest = hashlib.sha256()
    if rank() == 0:
        for path in files_in(root, patterns):
            digest.update(str(path.relative_to(root)).encode())
            with open(path, "rb") as file:
                for part in iter(lambda: file.read(2**24), b""):
                    digest.update(part)
    return gather(digest.hexdigest()[:12])[0]


def files_in(root: Path, patterns: tuple[str, ...]) -> list[Path]:
    """A folder's files that match, sorted, none of them hidden; of a file, itself."""
    if root.is_file():
        return [root]
    paths = itertools.chain(*(root.glob(pattern) for pattern in patterns))
    return sorted(path for path in paths if path.is_file()
                  and not any(part.startswith(".") for part in path.relative_to(root).parts))


def fingerprint(value: Any) -> str:
    """Twelve hex digits of a JSON-able value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def read_record(path: Path) -> dict:
    """A JSON object from a file; {} where there is none."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def write_beside(path: Path, lines: Iterable[str]) -> None:
    """Writes lines beside the file, and renames: a kill leaves the old file or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.tmp")
    with open(beside, "w", encoding="utf-8") as file:
        file.writelines(line + "\n" for line in lines)
    beside.replace(path)


# -------------------------------------------------------------------------------------- tokenizer
# Text prompts and responses are encoded apart, so that the boundary between them is exact.  A turn
# of a chat is what the model's own template renders: header, reply and end alike.

GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
HARD_TEXT = ("Hello  world,\n\n\n  it's 12345 o'clock…\tnaïve café 東京 привет "
             "\U0001f468\u200d\U0001f469 \r\nx  7  y   \n 3.14e-10 ½²³ DON'T WE'LL  a1b22c333 "
             ",,,...;;; \t\t trailing  ")
MARK = "\ue000"  # stands for a reply, to see what a template writes around it


class LeftOut(Exception):
    """Why a row is left out: what stands after "left out: 12" in the report."""


@contextlib.contextmanager
def load_errors(name: str, what: str) -> Iterator[None]:
    """transformers' own errors on a folder or Hub id, as one sentence."""
    try:
        yield
    except BadInput:
        raise
    except Exception as problem:  # of many libraries, safetensors' own among them
        why = str(problem).strip().split("\n")[0][:200]
        raise BadInput(f"{name}: not a folder or Hub id with {what} that transformers can load "
                       f"({type(problem).__name__}: {why})") from problem


class Codec:
    """Text to token ids and back for one model: its tokenizer, chat template and stop tokens."""

    def __init__(self, folder: str, cfg: Config):
        """Raises BadInput without a tokenizer, or with one that no response could end by."""
        from transformers import AutoConfig, AutoTokenizer, GenerationConfig
        with load_errors(folder, "a tokenizer"):
            self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        self.folder, self.cfg = folder, cfg
        self.encode = text_encoder(self.tokenizer)
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        # an EOS that it puts after a text is none; in some one token is both
        self.bos = [t for t in self.tokenizer("")["input_ids"] if t == bos or t != eos]
        # SentencePiece marks a text's first word: to encode what is none, "\n" goes before it
        newline, word, both = map(self.encode, ("\n", "a", "\na"))
        self.text_before = "" if both == newline + word else "\n"
        configs, ends = [], [eos]
        for config_class in (GenerationConfig, AutoConfig):
            with contextlib.suppress(OSError, ValueError):  # a folder may lack one
                configs.append(config_class.from_pretrained(folder, trust_remote_code=False))
        for config in configs:
            ids = getattr(config, "eos_token_id", None)
            ends += ids if isinstance(ids, list) else [ids]
        self.shapes = [c.get_text_config() for c in configs if hasattr(c, "get_text_config")]
        self.turn_end, self.turn_tail = self._find_turn_end(ends)
        self.turn_end_id = self.encode(self.turn_end)[-1:]  # none without a template
        self.tail_ids = self.continuation(self.turn_tail, self.turn_end)
        ends += self.turn_end_id
        self.stop_ids = [t for t in dict.fromkeys(ends) if t is not None]
        require(self.stop_ids, f"{folder}: neither its tokenizer nor its configuration has an EOS "
                "token, so no response could end")
        self.check_fits()

    def _find_turn_end(self, end_ids: list) -> tuple[str, str]:
        """What the template writes after a reply: up to its first special token, and the rest."""
        chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": MARK}]
        try:
            _, mark, after = self._render(chat, False).rpartition(MARK)
        except (BadInput, LeftOut):
            return "", ""  # without a template, or one that no conversation will get through
        if not mark:
            return "", ""  # it drops the reply
        special = [t.content for i, t in self.tokenizer.added_tokens_decoder.items()
                   if t.special or i in end_ids]
        offsets = [after.index(token) + len(token) for token in special if token in after]
        end = min(offsets, default=0)
        return after[:end], after[end:]

    def check_fits(self, tag: str = "") -> None:
        """Raises BadInput if the model has too few embeddings for the tokenizer, or positions for
        prompt, BOS, reward tag and response."""
        size = len(self.tokenizer)
        extra = self.bos + self.encode(tag + self.turn_tail)
        need = self.cfg.max_prompt_tokens + self.cfg.max_response_tokens + len(extra)
        for shape in self.shapes:
            embeddings = getattr(shape, "vocab_size", None) or math.inf
            require(size <= embeddings, f"{self.folder}: the tokenizer has {size:,} tokens and the "
                    f"model {embeddings:,} embeddings; resize_token_embeddings first")
            positions = getattr(shape, "max_position_embeddings", None) or math.inf
            rope = getattr(shape, "rope_parameters", None) or {}
            for part in (rope, *rope.values()):  # one for all layers, or one for each kind of layer
                # a sequence beyond the original limit would change all others of its batch
                if isinstance(part, dict) and part.get("rope_type") in ("longrope", "dynamic"):
                    original = part.get("original_max_position_embeddings")
                    positions = min(positions, original or positions)
            require(need <= positions, f"{self.folder} reads at most {positions} tokens, and "
                    f"prompt, response, BOS and reward tag may take {need}: lower "
                    "--max_prompt_tokens or --max_response_tokens")

    def _render(self, messages: list[dict], generation_prompt: bool) -> str:
        require(self.tokenizer.chat_template, f"{self.folder}: has no chat template, which "
                "messages need; give an instruct model, or prompts as text")
        try:
            return self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=generation_prompt, tokenize=False)
        except Exception as problem:  # a template is a program, and may fail as one
            why = " ".join(str(problem).split())[:100]
            raise LeftOut(f"that the chat template refuses ({why})") from problem

    def render_turn(self, prompt: list[dict], response: str) -> tuple[str, str]:
        """The template's text that asks for a reply, and its text with this reply.

        Raises LeftOut unless the second begins with the first, or if the template refuses.
        """
        asked = self._render(prompt, True)
        whole = self._render([*prompt, {"role": "assistant", "content": response}], False)
        if not whole.startswith(asked):
            raise LeftOut("whose reply the chat template renders after something else than its "
                          "generation prompt: edit the template, give prompts as text, or mark "
                          'samples "source": "generated" to teach them right after that')
        return asked, whole

    def prompt(self, prompt: Any) -> list[int]:
        """Ids of a prompt: text after BOS, or messages through the template up to the reply.

        Raises LeftOut if it is longer than --max_prompt_tokens, or the template refuses it.
        """
        is_text = isinstance(prompt, str)
        ids = self.encode(prompt if is_text else self._render(prompt, True))
        if is_text and ids[:len(self.bos)] != self.bos:
            ids = self.bos + ids
        if len(ids) > self.cfg.max_prompt_tokens + len(self.bos):
            raise LeftOut("with prompts longer than --max_prompt_tokens")
        return ids

    def continuation(self, text: str, before: Optional[str] = None) -> list[int]:
        """Ids of a text that follows another: `before`, or a prompt."""
        before = self.text_before if before is None else before
        start, ids = self.encode(before), self.encode(before + text)
        return ids[len(start):] if ids[:len(start)] == start else self.encode(text)

    def reward_tag(self, tag: str) -> list[int]:
        """Ids of a tag after a prompt, as a saved chat template renders it."""
        asked = None
        if self.tokenizer.chat_template:
            with contextlib.suppress(LeftOut):
                asked = self._render([{"role": "user", "content": "a"}], True)
        return self.continuation(tag, asked)

    def turn(self, prompt: Any, response: str, truncated: bool = False,
             generated: bool = False) -> tuple[list[int], list[int], list[int]]:
        """Ids of prompt, reply and tail.  The reply has the token that ends it, unless it is
        truncated or too long; the tail is what a template writes after that token.

        A `generated` reply continues the generation prompt as it stands; any other is rendered by
        the template.  Raises what prompt() and render_turn() do.
        """
        is_text = isinstance(prompt, str)
        before = self.prompt(prompt)
        end = self.stop_ids[:1]
        if self.turn_end_id and not is_text:
            end = self.turn_end_id
        if is_text or generated:
            reply = self.continuation(response)
        else:
            asked, whole = self.render_turn(prompt, response)
            after = self.turn_end + self.turn_tail if truncated else self.turn_tail
            whole = whole.removesuffix(after)
            ids = self.encode(whole)
            reply = ids[len(before):]
            if ids[:len(before)] != before:
                print_once(f"{self.folder}: tokens of its chat template join prompt and reply; "
                           "they are encoded apart")
                reply = self.continuation(whole.removeprefix(asked))
        if not truncated and (not reply or reply[-1] not in self.stop_ids):
            reply = reply + end
        limit = self.cfg.max_response_tokens
        if is_text or truncated or len(reply) > limit:
            return before, reply[:limit], []
        return before, reply, self.tail_ids

    def taught(self, sample: Sample) -> tuple[np.ndarray, np.ndarray]:
        """Ids (T,) to teach a policy, and the response mask (T,)."""
        before, reply, _ = self.turn(sample.prompt, sample.response, sample.truncated,
                                     sample.source == "generated")
        ids = np.array(before + reply, dtype=np.int32)
        return ids, np.arange(len(ids)) >= len(before)

    def scored(self, prompt: Any, response: str, truncated: bool = False,
               generated: bool = False) -> np.ndarray:
        """Ids (T,) for a reward model: those that a policy reads, and the template's tail."""
        return np.concatenate(self.turn(prompt, response, truncated, generated)).astype(np.int32)

    def decode(self, response: Response) -> str:
        """A sampled response's text, without the token that ends it.  Where the token limit cut a
        character in two, the text ends before it."""
        text_of = functools.partial(self.tokenizer.decode, clean_up_tokenization_spaces=False)
        ids, before = response.ids, self.encode(self.text_before)
        text = text_of(before + (ids if response.truncated else ids[:-1]))
        text = text.removeprefix(text_of(before))
        return text.rstrip("\ufffd") if response.truncated else text


def text_encoder(tokenizer: Any) -> Callable[[str], list[int]]:
    """Text -> ids without BOS and EOS; the text of a special token is that token.

    By tiktoken, if that proves equal to the tokenizer itself on its vocabulary and on hard text.
    """
    def slow(text: Any) -> list:
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    try:
        fast = tiktoken_encoder(tokenizer, slow)
    except (AttributeError, KeyError, TypeError, ValueError):
        return slow
    words = [tokenizer.convert_tokens_to_string([token]) for token in tokenizer.get_vocab()]
    texts = [HARD_TEXT, *words]
    same = [fast(text) for text in texts] == slow(texts)
    return fast if same else slow


def tiktoken_encoder(tokenizer: Any,
                     slow: Callable[[str], list[int]]) -> Callable[[str], list[int]]:
    """tiktoken's encoder from a byte-level BPE's merges; texts with a special token, a word that no
    merge makes or a byte that the vocabulary lacks are left to slow().

    Raises KeyError, TypeError or ValueError for other tokenizers.
    """
    import tiktoken
    from transformers.convert_slow_tokenizer import bytes_to_unicode
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    splitter, patterns = spec["pre_tokenizer"], []
    for step in splitter.get("pretokenizers", [splitter]):
        if step["type"] != "ByteLevel":
            patterns.append(step["pattern"]["Regex"])
        elif step["use_regex"]:
            patterns.append(GPT2_SPLIT)
    model, vocabulary = spec["model"], spec["model"]["vocab"]
    words = ["".join(pair) for pair in model["merges"]]
    merged = [vocabulary[word] for word in words]
    if len(patterns) != 1 or spec["normalizer"] or merged != sorted(merged):
        raise ValueError("tiktoken splits by one pattern, and merges in the order of ids")
    byte_of = {c: b for b, c in bytes_to_unicode().items()}
    if model.get("ignore_merges"):  # a whole word that is in the vocabulary is one token
        words += [word for word in vocabulary if byte_of.keys() >= set(word)]
    ranks = {bytes(byte_of[c] for c in word): vocabulary[word] for word in words}
    ranks |= {bytes([b]): vocabulary.get(c, 2**31 + b) for c, b in byte_of.items()}
    known = {*merged, *(vocabulary.get(c) for c in byte_of)}
    fast = tiktoken.Encoding("bpe", pat_str=patterns[0], mergeable_ranks=ranks, special_tokens={})
    has_added_token = re.compile("|".join(map(re.escape, tokenizer.get_added_vocab()))).search

    def encode(text: str) -> list[int]:
        ids = [] if has_added_token(text) else fast.encode_ordinary(text)
        return ids if ids and known.issuperset(ids) else slow(text)
    return encode


# ------------------------------------------------------------------------------------------- data
# Rows of files and Hub data sets become preferences and samples, split by prompt into training and
# held out.  A line says how many rows were used, and why others were left out.


class Preference(NamedTuple):
    """A prompt, text or chat messages, and the response that people preferred to another."""
    prompt: Any
    chosen: str
    rejected: str


class Sample(NamedTuple):
    """A response to a prompt; None for what is still to be generated or scored.

    `truncated`: it was broken off, and is taught without an end.
    """
    prompt: Any
    response: Optional[str] = None
    reward: Optional[float] = None
    weight: Optional[float] = None
    source: str = "given"
    truncated: bool = False


TEXT, NUMBER, FLAG = "text", "a finite number", "true or false"
CHAT = 'a list of {"role", "content"} messages'
EITHER = f"{TEXT} or {CHAT}"
FIELDS = {"prompt": EITHER, "chosen": EITHER, "rejected": EITHER, "response": TEXT,
          "messages": CHAT, "reward": NUMBER, "weight": NUMBER, "source": TEXT, "truncated": FLAG}
PREFERENCE_FIELDS = ("prompt", "chosen", "rejected")
SAMPLE_FIELDS = ("prompt", "response", "messages", "reward", "weight", "source", "truncated")


def column_names(columns: list[str]) -> dict[str, list[str]]:
    """--columns as {our field: the data's columns}.  Raises BadInput for a mistyped one."""
    names = {}
    for entry in columns:
        name, _, theirs = entry.partition("=")
        require(theirs and name in FIELDS and name not in names, "--columns takes ours=theirs, "
                f"ours one of {', '.join(FIELDS)}, each once; not {entry!r}")
        names[name] = theirs.split("+")
    return names


def read_rows(source: str, expected: tuple[str, ...], columns: list[str],
              read: Callable[[dict], Any], quiet: bool = False) -> Iterator[tuple[str, Any]]:
    """(file or split, read(row)) of each row, a row {our field: value} without nulls.

    Says at the end how many rows were used, and why read() raised LeftOut for others.  Raises
    BadInput with the place of a row that is wrong, or if no row is used.
    """
    renamed = column_names(columns)
    names = {name: renamed.get(name, [name]) for name in expected}
    used, left_out, seen = 0, Counter(), set()
    for part, where, row in read_source(source):
        seen |= row.keys()
        try:
            values = {name: read_field(name, [row.get(theirs) for theirs in names[name]])
                      for name in expected}
            entry = read({name: value for name, value in values.items() if value is not None})
        except LeftOut as reason:
            left_out[str(reason)] += 1
            continue
        except BadInput as problem:
            raise BadInput(f"{where}, with {', '.join(row)}: {problem}") from problem
        used += 1
        yield part, entry
    for name in renamed.keys() & names:
        require(seen.issuperset(names[name]), f"{source}: --columns {name}: has no "
                f"{' or '.join(names[name])}; it has {', '.join(sorted(seen))}")
    report = [f"{source}: {used:,} of {used + left_out.total():,} rows used"]
    report += [f"left out: {count:,} {reason}" for reason, count in left_out.items()]
    unread = seen.difference(*names.values())
    if unread:
        report.append(f"columns not read: {', '.join(sorted(unread))}")
    require(used, "; ".join(report))
    if not quiet:
        print0("  " + "; ".join(report))


def read_field(name: str, values: list) -> Any:
    """A field's value from those of the data's columns, texts joined by a blank line; None for no
    value.  Raises BadInput for an unfit one."""
    values = [value for value in values if value is not None]
    if not values:
        return None
    if len(values) > 1 and all(isinstance(text, str) for text in values):
        values = ["\n\n".join(filter(None, values))]
    value, kind = values[0], FIELDS[name]
    if kind in (NUMBER, FLAG) and isinstance(value, str):  # of a CSV file
        with contextlib.suppress(ValueError):
            value = json.loads(value.lower())
    require(len(values) == 1 and is_kind(value, kind),
            f"the field {name!r} must be {kind}, not {value!r:.50}")
    if isinstance(value, list):  # Arrow fills the keys that only other messages have
        value = [{k: v for k, v in m.items() if v is not None} for m in value]
    return value


def is_kind(value: Any, kind: str) -> bool:
    """Whether a field's value is of the kind that is expected of it."""
    if isinstance(value, str):
        return kind in (TEXT, EITHER)
    if isinstance(value, list):
        return kind in (CHAT, EITHER) and value != [] and all(
            isinstance(message, dict) and isinstance(message.get("role"), str)
            and isinstance(message.get("content"), str) for message in value)
    if kind == NUMBER:
        return isinstance(value, (int, float)) and abs(value) < 1e300  # neither NaN nor infinite
    return kind == FLAG and value in (True, False)


DATA_FILE = re.compile(r".+\.(jsonl|jsonl\.gz|json|parquet|csv)")


def read_source(source: str) -> Iterator[tuple[str, str, dict]]:
    """(file or split, "file, line 7", row) of a file, a folder or a Hub data set: .jsonl,
    .jsonl.gz and .csv are read here, all else by the optional package `datasets`."""
    path = Path(source)
    if not path.exists():
        hub = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:/(.+))?", source)
        require(hub and not DATA_FILE.fullmatch(source),
                f"{source}: no such file, folder or Hub data set")
        yield from read_with_datasets(source, "", hub[1], data_dir=hub[2])
        return
    files = [file for file in files_in(path, DATA_FILES) if DATA_FILE.fullmatch(file.name)]
    require(files, f"{source}: no .jsonl, .jsonl.gz, .json, .parquet or .csv")
    for file in files:
        part = str(file.relative_to(path)) if path.is_dir() else file.name
        extension = DATA_FILE.fullmatch(file.name)[1]
        if extension in ("json", "parquet"):
            yield from read_with_datasets(str(file), part, extension, data_files=str(file))
            continue
        for where, row in (read_csv if extension == "csv" else read_jsonl)(file):
            yield part, where, row


def read_csv(path: Path) -> Iterator[tuple[str, dict]]:
    """Rows of a .csv, each with its place.  Raises BadInput at a bad one.

    Not by datasets, to which "None" and "N/A" are no text.
    """
    number = 0
    with open(path, encoding="utf-8-sig", newline="") as file:
        try:
            for number, row in enumerate(csv.DictReader(file), 1):
                require(None not in row, f"{path}, row {number}: more cells than columns")
                cells = {name: cell or None for name, cell in row.items() if name}
                yield f"{path}, row {number}", cells
        except (UnicodeDecodeError, csv.Error) as problem:
            raise BadInput(f"{path}, row {number + 1}: not CSV in UTF-8 ({problem})") from problem


def read_jsonl(path: Path) -> Iterator[tuple[str, dict]]:
    """Rows of a .jsonl(.gz), each with its place.  Raises BadInput at a bad one."""
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                row = json.loads(line)
                if b"\\u" in line:
                    json.dumps(row, ensure_ascii=False).encode()  # half a surrogate is no text
            except ValueError as problem:
                raise BadInput(f"{where}: not JSON in UTF-8 ({problem})") from problem
            require(isinstance(row, dict), f"{where}: not a JSON object")
            yield where, row


def read_with_datasets(source: str, part: str, loader: str,
                       **options: Any) -> Iterator[tuple[str, str, dict]]:
    """(part, or else the split, place, row) of what the `datasets` package reads."""
    try:
        import datasets
        splits = datasets.load_dataset(loader, **options)
    except Exception as problem:  # ImportError, and those of pyarrow, pandas and the Hub's client
        raise BadInput(f"{source}: the package `datasets` cannot read it: "
                       f"{problem.__cause__ or problem}") from problem
    for split, rows in splits.items():
        for number, row in enumerate(rows, 1):
            yield part or split, f"{source}, {split} row {number}", row


TURN = "\n\nAssistant:"  # the start of a reply in a transcript like HH's


def last_turn(prompt: Any, answer: Any) -> tuple[Any, str]:
    """(prompt, response) from an answer: a response, messages that may repeat the prompt, or,
    without a prompt, a transcript.  Raises LeftOut if that does not end with a reply."""
    response = answer
    replied = True
    if isinstance(answer, list):
        *before, last = answer
        if before and isinstance(prompt, list):
            require(before == prompt, "the field 'prompt' and the conversation beside it differ")
        prompt = before or prompt
        response = last["content"]
        replied = last["role"] == "assistant"
        unread = sorted(k for k, v in last.items() if v and k not in ("role", "content"))
        if unread:  # datasets fills what a message lacks with None
            print_once(f"  a reply's content alone is read, not its {', '.join(unread)}")
    elif prompt is None:
        start, turn, response = answer.rpartition(TURN)
        require(start.strip(), "without 'prompt', 'chosen' and 'rejected' must be transcripts: a "
                f"prompt, {TURN!r}, and a response")
        prompt = start + turn
        replied = "\n\nHuman:" not in response
    if not replied:
        raise LeftOut("that do not end with the assistant")
    return prompt, response


def preference_of(row: dict) -> Preference:
    """A row's preference; a prompt that both sides repeat is read once."""
    require({"chosen", "rejected"} <= row.keys(), "the field 'chosen' or 'rejected' is missing")
    given, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    both = (chosen, rejected)
    if given and all(isinstance(text, str) for text in (given, *both)):
        end = len(given.rstrip())  # a word that goes on is no repeat: "Hi" and "High"
        if all(text.startswith(given) and text[end:end + 1].isspace() for text in both):
            print_once("  prompts that chosen and rejected repeat are read once")
            chosen, rejected = chosen.removeprefix(given), rejected.removeprefix(given)
    prompt, chosen = last_turn(given, chosen)
    other_prompt, rejected = last_turn(given, rejected)
    require(prompt is not None, "the field 'prompt' is missing")
    if prompt != other_prompt:
        raise LeftOut("that differ in more than the last response")
    if not chosen.strip() or not rejected.strip():
        raise LeftOut("with an empty response")
    return Preference(prompt, chosen, rejected)


def sample_of(row: dict) -> Sample:
    """A row's sample; without a response it is a prompt to answer."""
    values = dict(row)
    messages = values.pop("messages", None)
    if messages:
        require("response" not in row, "the field 'messages' stands beside 'response': give one")
        values["prompt"] = messages
        if messages[-1]["role"] == "assistant":
            values["prompt"], values["response"] = last_turn(row.get("prompt"), messages)
    require("prompt" in values, "the field 'prompt' is missing")
    require("response" in values or "reward" not in values,
            "the field 'reward' has no response beside it")
    return Sample(**values)


def checked(codec: Codec, entry: Any) -> Any:
    """The preference or sample.  Raises LeftOut if its prompt or response cannot be used."""
    prompt = entry.prompt
    is_blank = isinstance(prompt, str) and not prompt.strip()
    if not prompt or is_blank:
        raise LeftOut("with an empty prompt")
    codec.prompt(prompt)  # raises LeftOut, as render_turn() does
    texts = [entry.chosen, entry.rejected] if isinstance(entry, Preference) else [entry.response]
    is_given = getattr(entry, "source", "given") != "generated"
    if isinstance(prompt, list) and is_given:
        for text in texts:
            if text is not None:
                codec.render_turn(prompt, text)
    return entry


@dataclass
class Data:
    """What a run reads, split by prompt; nothing held out is trained on."""
    preferences: list[Preference]           # to train the reward model on
    held_out_preferences: list[Preference]
    samples: list[Sample]                   # of --samples, in their order
    prompts: list                           # distinct, of the samples, or else of the preferences
    held_out_prompts: list                  # distinct, of both


def read_data(cfg: Config, base: Stage) -> Data:
    """Reads, checks and splits --preferences and --samples, or the toy world's preferences."""
    codec = Codec(base.path, cfg)
    can_score = cfg.reward_model or cfg.preferences
    pairs, samples = [], []  # (file or split, entry) each

    def usable_sample(row: dict) -> Sample:
        sample = checked(codec, sample_of(row))
        is_labelled = sample.reward is not None or sample.weight is not None
        require(can_score or is_labelled, "has no reward: give --reward_model, or --preferences "
                "to train one")
        require(sample.response is not None or cfg.samples_per_prompt,
                "has no response, and --samples_per_prompt 0 generates none")
        return sample
    if cfg.toy or cfg.preferences:
        source = cfg.preferences or toy_data(cfg.out, cfg.seed)
        pairs = list(read_rows(source, PREFERENCE_FIELDS, cfg.columns,
                               lambda row: checked(codec, preference_of(row))))
    if cfg.samples:
        samples = list(read_rows(cfg.samples, SAMPLE_FIELDS, cfg.columns, usable_sample))
    test_hashes = held_out_hashes(pairs, cfg) | held_out_hashes(samples, cfg)

    def split(entries: list) -> tuple[list, list]:
        train, test = [], []
        for _, entry in entries:
            part = test if prompt_hash(entry.prompt) in test_hashes else train
            part.append(entry)
        return train, test

    def distinct_prompts(entries: list) -> list:
        return list({prompt_hash(entry.prompt): entry.prompt for entry in entries}.values())
    train, test = split(pairs)
    train_samples, test_samples = split(samples)
    rng = random.Random(cfg.seed)
    rng.shuffle(train)
    rng.shuffle(test)
    prompts = distinct_prompts(train_samples if cfg.samples else train)
    held_out = distinct_prompts(test + test_samples)
    if test_samples:
        rng.shuffle(held_out)  # else the first file's are all that is evaluated
    require(prompts, "no prompt is left to train on: give more data, or a smaller --held_out")
    require(held_out or not cfg.eval_prompts, "no prompt is held out: there are too few, or they "
            "are another run's samples.jsonl, which left its own out; give more data, another "
            "--seed, a larger --held_out, or --eval_prompts 0")
    counts = {"prompts": (prompts, held_out), "preferences": (train, test),
              "samples": (train_samples, test_samples)}
    print0("  to train on and held out: " + ", ".join(
        f"{len(own):,} and {len(other):,} {name}" for name, (own, other) in counts.items() if own))
    return Data(train, test, train_samples, prompts, held_out)


TEST_PART = re.compile(r"(^|[/_.-])(test|valid|validation|val|eval|evaluation)([/_.-]|\d|$)")


def held_out_hashes(entries: list[tuple[str, Any]], cfg: Config) -> set[int]:
    """Hashes of the prompts that one source holds out: those in files or splits whose name says
    test, valid or eval; where none or all do, a share by hash and seed, so all scripts agree."""
    parts = {part for part, _ in entries}
    test = set(filter(TEST_PART.search, parts))

    def is_held_out(part: str, prompt: Any) -> bool:
        if 0 < len(test) < len(parts):
            return part in test
        return zlib.crc32(f"{cfg.seed} {prompt_key(prompt)}".encode()) < 2**32 * cfg.held_out
    return {prompt_hash(e.prompt) for part, e in entries if is_held_out(part, e.prompt)}


def prompt_key(prompt: Any) -> str:
    """A prompt as a string that identifies it."""
    return prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True)


def prompt_hash(prompt: Any) -> int:
    """64 bits that identify a prompt, where its text would take too much memory."""
    digest = hashlib.blake2b(prompt_key(prompt).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


# ---------------------------------------------------------------------------------------- batches
# Samples are tokenised once, into flat arrays on disk; a step slices them, in an order that depends
# on the seed alone.


class Example(NamedTuple):
    """A sequence, and what a loss needs beside."""
    ids: np.ndarray      # (T,) int32
    mask: np.ndarray     # (T,) bool, the response mask: the last tokens
    weight: float = 1.0
    columns: tuple = ()  # PPO's: a number for each response token


class Tokens:
    """Sequences (ids, mask), memory-mapped in a folder at 5 bytes a token."""

    def __init__(self, folder: Path, sequences: Callable[[], Iterable[tuple]]):
        """Rank 0 writes what sequences() yields."""
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
        self.ids = np.memmap(folder / "ids", dtype=np.int32, mode="r")
        self.mask = np.memmap(folder / "mask", dtype=bool, mode="r")
        self.lengths = np.diff(self.offsets)            # (n,)

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        span = slice(self.offsets[i], self.offsets[i + 1])
        return self.ids[span], self.mask[span]


class Examples:
    """What a policy trains on: some of the samples, each with a weight.

    tag(i, epoch) gives the ids between prompt and response of sample i; draw(epoch) the numbers of
    an epoch's examples, each once if omitted.
    """

    def __init__(self, tokens: Tokens, indices: Optional[np.ndarray] = None,
                 weight: Optional[np.ndarray] = None,
                 tag: Optional[Callable[[int, int], list[int]]] = None,
                 draw: Optional[Callable[[int], np.ndarray]] = None):
        self.tokens, self.tag, self.draw = tokens, tag, draw
        self.indices = np.arange(len(tokens.lengths)) if indices is None else indices
        self.weight = np.ones(len(tokens.lengths)) if weight is None else weight

    def __len__(self) -> int:
        return len(self.indices)

    def example(self, i: int, epoch: int = 0) -> Example:
        """The i-th example as this epoch reads it."""
        index = int(self.indices[i])
        ids, mask = self.tokens[index]
        if self.tag:
            tag = self.tag(index, epoch)
            start = len(mask) - int(mask.sum())  # where the response begins
            ids = np.insert(ids, start, tag)
            mask = np.insert(mask, start, [False] * len(tag))
        return Example(ids, mask, float(self.weight[index]))


class MicroBatch(NamedTuple):
    """What one forward takes: packed sequences of T tokens, N of which are learnt."""
    input_ids: torch.Tensor      # (T,) int64
    lengths: list[int]           # of the sequences
    rows: torch.Tensor           # (N,) int64, the positions that predict a response token
    targets: torch.Tensor        # (N,) int64, those tokens
    weight: torch.Tensor         # (N,) float32, their sequences' weights
    columns: list[torch.Tensor]  # (N,) float32 each


class Batch:
    """An optimiser step: this rank's micro-batches, and what the sum of losses is divided by."""

    def __init__(self, examples: list[Example], cfg: Config, padded: bool):
        lengths = [len(e.ids) for e in examples]
        shares = shard_micro_batches(lengths, cfg.micro_batch_tokens, padded)
        self.micros = [micro_batch(examples, share) for share in shares]
        self.tokens = int(sum(e.mask.sum() for e in examples))  # of responses, on all ranks
        self.normaliser = max(1, self.tokens) / world_size()    # DDP averages over ranks


def micro_batch(examples: list[Example], share: list[int]) -> MicroBatch:
    """The examples of a share.  A rank whose share is empty reads the first example and learns
    nothing from it, as the other ranks' collectives wait for its forward."""
    if not share:
        first = examples[0]
        return collate([first._replace(mask=np.zeros_like(first.mask))])
    return collate([examples[i] for i in share])


def collate(examples: list[Example]) -> MicroBatch:
    """Examples as packed tensors."""
    lengths = [len(e.ids) for e in examples]
    ids = np.concatenate([e.ids for e in examples])
    predicts = np.concatenate([np.append(e.mask[1:], False) for e in examples])  # t predicts t + 1
    rows = np.flatnonzero(predicts)
    weight = np.repeat([e.weight for e in examples], lengths)[rows]
    by_column = zip(*(e.columns for e in examples))
    columns = [np.concatenate(column)[:len(rows)] for column in by_column]  # or none, with N = 0

    def tensor(array: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
        return torch.as_tensor(array).to(device(), dtype, non_blocking=True)
    ids, rows = tensor(ids, torch.int64), tensor(rows, torch.int64)
    return MicroBatch(ids, lengths, rows, ids[rows + 1], tensor(weight, torch.float32),
                      [tensor(column, torch.float32) for column in columns])


def group_by_token_budget(lengths: list[int], budget: int, padded: bool) -> list[list[int]]:
    """Indices into lengths, longest first, in groups of at most `budget` tokens (or of one
    sequence): count x longest where they are padded, their sum where they are packed."""
    groups: list[list[int]] = []
    room = longest = 0  # of the last group
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not groups or room < (longest if padded else lengths[i]):
            groups.append([])
            room, longest = budget, lengths[i]
        groups[-1].append(i)
        room -= longest if padded else lengths[i]
    return groups


def shard_micro_batches(lengths: list[int], budget: int, padded: bool) -> list[list[int]]:
    """This rank's groups of sequences; as many as every other rank has, the last perhaps empty."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    by_rank = []
    for r in range(world_size()):
        share = order[r::world_size()]  # lengths alike on all ranks
        groups = group_by_token_budget([lengths[i] for i in share], budget, padded)
        by_rank.append([[share[j] for j in group] for group in groups])
    count = max(len(groups) for groups in by_rank)
    own = by_rank[rank()]
    return own + [[]] * (count - len(own))


def step_indices(examples: int, batch_size: int, seed: int, steps: int,
                 first: int = 0) -> Iterator[tuple[int, int, np.ndarray]]:
    """(step, epoch, its examples) from the `first` step on; each epoch has an order of its own."""
    per_epoch = math.ceil(examples / batch_size)
    for step in range(first, steps):
        epoch, step_of_epoch = divmod(step, per_epoch)
        if step == first or step_of_epoch == 0:
            order = np.random.default_rng((seed, epoch)).permutation(examples)
        start = step_of_epoch * batch_size
        yield step, epoch, order[start:start + batch_size]


def plan_steps(examples: int, cfg: Config) -> int:
    """Optimiser steps of a run; prints them, and what else training will take."""
    per_epoch = math.ceil(examples / cfg.batch_size)
    steps = cfg.steps or cfg.epochs * per_epoch
    dtype = str(compute_dtype(cfg)).removeprefix("torch.")
    print0(f"  {examples:,} sequences; {steps:,} steps of {cfg.batch_size} over {world_size()} "
           f"rank(s), {steps / per_epoch:.2f} epochs; at most {cfg.micro_batch_tokens:,} tokens a "
           f"forward; {dtype} on {device()}")
    return steps


FORWARD_ONLY = 4  # times as many tokens where no activations are kept


@torch.no_grad()  # not inference mode: what FSDP gathers in it could not serve training
def each_response_token(compute: Callable[[MicroBatch], torch.Tensor], model: Any,
                        examples: list[Example], cfg: Config, cost: Cost) -> list[list[float]]:
    """What compute(micro-batch) -> (N,) gets from `model`: a list for each response, on every rank;
    ranks share the work."""
    values: dict[int, list[float]] = {}
    lengths = [len(e.ids) for e in examples]
    budget = FORWARD_ONLY * cfg.micro_batch_tokens
    for share in shard_micro_batches(lengths, budget, is_padded(model)):
        micro = micro_batch(examples, share)
        cost.add_forward(model, len(micro.input_ids))
        sizes = [int(examples[i].mask.sum()) for i in share]
        each = compute(micro).split(sizes)
        values |= {i: tokens.tolist() for i, tokens in zip(share, each)}
    return gather_by_index(values, len(examples))


# ------------------------------------------------------------------------------- packed attention
# A micro-batch is one line of tokens, sequence after sequence, by transformers' own contract: where
# each begins travels as `cu_seq_lens_q` to the attention function.  It builds no mask.

PACKED = "packed"     # transformers' name for attention(), below
PADDED_BELOW = 256    # hidden width: for smaller models padding costs less than a call a sequence
IGNORED = frozenset((  # arguments that change nothing here, where dropout is off
    "dropout", "position_ids", "cache_position", "cu_seq_lens_k", "max_length_k", "use_cache",
    "return_dict", "output_attentions", "output_hidden_states", "output_router_logits"))


def attention(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
              attention_mask: Optional[torch.Tensor], scaling: Optional[float] = None,
              sliding_window: Optional[int] = None, is_causal: Optional[bool] = None,
              cu_seq_lens_q: Optional[torch.Tensor] = None, max_length_q: int = 0,
              kv_step: Any = None, **more: Any) -> tuple[torch.Tensor, None]:
    """Causal attention, (B, heads, T, D) -> (B, T, heads, D): within packed sequences (B = 1), as
    the sampler's `kv_step` does it, or of whole sequences.

    Raises TypeError for what it cannot do: a mask of the model's own, sinks, a soft-cap, ...
    """
    given = {"attention_mask": attention_mask, **more}
    unknown = [name for name in given if given[name] is not None and name not in IGNORED]
    if unknown or (is_causal is False and query.shape[2] > 1):
        raise TypeError(f"its attention takes {', '.join(unknown) or 'is_causal=False'}")
    if kv_step is not None:
        return kv_step.attend(module, query, key, value, scaling, sliding_window, cu_seq_lens_q,
                              max_length_q), None
    window = sliding_window or 2**31  # none: longer than any sequence
    dim = query.shape[3]
    fits_flash = value.dtype.itemsize == 2 and dim == value.shape[3] and dim <= 256 and dim % 8 == 0
    if cu_seq_lens_q is not None and query.is_cuda and fits_flash:
        from torch.nn.attention.varlen import varlen_attn
        q, k, v = (x[0].transpose(0, 1).to(value.dtype) for x in (query, key, value))  # (T, ., D)
        group = query.shape[1] // key.shape[1]  # heads that share a key
        left = window - 1 if window < max_length_q else -1  # tokens seen before its own; -1: all
        out = varlen_attn(
            q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), cu_seq_lens_q,
            cu_seq_lens_q, max_length_q, max_length_q, scale=scaling, window_size=(left, 0))
        return out[None], None
    if cu_seq_lens_q is None:
        return causal_attention(query, key, value, scaling, window).contiguous(), None
    lengths = cu_seq_lens_q.diff().tolist()
    sequences = zip(*(x.split(lengths, dim=2) for x in (query, key, value)))
    return torch.cat([causal_attention(*qkv, scaling, window) for qkv in sequences], dim=1), None


def causal_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                     scaling: Optional[float], window: int) -> torch.Tensor:
    """Whole sequences' causal attention within a window: (B, heads, T, D) -> (B, T, heads, D)."""
    t = query.shape[2]
    band = None
    if t > window:
        band = torch.ones(t, t, dtype=torch.bool, device=key.device).tril().triu(1 - window)
    if query.is_cuda:  # its fast float32 kernels know no grouped heads
        group = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(group, 1) for x in (key, value))
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, band, is_causal=band is None, scale=scaling,
        enable_gqa=True).transpose(1, 2)


def body_of(model: Any) -> Any:
    """The model without its head; Llama 4's class calls the whole of itself its base model."""
    return model.base_model if model.base_model is not model else model.model


def is_packed(model: Any) -> bool:
    """Whether the model was proven to read packed sequences."""
    return model.config.get_text_config()._attn_implementation == PACKED


def is_padded(model: Any) -> bool:
    """Whether the model's micro-batches are padded: it cannot be packed, or is too small for it."""
    return not is_packed(model) or model.config.get_text_config().hidden_size < PADDED_BELOW


def hidden_states(model: Any, ids: torch.Tensor, lengths: list[int],
                  kv_step: Any = None) -> torch.Tensor:
    """The body's last hidden states (T, D) of sequences of these lengths, ids (T,) end to end.
    With `kv_step` they are packed, and its attend() replaces attention()."""
    body = body_of(model)
    if kv_step is None and is_padded(model):
        # padding comes after a sequence, where causal attention does not look: no mask is needed
        padded = torch.nn.utils.rnn.pad_sequence(ids.split(lengths), batch_first=True)
        hidden = body(input_ids=padded, use_cache=False).last_hidden_state  # (B, longest, D)
        return torch.cat([states[:n] for states, n in zip(hidden, lengths)])
    ends = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)                 # (B + 1,)
    position = torch.cat([torch.arange(n) for n in lengths])                        # (T,)
    ends, position = (x.to(ids.device, non_blocking=True) for x in (ends, position))
    return body(input_ids=ids[None], position_ids=position[None], cu_seq_lens_q=ends,
                cu_seq_lens_k=ends, max_length_q=max(lengths), max_length_k=max(lengths),
                use_cache=False, kv_step=kv_step).last_hidden_state[0]


def enable_packing(model: Any) -> Any:
    """The model, made to read packed sequences if it is proven to read each as if it were alone;
    else as it was, to be padded, and the reason is printed."""
    from transformers import AttentionInterface
    AttentionInterface.register(PACKED, attention)
    implementation = model.config._attn_implementation
    try:
        pair = probe_ids(model, 24).split([9, 15])
        with torch.no_grad():
            alone = [hidden_states(model, ids, [len(ids)]) for ids in pair]
        model.set_attn_implementation(PACKED)
        reason = packing_obstacle(model, pair, alone)
    except Exception as problem:  # whatever the code of some other architecture raises
        reason = str(problem).split("\n")[0] or type(problem).__name__
    if reason:
        model.set_attn_implementation(implementation)
        print_once(f"  a {type(model).__name__} is padded: {reason}")
    return model


def packing_obstacle(model: Any, pair: tuple, alone: list[torch.Tensor]) -> Optional[str]:
    """Why this pair of sequences, with hidden states `alone` each, would not be read so when packed
    and then continued from a cache; None if it would.  Longer sequences and windows are as exact,
    since attention() is told where each begins."""
    windows = layer_windows(model.config.get_text_config())

    def read_two(ids: torch.Tensor) -> torch.Tensor:
        one, other = map(tuple, ids.view(2, 2).tolist())
        return KVCache(2, 2).read_prompts(model, {one: [0], other: [1]})
    influence = token_influence(model, read_two)
    if influence[2:, :2].any() or influence[:2, 2:].any():
        return "it mixes tokens where nothing tells it which sequence each belongs to"
    a, b = pair  # b is the longer
    cache = KVCache(2, len(b))
    prompts = {tuple(a[:-1].tolist()): [0], tuple(b[:-1].tolist()): [1]}
    ends = [len(a) - 1, len(b) - 1]
    with torch.no_grad():  # all but their last tokens packed, then a decode step for these
        packed = cache.read_prompts(model, prompts)                                     # (T - 2, D)
        last = cache.decode(model, torch.stack([a[-1], b[-1]]),
                            torch.tensor(ends, device=a.device))                        # (2, D)
    if list(cache.windows.values()) != windows:
        return "its attention layers are not those of its config, or have other windows"
    first, second = packed.split(ends)
    ours = torch.cat([first, last[:1], second, last[1:]])
    theirs = torch.cat(alone)
    error = (ours - theirs).float().norm() / theirs.float().norm()
    exact = model.dtype == torch.float32 and model.device.type == "cpu"
    return None if error < (1e-4 if exact else 0.05) else "it reads packed sequences differently"


def token_influence(model: Any, read: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """The size of d hidden state t / d input embedding s at [t, s], (T, T), where read() gives the
    hidden states (T, D) of ids (T,), T = 4."""
    embedded = []

    def cut(layer: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        embedded.append(output.detach().requires_grad_())                               # (1, T, D)
        return embedded[0].clone()  # some models add to it in place
    hook = model.get_input_embeddings().register_forward_hook(cut)
    try:
        with torch.enable_grad():
            hidden = read(probe_ids(model, 4)).float()                                  # (T, D)
    finally:
        hook.remove()
    # a plain sum would be constant after a LayerNorm
    direction = torch.linspace(1, 2, hidden.shape[1], device=hidden.device)
    gradients = [torch.autograd.grad(state @ direction, embedded[0], retain_graph=True)[0][0]
                 for state in hidden]
    return torch.stack(gradients).abs().amax(-1)


def layer_windows(config: Any) -> list[Optional[int]]:
    """The sliding window of each layer by the text model's config.  Raises ValueError where a layer
    is neither full nor sliding attention."""
    windows = {"full_attention": None, "sliding_attention": getattr(config, "sliding_window", None)}
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    other = sorted({*map(str, kinds)} - windows.keys())
    if getattr(config, "attention_chunk_size", None):
        other.append("attention in chunks")
    if other:
        raise ValueError(f"it has layers of {', '.join(other)}")
    return [windows[kind] for kind in kinds]


def check_causal(name: str, model: Any) -> None:
    """Raises BadInput if a token's hidden state depends on a later token."""
    read = functools.partial(hidden_states, model, lengths=[4])
    require(not token_influence(model, read).triu(1).any(),
            f"{name}: its attention looks ahead, so it is no causal language model")


def probe_ids(model: Any, count: int) -> torch.Tensor:
    """Token ids (count,) from all over the vocabulary."""
    vocabulary = model.get_input_embeddings().num_embeddings
    return torch.arange(count, device=model.device) * 1009 % vocabulary


# ----------------------------------------------------------------------------------------- models


def load_model(name: str, dtype: torch.dtype = torch.float32, where: Optional[torch.device] = None,
               auto_class: str = "AutoModelForCausalLM", heads: tuple = (), **more: Any) -> Any:
    """A transformers model on this rank's device, always in eval mode (dropout off): with dropout,
    a gradient would depend on how a batch is cut.

    Raises BadInput if a weight is missing or unknown, except those whose names start with `heads`.
    """
    import transformers
    with load_errors(name, f"weights of {auto_class}"):
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
        require(not config.is_encoder_decoder, f"{name}: an encoder-decoder; give a decoder-only "
                "language model")
        model, report = getattr(transformers, auto_class).from_pretrained(
            name, dtype=dtype, use_safetensors=True, trust_remote_code=False,
            output_loading_info=True, ignore_mismatched_sizes=True, **more)  # reported below
    wrong = []
    for how in ("missing", "unexpected", "mismatched"):
        for key in sorted(map(str, report[f"{how}_keys"])):
            is_buffer = re.search(r"\battn(\.attention)?\.(masked_)?bias$", key)  # GPT-2's old mask
            if not key.startswith(heads) and not is_buffer:
                wrong.append(f"{key} ({how})")
    require(not wrong, f"{name}: weights do not fit: {', '.join(wrong[:4])}, {len(wrong)} in all")
    model = model.to(where or device()).eval()
    check_causal(name, model)
    enable_packing(model)
    if auto_class == "AutoModelForCausalLM":
        check_linear_head(name, model)
    return model


@torch.no_grad()
def check_linear_head(name: str, model: Any) -> None:
    """Raises BadInput unless the model begins in an embedding and its logits are hidden states
    times a head without bias, scaled or soft-capped."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    require(isinstance(embedding, torch.nn.Embedding),
            f"{name}: a {type(model).__name__} has no embedding of its tokens")
    require(type(head) is torch.nn.Linear and head.bias is None,
            f"{name}: the fused loss needs an output head that is a linear layer without a bias")
    ids = probe_ids(model, 8)
    # not packed: the model's own forward below is not, and other kernels round otherwise
    hidden = body_of(model)(input_ids=ids[None], use_cache=False).last_hidden_state[0]
    ours = logits_of(model, hidden)
    theirs = model(input_ids=ids[None], use_cache=False).logits[0].float()
    size = float(theirs.abs().max())
    require(math.isfinite(size) and torch.allclose(ours, theirs, rtol=1e-2, atol=1e-3 * size),
            f"{name}: its logits are not hidden states times head, which the fused loss needs, or "
            "not finite")


def head_transform(model: Any) -> tuple[float, Optional[float]]:
    """(scale, cap) of logits = cap tanh(scale hidden @ head / cap), or without a cap."""
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0           # Cohere
    scale *= getattr(config, "lm_head_multiplier", None) or 1.0   # Falcon-H1
    scale /= getattr(config, "logits_scaling", None) or 1.0       # Granite
    return scale, getattr(config, "final_logit_softcapping", None)  # Gemma


def logits_of(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    """The head's logits (N, V) float32 of last hidden states (N, D)."""
    scale, cap = head_transform(model)
    logits = model.get_output_embeddings()(hidden).float() * scale
    return cap * (logits / cap).tanh() if cap else logits


def autocast(dtype: torch.dtype) -> torch.autocast:
    """Matrix products in this dtype."""
    return torch.autocast(device().type, dtype, enabled=dtype != torch.float32)


class Policy(torch.nn.Module):
    """A causal language model whose forward ends in the fused loss: so the hooks of DDP and FSDP
    cover body and head alike."""

    def __init__(self, model: Any, cfg: Config):
        super().__init__()
        self.model, self.dtype = model, compute_dtype(cfg)
        self.scale, self.cap = head_transform(model)

    def forward(self, micro: MicroBatch, kernel: Callable, *columns: torch.Tensor) -> torch.Tensor:
        """The kernel's loss, summed over the response tokens: a float32 scalar.  columns (N,)."""
        with autocast(self.dtype):
            hidden, weight = self.head_inputs(micro)                                # (N, D), (V, D)
            if self.cap:
                kernel = functools.partial(capped_kernel, kernel, self.cap)
            return head_loss(kernel, hidden, weight, micro.targets, *columns)

    @torch.no_grad()
    def log_probs(self, micro: MicroBatch, temperature: float) -> torch.Tensor:
        """Each response token's log-prob at the temperature, at 1 if it is 0: (N,) float32."""
        with autocast(self.dtype):
            hidden, weight = self.head_inputs(micro)                                # (N, D), (V, D)
            dtype = product_dtype(weight)
        log_probs = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)     # (N,)
        for part, logits in logit_chunks(hidden.to(dtype), weight.to(dtype)):
            if self.cap:
                logits.div_(self.cap).tanh_().mul_(self.cap)
            log_p = (logits.float() / (temperature or 1.0)).log_softmax(-1)             # (n, V)
            log_probs[part] = log_p.gather(1, micro.targets[part, None]).squeeze(1)
        return log_probs

    def head_inputs(self, micro: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """The hidden states (N, D) that predict response tokens, scaled, and the head (V, D)."""
        hidden = hidden_states(self.model, micro.input_ids, micro.lengths)[micro.rows]
        return hidden * self.scale, self.model.get_output_embeddings().weight


def capped_kernel(kernel: Callable, cap: float, logits: torch.Tensor,
                  *columns: torch.Tensor) -> torch.Tensor:
    """head_loss's kernel on soft-capped logits, cap tanh(logits / cap); in place."""
    logits.div_(cap).tanh_().mul_(cap)
    slope = 1 - (logits / cap).square()  # d capped / d logits
    loss = kernel(logits, *columns)
    logits.mul_(slope)
    return loss


def load_policy(name: str, cfg: Config, frozen: bool = False) -> torch.nn.Module:
    """A policy, wrapped for several ranks: to train, with float32 weights, or frozen, for its
    log_probs, in the compute dtype."""
    bare = frozen and not is_sharded(cfg)  # DDP refuses a model that needs no gradients
    dtype = compute_dtype(cfg) if bare else torch.float32
    model = load_for_training(functools.partial(load_model, name, dtype), cfg)
    if frozen:
        model.requires_grad_(False)
    policy = Policy(model, cfg)
    return policy if bare else wrap_for_ranks(policy, cfg, "log_probs")


def is_sharded(cfg: Config) -> bool:
    """Whether training spreads its models over ranks."""
    return cfg.sharding == "fsdp" and dist.is_initialized()


def blocks_of(module: torch.nn.Module) -> list:
    """The transformer blocks, by the class names that transformers says not to split."""
    names = {n for part in module.modules() for n in getattr(part, "_no_split_modules", None) or ()}
    return [part for part in module.modules() if type(part).__name__ in names]


def load_for_training(load: Callable, cfg: Config) -> Any:
    """load(where=): what text does not use is frozen; blocks are recomputed in backward if the
    flags say so, else compiled on a GPU.

    If it is to be sharded, rank 0 loads it on its CPU; the other ranks' weights are unset.
    """
    sharded = is_sharded(cfg)
    model = None
    if rank() == 0 or not sharded:
        model = load(where=torch.device("cpu") if sharded else device())
    if sharded:
        model_class, config = gather((type(model), getattr(model, "config", None)))[0]
        if model is None:
            model = meta_model(model_class, config).to_empty(device="cpu")
        model.tie_weights()
    if model.config.get_text_config() is not model.config:  # of several modes
        used = {*model.get_decoder().parameters(), *model.get_input_embeddings().parameters()}
        for weight in {*body_of(model).parameters()} - used:
            weight.requires_grad_(False)  # DDP would wait for a vision tower's gradient
    for block in blocks_of(model):
        if cfg.gradient_checkpointing:  # transformers' own needs training mode: some would drop out
            block.forward = functools.partial(torch.utils.checkpoint.checkpoint, block.forward,
                                              use_reentrant=False)
        elif device().type == "cuda":
            block.compile(dynamic=True)
    return model


def meta_model(model_class: type, config: Any) -> Any:
    """A model of this class and shape, in eval mode, whose weights take no memory."""
    from transformers import AttentionInterface
    AttentionInterface.register(PACKED, attention)
    attn_implementation = config._attn_implementation
    with torch.device("meta"):
        model = model_class(config).eval()
    model.set_attn_implementation(attn_implementation)
    return model


def wrap_for_ranks(module: torch.nn.Module, cfg: Config, *methods: str) -> torch.nn.Module:
    """The module under DDP or FSDP2 where there are several ranks; `methods` compute with its
    weights beside forward.  FSDP2 keeps weights and reduces gradients in float32, and gathers a
    block's in the compute dtype for as long as it computes."""
    if not is_sharded(cfg):
        if world_size() == 1:
            return module
        gpu = [device()] if device().type == "cuda" else None
        torch._dynamo.config.optimize_ddp = False  # it would split the blocks' graphs
        return torch.nn.parallel.DistributedDataParallel(module, device_ids=gpu,
                                                         gradient_as_bucket_view=True)
    from torch.distributed import fsdp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
    weights = module.state_dict() if rank() == 0 else {}
    dtype = compute_dtype(cfg)
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
    """A copy in `dtype`, never sharded.  All ranks call it together: those that need no copy, with
    the meta device."""
    weights = {name: (p.full_tensor() if hasattr(p, "full_tensor") else p).to(where, dtype)
               for name, p in model.named_parameters()}
    whole = meta_model(type(model), model.config)
    whole.load_state_dict(weights, strict=False, assign=True)  # a tied head has no entry of its own
    whole.tie_weights()
    for part, old in zip(whole.modules(), model.modules()):
        for name, buffer in old.named_buffers(recurse=False):
            setattr(part, name, buffer.to(where))
    if hasattr(model, "generation_config"):  # a reward model has none
        whole.generation_config = model.generation_config
    return whole


def sampling_copy(model: Any, cfg: Config) -> Any:
    """What to sample from while a model trains: itself, or a whole copy in the compute dtype."""
    dtype = compute_dtype(cfg)
    if dtype == torch.float32 and not is_sharded(cfg):
        return model
    return whole_copy(model, dtype, device())


def make_optimizer(model: torch.nn.Module, lr: float, steps: int) -> tuple[Any, Any]:
    """AdamW with weight decay on matrices only, and its schedule: 3 % warm-up, then cosine to 0."""
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        [{"params": [p for p in weights if p.dim() >= 2], "weight_decay": 0.1},
         {"params": [p for p in weights if p.dim() < 2], "weight_decay": 0.0}],
        lr=lr, betas=(0.9, 0.99), fused=True)
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
        generation = getattr(model, "generation_config", None)
        if generation is not None:
            generation.eos_token_id = codec.stop_ids  # all that end a response
            try:
                generation.validate(strict=True)
            except ValueError:
                generation.do_sample = True  # transformers saves no temperature or top_p without
        model.to(compute_dtype(cfg)).save_pretrained(folder)
        codec.tokenizer.save_pretrained(folder)
        (folder / "README.md").write_text(card, encoding="utf-8")
    barrier()


POLICY_CARD = """---
base_model: {base}
tags: [offline-rlhf, {algorithm}]
---
Trained from `{base}` on `{data}` by {algorithm}, after *Aligning Language Models with Offline
Reinforcement Learning from Human Feedback* (arXiv 2308.12050). Flags: {flags}.

{end}"""


def save_policy(folder: Path, policy: torch.nn.Module, codec: Codec, cfg: Config, tag: str = "",
                card_end: str = "") -> None:
    """Writes the policy's folder.  Its chat template ends a prompt with `tag`, its model card with
    `card_end`."""
    if tag and codec.tokenizer.chat_template:
        # Jinja drops a template's last newline, which now is not the last any more
        template = re.sub(r"(\r\n|\r|\n)\Z", "", codec.tokenizer.get_chat_template())
        written = "{{ '" + tag + "' if add_generation_prompt else '' }}"
        codec.tokenizer.chat_template = template + written
    flags = ", ".join(f"{name} {value}" for name, value in cfg.training_flags().items())
    card = POLICY_CARD.format(
        base=cfg.model or "toy", data=cfg.samples or cfg.preferences or "the toy world",
        algorithm=folder.name.strip("."), flags=flags, end=card_end)
    save_folder(folder, getattr(policy, "module", policy).model, codec, cfg, card)


# -------------------------------------------------------------------------------- fused head loss
# Loss and gradient a chunk of rows at a time, so that of the (N, V) logits no more exists: one GEMM
# into a buffer, the script's kernel turns logits into d loss / d logits in place, two GEMMs bring
# the gradients of hidden states and head.

CHUNK_BYTES = {"cpu": 2**28, "cuda": 2**31}  # of logits, held at once
EAGER_BELOW = 4096  # vocabulary: on a CPU, compiling for a smaller one costs more than it brings


def head_loss(kernel: Callable, hidden: torch.Tensor, weight: torch.Tensor,
              *columns: torch.Tensor) -> torch.Tensor:
    """Sum over rows of the kernel's loss, differentiable in hidden (N, D) and the head's weight
    (V, D): a scalar, float32 (float64 for float64); N = 0 gives a zero with gradients.

    kernel(logits (n, V), *columns (n,)) must leave d loss / d logits in logits and return each
    row's loss (n,).
    """
    hidden = hidden.to(product_dtype(weight))
    if not torch.is_grad_enabled():
        weight = weight.detach()  # else its gradient is computed all the same
    apply = torch.compiler.disable(HeadLoss.apply)  # a compiled caller breaks its graph here
    return apply(hidden, weight, kernel, *columns)


def product_dtype(weight: torch.Tensor) -> torch.dtype:
    """The dtype of products with the weight: autocast's, or else its own."""
    device_type = weight.device.type
    is_mixed = torch.is_autocast_enabled(device_type)
    return torch.get_autocast_dtype(device_type) if is_mixed else weight.dtype


class HeadLoss(torch.autograd.Function):
    """head_loss: forward computes the gradients, backward scales them."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, kernel: Callable,
                *columns: torch.Tensor) -> torch.Tensor:
        acc_dtype = torch.promote_types(hidden.dtype, torch.float32)
        head = weight.to(hidden.dtype)
        # a GPU's product of 16-bit matrices can be written in float32
        options = {"out_dtype": acc_dtype} if hidden.dtype != acc_dtype and hidden.is_cuda else {}
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
                grad_weight += torch.mm(logits.t(), hidden[part], **options)
        ctx.save_for_backward(grad_hidden, grad_weight.to(weight.dtype) if want_weight else None)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple:
        # in place, to hold no second copy; a second backward is then an error
        grads = [g if g is None else g.mul_(upstream.to(g.dtype)) for g in ctx.saved_tensors]
        others = len(ctx.needs_input_grad) - len(grads)  # kernel and columns have no gradient
        return *grads, *([None] * others)


def logit_chunks(hidden: torch.Tensor,
                 weight: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """(rows, their logits (n, V)): of hidden (N, D) as many at a time as CHUNK_BYTES hold."""
    stride = math.ceil(len(weight) / 64) * 64  # GEMMs are fastest into aligned rows
    limit = max(1, CHUNK_BYTES[hidden.device.type] // (stride * hidden.element_size()))
    chunks = max(1, math.ceil(len(hidden) / limit))
    size = max(1, math.ceil(len(hidden) / chunks))  # chunks of about one size
    buffer = hidden.new_empty(size, stride)
    for start in range(0, len(hidden), size):
        part = slice(start, start + size)
        logits = buffer[:len(hidden[part]), :len(weight)]
        yield part, torch.mm(hidden[part], weight.t(), out=logits)


def compiled(kernel: Callable) -> Callable:
    """torch.compile(kernel), at its first call: the number of rows is dynamic, the vocabulary not,
    which would take a GPU twice as long.

    Uncompiled for a small vocabulary on a CPU.
    """
    once = functools.cache(lambda: torch.compile(kernel))

    @functools.wraps(kernel)
    def call(logits: torch.Tensor, *args: Any, **more: Any) -> Any:
        if logits.device.type == "cpu" and logits.shape[1] < EAGER_BELOW:
            return kernel(logits, *args, **more)
        for column in (logits, *args):
            torch._dynamo.maybe_mark_dynamic(column, 0)
        return once()(logits, *args, **more)
    return call


# ---------------------------------------------------------------------------------------- sampler
# A fixed number of slots, each a lane of a preallocated cache, or two to guide by.  A response that
# has ended gives its slot to the next prompt; prompts are read packed.  Nothing is padded, no cache
# copied; on a GPU the decode step is compiled block by block and replayed as a CUDA graph.

SLOTS = {"cpu": 64, "cuda": 512}  # responses sampled at a time, at most


class Response(NamedTuple):
    """A sampled response: ids, with the stop token that ended it, log-probs, whether it was cut."""
    ids: list[int]
    log_probs: list[float]
    truncated: bool


class KVCache:
    """Keys and values of L lanes, S positions each, for every layer."""

    def __init__(self, lanes: int, length: int):
        self.lanes, self.length = lanes, length
        self.layers: dict[Any, list[torch.Tensor]] = {}  # layer -> keys, values (L, S, heads, D)
        self.windows: dict[Any, Optional[int]] = {}      # the same layers' sliding windows
        self.flash = device().type == "cuda"             # until its kernel fails

    def store(self, layer: Any, key: torch.Tensor, value: torch.Tensor, lanes: torch.Tensor,
              positions: torch.Tensor, source: Any = slice(None)) -> None:
        """Keeps new keys and values (B, heads, T, D): of their B T tokens those in `source`, each
        at its lane and position (n,)."""
        if layer not in self.layers:
            self.layers[layer] = [x.new_zeros(self.lanes, self.length, x.shape[1], x.shape[3])
                                  for x in (key, value)]
        for kept, new in zip(self.layers[layer], (key, value)):
            kept[lanes, positions] = new.transpose(1, 2).flatten(0, 1)[source]      # (n, heads, D)

    def read_prompts(self, model: Any, prompts: dict[tuple, list[int]]) -> torch.Tensor:
        """Reads prompts, each into all the lanes named: their last hidden states (T, D), packed."""
        lanes, positions, sources = [], [], []
        start = 0  # of a prompt among the packed ones
        for prompt, wanted_by in prompts.items():
            span = torch.arange(len(prompt))
            for lane in wanted_by:
                lanes.append(torch.full_like(span, lane))
                positions.append(span)
                sources.append(start + span)
            start += len(prompt)
        self.windows = {}     # noted anew in each forward
        where = model.device  # rank 0 probes a model to be sharded on its CPU
        step = PromptStep(self, *(torch.cat(x).to(where) for x in (lanes, positions, sources)))
        ids = torch.tensor(list(itertools.chain(*prompts)), device=where)                   # (T,)
        return hidden_states(model, ids, [len(prompt) for prompt in prompts], step)

    def decode(self, model: Any, tokens: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """Last hidden states (L, D) of a token (L,) for each lane, at its position (L,)."""
        return body_of(model)(input_ids=tokens[:, None], position_ids=position[:, None],
                              use_cache=False,
                              kv_step=DecodeStep(self, position)).last_hidden_state[:, -1]

    def keep(self, lanes: torch.Tensor) -> None:
        """Forgets all lanes but these."""
        self.lanes = len(lanes)
        for pair in self.layers.values():
            pair[:] = [x[lanes] for x in pair]


@dataclass
class PromptStep:
    """A forward that reads packed prompts into lanes: of its T tokens `sources` (n,) go to these
    lanes and positions (n,)."""
    cache: KVCache
    lanes: torch.Tensor
    positions: torch.Tensor
    sources: torch.Tensor

    @torch.compiler.disable  # it looks a layer up: each would have a compilation of its own
    def attend(self, layer: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
               scale: Optional[float], window: Optional[int], ends: torch.Tensor,
               longest: int) -> torch.Tensor:
        """attention() of packed prompts to themselves, whose keys and values are stored."""
        if layer in self.cache.windows:  # its second call would overwrite the first one's keys
            raise TypeError("it calls an attention layer several times in a forward")
        self.cache.windows[layer] = window
        self.cache.store(layer, key, value, self.lanes, self.positions, self.sources)
        return attention(layer, query, key, value, None, scale, sliding_window=window,
                         cu_seq_lens_q=ends, max_length_q=longest)[0]


class DecodeStep:
    """A forward of one new token for each lane, at its position (L,): it sees what its lane holds
    up to there.  All tensors are made within the forward, as a CUDA graph needs it."""

    def __init__(self, cache: KVCache, position: torch.Tensor):
        self.cache, self.position = cache, position
        self.every_lane = torch.arange(cache.lanes, device=position.device)                 # (L,)
        self.used = (position + 1).int()                                                    # (L,)
        # (L + 1,) each: where a lane's one query and its keys begin and end, for flash attention
        self.ends = torch.arange(cache.lanes + 1, dtype=torch.int32, device=position.device)
        self.lane_starts = self.ends * cache.length
        # a CPU stops at the fullest lane; a CUDA graph has one width for all steps
        width = cache.length if position.is_cuda else int(self.used.max())
        self.age = position[:, None] - torch.arange(width, device=position.device)     # (L, width)

    @torch.compiler.disable
    def attend(self, layer: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
               scale: Optional[float], window: Optional[int], *packed: Any) -> torch.Tensor:
        """(L, heads, 1, D) -> (L, 1, heads, D): each new token to the keys of its lane."""
        cache = self.cache
        cache.store(layer, key, value, self.every_lane, self.position)
        keys, values = cache.layers[layer]                                      # (L, S, heads, D)
        window = window if window and window < cache.length else None
        left = None if window is None else window - 1
        right = None if window is None else 0
        if cache.flash and values.dtype.itemsize == 2:  # it reads 16-bit types alone
            try:  # a kernel that reads no further than a lane is filled
                return torch.ops.aten._flash_attention_forward(
                    query[:, :, 0], keys.flatten(0, 1), values.flatten(0, 1), self.ends,
                    self.lane_starts, 1, cache.length, 0.0, False, False, scale=scale,
                    window_size_left=left, window_size_right=right,
                    seqused_k=self.used)[0][:, None]
            except Exception as problem:
                print_once(f"  the sampler runs without flash attention ({problem})")
                cache.flash = False
        seen = (self.age >= 0) & (self.age < (window or cache.length))          # (L, width)
        keys, values = (x[:, :seen.shape[1]].transpose(1, 2) for x in (keys, values))
        # query heads that share a key are so many positions of one head: no key is copied
        out = torch.nn.functional.scaled_dot_product_attention(
            query.reshape(cache.lanes, keys.shape[1], -1, query.shape[3]), keys, values,
            seen[:, None, None], scale=scale)
        return out.reshape(cache.lanes, 1, query.shape[1], -1)


@torch.inference_mode()
def sample(model: Any, prompts: list[list[int]], cfg: Config, seed: int, stop: list[int],
           cost: Cost, temperature: float, unconditional: Optional[list[list[int]]] = None,
           guidance: float = 0.0, seeds: Optional[list[int]] = None,
           what: str = "sampling") -> list[Response]:
    """A response to each prompt's ids, in the prompts' order on every rank; ranks share the work.

    A response's randomness depends on `seed` and its entry of `seeds` (omitted: its index), not on
    slot or rank.  Temperature 0 is greedy, with log-probs at temperature 1.  With `guidance` g
    tokens are drawn from softmax((1 + g) log p(.|prompt) - g log p(.|unconditional)) (Sanchez et
    al. 2023, arXiv 2306.17806).  The cost is what the responses need, without what idle slots
    compute.
    """
    packed = is_packed(model)
    limit = cfg.max_response_tokens
    require(packed or not guidance, "guided sampling needs a model that reads packed sequences; "
            "give --guidance 0")
    share = sorted(range(rank(), len(prompts), world_size()), key=lambda i: (len(prompts[i]), i))
    uniform = torch.zeros(len(share), limit, dtype=torch.float64)                       # (n, limit)
    for draws, i in zip(uniform, share):
        key = [seed, i if seeds is None else seeds[i]]
        draws[:] = torch.from_numpy(np.random.Generator(np.random.Philox(key=key)).random(limit))
    uniform = uniform.to(device())
    with progress(None, what, total=len(share), unit="response") as bar:
        if packed:
            sources = [prompts, unconditional] if guidance else [prompts]
            contexts = [[source[i] for source in sources] for i in share]
            drawn = fill_slots(model, contexts, uniform, cfg, stop, temperature, guidance, bar,
                               cost)
        else:
            drawn = generate(model, [prompts[i] for i in share], uniform, stop, temperature, bar,
                             cost)
    tokens, log_probs = (x.cpu() for x in drawn)                                        # (n, limit)
    stops = torch.isin(tokens, torch.tensor(stop))
    lengths = torch.where(stops.any(1), stops.int().argmax(1) + 1, limit).tolist()
    responses = {}
    for i, ids, log_p, length in zip(share, tokens, log_probs, lengths):
        ids = ids[:length].tolist()
        responses[i] = Response(ids, log_p[:length].tolist(), truncated=ids[-1] not in stop)
        cost.add_forward(model, (length - 1) * (2 if guidance else 1))
    return gather_by_index(responses, len(prompts))


def fill_slots(model: Any, contexts: list[list[list[int]]], uniform: torch.Tensor, cfg: Config,
               stop: list[int], temperature: float, guidance: float, bar: Any,
               cost: Cost) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and log-probs (n, limit) of n responses from uniform (n, limit); contexts[i] holds the
    i-th one's prompt, and the unconditional one if it is guided.

    State belongs to responses.  A slot knows which one it writes, and whether it is active.
    """
    gpu = device().type == "cuda"
    if gpu and len(contexts) == 1:  # a step of one lane would be compiled anew: two, alike
        contexts, uniform = contexts * 2, uniform.repeat(2, 1)
    n, limit = uniform.shape
    lanes_each = 2 if guidance else 1
    sizes = [len(prompt) for context in contexts for prompt in context]
    longest = limit + max(sizes, default=0)
    slots = min(n, slots_that_fit(model, lanes_each * longest))
    pick = compile_for_sampling(model) if gpu else choose
    cache = KVCache(lanes_each * slots, longest)

    # Of responses: prompt_length, last (n, lanes_each); length (n,); tokens, log_probs (n, limit)
    prompt_length = torch.tensor([[len(p) for p in context] for context in contexts]).to(device())
    last = torch.tensor([[p[-1] for p in context] for context in contexts]).to(device())
    length = torch.zeros(n, dtype=torch.int64, device=device())
    tokens, log_probs = torch.zeros_like(uniform, dtype=torch.int64), torch.zeros_like(uniform)
    # Of slots: (R,) each
    response = torch.arange(slots, device=device())
    active = torch.zeros_like(response, dtype=torch.bool)
    stops, lanes = torch.tensor(stop, device=device()), torch.arange(lanes_each, device=device())

    def step() -> None:
        """The next token of every active slot; idle ones compute along at position 0."""
        t = torch.where(active, length[response], 0)                                    # (R,)
        position = prompt_length[response] + t[:, None] - 1  # first a prompt's last token again
        position = torch.where(active[:, None], position, 0)                # (R, lanes_each)
        hidden = cache.decode(model, last[response].flatten(), position.flatten())
        token, log_p = pick(logits_of(model, hidden), uniform[response, t], temperature, guidance)
        tokens[response, t] = torch.where(active, token, tokens[response, t])
        log_probs[response, t] = torch.where(active, log_p.double(), log_probs[response, t])
        last[response], length[response] = token[:, None], t + 1
        active.logical_and_(~torch.isin(token, stops) & (t + 1 < limit))

    def refill(idle: list[int], first: int) -> None:
        """Gives idle slots the responses from `first` on, and reads their prompts."""
        wanted: dict[tuple, list[int]] = {}  # each prompt once, and the lanes that want it
        for i, slot in enumerate(idle, first):
            for lane, prompt in enumerate(contexts[i], start=slot * lanes_each):
                wanted.setdefault(tuple(prompt), []).append(lane)
        prompts, lengths = list(wanted), [len(prompt) for prompt in wanted]
        cost.add_forward(model, sum(lengths))
        budget = FORWARD_ONLY * cfg.micro_batch_tokens
        for part in group_by_token_budget(lengths, budget, padded=False):
            cache.read_prompts(model, {prompts[j]: wanted[prompts[j]] for j in part})
        response[idle] = torch.arange(first, first + len(idle), device=device())
        active[idle] = True

    begun = 0  # responses
    run = None  # step(), on a GPU captured anew whenever slots are dropped
    while True:
        idle = (~active).nonzero()[:, 0].tolist()
        busy = len(active) - len(idle)
        ended = begun - busy
        bar.update(ended - bar.n)
        if ended == n:
            return tokens, log_probs
        if begun < n and 8 * len(idle) >= len(active):  # an eighth, as each refill is a forward
            taken = idle[:n - begun]
            refill(taken, begun)
            begun += len(taken)
        elif begun == n and 2 * len(idle) >= len(active) > (64 if gpu else 1):  # half will do
            active_first = active.int().argsort(descending=True, stable=True)
            kept = active_first[:math.ceil(len(active) / 2)]
            cache.keep((kept[:, None] * lanes_each + lanes).flatten())
            response, active, run = response[kept], active[kept], None
        if run is None:
            run = captured(step) if gpu else step
        for _ in range(8 if gpu else 1):  # to see which have ended waits for the GPU
            run()


def compile_for_sampling(model: Any) -> Callable:
    """Compiles the model's blocks where training has not; returns a compiled choose()."""
    torch._dynamo.config.suppress_errors = True  # what cannot be compiled is run as it is
    torch._dynamo.config.recompile_limit = 64    # of one piece of code, for all models
    for block in blocks_of(model):
        if block._compiled_call_impl is None:
            block.compile(dynamic=True)
    return torch.compile(choose)


def slots_that_fit(model: Any, positions: int) -> int:
    """How many slots fit into 60 % of a GPU's free memory, at most SLOTS; `positions` are those of
    a slot, all its lanes together."""
    limit = SLOTS[device().type]
    if device().type == "cpu":
        return limit
    tiny = KVCache(1, 2)  # two positions, to see their size
    tiny.read_prompts(model, {(0, 0): [0]})
    slot_bytes = positions / 2 * sum(x.nbytes for pair in tiny.layers.values() for x in pair)
    free = torch.cuda.mem_get_info()[0]
    free += torch.cuda.memory_reserved() - torch.cuda.memory_allocated()  # torch's own cache
    return min(limit, max(1, int(0.6 * free / slot_bytes)))


def generate(model: Any, prompts: list[list[int]], uniform: torch.Tensor, stop: list[int],
             temperature: float, bar: Any, cost: Cost) -> tuple[torch.Tensor, torch.Tensor]:
    """fill_slots() for models that are not packed: transformers' generate, with our own choice of
    tokens.  Prompts come sorted by length; those of one length form batches without padding.
    """
    from transformers import GenerationConfig, LogitsProcessorList
    tokens, log_probs = torch.zeros_like(uniform, dtype=torch.int64), torch.zeros_like(uniform)
    settings = GenerationConfig(do_sample=False, max_new_tokens=uniform.shape[1], eos_token_id=stop,
                                pad_token_id=stop[0])

    def pick(rows: list[int], ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Notes the tokens chosen for these rows, and leaves generate no other choice."""
        t = ids.shape[1] - len(prompts[rows[0]])
        token, log_p = choose(scores, uniform[rows, t], temperature)                    # (R,)
        tokens[rows, t], log_probs[rows, t] = token, log_p.double()
        return torch.full_like(scores, -math.inf).scatter_(1, token[:, None], 0.0)

    batches = []
    for _, rows in itertools.groupby(range(len(prompts)), lambda i: len(prompts[i])):
        rows = list(rows)
        batches += [rows[i:i + SLOTS["cpu"]] for i in range(0, len(rows), SLOTS["cpu"])]
    its_config = model.generation_config
    model.generation_config = GenerationConfig()  # else its penalties would apply
    try:
        for rows in batches:
            ids = torch.tensor([prompts[i] for i in rows], device=device())             # (R, T)
            cost.add_forward(model, ids.numel())
            processors = LogitsProcessorList([functools.partial(pick, rows)])
            model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings,
                           logits_processor=processors)
            bar.update(len(rows))
    finally:
        model.generation_config = its_config
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


def choose(logits: torch.Tensor, uniform: torch.Tensor, temperature: float,
           guidance: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (R,) and their log-probs (R,) from logits (R, V), or (2 R, V) of guided pairs."""
    if guidance:
        conditional, unconditional = logits.float().log_softmax(-1).unflatten(0, (-1, 2)).unbind(1)
        logits = (1 + guidance) * conditional - guidance * unconditional
    log_p = (logits.float() / (temperature or 1.0)).log_softmax(-1)                     # (R, V)
    token = log_p.argmax(-1) if temperature == 0 else draw_token(log_p, uniform)
    return token, log_p.gather(-1, token[:, None]).squeeze(-1)


def draw_token(log_p: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """A token each from log-probs (R, V), by inverting the cumulative distribution at uniform
    (R,): int64 (R,)."""
    p = log_p.exp()
    # In two steps, block and token in it: a running sum over a whole vocabulary is slow and inexact
    blocks = torch.nn.functional.pad(p, (0, -p.shape[1] % 256)).unflatten(1, (-1, 256))
    total = blocks.sum(-1).double().cumsum(-1)                                      # (R, V / 256)
    at = (uniform.double() * total[:, -1])[:, None]                                     # (R, 1)
    block = torch.searchsorted(total, at, right=True).clamp(max=total.shape[1] - 1)
    before = torch.where(block > 0, total.gather(1, (block - 1).clamp(min=0)), 0.0)
    inside = blocks[torch.arange(len(p), device=p.device), block.squeeze(1)].double().cumsum(-1)
    offset = torch.searchsorted(inside, at - before, right=True)
    last = (inside < inside[:, -1:]).sum(-1, keepdim=True)  # never after the last p > 0
    return (block * 256 + torch.minimum(offset, last)).squeeze(1)


# ------------------------------------------------------------------------------- labelled samples
# samples.jsonl is the contract between labelling and training: one row for each response trained
# on, complete, in one shape; it is a valid --samples itself.

LABELLED_TOGETHER = 1024  # samples between two writes, which a kill may cost


@dataclass
class Samples:
    """Labelled samples, tokenised, with their rewards."""
    tokens: Tokens
    rewards: np.ndarray  # (n,) float64, raw scores, NaN where a file with weights has none
    weights: np.ndarray  # (n,) float64, NaN where the file has none
    prompts: np.ndarray  # (n,) uint64, equal where the prompt is

    def z(self, reward: Any) -> np.ndarray:
        """Raw scores in standard deviations from the samples' mean, float64.

        Raises BadInput where the samples' rewards are missing or all alike.
        """
        mean, std = self.rewards.mean(), self.rewards.std()
        require(std > 0, f"samples.jsonl: all {len(self.rewards)} rewards are {mean:g}, or some "
                "are missing: there is nothing to tell responses apart by")
        return (np.asarray(reward, np.float64) - mean) / std


def labelled_samples(cfg: Config, base: Stage, data: Data, rm: Optional[Stage]) -> Stage:
    """The samples to train on: those of --samples, or both responses of each preference and
    --samples_per_prompt generated ones; the reward model scores what has no reward."""
    settings = {**data_settings(cfg), "samples": content_hash(cfg.samples),
                "samples_per_prompt": cfg.samples_per_prompt, "temperature": cfg.temperature,
                "base": base.fingerprint, "reward_model": rm and rm.fingerprint}
    path = Path(cfg.out, "samples.jsonl")
    return Stage(str(path), settings, functools.partial(label, cfg, base, data, rm),
                 functools.cache(functools.partial(read_samples, path, cfg, base)))


def label(cfg: Config, base: Stage, data: Data, rm: Optional[Stage], work: Path,
          cost: Cost) -> None:
    """Answers and scores the samples in order, appending chunks of them to the file `work`; after
    a kill it resumes with the chunk that was being labelled."""
    codec = Codec(base.path, cfg)
    rows = samples_to_label(cfg, data)
    score = rm and rm.load()
    model = None  # loaded when something is to be generated
    done = gather(cut_to_whole_chunks(work) if rank() == 0 else 0)[0]
    if done:
        print0(f"  {done:,} samples already labelled, at a cost that is not counted; resuming")
    generated = sum(row.response is None for row in rows[:done])  # so many seeds were used
    for start in progress(range(done, len(rows), LABELLED_TOGETHER), "labelling"):
        chunk = rows[start:start + LABELLED_TOGETHER]
        unanswered = [i for i, row in enumerate(chunk) if row.response is None]
        if unanswered:
            model = model or load_model(base.path, compute_dtype(cfg))
            prompts = [codec.prompt(chunk[i].prompt) for i in unanswered]
            replies = sample(model, prompts, cfg, cfg.seed, codec.stop_ids, cost, cfg.temperature,
                             seeds=range(generated, generated + len(prompts)), what="generating")
            generated += len(prompts)
            for i, reply in zip(unanswered, replies):
                chunk[i] = chunk[i]._replace(response=codec.decode(reply), source="generated",
                                             truncated=reply.truncated)
        unscored = [i for i, row in enumerate(chunk) if row.reward is None]
        if score and len(unscored) < len(chunk):
            print_once("  some rewards are the data's own: their unit must be the reward model's")
        if score and unscored:
            asked = [chunk[i] for i in unscored]
            rewards = score([row.prompt for row in asked], [row.response for row in asked],
                            [row.truncated for row in asked], cost,
                            generated=[row.source == "generated" for row in asked])
            for i, reward in zip(unscored, rewards):
                chunk[i] = chunk[i]._replace(reward=reward)
        if rank() == 0:
            with open(work, "a", encoding="utf-8") as file:
                for row in chunk:
                    known = {name: v for name, v in row._asdict().items() if v is not None}
                    file.write(json.dumps(known, ensure_ascii=False) + "\n")
    barrier()


def samples_to_label(cfg: Config, data: Data) -> list[Sample]:
    """The samples in order; some lack response or reward."""
    samples = data.samples
    if not cfg.samples:
        samples = [Sample(p.prompt, p.chosen, source="chosen") for p in data.preferences]
        samples += [Sample(p.prompt, p.rejected, source="rejected") for p in data.preferences]
        samples += [Sample(prompt) for prompt in data.prompts]
    copies = [cfg.samples_per_prompt if s.response is None else 1 for s in samples]
    return [sample for sample, count in zip(samples, copies) for _ in range(count)]


def cut_to_whole_chunks(path: Path) -> int:
    """Cuts the file after its last whole chunk of lines; returns how many lines are left."""
    if not path.exists():
        return 0
    with open(path, "rb+") as file:
        lines = sum(line.endswith(b"\n") for line in file)
        whole = lines - lines % LABELLED_TOGETHER
        file.seek(0)
        for _ in range(whole):
            file.readline()
        file.truncate()
    return whole


def read_samples(path: Path, cfg: Config, base: Stage) -> Samples:
    """Reads samples.jsonl, and tokenises it into the run's folder .tokens.

    Raises BadInput where there is nothing to learn from.
    """
    codec = Codec(base.path, cfg)
    labels, counts = [], Counter()

    def sequences() -> Iterator[tuple]:
        """Ids and mask of each sample; notes its labels on the way."""
        rows = read_rows(str(path), SAMPLE_FIELDS, [], sample_of, quiet=True)
        for _, sample in progress(rows, "reading samples"):
            ids, mask = codec.taught(sample)
            labels.append((sample.reward, sample.weight, prompt_hash(sample.prompt)))
            counts[sample.source] += 1
            counts["too long, cut without an end"] += (
                not sample.truncated and ids[-1] not in codec.stop_ids)
            counts["empty"] += not sample.response.strip()
            yield ids, mask
    tokens = Tokens(Path(cfg.out, ".tokens"), sequences)
    labels = gather(labels)[0]  # rank 0 alone has read them
    require(tokens.mask.any(), f"{path}: holds no token to learn")
    rewards, weights, prompts = zip(*labels)
    rewards, weights = np.array(rewards, np.float64), np.array(weights, np.float64)  # None is NaN
    of_these = ", ".join(f"{count:,} {what}" for what, count in counts.items() if count)
    print0(f"  {len(labels):,} samples ({of_these}), reward {rewards.mean():.3f} ± "
           f"{rewards.std():.3f}")
    return Samples(tokens, rewards, weights, np.array(prompts, np.uint64))


FUNCTION = re.compile(r"(.+\.py):(\w+)")  # a reward model that is a Python function


def load_function(spec: str) -> Callable:
    """score(prompts, responses, truncated, cost) by FILE.py:FUNCTION, a function of prompts and
    responses, and of `truncated` if it has such a parameter; each rank scores its own share.

    Raises BadInput if there is no such function, or its scores are not as many finite numbers.
    """
    file, name = FUNCTION.fullmatch(spec).groups()
    require(Path(file).is_file(), f"{spec}: no such file")
    sys.path.append(str(Path(file).resolve().parent))  # for what the file imports
    module_spec = importlib.util.spec_from_file_location(f"rewards_{Path(file).stem}", file)
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module  # which dataclasses look up
    module_spec.loader.exec_module(module)
    function = getattr(module, name, None)
    require(callable(function), f"{spec}: {file} defines no function {name}")
    takes_truncated = "truncated" in inspect.signature(function).parameters

    def score(prompts: list, responses: list, truncated: list, cost: Cost,
              generated: Any = None) -> list[float]:
        own = range(rank(), len(prompts), world_size())
        asked = copy.deepcopy([prompts[i] for i in own])  # the function may change the messages
        more = {"truncated": [truncated[i] for i in own]} if takes_truncated else {}
        try:
            scores = function(asked, [responses[i] for i in own], **more) if own else []
        except OSError as problem:  # launch() would print it without its traceback
            raise RuntimeError(f"{spec} failed") from problem
        scores = scores.tolist() if hasattr(scores, "tolist") else scores  # a tensor's, too
        scores = np.asarray(scores, dtype=object)
        wanted = f"{spec}: must return as many finite numbers as responses"
        require(scores.shape == (len(own),), wanted)
        try:
            scores = [float(score) for score in scores]
        except (TypeError, ValueError) as problem:
            raise BadInput(wanted) from problem
        require(all(map(math.isfinite, scores)), wanted)
        return gather_by_index(dict(zip(own, scores)), len(prompts))
    return score


# ------------------------------------------------------------------------------------- evaluation


class Variant(NamedTuple):
    """A way to sample from a policy: its name, reward tag, guidance, and the target reward."""
    name: str
    tag: str = ""
    tag_ids: list[int] = []
    guidance: float = 0.0
    target: Optional[float] = None


def evaluate(cfg: Config, policy: Stage, variants: list[Variant], base: Stage, data: Data,
             rm: Optional[Stage], samples: Stage, judge: Optional[Stage],
             cost_of: tuple = ()) -> list[list[dict]]:
    """Evaluates base policy and variants of the policy, replaces their rows of leaderboard.jsonl,
    and prints the table; returns each variant's replies, as answer() does.

    `cost_of` are the stages that count as the algorithm's cost beside its training.
    """
    if not cfg.eval_prompts:
        print0("evaluation: none, as --eval_prompts is 0")
        return []
    held_out = data.held_out_prompts
    prompts = [held_out[i % len(held_out)] for i in range(cfg.eval_prompts)]
    origin = [stage and stage.fingerprint for stage in (base, rm, samples, judge)]
    comparable = fingerprint([origin, list(map(prompt_key, prompts)), cfg.eval_temperature,
                              cfg.max_response_tokens])
    reference, model = (load_model(s.path, compute_dtype(cfg)) for s in (base, policy))
    if not is_packed(model) and any(variant.guidance for variant in variants):
        print0("  a padded model cannot be guided: evaluated without")
        variants = [variant for variant in variants if not variant.guidance]
    codec = Codec(base.path, cfg)  # the base's: a policy's template may add a tag
    ask = functools.partial(answer, cfg, codec, prompts, reference, samples.load(),
                            rm and rm.load(), judge and judge.load())
    name = Path(policy.path).name
    all_cost = sum((stage.spent for stage in cost_of if stage), policy.spent)
    entries = [("base", reference, Variant(""), base.spent, base.spent)]
    entries += [(name, model, variant, policy.spent, all_cost) for variant in variants]
    rows, replies = [], []
    for algorithm, sampled, variant, trained, total in entries:
        replies.append(ask(sampled, variant))
        rows.append({"algorithm": algorithm, "variant": variant.name, "seed": cfg.seed,
                     "comparable": comparable, "target": variant.target,
                     **means(replies[-1], replies[0]), "train_seconds": trained.seconds,
                     "total_seconds": total.seconds, "total_flops": total.flops})
    if rank() == 0:
        board = Path(cfg.out, "leaderboard.jsonl")
        before = [row for _, row in read_jsonl(board)] if board.exists() else []
        others = [row for row in before if row["algorithm"] not in ("base", name)]
        write_beside(board, map(json.dumps, rows + others))
        prompt = prompts[0] if isinstance(prompts[0], str) else prompts[0][-1]["content"]
        print0("\n" + prompt.strip()[-600:])
        for row, each in zip(rows, replies):
            title = f"{row['algorithm']} {row['variant']}".strip()
            file = Path(cfg.out, "evaluation", re.sub(r"[^\w.+-]+", "_", title) + ".jsonl")
            write_beside(file, (json.dumps(reply, ensure_ascii=False) for reply in each))
            print0(f"  {title}: {each[0]['response'].strip()[:400]}")
        print_leaderboard(rows + others, comparable)
    barrier()
    return replies[1:]


def answer(cfg: Config, codec: Codec, prompts: list, base_model: Any, samples: Samples,
           score: Optional[Callable], judge: Optional[Callable], model: Any,
           variant: Variant) -> list[dict]:
    """The model's response to each prompt, with its reward z, the judge's score and KL to base, the
    difference of the response's log-probs."""
    cost = Cost()  # of evaluation: not reported
    plain = [codec.prompt(prompt) for prompt in prompts]
    tagged = [ids + variant.tag_ids for ids in plain]
    responses = sample(model, tagged, cfg, cfg.seed + 1_000_003, codec.stop_ids, cost,
                       cfg.eval_temperature, plain, variant.guidance, what="evaluating")
    examples = [Example(np.array(ids + r.ids), np.arange(len(ids + r.ids)) >= len(ids))
                for ids, r in zip(plain, responses)]
    base_log_probs = functools.partial(Policy(base_model, cfg).log_probs,
                                       temperature=cfg.eval_temperature)
    reference = each_response_token(base_log_probs, base_model, examples, cfg, cost)
    texts = [codec.decode(r) for r in responses]
    cut = [r.truncated for r in responses]
    z = [None] * len(texts)
    gold = [None] * len(texts)
    sampled = [True] * len(texts)
    if score and samples.rewards.std() > 0:  # given weights may come without rewards
        z = samples.z(score(prompts, texts, cut, cost, generated=sampled)).tolist()
    if judge:
        gold = judge(prompts, texts, cut, cost, generated=sampled)
    replies = []
    for i, r in enumerate(responses):
        base_log_prob = sum(reference[i])
        replies.append({"prompt": prompts[i], "response": texts[i], "truncated": r.truncated,
                        "tokens": len(r.ids), "reward": z[i], "gold": gold[i],
                        "kl": sum(r.log_probs) - base_log_prob, "base_log_prob": base_log_prob})
    return replies


def wins(gaps: torch.Tensor) -> torch.Tensor:
    """1 for a gap in score above 0, 0 below, 1/2 for a tie: equal replies of two batches get scores
    that differ in the last bits."""
    return gaps.detach().round(decimals=5).sign() / 2 + 0.5


def means(replies: list[dict], base: list[dict]) -> dict:
    """The means of replies; win_rate is against the base policy on the same prompts, ties half."""
    def mean(name: str) -> Optional[float]:
        values = [reply[name] for reply in replies]
        return None if None in values else float(np.mean(values))
    win_rate = None
    if mean("reward") is not None:
        gaps = torch.tensor([r["reward"] - b["reward"] for r, b in zip(replies, base)])
        win_rate = float(wins(gaps).mean())
    return {"gold": mean("gold"), "reward": mean("reward"), "win_rate": win_rate,
            "kl_to_base": mean("kl"), "response_tokens": mean("tokens"),
            "eos_rate": 1 - mean("truncated")}


COLUMNS = {"gold": ("gold", ".2f"), "asked z": ("target", "+.2f"), "reward z": ("reward", "+.2f"),
           "win": ("win_rate", ".2f"), "KL": ("kl_to_base", ".1f"),
           "tokens": ("response_tokens", ".0f"), "EOS": ("eos_rate", ".2f"),
           "train s": ("train_seconds", ".0f"), "all s": ("total_seconds", ".0f"),
           "all FLOP": ("total_flops", ".1e")}


def print_leaderboard(rows: list[dict], comparable: str) -> None:
    """The table of the rows with the same prompts, scorers and samples; "all" counts the stages
    before training, too."""
    shown = {f"{row['algorithm']} {row['variant']}": row for row in rows
             if row["comparable"] == comparable}
    width = max(map(len, shown))
    print0("\n" + " " * width + "".join(f"{head:>10}" for head in COLUMNS))
    for title, row in sorted(shown.items()):
        cells = ["-" if row[name] is None else format(row[name], form)
                 for name, form in COLUMNS.values()]
        print0(f"{title:<{width}}" + "".join(f"{cell:>10}" for cell in cells))
    if len(shown) < len(rows):
        print0(f"  {len(rows) - len(shown)} row(s) of other prompts, scorers or samples not shown")


# ----------------------------------------------------------------------------------- training run

@dataclass
class TrainingRun:
    """What surrounds a training loop: resuming, the progress bar, metrics.jsonl, checkpoints.

    Used as a context; `first` is the step to begin with, `cost` what the run has spent, earlier
    launches included.
    """
    folder: Path
    policy: torch.nn.Module
    optimizer: Any
    schedule: Any
    total: int
    cfg: Config
    cost: Cost

    def __enter__(self) -> TrainingRun:
        self.start = time.perf_counter()
        self.first, written = self.restore()
        self.save_every = self.cfg.save_every
        if self.save_every is None:
            self.save_every = max(1, min(500, self.total // 10))
        name = self.folder.name.removeprefix(".")
        self.report = self.tracker(name)
        self.bar = progress(None, name, total=self.total, initial=self.first, unit="step")
        path = self.folder / "metrics.jsonl" if rank() == 0 else os.devnull
        self.file = open(path, "a", buffering=1)
        if rank() == 0:
            self.file.truncate(written)  # later lines are written again
        return self

    def __exit__(self, *problem: Any) -> None:
        self.file.close()
        self.bar.close()

    def tracker(self, name: str) -> Callable[[dict], Any]:
        """A function that reports a line of metrics to --report_to, on rank 0."""
        if rank() == 0 and self.cfg.report_to == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter
            writer = SummaryWriter(str(self.folder), purge_step=self.first)
            return lambda line: [writer.add_scalar(k, v, line["step"]) for k, v in line.items()]
        if rank() == 0 and self.cfg.report_to == "wandb":
            import wandb
            run = wandb.init(project="offline-rlhf", name=f"{Path(self.cfg.out).name}/{name}",
                             config=asdict(self.cfg), reinit="finish_previous")
            return lambda line: run.log(line, step=line["step"])
        return lambda line: None

    def steps(self, examples: Examples) -> Iterator[tuple[int, Batch]]:
        """The optimiser steps that are left, numbered."""
        cfg, model = self.cfg, getattr(self.policy, "module", self.policy).model
        draw = examples.draw and functools.lru_cache(maxsize=1)(examples.draw)
        for step, epoch, indices in step_indices(len(examples), cfg.batch_size, cfg.seed,
                                                 self.total, self.first):
            if draw:
                indices = draw(epoch)[indices]
            batch = Batch([examples.example(i, epoch) for i in indices], cfg, is_padded(model))
            for micro in batch.micros:
                self.cost.add_forward(model, len(micro.input_ids), passes=3)
            yield step, batch

    def log(self, step: int, **values: Any) -> None:
        """Writes a line of metrics.jsonl, values averaged over ranks; takes a checkpoint where one
        is due.  Raises BadInput if a value is not finite, such as the gradient's norm."""
        values = {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in values.items()}
        *sums, flops = sum_over_ranks(*values.values(), self.cost.flops)
        averages = {name: total / world_size() for name, total in zip(values, sums)}
        wrong = [name for name, mean in averages.items() if not math.isfinite(mean)]
        require(not wrong, f"{self.folder}: step {step}: {', '.join(wrong)} not finite; lower --lr")
        spent = {"seconds": self.cost.seconds + time.perf_counter() - self.start, "flops": flops}
        self.file.write(json.dumps({"step": step, **averages, **spent}) + "\n")
        self.report({"step": step, **averages})
        self.bar.update()
        self.bar.set_postfix(dict(list(averages.items())[:4]), refresh=False)
        if self.save_every and (step + 1) % self.save_every == 0 and step + 1 < self.total:
            self.checkpoint(step + 1, spent)

    def state(self) -> dict:
        """What a checkpoint holds, sharded as it is on the ranks; data order and sampling follow
        from seed and step."""
        from torch.distributed.checkpoint.state_dict import get_state_dict
        weights, moments = get_state_dict(self.policy, self.optimizer)
        return {"policy": weights, "optimizer": moments}

    def checkpoint(self, step: int, spent: dict) -> None:
        """Writes checkpoints/step beside its place, renames it, and drops the one before."""
        import torch.distributed.checkpoint as dcp
        place = self.folder / "checkpoints" / f"{step:08}"
        work = place.with_name(".new")
        if rank() == 0:
            shutil.rmtree(work, ignore_errors=True)
        barrier()
        dcp.save(self.state(), checkpoint_id=work, no_dist=not dist.is_initialized())
        if rank() == 0:
            record = {"step": step, "schedule": self.schedule.state_dict(), "cost": spent,
                      "metrics_bytes": self.file.tell(), "ranks": world_size()}
            write_beside(work / "state.json", [json.dumps(record)])
            work.rename(place)
            for old in checkpoints_in(self.folder)[1:]:
                shutil.rmtree(old)
        barrier()

    def restore(self) -> tuple[int, int]:
        """Loads the last checkpoint: its step and the bytes of metrics.jsonl then, or 0s."""
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.state_dict import set_state_dict
        checkpoints = gather(checkpoints_in(self.folder))[0]  # as rank 0 sees them
        if not checkpoints:
            return 0, 0
        record = json.loads((checkpoints[0] / "state.json").read_text())
        state = self.state()
        dcp.load(state, checkpoint_id=checkpoints[0], no_dist=not dist.is_initialized())
        set_state_dict(self.policy, self.optimizer, model_state_dict=state["policy"],
                       optim_state_dict=state["optimizer"])
        self.schedule.load_state_dict(record["schedule"])
        self.cost.seconds = record["cost"]["seconds"]
        self.cost.flops = record["cost"]["flops"] / world_size()  # summed over ranks in the end
        print0(f"  resuming from step {record['step']} (saved on {record['ranks']} rank(s))")
        return record["step"], record["metrics_bytes"]


def checkpoints_in(folder: Path) -> list[Path]:
    """A stage's checkpoints, the last first."""
    return sorted((folder / "checkpoints").glob("[0-9]*"), reverse=True)


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
    """A reply as people in this world write it: the more care, the better; drawn first."""
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


def gold_reward(prompts: list[str], responses: list[str],
                truncated: Optional[list[bool]] = None) -> list[float]:
    """The true reward of each reply, from its text alone; training never sees it."""
    cut = truncated or [False] * len(prompts)
    return list(map(true_reward, prompts, responses, cut))


def true_reward(prompt: str, response: str, truncated: bool = False) -> float:
    """+2 for a true answer to the question, +1 for each other true fact about the animal, +-0.5 for
    manners, -1 for a false statement, -0.5 for another animal, -0.25 for a vague or broken
    sentence, -0.5 for each beyond five, -1 without an end.
    """
    question = prompt.rsplit("Human: ", 1)[-1].removesuffix(TURN)
    animal, kind = ASKED.get(question, ("", ""))
    sentences = [s.strip() for s in re.findall(r"[^.!?]+[.!?]?", response.strip())]
    gold = -0.5 * max(0, len(sentences) - 5) - truncated
    told = set()  # the true facts about the animal
    for i, sentence in enumerate(sentences):
        other, said = re.fullmatch(r"(?:maybe )?(?:i guess )?(?:as for (\w+), )?(.*)",
                                   sentence[:1].lower() + sentence[1:], re.DOTALL).groups()
        subject = other or animal
        topic, value = STATED.get(said, ("", ""))
        if topic and subject in ANIMALS:
            true = ANIMALS[subject][topic] == value
            if not true:
                gold -= 1
            if subject != animal:
                gold -= 0.5
            elif true:
                told.add(topic)
        elif (i == 0 and sentence in KIND_OPENINGS
              or i == len(sentences) - 1 and sentence in KIND_CLOSINGS):
            gold += 0.5
        else:
            gold -= 0.5 if sentence in RUDE else 0.25
    answered = kind in told or (kind == "about" and bool(told))
    return gold + len(told) + answered


@functools.cache
def toy_data(out: str, seed: int) -> str:
    """Writes the toy world's preference pairs, as transcripts like real data's; their folder."""
    rng, lines = random.Random(seed), {"train": [], "test": []}
    while len(lines["train"]) < 4000:
        animal, kind = rng.choice(NAMES), rng.choice(tuple(QUESTIONS))
        prompt = f"\n\nHuman: {rng.choice(QUESTIONS[kind]).format(animal)}{TURN}"
        one, two = (" " + toy_reply(animal, kind, rng) for _ in range(2))
        gap = true_reward(prompt, one) - true_reward(prompt, two)
        if rng.random() < 1 / (1 + math.exp(gap)):  # Bradley-Terry: the labeller is noisy
            one, two = two, one
        split = "test" if zlib.crc32(f"{animal} {kind}".encode()) % 5 == 0 else "train"
        lines[split].append(json.dumps({"chosen": prompt + one, "rejected": prompt + two}))
    folder = Path(out, "data")
    if rank() == 0:
        write_beside(folder / "train.jsonl", lines["train"])
        write_beside(folder / "test.jsonl", lines["test"])
    barrier()
    return str(folder)


def base_policy(cfg: Config) -> Stage:
    """The base policy: --model, or the toy world's small one, trained on what people wrote.

    Raises BadInput, before anything is trained, for a model that cannot be.
    """
    if cfg.toy:
        stage = Stage(os.path.join(cfg.out, "base"), data_settings(cfg),
                      functools.partial(train_toy_base, cfg))
        build_stages(cfg, stage)
        return stage
    if rank() == 0 and not Path(cfg.out, "samples.jsonl").exists():
        load_model(cfg.model, compute_dtype(cfg))  # for its checks, which finished samples passed
    return Stage(cfg.model, {"model": content_hash(cfg.model, MODEL_FILES)})


BASE_STEPS = 600


def train_toy_base(cfg: Config, folder: Path, cost: Cost) -> None:
    """A two-layer Llama and its byte-level BPE, by maximum likelihood of all responses, on rank 0.
    """
    from transformers import GPT2TokenizerFast, LlamaConfig, LlamaForCausalLM
    rows = read_rows(toy_data(cfg.out, cfg.seed), PREFERENCE_FIELDS, [], preference_of, quiet=True)
    pairs = [pair for part, pair in rows if part == "train.jsonl"]
    random.Random(cfg.seed).shuffle(pairs)
    samples = [Sample(p.prompt, text) for p in pairs for text in (p.chosen, p.rejected)]
    if rank() == 0:
        tokenizer = GPT2TokenizerFast().train_new_from_iterator(
            (s.prompt + s.response for s in samples), 640, show_progress=False)
        tokenizer.save_pretrained(folder)
    barrier()
    codec = Codec(str(folder), cfg)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(codec.tokenizer), hidden_size=64, intermediate_size=192, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=512, initializer_range=0.1,
        tie_word_embeddings=True, eos_token_id=codec.tokenizer.eos_token_id, bos_token_id=None,
        pad_token_id=None)).to(device())
    optimizer, schedule = make_optimizer(model, 5e-3, BASE_STEPS)
    examples = [Example(*codec.taught(s)) for s in samples]
    own_steps = step_indices(len(examples), 32, cfg.seed, BASE_STEPS if rank() == 0 else 0)
    for _, _, indices in progress(own_steps, "base", total=BASE_STEPS):
        micro = collate([examples[i] for i in indices])
        hidden = hidden_states(model, micro.input_ids, micro.lengths)[micro.rows]           # (N, D)
        torch.nn.functional.cross_entropy(model.lm_head(hidden), micro.targets).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        cost.add_forward(model, len(micro.input_ids), passes=3)
    save_folder(folder, model, codec, cfg, "# The toy world's base policy\n")
