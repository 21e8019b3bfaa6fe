"""megatron-core's sharded layers, as plain modules from tensor to tensor.

`ColumnLinear` splits its output over the tensor-parallel ranks, `RowLinear` its input; between the two no communication
is needed. `VocabularyEmbedding` splits its rows. All weights are drawn whole and sliced, hence equal under every
tensor-parallel size. With one rank the product and its bias run as one fused call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from torch import Tensor, nn

from pmlm_dist.parallel.groups import Topology


def tp_size() -> int:
    """Ranks that share one copy of the model."""
    return parallel_state.get_tensor_model_parallel_world_size()


def tp_rank() -> int:
    """Place of this rank among those that share one copy of the model."""
    return parallel_state.get_tensor_model_parallel_rank()


def _tp_group() -> dist.ProcessGroup:
    group = parallel_state.get_tensor_model_parallel_group()
    assert isinstance(group, dist.ProcessGroup)
    return group


def _shared_config() -> ModelParallelConfig:
    return ModelParallelConfig(tensor_model_parallel_size=tp_size(), use_cpu_initialization=True)


class _NoExtraState:
    """Keeps Transformer Engine's empty `_extra_state` out of state dicts: DeepSpeed's converters stumble over it."""

    get_extra_state = nn.Module.get_extra_state


class ColumnLinear(_NoExtraState, ColumnParallelLinear):
    """y = x W^T + b, rows of W [out, in] and b [out] split over tensor-parallel ranks: [..., in] -> [..., out/tp]."""

    def __init__(self, size_in: int, size_out: int, *, std: float):
        super().__init__(
            size_in,
            size_out,
            config=_shared_config(),
            init_method=_normal(std),
            gather_output=False,
            tp_group=_tp_group(),
        )

    def _forward_impl(
        self, input: Tensor, weight: Tensor, *args: Any, bias: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        if tp_size() == 1:
            return F.linear(input, weight, bias)
        return super()._forward_impl(input, weight, *args, bias=bias, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] on every rank -> [..., out/tp], this rank's part."""
        return super().forward(x)[0]


class RowLinear(_NoExtraState, RowParallelLinear):
    """y = sum over ranks of x W^T, plus b, with the columns of W [out, in] split: [..., in/tp] -> [..., out]."""

    def __init__(self, size_in: int, size_out: int, *, std: float):
        super().__init__(
            size_in,
            size_out,
            config=_shared_config(),
            init_method=_normal(std),
            bias=True,
            input_is_parallel=True,
            skip_bias_add=False,
            tp_group=_tp_group(),
        )

    def forward(self, x: Tensor) -> Tensor:
        """[..., in/tp], this rank's part -> [..., out], equal on every rank."""
        if tp_size() == 1:
            return F.linear(x, self.weight, self.bias)
        return super().forward(x)[0]


class VocabularyEmbedding(VocabParallelEmbedding):
    """Token embedding with its rows [V, E] split over the tensor-parallel ranks; also the matrix of the tied head."""

    def __init__(self, vocab_size: int, hidden_size: int, *, std: float):
        super().__init__(
            vocab_size, hidden_size, config=_shared_config(), init_method=_normal(std), tp_group=_tp_group()
        )


def sharded(whole: Tensor) -> nn.Parameter:
    """This rank's slice of `whole` [n, ...] along its first dimension, marked as sharded for norms and checkpoints."""
    part = nn.Parameter(whole.chunk(tp_size(), dim=0)[tp_rank()].clone())
    set_tensor_model_parallel_attributes(part, True, 0, 1)
    return part


def _normal(std: float) -> Callable[[Tensor], None]:
    def draw(weight: Tensor) -> None:
        nn.init.normal_(weight, mean=0.0, std=std)

    return draw


def is_sharded(parameter: Tensor) -> bool:
    """Whether tensor-parallel ranks hold different parts of `parameter` (else: equal copies)."""
    return bool(getattr(parameter, "tensor_model_parallel", False))


def sharded_dimension(parameter: Tensor) -> int:
    """The dimension along which tensor-parallel ranks hold parts of `parameter`; 0 where they hold copies."""
    return int(getattr(parameter, "partition_dim", 0)) if is_sharded(parameter) else 0


def count_parameters(model: nn.Module, topology: Topology) -> int:
    """Parameters of the whole model, whatever part of it this rank holds; every rank must call."""
    own = sum(_numel(p) for p in model.parameters() if is_sharded(p))
    shared = sum(_numel(p) for p in model.parameters() if not is_sharded(p))
    return int(topology.all_reduce_tp(torch.tensor(own, device=topology.device))) + shared


def _numel(parameter: Tensor) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))  # ZeRO-3 empties parameters and keeps their size here
