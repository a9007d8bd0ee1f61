"""Is it right on this machine, and how fast?  On a GPU or a CPU, with random weights.

    python benchmarks/speed.py                          # one H100 or H200: about eight minutes
    python benchmarks/speed.py --minutes 30             # a CPU, at smaller sizes
    python benchmarks/speed.py --parts loss training
    python benchmarks/speed.py --mini                   # all of it, tiny: a test, not a result

- correctness: the scripts' losses and gradients against autograd in float64, norms of differences
  over norms (expect less than 1e-5 in float32, 1e-2 in bfloat16); greedy responses that equal those
  of transformers' generate (expect all; in bfloat16 a near tie may go either way).
- loss: a language model's head, forward and backward.  `products` are the three matrix products
  that any such loss needs; `plain` makes all logits at once; `compiled` is plain under
  torch.compile; `torch` is F.linear_cross_entropy, which exists since torch 2.13.
- training: steps of mle_filter.py, and what a run takes before and after them.
- sampling: ours and transformers' generate.
- ppo: where the time of an iteration of ppo_baseline.py goes.

No measurement begins after --minutes; one that fails says why, and the next one follows.  Rows are
appended to --out as they come; a table of each part is printed at the end.
"""
from __future__ import annotations

import gc
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

from compare import append_rows, machine, markdown, read_rows, run_script, start, tiny_base

import common
import mle_filter
import ppo_baseline
import rwr
from common import Cost, flag

PARTS = ("correctness", "loss", "training", "sampling", "ppo")  # functions below
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
    parts: list[str] = flag(list(PARTS), f"of {', '.join(PARTS)}")
    minutes: float = flag(8.0, "time after which no measurement begins")
    out: str = flag("runs/speed/speed.jsonl", "file that rows are appended to as they come")
    mini: bool = flag(False, "tiny sizes: a test of this script")

    def __post_init__(self) -> None:
        common.require(set(self.parts) <= set(PARTS), f"--parts: choose from {', '.join(PARTS)}")

    def size(self, gpu: Any, cpu: Any, mini: Any) -> Any:
        """The size for a GPU, for a CPU, or --mini's."""
        return mini if self.mini else gpu if torch.cuda.is_available() else cpu


# ----------------------------------------------------------------------------------- measuring


def run_part(part: str, cfg: Config, end: float) -> list[dict]:
    """Makes a part's measurements, of which none begins after `end`; returns their rows."""
    rows = []
    for what, measure in globals()[part](cfg):
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
        append_rows(Path(cfg.out), [{"part": part, **row}])
        print(", ".join(f"{name} {value}" for name, value in row.items()), flush=True)
        gc.collect()
        torch.cuda.empty_cache()
    return rows


def milliseconds(call: Callable, least: float) -> float:
    """The median time of a call, its work on a GPU included, after calls that compile; measured
    for `least` seconds or more."""
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    return 1000 * timer.blocked_autorange(min_run_time=least).median


