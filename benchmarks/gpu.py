"""Everything that one GPU can say of this project, in eight minutes: is it right, and is it fast?

    python benchmarks/gpu.py                                    # one H100 or H200, random weights
    python benchmarks/gpu.py --parts loss,training --minutes 4
    python benchmarks/gpu.py --mini                             # all of it, tiny, on a CPU

Each part has a time limit of its own; a measurement that fails or for which there is no time says
so, and the next one follows.  Rows go to --out as they come, a JSON object a line, and a table a
part is printed at the end.  Peers (TRL, Liger, cut-cross-entropy, Quack) are measured where they
are installed.  Errors are norms of differences over norms; memory is beyond what a caller holds.
MFU is against the rate of a large bfloat16 GEMM, bandwidth against that of a large copy, both
measured here.
"""
from __future__ import annotations

import functools
import importlib.util
import itertools
import math
import time
from dataclasses import dataclass, replace
from typing import Any, Callable, Iterable

import torch
import torch.distributed as dist

from measure import (Bench, bandwidth, gemm_rate, machine, markdown, median_seconds, memory_above,
                     seconds_of, start)
from shapes import SHAPES, Ids, labelled, new_model, on_disk, settings, uneven

import common
import dt
import loss as head
import ppo_baseline
import reward_model
import sample as sampling
import train as training
from common import Cost, Example, flag

SECONDS = {"correctness": 65, "loss": 110, "sampling": 100, "ppo": 45, "deep": 30, "training": 130}


@dataclass
class Config:
    """What to measure."""
    parts: str = flag(",".join(SECONDS), "of these, in this order")
    minutes: float = flag(8.0, "of all parts, each by its share and what others left", "(0, inf)")
    out: str = flag("runs/gpu/gpu.jsonl", "file that rows are added to as they come")
    mini: bool = flag(False, "tiny shapes: all of it in a few minutes on a CPU")

    def __post_init__(self) -> None:
        common.require(set(self.parts.split(",")) <= set(SECONDS),
                       f"--parts: choose from {','.join(SECONDS)}")


def away(ours: Iterable[torch.Tensor], theirs: Iterable[torch.Tensor]) -> float:
    """The largest, over pairs of tensors, of the norm of their difference over the second's."""
    return max(float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30))
               for a, b in zip(ours, theirs))


def shape_of(bench: Bench, name: str, **more: Any) -> dict:
    """A model's shape, or --mini's."""
    return {**SHAPES["mini" if bench.mini else name], **more}


# -------------------------------------------------------------------------------------- correctness


def correctness(bench: Bench) -> None:
    """Everything against something plainer."""
    for dtype in head.DTYPES:
        bench.measure(f"packed gradients in {dtype}, each alone beside", packed_error, bench, dtype)
        bench.measure(f"FSDP2 over one rank in {dtype}, against none", sharded_error, bench, dtype)
    for name, dtype in head.DTYPES.items():
        bench.measure(f"head loss in {name}, one chunk against eight", chunk_error, bench, dtype)
    for name in ("nll", "dt", "weighted", "ppo"):  # last: each compiles
        for short, dtype in head.DTYPES.items():
            for vocabulary in bench.few((50257, 128256), (1009,)):
                bench.measure(f"kernel {name}, {short}, V {vocabulary:,}, against float64",
                              kernel_error, name, dtype, vocabulary)


def kernel_error(name: str, dtype: torch.dtype, vocabulary: int) -> dict:
    """A script's kernel against autograd in float64."""
    t = head.problem(256, 64, vocabulary, 1.1, dtype)
    kernel, columns = (dt.masked_nll_, ()) if name == "dt" else head.kernel_of(name)
    ours = (3 * t["hidden"] @ t["weight"].t()).detach()
    exact, wide = ours.double().requires_grad_(), {
        k: v.double() if v.is_floating_point() else v for k, v in t.items()}
    found = kernel(ours, t["targets"], *(t[column] for column in columns))
    expected = head.row_losses("nll" if name == "dt" else name, exact, wide)
    expected.sum().backward()
    return {"loss": away([found], [expected.detach()]), "gradient": away([ours], [exact.grad])}


