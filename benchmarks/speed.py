"""Is it right on this machine, and how fast?  Correctness, head loss, sampling, PPO's phases,
growth with model and data, and training, on a GPU or a CPU, with random weights.

    python benchmarks/speed.py                          # one H100 or H200: about eight minutes
    python benchmarks/speed.py --minutes 30             # a CPU, at smaller sizes
    python benchmarks/speed.py --parts loss,training --minutes 4
    python benchmarks/speed.py --mini                   # all of it, tiny: a test, not a result

Each part has a time limit of its own; what fails, or finds no time left, says so, and the next
measurement follows.  Rows are appended to --out as they come, one JSON object a line; a table of
each part is printed at the end.  Peers (TRL, Liger, cut-cross-entropy, Quack) are measured where
they are installed.  "over ours" is the median of turn-by-turn ratios, with the least and the most.
Errors are norms of differences over norms; memory is what a call needs beyond what was held before
it.  MFU is against the rate of a large GEMM, bandwidth against that of a large copy, both measured
here.
"""
from __future__ import annotations

import contextlib
import functools
import gc
import importlib.util
import json
import random
import signal
import tempfile
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Iterator
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from compare import machine, markdown, start, tiny_model

import common
import dt
import mle_filter
import ppo_baseline
import reward_model
import rwr
from common import Cost, Example, flag

SECONDS = {"correctness": 65, "loss": 110, "sampling": 100, "ppo": 45, "growth": 40,
           "training": 150}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SHAPES = {  # SmolLM2-135M, Llama-3.2-1B, Llama-3-8B, and what --mini takes in their place
    "135M": dict(hidden_size=576, num_hidden_layers=30, num_attention_heads=9, vocab_size=49152,
                 num_key_value_heads=3, intermediate_size=1536, tie_word_embeddings=True),
    "1B": dict(hidden_size=2048, num_hidden_layers=16, num_attention_heads=32, head_dim=64,
               num_key_value_heads=8, intermediate_size=8192, vocab_size=128256,
               tie_word_embeddings=True),
    "8B": dict(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, vocab_size=128256,
               num_key_value_heads=8, intermediate_size=14336, tie_word_embeddings=False),
    "mini": dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=512,
                 num_key_value_heads=2, intermediate_size=128, tie_word_embeddings=True)}
Measurements = Iterator[tuple[str, Callable[[], dict]]]  # what is measured, and how


@dataclass
class Config:
    """What to measure."""
    parts: str = flag(",".join(SECONDS), "of these, in this order")
    minutes: float = flag(8.0, "for all parts; each has its share, and what others left")
    out: str = flag("runs/speed/speed.jsonl", "file that rows are appended to as they come")
    mini: bool = flag(False, "tiny sizes: a test of this script")

    def __post_init__(self) -> None:
        common.require(set(self.parts.split(",")) <= set(SECONDS),
                       f"--parts: choose from {','.join(SECONDS)}")

    def size(self, gpu: Any, cpu: Any, mini: Any) -> Any:
        """The size for a GPU, for a CPU, or --mini's."""
        return mini if self.mini else gpu if torch.cuda.is_available() else cpu

    def shape(self, name: str, **more: Any) -> dict:
        """A model's shape, or --mini's."""
        return {**SHAPES["mini" if self.mini else name], **more}


# ----------------------------------------------------------------------------------- measuring


def seconds_of(call: Callable, *args: Any) -> tuple[float, Any]:
    """How long a call takes, its work on the GPU included; and its result."""
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    synchronize()
    begin = time.perf_counter()
    result = call(*args)
    synchronize()
    return time.perf_counter() - begin, result


