"""Stop at any step, go on under another topology: the samples of every step are those of the uninterrupted run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.numbered_corpus import SHARD_SIZES, SPECIAL, write_corpus

from pmlm_dist.config import DataConfig, MaskingConfig
from pmlm_dist.corpus.shards import TRAIN, VALIDATION, Manifest
from pmlm_dist.data.loader import BatchSource, training_batches
from pmlm_dist.data.order import BatchShare
from pmlm_dist.data.stream import CorpusSource

GLOBAL_BATCH, LANES, STEPS = 8, 4, 20
TOPOLOGIES = [(dp, micro) for dp in (1, 2, 4) for micro in (1, 2, 4, 8) if GLOBAL_BATCH % (dp * micro) == 0]
# What identifies a sample as the model sees it: epoch, number, the masked text.
Step = Counter[tuple[int, ...]]


@dataclass(frozen=True)
class Part:
    """A stretch of a run."""

    steps: int
    dp: int
    micro_batch: int
    workers: int = 0


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> tuple[CorpusSource, ...]:
    folder = tmp_path_factory.mktemp("mixture")
    sizes = {"a": SHARD_SIZES[TRAIN], "b": (3, 2, 4, 1, 5)}
    weights = {"a": 0.7, "b": 0.3}
    return tuple(
        CorpusSource(write_corpus(folder / name, {TRAIN: sizes[name], VALIDATION: (1,)}), weight=weights[name])
        for name in sizes
    )


def read(source: BatchSource, parts: Sequence[Part], *, quarantined: frozenset[str] = frozenset()) -> list[Step]:
    """The samples of each step, over all ranks, of a run that is stopped and gone on with after each part."""
    steps: list[Step] = []
    for part in parts:
        shares = [BatchShare(GLOBAL_BATCH, part.micro_batch, dp_rank=rank, dp_size=part.dp) for rank in range(part.dp)]
        ranks = [
            training_batches(
                source,
                lanes=LANES,
                share=share,
                samples_consumed=len(steps) * GLOBAL_BATCH,
                loading=DataConfig(workers=part.workers, prefetch=2),
                quarantined=quarantined,
            )
            for share in shares
        ]
        for _ in range(part.steps):
            step: Step = Counter()
            for rank, share in zip(ranks, shares, strict=True):
                for batch in islice(rank, share.accumulation):
                    columns = (batch.epochs_B.tolist(), batch.sample_ids_B.tolist(), batch.tokens_BT.tolist())
                    rows = zip(*columns, strict=True)
                    step.update((epoch, number, *tokens) for epoch, number, tokens in rows)
            steps.append(step)
        for rank in ranks:
            rank.close()
    return steps


@st.composite
def interrupted(draw: st.DrawFn, *, workers: st.SearchStrategy[int]) -> list[Part]:
    """Parts that add up to STEPS, each under a topology of its own."""
    stops = sorted(draw(st.sets(st.integers(1, STEPS - 1), max_size=3)))
    parts = []
    for start, end in zip([0, *stops], [*stops, STEPS], strict=True):
        dp, micro_batch = draw(st.sampled_from(TOPOLOGIES))
        parts.append(Part(end - start, dp, micro_batch, draw(workers)))
    return parts


@pytest.fixture(scope="module", params=["alone", "mixture", "quarantine"])
def case(request: pytest.FixtureRequest, corpus: Path, mixture: tuple[CorpusSource, ...]):
    """A source with what is in quarantine, and the uninterrupted run on it."""
    sources = () if request.param == "alone" else mixture
    source = BatchSource(corpus, SPECIAL, MaskingConfig(), seed=0, mixture=sources)
    bad = [Manifest.load(s.folder).splits[TRAIN].shards[2].sha256 for s in source.training]
    quarantined = frozenset(bad if request.param == "quarantine" else [])
    return source, quarantined, read(source, [Part(STEPS, 1, 8)], quarantined=quarantined)


@settings(max_examples=40, deadline=None)
@given(parts=interrupted(workers=st.just(0)))
@pytest.mark.fault("F60")
def test_every_step_has_the_samples_of_the_uninterrupted_run(case, parts):
    source, quarantined, expected = case
    assert read(source, parts, quarantined=quarantined) == expected


@settings(max_examples=2, deadline=None)
@given(parts=interrupted(workers=st.sampled_from([1, 2, 3])))
def test_so_it_has_with_any_number_of_workers(case, parts):
    source, quarantined, expected = case
    assert read(source, parts[-2:], quarantined=quarantined) == expected[: sum(part.steps for part in parts[-2:])]


def test_each_source_is_read_in_its_own_order_and_share(mixture, corpus):
    """Longhand: of the mixture's samples those of a source, lane by lane, are a run on that source alone."""
    together = BatchSource(corpus, SPECIAL, MaskingConfig(), seed=0, mixture=mixture)
    first_of_b = Manifest.load(mixture[0].folder).splits[TRAIN].samples
    mixed = [step for batch in islice(_batches(together), 250) for step in _by_lane(batch)]
    for number, source in enumerate(mixture):
        alone = [
            step
            for batch in islice(_batches(BatchSource(source.folder, SPECIAL, MaskingConfig(), seed=0)), 250)
            for step in _by_lane(batch)
        ]
        for lane in range(LANES):
            own = [(e, i - first_of_b * number) for at, e, i in mixed if at == lane and (i >= first_of_b) == number]
            assert own == [(e, i) for at, e, i in alone if at == lane][: len(own)]
            assert len(own) == pytest.approx(source.weight * 500, abs=2)


def _batches(source: BatchSource):
    share = BatchShare(GLOBAL_BATCH, GLOBAL_BATCH)
    return training_batches(source, lanes=LANES, share=share, loading=DataConfig(workers=0))


def _by_lane(batch) -> list[tuple[int, int, int]]:
    rows = zip(batch.epochs_B.tolist(), batch.sample_ids_B.tolist(), strict=True)
    return [(row % LANES, epoch, number) for row, (epoch, number) in enumerate(rows)]
