"""The ControlNet twins of DRA at a tiny size, against diffusers' ControlNets: LQ path, restorer, folders, recipes."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.controlnets.controlnet import ControlNetModel
from helper_modules import load_helper
from torch import Tensor, nn

from components.models import load_model
from components.priors.block_calls import recompute
from components.priors.opening import load_prior
from components.randomness import Noise
from components.recipes import RecipeError
from components.systems.dra.build import network_of
from components.systems.dra.bundle import ADAPTERS, Bundle
from components.systems.dra.config import AdapterConfig, LoraConfig
from components.systems.dra.memory import plan_memory
from components.systems.dra.network import Dra
from components.systems.dra.objectives import AdaptersObjective, FlowAdaptersObjective, VariantsObjective
from components.systems.dra.restorer import DraRestorer
from components.systems.dra.tokens import TokenDra
from components.systems.dra.weights import expected_layout
from components.systems.recipes import load_recipe
from components.types import Request

tiny, tokens = load_helper("components/test_dra.py"), load_helper("components/test_dra_tokens.py")
hand = load_helper("components/test_dra_restorer.py")
tensor = tiny.tensor

MAPS = {"maps": AdapterConfig(form="controlnet"), "latents": AdapterConfig(form="controlnet", hint="latents")}
TOKENS = AdapterConfig(form="controlnet", layers=2)
NONE = LoraConfig(rank=0)
SHAPES = ["maps", "latents", "tokens"]
TIMES, STEPS = torch.tensor([0.2, 0.8]), torch.tensor([10, 700])


def fresh(shape: str) -> Any:
    if shape in MAPS:
        return Dra(tiny.make_prior(), MAPS[shape], NONE)
    return TokenDra(tokens.make_prior(), TOKENS, NONE)


def trained(shape: str) -> Any:
    return tiny.train_a_little(fresh(shape))


def predict(network: Any, latents: Tensor, lq: Tensor) -> Tensor:
    conditions = conditions_of(network)
    if isinstance(network, Dra):
        return network.predict_eps(latents, STEPS, network.features(lq), conditions)
    return network.predict_velocity(latents, TIMES, network.features(lq), conditions)  # type: ignore[no-any-return]


def conditions_of(network: Any) -> Any:
    return (
        tiny.make_conditions(network.prior) if isinstance(network, Dra) else network.prior.conditions(["red", "blue"])
    )


def plain(network: Any, latents: Tensor) -> Tensor:
    conditions = conditions_of(network)
    if isinstance(network, Dra):
        return tiny.plain_eps(network.prior, latents, STEPS, conditions)  # type: ignore[no-any-return]
    return tokens.diffusers_velocity(network.prior, latents, TIMES, conditions)  # type: ignore[no-any-return]


def latents_of(network: Any, rows: int = 2, name: str = "z") -> Tensor:
    return tensor(name, rows, network.prior.latent_channels, 8, 12)  # type: ignore[no-any-return]


def lq_of(network: Any, name: str = "lq") -> Tensor:
    """What the twin sees of LQ: pictures, or latents."""
    factor = network.adapters.factor
    return tensor(name, 2, 3, 8 * factor, 12 * factor) if factor > 1 else latents_of(network, name=name)  # type: ignore[no-any-return]


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_a_new_copy_leaves_the_prior_bit_equal(shape: str) -> None:
    network = fresh(shape)
    latents, lq = latents_of(network), lq_of(network)
    expected = plain(network, latents)
    assert torch.equal(predict(network, latents, lq), expected)
    copied = dict(network.adapters.named_parameters())
    own = {name.removeprefix("net."): value for name, value in copied.items()}
    theirs = dict(network.prior.network.named_parameters())
    shared = set(own) & set(theirs)
    assert len(shared) > 20 and all(torch.equal(own[name], theirs[name]) for name in shared)
    alone = {name.split(".")[0] for name in set(own) - shared}
    parts = {"maps": {"hint", "out", "middle"}, "latents": {"hint", "out"}}
    assert alone == {**parts, "tokens": {"controlnet_blocks", "pos_embed_input"}}[shape]
    zero = ("hint.conv_out", "hint.weight", "hint.bias", "out.", "middle", "net.controlnet_blocks")
    assert all(not copied[name].any() for name in copied if name.startswith(zero))
    tiny.train_a_little(network)
    moved = predict(network, latents, lq)
    assert float((moved - expected).abs().max()) > 1e-3
    assert float((predict(network, latents, lq_of(network, name="o")) - moved).abs().max()) > 1e-4
    halves = predict(network, latents, lq[:1])  # both halves of guidance get the features of one picture
    torch.testing.assert_close(halves, predict(network, latents, torch.cat([lq[:1], lq[:1]])), rtol=1e-4, atol=1e-5)


class Hint(nn.Module):
    """diffusers' ControlNet encodes a picture; ours has latents and one convolution."""

    def __init__(self, hint: nn.Conv2d) -> None:
        super().__init__()
        self.hint = hint

    def forward(self, lq: Tensor) -> Tensor:
        return self.hint(lq)  # type: ignore[no-any-return]


