"""What a text must be to become part of the corpus, one document at a time. Duplicates are judged in duplicates.py.

text -> Unicode normalisation -> long enough? -> in a wanted language? -> not held out? -> text | why not
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Literal

from pmlm_dist.config import ConfigError
from pmlm_dist.corpus.filters.contamination import HeldOut
from pmlm_dist.corpus.input.documents import Document, Skips

Unicode = Literal["none", "nfc", "nfd", "nfkc", "nfkd"]

TOO_FEW = "fewer than min_characters"
LANGUAGE = "refused by the language filter"
HELD_OUT = "shares words with held-out texts"
NORMALIZED = "Unicode normalisation"


@dataclass(frozen=True)
class LanguageFilter:
    """A function of the user's that says whether a text is kept, and what tells one version of it from another."""

    keeps: Callable[[str], object]
    fingerprint: str
    """sha256 (hexadecimal) of the file that it stands in."""


def language_filter(address: str) -> LanguageFilter:
    """The function named by `package.module:function` or `folder/file.py:function`. Raises ConfigError for none."""
    place, _, name = address.rpartition(":")
    try:
        module = _module(place)
        function = getattr(module, name)
        fingerprint = hashlib.sha256(Path(str(module.__file__)).read_bytes()).hexdigest()
    except (ImportError, AttributeError, OSError, SyntaxError, ValueError) as error:
        raise ConfigError(
            [f"language_filter ({address}): {error}: give package.module:function or file.py:function"]
        ) from error
    if not callable(function):
        raise ConfigError([f"language_filter ({address}) is no function: it must take a text and return true or false"])
    return LanguageFilter(function, fingerprint)


def _module(place: str) -> ModuleType:
    if not place.endswith(".py"):
        return importlib.import_module(place)
    name = f"pmlm_language_filter_{hashlib.sha256(place.encode()).hexdigest()[:8]}"
    specification = importlib.util.spec_from_file_location(name, place)
    assert specification is not None
    assert specification.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@dataclass
class Cleaner:
    """Cleans documents and counts what it does."""

    unicode: Unicode = "none"
    min_characters: int = 0
    keeps: Callable[[str], object] | None = None
    held_out: HeldOut | None = None
    skips: Skips = field(default_factory=Skips)
    changed: Counter[str] = field(default_factory=Counter)
    """Documents changed, by what changed them."""

    def clean(self, documents: Iterable[Document]) -> Iterator[Document]:
        """The documents that are kept, normalised; of the others the reason is counted."""
        for document in documents:
            cleaned = normalized(document, self.unicode)
            self.changed[NORMALIZED] += cleaned is not document
            reason = self._rejection_reason(cleaned.text)
            if reason is None:
                yield cleaned
            else:
                self.skips.add(reason, unit=document.unit, place=document.place)

    def _rejection_reason(self, text: str) -> str | None:
        if len(text) < self.min_characters:
            return TOO_FEW
        if self.keeps is not None and not self.keeps(text):
            return LANGUAGE
        if self.held_out is not None and self.held_out.overlaps(text):
            return HELD_OUT
        return None


def normalized(document: Document, form: Unicode) -> Document:
    """The document in a normal form of Unicode (UAX 15); itself if it is in that form already."""
    if form == "none" or document.text.isascii():
        return document
    text = unicodedata.normalize(form.upper(), document.text)  # pyright: ignore[reportArgumentType]
    return document if text == document.text else replace(document, text=text)
