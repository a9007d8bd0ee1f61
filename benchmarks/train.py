"""Training tokens a second of the whole step, ours against TRL's SFTTrainer, same pairs, same
batch.

    python benchmarks/train.py --model SMOLLM2 --preferences PAIRS.jsonl.gz    # needs trl, datasets

A turn is an epoch over the same sequences (prompt and chosen response, the loss on the response); a
token is a real one, prompt or response.  TRL runs with its defaults and with its best settings
here: no gradient checkpointing, batches grouped by length.  Loading the model, tokenisation and
TRL's set-up are not counted.
"""
from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Callable

import numpy as np
import torch

from measure import in_turn, machine, markdown, ratio, record, seconds_of, start, synchronize

import common
import mle_filter
from common import Cost, Examples, flag

BEST = {"gradient_checkpointing": False, "train_sampling_strategy": "group_by_length"}


@dataclass
class Config:
    """What to train on, and how often."""
    model: str = flag(None, "folder or Hub id of a causal language model")
    preferences: str = flag(None, "preference pairs, as the trainers take them")
    sequences: int = flag(32, "sequences of an epoch")
    batch_size: int = flag(8, "sequences per optimiser step")
    max_prompt_tokens: int = flag(256, "longer prompts are cut on the left")
    max_response_tokens: int = flag(128, "longer responses are cut on the right")
    micro_batch_tokens: int = flag(8192, "ours: tokens that one forward may hold")
    dtypes: list[str] = flag(["bf16", "fp32"], "of bf16, fp32")
    repeats: int = flag(5, "timed epochs of each contender")
    out: str = flag("runs/benchmarks/train.jsonl", "file that a line of results is added to")
    compile: bool = flag(True, "torch.compile our kernels")

    def __post_init__(self) -> None:
        common.require(self.model and self.preferences, "give --model and --preferences")


def ours(policy: torch.nn.Module, examples: Examples, run: common.Config) -> Callable[[], Cost]:
    """An epoch as mle_filter.py trains it, its metrics written too; returns its seconds and
    FLOPs."""
    steps = common.count_steps(len(examples), run)
    optimizer, schedule = common.make_optimizer(policy, run, 100 * steps)
    run = replace(run, save_every=0)

    def epoch() -> Cost:
        with tempfile.TemporaryDirectory() as folder:
            cost = Cost()
            cost.seconds, _ = seconds_of(one_pass, Path(folder), cost)
            return cost

    def one_pass(folder: Path, cost: Cost) -> None:
        with common.TrainingRun(folder, policy, optimizer, schedule, steps, run, cost) as training:
            for step, batch in training.steps(examples):
                loss, lr = 0.0, schedule.get_last_lr()[0]
                for micro in batch.micros:
                    part = policy(micro, mle_filter.masked_nll_) / batch.normaliser
                    part.backward()
                    loss += part.detach()
                grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
                if grad_norm.isfinite():
                    optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                training.log(step, loss=loss, grad_norm=grad_norm, lr=lr, tokens=batch.tokens)
    return epoch


def theirs(model: Any, tokenizer: Any, examples: Examples, run: common.Config, dtype: str,
           **settings: Any) -> Callable[[], float]:
    """An epoch of TRL's SFTTrainer over the same ids; returns the seconds from its first step to
    its last."""
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
    each = [examples.example(i) for i in range(len(examples))]
    data = Dataset.from_list([{"input_ids": e.ids.tolist(), "completion_mask": e.mask.tolist()}
                              for e in each])
    arguments = SFTConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=run.batch_size, max_length=None,
        num_train_epochs=1, bf16=dtype == "bf16", use_cpu=not torch.cuda.is_available(),
        report_to=[], save_strategy="no", disable_tqdm=True, logging_strategy="no",
        completion_only_loss=True, **settings)
    trainer = SFTTrainer(model=model, args=arguments, train_dataset=data, callbacks=[clock],
                         processing_class=tokenizer)

    def epoch() -> float:
        trainer.train()
        return clock.seconds
    return epoch


def main(cfg: Config) -> None:
    """Times the contenders for each dtype."""
    try:
        import datasets, trl  # noqa: E401, F401
    except ImportError as problem:
        raise common.BadInput(
            f"this needs its peer: pip install trl datasets ({problem})") from None
    from transformers import AutoModelForCausalLM
    print(machine())
    rows = []
    for dtype in cfg.dtypes:
        run = common.Config(
            model=cfg.model, preferences=cfg.preferences, dtype=dtype, batch_size=cfg.batch_size,
            max_prompt_tokens=cfg.max_prompt_tokens, micro_batch_tokens=cfg.micro_batch_tokens,
            max_response_tokens=cfg.max_response_tokens)
        codec, pairs = common.Codec(cfg.model, run), common.load_preferences(run)[0][:cfg.sequences]
        sequences = codec.tokenise([p.prompt for p in pairs], [p.responses[0] for p in pairs])
        examples = Examples(common.Tokens(Path(tempfile.mkdtemp()), lambda s=sequences: s))
        epoch = ours(common.load_policy(cfg.model, run), examples, run)
        epochs = {"ours": lambda epoch=epoch: epoch().seconds}
        for name, more in (("trl", {}), ("trl, best", BEST)):
            model = AutoModelForCausalLM.from_pretrained(cfg.model, dtype=torch.float32)
            epochs[name] = theirs(model, codec.tokenizer, examples, run, dtype, **more)
        inner: dict[str, list[float]] = {name: [] for name in epochs}
        in_turn({name: (lambda name=name, inner=inner, epochs=epochs:
                        inner[name].append(epochs[name]())) for name in epochs}, cfg.repeats)
        seconds = {name: each[1:] for name, each in inner.items()}
        tokens = sum(len(ids) for ids, _ in sequences)
        rates = {f"{name} tokens/s": f"{tokens / np.median(s):.0f}" for name, s in seconds.items()}
        rows.append({"dtype": dtype, "threads": torch.get_num_threads(), "tokens": tokens, **rates,
                     **{f"{name} / ours": ratio(seconds, name, "ours")
                        for name in seconds if name != "ours"}})
        print(rows[-1], flush=True)
    print("\n" + markdown(rows))
    record("train", rows, cfg.out)


if __name__ == "__main__":
    start(main, Config)
