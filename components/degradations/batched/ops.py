"""The operations of plans on batches: (float32 [B, 3, H, W], valid sides, operations) -> the same shape.

Each picture's valid part is at the top left. An operation reads only that part and leaves finite values everywhere.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from scipy.fft import next_fast_len
from torch import Tensor
from torch.nn import functional

from components.degradations import filters, jpeg, kernels, masks, noise
from components.degradations.batched import philox
from components.degradations.batched.resizing import Ops, Sides, resize
from components.degradations.batched.transfer import to_device
from components.degradations.plans import MAX_KERNEL_PX

RANDOM = ("noise", "salt_pepper")


KERNEL_CLASSES = (21, 41, 81, 161, MAX_KERNEL_PX)


def column(values: Sequence[float] | Sequence[int], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The values as [B, 1, 1] on the device of `like`."""
    return to_device(values, like.device, dtype or like.dtype)[:, None, None]


@functools.lru_cache(maxsize=64)
def _constant(name: str, device: torch.device, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):
        return torch.from_numpy(np.asarray(CONSTANTS[name]())).to(device, dtype)


def constant(name: str, like: Tensor) -> Tensor:
    """One of CONSTANTS with the device and dtype of `like`, cached: a copy in every step would make the host wait."""
    return _constant(name, like.device, like.dtype)


def valid(images: Tensor, sides: Sides) -> Tensor:
    """True in the valid parts: bool [B, 1, H, W]."""
    rows, columns = (
        _valid(images.shape[2], [s[0] for s in sides], images),
        _valid(images.shape[3], [s[1] for s in sides], images),
    )
    return (rows[:, :, None] & columns[:, None, :])[:, None]


def _valid(size: int, sides: Sequence[int], like: Tensor) -> Tensor:
    return torch.arange(size, device=like.device)[None] < to_device(sides, like.device)[:, None]


