"""Forward and backward of the head loss, ours against what else one would use: time as a ratio,
and memory.

Each loss is divided, as a trainer divides by the tokens of its batch.  Memory is what a call needs
beyond the gradients that it returns; ours includes the scratch buffer that it keeps.  With bf16 the
weights are bf16, too.

    python benchmarks/loss.py                                  # every cell: hours on 2 cores
    python benchmarks/loss.py --vocabularies 49152 --dtypes fp32 --fractions 0.4 --losses nll ppo

Contenders: `plain`, logits of all rows and F.cross_entropy; `compiled`, that under torch.compile;
`torch`, F.linear_cross_entropy; `cce`, Apple's cut-cross-entropy; on a GPU alone `liger`, Liger's
fused linear cross-entropy, and `quack`, Quack's.  For the losses `weighted` (RWR) and `ppo` the
rivals are their plain forms.  Peers that are not installed are left out.
"""
from __future__ import annotations

import functools
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Callable

import numpy as np
import torch
import torch.nn.functional as F

from measure import in_turn, machine, markdown, memory_above, ratio, record, start

import common
import mle_filter
import ppo_baseline
import rwr
from common import flag

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class Config:
    """The cells."""
    vocabularies: list[int] = flag([32000, 49152, 128256, 151936], "vocabulary sizes V")
    fractions: list[float] = flag([0.25, 0.4, 1.0], "shares of the rows that are response tokens")
    dtypes: list[str] = flag(["fp32", "bf16"], "of fp32, bf16")
    threads: list[int] = flag([1, 2], "CPU threads")
    losses: list[str] = flag(["nll", "weighted", "ppo"], "of nll, weighted, ppo")
    rows: int = flag(1024, "positions N, prompt and padding included")
    width: int = flag(576, "hidden width D")
    repeats: int = flag(5, "timed calls of each contender")
    out: str = flag("runs/benchmarks/loss.jsonl", "file that a line of results is added to")
    compile: bool = flag(True, "torch.compile what is to be compiled, rivals too")


