"""InstaRevive's released weights, import and export: InstaRevive_v1.ckpt <-> a model folder (reference, section 1).

The file is a flat dictionary with diffusers' keys. An import compares every key and shape with the configuration's
network on the meta device. An export writes the same tensors, to the byte. The other families, which the authors never
released, have the same layout; restoray.json next to the file then holds their configuration.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from components.models import ModelError, file_sha256, key_faults, load_model
from components.naming import MESSAGE_CHARS, did_you_mean, limited
from components.places import SHIPPED_PRIORS
from components.priors.families import FAMILIES, permitted_use_of
from components.priors.files import read_json
from components.priors.hub import find_folder
from components.priors.scheduler_config import read_schedule
from components.samplers.schedules import schedule_from
from components.state_dicts import without_prefix
from components.systems.importing import finish_import
from components.systems.instarevive.build import check_coarse
from components.systems.instarevive.network import OneStep, aligning_conv, build_network, check_prediction
from components.systems.instarevive.released import LICENCE, RELEASE_DEFAULTS, RELEASED, SIDECAR, check_sizes
from components.systems.weights_io import ExportReport, ImportJob, ImportReport, WeightsSource, valid_entries
from components.tensor_files import WeightsFileError, all_finite, read_weights
from components.writing import whole_file

Shapes = dict[str, tuple[int, ...]]

PUBLISHED_PARAMETERS = 610_856_096
"""Of PixArt's DiT at 512 (reference, section 8; 611M in the paper)."""

TABLES = ("pos_embed.pos_embed",)
"""Keys of older diffusers that follow from the sizes alone; an import drops them."""


@dataclass(frozen=True, kw_only=True)
class _Expected:
    """What an import expects of the files.

    Attributes:
        config: for model.json. prior: its entry in model.json. layout: shapes by key, by part. note: for people.
    """

    config: Mapping[str, Any]
    prior: Mapping[str, str]
    layout: Mapping[str, Shapes]
    note: str = ""


