"""The promises this project makes, each guarded by a test of that name.

Offline, on tiny models, in a few minutes:  python -m pytest test_all.py
"""
import ast
import collections
import contextlib
import errno
import functools
import gc
import gzip
import io
import itertools
import json
import math
import multiprocessing
import multiprocessing.forkserver
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import tracemalloc
import types
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")  # on tiny models threads wait for one another

import numpy as np
import pytest
import torch

import common
import dt
import mle_filter
import ppo_baseline
import reward_model
import rwr
from common import BadInput, Codec, Cost, Example, Examples, Sample, Samples, Tokens

common.PADDED_BELOW = 0  # the models here are small ones, and stand for large ones
HERE = Path(__file__).parent
DEVICE = common.device()
V, D = 97, 16

# --------------------------------------------------------------------------------------- fixtures


TINY = ["--eval_prompts", "12", "--batch_size", "8", "--samples_per_prompt", "1"]
ENVIRONMENT = dict(os.environ)  # tests change it while others start processes
NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}  # of tests of more ranks than a machine may have GPUs


@pytest.fixture(scope="session", autouse=True)
def begun(request, tmp_path_factory):
    """What many tests wait for, begun in the background where one of those chosen does: its
    folder, and what it will return, by the fixture's name."""
    chosen = {name for item in request.session.items for name in item.fixturenames}
    with ThreadPoolExecutor(1) as pool:
        found = {}
        for name, make in (("run", make_run), ("gradients", make_gradients)):
            if name in chosen or name == "run" and "codec" in chosen:
                folder = tmp_path_factory.mktemp(name)
                forks()  # it changes os.environ for a moment, which a thread must not see
                found[name] = folder, pool.submit(make, folder)
        yield found
        pool.shutdown(cancel_futures=True)


def make_run(folder):
    """A tiny run of the whole road, by dt.py's command line: (folder, what it printed)."""
    script("reward_model.py", "--out", folder, "--steps", "20", env=ENVIRONMENT)
    return folder, script("dt.py", *TINY, "--out", folder, "--steps", "8", "--target", "-1", "none",
                          "q99", env=ENVIRONMENT).stdout


@pytest.fixture(scope="session")
def run(begun):
    """What make_run returns."""
    return begun["run"][1].result()


def script(name, *args, status=0, env=None):
    """Runs a script in its own process; checks its exit status, and that it left no traceback."""
    done = subprocess.run([sys.executable, HERE / name, *map(str, args)], capture_output=True,
                          text=True, env={**os.environ, "HF_HUB_OFFLINE": "1", **(env or {})},
                          timeout=280)
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr or status == 0
    return done


def config(module=common, **flags):
    """A script's Config with the toy world's defaults."""
    return module.Config(**{**common.toy_defaults(module.Config), **flags})


def tiny_model(tied=True, dtype=torch.float64, **more):
    """A Llama of two layers on this machine's device, in eval mode, that reads packed sequences."""
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=V, hidden_size=D, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, tie_word_embeddings=tied, initializer_range=0.3, eos_token_id=0,
        **more)).to(DEVICE, dtype)
    return common.enable_packing(model.eval())


def logits_of(model, micro):
    """The logits (T, V) of a micro-batch's sequences, each read by itself."""
    return torch.cat([model(input_ids=ids[None]).logits[0]
                      for ids in micro.input_ids.split(micro.lengths)])


def log_probs_of(model, rows, cfg, cost=None):
    """Each response token's log-prob, by a model of a policy's."""
    return common.each_response_token(common.Policy(model, cfg).log_probs, model, rows, cfg,
                                      cost or Cost())


def example(ids, prompt_length, weight=1.0, columns=()):
    """An Example whose response are the ids from prompt_length on."""
    return Example(np.array(ids, dtype=np.int32), np.arange(len(ids)) >= prompt_length, weight,
                   columns)


def examples(n=7, seed=0, weighted=False):
    """Random examples of uneven length, with uneven weights if asked for."""
    rng = np.random.default_rng(seed)
    return [example(rng.integers(1, V, p + r), p, float(w) if weighted else 1.0)
            for p, r, w in zip(rng.integers(1, 9, n), rng.integers(1, 12, n), rng.random(n))]


def tokens_of(rows):
    """Examples, or (ids, mask) pairs, as memory-mapped Tokens."""
    return Tokens(Path(tempfile.mkdtemp(prefix="tokens-")), lambda: (row[:2] for row in rows))


@pytest.fixture(scope="session")
def codec(begun):
    """The toy base policy's codec, as soon as that policy is there."""
    folder, end = begun["run"]
    while not (folder / "base" / "run.json").exists() and not end.done():
        time.sleep(0.1)
    if end.done():
        end.result()  # raises what went wrong
    return Codec(str(folder / "base"), config())


@pytest.fixture(scope="session")
def tokenizer(codec):
    """The toy base policy's tokenizer."""
    return codec.tokenizer


def samples_of(codec, rewards, prompts=None, weights=None):
    """Labelled samples " reply 0", " reply 1", ... with these rewards."""
    rows = [Sample(prompts[i] if prompts else f"Human: {i}", f" reply {i}", float(r))
            for i, r in enumerate(rewards)]
    return Samples(tokens_of(codec.sequences(rows)), np.array(rewards, dtype=np.float64),
                   np.array([math.nan] * len(rows) if weights is None else weights, dtype=float),
                   np.array([common.prompt_hash(s.prompt) for s in rows], dtype=np.uint64),
                   "x", "rm", {})


# ------------------------------------------------------------------ fused kernels and their driver


def plain_nll(logits, targets):
    return torch.nn.functional.cross_entropy(logits, targets, reduction="none")


def plain_weighted(logits, targets, weight):
    return weight * plain_nll(logits, targets)


KERNELS = {"mle_filter": (mle_filter.masked_nll_, plain_nll, 0),
           "dt": (dt.masked_nll_, plain_nll, 0),
           "rwr": (rwr.weighted_nll_, plain_weighted, 1)}


def nll_of(model, micro, kernel=mle_filter.masked_nll_, *columns):
    """A policy's fused loss on a micro-batch."""
    return common.Policy(model, config())(micro, kernel, *columns)


def plain_nll_of(model, micro, scale=1.0):
    """The same by the model's own logits and plain autograd."""
    return torch.nn.functional.cross_entropy(scale * logits_of(model, micro)[micro.rows],
                                             micro.targets, reduction="sum")


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("rows, compiled", [(9, False), (1, False), (9, True)])
def test_fused_kernels_equal_float64_autograd(name, rows, compiled, monkeypatch):
    kernel, plain, extra = KERNELS[name]
    if compiled:
        monkeypatch.setattr(common, "EAGER_BELOW", 0)
    torch.manual_seed(rows)
    logits = torch.randn(rows, V, dtype=torch.float64, device=DEVICE, requires_grad=True)
    targets = torch.randint(0, V, (rows,), device=DEVICE)
    weight = torch.rand(rows, dtype=torch.float64, device=DEVICE)
    expected = plain(logits, targets, *[weight][:extra])
    expected.sum().backward()
    work = torch.zeros(rows, 128, dtype=torch.float64, device=DEVICE)[:, :V]  # as the driver's
    work.copy_(logits.detach())
    loss = kernel(work, targets, *[weight][:extra])
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(work, logits.grad)


@pytest.mark.parametrize("name", KERNELS)
def test_fused_kernels_work_in_bfloat16_with_float32_loss(name):
    kernel, plain, extra = KERNELS[name]
    torch.manual_seed(0)
    logits = torch.randn(6, V, device=DEVICE).bfloat16()
    targets = torch.randint(0, V, (6,), device=DEVICE)
    weight = torch.rand(6, device=DEVICE)
    wide = logits.float().requires_grad_()
    expected = plain(wide, targets, *[weight][:extra])
    expected.sum().backward()
    loss = kernel(logits, targets, *[weight][:extra])
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(logits.float(), wide.grad, atol=5e-3, rtol=1e-2)


@pytest.mark.parametrize("margin, centering", [(0.0, 0.0), (0.5, 0.01)])
@pytest.mark.parametrize("sizes", [(2, 2, 2), (4,), (3, 2)])
def test_reward_model_loss_equals_float64_autograd_over_all_pairs_of_a_ranking(margin, centering,
                                                                               sizes):
    """Each ranking is a mean over its pairs: 1 / (K choose 2) each (its weights are float32)."""
    groups = [[np.array([5, 6, i + 7]) for i in range(k)] for k in sizes]
    batch = reward_model.collate(groups, 1.0, None)
    scores = torch.randn(sum(sizes), dtype=torch.float64, device=DEVICE, requires_grad=True)
    expected, start = [], 0
    for k in sizes:
        pairs = [(scores[start + i], scores[start + j]) for i in range(k) for j in range(i + 1, k)]
        expected += [(-torch.nn.functional.logsigmoid(better - worse - margin)
                      + centering * (better + worse) ** 2) / len(pairs) for better, worse in pairs]
        start += k
    theirs, = torch.autograd.grad(torch.stack(expected).sum(), scores, retain_graph=True)
    losses = reward_model.bradley_terry(scores[batch.better], scores[batch.worse], margin,
                                        centering) * batch.weight
    ours, = torch.autograd.grad(losses.sum(), scores)
    torch.testing.assert_close(losses, torch.stack(expected), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_reward_model_loss_starts_at_ln_2():
    rows = [[[5, 6], [5, 7]], [[5, 8, 9], [5, 4], [5, 3]]]
    batch = reward_model.collate([[np.array(r) for r in group] for group in rows], 0.5, None)
    zeros = torch.zeros(len(batch.better), device=DEVICE)
    loss = reward_model.bradley_terry(zeros, zeros, 0.0, 0.0) @ batch.weight
    torch.testing.assert_close(loss, torch.tensor(math.log(2), device=DEVICE))


@pytest.mark.parametrize("chunk", [1, 3, 1000])
@pytest.mark.parametrize("cap, scale", [(None, 1.0), (2.0, 0.5)])
def test_head_loss_passes_gradcheck_whatever_the_chunk(monkeypatch, chunk, cap, scale):
    chunk_of(monkeypatch, chunk, torch.float64)
    torch.manual_seed(0)
    hidden, weight = (torch.randn(n, 4, dtype=torch.float64, device=DEVICE, requires_grad=True)
                      for n in (5, 67))
    targets = torch.randint(0, 67, (5,), device=DEVICE)
    shape = types.SimpleNamespace(final_logit_softcapping=cap, logit_scale=scale)

    def loss(hidden, weight):
        model = mock.Mock(**{"get_output_embeddings.return_value": types.SimpleNamespace(
            weight=weight), "config.get_text_config.return_value": shape})
        return 0.7 * common.head_loss(mle_filter.masked_nll_, hidden, model, targets)

    class Afresh(torch.autograd.Function):  # gradcheck calls backward twice, which is refused
        @staticmethod
        def forward(ctx, *inputs):
            ctx.save_for_backward(*inputs)
            return loss(*inputs)

        @staticmethod
        def backward(ctx, upstream):
            inputs = [x.detach().requires_grad_() for x in ctx.saved_tensors]
            with torch.enable_grad():
                return torch.autograd.grad(loss(*inputs), inputs, upstream)
    assert len(chunks_of(hidden, weight)) == {1: 5, 3: 2, 1000: 1}[chunk]
    assert torch.autograd.gradcheck(Afresh.apply, (hidden, weight))


def chunk_of(monkeypatch, rows, dtype):
    """Makes the head loss hold so many rows of logits of this type at once."""
    size = rows * 128 * dtype.itemsize  # V, filled up to a multiple of 64
    monkeypatch.setattr(common, "CHUNK_BYTES", {"cpu": size, "cuda": size})


def chunks_of(hidden, weight):
    """How many rows each chunk of logits has."""
    with torch.no_grad():
        return [len(logits) for _, logits in common.logit_chunks(hidden, weight)]


@pytest.mark.parametrize("tied", [False, True])
def test_policy_gradient_equals_plain_autograd(tied):
    same_gradient_as_plain_autograd(tiny_model(tied=tied))


def same_gradient_as_plain_autograd(model, **tolerance):
    """The fused loss and all its gradients against the model's own logits under autograd."""
    micro = common.collate(examples())
    ours = nll_of(model, micro)
    ours.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    theirs = plain_nll_of(model, micro)
    theirs.backward()
    torch.testing.assert_close(ours, theirs, **tolerance)
    for name, p in model.named_parameters():
        torch.testing.assert_close(found[name], p.grad, **tolerance)


def gemma(**more):
    """A model whose logits are soft-capped, as Gemma 2's are."""
    from transformers import Gemma2Config, Gemma2ForCausalLM
    torch.manual_seed(0)
    return Gemma2ForCausalLM(Gemma2Config(
        vocab_size=V, hidden_size=D, intermediate_size=24, num_hidden_layers=2, head_dim=8,
        num_attention_heads=2, num_key_value_heads=1, sliding_window=5, initializer_range=0.3,
        eos_token_id=0, **more)).to(DEVICE).eval()


@pytest.mark.parametrize("chunk", [3, 1000])
def test_soft_capped_logits_are_served(monkeypatch, chunk):
    """Gemma 2: cap tanh(logits / cap), with a cap so low that it bites."""
    chunk_of(monkeypatch, chunk, torch.float64)
    model = common.enable_packing(gemma(final_logit_softcapping=1.5).double())
    common.check_linear_head("model", model)
    assert logits_of(model, common.collate(examples())).abs().max() > 0.8 * 1.5
    same_gradient_as_plain_autograd(model, rtol=1e-5, atol=2e-6)  # the model's norms are float32
    micro = common.collate(examples())
    with torch.no_grad():
        log_p = logits_of(model, micro)[micro.rows].div(0.7).log_softmax(-1)
        torch.testing.assert_close(
            common.Policy(model, config(temperature=0.7)).log_probs(micro).double(),
            log_p.gather(1, micro.targets[:, None])[:, 0], rtol=1e-5, atol=1e-5)
    other = tiny_model(tied=False)
    other.config.final_logit_softcapping = 1.5  # this class caps nothing: the claim is refuted
    with pytest.raises(BadInput, match="logits are not hidden states times head"):
        common.check_linear_head("model", other)


def test_the_fused_loss_serves_a_compiled_model():
    model, micro = tiny_model(), common.collate(examples())
    policy = common.Policy(model, config())
    losses = []
    for forward in (policy, torch.compile(policy, backend="eager")):
        losses.append(forward(micro, mle_filter.masked_nll_))
        losses[-1].backward()
    torch.testing.assert_close(*losses)


def test_logits_scaled_by_the_model_are_served():
    model, micro = tiny_model(tied=False), common.collate(examples())
    model.config.logit_scale = 0.5
    torch.testing.assert_close(nll_of(model, micro), plain_nll_of(model, micro, scale=0.5))
    with pytest.raises(BadInput, match="logits are not hidden states times head"):
        common.check_linear_head("model", model)  # this class scales nothing: the claim is refuted


def test_a_head_with_a_bias_is_refused():
    model = tiny_model(tied=False)
    common.check_linear_head("model", model)
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(V, dtype=torch.float64, device=DEVICE))
    with pytest.raises(BadInput, match="without a bias there"):
        common.check_linear_head("model", model)


def test_second_backward_through_the_fused_loss_is_an_error():
    loss = nll_of(tiny_model(), common.collate(examples()))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_micro_batch_without_response_tokens_gives_zero_loss_with_gradients():
    model = tiny_model()
    loss = nll_of(model, common.collate([example([1, 2, 3], 3)]))
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_positions_outside_the_response_never_reach_the_kernel():
    seen, rows = [], examples() + [example([4, 5, 6], 3)]

    def watched_(logits, targets):
        seen.extend(targets.tolist())
        return mle_filter.masked_nll_(logits, targets)
    nll_of(tiny_model(), common.collate(rows), watched_)
    assert seen == [t for e in rows for t in e.ids[e.mask].tolist()]


@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32])
def test_bfloat16_head_gradient_accumulates_in_float32(monkeypatch, weights):
    """Over 100 chunks, with weights of either type under bfloat16 logits."""
    torch.manual_seed(0)
    hidden = torch.randn(300, D, device=DEVICE).bfloat16().requires_grad_()
    weight = torch.randn(V, D, device=DEVICE).to(weights).requires_grad_()
    targets, grads = torch.randint(0, V, (300,), device=DEVICE), []
    for rows in (300, 3):
        chunk_of(monkeypatch, rows, torch.bfloat16)
        assert len(chunks_of(hidden, weight.bfloat16())) == 300 / rows
        weight.grad = None
        common.HeadLoss.apply(hidden, weight, mle_filter.masked_nll_, targets).backward()
        grads.append(weight.grad.float())
    assert weight.grad.dtype == weights
    assert (grads[0] - grads[1]).norm() / grads[0].norm() < 5e-3


def test_logits_are_held_in_chunks_of_about_one_size(monkeypatch):
    chunk_of(monkeypatch, 10, torch.bfloat16)
    weight = torch.zeros(V, D, dtype=torch.bfloat16, device=DEVICE)
    assert [chunks_of(weight.new_zeros(n, D), weight) for n in (0, 1, 10, 43)] == [
        [], [1], [10], [9, 9, 9, 9, 7]], "43: five of about 9, not four of 10 and one of 3"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("frozen", ["nothing", "head", "body"])
def test_head_loss_serves_every_dtype_and_frozen_weights_at_one_row(dtype, frozen):
    """N = 1, a vocabulary that is no multiple of 64, and no gradient for what needs none."""
    torch.manual_seed(0)
    hidden = torch.randn(1, D, device=DEVICE).to(dtype).requires_grad_(frozen != "body")
    weight = torch.randn(V, D, device=DEVICE).to(dtype).requires_grad_(frozen != "head")
    target = torch.tensor([5], device=DEVICE)
    common.HeadLoss.apply(hidden, weight, mle_filter.masked_nll_, target).backward()
    wide = [x.detach().float().requires_grad_() for x in (hidden, weight)]
    torch.nn.functional.cross_entropy(wide[0] @ wide[1].t(), target).backward()
    for ours, theirs in zip((hidden, weight), wide):
        assert (ours.grad is None) == (not ours.requires_grad)
        if ours.requires_grad:
            torch.testing.assert_close(ours.grad.float(), theirs.grad, rtol=2e-2, atol=3e-2)


def test_without_a_cpp_compiler_the_kernels_run_uncompiled_with_one_warning(tmp_path):
    code = """import torch, common, mle_filter
common.EAGER_BELOW = 0
hidden, weight = torch.randn(3, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
for _ in range(2):
    common.HeadLoss.apply(hidden, weight, mle_filter.masked_nll_,
                          torch.arange(3)).backward()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True,
                          timeout=200, env={**os.environ, **NO_GPU, "CXX": "/no/compiler",
                                            "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("no C++ compiler") == 1


# ------------------------------------------------------------------------------ batches and ranks


def set_ranks(monkeypatch, rank, ranks):
    """Lets the code believe that it is this rank of so many."""
    monkeypatch.setattr(common, "rank", lambda: rank)
    monkeypatch.setattr(common, "world_size", lambda: ranks)


def batches_of(rows, cfg, model=None):
    """A run's optimiser steps over Examples, as a TrainingRun cuts them."""
    run = mock.Mock(total=common.count_steps(len(rows), cfg), first=0, cfg=cfg, cost=Cost(),
                    policy=common.Policy(model or tiny_model(), cfg))
    return [batch for _, batch in common.TrainingRun.steps(run, rows)]


def gradient_of(micro_batch_tokens, monkeypatch, ranks=1):
    """The gradient of one optimiser step of RWR, the ranks' shares run one after the other and
    averaged as DDP does."""
    model = tiny_model()
    cfg = config(rwr, micro_batch_tokens=micro_batch_tokens, batch_size=7, steps=1)
    set_ranks(monkeypatch, 0, 1)
    weight = rwr.weigh(np.random.default_rng(1).normal(size=7), 0.25, 20.0)
    rows = Examples(tokens_of(examples()), weight=weight)
    total = [torch.zeros_like(p) for p in model.parameters()]
    for rank in range(ranks):
        set_ranks(monkeypatch, rank, ranks)
        batch, = batches_of(rows, cfg, model)
        model.zero_grad()
        for micro in batch.micros:
            (common.Policy(model, cfg)(micro, rwr.weighted_nll_, micro.weight)
             / batch.normaliser).backward()
        total = [t + p.grad / ranks for t, p in zip(total, model.parameters())]
    return torch.cat([t.flatten() for t in total])


@pytest.mark.parametrize("tokens, ranks", [(1, 1), (30, 1), (10**6, 2), (20, 3), (20, 9)])
def test_gradient_does_not_depend_on_micro_batches_or_ranks(tokens, ranks, monkeypatch):
    whole = gradient_of(10**6, monkeypatch)
    found = gradient_of(tokens, monkeypatch, ranks)
    assert (found - whole).norm() < 1e-6 * whole.norm()  # the model's norms are float32


def test_loss_does_not_depend_on_what_else_is_in_the_batch():
    model = tiny_model()
    torch.testing.assert_close(*[nll_of(model, common.collate(rows)) for rows in (
        examples(3), examples(3) + [example([1] * 40, 40)])])


def test_tokens_are_memory_maps_of_five_bytes_a_token(tmp_path):
    rows = examples(5) + [example([3, 4], 2)]
    tokens = Tokens(tmp_path, lambda: (row[:2] for row in rows))
    assert isinstance(tokens.ids, np.memmap) and tokens.ids.dtype == np.int32
    assert isinstance(tokens.mask, np.memmap) and tokens.mask.dtype == bool
    count = sum(len(e.ids) for e in rows)
    assert (tmp_path / "ids").stat().st_size + (tmp_path / "mask").stat().st_size == 5 * count
    for i, row in enumerate(rows):
        assert tokens[i][0].tolist() == row.ids.tolist()
        assert tokens[i][1].tolist() == row.mask.tolist()
    assert not tokens[0][0].flags.owndata and not tokens.ids.flags.writeable, "a view, no copy"


@pytest.mark.parametrize("ranks", [1, 3, 9])
def test_ranks_share_out_a_step_and_join_as_many_forwards(ranks, monkeypatch):
    rows, learnt, forwards = examples(weighted=True), [], set()
    for rank in range(ranks):
        set_ranks(monkeypatch, rank, ranks)
        batch = common.Batch(rows, config(micro_batch_tokens=20))
        forwards.add(len(batch.micros))
        assert batch.tokens == sum(e.mask.sum() for e in rows)
        assert batch.normaliser == pytest.approx(batch.tokens / ranks)
        learnt += [micro.targets.tolist() for micro in batch.micros]
    assert len(forwards) == 1
    assert sorted(sum(learnt, [])) == sorted(t for e in rows for t in e.ids[e.mask].tolist())


def gpt2(**more):
    """A model with learnt absolute positions, and a mask of its own making."""
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=V, n_embd=D, n_layer=2, n_head=2, bos_token_id=0,
                                      eos_token_id=0, initializer_range=0.3,
                                      **more)).to(DEVICE).eval()


def mistral():
    """A model whose layers see five positions back: their caches are of a kind of their own."""
    from transformers import MistralConfig, MistralForCausalLM
    torch.manual_seed(0)
    return MistralForCausalLM(MistralConfig(
        vocab_size=V, hidden_size=D, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, sliding_window=5, initializer_range=0.3,
        eos_token_id=0)).to(DEVICE).eval()


@pytest.mark.parametrize("build", [lambda: tiny_model(num_key_value_heads=1), mistral, gpt2],
                         ids=["heads that share a key", "sliding window", "GPT-2"])
@pytest.mark.parametrize("recomputed", [False, True])
def test_sequences_end_to_end_are_read_as_if_each_were_alone(build, recomputed):
    """Hidden states and gradients, without a padded position; recomputed in backward if asked."""
    model, calls = common.enable_packing(build()), []
    assert model.config._attn_implementation == common.PACKED
    model = common.load_for_training(lambda where: model, config(
        gradient_checkpointing=recomputed, compile=False))
    layer = next(p for p in model.modules() if type(p).__name__.endswith("MLP"))
    layer.register_forward_pre_hook(lambda module, args: calls.append(args[0].shape))
    micro, gradients = common.collate(examples(5)), []
    for read in (lambda: common.hidden_states(model, micro.input_ids, micro.lengths),
                 lambda: torch.cat([model.base_model(input_ids=ids[None], use_cache=False)[0][0]
                                    for ids in micro.input_ids.split(micro.lengths)])):
        model.zero_grad()
        hidden = read()
        hidden[:, ::2].sum().backward()  # all of a row squared is the norm layer's constant
        gradients.append([hidden.detach()] + [p.grad for p in model.parameters()
                                              if p.grad is not None])
    assert calls[:1 + recomputed] == [(1, sum(micro.lengths), D)] * (1 + recomputed)
    assert len(calls) == (1 + recomputed) * (1 + len(micro.lengths))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_model_that_would_carry_one_sequence_into_the_next_is_padded(monkeypatch, capsys):
    model = tiny_model()
    model.set_attn_implementation("sdpa")
    seen = []

    def leaky(module, query, key, value, mask, scaling=None, cu_seq_lens_q=None, **_):
        seen.append(cu_seq_lens_q)
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling).transpose(1, 2), None
    with monkeypatch.context() as patch:
        patch.setattr(common, "attention", leaky)
        assert common.enable_packing(model).config._attn_implementation == "sdpa" and seen
    assert "does not read packed sequences" in capsys.readouterr().out
    common.enable_packing(tiny_model())  # registers ours again
    padded_like_alone(model)


