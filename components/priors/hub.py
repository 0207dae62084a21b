"""SDXL from other people's files: a diffusers folder or hub id, and a DINOv2 in transformers' layout.

A name is looked for as a folder, below RESTORAY_HOME/weights, in the hub's cache, and then on the hub. Whatever was in
vain is named in the error. Only safetensors are read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from components.models import ModelError, load_model
from components.places import weights_folder
from components.priors.files import first_line, read_json
from components.priors.scheduler_config import SCHEDULER, read_schedule
from components.priors.sdxl_config import DINOV2, DINOV2_TOKEN_DIM, SDXL, SDXL_UNET
from components.samplers.schedules import Schedule

Precision = Literal["fp32", "bf16", "fp16"]
DTYPES: Mapping[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

_WEIGHTS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
}
"""Networks of an SDXL folder and the stem of their weights' file."""

_SDXL_FILES = tuple(f"{part}/config.json" for part in _WEIGHTS)
_SDXL_SMALL = ("*/*.json", "*/*.txt")
_BESIDE = ("", "fp16")
"""Variants of weights: none, or a second set in half precision."""


@dataclass(frozen=True, kw_only=True)
class PriorShape:
    """What a prior's configuration says, for those who need no weights.

    Attributes:
        id, digest: what finds it again, see Prior.
        image_encoder: name of the picture encoder that goes with a diffusers prior; "" for priors of ours.
        unet: UNet2DConditionModel's arguments.
        image_token_dim: width of the picture encoder's tokens.
        note: said to people where the sizes are not read from files.
    """

    id: str
    digest: str
    image_encoder: str
    unet: Mapping[str, Any]
    image_token_dim: int
    note: str = ""

    def source(self) -> dict[str, str]:
        """As model.json records a prior."""
        return {"id": self.id, "digest": self.digest} | (
            {"image_encoder": self.image_encoder} if self.image_encoder else {}
        )


def prior_shape(name: str, image_encoder: str = DINOV2) -> PriorShape:
    """Sizes of a prior from its configuration files; SDXL's and DINOv2-large's own are known without.

    Raises:
        ModelError: no such prior, or a model that is none.
    """
    try:
        model = load_model(name)
    except ModelError as error:
        if "nor a shipped model" not in str(error):
            raise
    else:
        if model.info["system"] != "prior":
            raise ModelError(f"{model.path}: holds a {model.info['system']} model, not a prior")
        from components.models import SHIPPED

        config = model.info["config"]
        return PriorShape(
            id=model.path.name if model.path.parent == SHIPPED else str(model.path.resolve()),
            digest=model.digest,
            image_encoder="",
            unet=config["unet"],
            image_token_dim=int(config["image_encoder"]["hidden_size"]),
        )
    notes: list[str] = []
    unet, prior_id = _known_config(name, "unet/config.json", {SDXL: SDXL_UNET}, notes)
    dino, encoder_id = _known_config(image_encoder, "config.json", {DINOV2: {"hidden_size": DINOV2_TOKEN_DIM}}, notes)
    if "cross_attention_dim" not in unet or "hidden_size" not in dino:
        raise ModelError(f"{name} with {image_encoder}: no UNet of diffusers, or no picture encoder of transformers")
    return PriorShape(
        id=prior_id,
        digest="",
        image_encoder=encoder_id,
        unet=unet,
        image_token_dim=int(dino["hidden_size"]),
        note="; ".join(notes),
    )


def load_sdxl(name: str, image_encoder: str = DINOV2, precision: Precision = "fp32") -> dict[str, Any]:
    """The parts of a Prior from an SDXL pipeline's folder or hub id and a Dinov2 model: keyword arguments of Prior.

    The weights go straight into the wanted precision: no copy in fp32 is made first. The autoencoder stays in fp32
    where its configuration says `force_upcast` (SDXL's own overflows in half precision). Without a name there is no
    picture encoder: not every system has a use for one.

    Raises:
        ModelError: names what was looked for and not found, or what is not of SDXL's shape.
    """
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    folder, found_id = find_folder(name, _SDXL_FILES, _SDXL_SMALL, _WEIGHTS, precision)
    upcast = bool(read_json(folder / "vae" / "config.json").get("force_upcast", True))
    classes = {
        "unet": UNet2DConditionModel,
        "vae": AutoencoderKL,
        "text_encoder": CLIPTextModel,
        "text_encoder_2": CLIPTextModelWithProjection,
    }
    loaded = {
        part: load_part(cls, folder / part, _WEIGHTS[part], "fp32" if part == "vae" and upcast else precision)
        for part, cls in classes.items()
    }
    tokenizers = []
    for part in ("tokenizer", "tokenizer_2"):
        try:
            tokenizers.append(CLIPTokenizer.from_pretrained(folder / part))
        except (OSError, ValueError, TypeError) as error:
            raise ModelError(f"{folder / part}: no tokenizer ({first_line(error)})") from error
    _check_sdxl(folder, loaded)
    encoder: nn.Module = nn.Identity()
    encoder_id, view = "", dict[str, Any]()
    if image_encoder:
        encoder, encoder_id, view = _load_image_encoder(image_encoder, precision)
    return {
        "name": found_id,
        "digest": "",
        "image_encoder_name": encoder_id,
        "unet": loaded["unet"],
        "autoencoder": loaded["vae"],
        "text_encoders": (loaded["text_encoder"], loaded["text_encoder_2"]),
        "tokenizers": tuple(tokenizers),
        "image_encoder": encoder,
        "schedule": _schedule(folder),
        **view,
    }


