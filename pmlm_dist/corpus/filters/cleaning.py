"""Filters that see one document at a time; duplicates.py has the others.

document -> Unicode normalization -> long enough? -> language wanted? -> no held-out text? -> document | reason to skip
"""

import hashlib
import importlib
import importlib.util
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Literal

from pmlm_dist.config import ConfigError
from pmlm_dist.corpus.filters.contamination import HeldOutNgrams
from pmlm_dist.corpus.filters.normal_form import normal_form
from pmlm_dist.corpus.input.documents import Document
from pmlm_dist.corpus.input.records import SkippedRecords

Unicode = Literal["none", "nfc", "nfd", "nfkc", "nfkd"]

TOO_FEW_CHARACTERS = "fewer than min_characters"
LANGUAGE = "rejected by the language filter"
HELD_OUT = "shares words with held-out texts"
NORMALIZED = "Unicode normalization"


@dataclass(frozen=True)
class LanguageFilter:
    """A user's function from a text to True (keep) or False, and the identity of its code."""

    keep: Callable[[str], object]
    fingerprint: str
    """sha256 (hexadecimal) of the file that defines it."""


def language_filter(address: str) -> LanguageFilter:
    """Load `package.module:function` or `folder/file.py:function`. Raises ConfigError on failure."""
    module_name, _, name = address.rpartition(":")
    try:
        module = _load_module(module_name)
        function = getattr(module, name)
        fingerprint = hashlib.sha256(Path(str(module.__file__)).read_bytes()).hexdigest()
    except (ImportError, AttributeError, OSError, SyntaxError, ValueError) as error:
        raise ConfigError(
            [f"language_filter ({address}): {error}: give package.module:function or file.py:function"]
        ) from error
    if not callable(function):
        raise ConfigError(
            [f"language_filter ({address}) is not a function: it must take a text and return true or false"]
        )
    return LanguageFilter(function, fingerprint)


def _load_module(name: str) -> ModuleType:
    if not name.endswith(".py"):
        return importlib.import_module(name)
    module_name = f"pmlm_language_filter_{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    specification = importlib.util.spec_from_file_location(module_name, name)
    assert specification is not None
    assert specification.loader is not None
    module = sys.modules[module_name] = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@dataclass
class Cleaner:
    """Normalize and filter documents; count changed and skipped ones."""

    unicode: Unicode = "none"
    min_characters: int = 0
    keep: Callable[[str], object] | None = None
    held_out: HeldOutNgrams | None = None
    skipped: SkippedRecords = field(default_factory=SkippedRecords)
    changed: Counter[str] = field(default_factory=Counter)
    """Kind of change -> number of documents."""

    def clean(self, documents: Iterable[Document]) -> Iterator[Document]:
        for document in documents:
            cleaned = normalize(document, self.unicode)
            self.changed[NORMALIZED] += cleaned is not document
            reason = self._rejection_reason(cleaned.text)
            if reason is None:
                yield cleaned
            else:
                self.skipped.add(reason, unit=document.unit, location=document.location)

    def _rejection_reason(self, text: str) -> str | None:
        if len(text) < self.min_characters:
            return TOO_FEW_CHARACTERS
        if self.keep is not None and not self.keep(text):
            return LANGUAGE
        if self.held_out is not None and self.held_out.overlaps(text):
            return HELD_OUT
        return None


def normalize(document: Document, form: Unicode) -> Document:
    """Return the document in a Unicode normal form (UAX 15); the same object if it is already in that form."""
    if form == "none" or document.text.isascii():
        return document
    text = normal_form(form.upper(), document.text)  # pyright: ignore[reportArgumentType]
    return document if text == document.text else replace(document, text=text)