def spread(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Picks rows [B, H'] and columns [B, W'] by index: [B, 3, H', W']."""
    tall = images.gather(2, rows[:, None, :, None].expand(-1, images.shape[1], -1, images.shape[3]))
    return tall.gather(3, columns[:, None, None, :].expand(-1, images.shape[1], tall.shape[2], -1))


def mirror_indices(size: int, reach: int, sides: Sequence[int], like: Tensor) -> Tensor:
    """Indices of -reach .. size + reach - 1 into 0 .. side - 1, mirrored without repeating the edge: int64 [B, n]."""
    place = torch.arange(-reach, size + reach, device=like.device)[None].abs()
    side = to_device(sides, like.device)[:, None]
    period = (2 * (side - 1)).clamp_min(1)
    offset = place % period
    return torch.where(side == 1, 0, torch.minimum(offset, period - offset))


def edge_indices(size: int, sides: Sequence[int], like: Tensor) -> Tensor:
    """Indices of 0 .. size - 1 into 0 .. side - 1 with the edge repeated: int64 [B, size]."""
    place = torch.arange(size, device=like.device)[None]
    return torch.minimum(place, to_device(sides, like.device)[:, None] - 1)


# -- filters ---------------------------------------------------------------------------------------------------------


def kernel_size(spec: Mapping[str, Any]) -> int:
    """Side of a plan's kernel."""
    return len(spec["weights"]) if spec["kind"] == "given" else int(spec["size"])


def build_kernels(specs: Sequence[Mapping[str, Any]], like: Tensor, largest: int = 0) -> Tensor:
    """Plans' kernels from kernels.build, zero-padded to `largest` or to the largest of them: float64 [B, K, K].

    The host makes them and copies them once: on a GPU a Bessel function alone takes hundreds of tiny steps.
    """
    largest = largest or max(kernel_size(spec) for spec in specs)
    return to_device(torch.from_numpy(np.stack([kernels.pad(kernels.build(s), largest) for s in specs])), like.device)


def correlate(images: Tensor, sides: Sides, weights: Tensor) -> Tensor:
    """Correlates each picture with its kernel [B, K, K], K odd, by the Fourier transform; borders are mirrored."""
    height, width = images.shape[2:]
    reach = weights.shape[-1] // 2
    rows = mirror_indices(height, reach, [s[0] for s in sides], images)
    columns = mirror_indices(width, reach, [s[1] for s in sides], images)
    padded = spread(images, rows, columns)
    shape = [next_fast_len(side + 2 * reach, real=True) for side in (height, width)]
    response = torch.fft.rfft2(weights.float(), s=shape).conj()[:, None]
    return torch.fft.irfft2(torch.fft.rfft2(padded, s=shape) * response, s=shape)[..., :height, :width].contiguous()


def blur(images: Tensor, sides: Sides, ops: Ops) -> Tensor:
    """As filters.blur; one call per class of kernel sizes: a picture's arithmetic must not depend on its batch."""
    out = torch.empty_like(images)
    classes = [next(size for size in KERNEL_CLASSES if size >= kernel_size(op["kernel"])) for op in ops]
    for size in sorted(set(classes)):
        places = [i for i, other in enumerate(classes) if other == size]
        index = to_device(places, images.device)
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
    """As filters.sharpen; an operation with `exact` uses a dense convolution, which gives the original's bits."""
    out = torch.empty_like(images)
    manner = [(bool(op.get("exact")), bool(op.get("quick"))) for op in ops]
    for exact, quick in sorted(set(manner)):
        places = [i for i, other in enumerate(manner) if other == (exact, quick)]
        index = to_device(places, images.device)
        part, lengths = images[index], [sides[i] for i in places]
        blurred = _dense_blur if exact else _quarter_blur if quick else _wide_blur
        residual = part - blurred(part, lengths)
        soft = blurred(((residual.abs() * 255) > threshold).float(), lengths)
        sharp = (part + weight * residual).clip(0, 1)
        out[index] = soft * sharp + (1 - soft) * part
    return out


def _dense_blur(images: Tensor, sides: Sides) -> Tensor:
    bell = kernels.gaussian(filters.USM_SIZE_PX, filters.USM_SIGMA, filters.USM_SIGMA)
    weights = to_device(torch.from_numpy(bell), images.device, images.dtype)[None, None]
    planes = _add_border(images, sides, filters.USM_SIZE_PX // 2)
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
    weights = to_device(torch.from_numpy(line), images.device, images.dtype)
    planes = _add_border(images, sides, line.size // 2)
    for _ in range(2):  # along rows, then transposed: along columns cuDNN takes seven times as long
        planes = _convolve(planes, weights[None, None, None, :]).transpose(2, 3).contiguous()
    return planes.view(images.shape)


def _convolve(planes: Tensor, weights: Tensor) -> Tensor:
    """Convolves in full float32, also on a GPU that uses TF32 by default."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        return functional.conv2d(planes, weights)


def _add_border(images: Tensor, sides: Sides, reach: int) -> Tensor:
    """Adds a mirrored border to every plane: [B * 3, 1, H + 2 reach, W + 2 reach]."""
    rows = mirror_indices(images.shape[2], reach, [s[0] for s in sides], images)
    columns = mirror_indices(images.shape[3], reach, [s[1] for s in sides], images)
    return spread(images, rows, columns).flatten(0, 1)[:, None]


# -- noise -----------------------------------------------------------------------------------------------------------


def add_noise(images: Tensor, sides: Sides, ops: Ops, words: philox.Words, first: int) -> Tensor:
    """Adds the field of noise.noise_field and clips."""
    z = constant("normal", images)[_words(images, sides, ops, words, first)]
    field = z * (column([op["level"] / 255 for op in ops], images)[..., None])
    for place, op in enumerate(ops):
        if op.get("mix") is not None:
            mix = to_device(op["mix"], images.device, images.dtype) / 255
            field[place] = torch.einsum("ij,jhw->ihw", mix, z[place])
    shot = [i for i, op in enumerate(ops) if op["kind"] != "gaussian"]
    if shot:
        index = to_device(shot, images.device)
        shot_ops = [ops[i] for i in shot]
        field[index] = _shot(images[index], [sides[i] for i in shot], shot_ops, z[index])
    return (images + field).clip(0, 1)


def draw_words(sides: Sides, ops: Ops, device: torch.device) -> philox.Words:
    """The random words for each picture's noise or salt and pepper, in the CPU's order: rows, columns, channels."""
    counts = [side[0] * side[1] * _channels(op) for side, op in zip(sides, ops, strict=True)]
    return philox.words([op["seed"] for op in ops], counts, device)


def _channels(op: Mapping[str, Any]) -> int:
    return 1 if op["gray"] else 3


def _words(images: Tensor, sides: Sides, ops: Ops, words: philox.Words, first: int) -> Tensor:
    """The words at each pixel, int32 [B, 3, H, W]; the canvas' pictures use the streams of `words` from `first` on."""
    y = torch.arange(images.shape[2], device=images.device)[None, None, :, None]
    x = torch.arange(images.shape[3], device=images.device)[None, None, None, :]
    c = torch.arange(3, device=images.device)[None, :, None, None]
    depths = [_channels(op) for op in ops]
    counts = [side[0] * side[1] * depth for side, depth in zip(sides, depths, strict=True)]
    table = [[s[1] for s in sides], depths, counts, words.starts[first : first + len(ops)]]
    width, depth, count, start = to_device(table, images.device)[..., None, None, None]
    place = (y * width + x) * depth + torch.minimum(c, depth - 1)
    return words.flat[start + torch.minimum(place, count - 1)]


def _shot(images: Tensor, sides: Sides, ops: Ops, z: Tensor) -> Tensor:
    """As noise.shot_field for normal values z."""
    gray = column([float(op["gray"]) for op in ops], images)[..., None]
    luma = torch.einsum("c,bchw->bhw", constant("gray", images), images)[:, None]
    levels = (torch.where(gray > 0, luma, images).clip(0, 1) * 255).round().long()
    valid_levels = torch.where(valid(images, sides), levels, 256).flatten(1)
    present = torch.zeros(len(ops), 257, device=images.device).scatter_(1, valid_levels, 1.0)[:, :256].sum(1)
    power = torch.ceil(torch.log2(present)).long()
    spread_by, skew_by = constant("shot", images)
    index = power[:, None, None, None] * 256 + levels
    level = column([op["level"] for op in ops], images)[..., None]
    return level * (spread_by[index] * z + skew_by[index] * ((z**2 - 1) / 6))


def _shot_tables() -> np.ndarray:
    """noise.shot_tables of 1, 2, .. 256 photons, concatenated: [2, 9 * 256]."""
    return np.stack([noise.shot_tables(1 << exponent) for exponent in range(9)], 1).reshape(2, -1)


def salt_pepper(images: Tensor, sides: Sides, ops: Ops, words: philox.Words, first: int) -> Tensor:
    """As noise.salt_pepper."""
    numbers = _words(images, sides, ops, words, first)
    limit = column([round(op["amount"] * (1 << 16)) for op in ops], numbers)[..., None]
    return torch.where(numbers < limit, (numbers & 1).to(images), images)


def strokes(images: Tensor, sides: Sides, ops: Ops) -> Tensor:
    """As masks.draw, which runs on the host."""
    out = images.clone()
    for place, (side, op) in enumerate(zip(sides, ops, strict=True)):
        mask = to_device(torch.from_numpy(masks.draw(side[0], side[1], op["strokes"])), images.device)
        out[place, :, : side[0], : side[1]].masked_fill_(mask, op["value"])
    return out


# -- JPEG ------------------------------------------------------------------------------------------------------------


def compress(images: Tensor, sides: Sides, ops: Ops) -> Tensor:
    """As jpeg.jpeg; forms of the real encoder use its integer tables and roundings, at 8 bits."""
    out = torch.empty_like(images)
    for form in sorted({op["form"] for op in ops}):
        places = [i for i, op in enumerate(ops) if op["form"] == form]
        index = to_device(places, images.device)
        qualities = [float(ops[i]["quality"]) for i in places]
        out[index] = _compress(images[index], [sides[i] for i in places], qualities, form)
    return out


def _compress(images: Tensor, sides: Sides, qualities: Sequence[float], form: str) -> Tensor:
    if form not in jpeg.FORMS:
        raise ValueError(f"unknown JPEG form {form!r}. Choose from {', '.join(jpeg.FORMS)}")
    real = form != "simulator"
    height, width = images.shape[2:]
    tall, wide = (-(-side // jpeg.BLOCK_PX) * jpeg.BLOCK_PX for side in (height, width))
    if form == "edge":
        rows, columns = (
            edge_indices(tall, [s[0] for s in sides], images),
            edge_indices(wide, [s[1] for s in sides], images),
        )
        pixels = spread(images, rows, columns)
    else:
        pixels = functional.pad(images * valid(images, sides), (0, wide - width, 0, tall - height))
    pixels = pixels * 255
    if real:
        pixels = pixels.round()
    if form == "matched":
        pixels = pixels.transpose(2, 3)
    ycc = torch.einsum("ij,bjhw->bihw", constant("to_ycc", pixels), pixels)
    ycc = _half_up(ycc) if real else ycc
    luma, chroma = ycc[:, :1] - 128, functional.avg_pool2d(ycc[:, 1:], 2)
    if real:  # the encoder adds 1 and 2 alternately before it divides by 4
        bias = torch.arange(chroma.shape[3], device=pixels.device) % 2 * 0.25 + 0.25
        chroma = torch.floor(chroma + bias)
    luma_tables, chroma_tables = _tables(qualities, real, pixels)
    luma = _quantise(luma, luma_tables, real) + 128
    chroma = _quantise(chroma, chroma_tables, real)
    if real:
        luma, chroma = _half_up(luma).clip(0, 255), _half_up(chroma).clip(-128, 127)
    chroma = _smooth(chroma) if form == "edge" else chroma.repeat_interleave(2, 2).repeat_interleave(2, 3)
    planes = torch.cat([luma, chroma], 1)
    rgb = torch.einsum("ij,bjhw->bihw", constant("from_ycc", planes), planes)
    rgb = (rgb.transpose(2, 3) if form == "matched" else rgb)[..., :height, :width]
    return (_half_up(rgb) if real else rgb).clip(0, 255) / 255


def _tables(qualities: Sequence[float], real: bool, like: Tensor) -> tuple[Tensor, Tensor]:
    """Quantisation tables of luma and chroma for each picture, [B, 1, 1, 1, 8, 8]; the host makes them."""
    base = np.stack([jpeg.LUMA if real else jpeg.LUMA.T, jpeg.CHROMA])[:, None]
    if real:
        percent = np.array([5000 // q if q < 50 else 200 - 2 * q for q in map(round, qualities)])
        tables = ((base.astype(np.int64) * percent[:, None, None] + 50) // 100).clip(1, 255)
    else:
        tables = base * np.array([jpeg.table_factor(q) for q in qualities])[:, None, None]
    luma, chroma = to_device(torch.from_numpy(tables), like.device, like.dtype)[:, :, None, None, None]
    return luma, chroma


def _half_up(values: Tensor) -> Tensor:
    """Rounds as integer arithmetic does; ties are common, since a flat block's coefficient is a multiple of 1/8."""
    return torch.floor(values + 0.5)


def _quantise(planes: Tensor, tables: Tensor, real: bool) -> Tensor:
    """8 x 8 DCT, division by the tables, rounding, and back: [B, P, H, W], sides multiples of 8."""
    batch, depth, height, width = planes.shape
    blocks = planes.view(batch, depth, height // 8, 8, width // 8, 8).transpose(3, 4)
    turn = constant("cosines", planes)
    spectrum = turn @ blocks @ turn.T
    if real:  # the encoder's coefficients have three fractional bits; ties round away from zero
        spectrum = (spectrum * 8).round() / 8
        coefficients = torch.sign(spectrum) * torch.floor(spectrum.abs() / tables + 0.5) * tables
    else:
        coefficients = (spectrum / tables).round() * tables
    return (turn.T @ coefficients @ turn).transpose(3, 4).reshape(planes.shape)


def _smooth(chroma: Tensor) -> Tensor:
    """Doubles the size as decoders do: each new sample is 3/4 of the near and 1/4 of the far sample, on both axes."""
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


CONSTANTS: Mapping[str, Callable[[], np.ndarray]] = {
    "normal": noise.normal_table,
    "shot": _shot_tables,
    "gray": lambda: noise.GRAY_WEIGHTS,
    "to_ycc": lambda: jpeg.TO_YCC,
    "from_ycc": lambda: jpeg.FROM_YCC,
    "cosines": jpeg.cosines,
}
OPERATIONS: Mapping[str, Callable[..., Tensor]] = {
    "sharpen": sharpen,
    "blur": blur,
    "noise": add_noise,
    "salt_pepper": salt_pepper,
    "jpeg": compress,
    "strokes": strokes,
    "clip": clip,
    "round": round_levels,
}
"""(images, sides, operations) -> images; those in RANDOM also get the random words and the index of their first stream.
All operations but resize, which changes the canvas."""
