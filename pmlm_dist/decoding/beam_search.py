"""Batched beam search: from the logits of their next tokens to the best hypotheses. Pure functions of tensors.

    start --> Beams --advance(logits)--> Beams --> ... --> all done --> hypotheses

A hypothesis is a list of tokens that ends with the end token or has `max_length` tokens. Its score is
log p(tokens) / lp(n), with n its number of tokens including the end token, and the length penalty of GNMT (Wu et al.,
2016, equation 14): lp(n) = ((5 + n) / 6) ^ alpha.

A step selects the 2K best continuations of a sample. End tokens among the K best of them make finished hypotheses. The
K best continuations without an end token stay live, and a pool keeps the K best finished hypotheses. A sample is done:

    exact    when no live hypothesis can still beat the worst requested one of the pool, even at its most favorable
             length and with probability 1 for all further tokens
    first    when K hypotheses have finished

Scores are log-probabilities over the whole vocabulary. They are not renormalized after the rules forbid tokens.

Legend: B samples, K beams, L tokens so far, M maximum length, V vocabulary, N candidates.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pmlm_dist.decoding.settings import DecodingConfig

_BLOCK_SIZE = 128
_MINUS_INFINITY = float("-inf")


class ScoresNotFinite(ValueError):
    """The model's logits are not finite."""


@dataclass(frozen=True)
class Rules:
    """Settings of a search, and the tokens that they concern."""

    config: DecodingConfig
    end_id: int
    forbidden: tuple[int, ...] = ()
    """Tokens that are never generated."""


@dataclass(frozen=True)
class Hypothesis:
    """A generated sequence."""

    tokens: tuple[int, ...]
    """Without the end token."""
    score: float
    ended: bool
    """True if the end token was generated, False if the maximum length was reached."""


@dataclass(frozen=True)
class Beams:
    """State of a search: live hypotheses and the pool of finished ones, both best first."""

    tokens_BKL: Tensor
    scores_BK: Tensor
    """Log-probabilities of the live hypotheses; minus infinity for an empty beam."""
    parents_BK: Tensor
    """Index of the previous step's hypothesis that each live hypothesis extends."""
    pool_BKM: Tensor
    pool_scores_BK: Tensor
    pool_lengths_BK: Tensor
    done_B: Tensor


