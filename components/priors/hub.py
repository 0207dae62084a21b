"""Loads SDXL from a diffusers folder or hub id, and DINOv2 in transformers' layout.

A name is searched as a folder, below RESTORAY_HOME/weights, in the hub's cache, and then on the hub. The error names
every place that was tried. Only safetensors are read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from components.models import ModelError, key_faults, load_model
from components.places import SHIPPED_PRIORS, weights_folder
from components.priors.files import DTYPES, Precision, check_prior_folder, first_line, read_json
from components.priors.scheduler_config import SCHEDULER, read_sampling, read_schedule
from components.priors.sdxl_config import (
    DINOV2,
    DINOV2_TOKEN_DIM,
    IMAGENET_MEAN,
    IMAGENET_STD,
    SDXL,
    SDXL_AUTOENCODER,
    SDXL_UNET,
    ImageView,
)
from components.samplers.schedules import Sampling, Schedule
from components.state_dicts import plain_keys

_WEIGHTS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
}
"""The networks of an SDXL folder, each with the stem of its weights' file."""

_SDXL_FILES = tuple(f"{part}/config.json" for part in _WEIGHTS)
_SDXL_SMALL = ("*/*.json", "*/*.txt")
_UNET_CONFIG, _VAE_CONFIG = "unet/config.json", "vae/config.json"
_VARIANTS = ("", "fp16")
"""Variants of weights: the plain set, or a second set in half precision."""


@dataclass(frozen=True, kw_only=True)
class PriorShape:
    """The sizes of a prior from its configuration, without its weights.

    Attributes:
        id, digest: identify the prior, see Prior.
        image_encoder: name of the picture encoder for a diffusers prior; "" for our own priors, and for none.
        unet: arguments of UNet2DConditionModel.
        image_token_dim: width of the picture encoder's tokens; 0 without one.
        autoencoder: arguments of AutoencoderKL, or of SpaceToDepthAutoencoder for our own priors; empty if a diffusers
            folder does not hold them.
        note: message for users if the sizes do not come from files.
    """

    id: str
    digest: str
    image_encoder: str
    unet: Mapping[str, Any]
    image_token_dim: int
    autoencoder: Mapping[str, Any]
    note: str = ""

    def source(self) -> dict[str, str]:
        """The record of the prior in model.json."""
        return {"id": self.id, "digest": self.digest} | (
            {"image_encoder": self.image_encoder} if self.image_encoder else {}
        )


def prior_shape(name: str, image_encoder: str = DINOV2) -> PriorShape:
    """Sizes of a prior from its configuration files; those of SDXL and DINOv2-large need no files.

    Args:
        name: as in load_prior.
        image_encoder: Dinov2 folder or hub id, used with a diffusers prior only; "" for none.

    Raises:
        ModelError: the prior is missing, or the model is not a prior.
    """
    try:
        model = load_model(name, prior=True)
    except ModelError as error:
        if "nor a shipped model" not in str(error):
            raise
    else:
        check_prior_folder(model)
        config = model.info["config"]
        if "unet" not in config:
            raise ModelError(f"{model.path}: a prior of SDXL's shape is needed here, and this one has no UNet")
        return PriorShape(
            id=model.path.name if model.path.parent == SHIPPED_PRIORS else str(model.path.resolve()),
            digest=model.digest,
            image_encoder="",
            unet=config["unet"],
            image_token_dim=int(config["image_encoder"]["hidden_size"]),
            autoencoder=config["autoencoder"],
        )
    notes: list[str] = []
    published = {_UNET_CONFIG: SDXL_UNET, _VAE_CONFIG: SDXL_AUTOENCODER}
    configs, prior_id = read_configs(name, (_UNET_CONFIG, _VAE_CONFIG), {SDXL: published}, notes)
    unet, encoder_id = configs[_UNET_CONFIG], ""
    dino: Mapping[str, Any] = {"hidden_size": 0}
    if image_encoder:
        encoder_sizes = {DINOV2: {"config.json": {"hidden_size": DINOV2_TOKEN_DIM}}}
        encoder_configs, encoder_id = read_configs(image_encoder, ("config.json",), encoder_sizes, notes)
        dino = encoder_configs["config.json"]
    if "cross_attention_dim" not in unet or "hidden_size" not in dino:
        both = f"{name} with {image_encoder}" if image_encoder else name
        raise ModelError(f"{both}: not a UNet of diffusers, or not a picture encoder of transformers")
    return PriorShape(
        id=prior_id,
        digest="",
        image_encoder=encoder_id,
        unet=unet,
        image_token_dim=int(dino["hidden_size"]),
        autoencoder=configs.get(_VAE_CONFIG, {}),
        note="; ".join(notes),
    )


