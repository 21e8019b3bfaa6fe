"""Tensors of this model and of other post-LN Transformers: renaming, and splitting of queries, keys and values (pure).

    this model, E hidden size               BERT, MPNet                          UniLM
    layers.I.attention.query      [E, E]    query [E, E]                         qkv_linear [3E, E]: query | key | value
    layers.I.attention.key_value  [2E, E]   key, value [E, E]
      rows: head, key | value, head size

Tensors are read by name and shape. All missing, unknown and mismatched ones are reported in one error.
"""

import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pmlm_dist.config import ConfigError, ModelConfig, raise_if_any
from pmlm_dist.planning.parameters import HEAD_BIAS, POSITIONS, TOKENS, parameter_shapes

Tensors = dict[str, Tensor]

_INNER_WRAPPERS = "_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module"
"""Parts of names that torch.compile, FSDP and activation checkpointing add, around any module of a model."""
_WRAPPERS = re.compile(rf"^(?:(?:module|model|{_INNER_WRAPPERS})\.)+|(?<=\.)(?:{_INNER_WRAPPERS})\.")
"""Also `module.` and `model.`, which DistributedDataParallel and training frameworks put before names."""

_MODELS = ("bert", "mpnet")


NEW_HEAD_NOTE = "the checkpoint has no masked-LM head: head.dense is newly initialized, its biases are zero"


@dataclass(frozen=True)
class NameScheme:
    """Names of another implementation; `{}` stands for the layer index.

    `encoder` and `head`: our module -> theirs, each with a weight and a bias. `attention`: query, key and value.
    `decoder`: the head's copy of the tied tensors. `dropped`: modules without a counterpart in this model.
    """

    prefix: str
    encoder: dict[str, str]
    attention: dict[str, str]
    head: dict[str, str]
    head_bias: str
    decoder: str
    dropped: tuple[str, ...]

    @property
    def tokens(self) -> str:
        return f"{self.prefix}embeddings.word_embeddings.weight"

    @property
    def positions(self) -> str:
        return f"{self.prefix}embeddings.position_embeddings.weight"


def short_list(names: Sequence[str], *, shown: int = 4) -> str:
    """Return the first names and the number of the others, for a message."""
    more = f" and {len(names) - shown:,} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def without_wrappers(tensors: Tensors, *, origin: str) -> tuple[Tensors, list[str]]:
    """Return `tensors` without the parts of their names that wrappers of the model added, and a note if there are any.

    Raises `ConfigError` if two tensors have the same name without them.
    """
    first = _common_beginning(tensors)
    names = {name: _WRAPPERS.sub("", name.removeprefix(first)) for name in tensors}
    plain = {names[name]: tensor for name, tensor in tensors.items()}
    parts = sorted({part for name in tensors for part in _WRAPPERS.findall(name.removeprefix(first))} | {first} - {""})
    if len(plain) < len(tensors):
        raise ConfigError([f"{origin}: tensors have the same name without {short_list(parts)}: save one model alone"])
    note = f"names of tensors are read without {short_list(parts)}, which wrappers of the model added"
    return plain, [note] if parts else []


def _common_beginning(names: Iterable[str]) -> str:
    """Return what all names have before the model's own, such as `net.`: the name of a field that held the model."""
    levels = zip(*(name.split(".")[:-1] for name in names), strict=False)
    common = itertools.takewhile(lambda parts: len(set(parts)) == 1 and parts[0] not in _MODELS, levels)
    return "".join(f"{parts[0]}." for parts in common)


