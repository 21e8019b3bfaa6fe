"""`pmlm generate` and `pmlm fill`: a model's answers to a file of sources, and what it puts into a text's masks."""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from pmlm_dist.config import ConfigError, raise_if_any
from pmlm_dist.conversion.pretrained import PretrainedWeights, build_pretrained, find_pretrained, open_pretrained
from pmlm_dist.data.batch import special_ids
from pmlm_dist.decoding.batch_generation import build_search, generate_batches
from pmlm_dist.decoding.beam_search import Hypothesis, ScoresNotFinite
from pmlm_dist.decoding.infilling import FilledMask, fill
from pmlm_dist.decoding.settings import DecodingConfig, decoding_problems
from pmlm_dist.downstream.rows import read_file
from pmlm_dist.downstream.tasks.inputs import column, id_of, is_unicode, raise_row_problems, text_of
from pmlm_dist.downstream.tasks.seq2seq import SOURCES, generation_of, raise_if_not_seq2seq, text_of_hypothesis
from pmlm_dist.model.transformer import PseudoMaskedLM
from pmlm_dist.parallel import groups
from pmlm_dist.parallel.groups import Topology
from pmlm_dist.vocab import Vocabulary

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class GenerateConfig:
    """Answers to a file of sources."""

    model: Path
    """What `pmlm finetune --task seq2seq` wrote, or one of its checkpoints."""
    input: Path
    """Sources: .jsonl, .csv or .tsv, a row each."""
    output: Path
    """JSONL file to write, which must not be there yet: `id`, `prediction`, `score`; it appears when it is whole."""
    column: str | None = None
    """Column of the source. None: src, source or text."""
    too_long: Literal["refuse", "truncate"] = "refuse"
    """What happens to a source that is longer than the model was fine-tuned for: an error, or it loses its end."""
    batch: int = 16
    """Sources at a time."""
    precision: Precision = "fp32"
    """Of weights and activations."""
    vocabulary: Path | None = None
    """Where the model's vocabulary lies. None: in its folder, or in the corpus of its run."""
    decoding: DecodingConfig = field(default_factory=DecodingConfig)


def saved_decoding(model: str, *, vocabulary: str | None = None) -> DecodingConfig:
    """How the model at `model` was decoded when it was fine-tuned; the defaults where it was not."""
    found = find_pretrained(Path(model), vocabulary=Path(vocabulary) if vocabulary else None)
    saved = found.state["configuration"].get("task")
    return generation_of(saved["settings"]).decoding if _writes(saved) else DecodingConfig()


@dataclass(frozen=True)
class _Asked:
    """What is to be answered, and by which model."""

    rows: list[dict[str, Any]]
    sources: list[np.ndarray]
    pretrained: PretrainedWeights


def generate(config: GenerateConfig) -> None:
    """Write an answer to every source of a file; with a launcher's ranks each answers its part of them.

    Raises `ConfigError` on every rank, and has written nothing then.
    """
    topology = groups.init_process_groups()
    asked = groups.run_on_all_ranks(topology, lambda: _asked(config, speaks=topology.is_rank_zero))
    start = time.perf_counter()
    answers = _answers(config, asked, topology)
    seconds = time.perf_counter() - start
    _refuse_unanswered(answers)
    if not topology.is_rank_zero:
        return
    vocabulary = asked.pretrained.vocabulary
    pairs = enumerate(zip(asked.rows, answers, strict=True))
    _write_lines(config.output, (_line(row, number, of, vocabulary) for number, (row, of) in pairs))
    tokens = sum(len(of[0].tokens) + of[0].ended for of in answers)
    print(f"written: {config.output}, {len(answers):,} answers, {tokens:,} tokens, {tokens / seconds:.0f} tokens/s")


