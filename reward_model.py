"""Bradley-Terry reward model: a scalar head on the base policy, taught by what people preferred.

    P(better > worse) = sigma(r_b - r_w)
    L = mean over prompts of the mean over their pairs of  -log sigma(r_b - r_w - margin)
                                                           + centering (r_b + r_w)^2

A prompt with K ranked responses has K (K - 1) / 2 pairs, and each response is read once; chosen and
rejected are K = 2.  (Stiennon et al. 2020, arXiv 2009.01325, equation 1; K > 2: Ouyang et al. 2022,
arXiv 2203.02155, equation 1; the margin is Llama 2's, the centering Eisenstein et al.'s, arXiv
2312.09244.)  The score is read at a response's last token, EOS, or what the chat template writes
last.  The folder it leaves is an AutoModelForSequenceClassification with num_labels=1.

    python reward_model.py                                     the toy world, one CPU
    torchrun --nproc_per_node=8 reward_model.py --model MODEL --preferences PAIRS --out runs/mine
"""
from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Callable, Iterator, NamedTuple, Optional

import numpy as np
import torch

import common
from common import Cost, Ranking, Stage, flag, print0


@dataclass
class Config(common.Config):
    """The reward model's own flags."""
    margin: float = flag(0.0, "how much higher the chosen response must score", "[-1000, 1000]",
                         stage="training")
    centering: float = flag(0.0, "pull of a pair's scores towards 0 (0.01 is usual)", "[0, inf)",
                            stage="training")
    lr: float = flag(1e-5, "peak learning rate; 3 % warm-up, then cosine to 0", "(0, 1000]",
                     toy=2e-3, stage="training")
    steps: Optional[int] = flag(None, "optimiser steps, in place of --epochs", "[1, inf)", toy=300,
                                stage="training")
    batch_size: int = flag(64, "ranked prompts per optimiser step, all ranks together", "[1, inf)",
                           toy=16, stage="training")


def bradley_terry(better: torch.Tensor, worse: torch.Tensor, margin: float,
                  centering: float) -> torch.Tensor:
    """Each pair's loss (P,) from its two scores (P,): scalars, so autograd will do."""
    return (-torch.nn.functional.logsigmoid(better - worse - margin)
            + centering * (better + worse).square())


class RewardModel(torch.nn.Module):
    """A sequence classifier read at chosen positions, its head in float32 whatever the body's."""

    def __init__(self, model: Any, dtype: torch.dtype):
        super().__init__()
        self.model, self.dtype = model, dtype

    def forward(self, input_ids: torch.Tensor, lengths: list[int],
                rows: torch.Tensor) -> torch.Tensor:
        """Ids (T,) of packed sequences; rows (N,) to read at -> float32 scores (N,)."""
        with torch.autocast(common.device().type, self.dtype,
                            enabled=self.dtype != torch.float32):
            hidden = common.hidden_states(self.model, input_ids, lengths)               # (T, D)
        return hidden[rows].float() @ self.model.score.weight.float()[0]                # (N,)


class Pairs(NamedTuple):
    """What one forward takes: R responses, each after its prompt, packed, and P pairs of them."""
    input_ids: torch.Tensor  # (T,) int64
    lengths: list[int]       # (R,), of prompt and response
    last: torch.Tensor       # (R,) int64, where each one is read
    better: torch.Tensor     # (P,) int64, of the R
    worse: torch.Tensor      # (P,) int64
    weight: torch.Tensor     # (P,) float32, a pair's share of the step's mean over prompts


def prepare(rankings: list[Ranking], codec: common.Codec, folder: Path) -> common.Tokens:
    """Ranked responses -> the ids of each after its prompt, ranking by ranking, best first."""
    texts = [(ranking.prompt, text) for ranking in rankings for text in ranking.responses]

    def sequences() -> Iterator[tuple]:
        for start in common.progress(range(0, len(texts), 4096), "tokenising"):
            yield from codec.tokenise(*zip(*texts[start:start + 4096]), whole=True)
        codec.say_cuts()
    return common.Tokens(folder / "tokens", sequences)


