"""`pmlm evaluate --suite blimp`: pairs of sentences of which the model should find one more probable.

FOLDER | ZIP | FILE.jsonl --> MinimalPair --score both sentences (likelihood.py)--> accuracy of each paradigm, term, all

The files are those of BLiMP (Warstadt et al., 2020), or others with the fields `sentence_good` and `sentence_bad`.
"""

from __future__ import annotations

import codecs
import contextlib
import json
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pmlm_dist.checkpoint.files import MANIFEST, sha256_of
from pmlm_dist.config import ConfigError, raise_if_any
from pmlm_dist.console import print_safely
from pmlm_dist.conversion.pretrained import Precision, PretrainedWeights, load_model, open_pretrained
from pmlm_dist.decoding.scoring import Method, batches_of_texts
from pmlm_dist.downstream.likelihood import score_on_all_ranks
from pmlm_dist.downstream.results import ResultsFile, digest_of, open_results
from pmlm_dist.downstream.tasks.inputs import is_unicode
from pmlm_dist.downstream.texts import encode_texts
from pmlm_dist.files import write_atomically
from pmlm_dist.json_input import InvalidJson, parse_json
from pmlm_dist.parallel import groups
from pmlm_dist.ranges import Positive, range_problems

GOOD, BAD = "sentence_good", "sentence_bad"
SCORES = "scores.json"
TIE = 1e-4
"""Nats below which two scores are equal: fp32 resolves no more in a sum over a sentence."""


@dataclass(frozen=True, kw_only=True)
class SuiteConfig:
    """Settings of `pmlm evaluate --suite`."""

    suite: Literal["blimp"]
    """Fields of the files: those of BLiMP."""
    model: Path
    """A pre-trained model: a run folder, one of its checkpoints, or the output of `pmlm import`."""
    data: Path
    """Folder or .zip of .jsonl files, or one of these, with `sentence_good` and `sentence_bad`; `UID` (the paradigm;
    else the name of the file) and `linguistics_term` group the accuracies."""
    methods: tuple[Method, ...] = ("par", "pll")
    """How sentences are scored: see `pmlm score`."""
    pairs: Annotated[int | None, Positive] = None
    """First pairs of each paradigm. None: all."""
    predictions: Path | None = None
    """Folder for scores.json and pairs-METHOD.jsonl with the scores of all pairs; these must not exist in it yet."""
    batch_slots: Annotated[int, Positive] = 16_384
    """Slots of a forward pass on a rank."""
    precision: Precision = "fp32"
    """Data type of weights and activations."""


@dataclass(frozen=True)
class MinimalPair:
    """Two sentences that differ in one property."""

    paradigm: str
    term: str
    good: str
    bad: str


def read_pairs(source: Path, *, most: int | None = None) -> list[MinimalPair]:
    """Return the pairs at `source`, the first `most` of each paradigm. Raises `ConfigError`."""
    counts: dict[str, int] = defaultdict(int)
    pairs = []
    for name, text in _files(source):
        for number, line in enumerate(text.removeprefix(codecs.BOM_UTF8).split(b"\n"), start=1):
            if not line.strip():
                continue
            pair = _pair(line, name=name, location=f"{source}, {name}, line {number}")
            counts[pair.paradigm] += 1
            if most is None or counts[pair.paradigm] <= most:
                pairs.append(pair)
    raise_if_any([] if pairs else [f"{source} holds no .jsonl file with {GOOD} and {BAD}"])
    return pairs


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
    if not all(isinstance(text, str) and text.strip() and is_unicode(text) for text in (good, bad)):
        raise ConfigError([f"{location}: it needs the fields {GOOD} and {BAD} with a text each"])
    return MinimalPair(str(row.get("UID") or Path(name).stem), str(row.get("linguistics_term") or "other"), good, bad)


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