def _answers(config: GenerateConfig, asked: _Asked, topology: Topology) -> list[list[Hypothesis]]:
    """Answers to all sources, in their order, on every rank; each has written every so manieth, the longest first."""
    sources, pretrained = asked.sources, asked.pretrained
    order = sorted(range(len(sources)), key=lambda number: -len(sources[number]))
    own, special = order[topology.rank :: topology.world_size], special_ids(pretrained.vocabulary)

    def answer() -> dict[int, list[Hypothesis]]:
        model, search = _running(pretrained, config.precision), build_search(config.decoding, special)
        mine = [sources[number] for number in own]
        try:
            found = generate_batches(model, mine, search=search, special=special, batch=config.batch, sample_ids=own)
        except ScoresNotFinite as error:
            raise ConfigError([f"{pretrained.facts['folder']}: {error}"]) from error
        return dict(zip(own, found, strict=True))

    by_number = {
        n: of
        for part in topology.all_gather_object(groups.run_on_all_ranks(topology, answer))
        for n, of in part.items()
    }
    return [by_number[number] for number in range(len(sources))]


def _asked(config: GenerateConfig, *, speaks: bool) -> _Asked:
    """Read model and sources. Raises `ConfigError`."""
    problems = decoding_problems(config.decoding)
    if config.batch < 1:
        problems.append(f"--batch ({config.batch}) must be positive")
    if config.output.exists():
        problems.append(f"--output ({config.output}) is there already, and nothing is overwritten: name another")
    elif not _can_hold(config.output.parent):
        problems.append(f"--output ({config.output}) cannot be written: {config.output.parent} cannot be a folder")
    if not config.input.is_file():
        problems.append(f"--input ({config.input}): no such file")
    raise_if_any(problems)
    pretrained = open_pretrained(config.model, vocabulary=config.vocabulary)
    raise_if_not_seq2seq(pretrained.facts["configuration"], pretrained.facts["folder"])
    rows = read_file(config.input)
    raise_if_any([] if rows else [f"--input ({config.input}) is empty"])
    return _Asked(rows, _sources(config, rows, pretrained, speaks=speaks), pretrained)


def _can_hold(folder: Path) -> bool:
    """Whether `folder` is one, or can be made: better known before hours of writing."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return there.is_dir() and os.access(there, os.W_OK)


def _writes(saved: Any) -> bool:
    return isinstance(saved, dict) and saved.get("kind") == "seq2seq"


def _sources(
    config: GenerateConfig, rows: list[dict[str, Any]], pretrained: PretrainedWeights, *, speaks: bool
) -> list[np.ndarray]:
    """[CLS] source [SEP] of every row, none longer than the model and its answers leave room for."""
    name, problems = column(rows, config.column, SOURCES, what="column", origin=f"--input {config.input}"), []
    texts = [text_of(row, name, where=f"row {n}", problems=problems) for n, row in enumerate(rows, start=1)]
    raise_row_problems(problems)
    saved, vocabulary = pretrained.facts["configuration"].get("task"), pretrained.vocabulary
    room = pretrained.model.max_positions - config.decoding.max_length
    if _writes(saved):
        room = min(room, generation_of(saved["settings"]).max_source)
    elif speaks:
        print("note: this model was not fine-tuned to write; it goes on as its pre-training has taught it", flush=True)
    if room < 3 or pretrained.model.segment_types < 2:
        raise ConfigError(
            [f"a model of {pretrained.model.max_positions} positions and {pretrained.model.segment_types} segment "
             f"types cannot write answers of {config.decoding.max_length} tokens: lower --max-length, or use another "
             "model"]
        )  # fmt: skip
    words = vocabulary.encode_batch(texts)
    if config.too_long == "refuse":
        raise_row_problems(
            [f"row {n}: its source has {len(w) + 2} tokens, at most {room} fit the model beside an answer of "
             f"{config.decoding.max_length}: --too-long truncate cuts off the end"
             for n, w in enumerate(words, start=1) if len(w) + 2 > room]
        )  # fmt: skip
    return [np.array([vocabulary.cls_id, *w[: room - 2], vocabulary.sep_id], dtype=np.int64) for w in words]


def _running(pretrained: PretrainedWeights, precision: Precision) -> PseudoMaskedLM:
    """The network, ready to answer, on this process' device."""
    device = groups.init_process_groups().device
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return build_pretrained(pretrained).to(device=device, dtype=dtype)


