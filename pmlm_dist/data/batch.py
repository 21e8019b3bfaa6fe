"""Batch: the input of one forward pass, as named tensors of static shape.

    samples (token ids) --masking/--> Layout (arrays) --> Batch (tensors)

Shapes: B samples, S context slots, M predictions, T = S + 2M slots (context | originals | pseudo masks).
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pmlm_dist.config import MaskingConfig
from pmlm_dist.masking.blockwise import SpecialIds, mask_rule, max_predictions
from pmlm_dist.masking.layout import SlotInputs, build_layout, empty_layout
from pmlm_dist.vocabulary.vocabulary import Vocabulary


@dataclass(frozen=True, eq=False)
class Batch:
    """Samples after masking and layout: the fields of `Layout` (`masking/layout.py`) as tensors, then their source."""

    tokens_BT: torch.Tensor
    positions_BT: torch.Tensor
    segments_BT: torch.Tensor
    order_BT: torch.Tensor
    valid_BT: torch.Tensor
    predicted_BM: torch.Tensor
    targets_BM: torch.Tensor
    weights_BM: torch.Tensor
    masked_BM: torch.Tensor
    sample_ids_B: torch.Tensor
    """Number of each sample in its split, int64."""
    epochs_B: torch.Tensor
    """Epoch in which each sample is read, int64."""

    @property
    def num_context(self) -> int:
        """S: context slots of a sample."""
        return self.tokens_BT.shape[1] - 2 * self.num_predictions

    @property
    def num_predictions(self) -> int:
        """M: prediction slots of a sample."""
        return self.predicted_BM.shape[1]

    @property
    def kept_BM(self) -> torch.Tensor:
        """Whether the base slot of a prediction holds the original token, bool."""
        return self.tokens_BT.gather(1, self.predicted_BM) == self.targets_BM

    @property
    def prefix_BM(self) -> torch.Tensor:
        """Whether a prediction has no base slot, as in prefix samples, bool."""
        return ~self.valid_BT.gather(1, self.predicted_BM)

    @property
    def inputs(self) -> SlotInputs[torch.Tensor]:
        """The model's input: no targets, no weights."""
        return SlotInputs.of(self._tensors())

    def to(self, device: torch.device | str) -> Batch:
        """Copy the batch to `device`; copies from pinned memory are asynchronous."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        return self._map(torch.Tensor.pin_memory)

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the tensors by name as NumPy arrays that share their memory; CPU only."""
        return {name: tensor.numpy() for name, tensor in self._tensors().items()}

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray]) -> Batch:
        """Return the batch of `arrays`, which share its memory."""
        return cls(**{name: torch.from_numpy(array) for name, array in arrays.items()})

    def fingerprint(self) -> int:
        """Return a signed 64-bit hash of names, types, shapes and contents; copies to the CPU."""
        digest = hashlib.blake2b(digest_size=8)
        for name, tensor in self._tensors().items():
            array = np.ascontiguousarray(tensor.cpu().numpy())
            digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
            digest.update(array.tobytes())
        return int.from_bytes(digest.digest(), "little", signed=True)

    def _tensors(self) -> dict[str, torch.Tensor]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        return Batch(**{name: function(tensor) for name, tensor in self._tensors().items()})


def special_ids(vocabulary: Vocabulary) -> SpecialIds:
    """Return the special ids and the size of `vocabulary` for masking."""
    return SpecialIds(
        pad=vocabulary.pad_id,
        cls=vocabulary.cls_id,
        sep=vocabulary.sep_id,
        mask=vocabulary.mask_id,
        vocab_size=vocabulary.size,
        special=tuple(vocabulary.special_ids),
    )


def build_batch(
    samples: Sequence[np.ndarray],
    sample_ids: Sequence[int],
    epochs: Sequence[int],
    *,
    sequence_length: int,
    masking: MaskingConfig,
    special: SpecialIds,
    seed: int,
) -> Batch:
    """Mask and lay out `samples` on the CPU.

    `samples`: token ids [n] with [CLS] and [SEP], n <= `sequence_length`. The masks of a sample are a function of
    (`seed`, epoch, sample id), independent of the rest of the batch. Raises ValueError for a sample that is too long.
    """
    if not len(samples) == len(sample_ids) == len(epochs) > 0:
        raise ValueError(
            f"{len(samples)} samples, {len(sample_ids)} sample ids and {len(epochs)} epochs: one of each per sample"
        )
    ids_B, epochs_B = np.array(sample_ids, dtype=np.int64), np.array(epochs, dtype=np.int64)
    layout = empty_layout(
        len(samples),
        sequence_length=sequence_length,
        num_predictions=max_predictions(sequence_length, masking),
        pad_id=special.pad,
    )
    rule = mask_rule(masking, special)
    build_layout(samples, sample_ids=ids_B, epochs=epochs_B, seed=seed, rule=rule, layout=layout)
    tensors = {name: torch.from_numpy(array) for name, array in layout._asdict().items()}
    return Batch(**tensors, sample_ids_B=torch.from_numpy(ids_B), epochs_B=torch.from_numpy(epochs_B))
