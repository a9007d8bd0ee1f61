"""Decision Transformer: learn what a response of each reward looks like, then ask for a high reward.

    training   L = - sum_i sum_t log p(y_it | x_i, z_i, y_i<t)  /  sum_i |y_i|
    sampling   y ~ p(. | x, z*), with a high z*; guided by g: (1 + g) log p(. | x, z*) - g log p(. | x)

The reward, standardised, is written behind the prompt: `{prompt} <rm_score>: 1.52 ` and the response follows.  The loss
is the response's alone; all samples are learnt from, the bad ones too.  (Hu et al. 2023, arXiv 2308.12050, "conditional
alignment"; Chen et al. 2021, arXiv 2106.01345.  Guidance drops the tag from some examples, after Ho & Salimans 2022,
arXiv 2207.12598.)  Left out: returns-to-go at each token, since here the reward comes once, at the end.

    python dt.py                                               the toy world, one CPU
    torchrun --nproc_per_node=8 dt.py --model MODEL --preferences PAIRS.jsonl --out runs/mine
"""
from __future__ import annotations

import math
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
    target: list[str] = knob(["q5", "q50", "q99"], "rewards to ask for, a row each: numbers, quantiles (q95), or none, "
                             "to ask without the tag; the last one in training is the policy's default")
    guidance: list[float] = knob([0.5], "a row more for each: the last target, guided so much towards it; 0 for none")
    condition_dropout: float = knob(0.1, "share of the examples, in each epoch the same, that have no tag; guidance "
                                         "needs some", of="training")
    reward_step: float = knob(0.01, "the reward in the tag is rounded to this", toy=0.5, of="training")
    reward_format: str = knob("decimal", "decimal: 1.52; digit: one symbol, 4 is the mean and 5 a step above it",
                              toy="digit", of="training")
    lr: float = knob(1e-5, "peak learning rate; 3 % warm-up, then cosine to 0", toy=5e-3, of="training")
    steps: Optional[int] = knob(None, "optimiser steps, in place of --epochs", toy=600, of="training")

    def __post_init__(self) -> None:
        super().__post_init__()
        common.require(0 <= self.condition_dropout < 1,
                       f"--condition_dropout is a share below 1, not {self.condition_dropout}")
        common.require(all(0 <= g < math.inf for g in self.guidance),
                       f"--guidance must be 0 or above, not {self.guidance}")
        common.require(not any(self.guidance) or self.condition_dropout > 0,
                       "--guidance needs a --condition_dropout above 0; without one, give --guidance 0")
        common.require(self.target[-1] != "none", "--target: the last one is the default, and must ask for a reward")
        common.require(0.01 <= self.reward_step < math.inf,
                       f"--reward_step must be 0.01 or above, not {self.reward_step}")
        common.require(self.reward_format in ("decimal", "digit"),
                       f"--reward_format is decimal or digit, not {self.reward_format!r}")
        common.require(self.reward_format == "decimal" or self.reward_step >= 0.1,
                       f"--reward_format digit has ten steps: {self.reward_step} is too small a --reward_step")
        for target in self.target:
            wish(target, np.zeros(1))


