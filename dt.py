"""Decision Transformer: learn what responses of each reward look like, then ask for a high one.

    training   L = - sum_i sum_t log p(y_it | x_i, z_i, y_i<t)  /  sum_i |y_i|
    sampling   y_t ~ p(. | x, z*, y_<t), with a high target z*
    guided     y_t ~ softmax((1 + g) log p(. | x, z*, y_<t) - g log p(. | x, y_<t))

i runs over the responses of a step's batch, all ranks together, and t over a response's tokens;
z is the reward in standard deviations from the samples' mean.

A tag that says z_i is appended to the prompt: a digit, ` 7`, a word, ` good`, or the paper's text,
` <rm_score>: 1.52 `.  (Hu et al. 2023, arXiv 2308.12050, "conditional alignment"; Chen et al. 2021,
arXiv 2106.01345.)  Some examples go without it, so that guidance has its p(. | x) (Ho & Salimans
2022, arXiv 2207.12598).  Left out: returns-to-go at each token, as the reward comes once.

    python dt.py                                               the toy world, one CPU
    torchrun --nproc_per_node=8 dt.py --model MODEL --preferences PAIRS --out runs/mine
"""
from __future__ import annotations

import re
from collections import Counter
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
    target: list[str] = flag(["q5", "q50", "q99"], "target rewards to evaluate, z or quantiles; "
                             "the last, at training, is the saved policy's default")
    guidance: list[float] = flag([0.5], "also evaluate the last target at these guidance scales")
    condition_dropout: float = flag(0.1, "share of examples without the tag; guidance needs some")
    emphasis: float = flag(0.0, "samples are drawn in proportion to |z|^emphasis; 0: each once")
    reward_format: Literal["digit", "word", "decimal"] = flag(
        "digit", "digit: ` 4` at the mean, one step per half deviation; word: ` terrible` to "
        "` excellent`; decimal: the paper's ` <rm_score>: 1.52 `")
    evaluation_flags = ("target", "guidance")

    def __post_init__(self) -> None:
        super().__post_init__()
        common.require(0 <= self.emphasis <= 100, "--emphasis must lie in [0, 100]")
        common.require(0 <= self.condition_dropout < 1, "--condition_dropout must lie in [0, 1)")
        common.require(self.condition_dropout or not any(self.guidance),
                       "--guidance needs a --condition_dropout above 0; without, give --guidance 0")
        for target in self.target:
            common.require(re.fullmatch(r"-?\d+(\.\d+)?|q\d\d?(\.\d+)?|q100", target),
                           f"--target takes numbers and quantiles, q0 to q100, not {target!r}")


TOY = {"lr": 5e-3, "steps": 600}  # defaults in the toy world


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


WORDS = (" terrible", " bad", " average", " good", " excellent")


def reward_tag(z: float, cfg: Config) -> str:
    """The text between prompt and response, in training and sampling alike."""
    if cfg.reward_format == "word":  # edges: the fifths of a normal distribution
        return WORDS[int(np.searchsorted((-0.84, -0.25, 0.25, 0.84), z))]
    if cfg.reward_format == "decimal":
        return f" <rm_score>: {round(z, 2) + 0.0:.2f} "  # no -0.00
    return f" {min(max(round(2 * z) + 4, 0), 9)}"


def ask_for(target: str, samples: Samples, codec: common.Codec, cfg: Config) -> Variant:
    """The way to ask the policy for a target: 1.5, a z, or q95, the 95 % quantile of the samples'.
    """
    if target.startswith("q"):
        z = float(np.quantile(samples.z(samples.rewards), float(target[1:]) / 100))
    else:
        z = float(target)
    if cfg.reward_format == "digit":
        z = min(max(z, -2.0), 2.5)  # what 0 and 9 stand for
    tag = reward_tag(z, cfg)
    return Variant(f"target {target}", tag, codec.reward_tag(tag), target=z)


