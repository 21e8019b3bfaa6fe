"""File operations of rank 0 while a checkpoint of many ranks is saved."""

import math
import time
from pathlib import Path

import torch

from pmlm_dist.checkpoint.async_save import SaveRequest, SaveThread
from pmlm_dist.checkpoint.folder import CheckpointFolder
from pmlm_dist.checkpoint.staging import StagingBuffer
from scale.counting import FileOperations
from scale.simulated import Ranks, join


def count(ranks: int, stage: int, root: Path) -> dict[str, float]:
    """Operations of rank 0 during the second of two saves, which also removes the first."""
    join(ranks)
    world, folder = Ranks(ranks, stage=stage), CheckpointFolder(root, keep=1)
    _save(world, ranks, folder, step=1)
    operations = FileOperations(root)
    with operations.counted():
        thread = _save(world, ranks, folder, step=2)
    files = len(list(folder.folder(2).glob("rank-*")))
    return {"files": files, "seconds": operations.seconds, **operations.row(thread)}


def _save(world: Ranks, ranks: int, folder: CheckpointFolder, *, step: int) -> int:
    """Save `step`: rank 0 in its thread, the others one after another; returns the thread of rank 0."""
    document = {"step": step, "samples_consumed": 0, "tokens_seen": 0, "identity": {}, "configuration": {}}
    document["counters"] = world.state(0, filled=False).counters()
    request = SaveRequest(
        step,
        folder,
        folder.temporary(step, attempt="a"),
        document,
        timeout_at=time.monotonic() + 600,
        deadline=lambda: math.inf,
    )

    def thread_of(rank: int) -> SaveThread:
        return SaveThread(request, world.state(rank, filled=True), StagingBuffer(torch.device("cpu")))

    first = thread_of(0)
    first.start()
    ident = first.ident
    assert ident is not None
    for rank in range(1, ranks):
        thread = thread_of(rank)
        thread.run()
        assert thread.problem is None, thread.problem
        assert thread.error is None, thread.error
    first.join()
    assert first.path is not None, first.problem or first.error
    return ident
