"""Dataset rows from every file format, and error messages for invalid files."""

import json
from pathlib import Path

import pytest

from pmlm_dist.config import ConfigError
from pmlm_dist.downstream.rows import read_file, read_rows

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


GLUE_FILES = {
    "qqp": ("id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", '7\t1\t2\tIs "this\tIs that?\t0'),
    "mrpc": ("\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String", '1\t70\t71\t" He said .\tHe said so .\u2028'),
    "qnli": ("index\tquestion\tsentence\tlabel", "0\tWho?\tShe \x0b said.\tnot_entailment"),
    "sst2": ("sentence\tlabel", "it 's \u0085 good \t1"),
    "mnli": ("index\tpromptID\tpairID\tgenre\tsentence1\tsentence2\tlabel1\tgold_label", "0\t1\t1e\tx\ta\tb\tc\tc"),
}


@pytest.mark.parametrize("name", GLUE_FILES)
def test_irregular_lines_of_glue_are_skipped_with_one_note(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
):
    header, line = GLUE_FILES[name]
    broken = ['" a question?', f"{line}\textra"]
    (tmp_path / "train.tsv").write_text("\r\n".join([header, line, *broken, line, line, ""]), newline="")
    rows = read_rows(str(tmp_path), "train")
    assert [list(row.values()) for row in rows] == [line.split("\t")] * 3
    assert list(rows[0]) == header.removeprefix("\ufeff").split("\t")
    (note,) = capsys.readouterr().out.splitlines()
    assert note.startswith("note: 2 of 5 lines skipped")
    assert note.endswith(f"train.tsv, line 3: 1 columns instead of {len(rows[0])}")


def test_glue_rows_without_text_or_gold_label_are_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    lines = ["sentence1\tsentence2\tgold_label", "a\tb\tneutral", "a\t \tneutral", "c\td\tneutral", "a\tb\t-", ""]
    (tmp_path / "dev_matched.tsv").write_text("\n".join(lines))
    assert [row["sentence1"] for row in read_rows(str(tmp_path), "validation_matched")] == ["a", "c"]
    assert "2 of 4 lines skipped, as GLUE's files have some" in capsys.readouterr().out


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


def test_file_of_an_unknown_format_raises(tmp_path: Path):
    """It was read as CSV: the first line became the names of the columns."""
    for name in ("input.txt", "input", "input.jsonl.gz"):
        (tmp_path / name).write_text("a text\nanother\n")
        with pytest.raises(ConfigError, match=r"its name must end in .jsonl, .csv"):
            read_file(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train.csv", "text,label,text\na,b,c\n", "more than one column is called 'text'"),
        ("train.tsv", "", "is empty"),
        ("train.json", "", "train.json, line 1 is not JSON"),
        ("train.json", "[]", "not in SQuAD's format"),
        ("train.jsonl", "", "is empty"),
        ("train.csv", "text,label\n", "is empty"),
        ("train.jsonl", '{"a": 1}\n{"a": \n', "line 2: not JSON"),
        ("train.jsonl", "[1]\n", "line 1: not a JSON object"),
        ("train.jsonl", '{"a": 1}\n' + "[" * 100_000 + "\n", "line 2: not JSON .* nested more than 64 deep"),
        ("train.jsonl", '{"a": ' + "9" * 5000 + "}\n", "line 1: not JSON .*5000 characters"),
        ("train.jsonl", '{"a": 1, "a": 2}\n', "line 1: not JSON .*`a` is given twice"),
        ("train.tsv", "text\tlabel\na\tb\nc\n", "line 3: 1 columns instead of 2: replace tabs"),
        ("train.tsv", "sentence\tlabel\na\nb\tx\nc\n", r"line 2: 1 columns instead of 2 \(and 1 more lines\)"),
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
