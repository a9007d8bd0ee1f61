"""The promises this project makes, each guarded by a test of that name.

Offline, on tiny models, in a few minutes:  python -m pytest test_all.py
"""
import fcntl
import functools
import gzip
import itertools
import json
import math
import multiprocessing
import multiprocessing.forkserver
import os
import random
import re
import runpy
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
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
from common import BadInput, Codec, Cost, Example, Examples, Preference, Sample, Samples, Stage

PADDED_BELOW, common.PADDED_BELOW = common.PADDED_BELOW, 0  # small models stand for large ones
common.BASE_STEPS = 40  # of the toy world's base policy
HERE = Path(__file__).parent
DEVICE = common.device()
V, D = 97, 16
QUIET = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

# --------------------------------------------------------------------------------------- processes
# Importing torch and transformers takes long: a server that has done so forks what a test wants,
# one script or all ranks of one.

READY = ["transformers.models.llama.modeling_llama", "transformers.models.auto.modeling_auto",
         "transformers.models.auto.tokenization_auto", "transformers.generation.utils",
         "torch.distributed.fsdp", "torch.distributed.checkpoint.state_dict", "tiktoken"]


@functools.cache
def forks():
    """A fork server that has imported this file and what scripts import late."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, *READY])
    with mock.patch.dict(os.environ, {**QUIET, "PYTHONPATH": os.pathsep.join(sys.path)}):
        multiprocessing.forkserver.ensure_running()
    return context


def in_fork(log, env, name, args):
    """A process's body: a script, by name, or a function of this file, with these arguments."""
    for stream in (1, 2):
        os.dup2(os.open(f"{log}.{stream}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    os.environ.update(env)
    torch.set_num_threads(1)
    if callable(globals().get(name)):
        globals()[name](*args)
    else:
        common.PADDED_BELOW = PADDED_BELOW
        sys.argv = [f"{name}.py", *args]
        sys.path.insert(0, str((HERE / name).parent))
        runpy.run_path(str(HERE / f"{name}.py"), run_name="__main__")


class Ranks:
    """The processes of a script, or of a function of this file, and what they said."""

    def __init__(self, name, *args, ranks=1):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        self.logs = [f"{tempfile.mkdtemp()}/rank" for _ in range(ranks)]
        self.processes = []
        for rank, log in enumerate(self.logs):
            env = {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} if ranks > 1 else {}
            self.processes.append(forks().Process(
                target=in_fork, args=(log, env, name, list(map(str, args)))))
            self.processes[-1].start()

    def alive(self):
        """Whether all ranks run."""
        return all(p.exitcode is None for p in self.processes)

    def end(self, seconds=280):
        """Waits for the ranks, as torchrun does: if one fails, the others are killed."""
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


def forked(name, *args, ranks=1):
    """Ranks() to their end, which must be a good one: what they printed."""
    done = Ranks(name, *args, ranks=ranks).end()
    assert not any(done.status), done.stdout + done.stderr
    return done.stdout


def launched(module, flags, capsys, status=0):
    """A script run here: what it printed, or the one sentence it ended with."""
    capsys.readouterr()
    common.print_once.cache_clear()
    common.content_hash.cache_clear()
    try:
        common.launch(module.main, module.Config, [str(flag) for flag in flags])
        ended = 0
    except SystemExit as stop:
        ended = stop.code
    out, err = capsys.readouterr()
    assert ended == status, out + err
    assert status == 0 or len(err.splitlines()) == 1, err
    return err if status else out


# ---------------------------------------------------------------------------------------- fixtures


def make_run(folder):
    """A tiny run of all stages: (folder, what dt.py printed)."""
    forked("reward_model", "--out", folder, "--steps", "5")
    return folder, forked("dt", "--out", folder, "--eval_prompts", "12", "--batch_size", "8",
                          "--steps", "8", "--samples_per_prompt", "1", "--target", "-1", "0", "q99")


BENCHMARKS = ["compare", "crossover", "random_walks", "real_model", "speed", "one_pair"]


def make_miniatures(folder):
    """Each benchmark's ended process; two share their toy world."""
    return {name: Ranks(f"benchmarks/{name}", "--mini", "--out",
                        folder / ("toy" if name in ("compare", "crossover") else name)).end()
            for name in BENCHMARKS}


@pytest.fixture(scope="session", autouse=True)
def begun(request, tmp_path_factory):
    """What the chosen tests wait for, made in the background: its folder, and what it will return,
    by the fixture's name."""
    chosen = {name for item in request.session.items for name in item.fixturenames}
    with ThreadPoolExecutor(1) as pool:
        started = {}
        for name, make in (("run", make_run), ("gradients", make_gradients),
                           ("miniatures", make_miniatures)):
            if name in chosen or name == "run" and "codec" in chosen:
                folder = tmp_path_factory.mktemp(name)
                forks()  # it changes os.environ for a moment, which a thread must not see
                started[name] = folder, pool.submit(make, folder)
        yield started
        pool.shutdown(cancel_futures=True)


ENVIRONMENT = dict(os.environ)  # tests change it while others start processes


@pytest.fixture(scope="session")
def run(begun):
    return begun["run"][1].result()


@pytest.fixture(scope="session")
def gradients(begun):
    return begun["gradients"][1].result()


@pytest.fixture(scope="session")
def miniatures(begun):
    return begun["miniatures"][1].result()


@pytest.fixture(scope="session")
def codec(begun):
    """The toy base policy's codec, as soon as that policy is there."""
    folder, end = begun["run"]
    while not (folder / "base" / "run.json").exists() and not end.done():
        time.sleep(0.1)
    if end.done():
        end.result()  # raises what went wrong
    return Codec(str(folder / "base"), config())


def config(module=common, **flags):
    return module.Config(**{**common.TOY, **module.TOY, **flags})


def lines_of(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def write(path, *rows):
    """Writes rows, or lines as they are, to a .jsonl or .jsonl.gz; returns its name."""
    lines = [r if isinstance(r, (str, bytes)) else json.dumps(r) for r in rows]
    data = b"\n".join(x if isinstance(x, bytes) else x.encode() for x in lines) + b"\n"
    Path(path).write_bytes(gzip.compress(data) if str(path).endswith(".gz") else data)
    return str(path)


def tiny_model(tied=True, dtype=torch.float64, **more):
    """A Llama of two layers on this machine's device, in eval mode, that reads packed sequences."""
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=V, hidden_size=D, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, tie_word_embeddings=tied, initializer_range=0.3, eos_token_id=0,
        **more)).to(DEVICE, dtype)
    return common.enable_packing(model.eval())


def example(ids, prompt_length):
    """An Example whose response are the ids from prompt_length on."""
    return Example(np.array(ids, dtype=np.int32), np.arange(len(ids)) >= prompt_length)


def examples(n=7, seed=0):
    rng = np.random.default_rng(seed)
    return [example(rng.integers(1, V, p + r), p)
            for p, r in zip(rng.integers(1, 9, n), rng.integers(1, 12, n))]


def tokens_of(rows):
    return common.Tokens(Path(tempfile.mkdtemp(prefix="tokens-")), lambda: (r[:2] for r in rows))


def samples_of(codec, rewards, prompts=None, weights=None):
    """Labelled samples " reply 0", " reply 1", ... with these rewards."""
    rows = [Sample(prompts[i] if prompts else f"Human: {i}", f" reply {i}", float(r))
            for i, r in enumerate(rewards)]
    return Samples(tokens_of(map(codec.taught, rows)), np.array(rewards, dtype=np.float64),
                   np.array([math.nan] * len(rows) if weights is None else weights, dtype=float),
                   np.array([common.prompt_hash(s.prompt) for s in rows], dtype=np.uint64))


def set_ranks(monkeypatch, rank, ranks):
    monkeypatch.setattr(common, "rank", lambda: rank)
    monkeypatch.setattr(common, "world_size", lambda: ranks)


def logits_of(model, micro):
    """The logits (T, V) of a micro-batch's sequences, each read by itself."""
    return torch.cat([model(input_ids=ids[None], use_cache=False).logits[0]
                      for ids in micro.input_ids.split(micro.lengths)])


def plain_nll_of(model, micro):
    """A micro-batch's loss by the model's own logits and plain autograd."""
    return torch.nn.functional.cross_entropy(logits_of(model, micro)[micro.rows], micro.targets,
                                             reduction="sum")


def log_probs_of(model, rows, cfg):
    """Each response token's log-prob, by a model of a policy's."""
    log_probs = functools.partial(common.Policy(model, cfg).log_probs, temperature=cfg.temperature)
    return common.each_response_token(log_probs, model, rows, cfg, Cost())


# ------------------------------------------------------------------ fused kernels and their driver


def plain_nll(logits, targets, *columns):
    nll = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    return columns[0] * nll if columns else nll


def plain_surrogate(logits, targets, old, advantage):
    """Each row's PPO loss, its (log-ratio)^2 / 2, whether the clip bites, and its entropy."""
    distribution = torch.distributions.Categorical(logits=logits / 0.7)
    log_ratio = distribution.log_prob(targets) - old
    plain = -advantage * log_ratio.exp()
    clipped = -advantage * log_ratio.exp().clamp(0.8, 1.2)
    return (torch.maximum(plain, clipped), log_ratio.square() / 2,
            (clipped > plain).to(logits.dtype), distribution.entropy())


def surrogate_kernel(temperature=1.0, statistics=None):
    """PPO's kernel with a clip of 0.2."""
    statistics = torch.zeros(3, device=DEVICE) if statistics is None else statistics
    return functools.partial(ppo_baseline.clipped_surrogate_, temperature=temperature, clip=0.2,
                             statistics=statistics)


KERNELS = {"mle_filter": mle_filter.masked_nll_, "dt": dt.masked_nll_, "rwr": rwr.weighted_nll_}


@pytest.mark.parametrize("name", [*KERNELS, "ppo"])
@pytest.mark.parametrize("rows, compiled, dtype", [
    (40, False, torch.float64), (1, False, torch.float64), (40, True, torch.float64),
    (40, False, torch.bfloat16)])
def test_fused_kernels_equal_float64_autograd(name, rows, compiled, dtype, monkeypatch):
    """And take bfloat16 logits, with a float32 loss."""
    if compiled:
        monkeypatch.setattr(common, "EAGER_BELOW", 0)
    torch.manual_seed(rows)
    exact = dtype == torch.float64
    work = torch.zeros(rows, 128, dtype=dtype, device=DEVICE)[:, :V]  # strided, as the driver's
    work.copy_(torch.randn(rows, V))
    logits = work.to(torch.promote_types(dtype, torch.float32)).detach().clone().requires_grad_()
    targets = torch.randint(0, V, (rows,), device=DEVICE)
    noise, advantage = torch.randn(2, rows, dtype=logits.dtype, device=DEVICE)
    if name == "ppo":
        log_p = (logits.detach() / 0.7).log_softmax(1).gather(1, targets[:, None])[:, 0]
        sums = torch.zeros(3, dtype=logits.dtype, device=DEVICE)
        expected, *statistics = plain_surrogate(logits, targets, log_p + 0.3 * noise, advantage)
        ours = surrogate_kernel(0.7, sums)(work, targets, log_p + 0.3 * noise, advantage)
        torch.testing.assert_close(sums, torch.stack([s.sum().detach() for s in statistics]))
        assert rows == 1 or 0 < sums[1] < rows  # the clip bites in some rows and not in others
    else:
        columns = [noise.abs()] if name == "rwr" else []
        expected = plain_nll(logits, targets, *columns)
        ours = KERNELS[name](work, targets, *columns)
    expected.sum().backward()
    torch.testing.assert_close(ours, expected.detach())
    torch.testing.assert_close(work.to(logits.dtype), logits.grad,
                               **{} if exact else {"atol": 1e-2, "rtol": 1e-2})


@pytest.mark.parametrize("chunk", [1, 3, 1000])
@pytest.mark.parametrize("cap", [None, 2.0])
def test_head_loss_equals_float64_autograd_whatever_the_chunk(monkeypatch, chunk, cap):
    size = chunk * 128 * 8  # bytes: V is filled up to a multiple of 64
    monkeypatch.setattr(common, "CHUNK_BYTES", {"cpu": size, "cuda": size})
    torch.manual_seed(0)
    hidden, weight = (torch.randn(n, 4, dtype=torch.float64, device=DEVICE, requires_grad=True)
                      for n in (5, V))
    targets = torch.randint(0, V, (5,), device=DEVICE)
    kernel = mle_filter.masked_nll_
    if cap:
        kernel = functools.partial(common.capped_kernel, kernel, cap)
    ours = 0.7 * common.head_loss(kernel, hidden, weight, targets)
    grads = torch.autograd.grad(ours, (hidden, weight))
    logits = hidden @ weight.t()
    theirs = 0.7 * plain_nll(cap * (logits / cap).tanh() if cap else logits, targets).sum()
    torch.testing.assert_close((ours, *grads), (theirs, *torch.autograd.grad(
        theirs, (hidden, weight))))
    assert len(list(common.logit_chunks(hidden.detach(), weight.detach()))) == {
        1: 5, 3: 2, 1000: 1}[chunk]


@pytest.mark.parametrize("tied", [False, True])
def test_policy_gradient_equals_plain_autograd_to_1e_6(tied):
    """And no position outside the responses reaches the kernel."""
    model, rows, seen = tiny_model(tied=tied), examples() + [example([4, 5, 6], 3)], []

    def watched_(logits, targets):
        seen.extend(targets.tolist())
        return mle_filter.masked_nll_(logits, targets)
    micro = common.collate(rows)
    ours = common.Policy(model, config())(micro, watched_)
    ours.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    theirs = plain_nll_of(model, micro)
    theirs.backward()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    for name, p in model.named_parameters():
        torch.testing.assert_close(grads[name], p.grad, rtol=1e-6, atol=1e-6)
    assert seen == [t for e in rows for t in e.ids[e.mask].tolist()]


@pytest.mark.parametrize("claim", ["logit_scale", "final_logit_softcapping", "bias", "class"])
def test_a_head_that_is_not_hidden_states_times_head_is_refused(claim):
    model = tiny_model(tied=False)
    common.check_linear_head("model", model)
    if claim == "bias":
        model.lm_head.bias = torch.nn.Parameter(torch.zeros(V, dtype=torch.float64, device=DEVICE))
    elif claim == "class":
        model.lm_head.__class__ = type("ScaledLinear", (torch.nn.Linear,), {})
    else:
        setattr(model.config, claim, 0.5)  # this class neither scales nor caps
    with pytest.raises(BadInput, match="not hidden states times head|linear layer without a bias"):
        common.check_linear_head("model", model)


# ------------------------------------------------------------------------------ batches and ranks


@pytest.mark.parametrize("padded", [False, True])
def test_micro_batches_keep_to_the_token_budget_and_share_out_a_step(monkeypatch, padded):
    """A budget of what a forward holds; as many forwards on every rank, each sequence once."""
    lengths = [5, 90, 3, 40, 40, 7]
    for ranks in (1, 2, 7):
        shares = []
        for rank in range(ranks):
            set_ranks(monkeypatch, rank, ranks)
            shares.append(common.shard_micro_batches(lengths, 80, padded))
        assert len(set(map(len, shares))) == 1
        groups = [group for share in shares for group in share if group]
        assert sorted(sum(groups, [])) == list(range(6))
        for held in ([lengths[i] for i in group] for group in groups):
            assert len(held) == 1 or (max(held) * len(held) if padded else sum(held)) <= 80
        assert ranks > 1 or len(groups) == 3


# -------------------------------------------------------------------------------------------- PPO


def rollout_of(lengths=(5, 1, 8, 3), seed=0):
    """A scored rollout of uneven responses: prepare()'s arguments but for cfg."""
    rng = np.random.default_rng(seed)
    rows = [example(rng.integers(1, V, 3 + n), 3) for n in lengths]
    old, base, values = ([rng.normal(size=n).tolist() for n in lengths] for _ in range(3))
    return rows, old, base, values, rng.normal(size=len(rows))


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


def test_ppo_scores_the_last_token_pays_kl_at_every_one_and_whitens_over_all():
    rollout, old, base, values, score = rollout_of()
    zeros = [[0.0] * len(v) for v in values]
    rows, said = ppo_baseline.prepare(rollout, old, old, zeros, score,
                                      config(ppo_baseline, gae_lambda=0.0))
    for e, s in zip(rows, score):  # returns, one step ahead
        np.testing.assert_allclose(e.columns[3], [0.0] * (int(e.mask.sum()) - 1) + [s])
    assert said["kl"] == 0 and said["objective"] == pytest.approx(score.mean())
    rows, said = ppo_baseline.prepare(rollout, old, base, zeros, score,
                                      config(ppo_baseline, gae_lambda=1.0, kl_coef=0.1))
    for e, o, b, s in zip(rows, old, base, score):  # the first token's return
        np.testing.assert_allclose(e.columns[3][0], s - 0.1 * (sum(o) - sum(b)))
    assert said["objective"] == pytest.approx(score.mean() - 0.1 * said["kl"])
    white = np.concatenate([e.columns[1] for e in rows])
    assert abs(white.mean()) < 1e-9 and abs(white.std() - 1) < 1e-6


def test_ppo_value_never_gains_from_leaving_the_old_value_far():
    value = torch.tensor([0.0, 0.15, 0.5, -0.5], requires_grad=True)
    loss = ppo_baseline.clipped_value_loss(value, torch.zeros(4), torch.ones(4), 0.2)
    torch.testing.assert_close(loss.detach(), torch.tensor([1.0, 0.85**2, 0.8**2, 1.5**2]) / 2)
    loss.sum().backward()
    assert value.grad[2] == 0 and (value.grad[[0, 1, 3]] < 0).all()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_ppo_first_ratio_is_one_and_kl_of_the_untouched_policy_zero(temperature):
    """Rollout (with a cache), reference and update agree about every token's log-prob."""
    from transformers import LlamaForSequenceClassification
    cfg = config(ppo_baseline, temperature=temperature, max_response_tokens=12)
    model, base = tiny_model(dtype=torch.float32), tiny_model(dtype=torch.float32)
    shape = model.config.__class__(**{**model.config.to_dict(), "num_labels": 1})
    critic = common.enable_packing(LlamaForSequenceClassification(shape).to(DEVICE).eval())
    actor = ppo_baseline.ActorCritic(model, reward_model.RewardModel(critic, cfg), 1.0,
                                     1.0, cfg)
    codec = mock.Mock(decode=lambda response: " ".join(map(str, response.ids)), stop_ids=[0])
    prompts = [e.ids.tolist() for e in examples(9)]
    _, _, rollout = ppo_baseline.roll_out(actor, codec, prompts, cfg, 1, Cost())
    old, reference = (log_probs_of(each, rollout, cfg) for each in (model, base))
    values = common.each_response_token(actor.values, critic, rollout, cfg, Cost())
    rows, said = ppo_baseline.prepare(rollout, old, reference, values, np.ones(9), cfg)
    assert abs(said["kl"]) < 1e-4
    again = common.sample(model, prompts, cfg, 1, [0], Cost(), temperature)
    for response, log_probs in zip(again, old):  # the sampler's, too
        np.testing.assert_allclose(response.log_probs, log_probs, atol=1e-4)
    statistics, micro = torch.zeros(3, device=DEVICE), common.collate(rows)
    surrogate, value_loss = actor(micro, surrogate_kernel(temperature, statistics), cfg.clip)
    assert (2 * statistics[0] / len(micro.rows)).sqrt() < 1e-4 and statistics[1] == 0
    assert abs(surrogate) < 1e-3  # whitened advantages sum to 0
    gap = np.concatenate([e.columns[3] - e.columns[2] for e in rows])  # return - value
    assert float(value_loss) == pytest.approx((gap**2).sum() / 2, rel=1e-4, abs=1e-5)


# --------------------------------------------------------------------------------- the algorithms


def test_filter_keeps_the_best_and_breaks_ties_by_order(codec):
    assert mle_filter.best(np.array([1.0, 3, 2, 3, 0]), 0.4).tolist() == [1, 3]
    assert mle_filter.best(np.zeros(10), 0.3).tolist() == [0, 1, 2]
    assert mle_filter.best(np.array([1.0, 2]), 0.01).tolist() == [1]
    samples = samples_of(codec, [0, 1, 2, 5, 4, 3], prompts=["a", "a", "a", "b", "b", "b"])
    kept = mle_filter.prepare(samples, config(mle_filter, keep=1 / 3, per_prompt=True))
    assert sorted(kept.indices) == [2, 3]
    assert len(mle_filter.prepare(samples, config(mle_filter, keep=1.0))) == 6


def test_rwr_weights_are_capped_exponentials_of_mean_1_or_the_samples_own(codec):
    def weights(rewards, own=None, **flags):
        cfg = config(rwr, model="m", samples="s", **flags)
        rows = rwr.prepare(samples_of(codec, rewards, weights=own), cfg)
        return [rows.example(i).weight for i in range(len(rows))]
    z = samples_of(codec, [0, 1, 2, 7]).z([0, 1, 2, 7])
    capped = np.minimum(np.exp(z / 0.25), 20)
    assert weights([0, 1, 2, 7], beta=0.25, w_max=20.0) == pytest.approx(capped / capped.mean())
    assert weights([0, 1, 5], beta=1e6) == pytest.approx([1, 1, 1], abs=1e-4)  # SFT
    assert weights([0, 1, 5], beta=1e-30, w_max=0.0) == [0, 0, 3]
    assert weights([0, 1, 5], [1.0, 0.0, 2.0], weights="given") == [1, 0, 2]
    for wrong in (None, [1.0, math.nan, 1.0], [0.0, 0.0, 0.0]):
        with pytest.raises(BadInput, match="every sample needs a `weight`"):
            weights([0, 1, 5], wrong, weights="given")


def test_dt_writes_the_same_tag_in_training_and_in_sampling_and_learns_the_response_alone(codec):
    samples, cfg = samples_of(codec, [0, 1, 2, 3]), config(dt, condition_dropout=0.0, guidance=[])
    trained = dt.prepare(samples, codec, cfg)
    for i, z in enumerate(samples.z(samples.rewards)):
        ids, mask, *_ = trained.example(i)
        assert ids[~mask].tolist() == (
            codec.prompt(f"Human: {i}") + dt.ask_for(f"{z}", samples, codec, cfg).tag_ids)
    ids, mask, *_ = trained.example(0)
    assert codec.tokenizer.decode(ids[~mask]) == "Human: 0 1", "1: -1.34"
    assert codec.tokenizer.decode(ids[mask]) == " reply 0" + codec.tokenizer.eos_token


def test_dt_rounds_the_reward():
    for format, rewards, tags in (
            ("decimal", (1.519, -0.001), [" <rm_score>: 1.52 ", " <rm_score>: 0.00 "]),
            ("digit", (-9, -0.2, 0.3, 9), [" 0", " 4", " 5", " 9"]),
            ("word", (-9, -0.5, 0, 0.5, 9),
             [" terrible", " bad", " average", " good", " excellent"])):
        assert [dt.reward_tag(z, config(dt, reward_format=format)) for z in rewards] == tags
    samples = Samples(None, np.linspace(-2, 2, 101), None, None)
    targets = [dt.ask_for(t, samples, mock.Mock(), config(dt)).target for t in ("q95", "-1.5")]
    assert targets == pytest.approx([1.8 / samples.rewards.std(), -1.5])


def test_dt_emphasis_draws_samples_in_proportion_to_their_distance_from_the_mean(codec):
    """From seed and epoch alone, as many as there are: the same after a resume."""
    samples = samples_of(codec, [-1] * 9 + [0] * 81 + [1] * 10)
    rows = dt.prepare(samples, codec, config(dt, emphasis=2.0))
    drawn = np.array([rows.draw(epoch) for epoch in range(20)])                     # (20, 100)
    assert (drawn[3] == rows.draw(3)).all() and (drawn[3] != drawn[4]).any()
    chance = (1 + samples.z(samples.rewards) ** 2) / 200
    alone = dt.prepare(samples_of(codec, [0] * 999 + [1]), codec, config(dt)).draw(0) == 999
    assert alone.mean() < 0.1
    assert np.isin(drawn, np.r_[0:9, 90:100]).mean() == pytest.approx(
        chance[[*range(9), *range(90, 100)]].sum(), abs=0.02)
    assert dt.prepare(samples, codec, config(dt, emphasis=0.0)).draw is None
    untagged = [i for i in range(100) if not rows.tag(i, 0)]
    sampled = [np.random.Generator(np.random.Philox(key=[0, i])).random() for i in untagged]
    assert 2 < len(untagged) < 20 and max(sampled) > 0.3, "not sample()'s"


@pytest.mark.parametrize("module", [mle_filter, rwr, dt], ids=lambda m: m.__name__)
def test_one_step_moves_all_weights_and_one_that_is_not_finite_ends_the_run(
        module, codec, tmp_path, monkeypatch):
    """By the whole of train(); what it saves loads again, what is not finite is not saved."""
    def train(folder, steps):
        cfg = config(module, steps=steps, batch_size=4, save_every=1, out=str(tmp_path))
        (tmp_path / folder).mkdir()
        module.train(cfg, base, samples_of(codec, range(8)), tmp_path / folder, Cost())
    base = Stage(codec.folder, {})
    train("good", 1)
    before, after = (common.load_model(str(folder)).state_dict()
                     for folder in (base.path, tmp_path / "good"))
    assert before.keys() == after.keys()
    assert all((before[name] != after[name]).any() for name in before)
    clip, norms = torch.nn.utils.clip_grad_norm_, iter([1.0, math.nan])
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_",
                        lambda parameters, most: clip(parameters, most) * next(norms))
    with pytest.raises(BadInput, match="step 1: grad_norm not finite"):
        train("bad", 20)
    assert not (tmp_path / "bad" / "model.safetensors").exists()
    assert [p.name for p in common.checkpoints_in(tmp_path / "bad")] == ["00000001"]