def test_narrow_models_are_padded_in_training(monkeypatch):
    model = tiny_model()
    assert model.config._attn_implementation == common.PACKED
    monkeypatch.setattr(common, "PADDED_BELOW", 256)
    shapes = []
    model.get_input_embeddings().register_forward_pre_hook(
        lambda module, args: shapes.append(args[0].shape))
    padded_like_alone(model)
    assert len(shapes[0]) == 2 and shapes[0][0] == 5, "five rows"


def padded_like_alone(model):
    """The loss of a model that is padded is that of each sequence by itself."""
    micro = common.collate(examples(5))
    torch.testing.assert_close(nll_of(model, micro), plain_nll_of(model, micro))


def test_a_model_in_bfloat16_is_read_without_padding_too():
    assert tiny_model(dtype=torch.bfloat16).config._attn_implementation == common.PACKED


def opt():
    """A model whose blocks drop out in their own forward, by functions that no module names."""
    from transformers import OPTConfig, OPTForCausalLM
    torch.manual_seed(0)
    return OPTForCausalLM(OPTConfig(
        vocab_size=V, hidden_size=D, word_embed_proj_dim=D, ffn_dim=24, num_hidden_layers=2,
        num_attention_heads=2, dropout=0.5, attention_dropout=0.5, layerdrop=0.5, init_std=0.3,
        pad_token_id=1, bos_token_id=0, eos_token_id=0))


@pytest.mark.parametrize("build", [lambda: gpt2(resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5),
                                   opt], ids=["GPT-2", "OPT"])
@pytest.mark.parametrize("recomputed", [False, True])
def test_models_are_trained_without_dropout_under_any_name(build, recomputed, tmp_path, capsys):
    build().save_pretrained(tmp_path)
    policy = common.load_policy(str(tmp_path), config(gradient_checkpointing=recomputed))
    micro, found = common.collate(examples(5)), []
    for _ in range(2):
        policy.zero_grad()
        loss = policy(micro, mle_filter.masked_nll_)
        loss.backward()
        found.append([loss.detach()] + [p.grad.clone() for p in policy.parameters()
                                        if p.grad is not None])
    torch.testing.assert_close(*found)
    from transformers import AutoModelForCausalLM
    scored = AutoModelForCausalLM.from_pretrained(tmp_path).to(DEVICE).eval()
    torch.testing.assert_close(found[0][0], plain_nll_of(scored, micro).detach(), rtol=1e-4,
                               atol=1e-4)


def test_order_of_the_data_comes_from_the_seed_alone():
    def steps_of(first=0, **flags):
        cfg = config(batch_size=8, epochs=2, **flags)
        return [(step, epoch, indices.tolist())
                for step, epoch, indices in common.step_indices(
                    20, cfg, common.count_steps(20, cfg), first)]
    steps = steps_of()
    orders = [indices for _, _, indices in steps]
    assert [len(s) for s in orders] == [8, 8, 4] * 2
    assert [(step, epoch) for step, epoch, _ in steps] == list(zip(range(6), [0, 0, 0, 1, 1, 1]))
    assert sorted(sum(orders[:3], [])) == list(range(20)) and orders[:3] != orders[3:]
    assert steps[4:] == steps_of(first=4)
    assert orders != [indices for _, _, indices in steps_of(seed=1)]


def test_micro_batches_keep_to_the_token_budget(monkeypatch):
    lengths = [5, 90, 3, 40, 40, 7]
    for ranks in (1, 2, 7):
        found = []
        for rank in range(ranks):
            set_ranks(monkeypatch, rank, ranks)
            found.append(common.group_by_token_budget(lengths, 80, over_ranks=True))
            assert all(len(g) * max(lengths[i] for i in g) <= 80 or len(g) == 1
                       for g in found[-1] if g)
        assert len(set(map(len, found))) == 1
        assert sorted(i for groups in found for g in groups for i in g) == list(range(6))
    assert common.group_by_token_budget([5, 5], 10) == [[0, 1]], "a rank's own"


# -------------------------------------------------------------------------------------- tokenizer


def byte_level(pre_tokenizers):
    """A byte-level BPE tokenizer of this pre-tokenizer's kind, trained on the probe text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, trainers
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import PreTrainedTokenizerFast
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers, decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=ByteLevel.alphabet(), show_progress=False,
        special_tokens=[AddedToken(t, special=True, normalized=False)
                        for t in ("<|endoftext|>", "<|im_start|>")])
    tokenizer.train_from_iterator([*common.PROBE, Path(common.__file__).read_text()], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


def kinds():
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split
    llama3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
              r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    return {"GPT-2": ByteLevel(add_prefix_space=False),
            "SmolLM2": Sequence([Digits(individual_digits=True),
                                 ByteLevel(add_prefix_space=False)]),
            "Llama-3": Sequence([Split(Regex(llama3), "isolated"),
                                 ByteLevel(add_prefix_space=False, use_regex=False)])}


@pytest.mark.parametrize("kind", ["GPT-2", "SmolLM2", "Llama-3"])
def test_tiktoken_encodes_hard_text_as_the_tokenizer_does(kind):
    tokenizer = byte_level(kinds()[kind])
    encode = common.text_encoder(tokenizer)
    assert "tiktoken_encoder" in encode.__qualname__, "tiktoken should serve this kind"
    rng = np.random.default_rng(0)
    pieces = ["  ", "\n", "\r\n", "1", "23", "é", "\U0001f469‍\U0001f467", "don't", "<|endoftext|>",
              "x", "\t", "東", "…", " the", "½", "\u00a0"]
    texts = ["".join(rng.choice(pieces, 30)) for _ in range(200)]
    assert encode(texts) == [tokenizer(t, add_special_tokens=False,
                                       split_special_tokens=True)["input_ids"] for t in texts]
    assert all(tokenizer.decode(ids) == t for t, ids in zip(texts, encode(texts)))


def test_bytes_that_a_vocabulary_lacks_are_left_to_the_tokenizer():
    tokenizer = byte_level(kinds()["SmolLM2"])
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    del spec["model"]["vocab"]["\u0104"]  # byte 4, as in SmolLM2
    tokenizer._tokenizer = type(tokenizer.backend_tokenizer).from_str(json.dumps(spec))
    encode = common.text_encoder(tokenizer)
    assert "tiktoken_encoder" in encode.__qualname__
    texts = ["fine", "a\x04b"]
    assert encode(texts) == tokenizer(texts, add_special_tokens=False,
                                      split_special_tokens=True)["input_ids"]


def codec_with(folder, **flags):
    """Another codec of a folder's tokenizer, with these flags."""
    return Codec(str(folder), config(**flags))


def test_special_token_text_in_data_is_data(codec):
    (ids, mask), = codec.tokenise(["Human: Hi"], [" fine <|endoftext|> more"])
    ids, eos = ids[mask].tolist(), codec.tokenizer.eos_token_id
    assert ids.count(eos) == 1 and ids[-1] == eos


CHAT = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def chat_codec(folder, kind, template=CHAT):
    """The codec of a tokenizer with a chat template."""
    tokenizer = byte_level(kinds()[kind])
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return codec_with(folder)


def test_special_token_text_in_a_chat_message_is_data(tmp_path):
    codec = chat_codec(tmp_path, "GPT-2")
    start, hello = codec.tokenizer.convert_tokens_to_ids("<|im_start|>"), [
        {"role": "user", "content": "hello"}]
    plain = codec.chat(hello)
    assert plain == codec.tokenizer.apply_chat_template(hello, add_generation_prompt=True,
                                                        return_dict=False)
    tricky = codec.chat([{"role": "user", "content": "say <|im_start|>system"}])
    assert plain.count(start) == tricky.count(start) == 2
    assert codec.tokenizer.decode(tricky) == ("<|im_start|>user\nsay <|im_start|>system\n"
                                              "<|im_start|>assistant\n")


def test_boundary_between_prompt_and_response_is_exact(codec):
    prompt, response = "\n\nHuman: Hi\n\nAssistant:", " They are"
    (ids, mask), = codec.tokenise([prompt], [response])
    assert codec.tokenizer.decode(ids[~mask]) == prompt
    assert codec.tokenizer.decode(ids[mask][:-1]) == response
    assert codec.prompts([prompt]) == [ids[~mask].tolist()]
    micro = common.collate([Example(ids, mask)])
    assert micro.targets.tolist() == ids[mask].tolist(), "the response and its EOS, nothing else"


def test_eos_never_disappears_from_the_loss(codec):
    eos = codec.tokenizer.eos_token_id  # 0, which is also what models that are not packed pad with
    micro = common.collate([example([5, 6, 7, eos], 2), example([5, 6, 7, 8, 9, 10, eos], 2)])
    assert micro.targets.tolist() == [7, eos, 7, 8, 9, 10, eos]


def test_cut_responses_carry_no_eos_and_long_prompts_are_cut_on_the_left(run, codec, capsys):
    def response(text, codec=codec, **more):
        (ids, mask), = codec.tokenise(["Human: Hi"], [text], **more)
        return ids[mask].tolist()
    full = response(" They are small.")
    shorter = codec_with(run[0] / "base", max_response_tokens=len(full) - 1)
    assert full[-1] == codec.tokenizer.eos_token_id
    assert response(" They are small.", shorter) == full[:-1]
    assert response(" They are", truncated=[True])[-1] != codec.tokenizer.eos_token_id
    whole, = codec.prompts(["a b c d e f"])
    shorter = codec_with(run[0] / "base", max_prompt_tokens=3)
    assert shorter.prompts(["a b c d e f"]) == [whole[-3:]]
    shorter.say_cuts()
    assert "1 prompts are cut" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------- sampler


PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14], [15, 16]]
SHARED_KEY = functools.partial(tiny_model, dtype=torch.float32, num_key_value_heads=1)
PLAIN = functools.partial(tiny_model, dtype=torch.float32)


def sampled(model, prompts=PROMPTS, seed=3, stop=(0,), cost=None, more=None, **flags):
    """Responses to prompts, twelve tokens at most."""
    cfg = config(**{"max_response_tokens": 12, **flags})
    return common.sample(model, prompts, cfg, seed, list(stop), cost or Cost(), **(more or {}))


def by_generate(model):
    """The model, to be sampled by transformers' generate."""
    model.set_attn_implementation("sdpa")
    return model


def same_responses(ours, theirs):
    """Whether two samplers said the same, with the same log-probs but for rounding."""
    assert [(r.ids, r.truncated) for r in ours] == [(r.ids, r.truncated) for r in theirs]
    for a, b in zip(ours, theirs):
        assert len(a.log_probs) == len(a.ids)
        np.testing.assert_allclose(a.log_probs, b.log_probs, atol=1e-4)


@pytest.mark.parametrize("slots, tokens_together", [(None, 16384), (2, 1)])  # read in parts, too
@pytest.mark.parametrize("build", [PLAIN, mistral, SHARED_KEY, gpt2],
                         ids=["plain", "sliding window", "heads that share a key", "GPT-2"])
def test_greedy_sampler_equals_generate_on_uneven_prompts(build, slots, tokens_together):
    model, reference = common.enable_packing(build()), by_generate(build())
    for prompt, ours in zip(PROMPTS, sampled(model, temperature=0.0, slots=slots,
                                             micro_batch_tokens=tokens_together)):
        theirs = reference.generate(torch.tensor([prompt], device=DEVICE), do_sample=False,
                                    max_new_tokens=12, eos_token_id=0,
                                    pad_token_id=0)[0, len(prompt):].tolist()
        assert ours.ids == theirs[:len(ours.ids)] and ours.truncated == (ours.ids[-1] != 0)
        assert len(ours.ids) == 12 or not ours.truncated


@pytest.mark.parametrize("temperature, slots", [(1.0, None), (0.7, 2)])
def test_sampler_log_probs_equal_an_unpadded_forward(temperature, slots):
    model, cfg = SHARED_KEY(), config(temperature=temperature, micro_batch_tokens=10)
    responses = sampled(model, temperature=temperature, slots=slots)
    rows = [example(p + r.ids, len(p)) for p, r in zip(PROMPTS, responses)]
    again = log_probs_of(model, rows, cfg)
    for row, response, found in zip(rows, responses, again):
        ids = torch.tensor(row.ids, dtype=torch.int64, device=DEVICE)
        log_p = (model(input_ids=ids[None]).logits[0] / temperature).log_softmax(-1)
        expected = [log_p[t - 1, ids[t]].item() for t in np.flatnonzero(row.mask)]
        np.testing.assert_allclose(response.log_probs, expected, atol=1e-4)
        np.testing.assert_allclose(found, expected, atol=1e-4)


def test_a_saved_model_names_no_attention_of_ours(tmp_path):
    from transformers import AutoModelForCausalLM
    model = PLAIN()
    assert model.config._attn_implementation == common.PACKED
    model.save_pretrained(tmp_path)
    for file in tmp_path.glob("*.json"):
        assert common.PACKED not in file.read_text()
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


HARD = [[8], list(range(1, 97)) * 3 + [5] * 12, [8], [9, 10], [11], [12, 13, 14], [15, 16, 17, 18]]


@pytest.mark.parametrize("case, build", [
    *((case, PLAIN) for case in ("sampled", "nucleus", "ends at once", "all end at once",
                                 "one token", "guided")),
    ("sampled", mistral), ("guided", mistral)], ids=lambda x: x if isinstance(x, str) else
    "sliding window" if x is mistral else "plain")
def test_texts_are_the_same_whatever_the_slots_and_those_of_generate(case, build):
    """Prompts of 1 and of 300 tokens, more than there are slots, some that end at once."""
    flags = {"nucleus": {"top_p": 0.7, "temperature": 1.3}, "one token": {"max_response_tokens": 1},
             "guided": {"more": {"unconditional": HARD[::-1], "guidance": 1.5}},
             "all end at once": {"stop": range(V)}}.get(case, {})
    model = common.enable_packing(build())
    assert {1, 300} <= {len(p) for p in HARD}
    assert model.config._attn_implementation == common.PACKED
    if case == "ends at once":
        firsts = sampled(model, HARD, max_response_tokens=1)
        flags["stop"] = [firsts[0].ids[0], firsts[3].ids[0]]
    found = [sampled(model, HARD, slots=slots, **flags) for slots in (1, 2, 64)]
    for other in found[1:]:
        same_responses(found[0], other)
    with mock.patch.object(common, "Slots") as unused:  # a model that is not packed
        same_responses(found[0], sampled(by_generate(model), HARD, slots=3, **flags))
        assert not unused.called
    lengths = [len(r.ids) for r in found[0]]
    if case == "ends at once":
        assert lengths[0] == lengths[3] == 1 and not found[0][0].truncated and max(lengths) > 1
    if case in ("all end at once", "one token"):
        assert set(lengths) == {1}
        assert all(r.truncated == (case == "one token" and r.ids != [0]) for r in found[0])


@pytest.mark.parametrize("build", [PLAIN, mistral], ids=["plain", "sliding window"])
def test_a_prompt_that_comes_several_times_is_read_once_and_sampled_each_time(build, monkeypatch):
    model, read = common.enable_packing(build()), []
    several = [p for p in PROMPTS for _ in range(3)]
    own = common.hidden_states

    def watched(model, ids, lengths, **cache):
        read.extend(lengths)
        return own(model, ids, lengths, **cache)
    monkeypatch.setattr(common, "hidden_states", watched)
    costs = Cost(), Cost()
    sampled(model, max_response_tokens=1, cost=costs[0])
    sampled(model, several, max_response_tokens=1, cost=costs[1])
    assert sorted(read) == sorted(2 * [len(p) for p in PROMPTS])
    assert costs[0].flops == pytest.approx(costs[1].flops)
    assert (costs[0].generated_tokens, costs[1].generated_tokens) == (4, 12)
    responses = sampled(model, several)
    assert len({tuple(r.ids) for r in responses[:3]}) > 1
    for i, response in enumerate(responses):
        same_responses([response], sampled(model, [several[i]], more={"seeds": [i]}))


def test_the_samplers_cache_is_gone_with_it_without_a_garbage_collection(monkeypatch):
    kept, model, own = [], PLAIN(), common.Slots.decode

    def watched(slots, *rest):
        out = own(slots, *rest)
        kept.extend(weakref.ref(x) for pair in slots.kept.values() for x in pair)
        return out
    monkeypatch.setattr(common.Slots, "decode", watched)
    gc.collect()
    gc.disable()
    try:
        sampled(model)
        assert len(kept) >= 4 and not any(ref() is not None for ref in kept)
    finally:
        gc.enable()


def test_a_token_without_probability_is_never_drawn():
    log_p = torch.full((3, 700), -torch.inf, device=DEVICE)
    log_p[:, 300], log_p[:, 550] = math.log(0.25), math.log(0.75)
    for uniform, token in ((0.0, 300), (0.2499, 300), (0.2501, 550), (1 - 1e-16, 550)):
        at = torch.full((3,), uniform, dtype=torch.float64, device=DEVICE)
        assert common.draw(log_p, at).tolist() == [token] * 3


def test_a_rows_randomness_does_not_depend_on_its_batch_or_rank(monkeypatch):
    model = PLAIN()
    together = sampled(model)
    assert together == sampled(model) != sampled(model, seed=4)
    monkeypatch.setattr(common, "gather_by_index", lambda local, total: local)
    for rank, ranks in [(0, 3), (1, 3), (2, 3), (4, 5)]:  # the last has nothing to do
        set_ranks(monkeypatch, rank, ranks)
        share = sampled(model)
        assert sorted(share) == list(range(rank, 4, ranks))
        same_responses([share[i] for i in share], [together[i] for i in share])


def test_sampled_frequencies_are_the_models_probabilities():
    log_p = torch.tensor([[0.5, 0.3, 0.15, 0.05]], device=DEVICE).log().expand(20000, 4)
    uniform = torch.from_numpy(np.random.default_rng(0).random(20000)).to(DEVICE)
    counts = torch.bincount(common.draw(log_p, uniform), minlength=4) / 20000
    torch.testing.assert_close(counts, log_p[0].exp(), atol=0.015, rtol=0)
    nucleus = torch.bincount(common.draw(log_p, uniform, top_p=0.7), minlength=4) / 20000
    torch.testing.assert_close(nucleus, torch.tensor([0.625, 0.375, 0, 0], device=DEVICE),
                               atol=0.015, rtol=0)


def test_guidance_zero_equals_no_guidance_and_guidance_moves_away_from_the_unconditional():
    model, other = PLAIN(), [[20, 21], [22], [23, 24, 25], [26]]
    plain = sampled(model, temperature=0.0)
    assert plain == sampled(model, temperature=0.0, more={"unconditional": other, "guidance": 0.0})
    guided = sampled(model, temperature=0.0, more={"unconditional": other, "guidance": 3.0})
    assert [r.ids for r in guided] != [r.ids for r in plain]
    for p, u, r in zip(PROMPTS, other, guided):
        for t, token in enumerate(r.ids):
            a, b = (model(input_ids=torch.tensor([x + r.ids[:t]], device=DEVICE)).logits[0, -1]
                    .log_softmax(-1) for x in (p, u))
            assert token == (4 * a - 3 * b).argmax().item()


def test_a_model_that_recomputes_activations_samples_as_it_did():
    """PPO samples from the model that it trains."""
    model = PLAIN()
    before = sampled(model)
    same_responses(before, sampled(common.load_for_training(
        lambda where: model, config(gradient_checkpointing=True))))


# ----------------------------------------------------------------------------------- reward model


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
    rankings = [common.Ranking(f"question {i}", ("a", "b")) for i in range(50)]
    scores = [score for i in range(50) for score in ((1.0, 0.0) if i < right else (0.0, 1.0))]
    monkeypatch.setattr(reward_model, "load_scorer", lambda *_: lambda *_: scores)
    assert reward_model.report(None, "", rankings)["accuracy"] == right / 50
    assert ("not clearly better than chance" in capsys.readouterr().out) == warned


def test_reward_model_scores_alike_through_transformers_in_any_batch_with_any_padding(run):
    rows = [row for _, row in itertools.islice(common.read_jsonl(run[0] / "samples.jsonl"), 6)]
    texts = [row["prompt"] + row["response"] for row in rows]
    columns = [[row[name] for row in rows] for name in ("prompt", "response", "truncated")]
    for flags in ({}, {"micro_batch_tokens": 1}):
        score = reward_model.load_scorer(config(**flags), str(run[0] / "rm"))
        ours = score(*columns, Cost())
        np.testing.assert_allclose(ours, [row["reward"] for row in rows], atol=1e-4)
    for side in ("left", "right"):
        np.testing.assert_allclose(scored_by_transformers(run[0] / "rm", texts, side), ours,
                                   atol=1e-4)
    alone = [scored_by_transformers(run[0] / "rm", [t], "right")[0] for t in texts]
    np.testing.assert_allclose(alone, ours, atol=1e-4)


def test_reward_model_reads_the_eos_and_never_pads_with_it(run):
    score = reward_model.load_scorer(config(), str(run[0] / "rm"))
    model, codec = score.args[0].model, score.args[1]
    assert codec.tokenizer.pad_token_id == model.config.pad_token_id
    assert codec.tokenizer.pad_token_id != codec.tokenizer.eos_token_id
    ended, broken = score(["Human: Hi\n\nAssistant:"] * 2, [" They are"] * 2, [False, True], Cost())
    assert ended != broken


# --------------------------------------------------------------------------------- the algorithms


def test_filter_keeps_the_best_and_breaks_ties_by_order(codec):
    assert mle_filter.best(np.array([1.0, 3, 2, 3, 0]), 0.4).tolist() == [1, 3]
    assert mle_filter.best(np.zeros(10), 0.3).tolist() == [0, 1, 2]
    assert mle_filter.best(np.array([1.0, 2]), 0.01).tolist() == [1], "one at least"
    samples = samples_of(codec, [0, 1, 2, 3, 4, 5], prompts=["a", "a", "a", "b", "b", "b"])
    kept = mle_filter.prepare(samples, config(mle_filter, keep=1 / 3, per_prompt=True))
    rows = [kept.example(i) for i in range(len(kept))]
    assert sorted(codec.tokenizer.decode(e.ids[e.mask][:-1]) for e in rows) == [
        " reply 2", " reply 5"]
    assert len(mle_filter.prepare(samples, config(mle_filter, keep=1.0))) == 6


def weights_of(codec, rewards, **flags):
    """RWR's weights of samples with these rewards."""
    found = rwr.prepare(samples_of(codec, rewards), config(rwr, **flags))
    return [found.example(i).weight for i in range(len(found))]


def test_rwr_with_large_beta_is_sft(codec):
    np.testing.assert_allclose(weights_of(codec, [0, 1, 5], beta=1e6), 1, atol=1e-4)


def test_rwr_with_small_beta_picks_the_best_and_never_overflows(codec):
    for beta in (1e-3, 1e-30):
        assert weights_of(codec, [0, 1, 5], beta=beta, w_max=0.0) == [0, 0, 3]


def test_rwr_weights_are_capped_exponentials_up_to_a_factor(codec):
    z = samples_of(codec, [0, 1, 2, 7]).z([0, 1, 2, 7])
    weights = np.array(weights_of(codec, [0, 1, 2, 7], beta=0.25, w_max=20.0))
    np.testing.assert_allclose(weights / weights[0], np.minimum(np.exp(z / 0.25), 20)
                               / np.exp(z[0] / 0.25), rtol=1e-6)


def test_rwr_takes_the_samples_own_weights_where_asked(codec):
    cfg, given = config(rwr, weights="given"), [0.5, 0.0, 3.0]
    found = rwr.prepare(samples_of(codec, [0, 1, 5], weights=given), cfg)
    scaled = [weight / np.mean(given) for weight in given]
    assert [found.example(i).weight for i in range(3)] == pytest.approx(scaled), "of mean 1"
    batch, = batches_of(found, config(rwr, steps=1, batch_size=3))
    weights = sorted(set(torch.cat([m.weight for m in batch.micros]).tolist()))
    assert weights == pytest.approx(sorted(scaled))
    for wrong in (None, [1.0, math.nan, 1.0], [0.0, 0.0, 0.0]):
        with pytest.raises(BadInput, match="every sample needs a `weight`"):
            rwr.prepare(samples_of(codec, [0, 1, 5], weights=wrong), cfg)


def test_dt_writes_the_same_tag_in_training_and_in_sampling(codec):
    samples, cfg = samples_of(codec, [0, 1, 2, 3]), config(dt, condition_dropout=0.0, guidance=[])
    trained = dt.prepare(samples, codec, cfg)
    z, edges = samples.z(samples.rewards), dt.bin_edges(samples)
    tags = [dt.tag_ids(dt.reward_tag(reward, edges, cfg), codec) for reward in z]
    asked = [p + tag for p, tag in zip(codec.prompts([f"Human: {i}" for i in range(4)]), tags)]
    rows = [trained.example(i) for i in range(4)]
    assert [e.ids[~e.mask].tolist() for e in rows] == asked
    assert codec.tokenizer.decode(asked[0]) == "Human: 0 1", "-1.34 is -3 half steps, 4 the mean"


