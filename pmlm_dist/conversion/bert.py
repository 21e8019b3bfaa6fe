"""BERT of Hugging Face `transformers`: names and settings, in both directions.

                       this model                 BERT
    relative bias      optional                   none: a model that has one cannot be exported
    segments           embeddings.segment         token_type_embeddings
    head               head.dense, head.norm      cls.predictions.transform; decoder tied to word_embeddings

Weights are renamed and rearranged, not changed. UniLM has the same names (`unilm.py`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pmlm_dist.config import ConfigError, ModelConfig
from pmlm_dist.conversion.huggingface import (
    NEW_HEAD_NOTE,
    ExportedModel,
    add_prefix,
    check_settings,
    dropped_note,
    positive_setting,
    read_shared_settings,
    shared_settings,
)
from pmlm_dist.conversion.pretrained import PretrainedWeights
from pmlm_dist.conversion.tensors import (
    HEAD_BIAS,
    POSITIONS,
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
from pmlm_dist.vocabulary.vocabulary import Vocabulary

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
BERT_TOKENS, BERT_POSITIONS, BERT_SEGMENTS = (
    f"bert.embeddings.{table}_embeddings.weight" for table in ("word", "position", "token_type")
)
BERT_BIAS = "cls.predictions.bias"


def to_bert(pretrained: PretrainedWeights) -> ExportedModel:
    """Convert to `BertForMaskedLM`. Raises `ConfigError` for a model with relative position bias."""
    model = pretrained.model
    if model.relative_bias:
        raise ConfigError(
            ["BERT has no relative position bias, but this model does (model.relative_bias): use --format mpnet"]
        )
    settings = {
        "model_type": "bert",
        "architectures": ["BertForMaskedLM"],
        **shared_settings(pretrained),
        "max_position_embeddings": model.max_positions,
        "type_vocab_size": model.segment_types,
        "pad_token_id": pretrained.vocabulary.pad_id,
    }
    return ExportedModel(settings, bert_tensors(pretrained.weights, model), pretrained.vocabulary)


def bert_tensors(weights: Tensors, model: ModelConfig) -> Tensors:
    """Return all parameters but the relative position bias under BERT's names."""
    tables = {BERT_TOKENS: TOKENS, BERT_POSITIONS: POSITIONS, BERT_SEGMENTS: SEGMENTS, BERT_BIAS: HEAD_BIAS}
    return {theirs: weights[ours] for theirs, ours in tables.items()} | to_scheme(weights, BERT, model)


def from_bert(settings: dict[str, Any], tensors: Tensors, vocabulary: Vocabulary, *, origin: str) -> PretrainedWeights:
    """Convert a BERT with or without masked-LM head. Raises one `ConfigError` for everything that does not match."""
    check_settings(settings, origin)
    model = replace(
        read_shared_settings(settings, vocabulary, origin=origin),
        max_positions=positive_setting(settings, "max_position_embeddings", origin),
        segment_types=positive_setting(settings, "type_vocab_size", origin),
        relative_bias=False,
    )
    source = StrictTensors(add_prefix(tensors, BERT), origin=origin)
    weights, notes = bert_weights(source, model)
    source.finish()
    return PretrainedWeights(model, weights, vocabulary, {"format": "bert", "from": origin, "notes": notes})


def bert_weights(source: StrictTensors, model: ModelConfig) -> tuple[Tensors, list[str]]:
    """Take all parameters but the relative position bias; return them with notes on dropped and new ones."""
    size, rows = model.hidden_size, model.vocab_size
    assert rows is not None
    weights = {
        TOKENS: source.take_token_rows(BERT_TOKENS, rows, size),
        POSITIONS: source.take(BERT_POSITIONS, (model.max_positions, size)),
        SEGMENTS: source.take(BERT_SEGMENTS, (model.segment_types, size)),
        **from_scheme(source, BERT.encoder, model),
        **attention_from_scheme(source, BERT, model),
    }
    source.drop("bert.embeddings.position_ids", "bert.embeddings.token_type_ids")  # index buffers in old files
    dropped = source.drop(
        *(f"{module}.{kind}" for module in ("bert.pooler.dense", "cls.seq_relationship") for kind in ("weight", "bias"))
    )
    notes = dropped_note(dropped)
    if not source.has("cls."):
        return weights | initial_head(model), [*notes, *source.padding_notes(), NEW_HEAD_NOTE]
    weights |= from_scheme(source, BERT.head, model)
    weights[HEAD_BIAS] = source.take_token_rows(BERT_BIAS, rows)
    source.drop_tied("cls.predictions.decoder.weight", weights[TOKENS])
    source.drop_tied("cls.predictions.decoder.bias", weights[HEAD_BIAS])
    return weights, [*notes, *source.padding_notes()]
