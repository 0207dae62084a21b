"""Degradations against recordings of BasicSR and InstaRevive: every degradation_*.json in the golden folder.

Each file holds the call and the tolerance. A file without a check fails, and so does a tensor or a table that no check
reads. If both back ends have an operation, both are checked.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from scipy import stats

from components.degradations import filters, jpeg, kernels, noise
from components.degradations.batched import ops as batched_ops
from components.degradations.engine import apply_plan
from components.degradations.plans import make_plan
from components.degradations.real_esrgan import RealESRGAN
from components.degradations.resize import resample, resize
from tests.conftest import golden_names

PREFIX = "degradation_"


ABOUT = {
    *("module", "source", "source_used", "torch", "opencv", "numpy", "device", "compute_dtype", "call", "tensors"),
    *("independent_rewrite_max_abs", "independent_float64_replay", "independent_float64_rewrite"),
    *("float32_vs_float64", "opencv_variant_max_abs", "comparison", "diffjpeg_vs_libjpeg"),
    *("quality_vector_after_call", "quality_100_99p5_95_gives_nan", "grey_field_shared_inside_a_batch_max_abs"),
}
"""Entries of the json files that describe their origin or other comparisons; they hold no cases."""


class Facts(dict[str, Any]):
    """The content of a json file; `used` collects the keys that were read."""

    def __init__(self, content: dict[str, Any]) -> None:
        super().__init__(content)
        self.used: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.used.add(key)
        return super().__getitem__(key)


class Golden:
    """One recording; `used` collects the tensors that were read."""

    def __init__(self, folder: Path, name: str) -> None:
        self.facts = Facts(json.loads((folder / f"{name}.json").read_text()))
        self.tensors = {
            key: value.astype(np.float32) if value.dtype == np.float16 else value
            for key, value in load_file(folder / f"{name}.safetensors").items()
        }
        self.used: set[str] = set()

    def __getitem__(self, key: str) -> np.ndarray:
        self.used.add(key)
        return self.tensors[key]

    def outputs(self, pattern: str) -> Iterator[tuple[re.Match[str], np.ndarray]]:
        """(match, tensor) of the outputs whose full name matches."""
        for key in sorted(self.tensors):
            match = re.fullmatch(f"output/(?:{pattern})", key)
            if match:
                yield match, self[key]

    @property
    def tolerance(self) -> dict[str, Any]:
        return dict(self.facts["tolerance"])

    def unused(self) -> list[str]:
        return sorted((set(self.tensors) - self.used) | (set(self.facts) - self.facts.used - ABOUT))


def hwc(image: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(image.reshape(image.shape[-3:]).transpose(1, 2, 0))


def chw(image: np.ndarray) -> np.ndarray:
    return image.transpose(2, 0, 1)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(-10 * np.log10(max(1e-12, np.square(a.astype(float) - b).mean())))


def off(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a.astype(float) - b).max())


def on_torch(run: Callable[..., torch.Tensor], image: np.ndarray, *more: Any, **options: Any) -> np.ndarray:
    """Runs a batched operation on one picture [H, W, 3]."""
    batch = torch.from_numpy(chw(image).copy())[None]
    result = run(batch, [image.shape[:2]], *more, **options)
    return hwc(result.numpy())


def check_kernels(golden: Golden) -> None:
    tolerance = golden.tolerance["tol"]
    specs = {}
    for name, numbers in golden.facts["params"].items():
        kind = name.rsplit("_", 1)[0]
        specs[name] = {"kind": kind, **numbers}
        recorded = golden[f"input/{name}"]
        assert recorded[0] == numbers["size"]
    for match, expected in golden.outputs(r"(?!sharpen_1d)(?P<name>\w+?_\d+)(_padded\d+)?"):
        assert match["name"] in specs, f"no parameters for {match[0]}"
        spec = specs[match["name"]]
        kernel = kernels.build(spec)
        assert off(kernels.pad(kernel, expected.shape[0]), expected) <= tolerance, match[0]
        torch_kernel = batched_ops.build_kernels([spec], torch.zeros(1))[0].numpy()
        assert off(kernels.pad(torch_kernel, expected.shape[0]), expected) <= tolerance, match[0]
    pulse = golden["output/pulse"]
    pulse_spec = {"kind": "iso", "size": pulse.shape[0], "sigma_x": 1e-3, "sigma_y": 1e-3, "theta": 0.0}
    assert off(kernels.build(pulse_spec), pulse) <= tolerance
    facts = golden.facts["sharpen_1d"]
    line = golden[f"output/sharpen_1d_{facts['size']}"].ravel()
    assert (facts["size"], facts["sigma"]) == (filters.USM_SIZE_PX, filters.USM_SIGMA)
    assert off(kernels.line(facts["size"], facts["sigma"]), line) <= 1e-7  # lines are float32


def check_filter2d(golden: Golden) -> None:
    tolerance = golden.tolerance["tol"]
    pictures, weights = golden["input/image"], golden["input/kernels"]
    cases = []
    for match, expected in golden.outputs(r"per_sample(_float64)?|one_kernel_(?P<one>\d+)_for_all"):
        cases += [(i, int(match["one"] or i), expected[i]) for i in range(len(pictures))]
    for match, expected in golden.outputs(r"opencv_(?P<size>\d+)_image(?P<image>\d+)_hwc"):
        kernel = golden[f"input/kernel{match['size']}"]
        assert off(filters.filter2d(hwc(pictures[int(match["image"])]), kernel), expected) <= tolerance
    for image, kernel, expected in cases:
        assert off(filters.filter2d(hwc(pictures[image]), weights[kernel]), hwc(expected)) <= tolerance, (image, kernel)
        result = on_torch(batched_ops.correlate, hwc(pictures[image]), torch.from_numpy(weights[kernel])[None])
        assert off(result, hwc(expected)) <= tolerance, (image, kernel)


def alike(
    image: np.ndarray, expected: np.ndarray, weight: float, threshold: float, tolerance: float, mean: float
) -> bool:
    """Whether the CPU's sharpening is the expected one, except near residuals that tie with the threshold.

    A tie is a residual so near the threshold that float32's rounding of a sum of 2601 terms decides. Its mask pixel
    changes the blurred mask by at most the middle of the bell, within half the bell's side.
    """
    line = kernels.line(filters.USM_SIZE_PX, filters.USM_SIGMA).astype(float)
    residual = image.astype(float) - filters.filter2d(image, np.outer(line, line))
    ties = (np.abs(np.abs(residual) * 255 - threshold) < 2e-4).astype(np.uint8)
    reach = cv2.dilate(ties, np.ones((filters.USM_SIZE_PX, filters.USM_SIZE_PX), np.uint8))
    flips = cv2.filter2D(ties.astype(float), cv2.CV_64F, np.ones((51, 51))) * line.max() ** 2
    flipped = np.where(reach > 0, flips * weight * np.abs(residual), 0)
    error = np.abs(filters.sharpen(image, weight, threshold).astype(float) - expected)
    rest = (error - flipped).clip(0)
    return bool(rest.max() <= tolerance and rest.mean() <= mean and reach.mean() < 0.9)


def check_usm(golden: Golden) -> None:
    """The torch back end's dense convolution within the tolerance; the CPU's two passes too, except ties (alike)."""
    largest, mean = golden.tolerance["tol"], golden.tolerance["mean_tol"]
    pictures = golden["input/image"]
    for match, expected in golden.outputs(r"sharpened(_w(?P<weight>[\d.]+)_t(?P<threshold>[\d.]+))?"):
        weight, threshold = float(match["weight"] or 0.5), float(match["threshold"] or 10)
        for picture, sharp in zip(pictures, expected, strict=True):
            numbers = {"weight": weight, "threshold": threshold}
            dense = on_torch(batched_ops.sharpen, hwc(picture), [{"exact": True}], **numbers)
            assert off(dense, hwc(sharp)) <= largest
            assert np.abs(dense - hwc(sharp)).mean() <= mean
            assert alike(hwc(picture), hwc(sharp), weight, threshold, largest, mean)
    for picture, expected in zip(pictures, golden["output/soft_mask"], strict=True):
        line = kernels.line(filters.USM_SIZE_PX, filters.USM_SIGMA)
        residual = hwc(picture) - filters.filter2d(hwc(picture), np.outer(line, line))
        mask = (np.abs(residual) * 255 > filters.USM_THRESHOLD).astype(np.float32)
        assert off(filters.filter2d(mask, np.outer(line, line)), hwc(expected)) <= golden.tolerance["tol"]


def check_resize(golden: Golden) -> None:
    tolerance = golden.tolerance["tol"]
    pictures = golden["input/image"]
    names = {"area": "pool"}
    for match, expected in golden.outputs(r"(?P<mode>[a-z]+)_(factor_(?P<factor>[\d.]+)|size_\d+x\d+)"):
        mode = names.get(match["mode"], match["mode"])
        height, width = expected.shape[-2:]
        for picture, expected_picture in zip(pictures, expected, strict=True):
            image = hwc(picture)
            op: dict[str, Any] = {"mode": mode}
            if match["factor"]:
                step = 1 / float(match["factor"])
                assert (height, width) == tuple(int(side / step + 1e-9) for side in image.shape[:2])
                op |= {"sampling": "factor", "scale": float(match["factor"])}
                steps = (step, step) if mode != "pool" else (image.shape[0] / height, image.shape[1] / width)
                result = resample(image, height, width, mode, *steps)
            else:
                result = resize(image, height, width, mode)
            assert off(result, hwc(expected_picture)) <= tolerance, match[0]
            torch_result = on_torch(batched_ops.resize, image, [(height, width)], [op])
            assert off(torch_result, hwc(expected_picture)) <= tolerance, match[0]


def check_noise(golden: Golden) -> None:
    """The fields' statistics, by the file's rule; the back ends give equal fields (test_batched_degradations)."""
    rule = golden.tolerance["rule"]  # a sentence with the limits below
    assert all(words in rule for words in ("within 1 % of sigma", "0.01 colour", "<= 0.03", "within 3 %"))
    for number, row in enumerate(golden.facts["gaussian_table"]):
        op = {"kind": "gaussian", "level": row["sigma"], "gray": bool(row["gray"])}
        fields = [noise.gaussian_field(256, 256, op | {"seed": 100 * number + k}) * np.ones(3) for k in range(16)]
        field = np.stack(fields).reshape(-1, 3) * 255
        assert np.abs(field.std(0) / row["expected_sd"] - 1).max() <= 0.01
        correlation = np.corrcoef(field[:, 0], field[:, 1])[0, 1]
        assert correlation >= 0.9999 if row["gray"] else abs(correlation) <= 0.01
        assert abs(stats.kurtosis(field[:, 0])) <= 0.03
    for number, row in enumerate(golden.facts["poisson_table"]):
        image = hwc(golden[f"input/{row['image']}"])
        op = {"kind": "poisson", "level": row["scale"], "gray": bool(row["gray"])}
        fields = [noise.shot_field(image, op | {"seed": 100 * number + k}) * np.ones(3) for k in range(40)]
        field = np.stack(fields).reshape(-1, 3)
        expected = row["expected_var_scale2_times_mean_over_vals"]
        assert abs(field.var() / expected - 1) <= 0.03, row
        correlation = np.corrcoef(field[:, 0], field[:, 1])[0, 1]
        assert correlation >= 0.9999 if row["gray"] else abs(correlation) <= 0.01


def near_simulator(golden: Golden, result: np.ndarray, expected: np.ndarray) -> bool:
    """The file's rule for a simulator: few values differ, by little."""
    share = (np.abs(result - expected) > 1e-4).mean()
    return bool(share <= golden.tolerance["share_tol"] and psnr(result, expected) >= golden.tolerance["psnr_tol"])


