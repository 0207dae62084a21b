"""DRA against its golden files: the restoration sampling of Eqs. 1-2, and parameter counts on the meta device.

The tests take every dra_*.json of the golden folder by name, so that another set with other sizes can replace it. A
file with "cases" holds tensors of the restoration sampling. Any other holds counts by name. Every case, output and
count must be compared.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.controlnets.controlnet import ControlNetModel
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from safetensors.torch import load_file
from torch import nn

from components.priors.encoder_copy import unet_skeleton
from components.priors.lora import LoraWeights, add_lora
from components.priors.one_text_config import PIXART_DIT, SD21_UNET, SD_VAE
from components.priors.sd3_config import SD3_TRANSFORMER
from components.priors.sdxl_config import SDXL_UNET
from components.samplers.restoration_pull import RestorationPull, pull_share, steps_left
from components.systems.dra.adapters import TokenAdapters, UnetAdapters
from components.systems.dra.config import TOKEN_TARGETS, UNET_TARGETS, AdapterConfig, LoraConfig
from components.systems.dra.control import TokenControl, UnetControl
from components.systems.swinir.config import SwinIRConfig
from components.systems.swinir.network import SwinIR
from tests.conftest import golden_names

CONTROL = AdapterConfig(form="controlnet")
"""The ControlNet twins."""


def read(name: str, folder: Path) -> dict[str, Any]:
    document = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    assert isinstance(document, dict) and document, name
    return document


# --- restoration sampling ---------------------------------------------------------------------------------------------


def check_sampling(document: Mapping[str, Any], path: Path) -> None:
    """A sampler that returns its latents unchanged, so that only the pull acts."""
    tensors, compared = load_file(path.with_suffix(".safetensors")), set[str]()
    limit = document["tolerance"]["atol"]
    for number, case in enumerate(document["cases"]):
        case = dict(case)
        steps, threshold, weight, shape = (case.pop(name) for name in ("T", "a", "w", "shape"))
        latents, target = (tensors[f"input/{number}/{name}"] for name in ("z", "c_lq"))
        assert list(latents.shape) == list(target.shape) == shape
        pull = RestorationPull(target=target, weight=weight, threshold=threshold)
        left = [steps_left(step, steps) for step in range(steps)]
        shares = [pull_share(count, steps, threshold) for count in left]
        states, kept = [], 1.0
        for step in range(steps):
            assert pull.clean(step, steps, latents) is latents  # as printed the clean estimate stays
            latents = pull.after_step(step, steps, latents, 1.0)
            states.append(latents)
            kept *= 1 - pull.strength(step, steps)
        assert sum(share > 0 for share in shares) == case.pop("steps_active")
        assert kept == pytest.approx(case.pop("product_1_minus_wg"), rel=1e-9)
        assert not case, f"case {number} holds more: {sorted(case)}"
        outputs = {"t": left, "g": shares, "after_each_step_identity_sampler": torch.stack(states)}
        for name, value in outputs.items():
            expected = tensors[f"output/{number}/{name}"]
            own = torch.as_tensor(value, dtype=expected.dtype)
            assert own.shape == expected.shape, name
            assert float((own - expected).abs().max()) <= limit, f"case {number}, {name}"
            compared.add(f"output/{number}/{name}")
        compared |= {f"input/{number}/z", f"input/{number}/c_lq"}
    assert set(tensors) == compared, f"not compared: {sorted(set(tensors) - compared)}"


# --- counts -----------------------------------------------------------------------------------------------------------


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return build()


@cache
def sdxl() -> Any:
    return unet_skeleton(SDXL_UNET)


@cache
def sd3() -> Any:
    return on_meta(lambda: SD3Transformer2DModel(**SD3_TRANSFORMER))


@cache
def unet_adapters(block: str) -> UnetAdapters:
    config = AdapterConfig() if block == "default" else AdapterConfig(block=block)  # type: ignore[arg-type]
    return on_meta(lambda: UnetAdapters(sdxl(), config))  # type: ignore[return-value]


@cache
def token_adapters() -> TokenAdapters:
    config = sd3().config
    width = config["num_attention_heads"] * config["attention_head_dim"]
    blocks, channels = len(sd3().transformer_blocks), config["in_channels"]
    embedding = sd3().time_text_embed.timestep_embedder.linear_2.out_features
    return on_meta(lambda: TokenAdapters(blocks, width, embedding, channels))  # type: ignore[return-value]


@cache
def lora(family: str) -> nn.Module:
    """The default LoRA, on networks of its own: the others must not have it."""
    size = LoraConfig()
    if family == "sdxl":
        network, targets = unet_skeleton(SDXL_UNET), UNET_TARGETS[size.targets]
    else:
        network, targets = on_meta(lambda: SD3Transformer2DModel(**SD3_TRANSFORMER)), TOKEN_TARGETS[size.targets]
    layers = add_lora(network, "lora", rank=size.rank, alpha=size.scale, targets=targets)
    return LoraWeights(layers, "lora")


@cache
def controlnet() -> Any:
    return on_meta(lambda: ControlNetModel.from_unet(sdxl(), load_weights_from_unet=False))


COUNTS: Mapping[str, Callable[[], int | list[int]]] = {
    "sdxl_unet": lambda: count(sdxl()),
    "sd3_medium": lambda: count(sd3()),
    "sdxl_adapter_conv31": lambda: count(unet_adapters("conv31")),
    "sdxl_adapter_conv31_each": lambda: [count(adapter) for adapter in unet_adapters("conv31").adapters],
    "sdxl_adapter_conv3_chain": lambda: count(unet_adapters("conv3")),
    "sdxl_adapter_naf": lambda: count(unet_adapters("naf")),
    "sdxl_lora_r32_self_attention": lambda: count(lora("sdxl")),
    "sdxl_total_default": lambda: count(unet_adapters("default")) + count(lora("sdxl")),
    "sd3_adapter_linear": lambda: count(token_adapters().adapters),
    "sd3_patch_embed": lambda: count(token_adapters().patch_embed),
    "sd3_lora_r32_image_stream": lambda: count(lora("sd3")),
    "sd3_total_default": lambda: count(token_adapters()) + count(lora("sd3")),
    "sdxl_controlnet_full": lambda: count(controlnet()),
    "sdxl_controlnet_without_mid_block": lambda: count(on_meta(lambda: UnetControl(sdxl(), CONTROL, 8))),
    "sd3_controlnet_6_joint_layers": lambda: count(on_meta(lambda: TokenControl(sd3(), CONTROL))),
    "pixart_xl2_512": lambda: count(on_meta(lambda: PixArtTransformer2DModel(**PIXART_DIT))),
    "sd21_unet": lambda: count(unet_skeleton(SD21_UNET)),
    "sd_vae": lambda: count(on_meta(lambda: AutoencoderKL(**SD_VAE))),
    "swinir_restorer": lambda: count(on_meta(lambda: SwinIR(SwinIRConfig()))),
}
"""Networks by the names of the counts; their sizes are those of the priors, and the numbers are the file's."""


