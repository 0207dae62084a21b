"""DRA at a tiny size with an untrained SDXL-shaped prior: adapters, loss by hand, conditions, restorer, folders."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from helper_modules import load_helper
from torch import Tensor, nn

from components.degradations import build_degradation
from components.models import Model, ModelCard, ModelError, save_model
from components.priors.block_calls import recompute
from components.priors.conditions import SizedConditions
from components.priors.encoder_copy import embed_step, unet_skeleton
from components.priors.fast_unet import Speed
from components.priors.lora import add_lora, each_lora_delta, lora_layers, switch_lora
from components.priors.nano import build_prior, build_tokenizer_json
from components.priors.opening import load_prior
from components.priors.robust_encoder import RobustEncoder
from components.priors.sdxl import Prior
from components.priors.sdxl_config import SDXL_UNET
from components.priors.unet_walk import text_inputs, walk_unet
from components.randomness import Noise, generator
from components.systems.dra.adapters import Adapter, NafBlock, TokenAdapters, UnetAdapters, run_adapter, token_positions
from components.systems.dra.build import adapters_objective, look, network_of, open_encoder
from components.systems.dra.config import TOKEN_TARGETS, AdapterConfig, LoraConfig
from components.systems.dra.fast import FastDra
from components.systems.dra.network import ADAPTERS, ENCODER, LORA, Dra
from components.systems.dra.objectives import AdaptersObjective, descriptor_prompt, draw_variants
from components.systems.recipes import load_recipe
from components.types import Batch

BASE = load_helper("components/test_instantir.py").TINY
TINY = {
    **BASE,
    "unet": {
        **BASE["unet"],
        "block_out_channels": [8, 16, 12],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "transformer_layers_per_block": [1, 1, 2],
        "attention_head_dim": [1, 2, 2],
    },
}
"""Three levels, as SDXL has: six adapters, of widths 8, 16, 12, 12, 12 and 16."""
WORDS = ["red", "blue", "sky", "green", "dog", "low", "quality", "resolution", "blurry", "noisy", "compressed"]
SMALL = LoraConfig(rank=3, alpha=6.0)


def make_prior() -> Prior:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        prior = build_prior(TINY, build_tokenizer_json(WORDS, TINY["text_length"]))
    return prior.freeze()


def tensor(name: str, *shape: int) -> Tensor:
    return torch.from_numpy(generator(5, name).standard_normal(shape).astype(np.float32))


def train_a_little(network: Dra) -> Dra:
    """Random numbers in all weights of the parts, so that nothing is zero and no two halves are alike."""
    for part, tensors in network.parts().items():
        for name, value in tensors.items():
            value.add_(0.05 * tensor(f"{part} {name}", *value.shape))
    return network


def make_network(
    config: AdapterConfig | None = None, lora: LoraConfig | None = SMALL, robust: bool = False, trained: bool = True
) -> Dra:
    prior = make_prior()
    network = Dra(prior, config, lora, RobustEncoder(prior.autoencoder) if robust else None)
    return train_a_little(network) if trained else network


def plans(*presets: str) -> list[Any]:
    return [build_degradation(preset).draw(0, "k", 3) for preset in presets]


def make_batch(size: int = 4, side: int = 16, **more: Any) -> Batch:
    return Batch(
        keys=tuple("abcd"[:size]),
        positions=np.arange(size),
        hq=tensor("hq", size, 3, side, side).clamp(-1, 1),
        lq=tensor("lq", size, 3, side, side).clamp(-1, 1),
        prompts=("red sky", "blue", "dog", "green sky")[:size],
        plans=plans("x4-noise40", "blur2-x4", "none", "x8")[:size],
        sizes=torch.tensor([[2 * side, 2 * side, 1, 2, side, side]] * size),
        **more,
    )


def make_conditions(prior: Prior, prompts: Sequence[str] = ("red", "blue")) -> SizedConditions:
    text, pooled = prior.embed_prompts(prompts)
    sizes = torch.tensor([[16, 24, 0, 0, 16, 24]]).expand(len(prompts), -1)
    return SizedConditions(text=text, pooled=pooled, time_ids=sizes.float())


FORMS = [
    AdapterConfig(),
    AdapterConfig(chain="fused", norm="group"),
    AdapterConfig(block="conv3", silu="after", adapt_skip=True),
    AdapterConfig(block="naf"),
]

# ------------------------------------------------------------------------------------------------------------ adapters


@pytest.mark.parametrize("config", FORMS)
@pytest.mark.parametrize("size", [(8, 12), (10, 14)])  # the second has odd sides inside
@torch.no_grad()
def test_new_adapters_leave_the_prior_bit_equal_and_trained_ones_follow_hooks(
    config: AdapterConfig, size: tuple[int, int]
) -> None:
    """The walk with adapters against diffusers' own forward with a hook after each block (dra.md, section 2.1)."""
    latents, lq, timesteps = tensor("z", 2, 4, *size), tensor("lq", 2, 4, *size), torch.tensor([10, 700])
    prior = make_prior()
    conditions = make_conditions(prior)
    plain = plain_eps(prior, latents, timesteps, conditions)
    network = Dra(prior, config, SMALL)
    assert torch.equal(
        network.predict_eps(latents, timesteps, network.adapters.features(lq), conditions), plain
    )  # bit for bit: nothing of a new model shows
    train_a_little(network)
    own = network.predict_eps(latents, timesteps, network.adapters.features(lq), conditions)
    torch.testing.assert_close(own, hooked_eps(network, latents, timesteps, lq, conditions), rtol=1e-4, atol=1e-5)
    assert float((own - plain).abs().max()) > 1e-2
    other = network.predict_eps(latents, timesteps, network.adapters.features(tensor("other", *lq.shape)), conditions)
    assert float((own - other).abs().max()) > 1e-4  # LQ reaches the result


