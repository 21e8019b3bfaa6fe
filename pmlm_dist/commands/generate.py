"""`pmlm generate`: generate a target for each source of a file.

file of sources --all ranks--> rows, token ids --sorted by length, in batches, ranks in turn--> generate_batch
hypotheses --rank 0 keeps them in OUTPUT.part (downstream/results.py)--> OUTPUT: a JSON object a row, in their order
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np

from pmlm_dist.checkpoint.files import sha256_of
from pmlm_dist.checkpoint.manifest import MANIFEST
from pmlm_dist.config import ConfigError, raise_if_any
from pmlm_dist.console import print_safely
from pmlm_dist.conversion.pretrained import Precision, PretrainedWeights, find_pretrained, load_model, open_pretrained
from pmlm_dist.data.batch import special_ids
from pmlm_dist.decoding.batch_generation import batches_by_length, build_search, generate_batch
from pmlm_dist.decoding.beam_search import Hypothesis, ScoresNotFinite
from pmlm_dist.decoding.settings import DecodingConfig, decoding_problems
from pmlm_dist.downstream.results import ResultsFile, compute_batches, digest_of, open_results
from pmlm_dist.downstream.rows import read_file
from pmlm_dist.downstream.tasks.inputs import find_column, raise_row_problems, row_id, row_text
from pmlm_dist.downstream.tasks.seq2seq import SOURCES, generation_settings, raise_if_not_seq2seq
from pmlm_dist.model.transformer import PseudoMaskedLM
from pmlm_dist.parallel import groups
from pmlm_dist.parallel.groups import Topology
from pmlm_dist.ranges import Positive, range_problems
from pmlm_dist.vocabulary.vocabulary import Vocabulary


@dataclass(frozen=True)
class GenerateConfig:
    """Settings of `pmlm generate`."""

    model: Path
    """Folder that `pmlm finetune --task seq2seq` wrote, or one of its checkpoints."""
    input: Path
    """Sources: .jsonl, .csv or .tsv, one row each."""
    output: Path
    """JSONL file to write (`id`, `prediction`, `score`, `ended`); it must not exist. Results are kept in OUTPUT.part
    while they are computed; the same command resumes from it."""
    column: str | None = None
    """Column of the source. None: src, source or text."""
    too_long: Literal["raise", "truncate"] = "raise"
    """Sources longer than in fine-tuning: `raise` an error, or `truncate` their end."""
    batch: Annotated[int, Positive] = 16
    """Sources per batch."""
    precision: Precision = "fp32"
    """Data type of weights and activations."""
    decoding: DecodingConfig = field(default_factory=DecodingConfig)


def saved_decoding(model: str) -> DecodingConfig:
    """Return the decoding settings of the fine-tuning of `model`, or the defaults for a pre-trained model."""
    pretrained = find_pretrained(model)
    task = pretrained.state["configuration"].get("task")
    return generation_settings(task["settings"]).decoding if _is_seq2seq(task) else DecodingConfig()


@dataclass(frozen=True)
class _Inputs:
    """Ids of the rows, their sources [CLS] text [SEP] as token ids in batches, and the model."""

    ids: list[Any]
    sources: list[np.ndarray]
    batches: list[list[int]]
    pretrained: PretrainedWeights
    identity: dict[str, Any]
    """All that determines the results (downstream/results.py)."""


def generate(config: GenerateConfig) -> None:
    """Write a target for every source of a file; the ranks of a launcher share the sources.

    Raises `ConfigError` on every rank; results that were computed are kept, and the same command resumes.
    """
    topology = groups.init_process_groups()
    inputs = groups.run_on_all_ranks(topology, lambda: _read_inputs(config, topology))
    vocabulary, start, computed = inputs.pretrained.vocabulary, time.perf_counter(), []
    special = special_ids(vocabulary)
    search = build_search(config.decoding, special)

    def generate_rows(model: PseudoMaskedLM, rows: Sequence[int]) -> list[dict[str, Any]]:
        sources = [inputs.sources[row] for row in rows]
        try:
            hypotheses = generate_batch(model, sources, search=search, special=special, sample_ids=rows)
        except ScoresNotFinite as error:
            raise ConfigError([f"{inputs.pretrained.facts['folder']}: {error}"]) from error
        computed.extend(len(best[0].tokens) + best[0].ended for best in hypotheses if best)
        return [_prediction(best, vocabulary) for best in hypotheses]

    def results_file() -> ResultsFile:
        return ResultsFile(config.output, inputs.identity, batches=inputs.batches, option="--output")

    with open_results(topology, config.output, results_file) as file:
        model = load_model(inputs.pretrained, config.precision)
        results = compute_batches(inputs.batches, partial(generate_rows, model), topology, file=file)
        seconds, tokens = time.perf_counter() - start, sum(topology.all_gather_object(sum(computed)))
        rows = [{"id": id, **result} for id, result in zip(inputs.ids, results, strict=True)]
        groups.run_on_all_ranks(topology, lambda: file.finish(rows) if file else None)
    if topology.is_rank_zero:
        _print_summary(config, rows, speed=f"{tokens:,} tokens, {tokens / seconds:.0f} tokens/s")


def _print_summary(config: GenerateConfig, rows: list[dict[str, Any]], *, speed: str) -> None:
    without = [str(number) for number, row in enumerate(rows, start=1) if row["prediction"] is None]
    if without:
        shown = ", ".join([*without[:5], *(["..."] if len(without) > 5 else [])])
        print_safely(
            f"note: {len(without):,} rows have no prediction (null): {shown}: --no-repeat-ngram, --min-length and the "
            "vocabulary allow no target; relax them"
        )
    print_safely(f"written: {config.output}, {len(rows):,} predictions, {speed}")


# -------------------------------------------------------------------------------------------------------------- inputs


def _read_inputs(config: GenerateConfig, topology: Topology) -> _Inputs:
    """Read model and sources. Raises `ConfigError`."""
    raise_if_any(_problems(config))
    pretrained = open_pretrained(config.model)
    raise_if_not_seq2seq(pretrained.facts["configuration"], pretrained.facts["folder"])
    rows = read_file(config.input)
    raise_if_any([] if rows else [f"--input ({config.input}) is empty"])
    sources = _sources(config, rows, pretrained, is_rank_zero=topology.is_rank_zero)
    problems: list[str] = []
    ids = [row_id(row, n, location=f"row {n + 1}", problems=problems) for n, row in enumerate(rows)]
    raise_row_problems(problems)
    identity = {
        "model": sha256_of(pretrained.facts["folder"] / MANIFEST),
        "inputs": digest_of([ids, *(source.tolist() for source in sources)]),
        "decoding": asdict(config.decoding),
        "batch": config.batch,
        "precision": config.precision,
        "device": topology.device.type,
    }
    batches = list(batches_by_length([len(source) for source in sources], batch=config.batch))
    return _Inputs(ids, sources, batches, pretrained, identity)


def _problems(config: GenerateConfig) -> list[str]:
    problems = decoding_problems(config.decoding)
    problems += range_problems(replace(config, decoding=DecodingConfig()), prefix="--")  # decoding: checked above
    if not config.input.is_file():
        problems.append(f"--input ({config.input}): no such file")
    return problems


def _is_seq2seq(task: Any) -> bool:
    return isinstance(task, dict) and task.get("kind") == "seq2seq"


def _sources(
    config: GenerateConfig, rows: list[dict[str, Any]], pretrained: PretrainedWeights, *, is_rank_zero: bool
) -> list[np.ndarray]:
    """Return [CLS] source [SEP] of every row; source and target fit the model's positions together."""
    origin, problems = f"--input {config.input}", []
    column = find_column(rows, config.column, SOURCES, role="source", origin=origin, option="--column")
    texts = [row_text(row, column, location=f"row {n}", problems=problems) for n, row in enumerate(rows, start=1)]
    raise_row_problems(problems)
    room = _source_room(config, pretrained, is_rank_zero=is_rank_zero)
    vocabulary = pretrained.vocabulary
    words = vocabulary.encode_batch(texts)
    if config.too_long == "raise":
        raise_row_problems(
            [f"row {n}: its source has {len(w) + 2} tokens, at most {room} fit the model beside a target of "
             f"{config.decoding.max_length}: --too-long truncate removes the end"
             for n, w in enumerate(words, start=1) if len(w) + 2 > room]
        )  # fmt: skip
    return [np.array([vocabulary.cls_id, *w[: room - 2], vocabulary.sep_id], dtype=np.int64) for w in words]


