"""An IP-Adapter on the real score: only this score takes the input picture."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helper_modules import load_helper
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from components.models import ModelError
from components.objectives.distillation import Distillation
from components.randomness import generator
from components.recipes import RecipeError
from components.systems.instarevive.identity import (
    load_ip_adapter,
    load_picture_embedder,
    with_ip_adapter,
)
from components.systems.instarevive.network import EpsPredictor
from components.systems.instarevive.training import build_objective

WIDTH, TOKENS = 8, 4


trainings = load_helper("components/test_instarevive_training.py")


def random(*shape: int, name: str, scale: float = 0.3) -> Tensor:
    return scale * torch.from_numpy(generator(5, name).standard_normal(shape, dtype=np.float32))


def write_adapter(network: Any, path: Path) -> Path:
    """An IP-Adapter of random weights that fits a UNet, with the published keys."""
    cross_width = network.config["cross_attention_dim"]
    tensors = {
        "image_proj.proj.weight": random(TOKENS * cross_width, WIDTH, name="proj"),
        "image_proj.proj.bias": random(TOKENS * cross_width, name="bias"),
        "image_proj.norm.weight": torch.ones(cross_width),
        "image_proj.norm.bias": torch.zeros(cross_width),
    }
    places = [name for name in network.attn_processors if not name.endswith("attn1.processor")]
    for number, name in enumerate(places):
        width = network.get_submodule(name.removesuffix(".processor")).to_k.weight.shape[0]
        for kind in ("k", "v"):
            tensors[f"ip_adapter.{2 * number + 1}.to_{kind}_ip.weight"] = random(
                width, cross_width, name=f"{kind}{number}"
            )
    save_file(tensors, path)
    return path


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = CLIPVisionConfig(**sizes, image_size=32, patch_size=8, projection_dim=WIDTH)
        CLIPVisionModelWithProjection(config).save_pretrained(folder)
    return folder


def test_only_the_real_score_takes_the_picture(encoder: Path, tmp_path: Path) -> None:
    plain = build_objective(trainings.recipe(), {})
    adapter = write_adapter(plain.backbone.network, tmp_path / "ip.safetensors")
    recipe = trainings.recipe(ip_adapter=str(adapter), picture_encoder=str(encoder))
    objective = build_objective(recipe, {})
    rows = trainings.batch()
    assert objective.picture_embedder is not None
    conditions = objective.texts.conditions(rows, torch.zeros(2, dtype=torch.bool))
    score_conditions, empty = objective._score_conditions(rows, conditions)
    assert (
        score_conditions.image is not None and score_conditions.image.shape == (2, WIDTH) and conditions.image is None
    )
    assert empty.image is not None and not empty.image.any()
    latents, t = objective.lq_latents(rows), torch.tensor([300, 300])
    eps = objective.real.predict_eps(latents, t, score_conditions)
    other_eps = objective.real.predict_eps(latents, t, replace(score_conditions, image=score_conditions.image.flip(0)))
    assert (eps - other_eps).abs().max() > 1e-3, "the score must depend on the picture"
    prior_eps = plain.real.predict_eps(latents, t, conditions)
    assert (eps - prior_eps).abs().max() > 1e-3
    assert objective.fake is not None  # the fake score starts as the prior without the adapter
    torch.testing.assert_close(objective.fake.predict_eps(latents, t, conditions), prior_eps)
    metrics = trainings.train(objective)
    assert np.isfinite(metrics["loss_dsm"]) and metrics["bad_steps"] == 0
    assert not [key for key in objective.parts()["generator"] if "ip" in key.split(".")]
    with pytest.raises(ValueError, match="needs picture embeddings"):
        objective.real.predict_eps(latents, t, conditions)


def test_a_lora_on_the_fake_score_leaves_the_teacher_alone(encoder: Path, tmp_path: Path) -> None:
    plain = build_objective(trainings.recipe(), {})
    adapter = write_adapter(plain.backbone.network, tmp_path / "ip.safetensors")
    lora = Distillation(fake="lora", lora_rank=4)
    recipe = trainings.recipe(ip_adapter=str(adapter), picture_encoder=str(encoder), distillation=lora)
    objective = build_objective(recipe, {})
    assert isinstance(objective.real, EpsPredictor)
    frozen = {key: value.clone() for key, value in objective.real.network.state_dict().items()}
    assert not [key for key in frozen if "lora" in key]
    trainings.train(objective)
    assert all(torch.equal(value, frozen[key]) for key, value in objective.real.network.state_dict().items())


def test_the_embedder_preprocesses_like_clip(encoder: Path) -> None:
    embedder = load_picture_embedder(str(encoder))
    pictures = random(2, 3, 32, 32, name="pictures").clamp(-1, 1)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.4815, 0.4578, 0.4082), (0.2686, 0.2613, 0.2758)))
    expected = embedder.encoder(((pictures + 1) / 2 - mean) / std).image_embeds
    torch.testing.assert_close(embedder(pictures), expected, atol=1e-3, rtol=1e-3)
    assert embedder(pictures.repeat_interleave(2, dim=2)).shape == (2, WIDTH)


def test_adapters_that_do_not_fit_are_refused(encoder: Path, tmp_path: Path) -> None:
    network = build_objective(trainings.recipe(), {}).backbone
    adapter = write_adapter(network.network, tmp_path / "ip.safetensors")
    weights = load_ip_adapter(str(adapter))
    for key in [key for key in weights["ip_adapter"] if key.startswith("1.")]:
        weights["ip_adapter"][key] = weights["ip_adapter"][key][:, :-1]
    with pytest.raises(ModelError, match="does not fit this prior's network"):
        with_ip_adapter(network.predictor(), weights)
    extra = load_ip_adapter(str(adapter))
    extra["ip_adapter"]["99.to_k_ip.weight"] = torch.zeros(1)
    with pytest.raises(ModelError, match="the network needs"):
        with_ip_adapter(network.predictor(), extra)
    save_file({"unet.conv_in.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ModelError, match=r"unet\.conv_in\.weight is not a key of an IP-Adapter"):
        load_ip_adapter(str(tmp_path / "other.safetensors"))
    with pytest.raises(ModelError, match="neither a path nor a place on the hub"):
        load_ip_adapter("nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_picture_embedder(str(tmp_path / "empty"))
    with pytest.raises(RecipeError, match="go together"):
        trainings.recipe(ip_adapter=str(adapter))
    with pytest.raises(RecipeError, match="family sd, sdxl or nano"):
        trainings.recipe(ip_adapter=str(adapter), picture_encoder=str(encoder), family="pixart")
