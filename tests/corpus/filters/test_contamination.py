"""Documents that share a run of words with held-out texts are found, and no others."""

from __future__ import annotations

import gzip
import json
import random
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmlm_dist.config import ConfigError
from pmlm_dist.corpus.filters.contamination import HeldOut, read_held_out

few_words = st.lists(st.sampled_from(["a", "B", "b", "c_1", "é"]), max_size=12)


def runs(text: str, words: int) -> set[tuple[str, ...]]:
    """Written out: the runs of a text, of a shorter one the whole."""
    found = re.findall(r"\w+", text.lower())
    return {tuple(found[at : at + words]) for at in range(max(1, len(found) - words + 1))} - {()}


@given(st.lists(few_words, max_size=3), few_words, st.integers(1, 5))
def test_a_document_is_met_by_the_runs_that_it_shares(held_out: list[list[str]], document: list[str], words: int):
    texts = [" ".join(text) for text in held_out]
    known = {run for text in texts for run in runs(text, words)}
    met = HeldOut.of(texts, words=words).overlaps(" ".join(document))
    assert met == bool(known & runs(" ".join(document), words))


def test_case_marks_spaces_and_forms_of_characters_do_not_hide_a_text():
    held_out = HeldOut.of(["Déjà vu: the ﬁne model, reads `x`."], words=4)
    assert held_out.overlaps("so de\u0301ja\u0300-VU\n\nThe fine... and then")
    assert not held_out.overlaps("déjà vu the other fine model reads y")


def test_a_text_shorter_than_a_run_meets_itself_and_no_quotation():
    held_out = HeldOut.of(["two words"], words=13)
    assert held_out.overlaps("Two words!")
    assert not held_out.overlaps("these are two words")


def test_among_many_runs_and_words_exactly_the_shared_ones_are_found():
    draw = random.Random(0)
    texts = [" ".join(f"w{draw.randrange(1000)}" for _ in range(200)) for _ in range(400)]
    held_out = HeldOut.of(texts[:200], words=13)
    assert len(held_out.runs) == 200 * 188
    assert all(held_out.overlaps(f"before {text[300:700]} after") for text in texts[:200])
    assert not any(held_out.overlaps(text) for text in texts[200:])


def test_every_field_of_every_kind_of_file_counts(tmp_path: Path):
    answers = {"id": 7, "question": "who wrote it", "answers": {"text": ["nobody did so far"], "start": [3]}}
    (tmp_path / "a.jsonl").write_text(json.dumps(answers) + "\n\n" + json.dumps(["a list of words"]))
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"one two three\n\nfour five six\n"))
    held_out = read_held_out([f"{tmp_path}/*"], words=3)
    for text in ("who wrote it", "did so far", "list of words", "one two three", "four five six"):
        assert held_out.overlaps(text)
    assert not held_out.overlaps("two three four")
    assert held_out.fingerprint != read_held_out([f"{tmp_path}/b.txt.gz"], words=3).fingerprint


def test_columns_of_strings_and_of_other_things_are_read(tmp_path: Path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"n": [1, 2], "src": ["one two three", None], "tgts": [["four five"], ["six seven", "x"]]})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=1)
    held_out = read_held_out([f"{tmp_path}/a.parquet"], words=2)
    assert [held_out.overlaps(text) for text in ("two three", "four five", "six seven", "seven x")] == [True] * 3 + [
        False
    ]


def test_a_data_set_s_columns_are_read(tmp_path: Path):
    datasets = pytest.importorskip("datasets")
    rows = {"n": [1, 2], "question": ["who wrote it", "when"], "answers": [["nobody did"], ["some day", "then"]]}
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "saved")
    held_out = read_held_out([f"datasets://{tmp_path}/saved"], words=2)
    assert [held_out.overlaps(text) for text in ("wrote it", "nobody did", "some day", "day then")] == [True] * 3 + [
        False
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "fine"}\n{"text": ', "byte 17 cannot be read"),
        ("a.txt", b"fine\n\nnot \xff", "byte 6 cannot be read"),
        ("a.txt.gz", b"no gzip", "is damaged"),
        ("a.txt", "...", "no text"),
        ("b.csv", "x", "unknown kind"),
    ],
)
def test_what_cannot_be_read_is_refused_and_not_passed_over(tmp_path: Path, name: str, content, message: str):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=message):
        read_held_out([f"{tmp_path}/{name}"], words=13)
