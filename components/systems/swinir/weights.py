"""DiffBIR's published SwinIR files: import to and export from model folders (layout: instarevive.md section 1).

The authors' files hold the parameters and two kinds of tables, which follow from the sizes alone. A table may be
missing in a file; otherwise it must be right. An export writes the tables, since the authors' tools require them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from components.models import (
    Model,
    ModelError,
    file_sha256,
    key_faults,
    load_model,
    load_strictly,
)
from components.naming import list_some
from components.state_dicts import without_prefix
from components.systems.importing import finish_import
from components.systems.swinir.config import SwinIRConfig
from components.systems.swinir.network import SwinIR
from components.systems.swinir.options import restore_defaults
from components.systems.swinir.released import FILE_NAMES, LICENCE, PART, RELEASED, SIDECAR, check_sizes
from components.systems.weights_io import ExportReport, ImportJob, ImportReport, WeightsSource, valid_entries
from components.tensor_files import WeightsFileError, all_finite, read_weights
from components.writing import whole_file

_FIRST = "conv_first.1.weight"
_BIAS, _INDEX = "attn.relative_position_bias_table", "attn.relative_position_index"


Shapes = dict[str, tuple[int, ...]]


def parameters_of(network: nn.Module) -> dict[str, Tensor]:
    """The trained tensors by released key, without the tables."""
    return {name: parameter.detach() for name, parameter in network.named_parameters()}


def load_swinir(tensors: Mapping[str, Tensor], config: SwinIRConfig, what: str) -> SwinIR:
    """A network with the weights of a file or a part, in evaluation mode.

    Args:
        tensors: by released key, with or without the tables.
        config: its size.
        what: their origin, for messages.

    Raises:
        ModelError: the message names every missing, unexpected or misshapen key, and tables of another size.
    """
    network = SwinIR(config)
    complete = {**dict(network.named_buffers()), **tensors}
    wrong = [
        key
        for key, table in network.named_buffers()
        if complete[key].shape == table.shape and not torch.equal(complete[key].to(table.dtype), table)
    ]
    if wrong:
        raise ModelError(f"{what}: {list_some(wrong)}: not the tables of a network of this size")
    load_strictly(network, complete, what)
    return network.eval()


def read_swinir(path: Path, sizes: Mapping[str, Any] | None = None) -> SwinIR:
    """The network in a published or exported file; its sizes follow from the shapes.

    Args:
        path: safetensors or a pickle; see components.state_dicts for what training tools put around the tensors.
        sizes: SwinIRConfig's fields; they override those from the shapes.

    Raises:
        WeightsFileError: unreadable, or not a SwinIR.
        ModelError: keys, shapes or tables do not fit.
        ValueError: wrong sizes.
    """
    tensors, _ = _read(path)
    return load_swinir(tensors, _config(path, tensors, check_sizes(sizes or {})), str(path))


def _read(path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of a file by released key, and notes on what else it holds."""
    tensors, notes = read_weights(path)
    try:
        tensors, more = without_prefix(tensors, (_FIRST, _block(0, 0, _BIAS)), path.name)
    except ValueError as error:
        raise WeightsFileError(f"{path}: {error}") from error
    return tensors, [*notes, *more]


def network_of(model: Model) -> SwinIR:
    """The network of a model folder, in evaluation mode."""
    return load_swinir(model.part(PART), SwinIRConfig(**model.info["config"]), str(model.path))


def import_weights(job: ImportJob) -> ImportReport:
    """Turn one released file into a model folder. SwinIR has no prior and no picture encoder; sizes: see read_swinir.

    Raises:
        WeightsFileError: the file cannot be read or does not hold a SwinIR.
        ModelError: keys, shapes or numbers do not fit; the message names all.
        ValueError: wrong sizes, more than one file, or a prior.
    """
    _check_alone(job.prior, job.image_encoder)
    if len(job.files) != 1:
        raise ValueError(f"a SwinIR is one file, got {', '.join(path.name for path in job.files)}")
    path = job.files[0]
    job.progress(0, 1, path.name)
    sidecar = _sidecar(path)
    tensors, file_notes = _read(path)
    config = _config(path, tensors, {**(sidecar.get("config") or {}), **check_sizes(job.sizes)})
    network = load_swinir(tensors, config, str(path))
    not_finite = [key for key, value in parameters_of(network).items() if not all_finite(value)]
    if not_finite:
        raise ModelError(f"{path}: {key_faults({'with values that are not finite': not_finite})}")
    source = WeightsSource(
        file=path.name,
        part=PART,
        sha256=file_sha256(path),
        tensors=len(tensors),
        parameters=sum(value.numel() for value in parameters_of(network).values()),
    )
    sidecar, notes = valid_entries(sidecar, [source])
    notes += file_notes
    published = path.stem.endswith("_swinir_v1") and config == SwinIRConfig()
    return finish_import(
        job,
        system="swinir",
        parts={PART: parameters_of(network)},
        sources=[source],
        sidecar=sidecar,
        config=config.to_dict(),
        licence=LICENCE if published else "unstated",
        permitted_use="as the licence allows" if published else "unstated",
        notes=notes,
        defaults_of=restore_defaults,
    )


