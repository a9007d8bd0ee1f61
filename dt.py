"""Decision Transformer: learn what responses of each reward look like, then ask for a high one.

    training   L = - sum_i sum_t log p(y_it | x_i, z_i, y_i<t)  /  sum_i |y_i|
    sampling   y_t ~ p(. | x, z*, y_<t), with a high target z*
    guided     y_t ~ softmax((1 + g) log p(. | x, z*, y_<t) - g log p(. | x, y_<t))

i runs over the responses of a step's batch, all ranks together, and t over a response's tokens;
z is the reward in standard deviations from the samples' mean.

A tag that stands for z_i is appended to the prompt: a digit, ` 7`, the paper's text,
` <rm_score>: 1.52 `, or a new token.  The response follows; all samples are learnt from.  (Hu et
al. 2023, arXiv 2308.12050, "conditional alignment"; Chen et al. 2021, arXiv 2106.01345.)  Some
examples go without this tag, so that guidance has its p(. | x) (Ho & Salimans 2022, arXiv
2207.12598).  Left out: returns-to-go at each token, as the reward comes once.

    python dt.py                                               the toy world, one CPU
    torchrun --nproc_per_node=8 dt.py --model MODEL --preferences PAIRS --out runs/mine
"""
from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Optional

import numpy as np
import torch

import common
import reward_model
from common import Cost, Examples, Samples, Stage, Variant, flag, print0


