"""Proximal policy optimisation: sample, score, make what scored above expectation more likely.

    reward     r_t = -beta (log pi_old - log pi_base)(y_t | x, y_<t), plus z at the last token
    advantage  A_t = sum_k lambda^k delta_{t+k}, whitened;  delta_t = r_t + V(s_{t+1}) - V(s_t)
    loss       L = - sum_t min(rho_t A_t, clip(rho_t, 1 - eps, 1 + eps) A_t) / tokens,
               rho_t = pi(y_t | x, y_<t) / pi_old(y_t | x, y_<t), plus the critic's squared error

z is the response's score in standard deviations from the labelled samples' mean; PPO takes nothing
else from them.  (Schulman et al. 2017, arXiv 1707.06347, equation 7; advantages: 1506.02438,
equation 16; KL in the reward: 1909.08593; details: 2403.17031.)  Left out: discounting, an adaptive
beta, an entropy bonus, reward whitening, dropout, SFT gradients.

    python ppo_baseline.py                                     the toy world, one CPU
    torchrun --nproc_per_node=8 ppo_baseline.py --model MODEL --preferences PAIRS --out runs/mine
"""
from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Optional

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

import common
import reward_model
from common import Cost, Example, MicroBatch, Samples, Stage, flag, print0


@dataclass
class Config(common.Config):
    """The algorithm's own flags."""
    kl_coef: float = flag(0.05, "beta, the price of a nat of KL to the base policy, in reward z")
    gae_lambda: float = flag(0.95, "lambda of the advantages: 1 is the return itself, 0 one step")
    clip: float = flag(0.2, "clip range of the probability ratio, and of the value")
    value_coef: float = flag(0.1, "weight of the value loss")
    missing_eos_score: float = flag(-1.0, "a response that was cut off scores this at most")
    rollout_batch_size: int = flag(1024, "responses per iteration, all ranks together")
    ppo_epochs: int = flag(4, "passes over an iteration's responses")
    critic_lr: float = flag(9e-6, "peak learning rate of the critic")
    lr: float = flag(5e-7, "peak learning rate, decaying linearly to 0")
    epochs: int = flag(1, "responses to each training prompt, rounded up to whole iterations")
    steps: Optional[int] = flag(None, "iterations, in place of --epochs")
    batch_size: int = flag(128, "responses per optimiser step, all ranks together")

    def __post_init__(self) -> None:
        super().__post_init__()
        common.require(0 <= self.gae_lambda <= 1, "--gae_lambda must lie in [0, 1]")
        for name in ("kl_coef", "value_coef"):
            common.require(getattr(self, name) >= 0, f"--{name} must be at least 0")
        for name in ("clip", "critic_lr", "ppo_epochs", "temperature"):
            common.require(getattr(self, name) > 0, f"--{name} must be above 0")
        common.require(self.batch_size <= self.rollout_batch_size,
                       "--batch_size must not exceed --rollout_batch_size")


TOY = {"rollout_batch_size": 256, "critic_lr": 2e-3, "lr": 5e-4, "steps": 20, "batch_size": 64}


