"""The pseudo-masked language model: BERT's post-LN Transformer over context, originals and pseudo masks.

    SlotInputs [B, T] --Embeddings--> x [T, B, E] --layers--> x --last layer--> predicted slots [R, B, E]
                                                                                    --head--> logits [R, B, V]

Activations are sequence first, so that context, originals and pseudo masks are contiguous slices. The last layer
computes keys and values for all slots, but queries, output and feed-forward network for the predicted slots only.

Legend: B batch, T slots (S context + 2M appended), R predicted slots (K objectives * M predictions), Q queries,
E hidden size, H heads of this rank, D head size, V vocabulary rows of this rank.
"""

from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pmlm_dist.config import ModelConfig
from pmlm_dist.masking.layout import SlotInputs
from pmlm_dist.model.attention import Groups, Slots, attention_backend
from pmlm_dist.model.elementwise import ResidualNorm, linear_gelu
from pmlm_dist.model.lm_head import TiedHead
from pmlm_dist.model.relative_position import RelativeBias
from pmlm_dist.model.triton_attention import BlockGroup
from pmlm_dist.parallel.layers import ColumnLinear, RowLinear, VocabularyEmbedding, joint_linear, tp_size
from pmlm_dist.parallel.seeding import distinct_across_tp


class Embeddings(nn.Module):
    """Sum of token, position and segment embeddings, LayerNorm, dropout."""

    def __init__(self, config: ModelConfig, *, padded_vocab_size: int):
        super().__init__()
        std = config.initializer_range
        self.token = VocabularyEmbedding(padded_vocab_size, config.hidden_size, std=std)
        self.position = nn.Embedding(config.max_positions, config.hidden_size)
        self.segment = nn.Embedding(config.segment_types, config.hidden_size)
        for table in (self.position, self.segment):
            nn.init.normal_(table.weight, 0.0, std)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, tokens_TB: Tensor, positions_TB: Tensor, segments_TB: Tensor) -> Tensor:
        """Three tensors [T, B] -> [T, B, E]."""
        x_TBE = self.token(tokens_TB) + self.position(positions_TB) + self.segment(segments_TB)
        return self.dropout(self.norm(x_TBE))


class SelfAttention(nn.Module):
    """Multi-head attention over query groups; heads are split over the tensor-parallel ranks."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        size, std = config.hidden_size, config.initializer_range
        self.config, self.head_dim = config, config.head_dim
        self.query = ColumnLinear(size, size, std=std)
        # Rows ordered [heads, key | value, head size]: a slice over tensor-parallel ranks then holds whole heads.
        self.key_value = ColumnLinear(size, 2 * size, std=std)
        self.output = RowLinear(size, size, std=config.residual_range)

    def forward(self, x_TBE: Tensor, queries_QBE: Tensor | None, groups: Groups) -> Tensor:
        """Keys and values from `x` [T, B, E], queries from [Q, B, E] (None: `x`) -> mixed values [Q, B, E/tp]."""
        dropout = self.config.attention_dropout if self.training else 0.0
        attend, by_kernels = attention_backend(self.config, x_TBE.device).attend, isinstance(groups[0], BlockGroup)
        if by_kernels:  # they add the biases, and sum their gradients
            attend = partial(attend, q_bias=self.query.bias, kv_bias=self.key_value.bias)
        if by_kernels and queries_QBE is None:
            q_QBHD = joint_linear((self.query, self.key_value), x_TBE).unflatten(-1, (-1, self.head_dim))
            kv_TBH2D = None
        else:
            queries_QBE = x_TBE if queries_QBE is None else queries_QBE
            q_QBHD = self.query(queries_QBE, add_bias=not by_kernels).unflatten(-1, (-1, self.head_dim))
            kv_TBH2D = self.key_value(x_TBE, add_bias=not by_kernels).unflatten(-1, (-1, 2, self.head_dim))
        # Ranks hold different heads, so they must not drop the same probabilities.
        with distinct_across_tp() if dropout else nullcontext():
            mixed_QBHD = attend(q_QBHD, kv_TBH2D, groups, dropout=dropout)
        return mixed_QBHD.flatten(2)


class Layer(nn.Module):
    """Post-LN Transformer layer: attention, then feed-forward network, each with residual and LayerNorm."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        std = config.initializer_range
        self.attention = SelfAttention(config)
        norm = partial(ResidualNorm, config.hidden_size, eps=config.layer_norm_eps, dropout=config.hidden_dropout)
        self.attention_norm = norm()
        self.ffn_in = ColumnLinear(config.hidden_size, config.ffn_size, std=std)
        self.ffn_out = RowLinear(config.ffn_size, config.hidden_size, std=config.residual_range)
        self.ffn_norm = norm()

    def forward(self, x_TBE: Tensor, residual_QBE: Tensor, groups: Groups) -> tuple[Tensor, Tensor]:
        """New states [Q, B, E] of some slots, or of all, which attend to `x` [T, B, E]; twice, as `ResidualNorm`.

        `residual`: states of these slots, to be added to.
        """
        is_all = len(residual_QBE) == len(x_TBE)
        return self.after_attention(residual_QBE, self.attention(x_TBE, None if is_all else residual_QBE, groups))

    def after_attention(self, residual: Tensor, mixed: Tensor) -> tuple[Tensor, Tensor]:
        """Rest of the layer, for each slot: states [..., E] and mixed values of all heads [..., E/tp] -> new states."""
        y, residual = self.attention_norm(residual, self.attention.output, mixed)
        return self.ffn_norm(residual, self.ffn_out, linear_gelu(self.ffn_in, y))


