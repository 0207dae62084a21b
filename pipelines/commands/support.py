"""Helpers of the commands: completion, arguments to values, results to lines. It imports nothing slow."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from components.options import TEXTS
from pipelines.core.console import Console
from pipelines.core.environment import use_address
from pipelines.core.errors import EXIT_QUARANTINED, UsageError, unknown
from pipelines.core.home import shipped_files
from pipelines.core.places.addresses import is_address, refuse_address

if TYPE_CHECKING:
    from components.corpora import CaptionSpec
    from components.images import Limits
    from pipelines.core.places.place import Where
    from pipelines.curation.curate import CurateResult
    from pipelines.runs.records import PlanResult

COMPILE_MODES = ("off", "autoencoder", "blocks", "whole")
"""Which networks of a restorer torch.compile compiles, from none to all."""

MAX_LIMIT = 1e9
"""Largest value of --max-megapixels and --max-megabytes; ours, far above any picture."""

PLACES = frozenset({"corpus", "hq", "images", "lq", "out", "reference", "restored", "run_dir", "source"})
"""Parameters that may be an address in a store, where a command takes them as a text."""

Device = Annotated[str, typer.Option(help="Device of the networks: cpu, or cuda for a GPU.")]

Precision = Annotated[str, typer.Option(help="Precision of the weights: fp32, bf16, fp16; fp8 for some systems.")]

Compile = Annotated[
    str,
    typer.Option(
        "--compile",
        help=f"Networks for torch.compile: {', '.join(COMPILE_MODES)}; the start takes minutes, and bits may differ.",
    ),
]

Offload = Annotated[
    bool,
    typer.Option("--offload", help="For small GPUs: networks are there in turns, where the model's system can do it."),
]


class Command(TyperCommand):
    """A command that answers a mistyped option with the nearest option's name, and joins the cluster of --address."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments of the command."""
        given = list(args)  # the parser empties it
        try:
            rest = super().parse_args(ctx, args)
        except Exception as error:  # the parser's error classes are private to typer
            suggestions = getattr(error, "possibilities", None)
            if not suggestions:
                raise
            raise UsageError(
                f'no such option "{getattr(error, "option_name", "")}". Did you mean "{suggestions[0]}"?'
            ) from error
        if any(text == "" or re.fullmatch("--[a-z-]+=", text) for text in given):
            _refuse_empty_paths(ctx.params)
        if any(":/" in text for text in given):
            _refuse_addresses(ctx.params)
        use_address(ctx.params.get("address"))
        return rest


def _refuse_empty_paths(values: Mapping[str, Any]) -> None:
    """A path from an empty variable ("--out $OUT") would name the working directory."""
    for name, value in values.items():
        if Path() in (value if isinstance(value, list) else [value]) or (value == "" and name in PLACES):
            raise UsageError(f'the path of {name} is empty; "." names this folder.')


def _refuse_addresses(values: Mapping[str, Any]) -> None:
    """A store's address in the place of a path would become a folder called "s3:"."""
    for name, value in values.items():
        for path in value if isinstance(value, list) else [value]:
            if isinstance(path, Path):
                refuse_address(path, name)


def picture_limits(max_megapixels: float, max_megabytes: float | None) -> Limits:
    """Return the limits of input pictures that the options --max-megapixels and --max-megabytes set."""
    from components.images import limits_for_any_shape

    for name, value in (("--max-megapixels", max_megapixels), ("--max-megabytes", max_megabytes)):
        if value is not None and not value <= MAX_LIMIT:  # also refuses NaN
            raise UsageError(f"{name} must be a number up to {MAX_LIMIT:g}, got {value:g}.")
    max_bytes = None if max_megabytes is None else max(1, round(max_megabytes * 1e6))
    return limits_for_any_shape(max(1, round(max_megapixels * 1e6)), max_bytes)


# -- completion --------------------------------------------------------------------------------------------------------


def complete_recipe(incomplete: str) -> list[str]:
    """Shipped recipes whose names start with `incomplete`."""
    return complete("recipes", incomplete)


def complete_plan(incomplete: str) -> list[str]:
    """Shipped plans whose names start with `incomplete`."""
    return complete("plans", incomplete)


def complete_spec(incomplete: str) -> list[str]:
    """Shipped corpus specs whose names start with `incomplete`."""
    return complete("datasets", incomplete)


def complete_preset(incomplete: str) -> list[str]:
    """Degradation presets whose names start with `incomplete`."""
    from components.degradations import PRESETS

    return [name for name in PRESETS if name.startswith(incomplete)]


def complete_captioner(incomplete: str) -> list[str]:
    """Captioners whose names start with `incomplete`."""
    from components.captions.presets import PRESETS

    return [name for name in PRESETS if name.startswith(incomplete)]


def complete_role(incomplete: str) -> list[str]:
    """Roles of corpora whose names start with `incomplete`."""
    from pipelines.corpus.catalogue import ROLES

    return [name for name in ROLES if name.startswith(incomplete)]


def complete(kind: str, incomplete: str) -> list[str]:
    """Names of the shipped YAML files of a kind that start with `incomplete`."""
    return [name for name in shipped_files(kind) if name.startswith(incomplete)]


