"""SUPIR's released weights, import and export: SUPIR-v0Q.ckpt or SUPIR-v0F.ckpt <-> a model folder (supir.md, 1.4).

A released file holds what SUPIR adds to SDXL, under the names of the authors' framework: the control encoder, the
connectors and the robust encoder. A model folder holds the first two as part "adaptor" and the last as part "encoder",
under the names of our networks. An import compares every key and shape with the layout for the prior's configuration,
which is computed on the meta device. An export writes the same tensors, to the byte.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from safetensors.torch import save_file
from torch import Tensor, nn

from components.models import Model, ModelError, file_sha256, key_faults, load_model
from components.naming import list_some
from components.priors.autoencoder import SpaceToDepthAutoencoder
from components.priors.encoder_copy import unet_skeleton
from components.priors.hub import PriorShape, prior_shape
from components.priors.robust_encoder import RobustEncoder
from components.priors.sdxl_config import LICENCES, SDXL
from components.priors.sdxl_keys import (
    autoencoder_table,
    checkpoint_shape,
    encoder_table,
    inverse,
    part_of,
    translate_key,
)
from components.state_dicts import without_prefix
from components.systems.importing import finish_import
from components.systems.supir.config import AdaptorConfig, adaptor_config
from components.systems.supir.connectors import places_of
from components.systems.supir.network import ADAPTOR, Adaptor
from components.systems.supir.network import ENCODER as ROBUST
from components.systems.supir.released import (
    CONNECTORS,
    CONTROL,
    ENCODER,
    FILE_NAMES,
    LICENCE,
    OF_THE_PRIOR,
    PERMITTED_USE,
    PUBLISHED_PARAMETERS,
    RELEASE_DEFAULTS,
    RELEASED,
    SIDECAR,
    check_sizes,
)
from components.systems.weights_io import ExportReport, ImportJob, ImportReport, WeightsSource, valid_entries
from components.tensor_files import WeightsFileError, all_finite, read_weights
from components.writing import whole_file

HINT = {"input_hint_block.0": "hint_conv"}
"""The control encoder's layer that SDXL lacks: checkpoint -> our module."""

GROUPS = {CONTROL: "control encoder", CONNECTORS: "connectors", ENCODER: "robust encoder"}
"""What a released file must hold, by the beginning of its keys."""

SHORTENED = {
    "control_model.": CONTROL,
    "diffusion_model.": "model.diffusion_model.",
    "project_modules.": CONNECTORS,
}
"""Keys of a file that lacks the robust encoder lose their common beginning (see components.state_dicts)."""

