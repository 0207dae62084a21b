"""InstaRevive's released weights, in and out: InstaRevive_v1.ckpt <-> a model folder (layout: reference, section 1).

The file is a flat dictionary under diffusers' names. An import compares every key and shape with what the configuration
asks for, on the meta device; an export writes the tensors as they were read, to the byte. The same layout carries the
other families, which their authors never released; restoray.json beside the file then tells what it is.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from components.models import ModelCard, ModelError, file_sha256, load_model, save_model
from components.naming import did_you_mean
from components.priors.files import read_json
from components.priors.hub import find_folder
from components.priors.one_text_config import LICENCES, PIXART, PIXART_DIT, PIXART_SCHEDULE, SD21, SD21_UNET
from components.priors.scheduler_config import read_schedule
from components.priors.sdxl_config import LICENCES as SDXL_LICENCES
from components.priors.sdxl_config import SDXL, SDXL_UNET
from components.samplers.schedules import Schedule, schedule_from
from components.systems.instarevive.network import FAMILIES, OneStep, aligning_conv, build_network, check_prediction
from components.systems.instarevive.released import LICENCE, RELEASED, SIDECAR, check_sizes
from components.systems.instarevive.settings import PRIORS
from components.systems.weights_io import Exported, Imported, WeightsSource, own_words
from components.tensor_files import WeightsFileError, read_tensors

Shapes = dict[str, tuple[int, ...]]

PUBLISHED_PARAMETERS = 610_856_096
"""Of PixArt's DiT at 512 (reference, section 8; the paper says 611M)."""

TABLES = ("pos_embed.pos_embed",)
"""Keys of older diffusers that follow from the sizes alone: left out."""

_SIZES: Mapping[str, Mapping[str, Any]] = {PIXART: PIXART_DIT, SD21: SD21_UNET, SDXL: SDXL_UNET}


@dataclass(frozen=True, kw_only=True)
class _Expected:
    """What files are compared with.

    Attributes:
        config: as model.json keeps it. prior: what finds it again. layout: shapes by key, by part. note: for people.
    """

    config: Mapping[str, Any]
    prior: Mapping[str, str]
    layout: Mapping[str, Shapes]
    note: str = ""


