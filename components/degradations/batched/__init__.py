"""The torch back end: executes the plans of a whole batch, on a GPU or a CPU.

Every picture has its own plan, so sizes, kernels, modes and the order of operations differ within a batch. Pictures of
similar size share a canvas. The valid part of a picture is at the top left of the canvas; the values outside are finite
and have no meaning. Each round runs one operation: the one that is next for the most pictures.

A plan gives the same noise as on the CPU back end, and the same picture up to arithmetic. JPEG is computed here without
libjpeg and differs by libjpeg's roundings. On a CPU a picture's bits do not depend on its batch. On a GPU the libraries
choose their arithmetic by the batch size: equal batches give equal bits, and other batches differ by rounding.
Operations are in ops.py, resizing in resizing.py.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from components.degradations.batched.ops import OPERATIONS, RANDOM, draw_words
from components.degradations.batched.resizing import Job, resize_all
from components.degradations.batched.transfer import to_device
from components.degradations.plans import MAX_SIDE_PX, operations, out_sides
from components.types import Plan, SampleError

BUCKET = 1.5  # ratio of canvas sizes: a smaller one wastes fewer pixels, a larger one keeps a GPU busier
SMALLEST_PX = 32


@dataclass(kw_only=True)
class Canvas:
    """Pictures that share a canvas.

    Attributes:
        images: float32 [b, 3, Hc, Wc].
        rows: indices of the pictures in the batch.
        sides: (height, width) of each picture's valid part.
    """

    images: Tensor
    rows: list[int]
    sides: list[tuple[int, int]]

    def select(self, places: Sequence[int]) -> Canvas:
        """The pictures at `places`; for all of them this returns itself, without a copy."""
        if len(places) == len(self.rows):
            return self
        index = to_device(places, self.images.device)
        return Canvas(
            images=self.images[index], rows=[self.rows[i] for i in places], sides=[self.sides[i] for i in places]
        )


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One operation on some pictures of a canvas: `part` holds the pictures at places `ready`, `ops` one each."""

    canvas: Canvas
    ready: list[int]
    part: Canvas
    ops: list[Mapping[str, Any]]


@torch.no_grad()
def apply_plans(hq: Tensor, plans: Sequence[Plan], keys: Sequence[str] = ()) -> Tensor:
    """Executes one plan per picture of a batch.

    Args:
        hq: [B, 3, H, W], float in 0..1 or uint8; the work runs on its device.
        plans: B plans.
        keys: B sample keys for errors; empty for none.

    Returns:
        float32 [B, 3, H', W'] in 0..1; H' x W' is hq's size unless the plans end smaller.

    Raises:
        SampleError: "nan" (NaN or infinity in a picture), "range" (values outside 0..1), or "shape", "too_large" and
            "dtype" for the batch.
        ValueError: the number of plans is wrong, a plan has another kind, or the plans end at different sizes.
    """
    images = check_batch(hq, keys)
    if len(plans) != len(images):
        raise ValueError(f"{len(images)} pictures came with {len(plans)} plans")
    todo = [list(reversed(operations(plan))) for plan in plans]
    height, width = images.shape[2:]
    canvases = [Canvas(images=images, rows=list(range(len(images))), sides=[(height, width)] * len(images))]
    while waiting := Counter(ops[-1]["op"] for ops in todo if ops):
        name = waiting.most_common(1)[0][0]
        after: list[Canvas] = []
        turns: list[Turn] = []
        for canvas in canvases:
            ready = [i for i, row in enumerate(canvas.rows) if todo[row] and todo[row][-1]["op"] == name]
            if ready:
                part = canvas.select(ready)
                turns.append(Turn(canvas=canvas, ready=ready, part=part, ops=[todo[row].pop() for row in part.rows]))
            else:
                after.append(canvas)
        after += _resize(turns, (height, width)) if name == "resize" else _operate(name, turns)
        canvases = _merge(after) if name == "resize" else after
    sides = {side for canvas in canvases for side in canvas.sides}
    if len(sides) > 1:
        raise ValueError(f"the plans of one batch end at different sizes: {sorted(sides)}")
    (side,) = sides
    result = images.new_empty(len(plans), 3, *side)
    for canvas in canvases:
        result[to_device(canvas.rows, result.device)] = canvas.images[..., : side[0], : side[1]]
    return result


