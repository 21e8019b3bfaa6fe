"""Fused attention on rows longer than 1,024, where torch's softmax takes another kernel on CUDA."""

from collections.abc import Callable

import torch

from pmlm_dist.model.attention import QueryGroup, attention_fused, attention_reference

H, D, M = 2, 8, 3


def errors_of_fused(length: int, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """Root mean square errors of outputs and gradients for `length` context slots, relative to those of the reference.

    The reference computes in fp64 on the CPU, with inputs rounded to `dtype`. Its gradients are those of a random sum.
    """
    slots, random = length + 2 * M, torch.Generator().manual_seed(length)
    shapes = {
        "q": (slots, 1, H, D),
        "kv": (slots, 1, H, 2, D),
        "context bias": (H, 1, length, length),
        "appended bias": (H, 1, 2 * M, slots),
        "sum": (slots, 1, H, D),
    }
    tensors = {name: torch.randn(shape, generator=random).to(dtype) for name, shape in shapes.items()}
    # Keys of the whole row matter: some rows see the last keys only, some have a few large scores.
    tensors["appended bias"][0, :, :, : length - 5] = float("-inf")
    tensors["context bias"][1, :, ::7, -1] = 20.0
    exact = _outcome(attention_reference, tensors, torch.float64, torch.device("cpu"))
    fused = _outcome(attention_fused, tensors, dtype, device)
    return {name: float((fused[name] - values).norm() / values.norm()) for name, values in exact.items()}


def _outcome(
    attend: Callable[..., torch.Tensor], tensors: dict[str, torch.Tensor], dtype: torch.dtype, device: torch.device
) -> dict[str, torch.Tensor]:
    inputs = {name: tensor.to(device, dtype) for name, tensor in tensors.items()}
    weights = inputs.pop("sum")
    q, kv, *biases = (tensor.requires_grad_() for tensor in inputs.values())
    length = biases[0].shape[-1]
    context, appended, everything = slice(0, length), slice(length, None), slice(0, len(kv))
    groups = (QueryGroup(context, context, biases[0]), QueryGroup(appended, everything, biases[1]))
    mixed = attend(q, kv, groups, dropout=0.0)
    gradients = torch.autograd.grad((mixed * weights).sum(), list(inputs.values()))
    results = {"output": mixed.detach(), **dict(zip(inputs, gradients, strict=True))}
    return {name: tensor.double().cpu() for name, tensor in results.items()}