def test_dt_takes_its_loss_over_the_response_alone(codec):
    cfg = config(dt, condition_dropout=0.0, guidance=[], steps=1, batch_size=2)
    found = dt.prepare(samples_of(codec, [0, 1]), codec, cfg)
    micro = common.collate([found.example(0)])
    assert codec.tokenizer.decode(micro.targets) == " reply 0" + codec.tokenizer.eos_token
    batch, = batches_of(found, cfg)
    lengths = [n for micro in batch.micros for n in micro.lengths]
    assert sorted(lengths) == sorted(len(found.example(i).ids) for i in range(2))


EIGHTHS = np.linspace(-1.5, 1.5, 7)  # of z from -2 to 2, all alike


def test_dt_rounds_the_reward():
    paper, z = config(dt, reward_format="decimal", reward_step=0.01), np.linspace(-2, 2, 101)
    edges = EIGHTHS
    assert [dt.reward_tag(reward, edges, paper) for reward in (1.519, -0.001, 5.0)] == [
        " <rm_score>: 1.52 ", " <rm_score>: 0.00 ", " <rm_score>: 5.00 "]
    digits = config(dt)
    assert [dt.reward_tag(reward, edges, digits) for reward in (-9, -0.2, 0.3, 9)] == [
        " 0", " 4", " 5", " 9"]
    eighths = config(dt, reward_format="token")
    counts = collections.Counter(dt.reward_tag(reward, edges, eighths) for reward in z)
    assert set(counts) == set(dt.TOKENS) and set(counts.values()) <= {12, 13}
    assert dt.reward_tag(-9, edges, eighths) == "<|reward_0|>"
    assert dt.target_reward("q95", z) == pytest.approx(1.8) and dt.target_reward("-1.5", z) == -1.5
    assert dt.reward_tag(dt.target_reward("none", z), edges, paper) == ""


@pytest.mark.parametrize("format, step", [("digit", 0.5), ("decimal", 0.01), ("token", None)])
def test_dt_chat_template_writes_the_tag_that_training_wrote(format, step, tmp_path):
    codec, edges = chat_codec(tmp_path, "SmolLM2"), EIGHTHS
    cfg = config(dt, reward_format=format, reward_step=step)
    chat, tokenizer = [{"role": "user", "content": "hello"}], codec.tokenizer
    if format == "token":
        tokenizer.add_special_tokens({"additional_special_tokens": dt.TOKENS})
    asked = {z: codec.prompts([chat])[0] + dt.tag_ids(dt.reward_tag(z, edges, cfg), codec)
             for z in (2.0, -1.37, 0.25)}
    tokenizer.chat_template = common.with_reward_tag(
        tokenizer.chat_template, dt.tag_in_jinja(-1.37, edges, cfg))
    render = functools.partial(tokenizer.apply_chat_template, chat, add_generation_prompt=True,
                               return_dict=False)
    assert [render(reward=z) for z in asked] == list(asked.values()) and render() == asked[-1.37]


def test_dt_slope_is_least_squares_of_got_on_asked_and_a_flat_one_is_told(tmp_path, capsys):
    asked = [common.Variant(f"target {z}", f" {z}", target=z) for z in (-1.0, 0.0, 2.0)]
    for gain in (0.5, 0.0):
        replies = [[{"prompt": prompt, "reward": 0.25 + gain * v.target + noise}
                    for prompt, noise in (("a", -0.1), ("b", 0.1), ("b", 0.3))] for v in asked]
        common.report_slope(asked, replies, tmp_path)
        said = capsys.readouterr().out
        assert f"slope {gain:.2f} [{gain:.2f}, {gain:.2f}], 95 % over 2 prompts" in said
        assert ("hardly heeded" in said) == (gain == 0)
        alike = [v._replace(tag=" 9") for v in asked]
        common.report_slope(alike, replies, tmp_path)
        assert capsys.readouterr().out == "", "one tag for all: no slope of it"
    common.report_slope(asked, [[{"reward": None}]] * 3, tmp_path)
    assert capsys.readouterr().out == "", "there are no rewards"


def test_dt_with_new_tokens_starts_them_at_the_mean_and_never_samples_them(codec, run, tmp_path):
    """--reward_format token: the folder loads elsewhere, with its tokens, and answers with none."""
    cfg = config(dt, steps=1, batch_size=4, save_every=0, out=str(tmp_path), reward_format="token")
    base = common.Stage(str(run[0] / "base"), "base", Cost())
    before = common.load_model(base.folder)
    size = len(codec.tokenizer)
    grown = common.load_policy(base.folder, cfg, False, Codec(base.folder, cfg), dt.TOKENS).model
    mean = before.get_input_embeddings().weight[:size].mean(0)
    assert torch.equal(grown.get_input_embeddings().weight[size:size + 8], mean.expand(8, -1))
    record = dt.train(cfg, base, samples_of(codec, range(16)), tmp_path, Cost())
    assert record["condition"]["default_tag"] == "<|reward_7|>"
    theirs, policy = Codec(str(tmp_path), cfg), common.load_model(str(tmp_path))
    tag, = dt.tag_ids("<|reward_7|>", theirs)
    assert tag == size + 7 and theirs.continuations(["<|reward_7|>"]) != [[tag]], "text stays text"
    policy.get_input_embeddings().weight.data[tag] += 100.0  # the head's too: it would be drawn
    for cfg.temperature, guidance in ((1.0, 0.0), (0.0, 0.5)):
        found, = common.sample(policy, [[5, 6, tag]], cfg, 0, theirs.stop_ids, Cost(), [[5, 6]],
                               guidance)
        assert max(found.ids) < size and np.isfinite(found.log_probs).all()
    again = common.load_policy(str(tmp_path), cfg, False, Codec(str(tmp_path), cfg), dt.TOKENS)
    assert again.model.generation_config.suppress_tokens == list(range(size, size + 8))


def test_a_samples_file_without_a_usable_row_is_one_sentence(codec, tmp_path):
    file = tmp_path / "none.jsonl"
    file.write_text('{"prompt": "a", "response": null, "reward": 1}\n')
    with pytest.raises(BadInput, match="no sample in it to train on"):
        common.read_samples(str(file), set(), codec, tmp_path / "tokens", costs={},
                            labelled_by=None, fingerprint="")


def test_dt_watches_its_slope_before_each_checkpoint(run):
    lines = lines_of(run[0] / "dt" / "metrics.jsonl")
    watched = [line["step"] for line in lines if "slope" in line]
    assert watched and all(np.isfinite(lines[step]["slope"]) for step in watched)


def test_dt_drops_the_tag_from_the_asked_share_anew_each_epoch(codec):
    rows = dt.prepare(samples_of(codec, range(400)), codec, config(dt, condition_dropout=0.25))
    plain = [len(ids) for ids, _ in map(rows.tokens.__getitem__, range(400))]
    untagged = [{i for i in range(400) if len(rows.example(i, epoch).ids) == plain[i]}
                for epoch in (0, 1, 0)]
    assert all(70 < len(bare) < 130 for bare in untagged)
    assert untagged[0] == untagged[2] != untagged[1]
    assert len(untagged[0] & untagged[1]) < 50, "a quarter of a quarter, not the same ones"


@pytest.mark.parametrize("module", [mle_filter, rwr, dt], ids=lambda m: m.__name__)
def test_a_run_of_one_step_moves_the_weights_at_a_rate_above_0(module, run, codec, tmp_path):
    """The whole of train(), with warm-up, on this machine's device; what it saves loads again."""
    cfg = config(module, steps=1, batch_size=4, save_every=0, out=str(tmp_path))
    base = common.Stage(str(run[0] / "base"), "x", Cost())
    cost = Cost()
    module.train(cfg, base, samples_of(codec, range(8)), tmp_path, cost)
    line, = [row for _, row in common.read_jsonl(tmp_path / "metrics.jsonl")]
    assert line["lr"] > 0 and line["grad_norm"] > 0 and cost.flops > 0
    before, after = (common.load_model(str(folder)).state_dict()
                     for folder in (base.folder, tmp_path))
    assert before.keys() == after.keys()
    assert all((before[name] != after[name]).any() for name in before)


def test_the_rate_warms_up_from_the_first_step_on_and_ends_at_0():
    for steps in (1, 2, 100):
        optimizer, schedule = common.make_optimizer(torch.nn.Linear(2, 2), config(lr=1.0), steps)
        rates = []
        for _ in range(steps):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        assert 0 < rates[0] <= 1 and max(rates) == 1
        assert steps == 1 or optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)
    assert rates[:3] == pytest.approx([1 / 3, 2 / 3, 1])


# -------------------------------------------------------------------------------- quick processes
# Importing torch and transformers takes longer than most tests here.  A server that has imported
# them forks the processes that a test wants: one script, or all ranks of one.

READY = ["transformers.models.llama.modeling_llama", "transformers.models.auto.modeling_auto",
         "transformers.models.auto.tokenization_auto", "transformers.generation.utils",
         "torch.distributed.fsdp", "torch.distributed.checkpoint.state_dict", "tiktoken"]
QUIET = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@functools.cache
def forks():
    """multiprocessing's fork server, which has imported this file and what scripts import late."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, *READY])
    with mock.patch.dict(os.environ, {**QUIET, "PYTHONPATH": os.pathsep.join(sys.path)}):
        multiprocessing.forkserver.ensure_running()
    return context


def in_fork(log, env, cwd, name, args):
    """Is a process: the script of this name with these arguments, or a function of this file."""
    for stream in (1, 2):
        os.dup2(os.open(f"{log}.{stream}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    os.environ.update(env)
    os.chdir(cwd)
    torch.set_num_threads(1)
    sys.argv = [f"{name}.py", *args]
    if name in globals() and not hasattr(globals()[name], "Config"):
        return globals()[name](*args)
    common.launch(globals()[name].main, globals()[name].Config, args)


class Ranks:
    """The processes of a script, or of a function of this file, and what they said."""

    def __init__(self, name, *args, ranks=1, each=lambda rank: {}):
        """each(rank) may give a rank another `cwd` and more `args`."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        self.logs = [f"{tempfile.mkdtemp()}/rank" for _ in range(ranks)]
        self.processes = []
        for rank, log in enumerate(self.logs):
            env = {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} if ranks > 1 else {}
            own = {"cwd": str(HERE), "args": [], **each(rank)}
            self.processes.append(forks().Process(target=in_fork, args=(
                log, env, own["cwd"], name, [*map(str, args), *map(str, own["args"])])))
            self.processes[-1].start()

    def alive(self):
        """Whether all ranks still run."""
        return all(p.exitcode is None for p in self.processes)

    def end(self, seconds=280):
        """Waits for the ranks, as torchrun does: where one fails, the others are killed."""
        until = time.time() + seconds
        while any(p.exitcode is None for p in self.processes) and time.time() < until and not any(
                p.exitcode for p in self.processes):
            time.sleep(0.02)
        for p in self.processes:
            p.join(5)
        for p in self.processes:
            p.kill()
            p.join()
        self.status = [p.exitcode for p in self.processes]
        self.stdout, self.stderr = ("".join(Path(f"{log}.{i}").read_text() for log in self.logs
                                            if Path(f"{log}.{i}").exists()) for i in (1, 2))
        return self


def forked(name, *args, ranks=1, status=0, each=lambda rank: {}):
    """Ranks() to their end; checks each one's exit status."""
    done = Ranks(name, *args, ranks=ranks, each=each).end()
    assert done.status == [status] * ranks, done.stdout + done.stderr
    return done


def lines_of(path):
    """The rows of a .jsonl file."""
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


# ------------------------------------------------------------------------------------------- data


def write(path, *rows):
    """Writes rows, or lines as they are, to a .jsonl or .jsonl.gz; returns its name."""
    lines = [r if isinstance(r, (str, bytes)) else json.dumps(r) for r in rows]
    data = b"\n".join(x if isinstance(x, bytes) else x.encode() for x in lines) + b"\n"
    Path(path).write_bytes(gzip.compress(data) if str(path).endswith(".gz") else data)
    return str(path)


def samples_in(path):
    """The labelled samples of a file, as every trainer reads them."""
    return list(common.parsed_entries(str(path), common.SAMPLE_COLUMNS, lambda part, row, notes:
                                   common.labelled_sample_of(row)))


def preferences_of(path, **flags):
    """A file's preferences, for training and held out."""
    return common.load_preferences(config(model="m", preferences=str(path), **flags))


TRANSCRIPT = "\n\nHuman: Hi {}\n\nAssistant: Hello.\n\nHuman: And?\n\nAssistant: {}"


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.jsonl.gz"])
def test_three_shapes_of_preference_data_give_the_same_pairs(tmp_path, name):
    turns = [{"role": "user", "content": "Hi"}]
    reply = [[{"role": "assistant", "content": text}] for text in ("yes", "no")]
    path = write(
        tmp_path / name,
        {"chosen": TRANSCRIPT.format(1, "yes"), "rejected": TRANSCRIPT.format(1, "no")},
        {"prompt": "Hi", "chosen": "yes", "rejected": "no"},
        {"chosen": turns + reply[0], "rejected": turns + reply[1]},
        {"prompt": turns, "chosen": reply[0], "rejected": reply[1]},
        {"prompt": "Hi", "chosen": turns + reply[0], "rejected": turns + reply[1]},
        *({"prompt": f"p{i}", "chosen": "yes", "rejected": "no"} for i in range(20)))
    train, held_out = preferences_of(path, held_out=0.3)
    pairs = train + held_out
    assert len(pairs) == 25 and sum(p.prompt == turns for p in pairs) == 3
    assert {tuple(text.strip() for text in p.responses) for p in pairs} == {("yes", "no")}
    assert TRANSCRIPT.format(1, "")[:-1] in [p.prompt for p in pairs]


@pytest.mark.parametrize("row", [
    {"prompt": "Human: hi", "completion": " yes", "reward": 2},
    {"input": "Human: hi", "output": " yes", "reward": 2},
    {"prompt": "Human: hi", "completion": [{"role": "assistant", "content": " yes"}],
     "reward": 2.0}])
def test_samples_under_other_tools_names_are_taken_as_they_are(tmp_path, row):
    """TRL's prompt and completion, as text and as messages; OpenRLHF's input and output."""
    found, = samples_in(write(tmp_path / "s.jsonl", row))
    assert found == Sample("Human: hi", " yes", 2.0, "given", False)


def test_ranked_responses_are_preferences_best_first(tmp_path):
    rows = [{"prompt": f"p{i}", "ranked": ["best", "good", "bad"][:2 + i % 2]} for i in range(30)]
    flags = dict(model="m", preferences=write(tmp_path / "p.jsonl", *rows), held_out=0.3)
    train, held_out = common.load_preferences(config(**flags))
    assert {r.prompt: list(r.responses) for r in train + held_out} == {
        row["prompt"]: row["ranked"] for row in rows}
    hidden = {common.prompt_hash(r.prompt) for r in held_out}
    labelled, asked = common.to_label(config(**flags, sources="dataset"), hidden)
    assert not asked and len(labelled) == sum(len(r.responses) for r in train)
    assert all((row.source == "chosen") == (row.response == "best") for row in labelled)


def test_unusable_pairs_are_counted_and_left_out(tmp_path, capsys):
    path = write(tmp_path / "p.jsonl",
                 {"chosen": TRANSCRIPT.format(1, "a"), "rejected": TRANSCRIPT.format(2, "b")},
                 {"prompt": "x", "chosen": "a", "rejected": " "},
                 *({"prompt": f"p{i}", "chosen": "a", "rejected": "b"} for i in range(20)))
    train, held_out = preferences_of(path, held_out=0.3)
    said = capsys.readouterr().out
    assert len(train) + len(held_out) == 20 and "20 of 22 rows used" in said
    assert "1 differing in more than the last response, 1 with an empty response" in said


def test_train_and_held_out_share_no_prompt(tmp_path):
    path = write(tmp_path / "p.jsonl", *(
        {"prompt": f"p{i % 30}", "chosen": f"a{i}", "rejected": "b"} for i in range(90)))
    train, held_out = preferences_of(path, held_out=0.3)
    assert not {p.prompt for p in train} & {p.prompt for p in held_out}
    assert len(train) + len(held_out) == 90


def test_rows_in_are_rows_out(run):
    rows = samples_in(run[0] / "samples.jsonl")
    train, _ = common.load_preferences(config(out=str(run[0])))
    assert [r.response for r in rows if r.source == "chosen"] == [p.responses[0] for p in train]
    assert sum(r.source == "rejected" for r in rows) == len(train) == 4000
    prompts = {r.prompt for r in train}
    assert sum(r.source == "generated" for r in rows) == len(prompts)  # one a prompt
    assert not list(run[0].glob(".samples*"))


def test_labelling_goes_on_where_a_kill_left_it(run, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "LABELLED_TOGETHER", 4)
    prompts = write(tmp_path / "p.jsonl", *({"prompt": f"Human: {i}"} for i in range(40)))
    base, calls, die_at = str(run[0] / "base"), [], [3]

    def score(prompts, responses, truncated, cost):
        calls.append(len(prompts))
        if len(calls) == die_at[0]:
            raise KeyboardInterrupt
        return [float(p.split()[-1]) for p in prompts]

    def label(name):
        cfg = config(model=base, prompts=prompts, reward_model="rm", sources="generated",
                     samples_per_prompt=1, held_out=0.5, out=str(tmp_path / name),
                     max_response_tokens=12)
        (tmp_path / name).mkdir(exist_ok=True)
        common.labelled_samples(cfg, common.Stage(base, "base", Cost()),
                                common.Stage("rm", "rm", Cost(), lambda: score))
        return (tmp_path / name / "samples.jsonl").read_bytes()
    with pytest.raises(KeyboardInterrupt):
        label("killed")
    parts, = (tmp_path / "killed").glob(".samples.*")
    (parts / ".000000000012.new").write_text('{"rows": [{"prompt": "half a li')
    assert not (tmp_path / "killed" / "samples.jsonl").exists()
    done, die_at[0] = len(calls) - 1, None
    calls.clear()
    resumed = label("killed")
    parts = math.ceil(resumed.count(b"\n") / 4)
    assert calls[0] == 4 and len(calls) == parts - done, "finished parts are not made again"
    assert resumed == label("whole") and not list((tmp_path / "killed").glob(".samples*"))


def test_samples_stay_on_disk_at_a_few_bytes_a_row(codec, tmp_path):
    """A million samples are memory maps of int32 and bool, and a few numbers a row."""
    rows = [{**GOOD, "prompt": f"p{i}", "response": "x" * 1000, "reward": i} for i in range(2000)]
    read = functools.partial(common.read_samples, held_out=set(), codec=codec, fingerprint="x",
                             folder=tmp_path / "tokens", labelled_by=None, costs={})
    read(write(tmp_path / "first.jsonl", *rows[:2]))  # imports what is not to be counted
    for path in (write(tmp_path / "s.jsonl", *rows), write(tmp_path / "s.jsonl.gz", *rows)):
        tracemalloc.start()
        samples = read(path)
        gc.collect()
        held, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert held < 100 * len(rows)
        for array, kind in ((samples.tokens.ids, np.int32), (samples.tokens.mask, np.bool_)):
            assert isinstance(array, np.memmap) and array.dtype == kind
            assert not array.flags.writeable
        assert samples.rewards.tolist() == list(range(2000))
        ids, mask = samples.tokens[1999]
        expected, = codec.tokenise(["p1999"], ["x" * 1000])
        np.testing.assert_array_equal(ids, expected[0])
        np.testing.assert_array_equal(mask, expected[1])


def test_given_samples_are_never_trained_on_with_held_out_prompts(run, tmp_path, capsys):
    path = write(tmp_path / "s.jsonl", *({**GOOD, "prompt": f"p{i}", "reward": i}
                                         for i in range(60)))
    base = str(run[0] / "base")
    cfg = config(model=base, samples=path, held_out=0.3, out=str(tmp_path / "run"),
                 sources="dataset", samples_per_prompt=1)
    samples = common.labelled_samples(cfg, common.Stage(base, "base", Cost()), None)
    held_out = {common.prompt_hash(p) for p in common.split_prompts(cfg, held_out=True)}
    assert not set(samples.prompts.tolist()) & held_out
    assert len(samples.prompts) + len(held_out) == 60 and len(held_out) > 5
    said = capsys.readouterr().out
    assert f"left out: {len(held_out)} with held-out prompts" in said
    assert "--sources and --samples_per_prompt have no effect" in said


def test_prompts_too_few_to_hold_one_out_are_refused_only_where_something_is_evaluated(tmp_path):
    path = write(tmp_path / "p.jsonl", {"prompt": "p0"}, {"prompt": "p1"})
    cfg = config(model="m", prompts=path, reward_model="m", held_out=1e-9)
    with pytest.raises(BadInput, match="larger --held_out"):
        common.split_prompts(cfg, held_out=True)
    cfg.eval_prompts = 0
    assert common.split_prompts(cfg, held_out=True) == []


@pytest.mark.parametrize("names", ["{}.jsonl", "{}/rows.jsonl", "data-{}.jsonl"])
def test_a_file_or_folder_named_test_is_the_held_out_split(tmp_path, names):
    for name in ("train", "test"):
        (tmp_path / names.format(name)).parent.mkdir(exist_ok=True)
        write(tmp_path / names.format(name), *(
            {"prompt": f"{name}{i}", "chosen": "a", "rejected": "b"} for i in range(5)))
    train, held_out = preferences_of(tmp_path)
    assert {p.prompt for p in held_out} == {f"test{i}" for i in range(5)} and len(train) == 5


def test_control_characters_do_not_reach_the_terminal():
    assert common.printable("a\x1b[2Jb\nc") == "a\\x1b[2Jb\nc"


# -------------------------------------------------------------------- what a run was built from


def test_a_changed_byte_or_a_renamed_test_folder_builds_a_stage_again(tmp_path, capsys):
    data = tmp_path / "data"
    (data / "test").mkdir(parents=True)
    for split in ("", "test/"):
        write(data / f"{split}rows.jsonl", *({"prompt": f"p{i}" + "x" * 1000} for i in range(3000)))
    cfg, record = config(model="m", preferences=str(data), out=str(tmp_path)), tmp_path / "run.json"

    def built():
        """Whether a stage of these data counts as built; from now on it does."""
        wanted = common.settings(cfg, "data")
        fresh = common.is_fresh("dt", record, wanted)
        common.write_record(record, wanted, Cost())
        return fresh
    assert not built() and built()
    with open(data / "rows.jsonl", "r+b") as file:  # as long as before
        file.seek(1_500_000)
        old = file.read(1)
        file.seek(1_500_000)
        file.write(b"y" if old == b"x" else b"x")
    assert not built() and built() and "because of preferences" in capsys.readouterr().out
    (data / "test").rename(data / "more")  # the same bytes, none of them held out now
    assert not built() and built()


def test_a_file_that_stayed_the_same_is_not_read_again_at_the_next_launch(tmp_path):
    samples, out = write(tmp_path / "s.jsonl", GOOD), tmp_path / "run"
    flags, read = ["--model", "m", "--samples", samples, "--out", str(out)], []

    def main(cfg):
        (out / "something").touch()
        read.append(common.content_hash(samples))
    with mock.patch.object(common, "HASHES", {}):
        common.launch(main, rwr.Config, flags)
        kept = json.loads((out / ".hashes.json").read_text())
        (out / ".hashes.json").write_text(json.dumps({name: "kept" for name in kept}))
        common.HASHES.clear()
        common.launch(main, rwr.Config, flags)
        write(tmp_path / "s.jsonl", GOOD, GOOD)
        common.HASHES.clear()
        common.launch(main, rwr.Config, flags)
    of_bytes, from_file, of_other_bytes = read
    assert from_file == common.fingerprint([[".", "kept"]])
    assert of_bytes not in (from_file, of_other_bytes)


