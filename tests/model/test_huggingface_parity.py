"""Without appended slots the model equals BERT (relative bias off) or MPNet (on): same weights, same logits."""

from typing import Any

import pytest
import torch
from support.batches import MODEL, PADDED, SPECIAL, VOCABULARY, model_of, random_batch
from transformers import BertConfig, BertForMaskedLM, MPNetConfig, MPNetForMaskedLM

from pmlm_dist.model.transformer import PseudoMaskedLM, context_inputs

SHARED = {
    "vocab_size": VOCABULARY,
    "hidden_size": MODEL.hidden_size,
    "num_hidden_layers": MODEL.num_layers,
    "num_attention_heads": MODEL.num_heads,
    "intermediate_size": MODEL.ffn_size,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "layer_norm_eps": MODEL.layer_norm_eps,
    "pad_token_id": SPECIAL.pad,
}


def attention_weights(model: PseudoMaskedLM, layer: int) -> dict[str, torch.Tensor]:
    """Query, key and value of a layer, each [E, E] or [E]; our keys and values are interleaved by head."""
    attention: Any = model.layers[layer].attention
    heads, size = MODEL.num_heads, MODEL.head_dim
    weights = {"query.weight": attention.query.weight, "query.bias": attention.query.bias}
    for kind in ("weight", "bias"):
        both = getattr(attention.key_value, kind).view(heads, 2, size, *getattr(attention.key_value, kind).shape[1:])
        weights[f"key.{kind}"] = both[:, 0].flatten(0, 1)
        weights[f"value.{kind}"] = both[:, 1].flatten(0, 1)
    return weights


def named_as(model: PseudoMaskedLM, names: dict[str, str], attention: dict[str, str]) -> dict[str, torch.Tensor]:
    """Our weights with the names of another implementation; `{}` is the number of the layer."""
    ours = dict(model.named_parameters())
    renamed = {}
    for layer in range(MODEL.num_layers):
        for own, other in names.items():
            renamed[other.format(layer)] = ours[own.format(layer)]
        for own, tensor in attention_weights(model, layer).items():
            kind, parameter = own.split(".")
            renamed[f"{attention[kind].format(layer)}.{parameter}"] = tensor
    return {name: tensor.detach().clone() for name, tensor in renamed.items()}


def both(own: str, other: str) -> dict[str, str]:
    """Names of a weight and its bias."""
    return {f"{own}.{kind}": f"{other}.{kind}" for kind in ("weight", "bias")}


BERT = {
    **both("embeddings.norm", "bert.embeddings.LayerNorm"),
    **both("layers.{}.attention.output", "bert.encoder.layer.{}.attention.output.dense"),
    **both("layers.{}.attention_norm", "bert.encoder.layer.{}.attention.output.LayerNorm"),
    **both("layers.{}.ffn_in", "bert.encoder.layer.{}.intermediate.dense"),
    **both("layers.{}.ffn_out", "bert.encoder.layer.{}.output.dense"),
    **both("layers.{}.ffn_norm", "bert.encoder.layer.{}.output.LayerNorm"),
    **both("head.dense", "cls.predictions.transform.dense"),
    **both("head.norm", "cls.predictions.transform.LayerNorm"),
    "embeddings.position.weight": "bert.embeddings.position_embeddings.weight",
    "embeddings.segment.weight": "bert.embeddings.token_type_embeddings.weight",
}
MPNET = {
    **both("embeddings.norm", "mpnet.embeddings.LayerNorm"),
    **both("layers.{}.attention.output", "mpnet.encoder.layer.{}.attention.attn.o"),
    **both("layers.{}.attention_norm", "mpnet.encoder.layer.{}.attention.LayerNorm"),
    **both("layers.{}.ffn_in", "mpnet.encoder.layer.{}.intermediate.dense"),
    **both("layers.{}.ffn_out", "mpnet.encoder.layer.{}.output.dense"),
    **both("layers.{}.ffn_norm", "mpnet.encoder.layer.{}.output.LayerNorm"),
    **both("head.dense", "lm_head.dense"),
    **both("head.norm", "lm_head.layer_norm"),
}