def prepare(samples: Samples, codec: common.Codec, cfg: Config) -> Examples:
    """Labelled samples -> examples to train on.

    --emphasis: a tag near the mean says little about a response, and most samples lie there.
    """
    z = samples.z(samples.rewards)
    tags = [reward_tag(reward, cfg) for reward in z]
    counts = Counter(tags)
    common.require(len(counts) > 1, f"all samples get the reward tag{tags[0]}, which tells nothing")
    print0(f"  {len(counts):,} reward tags; share of the samples:" + ",".join(
        f"{tag} {count / len(z):.0%}" for tag, count in sorted(counts.items())[:10]))
    ids = {tag: codec.reward_tag(tag) for tag in counts}
    chance = np.abs(z) ** cfg.emphasis

    def tag(i: int, epoch: int) -> list[int]:
        # drawn by example and epoch alone: the same on any number of ranks, and after a resume
        drawn = np.random.Generator(np.random.Philox(key=[cfg.seed, i], counter=epoch)).random()
        return [] if drawn < cfg.condition_dropout else ids[tags[i]]

    def draw(epoch: int) -> np.ndarray:
        rng = np.random.default_rng((cfg.seed, epoch, 1))
        return rng.choice(len(z), len(z), p=chance / chance.sum())
    return Examples(samples.tokens, tag=tag, draw=draw if cfg.emphasis else None)


def train(cfg: Config, base: Stage, samples: Samples, folder: Path, cost: Cost) -> dict:
    """Trains the policy, from the base policy's weights, into the folder; returns what run.json
    says of its tag."""
    codec = common.Codec(base.path, cfg)
    policy = common.load_policy(base.path, cfg)
    examples = prepare(samples, codec, cfg)
    steps = common.count_steps(len(examples), cfg)
    optimizer, schedule = common.make_optimizer(policy, cfg.lr, steps)
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
    default = ask_for(cfg.target[-1], samples, codec, cfg)
    common.save_policy(folder, policy, codec, cfg, default.tag, ABOUT)
    return {"reward_tag": default.tag, "target": default.target,
            "mean": float(samples.rewards.mean()), "std": float(samples.rewards.std())}


ABOUT = """
A prompt ends with the tag of the default target reward, which the chat template writes by itself.
For another target write its tag there, also at the end of `tokenizer.chat_template`: a digit is 4
at the mean of the samples' rewards, and a step is half a standard deviation (both in run.json).
`generate` guides by g with `guidance_scale=1 + g`, `negative_prompt_ids` the prompt without a tag.
"""


def report_slope(variants: list[Variant], replies: list[list[dict]]) -> None:
    """Prints the slope of the reward z got on that asked for: 1 where the policy follows its tag,
    0 where it ignores it."""
    asked = [variant.target for variant in variants]                                    # (K,)
    got = np.array([[r["reward"] for r in each] for each in replies[:len(asked)]], dtype=float)
    if len(set(asked)) < 2 or np.isnan(got).any():
        return
    prompts = np.array([common.prompt_hash(r["prompt"]) for r in replies[0]])           # (n,)
    slopes = [np.polyfit(asked, got[:, prompts == prompt].mean(1), 1)[0]
              for prompt in np.unique(prompts)]
    slope, half = np.mean(slopes), 1.96 * np.std(slopes) / np.sqrt(len(slopes))
    print0(f"  slope of z got on asked: {slope:.2f} ± {half:.2f} (95 %, {len(slopes)} prompts)")
    if slope + half < 0.2:
        print0("  the policy barely follows the reward tag: try more --steps, or --emphasis 2")


def main(cfg: Config) -> None:
    """The five stages; finished ones are used again."""
    judge = reward_model.judge(cfg)
    base = common.base_policy(cfg)
    codec = common.Codec(base.path, cfg)
    codec.check_fits(reward_tag(-99.99, cfg))  # about the longest tag
    data = common.read_data(cfg, base)
    rm = reward_model.for_run(cfg, base, data)
    samples = common.labelled_samples(cfg, base, data, rm)
    policy = common.policy_stage(cfg, "dt", train, base, samples)
    common.build_stages(cfg, rm, samples, policy)
    targets = [ask_for(target, samples.load(), codec, cfg) for target in cfg.target]
    last = targets[-1]
    variants = targets + [last._replace(name=f"{last.name}, guidance {g:g}", guidance=g)
                          for g in cfg.guidance if g]
    replies = common.evaluate(cfg, policy, variants, base, data, rm, samples, judge,
                              cost_of=(rm, samples))
    if replies and rm:
        report_slope(targets, replies)


if __name__ == "__main__":
    common.launch(main, Config)
