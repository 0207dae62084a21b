"""Regression losses: the pyramid without weights, LPIPS against another implementation, and the files of LPIPS."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from components.models import ModelError
from components.objectives.regression import SCALE, SHIFT, VggLpips, latent_distance, load_lpips, pyramid_distance
from components.randomness import generator, seeded_init


def pictures(batch: int, side: int, name: str = "x") -> Tensor:
    return torch.from_numpy(generator(5, name).uniform(-1, 1, (batch, 3, side, side)).astype(np.float32))


@pytest.fixture(scope="module")
def network() -> VggLpips:
    with seeded_init(1, "lpips"):
        network = VggLpips()
    for tap in range(5):
        network.get_submodule(f"lin{tap}").weight.abs_()  # type: ignore[operator, union-attr]
    return network


# -------------------------------------------------------------------------------------------------------- the pyramid


def test_the_pyramid_is_zero_for_equal_pictures_and_per_sample() -> None:
    x, y = pictures(2, 40), pictures(2, 40, "y")
    assert float(pyramid_distance(x, x).abs().max()) == 0
    both = pyramid_distance(x, y)
    assert both.shape == (2,)
    torch.testing.assert_close(both[1:], pyramid_distance(x[1:], y[1:]))
    torch.testing.assert_close(latent_distance(x, y), (x - y).square().mean((1, 2, 3)))


def test_the_pyramid_counts_coarse_and_fine_errors_alike() -> None:
    """A constant offset is in the last band only, a checkerboard in the first only."""
    x = torch.zeros(1, 3, 64, 64)
    assert float(pyramid_distance(x + 0.2, x)) == pytest.approx(0.2, rel=1e-5)
    checks = 0.2 * ((torch.arange(64)[:, None] + torch.arange(64)[None]) % 2 * 2 - 1).float().expand(1, 3, 64, 64)
    assert float(pyramid_distance(checks, x)) == pytest.approx(0.2, rel=0.05)
    # white noise costs about the same on a larger picture: the loss does not grow with the size
    small, large = (float(pyramid_distance(pictures(1, side), pictures(1, side, "y"))) for side in (64, 128))
    assert small == pytest.approx(large, rel=0.1)


@pytest.mark.parametrize("side", [1, 3, 17])
def test_the_pyramid_accepts_odd_and_tiny_pictures_and_has_a_gradient(side: int) -> None:
    x = pictures(1, side).requires_grad_(True)
    pyramid_distance(x, pictures(1, side, "y")).sum().backward()
    assert x.grad is not None and bool(x.grad.isfinite().all()) and float(x.grad.abs().sum()) > 0


def pyramid_by_hand(difference: np.ndarray, levels: int) -> float:
    """The loss of one channel [H, W] with loops: blur, mean of 2 x 2 cells, bilinear enlargement."""
    total = 0.0
    for _ in range(levels - 1):
        height, width = difference.shape
        if min(height, width) < 4:
            break
        blurred = np.zeros_like(difference)
        for y, x in np.ndindex(height, width):
            for dy, wy in ((-1, 1), (0, 2), (1, 1)):
                for dx, wx in ((-1, 1), (0, 2), (1, 1)):
                    row, column = min(max(y + dy, 0), height - 1), min(max(x + dx, 0), width - 1)
                    blurred[y, x] += wy * wx / 16 * difference[row, column]
        coarse = np.zeros(((height + 1) // 2, (width + 1) // 2))
        for y, x in np.ndindex(*coarse.shape):
            coarse[y, x] = blurred[2 * y : 2 * y + 2, 2 * x : 2 * x + 2].mean()
        enlarged = np.zeros_like(difference)
        for y, x in np.ndindex(height, width):
            for row, wy in linear_shares(y, height, len(coarse)):
                for column, wx in linear_shares(x, width, coarse.shape[1]):
                    enlarged[y, x] += wy * wx * coarse[row, column]
        total += np.abs(difference - enlarged).mean()
        difference = coarse
    return float(total + np.abs(difference).mean())


def linear_shares(place: int, size: int, coarse: int) -> list[tuple[int, float]]:
    """The two cells of a coarse row that a fine pixel mixes, with their shares."""
    centre = max((place + 0.5) * coarse / size - 0.5, 0.0)
    first = int(centre)
    return [(first, 1 - (centre - first)), (min(first + 1, coarse - 1), centre - first)]


@pytest.mark.parametrize("shape", [(3, 9), (4, 4), (5, 8), (7, 10)])
def test_the_pyramid_by_hand(shape: tuple[int, int]) -> None:
    x, y = (generator(5, name).uniform(-1, 1, shape) for name in ("x", "y"))
    expected = pyramid_by_hand(x - y, 3)
    rows = [torch.from_numpy(values.astype(np.float32)).expand(1, 3, *shape) for values in (x, y)]
    assert float(pyramid_distance(*rows, levels=3)) == pytest.approx(expected, rel=1e-5)


def test_the_pyramid_has_five_bands_unless_told() -> None:
    x, y = pictures(1, 96), pictures(1, 96, "y")
    bands = [float(pyramid_distance(x, y, levels=levels)) for levels in (1, 4, 5, 6)]
    assert float(pyramid_distance(x, y)) == bands[2] and len(set(bands)) == 4
    assert bands[0] == pytest.approx(float((x - y).abs().mean()), rel=1e-6)  # one band: the picture itself


def test_the_pyramid_takes_half_precision_and_compares_in_single() -> None:
    """A difference of 2^-10 beside 1 is lost where bfloat16 subtracts, and both operands count."""
    x = torch.full((1, 3, 8, 8), 1.0, dtype=torch.bfloat16)
    y = torch.full((1, 3, 8, 8), 1.0 + 2**-10)
    for one, other in ((x, y), (y, x)):
        distance = pyramid_distance(one, other)
        assert distance.dtype == torch.float32 and float(distance) == pytest.approx(2**-10, rel=1e-4)
        assert float(latent_distance(one, other)) == pytest.approx(2**-20, rel=1e-4)


def test_the_pyramid_of_a_thin_picture_is_not_halved_along_the_long_side() -> None:
    """The short side counts, whichever it is."""
    for shape in ((3, 40), (40, 3)):
        x, y = (torch.from_numpy(generator(5, n).uniform(-1, 1, (1, 3, *shape)).astype(np.float32)) for n in "ab")
        assert float(pyramid_distance(x, y)) == pytest.approx(float((x - y).abs().mean()), rel=1e-6)


# -------------------------------------------------------------------------------------------------------------- LPIPS


def reference_lpips(network: VggLpips, a: Tensor, b: Tensor) -> Tensor:
    """torchvision's VGG-16 with these weights, and the published formula on its rectified features."""
    import torchvision

    vgg = torchvision.models.vgg16(weights=None).features.eval()
    vgg.load_state_dict({k.removeprefix("features."): v for k, v in network.state_dict().items() if "features" in k})
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    total = torch.zeros(len(a))
    x, y = ((image - shift.view(3, 1, 1)) / scale.view(3, 1, 1) for image in (a, b))
    for number, layer in enumerate(vgg[:30]):
        x, y = layer(x), layer(y)
        if number in (3, 8, 15, 22, 29):  # relu1_2, relu2_2, relu3_3, relu4_3, relu5_3
            tap = (3, 8, 15, 22, 29).index(number)
            weights = network.state_dict()[f"lin{tap}.weight"].view(-1)
            unit = [f / (f.norm(dim=1, keepdim=True) + 1e-10) for f in (x, y)]
            total = total + torch.einsum("bchw,c->bhw", (unit[0] - unit[1]) ** 2, weights).mean((1, 2))
    return total


