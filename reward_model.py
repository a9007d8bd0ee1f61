"""Bradley-Terry reward model: a scalar head on the base policy, taught by what people preferred.

    P(chosen > rejected) = sigma(r_c - r_r)
    L = mean over pairs of  -log sigma(r_c - r_r)

(Stiennon et al. 2020, arXiv 2009.01325, equation 1.)  A response is scored at its last token, EOS
or what the chat template writes last.  The folder is an AutoModelForSequenceClassification.  Left
out: margins, centering, rankings of more than two (give their pairs).

    python reward_model.py                                     the toy world, one CPU
    torchrun --nproc_per_node=8 reward_model.py --model MODEL --preferences PAIRS --out runs/mine
"""
from __future__ import annotations

import functools
import math
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Callable, Iterator, Optional

import numpy as np
import torch

import common
from common import Cost, Data, Preference, Stage, flag, print0


@dataclass
class Config(common.Config):
    """The reward model's own flags."""
    batch_size: int = flag(64, "pairs per optimiser step, all ranks together")


TOY = {"batch_size": 16, "lr": 2e-3, "steps": 300}  # defaults in the toy world


def bradley_terry(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """Each pair's loss (P,) from its two scores (P,): scalars, so autograd will do."""
    return -torch.nn.functional.logsigmoid(chosen - rejected)


class RewardModel(torch.nn.Module):
    """A sequence classifier that is read at chosen positions, its head always in float32."""

    def __init__(self, model: Any, cfg: common.Config):
        super().__init__()
        self.model, self.dtype = model, common.compute_dtype(cfg)

    def forward(self, input_ids: torch.Tensor, lengths: list[int],
                rows: torch.Tensor) -> torch.Tensor:
        """Ids (T,) of packed sequences; rows (N,) to read at -> float32 scores (N,)."""
        with common.autocast(self.dtype):
            hidden = common.hidden_states(self.model, input_ids, lengths)               # (T, D)
        return hidden[rows].float() @ self.model.score.weight.float()[0]                # (N,)


def prepare(preferences: list[Preference], codec: common.Codec, folder: Path) -> common.Tokens:
    """Preferences -> the ids of each response after its prompt: chosen, rejected, chosen, ..."""
    def sequences() -> Iterator[tuple]:
        for pair in common.progress(preferences, "tokenising"):
            for response in (pair.chosen, pair.rejected):
                ids = codec.scored(pair.prompt, response)
                yield ids, np.ones(len(ids))
    return common.Tokens(folder / "tokens", sequences)


def read_scores(rm: torch.nn.Module, sequences: list[np.ndarray], cost: Cost,
                passes: int = 1) -> torch.Tensor:
    """The scores (n,) of n sequences of ids, each at its last token that is no padding, as in
    transformers' own forward."""
    model = getattr(rm, "module", rm).model
    padding = model.config.get_text_config().pad_token_id
    lengths = [len(ids) for ids in sequences]
    starts = np.cumsum([0, *lengths[:-1]])
    last = [np.flatnonzero(ids != padding)[-1] for ids in sequences]  # (n,), in each sequence
    cost.add_forward(model, sum(lengths), passes)
    ids = torch.from_numpy(np.concatenate(sequences).astype(np.int64)).to(common.device())  # (T,)
    return rm(ids, lengths, torch.from_numpy(starts + last).to(common.device()))


def micro_batches(tokens: common.Tokens, pairs: np.ndarray, padded: bool,
                  cfg: Config) -> list[tuple[list[np.ndarray], torch.Tensor]]:
    """This rank's micro-batches of a step: the ids of P pairs, chosen, rejected, chosen, ..., and
    each pair's share (P,) of the step's mean."""
    chosen = tokens.lengths[2 * pairs]
    rejected = tokens.lengths[2 * pairs + 1]
    held = 2 * np.maximum(chosen, rejected) if padded else chosen + rejected
    micros = []
    for group in common.shard_micro_batches(held.tolist(), cfg.micro_batch_tokens, padded):
        own = pairs[group] if group else pairs[:1]  # a rank without pairs still joins the forward
        sequences = [tokens[response][0] for i in own for response in (2 * i, 2 * i + 1)]
        share = common.world_size() / len(pairs) if group else 0.0  # DDP averages over ranks
        micros.append((sequences, torch.full((len(own),), share, device=common.device())))
    return micros


def train(cfg: Config, base: Stage, data: Data, folder: Path, cost: Cost) -> dict:
    """Trains the reward model, from the base policy's weights, into the folder."""
    common.require(data.held_out_preferences,
                   "no preference is held out; give more data or a larger --held_out")
    codec = padding_codec(base.path, cfg)
    model = common.load_for_training(functools.partial(new_classifier, base.path, codec), cfg)
    rm = common.wrap_for_ranks(RewardModel(model, cfg), cfg)
    tokens = prepare(data.preferences, codec, folder)
    steps = common.plan_steps(len(data.preferences), cfg)
    optimizer, schedule = common.make_optimizer(rm, cfg.lr, steps)

    with common.TrainingRun(folder, rm, optimizer, schedule, steps, cfg, cost) as run:
        for step, _, indices in common.step_indices(len(data.preferences), cfg.batch_size,
                                                    cfg.seed, steps, run.first):
            loss = accuracy = 0.0
            lr = schedule.get_last_lr()[0]
            micros = micro_batches(tokens, indices, common.is_padded(model), cfg)
            for i, (sequences, share) in enumerate(micros, 1):
                rm.require_backward_grad_sync = i == len(micros)  # DDP: reduce once
                scores = read_scores(rm, sequences, cost, passes=3)                     # (2 P,)
                chosen, rejected = scores.view(-1, 2).unbind(1)                         # (P,) each
                part = bradley_terry(chosen, rejected) @ share
                part.backward()
                loss += part.detach()
                accuracy += common.wins(chosen - rejected) @ share
            grad_norm = torch.nn.utils.clip_grad_norm_(rm.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            run.log(step, loss=loss, accuracy=accuracy, grad_norm=grad_norm, lr=lr)
    card = (f"# A Bradley-Terry reward model\n\nTrained from `{base.path}`.  Load it by "
            "`AutoModelForSequenceClassification`: its logit, read at the last token (EOS, or what "
            "the chat template writes last), is the score.\n")
    measured = report(data.held_out_preferences, functools.partial(score, rm, codec, cfg))
    common.save_folder(folder, model, codec, cfg, card)  # last: it casts the model
    return {"report": measured}


def padding_codec(folder: str, cfg: common.Config) -> common.Codec:
    """The base policy's codec, with a padding token that nothing else uses: transformers reads a
    classifier at the last token that is not padding, and would pass over an EOS used as padding.
    """
    codec = common.Codec(folder, cfg)
    tail = codec.encode(codec.turn_end + codec.turn_tail)
    if codec.tokenizer.pad_token_id in (None, *codec.stop_ids, *tail):
        codec.tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    return codec


def new_classifier(base: str, codec: common.Codec, where: torch.device) -> Any:
    """The base policy's body under a new head, with room for the tokenizer's padding token."""
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
    check_classifier(folder, model)
    return model


def check_classifier(folder: str, model: Any) -> None:
    """Raises BadInput unless the model gives one score, by a head named `score`."""
    common.require(model.config.num_labels == 1 and hasattr(model, "score"),
                   f"{folder}: not a reward model: it needs num_labels=1 and a `score` head")


@torch.no_grad()
def score(rm: torch.nn.Module, codec: common.Codec, cfg: common.Config, prompts: list,
          responses: list[str], truncated: list[bool], cost: Cost,
          generated: Optional[list[bool]] = None) -> list[float]:
    """Raw scores, in the responses' order on every rank; none depends on its batch.  `generated`:
    which responses a policy wrote after the generation prompt; omitted: none."""
    generated = generated or [False] * len(prompts)
    try:
        sequences = list(map(codec.scored, prompts, responses, truncated, generated))
    except common.LeftOut as problem:
        raise common.BadInput(f"{codec.folder}: cannot score samples {problem}") from problem
    padded = common.is_padded(getattr(rm, "module", rm).model)
    budget = common.FORWARD_ONLY * cfg.micro_batch_tokens
    groups = common.shard_micro_batches([len(ids) for ids in sequences], budget, padded)
    scores: dict[int, float] = {}
    for group in common.progress(groups, "scoring"):
        own = [sequences[i] for i in group] if group else sequences[:1]  # to keep in step
        scores.update(zip(group, read_scores(rm, own, cost).tolist()))
    return common.gather_by_index(scores, len(sequences))


def load_scorer(cfg: common.Config, folder: str) -> Callable:
    """A reward model's score(prompts, responses, truncated, cost, generated)."""
    model = load_classifier(folder, common.compute_dtype(cfg), common.device())
    codec = common.Codec(folder, cfg)
    base = common.Codec(cfg.model or folder, cfg)
    same_template = codec.tokenizer.chat_template == base.tokenizer.chat_template
    if not (same_template and knows_tokens(base, codec)):
        # the limits count the base policy's tokens
        codec.cfg = replace(cfg, max_prompt_tokens=2**31, max_response_tokens=2**31)
    scorer = functools.partial(score, RewardModel(model, cfg), codec, cfg)
    if not same_template:
        return lambda *args, generated=None: scorer(*args)  # none continues the base's template
    return scorer


def knows_tokens(base: common.Codec, other: common.Codec) -> bool:
    """Whether all tokens of the base policy's tokenizer have the same ids in the other one."""
    return base.tokenizer.get_vocab().items() <= other.tokenizer.get_vocab().items()


def report(pairs: list[Preference], score: Callable) -> dict:
    """The accuracy on held-out pairs, ties half, and its standard error."""
    prompts, chosen, rejected = zip(*pairs)
    scores = torch.tensor(score(prompts * 2, chosen + rejected, [False] * 2 * len(pairs), Cost()))
    right = common.wins(scores[:len(pairs)] - scores[len(pairs):])                      # (P,)
    accuracy = float(right.mean())
    error = float(right.std(correction=0)) / math.sqrt(len(pairs))
    print0(f"  {len(pairs):,} held-out pairs: accuracy {accuracy:.3f} ± {error:.3f}")
    if accuracy - 2 * error <= 0.5:
        print0("  warning: not clearly better than chance; try more pairs, or a higher --lr")
    return {"pairs": len(pairs), "accuracy": accuracy, "error": error}


def given(cfg: common.Config, spec: str) -> Stage:
    """The stage of a --reward_model or --judge: FILE.py:FUNCTION, or a classifier's folder."""
    from transformers import AutoConfig, AutoModelForSequenceClassification
    function = common.FUNCTION.fullmatch(spec)
    if function:
        scorer = common.load_function(spec)
        settings = {"function": Path(spec).name, "content": common.content_hash(function[1])}
        return Stage(spec, settings, load=lambda: scorer)
    common.Codec(spec, cfg)  # what it refuses is refused before anything is trained
    with common.load_errors(spec, "a sequence classifier"), torch.device("meta"):
        config = AutoConfig.from_pretrained(spec, trust_remote_code=False)
        check_classifier(spec, AutoModelForSequenceClassification.from_config(config))
    content = common.content_hash(spec, common.MODEL_FILES)
    return Stage(spec, {"reward_model": content}, load=functools.partial(load_scorer, cfg, spec))


def for_run(cfg: common.Config, base: Stage, data: Data) -> Optional[Stage]:
    """The reward model: --reward_model, or the run's own, trained on its preferences; None without
    both.  Other scripts use one that exists, or is half trained, whatever its training flags."""
    if cfg.reward_model:
        return given(cfg, cfg.reward_model)
    if not data.preferences:
        print0("no reward model: --samples bring the rewards, and evaluation shows none")
        return None
    folder = Path(cfg.out, "rm")
    if not isinstance(cfg, Config):  # another script's learning rate and steps are its policy's
        values = {f.name: getattr(cfg, f.name) for f in fields(Config)}
        defaults = Config().training_flags() | (TOY if cfg.toy else {})
        record = common.read_record(folder / "run.json")
        record = record or common.read_record(folder.with_name(".rm") / "run.json")  # half trained
        settings = record.get("settings", {})
        values |= {name: settings.get(name, default) for name, default in defaults.items()}
        cfg = Config(**values)
    flags = cfg.training_flags()
    print0("reward model: " + ", ".join(f"{name} {value}" for name, value in flags.items()))
    return Stage(str(folder), {**common.data_settings(cfg), **flags, "base": base.fingerprint,
                               "pairs": len(data.preferences)},  # --samples may hold some out
                 functools.partial(train, cfg, base, data),
                 functools.partial(load_scorer, cfg, str(folder)))


def judge(cfg: common.Config) -> Optional[Stage]:
    """The stage of --judge; in the toy world that of the true reward."""
    spec = cfg.judge or (f"{common.__file__}:gold_reward" if cfg.toy else None)
    return given(cfg, spec) if spec else None


def main(cfg: Config) -> None:
    """Trains the run's reward model with the flags asked for."""
    common.require((cfg.toy or cfg.preferences) and not cfg.reward_model,
                   "a reward model is trained on --preferences, and without --reward_model")
    base = common.base_policy(cfg)
    common.build_stages(cfg, for_run(cfg, base, common.read_data(cfg, base)))


if __name__ == "__main__":
    common.launch(main, Config)