def import_weights(
    files: Sequence[Path],
    out: Path | None,
    *,
    prior: str = "",
    image_encoder: str = "",
    sizes: Mapping[str, Any] | None = None,
    name: str = "",
    licence: str = "",
    proceed: Callable[[Imported], bool] = lambda plan: True,
    progress: Callable[[int, int, str], None] = lambda done, of, note: None,
) -> Imported:
    """Turn released files into a model folder.

    Args:
        files: the generator's, and for one that takes noise the aligning convolution's; told apart by their keys.
        out: the folder to make; replaced as a whole, at the end. None only checks.
        prior: what the generator stands on; default: what a sidecar says, else the family's own.
        image_encoder: must be empty: InstaRevive looks at pictures with its autoencoder alone.
        sizes: see released.check_sizes; default: what a sidecar says, else PixArt's at 512.
        name: of the model; default: the folder's.
        licence: replaces what is said of the weights' licence.
        proceed: asked once everything was checked, with what would be imported; False writes nothing.
        progress: told (files done, files, file).

    Raises:
        WeightsFileError: a file cannot be read.
        ModelError: keys, shapes or numbers do not fit (all of them are named), or no such prior or coarse restorer.
        ValueError: wrong sizes, or files that are not one of each.
    """
    if image_encoder:
        raise ValueError("InstaRevive has no picture encoder: leave it out")
    said = _sidecar(files)
    expected = _expected(said, prior, sizes or {})
    read: dict[str, tuple[Path, dict[str, Tensor]]] = {}
    notes = [expected.note] if expected.note else []
    for number, path in enumerate(files):
        progress(number, len(files), path.name)
        tensors = read_tensors(path, inside="state_dict")
        part = "align" if set(tensors) <= {"weight", "bias"} else "generator"
        if part in read:
            raise ValueError(f"{read[part][0]} and {path} both hold the {part}: give one of them")
        tables = [key for key in TABLES if tensors.pop(key, None) is not None]
        notes += [f"{path.name}: {key} follows from the sizes and was left out" for key in tables]
        read[part] = (path, tensors)
    lacking = set(expected.layout) - set(read)
    if lacking:
        raise ValueError(f"no file for {' and '.join(sorted(lacking))}: an InstaRevive of these sizes needs it too")
    if set(read) - set(expected.layout):
        raise ValueError(f"{read['align'][0]}: a generator without noise has no aligning convolution; give input=noise")
    faults = [text for part, (path, tensors) in read.items() if (text := _faults(path, part, tensors, expected))]
    if faults:
        raise ModelError("\n".join(faults))
    sources = tuple(
        WeightsSource(
            file=path.name,
            part=part,
            sha256=file_sha256(path),
            tensors=len(tensors),
            parameters=sum(tensor.numel() for tensor in tensors.values()),
        )
        for part, (path, tensors) in read.items()
    )
    said, foreign = own_words(said, sources)
    notes += foreign
    published = sources[0].parameters == PUBLISHED_PARAMETERS
    card = ModelCard(
        name=name or said.get("name") or (out.name if out else "instarevive"),
        system="instarevive",
        recipe=said.get("recipe") or {},
        prior=expected.prior,
        config=expected.config,
        parents={source.file: f"sha256:{source.sha256}" for source in sources},
        data_manifest_digest=said.get("data_manifest_digest") or "",
        licence=licence or said.get("licence") or (LICENCE if published else "unstated"),
        permitted_use=said.get("permitted_use") or _permitted_use(str(expected.prior["id"])),
        metrics=said.get("metrics") or {},
    )
    if expected.config["coarse"] is None:
        notes.append("no coarse restorer is recorded: give coarse=MODEL, made by restoray weights import swinir")
    result = Imported(
        model=None,
        digest="",
        sources=sources,
        prior=expected.prior,
        config=expected.config,
        licence=card.licence,
        permitted_use=card.permitted_use,
        notes=tuple(notes),
    )
    if out is not None and proceed(result):
        out.parent.mkdir(parents=True, exist_ok=True)
        model = save_model(out, card, {part: tensors for part, (_, tensors) in read.items()})
        result = replace(result, model=str(model.path), digest=model.digest)
    progress(len(files), len(files), "")
    return result


def export_weights(
    model: str | Path,
    folder: Path,
    *,
    spelling: str = "released",
    form: str = "pt",
    write: bool = True,
) -> Exported:
    """Write a model folder's generator as the released tools read it: the released keys in their order.

    Args:
        model: model folder or name.
        folder: receives the files, each renamed into place when it is whole, and restoray.json with what they do not
            tell, for an import without options.
        spelling: "released" is the only one.
        form: "pt" (the released pickle) or "safetensors".
        write: False only says what would be written.

    Raises:
        ModelError: no such model, none of InstaRevive, or one that does not fit its own config.
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
        notes.append(f"the authors' tools know no noise: {RELEASED['align']} goes beside what they read")
    wanted = layout(config)
    files: dict[str, str] = {}
    parameters = 0
    if write:
        folder.mkdir(parents=True, exist_ok=True)
    for part, tensors in source.parts().items():
        name = RELEASED[part] if form == "pt" else f"{Path(RELEASED[part]).stem}.safetensors"
        if {key: tuple(tensor.shape) for key, tensor in tensors.items()} != wanted[part]:
            raise ModelError(f"{source.path}: part {part} does not fit the model's own config")
        parameters += sum(tensor.numel() for tensor in tensors.values())
        files[name] = ""
        if write:
            temporary = folder / f".{name}.writing"
            if form == "pt":
                torch.save({key: tensors[key] for key in wanted[part]}, temporary)
            else:
                save_file(tensors, temporary)
            os.replace(temporary, folder / name)
            files[name] = file_sha256(folder / name)
    told = ("name", "recipe", "prior", "licence", "permitted_use", "data_manifest_digest", "metrics", "parents")
    sidecar = {
        "system": "instarevive",
        "exported_from": source.digest,
        "config": dict(config),
        "files": files,
        **{key: source.info.get(key) for key in told},
    }
    if write:
        (folder / SIDECAR).write_text(json.dumps(sidecar, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return Exported(folder=str(folder), files=files, parameters=parameters, notes=tuple(notes))


def expected_layout(
    prior: str = "", image_encoder: str = "", sizes: Mapping[str, Any] | None = None
) -> dict[str, Shapes]:
    """Every key and shape by released file, for a prior and sizes as import_weights takes them."""
    if image_encoder:
        raise ValueError("InstaRevive has no picture encoder: leave it out")
    return {RELEASED[part]: shapes for part, shapes in _expected({}, prior, sizes or {}).layout.items()}


def layout(config: Mapping[str, Any]) -> dict[str, Shapes]:
    """Shapes by key, by part, of a model folder's config; computed without memory.

    Raises:
        ValueError: the config makes no network.
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


