"""Which rank is slower than the others, from what each rank measured of its own steps. Pure.

Ranks wait for one another within a step, so a step takes all of them equally long; what tells them apart is the time
that they spend on work of their own: waiting for their own data, and the forward pass. (With ZeRO-3 and tensor
parallelism the forward pass waits for other ranks too: then whole groups show, or only slow data.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

_IN_A_ROW = 3
_AGAIN_AFTER = 100
_SHARE_OF_STEP = 0.05


@dataclass(frozen=True)
class RankTimes:
    """Seconds that one rank spent in a step."""

    data_s: float
    """Waiting for its own data."""
    compute_s: float
    """In forward and backward passes."""
    forward_s: float
    step_s: float
    """All of it."""

    @property
    def own_s(self) -> float:
        """Work of its own, in which it does not wait for others."""
        return self.data_s + self.forward_s


class Stragglers:
    """Looks at the times of all ranks, one report after another; a rank that is slow three times in a row is named."""

    def __init__(self, *, ratio: float):
        self._ratio = ratio
        self._in_a_row: dict[int, int] = {}

    def check(self, of_rank: Sequence[RankTimes]) -> list[str]:
        """A sentence for each rank that is to be named now; again after a hundred reports."""
        slow = {rank: usual_s for rank in range(len(of_rank)) if (usual_s := self._excess(of_rank, rank)) is not None}
        self._in_a_row = {rank: self._in_a_row.get(rank, 0) + 1 for rank in slow}
        return [
            f"rank {rank} is slow: it takes {of_rank[rank].own_s:.3g} s for its data ({of_rank[rank].data_s:.3g} s) "
            f"and forward pass, the others {usual_s:.3g} s, and all wait for it"
            for rank, usual_s in slow.items()
            if self._in_a_row[rank] % _AGAIN_AFTER == _IN_A_ROW
        ]

    def _excess(self, of_rank: Sequence[RankTimes], rank: int) -> float | None:
        """What the others usually take, where `rank` takes much more."""
        others = [times.own_s for other, times in enumerate(of_rank) if other != rank]
        if not others:
            return None
        own_s, usual_s = of_rank[rank].own_s, median(others)
        is_slow = own_s > self._ratio * usual_s and own_s - usual_s > _SHARE_OF_STEP * of_rank[rank].step_s
        return usual_s if is_slow else None
