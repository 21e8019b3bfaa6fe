"""The demo's classification task, *which package*: the package that a docstring is from, without its name.

    data/demo/python-docs.jsonl (text, package, name; written by `pmlm prepare-corpus --source python-docs`)
       | the packages with most docstrings      the classes
       | names and aliases of packages          become the word "package", in every text, whichever it is from
       | modules                                go to train, validation or test as a whole
       | 8-word runs                            held-out texts that share a fifth of theirs with training are dropped
    FOLDER/train.jsonl validation.jsonl test.jsonl    {"id", "text", "label"}, as many of each class

Baselines: the class that training has most often (they are balanced), and the class whose most frequent
words, without those frequent in all classes, the text holds most of.

The label is the package, so a package cannot be held out; its modules can. Pre-training reads other docstrings of the
same packages, as text without labels, but none of validation and test (demo_tasks.py, `held-out.jsonl`).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pmlm_dist.config import ConfigError
from pmlm_dist.downstream.tasks import scores

SPLITS = ("train", "validation", "test")
_ALIASES = {
    "numpy": ("np",),
    "pandas": ("pd",),
    "matplotlib": ("plt", "mpl", "pyplot"),
    "networkx": ("nx",),
    "sklearn": ("scikit", "scikits"),
    "torch": ("pytorch",),
    "transformers": ("huggingface",),
}
"""What packages are called besides their names."""
_WORD = re.compile(r"\w+")
_RUN = 8
_SHARED = 0.2
"""Share of a held-out text's 8-word runs that may stand in training texts."""
_TENTHS = (*("train",) * 6, *("validation",) * 2, *("test",) * 2)
_LARGEST_GROUP = 0.1
"""A subpackage with more than this share of its package's docstrings is split by its modules instead."""


@dataclass(frozen=True)
class PackageTaskConfig:
    """How the task is made."""

    source: Path = Path("data/demo/python-docs.jsonl")
    """Docstrings, as `pmlm prepare-corpus --source python-docs` writes them beside its corpus."""
    output: Path = Path("data/demo-tasks/package")
    """Folder to write, which must not be there yet."""
    classes: int = 10
    """Packages: those with most docstrings. An installation with fewer that have enough gives those it has."""
    fewest_classes: int = 4
    """With fewer packages than this there is nothing to tell apart, and the task is refused."""
    train: int = 150
    """Training examples of each class."""
    held_out: int = 50
    """Examples of each class in validation, and as many in test."""


