"""Seconds of an optimizer step from its FLOPs, its memory traffic and its communication.

    step = accumulation * (matrix products + element-wise operations) + exposed communication + optimizer step

Matrix products run at the attained matrix rate. The element-wise operations between them (bias, dropout, residual sums,
LayerNorm, GELU, softmax, copies) run at the attained memory bandwidth. Their times add up, since eager operations run
one after another (the roofline model of Williams et al., 2009, with one roof at a time). On an accelerator the host
launches operations ahead; if it is slower than the device, it limits the step. Communication is hidden where DeepSpeed
overlaps it with a backward pass; tensor-parallel communication is never hidden.

The reads and writes of each tensor were counted in the source of `model/` and DeepSpeed, operation by operation.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from pmlm_dist.devices import Device
from pmlm_dist.planning.activations import bias_numbers
from pmlm_dist.planning.communication import Traffic
from pmlm_dist.planning.model_states import FULL, Zero
from pmlm_dist.planning.parameters import rank_parameters
from pmlm_dist.planning.workload import Workload

# Reads and writes of a tensor, sum of forward and backward pass.
_WIDE = 31  # [tokens, E]: residual sums, LayerNorm, bias gradients
_OWN = 37  # [tokens, E / t]: queries, keys, values and attention output, transposed by head and back
_HIDDEN = 6  # [tokens, F / t]: GELU, bias gradient
_PAIRS = 16  # [H / t, B, Q, K]: scores, softmax, gradients
_EMBEDDING = 22  # [tokens, E]: three look-ups, their sum, LayerNorm, and their backward passes
_HEAD = 20  # [R, B, E]
_BIAS = 16  # bytes of a bias element in each layer: fp32 gradient, its rounding, the sum over layers
_WIDE_DROPOUT, _PAIRS_DROPOUT = 12, 10
_LOGITS, _LOGITS_FULL = 6, 8  # reads and writes of the logits, and of their fp32 chunks
_ADAM = 28  # bytes of a parameter: reads weight, gradient and both moments, writes all but the gradient
_OPERATIONS_OF_LAYER, _OTHER_OPERATIONS = 130, 250  # forward and backward pass
# The same with the kernels of a GPU, which read and write every tensor once: model/elementwise.py, triton_attention.py.
_KERNEL_WIDE, _KERNEL_WIDE_DROPOUT, _KERNEL_OWN, _KERNEL_HIDDEN, _KERNEL_LOGITS = 16, 2, 16, 5, 2
_KERNEL_OPERATIONS_OF_LAYER = 34
_OPERATIONS_OF_PARAMETER = 4  # DeepSpeed's hooks, in every backward pass


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step on every rank."""

    products: float
    """Matrix products."""
    passes: float
    """Element-wise operations: passes over memory between the products."""
    issuing: float
    """Launch overhead: time that the host needs for launching operations beyond the two above."""
    update: float
    """Optimizer step, including gradient copies and norm."""
    exposed: float
    """Communication that does not overlap with computation."""
    hidden: float
    """Communication that overlaps with the backward pass; not part of the total."""

    @property
    def total(self) -> float:
        """Seconds from one step to the next."""
        return self.products + self.passes + self.issuing + self.update + self.exposed


def step_time(
    work: Workload, zero: Zero, device: Device, *, dp: int, accumulation: int, traffics: Sequence[Traffic]
) -> StepTime:
    """Seconds of a step of `accumulation` micro-batches."""
    products = executed_flops(work) / work.tp / (device.peak[work.precision] * device.matrix_share)
    passes = moved_bytes(work) / (device.bandwidth * device.bandwidth_share)
    issue = device.dispatch * _operations(work)
    issuing = max(0.0, issue - products - passes) if device.is_accelerator else issue
    # Two thirds of a micro-batch are its backward pass, the only part that communication overlaps with.
    backward = 2 / 3 * (products + passes)
    hideable = sum(traffic.seconds for traffic in traffics if traffic.collective.is_hidden)
    if zero.stage in (2, 3):  # these communicate in every micro-batch
        backward *= accumulation
    hidden = min(hideable, backward)
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
    """FLOPs of one micro-batch over all tensor-parallel ranks, including recomputation."""
    recomputed = work.layer_flops if work.model.activation_checkpointing else 0.0
    return work.micro_batch * (3.0 * work.sample_flops + recomputed)


