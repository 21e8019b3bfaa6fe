"""Decoding settings of `pmlm generate` and of fine-tuning's evaluations. Standard library only."""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from pmlm_dist.ranges import NotNegative, Positive, Range, range_problems

_Finite = Range("be a finite number", math.isfinite)
_Temperature = Range("be positive and finite; for the likeliest: --method greedy", lambda value: 0 < value < math.inf)
_TopP = Range("lie above 0 and at most 1", lambda value: 0 < value <= 1)


@dataclass(frozen=True)
class DecodingConfig:
    """Search for the best sequences, or sampling."""

    method: Literal["beam", "greedy", "sample"] = "beam"
    """`beam`: beam search; `greedy`: the most likely token in each step; `sample`: a drawn token."""
    beam: Annotated[int, Positive] = 5
    """Number of live hypotheses of a sample (beam)."""
    length_penalty: Annotated[float, _Finite] = 0.7
    """alpha in score = log p / ((5 + length) / 6) ^ alpha (beam); larger values favor longer sequences."""
    max_length: Annotated[int, Positive] = 48
    """Maximum number of tokens of a sequence, including its end token."""
    min_length: Annotated[int, NotNegative] = 1
    """Minimum number of tokens of a sequence, excluding its end token."""
    no_repeat_ngram: Annotated[int, NotNegative] = 3
    """Size of n-grams that may occur only once in a sequence; 0: no limit."""
    stop: Literal["exact", "first"] = "exact"
    """`exact`: search until no better sequence is possible; `first`: until `beam` hypotheses have ended (beam)."""
    num_return_sequences: Annotated[int, Positive] = 1
    """Number of sequences to return for each source, best first (beam)."""
    temperature: Annotated[float, _Temperature] = 1.0
    """Divisor of the logits before drawing (sample)."""
    top_k: Annotated[int, NotNegative] = 0
    """Number of most likely tokens to draw from; 0: all (sample)."""
    top_p: Annotated[float, _TopP] = 1.0
    """Probability of the set of most likely tokens to draw from (sample)."""
    seed: Annotated[int, NotNegative] = 0
    """Seed of the draws (sample)."""


def decoding_problems(config: DecodingConfig) -> list[str]:
    """Problems of `config` by itself, one sentence each."""
    problems = range_problems(config, prefix="decoding.")
    if config.min_length >= config.max_length:
        problems.append(
            f"decoding.min_length ({config.min_length}) must be below decoding.max_length ({config.max_length})"
        )
    if config.num_return_sequences > (config.beam if config.method == "beam" else 1):
        problems.append(
            f"decoding.num_return_sequences ({config.num_return_sequences}) needs --method beam and at "
            "least as many beams"
        )
    return problems
