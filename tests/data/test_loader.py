"""Batches of the loader against batches built directly, under any number of workers, ranks and restarts."""

import dataclasses
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import psutil
import pytest
import torch
from support.numbered_corpus import SEQUENCE_LENGTH, SPECIAL, write_corpus

from pmlm_dist.config import ConfigError, DataConfig, MaskingConfig
from pmlm_dist.corpus.shards import TRAIN, VALIDATION, ShardError
from pmlm_dist.data.batch import Batch, build_batch
from pmlm_dist.data.loader import VALIDATION_SEED, BatchSource, training_batches, validation_batches
from pmlm_dist.data.order import BatchShare, micro_batch_samples
from pmlm_dist.data.stream import CorpusSource, SplitReader, TrainingStream

TESTS = Path(__file__).parent.parent
ONE_RANK = BatchShare(global_batch=8, micro_batch=4)


def training(source: BatchSource, share: BatchShare = ONE_RANK, *, workers: int = 0, start: int = 0) -> Iterator[Batch]:
    return training_batches(
        source, lanes=4, share=share, samples_consumed=start, loading=DataConfig(workers=workers, prefetch=2)
    )


def validation(
    source: BatchSource, *, samples: int, dp_rank: int = 0, dp_size: int = 1, workers: int = 0
) -> list[Batch]:
    share = BatchShare(global_batch=2 * dp_size, micro_batch=2, dp_rank=dp_rank, dp_size=dp_size)
    return list(validation_batches(source, samples=samples, share=share, loading=DataConfig(workers=workers)))


def fingerprints(batches: Iterator[Batch], count: int) -> list[int]:
    return [batch.fingerprint() for batch in islice(batches, count)]


def test_loader_equals_batches_built_directly(source, corpus):
    stream = TrainingStream([CorpusSource(corpus)], lanes=4, seed=source.seed)
    for micro_step, batch in enumerate(islice(training(source, start=16), 30)):
        samples = [stream[t] for t in micro_batch_samples(16, micro_step, share=ONE_RANK)]
        expected = build_batch(
            [sample.tokens for sample in samples],
            [sample.sample_id for sample in samples],
            [sample.epoch for sample in samples],
            sequence_length=SEQUENCE_LENGTH,
            masking=MaskingConfig(),
            special=SPECIAL,
            seed=source.seed,
        )
        assert batch.fingerprint() == expected.fingerprint()


@pytest.fixture(scope="module")
def uninterrupted(corpus: Path) -> list[int]:
    return fingerprints(training(BatchSource(CorpusSource(corpus), SPECIAL, MaskingConfig(), seed=0)), 40)


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("steps_done", [0, 7])
@pytest.mark.fault("F59")
def test_batches_are_the_same_for_any_workers_and_start(source, uninterrupted, workers, steps_done):
    batches = training(source, workers=workers, start=steps_done * ONE_RANK.global_batch)
    assert fingerprints(batches, 20) == uninterrupted[2 * steps_done : 2 * steps_done + 20]


@pytest.mark.parametrize(("dp_size", "micro_batch"), [(1, 8), (1, 2), (2, 4), (2, 1), (4, 2)])
def test_step_has_the_same_rows_under_every_topology(source, dp_size, micro_batch):
    def rows(shares: list[BatchShare]) -> list[set[tuple[int, ...]]]:
        ranks = [training(source, share) for share in shares]
        return [
            {
                (*batch.sample_ids_B[row : row + 1].tolist(), *batch.tokens_BT[row].tolist())
                for rank, share in zip(ranks, shares, strict=True)
                for batch in islice(rank, share.accumulation)
                for row in range(share.micro_batch)
            }
            for _ in range(8)
        ]

    shares = [BatchShare(8, micro_batch, dp_rank=rank, dp_size=dp_size) for rank in range(dp_size)]
    assert rows(shares) == rows([BatchShare(8, 4)])