def plain_eps(prior: Prior, latents: Tensor, timesteps: Tensor, conditions: SizedConditions) -> Tensor:
    embedding = embed_step(prior.unet, timesteps, conditions.pooled, conditions.time_ids, torch.float32)
    return walk_unet(prior.unet, latents, text_inputs(prior.unet, embedding, conditions.text))


def hooked_eps(network: Dra, latents: Tensor, timesteps: Tensor, lq: Tensor, conditions: SizedConditions) -> Tensor:
    """Eps of diffusers' UNet whose blocks have forward hooks; every adapter runs in the hook, from the formulas."""
    unet: Any = network.prior.unet
    config = network.adapters.config
    embedding = embed_step(unet, timesteps, conditions.pooled, conditions.time_ids, torch.float32)
    feature, blocks = lq, [*unet.down_blocks, unet.mid_block, *unet.up_blocks[:-1]]

    def hook(adapter: Any) -> Any:
        def run(block: nn.Module, inputs: Any, output: Any) -> Any:
            nonlocal feature
            x = output[0] if isinstance(output, tuple) else output
            mode = "area" if x.shape[-1] < feature.shape[-1] else "nearest"
            if x.shape[-2:] != feature.shape[-2:]:
                feature = F.interpolate(feature, size=x.shape[-2:], mode=mode)
            feature = adapter.lq(feature)
            if config.silu == "before":
                shift = F.linear(embedding * torch.sigmoid(embedding), adapter.emb.weight, adapter.emb.bias)
            else:
                shift = F.silu(F.linear(embedding, adapter.emb.weight, adapter.emb.bias))
            h = feature + x + shift[:, :, None, None]
            h = h + adapter.r1(h)
            h = h + adapter.r2(h)
            moved = x + F.conv2d(h, adapter.out.weight, adapter.out.bias)
            if config.chain == "fused":
                feature = h
            if not isinstance(output, tuple):
                return moved
            skips = (*output[1][:-1], moved) if config.adapt_skip else output[1]
            return moved, skips

        return run

    handles = [
        block.register_forward_hook(hook(adapter))
        for block, adapter in zip(blocks, network.adapters.adapters, strict=True)
    ]
    added = {"text_embeds": conditions.pooled, "time_ids": conditions.time_ids}
    eps: Tensor = unet(latents, timesteps, conditions.text, added_cond_kwargs=added).sample
    for handle in handles:
        handle.remove()
    return eps


