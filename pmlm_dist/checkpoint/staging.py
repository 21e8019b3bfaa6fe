"""Host memory for the copy of a checkpoint, from which a thread writes while training continues (async_save.py)."""

from collections.abc import Iterator

import torch
from torch import Tensor

from pmlm_dist.checkpoint.engine_state import OwnedFragment

_CHUNK_BYTES = 2**24


class StagingBuffer:
    """Host memory for the copy of a checkpoint, reused by every save; page-locked if the device is an accelerator."""

    def __init__(self, device: torch.device):
        self._device = device
        self._block = torch.empty(0)

    def take(self, owned: list[OwnedFragment], ready: torch.cuda.Event | None) -> None:
        """Copy the tensors of `owned` into one block, fragment by fragment, each with its kinds in order."""
        sources = [tensor for part in owned for tensor in part.tensors.values()]
        size = sum(source.numel() for source in sources)
        if self._block.numel() != size:
            self._block = _allocate(size, pinned=self._device.type == "cuda")
        targets = self._block.split([source.numel() for source in sources])
        if ready is None:
            _copy(sources, targets)
            return
        # A side stream: the copy starts after the work queued at `save`, and overlaps the work queued since.
        torch.cuda.set_device(self._device)
        stream = torch.cuda.Stream()
        stream.wait_event(ready)
        with torch.cuda.stream(stream):
            _copy(sources, targets)
        stream.synchronize()

    def chunks(self) -> Iterator[memoryview]:
        data = self._block.view(torch.uint8).numpy().data
        return (data[start : start + _CHUNK_BYTES] for start in range(0, data.nbytes, _CHUNK_BYTES))


def _allocate(size: int, *, pinned: bool) -> Tensor:
    try:
        return torch.empty(size, pin_memory=pinned)
    except RuntimeError as error:  # torch has no exception of its own for missing host memory
        raise OSError(f"no host memory for a copy of {size * 4:,} bytes ({error})") from error


def _copy(sources: list[Tensor], targets: tuple[Tensor, ...]) -> None:
    for source, target in zip(sources, targets, strict=True):
        target.copy_(source, non_blocking=True)
