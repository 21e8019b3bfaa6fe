"""Incremental decoding against one teacher-forced pass over the layout of fine-tuning."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from support.batches import MODEL, SPECIAL, VOCABULARY, model_of
from support.worlds import run_world

from pmlm_dist.decoding.incremental import Appended, Context, DecodingSession
from pmlm_dist.masking.layout import Layout, SlotInputs
from pmlm_dist.masking.seq2seq_layout import Seq2SeqRule, build_seq2seq_layout
from pmlm_dist.model.transformer import PseudoMaskedLM

RULE = Seq2SeqRule(max_source=14, max_target=7, noise=False)


def random_layout(*, batch: int = 3, seed: int = 0, rule: Seq2SeqRule = RULE) -> Layout:
    """Sources and targets of different lengths in the layout of fine-tuning, without noise."""
    random = np.random.default_rng(seed)
    lengths = [(rule.max_source - 2, rule.max_target - 1), *random.integers(1, (12, 6), size=(batch - 1, 2))]
    pairs = [tuple(random.integers(5, VOCABULARY, size=n) for n in both) for both in lengths]
    ids = list(range(batch))
    return build_seq2seq_layout(pairs, sample_ids=ids, epochs=[0] * batch, seed=0, rule=rule, special=SPECIAL)  # pyright: ignore[reportArgumentType]


def tensors(layout: Layout, *, left: bool) -> dict[str, torch.Tensor]:
    """Tensors of the layout; `left`: sources padded on the left instead of the right."""
    named = {name: torch.from_numpy(array) for name, array in layout._asdict().items()}
    if left:
        num_source = context_length(layout)
        for row in range(len(layout.tokens_BT)):
            shift = num_source - int(layout.valid_BT[row, :num_source].sum())
            for name in ("tokens_BT", "positions_BT", "segments_BT", "valid_BT"):
                named[name][row, :num_source] = named[name][row, :num_source].roll(shift)
    return named


def context_length(layout: Layout) -> int:
    return layout.tokens_BT.shape[1] - 2 * layout.predicted_BM.shape[1]


def teacher_forced(model: PseudoMaskedLM, layout: dict[str, torch.Tensor]) -> torch.Tensor:
    """Log-probabilities [B, M, V] of the target's tokens in one pass."""
    from pmlm_dist.parallel.cross_entropy import gather_logits

    logits_MBV = model(inputs=SlotInputs.of(layout), objectives=("par",))[0]
    return gather_logits(logits_MBV)[..., :VOCABULARY].log_softmax(-1).transpose(0, 1)


def step_by_step(
    model: PseudoMaskedLM, layout: dict[str, torch.Tensor], num_source: int, parents: torch.Tensor, *, beams: int
) -> torch.Tensor:
    """Log-probabilities [B, M, V] of the target, which is beam `parents[m]` in step m among random hypotheses."""
    M = layout["targets_BM"].shape[1]
    names = ("tokens_BT", "positions_BT", "segments_BT", "valid_BT")
    context = Context(*(layout[name][:, :num_source] for name in names))
    session = DecodingSession(model, context, mask_id=SPECIAL.mask, beams=beams, capacity=M + 1)
    batch, lengths_B = len(context.tokens_BS), context.valid_BS.sum(1)
    random = torch.Generator().manual_seed(0)
    logits_of_target, previous = [], torch.tensor(0)
    for m in range(M):
        if m == 0:
            tokens = layout["tokens_BT"].new_empty(batch, 0, 1)
            steps, parents_BK = torch.tensor([0]), None
        else:
            tokens = torch.randint(5, VOCABULARY, (batch, 1, beams), generator=random)
            tokens[:, 0, parents[m]] = layout["targets_BM"][:, m - 1]
            steps = torch.tensor([m - 1, m])
            parents_BK = torch.randint(beams, (batch, beams), generator=random)
            parents_BK[:, parents[m]] = previous
        positions = (lengths_B[:, None] + steps).clamp(max=model.config.max_positions - 1)
        logits = session.step(Appended(tokens, positions, torch.ones_like(positions), parents_BK))
        logits_of_target.append(logits[:, 0, 0 if m == 0 else parents[m]])
        previous = parents[m]
    return torch.stack(logits_of_target, dim=1).log_softmax(-1)


