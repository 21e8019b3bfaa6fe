import dataclasses
import json
import random
import shutil
import subprocess
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from support.faulty_server import serving
from support.preparations import WORDS, command, config, content, samples, texts, write_source

from pmlm_dist.config import ConfigError
from pmlm_dist.corpus.filters.cleaning import HELD_OUT
from pmlm_dist.corpus.input.sources import SourceFile
from pmlm_dist.corpus.prepare.counts import DocumentLengths, length_histogram
from pmlm_dist.corpus.prepare.pipeline import even_ranges, prepare_corpus
from pmlm_dist.corpus.prepare.settings import PrepareConfig, problems
from pmlm_dist.corpus.prepare.source_files import unsplittable_warnings
from pmlm_dist.corpus.shards import Manifest
from pmlm_dist.corpus.verify import verify
from pmlm_dist.vocabulary.vocabulary import SPECIAL_TOKENS, Vocabulary


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def corpus(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("corpus") / "corpus"
    prepare_corpus(config(source, output))
    return output


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [2, 3])
def test_corpus_is_independent_of_the_number_of_ranks(source: Path, corpus: Path, tmp_path: Path, ranks: int):
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
    """The multiset of tokens of the texts, and all counts, equal those of the shards."""
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
    assert manifest.counts["skipped"] == {"invalid JSON": 1, "duplicate": 1, "fewer than two tokens": 1}


def test_manifest_matches_the_folder(corpus: Path):
    manifest, vocabulary = Manifest.load(corpus), Vocabulary.load(corpus)
    assert manifest.vocabulary == {"size": vocabulary.size, "fingerprint": vocabulary.fingerprint}
    assert (manifest.token_dtype, manifest.sequence_length) == ("uint16", 32)
    sizes = [shard.samples for shard in manifest.splits["train"].shards]
    assert len(sizes) == 5
    assert max(sizes) - min(sizes) <= 1
    counts = Counter(id for ids in samples(corpus, "train") for id in ids if id not in vocabulary.special_ids)
    total = counts.total()
    assert manifest.unigram_counts.tolist() == [counts[id] for id in range(vocabulary.size)]
    assert manifest.unigram_entropy == pytest.approx(-sum(c / total * np.log(c / total) for c in counts.values()))
    assert sorted(path.name for path in corpus.iterdir()) == [
        *(
            "manifest.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "train",
            "unit_samples.npy",
            "validation",
            "vocab.txt",
        )
    ]


def test_validation_split_holds_whole_documents(corpus: Path):
    """The last word of every text is its number; no number is in both splits."""
    vocabulary = Vocabulary.load(corpus)
    held_out = " ".join(vocabulary.decode(ids) for ids in samples(corpus, "validation"))
    train = " ".join(vocabulary.decode(ids) for ids in samples(corpus, "train"))
    words = {word for word in held_out.split() if word.isdigit() and len(word) == 3}
    assert words
    assert not words & set(train.split())


def test_share_of_unknown_tokens_is_recorded_and_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    source = tmp_path / "words.jsonl"
    source.write_text("".join(json.dumps({"text": f"{text} ☃"}) + "\n" for text in texts(100)))
    (words := tmp_path / "words.txt").write_text("\n".join([*SPECIAL_TOKENS, *WORDS, *map(str, range(100))]))
    given = config(source, tmp_path / "corpus", vocabulary=words, vocabulary_size=None, shards=2)
    manifest = prepare_corpus(given)
    stored = [id for split in ("train", "validation") for ids in samples(given.output, split) for id in ids]
    assert sum(manifest.counts["unknown_tokens"].values()) == stored.count(1) == 100
    unknown = 100 / sum(manifest.counts["content_tokens"].values())
    share = f"{unknown:.2%} of the tokens are [UNK]"
    printed = capsys.readouterr().out
    assert unknown > 0.01
    assert f"{share}\n  warning: words became [UNK]" in printed
    assert "(uncased, accents stripped)" in printed
    verify(given.output)
    assert share in capsys.readouterr().out


def test_samples_are_shuffled_over_the_sources(corpus: Path):
    """The numbers of the texts in shard order are not sorted."""
    vocabulary = Vocabulary.load(corpus)
    words = " ".join(vocabulary.decode(ids) for ids in samples(corpus, "train")).split()
    numbers = [int(word) for word in words if word.isdigit()]
    rises = np.mean(np.diff(numbers) > 0)
    assert 0.3 < rises < 0.85


