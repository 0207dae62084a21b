"""What rounding does to the Previewer's consistency loss: previews and gradients in half precision against float32.

    python tests/benchmarks/bench_preview_precision.py                               # CPU, nano and middle size
    python tests/benchmarks/bench_preview_precision.py --model runs/demo/NAME/model  # a trained Previewer
    python tests/benchmarks/bench_preview_precision.py --size sdxl --device cuda

A preview is (x_t - sigma eps) / alpha, so an error of eps grows by sigma / alpha: 14.6 at t = 999 of SDXL's schedule.
Each line is one precision at one start time of the teacher's grid. `preview_rms` is the root mean square difference of
the student's preview from float32's; `mean_distance` is the mean of |student - target| in float32, the loss's scale.
`huber_*` and `l2_*` compare the LoRA's gradient of a loss with float32's, by cosine and length: 1 and 1 are the same
step. "float32 output" is the UNet's last convolution outside of autocast.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench_instantir import build_network, sizes

from components.training import AUTOCAST

if TYPE_CHECKING:
    import torch

    from components.systems.instantir.network import InstantIR
    from components.systems.instantir.objectives import PreviewerObjective
    from components.types import Batch

POINTS = (49, 39, 29, 19, 9, 0)
"""Points of the teacher's grid of 50: start times 999, 799, 599, 399, 199 and 19."""

LOSS_SCALE = 1024.0

ARMS = ("fp32", "bf16", "bf16, float32 output", "fp16", "fp16, float32 output")


def measure_precision(
    network: InstantIR,
    side: int,
    device: str = "cpu",
    points: Sequence[int] = POINTS,
    count: int = 4,
    arms: Sequence[str] = ARMS,
) -> list[dict[str, Any]]:
    """Rows for each point and arm (the first is fp32), on `count` degraded pictures of `side` pixels."""
    import torch

    from components.systems.instantir.objectives import PreviewerObjective

    losses = {"huber": PreviewerObjective(network), "l2": PreviewerObjective(network, huber_c=None)}
    grid = losses["l2"].grid
    batch = _batch(count, side, device)
    rows = []
    for point in points:
        results = {
            (name, arm): _one(objective, batch, point, arm, device)
            for name, objective in losses.items()
            for arm in arms
        }
        for arm in arms:
            student, exact = results["l2", arm].student, results["l2", "fp32"]
            row = {"what": "preview precision", "arm": arm, "t": int(grid.interval(torch.tensor([point]))[0])}
            row["preview_rms"] = _digits((student - exact.student).square().mean().sqrt())
            row["mean_distance"] = _digits((exact.student - exact.target).abs().mean())
            for name in losses:
                mine, theirs = results[name, arm].gradient.double(), results[name, "fp32"].gradient.double()
                cosine = torch.nn.functional.cosine_similarity(mine, theirs, dim=0)
                row[f"{name}_cosine"] = round(float(cosine), 4)
                row[f"{name}_length"] = round(float(mine.norm() / theirs.norm()), 3)
            rows.append(row)
    return rows


@dataclass(frozen=True, kw_only=True)
class Result:
    """Previews of student and target [B, C, h, w], and the LoRA's gradient, flat. All float32."""

    student: torch.Tensor
    target: torch.Tensor
    gradient: torch.Tensor


def _digits(value: torch.Tensor) -> float:
    return float(f"{float(value):.3g}")


