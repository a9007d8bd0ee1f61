"""Training tokens a second of the whole step, ours against TRL's SFTTrainer, same pairs, same batch size.

    python benchmarks/train.py --model SMOLLM2 --preferences PAIRS.jsonl.gz            # needs trl and datasets

A turn is an epoch over the same sequences (prompt and chosen response, the loss on the response); a token is a real
one, prompt or response.  TRL runs with its defaults and with its best settings here: no gradient checkpointing, batches
grouped by length.  Loading the model, tokenisation and TRL's set-up are not counted.
"""
from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from typing import Any, Callable

import numpy as np
import torch

from measure import in_turn, machine, markdown, ratio, record, synchronize

import common
import mle_filter
from common import Example, knob


@dataclass
class Config:
    """What to train on, and how often."""
    model: str = knob(None, "folder or Hub id of a causal language model")
    preferences: str = knob(None, "preference pairs, as the trainers take them")
    sequences: int = knob(32, "sequences of an epoch")
    batch_size: int = knob(8, "sequences per optimiser step")
    max_prompt_tokens: int = knob(256, "longer prompts are cut on the left")
    max_response_tokens: int = knob(128, "longer responses are cut on the right")
    micro_batch_tokens: int = knob(8192, "ours: tokens that one forward may hold")
    dtypes: list[str] = knob(["bf16", "fp32"], "of bf16, fp32")
    repeats: int = knob(5, "timed epochs of each contender")
    out: str = knob("runs/benchmarks/train.jsonl", "file that a line of results is added to")
    compile: bool = knob(True, "torch.compile our kernels")

    def __post_init__(self) -> None:
        common.require(bool(self.model and self.preferences), "give --model and --preferences")


def ours(examples: list[Example], run: common.Config) -> Callable[[], float]:
    """An epoch of this project's step; returns its seconds."""
    policy = common.load_policy(run.model, run)
    optimizer, schedule = common.make_optimizer(policy, run, 1000)

    def epoch() -> float:
        synchronize()
        start = time.perf_counter()
        for _, batch in common.batches(examples, run):
            for micro in common.accumulate(policy, batch.micros):
                loss = policy(micro, mle_filter.masked_nll_, micro.targets, micro.mask) / batch.normaliser
                loss.backward()
            common.update([policy], optimizer, schedule, loss)
        synchronize()
        return time.perf_counter() - start
    return epoch


def theirs(examples: list[Example], run: common.Config, dtype: str, **settings: Any) -> Callable[[], float]:
    """An epoch of TRL's SFTTrainer over the same token ids; returns the seconds from its first step to its last."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Clock(TrainerCallback):
        def on_step_begin(self, args, state, control, **more):
            if state.global_step == 0:
                synchronize()
                self.start = time.perf_counter()

        def on_step_end(self, args, state, control, **more):
            synchronize()
            self.seconds = time.perf_counter() - self.start
    clock = Clock()
    data = Dataset.from_list([{"input_ids": e.ids, "completion_mask": [0] * e.prompt_length + [1] * e.response_tokens}
                              for e in examples])
    arguments = SFTConfig(output_dir=tempfile.mkdtemp(), per_device_train_batch_size=run.batch_size, num_train_epochs=1,
                          max_length=None, bf16=dtype == "bf16", use_cpu=not torch.cuda.is_available(), report_to=[],
                          save_strategy="no", disable_tqdm=True, logging_strategy="no", completion_only_loss=True,
                          **settings)
    trainer = SFTTrainer(model=common.load_model(run.model), args=arguments, train_dataset=data, callbacks=[clock],
                         processing_class=common.load_tokenizer(run.model))

    def epoch() -> float:
        trainer.train()
        return clock.seconds
    return epoch


def main(cfg: Config) -> None:
    """Times the contenders for each dtype."""
    try:
        import datasets, trl  # noqa: E401, F401
    except ImportError as problem:
        raise common.BadInput(f"this benchmark needs its peer: pip install trl datasets ({problem})") from problem
    print(machine())
    rows = []
    for dtype in cfg.dtypes:
        run = common.Config(model=cfg.model, preferences=cfg.preferences, dtype=dtype, batch_size=cfg.batch_size,
                            max_prompt_tokens=cfg.max_prompt_tokens, max_response_tokens=cfg.max_response_tokens,
                            micro_batch_tokens=cfg.micro_batch_tokens)
        tokenizer, pairs = common.load_tokenizer(cfg.model), common.load_preferences(run)[0][:cfg.sequences]
        prompts = common.encode_prompts(tokenizer, [p.prompt for p in pairs], cfg.max_prompt_tokens)
        responses = common.encode_responses(tokenizer, [p.responses[0] for p in pairs], cfg.max_response_tokens)
        examples = [Example(p + r, len(p)) for p, r in zip(prompts, responses)]
        epochs = {"ours": ours(examples, run), "trl": theirs(examples, run, dtype),
                  "trl, best": theirs(examples, run, dtype, gradient_checkpointing=False,
                                      train_sampling_strategy="group_by_length")}
        inner: dict[str, list[float]] = {name: [] for name in epochs}
        in_turn({name: (lambda name=name: inner[name].append(epochs[name]())) for name in epochs}, cfg.repeats)
        seconds = {name: each[1:] for name, each in inner.items()}
        tokens = sum(len(e.ids) for e in examples)
        rows.append({"dtype": dtype, "threads": torch.get_num_threads(), "tokens": tokens,
                     **{f"{name} tokens/s": f"{tokens / np.median(each):.0f}" for name, each in seconds.items()},
                     **{f"{name} / ours": ratio(seconds, name, "ours") for name in seconds if name != "ours"}})
        print(rows[-1], flush=True)
    print("\n" + markdown(rows))
    record("train", rows, cfg.out)


if __name__ == "__main__":
    common.launch(main, Config)