def moved_bytes(work: Workload) -> float:
    """Bytes that element-wise operations of a micro-batch read and write on one rank, forward and backward."""
    model, a = work.model, work.element
    inner = _layer_bytes(work, work.tokens, work.inner_pairs)
    last = _layer_bytes(work, work.predicted_tokens, work.last_pairs)
    layers = (model.num_layers - 1) * inner + last
    if model.activation_checkpointing:
        layers *= 4 / 3  # a second forward pass, about a third of the whole
    of_logits = _KERNEL_LOGITS * a if work.on_accelerator else _LOGITS * a + _LOGITS_FULL * FULL
    logits = work.predicted_tokens * work.vocabulary * of_logits
    ends = a * model.hidden_size * (_EMBEDDING * work.tokens + _HEAD * work.predicted_tokens)
    tables = 3 * a * work.vocabulary * model.hidden_size
    return layers + logits + ends + tables


def _layer_bytes(work: Workload, tokens: int, pairs: int) -> float:
    model = work.model
    wide, dropped, own, hidden = _WIDE, _WIDE_DROPOUT, _OWN, _HIDDEN
    if work.on_accelerator:
        wide, dropped, own, hidden = _KERNEL_WIDE, _KERNEL_WIDE_DROPOUT, _KERNEL_OWN, _KERNEL_HIDDEN
    wide += dropped if model.hidden_dropout else 0
    own, hidden = own / work.tp, hidden * model.ffn_size / work.tp
    numbers = tokens * ((wide + own) * model.hidden_size + hidden)
    scored = 0 if work.attention == "triton" else _PAIRS + (_PAIRS_DROPOUT if model.attention_dropout else 0)
    return work.element * (numbers + scored * pairs) + _BIAS * sum(bias_numbers(work))


def _operations(work: Workload) -> float:
    parameters = 16 * work.model.num_layers + 11
    of_layer = _KERNEL_OPERATIONS_OF_LAYER if work.on_accelerator else _OPERATIONS_OF_LAYER
    return of_layer * work.model.num_layers + _OTHER_OPERATIONS + _OPERATIONS_OF_PARAMETER * parameters


def _update(work: Workload, zero: Zero, device: Device, *, dp: int, accumulation: int) -> float:
    numbers, w = rank_parameters(work), work.element
    share, bandwidth = numbers / dp, device.bandwidth * device.bandwidth_share
    if zero.offload:
        moved = 8 * w * numbers * accumulation / bandwidth
        over_link = (zero.accumulated + w) * share / device.host_link
        return moved + over_link + (_ADAM + 2 * FULL + w) * share / device.host_bandwidth
    every_micro_batch, every_step = {
        "plain": (0.0, _ADAM * numbers),
        # Added to the fp32 sums. The first micro-batch does not read them, which offsets the pass of the norm. With
        # several ranks the sums are flattened, rounded, averaged and copied back.
        "bf16": ((w + 2 * FULL) * numbers, (6 * FULL + 2 * w if dp > 1 else 0) * numbers + (_ADAM + FULL + w) * share),
        # Copied to the bucket, divided, flattened, copied back; then norm, flat fp32 copy, update, weights.
        "stage 1 and 2": (0.0, 8 * w * numbers + (_ADAM + 3 * FULL + 2 * w) * share),
        "stage 3": (8 * w * numbers, (_ADAM + 3 * FULL + 2 * w) * share),
    }[zero.optimizer_class]
    if zero.stage == 2:
        every_micro_batch = 8 * w * numbers
        every_step -= 8 * w * numbers
    return (accumulation * every_micro_batch + every_step) / bandwidth
