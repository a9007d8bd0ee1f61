"""Decision Transformer: learn what responses of each reward look like, then ask for a high one.

    training   L = - sum_i sum_t log p(y_it | x_i, z_i, y_i<t)  /  sum_i |y_i|
    sampling   y_t ~ p(. | x, z*, y_<t), with a high target z*
    guided     y_t ~ softmax((1 + g) log p(. | x, z*, y_<t) - g log p(. | x, y_<t))

i runs over the responses of a step's batch, all ranks together, and t over a response's tokens;
z is the reward in standard deviations from the samples' mean.

A tag that says z_i is appended to the prompt: a digit, ` 7`, a word, ` good`, or the paper's text,
` <rm_score>: 1.52 `; the response follows.  (Hu et al. 2023, arXiv 2308.12050, "conditional
alignment"; Chen et al. 2021, arXiv 2106.01345.)  Some examples go without it, so that guidance has
its p(. | x) (Ho & Salimans 2022, arXiv 2207.12598).  Left out: returns-to-go at each token, as the
reward comes once; new tokens as tags.

    python dt.py                                               the toy world, one CPU
    torchrun --nproc_per_node=8 dt.py --model MODEL --preferences PAIRS --out runs/mine
"""
from __future__ import annotations

import json
import math
import re
from collections import Counter
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
    target: list[str] = flag(["q5", "q50", "q99"], "target rewards to evaluate: numbers, quantiles "
                             "(q95), none; the last, at training, becomes the saved default")
    guidance: list[float] = flag([0.5], "also evaluate the last target at these guidance scales; "
                                 "0: none")
    condition_dropout: float = flag(0.1, "share of examples without the tag; guidance needs some")
    emphasis: float = flag(0.0, "draw samples in proportion to |z|^emphasis; 0: each once")
    reward_format: Literal["digit", "word", "decimal"] = flag(
        "digit", "digit: ` 5`, where 4 is the mean and a step half a standard deviation; word: "
        "` terrible` to ` excellent`; decimal: the paper's ` <rm_score>: 1.52 `")
    evaluation_flags = ("target", "guidance")

    def __post_init__(self) -> None:
        super().__post_init__()
        common.require(0 <= self.condition_dropout < 1, "--condition_dropout must lie in [0, 1)")
        common.require(0 <= self.emphasis <= 100, "--emphasis must lie in [0, 100]")
        common.require(min(self.guidance, default=0) >= 0, "--guidance must not be below 0")
        common.require(self.condition_dropout or not any(self.guidance)
                       and "none" not in self.target, "--guidance and the target none need a "
                       "--condition_dropout above 0; without, give --guidance 0")
        common.require(self.target[-1] != "none", "--target: the last one is the default, a reward")
        for target in self.target:
            target_reward(target, np.zeros(1))  # a mistyped one fails here, before any training


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
WORD_EDGES = (-0.84, -0.25, 0.25, 0.84)  # z that divide a normal distribution into fifths


def reward_tag(z: Optional[float], cfg: Config) -> str:
    """The text between prompt and response, in training and sampling alike; "" for None."""
    if z is None:
        return ""
    if cfg.reward_format == "word":
        return WORDS[int(np.searchsorted(WORD_EDGES, z))]
    if cfg.reward_format == "decimal":
        return f" <rm_score>: {z:.2f} "
    return f" {min(max(round(2 * z) + 4, 0), 9)}"


def target_reward(target: str, z: np.ndarray) -> Optional[float]:
    """A target as a z: "1.5" is 1.5, "q95" the 95 % quantile of z, "none" None; else BadInput."""
    if target == "none":
        return None
    try:
        value = float(np.quantile(z, float(target[1:]) / 100) if target[:1] == "q" else target)
    except ValueError:
        value = math.nan
    common.require(abs(value) < 1e6,
                   f"--target takes numbers, quantiles from q0 to q100, or none, not {target!r}")
    return value


def variant_of(target: str, samples: Samples, codec: common.Codec, cfg: Config) -> Variant:
    """The way to ask the policy for a target reward."""
    z = target_reward(target, samples.z(samples.rewards))
    if z is not None and cfg.reward_format == "digit":
        z = min(max(z, -2.0), 2.5)  # what 0 and 9 stand for
    tag = reward_tag(z, cfg)
    return Variant(f"target {target}", tag, codec.continuation(tag), target=z)


