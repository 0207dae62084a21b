"""The records of a plan's verbs: their settings, the context of a stage, and what the engine needs of a verb."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.overrides import PROMPTS
from pipelines.core.console import Console
from pipelines.core.errors import Failure

if TYPE_CHECKING:
    from pipelines.runs.tracking import Tracker


@dataclass(kw_only=True)
class StageContext:
    """The context in which a stage runs.

    Attributes:
        plan, name, verb, digest: of the stage.
        run_dir, stage_dir: folders of the run and the stage; stage_dir exists and may hold an earlier attempt's work.
        inputs: folders of the stages that this one needs, by name, in the plan's order.
        settings: the verb's settings dataclass, resolved.
        recipe: the resolved recipe of a train stage, else None.
        images: the user's folder of photographs, which replaces the sources of a curate stage.
        tracker, tracking_run: the MLflow tracker and the stage's run; None without tracking.
        console: shows the progress.
        minutes: limit of a training's time; 0 for none.
    """

    plan: str
    name: str
    verb: str
    digest: str
    run_dir: Path
    stage_dir: Path
    inputs: Mapping[str, Path]
    settings: Any
    recipe: Any = None
    images: Path | None = None
    tracker: Tracker | None = None
    tracking_run: str | None = None
    console: Console = field(default_factory=Console)
    minutes: float = 0.0

    def find(self, relative: str) -> Path:
        """`relative` in the last input folder that has it, e.g. "model" or "index.json".

        Raises:
            Failure: no input folder has it.
        """
        for folder in reversed(list(self.inputs.values())):
            if (folder / relative).exists():
                return folder / relative
        raise Failure(f'stage "{self.name}" needs {relative}, and none of its inputs has it: {", ".join(self.inputs)}.')


NO_IDENTITY: Mapping[str, bool] = {"identity": False}
"""Metadata of a setting that is not part of a stage's digest."""


@dataclass(kw_only=True)
class CurateSettings:
    """Make a corpus.

    Attributes:
        spec: a corpus spec's name in datasets/ or a path.
        pictures: path of the spec's folder source that has none.
        overrides: key=value pairs that change the spec. A source of negatives without a path takes the corpus of a
            needed stage.
    """

    spec: str = "demo"
    overrides: list[str] = field(default_factory=list, metadata=NO_IDENTITY)  # the digest has the resolved spec
    pictures: str = field(default="", metadata=NO_IDENTITY)  # the digest has the pictures themselves


@dataclass(kw_only=True)
class TrainSettings:
    """Train a stage.

    Attributes:
        recipe: a name in pipelines/recipes/ or a path.
        overrides: key=value pairs that change it.
        teacher: name of a needed stage, whose model a distillation takes as its teacher.
        start: a model folder or shipped model with a packed state, from which the stage starts if the state is of its
            recipe; "" for none.
    """

    recipe: str = ""
    overrides: list[str] = field(default_factory=list)
    teacher: str = ""
    start: str = field(default="", metadata=NO_IDENTITY)


@dataclass(kw_only=True)
class RestoreSettings:
    """Degrade held-out pictures with a fixed seed and restore them.

    Attributes:
        preset, preset_options: the degradation, see components.degradations.
        pairs: column of the corpus with each picture's own input, used with preset none.
        seed: of the degradation and of the restoration.
        short_side: short side of the held-out pictures in pixels.
        limit: number of pictures; 0 takes all.
        options: of the restorer: steps, cfg_scale, ...; reference=hq uses each picture's target as its reference.
        placement: needs of the workers, see pipelines.core.placement.
    """

    preset: str = "realesrgan-nano"
    preset_options: dict[str, Any] = field(default_factory=dict)
    pairs: str = ""
    seed: int = 0
    short_side: int = 256
    limit: int = 0
    options: dict[str, Any] = field(default_factory=dict, metadata=PROMPTS)
    placement: dict[str, Any] = field(default_factory=dict, metadata=NO_IDENTITY)


@dataclass(kw_only=True)
class ChooseSettings:
    """Hand on the trained model, unless it is worse than another on held-out pictures.

    Attributes:
        model: that other model: a folder or a name.
        preset, preset_options, short_side: of the degraded pictures, see RestoreSettings.
        psnr_db, perceptual, metric, pictures: losses that are allowed, see components.recipes.Gate.
        placement: needs of the worker, see pipelines.core.placement.
    """

    model: str = "nano"
    preset: str = "realesrgan"
    preset_options: dict[str, Any] = field(default_factory=dict)
    short_side: int = 256
    psnr_db: float = 0.0
    perceptual: float = 0.0
    metric: str = "st_lpips"
    pictures: int = 24
    placement: dict[str, Any] = field(default_factory=dict, metadata=NO_IDENTITY)


@dataclass(kw_only=True)
class EvaluateSettings:
    """metrics: pyiqa names; an empty list takes the metrics that need no download."""

    metrics: list[str] = field(default_factory=list)


@dataclass(kw_only=True)
class StudySettings:
    """Study the models of needed stages on held-out pictures, see docs/insight.md.

    Attributes:
        study: "arms" compares sets of options and models by their results; others are of one system.
        arms: options by arm; `model` names a needed stage, or a list of them: trainings that differ in their seed. See
            pipelines.analysis.arms.
        paper: numbers of a paper by arm and column, printed beside ours; of study arms.
        preset: of the degradation.
        options: of the restorer, for all arms.
        metrics: more metrics; they may need weights.
        captioner: writes the captions of arms with `caption`.
        seed, limit: as in RestoreSettings.
        side_px: each picture's middle square is resized to this side.
    """

    study: str = "arms"
    arms: dict[str, dict[str, Any]] = field(default_factory=dict)
    paper: dict[str, dict[str, Any]] = field(default_factory=dict)
    preset: str = "realesrgan-nano"
    options: dict[str, Any] = field(default_factory=dict, metadata=PROMPTS)
    metrics: list[str] = field(default_factory=list)
    captioner: str = "tags"
    seed: int = 0
    limit: int = 0
    side_px: int = 256


@dataclass(kw_only=True)
class ServeCheckSettings:
    """timeout_s: limit for loading the model and for the answer to one picture. placement: needs of the restorer."""

    timeout_s: float = 300.0
    placement: dict[str, Any] = field(default_factory=dict, metadata=NO_IDENTITY)


@dataclass(frozen=True, kw_only=True)
class Verb:
    """One verb, as the engine needs it.

    Attributes:
        run: does the work and returns JSON-serialisable results.
        settings: dataclass of the keys that a stage may have besides name, verb and needs.
        version: raised by hand when equal settings give another result; part of the digest.
        uses_ray: whether Ray must run before the stage starts.
        hands_on: whether the stage's folder has the model of a stage that it needs, or another in its place.
        identity: (settings, recipe, images) -> what else determines the result, e.g. the source pictures; small plain
            data.
        check: (settings, own recipe or None, recipes of the needed stages' models by stage, in the order of the needs)
            -> None; raises UsageError for a name, a value or a missing need that only the verb can check. It runs when
            a plan is loaded, so it must not import torch or ray.
    """

    run: Callable[[StageContext], Mapping[str, Any]]
    settings: type
    version: int = 1
    uses_ray: bool = True
    hands_on: bool = False
    identity: Callable[[Any, Any, Path | None], Mapping[str, Any]] = lambda settings, recipe, images: {}
    check: Callable[[Any, Any, Mapping[str, Any]], None] = lambda settings, recipe, parent_recipes: None
