"""Demo classification task, *which package*: predict the package of a docstring, with package names masked.

    data/demo/python-docs.jsonl (text, package, name; written by `pmlm prepare-corpus --source python-docs`)
       | the packages with most docstrings      are the classes
       | names and aliases of packages          are replaced by the word "package" in all texts
       | modules                                are assigned to train, validation or test as a whole
       | 8-word n-grams                         held-out texts that share a fifth of theirs with training are dropped
    FOLDER/train.jsonl validation.jsonl test.jsonl    {"id", "text", "label"}, equally many per class

Baselines: the majority class of training (classes are balanced), and the class that shares most frequent words with the
text, without the words that are frequent in all classes.

The label is the package, so the split is by modules. Pre-training reads other docstrings of the same packages, without
labels, but none of validation and test (demo_tasks.py, `held-out.jsonl`).
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pmlm_dist.config import ConfigError
from pmlm_dist.downstream.demo.splits import HELD_OUT, digest, read_rows, write_splits
from pmlm_dist.downstream.tasks import scores

_ALIASES = {
    "numpy": ("np",),
    "pandas": ("pd",),
    "matplotlib": ("plt", "mpl", "pyplot"),
    "networkx": ("nx",),
    "sklearn": ("scikit", "scikits"),
    "torch": ("pytorch",),
    "transformers": ("huggingface",),
}
"""Other names of packages."""
_WORD = re.compile(r"\w+")
_NGRAM = 8
_MAX_OVERLAP = 0.2
"""Fraction of a held-out text's 8-word n-grams from which on it is too similar to training."""
_SPLIT_OF_TENTH = (*("train",) * 6, *("validation",) * 2, *("test",) * 2)
_MAX_GROUP = 0.1
"""A subpackage with a larger fraction of its package's docstrings is split by its modules."""


@dataclass(frozen=True)
class PackageTaskSize:
    """Size of the data set."""

    classes: int = 10
    """Number of classes: the packages with most docstrings. Fewer if the installation has fewer suitable packages."""
    min_classes: int = 4
    """Minimum number of suitable packages; fewer raise `ConfigError`."""
    train: int = 150
    """Training examples per class."""
    held_out: int = 50
    """Examples per class in validation; equally many in test."""


def write_package_task(source: Path, output: Path, size: PackageTaskSize = PackageTaskSize()) -> dict[str, int]:
    """Write the data set; as `splits.write_splits`. Raises `ConfigError` if there are too few docstrings."""
    return write_splits(output, lambda: _package_examples(read_rows(source), size))


def _package_examples(rows: Sequence[dict[str, str]], size: PackageTaskSize) -> dict[str, list[dict[str, Any]]]:
    groups = _groups(rows)
    packages = _classes(rows, groups, size)
    selected = [row for row in rows if row["package"] in packages]
    mask = _name_masker(packages)
    by_split = defaultdict[str, list[dict[str, Any]]](list)
    for row in sorted(selected, key=lambda row: digest(row["name"] + row["text"])):
        split = _split_of(groups[row["name"]])
        by_split[split].append({"id": row["name"], "text": mask(row["text"]), "label": row["package"]})
    train = _balanced(by_split["train"], packages, each=size.train, split="train")
    known = {ngram for example in train for ngram in _ngrams(example["text"])}
    splits = {"train": train}
    for name in HELD_OUT:
        new = [example for example in by_split[name] if _overlap(example["text"], known) < _MAX_OVERLAP]
        splits[name] = _balanced(new, packages, each=size.held_out, split=name)
    return splits


def _classes(rows: Sequence[dict[str, str]], groups: dict[str, str], size: PackageTaskSize) -> list[str]:
    """Return the packages with most docstrings among those with enough in each split.

    Validation and test need twice `held_out`, because some are dropped for their overlap with training.
    """
    counts = Counter(row["package"] for row in rows)
    in_split = Counter((row["package"], _split_of(groups[row["name"]])) for row in rows)
    required = {"train": size.train, "validation": 2 * size.held_out, "test": 2 * size.held_out}
    suitable = [name for name in counts if all(in_split[name, split] >= number for split, number in required.items())]
    if len(suitable) < min(size.classes, size.min_classes):
        needed = f"{size.train} for training and {2 * size.held_out} for each other split"
        raise ConfigError(
            [f"{len(suitable)} packages have enough docstrings ({needed}), {size.min_classes} are required: "
             "install more"]
        )  # fmt: skip
    return sorted(suitable, key=lambda name: (-counts[name], name))[: size.classes]


