"""Elastic determinism: a run that is stopped at any step and resumed under another topology reads the same samples."""

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
from pmlm_dist.corpus.shards import TRAIN, VALIDATION
from pmlm_dist.data.loader import BatchSource, training_batches
from pmlm_dist.data.order import BatchShare
from pmlm_dist.data.stream import CorpusSource

GLOBAL_BATCH, LANES, STEPS = 8, 4, 20
TOPOLOGIES = [(dp, micro) for dp in (1, 2, 4) for micro in (1, 2, 4, 8) if GLOBAL_BATCH % (dp * micro) == 0]
# Samples of a step as the model reads them: (epoch, sample id, *masked token ids).
Step = Counter[tuple[int, ...]]


@dataclass(frozen=True)
class Segment:
    """Consecutive steps of a run under one topology."""

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


def read(source: BatchSource, segments: Sequence[Segment], *, quarantined: frozenset[str] = frozenset()) -> list[Step]:
    """Return the samples of each step, over all ranks, of a run that is stopped and resumed after each segment."""
    steps: list[Step] = []
    for segment in segments:
        shares = [
            BatchShare(GLOBAL_BATCH, segment.micro_batch, dp_rank=rank, dp_size=segment.dp)
            for rank in range(segment.dp)
        ]
        ranks = [
            training_batches(
                source,
                lanes=LANES,
                share=share,
                samples_consumed=len(steps) * GLOBAL_BATCH,
                loading=DataConfig(workers=segment.workers, prefetch=2),
                quarantined=quarantined,
            )
            for share in shares
        ]
        for _ in range(segment.steps):
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
def interrupted(draw: st.DrawFn, *, workers: st.SearchStrategy[int]) -> list[Segment]:
    """Segments with STEPS steps in total, each under its own topology."""
    stops = sorted(draw(st.sets(st.integers(1, STEPS - 1), max_size=3)))
    segments = []
    for start, end in zip([0, *stops], [*stops, STEPS], strict=True):
        dp, micro_batch = draw(st.sampled_from(TOPOLOGIES))
        segments.append(Segment(end - start, dp, micro_batch, draw(workers)))
    return segments


@pytest.fixture(scope="module", params=["single", "mixture", "quarantine"])
def case(request: pytest.FixtureRequest, corpus: Path, mixture: tuple[CorpusSource, ...]):
    """A source, its quarantined shards, and the samples of the uninterrupted run."""
    sources = () if request.param == "single" else mixture
    source = BatchSource(CorpusSource(corpus), SPECIAL, MaskingConfig(), seed=0, mixture=sources)
    thirds = [corpus.manifest.splits[TRAIN].shards[2].sha256 for corpus in source.training_sources]
    quarantined = frozenset(thirds if request.param == "quarantine" else [])
    return source, quarantined, read(source, [Segment(STEPS, 1, 8)], quarantined=quarantined)


@settings(max_examples=40, deadline=None)
@given(segments=interrupted(workers=st.just(0)))
@pytest.mark.fault("F60")
def test_resumed_run_reads_the_samples_of_the_uninterrupted_run(case, segments):
    source, quarantined, expected = case
    assert read(source, segments, quarantined=quarantined) == expected


@settings(max_examples=2, deadline=None)
@given(segments=interrupted(workers=st.sampled_from([1, 2, 3])))
def test_resumed_run_reads_the_same_samples_with_workers(case, segments):
    source, quarantined, expected = case
    last = segments[-2:]
    assert read(source, last, quarantined=quarantined) == expected[: sum(segment.steps for segment in last)]


def test_mixture_reads_each_source_in_its_order_and_share(mixture, corpus):
    """Longhand: lane by lane, the samples of a source in the mixture are those of a run on that source alone."""
    source_of_all = BatchSource(CorpusSource(corpus), SPECIAL, MaskingConfig(), seed=0, mixture=mixture)
    first_of_b = mixture[0].manifest.splits[TRAIN].samples
    mixed = [step for batch in islice(_batches(source_of_all), 250) for step in _by_lane(batch)]
    for number, source in enumerate(mixture):
        alone = [
            step
            for batch in islice(_batches(BatchSource(source, SPECIAL, MaskingConfig(), seed=0)), 250)
            for step in _by_lane(batch)
        ]
        for lane in range(LANES):
            in_mixture = [
                (e, i - first_of_b * number) for at, e, i in mixed if at == lane and (i >= first_of_b) == number
            ]
            assert in_mixture == [(e, i) for at, e, i in alone if at == lane][: len(in_mixture)]
            assert len(in_mixture) == pytest.approx(source.weight * 500, abs=2)


def _batches(source: BatchSource):
    share = BatchShare(GLOBAL_BATCH, GLOBAL_BATCH)
    return training_batches(source, lanes=LANES, share=share, loading=DataConfig(workers=0))


def _by_lane(batch) -> list[tuple[int, int, int]]:
    rows = zip(batch.epochs_B.tolist(), batch.sample_ids_B.tolist(), strict=True)
    return [(row % LANES, epoch, number) for row, (epoch, number) in enumerate(rows)]
