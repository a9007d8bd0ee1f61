"""The promises this project makes, each guarded by a test of that name.  Offline, on tiny models, in a few minutes.

    python -m pytest test_all.py
"""
import ast
import functools
import gc
import gzip
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import textwrap
import time
import tracemalloc
import weakref
from pathlib import Path
from unittest import mock

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the same promises on every machine, and more ranks than it has GPUs

import numpy as np
import pytest
import torch

import common
import dt
import mle_filter
import ppo_baseline
import reward_model
import rwr
from common import BadInput, Example, Sample, Samples

common.PADDED_BELOW = 0  # the models here are small ones, and stand for large ones
HERE = Path(__file__).parent
V, D = 97, 16


# ------------------------------------------------------------------------------------------------------ fixtures


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """A tiny run of the whole road, made by dt.py through the command line: (folder, what it printed)."""
    out = tmp_path_factory.mktemp("run") / "toy"
    script("reward_model.py", "--out", out, "--steps", "20")
    return out, script("dt.py", *TINY, "--out", out, "--steps", "8", "--target", "-1", "none", "q99").stdout


TINY = ["--eval_prompts", "12", "--batch_size", "8", "--samples_per_prompt", "1"]


def script(name, *args, status=0, env=None):
    """Runs a script in its own process; checks the exit status and that nothing ended in a traceback."""
    done = subprocess.run([sys.executable, HERE / name, *map(str, args)], capture_output=True, text=True,
                          env={**os.environ, "HF_HUB_OFFLINE": "1", **(env or {})}, timeout=280)
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr or status == 0
    return done


def config(module=common, **flags):
    """A script's Config with the toy world's defaults."""
    return module.Config(**{**common.toy_defaults(module.Config), **flags})


def tiny_model(bias=False, tied=True, dtype=torch.float64, **more):
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=V, hidden_size=D, intermediate_size=24, num_hidden_layers=2,
                                         num_attention_heads=2,
                                         tie_word_embeddings=tied, initializer_range=0.3, eos_token_id=0,
                                         **more)).to(dtype)
    if bias:
        model.lm_head.bias = torch.nn.Parameter(torch.randn(V, dtype=dtype))
    return common.without_padding(model.eval())


def logits_of(model, batch):
    """The logits (T, V) of a micro-batch's sequences, each read by itself."""
    return torch.cat([model(ids[None]).logits[0] for ids in batch.input_ids.split(batch.lengths)])


def examples(n=7, seed=0):
    """Random examples of uneven length, reward and weight."""
    rng = np.random.default_rng(seed)
    return [Example(rng.integers(1, V, p + r).tolist(), int(p), float(z), 1.0)
            for p, r, z in zip(rng.integers(1, 9, n), rng.integers(1, 12, n), rng.normal(size=n))]


@pytest.fixture(scope="session")
def tokenizer(run):
    return common.load_tokenizer(str(run[0] / "base"))


def samples_of(rewards, prompts=None):
    rows = [Sample(prompts[i] if prompts else f"Human: {i}", f" reply {i}", float(r), "given", False) for i,
            r in enumerate(rewards)]
    rewards = np.array(rewards, dtype=np.float64)
    return Samples(rows, rewards, float(rewards.mean()), float(rewards.std()), "x", "rm", "rm", {})


# ------------------------------------------------------------------------------------------- fused kernels and driver


def plain_nll(logits, targets, mask):
    return torch.where(mask, torch.nn.functional.cross_entropy(logits, targets, reduction="none"), 0.0)


def plain_weighted(logits, targets, mask, z, beta=0.25, w_max=20.0, top=2.0):
    weight = (z / beta).exp().clamp(max=w_max) / min(math.exp(top / beta), w_max)
    return weight * plain_nll(logits, targets, mask)


def fused_weighted(logits, targets, mask, z):
    return rwr.weighted_nll_(logits, targets, mask, z, 2.0, 0.25, 20.0)


KERNELS = {"mle_filter": (mle_filter.masked_nll_, plain_nll, 0), "dt": (dt.conditioned_nll_, plain_nll, 0),
           "rwr": (fused_weighted, plain_weighted, 1)}


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("rows, masked", [(9, "some"), (1, "none"), (5, "all")])
def test_fused_kernels_equal_float64_autograd(name, rows, masked):
    kernel, plain, extra = KERNELS[name]
    torch.manual_seed(rows)
    logits = torch.randn(rows, V, dtype=torch.float64, requires_grad=True)
    targets, z = torch.randint(0, V, (rows,)), torch.randn(rows, dtype=torch.float64)
    mask = {"some": torch.arange(rows) % 3 > 0, "none": torch.ones(rows, dtype=torch.bool),
            "all": torch.zeros(rows, dtype=torch.bool)}[masked]
    expected = plain(logits, targets, mask, *[z][:extra])
    expected.sum().backward()
    work = logits.detach().clone()
    loss = kernel(work, torch.where(mask, targets, -100), mask, *[z][:extra])  # a masked row's target may be anything
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(work, logits.grad)


@pytest.mark.parametrize("name", KERNELS)
def test_fused_kernels_work_in_bfloat16_with_float32_loss(name):
    kernel, plain, extra = KERNELS[name]
    torch.manual_seed(0)
    logits, targets, z = torch.randn(6, V).bfloat16(), torch.randint(0, V, (6,)), torch.randn(6)
    mask = torch.ones(6, dtype=torch.bool)
    wide = logits.float().requires_grad_()
    expected = plain(wide, targets, mask, *[z][:extra])
    expected.sum().backward()
    loss = kernel(logits, targets, mask, *[z][:extra])
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(logits.float(), wide.grad, atol=5e-3, rtol=1e-2)


@pytest.mark.parametrize("margin, centering", [(0.0, 0.0), (0.5, 0.01)])
@pytest.mark.parametrize("sizes", [(2, 2, 2), (4,), (3, 2)])
def test_reward_model_kernel_equals_float64_autograd_over_all_pairs_of_a_ranking(margin, centering, sizes):
    """Each ranking is a mean over its pairs: 1 / (K choose 2) each."""
    rankings = [[[5, 6, i] for i in range(k)] for k in sizes]
    batch = reward_model.collate(rankings, 1.0)
    scores = torch.randn(sum(sizes), dtype=torch.float64, requires_grad=True)
    expected, start = [], 0
    for k in sizes:
        pairs = [(scores[start + i], scores[start + j]) for i in range(k) for j in range(i + 1, k)]
        expected += [(-torch.nn.functional.logsigmoid(better - worse - margin) + centering * (better + worse) ** 2)
                     / len(pairs) for better, worse in pairs]
        start += k
    torch.stack(expected).sum().backward()
    gradient = scores.detach().clone()
    losses = reward_model.bradley_terry_(gradient, batch.signs, batch.weight.double(), margin, centering)
    torch.testing.assert_close(losses, torch.stack(expected).detach(), rtol=1e-6, atol=1e-7)  # weights are float32
    torch.testing.assert_close(gradient, scores.grad, rtol=1e-6, atol=1e-7)


def test_reward_model_loss_starts_at_ln_2():
    batch = reward_model.collate([[[5, 6], [5, 7]], [[5, 8, 9], [5, 4], [5, 3]]], 0.5)
    losses = reward_model.bradley_terry_(torch.zeros(5), batch.signs, batch.weight, 0.0, 0.0)
    torch.testing.assert_close(losses.sum(), torch.tensor(math.log(2)))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_head_loss_passes_gradcheck_whatever_the_chunk(monkeypatch, bias, chunk):
    monkeypatch.setattr(common, "CHUNK_BYTES", chunk * 128 * 8)
    model = tiny_model(bias=bias, tied=False)
    hidden = torch.randn(5, D, dtype=torch.float64, requires_grad=True)
    targets, mask = torch.randint(0, V, (5,)), torch.tensor([True, True, False, True, True])

    def loss(hidden, weight, *bias):
        return 0.7 * common._HeadLoss.apply(hidden, weight, bias[0] if bias else None, mle_filter.masked_nll_, targets,
                                            mask)

    class Afresh(torch.autograd.Function):  # gradcheck calls backward twice, which the fused loss refuses: run it anew
        @staticmethod
        def forward(ctx, *inputs):
            ctx.save_for_backward(*inputs)
            return loss(*inputs)

        @staticmethod
        def backward(ctx, upstream):
            inputs = [x.detach().requires_grad_() for x in ctx.saved_tensors]
            with torch.enable_grad():
                return torch.autograd.grad(loss(*inputs), inputs, upstream)
    parameters = [model.lm_head.weight] + [model.lm_head.bias] * bias
    assert torch.autograd.gradcheck(Afresh.apply, (hidden, *parameters))


@pytest.mark.parametrize("tied", [False, True])
def test_policy_gradient_equals_plain_autograd(tied):
    model, batch = tiny_model(tied=tied), common.collate(examples())
    policy = common.Policy(model, config())
    policy(batch, mle_filter.masked_nll_, batch.targets, batch.mask).backward()
    ours = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    logits = logits_of(model, batch)[batch.mask]
    torch.nn.functional.cross_entropy(logits, batch.targets[batch.mask], reduction="sum").backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(ours[name], p.grad)


def test_the_fused_loss_serves_a_compiled_model():
    model, batch = tiny_model(), common.collate(examples())
    policy = common.Policy(model, config())
    losses = []
    for forward in (policy, torch.compile(policy, backend="eager")):
        losses.append(forward(batch, mle_filter.masked_nll_, batch.targets, batch.mask))
        losses[-1].backward()
    torch.testing.assert_close(*losses)


def test_logits_scaled_by_the_model_are_served():
    model, batch = tiny_model(tied=False), common.collate(examples())
    model.config.logit_scale = 0.5
    policy = common.Policy(model, config())
    loss = policy(batch, mle_filter.masked_nll_, batch.targets, batch.mask)
    expected = torch.nn.functional.cross_entropy(0.5 * logits_of(model, batch)[batch.mask],
                                                 batch.targets[batch.mask], reduction="sum")
    torch.testing.assert_close(loss, expected)
    with pytest.raises(BadInput, match="logits are not hidden states times head"):
        common.prove_head("model", model)  # this model class does not scale its logits, so the claim is refuted


def test_second_backward_through_the_fused_loss_is_an_error():
    model, batch = tiny_model(), common.collate(examples())
    loss = common.Policy(model, config())(batch, mle_filter.masked_nll_, batch.targets, batch.mask)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        loss.backward()


def test_micro_batch_without_response_tokens_gives_zero_loss_with_gradients():
    model = tiny_model()
    batch = common.collate([Example([1, 2, 3], 3)])
    loss = common.Policy(model, config())(batch, mle_filter.masked_nll_, batch.targets, batch.mask)
    loss.backward()
    assert loss.item() == 0 and all(p.grad is not None and not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32])
