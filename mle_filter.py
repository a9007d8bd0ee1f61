"""MLE with filtering: keep the best responses, forget their rewards, imitate.

    kept = the `keep` share of the samples with the highest reward
    L    = - sum_{i in kept} sum_t log p(y_it | x_i, y_i<t)  /  sum_{i in kept} |y_i|

The plainest of the three.  With --keep 1.0 nothing is filtered: that is supervised fine-tuning (SFT), the control.
(Hu et al. 2023, arXiv 2308.12050, "filtering alignment"; RAFT, arXiv 2304.06767, and ReST, arXiv 2308.08998, repeat
generation and filtering, which is left out here.)

    python mle_filter.py                                       the toy world, one CPU
    torchrun --nproc_per_node=8 mle_filter.py --model MODEL --preferences PAIRS.jsonl --out runs/mine
"""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch

import common
import reward_model
from common import Examples, Samples, knob, print0


@dataclass
class Config(common.Config):
    """The algorithm's own knobs."""
    keep: float = knob(0.1, "share of the samples that is kept, best first; 1.0 is plain SFT", of="training")
    per_prompt: bool = knob(False, "keep that share of each prompt's samples (one at least), not of all", of="training")
    lr: float = knob(1e-5, "peak learning rate; 3 % warm-up, then cosine to 0", toy=2e-3, of="training")
    steps: Optional[int] = knob(None, "optimiser steps, in place of --epochs", toy=600, of="training")

    def __post_init__(self) -> None:
        super().__post_init__()
        common.require(0 < self.keep <= 1, f"--keep is a share above 0 and at most 1, not {self.keep}")


@common.compiled
def masked_nll_(logits: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """logits (N, V) become d loss / d logits in place; returns each row's loss (N,).

    loss = -log softmax(logits)[target] where the response mask (N,) is true, else 0.  Log-sum-exp and loss in float32
    (float64 for float64).  Targets are in [0, V); a masked row's may be anything.
    """
    x = logits.to(torch.promote_types(logits.dtype, torch.float32))             # (N, V)
    w = mask.to(x.dtype)                                                        # (N,)
    targets = torch.where(mask, targets, 0)
    is_target = torch.arange(x.shape[1], device=x.device) == targets[:, None]   # (N, V)
    log_z = x.logsumexp(dim=1)                                                  # (N,)
    loss = w * (log_z - torch.where(is_target, x, 0.0).sum(dim=1))  # torch 2.11 compiles a gather to read behind copy_
    logits.copy_(((x - log_z[:, None]).exp() - is_target.to(x.dtype)) * w[:, None])
    return loss


def best(z: np.ndarray, keep: float) -> np.ndarray:
    """Indices of the `keep` share with the highest reward, one at least; of equal rewards the earlier goes first."""
    return np.argsort(-z, kind="stable")[:max(1, round(keep * len(z)))]


def by_prompt(samples: Samples) -> list[np.ndarray]:
    """Indices of the samples of each prompt, in their order."""
    keys = np.array([common.prompt_hash(s.prompt) for s in samples.rows], dtype=np.uint64)
    order = np.argsort(keys, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(keys[order])) + 1)


def prepare(samples: Samples, tokenizer: Any, cfg: Config) -> Examples:
    """Labelled samples -> examples: the best ones, over all or for each prompt."""
    z = samples.z(samples.rewards)
    groups = by_prompt(samples) if cfg.per_prompt else [np.arange(len(z))]
    kept = np.concatenate([group[best(z[group], cfg.keep)] for group in groups])
    print0(f"  kept {len(kept):,} of {len(z):,} samples: reward z from {z[kept].min():.2f}, mean {z[kept].mean():.2f}")
    return Examples(samples, tokenizer, cfg, rows=kept)


def train(cfg: Config, base: str, samples: Samples, folder: Path) -> None:
    """Trains the policy, from the base policy's weights, into the folder."""
    tokenizer, policy = common.load_tokenizer(base), common.load_policy(base, cfg)
    examples = prepare(samples, tokenizer, cfg)
    steps = common.count_steps(len(examples), cfg)
    optimizer, schedule = common.make_optimizer(policy, cfg, steps)
    common.print_plan(len(examples), cfg)

    with common.training(folder, policy, optimizer, schedule, steps, cfg) as (first, log):
        for step, batch in common.batches(examples, cfg, first):
            loss, lr = 0.0, schedule.get_last_lr()[0]
            for micro in common.accumulate(policy, batch.micros):
                part = policy(micro, masked_nll_, micro.targets, micro.mask) / batch.normaliser
                part.backward()
                loss += part.detach()
            grad_norm = common.update([policy], optimizer, schedule, loss)
            log(step, loss=loss, grad_norm=grad_norm, lr=lr, tokens=batch.tokens)
    common.save_policy(folder, policy, tokenizer, cfg, f"MLE on the best {cfg.keep:.0%} of the samples.")


def main(cfg: Config) -> None:
    """Builds what is missing, trains, and adds a row to the leaderboard."""
    road = reward_model.prerequisites(cfg)
    name = "sft" if cfg.keep == 1 else "mle_filter"
    folder, cost = common.trained(cfg, name, road, train)
    variants = [common.Variant(f"keep {cfg.keep:g}" + " per prompt" * cfg.per_prompt)]
    common.evaluate(cfg, name, folder, variants, road, cost)


if __name__ == "__main__":
    common.launch(main, Config)
