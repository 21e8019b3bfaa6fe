"""Parameter counts of the model, sharded over or replicated on the tensor-parallel ranks.

sharded      queries, keys, values, both products of the feed-forward network, vocabulary rows, relative positions
replicated   LayerNorm, biases of row-parallel layers, positions, segments, the head's dense layer
"""

from __future__ import annotations

from dataclasses import dataclass

from pmlm_dist.config import ModelConfig
from pmlm_dist.planning.workload import Workload


@dataclass(frozen=True)
class Parameters:
    """Parameter count of a part of the model, over all tensor-parallel ranks."""

    sharded: int
    replicated: int

    @property
    def total(self) -> int:
        """Parameters of the part, each counted once."""
        return self.sharded + self.replicated

    def on_rank(self, tp: int) -> int:
        """Parameters that one of `tp` ranks holds."""
        return self.sharded // tp + self.replicated

    def __add__(self, other: Parameters) -> Parameters:
        return Parameters(self.sharded + other.sharded, self.replicated + other.replicated)


def layer_parameters(model: ModelConfig) -> Parameters:
    """One Transformer layer: matrices of 4 E^2 + 2 E F, biases and LayerNorm."""
    size, inner = model.hidden_size, model.ffn_size
    queries_keys_values = 3 * (size * size + size)
    network_in = size * inner + inner
    outputs = size * size + inner * size
    output_biases, norms = 2 * size, 4 * size
    return Parameters(queries_keys_values + network_in + outputs, output_biases + norms)


def embedding_parameters(work: Workload) -> Parameters:
    """Tokens, positions, segments, LayerNorm and the table of relative positions."""
    model = work.model
    relative = model.num_heads * model.relative_buckets if model.relative_bias else 0
    rows = model.max_positions + model.segment_types + 2
    return Parameters(work.padded_vocabulary * model.hidden_size + relative, rows * model.hidden_size)


def head_parameters(work: Workload) -> Parameters:
    """Dense layer, LayerNorm, bias over the vocabulary; the output matrix is tied to the token embedding."""
    size = work.model.hidden_size
    return Parameters(work.padded_vocabulary, size * size + 3 * size)


def model_parameters(work: Workload) -> Parameters:
    """The whole model, including the rows that pad the vocabulary."""
    layers, layer = work.model.num_layers, layer_parameters(work.model)
    all_layers = Parameters(layers * layer.sharded, layers * layer.replicated)
    return embedding_parameters(work) + all_layers + head_parameters(work)


def largest_tensor(work: Workload) -> int:
    """Elements of the largest parameter of a rank: the token embedding or a matrix of the feed-forward network."""
    size, inner = work.model.hidden_size, work.model.ffn_size
    return max(work.vocabulary * size, 2 * size * size // work.tp, size * inner // work.tp)


def persistent_numbers(work: Workload, *, threshold: int) -> int:
    """Elements in parameters of at most `threshold` elements a rank, which ZeRO-3 does not partition.

    DeepSpeed calls them persistent (`stage3_param_persistence_threshold`).
    """
    model, tp = work.model, work.tp
    size, inner = model.hidden_size, model.ffn_size // tp
    own = size // tp
    norms_and_biases = [*[size] * 6, own, 2 * own, inner]
    matrices = [size * own, 2 * size * own, size * own, size * inner, size * inner]
    tables = [rows * size for rows in (work.vocabulary, model.max_positions, model.segment_types)]
    outside = [*[size] * 5, size * size, *tables, work.vocabulary]
    return sum(numel for numel in outside if numel <= threshold) + model.num_layers * sum(
        numel for numel in norms_and_biases + matrices if numel <= threshold
    )
