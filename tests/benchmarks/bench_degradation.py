"""CPU cost of degrading a picture, with ours and with the original's code.

    pip download basicsr==1.4.2 --no-deps --no-build-isolation --no-binary :all:   # needs torch; unpack it
    python tests/benchmarks/bench_degradation.py --basicsr basicsr-1.4.2
    python tests/benchmarks/bench_degradation.py                                   # ours alone

The original is imported from the given path (dataset item, degradation of a batch); none of its code is here. Both arms
use the same pictures and one thread, take turns, and count process CPU time. Ours draws and applies plans, with new
noise for every picture, by the functions of the distribution tests. Each recipe gives one JSON line with medians over
rounds, their ratio, and the spread of each arm. A line is void if an arm spreads over 25 %.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import random
import statistics
import sys
import tempfile
import time
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from timing import is_void, median_and_spread, ratio

RECIPES: dict[str, tuple[str, dict[str, Any], int, str]] = {
    "default": ("realesrgan", {}, 12, "twice"),
    "default, quick sharpening": ("realesrgan", {"quick_sharpen": True}, 12, "twice"),
    "instantir": ("instantir", {}, 4, "once"),
    "sharpening off": ("realesrgan", {"sharpen": False}, 4, "off"),
}
"""Our preset and options; the original's batch size and number of sharpenings. InstantIR's class sharpens once."""
ITEM = {
    "use_hflip": False,
    "use_rot": False,
    "final_sinc_prob": 0.8,
    **{
        f"{name}{order}": value
        for order in ("", "2")
        for name, value in {
            "blur_kernel_size": 21,
            "kernel_list": ["iso", "aniso", "generalized_iso", "generalized_aniso", "plateau_iso", "plateau_aniso"],
            "kernel_prob": [0.45, 0.25, 0.12, 0.03, 0.12, 0.03],
            "sinc_prob": 0.1,
            "betag_range": [0.5, 4],
            "betap_range": [1, 2],
        }.items()
    },
    "blur_sigma": [0.2, 3],
    "blur_sigma2": [0.2, 1.5],
}
BATCH = {
    "high_order_degradation": True,
    "scale": 4,
    "second_blur_prob": 0.8,
    **{
        f"{name}{order}": value
        for order, values in {
            "": ([0.2, 0.7, 0.1], [0.15, 1.5], [1, 30], [0.05, 3]),
            "2": ([0.3, 0.4, 0.3], [0.3, 1.2], [1, 25], [0.05, 2.5]),
        }.items()
        for name, value in zip(
            (
                "resize_prob",
                "resize_range",
                "noise_range",
                "poisson_scale_range",
                "gaussian_noise_prob",
                "gray_noise_prob",
                "jpeg_range",
            ),
            (*values, 0.5, 0.4, [30, 95]),
            strict=True,
        )
    },
}


def crops(folder: Path | None, count: int, side: int) -> list[np.ndarray]:
    """Float pictures [side, side, 3]: crops of the photographs in a folder, or of those in scikit-image."""
    if folder is None:
        import skimage

        folder = Path(skimage.__file__).parent / "data"
    draw, photographs = np.random.default_rng(7), []
    for path in sorted(folder.iterdir()):
        picture = cv2.imread(str(path), cv2.IMREAD_COLOR_RGB) if path.suffix in (".png", ".jpg", ".jpeg") else None
        if picture is not None and min(picture.shape[:2]) >= min(side, 256):
            photographs.append(picture)
    if not photographs:
        raise SystemExit(f"{folder} holds no photograph of at least {min(side, 256)} px")
    parts: list[np.ndarray] = []
    while len(parts) < count:
        picture = photographs[len(parts) % len(photographs)]
        factor = side / min(picture.shape[:2])
        if factor > 1:
            picture = cv2.resize(picture, None, fx=factor + 1e-3, fy=factor + 1e-3, interpolation=cv2.INTER_CUBIC)
        top, left = (int(draw.integers(0, length - side + 1)) for length in picture.shape[:2])
        parts.append(np.ascontiguousarray(picture[top : top + side, left : left + side] / np.float32(255)))
    return parts


def ours(preset: str, options: dict[str, Any], pictures: Sequence[np.ndarray]) -> Callable[[int], None]:
    """A pass over the pictures, with the plans of a seed."""
    from components.degradations import build_degradation

    degradation = build_degradation(preset, **options)

    def run(seed: int) -> None:
        for position, hq in enumerate(pictures):
            degradation.apply(hq, degradation.draw(seed, "bench", position))

    return run


# -- the original ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def stub_modules(checkout: Path) -> Iterator[None]:
    """Stub modules, so that two modules of the checkout import without dependencies that are unused here."""
    modules_before = dict(sys.modules)

    def module(name: str, **content: Any) -> None:
        stub = types.ModuleType(name)
        vars(stub).update(content)
        sys.modules[name] = stub

    root = checkout / "basicsr"
    for part in ("", "data", "models", "archs", "losses", "metrics"):
        module(f"basicsr.{part}".rstrip("."), __path__=[str(root / part)])
    module("basicsr.losses.loss_util", get_refined_artifact_map=None)
    module("basicsr.models.srgan_model", SRGANModel=type("SRGANModel", (), {}))
    module("torchvision.transforms.functional_tensor", rgb_to_grayscale=_gray)
    try:
        yield
    finally:
        for name in set(sys.modules) - set(modules_before):
            if name.startswith("basicsr"):
                del sys.modules[name]
        sys.modules.update(modules_before)


def _gray(images: Any, num_output_channels: int = 1) -> Any:
    """rgb_to_grayscale of older torchvision versions."""
    import torch

    luma = torch.einsum("bchw,c->bhw", images, torch.tensor([0.2989, 0.587, 0.114], device=images.device))[:, None]
    return luma.expand(-1, num_output_channels, -1, -1)


class Original(NamedTuple):
    """A pass over pictures with the original's code.

    Attributes:
        draw: seed -> the items of a pass: each picture's kernels.
        apply: items -> None; degrades, and resizes to full size (bicubic) at the end.
    """

    draw: Callable[[int], list[dict[str, Any]]]
    apply: Callable[[list[dict[str, Any]]], None]

    def __call__(self, seed: int) -> None:
        self.apply(self.draw(seed))


def original(
    checkout: Path, batch_size: int, sharpening: str, pictures: Sequence[np.ndarray], device: str = "cpu"
) -> Original:
    """The original's item and batch code over these pictures, which are moved to the device.

    Raises:
        SystemExit: no BasicSR at the path, or the pictures do not fill the last batch: its time would be missing.
    """
    import torch

    if not pictures or len(pictures) % batch_size:
        raise SystemExit(
            f"the original degrades whole batches of {batch_size}, and {len(pictures)} pictures do not fill them: "
            f"take a multiple of {batch_size}"
        )
    if not (checkout / "basicsr" / "data" / "degradations.py").is_file():
        raise SystemExit(f"{checkout} holds no basicsr/data/degradations.py")
    with stub_modules(checkout):
        items: Any = importlib.import_module("basicsr.data.realesrgan_dataset")
        batches: Any = importlib.import_module("basicsr.models.realesrgan_model")
    side = pictures[0].shape[0]
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as listing:
        listing.write("one.png\n")
        listing.flush()
        dataset = items.RealESRGANDataset(
            ITEM | {"dataroot_gt": "", "meta_info": listing.name, "io_backend": {"type": "disk"}}
        )
    dataset.file_client = types.SimpleNamespace(get=lambda *_: b"")
    blank = np.full((400, 400, 3), 0.5, np.float32)
    items.imfrombytes = lambda *_, **__: blank  # an item then costs only its kernels
    if not hasattr(batches, "first_filter2D"):
        batches.first_filter2D = batches.filter2D  # it calls view on tensors that may not be contiguous
        batches.filter2D = lambda images, kernel: batches.first_filter2D(images.contiguous(), kernel)
    model: Any = object.__new__(batches.RealESRGANModel)
    model.opt, model.is_train, model.device = BATCH | {"gt_size": side}, True, torch.device(device)
    model.jpeger = batches.DiffJPEG(differentiable=False).to(device)
    model._dequeue_and_enqueue = lambda: None
    sharpen = batches.USMSharp().to(device)
    sharpened: list[Any] = []

    def once(images: Any) -> Any:
        """The second call on a batch returns the first one's result."""
        if sharpened:
            return sharpened.pop()
        sharpened.append(sharpen(images))
        return sharpened[0]

    model.usm_sharpener = {"twice": sharpen, "once": once, "off": lambda images: images}[sharpening]
    planes = [torch.from_numpy(picture.transpose(2, 0, 1).copy()).to(device) for picture in pictures]

    def draw(seed: int) -> list[dict[str, Any]]:
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002  the original draws from the global generator
        torch.manual_seed(seed)
        return [dataset[0] for _ in planes]

    @torch.no_grad()
    def apply(kernels_by_picture: list[dict[str, Any]]) -> None:
        for start in range(0, len(planes), batch_size):
            rows = slice(start, start + batch_size)
            kernels = ("kernel1", "kernel2", "sinc_kernel")
            data = {name: torch.stack([item[name] for item in kernels_by_picture[rows]]) for name in kernels}
            model.feed_data(data | {"gt": torch.stack(planes[rows])})
            torch.nn.functional.interpolate(model.lq, size=(side, side), mode="bicubic").clamp_(0, 1)

    return Original(draw, apply)


