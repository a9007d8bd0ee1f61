"""The sampler against transformers' generate: useful tokens a second on prompts of uneven length.

    python benchmarks/sample.py --model SMOLLM2 --prompts PAIRS.jsonl.gz

A useful token is one up to and including a row's EOS.  Both sample at temperature 1 with the whole vocabulary, from the
same prompts; generate gets them in one left-padded batch, as its users write it.
"""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from measure import in_turn, machine, markdown, ratio, record

import common
from common import knob


@dataclass
class Config:
    """What to sample, and how often."""
    model: str = knob(None, "folder or Hub id of a causal language model")
    prompts: str = knob(None, ".jsonl(.gz) with transcripts under `chosen`, or with `prompt`")
    count: int = knob(64, "prompts")
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


def main(cfg: Config) -> None:
    """Times both for each dtype."""
    print(machine())
    rows = []
    for dtype in cfg.dtypes:
        run = common.Config(model=cfg.model, preferences="none", max_response_tokens=cfg.new_tokens, dtype=dtype,
                            max_prompt_tokens=cfg.max_prompt_tokens)
        model, tokenizer = common.load_sampler(cfg.model, run)
        prompts = common.encode_prompts(tokenizer, common.read_prompts(cfg.prompts)[:cfg.count], cfg.max_prompt_tokens)
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
    print("\n" + markdown(rows))
    record("sample", rows, cfg.out)


if __name__ == "__main__":
    common.launch(main, Config)
