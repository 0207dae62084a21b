"""One golden file of SUPIR, and the networks that the files hold."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor, nn

from components.priors.parameters import copy_strictly
from components.priors.robust_encoder import RobustEncoder
from components.priors.sdxl_keys import (
    autoencoder_table,
    checkpoint_shape,
    encoder_table,
    fit_shapes,
    inverse,
    part_of,
    translate,
    translate_key,
    unet_table,
)
from components.systems.supir.config import AdaptorConfig
from components.systems.supir.control import ControlEncoder
from components.systems.supir.network import Adaptor

SIGMA_MAX = 14.6146
"""The official constant of the schedules by level."""


@dataclass
class Golden:
    """One golden file; `check` compares an output and marks it as compared."""

    folder: Path
    description: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    compared: set[str] = field(default_factory=set)

    @classmethod
    def open(cls, folder: Path, module: str) -> Golden:
        path = folder / f"supir_{module}.json"
        tensors = path.with_suffix(".safetensors")  # lists of keys have none
        description = json.loads(path.read_text(encoding="utf-8"))
        return cls(folder, description, load_file(tensors) if tensors.is_file() else {})

    def input(self, name: str) -> Tensor:
        return self.tensors[f"input/{name}"]

    def weights(self, prefix: str = "") -> dict[str, Tensor]:
        start = f"weights/{prefix}"
        return {k.removeprefix(start): v.float() for k, v in self.tensors.items() if k.startswith(start)}

    @property
    def config(self) -> dict[str, Any]:
        return self.description["config"]  # type: ignore[no-any-return]

    def check(self, name: str, value: Tensor) -> None:
        """At most tol of the golden tensor's peak away; integers are equal."""
        expected = self.tensors[f"output/{name}"]
        where = f"{self.description['module']}, output {name}"
        assert value.shape == expected.shape, f"{where}: shape {tuple(value.shape)}, not {tuple(expected.shape)}"
        if not expected.is_floating_point():
            assert torch.equal(value, expected), where
        else:
            difference = (value.detach().to(expected.dtype) - expected).abs().max()
            limit = self.description["tolerance"]["tol"] * expected.abs().max()
            assert difference <= limit, f"{where}: {float(difference):.3g} apart, at most {float(limit):.3g}"
        self.compared.add(f"output/{name}")

    def check_levels(self, name: str, image: Any) -> None:
        """An 8-bit picture, at most one level away."""
        expected = self.tensors[f"output/{name}"]
        assert image.shape == tuple(expected.shape), f"{name}: shape {image.shape}"
        assert (torch.from_numpy(image).int() - expected.int()).abs().max() <= 1, name
        self.compared.add(f"output/{name}")

    def missing(self) -> set[str]:
        return {name for name in self.tensors if name.startswith("output/")} - self.compared


def load(module: nn.Module, state: Mapping[str, Tensor], table: Mapping[str, str], what: str) -> None:
    """Official weights into one of diffusers' modules."""
    own = dict(module.named_parameters())
    translated, unknown = translate(state, table)
    assert not unknown, f"{what}: unknown keys {unknown}"
    copy_strictly(own, fit_shapes(translated, own), what)


def unet_of(config: Mapping[str, Any]) -> UNet2DConditionModel:
    """diffusers' UNet for the options of an official one."""
    width, levels = config["model_channels"], config["channel_mult"]
    attends = [2**level in config["attention_resolutions"] for level in range(len(levels))]
    depths = config["transformer_depth"]
    pooled = config["adm_in_channels"] // 2  # the rest are six embeddings of the sizes
    return UNet2DConditionModel(
        in_channels=config["in_channels"],
        out_channels=config["out_channels"],
        block_out_channels=tuple(width * level for level in levels),
        layers_per_block=config["num_res_blocks"],
        down_block_types=tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends),
        up_block_types=tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)),
        transformer_layers_per_block=tuple(depths),
        attention_head_dim=tuple(max(1, width * level // config["num_head_channels"]) for level in levels),
        cross_attention_dim=config["context_dim"],
        use_linear_projection=config["use_linear_in_transformer"],
        addition_embed_type="text_time",
        addition_time_embed_dim=pooled // 6,
        projection_class_embeddings_input_dim=config["adm_in_channels"],
    )


def checkpoint_layout(module: nn.Module, table: Mapping[str, str], prefix: str) -> dict[str, list[int]]:
    """The shapes of a module's parameters under the names of Stability's checkpoints."""
    layout = {}
    for name, value in module.named_parameters():
        key = translate_key(name, inverse(table))
        assert key is not None, name
        layout[prefix + key] = list(checkpoint_shape(key, value.shape))
    return layout


def loaded_unet(folder: Path) -> UNet2DConditionModel:
    """The UNet whose weights lie in three files, without its connectors."""
    golden = Golden.open(folder, "unet")
    unet = unet_of(golden.config)
    state = golden.weights() | Golden.open(folder, "unet_output_blocks").weights()
    load(unet, state, unet_table(dict(unet.config)), "unet")
    return unet.eval()


def loaded_adaptor(folder: Path, unet: UNet2DConditionModel) -> Adaptor:
    """The adaptor of the control file and the connectors file."""
    control = Golden.open(folder, "glvcontrol")
    adaptor = Adaptor(unet, AdaptorConfig(transformer_depth=control.config["transformer_depth"]))
    load_control(adaptor.control, control.weights(), dict(unet.config))
    connectors = Golden.open(folder, "unet_connectors").weights("project_modules.")
    copy_strictly(dict(adaptor.connectors.named_parameters()), connectors, "connectors")
    return adaptor.eval()


def load_control(control: ControlEncoder, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    load(control, state, encoder_table(config) | {"input_hint_block.0": "hint_conv"}, "control")


def autoencoder_of(config: Mapping[str, Any], scale: float) -> AutoencoderKL:
    widths = [config["ch"] * level for level in config["ch_mult"]]
    return AutoencoderKL(
        in_channels=config["in_channels"],
        out_channels=config["out_ch"],
        latent_channels=config["z_channels"],
        block_out_channels=tuple(widths),
        layers_per_block=config["num_res_blocks"],
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        scaling_factor=scale,
    ).eval()


def loaded_autoencoder(folder: Path) -> tuple[AutoencoderKL, RobustEncoder]:
    golden = Golden.open(folder, "stage1")
    autoencoder = autoencoder_of(golden.config["ddconfig"], golden.config["scale_factor"])
    weights = golden.weights()
    robust = {k.removeprefix("denoise_encoder."): weights.pop(k) for k in list(weights) if "denoise_encoder." in k}
    table = autoencoder_table(dict(autoencoder.config))
    load(autoencoder, weights, table, "autoencoder")
    encoder = RobustEncoder(autoencoder)
    load(encoder.encoder, robust, part_of(table, "encoder"), "denoise_encoder")
    return autoencoder, encoder.eval()


def vector_embedding(network: Any, timesteps: Tensor, vector: Tensor) -> Tensor:
    """The embedding from the official vector, which joins pooled text and the sizes' embeddings."""
    return network.time_embedding(network.time_proj(timesteps)) + network.add_embedding(vector)  # type: ignore[no-any-return]
