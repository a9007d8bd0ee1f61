"""Proximal policy optimisation: sample from the policy, score, and make what scored better than expected more likely.

    reward     r_t = -beta (log pi_old - log pi_base)(y_t | x, y_<t), and the score z of the response on its last token
    advantage  A_t = sum_k (gamma lambda)^k delta_{t+k},  delta_t = r_t + gamma V(s_{t+1}) - V(s_t)
    loss       L = - sum_t min(rho_t A_t, clip(rho_t, 1 - eps, 1 + eps) A_t) / tokens,
               rho_t = pi(y_t | x, y_<t) / pi_old(y_t | x, y_<t), with the critic's square and an entropy bonus

The online baseline: it learns from what it says itself, so that it generates, scores and learns in turn.  (Schulman et
al. 2017, arXiv 1707.06347, equation 7; advantages: 1506.02438, equation 16; KL in the reward, and beta that adapts:
Ziegler et al. 2019, arXiv 1909.08593; details: Huang et al. 2024, arXiv 2403.17031.)  gamma is 1.  Scores are in
standard deviations of the labelled samples, of which PPO takes nothing else; a response that is cut off scores
--missing_eos_score at most.  The critic is the reward model, read before every response token, with weights of its own.
Left out: reward whitening, dropout, mixing in SFT gradients.

    python ppo_baseline.py                                     the toy world, one CPU
    torchrun --nproc_per_node=8 ppo_baseline.py --model MODEL --preferences PAIRS.jsonl --out runs/mine
"""
from __future__ import annotations

import functools
import itertools
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Callable, Iterator, NamedTuple, Optional

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

import common
import reward_model
from common import Example, MicroBatch, Samples, knob, print0


@dataclass
class Config(common.Config):
    """The algorithm's own knobs."""
    kl_coef: float = knob(0.05, "beta, the price of a nat of KL to the base policy, in reward z", of="training")
    kl_target: Optional[float] = knob(None, "adapt beta until a response's KL to base is so many nats (6 is usual)",
                                      of="training")
    kl_horizon: float = knob(10000.0, "with --kl_target: beta moves by at most a fifth in so many responses",
                             toy=1000.0, of="training")
    gae_lambda: float = knob(0.95, "lambda of the advantages: 1 is the return itself, 0 one step ahead", of="training")
    clip: float = knob(0.2, "eps: how far a token's probability ratio may gain from moving", of="training")
    value_clip: float = knob(0.2, "how far a value may gain from moving", of="training")
    value_coef: float = knob(0.1, "weight of the value loss; --critic_lr does more, as Adam undoes most of a scale",
                             of="training")
    entropy_coef: float = knob(0.0, "weight of an entropy bonus", of="training")
    missing_eos_score: float = knob(-1.0, "a response that was cut off scores this at most", of="training")
    rollout_batch_size: int = knob(1024, "responses per iteration, all ranks together", toy=256, of="training")
    ppo_epochs: int = knob(4, "passes over an iteration's responses", of="training")
    critic_lr: float = knob(9e-6, "peak learning rate of the critic", toy=2e-3, of="training")
    lr: float = knob(5e-7, "peak learning rate, falling to 0 in a line", toy=5e-4, of="training")
    epochs: int = knob(1, "responses to each training prompt, rounded up to whole iterations", of="training")
    steps: Optional[int] = knob(None, "iterations, in place of --epochs", toy=20, of="training")
    batch_size: int = knob(128, "responses per optimiser step, all ranks together", toy=64, of="training")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("kl_coef", "value_coef", "entropy_coef"):
            common.require(0 <= getattr(self, name) < math.inf,
                           f"--{name} must be 0 or above, not {getattr(self, name)}")
        for name in ("kl_horizon", "clip", "value_clip", "rollout_batch_size", "ppo_epochs", "critic_lr"):
            common.require(0 < getattr(self, name) < math.inf, f"--{name} must be above 0, not {getattr(self, name)}")
        common.require(self.kl_target is None or self.kl_target > 0,
                       f"--kl_target must be above 0, not {self.kl_target}")
        common.require(self.kl_target is None or self.kl_coef > 0,
                       "--kl_target needs a --kl_coef above 0 to start from")
        common.require(self.kl_target is None or self.kl_horizon >= self.rollout_batch_size,
                       "--kl_horizon must not be below --rollout_batch_size")
        common.require(0 <= self.gae_lambda <= 1, f"--gae_lambda lies between 0 and 1, not {self.gae_lambda}")
        common.require(math.isfinite(self.missing_eos_score),
                       f"--missing_eos_score must be a finite number, not {self.missing_eos_score}")
        common.require(self.temperature > 0, "PPO explores by sampling: --temperature must be above 0")
        common.require(self.batch_size <= self.rollout_batch_size, "--batch_size must not exceed --rollout_batch_size")


