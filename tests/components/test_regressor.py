"""Community restorers: import, sizes and factors, tiles, gray networks, refusals, export."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image as Pillow
from safetensors.torch import save_file
from tiny_regressors import TINY, detecting_keys, tiny_state, write_tiny
from torch import Tensor, nn

from components.images import decode_parts, encode_png, read_png_text
from components.models import Model, ModelCard, ModelError, load_model, save_model
from components.randomness import generator
from components.restoring import Identity, Picture, parse_ask, restore_batch
from components.synthetic import dead_leaves
from components.systems import SYSTEMS, build_restorer
from components.systems.regressor.config import RegressorConfig
from components.systems.regressor.network import (
    REFUSED,
    Regressor,
    SameSize,
    luma_of,
    network_of,
    open_regressor,
    supported,
)
from components.systems.regressor.options import Options, check_options
from components.systems.regressor.reach import measure_reach
from components.systems.regressor.released import find_files
from components.systems.regressor.restorer import RegressorRestorer, network_input
from components.systems.regressor.tiles import restore_with_context, tile_sides
from components.systems.regressor.weights import export_weights, import_weights
from components.systems.weights_io import ImportJob
from components.tensor_files import WeightsFileError
from components.types import Cancellation, Request

FACTORS = {"Compact": 4, "ESRGAN": 4, "DnCNN": 1, "NAFNet": 1}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    """A model folder of each tiny architecture, imported from a pickle."""
    folder = tmp_path_factory.mktemp("regressors")
    for name in TINY:
        import_weights(
            ImportJob(files=[write_tiny(name, folder / "files")], out=folder / name, licence="MIT", origin="a test")
        )
    return {name: load_model(folder / name) for name in TINY}


def picture(height: int, width: int, seed: int = 1) -> np.ndarray:
    return np.ascontiguousarray(dead_leaves(max(height, width, 16), seed, 0)[:height, :width])


def restore(model: Model, image: np.ndarray, size: tuple[int, int] | None = None, **options: Any) -> np.ndarray:
    (restored,) = build_restorer(model.path).restore([Request(key="k", image=image, size=size, options=options)])
    return restored.image


# ------------------------------------------------------------------------------------------------------------- import


@pytest.mark.parametrize("name", sorted(TINY))
def test_an_architecture_is_detected_and_recorded(models: dict[str, Model], name: str) -> None:
    info = models[name].info
    config = RegressorConfig(**info["config"])
    assert (config.architecture, config.factor) == (name, FACTORS.get(name, 2))
    assert config.colours == (1 if name == "DnCNN" else 3)
    assert (info["system"], info["licence"], info["origin"]) == ("regressor", "MIT", "a test")
    assert models[name].part("network").keys() == tiny_state(name).keys()
    assert config.tiles_are_exact == (name != "OmniSR")


def test_half_a_file_and_its_prefixes_are_read(tmp_path: Path) -> None:
    """spandrel's own keys of ESRGAN all begin with "model.", which the reader takes for a wrapper."""
    network = TINY["ESRGAN"]()
    assert all(key.startswith("model.") for key in network.state_dict())
    tensors = {f"module.{key}": tensor.half() for key, tensor in network.state_dict().items()}
    path = tmp_path / "x.safetensors"
    save_file(tensors, path, metadata={"modelspec.license": "CC0-1.0", "author": "somebody\nelse"})
    result = import_weights(ImportJob(files=[path], out=tmp_path / "m"))
    assert (result.licence, result.origin) == ("CC0-1.0", "somebody else")
    assert result.permitted_use == "as the licence allows"
    model = load_model(tmp_path / "m")
    assert model.part("network").keys() == network.state_dict().keys()
    assert model.info["config"]["architecture"] == "ESRGAN"