def export_weights(
    model: str | Path,
    folder: Path,
    *,
    spelling: str = "released",
    form: str = "pt",
    write: bool = True,
) -> ExportReport:
    """Write a model for DiffBIR's and InstaRevive's tools: float32, released keys, with the tables.

    Args:
        model: model folder or name.
        folder: for the file, renamed into place when it is complete, and for restoray.json with what it does not hold.
        spelling: "released" is the only one.
        form: "pt" (the released pickle) or "safetensors".
        write: False only returns the plan.

    Raises:
        ModelError: no such model, or a model of another system.
        ValueError: unknown spelling or form.
    """
    if spelling != "released" or form not in ("pt", "safetensors"):
        raise ValueError("spelling must be released and form pt or safetensors")
    source = load_model(model)
    if source.info["system"] != PART:
        raise ModelError(f"{source.path}: holds a {source.info['system']} model, not a SwinIR")
    network = network_of(source)
    tensors = {key: value.clone() for key, value in network.state_dict().items()}
    origins = [name for name in source.info.get("parents") or {} if name in FILE_NAMES]
    stem = Path(origins[0] if origins else RELEASED[PART]).stem  # the weights for faces keep their file name
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
        keys = ("name", "recipe", "licence", "permitted_use", "data_manifest_digest", "metrics", "parents")
        sidecar = {
            "system": PART,
            "exported_from": source.digest,
            "config": dict(source.info["config"]),
            "files": {name: digest},
            **{key: source.info.get(key) for key in keys},
        }
        (folder / SIDECAR).write_text(json.dumps(sidecar, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    count = sum(value.numel() for value in parameters_of(network).values())
    return ExportReport(folder=str(folder), files={name: digest}, parameters=count)


def expected_layout(
    prior: str = "", image_encoder: str = "", sizes: Mapping[str, Any] | None = None
) -> dict[str, Shapes]:
    """Every key and shape of the released file, tables included, for sizes as check_sizes takes them."""
    _check_alone(prior, image_encoder)
    with torch.device("meta"):
        network = SwinIR(SwinIRConfig(**check_sizes(sizes or {})))
    return {RELEASED[PART]: {key: tuple(value.shape) for key, value in network.state_dict().items()}}


def _check_alone(prior: str, image_encoder: str) -> None:
    if prior or image_encoder:
        raise ValueError("SwinIR has no prior and no picture encoder: leave both out")


def _sidecar(path: Path) -> dict[str, Any]:
    """The content of restoray.json next to the file; {} if there is none."""
    place = path.parent / SIDECAR
    if not place.is_file():
        return {}
    try:
        sidecar = json.loads(place.read_text(encoding="utf-8"))
        if sidecar["system"] == PART and isinstance(sidecar["config"], dict):
            return dict(sidecar)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsFileError(f"{place}: not the format of an export ({type(error).__name__}: {error})") from error
    raise WeightsFileError(f"{place}: describes a {sidecar['system']} model, not a SwinIR")


def _config(path: Path, tensors: Mapping[str, Tensor], sizes: Mapping[str, Any]) -> SwinIRConfig:
    """The network's sizes: from `sizes`, else from the shapes, else the published ones."""
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    first, bias_table = shapes.get(_FIRST, ()), shapes.get(_block(0, 0, _BIAS), ())
    if len(first) != 4 or len(bias_table) != 2:
        raise WeightsFileError(f"{path}: not a SwinIR with pixel unshuffle; it holds {list_some(sorted(tensors), 120)}")
    defaults = SwinIRConfig()
    groups = 1 + max(int(match[1]) for key in shapes if (match := re.match(r"layers\.(\d+)\.", key)))
    depths, heads = [], []
    for group in range(groups):
        prefix = f"layers.{group}.residual_group.blocks."
        depths.append(len({key.removeprefix(prefix).split(".")[0] for key in shapes if key.startswith(prefix)}))
        heads.append(shapes.get(_block(group, 0, _BIAS), (0, defaults.num_heads[0]))[-1])
    window = (round(bias_table[0] ** 0.5) + 1) // 2
    inner = shapes.get(_block(0, 0, "mlp.fc1.weight"), (first[0] * defaults.mlp_ratio,))[0]
    steps = sum(f"conv_up{i}.weight" in shapes for i in (1, 2, 3))
    mask = shapes.get(_block(0, 1, "attn_mask"))
    img_size = round(mask[0] ** 0.5) * window if mask else defaults.img_size
    if mask is None and depths[0] > 1 and _block(0, 1, _INDEX) in shapes:
        img_size = window  # tables but no mask: no window is shifted, as one window covers the grid
    file_sizes = {
        "img_size": img_size,
        "embed_dim": first[0],
        "depths": depths,
        "num_heads": heads,
        "window_size": window,
        "mlp_ratio": inner / first[0],
        "sf": 2 ** max(1, steps),
        "features": shapes.get("conv_last.weight", (0, defaults.features))[1],
        "unshuffle_scale": round((first[1] / defaults.in_chans) ** 0.5),
        "resi_connection": "3conv" if "layers.0.conv.0.weight" in shapes else "1conv",
    }
    try:
        return replace(defaults, **{**file_sizes, **sizes})
    except ValueError as error:
        raise WeightsFileError(f"{path}: its shapes do not fit a SwinIR ({error})") from error


def _block(group: int, block: int, rest: str) -> str:
    return f"layers.{group}.residual_group.blocks.{block}.{rest}"
