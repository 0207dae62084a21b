"""Weights files of the community: import to and export from model folders.

A model folder keeps the tensors under the keys of the file. So an export has the same keys, and spandrel detects the
same architecture again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from components.models import Model, ModelError, file_sha256, key_faults, load_model
from components.naming import limited
from components.state_dicts import PREFIXES
from components.systems.importing import finish_import
from components.systems.regressor.config import RegressorConfig
from components.systems.regressor.network import Regressor, config_of, open_regressor, supported
from components.systems.regressor.reach import measure_reach
from components.systems.regressor.released import LICENCE_TEXTS, ORIGIN_TEXTS, PART, SIDECAR, check_sizes
from components.systems.weights_io import ExportReport, ImportJob, ImportReport, Shapes, WeightsSource, valid_entries
from components.tensor_files import all_finite, read_weights, safetensors_metadata
from components.writing import whole_file

SPELLINGS = ("released", "basicsr")
"""The keys of the file alone, or below "params", where BasicSR and its copies look for them."""


def import_weights(job: ImportJob) -> ImportReport:
    """Turn one weights file into a model folder. There is no prior, no picture encoder and no size to give.

    Licence and origin are the job's, the sidecar's, or those in the head of a safetensors file.

    Raises:
        WeightsFileError: the file cannot be read, or is a pickle with other objects than tensors.
        ModelError: no supported architecture, or keys, shapes or numbers that do not fit it.
        ValueError: more than one file, sizes or a prior.
    """
    _check_alone(job.prior, job.image_encoder)
    check_sizes(job.sizes)
    if len(job.files) != 1:
        raise ValueError(f"a regressor is one file, got {', '.join(path.name for path in job.files)}")
    path = job.files[0]
    job.progress(0, 1, path.name)
    tensors, regressor, notes = read_regressor(path)
    not_finite = [key for key, value in tensors.items() if value.is_floating_point() and not all_finite(value)]
    if not_finite:
        raise ModelError(f"{path}: {key_faults({'with values that are not finite': not_finite})}")
    context, levels = measure_reach(regressor)
    config = replace(regressor.config, context_px=context, tile_levels=levels)
    source = WeightsSource(
        file=path.name,
        part=PART,
        sha256=file_sha256(path),
        tensors=len(tensors),
        parameters=sum(value.numel() for value in regressor.parameters()),
    )
    sidecar, more = valid_entries(_sidecar(path), [source])
    texts = safetensors_metadata(path)
    terms = job.licence or sidecar.get("licence") or _text(texts, LICENCE_TEXTS)
    return finish_import(
        job,
        system="regressor",
        parts={PART: tensors},
        sources=[source],
        sidecar=sidecar,
        config=config.to_dict(),
        licence=terms or "unstated",
        permitted_use="as the licence allows" if terms else "unstated",
        origin=_text(texts, ORIGIN_TEXTS) or "unstated",
        notes=(*notes, *more, *_facts(config)),
    )


def read_regressor(path: Path) -> tuple[dict[str, Tensor], Regressor, list[str]]:
    """The tensors of a file by key, their network, and notes on what else the file holds; errors as import_weights.

    The reader takes off prefixes that training tools put before all keys. Some architectures have such a prefix of
    their own (ESRGAN's "model."), so each is tried before a file is refused.
    """
    tensors, notes = read_weights(path)
    try:
        return tensors, open_regressor(tensors, str(path)), notes
    except ModelError as error:
        for prefix in PREFIXES:
            longer = {f"{prefix}.{key}": tensor for key, tensor in tensors.items()}
            try:
                return longer, open_regressor(longer, str(path)), notes
            except ModelError:
                continue
        raise error


def export_weights(
    model: str | Path,
    folder: Path,
    *,
    spelling: str = "released",
    form: str = "pt",
    write: bool = True,
) -> ExportReport:
    """Write a model under the keys of the file that it was imported from.

    Args:
        model: model folder or name.
        folder: for the file, renamed into place when it is complete, and for restoray.json with what it does not hold.
        spelling: one of SPELLINGS.
        form: "pt" or "safetensors", which has no place for "basicsr".
        write: False only returns the plan.

    Raises:
        ModelError: no such model, or a model of another system.
        ValueError: unknown spelling or form, or the two do not go together.
    """
    if spelling not in SPELLINGS or form not in ("pt", "safetensors"):
        raise ValueError(f"spelling must be {' or '.join(SPELLINGS)}, and form pt or safetensors")
    if spelling == "basicsr" and form != "pt":
        raise ValueError("spelling basicsr nests the tensors, which safetensors cannot: choose form pt")
    source = load_model(model)
    if source.info["system"] != "regressor":
        raise ModelError(f"{source.path}: holds a {source.info['system']} model, not a regressor")
    config = config_of(source)
    tensors = source.part(PART)
    name = f"{_stem(source)}.{'pth' if form == 'pt' else 'safetensors'}"
    digest = ""
    if write:
        folder.mkdir(parents=True, exist_ok=True)
        with whole_file(folder / name) as draft:
            if form == "pt":
                torch.save({"params": tensors} if spelling == "basicsr" else tensors, draft.temporary)
            else:
                save_file(tensors, draft.temporary)
        digest = file_sha256(folder / name)
        keys = ("name", "recipe", "licence", "permitted_use", "data_manifest_digest", "metrics", "parents", "origin")
        sidecar = {
            "system": "regressor",
            "exported_from": source.digest,
            "config": config.to_dict(),
            "files": {name: digest},
            **{key: source.info.get(key) for key in keys},
        }
        (folder / SIDECAR).write_text(json.dumps(sidecar, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    count = sum(value.numel() for value in tensors.values() if value.is_floating_point())
    return ExportReport(folder=str(folder), files={name: digest}, parameters=count)


def expected_layout(prior: str = "", image_encoder: str = "", sizes: Mapping[str, Any] | None = None) -> Shapes:
    """ValueError: each architecture has its own layout, and spandrel reads it from the file."""
    _check_alone(prior, image_encoder)
    raise ValueError(
        f"a regressor has its architecture's layout, which follows from the file. Supported: {', '.join(supported())}"
    )


def _check_alone(prior: str, image_encoder: str) -> None:
    if prior or image_encoder:
        raise ValueError("a regressor has no prior and no picture encoder: leave both out")


def _stem(model: Model) -> str:
    """The name of the imported file without its suffix, of a trained model its own name."""
    names = [name for name in model.info.get("parents") or {} if Path(name).suffix]
    return Path(names[0]).stem if names else str(model.info["name"])


def _facts(config: RegressorConfig) -> list[str]:
    """What the network is, as notes of the import."""
    tags = f" ({', '.join(config.tags)})" if config.tags else ""
    kind = "gray pictures: of colours it changes the luma alone" if config.colours == 1 else "colour pictures"
    notes = [f"{config.architecture}{tags}, factor {config.factor}, {kind}; runs in {', '.join(config.precisions)}"]
    if config.tiles_are_exact:
        notes.append(f"tiles with {config.context_px} px of context equal the whole picture")
    else:
        notes.append(
            f"it looks at the whole picture: tiles with {config.context_px} px of context differ from it by up to "
            f"{config.tile_levels:g} of 255 levels on a test picture; a larger tile_px needs fewer tiles"
        )
    return notes


def _text(texts: Mapping[str, str], names: Sequence[str]) -> str:
    """The first of these texts in the head of a file, on one line, at most 200 characters."""
    value = next((texts[name] for name in names if texts.get(name)), "")
    return limited(" ".join(value.split()))[:200]


def _sidecar(path: Path) -> dict[str, Any]:
    """The content of restoray.json next to the file; {} if there is none, or one of another system."""
    place = path.parent / SIDECAR
    try:
        sidecar = json.loads(place.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return dict(sidecar) if isinstance(sidecar, dict) and sidecar.get("system") == "regressor" else {}
