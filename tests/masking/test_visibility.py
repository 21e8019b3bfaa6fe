"""The visibility rule against a longhand table of its cases, and its consequences."""

import numpy as np
import pytest
import torch

from pmlm_dist.config import MaskingConfig
from pmlm_dist.masking.blockwise import SpecialIds, mask_rule, max_predictions
from pmlm_dist.masking.layout import Layout, build_layout, empty_layout
from pmlm_dist.masking.visibility import visibility_matrix, visible

ORDERS = list(range(-6, 7))


def longhand_visible(query: int, key: int) -> bool:
    """Table of query and key kinds: context, original, pseudo mask."""

    def kind(order: int) -> str:
        return "context" if order == 0 else "original" if order > 0 else "pseudo"

    k, j = abs(query), abs(key)
    match kind(query), kind(key):
        case _, "context":
            return True
        case "original", "original":
            return j <= k
        case "pseudo", "original":
            return j < k
        case "pseudo", "pseudo":
            return j == k
    return False


@pytest.mark.parametrize("query", ORDERS)
@pytest.mark.parametrize("key", ORDERS)
def test_visible_equals_longhand_for_every_pair(query, key):
    expected = longhand_visible(query, key)
    assert bool(visible(np.int32(query), np.int32(key))) is expected  # pyright: ignore[reportArgumentType]
    assert bool(visible(torch.tensor(query), torch.tensor(key))) is expected


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.int64])
def test_torch_and_numpy_matrices_agree(dtype):
    order = np.array([[0, 0, 1, 1, 2, -1, -1, -2], [0, 1, 2, 3, 0, -1, -2, -3]])
    valid = order != 3
    expected = [[[longhand_visible(q, k) and k != 3 for k in row] for q in row] for row in order.tolist()]
    assert visibility_matrix(order, valid).tolist() == expected
    assert visibility_matrix(torch.tensor(order, dtype=dtype), torch.tensor(valid)).tolist() == expected


@pytest.fixture(scope="module")
def layout() -> Layout:
    """Eight samples, some short, with [MASK] in every base slot and some unused prediction slots."""
    masking = MaskingConfig(stop="paper", corruption="mask_only")
    layout = empty_layout(8, sequence_length=32, num_predictions=max_predictions(32, masking), pad_id=0)
    build_layout(
        [np.array([2, *range(5, 5 + length // 2), 3, *range(30, 30 + length // 2), 3]) for length in range(14, 30, 2)],
        sample_ids=np.arange(8),
        epochs=np.zeros(8, np.int64),
        seed=0,
        rule=mask_rule(masking, SpecialIds(pad=0, cls=2, sep=3, mask=4, vocab_size=60, special=(0, 1, 2, 3, 4))),
        layout=layout,
    )
    return layout


def test_pseudo_mask_never_reaches_its_target_over_any_number_of_layers(layout):
    """The transitive closure of visibility bounds the flow of information over any number of layers."""
    for order, valid in zip(layout.order_BT, layout.valid_BT, strict=True):
        reach = visibility_matrix(order, valid)
        for _ in range(len(order).bit_length()):
            reach = reach | (reach @ reach)
        for query in np.flatnonzero(order < 0):
            assert not reach[query, order >= -order[query]].any()
            others = (order < 0) & (order != order[query])
            assert not reach[query, others].any()
        assert not reach[np.ix_(order == 0, order != 0)].any()
        assert not reach[np.ix_(order > 0, order < 0)].any()


def test_padding_is_invisible_and_every_query_has_a_visible_key(layout):
    matrix = visibility_matrix(layout.order_BT, layout.valid_BT)
    assert not layout.valid_BT.all()
    assert not matrix.swapaxes(1, 2)[~layout.valid_BT].any()
    assert matrix.any(axis=2).all()


def test_valid_slots_are_visible_to_themselves(layout):
    matrix = visibility_matrix(layout.order_BT, layout.valid_BT)
    assert (np.diagonal(matrix, axis1=1, axis2=2) == layout.valid_BT).all()