def test_sizes_and_widths_of_sdxl() -> None:
    """The table of dra.md, section 2.1, for a 64 x 64 latent; other numbers of levels follow the UNet."""
    with torch.device("meta"):
        adapters = UnetAdapters(unet_skeleton(SDXL_UNET))
    assert adapters.widths == [320, 640, 1280, 1280, 1280, 640]
    assert adapters.sizes(64, 64) == [(s, s) for s in (32, 16, 16, 16, 32, 64)]
    assert adapters.sizes(10, 13) == [(5, 7), (3, 4), (3, 4), (3, 4), (5, 7), (10, 13)]
    assert [adapter.lq[0].in_channels for adapter in adapters.adapters] == [4, 320, 640, 1280, 1280, 1280]  # type: ignore[union-attr, index]


def test_the_naf_block_by_hand() -> None:
    block = NafBlock(4, 6)
    x = tensor("x", 2, 4, 5, 3)

    def norm(y: Tensor, layer: Any) -> Tensor:
        mean, variance = y.mean(1, keepdim=True), y.var(1, unbiased=False, keepdim=True)
        return (y - mean) / (variance + 1e-6).sqrt() * layer.weight.view(1, -1, 1, 1) + layer.bias.view(1, -1, 1, 1)

    for name, parameter in block.named_parameters():
        parameter.data.add_(0.1 * tensor(name, *parameter.shape))
    a = block.conv2(block.conv1(norm(x, block.norm1)))
    a = a[:, :6] * a[:, 6:]
    a = block.conv3(a * block.attention(a.mean((2, 3), keepdim=True)))
    b = block.conv4(norm(a, block.norm2))
    torch.testing.assert_close(block(x), a + block.conv5(b[:, :6] * b[:, 6:]), rtol=1e-4, atol=1e-5)


def test_both_halves_of_a_guided_call_share_the_features() -> None:
    adapter: Any = Adapter(nn.Identity(), (nn.Tanh(), nn.Sigmoid()), nn.Conv2d(4, 4, 1), 4, 6, "before")
    assert not any(parameter.any() for parameter in adapter.out.parameters())
    for name, parameter in adapter.named_parameters():
        parameter.data.add_(tensor(name, *parameter.shape))
    x, feature, shift = tensor("x", 4, 4, 3, 3), tensor("f", 2, 4, 3, 3), tensor("s", 4, 4)
    moved, hidden = run_adapter(adapter, x, feature, shift)
    repeated, other = run_adapter(adapter, x, torch.cat([feature, feature]), shift)
    assert torch.equal(moved, repeated) and torch.equal(hidden, other)
    assert not torch.equal(moved, run_adapter(adapter, x, feature.flip(0), shift)[0])


def test_half_precision_of_the_prior_meets_full_precision_of_the_adapters() -> None:
    network = make_network()
    adapter = network.adapters.adapters[0]
    x = tensor("x", 2, 8, 3, 3).bfloat16()
    moved, hidden = run_adapter(adapter, x, tensor("f", 2, 8, 3, 3), tensor("s", 2, 8))
    assert moved.dtype == torch.bfloat16 and hidden.dtype == torch.float32


# -- the MM-DiT's


def make_dit() -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            num_layers=9,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=12,
            caption_projection_dim=16,
            pooled_projection_dim=10,
            out_channels=4,
            pos_embed_max_size=8,
        ).requires_grad_(False)


def dit_velocity(dit: Any, adapters: TokenAdapters | None, lq: Tensor, z: Tensor) -> Tensor:
    """diffusers' transformer with hooks after every fourth block, on its stream of picture tokens."""
    handles, hidden, embedding = [], torch.empty(0), torch.empty(0)
    if adapters is not None:
        features = adapters.features(lq)

        def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
            nonlocal embedding
            embedding = output

        def hook(number: int) -> Any:
            def run(block: nn.Module, inputs: Any, output: Any) -> Any:
                nonlocal hidden
                text, image = output
                image, hidden = adapters.apply_adapter(number, image, features, adapters.shifts(embedding), hidden)
                return text, image

            return run

        handles = [dit.time_text_embed.register_forward_hook(keep)]
        handles += [dit.transformer_blocks[p].register_forward_hook(hook(i)) for i, p in enumerate(adapters.places)]
    rows = len(z)
    velocity: Tensor = dit(z, tensor("t", rows, 5, 12), tensor("p", rows, 10), torch.full((rows,), 300.0)).sample
    for handle in handles:
        handle.remove()
    return velocity


