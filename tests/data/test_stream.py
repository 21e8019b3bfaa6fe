"""Streams against the samples that were written, and the shards they keep open."""

import pickle
from collections import Counter
from pathlib import Path

import pytest
from support.numbered_corpus import SHARD_SIZES, tokens_of, write_corpus

from pmlm_dist.corpus.shards import TRAIN, VALIDATION, Manifest, ShardError
from pmlm_dist.data.stream import CorpusSource, SplitReader, TrainingStream

TRAIN_SAMPLES = sum(SHARD_SIZES[TRAIN])


def test_manifest_is_loaded_once(corpus, monkeypatch):
    source = CorpusSource(corpus)
    manifest = source.manifest
    monkeypatch.setattr(Manifest, "load", None)
    assert source.manifest is manifest
    assert pickle.loads(pickle.dumps(source)).manifest == manifest
    assert source == CorpusSource(corpus)
    SplitReader(source, split=TRAIN).close()


@pytest.mark.parametrize("lanes", [1, 4, 8])
def test_stream_returns_the_written_samples(corpus, lanes):
    stream = TrainingStream([CorpusSource(corpus)], lanes=lanes, seed=0)
    read = [stream[t] for t in range(20 * TRAIN_SAMPLES)]
    for sample in read:
        assert sample.tokens.tolist() == tokens_of(TRAIN, sample.sample_id).tolist()
    for epoch in range(3):
        in_epoch = Counter(sample.sample_id for sample in read if sample.epoch == epoch)
        assert in_epoch == Counter(range(TRAIN_SAMPLES))


def test_stream_is_the_same_from_any_start(corpus):
    expected = TrainingStream([CorpusSource(corpus)], lanes=4, seed=0)
    for start in (0, 1, 37, 1000, 10**5):
        stream = TrainingStream([CorpusSource(corpus)], lanes=4, seed=0)
        for t in range(start, start + 10):
            assert stream[t].sample_id == expected[t].sample_id
            assert stream[t].epoch == expected[t].epoch


def test_lane_keeps_one_shard_open(corpus):
    reader = SplitReader(corpus, split=TRAIN)
    opened = []
    for shard in (0, 2, 4, 2):
        reader.tokens(shard, 0, lane=0)
        opened.append(len(reader._open))
    reader.tokens(4, 0, lane=1)
    assert (opened, len(reader._open)) == ([1, 1, 1, 1], 2)
    reader.close()
    assert len(reader._open) == 0
    assert reader.tokens(0, 0).tolist() == tokens_of(TRAIN, 0).tolist()


def test_validation_samples_are_in_order(corpus):
    reader = SplitReader(corpus, split=VALIDATION)
    assert len(reader) == 7
    for number in (0, 6, 3, 4):
        sample = reader.sample(number)
        assert sample.tokens.tolist() == tokens_of(VALIDATION, number).tolist()
        assert (sample.sample_id, sample.epoch) == (number, 0)
    for number in (-1, 7):
        with pytest.raises(IndexError):
            reader.sample(number)


def test_corrupt_shard_raises_when_a_lane_opens_it(tmp_path: Path):
    folder = write_corpus(tmp_path, {TRAIN: (3, 3), VALIDATION: (1,)})
    shard = folder / "train" / "shard-000001.tar"
    content = bytearray(shard.read_bytes())
    content[600] ^= 1
    shard.write_bytes(content)
    stream = TrainingStream([CorpusSource(folder)], lanes=1, seed=0)
    with pytest.raises(ShardError, match=r"shard-000001\.tar: expected sha256"):
        [stream[t] for t in range(6)]
