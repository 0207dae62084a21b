"""Import and export of InstaRevive's released layout: equal to the byte, and messages for every fault."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
from safetensors.torch import load_file
from torch import Tensor

from components.models import ModelCard, ModelError, load_model, save_model
from components.randomness import seeded_init
from components.systems.instarevive.backbone import open_backbone
from components.systems.instarevive.build import generator_config, generator_parts, load_generator
from components.systems.instarevive.network import OneStep, OneStepGenerator
from components.systems.instarevive.released import RELEASED, check_sizes, find_files
from components.systems.instarevive.weights import expected_layout, export_weights, import_weights
from components.systems.swinir.config import SwinIRConfig
from components.systems.swinir.network import build_swinir
from components.systems.weights_io import ImportJob

SIZES = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 2,
    "cross_attention_dim": 16,
    "caption_channels": 12,
    "sample_size": 8,
}
TINY = {"network": SIZES}


def released_tensors(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A DiT's state dict from diffusers, as the authors save it."""
    with seeded_init(0, "released"):
        network = PixArtTransformer2DModel(**SIZES, norm_type="ada_norm_single", attention_bias=True)
    return {key: value.to(dtype) for key, value in network.state_dict().items()}


def save_checkpoint(folder: Path, tensors: dict[str, Any], name: str = "InstaRevive_v1.ckpt") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(tensors, folder / name)
    return folder / name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_round_trip_is_equal_to_the_byte(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = released_tensors(dtype)
    path = save_checkpoint(tmp_path / "in", tensors)
    report = import_weights(ImportJob(files=find_files(tmp_path / "in"), out=tmp_path / "model", sizes=TINY))
    assert report.sources[0].part == "generator" and report.sources[0].tensors == len(tensors)
    for form in ("pt", "safetensors"):
        out = export_weights(tmp_path / "model", tmp_path / form, form=form)
        (name,) = out.files
        tensors_again = torch.load(tmp_path / form / name) if form == "pt" else load_file(tmp_path / form / name)
        assert set(tensors_again) == set(tensors)
        if form == "pt":
            assert list(tensors_again) == list(tensors)  # the released order
        assert all(
            torch.equal(tensors_again[key], value) and tensors_again[key].dtype == dtype
            for key, value in tensors.items()
        )
        # the sidecar replaces the sizes
        again = import_weights(ImportJob(files=find_files(tmp_path / form), out=tmp_path / f"{form}-model"))
        assert load_model(str(again.model)).info["config"] == load_model(str(report.model)).info["config"]
    same = export_weights(tmp_path / "pt-model", tmp_path / "again")
    assert same.files == export_weights(tmp_path / "model", tmp_path / "pt").files
    assert path.is_file()


def test_an_imported_model_computes_the_same_as_the_network(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, {"state_dict": {f"module.{k}": v for k, v in released_tensors().items()}, "epoch": 3})
    report = import_weights(
        ImportJob(files=find_files(tmp_path), out=tmp_path / "model", sizes={**TINY, "mask_as_bias": True})
    )
    generator = load_generator(load_model(str(report.model)))
    assert generator.timestep == 400 and generator.predictor.mask_as_bias
    with seeded_init(0, "released"):
        network = PixArtTransformer2DModel(**SIZES, norm_type="ada_norm_single", attention_bias=True).eval()
    latents, text = torch.ones(1, 4, 8, 8), torch.ones(1, 5, 12)
    with torch.no_grad():
        expected = network(latents, text, torch.tensor([400])).sample
        result = generator.predictor.network(latents, text, torch.tensor([400])).sample
    assert torch.equal(result, expected)


def test_a_generator_under_another_name_is_read_and_two_are_refused(tmp_path: Path) -> None:
    tensors = released_tensors()
    path = save_checkpoint(tmp_path, {"our_generator": tensors, "critic": {"x.weight": torch.ones(2)}})
    report = import_weights(ImportJob(files=[path], sizes=TINY))
    assert report.sources[0].tensors == len(tensors)
    assert "InstaRevive_v1.ckpt: our_generator was read; left out: critic.x.weight" in report.notes
    path = save_checkpoint(tmp_path, {"first": tensors, "second": tensors})
    with pytest.raises(ModelError, match="several such networks, first and second"):
        import_weights(ImportJob(files=[path], sizes=TINY))


def test_the_published_layout_has_the_parameters_of_the_reference() -> None:
    (name, shapes), *others = expected_layout().items()
    assert name == "InstaRevive_v1.ckpt" and not others
    assert sum(torch.Size(s).numel() for s in shapes.values()) == 610_856_096
    assert shapes["transformer_blocks.27.attn2.to_out.0.bias"] == (1152,)
    assert shapes["caption_projection.linear_1.weight"] == (1152, 4096)
    sd = expected_layout(sizes={"family": "sd"})[name]
    assert sum(torch.Size(s).numel() for s in sd.values()) == 865_910_724
    assert set(expected_layout(sizes={"input": "noise", "kernel": 3})) == {name, "InstaRevive_v1_align.ckpt"}


def test_every_fault_is_named(tmp_path: Path) -> None:
    tensors = released_tensors()
    del tensors["proj_out.bias"]
    tensors["extra.weight"] = torch.zeros(1)
    tensors["scale_shift_table"] = torch.zeros(3, 16)
    tensors["pos_embed.proj.bias"] = torch.full((16,), torch.nan)
    path = save_checkpoint(tmp_path, tensors)
    with pytest.raises(ModelError) as error:
        import_weights(ImportJob(files=[path], out=tmp_path / "model", sizes=TINY))
    for words in (
        "1 missing: proj_out.bias",
        "1 unexpected: extra.weight",
        "scale_shift_table is [3, 16] instead of [2, 16]",
        "not finite: pos_embed.proj.bias",
    ):
        assert words in str(error.value)
    assert not (tmp_path / "model").exists()


def test_the_message_for_another_size_names_the_sizes(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, released_tensors())
    with pytest.raises(ModelError, match=r"network.num_layers=2 .*network.caption_channels=12 .*head_dim = 16"):
        import_weights(ImportJob(files=[path]))


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "in", released_tensors())
    report = import_weights(ImportJob(files=[path], out=tmp_path / "model", sizes=TINY, proceed=lambda plan: False))
    assert report.model is None and not (tmp_path / "model").exists()
    assert any("no coarse restorer" in note for note in report.notes)


