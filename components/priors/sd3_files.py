"""Loads priors of SD3's shape: diffusers folders and hub ids, Stability AI's single files, and our model folders.

Single files hold no tokenizers, and may lack text encoders and the autoencoder. These come from a diffusers folder.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    BitsAndBytesConfig,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
)

from components.models import ModelError, check_fit, load_model, load_strictly
from components.priors.files import DTYPES, Precision, check_prior_folder, fill_prior, first_line, read_json
from components.priors.hub import find_folder, load_part
from components.priors.scheduler_config import SCHEDULER, check_flow_sampling, read_schedule
from components.priors.sd3 import TEXT_PARTS, SD3Prior, cast_text_encoder, check_sd3_shape
from components.priors.sd3_config import (
    CLIP_G,
    CLIP_L,
    SD3_AUTOENCODER,
    SD3_MEDIUM,
    SD3_SCHEDULE,
    SD3_TRANSFORMER,
    T5_TOKENS,
    T5_XXL,
)
from components.priors.sd3_keys import (
    AUTOENCODER,
    TEXTS,
    TRANSFORMER,
    below,
    text_to_transformers,
    transformer_sizes,
    transformer_to_diffusers,
    whole_names,
)
from components.priors.sd3_nano import build_sd3_prior
from components.priors.sdxl_keys import autoencoder_table, fit_shapes, translate
from components.samplers.schedules import FlowSchedule
from components.tensor_files import WeightsFileError, read_weights

T5Form = Literal["whole", "8bit", "none"]
"""The third text encoder: in the prior's precision, with weights of 8 bits (bitsandbytes), or left out."""

SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
_WEIGHTS = "diffusion_pytorch_model"
_CLASSES: Mapping[str, Any] = {
    "transformer": SD3Transformer2DModel,
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModelWithProjection,
    "text_encoder_2": CLIPTextModelWithProjection,
    "text_encoder_3": T5EncoderModel,
}
_TEXT_CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "text_encoder": CLIP_L,
    "text_encoder_2": CLIP_G,
    "text_encoder_3": T5_XXL,
}


def load_sd3_prior(
    name: str,
    precision: Precision = "fp32",
    *,
    with_network: bool = True,
    with_text: bool = True,
    t5: T5Form = "whole",
    t5_tokens: int = T5_TOKENS,
    base: str = "",
) -> SD3Prior:
    """Loads a prior of SD3's shape, frozen, on the CPU.

    A text encoder that neither the model nor `base` holds is absent (SD3Prior.absent), and zeros replace its text. The
    autoencoder stays in fp32 unless its configuration has force_upcast false.

    Args:
        name: a shipped name or a model folder of ours, a diffusers folder, a hub id (owner/name), a single file, or one
            on the hub (owner/name/file).
        precision: dtype of the weights.
        with_network: load the MM-DiT's weights; False leaves it on the meta device, for a caller with other weights.
        with_text: load the text encoders.
        t5: see T5Form; "8bit" needs a diffusers folder, bitsandbytes, and a device that bitsandbytes supports.
        t5_tokens: tokens of a prompt for T5, 1 to 512; our model folders have their own number.
        base: for a single file, the diffusers folder or hub id of what it lacks; "" for SD3 medium, if it is there.

    Raises:
        ModelError: files are missing (the message names them), of another class, or do not fit; every missing and
            unexpected key is counted.
        ValueError: t5_tokens is out of range.
    """
    if not 1 <= t5_tokens <= 512:
        raise ValueError(f"t5_tokens must be between 1 and 512, got {t5_tokens}")
    try:
        model = load_model(name, prior=True)
    except ModelError as error:
        if "nor a shipped model" not in str(error):
            raise
    else:
        check_prior_folder(model)
        config = model.info["config"]
        if config.get("family") != "sd3":
            raise ModelError(
                f"{model.path}: a prior of SD3's shape is needed, not one of {config.get('family', 'sdxl')}"
            )
        try:
            prior = build_sd3_prior(config, model.file("tokenizer.json").read_text(encoding="utf-8"))
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(f"{model.path}: its config builds no prior ({first_line(error)})") from error
        fill_prior(prior, model)
        return prior.in_precision(precision).freeze()
    if name.endswith(SUFFIXES):
        if t5 == "8bit":
            raise ModelError(f"{name}: T5 loads in 8 bit from a diffusers folder only: set t5=whole or t5=none")
        path, file_id = _find_file(name)
        prior = _load_file(path, base, precision, with_network, with_text, t5 == "whole")
        prior.name = file_id
    else:
        prior = _load_folder(name, precision, with_network, with_text, t5)
    prior.t5_tokens = t5_tokens
    return prior.freeze()