def test_lpips_has_imagenets_mean_and_deviation() -> None:
    """ImageNet's numbers are for pictures in [0, 1]; LPIPS takes [-1, 1] and rounds to three places."""
    mean, deviation = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    np.testing.assert_allclose(SHIFT, 2 * mean - 1, atol=1e-9)
    np.testing.assert_allclose(SCALE, 2 * deviation, atol=1e-9)


@torch.no_grad()
def test_lpips_is_the_published_formula(network: VggLpips) -> None:
    a, b = pictures(2, 33), pictures(2, 33, "y")
    torch.testing.assert_close(network(a, b), reference_lpips(network, a, b), atol=1e-6, rtol=1e-4)
    assert float(network(a, a).abs().max()) == 0


@torch.no_grad()
def test_lpips_of_weak_features_divides_by_their_length_and_little_more(network: VggLpips) -> None:
    """Features of length 1e-6 are compared as directions: an epsilon far above 1e-10 would make them shorter."""
    weak = VggLpips()
    weak.load_state_dict(network.state_dict())
    features = {tap: torch.tensor([1e-6, 0.0]).view(2, 1, 1, 1).repeat(1, 1, 2, 2) for tap in range(5)}
    features = {tap: torch.cat([value, value.flip(0)], dim=1) for tap, value in features.items()}
    weak._tap_features = lambda images: features.items()  # type: ignore[method-assign]
    for tap in range(5):
        weak.add_module(f"lin{tap}", torch.nn.Conv2d(2, 1, 1, bias=False))
        torch.nn.init.ones_(weak.get_submodule(f"lin{tap}").weight)  # type: ignore[arg-type]
    # each tap: unit vectors at right angles, squared distance 2
    assert float(weak(pictures(1, 16), pictures(1, 16))) == pytest.approx(10.0, rel=1e-3)