def test_a_generator_with_noise_has_two_files(tmp_path: Path) -> None:
    backbone = open_backbone("nano")
    generator = OneStepGenerator(backbone.predictor(), OneStep(input="noise"))
    card = ModelCard(
        name="n", system="instarevive", prior=backbone.source, config=generator_config(backbone, generator)
    )
    model = save_model(tmp_path / "model", card, generator_parts(generator))
    plan = export_weights(model.path, tmp_path / "out", write=False)
    assert len(plan.files) == 2 and not (tmp_path / "out").exists() and len(plan.notes) == 2
    export_weights(model.path, tmp_path / "out")
    report = import_weights(ImportJob(files=find_files(tmp_path / "out"), out=tmp_path / "back"))
    back = load_model(str(report.model))
    assert back.info["config"] == model.info["config"] and back.info["prior"] == model.info["prior"]
    for part in ("generator", "align"):
        before = model.part(part)
        assert all(torch.equal(value, before[key]) for key, value in back.part(part).items())
    with pytest.raises(ValueError, match="no file for align"):
        import_weights(ImportJob(files=[tmp_path / "out" / "InstaRevive_v1.ckpt"]))


def test_a_coarse_restorer_is_recorded(tmp_path: Path) -> None:
    config = SwinIRConfig(img_size=8, embed_dim=12, depths=[1], num_heads=[2], window_size=4)
    network = build_swinir(config)
    card = ModelCard(name="coarse", system="swinir", config=config.to_dict())
    coarse = save_model(tmp_path / "coarse", card, {"swinir": dict(network.named_parameters())})
    path = save_checkpoint(tmp_path / "in", released_tensors())
    report = import_weights(ImportJob(files=[path], out=tmp_path / "model", sizes={**TINY, "coarse": str(coarse.path)}))
    entry = load_model(str(report.model)).info["config"]["coarse"]
    assert entry == {"id": str(coarse.path.resolve()), "digest": coarse.digest}
    with pytest.raises(ModelError, match="not a coarse restorer"):
        import_weights(ImportJob(files=[path], sizes={**TINY, "coarse": "nano"}))


def test_a_prediction_of_another_kind_of_prior_is_refused_before_anything_is_read() -> None:
    with pytest.raises(ValueError, match="flow_prediction does not fit Schedule"):
        expected_layout(sizes={"prediction": "flow_prediction"})


def test_a_published_priors_latents_have_a_fixed_number_of_channels() -> None:
    for family, channels in (("pixart", 4), ("sdxl", 4), ("sd3", 16)):
        assert expected_layout(sizes={"family": family, "network": {"in_channels": channels}})
        with pytest.raises(ValueError, match=f"have {channels} channels, and the network takes 12"):
            expected_layout(sizes={"family": family, "network": {"in_channels": 12}})


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"famly": "sd"}, 'Did you mean "family"'),
        ({"network": {"num_layer": 2}}, 'Did you mean "network.num_layers"'),
        ({"network": {"num_layers": 0}}, "positive whole number"),
        ({"network": {"block_out_channels": [8, "x"]}}, "list of positive whole numbers"),
        ({"network": {"up_block_types": "x"}}, "list of block names"),
        ({"family": "dit"}, "nano, pixart, sd, sd3, sdxl"),
        ({"coarse": 3}, "must name a model folder"),
        ({"network": 3}, "unknown option"),
    ],
)
def test_wrong_sizes_are_refused(sizes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_sizes(sizes)


def test_files_are_found_by_part(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        find_files(tmp_path / "none")
    with pytest.raises(ValueError, match="holds no weights of InstaRevive"):
        find_files(tmp_path)
    align = tmp_path / RELEASED["align"]
    align.write_bytes(b"")
    with pytest.raises(ValueError, match="holds no generator"):
        find_files(tmp_path)
    align.unlink()
    path = save_checkpoint(tmp_path, released_tensors())
    assert find_files(tmp_path) == [path] == find_files(path)
    save_checkpoint(tmp_path, {}, "InstaRevive_v1.safetensors")
    with pytest.raises(ValueError, match="name the files one by one"):
        find_files(tmp_path)
    with pytest.raises(ValueError, match="both hold the generator"):
        import_weights(ImportJob(files=[path, path], sizes=TINY))
    with pytest.raises(ValueError, match="no picture encoder"):
        import_weights(ImportJob(files=[path], image_encoder="x"))