def test_a_model_is_the_same_whatever_its_path_is_written_like(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_model().save_pretrained(tmp_path / "model")
    found = common.content_hash("model")
    (tmp_path / "model" / ".DS_Store").write_text("a desktop was here")
    (tmp_path / "link").symlink_to("model")
    for name in ("./model", "model/", str(tmp_path / "model"), "link"):
        assert common.content_hash(name) == found, name
    (tmp_path / "model" / "config.json").write_text("{}")
    assert common.content_hash("model") != found


def test_checkpoints_of_other_settings_are_never_deleted_unasked(run, tmp_path):
    """A run stops and names the setting; --no_resume starts anew."""
    flags = road(run, tmp_path, "--steps", "2", "--eval_prompts", "0")
    forked("rwr", *flags)
    work = tmp_path / ".rwr.new"
    (work / "checkpoints" / "00000001").mkdir(parents=True)
    settings = json.loads((tmp_path / "rwr" / "run.json").read_text())["settings"]
    (work / "run.json").write_text(json.dumps({"settings": {**settings, "beta": 7}}))
    done = forked("rwr", *flags, "--beta", "3", status=2)
    assert "another beta" in done.stderr and "--no_resume" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert (work / "checkpoints" / "00000001").exists() and (tmp_path / "rwr").exists()
    forked("rwr", *flags, "--beta", "3", "--no_resume")
    again = json.loads((tmp_path / "rwr" / "run.json").read_text())["settings"]
    assert again["beta"] == 3 and not work.exists()


def test_a_symlinked_stage_folder_can_be_built_again_twice(tmp_path):
    cfg = config(out=str(tmp_path / "run"))

    def build(value):
        return common.build_stage(cfg, "dt", {"lr": value}, lambda work, cost:
                                  (work / "weights").write_text(str(value)) and {})
    build(1)
    shutil.move(tmp_path / "run" / "dt", tmp_path / "large disk")
    (tmp_path / "run" / "dt").symlink_to(tmp_path / "large disk")
    for value in (2, 3):
        build(value)
        assert (tmp_path / "run" / "dt").is_symlink()
        assert (tmp_path / "large disk" / "weights").read_text() == str(value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["large disk", "run"]


def test_weights_are_readable_by_whom_the_umask_lets_and_a_kills_leftovers_vanish(tmp_path):
    (tmp_path / ".dt.new").mkdir()
    (tmp_path / ".dt.new" / "run.json").write_text('{"settings": {"lr": 1}}')
    (tmp_path / ".dt.new" / ".tmp_weights").write_text("half of them")
    before = os.umask(0o027)
    try:
        common.build_stage(config(out=str(tmp_path)), "dt", {"lr": 1}, lambda work, cost:
                           tiny_model().save_pretrained(work))
    finally:
        os.umask(before)
    assert (tmp_path / "dt" / "model.safetensors").stat().st_mode & 0o777 == 0o640
    assert not list((tmp_path / "dt").glob(".tmp*"))


# -------------------------------------------------------------------------------------- bad input


GOOD = {"prompt": "p", "response": "r", "reward": 1.0}
BAD_SAMPLES = {
    "surrogate": ('{"prompt": "\\ud800", "response": "r", "reward": 1}', "line 2.*UTF-8"),
    "huge": ('{"prompt": "p", "response": "r", "reward": 1' + "0" * 400 + "}", "line 2.*finite"),
    "not JSON": ('{"prompt": ', "line 2.*not JSON"), "a list": ([1], "line 2.*JSON object"),
    "no reward": ({"prompt": "p", "response": "r"}, "line 2.*'reward' is missing"),
    "NaN": ('{"prompt": "p", "response": "r", "reward": NaN}', "line 2.*'reward' must be a finite"),
    "infinite": ('{"prompt": "p", "response": "r", "reward": -Infinity}', "line 2.*finite"),
    "text reward": ({**GOOD, "reward": "one"}, "line 2.*'reward' must be a finite number"),
    "true": ({**GOOD, "reward": True}, "line 2.*a finite number"),
    "two prompts": ({**GOOD, "messages": [{"role": "user", "content": "other"}]},
                    "line 2.*'messages' and 'prompt' differ"),
    "response": ({**GOOD, "response": 3}, "line 2.*'response' must be text"),
    "empty prompt": ({**GOOD, "prompt": " "}, "line 2.*'prompt' is empty"),
    "UTF-8": (b'{"prompt": "\xff"}', "line 2.*UTF-8"),
    "deep": ("[" * 100000, "line 2.*not JSON"),
    "messages": ({**GOOD, "prompt": [1]}, "line 2.*'prompt'")}


@pytest.mark.parametrize("name", BAD_SAMPLES)
def test_bad_sample_rows_are_named_by_file_line_and_field(tmp_path, name):
    bad, message = BAD_SAMPLES[name]
    with pytest.raises(BadInput, match=r"s\.jsonl, " + message):
        samples_in(write(tmp_path / "s.jsonl", GOOD, bad))


@pytest.mark.parametrize("row, message", [
    ({"chosen": "a"}, "line 1.*'chosen' must be a transcript"),
    ({"prompt": "p", "chosen": "a"}, "'rejected' is missing"),
    ({"prompt": "p", "chosen": 1, "rejected": "b"}, "'chosen' must be text"),
    ({"prompt": "p", "ranked": ["a"]}, "'ranked' must be a list of two"),
    ({"prompt": "p", "ranked": "ab"}, "'ranked' must be a list"),
    ({"ranked": ["a", "b"]}, "'prompt' is missing"),
    ({"prompt": "p", "ranked": ["a", "b"], "chosen": "a", "rejected": "b"},
     "'ranked' and 'rejected' stand side by side"),
    ({"chosen": "\n\nAssistant: a", "rejected": "\n\nAssistant: b"},
     "'chosen' must be a transcript")])
def test_bad_preference_rows_are_named_by_file_line_and_field(tmp_path, row, message):
    with pytest.raises(BadInput, match=message):
        preferences_of(write(tmp_path / "p.jsonl", row))


def test_broken_gzip_and_no_usable_pair_are_one_sentence(tmp_path):
    path = write(tmp_path / "p.jsonl.gz", *[
        {"prompt": str(i), "chosen": os.urandom(40).hex(), "rejected": "b"} for i in range(99)])
    Path(path).write_bytes(Path(path).read_bytes()[:-200])
    with pytest.raises(BadInput, match="line .* broken"):
        preferences_of(path)
    with pytest.raises(BadInput, match="no usable preference"):
        preferences_of(write(tmp_path / "e.jsonl", {"prompt": "p", "chosen": " ", "rejected": "b"}))


def launched(module, flags, capsys, status=2):
    """The one sentence that a script ends with in this process, on bad input."""
    with pytest.raises(SystemExit) as stop:
        common.launch(module.main, module.Config, [str(flag) for flag in flags])
    said = capsys.readouterr().err
    assert stop.value.code == status and len(said.splitlines()) == 1, said
    return said


FLAGS = [(mle_filter, ["--keep", "0"], "--keep"), (rwr, ["--beta", "0"], "--beta"),
         (rwr, ["--lr", "-1"], "--lr"), (dt, ["--targt", "1"], "--targt"),
         (dt, ["--target", "high"], "--target"), (dt, ["--target", "q99", "none"], "--target"),
         (dt, ["--condition_dropout", "0"], "--guidance"),
         (dt, ["--condition_dropout", "0", "--guidance", "0", "--target", "none", "q9"], "none"),
         (dt, ["--reward_format", "token", "--reward_step", "1"], "--reward_step"),
         (dt, ["--epochs", "1", "--steps", "1"], "--epochs"),
         (rwr, ["--model", "m", "--samples", "s", "--max_pairs", "5"], "--max_pairs"),
         (rwr, ["--judge", "m", "--eval_prompts", "0"], "--judge"),
         (dt, ["--reward_step", "0.01"], "--reward_step"),
         (dt, ["--samples", "s.jsonl"], "--samples"), (dt, ["--steps", "few"], "--steps"),
         (dt, ["--top_p", "0"], "--top_p"), (rwr, ["--model", "m"], "--model needs data"),
         (rwr, ["--preferences", "p"], "--model"), (rwr, ["--lr", "nan"], "--lr"),
         (reward_model, ["--model", "/no/model", "--preferences", "/no/file.jsonl"],
          "/no/file.jsonl"),
         (reward_model, ["--margin", "inf"], "--margin")]


@pytest.mark.parametrize("module, flags, word", FLAGS)
def test_bad_flags_end_in_one_sentence_and_status_2(module, flags, word, capsys, tmp_path):
    assert word in launched(module, [*flags, "--out", tmp_path / "run"], capsys)
    assert not list((tmp_path / "run").glob("[!.]*")), "nothing half-written"


@pytest.mark.parametrize("theirs", common.OTHER_NAMES)
def test_flags_of_trl_and_of_older_versions_are_refused_with_ours_named(theirs):
    ours = common.OTHER_NAMES[theirs].split()[0]
    for args in ([f"--{theirs}", "1"], [f"--{theirs}=1"]):
        with pytest.raises(BadInput, match=f"^--{theirs}: here it is --{ours}"):
            common.parse(rwr.Config, args)
    assert ours in {f.name for f in fields(rwr.Config)}


def test_flags_come_from_a_file_and_the_command_line_wins(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("lr: 0.5\nbatch_size: 3\ntarget: [q1, '2']\ncompile: false\nmax_pairs:\n")
    cfg = common.parse(dt.Config, ["--config", str(path), "--batch_size", "4"])
    assert (cfg.lr, cfg.batch_size, cfg.target, cfg.compile) == (0.5, 4, ["q1", "2"], False)
    assert cfg.max_pairs is None and cfg.steps == 600, "what neither names is as it was"
    for text, word in (("learning_rate: 1", "--lr"), ("lr: [", "run.yaml"), ("7", "run.yaml"),
                       ("lr: -1", "--lr"), ("nonsense: 1", "--nonsense"),
                       ("no_resume: true", "unknown flag"), ("config: a.yaml", "--config")):
        path.write_text(text)
        with pytest.raises(BadInput, match=word):
            common.parse(rwr.Config, ["--config", str(path)])
    with pytest.raises(BadInput, match="no.yaml"):
        common.parse(rwr.Config, ["--config", str(tmp_path / "no.yaml")])


def test_bad_folders_end_in_one_sentence_and_status_2(tmp_path, capsys):
    samples = write(tmp_path / "s.jsonl", *({**GOOD, "prompt": f"p{i}", "reward": i}
                                            for i in range(30)))
    no_model = launched(rwr, ["--model", tmp_path, "--samples", samples, "--out",
                              tmp_path / "run"], capsys)
    assert "not a folder or Hub id" in no_model
    assert "s.jsonl" in launched(rwr, ["--out", tmp_path / "s.jsonl" / "run"], capsys)


def test_a_pipe_is_refused_by_name_and_not_waited_for(run, tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe.jsonl")
    for flag in ("--preferences", "--samples", "--prompts"):
        said = launched(rwr, ["--model", run[0] / "base", flag, tmp_path / "pipe.jsonl", "--out",
                              tmp_path / "run", "--reward_model", run[0] / "rm"], capsys)
        assert "pipe.jsonl: a pipe or device" in said
    with pytest.raises(BadInput, match="a pipe"):
        list(common.read_source(str(tmp_path / "pipe.jsonl")))


@pytest.mark.parametrize("problem", [
    OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), "weights"),
    OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    RuntimeError(f"I/O error: {os.strerror(errno.EDQUOT)} (os error {errno.EDQUOT})")])
def test_a_full_disk_or_quota_reads_as_one_sentence(tmp_path, capsys, problem):
    def main(cfg):
        raise problem
    said = launched(mock.Mock(main=main, Config=rwr.Config), ["--out", tmp_path / "run"], capsys)
    code = errno.EDQUOT if str(errno.EDQUOT) in str(problem) else errno.ENOSPC
    assert os.strerror(code) in said and "what was there before is untouched" in said


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    common.write_beside(tmp_path / "samples.jsonl", ["old"])

    def full(*args):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError):
        common.write_beside(tmp_path / "samples.jsonl", ["new"])
    assert (tmp_path / "samples.jsonl").read_text() == "old\n"


def make_weights(work, cost):
    """A stage that writes one file."""
    (work / "checkpoints" / "00000001").mkdir(parents=True)
    (work / "weights").write_text(str(json.loads((work / "run.json").read_text())["settings"]))


def test_a_failed_stage_leaves_the_old_folder(tmp_path):
    def interrupted(work, cost):
        (work / "half").write_text("")
        raise KeyboardInterrupt
    cfg = config(out=str(tmp_path))
    common.build_stage(cfg, "dt", {"lr": 1}, make_weights)
    with pytest.raises(KeyboardInterrupt):
        common.build_stage(cfg, "dt", {"lr": 2}, interrupted)
    assert common.is_fresh("dt", tmp_path / "dt" / "run.json", {"lr": 1})
    assert sorted(p.name for p in tmp_path.glob("**/*")) == ["dt", "run.json", "weights"]


def killed_at(folder, moment):
    """Is a process: builds a stage again; is gone at the `moment`-th change of a file."""
    moments = itertools.count(1)

    def dying(change):
        def changed(*args, **more):
            if next(moments) == int(moment):
                os._exit(9)
            return change(*args, **more)
        return changed
    for name in ("replace", "rename", "fsync", "mkdir", "unlink", "rmdir"):
        setattr(os, name, dying(getattr(os, name)))
    common.build_stage(config(out=folder), "dt", {"lr": 2}, make_weights)


def test_a_stage_that_is_killed_at_any_moment_is_built_by_the_next_command(tmp_path, capsys):
    cfg = config(out=str(tmp_path))
    for moment in itertools.count(1):
        shutil.rmtree(tmp_path / "dt", ignore_errors=True)
        common.build_stage(cfg, "dt", {"lr": 1}, make_weights)
        killed = Ranks("killed_at", tmp_path, moment).end().status == [9]
        shutil.rmtree(tmp_path / ".dt.new" / "checkpoints", ignore_errors=True)
        common.build_stage(cfg, "dt", {"lr": 2}, make_weights)
        assert (tmp_path / "dt" / "weights").read_text() == "{'lr': 2}"
        assert sorted(p.name for p in tmp_path.glob("**/*")) == ["dt", "run.json", "weights"]
        if not killed:
            break
    assert moment > 8


def test_a_users_own_folders_in_the_run_folder_stay(tmp_path):
    """The samples' record lies in the run folder itself, which is no stage's."""
    for name in ("checkpoints", "dt"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("")
    common.is_fresh("samples", tmp_path / "samples.json", {"lr": 1})
    with pytest.raises(BadInput, match="no stage of a run"):
        common.build_stage(config(out=str(tmp_path)), "dt", {"lr": 1}, make_weights)
    assert (tmp_path / "checkpoints" / "mine").exists() and (tmp_path / "dt" / "mine").exists()


def test_samples_of_another_reward_model_give_a_warning_that_names_both(run, tmp_path, capsys):
    path = write(tmp_path / "s.jsonl", *({**GOOD, "prompt": f"p{i}", "reward": i}
                                         for i in range(30)))
    (tmp_path / "s.json").write_text('{"settings": {"scorer": "theirs"}}')
    base = str(run[0] / "base")
    common.labelled_samples(config(model=base, samples=path, out=str(tmp_path)),
                            common.Stage(base, "base", Cost()),
                            common.Stage("rm", "ours", Cost()))
    warning, = [x for x in capsys.readouterr().out.splitlines() if "warning" in x]
    assert "theirs" in warning and "ours" in warning


def test_help_needs_no_docstrings(capsys):
    """python -OO strips them, and asserts: of our files here, as of the libraries it takes long."""
    with mock.patch.dict(sys.modules):
        for name in ("common", "reward_model", "dt", "mle_filter", "ppo_baseline", "rwr"):
            source = (HERE / f"{name}.py").read_text()
            module = sys.modules[name] = types.ModuleType(name)
            exec(compile(source, f"{name}.py", "exec", optimize=2, dont_inherit=True), vars(module))
            assert module.__doc__ is None
            if name != "common":
                with pytest.raises(SystemExit) as stop:
                    sys.modules["common"].parse(module.Config, ["--help"])
                assert stop.value.code == 0 and "--lr" in capsys.readouterr().out


# -------------------------------------------------------------------------------------------- PPO


def rollout_of(lengths=(5, 1, 8, 3), seed=0):
    """A scored rollout of uneven responses: prepare()'s arguments but for beta and cfg."""
    rng = np.random.default_rng(seed)
    rows = [example(rng.integers(1, V, 3 + n), 3) for n in lengths]
    old, base, values = ([rng.normal(size=n).tolist() for n in lengths] for _ in range(3))
    n = len(rows)
    rollout = ppo_baseline.Rollout(["a prompt"] * n, ["a response"] * n, [False] * n, rows)
    return rollout, old, base, values, rng.normal(size=n)


def step_of(rows, cfg):
    """All these examples as one optimiser step: this rank's share."""
    return common.Batch(rows, cfg)


@pytest.mark.parametrize("gae_lambda", [0.0, 0.95, 1.0])
def test_ppo_advantages_equal_a_naive_sum_over_ragged_responses(gae_lambda):
    rewards, values = ([np.random.default_rng(seed + n).normal(size=n) for n in (5, 1, 8)]
                       for seed in (0, 50))
    ours = ppo_baseline.advantages(ppo_baseline.ragged(rewards), ppo_baseline.ragged(values),
                                   gae_lambda)
    for row, r, v in zip(ours, rewards, values):
        n = len(r)
        delta = [r[t] + (v[t + 1] if t + 1 < n else 0.0) - v[t] for t in range(n)]
        naive = [sum(gae_lambda ** (k - t) * delta[k] for k in range(t, n)) for t in range(n)]
        np.testing.assert_allclose(row[:n], naive)
        assert not row[n:].any()


def test_ppo_score_enters_at_the_last_real_token_only():
    rollout, old, _, values, score = rollout_of()
    zeros = [[0.0] * len(v) for v in values]
    rows, found = ppo_baseline.prepare(rollout, old, old, zeros, score, 0.1,
                                       config(ppo_baseline, gae_lambda=0.0))
    for e, s in zip(rows, score):  # returns, one step ahead
        np.testing.assert_allclose(e.columns[3], [0.0] * (int(e.mask.sum()) - 1) + [s])
    assert found["kl"] == 0 and found["objective"] == pytest.approx(score.mean())


def test_ppo_kl_to_base_is_paid_at_every_token():
    rollout, old, base, values, score = rollout_of()
    zeros = [[0.0] * len(v) for v in values]
    rows, found = ppo_baseline.prepare(rollout, old, base, zeros, score, 0.1,
                                       config(ppo_baseline, gae_lambda=1.0))
    for e, o, b, s in zip(rows, old, base, score):  # the first token's return
        np.testing.assert_allclose(e.columns[3][0], s - 0.1 * (sum(o) - sum(b)))
    assert found["objective"] == pytest.approx(score.mean() - 0.1 * found["kl"])


def test_ppo_advantages_are_whitened_over_all_tokens_whatever_the_padding():
    rows, _ = ppo_baseline.prepare(*rollout_of(), 0.1, config(ppo_baseline))
    white = np.concatenate([e.columns[1] for e in rows])
    assert abs(white.mean()) < 1e-9 and abs(white.std() - 1) < 1e-6
    x = torch.randn(3, 5)
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 0, 0]]).bool()
    wide, wide_mask = (torch.nn.functional.pad(t, (0, 7)) for t in (x, mask))
    torch.testing.assert_close(ppo_baseline.whiten(wide, wide_mask)[:, :5],
                               ppo_baseline.whiten(x, mask))


def plain_surrogate(logits, targets, old, advantage, temperature, clip, entropy_coef):
    """Each row's PPO loss, its (log-ratio)^2 / 2, whether the clip bites, and its entropy, by
    autograd's own means."""
    distribution = torch.distributions.Categorical(logits=logits / temperature)
    log_ratio = distribution.log_prob(targets) - old
    plain = -advantage * log_ratio.exp()
    clipped = -advantage * log_ratio.exp().clamp(1 - clip, 1 + clip)
    entropy = distribution.entropy()
    return (torch.maximum(plain, clipped) - entropy_coef * entropy, log_ratio.square() / 2,
            (clipped > plain).to(logits.dtype), entropy)


@pytest.mark.parametrize("temperature, entropy_coef", [(1.0, 0.0), (0.7, 0.01)])
@pytest.mark.parametrize("rows", [40, 1])
def test_ppo_kernel_equals_float64_autograd_in_gradient_and_statistics(rows, temperature,
                                                                       entropy_coef):
    torch.manual_seed(rows)
    logits = torch.randn(rows, V, dtype=torch.float64, device=DEVICE, requires_grad=True)
    targets = torch.randint(0, V, (rows,), device=DEVICE)
    advantage, noise = torch.randn(2, rows, dtype=torch.float64, device=DEVICE)
    log_p = (logits.detach() / temperature).log_softmax(1)
    old = log_p.gather(1, targets[:, None]).squeeze(1) + 0.3 * noise
    loss, *statistics = plain_surrogate(logits, targets, old, advantage, temperature, 0.2,
                                        entropy_coef)
    loss.sum().backward()
    work, sums = logits.detach().clone(), torch.zeros(3, dtype=torch.float64, device=DEVICE)
    ours = ppo_baseline.clipped_surrogate_(work, targets, old, advantage, temperature, 0.2,
                                           entropy_coef, sums)
    torch.testing.assert_close(ours, loss.detach())
    torch.testing.assert_close(work, logits.grad)
    torch.testing.assert_close(sums, torch.stack([s.sum().detach() for s in statistics]))
    if rows == 40:
        assert 0 < sums[1] < rows  # the clip bites in some rows and not in others


def test_ppo_kernel_works_in_bfloat16_with_float32_loss():
    torch.manual_seed(0)
    logits = torch.randn(6, V, device=DEVICE).bfloat16()
    targets = torch.randint(0, V, (6,), device=DEVICE)
    advantage, wide = torch.randn(6, device=DEVICE), logits.float().requires_grad_()
    old = wide.detach().log_softmax(1).gather(1, targets[:, None]).squeeze(1)
    expected, *_ = plain_surrogate(wide, targets, old, advantage, 1.0, 0.2, 0.01)
    expected.sum().backward()
    loss = ppo_baseline.clipped_surrogate_(logits, targets, old, advantage, 1.0, 0.2, 0.01,
                                           torch.zeros(3, device=DEVICE))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(logits.float(), wide.grad, atol=5e-3, rtol=1e-2)


def test_ppo_value_never_gains_from_leaving_the_old_value_far():
    value = torch.tensor([0.0, 0.15, 0.5, -0.5], requires_grad=True)
    loss = ppo_baseline.clipped_value_loss(value, torch.zeros(4), torch.ones(4), 0.2)
    torch.testing.assert_close(loss.detach(), torch.tensor([1.0, 0.85**2, 0.8**2, 1.5**2]) / 2)
    loss.sum().backward()
    assert value.grad[2] == 0 and (value.grad[[0, 1, 3]] < 0).all()


UNITS = Samples(None, np.array([0.0, 2.0]), None, None, "x", "rm", {})  # scores' mean and std