def chunk_error(bench: Bench, dtype: torch.dtype) -> dict:
    """The head loss in one chunk against in eight, the worst kind of loss."""
    t = head.problem(*bench.few((2048, 576, 50257), (128, 64, 1009)), 0.9, dtype)
    kind, size = common.device().type, len(t["targets"]) * len(t["weight"]) * dtype.itemsize
    before, found = common.CHUNK_BYTES[kind], []
    for name, limit in itertools.product(("nll", "weighted", "ppo"), (2**40, size // 8)):
        t["hidden"].grad = t["weight"].grad = None
        common.CHUNK_BYTES[kind] = limit
        try:
            value = head.ours(name, t)
        finally:
            common.CHUNK_BYTES[kind] = before
        value.backward()
        found.append((value.detach(), t["hidden"].grad, t["weight"].grad))
    losses, *gradients = zip(*found)
    return {"loss": away(losses[1::2], losses[::2]),
            "gradient": max(away(each[1::2], each[::2]) for each in gradients)}


def packed_error(bench: Bench, dtype: str) -> dict:
    """Packed sequences' loss and gradients against transformers' own, one sequence at a time."""
    run, shape = settings(dtype=dtype), shape_of(bench, "135M", num_hidden_layers=bench.few(8, 2))
    policy = common.Policy(new_model(shape), run)
    each = labelled(uneven(8, 3, bench.few(400, 40), shape["vocab_size"]), 0.4)
    packed = policy(common.collate(each), training.mle_filter.masked_nll_)
    packed.backward()
    ours = [p.grad for p in policy.parameters()]
    policy.zero_grad(set_to_none=True)
    total = 0.0
    with sampling.unpacked(policy.model) as model:
        for example in each:
            micro = common.collate([example])
            with torch.autocast(common.device().type, policy.dtype,
                                enabled=policy.dtype != torch.float32):
                logits = model(input_ids=micro.input_ids[None], use_cache=False).logits[0]
            alone = torch.nn.functional.cross_entropy(logits[micro.rows].float(), micro.targets,
                                                      reduction="sum")
            alone.backward()
            total += float(alone.detach())
    return {"loss": abs(float(packed.detach()) / total - 1),
            "gradient": away(ours, [p.grad for p in policy.parameters()])}


def sampler_error(bench: Bench, dtype: str) -> dict:
    """Greedy tokens against generate's, and the log-probs of drawn ones against a forward's."""
    shape = shape_of(bench, "135M", tie_word_embeddings=False, initializer_range=0.05)
    model, most = new_model(shape, head.DTYPES[dtype]), bench.few(40, 12)
    prompts = uneven(16, 1, bench.few(200, 30), shape["vocab_size"])
    run = settings(dtype=dtype, max_response_tokens=most, slots=5, temperature=0.0)
    greedy = [r.ids for r in common.sample(model, prompts, run, 0, [-1], Cost())]
    theirs = sampling.generate(model, prompts, most, None, do_sample=False, temperature=None,
                               top_k=None, top_p=None)
    drawn = common.sample(model, prompts, replace(run, temperature=1.0), 0, [-1], Cost())
    worst = 0.0
    with torch.inference_mode(), sampling.unpacked(model):
        for prompt, r in zip(prompts, drawn):
            ids = torch.tensor([prompt + r.ids], device=common.device())
            log_p = model(input_ids=ids).logits[0, len(prompt) - 1:-1].float().log_softmax(-1)
            log_p = log_p.gather(1, ids[0, len(prompt):, None])[:, 0].cpu()
            worst = max(worst, float((log_p - torch.tensor(r.log_probs)).abs().max()))
    same = sum(x == y for a, b in zip(greedy, theirs) for x, y in zip(a, b)) / most / len(prompts)
    return {"equal": f"{sum(a == b for a, b in zip(greedy, theirs))} of {len(prompts)} rows, "
            f"{len(set().union(*greedy))} different tokens", "equal tokens": same,
            "log-prob": worst}


def sharded_error(bench: Bench, dtype: str) -> dict:
    """A step's loss and gradients under FSDP2 in a group of one, against the bare policy's."""
    shape = shape_of(bench, "135M", num_hidden_layers=bench.few(8, 2))
    micro = common.collate(labelled(uneven(8, 3, bench.few(400, 40), shape["vocab_size"]), 0.4))
    backend, found = "nccl" if common.device().type == "cuda" else "gloo", []
    dist.init_process_group(backend, rank=0, world_size=1, store=dist.HashStore())
    try:
        for sharding in ("ddp", "fsdp"):
            run = settings(dtype=dtype, sharding=sharding)
            policy = common.wrap_for_ranks(common.Policy(new_model(shape), run), run)
            value = policy(micro, training.mle_filter.masked_nll_)
            value.backward()
            found.append((value.detach(), [p.grad.full_tensor() if sharding == "fsdp" else p.grad
                                           for p in policy.parameters()]))
        (bare, first), (sharded, second) = found
        return {"loss": away([sharded], [bare]), "gradient": away(second, first)}
    finally:
        dist.destroy_process_group()


# ---------------------------------------------------------------------------------------- head loss


def loss(bench: Bench) -> None:
    """Heads of language models, each contender in turn, beside the GEMMs that all of them need."""
    torch._dynamo.config.recompile_limit = 64  # a contender's code is compiled for each shape
    cells = bench.few(
        [("nll", 16384, 4096, 128256, 1.0), ("nll", 16384, 4096, 128256, 0.4),
         ("weighted", 8192, 4096, 128256, 1.0), ("ppo", 8192, 4096, 128256, 1.0),
         ("nll", 16384, 2048, 151936, 1.0), ("nll", 16384, 576, 49152, 0.4)],
        [(kind, 64, 64, 1009, 0.4) for kind in ("nll", "weighted", "ppo")])
    later = []
    for kind, n, d, v, share in cells:  # ours and the GEMMs first, then those that compile for long
        name = f"{kind}, N {n:,}, D {d:,}, V {v:,}, {share:g} of the rows"
        t = functools.partial(head.problem, n, d, v, share, torch.bfloat16)
        ours: dict = {}
        bench.measure(name, own_loss, kind, t, ours)
        rivals = ["plain", "compiled", *(head.peers() if kind == "nll" else ())]
        later += [(name, kind, t, rival, ours) for rival in reversed(rivals) if rival != "torch"]
    for name, *rest in sorted(later, key=lambda row: row[3] in ("plain", "compiled")):
        bench.measure(f"{name}: {rest[2]}", rival_loss, *rest)


def own_loss(kind: str, problem: Callable, ours: dict) -> dict:
    """Our loss, the GEMMs alone, and the kernel alone: ms, and the bytes that it must move (logits
    read twice and written once) over its time."""
    t = problem()
    found, rows = rival_loss(kind, lambda: t, "ours", ours), t["mask"].nonzero().squeeze(1)
    hidden, weight = t["hidden"].detach()[rows], t["weight"].detach()
    t["hidden"].grad = t["weight"].grad = None
    kernel, names = head.kernel_of(kind)
    part, logits = next(common.logit_chunks(hidden, weight))  # all are of about its size
    columns = [t[name][rows][part] for name in ("targets", *names)]
    one = median_seconds(lambda: kernel(logits, *columns)) / len(logits)
    width, spent = 3 * logits[0].numel() * logits.element_size(), one * len(rows)
    whole, back, grad = hidden @ weight.t(), torch.empty_like(hidden), torch.empty_like(weight)

    def gemms() -> None:
        torch.mm(hidden, weight.t(), out=whole)
        torch.mm(whole, weight, out=back)
        torch.mm(whole.t(), hidden, out=grad)
    alone = 1000 * median_seconds(gemms)
    return {**found, "GEMMs ms": alone, "ours / GEMMs": found["ms"] / alone,
            "kernel ms": 1000 * spent, "kernel GB/s": width / one / 1e9}


def rival_loss(kind: str, problem: Callable, rival: str, ours: dict) -> dict:
    """A contender's time, also as a multiple of ours, and its memory."""
    t = problem()
    call = head.steps_of(kind, t)[rival]
    ours[rival] = median_seconds(call)
    return {"ms": 1000 * ours[rival], "over ours": ours[rival] / ours.get("ours", math.nan),
            "MiB": head.mib_of(rival, call, t)}


# ----------------------------------------------------------------------------------------- training


def training_part(bench: Bench) -> None:
    """Tokens a second of the whole step, ours with and without compiled blocks, and TRL's, which
    comes last of all: Liger patches transformers' models for the rest of the process."""
    cells = []
    for name, count, low, high, batch in bench.few(
            [("135M", 256, 200, 400, 64), ("1B", 64, 400, 800, 32)], [("135M", 8, 10, 20, 4)]):
        ids = uneven(count, low, high, shape_of(bench, name)["vocab_size"])
        cells.append((name, batch, labelled(ids, 0.3)))
    for name, batch, each in cells:
        for compiled in (True, False):
            bench.measure(f"{name}, batch {batch}, blocks {'compiled' if compiled else 'eager'}",
                          train_rate, bench, shape_of(bench, name), each, batch, compiled)
    liger = importlib.util.find_spec("liger_kernel") is not None
    for name, batch, each in cells:
        bench.measure(f"{name}, TRL{' with Liger' * liger}, by length, no recomputation", trl_rate,
                      shape_of(bench, name), each, batch, liger)


def train_rate(bench: Bench, shape: dict, each: list[Example], batch: int, compiled: bool) -> dict:
    """Ours: the second and third epoch."""
    run = settings(batch_size=batch, compile=compiled)
    model = common.load_for_training(functools.partial(new_model, shape), run)
    epoch = training.ours(common.Policy(model, run), on_disk(each), run)
    first, later = epoch(), []
    memory = memory_above(lambda: later.extend(epoch() for _ in range(2)))
    best = min(later, key=lambda cost: cost.seconds)
    rate = best.flops / best.seconds
    return {"tokens/s": sum(len(e.ids) for e in each) / best.seconds, "TFLOP/s": rate / 1e12,
            "MFU": rate / gemm_rate(bench.few(8192, 256)), "micro-batch": run.micro_batch_tokens,
            "GiB beyond weights, moments": memory / 2**30, "first epoch s": first.seconds}


def trl_rate(shape: dict, each: list[Example], batch: int, liger: bool) -> dict:
    """TRL's SFTTrainer at its best: the second epoch."""
    if importlib.util.find_spec("trl") is None:
        return {"skipped": "not installed"}
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    tokenizer = PreTrainedTokenizerFast(eos_token="<eos>", pad_token="<eos>", tokenizer_object=(
        Tokenizer(models.WordLevel({"<eos>": 0}, unk_token="<eos>"))))
    run, model = settings(batch_size=batch), new_model(shape, packing=False)
    epoch = training.theirs(model, tokenizer, on_disk(each), run, "bf16", use_liger_kernel=liger,
                            **training.BEST)
    first, seconds = epoch(), epoch()
    return {"tokens/s": sum(len(e.ids) for e in each) / seconds, "first epoch s": first}


# ----------------------------------------------------------------------------------------- sampling


def sampling_part(bench: Bench) -> None:
    """Tokens a second, ours and generate's, and how much of the memory's bandwidth that takes."""
    most = bench.few(128, 12)
    for dtype in head.DTYPES:
        bench.measure(f"{dtype}: greedy against generate, log-probs against forward",
                      sampler_error, bench, dtype)
    for name, counts in bench.few([("135M", (64,)), ("1B", (64, 256)), ("135M", (256,))],
                                  [("135M", (8,))]):
        shape = shape_of(bench, name)
        model, run = new_model(shape, torch.bfloat16), settings(max_response_tokens=most)
        for count in counts:
            prompts = uneven(count, *bench.few((32, 128), (4, 16)), shape["vocab_size"])
            for rival, call in samplers(model, run).items():
                if rival == "generate_batch" and (name, count) != ("135M", 64):
                    continue  # it takes the longest, and comes last
                bench.measure(f"{name}, {count} prompts, {most} new tokens: {rival}", sample_rate,
                              bench, model, prompts, most, call)
    if not bench.mini:  # last, since it compiles for long
        static = functools.partial(sampling.generate, model, eos=None,
                                   cache_implementation="static")
        bench.measure(f"{name}, {count} prompts: generate, static cache", sample_rate, bench, model,
                      prompts, most, static)


def samplers(model: Any, run: Any) -> dict[str, Callable]:
    """call(prompts, new tokens) -> rows of ids, by name."""
    def ours(prompts: list, most: int) -> list:
        return [r.ids for r in common.sample(model, prompts, run, 0, [-1], Cost())]

    def batch(prompts: list, most: int) -> list:
        from transformers import GenerationConfig
        with sampling.unpacked(model):
            found = model.generate_batch(prompts, GenerationConfig(
                max_new_tokens=most, do_sample=True, top_k=0, eos_token_id=-1, pad_token_id=0))
        return [output.generated_tokens for output in found.values()]
    peer = functools.partial(sampling.generate, model, eos=None)
    cuda = {"generate_batch": batch} if torch.cuda.is_available() else {}
    return {"ours": ours, "generate": peer, **cuda}


def sample_rate(bench: Bench, model: Any, prompts: list, most: int, call: Callable) -> dict:
    """A second call's rate; bandwidth is weights and cache, read once a token of each row."""
    (first, _), (seconds, rows) = (seconds_of(call, prompts, most) for _ in range(2))
    shape, tokens = model.config, len(prompts) * most
    common.require(sum(map(len, rows)) == tokens, f"of {tokens} tokens {sum(map(len, rows))} came")
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    token = 2 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim * 2
    cache = token * (sum(map(len, prompts)) + len(prompts) * most / 2)
    rate = most * (weights + cache) / seconds
    return {"tokens/s": tokens / seconds, "ms a step": 1000 * seconds / most, "first call s": first,
            "of it compiling": first - seconds,
            "bandwidth used": rate / bandwidth(bench.few(2**31, 2**22))}


# ------------------------------------------------------------------------------------ PPO, and deep


def ppo(bench: Bench) -> dict:
    """The phases of an iteration with one pass, and DT's share: it labels a logged reply by one
    forward and learns from it once, 4 passes beside PPO's 10 and generation: 0.4 (1 - g)."""
    count, most, shape = bench.few(256, 16), bench.few(128, 8), shape_of(bench, "135M")
    run = settings(ppo_baseline.Config, max_response_tokens=most, rollout_batch_size=count,
                   batch_size=count // 4, ppo_epochs=1)
    model = common.load_for_training(functools.partial(new_model, shape), run)
    load = functools.partial(new_model, shape, classifier=True)
    scorer, critic = (reward_model.RewardModel(m, torch.bfloat16) for m in (
        load(torch.bfloat16), common.load_for_training(load, run)))
    actor = ppo_baseline.ActorCritic(model, critic, sampling.samples_of_rewards([-1, 1]), run)
    prompts = uneven(count, *bench.few((32, 128), (4, 16)), shape["vocab_size"])
    score = functools.partial(reward_model.score, scorer, Ids(), run)
    took, rollout = sampling.ppo_phases(actor, new_model(shape, torch.bfloat16), score, Ids(),
                                        prompts, prompts, run, 2)
    phases = {name: min(seconds) for name, seconds in took.items()}
    whole, g = sum(phases.values()), phases["rollout"] / sum(phases.values())
    epoch = training.ours(common.Policy(model, run), on_disk(rollout.examples), run)
    learnt = min(epoch().seconds for _ in range(3))
    return {**{f"{name} s": s for name, s in phases.items()}, "generation share g": g,
            "DT train s": learnt, "DT / PPO": (phases["score"] + learnt) / whole,
            "0.4 (1 - g)": 0.4 * (1 - g), "micro-batch": run.micro_batch_tokens}


def deep(bench: Bench) -> None:
    """A step at Llama-3-8B's width, of as many layers as fit with gradients and moments."""
    layers, count = 2, bench.few(16, 4)
    if torch.cuda.is_available():  # 3.5 GB a layer, 17 GB the embedding and the head
        layers = max(1, min(32, int((0.7 * torch.cuda.mem_get_info()[0] - 17e9) / 3.5e9)))
    shape = shape_of(bench, "8B", num_hidden_layers=layers)
    each = labelled(uneven(count, *bench.few((700, 1300), (10, 20)), shape["vocab_size"]), 0.3)
    bench.measure(f"8B's width, {layers} of 32 layers, batch {count}", train_rate, bench, shape,
                  each, count, True)


PARTS = {"correctness": correctness, "loss": loss, "training": training_part,
         "sampling": sampling_part, "deep": deep, "ppo": lambda bench: bench.measure(
             "PPO's phases at 135M, one pass, and DT's share", ppo, bench)}


def main(cfg: Config) -> None:
    """Says what it will cost, measures, and prints a table a part."""
    parts = cfg.parts.split(",")
    share = 60 * cfg.minutes / sum(SECONDS[part] for part in parts)
    told = ", ".join(f"{name} {SECONDS[name] * share:.0f} s" for name in parts)
    print(f"at most {cfg.minutes:g} minutes: {told}; rows go to {cfg.out}")
    common.PADDED_BELOW = 0 if cfg.mini else common.PADDED_BELOW  # packed, small as they are
    common.require(cfg.mini or torch.cuda.is_available(), "no GPU here: --mini is for a CPU")
    bench, begin = Bench(cfg.minutes, cfg.out, cfg.mini), time.monotonic()
    bench.write("machine", **machine())
    for i, name in enumerate(parts):  # what a part leaves over is the later ones'
        share = (bench.end - time.monotonic()) / sum(SECONDS[part] for part in parts[i:])
        bench.run(name, PARTS[name], share * SECONDS[name])
    for name in parts:
        rows = [{k: v for k, v in row.items() if k != "part"} for row in bench.rows
                if row["part"] == name]
        print(f"\n### {name}\n\n{markdown(rows)}")
    print(f"\n{time.monotonic() - begin:.0f} s")


if __name__ == "__main__":
    start(main, Config)
