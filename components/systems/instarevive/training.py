"""Builds a recipe's distillation: generator, real and fake score on one backbone; and previews during training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from components.models import Model, ModelError, load_model
from components.naming import list_some
from components.objectives.regression import load_lpips
from components.objectives.score_distillation import ScoreNetwork
from components.options import restore_defaults
from components.priors.conditions import Conditions
from components.priors.families import FAMILIES
from components.priors.sdxl import Prior
from components.randomness import Noise
from components.recipes import as_dict
from components.systems.instarevive.backbone import Backbone, open_backbone
from components.systems.instarevive.build import (
    generator_config,
    generator_parts,
    load_generator,
    open_coarse,
)
from components.systems.instarevive.fast import Speed
from components.systems.instarevive.identity import (
    PictureEmbedder,
    load_ip_adapter,
    load_picture_embedder,
    with_ip_adapter,
)
from components.systems.instarevive.network import EpsPredictor, OneStep, OneStepGenerator
from components.systems.instarevive.objective import InstaReviveObjective, PriorTexts, Texts
from components.systems.instarevive.recipe import InstaReviveRecipe
from components.systems.instarevive.restorer import Coarse, InstaReviveRestorer
from components.systems.instarevive.scores import build_scores
from components.tensors import images_to_tensor, psnr_of_batch, tensor_to_images
from components.types import Batch, Request

MEASURE_SEED = 20260103  # of the generator's noise on held-out pictures


class BackboneTexts:
    """objective.Texts by the frozen text encoder of any backbone.

    Args:
        backbone: embeds the prompts.
    """

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone

    def conditions(self, batch: Batch, dropped: Tensor) -> Conditions:
        drops = dropped.tolist()
        prompts = ["" if empty else prompt for prompt, empty in zip(batch.prompts, drops, strict=True)]
        return self.backbone.conditions(prompts, batch.sizes, together=True)

    def unconditional(self, batch: Batch) -> Conditions:
        return self.backbone.conditions([""] * len(batch), batch.sizes)


class BackboneObjective(InstaReviveObjective):
    """The distillation of a recipe, with the parts that its restorer needs during training.

    Attributes:
        backbone: frozen. coarse_restorer: the one in front of the generator; None for none.
    """

    backbone: Backbone
    coarse_restorer: Coarse | None


def build_objective(
    recipe: InstaReviveRecipe,
    parents: Mapping[str, Model],
    examples: Callable[[], Tensor] | None = None,
    device: str = "cpu",
) -> BackboneObjective:
    """The objective of stage "onestep".

    Args:
        recipe: resolved recipe.
        parents: at most one model folder of InstaRevive; it replaces recipe.warm_start.
        examples: unused; other systems need example pictures.
        device: where the networks go.

    Raises:
        ModelError: prior, warm start, coarse restorer or LPIPS cannot be opened, or do not fit together.
    """
    if recipe.stage != "onestep":
        raise ValueError(f"no stage {recipe.stage!r}; there is onestep")
    start = next(iter(parents.values()), None)
    if start is None and recipe.warm_start:
        start = load_model(recipe.warm_start)
    family: str = recipe.family
    prior, prior_record = recipe.prior, start.info.get("prior") if start else None
    if recipe.teacher:
        family, prior, prior_record = prior_of_teacher(load_model(recipe.teacher))
    elif recipe.distil:
        raise ModelError(f"{recipe.name}: distil=true needs a teacher: set teacher=MODEL")
    backbone = open_backbone(family, prior, prior_record)
    _check_family(recipe, backbone)
    start_config = start.info["config"] if start is not None and start.info["system"] == "instarevive" else {}
    timestep, mask = recipe.timestep, recipe.mask_as_bias
    if timestep == -1:
        timestep = int((start_config.get("one_step") or {}).get("timestep", -1))
    if mask is None:
        mask = bool(start_config.get("mask_as_bias", False))
    one_step = OneStep(timestep=timestep, input=recipe.input, kernel=recipe.kernel)
    predictor = backbone.predictor(mask_as_bias=mask, trainable=True)
    generator = OneStepGenerator(predictor, one_step, recipe.align_start)
    if start is not None:
        _continue_from(generator, start)
    coarse, coarse_record = None, None
    if recipe.coarse:
        folder = load_model(recipe.coarse)
        # a folder's absolute path, so that the trained model finds it from any current folder; other names unchanged
        place = str(folder.path.resolve()) if Path(recipe.coarse).is_dir() else recipe.coarse
        coarse, coarse_record = open_coarse(recipe.coarse), {"id": place, "digest": folder.digest}
        coarse.network.to(device)
    config = generator_config(backbone, generator, coarse_record)
    if recipe.precision == "bf16" and FAMILIES[family].text.halved:
        backbone.prior.halve_text_encoder()
    backbone.to(device)
    generator.to(torch.device(device))
    settings = recipe.distillation
    real: ScoreNetwork = backbone.predictor()
    fake: EpsPredictor | None = None
    teacher: EpsPredictor | None = None
    embedder: PictureEmbedder | None = None
    if recipe.ip_adapter:  # copied before a LoRA changes the prior's own network
        teacher = with_ip_adapter(backbone.predictor(), load_ip_adapter(recipe.ip_adapter)).to(torch.device(device))
        embedder = load_picture_embedder(recipe.picture_encoder).to(torch.device(device))
    if settings.score:
        real, fake = build_scores(backbone.predictor(), settings.fake, settings.lora_rank, recipe.seed)
        real = teacher or real
    if recipe.gradient_checkpointing:
        for predictor in (generator.predictor, *([fake] if fake else [])):
            predictor.network.enable_gradient_checkpointing()  # type: ignore[operator]
    texts: Texts = PriorTexts(backbone.prior) if isinstance(backbone.prior, Prior) else BackboneTexts(backbone)
    objective = BackboneObjective(
        generator,
        real,
        fake,
        backbone,
        texts,
        settings,
        coarse=coarse,
        picture_embedder=embedder,
        perceptual=load_lpips(settings.lpips, device) if settings.lpips else None,
        config=config,
        parts=lambda: generator_parts(generator),
        prior=backbone,
    )
    objective.backbone, objective.coarse_restorer = backbone, coarse
    return objective


def _check_family(recipe: InstaReviveRecipe, backbone: Backbone) -> None:
    """Checks that a recipe with a teacher cannot do itself; raises ModelError."""
    if recipe.embeddings and not FAMILIES[backbone.family].text.columns:
        raise ModelError(f"{recipe.name}: precomputed embeddings have SDXL's shape, not that of {backbone.family}")
    if recipe.ip_adapter and FAMILIES[backbone.family].kind != "unet":
        raise ModelError(f"{recipe.name}: an IP-Adapter needs a UNet, and the family is {backbone.family}")


def prior_of_teacher(teacher: Model) -> tuple[str, str, Mapping[str, str]]:
    """(family, name, entry in the teacher's model.json) of the prior of a teacher and its student.

    It works for every system. A model whose prior does not have SDXL's shape has a "family" in its config.

    Raises:
        ModelError: the model has no prior.
    """
    record = teacher.info.get("prior") or {}
    if not record.get("id"):
        raise ModelError(
            f"{teacher.path}: a {teacher.info['system']} model has no prior, so there is no score to distil"
        )
    return str(teacher.info["config"].get("family") or "sdxl"), str(record["id"]), record


def encoded_with(recipe: InstaReviveRecipe, parents: Mapping[str, Any]) -> str:
    """Name of the prior that must have encoded the precomputed columns."""
    return prior_of_teacher(load_model(recipe.teacher))[1] if recipe.teacher else recipe.prior


def _continue_from(generator: OneStepGenerator, start: Model) -> None:
    """Copy the weights of an InstaRevive model folder; without an aligning convolution there, the new one stays.

    Raises:
        ModelError: a model of another system, shape, noise schedule, prediction or input.
    """
    if start.info["system"] != "instarevive":
        raise ModelError(f"{start.path}: holds a {start.info['system']} model, not an InstaRevive to start from")
    before = load_generator(start)
    if before.align is not None and generator.align is None:
        raise ModelError(f"{start.path}: its generator takes noise (input=noise), and the recipe's takes none")
    for name, start_value, value in (
        ("prediction", before.predictor.prediction, generator.predictor.prediction),
        ("noise schedule", before.predictor.schedule, generator.predictor.schedule),
    ):
        if start_value != value:
            raise ModelError(f"{start.path}: was trained with the {name} {start_value}, and the prior has {value}")
    _copy(before.predictor.network, generator.predictor.network, start)
    if before.align is not None and generator.align is not None:
        _copy(before.align, generator.align, start)


def _copy(source: nn.Module, target: nn.Module, model: Model) -> None:
    tensors, expected = source.state_dict(), target.state_dict()
    differ = sorted(
        k
        for k in {*tensors, *expected}
        if k not in tensors or k not in expected or tensors[k].shape != expected[k].shape
    )
    if differ:
        raise ModelError(f"{model.path}: does not have the shapes of the prior's network: {list_some(differ)}")
    target.load_state_dict(tensors)


@torch.no_grad()
def measure(objective: BackboneObjective, heldout: Sequence[Batch]) -> dict[str, float]:
    """Mean PSNR over held-out pictures, dB, of the generator's results and of the LQ pictures themselves.

    Losses of different steps are not comparable, since alpha changes; PSNR is. Empty if inputs and targets are not
    pairs.
    """
    if objective.settings.regression == "none":
        return {}
    psnrs: dict[str, list[Tensor]] = {"psnr_heldout": [], "psnr_heldout_lq": []}
    for batch in heldout:
        noise = Noise(MEASURE_SEED, batch.positions, str(batch.hq.device))
        restored = objective.autoencoder.decode(objective.clean(batch, noise))
        hq, lq = batch.hq * 0.5 + 0.5, batch.lq * 0.5 + 0.5
        psnrs["psnr_heldout"].append(psnr_of_batch(restored * 0.5 + 0.5, hq))
        psnrs["psnr_heldout_lq"].append(psnr_of_batch(lq, hq))
    return {name: float(torch.cat(values).mean()) for name, values in psnrs.items()}


def look(
    objective: BackboneObjective, recipe: InstaReviveRecipe, lq: Tensor, prompts: Sequence[str], seed: int
) -> Tensor:
    """LQ pictures [B, 3, H, W] in [-1, 1] restored by the generator in training; same shape and range."""
    generator = objective.generator
    assert isinstance(generator, OneStepGenerator)
    training = generator.training
    options: dict[str, Any] = restore_defaults(as_dict(recipe))
    # previews have no masks, but the strokes of inpainting's training pictures are white
    options["inpaint"] = "white" if recipe.distillation.inpaint else "none"
    # the weights still train: do not change them or their memory layout
    plain = Speed(channels_last="off")
    restorer = InstaReviveRestorer(generator, objective.backbone, objective.coarse_restorer, options, speed=plain)
    requests = [
        Request(key=f"sample {i}", image=image, seed=seed + i, prompt=prompt)
        for i, (image, prompt) in enumerate(zip(tensor_to_images(lq), prompts, strict=True))
    ]
    try:
        return images_to_tensor([restored.image for restored in restorer.restore(requests)])
    finally:
        generator.train(training)
