"""LoRA files of other tools: alphas beside the tensors or of each layer, wrappers of any name, and other adapters."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from components.models import ModelError, load_model
from components.systems.instantir.previewer import released_names, split_key
from components.systems.instantir.released import RELEASED, find_files
from components.systems.instantir.weights import expected_layout, import_weights
from components.systems.weights_io import ImportJob, ImportReport
from components.tensor_files import WeightsFileError

SIZES: dict[str, Any] = {
    "resampler": {"dim": 16, "depth": 1, "dim_head": 8, "heads": 2, "num_queries": 4},
    "lora": {"rank": 4},
}
Files = Mapping[str, dict[str, Tensor]]


@pytest.fixture(scope="module")
def files() -> Files:
    """The three released files at nano size, by name."""
    draw = torch.Generator().manual_seed(0)
    return {
        name: {key: torch.randn(shape, generator=draw) for key, shape in shapes.items()}
        for name, shapes in expected_layout("nano", sizes=SIZES).items()
    }


@pytest.fixture(scope="module")
def peft(files: Files) -> dict[str, Tensor]:
    """The LoRA in peft's spelling without a prefix."""
    lora = files[RELEASED["previewer"]]
    return {".lora_".join(split_key(key) or ()) + ".weight": tensor for key, tensor in lora.items()}


def kohya(peft: Mapping[str, Tensor]) -> dict[str, Tensor]:
    ways = {"A": "down", "B": "up"}
    splits = {key: split_key(key) or ("", "") for key in peft}
    return {f"lora_unet_{s[0].replace('.', '_')}.lora_{ways[s[1]]}.weight": peft[key] for key, s in splits.items()}


def run(
    folder: Path,
    files: Files,
    lora: Mapping[str, Tensor],
    metadata: dict[str, str] | None = None,
    name: str = "",
    out: Path | None = None,
    **lora_sizes: Any,
) -> ImportReport:
    """Check an import of the files with another LoRA, or do it; it is a safetensors file where it has a head."""
    folder.mkdir(exist_ok=True)
    adapter = RELEASED["perceptor"]
    torch.save(files[adapter], folder / adapter)
    if metadata is None and not name:
        path = folder / RELEASED["previewer"]
        torch.save(dict(lora), path)
    else:
        path = folder / (name or "pytorch_lora_weights.safetensors")
        save_file(dict(lora), path, metadata=metadata)
    sizes = {**SIZES, "lora": {**SIZES["lora"], **lora_sizes}}
    return import_weights(ImportJob(files=[folder / adapter, path], out=out, prior="nano", sizes=sizes))


def alpha_of(report: ImportReport) -> float:
    return float(report.config["lora"]["alpha"])


DIFFUSERS = {"unet.lora_alpha": 8, "unet.r": 4}


@pytest.mark.parametrize(
    ("metadata", "alpha"),
    [
        ({"ss_network_alpha": "8.0", "ss_network_dim": "4"}, 8.0),
        ({"ss_network_alpha": "None"}, 1.0),
        ({"lora_adapter_metadata": json.dumps(DIFFUSERS)}, 8.0),
        ({"lora_adapter_metadata": json.dumps({"lora_alpha": 8, "r": 4, "use_rslora": True})}, 16.0),  # 8 * sqrt(4)
        ({"format": "pt"}, 1.0),
    ],
)
def test_the_alpha_in_a_files_head_counts(
    metadata: dict[str, str], alpha: float, files: Files, peft: dict[str, Tensor], tmp_path: Path
) -> None:
    """Without it the Previewer would have an eighth of its strength, in silence."""
    report = run(tmp_path, files, peft, metadata)
    assert alpha_of(report) == alpha
    assert any("holds no alpha: 1 is used" in note for note in report.notes) == (alpha == 1.0)
    if alpha == 8.0:
        assert alpha_of(run(tmp_path, files, peft, metadata, alpha=2.0)) == 2.0  # the user's goes first


def test_a_folder_of_peft_has_its_alpha_in_a_file_of_its_own(
    files: Files, peft: dict[str, Tensor], tmp_path: Path
) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 8, "r": 4}))
    lora = {f"base_model.model.{key}": tensor for key, tensor in peft.items()}
    assert alpha_of(run(tmp_path, files, lora, name="adapter_model.safetensors")) == 8.0
    assert [path.name for path in find_files(tmp_path)] == ["adapter.pt", "adapter_model.safetensors"]


