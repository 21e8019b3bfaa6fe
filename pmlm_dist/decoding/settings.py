"""How answers are searched for: settings of `pmlm generate` and of fine-tuning's evaluations. Standard library only."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class DecodingConfig:
    """How answers are searched for."""

    method: Literal["beam", "greedy", "sample"] = "beam"
    """`beam`: beam search; `greedy`: the likeliest token each time; `sample`: drawn."""
    beam: int = 5
    """Hypotheses of a sample that are followed at a time (beam)."""
    length_penalty: float = 0.7
    """alpha in score = log p / ((5 + length) / 6) ^ alpha (beam); more favours longer answers."""
    max_length: int = 48
    """Tokens of an answer at most, its end counted."""
    min_length: int = 1
    """Tokens of an answer at least, its end not counted."""
    no_repeat_ngram: int = 3
    """No sequence of so many tokens occurs twice in an answer; 0: anything goes."""
    stop: Literal["exact", "first"] = "exact"
    """`exact`: search until nothing better can come; `first`: until `beam` hypotheses have ended (beam)."""
    num_return_sequences: int = 1
    """Answers to each source, best first (beam)."""
    temperature: float = 1.0
    """Scores are divided by it before drawing (sample)."""
    top_k: int = 0
    """Draw among so many of the likeliest tokens; 0: all (sample)."""
    top_p: float = 1.0
    """Draw among the likeliest tokens that together have this probability (sample)."""
    seed: int = 0
    """Seed of the draws (sample)."""


def decoding_problems(config: DecodingConfig) -> list[str]:
    """Everything that is wrong with `config` by itself."""
    found = []
    for name in ("beam", "max_length", "num_return_sequences"):
        if getattr(config, name) < 1:
            found.append(f"decoding.{name} ({getattr(config, name)}) must be positive")
    for name in ("min_length", "no_repeat_ngram", "top_k", "seed"):
        if getattr(config, name) < 0:
            found.append(f"decoding.{name} ({getattr(config, name)}) must not be negative")
    if config.min_length >= config.max_length:
        found.append(
            f"decoding.min_length ({config.min_length}) must be below decoding.max_length ({config.max_length})"
        )
    if not math.isfinite(config.length_penalty):
        found.append(f"decoding.length_penalty ({config.length_penalty}) must be a finite number")
    if not 0 < config.temperature < math.inf:
        found.append(
            f"decoding.temperature ({config.temperature}) must be positive and finite; for the likeliest: "
            "--method greedy"
        )
    if not 0 < config.top_p <= 1:
        found.append(f"decoding.top_p ({config.top_p}) must lie above 0 and at most 1")
    if config.num_return_sequences > (config.beam if config.method == "beam" else 1):
        found.append(
            f"decoding.num_return_sequences ({config.num_return_sequences}) answers need --method beam and at least as many beams"
        )
    return found
