"""Recorded runs of one picture for studies: tensors, seeds, steps, and rows of a strip."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from components.restoring import picture_seed
from components.types import Image
from pipelines.analysis.instantir.subject import Subject
from pipelines.analysis.strips import tile
from pipelines.analysis.study import numbers
from pipelines.pages.page import evenly

if TYPE_CHECKING:
    from torch import Tensor

    from components.systems.instantir.insight import Trajectory

STRIP_STEPS = 6


def tensor(picture: Image) -> Tensor:
    """uint8 [S, S, 3] -> float32 [1, 3, S, S] in [-1, 1]."""
    from components.tensors import images_to_tensor

    return images_to_tensor([picture])


def record_picture(subject: Subject, key: str, lq: Image, prompt: str = "", **changes: Any) -> Trajectory:
    """Restore one picture and record the run. `changes` are options of this run only.

    Raises:
        SampleError: "not_finite": the model is broken, see tensors.check_finite.
    """
    from components.systems.instantir.insight import record
    from components.tensors import check_finite

    options = replace(subject.options, **changes)
    run = record(subject.network, tensor(lq), options, [picture_seed(subject.job.seed, key)], [prompt])
    for latents in (run.latents, run.denoised.transpose(0, 1), run.previews.transpose(0, 1)):
        check_finite(latents, [key])
    return run


def encode(subject: Subject, picture: Image) -> Tensor:
    """The picture's clean latents [1, C, h, w]."""
    import torch

    with torch.inference_mode():
        return subject.network.prior.encode(tensor(picture).to(subject.network.prior.device))


def decode(subject: Subject, latents: Tensor) -> list[Image]:
    """Pictures uint8 [S, S, 3] of latents [B, C, h, w]."""
    import torch

    from components.tensors import tensor_to_images

    with torch.inference_mode():
        return tensor_to_images(subject.network.prior.decode(latents))


def run_values(run: Trajectory, hq: Tensor) -> dict[str, list[Any]]:
    """The distances of Fig. 4 and the errors against the clean latents of one picture's run, by step."""
    from components.systems.instantir.insight import distances, errors

    curves, error_curves = distances(run), errors(run, hq)
    return {
        "to_denoised": numbers(curves.to_denoised[:, 0].cpu()),
        "change": numbers(curves.change[:, 0].cpu()),
        "delta": numbers(curves.delta[:, 0].cpu()),
        "preview_error": numbers(error_curves["preview"][:, 0].cpu()),
        "denoised_error": numbers(error_curves["denoised"][:, 0].cpu()),
    }


def strip_steps(steps: int, renewed: Sequence[bool] | None = None) -> list[int]:
    """0-based steps of a strip: at most STRIP_STEPS, the first and the last included.

    Args:
        renewed: whether the Previewer ran in each step; the strip leaves out the other steps.
    """
    return evenly([step for step in range(steps) if renewed is None or renewed[step]], STRIP_STEPS)


def strip_row(subject: Subject, run: Trajectory, first: Sequence[Image]) -> list[Image]:
    """The tiles of `first`, of the previews over the steps, and of the result."""
    import torch

    steps = strip_steps(len(run.timesteps), run.renewed.tolist())
    latents = torch.cat([*(run.previews[step] for step in steps), run.latents])
    return [tile(picture) for picture in [*first, *decode(subject, latents)]]