def import_weights(job: ImportJob) -> ImportReport:
    """Turn released files into a model folder: the generator's, and with input noise also the aligning convolution's.

    Their keys tell which is which. Without a prior the sidecar's counts, else the family's own; without sizes the
    sidecar's, else PixArt's at 512.

    Raises:
        WeightsFileError: a file cannot be read.
        ModelError: keys, shapes or numbers do not fit (the message names all), or no such prior or coarse restorer.
        ValueError: wrong sizes, or a missing or second file of a part.
    """
    if job.image_encoder:
        raise ValueError("InstaRevive has no picture encoder: leave it out")
    sidecar = _sidecar(job.files)
    expected = _expect(sidecar, job.prior, job.sizes)
    file_tensors: dict[str, tuple[Path, dict[str, Tensor]]] = {}
    notes = [expected.note] if expected.note else []
    for number, path in enumerate(job.files):
        job.progress(number, len(job.files), path.name)
        tensors, file_notes = read_weights(path)
        try:
            tensors, more = without_prefix(tensors, tuple(expected.layout["generator"]), path.name)
        except ValueError as error:
            raise WeightsFileError(f"{path}: {error}") from error
        notes += [*file_notes, *more]
        part = "align" if set(tensors) <= {"weight", "bias"} else "generator"
        if part in file_tensors:
            raise ValueError(f"{file_tensors[part][0]} and {path} both hold the {part}: give one of them")
        tables = [key for key in TABLES if tensors.pop(key, None) is not None]
        notes += [f"{path.name}: dropped {key}, which follows from the sizes" for key in tables]
        file_tensors[part] = (path, tensors)
    missing = set(expected.layout) - set(file_tensors)
    if missing:
        raise ValueError(f"no file for {' and '.join(sorted(missing))}: an InstaRevive of these sizes needs it too")
    if set(file_tensors) - set(expected.layout):
        raise ValueError(
            f"{file_tensors['align'][0]}: a generator without noise has no aligning convolution; give input=noise"
        )
    faults = [
        text for part, (path, tensors) in file_tensors.items() if (text := _faults(path, part, tensors, expected))
    ]
    if faults:
        raise ModelError("\n".join(limited(text, MESSAGE_CHARS // len(faults) - 1) for text in faults))
    sources = tuple(
        WeightsSource(
            file=path.name,
            part=part,
            sha256=file_sha256(path),
            tensors=len(tensors),
            parameters=sum(tensor.numel() for tensor in tensors.values()),
        )
        for part, (path, tensors) in file_tensors.items()
    )
    sidecar, dropped_notes = valid_entries(sidecar, sources)
    notes += dropped_notes
    published = sources[0].parameters == PUBLISHED_PARAMETERS
    if expected.config["coarse"] is None:
        notes.append("no coarse restorer is recorded: give coarse=MODEL, made by restoray weights import swinir")
    return finish_import(
        job,
        system="instarevive",
        parts={part: tensors for part, (_, tensors) in file_tensors.items()},
        sources=sources,
        sidecar=sidecar,
        config=expected.config,
        prior=expected.prior,
        restore_options=RELEASE_DEFAULTS,
        licence=LICENCE if published else "unstated",
        permitted_use=permitted_use_of(str(expected.prior["id"])),
        notes=notes,
    )


def export_weights(
    model: str | Path,
    folder: Path,
    *,
    spelling: str = "released",
    form: str = "pt",
    write: bool = True,
) -> ExportReport:
    """Write a model folder's generator for the released tools: the released keys in their order.

    Args:
        model: model folder or name.
        folder: for the files, each renamed into place when it is complete, and for restoray.json with the settings that
            they do not hold, so that an import needs no options.
        spelling: "released" is the only one.
        form: "pt" (the released pickle) or "safetensors".
        write: False only returns the plan.

    Raises:
        ModelError: no such model, a model of another system, or one that does not fit its own config.
        ValueError: unknown spelling or form.
    """
    if spelling != "released" or form not in ("pt", "safetensors"):
        raise ValueError("spelling must be released and form pt or safetensors")
    source = load_model(model)
    if source.info["system"] != "instarevive":
        raise ModelError(f"{source.path}: holds a {source.info['system']} model, not one of InstaRevive")
    config, notes = source.info["config"], []
    if config["family"] != "pixart":
        notes.append(f"the authors' tools read a DiT only; this is the {config['family']} family under the same name")
    if config["one_step"]["input"] == "noise":
        notes.append(f"the authors' tools do not support noise: {RELEASED['align']} is an additional file")
    expected = layout(config)
    files: dict[str, str] = {}
    parameters = 0
    if write:
        folder.mkdir(parents=True, exist_ok=True)
    for part, tensors in source.parts().items():
        name = RELEASED[part] if form == "pt" else f"{Path(RELEASED[part]).stem}.safetensors"
        if {key: tuple(tensor.shape) for key, tensor in tensors.items()} != expected[part]:
            raise ModelError(f"{source.path}: part {part} does not fit the model's own config")
        parameters += sum(tensor.numel() for tensor in tensors.values())
        files[name] = ""
        if write:
            with whole_file(folder / name) as draft:
                if form == "pt":
                    torch.save({key: tensors[key] for key in expected[part]}, draft.temporary)
                else:
                    save_file(tensors, draft.temporary)
            files[name] = file_sha256(folder / name)
    keys = ("name", "recipe", "prior", "licence", "permitted_use", "data_manifest_digest", "metrics", "parents")
    sidecar = {
        "system": "instarevive",
        "exported_from": source.digest,
        "config": dict(config),
        "files": files,
        **{key: source.info.get(key) for key in keys},
    }
    if write:
        (folder / SIDECAR).write_text(json.dumps(sidecar, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return ExportReport(folder=str(folder), files=files, parameters=parameters, notes=tuple(notes))


def expected_layout(
    prior: str = "", image_encoder: str = "", sizes: Mapping[str, Any] | None = None
) -> dict[str, Shapes]:
    """Every key and shape by released file, for a prior and sizes as import_weights takes them."""
    if image_encoder:
        raise ValueError("InstaRevive has no picture encoder: leave it out")
    return {RELEASED[part]: shapes for part, shapes in _expect({}, prior, sizes or {}).layout.items()}


def layout(config: Mapping[str, Any]) -> dict[str, Shapes]:
    """Shapes by key, by part, of a model folder's config; computed without memory.

    Raises:
        ValueError: the config does not build a network.
    """
    one_step = OneStep(**config["one_step"])
    with torch.device("meta"):
        network = build_network(str(config["family"]), config["network"])
        parts: dict[str, nn.Module] = {"generator": network}
        if one_step.input == "noise":
            parts["align"] = aligning_conv(int(network.config["in_channels"]), one_step.kernel)  # type: ignore[index, arg-type]
    return {
        part: {key: tuple(value.shape) for key, value in module.state_dict().items()} for part, module in parts.items()
    }


# -- what an import expects --------------------------------------------------------------------------------------------


def _sidecar(files: Sequence[Path]) -> dict[str, Any]:
    """The content of restoray.json next to the files; {} if there is none."""
    for folder in dict.fromkeys(path.parent for path in files):
        path = folder / SIDECAR
        if not path.is_file():
            continue
        try:
            sidecar = json.loads(path.read_text(encoding="utf-8"))
            if sidecar["system"] == "instarevive" and isinstance(sidecar["config"]["network"], dict):
                return dict(sidecar)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise WeightsFileError(f"{path}: not the format of an export ({type(error).__name__}: {error})") from error
        raise WeightsFileError(f"{path}: describes a {sidecar['system']} model, not one of InstaRevive")
    return {}


def _expect(sidecar: Mapping[str, Any], prior: str, sizes: Mapping[str, Any]) -> _Expected:
    options = check_sizes(sizes)
    config = dict(sidecar.get("config") or {})
    family = str(options.get("family") or config.get("family") or "pixart")
    if family not in FAMILIES:
        raise ValueError(f"unknown generator family {family!r}. {did_you_mean(family, FAMILIES)}")
    if config and config["family"] != family:
        raise ValueError(f"the file's {SIDECAR} is for the {config['family']} family, not {family}")
    prior_record = sidecar.get("prior") or {}
    name = prior or str(prior_record.get("id") or FAMILIES[family].default_prior)
    try:
        prior_config, source, note = _read_prior(family, name)
    except ModelError:
        if not config or prior:
            raise
        prior_config, source, note = config, dict(prior_record), f"the prior {name} is not on this machine"
    defaults = {"prediction": "epsilon", "mask_as_bias": False, **prior_config, **config}
    names = ("timestep", "input", "kernel")
    one_step = OneStep(**{**(config.get("one_step") or {}), **{k: options[k] for k in names if k in options}})
    coarse = config.get("coarse")
    if "coarse" in options:
        model = load_model(options["coarse"])
        check_coarse(model)
        coarse = {"id": str(model.path.resolve()), "digest": model.digest}
    merged_config = {
        "family": family,
        "network": {**defaults["network"], **options.get("network", {})},
        "schedule": defaults["schedule"],
        "prediction": options.get("prediction", defaults["prediction"]),
        "mask_as_bias": options.get("mask_as_bias", defaults["mask_as_bias"]),
        "one_step": asdict(one_step),
        "coarse": coarse,
    }
    channels, latents = merged_config["network"].get("in_channels"), FAMILIES[family].latents
    if name in FAMILIES[family].networks and channels != latents["latent_channels"]:
        raise ValueError(
            f"latents of {name} have {latents['latent_channels']} channels, and the network takes {channels}"
        )
    check_prediction(merged_config["prediction"], schedule_from(merged_config["schedule"]))
    if note:
        note += "; install it before restoring"
    return _Expected(config=merged_config, prior=source, layout=layout(merged_config), note=note)


def _read_prior(family: str, name: str) -> tuple[dict[str, Any], dict[str, str], str]:
    """(network, schedule and prediction; entry in model.json; a note) of a prior, from its configuration files.

    Raises:
        ModelError: no such prior, or a model that is not a prior.
    """
    record = FAMILIES[family]
    try:
        model = load_model(name, prior=True)
    except ModelError as error:
        if not record.networks or "nor a shipped model" not in str(error):
            raise
    else:
        if model.info["system"] != "prior":
            raise ModelError(f"{model.path}: holds a {model.info['system']} model, not a prior")
        config = model.info["config"]
        if record.part not in config:
            raise ModelError(f"{model.path}: the prior is not of the {family} family: its config has no {record.part}")
        place = name if model.path.parent == SHIPPED_PRIORS else str(model.path.resolve())
        prior_config = {
            "network": dict(config[record.part]),
            "schedule": asdict(schedule_from(config["schedule"])),
            "prediction": record.prediction,
        }
        return prior_config, {"id": place, "digest": model.digest}, ""
    file = f"{record.part}/config.json"
    try:
        folder, prior_id = find_folder(name, (file,), (file, "scheduler/*.json"), {})
    except ModelError:
        if name not in record.networks:
            raise
        published_config = {
            "network": dict(record.networks[name]),
            "schedule": asdict(schedule_from(record.schedule)),
            "prediction": record.prediction,
        }
        note = f"{name} is not on this machine: its published sizes are used"
        return published_config, {"id": name, "digest": ""}, note
    schedule, prediction = read_schedule(folder)
    network = {key: value for key, value in read_json(folder / file).items() if not key.startswith("_")}
    source_config = {"network": network, "schedule": asdict(schedule), "prediction": prediction}
    return source_config, {"id": prior_id, "digest": ""}, ""


# -- comparison with the files -----------------------------------------------------------------------------------------


def _faults(path: Path, part: str, tensors: Mapping[str, Tensor], expected: _Expected) -> str:
    """A message with everything in a file that does not fit; "" if all fits."""
    expected_shapes = expected.layout[part]
    common = [(key, tensors[key]) for key in expected_shapes if key in tensors]
    keys_by_fault = {
        "missing": [key for key in expected_shapes if key not in tensors],
        "unexpected": [key for key in tensors if key not in expected_shapes],
        "of the wrong shape": [
            f"{key} is {list(tensor.shape)} instead of {list(expected_shapes[key])}"
            for key, tensor in common
            if tuple(tensor.shape) != expected_shapes[key]
        ],
        "not floating point": [f"{key} is {t.dtype}" for key, t in common if not t.is_floating_point()],
        "with values that are not finite": [key for key, t in common if t.is_floating_point() and not all_finite(t)],
    }
    faults = key_faults(keys_by_fault)
    if not faults:
        return ""
    count = sum(torch.Size(shape).numel() for shape in expected_shapes.values())
    return (
        f"{path}: does not fit InstaRevive's {part} of the {expected.config['family']} family "
        f"({len(expected_shapes)} tensors, {count:,} parameters): {faults}{_looks_like(tensors, expected)}"
    )


def _looks_like(tensors: Mapping[str, Tensor], expected: _Expected) -> str:
    """A hint with the sizes of a DiT, from its shapes, that differ from the expected ones; "" if none do."""
    patch, caption = tensors.get("pos_embed.proj.weight"), tensors.get("caption_projection.linear_1.weight")
    if expected.config["family"] != "pixart" or patch is None or patch.ndim != 4 or caption is None:
        return ""
    expected_sizes = expected.config["network"]
    layers = {key.split(".")[1] for key in tensors if key.startswith("transformer_blocks.")}
    file_sizes = {
        "num_layers": len(layers),
        "in_channels": patch.shape[1],
        "patch_size": patch.shape[2],
        "caption_channels": caption.shape[1],
    }
    differences = [f"network.{name}={value}" for name, value in file_sizes.items() if value != expected_sizes.get(name)]
    width = expected_sizes["num_attention_heads"] * expected_sizes["attention_head_dim"]
    if patch.shape[0] != width:
        differences.append(f"network.num_attention_heads x network.attention_head_dim = {patch.shape[0]}")
    return (
        f". The file looks like {' '.join(differences)}: give these as KEY=VALUE if they are right"
        if differences
        else ""
    )