def split_key_value(key_value: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Split [2E, ...] into keys and values [E, ...]; rows of the input alternate between the two by head."""
    by_head = key_value.unflatten(0, (config.num_heads, 2, config.head_dim))
    return by_head[:, 0].flatten(0, 1), by_head[:, 1].flatten(0, 1)


def join_key_value(key: Tensor, value: Tensor, config: ModelConfig) -> Tensor:
    """Join keys and values; the inverse of `split_key_value`."""
    # By head, so that tensor parallelism can split the rows between heads in one contiguous block per rank.
    by_head = [part.unflatten(0, (config.num_heads, config.head_dim)) for part in (key, value)]
    return torch.stack(by_head, dim=1).flatten(0, 2)


def _renamed(modules: dict[str, str], config: ModelConfig) -> Iterable[tuple[str, str]]:
    """Yield (our name, their name) of every parameter of `modules`."""
    for ours, theirs in modules.items():
        for index in range(config.num_layers if "{}" in ours else 1):
            for kind in ("weight", "bias"):
                yield f"{ours.format(index)}.{kind}", f"{theirs.format(index)}.{kind}"


# -------------------------------------------------------------------------------------------------------------- export


def to_scheme(weights: Tensors, scheme: NameScheme, config: ModelConfig) -> Tensors:
    """Return the parameters under the names of `scheme`: all but positions, segments and relative position bias."""
    tensors = {scheme.tokens: weights[TOKENS], scheme.head_bias: weights[HEAD_BIAS]}
    tensors |= {theirs: weights[ours] for ours, theirs in _renamed(scheme.encoder | scheme.head, config)}
    for index in range(config.num_layers):
        for kind in ("weight", "bias"):
            attention = f"layers.{index}.attention"
            key, value = split_key_value(weights[f"{attention}.key_value.{kind}"], config)
            parts = {"query": weights[f"{attention}.query.{kind}"], "key": key, "value": value}
            tensors |= {f"{scheme.attention[part].format(index)}.{kind}": tensor for part, tensor in parts.items()}
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


# -------------------------------------------------------------------------------------------------------------- import


class StrictTensors:
    """Tensors of another implementation, each to be taken or dropped exactly once."""

    def __init__(self, tensors: Tensors, *, origin: str):
        self._remaining, self._origin = dict(tensors), origin
        self._missing: list[str] = []
        self._problems: list[str] = []
        self._different: list[str] = []
        self._padded: dict[str, int] = {}

    def has(self, prefix: str) -> bool:
        return any(name.startswith(prefix) for name in self._remaining)

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Return a tensor in fp32; if it is missing or does not have `shape`, record a problem and return zeros."""
        tensor = self._remaining.pop(name, None)
        if tensor is None:
            self._missing.append(f"{name} {list(shape)}")
        elif not tensor.is_floating_point():
            self._different.append(f"{name} has type {tensor.dtype}, which is not floating point")
        elif tuple(tensor.shape) != shape:
            self._different.append(f"{name} has shape {list(tensor.shape)}, its configuration requires {list(shape)}")
        else:
            return tensor.float().contiguous()
        return torch.zeros(shape)

    def take_token_rows(self, name: str, tokens: int, *columns: int) -> Tensor:
        """Return the rows [tokens, *columns] of a tensor with a row for each token; further rows are left out.

        Embeddings are often padded to a multiple of 8 or more. `padding_notes` reports it; fewer rows are a problem.
        """
        tensor = self._remaining.get(name)
        rows = tensor.shape[0] if tensor is not None and tensor.dim() else tokens
        if rows < tokens:
            self._problems.append(
                f"{self._origin}: {name} has {rows:,} rows, but there are {tokens:,} tokens; put the tokenizer of "
                "these weights beside them"
            )
            del self._remaining[name]
            return torch.zeros(tokens, *columns)
        if rows > tokens:
            self._padded[name] = rows - tokens
        return self.take(name, (rows, *columns))[:tokens]

    def padding_notes(self) -> list[str]:
        """Return a note on the rows that `take_token_rows` has left out, if there are any."""
        if not self._padded:
            return []
        names, rows = short_list(list(self._padded)), max(self._padded.values())
        return [f"rows beyond the tokens stand for no token and are left out: the last {rows:,} of {names}"]

    def drop(self, *names: str) -> list[str]:
        """Drop tensors without a counterpart in this model; return the names that existed."""
        return [name for name in names if self._remaining.pop(name, None) is not None]

    def drop_tied(self, name: str, original: Tensor) -> None:
        """Drop a copy of the tied tensor `original`; record a problem if it differs."""
        copy = self._remaining.pop(name, None)
        if copy is not None and not torch.equal(copy[: len(original)].float(), original):
            self._problems.append(
                f"{self._origin}: {name} is not tied to its counterpart; this model requires tied weights"
            )

    def finish(self) -> None:
        """Raise one `ConfigError` for all recorded problems, missing and unknown tensors."""
        problems = list(self._problems)
        if self._different:
            problems.append(f"{self._origin}: {short_list(self._different, shown=2)}")
        if self._missing:
            problems.append(f"{self._origin}: missing tensors: {short_list(self._missing)}")
        if self._remaining:
            problems.append(
                f"{self._origin}: tensors without a counterpart in this model: {short_list(sorted(self._remaining))}"
            )
        raise_if_any(problems)


def from_scheme(
    source: StrictTensors, scheme: NameScheme, config: ModelConfig, *, first_position: int = 0
) -> tuple[Tensors, list[str]]:
    """Take all parameters but segments and relative position bias; return them with notes on dropped and new ones.

    `first_position`: row of the first position. A missing head is newly initialized.
    """
    rows, size = config.vocab_size, config.hidden_size
    assert rows is not None
    positions = source.take(scheme.positions, (config.max_positions + first_position, size))
    weights = {
        TOKENS: source.take_token_rows(scheme.tokens, rows, size),
        POSITIONS: positions[first_position:].contiguous(),
        **_modules_from(source, scheme.encoder, config),
        **_attention_from(source, scheme, config),
    }
    source.drop(f"{scheme.prefix}embeddings.position_ids")  # an index buffer in old files
    dropped = source.drop(*(f"{module}.{kind}" for module in scheme.dropped for kind in ("weight", "bias")))
    notes = [f"dropped, no counterpart in this model: {short_list(dropped)}"] if dropped else []
    if not source.has(scheme.head_bias.partition(".")[0] + "."):
        return weights | _initial_head(config), [*notes, *source.padding_notes(), NEW_HEAD_NOTE]
    weights |= _modules_from(source, scheme.head, config)
    weights[HEAD_BIAS] = source.take_token_rows(scheme.head_bias, rows)
    source.drop_tied(f"{scheme.decoder}.weight", weights[TOKENS])
    source.drop_tied(f"{scheme.decoder}.bias", weights[HEAD_BIAS])
    return weights, [*notes, *source.padding_notes()]


def _modules_from(source: StrictTensors, modules: dict[str, str], config: ModelConfig) -> Tensors:
    shapes = parameter_shapes(config)
    return {ours: source.take(theirs, shapes[ours]) for ours, theirs in _renamed(modules, config)}


def _attention_from(source: StrictTensors, scheme: NameScheme, config: ModelConfig) -> Tensors:
    tensors, size = {}, config.hidden_size
    for index in range(config.num_layers):
        for kind, shape in (("weight", (size, size)), ("bias", (size,))):
            query, key, value = (
                source.take(f"{scheme.attention[part].format(index)}.{kind}", shape)
                for part in ("query", "key", "value")
            )
            tensors[f"layers.{index}.attention.query.{kind}"] = query
            tensors[f"layers.{index}.attention.key_value.{kind}"] = join_key_value(key, value, config)
    return tensors


def _initial_head(config: ModelConfig) -> Tensors:
    """Return a newly initialized head, from the model's distribution and a fixed seed."""
    size, generator = config.hidden_size, torch.Generator().manual_seed(0)
    assert config.vocab_size is not None
    return {
        "head.dense.weight": config.initializer_range * torch.randn(size, size, generator=generator),
        "head.dense.bias": torch.zeros(size),
        "head.norm.weight": torch.ones(size),
        "head.norm.bias": torch.zeros(size),
        HEAD_BIAS: torch.zeros(config.vocab_size),
    }
