"""Bradley-Terry reward model: a scalar head on the base policy, taught by which of two responses people preferred.

    P(chosen > rejected) = sigma(r_c - r_r)
    L = mean over pairs of  -log sigma(r_c - r_r - margin) + centering * (r_c + r_r)^2

(Stiennon et al. 2020, arXiv 2009.01325, equation 1; the margin is Llama 2's, the centering Eisenstein et al.'s, arXiv
2312.09244.)  The score is read at a response's last token, EOS where it has one.  The folder it leaves is an
AutoModelForSequenceClassification with num_labels=1.  Left out: ensembles, and ranks of more than two responses.

    python reward_model.py                                     the toy world, one CPU
    torchrun --nproc_per_node=8 reward_model.py --model MODEL --preferences PAIRS.jsonl --out runs/mine
"""
from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterator, NamedTuple, Optional

import numpy as np
import torch

import common
from common import Cost, Pair, Road, knob, print0


@dataclass
class Config(common.Config):
    """The reward model's own knobs."""
    margin: float = knob(0.0, "how much higher the chosen response must score", of="training")
    centering: float = knob(0.0, "pull of a pair's scores towards 0 (0.01 is usual)", of="training")
    lr: float = knob(1e-5, "peak learning rate; 3 % warm-up, then cosine to 0", toy=2e-3, of="training")
    steps: Optional[int] = knob(None, "optimiser steps, in place of --epochs", toy=300, of="training")
    batch_size: int = knob(64, "preference pairs per optimiser step, all ranks together", toy=16, of="training")

    def __post_init__(self) -> None:
        super().__post_init__()
        common.require(math.isfinite(self.margin), f"--margin must be a finite number, not {self.margin}")
        common.require(0 <= self.centering < math.inf, f"--centering must be 0 or above, not {self.centering}")


@common.compiled
def bradley_terry_(scores: torch.Tensor, margin: float, centering: float) -> torch.Tensor:
    """scores (P, 2), chosen and rejected, become d loss / d scores in place; returns each pair's loss (P,).

    loss = -log sigma(d) + centering * s^2 with d = r_c - r_r - margin, s = r_c + r_r, in float32 (float64 for float64).
    """
    r = scores.to(torch.promote_types(scores.dtype, torch.float32))
    d, s = r[:, 0] - r[:, 1] - margin, r[:, 0] + r[:, 1]
    slope = -torch.sigmoid(-d)                                            # d(-log sigma(d)) / dd
    pull = 2 * centering * s
    scores.copy_(torch.stack([slope + pull, -slope + pull], dim=1))
    return torch.nn.functional.softplus(-d) + centering * s.square()