PRIOR_NOUNS = {
    "model": "of the UNet",
    "first_stage_model": "of the autoencoder",
    "conditioner": "of the texts",
    "denoiser": "of the schedule",
}
"""For the note on a prior's own tensors in a file, by the first part of their keys."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Place:
    """Where a released tensor belongs in a model folder.

    Attributes:
        part, key: of the model folder. own: its shape there. released: its shape in a released file.
    """

    part: str
    key: str
    own: Shape
    released: Shape


@dataclass(frozen=True, kw_only=True)
class _Expected:
    """What an import expects of the file.

    Attributes:
        shape: sizes of the prior. config: of the adaptor. file_sizes: the sizes that the file's keys show.
        places: by released key.
    """

    shape: PriorShape
    config: AdaptorConfig
    file_sizes: Mapping[str, Any]
    places: Mapping[str, Place]


def import_weights(job: ImportJob) -> ImportReport:
    """Turn one released file into a model folder. SUPIR has no picture encoder beside its robust encoder.

    Without a prior the sidecar's counts, else SDXL base; without sizes the sidecar's, else those that the keys show.

    Raises:
        WeightsFileError: the file cannot be read or does not hold a SUPIR.
        ModelError: keys, shapes or numbers do not fit (the message names all), or there is no such prior.
        ValueError: wrong sizes, more than one file, or a picture encoder.
    """
    _check_no_image_encoder(job.image_encoder)
    if len(job.files) != 1:
        raise ValueError(f"a SUPIR is one file, got {', '.join(path.name for path in job.files)}")
    path = job.files[0]
    job.progress(0, 1, path.name)
    sidecar = _sidecar(path)
    tensors, notes = _read(path)
    expected = _expect(tensors, sidecar, job.prior, job.sizes)
    _check(path, tensors, expected)
    parts = _parts(tensors, expected.places)
    sha256 = file_sha256(path)
    sources = tuple(
        WeightsSource(
            file=path.name,
            part=part,
            sha256=sha256,
            tensors=len(part_tensors),
            parameters=sum(tensor.numel() for tensor in part_tensors.values()),
        )
        for part, part_tensors in parts.items()
    )
    sidecar, dropped_notes = valid_entries(sidecar, sources[:1])
    notes = [*dropped_notes, *notes]
    if expected.shape.note:
        notes.append(f"{expected.shape.note}; get them before restoring")
    published = sum(source.parameters for source in sources) == PUBLISHED_PARAMETERS
    return finish_import(
        job,
        system="supir",
        parts=parts,
        sources=sources,
        sidecar=sidecar,
        config={ADAPTOR: expected.config.to_dict()},
        prior=expected.shape.source(),
        restore_options=RELEASE_DEFAULTS,
        licence=LICENCE if published else "unstated",
        permitted_use=_permitted_use(expected.shape, published and not job.licence),
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
    """Write a model folder as one file for the authors' tools: released keys, shapes, and the tensors' own dtypes.

    Args:
        model: model folder or name.
        folder: for the file, renamed into place when it is complete, and for restoray.json with what it does not hold.
        spelling: "released" is the only one.
        form: "pt" (the released pickle) or "safetensors".
        write: False only returns the plan.

    Raises:
        ModelError: no such model or prior, a model of another system or without an adaptor, or one that does not fit
            its own config.
        ValueError: unknown spelling or form.
    """
    if spelling != "released" or form not in ("pt", "safetensors"):
        raise ValueError("spelling must be released and form pt or safetensors")
    source = load_model(model)
    if source.info["system"] != "supir":
        raise ModelError(f"{source.path}: holds a {source.info['system']} model, not a SUPIR")
    config, prior = source.info["config"].get(ADAPTOR), source.info.get("prior") or {}
    if config is None or ADAPTOR not in source.info["parts"]:
        raise ModelError(f"{source.path}: has no adaptor yet, and the released file holds both: train its stage first")
    shape = prior_shape(str(prior.get("id") or SDXL), "")
    tensors = _released_tensors(source, _places(shape, unet_skeleton(shape.unet), adaptor_config(config)))
    notes = []
    if shape.digest:
        notes.append(f"the authors' tools read a SUPIR of SDXL; the prior of this one is {shape.id}")
    if differences := {k: v for k, v in config.items() if v != AdaptorConfig().to_dict().get(k)}:
        notes.append(f"the authors' tools read the released sizes; this adaptor has {_as_options(differences)}")
    origins = [file for file in source.info.get("parents") or {} if file in FILE_NAMES]
    stem = Path(origins[0] if origins else RELEASED["network"]).stem
    name = f"{stem}.ckpt" if form == "pt" else f"{stem}.safetensors"
    digest = ""
    if write:
        folder.mkdir(parents=True, exist_ok=True)
        with whole_file(folder / name) as draft:
            if form == "pt":
                torch.save(tensors, draft.temporary)
            else:
                save_file(tensors, draft.temporary)
        digest = file_sha256(folder / name)
        keys = ("name", "recipe", "prior", "licence", "permitted_use", "data_manifest_digest", "metrics", "parents")
        sidecar = {
            "system": "supir",
            "exported_from": source.digest,
            "config": dict(source.info["config"]),
            "files": {name: digest},
            **{key: source.info.get(key) for key in keys},
        }
        (folder / SIDECAR).write_text(json.dumps(sidecar, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    count = sum(tensor.numel() for tensor in tensors.values())
    return ExportReport(folder=str(folder), files={name: digest}, parameters=count, notes=tuple(notes))


def expected_layout(
    prior: str = "", image_encoder: str = "", sizes: Mapping[str, Any] | None = None
) -> dict[str, dict[str, Shape]]:
    """Every key and shape of the released file, for a prior and sizes as import_weights takes them."""
    _check_no_image_encoder(image_encoder)
    places = _expect({}, {}, prior, sizes or {}).places
    return {RELEASED["network"]: {key: place.released for key, place in places.items()}}


def _check_no_image_encoder(image_encoder: str) -> None:
    if image_encoder:
        raise ValueError("SUPIR has no picture encoder: leave it out")


# -- what an import expects --------------------------------------------------------------------------------------------


def _sidecar(path: Path) -> dict[str, Any]:
    """The content of restoray.json next to the file; {} if there is none."""
    place = path.parent / SIDECAR
    if not place.is_file():
        return {}
    try:
        sidecar = json.loads(place.read_text(encoding="utf-8"))
        if sidecar["system"] == "supir" and isinstance(sidecar["config"][ADAPTOR], dict):
            return dict(sidecar)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsFileError(f"{place}: not the format of an export ({type(error).__name__}: {error})") from error
    raise WeightsFileError(f"{place}: describes a {sidecar['system']} model, not a SUPIR with an adaptor")


def _expect(
    tensors: Mapping[str, Tensor], sidecar: Mapping[str, Any], prior: str, sizes: Mapping[str, Any]
) -> _Expected:
    """What a file must hold; the sizes that nobody gives follow from its keys."""
    checked = check_sizes(sizes)
    shape = prior_shape(prior or str((sidecar.get("prior") or {}).get("id") or SDXL), "")
    unet = unet_skeleton(shape.unet)
    file_sizes = sizes_of(tensors, unet)
    config = adaptor_config({**file_sizes, **(sidecar.get("config") or {}).get(ADAPTOR, {}), **checked})
    return _Expected(shape=shape, config=config, file_sizes=file_sizes, places=_places(shape, unet, config))


def sizes_of(keys: Iterable[str], unet: Any) -> dict[str, Any]:
    """AdaptorConfig's fields as far as the keys of a released file show them; depths of a prior's own give [].

    Args:
        unet: of the prior; its depths are the most that an adaptor can have, so deeper ones are not shown.
    """
    sizes: dict[str, Any] = {}
    layers, own = int(unet.config["layers_per_block"]), _own_depths(unet)
    depths, numbers, kinds = [0] * len(own), set[int](), set[str]()
    for key in keys:
        if match := _BLOCK.match(key):
            level = len(own) - 1 if match["input"] is None else (int(match["input"]) - 1) // (layers + 1)
            if 0 <= level < len(own):
                depths[level] = max(depths[level], 1 + int(match["block"]))
        elif match := _CONNECTOR.match(key):
            numbers.add(int(match["number"]))
            kinds.add(match["module"])
    if any(depths):
        depths = [max(1, min(depth or most, most)) for depth, most in zip(depths, own, strict=True)]
        sizes["transformer_depth"] = [] if depths == [max(1, most) for most in own] else depths
    if kinds - {"attn", "norm1", "norm2"}:
        sizes["connector"] = "zero_conv" if kinds <= {"attn", "norm1", "norm2", "zero_conv"} else "zero_sft"
    plain = len(places_of(unet, cross_attention=False))
    if numbers and plain < len(places_of(unet)):
        sizes["cross_attention"] = "attn" in kinds or len(numbers) > plain
    return sizes


_BLOCK = re.compile(
    re.escape(CONTROL)
    + r"(?:input_blocks\.(?P<input>\d{1,6})|middle_block)\.\d+\.transformer_blocks\.(?P<block>\d{1,6})\."
)
_CONNECTOR = re.compile(re.escape(CONNECTORS) + r"(?P<number>\d{1,6})\.(?P<module>\w+)\.")


def _own_depths(unet: Any) -> list[int]:
    """Transformer blocks by level, 0 for a level without attention; the middle block counts to the last level."""
    levels = [getattr(block, "attentions", None) for block in unet.down_blocks]
    depths = [len(attentions[0].transformer_blocks) if attentions else 0 for attentions in levels]
    middle = getattr(unet.mid_block, "attentions", None)
    return [*depths[:-1], max(depths[-1], len(middle[0].transformer_blocks) if middle else 0)]


def _places(shape: PriorShape, unet: Any, config: AdaptorConfig) -> dict[str, Place]:
    """The place of every tensor by its released key.

    Raises:
        ModelError: the prior's folder does not say what its autoencoder is.
        ValueError: the prior's UNet has no adaptor of these sizes.
    """
    own = _own_depths(unet)
    if any(depth > most > 0 for depth, most in zip(config.transformer_depth, own, strict=False)):
        depths = list(config.transformer_depth)
        raise ValueError(f"transformer_depth {depths} is more than the prior's own {own} ({shape.id})")
    adaptor, autoencoder = Adaptor(unet, config), _autoencoder(shape)
    encoder_names: dict[str, str] | None = None  # another autoencoder's encoder keeps our own names
    if isinstance(autoencoder, AutoencoderKL):
        encoder_names = part_of(autoencoder_table(dict(autoencoder.config)), "encoder")
    control_names = encoder_table(unet.config) | HINT
    return (
        _places_of_module(adaptor.control, CONTROL, ADAPTOR, "control.", control_names)
        | _places_of_module(adaptor.connectors, CONNECTORS, ADAPTOR, "connectors.", None)
        | _places_of_module(RobustEncoder(autoencoder).encoder, ENCODER, ROBUST, "encoder.", encoder_names)
    )


def _places_of_module(
    module: nn.Module, beginning: str, part: str, prefix: str, table: Mapping[str, str] | None
) -> dict[str, Place]:
    """The places of one module's parameters.

    Args:
        beginning: of the released keys.
        part, prefix: of the model folder's keys.
        table: module names checkpoint -> ours; None if both are equal.
    """
    back, places = None if table is None else inverse(table), dict[str, Place]()
    for name, parameter in module.named_parameters():
        key = name if back is None else translate_key(name, back)
        if key is None:
            raise ModelError(
                f"the prior's networks are not of SDXL's kind: a checkpoint has no name for {prefix}{name}"
            )
        own = tuple(parameter.shape)
        places[beginning + key] = Place(part, prefix + name, own, checkpoint_shape(key, own))
    return places


def _autoencoder(shape: PriorShape) -> nn.Module:
    """The prior's autoencoder on the meta device."""
    with torch.device("meta"):
        if shape.digest:  # one of our own priors
            return SpaceToDepthAutoencoder(**shape.autoencoder)
        if "block_out_channels" not in shape.autoencoder:
            raise ModelError(f"{shape.id}: no vae/config.json of an AutoencoderKL, whose encoder SUPIR copies")
        return AutoencoderKL.from_config(dict(shape.autoencoder))  # type: ignore[no-any-return]


