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
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import GPT2TokenizerFast, LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

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
tokenizer = GPT2TokenizerFast().train_new_from_iterator([PROMPT + CHOSEN, PROMPT + REJECTED], 300)
tokenizer.save_pretrained(folder)
torch.manual_seed(0)
LlamaForCausalLM(LlamaConfig(
    vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=2, max_position_embeddings=256,
    eos_token_id=tokenizer.eos_token_id)).save_pretrained(folder)
base = common.Stage(folder, "base", common.Cost())

# %% The reward model reads both replies; its loss raises one score and lowers the other
scores = torch.tensor([0.3, 0.5], requires_grad=True)  # of the chosen and the rejected reply
loss = reward_model.bradley_terry(scores[:1], scores[1:], margin=0.0, centering=0.0)
loss.sum().backward()
print(f"Bradley-Terry: loss {loss.item():.3f}, d loss / d scores {scores.grad.tolist()}")

# %% Scored, the pair is two labelled samples: a reward each, and no longer who beat whom
labelled = Path(folder, "labelled.jsonl")
labelled.write_text("".join(
    json.dumps({"prompt": PROMPT, "response": reply, "reward": reward}) + "\n"
    for reply, reward in ((CHOSEN, 1.1), (REJECTED, -0.7))))


def config(script, **flags):
    """The script's Config for this model and these samples."""
    return script.Config(model=folder, samples=str(labelled), out=folder, eval_prompts=0, lr=1e-3,
                         max_prompt_tokens=64, max_response_tokens=32, held_out=1e-9, **flags)


samples = common.labelled_samples(config(mle_filter), base, None)
print("z of the two:", samples.z(samples.rewards))


# %% What a step of each algorithm does to the log-probs of both replies
def step(cfg, examples, kernel, tagged=(), extra=lambda micro: ()):
    """A gradient step of size 0.1 on the examples; how log p of each reply changed, after its
    `tagged` ids if there are any."""
    codec = common.Codec(folder, cfg)
    (ids, mask), (other, other_mask) = codec.tokenise([PROMPT] * 2, [CHOSEN, REJECTED])
    prompt = codec.prompts([PROMPT])[0]
    replies = [common.Example(np.array([*prompt, *tag, *row[len(prompt):]]),
                              np.array([False] * (len(prompt) + len(tag))
                                              + [True] * (len(row) - len(prompt))))
               for row, tag in zip((ids, other), tagged or ([], []))]
    policy = common.load_policy(folder, cfg)

    def log_p():
        return [float(policy.log_probs(common.collate([reply])).sum()) for reply in replies]
    before = log_p()
    batch = common.Batch(examples, cfg)
    for micro in batch.micros:  # packed: all tokens of all sequences in one row
        loss = policy(micro, kernel, *extra(micro)) / batch.normaliser
        loss.backward()
    print(f"  {len(batch.micros[0].input_ids)} tokens, of which {batch.tokens} are learnt; loss "
          f"{loss.item():.3f}")
    with torch.no_grad():
        for p in policy.parameters():
            p -= 0.1 * p.grad
    change = [after - b for after, b in zip(log_p(), before)]
    print(f"  log p of the chosen reply {change[0]:+.3f}, of the rejected one {change[1]:+.3f}")
    return change


def all_of(examples):
    """Every example once."""
    return [examples.example(i) for i in range(len(examples))]


changes = {}
print("filtering: the best half is kept, the other forgotten")
cfg = config(mle_filter, keep=0.5)
changes["mle_filter"] = step(cfg, all_of(mle_filter.prepare(samples, cfg)), mle_filter.masked_nll_)

# %% RWR keeps both, with weights exp(z / beta)
print("RWR: both, by weight")
cfg = config(rwr, beta=1.0)
examples = all_of(rwr.prepare(samples, cfg))
print("  weights", [round(example.weight, 3) for example in examples])
changes["rwr"] = step(cfg, examples, rwr.weighted_nll_, extra=lambda micro: (micro.weight,))

# %% DT learns both alike, each after a tag that says how good it is
print("DT: both alike, each after its own tag")
cfg = config(dt, condition_dropout=0.0, guidance=[0.0])
codec, z = common.Codec(folder, cfg), samples.z(samples.rewards)
tags = [dt.reward_tag(reward, dt.bin_edges(samples), cfg) for reward in z]
print("  tags", tags)
changes["dt"] = step(cfg, all_of(dt.prepare(samples, codec, cfg)), dt.masked_nll_,
                     [dt.tag_ids(tag, codec) for tag in tags])

# %% PPO samples for itself; were these two its own samples, their advantages would push and pull
print("PPO: what did better than expected up, the other down")
cfg = config(ppo_baseline)
plain = all_of(mle_filter.prepare(samples, config(mle_filter, keep=1.0)))
policy = common.load_policy(folder, cfg)
examples = []
for example, reward in zip(plain, z):
    tokens = int(example.mask.sum())
    earned = torch.tensor([[0.0] * (tokens - 1) + [reward]])  # at the last token; no critic yet
    advantage = ppo_baseline.advantages(earned, torch.zeros_like(earned), cfg.gae_lambda)[0]
    old = policy.log_probs(common.collate([example]))
    examples.append(example._replace(columns=(old.numpy(), advantage.numpy())))
surrogate = functools.partial(ppo_baseline.clipped_surrogate_, temperature=1.0, clip=cfg.clip,
                              entropy_coef=0.0, statistics=torch.zeros(3))
changes["ppo"] = step(cfg, examples, surrogate, extra=lambda micro: micro.columns)
