"""Runs of slices: whatever cut a tensor, the pieces tile it, and any run is found again in any other cut."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pmlm_dist.checkpoint.fragments import Fragment, coverage_problems, overlaps


@st.composite
def cuts(draw: st.DrawFn, shape: tuple[int, ...]) -> list[Fragment]:
    """A tensor cut along a dimension, each slice into runs at random places; in no order."""
    dim = draw(st.integers(0, len(shape) - 1))
    parts = draw(st.sampled_from([n for n in (1, 2, 4) if shape[dim] % n == 0]))
    size, pieces = shape[dim] // parts, []
    for number in range(parts):
        whole = Fragment.whole("w", shape, dim=dim)
        part = replace(whole, first=number * size, last=(number + 1) * size)
        numel = part.slice_numel
        inner = sorted(draw(st.sets(st.integers(1, numel - 1), max_size=4))) if numel > 1 else []
        pieces += [replace(part, start=a, stop=b) for a, b in itertools.pairwise([0, *inner, numel])]
    return draw(st.permutations(pieces))


SHAPES = st.lists(st.integers(1, 8), min_size=1, max_size=3).map(tuple)
SHAPE_AND_CUTS = SHAPES.flatmap(lambda shape: st.tuples(st.just(shape), cuts(shape), cuts(shape)))


def numbers_of(fragment: Fragment) -> np.ndarray:
    """The numbers at a placement when the whole tensor counts from 0, found by numpy's own slicing."""
    whole = np.arange(math.prod(fragment.shape)).reshape(fragment.shape)
    part = whole.take(range(fragment.first_row, fragment.last_row), axis=fragment.dim)
    return part.reshape(-1)[fragment.start : fragment.stop]


def places(at: int, stride: int, rows: int, columns: int) -> Iterator[int]:
    return (at + row * stride + column for row in range(rows) for column in range(columns))


def gathered(target: Fragment, sources: list[Fragment]) -> np.ndarray:
    """The numbers at `target`, each taken once from one of `sources`; -1 where none has it."""
    found = np.full(target.numel, -1)
    for source in sources:
        numbers = numbers_of(source)
        for part in overlaps(source, target):
            for there, here in zip(
                places(part.source_at, part.source_stride, part.rows, part.columns),
                places(part.target_at, part.target_stride, part.rows, part.columns),
                strict=True,
            ):
                assert found[here] == -1, "found twice"
                found[here] = numbers[there]
    return found


def can_meet(source: Fragment, target: Fragment) -> bool:
    """Not cut along two different dimensions, as no tensor is."""
    spans = [fragment.last_row - fragment.first_row == fragment.shape[fragment.dim] for fragment in (source, target)]
    return source.dim == target.dim or any(spans)


@given(SHAPE_AND_CUTS)
@settings(max_examples=500, deadline=None)
def test_any_run_is_put_together_from_any_cut(case: tuple[tuple[int, ...], list[Fragment], list[Fragment]]):
    _, sources, targets = case
    for target in targets:
        if all(can_meet(source, target) for source in sources):
            assert np.array_equal(gathered(target, sources), numbers_of(target))


@given(SHAPE_AND_CUTS)
@settings(max_examples=200, deadline=None)
def test_a_cut_covers_its_tensor_and_no_longer_when_anything_is_amiss(
    case: tuple[tuple[int, ...], list[Fragment], list[Fragment]],
):
    _, pieces, _ = case
    assert coverage_problems(pieces) == []
    for number, piece in enumerate(pieces):
        others = pieces[:number] + pieces[number + 1 :]
        assert not others or coverage_problems(others), "one is missing"
        assert coverage_problems([*pieces, piece]), "one is there twice"
        if piece.numel > 1:
            assert coverage_problems([*others, replace(piece, stop=piece.stop - 1)]), "one is too short"


def test_parts_that_disagree_about_the_tensor_are_named():
    first, second = Fragment.whole("a", (4, 2)), Fragment.whole("a", (2, 4))
    assert coverage_problems([first, second]) == ["parts of a disagree about its shape"]
    assert coverage_problems([first, Fragment.whole("b", (3,))]) == []


@given(SHAPES.flatmap(cuts), st.integers(1, 9))
@settings(max_examples=200, deadline=None)
def test_shares_are_even_and_make_up_the_run(pieces: list[Fragment], parts: int):
    for piece in pieces:
        shares = [share for part in range(parts) if (share := piece.share(part, parts)) is not None]
        assert sum(share.numel for share in shares) == piece.numel
        assert max(share.numel for share in shares) - piece.numel // parts <= 1
        assert [share.start for share in shares] == [piece.start, *(share.stop for share in shares[:-1])]


def test_rows_that_pad_may_differ_in_number():
    """A vocabulary of 5 rows of 2, padded to 8 in the checkpoint and to 6 in the model."""
    source, target = (Fragment.whole("w", (rows, 2), used_rows=5) for rows in (8, 6))
    (part,) = overlaps(source, target)
    assert (part.columns, part.source_at, part.target_at) == (12, 0, 0)
    (part,) = overlaps(target, source)
    assert part.columns == 12


@given(SHAPES.flatmap(cuts))
def test_json_there_and_back(pieces: list[Fragment]):
    for piece in pieces:
        assert Fragment.from_json(json.loads(json.dumps(piece.as_json()))) == piece


SOUND: dict[str, Any] = Fragment.whole("w", (4, 2)).as_json()


@pytest.mark.parametrize(
    "change",
    [
        *({"stop": 9}, {"start": -1}, {"start": 8}, {"first": 4}, {"last": 5}, {"dim": 2}, {"dim": -1}, {"shape": []}),
        *({"shape": [0, 2]}, {"shape": 3}, {"shape": [4.0, 2]}, {"used_rows": 5}, {"used_rows": 0}, {"name": 3}),
        *({"start": "0"}, {"start": True}, {"more": 1}, {"shape": [4, None]}),
    ],
)
def test_what_describes_no_run_is_refused(change: dict[str, Any]):
    with pytest.raises(ValueError, match="describes no part of a tensor"):
        Fragment.from_json({**SOUND, **change})


def test_a_missing_field_is_refused():
    for name in SOUND:
        with pytest.raises(ValueError, match="describes no part of a tensor"):
            Fragment.from_json({key: value for key, value in SOUND.items() if key != name})