# ------------------------------------------------------------------------------ tokenizers, turns

LLAMA3_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
                r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
TEMPLATES = {
    "chatml": "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + "
              "'<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}"
              "{{ '<|im_start|>assistant\n' }}{% endif %}",
    "llama3": "{{ bos_token }}{% for m in messages %}{{ '<|start|>' + m['role'] + '<|header|>\n\n' "
              "+ m['content'] | trim + '<|eot|>' }}{% endfor %}{% if add_generation_prompt %}"
              "{{ '<|start|>assistant<|header|>\n\n' }}{% endif %}",
    "gemma": "{{ bos_token }}{% for m in messages %}{{ '<start_of_turn>' + ('model' if m['role'] "
             "== 'assistant' else m['role']) + '\n' + m['content'] | trim + '<end_of_turn>\n' }}"
             "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
    "qwen3": "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if loop.last and "
             "m['role'] == 'assistant' %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m['content'] "
             "+ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}"
             "{{ '<|im_start|>assistant\n' }}{% endif %}",
    "harmony": "{{ '<|start|>system<|message|>Be kind.<|end|>' }}{% for m in messages %}"
               "{% if m.role == 'assistant' %}{{ '<|start|>assistant<|channel|>final<|message|>' + "
               "m.content + ('<|return|>' if loop.last and not add_generation_prompt else "
               "'<|end|>') }}{% else %}{{ '<|start|>' + m.role + '<|message|>' + m.content + "
               "'<|end|>' }}{% endif %}{% endfor %}{% if add_generation_prompt %}"
               "{{ '<|start|>assistant' }}{% endif %}",
    "inst": "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 "
            "== 0) %}{{ raise_exception('roles must alternate') }}{% endif %}{% if m['role'] == "
            "'user' %}{{ '[INST] ' + m['content'] | trim + ' [/INST]' }}{% else %}{{ ' ' + "
            "m['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}",
    "opened": "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}"
              "{{ '<|assistant|>' + m.content.split('</think>')[-1] + eos_token }}{% else %}"
              "{{ '<|user|>' + m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}"
              "{{ '<|assistant|><think>\n' }}{% endif %}"}
