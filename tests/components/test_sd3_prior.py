"""Priors of SD3's shape agree with diffusers' own pipeline on tiny random networks; folders, absent parts, errors."""

from __future__ import annotations

import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from helper_modules import load_helper
from safetensors.torch import load_file, save_file

from components.captions.tags import VOCABULARY
from components.models import ModelCard, ModelError, save_model
from components.priors import sd3_files
from components.priors.conditions import Conditions
from components.priors.families import FAMILIES
from components.priors.nano import build_tokenizer_json
from components.priors.opening import load_prior
from components.priors.sd3 import SD3Prior, check_sd3_shape, generate_latents
from components.priors.sd3_config import LICENCES, NANO_SD3, SD3_MEDIUM, SD3_TRANSFORMER, SD35_MEDIUM, SD35_TRANSFORMER
from components.priors.sd3_files import load_sd3_prior
from components.priors.sd3_nano import build_sd3_prior
from components.samplers.schedules import FlowSchedule

tiny = load_helper("components/_tiny_sd3.py")
NEGATIVES, PROMPTS, T5_LENGTH = tiny.NEGATIVES, tiny.PROMPTS, tiny.T5_LENGTH
normal, pipeline = tiny.normal, tiny.pipeline


@pytest.fixture(scope="module")
def pipe() -> StableDiffusion3Pipeline:
    return pipeline()


