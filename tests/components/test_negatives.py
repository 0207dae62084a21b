"""Image-to-image towards a negative prompt: comparison with diffusers, effect of strength and prompt, equal bits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from components.captions.tags import hue_share
from components.images import center_crop, decode, resize_short_side
from components.models import ModelError
from components.negatives import (
    NEGATIVE_PROMPTS,
    ImageToImageSettings,
    build_image_to_image,
    image_to_image,
    image_to_image_sigmas,
    negative_prompts,
    prior_digest,
    prompt_denoiser,
    square,
)
from components.priors.opening import load_prior
from components.priors.sdxl import Prior
from components.randomness import Noise, generator, seeded_init
from components.samplers.ddim import sample_ddim
from components.samplers.schedules import Schedule
from components.tensors import images_to_tensor

SMALL = ImageToImageSettings(resolution=64, steps=10, cfg_scale=3.0)


@pytest.fixture(scope="module")
def nano() -> Prior:
    return load_prior("nano")


@pytest.fixture(scope="module")
def photograph() -> np.ndarray:
    """uint8 [96, 128, 3] from the demo corpus."""
    folder = Path(__file__).resolve().parents[2] / "pipelines" / "demo_corpus"
    full = decode((folder / "casa-mila.jpg").read_bytes())
    return center_crop(resize_short_side(full, 128), 96, 128)


@pytest.fixture(scope="module")
def tiny_sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SDXL pipeline of a few thousand random weights, saved by diffusers; its scheduler is DDIM."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    folder = tmp_path_factory.mktemp("sdxl")
    words = ["!", *(f"{c}</w>" for c in "abcdef"), "<|startoftext|>", "<|endoftext|>"]
    (folder / "words").mkdir()
    (folder / "words" / "vocab.json").write_text(json.dumps({word: n for n, word in enumerate(words)}))
    (folder / "words" / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "words", model_max_length=8)
    text = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=8,
        projection_dim=16,
        bos_token_id=7,
        eos_token_id=8,
        pad_token_id=8,
        initializer_range=1.0,
    )
    with seeded_init(0, "sdxl"):
        unet = UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=(2, 4),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            transformer_layers_per_block=(1, 1),
            projection_class_embeddings_input_dim=16 + 6 * 4,
            cross_attention_dim=32,
            norm_num_groups=4,
        )
        vae = AutoencoderKL(
            block_out_channels=(16, 16),
            latent_channels=4,
            norm_num_groups=4,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            sample_size=16,
        )
        encoders = CLIPTextModel(text), CLIPTextModelWithProjection(text)
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    )
    pipeline = StableDiffusionXLPipeline(vae, *encoders, tokenizer, tokenizer, unet, scheduler)
    pipeline.save_pretrained(folder / "model")
    return folder / "model"


def test_diffusers_own_image_to_image_gives_the_same_latents(tiny_sdxl: Path) -> None:
    """Compare our sampler with StableDiffusionXLImg2ImgPipeline and DDIM, for equal weights, latents and noise."""
    from diffusers import AutoPipelineForImage2Image

    pipeline = AutoPipelineForImage2Image.from_pretrained(tiny_sdxl, use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    prior = Prior(
        name="tiny",
        digest="",
        unet=pipeline.unet,
        autoencoder=pipeline.vae,
        text_encoders=(pipeline.text_encoder, pipeline.text_encoder_2),
        tokenizers=(pipeline.tokenizer, pipeline.tokenizer_2),
        image_encoder=torch.nn.Identity(),
        schedule=Schedule(),
    ).freeze()
    latents = torch.from_numpy(generator(1, "latents").standard_normal((1, 4, 8, 8)).astype(np.float32))
    for strength in (0.5, 1.0):
        expected = pipeline(
            prompt="a b c",
            negative_prompt="d",
            image=latents,
            strength=strength,
            num_inference_steps=10,
            guidance_scale=3.0,
            original_size=(16, 16),
            target_size=(16, 16),
            generator=torch.Generator().manual_seed(4),
            output_type="latent",
        ).images
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(4))
        sigmas = image_to_image_sigmas(prior.schedule, 10, strength)
        assert len(sigmas) == int(10 * strength) + 1
        with torch.no_grad():
            denoise = prompt_denoiser(prior, ["a b c"], (16, 16), 3.0, negative_prompt="d")
            result = sample_ddim(denoise, latents + sigmas[0] * noise, sigmas)
        assert torch.allclose(result, expected, atol=2e-4 * float(expected.abs().max()))


def test_more_strength_leaves_less_of_the_source(nano: Prior, photograph: np.ndarray) -> None:
    hq = images_to_tensor([square(photograph, 64)])
    noise = Noise(0, np.array([0])).normal("start", (nano.latent_channels, 16, 16))
    distances = []
    with torch.no_grad():
        round_trip = nano.decode(nano.encode(hq))
        for strength in (0.1, 0.5, 1.0):
            settings = ImageToImageSettings(resolution=64, steps=10, strength=strength, cfg_scale=3.0)
            changed = image_to_image(nano, hq, [NEGATIVE_PROMPTS["supir-paper"]], noise, settings)
            distances.append(float((changed - round_trip).square().mean()))
    assert distances[0] < distances[1] < distances[2]
    assert distances[0] < 0.01


def test_results_follow_the_prompt(photograph: np.ndarray) -> None:
    """The nano prior understands colour words only; results for the same source and noise follow them."""
    settings = ImageToImageSettings(resolution=64, steps=10, strength=0.9, cfg_scale=5.0)
    change = build_image_to_image("nano", settings)
    hues = ("red", "green", "blue")
    results = [change(photograph, f"{hue}, bright, high contrast, smooth", 3, 0) for hue in hues]
    for hue, result in zip(hues, results, strict=True):
        assert hue_share(result, hue) == max(hue_share(other, hue) for other in results) > 0.2


def test_bits_depend_on_seed_and_position_only(photograph: np.ndarray) -> None:
    first, second = build_image_to_image("nano", SMALL), build_image_to_image("nano", SMALL)
    one = first(photograph, "dirty", 5, 17)
    assert one.dtype == np.uint8 and one.shape == (64, 64, 3)
    second(photograph[:64], "blur", 1, 2)  # earlier pictures do not matter
    assert np.array_equal(one, second(photograph, "dirty", 5, 17))
    assert not np.array_equal(one, first(photograph, "dirty", 5, 18))
    assert not np.array_equal(one, first(photograph, "dirty", 6, 17))


def test_diffusers_models_are_reproducible(tiny_sdxl: Path, photograph: np.ndarray) -> None:
    settings = ImageToImageSettings(resolution=32, steps=4, cfg_scale=3.0)
    change, again = (build_image_to_image(str(tiny_sdxl), settings) for _ in range(2))
    one = change(photograph, "a b", 5, 17)
    assert one.dtype == np.uint8 and one.shape == (32, 32, 3)
    again(photograph, "c", 0, 0)
    assert np.array_equal(one, again(photograph, "a b", 5, 17))
    assert not np.array_equal(one, change(photograph, "a b", 5, 18))


def test_values_that_are_not_finite_raise_a_sample_error(
    tiny_sdxl: Path, tmp_path: Path, photograph: np.ndarray
) -> None:
    from safetensors.torch import load_file, save_file

    from components.types import SampleError

    broken = Path(shutil.copytree(tiny_sdxl, tmp_path / "broken"))
    weights = broken / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["conv_in.bias"] = torch.full_like(tensors["conv_in.bias"], torch.nan)
    save_file(tensors, weights, metadata={"format": "pt"})
    assert prior_digest(str(broken)) != prior_digest(str(tiny_sdxl))
    with pytest.raises(SampleError) as error:
        build_image_to_image(str(broken), ImageToImageSettings(resolution=32, steps=2))(photograph, "a", 0, 0)
    assert error.value.code == "not_finite"


def test_digests_depend_on_the_weights_only(tiny_sdxl: Path, tmp_path: Path) -> None:
    from components.models import load_model

    assert prior_digest("nano") == load_model("nano", prior=True).digest
    copy = Path(shutil.copytree(tiny_sdxl, tmp_path / "copy"))
    assert prior_digest(str(copy)) == prior_digest(str(tiny_sdxl))
    (copy / "README.md").write_text("words")
    assert prior_digest(str(copy)) == prior_digest(str(tiny_sdxl))


def test_wrong_models_and_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model_index\.json"):
        prior_digest(str(tmp_path))
    with pytest.raises(ModelError, match="no/such-model"):
        build_image_to_image("no/such-model", SMALL)
    with pytest.raises(ValueError, match="multiple of 16"):
        build_image_to_image("nano", ImageToImageSettings(resolution=70))
    for wrong in ({"strength": 0.0}, {"strength": 1.1}, {"steps": 1}, {"resolution": 8}, {"cfg_scale": -1.0}):
        with pytest.raises(ValueError):
            ImageToImageSettings(**wrong)  # type: ignore[arg-type]


def test_prompts_are_names_or_texts() -> None:
    """The paper's prompt has all its terms, and a name gives its text."""
    assert negative_prompts(["supir-paper", "mine"]) == [NEGATIVE_PROMPTS["supir-paper"], "mine"]
    assert len(NEGATIVE_PROMPTS["supir-paper"].split(", ")) == 9
    for wrong in ([], [" "], ["a\0b"]):
        with pytest.raises(ValueError, match="not blank"):
            negative_prompts(wrong)


def test_the_square_is_the_middle_of_the_resized_picture(photograph: np.ndarray) -> None:
    assert square(photograph, 96).shape == (96, 96, 3)
    assert np.array_equal(square(photograph, 96), photograph[:, 16:112])
    assert square(photograph, 200).shape == (200, 200, 3)
