"""megatron-core's sharded layers, as modules from tensor to tensor.

    x [..., in] --ColumnLinear--> [..., out / tp] --RowLinear, all-reduce--> [..., in]

`ColumnLinear` splits its output over the tensor-parallel ranks and `RowLinear` its input, so no communication is needed
between them. `VocabularyEmbedding` splits its rows. Every rank draws the full weights and keeps its slice, so the model
is the same for every tensor-parallel size.
"""

from collections.abc import Sequence
from functools import partial
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
    linear_with_grad_accumulation_and_async_allreduce,
    set_tensor_model_parallel_attributes,
)
from torch import Tensor, nn

from pmlm_dist.parallel.groups import Topology


def tp_size() -> int:
    """Number of ranks that share one copy of the model."""
    return parallel_state.get_tensor_model_parallel_world_size()


def tp_rank() -> int:
    """Index of this rank among those that share one copy of the model."""
    return parallel_state.get_tensor_model_parallel_rank()


def tp_group() -> dist.ProcessGroup:
    """Return the ranks that share one copy of the model."""
    group = parallel_state.get_tensor_model_parallel_group()
    assert isinstance(group, dist.ProcessGroup)
    return group


def _shared_config() -> ModelParallelConfig:
    # Initialization on the CPU draws the full weight before slicing; on a GPU each rank would draw its own numbers.
    return ModelParallelConfig(tensor_model_parallel_size=tp_size(), use_cpu_initialization=True)


class _NoExtraState:
    """Exclude Transformer Engine's empty `_extra_state` from state dicts: DeepSpeed's converters fail on it."""

    get_extra_state = nn.Module.get_extra_state


class ColumnLinear(_NoExtraState, ColumnParallelLinear):
    """y = x W^T + b, rows of W [out, in] and b [out] split over tensor-parallel ranks: [..., in] -> [..., out/tp]."""

    def __init__(self, size_in: int, size_out: int, *, std: float):
        super().__init__(
            size_in,
            size_out,
            config=_shared_config(),
            init_method=partial(nn.init.normal_, std=std),
            gather_output=False,
            tp_group=tp_group(),
        )

    def _forward_impl(
        self, input: Tensor, weight: Tensor, *args: Any, bias: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        if tp_size() == 1:  # product and bias in one call; megatron-core adds the bias in a second pass
            return F.linear(input, weight, bias)
        return super()._forward_impl(input, weight, *args, bias=bias, **kwargs)

    def forward(self, x: Tensor, *, add_bias: bool = True) -> Tensor:
        """[..., in], equal on every rank -> [..., out/tp] of this rank."""
        self.skip_bias_add = not add_bias
        return super().forward(x)[0]


class RowLinear(_NoExtraState, RowParallelLinear):
    """y = sum over ranks of x W^T, plus b, with the columns of W [out, in] split: [..., in/tp] -> [..., out]."""

    def __init__(self, size_in: int, size_out: int, *, std: float):
        super().__init__(
            size_in,
            size_out,
            config=_shared_config(),
            init_method=partial(nn.init.normal_, std=std),
            bias=True,
            input_is_parallel=True,
            skip_bias_add=False,
            tp_group=tp_group(),
        )

    def forward(self, x: Tensor, *, add_bias: bool = True) -> Tensor:
        """[..., in/tp] of this rank -> [..., out], equal on every rank."""
        if tp_size() == 1:
            return F.linear(x, self.weight, self.bias if add_bias else None)
        self.skip_bias_add = not add_bias
        return super().forward(x)[0]


def joint_linear(layers: Sequence[ColumnLinear], x: Tensor) -> Tensor:
    """Products of several layers with one input, without biases, side by side: [..., in] -> [..., sum of out/tp]."""
    weights: list[Any] = [layer.weight for layer in layers]
    weight = torch.cat(weights)
    if tp_size() == 1:
        return F.linear(x, weight)
    return linear_with_grad_accumulation_and_async_allreduce(
        x,
        weight,
        None,
        gradient_accumulation_fusion=False,
        allreduce_dgrad=True,
        sequence_parallel=False,
        tp_group=tp_group(),
    )


class VocabularyEmbedding(VocabParallelEmbedding):
    """Token embedding with rows [V, E] split over the tensor-parallel ranks; also the matrix of the tied head."""

    def __init__(self, vocab_size: int, hidden_size: int, *, std: float):
        draw = partial(nn.init.normal_, std=std)
        super().__init__(vocab_size, hidden_size, config=_shared_config(), init_method=draw, tp_group=tp_group())


def sharded(full: Tensor) -> nn.Parameter:
    """This rank's slice of `full` [n, ...] along its first dimension, marked as sharded for norms and checkpoints."""
    part = nn.Parameter(full.chunk(tp_size(), dim=0)[tp_rank()].clone())
    set_tensor_model_parallel_attributes(part, True, 0, 1)
    return part


def is_sharded(parameter: Tensor) -> bool:
    """True if tensor-parallel ranks hold different parts of `parameter`, False if they hold equal copies."""
    return bool(getattr(parameter, "tensor_model_parallel", False))


def sharded_dimension(parameter: Tensor) -> int:
    """Dimension along which `parameter` is split over tensor-parallel ranks; 0 for copies."""
    return int(getattr(parameter, "partition_dim", 0)) if is_sharded(parameter) else 0


def count_parameters(model: nn.Module, topology: Topology) -> int:
    """Number of parameters of the full model. Every rank must call."""
    own = sum(_numel(p) for p in model.parameters() if is_sharded(p))
    shared = sum(_numel(p) for p in model.parameters() if not is_sharded(p))
    return int(topology.all_reduce_tp(torch.tensor(own, device=topology.device))) + shared


def _numel(parameter: Tensor) -> int:
    # ZeRO-3 empties parameters and stores their size here.
    return int(getattr(parameter, "ds_numel", parameter.numel()))