@pytest.fixture(scope="module")
def folder(pipe: StableDiffusion3Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sd3") / "tiny"
    pipe.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def prior(folder: Path) -> SD3Prior:
    return load_sd3_prior(str(folder), t5_tokens=T5_LENGTH)


def reference_text(pipe: Any, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        text, _, pooled, _ = pipe.encode_prompt(
            prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=T5_LENGTH
        )
    return text, pooled


def test_a_folder_becomes_a_frozen_prior(prior: SD3Prior, folder: Path) -> None:
    assert prior.source == {"id": str(folder), "digest": ""} and prior.absent == ()
    assert (prior.latent_channels, prior.factor, prior.multiple_px) == (16, 2, 4)
    assert prior.schedule == FlowSchedule(num_train_timesteps=1000, shift=3.0)
    parts = {"transformer", "autoencoder", "text_encoder", "text_encoder_2", "text_encoder_3"}
    assert set(prior.modules) == parts
    assert not any(p.requires_grad or m.training for m in prior.modules.values() for p in m.parameters())


def test_the_text_is_that_of_the_pipeline(prior: SD3Prior, pipe: StableDiffusion3Pipeline) -> None:
    expected = reference_text(pipe, PROMPTS)
    text, pooled = prior.embed_prompts(PROMPTS)
    assert text.shape == (2, 7 + T5_LENGTH, 48) and pooled.shape == (2, 40)
    torch.testing.assert_close(text, expected[0])
    torch.testing.assert_close(pooled, expected[1])
    assert not text[:, :7, 40:].any(), "the CLIPs' 16 + 24 numbers are padded with zeros to T5's 48"


def test_the_latents_have_a_shift_and_a_scale(prior: SD3Prior, pipe: Any) -> None:
    images = normal(2, 3, 16, 12).clamp(-1, 1)
    with torch.no_grad():
        own = pipe.vae.encode(images).latent_dist
        noise = normal(*own.mean.shape, seed=3)
        torch.testing.assert_close(prior.encode(images), (own.mean - 0.0609) * 1.5305)
        torch.testing.assert_close(prior.encode(images, noise), (own.mean + own.std * noise - 0.0609) * 1.5305)
        latents = normal(2, 16, 8, 6, seed=4)
        torch.testing.assert_close(prior.decode(latents), pipe.vae.decode(latents / 1.5305 + 0.0609).sample)


def test_the_velocity_is_that_of_the_transformer(prior: SD3Prior, pipe: Any) -> None:
    text, pooled = reference_text(pipe, PROMPTS)
    latents, sigma = normal(2, 16, 8, 12, seed=1), torch.tensor([0.9, 0.25])
    with torch.no_grad():
        expected = pipe.transformer(
            latents, timestep=torch.tensor([900.0, 250.0]), encoder_hidden_states=text, pooled_projections=pooled
        ).sample
        velocity = prior.velocity(prior.conditions(PROMPTS))(latents, sigma)
        shorter = replace(prior, schedule=FlowSchedule(num_train_timesteps=500))  # the network's times are of 0 .. T
        of_500 = shorter.velocity(prior.conditions(PROMPTS))(latents, sigma)
        torch.testing.assert_close(of_500, prior.velocity(prior.conditions(PROMPTS))(latents, sigma / 2))
        assert not torch.allclose(of_500, velocity)
    torch.testing.assert_close(velocity, expected)


@pytest.mark.parametrize(("cfg_scale", "steps", "shift"), [(6.0, 4, 3.0), (1.0, 3, 3.0), (2.5, 3, 1.0), (6.0, 1, 3.0)])
def test_the_sampling_loop_is_that_of_the_pipeline(
    cfg_scale: float, steps: int, shift: float, prior: SD3Prior, pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = normal(2, 16, 8, 12, seed=2)
    schedule = FlowSchedule(shift=shift)
    monkeypatch.setattr(prior, "schedule", schedule)
    monkeypatch.setattr(pipe, "scheduler", pipeline(shift).scheduler)
    expected = pipe(
        prompt=PROMPTS,
        negative_prompt=NEGATIVES,
        height=16,
        width=24,
        num_inference_steps=steps,
        guidance_scale=cfg_scale,
        latents=noise,
        max_sequence_length=T5_LENGTH,
        output_type="latent",
    ).images
    with torch.no_grad():
        latents = generate_latents(prior, noise, PROMPTS, NEGATIVES, steps=steps, cfg_scale=cfg_scale)
    torch.testing.assert_close(latents, expected, atol=2e-5, rtol=2e-5)
    assert float((latents - noise).abs().max()) > 0.1


def test_a_pictures_latents_do_not_depend_on_its_company(prior: SD3Prior) -> None:
    """Except for rounding of the network's matrix products, as for every sampler."""
    noise = normal(2, 16, 8, 8, seed=5)
    with torch.no_grad():
        both = generate_latents(prior, noise, PROMPTS, NEGATIVES, steps=3)
        alone = [
            generate_latents(prior, noise[i : i + 1], PROMPTS[i : i + 1], NEGATIVES[i : i + 1], steps=3) for i in (0, 1)
        ]
        other = generate_latents(prior, noise, PROMPTS, steps=3)
        empty = generate_latents(prior, noise, PROMPTS, ["", ""], steps=3)
    torch.testing.assert_close(both, torch.cat(alone), atol=1e-5, rtol=1e-5)
    assert float((other - both).abs().max()) > 1e-4, "the negative prompts count"
    assert torch.equal(other, empty), "without negative prompts they are empty"


@pytest.mark.parametrize(
    ("parts", "absent"),
    [
        (["text_encoder_3"], ["text_encoder_3"]),
        (["text_encoder"], ["text_encoder"]),
        (["text_encoder_2", "text_encoder_3"], ["text_encoder_2", "text_encoder_3"]),
        (["text_encoder", "text_encoder_2"], ["text_encoder", "text_encoder_2"]),
        (["text_encoder", "text_encoder_2", "text_encoder_3"], ["text_encoder", "text_encoder_2", "text_encoder_3"]),
    ],
)
def test_zeros_stand_for_absent_text_encoders(
    parts: list[str], absent: list[str], folder: Path, prior: SD3Prior, tmp_path: Path
) -> None:
    place = tmp_path / "part"
    shutil.copytree(folder, place)
    for part in parts:
        shutil.rmtree(place / part)
        shutil.rmtree(place / part.replace("text_encoder", "tokenizer"))
    small = load_sd3_prior(str(place), t5_tokens=T5_LENGTH)
    assert list(small.absent) == absent
    text, pooled = small.embed_prompts(PROMPTS)
    expected_text, expected_pooled = (tensor.clone() for tensor in prior.embed_prompts(PROMPTS))
    length = 7 if len(parts) < 3 and parts != ["text_encoder", "text_encoder_2"] else 77
    if "text_encoder" in parts:
        expected_text[:, :7, :16], expected_pooled[:, :16] = 0, 0
    if "text_encoder_2" in parts:
        expected_text[:, :7, 16:40], expected_pooled[:, 16:] = 0, 0
    if "text_encoder_3" in parts:
        expected_text[:, 7:] = 0
    if length == 77:  # without any CLIP the prompt has the usual length
        expected_text = torch.cat([torch.zeros(2, 77, 48), expected_text[:, 7:]], dim=1)
    torch.testing.assert_close(text, expected_text)
    torch.testing.assert_close(pooled, expected_pooled)
    with torch.no_grad():
        latents = generate_latents(small, normal(2, 16, 8, 8), PROMPTS, steps=1)
    assert latents.isfinite().all()


def test_the_t5_less_text_is_that_of_the_pipeline(folder: Path, pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    small = load_sd3_prior(str(folder), t5="none", t5_tokens=T5_LENGTH)
    assert small.absent == ("text_encoder_3",)
    monkeypatch.setattr(pipe, "text_encoder_3", None)
    expected = reference_text(pipe, PROMPTS)
    for own, other in zip(small.embed_prompts(PROMPTS), expected, strict=True):
        torch.testing.assert_close(own, other)


def test_precisions(folder: Path) -> None:
    half = load_sd3_prior(str(folder), "bf16", t5_tokens=T5_LENGTH)
    kinds = {part: {p.dtype for p in module.parameters()} for part, module in half.modules.items()}
    assert kinds["autoencoder"] == {torch.float32}, "force_upcast"
    assert kinds["transformer"] == kinds["text_encoder"] == kinds["text_encoder_2"] == {torch.bfloat16}
    noise = normal(1, 16, 8, 8)
    with torch.no_grad():
        assert generate_latents(half, noise, ["red"], steps=2).dtype == torch.float32
        assert half.velocity(half.conditions(["red"]))(noise, torch.tensor([0.5])).dtype == torch.float32
    whole = load_sd3_prior(str(folder), t5_tokens=T5_LENGTH).halve_text_encoder()
    assert {p.dtype for p in whole.text_encoders[2].parameters()} == {torch.bfloat16}  # type: ignore[union-attr]
    assert {p.dtype for p in whole.network.parameters()} == {torch.float32}
    assert {p.dtype for p in whole.in_precision("fp16").network.parameters()} == {torch.float16}
    kinds = {name.split(".")[-2]: p.dtype for name, p in whole.text_encoders[2].named_parameters()}  # type: ignore[union-attr]
    assert kinds["wo"] == torch.float32 and kinds["wi"] == kinds["q"] == torch.float16, "as transformers opens a T5"


def test_a_network_on_the_meta_device_needs_no_weights(folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "none"
    shutil.copytree(folder, place)
    for file in (place / "transformer").glob("*.safetensors"):
        file.unlink()
    assert load_sd3_prior(str(place), with_network=False, with_text=False).network.device.type == "meta"
    with pytest.raises(ModelError, match=r"lacks transformer/diffusion_pytorch_model\.safetensors"):
        load_sd3_prior(str(place))


def change(place: Path, file: str, **entries: Any) -> None:
    """Entries of a configuration; None removes one."""
    config = json.loads((place / file).read_text())
    config = {k: v for k, v in {**config, **entries}.items() if v is not None}
    (place / file).write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("file", "entries", "words"),
    [
        (
            "transformer/config.json",
            {"_class_name": "PixArtTransformer2DModel"},
            "holds a PixArtTransformer2DModel, not",
        ),
        ("transformer/config.json", {"num_layers": 4}, r"transformer_blocks\.2\.norm1_context.*expected shape"),
        ("vae/config.json", {"shift_factor": None}, "no shift_factor"),
        ("vae/config.json", {"_class_name": "AutoencoderTiny"}, "not a AutoencoderKL"),
        ("text_encoder/config.json", {"architectures": ["CLIPTextModel"]}, "not a CLIPTextModelWithProjection"),
        ("text_encoder_3/config.json", {"architectures": ["BertModel"], "model_type": "bert"}, "not a T5EncoderModel"),
        ("scheduler/scheduler_config.json", {"_class_name": "DDIMScheduler"}, "FlowMatch scheduler"),
        ("scheduler/scheduler_config.json", {"use_dynamic_shifting": True}, "use_dynamic_shifting"),
        ("scheduler/scheduler_config.json", {"use_karras_sigmas": True}, "use_karras_sigmas is not supported"),
    ],
)
def test_wrong_folders_are_refused(
    file: str, entries: dict[str, Any], words: str, folder: Path, tmp_path: Path
) -> None:
    place = tmp_path / "wrong"
    shutil.copytree(folder, place)
    change(place, file, **entries)
    with pytest.raises(ModelError, match=words):
        load_sd3_prior(str(place))


def test_every_missing_and_unexpected_key_is_named(folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "wrong"
    shutil.copytree(folder, place)
    file = place / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    for name in ("proj_out.bias", "context_embedder.bias"):
        del tensors[name]
    save_file({**tensors, "stray.weight": torch.zeros(1)}, file, {"format": "pt"})
    words = r"2 missing keys: context_embedder\.bias, proj_out\.bias; 1 unexpected keys: stray\.weight"
    with pytest.raises(ModelError, match=words):
        load_sd3_prior(str(place))


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        ("transformer/config.json", r"lacks transformer/config\.json"),
        ("vae/config.json", r"lacks vae/config\.json"),
        ("scheduler/scheduler_config.json", r"lacks scheduler/scheduler_config\.json"),
        ("text_encoder_3/model.safetensors", r"lacks text_encoder_3/model\.safetensors"),
        ("tokenizer_2/tokenizer.json", "tokenizer_2: no tokenizer"),
    ],
)
def test_missing_files_are_named(missing: str, words: str, folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "wrong"
    shutil.copytree(folder, place)
    (place / missing).unlink()
    with pytest.raises(ModelError, match=words):
        load_sd3_prior(str(place))


def test_parts_that_do_not_fit_together_are_refused(folder: Path, tmp_path: Path) -> None:
    network = {"in_channels": 16, "pooled_projection_dim": 40, "joint_attention_dim": 48}
    for channels, projections, t5, words in (
        (4, [16, 24], 48, "the autoencoder makes 4"),
        (16, [16, 16], 48, "CLIPs make 32"),
        (16, [41], 48, "CLIPs make 41"),
        (16, [16, 24], 64, "T5 makes 64"),
    ):
        assert words in check_sd3_shape(network, channels, projections, t5)
    for projections in ([], [16], [16, 24]):
        assert check_sd3_shape(network, 16, projections, 0) == check_sd3_shape(network, 16, projections, 48) == ""
    other = pipeline(pooled_projection_dim=44)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ModelError, match="not of SD3's shape: the transformer takes 44"):
        load_sd3_prior(str(tmp_path / "other"))


def test_t5_in_8_bit_needs_its_package(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sd3_files.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="needs the package bitsandbytes"):
        load_sd3_prior(str(folder), t5="8bit")
    with pytest.raises(ModelError, match="8 bit from a diffusers folder only"):
        load_sd3_prior("some.safetensors", t5="8bit")


def test_t5_in_8_bit_is_near_the_whole_one(folder: Path, prior: SD3Prior) -> None:
    """Requires bitsandbytes, which the lock has for all systems but macOS; there the refusal is tested."""
    if importlib.util.find_spec("bitsandbytes") is None:
        with pytest.raises(ModelError, match="needs the package bitsandbytes"):
            load_sd3_prior(str(folder), t5="8bit")
        return
    small = load_sd3_prior(str(folder), t5="8bit", t5_tokens=T5_LENGTH)
    encoder = small.text_encoders[2]
    assert encoder is not None and torch.int8 in {p.dtype for p in encoder.parameters()}
    own, whole = small.embed_prompts(PROMPTS)[0][:, 7:], prior.embed_prompts(PROMPTS)[0][:, 7:]
    assert 0 < float((own - whole).abs().max()) < 0.05 * float(whole.abs().max())
    small.in_precision("bf16").halve_text_encoder()
    assert torch.int8 in {p.dtype for p in encoder.parameters()}, "casts leave the 8 bits alone"


@pytest.mark.parametrize("tokens", [0, 513])
def test_t5s_length_has_a_range(tokens: int) -> None:
    with pytest.raises(ValueError, match="between 1 and 512"):
        load_sd3_prior("anything", t5_tokens=tokens)


def test_a_pooled_text_is_needed(prior: SD3Prior) -> None:
    with pytest.raises(ValueError, match="needs pooled text"):
        prior.velocity(Conditions(text=torch.zeros(1, 3, 48)))


@pytest.mark.parametrize(("config", "count"), [(SD3_TRANSFORMER, 2_028_328_000), (SD35_TRANSFORMER, 2_243_171_520)])
def test_published_sizes(config: dict[str, Any], count: int) -> None:
    """SD3 medium: reference/dra.md, section 3. SD3.5 medium: ours, from the same class."""
    with torch.device("meta"):
        network = FAMILIES["sd3"].build(config)
    assert sum(p.numel() for p in network.parameters()) == count
    assert set(FAMILIES["sd3"].networks) == set(LICENCES) == {SD3_MEDIUM, SD35_MEDIUM}


# -- the prior of our own ----------------------------------------------------------------------------------------------


def test_the_nano_sizes_stay_below_6_mb_in_half_precision() -> None:
    nano = build_sd3_prior(NANO_SD3, build_tokenizer_json(VOCABULARY, NANO_SD3["text_length"]))
    numbers = sum(tensor.numel() for module in nano.modules.values() for tensor in module.state_dict().values())
    assert 2 * numbers < 5_700_000, "two bytes each, and some room for heads and names"
    assert nano.absent == () and nano.multiple_px == 8


def test_a_model_folder_of_another_shape_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not one of sdxl"):
        load_sd3_prior("nano")
    card = ModelCard(name="x", system="prior", config={**NANO_SD3, "schedule": {"beta_start": 0.1}})
    save_model(
        tmp_path / "mine", card, {"a": {"w": torch.zeros(1)}}, {"tokenizer.json": build_tokenizer_json(["red"], 16)}
    )
    with pytest.raises(ModelError, match="of SDXL's shape is needed here, and this one is of the family sd3"):
        load_prior(str(tmp_path / "mine"))
    with pytest.raises(ModelError, match="its config builds no prior"):
        load_sd3_prior(str(tmp_path / "mine"))
    save_model(tmp_path / "no", ModelCard(name="x", system="instantir"), {"a": {"w": torch.zeros(1)}})
    with pytest.raises(ModelError, match="not a prior"):
        load_sd3_prior(str(tmp_path / "no"))