def actor_critic(cfg):
    """A tiny policy with a critic of random weights, and its frozen base."""
    from transformers import LlamaForSequenceClassification
    model, base = tiny_model(dtype=torch.float32), tiny_model(dtype=torch.float32)
    shape = model.config.__class__(**{**model.config.to_dict(), "num_labels": 1})
    critic = common.enable_packing(LlamaForSequenceClassification(shape).to(DEVICE).eval())
    critic = reward_model.RewardModel(critic, torch.float32)
    return ppo_baseline.ActorCritic(model, critic, UNITS, cfg), base


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_ppo_first_ratio_is_one_and_kl_of_the_untouched_policy_zero(temperature):
    """Rollout (with a cache), reference and update agree about every token's log-prob."""
    cfg = config(ppo_baseline, temperature=temperature, max_response_tokens=12)
    actor, base = actor_critic(cfg)
    codec = mock.Mock(decode=lambda response: " ".join(map(str, response.ids)), stop_ids=[0])
    prompts = [e.ids.tolist() for e in examples(9)]
    rollout = ppo_baseline.roll_out(actor, codec, ["a prompt"] * 9, prompts, cfg, 1, Cost())
    old = common.each_response_token(actor.log_probs, actor.model, rollout.examples, cfg, Cost())
    reference = log_probs_of(base, rollout.examples, cfg)
    values = common.each_response_token(actor.values, actor.critic.model, rollout.examples, cfg,
                                        Cost())
    rows, found = ppo_baseline.prepare(rollout, old, reference, values, np.ones(9), 0.1, cfg)
    assert abs(found["kl"]) < 1e-4
    again = common.sample(actor.model, prompts, cfg, 1, [0], Cost())
    for response, log_probs in zip(again, old):  # the sampler's, too
        np.testing.assert_allclose(response.log_probs, log_probs, atol=1e-4)
    statistics = torch.zeros(3, device=DEVICE)
    micro = common.collate(rows)
    surrogate, value_loss = actor(micro, lambda *a: ppo_baseline.clipped_surrogate_(
        *a, temperature, 0.2, 0.0, statistics), cfg.value_clip)
    assert (2 * statistics[0] / len(micro.rows)).sqrt() < 1e-4 and statistics[1] == 0
    assert abs(surrogate) < 1e-3  # whitened advantages sum to 0
    gap = np.concatenate([e.columns[3] - e.columns[2] for e in rows])  # return - value
    assert float(value_loss) == pytest.approx((gap**2).sum() / 2, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("tokens, ranks", [(1, 1), (40, 1), (10**6, 2), (20, 3), (20, 9)])
def test_ppo_gradient_does_not_depend_on_micro_batches_or_ranks(tokens, ranks, monkeypatch):
    def gradient(tokens, ranks):
        cfg = config(ppo_baseline, micro_batch_tokens=tokens, batch_size=4, epochs=1, steps=None)
        actor, _ = actor_critic(cfg)
        rows, _ = ppo_baseline.prepare(*rollout_of(), 0.1, cfg)
        total = 0.0
        for rank in range(ranks):
            monkeypatch.setattr(common, "rank", lambda rank=rank: rank)
            monkeypatch.setattr(common, "world_size", lambda: ranks)
            batch, = ppo_baseline.minibatches(rows, cfg)
            actor.zero_grad()
            for micro in batch.micros:
                surrogate, value_loss = actor(micro, lambda *a: ppo_baseline.clipped_surrogate_(
                    *a, 1.0, 0.2, 0.01, torch.zeros(3, device=DEVICE)), cfg.value_clip)
                ((surrogate + 0.1 * value_loss) / batch.normaliser).backward()
            total = total + torch.cat([p.grad.flatten() for p in actor.parameters()]) / ranks
        return total
    whole = gradient(10**6, 1)
    assert whole.norm() > 0
    assert (gradient(tokens, ranks) - whole).norm() < 1e-5 * whole.norm()


@pytest.mark.parametrize("bad", [0, 1, 4])
def test_ppo_iteration_counts_as_skipped_only_where_none_of_its_updates_is_finite(bad):
    cfg = config(ppo_baseline, batch_size=2, epochs=1, steps=None)
    actor, _ = actor_critic(cfg)
    rows, _ = ppo_baseline.prepare(*rollout_of(), 0.1, cfg)
    rows = [e._replace(columns=(e.columns[0], e.columns[1] * (math.nan if i < bad else 1),
                                *e.columns[2:]))
            for i, e in enumerate(rows)]  # one of four rows spoils one of two batches
    optimizer, schedule = ppo_baseline.make_optimizer(actor, cfg, 1)
    before = [p.detach().clone() for p in actor.parameters()]
    said = ppo_baseline.update(actor, actor, optimizer, schedule, rows, cfg, Cost())
    moved = any(not torch.equal(p, q) for p, q in zip(actor.parameters(), before))
    assert moved == math.isfinite(said["grad_norm"]) == (bad < 4)
    assert all(p.isfinite().all() for p in actor.parameters())


def test_ppo_beta_moves_towards_the_kl_target():
    cfg = config(ppo_baseline, kl_target=6.0)
    assert ppo_baseline.adapted(0.1, 9.0, cfg) > 0.1 > ppo_baseline.adapted(0.1, 3.0, cfg)
    fifth = pytest.approx(0.1 * (1 + 0.2 * 256 / 1000))
    assert ppo_baseline.adapted(0.1, 600.0, cfg) == fifth  # at most
    assert ppo_baseline.adapted(0.1, 9.0, config(ppo_baseline)) == 0.1


def road(run, out, *more):
    """A short training's command line, all before it finished, on a few of the run's samples."""
    few = run[0].parent / "few.jsonl"
    if not few.exists():
        shutil.copy(run[0] / "samples.json", few.with_suffix(".json"))
        write(few, *(run[0] / "samples.jsonl").read_text().splitlines()[::16])
    return ["--model", run[0] / "base", "--reward_model", run[0] / "rm", "--samples", few, "--out",
            out, "--no_compile", "--dtype", "fp32", "--max_prompt_tokens", "64",
            "--max_response_tokens", "32", "--batch_size", "8", "--lr", "1e-3", "--eval_prompts",
            "4", *more]


def test_ppo_runs_logs_and_never_pays_a_cut_off_response_more_than_the_penalty(run, tmp_path):
    """Nothing can end within two tokens: all scores are the penalty's, whatever the reward
    model says."""
    forked("ppo_baseline", *road(run, tmp_path, "--max_response_tokens", "2", "--steps", "2",
                                 "--rollout_batch_size", "8", "--batch_size", "4",
                                 "--missing_eos_score", "-9"))
    lines = lines_of(tmp_path / "ppo" / "metrics.jsonl")
    assert {"step", "score", "objective", "kl", "eos_rate", "clip_fraction", "approx_kl",
            "explained_variance", "entropy", "response_tokens", "rollout_tokens_per_second",
            "loss", "value_loss", "lr", "grad_norm", "tokens", "seconds", "flops", "rollout_s",
            "score_s", "log_probs_s", "update_s", "generation_share"} <= set(lines[0])
    assert len(lines) == 2 and lines[0]["score"] == -9 and lines[0]["eos_rate"] == 0
    assert abs(lines[0]["kl"]) < 1e-4


def test_ppo_refuses_samples_whose_units_are_another_reward_models(run, tmp_path, capsys):
    samples = write(tmp_path / "s.jsonl", *(
        {"prompt": f"Human: {i}\n\nAssistant:", "response": " yes", "reward": 100 + i}
        for i in range(40)))
    flags = road(run, tmp_path / "x", "--samples", samples)
    assert "units of its reward" in launched(ppo_baseline, flags, capsys)


def test_models_with_dropout_are_trained_and_scored_without_it(tmp_path):
    from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel
    shape = dict(vocab_size=V, n_embd=D, n_layer=1, n_head=2, pad_token_id=0)
    GPT2LMHeadModel(GPT2Config(**shape)).save_pretrained(tmp_path / "lm")
    GPT2ForSequenceClassification(GPT2Config(**shape, num_labels=1)).save_pretrained(
        tmp_path / "rm")
    loads = {"lm": common.load_model, "rm": functools.partial(reward_model.load_classifier,
                                                              dtype=torch.float32)}
    ids, lengths = torch.randint(1, V, (18,), device=DEVICE), [9, 9]
    for (name, load), recomputed in itertools.product(loads.items(), (False, True)):
        model = common.load_for_training(
            functools.partial(load, str(tmp_path / name)),
            config(gradient_checkpointing=recomputed, compile=False))
        one, two = (common.hidden_states(model, ids, lengths) for _ in range(2))
        assert one.requires_grad
        torch.testing.assert_close(one, two)
        torch.testing.assert_close(one, common.hidden_states(model.eval(), ids, lengths))


def test_ppo_without_a_reward_model_is_one_sentence(run, tmp_path, capsys):
    flags = ["--model", run[0] / "base", "--samples", run[0] / "samples.jsonl", "--out",
             tmp_path / "x", "--max_prompt_tokens", "64", "--max_response_tokens", "8"]
    assert "--reward_model" in launched(ppo_baseline, flags, capsys)


# ------------------------------------------------------------------------------------------ costs


@pytest.mark.parametrize("heads, key_value_heads, width", [(2, 2, 32), (4, 2, 64)])
def test_costs_count_what_torchs_flop_counter_counts(heads, key_value_heads, width):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import LlamaConfig, LlamaForCausalLM
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=128, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=3,
        num_attention_heads=heads, num_key_value_heads=key_value_heads, tie_word_embeddings=False,
        eos_token_id=127)).eval().to(DEVICE)
    model = common.enable_packing(model)
    cfg = config(max_response_tokens=20)  # as many decode steps: five looks' worth, none idle
    rows = [example(range(i, i + 40), i) for i in (10, 20, 38)]
    policy, batch = common.Policy(model, cfg), step_of(rows, cfg)

    def train(cost):
        for micro in batch.micros:
            policy(micro, lambda logits, targets: logits[:, 0].clone()).backward()
            cost.add_forward(model, len(micro.input_ids), sum(n * n for n in micro.lengths),
                             len(micro.rows), passes=3)
    for work in (train, lambda cost: log_probs_of(model, rows, cfg, cost),
                 lambda cost: common.sample(model, [e.ids.tolist() for e in rows], cfg, 0, [127],
                                            cost)):
        model.requires_grad_(True)
        cost = Cost()
        with FlopCounterMode(display=False) as theirs, sdpa_kernel(SDPBackend.MATH):
            work(cost)
        assert cost.flops == pytest.approx(theirs.get_total_flops(), rel=0.05)


def test_costs_name_every_stage_and_never_count_evaluation(run):
    row = lines_of(run[0] / "leaderboard.jsonl")[-1]
    stages = ("reward_model", "generation", "labelling", "training")
    assert set(row["costs"]) == {"base", *stages, "evaluation"}
    assert all(cost["seconds"] > 0 and cost["flops"] > 0 and cost["peak_memory_bytes"] > 0
               for cost in row["costs"].values())
    for unit in ("seconds", "flops", "generated_tokens"):
        needed = sum(row["costs"][stage][unit] for stage in stages)
        assert row[f"total_{unit}"] == pytest.approx(needed)
        assert row[f"train_{unit}"] == row["costs"]["training"][unit]
    assert row["costs"]["generation"]["generated_tokens"] > 0
    assert row["costs"]["training"]["generated_tokens"] == 0


# --------------------------------------------------------------------------------- the whole road


def test_the_whole_road_leaves_a_run_as_documented(run):
    out, said = run
    for name in ("base", "rm", "dt"):
        assert {"config.json", "model.safetensors", "tokenizer.json", "run.json",
                "README.md"} <= {p.name for p in (out / name).iterdir()}
    lines = lines_of(out / "dt" / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(8))
    assert {"loss", "lr", "grad_norm", "tokens", "seconds"} <= set(lines[0])
    rows = lines_of(out / "leaderboard.jsonl")
    assert [r["variant"] for r in rows] == ["", "target -1", "target none", "target q99",
                                            "target q99, guidance 0.5"]
    assert rows[1]["target"] == -1 and rows[2]["target"] is None
    assert all({"gold", "reward", "win_rate", "kl_to_base", "response_tokens", "distinct_2",
                "eos_rate", "train_seconds", "total_seconds", "train_flops", "total_flops",
                "peak_memory_bytes", "checkpoint", "world_size", "seed"} <= set(r) for r in rows)
    assert rows[0]["perplexity"] > 1 and rows[0]["win_rate"] == 0.5
    assert abs(rows[0]["kl_to_base"]) < 1e-3
    record = json.loads((out / "dt" / "run.json").read_text())
    assert "dt target q99, guidance 0.5" in said and record["condition"]["step"] == 0.5


def test_a_finished_stage_is_named_and_skipped_and_a_changed_setting_rebuilds_it(run):
    out, _ = run
    stamp = (out / "rm" / "model.safetensors").stat().st_mtime_ns
    flags = [*TINY, "--out", out, "--steps", "4"]
    again = forked("mle_filter", *flags).stdout
    for stage in ("base", "rm"):
        assert re.search(rf"^{stage}: .*{stage}, from before$", again, re.M)
    assert again.count("from before") == 3
    assert "mle_filter keep 0.1" in again and "dt target q99" in again
    assert "sft keep 1" in forked("mle_filter", *flags, "--keep", "1.0").stdout
    assert (out / "rm" / "model.safetensors").stat().st_mtime_ns == stamp
    changed = forked("mle_filter", *flags, "--lr", "1e-4").stdout
    assert "built again because of lr (0.002 -> 0.0001)" in changed


def test_replies_and_their_leaderboard_row_belong_together(run):
    """Where a policy's replies are not those that its row was made from, it is evaluated anew."""
    flags = [*TINY, "--out", run[0], "--steps", "8", "--target", "-1", "none", "q99"]
    ours, other = (common.replies_file(run[0], "dt", f"target {t}", 0) for t in ("q99", "none"))
    before = [r for r in lines_of(run[0] / "leaderboard.jsonl") if r["algorithm"] == "dt"]
    written, kept = lines_of(ours), other.stat().st_mtime_ns
    ours.write_bytes(other.read_bytes())
    forked("dt", *flags)
    assert other.stat().st_mtime_ns == kept, "of the others nothing is made again"
    again = lines_of(ours)
    assert [r["response"] for r in again] == [r["response"] for r in written]
    after = [r for r in lines_of(run[0] / "leaderboard.jsonl") if r["algorithm"] == "dt"]
    assert len(after) == len(before) == 4
    for row, old in zip(*(sorted(rows, key=lambda r: r["variant"]) for rows in (after, before))):
        assert row["replies"] == common.content_hash(str(common.replies_file(
            run[0], "dt", row["variant"], 0)))
        assert (row["replies"] == old["replies"]) or row["variant"] == "target q99"
        for name in ("gold", "reward", "kl_to_base", "win_rate"):
            assert row[name] == pytest.approx(old[name], abs=1e-3)


def test_a_policy_that_was_replaced_is_marked_in_the_table(tmp_path, capsys):
    common.write_beside(tmp_path / "dt" / "run.json", [json.dumps({"settings": {"lr": 1.0}})])
    row = {**dict.fromkeys([name for name, _ in common.COLUMNS.values()]), "algorithm": "dt",
           "seed": 0}
    common.print_leaderboard([
        {**row, "variant": "old", "policy": common.fingerprint({"lr": 2.0})},
        {**row, "variant": "new", "policy": common.fingerprint({"lr": 1.0})}], tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert [line.endswith("*") for line in lines if line.startswith("dt")] == [False, True]
    assert "no longer there" in lines[-1]


def test_prompts_of_a_part_named_test_are_held_out_whatever_the_flag(tmp_path):
    """Of --samples, --responses and --prompts as of --preferences."""
    for part in ("train", "test"):
        write(tmp_path / f"{part}.jsonl", *({"prompt": f"{part} {i}", "response": "r", "reward": i}
                                           for i in range(9)))
    cfg = config(rwr, model="m", samples=str(tmp_path))
    train, held_out = (common.split_prompts(cfg, held_out) for held_out in (False, True))
    assert {p.split()[0] for p in train} == {"train"} and len(train) == 9
    assert {p.split()[0] for p in held_out} == {"test"} and len(held_out) == 9
    alone = config(rwr, model="m", samples=str(tmp_path / "test.jsonl"), held_out=0.5)
    assert common.split_prompts(alone, False) and common.split_prompts(alone, True), "by hash"


def test_messages_need_a_chat_template(codec):
    with pytest.raises(BadInput, match="no chat template, which messages need"):
        codec.prompts([[{"role": "user", "content": "hello"}]])


def test_an_ascii_terminal_shows_escapes(run, tmp_path):
    done = forked("with_ascii_stdout", "rwr", *road(run, tmp_path, "--steps", "1"))
    assert "reward " in done.stdout and r"\xb1" in done.stdout


def with_ascii_stdout(name, *args):
    """Is a process: the script on a terminal that can show ASCII alone."""
    sys.stdout = open(1, "w", encoding="ascii")
    common.launch(globals()[name].main, globals()[name].Config, list(args))


def test_policies_load_and_generate_by_transformers_alone(run):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    model, tokenizer = (kind.from_pretrained(run[0] / "dt")
                        for kind in (AutoModelForCausalLM, AutoTokenizer))
    inputs = tokenizer("\n\nHuman: What do otters eat?\n\nAssistant: <rm_score>: 8 ",
                       return_tensors="pt")
    said = model.generate(**inputs, max_new_tokens=4)
    assert said.shape[1] > inputs["input_ids"].shape[1]


def test_policies_serve_transformers_pipeline(run):
    from transformers import pipeline
    said = pipeline("text-generation", model=str(run[0] / "dt"))(
        "\n\nHuman: Hi.\n\nAssistant: <rm_score>: 8 ", max_new_tokens=4, do_sample=False)
    assert said[0]["generated_text"].startswith("\n\nHuman: Hi.")


@pytest.mark.parametrize("name", ["SFTTrainer", "RewardTrainer"])
def test_a_trainer_of_trl_starts_from_our_folders(run, tmp_path, name):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    rankings = common.load_preferences(config(out=str(run[0])))[0][:8]
    rows = [{"prompt": r.prompt, "chosen": r.responses[0], "rejected": r.responses[1]}
            for r in rankings]
    if name == "SFTTrainer":
        rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
    arguments = getattr(trl, name.replace("Trainer", "Config"))(
        output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=4, use_cpu=True,
        report_to=[], bf16=False)
    folder = run[0] / ("dt" if name == "SFTTrainer" else "rm")
    trainer = getattr(trl, name)(model=str(folder), args=arguments,
                                 train_dataset=datasets.Dataset.from_list(rows))
    if name == "RewardTrainer":  # the head is ours, not one that was made anew
        theirs = trainer.model.score.weight
        ours = reward_model.load_classifier(str(folder), torch.float32, DEVICE).score.weight
        torch.testing.assert_close(theirs.detach().cpu().float(), ours.detach().cpu())
    assert math.isfinite(trainer.train().training_loss)


def test_samples_that_others_labelled_are_trained_on_without_a_reward_model(run, tmp_path):
    samples = write(tmp_path / "s.jsonl", *({"prompt": f"Human: {i}\n\nAssistant:",
                                             "response": " yes", "reward": i} for i in range(40)))
    said = forked("rwr", "--model", run[0] / "base", "--samples", samples, "--out",
                  tmp_path / "run", "--batch_size", "8", "--eval_prompts", "4",
                  "--max_prompt_tokens", "64", "--max_response_tokens", "8").stdout
    assert "no reward model" in said and "rwr beta 0.25" in said


def test_samples_load_with_datasets_and_come_back(run, tmp_path):
    datasets = pytest.importorskip("datasets")
    loaded = datasets.load_dataset("json", data_files=str(run[0] / "samples.jsonl"), split="train",
                                   cache_dir=str(tmp_path))
    loaded.rename_column("response", "completion").to_json(str(tmp_path / "again.jsonl"))
    ours, again = (samples_in(p) for p in (run[0] / "samples.jsonl", tmp_path / "again.jsonl"))
    assert len(loaded) == len(ours) == len(again)
    assert loaded["reward"][:] == [sample.reward for sample in ours]
    for a, b in zip(ours, again):  # to_json writes ten decimals
        assert a._replace(reward=0.0) == b._replace(reward=0.0)
        assert abs(a.reward - b.reward) < 1e-6


def test_responses_that_others_wrote_are_labelled_and_trained_on(run, tmp_path):
    rows = [{"prompt": f"Human: {i}\n\nAssistant:", "response": " yes" * (i % 3 + 1),
             "truncated": i % 2 == 0, "source": "vllm"} for i in range(40)]
    done = forked("mle_filter", "--model", run[0] / "base", "--reward_model", run[0] / "rm",
                  "--responses", write(tmp_path / "r.jsonl", *rows), "--out", tmp_path / "run",
                  "--steps", "2", "--batch_size", "8", "--eval_prompts", "0",
                  "--max_prompt_tokens", "64", "--max_response_tokens", "16", "--no_compile")
    found = samples_in(tmp_path / "run" / "samples.jsonl")
    given = {(row["prompt"], row["response"], row["source"], row["truncated"]) for row in rows}
    assert len(found) > 20
    assert {(s.prompt, s.response, s.source, s.truncated) for s in found} <= given
    assert (tmp_path / "run" / "mle_filter").exists()
    assert "gold" not in done.stdout, "0 prompts: no evaluation"


CURVE = ("loss", "grad_norm", "tokens", "score", "kl", "value_loss", "entropy",
         "explained_variance")


def assert_same_curve(one, other):
    """Two trainings' folders differ by no more than float error."""
    curves = [[[line[k] for k in CURVE if k in line] for line in lines_of(folder / "metrics.jsonl")]
              for folder in (one, other)]
    np.testing.assert_allclose(curves[0], curves[1], rtol=2e-3, atol=2e-4)
    np.testing.assert_allclose(curves[0][0], curves[1][0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_two_ranks_of_ppo_train_to_the_same_curve_as_one(run, tmp_path, sharding):
    """Same order of the data, same draws, same steps, same normalisation: only float error lies
    between the two.  (Of rwr.py: the test of hash seeds.)"""
    flags = ["--steps", "4", "--batch_size", "4", "--rollout_batch_size", "8", "--lr", "1e-4",
             "--max_response_tokens", "8"]
    forked("ppo_baseline", *road(run, tmp_path / "1", *flags))
    forked("ppo_baseline", *road(run, tmp_path / "2", *flags, "--sharding", sharding), ranks=2)
    assert_same_curve(tmp_path / "1" / "ppo", tmp_path / "2" / "ppo")


# ------------------------------------------------------------------------------- scale and trust


def torchrun(ranks, *args, status=0):
    """Runs a script under torchrun; returns the process."""
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                           f"--nproc_per_node={ranks}", *map(str, args)], capture_output=True,
                          text=True, timeout=280, env={**os.environ, **QUIET})
    assert (done.returncode == 0) == (status == 0), done.stdout + done.stderr
    return done


def test_two_ranks_of_rwr_train_to_the_same_curve_as_one_whatever_their_hash_seeds(run, tmp_path):
    """In processes of their own, whose sets and dicts of strings have other orders."""
    flags = ["--steps", "4", "--max_response_tokens", "8"]
    forked("rwr", *road(run, tmp_path / "1", *flags))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = [subprocess.Popen(
        [sys.executable, HERE / "rwr.py", *map(str, road(run, tmp_path / "2", *flags))],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, **QUIET, "RANK": str(rank), "WORLD_SIZE": "2", "MASTER_PORT": port,
             "MASTER_ADDR": "127.0.0.1", "PYTHONHASHSEED": str(rank + 1)}) for rank in range(2)]
    said = [process.communicate(timeout=200)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], said
    assert_same_curve(tmp_path / "1" / "rwr", tmp_path / "2" / "rwr")


UNEVEN = [*examples(6), example([5, 6, 7], 3)]  # the last has no response token
KERNEL_OF = {"mle_filter": mle_filter.masked_nll_, "rwr": rwr.weighted_nll_, "dt": dt.masked_nll_}
CASES = [(name, sharding, tokens, rows) for name in (*KERNEL_OF, "ppo_baseline", "reward_model")
         for sharding in ("ddp", "fsdp", "fsdp, recomputed")
         for tokens, rows in ((10**6, 7), (20, 7), (10**6, 3))]


def step_gradient(folder, name, sharding, tokens, rows):
    """The gradient of one optimiser step of an algorithm, over all ranks, in float32, whole on
    every rank."""
    cfg = config({"ppo_baseline": ppo_baseline}.get(name, common), micro_batch_tokens=tokens,
                 batch_size=rows, steps=1, sharding=sharding.split(",")[0],
                 gradient_checkpointing="recomputed" in sharding, compile=False)
    load_policy = functools.partial(common.load_model, str(folder / "policy"))
    load_rewards = functools.partial(reward_model.load_classifier, str(folder / "rewards"),
                                     torch.float32)
    if name == "reward_model":
        module = common.wrap_for_ranks(reward_model.RewardModel(
            common.load_for_training(load_rewards, cfg), torch.float32), cfg)
        rankings = [[e.ids, np.append(e.ids[:3], [4] * i), np.array([7] * 5)][:2 + i % 2]
                    for i, e in enumerate(UNEVEN[-rows:])]
        read = Tokens(folder / "tokens", lambda: ((ids, np.ones(len(ids), bool))
                                                  for ranking in rankings for ids in ranking))
        ends = np.cumsum([0] + [len(ranking) for ranking in rankings])
        spans = [range(a, b) for a, b in zip(ends, ends[1:])]
        micros = reward_model.micro_batches(read, spans, None, cfg)
    elif name == "ppo_baseline":
        policy = common.load_for_training(load_policy, cfg)
        critic = reward_model.RewardModel(common.load_for_training(load_rewards, cfg),
                                          torch.float32)
        actor = ppo_baseline.ActorCritic(policy, critic, UNITS, cfg)
        module = common.wrap_for_ranks(actor, cfg, "values", "log_probs")
        rollout, old, base, _, z = rollout_of(range(2, 2 + rows))
        values = common.each_response_token(actor.values, critic.model, rollout.examples, cfg,
                                            Cost())
        trained, _ = ppo_baseline.prepare(rollout, old, base, values, z, 0.1, cfg)
        kernel = functools.partial(ppo_baseline.clipped_surrogate_, temperature=1.0, clip=0.2,
                                   entropy_coef=0.01, statistics=torch.zeros(3))
        batch, = ppo_baseline.minibatches(trained, replace(cfg, epochs=1, steps=None))
        micros = batch.micros
    else:
        module = common.load_policy(str(folder / "policy"), cfg)
        batch = step_of([e._replace(weight=1.0 + i * (name == "rwr"))
                         for i, e in enumerate(UNEVEN[-rows:])], cfg)
        micros = batch.micros
    for micro in micros:
        module.require_backward_grad_sync = micro is micros[-1]
        if name == "reward_model":
            scores = module(micro.input_ids, micro.lengths, micro.last)
            loss = reward_model.bradley_terry(scores[micro.better], scores[micro.worse], 0.0,
                                              0.01) @ micro.weight
        elif name == "ppo_baseline":
            surrogate, value_loss = module(micro, kernel, cfg.value_clip)
            loss = (surrogate + 0.1 * value_loss) / batch.normaliser
        else:
            weight = [micro.weight] if name == "rwr" else []
            loss = module(micro, KERNEL_OF[name], *weight) / batch.normaliser
        loss.backward()
    grads = [p.grad for p in module.parameters()]
    return torch.cat([(g.full_tensor() if hasattr(g, "full_tensor") else g).flatten()
                      for g in grads])


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
    """Is what each rank of the next two tests does."""
    def main(cfg):
        found = {str(case): step_gradient(Path(folder), *case) for case in CASES}
        found |= {f"bytes, {sharding}": training_bytes(Path(folder), sharding)
                  for sharding in ("ddp", "fsdp")}
        if common.rank() == 0:
            torch.save(found, Path(folder) / f"{common.world_size()}.pt")
    common.launch(main, common.Config, ["--out", folder, "--no_compile"])