def text_parameters() -> int:
    """Parameters of the three published text encoders."""
    with torch.device("meta"):
        encoders = [CLIPTextModelWithProjection(CLIPTextConfig(**sizes)) for sizes in (CLIP_L, CLIP_G)]
        return sum(
            p.numel() for encoder in (*encoders, T5EncoderModel(T5Config(**T5_XXL))) for p in encoder.parameters()
        )


# --- diffusers folders ------------------------------------------------------------------------------------------------


def _load_folder(name: str, precision: Precision, with_network: bool, with_text: bool, t5: T5Form) -> SD3Prior:
    texts = [part for part in TEXT_PARTS if with_text and (part != "text_encoder_3" or t5 != "none")]
    weights = {"vae": _WEIGHTS} | ({"transformer": _WEIGHTS} if with_network else {}) | dict.fromkeys(texts, "model")
    required = ("transformer/config.json", "vae/config.json", SCHEDULER)
    folder, prior_id = find_folder(name, required, ("*/*.json", "*/*.txt", "*/*.model"), weights, precision)
    texts = [part for part in texts if (folder / part).is_dir()]
    for part in ("transformer", "vae", *texts):
        _check_class(folder / part / "config.json", _CLASSES[part].__name__)
    vae_config = read_json(folder / "vae" / "config.json")
    missing = [key for key in ("scaling_factor", "shift_factor") if vae_config.get(key) is None]
    if missing:
        raise ModelError(f"{folder / 'vae' / 'config.json'}: no {', '.join(missing)}: SD3's latents have both")
    if with_network:
        network: Any = load_part(SD3Transformer2DModel, folder / "transformer", _WEIGHTS, precision)
    else:
        with torch.device("meta"):
            network = SD3Transformer2DModel.from_config(read_json(folder / "transformer" / "config.json"))
    vae_precision: Precision = "fp32" if vae_config.get("force_upcast", True) else precision
    prior = SD3Prior(
        name=prior_id,
        digest="",
        network=network,
        autoencoder=load_part(AutoencoderKL, folder / "vae", _WEIGHTS, vae_precision),
        text_encoders=[_text_encoder(folder, part, precision, t5) if part in texts else None for part in TEXT_PARTS],
        tokenizers=[_tokenizer(folder, part) if part in texts else None for part in TEXT_PARTS],
        schedule=_flow_schedule(folder),
    )
    _check_shape(prior, str(folder))
    return prior


def _text_encoder(folder: Path, part: str, precision: Precision, t5: T5Form) -> nn.Module:
    options: dict[str, Any] = {}
    if part == "text_encoder_3" and t5 == "8bit":
        if importlib.util.find_spec("bitsandbytes") is None:
            raise ModelError(
                f"{folder / part}: T5 in 8 bit needs the package bitsandbytes: install it, or set t5=whole"
            )
        options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    return load_part(_CLASSES[part], folder / part, "model", precision, **options)


def _tokenizer(folder: Path, part: str) -> Any:
    place = folder / part.replace("text_encoder", "tokenizer")
    try:
        return AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError, TypeError, ImportError) as error:
        raise ModelError(f"{place}: no tokenizer ({first_line(error)})") from error