@dataclass(frozen=True)
class BeamSearch:
    """The functions `start`, `advance` and `hypotheses` of a search."""

    rules: Rules

    @property
    def beams(self) -> int:
        """K: number of live hypotheses of a sample."""
        return self.rules.config.beam

    def start(self, batch: int, *, device: torch.device | str = "cpu") -> Beams:
        """Initial state: one empty hypothesis for each sample."""
        integers = {"dtype": torch.long, "device": device}
        return Beams(
            tokens_BKL=torch.zeros(batch, 1, 0, **integers),
            scores_BK=torch.zeros(batch, 1, device=device),
            parents_BK=torch.zeros(batch, 1, **integers),
            pool_BKM=torch.zeros(batch, self.beams, self.rules.config.max_length, **integers),
            pool_scores_BK=torch.full((batch, self.beams), _MINUS_INFINITY, device=device),
            pool_lengths_BK=torch.zeros(batch, self.beams, **integers),
            done_B=torch.zeros(batch, dtype=torch.bool, device=device),
        )

    def advance(self, beams: Beams, logits_BKV: Tensor) -> Beams:
        """Extend all hypotheses by one token. Raises `ScoresNotFinite` for logits with NaN or positive infinity."""
        rules, length = self.rules, beams.tokens_BKL.shape[2] + 1
        scores_BKV = log_probabilities(logits_BKV, add_BK=beams.scores_BK.to(_precise(logits_BKV)))
        mask_forbidden(scores_BKV, beams.tokens_BKL, rules)
        # 2K candidates: at most K of them are ends (one per beam), so K hypotheses can always stay live.
        best_BN, index_BN = blockwise_topk(scores_BKV.flatten(1), count=2 * self.beams)
        raise_if_nan(best_BN)
        parents_BN, tokens_BN = index_BN // scores_BKV.shape[2], index_BN % scores_BKV.shape[2]
        tokens_BNL = torch.cat([_take(beams.tokens_BKL, parents_BN), tokens_BN[..., None]], dim=2)
        is_end_BN = tokens_BN == rules.end_id
        rank_N = torch.arange(2 * self.beams, device=best_BN.device)
        live_BK = (rank_N + is_end_BN * len(rank_N)).argsort(dim=1)[:, : self.beams]  # ends last, else best first
        # An end below rank K is dropped: K better continuations exist, so it would not be in a beam of size K.
        finishes_BN = is_end_BN & (rank_N < self.beams)
        if length == rules.config.max_length:
            finishes_BN |= torch.zeros_like(is_end_BN).scatter_(1, live_BK, value=True)
        finished_BN = best_BN.masked_fill(~finishes_BN | beams.done_B[:, None], _MINUS_INFINITY) / self.penalty(length)
        advanced = replace(
            self._pooled(beams, finished_BN, tokens_BNL),
            tokens_BKL=_take(tokens_BNL, live_BK),
            scores_BK=best_BN.gather(1, live_BK).masked_fill(is_end_BN.gather(1, live_BK), _MINUS_INFINITY),
            parents_BK=parents_BN.gather(1, live_BK),
        )
        return replace(advanced, done_B=beams.done_B | self._is_done(advanced, length))

    def penalty(self, length: int) -> float:
        """Length penalty lp(n) of GNMT."""
        return ((5 + length) / 6) ** self.rules.config.length_penalty

    def _pooled(self, beams: Beams, finished_BN: Tensor, tokens_BNL: Tensor) -> Beams:
        """Merge the newly finished hypotheses into the pool and keep the K best."""
        length = tokens_BNL.shape[2]
        padded_BNM = torch.nn.functional.pad(tokens_BNL, (0, self.rules.config.max_length - length))
        scores = torch.cat([beams.pool_scores_BK.to(finished_BN.dtype), finished_BN], dim=1)
        lengths = torch.cat([beams.pool_lengths_BK, torch.full_like(finished_BN, length, dtype=torch.long)], dim=1)
        kept_BK, index_BK = scores.topk(self.beams, dim=1)
        return replace(
            beams,
            pool_BKM=_take(torch.cat([beams.pool_BKM, padded_BNM], dim=1), index_BK),
            pool_scores_BK=kept_BK,
            pool_lengths_BK=lengths.gather(1, index_BK),
        )

    def _is_done(self, beams: Beams, length: int) -> Tensor:
        config = self.rules.config
        if length == config.max_length:
            return torch.ones_like(beams.done_B)
        if config.stop == "first":
            return (beams.pool_scores_BK > _MINUS_INFINITY).all(dim=1) | (beams.scores_BK == _MINUS_INFINITY).all(dim=1)
        # Log-probabilities are negative and only decrease, so the largest penalty bounds every later score. The penalty
        # is monotonic in the length: its maximum is at the next or at the last length.
        largest = max(self.penalty(length + 1), self.penalty(config.max_length))
        return beams.pool_scores_BK[:, config.num_return_sequences - 1] >= beams.scores_BK.amax(dim=1) / largest

    def hypotheses(self, beams: Beams) -> list[list[Hypothesis]]:
        """The `num_return_sequences` best of each sample, best first; fewer if the rules allow no more."""
        columns = (beams.pool_BKM, beams.pool_scores_BK, beams.pool_lengths_BK)
        return [
            [
                hypothesis_of(tokens[:length], score, end_id=self.rules.end_id)
                for tokens, score, length in list(zip(*sample, strict=True))[: self.rules.config.num_return_sequences]
                if score > _MINUS_INFINITY
            ]
            for sample in zip(*(column.tolist() for column in columns), strict=True)
        ]


def hypothesis_of(tokens: Sequence[int], score: float, *, end_id: int) -> Hypothesis:
    """Build the hypothesis of `tokens`, which may end with the end token."""
    ended = bool(tokens) and tokens[-1] == end_id
    return Hypothesis(tuple(tokens[: len(tokens) - ended]), score, ended)


