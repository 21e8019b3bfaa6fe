"""One training, many topologies: losses, gradient norm and weights after 10 steps equal those of a single process.

Tensor parallel 1, 2, 4 x data parallel 1, 2, 4 (4 ranks at most) x ZeRO 0 to 3 x accumulation 1 to 8 x activation
checkpointing x fp32, bf16: every pair of settings is met, not every combination. What the model shares or holds whole
(tied embedding, relative position table, LayerNorm) is among the weights that are compared.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from support.small_runs import Trained, run_config, train, with_model
from support.worlds import run_world

from pmlm_dist.config import RunConfig

pytestmark = pytest.mark.distributed

STEPS = 10
ROW_PARALLEL = ("attention.output.weight", "ffn_out.weight")  # split along their input


@pytest.fixture(scope="module")
def single(small_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """One process, no ZeRO, no accumulation, fp32."""
    config = run_config(small_corpus, tmp_path_factory.mktemp("single"), steps=STEPS, zero=0, micro_batch=8)
    return run_world(train, 1, config)[0]


def assemble(answers: list[Trained], *, tp: int, expected: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Whole weights from those of the first `tp` ranks, checked to be equal on the other data-parallel ranks."""
    whole = {}
    for name, like in expected.items():
        parts = [answer.weights[name] for answer in answers]
        for rank, part in enumerate(parts):
            assert torch.equal(part, parts[rank % tp]), f"{name} differs between data-parallel ranks"
        if parts[0].shape == like.shape:
            assert all(torch.equal(part, parts[0]) for part in parts), f"{name} differs between tensor-parallel peers"
            whole[name] = parts[0]
        else:
            whole[name] = torch.cat(parts[:tp], dim=1 if name.endswith(ROW_PARALLEL) else 0)
    return whole


def check_equal(answers: list[Trained], single: Trained, *, tp: int, tolerance: float) -> None:
    for answer in answers:
        assert answer.losses == answers[0].losses
        torch.testing.assert_close(answer.losses, single.losses, rtol=tolerance, atol=0)
        torch.testing.assert_close(answer.norms, single.norms, rtol=10 * tolerance, atol=0)
    weights = assemble(answers, tp=tp, expected=single.weights)
    for name, expected in single.weights.items():
        difference = (weights[name] - expected).abs().max()
        assert difference <= 10 * tolerance * max(1.0, float(expected.abs().max())), (name, difference)


@dataclass(frozen=True)
class Case:
    """A topology and how a step is cut on it; accumulation is 8 / (data-parallel ranks x micro-batch)."""

    ranks: int
    tp: int
    zero: int
    micro_batch: int
    checkpointing: bool = False

    def __str__(self) -> str:
        recomputed = "-checkpointing" if self.checkpointing else ""
        return f"tp{self.tp}-dp{self.ranks // self.tp}-zero{self.zero}-micro{self.micro_batch}{recomputed}"

    def config(self, corpus: Path, folder: Path, *, precision: str, **engine: Any) -> RunConfig:
        cut = {"tp": self.tp, "zero": self.zero, "micro_batch": self.micro_batch}
        config = run_config(corpus, folder, steps=STEPS, precision=precision, **cut, **engine)
        return with_model(config, activation_checkpointing=self.checkpointing)