SPECIAL = ["<eos>", "<bos>", "<|start|>", "<|header|>", "<|eot|>", "<|im_start|>", "<|im_end|>",
           "<start_of_turn>", "<end_of_turn>", "<|user|>", "<|assistant|>", "<|end|>",
           "<|message|>", "<|channel|>", "<|return|>"]
ENDS = {"chatml": "<|im_end|>", "llama3": "<|eot|>", "gemma": "<end_of_turn>",
        "qwen3": "<|im_end|>", "harmony": "<|return|>"}  # <eos> for others


def byte_level(template=None, kind="GPT-2", bos=False, words=(), **more):
    """A byte-level BPE tokenizer of this pre-tokenizer's kind; `words` are in its vocabulary, but
    no merges make them (as in Llama 3)."""
    from tokenizers import Regex, Tokenizer, decoders, models, processors, trainers
    from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
    from transformers import PreTrainedTokenizerFast
    raw, plain = Tokenizer(models.BPE(ignore_merges=bool(words))), ByteLevel(add_prefix_space=False)
    raw.pre_tokenizer, raw.decoder = {
        "GPT-2": plain, "Llama-3": Sequence([Split(Regex(LLAMA3_SPLIT), "isolated"), ByteLevel(
            add_prefix_space=False, use_regex=False)])}[kind], decoders.ByteLevel()
    raw.train_from_iterator(
        [common.HARD_TEXT, "where is the fox? the fox is in the forest. fish and berries"],
        trainers.BpeTrainer(vocab_size=400, initial_alphabet=ByteLevel.alphabet(),
                            show_progress=False))
    if words:
        spec = json.loads(raw.to_str())
        spec["model"]["vocab"] |= {w: len(spec["model"]["vocab"]) + i for i, w in enumerate(words)}
        raw = Tokenizer.from_str(json.dumps(spec))
    raw.add_special_tokens(SPECIAL)
    if bos:
        raw.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", raw.token_to_id("<bos>"))])
    made = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<bos>",
                                   **{"eos_token": "<eos>", **more})
    made.chat_template = TEMPLATES.get(template, template)
    return made


def family(template, **more):
    """The tokenizer that models with this template have."""
    if template == "sentencepiece":
        return sentencepiece()
    return byte_level(template, kind="Llama-3" if template == "llama3" else "GPT-2",
                      bos=template in ("llama3", "gemma"), **more)


def sentencepiece(template="inst"):
    """A tokenizer as Llama 2 has it: a word marker before each text, bytes for what is unknown."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast
    pieces = ["<unk>", "<bos>", "<eos>", *(f"<0x{i:02X}>" for i in range(256)), "▁",
              *"abcdefghijklmnopqrstuvwxyzHTW.?[]/INS:", "th", "the", "▁the", "fo", "fox", "▁fox"]
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("f", "o"), ("fo", "x"), ("▁", "fox")]
    raw = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges,
                               unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(),
                                     decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    raw.add_special_tokens(pieces[:3])
    raw.post_processor = processors.TemplateProcessing(single="<bos> $A",
                                                       special_tokens=[("<bos>", 1)])
    made = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<bos>", eos_token="<eos>",
                                   unk_token="<unk>")
    made.chat_template = TEMPLATES[template]
    return made


def folder_of(folder, tokenizer, kind="LlamaForCausalLM", rows=None, ends=None, **more):
    """A folder of a tiny Llama and this tokenizer; `ends` is its generation config's list."""
    import transformers
    torch.manual_seed(0)
    model = getattr(transformers, kind)(transformers.LlamaConfig(
        vocab_size=rows or len(tokenizer), hidden_size=16, intermediate_size=24,
        num_hidden_layers=2, num_attention_heads=2, initializer_range=0.3, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        **{"max_position_embeddings": 512, **more}))
    if ends:
        model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(ends)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


CHAT = [{"role": "user", "content": "where is the fox?"},
        {"role": "assistant", "content": "in the forest."},
        {"role": "user", "content": "what do otters eat?"}]
REPLY = {"role": "assistant", "content": "fish and berries."}


ROOMY = functools.partial(config, max_prompt_tokens=200)


def rendered(tokenizer, chat, ask=False):
    return tokenizer.apply_chat_template(chat, add_generation_prompt=ask, return_dict=False)


@pytest.mark.parametrize("kind", ["GPT-2", "Llama-3"])
def test_tiktoken_encodes_hard_text_as_the_tokenizer_does(kind):
    """Special tokens, words that no merge makes and bytes that the vocabulary lacks too."""
    tokenizer = byte_level(kind=kind, words=("Ġsoubor", "Ġhukuk"))
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    del spec["model"]["vocab"]["\u0104"]  # byte 4, which SmolLM2 lacks
    lacking = byte_level(kind=kind)
    lacking._tokenizer = type(tokenizer.backend_tokenizer).from_str(json.dumps(spec))
    rng = np.random.default_rng(0)
    pieces = ["  ", "\n", "\r\n", "1", "23", "é", "\U0001f469‍\U0001f467", "don't", "x", "\t",
              "<|im_end|>", "東", "…", " the", "½", "\u00a0", " soubor", " hukukhukuk"]
    texts = ["".join(rng.choice(pieces, 30)) for _ in range(200)] + ["a\x04b", " soubor"]
    for each in (tokenizer, lacking):
        encode = common.text_encoder(each)
        assert "tiktoken_encoder" in encode.__qualname__
        assert [encode(t) for t in texts] == each(texts, add_special_tokens=False)["input_ids"]


def test_boundary_between_text_prompt_and_response_is_exact(codec):
    prompt, response, eos = "\n\nHuman: Hi\n\nAssistant:", " They are", codec.stop_ids[0]
    ids, mask = codec.taught(Sample(prompt, response))
    assert ids[~mask].tolist() == codec.prompt(prompt)
    assert codec.tokenizer.decode(ids[~mask]) == prompt and ids[-1] == eos
    assert codec.tokenizer.decode(ids[mask][:-1]) == response and not (ids[:-1] == eos).any()
    assert common.collate([Example(ids, mask)]).targets.tolist() == ids[mask].tolist()
    shorter = Codec(codec.folder, config(max_prompt_tokens=3, max_response_tokens=2))
    cut, mask = shorter.taught(Sample("Hi", " They are small."))
    assert mask.sum() == 2 and cut[-1] != eos, "no end is taught"
    cut, _ = codec.taught(Sample(prompt, response, truncated=True))
    assert cut.tolist() == ids[:-1].tolist()
    with pytest.raises(common.LeftOut, match="prompts longer than --max_prompt_tokens"):
        shorter.prompt("a b c d e f g h")
    with pytest.raises(BadInput, match="no chat template, which messages need"):
        codec.prompt(CHAT)


