"""Where a run of numbers lies in a whole tensor: what makes a checkpoint independent of who wrote it (pure).

    whole tensor  --tensor parallelism-->  slice along one dimension  --ZeRO-->  run [start, stop) of the flat slice

Seen along the sliced dimension, a tensor is a matrix [product of the dimensions before, product of the rest], and a
run of a slice is at most three rectangles of it: the rest of a row, whole rows, the beginning of a row. Numbers that
two runs share are the intersections of their rectangles, whatever tensor- and data-parallel sizes made them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Fragment:
    """The run [start, stop) of the numbers, in row-major order, of a slice of the tensor `name`."""

    name: str
    shape: tuple[int, ...]
    """Of the whole tensor."""
    used_rows: int
    """Rows of the first dimension that mean something; those after it pad and never train."""
    dim: int
    """Dimension along which the tensor is sliced."""
    first_row: int
    """First index of the slice along `dim`."""
    last_row: int
    """Index after its last one."""
    start: int
    stop: int

    @classmethod
    def whole(cls, name: str, shape: Iterable[int], *, used_rows: int | None = None, dim: int = 0) -> Fragment:
        """All numbers of a tensor."""
        shape = tuple(shape)
        rows = shape[0] if used_rows is None else used_rows
        return cls(
            name, shape, used_rows=rows, dim=dim, first_row=0, last_row=shape[dim], start=0, stop=math.prod(shape)
        )

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Fragment:
        """The placement that `as_json` wrote. Raises ValueError when it describes no run of any tensor."""
        try:
            found = cls(**{**value, "shape": tuple(value["shape"])})
            sound = found._is_sound()
        except (TypeError, KeyError) as error:
            raise ValueError(f"{value} describes no part of a tensor") from error
        if not sound:
            raise ValueError(f"{value} describes no part of a tensor")
        return found

    def as_json(self) -> dict[str, Any]:
        """JSON values that `from_json` reads."""
        return {**vars(self), "shape": list(self.shape)}

    def _is_sound(self) -> bool:
        numbers = (*self.shape, self.used_rows, self.dim, self.first_row, self.last_row, self.start, self.stop)
        return (
            isinstance(self.name, str)
            and all(type(number) is int for number in numbers)
            and min(self.shape, default=0) > 0
            and 0 < self.used_rows <= self.shape[0]
            and 0 <= self.dim < len(self.shape)
            and 0 <= self.first_row < self.last_row <= self.shape[self.dim]
            and 0 <= self.start < self.stop <= self.slice_numel
        )

    @property
    def numel(self) -> int:
        """Numbers of the run."""
        return self.stop - self.start

    @property
    def slice_numel(self) -> int:
        """Numbers of the slice that the run is part of."""
        return math.prod(self.shape) // self.shape[self.dim] * (self.last_row - self.first_row)

    @property
    def is_whole(self) -> bool:
        """Whether the run is all of the tensor."""
        return self.numel == math.prod(self.shape)

    def share(self, part: int, parts: int) -> Fragment | None:
        """Part number `part` when the run is divided evenly into `parts`; None when it is empty."""
        start, stop = (self.start + self.numel * number // parts for number in (part, part + 1))
        return replace(self, start=start, stop=stop) if start < stop else None


@dataclass(frozen=True)
class Overlap:
    """Numbers that two runs share, as a matrix: element (i, j) is number `at + i * stride + j` of each run's own."""

    rows: int
    columns: int
    source_at: int
    source_stride: int
    target_at: int
    target_stride: int


@dataclass(frozen=True)
class _Rectangle:
    """Rows [top, bottom) and columns [left, right) of the whole tensor; `at`: place of its first number in the run."""

    top: int
    bottom: int
    left: int
    right: int
    at: int

    def place(self, row: int, column: int) -> int:
        return self.at + (row - self.top) * (self.right - self.left) + column - self.left


def overlaps(source: Fragment, target: Fragment) -> Iterator[Overlap]:
    """What two runs of the same tensor share. Their shapes may differ in the rows that pad."""
    dim = target.dim if source.dim != target.dim and _spans_its_dimension(source) else source.dim
    assert dim == target.dim or _spans_its_dimension(target), f"{source} and {target} are cut along two dimensions"
    for a, b in itertools.product(_rectangles(source, dim), _rectangles(target, dim)):
        top, bottom = max(a.top, b.top), min(a.bottom, b.bottom)
        left, right = max(a.left, b.left), min(a.right, b.right)
        if top < bottom and left < right:
            yield Overlap(
                rows=bottom - top,
                columns=right - left,
                source_at=a.place(top, left),
                source_stride=a.right - a.left,
                target_at=b.place(top, left),
                target_stride=b.right - b.left,
            )


def _spans_its_dimension(fragment: Fragment) -> bool:
    return fragment.last_row - fragment.first_row == fragment.shape[fragment.dim]


def _rectangles(run: Fragment, dim: int) -> list[_Rectangle]:
    """`run` in the tensor as a matrix seen along `dim`; a slice that spans its own dimension can be seen along any."""
    first, last = (run.first_row, run.last_row) if dim == run.dim else (0, run.shape[dim])
    inner = math.prod(run.shape[dim + 1 :])
    left, width = first * inner, (last - first) * inner
    cuts = sorted({run.start, min(run.stop, -(-run.start // width) * width), _floor(run, width), run.stop})
    return [
        _Rectangle(
            top=start // width,
            bottom=-(-stop // width),
            left=left + start % width,
            right=left + start % width + min(stop - start, width),
            at=start - run.start,
        )
        for start, stop in itertools.pairwise(cuts)
    ]


def _floor(run: Fragment, width: int) -> int:
    return max(run.start, run.stop // width * width)


def coverage_problems(fragments: Iterable[Fragment]) -> list[str]:
    """Where `placements` fail to hold every number of every tensor they name exactly once, a sentence a tensor."""
    found, by_name = [], itertools.groupby(sorted(fragments, key=_order), key=lambda fragment: fragment.name)
    for name, group in by_name:
        parts = list(group)
        if len({(part.shape, part.used_rows, part.dim) for part in parts}) > 1:
            found.append(f"parts of {name} disagree about its shape")
        elif not _tiles(parts):
            found.append(f"parts of {name} do not hold each of its numbers exactly once")
    return found


def _order(fragment: Fragment) -> tuple[str, int, int, int, int]:
    return fragment.name, fragment.first_row, fragment.last_row, fragment.start, fragment.stop


def _tiles(parts: list[Fragment]) -> bool:
    """Whether parts of one tensor, in order, follow upon each other: slices along its dimension, runs in each slice."""
    reached = 0
    for (first, last), group in itertools.groupby(parts, key=lambda part: (part.first_row, part.last_row)):
        runs = list(group)
        ends = [0, *(run.stop for run in runs)]
        if first != reached or [run.start for run in runs] != ends[:-1] or ends[-1] != runs[0].slice_numel:
            return False
        reached = last
    return reached == parts[0].shape[parts[0].dim]
