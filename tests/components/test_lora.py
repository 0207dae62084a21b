"""The LoRA in a network: flags of the network, the seed of the start, and the merge in float32."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from helper_modules import load_helper
from torch import Tensor

from components.priors.lora import add_lora, each_lora_delta, merge_lora
from components.randomness import generator, seeded_init


def tensor(name: str, *shape: int) -> Tensor:
    return torch.from_numpy(generator(0, name).standard_normal(shape, dtype="float32"))


@torch.no_grad()
def test_a_lora_keeps_flags_and_merges_in_float32() -> None:
    """The network trains on where it trained before; a half-precision weight is rounded once, after the sum."""

    def new_dit() -> Any:
        with seeded_init(0, "dit"):
            dit = SD3Transformer2DModel(**load_helper("components/_tiny_sd3.py").TRANSFORMER).bfloat16()
        dit.pos_embed.requires_grad_(False)
        return dit

    dit, targets = new_dit(), ["attn.to_q", "attn.to_out.0"]
    flags = {key: parameter.requires_grad for key, parameter in dit.named_parameters()}
    layers = add_lora(dit, "own", rank=2, alpha=6, targets=targets, seed=1)
    after = {k.replace(".base_layer.", "."): p.requires_grad for k, p in dit.named_parameters() if ".lora_" not in k}
    assert set(flags.values()) == {True, False} and after == flags
    starts = [next(iter(layers.values())).lora_A["own"].weight.clone()]
    for seed in (1, 2):
        again = add_lora(new_dit(), "own", rank=2, alpha=6, targets=targets, seed=seed)
        starts.append(next(iter(again.values())).lora_A["own"].weight)
    assert torch.equal(starts[0], starts[1]) and not torch.equal(starts[0], starts[2])
    dit.train()  # nothing is dropped
    x = tensor("x", 1, 4, 32).bfloat16()
    layer: Any = next(iter(layers.values()))
    layer.lora_B["own"].weight.copy_(tensor("up", *layer.lora_B["own"].weight.shape))
    assert torch.equal(layer(x), layer(x))
    for key, each in layers.items():
        each.lora_B["own"].weight.copy_(0.1 * tensor(key, *each.lora_B["own"].weight.shape))
    base = {key: each.get_base_layer().weight.float() for key, each in layers.items()}
    sums = {key: base[key] + delta for key, delta in each_lora_delta(layers, "own")}
    merge_lora(dit, "own")
    for key, value in sums.items():
        assert torch.equal(dit.get_submodule(key).weight, value.bfloat16())