def packed(sequences: list[np.ndarray], padding: Optional[int]) -> tuple:
    """Ids (T,), lengths, and where each sequence is read: at its last token that is no padding, as
    transformers' own forward does."""
    lengths = [len(ids) for ids in sequences]
    last = [end - 1 - int(np.argmax(ids[::-1] != (-1 if padding is None else padding)))
            for ids, end in zip(sequences, np.cumsum(lengths))]
    ids = torch.from_numpy(np.concatenate(sequences).astype(np.int64))
    return ids.to(common.device()), lengths, torch.tensor(last, device=common.device())


def collate(groups: list[list[np.ndarray]], share: float, padding: Optional[int]) -> Pairs:
    """Encoded rankings as tensors; `share` is what each prompt counts in the mean."""
    pairs, weight, start = [], [], 0
    for responses in groups:  # best first: (better, worse)
        own = list(itertools.combinations(range(start, start + len(responses)), 2))
        pairs += own
        weight += [share / len(own)] * len(own)
        start += len(responses)
    better, worse = torch.tensor(pairs, device=common.device()).T
    return Pairs(*packed(list(itertools.chain(*groups)), padding), better, worse,
                 torch.tensor(weight, device=common.device()))


def micro_batches(tokens: common.Tokens, spans: list[range], padding: Optional[int],
                  cfg: Config) -> list[Pairs]:
    """This rank's micro-batches of a step over rankings; a prompt's responses stay together."""
    lengths = [len(span) * int(tokens.lengths[span].max()) for span in spans]
    share = common.world_size() / len(spans)  # DDP averages gradients over ranks
    return [collate([[tokens[response][0] for response in spans[i]] for i in which or [0]],
                    share if which else 0.0, padding)
            for which in common.group_by_token_budget(lengths, cfg.forward_tokens, over_ranks=True)]


def train(cfg: Config, base: Stage, folder: Path, cost: Cost) -> Callable:
    """Trains the reward model, from the base policy's weights, into the folder.

    Returns a function that measures it on held-out preferences, once the folder is in place.
    """
    rankings, held_out = common.load_preferences(cfg)
    codec = padding_codec(base.folder, cfg)
    model = common.load_for_training(functools.partial(new_classifier, base.folder, codec), cfg)
    rm = common.wrap_for_ranks(RewardModel(model, common.compute_dtype(cfg)), cfg)
    tokens, padding = prepare(rankings, codec, folder), codec.tokenizer.pad_token_id
    ends = np.cumsum([0] + [len(ranking.responses) for ranking in rankings])
    steps = common.count_steps(len(rankings), cfg)
    optimizer, schedule = common.make_optimizer(rm, cfg, steps)
    common.print_plan(len(rankings), cfg)

    with common.TrainingRun(folder, rm, optimizer, schedule, steps, cfg, cost) as run:
        for step, _, indices in common.step_indices(len(rankings), cfg, steps, run.first):
            loss, accuracy = 0.0, 0.0
            lr = schedule.get_last_lr()[0]
            spans = [range(ends[i], ends[i + 1]) for i in indices]  # each one's responses in tokens
            micros = micro_batches(tokens, spans, padding, cfg)
            for micro in micros:
                rm.require_backward_grad_sync = micro is micros[-1]  # DDP: reduce once
                scores = rm(micro.input_ids, micro.lengths, micro.last)                 # (R,)
                better, worse = scores[micro.better], scores[micro.worse]               # (P,) each
                part = bradley_terry(better, worse, cfg.margin, cfg.centering) @ micro.weight
                part.backward()
                loss += part.detach()
                accuracy += (better > worse).float() @ micro.weight
                attended = sum(n * n for n in micro.lengths)
                cost.add_forward(model, len(micro.input_ids), attended, 0, 3)
            grad_norm = torch.nn.utils.clip_grad_norm_(rm.parameters(), 1.0)
            if grad_norm.isfinite():  # else the step is skipped, on all ranks alike
                optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            run.log(step, loss=loss, accuracy=accuracy, grad_norm=grad_norm, lr=lr)
    card = CARD.format(base=base.folder, prompts=len(rankings))
    common.save_folder(folder, model, codec, cfg, card)
    return lambda: {"report": report(cfg, str(folder), held_out)}