def bert_of(model: PseudoMaskedLM) -> BertForMaskedLM:
    bert = BertForMaskedLM(BertConfig(**SHARED, max_position_embeddings=MODEL.max_positions)).double().eval()
    attention = {kind: f"bert.encoder.layer.{{}}.attention.self.{kind}" for kind in ("query", "key", "value")}
    weights = named_as(model, BERT, attention)
    words = model.embeddings.token.weight.detach()[:VOCABULARY]
    bias = model.head.bias.detach()[:VOCABULARY]
    weights |= {
        "bert.embeddings.word_embeddings.weight": words,
        "cls.predictions.decoder.weight": words,
        "cls.predictions.decoder.bias": bias,
        "cls.predictions.bias": bias,
    }
    load(bert, weights)
    return bert


def mpnet_of(model: PseudoMaskedLM) -> MPNetForMaskedLM:
    """MPNet has no segments (type 0 is added to its positions), and its positions start in row 2."""
    rows = MODEL.max_positions + 2
    mpnet = MPNetForMaskedLM(MPNetConfig(**SHARED, max_position_embeddings=rows)).double().eval()
    letters = {"query": "q", "key": "k", "value": "v"}
    attention = {kind: f"mpnet.encoder.layer.{{}}.attention.attn.{letter}" for kind, letter in letters.items()}
    weights = named_as(model, MPNET, attention)
    words = model.embeddings.token.weight.detach()[:VOCABULARY]
    bias = model.head.bias.detach()[:VOCABULARY]
    positions = model.embeddings.position.weight.detach() + model.embeddings.segment.weight.detach()[0]
    assert model.relative_bias is not None
    weights |= {
        "mpnet.embeddings.word_embeddings.weight": words,
        "mpnet.embeddings.position_embeddings.weight": torch.cat([torch.zeros_like(positions[:2]), positions]),
        "mpnet.encoder.relative_attention_bias.weight": model.relative_bias.weight.detach().t(),
        "lm_head.decoder.weight": words,
        "lm_head.decoder.bias": bias,
        "lm_head.bias": bias,
    }
    load(mpnet, weights)
    return mpnet


def load(other: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    missing, unexpected = other.load_state_dict(weights, strict=False)
    assert not unexpected
    assert [name for name in missing if "position_ids" not in name and "pooler" not in name] == []


@torch.no_grad()
def our_logits(model: PseudoMaskedLM, tokens, segments, valid) -> torch.Tensor:
    hidden_TBE = model.encode(context_inputs(tokens, segments_BT=segments, valid_BT=valid))
    return model.head(hidden_TBE, model.embeddings.token.weight).transpose(0, 1)


@pytest.mark.parametrize("attention", ["fused", "reference"])
def test_logits_without_relative_bias_equal_bert(attention):
    model = model_of(relative_bias=False, attention=attention).eval()
    batch = random_batch()
    S = batch.num_context
    tokens, segments, valid = batch.tokens_BT[:, :S], batch.segments_BT[:, :S], batch.valid_BT[:, :S]
    with torch.no_grad():
        expected = bert_of(model)(input_ids=tokens, token_type_ids=segments, attention_mask=valid.long()).logits
    actual = our_logits(model, tokens, segments, valid)
    assert expected[valid].std() > 0.1
    torch.testing.assert_close(actual[valid][:, :VOCABULARY], expected[valid], rtol=1e-9, atol=1e-9)
    assert actual.shape[-1] == PADDED
    assert (actual[..., VOCABULARY:] == float("-inf")).all()


@pytest.mark.parametrize("attention", ["fused", "reference"])
def test_logits_with_relative_bias_equal_mpnet(attention):
    model = model_of(relative_bias=True, attention=attention).eval()
    batch = random_batch()
    S = batch.num_context
    tokens, valid = batch.tokens_BT[:, :S], batch.valid_BT[:, :S]
    with torch.no_grad():
        expected = mpnet_of(model)(
            input_ids=tokens, attention_mask=valid.long(), position_ids=torch.arange(2, S + 2).expand_as(tokens)
        ).logits
    actual = our_logits(model, tokens, torch.zeros_like(tokens), valid)
    assert expected[valid].std() > 0.1
    torch.testing.assert_close(actual[valid][:, :VOCABULARY], expected[valid], rtol=1e-9, atol=1e-9)