@dataclass
class Config(common.Config):
    """The algorithm's own flags."""
    target: list[str] = flag(["q5", "q50", "q99"], "rewards to ask for, a line each: numbers, "
                             "quantiles (q95), none; the last, at training, is the default")
    guidance: list[float] = flag([0.5], "a line more for each: the last target, guided by this g; "
                                 "0: none", "[0, 1000]")
    condition_dropout: float = flag(0.1, "share of examples without the tag; guidance needs some",
                                    "[0, 1)", stage="training")
    reward_format: Literal["digit", "decimal", "token"] = flag(
        "digit", "digit: ` 5`, 4 is the mean and 5 a step above it; decimal: the paper's "
        "` <rm_score>: 1.52 `; token: a new token for each eighth of the samples, by reward",
        stage="training")
    reward_step: Optional[float] = flag(
        None, "z is rounded to this in the tag [digit: 0.5, decimal: 0.01]", "[0.01, inf)",
        stage="training")
    watch_slope: int = flag(16, "held-out prompts answered at a low and a high target before each "
                            "checkpoint, to see whether the tag is heeded; 0: none", "[0, inf)",
                            toy=32)
    lr: float = flag(1e-5, "peak learning rate; 3 % warm-up, then cosine to 0", "(0, 1000]",
                     toy=5e-3, stage="training")
    steps: Optional[int] = flag(None, "optimiser steps, in place of --epochs", "[1, inf)", toy=600,
                                stage="training")

    def __post_init__(self) -> None:
        super().__post_init__()
        common.require(self.condition_dropout or not any(self.guidance)
                       and "none" not in self.target, "--guidance and the target none need a "
                       "--condition_dropout above 0; without, give --guidance 0")
        common.require(self.target[-1] != "none", "--target: the last one is the default, a reward")
        common.require(self.reward_format != "token" or self.reward_step is None,
                       "--reward_format token goes by eighths of the samples: it takes no "
                       "--reward_step")
        if self.reward_step is None and self.reward_format != "token":
            self.reward_step = 0.5 if self.reward_format == "digit" else 0.01
        common.require(self.reward_format != "digit" or self.reward_step >= 0.1,
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


TOKENS = tuple(f"<|reward_{i}|>" for i in range(8))


def reward_tag(z: Optional[float], edges: np.ndarray, cfg: Config) -> str:
    """What stands between prompt and response, in training and sampling alike; None: nothing.

    edges (7,) divide the samples' z into eighths.
    """
    if z is None:
        return ""
    if cfg.reward_format == "token":
        return TOKENS[int(np.searchsorted(edges, z))]
    steps = round(z / cfg.reward_step)
    if cfg.reward_format == "decimal":
        return f" <rm_score>: {steps * cfg.reward_step:.2f} "
    return f" {min(max(steps + 4, 0), 9)}"  # 4 is the mean; 0 and 9 are 4 steps below, 5 above it


def bin_edges(samples: Samples) -> np.ndarray:
    """The z (7,) that divide the samples into eighths."""
    return np.quantile(samples.z(samples.rewards), np.arange(1, len(TOKENS)) / len(TOKENS))


def tag_ids(tag: str, codec: common.Codec) -> list[int]:
    """The tag as ids: those of new tokens, or of text that continues the prompt."""
    if tag in TOKENS:
        return [codec.tokenizer.convert_tokens_to_ids(tag)]
    return codec.continuations([tag])[0]


def tag_in_jinja(default: float, edges: np.ndarray, cfg: Config) -> str:
    """reward_tag() of `reward`, or else of the default, as a chat template writes it."""
    z = f"(reward | default({default!r}) | float)"
    steps = f"({z} / {cfg.reward_step}) | round | int"
    return {"digit": f"' ' ~ ([[{steps} + 4, 0] | max, 9] | min)",
            "decimal": f"' <rm_score>: ' ~ ('%.2f' | format(({steps}) * {cfg.reward_step})) ~ ' '",
            "token": f"'<|reward_' ~ ({edges.tolist()} | select('lt', {z}) | list | length) ~ '|>'"
            }[cfg.reward_format]


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


def ask(target: str, samples: Samples, codec: common.Codec, cfg: Config) -> Variant:
    """The way to ask the policy for a target."""
    z = target_reward(target, samples.z(samples.rewards))
    if z is not None and cfg.reward_format == "digit":
        z = min(max(z, -4 * cfg.reward_step), 5 * cfg.reward_step)  # what 0 and 9 stand for
    tag = reward_tag(z, bin_edges(samples), cfg)
    return Variant(f"target {target}", tag, tag_ids(tag, codec), target=z)


def prepare(samples: Samples, codec: common.Codec, cfg: Config) -> Examples:
    """Labelled samples -> examples to train on."""
    z, edges = samples.z(samples.rewards), bin_edges(samples)
    texts, which = np.unique([reward_tag(reward, edges, cfg) for reward in z], return_inverse=True)
    tags = [tag_ids(text, codec) for text in texts.tolist()]
    lowest, highest = texts[which[z.argmin()]], texts[which[z.argmax()]]
    common.require(len(texts) > 1, f"all samples get the reward tag {texts[0].strip()}: it would "
                   "tell nothing; give a smaller --reward_step or another --reward_format")
    print0(f"  {len(texts):,} reward tags, from {lowest.strip()} to {highest.strip()}")

    def tag(i: int, epoch: int) -> list[int]:
        # drawn by example and epoch alone: the same on any number of ranks, and after a resume
        drawn = np.random.Generator(np.random.Philox(key=[cfg.seed, i], counter=epoch)).random()
        return [] if drawn < cfg.condition_dropout else tags[which[i]]
    return Examples(samples.tokens, tag=tag)  # which puts it between prompt and response


def train(cfg: Config, base: Stage, samples: Samples, folder: Path, cost: Cost,
          rm: Optional[Stage] = None) -> dict:
    """Trains the policy, from the base policy's weights, into the folder; returns what its run.json
    is to say of the tag."""
    codec = common.Codec(base.folder, cfg)
    new_tokens = TOKENS if cfg.reward_format == "token" else ()
    policy = common.load_policy(base.folder, cfg, codec=codec, new_tokens=new_tokens)
    examples = prepare(samples, codec, cfg)
    steps = common.count_steps(len(examples), cfg)
    optimizer, schedule = common.make_optimizer(policy, cfg, steps)
    common.print_plan(len(examples), cfg)
    if steps < 200:
        print0("  a tag is heeded after some hundred steps: give more --steps")

    with common.TrainingRun(folder, policy, optimizer, schedule, steps, cfg, cost) as run:
        watch = common.slope_watcher(run, cfg.watch_slope, samples, rm, codec,
                                     *(ask(q, samples, codec, cfg) for q in ("q5", "q95")))
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
            run.log(step, loss=loss, grad_norm=grad_norm, lr=lr, tokens=batch.tokens,
                    **watch(step))
    default, edges = ask(cfg.target[-1], samples, codec, cfg), bin_edges(samples)
    codec.tokenizer.chat_template = common.with_reward_tag(
        codec.tokenizer.chat_template, tag_in_jinja(default.target, edges, cfg))
    common.save_policy(folder, policy, codec, cfg, default.tag, ABOUT)
    return {"condition": {"format": cfg.reward_format, "step": cfg.reward_step,
                          "bin_edges": edges.tolist(), "mean": float(samples.rewards.mean()),
                          "std": float(samples.rewards.std()),
                          "default_target": default.target, "default_tag": default.tag}}


ABOUT = """
The target reward is appended to the prompt, in standard deviations from the mean of the samples,
rounded; white space counts. `condition` in run.json holds the tag's format and step, the edges of
the eighths, the rewards' mean and standard deviation, the default target and its tag. A chat
template here writes the tag itself:
`apply_chat_template(messages, add_generation_prompt=True, reward=2.0)`. Guided by g, towards the
target and away from what the policy says without one:

```python
plain = tokenizer(prompt, return_tensors="pt").input_ids  # no tag; of chat: reward=None
model.generate(torch.tensor([ids]), guidance_scale=1 + g, negative_prompt_ids=plain, do_sample=True)
```
"""


def main(cfg: Config) -> None:
    """Base policy, reward model, labelled samples, training, evaluation: what is there is kept."""
    base = common.base_policy(cfg)
    common.Codec(base.folder, cfg).check_fits(base.folder, reward_tag(-99.99, np.zeros(7), cfg))
    rm = reward_model.for_run(cfg, base)
    samples = common.labelled_samples(cfg, base, rm)
    policy = common.train_stage(cfg, "dt", functools.partial(train, rm=rm), base, samples)
    codec = common.Codec(policy.folder, cfg)
    variants = [ask(target, samples, codec, cfg) for target in cfg.target]
    for tag in {v.tag: None for v in variants}:
        same = [v.name for v in variants if v.tag == tag]
        if len(same) > 1:
            print0(f"  {', '.join(same)}: all are asked for by the tag {tag.strip()}")
    variants += [variants[-1]._replace(name=f"{variants[-1].name}, guidance {g!r}", guidance=g)
                 for g in cfg.guidance if g]
    common.evaluate(cfg, policy, variants, base, rm, samples, reward_model.judge(cfg))


if __name__ == "__main__":
    common.launch(main, Config)