def peak_mib(call: Callable) -> float:
    """The most memory that a call needs on the GPU."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


# ------------------------------------------------------------------------------- random models


def shape(name: str, **changes: Any) -> dict:
    """The shape of one of SHAPES, with changes."""
    return {**dict(zip(NAMES, SHAPES[name])), **changes}


def model_and_prompts(shape: dict, dtype: torch.dtype, count: int, low: int,
                      high: int) -> tuple[Any, list[list[int]]]:
    """A Llama of random weights, as the scripts load it, and prompts of random ids."""
    with tempfile.TemporaryDirectory() as folder:
        model = common.load_model(tiny_base(folder, WORDS, **shape).path, dtype)
    rng = np.random.default_rng(0)
    return model, [rng.integers(0, model.config.vocab_size, rng.integers(low, high + 1)).tolist()
                   for _ in range(count)]


def settings(**flags: Any) -> common.Config:
    """The shared flags where no data are read."""
    return common.Config(model="random", preferences="none", **flags)


def length_reward(prompts: list, responses: list[str]) -> list[float]:
    """A reward that costs nothing."""
    return [float(len(response)) for response in responses]


def metrics_of(script: str, shape: dict, rows: int, words: tuple[int, int],
               **flags: Any) -> tuple[list[dict], int]:
    """The metrics of a script on a random model and samples of random words, about a token each,
    the last 0.3 of them the response; and how many tokens the samples have."""
    with tempfile.TemporaryDirectory() as folder:
        rng, file = np.random.default_rng(0), Path(folder, "given.jsonl")
        texts = [" ".join(rng.choice(WORDS, rng.integers(*words))) for _ in range(rows)]
        append_rows(file, [{"prompt": text[:7 * len(text) // 10],
                            "response": text[7 * len(text) // 10:]} for text in texts])
        flags = {"model": tiny_base(f"{folder}/base", texts, **shape).path, "samples": file,
                 "reward_model": f"{__file__}:length_reward", "eval_prompts": 0, "save_every": 0,
                 **flags}
        run_script(Path(folder, "run"), script,
                   *(text for name, value in flags.items() for text in (f"--{name}", value)))
        metrics, = Path(folder, "run").glob("[a-z]*/metrics.jsonl")
        tokens = np.load(Path(folder, "run", ".tokens", "offsets.npy"))[-1]
        return read_rows(metrics), int(tokens)


# --------------------------------------------------------------------- correctness and head loss


def correctness(cfg: Config) -> Measurements:
    """Losses and sampler against something plainer."""
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

    def error(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a.detach().double() - b.detach()).norm() / b.detach().norm())
    gradients = zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, exact_inputs))
    return {"loss error": error(ours, theirs),
            "gradient error": max(error(a, b) for a, b in gradients)}


def sampler_error(cfg: Config, dtype: torch.dtype) -> dict:
    """How many greedy responses are generate's, token for token."""
    model, prompts = model_and_prompts(
        shape(cfg.size("135M", "135M", "mini"), tie_word_embeddings=False, initializer_range=0.05,
              num_hidden_layers=cfg.size(30, 4, 2)), dtype, 16, 1, cfg.size(200, 60, 30))
    most = cfg.size(40, 12, 12)
    ours = common.sample(model, prompts, settings(max_response_tokens=most), 0, [-1], Cost(), 0.0)
    theirs = generate(model, prompts, most, do_sample=False)
    same = sum(response.ids == row for response, row in zip(ours, theirs))
    return {"equal responses": f"{same} of {len(prompts)}"}


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
    """Heads of language models: forward and backward, ours beside its rivals."""
    torch._dynamo.config.recompile_limit = 64  # a rival's code is compiled for each shape
    cells = cfg.size(
        [("nll", 16384, 4096, 128256, 1.0), ("nll", 16384, 4096, 128256, 0.4),
         ("weighted", 8192, 4096, 128256, 1.0), ("ppo", 8192, 4096, 128256, 1.0),
         ("nll", 16384, 2048, 151936, 1.0), ("nll", 16384, 576, 49152, 0.4)],
        [("nll", 1024, 576, 49152, 1.0), ("nll", 1024, 576, 49152, 0.4),
         ("weighted", 1024, 576, 49152, 0.4), ("ppo", 1024, 576, 49152, 0.4)],
        [(kind, 64, 64, 1009, 0.4) for kind in KERNELS])
    for kind, n, d, v, share in cells:
        yield (f"{kind}, N {n:,}, D {d:,}, V {v:,}, {share:g} of the rows",
               partial(loss_cell, cfg, kind, n, d, v, share))


def loss_cell(cfg: Config, kind: str, *sizes: Any) -> dict:
    """Milliseconds of ours and of each rival, and on a GPU the MiB of ours and of plain."""
    t = problem(*sizes, cfg.size(torch.bfloat16, common.compute_dtype(settings()), torch.float32))
    inputs = [t["hidden"].requires_grad_(), t["weight"].requires_grad_()]

    def step(contender: Callable, *args: Any, **options: Any) -> None:
        torch.autograd.grad(contender(*args, **options) / sizes[0], inputs)
    calls = {"ours": partial(step, fused, kind, t, *inputs),
             "products": partial(products, t, *inputs),
             "plain": partial(step, plain, kind, t, *inputs),
             "compiled": partial(step, torch.compile(plain), kind, t, *inputs)}
    if kind == "nll" and hasattr(F, "linear_cross_entropy"):
        calls["torch"] = partial(step, F.linear_cross_entropy, *inputs, t["targets"],
                                 reduction="sum")
    row = {f"{name} ms": milliseconds(call, cfg.size(1.0, 5.0, 0.01))
           for name, call in calls.items()}
    if torch.cuda.is_available():
        row |= {f"{name} MiB": peak_mib(calls[name]) for name in ("ours", "plain")}
    return row


# ------------------------------------------------------------------------------- whole scripts


def training(cfg: Config) -> Measurements:
    """Models of more and more layers."""
    runs = {"135M": cfg.size((256, (200, 400), 64, 32768), (16, (100, 280), 8, 8192), ()),
            "1B": (64, (400, 800), 32, 16384), "mini": (8, (10, 20), 4, 8192)}
    for name, layers in cfg.size([("135M", 10), ("135M", 20), ("135M", 30), ("1B", 16)],
                                 [("135M", 10), ("135M", 20), ("135M", 30)], [("mini", 2)]):
        yield (f"{name}, {layers} layers, {runs[name][0]} sequences",
               partial(train_rate, shape(name, num_hidden_layers=layers), *runs[name]))


