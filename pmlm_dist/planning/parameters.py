"""Parameters of the model: the shape of each, and its elements on a tensor-parallel rank."""

import math
import re
from dataclasses import replace
from functools import lru_cache

from pmlm_dist.config import ModelConfig
from pmlm_dist.planning.workload import Workload

TOKENS, POSITIONS, SEGMENTS = (f"embeddings.{table}.weight" for table in ("token", "position", "segment"))
RELATIVE_BIAS, HEAD_BIAS = "relative_bias.weight", "head.bias"
_REPLICATED = re.compile(r"norm\.|\.position\.|\.segment\.|head\.dense\.|(attention\.output|ffn_out)\.bias")
"""Names of parameters that tensor parallelism does not shard: each rank holds all of them."""


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the full shape of every parameter by name, without the rows that pad the vocabulary."""
    size, inner = config.hidden_size, config.ffn_size
    assert config.vocab_size is not None
    shapes = {
        TOKENS: (config.vocab_size, size),
        POSITIONS: (config.max_positions, size),
        SEGMENTS: (config.segment_types, size),
        **_module("embeddings.norm", size),
        **_module("head.dense", size, size),
        **_module("head.norm", size),
        HEAD_BIAS: (config.vocab_size,),
    }
    if config.relative_bias:
        shapes[RELATIVE_BIAS] = (config.num_heads, config.relative_buckets)
    for layer in (f"layers.{index}" for index in range(config.num_layers)):
        shapes |= _module(f"{layer}.attention.query", size, size)
        shapes |= _module(f"{layer}.attention.key_value", 2 * size, size)
        shapes |= _module(f"{layer}.attention.output", size, size)
        shapes |= _module(f"{layer}.ffn_in", inner, size) | _module(f"{layer}.ffn_out", size, inner)
        shapes |= _module(f"{layer}.attention_norm", size) | _module(f"{layer}.ffn_norm", size)
    return shapes


def _module(name: str, *weight: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": weight, f"{name}.bias": weight[:1]}


def rank_parameters(work: Workload, *parts: str) -> int:
    """Parameters of a rank, including the rows that pad the vocabulary; with `parts`, of names that start with one."""
    return sum(count for name, count in _rank_elements(work).items() if name.startswith(parts or ("",)))


def total_parameters(work: Workload) -> int:
    """Parameters of the whole model, including the rows that pad the vocabulary."""
    return rank_parameters(replace(work, tp=1))


def largest_tensor(work: Workload) -> int:
    """Elements of the largest parameter of a rank."""
    return max(_rank_elements(work).values())


def persistent_numbers(work: Workload, *, threshold: int) -> int:
    """Elements in parameters of at most `threshold` elements a rank, which ZeRO-3 does not partition.

    DeepSpeed calls them persistent (`stage3_param_persistence_threshold`).
    """
    return sum(count for count in _rank_elements(work).values() if count <= threshold)


def _rank_elements(work: Workload) -> dict[str, int]:
    return _elements(replace(work.model, vocab_size=work.padded_vocabulary), work.tp)


@lru_cache(maxsize=64)
def _elements(model: ModelConfig, tp: int) -> dict[str, int]:
    """Elements of each parameter on one of `tp` ranks, by name."""
    shapes = parameter_shapes(model)
    return {name: math.prod(shape) // (1 if _REPLICATED.search(name) else tp) for name, shape in shapes.items()}