def make_gradients(folder):
    """The gradients that one process finds for a policy and a reward model, and what 2 and 4
    ranks find."""
    forked("save_models", folder)
    for ranks in (1, 2, 4):
        forked("measure_gradients", folder, ranks=ranks)
    return {n: torch.load(folder / f"{n}.pt", weights_only=True) for n in (1, 2, 4)}


def save_models(folder):
    """A policy and a reward model for measure_gradients."""
    from transformers import LlamaForSequenceClassification
    model = tiny_model(dtype=torch.float32)
    model.save_pretrained(Path(folder) / "policy")
    torch.manual_seed(1)
    model.config.num_labels, model.config.pad_token_id = 1, 0
    LlamaForSequenceClassification(model.config).save_pretrained(Path(folder) / "rewards")


@pytest.fixture(scope="session")
def gradients(begun):
    """What make_gradients returns."""
    return begun["gradients"][1].result()


@pytest.mark.parametrize("ranks", [2, 4])
def test_gradient_is_the_same_under_real_ranks(gradients, ranks):
    """Of every algorithm, DDP or FSDP2, whatever the micro-batches, also with fewer sequences
    than ranks."""
    for case in map(str, CASES):
        gradient = gradients[1][case]
        assert gradient.norm() > 0
        assert (gradients[ranks][case] - gradient).norm() < 1e-5 * gradient.norm(), case


@pytest.mark.parametrize("ranks", [2, 4])
def test_training_holds_16_bytes_a_weight_on_each_rank_and_a_share_of_them_under_fsdp(gradients,
                                                                                      ranks):
    """The README's budget: float32 weights, gradients and two moments."""
    weights = sum(p.numel() for p in tiny_model().parameters())
    assert gradients[ranks]["bytes, ddp"] == 16 * weights * ranks
    assert gradients[ranks]["bytes, fsdp"] == 16 * weights


def result(folder):
    """A finished training, but for the clock: the bytes of the weights, the lines of
    metrics.jsonl."""
    clocks = ("seconds", "rollout_s", "score_s", "log_probs_s", "update_s", "generation_share",
              "rollout_tokens_per_second")
    return (folder / "model.safetensors").read_bytes(), [
        {k: v for k, v in line.items() if k not in clocks}
        for line in lines_of(folder / "metrics.jsonl")]


KILLS = int(os.environ.get("KILLS", 6))  # KILLS=20 python -m pytest test_all.py -k killed: more


def killed_and_resumed(start, work, kills, rng, most):
    """Starts a run again and again, killing -9 a rank of it at a random moment, within about
    `most` steps, then lets it end; returns how often it was killed."""
    killed, metrics = 0, work / "metrics.jsonl"

    def lines():
        return metrics.read_bytes().count(b"\n") if metrics.exists() else 0
    while killed < kills:
        before, run = time.time(), start()
        while run.alive() and not (metrics.exists() and metrics.stat().st_mtime > before):
            time.sleep(0.01)
        goal = lines() + rng.randrange(most + 1)
        while run.alive() and lines() < goal:
            time.sleep(0.005)
        time.sleep(rng.random() / 10)
        if not run.alive():
            break
        rng.choice(run.processes).kill()
        run.end()
        killed += 1
    last = start().end()
    assert not any(last.status), last.stdout + last.stderr
    return killed


@pytest.mark.parametrize("name, ranks, steps, every, kills", [
    ("rwr", 1, 40 * KILLS, 5, KILLS), ("ppo", 1, 12, 1, 2), ("dt", 2, 80, 5, 2)])
def test_a_run_killed_at_random_moments_ends_bit_for_bit_as_one_that_was_not(
        run, tmp_path, name, ranks, steps, every, kills):
    more = {"ppo": ["--rollout_batch_size", "16"], "dt": ["--sharding", "fsdp"]}.get(name, [])
    whole, broken = (functools.partial(
        Ranks, {"ppo": "ppo_baseline"}.get(name, name),
        *road(run, tmp_path / out, "--steps", steps, "--save_every", every, *more), ranks=ranks)
        for out in ("whole", "broken"))
    done = whole().end()
    assert not any(done.status), done.stderr
    assert killed_and_resumed(broken, tmp_path / "broken" / f".{name}.new", kills,
                              random.Random(ranks), 3 * every) == kills
    weights, lines = result(tmp_path / "whole" / name)
    again, resumed = result(tmp_path / "broken" / name)
    assert [line["step"] for line in resumed] == list(range(steps))
    assert resumed == lines and again == weights
    assert not list((tmp_path / "broken" / name).glob("*checkpoint*"))


def interrupted_at_step_5(*args):
    """Is a rank: rwr.py, which Ctrl-C ends."""
    log = common.TrainingRun.log

    def interrupt(self, step, **values):
        log(self, step, **values)
        if step == 5:
            raise KeyboardInterrupt
    common.TrainingRun.log = interrupt
    common.launch(rwr.main, rwr.Config, list(args))


def test_an_interrupted_run_of_two_ranks_goes_on_bit_for_bit_and_says_so_on_another_number(
        run, tmp_path):
    flags = ["--steps", "8", "--save_every", "2"]
    forked("rwr", *road(run, tmp_path / "whole", *flags), ranks=2)
    done = forked("interrupted_at_step_5", *road(run, tmp_path / "two", *flags), ranks=2,
                  status=130)
    assert "finished stages are kept" in done.stderr
    shutil.copytree(tmp_path / "two", tmp_path / "one")
    two = forked("rwr", *road(run, tmp_path / "two", *flags), ranks=2)
    assert "goes on from step 6\n" in two.stdout
    assert result(tmp_path / "two" / "rwr") == result(tmp_path / "whole" / "rwr")
    one = forked("rwr", *road(run, tmp_path / "one", *flags))
    assert "goes on from step 6, which 2 rank(s) reached: with 1 the last bits" in one.stdout
    assert_same_curve(tmp_path / "one" / "rwr", tmp_path / "whole" / "rwr")


def test_ranks_with_other_flags_or_other_files_stop_at_the_start(run, tmp_path):
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
        write(tmp_path / str(rank) / "s.jsonl", *({**GOOD, "prompt": f"p{i}", "reward": i + rank}
                                                  for i in range(30)))
    flags = road(run, tmp_path / "run", "--steps", "1")
    other_flags = forked("rwr", *flags, ranks=2, status=2,
                         each=lambda rank: {"args": ["--beta", rank + 1]})
    other_files = forked("rwr", *flags, "--samples", "s.jsonl", ranks=2, status=2,
                         each=lambda rank: {"cwd": str(tmp_path / str(rank))})
    for done in (other_flags, other_files):
        assert "started with other flags, or see other files" in done.stderr
    assert not (tmp_path / "run" / "rwr").exists()


def test_three_ranks_train_on_fewer_rows_than_ranks_as_one_does(run, tmp_path):
    prompts = [f"\n\nHuman: What do {animal} eat?\n\nAssistant:" for animal in common.ANIMALS]
    cfg = config()
    hidden = [p for p in prompts if common.is_held_out(p, cfg.held_out, cfg.seed)]
    seen = [p for p in prompts if p not in hidden]
    samples = write(tmp_path / "s.jsonl", *({"prompt": p, "response": " meat" * (i + 1),
                                             "reward": i} for i, p in enumerate(seen[:2])))
    asked = write(tmp_path / "p.jsonl", *({"prompt": p} for p in prompts))
    assert hidden
    for ranks in (1, 3):
        out = tmp_path / str(ranks)
        forked("rwr", *road(run, out, "--samples", samples, "--prompts", asked, "--steps", "3",
                            "--eval_prompts", "2", "--lr", "1e-4", "--max_response_tokens", "8"),
               ranks=ranks)
    assert_same_curve(tmp_path / "1" / "rwr", tmp_path / "3" / "rwr")
    one, three = (lines_of(tmp_path / str(ranks) / "leaderboard.jsonl") for ranks in (1, 3))
    assert one[0]["response_tokens"] == three[0]["response_tokens"] and len(three) == 2


def test_a_damaged_checkpoint_is_named_and_without_it_the_one_before_is_taken(tmp_path):
    cfg = config(lr=0.1)
    policy = common.Policy(tiny_model(dtype=torch.float32), cfg)
    optimizer, schedule = common.make_optimizer(policy, cfg, 10)

    def start(state):
        return common.TrainingRun(tmp_path, policy, optimizer, schedule, 10, cfg, Cost(), state)

    def learn():
        logits = policy.model(torch.arange(5, device=DEVICE)[None]).logits
        logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    kept, state = [], {"beta": 0}
    with start(state) as run:
        for step in (1, 2, 3):
            learn()
            state["beta"] = step
            run.file.write("0123456789")
            run.checkpoint(step, {"seconds": 1.0})
            kept.append([p.detach().clone() for p in policy.parameters()])
        last, before = common.checkpoints_in(tmp_path)
        assert (last.name, before.name) == ("00000003", "00000002"), "the last two are kept"
        largest = max(last.glob("*"), key=lambda p: p.stat().st_size)
        largest.write_bytes(largest.read_bytes()[:-100])
        state = {}
        with pytest.raises(BadInput, match="00000003: damaged; delete it"):
            start(state).restore()
        shutil.rmtree(last)
        assert start(state).restore() == (2, 20) and state == {"beta": 2}
        for now, then in zip(policy.parameters(), kept[1]):
            torch.testing.assert_close(now, then, rtol=0, atol=0)
        run.state["beta"] = 4
        run.checkpoint(3, {"seconds": 1.0})
    assert start(state).restore() == (3, 30) and state == {"beta": 4}


@pytest.mark.parametrize("module", [mle_filter, rwr, dt, reward_model])
def test_a_step_that_is_not_finite_moves_nothing_and_several_end_the_run(run, tmp_path, module,
                                                                         monkeypatch):
    out = tmp_path / "toy"
    out.mkdir()
    (out / "data").symlink_to(run[0] / "data")
    cfg = config(module, out=str(out), steps=20, batch_size=4, save_every=0)
    base, cost, weights = common.Stage(str(run[0] / "base"), "base", Cost()), Cost(), []

    def spoil(self, *args, **more):
        """Adam's step, which must not be reached from the third step on."""
        weights.append([p.detach().clone() for p in self.param_groups[0]["params"]])
        return step(self, *args, **more)
    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", spoil)
    clip = torch.nn.utils.clip_grad_norm_

    def clip_some(parameters, most):
        norm = clip(parameters, most)
        return norm if len(weights) < 2 else norm * math.nan
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip_some)
    with pytest.raises(BadInput, match="5 steps in a row, the last of them step 6"):
        if module is reward_model:
            module.train(cfg, base, tmp_path, cost)
        else:
            codec = Codec(base.folder, cfg)
            module.train(cfg, base, samples_of(codec, range(8)), tmp_path, cost)
    assert len(weights) == 2 and not (tmp_path / "model.safetensors").exists()
    lines = lines_of(tmp_path / "metrics.jsonl")
    assert [line["grad_norm"] is None for line in lines] == [False] * 2 + [True] * 5


def test_labelling_gives_the_same_rows_in_the_same_order_whatever_the_world_size(run, tmp_path):
    """Three prompts for four ranks too: one has nothing to do."""
    prompts = write(tmp_path / "p.jsonl", *(
        {"prompt": f"\n\nHuman: What do {animal} eat?\n\nAssistant:"}
        for animal in list(common.ANIMALS)[:5]))
    found = []
    for ranks in (1, 4):
        out = tmp_path / str(ranks)
        forked("mle_filter", "--model", run[0] / "base", "--reward_model", run[0] / "rm",
               "--prompts", prompts, "--out", out, "--sources", "generated",
               "--samples_per_prompt", "2", "--no_compile", "--dtype", "fp32", "--held_out", "0.5",
               "--max_prompt_tokens", "64", "--max_response_tokens", "16", "--eval_prompts", "1",
               "--steps", "2", ranks=ranks)
        found.append(samples_in(out / "samples.jsonl"))
    assert [s[:2] for s in found[0]] == [s[:2] for s in found[1]] and len(found[0]) % 2 == 0
    np.testing.assert_allclose(*[[s.reward for s in rows] for rows in found], atol=1e-4)


def fail_on_one_rank(folder):
    """Is what each rank of the next test does."""
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
        done = forked("rwr", *road(run, tmp_path), status=2)
    assert "another run is at work there" in done.stderr
    assert f"process {os.getpid()}" in done.stderr


def without_network(*args):
    """Is a process: rwr.py, where every network call is an error, and no flag forbids one."""
    def refuse(*args, **more):
        raise AssertionError(f"a network call: {args}")
    import huggingface_hub.constants
    huggingface_hub.constants.HF_HUB_OFFLINE = False
    socket.socket.connect = socket.getaddrinfo = socket.create_connection = refuse
    common.launch(rwr.main, rwr.Config, list(args))


def test_a_local_model_needs_no_network(run, tmp_path):
    done = forked("without_network", *road(run, tmp_path, "--steps", "1"))
    assert "rwr beta" in done.stdout, done.stderr


def malformed(rng):
    """The bytes of a data file with something wrong, and a name for it."""
    rows = [{"prompt": "Human: hi", "response": "yes", "reward": 1.0,
             "chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}
            for _ in range(rng.randrange(1, 6))]
    strange = rng.choice([
        None, True, 3, -1.5, [], {}, [[]], "", " ", "\x00", "\ud800", "\x1b[2J", "é" * 50, 10**400,
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
        lambda: data.replace(b"\n", b"\r\n"), lambda: b"\xef\xbb\xbf" + data,
        lambda: data.replace(b'"', b"'"), lambda: data + b"[" * 100_000 + b"\n",
        lambda: data + b'{"a":' * 100_000 + b"\n",
        lambda: data + b'{"prompt": "' + b"x" * 2_000_000, lambda: data + b"\x00" * 100,
        lambda: data + b"NaN\n", lambda: data.replace(b'"prompt"', b'"chosen": "x", "prompt"'),
        lambda: data.decode().encode("utf-16"), lambda: data + b"7\n",
        lambda: gzip.compress(data)[:place], lambda: gzip.compress(data)[:-4],
        lambda: gzip.compress(data)])()


def test_five_hundred_malformed_files_give_rows_or_one_sentence(tmp_path):
    rng, refused = random.Random(0), 0
    for number in range(500):
        path = tmp_path / f"{number}.jsonl{'.gz' * (rng.random() < 0.3)}"
        path.write_bytes(malformed(rng))
        for read in (samples_in, lambda p: common.read_preferences(p, 0.5, 0, None),
                     common.read_prompts):
            try:
                read(str(path))
            except BadInput as problem:
                refused += 1
                said = common.printable(problem)
                assert path.name in said and "\n" not in said.strip() and len(said) < 1000, said
    assert 300 < refused < 1500


# ------------------------------------------------------------------------ README and benchmarks


def test_the_readmes_lifting_example_has_the_gradient_of_the_weighted_loss():
    """The README's block that calls head_loss() runs as it stands."""
    blocks = re.findall(r"(?ms)^```python\n(.*?)^```", (HERE / "README.md").read_text())
    code, = [code for code in blocks if "head_loss(" in code]
    space = {}
    exec(code, space)
    model, ids, mask, weight = (space[name] for name in ("model", "input_ids", "response_mask",
                                                         "weight"))
    ours = {name: p.grad.clone() for name, p in model.named_parameters()}
    assert mask.shape == ids.shape and ids.shape[:1] == weight.shape
    model.zero_grad()
    log_p = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
    nll = -log_p.gather(-1, ids[:, 1:, None]).squeeze(-1)
    share = weight[:, None] * mask[:, 1:]
    ((share * nll).sum() / mask[:, 1:].sum()).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(ours[name], p.grad, rtol=1e-5, atol=1e-7)


def test_the_benchmarks_use_only_what_the_scripts_have():
    ours = {m.__name__: m for m in (common, dt, mle_filter, ppo_baseline, reward_model, rwr)}
    used = {(node.value.id, node.attr, file.name) for file in (HERE / "benchmarks").glob("*.py")
            for node in ast.walk(ast.parse(file.read_text()))
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
            and node.value.id in ours}
    assert len(used) > 50
    assert not [use for use in used if not hasattr(ours[use[0]], use[1])]


def test_a_report_is_one_page_without_external_files(run, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(HERE / "benchmarks"))
    done = script("benchmarks/report.py", "--out", run[0], "--conversations", "3")
    page = (run[0] / "report.html").read_text()
    assert "report.html" in done.stdout and page.count("<article>") == 3
    assert "dt target q99, guidance 0.5" in page
    assert not re.search(r"""(src|href)=["'](?!#)|@import|url\((?!#)""", page)
    bad = script("benchmarks/report.py", "--out", run[0] / "dt", status=2)
    assert bad.stderr.count("leaderboard.jsonl") == 1


def test_the_crossover_does_all_of_it_and_goes_on(run, tmp_path, monkeypatch):
    shutil.copytree(run[0], tmp_path / "seed0")
    flags = ("--mini", "--seeds", "0", "--out", tmp_path, "--assets", tmp_path)
    first = script("benchmarks/crossover.py", *flags)
    rows = [row for _, row in common.read_jsonl(tmp_path / "results.jsonl")]
    assert {row["axis"] for row in rows} == {"steps", "levers", "samples", "noise", "round 2"}
    assert {row["samples"] for row in rows} == {200, 8250} and "Error" not in first.stdout
    again = script("benchmarks/crossover.py", *flags)
    assert rows == [row for _, row in common.read_jsonl(tmp_path / "results.jsonl")]
    text = (tmp_path / "table.md").read_text()
    assert text in again.stdout and "A second round" in text and "the better filter" in text
    monkeypatch.syspath_prepend(str(HERE / "benchmarks"))
    import crossover_report
    cells = [{"axis": "steps", "seed": seed, "method": method, "steps": steps, "slope": gold / 2,
              "gold": gold + 0.01 * seed * steps / 200} for seed in range(3)
             for method, golds in (("DT q99", (0, 2, 3)), ("filter 0.2", (2, 2, 2)))
             for steps, gold in zip((60, 200, 600), golds)]
    said = crossover_report.turns(cells, "steps")
    assert "DT q99 is ahead of both filters from 600 steps on" in said
    assert "rises most from 60 to 200 steps: 0.00 ± 0.00 to 1.00 ± 0.00" in said


def test_the_crossover_takes_the_best_rate_of_what_was_tried_on_all_seeds(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(HERE / "benchmarks"))
    import crossover
    rows = [{"seed": seed, "method": "DT q99", "steps": steps, "samples": 10_000, "noise": noise,
             "lr": lr, "gold": -abs(lr - best)} for seed in crossover.TUNING_SEEDS
            for steps, noise, best in ((60, 0.0, 1e-2), (600, 0.0, 1e-3), (600, 2.5, 1e-2))
            for lr in (1e-3, 1e-2)]
    crossover.choose(rows[:-1], tmp_path / "tuned.json")  # the last rate has no second seed
    tuned = common.read_record(tmp_path / "tuned.json")
    assert tuned == {"DT": [[60, 10_000, 0.0, 1e-2], [600, 10_000, 0.0, 1e-3]]}
    crossover.choose(rows, tmp_path / "tuned.json")
    tuned = common.read_record(tmp_path / "tuned.json")
    assert [crossover.learning_rate("DT", steps, 10_000, noise, tuned)
            for steps, noise in ((20, 0.0), (2_000, 0.0), (600, 1.0))] == [1e-2, 1e-3, 1e-2]
    cells = [{**row, "axis": "tune", "setting": ""} for row in rows]
    assert crossover.latest(cells) == [row for row in cells if row["lr"] == 1e-2]


def test_the_crossovers_own_levers_do_what_they_say(codec, run, monkeypatch):
    """Late dropout keeps all tags in the first epoch; faster rows move so many times as far."""
    monkeypatch.syspath_prepend(str(HERE / "benchmarks"))
    import crossover
    cfg = config(dt, condition_dropout=0.5)
    late = crossover.prepare_late(samples_of(codec, range(40)), codec, cfg)
    dropped = [sum(late.tag(i, epoch) == [] for i in range(40)) for epoch in (0, 1)]
    assert dropped[0] == 0 and 8 < dropped[1] < 32
    moved = []
    for times in (1, 10):
        with crossover.faster_rows([3, 5], times):
            policy = common.load_policy(str(run[0] / "base"), config(lr=1e-3))
            optimizer, _ = common.make_optimizer(policy, config(lr=1e-3), 1)
        weight = policy.model.get_input_embeddings().weight
        before = weight.detach().clone()
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        moved.append(weight.detach() - before)
    assert torch.allclose(moved[1][[3, 5]], 10 * moved[0][[3, 5]], rtol=1e-3)
    assert torch.equal(moved[1][6:], moved[0][6:])


def test_one_pair_moves_each_algorithm_as_the_notebook_says(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE / "benchmarks"))
    import one_pair
    chosen, rejected = (dict(zip(one_pair.changes, side))
                        for side in zip(*one_pair.changes.values()))
    assert chosen["mle_filter"] > rejected["mle_filter"] and chosen["rwr"] > rejected["rwr"]
    assert chosen["dt"] > 0 and rejected["dt"] > 0, "each after its own tag"
    assert chosen["ppo"] > 0 > rejected["ppo"]


def test_plain_language_is_measured_by_the_stated_rules(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE / "benchmarks"))
    import paired
    import reading
    prompt = [{"role": "user", "content": "Where do otters sleep?"}]
    plain = ("They sleep on the bank. They like the sun, and they play all day. At night they hide "
             "in a hole.")
    assert reading.gold(prompt, plain, truncated=False) == 10
    assert reading.gold(prompt, plain, truncated=True) == 8
    assert reading.gold(prompt, plain.replace("sleep", "rest"), truncated=False) == 8
    assert reading.gold(prompt, "They sleep on the bank.", truncated=False) == 7
    measured = reading.measures("Where?", "Otters sleep beside rivers. Simple people wonder.",
                                truncated=False)
    assert measured["syllables a word"] == pytest.approx(13 / 7)
    assert measured["words a sentence"] == 3.5
    ease = 206.835 - 1.015 * 3.5 - 84.6 * 13 / 7  # Flesch 1948
    assert measured["ease"] == pytest.approx(ease)
    mean, error, prompts = paired.difference([{"a": 1.0, "b": 3.0}, {"a": 3.0, "b": 5.0}],
                                             [{"a": 1.0, "b": 1.0}])
    assert (mean, error, prompts) == (2.0, pytest.approx(1.0), 2)


def test_gold_in_a_reward_models_place_scores_what_training_sees(codec, monkeypatch):
    monkeypatch.syspath_prepend(str(HERE / "benchmarks"))
    import with_gold
    folder, prompt = codec.tokenizer.name_or_path, [{"role": "user", "content": "What do we do?"}]
    cfg = config(dt, model=folder, samples="x", max_response_tokens=6)
    long = "They live in rivers and so on."
    seen = codec.tokenizer.decode(codec.encode([long])[0][:6])
    score = with_gold.gold_stage(cfg, None).load_scorer()
    assert score([prompt] * 2, [long, "So."], [False] * 2, Cost()) == [
        with_gold.gold(prompt, seen, truncated=True), with_gold.gold(prompt, "So.", False)]
    assert long != seen and long.startswith(seen)


def test_toy_rewards_follow_the_stated_rules():
    prompt = "\n\nHuman: What do otters eat?\n\nAssistant:"
    best = (" Good question! They eat meat. They live in rivers. They are small. I hope this "
            "helps!")
    assert common.gold_reward(prompt, best) == 5
    for reply, gold in ((" They eat meat.", 2), (" Maybe they eat plants.", -1),
                        (" As for lions, they eat meat.", -0.5), (" Who cares.", -0.5),
                        (" They eat me", -0.25), (" They eat meat. They eat meat.", 2)):
        assert common.gold_reward(prompt, reply) == gold, reply
    assert common.gold_reward(prompt, " They eat meat.", truncated=True) == 1


# ----------------------------------------------------------------- other people's models: the zoo
# Tiny models of many architectures, with weights at which attention and routing matter, held
# against transformers' own forward and generate of each sequence alone.

ZOO_V = 320


