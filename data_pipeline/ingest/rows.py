"""Rows of data files: JSON lines, Parquet, and data sets of the Hugging Face hub.

Rows have a position which does not depend on how a file is divided: a large file is cut at fixed
sizes into spans that are read independently, so that one file of many gigabytes keeps more than one
process busy and still gives the same records.
"""

import importlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

from data_pipeline.ingest.sources import SourceFile
from data_pipeline.records.jsonl import MAX_LINE_BYTES, read_lines
from data_pipeline.records.record import Json

TEXT_FIELDS = ("content", "text", "code")
PARQUET_ROWS = 256  # rows held at a time; The Stack has documents of 1 MB
SPLIT_BYTES = 256 * 2**20  # a larger JSONL or Parquet file is read in spans of about this size

# A row, or the reason and detail of its reject, with its position.
Row = tuple[str, dict[str, Json] | tuple[str, str]]


@dataclass(frozen=True)
class Span:
    """A piece of a data file.

    Attributes:
        start: first byte of a JSONL file; first row group of a Parquet file.
        stop: where the next piece starts. A line belongs to the piece in which it begins.
        row: number of the first row, Parquet only.
        in_bytes: whether start and stop are bytes.
    """

    start: int
    stop: int
    row: int = 0
    in_bytes: bool = True


def line_spans(size: int) -> list[Span | None]:
    """The spans of a file of lines that is not compressed; [None] for a small one."""
    if size <= SPLIT_BYTES:
        return [None]
    starts = range(0, size, SPLIT_BYTES)
    return [Span(start, min(start + SPLIT_BYTES, size)) for start in starts]


def row_group_spans(path: str, size: int) -> list[Span | None]:
    """Consecutive row groups up to `SPLIT_BYTES` of compressed columns each."""
    if size <= SPLIT_BYTES:
        return [None]
    parquet = _import("pyarrow.parquet", "pyarrow", "Parquet files")
    import pyarrow

    try:
        metadata = parquet.read_metadata(path)
    except (OSError, pyarrow.ArrowException):
        return [None]  # a reject, when it is opened again
    spans: list[Span | None] = []
    start = gathered = row = next_row = 0
    for index in range(metadata.num_row_groups):
        group = metadata.row_group(index)
        stored = sum(
            group.column(column).total_compressed_size for column in range(group.num_columns)
        )
        if index > start and gathered + stored > SPLIT_BYTES:
            spans.append(Span(start, index, row, in_bytes=False))
            start, gathered, row = index, 0, next_row
        gathered += stored
        next_row += group.num_rows
    if metadata.num_row_groups > start:
        spans.append(Span(start, metadata.num_row_groups, row, in_bytes=False))
    return spans or [None]


def jsonl_rows(stream: BinaryIO, name: str, span: Span | None = None) -> Iterator[Row]:
    """The rows of a byte stream of JSON lines.

    Raises:
        OSError: the stream cannot be read on.
    """
    lines = read_lines(stream) if span is None else read_lines(stream, span.start, span.stop)
    for offset, line in lines:
        position = f"{name}:byte {offset}"
        if line is None:
            yield position, ("too_large", f"line longer than {MAX_LINE_BYTES} bytes")
            continue
        try:
            # Decoded here, since json.loads would also accept UTF-16. NaN is not JSON, but
            # what pandas writes for a missing value.
            text = line.decode("utf-8-sig" if offset == 0 else "utf-8")
            row = json.loads(text, parse_constant=lambda name: None)
        except UnicodeDecodeError as error:
            yield position, ("utf8", f"byte {offset + error.start}: {error.reason}")
        except RecursionError:
            yield position, ("json", "nested too deeply")
        except ValueError as error:
            yield position, ("json", f"from byte {offset}: {error}")
        else:
            if isinstance(row, dict):
                yield position, row
            else:
                yield position, ("type", f"the line is not an object: {type(row).__name__}")


def parquet_rows(
    source: str | BinaryIO,
    name: str,
    span: Span | None = None,
    columns: Sequence[str] | None = None,
) -> Iterator[Row]:
    """The rows of a Parquet file, given by its path or open for reading and seeking.

    Raises:
        OSError: it cannot be read, or is no Parquet file.
    """
    parquet = _import("pyarrow.parquet", "pyarrow", "Parquet files")
    import pyarrow

    number = 0 if span is None else span.row
    try:
        with parquet.ParquetFile(source) as table:
            groups = None if span is None else range(span.start, span.stop)
            there = (
                None if columns is None else [c for c in columns if c in table.schema_arrow.names]
            )
            for batch in table.iter_batches(PARQUET_ROWS, row_groups=groups, columns=there):
                for index in range(batch.num_rows):
                    position = f"{name}:row {number}"
                    number += 1
                    try:
                        yield position, batch.slice(index, 1).to_pylist()[0]
                    except UnicodeDecodeError as error:
                        yield position, ("utf8", str(error))
    except pyarrow.ArrowException as error:
        raise OSError(f"not a readable Parquet file: {error}") from None


def hub_rows(file: SourceFile) -> Iterator[Row]:
    """The rows of a data set of the hub, or of one saved by `datasets`.

    Raises:
        ValueError: it cannot be had: offline, unknown, no such split.
        OSError: it stops on the way.
    """
    for number, row in enumerate(_load_dataset(file)):
        yield f"{file.name}:row {number}", row


def _load_dataset(file: SourceFile) -> Any:
    """Open a data set of the hub for streaming, or one saved by `datasets`.

    Raises:
        ValueError: it cannot be had: offline, unknown, no such split.
    """
    datasets = _import("datasets", "datasets", "data sets of the Hugging Face hub")
    name, _, split = file.path.partition(":")
    try:
        if os.path.isdir(file.path):
            opened = datasets.load_from_disk(file.path)
            return opened["train"] if isinstance(opened, dict) else opened
        return datasets.load_dataset(name, split=split or "train", streaming=True)
    except Exception as error:  # the hub client raises kinds of many libraries
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{file.path}: no such path here, and the hub data set could not be opened "
            f"({type(error).__name__}: {reason}); check the name, the split and the network"
        ) from None


def _import(module: str, distribution: str, what: str) -> Any:
    """Import an optional library.

    Raises:
        ValueError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ValueError(
            f"reading {what} needs {distribution}: pip install 'megaphi[data]'"
        ) from None


def text_field(position: str, row: dict[str, Json], wanted: str | None) -> str:
    """The name of the text field of a data file, decided by its first row.

    Args:
        position: of the row, for the message.
        row: the first row that is an object.
        wanted: the field asked for; None to take the first of `content`, `text`, `code`.

    Raises:
        ValueError: the row has no such field; the fields that it has are named.
    """
    for field in TEXT_FIELDS if wanted is None else (wanted,):
        if field in row:
            return field
    asked = f"no field {wanted!r}" if wanted else f"none of the fields {', '.join(TEXT_FIELDS)}"
    raise ValueError(
        f"{position}: {asked}; the row has {', '.join(map(repr, row)) or 'no fields'}; "
        "name the field with `text_field`"
    )
