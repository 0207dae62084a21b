"""InstantIR's published weights, in and out: adapter.pt, previewer_lora_weights.bin, aggregator.pt <-> a model folder.

Layouts: instantir.md section 6. An import compares every key and shape with the layout for the prior's configuration,
and reports all faults at once. An export writes float32 tensors with the released keys; its bytes equal those of the
import. Files are memory-mapped: both directions hold one tensor at a time in memory, unless values change.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from components.models import ModelError, file_sha256, key_faults, load_model
from components.naming import MESSAGE_CHARS, limited, list_some
from components.priors.hub import PriorShape, prior_shape
from components.priors.sdxl_config import DINOV2, LICENCES, SDXL
from components.state_dicts import without_prefix
from components.systems.importing import finish_import
from components.systems.instantir.layout import Shape, layout, parameter_count
from components.systems.instantir.lora_files import alpha_layer, declared_alpha, join_alphas, layer_names, remedies
from components.systems.instantir.network import PARTS
from components.systems.instantir.options import restore_defaults
from components.systems.instantir.perceptor import ResamplerConfig
from components.systems.instantir.previewer import LoraSettings, adapter_names, released_names, split_key
from components.systems.instantir.released import LICENCE, RELEASE_DEFAULTS, RELEASED, SIDECAR, SPELLINGS, check_sizes
from components.systems.weights_io import ExportReport, ImportJob, ImportReport, WeightsSource, valid_entries
from components.tensor_files import WeightsFileError, all_finite, read_weights
from components.writing import whole_file

PUBLISHED_DCP_PARAMETERS = 849_799_424
"""Parameters of the published adapter.pt: 82,695,424 + 767,104,000 (instantir.md section 1)."""

OWN_SETTINGS = ("time_modulation", "perceptor_scale")
"""Keys of a network's config that released files do not hold; an import takes them from a sidecar."""

NamedTensors = dict[str, tuple[str, Tensor]]
"""Released key -> (the file's own key, the tensor)."""


@dataclass
class _File:
    """One file's tensors by the released keys, and the faults in it so far."""

    path: Path
    part: str
    tensors: NamedTensors
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    alpha: float | None = None


@dataclass(frozen=True, kw_only=True)
class _Expected:
    """The sizes and the layout that the files must have.

    Attributes:
        alpha_given: whether the caller names the LoRA's alpha. alpha_known: whether the caller or a sidecar does.
    """

    shape: PriorShape
    resampler: ResamplerConfig
    lora: LoraSettings
    layout: Mapping[str, Mapping[str, Shape]]
    alpha_given: bool = False
    alpha_known: bool = False