def compare(tp: int, settings: dict, left: bool, beams: int, dtype: torch.dtype = torch.float64) -> tuple[float, float]:
    """Largest difference over the targets with weight, and largest magnitude of a log-probability."""
    from pmlm_dist.parallel import groups

    groups.init_process_groups(tp=tp)
    model = model_of(replace(MODEL, **settings), dtype=dtype).eval()
    layout = random_layout()
    named = tensors(layout, left=left)
    parents = torch.randint(beams, (RULE.max_target,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        at_once = teacher_forced(model, named)
    stepwise = step_by_step(model, named, context_length(layout), parents, beams=beams)
    counts = named["weights_BM"].bool()
    assert at_once[counts].std() > 0.1
    return float((at_once - stepwise)[counts].abs().max()), float(at_once[counts].abs().max())


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("settings", [{}, {"relative_bias": False}, {"attention": "reference"}], ids=str)
def test_steps_equal_teacher_forced_pass(settings, beams, left):
    difference, _ = compare(1, settings, left, beams)
    assert difference < 1e-11


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_steps_equal_teacher_forced_pass_in_lower_precision(dtype, tolerance):
    difference, largest = compare(1, {}, False, 3, dtype)
    assert difference < tolerance * largest


@pytest.mark.distributed
@pytest.mark.parametrize("relative_bias", [True, False])
def test_steps_equal_teacher_forced_pass_on_two_tensor_parallel_ranks(relative_bias):
    results = run_world(compare, 2, 2, {"relative_bias": relative_bias}, True, 3)
    assert max(difference for difference, _ in results) < 1e-11
    assert results[0] == results[1]


def test_source_is_computed_once_and_shared_by_beams():
    model, layout = model_of().eval(), tensors(random_layout(), left=False)
    slots = []
    for layer in model.layers:
        projection: Any = layer.get_submodule("attention.key_value")
        projection.register_forward_hook(lambda _m, inputs, _o: slots.append(inputs[0].shape[:-1].numel()))
    step_by_step(model, layout, RULE.max_source, torch.zeros(RULE.max_target, dtype=torch.long), beams=4)
    per_layer = 3 * RULE.max_source + 3 * 1 + 3 * 2 * 4 * (RULE.max_target - 1)
    assert sum(slots) == per_layer * MODEL.num_layers


def test_selected_samples_continue_unchanged():
    model, layout = model_of().eval(), tensors(random_layout(), left=False)
    names = ("tokens_BT", "positions_BT", "segments_BT", "valid_BT")
    context = Context(*(layout[name][:, : RULE.max_source] for name in names))
    sessions = [DecodingSession(model, context, mask_id=SPECIAL.mask, beams=2, capacity=4) for _ in range(2)]
    kept, lengths_B = torch.tensor([2, 0]), context.valid_BS.sum(1)
    empty, tokens = torch.empty(3, 0, 1, dtype=torch.long), torch.randint(5, VOCABULARY, (3, 1, 2))
    first = Appended(empty, lengths_B[:, None], torch.ones(3, 1, dtype=torch.long))
    for session in sessions:
        session.step(first)
    sessions[1].select(kept)
    positions = lengths_B[:, None] + torch.arange(2)
    full = sessions[0].step(Appended(tokens, positions, torch.ones_like(positions)))
    part = sessions[1].step(Appended(tokens[kept], positions[kept], torch.ones(2, 2, dtype=torch.long)))
    torch.testing.assert_close(part, full[kept], rtol=0, atol=1e-12)
