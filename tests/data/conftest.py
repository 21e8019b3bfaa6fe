"""Fixtures of the data tests."""

from pathlib import Path

import pytest
from support.numbered_corpus import SHARD_SIZES, SPECIAL, write_corpus

from pmlm_dist.config import MaskingConfig
from pmlm_dist.data.loader import BatchSource
from pmlm_dist.data.stream import CorpusSource


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """38 training samples in 8 shards, 7 validation samples in 2."""
    return write_corpus(tmp_path_factory.mktemp("corpus"), dict(SHARD_SIZES))


@pytest.fixture
def source(corpus: Path) -> BatchSource:
    return BatchSource(corpus=CorpusSource(corpus), special=SPECIAL, masking=MaskingConfig(), seed=0)
