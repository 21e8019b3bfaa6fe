"""Batched beam search: which hypotheses go on, from the scores of their next tokens. Pure: tensors in, tensors out.

    start --> Beams --advance(logits)--> Beams --> ... --> all done --> hypotheses

A hypothesis is a list of tokens that ends with the end token, or has `max_length` tokens. Its score is
log p(tokens) / lp(n), with n its tokens, the end token counted, and the length penalty of GNMT (Wu et al., 2016,
equation 14): lp(n) = ((5 + n) / 6) ^ alpha.

A step looks at the 2K best continuations of a sample. An end among the K best of them makes a finished hypothesis; the
K best that are no ends live on. The K best finished ones are kept in a pool. When a sample is done:

    exact    no live hypothesis can still beat the pool: even at the length that suits it best, and were every further
             token certain, its score would not exceed that of the worst hypothesis that is asked for
    first    as soon as K hypotheses have finished

Scores are log-probabilities of the whole vocabulary; what the rules forbid is left out, its share
is not given to others.

Legend: B samples, K beams, L tokens so far, M longest length, V vocabulary, N candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
from torch import Tensor

_BLOCK = 128
_NEVER = float("-inf")


class ScoresNotFinite(ValueError):
    """A network answered with numbers that are not finite."""


@dataclass(frozen=True)
class Rules:
    """What a hypothesis may look like."""

    end_id: int
    max_length: int
    """Tokens at most, the end token counted."""
    min_length: int = 0
    """Tokens at least, the end token not counted."""
    no_repeat_ngram: int = 0
    """No sequence of so many tokens occurs twice; 0: anything goes."""
    forbidden: tuple[int, ...] = ()
    """Tokens that are never written."""


@dataclass(frozen=True)
class Hypothesis:
    """One answer: its tokens without the end token, its score, and whether it ended by itself."""

    tokens: tuple[int, ...]
    score: float
    ended: bool


@dataclass(frozen=True)
class Beams:
    """A search as it stands: live hypotheses, best first, and the pool of finished ones, best first."""

    tokens_BKL: Tensor
    scores_BK: Tensor
    """Log-probabilities of the live hypotheses; minus infinity: there is none."""
    parents_BK: Tensor
    """The live hypotheses of the step before that these go on from."""
    pool_BKM: Tensor
    pool_scores_BK: Tensor
    pool_lengths_BK: Tensor
    done_B: Tensor

    def keep(self, samples: Tensor) -> Beams:
        """The search for these samples alone (indices)."""
        return Beams(*(getattr(self, field.name)[samples] for field in fields(self)))


@dataclass(frozen=True)
class BeamSearch:
    """How to search; `start` and `advance` are its two functions."""

    rules: Rules
    beams: int
    length_penalty: float = 0.0
    """alpha: 0 compares plain log-probabilities, which favours short hypotheses; more favours longer ones."""
    stop: Literal["exact", "first"] = "exact"
    returned: int = 1
    """Hypotheses that are asked for, at most `beams`."""

    def start(self, batch: int, *, device: torch.device | str = "cpu") -> Beams:
        """One empty hypothesis a sample."""
        whole = {"dtype": torch.long, "device": device}
        return Beams(
            tokens_BKL=torch.zeros(batch, 1, 0, **whole),
            scores_BK=torch.zeros(batch, 1, device=device),
            parents_BK=torch.zeros(batch, 1, **whole),
            pool_BKM=torch.zeros(batch, self.beams, self.rules.max_length, **whole),
            pool_scores_BK=torch.full((batch, self.beams), _NEVER, device=device),
            pool_lengths_BK=torch.zeros(batch, self.beams, **whole),
            done_B=torch.zeros(batch, dtype=torch.bool, device=device),
        )

    def advance(self, beams: Beams, logits_BKV: Tensor) -> Beams:
        """One token more. Raises `ScoresNotFinite` where a logit is NaN (or positive infinity)."""
        rules, length = self.rules, beams.tokens_BKL.shape[2] + 1
        scores_BKV = log_probabilities(logits_BKV, add_BK=beams.scores_BK.to(_precise(logits_BKV)))
        forbid(scores_BKV, beams.tokens_BKL, rules)
        best_BN, index_BN = best_of(scores_BKV.flatten(1), count=2 * self.beams)
        raise_if_nan(best_BN)
        parents_BN, words_BN = index_BN // scores_BKV.shape[2], index_BN % scores_BKV.shape[2]
        tokens_BNL = torch.cat([_taken(beams.tokens_BKL, parents_BN), words_BN[..., None]], dim=2)
        is_end_BN = words_BN == rules.end_id
        rank_N = torch.arange(2 * self.beams, device=best_BN.device)
        live_BK = (rank_N + is_end_BN * len(rank_N)).argsort(dim=1)[:, : self.beams]  # no ends, best first
        finishes_BN = is_end_BN & (rank_N < self.beams)
        if length == rules.max_length:
            finishes_BN |= torch.zeros_like(is_end_BN).scatter_(1, live_BK, value=True)
        finished_BN = best_BN.masked_fill(~finishes_BN | beams.done_B[:, None], _NEVER) / self.penalty(length)
        advanced = replace(
            self._pooled(beams, finished_BN, tokens_BNL),
            tokens_BKL=_taken(tokens_BNL, live_BK),
            scores_BK=best_BN.gather(1, live_BK).masked_fill(is_end_BN.gather(1, live_BK), _NEVER),
            parents_BK=parents_BN.gather(1, live_BK),
        )
        return replace(advanced, done_B=beams.done_B | self._is_done(advanced, length))

    def penalty(self, length: int) -> float:
        """lp(n) of GNMT."""
        return ((5 + length) / 6) ** self.length_penalty

    def _pooled(self, beams: Beams, finished_BN: Tensor, tokens_BNL: Tensor) -> Beams:
        """The pool with the best of the newly finished ones in it."""
        length, room = tokens_BNL.shape[2], self.rules.max_length
        padded_BNM = torch.nn.functional.pad(tokens_BNL, (0, room - length))
        scores = torch.cat([beams.pool_scores_BK.to(finished_BN.dtype), finished_BN], dim=1)
        lengths = torch.cat([beams.pool_lengths_BK, torch.full_like(finished_BN, length, dtype=torch.long)], dim=1)
        kept_BK, index_BK = scores.topk(self.beams, dim=1)
        return replace(
            beams,
            pool_BKM=_taken(torch.cat([beams.pool_BKM, padded_BNM], dim=1), index_BK),
            pool_scores_BK=kept_BK,
            pool_lengths_BK=lengths.gather(1, index_BK),
        )

    def _is_done(self, beams: Beams, length: int) -> Tensor:
        if length == self.rules.max_length:
            return torch.ones_like(beams.done_B)
        if self.stop == "first":
            return (beams.pool_scores_BK > _NEVER).all(dim=1) | (beams.scores_BK == _NEVER).all(dim=1)
        # Log-probabilities are negative: the largest penalty gives the best score.
        largest = max(self.penalty(length + 1), self.penalty(self.rules.max_length))
        return beams.pool_scores_BK[:, self.returned - 1] >= beams.scores_BK.amax(dim=1) / largest

    def hypotheses(self, beams: Beams) -> list[list[Hypothesis]]:
        """The `returned` best of each sample, best first; fewer, or none, where the rules allow no more."""
        columns = (beams.pool_BKM, beams.pool_scores_BK, beams.pool_lengths_BK)
        return [
            [
                hypothesis_of(words[:length], score, end_id=self.rules.end_id)
                for words, score, length in list(zip(*sample, strict=True))[: self.returned]
                if score > _NEVER
            ]
            for sample in zip(*(column.tolist() for column in columns), strict=True)
        ]


def hypothesis_of(tokens: Sequence[int], score: float, *, end_id: int) -> Hypothesis:
    """The hypothesis of `tokens`, with or without the end token."""
    ended = bool(tokens) and tokens[-1] == end_id
    return Hypothesis(tuple(tokens[: len(tokens) - ended]), score, ended)


def log_probabilities(logits_BKV: Tensor, *, add_BK: Tensor) -> Tensor:
    """Log-probabilities of the next tokens, plus what their hypotheses have already: a new [B, K, V], fp32 at least."""
    logits_BKV = logits_BKV.to(_precise(logits_BKV))
    return logits_BKV + (add_BK - logits_BKV.logsumexp(dim=2))[..., None]


def forbid(scores_BKV: Tensor, tokens_BKL: Tensor, rules: Rules) -> None:
    """Set to minus infinity, in place, what must not follow the tokens so far."""
    length = tokens_BKL.shape[2]
    if rules.forbidden:
        scores_BKV[..., torch.tensor(rules.forbidden, device=scores_BKV.device)] = _NEVER
    if length < rules.min_length:
        scores_BKV[..., rules.end_id] = _NEVER
    size = rules.no_repeat_ngram
    if 0 < size <= length:
        grams_BKWN = tokens_BKL.unfold(2, size, 1)
        prefix_BKN = tokens_BKL[..., length - size + 1 :]
        repeats_BKW = (grams_BKWN[..., :-1] == prefix_BKN[..., None, :]).all(dim=-1)
        limits_BKW = torch.zeros_like(repeats_BKW, dtype=scores_BKV.dtype).masked_fill_(repeats_BKW, _NEVER)
        limits_BKW = limits_BKW.masked_fill(~repeats_BKW, float("inf"))
        scores_BKV.scatter_reduce_(2, grams_BKWN[..., -1], limits_BKW, reduce="amin")


def best_of(scores_BX: Tensor, *, count: int) -> tuple[Tensor, Tensor]:
    """The `count` best scores and their indices [B, count], best first; minus infinity where there are fewer.

    Wide rows are first narrowed down to the blocks with the highest maxima: what is among the `count` best of a row
    lies in one of its `count` best blocks. One pass of maxima replaces most of the sorting.
    """
    batch, width = scores_BX.shape
    if width > 4 * count * _BLOCK:
        padded_BX = (
            torch.nn.functional.pad(scores_BX, (0, -width % _BLOCK), value=_NEVER) if width % _BLOCK else scores_BX
        )
        blocks_BYZ = padded_BX.unflatten(1, (-1, _BLOCK))
        _, block_BN = blocks_BYZ.amax(dim=2).topk(count, dim=1)
        narrowed_BNZ = _taken(blocks_BYZ, block_BN)
        best_BN, place_BN = narrowed_BNZ.flatten(1).topk(count, dim=1)
        return best_BN, block_BN.gather(1, place_BN // _BLOCK) * _BLOCK + place_BN % _BLOCK
    best_BN, index_BN = scores_BX.topk(min(count, width), dim=1)
    missing = count - best_BN.shape[1]
    return (
        torch.cat([best_BN, best_BN.new_full((batch, missing), _NEVER)], dim=1),
        torch.cat([index_BN, index_BN.new_zeros(batch, missing)], dim=1),
    )


def raise_if_nan(best_BN: Tensor) -> None:
    """Raise `ScoresNotFinite` if there is a NaN, which counts as the highest of its row."""
    bad_B = best_BN.isnan().any(dim=1)
    if bool(bad_B.any()):
        raise ScoresNotFinite(
            f"the scores of {int(bad_B.sum())} of {len(bad_B)} samples are not finite (NaN): the model's weights are "
            "damaged, or its precision is too low; compare `pmlm checkpoint verify`, or decode in fp32"
        )


def _taken(values_BKX: Tensor, index_BN: Tensor) -> Tensor:
    """Rows [B, N, X] of every sample."""
    return values_BKX.gather(1, index_BN[..., None].expand(-1, -1, values_BKX.shape[2]))


def _precise(values: Tensor) -> torch.dtype:
    return torch.promote_types(values.dtype, torch.float32)
