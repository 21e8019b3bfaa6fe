"""Minimal pairs: two sentences of which a model should find the first more probable.

FOLDER | ZIP | FILE.jsonl --read_pairs--> MinimalPair --scores of both--> accuracy of each paradigm, each term, all

The files are those of BLiMP (Warstadt et al., 2020), or others with the fields `sentence_good` and `sentence_bad`.
"""

import codecs
import zipfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from pmlm_dist.config import ConfigError, raise_if_any
from pmlm_dist.json_input import InvalidJson, is_unicode, parse_json

GOOD, BAD = "sentence_good", "sentence_bad"
TIE = 1e-4
"""Nats below which two scores are equal: fp32 resolves no more in a sum over a sentence."""


@dataclass(frozen=True)
class MinimalPair:
    """Two sentences that differ in one property."""

    paradigm: str
    term: str
    good: str
    bad: str


def read_pairs(source: Path, *, most: int | None = None) -> list[MinimalPair]:
    """Return the pairs at `source`, the first `most` of each paradigm. Raises `ConfigError`."""
    pairs = []
    for name, text in _files(source):
        for number, line in enumerate(text.removeprefix(codecs.BOM_UTF8).split(b"\n"), start=1):
            if not line.strip():
                continue
            pairs.append(_pair(line, name=name, location=f"{source}, {name}, line {number}"))
    raise_if_any([] if pairs else [f"{source} holds no .jsonl file with {GOOD} and {BAD}"])
    return pairs if most is None else first_of_each(pairs, most)


def first_of_each(pairs: Sequence[MinimalPair], most: int) -> list[MinimalPair]:
    """Return the first `most` pairs of each paradigm, in their order."""
    counts: Counter[str] = Counter()
    first = []
    for pair in pairs:
        counts[pair.paradigm] += 1
        if counts[pair.paradigm] <= most:
            first.append(pair)
    return first


def _files(source: Path) -> Iterator[tuple[str, bytes]]:
    """Yield name and contents of every .jsonl file, in the order of the names."""
    try:
        if source.is_dir():
            for path in sorted(source.rglob("*.jsonl")):
                yield path.relative_to(source).as_posix(), path.read_bytes()
        elif source.suffix == ".zip":
            with zipfile.ZipFile(source) as archive:
                # macOS adds a second, binary entry for each file.
                names = [name for name in archive.namelist() if name.endswith(".jsonl") and "__MACOSX" not in name]
                for name in sorted(names):
                    yield name, archive.read(name)
        else:
            yield source.name, source.read_bytes()
    # RuntimeError: encrypted, or compressed by a method that Python lacks.
    except (OSError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        raise ConfigError([f"--data ({source}) cannot be read: {error}"]) from error


def _pair(line: bytes, *, name: str, location: str) -> MinimalPair:
    try:
        row = parse_json(line)
    except InvalidJson as error:
        raise ConfigError([f"{location}: not JSON ({error}): correct or remove it"]) from error
    good, bad = (row.get(GOOD), row.get(BAD)) if isinstance(row, dict) else (None, None)
    if not (_is_text(good) and _is_text(bad)):
        raise ConfigError([f"{location}: it needs the fields {GOOD} and {BAD} with a text each"])
    return MinimalPair(str(row.get("UID") or Path(name).stem), str(row.get("linguistics_term") or "other"), good, bad)


def _is_text(value: Any) -> TypeGuard[str]:
    return isinstance(value, str) and bool(value.strip()) and is_unicode(value)


def accuracies(pairs: Sequence[MinimalPair], differences: Sequence[float]) -> dict[str, Any]:
    """Return the share of pairs whose good sentence scores higher; a tie counts one half.

    `differences`: score of the good sentence minus that of the bad one, in nats.
    """
    won = [0.5 if abs(difference) < TIE else float(difference > 0) for difference in differences]
    by_group: dict[str, dict[str, list[float]]] = {"terms": defaultdict(list), "paradigms": defaultdict(list)}
    for pair, value in zip(pairs, won, strict=True):
        by_group["terms"][pair.term].append(value)
        by_group["paradigms"][pair.paradigm].append(value)
    means = {
        group: {name: sum(values) / len(values) for name, values in sorted(of_group.items())}
        for group, of_group in by_group.items()
    }
    return {"accuracy": sum(won) / len(won), "pairs": len(won), "ties": won.count(0.5), **means}
