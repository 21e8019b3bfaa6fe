"""Documents that share a word n-gram with held-out texts, compared with sets of n-grams."""

import gzip
import json
import random
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmlm_dist.config import ConfigError
from pmlm_dist.corpus.filters.contamination import HeldOutNgrams, read_held_out

few_words = st.lists(st.sampled_from(["a", "B", "b", "c_1", "é"]), max_size=12)


def ngrams(text: str, words: int) -> set[tuple[str, ...]]:
    """Reference: the set of n-grams of a text; for a shorter text, all its words."""
    found = re.findall(r"\w+", text.lower())
    return {tuple(found[at : at + words]) for at in range(max(1, len(found) - words + 1))} - {()}


@given(st.lists(few_words, max_size=3), few_words, st.integers(1, 5))
def test_overlap_equals_a_common_ngram(held_out: list[list[str]], document: list[str], words: int):
    texts = [" ".join(text) for text in held_out]
    known = {ngram for text in texts for ngram in ngrams(text, words)}
    overlaps = HeldOutNgrams.from_texts(texts, words=words).overlaps(" ".join(document))
    assert overlaps == bool(known & ngrams(" ".join(document), words))


def test_overlap_ignores_case_punctuation_spaces_and_unicode_form():
    held_out = HeldOutNgrams.from_texts(["Déjà vu: the ﬁne model, reads `x`."], words=4)
    assert held_out.overlaps("so de\u0301ja\u0300-VU\n\nThe fine... and then")
    assert not held_out.overlaps("déjà vu the other fine model reads y")


def test_text_shorter_than_an_ngram_matches_only_itself():
    held_out = HeldOutNgrams.from_texts(["two words"], words=13)
    assert held_out.overlaps("Two words!")
    assert not held_out.overlaps("these are two words")


def test_overlap_among_many_ngrams_is_exact():
    rng = random.Random(0)
    texts = [" ".join(f"w{rng.randrange(1000)}" for _ in range(200)) for _ in range(400)]
    held_out = HeldOutNgrams.from_texts(texts[:200], words=13)
    assert len(held_out.hashes) == 200 * 188
    assert all(held_out.overlaps(f"before {text[300:700]} after") for text in texts[:200])
    assert not any(held_out.overlaps(text) for text in texts[200:])


def test_held_out_strings_come_from_all_fields(tmp_path: Path):
    answers = {"id": 7, "question": "who wrote it", "answers": {"text": ["no one did so far"], "start": [3]}}
    (tmp_path / "a.jsonl").write_text(json.dumps(answers) + "\n\n" + json.dumps(["a list of words"]))
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"one two three\n\nfour five six\n"))
    held_out = read_held_out([f"{tmp_path}/*"], words=3)
    for text in ("who wrote it", "did so far", "list of words", "one two three", "four five six"):
        assert held_out.overlaps(text)
    assert not held_out.overlaps("two three four")
    assert held_out.fingerprint != read_held_out([f"{tmp_path}/b.txt.gz"], words=3).fingerprint


def test_held_out_strings_come_from_all_parquet_columns(tmp_path: Path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"n": [1, 2], "src": ["one two three", None], "tgts": [["four five"], ["six seven", "x"]]})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=1)
    held_out = read_held_out([f"{tmp_path}/a.parquet"], words=2)
    assert [held_out.overlaps(text) for text in ("two three", "four five", "six seven", "seven x")] == [True] * 3 + [
        False
    ]


def test_held_out_strings_come_from_all_columns_of_a_data_set(tmp_path: Path):
    datasets = pytest.importorskip("datasets")
    rows = {"n": [1, 2], "question": ["who wrote it", "when"], "answers": [["no one did"], ["some day", "then"]]}
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "saved")
    held_out = read_held_out([f"datasets://{tmp_path}/saved"], words=2)
    assert [held_out.overlaps(text) for text in ("wrote it", "no one did", "some day", "day then")] == [True] * 3 + [
        False
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "fine"}\n{"text": ', "byte 17 cannot be read"),
        ("a.txt", b"fine\n\nnot \xff", "byte 6 cannot be read"),
        ("a.txt.gz", b"no gzip", "is corrupt"),
        ("a.txt", "...", "no text"),
        ("b.csv", "x", "unknown kind"),
    ],
)
def test_unreadable_held_out_record_raises(tmp_path: Path, name: str, content, message: str):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=message):
        read_held_out([f"{tmp_path}/{name}"], words=13)
