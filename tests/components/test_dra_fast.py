"""The fast path of DRA on an MM-DiT, and both shapes with weights in 8 bits."""

from __future__ import annotations

import functools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helper_modules import load_helper
from torch import nn

from components.models import Model, ModelCard, load_model, save_model
from components.priors.fast_mmdit import derive_mmdit, modulation_layers
from components.priors.fast_unet import Speed
from components.priors.mmdit_walk import TokenJoins
from components.priors.nano import build_tokenizer_json
from components.priors.sd3_config import NANO_SD3
from components.priors.sd3_nano import build_sd3_prior
from components.randomness import seeded_init
from components.systems import build_restorer
from components.systems.dra.config import AdapterConfig, LoraConfig
from components.systems.dra.fast import FastTokenBlocks, FastTokenDra
from components.systems.dra.memory import plan_memory
from components.systems.dra.restorer import DraRestorer
from components.systems.dra.tokens import TokenDra
from components.types import Request

tiny, tokens = load_helper("components/test_dra.py"), load_helper("components/test_dra_tokens.py")
hand, untrained = load_helper("components/test_dra_restorer.py"), load_helper("benchmarks/untrained.py")
tensor = tiny.tensor

SD35 = {**tokens.SD35, "dual_attention_layers": (0, 4)}
PLAIN, TIMES = Speed(join=False), torch.tensor([0.2, 0.8])


def count_forwards(modules: dict[str, Any]) -> Counter[str]:
    calls: Counter[str] = Counter()
    for name, module in modules.items():
        module.register_forward_hook(lambda *_, name=name: calls.update([name]))
    return calls