def evaluate_suite(config: SuiteConfig) -> dict[str, dict[str, Any]]:
    """Score all pairs by each method; rank 0 prints and writes, every rank returns the accuracies by method."""
    topology = groups.init_process_groups()

    def prepare() -> tuple[PretrainedWeights, list[MinimalPair], dict[str, int], list[list[int]]]:
        raise_if_any(range_problems(config, prefix="--"))
        pairs, pretrained = read_pairs(config.data, most=config.pairs), open_pretrained(config.model)
        # Many sentences stand in several pairs.
        number_of: dict[str, int] = {}
        for pair in pairs:
            for sentence in (pair.good, pair.bad):
                number_of.setdefault(sentence, len(number_of))
        return pretrained, pairs, number_of, encode_texts(list(number_of), pretrained, origin=str(config.data))

    pretrained, pairs, number_of, texts = groups.run_on_all_ranks(topology, prepare)
    folder, results, rows = config.predictions, {}, {}
    with contextlib.ExitStack() as stack:
        files: dict[Method, ResultsFile | None] = {}
        for method in dict.fromkeys(config.methods):  # all, before anything is computed
            path = folder / f"pairs-{method}.jsonl" if folder else None
            build = partial(_file, path, method, config, pretrained, texts)
            files[method] = stack.enter_context(open_results(topology, path, build))
        groups.run_on_all_ranks(topology, lambda: _raise_if_scored(folder, files))
        model = load_model(pretrained, config.precision)
        for method, file in files.items():
            scores = score_on_all_ranks(
                model,
                texts,
                method=method,
                vocabulary=pretrained.vocabulary,
                topology=topology,
                slots=config.batch_slots,
                file=file,
            )
            both = [(scores[number_of[pair.good]], scores[number_of[pair.bad]]) for pair in pairs]
            rows[method] = [
                {**asdict(p), "score_good": g, "score_bad": b} for p, (g, b) in zip(pairs, both, strict=True)
            ]
            results[method] = accuracies(pairs, [good - bad for good, bad in both])
            if topology.is_rank_zero:
                print_safely(_table(method, results[method]))
        groups.run_on_all_ranks(topology, lambda: _write(folder, files, rows, results))
    return results


def _raise_if_scored(folder: Path | None, files: dict[Method, ResultsFile | None]) -> None:
    """Raise ConfigError on rank 0 if `folder` has a scores.json, unless this command was ended while it wrote."""
    mine = [file.is_written for file in files.values() if file]
    if folder and mine and not all(mine) and (folder / SCORES).exists():
        raise ConfigError(
            [f"--predictions: {folder / SCORES} exists already, and nothing is overwritten: name another"]
        )


def _write(folder: Path | None, files: dict[Method, ResultsFile | None], rows: Any, results: Any) -> None:
    own = {method: file for method, file in files.items() if file}
    for method, file in own.items():
        file.write(rows[method])
    if folder and own:
        write_atomically(folder / SCORES, json.dumps(results, indent=2) + "\n")
    for file in own.values():
        file.remove_part()


def _file(
    path: Path | None, method: Method, config: SuiteConfig, pretrained: PretrainedWeights, texts: list[list[int]]
) -> ResultsFile:
    assert path is not None
    identity = {
        "model": sha256_of(pretrained.facts["folder"] / MANIFEST),
        "texts": digest_of(texts),
        "method": method,
        "batch_slots": config.batch_slots,
        "precision": config.precision,
        "device": groups.init_process_groups().device.type,
    }
    batches = batches_of_texts([len(text) for text in texts], method, slots=config.batch_slots)
    return ResultsFile(path, identity, batches=batches, option="--predictions")


def _table(method: Method, result: dict[str, Any]) -> str:
    lines = [f"  {term:32} {accuracy:7.2%}" for term, accuracy in result["terms"].items()]
    total = f"{method}: accuracy {result['accuracy']:.2%} of {result['pairs']:,} pairs ({result['ties']:,} ties)"
    return "\n".join([total, *lines])
