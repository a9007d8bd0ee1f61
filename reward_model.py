"""Bradley-Terry reward model: a scalar head on the base policy, taught by which of two responses people preferred.

    P(better > worse) = sigma(r_b - r_w)
    L = mean over prompts of the mean over their pairs of  -log sigma(r_b - r_w - margin) + centering * (r_b + r_w)^2

A prompt with K ranked responses has K (K - 1) / 2 pairs, and each response is read once; chosen and rejected are K = 2.
(Stiennon et al. 2020, arXiv 2009.01325, equation 1; K > 2: Ouyang et al. 2022, arXiv 2203.02155, equation 1; the margin
is Llama 2's, the centering Eisenstein et al.'s, arXiv 2312.09244.)  The score is read at a response's last token, EOS
where it has one.  The folder it leaves is an AutoModelForSequenceClassification with num_labels=1.  No ensembles.

    python reward_model.py                                     the toy world, one CPU
    torchrun --nproc_per_node=8 reward_model.py --model MODEL --preferences PAIRS.jsonl --out runs/mine
"""
from __future__ import annotations

import functools
import gc
import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterator, NamedTuple, Optional

import numpy as np
import torch

import common
from common import Cost, Ranking, Road, knob, print0


@dataclass
class Config(common.Config):
    """The reward model's own knobs."""
    margin: float = knob(0.0, "how much higher the chosen response must score", of="training")
    centering: float = knob(0.0, "pull of a pair's scores towards 0 (0.01 is usual)", of="training")
    lr: float = knob(1e-5, "peak learning rate; 3 % warm-up, then cosine to 0", toy=2e-3, of="training")
    steps: Optional[int] = knob(None, "optimiser steps, in place of --epochs", toy=300, of="training")
    batch_size: int = knob(64, "ranked prompts per optimiser step, all ranks together", toy=16, of="training")

    def __post_init__(self) -> None:
        super().__post_init__()
        common.require(math.isfinite(self.margin), f"--margin must be a finite number, not {self.margin}")
        common.require(0 <= self.centering < math.inf, f"--centering must be 0 or above, not {self.centering}")


@common.compiled
def bradley_terry_(scores: torch.Tensor, signs: torch.Tensor, weight: torch.Tensor, margin: float,
                   centering: float) -> torch.Tensor:
    """scores (R,) of responses become d loss / d scores in place; returns each pair's loss (P,).

    loss = weight * (-log sigma(d) + centering * s^2) with d = r_better - r_worse - margin, s = r_better + r_worse, in
    float32 (float64 for float64).  A pair's row of signs (P, R) is 1 at its better response, -1 at its worse, else 0.
    """
    r = scores.to(torch.promote_types(scores.dtype, torch.float32))
    signs = signs.to(r.dtype)                                             # (P, R)
    d, s = signs @ r - margin, signs.abs() @ r                            # (P,) each
    slope = -torch.sigmoid(-d) * weight                                   # d loss / d d
    pull = 2 * centering * s * weight                                     # d loss / d s
    scores.copy_(signs.T @ slope + signs.abs().T @ pull)
    return weight * (torch.nn.functional.softplus(-d) + centering * s.square())


class RewardModel(torch.nn.Module):
    """A sequence classifier read at chosen positions, its head in float32 whatever the body's dtype."""

    def __init__(self, model: Any, dtype: torch.dtype):
        super().__init__()
        self.model, self.dtype = model, dtype

    def forward(self, input_ids: torch.Tensor, lengths: list[int], rows: torch.Tensor) -> torch.Tensor:
        """Token ids (T,) of sequences of these lengths, end to end; rows (N,) to read at -> float32 scores (N,)."""
        with common.autocast(self.dtype):
            hidden = common.hidden_states(self.model, input_ids, lengths,
                                          passes=3 if torch.is_grad_enabled() else 1)               # (T, D)
        return hidden[rows].float() @ self.model.score.weight.float()[0]                            # (N,)


class RankingBatch(NamedTuple):
    """What one forward takes: R responses, each behind its prompt, end to end, and the P pairs that are compared."""
    input_ids: torch.Tensor  # (T,) int64
    lengths: list[int]       # (R,), of prompt and response
    last: torch.Tensor       # (R,) int64, where each one's last token stands
    signs: torch.Tensor      # (P, R) float32, 1 at a pair's better response, -1 at its worse
    weight: torch.Tensor     # (P,) float32, a pair's share in the mean; 0 where a rank only keeps the others company
    tokens: int              # real ones, prompts and responses


