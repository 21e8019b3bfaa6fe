"""The format of the released UniLM 1.2 and UniLM 2 checkpoints.

    BERT's names, but for attention      attention.self.qkv_linear.weight [3E, E]: query | key | value; q_bias, v_bias
    relative position bias               bert.encoder.rel_pos_bias.weight [heads, buckets]
    no bias of keys                      it adds the same to all scores of a query, which softmax takes away again
    files                                pytorch_model.bin, config.json (rel_pos_bins, max_rel_pos), vocab.txt

Read off the authors' fine-tuning code (`microsoft/unilm`, folder `s2s-ft`). UniLM 1 has three matrices instead of the
fused one and no relative bias; it is read as well. `transformers` cannot load this format: it has no such model.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from pmlm_dist.config import ConfigError, ModelConfig
from pmlm_dist.conversion.huggingface import (
    BERT,
    BERT_SEGMENTS,
    Exported,
    bert_tensors,
    bert_weights,
    check_settings,
    check_vocabulary,
    read_settings,
    shared_settings,
    size_setting,
    with_prefix,
)
from pmlm_dist.conversion.pretrained import PretrainedWeights
from pmlm_dist.conversion.tensors import RELATIVE_BIAS, TOKENS, StrictTensors, Tensors
from pmlm_dist.vocab import Vocabulary

_RELATIVE, _RELATIVE_LATER = "bert.encoder.rel_pos_bias.weight", "bert.rel_pos_bias.weight"
_SELF = "bert.encoder.layer.{}.attention.self"
_FUSED = ".qkv_linear.weight"


def is_unilm(settings: dict[str, Any], tensors: Tensors) -> bool:
    """Whether a checkpoint with BERT's names is one of UniLM's."""
    relative = any(name.endswith("rel_pos_bias.weight") for name in tensors)
    return relative or "rel_pos_bins" in settings or any(name.endswith(_FUSED) for name in tensors)


# ------------------------------------------------------------------------------------------------------------ to UniLM


def as_unilm(pretrained: PretrainedWeights) -> Exported:
    """The whole model; nothing of it is lost."""
    model = pretrained.model
    settings = {
        "model_type": "unilm",
        **shared_settings(pretrained),
        "max_position_embeddings": model.max_positions,
        "type_vocab_size": model.segment_types,
        "pad_token_id": pretrained.vocabulary.pad_id,
        "rel_pos_bins": model.relative_buckets if model.relative_bias else 0,
        "max_rel_pos": model.relative_max_distance,
    }
    tensors = fused(bert_tensors(pretrained.weights, model), layers=model.num_layers)
    if model.relative_bias:
        tensors[_RELATIVE] = pretrained.weights[RELATIVE_BIAS]
    return Exported(settings, tensors, pretrained.vocabulary)


def fused(tensors: Tensors, *, layers: int) -> Tensors:
    """BERT's tensors with queries, keys and values of a layer in one, and without the bias of keys."""
    found = dict(tensors)
    for place in (_SELF.format(layer) for layer in range(layers)):
        parts = [found.pop(f"{place}.{part}.weight") for part in ("query", "key", "value")]
        biases = {part: found.pop(f"{place}.{part}.bias") for part in ("query", "key", "value")}
        found[f"{place}{_FUSED}"] = torch.cat(parts)
        found |= {f"{place}.q_bias": biases["query"], f"{place}.v_bias": biases["value"]}
    return found


# ---------------------------------------------------------------------------------------------------------- from UniLM


def from_unilm(settings: dict[str, Any], tensors: Tensors, vocabulary: Vocabulary, *, origin: str) -> PretrainedWeights:
    """A released UniLM checkpoint, or one fine-tuned from it. Raises `ConfigError` with all that does not fit."""
    check_settings(settings, origin)
    tensors = unfused(with_prefix(tensors, BERT))
    relative = tensors.pop(_RELATIVE_LATER, None)
    if relative is not None:
        tensors[_RELATIVE] = relative
    model = _model_settings(settings, has_relative_bias=_RELATIVE in tensors, origin=origin)
    check_vocabulary(model, vocabulary, origin)
    notes = []
    if BERT_SEGMENTS not in tensors and not settings.get("type_vocab_size"):
        tensors[BERT_SEGMENTS] = torch.zeros(model.segment_types, model.hidden_size)
        notes.append("it has no segment embeddings: both rows start as zeros")
    source = StrictTensors(tensors, origin=origin)
    weights, of_bert = bert_weights(source, model)
    if model.relative_bias:
        weights[RELATIVE_BIAS] = source.take(_RELATIVE, (model.num_heads, model.relative_buckets))
    source.drop_copy("cls.predictions.decoder_weight", weights[TOKENS])
    source.drop("crit_mask_lm_smoothed.one_hot")  # a constant of the fine-tuning loss
    source.finish()
    return PretrainedWeights(
        model, weights, vocabulary, {"format": "unilm", "from": origin, "notes": [*of_bert, *notes]}
    )


def unfused(tensors: Tensors) -> Tensors:
    """BERT's tensors, the bias of keys zero. What is not fused, or no third of three, stays as it is."""
    found = {}
    for name, tensor in tensors.items():
        place, _, end = name.rpartition(".self.")
        if end == _FUSED[1:] and tensor.shape[0] % 3 == 0:
            parts = zip(("query", "key", "value"), tensor.chunk(3), strict=True)
            found |= {f"{place}.self.{part}.weight": rows for part, rows in parts}
        elif end in ("q_bias", "v_bias"):
            part = {"q": "query", "v": "value"}[end[0]]
            found[f"{place}.self.{part}.bias"] = tensor.reshape(-1)  # stored as [1, 1, E] by some
            found.setdefault(f"{place}.self.key.bias", torch.zeros(tensor.numel()))
        else:
            found[name] = tensor
    return found


def _model_settings(settings: dict[str, Any], *, has_relative_bias: bool, origin: str) -> ModelConfig:
    buckets = settings.get("rel_pos_bins", 0)
    if bool(buckets) != has_relative_bias:
        has = "has" if has_relative_bias else "has no"
        raise ConfigError([f"{origin}: rel_pos_bins is {buckets}, but the checkpoint {has} {_RELATIVE}"])
    model = replace(
        read_settings(settings, origin=origin),
        max_positions=size_setting(settings, "max_position_embeddings", origin),
        segment_types=settings.get("type_vocab_size") or 2,
        relative_bias=has_relative_bias,
    )
    if not has_relative_bias:
        return model
    return replace(model, relative_buckets=buckets, relative_max_distance=size_setting(settings, "max_rel_pos", origin))
