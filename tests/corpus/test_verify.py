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
from pmlm_dist.vocabulary.vocabulary import Vocabulary


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verified")
    prepare_corpus(config(write_source(folder), folder / "corpus"))
    return folder / "corpus"


@pytest.fixture
def corpus(prepared: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared, tmp_path / "corpus"))


Samples = list[np.ndarray]


def rewrite(folder: Path, number: int, change: Callable[[Samples], Samples], *, first: int | None = None) -> Shard:
    """Rewrite a training shard with changed samples, and the manifest with its checksum and counts."""
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


def test_verify_command_accepts_a_valid_corpus(corpus: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["corpus", "verify", str(corpus)]) == 0
    assert "every token of every document is in exactly one sample, at its position" in capsys.readouterr().out


def test_verify_accepts_a_padded_corpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    prepare_corpus(config(write_source(tmp_path), tmp_path / "corpus", joined="pad"))
    verify(tmp_path / "corpus")
    assert "in exactly one sample" in capsys.readouterr().out


def test_verify_checks_a_corpus_without_digests(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    corpus = write_corpus(tmp_path / "corpus", shards=2)
    manifest = Manifest.load(corpus)
    validation = [_renumber(corpus, shard) for shard in manifest.splits["validation"].shards]
    splits = {
        **manifest.splits,
        "validation": dataclasses.replace(manifest.splits["validation"], shards=(*validation,)),
    }
    dataclasses.replace(manifest, splits=splits).save(corpus)
    verify(corpus)
    assert "without digests of the documents, their completeness is unknown" in capsys.readouterr().out


def _renumber(corpus: Path, shard: Shard) -> Shard:
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
        (lambda samples: [np.array([2, *[9] * 40, 3, 9, 3]), *samples[1:]], "the sequence length of the corpus allows"),
    ],
    ids=["order", "swap", "token", "lost", "twice", "end", "empty segment", "no such id", "two [CLS]", "too long"],
)
def test_verify_detects_changed_samples(corpus: Path, change: Callable[[Samples], Samples], message: str):
    """Checksums and counts of the manifest are correct: only the digest of the documents differs."""
    rewrite(corpus, 1, change)
    with pytest.raises(ConfigError) as caught:
        verify(corpus)
    assert message in str(caught.value)


def test_verify_detects_a_lost_last_sample(corpus: Path):
    rewrite(corpus, 4, lambda samples: samples[:-1])
    with pytest.raises(ConfigError, match=r"unit_samples\.npy lists"):
        verify(corpus)


@pytest.mark.parametrize("left", [0, 5, 130], ids=["empty", "magic", "header"])
def test_verify_detects_a_truncated_table_of_unit_samples(corpus: Path, left: int):
    table = corpus / "unit_samples.npy"
    table.write_bytes(table.read_bytes()[:left])
    with pytest.raises(ConfigError, match=r"unit_samples\.npy cannot be read"):
        verify(corpus)


def test_verify_detects_duplicate_keys(corpus: Path):
    rewrite(corpus, 1, lambda samples: samples, first=0)
    with pytest.raises(ConfigError, match=r"shard-000001.tar begins with key b'000000000', expected 0000"):
        verify(corpus)


def test_verify_lists_every_corrupt_shard(corpus: Path):
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
        ({"records": 7}, "7 records were read, but 300 are kept and 3 skipped"),
        ({"digests": {"train": "0" * 16, "validation": "0" * 16}}, "its documents have 0000"),
    ],
)
def test_verify_detects_inconsistent_counts(corpus: Path, change: dict, message: str):
    plain = json.loads((corpus / "manifest.json").read_text())
    plain["counts"].update(change)
    (corpus / "manifest.json").write_text(json.dumps(plain))
    with pytest.raises(ConfigError, match=message):
        verify(corpus)


def test_verify_detects_another_vocabulary(corpus: Path):
    Vocabulary.train(["other words"], 100).save(corpus)
    with pytest.raises(ConfigError, match="the vocabulary differs from that of the manifest"):
        verify(corpus)


def test_verify_raises_for_another_version(corpus: Path):
    plain = json.loads((corpus / "manifest.json").read_text())
    (corpus / "manifest.json").write_text(json.dumps({**plain, "version": 99}))
    with pytest.raises(ConfigError, match="has version 99, this program reads 2: remove"):
        verify(corpus)
