"""A script of this project with reading.py's gold in place of a reward model: no labeller's noise
and no reward model's mistakes, so that what is left is the method.

    python benchmarks/with_gold.py dt.py --model SMOLLM2 --responses REPLIES.jsonl \
        --reward_model gold --out runs/gold --steps 1000 --max_prompt_tokens 128 \
        --max_response_tokens 64 --temperature 0.7

REPLIES are rows of `prompt`, as messages, and `response`, as reading.py leaves them in the
samples.jsonl of its --out.  Gold labels them, scores what is sampled while the slope is watched,
and evaluates: "reward z" is then gold in standard deviations of the labelled replies.
"""
from __future__ import annotations

import functools
import importlib
import sys
from pathlib import Path
from typing import Any, Callable
from unittest import mock

import measure  # noqa: F401  puts the scripts on the path
from reading import as_trained, gold

import common
import reward_model

SCRIPTS = ("mle_filter.py", "rwr.py", "dt.py")  # PPO's critic needs a reward model's weights


def load_gold(cfg: Any) -> Callable:
    """score(prompts, responses, truncated, cost): gold of responses, cut as training cuts them."""
    codec, most = common.Codec(cfg.model, cfg), cfg.max_response_tokens

    def score(prompts: list, responses: list[str], truncated: list[bool], cost: Any) -> list[float]:
        return [gold(prompt, text, was_cut or cut) for prompt, was_cut, (text, cut)
                in zip(prompts, truncated, as_trained(responses, codec, most))]
    return score


def gold_stage(cfg: Any, base: common.Stage) -> common.Stage:
    """In place of reward_model.for_run()."""
    return common.Stage("gold", "gold", common.Cost(), functools.partial(load_gold, cfg))


def main(script: str, flags: list[str]) -> None:
    """Runs the script with these flags."""
    if script not in SCRIPTS:
        sys.exit(f"with_gold.py: first comes a script, one of {', '.join(SCRIPTS)}")
    module = importlib.import_module(Path(script).stem)
    with mock.patch.object(reward_model, "for_run", gold_stage):
        common.launch(module.main, module.Config, flags)


if __name__ == "__main__":
    main((sys.argv[1:] or [""])[0], sys.argv[2:])