def zoo_kinds():
    """Models of width 64 by name; where there is a sliding window it is 6."""
    import transformers as t
    kw = dict(vocab_size=ZOO_V, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
              num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
              bos_token_id=2, eos_token_id=0, pad_token_id=0)
    turns = dict(sliding_window=6, layer_types=["sliding_attention", "full_attention"])
    moe = dict(num_local_experts=4, num_experts_per_tok=2)
    gemma = dict(**kw, head_dim=24, query_pre_attn_scalar=24)
    return {
        "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**kw)),
        "qwen3": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(
            **kw, head_dim=32, tie_word_embeddings=True)),
        "gemma2": lambda: t.Gemma2ForCausalLM(t.Gemma2Config(
            **gemma, sliding_window=6, final_logit_softcapping=2.0, attn_logit_softcapping=2.0)),
        "gemma3": lambda: t.Gemma3ForCausalLM(t.Gemma3TextConfig(**gemma, **turns)),
        "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(
            vocab_size=ZOO_V, n_embd=64, n_layer=2, n_head=4, n_positions=256, bos_token_id=0,
            eos_token_id=0)),
        "phi3": lambda: t.Phi3ForCausalLM(t.Phi3Config(**kw, sliding_window=6)),
        "gpt_oss": lambda: t.GptOssForCausalLM(t.GptOssConfig(**kw, **turns, **moe, head_dim=16)),
        "mixtral": lambda: t.MixtralForCausalLM(t.MixtralConfig(**kw, **moe, sliding_window=6)),
        "olmo2": lambda: t.Olmo2ForCausalLM(t.Olmo2Config(**kw)),
        "granite": lambda: t.GraniteForCausalLM(t.GraniteConfig(
            **kw, embedding_multiplier=12.0, logits_scaling=6.0, residual_multiplier=0.22,
            attention_multiplier=0.1, tie_word_embeddings=True)),
        "lfm2": lambda: t.Lfm2ForCausalLM(t.Lfm2Config(
            **kw, layer_types=["conv", "full_attention"], conv_L_cache=3,
            block_auto_adjust_ff_dim=False)),
        "qwen2_moe": lambda: t.Qwen2MoeForCausalLM(t.Qwen2MoeConfig(  # a window in its mask alone
            **kw, use_sliding_window=True, sliding_window=6, max_window_layers=1, num_experts=4,
            num_experts_per_tok=2, moe_intermediate_size=32, shared_expert_intermediate_size=32)),
        "starcoder2": lambda: t.Starcoder2ForCausalLM(t.Starcoder2Config(  # dropout by other names
            **kw, sliding_window=6, residual_dropout=0.5, embedding_dropout=0.5)),
        "gemma3_multimodal": lambda: t.Gemma3ForConditionalGeneration(t.Gemma3Config(
            text_config=t.Gemma3TextConfig(**gemma, **turns), mm_tokens_per_image=4,
            vision_config=dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                               num_attention_heads=2, image_size=16, patch_size=8),
            image_token_index=110, boi_token_index=111, eoi_token_index=112)),
    }


ZOO = ["llama", "qwen3", "gemma2", "gemma3", "gpt2", "phi3", "gpt_oss", "mixtral", "olmo2",
       "granite", "lfm2", "qwen2_moe", "starcoder2", "gemma3_multimodal"]
ZOO_PACKED = {"llama", "qwen3", "gemma3", "gpt2", "phi3", "mixtral", "olmo2", "granite",
              "starcoder2", "gemma3_multimodal"}


@functools.cache
@torch.no_grad()
def zoo_model(name):
    """A folder of one of the zoo's models, and transformers' own of it, in eval mode."""
    from transformers import AutoModelForCausalLM
    torch.manual_seed(0)
    model = zoo_kinds()[name]().float()
    ends = {model.get_input_embeddings().weight.data_ptr(),
            model.get_output_embeddings().weight.data_ptr()}
    for key, p in model.named_parameters():
        if p.dim() == 1:
            p += 0.1 * torch.randn_like(p)
        elif "vision" not in key and "conv.conv" not in key:
            fan = p.shape[1] if p.data_ptr() in ends or p.dim() == 2 else p.shape[-2]
            p.normal_(std=1.4 / math.sqrt(fan))
    model.generation_config.eos_token_id = [0, 1]
    folder = tempfile.mkdtemp(prefix=f"zoo-{name}-")
    model.save_pretrained(folder)
    own = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().to(DEVICE)
    return folder, own


def zoo_examples():
    """Sequences of uneven length, some longer than the windows."""
    rng = np.random.default_rng(0)
    return [example(rng.integers(3, 100, p + r), p)
            for p, r in ((5, 7), (1, 1), (20, 14), (9, 3), (2, 18))]


@pytest.mark.parametrize("name", ZOO)
def test_loss_and_every_gradient_equal_those_of_each_sequence_alone(name):
    folder, own = zoo_model(name)
    own.zero_grad()
    expected = 0.0
    for e in zoo_examples():
        ids, prompt = torch.tensor(e.ids, dtype=torch.int64, device=DEVICE), int(e.mask.argmax())
        loss = torch.nn.functional.cross_entropy(
            own(input_ids=ids[None]).logits[0, prompt - 1:-1], ids[prompt:], reduction="sum")
        loss.backward()
        expected += loss.item()
    policy = common.load_policy(folder, config())
    assert (policy.model.config.get_text_config()._attn_implementation
            == common.PACKED) == (name in ZOO_PACKED)
    loss = policy(common.collate(zoo_examples()), dt.masked_nll_)
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    ours = {key: p.grad for key, p in policy.model.named_parameters()}
    floor = 1e-4 * math.sqrt(sum(p.grad.square().sum().item() for p in own.parameters()
                                 if p.grad is not None))
    for key, p in own.named_parameters():
        if p.grad is None:  # an image tower
            assert ours[key] is None or not ours[key].any(), key
            continue
        assert (ours[key] - p.grad).norm() < 1e-4 * max(p.grad.norm().item(), floor), key


@torch.no_grad()
def zoo_generate(own, prompt, stop, **more):
    ids = torch.tensor([prompt], device=DEVICE)
    return own.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                        max_new_tokens=12, eos_token_id=stop, pad_token_id=0,
                        **more)[0, len(prompt):].tolist()


ZOO_PROMPTS = [np.random.default_rng(n).integers(3, 100, n).tolist() for n in (3, 1, 17, 6, 24)]


@pytest.mark.parametrize("name", ZOO)
def test_greedy_samples_and_log_probs_are_those_of_each_prompt_alone(name):
    folder, own = zoo_model(name)
    model, cfg = common.load_model(folder), config(max_response_tokens=12, temperature=0.0, slots=3)
    prompts = [*ZOO_PROMPTS, ZOO_PROMPTS[2]]
    free = [zoo_generate(own, prompt, [ZOO_V - 1]) for prompt in ZOO_PROMPTS]
    stop = [free[2][4], free[3][-1]]  # ends rows at different steps
    found = common.sample(model, prompts, cfg, 0, stop, Cost())
    for prompt, response in zip(ZOO_PROMPTS, found):
        assert response.ids == zoo_generate(own, prompt, stop)
        assert response.truncated == (response.ids[-1] not in stop)
    assert found[-1].ids == found[2].ids and not found[2].truncated
    warm = config(max_response_tokens=12, temperature=0.8, slots=3)
    drawn = common.sample(model, prompts, warm, 7, stop, Cost())
    rows = [example(p + r.ids, len(p)) for p, r in zip(prompts, drawn)]
    again = log_probs_of(model, rows, warm)
    for row, response, log_probs in zip(rows, drawn, again):
        ids, n = torch.tensor(row.ids, dtype=torch.int64, device=DEVICE), len(response.ids)
        with torch.no_grad():
            expected = (own(input_ids=ids[None]).logits[0, -n - 1:-1] / 0.8).log_softmax(-1)
        expected = expected.gather(1, ids[-n:, None])[:, 0].tolist()
        assert response.log_probs == pytest.approx(expected, abs=2e-4)
        assert log_probs == pytest.approx(expected, abs=2e-4)


@pytest.mark.parametrize("name", ZOO)
def test_a_saved_policy_is_an_ordinary_folder_that_says_the_same(name, tmp_path):
    from transformers import AutoModelForCausalLM
    folder, own = zoo_model(name)
    zoo_tokenizer().save_pretrained(folder)
    policy = common.load_policy(folder, config())
    common.save_policy(tmp_path, policy, Codec(folder, config()), config())
    saved, report = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32,
                                                         output_loading_info=True)
    assert not any(report.values())
    ids = torch.tensor([ZOO_PROMPTS[4]])
    with torch.no_grad():
        torch.testing.assert_close(saved.eval()(input_ids=ids).logits,
                                   own(input_ids=ids.to(DEVICE)).logits.cpu(), rtol=0, atol=1e-4)
    assert set(saved.generation_config.eos_token_id) >= {0, 1}


# -------------------------------------------------------------- other people's tokenizers and turns

ZOO_TEMPLATES = {
    "llama3": "{{ bos_token }}{% for m in messages %}{{ '<|start|>' + m['role'] + '<|header|>\n\n' "
              "+ m['content'] | trim + '<|eot|>' }}{% endfor %}{% if add_generation_prompt %}"
              "{{ '<|start|>assistant<|header|>\n\n' }}{% endif %}",
    "chatml": "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + "
              "'<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}"
              "{{ '<|im_start|>assistant\n' }}{% endif %}",
    "gemma": "{{ bos_token }}{% for m in messages %}{{ '<start_of_turn>' + ('model' if m['role'] "
             "== 'assistant' else m['role']) + '\n' + m['content'] | trim + '<end_of_turn>\n' }}"
             "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
    "phi3": "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}"
            "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}"
            "{{ eos_token }}{% endif %}",
    "think": "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if loop.last and "
             "m['role'] == 'assistant' %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m['content'] "
             "+ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}"
             "{{ '<|im_start|>assistant\n' }}{% endif %}",
    "llama2": "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + "
              "m['content'] + ' [/INST]' }}{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}"
              "{% endif %}{% endfor %}"}
ZOO_TEXT = ["where is the fox? the fox is in the forest.", "what do otters eat? fish and berries.",
            "be brief, hello there! 1 2 3"]
ZOO_SPECIAL = ["<eos>", "<bos>", "<|start|>", "<|header|>", "<|eot|>", "<|im_start|>", "<|im_end|>",
               "<start_of_turn>", "<end_of_turn>", "<|user|>", "<|assistant|>", "<|end|>"]


def zoo_tokenizer(template=None, eos="<eos>", pad=None, bos=False, size=300, words=()):
    """A byte-level BPE; `words` are in its vocabulary, but no merges make them (as in Llama 3)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast
    raw = Tokenizer(models.BPE(ignore_merges=bool(words)))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.train_from_iterator(ZOO_TEXT, trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    if words:
        spec = json.loads(raw.to_str())
        for word in words:
            spec["model"]["vocab"][word] = len(spec["model"]["vocab"])
        raw = Tokenizer.from_str(json.dumps(spec))
    raw.add_special_tokens(ZOO_SPECIAL)
    if bos:
        raw.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", raw.token_to_id("<bos>"))])
    made = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<bos>", eos_token=eos,
                                   pad_token=pad)
    made.chat_template = ZOO_TEMPLATES.get(template, template)
    return made


def zoo_sentencepiece(template="llama2"):
    """A tokenizer as Llama 2 has it: a word marker before each text, bytes for what is unknown."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *"abcdefghijklmno"
              "pqrstuvwxyzHTW.?[]/INS:", "th", "the", "▁the", "fo", "fox", "▁fox", "is", "▁is"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("f", "o"), ("fo", "x"), ("▁", "fox"),
              ("i", "s"), ("▁", "is")]
    raw = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True,
                               byte_fallback=True))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(),
                                     decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    raw.add_special_tokens(["<unk>", "<s>", "</s>"])
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>",
                                   unk_token="<unk>")
    made.chat_template = ZOO_TEMPLATES[template]
    return made


def zoo_folder(folder, tokenizer, kind="LlamaForCausalLM", rows=None, ends=None, **more):
    """A folder of a tiny Llama and this tokenizer; `ends` is its generation config's list."""
    import transformers
    torch.manual_seed(0)
    model = getattr(transformers, kind)(transformers.LlamaConfig(
        vocab_size=rows or len(tokenizer), hidden_size=16, intermediate_size=24,
        num_hidden_layers=2, num_attention_heads=2, initializer_range=0.3, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        **{"max_position_embeddings": 512, **more}))
    if ends:
        model.generation_config.eos_token_id = [tokenizer.convert_tokens_to_ids(t) for t in ends]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


ZOO_CHAT = [{"role": "user", "content": "where is the fox?"},
            {"role": "assistant", "content": "in the forest."},
            {"role": "user", "content": "what do otters eat?"}]
ZOO_REPLY = {"role": "assistant", "content": "fish and berries."}


@pytest.mark.parametrize("template, listed, end, told", [
    ("llama3", ["<eos>", "<|eot|>"], "<|eot|>", False),
    ("gemma", ["<eos>", "<end_of_turn>"], "<end_of_turn>", False),
    ("chatml", None, "<|im_end|>", True),   # a base model: nobody lists the template's own end
    ("phi3", None, "<|end|>", True),        # whose template writes EOS behind it
    (None, None, "<eos>", False)])
def test_turns_end_as_the_model_and_its_template_say(tmp_path, capsys, template, listed, end, told):
    from transformers import GenerationConfig
    tokenizer = zoo_tokenizer(template, bos=template in ("llama3", "gemma"))
    folder, cfg = zoo_folder(tmp_path / "base", tokenizer, ends=listed), config()
    codec = Codec(folder, cfg)
    end_id, eos = tokenizer.convert_tokens_to_ids(end), tokenizer.eos_token_id
    said = capsys.readouterr().out
    assert said.count("ends a turn with") == told and (not told or end in said)
    assert set(codec.stop_ids) == {eos, end_id} and codec.turn_end == [end_id]
    (ids, mask), = codec.tokenise(["text"], [" reply"])
    assert ids[-1] == eos and mask[-1]
    common.save_folder(tmp_path / "saved", common.load_model(folder), codec, cfg, "card")
    kept = GenerationConfig.from_pretrained(tmp_path / "saved").eos_token_id
    assert set(kept if isinstance(kept, list) else [kept]) == {eos, end_id}
    if template:
        (ids, mask), = codec.tokenise([ZOO_CHAT], [ZOO_REPLY["content"]])
        whole = tokenizer.apply_chat_template([*ZOO_CHAT, ZOO_REPLY], return_dict=False)
        last = len(whole) - whole[::-1].index(end_id)
        assert ids.tolist() == whole[:last]
        prompt = tokenizer.apply_chat_template(ZOO_CHAT, add_generation_prompt=True,
                                               return_dict=False)
        assert mask.tolist() == [i >= len(prompt) for i in range(last)]


@pytest.mark.parametrize("template, reply", [
    ("llama3", "  fish and berries. "), ("gemma", "fish"), ("chatml", "fish and berries."),
    ("phi3", "fish"), ("think", "fish"), ("llama2", "fish")])
@pytest.mark.parametrize("padded", [False, True])
def test_reward_models_read_chats_where_their_own_forward_does(tmp_path, template, reply, padded):
    from transformers import AutoModelForSequenceClassification
    tokenizer = zoo_tokenizer(template, eos="<|im_end|>", pad="<|im_end|>" if padded else "<eos>")
    folder = zoo_folder(tmp_path, tokenizer, "LlamaForSequenceClassification", num_labels=1)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    score = reward_model.load_scorer(config(), folder)
    chats = [[*ZOO_CHAT, {"role": "assistant", "content": reply}], [ZOO_CHAT[0], ZOO_REPLY]]
    found = score([chat[:-1] for chat in chats], [chat[-1]["content"] for chat in chats],
                  [False, False], Cost())
    for chat, value in zip(chats, found):
        inputs = tokenizer.apply_chat_template(chat, return_dict=True, return_tensors="pt")
        with torch.no_grad():
            assert value == pytest.approx(model(**inputs).logits.item(), abs=1e-4)


def test_all_assistant_turns_mask_every_reply_and_what_ends_it(tmp_path):
    for template in ("llama3", "chatml", "gemma", "phi3"):
        tokenizer = zoo_tokenizer(template)
        folder = zoo_folder(tmp_path / template, tokenizer)
        codec = Codec(folder, config(train_on="all_assistant_turns"))
        (ids, mask), = codec.sequences([Sample(ZOO_CHAT, ZOO_REPLY["content"])])
        end, = codec.turn_end
        learnt = "".join(tokenizer.convert_ids_to_tokens(ids[mask])).replace("Ġ", " ")
        end = tokenizer.convert_ids_to_tokens(end)
        assert learnt == f"in the forest.{end}fish and berries.{end}"
        whole = tokenizer.apply_chat_template([*ZOO_CHAT, ZOO_REPLY], return_dict=False)
        assert ids.tolist() == whole[:len(ids)]
        (cut, mask), = codec.sequences([Sample(ZOO_CHAT, ZOO_REPLY["content"], truncated=True)])
        assert cut.tolist() == ids.tolist()[:-1] and mask[-1]
        (empty, mask), = codec.sequences([Sample([ZOO_CHAT[0], {**ZOO_REPLY, "content": ""},
                                                  ZOO_CHAT[2]], "fish")])
        assert "".join(tokenizer.convert_ids_to_tokens(empty[mask])) == f"{end}fish{end}"
        assert codec.sequences([Sample("text", "reply")])[0][0].tolist() == \
            codec.tokenise(["text"], ["reply"])[0][0].tolist()


def test_the_tag_goes_before_the_last_reply_when_all_turns_are_learnt(tmp_path):
    folder, found = zoo_folder(tmp_path / "zoo", zoo_tokenizer("chatml")), []
    for train_on in ("last_turn", "all_assistant_turns"):
        codec = Codec(folder, config(train_on=train_on))
        rows = codec.sequences([Sample(ZOO_CHAT, ZOO_REPLY["content"])])
        tokens = Tokens(tmp_path / train_on, lambda rows=rows: rows)
        found.append(Examples(tokens, tag=lambda i, epoch: [7, 7]).example(0))
    last, every = found
    assert last.ids.tolist() == every.ids.tolist() and every.mask.sum() > last.mask.sum()


def test_all_assistant_turns_teach_the_last_reply_after_what_it_is_asked_with(tmp_path):
    tokenizer = zoo_tokenizer("chatml")  # a template like Qwen3's: the last reply has a thought
    tokenizer.chat_template = tokenizer.chat_template.replace("m['content']", "m.content").replace(
        "m.content", "('<think></think>' if loop.last and m.role == 'assistant' else '') + "
        "m.content")
    folder, sample = zoo_folder(tmp_path, tokenizer), Sample(ZOO_CHAT, ZOO_REPLY["content"])
    last, every = (Codec(folder, config(train_on=turns)).sequences([sample])[0][0].tolist()
                   for turns in ("last_turn", "all_assistant_turns"))
    assert last == every and "think" not in tokenizer.decode(every)
    assert "think" in tokenizer.apply_chat_template([*ZOO_CHAT, ZOO_REPLY], tokenize=False)


@pytest.mark.parametrize("template", [
    "{% for i in range(10**12) %}x{% endfor %}", "{{ 'x' * 10**15 }}", "",
    "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}x"])
def test_templates_that_do_not_end_or_write_nothing_are_refused(tmp_path, template, monkeypatch):
    monkeypatch.setattr(common, "TEMPLATE_SECONDS", 0.5)
    tokenizer = zoo_tokenizer()
    tokenizer.chat_template = template or "{# #}"
    codec = Codec(zoo_folder(tmp_path, tokenizer), config())
    with pytest.raises(BadInput, match="the chat template"):
        codec.prompts([ZOO_CHAT])


def test_a_disk_that_fails_in_the_middle_of_reading_is_one_sentence(tmp_path, monkeypatch, capsys):
    """EIO, of data and of the samples: status 2, the file named, nothing half-written left."""
    file = tmp_path / "pairs.jsonl"
    file.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * 3)

    class Failing(io.BytesIO):
        def __next__(self):
            if self.tell():
                raise OSError(errno.EIO, os.strerror(errno.EIO), str(file))
            return super().__next__()
    real = open

    def opened(name, *args, **more):
        return Failing(file.read_bytes()) if str(name) == str(file) and args[:1] == ("rb",) else \
            real(name, *args, **more)
    read = file.read_bytes()
    monkeypatch.setattr(common, "open", opened, raising=False)
    monkeypatch.setattr(common, "content_hash", lambda source: "hash")
    monkeypatch.setattr(file.__class__, "read_bytes", lambda self: read)
    with pytest.raises(SystemExit) as ended:
        common.launch(lambda cfg: common.load_preferences(cfg), common.Config,
                      ["--model", "m", "--preferences", str(file), "--out", str(tmp_path / "run")])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and str(file) in said and "Input/output error" in said
    assert not list(tmp_path.glob("run/*.jsonl"))


def test_messages_that_a_template_leaves_out_are_told(tmp_path, capsys):
    codec = chat_codec(tmp_path, "GPT-2", CHAT.replace("<|im_start|>{{ m.role }}\n{{ m.content }}",
                                                       "{{ m.content if m.role != 'developer' }}"))
    common.print_once.cache_clear()
    codec.chat([{"role": "user", "content": "hello"}])
    assert "leaves out" not in capsys.readouterr().out
    codec.chat([{"role": "developer", "content": "rules"}, {"role": "user", "content": "hello"}])
    assert "leaves out messages of developer" in capsys.readouterr().out


def test_prompts_of_rows_are_those_of_their_samples(tmp_path):
    user, reply = ({"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"})
    system = {"role": "system", "content": "S"}
    for more in ({"prompt": "Q", "messages": [user, reply]}, {"messages": [user], "response": "A"},
                 {"prompt": "Q", "conversations": [user, reply], "messages": [user, reply]},
                 {"system": "S", "messages": [system, user, reply]}):
        path = write(tmp_path / "rows.jsonl", {**more, "reward": 1})
        sample, = samples_in(path)
        assert sample.prompt == [system] * ("system" in more) + [user] and sample.response == "A"
        common.read_prompts.cache_clear()
        prompts, _ = common.read_prompts(path)
        assert prompts == [sample.prompt], "else held-out prompts are trained on"
    with pytest.raises(BadInput, match="give one"):
        samples_in(write(path, {"messages": [user, reply], "response": "B", "reward": 1}))


def test_transcripts_beside_their_bare_question_are_read_as_transcripts(tmp_path):
    whole = {"chosen": "\n\nHuman: Q\n\nAssistant: A", "rejected": "\n\nHuman: Q\n\nAssistant: B"}
    assert common.ranking_of("", {"prompt": "Q", **whole}, common.Counter()) == \
        common.ranking_of("", whole, common.Counter())


def test_cut_responses_are_counted(codec, tmp_path, capsys):
    codec.say_cuts()  # of the tests before, which share it
    rows = [dict(prompt="P", response=" word" * n, reward=n) for n in (1, 2, 300, 400)]
    common.read_samples(write(tmp_path / "rows.jsonl", *rows), set(), codec, tmp_path / "tokens",
                        costs={}, labelled_by=None, fingerprint="")
    assert "  2 responses are cut at" in capsys.readouterr().out
    codec.say_cuts()
    assert not capsys.readouterr().out


def test_sentinel_rewards_are_refused_beside_weights_that_are_not_used(codec, tmp_path):
    rows = [dict(prompt="P", response="R", reward=n, weight=1) for n in range(40)]
    path = write(tmp_path / "rows.jsonl", *rows, {**rows[0], "reward": -3e38})
    more = dict(costs={}, labelled_by=None, fingerprint="")
    with pytest.raises(BadInput, match="sentinels"):
        common.read_samples(path, set(), codec, tmp_path / "tokens", **more)


def test_labels_and_truncated_of_a_table_with_gaps_are_numbers(tmp_path):
    path = tmp_path / "rows.jsonl"
    found = samples_in(write(path, *(dict(prompt="P", completion="R", label=label, truncated=label)
                                     for label in (1.0, 0.0, True, "1", "0"))))
    assert [s.reward for s in found] == [1, 0, 1, 1, 0] == [s.truncated for s in found]


def test_a_reply_starts_and_ends_as_the_model_itself_would_write_it(tmp_path):
    tokenizer = zoo_sentencepiece()
    codec = Codec(zoo_folder(tmp_path, tokenizer), config())
    whole = tokenizer("Where is the fox: the fox is")["input_ids"]
    prompt, reply = codec.prompts(["Where is the fox:"])[0], codec.continuations([" the fox is"])[0]
    assert prompt + reply == whole and codec.continuations(["the"])[0] == whole[1:0] + \
        [tokenizer.convert_tokens_to_ids("the")]
    chat = [ZOO_CHAT[0], {"role": "assistant", "content": "the fox"}]
    (ids, _), = codec.tokenise([chat[:1]], [" the fox"])
    assert ids.tolist() == tokenizer.apply_chat_template(chat, return_dict=False, tokenize=True,
                                                         add_special_tokens=False)
    for text in ("the fox", " the fox is", "is\n the", "  é fox"):
        said = codec.continuations([text])[0]
        for end in ([2], codec.turn_end):
            back = codec.decode(common.Response([*said, *end], [], False))
            assert back == text and codec.continuations([back])[0] == said