def prepare(rankings: list[Ranking], tokenizer: Any, cfg: Config) -> list[list[list[int]]]:
    """Ranked responses -> for each prompt the token ids of prompt and response, best first, all cut alike."""
    prompts = common.encode_prompts(tokenizer, [ranking.prompt for ranking in rankings], cfg.max_prompt_tokens)
    responses = iter(common.encode_responses(tokenizer, [text for ranking in rankings for text in ranking.responses],
                                             cfg.max_response_tokens))
    return [[prompt + next(responses) for _ in ranking.responses] for prompt, ranking in zip(prompts, rankings)]


def end_to_end(rows: list[list[int]]) -> tuple[torch.Tensor, list[int], torch.Tensor]:
    """Token ids as (T,), the rows' lengths, and where each row's last token stands: (R,)."""
    lengths = [len(row) for row in rows]
    ids, last = torch.tensor([token for row in rows for token in row]), torch.tensor(lengths).cumsum(0) - 1
    return ids.to(common.device()), lengths, last.to(common.device())


def collate(rankings: list[list[list[int]]], share: float) -> RankingBatch:
    """Encoded rankings as tensors; `share` is what each prompt counts in the mean."""
    pairs, weight, start = [], [], 0
    for rows in rankings:
        own = list(itertools.combinations(range(start, start + len(rows)), 2))  # best first: (better, worse)
        pairs, weight, start = pairs + own, weight + [share / len(own)] * len(own), start + len(rows)
    signs = torch.zeros(len(pairs), start)                                      # (P, R)
    for row, (better, worse) in zip(signs, pairs):
        row[better], row[worse] = 1, -1
    rows = [row for rows in rankings for row in rows]
    return RankingBatch(*end_to_end(rows), signs.to(common.device()), torch.tensor(weight, device=common.device()),
                        tokens=sum(map(len, rows)) if share else 0)


def batches(rankings: list[Ranking], tokenizer: Any, cfg: Config,
            first: int = 0) -> Iterator[tuple[int, list[RankingBatch]]]:
    """This rank's micro-batches of each step from the `first` on; a prompt's responses stay together.  A step's loss is
    the mean over its prompts, all ranks together."""
    for at, indices in common.step_indices(len(rankings), cfg, first):
        step = prepare([rankings[i] for i in indices], tokenizer, cfg)
        share = common.world_size() / len(step)  # DDP averages gradients over ranks
        hands = common.deal([len(rows) * max(map(len, rows)) for rows in step], cfg.micro_batch_tokens)
        yield at, [collate([step[i] for i in hand], share) if hand else collate(step[:1], 0.0) for hand in hands]


def train(cfg: Config, base: str, folder: Path) -> None:
    """Trains the reward model, from the base policy's weights, into the folder."""
    common.seed_everything(cfg.seed)
    rankings, _ = common.load_preferences(cfg)
    tokenizer = padding_tokenizer(base)
    model = common.read_once(functools.partial(new_classifier, base, tokenizer), cfg)
    common.check_lengths(base, model, cfg)
    if cfg.gradient_checkpointing:
        common.recompute_activations(model)
    reward_model = common.distributed(RewardModel(model.train(), common.compute_dtype(cfg)), cfg)
    steps = common.count_steps(len(rankings), cfg)
    optimizer, schedule = common.make_optimizer(reward_model, cfg, steps)
    common.print_plan(len(rankings), cfg)

    with common.training(folder, reward_model, optimizer, schedule, steps, cfg) as (first, log):
        for step, micros in batches(rankings, tokenizer, cfg, first):
            loss, accuracy, lr = 0.0, 0.0, schedule.get_last_lr()[0]
            for micro in common.accumulate(reward_model, micros):
                scores = reward_model(micro.input_ids, micro.lengths, micro.last)                   # (R,)
                gradient = scores.detach().clone()
                loss += common.run_kernel(bradley_terry_, gradient, micro.signs, micro.weight, cfg.margin,
                                          cfg.centering).sum()
                accuracy += (micro.signs @ scores.detach() > 0).float() @ micro.weight
                scores.backward(gradient)
            grad_norm = common.update([reward_model], optimizer, schedule, loss)
            log(step, loss=loss, accuracy=accuracy, grad_norm=grad_norm, lr=lr,
                tokens=sum(micro.tokens for micro in micros) * common.world_size())
    common.save_folder(folder, model, tokenizer, cfg, CARD.format(base=base, prompts=len(rankings)))


CARD = """# A Bradley-Terry reward model

Trained from `{base}` on the ranked responses to {prompts} prompts. A response is scored at its last token, EOS:

```python
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
model, tokenizer = (kind.from_pretrained("this folder") for kind in (AutoModelForSequenceClassification, AutoTokenizer))
ids = tokenizer.encode(prompt) + tokenizer.encode(response, add_special_tokens=False) + [tokenizer.eos_token_id]
# of chat messages: ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False) + ...
score = model(torch.tensor([ids])).logits[0, 0]
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
    return common.without_padding(common.without_dropout(model).to(where))


def load_classifier(folder: str, dtype: torch.dtype, where: torch.device) -> Any:
    """A reward model's folder.  Raises BadInput if it is none."""
    from transformers import AutoModelForSequenceClassification
    with common.hub_errors(folder, "a reward model (sequence classification, num_labels=1)"):
        model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=dtype, use_safetensors=True)
    common.require(model.config.num_labels == 1 and hasattr(model, "score"),
                   f"{folder}: not a reward model: it needs a sequence classifier with num_labels=1 and a `score` head")
    return common.without_padding(common.without_dropout(model).to(where)).eval()