@pytest.mark.parametrize("config", [AdapterConfig(), AdapterConfig(chain="fused", silu="after")])
@torch.no_grad()
def test_adapters_of_an_mm_dit(config: AdapterConfig) -> None:
    dit, lq, z = make_dit(), tensor("lq", 1, 4, 8, 6), tensor("z", 2, 4, 8, 6)
    plain = dit_velocity(dit, None, lq, z)
    adapters = TokenAdapters(9, 16, 16, 4, config)
    assert adapters.places == [3, 7]  # the ninth block has none
    assert torch.equal(dit_velocity(dit, adapters, lq, z), plain)
    add_lora(dit, "own", rank=2, alpha=2, targets=TOKEN_TARGETS["self"])
    assert torch.equal(dit_velocity(dit, adapters, lq, z), plain)
    assert not [name for name, _ in dit.named_parameters() if ".lora_" in name and ".attn.add_" in name]
    for name, parameter in adapters.named_parameters():
        parameter.add_(0.2 * tensor(name, *parameter.shape))
    moved = dit_velocity(dit, adapters, lq, z)
    assert float((moved - plain).abs().max()) > 1e-3
    for name, parameter in dit.named_parameters():
        if ".lora_" in name:
            parameter.add_(0.2 * tensor(name, *parameter.shape))
    assert float((dit_velocity(dit, adapters, lq, z) - moved).abs().max()) > 1e-3
    with pytest.raises(ValueError, match="multiples of 2"):
        adapters.features(tensor("odd", 1, 4, 7, 6))
    with pytest.raises(ValueError, match="every 4 blocks"):
        TokenAdapters(3, 16, 16, 4)


