"""Hugging Face's BERT and MPNet: weights, settings and tokenizer, in both directions.

                          BERT                                 MPNet
    relative bias         none: refused where the model has    [32 buckets, heads], distances up to 128
    segments              the whole table                      none: type 0 is folded into the positions, type 1 is lost
    positions             rows 0, 1, 2, ...                    from row 2 on
    [PAD]                 any id                               id 1, for positions are counted over ids other than 1
    head                  cls.predictions                      lm_head

The weights are renamed and rearranged, never computed with, but for the one sum of positions and segment 0. The only
module that knows `transformers`, and it needs it only to load what was written.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from pmlm_dist.config import ConfigError, ModelConfig, raise_if_any
from pmlm_dist.conversion.files import CONFIG, TOKENIZER, TOKENIZER_CONFIG, WEIGHTS, write_settings
from pmlm_dist.conversion.pretrained import PretrainedWeights
from pmlm_dist.conversion.tensors import (
    HEAD_BIAS,
    POSITIONS,
    RELATIVE_BIAS,
    SEGMENTS,
    TOKENS,
    NameScheme,
    StrictTensors,
    Tensors,
    attention_from_scheme,
    from_scheme,
    initial_head,
    to_scheme,
)
from pmlm_dist.vocab import PAD, SPECIAL_TOKENS, Vocabulary

BERT = NameScheme(
    prefix="bert.",
    encoder={
        "embeddings.norm": "bert.embeddings.LayerNorm",
        "layers.{}.attention.output": "bert.encoder.layer.{}.attention.output.dense",
        "layers.{}.attention_norm": "bert.encoder.layer.{}.attention.output.LayerNorm",
        "layers.{}.ffn_in": "bert.encoder.layer.{}.intermediate.dense",
        "layers.{}.ffn_out": "bert.encoder.layer.{}.output.dense",
        "layers.{}.ffn_norm": "bert.encoder.layer.{}.output.LayerNorm",
    },
    head={"head.dense": "cls.predictions.transform.dense", "head.norm": "cls.predictions.transform.LayerNorm"},
    attention={part: f"bert.encoder.layer.{{}}.attention.self.{part}" for part in ("query", "key", "value")},
)
MPNET = NameScheme(
    prefix="mpnet.",
    encoder={
        "embeddings.norm": "mpnet.embeddings.LayerNorm",
        "layers.{}.attention.output": "mpnet.encoder.layer.{}.attention.attn.o",
        "layers.{}.attention_norm": "mpnet.encoder.layer.{}.attention.LayerNorm",
        "layers.{}.ffn_in": "mpnet.encoder.layer.{}.intermediate.dense",
        "layers.{}.ffn_out": "mpnet.encoder.layer.{}.output.dense",
        "layers.{}.ffn_norm": "mpnet.encoder.layer.{}.output.LayerNorm",
    },
    head={"head.dense": "lm_head.dense", "head.norm": "lm_head.layer_norm"},
    attention={part: f"mpnet.encoder.layer.{{}}.attention.attn.{part[0]}" for part in ("query", "key", "value")},
)
BERT_TOKENS, BERT_POSITIONS, BERT_SEGMENTS = (
    f"bert.embeddings.{table}_embeddings.weight" for table in ("word", "position", "token_type")
)
BERT_BIAS = "cls.predictions.bias"
_MPNET_TOKENS, _MPNET_POSITIONS = (f"mpnet.embeddings.{table}_embeddings.weight" for table in ("word", "position"))
_MPNET_RELATIVE, _MPNET_BIAS = "mpnet.encoder.relative_attention_bias.weight", "lm_head.bias"
_MPNET_PAD = 1
"""The id that MPNet's code counts no position for, whatever its settings say; positions start in the row after it."""
_MPNET_BUCKETS = {"relative_buckets": 32, "relative_max_distance": 128}
"""Constants of its code."""
_SHARED_SETTINGS = {
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "ffn_size": "intermediate_size",
    "hidden_dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob",
    "layer_norm_eps": "layer_norm_eps",
    "initializer_range": "initializer_range",
}


