"""Recipes: dataclass (names, types, units, defaults), then YAML (a paper's numbers), then key=value (today's change).

A recipe is resolved once, on the driver. A wrong key, type or name dies there with the near one named.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from components.naming import did_you_mean, near_name

RECIPES = Path(__file__).resolve().parent.parent / "pipelines" / "recipes"
MIXTURES = RECIPES.parent / "mixtures"


class RecipeError(ValueError):
    """A recipe, or a name in it, is wrong; the message says which and what was probably meant."""


@dataclass(kw_only=True)
class Optimizer:
    """AdamW and its learning rate over steps."""

    lr: float = 1e-4
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    weight_decay: float = 1e-2
    eps: float = 1e-8
    clip_norm: float = 1.0
    warmup_steps: int = 0
    schedule: Literal["constant", "cosine"] = "constant"
    max_bad_steps: int = 10  # this many steps in a row without a finite gradient end the run

    def __post_init__(self) -> None:
        if self.lr <= 0 or self.clip_norm <= 0 or self.max_bad_steps < 1:
            raise RecipeError("optimizer.lr and optimizer.clip_norm must be positive, max_bad_steps at least 1")
        if len(self.betas) != 2:
            raise RecipeError(f"optimizer.betas needs two numbers, got {self.betas}")

    def lr_at(self, step: int, steps: int) -> float:
        """Learning rate of a step (0-based) of `steps`: linear warm-up, then constant or half a cosine to zero."""
        import math

        warm = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        if self.schedule == "constant":
            return self.lr * warm
        done = max(0, step - self.warmup_steps) / max(1, steps - self.warmup_steps)
        return self.lr * warm * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


CAPTIONERS = ("", "manifest", "tags", "negative")
"""Whose words a stream takes, besides "column:NAME"."""
CORPUS: Mapping[str, float] = {"corpus": 1.0}
"""The sources of a recipe that names none."""


@dataclass(kw_only=True)
class DegradationChoice:
    """Which degradation makes the LQ side: a preset's name and options that replace its numbers."""

    preset: str = "realesrgan"
    options: dict[str, Any] = field(default_factory=dict)
    degrade_on: Literal["stream", "device"] = "stream"  # in the data workers, or in a batch on the training device


@dataclass(kw_only=True)
class MissingCaptions:
    """A captioner that is asked, while training runs, for pictures without a caption (dead leaves stay without)."""

    model: str = ""  # a preset of components.captions, a hub id or a folder; "": nobody is asked
    revision: str = ""  # of a hub model
    prompt: str = ""  # "": the preset's
    max_tokens: int = 0  # longest caption; 0: the preset's
    view: str = "hq"  # what it looks at: hq, lq, or a view of the system's own
    batch_size: int = 8  # pictures a call

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.max_tokens < 0:
            raise RecipeError("missing_captions needs batch_size >= 1 and max_tokens >= 0")


@dataclass(kw_only=True)
class Placement:
    """Where a stage runs. Not part of a stage's identity: the same recipe gives the same data anywhere."""

    workers: int = 1
    cpus_per_worker: float = 1.0
    gpus_per_worker: float = 0.0
    threads: int = 0  # torch threads of a worker; 0: all cores but one, divided by the workers
    max_failures: int = 2  # restarts from the last checkpoint
    captioners: int = 1  # actors that write missing captions, anywhere in the cluster; none where nobody is asked
    cpus_per_captioner: float = 1.0
    gpus_per_captioner: float = 0.0
    caption_cache: str = ""  # folder that all nodes see; "": RESTORAY_HOME/cache/captions

    def __post_init__(self) -> None:
        if self.captioners < 1 or min(self.cpus_per_captioner, self.gpus_per_captioner) < 0:
            raise RecipeError("placement needs captioners >= 1, and no negative share of a CPU or GPU")


