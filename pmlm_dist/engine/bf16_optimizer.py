"""fp32 gradient accumulation for bf16 weights with few passes over memory, averaged during the backward pass.

ZeRO-1 with bf16 and `grad_accum_dtype: fp32`, as in `ds_configs/`: DeepSpeed keeps one fp32 sum for each parameter.

    gradient of a parameter is ready -> first micro-batch: copied into its sum; later ones: added -> gradient freed
    last micro-batch: all sums of a bucket are final -> all-reduce of the bucket, beside the rest of the backward pass
    after it: the remaining buckets, wait for all -> norm, clipping -> AdamW on this rank's partition -> weights rounded

DeepSpeed itself zeroes the sums twice a step and adds every gradient, the first one too, through an fp32 copy. In a
step of one micro-batch this moves 26 bytes per parameter instead of 6. It averages the sums after the backward pass,
and every rank computes the norm of all of them and clips all.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor

from pmlm_dist.engine.optimizer import clip_coefficient, norm_over_ranks
from pmlm_dist.parallel.groups import Topology
from pmlm_dist.parallel.layers import is_sharded


@dataclass
class _Bucket:
    """Sums of adjacent parameters of a group, averaged by one all-reduce."""

    sums: Tensor
    parameters: frozenset[tuple[int, int]]
    """Group and place in the group of each."""
    final: set[tuple[int, int]] = field(default_factory=set)
    """Parameters whose sum is final in this step."""
    reduced: Tensor | None = None
    """What the all-reduce writes: the sums, or a copy in the precision of the communication."""
    work: Any = None


class SummingBF16Optimizer(BF16_Optimizer):
    """DeepSpeed's optimizer with the accumulation above; on two ranks the averages are bit for bit the same.

    After a backward pass, parameters that never had a gradient in this step have a sum of zero. All ranks skip the
    update if the gradient of one is not finite.
    """

    _engine: DeepSpeedEngine
    _topology: Topology
    _buckets: list[_Bucket]
    """In the order of their all-reduces, which must be the same on all ranks."""
    _vectors: list[tuple[Tensor, Tensor, bool]]
    """Sums, gradients of this backward pass that are not accumulated yet, and whether they are the step's first."""
    _num_reduced: int
    """Buckets whose all-reduce has started in this step."""
    _overlaps: bool
    """Whether all-reduces start during the backward pass (`overlap_comm`)."""

    @classmethod
    def replace(cls, engine: DeepSpeedEngine, topology: Topology) -> None:
        """Make the engine's `BF16_Optimizer` one of this class; DeepSpeed has no setting for it."""
        optimizer: Any = engine.optimizer
        optimizer.__class__ = cls
        optimizer._engine, optimizer._topology = engine, topology
        optimizer._buckets = list(optimizer._new_buckets(engine.zero_reduce_bucket_size()))
        optimizer._num_reduced, optimizer._vectors = 0, []
        optimizer._overlaps = engine.zero_overlap_comm() and topology.dp > 1

    def _new_buckets(self, size: int) -> Iterator[_Bucket]:
        """Yield buckets of at least `size` elements. The last parameters come first: so does the backward pass."""
        for group, sums in enumerate(self.fp32_groups_gradients):
            flat, last = self.fp32_groups_gradients_flat[group], len(sums)
            end = sum(map(len, sums))
            start = end
            for place in reversed(range(len(sums))):
                start -= len(sums[place])
                if end - start >= size or place == 0:
                    yield _Bucket(flat[start:end], frozenset((group, j) for j in range(place, last)))
                    end, last = start, place

    @torch.no_grad()
    def _update_hp_grad(self, lp: Any, group_idx: int, param_idx: int, clear_lp_grads: bool) -> None:
        """Accumulate the gradient of `lp`; called by DeepSpeed's hook, which frees the gradient afterwards."""
        are_written = self.fp32_groups_has_gradients[group_idx]
        total = self.fp32_groups_gradients[group_idx][param_idx].view(lp.shape)
        is_first, are_written[param_idx] = not are_written[param_idx], True
        if lp.ndim == 1:
            self._vectors.append((total, lp.grad, is_first))
        elif is_first:
            total.copy_(lp.grad)
        else:
            total.add_(lp.grad)
        if self._overlaps and self._engine.is_gradient_accumulation_boundary():
            self._mark_final((group_idx, param_idx))

    def _accumulate_vectors(self) -> None:
        """Accumulate the gradients of biases and norms, of all layers in a few launches."""
        copy, add = torch._foreach_copy_, torch._foreach_add_  # pyright: ignore[reportPrivateImportUsage]
        for is_first in (True, False):
            chosen = [vector for vector in self._vectors if vector[2] == is_first]
            if not chosen:
                continue
            totals, gradients = [total for total, _, _ in chosen], [gradient for _, gradient, _ in chosen]
            # A copy between precisions is one launch for all; an addition would be one each.
            exact = totals if is_first else [torch.empty_like(total) for total in totals]
            copy(exact, gradients)
            if not is_first:
                add(totals, exact)
        self._vectors.clear()

    def _mark_final(self, parameter: tuple[int, int]) -> None:
        """Note that a sum is final, and start the all-reduces of the buckets that are complete and next in order."""
        number = next(n for n, bucket in enumerate(self._buckets) if parameter in bucket.parameters)
        assert number >= self._num_reduced, "a gradient is added to a sum that is being averaged"
        self._buckets[number].final.add(parameter)
        while self._num_reduced < len(self._buckets) and self._next.final == self._next.parameters:
            self._start_reduction()

    @property
    def _next(self) -> _Bucket:
        return self._buckets[self._num_reduced]

    def _start_reduction(self) -> None:
        """Start the all-reduce of the next bucket: on its own stream on a GPU, in a thread of gloo on a CPU."""
        self._accumulate_vectors()
        bucket, self._num_reduced = self._next, self._num_reduced + 1
        bucket.reduced = bucket.sums.to(self._engine.communication_data_type)
        if (scale := self._scales()[0]) != 1.0:
            bucket.reduced.mul_(scale)
        bucket.work = dist.all_reduce(bucket.reduced, group=self.dp_process_group, async_op=True)

    def _scales(self) -> tuple[float, float]:
        """Factors of the sums before and after the all-reduce, by DeepSpeed's settings."""
        ranks, engine = dist.get_world_size(self.dp_process_group), self._engine
        if not engine.postscale_gradients():
            return 1.0 / ranks, 1.0
        return 1.0 / engine.gradient_predivide_factor(), engine.gradient_predivide_factor() / ranks

    @torch.no_grad()
    def reduce_gradients(self, *_: Any, **__: Any) -> None:
        """Average the sums over the data-parallel ranks; called by DeepSpeed after the last backward pass of a step."""
        while self._num_reduced < len(self._buckets):
            self._start_reduction()
        scale = self._scales()[1]
        for bucket in self._buckets:
            assert bucket.reduced is not None
            bucket.work.wait()  # on a GPU the device waits, not the host
            if scale != 1.0:
                bucket.reduced.mul_(scale)
            if bucket.reduced is not bucket.sums:
                bucket.sums.copy_(bucket.reduced)
            bucket.final, bucket.reduced, bucket.work = set(), None, None
        self._num_reduced = 0

    @torch.no_grad()
    def backward_epilogue(self, *args: Any, **kwargs: Any) -> None:
        """Zero the sums that this step has not written, before sums are averaged over ranks."""
        super().backward_epilogue(*args, **kwargs)
        self._accumulate_vectors()
        # `clear_hp_grads` does not zero, so a parameter out of the loss would contribute the sum of an earlier step.
        for sums, are_written in zip(self.fp32_groups_gradients, self.fp32_groups_has_gradients, strict=True):
            for total, is_written in zip(sums, are_written, strict=True):
                if not is_written:
                    total.zero_()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update this rank's partition and gather the weights, unless the norm of the gradient is not finite."""
        del closure  # of torch's interface
        partitions = self.fp32_groups_gradient_flat_partition
        sums = [part for group in range(len(partitions)) for part in self._own_sums(group)]
        norm = norm_over_ranks(sums, self._topology)
        self._global_grad_norm, self.overflow = norm, not math.isfinite(norm)
        if not self.overflow:
            scale = clip_coefficient(norm, self.clip_grad)
            for master, gradient in zip(self.fp32_groups_flat_partition, partitions, strict=True):
                master.grad = gradient.mul_(scale) if scale < 1.0 else gradient
            self.optimizer.step()
            self._lazy_init_hp_params_optimizer_state()
            self.update_lp_params()
        self.clear_hp_grads()

    def _own_sums(self, group: int) -> Iterator[tuple[Tensor, bool]]:
        """Yield the sums in this rank's partition of a group, and whether tensor-parallel ranks hold different ones."""
        partition = self.fp32_groups_gradient_flat_partition[group]
        flat = self.fp32_groups_gradients_flat[group]
        first = partition.storage_offset() - flat.storage_offset()
        start = 0
        for parameter in self.bf16_groups[group]:
            end = start + parameter.numel()
            own = flat[max(start, first) : min(end, first + len(partition))]
            if len(own):
                yield own, is_sharded(parameter)
            start = end

    def clear_hp_grads(self) -> None:
        """Mark all sums as not written, after an update: the next gradient overwrites them."""
        for are_written in self.fp32_groups_has_gradients:
            are_written[:] = [False] * len(are_written)
