"""Reward-weighted regression: imitate every response, weighted by its reward.

    w_i = min(exp(z_i / beta), w_max) / their mean over all samples
    L   = - sum_i w_i sum_t log p(y_it | x_i, y_i<t)  /  sum_i |y_i|

i runs over the responses of a step's batch, all ranks together, and t over a response's tokens;
z is the reward in standard deviations from the samples' mean.

(Peters & Schaal 2007; Peng et al. 2019, arXiv 1910.00177.)  Left out: AWR's learnt baseline.

    python rwr.py                                              the toy world, one CPU
    torchrun --nproc_per_node=8 rwr.py --model MODEL --preferences PAIRS --out runs/mine
"""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

import common
import reward_model
from common import Cost, Examples, Samples, Stage, Variant, flag, print0


@dataclass
class Config(common.Config):
    """The algorithm's own flags."""
    beta: float = flag(0.25, "temperature of the weights: large approaches SFT")
    w_max: float = flag(20.0, "cap on exp(z / beta), 20 as in AWR; 0: none")
    weights: Literal["reward", "given"] = flag("reward", "given: the samples' own field `weight`")

    def __post_init__(self) -> None:
        super().__post_init__()
        common.require(self.beta > 0 and self.w_max >= 0, "--beta must be > 0, --w_max >= 0")
        common.require(self.weights == "reward" or self.samples, "--weights given needs --samples")


TOY = {"beta": 0.18, "w_max": 0.0, "lr": 2e-3, "steps": 600}  # defaults in the toy world


@common.compiled
def weighted_nll_(logits: torch.Tensor, targets: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """-w log softmax(logits)[target] of each row (N,); overwrites logits (N, V) with its gradient.

    Rows are the positions that predict a response token.  In float32 (float64 for float64).
    """
    # nll = log Z - x[target], with Z = sum_v exp x[v].  As d log Z / d x[v] = exp x[v] / Z,
    # d nll / d x = softmax(x) - one_hot(target)
    x = logits.to(torch.promote_types(logits.dtype, torch.float32))             # (N, V)
    is_target = torch.arange(x.shape[1], device=x.device) == targets[:, None]   # (N, V)
    log_z = x.logsumexp(dim=1)                                                  # (N,)
    nll = log_z - torch.where(is_target, x, 0.0).sum(dim=1)                     # (N,)
    gradient = (x - log_z[:, None]).exp() - is_target.to(x.dtype)               # (N, V)
    logits.copy_(w[:, None] * gradient)
    return w * nll


def prepare(samples: Samples, cfg: Config) -> Examples:
    """Labelled samples -> examples to train on."""
    weight = samples.weights
    if cfg.weights == "reward":
        z = samples.z(samples.rewards)
        log_w = np.minimum(z / cfg.beta, np.log(cfg.w_max or np.inf))
        weight = np.exp(log_w - log_w.max())  # the largest is 1, to avoid overflow
    common.require(weight.min() >= 0 and weight.max() > 0,  # a missing weight is NaN, and fails
                   "--weights given: every sample needs a `weight`, and one must be above 0")
    effective = weight.sum() ** 2 / (weight ** 2).sum()
    print0(f"  weights: effective sample size {effective:,.0f} of {len(weight):,}")
    return Examples(samples.tokens, weight=weight / weight.mean())


def train(cfg: Config, base: Stage, samples: Samples, folder: Path, cost: Cost) -> None:
    """Trains the policy, from the base policy's weights, into the folder."""
    codec = common.Codec(base.path, cfg)
    policy = common.load_policy(base.path, cfg)
    examples = prepare(samples, cfg)
    steps = common.plan_steps(len(examples), cfg)
    optimizer, schedule = common.make_optimizer(policy, cfg.lr, steps)

    with common.TrainingRun(folder, policy, optimizer, schedule, steps, cfg, cost) as run:
        for step, batch in run.steps(examples):
            # batch.normaliser: L's denominator / ranks, as DDP averages gradients over ranks
            loss = 0.0
            lr = schedule.get_last_lr()[0]
            for micro in batch.micros:  # packed sequences, this rank's share of the step
                policy.require_backward_grad_sync = micro is batch.micros[-1]  # DDP: reduce once
                part = policy(micro, weighted_nll_, micro.weight) / batch.normaliser
                part.backward()
                loss += part.detach()
            grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            run.log(step, loss=loss, grad_norm=grad_norm, lr=lr, tokens=batch.tokens)
    common.save_policy(folder, policy, codec, cfg)


def main(cfg: Config) -> None:
    """Every stage; finished ones are used again."""
    judge = reward_model.judge(cfg)
    base = common.base_policy(cfg)
    data = common.read_data(cfg, base)
    rm = reward_model.for_run(cfg, base, data)
    samples = common.labelled_samples(cfg, base, data, rm)
    policy = common.policy_stage(cfg, "rwr", train, base, samples)
    common.build_stages(cfg, rm, samples, policy)
    variants = [Variant("given weights" if cfg.weights == "given" else f"beta {cfg.beta:g}")]
    common.evaluate(cfg, policy, variants, base, data, rm, samples, judge, cost_of=(rm, samples))


if __name__ == "__main__":
    common.launch(main, Config)
