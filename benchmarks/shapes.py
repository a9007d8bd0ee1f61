"""Models of random weights and data of random ids: what needs no network and no file."""
from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

import measure  # noqa: F401, finds the scripts

import common
from common import Example, Examples, Tokens

SHAPES = {  # SmolLM2-135M, Llama-3.2-1B, Llama-3-8B, and what --mini takes in their place
    "135M": dict(hidden_size=576, num_hidden_layers=30, num_attention_heads=9, vocab_size=49152,
                 num_key_value_heads=3, intermediate_size=1536, tie_word_embeddings=True),
    "1B": dict(hidden_size=2048, num_hidden_layers=16, num_attention_heads=32, head_dim=64,
               num_key_value_heads=8, intermediate_size=8192, vocab_size=128256,
               tie_word_embeddings=True),
    "8B": dict(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, vocab_size=128256,
               num_key_value_heads=8, intermediate_size=14336, tie_word_embeddings=False),
    "mini": dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=512,
                 num_key_value_heads=2, intermediate_size=128, tie_word_embeddings=True)}


def new_model(shape: dict, dtype: torch.dtype = torch.float32, packing: bool = True,
              classifier: bool = False, **_: Any) -> Any:
    """A Llama of random weights, made where it will compute."""
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification
    kind = LlamaForSequenceClassification if classifier else LlamaForCausalLM
    config = LlamaConfig(**{"max_position_embeddings": 8192, "bos_token_id": None,
                            "eos_token_id": None, "pad_token_id": None,
                            **({"num_labels": 1} if classifier else {}), **shape})
    torch.manual_seed(0)
    with torch.device(common.device()):
        model = kind._from_config(config, dtype=dtype, attn_implementation="sdpa").eval()
    return common.enable_packing(model) if packing else model


def settings(kind: type = common.Config, dtype: str = "bf16", **more: Any) -> Any:
    """A script's Config for models that are in no folder."""
    return kind(model="random", preferences="none", dtype=dtype, steps=None, **more)


def uneven(count: int, low: int, high: int, vocabulary: int) -> list[list[int]]:
    """Sequences of random ids, of random lengths."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, vocabulary, int(n)).tolist()
            for n in rng.integers(low, high + 1, count)]


def labelled(ids: list[list[int]], share: float) -> list[Example]:
    """Sequences whose last `share` is the response."""
    return [Example(np.array(row, dtype=np.int32), np.arange(len(row)) >= (1 - share) * len(row))
            for row in ids]


def on_disk(each: list[Example]) -> Examples:
    """Examples as the trainers read them."""
    folder = tempfile.mkdtemp(prefix="benchmark-")
    return Examples(Tokens(Path(folder), lambda: iter([(e.ids, e.mask) for e in each])))


class Ids:
    """A codec whose texts are ids."""
    stop_ids = [-1]

    def decode(self, response: common.Response) -> list[int]:
        return response.ids

    def pairs(self, prompts: list, responses: list, *_: Any, **__: Any) -> list[tuple]:
        return [(np.array(p + r, dtype=np.int32), None) for p, r in zip(prompts, responses)]
