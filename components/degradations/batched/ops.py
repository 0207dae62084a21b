"""The operations of plans on batches: (float32 [B, 3, H, W], valid sides, operations) -> the same shape.

Each picture's valid part lies at the top left; an operation reads nothing else and leaves finite values everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from scipy.fft import next_fast_len
from torch import Tensor
from torch.nn import functional

from components.degradations import filters, jpeg, kernels, masks, noise
from components.degradations.batched import philox
from components.degradations.plans import MAX_KERNEL_PX

KERNEL_CLASSES = (21, 41, 81, 161, MAX_KERNEL_PX)
Sides = Sequence[tuple[int, int]]
Ops = Sequence[Mapping[str, Any]]


def column(values: Sequence[float] | Sequence[int], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """[B, 1, 1] on a tensor's device."""
    return torch.tensor(values, dtype=dtype or like.dtype, device=like.device)[:, None, None]


def valid(images: Tensor, sides: Sides) -> Tensor:
    """Where the pictures are: bool [B, 1, H, W]."""
    rows, columns = (
        _valid(images.shape[2], [s[0] for s in sides], images),
        _valid(images.shape[3], [s[1] for s in sides], images),
    )
    return (rows[:, :, None] & columns[:, None, :])[:, None]


def _valid(size: int, sides: Sequence[int], like: Tensor) -> Tensor:
    return torch.arange(size, device=like.device)[None] < torch.tensor(sides, device=like.device)[:, None]