@dataclass(frozen=True)
class Exported:
    """A model as another program has it, and the vocabulary whose ids it takes."""

    settings: dict[str, Any]
    tensors: Tensors
    vocabulary: Vocabulary
    lost: tuple[str, ...] = ()
    """What of the model the format cannot hold, a sentence each."""


# ------------------------------------------------------------------------------------------------------------ to others


def as_bert(pretrained: PretrainedWeights) -> Exported:
    """`BertForMaskedLM`. Raises `ConfigError` for a model with relative position bias."""
    model, weights = pretrained.model, pretrained.weights
    if model.relative_bias:
        raise ConfigError(
            ["BERT has no relative position bias, and this model has one (model.relative_bias): use --format mpnet"]
        )
    settings = {
        "model_type": "bert",
        "architectures": ["BertForMaskedLM"],
        **shared_settings(pretrained),
        "max_position_embeddings": model.max_positions,
        "type_vocab_size": model.segment_types,
        "pad_token_id": pretrained.vocabulary.pad_id,
    }
    return Exported(settings, bert_tensors(weights, model), pretrained.vocabulary)


def bert_tensors(weights: Tensors, model: ModelConfig) -> Tensors:
    """All but the relative position bias under BERT's names."""
    tables = {BERT_TOKENS: TOKENS, BERT_POSITIONS: POSITIONS, BERT_SEGMENTS: SEGMENTS, BERT_BIAS: HEAD_BIAS}
    return {other: weights[own] for other, own in tables.items()} | to_scheme(weights, BERT, model)


def as_mpnet(pretrained: PretrainedWeights) -> Exported:
    """`MPNetForMaskedLM`. Raises `ConfigError` for other buckets of distance than its own.

    A model without relative position bias gets a table of zeros, which computes the same.
    """
    model = pretrained.model
    other = {name: getattr(model, name) for name in _MPNET_BUCKETS if getattr(model, name) != _MPNET_BUCKETS[name]}
    if model.relative_bias and other:
        raise ConfigError(
            [f"MPNet computes with model.{name} {_MPNET_BUCKETS[name]}, this model with {value}: use --format unilm"
             for name, value in other.items()]
        )  # fmt: skip
    moved = pretrained.vocabulary.with_ids_swapped(pretrained.vocabulary.pad_id, _MPNET_PAD)
    renumbered = pretrained.with_vocabulary(moved, origin="MPNet")
    settings = {
        "model_type": "mpnet",
        "architectures": ["MPNetForMaskedLM"],
        **shared_settings(renumbered),
        "max_position_embeddings": model.max_positions + _MPNET_PAD + 1,
        "relative_attention_num_buckets": _MPNET_BUCKETS["relative_buckets"],
        "pad_token_id": _MPNET_PAD,
        "bos_token_id": moved.cls_id,
        "eos_token_id": moved.sep_id,
    }
    return Exported(settings, _mpnet_tensors(renumbered), moved, tuple(_lost_in_mpnet(pretrained, moved)))


def _mpnet_tensors(pretrained: PretrainedWeights) -> Tensors:
    model, weights = pretrained.model, pretrained.weights
    positions = weights[POSITIONS] + weights[SEGMENTS][0]
    before = torch.zeros(_MPNET_PAD + 1, model.hidden_size)
    none = torch.zeros(model.num_heads, _MPNET_BUCKETS["relative_buckets"])
    return {
        _MPNET_TOKENS: weights[TOKENS],
        _MPNET_POSITIONS: torch.cat([before, positions]),
        _MPNET_RELATIVE: weights.get(RELATIVE_BIAS, none).t().contiguous(),
        _MPNET_BIAS: weights[HEAD_BIAS],
    } | to_scheme(weights, MPNET, model)