def load_sdxl(name: str, image_encoder: str = DINOV2, precision: Precision = "fp32") -> dict[str, Any]:
    """Loads the parts of a Prior from an SDXL pipeline's folder or hub id and a Dinov2 model, as keyword arguments.

    The weights load directly in `precision`, without an fp32 copy. The autoencoder stays in fp32 if its configuration
    has `force_upcast` (SDXL's overflows in half precision). With image_encoder "" there is no picture encoder, since
    some systems do not use one.

    Raises:
        ModelError: files are missing (the message names them), or the model does not have SDXL's shape.
    """
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    folder, prior_id = find_folder(name, _SDXL_FILES, _SDXL_SMALL, _WEIGHTS, precision)
    upcast = bool(read_json(folder / "vae" / "config.json").get("force_upcast", True))
    classes = {
        "unet": UNet2DConditionModel,
        "vae": AutoencoderKL,
        "text_encoder": CLIPTextModel,
        "text_encoder_2": CLIPTextModelWithProjection,
    }
    networks = {
        part: load_part(cls, folder / part, _WEIGHTS[part], "fp32" if part == "vae" and upcast else precision)
        for part, cls in classes.items()
    }
    tokenizers = []
    for part in ("tokenizer", "tokenizer_2"):
        try:
            tokenizers.append(CLIPTokenizer.from_pretrained(folder / part))
        except (OSError, ValueError, TypeError) as error:
            raise ModelError(f"{folder / part}: no tokenizer ({first_line(error)})") from error
    _check_sdxl(folder, networks)
    encoder: nn.Module = nn.Identity()
    encoder_id, view = "", dict[str, Any]()
    if image_encoder:
        encoder, encoder_id, view = _load_image_encoder(image_encoder, precision)
    return {
        "name": prior_id,
        "digest": "",
        "image_encoder_name": encoder_id,
        "unet": networks["unet"],
        "autoencoder": networks["vae"],
        "text_encoders": (networks["text_encoder"], networks["text_encoder_2"]),
        "tokenizers": tuple(tokenizers),
        "image_encoder": encoder,
        "schedule": _schedule(folder),
        "sampling": read_sampling(folder) if (folder / SCHEDULER).is_file() else Sampling(),
        **view,
    }


def find_folder(
    name: str,
    required: Sequence[str],
    small: Sequence[str],
    weights: Mapping[str, str],
    precision: Precision = "fp32",
) -> tuple[Path, str]:
    """The folder of a model in a hub layout, and the name that identifies it (the folder's full path, or the hub id).

    Args:
        name: a folder, a name below RESTORAY_HOME/weights, or a hub id.
        required: files that the folder must hold.
        small: patterns of all files except the weights.
        weights: stem of the weights' file by its subfolder.
        precision: selects the set of weights to download if the hub has two.

    Raises:
        ModelError: names each place that was tried, and the files that it lacks.
    """
    tried = []
    for folder in (Path(name).expanduser(), weights_folder() / name, weights_folder() / name.rpartition("/")[2]):
        if folder.is_dir():
            lacking = _lacking(folder, required, weights)
            if not lacking:
                return folder, str(folder.resolve())
            tried.append(f"{folder} lacks {', '.join(lacking)}")
        else:
            tried.append(f"{folder} is not a folder")
    if name.count("/") != 1 or Path(name).is_absolute() or name.startswith("."):
        raise ModelError(f"{name}: no such model: {'; '.join(dict.fromkeys(tried))}; and not a hub id (owner/name)")
    from huggingface_hub import constants, list_repo_files, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        folder = Path(snapshot_download(name, local_files_only=True))
        lacking = _lacking(folder, required, weights)
        if not lacking:
            return folder, name
        tried.append(f"the hub's cache lacks {', '.join(lacking)} of the model")
    except (OSError, ValueError):
        tried.append(f"the hub's cache ({constants.HF_HUB_CACHE}) does not hold it")
    if constants.HF_HUB_OFFLINE:
        tried.append("the hub was not tried, since HF_HUB_OFFLINE is set")
    else:
        try:
            patterns = [*small, *_hub_weights(list_repo_files(name), weights, precision)]
            folder = Path(snapshot_download(name, allow_patterns=patterns))
            lacking = _lacking(folder, required, weights)
            if not lacking:
                return folder, name
            tried.append(f"the hub lacks {', '.join(lacking)}")
        except (OSError, ValueError, HfHubHTTPError) as error:
            tried.append(f"the download from the hub failed ({first_line(error)})")
    raise ModelError(f"{name}: no such model: {'; '.join(dict.fromkeys(tried))}")


