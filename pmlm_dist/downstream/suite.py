"""`pmlm evaluate --suite blimp`: pairs of sentences of which the model should find one more probable.

pairs (likelihood/minimal_pairs.py) --distinct sentences, all ranks--> scores --> accuracies; pairs-METHOD.jsonl
"""

import contextlib
import json
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pmlm_dist.config import ConfigError, raise_if_any
from pmlm_dist.console import print_safely
from pmlm_dist.conversion.pretrained import PretrainedWeights, load_model, open_pretrained
from pmlm_dist.downstream.results import ResultsFile, open_results
from pmlm_dist.downstream.score import LikelihoodConfig, likelihood_file, score_on_all_ranks
from pmlm_dist.downstream.texts import encode_texts
from pmlm_dist.files import write_atomically
from pmlm_dist.likelihood.minimal_pairs import MinimalPair, accuracies, read_pairs
from pmlm_dist.likelihood.scoring import Method
from pmlm_dist.parallel import groups
from pmlm_dist.ranges import Positive, range_problems

SCORES = "scores.json"


@dataclass(frozen=True, kw_only=True)
class SuiteConfig(LikelihoodConfig):
    """Settings of `pmlm evaluate --suite`."""

    suite: Literal["blimp"]
    """Fields of the files: those of BLiMP."""
    data: Path
    """Folder or .zip of .jsonl files, or one of these, with `sentence_good` and `sentence_bad`; `UID` (the paradigm;
    else the name of the file) and `linguistics_term` group the accuracies."""
    methods: tuple[Method, ...] = ("par", "pll")
    """How sentences are scored: see `pmlm score`."""
    pairs: Annotated[int | None, Positive] = None
    """First pairs of each paradigm. None: all."""
    predictions: Path | None = None
    """Folder for scores.json and pairs-METHOD.jsonl with the scores of all pairs; these must not exist in it yet."""


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
            build = partial(likelihood_file, path, config, method, pretrained, texts, option="--predictions")
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


def _table(method: Method, result: dict[str, Any]) -> str:
    lines = [f"  {term:32} {accuracy:7.2%}" for term, accuracy in result["terms"].items()]
    total = f"{method}: accuracy {result['accuracy']:.2%} of {result['pairs']:,} pairs ({result['ties']:,} ties)"
    return "\n".join([total, *lines])
