"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes settings for this run only.")
]
Out = Annotated[
    str | None, typer.Option("--out", "-o", help="The folder of the results, here or in a store: s3://bucket/folder.")
]
RequiredPlace = Annotated[
    str, typer.Option("--out", "-o", help="The folder of the results, here or in a store: s3://bucket/folder.")
]
Images = Annotated[Path | None, typer.Option("--images", help="Your own folder of photographs.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the resolved settings and do nothing.")]
Address = Annotated[
    str | None,
    typer.Option("--address", help="Join the Ray cluster at HOST:PORT, or auto; RAY_ADDRESS does the same."),
]
Placement = Annotated[
    list[str] | None,
    typer.Option(
        "--placement",
        metavar="KEY=VALUE",
        help="Needs of the workers: workers, cpus, gpus, memory_gib, resources.NAME, labels.NAME, wait_minutes.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output and no progress.")]
MaxMegapixels = Annotated[
    float, typer.Option("--max-megapixels", min=0.000001, help="Refuse inputs with more megapixels.")
]
MaxMegabytes = Annotated[
    float | None,
    typer.Option(
        "--max-megabytes", min=0.000001, help="Refuse larger files; by default 8 for each megapixel, at least 67."
    ),
]
SHIPPED_MODEL = "nano"
"""The restorer that is taken when no model is named."""

ModelsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--model",
        "-m",
        help="A model folder, models:/name@alias or a shipped name; several that share a prior: name each.",
        show_default=SHIPPED_MODEL,
    ),
]
