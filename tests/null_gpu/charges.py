"""What the operations of a training step move and compute, by class: the figures of a roofline (`roofline.py`).

    TorchDispatchMode   operations of torch: bytes of their tensors, FLOPs of products
    JITFunction.run     kernels of attention: bytes of their tensors, FLOPs of the blocks that hold a visible pair
    CachingAutotuner    kernels that torch.compile generated: bytes of their tensors

Each is charged the largest of bytes / bandwidth, FLOPs / rate and the time of a launch. The class of an operation is
the module that issued it; that of a backward operation is that of the forward operation it belongs to.
"""

import collections
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

# What is only another view, or only takes memory.
VIEWS = {
    "view",
    "t",
    "transpose",
    "permute",
    "expand",
    "slice",
    "select",
    "unsqueeze",
    "squeeze",
    "detach",
    "alias",
    "unfold",
    "as_strided",
    "split",
    "unbind",
    "narrow",
    "split_with_sizes",
    "_unsafe_view",
    "empty",
    "empty_like",
    "new_empty",
    "reshape",
    "_reshape_alias",
    "empty_strided",
    "diagonal",
    "lift_fresh",
    "resize_",
    "set_",
    "record_stream",
    "is_pinned",
    "_pin_memory",
    "new_empty_strided",
}
WRITES_ONLY = {"copy_", "zero_", "fill_", "bernoulli_", "normal_", "uniform_"}
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm"}
LAUNCH_S = 2e-6
sequence_number: Any = vars(torch.autograd)["_get_sequence_nr"]
"""Number that the next operation which autograd records will have."""
IN_PLACE = {"_exponentiate"}
"""Kernels that write the tensor they read."""
ATTENTION_FLOPS = {"attend": 4, "query_gradients": 4, "key_gradients": 6}
"""Necessary FLOPs for each computed pair and unit of the head size, as published rates of kernels count them. The two
backward kernels compute 14 in place of 10, since both need the scores."""


@dataclass(frozen=True)
class Rates:
    """What a device attains: assumptions."""

    bandwidth: float
    """Bytes a second."""
    matrix: float
    """FLOP/s of large products."""
    batched: float
    """FLOP/s of batched products."""
    attention_forward: float
    """FLOP/s of the attention kernel."""
    attention_backward: float


@dataclass
class Row:
    """Sums of a class."""

    operations: float = 0
    bytes: float = 0
    flops: float = 0
    seconds: float = 0.0

    def scaled(self, factor: float) -> "Row":
        return Row(*(factor * value for value in vars(self).values()))

    def __add__(self, other: "Row") -> "Row":
        return Row(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


@dataclass
class Table:
    """Charges by class, and by class and operation."""

    rates: Rates
    by_class: dict[str, Row] = field(default_factory=lambda: collections.defaultdict(Row))
    by_operation: dict[tuple[str, str], Row] = field(default_factory=lambda: collections.defaultdict(Row))

    def charge(self, kind: str, name: str, *, moved: float, flops: float = 0.0, rate: float | None = None) -> None:
        rates = self.rates
        seconds = max(moved / rates.bandwidth, flops / (rate or rates.matrix), LAUNCH_S)
        row = Row(1, moved, flops, seconds)
        self.by_class[kind] += row
        self.by_operation[kind, name] += row

    @property
    def total(self) -> Row:
        return sum(self.by_class.values(), Row())


def size_of(tensor: torch.Tensor) -> int:
    """Bytes that reading or writing all of it moves; what is expanded counts once."""
    numel = 1
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        numel *= length if stride else 1
    return numel * tensor.element_size()


class Places:
    """Which part of the model an operation belongs to; backward ones by the forward one that they belong to."""

    def __init__(self, model: torch.nn.Module):
        self.begin()
        for name, module in model.named_modules():
            if (kind := self.kind(name, module)) is not None:
                module.register_forward_pre_hook(lambda *_, kind=kind: self.enter(kind))
                module.register_forward_hook(lambda *_: self.leave())

    def begin(self) -> None:
        """Begin a micro-batch."""
        self.stack, self.of_sequence = ["attention plan"], []
        self.first = self.seen = sequence_number()

    @staticmethod
    def kind(name: str, module: torch.nn.Module) -> str | None:
        last = name.rsplit(".", 1)[-1]
        if name.startswith("head"):
            return "head and loss"
        if last in ("query", "key_value", "output", "ffn_in", "ffn_out"):
            return "matrix products"
        if isinstance(module, torch.nn.LayerNorm):
            return "LayerNorm"
        if isinstance(module, torch.nn.Dropout):
            return "dropout of states"
        if name == "embeddings":
            return "embeddings"
        if last == "attention":
            return "attention"
        if name.startswith("layers.") and name.count(".") == 1:
            return "GELU, residuals"
        return None

    def note(self) -> None:
        now = sequence_number()
        self.of_sequence += [self.stack[-1]] * (now - self.seen)
        self.seen = max(now, self.seen)

    def enter(self, kind: str) -> None:
        self.note()
        self.stack.append(kind)

    def leave(self) -> None:
        self.note()
        self.stack.pop()

    def here(self) -> str:
        node: Any = torch._C._current_autograd_node()
        if node is None:
            self.note()
            return self.stack[-1]
        number = node._sequence_nr() - self.first
        return self.of_sequence[number] if 0 <= number < len(self.of_sequence) else "sums of gradients"


class Charged(TorchDispatchMode):
    """Charges what torch runs inside to a table."""

    def __init__(self, table: Table, places: Places | None, kind: str = ""):
        super().__init__()
        self.table, self.places, self.kind = table, places, kind

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        kind = self.places.here() if self.places else self.kind
        out = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        read = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor) and x.is_cuda]
        written = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor) and x.is_cuda]
        if name in VIEWS or not (read or written):
            return out
        if kind == "matrix products" and name not in PRODUCTS:
            kind = "biases' gradients"
        rate = self.table.rates.batched if "bmm" in name else None
        flops = _flops(func, name, args, kwargs, out, read)
        self.table.charge(kind, name, moved=_moved(func, name, args, kwargs, read, written), flops=flops, rate=rate)
        return out