def test_lpips_has_a_gradient_for_the_picture_only(network: VggLpips) -> None:
    a = pictures(1, 32).requires_grad_(True)
    network(a, pictures(1, 32, "y")).sum().backward()
    assert a.grad is not None and float(a.grad.abs().sum()) > 0
    assert not any(p.requires_grad for p in network.parameters())


def published_files(network: VggLpips, form: str) -> dict[str, dict[str, Tensor]]:
    """The network's tensors in a lin_weights form, by file name and key."""
    state = {k: v.contiguous() for k, v in network.state_dict().items()}
    convs = {k: v for k, v in state.items() if k.startswith("features")}
    lin_tensors = {k: v for k, v in state.items() if k.startswith("lin")}
    slices = {0: 1, 2: 1, 5: 2, 7: 2, 10: 3, 12: 3, 14: 3, 17: 4, 19: 4, 21: 4, 24: 5, 26: 5, 28: 5}
    lin_weights = {f"{k[:4]}.model.1.weight": v for k, v in lin_tensors.items()}
    if form == "two":
        return {
            "vgg16-397923af.pth": {**convs, "classifier.0.weight": torch.zeros(2, 2)},
            "LPIPS_v0.1_vgg.pth": lin_weights,
        }
    if form == "package":
        package_convs = {f"net.slice{slices[int(k.split('.')[1])]}.{k.split('.', 1)[1]}": v for k, v in convs.items()}
        lists = {f"lins.{k[3]}.model.1.weight": v for k, v in lin_tensors.items()}
        return {"whole.pth": {**package_convs, **lin_weights, **lists, "scaling_layer.shift": torch.zeros(1, 3, 1, 1)}}
    return {"own.safetensors": state}


@pytest.mark.parametrize("form", ["two", "package", "own"])
def test_lpips_reads_the_published_forms(network: VggLpips, form: str, tmp_path: Path) -> None:
    for name, tensors in published_files(network, form).items():
        if name.endswith("safetensors"):
            save_file(tensors, tmp_path / name)
        else:
            torch.save(tensors, tmp_path / name)
    lpips = load_lpips(tmp_path)
    assert all(torch.equal(v, network.state_dict()[k]) for k, v in lpips.state_dict().items())
    files = list(tmp_path.iterdir())
    if len(files) == 1:
        assert torch.equal(load_lpips(files[0]).lin0.weight, network.lin0.weight)  # type: ignore[arg-type, union-attr]


def test_bad_lpips_files_are_refused_with_the_reason(network: VggLpips, tmp_path: Path) -> None:
    state = {k: v.contiguous() for k, v in network.state_dict().items()}
    with pytest.raises(ModelError, match="no such model"):
        load_lpips(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="no weights"):
        load_lpips(tmp_path / "empty")
    cases = {
        "missing.*lin4": {k: v for k, v in state.items() if k != "lin4.weight"},
        "unexpected.*alex": {**state, "alex.weight": torch.zeros(1)},
        "1 of the wrong shape: lin0": {**state, "lin0.weight": torch.zeros(1, 3, 1, 1)},
        "not negative": {**state, "lin0.weight": -state["lin0.weight"]},
    }
    for number, (reason, tensors) in enumerate(cases.items()):
        path = tmp_path / f"{number}.safetensors"
        save_file(tensors, path)
        with pytest.raises(ModelError, match=reason):
            load_lpips(path)
    both = tmp_path / "both"
    both.mkdir()
    save_file(state, both / "a.safetensors")
    save_file({"lin0.weight": state["lin0.weight"] + 1}, both / "b.safetensors")
    with pytest.raises(ModelError, match="differs from the same tensor"):
        load_lpips(both)