@pytest.mark.parametrize("template, listed, said", [
    ("llama3", ["<eos>", "<|eot|>"], "fish"), ("gemma", ["<eos>", "<end_of_turn>"], "fish"),
    ("chatml", None, "fish"), ("qwen3", None, "<think>\n\n</think>\n\nfish"),
    ("harmony", ["<|return|>"], "<|channel|>final<|message|>fish"), ("inst", None, " fish"),
    ("sentencepiece", None, "the fox"), ("opened", None, "I think.\n</think>\nfish")])
def test_a_turn_is_what_the_template_renders_and_generated_ones_what_was_sampled(tmp_path, template,
                                                                                 listed, said):
    """Token by token from header to end; the reward model reads the same ids, and the template's
    tail.  What the base policy said is taught as it was sampled, special tokens too."""
    from transformers import GenerationConfig
    tokenizer = family(template)
    folder, cfg = folder_of(tmp_path / "base", tokenizer, ends=listed), ROOMY()
    codec = Codec(folder, cfg)
    end = tokenizer.convert_tokens_to_ids(ENDS.get(template, "<eos>"))
    before, whole = rendered(tokenizer, CHAT, True), rendered(tokenizer, [*CHAT, REPLY])
    assert codec.prompt(CHAT) == before and {end, tokenizer.eos_token_id} == set(codec.stop_ids)
    text = codec.decode(common.Response([*codec.encode(said), end], [], False))
    ids, mask = codec.taught(Sample(CHAT, text, source="generated"))
    assert ids[~mask].tolist() == before == ids[:len(before)].tolist() and ids[-1] == end
    assert text == said or template == "sentencepiece"  # which may write a word in several ways
    assert ids[mask].tolist() == [*codec.encode(said), end] or text != said
    assert codec.scored(CHAT, text, generated=True)[:len(ids)].tolist() == ids.tolist()
    common.save_folder(tmp_path / "saved", common.load_model(folder), codec, cfg, "card")
    kept = GenerationConfig.from_pretrained(tmp_path / "saved").eos_token_id
    assert kept in (codec.stop_ids, *codec.stop_ids)
    if template == "opened":
        return
    last = len(whole) - whole[::-1].index(end)
    ids, mask = codec.taught(Sample(CHAT, REPLY["content"]))
    assert ids.tolist() == whole[:last]
    assert mask.tolist() == [i >= len(before) for i in range(last)]
    assert codec.scored(CHAT, REPLY["content"]).tolist() == whole
    cut, _ = codec.taught(Sample(CHAT, REPLY["content"], truncated=True))
    assert cut.tolist() == whole[:len(cut)] and len(before) < len(cut) < last
    assert codec.scored(CHAT, REPLY["content"], truncated=True).tolist() == cut.tolist()
    tagged = Examples(tokens_of([(ids, mask)]), tag=lambda i, epoch: [7, 8]).example(0)
    assert tagged.ids.tolist() == [*before, 7, 8, *whole[len(before):last]]
    assert tagged.mask.tolist() == [False] * (len(before) + 2) + [True] * (last - len(before))


def test_templates_that_no_reply_follows_are_refused_or_their_rows_left_out(tmp_path, capsys):
    """DeepSeek-R1's opens a block of thoughts; Mistral's wants roles in turn."""
    folder = folder_of(tmp_path / "opened", byte_level("opened"))
    rows = write(tmp_path / "s.jsonl", *({"prompt": [{**CHAT[0], "content": f"{i}"}],
                                          "response": "fish", "reward": i} for i in range(30)))
    said = launched(rwr, ["--model", folder, "--samples", rows, "--out", tmp_path / "run",
                          "--max_prompt_tokens", "64", "--max_response_tokens", "8"], capsys, 2)
    assert "s.jsonl: 0 of 30 rows used" in said and "give prompts as text, or mark" in said
    assert '"source": "generated"' in said and not list((tmp_path / "run").glob("[!.]*"))
    codec = Codec(folder_of(tmp_path / "inst", family("inst")), config())
    with pytest.raises(common.LeftOut, match="roles must alternate"):
        codec.prompt([REPLY, CHAT[0]])
    codec = Codec(folder_of(tmp_path / "joined", byte_level("llama3")), ROOMY())
    ids, _ = codec.taught(Sample(CHAT, "fish"))  # whose "\n\n" is one token only at an end
    assert ids.tolist() == codec.prompt(CHAT) + codec.encode("fish<|eot|>")
    assert "encoded apart" in capsys.readouterr().out


def test_replies_come_back_from_decode_and_end_at_a_whole_character(tmp_path):
    codec = Codec(folder_of(tmp_path / "sp", sentencepiece()), config())
    prompt, reply = codec.prompt("Where is the fox:"), codec.continuation(" the fox is")
    assert prompt + reply == codec.tokenizer("Where is the fox: the fox is")["input_ids"]
    for text in ("the fox", " the fox is", "is\n the", "  é fox"):
        assert codec.decode(common.Response([*codec.continuation(text), 2], [], False)) == text
    codec, text = Codec(folder_of(tmp_path / "bpe", byte_level()), config()), "fish \U0001f98a東京"
    ids = codec.encode(text)
    said = [codec.decode(common.Response(ids[:n], [], True)) for n in range(len(ids) + 1)]
    assert set(map(text.startswith, said)) == {True} and said[-1] == text, "cut by the token limit"


@pytest.mark.parametrize("end", ["", "\n", "\n\n", "{% if true %}\n{% endif %}\n", "  "])
def test_a_dt_policy_is_asked_and_guided_by_stock_generate_as_its_card_says(tmp_path, end):
    """A chat template writes what training wrote, whatever its end: Jinja drops a last newline."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    base = folder_of(tmp_path / "base", byte_level(TEMPLATES["chatml"] + end))
    folder = tmp_path / "dt"
    cfg = ROOMY(dt, steps=1, batch_size=4, reward_format="decimal", target=["2.0"],
                max_response_tokens=8, out=str(tmp_path))
    folder.mkdir()
    codec = Codec(base, cfg)
    record = dt.train(cfg, Stage(base, {}), samples_of(codec, [0, 1, 2, 5]), folder, Cost())
    assert record["reward_tag"] == " <rm_score>: 2.00 "
    assert "guidance_scale=1 + g" in Path(folder, "README.md").read_text()
    tokenizer, before = map(AutoTokenizer.from_pretrained, (folder, codec.folder))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tag, ids = codec.continuation(record["reward_tag"]), rendered(tokenizer, CHAT, True)
    asked, plain = (functools.partial(each.apply_chat_template, CHAT, tokenize=False)
                    for each in (tokenizer, before))
    assert asked() == plain()
    assert asked(add_generation_prompt=True) == (
        plain(add_generation_prompt=True) + record["reward_tag"])
    plain = codec.prompt(CHAT)
    assert ids == plain + tag or end == "  "  # whose spaces the tag's joins
    ours, = common.sample(common.load_model(str(folder)), [ids], codec.cfg, 0, codec.stop_ids,
                          Cost(), 0.0, [plain], 1.5)
    theirs = model.generate(torch.tensor([ids]), guidance_scale=2.5, do_sample=False,
                            negative_prompt_ids=torch.tensor([plain]), max_new_tokens=8)
    assert ours.ids == theirs[0, len(ids):].tolist()


def test_reward_model_scores_alike_through_transformers_in_any_batch_with_any_padding(run):
    """And reads the EOS, which it never pads with."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    folder = run[0] / "rm"
    rows = lines_of(run[0] / "samples.jsonl")[:6]
    columns = [[row[name] for row in rows] for name in ("prompt", "response", "truncated")]
    expected = pytest.approx([row["reward"] for row in rows], abs=1e-4)
    score = reward_model.load_scorer(config(micro_batch_tokens=1), str(folder))
    assert score(*columns, Cost()) == expected
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    for side in ("left", "right"):
        tokenizer = AutoTokenizer.from_pretrained(folder, padding_side=side)
        texts = [row["prompt"] + row["response"] + tokenizer.eos_token for row in rows]
        with torch.no_grad():
            inputs = tokenizer(texts, return_tensors="pt", padding=True)
            assert model(**inputs).logits[:, 0].tolist() == expected
    ended, broken = score(["Human: Hi\n\nAssistant:"] * 2, [" They are"] * 2, [False, True], Cost())
    assert ended != broken and tokenizer.pad_token_id == model.config.pad_token_id


def greedy(model, prompts, stop=(0,), **more):
    """The most likely responses to prompts, twelve tokens at most."""
    return common.sample(model, prompts, config(max_response_tokens=12), 0, list(stop), Cost(), 0.0,
                         **more)


# ---------------------------------------------------------------------- other people's models: zoo
# Tiny models of many architectures, with weights at which attention and routing matter, held
# against transformers' own forward and generate of each sequence alone.

ZOO_V = 420


def zoo_configs():
    """Models of width 64 by name; where there is a sliding window it is 6."""
    import transformers as t
    kw = dict(vocab_size=ZOO_V, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
              num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
              bos_token_id=2, eos_token_id=0, pad_token_id=0)
    turns = dict(sliding_window=6, layer_types=["sliding_attention", "full_attention"])
    moe = dict(num_local_experts=4, num_experts_per_tok=2)
    gemma = dict(**kw, head_dim=24, query_pre_attn_scalar=24)
    return {
        "llama": t.LlamaConfig(**kw),
        "qwen3": t.Qwen3Config(**kw, head_dim=32, tie_word_embeddings=True),
        "gemma2": t.Gemma2Config(**gemma, sliding_window=6, final_logit_softcapping=2.0,
                                 attn_logit_softcapping=2.0),
        "gemma3": t.Gemma3TextConfig(**gemma, **turns),
        "gpt2": t.GPT2Config(vocab_size=ZOO_V, n_embd=64, n_layer=2, n_head=4, n_positions=256,
                             bos_token_id=0, eos_token_id=0, resid_pdrop=0.5, embd_pdrop=0.5,
                             attn_pdrop=0.5),
        "gpt_oss": t.GptOssConfig(**kw, **turns, **moe, head_dim=16),
        "mixtral": t.MixtralConfig(**kw, **moe, sliding_window=6),
        "granite": t.GraniteConfig(
            **kw, embedding_multiplier=12.0, logits_scaling=6.0, residual_multiplier=0.22,
            attention_multiplier=0.1, tie_word_embeddings=True),
        "lfm2": t.Lfm2Config(**kw, layer_types=["conv", "full_attention"], conv_L_cache=3,
                             block_auto_adjust_ff_dim=False),
        "opt": t.OPTConfig(  # drops out by functions that no module names
            vocab_size=ZOO_V, hidden_size=64, word_embed_proj_dim=64, ffn_dim=96, layerdrop=0.5,
            num_hidden_layers=2, num_attention_heads=4, dropout=0.5, attention_dropout=0.5,
            max_position_embeddings=256, pad_token_id=1, bos_token_id=0, eos_token_id=0),
        "gemma3_multimodal": t.Gemma3Config(
            text_config=t.Gemma3TextConfig(**gemma, **turns), mm_tokens_per_image=4,
            vision_config=dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                               num_attention_heads=2, image_size=16, patch_size=8),
            image_token_index=110, boi_token_index=111, eoi_token_index=112)}


ZOO = dict.fromkeys(["llama", "qwen3", "gemma3", "gpt2", "mixtral", "granite", "opt",
                     "gemma3_multimodal"])
ZOO |= {"gemma2": "takes softcap", "gpt_oss": "takes s_aux",  # padded, for these reasons
        "lfm2": "layers of conv"}