@functools.lru_cache(maxsize=2)
def load_scorer(folder: str, dtype: torch.dtype) -> tuple[RewardModel, Any]:
    """A reward model, ready to score, and its tokenizer."""
    return RewardModel(load_classifier(folder, dtype, common.device()), dtype), common.load_tokenizer(folder)


@torch.no_grad()
def score(cfg: common.Config, folder: str, prompts: list, responses: list[str], truncated: list[bool]) -> list[float]:
    """The reward model's raw scores, in the rows' order on every rank; a row's score does not depend on its batch."""
    model, tokenizer = load_scorer(folder, common.compute_dtype(cfg))
    common.check_lengths(folder, model.model, cfg)
    rows = [p + r for p, r in zip(common.encode_prompts(tokenizer, prompts, cfg.max_prompt_tokens),
                                  common.encode_responses(tokenizer, responses, cfg.max_response_tokens, truncated))]
    share = range(common.rank(), len(rows), common.world_size())
    found: dict[int, float] = {}
    groups = common.cut_by_tokens([len(rows[i]) for i in share], common.FORWARD_ONLY * cfg.micro_batch_tokens)
    for group in common.progress(groups, "scoring"):
        found.update(zip((share[i] for i in group), model(*end_to_end([rows[share[i]] for i in group])).tolist()))
    return common.gather_rows(found, len(rows))


def report(cfg: common.Config, folder: str, rankings: list[Ranking]) -> dict:
    """Accuracy on held-out preferences: overall, by margin against what sigma(margin) promises, of length alone.

    Each prompt counts alike, however many pairs it has.
    """
    rows = [(ranking.prompt, text) for ranking in rankings for text in ranking.responses]
    scores = iter(score(cfg, folder, *zip(*rows), [False] * len(rows)))
    margins, longer, weight, by_prompt = [], [], [], []
    for ranking in rankings:
        pairs = list(itertools.combinations([(next(scores), len(text)) for text in ranking.responses], 2))
        own = [better - worse for (better, _), (worse, _) in pairs]
        margins += own
        by_prompt.append(np.mean(_wins(own)))
        longer += [better - worse for (_, better), (_, worse) in pairs]
        weight += [1 / len(pairs)] * len(pairs)
    margin, right, weight = np.abs(margins), _wins(margins), np.array(weight)
    accuracy, longer = float(np.mean(by_prompt)), float(np.average(_wins(longer), weights=weight))
    error = float(np.std(by_prompt)) / math.sqrt(len(by_prompt))
    print0(f"  held-out pairs: {len(margin)} of {len(rankings)} prompts, accuracy {accuracy:.3f} ± {error:.3f}; "
           f"control: {'longer' if longer >= 0.5 else 'shorter'} wins {max(longer, 1 - longer):.3f}")
    if accuracy - 2 * error <= 0.5:
        print0("  warning: not clearly better than chance; give it more pairs, more --epochs or a higher --lr (a model "
               "of 100M weights needs about 1e-4)")
    bins = []
    for low, high in zip((0, 0.5, 1, 2, 4), (0.5, 1, 2, 4, math.inf)):
        inside = (low <= margin) & (margin < high)
        if inside.any():
            bins.append({"margin": [low, high if high < math.inf else None], "pairs": int(inside.sum()),
                         "accuracy": float(np.average(right[inside], weights=weight[inside])),
                         "promised": float(np.average(1 / (1 + np.exp(-margin[inside])), weights=weight[inside]))})
            print0("    margin {} to {}: {pairs:5} pairs, accuracy {accuracy:.2f}, promised {promised:.2f}".format(
                low, high, **bins[-1]))
    return {"held_out_pairs": len(margin), "held_out_prompts": len(rankings), "accuracy": accuracy,
            "error": error, "longer_wins": longer, "by_margin": bins}


def _wins(differences: list) -> np.ndarray:
    """1 where a difference is above 0, 1/2 where it is 0, else 0."""
    return np.sign(differences) / 2 + 0.5


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
            gc.collect()  # a sharded model is full of cycles
            common.write_record(work / "run.json", wanted, cost,
                                report=report(cfg, str(work), common.load_preferences(cfg)[1]))
            load_scorer.cache_clear()  # the folder is about to be renamed
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
