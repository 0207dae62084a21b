"""Captions, licences and keys of candidates: from text files, JSON documents, and the columns of tables.

A picture may have several texts, as a list or an array in a column. Its caption keeps them all
(components/captions/text.py), and a stream draws one for each row. What holds no text is an error with a name.
"""

from __future__ import annotations

import ast
import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from components.captions.text import join_texts, split_texts, tidy
from components.text_files import decode_text
from components.types import SampleError
from pipelines.core.errors import UsageError
from pipelines.curation.sources.stores import read_range
from pipelines.curation.sources.tars import printable_name

MAX_CAPTION_CHARS = 10_000  # ours: longer texts are cut; text encoders read less than a hundredth of it
MAX_CAPTION_BYTES = 16 * MAX_CAPTION_CHARS  # of a file or member that are read: 4 characters of UTF-32 for each one
MAX_TEXTS = 100  # ours: texts of one picture
MAX_NOTE_CHARS = 200  # ours: of a licence or a credit

CAPTION_FIELDS = ("captions", "caption", "prompt", "text")
LICENCE_FIELDS = ("licence", "license")
STRUCT_FIELDS = ("raw", *CAPTION_FIELDS, "value")
"""Fields of a struct that hold its text: COCO's sentences are structs with "raw" and "tokens"."""

CAPTION_SUFFIXES = ("txt", "caption")
"""Suffixes of caption files, of any case; the first one wins."""

_ITEM = r"(?:'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|None)"
_ITEMS = re.compile(_ITEM, re.DOTALL)
_PYTHON_LIST = re.compile(rf"\[\s*+(?:{_ITEM}(?:(?:\s*+,\s*+|\s++){_ITEM})*+(?:\s*+,)?+\s*+)?\]", re.DOTALL)
"""Texts in quotes, with commas as in Python or only blanks between them as in numpy."""


def tidy_caption(text: str) -> str:
    """One line without control characters, of at most MAX_CAPTION_CHARS; see components.captions.text.tidy."""
    return tidy(text[: 2 * MAX_CAPTION_CHARS])[:MAX_CAPTION_CHARS]


def tidy_note(text: str) -> str:
    """A licence or a credit: one line of at most MAX_NOTE_CHARS."""
    return tidy_caption(text)[:MAX_NOTE_CHARS]


def caption_of_bytes(data: bytes, name: str) -> str:
    """The caption in a text file's bytes; SampleError "not_text" if they cannot be decoded."""
    try:
        return tidy_caption(decode_text(data[:MAX_CAPTION_BYTES], is_whole=len(data) <= MAX_CAPTION_BYTES))
    except SampleError as error:
        raise SampleError(
            error.code, f"its caption {printable_name(name)} cannot be decoded: {error.detail}"
        ) from error


def read_caption_file(path: str) -> tuple[str, str]:
    """(caption, stamp of the file's text) of a text file.

    Raises:
        SampleError: not_text: it cannot be decoded; unreadable: it is no file, or cannot be read.
    """
    name = printable_name(os.path.basename(path))
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # reading a pipe might never end
            raise SampleError("unreadable", f"its caption {name} is neither a file nor a link to one")
        with open(path, "rb") as source:
            data = source.read(MAX_CAPTION_BYTES + 1)
    except OSError as error:
        raise SampleError("unreadable", f"its caption {name} cannot be read: {error.strerror}") from error
    caption = caption_of_bytes(data, os.path.basename(path))
    text = decode_text(data[:MAX_CAPTION_BYTES], is_whole=len(data) <= MAX_CAPTION_BYTES)
    text = text.replace("\r\n", "\n").replace("\r", "\n")[: 4 * MAX_CAPTION_CHARS]
    return caption, f"|{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def read_stored_caption(address: str, storage: Mapping[str, Any]) -> str:
    """The caption in a text of a store.

    Raises:
        SampleError: not_text: it cannot be decoded; unreadable: it cannot be read.
        StoreUnavailable: the store does not answer.
    """
    name = printable_name(address.rpartition("/")[2])
    try:
        data = read_range(address, storage, 0, MAX_CAPTION_BYTES + 1)
    except OSError as error:
        raise SampleError("unreadable", f"its caption {name} cannot be read: {error.strerror}") from error
    return caption_of_bytes(data, address.rpartition("/")[2])


def caption_of(value: Any, where: str) -> str:
    """The caption in a value of a table or a document: a text, a number, a struct with a text, or a list of these.

    A text may spell a list too, as tables in CSV do.

    Args:
        value: Python or numpy value; None, NaN and an empty list give "".
        where: name of its column or field, for errors.

    Raises:
        SampleError: bad_caption: the value holds no text, or too many; not_text: its bytes cannot be decoded.
    """
    texts = _texts(value, where)
    if len(texts) > MAX_TEXTS:
        raise SampleError("bad_caption", f"{where} holds {len(texts)} texts, over {MAX_TEXTS}")
    return join_texts(tidy_caption(text) for text in texts)


