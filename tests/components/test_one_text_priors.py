"""PixArt-alpha and Stable Diffusion 2.1 from diffusers folders: tiny networks, saved by their libraries."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from tokenizers import Tokenizer
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from components.models import ModelCard, ModelError, load_model, save_model
from components.priors.nano import build_tokenizer_json
from components.priors.one_text import load_one_text_prior
from components.randomness import Noise, seeded_init
from components.samplers.schedules import FlowSchedule
from components.systems.instarevive.backbone import open_backbone
from components.systems.instarevive.build import build_restorer, generator_config, generator_parts
from components.systems.instarevive.network import OneStepGenerator
from components.systems.instarevive.training import build_objective
from components.systems.instarevive.weights import expected_layout
from components.systems.recipes import load_recipe
from components.types import Batch, Request

WORDS = ["red", "blue"]
SCHEDULES: dict[str, dict[str, Any]] = {
    "pixart": {"beta_start": 1e-4, "beta_end": 2e-2, "beta_schedule": "linear", "num_train_timesteps": 1000},
    "sd": {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": 1000,
        "prediction_type": "v_prediction",
    },
}


def tokenizer(length: int) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(build_tokenizer_json(WORDS, length)),
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        model_max_length=length,
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A pipeline's folder by family."""
    paths = {}
    for family in ("pixart", "sd"):
        folder = tmp_path_factory.mktemp(family)
        with seeded_init(0, family):
            network: Any = (
                PixArtTransformer2DModel(
                    num_attention_heads=2,
                    attention_head_dim=8,
                    num_layers=1,
                    cross_attention_dim=16,
                    caption_channels=12,
                    sample_size=8,
                )
                if family == "pixart"
                else UNet2DConditionModel(
                    block_out_channels=(8, 16),
                    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
                    layers_per_block=1,
                    attention_head_dim=4,
                    cross_attention_dim=12,
                    norm_num_groups=4,
                    sample_size=8,
                )
            )
            vae = AutoencoderKL(
                block_out_channels=(8, 8),
                down_block_types=("DownEncoderBlock2D",) * 2,
                up_block_types=("UpDecoderBlock2D",) * 2,
                norm_num_groups=4,
            )
            text: Any = (
                T5EncoderModel(T5Config(d_model=12, d_kv=4, d_ff=16, num_layers=1, num_heads=2, vocab_size=8))
                if family == "pixart"
                else CLIPTextModel(
                    CLIPTextConfig(
                        hidden_size=12,
                        intermediate_size=16,
                        num_hidden_layers=1,
                        num_attention_heads=2,
                        vocab_size=8,
                        max_position_embeddings=6,
                    )
                )
            )
        network.save_pretrained(folder / ("transformer" if family == "pixart" else "unet"))
        vae.save_pretrained(folder / "vae")
        text.save_pretrained(folder / "text_encoder")
        tokenizer(6).save_pretrained(folder / "tokenizer")
        (folder / "scheduler").mkdir()
        (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULES[family]))
        paths[family] = folder
    return paths


@pytest.mark.parametrize(("family", "tokens", "step"), [("pixart", 300, 400), ("sd", 6, None)])
def test_a_folder_becomes_a_backbone(family: str, tokens: int, step: int | None, folders: dict[str, Path]) -> None:
    backbone = open_backbone(family, str(folders[family]))
    assert backbone.factor == 2 and backbone.latent_channels == 4 and backbone.source["id"] == str(folders[family])
    assert backbone.prediction == SCHEDULES[family].get("prediction_type", "epsilon")
    conditions = backbone.conditions(["red", "blue blue"], torch.tensor([[32, 32, 0, 0, 32, 32]]).expand(2, -1))
    assert conditions.text.shape == (2, tokens, 12)
    if family == "pixart":
        assert conditions.mask is not None and conditions.mask.sum(dim=1).tolist() == [3, 4]  # with begin and end
    else:
        assert conditions.mask is None
    generator = OneStepGenerator(backbone.predictor())
    assert step is None or generator.timestep == step
    with torch.no_grad():
        lq = backbone.encode(torch.zeros(2, 3, 32, 32))
        assert backbone.decode(generator(lq, conditions)).shape == (2, 3, 32, 32)
    assert not any(p.requires_grad for module in backbone.prior.modules.values() for p in module.parameters())