def test_samples_depend_on_seed_and_packing(source: Path, corpus: Path, tmp_path: Path):
    given = Vocabulary.load(corpus)
    other = config(source, tmp_path / "seed", vocabulary=corpus, vocabulary_size=None, seed=1, samples_per_shard=30)
    manifest = prepare_corpus(dataclasses.replace(other, shards=None))
    assert manifest.vocabulary["fingerprint"] == given.fingerprint
    assert manifest.fingerprint != Manifest.load(corpus).fingerprint
    assert all(20 <= shard.samples <= 30 for shard in manifest.splits["train"].shards)
    padded = prepare_corpus(config(source, tmp_path / "pad", joined="pad"))
    assert padded.splits["train"].samples > manifest.splits["train"].samples


def test_validation_split_has_at_least_one_document(source: Path, tmp_path: Path):
    manifest = prepare_corpus(config(source, tmp_path / "corpus", validation_fraction=1e-12))
    assert manifest.counts["documents"]["validation"] == 1
    assert manifest.splits["validation"].samples >= 1


def test_corpus_from_a_web_server_equals_that_of_the_files(source: Path, corpus: Path, tmp_path: Path):
    with serving(source) as server:
        server.ranges = True
        addresses = tuple(f"{server.address}/{path.name}" for path in sorted(source.iterdir()))
        prepare_corpus(dataclasses.replace(config(source, tmp_path / "corpus"), source=addresses))
    verify(tmp_path / "corpus")
    for part in ("train", "validation"):
        assert content(tmp_path / "corpus" / part) == content(corpus / part)


def test_texts_without_spaces_are_in_both_splits(tmp_path: Path):
    (tmp_path / "a.txt").write_text("\n\n".join(f"日本語{number}" for number in range(300)))
    manifest = prepare_corpus(config(tmp_path, tmp_path / "corpus", validation_fraction=0.1))
    assert manifest.counts["documents"]["train"] + manifest.counts["documents"]["validation"] == 300
    assert 10 <= manifest.counts["documents"]["validation"] <= 60


def test_existing_corpus_is_not_changed(source: Path, corpus: Path, tmp_path: Path, capsys):
    copy = tmp_path / "corpus"
    shutil.copytree(corpus, copy)
    before = content(copy)
    prepare_corpus(config(source, copy))
    assert "exists already" in capsys.readouterr().out
    with pytest.raises(ConfigError) as caught:
        prepare_corpus(config(source, copy, seed=4, shards=6))
    assert len(caught.value.problems) == 2
    assert "holds a corpus with seed 0, not 4: remove the folder or give another --output" in str(caught.value)
    assert content(copy) == before


def test_corpus_within_its_source_does_not_read_its_own_vocabulary(tmp_path: Path, capsys):
    write_source(tmp_path)
    within = dataclasses.replace(config(tmp_path, tmp_path / "out"), source=(f"{tmp_path}/**/*.txt",))
    documents = prepare_corpus(within).counts["records"]
    assert (tmp_path / "out/vocab.txt").is_file()
    assert prepare_corpus(within).counts["records"] == documents
    assert "exists already with these settings" in capsys.readouterr().out


def test_existing_corpus_of_changed_input_raises(source: Path, corpus: Path, tmp_path: Path):
    input, copy = tmp_path / "source", tmp_path / "corpus"
    shutil.copytree(source, input)
    prepare_corpus(config(input, copy))
    (input / "b.txt").write_text("something else")
    with pytest.raises(ConfigError, match="input_files"):
        prepare_corpus(config(input, copy))


