import dataclasses
import gzip
import json
import random
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from pmlm_dist.config import ConfigError
from pmlm_dist.corpus import prepare
from pmlm_dist.corpus.outcome import entropy
from pmlm_dist.corpus.prepare import even_cuts, prepare_corpus
from pmlm_dist.corpus.settings import PrepareConfig, problems
from pmlm_dist.corpus.shards import Manifest, ShardReader
from pmlm_dist.vocab import Vocabulary

BIN = Path(sys.executable).parent
WORDS = ["the", "model", "reads", "masked", "spans", "and", "predicts", "every", "one", "of", "them", "from", "text"]


def texts(count: int = 300) -> list[str]:
    choose = random.Random(1)
    return [" ".join(choose.choices(WORDS, k=choose.randint(2, 60))) + f" {number}" for number in range(count)]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    documents = texts()
    lines = [json.dumps({"text": text}) for text in documents[:150]]
    (folder / "a.jsonl").write_text("\n".join([*lines, "broken", lines[3], '{"text": "\\u0000"}']))
    (folder / "b.txt").write_text("\n\n".join(documents[150:250]) + "\n\n\n")
    (folder / "c.txt.gz").write_bytes(gzip.compress("\n\n".join(documents[250:]).encode()))
    (folder / "d.txt").touch()
    return folder


def config(source: Path, output: Path, **changes) -> PrepareConfig:
    plain = PrepareConfig(
        source=(f"{source}/*",), output=output, vocabulary_size=150, sequence_length=32, shards=5, unit_bytes=3000
    )
    return dataclasses.replace(plain, **changes)


def command(config: PrepareConfig, *, ranks: int) -> list[str]:
    settings = [
        *("--source", *config.source, "--output", str(config.output)),
        *("--vocabulary-size", str(config.vocabulary_size), "--sequence-length", str(config.sequence_length)),
        *("--shards", str(config.shards), "--unit-bytes", str(config.unit_bytes)),
    ]
    program = [sys.executable, "-m", "pmlm_dist.cli", "prepare-corpus", *settings]
    launcher = [str(BIN / "mpirun"), "--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-n", str(ranks)]
    return [*launcher, *program] if ranks else program


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def samples(folder: Path, split: str) -> list[list[int]]:
    manifest = Manifest.load(folder)
    readers = [ShardReader(folder, shard, manifest.token_dtype) for shard in manifest.splits[split].shards]
    return [reader[number].tolist() for reader in readers for number in range(len(reader))]