def check_counts(document: Mapping[str, Any], path: Path) -> None:
    assert not path.with_suffix(".safetensors").exists(), "tensors without a check"
    counts = {name: value for name, value in document.items() if name != "note"}
    assert counts, "no counts"
    unknown = sorted(set(counts) - set(COUNTS))
    assert not unknown, f"counts without a network: {unknown}"
    assert {name: COUNTS[name]() for name in counts} == counts


@pytest.mark.parametrize("name", golden_names("dra_*"))
def test_golden(name: str, golden_dir: Path) -> None:
    assert name, "the folder holds no dra_*.json"
    document = read(name, golden_dir)
    check = check_sampling if "cases" in document else check_counts
    check(document, golden_dir / f"{name}.json")


def test_the_unets_controlnet_twin_is_diffusers_without_its_middle_block() -> None:
    """With latents: without its encoder of pictures and the middle's zero convolution too, and one for latents."""
    whole: Any = controlnet()
    hint, middle = count(whole.controlnet_cond_embedding), count(whole.controlnet_mid_block)
    own = count(on_meta(lambda: UnetControl(sdxl(), CONTROL, 8)))
    assert own == count(whole) - count(whole.mid_block) == 837_896_720
    latents = count(on_meta(lambda: UnetControl(sdxl(), replace(CONTROL, hint="latents"), 8)))
    assert latents == own - hint - middle + (4 * 9 + 1) * 320 == 835_182_400