def _lost_in_mpnet(pretrained: PretrainedWeights, moved: Vocabulary) -> list[str]:
    found = ["MPNet has no segment embeddings: every token is read as of segment 0, the table's other rows are lost."]
    own = pretrained.vocabulary
    if own.pad_id != _MPNET_PAD:
        found.append(
            f"MPNet's code takes id {_MPNET_PAD} for padding: {PAD} (id {own.pad_id} in the corpus) and "
            f"{own.token(_MPNET_PAD)} have each other's ids here, in the tokenizer as in the weights."
        )
    return found


def shared_settings(pretrained: PretrainedWeights) -> dict[str, Any]:
    """What BERT's and MPNet's settings have alike."""
    named = {other: getattr(pretrained.model, own) for own, other in _SHARED_SETTINGS.items()}
    return {**named, "vocab_size": pretrained.model.vocab_size, "hidden_act": "gelu", "tie_word_embeddings": True}


def write_folder(exported: Exported, folder: Path, *, max_positions: int) -> None:
    """Weights, settings and tokenizer, as `from_pretrained` looks for them."""
    save_file(
        {name: tensor.clone().contiguous() for name, tensor in exported.tensors.items()},
        folder / WEIGHTS,
        metadata={"format": "pt"},
    )
    write_settings(folder / CONFIG, {**exported.settings, "dtype": "float32", "torch_dtype": "float32"})
    write_tokenizer(exported, folder, max_positions=max_positions)


def write_tokenizer(exported: Exported, folder: Path, *, max_positions: int) -> None:
    """`tokenizer.json`, `vocab.txt` and what says how to use them."""
    exported.vocabulary.save(folder)
    (folder / TOKENIZER).write_text(exported.vocabulary.exported_json, encoding="utf-8")
    segments = [] if exported.settings["model_type"] == "mpnet" else ["token_type_ids"]
    names = zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL_TOKENS, strict=True)
    settings = {
        **dict(names),
        "tokenizer_class": "PreTrainedTokenizerFast",  # takes tokenizer.json as it is, whatever it does to text
        "model_max_length": max_positions,
        "model_input_names": ["input_ids", *segments, "attention_mask"],
    }
    write_settings(folder / TOKENIZER_CONFIG, settings)


# ---------------------------------------------------------------------------------------------------------- from others


def from_bert(settings: dict[str, Any], tensors: Tensors, vocabulary: Vocabulary, *, origin: str) -> PretrainedWeights:
    """A BERT with or without its masked-LM head. Raises `ConfigError` with everything that does not fit."""
    check_settings(settings, origin)
    model = replace(
        read_settings(settings, origin=origin),
        max_positions=size_setting(settings, "max_position_embeddings", origin),
        segment_types=size_setting(settings, "type_vocab_size", origin),
        relative_bias=False,
    )
    check_vocabulary(model, vocabulary, origin)
    source = StrictTensors(with_prefix(tensors, BERT), origin=origin)
    weights, notes = bert_weights(source, model)
    source.finish()
    return PretrainedWeights(model, weights, vocabulary, {"format": "bert", "from": origin, "notes": notes})


def bert_weights(source: StrictTensors, model: ModelConfig) -> tuple[Tensors, list[str]]:
    """Own tensors, all but the relative position bias, and what there is to know about them."""
    size, rows = model.hidden_size, model.vocab_size
    assert rows is not None
    weights = {
        TOKENS: source.take(BERT_TOKENS, (rows, size)),
        POSITIONS: source.take(BERT_POSITIONS, (model.max_positions, size)),
        SEGMENTS: source.take(BERT_SEGMENTS, (model.segment_types, size)),
        **from_scheme(source, BERT.encoder, model),
        **attention_from_scheme(source, BERT, model),
    }
    source.drop("bert.embeddings.position_ids", "bert.embeddings.token_type_ids")  # counters, in old files
    pooler = source.drop(*(f"bert.pooler.dense.{kind}" for kind in ("weight", "bias")))
    pair = source.drop(*(f"cls.seq_relationship.{kind}" for kind in ("weight", "bias")))
    notes = [f"left out, this model has no place for it: {', '.join(pooler + pair)}"] if pooler + pair else []
    if not source.has("cls."):
        return weights | initial_head(model), [*notes, _NO_HEAD]
    weights |= from_scheme(source, BERT.head, model)
    weights[HEAD_BIAS] = source.take(BERT_BIAS, (rows,))
    source.drop_copy("cls.predictions.decoder.weight", weights[TOKENS])
    source.drop_copy("cls.predictions.decoder.bias", weights[HEAD_BIAS])
    return weights, notes


