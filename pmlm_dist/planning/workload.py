"""Sizes of one micro-batch on one rank: the variables of the formulas for memory, time and communication.

Legend: S context slots, M predictions, A = 2M appended slots, T = S + A slots, R predicted slots, B samples, E hidden
size, F inner size, H heads, V padded vocabulary rows, t tensor-parallel size.
"""

from dataclasses import dataclass
from typing import Literal

from pmlm_dist.config import ModelConfig
from pmlm_dist.metrics.flops import forward_flops

Precision = Literal["fp32", "bf16", "fp16"]
ELEMENT: dict[str, int] = {"fp32": 4, "bf16": 2, "fp16": 2}
"""Bytes of a weight or an activation."""
VOCABULARY_MULTIPLE = 128


@dataclass(frozen=True)
class Workload:
    """Shape of the model and of a rank's micro-batch."""

    model: ModelConfig
    context: int
    predictions: int
    micro_batch: int
    objectives: tuple[str, ...] = ("ae", "par")
    tp: int = 1
    precision: Precision = "bf16"
    on_accelerator: bool = True

    @property
    def attention(self) -> str:
        """Attention backend on this device."""
        return self.model.attention_on(accelerator=self.on_accelerator)

    @property
    def element(self) -> int:
        """Bytes of a weight or an activation."""
        return ELEMENT[self.precision]

    @property
    def appended(self) -> int:
        """A: slots of original tokens and pseudo masks; 0 without the PAR objective."""
        return 2 * self.predictions if "par" in self.objectives else 0

    @property
    def slots(self) -> int:
        """T: slots of a sample."""
        return self.context + self.appended

    @property
    def predicted_slots(self) -> int:
        """R: slots of a sample whose tokens the head predicts."""
        return len(self.objectives) * self.predictions

    @property
    def tokens(self) -> int:
        """T * B: slots of the micro-batch."""
        return self.slots * self.micro_batch

    @property
    def predicted_tokens(self) -> int:
        """R * B: predicted slots of the micro-batch."""
        return self.predicted_slots * self.micro_batch

    @property
    def heads(self) -> int:
        """H / t: heads of this rank."""
        return self.model.num_heads // self.tp

    @property
    def padded_vocabulary(self) -> int:
        """V: rows of the token embedding over all tensor-parallel ranks."""
        assert self.model.vocab_size is not None
        return -(-self.model.vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE

    @property
    def vocabulary(self) -> int:
        """V / t: rows of this rank."""
        return self.padded_vocabulary // self.tp

    @property
    def inner_pairs(self) -> int:
        """Query-key pairs of an inner layer, over the micro-batch and this rank's heads."""
        pairs = self.context**2 + self.appended * self.slots
        return self.heads * self.micro_batch * (self.slots**2 if self.attention == "reference" else pairs)

    @property
    def last_pairs(self) -> int:
        """Query-key pairs of the last layer, whose queries are the predicted slots only."""
        keys = {"ae": self.slots if self.attention == "reference" else self.context, "par": self.slots}
        return self.heads * self.micro_batch * self.predictions * sum(keys[name] for name in self.objectives)

    @property
    def sample_flops(self) -> float:
        """FLOPs of one sample's forward pass over all tensor-parallel ranks."""
        return forward_flops(
            self.model,
            context=self.context,
            predictions=self.predictions,
            vocab_rows=self.padded_vocabulary,
            objectives=self.objectives,
        )

    @property
    def layer_flops(self) -> float:
        """FLOPs of one sample's forward pass without the head."""
        size = self.model.hidden_size
        return self.sample_flops - self.predicted_slots * 2.0 * size * (size + self.padded_vocabulary)