def test_bfloat16_head_gradient_accumulates_in_float32(monkeypatch, weights):
    """Over 100 chunks, each in blocks of the vocabulary, with weights of either type under bfloat16 logits."""
    monkeypatch.setattr(common, "GRADIENT_ROWS", V // 3)
    hidden, weight = torch.randn(300, D).bfloat16().requires_grad_(), torch.randn(V, D).to(weights).requires_grad_()
    targets, mask = torch.randint(0, V, (300,)), torch.ones(300, dtype=torch.bool)
    grads = []
    for rows in (300, 3):
        monkeypatch.setattr(common, "CHUNK_BYTES", rows * common.aligned(V) * 2)
        assert common.chunk_rows(hidden, weight, head_trained=True) == rows
        weight.grad = None
        common._HeadLoss.apply(hidden, weight, None, mle_filter.masked_nll_, targets, mask).backward()
        grads.append(weight.grad.float())
    assert weight.grad.dtype == weights
    assert (grads[0] - grads[1]).norm() / grads[0].norm() < 5e-3


def test_logits_are_one_chunk_where_summing_over_chunks_would_need_more_memory(monkeypatch):
    monkeypatch.setattr(common, "CHUNK_BYTES", 10 * 128 * 2)
    weight = torch.zeros(128, 16, dtype=torch.bfloat16)  # its sum in float32 is as large as 32 rows of logits

    def rows(n: int, weight: torch.Tensor = weight, **trained: bool) -> int:
        return common.chunk_rows(torch.zeros(n, 16, dtype=torch.bfloat16), weight, **trained)
    assert [rows(n, head_trained=True) for n in (0, 1, 42, 43)] == [1, 1, 42, 9]  # 43: five of one size, not 4 x 10 + 3
    assert rows(42) == rows(42, weight.float(), head_trained=True) == 9  # no sum, or one that is the gradient itself


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("frozen", ["nothing", "head", "body"])
def test_head_loss_serves_every_dtype_and_frozen_weights_at_one_row(dtype, frozen):
    """N = 1, a vocabulary that is no multiple of 64, and no gradient for what needs none."""
    hidden = torch.randn(1, D).to(dtype).requires_grad_(frozen != "body")
    weight = torch.randn(V, D).to(dtype).requires_grad_(frozen != "head")
    target, mask = torch.tensor([5]), torch.tensor([True])
    common._HeadLoss.apply(hidden, weight, None, mle_filter.masked_nll_, target, mask).backward()
    wide = [x.detach().float().requires_grad_() for x in (hidden, weight)]
    torch.nn.functional.cross_entropy(wide[0] @ wide[1].t(), target).backward()
    for ours, theirs in zip((hidden, weight), wide):
        assert (ours.grad is None) == (not ours.requires_grad)
        if ours.requires_grad:
            torch.testing.assert_close(ours.grad.float(), theirs.grad, rtol=2e-2, atol=3e-2)


def test_without_a_cpp_compiler_the_kernels_run_uncompiled_with_one_warning(tmp_path):
    code = """import torch, common, mle_filter
hidden, weight = torch.randn(3, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
for _ in range(2):
    mask = torch.ones(3, dtype=torch.bool)
    common._HeadLoss.apply(hidden, weight, None, mle_filter.masked_nll_, torch.arange(3), mask).backward()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True, timeout=200,
                          env={**os.environ, "CXX": "/no/compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("no C++ compiler") == 1


# ------------------------------------------------------------------------------------------------ batches and ranks


def gradient_of(micro_batch_tokens, monkeypatch, ranks=1):
    """The gradient of one optimiser step of RWR, the ranks' shares run one after the other and averaged as DDP does."""
    model, cfg = tiny_model(), config(rwr, micro_batch_tokens=micro_batch_tokens, batch_size=7, steps=1)
    rows = [e._replace(weight=float(w)) for e,
            w in zip(examples(), rwr.weigh(torch.tensor([e.reward for e in examples()]), 2.0, 0.25, 20.0))]
    total = [torch.zeros_like(p) for p in model.parameters()]
    for rank in range(ranks):
        monkeypatch.setattr(common, "rank", lambda: rank)
        monkeypatch.setattr(common, "world_size", lambda: ranks)
        (_, batch), = common.batches(rows, cfg)
        model.zero_grad()
        for micro in batch.micros:
            (common.Policy(model, cfg)(micro, fused_weighted, micro.targets, micro.mask,
                                       micro.reward.double()) / batch.normaliser).backward()
        total = [t + p.grad / ranks for t, p in zip(total, model.parameters())]
    return torch.cat([t.flatten() for t in total])


@pytest.mark.parametrize("tokens, ranks", [(1, 1), (30, 1), (10**6, 2), (20, 3), (20, 9)])
def test_gradient_does_not_depend_on_micro_batches_or_ranks(tokens, ranks, monkeypatch):
    whole = gradient_of(10**6, monkeypatch)
    found = gradient_of(tokens, monkeypatch, ranks)
    assert (found - whole).norm() < 1e-6 * whole.norm()  # the model's norms are float32


def test_loss_does_not_depend_on_what_else_is_in_the_batch():
    model = tiny_model()
    loss = [common.Policy(model, config())(b, mle_filter.masked_nll_, b.targets, b.mask)
            for b in (common.collate(examples(3)), common.collate(examples(3) + [Example([1] * 40, 40)]))]
    torch.testing.assert_close(*loss)


def gpt2():
    """A model with learnt absolute positions, and a mask of its own making."""
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=V, n_embd=D, n_layer=2, n_head=2, initializer_range=0.3))


@pytest.mark.parametrize("build", [lambda: tiny_model(num_key_value_heads=1), lambda: mistral(), lambda: gpt2()],
                         ids=["heads that share a key", "sliding window", "GPT-2"])
@pytest.mark.parametrize("recomputed", [False, True])
def test_sequences_end_to_end_are_read_as_if_each_were_alone(build, recomputed):
    """Hidden states and gradients, without a padded position and with the right count of FLOPs."""
    model = common.without_padding(common.without_dropout(build())).train()
    assert model.config._attn_implementation == common.END_TO_END
    if recomputed:
        common.recompute_activations(model)
    batch, gradients = common.collate(examples(5)), []
    for read in (lambda: common.hidden_states(model, batch.input_ids, batch.lengths),
                 lambda: torch.cat([model.base_model(input_ids=ids[None]).last_hidden_state[0]
                                    for ids in batch.input_ids.split(batch.lengths)])):
        model.zero_grad()
        hidden = read()
        hidden[:, ::2].sum().backward()  # all of a row squared is the norm layer's constant
        gradients.append([hidden.detach()] + [p.grad for p in model.parameters() if p.grad is not None])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_model_that_would_carry_one_sequence_into_the_next_is_padded(monkeypatch):
    model = tiny_model()
    model.config._attn_implementation = "sdpa"
    seen = []

    def leaky(query, key, value, lengths, scaling, more):
        seen.append(lengths)
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2)
    monkeypatch.setattr(common, "attend_apart", leaky)
    assert common.without_padding(model).config._attn_implementation == "sdpa" and seen
    batch = common.collate(examples(5))
    loss = common.Policy(model, config())(batch, mle_filter.masked_nll_, batch.targets, batch.mask)
    expected = torch.nn.functional.cross_entropy(logits_of(model, batch)[batch.mask], batch.targets[batch.mask],
                                                 reduction="sum")
    torch.testing.assert_close(loss, expected)


def test_a_model_in_bfloat16_is_read_without_padding_too():
    assert tiny_model(dtype=torch.bfloat16).config._attn_implementation == common.END_TO_END


def test_order_of_the_data_comes_from_the_seed_alone():
    steps = [indices for _, indices in common.step_indices(20, config(batch_size=8, epochs=2))]
    assert [len(s) for s in steps] == [8, 8, 4] * 2
    assert sorted(sum(steps[:3], [])) == list(range(20)) and steps[:3] != steps[3:]
    assert list(enumerate(steps))[4:] == list(common.step_indices(20, config(batch_size=8, epochs=2), first=4))
    assert steps != [indices for _, indices in common.step_indices(20, config(batch_size=8, epochs=2, seed=1))]


def test_micro_batches_keep_to_the_token_budget():
    lengths = [5, 90, 3, 40, 40, 7]
    groups = common.cut_by_tokens(lengths, 80)
    assert sorted(sum(groups, [])) == list(range(6))
    assert all(len(g) * max(lengths[i] for i in g) <= 80 or len(g) == 1 for g in groups)


# ------------------------------------------------------------------------------------------------------- tokenizer


