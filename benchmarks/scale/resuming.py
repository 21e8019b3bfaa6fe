"""File operations of a rank that resumes from a checkpoint of many ranks."""

from pathlib import Path

from pmlm_dist.checkpoint.files import CheckpointReader, read_state
from pmlm_dist.checkpoint.folder import CheckpointFolder
from pmlm_dist.checkpoint.resume import _problems_by_all_ranks
from scale.counting import FileOperations
from scale.simulated import Ranks, join


def count(ranks: int, stage: int, root: Path) -> dict[str, float]:
    """Operations of a rank that verifies its share of the newest checkpoint and loads: the most of three ranks."""
    join(ranks)
    return _most(Ranks(ranks, stage=stage), ranks, root, verify=True)


def count_loading(ranks: int, stage: int, root: Path) -> dict[str, float]:
    """Operations of a rank of another topology that loads the newest checkpoint: the most of three ranks."""
    return _most(Ranks(ranks, stage=stage), ranks, root, verify=False)


def _most(world: Ranks, ranks: int, root: Path, *, verify: bool) -> dict[str, float]:
    path, rows = CheckpointFolder(root, keep=1).steps()[-1], []
    for rank in (0, ranks // 2 - 1, ranks - 1):
        state, operations = world.state(rank, filled=False), FileOperations(root)
        with operations.counted():
            problems = _problems_by_all_ranks(path, state.topology, lambda: None) if verify else []
            assert not problems, problems
            with CheckpointReader(path) as reader:
                state.restore(reader, read_state(path)["counters"])
        world.check(state)
        rows.append(operations.row())
    return max(rows, key=lambda row: row["opens"])
