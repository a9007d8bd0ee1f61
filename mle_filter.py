"""MLE with filtering: keep the best responses, forget their rewards, imitate.

    w_i = 1 if z_i is among the highest `keep` share of all samples; others never enter a batch
    L   = - sum_i w_i sum_t log p(y_it | x_i, y_i<t)  /  sum_i |y_i|

i runs over the responses of a step's batch, all ranks together, and t over a response's tokens;
z is the reward in standard deviations from the samples' mean.

(Hu et al. 2023, arXiv 2308.12050.)  Left out: filtering in rounds, as RAFT (arXiv 2304.06767) does.

    python mle_filter.py                                       the toy world, one CPU
    torchrun --nproc_per_node=8 mle_filter.py --model MODEL --preferences PAIRS --out runs/mine
"""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import common
import reward_model
from common import Cost, Examples, Samples, Stage, Variant, flag, print0


@dataclass
class Config(common.Config):
    """The algorithm's own flags."""
    keep: float = flag(0.1, "share of samples kept, the best; 1.0: supervised fine-tuning, SFT")
    per_prompt: bool = flag(False, "apply --keep within each prompt; at least one sample each")

    def __post_init__(self) -> None:
        super().__post_init__()
        common.require(0 < self.keep <= 1, f"--keep must lie in (0, 1], not {self.keep}")


TOY = {"lr": 2e-3, "steps": 600}  # defaults in the toy world


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


def best(z: np.ndarray, keep: float) -> np.ndarray:
    """Indices of the `keep` share with the highest reward, one at least; ties by their order."""
    return np.argsort(-z, kind="stable")[:max(1, round(keep * len(z)))]


def prepare(samples: Samples, cfg: Config) -> Examples:
    """Labelled samples -> examples to train on."""
    z = samples.z(samples.rewards)
    groups = [np.arange(len(z))]
    if cfg.per_prompt:
        order = np.argsort(samples.prompts, kind="stable")  # a prompt's samples side by side
        _, starts = np.unique(samples.prompts[order], return_index=True)
        groups = np.split(order, starts[1:])
    kept = np.concatenate([group[best(z[group], cfg.keep)] for group in groups])
    print0(f"  kept {len(kept):,} of {len(z):,} samples, of reward z {z[kept].min():.2f} or more")
    return Examples(samples.tokens, indices=kept)


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
                part = policy(micro, masked_nll_) / batch.normaliser
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
    name = "sft" if cfg.keep == 1 else "mle_filter"
    policy = common.policy_stage(cfg, name, train, base, samples)
    common.build_stages(cfg, rm, samples, policy)
    variants = [Variant(f"keep {cfg.keep:g}" + (" per prompt" if cfg.per_prompt else ""))]
    common.evaluate(cfg, policy, variants, base, data, rm, samples, judge, cost_of=(rm, samples))


if __name__ == "__main__":
    common.launch(main, Config)
