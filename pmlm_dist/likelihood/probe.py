"""The accuracy on minimal pairs during training: `--train.probe`.

pairs --a sample of each paradigm--> Probe --at every validation, data-parallel ranks share the texts--> accuracies
"""

import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch

from pmlm_dist.config import ConfigError
from pmlm_dist.likelihood.minimal_pairs import MinimalPair, accuracies, first_of_each, read_pairs
from pmlm_dist.likelihood.scoring import Method, batches_of_texts, score_texts
from pmlm_dist.parallel.groups import Topology
from pmlm_dist.vocabulary.vocabulary import Vocabulary

SLOTS = 8192
"""Slots of a forward pass; a longer text is a pass of its own."""

Check = Callable[[Iterable[list[int]]], Iterable[list[int]]]
"""Passes items on, and may raise between two of them on all ranks: when the run is to stop."""


@dataclass(frozen=True)
class Probe:
    """Minimal pairs, and the token ids of their sentences: the good ones, then the bad ones."""

    pairs: list[MinimalPair]
    texts: list[list[int]]

    @classmethod
    def load(cls, source: Path, vocabulary: Vocabulary, *, most: int, max_tokens: int) -> Self:
        """Read about `most` pairs, equally many of each paradigm. Raises `ConfigError`, also for a text too long."""
        pairs = read_pairs(source)
        sample = first_of_each(pairs, max(1, most // len({pair.paradigm for pair in pairs})))
        texts = vocabulary.encode_batch([pair.good for pair in sample] + [pair.bad for pair in sample])
        longest = max(map(len, texts))
        if longest > max_tokens:
            raise ConfigError(
                [f"train.probe ({source}): a sentence has {longest} tokens, the model takes {max_tokens}: shorten it"]
            )
        return cls(sample, [list(text) for text in texts])

    @torch.no_grad()
    def accuracies(
        self, model: torch.nn.Module, method: Method, vocabulary: Vocabulary, topology: Topology, *, check: Check = iter
    ) -> dict[str, Any]:
        """Return `minimal_pairs.accuracies` by `method`, on every rank; `model` is in evaluation mode."""
        groups = batches_of_texts([len(text) for text in self.texts], method, slots=SLOTS)
        # Equally many passes on every rank: with ZeRO-3 they are collective. The last ones may repeat a group.
        passes = -(-len(groups) // topology.dp)
        own = [groups[(topology.dp_rank + number * topology.dp) % len(groups)] for number in range(passes)]
        scores: dict[int, float] = {}
        for group in check(own):
            of_group = score_texts(
                model, [self.texts[number] for number in group], method=method, vocabulary=vocabulary, slots=sys.maxsize
            )
            scores |= {number: math.fsum(of_text) for number, of_text in zip(group, of_group, strict=True)}
        for of_rank in topology.all_gather_object(scores):
            scores |= of_rank
        count = len(self.pairs)
        return accuracies(self.pairs, [scores[number] - scores[count + number] for number in range(count)])
