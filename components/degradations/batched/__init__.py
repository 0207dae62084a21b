"""The torch back end: executes a batch of plans at once, on a GPU or a CPU.

Every picture has its own plan, so sizes, kernels, modes and even the order of operations differ inside a batch.
Pictures of similar size share a canvas and each has its valid part at the top left of it; what lies outside is finite
and means nothing. In turn the operation that most pictures wait for runs on all of them. The same plan gives the same
noise as on the CPU back end, and the same picture up to arithmetic; JPEG is computed, not called, and differs by what
libjpeg rounds. On a CPU a picture's bits are its own; a GPU's libraries choose their arithmetic by the size of a batch,
so there the same batch has the same bits, and a picture in other company the same but for rounding. Operations are in
ops.py, resizing in resizing.py.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from components.degradations.batched.ops import DRAWN, OPERATIONS, draw_words
from components.degradations.batched.resizing import Job, resize_all
from components.degradations.batched.transfer import sent
from components.degradations.plans import MAX_SIDE_PX, operations, out_sides
from components.types import Plan, SampleError

BUCKET = 1.5  # canvases grow in such steps: finer ones waste fewer pixels, and coarser ones keep a GPU busier
SMALLEST_PX = 32


@dataclass(kw_only=True)
class Canvas:
    """Pictures that share a canvas.

    Attributes:
        images: float32 [b, 3, Hc, Wc].
        rows: which pictures of the batch these are.
        sides: (height, width) of each one's valid part.
    """

    images: Tensor
    rows: list[int]
    sides: list[tuple[int, int]]

    def select(self, places: Sequence[int]) -> Canvas:
        """Some of the pictures; all of them without a copy."""
        if len(places) == len(self.rows):
            return self
        index = sent(places, self.images.device)
        return Canvas(
            images=self.images[index], rows=[self.rows[i] for i in places], sides=[self.sides[i] for i in places]
        )


@dataclass(frozen=True, kw_only=True)
class Turn:
    """Whose turn an operation is on a canvas: places `ready`, which `part` holds, with an operation each."""

    canvas: Canvas
    ready: list[int]
    part: Canvas
    ops: list[Mapping[str, Any]]


@torch.no_grad()
def apply_plans(hq: Tensor, plans: Sequence[Plan], keys: Sequence[str] = ()) -> Tensor:
    """Execute a plan on each picture of a batch.

    Args:
        hq: [B, 3, H, W], float in 0..1 or uint8, on the device that does the work.
        plans: B plans.
        keys: B names for errors.

    Returns:
        float32 [B, 3, H', W'] in 0..1; H' x W' is hq's size unless the plans end smaller.

    Raises:
        SampleError: a picture holds NaN ("nan") or leaves 0..1 ("range"), or hq is no such batch ("shape").
        ValueError: the number of plans is wrong, a plan is of another kind, or plans end at different sizes.
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
        result[sent(canvas.rows, result.device)] = canvas.images[..., : side[0], : side[1]]
    return result


def check_batch(hq: Tensor, keys: Sequence[str]) -> Tensor:
    """The batch as float32; raises as apply_plans."""
    if hq.ndim != 4 or hq.shape[1] != 3 or 0 in hq.shape:
        raise SampleError("shape", f"expected [B, 3, H, W], got {list(hq.shape)}")
    if max(hq.shape[2:]) > MAX_SIDE_PX:
        raise SampleError("too_large", f"a side exceeds {MAX_SIDE_PX} pixels: {list(hq.shape)}")
    if hq.dtype == torch.uint8:
        return hq / 255
    if not hq.is_floating_point():
        raise SampleError("dtype", f"expected uint8 or floats in 0..1, got {hq.dtype}")
    low, high = hq.amin((1, 2, 3)), hq.amax((1, 2, 3))
    wrong = ~((low >= 0) & (high <= 1))  # NaN compares false
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        reach = float(low[row]), float(high[row])
        name = keys[row] if keys else f"picture {row} of the batch"
        if all(map(torch.isfinite, (low[row], high[row]))):
            raise SampleError("range", f"values reach from {reach[0]:g} to {reach[1]:g}, outside 0..1", name)
        raise SampleError("nan", "the picture holds NaN or infinity", name)
    return hq.float()


def _operate(name: str, turns: Sequence[Turn]) -> list[Canvas]:
    """One operation on the pictures whose turn it is; the others of each canvas stay as they are."""
    drawn = None
    if name in DRAWN:
        sides, ops = [s for turn in turns for s in turn.part.sides], [op for turn in turns for op in turn.ops]
        drawn = draw_words(sides, ops, turns[0].part.images.device)
    after, first = [], 0
    for turn in turns:
        more = () if drawn is None else (drawn, first)
        made = OPERATIONS[name](turn.part.images, turn.part.sides, turn.ops, *more)
        first += len(turn.ops)
        if len(turn.ready) < len(turn.canvas.rows):
            made = turn.canvas.images.index_copy(0, sent(turn.ready, made.device), made)
        after.append(Canvas(images=made, rows=turn.canvas.rows, sides=turn.canvas.sides))
    return after


def _resize(turns: Sequence[Turn], hq: tuple[int, int]) -> list[Canvas]:
    """Resize each picture to its own size; of each canvas one a bucket of sizes, and one of what waits."""
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
            wanted, ops = [goals[i] for i in places], [turn.ops[i] for i in places]
            jobs.append(Job(images=part.images, sides=part.sides, goals=wanted, ops=ops, canvas=edges))
            rows.append(part.rows)
    made = zip(resize_all(jobs), rows, jobs, strict=True)
    return after + [Canvas(images=images, rows=numbers, sides=list(job.goals)) for images, numbers, job in made]


def _bucket(side: int) -> int:
    """The side of the canvas that a side falls into. A picture's canvas, and so its arithmetic, is its own affair: it
    does not depend on what else is in the batch."""
    edge = float(SMALLEST_PX)
    while side > math.ceil(edge):
        edge *= BUCKET
    return math.ceil(edge)


def _edges(goal: tuple[int, int]) -> tuple[int, int]:
    """The canvas of a size."""
    return _bucket(goal[0]), _bucket(goal[1])


def _merge(canvases: Sequence[Canvas]) -> list[Canvas]:
    """Put pictures of equal canvases together."""
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
