"""Raw records of tables: parquet files (extra `parquet`) and data sets of Hugging Face's `datasets`."""

from collections.abc import Iterator
from typing import Any, BinaryIO

from pmlm_dist.config import ConfigError, raise_if_any
from pmlm_dist.corpus.input.records import NO_TEXT, Record, RejectedRecord
from pmlm_dist.corpus.input.sources import open_dataset

_BATCH_ROWS = 256


def open_parquet(source: str, file: BinaryIO) -> Any:
    """Return the `pyarrow.parquet.ParquetFile` of `file`. Raises ConfigError for a corrupt file."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError([f"source {source}: parquet needs pyarrow: pip install 'pmlm_dist[parquet]'"]) from error
    try:
        return pyarrow.parquet.ParquetFile(file)
    except pyarrow.ArrowInvalid as error:
        raise ConfigError([f"source {source} is corrupt: {error}; replace the file or remove it"]) from error


def parquet_rows(source: str, raw: BinaryIO, *, row_group: int, column: str) -> Iterator[tuple[str, Record]]:
    """Yield (location, text) of the rows of a row group. Raises ConfigError unless `column` holds strings."""
    import pyarrow

    file = open_parquet(source, raw)
    _raise_unless_strings(source, column, {field.name: field.type for field in file.schema_arrow})
    row = 0
    for batch in file.iter_batches(batch_size=_BATCH_ROWS, row_groups=[row_group], columns=[column]):
        # As bytes: invalid UTF-8 in a string column is counted like that of any other file.
        for value in batch.column(0).cast(pyarrow.large_binary()).to_pylist():
            yield f"row group {row_group}, row {row}", _record(value, column=column)
            row += 1


def parquet_values(source: str, raw: BinaryIO, *, row_group: int) -> Iterator[dict[str, list[Any]]]:
    """Yield batches of all columns of a row group: name -> values."""
    for batch in open_parquet(source, raw).iter_batches(batch_size=_BATCH_ROWS, row_groups=[row_group]):
        yield batch.to_pydict()


def dataset_rows(source: str, *, start: int, stop: int, column: str) -> Iterator[tuple[str, Record]]:
    """Yield (location, text) of the rows [start, stop). Raises ConfigError unless `column` holds strings."""
    data = open_dataset(source)
    _raise_unless_strings(source, column, {name: getattr(kind, "dtype", "") for name, kind in data.features.items()})
    texts = data.select_columns([column])
    for first in range(start, stop, _BATCH_ROWS):
        values = texts[first : min(first + _BATCH_ROWS, stop)][column]
        for row, value in enumerate(values, start=first):
            yield f"row {row}", _record(value if value is None else value.encode(), column=column)


def _raise_unless_strings(source: str, column: str, types: dict[str, Any]) -> None:
    if column not in types:
        raise_if_any([f"source {source} has no column {column!r}: set --text-field to one of {list(types)}"])
    kind = str(types[column])
    if kind not in ("string", "large_string"):
        raise_if_any([f"source {source}: column {column!r} holds {kind}, not strings: set --text-field to another"])


def _record(value: bytes | None, *, column: str) -> Record:
    return RejectedRecord(NO_TEXT, f": no value in {column!r}") if value is None else value
