"""Seconds of an optimizer step, put together from what it computes, moves and sends.

    step = accumulation * (matrix products + passes over memory) + exposed communication + update

Matrix products take their FLOPs at the attained matrix rate. Everything else between them (bias, dropout, residual
sums, LayerNorm, GELU, softmax, copies) reads and writes tensors at the attained memory bandwidth and adds up, since
eager operations run one after another (the roofline model of Williams et al., 2009, with the two roofs in turn). On an
accelerator the host issues operations ahead; when it is slower than the device, it sets the pace. Communication is
hidden where DeepSpeed overlaps it with a backward pass; tensor-parallel communication never is.

How often a tensor is read or written was counted in `model/` and DeepSpeed's source, operation by operation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pmlm_dist.devices import Device
from pmlm_dist.planning.activations import bias_numbers
from pmlm_dist.planning.communication import Traffic
from pmlm_dist.planning.model_states import FULL, Zero
from pmlm_dist.planning.parameters import model_parameters
from pmlm_dist.planning.workload import Workload

# Reads and writes of a tensor in forward and backward together.
_WIDE = 31  # [tokens, E]: residual sums, LayerNorm, bias gradients
_OWN = 37  # [tokens, E / t]: queries, keys, values and mixed values, laid out by head and back
_HIDDEN = 6  # [tokens, F / t]: GELU, bias gradient
_PAIRS = 16  # [H / t, B, Q, K]: scores, softmax, gradients
_EMBEDDING = 22  # [tokens, E]: three look-ups, their sum, LayerNorm, and back
_HEAD = 20  # [R, B, E]
_BIAS = 16  # bytes of a bias' number in each layer: fp32 gradient, its rounding, the sum over layers
_WIDE_DROPOUT, _PAIRS_DROPOUT = 12, 10
_LOGITS, _LOGITS_FULL = 6, 8  # reads and writes of the logits, and of their fp32 chunks
_ADAM = 28  # bytes of a number: weight, gradient and both moments are read, all but the gradient written
_OPERATIONS_OF_LAYER, _OPERATIONS_BESIDES = 130, 250
_OPERATIONS_OF_PARAMETER = 4  # of DeepSpeed's hooks, in every backward pass


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step on every rank."""

    products: float
    """Matrix products."""
    passes: float
    """Passes over memory between the products."""
    issuing: float
    """What the host needs beyond that to issue the operations."""
    update: float
    """The optimizer's update, gradient copies and norm included."""
    exposed: float
    """Communication that nothing hides."""
    hidden: float
    """Communication beside the backward pass; no part of the total."""

    @property
    def total(self) -> float:
        """From one step to the next."""
        return self.products + self.passes + self.issuing + self.update + self.exposed


def step_time(
    work: Workload, zero: Zero, device: Device, *, dp: int, accumulation: int, traffics: Sequence[Traffic]
) -> StepTime:
    """Seconds of a step of `accumulation` micro-batches."""
    products = executed_flops(work) / work.tp / (device.peak[work.precision] * device.matrix_share)
    passes = moved_bytes(work) / (device.bandwidth * device.bandwidth_share)
    issue = device.dispatch * _operations(work)
    issuing = max(0.0, issue - products - passes) if device.is_accelerator else issue
    # Two thirds of a micro-batch are its backward pass.
    room = 2 / 3 * (products + passes)
    hideable = sum(traffic.seconds for traffic in traffics if traffic.collective.is_hidden)
    if zero.keeper == "stage 3" or zero.stage == 2:
        room *= accumulation
    hidden = min(hideable, room)
    exposed = sum(traffic.seconds for traffic in traffics) - hidden
    return StepTime(
        products=accumulation * products,
        passes=accumulation * passes,
        issuing=accumulation * issuing,
        update=_update(work, zero, device, dp=dp, accumulation=accumulation),
        exposed=exposed,
        hidden=hidden,
    )


def executed_flops(work: Workload) -> float:
    """FLOPs of one micro-batch over all tensor-parallel ranks, recomputation included."""
    again = work.layer_flops if work.model.activation_checkpointing else 0.0
    return work.micro_batch * (3.0 * work.sample_flops + again)


def moved_bytes(work: Workload) -> float:
    """Bytes that a micro-batch reads and writes between its products on one rank, forward and backward."""
    model, a = work.model, work.element
    inner = _layer_bytes(work, work.tokens, work.inner_pairs)
    last = _layer_bytes(work, work.predicted_tokens, work.last_pairs)
    layers = (model.num_layers - 1) * inner + last
    if model.activation_checkpointing:
        layers *= 4 / 3  # a forward pass is about a third
    logits = work.predicted_tokens * work.vocabulary * (_LOGITS * a + _LOGITS_FULL * FULL)
    ends = a * model.hidden_size * (_EMBEDDING * work.tokens + _HEAD * work.predicted_tokens)
    tables = 3 * a * work.vocabulary * model.hidden_size
    return layers + logits + ends + tables


def _layer_bytes(work: Workload, tokens: int, pairs: int) -> float:
    model = work.model
    wide = _WIDE + (_WIDE_DROPOUT if model.hidden_dropout else 0)
    own, hidden = _OWN / work.tp, _HIDDEN * model.ffn_size / work.tp
    numbers = tokens * ((wide + own) * model.hidden_size + hidden)
    scored = 0 if model.attention == "flex" else _PAIRS + (_PAIRS_DROPOUT if model.attention_dropout else 0)
    return work.element * (numbers + scored * pairs) + _BIAS * sum(bias_numbers(work))


def _operations(work: Workload) -> float:
    parameters = 16 * work.model.num_layers + 11
    return _OPERATIONS_OF_LAYER * work.model.num_layers + _OPERATIONS_BESIDES + _OPERATIONS_OF_PARAMETER * parameters


def _update(work: Workload, zero: Zero, device: Device, *, dp: int, accumulation: int) -> float:
    numbers, w = model_parameters(work).on_rank(work.tp), work.element
    share, bandwidth = numbers / dp, device.bandwidth * device.bandwidth_share
    if zero.offload:
        moved = 8 * w * numbers * accumulation / bandwidth
        over_link = (zero.accumulated + w) * share / device.host_link
        return moved + over_link + (_ADAM + 2 * FULL + w) * share / device.host_bandwidth
    every_micro_batch, every_step = {
        "plain": (0.0, _ADAM * numbers),
        # Into the fp32 sums. That the first micro-batch does not read them makes up for the norm, which does. Among
        # several ranks the sums are flattened, rounded, averaged and copied back.
        "bf16": (
            (w + 2 * FULL) * numbers,
            (6 * FULL + 2 * w if dp > 1 else 0) * numbers + (_ADAM + FULL + w) * share,
        ),
        # Into the bucket, divided, flattened, copied back; then norm, flat fp32 copy, update, weights.
        "cutting": (0.0, 8 * w * numbers + (_ADAM + 3 * FULL + 2 * w) * share),
        "stage 3": (8 * w * numbers, (_ADAM + 3 * FULL + 2 * w) * share),
    }[zero.keeper]
    if zero.stage == 2:
        every_micro_batch = 8 * w * numbers
        every_step -= 8 * w * numbers
    return (accumulation * every_micro_batch + every_step) / bandwidth
