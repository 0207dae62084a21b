"""Names of SDXL's tensors: Stability's checkpoints on one side, diffusers' modules on the other.

Each table maps the name of a module to that of its counterpart; what follows the module in a key is the same on both
sides. Tables are built from a network's configuration, so that small networks of the same kind have them too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
EMBEDDINGS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
}
KL_RESNET = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "nin_shortcut": "conv_shortcut"}
KL_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


def encoder_table(config: Mapping[str, Any]) -> dict[str, str]:
    """Modules of a UNet's embeddings, compression path and middle block: checkpoint -> diffusers.

    Args:
        config: of a UNet2DConditionModel.
    """
    layers, table = int(config["layers_per_block"]), {**EMBEDDINGS, "input_blocks.0.0": "conv_in"}
    for level, kind in enumerate(config["down_block_types"]):
        first, last = 1 + level * (layers + 1), level == len(config["down_block_types"]) - 1
        for layer in range(layers):
            own = f"input_blocks.{first + layer}"
            _add_resnet(table, f"{own}.0", f"down_blocks.{level}.resnets.{layer}")
            if "CrossAttn" in kind:
                table[f"{own}.1"] = f"down_blocks.{level}.attentions.{layer}"
        if not last:
            table[f"input_blocks.{first + layers}.0.op"] = f"down_blocks.{level}.downsamplers.0.conv"
    _add_resnet(table, "middle_block.0", "mid_block.resnets.0")
    table["middle_block.1"] = "mid_block.attentions.0"
    _add_resnet(table, "middle_block.2", "mid_block.resnets.1")
    return table


def unet_table(config: Mapping[str, Any]) -> dict[str, str]:
    """Modules of a UNet: checkpoint (below model.diffusion_model) -> diffusers; `config` as in encoder_table."""
    layers, table = int(config["layers_per_block"]) + 1, encoder_table(config)
    for level, kind in enumerate(config["up_block_types"]):
        for layer in range(layers):
            own, attends = f"output_blocks.{level * layers + layer}", "CrossAttn" in kind
            _add_resnet(table, f"{own}.0", f"up_blocks.{level}.resnets.{layer}")
            if attends:
                table[f"{own}.1"] = f"up_blocks.{level}.attentions.{layer}"
            if layer == layers - 1 and level < len(config["up_block_types"]) - 1:
                table[f"{own}.{1 + attends}.conv"] = f"up_blocks.{level}.upsamplers.0.conv"
    return {**table, "out.0": "conv_norm_out", "out.2": "conv_out"}


def autoencoder_table(config: Mapping[str, Any]) -> dict[str, str]:
    """Modules of an AutoencoderKL: checkpoint (below first_stage_model) -> diffusers.

    Args:
        config: of an AutoencoderKL. Its attention projections are 1x1 convolutions in a checkpoint; see fit_shapes.
    """
    levels, layers = len(config["block_out_channels"]), int(config["layers_per_block"])
    table = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    for half, extra in (("encoder", 0), ("decoder", 1)):
        kind, blocks, resampler = ("up", "up_blocks", "upsample") if extra else ("down", "down_blocks", "downsample")
        for level in range(levels):
            place = levels - 1 - level if extra else level
            for layer in range(layers + extra):
                own = f"{half}.{blocks}.{place}.resnets.{layer}"
                _add(table, f"{half}.{kind}.{level}.block.{layer}", own, KL_RESNET)
            if level != (0 if extra else levels - 1):
                own = f"{half}.{blocks}.{place}.{resampler}rs.0.conv"
                table[f"{half}.{kind}.{level}.{resampler}.conv"] = own
        for number in (1, 2):
            _add(table, f"{half}.mid.block_{number}", f"{half}.mid_block.resnets.{number - 1}", KL_RESNET)
        _add(table, f"{half}.mid.attn_1", f"{half}.mid_block.attentions.0", KL_ATTENTION)
        table |= {f"{half}.conv_in": f"{half}.conv_in", f"{half}.conv_out": f"{half}.conv_out"}
        table[f"{half}.norm_out"] = f"{half}.conv_norm_out"
    return table


def part_of(table: Mapping[str, str], prefix: str) -> dict[str, str]:
    """The modules below a prefix of both sides, without it."""
    dotted = f"{prefix}."
    return {a.removeprefix(dotted): b.removeprefix(dotted) for a, b in table.items() if a.startswith(dotted)}


def inverse(table: Mapping[str, str]) -> dict[str, str]:
    """diffusers -> checkpoint."""
    return {b: a for a, b in table.items()}


def translate(state: Mapping[str, Tensor], table: Mapping[str, str]) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors under the names of the other side, and the keys that belong to no module of the table."""
    result, unknown = {}, []
    for key, value in state.items():
        name = translate_key(key, table)
        if name is None:
            unknown.append(key)
        else:
            result[name] = value
    return result, unknown


def translate_key(key: str, table: Mapping[str, str]) -> str | None:
    """A key under the name of the other side; None if it belongs to no module of the table."""
    parts = key.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        module = ".".join(parts[:cut])
        if module in table:
            return ".".join([table[module], *parts[cut:]])
    return None


def checkpoint_shape(key: str, shape: Sequence[int]) -> tuple[int, ...]:
    """A tensor's shape in a checkpoint from its key there and its shape in diffusers; see autoencoder_table."""
    return (*shape, 1, 1) if ".attn_1." in f".{key}" and len(shape) == 2 else tuple(shape)


def fit_shapes(state: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors with the shapes of the other side where they differ only by 1x1 kernels: [C, D, 1, 1] and [C, D]."""
    result = {}
    for name, value in state.items():
        goal = like[name].shape if name in like else value.shape
        same = tuple(side for side in value.shape[2:] if side != 1) == () and value.shape[:2] == goal[:2]
        result[name] = value.reshape(goal) if same and value.numel() == goal.numel() else value
    return result


def _add(table: dict[str, str], checkpoint: str, diffusers: str, names: Mapping[str, str]) -> None:
    table.update({f"{checkpoint}.{a}": f"{diffusers}.{b}" for a, b in names.items()})


def _add_resnet(table: dict[str, str], checkpoint: str, diffusers: str) -> None:
    _add(table, checkpoint, diffusers, RESNET)