@pytest.mark.parametrize("fault", [{"use_dora": True}, {"alpha_pattern": {"a": 2}}, {"rank_pattern": {"a": 2}}])
def test_settings_that_one_alpha_cannot_say_are_refused(
    fault: dict[str, Any], files: Files, peft: dict[str, Tensor], tmp_path: Path
) -> None:
    metadata = {"lora_adapter_metadata": json.dumps({**DIFFUSERS, **fault})}
    with pytest.raises(WeightsFileError, match=f"its settings name {next(iter(fault))}"):
        run(tmp_path, files, peft, metadata)


def test_alphas_that_differ_between_layers_go_into_the_up_weights(
    files: Files, peft: dict[str, Tensor], tmp_path: Path
) -> None:
    """kohya's tools write other alphas for convolutions; each layer's update must stay alpha / rank up @ down."""
    layers = sorted({split[0] for key in peft if (split := split_key(key))})
    alphas = {layer: 8.0 if number % 2 else 2.0 for number, layer in enumerate(layers)}
    keys = {f"lora_unet_{layer.replace('.', '_')}.alpha": torch.tensor(alpha) for layer, alpha in alphas.items()}
    report = run(tmp_path, files, {**kohya(peft), **keys}, out=tmp_path / "model")
    assert alpha_of(report) == 8.0 and any("alphas of 2 to 8" in note for note in report.notes)
    part = load_model(tmp_path / "model").part("previewer")
    for layer, alpha in alphas.items():
        assert torch.equal(part[released_names(layer)[1]] * 8.0, peft[f"{layer}.lora_B.weight"] * alpha)
        assert torch.equal(part[released_names(layer)[0]], peft[f"{layer}.lora_A.weight"])
    keys.popitem()
    with pytest.raises(ModelError, match=rf"alpha is missing for 1 of {len(layers)} layers"):
        run(tmp_path, files, {**kohya(peft), **keys})


@pytest.mark.parametrize("prefix", ["unet.base_model.model.", "student_net.unet."])
def test_a_wrapper_of_any_name_is_removed(prefix: str, files: Files, peft: dict[str, Tensor], tmp_path: Path) -> None:
    report = run(tmp_path, files, {f"{prefix}{key}": tensor for key, tensor in peft.items()})
    assert [source.tensors for source in report.sources if source.part == "previewer"] == [len(peft)]


@pytest.mark.parametrize(
    ("ending", "remedy"),
    [
        (".lora_magnitude_vector", "It is a DoRA: train a plain LoRA"),
        (".hada_w1_a", "LyCORIS module"),
        (".lora_C.weight", "convert the file with diffusers'"),
    ],
)
def test_other_adapters_are_named_with_the_remedy(
    ending: str, remedy: str, files: Files, peft: dict[str, Tensor], tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=remedy):
        run(tmp_path, files, {**peft, f"mid_block.x{ending}": torch.ones(4)})


def test_the_lora_of_text_encoders_is_named(files: Files, peft: dict[str, Tensor], tmp_path: Path) -> None:
    names = {"lora_te1_layer.lora_down.weight": torch.ones(4, 4), "lora_te1_layer.alpha": torch.tensor(4.0)}
    with pytest.raises(ModelError, match="save that of the UNet alone") as error:
        run(tmp_path, files, {**kohya(peft), **names})
    assert "alpha is missing" not in str(error.value)


def test_weights_of_eight_bits_are_read_and_checked(files: Files, peft: dict[str, Tensor], tmp_path: Path) -> None:
    """torch has no isfinite for them."""
    small = {key: tensor.to(torch.float8_e4m3fn) for key, tensor in peft.items()}
    assert run(tmp_path, files, small, {}).sources
    small[next(iter(small))] = torch.full_like(next(iter(peft.values())), torch.nan).to(torch.float8_e4m3fn)
    with pytest.raises(ModelError, match="1 with values that are not finite"):
        run(tmp_path, files, small, {})
