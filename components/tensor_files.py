"""Untrusted weights files: read memory-mapped, without running code in them; every fault is an error of one sentence.

The formats are safetensors and torch's pickles (.pt, .pth, .bin, .ckpt), recognised by the first bytes. torch's
weights-only reader reads pickles. It refuses everything except tensors, numbers, texts and containers.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from components.models import ModelError

_HEAD_BYTES = 16


class WeightsFileError(ModelError):
    """A weights file cannot be used; the message names the file and the reason."""


def read_tensors(path: Path, inside: str = "") -> dict[str, Tensor]:
    """Read the tensors of a file by key. Dots join the keys of nested dictionaries; a leading "module." is removed.

    Nothing is copied: the tensors are views of the mapped file, so the file may be larger than memory.

    Args:
        inside: if a pickle has a dictionary of this name, only that is read. Training checkpoints keep the weights in
            "state_dict", next to counters that are not tensors.

    Raises:
        WeightsFileError: unreadable, truncated, not a weights file, or a pickle with other objects than tensors.
    """
    try:
        with path.open("rb") as stream:
            head = stream.read(_HEAD_BYTES)
    except OSError as error:
        raise WeightsFileError(f"{path}: {error.strerror or error}") from error
    if head[8:9] == b"{":
        return _without_wrapper(_read_safetensors(path))
    value = _read_pickle(path, head)
    if inside and isinstance(value, Mapping) and isinstance(value.get(inside), Mapping):
        value = value[inside]
    return _without_wrapper(dict(_flat(value, path)))


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, ValueError, OSError) as error:
        raise WeightsFileError(f"{path}: damaged safetensors file ({_first_line(error)})") from error


def _read_pickle(path: Path, head: bytes) -> Any:
    is_zip = head.startswith(b"PK")
    if not is_zip and not head.startswith(b"\x80"):
        raise WeightsFileError(f"{path}: not a weights file: {_looks_like(head)}")
    try:
        # torch's older format is not a zip file and cannot be mapped
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        raise WeightsFileError(
            f"{path}: refused: torch's restricted reader does not take it ({_unsafe_reason(error)}), "
            "and opening it in full could run any code"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError, IndexError) as error:
        raise WeightsFileError(f"{path}: damaged or truncated weights file ({_first_line(error)})") from error


def _flat(value: Any, path: Path, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        if value.layout != torch.strided or not prefix:
            raise WeightsFileError(f"{path}: {prefix or 'the whole file'} is not a plain named tensor")
        yield prefix, value.detach()
        return
    if not isinstance(value, Mapping):
        raise WeightsFileError(f"{path}: {prefix or 'the whole file'} holds {type(value).__name__}, not a tensor")
    for key, inner in value.items():
        yield from _flat(inner, path, f"{prefix}.{key}" if prefix else str(key))


def _without_wrapper(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Remove the prefix that a data-parallel wrapper puts in front of every key."""
    if tensors and all(key.startswith("module.") for key in tensors):
        return {key.removeprefix("module."): value for key, value in tensors.items()}
    return tensors


def _looks_like(head: bytes) -> str:
    if not head:
        return "it is empty"
    if head.startswith(b"version https://"[:_HEAD_BYTES]):
        return "it is a Git LFS pointer, the weights themselves were not fetched"
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "it is a web page, as a failed download leaves it"
    return f"its first bytes are {head[:8]!r}"


def _unsafe_reason(error: Exception) -> str:
    """Return the part of torch's long message that names the object in the pickle."""
    match = re.search(
        r"(Unsupported [^\n]*?|Trying to [^\n]*?|Can't [^\n]*?)(?: was not an allowed| Please|\.\s|\n|$)", str(error)
    )
    return match.group(1).strip() if match else _first_line(error)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].partition(". ")[0][:200]