def _source_room(config: GenerateConfig, pretrained: PretrainedWeights, *, is_rank_zero: bool) -> int:
    """Return the maximum length of a source: as in fine-tuning, and with room for a target. Raises `ConfigError`."""
    task, model = pretrained.facts["configuration"].get("task"), pretrained.model
    room = model.max_positions - config.decoding.max_length
    if _is_seq2seq(task):
        room = min(room, generation_settings(task["settings"]).max_source)
    elif is_rank_zero:
        print("note: this model was not fine-tuned for generation; it continues texts as in pre-training", flush=True)
    if room < 3 or model.segment_types < 2:
        raise ConfigError(
            [f"a model of {model.max_positions} positions and {model.segment_types} segment types cannot generate "
             f"{config.decoding.max_length} tokens: lower --max-length, or use another model"]
        )  # fmt: skip
    return room


def _prediction(hypotheses: list[Hypothesis], vocabulary: Vocabulary) -> dict[str, Any]:
    """Return the best hypothesis and the others; None for a row whose rules exclude the whole vocabulary."""
    if not hypotheses:
        return {"prediction": None, "score": None, "ended": False}
    best, *others = [
        {"prediction": vocabulary.decode(h.tokens), "score": h.score, "ended": h.ended} for h in hypotheses
    ]
    return {**best, **({"others": others} if others else {})}