@functools.cache
@torch.no_grad()
def zoo_model(name):
    """A folder of one of the zoo's models, and transformers' own of it, in eval mode."""
    from transformers import AutoModelForCausalLM
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(zoo_configs()[name])
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
    byte_level().save_pretrained(folder)
    own = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().to(DEVICE)
    return folder, own


@pytest.mark.parametrize("name, recomputed", [*((name, False) for name in ZOO), ("opt", True)])
def test_loss_and_every_gradient_equal_those_of_each_sequence_alone(name, recomputed, capsys):
    """Without dropout, and with activations recomputed in backward too."""
    folder, own = zoo_model(name)
    rng = np.random.default_rng(0)  # some sequences are longer than the windows
    rows = [example(rng.integers(3, 100, p + r), p)
            for p, r in ((5, 7), (1, 1), (20, 14), (9, 3), (2, 18))]
    common.print_once.cache_clear()
    policy = common.load_policy(folder, config(gradient_checkpointing=recomputed))
    why_padded = ZOO[name]
    assert common.is_packed(policy.model) == (not why_padded)
    assert (why_padded or "") in capsys.readouterr().out
    micro = common.collate(rows)
    loss = policy(micro, dt.masked_nll_)
    loss.backward()
    own.zero_grad()
    expected = plain_nll_of(own, micro)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=0)
    ours = {key: p.grad for key, p in policy.model.named_parameters()}
    theirs = {key: p.grad for key, p in own.named_parameters() if p.grad is not None}
    assert not any(grad.any() for key, grad in ours.items() if grad is not None
                   and key not in theirs), "an image tower's"
    floor = 1e-4 * math.sqrt(sum(grad.square().sum().item() for grad in theirs.values()))
    for key, grad in theirs.items():
        assert (ours[key] - grad).norm() < 1e-4 * max(grad.norm().item(), floor), key


@pytest.mark.parametrize("name", ZOO)
def test_greedy_samples_and_log_probs_are_those_of_each_prompt_alone(name, monkeypatch):
    monkeypatch.setattr(common, "SLOTS", {"cpu": 3, "cuda": 3})
    folder, own = zoo_model(name)
    model = common.load_model(folder)
    prompts = [np.random.default_rng(n).integers(3, 100, n).tolist() for n in (3, 1, 17, 6, 24)]

    @torch.no_grad()
    def generated(prompt, stop):
        ids = torch.tensor([prompt], device=DEVICE)
        said = own.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                            pad_token_id=0, max_new_tokens=12, eos_token_id=stop)
        return said[0, len(prompt):].tolist()
    if ZOO[name]:
        with pytest.raises(BadInput, match="give --guidance 0"):
            greedy(model, prompts, unconditional=prompts, guidance=1.5)
    free = [generated(prompt, [ZOO_V]) for prompt in prompts]
    stop = [free[2][4], free[3][-1]]  # ends rows at different steps
    responses = greedy(model, [*prompts, prompts[2]], stop)
    for prompt, response in zip(prompts, responses):
        assert response.ids == generated(prompt, stop)
        assert response.truncated == (response.ids[-1] not in stop)
    assert responses[-1].ids == responses[2].ids and not responses[2].truncated
    rows = [example(p + r.ids, len(p)) for p, r in zip(prompts, responses)]
    for row, response, log_probs in zip(rows, responses, log_probs_of(model, rows, config())):
        micro = common.collate([row])
        with torch.no_grad():
            expected = logits_of(own, micro)[micro.rows].log_softmax(-1)
        expected = expected.gather(1, micro.targets[:, None])[:, 0].tolist()
        assert response.log_probs == pytest.approx(expected, abs=2e-4)
        assert log_probs == pytest.approx(expected, abs=2e-4)


