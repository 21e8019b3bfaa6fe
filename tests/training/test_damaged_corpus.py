"""A corpus that differs from its manifest raises at the start, or names the shard when it is read."""

import shutil
from pathlib import Path

import pytest
from support.small_runs import run_config, train
from support.worlds import RankFailed, run_world

pytestmark = pytest.mark.distributed


@pytest.fixture
def corpus(small_corpus: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small_corpus, tmp_path / "corpus"))


def error_of(corpus: Path, tmp_path: Path) -> str:
    with pytest.raises(RankFailed) as caught:
        run_world(train, 2, run_config(corpus, tmp_path / "run", steps=30))
    return str(caught.value)


def test_missing_and_truncated_shards_are_all_reported_before_the_first_step(corpus, tmp_path):
    (corpus / "train" / "shard-000002.tar").unlink()
    shard = corpus / "train" / "shard-000005.tar"
    shard.write_bytes(shard.read_bytes()[:-700])
    message = error_of(corpus, tmp_path)
    assert "ConfigError" in message
    assert "shard-000002.tar is missing" in message
    assert f"shard-000005.tar has {shard.stat().st_size} bytes, expected" in message
    assert message.count("rank 1:\n") == 1  # both ranks exit; none waits for the other


def test_flipped_byte_is_reported_by_the_rank_that_reads_it(corpus, tmp_path):
    shard = corpus / "train" / "shard-000003.tar"
    content = bytearray(shard.read_bytes())
    content[700] ^= 1
    shard.write_bytes(bytes(content))
    message = error_of(corpus, tmp_path)
    assert "shard-000003.tar: expected sha256" in message


def test_long_list_of_missing_shards_is_truncated(corpus, tmp_path):
    for shard in (corpus / "train").iterdir():
        shard.unlink()
    message = error_of(corpus, tmp_path)
    assert "and 3 more shards like these" in message