_NO_HEAD = "it has no masked-LM head: head.dense is drawn anew, its biases are zero"


def from_mpnet(settings: dict[str, Any], tensors: Tensors, vocabulary: Vocabulary, *, origin: str) -> PretrainedWeights:
    """An MPNet with or without its masked-LM head. Raises `ConfigError` with everything that does not fit."""
    check_settings(settings, origin)
    buckets = settings.get("relative_attention_num_buckets", _MPNET_BUCKETS["relative_buckets"])
    if buckets != _MPNET_BUCKETS["relative_buckets"]:
        raise ConfigError(
            [f"{origin}: relative_attention_num_buckets ({buckets}) is not 32, which MPNet's code computes with"]
        )
    before = _MPNET_PAD + 1
    model = replace(
        read_settings(settings, origin=origin),
        max_positions=size_setting(settings, "max_position_embeddings", origin) - before,
        segment_types=2,
        relative_bias=True,
        **_MPNET_BUCKETS,
    )
    check_vocabulary(model, vocabulary, origin)
    source = StrictTensors(with_prefix(tensors, MPNET), origin=origin)
    weights, notes = _mpnet_weights(source, model, before=before)
    source.finish()
    return PretrainedWeights(model, weights, vocabulary, {"format": "mpnet", "from": origin, "notes": notes})


def _mpnet_weights(source: StrictTensors, model: ModelConfig, *, before: int) -> tuple[Tensors, list[str]]:
    size, rows, buckets = model.hidden_size, model.vocab_size, model.relative_buckets
    assert rows is not None
    weights = {
        TOKENS: source.take(_MPNET_TOKENS, (rows, size)),
        POSITIONS: source.take(_MPNET_POSITIONS, (model.max_positions + before, size))[before:].contiguous(),
        SEGMENTS: torch.zeros(model.segment_types, size),
        RELATIVE_BIAS: source.take(_MPNET_RELATIVE, (buckets, model.num_heads)).t().contiguous(),
        **from_scheme(source, MPNET.encoder, model),
        **attention_from_scheme(source, MPNET, model),
    }
    source.drop("mpnet.embeddings.position_ids")
    pooler = source.drop(*(f"mpnet.pooler.dense.{kind}" for kind in ("weight", "bias")))
    notes = ["MPNet has no segment embeddings: both rows start as zeros"]
    notes += [f"left out, this model has no place for it: {', '.join(pooler)}"] if pooler else []
    if not source.has("lm_head."):
        return weights | initial_head(model), [*notes, _NO_HEAD]
    weights |= from_scheme(source, MPNET.head, model)
    weights[HEAD_BIAS] = source.take(_MPNET_BIAS, (rows,))
    source.drop_copy("lm_head.decoder.weight", weights[TOKENS])
    source.drop_copy("lm_head.decoder.bias", weights[HEAD_BIAS])
    return weights, notes


def with_prefix(tensors: Tensors, dialect: NameScheme) -> Tensors:
    """Under the names of the model with a head (a bare encoder's lack their beginning), old spellings mended."""
    bare = not any(name.startswith(dialect.prefix) for name in tensors)
    parts = ("embeddings.", "encoder.", "pooler.")
    named = {
        f"{dialect.prefix}{name}" if bare and name.startswith(parts) else name: tensor
        for name, tensor in tensors.items()
    }
    spelled = {".gamma": ".weight", ".beta": ".bias"}  # LayerNorm in files converted from TensorFlow
    return {
        name.removesuffix(end) + spelled[end] if (end := f".{name.rpartition('.')[2]}") in spelled else name: tensor
        for name, tensor in named.items()
    }


