"""Model folders: model.json and parts/*.safetensors. Training, import and shipped models use the same format.

    model.json      format, name, system, recipe, prior {id, digest}, config, parts {name: {file, sha256}},
                    files {name: sha256}, parents, data_manifest_digest, licence, permitted_use, metrics
    parts/          one safetensors file per part
    files/          small text files that a part needs (a tokenizer), and *.md for people

A folder is written under a temporary name and then renamed, so a killed writer leaves no partial model.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from components.naming import did_you_mean, limited, list_some
from components.places import find_model_folder, shipped_models, shipped_priors, stored_models, weights_folder
from components.weight_storage import unpack_8_bits

FORMAT = 1


class ModelError(ValueError):
    """A model folder cannot be used; the message names the folder and the fault, in at most 2,000 characters."""

    def __init__(self, message: str) -> None:
        super().__init__(limited(message))


@dataclass(frozen=True, kw_only=True)
class Model:
    """A verified model folder. `info` is model.json; parts are loaded on access."""

    path: Path
    info: Mapping[str, Any]
    digest: str

    def part(self, name: str) -> dict[str, Tensor]:
        """Check the sha256 of a part and load its tensors.

        Raises:
            ModelError: the part does not exist, or its bytes do not have the sha256 in model.json.
        """
        parts = self.info["parts"]
        if name not in parts:
            raise ModelError(f"{self.path}: no part {name!r}; it has {sorted(parts)}")
        file = self.path / parts[name]["file"]
        if not file.is_file():
            raise ModelError(f"{self.path}: part {name!r} is missing ({parts[name]['file']})")
        if file_sha256(file) != parts[name]["sha256"]:
            raise ModelError(f"{self.path}: part {name!r} does not have the sha256 that model.json names")
        return unpack_8_bits(load_file(file))

    def parts(self) -> Mapping[str, dict[str, Tensor]]:
        """All parts by name; each lookup checks and loads the part again, without a cache."""
        return _Parts(self)

    def file(self, name: str) -> Path:
        """Check the sha256 of one of the model's small text files and return its path.

        Raises:
            ModelError: the file does not exist, or its bytes do not have the sha256 in model.json.
        """
        path = self.path / "files" / name
        if name not in self.info["files"] or not path.is_file():
            raise ModelError(f"{self.path}: no file {name!r}; model.json names {sorted(self.info['files'])}")
        if file_sha256(path) != self.info["files"][name]:
            raise ModelError(f"{self.path}: file {name!r} does not have the sha256 that model.json names")
        return path


class _Parts(Mapping[str, dict[str, Tensor]]):
    """A model's parts; each lookup loads one."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def __getitem__(self, name: str) -> dict[str, Tensor]:
        if name not in self.model.info["parts"]:
            raise KeyError(name)
        return self.model.part(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.model.info["parts"])

    def __len__(self) -> int:
        return len(self.model.info["parts"])


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """The fields of model.json except the parts; `origin` stands there only if it is not empty."""

    name: str
    system: str
    recipe: Mapping[str, Any] = field(default_factory=dict)
    prior: Mapping[str, str] | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    parents: Mapping[str, str] = field(default_factory=dict)
    data_manifest_digest: str = ""
    licence: str = "unstated"
    permitted_use: str = "unstated"
    metrics: Mapping[str, Any] = field(default_factory=dict)
    origin: str = ""