@common.compiled
def conditioned_nll_(logits: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """logits (N, V) become d loss / d logits in place; returns each row's loss (N,).

    loss = -log softmax(logits)[target] where the mask (N,) is true, else 0.  The mask is true for response tokens only:
    prompt and reward tag are given, never predicted.  Log-sum-exp and loss in float32 (float64 for float64).  Targets
    are in [0, V); a masked row's may be anything.
    """
    x = logits.to(torch.promote_types(logits.dtype, torch.float32))             # (N, V)
    w = mask.to(x.dtype)                                                        # (N,)
    targets = torch.where(mask, targets, 0)
    is_target = torch.arange(x.shape[1], device=x.device) == targets[:, None]   # (N, V)
    log_z = x.logsumexp(dim=1)                                                  # (N,)
    loss = w * (log_z - torch.where(is_target, x, 0.0).sum(dim=1))  # torch 2.11 compiles a gather to read behind copy_
    logits.copy_(((x - log_z[:, None]).exp() - is_target.to(x.dtype)) * w[:, None])
    return loss


def condition(z: Optional[float], cfg: Config) -> str:
    """What stands between prompt and response, in training and sampling alike: the reward, rounded; None: nothing."""
    if z is None:
        return ""
    steps = round(z / cfg.reward_step)
    reward = f"{min(max(steps + 4, 0), 9)}" if cfg.reward_format == "digit" else f"{steps * cfg.reward_step + 0.0:.2f}"
    return f" <rm_score>: {reward} "


def asking_template(template: str, target: float, cfg: Config) -> str:
    """The chat template with condition() behind the prompt: apply_chat_template(..., reward=2.0), else the target."""
    steps = f"((reward | default({target:.6f})) / {cfg.reward_step}) | round | int"
    shown = ("[[steps + 4, 0] | max, 9] | min" if cfg.reward_format == "digit" else
             f"'%.2f' | format(steps * {cfg.reward_step} + 0.0)")
    return (f"{template}{{% if add_generation_prompt %}}{{% set steps = {steps} %}}"
            f"{{{{ ' <rm_score>: ' ~ ({shown}) ~ ' ' }}}}{{% endif %}}")


def wish(target: str, z: np.ndarray) -> Optional[float]:
    """A target as a standardised reward: "1.5" is 1.5, "q95" the 95 % quantile of z, "none" None; else BadInput."""
    if target == "none":
        return None
    try:
        value = float(np.quantile(z, float(target[1:]) / 100)) if target.startswith("q") else float(target)
    except ValueError:
        value = math.nan
    common.require(math.isfinite(value), f"--target takes numbers, quantiles from q0 to q100, or none, not {target!r}")
    return value


def prepare(samples: Samples, tokenizer: Any, cfg: Config) -> Examples:
    """Labelled samples -> examples: all of them, the reward behind the prompt except where it is dropped."""
    z = samples.z(samples.rewards)
    dropped = np.random.default_rng(cfg.seed).random(len(z)) < cfg.condition_dropout
    print0(f"  the reward tag is dropped from {dropped.sum():,} of {len(z):,} samples; a tag:{condition(z[0], cfg)}")
    return Examples(samples, tokenizer, cfg, suffix=lambda i: condition(None if dropped[i] else z[i], cfg))


def train(cfg: Config, base: str, samples: Samples, folder: Path) -> dict:
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
                part = policy(micro, conditioned_nll_, micro.targets, micro.mask) / batch.normaliser
                part.backward()
                loss += part.detach()
            grad_norm = common.update([policy], optimizer, schedule, loss)
            log(step, loss=loss, grad_norm=grad_norm, lr=lr, tokens=batch.tokens)
    target = wish(cfg.target[-1], samples.z(samples.rewards))
    if tokenizer.chat_template:
        tokenizer.chat_template = asking_template(tokenizer.chat_template, target, cfg)
    common.save_policy(folder, policy, tokenizer, cfg, ABOUT, tag=condition(target, cfg))
    return {"condition": {"template": "{prompt} <rm_score>: {reward} ", "step": cfg.reward_step,
                          "format": cfg.reward_format,
                          "mean": samples.mean, "std": samples.std, "default_target": target}}


ABOUT = """Reward-conditioned SFT (Decision Transformer). The reward that is asked for stands behind the prompt, in
standard deviations from the mean of the samples, rounded; white space counts. `condition` in run.json holds the
template, its step and format, the rewards' mean and standard deviation, and the default target. A chat template here
writes the condition itself: `apply_chat_template(messages, add_generation_prompt=True, reward=2.0)`."""


def main(cfg: Config) -> None:
    """Builds what is missing, trains, and adds a row for each target to the leaderboard."""
    road = reward_model.prerequisites(cfg)
    folder, cost = common.trained(cfg, "dt", road, train)
    z = road.samples.z(road.samples.rewards)
    variants = [common.Variant(f"target {t}", condition(wish(t, z), cfg), asked=wish(t, z)) for t in cfg.target]
    variants += [variants[-1]._replace(name=f"{variants[-1].name}, guidance {guidance:g}", guidance=guidance)
                 for guidance in cfg.guidance if guidance]
    common.evaluate(cfg, "dt", folder, variants, road, cost)


if __name__ == "__main__":
    common.launch(main, Config)