def variant_of(folder: Path, stem: str, precision: Precision) -> str:
    """The set of weights in a folder to read, "" or "fp16": the one that fits the precision, otherwise the other.

    Raises:
        ModelError: the folder has neither.
    """
    for variant in _order(precision):
        if any((folder / name).is_file() for name in _names(stem, variant)):
            return variant
    names = [name for variant in _VARIANTS for name in _names(stem, variant)]
    pickles = sorted(path.name for path in folder.glob("*.bin"))
    hint = f"; {', '.join(pickles)} is not read, since pickles can run code" if pickles else ""
    raise ModelError(f"{folder}: no weights, looked for {', '.join(names)}{hint}")


def load_part(cls: Any, folder: Path, stem: str, precision: Precision, **options: Any) -> nn.Module:
    """Loads one network of diffusers or transformers from its folder.

    Args:
        cls, folder, stem, precision: class, folder, stem of the weights' file, and dtype.
        options: further arguments of the library's from_pretrained.

    Raises:
        ModelError: no weights, or weights that do not fit the configuration (the message names every key).
    """
    variant = variant_of(folder, stem, precision)
    try:
        model, info = cls.from_pretrained(
            folder,
            variant=variant or None,
            use_safetensors=True,
            output_loading_info=True,
            dtype=DTYPES[precision],
            **options,
        )
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise ModelError(f"{folder}: cannot be loaded ({first_line(error)})") from error
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    # older files of text encoders hold position ids, which are not weights
    faulty_keys = {
        kind: sorted(str(key) for key in info[kind] if not str(key).endswith("position_ids")) for kind in kinds
    }
    if any(faulty_keys.values()):  # both libraries would use random weights for them
        faults = key_faults({kind.replace("_", " "): keys for kind, keys in faulty_keys.items()})
        raise ModelError(f"{folder}: the weights do not fit its configuration: {faults}{_wrapper_hint(faulty_keys)}")
    return model  # type: ignore[no-any-return]


def _wrapper_hint(faulty_keys: Mapping[str, Sequence[str]]) -> str:
    """The remedy where only a wrapper's prefix makes the keys unknown; only their libraries read these files."""
    unexpected = list(faulty_keys["unexpected_keys"])
    if not unexpected or set(plain_keys(unexpected)) != set(faulty_keys["missing_keys"]):
        return ""
    return ". A wrapper added to the keys: save the inner network (model.module, model._orig_mod) with save_pretrained"


def _load_image_encoder(name: str, precision: Precision) -> tuple[nn.Module, str, dict[str, Any]]:
    from transformers import Dinov2Model

    folder, encoder_id = find_folder(name, ("config.json",), ("*.json",), {"": "model"}, precision)
    kind = read_json(folder / "config.json").get("model_type")
    if kind != "dinov2":
        raise ModelError(f"{folder}: the picture encoder must be a dinov2 without register tokens, not {kind!r}")
    return load_part(Dinov2Model, folder, "model", precision), encoder_id, _view(folder)