@pytest.mark.parametrize("name", ZOO)
def test_a_saved_policy_is_an_ordinary_folder_that_says_the_same(name, tmp_path):
    from transformers import AutoModelForCausalLM
    folder, own = zoo_model(name)
    policy = common.load_policy(folder, config())
    common.save_policy(tmp_path, policy, Codec(folder, config()), config())
    assert not any(common.PACKED in file.read_text() for file in tmp_path.glob("*.json"))
    saved, report = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32,
                                                         output_loading_info=True)
    assert not any(report.values()) and set(saved.generation_config.eos_token_id) >= {0, 1}
    ids = torch.arange(3, 27)[None]
    with torch.no_grad():
        torch.testing.assert_close(saved.eval()(input_ids=ids).logits,
                                   own(input_ids=ids.to(DEVICE)).logits.cpu(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("fault, why", [("leak", "mixes tokens"), ("twice", "several times")])
def test_a_model_that_would_carry_one_sequence_into_the_next_is_padded(fault, why, capsys):
    """By structure, not by size: a leak of a billionth is one."""
    model = tiny_model(dtype=torch.float32)
    model.set_attn_implementation("sdpa")
    if fault == "leak":
        model.model.layers[1].mlp.register_forward_hook(
            lambda module, args, out: out + 1e-9 * out.roll(1, dims=1).tril())
    else:
        model.model.layers[1] = model.model.layers[0]
    common.print_once.cache_clear()
    assert not common.is_packed(common.enable_packing(model))
    assert why in capsys.readouterr().out


def test_packing_is_proven_where_a_model_is_not_on_its_ranks_device(monkeypatch):
    """As where rank 0 loads on its CPU what FSDP will shard."""
    monkeypatch.setattr(common, "device", lambda: torch.device("meta"))
    assert common.is_packed(tiny_model())


def zoo_refused():
    import transformers as t
    kw = dict(vocab_size=450, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
              num_attention_heads=4, num_key_value_heads=2, pad_token_id=0)
    long = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8,
            "long_factor": [2.0] * 8}
    return {
        "encoder-decoder": (t.BartConfig(vocab_size=450, d_model=16), "an encoder-decoder; give"),
        "no head": (t.CLIPConfig(), "CLIPConfig"),
        "looks ahead": (t.Gemma3TextConfig(**kw, head_dim=24, use_bidirectional_attention=True),
                        "looks ahead"),
        "long rope": (t.Phi3Config(**kw, max_position_embeddings=400, rope_parameters=long,
                                   original_max_position_embeddings=100),
                      "reads at most 100 tokens"),
        "no classifier": (t.GraniteConfig(**kw), "AutoModelForSequenceClassification")}


@pytest.mark.parametrize("name", ["encoder-decoder", "no head", "looks ahead", "long rope",
                                  "no classifier", "remote code"])
def test_models_that_cannot_be_trained_are_refused_before_anything_is(name, tmp_path, capsys):
    from transformers import AutoModelForCausalLM
    folder = tmp_path / "model"
    if name == "remote code":
        write(tmp_path / "ran.py", "raise SystemExit('their code ran')")
        folder.mkdir()
        write(folder / "config.json", {"model_type": "x", "auto_map": {"AutoConfig": "ran.X"}})
        shutil.copy(tmp_path / "ran.py", folder)
        why = "not a folder or Hub id with"
    else:
        configuration, why = zoo_refused()[name]
        if name in ("looks ahead", "long rope", "no classifier"):
            AutoModelForCausalLM.from_config(configuration).save_pretrained(folder)
        configuration.save_pretrained(folder)
    byte_level().save_pretrained(folder)
    pairs = write(tmp_path / "p.jsonl", *({"prompt": f"p{i}", "chosen": "a", "rejected": "b"}
                                          for i in range(30)))
    said = launched(dt, ["--model", folder, "--preferences", pairs, "--out", tmp_path / "run",
                         "--max_prompt_tokens", "64", "--max_response_tokens", "64"], capsys, 2)
    assert re.search(why, said) and not list((tmp_path / "run").glob("[!.]*"))


def change(folder, edit):
    from safetensors.torch import load_file, save_file
    weights = load_file(Path(folder, "model.safetensors"))
    edit(weights)
    save_file(weights, Path(folder, "model.safetensors"), metadata={"format": "pt"})


def test_weights_that_are_missing_unknown_or_misshapen_are_named(tmp_path):
    up = "model.layers.1.mlp.up_proj.weight"
    edits = {"lm_head.weight .missing": lambda w: w.pop("lm_head.weight"),
             "other.weight .unexpected": lambda w: w.update({"other.weight": torch.ones(1, 16)}),
             f"{up}.*mismatched": lambda w: w.update({up: torch.ones(3, 16)})}
    for i, (why, edit) in enumerate(edits.items()):
        change(folder_of(tmp_path / str(i), byte_level()), edit)
        with pytest.raises(BadInput, match=why):
            common.load_model(str(tmp_path / str(i)))
    with pytest.raises(BadInput, match="resize_token_embeddings"):
        Codec(folder_of(tmp_path / "small", byte_level(), rows=300), config())
    folder = folder_of(tmp_path / "short", byte_level(bos=True), max_position_embeddings=129)
    with pytest.raises(BadInput, match="reward tag may take 130"):
        Codec(folder, config()).check_fits(" 7")  # 64 + 64 and BOS


# ------------------------------------------------------------------------------------------- data

TRANSCRIPT = "\n\nHuman: Hi {}\n\nAssistant: Hello.\n\nHuman: And?\n\nAssistant: {}"
GOOD = {"prompt": "p", "response": "r", "reward": 1.0}
PAIR = {"prompt": "p", "chosen": "a", "rejected": "b"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny base policy with a chat template."""
    return folder_of(tmp_path_factory.mktemp("base"), byte_level("chatml"))


def pairs_in(path, *columns):
    return [pair for _, pair in common.read_rows(str(path), common.PREFERENCE_FIELDS, columns,
                                                 common.preference_of)]


def samples_in(path, *columns):
    return [sample for _, sample in common.read_rows(str(path), common.SAMPLE_FIELDS, columns,
                                                     common.sample_of)]


def test_rows_of_every_shape_are_read_and_what_is_not_used_is_said(tmp_path, capsys):
    turns = [{"role": "user", "content": "Hi"}]
    reply = [[{"role": "assistant", "content": text}] for text in ("yes", "no")]
    pairs = pairs_in(write(
        tmp_path / "pairs.jsonl.gz",
        {"chosen": TRANSCRIPT.format(1, "yes"), "rejected": TRANSCRIPT.format(1, "no")},
        {"prompt": "Hi", "chosen": "yes", "rejected": "no"},
        {"prompt": "Hi", "chosen": "Hi yes", "rejected": "Hi no"},
        {"chosen": turns + reply[0], "rejected": turns + reply[1]},
        {"prompt": turns, "chosen": reply[0], "rejected": reply[1]},
        {"prompt": turns, "chosen": turns + reply[0], "rejected": turns + reply[1]},
        {"chosen": TRANSCRIPT.format(1, "a"), "rejected": TRANSCRIPT.format(2, "b")},
        {**PAIR, "rejected": " "}))
    assert [p.prompt for p in pairs] == [TRANSCRIPT.format(1, "")[:-1], "Hi", "Hi", *[turns] * 3]
    assert {(p.chosen.strip(), p.rejected.strip()) for p in pairs} == {("yes", "no")}
    assert ("6 of 8 rows used; left out: 1 that differ in more than the last response; left out: 1 "
            "with an empty response") in capsys.readouterr().out
    assert samples_in(write(
        tmp_path / "s.jsonl", {**GOOD, "extra": 1}, {"messages": CHAT}, {**GOOD, "source": "vllm"},
        {"messages": [*CHAT, REPLY], "reward": 2, "weight": 0.5, "truncated": True},
        {"prompt": "p", "response": None})) == [
            Sample("p", "r", 1.0), Sample(CHAT), Sample("p", "r", 1.0, source="vllm"),
            Sample(CHAT, REPLY["content"], 2.0, 0.5, truncated=True), Sample("p")]
    assert "5 of 5 rows used; columns not read: extra" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_columns_names_the_datas_own_columns_and_joins_them(tmp_path, kind, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [{"question": f"Q{i}", "input": "more" if i else None, "answer": "A", "worse": "B",
             "score": i + 0.5} for i in range(3)]
    path = Path(write(tmp_path / f"rows.{kind}", *rows))
    if kind != "jsonl":
        datasets = pytest.importorskip("datasets")
        path.write_text(json.dumps(rows))
        if kind != "json":
            getattr(datasets.Dataset.from_list(rows), f"to_{kind}")(path)
    prompts = ["Q0", "Q1\n\nmore", "Q2\n\nmore"]
    assert samples_in(path, "prompt=question+input", "response=answer", "reward=score") == [
        Sample(prompt, "A", i + 0.5) for i, prompt in enumerate(prompts)]
    assert pairs_in(path, "prompt=question+input", "chosen=answer", "rejected=worse") == [
        Preference(prompt, "A", "B") for prompt in prompts]
    with pytest.raises(BadInput, match="no reply; it has answer, input, question, score, worse"):
        samples_in(path, "prompt=question", "response=reply")


BAD_ROWS = [
    (GOOD, '{"prompt": ', "not JSON"), (GOOD, [1], "not a JSON object"),
    (GOOD, b'{"prompt": "\xff"}', "UTF-8"), (GOOD, {"response": "r"}, "'prompt' is missing"),
    (GOOD, '{"prompt": "p", "response": "r", "reward": NaN}', "'reward' must be a finite number"),
    (GOOD, '{"prompt": "p", "response": "r", "reward": 1' + "0" * 400 + "}", "'reward' must be a"),
    (GOOD, {**GOOD, "reward": "one"}, "'reward' must be a finite number, not 'one'"),
    (GOOD, {**GOOD, "response": 3}, "'response' must be text, not 3"),
    (GOOD, {**GOOD, "prompt": [1]}, "'prompt' must be text or a list of"),
    (GOOD, {**GOOD, "messages": CHAT}, "'messages' stands beside 'response'"),
    (GOOD, {**GOOD, "truncated": "maybe"}, "'truncated' must be true or false"),
    (GOOD, {"prompt": "p", "reward": 1}, "'reward' has no response beside it"),
    (PAIR, {**PAIR, "chosen": 1}, "'chosen' must be text or"),
    (PAIR, {"prompt": "p", "chosen": "a"}, "'rejected' is missing"),
    (PAIR, {"chosen": "a", "rejected": "b"}, "must be transcripts")]


@pytest.mark.parametrize("good, bad, message", BAD_ROWS)
def test_bad_rows_are_named_by_file_line_and_field(tmp_path, good, bad, message):
    path = write(tmp_path / "s.jsonl", good, bad)
    with pytest.raises(BadInput, match=r"s\.jsonl, line 2.*: .*" + message) as problem:
        (pairs_in if good is PAIR else samples_in)(path)
    assert "\n" not in str(problem.value)


def data_of(base, **flags):
    """What a run reads: data, and the rows that it labels."""
    cfg = config(rwr, **{"model": base, "held_out": 0.3, **flags})
    data = common.read_data(cfg, Stage(base, {}))
    return data, list(common.samples_to_label(cfg, data))


@pytest.mark.parametrize("names", ["all.jsonl", "{}.jsonl", "{}/rows.jsonl", "data-{}.jsonl"])
def test_held_out_prompts_are_never_trained_on(tmp_path, base, names, capsys):
    """By hash, or those of files and folders named test; what one source hides, none teaches."""
    rows = []
    for name in ("train", "test"):
        path = tmp_path / "data" / names.format(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = rows * ("{" not in names)  # all in one file
        rows += [{**PAIR, "prompt": p} for p in ("both", *(f"{name}{i % 20}" for i in range(40)))]
        write(path, *rows)
    flags = {"preferences": str(tmp_path / "data"), "samples_per_prompt": 2}
    data, labelled = data_of(base, **flags)
    hidden = set(data.held_out_prompts)
    assert (hidden == {"both", *(f"test{i}" for i in range(20))}) == ("{" in names)
    assert len(labelled) == 2 * len(data.preferences) + 2 * len(data.prompts)
    assert hidden == {p.prompt for p in data.held_out_preferences}
    assert not hidden & {row.prompt for row in labelled} and not hidden & set(data.prompts)
    assert len(data.preferences) + len(data.held_out_preferences) == 82
    samples = write(tmp_path / "s.jsonl", *({**GOOD, "prompt": f"{name}{i}"} for i in range(20)
                                            for name in ("train", "test", "new")))
    data, labelled = data_of(base, samples=samples, **flags)
    assert hidden < set(data.held_out_prompts)
    assert not set(data.held_out_prompts) & {row.prompt for row in [*labelled, *data.preferences]}
    said = f"{len(labelled)} and {60 - len(labelled)} samples"
    assert said in capsys.readouterr().out


def test_data_of_which_nothing_could_be_learnt_are_refused(tmp_path, base):
    path = tmp_path / "s.jsonl"
    for rows, why in (
            ([GOOD, {**GOOD, "prompt": "p1"}], "larger --held_out"),
            ([{**GOOD, "prompt": " "}, {**GOOD, "prompt": "x" * 999}], "0 of 2 rows used; left "
             "out: 1 with an empty prompt; left out: 1 with prompts longer than --max_prompt"),
            ([{"prompt": "p", "response": "r"}], "line 1.*has no reward: give --reward_model")):
        with pytest.raises(BadInput, match=why):
            data_of(base, samples=write(path, *rows), held_out=1e-9)
    for rewards in ([2.0, 2.0], [1.0, math.nan]):
        with pytest.raises(BadInput, match="nothing to tell responses apart"):
            Samples(None, np.array(rewards), None, None).z(rewards)
    rows = [{**GOOD, "response": "", "truncated": True}] * 2
    cfg = config(model=base, samples=write(path, *rows), out=str(tmp_path), held_out=1e-9)
    with pytest.raises(BadInput, match="no token to learn"):
        common.read_samples(path, cfg, Stage(base, {}))


# ------------------------------------------------------------------------------------------ flags

FLAGS = [(mle_filter, "--keep 0", "--keep"), (rwr, "--beta 0", "--beta"), (rwr, "--lr nan", "--lr"),
         (dt, "--targt 1", "--targt"), (dt, "--target 95", "--target"),
         (dt, "--condition_dropout 0", "--guidance"), (dt, "--emphasis -1", "--emphasis"),
         (dt, "--steps few", "--steps"), (dt, "--epochs 1 --steps 1", "--epochs"),
         (dt, "--samples s.jsonl", "--samples"), (rwr, "--model m", "--model goes with"),
         (dt, "--held_out 1", "--held_out"), (dt, "--temperature -1", "--temperature"),
         (dt, "--batch_size 0", "--batch_size"), (dt, "--columns text=x", "--columns"),
         (ppo_baseline, "--clip 0", "--clip"), (ppo_baseline, "--gae_lambda 2", "--gae_lambda"),
         (ppo_baseline, "--batch_size 8 --rollout_batch_size 4", "--rollout_batch_size"),
         (ppo_baseline, "--temperature 0", "--temperature"),
         (reward_model, "--model /no/model --preferences /no/file.jsonl", "/no/model"),
         (rwr, "--config /no/file.yaml", "/no/file.yaml")]


@pytest.mark.parametrize("module, flags, word", FLAGS)
def test_bad_flags_end_in_one_sentence_and_status_2(module, flags, word, capsys, tmp_path):
    assert word in launched(module, [*flags.split(), "--out", tmp_path / "run"], capsys, 2)
    assert not list((tmp_path / "run").glob("[!.]*"))


def test_flags_come_from_a_file_and_the_command_line_wins(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("lr: 0.5\nbatch_size: 3\ntarget: [q1, '2']\nsteps: 7\njudge:\n"
                    "gradient_checkpointing: true\n")
    cfg = common.parse(dt.Config, ["--config", str(path), "--batch_size", "4"])
    assert (cfg.lr, cfg.batch_size, cfg.target, cfg.steps) == (0.5, 4, ["q1", "2"], 7)
    assert cfg.gradient_checkpointing and cfg.judge is None and cfg.out == "runs/toy"
    cfg = common.parse(dt.Config, ["--config", str(path), "--epochs", "4"])
    assert (cfg.epochs, cfg.steps) == (4, None)
    for text, word in (("lr: [", "run.yaml"), ("7", "run.yaml"), ("nonsense: 1", "--nonsense")):
        path.write_text(text)
        with pytest.raises(BadInput, match=word):
            common.parse(rwr.Config, ["--config", str(path)])


def test_folders_that_cannot_be_used_are_one_sentence_before_anything_is_trained(
        small, tmp_path, capsys):
    out = tmp_path / "run"
    for flags, why in ((["--model", tmp_path], "not a folder or Hub id"),
                       (["--judge", tmp_path / "no"], "not a folder or Hub id"),
                       (["--reward_model", tmp_path / "no"], "not a folder or Hub id"),
                       (["--judge", f"{tmp_path}/no.py:f"], "no.py:f: no such file"),
                       (["--out", tmp_path / "rows.jsonl" / "run"], "rows.jsonl")):
        assert why in launched(rwr, [*small, *flags], capsys, 2)
        assert not list(out.glob("[!.]*"))
    with open(out / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another run is at work there" in launched(rwr, small, capsys, 2)


# ----------------------------------------------------------- functions as reward models and judges

REWARDS = '''
import os
def polite(prompts, responses):
    if "prompt 25" in prompts and os.environ.pop("STOP", ""):
        raise KeyboardInterrupt
    return [len(response) + 0.5 for response in responses]
def cut(prompts, responses, truncated): return list(map(float, truncated))
def few(prompts, responses): return [1.0]
def nan(prompts, responses): return [float("nan")] * len(responses)
def nothing(prompts, responses): pass
def words(prompts, responses): return ["good"] * len(responses)
def broken(prompts, responses): return 1 / 0
def missing(prompts, responses): return open("/no/such/file")
'''


@pytest.fixture
def small(base, tmp_path):
    """A command line for a run of two steps: a tiny model, all three kinds of rows, a reward that
    is a function."""
    (tmp_path / "rewards.py").write_text(REWARDS)
    kinds = [{"response": "given", "reward": 2}, {"response": "to score"}, {}]
    samples = write(tmp_path / "rows.jsonl", *({"prompt": f"prompt {i // 2}", **kinds[i % 3]}
                                               for i in range(60)))
    return ["--model", base, "--samples", samples, "--reward_model",
            tmp_path / "rewards.py:polite", "--out", tmp_path / "run", "--dtype", "fp32",
            "--max_prompt_tokens", "32", "--max_response_tokens", "8", "--batch_size", "8",
            "--eval_prompts", "16", "--held_out", "0.2", "--samples_per_prompt", "2", "--steps",
            "2"]


def test_samples_of_all_three_kinds_are_answered_and_scored_in_their_order(small, tmp_path, capsys):
    """What the run leaves is complete, and a valid --samples itself."""
    launched(mle_filter, small, capsys)
    labelled = lines_of(tmp_path / "run" / "samples.jsonl")
    held_out = {row["prompt"] for row in lines_of(tmp_path / "run" / "evaluation" / "base.jsonl")}
    expected = [row for row in lines_of(tmp_path / "rows.jsonl") if row["prompt"] not in held_out
                for _ in range(1 if "response" in row else 2)]
    assert len(labelled) == len(expected) > 40
    for row, given in zip(labelled, expected):
        assert row["source"] == ("given" if "response" in given else "generated")
        filled = {"response": row["response"], "reward": len(row["response"]) + 0.5, **given}
        assert row == {**filled, "source": row["source"], "truncated": row["truncated"]}
    drawn = [row["response"] for row in labelled if row["source"] == "generated"]
    assert len(set(drawn)) > len(drawn) / 2
    launched(mle_filter, [*small, "--samples", tmp_path / "run" / "samples.jsonl", "--out",
                          tmp_path / "again", "--eval_prompts", "0", "--held_out", "1e-9"], capsys)
    assert lines_of(tmp_path / "again" / "samples.jsonl") == labelled


def test_a_function_labels_scores_rollouts_and_judges(small, tmp_path, capsys):
    said = launched(ppo_baseline, [*small, "--judge", f"{tmp_path}/rewards.py:cut",
                                   "--rollout_batch_size", "8", "--missing_eos_score", "-9"],
                    capsys)
    assert "critic starts from the base policy with a new head" in said
    labelled = lines_of(tmp_path / "run" / "samples.jsonl")
    rewards = np.array([row["reward"] for row in labelled])
    for row in lines_of(tmp_path / "run" / "evaluation" / "ppo_kl_0.05.jsonl"):
        assert row["gold"] == float(row["truncated"])
        z = (len(row["response"]) + 0.5 - rewards.mean()) / rewards.std()
        assert row["reward"] == pytest.approx(z)
    first, second = lines_of(tmp_path / "run" / "ppo" / "metrics.jsonl")
    assert first["eos_rate"] == 0 and first["score"] == -9
    assert abs(first["kl"]) < 1e-4 and second["value_loss"] > 0
    (tmp_path / "rewards.py").write_text(REWARDS + "# changed\n")
    said = launched(rwr, small, capsys, 2)
    assert "samples.jsonl: was made with other settings: reward_model was" in said


@pytest.mark.parametrize("name, why", [
    ("few", "as many finite numbers as responses"), ("nan", "as many finite numbers"),
    ("nothing", "as many finite numbers"), ("words", "as many finite numbers"),
    ("none", "defines no function none"), ("broken", ZeroDivisionError), ("missing", RuntimeError)])
def test_a_function_that_fails_is_named_and_its_own_errors_are_shown(small, tmp_path, name, why,
                                                                     capsys):
    flags = [*small, "--reward_model", f"{tmp_path}/rewards.py:{name}"]
    if isinstance(why, str):
        said = launched(rwr, flags, capsys, 2)
        assert why in said and f"rewards.py:{name}" in said
    else:
        with pytest.raises(why) as problem:
            launched(rwr, flags, capsys)
        assert "in " + name in str(problem.getrepr(chain=True, style="native"))
    assert not (tmp_path / "run" / "rwr").exists()


# ----------------------------------------------------------------------------------------- stages


def contents(folder):
    """Every file of a run, but for its lock: its bytes, and when it was written."""
    return {path.relative_to(folder): (path.stat().st_mtime_ns, path.read_bytes())
            for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def test_finished_stages_of_other_settings_are_refused_and_nothing_is_trained_or_deleted(
        base, tmp_path, capsys):
    """Flags changed at every stage of a run; only the script's own policy is trained anew."""
    model, out = shutil.copytree(base, tmp_path / "model"), tmp_path / "run"
    rows = [{**PAIR, "prompt": f"p{i}"} for i in range(41)]
    pairs, other = (write(tmp_path / f"{n}.jsonl", *rows[:n]) for n in (40, 41))
    samples = write(tmp_path / "s.jsonl", *({**GOOD, "prompt": f"{i}"} for i in range(30)))
    flags = ["--model", model, "--preferences", pairs, "--out", out, "--dtype", "fp32",
             "--max_prompt_tokens", "32", "--max_response_tokens", "8", "--held_out", "0.2",
             "--batch_size", "8", "--steps", "2", "--eval_prompts", "2"]
    launched(reward_model, flags, capsys)
    flags += ["--samples_per_prompt", "2"]
    launched(dt, flags, capsys)
    before = contents(out)
    for module, changed, place, difference in (
            (dt, ["--temperature", "0"], "samples.jsonl", "temperature was 1.0, now 0.0"),
            (ppo_baseline, ["--rollout_batch_size", "8", "--samples_per_prompt", "1"],
             "samples.jsonl", "samples_per_prompt was 2, now 1"),
            (dt, ["--samples", samples], "samples.jsonl", "samples was None"),
            (rwr, ["--seed", "1"], "rm", "seed was 0, now 1"),
            (dt, ["--held_out", "0.3"], "rm", "held_out was 0.2, now 0.3"),
            (dt, ["--max_response_tokens", "9"], "rm", "max_response_tokens was 8, now 9"),
            (dt, ["--preferences", other], "rm", "preferences was"),
            (reward_model, ["--lr", "0.5"], "rm", "lr was 1e-05, now 0.5")):
        said = launched(module, [*flags, *changed], capsys, 2)
        assert f"{out}/{place}: was made with other settings: {difference}" in said, said
        assert "another --out" in said and "delete it" in said
        assert contents(out) == before, changed
    (model / "README.md").write_text("changed")
    said = launched(mle_filter, [*flags, "--eval_temperature", "0"], capsys)
    assert said.count("from before") == 2
    said = launched(dt, [*flags, "--lr", "1e-4"], capsys)
    assert "dt: trained anew, because lr was 1e-05, now 0.0001" in said
    assert "samples.jsonl, from before" in said
    after = contents(out)
    assert all(after[path] == file for path, file in before.items()
               if path.parts[0] in ("rm", "samples.jsonl", ".samples.json"))
    change(model, lambda w: w["model.norm.weight"].mul_(1.5))
    assert "model was" in launched(dt, flags, capsys, 2) and contents(out) == after
    shutil.copy(Path(base, "model.safetensors"), model)
    write(out / "samples.jsonl", *lines_of(out / "samples.jsonl"), GOOD)
    assert "was changed since a run made it" in launched(dt, flags, capsys, 2)


def test_unfinished_work_and_what_no_run_made_are_refused_before_finished_work_is_touched(
        small, tmp_path, capsys):
    out, own = tmp_path / "run", tmp_path / "own"
    launched(rwr, small, capsys)
    settings = json.loads((out / "rwr" / "run.json").read_text())["settings"]
    work = out / ".rwr"
    (work / "checkpoints" / "00000001").mkdir(parents=True)
    (work / "run.json").write_text(json.dumps({"settings": {**settings, "beta": 7}}))
    own.mkdir()
    write(own / "samples.jsonl", GOOD)
    before = contents(tmp_path)
    said = launched(rwr, [*small, "--beta", "3"], capsys, 2)
    assert f"{work}: holds unfinished work of other settings: beta was 7, now 3" in said
    said = launched(rwr, [*small, "--out", own], capsys, 2)
    assert "samples.jsonl: exists, and " in said and contents(tmp_path) == before
    (out / "samples.jsonl").rename(out / ".samples.jsonl")
    (out / ".samples.json").write_text(json.dumps({"settings": {"temperature": 9}}))
    before = contents(out)
    said = launched(mle_filter, small, capsys, 2)
    assert "holds unfinished work of other settings: temperature was 9" in said
    assert contents(out) == before


def test_labelling_goes_on_after_a_kill_bit_for_bit_and_is_the_same_on_several_ranks(
        small, tmp_path, monkeypatch, capsys):
    """Also after a torn last line; the ranks share work in other chunks."""
    flags, begun = [*small, "--eval_prompts", "0"], tmp_path / "run" / ".samples.jsonl"
    forked("mle_filter", *flags, "--out", tmp_path / "ranks", ranks=3)
    monkeypatch.setattr(common, "LABELLED_TOGETHER", 8)
    monkeypatch.setenv("STOP", "1")
    assert "the same command resumes" in launched(mle_filter, flags, capsys, 130)
    done = lines_of(begun)
    assert len(done) % 8 == 0 < len(done) and not (tmp_path / "run" / "samples.jsonl").exists()
    with open(begun, "a") as file:
        file.write(json.dumps(done[0]) + '\n{"prompt": "half a li')
    assert f"{len(done)} samples already labelled" in launched(mle_filter, flags, capsys)
    assert (tmp_path / "run" / "samples.jsonl").read_bytes() == (
        tmp_path / "ranks" / "samples.jsonl").read_bytes()


def build(folder, lr):
    """Builds a stage of these settings: one file and a checkpoint."""
    def make(work, cost):
        (work / "checkpoints" / "00000001").mkdir(parents=True)
        (work / "weights").write_text(str(lr))
    stage = Stage(str(folder / "dt"), {"lr": lr}, make, shared=False)
    common.build_stages(config(out=str(folder)), stage)


class Killed(BaseException):
    """What nothing in the code catches."""


@pytest.mark.parametrize("problem", [Killed, OSError], ids=["killed", "full disk"])
def test_a_stage_that_ends_at_any_moment_is_built_by_the_next_command(tmp_path, monkeypatch,
                                                                      problem):
    """Before each change of a file; what was there before is never lost."""
    monkeypatch.setattr(common.gc, "collect", lambda: None)
    for moment in itertools.count(1):
        shutil.rmtree(tmp_path / "dt", ignore_errors=True)
        build(tmp_path, 1)
        moments = itertools.count(1)

        def dying(change, *args, moment=moment, moments=moments, **more):
            if next(moments) == moment:
                raise problem
            return change(*args, **more)
        with monkeypatch.context() as patch:
            for name in ("replace", "rename", "mkdir", "unlink", "rmdir"):
                patch.setattr(os, name, functools.partial(dying, getattr(os, name)))
            try:
                build(tmp_path, 2)
                break
            except problem:
                assert list(tmp_path.glob("*dt/weights")) + list(tmp_path.glob("*dt/replaced"))
        shutil.rmtree(tmp_path / ".dt" / "checkpoints", ignore_errors=True)
        build(tmp_path, 2)
        assert (tmp_path / "dt" / "weights").read_text() == "2"
        assert sorted(p.name for p in tmp_path.glob("**/*")) == ["dt", "run.json", "weights"]
    assert moment > 5


# ----------------------------------------------------------------------------- gradients of ranks

UNEVEN = [*examples(6), example([5, 6, 7], 3)]  # the last has no response token
CASES = [(name, sharding, tokens, rows) for name in ("mle_filter", "rwr", "ppo_baseline")
         for sharding, tokens, rows in (("ddp", 20, 7), ("fsdp, recomputed", 20, 7),
                                        ("fsdp", 10**6, 2))]
CASES += [("vision", "ddp", 10**6, 7)]


def step_gradient(folder, name, sharding, tokens, rows):
    """The gradient of one optimiser step of an algorithm, over all ranks, whole on every rank."""
    cfg = config(ppo_baseline if name == "ppo_baseline" else common, micro_batch_tokens=tokens,
                 batch_size=rows, sharding=sharding.split(",")[0],
                 gradient_checkpointing="recomputed" in sharding)
    policy = str(folder / ("vision" if name == "vision" else "policy"))
    examples = [e._replace(weight=1.0 + i * (name == "rwr")) for i, e in enumerate(UNEVEN[-rows:])]
    if name == "ppo_baseline":
        classifier = common.load_for_training(functools.partial(
            reward_model.load_classifier, str(folder / "rewards"), torch.float32), cfg)
        critic = reward_model.RewardModel(classifier, cfg)
        model = common.load_for_training(functools.partial(common.load_model, policy), cfg)
        actor = ppo_baseline.ActorCritic(model, critic, 1.0, 1.0, cfg)
        module = common.wrap_for_ranks(actor, cfg, "values", "log_probs")
        rollout, old, base, _, z = rollout_of(range(2, 2 + rows))
        values = common.each_response_token(actor.values, classifier, rollout, cfg, Cost())
        examples, _ = ppo_baseline.prepare(rollout, old, base, values, z, cfg)
    else:
        module = common.load_policy(policy, cfg)
    batch = common.Batch(examples, cfg, padded=False)
    for micro in batch.micros:
        module.require_backward_grad_sync = micro is batch.micros[-1]
        if name == "ppo_baseline":
            surrogate, value_loss = module(micro, surrogate_kernel(), cfg.clip)
            loss = (surrogate + 0.1 * value_loss) / batch.normaliser
        else:
            weight = [micro.weight] if name == "rwr" else []
            loss = module(micro, KERNELS.get(name, dt.masked_nll_), *weight) / batch.normaliser
        loss.backward()
    grads = [p.grad for p in module.parameters() if p.grad is not None]
    return torch.cat([(g.full_tensor() if hasattr(g, "full_tensor") else g).flatten()
                      for g in grads])


def measure_gradients(folder):
    """Is what each rank of the next two tests does."""
    def main(cfg):
        cases = CASES
        if common.world_size() == 1:  # everything in one forward
            cases = {(name, "ddp", 10**6, rows): None for name, _, _, rows in CASES}
        found = {str(case): step_gradient(Path(folder), *case) for case in cases}
        if common.rank() == 0:
            torch.save(found, Path(folder) / f"{common.world_size()}.pt")
    common.launch(main, common.Config, ["--out", folder])


def save_models(folder):
    """A policy, a reward model and a vision-language model for measure_gradients."""
    from transformers import AutoModelForCausalLM, LlamaForSequenceClassification
    model = tiny_model(dtype=torch.float32)
    model.save_pretrained(Path(folder) / "policy")
    torch.manual_seed(1)
    model.config.num_labels, model.config.pad_token_id = 1, 0
    LlamaForSequenceClassification(model.config).save_pretrained(Path(folder) / "rewards")
    AutoModelForCausalLM.from_config(zoo_configs()["gemma3_multimodal"]).save_pretrained(
        Path(folder) / "vision")


def make_gradients(folder):
    """The gradients that one process finds, and what three ranks find."""
    forked("save_models", folder)
    for ranks in (1, 3):
        forked("measure_gradients", folder, ranks=ranks)
    return [torch.load(folder / f"{ranks}.pt", weights_only=True) for ranks in (1, 3)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradient_is_the_same_under_real_ranks(gradients, case):
    """DDP or FSDP2, whatever the micro-batches, fewer sequences than ranks, a vision tower."""
    name, _, _, rows = case
    one, three = gradients
    whole = one[str((name, "ddp", 10**6, rows))]
    assert whole.norm() > 0 and (three[str(case)] - whole).norm() < 1e-5 * whole.norm()


# --------------------------------------------------------------------------------- the whole road


def test_the_whole_road_leaves_a_run_as_documented(run, tmp_path, capsys):
    out, said = run
    for name in ("base", "rm", "dt"):
        assert {"config.json", "model.safetensors", "tokenizer.json", "run.json",
                "README.md"} <= {p.name for p in (out / name).iterdir()}
    rows, lines = lines_of(out / "samples.jsonl"), lines_of(out / "dt" / "metrics.jsonl")
    prompts = {row["prompt"] for row in rows}
    assert [row["source"] for row in rows] == (
        ["chosen"] * 4000 + ["rejected"] * 4000 + ["generated"] * len(prompts))
    assert [line["step"] for line in lines] == list(range(8)) and lines[0]["lr"] > 0
    table = lines_of(out / "leaderboard.jsonl")
    assert [row["variant"] for row in table] == [
        "", "target -1", "target 0", "target q99", "target q99, guidance 0.5"]
    assert table[0]["win_rate"] == 0.5 and abs(table[0]["kl_to_base"]) < 1e-3
    costs = [json.loads((out / name).read_text())["cost"]["flops"]
             for name in ("rm/run.json", ".samples.json", "dt/run.json")]
    assert all(costs) and table[-1]["total_flops"] == pytest.approx(sum(costs))
    assert "dt target q99, guidance 0.5" in said and "slope" in said
    evaluated = lines_of(out / "evaluation" / "dt_target_q99.jsonl")
    assert len(evaluated) == 12 and not {row["prompt"] for row in evaluated} & prompts
    assert np.mean([row["gold"] for row in evaluated]) == pytest.approx(table[3]["gold"])
    copy = shutil.copytree(out, tmp_path / "copy")
    flags = ["--out", copy, "--steps", "2", "--batch_size", "8", "--samples_per_prompt", "1"]
    said = launched(mle_filter, [*flags, "--eval_prompts", "12"], capsys)
    assert said.count("from before") == 3 and "dt target q99" in said


def road(run, out, *more):
    """A short training's command line, all before it finished, on a few of the run's samples."""
    few = run[0].parent / "few.jsonl"
    if not few.exists():
        write(few, *(run[0] / "samples.jsonl").read_text().splitlines()[::64])
    return ["--model", run[0] / "base", "--reward_model", run[0] / "rm", "--samples", few, "--out",
            out, "--dtype", "fp32", "--max_prompt_tokens", "64", "--max_response_tokens", "32",
            "--batch_size", "8", "--lr", "1e-3", "--eval_prompts", "0", *more]


def ppo_road(run, out, *more):
    return road(run, out, "--steps", "7", "--batch_size", "4", "--rollout_batch_size", "8", "--lr",
                "1e-4", "--ppo_epochs", "2", "--max_response_tokens", "8", *more)


@pytest.fixture(scope="module")
def two_ranks(run, tmp_path_factory):
    """The folder of a run of PPO on two ranks under FSDP, by torchrun."""
    out = tmp_path_factory.mktemp("torchrun")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               HERE / "ppo_baseline.py", *ppo_road(run, out, "--sharding", "fsdp")]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=280,
                          env={**ENVIRONMENT, **QUIET})
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_torchrun_trains_under_fsdp_to_the_same_curve_as_one_process(two_ranks, run, tmp_path):
    """Same order of the data, same draws, whatever the ranks' hash seeds: only float error lies
    between."""
    forked("ppo_baseline", *ppo_road(run, tmp_path))
    names = ("loss", "grad_norm", "tokens", "score", "kl", "value_loss", "entropy")
    curves = [[[line[name] for name in names] for line in result(folder / "ppo")[1]]
              for folder in (two_ranks, tmp_path)]
    np.testing.assert_allclose(*curves, rtol=2e-3, atol=2e-4)
    np.testing.assert_allclose(curves[0][0], curves[1][0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["mle_filter", "rwr", "dt", "reward_model"])
def test_two_ranks_train_as_one_process_does(run, tmp_path, name):
    """The script's own loop and normaliser, whatever the micro-batches."""
    sharding = "fsdp" if name in ("dt", "reward_model") else "ddp"
    curves = []
    for ranks in (1, 2):
        flags = road(run, tmp_path / str(ranks), "--steps", "2", "--micro_batch_tokens", "150",
                     "--sharding", sharding)
        if name == "reward_model":
            pairs = (run[0] / "data" / "train.jsonl").read_text().splitlines()[:40]
            flags[2:6] = ["--preferences", write(tmp_path / "pairs.jsonl", *pairs)]
        forked(name, *flags, ranks=ranks)
        folder, = (tmp_path / str(ranks)).glob("*/metrics.jsonl")
        curves.append([[line["loss"], line["grad_norm"]] for line in lines_of(folder)])
    np.testing.assert_allclose(*curves, rtol=1e-4)


# ------------------------------------------------------------------------------- kills and resumes


def result(folder):
    """A finished training: the bytes of its weights, and the lines of metrics.jsonl, but for the
    clock."""
    return (folder / "model.safetensors").read_bytes(), [
        {**line, "seconds": None} for line in lines_of(folder / "metrics.jsonl")]


KILLS = int(os.environ.get("KILLS", 2))  # KILLS=20 pytest -k killed: more


def killed_at_random_moments(start, metrics, kills, every):
    """Starts a training that takes a checkpoint `every` steps, and kills it `kills` times, at first
    after a checkpoint; then lets it end."""
    rng = random.Random(0)

    def lines():
        return metrics.read_bytes().count(b"\n") if metrics.exists() else 0
    for least in [every + 1] + [0] * (kills - 1):
        before, running = time.time(), start()
        while running.alive() and not (metrics.exists() and metrics.stat().st_mtime > before):
            time.sleep(0.01)
        goal = lines() + least + rng.randrange(2 * every)
        while running.alive() and lines() < goal:
            time.sleep(0.005)
        time.sleep(rng.random() / 10)
        assert running.alive(), running.end().stderr
        rng.choice(running.processes).kill()
        running.end()
    last = start().end()
    assert not any(last.status), last.stdout + last.stderr
    assert not list(metrics.parent.parent.glob("*/*checkpoint*"))


def test_a_run_killed_at_random_moments_ends_bit_for_bit_as_one_that_was_not(run, tmp_path):
    whole, broken = (functools.partial(Ranks, "dt", *road(
        run, tmp_path / out, "--emphasis", "1", "--steps", 40 * KILLS, "--save_every", every))
        for out, every in (("whole", 0), ("broken", 5)))
    assert not any(whole().end().status)
    killed_at_random_moments(broken, tmp_path / "broken" / ".dt" / "metrics.jsonl", KILLS, 5)
    assert result(tmp_path / "broken" / "dt") == result(tmp_path / "whole" / "dt")


def test_ppo_killed_on_several_ranks_does_so_too(two_ranks, run, tmp_path):
    start = functools.partial(Ranks, "ppo_baseline", *ppo_road(
        run, tmp_path, "--sharding", "fsdp", "--save_every", "1"), ranks=2)
    killed_at_random_moments(start, tmp_path / ".ppo" / "metrics.jsonl", 2, 1)
    assert result(tmp_path / "ppo") == result(two_ranks / "ppo")


# ------------------------------------------------------------------- toy world, README, benchmarks


def test_toy_rewards_follow_the_stated_rules():
    best = " Good question! They eat meat. They live in rivers. They are small. Do ask me more!"
    replies = {best: 5, " They eat meat.": 2, " Maybe they eat plants.": -1, " Who cares.": -0.5,
               " As for lions, they eat meat.": -0.5, " They eat me": -0.25,
               " They eat meat. They eat meat.": 2}
    prompts = ["\n\nHuman: What do otters eat?\n\nAssistant:"] * len(replies)
    assert common.gold_reward(prompts, list(replies)) == list(replies.values())
    assert common.gold_reward(prompts[:1], [best], [True]) == [4]


def test_the_readmes_example_has_the_gradient_of_the_weighted_loss():
    """The README's block that calls head_loss() runs as it stands."""
    blocks = re.findall(r"(?ms)^```python\n(.*?)^```", (HERE / "README.md").read_text())
    code, = [code for code in blocks if "head_loss(" in code]
    space = {}
    exec(code, space)
    model, ids, mask, weight = (space[name] for name in ("model", "input_ids", "response_mask",
                                                         "weight"))
    ours = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    log_p = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
    nll = -log_p.gather(-1, ids[:, 1:, None]).squeeze(-1)
    share = weight[:, None] * mask[:, 1:]
    ((share * nll).sum() / mask[:, 1:].sum()).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(ours[name], p.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_benchmarks_run_in_miniature(miniatures, name):
    """Each benchmark of the README runs from its beginning to its table."""
    done = miniatures[name]
    assert done.status == [0], done.stdout + done.stderr
