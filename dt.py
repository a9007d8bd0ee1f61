"""Decision Transformer: learn what responses of each reward look like, then ask for a high one.

    training   L = - sum_i sum_t log p(y_it | x_i, z_i, y_i<t)  /  sum_i |y_i|
    sampling   y_t ~ p(. | x, z*, y_<t), with a high target z*
    guided     y_t ~ softmax((1 + g) log p(. | x, z*, y_<t) - g log p(. | x, y_<t))

i runs over the responses of a step's batch, all ranks together, and t over a response's tokens;
z is the reward in standard deviations from the samples' mean.

A rounded z_i is appended to the prompt, `{prompt} <rm_score>: 1.52 `, and the response follows; all
samples are learnt from.  (Hu et al. 2023, arXiv 2308.12050, "conditional alignment"; Chen et al.
2021, arXiv 2106.01345.)  Some examples go without this tag, so that guidance has its p(. | x) (Ho &
Salimans 2022, arXiv 2207.12598).  Left out: returns-to-go at each token, as the reward comes once.

    python dt.py                                               the toy world, one CPU
    torchrun --nproc_per_node=8 dt.py --model MODEL --preferences PAIRS --out runs/mine
"""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Optional

import numpy as np
import torch

import common
import reward_model
from common import Cost, Examples, Samples, Stage, flag, print0


@dataclass
class Config(common.Config):
    """The algorithm's own flags."""
    target: list[str] = flag(["q5", "q50", "q99"], "rewards to ask for, a row each: numbers, "
                             "quantiles (q95), none; the last in training is the policy's default")
    guidance: list[float] = flag([0.5], "a row more for each: the last target, guided by this g; "
                                 "0: none", "[0, 1000]")
    condition_dropout: float = flag(0.1, "share of examples without the tag; guidance needs some",
                                    "[0, 1)", stage="training")
    reward_step: float = flag(0.01, "the reward in the tag is rounded to this", "[0.01, inf)",
                              toy=0.5, stage="training")
    reward_format: Literal["decimal", "digit"] = flag(
        "decimal", "decimal: 1.52; digit: one symbol, 4 is the mean and 5 a step above it",
        toy="digit", stage="training")
    lr: float = flag(1e-5, "peak learning rate; 3 % warm-up, then cosine to 0", "(0, 1000]",
                     toy=5e-3, stage="training")
    steps: Optional[int] = flag(None, "optimiser steps, in place of --epochs", "[1, inf)", toy=600,
                                stage="training")

    def __post_init__(self) -> None:
        super().__post_init__()
        common.require(not any(self.guidance) or self.condition_dropout > 0,
                       "--guidance needs a --condition_dropout above 0; without, give --guidance 0")
        common.require(self.target[-1] != "none", "--target: the last one is the default, a reward")
        common.require(self.reward_format == "decimal" or self.reward_step >= 0.1,
                       "--reward_format digit has ten steps: "
                       f"{self.reward_step} is too small a --reward_step")
        for target in self.target:
            target_reward(target, np.zeros(1))  # a mistyped one fails here, before any training


