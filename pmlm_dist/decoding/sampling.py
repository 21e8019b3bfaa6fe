"""Greedy decoding and sampling: one hypothesis for each sample. Pure functions of tensors.

    logits --/ temperature--> the `top_k` most likely --> the most likely with total probability `top_p` --> one drawn

The draws of a sample are a function of (seed, sample id, step), so they do not depend on the batch.

Legend: B samples, L tokens so far, M maximum length, V vocabulary, N candidates.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pmlm_dist.decoding.beam_search import (
    Hypothesis,
    Rules,
    hypothesis_of,
    log_probabilities,
    mask_forbidden,
    raise_if_nan,
)


@dataclass(frozen=True)
class SampledTokens:
    """State of a search: the tokens so far. K is 1: each sample has one hypothesis."""

    tokens_BKL: Tensor
    scores_B1: Tensor
    """Log-probability of the tokens up to the end token."""
    done_B: Tensor
    uniform_BM: Tensor
    """Numbers in [0, 1) that decide the draws."""

    @property
    def parents_BK(self) -> Tensor:
        """Every hypothesis extends itself."""
        return torch.zeros_like(self.scores_B1, dtype=torch.long)


@dataclass(frozen=True)
class Sampling:
    """The functions `start`, `advance` and `hypotheses` of greedy decoding and sampling."""

    rules: Rules
    beams = 1
    """Number of hypotheses of a sample."""

    def start(
        self, batch: int, *, device: torch.device | str = "cpu", sample_ids: Sequence[int] | None = None
    ) -> SampledTokens:
        """Initial state: no tokens. `sample_ids` None: 0, 1, 2, ..."""
        sample_ids, config = range(batch) if sample_ids is None else sample_ids, self.rules.config
        # All draws of a sample in advance, by its own generator: the batch around it may shrink from step to step.
        uniform = [np.random.default_rng((config.seed, id)).random(config.max_length) for id in sample_ids]
        return SampledTokens(
            torch.zeros(batch, 1, 0, dtype=torch.long, device=device),
            torch.zeros(batch, 1, device=device),
            torch.zeros(batch, dtype=torch.bool, device=device),
            torch.from_numpy(np.array(uniform)).to(device),
        )

    def advance(self, state: SampledTokens, logits_B1V: Tensor) -> SampledTokens:
        """Extend all hypotheses by one token; done ones by the end token. Raises `ScoresNotFinite` for NaN logits."""
        length, config = state.tokens_BKL.shape[2] + 1, self.rules.config
        scores_B1V = log_probabilities(logits_B1V, add_BK=torch.zeros_like(state.scores_B1))
        raise_if_nan(scores_B1V[:, 0].amax(dim=1, keepdim=True))
        # Scores count log-probabilities before the rules, which `mask_forbidden` overwrites in place.
        log_p_BV = scores_B1V[:, 0].clone() if self.rules.forbidden or config.no_repeat_ngram else scores_B1V[:, 0]
        mask_forbidden(scores_B1V, state.tokens_BKL, self.rules)
        tokens_B = self.pick(scores_B1V[:, 0], state.uniform_BM[:, length - 1])
        tokens_B = tokens_B.masked_fill(state.done_B, self.rules.end_id)
        added_B1 = log_p_BV.gather(1, tokens_B[:, None]).masked_fill(state.done_B[:, None], 0.0)
        return SampledTokens(
            torch.cat([state.tokens_BKL, tokens_B[:, None, None]], dim=2),
            state.scores_B1 + added_B1,
            state.done_B | (tokens_B == self.rules.end_id) | (length == config.max_length),
            state.uniform_BM,
        )

    def pick(self, scores_BV: Tensor, uniform_B: Tensor) -> Tensor:
        """Choose a token [B] in each row; the end token where all are forbidden."""
        config = self.rules.config
        none_left_B = scores_BV.amax(dim=1) == float("-inf")
        if config.method == "greedy":
            return scores_BV.argmax(dim=1).masked_fill(none_left_B, self.rules.end_id)
        count = min(config.top_k or scores_BV.shape[1], scores_BV.shape[1])
        best_BN, tokens_BN = scores_BV.topk(count, dim=1)
        # fp64: in fp32 the cumulative sum over a vocabulary rounds the shares of rare tokens away.
        p_BN = (best_BN.double() / config.temperature).softmax(dim=1)
        # A token stays if those more likely have less than `top_p` together: the first one always does.
        before_BN = p_BN.cumsum(dim=1) - p_BN
        p_BN = p_BN.masked_fill(before_BN >= config.top_p, 0.0)
        total_BN = p_BN.cumsum(dim=1)
        drawn_B1 = torch.searchsorted(total_BN, uniform_B[:, None].double() * total_BN[:, -1:], right=True)
        last_B1 = (p_BN > 0).sum(dim=1, keepdim=True) - 1  # rounding must not select a masked token
        tokens_B = tokens_BN.gather(1, torch.minimum(drawn_B1, last_B1.clamp(min=0)))[:, 0]
        return tokens_B.masked_fill(none_left_B, self.rules.end_id)

    def hypotheses(self, state: SampledTokens) -> list[list[Hypothesis]]:
        """The hypothesis of each sample; its score is its log-probability under the model."""
        hypotheses, end = [], self.rules.end_id
        for (tokens,), (score,) in zip(state.tokens_BKL.tolist(), state.scores_B1.tolist(), strict=True):
            length = tokens.index(end) + 1 if end in tokens else len(tokens)
            hypotheses.append([hypothesis_of(tokens[:length], score, end_id=end)])
        return hypotheses
