"""Fragments: where elements that one rank holds lie in the full tensor. Pure arithmetic.

    full tensor  --tensor parallelism-->  slice along one dimension  --ZeRO-->  range [start, stop) of the flat slice

Fragments make a checkpoint independent of the topology that wrote it. Along the sliced dimension a tensor is a matrix
[product of the dimensions before, product of the rest]. A range of a slice is at most three rectangles of that matrix:
the end of a row, full rows, the beginning of a row. Two fragments share the intersections of their rectangles.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

MAX_WRITERS = 32
"""Ranks that write a replicated value, at most: a rank that needs all of it opens as many files when it resumes."""


@dataclass(frozen=True)
class Fragment:
    """Elements [start, stop), in row-major order, of a slice of the tensor `name`."""

    name: str
    shape: tuple[int, ...]
    """Shape of the full tensor."""
    used_rows: int
    """Rows of the first dimension that hold parameters; the rest is padding and never trains."""
    dim: int
    """Dimension along which the tensor is sliced."""
    first_row: int
    """First index of the slice along `dim`."""
    last_row: int
    """End of the slice along `dim`, exclusive."""
    start: int
    stop: int

    @classmethod
    def whole(cls, name: str, shape: Iterable[int], *, used_rows: int | None = None, dim: int = 0) -> Fragment:
        shape = tuple(shape)
        rows = shape[0] if used_rows is None else used_rows
        return cls(
            name, shape, used_rows=rows, dim=dim, first_row=0, last_row=shape[dim], start=0, stop=math.prod(shape)
        )

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Fragment:
        """Return the fragment that `as_json` wrote. Raises ValueError when `value` describes none."""
        try:
            fragment = cls(**{**value, "shape": tuple(value["shape"])})
            is_valid = fragment._is_valid()
        except (TypeError, KeyError) as error:
            raise ValueError(f"{value} describes no part of a tensor") from error
        if not is_valid:
            raise ValueError(f"{value} describes no part of a tensor")
        return fragment

    def as_json(self) -> dict[str, Any]:
        """Return JSON values that `from_json` reads."""
        return {**vars(self), "shape": list(self.shape)}

    def _is_valid(self) -> bool:
        integers = (*self.shape, self.used_rows, self.dim, self.first_row, self.last_row, self.start, self.stop)
        return (
            isinstance(self.name, str)
            and all(type(integer) is int for integer in integers)  # `true` is an int to isinstance
            and min(self.shape, default=0) > 0
            and 0 < self.used_rows <= self.shape[0]
            and 0 <= self.dim < len(self.shape)
            and 0 <= self.first_row < self.last_row <= self.shape[self.dim]
            and 0 <= self.start < self.stop <= self.slice_numel
        )

    @property
    def numel(self) -> int:
        return self.stop - self.start

    @property
    def slice_numel(self) -> int:
        return math.prod(self.shape) // self.shape[self.dim] * (self.last_row - self.first_row)

    @property
    def spans_dim(self) -> bool:
        """Whether the slice is the full tensor, not cut along `dim`."""
        return self.last_row - self.first_row == self.shape[self.dim]

    def share(self, part: int, parts: int) -> Fragment | None:
        """Divide the fragment evenly into `parts`; return number `part`, None when it is empty."""
        start, stop = (self.start + self.numel * number // parts for number in (part, part + 1))
        return replace(self, start=start, stop=stop) if start < stop else None

    def share_of_replica(self, replica: int, replicas: int) -> Fragment | None:
        """Return the part that one of the `replicas` of this fragment writes; None if the others write all of it."""
        writers = min(replicas, MAX_WRITERS)
        writer = -(-replica * writers // replicas)
        # Writer w is replica w * replicas // writers: they are spread evenly, and so over the nodes.
        is_writer = writer < writers and writer * replicas // writers == replica
        return self.share(writer, writers) if is_writer else None


@dataclass(frozen=True)
class Overlap:
    """Elements that two fragments share, as a matrix [rows, columns].

    Element (i, j) is number `offset + i * stride + j` of the source and of the target, each with its own two values.
    """

    rows: int
    columns: int
    source_offset: int
    source_stride: int
    target_offset: int
    target_stride: int


@dataclass(frozen=True)
class _Rectangle:
    """Rows [top, bottom) and columns [left, right) of the full tensor; `offset`: of its first element, in the range."""

    top: int
    bottom: int
    left: int
    right: int
    offset: int

    def offset_of(self, row: int, column: int) -> int:
        return self.offset + (row - self.top) * (self.right - self.left) + column - self.left


def overlaps(source: Fragment, target: Fragment) -> Iterator[Overlap]:
    """Yield the elements that two fragments of the same tensor share. Padding rows may differ in number."""
    slices = [(part.dim, part.first_row, part.last_row) for part in (source, target)]
    if slices[0] == slices[1] and (source.stop <= target.start or target.stop <= source.start):
        return  # the usual case: with a thousand ranks a tensor has a thousand fragments
    dim = target.dim if source.dim != target.dim and source.spans_dim else source.dim
    assert dim == target.dim or target.spans_dim, f"{source} and {target} are cut along two dimensions"
    for a, b in itertools.product(_rectangles(source, dim), _rectangles(target, dim)):
        top, bottom = max(a.top, b.top), min(a.bottom, b.bottom)
        left, right = max(a.left, b.left), min(a.right, b.right)
        if top < bottom and left < right:
            yield Overlap(
                rows=bottom - top,
                columns=right - left,
                source_offset=a.offset_of(top, left),
                source_stride=a.right - a.left,
                target_offset=b.offset_of(top, left),
                target_stride=b.right - b.left,
            )


def _rectangles(fragment: Fragment, dim: int) -> list[_Rectangle]:
    """Rectangles of `fragment` in the tensor as a matrix along `dim`. A full slice may be seen along any dimension."""
    first, last = (fragment.first_row, fragment.last_row) if dim == fragment.dim else (0, fragment.shape[dim])
    inner = math.prod(fragment.shape[dim + 1 :])
    left, width = first * inner, (last - first) * inner
    start, stop = fragment.start, fragment.stop
    first_row_end = min(stop, -(-start // width) * width)
    last_row_start = max(start, stop // width * width)
    return [
        _Rectangle(
            top=begin // width,
            bottom=-(-end // width),
            left=left + begin % width,
            right=left + begin % width + min(end - begin, width),
            offset=begin - start,
        )
        for begin, end in itertools.pairwise(sorted({start, first_row_end, last_row_start, stop}))
    ]


def coverage_problems(fragments: Iterable[Fragment]) -> list[str]:
    """Return one sentence for each tensor whose elements are not all held exactly once."""
    problems, by_name = [], itertools.groupby(sorted(fragments, key=_order), key=lambda fragment: fragment.name)
    for name, group in by_name:
        parts = list(group)
        if len({(part.shape, part.used_rows, part.dim) for part in parts}) > 1:
            problems.append(f"parts of {name} disagree about its shape")
        elif not _tiles(parts):
            problems.append(f"parts of {name} do not hold each of its elements exactly once")
    return problems


def _order(fragment: Fragment) -> tuple[str, int, int, int, int]:
    return fragment.name, fragment.first_row, fragment.last_row, fragment.start, fragment.stop


def _tiles(parts: list[Fragment]) -> bool:
    """Whether sorted parts of one tensor tile it: slices along its dimension, ranges within each slice."""
    covered = 0
    for (first, last), group in itertools.groupby(parts, key=lambda part: (part.first_row, part.last_row)):
        ranges = list(group)
        ends = [0, *(part.stop for part in ranges)]
        if first != covered or [part.start for part in ranges] != ends[:-1] or ends[-1] != ranges[0].slice_numel:
            return False
        covered = last
    return covered == parts[0].shape[parts[0].dim]
