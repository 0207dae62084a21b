"""DiffBIR's published SwinIR files, in and out of model folders (layout: instarevive.md section 1).

A file holds the parameters and, as the authors saved it, two kinds of tables that follow from the sizes alone: they may
be missing, and where they are there they must be right. An export writes them, since the authors' tools insist on them.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from components.models import Model, ModelCard, ModelError, file_sha256, load_model, load_strictly, save_model
from components.systems.swinir.config import SwinIRConfig
from components.systems.swinir.network import SwinIR
from components.systems.swinir.released import KNOWN_NAMES, LICENCE, PART, RELEASED, SIDECAR, check_sizes
from components.systems.weights_io import Exported, Imported, WeightsSource, own_words
from components.tensor_files import WeightsFileError, read_tensors

Shapes = dict[str, tuple[int, ...]]


def parameters_of(network: nn.Module) -> dict[str, Tensor]:
    """The trained tensors by released key, without the tables."""
    return {name: parameter.detach() for name, parameter in network.named_parameters()}


def load_swinir(tensors: Mapping[str, Tensor], config: SwinIRConfig, what: str) -> SwinIR:
    """A network with the weights of a file or a part, in evaluation mode.

    Args:
        tensors: by released key, with or without the tables.
        config: its size.
        what: where they come from, for the message.

    Raises:
        ModelError: names every missing, unexpected or misshapen key, and tables that are not this size's.
    """
    network = SwinIR(config)
    complete = {**dict(network.named_buffers()), **tensors}
    wrong = [
        key
        for key, table in network.named_buffers()
        if complete[key].shape == table.shape and not torch.equal(complete[key].to(table.dtype), table)
    ]
    if wrong:
        raise ModelError(f"{what}: {', '.join(wrong)} are not the tables of a network of this size")
    load_strictly(network, complete, what)
    return network.eval()


def read_swinir(path: Path, sizes: Mapping[str, Any] | None = None) -> SwinIR:
    """The network in a published or exported file; its size is read off the shapes.

    Args:
        path: safetensors or a pickle, as itself or in a training checkpoint's "state_dict", with or without "module.".
        sizes: SwinIRConfig's fields that the shapes do not tell, or that override what they tell.

    Raises:
        WeightsFileError: unreadable, or no SwinIR.
        ModelError: keys, shapes or tables do not fit.
        ValueError: wrong sizes.
    """
    tensors = read_tensors(path, inside="state_dict")
    return load_swinir(tensors, _config(path, tensors, check_sizes(sizes or {})), str(path))


def network_of(model: Model) -> SwinIR:
    """The network of a model folder, in evaluation mode."""
    return load_swinir(model.part(PART), SwinIRConfig(**model.info["config"]), str(model.path))


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
    """Turn a released file into a model folder.

    Args:
        files: one file.
        out: the folder to make; replaced as a whole, at the end. None only checks.
        prior, image_encoder: must be empty: SwinIR sits on no prior.
        sizes: see read_swinir.
        name: of the model; default: the folder's.
        licence: replaces what is said of the weights' licence.
        proceed: asked once everything was checked, with what would be imported; False writes nothing.
        progress: told (files done, files, file).

    Raises:
        WeightsFileError: the file cannot be read or holds no SwinIR.
        ModelError: keys, shapes or numbers do not fit (all of them are named).
        ValueError: wrong sizes, more than one file, or a prior.
    """
    _check_alone(prior, image_encoder)
    if len(files) != 1:
        raise ValueError(f"a SwinIR is one file, got {', '.join(path.name for path in files)}")
    path = files[0]
    progress(0, 1, path.name)
    said = _sidecar(path)
    tensors = read_tensors(path, inside="state_dict")
    config = _config(path, tensors, {**(said.get("config") or {}), **check_sizes(sizes or {})})
    network = load_swinir(tensors, config, str(path))
    broken = [key for key, value in parameters_of(network).items() if not bool(value.isfinite().all())]
    if broken:
        raise ModelError(f"{path}: {len(broken)} with values that are no finite numbers: {', '.join(broken)}")
    source = WeightsSource(
        file=path.name,
        part=PART,
        sha256=file_sha256(path),
        tensors=len(tensors),
        parameters=sum(value.numel() for value in parameters_of(network).values()),
    )
    said, notes = own_words(said, [source])
    published = path.stem.endswith("_swinir_v1") and config == SwinIRConfig()
    card = ModelCard(
        name=name or said.get("name") or (out.name if out else PART),
        system=PART,
        recipe=said.get("recipe") or {},
        config=config.to_dict(),
        parents={source.file: f"sha256:{source.sha256}"},
        data_manifest_digest=said.get("data_manifest_digest") or "",
        licence=licence or said.get("licence") or (LICENCE if published else "unstated"),
        permitted_use=said.get("permitted_use") or ("as the licence allows" if published else "unstated"),
        metrics=said.get("metrics") or {},
    )
    result = Imported(
        model=None,
        digest="",
        sources=(source,),
        prior={},
        config=config.to_dict(),
        licence=card.licence,
        permitted_use=card.permitted_use,
        notes=tuple(notes),
    )
    if out is not None and proceed(result):
        out.parent.mkdir(parents=True, exist_ok=True)
        model = save_model(out, card, {PART: parameters_of(network)})
        result = replace(result, model=str(model.path), digest=model.digest)
    progress(1, 1, "")
    return result


def export_weights(
    model: str | Path,
    folder: Path,
    *,
    spelling: str = "released",
    form: str = "pt",
    write: bool = True,
) -> Exported:
    """Write a model as DiffBIR's and InstaRevive's tools read it: float32, released keys, with the tables.

    Args:
        model: model folder or name.
        folder: receives the file, renamed into place when it is whole, and restoray.json with what it does not tell.
        spelling: "released" is the only one.
        form: "pt" (the released pickle) or "safetensors".
        write: False only says what would be written.

    Raises:
        ModelError: no such model, or none of SwinIR.
        ValueError: unknown spelling or form.
    """
    if spelling != "released" or form not in ("pt", "safetensors"):
        raise ValueError("spelling must be released and form pt or safetensors")
    source = load_model(model)
    if source.info["system"] != PART:
        raise ModelError(f"{source.path}: holds a {source.info['system']} model, not a SwinIR")
    network = network_of(source)
    tensors = {key: value.clone() for key, value in network.state_dict().items()}
    came = [name for name in source.info.get("parents") or {} if name in KNOWN_NAMES]
    stem = Path(came[0] if came else RELEASED[PART]).stem  # the faces' weights keep their name
    name = f"{stem}.ckpt" if form == "pt" else f"{stem}.safetensors"
    digest = ""
    if write:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".{name}.writing"
        if form == "pt":
            torch.save(tensors, temporary)
        else:
            save_file(tensors, temporary)
        os.replace(temporary, folder / name)
        digest = file_sha256(folder / name)
        told = ("name", "recipe", "licence", "permitted_use", "data_manifest_digest", "metrics", "parents")
        sidecar = {
            "system": PART,
            "exported_from": source.digest,
            "config": dict(source.info["config"]),
            "files": {name: digest},
            **{key: source.info.get(key) for key in told},
        }
        (folder / SIDECAR).write_text(json.dumps(sidecar, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    count = sum(value.numel() for value in parameters_of(network).values())
    return Exported(folder=str(folder), files={name: digest}, parameters=count)


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
        raise ValueError("SwinIR sits on no prior and has no picture encoder: leave both out")


def _sidecar(path: Path) -> dict[str, Any]:
    """What restoray.json beside the file says; {} where there is none."""
    place = path.parent / SIDECAR
    if not place.is_file():
        return {}
    try:
        said = json.loads(place.read_text(encoding="utf-8"))
        if said["system"] == PART and isinstance(said["config"], dict):
            return dict(said)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsFileError(f"{place}: not as an export writes it ({type(error).__name__}: {error})") from error
    raise WeightsFileError(f"{place}: describes a {said['system']} model, not a SwinIR")


def _config(path: Path, tensors: Mapping[str, Tensor], given: Mapping[str, Any]) -> SwinIRConfig:
    """The network's size: what is given, else what the shapes tell, else the published number."""
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    first, bias_table = shapes.get("conv_first.1.weight", ()), shapes.get(_block(0, 0, _BIAS), ())
    if len(first) != 4 or len(bias_table) != 2:
        few = ", ".join(sorted(tensors)[:3]) or "nothing"
        raise WeightsFileError(f"{path}: no SwinIR with pixel unshuffle; it holds {few}, ...")
    usual = SwinIRConfig()
    groups = 1 + max(int(found[1]) for key in shapes if (found := re.match(r"layers\.(\d+)\.", key)))
    depths, heads = [], []
    for group in range(groups):
        prefix = f"layers.{group}.residual_group.blocks."
        depths.append(len({key.removeprefix(prefix).split(".")[0] for key in shapes if key.startswith(prefix)}))
        heads.append(shapes.get(_block(group, 0, _BIAS), (0, usual.num_heads[0]))[-1])
    window = (round(bias_table[0] ** 0.5) + 1) // 2
    inner = shapes.get(_block(0, 0, "mlp.fc1.weight"), (first[0] * usual.mlp_ratio,))[0]
    steps = sum(f"conv_up{i}.weight" in shapes for i in (1, 2, 3))
    mask = shapes.get(_block(0, 1, "attn_mask"))
    img_size = round(mask[0] ** 0.5) * window if mask else usual.img_size
    if mask is None and depths[0] > 1 and _block(0, 1, _INDEX) in shapes:
        img_size = window  # with tables but no mask: nothing is shifted, as one window covers the grid
    told = {
        "img_size": img_size,
        "embed_dim": first[0],
        "depths": depths,
        "num_heads": heads,
        "window_size": window,
        "mlp_ratio": inner / first[0],
        "sf": 2 ** max(1, steps),
        "features": shapes.get("conv_last.weight", (0, usual.features))[1],
        "unshuffle_scale": round((first[1] / usual.in_chans) ** 0.5),
        "resi_connection": "3conv" if "layers.0.conv.0.weight" in shapes else "1conv",
    }
    try:
        return replace(usual, **{**told, **given})
    except ValueError as error:
        raise WeightsFileError(f"{path}: its shapes make no SwinIR ({error})") from error


_BIAS, _INDEX = "attn.relative_position_bias_table", "attn.relative_position_index"


def _block(group: int, block: int, rest: str) -> str:
    return f"layers.{group}.residual_group.blocks.{block}.{rest}"
