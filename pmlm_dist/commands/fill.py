"""`pmlm fill`: fill the masks of a text.

"text with [MASK] and [MASK:3]" --read_masks--> MaskedText --decoding/infilling.py--> FilledMask per token --> console
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pmlm_dist.config import ConfigError, raise_if_any
from pmlm_dist.conversion.pretrained import load_model, open_pretrained
from pmlm_dist.data.batch import special_ids
from pmlm_dist.decoding.beam_search import ScoresNotFinite
from pmlm_dist.decoding.infilling import FilledMask, fill
from pmlm_dist.downstream.tasks.seq2seq import raise_if_not_seq2seq
from pmlm_dist.json_input import is_unicode
from pmlm_dist.parallel import groups
from pmlm_dist.ranges import Positive, range_problems
from pmlm_dist.vocabulary.vocabulary import Vocabulary

_MASK = re.compile(r"\[MASK(?::(\d{1,9}))?\]")
_MASK_LIKE = re.compile(r"\[\s*MASK\s*(?::[^\]]*)?\]")


@dataclass(frozen=True)
class FillConfig:
    """Settings of `pmlm fill`."""

    model: Path
    """A pre-trained model: a run folder, one of its checkpoints, or the output of `pmlm import`."""
    order: str = "confidence"
    """`ae`: all masks at once; `left`, `right`: one token after the other from that side; `confidence`: the most
    probable token first; or mask numbers, `2,1`: in that order, all tokens of a [MASK:n] at once."""
    alternatives: Annotated[int, Positive] = 5
    """Number of candidate tokens printed per mask token."""
    json: bool = False
    """Print one JSON object instead of text."""


@dataclass(frozen=True)
class MaskedText:
    """Token ids with [CLS] and [SEP], and the positions of each mask's tokens."""

    ids: list[int]
    spans: list[list[int]]


def fill_masks(text: str, /, config: FillConfig) -> None:
    """Print `text` with its masks filled, and the most probable tokens of each mask; rank 0 prints.

    Args:
        text: The text, with [MASK] for one missing token and [MASK:3] for three.
        config: Settings.
    """
    raise_if_any(range_problems(config, prefix="--"))
    pretrained = open_pretrained(config.model)
    raise_if_not_seq2seq(pretrained.facts["configuration"], pretrained.facts["folder"])
    vocabulary = pretrained.vocabulary
    masked = read_masks(text, vocabulary, positions=pretrained.model.max_positions)
    order, model = _parse_order(config.order, len(masked.spans)), load_model(pretrained, "fp32")
    special = special_ids(vocabulary)
    try:
        filled = fill(model, masked.ids, masked.spans, order=order, special=special, shown=config.alternatives)
    except ScoresNotFinite as error:
        raise ConfigError([f"{pretrained.facts['folder']}: {error}"]) from error
    if groups.init_process_groups().is_rank_zero:
        _print(masked, filled, vocabulary, as_json=config.json)


def read_masks(text: str, vocabulary: Vocabulary, *, positions: int) -> MaskedText:
    """Tokenize `text`, with [MASK] for one token and [MASK:n] for n.

    Raises `ConfigError` for a text without masks, a malformed mask, or more tokens than `positions`.
    """
    raise_if_any(_mask_problems(text, positions=positions))
    ids, spans, end = [vocabulary.cls_id], [], 0
    for mask in _MASK.finditer(text):
        length = int(mask[1] or 1)
        ids += vocabulary.encode_batch([text[end : mask.start()]])[0]
        spans.append(list(range(len(ids), len(ids) + length)))
        ids += [vocabulary.mask_id] * length
        end = mask.end()
    raise_if_any([] if spans else [f"there is nothing to fill in {text!r}: put [MASK] for a token, [MASK:3] for three"])
    ids += [*vocabulary.encode_batch([text[end:]])[0], vocabulary.sep_id]
    if len(ids) > positions:
        raise ConfigError([f"the text has {len(ids)} tokens, the model {positions} positions: shorten it"])
    return MaskedText(ids, spans)


def _mask_problems(text: str, *, positions: int) -> list[str]:
    """Check the masks before tokenization: a mask of a billion tokens must not allocate them."""
    problems = [] if is_unicode(text) else ["the text is not UTF-8: no tokenizer accepts it"]
    for candidate in _MASK_LIKE.findall(text):
        mask = _MASK.fullmatch(candidate)
        if mask is None:
            problems.append(f"{candidate} is not a valid mask: put [MASK] for a token, [MASK:3] for three")
        elif not int(mask[1] or 1):
            problems.append(f"{candidate} has no token: use [MASK:1] or more")
        elif int(mask[1] or 1) > positions:
            problems.append(f"{candidate} has more tokens than the model has positions, {positions}: use fewer")
    return problems


def _parse_order(order: str, num_masks: int) -> Any:
    """Return the name of an order, or mask indices from 0. Raises `ConfigError`."""
    if order in ("ae", "left", "right", "confidence"):
        return order
    indices = [int(part) - 1 for part in order.split(",")] if re.fullmatch(r"\d+(,\d+)*", order) else []
    if sorted(indices) != list(range(num_masks)):
        raise ConfigError(
            [f"--order ({order}) must be ae, left, right, confidence, or the numbers 1 to {num_masks} of the masks in "
             "any order"]
        )  # fmt: skip
    return indices


def _print(masked: MaskedText, filled: list[FilledMask], vocabulary: Vocabulary, *, as_json: bool) -> None:
    ids = list(masked.ids)
    for token in filled:
        ids[token.position] = token.choices[0][0]
    text = vocabulary.decode(ids[1:-1])
    mask_numbers = {position: number for number, span in enumerate(masked.spans, start=1) for position in span}
    masks = [
        {
            "mask": mask_numbers[token.position],
            "step": token.step,
            "choices": [{"token": vocabulary.tokens[id], "probability": round(p, 6)} for id, p in token.choices],
        }
        for token in filled
    ]
    if as_json:
        print(json.dumps({"text": text, "masks": masks}, ensure_ascii=False))
        return
    print(text)
    for mask in masks:
        choices = "  ".join(f"{choice['token']} {choice['probability']:.1%}" for choice in mask["choices"])
        print(f"  mask {mask['mask']}, step {mask['step']}: {choices}")