def log_probabilities(logits_BKV: Tensor, *, add_BK: Tensor) -> Tensor:
    """Log-probabilities of the next tokens plus those of their hypotheses `add_BK`: a new [B, K, V], at least fp32."""
    # Both shifts are combined for each hypothesis first: one pass over the vocabulary instead of two.
    logits_BKV = logits_BKV.to(_precise(logits_BKV))
    return logits_BKV + (add_BK - logits_BKV.logsumexp(dim=2))[..., None]


def mask_forbidden(scores_BKV: Tensor, tokens_BKL: Tensor, rules: Rules) -> None:
    """Set the scores of tokens that must not follow the tokens so far to minus infinity, in place."""
    length = tokens_BKL.shape[2]
    if rules.forbidden:
        scores_BKV[..., torch.tensor(rules.forbidden, device=scores_BKV.device)] = _MINUS_INFINITY
    if length < rules.config.min_length:
        scores_BKV[..., rules.end_id] = _MINUS_INFINITY
    size = rules.config.no_repeat_ngram
    if 0 < size <= length:
        # A token is forbidden if the last size - 1 tokens, followed by it, have occurred before.
        grams_BKWN = tokens_BKL.unfold(2, size, 1)
        prefix_BKN = tokens_BKL[..., length - size + 1 :]
        repeats_BKW = (grams_BKWN[..., :-1] == prefix_BKN[..., None, :]).all(dim=-1)
        limits_BKW = torch.zeros_like(repeats_BKW, dtype=scores_BKV.dtype).masked_fill_(repeats_BKW, _MINUS_INFINITY)
        # A minimum with +inf is a no-op, so one scatter handles all n-grams. A token that ends both kinds of n-grams is
        # still forbidden.
        limits_BKW = limits_BKW.masked_fill(~repeats_BKW, float("inf"))
        scores_BKV.scatter_reduce_(2, grams_BKWN[..., -1], limits_BKW, reduce="amin")


def blockwise_topk(scores_BX: Tensor, *, count: int) -> tuple[Tensor, Tensor]:
    """The `count` best scores and their indices [B, count], best first; filled up with minus infinity.

    Wide rows are first reduced to the `count` blocks with the highest maxima, which contain the `count` best scores.
    One pass of maxima replaces most of the sorting.
    """
    batch, width = scores_BX.shape
    if width > 4 * count * _BLOCK_SIZE:  # below that the blocks to sort are a large part of the row
        missing = -width % _BLOCK_SIZE
        padded_BX = torch.nn.functional.pad(scores_BX, (0, missing), value=_MINUS_INFINITY) if missing else scores_BX
        blocks_BYZ = padded_BX.unflatten(1, (-1, _BLOCK_SIZE))
        _, block_BN = blocks_BYZ.amax(dim=2).topk(count, dim=1)
        selected_BNZ = _take(blocks_BYZ, block_BN)
        best_BN, index_BN = selected_BNZ.flatten(1).topk(count, dim=1)
        return best_BN, block_BN.gather(1, index_BN // _BLOCK_SIZE) * _BLOCK_SIZE + index_BN % _BLOCK_SIZE
    best_BN, index_BN = scores_BX.topk(min(count, width), dim=1)
    missing = count - best_BN.shape[1]
    return (
        torch.cat([best_BN, best_BN.new_full((batch, missing), _MINUS_INFINITY)], dim=1),
        torch.cat([index_BN, index_BN.new_zeros(batch, missing)], dim=1),
    )


def raise_if_nan(best_BN: Tensor) -> None:
    """Raise `ScoresNotFinite` if the best scores contain NaN; `topk` and `amax` rank NaN above all numbers."""
    is_nan_B = best_BN.isnan().any(dim=1)
    if bool(is_nan_B.any()):
        raise ScoresNotFinite(
            f"the scores of {int(is_nan_B.sum())} of {len(is_nan_B)} samples are not finite (NaN): the model's weights "
            "are corrupt or its precision is too low; run `pmlm checkpoint verify`, or decode in fp32"
        )


def _take(values_BKX: Tensor, index_BN: Tensor) -> Tensor:
    """Select rows [B, N, X] of each sample."""
    return values_BKX.gather(1, index_BN[..., None].expand(-1, -1, values_BKX.shape[2]))


def _precise(values: Tensor) -> torch.dtype:
    return torch.promote_types(values.dtype, torch.float32)