def _view(folder: Path) -> dict[str, Any]:
    """The preparation of pictures for the encoder from its preprocessor's file; {} without such a file."""
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        return {}
    settings = read_json(path)
    for name, imagenet in (("image_mean", IMAGENET_MEAN), ("image_std", IMAGENET_STD)):
        if name in settings and [round(float(v), 3) for v in settings[name]] != list(imagenet):
            raise ModelError(f"{path}: {name} {settings[name]} is not ImageNet's {list(imagenet)}")
    edge, crop = settings.get("size", {}), settings.get("crop_size", {})
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
        raise ModelError(f"{path}: the prior must predict noise (epsilon), not {prediction}")
    return schedule


def _check_sdxl(folder: Path, networks: Mapping[str, Any]) -> None:
    unet, text = networks["unet"].config, networks["text_encoder"].config.hidden_size
    second = networks["text_encoder_2"].config
    faults = []
    if unet["addition_embed_type"] != "text_time":
        faults.append(f"addition_embed_type is {unet['addition_embed_type']!r}, not 'text_time'")
    if unet["cross_attention_dim"] != text + second.hidden_size:
        faults.append(f"text width {unet['cross_attention_dim']} is not {text} + {second.hidden_size} of its encoders")
    if networks["vae"].config["latent_channels"] != unet["in_channels"]:
        faults.append(
            f"the UNet takes {unet['in_channels']} channels, "
            f"the autoencoder makes {networks['vae'].config['latent_channels']}"
        )
    if faults:
        raise ModelError(f"{folder}: not of SDXL's shape: {'; '.join(faults)}")


def read_configs(
    name: str, files: Sequence[str], published: Mapping[str, Mapping[str, Mapping[str, Any]]], notes: list[str]
) -> tuple[dict[str, Mapping[str, Any]], str]:
    """Configurations by file from a folder or the hub, and the name that identifies it; otherwise from `published`.

    A folder with the first file alone will do: the others are then those of `published`, or left out.
    """
    for required in dict.fromkeys((tuple(files), tuple(files[:1]))):
        try:
            folder, model_id = find_folder(name, required, required, {})
        except ModelError as error:
            reason = error
            continue
        return {**published.get(name, {}), **{file: read_json(folder / file) for file in required}}, model_id
    if name not in published:
        raise reason
    notes.append(f"{name} is not on this machine: its published sizes are used")
    return dict(published[name]), name


def _lacking(folder: Path, required: Sequence[str], weights: Mapping[str, str]) -> list[str]:
    lacking = [name for name in required if not (folder / name).is_file()]
    for part, stem in weights.items():
        if (folder / part).is_dir() and not any(
            (folder / part / n).is_file() for v in _VARIANTS for n in _names(stem, v)
        ):
            lacking.append(f"{part}/{stem}.safetensors".lstrip("/"))
    return lacking


def _hub_weights(files: Sequence[str], weights: Mapping[str, str], precision: Precision) -> list[str]:
    """Patterns of each part's set of weights that fits the precision."""
    patterns = []
    for part, stem in weights.items():
        for variant in _order(precision):
            names = {f"{part}/{name}".lstrip("/") for name in _names(stem, variant)}
            if names & set(files):
                patterns += [*names, f"{part}/{stem}-*{'.' + variant if variant else ''}.safetensors".lstrip("/")]
                patterns += [f"{part}/{stem}{'.' + variant if variant else ''}-*.safetensors".lstrip("/")]
                break
    return patterns


def _order(precision: Precision) -> tuple[str, ...]:
    """Variants in the order of preference: fp16 files for fp16, otherwise full ones, since fp16 loses small numbers."""
    return tuple(reversed(_VARIANTS)) if precision == "fp16" else _VARIANTS


def _names(stem: str, variant: str) -> tuple[str, ...]:
    """File names of one set of weights: a single file, or the index of several."""
    if not variant:
        return f"{stem}.safetensors", f"{stem}.safetensors.index.json"
    return (
        f"{stem}.{variant}.safetensors",
        f"{stem}.safetensors.index.{variant}.json",
        f"{stem}.{variant}.safetensors.index.json",
    )