# -- arguments to values -----------------------------------------------------------------------------------------------


def input_folders(inputs: Sequence[str]) -> dict[str, Path]:
    """The folders of NAME=FOLDER pairs, by name; a folder in a store is fetched. UsageError if one does not exist."""
    from pipelines.core.places.place import place_of

    folders: dict[str, Path] = {}
    for pair in inputs:
        name, equals, folder = pair.partition("=")
        if not equals or not name:
            raise UsageError(f'--input "{pair}" is not NAME=FOLDER.')
        path = _fetched(place_of(folder)) if is_address(folder) else Path(folder)
        if not path.is_dir():
            raise UsageError(f"--input {name}: there is no folder {folder}.")
        folders[name] = path
    return folders


def stored_inputs(inputs: Sequence[str], without: Collection[str] = ()) -> list[Where]:
    """The folders in stores among NAME=FOLDER pairs, without some names: each node reads a corpus by itself."""
    from pipelines.core.places.place import place_of

    folders = (folder for name, _, folder in (pair.partition("=") for pair in inputs) if name not in without)
    return [place_of(folder) for folder in folders if is_address(folder)]


def _fetched(where: Where) -> Path:
    """A corpus or the folder of a stage in a store, as a folder of this machine."""
    from pipelines.core.places.working_copy import local_copy
    from pipelines.corpus.stored import corpus_folder

    return corpus_folder(where) if (where / "index.json").is_file() else local_copy(where)


def parse_options(pairs: Sequence[str]) -> dict[str, Any]:
    """The values of key=value pairs: prompts as they were typed, others as numbers, booleans, lists or texts.

    Raises:
        UsageError: a pair has a wrong form.
    """
    from components.overrides import read_options

    try:
        return read_options(pairs, TEXTS)
    except ValueError as error:
        raise UsageError(str(error)) from error


def build_options(device: str, precision: str, compile_mode: str = "off", offload: bool = False) -> dict[str, Any]:
    """The options with which a restorer is built. Defaults are left out, so that records of earlier jobs still match.

    Raises:
        UsageError: the device, precision or compile mode does not exist.
    """
    devices, precisions = ("cpu", "cuda"), ("fp32", "bf16", "fp16", "fp8")
    for kind, name, choices in (
        ("device", device, devices),
        ("precision", precision, precisions),
        ("compile", compile_mode, COMPILE_MODES),
    ):
        if name not in choices:
            raise unknown(kind, name, choices)
    options: dict[str, Any] = {"device": device, "precision": precision, "speed": {"compile": compile_mode}}
    options["offload"] = offload
    defaults = {"device": "cpu", "precision": "fp32", "speed": {"compile": "off"}, "offload": False}
    return {k: v for k, v in options.items() if v != defaults[k]}


def caption_spec(model: str, overrides: Sequence[str] = ()) -> CaptionSpec:
    """A captioner's settings from the command line. Raises UsageError for an unknown setting."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from components.corpora import CaptionSpec
    from components.overrides import apply_overrides

    try:
        spec = OmegaConf.to_object(apply_overrides(CaptionSpec, {}, [*overrides, f"model={model}"]))
    except (OmegaConfBaseException, ValueError) as error:
        raise UsageError(" ".join(str(error).split())) from error
    assert isinstance(spec, CaptionSpec)
    return spec


def plain(value: Any) -> dict[str, Any]:
    """A dataclass or mapping as plain data, for --json."""
    if hasattr(value, "to_json"):
        return dict(value.to_json())
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else dict(value)  # type: ignore[arg-type]


def yaml_text(document: Mapping[str, Any]) -> str:
    """A resolved document as YAML, which can be saved and run again."""
    from components.overrides import yaml_text as text_of

    return text_of(document).rstrip()


# -- results to lines --------------------------------------------------------------------------------------------------


def plan_lines(result: PlanResult) -> list[str]:
    """The lines of --dry-run: each stage with its folder, state and resolved settings."""
    lines = [f"plan {result.plan} in {result.run_dir}"]
    for number, record in enumerate(result.stages, 1):
        stage = record.stage
        state = {"done": "done, would be skipped"}.get(record.state, "would run")
        if state == "would run" and (result.run_dir / stage.folder).is_dir():
            state = "interrupted, would continue"
        needs = f" after {', '.join(stage.needs)}" if stage.needs else ""
        lines.append(f"\n{number}. {stage.name}: {stage.verb}{needs}; {stage.folder}; {state}")
        lines += [f"     {line}" for line in yaml_text(stage.resolved).splitlines()]
    return lines


def end_curation(result: CurateResult, out: Where, console: Console) -> None:
    """Print the result of curate or replay, and exit."""
    for note in result.notes:
        console.say(note)
    reasons = ", ".join(f"{count} {code}" for code, count in result.reasons.items())
    lines = [f"{result.accepted} accepted, {result.rejected} quarantined{f' ({reasons})' if reasons else ''}; {out}"]
    console.result(plain(result), [*lines, f"look at {result.report}"])
    raise typer.Exit(EXIT_QUARANTINED if result.rejected else 0)