def in_turn(calls: dict[str, Callable], repeats: int = 10) -> dict[str, np.ndarray]:
    """Seconds (repeats,) of each call, made in turn after a first one that compiles; on a GPU by
    its own clock."""
    for call in calls.values():
        call()
    seconds: dict[str, list] = {name: [] for name in calls}
    marks: dict[str, list] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            if not torch.cuda.is_available():
                seconds[name].append(seconds_of(call)[0])
                continue
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            marks[name].append((begin, end))
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        seconds = {name: [begin.elapsed_time(end) / 1000 for begin, end in each]
                   for name, each in marks.items()}
    return {name: np.array(each) for name, each in seconds.items()}


@functools.cache
def gemm_rate(n: int, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product."""
    a, b = (torch.randn(n, n, dtype=dtype, device=common.device()) for _ in range(2))
    return 2 * n**3 / float(np.median(in_turn({"": lambda: a @ b})[""]))


@functools.cache
def bandwidth(size: int) -> float:
    """Bytes/s of a large copy, read and written."""
    a, b = (torch.empty(size, dtype=torch.uint8, device=common.device()) for _ in range(2))
    return 2 * size / float(np.median(in_turn({"": lambda: b.copy_(a)})[""]))


def memory_above(call: Callable) -> float:
    """MiB that a call needs at its peak, beyond what is held before it."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    def status(name: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(name)).split()[1]) / 2**10
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status("VmRSS")
    call()
    return status("VmHWM") - before


class TimeIsUp(BaseException):
    """A part has used its time; no `except Exception` on the way may swallow it."""


def time_is_up(*_: Any) -> None:
    """What the alarm does."""
    raise TimeIsUp


def run_part(part: str, cfg: Config, seconds: float) -> list[dict]:
    """Makes a part's measurements and returns their rows: none begins after so many seconds, and
    what has begun may overrun by half."""
    rows, begun = [], time.monotonic()
    signal.signal(signal.SIGALRM, time_is_up)
    for what, measure in PARTS[part](cfg):
        begin, values = time.monotonic(), {"skipped": "no time left"}
        if begin < begun + seconds:
            signal.setitimer(signal.ITIMER_REAL, begun + 1.5 * seconds - begin)
            try:
                values = measure()
                values["took_s"] = time.monotonic() - begin
            except (Exception, TimeIsUp) as problem:  # one measurement's trouble is not another's
                values = {"error": f"{type(problem).__name__}: {problem}"[:300]}
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
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


# ----------------------------------------------------------------------- random models and data


def new_model(shape: dict, dtype: torch.dtype = torch.float32, packing: bool = True,
              classifier: bool = False, **_: Any) -> Any:
    """A Llama of random weights, made where it will compute."""
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification
    kind = LlamaForSequenceClassification if classifier else LlamaForCausalLM
    config = LlamaConfig(**{"max_position_embeddings": 8192, "bos_token_id": None,
                            "eos_token_id": None, "pad_token_id": None,
                            **({"num_labels": 1} if classifier else {}), **shape})
    torch.manual_seed(0)
    with torch.device(common.device()):
        model = kind._from_config(config, dtype=dtype, attn_implementation="sdpa").eval()
    return common.enable_packing(model) if packing else model


def settings(kind: type = common.Config, **more: Any) -> Any:
    """A script's Config for models that are in no folder."""
    return kind(**{"model": "random", "preferences": "none", "steps": None, **more})


def uneven(count: int, low: int, high: int, vocabulary: int) -> list[list[int]]:
    """Sequences of random ids, of random lengths."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, vocabulary, int(n)).tolist()
            for n in rng.integers(low, high + 1, count)]


def examples_of(ids: list[list[int]], share: float) -> list[Example]:
    """Sequences whose last `share` is the response."""
    return [Example(np.array(row, dtype=np.int32), np.arange(len(row)) >= (1 - share) * len(row))
            for row in ids]


@contextlib.contextmanager
def unpacked(model: Any) -> Iterator[Any]:
    """The model with transformers' own attention."""
    before = model.config._attn_implementation
    model.set_attn_implementation("sdpa")
    try:
        yield model
    finally:
        model.set_attn_implementation(before)


# --------------------------------------------------------------------------------- correctness


def correctness(cfg: Config) -> Measurements:
    """Everything against something plainer."""
    for dtype in DTYPES:
        yield f"packed gradients in {dtype}, against each alone", partial(packed_error, cfg, dtype)
        yield f"FSDP2 over one rank in {dtype}, against none", partial(sharded_error, cfg, dtype)
        yield (f"sampling in {dtype}: greedy against generate, log-probs against a forward",
               partial(sampler_error, cfg, dtype))
    for kind in KERNELS:  # last, as each compiles
        for short, dtype in DTYPES.items():
            for vocabulary in cfg.size((50257, 128256), (50257,), (1009,)):
                yield (f"loss {kind}, {short}, V {vocabulary:,}, in 8 chunks, against float64",
                       partial(head_error, kind, dtype, vocabulary))


def away(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    """The largest, over pairs of tensors, of the norm of their difference over the second's."""
    return max(float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30))
               for a, b in zip(ours, theirs))