# -- what is expected --------------------------------------------------------------------------------------------------


def _sidecar(files: Sequence[Path]) -> dict[str, Any]:
    """What restoray.json beside the files says; {} where there is none."""
    for folder in dict.fromkeys(path.parent for path in files):
        path = folder / SIDECAR
        if not path.is_file():
            continue
        try:
            said = json.loads(path.read_text(encoding="utf-8"))
            if said["system"] == "instarevive" and isinstance(said["config"]["network"], dict):
                return dict(said)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise WeightsFileError(f"{path}: not as an export writes it ({type(error).__name__}: {error})") from error
        raise WeightsFileError(f"{path}: describes a {said['system']} model, not one of InstaRevive")
    return {}


def _expected(said: Mapping[str, Any], prior: str, sizes: Mapping[str, Any]) -> _Expected:
    given = check_sizes(sizes)
    config = dict(said.get("config") or {})
    family = str(given.get("family") or config.get("family") or "pixart")
    if family not in FAMILIES:
        raise ValueError(f"unknown generator family {family!r}. {did_you_mean(family, FAMILIES)}")
    if config and config["family"] != family:
        raise ValueError(f"the file's {SIDECAR} says that it is of the {config['family']} family, not {family}")
    recorded = said.get("prior") or {}
    name = prior or str(recorded.get("id") or PRIORS[family])
    try:
        known, source, note = _known(family, name)
    except ModelError:
        if not config or prior:
            raise
        known, source, note = config, dict(recorded), f"the prior {name} is not on this machine"
    usual = {"prediction": "epsilon", "mask_as_bias": False, **known, **config}
    named = ("timestep", "input", "kernel")
    one_step = OneStep(**{**(config.get("one_step") or {}), **{k: given[k] for k in named if k in given}})
    coarse = config.get("coarse")
    if "coarse" in given:
        model = load_model(given["coarse"])
        if model.info["system"] != "swinir":
            raise ModelError(f"{model.path}: holds a {model.info['system']} model, not a coarse restorer (swinir)")
        coarse = {"id": str(model.path.resolve()), "digest": model.digest}
    made = {
        "family": family,
        "network": {**usual["network"], **given.get("network", {})},
        "schedule": usual["schedule"],
        "prediction": given.get("prediction", usual["prediction"]),
        "mask_as_bias": given.get("mask_as_bias", usual["mask_as_bias"]),
        "one_step": asdict(one_step),
        "coarse": coarse,
    }
    check_prediction(made["prediction"], schedule_from(made["schedule"]))
    if note:
        note += "; bring it before restoring"
    return _Expected(config=made, prior=source, layout=layout(made), note=note)


