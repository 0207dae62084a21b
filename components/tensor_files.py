"""Untrusted weights files: read memory-mapped, without running code in them; every fault is an error of one sentence.

The formats are safetensors and torch's pickles (.pt, .pth, .bin, .ckpt), recognised by the first bytes. torch's
weights-only reader reads pickles. It refuses everything except tensors, numbers, texts and containers. What training
tools put around the weights is removed, see components.state_dicts.
"""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from components.models import ModelError
from components.state_dicts import plain_keys, plain_state, without_counters

_HEAD_BYTES = 16
_MAX_HEAD_BYTES = 100_000_000  # of a safetensors file, as its specification says

FOREIGN = {
    b"GGUF": "a GGUF file",
    b"\x89HDF": "an HDF5 file",
    b"\x93NUMPY": "a numpy file",
    b"\x08\x07": "an ONNX file",
    b"\x08\x08": "an ONNX file",
}
"""First bytes of weights in formats of other tools."""

PACKED = {
    b"\x1f\x8b": "gzip",
    b"Rar!": "RAR",
    b"7z\xbc\xaf": "7-Zip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"(\xb5/\xfd": "zstd",
}
"""First bytes of packed files."""


class WeightsFileError(ModelError):
    """A weights file cannot be used; the message names the file and the reason."""


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of `read_weights`."""
    return read_weights(path)[0]


def read_weights(path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Read the tensors of a file by key, and notes on what else it holds; see components.state_dicts.

    Nothing is copied: the tensors are views of the mapped file, so the file may be larger than memory.

    Raises:
        WeightsFileError: unreadable, truncated, not a weights file, one shard of several, or a pickle with other
            objects than tensors.
    """
    if (shard := re.search(r"-(\d{5})-of-(\d{5})\.", path.name)) and int(shard[2]) > 1:
        raise WeightsFileError(f"{path}: one of {int(shard[2])} shards: save the whole state_dict as one file")
    try:
        with path.open("rb") as stream:
            head = stream.read(_HEAD_BYTES)
    except OSError as error:
        raise WeightsFileError(f"{path}: {error.strerror or error}") from error
    try:
        if head[8:9] == b"{":
            tensors = without_counters(_read_safetensors(path))
            return dict(zip(plain_keys(list(tensors)), tensors.values(), strict=True)), []
        tensors, notes = plain_state(_read_pickle(path, head))
    except WeightsFileError:
        raise
    except ValueError as error:
        raise WeightsFileError(f"{path}: {error}") from error
    return tensors, [f"{path.name}: {note}" for note in notes]


def all_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity; torch itself cannot tell for 8-bit floats."""
    return bool((tensor.float() if tensor.itemsize == 1 else tensor).isfinite().all())


def safetensors_metadata(path: Path) -> dict[str, str]:
    """The texts in the head of a safetensors file; {} for other files and without any."""
    try:
        with path.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            if size > _MAX_HEAD_BYTES:
                return {}
            texts = json.loads(stream.read(size)).get("__metadata__") or {}
    except (OSError, ValueError, AttributeError):
        return {}
    return {str(name): str(text) for name, text in texts.items()} if isinstance(texts, dict) else {}


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
            "and opening it in full could run any code. Where the file was made, save only the weights: "
            "torch.save(model.state_dict(), FILE)"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError, IndexError) as error:
        if "TorchScript" in str(error):
            raise WeightsFileError(
                f"{path}: a TorchScript program, which is not run: save its weights alone with "
                "torch.save(model.state_dict(), FILE)"
            ) from error
        raise WeightsFileError(f"{path}: damaged or truncated weights file ({_first_line(error)})") from error


def _looks_like(head: bytes) -> str:
    if not head:
        return "it is empty"
    if head.startswith(b"version https://"[:_HEAD_BYTES]):
        return "it is a Git LFS pointer, the weights themselves were not fetched"
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "it is a web page, as a failed download leaves it"
    for start, kind in FOREIGN.items():
        if head.startswith(start):
            return f"it is {kind}: convert it to safetensors or to a state_dict of torch"
    for start, kind in PACKED.items():
        if head.startswith(start):
            return f"it is packed with {kind}: unpack it first"
    if head.lstrip().startswith(b"{"):
        return "it is JSON: the index of several shards, or a configuration. Save the whole state_dict as one file"
    if not head.strip(b"\0"):
        return "it begins with zeros only, as a download does that was not finished"
    return f"its first bytes are {head[:8]!r}"


def _unsafe_reason(error: Exception) -> str:
    """Return the part of torch's long message that names the object in the pickle."""
    match = re.search(
        r"(Unsupported [^\n]*?|Trying to [^\n]*?|Can't [^\n]*?)(?: was not an allowed| Please|\.\s|\n|$)", str(error)
    )
    return match.group(1).strip() if match else _first_line(error)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].partition(". ")[0][:200]