def check_jpeg(golden: Golden) -> None:
    sources = {"": golden["input/image"], "odd_": golden["input/odd_size"]}
    limits = golden.facts["diffjpeg_vs_libjpeg_48_crops"]
    for match, expected in golden.outputs(r"(?P<odd>odd_)?(?P<kind>diffjpeg|libjpeg|libjpeg_turned)_q(?P<quality>\d+)"):
        quality = int(match["quality"])
        for picture, recorded in zip(sources[match["odd"] or ""], expected, strict=True):
            image = hwc(picture)
            if match["kind"] == "diffjpeg":
                assert near_simulator(golden, jpeg.jpeg(image, quality, "simulator"), hwc(recorded)), match[0]
                op = [{"quality": quality, "form": "simulator"}]
                assert near_simulator(golden, on_torch(batched_ops.compress, image, op), hwc(recorded)), match[0]
                score = psnr(jpeg.jpeg(image, quality, "matched"), hwc(recorded))
                if str(quality) in limits:  # the rule for a substitute by libjpeg
                    assert score >= limits[str(quality)]["turned_psnr_rgb_min"] - 1, match[0]
                assert score >= 37, match[0]  # degradation.md, section 4
                continue
            pixels = np.rint(image * 255).astype(np.uint8)  # real libjpeg against real libjpeg
            is_turned = match["kind"] == "libjpeg_turned"
            decoded = jpeg.round_trip(np.ascontiguousarray(pixels.swapaxes(0, 1)) if is_turned else pixels, quality)
            decoded = decoded.swapaxes(0, 1) if is_turned else decoded
            recorded = hwc(recorded).astype(float) / (255 if recorded.dtype == np.uint8 or recorded.max() > 1.5 else 1)
            assert psnr(decoded / 255, recorded) >= 45, match[0]
    qualities = golden["input/quality_per_sample"]
    for picture, quality, recorded in zip(sources[""], qualities, golden["output/diffjpeg_per_sample"], strict=True):
        assert near_simulator(golden, jpeg.jpeg(hwc(picture), float(quality), "simulator"), hwc(recorded))
    batch = torch.from_numpy(sources[""])
    ops = [{"quality": float(quality), "form": "simulator"} for quality in qualities]
    batch_result = batched_ops.compress(batch, [batch.shape[2:]] * len(batch), ops).numpy()
    assert near_simulator(golden, batch_result, golden["output/diffjpeg_per_sample"])


