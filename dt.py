"""Decision Transformer: learn what responses of each reward look like, then ask for a high one.

    training   L = - sum_i sum_t log p(y_it | x_i, z_i, y_i<t)  /  sum_i |y_i|
    sampling   y_t ~ softmax((1 + g) log p(. | x, z*, y_<t) - g log p(. | x, y_<t)), with z* high

i runs over the responses of a step's batch, all ranks together, and t over a response's tokens;
z is the reward in standard deviations from the samples' mean.

A tag after the prompt says z.  Extreme z say most and are drawn more often; a tenth go untagged,
for guidance.  (Hu et al. 2023, arXiv 2308.12050; 2106.01345; 2207.12598.)  Left out: returns-to-go.

    python dt.py                                               the toy world, one CPU
    torchrun --nproc_per_node=8 dt.py --model MODEL --preferences PAIRS --out runs/mine
"""
from __future__ import annotations

import re
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
    target: list[str] = flag(["q5", "q50", "q99"], "z or quantiles; training saves the last one")
    guidance: list[float] = flag([0.5], "also evaluate the last target at these guidance scales")
    condition_dropout: float = flag(0.1, "share of examples without the tag; guidance needs some")
    emphasis: float = flag(4.0, "draws by 1 + |z|^emphasis, with repeats; 0: each once an epoch")
    reward_format: Literal["word", "digit", "decimal"] = flag(
        "word", "word ` good`; digit ` 4` for z = 0, ` 6` for 1; decimal ` <rm_score>: 1.52 `")
    evaluation_flags = ("target", "guidance")

    def __post_init__(self) -> None:
        super().__post_init__()
        common.require(0 <= self.emphasis <= 100, "--emphasis must lie in [0, 100]")
        common.require(0 <= self.condition_dropout < 1, "--condition_dropout must lie in [0, 1)")
        common.require(self.condition_dropout or not any(self.guidance),
                       "--guidance needs a --condition_dropout above 0; without, give --guidance 0")
        for target in self.target:
            common.require(re.fullmatch(r"-?[0-3](\.\d+)?|q\d\d?(\.\d+)?|q100", target),
                           f"--target takes z between -4 and 4, or q0 to q100, not {target!r}")


TOY = {"lr": 5e-3, "steps": 600, "reward_format": "digit"}  # defaults in the toy world