def _flow_schedule(folder: Path) -> FlowSchedule:
    schedule, prediction = read_schedule(folder)
    if not isinstance(schedule, FlowSchedule):
        raise ModelError(f"{folder / SCHEDULER}: SD3 has a FlowMatch scheduler, this one is for {prediction}")
    check_flow_sampling(folder)
    return schedule


def _check_class(path: Path, expected: str) -> None:
    """Raises ModelError if a configuration names another class; one that names none passes."""
    config = read_json(path)
    names = [str(config.get("_class_name") or ""), *map(str, config.get("architectures") or ())]
    classes = [name for name in names if name]
    # transformers names T5 after the whole model in some folders
    if classes and expected not in classes and not (expected == "T5EncoderModel" and config.get("model_type") == "t5"):
        raise ModelError(f"{path}: holds a {' and '.join(classes)}, not a {expected}")


def _check_shape(prior: SD3Prior, what: str) -> None:
    clips, t5 = [clip for clip in prior.text_encoders[:2] if clip is not None], prior.text_encoders[2]
    faults = check_sd3_shape(
        dict(prior.network.config),
        int(prior.autoencoder.config["latent_channels"]),  # type: ignore[index, arg-type]
        [int(clip.config.projection_dim) for clip in clips],  # type: ignore[union-attr, arg-type]
        int(t5.config.d_model) if t5 is not None else 0,  # type: ignore[union-attr, arg-type]
    )
    if faults:
        raise ModelError(f"{what}: not of SD3's shape: {faults}")


# --- single files -----------------------------------------------------------------------------------------------------


def _find_file(name: str) -> tuple[Path, str]:
    """A single file and the name that identifies it: its full path, or owner/name/file."""
    path = Path(name).expanduser()
    if path.is_file():
        return path, str(path.resolve())
    if name.count("/") < 2 or path.is_absolute() or name.startswith("."):
        raise ModelError(f"{name}: no such file, and not owner/name/file of the hub")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    owner, repository, file = name.split("/", 2)
    try:
        return Path(hf_hub_download(f"{owner}/{repository}", file)), name
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise ModelError(f"{name}: no such file; the download from the hub failed ({first_line(error)})") from error


def _load_file(
    path: Path, base: str, precision: Precision, with_network: bool, with_text: bool, with_t5: bool
) -> SD3Prior:
    try:
        tensors, _ = read_weights(path)
        tensors = whole_names(tensors)
    except WeightsFileError as error:
        raise ModelError(str(error)) from error
    state = below(tensors, TRANSFORMER)
    if "x_embedder.proj.weight" not in state or "y_embedder.mlp.0.weight" not in state:
        raise ModelError(f"{path}: not a single file of SD3: no {TRANSFORMER}x_embedder and y_embedder")
    if stray := [key for key in tensors if not key.startswith((TRANSFORMER, AUTOENCODER, *TEXTS.values()))]:
        check_fit({}, {key: tensors[key] for key in stray}, str(path))
    folder = _base_folder(base, path)
    texts = [part for part in TEXT_PARTS if with_text and (with_t5 or part != "text_encoder_3")]
    if folder is None and any(below(tensors, TEXTS[part]) for part in texts):
        raise ModelError(
            f"{path}: a single file holds no tokenizers: name a diffusers folder or hub id with them as base "
            f"({SD3_MEDIUM} is not on this machine)"
        )
    network = _file_network(path, state, folder, precision, with_network)
    encoders: list[nn.Module | None] = []
    for part in TEXT_PARTS:
        own = below(tensors, TEXTS[part]) if part in texts else {}
        if own:
            encoders.append(_file_text(path, part, own, folder, precision))
        elif part in texts and folder is not None and (folder / part).is_dir():
            encoders.append(_text_encoder(folder, part, precision, "whole"))
        else:
            encoders.append(None)
    prior = SD3Prior(
        name=str(path),
        digest="",
        network=network,
        autoencoder=_file_autoencoder(path, below(tensors, AUTOENCODER), folder, precision),
        text_encoders=encoders,
        tokenizers=[
            _tokenizer(folder, part) if encoder is not None and folder is not None else None
            for part, encoder in zip(TEXT_PARTS, encoders, strict=True)
        ],
        schedule=_file_schedule(folder),
    )
    _check_shape(prior, str(path))
    return prior


