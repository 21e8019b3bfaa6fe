"""`pmlm score`: the log-likelihood of every text of a file (likelihood/scoring.py).

file of texts --all ranks--> token ids --sorted by length, in batches, ranks in turn--> log-probabilities of the tokens
                             --rank 0 keeps them in OUTPUT.part (results.py)--> OUTPUT: a JSON object a text
"""

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch

from pmlm_dist.checkpoint.files import sha256_of
from pmlm_dist.checkpoint.manifest import MANIFEST
from pmlm_dist.config import ConfigError, raise_if_any
from pmlm_dist.console import print_safely
from pmlm_dist.conversion.pretrained import Precision, PretrainedWeights, load_model, open_pretrained
from pmlm_dist.downstream.results import ResultsFile, compute_batches, digest_of, open_results
from pmlm_dist.downstream.texts import encode_texts, read_texts
from pmlm_dist.engine.malloc import keep_freed_memory
from pmlm_dist.files import json_line
from pmlm_dist.likelihood.scoring import Method, batches_of_texts, score_texts
from pmlm_dist.parallel import groups
from pmlm_dist.parallel.groups import Topology
from pmlm_dist.ranges import Positive, range_problems
from pmlm_dist.vocabulary.vocabulary import Vocabulary


@dataclass(frozen=True, kw_only=True)
class LikelihoodConfig:
    """What `pmlm score` and `pmlm evaluate --suite` have in common."""

    model: Path
    """A pre-trained model: a run folder, one of its checkpoints, or the output of `pmlm import`."""
    batch_slots: Annotated[int, Positive] = 16_384
    """Slots of a forward pass on a rank; a single text may have more."""
    precision: Precision = "fp32"
    """Data type of weights and activations."""


@dataclass(frozen=True, kw_only=True)
class ScoreConfig(LikelihoodConfig):
    """Settings of `pmlm score`."""

    method: Method = "par"
    """`par`: exact, left to right; for models trained with PAR or AR. `pll`: each token masked alone; `pll-word`: with
    the later pieces of its word; for models trained with AE."""
    output: Path | None = None
    """JSONL file to write, which must not exist yet. None: standard output."""
    column: str | None = None
    """Column of the text. None: text or sentence."""


def score_file(file: Path, /, config: ScoreConfig) -> None:
    """Write the log-likelihood of every text of a file, in nats; the ranks of a launcher share the texts.

    Args:
        file: .txt with a text a line, or .jsonl, .csv or .tsv.
        config: Settings.
    """
    topology = groups.init_process_groups()

    def prepare() -> tuple[PretrainedWeights, list[Any], list[list[int]]]:
        raise_if_any(range_problems(config, prefix="--"))
        ids, texts = read_texts(file, config.column)
        pretrained = open_pretrained(config.model)
        return pretrained, ids, encode_texts(texts, pretrained, origin=str(file))

    pretrained, ids, texts = groups.run_on_all_ranks(topology, prepare)
    output = config.output
    build = partial(likelihood_file, output, config, config.method, pretrained, texts, ids=ids, option="--output")
    with open_results(topology, output, build) as results:
        start, model = time.perf_counter(), load_model(pretrained, config.precision)
        scores = score_on_all_ranks(
            model,
            texts,
            method=config.method,
            vocabulary=pretrained.vocabulary,
            topology=topology,
            slots=config.batch_slots,
            file=results,
        )
        rows = [
            {"id": id, "score": score, "tokens": len(text)} for id, score, text in zip(ids, scores, texts, strict=True)
        ]
        groups.run_on_all_ranks(topology, lambda: results.finish(rows) if results else None)
    if topology.is_rank_zero:
        _report(rows, config, seconds=time.perf_counter() - start)


def likelihood_file(
    path: Path | None,
    config: LikelihoodConfig,
    method: Method,
    pretrained: PretrainedWeights,
    texts: Sequence[Sequence[int]],
    *,
    option: str,
    ids: Sequence[Any] = (),
) -> ResultsFile:
    """Return the file of the log-likelihoods of `texts`, whose batches are those of `score_on_all_ranks`."""
    assert path is not None
    identity = {
        "model": sha256_of(pretrained.facts["folder"] / MANIFEST),
        "texts": digest_of([*ids, *texts]),
        "method": method,
        "batch_slots": config.batch_slots,
        "precision": config.precision,
        "device": groups.init_process_groups().device.type,
    }
    batches = batches_of_texts([len(text) for text in texts], method, slots=config.batch_slots)
    return ResultsFile(path, identity, batches=batches, option=option)


def score_on_all_ranks(
    model: torch.nn.Module,
    texts: Sequence[Sequence[int]],
    *,
    method: Method,
    vocabulary: Vocabulary,
    topology: Topology,
    slots: int,
    file: ResultsFile | None = None,
) -> list[float]:
    """Return the log-likelihood of each text on every rank; the data-parallel ranks share the texts.

    `slots`: of a forward pass on a rank. `file`: rank 0's, whose batches are those of `batches_of_texts`. Raises
    `ConfigError` for likelihoods that are not finite.
    """

    def sums(numbers: Sequence[int]) -> list[float]:
        own = [texts[number] for number in numbers]
        scores = score_texts(model, own, method=method, vocabulary=vocabulary, slots=slots)
        totals = [math.fsum(of_text) for of_text in scores]
        if not all(map(math.isfinite, totals)):
            raise ConfigError(["the model's weights give log-likelihoods that are not finite: use another checkpoint"])
        return totals

    if topology.device.type == "cpu":
        keep_freed_memory()  # every batch allocates the same sizes again
    batches = batches_of_texts([len(text) for text in texts], method, slots=slots)
    return compute_batches(batches, sums, topology, file=file)


def _report(rows: Sequence[dict[str, Any]], config: ScoreConfig, *, seconds: float) -> None:
    tokens = sum(row["tokens"] for row in rows)
    mean = math.fsum(row["score"] for row in rows) / tokens
    if config.output is None:
        sys.stdout.flush()
        sys.stdout.buffer.writelines(map(json_line, rows))
        sys.stdout.flush()
    print_safely(
        f"{config.method}: {len(rows):,} texts, {tokens:,} tokens, {mean:.4f} nats a token, perplexity "
        f"{math.exp(-mean):,.2f}, {tokens / seconds:,.0f} tokens/s",
        to_stderr=True,
    )