@pytest.fixture(scope="module")
def corpus(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("corpus") / "corpus"
    prepare_corpus(config(source, output))
    return output


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [2, 3])
def test_bytes_do_not_depend_on_the_number_of_ranks(source: Path, corpus: Path, tmp_path: Path, ranks: int):
    done = subprocess.run(
        command(config(source, tmp_path / "corpus"), ranks=ranks),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert content(tmp_path / "corpus") == content(corpus)
    assert done.stdout.count("unigram entropy") == 1


def test_every_document_is_in_the_corpus_once(corpus: Path):
    """The multiset of tokens, counted from the texts, is that of the shards; so are all the counts."""
    manifest, vocabulary = Manifest.load(corpus), Vocabulary.load(corpus)
    expected = Counter(id for ids in vocabulary.encode_batch(texts()) for id in ids)
    found: Counter[int] = Counter()
    for split in ("train", "validation"):
        stored = samples(corpus, split)
        assert len(stored) == manifest.splits[split].samples
        assert sum(map(len, stored)) == manifest.splits[split].tokens
        assert all(ids[0] == vocabulary.cls_id and ids[-1] == vocabulary.sep_id and len(ids) <= 32 for ids in stored)
        found.update(id for ids in stored for id in ids if id not in vocabulary.special_ids)
    assert found == expected
    assert manifest.counts["documents"]["train"] + manifest.counts["documents"]["validation"] == 300
    assert manifest.counts["characters"] == sum(map(len, texts()))
    assert manifest.counts["skipped"] == {"broken JSON": 1, "duplicate": 1, "fewer than two tokens": 1}


def test_manifest_describes_the_folder(corpus: Path):
    manifest, vocabulary = Manifest.load(corpus), Vocabulary.load(corpus)
    assert manifest.vocabulary == {"size": vocabulary.size, "fingerprint": vocabulary.fingerprint}
    assert (manifest.token_dtype, manifest.sequence_length) == ("uint16", 32)
    sizes = [shard.samples for shard in manifest.splits["train"].shards]
    assert len(sizes) == 5
    assert max(sizes) - min(sizes) <= 1
    counts = Counter(id for ids in samples(corpus, "train") for id in ids if id not in vocabulary.special_ids)
    total = counts.total()
    assert manifest.unigram_entropy == pytest.approx(-sum(c / total * np.log(c / total) for c in counts.values()))
    assert not (corpus / ".spill").exists()


def test_validation_holds_whole_documents_out(corpus: Path):
    """The last word of every text is its number: no number is in both splits."""
    vocabulary = Vocabulary.load(corpus)
    held_out = " ".join(vocabulary.decode(ids) for ids in samples(corpus, "validation"))
    train = " ".join(vocabulary.decode(ids) for ids in samples(corpus, "train"))
    words = {word for word in held_out.split() if word.isdigit() and len(word) == 3}
    assert words
    assert not words & set(train.split())


def test_samples_are_shuffled_over_the_sources(corpus: Path):
    """Neighbours in the corpus come from anywhere: numbers of texts in shard order are not sorted."""
    vocabulary = Vocabulary.load(corpus)
    words = " ".join(vocabulary.decode(ids) for ids in samples(corpus, "train")).split()
    numbers = [int(word) for word in words if word.isdigit()]
    rises = np.mean(np.diff(numbers) > 0)
    assert 0.3 < rises < 0.85


def test_seed_and_joining_change_the_samples(source: Path, corpus: Path, tmp_path: Path):
    given = Vocabulary.load(corpus)
    other = config(source, tmp_path / "seed", vocabulary=corpus, vocabulary_size=None, seed=1, samples_per_shard=30)
    manifest = prepare_corpus(dataclasses.replace(other, shards=None))
    assert manifest.vocabulary["fingerprint"] == given.fingerprint
    assert manifest.fingerprint != Manifest.load(corpus).fingerprint
    assert all(20 <= shard.samples <= 30 for shard in manifest.splits["train"].shards)
    padded = prepare_corpus(config(source, tmp_path / "pad", joined="pad"))
    assert padded.splits["train"].samples > manifest.splits["train"].samples


def test_one_validation_document_at_least(source: Path, tmp_path: Path):
    manifest = prepare_corpus(config(source, tmp_path / "corpus", validation_fraction=1e-12))
    assert manifest.counts["documents"]["validation"] == 1
    assert manifest.splits["validation"].samples >= 1


def test_texts_without_spaces_are_split_too(tmp_path: Path):
    (tmp_path / "a.txt").write_text("\n\n".join(f"日本語{number}" for number in range(300)))
    manifest = prepare_corpus(config(tmp_path, tmp_path / "corpus", validation_fraction=0.1))
    assert manifest.counts["documents"]["train"] + manifest.counts["documents"]["validation"] == 300
    assert 10 <= manifest.counts["documents"]["validation"] <= 60


def test_a_standing_corpus_is_left_alone(source: Path, corpus: Path, tmp_path: Path, capsys):
    copy = tmp_path / "corpus"
    shutil.copytree(corpus, copy)
    before = content(copy)
    prepare_corpus(config(source, copy))
    assert "stands already" in capsys.readouterr().out
    with pytest.raises(ConfigError) as caught:
        prepare_corpus(config(source, copy, seed=4, shards=6))
    assert len(caught.value.problems) == 2
    assert "holds a corpus with seed 0, not 4: remove the folder or give another --output" in str(caught.value)
    assert content(copy) == before


def test_changed_input_is_not_taken_for_the_same(source: Path, corpus: Path, tmp_path: Path):
    input, copy = tmp_path / "source", tmp_path / "corpus"
    shutil.copytree(source, input)
    prepare_corpus(config(input, copy))
    (input / "b.txt").write_text("something else")
    with pytest.raises(ConfigError, match="input_files"):
        prepare_corpus(config(input, copy))


def test_an_interrupted_run_leaves_no_manifest_and_the_next_one_is_whole(
    source: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    output, write = tmp_path / "corpus", prepare.write_shard

    def interrupted(folder, name, *rest, **more):
        if "000002" in name:
            (folder / "train/shard-000099.tar").write_bytes(b"left over")
            raise KeyboardInterrupt
        return write(folder, name, *rest, **more)

    monkeypatch.setattr(prepare, "write_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare_corpus(config(source, output))
    assert not (output / "manifest.json").exists()
    assert not (output / ".spill").exists()
    monkeypatch.undo()
    prepare_corpus(config(source, output))
    assert content(output) == content(corpus)


@pytest.mark.distributed
def test_one_rank_s_failure_ends_all_with_one_message(source: Path, tmp_path: Path):
    """The damaged file is the second unit, so rank 1 meets it while rank 0 waits."""
    (tmp_path / "a.txt").write_text("\n\n".join(texts(20)))
    (tmp_path / "b.txt.gz").write_bytes((source / "c.txt.gz").read_bytes()[:-30])
    wanted = config(tmp_path, tmp_path / "corpus", unit_bytes=1 << 20)
    done = subprocess.run(command(wanted, ranks=2), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert done.stderr.count("b.txt.gz is damaged") == 1
    assert "rank 1 of 2" in done.stderr
    assert not (tmp_path / "corpus/manifest.json").exists()


@pytest.mark.parametrize(
    ("documents", "changes", "message"),
    [
        ([], {}, "holds no usable document (1 x broken JSON (first: "),
        (['{"body": "elsewhere"}'], {}, "check the files, --text-field"),
        (['{"text": "only one document"}'], {"shards": None}, "no sample is left for train"),
        ([json.dumps({"text": text}) for text in texts(30)], {"shards": 1000}, "shards (1000) exceeds the "),
    ],
)
def test_too_little_text_is_refused(tmp_path: Path, documents: list[str], changes: dict, message: str):
    (tmp_path / "a.jsonl").write_text("\n".join([*documents, "broken"]))
    wanted = config(tmp_path, tmp_path / "corpus", **changes)
    with pytest.raises(ConfigError) as caught:
        prepare_corpus(wanted)
    assert message in str(caught.value)
    assert not (tmp_path / "corpus/manifest.json").exists()


def test_every_problem_of_the_settings_is_listed():
    wrong = PrepareConfig(
        sequence_length=5, shards=0, samples_per_shard=1, validation_fraction=1.5, vocabulary_size=0, unit_bytes=-1
    )
    found = "\n".join(problems(wrong))
    for part in ("source:", "exclude each other", "(5) must be at least 8", "(1.5)", "shards (0)", "unit_bytes (-1)"):
        assert part in found
    assert problems(PrepareConfig(source=("a.txt",), vocabulary_size=100)) == []


def test_even_cuts_cover_everything():
    for total, parts in ((10, 3), (3, 3), (64, 7), (5, 1)):
        cuts = even_cuts(total, parts)
        assert [n for start, stop in cuts for n in range(start, stop)] == list(range(total))
        assert {stop - start for start, stop in cuts} <= {total // parts, total // parts + 1}


def test_entropy_of_equal_counts_is_the_logarithm():
    assert entropy(np.array([5, 0, 5, 5])) == pytest.approx(np.log(3))


def test_a_small_corpus_still_has_shards_for_many_ranks(source: Path, tmp_path: Path):
    manifest = prepare_corpus(config(source, tmp_path / "small", shards=None))
    train = manifest.splits["train"]
    assert len(train.shards) == min(64, train.samples)
    assert len(manifest.splits["validation"].shards) <= len(train.shards)
