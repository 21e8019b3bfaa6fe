import unicodedata
from pathlib import Path

import pytest

from pmlm_dist.config import ConfigError
from pmlm_dist.corpus.filters.cleaning import LANGUAGE, NORMALIZED, TOO_FEW_CHARACTERS, Cleaner, language_filter
from pmlm_dist.corpus.input.documents import Document

TEXTS = ["plain", "e\u0301te\u0301", "\u00e9t\u00e9", "\ufb01ne", "x"]


def cleaned(cleaner: Cleaner) -> list[str]:
    documents = [Document(3, number, text, "a.txt") for number, text in enumerate(TEXTS)]
    return [document.text for document in cleaner.clean(documents)]


@pytest.mark.parametrize(("form", "changed"), [("none", 0), ("nfc", 1), ("nfd", 1), ("nfkc", 2), ("nfkd", 2)])
def test_normalized_texts_are_counted(form, changed: int):
    cleaner = Cleaner(unicode=form)
    expected = TEXTS if form == "none" else [unicodedata.normalize(form.upper(), text) for text in TEXTS]
    assert cleaned(cleaner) == expected
    assert cleaner.changed[NORMALIZED] == changed
    assert not cleaner.skipped.counts


def test_short_and_foreign_texts_are_counted_with_the_first_location():
    cleaner = Cleaner(unicode="nfc", min_characters=3, keep=lambda text: "é" not in text)
    assert cleaned(cleaner) == ["plain", "\ufb01ne"]
    assert cleaner.skipped.counts == {TOO_FEW_CHARACTERS: 1, LANGUAGE: 2}
    assert cleaner.skipped.first[LANGUAGE] == (3, "a.txt, record 1 of unit 3")


def test_language_filter_is_loaded_from_a_file_or_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "filters_of_user.py"
    file.write_text("def latin(text):\n    return text.isascii()\n")
    by_file = language_filter(f"{file}:latin")
    monkeypatch.syspath_prepend(tmp_path)
    by_module = language_filter("filters_of_user:latin")
    assert [(found.keep("abc"), found.keep("日本")) for found in (by_file, by_module)] == [(True, False)] * 2
    assert by_file.fingerprint == by_module.fingerprint
    file.write_text("def latin(text):\n    return True\n")
    assert language_filter(f"{file}:latin").fingerprint != by_file.fingerprint


@pytest.mark.parametrize(
    "address", ["nothing", "no_such_module:f", "missing.py:f", "json:no_such", "json:decoder", "builtins:len", ":f"]
)
def test_unusable_language_filter_raises(address: str):
    with pytest.raises(ConfigError, match="language_filter"):
        language_filter(address)
