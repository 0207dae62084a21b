"""Files of a DRA model: adapters, the LoRA as peft reads it, and the robust encoder; from and to model folders.

adapters.safetensors                               adapters.N.{lq, emb, r1, r2, out}.*
adapter_model.safetensors, adapter_config.json     the LoRA: peft's PeftModel.from_pretrained(unet, FOLDER) reads it
pytorch_lora_weights.safetensors                   the LoRA: a diffusers pipeline's load_lora_weights(FOLDER) reads it
encoder.safetensors                                the robust encoder, if the model has one
restoray.json                                      sizes, prior, recipe, licence and origin
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from components.models import ModelError, file_sha256, key_faults, load_model
from components.naming import did_you_mean
from components.priors.autoencoder import autoencoder_factor
from components.priors.families import family_of, permitted_use_of
from components.priors.families.shapes import NetworkShape, network_shape
from components.priors.lora import PEFT_PREFIX, add_lora, peft_config, peft_state
from components.priors.robust_encoder import RobustEncoder
from components.priors.step_memory import meta_autoencoder
from components.systems.dra.bundle import ADAPTERS, ENCODER, FAMILY, LORA
from components.systems.dra.config import adapter_config, lora_config, shape_of, stored_adapter_config
from components.systems.dra.options import restore_defaults
from components.systems.dra.released import (
    ADAPTER_FILE,
    DIFFUSERS_LORA,
    ENCODER_FILE,
    LORA_CONFIG,
    LORA_FILE,
    LORA_SUFFIXES,
    RELEASED,
    SIDECAR,
    SUFFIXES,
    check_sizes,
)
from components.systems.dra.shapes import bundle_of, family_name
from components.systems.importing import finish_import
from components.systems.weights_io import ExportReport, ImportJob, ImportReport, Shapes, WeightsSource, valid_entries
from components.tensor_files import WeightsFileError, all_finite, read_weights
from components.writing import whole_file

_STEMS = {ADAPTER_FILE: ADAPTERS, LORA_FILE: LORA, ENCODER_FILE: ENCODER}
_FORM = "safetensors"


def export_weights(
    model: str | Path,
    folder: Path,
    *,
    spelling: str = "released",
    form: str = "pt",
    write: bool = True,
) -> ExportReport:
    """Write a model's weights as files for other tools.

    Args:
        model: model folder or name.
        folder: receives the files; each is renamed into place when it is complete.
        spelling: "released" is the only one.
        form: "safetensors", or "pt" for pickles (the LoRA then is adapter_model.bin, which peft reads too).
        write: False only returns the plan.

    Raises:
        ModelError: no such model, or a model of another system.
        ValueError: unknown spelling or form.
    """
    if spelling != "released" or form not in SUFFIXES:
        raise ValueError(f"spelling must be released and form one of {', '.join(SUFFIXES)}")
    source = load_model(model)
    if source.info["system"] != "dra":
        raise ModelError(f"{source.path}: holds a {source.info['system']} model, not a DRA")
    files, count = dict[str, str](), 0
    for stem, part in _STEMS.items():
        if part in source.info["parts"]:
            tensors = source.part(part)
            count += sum(tensor.numel() for tensor in tensors.values())
            name = stem + (LORA_SUFFIXES if part == LORA else SUFFIXES)[form]
            files[name] = _write(folder / name, tensors, form) if write else ""
    if write:
        lora, family = lora_config(source.info["config"][LORA]), family_name(source.info["config"])
        if lora.rank:
            targets, base = bundle_of(family).targets[lora.targets], str(source.info["prior"]["id"])
            config = peft_config(rank=lora.rank, alpha=lora.scale, targets=targets, base=base)
            (folder / LORA_CONFIG).write_text(json.dumps(config, indent=1, sort_keys=True) + "\n", encoding="utf-8")
            if form == _FORM:
                _write_for_diffusers(folder / DIFFUSERS_LORA, source.part(LORA), config, family_of(family).part)
        keys = ("name", "recipe", "prior", "licence", "permitted_use", "data_manifest_digest", "metrics", "parents")
        sidecar = {
            "system": "dra",
            "exported_from": source.digest,
            "config": dict(source.info["config"]),
            "files": files,
            **{key: source.info.get(key) for key in keys},
        }
        (folder / SIDECAR).write_text(json.dumps(sidecar, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return ExportReport(folder=str(folder), files=files, parameters=count)


def import_weights(job: ImportJob) -> ImportReport:
    """Turn exported files into a model folder; restoray.json beside them names sizes and prior.

    Raises:
        WeightsFileError: a file cannot be read or has another name.
        ModelError: keys, shapes or numbers do not fit; the message names all.
        ValueError: wrong sizes, or no prior.
    """
    _check_image_encoder(job.image_encoder)
    sidecar = _sidecar(job.files[0].parent)
    config = {**(sidecar.get("config") or {}), **check_sizes(job.sizes)}
    identity = job.prior or (sidecar.get("prior") or {}).get("id", "")
    if not identity:
        raise ValueError("no restoray.json names the prior of these weights: give --prior")
    shape = network_shape(identity, family_of(family_name(config)))
    expected, parts, sources, notes = _shapes(shape, config), dict[str, dict[str, Tensor]](), [], list[str]()
    for number, path in enumerate(job.files):
        job.progress(number, len(job.files), path.name)
        if path.stem not in _STEMS:
            raise WeightsFileError(f"{path}: not a file of an export. {did_you_mean(path.stem, _STEMS)}")
        part = _STEMS[path.stem]
        parts[part], more = read_weights(path)
        if part == LORA:  # the reader takes the names of wrappers off, and peft's files have one
            parts[part] = {PEFT_PREFIX + key.removeprefix(PEFT_PREFIX): value for key, value in parts[part].items()}
        notes += more
        _check(path, parts[part], expected.get(part, {}))
        count = sum(tensor.numel() for tensor in parts[part].values())
        sources.append(
            WeightsSource(
                file=path.name, part=part, sha256=file_sha256(path), tensors=len(parts[part]), parameters=count
            )
        )
    if missing := [RELEASED[part] for part in expected if part not in parts]:
        raise ModelError(f"{job.files[0].parent}: the model also needs {' and '.join(missing)}")
    sidecar, more = valid_entries(sidecar, sources)
    return finish_import(
        job,
        system="dra",
        parts=parts,
        sources=sources,
        sidecar=sidecar,
        config=_complete(config),
        prior={"id": shape.id, "digest": shape.digest},
        licence="unstated",
        permitted_use=permitted_use_of(shape.id),
        notes=(*notes, *more),
        defaults_of=restore_defaults,
    )


def expected_layout(
    prior: str = "", image_encoder: str = "", sizes: Mapping[str, Any] | None = None
) -> dict[str, dict[str, tuple[int, ...]]]:
    """Every key and shape of the files for a prior, from its configuration alone; sizes as in import_weights."""
    _check_image_encoder(image_encoder)
    if not prior:
        raise ValueError("the layout depends on the prior: give --prior")
    config = check_sizes(sizes or {})
    shapes = _shapes(network_shape(prior, family_of(family_name(config))), config)
    return {RELEASED[part]: dict(tensors) for part, tensors in shapes.items()}


def _check_image_encoder(image_encoder: str) -> None:
    if image_encoder:
        raise ValueError("DRA has no picture encoder: leave it out")


def _complete(config: Mapping[str, Any]) -> dict[str, Any]:
    """A model's config with all sizes."""
    return {
        FAMILY: family_name(config),
        ADAPTERS: adapter_config(config.get(ADAPTERS) or {}).to_dict(),
        LORA: lora_config(config.get(LORA) or {}).to_dict(),
        ENCODER: bool(config.get(ENCODER)),
    }