CARD = """# A Bradley-Terry reward model

Trained from `{base}` on the ranked responses to {prompts} prompts. A response is scored at EOS, or
at the last token that the chat template writes:

```python
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
model = AutoModelForSequenceClassification.from_pretrained("this folder")
tokenizer = AutoTokenizer.from_pretrained("this folder")
reply = tokenizer.encode(response, add_special_tokens=False)
ids = tokenizer.encode(prompt) + reply + [tokenizer.eos_token_id]
# of chat messages, the reply among them:
# ids = tokenizer.apply_chat_template(messages, return_dict=False)
score = model(torch.tensor([ids])).logits[0, 0]
```
"""


def padding_codec(folder: str, cfg: common.Config) -> common.Codec:
    """The base policy's codec, its tokenizer with a padding token that nothing else uses.

    transformers reads a classifier at the last token that is not padding: were padding EOS, it
    would miss the EOS.
    """
    codec = common.Codec(folder, cfg)
    if codec.tokenizer.pad_token_id in (None, *codec.stop_ids, *codec.turn_tail):
        codec.tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    return codec


def new_classifier(base: str, codec: common.Codec, where: torch.device) -> Any:
    """The base policy's body under a new head, with room for the tokenizer's padding token."""
    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, AutoConfig
    with common.load_errors(base, "a causal language model"):
        config = AutoConfig.from_pretrained(base, trust_remote_code=False)
    common.require(type(config) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
                   f"{base}: transformers has no sequence classifier for {config.model_type}, so "
                   "no reward model can be trained from it; give --reward_model, of any family, or "
                   "labelled --samples")
    heads = ("score.", "lm_head.", "embed_out.", "output_projection.")
    model = load_classifier(base, torch.float32, where, num_labels=1, heads=heads)
    if len(codec.tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(codec.tokenizer), mean_resizing=False)
    for config in (model.config, model.config.get_text_config()):  # the latter nested, in some
        config.pad_token_id = codec.tokenizer.pad_token_id
    torch.nn.init.normal_(model.score.weight, std=1 / math.sqrt(model.score.in_features + 1))
    return model


def load_classifier(folder: str, dtype: torch.dtype, where: torch.device, **more: Any) -> Any:
    """A reward model's folder.  Raises BadInput if it is none."""
    model = common.load_model(folder, dtype, where, "AutoModelForSequenceClassification", **more)
    common.require(model.config.num_labels == 1 and hasattr(model, "score"),
                   f"{folder}: not a reward model: it needs a sequence classifier with "
                   "num_labels=1 and a `score` head")
    return model


@torch.no_grad()
def score(model: RewardModel, codec: common.Codec, cfg: common.Config, prompts: list,
          responses: list[str], truncated: list[bool], cost: Cost) -> list[float]:
    """Raw scores, in the responses' order on every rank; none depends on its batch."""
    sequences = [ids for ids, _ in codec.tokenise(prompts, responses, truncated, whole=True)]
    padding, found = model.model.config.get_text_config().pad_token_id, {}
    budget = common.FORWARD_ONLY * cfg.forward_tokens
    groups = common.group_by_token_budget(list(map(len, sequences)), budget, over_ranks=True)
    for group in common.progress(groups, "scoring"):
        ids, lengths, last = packed([sequences[i] for i in group or [0]], padding)  # keep in step
        cost.add_forward(model.model, len(ids), sum(n * n for n in lengths), 0)
        found.update(zip(group, model(ids, lengths, last).tolist()))
    return common.gather_by_index(found, len(sequences))


def load_scorer(cfg: common.Config, folder: str) -> Callable:
    """Loads a reward model, sharded where training is: score(prompts, responses, truncated, cost).
    """
    dtype, codec = common.compute_dtype(cfg), common.Codec(folder, cfg)
    if common.is_sharded(cfg):
        load = functools.partial(load_classifier, folder, torch.float32)
        model = common.load_for_training(load, cfg).requires_grad_(False)
        rm = common.wrap_for_ranks(RewardModel(model, dtype), cfg)
    else:
        rm = RewardModel(load_classifier(folder, dtype, common.device()), dtype)
    return functools.partial(score, rm, codec, cfg)