@common.compiled
def masked_nll_(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """-log softmax(logits)[target] of each row (N,); overwrites logits (N, V) with its gradient.

    Rows are the positions that predict a response token.  In float32 (float64 for float64).
    """
    # nll = log Z - x[target], with Z = sum_v exp x[v].  As d log Z / d x[v] = exp x[v] / Z,
    # d nll / d x = softmax(x) - one_hot(target)
    x = logits.to(torch.promote_types(logits.dtype, torch.float32))             # (N, V)
    is_target = torch.arange(x.shape[1], device=x.device) == targets[:, None]   # (N, V)
    log_z = x.logsumexp(dim=1)                                                  # (N,)
    nll = log_z - torch.where(is_target, x, 0.0).sum(dim=1)                     # (N,)
    gradient = (x - log_z[:, None]).exp() - is_target.to(x.dtype)               # (N, V)
    logits.copy_(gradient)
    return nll


WORDS = (" terrible", " bad", " average", " good", " excellent")
ABOUT = """Prompts end with the tag `{}`, by a chat template or by hand; others: dt.py, reward_tag.
Guidance g: `generate(..., guidance_scale=1 + g, negative_prompt_ids=the prompt without a tag)`.
"""


def reward_tag(z: float, cfg: Config) -> str:
    """The text between prompt and response, in training and sampling alike."""
    if cfg.reward_format == "word":  # edges: the fifths of a normal distribution
        return WORDS[int(np.searchsorted((-0.84, -0.25, 0.25, 0.84), z))]
    if cfg.reward_format == "decimal":
        return f" <rm_score>: {round(z, 2) + 0.0:.2f} "  # no -0.00
    return f" {min(max(round(2 * z) + 4, 0), 9)}"


def ask_for(target: str, samples: Samples, codec: common.Codec, cfg: Config) -> Variant:
    """The way to ask for a target: "1.5", a z, or "q95", the 95 % quantile of the samples' z."""
    z = float(target.removeprefix("q"))
    if target.startswith("q"):
        z = float(np.quantile(samples.z(samples.rewards), z / 100))
    if cfg.reward_format == "digit":
        z = min(max(z, -2.0), 2.5)  # what 0 and 9 stand for
    tag = reward_tag(z, cfg)
    return Variant(f"target {target}", tag, codec.reward_tag(tag), target=z)


def prepare(samples: Samples, codec: common.Codec, cfg: Config) -> Examples:
    """Labelled samples -> examples to train on."""
    z = samples.z(samples.rewards)
    tags = [reward_tag(reward, cfg) for reward in z]
    ids = {tag: codec.reward_tag(tag) for tag in set(tags)}

    def tag(i: int, epoch: int) -> list[int]:
        # drawn by example and epoch alone: the same on any number of ranks, and after a resume
        rng = np.random.default_rng((cfg.seed, epoch, i, 2))  # not sample()'s
        return [] if rng.random() < cfg.condition_dropout else ids[tags[i]]

    def draw(epoch: int) -> np.ndarray:
        chance = 1 + np.minimum(np.abs(z), 3) ** cfg.emphasis  # else an outlier is all that is read
        chance /= chance.sum()
        common.print_once(f"  emphasis: effective sample size {1 / (chance ** 2).sum():,.0f}")
        return np.random.default_rng((cfg.seed, epoch, 1)).choice(len(z), len(z), p=chance)
    return Examples(samples.tokens, tag=tag, draw=draw if cfg.emphasis else None)


def train(cfg: Config, base: Stage, samples: Samples, folder: Path, cost: Cost) -> dict:
    """Trains the policy, from the base policy's weights, into the folder."""
    codec = common.Codec(base.path, cfg)
    policy = common.load_policy(base.path, cfg)
    examples = prepare(samples, codec, cfg)
    steps = common.plan_steps(len(examples), cfg)
    optimizer, schedule = common.make_optimizer(policy, cfg.lr, steps)

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
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            run.log(step, loss=loss, grad_norm=grad_norm, lr=lr, tokens=batch.tokens)
    default = ask_for(cfg.target[-1], samples, codec, cfg)
    common.save_policy(folder, policy, codec, cfg, default.tag, ABOUT.format(default.tag))
    return {"reward_tag": default.tag, "target": default.target,  # for run.json
            "mean": float(samples.rewards.mean()), "std": float(samples.rewards.std())}


def report_slope(targets: list[Variant], replies: list[list[dict]]) -> None:
    """Prints the slope of z got on z asked for: 0: tag ignored; 1 (words: about 0.85): at best."""
    got = [[reply["reward"] for reply in each] for each in replies]                     # (K, n)
    slopes = np.polyfit([each.target for each in targets], got, deg=1)[0]               # (n,)
    prompts = np.array([common.prompt_hash(reply["prompt"]) for reply in replies[0]])   # (n,)
    by_prompt = [slopes[prompts == prompt].mean() for prompt in np.unique(prompts)]
    slope, half = np.mean(by_prompt), 1.96 * np.std(by_prompt, ddof=1) / np.sqrt(len(by_prompt))
    print0(f"  slope of z got on asked: {slope:.2f} ± {half:.2f} (95 %, {len(by_prompt)} prompts)")
    if slope + half < 0.2:
        print0("  the policy barely follows the reward tag: try more --steps")


def main(cfg: Config) -> None:
    """Every stage; finished ones are used again."""
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
    guided = [targets[-1]._replace(name=f"{targets[-1].name}, guidance {scale:g}", guidance=scale)
              for scale in cfg.guidance if scale]
    replies = common.evaluate(cfg, policy, targets + guided, base, data, rm, samples, judge,
                              cost_of=(rm, samples))
    if replies and rm and len({each.target for each in targets}) > 1:
        report_slope(targets, replies[:len(targets)])


if __name__ == "__main__":
    common.launch(main, Config)