@pytest.mark.parametrize("family", ["pixart", "sd"])
def test_training_embeds_a_batch_in_one_call_independent_of_earlier_batches(
    family: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone, calls = open_backbone(family, str(folders[family])), []
    embed = backbone.prior.embed_prompts
    monkeypatch.setattr(
        backbone.prior, "embed_prompts", lambda prompts: (calls.append(list(prompts)), embed(prompts))[1]
    )
    sizes = torch.tensor([[32, 32, 0, 0, 32, 32]])
    words = ["red", "", "blue", "red"]
    first = backbone.conditions(words, sizes.expand(4, -1), together=True)
    assert calls == [["red", "blue"], [""]]
    backbone.conditions(["blue"], sizes, together=True)
    again = backbone.conditions(words, sizes.expand(4, -1), together=True)
    assert calls[2:] == [["blue"], ["red", "blue"]]  # the same call as in a resumed run; the empty prompt is cached
    alone = open_backbone(family, str(folders[family])).conditions(words, sizes.expand(4, -1))
    for name, value in first.tensors().items():
        assert torch.equal(value, again.tensors()[name])
        torch.testing.assert_close(value, alone.tensors()[name])


def test_a_recipe_in_bf16_halves_the_text_encoder_alone(folders: dict[str, Path]) -> None:
    backbone = open_backbone("pixart", str(folders["pixart"]))
    sizes = torch.tensor([[32, 32, 0, 0, 32, 32]])
    whole = backbone.conditions(["red"], sizes)
    objective = build_objective(
        load_recipe("instarevive-bsr-nano", ["family=pixart", f"prior={folders['pixart']}", "precision=bf16"]), {}
    )
    half = objective.backbone
    assert half.conditions(["red"], sizes).text.dtype == torch.bfloat16
    assert (
        {p.dtype for p in half.network.parameters()}
        == {p.dtype for p in half.autoencoder.parameters()}
        == {torch.float32}
    )
    torch.testing.assert_close(half.conditions(["red"], sizes).text.float(), whole.text, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("family", ["pixart", "sd"])
def test_precomputed_latents_give_the_same_losses(family: str, folders: dict[str, Path]) -> None:
    """The latents are rounded to float16, as `precompute:` stores them; this prior embeds prompts itself."""
    recipe = load_recipe("instarevive-bsr-nano", [f"family={family}", f"prior={folders[family]}", "resolution=32"])
    objective = build_objective(recipe, {})
    draw = np.random.default_rng(0)
    hq, lq = (torch.from_numpy(draw.uniform(-1, 1, (3, 3, 32, 32)).astype("float32")) for _ in range(2))
    batch = Batch(
        keys=["a", "b", "c"],
        positions=np.arange(3),
        hq=hq,
        lq=lq,
        prompts=["red", "blue", ""],
        sizes=torch.tensor([[32, 32, 0, 0, 32, 32]]).expand(3, -1),
    )
    latents = objective.backbone.encode(hq).half().float()
    results = [
        {name: float(v) for _, loss in objective.phases(b, Noise(0, b.positions)) for name, v in loss.metrics.items()}
        for b in (batch, replace(batch, latents=latents), replace(batch, latents=latents + 1))
    ]
    assert results[0].keys() == results[1].keys() >= {"distance", "loss_regression", "loss_dsm", "loss_fake"}
    for name, value in results[0].items():
        assert results[1][name] == pytest.approx(value, rel=2e-3), name
    assert results[2]["distance"] > 1.01 * results[0]["distance"]


@pytest.mark.parametrize("family", ["pixart", "sd"])
def test_a_trained_folder_needs_its_prior_except_the_network(
    family: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    place = tmp_path / "prior"
    shutil.copytree(folders[family], place)
    backbone = open_backbone(family, str(place))
    generator = OneStepGenerator(backbone.predictor())
    card = ModelCard(
        name="m", system="instarevive", prior=backbone.source, config=generator_config(backbone, generator)
    )
    model = save_model(tmp_path / "model", card, generator_parts(generator))
    for file in place.glob("*/diffusion_pytorch_model.safetensors"):
        if file.parent.name != "vae":
            file.unlink()
    restorer = build_restorer(load_model(model.path))
    image = np.full((20, 28, 3), 90, dtype=np.uint8)
    assert restorer.restore([Request(key="k", image=image, prompt="red")])[0].image.shape == image.shape
    layout = expected_layout(prior=str(place), sizes={"family": family})["InstaRevive_v1.ckpt"]
    assert {k: tuple(v.shape) for k, v in model.part("generator").items()} == layout


def test_fp16_keeps_the_autoencoder_in_fp32(folders: dict[str, Path]) -> None:
    half = load_one_text_prior(str(folders["pixart"]), "pixart", "fp16", with_text=False)
    assert {p.dtype for p in half.network.parameters()} == {torch.float16}
    assert {p.dtype for p in half.autoencoder.parameters()} == {torch.float32}
    prior = load_one_text_prior(str(folders["pixart"]), "pixart", "bf16", with_text=False)
    assert {p.dtype for p in prior.autoencoder.parameters()} == {torch.bfloat16}
    assert prior.decode(torch.zeros(1, 4, 4, 4)).dtype == torch.float32
    with pytest.raises(ValueError, match="has no text encoder"):
        prior.embed_prompts(["red"])


def test_a_flows_schedule_is_read(folders: dict[str, Path], tmp_path: Path) -> None:
    place = tmp_path / "flow"
    shutil.copytree(folders["pixart"], place)
    scheduler = place / "scheduler" / "scheduler_config.json"
    config = dict(FlowMatchEulerDiscreteScheduler(shift=3.0).config)
    scheduler.write_text(json.dumps({**config, "_class_name": "FlowMatchEulerDiscreteScheduler"}))
    prior = load_one_text_prior(str(place), "pixart", with_text=False)
    assert (prior.schedule, prior.prediction) == (FlowSchedule(shift=3.0), "flow_prediction")
    for wrong, words in (({"use_dynamic_shifting": True}, "use_dynamic_shifting"), ({"shift": 0.0}, "shift positive")):
        scheduler.write_text(json.dumps({**config, "_class_name": "FlowMatchEulerDiscreteScheduler", **wrong}))
        with pytest.raises(ModelError, match=words):
            load_one_text_prior(str(place), "pixart", with_text=False)


def test_errors_name_missing_files_and_wrong_settings(folders: dict[str, Path], tmp_path: Path) -> None:
    place = tmp_path / "broken"
    shutil.copytree(folders["pixart"], place)
    config = json.loads((place / "transformer" / "config.json").read_text())
    (place / "transformer" / "config.json").write_text(json.dumps({**config, "num_layers": 2}))
    with pytest.raises(ModelError, match=r"transformer_blocks\.1"):
        load_one_text_prior(str(place), "pixart")
    scheduler = place / "scheduler" / "scheduler_config.json"
    (place / "transformer" / "config.json").write_text(json.dumps(config))
    for wrong, words in (
        ({"prediction_type": "sample"}, "epsilon or v_prediction"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr is not supported"),
        ({"beta_schedule": "squaredcos_cap_v2"}, "beta_schedule must be"),
    ):
        scheduler.write_text(json.dumps({**SCHEDULES["pixart"], **wrong}))
        with pytest.raises(ModelError, match=words):
            load_one_text_prior(str(place), "pixart")
    shutil.rmtree(place / "vae")
    with pytest.raises(ModelError, match=r"lacks vae/config\.json"):
        load_one_text_prior(str(place), "pixart")
