"""Batches: masks independent of the grouping into batches, and fingerprints that detect every change."""

import dataclasses
import pickle

import numpy as np
import pytest
import torch

from pmlm_dist.config import MaskingConfig
from pmlm_dist.data.batch import Batch, build_batch, special_ids
from pmlm_dist.masking.blockwise import SpecialIds
from pmlm_dist.vocabulary.vocabulary import Vocabulary

SPECIAL = SpecialIds(pad=0, cls=2, sep=3, mask=4, vocab_size=100, special=(0, 1, 2, 3, 4))
FIELDS = [field.name for field in dataclasses.fields(Batch)]


def sample(number: int) -> np.ndarray:
    words = np.random.default_rng(number).integers(5, 100, 20 + number % 10)
    return np.array([2, *words[:12], 3, *words[12:], 3], dtype=np.uint16)


def batch_of(numbers: list[int], *, epoch: int = 0, seed: int = 0, stop: str = "exact") -> Batch:
    return build_batch(
        [sample(number) for number in numbers],
        numbers,
        [epoch] * len(numbers),
        sequence_length=32,
        masking=MaskingConfig(stop=stop),  # pyright: ignore[reportArgumentType]
        special=SPECIAL,
        seed=seed,
    )


def test_batch_has_documented_shapes_and_types():
    batch = batch_of([3, 1, 2])
    assert (batch.num_context, batch.num_predictions) == (32, 5)
    expected = dict.fromkeys(["tokens_BT", "positions_BT", "segments_BT"], ((3, 42), torch.int64))
    expected |= {"order_BT": ((3, 42), torch.int32), "valid_BT": ((3, 42), torch.bool)}
    expected |= dict.fromkeys(["predicted_BM", "targets_BM"], ((3, 5), torch.int64))
    expected |= {"weights_BM": ((3, 5), torch.float32), "masked_BM": ((3, 5), torch.bool)}
    expected |= dict.fromkeys(["sample_ids_B", "epochs_B"], ((3,), torch.int64))
    assert {name: (tuple(getattr(batch, name).shape), getattr(batch, name).dtype) for name in FIELDS} == expected
    assert batch.sample_ids_B.tolist() == [3, 1, 2]


@pytest.mark.parametrize("stop", ["exact", "paper"])
def test_masks_are_independent_of_the_rest_of_the_batch(stop):
    whole = batch_of(list(range(12)), epoch=4, stop=stop)
    for size in (1, 3, 5):
        parts = [batch_of(list(range(12))[start : start + size], epoch=4, stop=stop) for start in range(0, 12, size)]
        for name in FIELDS:
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name)), name


def test_targets_restore_the_original_text():
    batch = batch_of(list(range(8)))
    restored = batch.tokens_BT[:, :32].clone()
    for row in range(8):
        used = batch.weights_BM[row] > 0
        restored[row, batch.predicted_BM[row, used]] = batch.targets_BM[row, used]
        assert restored[row, : len(sample(row))].tolist() == sample(row).tolist()
        assert (batch.tokens_BT[row, batch.predicted_BM[row]] == 4)[used].tolist() == batch.masked_BM[
            row, used
        ].tolist()


def test_fingerprint_is_stable_and_detects_every_changed_field():
    batch = batch_of([1, 2])
    assert batch.fingerprint() == batch_of([1, 2]).fingerprint()
    assert batch.fingerprint() == pickle.loads(pickle.dumps(batch)).fingerprint()
    assert -(2**63) <= batch.fingerprint() < 2**63
    changed = []
    for name in FIELDS:
        tensor = getattr(batch, name).clone()
        tensor.view(-1)[0] = ~tensor.view(-1)[0] if tensor.dtype == torch.bool else tensor.view(-1)[0] + 1
        changed.append(dataclasses.replace(batch, **{name: tensor}).fingerprint())
    assert len({batch.fingerprint(), *changed}) == len(FIELDS) + 1


def test_masks_differ_between_epochs_and_seeds():
    batches = [batch_of([5], epoch=epoch, seed=seed) for epoch in range(3) for seed in range(3)]
    assert len({tuple(batch.predicted_BM[0].tolist()) for batch in batches}) == 9


def test_batch_to_device_keeps_contents():
    batch = batch_of([1, 2])
    assert batch.to("cpu").fingerprint() == batch.fingerprint()
    assert batch.to("meta").tokens_BT.device.type == "meta"


def test_lists_of_unequal_length_raise():
    with pytest.raises(ValueError, match="2 samples, 1 sample ids and 2 epochs"):
        build_batch(
            [sample(0), sample(1)], [0], [0, 0], sequence_length=32, masking=MaskingConfig(), special=SPECIAL, seed=0
        )


def test_special_ids_are_those_of_the_vocabulary():
    vocabulary = Vocabulary.from_tokens(["[PAD]", "a", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[unused1]", "b"])
    assert special_ids(vocabulary) == SpecialIds(pad=0, cls=3, sep=4, mask=5, vocab_size=8, special=(0, 2, 3, 4, 5, 6))