def _known(family: str, name: str) -> tuple[dict[str, Any], dict[str, str], str]:
    """(network, schedule and prediction of a prior, what finds it again, a note) from its configuration files.

    Raises:
        ModelError: no such prior, or a model that is none.
    """
    if family in ("nano", "sdxl"):
        try:
            model = load_model(name)
        except ModelError as error:
            if family == "nano" or "nor a shipped model" not in str(error):
                raise
        else:
            if model.info["system"] != "prior":
                raise ModelError(f"{model.path}: holds a {model.info['system']} model, not a prior")
            config = model.info["config"]
            where = name if name == PRIORS["nano"] else str(model.path.resolve())
            found = {"network": dict(config["unet"]), "schedule": asdict(Schedule(**config["schedule"]))}
            return found, {"id": where, "digest": model.digest}, ""
    part = "transformer" if family == "pixart" else "unet"
    file = f"{part}/config.json"
    try:
        folder, found_id = find_folder(name, (file,), (file, "scheduler/*.json"), {})
    except ModelError:
        if name not in _SIZES:
            raise
        usual = Schedule(**PIXART_SCHEDULE) if family == "pixart" else Schedule()
        note = f"{name} is not on this machine: its published sizes were taken"
        return {"network": dict(_SIZES[name]), "schedule": asdict(usual)}, {"id": name, "digest": ""}, note
    schedule, prediction = read_schedule(folder)
    network = {key: value for key, value in read_json(folder / file).items() if not key.startswith("_")}
    made = {"network": network, "schedule": asdict(schedule), "prediction": prediction}
    return made, {"id": found_id, "digest": ""}, ""


def _permitted_use(prior: str) -> str:
    return f"as the licences allow; of the prior {prior}: {({**LICENCES, **SDXL_LICENCES}).get(prior, 'see there')}"


# -- what the files hold -----------------------------------------------------------------------------------------------


def _faults(path: Path, part: str, tensors: Mapping[str, Tensor], expected: _Expected) -> str:
    """Everything about a file that does not fit; "" where all does."""
    wanted = expected.layout[part]
    shared = [(key, tensors[key]) for key in wanted if key in tensors]
    kinds = {
        "missing": [key for key in wanted if key not in tensors],
        "unexpected": [key for key in tensors if key not in wanted],
        "of the wrong shape": [
            f"{key} is {list(tensor.shape)} instead of {list(wanted[key])}"
            for key, tensor in shared
            if tuple(tensor.shape) != wanted[key]
        ],
        "no floating point numbers": [f"{key} is {t.dtype}" for key, t in shared if not t.is_floating_point()],
        "with values that are no finite numbers": [
            key for key, t in shared if t.is_floating_point() and not bool(t.isfinite().all())
        ],
    }
    told = [f"{len(keys)} {what}: {', '.join(keys)}" for what, keys in kinds.items() if keys]
    if not told:
        return ""
    count = sum(torch.Size(shape).numel() for shape in wanted.values())
    return (
        f"{path}: does not fit InstaRevive's {part} of the {expected.config['family']} family "
        f"({len(wanted)} tensors, {count:,} parameters): {'; '.join(told)}{_looks_like(tensors, expected)}"
    )


def _looks_like(tensors: Mapping[str, Tensor], expected: _Expected) -> str:
    """Sizes of a DiT that its shapes tell where they are others than expected."""
    patch, caption = tensors.get("pos_embed.proj.weight"), tensors.get("caption_projection.linear_1.weight")
    if expected.config["family"] != "pixart" or patch is None or patch.ndim != 4 or caption is None:
        return ""
    ours = expected.config["network"]
    layers = {key.split(".")[1] for key in tensors if key.startswith("transformer_blocks.")}
    found = {
        "num_layers": len(layers),
        "in_channels": patch.shape[1],
        "patch_size": patch.shape[2],
        "caption_channels": caption.shape[1],
    }
    told = [f"network.{name}={value}" for name, value in found.items() if value != ours.get(name)]
    width = ours["num_attention_heads"] * ours["attention_head_dim"]
    if patch.shape[0] != width:
        told.append(f"network.num_attention_heads x network.attention_head_dim = {patch.shape[0]}")
    return f". The file looks like {' '.join(told)}: give these as KEY=VALUE if that is meant" if told else ""
