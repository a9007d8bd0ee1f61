"""The sampler against transformers' generate: useful tokens a second on prompts of uneven length.

    python benchmarks/sample.py --model SMOLLM2 --prompts PAIRS.jsonl.gz

A useful token is one up to and including a row's EOS.  Both sample at temperature 1 with the whole
vocabulary, from the same prompts; generate gets them in one left-padded batch, as its users write
it.  Then one PPO iteration on the same prompts, whose rollout is this sampler's, phase by phase,
with a critic and a reward model of the policy's size.
"""
from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any, Callable, Iterator, Optional

import numpy as np
import torch

from measure import in_turn, machine, markdown, ratio, record, seconds_of, start

import common
import ppo_baseline
import reward_model
from common import Cost, flag


@dataclass
class Config:
    """What to sample, and how often."""
    model: str = flag(None, "folder or Hub id of a causal language model")
    prompts: str = flag(None, ".jsonl(.gz) with transcripts under `chosen`, or with `prompt`")
    count: int = flag(64, "prompts")
    ppo_count: int = flag(16, "prompts of the PPO iteration")
    new_tokens: int = flag(64, "at most so many for each")
    max_prompt_tokens: int = flag(384, "longer prompts are cut on the left")
    dtypes: list[str] = flag(["fp32", "bf16"], "of fp32, bf16")
    repeats: int = flag(5, "timed calls of each contender")
    out: str = flag("runs/benchmarks/sample.jsonl", "file that a line of results is added to")
    compile: bool = flag(True, "torch.compile our kernels")

    def __post_init__(self) -> None:
        common.require(self.model and self.prompts, "give --model and --prompts")


@contextlib.contextmanager
def unpacked(model: Any) -> Iterator[Any]:
    """The model as transformers itself would call it: its packed attention knows no padding."""
    before = model.config._attn_implementation
    model.set_attn_implementation("sdpa")
    try:
        yield model
    finally:
        model.set_attn_implementation(before)


def generate(model: Any, prompts: list[list[int]], new_tokens: int, eos: Optional[int],
             **more: Any) -> list[list[int]]:
    """transformers' own sampling: each row's new tokens, up to and including its EOS."""
    width, padding = max(map(len, prompts)), eos or 0
    ids = torch.tensor([[padding] * (width - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts],
                        device=model.device)
    how = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, **more}
    with torch.inference_mode(), unpacked(model):
        said = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=new_tokens,
                              eos_token_id=eos, pad_token_id=padding, **how)[:, width:].tolist()
    return [row[:row.index(eos) + 1] if eos in row else row for row in said]


def ppo_phases(actor: ppo_baseline.ActorCritic, reference: Any, score: Callable, codec: Any,
               prompts: list, ids: list[list[int]], cfg: ppo_baseline.Config,
               repeats: int) -> tuple[dict[str, list[float]], ppo_baseline.Rollout]:
    """Seconds of each phase of PPO iterations, the first, which compiles, left out; and what was
    said in the last one."""
    optimizer, schedule = ppo_baseline.make_optimizer(actor, cfg, repeats + 2)
    took: dict[str, list[float]] = {}

    def timed(phase: str, call: Callable, *args: Any) -> Any:
        seconds, result = seconds_of(call, *args)
        took.setdefault(phase, []).append(seconds)
        return result

    def log_probs(examples: list[common.Example]) -> tuple:
        each = common.each_response_token
        return (each(actor.log_probs, actor.model, examples, cfg, Cost()),
                each(common.Policy(reference, cfg).log_probs, reference, examples, cfg, Cost()),
                each(actor.values, actor.critic.model, examples, cfg, Cost()))
    for iteration in range(repeats + 1):
        rollout = timed("rollout", ppo_baseline.roll_out, actor, codec, prompts, ids, cfg,
                        iteration, Cost())
        z = timed("score", score, rollout.prompts, rollout.texts, rollout.truncated, Cost())
        found = timed("log-probs", log_probs, rollout.examples)
        examples, _ = ppo_baseline.prepare(rollout, *found, np.array(z), 0.05, cfg)
        timed("update", ppo_baseline.update, actor, actor, optimizer, schedule, examples, cfg,
              Cost())
    return {phase: seconds[1:] for phase, seconds in took.items()}, rollout


def samples_of_rewards(rewards: list[float]) -> common.Samples:
    """Labelled samples of which only the rewards are asked for."""
    nothing = np.zeros(0)
    return common.Samples(None, np.array(rewards), nothing, nothing, "", None, {})


def main(cfg: Config) -> None:
    """Times both for each dtype."""
    print(machine())
    rows, phases, texts = [], [], common.read_prompts(cfg.prompts)[0][:cfg.count]
    for dtype in cfg.dtypes:
        run = ppo_baseline.Config(
            model=cfg.model, preferences="none", max_response_tokens=cfg.new_tokens, dtype=dtype,
            max_prompt_tokens=cfg.max_prompt_tokens, rollout_batch_size=cfg.ppo_count, ppo_epochs=1,
            batch_size=cfg.ppo_count, steps=None, epochs=1)
        codec, kind = common.Codec(cfg.model, run), common.compute_dtype(run)
        model, eos = common.load_model(cfg.model, kind), codec.tokenizer.eos_token_id
        prompts = codec.prompts(texts)
        tokens: dict[str, list[int]] = {"generate": [], "ours": []}

        def theirs(model=model, prompts=prompts, eos=eos, tokens=tokens) -> None:
            said = generate(model, prompts, cfg.new_tokens, eos)
            tokens["generate"].append(sum(map(len, said)))

        def ours(model=model, prompts=prompts, eos=eos, tokens=tokens, run=run) -> None:
            said = common.sample(model, prompts, run, 0, [eos], Cost())
            tokens["ours"].append(sum(len(r.ids) for r in said))
        seconds, first = in_turn({"generate": theirs, "ours": ours}, cfg.repeats)
        rate = {name: [n / s for n, s in zip(tokens[name][1:], seconds[name])] for name in tokens}
        pace = {name: [1 / r for r in each] for name, each in rate.items()}
        rows.append({"dtype": dtype, "threads": torch.get_num_threads(),
                     "prompt tokens": sum(map(len, prompts)), "longest": max(map(len, prompts)),
                     **{f"{name} tokens/s": f"{np.median(each):.0f}" for name,
                        each in rate.items()}, "ours / generate": ratio(pace, "generate", "ours"),
                     "first call s": f"{first['ours']:.1f}"})
        print(rows[-1], flush=True)

        padded = reward_model.padding_codec(cfg.model, run)
        scorer, critic = (reward_model.RewardModel(reward_model.new_classifier(
            cfg.model, padded, common.device()), kind) for _ in range(2))
        policy = common.load_model(cfg.model)
        actor = ppo_baseline.ActorCritic(policy, critic, samples_of_rewards([-1, 1]), run)
        took, _ = ppo_phases(actor, model, lambda *rows, rm=scorer, codec=padded, run=run:
                             reward_model.score(rm, codec, run, *rows), codec,
                             texts[:cfg.ppo_count], prompts[:cfg.ppo_count], run, cfg.repeats)
        phases.append({"dtype": dtype, "threads": torch.get_num_threads(),
                       **{f"{phase} s": f"{np.median(each):.2f}" for phase, each in took.items()}})
    print("\n" + markdown(rows) + "\n\n" + markdown(phases))
    record("sample", rows + phases, cfg.out)


if __name__ == "__main__":
    start(main, Config)