STAGES = {"filter": "blur", "resize": "resize", "jpeg": "jpeg"}


def check_replay(golden: Golden) -> None:
    """Whole runs with recorded draws: each stage from the recorded result before it, then end to end."""
    small = golden.facts["sides"]["lq"]
    for name, draws in golden.facts["draws"].items():
        hq = hwc(golden[f"input/{name}_hq"])
        sharpened = golden[f"output/{name}_sharpened"]
        assert off(on_torch(batched_ops.sharpen, hq, [{"exact": True}]), hwc(sharpened)) <= 1e-4
        assert alike(hq, hwc(sharpened), filters.USM_WEIGHT, filters.USM_THRESHOLD, 1e-4, 1e-6)
        stages = {
            int(match["at"]): (match["stage"], value)
            for match, value in golden.outputs(rf"{name}_(?P<at>\d+)_(?P<stage>\w+)")
        }
        kernel = {
            "first": golden[f"input/{name}_kernel1"][0],
            "second": golden[f"input/{name}_kernel2"][0] if draws["second_blur"] else None,
            "final": golden[f"input/{name}_final_kernel"][0],
        }
        noises = [hwc(golden[f"input/{name}_noise{k}"]) for k in (1, 2)]
        steps: list[tuple[str, Any]] = [
            ("filter", kernel["first"]),
            ("resize", {"mode": draws["mode1"], "size": draws["size1"], "factor": draws["scale1"]}),
            ("noise", noises[0]),
            ("jpeg", draws["jpeg1_q"]),
            *([("filter", kernel["second"])] if draws["second_blur"] else []),
            ("resize", {"mode": draws["mode2"], "size": draws["size2"]}),
            ("noise", noises[1]),
        ]
        shrink = [("resize", {"mode": draws["mode3"], "size": [small, small]}), ("filter", kernel["final"])]
        last = ("jpeg", draws["jpeg2_q"])
        steps += [last, *shrink] if draws["order_jpeg_first"] else [*shrink, ("clip", None), last]
        image, reference, at = hwc(sharpened), hwc(sharpened), 0
        for kind, numbers in steps:
            image, stage_input = replay(kind, numbers, image), replay(kind, numbers, reference)
            if kind in ("noise", "clip"):
                reference = stage_input
                continue
            stage, expected = stages[at]
            assert stage.rstrip("0123456789") == kind, (name, at)
            reference, at = hwc(expected), at + 1
            if kind == "jpeg":
                share = (np.abs(stage_input - reference) > 1e-4).mean()
                assert share <= 0.01, (name, stage)
                assert psnr(stage_input, reference) >= 60, (name, stage)
            else:
                assert off(stage_input, reference) <= 1e-5, (name, stage)
        assert at == len(stages)
        engine = run_engine(hq, draws, kernel, noises, golden.facts["options"]["scale"])
        image = engine
        lq = np.rint(image.clip(0, 1) * 255)
        expected = np.rint(hwc(golden[f"output/{name}_lq"]) * 255)
        assert (lq == expected).mean() >= golden.tolerance["share_equal"], name
        assert psnr(lq / 255, expected / 255) >= golden.tolerance["psnr"], name
        back = resize(hwc(golden[f"output/{name}_lq"]), hq.shape[0], hq.shape[1], "bicubic").clip(0, 1)
        enlarged = hwc(golden[f"output/{name}_lq_resized_back"])  # rounded to 8 bits
        assert (np.rint(back * 255) == np.rint(enlarged * 255)).mean() >= golden.tolerance["share_equal"], name