CASES = [
    Case(1, 1, zero=0, micro_batch=4),
    Case(1, 1, zero=1, micro_batch=8),
    Case(1, 1, zero=1, micro_batch=2),
    Case(1, 1, zero=2, micro_batch=1, checkpointing=True),
    Case(1, 1, zero=3, micro_batch=4),
    Case(2, 1, zero=0, micro_batch=4, checkpointing=True),
    Case(2, 1, zero=1, micro_batch=4),
    Case(2, 1, zero=1, micro_batch=2),
    Case(2, 1, zero=2, micro_batch=4),
    Case(2, 1, zero=3, micro_batch=1),
    Case(4, 1, zero=0, micro_batch=2),
    Case(4, 1, zero=1, micro_batch=1, checkpointing=True),
    Case(4, 1, zero=2, micro_batch=2),
    Case(4, 1, zero=3, micro_batch=2),
    Case(2, 2, zero=0, micro_batch=8),
    Case(2, 2, zero=1, micro_batch=4),
    Case(2, 2, zero=2, micro_batch=8, checkpointing=True),
    Case(2, 2, zero=3, micro_batch=2),
    Case(4, 2, zero=0, micro_batch=1),
    Case(4, 2, zero=1, micro_batch=2),
    Case(4, 2, zero=2, micro_batch=2),
    Case(4, 2, zero=3, micro_batch=4, checkpointing=True),
    Case(4, 4, zero=0, micro_batch=2, checkpointing=True),
    Case(4, 4, zero=1, micro_batch=8),
    Case(4, 4, zero=2, micro_batch=4),
    Case(4, 4, zero=3, micro_batch=8),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.fault("F76")
def test_fp32_equals_a_single_process(small_corpus, tmp_path, single, case):
    config = case.config(small_corpus, tmp_path, precision="fp32")
    check_equal(run_world(train, case.ranks, config), single, tp=case.tp, tolerance=1e-5)


def test_cases_cover_every_pair_of_settings():
    """Among what fits: ZeRO stages with every tensor- and data-parallel size, with and without checkpointing."""
    sizes = {(case.tp, case.ranks // case.tp) for case in CASES}
    assert sizes == {(1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (4, 1)}
    for stage in range(4):
        assert {(case.tp, case.ranks // case.tp) for case in CASES if case.zero == stage} == sizes
        assert {case.checkpointing for case in CASES if case.zero == stage} == {False, True}


@pytest.mark.parametrize("masking", [{}, {"stop": "paper"}, {"prefix_share": 0.5}], ids=str)
def test_uneven_predictions_are_weighted_equally_under_any_split(small_corpus, tmp_path, masking):
    """With `stop: paper` and prefix samples, samples have different numbers of targets; means are over the step."""
    import dataclasses

    answers = []
    for ranks, micro_batch in ((1, 8), (1, 2), (2, 4), (2, 1)):
        config = run_config(small_corpus, tmp_path / f"{ranks}-{micro_batch}", steps=STEPS, micro_batch=micro_batch)
        config = dataclasses.replace(config, masking=dataclasses.replace(config.masking, **masking))
        answers.append(run_world(train, ranks, config)[0])
    for answer in answers[1:]:
        check_equal([answer], answers[0], tp=1, tolerance=1e-5)


BF16_CASES = [case for case in CASES if case.zero > 0 and case.ranks > 1]


@pytest.fixture(scope="module")
def single_bf16(small_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """One process in bf16: ZeRO-1, since stage 0 with bf16 raises."""
    config = run_config(
        small_corpus, tmp_path_factory.mktemp("bf16"), steps=STEPS, zero=1, precision="bf16", micro_batch=8
    )
    return run_world(train, 1, config)[0]


@pytest.mark.parametrize("case", BF16_CASES, ids=str)
def test_bf16_equals_a_single_process_within_its_rounding(small_corpus, tmp_path, single, single_bf16, case):
    """bf16 keeps 8 bits: sums taken in another order differ by up to 2^-9 of their terms.

    That is 0.1 % of a loss, 3 % of the gradient's norm, and for weights, which ten updates of at most 0.003 have moved
    by 0.01 in the mean, a twentieth of that movement in the mean.
    """
    answers = run_world(train, case.ranks, case.config(small_corpus, tmp_path, precision="bf16"))
    for reference in (single_bf16, single):
        torch.testing.assert_close(answers[0].losses, reference.losses, rtol=1e-3, atol=0)
        torch.testing.assert_close(answers[0].norms, reference.norms, rtol=3e-2, atol=0)
    weights = assemble(answers, tp=case.tp, expected=single_bf16.weights)
    differences = torch.cat([(weights[name] - w).abs().flatten() for name, w in single_bf16.weights.items()])
    assert float(differences.mean()) <= 5e-4


@pytest.mark.full  # compiles DeepSpeed's CPU Adam
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "case",
    [Case(1, 1, zero=2, micro_batch=4), Case(2, 1, zero=3, micro_batch=2), Case(2, 2, zero=2, micro_batch=4)],
    ids=str,
)
def test_cpu_adam_offload_equals_a_single_process(small_corpus, tmp_path, single, case, precision):
    """DeepSpeed compiles its optimizer when it is first used, which takes most of a minute."""
    if shutil.which("g++") is None:
        pytest.skip("DeepSpeed's CPU Adam is compiled with g++, which is not installed")
    config = case.config(small_corpus, tmp_path, precision=precision, offload=True)
    answers = run_world(train, case.ranks, config, timeout_s=400.0)
    if precision == "fp32":
        check_equal(answers, single, tp=case.tp, tolerance=1e-5)
    else:
        torch.testing.assert_close(answers[0].losses, single.losses, rtol=1e-3, atol=0)
