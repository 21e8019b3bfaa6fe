"""UniLM: the format of the released UniLM 1.2 and UniLM 2 checkpoints, in both directions.

    names                                those of BERT, except for attention
    attention                            attention.self.qkv_linear.weight [3E, E]: query | key | value; q_bias, v_bias
    relative position bias               bert.encoder.rel_pos_bias.weight [heads, buckets]
    no bias of keys                      it adds a constant to all scores of a query, to which softmax is invariant
    files                                pytorch_model.bin, config.json (rel_pos_bins, max_rel_pos), vocab.txt

Source: the authors' fine-tuning code (`microsoft/unilm`, folder `s2s-ft`). UniLM 1, with separate query, key and value
matrices and no relative bias, can be imported too. `transformers` has no such model and cannot load this format.
"""

from dataclasses import replace
from typing import Any

import torch

from pmlm_dist.config import ConfigError, ModelConfig
from pmlm_dist.conversion.bert import BERT, BERT_SEGMENTS, bert_tensors, bert_weights
from pmlm_dist.conversion.huggingface import (
    ExportedModel,
    ImportedModel,
    add_prefix,
    positive_setting,
    read_shared_settings,
    shared_settings,
)
from pmlm_dist.conversion.pretrained import PretrainedWeights
from pmlm_dist.conversion.tensors import StrictTensors, Tensors
from pmlm_dist.planning.parameters import RELATIVE_BIAS, TOKENS
from pmlm_dist.vocabulary.vocabulary import Vocabulary

_RELATIVE_BIAS, _RELATIVE_BIAS_S2S_FT = "bert.encoder.rel_pos_bias.weight", "bert.rel_pos_bias.weight"
_SELF_ATTENTION = "bert.encoder.layer.{}.attention.self"
_QKV = ".qkv_linear.weight"


def is_unilm(settings: dict[str, Any], tensors: Tensors) -> bool:
    """Return True if a checkpoint with BERT's names is in UniLM's format."""
    relative = any(name.endswith("rel_pos_bias.weight") for name in tensors)
    return relative or "rel_pos_bins" in settings or any(name.endswith(_QKV) for name in tensors)


# -------------------------------------------------------------------------------------------------------------- export


def to_unilm(pretrained: PretrainedWeights) -> ExportedModel:
    """Convert to UniLM's format, which has no limitations."""
    model = pretrained.model
    settings = {
        "model_type": "unilm",
        **shared_settings(pretrained),
        "type_vocab_size": model.segment_types,
        "rel_pos_bins": model.relative_buckets if model.relative_bias else 0,
        "max_rel_pos": model.relative_max_distance,
    }
    tensors = fuse_qkv(bert_tensors(pretrained.weights, model), layers=model.num_layers)
    if model.relative_bias:
        tensors[_RELATIVE_BIAS] = pretrained.weights[RELATIVE_BIAS]
    return ExportedModel(settings, tensors, pretrained.vocabulary)


def fuse_qkv(tensors: Tensors, *, layers: int) -> Tensors:
    """Join queries, keys and values of each layer of BERT's tensors, and drop the bias of keys."""
    fused = dict(tensors)
    for module in (_SELF_ATTENTION.format(layer) for layer in range(layers)):
        parts = [fused.pop(f"{module}.{part}.weight") for part in ("query", "key", "value")]
        biases = {part: fused.pop(f"{module}.{part}.bias") for part in ("query", "key", "value")}
        fused[f"{module}{_QKV}"] = torch.cat(parts)
        fused |= {f"{module}.q_bias": biases["query"], f"{module}.v_bias": biases["value"]}
    return fused


# -------------------------------------------------------------------------------------------------------------- import


def from_unilm(settings: dict[str, Any], tensors: Tensors, vocabulary: Vocabulary, *, origin: str) -> ImportedModel:
    """Convert a released or fine-tuned UniLM. Raises one `ConfigError` for everything that does not match."""
    tensors = split_qkv(add_prefix(tensors, BERT))
    relative_bias = tensors.pop(_RELATIVE_BIAS_S2S_FT, None)
    if relative_bias is not None:
        tensors[_RELATIVE_BIAS] = relative_bias
    model = _model_settings(settings, vocabulary, has_relative_bias=_RELATIVE_BIAS in tensors, origin=origin)
    notes = []
    if BERT_SEGMENTS not in tensors and not settings.get("type_vocab_size"):
        tensors[BERT_SEGMENTS] = torch.zeros(model.segment_types, model.hidden_size)
        notes.append("the checkpoint has no segment embeddings: both rows are initialized to zero")
    source = StrictTensors(tensors, origin=origin)
    weights, bert_notes = bert_weights(source, model)
    if model.relative_bias:
        weights[RELATIVE_BIAS] = source.take(_RELATIVE_BIAS, (model.num_heads, model.relative_buckets))
    source.drop_tied("cls.predictions.decoder_weight", weights[TOKENS])
    source.drop("crit_mask_lm_smoothed.one_hot")  # a constant of the fine-tuning loss
    source.finish()
    return model, weights, [*bert_notes, *notes]


def split_qkv(tensors: Tensors) -> Tensors:
    """Split fused queries, keys and values, with a zero bias of keys; the inverse of `fuse_qkv`.

    Other tensors, and fused ones whose rows are no multiple of 3, are unchanged: they are reported as unknown.
    """
    split = {}
    for name, tensor in tensors.items():
        module, _, end = name.rpartition(".self.")
        if end == _QKV[1:] and tensor.shape[0] % 3 == 0:
            parts = zip(("query", "key", "value"), tensor.chunk(3), strict=True)
            split |= {f"{module}.self.{part}.weight": rows for part, rows in parts}
        elif end in ("q_bias", "v_bias"):
            part = {"q": "query", "v": "value"}[end[0]]
            split[f"{module}.self.{part}.bias"] = tensor.reshape(-1)  # [1, 1, E] in some releases
            split.setdefault(f"{module}.self.key.bias", torch.zeros(tensor.numel()))
        else:
            split[name] = tensor
    return split


def _model_settings(
    settings: dict[str, Any], vocabulary: Vocabulary, *, has_relative_bias: bool, origin: str
) -> ModelConfig:
    buckets = settings.get("rel_pos_bins", 0)
    if bool(buckets) != has_relative_bias:
        has = "has" if has_relative_bias else "has no"
        raise ConfigError([f"{origin}: rel_pos_bins is {buckets}, but the checkpoint {has} {_RELATIVE_BIAS}"])
    model = replace(
        read_shared_settings(settings, vocabulary, origin=origin),
        segment_types=settings.get("type_vocab_size") or 2,
        relative_bias=has_relative_bias,
    )
    if not has_relative_bias:
        return model
    return replace(
        model, relative_buckets=buckets, relative_max_distance=positive_setting(settings, "max_rel_pos", origin)
    )
