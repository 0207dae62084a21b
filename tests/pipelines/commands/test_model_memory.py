"""`restoray doctor --model`: which switch makes a restoration fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from components.models import ModelCard, save_model
from components.priors.sdxl_config import SDXL
from components.systems.supir.config import AdaptorConfig
from pipelines.commands.model_memory import examine_model, read_size
from pipelines.core.errors import UsageError


def test_the_doctor_names_the_first_switch_that_fits(tmp_path: Path) -> None:
    config = {"adaptor": AdaptorConfig().to_dict()}
    card = ModelCard(name="s", system="supir", config=config, prior={"id": SDXL, "digest": ""})
    tensors = {"x": torch.zeros(1)}  # the weights are not looked at
    model = save_model(tmp_path / "m", card, {"adaptor": tensors, "encoder": tensors})

    def statuses(memory_gib: float) -> list[str]:
        return [finding.status for finding in examine_model(str(model.path), "1024x1024", memory_gib)]

    assert statuses(40.0) == ["ok"]
    assert statuses(16.0) == ["warn", "ok"]
    assert statuses(9.0) == ["warn", "warn", "ok"]
    assert statuses(2.0) == ["warn"] * 5 + ["fail"]
    assert "--precision fp8 --offload:" in examine_model(str(model.path), "1024x1024", 6.0)[-1].seen
    assert "--precision bf16:" in examine_model(str(model.path), "1024x1024", 16.0)[-1].seen
    assert read_size("640x480") == (480, 640)
    for size in ("640", "0x5", "axb"):
        with pytest.raises(UsageError, match="WIDTHxHEIGHT"):
            read_size(size)
    with pytest.raises(UsageError, match="no estimate"):
        examine_model("nano", "64x64", 1.0)
