"""Our tensors and those of other post-LN Transformers: renaming, and taking queries, keys and values apart (pure).

    ours, E hidden size                     BERT, MPNet                          UniLM
    layers.I.attention.query      [E, E]    query [E, E]                         qkv_linear [3E, E]: query | key | value
    layers.I.attention.key_value  [2E, E]   key, value [E, E]
      rows: head, key | value, head size

Whatever is read is taken by name and shape; what is missing, of another shape or left over is a problem, and all of
them are told at once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from pmlm_dist.config import ModelConfig, raise_if_any

Tensors = dict[str, Tensor]

TOKENS, POSITIONS, SEGMENTS = (f"embeddings.{table}.weight" for table in ("token", "position", "segment"))
RELATIVE_BIAS, HEAD_BIAS = "relative_bias.weight", "head.bias"


@dataclass(frozen=True)
class NameScheme:
    """Where another implementation keeps what both have alike; `{}` stands for the layer.

    `encoder` and `head`: own module -> its module, each with a weight and a bias. `attention`: query, key and value.
    """

    prefix: str
    encoder: dict[str, str]
    head: dict[str, str]
    attention: dict[str, str]


def own_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of the model by name, whole and without rows that pad the vocabulary."""
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
    for layer in (f"layers.{number}" for number in range(config.num_layers)):
        shapes |= _module(f"{layer}.attention.query", size, size)
        shapes |= _module(f"{layer}.attention.key_value", 2 * size, size)
        shapes |= _module(f"{layer}.attention.output", size, size)
        shapes |= _module(f"{layer}.ffn_in", inner, size) | _module(f"{layer}.ffn_out", size, inner)
        shapes |= _module(f"{layer}.attention_norm", size) | _module(f"{layer}.ffn_norm", size)
    return shapes


def _module(name: str, *weight: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": weight, f"{name}.bias": weight[:1]}


# ------------------------------------------------------------------------------------------------------------ to others


def to_scheme(weights: Tensors, dialect: NameScheme, config: ModelConfig) -> Tensors:
    """What the dialect has alike, under its names: all but the embedding tables and the head's bias."""
    found = {other: weights[own] for own, other in _renamed(dialect.encoder | dialect.head, config)}
    for number in range(config.num_layers):
        for kind in ("weight", "bias"):
            attention = f"layers.{number}.attention"
            key, value = split_key_value(weights[f"{attention}.key_value.{kind}"], config)
            parts = {"query": weights[f"{attention}.query.{kind}"], "key": key, "value": value}
            found |= {f"{dialect.attention[part].format(number)}.{kind}": tensor for part, tensor in parts.items()}
    return {name: tensor.contiguous() for name, tensor in found.items()}


def split_key_value(both: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Keys and values [E, ...] of [2E, ...], which has them in turn by head."""
    by_head = both.unflatten(0, (config.num_heads, 2, config.head_dim))
    return by_head[:, 0].flatten(0, 1), by_head[:, 1].flatten(0, 1)


def join_key_value(key: Tensor, value: Tensor, config: ModelConfig) -> Tensor:
    """The inverse of `split_key_value`."""
    by_head = [part.unflatten(0, (config.num_heads, config.head_dim)) for part in (key, value)]
    return torch.stack(by_head, dim=1).flatten(0, 2)


def _renamed(modules: dict[str, str], config: ModelConfig) -> Iterable[tuple[str, str]]:
    for own, other in modules.items():
        for number in range(config.num_layers if "{}" in own else 1):
            for kind in ("weight", "bias"):
                yield f"{own.format(number)}.{kind}", f"{other.format(number)}.{kind}"


# ---------------------------------------------------------------------------------------------------------- from others


class StrictTensors:
    """Somebody else's tensors, each to be taken once."""

    def __init__(self, tensors: Tensors, *, origin: str):
        self._left, self._origin = dict(tensors), origin
        self._missing: list[str] = []
        self._problems: list[str] = []

    def has(self, start: str) -> bool:
        """Whether a name that is left starts with `start`."""
        return any(name.startswith(start) for name in self._left)

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The tensor in fp32; zeros, and a problem to be told later, where it is missing or not of `shape`."""
        found = self._left.pop(name, None)
        if found is None:
            self._missing.append(f"{name} {list(shape)}")
        elif not found.is_floating_point():
            self._problems.append(f"{self._origin}: {name} holds {found.dtype}, not floating point numbers")
        elif tuple(found.shape) != shape:
            self._problems.append(
                f"{self._origin}: {name} has shape {list(found.shape)}, its configuration says {list(shape)}"
            )
        else:
            return found.float().contiguous()
        return torch.zeros(shape)

    def drop(self, *names: str) -> list[str]:
        """Leave out tensors that the model has no place for; those that were there."""
        return [name for name in names if self._left.pop(name, None) is not None]

    def drop_copy(self, name: str, original: Tensor) -> None:
        """Leave out a tensor that only repeats `original`; one that does not is a problem."""
        found = self._left.pop(name, None)
        if found is not None and not torch.equal(found.float(), original):
            self._problems.append(f"{self._origin}: {name} is not tied to what it should repeat; this model ties them")

    def finish(self) -> None:
        """Raise one `ConfigError` with everything that did not fit."""
        found = list(self._problems)
        if self._missing:
            found.append(f"{self._origin} lacks tensors: {', '.join(self._missing)}")
        if self._left:
            found.append(
                f"{self._origin} has tensors that this model has no place for: {', '.join(sorted(self._left))}"
            )
        raise_if_any(found)


def from_scheme(source: StrictTensors, modules: dict[str, str], config: ModelConfig) -> Tensors:
    """Own tensors of the `modules` (own -> its) of a dialect."""
    shapes = own_shapes(config)
    return {own: source.take(other, shapes[own]) for own, other in _renamed(modules, config)}


def attention_from_scheme(source: StrictTensors, dialect: NameScheme, config: ModelConfig) -> Tensors:
    """Own queries, keys and values of all layers."""
    found, size = {}, config.hidden_size
    for number in range(config.num_layers):
        for kind, shape in (("weight", (size, size)), ("bias", (size,))):
            query, key, value = (
                source.take(f"{dialect.attention[part].format(number)}.{kind}", shape)
                for part in ("query", "key", "value")
            )
            found[f"layers.{number}.attention.query.{kind}"] = query
            found[f"layers.{number}.attention.key_value.{kind}"] = join_key_value(key, value, config)
    return found


def initial_head(config: ModelConfig) -> Tensors:
    """A head for a checkpoint without one, drawn as the model draws it, from a fixed seed."""
    size, generator = config.hidden_size, torch.Generator().manual_seed(0)
    assert config.vocab_size is not None
    return {
        "head.dense.weight": config.initializer_range * torch.randn(size, size, generator=generator),
        "head.dense.bias": torch.zeros(size),
        "head.norm.weight": torch.ones(size),
        "head.norm.bias": torch.zeros(size),
        HEAD_BIAS: torch.zeros(config.vocab_size),
    }
