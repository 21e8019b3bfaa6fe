"""BERT of Hugging Face `transformers`: names and settings, in both directions.

                       this model                 BERT
    relative bias      optional                   none: a model that has one cannot be exported
    segments           embeddings.segment         token_type_embeddings
    head               head.dense, head.norm      cls.predictions.transform; decoder tied to word_embeddings

Weights are renamed and rearranged, not changed. UniLM has the same names (`unilm.py`).
"""

from dataclasses import replace
from typing import Any

from pmlm_dist.config import ConfigError, ModelConfig
from pmlm_dist.conversion.huggingface import (
    ExportedModel,
    ImportedModel,
    add_prefix,
    positive_setting,
    read_shared_settings,
    shared_settings,
)
from pmlm_dist.conversion.pretrained import PretrainedWeights
from pmlm_dist.conversion.tensors import NameScheme, StrictTensors, Tensors, from_scheme, to_scheme
from pmlm_dist.planning.parameters import POSITIONS, SEGMENTS
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
    attention={part: f"bert.encoder.layer.{{}}.attention.self.{part}" for part in ("query", "key", "value")},
    head={"head.dense": "cls.predictions.transform.dense", "head.norm": "cls.predictions.transform.LayerNorm"},
    head_bias="cls.predictions.bias",
    decoder="cls.predictions.decoder",
    dropped=("bert.pooler.dense", "cls.seq_relationship"),
)
BERT_SEGMENTS = "bert.embeddings.token_type_embeddings.weight"


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
        "type_vocab_size": model.segment_types,
    }
    return ExportedModel(settings, bert_tensors(pretrained.weights, model), pretrained.vocabulary)


def bert_tensors(weights: Tensors, model: ModelConfig) -> Tensors:
    """Return all parameters but the relative position bias under BERT's names."""
    tables = {BERT.positions: weights[POSITIONS], BERT_SEGMENTS: weights[SEGMENTS]}
    return tables | to_scheme(weights, BERT, model)


def from_bert(settings: dict[str, Any], tensors: Tensors, vocabulary: Vocabulary, *, origin: str) -> ImportedModel:
    """Convert a BERT with or without masked-LM head. Raises one `ConfigError` for everything that does not match."""
    model = replace(
        read_shared_settings(settings, vocabulary, origin=origin),
        segment_types=positive_setting(settings, "type_vocab_size", origin),
        relative_bias=False,
    )
    source = StrictTensors(add_prefix(tensors, BERT), origin=origin)
    weights, notes = bert_weights(source, model)
    source.finish()
    return model, weights, notes


def bert_weights(source: StrictTensors, model: ModelConfig) -> tuple[Tensors, list[str]]:
    """Take all parameters but the relative position bias; return them with notes on dropped and new ones."""
    weights, notes = from_scheme(source, BERT, model)
    weights[SEGMENTS] = source.take(BERT_SEGMENTS, (model.segment_types, model.hidden_size))
    source.drop("bert.embeddings.token_type_ids")  # an index buffer in old files
    return weights, notes