def _permitted_use(shape: PriorShape, published: bool) -> str:
    own = PERMITTED_USE if published else "as the licences allow"
    return f"{own}; of the prior {shape.id}: {LICENCES.get(shape.id, 'see there')}"


# -- files -------------------------------------------------------------------------------------------------------------


def _read(path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of a file by released key without those of the prior, and notes on what was left out."""
    tensors, notes = read_weights(path)
    try:
        tensors, more = without_prefix(tensors, (f"{CONTROL}input_hint_block.0.weight",), path.name)
    except ValueError as error:
        raise WeightsFileError(f"{path}: {error}") from error
    notes += more
    if not any(key.startswith("model.") for key in tensors):
        tensors = {_lengthen(key): tensor for key, tensor in tensors.items()}
    own = {k: tensor for k, tensor in tensors.items() if not k.startswith(OF_THE_PRIOR) or k.startswith(CONNECTORS)}
    counts = Counter(key.split(".")[0] for key in tensors if key not in own)
    if counts:
        kinds = ", ".join(f"{counts[kind]} {noun}" for kind, noun in PRIOR_NOUNS.items() if kind in counts)
        notes.append(f"{path.name}: left out {counts.total()} tensors of the prior itself ({kinds})")
    if not any(key.startswith(tuple(GROUPS)) for key in own):
        raise WeightsFileError(
            f"{path}: not a SUPIR: no key begins with {' or '.join(GROUPS)}; it holds {list_some(sorted(tensors), 120)}"
        )
    return own, notes


def _lengthen(key: str) -> str:
    """A key with the beginning that all keys of a file without the robust encoder have lost."""
    beginning = next((short for short in SHORTENED if key.startswith(short)), "")
    return SHORTENED[beginning] + key.removeprefix(beginning) if beginning else key


def _check(path: Path, tensors: Mapping[str, Tensor], expected: _Expected) -> None:
    """Raises ModelError with everything that does not fit."""
    places = expected.places
    common = [(key, tensors[key], place.released) for key, place in places.items() if key in tensors]
    keys_by_fault = {
        "missing": [key for key in places if key not in tensors],
        "unexpected": [key for key in tensors if key not in places],
        "of the wrong shape": [
            f"{key} is {list(tensor.shape)} instead of {list(shape)}"
            for key, tensor, shape in common
            if tuple(tensor.shape) != shape
        ],
        "not floating point": [f"{key} is {t.dtype}" for key, t, _ in common if not t.is_floating_point()],
        "with values that are not finite": [key for key, t, _ in common if t.is_floating_point() and not all_finite(t)],
    }
    faults = key_faults(keys_by_fault)
    if not faults:
        return
    absent = [
        f"no {noun} ({beginning}*)"
        for beginning, noun in GROUPS.items()
        if not any(key.startswith(beginning) for key in tensors)
    ]
    lacking = f"it holds {' and '.join(absent)}, and all parts are needed; " if absent else ""
    count = sum(torch.Size(place.released).numel() for place in places.values())
    raise ModelError(
        f"{path}: does not fit SUPIR on the prior {expected.shape.id} ({len(places)} tensors, {count:,} parameters): "
        f"{lacking}{faults}{_looks_like(expected)}"
    )


def _looks_like(expected: _Expected) -> str:
    """A hint with the sizes that the file's keys show and that differ from the expected ones; "" if none do."""
    config = expected.config.to_dict()
    differences = {name: value for name, value in expected.file_sizes.items() if value != config[name]}
    return f". The keys look like {_as_options(differences)}: give these if they are right" if differences else ""


def _as_options(sizes: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in sizes.items())


def _parts(tensors: Mapping[str, Tensor], places: Mapping[str, Place]) -> dict[str, dict[str, Tensor]]:
    """The tensors of a model folder by part."""
    parts: dict[str, dict[str, Tensor]] = {ADAPTOR: {}, ROBUST: {}}
    for key, place in places.items():
        parts[place.part][place.key] = tensors[key].reshape(place.own)
    return parts


def _released_tensors(model: Model, places: Mapping[str, Place]) -> dict[str, Tensor]:
    """The tensors of a released file. Raises ModelError if a part does not fit the model's own config."""
    parts = {part: model.part(part) for part in (ADAPTOR, ROBUST)}
    for part, tensors in parts.items():
        shapes = {place.key: place.own for place in places.values() if place.part == part}
        if {key: tuple(tensor.shape) for key, tensor in tensors.items()} != shapes:
            raise ModelError(f"{model.path}: part {part} does not fit the model's own config")
    return {key: parts[place.part][place.key].reshape(place.released) for key, place in places.items()}