@torch.no_grad()
def test_a_token_adapter_by_hand() -> None:
    adapters = TokenAdapters(8, 8, 6, 4)
    for name, parameter in adapters.named_parameters():
        parameter.add_(0.2 * tensor(name, *parameter.shape))
    lq, x, e = tensor("lq", 1, 4, 4, 6), tensor("x", 1, 6, 8), tensor("e", 1, 6)

    def block(module: Any, y: Tensor) -> Tensor:
        y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        y = (y * module[0].weight + module[0].bias) @ module[1].weight.T + module[1].bias
        return y * torch.sigmoid(y)

    patches = lq.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).reshape(1, 6, 16)
    tokens = patches @ adapters.patch_embed.weight.view(8, 16).T + adapters.patch_embed.bias
    features = adapters.features(lq)
    first: Any = adapters.adapters[0]
    expected = block(first.lq, tokens + token_positions(8, 2, 3))
    torch.testing.assert_close(features[0], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(features[1], block(adapters.adapters[1].lq, expected), rtol=1e-4, atol=1e-5)  # type: ignore[union-attr]
    h = expected + x + (F.silu(e) @ first.emb.weight.T + first.emb.bias)[:, None]
    h = h + block(first.r1, h)
    h = h + block(first.r2, h)
    own, hidden = adapters.apply_adapter(0, x, features, adapters.shifts(e))
    torch.testing.assert_close(hidden, h, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(own, x + h @ first.out.weight.T + first.out.bias, rtol=1e-4, atol=1e-5)
    # by hand: sines and cosines of the column, then of the row, at the frequencies 1 and 1/100; no side is stretched
    for height, columns in ((2, 3), (3, 2), (1, 4)):
        rows = [
            [wave(place * omega) for place in (column, row) for wave in (math.sin, math.cos) for omega in (1.0, 0.01)]
            for row in range(height)
            for column in range(columns)
        ]
        torch.testing.assert_close(token_positions(8, height, columns), torch.tensor(rows))


# ----------------------------------------------------------------------------------------------------------- objective


def test_variants_are_drawn_and_described_by_hand() -> None:
    uniform = torch.tensor([0.1, 0.25, 0.25, 0.29, 0.3, 0.2])
    texts = draw_variants(
        uniform,
        tuple("abcdef"),
        plans("x4", "x4-noise40", "none", "blur2-x4", "x4", "x4"),
        null_share=0.2,
        lq_share=0.1,
    )
    assert texts.null.tolist() == [True, False, False, False, False, False]
    # the third picture has no fault to name, and the bound of the null variant belongs to the next one
    assert texts.lq.tolist() == [False, True, False, True, False, True]
    assert texts.prompts == [
        "",
        "low quality, low resolution, noisy",
        "c",
        "low quality, blurry, low resolution",
        "e",
        "low quality, low resolution",
    ]
    assert descriptor_prompt({}) == "" and descriptor_prompt(plans("none")[0]) == ""
    stored = draw_variants(torch.tensor([0.05, 0.25]), ("a", "b"), (), 0.2, 0.1)  # stored pairs without plans
    assert stored.prompts == ["", "b"] and not stored.lq.any()


def variants_by_hand(prior: Any, batch: Batch, noise: Noise) -> tuple[list[str], Tensor]:
    """Prompts and clean latents of the three variants, for shares of 0.3 (null) and 0.5 (LQ as target).

    The LQ target is encoded by the plain encoder, also with a robust one.
    """
    u = noise.uniform("variant")
    kinds = ["null" if v < 0.3 else "lq" if v < 0.8 and row != 2 else "normal" for row, v in enumerate(u.tolist())]
    assert {"null", "lq", "normal"} == set(kinds)
    descriptors = {
        0: "low quality, low resolution, noisy",
        1: "low quality, blurry, low resolution",
        3: "low quality, low resolution",
    }
    prompts, clean = [], prior.encode(batch.hq).clone()
    for row, kind in enumerate(kinds):
        prompts.append({"null": "", "lq": descriptors.get(row, "-"), "normal": batch.prompts[row]}[kind])
        if kind == "lq":
            clean[row] = prior.encode(batch.lq)[row]
    return prompts, clean


@pytest.mark.parametrize("robust", [False, True])
def test_the_loss_by_hand_and_what_trains(robust: bool) -> None:
    network, batch = make_network(robust=robust), make_batch(side=32)
    objective = AdaptersObjective(network, null_share=0.3, lq_share=0.5)
    noise = Noise(7, batch.positions)
    ((name, loss),) = objective.phases(batch, noise)
    prior = network.prior
    prompts, clean = variants_by_hand(prior, batch, noise)
    text, pooled = prior.embed_prompts(prompts)
    ids = torch.tensor([[32.0, 32, 0, 0, 32, 32]]).expand(4, -1)  # not the batch's own sizes and crop
    t, eps = noise.integers("timestep", 0, 1000), noise.normal("noise", (4, 8, 8))
    alpha = prior.schedule.alphas_cumprod[t].view(-1, 1, 1, 1)
    lq = network.encoder(batch.lq) if network.encoder is not None else prior.encode(batch.lq)
    if robust:
        assert not torch.allclose(lq, prior.encode(batch.lq), atol=1e-3)
    predicted = hooked_eps(
        network,
        alpha.sqrt() * clean + (1 - alpha).sqrt() * eps,
        t,
        lq,
        SizedConditions(text=text, pooled=pooled, time_ids=ids),
    )
    expected = (predicted - eps).square().mean()
    assert name == ADAPTERS and float(loss.value.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    loss.value.backward()
    trained = dict(objective.trainables[ADAPTERS].named_parameters())
    assert any(key.startswith(LORA) for key in trained) and any(key.startswith(ADAPTERS) for key in trained)
    lacking = [key for key, p in trained.items() if p.grad is None or not p.grad.any()]
    assert not lacking, f"no gradient: {lacking}"
    own = {id(p) for p in trained.values()}
    frozen = [p for module in prior.modules.values() for p in module.parameters() if id(p) not in own]
    frozen += list(network.encoder.parameters()) if network.encoder is not None else []
    assert frozen and all(not p.requires_grad and p.grad is None for p in frozen)
    assert set(objective.parts()) == {ADAPTERS, LORA} | ({ENCODER} if robust else set())


def test_precomputed_columns_give_the_same_loss() -> None:
    network, batch = make_network(), make_batch()
    text, pooled = network.prior.embed_prompts(batch.prompts)
    with_columns = make_batch(embeddings={"text": text, "pooled": pooled}, latents=network.prior.encode(batch.hq))
    objective = AdaptersObjective(network, null_share=0.3, lq_share=0.5)
    values = [
        float(next(objective.phases(each, Noise(7, batch.positions)))[1].value.detach())
        for each in (batch, with_columns)
    ]
    assert values[1] == pytest.approx(values[0], rel=1e-5)


def test_without_lora_only_the_adapters_train() -> None:
    network = make_network(lora=LoraConfig(rank=0))
    objective = AdaptersObjective(network)
    assert set(objective.parts()) == {ADAPTERS} and not lora_layers(network.prior.unet, LORA)
    assert len(list(objective.trainables[ADAPTERS].parameters())) == len(list(network.adapters.parameters()))
    with pytest.raises(ValueError, match="sum to at most 1"):
        AdaptersObjective(network, null_share=0.7, lq_share=0.4)


def test_checkpointing_gives_the_same_gradients() -> None:
    gradients = []
    for again in (False, True):
        network, batch = make_network(), make_batch()
        if again:
            network.blocks = network.blocks.wrap_all(recompute)
        objective = AdaptersObjective(network)
        ((_, loss),) = objective.phases(batch, Noise(3, batch.positions))
        loss.value.backward()
        gradients.append([p.grad for p in objective.trainables[ADAPTERS].parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


# ---------------------------------------------------------------------------------------------------------------- LoRA


@torch.no_grad()
def test_the_lora_by_hand_merged_and_switched() -> None:
    network = make_network()
    layers = network.lora
    assert len(layers) == 4 * (1 + 2 + 2 + 4 + 2)  # down, down, middle, both up blocks with two layers each
    deltas = dict(each_lora_delta(layers, LORA))
    name, layer = next(iter(layers.items()))
    down, up = layer.lora_A[LORA].weight, layer.lora_B[LORA].weight
    torch.testing.assert_close(deltas[name], (6.0 / 3) * up @ down)  # alpha / rank
    latents, t = tensor("z", 2, 4, 8, 8), torch.tensor([300])
    conditions, features = make_conditions(network.prior), network.adapters.features(latents * 0.5)
    own = network.predict_eps(latents, t, features, conditions)
    switch_lora(layers.values(), False)
    off = network.predict_eps(latents, t, features, conditions)
    switch_lora(layers.values(), True)
    assert float((own - off).abs().max()) > 1e-4
    fast = FastDra(network, Speed())  # with a live LoRA nothing is fused
    torch.testing.assert_close(fast.run().predict_eps(latents, t, features, conditions), own, rtol=1e-4, atol=1e-5)
    network.merge_lora()
    assert not lora_layers(network.prior.unet, LORA)
    assert not [key for key, _ in network.prior.unet.named_parameters() if "lora" in key or "base_layer" in key]
    torch.testing.assert_close(network.predict_eps(latents, t, features, conditions), own, rtol=1e-4, atol=1e-5)
    for speed in (Speed(), Speed(join=False), Speed(channels_last="on")):
        run = FastDra(network, speed).run()
        for _ in range(2):  # the second call takes its keys from the cache
            mine = run.predict_eps(latents, t, run.features(latents * 0.5), conditions)
            torch.testing.assert_close(mine, own, rtol=1e-4, atol=1e-5)


def save(network: Dra, path: Path, prior: dict[str, str] | None = None) -> Model:
    card = ModelCard(
        name="tiny", system="dra", config=network.config(), prior=prior or {"id": "untrained", "digest": ""}
    )
    return save_model(path, card, network.parts())


# ------------------------------------------------------------------------------------------------------- model folders


@pytest.mark.parametrize(("config", "lora", "robust"), [(FORMS[1], SMALL, True), (FORMS[2], LoraConfig(rank=0), False)])
@torch.no_grad()
def test_a_folder_gives_the_same_network(config: AdapterConfig, lora: LoraConfig, robust: bool, tmp_path: Path) -> None:
    network = make_network(config, lora, robust)
    model = save(network, tmp_path / "m")
    again = network_of(model, make_prior())
    z, t, conditions = tensor("z", 2, 4, 8, 8), torch.tensor([300]), make_conditions(network.prior)
    lq = tensor("images", 2, 3, 32, 32).clamp(-1, 1)
    results = [
        each.predict_eps(z, t, each.adapters.features(each.encode_lq(lq)), conditions) for each in (network, again)
    ]
    assert torch.equal(*results)
    parts = network.parts()
    first = next(iter(parts[ADAPTERS]))
    del parts[ADAPTERS][first]
    broken = save_model(tmp_path / "w", ModelCard(name="t", system="dra", config=network.config()), parts)
    with pytest.raises(ModelError, match="do not fit"):
        network_of(broken, make_prior())
    lacking = {name: tensors for name, tensors in network.parts().items() if name != ADAPTERS}
    lacking["other"] = {"x": torch.zeros(1)}
    broken = save_model(tmp_path / "l", ModelCard(name="t", system="dra", config=network.config()), lacking)
    with pytest.raises(ModelError, match="has the parts"):
        network_of(broken, make_prior())


def test_training_starts_continues_and_takes_a_robust_encoder(tmp_path: Path) -> None:
    """On the shipped prior: the recipe's sizes, another system's robust encoder, and a second training."""
    prior = load_prior("nano")
    encoder = RobustEncoder(prior.autoencoder)
    for name, parameter in encoder.named_parameters():
        parameter.data.add_(0.01 * tensor(name, *parameter.shape))
    parts = {ENCODER: {name: p.detach() for name, p in encoder.named_parameters()}}
    card = ModelCard(name="e", system="supir", config={"adaptor": None}, prior=prior.source)
    folder = save_model(tmp_path / "e", card, parts)
    recipe: Any = load_recipe("dra-sdxl-nano", [f"encoder={folder.path}", "lora.rank=4"])
    objective = adapters_objective(recipe, {})
    network = objective.network
    assert network.lora_config.rank == 4 and len(network.adapters.adapters) == 6
    assert torch.equal(network.parts()[ENCODER][next(iter(parts[ENCODER]))], next(iter(parts[ENCODER].values())))
    train_a_little(network)
    model = save(network, tmp_path / "m", dict(prior.source))
    again = adapters_objective(load_recipe("dra-sdxl-nano", ["lora.rank=4"]), {"adapters": model})  # type: ignore[arg-type]
    for part, tensors in objective.parts().items():
        assert all(torch.equal(value, again.parts()[part][key]) for key, value in tensors.items())
    with pytest.raises(ModelError, match="leave the recipe's lora out"):
        adapters_objective(load_recipe("dra-sdxl-nano", ["lora.rank=2"]), {"adapters": model})  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="leave encoder out"):
        adapters_objective(load_recipe("dra-sdxl-nano", ["lora.rank=4", f"encoder={folder.path}"]), {"adapters": model})  # type: ignore[arg-type]
    without = save_model(tmp_path / "n", card, {"other": parts[ENCODER]})
    with pytest.raises(ModelError, match="no robust encoder"):
        open_encoder(str(without.path), prior)
    foreign = save_model(tmp_path / "f", ModelCard(name="e", system="supir", prior={"id": "x", "digest": "0"}), parts)
    with pytest.raises(ModelError, match="belongs to prior 'x'"):
        open_encoder(str(foreign.path), prior)


def test_a_frozen_prior_in_half_precision_trains_adapters_in_full_precision() -> None:
    recipe: Any = load_recipe("dra-sdxl-nano", ["frozen_precision=bf16", "restore_options.steps=1"])
    objective = adapters_objective(recipe, {})
    assert objective.network.dtype == torch.bfloat16
    trained = dict(objective.trainables[ADAPTERS].named_parameters())
    assert {p.dtype for p in trained.values()} == {torch.float32}
    batch = make_batch(1, 32)
    ((_, loss),) = objective.phases(batch, Noise(0, batch.positions))
    loss.value.backward()
    assert torch.isfinite(loss.value) and all(p.grad is not None for p in trained.values())
    images = look(objective, recipe, batch.lq, batch.prompts, 0)
    assert images.shape == batch.lq.shape
    assert all(p.requires_grad for p in trained.values())