def prepare(samples: Samples, codec: common.Codec, cfg: Config) -> Examples:
    """Labelled samples -> examples to train on.

    With --emphasis an epoch draws its samples by |z|^emphasis: a tag near the mean says little
    about a response, and most samples lie there; what is learnt about the tag comes from the ends.
    """
    z = samples.z(samples.rewards)
    tags = [reward_tag(reward, cfg) for reward in z]
    shares = Counter(tags).most_common()
    common.require(len(shares) > 1, f"all samples get the reward tag{tags[0]}: it would tell "
                   "nothing; try another --reward_format")
    print0(f"  {len(shares):,} reward tags:" + ",".join(
        f"{tag} {count / len(tags):.1%}" for tag, count in sorted(shares[:10])))
    ids = {tag: codec.continuation(tag) for tag, _ in shares}
    chance = np.abs(z) ** cfg.emphasis

    def tag(i: int, epoch: int) -> list[int]:
        # drawn by example and epoch alone: the same on any number of ranks, and after a resume
        drawn = np.random.Generator(np.random.Philox(key=[cfg.seed, i], counter=epoch)).random()
        return [] if drawn < cfg.condition_dropout else ids[tags[i]]

    def draw(epoch: int) -> np.ndarray:
        return np.random.default_rng((cfg.seed, epoch, 1)).choice(
            len(z), len(z), p=chance / chance.sum())
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
    default = variant_of(cfg.target[-1], samples, codec, cfg)
    if codec.tokenizer.chat_template:
        codec.tokenizer.chat_template = template_with_tag(codec.tokenizer, default.tag)
    common.save_policy(folder, policy, codec, cfg, default.tag, ABOUT.format(tag=default.tag))
    return {"reward_tag": default.tag, "reward_format": cfg.reward_format, "target": default.target,
            "mean": float(samples.rewards.mean()), "std": float(samples.rewards.std())}


def template_with_tag(tokenizer: object, tag: str) -> str:
    """The chat template, writing the tag after the generation prompt.  Jinja drops a template's
    last newline, which would no longer be the last."""
    template = re.sub(r"(\r\n|\r|\n)\Z", "", tokenizer.get_chat_template())
    return template + "{{ " + json.dumps(tag) + " if add_generation_prompt else '' }}"


ABOUT = """
The tag `{tag}` asks for the default target reward; the chat template writes it by itself. Another
target has another tag (white space counts): a digit is 4 at the mean of the samples' rewards and a
step for each half of a standard deviation. run.json has format, mean and standard deviation. In a
chat, replace the tag at the end of `tokenizer.chat_template`. To guide by g, away from the policy
without a tag, pass `guidance_scale=1 + g` and the prompt without a tag as `negative_prompt_ids`.
"""


def report_slope(variants: list[Variant], replies: list[list[dict]], folder: str) -> None:
    """Prints, and draws where matplotlib is there, the reward z got for each target, and the slope
    of the one on the other: 1 where the policy follows its tag, 0 where it ignores it."""
    want = np.array([variant.target for variant in variants], dtype=float)              # (K,)
    got = np.array([[r["reward"] for r in each] for each in replies], dtype=float)      # (K, n)
    if len({variant.tag for variant in variants}) < 2 or np.isnan(got).any():
        return
    keys = [common.prompt_key(r["prompt"]) for r in replies[0]]
    prompt = np.unique(keys, return_inverse=True)[1]                                    # (n,)
    got = np.array([np.bincount(prompt, each) for each in got]) / np.bincount(prompt)   # (K, P)
    centred = want - want.mean()
    slopes = centred @ got / (centred @ centred)              # (P,), each prompt's least squares
    error = 1.96 / math.sqrt(len(slopes))
    print0("\nreward z")
    for variant, z in zip(variants, got):
        print0(f"  {variant.name}: asked for {variant.target:+.2f}, got {z.mean():+.2f}")
    slope, half = slopes.mean(), error * slopes.std()
    print0(f"  slope {slope:.2f} [{slope - half:.2f}, {slope + half:.2f}], 95 % over {len(slopes)} "
           "prompts")
    if slope + half < 0.2:
        print0("  the policy barely follows the reward tag; that takes a few hundred optimiser "
               "steps: try more --steps, or --emphasis 2")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure()
    axes = figure.subplots()
    axes.axline((0, 0), slope=1, color="grey", linestyle=":")
    axes.errorbar(want, got.mean(1), error * got.std(1), fmt="o")
    axes.set(xlabel="reward z asked for", ylabel="reward z got", title=f"slope {slope:.2f}")
    if common.rank() == 0:
        figure.savefig(Path(folder, "asked_against_got.png"))


def main(cfg: Config) -> None:
    """The five stages; finished ones are used again."""
    base = common.base_policy(cfg)
    codec = common.Codec(base.path, cfg)
    codec.check_fits(reward_tag(-99.99, cfg))
    data = common.read_data(cfg, base)
    rm, judge = reward_model.for_run(cfg, base, data), reward_model.judge(cfg)
    samples = common.labelled_samples(cfg, base, data, rm)
    policy = common.policy_stage(cfg, "dt", train, base, samples)
    common.build_stages(cfg, rm, samples, policy)
    targets = [variant_of(target, samples.load(), codec, cfg) for target in cfg.target]
    guided = [targets[-1]._replace(name=f"{targets[-1].name}, guidance {g:g}", guidance=g)
              for g in cfg.guidance if g]
    replies = common.evaluate(cfg, policy, targets + guided, base, data, rm, samples, judge, rm,
                              samples)
    with_target = [i for i, variant in enumerate(targets) if variant.target is not None]
    if replies:
        report_slope([targets[i] for i in with_target], [replies[i] for i in with_target], cfg.out)


if __name__ == "__main__":
    common.launch(main, Config)
