"""Is it right on this machine, and how fast?  Correctness, head loss, sampling, PPO's phases,
growth with model and data, and training, on a GPU or a CPU, with random weights.

    python benchmarks/speed.py                          # one H100 or H200: about eight minutes
    python benchmarks/speed.py --minutes 30             # a CPU, at smaller sizes
    python benchmarks/speed.py --parts loss,training --minutes 4
    python benchmarks/speed.py --mini                   # all of it, tiny: a test, not a result

Each part has a time limit of its own, after which no measurement begins; what fails or finds no
time left says so, and the next one follows.  Rows are appended to --out as they come, one JSON
object a line; a table of each part is printed at the end.  Errors are norms of differences over
norms.
"""
from __future__ import annotations

import gc
import json
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Callable, Iterator
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.benchmark import Timer

from compare import machine, markdown, start, tiny_base

import common
import mle_filter
import ppo_baseline
import rwr
from common import Cost, flag

SECONDS = {"correctness": 60, "loss": 110, "sampling": 100, "ppo": 50, "growth": 60,
           "training": 130}
NAMES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
         "intermediate_size", "vocab_size", "tie_word_embeddings")
SHAPES = {"135M": (576, 30, 9, 3, 1536, 49152, True),    # SmolLM2-135M
          "1B": (2048, 16, 32, 8, 8192, 128256, True),   # Llama-3.2-1B
          "mini": (64, 2, 4, 2, 128, 512, True)}
WORDS = "the a of river small large otter lives eats plants meat and in what where how".split()
Measurements = Iterator[tuple[str, Callable[[], dict]]]  # what is measured, and how


@dataclass
class Config:
    """What to measure."""
    parts: str = flag(",".join(SECONDS), "of these, in this order")
    minutes: float = flag(8.0, "for all parts; each has its share, and what others left")
    out: str = flag("runs/speed/speed.jsonl", "file that rows are appended to as they come")
    mini: bool = flag(False, "tiny sizes: a test of this script")

    def size(self, gpu: Any, cpu: Any, mini: Any) -> Any:
        """The size for a GPU, for a CPU, or --mini's."""
        return mini if self.mini else gpu if torch.cuda.is_available() else cpu

    def shape(self, name: str, **changes: Any) -> dict:
        """A model's shape, or --mini's."""
        return {**dict(zip(NAMES, SHAPES["mini" if self.mini else name])), **changes}


# ----------------------------------------------------------------------------------- measuring


def seconds_of(call: Callable, least: float) -> float:
    """The median time of a call, its work on a GPU included, after calls that compile; found in
    `least` seconds or more."""
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=least).median


def run_part(part: str, cfg: Config, seconds: float) -> list[dict]:
    """Makes a part's measurements, of which none begins after so many seconds; returns their rows.
    """
    rows, end = [], time.monotonic() + seconds
    for what, measure in PARTS[part](cfg):
        begin, values = time.monotonic(), {"skipped": "no time left"}
        try:
            if begin < end:
                values = {**measure(), "took s": time.monotonic() - begin}
        except Exception as problem:  # one measurement's trouble is not another's
            values = {"error": " ".join(repr(problem).split())[:300]}
        row = {"what": what}
        for name, value in values.items():
            row[name] = float(f"{value:.4g}") if isinstance(value, float) else value
        rows.append(row)
        with open(cfg.out, "a") as file:
            file.write(json.dumps({"part": part, **row}) + "\n")
        print(", ".join(f"{name} {value}" for name, value in row.items()), flush=True)
        gc.collect()
        torch.cuda.empty_cache()
    return rows


# ------------------------------------------------------------------------------- random models


def texts_of(count: int, low: int, high: int) -> list[str]:
    """Texts of so many random words, each about a token."""
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(WORDS, rng.integers(low, high + 1))) for _ in range(count)]


def random_model(shape: dict, dtype: torch.dtype) -> Any:
    """A Llama of random weights, as the scripts load it."""
    with tempfile.TemporaryDirectory() as folder:
        return common.load_model(tiny_base(folder, WORDS, **shape).path, dtype)