class Bomb:
    """A pickle that runs a command when it is opened in full."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def test_a_hostile_pickle_is_refused_and_does_not_run(tmp_path: Path) -> None:
    path, mark = tmp_path / "x.pth", tmp_path / "ran"
    torch.save({"params": tiny_state("Compact"), "extra": Bomb(mark)}, path)
    with pytest.raises(WeightsFileError, match=r"refused.*could run any code"):
        import_weights(ImportJob(files=[path], out=tmp_path / "m"))
    assert not mark.exists() and not (tmp_path / "m").exists()


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_models_with_masks_faces_or_own_noise_are_refused_by_name(name: str) -> None:
    with pytest.raises(ModelError, match=f"{name} .*not supported"):
        open_regressor(detecting_keys(name), "x.pth")


def test_an_unknown_architecture_gets_the_list() -> None:
    with pytest.raises(ModelError, match=r"has such keys \(a.b\)\. Supported: ATD, .*SwinIR") as error:
        open_regressor({"a.b": torch.zeros(1)}, "x.pth")
    assert not [name for name in REFUSED if name in str(error.value)]
    assert len(supported()) >= 30


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: t.pop("body.4.bias"), r'looks like a Compact.*Missing key\(s\) in state_dict: "body\.4\.bias"'),
        (lambda t: t.update({"body.4.extra": torch.zeros(1)}), r'Unexpected key\(s\) in state_dict: "body\.4\.extra"'),
        (lambda t: t.update({"body.2.weight": torch.zeros(8, 7, 3, 3)}), r"size mismatch for body\.2\.weight"),
        (lambda t: t.update({"body.99999999999.weight": torch.zeros(1)}), "no network has so many layers"),
        (lambda t: t["body.2.bias"].fill_(float("nan")), "1 with values that are not finite: body.2.bias"),
        (lambda t: t.update({"body.0.weight": torch.zeros(8, 5, 3, 3)}), "5 channels into"),
    ],
)
def test_every_fault_of_a_file_is_named(change: Any, reason: str, tmp_path: Path) -> None:
    tensors = tiny_state("Compact")
    change(tensors)
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match=reason):
        import_weights(ImportJob(files=[tmp_path / "x.safetensors"], out=tmp_path / "m"))
    assert not (tmp_path / "m").exists()


def test_wrong_arguments_are_refused(models: dict[str, Model], tmp_path: Path) -> None:
    path = write_tiny("Compact", tmp_path)
    weights = SYSTEMS["regressor"].weights
    assert weights is not None and list(find_files(tmp_path)) == [path]
    assert import_weights(ImportJob(files=[path])).model is None
    with pytest.raises(ValueError, match="no prior"):
        import_weights(ImportJob(files=[path], prior="nano"))
    with pytest.raises(ValueError, match="follow from its weights"):
        weights.check_sizes({"num_feat": 64})
    with pytest.raises(ValueError, match="Supported: ATD"):
        weights.code().layout()
    write_tiny("SAFMN", tmp_path)
    with pytest.raises(ValueError, match=r"several weights files \(Compact.pth, SAFMN.pth\)"):
        find_files(tmp_path)
    other = save_model(tmp_path / "other", ModelCard(name="o", system="tiny"), {"network": {"a": torch.zeros(1)}})
    with pytest.raises(ModelError, match="not a regressor"):
        export_weights(other.path, tmp_path / "out")
    wrong = ModelCard(name="w", system="regressor", config={**models["SAFMN"].info["config"], "factor": 4})
    model = save_model(tmp_path / "w", replace(wrong, config={**wrong.config, "architecture": "HAT"}), {"network": {}})
    with pytest.raises(ModelError, match="no supported architecture"):
        network_of(model)


@pytest.mark.parametrize("form", ["pt", "safetensors"])
@pytest.mark.parametrize("name", ["ESRGAN", "HAT"])
def test_an_export_has_the_keys_of_the_file(models: dict[str, Model], name: str, form: str, tmp_path: Path) -> None:
    report = export_weights(models[name].path, tmp_path / "out", form=form)
    (file,) = report.files
    assert Path(file).stem == name
    again = import_weights(
        ImportJob(files=[tmp_path / "out" / file], out=tmp_path / "again")
    )  # licence and origin come from the sidecar
    assert (again.licence, again.origin) == ("MIT", "a test")
    assert load_model(str(again.model)).info["parts"] == models[name].info["parts"]
    assert load_model(str(again.model)).digest == models[name].digest
    if form == "pt":
        export_weights(models[name].path, tmp_path / "nested", spelling="basicsr")
        assert set(torch.load(tmp_path / "nested" / file, weights_only=True)) == {"params"}
    else:
        with pytest.raises(ValueError, match="choose form pt"):
            export_weights(models[name].path, tmp_path / "nested", spelling="basicsr", form=form)


# ---------------------------------------------------------------------------------------------------- sizes and factors


def test_the_network_gets_what_it_enlarges_to_the_result() -> None:
    image = picture(40, 60)
    assert network_input(image, (160, 240), 4) is image  # scale=keep
    assert network_input(image, (40, 60), 1) is image
    shrunk = network_input(image, (40, 60), 4)
    assert np.array_equal(shrunk, np.asarray(Pillow.fromarray(image).resize((15, 10), Pillow.Resampling.BICUBIC)))
    # 38 x 57 are no multiples: the picture goes on with its mirror image, and its pixels stay where they are
    cut = network_input(image[:38, :57], (38, 57), 4)
    mirrored = np.pad(image[:38, :57], ((0, 2), (0, 3), (0, 0)), mode="reflect")
    assert np.array_equal(cut, np.asarray(Pillow.fromarray(mirrored).resize((15, 10), Pillow.Resampling.BICUBIC)))
    assert network_input(image, (80, 120), 4).shape == (20, 30, 3)
    assert network_input(image[:1, :1], (1, 1), 4).shape == (1, 1, 3)


def test_shrinking_first_does_not_alias() -> None:
    """Stripes of one pixel become gray; every fourth pixel alone would be black or white."""
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    inner = network_input(stripes, (64, 64), 4)[:, 2:-2]
    assert inner.min() >= 120 and inner.max() <= 135


@torch.no_grad()
@pytest.mark.parametrize(("name", "size"), [("Compact", (37, 50)), ("SwinIR", (37, 50)), ("NAFNet", (37, 50))])
def test_the_default_keeps_the_size_and_scale_the_networks_own(
    models: dict[str, Model], name: str, size: tuple[int, int]
) -> None:
    model, image = models[name], picture(*size)
    network = network_of(model)
    factor = network.config.factor
    same = restore(model, image)
    assert same.shape == image.shape
    lq = torch.from_numpy(network_input(image, size, factor)).permute(2, 0, 1)[None].float() / 255
    expected = (network(lq)[0].clamp(0, 1) * 255).round().permute(1, 2, 0).numpy()[: size[0], : size[1]]
    assert np.abs(same.astype(int) - expected).max() <= 1
    larger = restore(model, image, (size[0] * factor, size[1] * factor))
    whole = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
    expected = (network(whole)[0].clamp(0, 1) * 255).round().permute(1, 2, 0).numpy()
    assert np.abs(larger.astype(int) - expected).max() <= 1
    # the same path for tensors, as training and the coarse restorer take it
    tensors = SameSize(network)(whole)
    assert tensors.shape == whole.shape
    assert float((tensors[0].clamp(0, 1).permute(1, 2, 0) * 255 - torch.from_numpy(same).float()).abs().mean()) < 1


@pytest.mark.parametrize("size", [(1, 1), (1, 70), (3, 5)])
def test_any_shape_from_one_pixel_is_restored(models: dict[str, Model], size: tuple[int, int]) -> None:
    for name in ("Compact", "HAT", "NAFNet", "DnCNN"):
        assert restore(models[name], picture(*size)).shape == (*size, 3)


@torch.no_grad()
def test_a_network_of_gray_pictures_changes_the_luma_alone(models: dict[str, Model]) -> None:
    network = network_of(models["DnCNN"])
    image = torch.rand(1, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    result = network(image)
    luma = 0.299 * image[:, :1] + 0.587 * image[:, 1:2] + 0.114 * image[:, 2:]
    torch.testing.assert_close(luma_of(image), luma)
    torch.testing.assert_close(luma_of(result), network.network(luma), atol=1e-5, rtol=0)
    torch.testing.assert_close(result - luma_of(result), image - luma, atol=1e-5, rtol=0)
    assert float((result - image).abs().max()) > 0.01


def test_keep_is_the_models_own_scale(models: dict[str, Model]) -> None:
    own = SYSTEMS["regressor"].own_scale(models["Compact"].info["config"])
    assert (own, SYSTEMS["swinir"].own_scale({"scale": 4})) == (4.0, 1.0)
    ask = parse_ask({"scale": "keep", "context_px": 16}, check_options, own_scale=own)
    assert (ask.scale, ask.output_size(10, 20)) == (4.0, (40, 80))
    assert parse_ask({"scale": "keep"}).scale == 1.0
    with pytest.raises(ValueError, match=r"a number from 0\.0625 to 16, or keep"):
        parse_ask({"scale": "kept"})
    with pytest.raises(ValueError, match="exclude each other"):
        parse_ask({"scale": "keep", "width": 4, "height": 4})


def test_a_batch_of_bytes_becomes_larger_pngs_with_alpha(models: dict[str, Model]) -> None:
    image = np.dstack([picture(20, 24), np.full((20, 24), 128, np.uint8)])
    pictures = [Picture(key="a", data=encode_png(image), seed=1)]
    pictures.append(Picture(key="b", data=encode_png(picture(16, 16)[..., 0]), seed=1))
    identity = Identity(name="m", system="regressor", recipe="m", digest="0", own_scale=4)
    ask = parse_ask({"scale": "keep"}, check_options, own_scale=4)
    png, gray = restore_batch(build_restorer(models["Compact"].path), identity, pictures, ask)
    assert isinstance(png, bytes) and isinstance(gray, bytes)
    parts, gray_parts = decode_parts(png), decode_parts(gray)
    assert parts.image.shape == (80, 96, 3) and parts.alpha is not None and int(parts.alpha.mean()) == 128
    assert gray_parts.gray and gray_parts.image.shape == (64, 64, 3)
    text = read_png_text(png)
    assert text["system"] == "regressor" and text["context_px"] == "-1" and '"scale": 4' in text["options"]


# -------------------------------------------------------------------------------------------------------------- tiles


@pytest.mark.parametrize("name", sorted(set(TINY) - {"OmniSR"}))
def test_tiles_equal_the_whole_picture(models: dict[str, Model], name: str) -> None:
    """The smallest tiles that the context allows, on a picture whose sides are no multiples of anything."""
    model, image = models[name], picture(107, 147)
    config = RegressorConfig(**model.info["config"])
    size = (107 * config.factor, 147 * config.factor)
    assert tile_sides(config, 16, config.context_px)[0] < 107
    whole, tiled = (restore(model, image, size, tile_px=tile_px) for tile_px in (4096, 16))
    assert whole.shape == (*size, 3) and np.abs(whole.astype(int) - tiled).max() <= 1
    assert whole.std() > 2  # it is a picture


def test_a_network_that_looks_at_the_whole_picture_says_so(models: dict[str, Model], tmp_path: Path) -> None:
    config = RegressorConfig(**models["OmniSR"].info["config"])
    assert config.tile_levels > 0.5 and not config.tiles_are_exact
    result = import_weights(ImportJob(files=[write_tiny("OmniSR", tmp_path)]))
    assert any(f"differ from it by up to {config.tile_levels:g} of 255 levels" in note for note in result.notes)
    image = picture(98, 147)
    size = (196, 294)
    whole, tiled = (restore(models["OmniSR"], image, size, tile_px=tile, context_px=16) for tile in (4096, 16))
    assert 1 < np.abs(whole.astype(int) - tiled).max() <= 24  # another picture than that of the import


class Cross(nn.Module):
    """The mean of a pixel and of the four that are `radius` pixels away: it looks exactly so far."""

    def __init__(self, radius: int) -> None:
        super().__init__()
        self.radius, self.weight = radius, nn.Parameter(torch.ones(1))
        self.config = RegressorConfig(architecture="cross")

    def forward(self, images: Tensor) -> Tensor:
        r, (height, width) = self.radius, images.shape[-2:]
        padded = F.pad(images, (r, r, r, r), mode="reflect")
        places = ((r, r), (0, r), (2 * r, r), (r, 0), (r, 2 * r))
        return sum(padded[..., y : y + height, x : x + width] for y, x in places) * self.weight / 5


@pytest.mark.parametrize(("radius", "context"), [(10, 16), (16, 16), (20, 32), (40, 64)])
def test_the_reach_is_measured(radius: int, context: int) -> None:
    measured, levels = measure_reach(Cross(radius))  # type: ignore[arg-type]
    assert measured == context and levels <= 0.01


@pytest.mark.parametrize("context", [20, 4])
def test_a_context_as_wide_as_the_reach_suffices(context: int) -> None:
    """With less of it the mirrored border of a tile shows."""
    network, image = Cross(20), picture(150, 220)
    config, like = network.config, network.weight
    whole = restore_with_context(network, image, config, 4096, context, like)
    small = restore_with_context(network, image, config, 1, context, like)
    assert (np.abs(whole.astype(int) - small).max() <= 1) == (context == 20)


def test_the_shares_of_tiles_sum_to_one() -> None:
    image, config = picture(150, 220), RegressorConfig(architecture="x", multiple_px=4, minimum_px=8)
    calls: list[tuple[int, ...]] = []

    def count(images: Tensor) -> Tensor:
        calls.append(tuple(images.shape))
        return images

    result = restore_with_context(count, image, config, 100, 20, torch.ones(1))
    assert np.array_equal(result, image)
    # 152 x 220 px in steps of 100 - 2 * 20 - 16 = 44: tops 0, 44, 52 and lefts 0, 44, 88, 120
    assert {shape[2:] for shape in calls} == {(100, 100)} and len(calls) == 3 * 4


def test_options_of_tiles() -> None:
    assert [Options().tile_of(factor) for factor in (1, 2, 4, 8)] == [512, 512, 256, 128]
    assert Options(tile_px=300).tile_of(4) == 300
    config = RegressorConfig(architecture="x", multiple_px=24, minimum_px=24)
    assert tile_sides(config, 100, 16) == (120, 24, 24)  # raised to 2 (24 + 24) + 24
    assert tile_sides(config, 200, 0) == (192, 0, 24)
    for wrong in ({"tile_px": -1}, {"context_px": -2}, {"context_px": 5000}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            check_options(wrong)
    with pytest.raises(ValueError, match='Did you mean "context_px"'):
        check_options({"contex_px": 3})


def test_a_cancelled_picture_stops_between_tiles(models: dict[str, Model]) -> None:
    restorer = build_restorer(models["Compact"].path)
    with pytest.raises(Cancellation):
        restorer.restore([Request(key="a", image=picture(20, 20))], cancelled=lambda: True)


# ------------------------------------------------------------------------------------------------ precision and memory


def test_half_precision_only_where_it_works(models: dict[str, Model]) -> None:
    image = picture(32, 32)
    full = restore(models["SwinIR"], image)
    restorer = build_restorer(models["SwinIR"].path, precision="bf16")
    assert isinstance(restorer, RegressorRestorer) and next(restorer.network.parameters()).dtype == torch.bfloat16
    half = restorer.restore([Request(key="a", image=image)])[0].image
    assert 0 < np.abs(full.astype(int) - half).max() <= 12
    with pytest.raises(ModelError, match="a HAT does not run in fp16, but in fp32, bf16"):
        build_restorer(models["HAT"].path, precision="fp16")


def test_the_memory_plan_follows_tile_and_precision(models: dict[str, Model]) -> None:
    plan_memory = SYSTEMS["regressor"].networks().plan_memory
    assert plan_memory is not None
    plans = {
        (precision, tile): plan_memory(models["Compact"], (1024, 2048), {"tile_px": tile}, precision)
        for precision, tile in (("fp32", 128), ("fp32", 256), ("bf16", 128))
    }
    (small,), (large,), (half,) = (plan.phases for plan in plans.values())
    assert small.weights == 4 * sum(p.numel() for p in network_of(models["Compact"]).parameters())
    assert (half.weights, half.peak) == (small.weights // 2, small.peak // 2)
    assert small.peak >= 2 * 8 * 128 * 128 * 4  # two feature maps of 8 channels
    assert large.peak == pytest.approx(4 * small.peak, rel=0.01)
    with pytest.raises(ModelError, match="fp16"):
        plan_memory(models["HAT"], (64, 64), {}, "fp16")


# ------------------------------------------------------------------------------------------------------------ batches


@torch.no_grad()
def test_a_batch_equals_its_pictures(models: dict[str, Model]) -> None:
    images = torch.from_numpy(generator(0, "b").random((2, 3, 20, 28), dtype=np.float32))
    for name in ("Compact", "HAT", "DnCNN"):
        network = network_of(models[name])
        assert isinstance(network, Regressor)
        kept = images.clone()
        both = network(images)
        assert torch.equal(images, kept)  # no network writes into its input
        torch.testing.assert_close(both, torch.cat([network(image[None]) for image in images]), atol=1e-5, rtol=0)
