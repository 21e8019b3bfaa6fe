"""Demo generation task, *summary line from body*: generate the first line of a docstring from its body.

    data/demo/python-docs.jsonl (text, package, name; written by `pmlm prepare-corpus --source python-docs`)
       | first paragraph: one line, 3 to 16 words           the target
       | rest: at least 20 words, joined to one line        the source
       | packages                                           are assigned to train, validation or test as a whole
       | held-out pairs                                     with a target or source of training are dropped
    FOLDER/train.jsonl validation.jsonl test.jsonl          {"id", "src", "tgt"}

Extractive baselines, scored like a model (`overlap.py`): the first sentence of the source, and its sentence with the
most frequent words; both are truncated to the length of a target.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pmlm_dist.config import ConfigError
from pmlm_dist.conversion.pretrained import new_folder
from pmlm_dist.downstream.tasks.overlap import overlap_scores

SPLITS = ("train", "validation", "test")
_SPLIT_OF_TENTH = (*("train",) * 7, "validation", *("test",) * 2)
_MIN_WORDS, _MAX_WORDS, _MIN_BODY_WORDS = 3, 16, 20
_WORD = re.compile(r"\w+")
_SENTENCE = re.compile(r"(?<=[.!?:])\s+")


@dataclass(frozen=True)
class SummaryTaskConfig:
    """Settings of the data set."""

    source: Path = Path("data/demo/python-docs.jsonl")
    """Docstrings, written by `pmlm prepare-corpus --source python-docs` beside its corpus."""
    output: Path = Path("data/demo-tasks/summary")
    """Folder to write; it must not exist."""
    train: int = 10_000
    """Training pairs."""
    validation: int = 400
    """Validation pairs."""
    test: int = 500
    """Test pairs."""


@dataclass(frozen=True)
class _Pair:
    name: str
    package: str
    source: str
    target: str

    @property
    def line(self) -> str:
        """The JSON line of the data set."""
        return json.dumps({"id": self.name, "src": self.source, "tgt": self.target}, ensure_ascii=False) + "\n"


def write_summary_task(config: SummaryTaskConfig) -> dict[str, int]:
    """Write the data set; returns {split: pairs}. Raises `ConfigError` if there are too few docstrings."""
    with new_folder(config.output) as folder:
        if not config.source.is_file():
            raise ConfigError([f"there is no {config.source}: make it with `pmlm prepare-corpus --source python-docs`"])
        with config.source.open(encoding="utf-8") as lines:
            splits = _splits(_pairs(json.loads(line) for line in lines), config)
        for name, pairs in splits.items():
            (folder / f"{name}.jsonl").write_text("".join(pair.line for pair in pairs), encoding="utf-8")
    return {name: len(pairs) for name, pairs in splits.items()}


def _pairs(rows: Iterator[dict[str, str]]) -> Iterator[_Pair]:
    for row in rows:
        target, _, body = row["text"].partition("\n\n")
        source = " ".join(body.split())
        words = len(_WORD.findall(target))
        is_line = "\n" not in target.strip() and _MIN_WORDS <= words <= _MAX_WORDS
        if is_line and len(_WORD.findall(source)) >= _MIN_BODY_WORDS and target.lower() not in source.lower():
            yield _Pair(row["name"], row["package"], source, target.strip())


def _splits(pairs: Iterator[_Pair], config: SummaryTaskConfig) -> dict[str, list[_Pair]]:
    """Assign pairs to splits in a pseudo-random, reproducible order, and take the configured numbers."""
    by_split: dict[str, list[_Pair]] = {name: [] for name in SPLITS}
    for pair in sorted(pairs, key=lambda pair: _digest(pair.name + pair.target)):
        by_split[_SPLIT_OF_TENTH[_digest(pair.package) % len(_SPLIT_OF_TENTH)]].append(pair)
    train = by_split["train"]
    known = {key for pair in train for key in _keys(pair)}  # of unused training pairs, too
    splits = {"train": train[: config.train]}
    for name in SPLITS[1:]:
        splits[name] = [pair for pair in by_split[name] if not known & set(_keys(pair))][: getattr(config, name)]
    few = {name: len(splits[name]) for name in SPLITS if len(splits[name]) < getattr(config, name)}
    if few:
        raise ConfigError(
            [
                f"{name}: only {n} docstrings are suitable, {getattr(config, name)} are required"
                for name, n in few.items()
            ]
        )
    return splits


def _keys(pair: _Pair) -> tuple[str, str]:
    """Return the duplicate keys of a pair: the words of the target, and the first words of the source."""
    return "t " + _words(pair.target), "s " + " ".join(_words(pair.source).split()[:_MIN_BODY_WORDS])


def _words(text: str) -> str:
    return " ".join(_WORD.findall(text.lower()))


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


# ------------------------------------------------------------------------------------------------------------ baselines


def first_sentence(source: str) -> str:
    """Return the first sentence, truncated to the length of a target."""
    return " ".join(_sentences(source)[0].split()[:_MAX_WORDS])


def frequent_words(source: str) -> str:
    """Return the sentence whose words have the highest mean frequency in the source, truncated like a target."""
    counts = Counter(word for word in _WORD.findall(source.lower()) if len(word) > 3)

    def mean_frequency(sentence: str) -> float:
        words = _WORD.findall(sentence.lower())
        return sum(counts[word] for word in words) / len(words)

    truncated = (" ".join(sentence.split()[:_MAX_WORDS]) for sentence in _sentences(source))
    return max(
        (sentence for sentence in truncated if len(_WORD.findall(sentence)) >= _MIN_WORDS),
        key=mean_frequency,
        default="",
    )


BASELINES: dict[str, Callable[[str], str]] = {"first sentence": first_sentence, "frequent words": frequent_words}


def baseline_scores(folder: Path, split: str = "test") -> dict[str, dict[str, float]]:
    """Return ROUGE and BLEU of each baseline on a split that `write_summary_task` wrote."""
    with (folder / f"{split}.jsonl").open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    references = [row["tgt"] for row in rows]
    return {
        name: overlap_scores([summarize(row["src"]) for row in rows], references)
        for name, summarize in BASELINES.items()
    }


def _sentences(source: str) -> Sequence[str]:
    return [sentence for sentence in _SENTENCE.split(source) if _WORD.search(sentence)] or [source]
