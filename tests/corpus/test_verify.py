import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.corpora import write_corpus
from support.preparations import config, write_source

from pmlm_dist import cli
from pmlm_dist.config import ConfigError
from pmlm_dist.corpus.prepare.pipeline import prepare_corpus
from pmlm_dist.corpus.shards import Manifest, Shard, ShardReader, Split, write_shard
from pmlm_dist.corpus.verify import verify
from pmlm_dist.vocab import Vocabulary


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verified")
    prepare_corpus(config(write_source(folder), folder / "corpus"))
    return folder / "corpus"


@pytest.fixture
def corpus(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "corpus"))


Samples = list[np.ndarray]


def rewritten(folder: Path, number: int, change: Callable[[Samples], Samples], *, first: int | None = None) -> Shard:
    """Write a training shard anew with changed samples, and a manifest that vouches for it and counts them."""
    manifest = Manifest.load(folder)
    train = manifest.splits["train"]
    with ShardReader(folder, train.shards[number], "uint16") as reader:
        samples = change([reader[index] for index in range(len(reader))])
    first = sum(shard.samples for shard in train.shards[:number]) if first is None else first
    shard = write_shard(folder, train.shards[number].name, samples, first=first, dtype="uint16")
    shards = (*train.shards[:number], shard, *train.shards[number + 1 :])
    lengths = []
    for each in shards:
        with ShardReader(folder, each, "uint16") as reader:
            lengths += [len(reader[index]) for index in range(len(reader))]
    counts = {**manifest.counts, "content_tokens": {**manifest.counts["content_tokens"]}}
    counts["content_tokens"]["train"] = sum(lengths) - 3 * len(lengths)
    splits = {**manifest.splits, "train": Split(shards, len(lengths), sum(lengths))}
    dataclasses.replace(manifest, splits=splits, counts=counts).save(folder)
    return shard


def test_a_whole_corpus_is_proved_by_the_command(corpus: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["corpus", "verify", str(corpus)]) == 0
    assert "every token of every document is in exactly one sample, in its place" in capsys.readouterr().out


def test_a_padded_corpus_is_proved(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    prepare_corpus(config(write_source(tmp_path), tmp_path / "corpus", joined="pad"))
    verify(tmp_path / "corpus")
    assert "in exactly one sample" in capsys.readouterr().out


def test_a_corpus_without_digests_is_checked_in_all_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    corpus = write_corpus(tmp_path / "corpus", shards=2)
    manifest = Manifest.load(corpus)
    validation = [_renumbered(corpus, shard) for shard in manifest.splits["validation"].shards]
    splits = {
        **manifest.splits,
        "validation": dataclasses.replace(manifest.splits["validation"], shards=(*validation,)),
    }
    dataclasses.replace(manifest, splits=splits).save(corpus)
    verify(corpus)
    assert "cannot be proved: it has no digests" in capsys.readouterr().out


def _renumbered(corpus: Path, shard: Shard) -> Shard:
    with ShardReader(corpus, shard, "uint16") as reader:
        samples = [reader[index] for index in range(len(reader))]
    return write_shard(corpus, shard.name, samples, first=0, dtype="uint16")


def swap_two_tokens(samples: Samples) -> Samples:
    at = next(at for at in range(2, 20) if samples[1][at] != samples[1][at + 1] and 3 not in samples[1][at : at + 2])
    samples[1][[at, at + 1]] = samples[1][[at + 1, at]]
    return samples


def change_a_token(samples: Samples) -> Samples:
    samples[0][1] = 10 if samples[0][1] != 10 else 11
    return samples


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda samples: samples[::-1], "the samples of train have the digest"),
        (swap_two_tokens, "the samples of train have the digest"),
        (change_a_token, "the samples of train have the digest"),
        (lambda samples: samples[1:], "expected 000"),
        (lambda samples: [samples[0], *samples], "expected 000"),
        (lambda samples: [samples[0][:-1], *samples[1:]], "is not [CLS] S1 [SEP] S2 [SEP]"),
        (lambda samples: [np.array([2, 3, 9, 9, 3]), *samples[1:]], "is not [CLS] S1 [SEP] S2 [SEP]"),
        (lambda samples: [np.array([2, 9, 3, 9, 9, 9_999, 3]), *samples[1:]], "is not [CLS] S1 [SEP] S2 [SEP]"),
        (lambda samples: [np.array([2, 9, 9, 2, 3, 9, 3]), *samples[1:]], "is not [CLS] S1 [SEP] S2 [SEP]"),
        (lambda samples: [np.array([2, *[9] * 40, 3, 9, 3]), *samples[1:]], "the corpus' sequence length allows"),
    ],
    ids=["order", "swap", "token", "lost", "twice", "end", "empty segment", "no such id", "two [CLS]", "too long"],
)
def test_samples_that_are_not_those_of_the_documents_are_found(
    corpus: Path, change: Callable[[Samples], Samples], message: str
):
    """Shards with right checksums in a manifest with right counts: only the documents' digest tells."""
    rewritten(corpus, 1, change)
    with pytest.raises(ConfigError) as caught:
        verify(corpus)
    assert message in str(caught.value)


