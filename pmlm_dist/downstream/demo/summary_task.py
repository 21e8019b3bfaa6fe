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

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from pmlm_dist.config import raise_if_any
from pmlm_dist.downstream.demo.splits import HELD_OUT, digest, read_rows, write_splits
from pmlm_dist.downstream.tasks.overlap import overlap_scores

SIZES = {"train": 10_000, "validation": 400, "test": 500}
_SPLIT_OF_TENTH = (*("train",) * 7, "validation", *("test",) * 2)
_MIN_WORDS, _MAX_WORDS, _MIN_BODY_WORDS = 3, 16, 20
_WORD = re.compile(r"\w+")
_SENTENCE = re.compile(r"(?<=[.!?:])\s+")


def write_summary_task(source: Path, output: Path, sizes: Mapping[str, int] = SIZES) -> dict[str, int]:
    """Write the data set, of `sizes` pairs; as `splits.write_splits`. Raises `ConfigError` with too few docstrings."""
    return write_splits(output, lambda: _splits(read_rows(source), sizes))


def _pair(row: dict[str, str]) -> dict[str, str] | None:
    """Return the example made of a docstring; None if that is not suitable."""
    target, _, body = row["text"].partition("\n\n")
    source = " ".join(body.split())
    is_line = "\n" not in target.strip() and _MIN_WORDS <= len(_WORD.findall(target)) <= _MAX_WORDS
    if is_line and len(_WORD.findall(source)) >= _MIN_BODY_WORDS and target.lower() not in source.lower():
        return {"id": row["name"], "src": source, "tgt": target.strip()}
    return None


def _splits(rows: Iterable[dict[str, str]], sizes: Mapping[str, int]) -> dict[str, list[dict[str, str]]]:
    """Assign pairs to splits in a pseudo-random, reproducible order, and take the configured numbers."""
    pairs = [(pair, row["package"]) for row in rows if (pair := _pair(row))]
    by_split = defaultdict[str, list[dict[str, str]]](list)
    for pair, package in sorted(pairs, key=lambda item: digest(item[0]["id"] + item[0]["tgt"])):
        by_split[_SPLIT_OF_TENTH[digest(package) % len(_SPLIT_OF_TENTH)]].append(pair)
    known = {key for pair in by_split["train"] for key in _keys(pair)}  # of unused training pairs, too
    for name in HELD_OUT:
        by_split[name] = [pair for pair in by_split[name] if not known & set(_keys(pair))]
    splits = {name: by_split[name][:size] for name, size in sizes.items()}
    raise_if_any(
        [
            f"{name}: only {len(splits[name])} docstrings are suitable, {size} are required"
            for name, size in sizes.items()
            if len(splits[name]) < size
        ]
    )
    return splits


def _keys(pair: dict[str, str]) -> tuple[str, str]:
    """Return the duplicate keys of a pair: the words of the target, and the first words of the source."""
    return "t " + _words(pair["tgt"]), "s " + " ".join(_words(pair["src"]).split()[:_MIN_BODY_WORDS])


def _words(text: str) -> str:
    return " ".join(_WORD.findall(text.lower()))


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
    rows = read_rows(folder / f"{split}.jsonl")
    references = [row["tgt"] for row in rows]
    return {
        name: overlap_scores([summarize(row["src"]) for row in rows], references)
        for name, summarize in BASELINES.items()
    }


def _sentences(source: str) -> Sequence[str]:
    return [sentence for sentence in _SENTENCE.split(source) if _WORD.search(sentence)] or [source]
