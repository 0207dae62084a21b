"""Whether a result agrees with its input, without a target: consistency and colour drift.

`consistency` degrades the result again by the recorded plan; it must give the input. A result cannot gain by detail
that the input contradicts. Plans replay bit for bit, noise included, so the true picture scores best. Handing the input
back scores high too: the input is blurred twice then, which changes little. So the score always stands beside the
input's own, and beside the gain over the input.

`color_drift` compares the colours of areas, which no restoration should change.
"""

from __future__ import annotations

import cv2
import numpy as np

from components.degradations.engine import apply_plan
from components.evaluation import IDENTITY_PSNR_DB
from components.images import to_float, to_uint8
from components.types import Image, Plan

CELL_PX = 16
"""Side of an area whose mean colour is compared; ours, larger than the blur of most inputs."""


def consistency_db(image: Image, lq: Image, plan: Plan) -> float:
    """PSNR in dB between the degraded result and the input, at most IDENTITY_PSNR_DB.

    Args:
        image: result, uint8 [H, W, 3].
        lq: input, uint8 [H', W', 3], as the plan makes it.
        plan: the one that made `lq`.

    Raises:
        ValueError: the plan makes another shape of the result than the input has.
    """
    again = to_uint8(apply_plan(to_float(image), plan))
    if again.shape != lq.shape:
        raise ValueError(f"the plan makes {again.shape[:2]} of the result, the input has {lq.shape[:2]}")
    error = float(np.square(again.astype(np.float64) - lq).mean()) / 255**2
    return float(min(IDENTITY_PSNR_DB, -10 * np.log10(error))) if error else IDENTITY_PSNR_DB


def color_drift(image: Image, lq: Image) -> float:
    """Mean colour difference (CIE 1976 Delta E) of areas of CELL_PX; 0 for equal colours, 2.3 is just noticeable.

    Args:
        image, lq: result and input, uint8 [H, W, 3] and [H', W', 3]; the input may have another size.
    """
    height, width = image.shape[:2]
    cells = (max(1, round(width / CELL_PX)), max(1, round(height / CELL_PX)))
    first, second = (
        cv2.cvtColor(cv2.resize(to_float(side), cells, interpolation=cv2.INTER_AREA), cv2.COLOR_RGB2Lab)
        for side in (image, lq)
    )
    return float(np.linalg.norm(first.astype(np.float64) - second, axis=2).mean())