def _shapes(shape: NetworkShape, config: Mapping[str, Any]) -> Shapes:
    """Shapes of all tensors by key, by part, from networks on the meta device."""
    bundle, lora = bundle_of(family_name(config)), lora_config(config.get(LORA) or {})
    with torch.device("meta"):
        network, autoencoder = shape.build(), meta_autoencoder(shape.autoencoder)
        config_of_adapters, factor = adapter_config(config.get(ADAPTERS) or {}), autoencoder_factor(autoencoder)
        modules: dict[str, nn.Module] = {ADAPTERS: bundle.adapters_of(network, config_of_adapters, factor)}
        if config.get(ENCODER):
            modules[ENCODER] = RobustEncoder(autoencoder)
    shapes = {
        part: {key: tuple(parameter.shape) for key, parameter in module.named_parameters()}
        for part, module in modules.items()
    }
    if lora.rank:
        layers = add_lora(network, LORA, rank=lora.rank, alpha=lora.scale, targets=bundle.targets[lora.targets])
        shapes[LORA] = {key: tuple(tensor.shape) for key, tensor in peft_state(layers, LORA).items()}
    return shapes


def _check(path: Path, tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises ModelError with everything that does not fit."""
    keys_by_fault = {
        "missing": [key for key in shapes if key not in tensors],
        "unexpected": [key for key in tensors if key not in shapes],
        "of the wrong shape": [
            f"{key} is {list(tensors[key].shape)} instead of {list(shape)}"
            for key, shape in shapes.items()
            if key in tensors and tuple(tensors[key].shape) != shape
        ],
        "with values that are not finite": [key for key, tensor in tensors.items() if not all_finite(tensor)],
    }
    if faults := key_faults(keys_by_fault):
        raise ModelError(f"{path}: does not fit these sizes on this prior: {faults}")


def _write(path: Path, tensors: Mapping[str, Tensor], form: str) -> str:
    """Write a file; its sha256."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as draft:
        if form == _FORM:
            save_file(dict(tensors), draft.temporary)
        else:
            torch.save(dict(tensors), draft.temporary)
    return file_sha256(path)


def _write_for_diffusers(path: Path, lora: Mapping[str, Tensor], config: Mapping[str, Any], part: str) -> None:
    """The LoRA by the names of a pipeline's parts; without the configuration in its header alpha would be the rank."""
    tensors = {f"{part}.{key.removeprefix(PEFT_PREFIX)}": value for key, value in lora.items()}
    header = {"lora_adapter_metadata": json.dumps({f"{part}.{name}": value for name, value in config.items()})}
    with whole_file(path) as draft:
        save_file(tensors, draft.temporary, {"format": "pt", **header})


def _sidecar(folder: Path) -> dict[str, Any]:
    """The content of restoray.json in a folder; {} if there is none."""
    place = folder / SIDECAR
    if not place.is_file():
        return {}
    try:
        sidecar = json.loads(place.read_text(encoding="utf-8"))
        if sidecar["system"] == "dra" and isinstance(config := sidecar["config"], dict):
            shape = shape_of(family_of(family_name(config)))
            adapters = stored_adapter_config(config.get(ADAPTERS) or {}, shape).to_dict()
            return {**sidecar, "config": {**config, ADAPTERS: adapters}}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsFileError(f"{place}: not the format of an export ({type(error).__name__}: {error})") from error
    raise WeightsFileError(f"{place}: describes a {sidecar['system']} model, not a DRA")