def byte_level(pre_tokenizers):
    """A byte-level BPE tokenizer of this pre-tokenizer's kind, trained on the probe text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, trainers
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import PreTrainedTokenizerFast
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers, decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=ByteLevel.alphabet(), show_progress=False,
                                  special_tokens=[AddedToken(t, special=True, normalized=False)
                                                  for t in ("<|endoftext|>", "<|im_start|>")])
    tokenizer.train_from_iterator([*common.PROBE, Path(common.__file__).read_text()], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


def kinds():
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split
    llama3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
              r"\s+(?!\S)|\s+")
    return {"GPT-2": ByteLevel(add_prefix_space=False),
            "SmolLM2": Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]),
            "Llama-3": Sequence([Split(Regex(llama3), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)])}


@pytest.mark.parametrize("kind", ["GPT-2", "SmolLM2", "Llama-3"])
def test_tiktoken_encodes_hard_text_as_the_tokenizer_does(kind):
    tokenizer = byte_level(kinds()[kind])
    encode = common.bulk_encoder(tokenizer)
    assert "_tiktoken_encoder" in encode.__qualname__, "tiktoken should serve this kind"
    rng = np.random.default_rng(0)
    pieces = ["  ", "\n", "\r\n", "1", "23", "é", "\U0001f469‍\U0001f467", "don't", "<|endoftext|>", "x", "\t", "東",
              "…", " the", "½", "\u00a0"]
    texts = ["".join(rng.choice(pieces, 30)) for _ in range(200)]
    assert encode(texts) == [tokenizer(t, add_special_tokens=False, split_special_tokens=True)["input_ids"]
                             for t in texts]
    assert all(tokenizer.decode(ids) == t for t, ids in zip(texts, encode(texts)))


def test_bytes_that_a_vocabulary_lacks_are_left_to_the_tokenizer():
    tokenizer = byte_level(kinds()["SmolLM2"])
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    del spec["model"]["vocab"]["\u0104"]  # byte 4, as in SmolLM2
    tokenizer._tokenizer = type(tokenizer.backend_tokenizer).from_str(json.dumps(spec))
    encode = common.bulk_encoder(tokenizer)
    assert "_tiktoken_encoder" in encode.__qualname__
    texts = ["fine", "a\x04b"]
    assert encode(texts) == tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def test_special_token_text_in_data_is_data(tokenizer):
    ids, = common.encode_responses(tokenizer, [" fine <|endoftext|> more"], 50)
    assert ids.count(tokenizer.eos_token_id) == 1 and ids[-1] == tokenizer.eos_token_id


def test_special_token_text_in_a_chat_message_is_data():
    tokenizer = byte_level(kinds()["GPT-2"])
    tokenizer.chat_template = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}\n{% endfor %}"
                               "<|im_start|>assistant:")
    start = tokenizer.convert_tokens_to_ids("<|im_start|>")
    plain = common.encode_chat(tokenizer, [{"role": "user", "content": "hello"}])
    assert plain == tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], add_generation_prompt=True,
                                                  return_dict=False)
    tricky = common.encode_chat(tokenizer, [{"role": "user", "content": "say <|im_start|>system"}])
    assert plain.count(start) == tricky.count(start) == 2
    assert tokenizer.decode(tricky) == "<|im_start|>user\nsay <|im_start|>system\n<|im_start|>assistant:"


def test_boundary_between_prompt_and_response_is_exact(tokenizer):
    prompt, response = "\n\nHuman: Hi\n\nAssistant:", " They are"
    p, r = common.encode_prompts(tokenizer, [prompt], 50), common.encode_responses(tokenizer, [response], 50)
    assert tokenizer.decode(p[0]) == prompt and tokenizer.decode(r[0][:-1]) == response
    batch = common.collate([Example(p[0] + r[0], len(p[0]))])
    assert batch.targets[batch.mask].tolist() == r[0], "the loss is over the response and its EOS, and nothing else"


def test_eos_never_disappears_from_the_loss(tokenizer):
    eos = tokenizer.eos_token_id  # 0, which is also what models without END_TO_END are padded with
    batch = common.collate([Example([5, 6, 7, eos], 2), Example([5, 6, 7, 8, 9, 10, eos], 2)])
    assert batch.targets[batch.mask].tolist() == [7, eos, 7, 8, 9, 10, eos]


def test_cut_responses_carry_no_eos_and_long_prompts_are_cut_on_the_left(tokenizer, capsys):
    eos = tokenizer.eos_token_id
    full, = common.encode_responses(tokenizer, [" They are small."], 50)
    assert full[-1] == eos and common.encode_responses(tokenizer, [" They are small."], len(full) - 1) == [full[:-1]]
    assert common.encode_responses(tokenizer, [" They are"], 50, [True])[0][-1] != eos
    whole, = common.encode_prompts(tokenizer, ["a b c d e f"], 50)
    assert common.encode_prompts(tokenizer, ["a b c d e f"], 3) == [whole[-3:]]
    assert "1 of 1 prompts" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------------- sampler


PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14], [15, 16]]


def mistral():
    """A model whose layers see five positions back: their caches are of a kind of their own."""
    from transformers import MistralConfig, MistralForCausalLM
    torch.manual_seed(0)
    return MistralForCausalLM(MistralConfig(vocab_size=V, hidden_size=D, intermediate_size=24, num_hidden_layers=2,
                                            num_attention_heads=2, num_key_value_heads=1, sliding_window=5,
                                            initializer_range=0.3, eos_token_id=0)).eval()


@pytest.mark.parametrize("tokens_together", [16384, 40])  # all prompts are read at once, or in parts
@pytest.mark.parametrize("model", [lambda: tiny_model(dtype=torch.float32), mistral,
                                   lambda: tiny_model(dtype=torch.float32, num_key_value_heads=1)],
                         ids=["plain", "sliding window", "heads that share a key"])
def test_greedy_sampler_equals_generate_on_uneven_prompts(model, tokens_together):
    model = model()
    cfg = config(temperature=0.0, max_response_tokens=12, micro_batch_tokens=tokens_together)
    for prompt, ours in zip(PROMPTS, common.sample(model, PROMPTS, cfg, seed=0)):
        theirs = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=12,
                                pad_token_id=0)[0, len(prompt):].tolist()
        assert ours.ids == theirs[:len(ours.ids)] and (ours.truncated or ours.ids[-1] == 0)


@pytest.mark.parametrize("temperature, tokens_together", [(1.0, 16384), (0.7, 40)])
def test_sampler_log_probs_equal_an_unpadded_forward(temperature, tokens_together):
    model = tiny_model(dtype=torch.float32, num_key_value_heads=1)
    cfg = config(max_response_tokens=9, temperature=temperature, micro_batch_tokens=tokens_together)
    responses = common.sample(model, PROMPTS, cfg, seed=3)
    rows = [Example(p + r.ids, len(p)) for p, r in zip(PROMPTS, responses)]
    for example, response, again in zip(rows, responses, common.response_log_probs(model, rows, cfg)):
        log_p = (model(torch.tensor([example.ids])).logits[0] / temperature).log_softmax(-1)
        expected = [log_p[t - 1, example.ids[t]].item() for t in range(example.prompt_length, len(example.ids))]
        np.testing.assert_allclose(response.log_probs, expected, atol=1e-4)
        np.testing.assert_allclose(again, expected, atol=1e-4)


def test_a_saved_model_names_no_attention_of_ours(tmp_path):
    from transformers import AutoModelForCausalLM
    model = tiny_model(dtype=torch.float32)
    assert model.config._attn_implementation == common.END_TO_END
    model.save_pretrained(tmp_path)
    assert common.END_TO_END not in (tmp_path / "config.json").read_text()
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


@pytest.mark.parametrize("model", [lambda: tiny_model(dtype=torch.float32), mistral], ids=["plain", "sliding window"])
def test_a_prompt_that_comes_several_times_is_read_once_and_sampled_each_time(model):
    model, cfg = model(), config(max_response_tokens=9)
    several = [p for p in PROMPTS for _ in range(3)]
    before = common._spent["flops"]
    common.sample(model, PROMPTS, config(max_response_tokens=1), seed=3)
    once = common._spent["flops"] - before
    responses = common.sample(model, several, config(max_response_tokens=1), seed=3)
    assert common._spent["flops"] - before == pytest.approx(2 * once)
    responses = common.sample(model, several, cfg, seed=3)
    assert len({tuple(r.ids) for r in responses[:3]}) > 1
    for i, response in enumerate(responses):
        alone, = common.sample(model, [several[i]], cfg, seed=3, seeds=[i])
        assert alone.ids == response.ids
        np.testing.assert_allclose(alone.log_probs, response.log_probs, atol=1e-4)


def test_a_groups_cache_is_gone_with_its_responses_without_a_garbage_collection(monkeypatch):
    kept, made, make_room = weakref.WeakSet(), [], common._make_room

    def watched(layer, *rest):
        kept.add(layer), made.append(None)
        make_room(layer, *rest)
    monkeypatch.setattr(common, "_make_room", watched)
    gc.disable()
    try:
        common.sample(tiny_model(dtype=torch.float32), PROMPTS, config(max_response_tokens=9, micro_batch_tokens=1), 3)
    finally:
        gc.enable()
    assert len(made) == 8 and not kept  # two layers, a prompt at a time


def test_a_token_without_probability_is_never_drawn():
    log_p = torch.full((3, 700), -torch.inf)
    log_p[:, 300], log_p[:, 550] = math.log(0.25), math.log(0.75)
    for uniform, token in ((0.0, 300), (0.2499, 300), (0.2501, 550), (1 - 1e-16, 550)):
        assert common.draw(log_p, torch.full((3,), uniform, dtype=torch.float64)).tolist() == [token] * 3


def test_a_rows_randomness_does_not_depend_on_its_batch():
    model = tiny_model(dtype=torch.float32)
    together = common.sample(model, PROMPTS, config(max_response_tokens=9), seed=3)
    apart = common.sample(model, PROMPTS, config(max_response_tokens=9, micro_batch_tokens=1), seed=3)
    assert [r.ids for r in together] == [r.ids for r in apart]


def test_sampled_frequencies_are_the_models_probabilities():
    log_p = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().expand(20000, 4)
    uniform = torch.from_numpy(np.random.default_rng(0).random(20000))
    counts = torch.bincount(common.draw(log_p, uniform), minlength=4) / 20000
    torch.testing.assert_close(counts, log_p[0].exp(), atol=0.015, rtol=0)
    nucleus = torch.bincount(common.draw(log_p, uniform, top_p=0.7), minlength=4) / 20000
    torch.testing.assert_close(nucleus, torch.tensor([0.625, 0.375, 0, 0]), atol=0.015, rtol=0)


def test_guidance_zero_equals_no_guidance_and_guidance_moves_away_from_the_unconditional():
    model, cfg = tiny_model(dtype=torch.float32), config(temperature=0.0, max_response_tokens=1)
    other = [[20, 21], [22], [23, 24, 25], [26]]
    plain = common.sample(model, PROMPTS, cfg, seed=0)
    assert plain == common.sample(model, PROMPTS, cfg, seed=0, unconditional=other, guidance=0.0)
    guided = common.sample(model, PROMPTS, cfg, seed=0, unconditional=other, guidance=3.0)
    for p, u, r in zip(PROMPTS, other, guided):
        a, b = (model(torch.tensor([x])).logits[0, -1].log_softmax(-1) for x in (p, u))
        assert r.ids[0] == (4 * a - 3 * b).argmax().item()


# --------------------------------------------------------------------------------------------------- reward model


def scored_by_transformers(folder, texts, padding_side):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side=padding_side)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(**tokenizer([t + tokenizer.eos_token for t in texts], return_tensors="pt",
                                 padding=True)).logits[:, 0].tolist()


@pytest.mark.parametrize("right, warned", [(26, True), (36, False)])
def test_a_reward_model_that_learnt_nothing_says_so(monkeypatch, capsys, right, warned):
    """Of 50 held-out pairs 26 right ones are chance, 36 are not."""
    rankings = [common.Ranking(f"question {i}", ["a", "b"]) for i in range(50)]
    scores = [score for i in range(50) for score in ((1.0, 0.0) if i < right else (0.0, 1.0))]
    monkeypatch.setattr(reward_model, "score", lambda *_: scores)
    assert reward_model.report(None, "", rankings)["accuracy"] == right / 50
    assert ("not clearly better than chance" in capsys.readouterr().out) == warned


def test_reward_model_scores_alike_through_transformers_in_any_batch_with_any_padding(run):
    rows = list(common.SampleFile(str(run[0] / "samples.jsonl")))[:6]
    texts = [s.prompt + s.response for s in rows]
    ours = reward_model.score(config(), str(run[0] / "rm"), *zip(*[(s.prompt, s.response, s.truncated) for s in rows]))
    np.testing.assert_allclose(ours, [s.reward for s in rows], atol=1e-4)
    for side in ("left", "right"):
        np.testing.assert_allclose(scored_by_transformers(run[0] / "rm", texts, side), ours, atol=1e-4)
    alone = [scored_by_transformers(run[0] / "rm", [t], "right")[0] for t in texts]
    np.testing.assert_allclose(alone, ours, atol=1e-4)


def test_reward_model_reads_the_eos_and_never_pads_with_it(run):
    model, tokenizer = reward_model.load_scorer(str(run[0] / "rm"), torch.float32)
    assert tokenizer.pad_token_id == model.model.config.pad_token_id != tokenizer.eos_token_id
    ended, broken = reward_model.score(config(), str(run[0] / "rm"), ["Human: Hi\n\nAssistant:"] * 2,
                                       [" They are"] * 2, [False, True])
    assert ended != broken


# --------------------------------------------------------------------------------------------------- the algorithms


def test_filter_keeps_the_best_and_breaks_ties_by_order(tokenizer):
    assert mle_filter.best(np.array([1.0, 3, 2, 3, 0]), 0.4).tolist() == [1, 3]
    assert mle_filter.best(np.zeros(10), 0.3).tolist() == [0, 1, 2]
    assert mle_filter.best(np.array([1.0, 2]), 0.01).tolist() == [1], "one at least"
    samples = samples_of([0, 1, 2, 3, 4, 5], prompts=["a", "a", "a", "b", "b", "b"])
    kept = mle_filter.prepare(samples, tokenizer, config(mle_filter, keep=1 / 3, per_prompt=True))
    assert [tokenizer.decode(e.ids[e.prompt_length:-1]) for e in kept] == [" reply 2", " reply 5"]
    assert len(mle_filter.prepare(samples, tokenizer, config(mle_filter, keep=1.0))) == 6


def test_rwr_with_large_beta_is_sft(tokenizer):
    weights = [e.weight for e in rwr.prepare(samples_of([0, 1, 5]), tokenizer, config(rwr, beta=1e6))]
    np.testing.assert_allclose(weights, 1, atol=1e-4)


def test_rwr_with_small_beta_picks_the_best_and_never_overflows(tokenizer):
    for beta in (1e-3, 1e-30):
        weights = [e.weight for e in rwr.prepare(samples_of([0, 1, 5]), tokenizer, config(rwr, beta=beta, w_max=0.0))]
        assert weights == [0, 0, 1]


def test_rwr_weights_are_capped_exponentials_up_to_a_factor(tokenizer):
    z = samples_of([0, 1, 2, 7]).z([0, 1, 2, 7])
    weights = np.array([e.weight for e in rwr.prepare(samples_of([0, 1, 2, 7]), tokenizer,
                                                      config(rwr, beta=0.25, w_max=20.0))])
    np.testing.assert_allclose(weights / weights[0], np.minimum(np.exp(z / 0.25), 20) / np.exp(z[0] / 0.25), rtol=1e-6)


def test_dt_writes_the_same_condition_in_training_and_in_sampling(tokenizer):
    samples, cfg = samples_of([0, 1, 2, 3]), config(dt, condition_dropout=0.0, guidance=[])
    trained = dt.prepare(samples, tokenizer, cfg)
    asked = common.encode_prompts(tokenizer, [s.prompt for s in samples.rows], 64,
                                  [dt.condition(z, cfg) for z in samples.z(samples.rewards)])
    assert [e.ids[:e.prompt_length] for e in trained] == asked
    assert tokenizer.decode(asked[0]) == "Human: 0 <rm_score>: 1 ", "z = -1.34 is -3 half steps, and 4 is the mean"


def test_dt_takes_its_loss_over_the_response_alone(tokenizer):
    example, *_ = dt.prepare(samples_of([0, 1]), tokenizer, config(dt, condition_dropout=0.0, guidance=[]))
    batch = common.collate([example])
    assert tokenizer.decode(batch.targets[batch.mask]) == " reply 0" + tokenizer.eos_token


def test_dt_rounds_the_reward():
    paper = config(dt, reward_format="decimal", reward_step=0.01)
    assert [dt.condition(z, paper) for z in (1.519, -0.001, 5.0)] == [" <rm_score>: 1.52 ", " <rm_score>: 0.00 ",
                                                                      " <rm_score>: 5.00 "]
    assert [dt.condition(z, config(dt))[-2] for z in (-9, -0.2, 0.3, 9)] == ["0", "4", "5", "9"]
    z = np.linspace(-2, 2, 101)
    assert dt.wish("q95", z) == pytest.approx(1.8) and dt.wish("-1.5", z) == -1.5
    assert dt.condition(dt.wish("none", z), paper) == ""


@pytest.mark.parametrize("format, step", [("digit", 0.5), ("decimal", 0.01)])
def test_dt_chat_template_writes_the_condition_that_training_wrote(format, step):
    tokenizer = byte_level(kinds()["SmolLM2"])
    tokenizer.chat_template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}\n{% endfor %}" \
                              "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    cfg, chat = config(dt, reward_format=format, reward_step=step), [{"role": "user", "content": "hello"}]
    asked = {z: common.encode_prompts(tokenizer, [chat], 64, [dt.condition(z, cfg)])[0] for z in (2.0, -1.37, 0.25)}
    tokenizer.chat_template = dt.asking_template(tokenizer.chat_template, -1.37, cfg)
    render = functools.partial(tokenizer.apply_chat_template, chat, add_generation_prompt=True, return_dict=False)
    assert [render(reward=z) for z in asked] == list(asked.values()) and render() == asked[-1.37]


def test_dt_drops_the_condition_from_the_asked_share(tokenizer):
    rows = dt.prepare(samples_of(range(400)), tokenizer, config(dt, condition_dropout=0.25))
    untagged = sum("<rm_score>" not in tokenizer.decode(e.ids) for e in rows)
    assert 70 < untagged < 130


# ------------------------------------------------------------------------------------------------------------ data


def write(path, *rows):
    lines = [r if isinstance(r, (str, bytes)) else json.dumps(r) for r in rows]
    data = b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines) + b"\n"
    Path(path).write_bytes(gzip.compress(data) if str(path).endswith(".gz") else data)
    return str(path)


TRANSCRIPT = "\n\nHuman: Hi {}\n\nAssistant: Hello.\n\nHuman: And?\n\nAssistant: {}"


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.jsonl.gz"])
def test_three_shapes_of_preference_data_give_the_same_pairs(tmp_path, name):
    turns = [{"role": "user", "content": "Hi"}]
    reply = [[{"role": "assistant", "content": text}] for text in ("yes", "no")]
    path = write(tmp_path / name, {"chosen": TRANSCRIPT.format(1, "yes"), "rejected": TRANSCRIPT.format(1, "no")},
                 {"prompt": "Hi", "chosen": "yes", "rejected": "no"},
                 {"chosen": turns + reply[0], "rejected": turns + reply[1]},
                 {"prompt": turns, "chosen": reply[0], "rejected": reply[1]},
                 {"prompt": "Hi", "chosen": turns + reply[0], "rejected": turns + reply[1]},
                 *({"prompt": f"p{i}", "chosen": "yes", "rejected": "no"} for i in range(20)))
    train, held_out = common.load_preferences(config(model="m", preferences=path, held_out=0.3))
    pairs = train + held_out
    assert len(pairs) == 25 and sum(p.prompt == turns for p in pairs) == 3
    assert {tuple(text.strip() for text in p.responses) for p in pairs} == {("yes", "no")}
    assert TRANSCRIPT.format(1, "")[:-1] in [p.prompt for p in pairs]


@pytest.mark.parametrize("row", [
    {"prompt": "Human: hi", "completion": " yes", "reward": 2},
    {"input": "Human: hi", "output": " yes", "reward": 2},
    {"prompt": "Human: hi", "completion": [{"role": "assistant", "content": " yes"}], "reward": 2.0}])
def test_samples_under_other_tools_names_are_taken_as_they_are(tmp_path, row):
    """TRL's prompt and completion, as text and as messages; OpenRLHF's input and output."""
    found, = common.SampleFile(write(tmp_path / "s.jsonl", row))
    assert found == Sample("Human: hi", " yes", 2.0, "given", False)


def test_ranked_responses_are_preferences_best_first(tmp_path):
    rows = [{"prompt": f"p{i}", "ranked": ["best", "good", "bad"][:2 + i % 2]} for i in range(30)]
    train, held_out = common.load_preferences(config(model="m", preferences=write(tmp_path / "p.jsonl", *rows),
                                                     held_out=0.3))
    assert {r.prompt: list(r.responses) for r in train + held_out} == {row["prompt"]: row["ranked"] for row in rows}
    cfg = config(model="m", preferences=str(tmp_path / "p.jsonl"), held_out=0.3, sources="dataset")
    labelled = common.rows_to_label(cfg)
    assert len(labelled) == sum(len(r.responses) for r in train)
    assert all((row.source == "chosen") == (row.response == "best") for row in labelled)


def test_unusable_pairs_are_counted_and_left_out(tmp_path, capsys):
    path = write(tmp_path / "p.jsonl", {"chosen": TRANSCRIPT.format(1, "a"), "rejected": TRANSCRIPT.format(2, "b")},
                 {"prompt": "x", "chosen": "a", "rejected": " "},
                 *({"prompt": f"p{i}", "chosen": "a", "rejected": "b"} for i in range(20)))
    train, held_out = common.load_preferences(config(model="m", preferences=path, held_out=0.3))
    said = capsys.readouterr().out
    assert len(train) + len(held_out) == 20
    assert "1 preferences differ" in said and "1 preferences have an empty response" in said


def test_train_and_held_out_share_no_prompt(tmp_path):
    path = write(tmp_path / "p.jsonl", *({"prompt": f"p{i % 30}", "chosen": f"a{i}", "rejected": "b"}
                                         for i in range(90)))
    train, held_out = common.load_preferences(config(model="m", preferences=path, held_out=0.3))
    assert not {p.prompt for p in train} & {p.prompt for p in held_out} and len(train) + len(held_out) == 90


def test_rows_in_are_rows_out(run):
    rows = common.SampleFile(str(run[0] / "samples.jsonl"))
    train, _ = common.load_preferences(config(out=str(run[0])))
    assert [r.response for r in rows if r.source == "chosen"] == [p.responses[0] for p in train]
    assert sum(r.source == "rejected" for r in rows) == len(train) == 4000
    record = json.loads((run[0] / "samples.json").read_text())
    assert record["mean"] == pytest.approx(np.mean([r.reward for r in rows])) and record["rows"] == len(rows)


def test_labelling_goes_on_where_a_kill_left_it(run, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "LABELLED_TOGETHER", 4)
    prompts = write(tmp_path / "p.jsonl", *({"prompt": f"Human: {i}"} for i in range(40)))
    base, calls, die_at = str(run[0] / "base"), [], [3]

    def score(prompts, responses, truncated):
        calls.append(len(prompts))
        if len(calls) == die_at[0]:
            raise KeyboardInterrupt
        return [float(p.split()[-1]) for p in prompts]

    def label(name):
        cfg = config(model=base, prompts=prompts, reward_model="rm", sources="generated", samples_per_prompt=1,
                     held_out=0.5, out=str(tmp_path / name), max_response_tokens=12)
        common.labelled_samples(cfg, base, "rm", score, common.Cost())
        return (tmp_path / name / "samples.jsonl").read_bytes()
    with pytest.raises(KeyboardInterrupt):
        label("killed")
    with open(tmp_path / "killed" / ".samples.part.jsonl", "a") as file:
        file.write('{"prompt": "half a li')
    assert not (tmp_path / "killed" / "samples.jsonl").exists()
    done, die_at[0] = len(calls) - 1, None
    calls.clear()
    resumed = label("killed")
    parts = math.ceil(resumed.count(b"\n") / 4)
    assert calls[0] == 4 and len(calls) == parts - done, "finished parts are not made again"
    assert resumed == label("whole") and not list((tmp_path / "killed").glob(".samples*"))


def test_samples_stay_on_disk_at_a_few_bytes_a_row(tmp_path):
    rows = [{**GOOD, "prompt": f"p{i}", "response": "x" * 1000, "reward": i} for i in range(2000)]
    for path in (write(tmp_path / "s.jsonl", *rows), write(tmp_path / "s.jsonl.gz", *rows)):
        tracemalloc.start()
        samples = common.SampleFile(path)
        held, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert held < 100 * len(rows)
        assert samples[1999] == Sample("p1999", "x" * 1000, 1999.0, "given", False) and samples[-1] == samples[1999]


def test_given_samples_are_never_trained_on_with_held_out_prompts(tmp_path):
    path = write(tmp_path / "s.jsonl", *({**GOOD, "prompt": f"p{i}", "reward": i} for i in range(60)))
    cfg = config(model="m", samples=path, held_out=0.3)
    trained = {s.prompt for s in common.given_samples(cfg, "").rows}
    held_out = common.split_prompts(cfg, held_out=True)
    assert not trained & set(held_out) and len(trained) + len(held_out) == 60


def test_prompts_too_few_to_hold_one_out_are_refused_only_where_something_is_evaluated(tmp_path):
    path = write(tmp_path / "p.jsonl", {"prompt": "p0"}, {"prompt": "p1"})
    cfg = config(model="m", prompts=path, reward_model="m", held_out=1e-9)
    with pytest.raises(BadInput, match="larger --held_out"):
        common.split_prompts(cfg, held_out=True)
    cfg.eval_prompts = 0
    assert common.split_prompts(cfg, held_out=True) == []


def test_a_file_named_test_is_the_held_out_split(tmp_path):
    for name in ("train", "test"):
        write(tmp_path / f"{name}.jsonl", *({"prompt": f"{name}{i}", "chosen": "a", "rejected": "b"} for i in range(5)))
    train, held_out = common.load_preferences(config(model="m", preferences=str(tmp_path)))
    assert {p.prompt for p in held_out} == {f"test{i}" for i in range(5)} and len(train) == 5


def test_control_characters_do_not_reach_the_terminal():
    assert common.printable("a\x1b[2Jb\nc") == "a\\x1b[2Jb\nc"


# -------------------------------------------------------------------------------------------------------- bad input


GOOD = {"prompt": "p", "response": "r", "reward": 1.0}
BAD_SAMPLES = {"surrogate": ('{"prompt": "\\ud800", "response": "r", "reward": 1}', "line 2.*not UTF-8"),
               "huge": ('{"prompt": "p", "response": "r", "reward": 1' + "0" * 400 + "}", "line 2.*finite"),
               "not JSON": ('{"prompt": ', "line 2.*not JSON"), "a list": ([1], "line 2.*JSON object"),
               "no reward": ({"prompt": "p", "response": "r"}, "line 2.*'reward' is missing"),
               "NaN": ('{"prompt": "p", "response": "r", "reward": NaN}', "line 2.*'reward' must be finite"),
               "infinite": ('{"prompt": "p", "response": "r", "reward": -Infinity}', "line 2.*finite"),
               "text reward": ({**GOOD, "reward": "1"}, "line 2.*'reward' must be a number"),
               "true": ({**GOOD, "reward": True}, "line 2.*a number"),
               "response": ({**GOOD, "response": 3}, "line 2.*'response' must be text"),
               "empty prompt": ({**GOOD, "prompt": " "}, "line 2.*'prompt' is empty"),
               "UTF-8": (b'{"prompt": "\xff"}', "line 2.*not UTF-8"), "deep": ("[" * 100000, "line 2.*not JSON"),
               "messages": ({**GOOD, "prompt": [1]}, "line 2.*'prompt'")}


@pytest.mark.parametrize("name", BAD_SAMPLES)
def test_bad_sample_rows_are_named_by_file_line_and_field(tmp_path, name):
    bad, message = BAD_SAMPLES[name]
    with pytest.raises(BadInput, match=message):
        common.SampleFile(write(tmp_path / "s.jsonl", GOOD, bad if isinstance(bad, (str, bytes))
                                  else json.dumps(bad)))


@pytest.mark.parametrize("row, message", [({"chosen": "a"}, "line 1.*'chosen' has no"),
                                          ({"prompt": "p", "chosen": "a"}, "'rejected' is missing"),
                                          ({"prompt": "p", "chosen": 1, "rejected": "b"}, "'chosen' must be text"),
                                          ({"prompt": "p", "ranked": ["a"]}, "'ranked' must be a list of two"),
                                          ({"prompt": "p", "ranked": "ab"}, "'ranked' must be a list"),
                                          ({"ranked": ["a", "b"]}, "'prompt' is missing"),
                                          ({"chosen": "\n\nAssistant: a", "rejected": "\n\nAssistant: b"},
                                           "prompt of 'chosen' is empty")])
def test_bad_preference_rows_are_named_by_file_line_and_field(tmp_path, row, message):
    with pytest.raises(BadInput, match=message):
        common.load_preferences(config(model="m", preferences=write(tmp_path / "p.jsonl", row)))


def test_broken_gzip_and_no_usable_pair_are_one_sentence(tmp_path):
    path = write(tmp_path / "p.jsonl.gz", *[{"prompt": str(i), "chosen": os.urandom(40).hex(), "rejected": "b"}
                                            for i in range(99)])
    Path(path).write_bytes(Path(path).read_bytes()[:-200])
    with pytest.raises(BadInput, match="gzip file is broken"):
        common.load_preferences(config(model="m", preferences=path))
    with pytest.raises(BadInput, match="no usable preference"):
        empty = write(tmp_path / "e.jsonl", {"prompt": "p", "chosen": " ", "rejected": "b"})
        common.load_preferences(config(model="m", preferences=empty))


FLAGS = [("mle_filter", ["--keep", "0"], "--keep"), ("rwr", ["--beta", "0"], "--beta"),
         ("rwr", ["--lr", "-1"], "--lr"), ("dt", ["--targt", "1"], "--targt"),
         ("dt", ["--target", "high"], "--target"), ("dt", ["--target", "q99", "none"], "--target"),
         ("dt", ["--condition_dropout", "0"], "--guidance"),
         ("dt", ["--reward_step", "0.01"], "--reward_step"), ("dt", ["--samples", "s.jsonl"], "--samples"),
         ("dt", ["--steps", "few"], "--steps"), ("dt", ["--top_p", "0"], "--top_p"),
         ("rwr", ["--model", "m"], "--model needs data"), ("rwr", ["--preferences", "p"], "--model"),
         ("rwr", ["--lr", "nan"], "--lr"),
         ("reward_model", ["--model", "/no/model", "--preferences", "/no/file.jsonl"], "/no/file.jsonl"),
         ("reward_model", ["--margin", "inf"], "--margin")]


@pytest.mark.parametrize("name, flags, word", FLAGS)
def test_bad_flags_end_in_one_sentence_and_status_2(name, flags, word, capsys, tmp_path):
    module = {"mle_filter": mle_filter, "rwr": rwr, "dt": dt, "reward_model": reward_model}[name]
    with pytest.raises(SystemExit) as stop:
        common.launch(module.main, module.Config, [*flags, "--out", str(tmp_path / "run")])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and word in said and len(said.splitlines()) == 1
    assert not (tmp_path / "run").exists(), "nothing half-written"


def test_bad_folders_end_in_one_sentence_and_status_2(tmp_path):
    samples = write(tmp_path / "s.jsonl", *({**GOOD, "prompt": f"p{i}", "reward": i} for i in range(30)))
    no_model = script("rwr.py", "--model", tmp_path, "--samples", samples, "--out", tmp_path / "run", status=2)
    assert "not a folder or Hub id" in no_model.stderr and len(no_model.stderr.strip().splitlines()) == 1
    no_folder = script("rwr.py", "--out", tmp_path / "s.jsonl" / "run", status=2)
    assert "s.jsonl" in no_folder.stderr and len(no_folder.stderr.strip().splitlines()) == 1


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    common.write_text(tmp_path / "samples.jsonl", ["old"])

    def full(*args):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError):
        common.write_text(tmp_path / "samples.jsonl", ["new"])
    assert (tmp_path / "samples.jsonl").read_text() == "old\n"


def test_a_failed_stage_leaves_the_old_folder_and_a_killed_swap_is_put_back(tmp_path):
    with common.new_folder(tmp_path / "dt", {"lr": 1}) as work:
        (work / "run.json").write_text('{"settings": {"lr": 1}}')
    with pytest.raises(KeyboardInterrupt), common.new_folder(tmp_path / "dt", {"lr": 2}) as work:
        (work / "half").write_text("")
        raise KeyboardInterrupt
    assert common.is_fresh("dt", tmp_path / "dt" / "run.json", {"lr": 1}) and not (tmp_path / "dt" / "half").exists()
    (tmp_path / "dt").rename(tmp_path / ".dt.old")  # as a kill between the two renames would leave it
    assert common.is_fresh("dt", tmp_path / "dt" / "run.json", {"lr": 1})
    assert not common.is_fresh("dt", tmp_path / "dt" / "run.json", {"lr": 2})


def test_samples_of_another_reward_model_give_a_warning_that_names_both(tmp_path, capsys, monkeypatch):
    path = write(tmp_path / "s.jsonl", GOOD, {**GOOD, "reward": 2})
    (tmp_path / "s.json").write_text('{"settings": {"scorer": "theirs"}}')
    monkeypatch.setattr(common, "split_prompts", lambda cfg, held_out: ["another prompt"])
    common.given_samples(config(model="m", samples=path), "ours")
    said = capsys.readouterr().out
    assert "theirs" in said and "ours" in said


# ----------------------------------------------------------------------------------------------------------- PPO


def rollout_of(lengths=(5, 1, 8, 3), seed=0):
    """A scored rollout of uneven responses: prepare()'s arguments but for beta and cfg."""
    rng = np.random.default_rng(seed)
    rows = [Example(rng.integers(1, V, 3 + n).tolist(), 3) for n in lengths]
    old, base, values = ([rng.normal(size=n).tolist() for n in lengths] for _ in range(3))
    rollout = ppo_baseline.Rollout(["a prompt"] * len(rows), ["a response"] * len(rows), [False] * len(rows), rows, old)
    return rollout, base, values, rng.normal(size=len(lengths))


