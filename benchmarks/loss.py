"""Forward and backward of the head loss, ours against what else one would use: time as a ratio, and memory.

Each loss is divided, as a trainer divides by the tokens of its batch.  Memory is what a call needs beyond the gradients
that it returns; ours includes the scratch buffer that it keeps.  With bf16 the weights are bf16, too.

    python benchmarks/loss.py                                          # every cell: hours on 2 cores
    python benchmarks/loss.py --vocabularies 49152 --dtypes fp32 --fractions 0.4 --losses nll ppo

Contenders: `plain`, logits of all rows and F.cross_entropy; `compiled`, that under torch.compile; `torch`,
F.linear_cross_entropy; `cce`, Apple's cut-cross-entropy; `liger`, Liger's fused linear cross-entropy (GPU alone).  For
the losses `weighted` (RWR) and `ppo` the rivals are their plain forms.  Peers that are not installed are left out.
"""
from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Callable

import numpy as np
import torch
import torch.nn.functional as F

from measure import in_turn, machine, markdown, memory_above, ratio, record

import common
import mle_filter
import ppo_baseline
import rwr
from common import knob

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class Config:
    """The cells."""
    vocabularies: list[int] = knob([32000, 49152, 128256, 151936], "vocabulary sizes V")
    fractions: list[float] = knob([0.25, 0.4, 1.0], "shares of the rows that are response tokens")
    dtypes: list[str] = knob(["fp32", "bf16"], "of fp32, bf16")
    threads: list[int] = knob([1, 2], "CPU threads")
    losses: list[str] = knob(["nll", "weighted", "ppo"], "of nll, weighted, ppo")
    rows: int = knob(1024, "positions N, prompt and padding included")
    width: int = knob(576, "hidden width D")
    repeats: int = knob(5, "timed calls of each contender")
    out: str = knob("runs/benchmarks/loss.jsonl", "file that a line of results is added to")
    compile: bool = knob(True, "torch.compile what is to be compiled, rivals too")


def problem(cfg: Config, vocabulary: int, fraction: float, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Hidden states, head, targets (-100 outside the response) and the columns of the losses."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(cfg.rows, generator=generator) < fraction
    targets = torch.randint(0, vocabulary, (cfg.rows,), generator=generator)
    tensors = {"hidden": torch.randn(cfg.rows, cfg.width, generator=generator).to(dtype),
               "weight": (torch.randn(vocabulary, cfg.width, generator=generator) / cfg.width ** 0.5).to(dtype),
               "targets": torch.where(mask, targets, -100), "mask": mask,
               "z": torch.randn(cfg.rows, generator=generator),
               "old": torch.randn(cfg.rows, generator=generator) - np.log(vocabulary)}
    tensors = {name: t.to(common.device()) for name, t in tensors.items()}
    tensors["hidden"].requires_grad_(), tensors["weight"].requires_grad_()
    return tensors


def ours(loss: str, t: dict[str, torch.Tensor]) -> torch.Tensor:
    """The fused loss of a script, on the response rows alone."""
    rows = t["mask"].nonzero().squeeze(1)
    hidden, targets, mask, z, old = (t[name][rows] for name in ("hidden", "targets", "mask", "z", "old"))
    kernel, columns = {
        "nll": (mle_filter.masked_nll_, ()),
        "weighted": (functools.partial(rwr.weighted_nll_, top=4.0, beta=0.25, w_max=20.0), (z,)),
        "ppo": (functools.partial(ppo_baseline.clipped_surrogate_, temperature=1.0, clip=0.2, entropy_coef=0.01,
                                  statistics=torch.zeros(3, device=z.device)), (old, z))}[loss]
    return common._HeadLoss.apply(hidden, t["weight"], None, kernel, targets, mask, *columns)


def plain(loss: str, t: dict[str, torch.Tensor]) -> torch.Tensor:
    """The loss as one would write it: all logits at once, autograd for the rest."""
    logits = t["hidden"] @ t["weight"].t()
    if loss == "nll":
        return F.cross_entropy(logits.float(), t["targets"], ignore_index=-100, reduction="sum")
    if loss == "weighted":
        nll = F.cross_entropy(logits.float(), t["targets"], ignore_index=-100, reduction="none")
        return (rwr.weigh(t["z"], 4.0, 0.25, 20.0) * nll).sum()
    log_p = logits.float().log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    new = log_p.gather(1, t["targets"].clamp(min=0)[:, None]).squeeze(1)
    rho = (new - t["old"]).exp()
    surrogate = torch.maximum(-t["z"] * rho, -t["z"] * rho.clamp(0.8, 1.2)) - 0.01 * entropy
    return torch.where(t["mask"], surrogate, 0.0).sum()


def contenders(loss: str, t: dict[str, torch.Tensor]) -> dict[str, Callable]:
    """Each contender's loss, by name."""
    found = {"ours": functools.partial(ours, loss, t), "plain": functools.partial(plain, loss, t),
             "compiled": functools.partial(torch.compile(plain), loss, t)}
    if loss != "nll":
        return found
    if hasattr(F, "linear_cross_entropy"):
        found["torch"] = lambda: F.linear_cross_entropy(t["hidden"], t["weight"], t["targets"], reduction="sum")
    try:
        from cut_cross_entropy import linear_cross_entropy
        cuda = common.device().type == "cuda"
        found["cce"] = lambda: linear_cross_entropy(t["hidden"], t["weight"], t["targets"], reduction="sum",
                                                    impl="cce" if cuda else "torch_compile")
    except ImportError:
        print("cut-cross-entropy is not installed: left out")
    if common.device().type == "cuda":
        try:
            from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy
            found["liger"] = lambda: liger_fused_linear_cross_entropy(t["hidden"], t["weight"], t["targets"],
                                                                      reduction="sum")
        except ImportError:
            print("liger-kernel is not installed: left out")
    return found


def cell(cfg: Config, loss: str, vocabulary: int, fraction: float, dtype: str) -> dict:
    """One row of the table: how many times longer each rival takes than ours, and what memory each needs."""
    common._scratch.clear()  # of other cells
    torch._dynamo.reset()    # more than eight cells, and `compiled` would no longer be
    t = problem(cfg, vocabulary, fraction, DTYPES[dtype])

    def step(call: Callable) -> None:
        t["hidden"].grad = t["weight"].grad = None
        (call() / cfg.rows).backward()
    calls = {name: functools.partial(step, call) for name, call in contenders(loss, t).items()}
    seconds, first = in_turn(calls, cfg.repeats)
    gradients = sum(t[name].numel() * t[name].element_size() for name in ("hidden", "weight"))
    kept = sum(b.numel() * b.element_size() for b in common._scratch.values())
    memory = {}
    for name in calls:
        t["hidden"].grad = t["weight"].grad = None
        memory[name] = (memory_above(calls[name]) - gradients + kept * (name == "ours")) / 2**20
    row = {"loss": loss, "N": cfg.rows, "D": cfg.width, "V": vocabulary, "fraction": fraction, "dtype": dtype,
           "threads": torch.get_num_threads(), "ours s": f"{np.median(seconds['ours']):.3f}"}
    row.update({f"{name} / ours": ratio(seconds, name, "ours") for name in calls if name != "ours"})
    row.update({f"MiB {name}": f"{max(mib, 0):.0f}" for name, mib in memory.items()})
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
    common.launch(main, Config)