def import_weights(job: ImportJob) -> ImportReport:
    """Turn one to three released files into a model folder; their keys tell which part each holds.

    Without a prior, a picture encoder or sizes the sidecar's count, else SDXL base, DINOv2-large and published ones.

    Raises:
        WeightsFileError: a file cannot be read or is not InstantIR's.
        ModelError: keys or shapes do not fit (the error lists all), no file is an adapter, or there is no such prior.
        ValueError: `sizes` is wrong.
    """
    sidecar = _sidecar(job.files)
    expected = _expected(sidecar, job.prior, job.image_encoder, job.sizes)
    contents = [_open(path, expected) for path in job.files]
    _check_parts(contents)
    sources = []
    for number, file in enumerate(contents):
        job.progress(number, len(contents), file.path.name)
        _compare(file, expected)
        sources.append(_source(file))
    sidecar, sidecar_notes = valid_entries(sidecar, sources)
    faulty = [file for file in contents if file.faults]
    if faulty:
        share = MESSAGE_CHARS // len(faulty) - 1
        raise ModelError("\n".join(limited(_fault_message(file, expected), share) for file in faulty))
    lora = expected.lora
    alphas = {file.alpha for file in contents if file.alpha is not None}
    if alphas:
        lora = replace(lora, alpha=alphas.pop())
    present = {file.part for file in contents}
    config = {
        "resampler": asdict(expected.resampler),
        "lora": lora.to_dict() if "previewer" in present else None,
        "aggregator": "aggregator" in present,
    }
    config |= {name: sidecar["config"][name] for name in OWN_SETTINGS if name in (sidecar.get("config") or {})}
    is_published = sum(s.parameters for s in sources if s.part == "perceptor") == PUBLISHED_DCP_PARAMETERS
    notes = [*sidecar_notes, *(note for file in contents for note in file.notes)]
    if expected.shape.note:
        notes.append(f"{expected.shape.note}; get them before restoring")
    return finish_import(
        job,
        system="instantir",
        parts={f.part: {key: tensor for key, (_, tensor) in f.tensors.items()} for f in contents},
        sources=sources,
        sidecar=sidecar,
        config=config,
        prior=expected.shape.source(),
        restore_options=RELEASE_DEFAULTS,
        licence=LICENCE if is_published else "unstated",
        permitted_use=_permitted_use(expected.shape),
        missing=[f"{part} ({RELEASED[part]})" for part in PARTS if part not in present],
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
    """Write a model folder's parts for the authors' tools: float32, released keys.

    A LoRA's alpha other than 1 is multiplied into its up weights, since the released file holds no alpha and the tools
    take 1. The sidecar restoray.json holds the facts that the files lack, so that an import needs no options.

    Args:
        model: model folder or name.
        folder: folder for the files; each is renamed into place when it is complete.
        spelling: spelling of the LoRA's keys, see released.SPELLINGS.
        form: "pt" (the released pickles) or "safetensors".
        write: False writes nothing and returns the same description.

    Raises:
        ModelError: there is no such model, or it is not an InstantIR model.
        ValueError: `spelling` or `form` is unknown.
    """
    if spelling not in SPELLINGS or form not in ("pt", "safetensors"):
        raise ValueError(f"spelling must be one of {', '.join(SPELLINGS)} and form pt or safetensors")
    source = load_model(model)
    if source.info["system"] != "instantir":
        raise ModelError(f"{source.path}: holds a {source.info['system']} model, not one of InstantIR")
    lora = dict(source.info["config"].get("lora") or {})
    alpha, notes = float(lora.get("alpha", 1)), []
    if lora and alpha != 1:
        notes.append(f"the LoRA's alpha {alpha:g} was multiplied into its up weights: the released file holds no alpha")
        lora["alpha"] = 1
    if lora and lora.get("rank") != LoraSettings().rank:
        notes.append(f"the LoRA's rank is {lora.get('rank')}; the released tools take {LoraSettings().rank}")
    scale = float(source.info["config"].get("perceptor_scale", 1))
    if scale != 1:
        notes.append(f"the model's perceptor_scale is {scale:g}; the released tools take 1 unless you set it")
    missing = [part for part in PARTS if part not in source.info["parts"]]
    if missing:
        notes.append(f"the model has no {' and no '.join(missing)}")
    files: dict[str, str] = {}
    parameters = 0
    if write:
        folder.mkdir(parents=True, exist_ok=True)
    for part, tensors in source.parts().items():
        tensors = _for_release(part, tensors, alpha, spelling)
        parameters += sum(tensor.numel() for tensor in tensors.values())
        name = RELEASED[part] if form == "pt" else f"{RELEASED[part].rpartition('.')[0]}.safetensors"
        files[name] = ""
        if write:
            with whole_file(folder / name) as draft:
                if form == "pt":
                    torch.save(_nest(tensors) if part == "perceptor" else tensors, draft.temporary)
                else:
                    save_file(tensors, draft.temporary)
            files[name] = file_sha256(folder / name)
    card_keys = ("name", "recipe", "prior", "licence", "permitted_use", "data_manifest_digest", "metrics", "parents")
    sidecar = {
        "system": "instantir",
        "exported_from": source.digest,
        "config": {**source.info["config"], "lora": lora or None},
        "files": files,
        **{name: source.info.get(name) for name in card_keys},
    }
    if write:
        (folder / SIDECAR).write_text(json.dumps(sidecar, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return ExportReport(folder=str(folder), files=files, parameters=parameters, notes=tuple(notes))


def expected_layout(
    prior: str = "", image_encoder: str = "", sizes: Mapping[str, Any] | None = None
) -> dict[str, Mapping[str, Shape]]:
    """Every key and shape by released file, for a prior and sizes as in import_weights."""
    expected = _expected({}, prior, image_encoder, sizes or {})
    return {RELEASED[part]: expected.layout[part] for part in PARTS}


# -- layout ------------------------------------------------------------------------------------------------------------


def _sidecar(files: Sequence[Path]) -> dict[str, Any]:
    """The sidecar restoray.json next to the files; {} if there is none."""
    for folder in dict.fromkeys(path.parent for path in files):
        path = folder / SIDECAR
        if not path.is_file():
            continue
        try:
            sidecar = json.loads(path.read_text(encoding="utf-8"))
            if sidecar["system"] == "instantir" and isinstance(sidecar["config"]["resampler"], dict):
                return dict(sidecar)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise WeightsFileError(f"{path}: not the sidecar of an export ({type(error).__name__}: {error})") from error
        raise WeightsFileError(f"{path}: describes a {sidecar['system']} model, not one of InstantIR")
    return {}


def _expected(sidecar: Mapping[str, Any], prior: str, image_encoder: str, sizes: Mapping[str, Any]) -> _Expected:
    prior_entry, config = sidecar.get("prior") or {}, sidecar.get("config") or {}
    shape = prior_shape(
        prior or str(prior_entry.get("id") or SDXL), image_encoder or str(prior_entry.get("image_encoder") or DINOV2)
    )
    checked_sizes = check_sizes(sizes)
    resampler = {
        "embedding_dim": shape.image_token_dim,
        "output_dim": int(shape.unet["cross_attention_dim"]),
        **(config.get("resampler") or {}),
        **checked_sizes.get("resampler", {}),
    }
    if resampler["embedding_dim"] != shape.image_token_dim:
        raise ModelError(
            f"resampler.embedding_dim is {resampler['embedding_dim']}, but the picture encoder of {shape.id} "
            f"makes tokens of {shape.image_token_dim}: name the one that the weights were trained with"
        )
    lora = LoraSettings(**{**(config.get("lora") or {}), **checked_sizes.get("lora", {})})
    size = ResamplerConfig(**resampler)
    alpha_given = "alpha" in checked_sizes.get("lora", {})
    return _Expected(
        shape=shape,
        resampler=size,
        lora=lora,
        layout=layout(shape.unet, resampler, lora.to_dict()),
        alpha_given=alpha_given,
        alpha_known=alpha_given or "alpha" in (config.get("lora") or {}),
    )


def _permitted_use(shape: PriorShape) -> str:
    encoder = f", of its picture encoder: {LICENCES[shape.image_encoder]}" if shape.image_encoder in LICENCES else ""
    return f"as the licences allow; of the prior {shape.id}: {LICENCES.get(shape.id, 'see there')}{encoder}"


# -- files -------------------------------------------------------------------------------------------------------------


def _open(path: Path, expected: _Expected) -> _File:
    """Read a file, detect its part by the keys, and map the keys to the released ones."""
    tensors, notes = read_weights(path)
    for part in ("aggregator", "perceptor"):
        try:
            tensors, more = without_prefix(tensors, tuple(expected.layout[part]), path.name)
        except ValueError as error:
            raise WeightsFileError(f"{path}: {error}") from error
        notes += more
    if any(key.startswith("controlnet_down_blocks.") for key in tensors):
        file = _File(path, "aggregator", {key: (key, tensor) for key, tensor in tensors.items()})
    elif any("lora_" in key or "lora." in key for key in tensors):
        file = _open_lora(path, tensors, expected)
    elif any(key.startswith(("image_proj", "ip_adapter.", "adapter_modules.")) for key in tensors):
        file = _open_adapter(path, tensors)
    else:
        few = list_some(sorted(tensors), 120)
        raise WeightsFileError(f"{path}: neither adapter, nor aggregator, nor LoRA of InstantIR; it holds {few}")
    file.notes += notes
    return file


def _open_adapter(path: Path, tensors: Mapping[str, Tensor]) -> _File:
    """The published layout of two dictionaries, or the older flat layout."""
    file = _File(path, "perceptor", {})
    older = {"image_proj_model.": "image_proj.", "adapter_modules.": "ip_adapter."}
    for key, tensor in tensors.items():
        name = key
        for prefix, new_prefix in older.items():
            if key.startswith(prefix):
                name = new_prefix + key.removeprefix(prefix)
        _put(file, name, key, tensor)
    return file


def _open_lora(path: Path, tensors: Mapping[str, Tensor], expected: _Expected) -> _File:
    """A LoRA in the spelling of diffusers, peft or kohya's tools; see lora_files."""
    file, alphas = _File(path, "previewer", {}), dict[str, float]()
    adapters = adapter_names(tensors)
    if len(adapters) > 1:
        raise WeightsFileError(f"{path}: holds the adapters {list_some(adapters)}: save one of them alone")
    layers = {split[0] for key in expected.layout["previewer"] if (split := split_key(key)) is not None}
    names = layer_names(path, tensors, layers)
    own = {layer for layer in names.values() if layer in layers}
    for key, tensor in tensors.items():
        if tensor.numel() == 1 and (layer := alpha_layer(key, names)) in own:
            alphas[str(layer)] = float(tensor)
            continue
        split = split_key(key)
        _put(file, key if split is None else released_names(names[split[0]])[split[1] == "B"], key, tensor)
    bad = sorted({alpha for alpha in alphas.values() if not 0 < alpha < math.inf})
    if alphas and len(alphas) < len(own):
        file.faults.append(f"alpha is missing for {len(own) - len(alphas)} of {len(own)} layers")
    elif bad:
        file.faults.append(f"alpha must be positive, and is {bad[0]:g}")
    elif alphas:
        if len(set(alphas.values())) > 1:
            low, high = min(alphas.values()), max(alphas.values())
            file.notes.append(f"{path.name}: alphas of {low:g} to {high:g} were multiplied into the up weights")
        file.alpha = join_alphas(file.tensors, alphas)
    elif not expected.alpha_given:
        file.alpha = declared_alpha(path)
    if file.alpha is None and not expected.alpha_known and any(name != key for name, (key, _) in file.tensors.items()):
        file.notes.append(f"{path.name} holds no alpha: {expected.lora.alpha:g} is used; lora.alpha=NUMBER changes it")
    return file


def _put(file: _File, name: str, key: str, tensor: Tensor) -> None:
    if name in file.tensors:
        file.faults.append(f"{key} and {file.tensors[name][0]} name the same tensor")
    file.tensors[name] = (key, tensor)


def _check_parts(files: Sequence[_File]) -> None:
    by_part: dict[str, Path] = {}
    for file in files:
        if file.part in by_part:
            raise ModelError(f"{by_part[file.part]} and {file.path} both hold the {file.part}: give one of them")
        by_part[file.part] = file.path
    if "perceptor" not in by_part:
        raise ModelError(
            f"no adapter among {', '.join(str(path) for path in by_part.values())}: previewer and aggregator work "
            f"with the adapter they were trained with, so give {RELEASED['perceptor']} too"
        )


def _compare(file: _File, expected: _Expected) -> None:
    """Add every fault to the file; add the zero modulation that an older adapter lacks."""
    shapes = expected.layout[file.part]
    modulation = [key for key in shapes if ".ln_k_ip." in key or ".ln_v_ip." in key]
    if file.part == "perceptor" and modulation and not any(".ln_" in key and "_ip." in key for key in file.tensors):
        like = next(iter(file.tensors.values()))[1]
        file.tensors |= {key: (key, torch.zeros(shapes[key], dtype=like.dtype)) for key in modulation}
        file.notes.append(f"{file.path.name} holds no time modulation (ln): it was set to zero, as released")
    missing = [key for key in shapes if key not in file.tensors]
    unexpected = [key for name, (key, _) in file.tensors.items() if name not in shapes]
    shared = [(name, *file.tensors[name]) for name in shapes if name in file.tensors]
    misshapen = [
        f"{key} is {list(tensor.shape)} instead of {list(shapes[name])}"
        for name, key, tensor in shared
        if tuple(tensor.shape) != shapes[name]
    ]
    not_float = [f"{key} is {tensor.dtype}" for _, key, tensor in shared if not tensor.is_floating_point()]
    not_finite = [key for _, key, tensor in shared if tensor.is_floating_point() and not all_finite(tensor)]
    for what, keys in (
        ("missing", missing),
        ("unexpected", unexpected),
        ("of the wrong shape", misshapen),
        ("not of a floating point type", not_float),
        ("with values that are not finite", not_finite),
    ):
        if keys:
            file.faults.append(key_faults({what: keys}))


def _source(file: _File) -> WeightsSource:
    return WeightsSource(
        file=file.path.name,
        part=file.part,
        sha256=file_sha256(file.path),
        tensors=len(file.tensors),
        parameters=sum(tensor.numel() for _, tensor in file.tensors.values()),
    )


def _fault_message(file: _File, expected: _Expected) -> str:
    shapes = expected.layout[file.part]
    looks = _looks_like(file, expected)
    unknown = [key for name, (key, _) in file.tensors.items() if name not in shapes]
    remedy = remedies(unknown) if file.part == "previewer" and unknown else ""
    return (
        f"{file.path}: does not fit InstantIR's {RELEASED[file.part]} on the prior {expected.shape.id} "
        f"({len(shapes)} tensors, {parameter_count(shapes):,} parameters): {'; '.join(file.faults)}"
        f"{f'. The file looks like {looks}: give these as KEY=VALUE if that is right' if looks else ''}"
        f"{f'. {remedy}' if remedy else ''}"
    )


def _looks_like(file: _File, expected: _Expected) -> str:
    """Sizes in the file's shapes that differ from the expected ones; shapes do not show the split into heads."""
    shapes = {name: tuple(tensor.shape) for name, (_, tensor) in file.tensors.items()}
    if file.part == "previewer":
        ranks = {shape[0] for name, shape in shapes.items() if name.endswith((".lora_A.weight", ".lora.down.weight"))}
        rank = ranks.pop() if len(ranks) == 1 else expected.lora.rank
        return f"lora.rank={rank}" if rank != expected.lora.rank else ""
    keys = [f"image_proj.{n}" for n in ("latents", "layers.0.0.to_q.weight", "layers.0.1.1.weight")]
    if file.part != "perceptor" or any(name not in shapes or len(shapes[name]) < 2 for name in keys):
        return ""
    latents, query, wide = (shapes[name] for name in keys)
    depth = len({name.split(".")[2] for name in shapes if name.startswith("image_proj.layers.")})
    sizes = {"dim": latents[-1], "depth": depth, "num_queries": latents[1], "ff_mult": wide[0] // latents[-1]}
    expected_sizes = asdict(expected.resampler)
    differences = [f"resampler.{name}={value}" for name, value in sizes.items() if value != expected_sizes[name]]
    if query[0] != expected_sizes["heads"] * expected_sizes["dim_head"]:
        differences.append(f"resampler.heads x resampler.dim_head = {query[0]}")
    return " ".join(differences)


# -- export ------------------------------------------------------------------------------------------------------------


def _for_release(part: str, tensors: Mapping[str, Tensor], alpha: float, spelling: str) -> dict[str, Tensor]:
    """A part's tensors in float32 by the released keys; each has its own memory."""
    if part != "previewer":
        return {name: tensor.float() for name, tensor in tensors.items()}
    return {
        name: tensor.float() * alpha if up and alpha != 1 else tensor.float()
        for name, up, tensor in _spelt(tensors, spelling)
    }


def _spelt(tensors: Mapping[str, Tensor], spelling: str) -> Iterator[tuple[str, bool, Tensor]]:
    endings = {"peft": (".lora_A.weight", ".lora_B.weight"), "diffusers": (".lora.down.weight", ".lora.up.weight")}
    for key, tensor in tensors.items():
        split = split_key(key)
        if split is None:
            raise ModelError(f"the previewer holds {key}, which is not a LoRA weight")
        layer, up = split[0], split[1] == "B"
        name = released_names(layer)[up] if spelling == "released" else f"unet.{layer}{endings[spelling][up]}"
        yield name, up, tensor


def _nest(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Split an adapter's tensors into adapter.pt's two dictionaries."""
    parts: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for name, tensor in tensors.items():
        head, _, rest = name.partition(".")
        parts[head][rest] = tensor
    return parts