@common.compiled
def clipped_surrogate_(logits: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor, old_log_prob: torch.Tensor,
                       advantage: torch.Tensor, temperature: float, clip: float, entropy_coef: float,
                       statistics: torch.Tensor) -> torch.Tensor:
    """logits (N, V) become d loss / d logits in place; returns each row's loss (N,), adds to the statistics (3,).

    loss = max(-A rho, -A clip(rho, 1 - clip, 1 + clip)) - entropy_coef H where the response mask (N,) is true, else 0;
    rho = exp(log p - old_log_prob), p = softmax(logits / temperature), with targets, old_log_prob, A = advantage (N,).
    The statistics are sums over the rows of (log p - old_log_prob)^2 / 2, which estimates KL(old, new), of whether the
    clip bites, and of the entropy H.  All in float32 (float64 for float64).  Targets are in [0, V); a
    masked row's may be anything.
    """
    x = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature   # (N, V)
    w = mask.to(x.dtype)                                                            # (N,)
    targets = torch.where(mask, targets, 0)
    is_target = torch.arange(x.shape[1], device=x.device) == targets[:, None]       # (N, V)
    log_z = x.logsumexp(dim=1)                                                      # (N,)
    entropy = log_z - ((x - log_z[:, None]).exp() * x).sum(dim=1)                   # (N,)
    log_p = torch.where(is_target, x, 0.0).sum(dim=1) - log_z  # (N,); torch 2.11 compiles a gather to read behind copy_
    log_ratio = torch.where(mask, log_p - old_log_prob, 0.0)
    ratio = log_ratio.exp()
    plain, clipped = -advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip)
    loss = w * (torch.maximum(plain, clipped) - entropy_coef * entropy)
    slope = torch.where(plain >= clipped, plain, 0.0)                               # d loss / d log p[target]
    # p (entropy_coef (log p + H) - slope) + slope [target]: with log p in a variable torch 2.13 fails to compile it
    pull = entropy_coef * (x + (entropy - log_z)[:, None]) - slope[:, None]         # (N, V)
    gradient = (x - log_z[:, None]).exp() * pull + is_target.to(x.dtype) * slope[:, None]
    logits.copy_(gradient * (w / temperature)[:, None])
    statistics += torch.stack([(w * log_ratio.square() / 2).sum(), (w * (plain < clipped)).sum(), (w * entropy).sum()])
    return loss


def clipped_value_loss(value: torch.Tensor, old: torch.Tensor, returns: torch.Tensor, clip: float) -> torch.Tensor:
    """max((V - R)^2, (clip(V, old - clip, old + clip) - R)^2) / 2, each (N,): nothing is won far from the old value."""
    clipped = torch.maximum(torch.minimum(value, old + clip), old - clip)
    return torch.maximum((value - returns).square(), (clipped - returns).square()) / 2