def write_package_task(config: PackageTaskConfig) -> dict[str, int]:
    """Write the data set; how many examples each split has. Raises `ConfigError` where there are too few docstrings."""
    if config.output.exists():
        raise ConfigError([f"--output ({config.output}) is there already, and nothing is overwritten: name another"])
    splits = _package_examples(_read(config.source), config)
    config.output.mkdir(parents=True)
    for name, examples in splits.items():
        lines = (json.dumps(example, ensure_ascii=False) + "\n" for example in examples)
        (config.output / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return {name: len(examples) for name, examples in splits.items()}


def _read(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        raise ConfigError([f"there is no {path}: make it with `pmlm prepare-corpus --source python-docs`"])
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def _package_examples(rows: Sequence[dict[str, str]], config: PackageTaskConfig) -> dict[str, list[dict[str, Any]]]:
    groups = _groups(rows)
    packages = _classes(rows, groups, config)
    own = [row for row in rows if row["package"] in packages]
    masked = _mask(packages)
    by_split: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in sorted(own, key=lambda row: _digest(row["name"] + row["text"])):
        split = _split_of(groups[row["name"]])
        by_split[split].append({"id": row["name"], "text": masked(row["text"]), "label": row["package"]})
    train = _balanced(by_split["train"], packages, each=config.train, split="train")
    known = {run for example in train for run in _runs(example["text"])}
    found = {"train": train}
    for name in SPLITS[1:]:
        new = [example for example in by_split[name] if _share_known(example["text"], known) < _SHARED]
        found[name] = _balanced(new, packages, each=config.held_out, split=name)
    return found


def _classes(rows: Sequence[dict[str, str]], groups: dict[str, str], config: PackageTaskConfig) -> list[str]:
    """The packages with most docstrings that have enough of them in every split, twice what is held out."""
    counts = Counter(row["package"] for row in rows)
    in_split = Counter((row["package"], _split_of(groups[row["name"]])) for row in rows)
    wanted = {"train": config.train, "validation": 2 * config.held_out, "test": 2 * config.held_out}
    fit = [name for name in counts if all(in_split[name, split] >= number for split, number in wanted.items())]
    if len(fit) < min(config.classes, config.fewest_classes):
        needed = f"{config.train} for training and {2 * config.held_out} for each other split"
        raise ConfigError(
            [f"{len(fit)} packages have enough docstrings ({needed}), {config.fewest_classes} are wanted: install more"]
        )
    return sorted(fit, key=lambda name: (-counts[name], name))[: config.classes]


def _groups(rows: Iterable[dict[str, str]]) -> dict[str, str]:
    """For each dotted name what is never cut apart: its subpackage, or for a large one the module in it."""
    rows = list(rows)
    per_package = Counter(row["package"] for row in rows)
    per_group = Counter(_parts(row["name"], 2) for row in rows)
    found = {}
    for row in rows:
        group = _parts(row["name"], 2)
        is_large = per_group[group] > _LARGEST_GROUP * per_package[row["package"]]
        found[row["name"]] = _parts(row["name"], 3) if is_large else group
    return found


def _parts(name: str, count: int) -> str:
    return ".".join(name.split(".")[:count])


def _split_of(group: str) -> str:
    """Six of ten groups are for training, two each for validation and test."""
    return _TENTHS[_digest(group) % 10]


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _mask(packages: Sequence[str]) -> Any:
    """A function that writes "package" for every word with a package's name in it, and for its aliases."""
    names = "|".join(re.escape(name) for name in packages)
    aliases = "|".join(alias for name in packages for alias in _ALIASES.get(name, ())) or names
    pattern = re.compile(rf"\w*(?:{names})\w*|\b(?:{aliases})\b", flags=re.IGNORECASE)
    return lambda text: pattern.sub("package", text)


def _balanced(
    examples: Sequence[dict[str, Any]], packages: Sequence[str], *, each: int, split: str
) -> list[dict[str, Any]]:
    """The first `each` examples of every package."""
    found, counts = [], Counter()
    for example in examples:
        if counts[example["label"]] < each:
            counts[example["label"]] += 1
            found.append(example)
    few = [name for name in packages if counts[name] < each]
    if few:
        raise ConfigError([f"{split}: only {counts[name]} docstrings of {name}, {each} are wanted" for name in few])
    return found


def _runs(text: str) -> Iterator[str]:
    words = _WORD.findall(text.lower())
    return (" ".join(words[at : at + _RUN]) for at in range(max(1, len(words) - _RUN + 1)))


def _share_known(text: str, known: set[str]) -> float:
    runs = list(_runs(text))
    return sum(run in known for run in runs) / len(runs)


# ------------------------------------------------------------------------------------------------------------ baselines

_FREQUENT = 100
"""Words that stand for a class, and words that stand for none because they are frequent everywhere."""


def baseline_scores(folder: Path, split: str = "test") -> dict[str, dict[str, float]]:
    """Accuracy and macro F1 of every baseline on a split that `write_package_task` has written."""
    train, held_out = (_read(folder / f"{name}.jsonl") for name in ("train", split))
    right = [row["label"] for row in held_out]
    majority = Counter(row["label"] for row in train).most_common(1)[0][0]
    said = {"majority class": [majority] * len(right), "frequent words": frequent_words(train, held_out)}
    return {
        name: {"accuracy": scores.accuracy(right, labels), "macro_f1": scores.macro_f1(right, labels)}
        for name, labels in said.items()
    }


def frequent_words(train: Sequence[dict[str, str]], held_out: Sequence[dict[str, str]]) -> list[str]:
    """For each text the class that shares most of its words; ties go to the first in the alphabet."""
    by_class: dict[str, Counter[str]] = defaultdict(Counter)
    for row in train:
        by_class[row["label"]].update(sorted(_words(row["text"])))
    everywhere = {word for word, _ in sum(by_class.values(), Counter()).most_common(_FREQUENT)}
    typical = {
        label: {word for word, _ in counts.most_common(2 * _FREQUENT) if word not in everywhere}
        for label, counts in sorted(by_class.items())
    }
    return [max(typical, key=lambda label: len(typical[label] & _words(row["text"]))) for row in held_out]


def _words(text: str) -> set[str]:
    return set(_WORD.findall(text.lower()))