def spread(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Pick rows [B, H'] and columns [B, W'] by index: [B, 3, H', W']."""
    tall = images.gather(2, rows[:, None, :, None].expand(-1, images.shape[1], -1, images.shape[3]))
    return tall.gather(3, columns[:, None, None, :].expand(-1, images.shape[1], tall.shape[2], -1))


def mirrored(size: int, reach: int, sides: Sequence[int], like: Tensor) -> Tensor:
    """Indices of -reach .. size + reach - 1 into 0 .. side - 1, mirrored without repeating the edge: int64 [B, n]."""
    place = torch.arange(-reach, size + reach, device=like.device)[None].abs()
    side = torch.tensor(sides, device=like.device)[:, None]
    period = (2 * (side - 1)).clamp_min(1)
    turned = place % period
    return torch.where(side == 1, 0, torch.minimum(turned, period - turned))


def repeated(size: int, sides: Sequence[int], like: Tensor) -> Tensor:
    """Indices of 0 .. size - 1 into 0 .. side - 1 with the edge repeated: int64 [B, size]."""
    place = torch.arange(size, device=like.device)[None]
    return torch.minimum(place, torch.tensor(sides, device=like.device)[:, None] - 1)


# -- filters ---------------------------------------------------------------------------------------------------------


def kernel_size(spec: Mapping[str, Any]) -> int:
    """Side of a plan's kernel."""
    return len(spec["weights"]) if spec["kind"] == "given" else int(spec["size"])


def build_kernels(specs: Sequence[Mapping[str, Any]], like: Tensor, largest: int = 0) -> Tensor:
    """Plans' kernels as kernels.build makes them, zero-padded to one size K: float64 [B, K, K]; 0 takes the largest."""
    largest = largest or max(kernel_size(spec) for spec in specs)
    line = torch.arange(largest, device=like.device, dtype=torch.float64) - largest // 2
    y, x = torch.meshgrid(line, line, indexing="ij")
    sizes = column([int(spec.get("size", largest)) for spec in specs], line)
    inside = (torch.maximum(x.abs(), y.abs()) <= (sizes - 1) / 2).double()

    def number(name: str, missing: float) -> Tensor:
        values = [spec.get(name) for spec in specs]
        return column([missing if value is None else float(value) for value in values], line)

    sigma_x, sigma_y, theta = number("sigma_x", 1.0), number("sigma_y", 1.0), number("theta", 0.0)
    beta, cutoff = number("beta", 1.0), number("cutoff", 1.0)
    u = (torch.cos(theta) * x + torch.sin(theta) * y) / sigma_x
    v = (torch.cos(theta) * y - torch.sin(theta) * x) / sigma_y
    power = (u**2 + v**2) ** beta
    radius = torch.hypot(x, y)
    ring = cutoff * bessel_j1(cutoff * radius, math.pi * largest) / (2 * math.pi * radius.clamp_min(0.5))
    ring = torch.where(radius == 0, cutoff**2 / (4 * math.pi), ring)
    kinds = column([{"sinc": 2, "plateau": 1}.get(spec["kind"].split("_")[0], 0) for spec in specs], line)
    shape = torch.where(kinds == 2, ring, torch.where(kinds == 1, 1 / (1 + power), torch.exp(-power / 2))) * inside
    made = shape / shape.sum((1, 2), keepdim=True)
    for place, spec in enumerate(specs):
        if spec["kind"] == "given":
            weights = kernels.pad(kernels.build(spec), largest)
            made[place] = torch.from_numpy(weights).to(made)
    return made


def bessel_j1(x: Tensor, largest: float) -> Tensor:
    """J1 in float64 to 1e-13 for |x| <= largest: the trapezoid rule on Bessel's integral; torch's is good to 3e-7."""
    result = torch.zeros_like(x)
    points = 64 + 2 * math.ceil(largest)  # more than the integrand's highest harmonic that counts
    for k in range(points):
        angle = 2 * math.pi * k / points
        result += torch.cos(angle - x * math.sin(angle))
    return result / points


def correlate(images: Tensor, sides: Sides, weights: Tensor) -> Tensor:
    """Correlate each picture with its kernel [B, K, K], K odd, by the Fourier transform; mirrored borders."""
    height, width = images.shape[2:]
    reach = weights.shape[-1] // 2
    rows = mirrored(height, reach, [s[0] for s in sides], images)
    columns = mirrored(width, reach, [s[1] for s in sides], images)
    padded = spread(images, rows, columns)
    shape = [next_fast_len(side + 2 * reach, real=True) for side in (height, width)]
    response = torch.fft.rfft2(weights.float(), s=shape).conj()[:, None]
    return torch.fft.irfft2(torch.fft.rfft2(padded, s=shape) * response, s=shape)[..., :height, :width].contiguous()


def blur(images: Tensor, sides: Sides, ops: Ops) -> Tensor:
    """As filters.blur; kernels of a class of sizes together, so that a picture's arithmetic is its own affair."""
    out = torch.empty_like(images)
    classes = [next(size for size in KERNEL_CLASSES if size >= kernel_size(op["kernel"])) for op in ops]
    for size in sorted(set(classes)):
        places = [i for i, other in enumerate(classes) if other == size]
        index = torch.tensor(places, device=images.device)
        weights = build_kernels([ops[i]["kernel"] for i in places], images, size)
        out[index] = correlate(images[index], [sides[i] for i in places], weights)
    return out


def sharpen(
    images: Tensor,
    sides: Sides,
    ops: Ops,
    weight: float = filters.USM_WEIGHT,
    threshold: float = filters.USM_THRESHOLD,
) -> Tensor:
    """As filters.sharpen; an operation with `exact` convolves densely, which gives the original's very bits."""
    out = torch.empty_like(images)
    manner = [(bool(op.get("exact")), bool(op.get("quick"))) for op in ops]
    for exact, quick in sorted(set(manner)):
        places = [i for i, other in enumerate(manner) if other == (exact, quick)]
        index = torch.tensor(places, device=images.device)
        picked, lengths = images[index], [sides[i] for i in places]
        blurred = _dense_blur if exact else _quarter_blur if quick else _wide_blur
        residual = picked - blurred(picked, lengths)
        soft = blurred(((residual.abs() * 255) > threshold).float(), lengths)
        sharp = (picked + weight * residual).clip(0, 1)
        out[index] = soft * sharp + (1 - soft) * picked
    return out


def _dense_blur(images: Tensor, sides: Sides) -> Tensor:
    bell = kernels.gaussian(filters.USM_SIZE_PX, filters.USM_SIGMA, filters.USM_SIGMA)
    weights = torch.from_numpy(bell).to(images)[None, None]
    planes = _bordered(images, sides, filters.USM_SIZE_PX // 2)
    return _convolve(planes, weights).view(images.shape)


def _wide_blur(images: Tensor, sides: Sides) -> Tensor:
    return _two_passes(images, sides, kernels.line(filters.USM_SIZE_PX, filters.USM_SIGMA))


def _quarter_blur(images: Tensor, sides: Sides) -> Tensor:
    quick = filters.QUICK
    small = [(max(1, s[0] // quick), max(1, s[1] // quick)) for s in sides]
    line = kernels.line(filters.USM_SIZE_PX // quick | 1, filters.USM_SIGMA / quick)
    shrunk = resize(images, sides, small, [{"mode": "area"}] * len(sides))
    large = resize(_two_passes(shrunk, small, line), small, sides, [{"mode": "bilinear"}] * len(sides))
    height, width = images.shape[2:]
    return functional.pad(large, (0, width - large.shape[3], 0, height - large.shape[2]))


def _two_passes(images: Tensor, sides: Sides, line: np.ndarray) -> Tensor:
    weights = torch.from_numpy(line).to(images)
    planes = _bordered(images, sides, line.size // 2)
    tall = _convolve(planes, weights[None, None, :, None])
    return _convolve(tall, weights[None, None, None, :]).view(images.shape)


def _convolve(planes: Tensor, weights: Tensor) -> Tensor:
    """In full float32 also where a GPU would take TF32 by default."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        return functional.conv2d(planes, weights)


def _bordered(images: Tensor, sides: Sides, reach: int) -> Tensor:
    """Every plane with a mirrored border: [B * 3, 1, H + 2 reach, W + 2 reach]."""
    rows = mirrored(images.shape[2], reach, [s[0] for s in sides], images)
    columns = mirrored(images.shape[3], reach, [s[1] for s in sides], images)
    return spread(images, rows, columns).flatten(0, 1)[:, None]


# -- resizing --------------------------------------------------------------------------------------------------------


def resize(images: Tensor, sides: Sides, goals: Sides, ops: Ops, canvas: tuple[int, int] | None = None) -> Tensor:
    """Each picture to its own goal on a canvas [B, 3, H', W'], by default the largest goal. Modes as in resize.py."""
    tallest = canvas or (max(g[0] for g in goals), max(g[1] for g in goals))
    steps = []
    for side, goal, op in zip(sides, goals, ops, strict=True):
        by_factor = op.get("sampling") == "factor" and op["mode"] in ("bilinear", "bicubic")
        steps.append((1 / op["scale"],) * 2 if by_factor else (side[0] / goal[0], side[1] / goal[1]))
    modes = [op["mode"] for op in ops]
    matrices = [
        sampling_matrices(
            images.shape[2 + axis],
            [s[axis] for s in sides],
            [g[axis] for g in goals],
            [s[axis] for s in steps],
            modes,
            images,
            tallest[axis],
        )
        for axis in (0, 1)
    ]
    return matrices[0][:, None] @ images @ matrices[1].transpose(1, 2)[:, None]


def sampling_matrices(
    size: int,
    sides: Sequence[int],
    goals: Sequence[int],
    steps: Sequence[float],
    modes: Sequence[str],
    like: Tensor,
    tallest: int,
) -> Tensor:
    """resize.sampling_matrix for each picture, zero beyond its goal: float32 [B, tallest, size]."""
    out = torch.zeros(len(goals), tallest, size, device=like.device, dtype=torch.float64)
    for mode in sorted(set(modes)):
        places = [i for i, other in enumerate(modes) if other == mode]
        side, goal = (torch.tensor([v[i] for i in places], device=like.device) for v in (sides, goals))
        step = torch.tensor([steps[i] for i in places], device=like.device, dtype=torch.float64)
        part = _matrices(mode, tallest, size, side, goal, step)
        out[torch.tensor(places, device=like.device)] = part
    row = torch.arange(tallest, device=like.device)
    goal = torch.tensor(goals, device=like.device)
    return (out * (row[None] < goal[:, None])[..., None]).float()


def _matrices(mode: str, tallest: int, size: int, side: Tensor, goal: Tensor, step: Tensor) -> Tensor:
    """One mode: side and goal int64 [b], step float64 [b]; float64 [b, tallest, size]."""
    step = step[:, None]
    row = torch.arange(tallest, device=side.device)[None]
    pixel = torch.arange(size, device=side.device)[None, None]
    side, goal = side[:, None], goal[:, None]
    if mode == "pool":
        first, last = row * side // goal, -(-(row + 1) * side // goal)
        within = (pixel >= first[..., None]) & (pixel < last[..., None])
        return within / (last - first)[..., None].double()
    taps: list[tuple[Tensor, Tensor]] = []
    if mode == "area":
        if tallest == 0:
            return torch.zeros(0, device=side.device)
        shrinks = step >= 1
        overlap = torch.minimum(pixel + 1, ((row + 1) * step)[..., None]) - torch.maximum(
            pixel, (row * step)[..., None]
        )
        overlap = overlap.clip(0) * (pixel < side[..., None])
        overlap = overlap / overlap.sum(2, keepdim=True).clamp_min(1e-12)
        first = torch.floor(row * step).long()
        share = (row + 1) - (first + 1) / step
        share = torch.where(share > 0, share - torch.floor(share), 0.0)
        taps = [(first, 1 - share), (first + 1, share)]
        return torch.where(shrinks[..., None], overlap, _scatter(taps, side, tallest, size))
    centre = (row + 0.5) * step - 0.5
    if mode == "bilinear":
        centre = centre.clip(0)
    stretch = step.clamp_min(1) if mode == "antialias" else torch.ones_like(step)
    reach = {"bilinear": 1, "bicubic": 2}.get(mode) or math.ceil(2 * float(stretch.max()))
    first = torch.floor(centre).long() - reach + 1
    for tap in range(2 * reach):
        where = first + tap
        distance = (where - centre).abs() / stretch
        weight = (
            (1 - distance).clip(0) if mode == "bilinear" else _cubic(distance, -0.5 if mode == "antialias" else -0.75)
        )
        taps.append((where, weight))
    matrix = _scatter(taps, side, tallest, size)
    return matrix / matrix.sum(2, keepdim=True) if mode == "antialias" else matrix


def _scatter(taps: Sequence[tuple[Tensor, Tensor]], side: Tensor, tallest: int, size: int) -> Tensor:
    """Weights put at their pixels, the edge repeated: float64 [b, tallest, size]."""
    matrix = torch.zeros(side.shape[0], tallest, size, device=side.device, dtype=torch.float64)
    for where, weight in taps:
        index = torch.minimum(where.clip(0), side - 1).expand(-1, tallest)
        matrix.scatter_add_(2, index[..., None], weight.expand(-1, tallest)[..., None].double())
    return matrix


def _cubic(distance: Tensor, a: float) -> Tensor:
    """resize.cubic."""
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
    return torch.where(distance <= 1, near, torch.where(distance < 2, far, 0.0))


# -- noise -----------------------------------------------------------------------------------------------------------


def add_noise(images: Tensor, sides: Sides, ops: Ops) -> Tensor:
    """As noise.noise_field, added and clipped."""
    table = torch.from_numpy(noise.normal_table()).to(images)
    drawn = _words(images, sides, ops)
    z = table[drawn]
    field = z * (column([op["level"] / 255 for op in ops], images)[..., None])
    for place, op in enumerate(ops):
        if op.get("mix") is not None:
            mix = torch.tensor(op["mix"], device=images.device, dtype=images.dtype) / 255
            field[place] = torch.einsum("ij,jhw->ihw", mix, z[place])
    shot = [i for i, op in enumerate(ops) if op["kind"] != "gaussian"]
    if shot:
        index = torch.tensor(shot, device=images.device)
        chosen = [ops[i] for i in shot]
        field[index] = _shot(images[index], [sides[i] for i in shot], chosen, z[index])
    return (images + field).clip(0, 1)


def _words(images: Tensor, sides: Sides, ops: Ops) -> Tensor:
    """The noise words at each pixel, in the CPU's order (rows, columns, channels): int64 [B, 3, H, W]."""
    channels = [1 if op["gray"] else 3 for op in ops]
    counts = [s[0] * s[1] * c for s, c in zip(sides, channels, strict=True)]
    seeds = torch.tensor([op["seed"] for op in ops], device=images.device)
    made = philox.words(seeds, max(counts))
    y = torch.arange(images.shape[2], device=images.device)[None, None, :, None]
    x = torch.arange(images.shape[3], device=images.device)[None, None, None, :]
    c = torch.arange(3, device=images.device)[None, :, None, None]
    width, depth = (column(v, seeds)[..., None] for v in ([s[1] for s in sides], channels))
    place = (y * width + x) * depth + torch.minimum(c, depth - 1)
    place = torch.minimum(place, column(counts, seeds)[..., None] - 1)
    return made.gather(1, place.flatten(1)).view(images.shape)


def _shot(images: Tensor, sides: Sides, ops: Ops, z: Tensor) -> Tensor:
    """As noise.shot_field for normal values z."""
    gray = column([float(op["gray"]) for op in ops], images)[..., None]
    weights = torch.from_numpy(noise.GRAY_WEIGHTS).to(images)
    luma = torch.einsum("c,bchw->bhw", weights, images)[:, None]
    levels = (torch.where(gray > 0, luma, images).clip(0, 1) * 255).round().long()
    counted = torch.where(valid(images, sides), levels, 256).flatten(1)
    present = torch.zeros(len(ops), 257, device=images.device).scatter_(1, counted, 1.0)[:, :256].sum(1)
    power = torch.ceil(torch.log2(present)).long()
    tables = [noise.shot_tables(1 << exponent) for exponent in range(9)]
    spread_by, skew_by = (torch.stack([torch.from_numpy(t[k]) for t in tables]).to(images) for k in (0, 1))
    index = power[:, None, None, None] * 256 + levels
    level = column([op["level"] for op in ops], images)[..., None]
    return level * (spread_by.flatten()[index] * z + skew_by.flatten()[index] * ((z**2 - 1) / 6))


def salt_pepper(images: Tensor, sides: Sides, ops: Ops) -> Tensor:
    """As noise.salt_pepper."""
    drawn = _words(images, sides, ops)
    limit = column([round(op["amount"] * (1 << 16)) for op in ops], drawn)[..., None]
    return torch.where(drawn < limit, (drawn & 1).to(images), images)


def strokes(images: Tensor, sides: Sides, ops: Ops) -> Tensor:
    """As masks.draw, drawn on the host."""
    out = images.clone()
    for place, (side, op) in enumerate(zip(sides, ops, strict=True)):
        covered = torch.from_numpy(masks.draw(side[0], side[1], op["strokes"])).to(images.device)
        out[place, :, : side[0], : side[1]].masked_fill_(covered, op["value"])
    return out


# -- JPEG ------------------------------------------------------------------------------------------------------------


def compress(images: Tensor, sides: Sides, ops: Ops) -> Tensor:
    """As jpeg.jpeg; the forms of the real encoder with its integer tables and roundings, at 8 bits."""
    out = torch.empty_like(images)
    for form in sorted({op["form"] for op in ops}):
        places = [i for i, op in enumerate(ops) if op["form"] == form]
        index = torch.tensor(places, device=images.device)
        qualities = [float(ops[i]["quality"]) for i in places]
        out[index] = _compress(images[index], [sides[i] for i in places], qualities, form)
    return out


def _compress(images: Tensor, sides: Sides, qualities: Sequence[float], form: str) -> Tensor:
    if form not in jpeg.FORMS:
        raise ValueError(f"unknown JPEG form {form!r}; known are {', '.join(jpeg.FORMS)}")
    real = form != "simulator"
    height, width = images.shape[2:]
    tall, wide = (-(-side // jpeg.BLOCK_PX) * jpeg.BLOCK_PX for side in (height, width))
    if form == "edge":
        rows, columns = repeated(tall, [s[0] for s in sides], images), repeated(wide, [s[1] for s in sides], images)
        pixels = spread(images, rows, columns)
    else:
        pixels = functional.pad(images * valid(images, sides), (0, wide - width, 0, tall - height))
    pixels = pixels * 255
    if real:
        pixels = pixels.round()
    if form == "matched":
        pixels = pixels.transpose(2, 3)
    ycc = torch.einsum("ij,bjhw->bihw", torch.tensor(jpeg.TO_YCC).to(pixels), pixels)
    ycc = _half_up(ycc) if real else ycc
    luma, chroma = ycc[:, :1] - 128, functional.avg_pool2d(ycc[:, 1:], 2)
    if real:  # the encoder adds 1 and 2 in turn before it divides by 4
        bias = torch.arange(chroma.shape[3], device=pixels.device) % 2 * 0.25 + 0.25
        chroma = torch.floor(chroma + bias)
    luma_tables, chroma_tables = _tables(qualities, real, pixels)
    luma = _quantise(luma, luma_tables, real) + 128
    chroma = _quantise(chroma, chroma_tables, real)
    if real:
        luma, chroma = _half_up(luma).clip(0, 255), _half_up(chroma).clip(-128, 127)
    chroma = _smooth(chroma) if form == "edge" else chroma.repeat_interleave(2, 2).repeat_interleave(2, 3)
    planes = torch.cat([luma, chroma], 1)
    rgb = torch.einsum("ij,bjhw->bihw", torch.tensor(jpeg.FROM_YCC).to(planes), planes)
    rgb = (rgb.transpose(2, 3) if form == "matched" else rgb)[..., :height, :width]
    return (_half_up(rgb) if real else rgb).clip(0, 255) / 255


def _tables(qualities: Sequence[float], real: bool, like: Tensor) -> tuple[Tensor, Tensor]:
    """Quantisation tables of luma and chroma for each picture, [B, 1, 1, 1, 8, 8]."""
    base = [torch.tensor(table, device=like.device) for table in (jpeg.LUMA, jpeg.CHROMA)]
    if not real:
        factors = torch.tensor([jpeg.table_factor(q) for q in qualities], device=like.device, dtype=torch.float64)
        made = [base[0].T * factors[:, None, None], base[1] * factors[:, None, None]]
    else:
        whole = [round(q) for q in qualities]
        percent = torch.tensor([5000 // q if q < 50 else 200 - 2 * q for q in whole], device=like.device)
        made = [((t.long() * percent[:, None, None] + 50) // 100).clip(1, 255).double() for t in base]
    luma, chroma = (table.to(like)[:, None, None, None] for table in made)
    return luma, chroma


def _half_up(values: Tensor) -> Tensor:
    """Round as integer arithmetic does; ties are common here, since a flat block is a multiple of 1/8."""
    return torch.floor(values + 0.5)


def _quantise(planes: Tensor, tables: Tensor, real: bool) -> Tensor:
    """8 x 8 DCT, division by the tables, rounding, and back: [B, P, H, W], sides multiples of 8."""
    batch, depth, height, width = planes.shape
    blocks = planes.view(batch, depth, height // 8, 8, width // 8, 8).transpose(3, 4)
    turn = torch.from_numpy(jpeg.cosines()).to(planes)
    found = turn @ blocks @ turn.T
    if real:  # the encoder's coefficients have three binary digits after the point, and ties go away from zero
        found = (found * 8).round() / 8
        coefficients = torch.sign(found) * torch.floor(found.abs() / tables + 0.5) * tables
    else:
        coefficients = (found / tables).round() * tables
    return (turn.T @ coefficients @ turn).transpose(3, 4).reshape(planes.shape)


def _smooth(chroma: Tensor) -> Tensor:
    """Twice the size as decoders do: each new sample 3/4 of the near and 1/4 of the far one, along both axes."""
    for axis in (2, 3):
        padded = functional.pad(chroma, (0, 0, 1, 1) if axis == 2 else (1, 1, 0, 0), mode="replicate")
        size = chroma.shape[axis]
        before, after = padded.narrow(axis, 0, size), padded.narrow(axis, 2, size)
        pair = torch.stack([(3 * chroma + before) / 4, (3 * chroma + after) / 4], axis + 1)
        chroma = pair.flatten(axis, axis + 1)
    return chroma


def clip(images: Tensor, sides: Sides, ops: Ops) -> Tensor:
    return images.clip(0, 1)


def round_levels(images: Tensor, sides: Sides, ops: Ops) -> Tensor:
    return (images * 255).round() / 255


OPERATIONS: Mapping[str, Callable[[Tensor, Sides, Ops], Tensor]] = {
    "sharpen": sharpen,
    "blur": blur,
    "noise": add_noise,
    "salt_pepper": salt_pepper,
    "jpeg": compress,
    "strokes": strokes,
    "clip": clip,
    "round": round_levels,
}
"""All but resize, which changes the canvas."""
