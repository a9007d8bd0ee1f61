"""The sampler against transformers' generate: useful tokens a second on prompts of uneven length.

    python benchmarks/sample.py --model SMOLLM2 --prompts PAIRS.jsonl.gz

A useful token is one up to and including a row's EOS.  Both sample at temperature 1 with the whole vocabulary, from the
same prompts; generate gets them in one left-padded batch, as its users write it.  Then one PPO iteration on the same
prompts, whose rollout is this sampler's, phase by phase, with a critic and a reward model of the policy's size.
"""
from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Callable

import numpy as np
import torch

from measure import in_turn, machine, markdown, ratio, record, synchronize

import common
import ppo_baseline
import reward_model
from common import knob


@dataclass
class Config:
    """What to sample, and how often."""
    model: str = knob(None, "folder or Hub id of a causal language model")
    prompts: str = knob(None, ".jsonl(.gz) with transcripts under `chosen`, or with `prompt`")
    count: int = knob(64, "prompts")
    ppo_count: int = knob(16, "prompts of the PPO iteration")
    new_tokens: int = knob(64, "at most so many for each")
    max_prompt_tokens: int = knob(384, "longer prompts are cut on the left")
    dtypes: list[str] = knob(["fp32", "bf16"], "of fp32, bf16")
    repeats: int = knob(5, "timed calls of each contender")
    out: str = knob("runs/benchmarks/sample.jsonl", "file that a line of results is added to")
    compile: bool = knob(True, "torch.compile our kernels")

    def __post_init__(self) -> None:
        common.require(bool(self.model and self.prompts), "give --model and --prompts")


def generate(model, tokenizer, prompts: list[list[int]], cfg: Config) -> int:
    """transformers' own sampling; returns the number of useful tokens."""
    width = max(map(len, prompts))
    ids = torch.tensor([[tokenizer.eos_token_id] * (width - len(p)) + p for p in prompts], device=common.device())
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=common.device())
    with torch.inference_mode():
        said = model.generate(input_ids=ids, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                              max_new_tokens=cfg.new_tokens, pad_token_id=tokenizer.eos_token_id)[:, width:]
    ended = (said == tokenizer.eos_token_id).cumsum(1)
    return int((ended - (said == tokenizer.eos_token_id).long() == 0).sum())


def ours(model, prompts: list[list[int]], cfg: Config, run: common.Config) -> int:
    """This project's sampler; returns the number of useful tokens."""
    return sum(len(r.ids) for r in common.sample(model, prompts, run, seed=0))


def ppo_phases(cfg: Config, dtype: str) -> dict:
    """Median seconds of each phase of a PPO iteration, the first, which compiles, left out."""
    run = ppo_baseline.Config(model=cfg.model, preferences="none", max_response_tokens=cfg.new_tokens, dtype=dtype,
                              max_prompt_tokens=cfg.max_prompt_tokens, rollout_batch_size=cfg.ppo_count,
                              ppo_epochs=1, batch_size=cfg.ppo_count)
    model, tokenizer = common.load_sampler(cfg.model, run, trained=True)
    reference = common.load_model(cfg.model, common.compute_dtype(run))
    scorer, critic = (reward_model.RewardModel(reward_model.new_classifier(cfg.model, tokenizer, common.device()),
                                               common.compute_dtype(run)) for _ in range(2))
    samples = common.Samples([], np.zeros(0), 0.0, 1.0, "", None, "", {})
    actor = ppo_baseline.ActorCritic(model, critic, samples, run)
    optimizer, schedule = ppo_baseline.make_optimizer(actor, run, cfg.repeats + 2)
    prompts = common.read_prompts(cfg.prompts, lambda prompt: True)[:cfg.ppo_count]
    ids = common.encode_prompts(tokenizer, prompts, cfg.max_prompt_tokens)
    took: dict[str, list[float]] = {}

    def timed(phase: str, call: Callable, *args: Any) -> Any:
        synchronize()
        start = time.perf_counter()
        result = call(*args)
        synchronize()
        took.setdefault(phase, []).append(time.perf_counter() - start)
        return result

    @torch.inference_mode()
    def score(examples: list[common.Example]) -> np.ndarray:
        groups = common.cut_by_tokens([len(e.ids) for e in examples], common.FORWARD_ONLY * run.micro_batch_tokens)
        return np.concatenate([scorer(*reward_model.end_to_end([examples[i].ids for i in group])).cpu().numpy()
                               for group in groups])
    for iteration in range(cfg.repeats + 1):
        rollout = timed("rollout", ppo_baseline.roll_out, actor, tokenizer, prompts, ids, run, iteration)
        z = timed("score", score, rollout.examples)
        base = timed("reference", common.response_log_probs, reference, rollout.examples, run)
        values = timed("values", common.each_response_token, actor.values, rollout.examples, run)
        examples, _ = timed("advantages", ppo_baseline.prepare, rollout, base, values, z, 0.05, run)
        timed("update, one pass", ppo_baseline.update, actor, actor, optimizer, schedule, examples, run)
    return {"dtype": dtype, "threads": torch.get_num_threads(),
            **{f"{phase} s": f"{np.median(each[1:]):.2f}" for phase, each in took.items()}}


def main(cfg: Config) -> None:
    """Times both for each dtype."""
    print(machine())
    rows = []
    for dtype in cfg.dtypes:
        run = common.Config(model=cfg.model, preferences="none", max_response_tokens=cfg.new_tokens, dtype=dtype,
                            max_prompt_tokens=cfg.max_prompt_tokens)
        model, tokenizer = common.load_sampler(cfg.model, run)
        texts = common.read_prompts(cfg.prompts, lambda prompt: True)[:cfg.count]
        prompts = common.encode_prompts(tokenizer, texts, cfg.max_prompt_tokens)
        tokens: dict[str, list[int]] = {"generate": [], "ours": []}
        calls = {"generate": lambda: tokens["generate"].append(generate(model, tokenizer, prompts, cfg)),
                 "ours": lambda: tokens["ours"].append(ours(model, prompts, cfg, run))}
        seconds, first = in_turn(calls, cfg.repeats)
        rate = {name: [n / s for n, s in zip(tokens[name][1:], seconds[name])] for name in calls}
        pace = {name: [1 / r for r in each] for name, each in rate.items()}
        rows.append({"dtype": dtype, "threads": torch.get_num_threads(), "prompt tokens": sum(map(len, prompts)),
                     "longest": max(map(len, prompts)),
                     **{f"{name} tokens/s": f"{np.median(each):.0f}" for name, each in rate.items()},
                     "ours / generate": ratio(pace, "generate", "ours"), "first call s": f"{first['ours']:.1f}"})
        print(rows[-1], flush=True)
    phases = [ppo_phases(cfg, dtype) for dtype in cfg.dtypes]
    print("\n" + markdown(rows) + "\n\n" + markdown(phases))
    record("sample", rows + phases, cfg.out)


if __name__ == "__main__":
    common.launch(main, Config)