def check_batch(hq: Tensor, keys: Sequence[str]) -> Tensor:
    """The batch as float32; raises SampleError as apply_plans does."""
    if hq.ndim != 4 or hq.shape[1] != 3 or 0 in hq.shape:
        raise SampleError("shape", f"expected [B, 3, H, W], got {list(hq.shape)}")
    if max(hq.shape[2:]) > MAX_SIDE_PX:
        raise SampleError("too_large", f"a side exceeds {MAX_SIDE_PX} pixels: {list(hq.shape)}")
    if hq.dtype == torch.uint8:
        return hq / 255
    if not hq.is_floating_point():
        raise SampleError("dtype", f"expected uint8 or floats in 0..1, got {hq.dtype}")
    low, high = hq.amin((1, 2, 3)), hq.amax((1, 2, 3))
    wrong = ~((low >= 0) & (high <= 1))  # comparisons with NaN are false
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        reach = float(low[row]), float(high[row])
        name = keys[row] if keys else f"picture {row} of the batch"
        if all(map(torch.isfinite, (low[row], high[row]))):
            raise SampleError("range", f"values reach from {reach[0]:g} to {reach[1]:g}, outside 0..1", name)
        raise SampleError("nan", "the picture holds NaN or infinity", name)
    return hq.float()


def _operate(name: str, turns: Sequence[Turn]) -> list[Canvas]:
    """Runs one operation on the ready pictures; the other pictures of each canvas do not change."""
    words = None
    if name in RANDOM:
        sides, ops = [s for turn in turns for s in turn.part.sides], [op for turn in turns for op in turn.ops]
        words = draw_words(sides, ops, turns[0].part.images.device)
    after, first = [], 0
    for turn in turns:
        more = () if words is None else (words, first)
        result = OPERATIONS[name](turn.part.images, turn.part.sides, turn.ops, *more)
        first += len(turn.ops)
        if len(turn.ready) < len(turn.canvas.rows):
            result = turn.canvas.images.index_copy(0, to_device(turn.ready, result.device), result)
        after.append(Canvas(images=result, rows=turn.canvas.rows, sides=turn.canvas.sides))
    return after


def _resize(turns: Sequence[Turn], hq: tuple[int, int]) -> list[Canvas]:
    """Resizes each ready picture to its size. A canvas becomes one per bucket of sizes, and one of the others."""
    after, jobs, rows = [], [], []
    for turn in turns:
        rest = [i for i in range(len(turn.canvas.rows)) if i not in set(turn.ready)]
        after += [turn.canvas.select(rest)] if rest else []
        goals = [out_sides(op, side, hq) for op, side in zip(turn.ops, turn.part.sides, strict=True)]
        buckets: dict[tuple[int, int], list[int]] = {}
        for place, goal in enumerate(goals):
            buckets.setdefault(_edges(goal), []).append(place)
        for edges, places in buckets.items():
            part = turn.part.select(places)
            sizes, ops = [goals[i] for i in places], [turn.ops[i] for i in places]
            jobs.append(Job(images=part.images, sides=part.sides, goals=sizes, ops=ops, canvas=edges))
            rows.append(part.rows)
    results = zip(resize_all(jobs), rows, jobs, strict=True)
    return after + [Canvas(images=images, rows=numbers, sides=list(job.goals)) for images, numbers, job in results]


def _bucket(side: int) -> int:
    """The canvas side for a picture's side; it must not depend on the batch, or a picture's bits would."""
    edge = float(SMALLEST_PX)
    while side > math.ceil(edge):
        edge *= BUCKET
    return math.ceil(edge)


def _edges(goal: tuple[int, int]) -> tuple[int, int]:
    """The canvas size for a picture's size."""
    return _bucket(goal[0]), _bucket(goal[1])


def _merge(canvases: Sequence[Canvas]) -> list[Canvas]:
    """Joins canvases of equal size."""
    groups: dict[tuple[int, int], list[Canvas]] = {}
    for canvas in canvases:
        height, width = canvas.images.shape[2:]
        groups.setdefault((height, width), []).append(canvas)
    return [
        Canvas(
            images=torch.cat([c.images for c in group]) if len(group) > 1 else group[0].images,
            rows=[row for c in group for row in c.rows],
            sides=[side for c in group for side in c.sides],
        )
        for group in groups.values()
    ]