@pytest.mark.parametrize("changes", [{}, SD35])
@torch.no_grad()
def test_the_fast_walk_is_diffusers_own_forward(changes: dict[str, Any]) -> None:
    """Bit for bit with the network's own layers; with joined matrices up to rounding, also as views of the layers."""
    prior = tokens.make_prior(**changes)
    latents, conditions = tensor("z", 2, 16, 8, 12), prior.conditions(["red", "blue dark"])
    expected = tokens.diffusers_velocity(prior, latents, TIMES, conditions)
    for join, replace in ((False, False), (True, False), (True, True)):
        fast = derive_mmdit(prior.network, join, replace)
        embedding = fast.embed_times(1000 * TIMES) + fast.embed_pooled(conditions.pooled)
        text, modulations = fast.embed_text(conditions.text), fast.project(embedding)
        walked = fast.walk(latents, text, modulations, TokenJoins(), FastTokenBlocks())
        if not join:
            assert torch.equal(walked, expected)
        torch.testing.assert_close(walked, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(tokens.diffusers_velocity(prior, latents, TIMES, conditions), expected)
    prior.network.transformer_blocks[1].attn.to_k.weight.mul_(1.5)  # the views: the joined matrix changes too
    moved = fast.walk(latents, text, modulations, TokenJoins(), FastTokenBlocks())
    torch.testing.assert_close(moved, tokens.diffusers_velocity(prior, latents, TIMES, conditions))
    assert float((moved - expected).abs().max()) > 1e-5


@pytest.mark.parametrize("config", tokens.FORMS)
@torch.no_grad()
def test_adapters_on_the_fast_path(config: AdapterConfig) -> None:
    network = tokens.make_network(config)
    latents, lq = tensor("z", 4, 16, 8, 12), tensor("lq", 2, 16, 8, 12)
    conditions = network.prior.conditions(["red", "blue", "dark", "sky"])
    expected = network.predict_velocity(latents, TIMES, network.features(lq), conditions)
    live = FastTokenDra(network, Speed()).run()  # the LoRA's layers have wrappers: nothing is joined
    assert torch.equal(live.predict_velocity(latents, TIMES, live.features(lq), conditions), expected)
    network.merge_lora()
    merged = network.predict_velocity(latents, TIMES, network.features(lq), conditions)
    for speed, tolerance in ((PLAIN, 0.0), (Speed(), 1e-5)):
        run = FastTokenDra(network, speed).run()
        for _ in range(2):  # the second call takes text and modulations from the caches
            own = run.predict_velocity(latents, TIMES, run.features(lq), conditions)
            torch.testing.assert_close(own, merged, rtol=tolerance, atol=tolerance)
        later = run.predict_velocity(latents, 0.5 * TIMES, run.features(lq), conditions)
        slow = network.predict_velocity(latents, 0.5 * TIMES, network.features(lq), conditions)
        torch.testing.assert_close(later, slow, rtol=tolerance, atol=tolerance)


def test_what_is_computed_once_for_a_run_and_once_for_a_step() -> None:
    """Three steps, guided, over three tiles: text once, modulations and shifts once a step, LQ once a tile."""
    network = tokens.make_network()
    dit: Any = network.prior.network
    lora = {id(module) for layer in network.lora.values() for module in layer.modules()}  # type: ignore[attr-defined]
    assert not lora & {id(layer) for layer in modulation_layers(dit)}
    embed = dit.time_text_embed
    modules = {"text": dit.context_embedder, "pooled": embed.text_embedder, "time": embed.timestep_embedder}
    modules |= {f"modulation {n}": layer for n, layer in enumerate(modulation_layers(dit))}
    modules |= {f"shift {n}": adapter.emb for n, adapter in enumerate(network.adapters.adapters)}
    modules |= {f"lq {n}": adapter.lq for n, adapter in enumerate(network.adapters.adapters)}
    modules |= {"patches of lq": network.adapters.patch_embed, "tile": dit.pos_embed}
    calls = count_forwards(modules)
    restorer = DraRestorer(network, speed=PLAIN)
    hand.run(restorer, hand.picture(61, 150), steps=3, cfg_scale=2.0, tile_overlap=0.25, sampler="flow", churn=5.0)
    assert calls.pop("tile") == 3 * 3
    for name in ("text", "pooled"):
        assert calls.pop(name) == 1
    assert {calls.pop(name) for name in ("patches of lq", "lq 0", "lq 1")} == {3}
    assert calls and set(calls.values()) == {3}, calls


@torch.no_grad()
def test_compiled_blocks_have_the_network_s_own_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kind of block is one graph to torch.compile, whose back end here runs it as it is."""
    network = tokens.make_network(lora=LoraConfig(rank=0))
    one_graph = functools.partial(torch.compile, backend="eager", fullgraph=True, dynamic=False)
    monkeypatch.setattr(Speed, "compiler", lambda self, fullgraph=True: one_graph)
    run = FastTokenDra(network, Speed(compile="blocks", join=False)).run()
    latents, lq = tensor("z", 2, 16, 8, 12), tensor("lq", 2, 16, 8, 12)
    conditions = network.prior.conditions(["red", "blue"])
    expected = network.predict_velocity(latents, TIMES, network.features(lq), conditions)
    assert torch.equal(run.predict_velocity(latents, TIMES, run.features(lq), conditions), expected)


# -------------------------------------------------------------------------------------------------------------- 8 bits


def save_tokens(folder: Path, name: str = "tokens", seed: int = 0) -> Model:
    """A model on an untrained prior of nano-sd3's form, with three blocks."""
    place = folder / "prior"
    sizes = {"num_layers": 3, "caption_projection_dim": 192, "num_attention_heads": 6}
    config = {**NANO_SD3, "transformer": {**NANO_SD3["transformer"], **sizes}}
    tokenizer = build_tokenizer_json(tiny.WORDS, config["text_length"])
    with seeded_init(0, "prior"):
        prior = build_sd3_prior(config, tokenizer)
    if not place.is_dir():
        parts = {part: dict(module.state_dict()) for part, module in prior.modules.items()}
        save_model(place, ModelCard(name="p", system="prior", config=config), parts, {"tokenizer.json": tokenizer})
    prior.name, prior.digest = str(place), load_model(place).digest
    network: Any = TokenDra(prior.freeze(), AdapterConfig(every=1), LoraConfig(rank=4), seed=seed)
    with seeded_init(seed, "trained"):
        for parameter in (*network.adapters.parameters(), *network.trainable.parameters()):
            nn.init.normal_(parameter, std=0.03)
    recipe = {"family": "sd3", "restore_options": {"steps": 1, "cfg_scale": 1.0}}
    card = ModelCard(name=name, system="dra", config=network.config(), prior=dict(prior.source), recipe=recipe)
    return save_model(folder / name, card, network.parts())


@pytest.mark.parametrize("shape", ["maps", "tokens"])
def test_weights_in_8_bits_restore_nearly_as_full_precision_does(shape: str, tmp_path: Path) -> None:
    model = save_tokens(tmp_path) if shape == "tokens" else untrained.save_untrained("dra", tmp_path / "m", steps=1)
    request = Request(key="p", image=hand.picture(16, 16), seed=1, prompt="red")
    weights, images = {}, {}
    for precision in ("fp32", "bf16", "fp8"):
        weights[precision] = plan_memory(model, (128, 128), {}, precision).phases[2].weights  # as doctor calls it
        restorer: Any = build_restorer(model.path, precision=precision)
        for part in (restorer.network.prior.network, restorer.network.adapters):
            stored = {p.dtype for p in part.parameters()}
            assert (torch.float8_e4m3fn in stored) == (precision == "fp8"), (precision, stored)
        images[precision] = restorer.restore([request])[0].image.astype(float)
    narrow, half = (np.abs(images[name] - images["fp32"]).mean() for name in ("fp8", "bf16"))
    assert 0 < half < narrow < 4, (half, narrow)
    assert weights["fp32"] == 2 * weights["bf16"] and weights["fp8"] < 0.7 * weights["bf16"]
