"""Plans: loads a YAML file and resolves its stages, each with the digest of everything that determines its result.

A stage's folder is <run>/<name>-<first 8 digits of the digest>/. Another recipe gives another digest and so another
folder: nothing is overwritten.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from components.naming import printable
from components.overrides import literal
from components.recipes import Recipe
from pipelines.core.errors import UsageError, first_line, unknown
from pipelines.core.home import shipped_files
from pipelines.runs.identity import stage_digest
from pipelines.runs.records import Plan, PlannedStage
from pipelines.runs.stages import VERBS
from pipelines.runs.verb import TrainSettings, Verb
from pipelines.training.recipes import (
    load_checked_recipe,
    recipe_documents,
    recipe_version,
    resolve_settings,
)

STAGE_NAME = re.compile(r"[a-z][a-z0-9-]{0,31}")


@dataclass(kw_only=True)
class PlanDocument:
    """A file in pipelines/plans/.

    Attributes:
        title: one line for people.
        workers: training workers of every train stage; 0 keeps each recipe's number. It is not part of a digest.
        free_mib: free disk space that the run needs before it starts.
        stages: mappings with name, verb, needs (names of earlier stages) and the verb's settings.
    """

    title: str = ""
    workers: int = 0
    free_mib: int = 500
    stages: list[dict[str, Any]] = field(default_factory=list)


def load_plan(
    name: str | Path,
    overrides: Sequence[str] = (),
    images: Path | None = None,
    verbs: Mapping[str, Verb] = VERBS,
) -> Plan:
    """Load and resolve a plan. Every name, key and value in it and in its recipes is checked before anything runs.

    Args:
        name: a shipped plan's name or a path to a YAML file.
        overrides: "workers=2" for the plan, "<stage>.<key>=value" for one stage's settings or recipe.
        images: a folder of photographs that replaces the sources of curate stages.
        verbs: the verbs that stages may name.

    Raises:
        UsageError: a name is unknown (the message suggests the nearest one) or a value has a wrong type.
    """
    path = plan_path(name)
    try:
        document = literal(OmegaConf.to_container(OmegaConf.load(path), resolve=True))
    except (OSError, YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise UsageError(f"{path.name} cannot be read as a plan: {first_line(error)}.") from error
    if not isinstance(document, dict) or not isinstance(document.get("stages"), list):
        raise UsageError(f"{path.name} is not a plan: it has no list of stages.")
    stages = [check_stage(stage, path.name, verbs) for stage in document["stages"]]
    names = [stage["name"] for stage in stages]
    if len(set(names)) < len(names):
        raise UsageError(f"{path.name}: two stages have the same name: {', '.join(names)}.")
    own, by_stage = split_overrides(overrides, names)
    head = resolve_settings(PlanDocument, {k: v for k, v in document.items() if k != "stages"}, own, path.name)

    stages_by_name: dict[str, PlannedStage] = {}
    model_recipes: dict[str, Recipe] = {}  # of the model that a stage trains or hands on
    for stage in stages:
        for need in stage["needs"]:
            if need not in stages_by_name:
                raise unknown(f"earlier stage in the needs of {stage['name']}", str(need), stages_by_name)
        inputs = {need: stages_by_name[need].digest for need in stage["needs"]}
        resolved = resolve_stage(stage, by_stage[stage["name"]], head.workers, inputs, images, verbs)
        parent_recipes = {need: model_recipes[need] for need in stage["needs"] if need in model_recipes}
        verb = verbs[stage["verb"]]
        verb.check(resolved.settings, resolved.recipe, parent_recipes)
        if resolved.recipe is not None:
            model_recipes[stage["name"]] = resolved.recipe
        elif verb.hands_on and parent_recipes:
            model_recipes[stage["name"]] = list(parent_recipes.values())[-1]
        stages_by_name[stage["name"]] = resolved
    origin = {"file": "" if str(name) in shipped_files("plans") else str(path.absolute()), "overrides": list(overrides)}
    return Plan(
        name=printable(path.stem),
        title=head.title,
        free_mib=head.free_mib,
        stages=tuple(stages_by_name.values()),
        origin=origin,
    )


def plan_path(name: str | Path) -> Path:
    """The YAML file of a plan's name or path."""
    plans = shipped_files("plans")
    path = plans.get(str(name)) or Path(name)
    if path.suffix not in (".yaml", ".yml") or not path.is_file():
        raise unknown("plan", str(name), plans)
    return path


