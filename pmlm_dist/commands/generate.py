"""`pmlm generate`: generate a target for each source of a file.

file of sources --all ranks--> rows, token ids --sorted by length, sharded over ranks--> generate_batches
hypotheses of all ranks --all-gather--> rank 0 writes OUTPUT, one JSON object per row, in the order of the rows
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch

from pmlm_dist.config import ConfigError, raise_if_any
from pmlm_dist.conversion.pretrained import PretrainedWeights, build_pretrained, find_pretrained, open_pretrained
from pmlm_dist.data.batch import special_ids
from pmlm_dist.decoding.batch_generation import build_search, generate_batches
from pmlm_dist.decoding.beam_search import Hypothesis, ScoresNotFinite
from pmlm_dist.decoding.settings import DecodingConfig, decoding_problems
from pmlm_dist.downstream.rows import read_file
from pmlm_dist.downstream.tasks.inputs import find_column, raise_row_problems, row_id, row_text
from pmlm_dist.downstream.tasks.seq2seq import SOURCES, generation_settings, raise_if_not_seq2seq
from pmlm_dist.files import open_atomically
from pmlm_dist.model.transformer import PseudoMaskedLM
from pmlm_dist.parallel import groups
from pmlm_dist.parallel.groups import Topology
from pmlm_dist.parallel.lease import lease
from pmlm_dist.ranges import Positive, range_problems
from pmlm_dist.vocab import Vocabulary

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class GenerateConfig:
    """Settings of `pmlm generate`."""

    model: Path
    """Folder that `pmlm finetune --task seq2seq` wrote, or one of its checkpoints."""
    input: Path
    """Sources: .jsonl, .csv or .tsv, one row each."""
    output: Path
    """JSONL file to write (`id`, `prediction`, `score`, `ended`); it must not exist. Written atomically."""
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
    """Rows of the input file, their sources [CLS] text [SEP] as token ids, and the model."""

    rows: list[dict[str, Any]]
    sources: list[np.ndarray]
    pretrained: PretrainedWeights


def generate(config: GenerateConfig) -> None:
    """Write a target for every source of a file; the ranks of a launcher share the sources.

    Raises `ConfigError` on every rank; nothing has been written then.
    """
    topology = groups.init_process_groups()
    inputs = groups.run_on_all_ranks(topology, lambda: _read_inputs(config, is_rank_zero=topology.is_rank_zero))
    with lease(config.output, topology, beside=True):
        _generate(config, inputs, topology)


def _generate(config: GenerateConfig, inputs: _Inputs, topology: Topology) -> None:
    start = time.perf_counter()
    hypotheses = _generate_all(config, inputs, topology)
    seconds = time.perf_counter() - start
    _raise_if_without_hypothesis(hypotheses)
    if not topology.is_rank_zero:
        return
    vocabulary = inputs.pretrained.vocabulary
    pairs = enumerate(zip(inputs.rows, hypotheses, strict=True))
    _write_lines(config.output, (_prediction(row, number, best, vocabulary) for number, (row, best) in pairs))
    tokens = sum(len(best[0].tokens) + best[0].ended for best in hypotheses)
    count = len(hypotheses)
    print(f"written: {config.output}, {count:,} predictions, {tokens:,} tokens, {tokens / seconds:.0f} tokens/s")


def _generate_all(config: GenerateConfig, inputs: _Inputs, topology: Topology) -> list[list[Hypothesis]]:
    """Return the hypotheses of all sources, in their order, on every rank."""
    sources, pretrained = inputs.sources, inputs.pretrained
    # Longest first and strided over the ranks: every rank gets sources of all lengths, thus similar work.
    order = sorted(range(len(sources)), key=lambda number: -len(sources[number]))
    own, special = order[topology.rank :: topology.world_size], special_ids(pretrained.vocabulary)

    def generate_own() -> dict[int, list[Hypothesis]]:
        model, search = load_model(pretrained, config.precision), build_search(config.decoding, special)
        own_sources = [sources[number] for number in own]
        try:
            hypotheses = generate_batches(
                model, own_sources, search=search, special=special, batch=config.batch, sample_ids=own
            )
        except ScoresNotFinite as error:
            raise ConfigError([f"{pretrained.facts['folder']}: {error}"]) from error
        return dict(zip(own, hypotheses, strict=True))

    per_rank = topology.all_gather_object(groups.run_on_all_ranks(topology, generate_own))
    merged = {number: hypotheses for part in per_rank for number, hypotheses in part.items()}
    return [merged[number] for number in range(len(sources))]


def load_model(pretrained: PretrainedWeights, precision: Precision) -> PseudoMaskedLM:
    """Build the model on this process' device, in evaluation mode."""
    device = groups.init_process_groups().device
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return build_pretrained(pretrained).to(device=device, dtype=dtype)


# -------------------------------------------------------------------------------------------------------------- inputs


def _read_inputs(config: GenerateConfig, *, is_rank_zero: bool) -> _Inputs:
    """Read model and sources. Raises `ConfigError`."""
    raise_if_any(_problems(config))
    pretrained = open_pretrained(config.model)
    raise_if_not_seq2seq(pretrained.facts["configuration"], pretrained.facts["folder"])
    rows = read_file(config.input)
    raise_if_any([] if rows else [f"--input ({config.input}) is empty"])
    return _Inputs(rows, _sources(config, rows, pretrained, is_rank_zero=is_rank_zero), pretrained)


def _problems(config: GenerateConfig) -> list[str]:
    problems = decoding_problems(config.decoding)
    problems += range_problems(replace(config, decoding=DecodingConfig()), prefix="--")  # decoding: checked above
    if config.output.exists():
        problems.append(f"--output ({config.output}) exists already, and nothing is overwritten: name another")
    elif not _is_writable(config.output.parent):
        problems.append(f"--output ({config.output}) cannot be written: {config.output.parent} cannot be a folder")
    if not config.input.is_file():
        problems.append(f"--input ({config.input}): no such file")
    return problems


def _is_writable(folder: Path) -> bool:
    """Return True if `folder` exists or can be created; checked first, because generation may take hours."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return existing.is_dir() and os.access(existing, os.W_OK)


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


# -------------------------------------------------------------------------------------------------------------- output


def _raise_if_without_hypothesis(hypotheses: list[list[Hypothesis]]) -> None:
    """Raise `ConfigError` for rows without a hypothesis: the decoding rules exclude the whole vocabulary."""
    raise_row_problems(
        [
            f"row {number}: --no-repeat-ngram, --min-length and the vocabulary allow no target; relax them"
            for number, best_first in enumerate(hypotheses, start=1)
            if not best_first
        ]
    )


def _prediction(
    row: dict[str, Any], number: int, hypotheses: list[Hypothesis], vocabulary: Vocabulary
) -> dict[str, Any]:
    best, *others = [
        {"prediction": vocabulary.decode(h.tokens), "score": h.score, "ended": h.ended} for h in hypotheses
    ]
    return {"id": row_id(row, number), **best, **({"others": others} if others else {})}


def _write_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Write JSONL atomically; an existing file is never replaced. Raises `ConfigError`."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open_atomically(path, replace=False) as out:
            out.writelines((json.dumps(line, ensure_ascii=False) + "\n").encode() for line in lines)
    except FileExistsError as error:
        raise ConfigError([f"--output ({path}) exists already, and nothing is overwritten: name another"]) from error
    except OSError as error:
        raise ConfigError([f"--output ({path}) cannot be written: {error}; no part of it remains"]) from error
