"""Peak memory on the meta device, by hand; SUPIR's plan at the reference's sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from components.models import Model, ModelCard, save_model
from components.peak_memory import MemoryPlan, Phase, parameter_bytes, peak_bytes
from components.priors.sdxl_config import SDXL
from components.systems.supir.config import AdaptorConfig
from components.systems.supir.memory import plan_memory

GIB = 2**30


def test_the_peak_by_hand() -> None:
    x = torch.empty(1000, device="meta")  # exists before, so it does not count

    def chain() -> torch.Tensor:
        y = x + 1  # 4000 bytes
        z = y * 2  # 8000 with y
        del y
        view = z[:10]  # shares z's memory
        return torch.cat([z, z, view])  # 4000 + 8040

    assert peak_bytes(chain) == 4000 + 8040
    assert peak_bytes(lambda: x[:5]) <= 4000


def test_attention_has_no_matrix_of_scores() -> None:
    query = torch.empty(1, 2, 500, 8, device="meta")
    assert peak_bytes(lambda: F.scaled_dot_product_attention(query, query, query)) == 4 * query.numel()


def test_networks_in_turns_need_the_largest_phase_alone() -> None:
    phases = (Phase(name="a", weights=10, peak=5), Phase(name="b", weights=20, peak=1))
    assert MemoryPlan(settings={}, phases=phases, in_turns=True).total == 21
    assert MemoryPlan(settings={}, phases=phases, in_turns=False).total == 35
    assert parameter_bytes(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)) == 4 * (8 + 4 + 4) + 8


@pytest.fixture
def model(tmp_path: Path) -> Model:
    """A folder that names SDXL; its weights are not looked at."""
    config: dict[str, Any] = {"adaptor": AdaptorConfig().to_dict()}
    card = ModelCard(name="s", system="supir", config=config, prior={"id": SDXL, "digest": ""})
    return save_model(tmp_path / "m", card, {"adaptor": {"x": torch.zeros(1)}, "encoder": {"x": torch.zeros(1)}})


def test_the_plan_at_real_size_has_the_references_weights(model: Model) -> None:
    """supir.md, section 4.8: UNet, control and connectors are 15.5 GB in fp32 and 7.7 GB in half precision."""
    full, half = (plan_memory(model, (1024, 1024), {}, precision) for precision in ("fp32", "bf16"))
    weights = {phase.name: phase.weights for phase in full.phases}
    assert weights["steps"] == pytest.approx(15.5e9, rel=0.01)
    assert {p.name: p.weights for p in half.phases}["steps"] == pytest.approx(7.7e9, rel=0.01)
    assert weights["pictures"] == pytest.approx(4 * (83_653_863 + 34_163_592), rel=0.001)
    turns = plan_memory(model, (1024, 1024), {}, "bf16", offload=True)
    assert turns.total < half.total - 1.5 * GIB
    small = plan_memory(model, (1024, 1024), {"tile_px": 512}, "bf16")
    peak = {phase.name: phase.peak for phase in half.phases}["steps"]
    assert {phase.name: phase.peak for phase in small.phases}["steps"] < 0.4 * peak
    unguided = plan_memory(model, (1024, 1024), {"cfg_scale": 1.0, "cfg_start": 1.0}, "bf16")
    assert {phase.name: phase.peak for phase in unguided.phases}["steps"] < 0.7 * peak
    large = plan_memory(model, (4096, 4096), {}, "bf16")  # the networks see tiles
    assert {phase.name: phase.peak for phase in large.phases}["steps"] == peak
    with pytest.raises(ValueError, match="tile_px"):
        plan_memory(model, (1024, 1024), {"tile_pix": 512})
