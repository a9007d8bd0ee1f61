"""Reward-weighted regression: imitate every response, the better the more.

    w_i = min(exp(z_i / beta), w_max)
    L   = - sum_i w_i sum_t log p(y_it | x_i, y_i<t)  /  sum_i w_i |y_i|          both sums over a step's batch

One idea apart from mle_filter.py: a weight where that has a threshold.  (Peters & Schaal 2007, "Reinforcement learning
by reward-weighted regression"; the cap w_max is AWR's, Peng et al. 2019, arXiv 1910.00177.)  z is the reward
standardised over the samples.  A weight multiplies the sum over its response's tokens, not their mean; it is relative
to the others of its batch.  Left out: AWR's learnt baseline.

    python rwr.py                                              the toy world, one CPU
    torchrun --nproc_per_node=8 rwr.py --model MODEL --preferences PAIRS.jsonl --out runs/mine
"""
from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import torch

import common
import reward_model
from common import Examples, Samples, knob, print0


@dataclass
class Config(common.Config):
    """The algorithm's own knobs."""
    beta: float = knob(0.25, "temperature of the weights: large is plain SFT, small only the best", toy=0.18,
                       of="training")
    w_max: float = knob(20.0, "cap on a weight, which with beta 0.25 all z above 0.75 reach; 0 for none", toy=0.0,
                        of="training")
    lr: float = knob(1e-5, "peak learning rate; 3 % warm-up, then cosine to 0", toy=2e-3, of="training")
    steps: Optional[int] = knob(None, "optimiser steps, in place of --epochs", toy=600, of="training")

    def __post_init__(self) -> None:
        super().__post_init__()
        common.require(0 < self.beta < math.inf, f"--beta must be above 0 and finite, not {self.beta}")
        common.require(0 <= self.w_max < math.inf, f"--w_max must be 0 (no cap) or above, not {self.w_max}")


def weigh(z: torch.Tensor, top: float, beta: float, w_max: float) -> torch.Tensor:
    """min(exp(z / beta), w_max) over the largest such weight, that of z = top: in [0, 1], so it cannot overflow."""
    log_max = math.log(w_max) if w_max else math.inf
    return ((z / beta).clamp(max=log_max) - min(top / beta, log_max)).exp()


@common.compiled
def weighted_nll_(logits: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor, z: torch.Tensor,
                  top: float, beta: float, w_max: float) -> torch.Tensor:
    """logits (N, V) become d loss / d logits in place; returns each row's loss (N,).

    loss = -w log softmax(logits)[target] where the mask (N,) is true, else 0; w = weigh(z) for z (N,), the reward of
    the row's response.  Log-sum-exp, weight and loss in float32 (float64 for float64).  Targets are in [0, V);
    a masked row's may be anything.
    """
    x = logits.to(torch.promote_types(logits.dtype, torch.float32))             # (N, V)
    w = torch.where(mask, weigh(z.to(x.dtype), top, beta, w_max), 0.0)          # (N,)
    targets = torch.where(mask, targets, 0)
    is_target = torch.arange(x.shape[1], device=x.device) == targets[:, None]   # (N, V)
    log_z = x.logsumexp(dim=1)                                                  # (N,)
    loss = w * (log_z - torch.where(is_target, x, 0.0).sum(dim=1))  # torch 2.11 compiles a gather to read behind copy_
    logits.copy_(((x - log_z[:, None]).exp() - is_target.to(x.dtype)) * w[:, None])
    return loss


def prepare(samples: Samples, tokenizer: Any, cfg: Config) -> Examples:
    """Labelled samples -> examples: all of them, each with its weight."""
    z = samples.z(samples.rewards)
    weights = weigh(torch.from_numpy(z), z.max(), cfg.beta, cfg.w_max).numpy()
    print0(f"  weights: effective sample size {weights.sum() ** 2 / (weights ** 2).sum():,.0f} of {len(z):,}, "
           f"{(weights == 1).mean():.1%} at the largest weight")
    return Examples(samples, tokenizer, cfg, reward=z, weight=weights)


def train(cfg: Config, base: str, samples: Samples, folder: Path) -> None:
    """Trains the policy, from the base policy's weights, into the folder."""
    tokenizer, policy = common.load_tokenizer(base), common.load_policy(base, cfg)
    examples = prepare(samples, tokenizer, cfg)
    steps = common.count_steps(len(examples), cfg)
    optimizer, schedule = common.make_optimizer(policy, cfg, steps)
    common.print_plan(len(examples), cfg)
    kernel = functools.partial(weighted_nll_, top=float(examples.reward.max()), beta=cfg.beta, w_max=cfg.w_max)

    with common.training(folder, policy, optimizer, schedule, steps, cfg) as (first, log):
        for step, batch in common.batches(examples, cfg, first):
            loss, lr = 0.0, schedule.get_last_lr()[0]
            for micro in common.accumulate(policy, batch.micros):
                part = policy(micro, kernel, micro.targets, micro.mask, micro.reward) / batch.normaliser
                part.backward()
                loss += part.detach()
            grad_norm = common.update([policy], optimizer, schedule, loss)
            log(step, loss=loss, grad_norm=grad_norm, lr=lr, tokens=batch.tokens)
    common.save_policy(folder, policy, tokenizer, cfg,
                       f"Reward-weighted regression, beta {cfg.beta:g}, w_max {cfg.w_max:g}.")


def main(cfg: Config) -> None:
    """Builds what is missing, trains, and adds a row to the leaderboard."""
    road = reward_model.prerequisites(cfg)
    folder, cost = common.trained(cfg, "rwr", road, train)
    variants = [common.Variant(f"beta {cfg.beta:g}")]
    common.evaluate(cfg, "rwr", folder, variants, road, cost)


if __name__ == "__main__":
    common.launch(main, Config)