def train_rate(shape: dict, rows: int, words: tuple, batch: int, budget: int) -> dict:
    """Tokens a second of mle_filter.py's steps: three epochs, of which the last two count."""
    begin = time.perf_counter()
    lines, tokens = metrics_of("mle_filter.py", shape, rows, words, keep=1.0, batch_size=batch,
                               epochs=3, micro_batch_tokens=budget)
    whole, first, last = time.perf_counter() - begin, lines[len(lines) // 3 - 1], lines[-1]
    seconds = (last["seconds"] - first["seconds"]) / 2
    rate = (last["flops"] - first["flops"]) / 2 / seconds
    return {"tokens/s": tokens / seconds, "TFLOP/s": rate / 1e12,
            "first epoch s": first["seconds"], "before and after s": whole - last["seconds"]}


def sampling(cfg: Config) -> Measurements:
    """Tokens a second, ours and transformers' generate."""
    for name, count in cfg.size([("135M", 64), ("1B", 64), ("1B", 256), ("135M", 256)],
                                [("135M", 16)], [("mini", 8)]):
        yield f"{name}, {count} prompts", partial(sample_rate, cfg, name, count)


def generate(model: Any, prompts: list[list[int]], new_tokens: int, **how: Any) -> list[list[int]]:
    """transformers' own sampling, from one left-padded batch, of new tokens that do not end."""
    width, before = max(map(len, prompts)), model.config._attn_implementation
    padded = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=model.device)
    starts = torch.tensor([[width - len(p)] for p in prompts], device=model.device)
    how = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0} | how
    model.set_attn_implementation("sdpa")  # ours knows no padding
    with torch.inference_mode(), torch.compiler.set_stance("force_eager"):  # our sampler compiles
        ids = model.generate(padded, attention_mask=torch.arange(width, device=model.device)
                             >= starts, max_new_tokens=new_tokens, eos_token_id=-1, pad_token_id=0,
                             **how)
    model.set_attn_implementation(before)
    return ids[:, width:].tolist()


def sample_rate(cfg: Config, name: str, count: int) -> dict:
    """The rates after a first call, which compiles."""
    model, prompts = model_and_prompts(shape(name), common.compute_dtype(settings()), count,
                                       *cfg.size((32, 128), (32, 128), (4, 16)))
    most = cfg.size(128, 32, 12)
    ours = partial(common.sample, model, prompts, settings(max_response_tokens=most), 0, [-1],
                   Cost(), 1.0)
    row = {}
    for who, call in ("ours", ours), ("generate", partial(generate, model, prompts, most)):
        call()
        begin = time.perf_counter()
        call()  # its result is on the CPU
        row[f"{who} tokens/s"] = count * most / (time.perf_counter() - begin)
    return row


def ppo(cfg: Config) -> Measurements:
    """PPO's iterations, with one pass and a critic of the policy's size."""
    name, count = cfg.size(("135M", 256), ("135M", 12), ("mini", 8))
    yield f"{name}, {count} responses", partial(rollout_share, cfg, name, count)


def rollout_share(cfg: Config, name: str, count: int) -> dict:
    """Seconds of the third iteration, and of its rollout; scoring is not in it, as the reward is
    a function's."""
    seconds, roll_out = [], ppo_baseline.roll_out

    def timed(*args: Any) -> Any:
        begin = time.perf_counter()
        result = roll_out(*args)  # which is on the CPU
        seconds.append(time.perf_counter() - begin)
        return result
    with mock.patch.object(ppo_baseline, "roll_out", timed):
        lines, _ = metrics_of(
            "ppo_baseline.py", shape(name), 2 * count, (45, 180), rollout_batch_size=count,
            batch_size=count // 4, ppo_epochs=1, steps=3, max_response_tokens=cfg.size(128, 48, 8),
            micro_batch_tokens=cfg.size(32768, 8192, 8192))
    whole = lines[2]["seconds"] - lines[1]["seconds"]
    return {"iteration s": whole, "rollout s": seconds[2], "its share": seconds[2] / whole}


def main(cfg: Config) -> None:
    """Measures part by part, and prints a table of each."""
    end = time.monotonic() + 60 * cfg.minutes
    Path(cfg.out).parent.mkdir(parents=True, exist_ok=True)
    append_rows(Path(cfg.out), [{"part": "machine", **machine()}])
    tables = {part: run_part(part, cfg, end) for part in cfg.parts}
    for part, rows in tables.items():
        print(f"\n### {part}\n\n{markdown(rows)}")


if __name__ == "__main__":
    start(main, Config)
