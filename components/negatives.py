"""Negative-quality samples: pictures that match a negative prompt, made from good pictures by image-to-image.

SUPIR section 3.2: a restorer trained on good pictures only does not understand negative prompts, and guidance away from
them adds artefacts. So poor pictures with the negative prompt as their caption are mixed into the training data.
Appendix A.4: from noise alone, such prompts give meaningless pictures. Therefore SDXL starts half-way, from training
pictures (SDEdit, Meng et al. 2021, at strength 0.5).

Two kinds of model work: a prior of ours (components.priors, with DDIM), and any diffusers model that
AutoPipelineForImage2Image supports (with its own scheduler). Pictures are made one by one. A picture's bits depend on
source, prompt, settings, seed and position only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from components.images import center_crop, resize_short_side
from components.randomness import Noise, stream_key
from components.types import Denoiser, Image, SampleError

if TYPE_CHECKING:
    from torch import Tensor

    from components.models import ModelError
    from components.priors.sdxl import Prior
    from components.samplers.schedules import Sampling, Schedule

NEGATIVE_PROMPTS: dict[str, str] = {
    # SUPIR Fig. 19: the prompt of its negative samples
    "supir-samples": (
        "oil painting, cartoon, blurring, dirty, messy, low quality, frames, deformed, lowres, over-smooth"
    ),
    # SUPIR section 3.2: the example of a negative prompt in restoration
    "supir-paper": "oil painting, cartoon, blur, dirty, messy, low quality, deformation, low resolution, over-smooth",
    # Fanghua-Yu/SUPIR at bda91af: the default negative prompt; it contains "oil painting" twice
    "supir-code": (
        "painting, oil painting, illustration, drawing, art, sketch, oil painting, cartoon, CG Style, 3D render, "
        "unreal engine, blurring, dirty, messy, worst quality, low quality, frames, watermark, signature, "
        "jpeg artifacts, deformed, lowres, over-smooth"
    ),
}
"""Published negative prompts by name. SUPIR does not state whether all 100K pictures have the first as caption."""

ImageToImage = Callable[[Image, str, int, int], Image]
"""(hq uint8 [H, W, 3], prompt, seed, position) -> uint8 [S, S, 3]; see `build_image_to_image`."""


@dataclass(frozen=True, kw_only=True)
class ImageToImageSettings:
    """Settings of image-to-image.

    Attributes:
        strength: share of the sampler's steps to run, 0 (none) to 1 (from almost pure noise).
        steps: steps of the whole sampler; 50 is diffusers' default for SDXL.
        cfg_scale: guidance towards the prompt, away from `negative_prompt`; 5 is diffusers' default for SDXL, the paper
            states none.
        negative_prompt: prompt that guidance leads away from.
        resolution: side of the square results in pixels; SDXL was trained at 1024.
    """

    strength: float = 0.5  # SUPIR appendix A.4
    steps: int = 50
    cfg_scale: float = 5.0
    negative_prompt: str = ""
    resolution: int = 1024

    def __post_init__(self) -> None:
        if not 0 < self.strength <= 1:
            raise ValueError(f"strength must lie above 0 and at most at 1, got {self.strength}")
        if self.steps < 1 or int(self.steps * self.strength) < 1:
            raise ValueError(f"{self.steps} steps at strength {self.strength} leave no step to run")
        if self.cfg_scale < 0 or self.resolution < 16:
            raise ValueError(
                f"cfg_scale must not be negative and resolution at least 16, got {self.cfg_scale} and {self.resolution}"
            )


def negative_prompts(names: Sequence[str]) -> list[str]:
    """Return the texts of prompts; each is a name of NEGATIVE_PROMPTS or a text.

    Raises:
        ValueError: there is no prompt, or one is blank or not printable.
    """
    texts = [NEGATIVE_PROMPTS.get(name, name) for name in names]
    if not texts or not all(text.strip() and text.isprintable() for text in texts):
        raise ValueError(f"negative samples need printable prompts that are not blank, got {list(names)}")
    return texts


def square(image: Image, side_px: int) -> Image:
    """Resize a picture's short side to `side_px` and return the middle square: uint8 [side, side, 3]."""
    return center_crop(resize_short_side(image, side_px), side_px, side_px)