def test_loader_leaves_the_random_state_of_torch_unchanged(source):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    fingerprints(training(source), 3)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(("samples", "dp_size", "workers"), [(7, 1, 0), (5, 2, 1), (3, 4, 0), (100, 3, 0)])
def test_validation_reads_each_sample_once(source, corpus, samples, dp_size, workers):
    ranks = [
        validation(source, samples=samples, dp_rank=rank, dp_size=dp_size, workers=workers) for rank in range(dp_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    reader = SplitReader(corpus, split=VALIDATION)
    seen = []
    for batch in (batch for batches in ranks for batch in batches):
        for row, number in enumerate(batch.sample_ids_B.tolist()):
            sample = reader.sample(number)
            assert (batch.targets_BM[row] > 0).any()
            if batch.weights_BM[row].any():
                seen.append(number)
                alone = source.batch([sample], seed=VALIDATION_SEED)
                assert batch.tokens_BT[row].tolist() == alone.tokens_BT[0].tolist()
    assert sorted(seen) == list(range(min(samples, 7)))


def test_validation_masks_are_independent_of_the_seed(source):
    other = dataclasses.replace(source, seed=99)
    assert fingerprints(iter(validation(source, samples=7)), 9) == fingerprints(iter(validation(other, samples=7)), 9)


def test_corpus_without_validation_samples_raises(tmp_path):
    folder = write_corpus(tmp_path, {TRAIN: (3,), VALIDATION: ()})
    with pytest.raises(ConfigError, match="no validation samples"):
        validation(BatchSource(CorpusSource(folder), SPECIAL, MaskingConfig(), seed=0), samples=4)


@pytest.mark.parametrize("workers", [0, 1])
def test_corrupt_shard_raises_in_the_training_process(tmp_path, workers):
    folder = write_corpus(tmp_path, {TRAIN: (8, 8, 8, 8), VALIDATION: (1,)})
    shard = folder / "train" / "shard-000002.tar"
    shard.write_bytes(shard.read_bytes()[:-1])
    batches = training(BatchSource(CorpusSource(folder), SPECIAL, MaskingConfig(), seed=0), workers=workers)
    with pytest.raises(ShardError) as caught:
        list(islice(batches, 3))
    assert str(caught.value).startswith(f"shard {shard}: expected")
    assert not loader_workers()


@pytest.mark.parametrize("lanes", [3, 2])
def test_invalid_lanes_raise(source, lanes):
    with pytest.raises(ValueError, match=rf"lanes \({lanes}\) must be a multiple of the data-parallel size"):
        training_batches(source, lanes=lanes, share=BatchShare(16, 4, dp_size=4))


def loader_workers() -> list[psutil.Process]:
    """Return the loader workers of this process: the children of its fork server."""
    servers = [
        child for child in psutil.Process().children() if "multiprocessing.forkserver" in " ".join(child.cmdline())
    ]
    return [worker for server in servers for worker in server.children()]


def test_close_stops_the_workers(source):
    batches = training(source, workers=2)
    next(batches)
    assert len(loader_workers()) == 2
    batches.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert not loader_workers()


def test_workers_exit_when_the_trainer_is_killed(corpus, tmp_path):
    script = tmp_path / "trainer.py"
    script.write_text(TRAINER.format(paths=[str(TESTS), str(TESTS / "data")], corpus=str(corpus)))
    trainer = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert trainer.stdout is not None
    workers = [psutil.Process(int(pid)) for pid in trainer.stdout.readline().split()]
    assert len(workers) == 2
    os.kill(trainer.pid, signal.SIGKILL)
    trainer.wait()
    _, alive = psutil.wait_procs(workers, timeout=30)
    for worker in alive:
        worker.kill()
    assert not alive


TRAINER = """
import sys, time
sys.path[:0] = {paths!r}
from pathlib import Path
from support.numbered_corpus import SPECIAL
from test_loader import loader_workers, training
from pmlm_dist.config import MaskingConfig
from pmlm_dist.data.loader import BatchSource
from pmlm_dist.data.stream import CorpusSource

if __name__ == "__main__":
    batches = training(BatchSource(CorpusSource(Path({corpus!r})), SPECIAL, MaskingConfig(), seed=0), workers=2)
    next(batches)
    print(*[worker.pid for worker in loader_workers()], flush=True)
    time.sleep(600)
"""