@pytest.mark.parametrize("gae_lambda", [0.0, 0.95, 1.0])
def test_ppo_advantages_equal_a_naive_sum_over_ragged_responses(gae_lambda):
    rewards, values = ([np.random.default_rng(seed + n).normal(size=n) for n in (5, 1, 8)] for seed in (0, 50))
    ours = ppo_baseline.advantages(ppo_baseline.ragged(rewards), ppo_baseline.ragged(values), gae_lambda)
    for row, r, v in zip(ours, rewards, values):
        delta = [r[t] + (v[t + 1] if t + 1 < len(r) else 0.0) - v[t] for t in range(len(r))]
        naive = [sum(gae_lambda ** (k - t) * delta[k] for k in range(t, len(r))) for t in range(len(r))]
        np.testing.assert_allclose(row[:len(r)], naive)
        assert not row[len(r):].any()


def test_ppo_score_enters_at_the_last_real_token_only():
    rollout, _, values, score = rollout_of()
    zeros = [[0.0] * len(v) for v in values]
    examples, found = ppo_baseline.prepare(rollout, rollout.log_probs, zeros, score, 0.1,
                                           config(ppo_baseline, gae_lambda=0.0))
    for e, s in zip(examples, score):
        np.testing.assert_allclose(e.per_token[3], [0.0] * (e.response_tokens - 1) + [s])  # returns, one step ahead
    assert found["kl"] == 0 and found["objective"] == pytest.approx(score.mean())


