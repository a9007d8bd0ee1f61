"""One preference pair becomes a gradient, in each of the four algorithms.

    python benchmarks/one_pair.py

A script in notebook form: an editor that knows `# %%` runs it cell by cell.  The model is a tiny
Llama with random weights, so that it takes seconds, and every step is taken by the scripts' own
functions.
"""
# %% A question, the reply that people preferred, and the other one
from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path

import torch

from compare import tiny_base  # which puts the scripts on the path

import common
import dt
import mle_filter
import ppo_baseline
import reward_model
import rwr

PROMPT = "\n\nHuman: Where do otters live?\n\nAssistant:"
CHOSEN, REJECTED = " They live in rivers.", " Who cares."

common.quieten_libraries()
folder = tempfile.mkdtemp()
base = tiny_base(f"{folder}/base", [PROMPT + CHOSEN, PROMPT + REJECTED])

# %% The reward model reads both replies; its loss raises one score and lowers the other
scores = torch.tensor([0.3, 0.5], requires_grad=True)  # of the chosen and the rejected reply
loss = reward_model.bradley_terry(scores[:1], scores[1:])
loss.sum().backward()
print(f"Bradley-Terry: loss {loss.item():.3f}, d loss / d scores {scores.grad.tolist()}")

# %% Scored, the pair is two labelled samples: a reward each, and no longer who beat whom
labelled = Path(folder, "samples.jsonl")
labelled.write_text("".join(
    json.dumps({"prompt": PROMPT, "response": reply, "reward": reward}) + "\n"
    for reply, reward in ((CHOSEN, 1.1), (REJECTED, -0.7))))


def config(script, **flags):
    """The script's Config for this model and these samples."""
    return script.Config(model=base.path, samples=str(labelled), out=folder, lr=1e-3,
                         max_prompt_tokens=64, max_response_tokens=32, **flags)


samples = common.read_samples(labelled, config(mle_filter), base)
z = samples.z(samples.rewards)
print("z of the two:", z)


# %% What a step of each algorithm does to the log-probs of both replies
def all_of(examples):
    """Every example once."""
    return [examples.example(i) for i in range(len(examples))]


def step(cfg, examples, kernel, tags=([], []), columns=lambda micro: ()):
    """A gradient step of size 0.1 on the examples; how log p of each reply changed, each after its
    tag."""
    replies = all_of(common.Examples(samples.tokens, tag=lambda i, epoch: tags[i]))
    policy = common.load_policy(base.path, cfg)

    def log_p():
        return [float(policy.log_probs(common.collate([reply]), 1.0).sum()) for reply in replies]
    before = log_p()
    batch = common.Batch(examples, cfg, common.is_padded(policy.model))
    for micro in batch.micros:  # all tokens of all sequences, end to end
        loss = policy(micro, kernel, *columns(micro)) / batch.normaliser
        loss.backward()
    print(f"  {batch.tokens} tokens are learnt; loss {loss.item():.3f}")
    with torch.no_grad():
        for p in policy.parameters():
            p -= 0.1 * p.grad
    chosen, rejected = (after - b for after, b in zip(log_p(), before))
    print(f"  log p of the chosen reply {chosen:+.3f}, of the rejected one {rejected:+.3f}")


print("filtering: the best half is kept, the other forgotten")
cfg = config(mle_filter, keep=0.5)
step(cfg, all_of(mle_filter.prepare(samples, cfg)), mle_filter.masked_nll_)

# %% RWR keeps both, with weights exp(z / beta)
print("RWR: both, by weight")
cfg = config(rwr, beta=1.0)
examples = all_of(rwr.prepare(samples, cfg))
print("  weights", [round(example.weight, 3) for example in examples])
step(cfg, examples, rwr.weighted_nll_, columns=lambda micro: (micro.weight,))

# %% DT learns both alike, each after a tag that says how good it is
print("DT: both alike, each after its own tag")
cfg = config(dt, condition_dropout=0.0, guidance=[0.0])
codec = common.Codec(base.path, cfg)
tags = [dt.reward_tag(reward, cfg) for reward in z]
print("  tags", tags)
step(cfg, all_of(dt.prepare(samples, codec, cfg)), dt.masked_nll_,
     [codec.continuation(tag) for tag in tags])

# %% PPO samples for itself; were these two its own samples, their advantages would push and pull
print("PPO: what did better than expected up, the other down")
cfg = config(ppo_baseline)
plain = all_of(mle_filter.prepare(samples, config(mle_filter, keep=1.0)))
policy = common.load_policy(base.path, cfg)
examples = []
for example, reward in zip(plain, z):
    tokens = int(example.mask.sum())
    earned = torch.tensor([[0.0] * (tokens - 1) + [reward]])  # at the last token; no critic yet
    advantage = ppo_baseline.advantages(earned, torch.zeros_like(earned), cfg.gae_lambda)[0]
    old = policy.log_probs(common.collate([example]), 1.0)
    examples.append(example._replace(columns=(old.numpy(), advantage.numpy())))
surrogate = functools.partial(ppo_baseline.clipped_surrogate_, temperature=1.0, clip=cfg.clip,
                              statistics=torch.zeros(3))
step(cfg, examples, surrogate, columns=lambda micro: micro.columns)