def _groups(rows: Iterable[dict[str, str]]) -> dict[str, str]:
    """Map each dotted name to its group, the unit of splitting: its subpackage, or its module if that is large."""
    rows = list(rows)
    per_package = Counter(row["package"] for row in rows)
    per_group = Counter(_parts(row["name"], 2) for row in rows)
    groups = {}
    for row in rows:
        group = _parts(row["name"], 2)
        is_large = per_group[group] > _MAX_GROUP * per_package[row["package"]]
        groups[row["name"]] = _parts(row["name"], 3) if is_large else group
    return groups


def _parts(name: str, count: int) -> str:
    return ".".join(name.split(".")[:count])


def _split_of(group: str) -> str:
    """Return a split by the hash of `group`, which is stable over installations."""
    return _SPLIT_OF_TENTH[digest(group) % 10]


def _name_masker(packages: Sequence[str]) -> Callable[[str], str]:
    """Return a function that replaces words with a package name in them, and aliases, by "package"."""
    names = "|".join(re.escape(name) for name in packages)
    aliases = "|".join(alias for name in packages for alias in _ALIASES.get(name, ())) or names
    pattern = re.compile(rf"\w*(?:{names})\w*|\b(?:{aliases})\b", flags=re.IGNORECASE)
    return lambda text: pattern.sub("package", text)


def _balanced(
    examples: Sequence[dict[str, Any]], packages: Sequence[str], *, each: int, split: str
) -> list[dict[str, Any]]:
    selected, counts = [], Counter()
    for example in examples:
        if counts[example["label"]] < each:
            counts[example["label"]] += 1
            selected.append(example)
    few = [name for name in packages if counts[name] < each]
    if few:
        raise ConfigError([f"{split}: only {counts[name]} docstrings of {name}, {each} are required" for name in few])
    return selected


def _ngrams(text: str) -> Iterator[str]:
    words = _WORD.findall(text.lower())
    return (" ".join(words[at : at + _NGRAM]) for at in range(max(1, len(words) - _NGRAM + 1)))


def _overlap(text: str, known: set[str]) -> float:
    """Return the fraction of the n-grams of `text` in `known`."""
    ngrams = list(_ngrams(text))
    return sum(ngram in known for ngram in ngrams) / len(ngrams)


# ------------------------------------------------------------------------------------------------------------ baselines

_NUM_FREQUENT = 100
"""Number of words excluded because they are frequent in all classes; each class is described by twice as many."""


def baseline_scores(folder: Path, split: str = "test") -> dict[str, dict[str, float]]:
    """Return accuracy and macro F1 of each baseline on a split that `write_package_task` wrote."""
    train, held_out = (read_rows(folder / f"{name}.jsonl") for name in ("train", split))
    labels = [row["label"] for row in held_out]
    majority = Counter(row["label"] for row in train).most_common(1)[0][0]
    predictions = {"majority class": [majority] * len(labels), "frequent words": frequent_words(train, held_out)}
    return {
        name: {"accuracy": scores.accuracy(labels, predicted), "macro_f1": scores.macro_f1(labels, predicted)}
        for name, predicted in predictions.items()
    }


def frequent_words(train: Sequence[dict[str, str]], held_out: Sequence[dict[str, str]]) -> list[str]:
    """Predict for each text the class with most typical words in common; the first in the alphabet for ties."""
    by_class: dict[str, Counter[str]] = defaultdict(Counter)
    for row in train:
        by_class[row["label"]].update(sorted(_words(row["text"])))
    everywhere = {word for word, _ in sum(by_class.values(), Counter()).most_common(_NUM_FREQUENT)}
    typical = {
        label: {word for word, _ in counts.most_common(2 * _NUM_FREQUENT) if word not in everywhere}
        for label, counts in sorted(by_class.items())
    }
    return [max(typical, key=lambda label: len(typical[label] & _words(row["text"]))) for row in held_out]


def _words(text: str) -> set[str]:
    return set(_WORD.findall(text.lower()))
