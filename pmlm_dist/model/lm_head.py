"""Language model head: from hidden states to logits or losses.

Legend: R predicted slots, B batch, E hidden size, V vocabulary rows of this tensor-parallel rank.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pmlm_dist.config import ModelConfig
from pmlm_dist.parallel.cross_entropy import smoothing_nll, tied_cross_entropy, tied_logits
from pmlm_dist.parallel.layers import sharded, tp_rank, tp_size


class TiedHead(nn.Module):
    """Dense, GELU, LayerNorm, tied token embedding, bias: one head for both objectives.

    Rows that pad the vocabulary have a logit of minus infinity: their probability and their gradient are zero.
    """

    def __init__(self, config: ModelConfig, *, padded_vocab_size: int):
        super().__init__()
        assert config.vocab_size is not None
        self.vocab_size = config.vocab_size
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        nn.init.normal_(self.dense.weight, 0.0, config.initializer_range)
        nn.init.zeros_(self.dense.bias)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.bias = sharded(torch.zeros(padded_vocab_size))  # [V]
        # Apart from the bias, so that all parameters stay finite. Not saved: it follows from the sizes.
        padding = torch.zeros(padded_vocab_size)
        padding[config.vocab_size :] = float("-inf")
        self.padding: Tensor
        self.register_buffer("padding", sharded(padding).data, persistent=False)

    @torch.no_grad()
    def set_bias(self, bias_V: Tensor) -> None:
        """Set the bias of all `vocab_size` tokens; every rank passes the same tensor."""
        rows = torch.arange(len(self.bias)) + tp_rank() * len(self.bias)
        self.bias.copy_(F.pad(bias_V, (0, tp_size() * len(self.bias) - len(bias_V)))[rows])

    def forward(
        self, x_RBE: Tensor, embedding_VE: Tensor, targets_RB: Tensor | None = None, *, label_smoothing: float = 0.0
    ) -> Tensor | tuple[Tensor, Tensor]:
        """[R, B, E] -> logits [R, B, V]. With targets: their losses [R, B] in nats, and where argmax is correct [R, B].

        `label_smoothing`: share of the uniform distribution in the targets of the losses.
        """
        h_RBE = self.norm(F.gelu(self.dense(x_RBE)))
        bias_V = self.bias + self.padding.to(self.bias.dtype)
        if targets_RB is None:
            return tied_logits(h_RBE, embedding_VE, bias_V)
        loss_RB, correct_RB = tied_cross_entropy(h_RBE, embedding_VE, bias_V, targets_RB)
        if label_smoothing:
            added_RB = smoothing_nll(h_RBE, embedding_VE, bias_V, targets_RB, vocab_size=self.vocab_size)
            loss_RB = loss_RB + label_smoothing * added_RB
        return loss_RB, correct_RB
