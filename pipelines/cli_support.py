"""What the verbs of `restoray` share: completion, words into values, results into lines. Nothing slow is imported."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from pipelines.console import Console
from pipelines.errors import EXIT_QUARANTINED, RestorayError, UsageError, unknown

if TYPE_CHECKING:
    from components.corpora import CaptionSpec
    from pipelines.curate import CurateResult
    from pipelines.plans import PlanResult


class Command(TyperCommand):
    """A verb whose mistyped option dies with the near one named, as every other name does."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the words after the verb."""
        try:
            return super().parse_args(ctx, args)
        except Exception as error:  # the parser's own classes are private to typer
            near = getattr(error, "possibilities", None)
            if not near:
                raise
            raise UsageError(
                f'no such option "{getattr(error, "option_name", "")}". Did you mean "{near[0]}"?'
            ) from error


# -- completion ------------------------------------------------------------------------------------------------------


def complete_recipe(incomplete: str) -> list[str]:
    """Shipped recipes that start so."""
    return complete("recipes", incomplete)


def complete_plan(incomplete: str) -> list[str]:
    """Shipped plans that start so."""
    return complete("plans", incomplete)


def complete_spec(incomplete: str) -> list[str]:
    """Shipped corpus specs that start so."""
    return complete("datasets", incomplete)


def complete_preset(incomplete: str) -> list[str]:
    """Degradation presets that start so."""
    from components.degradations import PRESETS

    return [name for name in PRESETS if name.startswith(incomplete)]


def complete_captioner(incomplete: str) -> list[str]:
    """Captioners that start so."""
    from components.captions.presets import PRESETS

    return [name for name in PRESETS if name.startswith(incomplete)]


def complete_role(incomplete: str) -> list[str]:
    """Roles of corpora that start so."""
    from pipelines.catalogue import ROLES

    return [name for name in ROLES if name.startswith(incomplete)]


def complete(kind: str, incomplete: str) -> list[str]:
    """Names of shipped YAML files that start with what was typed."""
    from pipelines.home import shipped

    return [name for name in shipped(kind) if name.startswith(incomplete)]


# -- words into values -------------------------------------------------------------------------------------------------


def local_model(name: str) -> Path | str:
    """models:/name@alias becomes the folder it points at in the newest run that has it; all else stays as it is.

    Raises:
        UsageError: no run here or under RESTORAY_HOME has such a model.
    """
    if not name.startswith("models:/"):
        return Path(name) if Path(name).exists() else name
    from pipelines.home import runs_folder
    from pipelines.tracking import resolve

    stores = [store for root in (Path("runs"), runs_folder()) for store in root.glob("*/mlflow.db")]
    reason = "no run with an mlflow.db is in ./runs or under RESTORAY_HOME"
    for store in sorted(stores, key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            return resolve(name, store.parent)
        except RestorayError as error:
            reason = str(error)
    raise UsageError(f'no model "{name}": {reason}')


def named_folders(inputs: Sequence[str]) -> dict[str, Path]:
    """NAME=FOLDER pairs; every folder must exist."""
    folders: dict[str, Path] = {}
    for pair in inputs:
        name, equals, folder = pair.partition("=")
        if not equals or not name:
            raise UsageError(f'--input "{pair}" is not NAME=FOLDER.')
        if not Path(folder).is_dir():
            raise UsageError(f"--input {name}: there is no folder {folder}.")
        folders[name] = Path(folder)
    return folders


def parse_options(pairs: Sequence[str]) -> dict[str, Any]:
    """key=value pairs with YAML values: numbers, booleans and lists come out as such."""
    from omegaconf import OmegaConf

    for pair in pairs:
        if "=" not in pair or pair.startswith("="):
            raise UsageError(f'"{pair}" is not key=value.')
    return {str(k): v for k, v in OmegaConf.to_container(OmegaConf.from_dotlist(list(pairs))).items()}  # type: ignore[union-attr]


COMPILE = ("off", "autoencoder", "blocks", "whole")
"""What of a restorer's networks goes through torch.compile, from nothing to all."""

Device = Annotated[str, typer.Option(help="Where the networks run: cpu or cuda.")]
Precision = Annotated[str, typer.Option(help="Of the weights: fp32, bf16 or fp16.")]
Compile = Annotated[
    str,
    typer.Option(
        "--compile",
        help=f"What goes through torch.compile: {', '.join(COMPILE)}. Minutes at first, then faster; bits may differ.",
    ),
]


def build_options(device: str, precision: str, compiled: str = "off") -> dict[str, Any]:
    """How a restorer is built, without what is the default anyway: records of earlier jobs say nothing of it.

    Raises:
        UsageError: a name that does not exist.
    """
    devices, precisions = ("cpu", "cuda"), ("fp32", "bf16", "fp16")
    for kind, name, known in (
        ("device", device, devices),
        ("precision", precision, precisions),
        ("compile", compiled, COMPILE),
    ):
        if name not in known:
            raise unknown(kind, name, known)
    options: dict[str, Any] = {"device": device, "precision": precision, "speed": {"compile": compiled}}
    usual = {"device": "cpu", "precision": "fp32", "speed": {"compile": "off"}}
    return {k: v for k, v in options.items() if v != usual[k]}


def caption_spec(model: str, options: Mapping[str, Any]) -> CaptionSpec:
    """A caption stage's settings from the command line; UsageError with the near name for an unknown one."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from components.corpora import CaptionSpec

    try:
        merged = OmegaConf.merge(OmegaConf.structured(CaptionSpec), dict(options) | {"model": model})
        spec = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise UsageError(" ".join(str(error).split())) from error
    assert isinstance(spec, CaptionSpec)
    return spec


def plain(value: Any) -> dict[str, Any]:
    """A result for --json: a dataclass or a mapping as plain data."""
    if hasattr(value, "to_json"):
        return dict(value.to_json())
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else dict(value)  # type: ignore[arg-type]


def yaml_text(document: Mapping[str, Any]) -> str:
    """A resolved document as YAML that can be saved and run again."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(dict(document))).rstrip()


# -- results into lines ------------------------------------------------------------------------------------------------


def plan_lines(result: PlanResult) -> list[str]:
    """--dry-run for people: each stage with its digest, state and resolved settings."""
    from omegaconf import OmegaConf

    lines = [f"plan {result.plan} in {result.run_dir}"]
    for number, record in enumerate(result.stages, 1):
        stage = record.stage
        state = {"done": "done, would be skipped"}.get(record.state, "would run")
        if state == "would run" and (result.run_dir / stage.folder).is_dir():
            state = "interrupted, would go on"
        needs = f" after {', '.join(stage.needs)}" if stage.needs else ""
        lines.append(f"\n{number}. {stage.name}: {stage.verb}{needs}; {stage.folder}; {state}")
        lines += [f"     {line}" for line in OmegaConf.to_yaml(OmegaConf.create(dict(stage.resolved))).splitlines()]
    return lines


def end_curation(result: CurateResult, out: Path, console: Console) -> None:
    """What curate and replay say at their end."""
    reasons = ", ".join(f"{count} {code}" for code, count in result.reasons.items())
    lines = [f"{result.accepted} accepted, {result.rejected} quarantined{f' ({reasons})' if reasons else ''}; {out}"]
    console.result(plain(result), [*lines, f"look at {result.report}"])
    raise typer.Exit(EXIT_QUARANTINED if result.rejected else 0)