def _one(objective: PreviewerObjective, batch: Batch, point: int, arm: str, device: str) -> Result:
    """One precision at one point of the grid."""
    import torch

    from components.randomness import Noise
    from components.systems.instantir import objectives

    class AtPoint(Noise):
        def integers(self, name: str, low: int, high: int) -> torch.Tensor:
            return torch.full((len(self),), point, dtype=torch.int64, device=self.device)

    precision, _, output = arm.partition(", ")
    previews: list[torch.Tensor] = []
    plain = objectives.squared_distance, objectives.pseudo_huber

    def keep(student: torch.Tensor, target: torch.Tensor) -> None:
        previews.extend((student.detach().float(), target.detach().float()))

    parameters = [p for p in objective.trainables["previewer"].parameters() if p.requires_grad]
    # the objective's first distance is between the previews
    objectives.squared_distance = lambda *pair: (keep(*pair), plain[0](*pair))[1]
    objectives.pseudo_huber = lambda *pair_and_c: (keep(*pair_and_c[:2]), plain[1](*pair_and_c))[1]
    try:
        last = float32_output(objective.network.unet) if output else contextlib.nullcontext()
        with last, torch.autocast(device, dtype=AUTOCAST.get(precision, torch.bfloat16), enabled=precision in AUTOCAST):
            (_, loss), *_ = objective.phases(batch, AtPoint(0, batch.positions, device))
        # float16 numbers below 6e-8 are zero, so training scales the loss
        gradients = torch.autograd.grad(loss.value * LOSS_SCALE, parameters)
    finally:
        objectives.squared_distance, objectives.pseudo_huber = plain
    flat = torch.cat([g.float().flatten() / LOSS_SCALE for g in gradients])
    return Result(student=previews[0], target=previews[1], gradient=flat)


@contextlib.contextmanager
def float32_output(unet: Any) -> Iterator[None]:
    """The UNet's last convolution runs in float32 inside of autocast."""
    import torch

    plain = unet.conv_out.forward

    def forward(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):
            result: torch.Tensor = plain(x.float())
        return result

    unet.conv_out.forward = forward
    try:
        yield
    finally:
        del unet.conv_out.forward


def _batch(count: int, side: int, device: str) -> Batch:
    import numpy as np
    import torch

    from components.degradations import build_degradation
    from components.images import to_float
    from components.synthetic import dead_leaves
    from components.types import Batch

    degradation = build_degradation("realesrgan-nano")
    hq = [to_float(dead_leaves(side, 0, k)) for k in range(count)]
    lq = [degradation.apply(p, degradation.draw(0, str(k), k)) for k, p in enumerate(hq)]
    pictures = [
        torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2).contiguous().to(device) * 2 - 1 for rows in (hq, lq)
    ]
    return Batch(
        keys=[str(k) for k in range(count)],
        positions=np.arange(count),
        hq=pictures[0],
        lq=pictures[1],
        prompts=[""] * count,
        sizes=torch.tensor([[side, side, 0, 0, side, side]]).expand(count, -1),
    )


def open_network(model_path: Path, device: str) -> InstantIR:
    """The network of a Previewer's or an InstantIR's model folder."""
    from components.models import load_model
    from components.priors.opening import open_recorded_prior
    from components.systems.instantir.build import network_of

    model = load_model(model_path)
    prior = open_recorded_prior(str(model.info["prior"]["id"]), model.info["prior"], device)
    return network_of(model, prior).freeze().to(device)


def main() -> None:
    """Measure and print one JSON line each, appended to bench.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", action="append", choices=sorted(sizes()), help="may be repeated")
    parser.add_argument("--model", type=Path, help="a trained model folder, instead of random weights")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--pictures", type=int, default=4)
    parser.add_argument("--side", type=int, default=128, help="pixels of a picture's side, with --model")
    parser.add_argument("--out", type=Path, default=Path("bench.jsonl"))
    options = parser.parse_args()
    import torch

    torch.manual_seed(0)
    networks = [(str(options.model), options.side)] if options.model else []
    for name in [] if options.model else options.size or ["nano", "middle"]:
        networks.append((name, 0))
    for name, side in networks:
        if options.model:
            network = open_network(options.model, options.device)
        else:
            size = sizes()[name]
            network = build_network(size, options.device, torch.float32)
            side = size.latent_px * network.prior.factor
        for row in measure_precision(network, side, options.device, count=options.pictures):
            line = json.dumps({"network": name, **row})
            print(line, flush=True)
            with options.out.open("a", encoding="utf-8") as stream:
                stream.write(line + "\n")


if __name__ == "__main__":
    main()