def problem(rows: int, width: int, vocabulary: int, fraction: float,
            dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Hidden states, head, targets (-100 outside the response), and what the losses weigh rows
    by."""
    where = common.device()
    generator = torch.Generator(where).manual_seed(0)
    mask = torch.rand(rows, generator=generator, device=where) < fraction
    targets = torch.randint(0, vocabulary, (rows,), generator=generator, device=where)
    hidden, weight, advantage, old = (
        torch.randn(*shape, generator=generator, device=where, dtype=kind)
        for shape, kind in (((rows, width), dtype), ((vocabulary, width), dtype),
                            ((rows,), torch.float32), ((rows,), torch.float32)))
    return {"hidden": hidden.requires_grad_(), "weight": weight.div_(width ** 0.5).requires_grad_(),
            "targets": torch.where(mask, targets, -100), "mask": mask, "advantage": advantage,
            "old": old - np.log(vocabulary), "w": (advantage / 0.25).exp().clamp(max=20.0) / 20}


def kernel_of(loss: str) -> tuple[Callable, tuple[str, ...]]:
    """A script's kernel, and the names of its columns beside the targets."""
    if loss == "ppo":
        return functools.partial(
            ppo_baseline.clipped_surrogate_, temperature=1.0, clip=0.2, entropy_coef=0.01,
            statistics=torch.zeros(3, device=common.device())), ("old", "advantage")
    return (mle_filter.masked_nll_, ()) if loss == "nll" else (rwr.weighted_nll_, ("w",))


def ours(loss: str, t: dict[str, torch.Tensor]) -> torch.Tensor:
    """The fused loss of a script, on the response rows alone."""
    rows, (kernel, names) = t["mask"].nonzero().squeeze(1), kernel_of(loss)
    return common.head_loss(kernel, t["hidden"][rows], head_alone(t["weight"]),
                            t["targets"][rows], *(t[name][rows] for name in names))


def head_alone(weight: torch.Tensor) -> SimpleNamespace:
    """What head_loss asks of a model, with nothing but the head."""
    return SimpleNamespace(get_output_embeddings=lambda: SimpleNamespace(weight=weight),
                           config=SimpleNamespace(get_text_config=SimpleNamespace))


def plain(loss: str, t: dict[str, torch.Tensor]) -> torch.Tensor:
    """The loss as one would write it: all logits at once, autograd for the rest."""
    return row_losses(loss, t["hidden"] @ t["weight"].t(), t).sum()


def row_losses(loss: str, logits: torch.Tensor, t: dict[str, torch.Tensor]) -> torch.Tensor:
    """Each row's loss (N,) of logits (N, V), 0 outside the response; autograd finds gradients."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    nll = F.cross_entropy(wide, t["targets"], ignore_index=-100, reduction="none")
    if loss != "ppo":
        return nll if loss == "nll" else t["w"] * nll
    log_p = wide.log_softmax(-1)
    rho, a = (-nll - t["old"]).exp(), t["advantage"]
    entropy = -(log_p.exp() * log_p).sum(-1)
    surrogate = torch.maximum(-a * rho, -a * rho.clamp(0.8, 1.2)) - 0.01 * entropy
    return torch.where(t["mask"], surrogate, 0.0)


def contenders(loss: str, t: dict[str, torch.Tensor]) -> dict[str, Callable]:
    """Each contender's loss, by name."""
    found = {"ours": functools.partial(ours, loss, t), "plain": functools.partial(plain, loss, t),
             "compiled": functools.partial(torch.compile(plain), loss, t)}
    if loss == "nll":
        found |= {name: functools.partial(peer, t["hidden"], t["weight"], t["targets"],
                                          reduction="sum") for name, peer in peers().items()}
    return found


@functools.cache
def peers() -> dict[str, Callable]:
    """Other people's fused losses; says once which are not installed."""
    cuda, found = common.device().type == "cuda", {}
    if hasattr(F, "linear_cross_entropy"):
        found["torch"] = F.linear_cross_entropy
    try:
        from cut_cross_entropy import linear_cross_entropy
        found["cce"] = functools.partial(linear_cross_entropy, impl="cce" if cuda
                                         else "torch_compile")
    except ImportError:
        print("cut-cross-entropy is not installed: left out")
    if not cuda:
        return found
    try:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy
        found["liger"] = liger_fused_linear_cross_entropy
    except ImportError:
        print("liger-kernel is not installed: left out")
    try:
        from quack.linear_cross_entropy import chunked_linear_cross_entropy
        found["quack"] = functools.partial(chunked_linear_cross_entropy, chunk_size=4096)
    except ImportError:
        print("quack-kernels is not installed: left out")
    return found


def steps_of(loss: str, t: dict[str, torch.Tensor]) -> dict[str, Callable[[], None]]:
    """Each contender's forward and backward, divided as a trainer divides."""
    def step(call: Callable) -> None:
        t["hidden"].grad = t["weight"].grad = None
        (call() / len(t["hidden"])).backward()
    return {name: functools.partial(step, call) for name, call in contenders(loss, t).items()}


def mib_of(name: str, call: Callable, t: dict[str, torch.Tensor]) -> float:
    """MiB that a contender's step needs beyond its gradients."""
    t["hidden"].grad = t["weight"].grad = None
    gradients = sum(t[part].numel() * t[part].element_size() for part in ("hidden", "weight"))
    return max(0, memory_above(call) - gradients) / 2**20


def cell(cfg: Config, loss: str, vocabulary: int, fraction: float, dtype: str) -> dict:
    """One row of the table: how many times longer each rival takes than ours, and its memory."""
    torch._dynamo.reset()    # more than eight cells, and `compiled` would no longer be
    t = problem(cfg.rows, cfg.width, vocabulary, fraction, DTYPES[dtype])
    calls = steps_of(loss, t)
    seconds, first = in_turn(calls, cfg.repeats)
    memory = {name: mib_of(name, call, t) for name, call in calls.items()}
    row = {"loss": loss, "N": cfg.rows, "D": cfg.width, "V": vocabulary, "fraction": fraction,
           "dtype": dtype, "threads": torch.get_num_threads(),
           "ours s": f"{np.median(seconds['ours']):.3f}"}
    row.update({f"{name} / ours": ratio(seconds, name, "ours") for name in calls if name != "ours"})
    row.update({f"MiB {name}": f"{mib:.0f}" for name, mib in memory.items()})
    return row | {"first call s": f"{first['ours']:.1f}"}


def main(cfg: Config) -> None:
    """Times every cell, prints a table a loss, and keeps the rows."""
    print(machine())
    rows = []
    for loss in cfg.losses:
        mine = []
        for threads in cfg.threads:
            torch.set_num_threads(threads)
            for dtype in cfg.dtypes:
                for vocabulary in cfg.vocabularies:
                    for fraction in cfg.fractions:
                        mine.append(cell(cfg, loss, vocabulary, fraction, dtype))
                        print(mine[-1], flush=True)
        print("\n" + markdown(mine) + "\n")
        rows += mine
    record("loss", rows, cfg.out)


if __name__ == "__main__":
    start(main, Config)