class PseudoMaskedLM(nn.Module):
    """One network for autoencoding and partially autoregressive prediction."""

    def __init__(self, config: ModelConfig, *, padded_vocab_size: int):
        super().__init__()
        assert config.vocab_size is not None, "resolve the vocabulary size before building the model"
        self.config = config
        self.embeddings = Embeddings(config, padded_vocab_size=padded_vocab_size)
        self.relative_bias = None
        if config.relative_bias:
            self.relative_bias = RelativeBias(
                config.num_heads,
                buckets=config.relative_buckets,
                max_distance=config.relative_max_distance,
                std=config.initializer_range,
                local=config.initial_relative_bias == "local",
            )
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.head = TiedHead(config, padded_vocab_size=padded_vocab_size)

    def encode(self, inputs: SlotInputs[Tensor], *, objectives: tuple[str, ...] = ("ae", "par")) -> Tensor:
        """Hidden states of the predicted slots [R, B, E]: AE slots, then PAR slots.

        With `inputs.predicted_BM` the slots are context | originals | pseudo masks, T = S + 2M. Without it all T slots
        are context, and the hidden states of all of them are returned.
        """
        num_appended = 0 if inputs.predicted_BM is None else 2 * inputs.predicted_BM.shape[1]
        num_context = inputs.tokens_BT.shape[1] - num_appended
        if "par" not in objectives:  # AE slots are context, which never attends to appended slots
            inputs = _first_slots(inputs, num_context)
        slots = Slots(inputs, num_context=num_context, objectives=objectives)
        x_TBE = self.embeddings(inputs.tokens_BT.t(), inputs.positions_BT.t(), inputs.segments_BT.t())
        plan = attention_backend(self.config, x_TBE.device).plan(slots, self.relative_bias, x_TBE.dtype)
        residual_TBE = x_TBE
        *inner, last = self.layers
        for layer in inner:
            x_TBE, residual_TBE = self._run(layer, x_TBE, residual_TBE, plan.inner)
        return self._run(last, x_TBE, _take_slots(residual_TBE, slots.predicted_slots_BR()), plan.last)[0]

    def forward(
        self,
        *,
        inputs: SlotInputs[Tensor],
        targets_BM: Tensor | None = None,
        objectives: tuple[str, ...] = ("ae", "par"),
        label_smoothing: float = 0.0,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits of the predicted slots [K, M, B, V] for the K `objectives`: AE before PAR.

        With `targets_BM` return the targets' losses in nats and where argmax is correct, both [K, M, B]; the logits are
        then overwritten in place. `label_smoothing` applies to the losses.
        """
        # Keyword only: DeepSpeed's fp16 auto_cast rebuilds positional tuples and fails on a NamedTuple.
        x_RBE = self.encode(inputs, objectives=objectives)
        embedding_VE, shape = self.embeddings.token.weight, (len(objectives), -1)
        if targets_BM is None:
            return self.head(x_RBE, embedding_VE).unflatten(0, shape)
        targets_RB = targets_BM.t().repeat(len(objectives), 1)
        nll_RB, correct_RB = self.head(x_RBE, embedding_VE, targets_RB, label_smoothing=label_smoothing)
        return nll_RB.unflatten(0, shape), correct_RB.unflatten(0, shape)

    def _run(self, layer: nn.Module, x_TBE: Tensor, residual_QBE: Tensor, groups: Groups) -> tuple[Tensor, Tensor]:
        if not (self.config.activation_checkpointing and self.training and torch.is_grad_enabled()):
            return layer(x_TBE, residual_QBE, groups)

        def run_layer(x_TBE: Tensor, residual_QBE: Tensor, *biases: Tensor | None) -> Tensor:
            with_biases = (replace(group, bias=bias) for group, bias in zip(groups, biases, strict=True))
            return layer(x_TBE, residual_QBE, tuple(with_biases))[0]

        # Checkpointing returns gradients for arguments only, so the biases (from the shared table) are arguments.
        # Reentrant: ZeRO-3 gathers parameters in hooks, and the non-reentrant form rejects the change of shape.
        biases = (group.bias for group in groups)
        y_QBE: Any = checkpoint(run_layer, x_TBE, residual_QBE, *biases, use_reentrant=True)
        return y_QBE, y_QBE


def context_inputs(tokens_BT: Tensor, *, segments_BT: Tensor, valid_BT: Tensor) -> SlotInputs[Tensor]:
    """Input of texts without predicted positions: every slot is context."""
    return SlotInputs(
        tokens_BT=tokens_BT,
        positions_BT=torch.arange(tokens_BT.shape[1], device=tokens_BT.device).expand_as(tokens_BT),
        segments_BT=segments_BT,
        order_BT=torch.zeros_like(tokens_BT, dtype=torch.int32),
        valid_BT=valid_BT,
    )


def _first_slots(inputs: SlotInputs[Tensor], count: int) -> SlotInputs[Tensor]:
    """The first `count` slots, with the same predicted positions."""
    tensors = inputs._asdict()
    predicted_BM = tensors.pop("predicted_BM")
    return SlotInputs(**{name: slots_BT[:, :count] for name, slots_BT in tensors.items()}, predicted_BM=predicted_BM)


def _take_slots(x_TBE: Tensor, slots_BR: Tensor | None) -> Tensor:
    """Rows [R, B, E] of the slots of each sample; None: all slots."""
    if slots_BR is None:
        return x_TBE
    # One index_select over [T * B] rows: its backward pass is an index_add, cheaper than that of advanced indexing.
    num_slots, batch, _ = x_TBE.shape
    flat_RB = slots_BR.t() * batch + torch.arange(batch, device=slots_BR.device)
    return x_TBE.view(num_slots * batch, -1).index_select(0, flat_RB.flatten()).view(*flat_RB.shape, -1)


def build_model(config: ModelConfig, *, padded_vocab_size: int) -> PseudoMaskedLM:
    """Build the model of `config` with `padded_vocab_size` vocabulary rows, a multiple of the tensor-parallel size."""
    assert padded_vocab_size % tp_size() == 0
    return PseudoMaskedLM(config, padded_vocab_size=padded_vocab_size)