def _refuse_unanswered(answers: list[list[Hypothesis]]) -> None:
    """A vocabulary without an allowed token left: rules that contradict each other."""
    raise_row_problems(
        [
            f"row {number}: --no-repeat-ngram, --min-length and the vocabulary leave no answer; loosen them"
            for number, of in enumerate(answers, start=1)
            if not of
        ]
    )


def _line(row: dict[str, Any], number: int, hypotheses: list[Hypothesis], vocabulary: Vocabulary) -> dict[str, Any]:
    best, *others = [
        {"prediction": text_of_hypothesis(h, vocabulary), "score": h.score, "ended": h.ended} for h in hypotheses
    ]
    return {"id": id_of(row, number), **best, **({"others": others} if others else {})}


def _write_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Write JSONL that appears under its name when it is whole; what is there already is never replaced."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", encoding="utf-8") as out:
            out.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            out.flush()
            os.fsync(out.fileno())
        os.link(temporary, path)  # unlike a rename it fails where something is
    except FileExistsError as error:
        raise ConfigError([f"--output ({path}) is there already, and nothing is overwritten: name another"]) from error
    except OSError as error:
        raise ConfigError([f"--output ({path}) cannot be written: {error}; nothing is left there"]) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


# ------------------------------------------------------------------------------------------------------------ infilling

_MASK = re.compile(r"\[MASK(?::(\d{1,9}))?\]")
_LIKE_A_MASK = re.compile(r"\[\s*MASK\s*(?::[^\]]*)?\]")


@dataclass(frozen=True)
class FillConfig:
    """Words for the masks of a text."""

    model: Path
    """A pre-trained model: a run's folder, one of its checkpoints, or what `pmlm import` wrote."""
    order: str = "confidence"
    """`ae`: all masks at once; `left`, `right`: token after token from there; `confidence`: the surest first; or
    numbers of masks, `2,1`: in that order, all tokens of a [MASK:n] at once."""
    alternatives: int = 5
    """Tokens that are shown of each mask."""
    json: bool = False
    """Print one JSON object instead of lines for people."""
    vocabulary: Path | None = None
    """Where the model's vocabulary lies. None: in its folder, or in the corpus of its run."""


@dataclass(frozen=True)
class MaskedText:
    """Token ids with [CLS] and [SEP], and the positions of each mask's tokens."""

    ids: list[int]
    spans: list[list[int]]


def read_masks(text: str, vocabulary: Vocabulary, *, positions: int) -> MaskedText:
    """`text` with [MASK] for one token and [MASK:n] for n.

    Raises `ConfigError` when there is none, one that is none by a slip, or more tokens than `positions`.
    """
    raise_if_any(_odd_masks(text, positions=positions))
    ids, spans, end = [vocabulary.cls_id], [], 0
    for found in _MASK.finditer(text):
        length = int(found[1] or 1)
        ids += vocabulary.encode_batch([text[end : found.start()]])[0]
        spans.append(list(range(len(ids), len(ids) + length)))
        ids += [vocabulary.mask_id] * length
        end = found.end()
    raise_if_any([] if spans else [f"there is nothing to fill in {text!r}: put [MASK] for a token, [MASK:3] for three"])
    ids += [*vocabulary.encode_batch([text[end:]])[0], vocabulary.sep_id]
    if len(ids) > positions:
        raise ConfigError([f"the text has {len(ids)} tokens, the model {positions} positions: shorten it"])
    return MaskedText(ids, spans)


def _odd_masks(text: str, *, positions: int) -> list[str]:
    """What is wrong with masks by themselves: before as many tokens as they name are laid out."""
    problems = [] if is_unicode(text) else ["the text is not UTF-8: no tokenizer reads it"]
    for like in _LIKE_A_MASK.findall(text):
        found = _MASK.fullmatch(like)
        if found is None:
            problems.append(f"{like} is no mask: put [MASK] for a token, [MASK:3] for three")
        elif not int(found[1] or 1):
            problems.append(f"{like} stands for no token: use [MASK:1] or more")
        elif int(found[1] or 1) > positions:
            problems.append(f"{like} stands for more tokens than the model has positions, {positions}: use fewer")
    return problems


