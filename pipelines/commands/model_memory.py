"""`restoray doctor --model M --size WxH`: whether a restoration fits on the device, and which switch makes it fit."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from components.models import ModelError, load_model
from components.systems import SYSTEMS
from pipelines.commands.findings import Finding, fail, ok, warn
from pipelines.core.errors import UsageError
from pipelines.core.memory import usable_memory
from pipelines.runs.registry import local_model

GIB = 2**30
RESERVE_GIB = 0.7
"""For the device's own context, the kernels' workspaces and the allocator's fragments; ours."""

SWITCHES: Sequence[tuple[str, Mapping[str, Any]]] = (
    ("as it is", {}),
    ("--precision bf16", {"precision": "bf16"}),
    ("--precision bf16 --offload", {"precision": "bf16", "offload": True}),
    ("--precision fp8 --offload", {"precision": "fp8", "offload": True}),
    ("--precision fp8 --offload tile_px=768", {"precision": "fp8", "offload": True, "tile_px": 768}),
    ("--precision fp8 --offload tile_px=512", {"precision": "fp8", "offload": True, "tile_px": 512}),
)
"""Switches from the cheapest on: half precision costs least, turns cost copies, 8 bits a little quality, small tiles
time."""


def read_size(text: str) -> tuple[int, int]:
    """(height, width) of a text such as 2048x1536, which has the width first; UsageError for another form."""
    match = re.fullmatch(r"(\d+)[xX](\d+)", text.strip())
    if match is None or not all(0 < int(side) <= 1 << 16 for side in match.groups()):
        raise UsageError(f"--size needs WIDTHxHEIGHT in pixels, such as 2048x1536, got {text!r}")
    return int(match[2]), int(match[1])


def device_memory() -> tuple[float, str]:
    """GiB that a restoration may take, and of what: the first GPU, or this machine."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0] / GIB, torch.cuda.get_device_name()
    return usable_memory() / GIB, "this machine's memory"


def examine_model(model: str, size: str, memory_gib: float | None = None) -> list[Finding]:
    """A finding for each set of switches, up to the first one that fits.

    Args:
        model: as for restore.
        size: WIDTHxHEIGHT at which the networks run.
        memory_gib: of the device; None takes this machine's.

    Raises:
        UsageError: no such model, a system without an estimate, or a wrong size.
    """
    pixels = read_size(size)
    try:
        folder = load_model(local_model(model))
    except ModelError as error:
        raise UsageError(str(error)) from error
    system = SYSTEMS[folder.info["system"]]
    networks = system.networks()
    plan_memory = networks.plan_memory
    if plan_memory is None:
        raise UsageError(f"a model of {folder.info['system']} has no estimate of its memory")
    available, place = (memory_gib, "the given memory") if memory_gib is not None else device_memory()
    findings = []
    for words, switches in SWITCHES:
        if switches.get("precision", "fp32") not in networks.precisions:
            continue
        build = {name: value for name, value in switches.items() if name in ("precision", "offload")}
        options = {name: value for name, value in switches.items() if name not in build}
        try:
            plan = plan_memory(folder, pixels, options, **build)
        except ModelError as error:
            raise UsageError(str(error)) from error
        needed = plan.total / GIB + RESERVE_GIB
        parts = ", ".join(f"{phase.name} {phase.weights / GIB:.1f} + {phase.peak / GIB:.1f}" for phase in plan.phases)
        text = f"{words}: about {needed:.1f} of {available:.1f} GiB ({place}); weights + work in GiB: {parts}"
        if needed <= available:
            findings.append(ok("model memory", text))
            return findings
        findings.append(warn("model memory", text, "Does not fit; the next line is smaller."))
    last = findings.pop()
    findings.append(fail("model memory", last.seen, "Nothing fits: take a smaller picture or a larger device."))
    return findings
