"""Dataset rows from every file format, and error messages for invalid files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pmlm_dist.config import ConfigError
from pmlm_dist.downstream.rows import read_rows

SQUAD = {
    "version": "v2.0",
    "data": [
        {
            "title": "t",
            "paragraphs": [
                {
                    "context": "Denver won.",
                    "qas": [
                        {"id": "1", "question": "Who won?", "answers": [{"text": "Denver", "answer_start": 0}]},
                        {"id": "2", "question": "Who lost?", "answers": [], "is_impossible": True},
                    ],
                }
            ],
        }
    ],
}


def test_all_formats_give_equal_rows(tmp_path: Path):
    rows = [{"text": 'a "b", c', "label": "x"}, {"text": "d", "label": "y"}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "\n")
    (tmp_path / "validation.csv").write_text('text,label\n"a ""b"", c",x\nd,y\n')
    (tmp_path / "test.tsv").write_text('\ufefftext\tlabel\na "b", c\tx\nd\ty\n')
    assert [read_rows(str(tmp_path), split) for split in ("train", "validation", "test")] == [rows] * 3


def test_cola_without_header_is_read_as_validation_split_from_dev(tmp_path: Path):
    (tmp_path / "dev.tsv").write_text('gj04\t1\t\tThe "sailors" rode.\ngj05\t0\t*\tRode sailors.\n')
    rows = read_rows(str(tmp_path), "validation")
    assert [(row["label"], row["sentence"]) for row in rows] == [("1", 'The "sailors" rode.'), ("0", "Rode sailors.")]


def test_squad_has_one_row_per_question(tmp_path: Path):
    (tmp_path / "train-v2.0.json").write_text(json.dumps(SQUAD))
    first, second = read_rows(str(tmp_path), "train")
    assert first == {
        "id": "1",
        "question": "Who won?",
        "context": "Denver won.",
        "answers": {"text": ["Denver"], "answer_start": [0]},
    }
    assert second["answers"] == {"text": [], "answer_start": []}


def test_saved_hugging_face_data_set_has_label_names(tmp_path: Path):
    datasets = pytest.importorskip("datasets")
    label = datasets.ClassLabel(names=["no", "yes"])
    features = datasets.Features(text=datasets.Value("string"), label=label)
    part = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, -1]}, features=features)
    datasets.DatasetDict(train=part).save_to_disk(str(tmp_path / "saved"))
    assert read_rows(str(tmp_path / "saved"), "train") == [{"text": "a", "label": "yes"}, {"text": "b", "label": None}]
    with pytest.raises(ConfigError, match="has no split test: it has train"):
        read_rows(str(tmp_path / "saved"), "test")


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_crlf_byte_order_mark_and_blank_lines_are_ignored(tmp_path: Path, mark: str):
    rows = [{"text": "a", "label": "x\u2028y"}, {"text": "b" * 200_000, "label": "z"}]  # above the default limit of csv
    texts = {
        "train.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in rows),
        "validation.csv": "\r\n".join(["text,label", *(f"{row['text']},{row['label']}" for row in rows), "", ""]),
        "test.tsv": "\r\n".join(["text\tlabel", *(f"{row['text']}\t{row['label']}" for row in rows), ""]),
    }
    for name, text in texts.items():
        (tmp_path / name).write_bytes((mark + text).encode())
    assert [read_rows(str(tmp_path), split) for split in ("train", "validation", "test")] == [rows] * 3


def test_lone_carriage_returns_and_unicode_separators_end_no_line(tmp_path: Path):
    text = "a\rb\x0bc\x0cd\x1ce\x85f\u2028g"
    (tmp_path / "train.jsonl").write_bytes(b'{"text":\r"a\xe2\x80\xa8b",\r"label": "x"}\n')
    (tmp_path / "test.tsv").write_bytes(f"text\tlabel\n{text}\tx\n".encode())
    assert read_rows(str(tmp_path), "train") == [{"text": "a\u2028b", "label": "x"}]
    assert read_rows(str(tmp_path), "test") == [{"text": text, "label": "x"}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train.csv", "text,label,text\na,b,c\n", "more than one column is called 'text'"),
        ("train.tsv", "", "is empty"),
        ("train.json", "", "not in SQuAD's format"),
        ("train.jsonl", "", "is empty"),
        ("train.csv", "text,label\n", "is empty"),
        ("train.jsonl", '{"a": 1}\n{"a": \n', "line 2: not JSON"),
        ("train.jsonl", "[1]\n", "line 1: not a JSON object"),
        ("train.csv", "a,b\n1,2,3\n", "line 2: 3 columns instead of 2"),
        ("train.json", '{"data": [{"paragraphs": [{}]}]}', "not in SQuAD's format"),
        ("test.jsonl", '{"a": 1}\n', "has no split train.*it contains test.jsonl"),
    ],
)
def test_invalid_file_raises_with_its_problem(tmp_path: Path, name: str, content: str, message: str):
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_rows(str(tmp_path), "train")


@pytest.mark.parametrize("split", ["../test", "folder/test", "/test", ""])
def test_split_with_path_raises(tmp_path: Path, split: str):
    (tmp_path / "test.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match="is a name, not a path"):
        read_rows(str(tmp_path / "folder"), split)


def test_duplicate_split_raises(tmp_path: Path):
    for name in ("train.jsonl", "train.tsv"):
        (tmp_path / name).write_text("a\n")
    with pytest.raises(ConfigError, match=r"more than once: train.jsonl, train.tsv"):
        read_rows(str(tmp_path), "train")


def test_unreachable_hub_raises_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    datasets = pytest.importorskip("datasets")

    def unreachable(*_: object) -> None:
        raise ConnectionError("no network\nat all")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(ConfigError, match=r"nyu-mll/glue:cola\) is not a folder here.*: no network$"):
        read_rows("nyu-mll/glue:cola", "train")