@common.compiled
def clipped_surrogate_(logits: torch.Tensor, targets: torch.Tensor, old_log_prob: torch.Tensor,
                       advantage: torch.Tensor, temperature: float, clip: float,
                       statistics: torch.Tensor) -> torch.Tensor:
    """Each row's loss (N,); overwrites logits (N, V) with its gradient, adds to statistics (3,).

    loss = max(-A rho, -A clip(rho, 1 - clip, 1 + clip)), with rho = exp(log p - old_log_prob),
    p = softmax(logits / temperature)[target]; targets, old_log_prob, A = advantage (N,).
    Statistics are sums of (log rho)^2 / 2, which estimates KL(old, new), of whether the clip bites,
    and of the entropy.  In float32 (float64 for float64).
    """
    x = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature   # (N, V)
    is_target = torch.arange(x.shape[1], device=x.device) == targets[:, None]       # (N, V)
    log_z = x.logsumexp(dim=1)                                                      # (N,)
    # p stands here twice, as torch 2.13 fails to compile it on a CPU when it is shared
    entropy = log_z - ((x - log_z[:, None]).exp() * x).sum(dim=1)                   # (N,)
    log_p = torch.where(is_target, x, 0.0).sum(dim=1) - log_z                       # (N,)
    log_ratio = (log_p - old_log_prob).clamp(-20, 20)
    ratio = log_ratio.exp()
    plain = -advantage * ratio
    clipped = -advantage * ratio.clamp(1 - clip, 1 + clip)
    loss = torch.maximum(plain, clipped)
    # d loss / d log p[target] is -A rho where the clip does not bite, else 0; d log p[target] / d x
    # is one_hot - p; over the temperature, by the chain rule
    slope = torch.where(plain < clipped, 0.0, plain)
    p = (x - log_z[:, None]).exp()                                                  # (N, V)
    gradient = is_target.to(x.dtype) * slope[:, None] - p * slope[:, None]          # (N, V)
    logits.copy_(gradient / temperature)
    statistics += torch.stack([(log_ratio.square() / 2).sum(),
                               (plain < clipped).to(x.dtype).sum(), entropy.sum()])
    return loss


def clipped_value_loss(value: torch.Tensor, old: torch.Tensor, returns: torch.Tensor,
                       clip: float) -> torch.Tensor:
    """max((V - R)^2, (clip(V, old - clip, old + clip) - R)^2) / 2, (N,)."""
    clipped = torch.maximum(torch.minimum(value, old + clip), old - clip)
    return torch.maximum((value - returns).square(), (clipped - returns).square()) / 2


class ActorCritic(common.Policy):
    """Policy and critic in one module, so that DDP's hooks cover both."""

    def __init__(self, model: Any, critic: reward_model.RewardModel, mean: float, std: float,
                 cfg: Config):
        """mean and std turn the critic's outputs into reward z."""
        super().__init__(model, cfg)
        self.critic, self.mean, self.std = critic, mean, std

    def values(self, micro: MicroBatch) -> torch.Tensor:
        """V of the state before each response token, in reward z: (N,) float32."""
        return (self.critic(micro.input_ids, micro.lengths, micro.rows) - self.mean) / self.std

    def forward(self, micro: MicroBatch, kernel: Callable,
                clip: float) -> tuple[torch.Tensor, torch.Tensor]:
        """The kernel's loss and the value loss, sums over response tokens: float32 scalars."""
        old_log_prob, advantage, old_value, returns = micro.columns                     # (N,) each
        surrogate = super().forward(micro, kernel, old_log_prob, advantage)
        value_error = clipped_value_loss(self.values(micro), old_value, returns, clip)
        return surrogate, value_error.sum()


def advantages(reward: torch.Tensor, value: torch.Tensor, gae_lambda: float) -> torch.Tensor:
    """Generalised advantage estimates (R, T) of reward and value (R, T); 0 after a response."""
    result = torch.zeros_like(reward)
    advantage = next_value = 0.0
    for t in reversed(range(reward.shape[1])):
        delta = reward[:, t] + next_value - value[:, t]
        advantage = delta + gae_lambda * advantage
        next_value = value[:, t]
        result[:, t] = advantage
    return result


def ragged(responses: list) -> torch.Tensor:
    """A number for each token of R responses as (R, T) float64, zeros after their ends."""
    tensors = [torch.as_tensor(numbers, dtype=torch.float64) for numbers in responses]
    return pad_sequence(tensors, batch_first=True)


def prepare(rollout: list[Example], old_log_probs: list, base_log_probs: list, values: list,
            z: np.ndarray, cfg: Config) -> tuple[list[Example], dict]:
    """A scored rollout -> examples, each token with its advantage; and means for the log."""
    old = ragged(old_log_probs)  # (R, T)
    value = ragged(values)
    kl = old - ragged(base_log_probs)
    reward = -cfg.kl_coef * kl
    length = torch.tensor([len(numbers) for numbers in values])  # (R,)
    reward[torch.arange(len(z)), length - 1] += torch.as_tensor(z)
    advantage = advantages(reward, value, cfg.gae_lambda)
    inside = advantage[torch.arange(old.shape[1]) < length[:, None]]  # of responses
    whitened = (advantage - inside.mean()) / (inside.std(correction=0) + 1e-8)
    columns = torch.stack([old, whitened, value, advantage + value])  # (4, R, T)
    examples = [example._replace(columns=tuple(columns[:, i, :length[i]].numpy()))
                for i, example in enumerate(rollout)]
    return examples, {"score": float(z.mean()), "kl": float(kl.sum(1).mean()),
                      "objective": float(reward.sum(1).mean()), "tokens": int(length.sum())}