def test_ppo_kl_to_base_is_paid_at_every_token():
    rollout, base, values, score = rollout_of()
    zeros = [[0.0] * len(v) for v in values]
    examples, found = ppo_baseline.prepare(rollout, base, zeros, score, 0.1, config(ppo_baseline, gae_lambda=1.0))
    for e, o, b, s in zip(examples, rollout.log_probs, base, score):
        np.testing.assert_allclose(e.per_token[3][0], s - 0.1 * (sum(o) - sum(b)))  # the first token's return
    assert found["objective"] == pytest.approx(score.mean() - 0.1 * found["kl"])


def test_ppo_advantages_are_whitened_over_all_tokens_whatever_the_padding():
    cfg = config(ppo_baseline)
    examples, _ = ppo_baseline.prepare(*rollout_of(), 0.1, cfg)
    white = torch.cat([e.per_token[1] for e in examples])
    torch.testing.assert_close(white.mean(), torch.zeros((), dtype=torch.float64), atol=1e-9, rtol=0)
    torch.testing.assert_close(white.std(correction=0), torch.ones((), dtype=torch.float64), atol=1e-6, rtol=0)
    x, mask = torch.randn(3, 5), torch.tensor([[1, 1, 0, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 0, 0]]).bool()
    wide, wide_mask = (torch.nn.functional.pad(t, (0, 7)) for t in (x, mask))
    torch.testing.assert_close(ppo_baseline.whiten(wide, wide_mask)[:, :5], ppo_baseline.whiten(x, mask))


def plain_surrogate(logits, targets, old, advantage, temperature, clip, entropy_coef):
    """Each row's PPO loss, its (log-ratio)^2 / 2, whether the clip bites, and its entropy, by autograd's own means."""
    distribution = torch.distributions.Categorical(logits=logits / temperature)
    log_ratio = distribution.log_prob(targets) - old
    plain, clipped = -advantage * log_ratio.exp(), -advantage * log_ratio.exp().clamp(1 - clip, 1 + clip)
    entropy = distribution.entropy()
    return (torch.maximum(plain, clipped) - entropy_coef * entropy, log_ratio.square() / 2,
            (clipped > plain).to(logits.dtype), entropy)


@pytest.mark.parametrize("temperature, entropy_coef", [(1.0, 0.0), (0.7, 0.01)])
@pytest.mark.parametrize("rows, masked", [(40, "some"), (1, "none"), (5, "all")])
def test_ppo_kernel_equals_float64_autograd_in_gradient_and_statistics(rows, masked, temperature, entropy_coef):
    torch.manual_seed(rows)
    logits = torch.randn(rows, V, dtype=torch.float64, requires_grad=True)
    targets, advantage = torch.randint(0, V, (rows,)), torch.randn(rows, dtype=torch.float64)
    mask = {"some": torch.arange(rows) % 3 > 0, "none": torch.ones(rows).bool(),
            "all": torch.zeros(rows).bool()}[masked]
    old = ((logits.detach() / temperature).log_softmax(1).gather(1, targets[:, None]).squeeze(1)
           + 0.3 * torch.randn(rows, dtype=torch.float64))
    loss, *statistics = plain_surrogate(logits, targets, old, advantage, temperature, 0.2, entropy_coef)
    (loss * mask).sum().backward()
    work, sums = logits.detach().clone(), torch.zeros(3, dtype=torch.float64)
    ours = ppo_baseline.clipped_surrogate_(work, torch.where(mask, targets, -100), mask, old, advantage, temperature,
                                           0.2, entropy_coef, sums)
    torch.testing.assert_close(ours, (loss * mask).detach())
    torch.testing.assert_close(work, logits.grad)
    torch.testing.assert_close(sums, torch.stack([(s * mask).sum().detach() for s in statistics]))
    if masked == "some":
        assert 0 < sums[1] < mask.sum()  # the clip bites in some rows and not in others


def test_ppo_kernel_works_in_bfloat16_with_float32_loss():
    torch.manual_seed(0)
    logits, targets, advantage = torch.randn(6, V).bfloat16(), torch.randint(0, V, (6,)), torch.randn(6)
    wide = logits.float().requires_grad_()
    old = wide.detach().log_softmax(1).gather(1, targets[:, None]).squeeze(1)
    expected, *_ = plain_surrogate(wide, targets, old, advantage, 1.0, 0.2, 0.01)
    expected.sum().backward()
    loss = ppo_baseline.clipped_surrogate_(logits, targets, torch.ones(6).bool(), old, advantage, 1.0, 0.2, 0.01,
                                           torch.zeros(3))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(logits.float(), wide.grad, atol=5e-3, rtol=1e-2)


def test_ppo_value_never_gains_from_leaving_the_old_value_far():
    value = torch.tensor([0.0, 0.15, 0.5, -0.5], requires_grad=True)
    loss = ppo_baseline.clipped_value_loss(value, torch.zeros(4), torch.ones(4), 0.2)
    torch.testing.assert_close(loss.detach(), torch.tensor([1.0, 0.85**2, 0.8**2, 1.5**2]) / 2)
    loss.sum().backward()
    assert value.grad[2] == 0 and (value.grad[[0, 1, 3]] < 0).all()


class Letters:
    """A tokenizer that can only decode."""
    def decode(self, ids):
        return " ".join(map(str, ids))


