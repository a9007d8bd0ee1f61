"""How far apart the forms of DT's reward tag are to a model before any training.

    python benchmarks/tags.py --model SMOLLM2 --prompts PROMPTS.jsonl  # a minute on 2 cores

The model answers some prompts; each reply is read again behind a lower and behind a higher tag.
The table has the mean KL divergence of the next token's distributions, nats a token: over all of a
reply, at its start, and from the 16th token.  A model has to learn what a tag means; where it
hardly sees which one is there, it first has to learn to look.
"""
from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch

from measure import machine, markdown, record, start

import common
import dt
from common import flag

FORMATS = {"decimal": 0.01, "digit": 0.5}  # and --reward_step
ASKED = [(-1.0, 1.5), (0.5, 1.0)]  # z, lower and higher


@dataclass
class Config:
    """Which model, and what to ask it for."""
    model: str = flag(None, "folder or Hub id of a causal language model")
    prompts: str = flag(None, ".jsonl(.gz) with transcripts under `chosen`, or with `prompt`")
    count: int = flag(32, "prompts")
    new_tokens: int = flag(40, "of each reply, at most")
    max_prompt_tokens: int = flag(128, "longer prompts are cut on the left")
    out: str = flag("runs/benchmarks/tags.jsonl", "file that a line of results is added to")

    def __post_init__(self) -> None:
        common.require(bool(self.model and self.prompts), "give --model and --prompts")


@torch.inference_mode()
def next_tokens(model: torch.nn.Module, prompt: list[int], reply: list[int]) -> torch.Tensor:
    """log p of every token at each place of the reply: (t, V)."""
    ids = torch.tensor([prompt + reply], device=common.device())
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=len(reply) + 1).logits
    return logits[0, :-1].float().log_softmax(-1)


def divergence(model: torch.nn.Module, low: list[int], high: list[int],
               reply: list[int]) -> np.ndarray:
    """KL(behind the higher tag || behind the lower one) at each place of the reply, nats (t,)."""
    lower, higher = (next_tokens(model, prompt, reply) for prompt in (low, high))
    return (higher.exp() * (higher - lower)).sum(-1).cpu().numpy()


def main(cfg: Config) -> None:
    """Prints and records a row a format."""
    print(machine())
    run = common.Config(model=cfg.model, prompts=cfg.prompts, reward_model="none", temperature=0.7,
                        dtype="fp32", max_prompt_tokens=cfg.max_prompt_tokens,
                        max_response_tokens=cfg.new_tokens)
    codec, model = common.Codec(cfg.model, run), common.load_model(cfg.model)
    prompts = codec.prompts(common.read_prompts(cfg.prompts)[0][:cfg.count])
    replies = common.sample(model, prompts, run, 0, codec.stop_ids, common.Cost())
    rows = []
    for (form, step), pair in itertools.product(FORMATS.items(), ASKED):
        asked = dt.Config(model=cfg.model, prompts=cfg.prompts, reward_model="none",
                          reward_format=form, reward_step=step)
        tags = [dt.reward_tag(z, np.zeros(7), asked) for z in pair]
        behind = [[prompt + dt.tag_ids(tag, codec) for prompt in prompts] for tag in tags]
        apart = [divergence(model, low, high, reply.ids)
                 for low, high, reply in zip(*behind, replies)]
        rows.append({"format": form, "tags": "`{}` `{}`".format(*tags),
                     **{where: f"{np.concatenate([each[part] for each in apart]).mean():.4f}"
                        for where, part in (("all tokens", slice(None)), ("the first 3", slice(3)),
                                            ("from the 16th", slice(15, None)))}})
    print(markdown(rows))
    record("tags", rows, cfg.out)


if __name__ == "__main__":
    start(main, Config)