@pytest.mark.parametrize("shape", ["maps", "latents"])
@torch.no_grad()
def test_on_a_unet_it_is_diffusers_controlnet_without_the_middle(shape: str) -> None:
    """With pictures it is the whole one, whose forward pass leaves out an absent middle block."""
    network = trained(shape)
    latents, lq = latents_of(network), lq_of(network)
    conditions, unet = tiny.make_conditions(network.prior), network.prior.unet
    widths = (16, 32, 96)  # for latents of factor 4
    theirs: Any = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=widths)
    own = dict(network.adapters.named_parameters())
    for name, parameter in theirs.named_parameters():
        if name in own:
            parameter.copy_(own[name])
    for number, zero in enumerate(theirs.controlnet_down_blocks):
        zero.load_state_dict(network.adapters.out[number].state_dict())
    if shape == "latents":
        theirs.controlnet_cond_embedding, seen = Hint(network.adapters.hint), lq
        theirs.controlnet_mid_block.requires_grad_(False).weight.zero_()
        theirs.controlnet_mid_block.bias.zero_()
    else:
        theirs.controlnet_cond_embedding.load_state_dict(network.adapters.hint.state_dict())
        theirs.controlnet_mid_block.load_state_dict(network.adapters.middle.state_dict())
        seen = (lq + 1) / 2
    theirs.mid_block = None
    arguments: dict[str, Any] = {"encoder_hidden_states": conditions.text}
    arguments["added_cond_kwargs"] = {"text_embeds": conditions.pooled, "time_ids": conditions.time_ids}
    down, middle = theirs(latents, STEPS, controlnet_cond=seen, return_dict=False, **arguments)
    added = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
    eps = unet(latents, STEPS, **added, **arguments)
    torch.testing.assert_close(predict(network, latents, lq), eps.sample, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layers", [2, 3])
@torch.no_grad()
def test_on_an_mm_dit_it_is_diffusers_controlnet(layers: int) -> None:
    """diffusers' own embedding of LQ latents, and its shares of the blocks; SD3.5's second attention too."""
    network: Any = TokenDra(tokens.make_prior(**tokens.SD35), AdapterConfig(form="controlnet", layers=layers), NONE)
    tiny.train_a_little(network)
    latents, lq, conditions = latents_of(network), latents_of(network, name="lq"), conditions_of(network)
    inputs: dict[str, Any] = {"encoder_hidden_states": conditions.text, "pooled_projections": conditions.pooled}
    (residuals,) = network.adapters.net(latents, lq, timestep=1000 * TIMES, return_dict=False, **inputs)
    velocity = network.prior.network(
        latents, timestep=1000 * TIMES, block_controlnet_hidden_states=residuals, **inputs
    ).sample
    torch.testing.assert_close(predict(network, latents, lq), velocity, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_it_trains_with_and_without_checkpointing(shape: str) -> None:
    gradients = []
    for again in (False, True):
        network = trained(shape)
        batch = tiny.make_batch(2, 16 if shape == "tokens" else 32)
        if again:
            network.blocks = network.blocks.wrap_all(recompute)
        kind: Any = FlowAdaptersObjective if shape == "tokens" else AdaptersObjective
        objective: VariantsObjective[Bundle[Any, Any]] = kind(network)
        ((_, loss),) = objective.phases(batch, Noise(3, batch.positions))
        loss.value.backward()
        assert set(objective.parts()) == {ADAPTERS}
        parameters = dict(objective.trainables[ADAPTERS].named_parameters())
        lacking = [name for name, p in parameters.items() if p.grad is None]
        # the last text tokens of the copy reach nothing
        assert all("transformer_blocks.1" in name for name in lacking)
        gradients.append([p.grad for name, p in parameters.items() if name not in lacking])
        assert all(p.grad is None for p in network.prior.network.parameters())
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("shape", SHAPES)
def test_it_restores_and_the_lq_path_is_computed_once(shape: str, tmp_path: Path) -> None:
    network = trained(shape)
    calls: Counter[str] = Counter()
    hint = network.adapters.net.pos_embed_input if shape == "tokens" else network.adapters.hint
    hint.register_forward_hook(lambda *_: calls.update(["hint"]))
    image = hand.picture(18, 30)
    options = {"steps": 3, "cfg_scale": 2.0, "negative_words": "none"}
    request = Request(key="k", image=image, seed=3, prompt="red", options=options)
    with torch.no_grad():
        answer = DraRestorer(network).restore([request])[0].image
        assert calls["hint"] == 1 and answer.shape == image.shape
        prior = tokens.make_prior() if shape == "tokens" else tiny.make_prior()
        again = network_of(tiny.save(network, tmp_path / "m"), prior)
        assert np.array_equal(DraRestorer(again).restore([request])[0].image, answer)
        untrained = DraRestorer(fresh(shape)).restore([request])[0].image
        assert np.abs(untrained.astype(int) - answer).max() > 1


def test_settings_recipes_and_files() -> None:
    for name, adapters in (("sdxl", {"hint": "picture"}), ("sd3", {"layers": 2})):
        recipe: Any = load_recipe(f"dra-{name}-controlnet-nano")
        assert recipe.lora == {"rank": 0} and recipe.adapters == {"form": "controlnet", **adapters}
        assert recipe.prior == load_recipe(f"dra-{name}-nano").prior
    for setting in ("adapters.block=naf", "adapters.layers=3"):
        with pytest.raises(RecipeError, match=r"(block|layers): not a setting of controlnet on maps"):
            load_recipe("dra-sdxl-controlnet-nano", [setting])
    with pytest.raises(RecipeError, match="every: not a setting of controlnet on tokens"):
        load_recipe("dra-sd3-controlnet-nano", ["adapters.every=2"])
    with pytest.raises(ValueError, match="needs a prior with more"):
        TokenDra(tokens.make_prior(), AdapterConfig(form="controlnet", layers=5), NONE)
    layout = expected_layout("nano", sizes={"adapters": {"form": "controlnet"}, "lora": {"rank": 0}})
    assert list(layout) == ["adapters.safetensors"] and "hint.conv_in.weight" in layout["adapters.safetensors"]


def test_tiles_of_a_picture_and_models_from_before_the_hint(tmp_path: Path) -> None:
    """Every tile sees its own part of the LQ picture; a model whose config has no `hint` takes latents."""
    network, seen = trained("maps"), list[Tensor]()
    image = hand.picture(64, 160)
    network.adapters.hint.register_forward_hook(lambda _, given, __: seen.append(given[0]))
    options = {"steps": 1, "cfg_scale": 1.0, "tile_px": 64, "tile_overlap": 0.25}
    DraRestorer(network).restore([Request(key="k", image=image, options=options)])
    whole = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
    assert [part.shape[-2:] for part in seen] == [(64, 64)] * 3
    for part, left in zip(seen, (0, 48, 96), strict=True):
        torch.testing.assert_close(part, whole[..., left : left + 64], atol=1e-6, rtol=0)
    older = trained("latents")
    folder = tiny.save(older, tmp_path / "m").path
    text = (folder / "model.json").read_text(encoding="utf-8")
    info = json.loads(text)
    del info["config"]["adapters"]["hint"]
    (folder / "model.json").write_text(json.dumps(info), encoding="utf-8")
    again = network_of(load_model(folder), tiny.make_prior())
    assert again.adapters.config.hint == "latents" and again.config() == older.config()
    nano = load_prior("nano")
    model = tiny.save(Dra(nano, MAPS["maps"], NONE), tmp_path / "n", dict(nano.source))
    assert plan_memory(model, (128, 128), {}).total > 0