def report(cfg: common.Config, folder: str, rankings: list[Ranking]) -> dict:
    """Accuracy on held-out preferences, and that of length alone; each prompt counts alike."""
    texts = [(ranking.prompt, text, False) for ranking in rankings for text in ranking.responses]
    scores = iter(load_scorer(cfg, folder)(*map(list, zip(*texts)), Cost()))
    by_prompt, pairs = [], 0
    for ranking in rankings:
        read = [(next(scores), len(text)) for text in ranking.responses]
        gaps = [np.subtract(*pair) for pair in itertools.combinations(read, 2)]
        by_prompt.append(common.wins(gaps).mean(axis=0))  # a tie is half right
        pairs += len(gaps)
    accuracy, longer = np.mean(by_prompt, axis=0).tolist()
    error = float(np.std(by_prompt, axis=0)[0]) / math.sqrt(len(by_prompt))
    print0(f"  held-out pairs: {pairs} of {len(rankings)} prompts, accuracy {accuracy:.3f} ± "
           f"{error:.3f}; control: {'longer' if longer >= 0.5 else 'shorter'} wins "
           f"{max(longer, 1 - longer):.3f}")
    if accuracy - 2 * error <= 0.5:
        print0("  warning: not clearly better than chance; give it more pairs, more --epochs or a "
               "higher --lr (a model of 100M weights needs about 1e-4)")
    return {"held_out_pairs": pairs, "held_out_prompts": len(rankings), "accuracy": accuracy,
            "error": error, "longer_wins": longer}


def for_run(cfg: common.Config, base: Stage) -> Optional[Stage]:
    """The reward model: --reward_model's, or the run's own, trained unless an equal one is there.

    None where --samples brings the rewards and there are no preferences to train one on.  Its
    training flags are reward_model.py's, of this launch or of the one that trained it.
    """
    if cfg.reward_model:
        folder = cfg.reward_model
        built = common.read_record(Path(folder) / "run.json").get("settings")  # by this project
        return Stage(folder, common.fingerprint(built) if built else common.content_hash(folder),
                     Cost(), functools.partial(load_scorer, cfg, folder))
    if cfg.samples and not (cfg.toy or cfg.preferences):
        print0("no reward model: --samples brings the rewards, and evaluation shows none")
        return None
    before = common.read_record(Path(cfg.out) / "rm" / "run.json").get("settings", {})
    own = cfg if isinstance(cfg, Config) else for_other_script(cfg, before)
    wanted = {**common.settings(cfg, "data"), **common.settings(own, "training"),
              "base": base.fingerprint}
    stage = common.build_stage(own, "rm", wanted, functools.partial(train, own, base))
    return stage._replace(load_scorer=functools.partial(load_scorer, cfg, stage.folder))


def for_other_script(cfg: common.Config, before: dict) -> Config:
    """The Config of another script's run: its shared flags, training flags from `before`."""
    own = {f.name for f in fields(Config) if f.metadata["help"].stage == "training"}
    shared = {f.name: getattr(cfg, f.name) for f in fields(common.Config) if f.name not in own}
    kept = {name: value for name, value in before.items() if name in own}
    return Config(**{**(common.toy_defaults(Config) if cfg.toy else {}), **shared, **kept})


def judge(cfg: common.Config) -> Optional[Callable]:
    """A function that loads --judge's scorer; None without --judge."""
    return functools.partial(load_scorer, cfg, cfg.judge) if cfg.judge else None


def main(cfg: Config) -> None:
    """Trains the run's reward model with the flags asked for."""
    common.require((cfg.toy or cfg.preferences) and not cfg.reward_model,
                   "a reward model is trained on --preferences, and without --reward_model")
    for_run(cfg, common.base_policy(cfg))


if __name__ == "__main__":
    common.launch(main, Config)