def fill_masks(text: str, /, config: FillConfig) -> None:
    """Print `text` with its masks filled, and the likeliest tokens of each; of a launcher's ranks the first prints.

    Args:
        text: The text, with [MASK] where a token is missing and [MASK:3] where three are.
        config: How to fill it.
    """
    raise_if_any([] if config.alternatives > 0 else [f"--alternatives ({config.alternatives}) must be positive"])
    pretrained = open_pretrained(config.model, vocabulary=config.vocabulary)
    raise_if_not_seq2seq(pretrained.facts["configuration"], pretrained.facts["folder"])
    vocabulary = pretrained.vocabulary
    masked = read_masks(text, vocabulary, positions=pretrained.model.max_positions)
    order, model = _order(config.order, len(masked.spans)), _running(pretrained, "fp32")
    special = special_ids(vocabulary)
    try:
        found = fill(model, masked.ids, masked.spans, order=order, special=special, shown=config.alternatives)
    except ScoresNotFinite as error:
        raise ConfigError([f"{pretrained.facts['folder']}: {error}"]) from error
    if groups.init_process_groups().is_rank_zero:
        _print(masked, found, vocabulary, as_json=config.json)


def _order(wanted: str, spans: int) -> Any:
    if wanted in ("ae", "left", "right", "confidence"):
        return wanted
    numbers = [int(part) - 1 for part in wanted.split(",")] if re.fullmatch(r"\d+(,\d+)*", wanted) else []
    if sorted(numbers) != list(range(spans)):
        raise ConfigError(
            [
                f"--order ({wanted}) must be ae, left, right, confidence, or the numbers 1 to {spans} of the masks in "
                "any order"
            ]
        )
    return numbers


def _print(masked: MaskedText, found: list[FilledMask], vocabulary: Vocabulary, *, as_json: bool) -> None:
    ids = list(masked.ids)
    for guess in found:
        ids[guess.position] = guess.choices[0][0]
    text = vocabulary.decode(ids[1:-1])
    numbers = {place: number for number, span in enumerate(masked.spans, start=1) for place in span}
    masks = [
        {
            "mask": numbers[guess.position],
            "step": guess.step,
            "choices": [{"token": vocabulary.token(id), "probability": round(p, 6)} for id, p in guess.choices],
        }
        for guess in found
    ]
    if as_json:
        print(json.dumps({"text": text, "masks": masks}, ensure_ascii=False))
        return
    print(text)
    for mask in masks:
        choices = "  ".join(f"{choice['token']} {choice['probability']:.1%}" for choice in mask["choices"])
        print(f"  mask {mask['mask']}, step {mask['step']}: {choices}")


# ------------------------------------------------------------------------------------------------------- more positions


def extend_positions(model: Path, /, *, positions: int, output: Path, vocabulary: Path | None = None) -> None:
    """Write a model with more positions, for sources and targets that are longer than what it was trained on.

    Args:
        model: A run's folder, one of its checkpoints, or what `pmlm import` wrote.
        positions: How many it shall have. Those beyond its own begin as copies, from the first on; fine-tuning goes on.
        output: The folder to write, which must not be there yet.
        vocabulary: Where the model's vocabulary lies, if not beside it.
    """
    from pmlm_dist.conversion.pretrained import save_pretrained

    pretrained = open_pretrained(model, vocabulary=vocabulary)
    own = pretrained.model.max_positions
    raise_if_any([] if positions > own else [f"--positions ({positions}) must exceed the model's {own}"])
    name = "embeddings.position.weight"
    rows = torch.arange(positions) % own
    weights = pretrained.weights | {name: pretrained.weights[name][rows]}
    changed = replace(pretrained, model=replace(pretrained.model, max_positions=positions), weights=weights)
    facts = {"format": "lengthened", "from": str(pretrained.facts["folder"]), "notes": [f"{own} positions before"]}
    save_pretrained(replace(changed, facts=facts), output)
    print(f"written: {output}, {positions} positions")