def file_sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def save_model(
    path: Path,
    card: ModelCard,
    parts: Mapping[str, Mapping[str, Tensor]],
    files: Mapping[str, str] | None = None,
    half: bool = False,
) -> Model:
    """Write a model folder; replace a folder of the same name.

    Args:
        path: the folder to write.
        card: everything but the parts.
        parts: tensors by key, by part. Each part is looked up once, in turn, so a lazy mapping holds one in memory.
        files: text files by name.
        half: store floating point tensors as float16.
    """
    temporary = path.with_name(f".{path.name}.writing")
    shutil.rmtree(temporary, ignore_errors=True)
    (temporary / "parts").mkdir(parents=True)
    part_entries: dict[str, dict[str, str]] = {}
    for name in sorted(parts):
        tensors, file, addresses = parts[name], temporary / "parts" / f"{name}.safetensors", set[int]()
        # sorted: equal tensors give equal bytes
        save_file({key: _prepare(tensors[key], half, addresses) for key in sorted(tensors)}, file)
        part_entries[name] = {"file": f"parts/{name}.safetensors", "sha256": file_sha256(file)}
    texts: dict[str, str] = {}
    for name, text in (files or {}).items():
        (temporary / "files").mkdir(exist_ok=True)
        (temporary / "files" / name).write_text(text, encoding="utf-8")
        texts[name] = file_sha256(temporary / "files" / name)
    card_fields = {k: getattr(card, k) for k in ModelCard.__dataclass_fields__ if k != "origin" or card.origin}
    info = {"format": FORMAT, **card_fields, "parts": part_entries, "files": texts}
    (temporary / "model.json").write_text(json.dumps(info, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    if path.exists():
        old = path.with_name(f".{path.name}.retired")
        shutil.rmtree(old, ignore_errors=True)
        os.replace(path, old)
        os.replace(temporary, path)
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.replace(temporary, path)
    return load_model(path)


def _prepare(tensor: Tensor, half: bool, addresses: set[int]) -> Tensor:
    """Prepare a tensor for safetensors; copy it only if tensors share memory, since parts can be gigabytes."""
    tensor = tensor.detach().cpu().contiguous()
    if half and tensor.is_floating_point():
        tensor = tensor.half()
    storage = tensor.untyped_storage()
    if storage.nbytes() != tensor.nbytes or storage.data_ptr() in addresses:
        tensor = tensor.clone()
    addresses.add(tensor.untyped_storage().data_ptr())
    return tensor


def resolve_model(name: str | Path, prior: bool = False) -> Path:
    """Resolve a path, a shipped name or a name below RESTORAY_HOME/weights to a model folder.

    Args:
        prior: see places.find_model_folder.

    Raises:
        ModelError: there is no such folder; the message suggests a similar name or lists all.
    """
    path = find_model_folder(name, prior)
    if path is not None:
        return path
    near = did_you_mean(str(name), [*(shipped_priors() if prior else shipped_models()), *stored_models()])
    raise ModelError(
        f"{name}: neither a model folder (it would hold model.json) nor a shipped model, "
        f"and none in {weights_folder()}. {near}"
    )


def load_model(name: str | Path, prior: bool = False) -> Model:
    """Open a model folder or a shipped model and check its model.json; arguments and errors as in resolve_model."""
    path = resolve_model(name, prior)
    text = (path / "model.json").read_bytes()
    try:
        info = json.loads(text)
    except json.JSONDecodeError as error:
        raise ModelError(f"{path}: model.json is not JSON ({error})") from error
    missing = {"format", "name", "system", "parts", "files", "config"} - set(info)
    if missing:
        raise ModelError(f"{path}: model.json lacks {sorted(missing)}")
    if info["format"] != FORMAT:
        raise ModelError(f"{path}: format {info['format']} is not {FORMAT}")
    return Model(path=path, info=info, digest=model_digest(info))


def model_digest(info: Mapping[str, Any]) -> str:
    """Digest of what the outputs depend on: system, config, recipe (for a restorer's defaults), prior and bytes."""
    decisive = {
        "system": info["system"],
        "config": info["config"],
        "recipe": info.get("recipe"),
        "prior": info.get("prior"),
        "parts": {name: part["sha256"] for name, part in info["parts"].items()},
        "files": {name: sha256 for name, sha256 in info["files"].items() if not name.endswith(".md")},
    }
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def key_faults(keys_by_fault: Mapping[str, Sequence[str]]) -> str:
    """Return faults of a state dict as text, with count and first keys of each: "931 missing: a, b and 929 more"."""
    return "; ".join(f"{len(keys)} {fault}: {list_some(keys)}" for fault, keys in keys_by_fault.items() if keys)


def load_strictly(module: nn.Module, tensors: Mapping[str, Tensor], what: str) -> None:
    """Load a state dict in the module's dtype; a ModelError counts and names missing, unexpected and misshapen keys."""
    own = module.state_dict()
    check_fit(own, tensors, what)
    with torch.no_grad():
        for key, value in own.items():
            value.copy_(tensors[key])


def check_fit(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], what: str) -> None:
    """Raise a ModelError that counts and names missing, unexpected and misshapen keys; `own` is a module's state."""
    missing, surplus = sorted(set(own) - set(tensors)), sorted(set(tensors) - set(own))
    misshapen = [
        f"{k}: {tuple(tensors[k].shape)} instead of {tuple(own[k].shape)}"
        for k in sorted(set(own) & set(tensors))
        if tensors[k].shape != own[k].shape
    ]
    if missing or surplus or misshapen:
        faults = {"missing": missing, "unexpected": surplus, "of the wrong shape": misshapen}
        raise ModelError(f"{what}: {key_faults(faults)}")