def find_folder(
    name: str,
    needed: Sequence[str],
    small: Sequence[str],
    weights: Mapping[str, str],
    precision: Precision = "fp32",
) -> tuple[Path, str]:
    """Where a model of the hub's kind lies, and the name that finds it again (a folder's whole path, or the hub id).

    Args:
        name: a folder, a name below RESTORAY_HOME/weights, or a hub id.
        needed: files without which it is none of this kind.
        small: patterns of everything but the weights.
        weights: stem of the weights' file by the folder it lies in.
        precision: of two sets of weights on the hub the fitting one is fetched.

    Raises:
        ModelError: says each place that was tried, and what was missing there.
    """
    tried = []
    for folder in (Path(name).expanduser(), weights_folder() / name, weights_folder() / name.rpartition("/")[2]):
        if folder.is_dir():
            lacking = _lacking(folder, needed, weights)
            if not lacking:
                return folder, str(folder.resolve())
            tried.append(f"{folder} lacks {', '.join(lacking)}")
        else:
            tried.append(f"{folder} is no folder")
    if name.count("/") != 1 or Path(name).is_absolute() or name.startswith("."):
        raise ModelError(f"{name}: no such model: {'; '.join(dict.fromkeys(tried))}; and it is no hub id (owner/name)")
    from huggingface_hub import constants, list_repo_files, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        folder = Path(snapshot_download(name, local_files_only=True))
        lacking = _lacking(folder, needed, weights)
        if not lacking:
            return folder, name
        tried.append(f"the hub's cache lacks {', '.join(lacking)} of it")
    except (OSError, ValueError):
        tried.append(f"the hub's cache ({constants.HF_HUB_CACHE}) does not hold it")
    if constants.HF_HUB_OFFLINE:
        tried.append("the hub was not asked, since HF_HUB_OFFLINE is set")
    else:
        try:
            patterns = [*small, *_hub_weights(list_repo_files(name), weights, precision)]
            folder = Path(snapshot_download(name, allow_patterns=patterns))
            lacking = _lacking(folder, needed, weights)
            if not lacking:
                return folder, name
            tried.append(f"on the hub it lacks {', '.join(lacking)}")
        except (OSError, ValueError, HfHubHTTPError) as error:
            tried.append(f"the hub did not give it ({first_line(error)})")
    raise ModelError(f"{name}: no such model: {'; '.join(dict.fromkeys(tried))}")


def variant_of(folder: Path, stem: str, precision: Precision) -> str:
    """Which of a folder's sets of weights to read: "" or "fp16"; the fitting one, else the other.

    Raises:
        ModelError: there is neither.
    """
    for variant in _order(precision):
        if any((folder / name).is_file() for name in _names(stem, variant)):
            return variant
    names = [name for variant in _BESIDE for name in _names(stem, variant)]
    pickled = sorted(path.name for path in folder.glob("*.bin"))
    hint = f"; {', '.join(pickled)} is not read, since pickles can run code" if pickled else ""
    raise ModelError(f"{folder}: no weights, looked for {', '.join(names)}{hint}")


def load_part(cls: Any, folder: Path, stem: str, precision: Precision) -> nn.Module:
    """One network of diffusers or transformers from its folder.

    Raises:
        ModelError: no weights, or weights that do not fit the configuration; every key is named.
    """
    variant = variant_of(folder, stem, precision)
    try:
        model, info = cls.from_pretrained(
            folder,
            variant=variant or None,
            use_safetensors=True,
            output_loading_info=True,
            dtype=DTYPES[precision],
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"{folder}: cannot be loaded ({first_line(error)})") from error
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    # older files of text encoders carry their position numbers, which are no weights
    found = {kind: sorted(str(key) for key in info[kind] if not str(key).endswith("position_ids")) for kind in kinds}
    faults = [f"{kind.replace('_', ' ')} {keys}" for kind, keys in found.items() if keys]
    if faults:  # both libraries would go on with random numbers in their place
        raise ModelError(f"{folder}: the weights do not fit its configuration: {'; '.join(faults)}")
    return model  # type: ignore[no-any-return]