def random_ids(model: Any, count: int, low: int, high: int) -> list[list[int]]:
    """Sequences of random ids of a model."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, model.config.vocab_size, rng.integers(low, high + 1)).tolist()
            for _ in range(count)]


def settings(**flags: Any) -> common.Config:
    """The shared flags where no data are read."""
    return common.Config(model="random", preferences="none", **flags)


def length_reward(prompts: list, responses: list[str]) -> list[float]:
    """A reward that costs nothing."""
    return [float(len(response)) for response in responses]


def run_script(script: Any, shape: dict, rows: int, words: tuple[int, int],
               **flags: Any) -> tuple[list[dict], int]:
    """The metrics of a script's own main() on a random model and made-up samples, the last 0.3 of
    them the response; and how many tokens they have."""
    with tempfile.TemporaryDirectory() as folder:
        texts, file = texts_of(rows, *words), Path(folder, "given.jsonl")
        samples = [{"prompt": text[:7 * len(text) // 10], "response": text[7 * len(text) // 10:]}
                   for text in texts]
        file.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
        script.main(script.Config(**{
            "model": tiny_base(f"{folder}/base", texts[:1000], **shape).path, "out": folder,
            "samples": str(file), "reward_model": f"{__file__}:length_reward", "eval_prompts": 0,
            "save_every": 0, **flags}))
        metrics, = Path(folder).glob("[a-z]*/metrics.jsonl")
        tokens = np.load(Path(folder, ".tokens", "offsets.npy"))[-1]
        return [line for _, line in common.read_jsonl(metrics)], int(tokens)


# --------------------------------------------------------------------- correctness and head loss


def correctness(cfg: Config) -> Measurements:
    """Losses and sampler against something plainer; that packed sequences are read as if each were
    alone is proven whenever a model is loaded."""
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        yield f"sampler, {name}, against transformers", partial(sampler_error, cfg, dtype)
        for kind in KERNELS:
            for vocabulary in cfg.size((50257, 128256), (50257,), (1009,)):
                yield (f"loss {kind}, {name}, V {vocabulary:,}, in 8 chunks, against float64",
                       partial(head_error, kind, dtype, vocabulary))


def head_error(kind: str, dtype: torch.dtype, vocabulary: int) -> dict:
    """A script's fused loss and gradients against autograd in float64."""
    t = problem(256, 64, vocabulary, 0.9, dtype)
    exact = {name: x.double() if x.is_floating_point() else x for name, x in t.items()}
    inputs, exact_inputs = ([each[name].detach().requires_grad_() for name in ("hidden", "weight")]
                            for each in (t, exact))
    chunk = {common.device().type: 256 * vocabulary * dtype.itemsize // 8}
    with mock.patch.dict(common.CHUNK_BYTES, chunk):
        ours = fused(kind, t, *inputs)
    theirs = plain(kind, exact, *exact_inputs)

    def away(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a.double() - b).norm() / b.norm())
    gradients = zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, exact_inputs))
    return {"loss": away(ours, theirs), "gradient": max(away(a, b) for a, b in gradients)}


def sampler_error(cfg: Config, dtype: torch.dtype) -> dict:
    """How many rows of greedy tokens are generate's."""
    model = random_model(cfg.shape("135M", tie_word_embeddings=False, initializer_range=0.05,
                                   num_hidden_layers=cfg.size(30, 4, 2)), dtype)
    prompts, most = random_ids(model, 16, 1, cfg.size(200, 60, 30)), cfg.size(40, 12, 12)
    ours = common.sample(model, prompts, settings(max_response_tokens=most), 0, [-1], Cost(), 0.0)
    theirs = generate(model, prompts, most, do_sample=False)
    same = sum(response.ids == row for response, row in zip(ours, theirs))
    return {"equal rows": f"{same} of {len(prompts)}"}


def ppo_kernel(*rows: torch.Tensor) -> torch.Tensor:
    """PPO's kernel, its statistics thrown away."""
    return ppo_baseline.clipped_surrogate_(*rows, temperature=1.0, clip=0.2,
                                           statistics=torch.zeros(3, device=common.device()))


KERNELS = {"nll": (mle_filter.masked_nll_, ()), "weighted": (rwr.weighted_nll_, ("w",)),
           "ppo": (ppo_kernel, ("old", "advantage"))}