class ActorCritic(common.Policy):
    """Policy and critic in one module, so that DDP's hooks fire round both."""

    def __init__(self, model: Any, critic: reward_model.RewardModel, samples: Samples, cfg: Config):
        super().__init__(model, cfg)
        self.critic, self.mean, self.std = critic, samples.mean, samples.std
        if cfg.gradient_checkpointing:
            common.recompute_activations(critic.model)

    def values(self, micro: MicroBatch) -> torch.Tensor:
        """V of the state before each response token, in reward z: (N,) float32."""
        return (self.critic(micro.input_ids, micro.lengths, micro.rows) - self.mean) / self.std

    def forward(self, micro: MicroBatch, kernel: Callable, value_clip: float) -> tuple[torch.Tensor, torch.Tensor]:
        """The kernel's loss and the value loss, each summed over the response tokens: float32 scalars."""
        old_log_prob, advantage, old_value, returns = micro.per_token                                   # (T,) each
        surrogate = super().forward(micro, kernel, micro.targets, micro.mask, old_log_prob, advantage)
        errors = clipped_value_loss(self.values(micro), old_value[micro.rows], returns[micro.rows], value_clip)  # (N,)
        return surrogate, errors.sum()


class Rollout(NamedTuple):
    """What the policy said to a batch of prompts, all ranks together."""
    prompts: list
    texts: list[str]
    truncated: list[bool]
    examples: list[Example]
    log_probs: list[list[float]]  # each response token's, at cfg.temperature, as it was drawn


def advantages(reward: torch.Tensor, value: torch.Tensor, gae_lambda: float) -> torch.Tensor:
    """Generalised advantage estimates (R, T) of reward and value (R, T), both 0 behind a response's end; gamma = 1."""
    result, ahead, next_value = torch.zeros_like(reward), 0.0, 0.0
    for t in reversed(range(reward.shape[1])):
        ahead = reward[:, t] + next_value - value[:, t] + gae_lambda * ahead
        result[:, t], next_value = ahead, value[:, t]
    return result