def _base_folder(base: str, path: Path) -> Path | None:
    """The folder of what a single file lacks; None if none is named and SD3 medium is not on this machine."""
    small = ("*/*.json", "*/*.txt", "*/*.model")
    try:
        return find_folder(base or SD3_MEDIUM, (), small, {})[0]
    except ModelError as error:
        if base:
            raise ModelError(f"{path}: base: {error}") from error
        return None


def _file_schedule(folder: Path | None) -> FlowSchedule:
    """The schedule of the base folder; without one, SD3's."""
    if folder is None or not (folder / SCHEDULER).is_file():
        return FlowSchedule(**SD3_SCHEDULE)
    return _flow_schedule(folder)


def _config(folder: Path | None, part: str, published: Mapping[str, Any]) -> dict[str, Any]:
    """A part's configuration in the base folder, without the names of classes; else the published one."""
    file = f"{part}/config.json"
    config = read_json(folder / file) if folder is not None and (folder / file).is_file() else published
    return {key: value for key, value in config.items() if not key.startswith("_")}


def _file_network(
    path: Path, state: Mapping[str, Tensor], folder: Path | None, precision: Precision, with_network: bool
) -> SD3Transformer2DModel:
    # the sizes are the file's own; only two are in no tensor's shape
    config = _config(folder, "transformer", SD3_TRANSFORMER)
    try:
        sizes = transformer_sizes(state, int(config["attention_head_dim"]))
        sizes["sample_size"] = int(config["sample_size"])
        with torch.device("meta"):
            network = SD3Transformer2DModel(**sizes)
    except (KeyError, ValueError, TypeError) as error:
        raise ModelError(f"{path}: its MM-DiT has no readable sizes ({first_line(error)})") from error
    converted = transformer_to_diffusers(state)
    check_fit(network.state_dict(), converted, f"{path}: transformer")
    if with_network:
        network.load_state_dict({k: v.to(DTYPES[precision]) for k, v in converted.items()}, assign=True)
    return network


def _file_autoencoder(path: Path, state: Mapping[str, Tensor], folder: Path | None, precision: Precision) -> nn.Module:
    config = _config(folder, "vae", SD3_AUTOENCODER)
    vae_precision: Precision = "fp32" if config.get("force_upcast", True) else precision
    if not state:
        if folder is None or not (folder / "vae").is_dir():
            raise ModelError(f"{path}: holds no autoencoder ({AUTOENCODER}), and base has none")
        return load_part(AutoencoderKL, folder / "vae", _WEIGHTS, vae_precision)
    autoencoder: nn.Module = AutoencoderKL(**{k: tuple(v) if isinstance(v, list) else v for k, v in config.items()})
    translated, others = translate(state, autoencoder_table(config))
    fitted = fit_shapes(translated, autoencoder.state_dict())
    load_strictly(autoencoder, {**fitted, **{key: state[key] for key in others}}, f"{path}: autoencoder")
    return autoencoder.to(DTYPES[vae_precision])


def _file_text(
    path: Path, part: str, state: Mapping[str, Tensor], folder: Path | None, precision: Precision
) -> nn.Module:
    config = _config(folder, part, _TEXT_CONFIGS[part])
    kind = T5Config if part == "text_encoder_3" else CLIPTextConfig
    encoder: nn.Module = _CLASSES[part](kind(**config))
    load_strictly(encoder, text_to_transformers(state, part), f"{path}: {part}")
    return cast_text_encoder(encoder, DTYPES[precision])
