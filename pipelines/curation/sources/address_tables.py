"""Tables of addresses: CSV, TSV, JSON lines, parquet, or one address a line. Each row gives the line of an address."""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from components.corpora import SourceSpec
from components.text_files import decode_text
from components.types import SampleError
from pipelines.core.errors import Failure, UsageError, first_line, near_miss
from pipelines.core.pictures import is_system_name
from pipelines.core.tables import json_lines, separator_of
from pipelines.corpus import shards
from pipelines.curation.sources import stores
from pipelines.curation.sources.texts import caption_of, check_text_columns, key_of, listed_texts, plain

MARKERS = frozenset({"_SUCCESS", "_metadata", "_common_metadata"})  # files that Spark puts beside its tables
TABLE_SUFFIXES = (".parquet", ".csv", ".tsv", ".jsonl", ".txt")
UNDECODED = re.compile("[\udc80-\udcff]")
"""Bytes that are not UTF-8, as the error handler "surrogateescape" gives them."""


def address_lines(source: SourceSpec, is_sorted: bool = False) -> Iterator[tuple[str, dict[str, Any]]]:
    """(address, line) of the rows of a source's tables; see `_address_line`.

    Raises:
        UsageError: there is no table, or one lacks a column or an address, or has columns that are no texts.
        Failure: a table cannot be read.
    """
    for path, relative, _, _ in stores.list_files(source.path, source.storage, is_sorted):
        name = relative.rpartition("/")[2]
        if name in MARKERS or name.endswith("_stats.json") or any(map(is_system_name, relative.split("/"))):
            continue
        is_empty = True
        for row in _table_rows(path, relative, source):
            url, problem = _address(row, source)
            if not url:
                continue
            is_empty = False
            line = _address_line(url, row, source)
            yield url, line if problem is None else {**line, "refused": problem}
        if is_empty:
            raise UsageError(f'{relative} holds no address in the column "{source.url_column}".')


def _address(row: Mapping[Any, Any], source: SourceSpec) -> tuple[str, tuple[str, str] | None]:
    """The address of a row, "" for none; and (code, detail) of a row that cannot be used."""
    value, extra = row.get(source.url_column), row.get(None)
    if isinstance(value, list | dict):
        detail = f"{_column(source.url_column)} holds a {'list' if isinstance(value, list) else 'mapping'}"
        return ascii(value), ("bad_address", detail)
    try:
        url = plain(_decoded(value, source.url_column), _column(source.url_column)).strip()
    except SampleError as error:
        return ascii(value), (error.code, error.detail)
    if extra and any(cell.strip() for cell in extra):
        return url, (
            "bad_row",
            "its cells do not fit the header: one that holds a separator or a quote needs quotes",
        )
    return url, None


def _address_line(url: str, row: Mapping[str, Any], source: SourceSpec) -> dict[str, Any]:
    """The line of an address: url, key, and where there are any: caption (one text), texts (a caption),
    licence, refused (code, detail)."""
    line: dict[str, Any] = {"url": url, "key": "url-" + hashlib.sha256(url.encode()).hexdigest()[:20]}
    try:
        if source.key_column:
            key = _decoded(row.get(source.key_column), source.key_column)
            line["key"] = key_of(key, _column(source.key_column))
        if source.caption_column:
            text = _decoded(row.get(source.caption_column), source.caption_column)
            if isinstance(text, str) and listed_texts(text) is None:
                line["caption"] = text
            else:
                line["texts"] = caption_of(text, _column(source.caption_column))
        if source.licence_column:
            licence = _decoded(row.get(source.licence_column), source.licence_column)
            line["licence"] = plain(licence, source.licence_column)
    except SampleError as error:
        line["refused"] = (error.code, error.detail)
    line["key"] = shards.safe_key(line["key"])
    return {name: value for name, value in line.items() if value}


def _column(name: str) -> str:
    return f'the column "{name}"'