# -- measuring -------------------------------------------------------------------------------------------------------


def measure(
    recipes: Sequence[str] = tuple(RECIPES),
    side: int = 512,
    pictures: int = 24,
    rounds: int = 5,
    seeds: int = 2,
    basicsr: Path | None = None,
    photos: Path | None = None,
) -> list[dict[str, Any]]:
    """CPU milliseconds per picture: medians over interleaved rounds, ratio of the arms, and whether the row is void."""
    import torch

    if min(pictures, rounds, seeds) < 1:
        raise SystemExit(f"pictures, rounds and seeds must be at least 1, got {pictures}, {rounds} and {seeds}")
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    hq, results = crops(photos, pictures, side), []
    for recipe in recipes:
        preset, options, batch_size, sharpening = RECIPES[recipe]
        arms: dict[str, Callable[[int], None]] = {"ours": ours(preset, options, hq)}
        if basicsr is not None:
            arms["original"] = original(basicsr, batch_size, sharpening, hq)
        times: dict[str, list[float]] = {name: [] for name in arms}
        for round_ in range(rounds + 1):
            for name, run in arms.items():
                start = time.process_time()
                for seed in range(seeds):
                    run(seed)
                if round_:  # the first round is a warm-up
                    times[name].append(1e3 * (time.process_time() - start) / seeds / pictures)
        row: dict[str, Any] = {"recipe": recipe, "side": side, "pictures": pictures, "rounds": rounds, "seeds": seeds}
        for name, values in times.items():
            median, spread = median_and_spread(values)
            row |= {f"{name}_ms": round(median, 2), f"{name}_spread": round(spread, 3)}
        row["void"] = is_void(rounds, max(row[f"{name}_spread"] for name in arms))
        if basicsr is not None:
            row["ratio"] = ratio(statistics.median(times["original"]), statistics.median(times["ours"]), 1)
        results.append(row)
    return results


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--basicsr", type=Path, help="a checkout or unpacked source archive of BasicSR")
    parser.add_argument("--recipe", action="append", choices=list(RECIPES), help="may be repeated; default all")
    parser.add_argument("--photos", type=Path, help="a folder of photographs; default scikit-image's")
    parser.add_argument("--side", type=int, action="append", help="HQ side in pixels; may be repeated")
    parser.add_argument("--pictures", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=2, help="of each round; raise it if sharpening is off")
    parser.add_argument("--out", type=Path, default=Path("bench.jsonl"))
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    with options.out.open("a") as stream:
        for side in options.side or [512]:
            for recipe in options.recipe or RECIPES:
                (row,) = measure(
                    [recipe], side, options.pictures, options.rounds, options.seeds, options.basicsr, options.photos
                )
                print(json.dumps(row), flush=True)
                stream.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