@common.compiled
def masked_nll_(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Each row's loss (N,); overwrites logits (N, V) with its gradient.

    loss = -log softmax(logits)[target]
    Rows are the positions that predict a response token.  In float32 (float64 for float64).
    """
    # nll = log Z - x[target], with Z = sum_v exp x[v].  d log Z / d x[v] = exp x[v] / Z, which is
    # softmax(x)[v]; d x[target] / d x[v] is 1 at the target, 0 elsewhere.  So
    # d nll / d x = softmax(x) - one_hot(target)
    x = logits.to(torch.promote_types(logits.dtype, torch.float32))             # (N, V)
    is_target = torch.arange(x.shape[1], device=x.device) == targets[:, None]   # (N, V)
    log_z = x.logsumexp(dim=1)                                                  # (N,)
    nll = log_z - torch.where(is_target, x, 0.0).sum(dim=1)                     # (N,)
    gradient = (x - log_z[:, None]).exp() - is_target.to(x.dtype)               # (N, V)
    logits.copy_(gradient)
    return nll


def reward_tag(z: Optional[float], cfg: Config) -> str:
    """What stands between prompt and response, in training and sampling alike; None: nothing."""
    if z is None:
        return ""
    steps = round(z / cfg.reward_step)
    if cfg.reward_format == "digit":
        return f" <rm_score>: {min(max(steps + 4, 0), 9)} "
    return f" <rm_score>: {steps * cfg.reward_step:.2f} "


def add_reward_to_chat_template(template: Any, target: float, cfg: Config) -> Any:
    """The template with reward_tag(reward, cfg) after the prompt; several by name, or none, alike.

    apply_chat_template(..., reward=2.0) sets the reward, by default the target; None: no tag.
    """
    if not template:
        return template
    if isinstance(template, dict):
        return {name: add_reward_to_chat_template(t, target, cfg) for name, t in template.items()}
    steps = f"((reward | default({target!r})) / {cfg.reward_step}) | round | int"
    shown = ("[[steps + 4, 0] | max, 9] | min" if cfg.reward_format == "digit" else
             f"'%.2f' | format(steps * {cfg.reward_step})")
    return (template + "{% if add_generation_prompt and reward is not none %}"
            f"{{% set steps = {steps} %}}{{{{ ' <rm_score>: ' ~ ({shown}) ~ ' ' }}}}{{% endif %}}")


def target_reward(target: str, z: np.ndarray) -> Optional[float]:
    """A target as a z: "1.5" is 1.5, "q95" the 95 % quantile of z, "none" None; else BadInput."""
    if target == "none":
        return None
    try:
        value = float(np.quantile(z, float(target[1:]) / 100) if target[:1] == "q" else target)
    except ValueError:
        value = np.nan
    common.require(abs(value) < 1e6,
                   f"--target takes numbers, quantiles from q0 to q100, or none, not {target!r}")
    return value


def prepare(samples: Samples, codec: common.Codec, cfg: Config) -> Examples:
    """Labelled samples -> examples to train on."""
    z = samples.z(samples.rewards)
    texts, which = np.unique([reward_tag(reward, cfg) for reward in z], return_inverse=True)
    tags = codec.continuations(texts.tolist())
    lowest, highest = texts[which[z.argmin()]], texts[which[z.argmax()]]
    print0(f"  {len(texts):,} reward tags, from{lowest}to{highest}")  # they bring their spaces

    def tag(i: int, epoch: int) -> list[int]:
        # drawn by example and epoch alone: the same on any number of ranks, and after a resume
        drawn = np.random.Generator(np.random.Philox(key=[cfg.seed, i], counter=epoch)).random()
        return [] if drawn < cfg.condition_dropout else tags[which[i]]
    return Examples(samples.tokens, tag=tag)


def train(cfg: Config, base: Stage, samples: Samples, folder: Path, cost: Cost) -> dict:
    """Trains the policy, from the base policy's weights, into the folder."""
    codec = common.Codec(base.folder, cfg)
    policy = common.load_policy(base.folder, cfg)
    examples = prepare(samples, codec, cfg)
    steps = common.count_steps(len(examples), cfg)
    optimizer, schedule = common.make_optimizer(policy, cfg, steps)
    common.print_plan(len(examples), cfg)

    with common.TrainingRun(folder, policy, optimizer, schedule, steps, cfg, cost) as run:
        for step, batch in run.steps(examples):
            # batch.normaliser: L's denominator / ranks, as DDP averages gradients over ranks
            loss = 0.0
            lr = schedule.get_last_lr()[0]
            for micro in batch.micros:  # packed sequences, this rank's share of the step
                policy.require_backward_grad_sync = micro is batch.micros[-1]  # DDP: reduce once
                part = policy(micro, masked_nll_) / batch.normaliser
                part.backward()
                loss += part.detach()
            grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            if grad_norm.isfinite():  # else the step is skipped, on all ranks alike
                optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            run.log(step, loss=loss, grad_norm=grad_norm, lr=lr, tokens=batch.tokens)
    target = target_reward(cfg.target[-1], samples.z(samples.rewards))
    tokenizer = codec.tokenizer
    tokenizer.chat_template = add_reward_to_chat_template(tokenizer.chat_template, target, cfg)
    common.save_policy(folder, policy, codec, cfg, reward_tag(target, cfg), ABOUT)
    return {"condition": {"template": "{prompt} <rm_score>: {reward} ", "step": cfg.reward_step,
                          "format": cfg.reward_format, "mean": samples.rewards.mean(),
                          "std": samples.rewards.std(), "default_target": target}}


ABOUT = """
The target reward is appended to the prompt, in standard deviations from the mean of the samples,
rounded; white space counts. `condition` in run.json holds the template, its step and format, the
rewards' mean and standard deviation, and the default target. A chat template here writes the tag
itself: `apply_chat_template(messages, add_generation_prompt=True, reward=2.0)`. Guided by g,
towards the target and away from what the policy says without one:

```python
plain = tokenizer(prompt, return_tensors="pt").input_ids  # no tag; of chat: reward=None
model.generate(torch.tensor([ids]), guidance_scale=1 + g, negative_prompt_ids=plain, do_sample=True)
```
"""


def main(cfg: Config) -> None:
    """Base policy, reward model, labelled samples, training, evaluation: what is there is kept."""
    base = common.base_policy(cfg)
    common.Codec(base.folder, cfg).check_fits(base.folder, reward_tag(-99.99, cfg))
    rm = reward_model.for_run(cfg, base)
    samples = common.labelled_samples(cfg, base, rm)
    policy = common.train_stage(cfg, "dt", train, base, samples)
    z = samples.z(samples.rewards)
    variants = [common.Variant(f"target {t}", reward_tag(target_reward(t, z), cfg),
                               target=target_reward(t, z)) for t in cfg.target]
    variants += [variants[-1]._replace(name=f"{variants[-1].name}, guidance {g!r}", guidance=g)
                 for g in cfg.guidance if g]
    common.evaluate(cfg, policy, variants, base, rm, samples, reward_model.judge(cfg))


if __name__ == "__main__":
    common.launch(main, Config)
