"""The training side of InstaRevive against recorded tensors; files are found by name, every output is consumed."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

_spec = importlib.util.spec_from_file_location(
    "_golden_instarevive_training", Path(__file__).with_name("_golden_instarevive_training.py")
)
assert _spec and _spec.loader
checks = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = checks
_spec.loader.exec_module(checks)


@dataclass
class Golden:
    description: dict[str, Any]
    tensors: dict[str, Tensor]
    checked: set[str] = field(default_factory=set)


@pytest.mark.parametrize("module", checks.CHECKS)
@torch.no_grad()
def test_golden(module: str, golden_dir: Path) -> None:
    paths = sorted(golden_dir.glob(f"instarevive_{module}*.json"))
    assert paths
    for path in paths:
        golden = Golden(json.loads(path.read_text()), load_file(path.with_suffix(".safetensors")))
        checks.CHECKS[module](golden)
        outputs = {name for name in golden.tensors if name.startswith("output/")}
        assert outputs == golden.checked, f"{path.name}: not checked: {sorted(outputs - golden.checked)}"