class RewardModel(torch.nn.Module):
    """A sequence classifier read at chosen positions, its head in float32 whatever the body's dtype."""

    def __init__(self, model: Any, dtype: torch.dtype):
        super().__init__()
        self.model, self.dtype = model, dtype

    def forward(self, input_ids: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Token ids (B, T), padded on the right, and where to read in the flattened (B * T,) -> float32 scores (N,)."""
        b, t = input_ids.shape
        common.count_flops(self.model, b, t, t, 0, passes=3 if torch.is_grad_enabled() else 1)
        with common.autocast(self.dtype):
            hidden = self.model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state  # (B, T, D)
        hidden = hidden.flatten(0, 1)[rows]                                                         # (N, D)
        return hidden.float() @ self.model.score.weight.float()[0]


class EncodedPair(NamedTuple):
    """Token ids of prompt + chosen and of prompt + rejected."""
    chosen: list[int]
    rejected: list[int]


class PairBatch(NamedTuple):
    """What one forward takes: P pairs as 2 P rows, each pair's chosen before its rejected."""
    input_ids: torch.Tensor  # (2 P, T) int64, padded on the right: causal attention needs no mask
    last: torch.Tensor       # (2 P,) int64, where each row's last token stands in the flattened (2 P * T,)
    weight: torch.Tensor     # (P,) float32, the pair's share in the mean; 0 where a rank only keeps the others company
    tokens: int              # real ones, prompts and responses


def prepare(pairs: list[Pair], tokenizer: Any, cfg: Config) -> list[EncodedPair]:
    """Preference pairs -> token ids, prompt and responses cut alike."""
    prompts = common.encode_prompts(tokenizer, [p.prompt for p in pairs], cfg.max_prompt_tokens)
    chosen, rejected = (common.encode_responses(tokenizer, [getattr(p, side) for p in pairs], cfg.max_response_tokens)
                        for side in ("chosen", "rejected"))
    return [EncodedPair(p + c, p + r) for p, c, r in zip(prompts, chosen, rejected)]


def ids_and_last(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids as (B, T), and the place of each row's last token in the flattened (B * T,): (B,)."""
    ids = common.pad_right(rows)
    last = torch.tensor([i * ids.shape[1] + len(row) - 1 for i, row in enumerate(rows)])
    return ids.to(common.device()), last.to(common.device())


def batches(pairs: list[Pair], tokenizer: Any, cfg: Config, first: int = 0) -> Iterator[tuple[int, list[PairBatch]]]:
    """This rank's micro-batches of each step from the `first` on.  A step's loss is the mean over its pairs, all ranks
    together."""
    for at, indices in common.step_indices(len(pairs), cfg, first):
        step = prepare([pairs[i] for i in indices], tokenizer, cfg)
        share = common.world_size() / len(step)  # DDP averages gradients over ranks
        yield at, [PairBatch(*ids_and_last([side for i in hand or [0] for side in step[i]]),
                             weight=torch.full((len(hand or [0]),), share if hand else 0.0, device=common.device()),
                             tokens=sum(len(side) for i in hand for side in step[i]))
                   for hand in common.deal([2 * max(map(len, pair)) for pair in step], cfg.micro_batch_tokens)]


def train(cfg: Config, base: str, folder: Path) -> None:
    """Trains the reward model, from the base policy's weights, into the folder."""
    common.seed_everything(cfg.seed)
    pairs, _ = common.load_pairs(cfg)
    tokenizer = padding_tokenizer(base)
    model = common.read_once(functools.partial(new_classifier, base, tokenizer), cfg)
    if cfg.gradient_checkpointing:
        common.recompute_activations(model)
    reward_model = common.distributed(RewardModel(model.train(), common.compute_dtype(cfg)), cfg)
    steps = common.count_steps(len(pairs), cfg)
    optimizer, schedule = common.make_optimizer(reward_model, cfg, steps)
    common.print_plan(len(pairs), cfg)

    with common.training(folder, reward_model, optimizer, schedule, steps, cfg) as (first, log):
        for step, micros in batches(pairs, tokenizer, cfg, first):
            loss, accuracy, lr = 0.0, 0.0, schedule.get_last_lr()[0]
            for micro in common.accumulate(reward_model, micros):
                scores = reward_model(micro.input_ids, micro.last).view(-1, 2)          # (2 P,) -> (P, 2)
                gradient = scores.detach().clone()
                losses = common.run_kernel(bradley_terry_, gradient, cfg.margin, cfg.centering)     # (P,)
                scores.backward(gradient * micro.weight[:, None])
                loss += losses @ micro.weight
                accuracy += (scores[:, 0] > scores[:, 1]).float() @ micro.weight
            grad_norm = common.update([reward_model], optimizer, schedule, loss)
            log(step, loss=loss, accuracy=accuracy, grad_norm=grad_norm, lr=lr,
                tokens=sum(micro.tokens for micro in micros) * common.world_size())
    common.save_folder(folder, model, tokenizer, cfg, CARD.format(base=base, pairs=len(pairs)))


CARD = """# A Bradley-Terry reward model

Trained from `{base}` on {pairs} preference pairs. The score of a response is read at its last token, EOS:

```python
from transformers import AutoModelForSequenceClassification, AutoTokenizer
model, tokenizer = (kind.from_pretrained("this folder") for kind in (AutoModelForSequenceClassification, AutoTokenizer))
inputs = tokenizer([prompt + response + tokenizer.eos_token], return_tensors="pt", padding=True)
score = model(**inputs).logits[:, 0]
```
"""


def padding_tokenizer(base: str) -> Any:
    """The base policy's tokenizer with a padding token of its own.

    transformers reads a classifier at the last token that is not padding: were padding EOS, it would miss the EOS.
    """
    tokenizer = common.load_tokenizer(base)
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    return tokenizer


def new_classifier(base: str, tokenizer: Any, where: torch.device) -> Any:
    """The base policy's body under a new head, with room for the tokenizer's padding token."""
    from transformers import AutoModelForSequenceClassification
    with common.hub_errors(base, "a causal language model"):
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32,
                                                                   use_safetensors=True)
    common.require(hasattr(model, "score"), f"{base}: its sequence classifier has no `score` head")
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.config.pad_token_id = tokenizer.pad_token_id
    torch.nn.init.normal_(model.score.weight, std=1 / math.sqrt(model.score.in_features + 1))
    return common.without_dropout(model).to(where)


def load_classifier(folder: str, dtype: torch.dtype, where: torch.device) -> Any:
    """A reward model's folder.  Raises BadInput if it is none."""
    from transformers import AutoModelForSequenceClassification
    with common.hub_errors(folder, "a reward model (sequence classification, num_labels=1)"):
        model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=dtype, use_safetensors=True)
    common.require(model.config.num_labels == 1 and hasattr(model, "score"),
                   f"{folder}: not a reward model: it needs a sequence classifier with num_labels=1 and a `score` head")
    return common.without_dropout(model).to(where).eval()


@functools.lru_cache(maxsize=2)
def load_scorer(folder: str, dtype: torch.dtype) -> tuple[RewardModel, Any]:
    """A reward model, ready to score, and its tokenizer."""
    return RewardModel(load_classifier(folder, dtype, common.device()), dtype), common.load_tokenizer(folder)