def _decoded(value: Any, name: str) -> Any:
    """A cell; one with bytes that are not UTF-8 is decoded as any text file is.

    Raises:
        SampleError: not_text.
    """
    if not isinstance(value, str) or UNDECODED.search(value) is None:
        return value
    try:
        return decode_text(value.encode("utf-8", "surrogateescape"))
    except UnicodeEncodeError:  # JSON can spell half of a pair
        return value
    except SampleError as error:
        raise SampleError(error.code, f"{_column(name)} cannot be decoded: {error.detail}") from error


def _table_rows(path: str, label: str, source: SourceSpec) -> Iterator[Mapping[Any, Any]]:
    """Rows of a table of addresses, one at a time."""
    suffix = "." + label.rpartition(".")[2].lower()
    if suffix not in TABLE_SUFFIXES:
        raise UsageError(f"{label} is not a table of addresses: {', '.join(TABLE_SUFFIXES)} are read.")
    columns = [c for c in (source.url_column, source.key_column, source.caption_column, source.licence_column) if c]
    try:
        with stores.open_file(path, source.storage) as file:
            if suffix == ".parquet":
                yield from _parquet_rows(file, label, columns, source)
                return
            text = io.TextIOWrapper(file, encoding=_encoding(file), errors="surrogateescape", newline="")
            rows: Iterator[Mapping[Any, Any]]
            if suffix == ".jsonl":
                rows = (row for _, row in json_lines(text, label))
            elif suffix == ".txt":
                rows = ({source.url_column: line} for line in text if not line.lstrip().startswith("#"))
            else:
                rows = _csv_rows(text, label, columns)
            for number, row in enumerate(rows):
                if not number and suffix != ".txt":
                    _check_columns(label, columns, row)
                yield row
    except UnicodeError as error:  # of UTF-16 only
        raise Failure(f"{label} cannot be decoded: {error}.") from error
    except OSError as error:
        raise Failure(f"{label} cannot be read: {error.strerror or error}.") from error


def _encoding(file: BinaryIO) -> str:
    """The encoding of a table: UTF-16, or UTF-8, whose cells may have other bytes (see `_decoded`)."""
    start = file.read(64)
    file.seek(0)
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    if start[1:2] == b"\0":  # an address or the name of a column begins with ASCII
        return "utf-16-le"
    return "utf-16-be" if start[:1] == b"\0" else "utf-8-sig"


def _parquet_rows(file: Any, label: str, columns: list[str], source: SourceSpec) -> Iterator[Mapping[str, Any]]:
    try:
        table = pq.ParquetFile(file)
        _check_columns(label, columns, dict.fromkeys(table.schema_arrow.names))
        scalars = (source.url_column, source.key_column, source.licence_column)
        check_text_columns(label, table.schema_arrow, source.caption_column, *scalars)
        for batch in table.iter_batches(batch_size=4096, columns=columns):
            yield from batch.to_pylist()
    except pa.ArrowException as error:
        raise Failure(f"{label} is not a readable parquet file: {first_line(error)}.") from error


def _csv_rows(lines: TextIO, label: str, columns: list[str]) -> Iterator[Mapping[Any, Any]]:
    """Rows; the cells beyond the header, and a quote that swallowed rows, are under the name None."""
    csv.field_size_limit(1 << 24)  # captions may be longer than the module's 128 KiB
    separator, first = separator_of(next(lines, ""), {name.lower() for name in columns})
    if label.lower().endswith(".tsv"):
        separator = "\t"
    try:
        for row in csv.DictReader(itertools.chain([first] if first.strip() else [], lines), delimiter=separator):
            is_swallowed = separator == "\t" and any("\t" in cell and "\n" in cell for cell in row.values() if cell)
            yield {**row, None: ["rows after an open quote"]} if is_swallowed else row
    except csv.Error as error:
        raise UsageError(f"{label} is not a readable table: {error}.") from error


def _check_columns(label: str, columns: list[str], row: Mapping[str, Any]) -> None:
    for column in columns:
        if column not in row:
            raise UsageError(f'{label} has no column "{column}".{near_miss(column, [str(name) for name in row])}')