def check_stage(stage: Any, where: str, verbs: Mapping[str, Verb]) -> dict[str, Any]:
    """A stage's mapping with `needs` filled in, after its name, verb and needs were checked."""
    if not isinstance(stage, dict) or not isinstance(stage.get("name"), str) or not isinstance(stage.get("verb"), str):
        raise UsageError(f"{where}: a stage needs a name and a verb, got {stage!r}.")
    if not STAGE_NAME.fullmatch(stage["name"]):
        raise UsageError(
            f'{where}: "{stage["name"]}" is not a stage name (a letter, then a-z, 0-9 and -, at most 32 characters).'
        )
    if stage["verb"] not in verbs:
        raise unknown("verb", stage["verb"], verbs)
    needs = stage.get("needs") or []
    if not isinstance(needs, list):
        raise UsageError(f"{where}: needs of {stage['name']} must be a list of stage names, got {needs!r}.")
    return {**stage, "needs": needs}


def split_overrides(overrides: Sequence[str], stages: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Overrides of the plan itself, and of each stage without the stage's name."""
    own: list[str] = []
    by_stage: dict[str, list[str]] = {name: [] for name in stages}
    plan_keys = [f.name for f in dataclasses.fields(PlanDocument) if f.name != "stages"]
    for override in overrides:
        key, equals, value = override.partition("=")
        head, dot, rest = key.partition(".")
        if not equals or not key:
            raise UsageError(f'"{override}" is not key=value.')
        if dot and head in by_stage:
            by_stage[head].append(f"{rest}={value}")
        elif key in plan_keys:
            own.append(override)
        elif dot or key in by_stage:
            raise (
                unknown("stage in the override", head, stages)
                if dot
                else UsageError(f'"{override}": name a key of stage {key}, as in {key}.KEY=value.')
            )
        else:
            raise unknown("plan key", key, [*plan_keys, *(f"{name}.KEY" for name in stages)])
    return own, by_stage


def resolve_stage(
    stage: Mapping[str, Any],
    overrides: Sequence[str],
    workers: int,
    inputs: Mapping[str, str],
    images: Path | None,
    verbs: Mapping[str, Verb],
) -> PlannedStage:
    """Resolve one stage's settings, recipe and digest."""
    name, verb = stage["name"], verbs[stage["verb"]]
    document = {key: value for key, value in stage.items() if key not in ("name", "verb", "needs")}
    trains = issubclass(verb.settings, TrainSettings)
    settings = resolve_settings(verb.settings, document, () if trains else overrides, f"stage {name}")
    recipe, resolved = None, dataclasses.asdict(settings)
    without = {item.name for item in dataclasses.fields(settings) if not item.metadata.get("identity", True)}
    identity: dict[str, Any] = {key: value for key, value in resolved.items() if key not in without}
    version = verb.version
    if trains:
        placement = [f"placement.workers={workers}"] if workers else []
        changes = [*settings.overrides, *placement, *overrides]
        recipe = load_checked_recipe(settings.recipe, changes, teacher_follows=bool(settings.teacher))
        resolved, identity = recipe_documents(recipe)
        version = recipe_version(recipe)
    own = {"verb": f"{stage['verb']} {verb.version}", "settings": identity}
    digest = stage_digest({**own, **verb.identity(settings, recipe, images)}, inputs, version)
    return PlannedStage(
        name=name,
        verb=stage["verb"],
        needs=tuple(stage["needs"]),
        settings=settings,
        recipe=recipe,
        resolved=resolved,
        digest=digest,
        version=version,
        folder=f"{name}-{digest[:8]}",
    )