def actor_critic(cfg):
    """A tiny policy with a critic of random weights, and its frozen base."""
    from transformers import LlamaForSequenceClassification
    model, base = tiny_model(dtype=torch.float32), tiny_model(dtype=torch.float32)
    shape = model.config.__class__(**{**model.config.to_dict(), "num_labels": 1})
    critic = reward_model.RewardModel(LlamaForSequenceClassification(shape).eval(), torch.float32)
    return ppo_baseline.ActorCritic(model, critic, samples_of([0.0, 2.0]), cfg), base


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_ppo_first_ratio_is_one_and_kl_of_the_untouched_policy_zero(temperature):
    """Rollout (left-padded, with a cache), reference and update agree about every token's log-prob."""
    cfg = config(ppo_baseline, temperature=temperature, max_response_tokens=12)
    actor, base = actor_critic(cfg)
    prompts = [e.ids for e in examples(9)]
    rollout = ppo_baseline.roll_out(actor, Letters(), ["a prompt"] * 9, prompts, cfg, seed=1)
    reference = common.response_log_probs(base, rollout.examples, cfg)
    values = common.each_response_token(actor.values, rollout.examples, cfg)
    rows, found = ppo_baseline.prepare(rollout, reference, values, np.ones(9), 0.1, cfg)
    assert abs(found["kl"]) < 1e-4
    statistics = torch.zeros(3)
    micro = common.collate(rows)
    surrogate, value_loss = actor(micro, lambda *a: ppo_baseline.clipped_surrogate_(
        *a, temperature, 0.2, 0.0, statistics), cfg.value_clip)
    assert (2 * statistics[0] / len(micro.rows)).sqrt() < 1e-4 and statistics[1] == 0
    torch.testing.assert_close(surrogate, torch.zeros(()), atol=1e-3, rtol=0)  # whitened advantages sum to 0
    gap = torch.cat([e.per_token[3] - e.per_token[2] for e in rows])  # return - value: the value loss's start
    torch.testing.assert_close(value_loss, (gap.square().sum() / 2).float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tokens, ranks", [(1, 1), (40, 1), (10**6, 2), (20, 3), (20, 9)])
def test_ppo_gradient_does_not_depend_on_micro_batches_or_ranks(tokens, ranks, monkeypatch):
    def gradient(tokens, ranks):
        cfg = config(ppo_baseline, micro_batch_tokens=tokens, batch_size=4, steps=1)
        actor, _ = actor_critic(cfg)
        rows, _ = ppo_baseline.prepare(*rollout_of(), 0.1, cfg)
        total = 0.0
        for rank in range(ranks):
            monkeypatch.setattr(common, "rank", lambda: rank)
            monkeypatch.setattr(common, "world_size", lambda: ranks)
            (_, batch), = common.batches(rows, cfg)
            actor.zero_grad()
            for micro in batch.micros:
                surrogate, value_loss = actor(micro, lambda *a: ppo_baseline.clipped_surrogate_(
                    *a, 1.0, 0.2, 0.01, torch.zeros(3)), cfg.value_clip)
                ((surrogate + 0.1 * value_loss) / batch.normaliser).backward()
            total = total + torch.cat([p.grad.flatten() for p in actor.parameters()]) / ranks
        return total
    whole = gradient(10**6, 1)
    assert whole.norm() > 0 and (gradient(tokens, ranks) - whole).norm() < 1e-5 * whole.norm()


@pytest.mark.parametrize("bad", [0, 1, 4])
def test_ppo_iteration_counts_as_skipped_only_where_none_of_its_updates_is_finite(bad):
    cfg = config(ppo_baseline, batch_size=2, epochs=1)
    actor, _ = actor_critic(cfg)
    rows, _ = ppo_baseline.prepare(*rollout_of(), 0.1, cfg)
    rows = [e._replace(per_token=(e.per_token[0], e.per_token[1] * (math.nan if i < bad else 1), *e.per_token[2:]))
            for i, e in enumerate(rows)]  # one of four rows spoils one of two batches
    optimizer, schedule = ppo_baseline.make_optimizer(actor, cfg, 1)
    before = [p.detach().clone() for p in actor.parameters()]
    said = ppo_baseline.update(actor, actor, optimizer, schedule, rows, cfg)
    moved = any(not torch.equal(p, q) for p, q in zip(actor.parameters(), before))
    assert moved == bool(said["grad_norm"].isfinite()) == (bad < 4)
    assert all(p.isfinite().all() for p in actor.parameters())


def test_ppo_beta_moves_towards_the_kl_target():
    cfg = config(ppo_baseline, kl_target=6.0)
    assert ppo_baseline.adapted(0.1, 9.0, cfg) > 0.1 > ppo_baseline.adapted(0.1, 3.0, cfg)
    assert ppo_baseline.adapted(0.1, 600.0, cfg) == pytest.approx(0.1 * (1 + 0.2 * 256 / 1000))  # by a fifth at most
    assert ppo_baseline.adapted(0.1, 9.0, config(ppo_baseline)) == 0.1


def test_ppo_runs_logs_and_never_pays_a_cut_off_response_more_than_the_penalty(run):
    """Nothing can end within two tokens: all scores are the penalty's, whatever the reward model says."""
    out, _ = run
    script("ppo_baseline.py", "--model", out / "base", "--reward_model", out / "rm", "--samples", out / "samples.jsonl",
           "--out", out.parent / "ppo", "--dtype", "fp32", "--max_prompt_tokens", "64", "--max_response_tokens", "2",
           "--steps", "2", "--rollout_batch_size", "8", "--batch_size", "4", "--eval_prompts", "4", "--no_compile",
           "--missing_eos_score", "-9")
    lines = [json.loads(line) for line in (out.parent / "ppo" / "ppo" / "metrics.jsonl").read_text().splitlines()]
    assert {"step", "score", "objective", "kl", "eos_rate", "clip_fraction", "approx_kl", "explained_variance",
            "entropy", "response_tokens", "rollout_tokens_per_second", "loss", "value_loss", "lr", "grad_norm",
            "tokens", "seconds", "flops"} <= set(lines[0])
    assert len(lines) == 2 and lines[0]["score"] == -9 and lines[0]["eos_rate"] == 0 and abs(lines[0]["kl"]) < 1e-4


def test_ppo_refuses_samples_whose_units_are_another_reward_models(run, tmp_path):
    samples = write(tmp_path / "s.jsonl", *({"prompt": f"Human: {i}\n\nAssistant:", "response": " yes",
                                             "reward": 100 + i} for i in range(40)))
    done = script("ppo_baseline.py", "--model", run[0] / "base", "--samples", samples, "--reward_model", run[0] / "rm",
                  "--out", tmp_path / "x", "--max_prompt_tokens", "64", "--max_response_tokens", "8", status=2)
    assert "units of its reward" in done.stderr


def test_models_with_dropout_are_trained_and_scored_without_it(tmp_path):
    from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel
    shape = dict(vocab_size=V, n_embd=D, n_layer=1, n_head=2, pad_token_id=0)
    GPT2LMHeadModel(GPT2Config(**shape)).save_pretrained(tmp_path / "lm")
    GPT2ForSequenceClassification(GPT2Config(**shape, num_labels=1)).save_pretrained(tmp_path / "rm")
    common.load_tokenizer, kept = lambda folder: None, common.load_tokenizer
    try:
        scorer, _ = reward_model.load_scorer.__wrapped__(str(tmp_path / "rm"), torch.float32)
    finally:
        common.load_tokenizer = kept
    for model in (common.load_model(str(tmp_path / "lm")), scorer.model):
        ids = torch.randint(1, V, (2, 9))
        torch.testing.assert_close(model.train()(ids).logits, model.eval()(ids).logits)


def test_ppo_without_a_reward_model_is_one_sentence(run, tmp_path):
    done = script("ppo_baseline.py", "--model", run[0] / "base", "--samples", run[0] / "samples.jsonl", "--out",
                  tmp_path / "x", "--max_prompt_tokens", "64", "--max_response_tokens", "8", status=2)
    assert "--reward_model" in done.stderr and done.stderr.count("\n") == 1


# --------------------------------------------------------------------------------------------------------- ledger


@pytest.mark.parametrize("heads, key_value_heads, width", [(2, 2, 32), (4, 2, 64)])
def test_ledger_counts_what_torchs_flop_counter_counts(heads, key_value_heads, width):
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import LlamaConfig, LlamaForCausalLM
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=128, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=3, num_attention_heads=heads,
        num_key_value_heads=key_value_heads, tie_word_embeddings=False, attn_implementation="eager", eos_token_id=127))
    cfg = config(max_response_tokens=20)
    rows = [Example(list(range(30)), 10), Example(list(range(25)), 20), Example(list(range(30)), 28)]
    micro = common.collate(rows)
    policy = common.Policy(model, cfg)
    for work in (lambda: policy(micro, lambda logits, targets: logits[:, 0].clone(), micro.targets).backward(),
                 lambda: common.response_log_probs(model, rows, cfg),
                 lambda: common.sample(model, [e.ids for e in rows], cfg, seed=0)):
        model.requires_grad_(True)
        before = common._spent["flops"]
        with FlopCounterMode(display=False) as theirs:
            work()
        assert common._spent["flops"] - before == pytest.approx(theirs.get_total_flops(), rel=0.05)


def test_ledger_names_every_stage_and_never_counts_evaluation(run):
    out, _ = run
    row = [json.loads(line) for line in (out / "leaderboard.jsonl").read_text().splitlines()][-1]
    assert set(row["ledger"]) == {"base", "reward_model", "generation", "labelling", "training", "evaluation"}
    assert all(cost["seconds"] > 0 and cost["flops"] > 0 and cost["peak_memory_bytes"] > 0
               for cost in row["ledger"].values())
    for unit in ("seconds", "flops", "generated_tokens"):
        needed = sum(row["ledger"][s][unit] for s in ("reward_model", "generation", "labelling", "training"))
        assert row[f"total_{unit}"] == pytest.approx(needed)
        assert row[f"train_{unit}"] == row["ledger"]["training"][unit]
    assert row["ledger"]["generation"]["generated_tokens"] > 0 == row["ledger"]["training"]["generated_tokens"]


# ---------------------------------------------------------------------------------------------------- the whole road


def test_the_whole_road_leaves_a_run_as_documented(run):
    out, said = run
    for name in ("base", "rm", "dt"):
        assert {"config.json", "model.safetensors", "tokenizer.json", "run.json",
                "README.md"} <= {p.name for p in (out / name).iterdir()}
    lines = [json.loads(line) for line in (out / "dt" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(8)) and {"loss", "lr", "grad_norm", "tokens",
                                                                   "seconds"} <= set(lines[0])
    rows = [json.loads(line) for line in (out / "leaderboard.jsonl").read_text().splitlines()]
    assert [r["variant"] for r in rows] == ["", "target -1", "target none", "target q99", "target q99, guidance 0.5"]
    assert all({"gold", "reward", "win_rate", "kl_to_base", "response_tokens", "distinct_2", "eos_rate",
                "train_seconds", "total_seconds",
                "train_flops", "total_flops", "peak_memory_bytes", "checkpoint", "world_size", "seed"} <= set(r)
                for r in rows)
    assert rows[0]["perplexity"] > 1 and rows[0]["win_rate"] == 0.5 and abs(rows[0]["kl_to_base"]) < 1e-3
    record = json.loads((out / "dt" / "run.json").read_text())
    assert "dt target q99, guidance 0.5" in said and record["condition"]["step"] == 0.5


def test_a_finished_stage_is_named_and_skipped_and_a_changed_setting_rebuilds_it(run):
    out, _ = run
    stamp = (out / "rm" / "model.safetensors").stat().st_mtime_ns
    again = script("mle_filter.py", *TINY, "--out", out, "--steps", "4").stdout
    assert "reward model" in again and again.count("from before") == 3
    assert "mle_filter keep 0.1" in again and "dt target q99" in again
    changed = script("mle_filter.py", *TINY, "--out", out, "--steps", "4", "--keep", "1.0").stdout
    assert "sft keep 1" in changed and (out / "rm" / "model.safetensors").stat().st_mtime_ns == stamp
    lr = script("mle_filter.py", *TINY, "--out", out, "--steps", "4", "--lr", "1e-4").stdout
    assert "built again because of lr (0.002 -> 0.0001)" in lr


def test_policies_load_and_generate_by_transformers_alone(run):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    model, tokenizer = (kind.from_pretrained(run[0] / "dt") for kind in (AutoModelForCausalLM, AutoTokenizer))
    inputs = tokenizer("\n\nHuman: What do otters eat?\n\nAssistant: <rm_score>: 8 ", return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=4).shape[1] > inputs["input_ids"].shape[1]


def test_policies_serve_transformers_pipeline(run):
    from transformers import pipeline
    said = pipeline("text-generation", model=str(run[0] / "dt"))("\n\nHuman: Hi.\n\nAssistant: <rm_score>: 8 ",
                                                                max_new_tokens=4, do_sample=False)
    assert said[0]["generated_text"].startswith("\n\nHuman: Hi.")


@pytest.mark.parametrize("name", ["SFTTrainer", "RewardTrainer"])
def test_a_trainer_of_trl_starts_from_our_folders(run, tmp_path, name):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    rankings = common.load_preferences(config(out=str(run[0])))[0][:8]
    rows = [{"prompt": r.prompt, "chosen": r.responses[0], "rejected": r.responses[1]} for r in rankings]
    if name == "SFTTrainer":
        rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
    arguments = getattr(trl, name.replace("Trainer", "Config"))(
        output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=4, use_cpu=True, report_to=[], bf16=False)
    folder = run[0] / ("dt" if name == "SFTTrainer" else "rm")
    trainer = getattr(trl, name)(model=str(folder), args=arguments, train_dataset=datasets.Dataset.from_list(rows))
    if name == "RewardTrainer":  # the head is ours, not one that was made anew
        theirs = trainer.model.score.weight
        ours = reward_model.load_scorer(str(folder), torch.float32)[0].model.score.weight
        torch.testing.assert_close(theirs.detach().cpu().float(), ours.detach())
    assert math.isfinite(trainer.train().training_loss)


def test_samples_that_others_labelled_are_trained_on_without_a_reward_model(run, tmp_path):
    samples = write(tmp_path / "s.jsonl", *({"prompt": f"Human: {i}\n\nAssistant:", "response": " yes", "reward": i}
                                            for i in range(40)))
    said = script("rwr.py", "--model", run[0] / "base", "--samples", samples, "--out", tmp_path / "run",
                  "--batch_size", "8",
                  "--eval_prompts", "4", "--max_prompt_tokens", "64", "--max_response_tokens", "8").stdout
    assert "no reward model" in said and "rwr beta 0.25" in said


def test_samples_load_with_datasets_and_come_back(run, tmp_path):
    datasets = pytest.importorskip("datasets")
    loaded = datasets.load_dataset("json", data_files=str(run[0] / "samples.jsonl"), split="train",
                                   cache_dir=str(tmp_path))
    loaded.rename_column("response", "completion").to_json(str(tmp_path / "again.jsonl"))
    ours, again = (common.SampleFile(str(path)) for path in (run[0] / "samples.jsonl", tmp_path / "again.jsonl"))
    assert len(loaded) == len(ours) == len(again) and loaded["reward"][:] == [sample.reward for sample in ours]
    for a, b in zip(ours, again):  # to_json writes ten decimals
        assert a._replace(reward=0.0) == b._replace(reward=0.0) and a.reward == pytest.approx(b.reward, abs=1e-9)


def test_responses_that_others_wrote_are_labelled_and_trained_on(run, tmp_path):
    rows = [{"prompt": f"Human: {i}\n\nAssistant:", "response": " yes" * (i % 3 + 1), "truncated": i % 2 == 0,
             "source": "vllm"} for i in range(40)]
    done = script("mle_filter.py", "--model", run[0] / "base", "--reward_model", run[0] / "rm", "--responses",
                  write(tmp_path / "r.jsonl", *rows), "--out", tmp_path / "run", "--steps", "2", "--batch_size", "8",
                  "--eval_prompts", "0", "--max_prompt_tokens", "64", "--max_response_tokens", "16", "--no_compile")
    found = list(common.SampleFile(str(tmp_path / "run" / "samples.jsonl")))
    given = {(row["prompt"], row["response"], row["source"], row["truncated"]) for row in rows}
    assert len(found) > 20 and {(s.prompt, s.response, s.source, s.truncated) for s in found} < given
    assert (tmp_path / "run" / "mle_filter").exists() and "gold" not in done.stdout, "0 prompts: no evaluation"


@pytest.mark.parametrize("name, folder, flags", [
    ("rwr.py", "rwr", ["--batch_size", "8", "--lr", "1e-3"]),
    ("ppo_baseline.py", "ppo", ["--batch_size", "4", "--rollout_batch_size", "8", "--lr", "1e-4"]),
    ("ppo_baseline.py", "ppo", ["--batch_size", "4", "--rollout_batch_size", "8", "--lr", "1e-4", "--sharding",
                                "fsdp"])])
def test_two_ranks_train_to_the_same_curve_as_one(run, tmp_path, name, folder, flags):
    """Same order of the data, same draws, same steps, same normalisation: only float error lies between the two."""
    curves = []
    for launcher in ([sys.executable], [sys.executable, "-m", "torch.distributed.run", "--standalone",
                                        "--nproc_per_node=2"]):
        out = tmp_path / str(len(launcher))
        done = subprocess.run([*launcher, HERE / name, "--model", run[0] / "base", "--reward_model", run[0] / "rm",
                               "--samples", run[0] / "samples.jsonl", "--out", out, "--no_compile", "--steps", "4",
                               *flags, "--eval_prompts", "4", "--dtype", "fp32", "--max_prompt_tokens", "64",
                               "--max_response_tokens", "8"],
                              capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=280)
        assert done.returncode == 0, done.stdout + done.stderr
        lines = [json.loads(line) for line in (out / folder / "metrics.jsonl").read_text().splitlines()]
        curves.append([[line[k] for k in ("loss", "grad_norm", "tokens", "score", "kl", "value_loss", "entropy",
                                          "explained_variance") if k in line] for line in lines])
    np.testing.assert_allclose(curves[0], curves[1], rtol=2e-3, atol=2e-4)
    np.testing.assert_allclose(curves[0][0], curves[1][0], rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------- scale and trust


def torchrun(ranks, *args, status=0, env=None):
    """Runs a script under torchrun; returns the process."""
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}",
                           *map(str, args)], capture_output=True, text=True, timeout=280,
                          env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **(env or {})})
    assert (done.returncode == 0) == (status == 0), done.stdout + done.stderr
    return done


