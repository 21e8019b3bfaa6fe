"""The language model with a task head on its hidden states, for classification and span tasks.

    SlotInputs [B, T] --PseudoMaskedLM.encode: all context--> [T, B, E] --pool--> [B, E] --head--> [B, C]
                                                                       --head--> [B, T, C]

It contains the whole language model, so checkpoints of both differ in `task_head.*` only.

Legend: B batch, T tokens, E hidden size, C outputs of the head.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from pmlm_dist.config import ModelConfig
from pmlm_dist.masking.layout import SlotInputs
from pmlm_dist.model.transformer import PseudoMaskedLM
from pmlm_dist.parallel.layers import tp_size

TASK_HEAD = "task_head."
"""Prefix of the names of a task head's parameters."""

Pooling = Literal["mean", "cls", "none"]


class TaskHead(nn.Module):
    """Outputs for a text through a dense layer with tanh, from the mean of its states or [CLS]; or for every token.

    Tensor-parallel ranks hold equal copies.
    """

    def __init__(self, config: ModelConfig, *, outputs: int, pooling: Pooling):
        super().__init__()
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.pooling: Pooling = pooling
        self.dense = _linear(config, config.hidden_size) if pooling != "none" else None
        self.output = _linear(config, outputs)

    def forward(self, x_TBE: Tensor, valid_BT: Tensor) -> Tensor:
        """States [T, B, E], of which those of `valid_BT` are tokens -> [B, C] or [B, T, C]."""
        if self.dense is None:
            return self.output(self.dropout(x_TBE)).transpose(0, 1)
        x_BE = mean_of_valid(x_TBE, valid_BT) if self.pooling == "mean" else x_TBE[0]
        return self.output(self.dropout(torch.tanh(self.dense(self.dropout(x_BE)))))


def mean_of_valid(x_TBE: Tensor, valid_BT: Tensor) -> Tensor:
    """Mean [B, E] of the states [T, B, E] of each text's tokens, special tokens included."""
    valid_TB1 = valid_BT.t().unsqueeze(-1).to(x_TBE.dtype)
    return (x_TBE * valid_TB1).sum(0) / valid_TB1.sum(0)


def _linear(config: ModelConfig, size_out: int) -> nn.Linear:
    layer = nn.Linear(config.hidden_size, size_out)
    nn.init.normal_(layer.weight, 0.0, config.initializer_range)
    nn.init.zeros_(layer.bias)
    return layer


class TaskModel(PseudoMaskedLM):
    """`PseudoMaskedLM` with a task head: `model(inputs=context_inputs(...))`."""

    def __init__(self, config: ModelConfig, *, padded_vocab_size: int, outputs: int, pooling: Pooling):
        assert padded_vocab_size % tp_size() == 0
        super().__init__(config, padded_vocab_size=padded_vocab_size)
        self.task_head = TaskHead(config, outputs=outputs, pooling=pooling)

    def forward(self, *, inputs: SlotInputs[Tensor], **options: Any) -> Tensor | tuple[Tensor, Tensor]:
        """Outputs of the head; for inputs with `predicted_BM` those of the language model."""
        if inputs.predicted_BM is not None:
            return super().forward(inputs=inputs, **options)
        # A pre-trained model may have one segment type only (MPNet has none): its texts all use it.
        segments_BT = inputs.segments_BT.clamp(max=self.config.segment_types - 1)
        return self.task_head(self.encode(inputs._replace(segments_BT=segments_BT)), inputs.valid_BT)
