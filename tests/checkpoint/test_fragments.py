"""Fragments: those of any topology tile their tensor, and each can be assembled from those of any other."""

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

from pmlm_dist.checkpoint.fragments import MAX_WRITERS, Fragment, coverage_problems, overlaps


@st.composite
def cuts(draw: st.DrawFn, shape: tuple[int, ...]) -> list[Fragment]:
    """Fragments of a tensor sliced along a dimension, each slice cut into ranges at random; in random order."""
    dim = draw(st.integers(0, len(shape) - 1))
    parts = draw(st.sampled_from([n for n in (1, 2, 4) if shape[dim] % n == 0]))
    size, fragments = shape[dim] // parts, []
    for number in range(parts):
        whole = Fragment.whole("w", shape, dim=dim)
        part = replace(whole, first_row=number * size, last_row=(number + 1) * size)
        numel = part.slice_numel
        inner = sorted(draw(st.sets(st.integers(1, numel - 1), max_size=4))) if numel > 1 else []
        fragments += [replace(part, start=a, stop=b) for a, b in itertools.pairwise([0, *inner, numel])]
    return draw(st.permutations(fragments))


SHAPES = st.lists(st.integers(1, 8), min_size=1, max_size=3).map(tuple)
SHAPE_AND_CUTS = SHAPES.flatmap(lambda shape: st.tuples(st.just(shape), cuts(shape), cuts(shape)))


def elements_of(fragment: Fragment) -> np.ndarray:
    """Elements of a fragment of the tensor 0, 1, 2, ..., by numpy's own slicing."""
    whole = np.arange(math.prod(fragment.shape)).reshape(fragment.shape)
    part = whole.take(range(fragment.first_row, fragment.last_row), axis=fragment.dim)
    return part.reshape(-1)[fragment.start : fragment.stop]


def offsets(start: int, stride: int, rows: int, columns: int) -> Iterator[int]:
    return (start + row * stride + column for row in range(rows) for column in range(columns))


def assembled(target: Fragment, sources: list[Fragment]) -> np.ndarray:
    """Elements of `target`, each copied once from one of `sources`; -1 where none has it."""
    elements = np.full(target.numel, -1)
    for source in sources:
        source_elements = elements_of(source)
        for part in overlaps(source, target):
            for there, here in zip(
                offsets(part.source_offset, part.source_stride, part.rows, part.columns),
                offsets(part.target_offset, part.target_stride, part.rows, part.columns),
                strict=True,
            ):
                assert elements[here] == -1, "copied twice"
                elements[here] = source_elements[there]
    return elements


def are_compatible(source: Fragment, target: Fragment) -> bool:
    """Whether the fragments are not sliced along two different dimensions; real tensors never are."""
    return source.dim == target.dim or source.spans_dim or target.spans_dim


@given(SHAPE_AND_CUTS)
@settings(max_examples=500, deadline=None)
def test_fragment_is_assembled_from_any_other_cut(case: tuple[tuple[int, ...], list[Fragment], list[Fragment]]):
    _, sources, targets = case
    for target in targets:
        if all(are_compatible(source, target) for source in sources):
            assert np.array_equal(assembled(target, sources), elements_of(target))


@given(SHAPE_AND_CUTS)
@settings(max_examples=200, deadline=None)
def test_coverage_problems_detects_missing_repeated_and_short_fragments(
    case: tuple[tuple[int, ...], list[Fragment], list[Fragment]],
):
    _, fragments, _ = case
    assert coverage_problems(fragments) == []
    for number, fragment in enumerate(fragments):
        others = fragments[:number] + fragments[number + 1 :]
        assert not others or coverage_problems(others), "missing"
        assert coverage_problems([*fragments, fragment]), "repeated"
        if fragment.numel > 1:
            assert coverage_problems([*others, replace(fragment, stop=fragment.stop - 1)]), "too short"


def test_coverage_problems_reports_parts_of_different_shapes():
    first, second = Fragment.whole("a", (4, 2)), Fragment.whole("a", (2, 4))
    assert coverage_problems([first, second]) == ["parts of a disagree about its shape"]
    assert coverage_problems([first, Fragment.whole("b", (3,))]) == []


@given(SHAPES.flatmap(cuts), st.integers(1, 9))
@settings(max_examples=200, deadline=None)
def test_shares_are_even_and_tile_the_fragment(fragments: list[Fragment], parts: int):
    for fragment in fragments:
        shares = [share for part in range(parts) if (share := fragment.share(part, parts)) is not None]
        assert sum(share.numel for share in shares) == fragment.numel
        assert max(share.numel for share in shares) - fragment.numel // parts <= 1
        assert [share.start for share in shares] == [fragment.start, *(share.stop for share in shares[:-1])]


def test_overlaps_with_different_padding_returns_used_rows():
    """A vocabulary of 5 rows of 2, padded to 8 in the checkpoint and to 6 in the model."""
    source, target = (Fragment.whole("w", (rows, 2), used_rows=5) for rows in (8, 6))
    (part,) = overlaps(source, target)
    assert (part.columns, part.source_offset, part.target_offset) == (12, 0, 0)
    (part,) = overlaps(target, source)
    assert part.columns == 12


@given(SHAPES.flatmap(cuts))
def test_fragment_json_round_trip(fragments: list[Fragment]):
    for fragment in fragments:
        assert Fragment.from_json(json.loads(json.dumps(fragment.as_json()))) == fragment


VALID: dict[str, Any] = Fragment.whole("w", (4, 2)).as_json()


@pytest.mark.parametrize(
    "change",
    [
        *(
            {"stop": 9},
            {"start": -1},
            {"start": 8},
            {"first_row": 4},
            {"last_row": 5},
            {"dim": 2},
            {"dim": -1},
            {"shape": []},
        ),
        *({"shape": [0, 2]}, {"shape": 3}, {"shape": [4.0, 2]}, {"used_rows": 5}, {"used_rows": 0}, {"name": 3}),
        *({"start": "0"}, {"start": True}, {"more": 1}, {"shape": [4, None]}),
    ],
)
def test_from_json_of_an_invalid_fragment_raises(change: dict[str, Any]):
    with pytest.raises(ValueError, match="describes no part of a tensor"):
        Fragment.from_json({**VALID, **change})


def test_from_json_with_a_missing_field_raises():
    for name in VALID:
        with pytest.raises(ValueError, match="describes no part of a tensor"):
            Fragment.from_json({key: value for key, value in VALID.items() if key != name})


@given(st.integers(1, 3000), st.integers(1, 200))
@settings(max_examples=200, deadline=None)
def test_replicas_write_each_element_once_by_few_ranks(replicas: int, numel: int):
    whole = Fragment.whole("w", (numel,))
    shares = {r: share for r in range(replicas) if (share := whole.share_of_replica(r, replicas)) is not None}
    assert coverage_problems(shares.values()) == []
    assert len(shares) == min(replicas, MAX_WRITERS, numel)
    assert 0 in shares or numel < MAX_WRITERS
    if numel >= MAX_WRITERS:  # evenly over the ranks: no gap is wider than the widest of an even division
        gaps = [b - a for a, b in itertools.pairwise([*shares, replicas])]
        assert max(gaps) <= -(-replicas // len(shares))