UNEVEN = [*examples(6), Example([5, 6, 7], 3, 0.5)]  # the last has no response token
CASES = [(name, sharding, tokens, rows) for name in ("mle_filter", "rwr", "dt", "ppo_baseline", "reward_model")
         for sharding in ("ddp", "fsdp", "fsdp, recomputed") for tokens, rows in ((10**6, 7), (20, 7), (10**6, 3))]


def step_gradient(folder, name, sharding, tokens, rows):
    """The gradient of one optimiser step of an algorithm, over all ranks, in float32, whole on every rank."""
    cfg = config({"ppo_baseline": ppo_baseline}.get(name, common), micro_batch_tokens=tokens, batch_size=rows, steps=1,
                 sharding=sharding.split(",")[0], gradient_checkpointing="recomputed" in sharding, compile=False)
    model, rewards = folder / "policy", folder / "rewards"
    if name == "reward_model":
        load = functools.partial(reward_model.load_classifier, str(rewards), torch.float32)
        module = common.distributed(reward_model.RewardModel(common.read_once(load, cfg), torch.float32), cfg)
        rankings = [[e.ids, e.ids[:3] + [4] * i, [7] * 5][:2 + i % 2] for i, e in enumerate(UNEVEN[-rows:])]
        with mock.patch.object(reward_model, "prepare", lambda rankings, *_: rankings):
            (_, micros), = reward_model.batches(rankings, None, cfg)
        for micro in common.accumulate(module, micros):
            scores = module(micro.input_ids, micro.lengths, micro.last)
            gradient = scores.detach().clone()
            reward_model.bradley_terry_(gradient, micro.signs, micro.weight, 0.0, 0.01)
            scores.backward(gradient)
    elif name == "ppo_baseline":
        policy = common.read_once(functools.partial(common.load_model, str(model)), cfg)
        load = functools.partial(reward_model.load_classifier, str(rewards), torch.float32)
        critic = reward_model.RewardModel(common.read_once(load, cfg), torch.float32)
        module = common.distributed(ppo_baseline.ActorCritic(policy, critic, samples_of([0, 1]), cfg), cfg, "values")
        rollout, base, _, z = rollout_of(range(2, 2 + rows))
        values = common.each_response_token(module.module.values if hasattr(module, "module") else module.values,
                                            rollout.examples, cfg)
        trained, _ = ppo_baseline.prepare(rollout, base, values, z, 0.1, cfg)
        kernel = functools.partial(ppo_baseline.clipped_surrogate_, temperature=1.0, clip=0.2, entropy_coef=0.01,
                                   statistics=torch.zeros(3))
        (_, batch), = common.batches(trained, cfg)
        for micro in common.accumulate(module, batch.micros):
            surrogate, value_loss = module(micro, kernel, cfg.value_clip)
            ((surrogate + 0.1 * value_loss) / batch.normaliser).backward()
    else:
        module, (kernel, _, extra) = common.load_policy(str(model), cfg), KERNELS[name]
        trained = [e._replace(weight=1.0 + i * bool(extra)) for i, e in enumerate(UNEVEN[-rows:])]
        (_, batch), = common.batches(trained, cfg)
        for micro in common.accumulate(module, batch.micros):
            (module(micro, kernel, micro.targets, micro.mask, *[micro.reward][:extra]) / batch.normaliser).backward()
    grads = [p.grad for p in module.parameters()]
    return torch.cat([(g.full_tensor() if hasattr(g, "full_tensor") else g).flatten() for g in grads])


def training_bytes(folder, sharding):
    """Of a policy's weights, gradients and Adam's moments, the ranks' together."""
    policy = common.load_policy(str(folder / "policy"), config(sharding=sharding))
    optimizer, _ = common.make_optimizer(policy, config(), 1)
    for p in policy.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    held = [t.to_local() if hasattr(t, "to_local") else t for p in policy.parameters()
            for t in (p, p.grad, *optimizer.state[p].values()) if t.dim()]
    return torch.tensor(common.sum_over_ranks(sum(t.numel() * t.element_size() for t in held))[0])


def measure_gradients(folder):
    """What each rank of the next two tests does."""
    def main(cfg):
        torch.compiler.set_stance("force_eager")
        found = {str(case): step_gradient(Path(folder), *case) for case in CASES}
        found |= {f"bytes, {sharding}": training_bytes(Path(folder), sharding) for sharding in ("ddp", "fsdp")}
        if common.rank() == 0:
            torch.save(found, Path(folder) / f"{common.world_size()}.pt")
    common.launch(main, common.Config, ["--out", folder])


@pytest.fixture(scope="session")
def gradients(tmp_path_factory):
    """The gradients that one process finds for a policy and a reward model, and what 2 and 4 ranks find."""
    from transformers import LlamaForSequenceClassification
    folder = tmp_path_factory.mktemp("gradients")
    model = tiny_model(dtype=torch.float32)
    model.save_pretrained(folder / "policy")
    torch.manual_seed(1)
    model.config.num_labels, model.config.pad_token_id = 1, 0
    LlamaForSequenceClassification(model.config).save_pretrained(folder / "rewards")
    found = {1: {str(case): step_gradient(folder, *case) for case in CASES}}
    for ranks in (2, 4):
        torchrun(ranks, __file__, "measure_gradients", folder)
        found[ranks] = torch.load(folder / f"{ranks}.pt", weights_only=True)
    return found


@pytest.mark.parametrize("ranks", [2, 4])
def test_gradient_is_the_same_under_real_ranks(gradients, ranks):
    """Of every algorithm, DDP or FSDP2, whatever the micro-batches, also with fewer sequences than ranks."""
    for case, gradient in gradients[1].items():
        assert gradient.norm() > 0
        assert (gradients[ranks][case] - gradient).norm() < 1e-5 * gradient.norm(), case


@pytest.mark.parametrize("ranks", [2, 4])
def test_training_holds_16_bytes_a_weight_on_each_rank_under_ddp_and_a_share_of_them_under_fsdp(gradients, ranks):
    """The README's budget: float32 weights, gradients and two moments."""
    weights = sum(p.numel() for p in tiny_model().parameters())
    assert gradients[ranks]["bytes, ddp"] == 16 * weights * ranks
    assert gradients[ranks]["bytes, fsdp"] == 16 * weights


def road(run, out, *more):
    """A short training's command line, all before it finished."""
    return ["--model", run[0] / "base", "--reward_model", run[0] / "rm", "--samples", run[0] / "samples.jsonl",
            "--out", out, "--no_compile", "--dtype", "fp32", "--max_prompt_tokens", "64", "--max_response_tokens", "32",
            "--batch_size", "8", "--lr", "1e-3", "--eval_prompts", "4", *more]