def _load_image_encoder(name: str, precision: Precision) -> tuple[nn.Module, str, dict[str, Any]]:
    from transformers import Dinov2Model

    folder, found_id = find_folder(name, ("config.json",), ("*.json",), {"": "model"}, precision)
    kind = read_json(folder / "config.json").get("model_type")
    if kind != "dinov2":
        raise ModelError(f"{folder}: the picture encoder must be a dinov2 without register tokens, this is {kind!r}")
    return load_part(Dinov2Model, folder, "model", precision), found_id, _view(folder)


def _view(folder: Path) -> dict[str, Any]:
    """How pictures are shown to the encoder, from its preprocessor's file; nothing where there is none."""
    from components.priors.sdxl import IMAGENET_MEAN, IMAGENET_STD, ImageView

    path = folder / "preprocessor_config.json"
    if not path.is_file():
        return {}
    said = read_json(path)
    for name, ours in (("image_mean", IMAGENET_MEAN), ("image_std", IMAGENET_STD)):
        if name in said and [round(float(v), 3) for v in said[name]] != list(ours):
            raise ModelError(f"{path}: {name} {said[name]} is not ImageNet's {list(ours)}")
    edge, crop = said.get("size", {}), said.get("crop_size", {})
    edge_px = edge.get("shortest_edge") if isinstance(edge, dict) else edge
    crop_px = crop.get("height") if isinstance(crop, dict) else crop
    usual = ImageView()
    return {
        "view": ImageView(
            shortest_edge_px=int(edge_px or usual.shortest_edge_px), crop_px=int(crop_px or usual.crop_px)
        )
    }


def _schedule(folder: Path) -> Schedule:
    path = folder / SCHEDULER
    if not path.is_file():
        return Schedule()
    schedule, prediction = read_schedule(folder)
    if not isinstance(schedule, Schedule) or prediction != "epsilon":
        raise ModelError(f"{path}: the prior must predict noise (epsilon), this one's prediction is {prediction}")
    return schedule


def _check_sdxl(folder: Path, loaded: Mapping[str, Any]) -> None:
    unet, text = loaded["unet"].config, loaded["text_encoder"].config.hidden_size
    second = loaded["text_encoder_2"].config
    faults = []
    if unet["addition_embed_type"] != "text_time":
        faults.append(f"addition_embed_type is {unet['addition_embed_type']!r}, not 'text_time'")
    if unet["cross_attention_dim"] != text + second.hidden_size:
        faults.append(f"text width {unet['cross_attention_dim']} is not {text} + {second.hidden_size} of its encoders")
    if loaded["vae"].config["latent_channels"] != unet["in_channels"]:
        faults.append(
            f"the UNet takes {unet['in_channels']} channels, "
            f"the autoencoder makes {loaded['vae'].config['latent_channels']}"
        )
    if faults:
        raise ModelError(f"{folder}: not of SDXL's shape: {'; '.join(faults)}")


def _known_config(
    name: str, file: str, known: Mapping[str, Mapping[str, Any]], notes: list[str]
) -> tuple[Mapping[str, Any], str]:
    """A configuration from a folder or the hub's cache, or what is known of it; and the name that finds it again."""
    try:
        folder, found = find_folder(name, (file,), (file,), {})
        return read_json(folder / file), found
    except ModelError:
        if name not in known:
            raise
        notes.append(f"{name} is not on this machine: its published sizes were taken")
        return known[name], name


def _lacking(folder: Path, needed: Sequence[str], weights: Mapping[str, str]) -> list[str]:
    lacking = [name for name in needed if not (folder / name).is_file()]
    for part, stem in weights.items():
        if (folder / part).is_dir() and not any(
            (folder / part / n).is_file() for v in _BESIDE for n in _names(stem, v)
        ):
            lacking.append(f"{part}/{stem}.safetensors".lstrip("/"))
    return lacking


def _hub_weights(files: Sequence[str], weights: Mapping[str, str], precision: Precision) -> list[str]:
    """Patterns of the fitting set of weights of each part."""
    patterns = []
    for part, stem in weights.items():
        for variant in _order(precision):
            wanted = {f"{part}/{name}".lstrip("/") for name in _names(stem, variant)}
            if wanted & set(files):
                patterns += [*wanted, f"{part}/{stem}-*{'.' + variant if variant else ''}.safetensors".lstrip("/")]
                patterns += [f"{part}/{stem}{'.' + variant if variant else ''}-*.safetensors".lstrip("/")]
                break
    return patterns


def _order(precision: Precision) -> tuple[str, ...]:
    """fp16 files for fp16; else the whole ones, since bf16 made of fp16 has lost its small numbers already."""
    return tuple(reversed(_BESIDE)) if precision == "fp16" else _BESIDE


def _names(stem: str, variant: str) -> tuple[str, ...]:
    """File names of one set: whole, or the index of several."""
    if not variant:
        return f"{stem}.safetensors", f"{stem}.safetensors.index.json"
    return (
        f"{stem}.{variant}.safetensors",
        f"{stem}.safetensors.index.{variant}.json",
        f"{stem}.{variant}.safetensors.index.json",
    )