@dataclass(kw_only=True)
class Recipe:
    """What every training stage has in common."""

    name: str = MISSING
    system: str = MISSING
    stage: str = MISSING
    seed: int = 0
    steps: int = MISSING
    batch_size: int = MISSING  # pictures a step, over all workers and micro-batches
    accumulation: int = 1  # micro-batches a step
    resolution: int = 1024  # pixels, square crops
    short_side: int = 1024  # pixels; pictures are resized to this short side before the crop
    scale: list[float] = field(default_factory=lambda: [1.0, 1.0])  # factors on short_side, drawn a picture
    small: Literal["enlarge", "refuse"] = "enlarge"  # pictures below short_side
    buckets: list[list[int]] = field(default_factory=list)  # [height, width] instead of squares; one a global batch
    crop: Literal["random", "center"] = "random"
    flip: bool = False  # mirror half of the crops
    window_samples: int = 65_536  # samples shuffled together; shards are shuffled beyond that
    mixture: str = ""  # a name in pipelines/mixtures or a path: its sources and captioners replace the recipe's
    sources: dict[str, float] = field(default_factory=dict)  # input name (or dead_leaves): weight, 0 leaves it out
    captioner: str = "manifest"  # "" (none), manifest, tags, column:NAME, or negative (manifest, and never without)
    captioners: dict[str, str] = field(default_factory=dict)  # by source, where one has another captioner
    missing_captions: MissingCaptions = field(default_factory=MissingCaptions)
    latents: str = ""  # column of precomputed latents, which the autoencoder then need not encode
    embeddings: str = ""  # column of precomputed prompts, which the text encoders then need not embed
    degradation: DegradationChoice = field(default_factory=DegradationChoice)
    pairs: str = ""  # column with each picture's own input ("lq" where curation wrote it); nothing then degrades
    unpaired: str = ""  # name of an input whose pictures are the LQ side: they show other things than the targets
    prompt: str = ""  # what a row's prompt says, with its caption in the place of {caption}; "": the caption alone
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"  # of the forward passes; weights and autoencoder stay float32
    optimizer: Optimizer = field(default_factory=Optimizer)
    ema_decay: float = 0.0  # 0: off
    checkpoint_every: int = 1000  # steps
    evaluate_every: int = 1000  # steps; held-out loss, and pictures where the system has them
    heldout_triples: int = 64  # fixed (sample, timestep, noise) triples of the held-out loss
    prior: str = "stabilityai/stable-diffusion-xl-base-1.0"  # shipped name, model folder, diffusers folder or hub id
    placement: Placement = field(default_factory=Placement)

    def __post_init__(self) -> None:
        positive = ("steps", "batch_size", "accumulation", "resolution", "short_side", "checkpoint_every")
        for name in positive:
            if getattr(self, name) < 1:
                raise RecipeError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.short_side < self.resolution:
            raise RecipeError(f"short_side ({self.short_side}) must not be below resolution ({self.resolution})")
        if self.batch_size % (self.accumulation * self.placement.workers):
            raise RecipeError(
                f"batch_size {self.batch_size} is no multiple of accumulation x workers "
                f"({self.accumulation} x {self.placement.workers})"
            )
        if min(self.sources.values(), default=0.0) < 0:
            raise RecipeError(f"sources needs weights of at least 0, got {self.sources}")
        self.sources = {k: weight for k, weight in (self.sources or CORPUS).items() if weight}
        if not self.sources:
            raise RecipeError("sources needs at least one weight above 0")
        for captioner in (self.captioner, *self.captioners.values()):
            if captioner not in CAPTIONERS and not captioner.startswith("column:"):
                near = did_you_mean(captioner, [name for name in CAPTIONERS if name])
                raise RecipeError(f'unknown captioner "{captioner}". {near}'.rstrip())
        ready = bool(self.pairs) + bool(self.unpaired)
        if ready > 1 or (ready and self.degradation.preset != "none"):
            raise RecipeError(
                "lq comes from pairs, from another input (unpaired), or from a degradation: "
                "with either of the first two the other is empty, and degradation.preset is none"
            )
        if self.prompt and self.embeddings:
            raise RecipeError("precomputed embeddings are those of the captions alone: leave prompt or embeddings out")
        if not 0 <= self.ema_decay < 1:
            raise RecipeError(f"ema_decay must be in [0, 1), got {self.ema_decay}")


def recipe_names(folder: Path = RECIPES) -> list[str]:
    """Names of the recipes in a folder."""
    return sorted(p.stem for p in folder.glob("*.yaml"))