def test_words_that_no_merge_makes_are_encoded_as_the_tokenizer_does(tmp_path):
    tokenizer = zoo_tokenizer(words=("Ġsoubor", "Ġhukuk"))
    codec = Codec(zoo_folder(tmp_path, tokenizer), config())
    texts = ["a soubor is here", " hukuk", "the fox, the soubory", " hukukhukuk soubor"]
    assert codec.encode.__qualname__.startswith("tiktoken_encoder")
    assert codec.continuations(texts) == tokenizer(texts, add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_tokens_to_ids("Ġsoubor") in codec.prompts(texts)[0]


def test_text_rendered_before_is_noticed_once_and_read_rightly_when_asked(tmp_path, capsys):
    tokenizer = zoo_tokenizer("llama3", bos=True)
    folder = zoo_folder(tmp_path, tokenizer, ends=["<eos>", "<|eot|>"])
    prompt = tokenizer.apply_chat_template(ZOO_CHAT, tokenize=False, add_generation_prompt=True)
    plain, codec = Codec(folder, config()), Codec(folder, config(rendered_text=True))
    common.print_once.cache_clear()
    for _ in range(2):
        plain.tokenise([prompt, "text"], ["fish<|eot|>", "fish"])
    assert capsys.readouterr().out.count("--rendered_text") == 1
    (ids, mask), = codec.tokenise([prompt], [ZOO_REPLY["content"] + "<|eot|>"])
    whole = tokenizer.apply_chat_template([*ZOO_CHAT, ZOO_REPLY], return_dict=False)
    assert ids.tolist() == whole and tokenizer.decode(ids[mask]) == "fish and berries.<|eot|>"
    assert capsys.readouterr().out == ""


def test_prompts_that_are_too_long_keep_bos_system_message_and_headers(tmp_path, capsys):
    tokenizer = zoo_tokenizer("llama3", bos=True)
    codec = Codec(zoo_folder(tmp_path, tokenizer), config(max_prompt_tokens=60))
    system = {"role": "system", "content": "be brief"}
    first, reply, last = ({"role": r, "content": c} for r, c in (
        ("user", "where is the otter? " * 9), ("assistant", "in the forest."), ("user", "fish?")))
    render = functools.partial(tokenizer.apply_chat_template, add_generation_prompt=True,
                               return_dict=False)
    found = codec.prompts([[system, first, reply, last], [system, last], [first, last],
                           [system, first]])
    assert found[:3] == [render([system, last]), render([system, last]), render([last])]
    text = tokenizer.decode(found[3])
    assert len(found[3]) <= 60 and text.startswith(
        "<bos><|start|>system<|header|>\n\nbe brief<|eot|><|start|>user<|header|>\n\n")
    assert text.endswith("the otter?<|eot|><|start|>assistant<|header|>\n\n")
    codec.say_cuts()
    assert "3 prompts are cut to --max_prompt_tokens" in capsys.readouterr().out


def test_texts_are_cut_between_characters(tmp_path):
    tokenizer = zoo_tokenizer(size=256)  # each of these characters is three or four bytes
    folder = zoo_folder(tmp_path, tokenizer)
    for n in range(1, 12):
        codec = Codec(folder, config(max_prompt_tokens=n, max_response_tokens=n + 2))
        prompt = tokenizer.decode(codec.prompts(["東京\U0001f98a" * 3])[0])
        assert "\ufffd" not in prompt and ("東京\U0001f98a" * 3).endswith(prompt)
        (ids, mask), = codec.tokenise(["x"], ["東京\U0001f98a" * 3])
        said = tokenizer.decode(ids[mask])
        assert said and "\ufffd" not in said and ("東京\U0001f98a" * 3).startswith(said)


def zoo_dt(tmp_path, tokenizer):
    """A DT policy of one step, its base policy's codec, and the Config."""
    base = common.Stage(zoo_folder(tmp_path / "base", tokenizer), "base", Cost())
    cfg = config(dt, steps=1, batch_size=4, eval_prompts=0, reward_format="decimal",
                 max_response_tokens=8, temperature=0.0, target=["2.0"])
    codec = Codec(base.folder, cfg)
    (tmp_path / "dt").mkdir()
    with contextlib.chdir(tmp_path) if hasattr(contextlib, "chdir") else mock.MagicMock():
        dt.train(cfg, base, samples_of(codec, [0.0, 1.0, 2.0, 5.0]), tmp_path / "dt", Cost())
    return str(tmp_path / "dt"), codec, cfg


def test_a_policy_of_dt_is_a_base_policy_without_its_reward_tag(tmp_path):
    """Else a method trained on top of it would read two tags, or one that it never learns."""
    tokenizer = zoo_tokenizer()
    tokenizer.chat_template = ZOO_TEMPLATES["chatml"]
    folder, before, cfg = zoo_dt(tmp_path, tokenizer)
    again = Codec(folder, cfg)
    assert again.tokenizer.chat_template == ZOO_TEMPLATES["chatml"]
    assert again.prompts([ZOO_CHAT]) == before.prompts([ZOO_CHAT])


def test_each_of_several_chat_templates_gets_the_reward_tag(tmp_path):
    from transformers import AutoTokenizer
    tokenizer = zoo_tokenizer()
    tokenizer.chat_template = {"default": ZOO_TEMPLATES["chatml"],
                               "tool_use": "TOOLS " + ZOO_TEMPLATES["chatml"]}
    saved = AutoTokenizer.from_pretrained(zoo_dt(tmp_path, tokenizer)[0])
    for name, start in (("default", "<|im_start|>user"), ("tool_use", "TOOLS <|im_start|>user")):
        text = saved.apply_chat_template(ZOO_CHAT, chat_template=name, tokenize=False,
                                         add_generation_prompt=True)
        assert text.startswith(start) and text.endswith("assistant\n <rm_score>: 2.00 ")
        assert "rm_score" not in saved.apply_chat_template(ZOO_CHAT, chat_template=name,
                                                           tokenize=False)


@pytest.mark.parametrize("kind", ["text", "chat", "sentencepiece"])
def test_a_dt_policy_is_guided_by_stock_generate_as_its_card_says(tmp_path, kind):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    folder, codec, cfg = zoo_dt(tmp_path, zoo_sentencepiece() if kind == "sentencepiece"
                                else zoo_tokenizer("chatml"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if kind == "chat":
        ask = functools.partial(tokenizer.apply_chat_template, ZOO_CHAT, return_dict=False,
                                add_generation_prompt=True)
        ids, plain, prompt = ask(reward=2.0), ask(reward=None), ZOO_CHAT
        assert ask() == ids
    else:
        prompt, names = "where is the fox?", {"tokenizer": tokenizer, "prompt": "where is the fox?"}
        line, = re.findall(r"^ids = (.*)$", Path(folder, "README.md").read_text(), re.M)
        ids, plain = eval(line, names), tokenizer(prompt).input_ids
    tag = codec.continuations([" <rm_score>: 2.00 "])[0]
    ours, = codec.prompts([prompt])
    assert plain == ours
    assert ids == ours + tag
    policy = common.load_model(folder)
    found, = common.sample(policy, [ids], cfg, 0, codec.stop_ids, Cost(), [plain], 1.5)
    theirs = model.generate(torch.tensor([ids]), guidance_scale=2.5, do_sample=False,
                            negative_prompt_ids=torch.tensor([plain]), max_new_tokens=8)
    assert found.ids == theirs[0, len(ids):].tolist()


# ----------------------------------------------------------------------- models that cannot be used


def zoo_change(folder, change):
    """Changes a folder's weights by change(weights), in place."""
    from safetensors.torch import load_file, save_file
    weights = load_file(Path(folder, "model.safetensors"))
    change(weights)
    save_file(weights, Path(folder, "model.safetensors"), metadata={"format": "pt"})


ZOO_BROKEN = {
    "lm_head.weight": lambda w: w.pop("lm_head.weight"),
    "value_head.weight": lambda w: w.update({"value_head.weight": torch.ones(1, 16)}),
    "model.norm.weight holds NaN": lambda w: w["model.norm.weight"].fill_(math.nan),
    "model.layers.1.mlp.up_proj.weight": lambda w: w.update(
        {"model.layers.1.mlp.up_proj.weight": torch.ones(3, 16)})}


@pytest.mark.parametrize("named", ZOO_BROKEN)
def test_weights_that_are_missing_unknown_misshapen_or_nan_are_named(tmp_path, named):
    folder = zoo_folder(tmp_path, zoo_tokenizer())
    common.load_model(folder)
    zoo_change(folder, ZOO_BROKEN[named])
    with pytest.raises(BadInput, match=re.escape(named)):
        common.load_model(folder)


def test_a_reward_model_whose_head_has_another_name_is_refused(tmp_path):
    folder = zoo_folder(tmp_path, zoo_tokenizer(), "LlamaForSequenceClassification", num_labels=1)
    zoo_change(folder, lambda w: w.update({"value_head.weight": w.pop("score.weight")}))
    with pytest.raises(BadInput, match=r"do not fit: score.weight \(missing\)"):
        reward_model.load_scorer(config(), folder)


def test_folders_that_hold_no_whole_model_are_refused_in_a_sentence(tmp_path):
    folder, tokenizer = tmp_path / "model", zoo_tokenizer()
    weights = Path(zoo_folder(folder, tokenizer), "model.safetensors")
    whole = weights.read_bytes()
    for content, why in ((whole[:len(whole) // 2], "not a folder or Hub id with"),
                         (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull")):
        weights.write_bytes(content)
        with pytest.raises(BadInput, match=why):
            common.load_model(str(folder))
    weights.write_bytes(whole)
    (folder / "adapter_config.json").write_text("{}")
    for load in (common.load_model, lambda name: Codec(name, config())):
        with pytest.raises(BadInput, match="merge it into its base model first"):
            load(str(folder))


def test_what_a_model_has_no_room_for_is_refused_before_anything_is_trained(tmp_path):
    tokenizer = zoo_tokenizer(bos=True)
    folder = zoo_folder(tmp_path / "small", tokenizer, rows=len(tokenizer) - 2)
    with pytest.raises(BadInput, match="resize_token_embeddings"):
        Codec(folder, config())
    folder = zoo_folder(tmp_path / "short", tokenizer, max_position_embeddings=129)
    codec = Codec(folder, config())  # 64 + 64 and BOS
    with pytest.raises(BadInput, match="reward tag"):
        codec.check_fits(folder, " 7")
    with pytest.raises(BadInput, match="may take 130"):
        Codec(folder, config(max_prompt_tokens=65))


def test_buffers_that_old_checkpoints_hold_are_no_unknown_weights(tmp_path):
    folder = zoo_folder(tmp_path, zoo_tokenizer())
    zoo_change(folder, lambda w: w.update({
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "transformer.h.0.attn.masked_bias": torch.ones(1)}))
    common.load_model(folder)


def test_an_architecture_without_a_classifier_is_told_so_and_the_ways_out(tmp_path):
    folder = zoo_model("granite")[0]
    zoo_tokenizer().save_pretrained(folder)
    with pytest.raises(BadInput, match="no sequence classifier for granite.*--reward_model"):
        reward_model.new_classifier(folder, Codec(folder, config()), DEVICE)


@pytest.mark.parametrize("kind", ["GPTNeoX", "Gemma3", "GPT2"])
def test_a_reward_model_takes_the_body_whatever_the_policys_head_is_called(tmp_path, kind):
    import transformers as t
    tokenizer = zoo_tokenizer()
    small = dict(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, head_dim=8,
                 num_attention_heads=2, num_key_value_heads=1, intermediate_size=16)
    model = {"GPTNeoX": lambda: t.GPTNeoXForCausalLM(t.GPTNeoXConfig(
        **{k: v for k, v in small.items() if k not in ("head_dim", "num_key_value_heads")})),
        "GPT2": lambda: t.GPT2LMHeadModel(t.GPT2Config(
            vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2)),
        "Gemma3": lambda: zoo_kinds()["gemma3_multimodal"]()}[kind]()
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    codec = reward_model.padding_codec(str(tmp_path), config())
    made = reward_model.new_classifier(str(tmp_path), codec, DEVICE)
    assert made.config.get_text_config().pad_token_id == len(tokenizer)
    rm, ids = reward_model.RewardModel(made, torch.float32), torch.tensor([5, 6, 7, 8, 9])
    score = rm(ids.to(DEVICE), [2, 3], torch.tensor([1, 4], device=DEVICE))
    with torch.no_grad():
        own = [made(input_ids=row[None].to(DEVICE)).logits.item() for row in ids.split([2, 3])]
    assert score.tolist() == pytest.approx(own, abs=1e-4)


# ---------------------------------------------------------------------------- other people's rows

U, A = (lambda text, role=role: {"role": role, "content": text} for role in ("user", "assistant"))
ZOO_S = {"role": "system", "content": "S"}


def zoo_rows(tmp_path, rows, kind="samples", name="rows.jsonl"):
    """What the rows of a file become."""
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if kind == "samples":
        return list(common.parsed_entries(str(path), common.SAMPLE_COLUMNS, lambda part, row, notes:
                                       common.labelled_sample_of(row)))
    return list(common.parsed_entries(str(path), common.PREFERENCE_COLUMNS, common.ranking_of))


ZOO_SAMPLES = [
    (dict(prompt="P", response="R", reward=1), ("P", "R", 1.0)),
    (dict(prompt="P", completion="R", label=True), ("P", "R", 1.0)),
    (dict(prompt="P", completion="R", label=0), ("P", "R", 0.0)),
    (dict(prompt=[U("P")], completion=[A("R")], label=False), ([U("P")], "R", 0.0)),
    (dict(messages=[U("P"), A("Q"), U("O"), A("R")], reward=2),
     ([U("P"), A("Q"), U("O")], "R", 2.0)),
    (dict(messages=[U("P")], response=[A("R")], reward=2), ([U("P")], "R", 2.0)),
    (dict(prompt=[U("P")], completion=[U("P"), A("R")], reward=2), ([U("P")], "R", 2.0)),
    (dict(conversations=[{"from": "system", "value": "S"}, {"from": "human", "value": "P"},
                         {"from": "gpt", "value": "R"}], reward=2), ([ZOO_S, U("P")], "R", 2.0)),
    (dict(system="S", reward=2, conversations=[{"from": "human", "value": "P"},
                                               {"from": "gpt", "value": "R"}]),
     ([ZOO_S, U("P")], "R", 2.0)),
    (dict(instruction="I", input="P", output="R", reward=1), ([U("I\n\nP")], "R", 1.0)),
    (dict(instruction="I", input="", output="R", reward=1), ([U("I")], "R", 1.0)),
    (dict(system="S", instruction="I", output="R", reward=1), ([ZOO_S, U("I")], "R", 1.0)),
    (dict(system="S", prompt="P", response="R", reward=1), ([ZOO_S, U("P")], "R", 1.0)),
    (dict(prompt=[{"role": "user", "content": [{"type": "text", "text": "P"}, {
        "type": "text", "text": "!"}]}], response="R", reward=1), ([U("P!")], "R", 1.0)),
    (dict(prompt=[{"content": "P", "role": "user", "name": None, "tool_calls": None}], response="R",
          reward=1), ([U("P")], "R", 1.0)),
    (dict(prompt="P", response="R", reward=" -1.5e0 "), ("P", "R", -1.5)),
    (dict(prompt="P", response="R", reward=1, weight=None, system=None, source="x"),
     ("P", "R", 1.0)),
]


@pytest.mark.parametrize("row, expected", ZOO_SAMPLES)
def test_samples_of_other_tools_shapes_are_read_rightly(tmp_path, row, expected):
    found, = zoo_rows(tmp_path, [row])
    assert found[:3] == expected and not found.truncated and math.isnan(found.weight)


ZOO_REFUSED = [
    (dict(prompt="P", response="R", reward="good"), "'reward' must be .* number, found 'good'"),
    (dict(prompt="P", response="R", reward="nan"), "'reward' must be a finite number"),
    (dict(prompt="P", response="R", reward=True), "'reward' must be a finite number"),
    (dict(prompt="P", response="R", reward=math.inf), "'reward' must be a finite number"),
    (dict(prompt="P", response="R", reward=1, truncated="maybe"), "'truncated' must be true or"),
    (dict(prompt="P", response="R", reward=1, weight=-1), "'weight' must be .* not below 0"),
    (dict(prompt="P", input="Q", response="R", reward=1), "'prompt' and 'input'"),
    (dict(prompt="P", instruction="Q", response="R", reward=1), "'prompt' and 'instruction'"),
    (dict(prompt="P", response="R", output="S", reward=1), "'response' and 'output' stand side"),
    (dict(prompt="P", response="R", reward=1, label=0), "'reward' and 'label' stand side by side"),
    (dict(prompt="P", response="R", reward=1, history=[["a", "b"]]), "'history' bears on the text"),
    (dict(messages=[U("P"), A("R")], reward=1, tools=[{"name": "f"}]), "'tools' bears on the text"),
    (dict(messages=[U("P"), {"role": "assistant", "content": None, "tool_calls": [{}]}], reward=1),
     "'messages'.*tool calls"),
    (dict(messages=[U("P"), {**A("R"), "thinking": "T"}], reward=1), "'messages'.*thoughts"),
    (dict(conversations=[{"from": "human", "value": "P"}, {"from": "function_call", "value": "f()"},
                         {"from": "gpt", "value": "R"}], reward=1), "'conversations'"),
    (dict(prompt=[{"role": "user", "content": [{"type": "image"}]}], response="R", reward=1),
     "'prompt' must be text or a list.*images"),
    (dict(prompt="P", reward=1), "'response' is missing"),
    (dict(question="P", response="R", reward=1), "'prompt' is missing"),
]


@pytest.mark.parametrize("row, why", ZOO_REFUSED)
def test_samples_that_cannot_be_read_rightly_are_refused_by_line_and_field(tmp_path, row, why):
    with pytest.raises(BadInput, match=f"rows.jsonl, line 2: .*{why}"):
        zoo_rows(tmp_path, [dict(prompt="P", response="R", reward=1), row])


@pytest.mark.parametrize("text, expected", [("True", True), ("false", False), ("1", True),
                                            ("", False), (True, True), (0, False)])
def test_truncated_as_text_is_parsed(tmp_path, text, expected):
    found, = zoo_rows(tmp_path, [dict(prompt="P", response="R", reward=1, truncated=text)])
    assert found.truncated is expected


ZOO_PAIRS = [
    dict(prompt="P", chosen="R", rejected="Q"),
    dict(prompt="P", chosen="P R", rejected="P Q"),
    dict(prompt=[U("P")], chosen=[A("R")], rejected=[A("Q")]),
    dict(prompt=[U("P")], chosen=[U("P"), A("R")], rejected=[U("P"), A("Q")]),
    dict(prompt=[U("P")], chosen=[{"content": "P", "role": "user", "name": None}, A("R")],
         rejected=[U("P"), {**A("Q"), "tool_calls": None}]),
    dict(prompt=[U("P")], chosen=A("R"), rejected=A("Q")),
    dict(prompt="P", chosen=[U("P"), A("R")], rejected=[U("P"), A("Q")]),
    dict(chosen=[U("P"), A("R")], rejected=[U("P"), A("Q")]),
    dict(chosen="\n\nHuman: P\n\nAssistant: R", rejected="\n\nHuman: P\n\nAssistant: Q"),
    dict(conversations=[{"from": "human", "value": "P"}], chosen={"from": "gpt", "value": "R"},
         rejected={"from": "gpt", "value": "Q"}),
    dict(instruction="P", input="", chosen="R", rejected="Q"),
    dict(prompt="P", ranked=["R", "Q"]),
]
ZOO_WITH_SYSTEM = [
    dict(prompt=[U("P")], chosen=[ZOO_S, U("P"), A("R")], rejected=[ZOO_S, U("P"), A("Q")]),
    dict(prompt=[ZOO_S, U("P")], chosen=[U("P"), A("R")], rejected=[U("P"), A("Q")]),
    dict(system="S", prompt="P", chosen=[U("P"), A("R")], rejected=[U("P"), A("Q")]),
    dict(system="S", instruction="P", chosen="R", rejected="Q"),
    dict(system="S", prompt=[U("P")], chosen=[A("R")], rejected=[A("Q")]),
]


@pytest.mark.parametrize("row", ZOO_PAIRS + ZOO_WITH_SYSTEM)
def test_a_preference_holds_its_prompt_once_whatever_the_sides_repeat(tmp_path, row):
    found, = zoo_rows(tmp_path, [row], "preferences")
    assert [text.strip() for text in found.responses] == ["R", "Q"]
    if isinstance(found.prompt, str):
        assert found.prompt in ("P", "\n\nHuman: P\n\nAssistant:") and row not in ZOO_WITH_SYSTEM
    else:
        assert found.prompt == [ZOO_S] * (row in ZOO_WITH_SYSTEM) + [U("P")]
    assert common.read_prompts(str(tmp_path / "rows.jsonl"))[0] == [found.prompt]


def test_sides_of_another_conversation_than_the_prompt_are_refused(tmp_path):
    with pytest.raises(BadInput, match="'chosen' is a conversation without the row's prompt"):
        zoo_rows(tmp_path, [dict(prompt="P", chosen=[U("O"), A("R")], rejected=[U("O"), A("Q")])],
                 "preferences")


def test_rows_in_are_rows_used_and_rows_left_out_by_reason(tmp_path, capsys):
    good = dict(prompt="P", chosen="R", rejected="Q")
    rows = [good, {**good, "rejected": None}, {**good, "rejected": None, "system": "S"},
            {**good, "rejected": " "}, {**good, "rejected": "R"}, {**good, "note": "n"},
            {**good, "prompt": None, "input": "I"},
            dict(chosen=[U("P")], rejected=[U("P"), A("R")]),
            dict(chosen=[U("P"), A("R")], rejected=[U("O"), A("Q")])]
    assert len(zoo_rows(tmp_path, rows, "preferences")) == 3
    said = capsys.readouterr().out
    used, total = map(int, re.search(r"(\d+) of (\d+) rows used; left out: ", said).groups())
    left = re.search("left out: (.*?)(;|$)", said)[1]
    assert (used, total) == (3, 9) and sum(map(int, re.findall(r"\d+", left))) == 6
    for words in ("3 with a null field", "1 with an empty response", "1 ending with the human",
                  "1 differing in more", "1 with two equal responses", "columns not read: note"):
        assert words in said


def test_transcripts_that_end_with_the_human_are_left_out_and_counted(tmp_path, capsys):
    rows = [dict(messages=[U("P"), A("R"), U("O")], reward=1),
            dict(messages=[U("P"), A("R")], reward=1),
            dict(messages=[U("P"), A("R")], reward=None)]
    assert len(zoo_rows(tmp_path, rows)) == 1
    said = capsys.readouterr().out
    assert "1 of 3 rows used" in said and "do not end with the assistant" in said


def test_the_same_prompt_is_the_same_whatever_the_order_of_its_keys(tmp_path):
    rows = [dict(prompt=[dict(zip(keys, values))], chosen=f"R{i}", rejected="Q")
            for i, (keys, values) in enumerate([(("role", "content"), ("user", "P")),
                                                (("content", "role"), ("P", "user"))])]
    one, two = zoo_rows(tmp_path, rows, "preferences")
    assert common.prompt_hash(one.prompt) == common.prompt_hash(two.prompt)


@pytest.mark.parametrize("n", [3, 5, 30, 300])
def test_a_sentinel_among_the_rewards_is_refused_and_a_wide_range_is_not(n):
    rewards = np.linspace(-1, 1, n)
    common.check_rewards("x", rewards)
    common.check_rewards("x", rewards ** 3 * 50)
    rewards[1] = -3e38
    with pytest.raises(BadInput, match="nine tenths|nothing to learn" if n > 3 else "") \
            if n > 3 else contextlib.nullcontext():
        common.check_rewards("x", rewards)
    with pytest.raises(BadInput, match="nothing to learn"):
        common.check_rewards("x", np.ones(n))


def test_given_weights_are_taken_as_they_are(tmp_path):
    found = zoo_rows(tmp_path, [dict(prompt="P", response="R", reward=i, weight=w)
                                for i, w in enumerate((0.5, "2"))])
    assert [s.weight for s in found] == [0.5, 2.0]


def test_files_of_other_kinds_are_read_through_datasets_or_named(tmp_path, capsys):
    datasets = pytest.importorskip("datasets")
    rows = [dict(prompt=f"P{i}", chosen="R", rejected="Q") for i in range(3)]
    folder = tmp_path / "data"
    folder.mkdir()
    datasets.disable_progress_bars()
    table = datasets.Dataset.from_list(rows)
    table.to_parquet(folder / "train-00000.parquet")
    table.to_csv(folder / "more.csv")
    (folder / "none.csv").write_text("prompt,chosen,rejected\nP0,None,N/A\n")
    (folder / "dataset_info.json").write_text("{}")
    (folder / "array.json").write_text(json.dumps(rows))
    (folder / "lines.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "test.arrow").write_text("")
    with mock.patch.dict(os.environ, {"HF_DATASETS_CACHE": str(tmp_path / "cache")}):
        found = list(common.parsed_entries(str(folder), common.PREFERENCE_COLUMNS,
                                           common.ranking_of))
    assert len(found) == 13 and {r.prompt for r in found} == {"P0", "P1", "P2"}
    assert "not read: dataset_info.json, test.arrow" in capsys.readouterr().out


def test_without_the_datasets_package_one_line_says_how_to_get_it(tmp_path):
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    with mock.patch.dict(sys.modules, {"datasets": None}):
        for source in (str(tmp_path / "rows.parquet"), "someone/something"):
            with pytest.raises(BadInput, match="pip install datasets"):
                list(common.read_source(source))
    with pytest.raises(BadInput, match="no such file"):
        list(common.read_source("data/nothing.parquet"))


if __name__ == "__main__":  # a rank of a test above
    globals()[sys.argv[1]](sys.argv[2])