@torch.inference_mode()
def score(cfg: common.Config, folder: str, prompts: list, responses: list[str], truncated: list[bool]) -> list[float]:
    """The reward model's raw scores, in the rows' order on every rank; a row's score does not depend on its batch."""
    model, tokenizer = load_scorer(folder, common.compute_dtype(cfg))
    rows = [p + r for p, r in zip(common.encode_prompts(tokenizer, prompts, cfg.max_prompt_tokens),
                                  common.encode_responses(tokenizer, responses, cfg.max_response_tokens, truncated))]
    share = range(common.rank(), len(rows), common.world_size())
    found: dict[int, float] = {}
    groups = common.cut_by_tokens([len(rows[i]) for i in share], 4 * cfg.micro_batch_tokens)
    for group in common.progress(groups, "scoring"):
        found.update(zip((share[i] for i in group), model(*ids_and_last([rows[share[i]] for i in group])).tolist()))
    return common.gather_rows(found, len(rows))


def report(cfg: common.Config, folder: str, pairs: list[Pair]) -> dict:
    """Accuracy on held-out pairs: overall, by margin against what sigma(margin) promises, and of length alone."""
    chosen, rejected = (np.array(score(cfg, folder, [p.prompt for p in pairs], [getattr(p, side) for p in pairs],
                                       [False] * len(pairs)))
                        for side in ("chosen", "rejected"))
    margin, right = np.abs(chosen - rejected), chosen > rejected
    longer = np.array([np.sign(len(p.chosen) - len(p.rejected)) / 2 + 0.5 for p in pairs]).mean()
    error = right.std() / math.sqrt(len(pairs))
    print0(f"  held-out pairs: {len(pairs)}, accuracy {right.mean():.3f} ± {error:.3f}; control: "
           f"{'longer' if longer >= 0.5 else 'shorter'} wins {max(longer, 1 - longer):.3f}")
    bins = []
    for low, high in zip((0, 0.5, 1, 2, 4), (0.5, 1, 2, 4, math.inf)):
        inside = (low <= margin) & (margin < high)
        if inside.any():
            bins.append({"margin": [low, high if high < math.inf else None], "pairs": int(inside.sum()),
                         "accuracy": float(right[inside].mean()),
                         "promised": float((1 / (1 + np.exp(-margin[inside]))).mean())})
            print0("    margin {} to {}: {pairs:5} pairs, accuracy {accuracy:.2f}, promised {promised:.2f}".format(
                low, high, **bins[-1]))
    return {"held_out_pairs": len(pairs), "accuracy": float(right.mean()), "longer_wins": float(longer),
            "by_margin": bins}


def built(cfg: common.Config, base: str, own: Optional[Config] = None) -> tuple[str, Cost]:
    """The reward model's folder and cost: --reward_model, or the run's own, trained if missing or trained otherwise.

    `own` holds the training flags that are asked for; without it those that the folder was trained with are kept.
    """
    if cfg.reward_model:
        return cfg.reward_model, Cost()
    folder = Path(cfg.out) / "rm"
    wanted = common.settings(cfg, "data", base=common.policy_fingerprint(base), **common.settings(own, "training")
                             if own else {})
    if not common.is_fresh("reward model", folder / "run.json", wanted):
        own = own or common.other_config(Config, cfg, common.read_record(folder / "run.json").get("settings", {}))
        wanted.update(common.settings(own, "training"))
        with common.new_folder(folder, wanted, own.resume) as work:
            with common.measured() as cost:
                train(own, base, work)
            load_scorer.cache_clear()
            common.write_record(work / "run.json", wanted, cost,
                                report=report(cfg, str(work), common.load_pairs(cfg)[1]))
    return str(folder), Cost(**common.read_record(folder / "run.json")["cost"])


def prerequisites(cfg: common.Config) -> Road:
    """Base policy, reward model and labelled samples, each built where it is missing."""
    base = common.base_policy(cfg)
    judge = functools.partial(score, cfg, cfg.judge) if cfg.judge else None
    if cfg.samples and not (cfg.toy or cfg.preferences or cfg.reward_model):
        print0("no reward model: --samples brings the rewards, and evaluation shows none")
        return Road(base, common.given_samples(cfg, ""), None, None, judge)
    folder, cost = built(cfg, base)
    name, scorer = common.policy_fingerprint(folder), functools.partial(score, cfg, folder)
    samples = (common.given_samples(cfg, name) if cfg.samples else
               common.labelled_samples(cfg, base, name, scorer, cost))
    load_scorer.cache_clear()  # training needs the memory more
    return Road(base, samples, scorer, folder, judge)


def main(cfg: Config) -> None:
    """Trains the run's reward model with the flags that are asked for."""
    common.require(not cfg.reward_model, "--reward_model brings a finished one; leave it away to train one")
    common.require(cfg.toy or bool(cfg.preferences), "a reward model is trained on --preferences")
    folder, _ = built(cfg, common.base_policy(cfg), own=cfg)
    print0(f"  accuracy on held-out pairs {common.read_record(Path(folder) / 'run.json')['report']['accuracy']:.3f}")


if __name__ == "__main__":
    common.launch(main, Config)