@pytest.mark.distributed
def test_failure_of_one_rank_ends_all_with_one_message(source: Path, tmp_path: Path):
    """The corrupt file is the second unit, so rank 1 fails while rank 0 waits."""
    (tmp_path / "a.txt").write_text("\n\n".join(texts(20)))
    (tmp_path / "b.txt.gz").write_bytes((source / "c.txt.gz").read_bytes()[:-30])
    wanted = config(tmp_path, tmp_path / "corpus", unit_bytes=1 << 20)
    done = subprocess.run(command(wanted, ranks=2), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert done.stderr.count("b.txt.gz is corrupt") == 1
    assert "rank 1 of 2" in done.stderr
    assert not (tmp_path / "corpus/manifest.json").exists()


@pytest.mark.parametrize(
    ("documents", "changes", "message"),
    [
        ([], {}, "holds no usable document (1 x invalid JSON (first: "),
        (['{"body": "elsewhere"}'], {}, "check the files, --text-field"),
        (['{"text": "only one document"}'], {"shards": None}, "no sample is left for train"),
        ([json.dumps({"text": text}) for text in texts(30)], {"shards": 1000}, "shards (1000) exceeds the "),
    ],
)
def test_too_little_text_raises(tmp_path: Path, documents: list[str], changes: dict, message: str):
    (tmp_path / "a.jsonl").write_text("\n".join([*documents, "not json"]))
    wanted = config(tmp_path, tmp_path / "corpus", **changes)
    with pytest.raises(ConfigError) as caught:
        prepare_corpus(wanted)
    assert message in str(caught.value)
    assert not (tmp_path / "corpus/manifest.json").exists()


def test_invalid_settings_are_all_listed():
    wrong = PrepareConfig(
        sequence_length=5, shards=0, samples_per_shard=1, validation_fraction=1.5, vocabulary_size=0, unit_bytes=-1
    )
    listed = "\n".join(problems(wrong))
    for part in ("source:", "exclude each other", "(5) must be at least 8", "(1.5)", "shards (0)", "unit_bytes (-1)"):
        assert part in listed
    assert problems(PrepareConfig(source=("a.txt",), vocabulary_size=100)) == []


def test_even_ranges_cover_everything():
    for total, parts in ((10, 3), (3, 3), (64, 7), (5, 1)):
        ranges = even_ranges(total, parts)
        assert [n for start, stop in ranges for n in range(start, stop)] == list(range(total))
        assert {stop - start for start, stop in ranges} <= {total // parts, total // parts + 1}


def test_small_corpus_has_shards_for_many_ranks(source: Path, tmp_path: Path):
    manifest = prepare_corpus(config(source, tmp_path / "small", shards=None))
    train = manifest.splits["train"]
    assert len(train.shards) == min(64, train.samples)
    assert len(manifest.splits["validation"].shards) <= len(train.shards)


# ----------------------------------------------------------------------------------------------------------- cleaning


def test_cleaning_counts_add_up_to_all_records(tmp_path: Path):
    pytest.importorskip("datasketch")
    rng = random.Random(5)
    long = [" ".join(f"{word}{rng.randint(0, 99)}" for word in texts(1)[0].split() * 5) for _ in range(40)]
    near = [text + " end" for text in long[:6]]
    other = [f"ein deutscher Satz Nummer {number}" for number in range(9)]
    decomposed = [unicodedata.normalize("NFD", f"déjà vu et été numéro {number}") for number in range(4)]
    documents = [*long, *near, *other, *decomposed, *long[:3], unicodedata.normalize("NFC", decomposed[0]), "a b"]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in documents))
    (tmp_path / "languages.py").write_text("def wanted(text):\n    return 'deutsch' not in text\n")
    wanted = config(
        *(tmp_path / "a.jsonl", tmp_path / "corpus"),
        near_duplicates=0.8,
        unicode="nfc",
        min_characters=5,
        language_filter=f"{tmp_path}/languages.py:wanted",
    )
    manifest = prepare_corpus(wanted)
    assert manifest.counts["records"] == len(documents)
    assert manifest.counts["skipped"] == {
        "duplicate": 4,
        "fewer than min_characters": 1,
        "near duplicate": 6,
        "rejected by the language filter": 9,
    }
    assert manifest.counts["changed"] == {"Unicode normalization": 4}
    assert sum(manifest.counts["documents"].values()) == len(documents) - 20
    verify(tmp_path / "corpus")
    (tmp_path / "languages.py").write_text("def wanted(text):\n    return True\n")
    with pytest.raises(ConfigError, match="language_filter_fingerprint"):
        prepare_corpus(wanted)


def test_held_out_texts_are_in_no_sample(source: Path, tmp_path: Path):
    held_out = [text for text in texts() if len(text.split()) > 50][:5]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps({"src": text, "label": "one"}) + "\n" for text in held_out))
    settings = {"decontaminate": (f"{tmp_path}/*.jsonl",), "decontaminate_words": 40}
    wanted = config(source, tmp_path / "corpus", joined="pad", sequence_length=512, **settings)
    manifest = prepare_corpus(wanted)
    assert manifest.counts["skipped"][HELD_OUT] == 5
    verify(tmp_path / "corpus")
    vocabulary = Vocabulary.load(tmp_path / "corpus")
    gone = {tuple(ids) for ids in vocabulary.encode_batch(held_out)}
    stored = [*samples(tmp_path / "corpus", "train"), *samples(tmp_path / "corpus", "validation")]
    kept = {tuple(id for id in ids if id not in vocabulary.special_ids) for ids in stored}
    assert len(kept) == 295
    assert not gone & kept
    assert prepare_corpus(wanted).counts == manifest.counts  # the existing corpus
    with (tmp_path / "test.jsonl").open("a") as file:
        file.write('"another text"\n')
    with pytest.raises(ConfigError, match="decontaminate_fingerprint"):
        prepare_corpus(wanted)


