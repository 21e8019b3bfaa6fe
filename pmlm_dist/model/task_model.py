"""The language model with a fresh head on its hidden states, for tasks of understanding.

    tokens, positions, segments [B, T] --PseudoMaskedLM.encode: all context--> [T, B, E] --head--> [B, C] | [B, T, C]

Called as the language model it still is that, so that checkpoints of both are alike but for `task_head.*`.

Legend: B batch, T tokens, E hidden size, C outputs of the head.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from pmlm_dist.config import ModelConfig
from pmlm_dist.model.transformer import PseudoMaskedLM
from pmlm_dist.parallel.layers import tp_size

TASK_HEAD = "task_head."
"""What the names of a task head's parameters begin with."""

Reads = Literal["first", "all"]


class TaskHead(nn.Module):
    """Outputs from hidden states: of [CLS] through a dense layer with tanh ("first"), or of every token ("all").

    Tensor-parallel ranks hold equal copies.
    """

    def __init__(self, config: ModelConfig, *, outputs: int, objectives: Reads):
        super().__init__()
        self.objectives = objectives
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.dense = _linear(config, config.hidden_size) if objectives == "first" else None
        self.output = _linear(config, outputs)

    def forward(self, x_TBE: Tensor) -> Tensor:
        """[T, B, E] -> [B, C] or [B, T, C]."""
        if self.dense is None:
            return self.output(self.dropout(x_TBE)).transpose(0, 1)
        return self.output(self.dropout(torch.tanh(self.dense(self.dropout(x_TBE[0])))))


def _linear(config: ModelConfig, size_out: int) -> nn.Linear:
    layer = nn.Linear(config.hidden_size, size_out)
    nn.init.normal_(layer.weight, 0.0, config.initializer_range)
    nn.init.zeros_(layer.bias)
    return layer


class TaskModel(PseudoMaskedLM):
    """`PseudoMaskedLM` that also answers with its task head: `model(tokens_BT, segments_BT=..., valid_BT=...)`."""

    def __init__(self, config: ModelConfig, *, padded_vocab_size: int, outputs: int, objectives: Reads):
        assert padded_vocab_size % tp_size() == 0
        super().__init__(config, padded_vocab_size=padded_vocab_size)
        self.task_head = TaskHead(config, outputs=outputs, objectives=objectives)

    def forward(self, tokens_BT: Tensor, **inputs: Any) -> Tensor | tuple[Tensor, Tensor]:
        """The head's outputs; with `predicted_BM` among the inputs what the language model gives."""
        if "predicted_BM" in inputs:
            return super().forward(tokens_BT, **inputs)
        return self.task_head(self._context(tokens_BT, **inputs))

    def _context(self, tokens_BT: Tensor, *, segments_BT: Tensor, valid_BT: Tensor) -> Tensor:
        return self.encode(
            tokens_BT,
            positions_BT=torch.arange(tokens_BT.shape[1], device=tokens_BT.device).expand_as(tokens_BT),
            segments_BT=segments_BT.clamp(max=self.config.segment_types - 1),
            order_BT=torch.zeros_like(tokens_BT, dtype=torch.int32),
            valid_BT=valid_BT,
        )