def test_a_lost_and_a_doubled_last_sample_are_found(corpus: Path):
    rewritten(corpus, 4, lambda samples: samples[:-1])
    with pytest.raises(ConfigError, match=r"origins\.npy speaks of"):
        verify(corpus)


@pytest.mark.parametrize("left", [0, 5, 130], ids=["empty", "magic", "header"])
def test_a_table_of_origins_that_was_cut_is_found(corpus: Path, left: int):
    table = corpus / "origins.npy"
    table.write_bytes(table.read_bytes()[:left])
    with pytest.raises(ConfigError, match=r"origins\.npy cannot be read"):
        verify(corpus)


def test_duplicate_keys_are_found(corpus: Path):
    rewritten(corpus, 1, lambda samples: samples, first=0)
    with pytest.raises(ConfigError, match=r"shard-000001.tar begins with key b'000000000', expected 0000"):
        verify(corpus)


def test_every_damaged_shard_is_named(corpus: Path):
    for number in (0, 3):
        path = corpus / f"train/shard-{number:06d}.tar"
        data = bytearray(path.read_bytes())
        data[5000] ^= 1
        path.write_bytes(data)
    (corpus / "validation/shard-000000.tar").unlink()
    with pytest.raises(ConfigError) as caught:
        verify(corpus)
    assert len(caught.value.problems) == 3
    assert "expected sha256" in caught.value.problems[0]
    assert "cannot be opened" in caught.value.problems[2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"content_tokens": {"train": 1, "validation": 1}}, "content tokens, the manifest says 1"),
        ({"records": 7}, "7 records were read, but 300 are kept and 3 left out"),
        ({"digests": {"train": "0" * 16, "validation": "0" * 16}}, "its documents have 0000"),
    ],
)
def test_counts_that_do_not_add_up_are_found(corpus: Path, change: dict, message: str):
    plain = json.loads((corpus / "manifest.json").read_text())
    plain["counts"].update(change)
    (corpus / "manifest.json").write_text(json.dumps(plain))
    with pytest.raises(ConfigError, match=message):
        verify(corpus)


def test_another_vocabulary_is_found(corpus: Path):
    Vocabulary.train(["other words"], 100).save(corpus)
    with pytest.raises(ConfigError, match="the vocabulary is not the one that the manifest names"):
        verify(corpus)


def test_another_version_is_refused(corpus: Path):
    plain = json.loads((corpus / "manifest.json").read_text())
    (corpus / "manifest.json").write_text(json.dumps({**plain, "version": 99}))
    with pytest.raises(ConfigError, match="has version 99, this program reads 1: remove"):
        verify(corpus)