def _moved(func: Any, name: str, args: Any, kwargs: Any, read: list[torch.Tensor], written: list[torch.Tensor]) -> int:
    inputs = sum(map(size_of, read))
    if "out" in kwargs or "out" in func._overloadname or "grad_input" in kwargs:
        return inputs  # what is written is among the arguments
    if name == "_fused_adamw_":  # reads weights, gradients and moments, writes all but gradients
        return inputs + sum(size_of(x) for part in (args[0], *args[2:4]) for x in part)
    if name.endswith("_"):
        own = size_of(written[0]) if written else 0
        return inputs if name in WRITES_ONLY else inputs + own
    moved = inputs + sum(map(size_of, written))
    return 2 * moved if name == "_softmax_backward_data" else moved  # CUDA's writes gradient * output first


def _flops(func: Any, name: str, args: Any, kwargs: Any, out: Any, read: list[torch.Tensor]) -> float:
    if name in ("bmm", "baddbmm"):
        left, right = read[:2] if name == "bmm" else read[1:3]
        return 2 * left.shape[0] * left.shape[1] * left.shape[2] * right.shape[2]
    if func.overloadpacket not in flop_registry:
        return 0.0
    return flop_registry[func.overloadpacket](*args, **kwargs, out_val=out)


@contextmanager
def charged_kernels(table: Table, places: Places, pairs_of: dict[int, int]) -> Any:
    """Charge launches of Triton kernels inside, too. `pairs_of`: computed pairs of a head by number of queries."""
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner
    from triton.runtime.jit import JITFunction

    launch, launch_generated = JITFunction.run, CachingAutotuner.run

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        name, tensors = self.fn.__name__, [x for x in args if isinstance(x, torch.Tensor)]
        flops, rate = 0.0, None
        if name in ATTENTION_FLOPS:
            queries, _, heads, width = tensors[0].shape
            flops = ATTENTION_FLOPS[name] * width * heads * pairs_of[queries]
            rate = table.rates.attention_forward if name == "attend" else table.rates.attention_backward
        kind = "attention" if name in ATTENTION_FLOPS else places.here()
        moved = sum(map(size_of, tensors))
        moved *= 2 if name in IN_PLACE else 1
        table.charge(kind, name, moved=moved, flops=flops, rate=rate)
        return launch(self, *args, **kwargs)

    def run_generated(self: Any, *args: Any, **kwargs: Any) -> Any:
        tensors = [x for x in args if isinstance(x, torch.Tensor)]
        table.charge(places.here(), self.fn.__name__, moved=sum(map(size_of, tensors)))
        return launch_generated(self, *args, **kwargs)

    JITFunction.run, CachingAutotuner.run = run, run_generated
    try:
        yield
    finally:
        JITFunction.run, CachingAutotuner.run = launch, launch_generated
