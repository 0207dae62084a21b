"""Settings of a distillation: every one outside its range is refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from components.objectives.distillation import Distillation
from components.recipes import RecipeError


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        *(
            ({name: -0.1}, f"^{name} must be at least 0, got -0.1")
            for name in (
                "kappa",
                "weight",
                "cfg_scale",
                "perceptual_weight",
                "l2_weight",
                "t_low",
                "t_high",
                "matching_distance",
                "window",
            )
        ),
        *(({name: 0}, f"^{name} must be at least 1, got 0") for name in ("t_floor", "lora_rank", "fake_steps")),
        *(
            ({name: value}, f"^{name} must be between 0 and 1, got {value}")
            for name in ("t_share", "fixed_alpha", "text_dropout")
            for value in (-0.1, 1.1)
        ),
        ({"reduction": "max"}, "^reduction must be one of mean, sum, got 'max'"),
        ({"regression": "l1"}, "^regression must be one of perceptual, l2, both, none, got 'l1'"),
        ({"fake": "all"}, "^fake must be one of full, lora"),
        ({"fake_range": "all"}, "^fake_range must be one of full, same"),
        ({"regression": "none", "score": False}, "leaves no loss"),
        ({"regression": "none", "matching_distance": 0.1}, "targets that match"),
        ({"t_low": 300.0, "t_high": 200.0}, "t_low"),
        ({"score": False, "dynamic": False, "fixed_alpha": 0.0}, "leaves no loss"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        Distillation(**settings)