def load_recipe(name: str | Path, overrides: Sequence[str] = (), folder: Path = RECIPES) -> Recipe:
    """Resolve a recipe.

    Args:
        name: a recipe's name in `folder`, or a path to a YAML file.
        overrides: "key=value" changes, dots for nested keys.

    Raises:
        RecipeError: no such recipe or system, an unknown key, a wrong type, a value out of range, a missing value.
    """
    from components.systems import SYSTEMS

    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        path = folder / f"{name}.yaml"
        if not path.is_file():
            raise RecipeError(f"no recipe {str(name)!r}. {did_you_mean(str(name), recipe_names(folder))}")
    if not path.is_file():
        raise RecipeError(f"no recipe file {str(name)!r}")
    document = OmegaConf.load(path)
    if not isinstance(document, DictConfig):
        raise RecipeError(f"{path.name} is no recipe: it is not a mapping")
    document.setdefault("name", path.stem)
    system = document.get("system")
    if system not in SYSTEMS:
        raise RecipeError(f"{path.name}: unknown system {system!r}. {did_you_mean(str(system), SYSTEMS)}")
    schema = SYSTEMS[system].recipe
    for override in overrides:
        if override.startswith("mixture="):
            document["mixture"] = override.partition("=")[2]
    if document.get("mixture"):
        mixture = load_mixture(document["mixture"])
        document["sources"], document["captioners"] = mixture["sources"], mixture.get("captioners", {})
    recipe: Recipe = resolve(schema, document, overrides, path.name)
    known = {**CORPUS, **(document.get("sources") or {}), **recipe.sources}  # with those of weight 0
    for source in recipe.captioners:
        if source not in known:
            raise RecipeError(f"{path.name}: captioners names {source!r}, no source. {did_you_mean(source, known)}")
    if recipe.stage not in SYSTEMS[system].stages:
        raise RecipeError(
            f"{path.name}: unknown stage {recipe.stage!r}. {did_you_mean(recipe.stage, SYSTEMS[system].stages)}"
        )
    return recipe


def load_mixture(name: str | Path, folder: Path = MIXTURES) -> dict[str, Any]:
    """What a recipe's `mixture` stands for: {"sources": {input: weight}, "captioners": {input: captioner}}.

    Raises:
        RecipeError: no such mixture, or the file says something else.
    """
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        path = folder / f"{name}.yaml"
        if not path.is_file():
            raise RecipeError(f"no mixture {str(name)!r}. {did_you_mean(str(name), recipe_names(folder))}")
    if not path.is_file():
        raise RecipeError(f"no mixture file {str(name)!r}")
    document = OmegaConf.to_container(OmegaConf.load(path))
    said = {str(k): v for k, v in document.items()} if isinstance(document, dict) else {}
    wrong = [key for key in said if key not in ("sources", "captioners") or not isinstance(said[key], dict)]
    if wrong or not said.get("sources"):
        what = f"{wrong[0]!r} is none of them" if wrong else "there are no sources"
        raise RecipeError(f"{path.name}: a mixture maps sources to weights, and captioners to sources; {what}")
    return said


def resolve(schema: type[Any], document: Any, overrides: Sequence[str], what: str) -> Any:
    """Merge dataclass, document and overrides into a real dataclass; RecipeError with the near key otherwise."""
    for override in overrides:
        if "=" not in override or override.startswith("="):
            raise RecipeError(f"override {override!r} is not key=value")
    # "key=" empties a text; YAML would read nothing at all there
    overrides = [f'{override}""' if override.index("=") == len(override) - 1 else override for override in overrides]
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), document, OmegaConf.from_dotlist(list(overrides)))
        missing = OmegaConf.missing_keys(merged)
        if missing:
            raise RecipeError(f"{what}: no value for {', '.join(sorted(missing))}")
        return OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        key = str(getattr(error, "full_key", "") or getattr(error, "key", "") or "")
        first = str(error).splitlines()[0]
        hint = "" if "ean" in first else _near_key(key, schema)
        raise RecipeError(f"{what}: {first}{f' ({key})' if key and key not in first else ''}{hint}") from error


def _near_key(key: str, schema: type[Any]) -> str:
    known = list(_keys(schema))
    if not key or key in known:
        return ""
    return f". {did_you_mean(key, known)}" if near_name(key, known) else ""


def _keys(schema: type[Any], prefix: str = "") -> Iterable[str]:
    for item in dataclasses.fields(schema):
        yield prefix + item.name
        factory = item.default_factory
        if isinstance(factory, type) and dataclasses.is_dataclass(factory):
            yield from _keys(factory, f"{prefix}{item.name}.")


def as_dict(recipe: Any) -> dict[str, Any]:
    """The resolved recipe as plain data."""
    return dataclasses.asdict(recipe)


def identity(recipe: Recipe) -> Mapping[str, Any]:
    """The resolved recipe without what may change between machines (placement)."""
    return {k: v for k, v in as_dict(recipe).items() if k != "placement"}