def result(folder):
    """A finished training, but for the clock: the bytes of the weights, the lines of metrics.jsonl."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    clocks = ("seconds", "rollout_tokens_per_second")
    return (folder / "model.safetensors").read_bytes(), [{k: v for k, v in x.items() if k not in clocks} for x in lines]


KILLS = int(os.environ.get("KILLS", 6))  # KILLS=20 python -m pytest test_all.py -k killed: more of them than CI has


def finish(command):
    """Runs a command to its end."""
    done = subprocess.run([str(a) for a in command], capture_output=True, text=True, timeout=280,
                          env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr


def killed_and_resumed(command, out, name, kills, rng, longest):
    """Starts the command again and again, killing it -9 at a random moment of training, then lets it end."""
    killed, work = 0, out / f".{name}.new"
    while killed < kills:
        process = subprocess.Popen([str(a) for a in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                   text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        before = time.time()
        while process.poll() is None and not ((work / "metrics.jsonl").exists()
                                              and (work / "metrics.jsonl").stat().st_mtime > before):
            time.sleep(0.01)
        time.sleep(rng.random() * longest)
        if process.poll() is not None:
            break
        ranks = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
        os.kill(int(rng.choice(ranks or [process.pid])), signal.SIGKILL)
        process.communicate(timeout=60)
        killed += 1
    if not (out / name).exists():
        finish(command)
    return killed


@pytest.mark.parametrize("name, ranks, steps, every, kills", [
    ("rwr", 1, 100 * KILLS, 5, KILLS), ("ppo", 1, 12, 1, 2), ("dt", 2, 150, 5, 2)])
def test_a_run_killed_at_random_moments_ends_bit_for_bit_as_one_that_was_not(
        run, tmp_path, name, ranks, steps, every, kills):
    script = HERE / {"ppo": "ppo_baseline.py"}.get(name, f"{name}.py")
    more = {"ppo": ["--rollout_batch_size", "16"], "dt": ["--sharding", "fsdp"]}.get(name, [])
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    whole, broken = ([sys.executable, *launcher, script,
                      *road(run, tmp_path / out, "--steps", steps, "--save_every", every, *more)]
                     for out in ("whole", "broken"))
    finish(whole)
    assert killed_and_resumed(broken, tmp_path / "broken", name, kills, random.Random(ranks), 1.0) == kills
    weights, lines = result(tmp_path / "whole" / name)
    again, resumed = result(tmp_path / "broken" / name)
    assert [line["step"] for line in resumed] == list(range(steps))
    assert resumed == lines and again == weights
    assert not list((tmp_path / "broken" / name).glob("*checkpoint*"))


def test_a_checkpoint_that_is_not_whole_is_passed_over(tmp_path, capsys):
    model = tiny_model(dtype=torch.float32)
    optimizer, schedule = common.make_optimizer(model, config(lr=0.1), 10)
    kept = []
    for step in (1, 2, 3):
        model(torch.arange(5)[None]).logits.square().mean().backward()
        common.update([model], optimizer, schedule, torch.zeros(()))
        common.checkpoint(tmp_path, model, optimizer, schedule, {"beta": step}, step, 10 * step, {"flops": 1.0})
        kept.append([p.detach().clone() for p in model.parameters()])
    last, before = common.checkpoints_in(tmp_path)
    assert (last.name, before.name) == ("00000003", "00000002"), "the last two are kept"
    largest = max(last.glob("*"), key=lambda p: p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-100])
    state = {}
    assert common.restore(tmp_path, model, optimizer, schedule, state) == (2, 20) and state == {"beta": 2}
    assert "not whole" in capsys.readouterr().out
    for now, then in zip(model.parameters(), kept[1]):
        torch.testing.assert_close(now, then, rtol=0, atol=0)
    common.checkpoint(tmp_path, model, optimizer, schedule, {"beta": 4}, 3, 30, {"flops": 1.0})
    assert common.restore(tmp_path, model, optimizer, schedule, state) == (3, 30) and state == {"beta": 4}


def test_a_step_that_is_not_finite_moves_nothing_and_several_end_the_run(tmp_path):
    model, cfg = tiny_model(dtype=torch.float32), config(lr=0.1, save_every=0)
    optimizer, schedule = common.make_optimizer(model, cfg, 20)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(BadInput, match="5 steps in a row"), \
            common.training(tmp_path, model, optimizer, schedule, 20, cfg) as (first, log):
        for step in range(20):
            loss = model(torch.arange(5)[None]).logits.square().mean()
            (loss * (math.nan if step % 2 else 1)).backward()
            norm = common.update([model], optimizer, schedule, loss * (1 if step % 2 else math.inf))
            log(step, loss=loss, grad_norm=norm)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 5 and all(line["grad_norm"] is None for line in lines)


def test_labelling_gives_the_same_rows_in_the_same_order_whatever_the_world_size(run, tmp_path):
    """Three prompts for four ranks too: one has nothing to do."""
    prompts = write(tmp_path / "p.jsonl", *({"prompt": f"\n\nHuman: What do {a} eat?\n\nAssistant:"}
                                            for a in list(common.ANIMALS)[:5]))
    found = []
    for ranks in (1, 4):
        out = tmp_path / str(ranks)
        flags = ["--model", run[0] / "base", "--reward_model", run[0] / "rm", "--prompts", prompts, "--out", out,
                 "--sources", "generated", "--samples_per_prompt", "2", "--no_compile", "--dtype", "fp32",
                 "--held_out", "0.5", "--max_prompt_tokens", "64", "--max_response_tokens", "16", "--eval_prompts",
                 "1", "--steps", "2"]
        torchrun(ranks, HERE / "mle_filter.py", *flags)
        found.append(list(common.SampleFile(str(out / "samples.jsonl"))))
    assert [s[:2] for s in found[0]] == [s[:2] for s in found[1]] and len(found[0]) % 2 == 0
    np.testing.assert_allclose([s.reward for s in found[0]], [s.reward for s in found[1]], atol=1e-4)


def fail_on_one_rank(folder):
    """What each rank of the next test does."""
    def main(cfg):
        if common.rank() == 1:
            raise BadInput("this rank has had enough")
        common.barrier()
    common.launch(main, common.Config, ["--out", folder])


def test_an_error_on_one_rank_ends_all_with_its_message(tmp_path):
    start = time.time()
    done = torchrun(2, __file__, "fail_on_one_rank", tmp_path, status=1)
    assert "rank 1: this rank has had enough" in done.stderr and time.time() - start < 60


def test_two_runs_into_one_folder_are_refused_by_name(run, tmp_path):
    with common.locked(tmp_path):
        done = script("rwr.py", *road(run, tmp_path), status=2)
    assert "another run is at work there" in done.stderr and f"process {os.getpid()}" in done.stderr


def test_a_local_model_needs_no_network(run, tmp_path):
    forbid = """
import socket, sys
def refuse(*args, **kwargs): raise AssertionError(f"a network call: {args}")
socket.socket.connect = socket.getaddrinfo = socket.create_connection = refuse
import rwr
rwr.common.launch(rwr.main, rwr.Config)
"""
    environment = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")}
    done = subprocess.run([sys.executable, "-c", forbid, *map(str, road(run, tmp_path, "--steps", "1"))], cwd=HERE,
                          capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == 0 and "rwr beta" in done.stdout, done.stderr


def malformed(rng):
    """The bytes of a data file with something wrong, and a name for it."""
    rows = [{"prompt": "Human: hi", "response": "yes", "reward": 1.0, "chosen": "\n\nHuman: a\n\nAssistant: b",
             "rejected": "\n\nHuman: a\n\nAssistant: c"} for _ in range(rng.randrange(1, 6))]
    strange = rng.choice([None, True, 3, -1.5, [], {}, [[]], "", " ", "\x00", "\ud800", "\x1b[2J", "é" * 50, 10**400,
                          float("nan"), float("inf"), [{"role": "user"}], [{"role": 1, "content": "x"}],
                          [{"role": "user", "content": "x"}], {"a": {"b": []}}])
    row = rng.choice(rows)
    row[rng.choice(list(row))] = strange
    if rng.random() < 0.2:
        del row[rng.choice(list(row))]
    data = "\n".join(json.dumps(r) for r in rows).encode() + b"\n"
    place = rng.randrange(len(data))
    return rng.choice([
        lambda: data, lambda: data[:place], lambda: data * 2, lambda: b"", lambda: b"\n\n\n",
        lambda: data[:place] + bytes(rng.randrange(256) for _ in range(3)) + data[place:],
        lambda: data.replace(b"\n", b"\r\n"), lambda: b"\xef\xbb\xbf" + data, lambda: data.replace(b'"', b"'"),
        lambda: data + b"[" * 100_000 + b"\n", lambda: data + b'{"a":' * 100_000 + b"\n",
        lambda: data + b'{"prompt": "' + b"x" * 2_000_000, lambda: data + b"\x00" * 100, lambda: data + b"NaN\n",
        lambda: data.replace(b'"prompt"', b'"chosen": "x", "prompt"'), lambda: data.decode().encode("utf-16"),
        lambda: data + b"7\n", lambda: gzip.compress(data)[:place], lambda: gzip.compress(data)[:-4],
        lambda: gzip.compress(data)])()


def test_five_hundred_malformed_files_give_rows_or_one_sentence(tmp_path):
    rng, refused = random.Random(0), 0
    for number in range(500):
        path = tmp_path / f"{number}.jsonl{'.gz' * (rng.random() < 0.3)}"
        path.write_bytes(malformed(rng))
        for read in (lambda: list(common.SampleFile(str(path))),
                     lambda: common.read_preferences(str(path), 0.5, 0, None),
                     lambda: common.read_prompts(str(path), lambda prompt: True)):
            try:
                read()
            except BadInput as problem:
                refused += 1
                said = common.printable(problem)
                assert path.name in said and "\n" not in said.strip() and len(said) < 1000, said
    assert 300 < refused < 1500


def test_line_references_of_the_readme_lead_where_they_say():
    links = re.findall(r"\[`(\w+)`\]\((\w+\.py)#L(\d+)\)", (HERE / "README.md").read_text())
    assert len(links) > 10
    for name, file, line in links:
        found = [i for i, text in enumerate((HERE / file).read_text().splitlines(), 1)
                 if re.match(rf"\s*def {name}\(", text)]
        assert int(line) in found, f"{name} in {file} is at {found}, the README says {line}"


def test_the_readmes_lifting_example_has_the_gradient_of_the_weighted_loss():
    code = re.search(r"(?s)\n      (targets = input_ids.roll.*?\n)\n", (HERE / "README.md").read_text()).group(1)
    model, z, top, T = tiny_model(), torch.tensor([0.4, -0.2, 0.1]).double(), 0.5, 7
    input_ids = torch.randint(1, V, (3, T), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(T - 1) >= torch.tensor([[2], [4], [3]]))
    mask = torch.nn.functional.pad(mask, (0, 1)).flatten()                      # (B * T,), false at each last token
    response_tokens = mask.view(3, T).sum(1)
    exec(textwrap.dedent("      " + code), {
        **globals(), **vars(rwr), "head_loss": common.head_loss, "rows": mask.nonzero().squeeze(1), **locals()})
    ours = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    nll = plain_nll(model(input_ids).logits.flatten(0, 1), input_ids.roll(-1, dims=1).flatten(), mask)
    w = (z / 0.25).exp()
    ((w.repeat_interleave(T) * nll).sum() / (w * response_tokens).sum()).backward()
    for mine, p in zip(ours, model.parameters()):
        torch.testing.assert_close(mine, p.grad)


def test_the_benchmarks_use_only_what_the_scripts_have():
    ours = {module.__name__: module for module in (common, dt, mle_filter, ppo_baseline, reward_model, rwr)}
    used = {(node.value.id, node.attr, file.name) for file in (HERE / "benchmarks").glob("*.py")
            for node in ast.walk(ast.parse(file.read_text()))
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ours}
    assert len(used) > 50 and not [use for use in used if not hasattr(ours[use[0]], use[1])]


def test_a_report_is_one_page_without_external_files(run):
    done = script("benchmarks/report.py", "--out", run[0], "--conversations", "3")
    page = (run[0] / "report.html").read_text()
    assert "report.html" in done.stdout and "dt target q99, guidance 0.5" in page and page.count("<article>") == 3
    assert not re.search(r"""(src|href)=["'](?!#)|@import|url\((?!#)""", page)
    assert script("benchmarks/report.py", "--out", run[0] / "dt", status=2).stderr.count("leaderboard.jsonl") == 1


def test_plain_language_is_measured_by_the_stated_rules(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE / "benchmarks"))
    import paired
    import reading
    prompt = [{"role": "user", "content": "Where do otters sleep?"}]
    plain = "They sleep on the bank. They like the sun, and they play all day. At night they hide in a hole."
    assert reading.gold(prompt, plain, truncated=False) == 10
    assert reading.gold(prompt, plain, truncated=True) == 8
    assert reading.gold(prompt, plain.replace("sleep", "rest"), truncated=False) == 8
    assert reading.gold(prompt, "They sleep on the bank.", truncated=False) == 7
    measured = reading.measures("Where?", "Otters sleep beside rivers. Simple people wonder.", truncated=False)
    assert measured["syllables a word"] == pytest.approx(13 / 7) and measured["words a sentence"] == 3.5
    assert measured["ease"] == pytest.approx(206.835 - 1.015 * 3.5 - 84.6 * 13 / 7)  # Flesch 1948
    mean, error, prompts = paired.difference([{"a": 1.0, "b": 3.0}, {"a": 3.0, "b": 5.0}], [{"a": 1.0, "b": 1.0}])
    assert (mean, error, prompts) == (2.0, pytest.approx(1.0), 2)


def test_toy_rewards_follow_the_stated_rules():
    prompt = "\n\nHuman: What do otters eat?\n\nAssistant:"
    best = " Good question! They eat meat. They live in rivers. They are small. I hope this helps!"
    assert common.gold_reward(prompt, best) == 5
    for reply, gold in ((" They eat meat.", 2), (" Maybe they eat plants.", -1),
                        (" As for lions, they eat meat.", -0.5), (" Who cares.", -0.5),
                        (" They eat me", -0.25), (" They eat meat. They eat meat.", 2)):
        assert common.gold_reward(prompt, reply) == gold, reply
    assert common.gold_reward(prompt, " They eat meat.", truncated=True) == 1


if __name__ == "__main__":  # a rank of a test above
    globals()[sys.argv[1]](sys.argv[2])
