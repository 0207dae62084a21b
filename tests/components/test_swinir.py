"""The coarse restorer: published size, windows, tiles, training, import and export of DiffBIR's files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from components.images import decode_parts, encode_png, read_png_text
from components.models import ModelCard, ModelError, load_model, save_model
from components.randomness import Noise, generator
from components.recipes import RecipeError
from components.restoring import Identity, Picture, parse_ask, restore_batch
from components.systems import SYSTEMS
from components.systems import build_restorer as build_any
from components.systems.recipes import load_recipe
from components.systems.swinir.config import SwinIRConfig
from components.systems.swinir.network import (
    MASKED,
    SwinIR,
    build_swinir,
    drop_path,
    grid_of,
    relative_positions,
    shift_mask,
    windows_of,
)
from components.systems.swinir.objective import SwinIRObjective, build_objective, look, measure
from components.systems.swinir.options import check_options
from components.systems.swinir.recipe import SwinIRRecipe
from components.systems.swinir.released import check_sizes, find_files
from components.systems.swinir.restorer import SwinIRRestorer, restore_image
from components.systems.swinir.weights import (
    expected_layout,
    export_weights,
    import_weights,
    network_of,
    parameters_of,
    read_swinir,
)
from components.systems.weights_io import ImportJob
from components.tensor_files import WeightsFileError
from components.training import build_optimizers, evaluate_loss, train_step
from components.types import Batch, Cancellation, Request, SampleError

TINY: dict[str, Any] = {
    "img_size": 8,
    "embed_dim": 12,
    "depths": [2, 3],
    "num_heads": [2, 3],
    "window_size": 4,
    "sf": 4,
    "unshuffle_scale": 4,
    "features": 16,
}


@pytest.fixture
def network() -> SwinIR:
    return build_swinir(SwinIRConfig(**TINY), seed=3).eval()


def picture(height: int, width: int, name: str = "x") -> np.ndarray:
    """Smooth uint8 [H, W, 3]."""
    coarse = generator(2, name).uniform(0, 1, (1, 3, 5, 5)).astype(np.float32)
    smooth = torch.nn.functional.interpolate(torch.from_numpy(coarse), (height, width), mode="bicubic").clamp(0, 1)
    return (smooth[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)


def batch(size: int = 4, first: int = 0, side: int = 32) -> Batch:
    """Smooth pictures, and the same with noise."""
    hq = torch.stack([torch.from_numpy(picture(side, side, f"p{first + i}")) for i in range(size)])
    hq = hq.permute(0, 3, 1, 2).float() / 127.5 - 1
    noise = torch.from_numpy(generator(4, first).standard_normal(tuple(hq.shape), dtype=np.float32))
    return Batch(
        keys=[f"p{first + i}" for i in range(size)],
        positions=np.arange(first, first + size),
        hq=hq,
        lq=(hq + 0.3 * noise).clamp(-1, 1),
        prompts=[""] * size,
        sizes=torch.zeros(size, 6, dtype=torch.int64),
    )


# -------------------------------------------------------------------------------------------------------- the network


def test_the_published_size() -> None:
    """instarevive.md section 8: parameters, elements of the tables, entries of the file."""
    with torch.device("meta"):
        network = SwinIR()
    assert sum(p.numel() for p in network.parameters()) == 15_792_587
    assert sum(b.numel() for b in network.buffers()) == 6_488_064
    state = network.state_dict()
    assert len(state) == 732
    assert {k: tuple(v.shape) for k, v in state.items()} == expected_layout()["general_swinir_v1.ckpt"]
    masks = [k for k in state if k.endswith("attn_mask")]
    assert len(masks) == 24 and all(int(k.split(".")[4]) % 2 for k in masks)


def test_windows_and_grids_are_inverse() -> None:
    grid = torch.arange(2 * 8 * 12 * 3).view(2, 8, 12, 3)
    tiles = windows_of(grid, 4)
    assert tiles.shape == (2, 6, 16, 3)
    assert torch.equal(tiles[1, 4].view(4, 4, 3), grid[1, 4:8, 4:8])
    assert torch.equal(grid_of(tiles, 4, 8, 12), grid)


def test_relative_positions_have_one_index_for_each_offset() -> None:
    table = relative_positions(3)
    offsets = {}
    for a in range(9):
        for b in range(9):
            offset = (a // 3 - b // 3, a % 3 - b % 3)
            assert offsets.setdefault(offset, int(table[a, b])) == int(table[a, b])
    assert sorted(offsets.values()) == list(range(25))


@pytest.mark.parametrize(("height", "width"), [(8, 8), (12, 8), (12, 20)])
def test_a_shifted_window_sees_its_true_neighbours_only(height: int, width: int) -> None:
    """Two places attend to each other if and only if they are less than a window apart in the picture."""
    window, shift = 4, 2
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    shifted = torch.stack([rows, columns], -1).roll((-shift, -shift), (0, 1))[None]
    places = windows_of(shifted, window)[0]
    near = ((places[:, :, None] - places[:, None]).abs() < window).all(-1)
    mask = shift_mask(height, width, window, shift)
    assert torch.equal(mask == 0, near) and set(mask.unique().tolist()) <= {0.0, MASKED}


def test_pixels_beyond_the_networks_reach_have_no_effect(network: SwinIR) -> None:
    """Five blocks of window 4, half of them shifted, reach at most 5 windows: 80 px at scale 4, plus convolutions."""
    image = torch.rand(1, 3, 32, 320, generator=torch.Generator().manual_seed(0))
    changed = image.clone()
    changed[..., :16] = 0
    with torch.no_grad():
        difference = (network(image) - network(changed)).abs().amax((0, 1, 2))
    assert float(difference[:16].max()) > 1e-3
    assert float(difference[-64:].max()) < 1e-6


def test_invalid_sizes_are_refused() -> None:
    for wrong, reason in (
        ({"embed_dim": 10}, "3 heads"),
        ({"depths": [2]}, "each group"),
        ({"sf": 3}, "2, 4 or 8"),
        ({"window_size": 0}, "positive"),
        ({"upsampler": "pixelshuffle"}, "pixelshuffle"),
        ({"unshuffle": False}, "unshuffle true"),
    ):
        with pytest.raises(ValueError, match=reason):
            SwinIRConfig(**{**TINY, **wrong})
    with pytest.raises(ValueError, match="multiples of 16"):
        SwinIR(SwinIRConfig(**TINY))(torch.zeros(1, 3, 24, 32))


def test_the_start_depends_on_the_seed_only() -> None:
    a, b, c = (build_swinir(SwinIRConfig(**TINY), seed) for seed in (1, 1, 2))
    assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())
    assert not torch.equal(a.conv_last.weight, c.conv_last.weight)


@torch.no_grad()
def test_checkpointing_and_the_thin_convolution_work(network: SwinIR) -> None:
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    thin = build_swinir(SwinIRConfig(**TINY, resi_connection="3conv"))
    assert thin(image).shape == image.shape
    assert {"layers.0.conv.0.weight", "conv_after_body.4.bias"} <= set(thin.state_dict())
    gradients = []
    for checkpointing in (False, True):
        network.gradient_checkpointing = checkpointing
        with torch.enable_grad():
            factors = drop_path(0.5, network.depth, lambda name: torch.full((1,), 0.3))
            (gradient,) = torch.autograd.grad(network(image, factors).square().sum(), network.layers[1].conv.weight)
        gradients.append(gradient)
    torch.testing.assert_close(gradients[0], gradients[1])


def test_drop_path_rises_from_the_first_block_and_keeps_the_mean() -> None:
    noise = Noise(0, np.arange(4000))
    factors = drop_path(0.4, 3, noise.uniform)
    assert factors is not None and factors.shape == (3, 2, 4000)
    assert [float((factors[i] == 0).float().mean()) for i in range(3)] == pytest.approx([0.0, 0.2, 0.4], abs=0.02)
    assert [float(factors[i].mean()) for i in range(3)] == pytest.approx([1, 1, 1], abs=0.04)
    assert not torch.equal(factors[2, 0], factors[2, 1])
    assert drop_path(0.0, 3, noise.uniform) is None
    with pytest.raises(ValueError, match="drop_path"):
        drop_path(1.0, 3, noise.uniform)


@torch.no_grad()
def test_a_dropped_branch_adds_nothing(network: SwinIR) -> None:
    """With every branch dropped, blocks are the identity, and groups are their convolutions alone."""
    image = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    factors = torch.ones(network.depth, 2, 2)
    torch.testing.assert_close(network(image, factors), network(image), atol=1e-6, rtol=0)
    factors[:, :, 1] = 0
    result = network(image, factors)
    torch.testing.assert_close(result[:1], network(image[:1]), atol=1e-6, rtol=0)
    for group in network.layers:
        for block in group.residual_group.blocks:
            block.attn.proj.weight.zero_()
            block.attn.proj.bias.zero_()
            block.mlp.fc2.weight.zero_()
            block.mlp.fc2.bias.zero_()
    torch.testing.assert_close(result[1:], network(image[1:]), atol=1e-6, rtol=0)


# ----------------------------------------------------------------------------------------------------------- training


def test_the_loss_is_the_sum_of_squares_in_unit_range(network: SwinIR) -> None:
    rows = batch()
    objective = SwinIRObjective(network, drop_rate=0.5)
    with torch.no_grad():  # held-out: no branch is dropped
        ((name, loss),) = objective.phases(rows, Noise(0, rows.positions))
        expected = (network((rows.lq + 1) / 2) - (rows.hq + 1) / 2).square().sum()
    assert name == "swinir"
    torch.testing.assert_close(loss.value, expected)
    torch.testing.assert_close(loss.metrics["loss"], expected / rows.hq.numel())
    ((_, loss_with_drops),) = objective.phases(rows, Noise(0, rows.positions))
    ((_, again),) = objective.phases(rows, Noise(0, rows.positions))
    ((_, other),) = objective.phases(rows, Noise(1, rows.positions))
    values = [float(loss.value.detach()) for loss in (loss_with_drops, again, other)]
    assert values[0] == values[1] != values[2]


def test_training_lowers_the_held_out_loss_and_beats_the_input() -> None:
    recipe = load_recipe(
        "swinir-nano", [f"size={json.dumps({**TINY, 'embed_dim': 24}).replace(' ', '')}", "drop_path=0.1"]
    )
    assert isinstance(recipe, SwinIRRecipe)
    objective = build_objective(recipe, {})
    heldout = [batch(8, first=100)]
    optimizers = build_optimizers(objective, recipe.optimizer)
    before = evaluate_loss(objective, heldout, 0)["swinir"]
    for step in range(60):
        rows = batch(8, first=8 * step % 64)
        metrics = train_step(
            objective, [(rows, Noise(0, rows.positions + 8 * step))], optimizers, lr=2e-3, clip_norm=1e9
        )
    after = evaluate_loss(objective, heldout, 0)["swinir"]
    assert after < 0.3 * before and metrics["bad_steps"] == 0
    psnrs = measure(objective, heldout)
    assert psnrs["psnr_heldout"] > psnrs["psnr_heldout_lq"] + 1
    with torch.no_grad():
        preview = look(objective, recipe, heldout[0].lq, [""] * 8, 0)
    assert preview.shape == heldout[0].lq.shape
    assert float((preview - heldout[0].hq).square().mean()) < float((heldout[0].lq - heldout[0].hq).square().mean())


def test_a_warm_start_has_the_models_weights(network: SwinIR, tmp_path: Path) -> None:
    model = save_model(
        tmp_path / "m",
        ModelCard(name="m", system="swinir", config=network.config.to_dict()),
        {"swinir": parameters_of(network)},
    )
    recipe = load_recipe("swinir-nano", [f"warm_start={model.path}"])
    objective = build_objective(recipe, {})  # type: ignore[arg-type]
    assert all(torch.equal(v, network.state_dict()[k]) for k, v in objective.network.state_dict().items())


def test_recipes_have_the_numbers_of_diffbir() -> None:
    for name, source, preset in (
        ("swinir", "imagenet", "instarevive-bsr"),
        ("swinir-face", "ffhq", "instarevive-bfr"),
    ):
        recipe = load_recipe(name)
        assert isinstance(recipe, SwinIRRecipe)
        assert (recipe.steps, recipe.batch_size, recipe.resolution, recipe.optimizer.lr) == (150_000, 96, 512, 1e-4)
        assert (recipe.optimizer.weight_decay, recipe.drop_path, recipe.precision) == (0.0, 0.1, "fp32")
        assert (set(recipe.sources), recipe.degradation.preset) == ({source}, preset)
        assert SwinIRConfig(**check_sizes(recipe.size)) == SwinIRConfig()
    with pytest.raises(RecipeError, match="drop_path"):
        load_recipe("swinir", ["drop_path=1"])
    with pytest.raises(RecipeError, match="embed_dim"):
        load_recipe("swinir", ["size.embed_dimm=4"])


# ---------------------------------------------------------------------------------------------------------- restoring


@torch.no_grad()
def test_a_small_picture_goes_through_whole(network: SwinIR) -> None:
    image = picture(30, 45)
    restored = restore_image(network, image)
    assert restored.shape == image.shape and restored.dtype == np.uint8
    padded = np.pad(image, ((0, 2), (0, 3), (0, 0)), mode="reflect")
    whole = network(torch.from_numpy(padded).permute(2, 0, 1)[None].float() / 255)[0, :, :30, :45]
    expected = (whole.clamp(0, 1) * 255).round().permute(1, 2, 0).numpy()
    assert np.abs(restored.astype(int) - expected).max() <= 1


@torch.no_grad()
def test_tiles_agree_with_the_whole_inside_and_leave_no_seam() -> None:
    """A network with a reach well below the overlap gives the same picture in tiles and as a whole."""
    network = build_swinir(SwinIRConfig(**{**TINY, "depths": [1], "num_heads": [2]}), seed=1)
    image = picture(200, 260)
    whole = restore_image(network, image, tile_px=512)
    tiled = restore_image(network, image, tile_px=128, overlap=0.5)
    assert np.abs(whole.astype(int) - tiled.astype(int)).max() <= 1
    # tiles of every size cover all pixels
    for tile in (16, 48, 100):
        assert restore_image(network, image[:50, :70], tile_px=tile).shape == (50, 70, 3)


def test_the_restorer_answers_requests(network: SwinIR) -> None:
    restorer, image, steps = SwinIRRestorer(network, {"min_side_px": 0}), picture(20, 31), []
    requests = [
        Request(key="a", image=image, seed=1),
        Request(key="b", image=image, seed=2, size=(40, 62), options={"tile_px": 32}),
    ]
    a, b = restorer.restore(requests, on_step=lambda event: steps.append((event.step, event.of)))
    assert (a.key, a.image.shape, b.key, b.image.shape) == ("a", (20, 31, 3), "b", (40, 62, 3))
    assert steps == [(1, 2), (2, 2)] and b.info["tile_px"] == "32" and a.info["system"] == "swinir"
    assert np.array_equal(restorer.restore([requests[0]])[0].image, a.image)
    # enlarged for the network, and resized back
    larger = restorer.restore([Request(key="c", image=image, options={"min_side_px": 64})])[0]
    assert larger.image.shape == image.shape and not np.array_equal(larger.image, a.image)
    with pytest.raises(SampleError, match="bad_image"):
        restorer.restore([Request(key="d", image=image[..., 0])])
    with pytest.raises(SampleError, match="bad_size"):
        restorer.restore([Request(key="e", image=image, size=(0, 3))])
    with pytest.raises(ValueError, match='Did you mean "tile_px"'):
        restorer.restore([Request(key="f", image=image, options={"tile_pxx": 3})])
    with pytest.raises(Cancellation):
        restorer.restore(requests, cancelled=lambda: True)
    assert check_options({"tile_px": 64.0}) == {"tile_px": 64}
    for wrong in ({"tile_px": 0}, {"tile_overlap": 1.0}, {"min_side_px": -1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            check_options(wrong)
    with pytest.raises(ValueError, match="must be equal"):
        SwinIRRestorer(SwinIR(SwinIRConfig(**{**TINY, "sf": 2})))


def test_a_batch_of_bytes_becomes_pngs(network: SwinIR) -> None:
    """The function of `restoray restore` and the service: another size, transparency kept, a broken input refused."""
    image = np.dstack([picture(20, 24), np.full((20, 24), 128, np.uint8)])
    pictures = [Picture(key="a", data=encode_png(image), seed=1), Picture(key="b", data=b"no picture", seed=1)]
    identity = Identity(name="m", system="swinir", recipe="swinir-nano", digest="0")
    ask = parse_ask({"scale": 2, "tile_px": 32}, check_options)
    png, error = restore_batch(SwinIRRestorer(network, {"min_side_px": 0}), identity, pictures, ask)
    assert isinstance(png, bytes) and isinstance(error, SampleError)
    parts = decode_parts(png)
    assert parts.image.shape == (40, 48, 3) and parts.alpha is not None and int(parts.alpha.mean()) == 128
    assert read_png_text(png)["system"] == "swinir"


# ---------------------------------------------------------------------------------------------------- published weights


def file_content(network: SwinIR, form: str) -> dict[str, Any]:
    state = {k: v.clone() for k, v in network.state_dict().items()}
    bare = {k: v.clone() for k, v in parameters_of(network).items()}
    return {
        "flat": state,
        "bare": bare,
        "wrapped": {"state_dict": {f"module.{k}": v for k, v in state.items()}, "global_step": 150_000},
        "prefixed": {f"module.{k}": v for k, v in bare.items()},
        # a whole DiffBIR holds its SwinIR under this name
        "part": {**{f"preprocess_model.{k}": v for k, v in state.items()}, "model.diffusion_model.x": torch.ones(3)},
    }[form]


@pytest.mark.parametrize("form", ["flat", "bare", "wrapped", "prefixed", "part"])
def test_released_files_are_imported_and_exported(network: SwinIR, form: str, tmp_path: Path) -> None:
    path = tmp_path / "general_swinir_v1.ckpt"
    torch.save(file_content(network, form), path)
    assert find_files(tmp_path) == [path]
    sizes = {"img_size": 8} if form in ("bare", "prefixed") else {}  # it follows from the tables only
    result = import_weights(ImportJob(files=[path], out=tmp_path / "model", sizes=sizes))
    assert result.sources[0].parameters == sum(p.numel() for p in network.parameters())
    model = load_model(tmp_path / "model")
    assert SwinIRConfig(**model.info["config"]) == network.config and model.info["prior"] is None
    image = torch.rand(1, 3, 48, 32, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        assert torch.equal(network_of(model)(image), network(image))
        assert torch.equal(read_swinir(path, sizes)(image), network(image))
    for kind, name in (("pt", "general_swinir_v1.ckpt"), ("safetensors", "general_swinir_v1.safetensors")):
        out = tmp_path / kind
        report = export_weights(model.path, out, form=kind)
        assert list(report.files) == [name] and report.parameters == result.sources[0].parameters
        again = import_weights(
            ImportJob(files=[out / name], out=tmp_path / f"again-{kind}")
        )  # the sidecar holds the size
        assert load_model(str(again.model)).info["parts"]["swinir"] == model.info["parts"]["swinir"]
    faces = tmp_path / "face_swinir_v1.ckpt"
    path.rename(faces)
    import_weights(ImportJob(files=[faces], out=tmp_path / "faces", sizes=sizes))
    assert list(export_weights(tmp_path / "faces", tmp_path / "out").files) == ["face_swinir_v1.ckpt"]
    file_tensors = torch.load(tmp_path / "pt" / "general_swinir_v1.ckpt", weights_only=True)
    assert {k: (v.shape, v.dtype) for k, v in file_tensors.items()} == {
        k: (v.shape, v.dtype) for k, v in network.state_dict().items()
    }
    assert all(torch.equal(v, file_tensors[k]) for k, v in network.state_dict().items())
    assert isinstance(build_any(model.path), SwinIRRestorer)


def test_a_network_of_one_window_is_read_back(tmp_path: Path) -> None:
    network = build_swinir(SwinIRConfig(**{**TINY, "img_size": 4})).eval()
    assert not [k for k in network.state_dict() if k.endswith("attn_mask")] and network.config.shift == 0
    torch.save(network.state_dict(), tmp_path / "x.ckpt")
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        assert torch.equal(read_swinir(tmp_path / "x.ckpt")(image), network(image))


@pytest.mark.parametrize(
    ("change", "error", "reason"),
    [
        (lambda t: t.pop("norm.weight"), ModelError, "1 missing: norm.weight"),
        (lambda t: t.update(extra=torch.zeros(1)), ModelError, "1 unexpected: extra"),
        (lambda t: t.update({"norm.weight": torch.zeros(7)}), ModelError, r"norm.weight: \(7,\) instead of \(12,\)"),
        (lambda t: t["layers.0.residual_group.blocks.1.attn_mask"].zero_(), ModelError, "attn_mask: not the tables of"),
        (lambda t: t["conv_hr.bias"].fill_(float("nan")), ModelError, "conv_hr.bias"),
        (lambda t: t.pop("conv_first.1.weight"), WeightsFileError, "not a SwinIR with"),
        (lambda t: t.pop("layers.1.residual_group.blocks.1.mlp.fc1.bias"), ModelError, "blocks.1.mlp.fc1.bias"),
    ],
)
def test_every_fault_of_a_file_is_named(
    network: SwinIR, change: Callable[[dict[str, Tensor]], Any], error: type[Exception], reason: str, tmp_path: Path
) -> None:
    tensors = file_content(network, "flat")
    change(tensors)
    path = tmp_path / "x.safetensors"
    save_file(tensors, path)
    with pytest.raises(error, match=reason):
        import_weights(ImportJob(files=[path], out=tmp_path / "model"))
    assert not (tmp_path / "model").exists()


def test_wrong_arguments_of_import_and_export_are_refused(network: SwinIR, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file(file_content(network, "flat"), path)
    with pytest.raises(ValueError, match="no prior"):
        import_weights(ImportJob(files=[path], prior="nano"))
    with pytest.raises(ValueError, match="one file"):
        import_weights(ImportJob(files=[path, path]))
    with pytest.raises(ValueError, match='Did you mean "embed_dim"'):
        check_sizes({"embed_dims": 3})
    with pytest.raises(ValueError, match="whole numbers"):
        check_sizes({"depths": ["a"]})
    with pytest.raises(ModelError, match="12 of the wrong shape"):
        import_weights(ImportJob(files=[path], sizes={"window_size": 2}))
    assert import_weights(ImportJob(files=[path])).model is None  # checked, nothing written
    with pytest.raises(ModelError, match="not a SwinIR"):
        export_weights("nano", tmp_path / "out")
    for name in ("general_swinir_v1.ckpt", "face_swinir_v1.ckpt"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ValueError, match="name the files one by one"):
        find_files(tmp_path)
    with pytest.raises(WeightsFileError, match="not a weights file"):
        import_weights(ImportJob(files=[tmp_path / "face_swinir_v1.ckpt"]))


def test_the_system_is_registered() -> None:
    system = SYSTEMS["swinir"]
    networks = system.networks()
    assert system.weights is not None and networks.build_restorer is not None and networks.look is not None
    assert system.weights.code().layout()["general_swinir_v1.ckpt"]["conv_last.bias"] == (3,)


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (3, 5), (7, 5)])
@torch.no_grad()
def test_any_shape_from_one_pixel_is_restored(network: SwinIR, size: tuple[int, int]) -> None:
    """With the recipe's min_side_px too, which would make 38 million pixels of 1 x 300."""
    for options in ({"min_side_px": 0}, {"min_side_px": 48, "tile_px": 256}):
        restored = SwinIRRestorer(network, options).restore([Request(key="k", image=picture(*size))])[0]
        assert restored.image.shape == (*size, 3)