def prior_digest(name: str, revision: str = "") -> str:
    """Digest of a model for records: a model folder's digest, or the sha256 over a diffusers folder's files.

    Raises:
        ModelError: the name is not that of a usable model.
    """
    from components.models import load_model

    folder, ours = model_folder(name, revision)
    if ours:
        return load_model(folder).digest
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix in (".json", ".safetensors", ".txt", ".model"):
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            total.update(f"{path.relative_to(folder).as_posix()} {digest}\n".encode())
    return total.hexdigest()


def model_folder(name: str, revision: str = "") -> tuple[Path, bool]:
    """Return a model's folder, and whether it is a model folder of ours (else of diffusers).

    Files of a hub model are fetched once, into the hub's cache.

    Raises:
        ModelError: the name is not that of a usable model.
    """
    from components.models import resolve_model

    return (resolve_model(name, prior=True), True) if _is_ours(name) else (_diffusers_folder(name, revision), False)


def build_image_to_image(
    name: str,
    settings: ImageToImageSettings,
    device: str = "cpu",
    revision: str = "",
    precision: Literal["fp32", "fp16", "bf16"] = "fp32",
) -> ImageToImage:
    """Load a model and return the function that changes one picture.

    Args:
        name: a shipped prior ("nano") or a prior's model folder; else a diffusers folder or hub id.
        settings: settings for every picture.
        revision: revision of a hub model.
        precision: precision of a diffusers model's weights; priors of ours stay in fp32.

    Returns:
        A function whose SampleError has code "not_finite" (the result has NaN or infinite values) or "refused" (the
        model's safety checker blackened the result).

    Raises:
        ModelError: the name is not that of a usable model.
        ValueError: the model does not support the resolution.
    """
    if _is_ours(name):
        return _with_prior(name, settings, device)
    return _with_diffusers(name, settings, device, revision, precision)


def _is_ours(name: str) -> bool:
    """Whether a name is a model folder or a shipped model; a broken folder raises ModelError."""
    from components.models import ModelError, load_model

    try:
        load_model(name, prior=True)
    except ModelError as error:
        if "nor a shipped model" not in str(error):
            raise
        return False
    return True


# --- priors of ours ---------------------------------------------------------------------------------------------------


def _with_prior(name: str, settings: ImageToImageSettings, device: str) -> ImageToImage:
    import torch

    from components.priors.opening import load_prior
    from components.tensors import images_to_tensor, tensor_to_images

    prior = load_prior(name, device)
    if settings.resolution % prior.multiple_px:
        raise ValueError(f"resolution must be a multiple of {prior.multiple_px} for {name}, got {settings.resolution}")

    def change(image: Image, prompt: str, seed: int, position: int) -> Image:
        with torch.no_grad():
            hq = images_to_tensor([square(image, settings.resolution)]).to(device)
            side = settings.resolution // prior.factor
            noise = Noise(seed, np.array([position]), device).normal("start", (prior.latent_channels, side, side))
            result = image_to_image(prior, hq, [prompt], noise, settings)
        return tensor_to_images(result)[0]

    return change


def image_to_image(
    prior: Prior, images: Tensor, prompts: Sequence[str], noise: Tensor, settings: ImageToImageSettings
) -> Tensor:
    """Encode, add noise, sample with the prompts, decode (SDEdit).

    Args:
        images: [B, 3, H, W] in [-1, 1]; sides are multiples of `prior.multiple_px`.
        prompts: B texts.
        noise: standard normal [B, C, h, w] in the latents' shape.

    Returns:
        [B, 3, H, W], not clipped.
    """
    from components.samplers.ddim import sample_ddim

    height, width = images.shape[-2:]
    latents = prior.encode(images)
    schedule = prior.schedule
    sigmas = image_to_image_sigmas(schedule, settings.steps, settings.strength, prior.sampling).to(latents.device)
    denoise = prompt_denoiser(prior, prompts, (height, width), settings.cfg_scale, settings.negative_prompt)
    latents = sample_ddim(denoise, latents + sigmas[0] * noise, sigmas)
    return prior.decode(schedule.preserving(latents, sigmas[-1].expand(len(latents))))


def image_to_image_sigmas(schedule: Schedule, steps: int, strength: float, sampling: Sampling | None = None) -> Tensor:
    """Return sigmas of the last n = int(steps * strength) of `steps` steps, and the final level: float32 [n + 1].

    This is diffusers' definition of "strength", the name that SUPIR's authors use too.
    """
    from components.samplers.schedules import Sampling

    sampling = sampling or Sampling()
    return sampling.sigmas(schedule, sampling.timesteps(schedule, steps)[steps - int(steps * strength) :])


