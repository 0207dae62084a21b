"""The two scores of the distillation: the frozen real one, and the trained fake one, a copy or a LoRA on the real one.

With a LoRA both share one network, and the LoRA is on by default. It is off only inside the real score's call, which
keeps no gradients. A forward pass that gradient checkpointing repeats therefore runs with the LoRA on, as before.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor

from components.objectives.score_distillation import ScoreNetwork
from components.priors.conditions import Conditions
from components.randomness import seeded_init
from components.samplers.schedules import FlowSchedule, Schedule
from components.systems.instarevive.network import EpsPredictor

LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
"""Attention projections, of DiTs and UNets."""

ADAPTER = "fake"


class WithoutLora:
    """A predictor as a ScoreNetwork, with its LoRA off during the call."""

    def __init__(self, predictor: EpsPredictor) -> None:
        self.predictor = predictor
        self.layers = [m for m in predictor.network.modules() if isinstance(m, LoraLayer)]

    @property
    def schedule(self) -> Schedule | FlowSchedule:
        return self.predictor.schedule

    @torch.no_grad()
    def predict_eps(self, latents: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        """See ScoreNetwork; keeps no gradients."""
        with self._off():
            return self.predictor.predict_eps(latents, timesteps, conditions)

    @contextlib.contextmanager
    def _off(self) -> Iterator[None]:
        # sets only peft's flag: peft's own switch also visits all parameters and changes requires_grad
        for layer in self.layers:
            layer._disable_adapters = True
        try:
            yield
        finally:
            for layer in self.layers:
                layer._disable_adapters = False


def build_scores(
    teacher: EpsPredictor,
    kind: Literal["full", "lora"] = "full",
    rank: int = 64,
    seed: int = 0,
    targets: Sequence[str] = LORA_TARGETS,
) -> tuple[ScoreNetwork, EpsPredictor]:
    """(real, fake) scores from a trained predictor; the fake one starts as the same function.

    Args:
        teacher: frozen here; "lora" changes it in place and adds the LoRA to its layers.
        kind: "full" copies the network; "lora" shares it.
        rank: of the LoRA; its alpha is the same number.
        seed: fixes the LoRA's random start.
        targets: name suffixes of the layers with a LoRA.

    Returns:
        The scores. Those parameters of `fake.network` that train require gradients.

    Raises:
        ValueError: an unknown kind, or no layer matches the targets.
    """
    teacher.eval().requires_grad_(False)
    if kind == "full":
        return teacher, copy.deepcopy(teacher).requires_grad_(True)
    if kind != "lora":
        raise ValueError(f"the fake score must be full or lora, got {kind!r}")
    settings = LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=list(targets))
    with seeded_init(seed, "fake score"):
        inject_adapter_in_model(settings, teacher.network, adapter_name=ADAPTER)
    for name, parameter in teacher.network.named_parameters():
        parameter.requires_grad_(".lora_" in name)
    return WithoutLora(teacher), teacher
