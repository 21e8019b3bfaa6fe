"""Random batches and models for tests that need no corpus."""

from dataclasses import replace

import numpy as np
import torch

from pmlm_dist.config import MaskingConfig, ModelConfig
from pmlm_dist.data.batch import Batch, build_batch
from pmlm_dist.masking.blockwise import SpecialIds
from pmlm_dist.model.transformer import PseudoMaskedLM, build_model
from pmlm_dist.parallel import groups, seeding

VOCABULARY = 60
PADDED = 128
SPECIAL = SpecialIds(pad=0, cls=2, sep=3, mask=4, vocab_size=VOCABULARY, special=(0, 1, 2, 3, 4))
MODEL = ModelConfig(
    vocab_size=VOCABULARY,
    hidden_size=32,
    num_layers=3,
    num_heads=4,
    ffn_size=64,
    max_positions=40,
    hidden_dropout=0.0,
    attention_dropout=0.0,
    initializer_range=0.2,
)


def random_batch(
    *,
    batch: int = 3,
    length: int = 24,
    seed: int = 0,
    masking: MaskingConfig | None = None,
    vocabulary: int = VOCABULARY,
) -> Batch:
    """Random samples: the first has `length` tokens, the others are shorter (padding, unused predictions)."""
    random = np.random.default_rng(seed)
    lengths = [length, *random.integers(7, length, size=batch - 1)]
    samples = []
    for n in lengths:
        cut = int(random.integers(2, n - 3))
        words = random.integers(5, vocabulary, size=n)
        words[[0, cut, n - 1]] = SPECIAL.cls, SPECIAL.sep, SPECIAL.sep
        samples.append(words.astype(np.uint16))
    return build_batch(
        samples,
        list(range(batch)),
        [0] * batch,
        sequence_length=length,
        masking=masking or MaskingConfig(rate=0.3),
        special=replace(SPECIAL, vocab_size=vocabulary),
        seed=seed,
    )


def model_of(
    config: ModelConfig = MODEL, *, seed: int = 0, dtype: torch.dtype = torch.float64, **changes
) -> PseudoMaskedLM:
    """A model with random weights and nonzero biases, in double precision by default."""
    groups.init_process_groups()
    seeding.seed_initialization(seed)
    model = build_model(replace(config, **changes), padded_vocab_size=PADDED).to(dtype)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def logits_of(model: PseudoMaskedLM, batch: Batch) -> torch.Tensor:
    """Logits [2, M, B, V] of `batch`."""
    return model(inputs=batch.inputs)