def run_engine(
    hq: np.ndarray, draws: dict[str, Any], kernel: dict[str, Any], noises: list[np.ndarray], factor: int
) -> np.ndarray:
    """The same run as one faithful plan of the engine, with the recorded kernels and noise fields."""

    def blur(name: str) -> list[dict[str, Any]]:
        spec = (
            {"kind": "given", "weights": np.asarray(kernel[name], float).tolist()} if kernel[name] is not None else {}
        )
        return [{"op": "blur", "kernel": spec, "exact": True}] if spec else []

    def resize_to(name: str, **more: Any) -> dict[str, Any]:
        return {"op": "resize", "mode": {"area": "pool"}.get(draws[name], draws[name]), **more}

    def field(image: np.ndarray, op: dict[str, Any], out: Any = None) -> np.ndarray:
        return noises[op["seed"]]

    small = {"base": "hq", "divide": factor}
    noise_ops = [{"op": "noise", "kind": "gaussian", "level": 0.0, "gray": False, "seed": seed} for seed in (0, 1)]
    jpeg_ops = [{"op": "jpeg", "quality": draws[name], "form": "simulator"} for name in ("jpeg1_q", "jpeg2_q")]
    closing = [resize_to("mode3", **small), *blur("final"), {"op": "clip"}]
    ops = [
        {"op": "sharpen", "exact": True},
        *blur("first"),
        resize_to("mode1", base="current", scale=draws["scale1"], sampling="factor"),
        noise_ops[0],
        jpeg_ops[0],
        *blur("second"),
        resize_to("mode2", **small, scale=(draws["size2"][0] + 0.5) / (hq.shape[0] // factor)),
        noise_ops[1],
        *([jpeg_ops[1], *closing] if draws["order_jpeg_first"] else [*closing, jpeg_ops[1]]),
        {"op": "round"},
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(noise, "noise_field", field)
        return apply_plan(hq, make_plan(ops))


def replay(kind: str, numbers: Any, image: np.ndarray) -> np.ndarray:
    """One step of the original on float32 [H, W, 3]."""
    if kind == "filter":
        return filters.filter2d(image, numbers)
    if kind == "resize":
        mode, (height, width) = {"area": "pool"}.get(numbers["mode"], numbers["mode"]), numbers["size"]
        factor = numbers.get("factor")
        if factor and mode != "pool":
            return image if factor == 1 else resample(image, height, width, mode, 1 / factor, 1 / factor)
        return resize(image, height, width, mode)
    if kind == "noise":
        return (image + numbers).clip(0, 1)
    return image.clip(0, 1) if kind == "clip" else jpeg.jpeg(image.clip(0, 1), numbers, "simulator")


def check_bfr_replay(golden: Golden) -> None:
    tolerance = golden.tolerance["tol"]
    for name, draws in golden.facts["draws"].items():
        hq = hwc_of(golden[f"input/{name}_hq"])
        kernel = {"kind": draws["kernel"], **{k: draws[k] for k in ("size", "sigma_x", "sigma_y", "theta")}}
        blur = {"op": "blur", "kernel": kernel | {"beta": None}, "exact": True}
        shrink = {"op": "resize", "base": "hq", "divide": draws["scale"], "mode": "bilinear"}
        blurred = golden[f"output/{name}_blur"]
        assert off(apply_plan(hq, make_plan([blur])), blurred) <= tolerance
        small = apply_plan(hq, make_plan([blur, shrink]))
        assert small.shape[0] == draws["small_side"]
        assert off(small, golden[f"output/{name}_small"]) <= tolerance
        noisy = (golden[f"output/{name}_small"] + golden[f"input/{name}_noise"]).clip(0, 1)
        assert off(noisy, golden[f"output/{name}_noisy"]) <= tolerance
        assert golden[f"input/{name}_noise"].std() * 255 == pytest.approx(draws["noise_sigma"], rel=0.1)
        recorded_jpeg = golden[f"output/{name}_jpeg"]
        assert psnr(jpeg.jpeg(golden[f"output/{name}_noisy"], draws["jpeg_q"], "edge"), recorded_jpeg) >= 45
        enlarge = {"op": "resize", "base": "hq", "scale": hq.shape[0] / recorded_jpeg.shape[0], "mode": "bilinear"}
        assert off(apply_plan(recorded_jpeg, make_plan([enlarge])), golden[f"output/{name}_lq"]) <= tolerance


def hwc_of(image: np.ndarray) -> np.ndarray:
    """Checks that a recorded picture is [H, W, 3]."""
    assert image.shape[-1] == 3
    return np.ascontiguousarray(image)


CHECKS: dict[str, Callable[[Golden], None]] = {
    name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")
}


@pytest.mark.parametrize("name", golden_names(f"{PREFIX}*"))
def test_every_recorded_case_is_reproduced(name: str, golden_dir: Path) -> None:
    assert name, f"no {PREFIX}*.json in {os.environ.get('RESTORAY_GOLDEN', 'the golden folder')}"
    check = CHECKS.get(name.removeprefix(PREFIX))
    assert check is not None, f"no check for {name}: write check_{name.removeprefix(PREFIX)}"
    golden = Golden(golden_dir, name)
    check(golden)
    assert not golden.unused(), f"{name} holds entries that no check reads"


def test_faithful_plans_hold_only_checked_operations() -> None:
    """They hold exact blurs, whole-pixel windows, factor sampling and the simulator."""
    faithful = RealESRGAN(sharpen=True, faithful=True)
    ops = [op for position in range(50) for op in faithful.draw(0, "k", position)["ops"]]
    assert all(op["exact"] for op in ops if op["op"] in ("blur", "sharpen"))
    assert {op["form"] for op in ops if op["op"] == "jpeg"} == {"simulator"}
    assert {op["mode"] for op in ops if op["op"] == "resize"} == {"pool", "bilinear", "bicubic"}
    assert all(op["sampling"] == "factor" for op in ops if op["op"] == "resize" and op["base"] == "current")
