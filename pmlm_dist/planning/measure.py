"""Attained rates of the device of this process.

    matrix rate     matrix products in the shapes of the model, including attention's small ones, one after another
    bandwidth       bytes a second of the element-wise operations: copy, sum, GELU, LayerNorm, softmax
    dispatch        seconds of an operation on one element
    link            bytes a second of an all-reduce over all ranks of this world, by the ring formula

All ranks measure at the same time, since they share cores, memory and links in training too.
"""

import os
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F

from pmlm_dist.config import ModelConfig
from pmlm_dist.devices import HEAP_SLACK, Device, device_named
from pmlm_dist.launch_environment import local_world_size
from pmlm_dist.parallel.groups import Topology

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_MAX_TOKENS = 4096
"""Rows of a product; with more its rate no longer changes."""
_BATCHED = (16, 512, 512)
"""Shape of attention's products: heads times samples, queries, keys."""
_ELEMENTWISE = (4096, 1024)
"""Shape of the tensors of element-wise operations."""
_REDUCED_BYTES = 2**24


def measure_device(
    precision: str, topology: Topology, *, model: ModelConfig, tokens: int, seconds: float = 2.0
) -> Device:
    """The device of this rank with its attained rates in `precision`; a collective: every rank must call it.

    The matrix rate is that of `model`'s products with `tokens` rows, since small products are slower. The slowest rank
    sets all rates. `seconds`: duration of each part of the measurement.
    """
    dtype, on = _DTYPES[precision], topology.device
    topology.barrier()
    rate = _matrix_rate(dtype, on, model=model, tokens=min(tokens, _MAX_TOKENS), seconds=seconds)
    bandwidth = _bandwidth(dtype, on, seconds=seconds)
    link = _link(topology, seconds=seconds) if topology.world_size > 1 else float("nan")
    slowest = torch.tensor([rate, bandwidth], dtype=torch.float64, device=on)
    if topology.world_size > 1:
        dist.all_reduce(slowest, op=dist.ReduceOp.MIN)
    rate, bandwidth = slowest.tolist()
    known = device_named(torch.cuda.get_device_name(on)) if on.type == "cuda" else None
    return Device(
        name=f"measured {known.name if known else on.type}",
        memory=_memory(topology),
        peak={precision: rate},
        bandwidth=bandwidth,
        link=link,
        network=known.network if known else link,
        matrix_share=1.0,
        bandwidth_share=1.0,
        link_share=1.0,
        is_accelerator=on.type == "cuda",
        dispatch=_dispatch(on),
        slack=0.06 if on.type == "cuda" else HEAP_SLACK,
    )


def _matrix_rate(dtype: torch.dtype, on: torch.device, *, model: ModelConfig, tokens: int, seconds: float) -> float:
    """FLOP/s over all shapes: total FLOPs over the sum of the fastest time of each shape."""
    flops = spent = 0.0
    size, inner = model.hidden_size, model.ffn_size
    for m, k, n in ((tokens, size, inner), (tokens, inner, size), (tokens, size, size), (size, tokens, inner)):
        a, b, out = (torch.randn(shape, device=on, dtype=dtype) for shape in ((m, k), (k, n), (m, n)))
        flops += 2.0 * m * k * n
        spent += _fastest(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), on, seconds=seconds / 5)
    (batch, q, k), d = _BATCHED, model.head_dim
    a, b, out = (torch.randn(shape, device=on, dtype=dtype) for shape in ((batch, q, d), (batch, d, k), (batch, q, k)))
    flops += 2.0 * batch * q * d * k
    spent += _fastest(lambda: torch.bmm(a, b, out=out), on, seconds=seconds / 5)
    return flops / spent


def _bandwidth(dtype: torch.dtype, on: torch.device, *, seconds: float) -> float:
    """Bytes a second over all element-wise operations together."""
    x, y, out = (torch.randn(_ELEMENTWISE, device=on, dtype=dtype) for _ in range(3))
    ones = torch.ones(_ELEMENTWISE[1], device=on, dtype=dtype)
    passes: list[tuple[int, Callable[[], object]]] = [
        (2, lambda: out.copy_(x)),
        (3, lambda: torch.add(x, y, out=out)),
        (2, lambda: F.gelu(x)),
        (2, lambda: F.layer_norm(x, (_ELEMENTWISE[1],), ones, ones)),
        (2, lambda: torch.softmax(x, dim=-1, out=out)),
    ]
    moved = sum(tensors for tensors, _ in passes) * x.numel() * x.element_size()
    return moved / sum(_fastest(run, on, seconds=seconds / len(passes)) for _, run in passes)


def _dispatch(on: torch.device) -> float:
    x = torch.zeros(1, device=on)
    return _fastest(lambda: [x.add_(1) for _ in range(100)], on, seconds=0.05) / 100


def _link(topology: Topology, *, seconds: float) -> float:
    """Bytes a second that a rank sends in an all-reduce: 2 (n - 1) / n of the tensor's bytes; median of the rounds."""
    ranks = topology.world_size
    values = torch.ones(_REDUCED_BYTES // 4, device=topology.device)
    rounds = []
    dist.all_reduce(values)
    for _ in range(max(3, int(4 * seconds))):  # a count, not a time: every rank must make as many calls
        topology.barrier()
        start = time.perf_counter()
        dist.all_reduce(values)
        _synchronize(topology.device)
        rounds.append(time.perf_counter() - start)
    slowest = torch.tensor([statistics.median(rounds)], dtype=torch.float64, device=topology.device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return 2 * (ranks - 1) / ranks * _REDUCED_BYTES / float(slowest)


def _fastest(run: Callable[[], object], on: torch.device, *, seconds: float) -> float:
    """Seconds of the fastest call within `seconds`; the first call is a warm-up.

    The minimum, not the median: other processes only ever make a call slower.
    """
    run()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        _synchronize(on)
        start = time.perf_counter()
        run()
        _synchronize(on)
        best = min(best, time.perf_counter() - start)
    return best


def _synchronize(on: torch.device) -> None:
    if on.type == "cuda":
        torch.cuda.synchronize(on)


def _memory(topology: Topology) -> float:
    """Bytes of the device's memory; on a CPU this rank's share of the host's."""
    if topology.device.type == "cuda":
        return float(torch.cuda.get_device_properties(topology.device).total_memory)
    ranks_of_host = local_world_size(os.environ, default=topology.world_size)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / ranks_of_host