def read_settings(settings: dict[str, Any], *, origin: str) -> ModelConfig:
    """What BERT's and MPNet's settings have alike; a setting that is left out has its default there and here."""
    sizes = {own: size_setting(settings, other, origin) for own, other in _SHARED_SETTINGS.items() if _is_size(own)}
    rest = {own: settings[other] for own, other in _SHARED_SETTINGS.items() if other in settings and not _is_size(own)}
    model = ModelConfig(**sizes, **rest, vocab_size=size_setting(settings, "vocab_size", origin))
    if model.hidden_size % model.num_heads:
        raise ConfigError([f"{origin}: num_attention_heads ({model.num_heads}) must divide hidden_size"])
    return model


def _is_size(own: str) -> bool:
    return isinstance(getattr(ModelConfig, own), int)


def size_setting(settings: dict[str, Any], name: str, origin: str) -> int:
    """A positive number that must be there. Raises `ConfigError` when it is not."""
    value = settings.get(name)
    if not isinstance(value, int) or value < 1:
        raise ConfigError([f"{origin}: {name} ({value}) must be a positive number; its {CONFIG} does not describe it"])
    return value


def check_settings(settings: dict[str, Any], origin: str) -> None:
    """Raise `ConfigError` for what this model computes otherwise."""
    expected = {
        "hidden_act": "gelu",
        "position_embedding_type": "absolute",
        "is_decoder": False,
        "add_cross_attention": False,
        "tie_word_embeddings": True,
    }
    raise_if_any(
        [
            f"{origin}: {name} ({settings[name]}) must be {value}: this model has nothing else"
            for name, value in expected.items()
            if settings.get(name, value) != value
        ]
    )


def check_vocabulary(model: ModelConfig, vocabulary: Vocabulary, origin: str) -> None:
    """Raise `ConfigError` when there are not as many rows as tokens."""
    if model.vocab_size != vocabulary.size:
        raise ConfigError(
            [f"{origin}: its embedding has {model.vocab_size} rows, its tokenizer {vocabulary.size} tokens"]
        )


# -------------------------------------------------------------------------------------------------------- verification


@dataclass(frozen=True)
class ModelOutputs:
    """What a model says about some texts, at the tokens that are not padding: [tokens, E] and [tokens, V]."""

    states_NE: Tensor
    logits_NV: Tensor


@torch.no_grad()
def outputs_of_folder(folder: Path, *, ids_BT: Tensor, segments_BT: Tensor, valid_BT: Tensor) -> ModelOutputs:
    """Load a folder as anybody would, and ask it. `segments_BT` goes to models that have segments."""
    transformers = load_transformers()
    asked = {"input_ids": ids_BT, "attention_mask": valid_BT.long()}
    answers = []
    for automatic in (transformers.AutoModel, transformers.AutoModelForMaskedLM):
        model = automatic.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
        segments = {} if model.config.model_type == "mpnet" else {"token_type_ids": segments_BT}
        answers.append(model(**asked, **segments)[0][valid_BT])
    return ModelOutputs(*answers)


def ids_of_folder(folder: Path, texts: list[str]) -> list[list[int]]:
    """What the folder's own tokenizer makes of texts."""
    tokenizer = load_transformers().AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return tokenizer(texts)["input_ids"]


def load_transformers() -> Any:
    """The library. Raises `ConfigError` when it is not installed."""
    try:
        import transformers
    except ImportError as error:
        problem = "transformers, which checks the export, is not installed: pip install 'pmlm_dist[huggingface]'"
        raise ConfigError([problem]) from error
    transformers.logging.set_verbosity_error()  # a pooler that is not there is no news: docs/formats.md says so
    transformers.logging.disable_progress_bar()
    return transformers