def whiten(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """x (R, T) with mean 0 and variance 1 over the mask; 0 outside."""
    inside = x[mask]
    return torch.where(mask, (x - inside.mean()) / (inside.std(correction=0) + 1e-8), 0.0)


def ragged(rows: list) -> torch.Tensor:
    """Rows of uneven length as (R, T) float64, zeros behind their ends."""
    return pad_sequence([torch.as_tensor(row, dtype=torch.float64) for row in rows], batch_first=True)


def prepare(rollout: Rollout, base_log_probs: list, values: list, z: np.ndarray, kl_coef: float,
            cfg: Config) -> tuple[list[Example], dict]:
    """A scored rollout -> training examples, each token with its advantage; and means for the log."""
    old, value = ragged(rollout.log_probs), ragged(values)                                              # (R, T)
    kl, mask = old - ragged(base_log_probs), ragged([[1.0] * len(row) for row in values]).bool()        # (R, T)
    reward = -kl_coef * kl
    reward[range(len(z)), mask.sum(1) - 1] += torch.as_tensor(z)
    advantage = advantages(reward, value, cfg.gae_lambda)
    returns = advantage + value
    columns = (old, whiten(advantage, mask), value, returns)
    examples = [e._replace(per_token=tuple(column[i, :e.response_tokens] for column in columns))
                for i, e in enumerate(rollout.examples)]
    to_come = reward.flip(1).cumsum(1).flip(1)  # what really came: the returns above lean on the critic itself
    unexplained = (to_come - value)[mask].var() / to_come[mask].var().clamp(min=1e-12)
    return examples, {"score": float(z.mean()), "kl": float(kl.sum(1).mean()), "objective": float(reward.sum(1).mean()),
                      "explained_variance": float(1 - unexplained)}


def describe(rollout: Rollout, cfg: Config) -> dict:
    """What the log says about a rollout's texts."""
    tokens = sum(e.response_tokens for e in rollout.examples)
    said = {"eos_rate": 1 - float(np.mean(rollout.truncated)), "response_tokens": tokens / len(rollout.examples),
            "tokens": tokens}
    if cfg.toy:  # for the record alone: training never sees it
        said["gold"] = float(np.mean(list(map(common.gold_reward, rollout.prompts, rollout.texts, rollout.truncated))))
    return said


def adapted(kl_coef: float, kl: float, cfg: Config) -> float:
    """The next iteration's beta: nearer to what holds KL to base at --kl_target (Ziegler et al. 2019, section 2.2)."""
    if cfg.kl_target is None:
        return kl_coef
    error = min(max(kl / cfg.kl_target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * cfg.rollout_batch_size / cfg.kl_horizon)


def new_critic(base: str, rm_folder: str, cfg: Config) -> reward_model.RewardModel:
    """The reward model's weights; a new head on the base policy where its tokens are not the policy's."""
    tokenizer = reward_model.padding_tokenizer(base)
    load = functools.partial(reward_model.new_classifier, base, tokenizer)
    if common.load_tokenizer(base).get_vocab().items() <= common.load_tokenizer(rm_folder).get_vocab().items():
        load = functools.partial(reward_model.load_classifier, rm_folder, torch.float32)
    else:
        print0(f"  {rm_folder} has other tokens than {base}: the critic starts from the latter")
    return reward_model.RewardModel(common.read_once(load, cfg), common.compute_dtype(cfg))


def make_optimizer(actor: ActorCritic, cfg: Config, iterations: int) -> tuple[Any, Any]:
    """AdamW without decay, a learning rate for the policy and one for the critic, both falling to 0 in a line."""
    updates = iterations * cfg.ppo_epochs * math.ceil(cfg.rollout_batch_size / cfg.batch_size)
    optimizer = torch.optim.AdamW([{"params": list(actor.model.parameters()), "lr": cfg.lr},
                                   {"params": list(actor.critic.parameters()), "lr": cfg.critic_lr}],
                                  eps=1e-5, weight_decay=0.0, fused=True)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / updates)


def endless(count: int, seed: int) -> Iterator[int]:
    """0 to count - 1 in a new order each time round."""
    for turn in itertools.count():
        yield from np.random.default_rng((seed, turn)).permutation(count).tolist()


def roll_out(actor: ActorCritic, tokenizer: Any, prompts: list, ids: list[list[int]], cfg: Config,
             seed: int) -> Rollout:
    """One response to each prompt, sampled from the policy as it is now; from all of it: top-p is for evaluation."""
    actor.eval()
    sampler = common.gathered(actor.model, actor.dtype, common.device()) if common.is_sharded(cfg) else actor.model
    with common.autocast(actor.dtype):
        responses = common.sample(sampler, ids, replace(cfg, top_p=1.0), seed, what="rollout")
    return Rollout(prompts, [common.decode(tokenizer, r) for r in responses], [r.truncated for r in responses],
                   [Example(p + r.ids, len(p)) for p, r in zip(ids, responses)], [r.log_probs for r in responses])


def update(policy: torch.nn.Module, actor: ActorCritic, optimizer: Any, schedule: Any, examples: list[Example],
           cfg: Config) -> dict:
    """A few passes over an iteration's examples, each in an order of its own; returns means over all their tokens."""
    actor.train()
    statistics, loss, value_loss, grad_norms, tokens = torch.zeros(3, device=common.device()), 0.0, 0.0, [], 0
    kernel = functools.partial(clipped_surrogate_, temperature=cfg.temperature, clip=cfg.clip,
                               entropy_coef=cfg.entropy_coef, statistics=statistics)
    for _, batch in common.batches(examples, cfg):
        total, lr = 0.0, schedule.get_last_lr()[0]
        for micro in common.accumulate(policy, batch.micros):
            surrogate, value_error = policy(micro, kernel, cfg.value_clip)
            part = (surrogate + cfg.value_coef * value_error) / batch.normaliser
            part.backward()
            total += part.detach()
            loss, value_loss = loss + surrogate.detach(), value_loss + value_error.detach()
        grad_norms.append(common.update([actor.model, actor.critic], optimizer, schedule, total))
        tokens += batch.tokens
    share = common.world_size() / tokens  # the log averages over ranks
    approx_kl, clip_fraction, entropy = statistics * share
    grad_norm = torch.stack(grad_norms).nanmean()  # of the updates that were made
    return {"loss": loss * share, "value_loss": value_loss * share, "approx_kl": approx_kl,
            "clip_fraction": clip_fraction, "entropy": entropy, "grad_norm": grad_norm, "lr": lr}


def train(cfg: Config, base: str, samples: Samples, folder: Path, score: Callable, rm_folder: str) -> None:
    """Trains the policy, from the base policy's weights, into the folder."""
    model, tokenizer = common.load_sampler(base, cfg, trained=True)
    reference = common.load_model(base, common.compute_dtype(cfg))
    actor = ActorCritic(model, new_critic(base, rm_folder, cfg), samples, cfg)
    policy = common.distributed(actor, cfg, "values")
    prompts = common.split_prompts(cfg, held_out=False)
    ids = common.encode_prompts(tokenizer, prompts, cfg.max_prompt_tokens)
    iterations = cfg.steps or math.ceil(cfg.epochs * len(prompts) / cfg.rollout_batch_size)
    optimizer, schedule = make_optimizer(actor, cfg, iterations)
    beta = {"now": cfg.kl_coef}
    print0(f"  {len(prompts):,} prompts; {iterations} iterations of {cfg.rollout_batch_size} responses, each learnt "
           f"from in {cfg.ppo_epochs} passes by {cfg.batch_size}, over {common.world_size()} rank(s); "
           f"{str(actor.dtype).removeprefix('torch.')} on {common.device()}")

    with common.training(folder, policy, optimizer, schedule, iterations, cfg, beta) as (first, log):
        order = itertools.islice(endless(len(prompts), cfg.seed), first * cfg.rollout_batch_size, None)
        for iteration in range(first, iterations):
            start, seed = time.perf_counter(), (iteration + 2) * 1_000_003 + cfg.seed
            asked = list(itertools.islice(order, cfg.rollout_batch_size))
            rollout = roll_out(actor, tokenizer, [prompts[i] for i in asked], [ids[i] for i in asked], cfg, seed)
            seconds = time.perf_counter() - start

            z = samples.z(score(rollout.prompts, rollout.texts, rollout.truncated))
            z = np.where(rollout.truncated, np.minimum(z, cfg.missing_eos_score), z)

            base_log_probs = common.response_log_probs(reference, rollout.examples, cfg)
            values = common.each_response_token(actor.values, rollout.examples, cfg)
            examples, found = prepare(rollout, base_log_probs, values, z, beta["now"], cfg)

            learnt = update(policy, actor, optimizer, schedule, examples,
                            replace(cfg, epochs=cfg.ppo_epochs, steps=None, seed=seed))
            said = describe(rollout, cfg)
            kl_coef, beta["now"] = beta["now"], adapted(beta["now"], found["kl"], cfg)
            log(iteration, **found, **said, **learnt, kl_coef=kl_coef,
                rollout_tokens_per_second=said["tokens"] / seconds)
    common.save_policy(folder, policy, tokenizer, cfg, f"PPO, KL coefficient {cfg.kl_coef:g}.")


def main(cfg: Config) -> None:
    """Builds what is missing, trains, and adds a row to the leaderboard."""
    road = reward_model.prerequisites(cfg)
    common.require(road.score is not None,
                   "PPO scores what it samples: give --reward_model, or --preferences to train one on")
    common.require(road.samples.labelled_by == road.samples.scorer,
                   f"{cfg.samples}: PPO takes the units of its reward from the samples, so the same reward model must "
                   "have labelled them; leave --samples away to label the data's")
    learn = functools.partial(train, score=road.score, rm_folder=road.reward_model)
    folder, cost = common.trained(cfg, "ppo", road, learn, "data", "samples", scorer=road.samples.scorer)
    variants = [common.Variant(f"kl {cfg.kl_coef:g}" + (f" to {cfg.kl_target:g}" if cfg.kl_target else ""))]
    common.evaluate(cfg, "ppo", folder, variants, road, cost, needs=("reward_model",))


if __name__ == "__main__":
    common.launch(main, Config)