def problem(rows: int, width: int, vocabulary: int, share: float,
            dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Hidden states, head, targets (-100 outside the response), and the losses' columns (N,)."""
    where = common.device()
    generator = torch.Generator(where).manual_seed(0)
    normal = partial(torch.randn, device=where, generator=generator)
    targets = torch.randint(0, vocabulary, (rows,), device=where, generator=generator)
    mask, advantage = torch.arange(rows, device=where) < share * rows, normal(rows)
    return {"hidden": normal(rows, width, dtype=dtype),
            "weight": normal(vocabulary, width, dtype=dtype).div_(width ** 0.5),
            "targets": torch.where(mask, targets, -100), "mask": mask, "advantage": advantage,
            "old": normal(rows) - np.log(vocabulary),
            "w": (advantage / 0.25).exp().clamp(max=20.0) / 20}


def fused(kind: str, t: dict, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A script's loss, on the response rows alone."""
    kernel, names = KERNELS[kind]
    columns = [t[name][t["mask"]] for name in ("targets", *names)]
    return common.head_loss(kernel, hidden[t["mask"]], weight, *columns)


def plain(kind: str, t: dict, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The loss as one would write it: all logits at once, autograd for the rest."""
    logits = hidden @ weight.t()                                                    # (N, V)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    nll = F.cross_entropy(wide, t["targets"], ignore_index=-100, reduction="none")  # (N,)
    if kind == "ppo":
        rho, a = (-nll - t["old"]).exp(), t["advantage"]
        loss = torch.maximum(-a * rho, -a * rho.clamp(0.8, 1.2))
        return torch.where(t["mask"], loss, 0.0).sum()
    return (t["w"] * nll if kind == "weighted" else nll).sum()


def products(t: dict, hidden: torch.Tensor, weight: torch.Tensor) -> None:
    """The three matrix products that every head loss needs."""
    with torch.no_grad():
        rows = hidden[t["mask"]]
        logits = rows @ weight.t()
        logits @ weight, logits.t() @ rows


def loss(cfg: Config) -> Measurements:
    """Heads of language models: forward and backward, ours beside each rival."""
    torch._dynamo.config.recompile_limit = 64  # a rival's code is compiled for each shape
    cells = cfg.size(
        [("nll", 16384, 4096, 128256, 1.0), ("nll", 16384, 4096, 128256, 0.4),
         ("weighted", 8192, 4096, 128256, 1.0), ("ppo", 8192, 4096, 128256, 1.0),
         ("nll", 16384, 2048, 151936, 1.0), ("nll", 16384, 576, 49152, 0.4)],
        [("nll", 1024, 576, 49152, 1.0), ("nll", 1024, 576, 49152, 0.4),
         ("weighted", 1024, 576, 49152, 0.4), ("ppo", 1024, 576, 49152, 0.4)],
        [(kind, 64, 64, 1009, 0.4) for kind in KERNELS])
    for rival in ("products", "plain", "compiled", "torch"):
        for kind, n, d, v, share in cells:
            if rival != "torch" or kind == "nll":
                yield (f"{kind}, N {n:,}, D {d:,}, V {v:,}, {share:g} of the rows: {rival}",
                       partial(loss_cell, cfg, rival, kind, n, d, v, share))


def loss_cell(cfg: Config, rival: str, kind: str, *sizes: Any) -> dict:
    """Milliseconds of ours and of a rival, and on a GPU the MiB that each needs."""
    t = problem(*sizes, cfg.size(torch.bfloat16, common.compute_dtype(settings()), torch.float32))
    inputs = [t["hidden"].requires_grad_(), t["weight"].requires_grad_()]

    def step(contender: Callable, *args: Any, **options: Any) -> None:
        torch.autograd.grad(contender(*args, **options) / sizes[0], inputs)
    rivals = {"products": partial(products, t, *inputs),
              "plain": partial(step, plain, kind, t, *inputs),
              "compiled": partial(step, torch.compile(plain), kind, t, *inputs),
              "torch": partial(step, getattr(F, "linear_cross_entropy", None), *inputs,
                               t["targets"], reduction="sum")}  # since torch 2.13
    row = {}
    for name, call in (("ours", partial(step, fused, kind, t, *inputs)), ("rival", rivals[rival])):
        row[f"{name} ms"] = 1000 * seconds_of(call, cfg.size(1.0, 5.0, 0.01))
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            call()
            row[f"{name} MiB"] = (torch.cuda.max_memory_allocated() - before) / 2**20
    return {**row, "over ours": row["rival ms"] / row["ours ms"]}


# ------------------------------------------------------------------------------- whole scripts


def sampling(cfg: Config) -> Measurements:
    """Tokens a second, ours and transformers' generate."""
    for name, count in cfg.size([("135M", 64), ("1B", 64), ("1B", 256), ("135M", 256)],
                                [("135M", 16)], [("135M", 8)]):
        for rival in ("ours", "generate"):
            yield f"{name}, {count} prompts: {rival}", partial(sample_rate, cfg, name, count, rival)


def generate(model: Any, prompts: list[list[int]], new_tokens: int, **how: Any) -> list[list[int]]:
    """transformers' own sampling, from one left-padded batch, of new tokens that do not end."""
    width, before = max(map(len, prompts)), model.config._attn_implementation
    padded = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=model.device)
    starts = torch.tensor([[width - len(p)] for p in prompts], device=model.device)
    how = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0} | how
    model.set_attn_implementation("sdpa")  # ours knows no padding
    with torch.inference_mode():
        ids = model.generate(padded, attention_mask=torch.arange(width, device=model.device)
                             >= starts, max_new_tokens=new_tokens, eos_token_id=-1, pad_token_id=0,
                             **how)
    model.set_attn_implementation(before)
    return ids[:, width:].tolist()


def sample_rate(cfg: Config, name: str, count: int, rival: str) -> dict:
    """The rate after a first call, which compiles."""
    model = random_model(cfg.shape(name), common.compute_dtype(settings()))
    prompts = random_ids(model, count, *cfg.size((32, 128), (32, 128), (4, 16)))
    most = cfg.size(128, 32, 12)
    calls = {"ours": partial(common.sample, model, prompts, settings(max_response_tokens=most), 0,
                             [-1], Cost(), 1.0),
             "generate": partial(generate, model, prompts, most)}
    calls[rival]()  # compiles
    begin = time.perf_counter()
    calls[rival]()  # its result is on the CPU
    seconds = time.perf_counter() - begin
    return {"tokens/s": count * most / seconds, "ms a step": 1000 * seconds / most}


def ppo(cfg: Config) -> Measurements:
    """Where the time of ppo_baseline.py's iterations goes, with one pass and a critic of the
    policy's size; scoring is not in it, as the reward is a function's."""
    def phases() -> dict:
        count = cfg.size(256, 12, 8)
        lines, _ = run_script(
            ppo_baseline, cfg.shape("135M"), 2 * count, (45, 180), rollout_batch_size=count,
            batch_size=count // 4, ppo_epochs=1, steps=3, max_response_tokens=cfg.size(128, 48, 8),
            micro_batch_tokens=cfg.size(32768, 8192, 8192))
        names = ("rollout_s", "log_probs_s", "update_s", "generation_share")
        return {name: lines[-1][name] for name in names}
    yield "135M: the third iteration", phases


def train_rate(shape: dict, rows: int, words: tuple, batch: int, budget: int) -> dict:
    """Tokens a second of mle_filter.py's steps: three epochs, of which the last two count."""
    lines, tokens = run_script(mle_filter, shape, rows, words, keep=1.0, batch_size=batch, epochs=3,
                               micro_batch_tokens=budget)
    first, last = lines[len(lines) // 3 - 1], lines[-1]
    seconds = (last["seconds"] - first["seconds"]) / 2
    rate = (last["flops"] - first["flops"]) / 2 / seconds
    return {"tokens/s": tokens / seconds, "TFLOP/s": rate / 1e12,
            "first epoch s": first["seconds"]}


def start_rate(rows: int) -> dict:
    """What a run does before and after its only step: reading, checking, tokenising its samples."""
    begin = time.perf_counter()
    lines, _ = run_script(mle_filter, dict(zip(NAMES, SHAPES["mini"])), rows, (30, 90), keep=1.0,
                          batch_size=8, steps=1)
    return {"start and end s": time.perf_counter() - begin - lines[-1]["seconds"]}


def training(cfg: Config) -> Measurements:
    """Whole steps."""
    for name, *run in cfg.size(
            [("135M", 256, (200, 400), 64, 32768), ("1B", 64, (400, 800), 32, 16384)],
            [("135M", 16, (100, 280), 8, 8192)], [("135M", 8, (10, 20), 4, 8192)]):
        yield f"{name}, batch {run[2]}", partial(train_rate, cfg.shape(name), *run)


def growth(cfg: Config) -> Measurements:
    """Steps of a model of more and more layers; a run's start with more and more samples."""
    run = cfg.size((64, (200, 400), 32, 32768), (16, (100, 280), 8, 8192), (8, (10, 20), 4, 8192))
    for layers in cfg.size((10, 20, 30), (4, 8, 16), (1, 2)):
        shape = cfg.shape("135M", num_hidden_layers=layers)
        yield f"{layers} layers of the 135M", partial(train_rate, shape, *run)
    for rows in cfg.size((10_000, 40_000), (10_000, 40_000), (50, 100)):
        yield f"start with {rows:,} samples of some 60 tokens", partial(start_rate, rows)


PARTS = {"correctness": correctness, "loss": loss, "sampling": sampling, "ppo": ppo,
         "growth": growth, "training": training}


def main(cfg: Config) -> None:
    """Measures part by part, and prints a table of each."""
    parts, end = cfg.parts.split(","), time.monotonic() + 60 * cfg.minutes
    common.require(set(parts) <= set(PARTS), f"--parts: choose from {','.join(PARTS)}")
    Path(cfg.out).parent.mkdir(parents=True, exist_ok=True)
    with open(cfg.out, "a") as file:
        file.write(json.dumps({"part": "machine", **machine()}) + "\n")
    tables = {}
    for i, part in enumerate(parts):  # what a part leaves over is the later ones'
        share = SECONDS[part] / sum(SECONDS[later] for later in parts[i:])
        tables[part] = run_part(part, cfg, share * (end - time.monotonic()))
    for part, rows in tables.items():
        print(f"\n### {part}\n\n{markdown(rows)}")


if __name__ == "__main__":
    start(main, Config)