def new_actor(cfg: Config, base: Stage, codec: common.Codec, rm: Stage,
              samples: Samples) -> ActorCritic:
    """The base policy, and a critic with the reward model's weights; where that is a function or
    reads other tokens, with the base policy's weights under a new head."""
    is_function = common.FUNCTION.fullmatch(rm.path)
    if not is_function and reward_model.knows_tokens(codec, common.Codec(rm.path, cfg)):
        load_critic = functools.partial(reward_model.load_classifier, rm.path, torch.float32)
        mean, std = float(samples.rewards.mean()), float(samples.rewards.std())
    else:
        print0("  the critic starts from the base policy with a new head")
        padded = reward_model.padding_codec(base.path, cfg)
        load_critic = functools.partial(reward_model.new_classifier, base.path, padded)
        mean, std = 0.0, 1.0
    model = common.load_for_training(functools.partial(common.load_model, base.path), cfg)
    critic = reward_model.RewardModel(common.load_for_training(load_critic, cfg), cfg)
    return ActorCritic(model, critic, mean, std, cfg)


def roll_out(actor: ActorCritic, codec: common.Codec, ids: list[list[int]], cfg: Config, seed: int,
             cost: Cost) -> tuple[list[str], list[bool], list[Example]]:
    """Responses to a batch of prompts' ids: texts, whether they were cut off, and examples."""
    responses = common.sample(common.sampling_copy(actor.model, cfg), ids, cfg, seed,
                              codec.stop_ids, cost, cfg.temperature, what="rollout")
    examples = []
    for prompt, response in zip(ids, responses):
        tokens = np.array(prompt + response.ids)
        examples.append(Example(tokens, np.arange(len(tokens)) >= len(prompt)))
    texts = [codec.decode(response) for response in responses]
    return texts, [response.truncated for response in responses], examples


