"""A small source of several kinds of files, and its preparation in this process or on MPI ranks."""

import dataclasses
import gzip
import json
import random
import sys
from pathlib import Path

from pmlm_dist.corpus.prepare.settings import PrepareConfig
from pmlm_dist.corpus.shards import Manifest, ShardReader

BIN = Path(sys.executable).parent
WORDS = ["the", "model", "reads", "masked", "spans", "and", "predicts", "every", "one", "of", "them", "from", "text"]


def texts(count: int = 300) -> list[str]:
    """Return texts of two to sixty words; the last word of each is its number."""
    rng = random.Random(1)
    return [" ".join(rng.choices(WORDS, k=rng.randint(2, 60))) + f" {number}" for number in range(count)]


def write_source(folder: Path) -> Path:
    """Write 300 texts as .jsonl, .txt, .txt.gz; an invalid line, a duplicate, one without tokens, an empty file."""
    documents = texts()
    lines = [json.dumps({"text": text}) for text in documents[:150]]
    (folder / "a.jsonl").write_text("\n".join([*lines, "not json", lines[3], '{"text": "\\u0000"}']))
    (folder / "b.txt").write_text("\n\n".join(documents[150:250]) + "\n\n\n")
    (folder / "c.txt.gz").write_bytes(gzip.compress("\n\n".join(documents[250:]).encode()))
    (folder / "d.txt").touch()
    return folder


def config(source: Path, output: Path, **changes) -> PrepareConfig:
    """Settings for a folder or a file: vocabulary of 150, samples of 32 tokens, 5 shards, units of 3000 bytes."""
    pattern = f"{source}/*" if source.is_dir() else str(source)
    plain = PrepareConfig((pattern,), output, vocabulary_size=150, sequence_length=32, shards=5, unit_bytes=3000)
    return dataclasses.replace(plain, **changes)


def command(config: PrepareConfig, *, ranks: int, program: tuple[str, ...] = ("-m", "pmlm_dist.cli")) -> list[str]:
    """Return the command line that prepares `config` on MPI ranks; `program`: another one with the same arguments."""
    settings = [
        *("--source", *config.source, "--output", str(config.output)),
        *("--vocabulary-size", str(config.vocabulary_size), "--sequence-length", str(config.sequence_length)),
        *("--shards", str(config.shards), "--unit-bytes", str(config.unit_bytes)),
    ]
    launcher = [str(BIN / "mpirun"), "--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-n", str(ranks)]
    return [*launcher, sys.executable, *program, "prepare-corpus", *settings]


def content(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every file, by its path in the folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def samples(folder: Path, split: str) -> list[list[int]]:
    """Return all samples of a split, in order."""
    manifest = Manifest.load(folder)
    readers = [ShardReader(folder, shard, manifest.token_dtype) for shard in manifest.splits[split].shards]
    return [reader[number].tolist() for reader in readers for number in range(len(reader))]