def head_error(kind: str, dtype: torch.dtype, vocabulary: int) -> dict:
    """A script's fused loss and gradients against autograd in float64."""
    t = problem(256, 64, vocabulary, 0.9, dtype)
    exact = {name: x.detach().double() if x.is_floating_point() else x for name, x in t.items()}
    for name in ("hidden", "weight"):
        exact[name].requires_grad_()
    size = 256 * vocabulary * dtype.itemsize
    with mock.patch.dict(common.CHUNK_BYTES, {common.device().type: size // 8}):
        loss = ours(kind, t)
    expected = plain(kind, exact)
    loss.backward()
    expected.backward()
    return {"loss": away([loss.detach()], [expected.detach()]),
            "gradient": away([t["hidden"].grad, t["weight"].grad],
                             [exact["hidden"].grad, exact["weight"].grad])}


def packed_error(cfg: Config, dtype: str) -> dict:
    """Packed sequences' loss and gradients against transformers' own, one sequence at a time."""
    run, shape = settings(dtype=dtype), cfg.shape("135M", num_hidden_layers=cfg.size(8, 2, 2))
    policy = common.Policy(new_model(shape), run)
    each = examples_of(uneven(8, 3, cfg.size(400, 100, 40), shape["vocab_size"]), 0.4)
    with mock.patch.object(common, "PADDED_BELOW", 0):  # packed, however small the model
        packed = policy(common.collate(each), mle_filter.masked_nll_)
        packed.backward()
    ours = [p.grad for p in policy.parameters()]
    policy.zero_grad(set_to_none=True)
    total = 0.0
    with unpacked(policy.model) as model:
        for example in each:
            micro = common.collate([example])
            with torch.autocast(common.device().type, policy.dtype,
                                enabled=policy.dtype != torch.float32):
                logits = model(input_ids=micro.input_ids[None], use_cache=False).logits[0]
            alone = F.cross_entropy(logits[micro.rows].float(), micro.targets, reduction="sum")
            alone.backward()
            total += float(alone.detach())
    return {"loss": abs(float(packed.detach()) / total - 1),
            "gradient": away(ours, [p.grad for p in policy.parameters()])}


def sharded_error(cfg: Config, dtype: str) -> dict:
    """A step's loss and gradients under FSDP2 in a group of one, against the bare policy's."""
    shape = cfg.shape("135M", num_hidden_layers=cfg.size(8, 2, 2))
    ids = uneven(8, 3, cfg.size(400, 100, 40), shape["vocab_size"])
    micro, losses, gradients = common.collate(examples_of(ids, 0.4)), [], []
    backend = "nccl" if common.device().type == "cuda" else "gloo"
    dist.init_process_group(backend, rank=0, world_size=1, store=dist.HashStore())
    try:
        for sharding in ("ddp", "fsdp"):
            run = settings(dtype=dtype, sharding=sharding)
            policy = common.wrap_for_ranks(common.Policy(new_model(shape), run), run)
            loss = policy(micro, mle_filter.masked_nll_)
            loss.backward()
            losses.append(loss.detach())
            gradients.append([p.grad.full_tensor() if sharding == "fsdp" else p.grad
                              for p in policy.parameters()])
    finally:
        dist.destroy_process_group()
    return {"loss": away(losses[1:], losses[:1]), "gradient": away(gradients[1], gradients[0])}


def sampler_error(cfg: Config, dtype: str) -> dict:
    """Greedy tokens against generate's, and the log-probs of sampled ones against a forward's."""
    shape = cfg.shape("135M", tie_word_embeddings=False, initializer_range=0.05,
                      num_hidden_layers=cfg.size(30, 4, 2))
    model, most = new_model(shape, DTYPES[dtype]), cfg.size(40, 12, 12)
    prompts = uneven(16, 1, cfg.size(200, 60, 30), shape["vocab_size"])
    run = settings(dtype=dtype, max_response_tokens=most)
    greedy, sampled = (common.sample(model, prompts, run, 0, [-1], Cost(), temperature)
                       for temperature in (0.0, 1.0))
    greedy = [r.ids for r in greedy]
    theirs = generate(model, prompts, most, do_sample=False, temperature=None, top_k=None,
                      top_p=None)
    worst = 0.0
    with torch.inference_mode(), unpacked(model):
        for prompt, r in zip(prompts, sampled):
            ids = torch.tensor([prompt + r.ids], device=common.device())
            log_p = model(input_ids=ids).logits[0, len(prompt) - 1:-1].float().log_softmax(-1)
            log_p = log_p.gather(1, ids[0, len(prompt):, None])[:, 0].cpu()
            worst = max(worst, float((log_p - torch.tensor(r.log_probs)).abs().max()))
    same = sum(a == b for a, b in zip(greedy, theirs))
    return {"equal rows": f"{same} of {len(prompts)}, {len(set().union(*greedy))} different tokens",
            "log-prob": worst}


# ----------------------------------------------------------------------------------- head loss


def ppo_kernel(*rows: torch.Tensor) -> torch.Tensor:
    """PPO's kernel, its statistics thrown away."""
    return ppo_baseline.clipped_surrogate_(*rows, temperature=1.0, clip=0.2,
                                           statistics=torch.zeros(3, device=common.device()))


KERNELS = {"nll": (mle_filter.masked_nll_, ()), "dt": (dt.masked_nll_, ()),
           "weighted": (rwr.weighted_nll_, ("w",)), "ppo": (ppo_kernel, ("old", "advantage"))}


def problem(rows: int, width: int, vocabulary: int, share: float,
            dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Hidden states, head, targets (-100 outside the response), and the losses' columns (N,)."""
    where = common.device()
    random_number = torch.Generator(where).manual_seed(0)
    normal = partial(torch.randn, generator=random_number, device=where)
    mask = torch.rand(rows, generator=random_number, device=where) < share
    targets = torch.randint(0, vocabulary, (rows,), generator=random_number, device=where)
    head, advantage = normal(vocabulary, width, dtype=dtype).div_(width ** 0.5), normal(rows)
    return {"hidden": normal(rows, width, dtype=dtype).requires_grad_(),
            "weight": head.requires_grad_(), "targets": torch.where(mask, targets, -100),
            "mask": mask, "advantage": advantage, "old": normal(rows) - np.log(vocabulary),
            "w": (advantage / 0.25).exp().clamp(max=20.0) / 20}


def ours(kind: str, t: dict[str, torch.Tensor]) -> torch.Tensor:
    """The fused loss of a script, on the response rows alone."""
    rows, (kernel, names) = t["mask"].nonzero().squeeze(1), KERNELS[kind]
    columns = [t[name][rows] for name in ("targets", *names)]
    return common.head_loss(kernel, t["hidden"][rows], t["weight"], *columns)


def plain(kind: str, t: dict[str, torch.Tensor]) -> torch.Tensor:
    """The loss as one would write it: all logits at once, autograd for the rest."""
    logits = t["hidden"] @ t["weight"].t()                                          # (N, V)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    nll = F.cross_entropy(wide, t["targets"], ignore_index=-100, reduction="none")  # (N,)
    if kind == "ppo":
        rho, a = (-nll - t["old"]).exp(), t["advantage"]
        loss = torch.maximum(-a * rho, -a * rho.clamp(0.8, 1.2))
        return torch.where(t["mask"], loss, 0.0).sum()
    return (t["w"] * nll if kind == "weighted" else nll).sum()


def gemms(t: dict[str, torch.Tensor]) -> Callable[[], None]:
    """A call of the three matrix products that every head loss needs."""
    hidden, weight = t["hidden"].detach()[t["mask"]], t["weight"].detach()
    logits, back, grad = hidden @ weight.t(), torch.empty_like(hidden), torch.empty_like(weight)

    def call() -> None:
        torch.mm(hidden, weight.t(), out=logits)
        torch.mm(logits, weight, out=back)
        torch.mm(logits.t(), hidden, out=grad)
    return call


@functools.cache
def peers() -> dict[str, Callable]:
    """Other people's fused losses, of those that are installed."""
    gpu, losses = common.device().type == "cuda", {}
    if hasattr(F, "linear_cross_entropy"):
        losses["torch"] = F.linear_cross_entropy
    with contextlib.suppress(ImportError):
        from cut_cross_entropy import linear_cross_entropy
        losses["cce"] = partial(linear_cross_entropy, impl="cce" if gpu else "torch_compile")
    if gpu:
        with contextlib.suppress(ImportError):
            from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy
            losses["liger"] = liger_fused_linear_cross_entropy
        with contextlib.suppress(ImportError):
            from quack.linear_cross_entropy import chunked_linear_cross_entropy
            losses["quack"] = partial(chunked_linear_cross_entropy, chunk_size=4096)
    return losses


def loss(cfg: Config) -> Measurements:
    """Heads of language models: forward and backward, ours beside each rival."""
    torch._dynamo.config.recompile_limit = 64  # a contender's code is compiled for each shape
    cells = cfg.size(
        [("nll", 16384, 4096, 128256, 1.0), ("nll", 16384, 4096, 128256, 0.4),
         ("weighted", 8192, 4096, 128256, 1.0), ("ppo", 8192, 4096, 128256, 1.0),
         ("nll", 16384, 2048, 151936, 1.0), ("nll", 16384, 576, 49152, 0.4)],
        [("nll", 1024, 576, 49152, 1.0), ("nll", 1024, 576, 49152, 0.4),
         ("weighted", 1024, 576, 49152, 0.4), ("ppo", 1024, 576, 49152, 0.4)],
        [(kind, 64, 64, 1009, 0.4) for kind in ("nll", "weighted", "ppo")])
    for rival in ("GEMMs", *peers(), "plain", "compiled"):  # what compiles for long comes last
        for kind, n, d, v, share in cells:
            if kind == "nll" or rival not in peers():
                yield (f"{kind}, N {n:,}, D {d:,}, V {v:,}, {share:g} of the rows: {rival}",
                       partial(loss_cell, cfg, rival, kind, n, d, v, share))


def loss_cell(cfg: Config, rival: str, kind: str, *shape: Any) -> dict:
    """Milliseconds of ours and of a rival, in turn, and the MiB that each needs."""
    dtype = cfg.size(torch.bfloat16, common.compute_dtype(settings()), torch.float32)
    t = problem(*shape, dtype)
    contenders = {"plain": partial(plain, kind, t), "compiled": partial(torch.compile(plain), kind, t)}
    contenders |= {name: partial(peer, t["hidden"], t["weight"], t["targets"], reduction="sum")
                   for name, peer in peers().items()}

    def step(contender: Callable) -> None:
        t["hidden"].grad = t["weight"].grad = None
        (contender() / len(t["hidden"])).backward()  # as a trainer divides by a batch's tokens
    calls = {"ours": partial(step, partial(ours, kind, t)),
             rival: gemms(t) if rival == "GEMMs" else partial(step, contenders[rival])}
    seconds = in_turn(calls, cfg.size(10, 5, 2))
    each = seconds[rival] / seconds["ours"]
    mib = {name: memory_above(call) for name, call in calls.items()}
    return {"dtype": str(dtype).removeprefix("torch."),
            **{f"{name} ms": 1000 * float(np.median(s)) for name, s in seconds.items()},
            "over ours": f"{np.median(each):.2f} ({each.min():.2f}–{each.max():.2f})",
            **{f"{name} MiB": size for name, size in mib.items()}}


# ------------------------------------------------------------------------------------ sampling


def sampling(cfg: Config) -> Measurements:
    """Tokens a second, ours and generate's, and how much of the memory's bandwidth that takes."""
    cells = cfg.size([("135M", 64), ("1B", 64), ("1B", 256), ("135M", 256)], [("135M", 16)],
                     [("135M", 8)])
    for name, count in cells:
        for rival in ("ours", "generate"):
            yield f"{name}, {count} prompts: {rival}", partial(sample_rate, cfg, name, count, rival)


def generate(model: Any, prompts: list[list[int]], new_tokens: int, **how: Any) -> list[list[int]]:
    """transformers' own sampling of new tokens that do not end."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts],
                        device=model.device)
    how = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, **how}
    with torch.inference_mode(), unpacked(model):
        return model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=new_tokens,
                              pad_token_id=0, **how)[:, width:].tolist()


def sample_rate(cfg: Config, name: str, count: int, rival: str) -> dict:
    """A second call's rate; bandwidth is weights and cache, read once for a token of each row."""
    dtype = cfg.size(torch.bfloat16, common.compute_dtype(settings()), torch.float32)
    model, most = new_model(cfg.shape(name), dtype), cfg.size(128, 32, 12)
    prompts = uneven(count, *cfg.size((32, 128), (32, 128), (4, 16)), model.config.vocab_size)

    def call() -> list:
        if rival == "generate":
            return generate(model, prompts, most)
        run = settings(max_response_tokens=most)
        return [r.ids for r in common.sample(model, prompts, run, 0, [-1], Cost(), 1.0)]
    (first, _), (seconds, rows) = seconds_of(call), seconds_of(call)
    tokens, shape = count * most, model.config
    common.require(sum(map(len, rows)) == tokens, f"of {tokens} tokens {sum(map(len, rows))} came")
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    token = 2 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim * 2
    cache = token * (sum(map(len, prompts)) + tokens / 2)
    read = most * (weights + cache) / seconds
    return {"tokens/s": tokens / seconds, "ms a step": 1000 * seconds / most, "first call s": first,
            "bandwidth used": read / bandwidth(cfg.size(2**31, 2**28, 2**22))}


# -------------------------------------------------------------------------- training and growth


def training(cfg: Config) -> Measurements:
    """Tokens a second of the whole step, ours and TRL's, which comes last: Liger patches
    transformers' models for the rest of the process."""
    cells = cfg.size([("135M", 256, 200, 400, 64), ("1B", 64, 400, 800, 32)],
                     [("135M", 16, 100, 280, 8)], [("135M", 8, 10, 20, 4)])
    runs = {f"{name}, batch {batch}": (cfg.shape(name), data_of(cfg, name, count, low, high), batch)
            for name, count, low, high, batch in cells}
    if torch.cuda.is_available():  # 3.5 GB a layer, 17 GB the embedding and the head
        layers = max(1, min(32, int((0.7 * torch.cuda.mem_get_info()[0] - 17e9) / 3.5e9)))
        runs[f"8B's width, {layers} of 32 layers, batch 16"] = (
            cfg.shape("8B", num_hidden_layers=layers), data_of(cfg, "8B", 16, 700, 1300), 16)
    for name, run in runs.items():
        yield f"{name}: ours", partial(train_rate, cfg, *run)
    for name, run in list(runs.items())[:len(cells)]:
        yield f"{name}: TRL at its best", partial(trl_rate, *run)


def data_of(cfg: Config, name: str, count: int, low: int, high: int) -> list[Example]:
    """Random sequences in a model's vocabulary, whose last 0.3 are the response."""
    return [Example(np.array(ids, dtype=np.int32), np.arange(len(ids)) >= 0.7 * len(ids))
            for ids in uneven(count, low, high, cfg.shape(name)["vocab_size"])]


def train_rate(cfg: Config, shape: dict, examples: list[Example], batch: int) -> dict:
    """mle_filter.py's own train() on a random model: three epochs, of which the last two count."""
    run = settings(mle_filter.Config, keep=1.0, batch_size=batch, epochs=3, save_every=0,
                   micro_batch_tokens=cfg.size(32768 if shape["hidden_size"] < 1024 else 16384,
                                               8192, 8192))
    policy = common.Policy(common.load_for_training(partial(new_model, shape), run), run)
    with tempfile.TemporaryDirectory() as folder, mock.patch.multiple(
            common, Codec=mock.Mock(), save_policy=mock.Mock(), load_policy=lambda *_: policy):
        tokens = common.Tokens(Path(folder, "tokens"), lambda: [e[:2] for e in examples])
        rewards = np.arange(len(examples), dtype=np.float64)
        samples = common.Samples(tokens, rewards, rewards, rewards)
        memory = memory_above(lambda: mle_filter.train(
            run, mock.Mock(), samples, Path(folder), Cost()))
        lines = [line for _, line in common.read_jsonl(Path(folder, "metrics.jsonl"))]
    first, last = lines[len(lines) // 3 - 1], lines[-1]
    seconds = (last["seconds"] - first["seconds"]) / 2
    rate = (last["flops"] - first["flops"]) / 2 / seconds
    return {"tokens/s": int(tokens.offsets[-1]) / seconds, "epoch s": seconds,
            "TFLOP/s": rate / 1e12, "MFU": rate / gemm_rate(cfg.size(8192, 2048, 256), policy.dtype),
            "first epoch s": first["seconds"], "MiB": memory}


def trl_rate(shape: dict, examples: list[Example], batch: int) -> dict:
    """TRL's SFTTrainer at its best, on the same ids: no recomputation, batches grouped by length,
    on a GPU Liger's kernels; the second epoch, from its first step to its last."""
    if importlib.util.find_spec("trl") is None:
        return {"skipped": "TRL is not installed"}
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import SFTConfig, SFTTrainer
    gpu, times = torch.cuda.is_available(), []

    class Clock(TrainerCallback):
        def on_step_begin(self, args, state, control, **more):
            if state.global_step == 0:
                times.append(seconds_of(time.perf_counter)[1])

        def on_step_end(self, args, state, control, **more):
            self.end = seconds_of(time.perf_counter)[1]
    tokenizer = PreTrainedTokenizerFast(eos_token="<eos>", pad_token="<eos>", tokenizer_object=(
        Tokenizer(models.WordLevel({"<eos>": 0}, unk_token="<eos>"))))
    data = Dataset.from_list([{"input_ids": e.ids.tolist(), "completion_mask": e.mask.tolist()}
                              for e in examples])
    arguments = SFTConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=batch, max_length=None,
        num_train_epochs=1, bf16=common.compute_dtype(settings()) == torch.bfloat16,
        use_cpu=not gpu, report_to=[], save_strategy="no", disable_tqdm=True,
        logging_strategy="no", completion_only_loss=True, gradient_checkpointing=False,
        train_sampling_strategy="group_by_length",
        use_liger_kernel=gpu and importlib.util.find_spec("liger_kernel") is not None)
    clock = Clock()
    trainer = SFTTrainer(model=new_model(shape, packing=False), args=arguments, train_dataset=data,
                         callbacks=[clock], processing_class=tokenizer)
    for _ in range(2):
        trainer.train()
    seconds = clock.end - times[-1]
    return {"tokens/s": sum(len(e.ids) for e in examples) / seconds, "epoch s": seconds}


def growth(cfg: Config) -> Measurements:
    """How a step grows with the model, and a script's start with the samples."""
    for layers in cfg.size((10, 20, 30), (4, 8, 16), (1, 2)):
        shape = cfg.shape("135M", num_hidden_layers=layers)
        examples = data_of(cfg, "135M", *cfg.size((64, 200, 400), (16, 100, 280), (8, 10, 20)))
        yield f"training, {layers} layers of the 135M", partial(
            train_rate, cfg, shape, examples, len(examples) // 2)
    for rows in cfg.size((10_000, 40_000), (10_000, 40_000), (100, 200)):
        yield f"reading {rows:,} samples", partial(read_rate, rows)


def read_rate(rows: int) -> dict:
    """What a labelled sample of some 60 words costs at a script's start, on disk and in memory."""
    words, rng = "the a of river small large otter lives eats plants meat and in".split(), random.Random(0)
    texts = [" ".join(rng.choice(words) for _ in range(60)) for _ in range(rows)]
    with tempfile.TemporaryDirectory() as folder:
        run = settings(out=folder, max_prompt_tokens=64, max_response_tokens=128)
        base = tiny_model(f"{folder}/base", texts[:100])
        file = Path(folder, "samples.jsonl")
        file.write_text("".join(json.dumps({"prompt": f"Human: {i}?", "response": text,
                                            "reward": rng.gauss(0, 1)}) + "\n"
                                for i, text in enumerate(texts)))
        common.read_samples(file, run, base)  # the tokenizer is ready after this
        begin = time.perf_counter()
        memory = memory_above(lambda: common.read_samples(file, run, base))
        seconds = time.perf_counter() - begin
        on_disk = sum(path.stat().st_size for path in Path(folder, ".tokens").iterdir())
    return {"microseconds a sample": 1e6 * seconds / rows, "disk bytes a sample": on_disk / rows,
            "MiB": memory}


# ----------------------------------------------------------------------------------------- PPO


class Ids:
    """A codec whose texts are ids."""
    stop_ids = [-1]

    def prompt(self, ids: list[int]) -> list[int]:
        return ids

    def decode(self, response: common.Response) -> list[int]:
        return response.ids


def ppo(cfg: Config) -> Measurements:
    """The phases of an iteration."""
    yield "135M: PPO's phases with one pass, and DT's share", partial(ppo_phases, cfg)


def ppo_phases(cfg: Config) -> dict:
    """ppo_baseline.py's own train() on random models: the last of its iterations; and DT's share:
    it labels a logged reply by one forward and learns from it once, 4 passes beside PPO's 10 and
    generation, so about 0.4 (1 - g)."""
    raise NotImplementedError


PARTS = {"correctness": correctness, "loss": loss, "sampling": sampling, "ppo": ppo,
         "growth": growth, "training": training}


def main(cfg: Config) -> None:
    """Says what it will cost, measures, and prints a table of each part."""
    parts, begin = cfg.parts.split(","), time.monotonic()
    Path(cfg.out).parent.mkdir(parents=True, exist_ok=True)
    print(f"at most {cfg.minutes:g} minutes; rows go to {cfg.out}")
    with open(cfg.out, "a") as file:
        file.write(json.dumps({"part": "machine", **machine()}) + "\n")
    tables, end = {}, begin + 60 * cfg.minutes
    for i, part in enumerate(parts):  # what a part leaves over is the later ones'
        share = SECONDS[part] / sum(SECONDS[later] for later in parts[i:])
        tables[part] = run_part(part, cfg, share * (end - time.monotonic()))
    for part, rows in tables.items():
        print(f"\n### {part}\n\n{markdown(rows)}")
    print(f"\n{time.monotonic() - begin:.0f} s")


if __name__ == "__main__":
    start(main, Config)