def update(policy: torch.nn.Module, actor: ActorCritic, optimizer: Any, schedule: Any,
           examples: list[Example], cfg: Config, seed: int, cost: Cost) -> dict:
    """--ppo_epochs passes over an iteration's examples; returns what to log, means over tokens."""
    statistics = torch.zeros(3, device=common.device())
    loss = value_loss = 0.0
    tokens = 0
    kernel = functools.partial(clipped_surrogate_, temperature=cfg.temperature, clip=cfg.clip,
                               statistics=statistics)
    steps = cfg.ppo_epochs * math.ceil(len(examples) / cfg.batch_size)
    for _, _, indices in common.step_indices(len(examples), cfg.batch_size, seed, steps):
        batch = common.Batch([examples[i] for i in indices], cfg, common.is_padded(actor.model))
        lr = schedule.get_last_lr()[0]
        for micro in batch.micros:
            policy.require_backward_grad_sync = micro is batch.micros[-1]  # DDP: reduce once
            surrogate, value_error = policy(micro, kernel, cfg.clip)
            ((surrogate + cfg.value_coef * value_error) / batch.normaliser).backward()
            loss += surrogate.detach()
            value_loss += value_error.detach()
            cost.add_forward(actor.model, len(micro.input_ids), passes=3)
            cost.add_forward(actor.critic.model, len(micro.input_ids), passes=3)
        grad_norm = torch.nn.utils.clip_grad_norm_(actor.model.parameters(), 1.0)
        critic_grad_norm = torch.nn.utils.clip_grad_norm_(actor.critic.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        tokens += batch.tokens
    share = common.world_size() / tokens  # the log averages over ranks
    approx_kl, clip_fraction, entropy = statistics * share
    return {"loss": loss * share, "value_loss": value_loss * share, "approx_kl": approx_kl,
            "clip_fraction": clip_fraction, "entropy": entropy, "lr": lr, "grad_norm": grad_norm,
            "critic_grad_norm": critic_grad_norm}


def train(cfg: Config, base: Stage, samples: Samples, folder: Path, cost: Cost, rm: Stage,
          prompts: list) -> None:
    """Trains the policy, from the base policy's weights, into the folder."""
    codec = common.Codec(base.path, cfg)
    score = rm.load()
    reference = common.load_policy(base.path, cfg, frozen=True)
    actor = new_actor(cfg, base, codec, rm, samples)
    policy = common.wrap_for_ranks(actor, cfg, "values", "log_probs")
    ids = [codec.prompt(prompt) for prompt in prompts]
    size = cfg.rollout_batch_size
    iterations = cfg.steps or math.ceil(cfg.epochs * len(prompts) / size)
    passes = math.ceil(iterations * size / len(prompts))
    order = np.concatenate([np.random.default_rng((cfg.seed, turn)).permutation(len(prompts))
                            for turn in range(passes)])
    groups = [{"params": list(actor.model.parameters()), "lr": cfg.lr},
              {"params": list(actor.critic.parameters()), "lr": cfg.critic_lr}]
    optimizer = torch.optim.AdamW(groups, eps=1e-5, weight_decay=0.0, fused=True)
    updates = iterations * cfg.ppo_epochs * math.ceil(size / cfg.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / updates)
    print0(f"  {len(prompts):,} prompts; {iterations} iterations of {size} responses")

    def log_probs_of(policy: common.Policy, rollout: list[Example]) -> list[list[float]]:
        log_probs = functools.partial(policy.log_probs, temperature=cfg.temperature)
        return common.each_response_token(log_probs, policy.model, rollout, cfg, cost)

    with common.TrainingRun(folder, policy, optimizer, schedule, iterations, cfg, cost) as run:
        for iteration in range(run.first, iterations):
            batch = order[iteration * size:(iteration + 1) * size]
            seed = (iteration + 2) * 1_000_003 + cfg.seed  # 0: labelling, 1: evaluation
            texts, truncated, rollout = roll_out(actor, codec, [ids[i] for i in batch], cfg, seed,
                                                 cost)
            scores = score([prompts[i] for i in batch], texts, truncated, cost,
                           generated=[True] * len(texts))
            z = samples.z(scores)
            z = np.where(truncated, np.minimum(z, cfg.missing_eos_score), z)
            # by the training forward, not the sampler's: the first ratio is 1, in bfloat16 too
            old_log_probs = log_probs_of(actor, rollout)
            base_log_probs = log_probs_of(reference, rollout)
            values = common.each_response_token(actor.values, actor.critic.model, rollout, cfg,
                                                cost)
            examples, rewards = prepare(rollout, old_log_probs, base_log_probs, values, z, cfg)
            losses = update(policy, actor, optimizer, schedule, examples, cfg, seed % 2**32, cost)
            run.log(iteration, **rewards, **losses, eos_rate=1 - np.mean(truncated))
    common.save_policy(folder, policy, codec, cfg)


def main(cfg: Config) -> None:
    """Every stage; finished ones are used again."""
    judge = reward_model.judge(cfg)
    base = common.base_policy(cfg)
    data = common.read_data(cfg, base)
    rm = reward_model.for_run(cfg, base, data)
    common.require(rm, "PPO scores what it samples: give --reward_model, or --preferences")
    samples = common.labelled_samples(cfg, base, data, rm)
    train_here = functools.partial(train, rm=rm, prompts=data.prompts)
    policy = common.policy_stage(cfg, "ppo", train_here, base, samples, temperature=cfg.temperature)
    common.build_stages(cfg, rm, samples, policy)
    variants = [common.Variant(f"kl {cfg.kl_coef:g}")]
    # samples are not counted: PPO takes only their mean and standard deviation
    common.evaluate(cfg, policy, variants, base, data, rm, samples, judge, cost_of=(rm,))


if __name__ == "__main__":
    common.launch(main, Config)
