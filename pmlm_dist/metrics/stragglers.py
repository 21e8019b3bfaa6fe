"""Detection of slow ranks (stragglers) from the step times that each rank measures. Pure.

Ranks synchronize within a step, so a step takes equally long on all of them. Ranks differ in the time of local work:
loading their own data, and the forward pass. With ZeRO-3 and tensor parallelism the forward pass waits for other ranks
too; then only a slow group, or slow data, is visible.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

_REPORTED_AFTER = 3
"""Consecutive slow measurements before a rank is reported."""
_REPEATED_EVERY = 100
"""Measurements between two reports of the same rank."""
_MIN_SHARE_OF_STEP = 0.05
"""Excess below this share of a step is not reported: it costs next to nothing."""


@dataclass(frozen=True)
class RankTimes:
    """Seconds that one rank spent in a step."""

    data_s: float
    compute_s: float
    """Forward and backward passes."""
    forward_s: float
    step_s: float

    @property
    def local_s(self) -> float:
        """Time of local work, without waiting for other ranks."""
        return self.data_s + self.forward_s


class Stragglers:
    """Compares the times of all ranks at each measurement; reports a rank that is slow three times in a row."""

    def __init__(self, *, ratio: float):
        self._ratio = ratio
        self._in_a_row: dict[int, int] = {}

    def check(self, per_rank: Sequence[RankTimes]) -> list[str]:
        """Return one sentence for each rank to report now; a rank that stays slow is reported again after 100 calls."""
        slow = {
            rank: typical_s
            for rank in range(len(per_rank))
            if (typical_s := self._others_typical(per_rank, rank)) is not None
        }
        self._in_a_row = {rank: self._in_a_row.get(rank, 0) + 1 for rank in slow}
        return [
            f"rank {rank} is slow: data ({per_rank[rank].data_s:.3g} s) and forward pass take "
            f"{per_rank[rank].local_s:.3g} s, on the other ranks {typical_s:.3g} s, and all ranks wait for it"
            for rank, typical_s in slow.items()
            if self._in_a_row[rank] % _REPEATED_EVERY == _REPORTED_AFTER
        ]

    def _others_typical(self, per_rank: Sequence[RankTimes], rank: int) -> float | None:
        """Return the median time of the other ranks if `rank` takes much longer, else None."""
        others = [times.local_s for other, times in enumerate(per_rank) if other != rank]
        if not others:
            return None
        local_s, typical_s = per_rank[rank].local_s, median(others)
        is_slow = local_s > self._ratio * typical_s and local_s - typical_s > _MIN_SHARE_OF_STEP * per_rank[rank].step_s
        return typical_s if is_slow else None
