"""Longhand reference of the method: loops over samples, slots, heads and keys, in double precision.

It uses the weights by their names, but no code of the package's model, attention, masking or objectives. Slow.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pmlm_dist.config import ModelConfig, ObjectiveConfig
from pmlm_dist.data.batch import Batch

Weights = dict[str, Tensor]


class Slot(NamedTuple):
    """Attributes of a slot that attention depends on."""

    order: int
    valid: bool
    position: int


def loss(weights: Weights, batch: Batch, config: ModelConfig, objective: ObjectiveConfig) -> Tensor:
    """Total loss: a * mean AE + p * mean PAR over all targets of the batch."""
    names = {"ae+par": ["ae", "par"], "ae+ar": ["ae", "par"], "ae": ["ae"], "par": ["par"], "ar": ["par"]}[
        objective.kind
    ]
    terms: dict[str, list[Tensor]] = {name: [] for name in names}
    for b in range(len(batch.tokens_BT)):
        hidden = encode(weights, batch, b, config)
        for m in range(batch.num_predictions):
            if batch.weights_BM[b, m] == 0:
                continue
            position, target = int(batch.predicted_BM[b, m]), int(batch.targets_BM[b, m])
            kept = int(batch.tokens_BT[b, position]) == target
            for name in names:
                if name == "par" and objective.drop_kept and kept:
                    continue
                if name == "ae" and not batch.valid_BT[b, position]:  # a prefix sample has no base slots
                    continue
                slot = position if name == "ae" else batch.num_context + batch.num_predictions + m
                terms[name].append(nll(weights, hidden[slot], target, config))
    factors = {"ae": objective.ae_weight, "par": objective.par_weight}
    return torch.stack([factors[n] * torch.stack(nlls).mean() for n, nlls in terms.items() if nlls]).sum()


def encode(weights: Weights, batch: Batch, b: int, config: ModelConfig) -> list[Tensor]:
    """Last hidden state of every slot of sample `b`."""
    slots = [
        Slot(int(order), bool(valid), int(position))
        for order, valid, position in zip(batch.order_BT[b], batch.valid_BT[b], batch.positions_BT[b], strict=True)
    ]
    hidden = [
        norm(
            weights["embeddings.token.weight"][int(batch.tokens_BT[b, t])]
            + weights["embeddings.position.weight"][slots[t].position]
            + weights["embeddings.segment.weight"][int(batch.segments_BT[b, t])],
            weights,
            "embeddings.norm",
            config,
        )
        for t in range(len(slots))
    ]
    for layer in range(config.num_layers):
        hidden = one_layer(hidden, weights, f"layers.{layer}", slots, config)
    return hidden


def one_layer(
    hidden: list[Tensor], weights: Weights, name: str, slots: list[Slot], config: ModelConfig
) -> list[Tensor]:
    """Post-LN: attention over the visible slots, then the feed-forward network."""
    size = config.hidden_size // config.num_heads
    queries = [affine(x, weights, f"{name}.attention.query") for x in hidden]
    both = [affine(x, weights, f"{name}.attention.key_value") for x in hidden]
    new = []
    for q in range(len(hidden)):
        visible = [k for k in range(len(hidden)) if slots[k].valid and is_visible(slots[q].order, slots[k].order)]
        heads = []
        for h in range(config.num_heads):
            query = queries[q][h * size : (h + 1) * size]
            scores, values = [], []
            for k in visible:
                key = both[k][2 * h * size : (2 * h + 1) * size]
                values.append(both[k][(2 * h + 1) * size : (2 * h + 2) * size])
                score = (query * key).sum() / math.sqrt(size)
                if config.relative_bias:
                    score = (
                        score
                        + weights["relative_bias.weight"][h, bucket(slots[k].position - slots[q].position, config)]
                    )
                scores.append(score)
            shares = torch.stack(scores).exp() / torch.stack(scores).exp().sum()
            heads.append((shares[:, None] * torch.stack(values)).sum(dim=0))
        mixed = affine(torch.cat(heads), weights, f"{name}.attention.output")
        x = norm(hidden[q] + mixed, weights, f"{name}.attention_norm", config)
        inner = gelu(affine(x, weights, f"{name}.ffn_in"))
        new.append(norm(x + affine(inner, weights, f"{name}.ffn_out"), weights, f"{name}.ffn_norm", config))
    return new


def is_visible(query: int, key: int) -> bool:
    """Visibility rule of signed orders: 0 context, +k originals of step k, -k pseudo masks of step k."""
    if key < 0:
        return query == key
    return key <= query if query >= 0 else key < -query


def bucket(distance: int, config: ModelConfig) -> int:
    """T5's bidirectional bucket of key position - query position."""
    half = config.relative_buckets // 2
    exact, a = half // 2, abs(distance)
    if a >= exact:
        growth = exact * math.log(a / exact) / math.log(config.relative_max_distance / exact)
        a = min(half - 1, exact + math.floor(growth))
    return a + (half if distance > 0 else 0)


def nll(weights: Weights, x: Tensor, target: int, config: ModelConfig) -> Tensor:
    """Negative log-likelihood of `target` at a slot, over the vocabulary without padding rows."""
    h = norm(gelu(affine(x, weights, "head.dense")), weights, "head.norm", config)
    logits = [
        (weights["embeddings.token.weight"][v] * h).sum() + weights["head.bias"][v]
        for v in range(config.vocab_size or 0)
    ]
    return torch.stack(logits).exp().sum().log() - logits[target]


def affine(x: Tensor, weights: Weights, name: str) -> Tensor:
    """W x + b."""
    return weights[f"{name}.weight"] @ x + weights[f"{name}.bias"]


def gelu(x: Tensor) -> Tensor:
    """x Phi(x), with the error function."""
    return x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))


def norm(x: Tensor, weights: Weights, name: str, config: ModelConfig) -> Tensor:
    """LayerNorm."""
    centered = x - x.mean()
    scaled = centered / (centered.square().mean() + config.layer_norm_eps).sqrt()
    return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]
