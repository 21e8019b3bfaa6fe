"""The programs in docs/data.md run, and do what the text around them says."""

import re
from pathlib import Path
from typing import Any

import pytest
from preparations import config, samples, write_source

from pmlm_dist.corpus.prepare import prepare_corpus
from pmlm_dist.corpus.verify import verify

DOCUMENT = (Path(__file__).parents[2] / "docs/data.md").read_text(encoding="utf-8")
FILTER, READ, WRITE = re.findall(r"```python\n(.*?)```", DOCUMENT, flags=re.DOTALL)


def test_the_language_filter_of_the_document():
    names: dict[str, Any] = {}
    exec(FILTER, names)
    assert names["german"]("Das ist der Satz, und nicht die Ausnahme")
    assert not names["german"]("This is the sentence and not the exception")


def test_any_webdataset_program_reads_and_writes_a_corpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    prepare_corpus(config(write_source(tmp_path), tmp_path / "corpus", shards=4))
    monkeypatch.chdir(tmp_path)
    found: list[Any] = []
    exec(READ + "    found.append(ids.tolist())\n", {"found": found})
    assert found == samples(Path("corpus"), "train")
    written: dict[str, Any] = {}
    exec(WRITE, written)
    verify(Path("mine"))
    assert "8 train samples, 8 validation samples: checked in itself" in capsys.readouterr().out
    assert samples(Path("mine"), "train") == [ids.tolist() for ids in written["samples"]]
