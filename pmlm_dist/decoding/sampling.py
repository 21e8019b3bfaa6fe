"""One hypothesis a sample: always the likeliest token (greedy), or one drawn. Pure: tensors in, tensors out.

    logits --/ temperature--> the `top_k` likeliest --> of these the likeliest that together have `top_p` --> one drawn

What is drawn for a sample follows from (seed, number of the sample, step) alone, so it does not depend on the batch.

Legend: B samples, L tokens so far, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from pmlm_dist.decoding.beam_search import (
    Hypothesis,
    Rules,
    forbid,
    hypothesis_of,
    log_probabilities,
    raise_if_nan,
)


@dataclass(frozen=True)
class SampledTokens:
    """What was written so far; `uniform_BM` are the numbers in [0, 1) that decide the draws."""

    tokens_B1L: Tensor
    scores_B1: Tensor
    """Log-probability of the tokens up to the end."""
    done_B: Tensor
    uniform_BM: Tensor

    def keep(self, samples: Tensor) -> SampledTokens:
        """Those samples alone (indices)."""
        return SampledTokens(*(getattr(self, field.name)[samples] for field in fields(self)))

    @property
    def tokens_BKL(self) -> Tensor:
        """The hypotheses, one a sample."""
        return self.tokens_B1L

    @property
    def parents_BK(self) -> Tensor:
        """Every hypothesis goes on from itself."""
        return torch.zeros_like(self.scores_B1, dtype=torch.long)


@dataclass(frozen=True)
class Sampling:
    """How to choose; `temperature` 0 is greedy."""

    rules: Rules
    temperature: float = 1.0
    top_k: int = 0
    """Only so many of the likeliest tokens; 0: all."""
    top_p: float = 1.0
    """Only the likeliest tokens that together have this probability, at least one."""
    seed: int = 0

    @property
    def beams(self) -> int:
        """Hypotheses of a sample."""
        return 1

    def start(
        self, batch: int, *, device: torch.device | str = "cpu", numbers: Sequence[int] | None = None
    ) -> SampledTokens:
        """Nothing written yet; `numbers` are those of the samples (None: 0, 1, 2, ...)."""
        numbers = range(batch) if numbers is None else numbers
        uniform = [np.random.default_rng((self.seed, n)).random(self.rules.max_length) for n in numbers]
        return SampledTokens(
            torch.zeros(batch, 1, 0, dtype=torch.long, device=device),
            torch.zeros(batch, 1, device=device),
            torch.zeros(batch, dtype=torch.bool, device=device),
            torch.from_numpy(np.array(uniform)).to(device),
        )

    def advance(self, drawn: SampledTokens, logits_B1V: Tensor) -> SampledTokens:
        """One token more; samples that are done get end tokens. Raises `ScoresNotFinite` where a logit is NaN."""
        length = drawn.tokens_B1L.shape[2] + 1
        scores_B1V = log_probabilities(logits_B1V, add_BK=torch.zeros_like(drawn.scores_B1))
        raise_if_nan(scores_B1V[:, 0].amax(dim=1, keepdim=True))
        log_p_BV = scores_B1V[:, 0].clone() if self.rules.forbidden or self.rules.no_repeat_ngram else scores_B1V[:, 0]
        forbid(scores_B1V, drawn.tokens_B1L, self.rules)
        words_B = self.pick(scores_B1V[:, 0], drawn.uniform_BM[:, length - 1])
        words_B = words_B.masked_fill(drawn.done_B, self.rules.end_id)
        gained_B = log_p_BV.gather(1, words_B[:, None]).masked_fill(drawn.done_B[:, None], 0.0)
        return SampledTokens(
            torch.cat([drawn.tokens_B1L, words_B[:, None, None]], dim=2),
            drawn.scores_B1 + gained_B,
            drawn.done_B | (words_B == self.rules.end_id) | (length == self.rules.max_length),
            drawn.uniform_BM,
        )

    def pick(self, scores_BV: Tensor, uniform_B: Tensor) -> Tensor:
        """A token [B] of each row; where everything is forbidden the end token."""
        none_left_B = scores_BV.amax(dim=1) == float("-inf")
        if self.temperature == 0:
            return scores_BV.argmax(dim=1).masked_fill(none_left_B, self.rules.end_id)
        count = min(self.top_k or scores_BV.shape[1], scores_BV.shape[1])
        best_BN, words_BN = scores_BV.topk(count, dim=1)
        p_BN = (best_BN.double() / self.temperature).softmax(dim=1)
        before_BN = p_BN.cumsum(dim=1) - p_BN
        p_BN = p_BN.masked_fill(before_BN >= self.top_p, 0.0)
        total_BN = p_BN.cumsum(dim=1)
        drawn_B1 = torch.searchsorted(total_BN, uniform_B[:, None].double() * total_BN[:, -1:], right=True)
        last_B1 = (p_BN > 0).sum(dim=1, keepdim=True) - 1  # rounding must not lead beyond what is allowed
        words_B = words_BN.gather(1, torch.minimum(drawn_B1, last_B1.clamp(min=0)))[:, 0]
        return words_B.masked_fill(none_left_B, self.rules.end_id)

    def hypotheses(self, drawn: SampledTokens) -> list[list[Hypothesis]]:
        """The one hypothesis of each sample; its score is its log-probability under the model."""
        end = self.rules.end_id
        answers = []
        for (words,), (score,) in zip(drawn.tokens_B1L.tolist(), drawn.scores_B1.tolist(), strict=True):
            cut = words.index(end) + 1 if end in words else len(words)
            answers.append([hypothesis_of(words[:cut], score, end_id=end)])
        return answers