@pytest.mark.parametrize("patterns", [("none/*.jsonl",), ("test.csv",)])
def test_unusable_held_out_files_raise_before_any_write(source: Path, tmp_path: Path, patterns):
    (tmp_path / "test.csv").write_text("a,b\n")
    paths = tuple(f"{tmp_path}/{pattern}" for pattern in patterns)
    with pytest.raises(ConfigError, match="decontaminate"):
        prepare_corpus(config(source, tmp_path / "corpus", decontaminate=paths))
    assert not (tmp_path / "corpus").exists()


def test_duplicates_are_kept_without_deduplication(source: Path, tmp_path: Path):
    manifest = prepare_corpus(config(source, tmp_path / "corpus", deduplicate=False))
    assert sum(manifest.counts["documents"].values()) == 301
    assert "duplicate" not in manifest.counts["skipped"]
    verify(tmp_path / "corpus")


@pytest.mark.distributed
def test_near_duplicates_are_independent_of_the_number_of_ranks(tmp_path: Path):
    pytest.importorskip("datasketch")
    (tmp_path / "a.txt").write_text("\n\n".join(f"{text} {text} {number}" for text in texts(60) for number in (1, 2)))
    wanted = config(tmp_path / "a.txt", tmp_path / "one", near_duplicates=0.7)
    assert prepare_corpus(wanted).counts["skipped"]["near duplicate"] > 20
    started = [*command(dataclasses.replace(wanted, output=tmp_path / "two"), ranks=2), "--near-duplicates", "0.7"]
    done = subprocess.run(started, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert content(tmp_path / "two") == content(tmp_path / "one")


@pytest.mark.distributed
def test_long_documents_are_cut_for_the_split_on_any_number_of_ranks(tmp_path: Path, capsys):
    """Four documents of 40 kB, one of them a duplicate: about 5 % of the text is held out, not a third."""
    words = random.Random(3)
    documents = [" ".join(f"{word}." for word in words.choices(WORDS, k=7000)) for _ in range(3)]
    lines = [json.dumps({"text": text}) for text in [*documents, documents[0]]]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    wanted = config(tmp_path / "a.jsonl", tmp_path / "one", validation_fraction=0.05)
    manifest = prepare_corpus(wanted)
    printed = capsys.readouterr().out
    tokens = manifest.counts["content_tokens"]
    assert tokens["validation"] / sum(tokens.values()) == pytest.approx(0.05, rel=0.2)
    assert f"held out {tokens['validation'] / sum(tokens.values()):.2%} of the tokens (5.00% asked for)" in printed
    assert manifest.counts["skipped"] == {"duplicate": 1}
    cut = manifest.counts["changed"]["long document with parts in both splits"]
    assert manifest.counts["documents"] == {"train": 3, "validation": cut}
    verify(tmp_path / "one")
    started = command(dataclasses.replace(wanted, output=tmp_path / "two"), ranks=2)
    done = subprocess.run([*started, "--validation-fraction", "0.05"], capture_output=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert content(tmp_path / "two") == content(tmp_path / "one")


@pytest.mark.parametrize(
    ("source", "lengths", "warning"),
    [
        ("book.txt", [300] * 900, "half of the documents have at most about 300 characters; in a .txt file a blank"),
        ("lines.txt.xz", [16 << 20] * 2, "the longest document has about 17,000,000 characters; in a .txt file"),
        (
            "titles.jsonl",
            [20] * 9,
            "at most about 20 characters; check that --text-field is the field with one whole text",
        ),
        ("books.jsonl", [900_000] * 9, ""),
        ("tweets.jsonl", [150] * 9, ""),
        ("articles.txt", [2000] * 99 + [10, 2_000_000], ""),
    ],
)
def test_suspicious_lengths_of_documents_give_a_warning(source: str, lengths: list[int], warning: str):
    known = DocumentLengths(length_histogram(np.array(lengths)), sum(lengths))
    warnings = known.warnings(PrepareConfig((source,)))
    assert len(warnings) == bool(warning)
    assert warning in "".join(warnings)


def test_unsplittable_file_gives_a_warning():
    small, packed = SourceFile("a.txt", 100, ""), SourceFile("b.jsonl.gz", 200, "")
    (line,) = unsplittable_warnings([small, packed], ranks=2, unit_bytes=10)
    assert "b.jsonl.gz (200 bytes) cannot be cut" in line
    assert "split it into 2 files or more" in line
    no_ranges = SourceFile("http://host/c.txt", 200, "", seekable=False)
    assert unsplittable_warnings([small, no_ranges], ranks=2, unit_bytes=10)
    for files, ranks, unit_bytes in (
        ([small, packed], 1, 10),
        ([small, packed], 2, 300),
        ([packed] * 4, 2, 10),
        ([SourceFile("d.txt", 900, "")], 2, 10),
    ):
        assert not unsplittable_warnings(files, ranks=ranks, unit_bytes=unit_bytes)