def prompt_denoiser(
    prior: Prior, prompts: Sequence[str], size: tuple[int, int], cfg_scale: float, negative_prompt: str = ""
) -> Denoiser:
    """Wrap the prior's UNet with guidance towards prompts as a Denoiser of B rows.

    Args:
        size: (height, width) of the pictures in pixels; the UNet's original and target size.
    """
    import torch

    from components.samplers.guidance import guide
    from components.samplers.schedules import Schedule

    rows = len(prompts)
    text, pooled = prior.embed_prompts([negative_prompt] * rows + list(prompts))
    ids = prior.time_ids(torch.tensor([[*size, 0, 0, *size]]).expand(2 * rows, -1))

    def denoise(latents: Tensor, sigma: Tensor) -> Tensor:
        eps = prior.unet(
            Schedule.preserving(latents, sigma).repeat(2, 1, 1, 1),
            prior.schedule.timestep_of(sigma).repeat(2),
            encoder_hidden_states=text,
            added_cond_kwargs={"text_embeds": pooled, "time_ids": ids},
        ).sample
        negative, positive = eps.chunk(2)
        return latents - sigma.view(-1, 1, 1, 1) * guide(negative, positive, cfg_scale)

    return denoise


# --- diffusers --------------------------------------------------------------------------------------------------------


def _with_diffusers(
    name: str, settings: ImageToImageSettings, device: str, revision: str, precision: str
) -> ImageToImage:
    import torch

    from components.tensors import check_finite

    pipeline = _open_pipeline(name, revision, precision).to(device)
    pipeline.set_progress_bar_config(disable=True)
    decoder = getattr(getattr(pipeline, "vae", None), "decoder", None)
    if decoder is not None:  # diffusers clips the result, which would hide infinite values
        decoder.register_forward_hook(lambda module, inputs, output: check_finite(output))

    def change(image: Image, prompt: str, seed: int, position: int) -> Image:
        # on the CPU, so that the draws are the same for every device
        generator = torch.Generator("cpu").manual_seed(stream_key(seed, position, "image_to_image") % 2**63)
        output = pipeline(
            prompt=prompt,
            negative_prompt=settings.negative_prompt,
            image=square(image, settings.resolution)[None].astype(np.float32) / 255,
            strength=settings.strength,
            num_inference_steps=settings.steps,
            guidance_scale=settings.cfg_scale,
            generator=generator,
            output_type="np",
        )
        nsfw_flags = getattr(output, "nsfw_content_detected", None)
        if nsfw_flags and any(nsfw_flags):
            raise SampleError("refused", f"the safety checker of {name} blackened the result")
        result = np.asarray(output.images[0])
        if not np.isfinite(result).all():
            raise SampleError("not_finite", f"{name} returned values that are not finite")
        return np.rint(result.clip(0, 1) * 255).astype(np.uint8)

    return change


def _open_pipeline(name: str, revision: str, precision: str) -> Any:
    import torch
    from diffusers import AutoPipelineForImage2Image

    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    options: dict[str, Any] = {"revision": revision} if revision else {}
    try:
        return AutoPipelineForImage2Image.from_pretrained(
            name, dtype=dtype, use_safetensors=True, trust_remote_code=False, **options
        )
    except (OSError, ValueError) as error:
        raise _unusable(name, error) from error


def _diffusers_folder(name: str, revision: str) -> Path:
    """Return the folder of a diffusers model; a hub model lies in the hub's cache."""
    from components.models import ModelError

    if Path(name).is_dir():
        if not (Path(name) / "model_index.json").is_file():
            raise ModelError(f"{name} is neither a model folder of ours nor a diffusers model: no model_index.json")
        return Path(name)
    from diffusers import DiffusionPipeline

    options: dict[str, Any] = {"revision": revision} if revision else {}
    try:
        return Path(DiffusionPipeline.download(name, use_safetensors=True, trust_remote_code=False, **options))
    except (OSError, ValueError) as error:
        raise _unusable(name, error) from error


def _unusable(name: str, error: Exception) -> ModelError:
    from components.models import ModelError

    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
    return ModelError(f"{name}: no shipped prior, no model folder, and no image-to-image model either ({reason})")