def first_caption(document: Mapping[str, Any], names: Sequence[str], label: str) -> str:
    """The caption in the first of these fields that holds one; "" for none.

    Raises:
        SampleError: as `caption_of`, for the first field that is no caption, if no other field holds one.
    """
    problem: SampleError | None = None
    for name in names:
        try:
            caption = caption_of(document.get(name), f'the field "{name}" of {label}')
        except SampleError as error:
            problem = problem or error
            continue
        if caption:
            return caption
    if problem is not None:
        raise problem
    return ""


def listed_texts(text: str) -> list[str] | None:
    """The texts of a list that a table holds as text, as JSON, Python or numpy spell it; None for another text."""
    text = text.strip()
    if not (text.startswith("[") and text.endswith("]")) or len(text) > MAX_CAPTION_BYTES:
        return None
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        if not _PYTHON_LIST.fullmatch(text):
            return None
        try:
            values = [ast.literal_eval(item) for item in _ITEMS.findall(text)]
        except (ValueError, SyntaxError):  # a wrong escape
            return None
    if not isinstance(values, list) or not all(value is None or isinstance(value, str) for value in values):
        return None
    return [value for value in values if value]


def _texts(value: Any, where: str, is_inner: bool = False) -> list[str]:
    if isinstance(value, Mapping):
        name = next((name for name in STRUCT_FIELDS if _is_filled(value.get(name))), None)
        if name is None and any(map(_is_filled, value.values())):
            fields = ", ".join(map(str, value))[:MAX_NOTE_CHARS]
            raise SampleError(
                "bad_caption", f"{where} is a struct of {fields}, and none of these is a text that we read"
            )
        return [] if name is None else _texts(value[name], f"{where}.{name}", is_inner)
    if hasattr(value, "tolist"):  # numpy
        value = value.tolist()
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        if is_inner:
            raise SampleError("bad_caption", f"{where} holds lists of lists, and no texts")
        return [text for item in value for text in _texts(item, where, is_inner=True)]
    if not _is_filled(value):
        return []
    if is_inner and not isinstance(value, str | bytes):
        raise SampleError("bad_caption", f"{where} is a list of numbers, and not of texts")
    text = plain(value, where)
    listed = None if is_inner else listed_texts(text)
    return split_texts(text) if listed is None else listed


def _is_filled(value: Any) -> bool:
    """Whether a value is neither null, nor NaN, nor an empty text or list."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return False
    return not (hasattr(value, "__len__") and len(value) == 0)


def plain(value: Any, where: str) -> str:
    """A scalar as text; null and NaN are "". SampleError "not_text" for bytes that cannot be decoded."""
    if not _is_filled(value):
        return ""
    if not isinstance(value, bytes):
        return str(value)
    try:
        return decode_text(value)
    except SampleError as error:
        raise SampleError(error.code, f"{where} cannot be decoded: {error.detail}") from error


def key_of(value: Any, where: str) -> str:
    """A key as text: 0 and False are keys.

    Raises:
        SampleError: no_key: null, NaN or an empty text.
    """
    key = plain(value, where)
    if not key.strip():
        raise SampleError("no_key", f"{where} is {'null' if value is None else 'empty'} in this row")
    return key


def check_text_columns(label: str, schema: pa.Schema, caption: str, *others: str) -> None:
    """Check that the columns of a parquet file can be read as texts.

    Args:
        label: name of the file.
        caption: its caption column; "" for none. It may hold lists and structs.
        others: key and licence columns, which hold scalars; "" for none.

    Raises:
        UsageError: a column has a type that is no text.
    """
    for name in filter(None, others):
        if not _is_scalar(schema.field(name).type):
            raise UsageError(f'{label}: the column "{name}" holds {_short(schema.field(name).type)}, and no text.')
    if caption and not _holds_texts(schema.field(caption).type):
        kind = _short(schema.field(caption).type)
        raise UsageError(
            f'{label}: the column "{caption}" holds {kind}, and no captions: texts, lists of texts, and structs with '
            f"one of {', '.join(STRUCT_FIELDS)} are read."
        )


def _short(kind: pa.DataType) -> str:
    return str(kind)[:MAX_NOTE_CHARS]


def _is_scalar(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _is_scalar(kind.value_type)
    return not pa.types.is_nested(kind)


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _is_text(kind.value_type)
    checks = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_binary)
    more = (pa.types.is_large_binary, pa.types.is_binary_view, pa.types.is_null)
    return any(check(kind) for check in (*checks, *more))


def _holds_texts(kind: pa.DataType, is_inner: bool = False) -> bool:
    if pa.types.is_struct(kind):
        fields = {kind.field(number).name: kind.field(number).type for number in range(kind.num_fields)}
        return any(_holds_texts(fields[name], is_inner) for name in STRUCT_FIELDS if name in fields)
    if pa.types.is_map(kind):
        return False
    if hasattr(kind, "value_type") and not pa.types.is_dictionary(kind):  # any kind of list
        return not is_inner and _holds_texts(kind.value_type, is_inner=True)
    return _is_text(kind) if is_inner else _is_scalar(kind)
