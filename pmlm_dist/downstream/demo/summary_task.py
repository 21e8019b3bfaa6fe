"""The demo's generation task, *summary line from body*: a docstring's first line from the rest of it.

    data/demo/python-docs.jsonl (text, package, name; written by `pmlm prepare-corpus --source python-docs`)
       | first paragraph is one line of 3 to 16 words       the target
       | what follows, 20 words at least, on one line       the source
       | packages                                           go to train, validation or test as a whole
       | held-out pairs                                     whose target or source training has, too, are dropped
    FOLDER/train.jsonl validation.jsonl test.jsonl          {"id", "src", "tgt"}

Baselines that read the source alone, scored like a model (`overlap.py`): its first sentence, and the sentence with
the most frequent words of the source, both cut to the length of a target.
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
from pmlm_dist.downstream.tasks.overlap import overlap_scores

SPLITS = ("train", "validation", "test")
_TENTHS = (*("train",) * 7, "validation", *("test",) * 2)
_FEWEST_WORDS, _MOST_WORDS, _BODY_WORDS = 3, 16, 20
_WORD = re.compile(r"\w+")
_SENTENCE = re.compile(r"(?<=[.!?:])\s+")


@dataclass(frozen=True)
class SummaryTaskConfig:
    """How the task is made."""

    source: Path = Path("data/demo/python-docs.jsonl")
    """Docstrings, as `pmlm prepare-corpus --source python-docs` writes them beside its corpus."""
    output: Path = Path("data/demo-tasks/summary")
    """Folder to write, which must not be there yet."""
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
        """A line of the data set."""
        return json.dumps({"id": self.name, "src": self.source, "tgt": self.target}, ensure_ascii=False) + "\n"


def write_summary_task(config: SummaryTaskConfig) -> dict[str, int]:
    """Write the data set; how many pairs each split has. Raises `ConfigError` where there are too few docstrings."""
    if config.output.exists():
        raise ConfigError([f"--output ({config.output}) is there already, and nothing is overwritten: name another"])
    if not config.source.is_file():
        raise ConfigError([f"there is no {config.source}: make it with `pmlm prepare-corpus --source python-docs`"])
    with config.source.open(encoding="utf-8") as lines:
        splits = _splits(_pairs(json.loads(line) for line in lines), config)
    config.output.mkdir(parents=True)
    for name, pairs in splits.items():
        (config.output / f"{name}.jsonl").write_text("".join(pair.line for pair in pairs), encoding="utf-8")
    return {name: len(pairs) for name, pairs in splits.items()}


def _pairs(rows: Iterator[dict[str, str]]) -> Iterator[_Pair]:
    for row in rows:
        target, _, body = row["text"].partition("\n\n")
        source = " ".join(body.split())
        words = len(_WORD.findall(target))
        is_line = "\n" not in target.strip() and _FEWEST_WORDS <= words <= _MOST_WORDS
        if is_line and len(_WORD.findall(source)) >= _BODY_WORDS and target.lower() not in source.lower():
            yield _Pair(row["name"], row["package"], source, target.strip())


def _splits(pairs: Iterator[_Pair], config: SummaryTaskConfig) -> dict[str, list[_Pair]]:
    """Pairs in an order of their own, cut to the wanted numbers."""
    by_split: dict[str, list[_Pair]] = {name: [] for name in SPLITS}
    for pair in sorted(pairs, key=lambda pair: _digest(pair.name + pair.target)):
        by_split[_TENTHS[_digest(pair.package) % len(_TENTHS)]].append(pair)
    train = by_split["train"]
    known = {key for pair in train for key in _keys(pair)}  # of all of training's packages, taken or not
    found = {"train": train[: config.train]}
    for name in SPLITS[1:]:
        found[name] = [pair for pair in by_split[name] if not known & set(_keys(pair))][: getattr(config, name)]
    few = {name: len(found[name]) for name in SPLITS if len(found[name]) < getattr(config, name)}
    if few:
        raise ConfigError(
            [f"{name}: only {n} docstrings fit, {getattr(config, name)} are wanted" for name, n in few.items()]
        )
    return found


def _keys(pair: _Pair) -> tuple[str, str]:
    """What two pairs must not share: the words of the target, and how the source begins."""
    return "t " + _words(pair.target), "s " + " ".join(_words(pair.source).split()[:_BODY_WORDS])


def _words(text: str) -> str:
    return " ".join(_WORD.findall(text.lower()))


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


# ------------------------------------------------------------------------------------------------------------ baselines


def first_sentence(source: str) -> str:
    """The first sentence, as far as a target may be long."""
    return " ".join(_sentences(source)[0].split()[:_MOST_WORDS])


def frequent_words(source: str) -> str:
    """The sentence whose words are the most frequent ones of the source on average (of longer ones the beginning)."""
    counts = Counter(word for word in _WORD.findall(source.lower()) if len(word) > 3)

    def weight(sentence: str) -> float:
        words = _WORD.findall(sentence.lower())
        return sum(counts[word] for word in words) / len(words)

    cut = (" ".join(sentence.split()[:_MOST_WORDS]) for sentence in _sentences(source))
    return max((sentence for sentence in cut if len(_WORD.findall(sentence)) >= _FEWEST_WORDS), key=weight, default="")


BASELINES: dict[str, Callable[[str], str]] = {"first sentence": first_sentence, "frequent words": frequent_words}


def baseline_scores(folder: Path, split: str = "test") -> dict[str, dict[str, float]]:
    """ROUGE and BLEU of every baseline on a split that `write_summary_task` has written."""
    with (folder / f"{split}.jsonl").open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    references = [row["tgt"] for row in rows]
    return {
        name: overlap_scores([answer(row["src"]) for row in rows], references) for name, answer in BASELINES.items()
    }


def _sentences(source: str) -> Sequence[str]:
    return [sentence for sentence in _SENTENCE.split(source) if _WORD.search(sentence)] or [source]
