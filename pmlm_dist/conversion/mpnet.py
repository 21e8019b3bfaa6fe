"""MPNet of Hugging Face `transformers`: names and settings, in both directions.

                       this model                       MPNet
    relative bias      [heads, buckets]                 [32 buckets, heads], distances up to 128
    segments           embeddings.segment               none: segment 0 is added to the positions, the others are lost
    positions          rows 0, 1, 2, ...                from row 2 on
    [PAD]              any id                           id 1: positions are counted over the ids other than 1
    head               head.dense, head.norm            lm_head

Weights are renamed and rearranged; the only arithmetic is the sum of positions and segment 0.
"""

from dataclasses import replace
from typing import Any

import torch

from pmlm_dist.config import ConfigError
from pmlm_dist.conversion.huggingface import (
    ExportedModel,
    ImportedModel,
    add_prefix,
    read_shared_settings,
    shared_settings,
)
from pmlm_dist.conversion.pretrained import PretrainedWeights
from pmlm_dist.conversion.tensors import NameScheme, StrictTensors, Tensors, from_scheme, to_scheme
from pmlm_dist.planning.parameters import POSITIONS, RELATIVE_BIAS, SEGMENTS
from pmlm_dist.vocabulary.files import PAD
from pmlm_dist.vocabulary.vocabulary import Vocabulary

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
    attention={part: f"mpnet.encoder.layer.{{}}.attention.attn.{part[0]}" for part in ("query", "key", "value")},
    head={"head.dense": "lm_head.dense", "head.norm": "lm_head.layer_norm"},
    head_bias="lm_head.bias",
    decoder="lm_head.decoder",
    dropped=("mpnet.pooler.dense",),
)
_RELATIVE_BIAS = "mpnet.encoder.relative_attention_bias.weight"
_PAD_ID = 1
"""The id without a position in MPNet's code, whatever pad_token_id is."""
_FIRST_POSITION = _PAD_ID + 1
"""Row of the first position: the rows before it belong to padding."""
_BUCKETS = {"relative_buckets": 32, "relative_max_distance": 128}
"""Constants of MPNet's code."""


def to_mpnet(pretrained: PretrainedWeights) -> ExportedModel:
    """Convert to `MPNetForMaskedLM`. Raises `ConfigError` for other distance buckets than MPNet's.

    A model without relative position bias gets a table of zeros, which computes the same.
    """
    model = pretrained.model
    different = {name: getattr(model, name) for name in _BUCKETS if getattr(model, name) != _BUCKETS[name]}
    if model.relative_bias and different:
        raise ConfigError(
            [f"MPNet requires model.{name} {_BUCKETS[name]}, this model has {value}: use --format unilm"
             for name, value in different.items()]
        )  # fmt: skip
    # [PAD] must have MPNet's id: any other token with this id would shift all positions after it.
    vocabulary = pretrained.vocabulary.with_ids_swapped(pretrained.vocabulary.pad_id, _PAD_ID)
    renumbered = pretrained.with_vocabulary(vocabulary, origin="MPNet")
    settings = {
        "model_type": "mpnet",
        "architectures": ["MPNetForMaskedLM"],
        **shared_settings(renumbered),
        "max_position_embeddings": model.max_positions + _FIRST_POSITION,
        "relative_attention_num_buckets": _BUCKETS["relative_buckets"],
        "pad_token_id": _PAD_ID,
        "bos_token_id": vocabulary.cls_id,
        "eos_token_id": vocabulary.sep_id,
    }
    return ExportedModel(settings, _mpnet_tensors(renumbered), vocabulary, tuple(_limitations(pretrained.vocabulary)))


def _mpnet_tensors(pretrained: PretrainedWeights) -> Tensors:
    model, weights = pretrained.model, pretrained.weights
    padding = torch.zeros(_FIRST_POSITION, model.hidden_size)
    no_bias = torch.zeros(model.num_heads, _BUCKETS["relative_buckets"])
    return {
        MPNET.positions: torch.cat([padding, weights[POSITIONS] + weights[SEGMENTS][0]]),
        _RELATIVE_BIAS: weights.get(RELATIVE_BIAS, no_bias).t().contiguous(),
        **to_scheme(weights, MPNET, model),
    }


def _limitations(vocabulary: Vocabulary) -> list[str]:
    limitations = ["MPNet has no segment embeddings: every token has segment 0, the other rows of the table are lost."]
    if vocabulary.pad_id != _PAD_ID:
        limitations.append(
            f"MPNet's code requires id {_PAD_ID} for padding: the ids of {PAD} ({vocabulary.pad_id} in the corpus) and "
            f"{vocabulary.tokens[_PAD_ID]} are exchanged, in the tokenizer and in the weights."
        )
    return limitations


def from_mpnet(settings: dict[str, Any], tensors: Tensors, vocabulary: Vocabulary, *, origin: str) -> ImportedModel:
    """Convert an MPNet with or without masked-LM head. Raises one `ConfigError` for everything that does not match."""
    buckets = settings.get("relative_attention_num_buckets", _BUCKETS["relative_buckets"])
    if buckets != _BUCKETS["relative_buckets"]:
        raise ConfigError(
            [f"{origin}: relative_attention_num_buckets ({buckets}) must be 32, a constant of MPNet's code"]
        )
    model = read_shared_settings(settings, vocabulary, origin=origin)
    positions = model.max_positions - _FIRST_POSITION
    model = replace(model, max_positions=positions, segment_types=2, relative_bias=True, **_BUCKETS)
    source = StrictTensors(add_prefix(tensors, MPNET), origin=origin)
    weights, notes = from_scheme(source, MPNET, model, first_position=_FIRST_POSITION)
    weights[SEGMENTS] = torch.zeros(model.segment_types, model.hidden_size)
    weights[RELATIVE_BIAS] = source.take(_RELATIVE_BIAS, (model.relative_buckets, model.num_heads)).t().contiguous()
    source.finish()
    return model, weights, ["MPNet has no segment embeddings: both rows are initialized to zero", *notes]
