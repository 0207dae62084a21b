"""Recipes: a dataclass (names, types, units, defaults), then YAML (a paper's numbers), then key=value overrides.

A recipe is resolved once, on the driver. A wrong key, type or name raises an error there that suggests the right one.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from components.evaluation import MIN_PICTURES, TOO_FEW
from components.naming import did_you_mean, near_name
from components.overrides import PROMPTS, OverrideError, apply_overrides

CAPTIONERS = ("", "manifest", "tags", "negative")
"""Sources of a stream's captions, in addition to "column:NAME"."""

CORPUS: Mapping[str, float] = {"corpus": 1.0}
"""Default of Recipe.sources."""


class RecipeError(ValueError):
    """A recipe, or a name in it, is wrong; the message names it and suggests the right one."""


ADDED_LATER = {"added_later": True}
"""Metadata of a setting that runs and models of earlier versions do not have; identity() leaves its default out."""


@dataclass(kw_only=True)
class Optimizer:
    """AdamW and its learning rate schedule."""

    lr: float = 1e-4
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    weight_decay: float = 1e-2
    eps: float = 1e-8
    clip_norm: float = 1.0
    warmup_steps: int = 0
    schedule: Literal["constant", "cosine"] = "constant"
    max_bad_steps: int = 10  # the run ends after this many steps in a row without a finite gradient

    def __post_init__(self) -> None:
        if not 0 < self.lr < math.inf or self.clip_norm <= 0 or self.max_bad_steps < 1:
            raise RecipeError(
                "optimizer.lr and optimizer.clip_norm must be positive, lr finite, max_bad_steps at least 1"
            )
        if len(self.betas) != 2:
            raise RecipeError(f"optimizer.betas needs two numbers, got {self.betas}")

    def lr_at(self, step: int, steps: int) -> float:
        """Learning rate of a step (0-based) of `steps`: linear warm-up, then constant or half a cosine to zero."""
        factor = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        if self.schedule == "constant":
            return self.lr * factor
        progress = max(0, step - self.warmup_steps) / max(1, steps - self.warmup_steps)
        return self.lr * factor * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


@dataclass(kw_only=True)
class DegradationChoice:
    """The degradation that makes lq: the name of a preset, and options that replace its numbers."""

    preset: str = "realesrgan"
    options: dict[str, Any] = field(default_factory=dict)
    degrade_on: Literal["stream", "device"] = "stream"  # in the data workers, or batched on the training device


@dataclass(kw_only=True)
class MissingCaptions:
    """A captioner that writes missing captions during training; dead leaves get none."""

    model: str = ""  # a preset of components.captions, a hub id or a folder; "": no captioner
    revision: str = ""  # revision of a hub model
    prompt: str = ""  # "": the preset's
    max_tokens: int = 0  # most tokens of a caption; 0: the preset's
    view: str = "hq"  # the picture to caption: hq, lq, or a view of the system
    batch_size: int = 8  # pictures per call

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.max_tokens < 0:
            raise RecipeError("missing_captions needs batch_size >= 1 and max_tokens >= 0")


SHARD_READS = ("auto", "whole", "ranged")
"""How a training reads the shards of corpora in stores."""


@dataclass(kw_only=True)
class Placement:
    """Resources of a stage. They are not part of its identity: the same recipe gives the same data anywhere."""

    workers: int = 1
    cpus_per_worker: float = 1.0
    gpus_per_worker: float = 0.0
    threads: int = 0  # torch threads of a worker; 0: (cores - 1) / workers
    max_failures: int = 2  # most restarts from the last checkpoint
    memory_gib_per_worker: float = 0.0  # for Ray's placement; it enforces none
    resources_per_worker: dict[str, float] = field(default_factory=dict)  # the cluster's own
    labels: dict[str, str] = field(default_factory=dict)  # that the nodes of workers must have
    wait_minutes: float = 0.0  # for nodes that an autoscaler may start
    captioners: int = 1  # actors that write missing captions, anywhere in the cluster; unused without a captioner
    cpus_per_captioner: float = 1.0
    gpus_per_captioner: float = 0.0
    data_tasks: int = 2  # data tasks of a worker at a time, on its node while it has free CPUs
    shard_reads: str = "auto"  # shards in stores: "whole", "ranged", or "auto" (pipelines/stream/ahead.py has the rule)
    shard_fetches: int = 4  # whole shards that a node fetches at a time, ahead of their use
    cache_gib: float = 0.0  # cap of a node's cache of shards; 0: half of the disk's free bytes
    caption_cache: str = ""  # folder that all nodes share; "": RESTORAY_HOME/cache/captions

    def __post_init__(self) -> None:
        shares = (
            self.cpus_per_worker,
            self.gpus_per_worker,
            self.memory_gib_per_worker,
            self.wait_minutes,
            self.cache_gib,
            self.cpus_per_captioner,
            self.gpus_per_captioner,
            *self.resources_per_worker.values(),
        )
        counts = (
            *(self.workers - 1, self.captioners - 1, self.data_tasks - 1, self.shard_fetches - 1),
            *(self.threads, self.max_failures),
        )
        if min(counts) < 0 or not all(0 <= share < math.inf for share in shares):
            raise RecipeError(
                "placement needs workers, captioners, data_tasks and shard_fetches >= 1, threads and max_failures "
                ">= 0, and shares of CPUs, GPUs, memory, cache and resources that are numbers of at least 0"
            )
        if self.shard_reads not in SHARD_READS:
            raise RecipeError(
                f"placement.shard_reads must be one of {', '.join(SHARD_READS)}, got {self.shard_reads!r}. "
                f"{did_you_mean(self.shard_reads, SHARD_READS)}"
            )


@dataclass(kw_only=True)
class Gate:
    """How much worse a distilled student may be than its teacher, measured on single held-out pictures.

    Attributes:
        psnr_db: largest mean loss of PSNR in dB.
        perceptual: largest mean loss of `metric`, as a share of the teacher's mean.
        metric: perceptual metric by pyiqa's name; the default needs no download ("lpips" fetches weights).
        pictures: most held-out pictures; at least MIN_PICTURES, because fewer cannot pass a student.
        teacher_options, student_options: restorer options (steps, guidance, prompt), since quality depends on them.
            Neither restorer has a default prompt.
    """

    psnr_db: float = 0.5
    perceptual: float = 0.02
    metric: str = "gmsd"
    pictures: int = 64
    teacher_options: dict[str, Any] = field(default_factory=dict, metadata=PROMPTS)
    student_options: dict[str, Any] = field(default_factory=dict, metadata=PROMPTS)

    def __post_init__(self) -> None:
        if min(self.psnr_db, self.perceptual) < 0:
            raise RecipeError("gate needs psnr_db and perceptual of at least 0")
        if self.pictures < MIN_PICTURES:
            raise RecipeError(
                f"gate.pictures={self.pictures} is {TOO_FEW} whether a student is as good as its teacher; "
                f"at least {MIN_PICTURES} are needed"
            )
        if self.metric in ("", "psnr"):
            raise RecipeError(f"gate.metric must be a metric other than psnr, got {self.metric!r}")


@dataclass(kw_only=True)
class Recipe:
    """The fields that all training stages share."""

    name: str = MISSING
    system: str = MISSING
    stage: str = MISSING
    seed: int = 0
    steps: int = MISSING
    batch_size: int = MISSING  # pictures per step, over all workers and micro-batches
    accumulation: int = 1  # micro-batches per step
    resolution: int = 1024  # pixels, square crops
    short_side: int = 1024  # pixels; pictures are resized to this short side before the crop
    scale: list[float] = field(default_factory=lambda: [1.0, 1.0])  # range of a factor on short_side, drawn per picture
    small: Literal["enlarge", "refuse"] = "enlarge"  # pictures below short_side
    buckets: list[list[int]] = field(default_factory=list)  # [height, width] instead of squares; one per global batch
    crop: Literal["random", "center"] = "random"
    flip: bool = False  # mirror each crop with probability 1/2
    turn: bool = field(default=False, metadata=ADDED_LATER)  # by a random multiple of 90 degrees (180 if no square)
    # Random gamma up to e to this power either way, and a quarter of the power for each colour.
    relight: float = field(default=0.0, metadata=ADDED_LATER)
    window_samples: int = 65_536  # samples shuffled together; the order of shards is shuffled too
    mixture: str = ""  # a name in pipelines/mixtures or a path; its sources and captioners replace the recipe's
    sources: dict[str, float] = field(default_factory=dict)  # input name (or dead_leaves): weight; 0 excludes it
    captioner: str = "manifest"  # "" (none), manifest, tags, column:NAME, or negative (manifest, required)
    captioners: dict[str, str] = field(default_factory=dict)  # captioner by source, if it differs
    missing_captions: MissingCaptions = field(default_factory=MissingCaptions)
    latents: str = ""  # column of precomputed latents; the autoencoder then does not encode
    embeddings: str = ""  # column of precomputed prompt embeddings; the text encoders then do not run
    degradation: DegradationChoice = field(default_factory=DegradationChoice)
    pairs: str = ""  # column of the lq pictures ("lq" if curation wrote it); there is then no degradation
    unpaired: str = ""  # name of an input whose pictures are lq; they do not match the targets
    prompt: str = ""  # template of prompts, with {caption} for the caption; "": the caption alone
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"  # of forward passes; trained weights stay float32
    optimizer: Optimizer = field(default_factory=Optimizer)
    ema_decay: float = 0.0  # 0: off
    checkpoint_every: int = 1000  # steps
    evaluate_every: int = 1000  # steps; held-out loss, and pictures if the system makes them
    heldout_triples: int = 64  # fixed (sample, timestep, noise) triples of the held-out loss
    prior: str = "stabilityai/stable-diffusion-xl-base-1.0"  # shipped name, model folder, diffusers folder or hub id
    placement: Placement = field(default_factory=Placement)

    # recipes of some systems override these with keys of the same names

    @property
    def warm_start(self) -> str:
        """Model folder or name of the initial weights; "" for none."""
        return ""

    @property
    def coarse(self) -> str:
        """Model folder or name of the coarse restorer; "" for none."""
        return ""

    @property
    def encoder(self) -> str:
        """Model folder or name of a frozen encoder of LQ; "" for none."""
        return ""

    @property
    def teacher(self) -> str:
        """Model folder or name of the model to distil; the gate compares the result with it."""
        return ""

    @property
    def loss_weights(self) -> Mapping[str, str]:
        """Files, folders or names of the weights of the losses' networks, by the recipe's key."""
        return {}

    @property
    def distil(self) -> bool:
        """Whether the stage needs a teacher."""
        return False

    @property
    def student_gate(self) -> Gate | None:
        """How much worse the result may be than its teacher; None without a teacher."""
        return None

    @property
    def trains_prior(self) -> bool:
        """Whether the stage trains a prior, so that a warm start is one."""
        return False

    @property
    def opens_prior(self) -> bool:
        """Whether the stage uses `prior`; a stage that trains a prior does not."""
        return True

    def __post_init__(self) -> None:
        positive = ("steps", "batch_size", "accumulation", "resolution", "short_side", "checkpoint_every")
        for name in positive:
            if getattr(self, name) < 1:
                raise RecipeError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.short_side < self.resolution:
            raise RecipeError(f"short_side ({self.short_side}) must not be below resolution ({self.resolution})")
        if self.batch_size % (self.accumulation * self.placement.workers):
            raise RecipeError(
                f"batch_size {self.batch_size} is not a multiple of accumulation x workers "
                f"({self.accumulation} x {self.placement.workers})"
            )
        if not 0 <= self.relight <= 1:
            raise RecipeError(f"relight must be between 0 and 1, got {self.relight}")
        if not all(0 <= weight < math.inf for weight in self.sources.values()):
            raise RecipeError(f"sources needs finite weights of at least 0, got {self.sources}")
        self.sources = {k: weight for k, weight in (self.sources or CORPUS).items() if weight}
        if not self.sources:
            raise RecipeError("sources needs at least one weight above 0")
        for captioner in (self.captioner, *self.captioners.values()):
            if captioner not in CAPTIONERS and not captioner.startswith("column:"):
                near = did_you_mean(captioner, [name for name in CAPTIONERS if name])
                raise RecipeError(f'unknown captioner "{captioner}". {near}'.rstrip())
        lq_sources = bool(self.pairs) + bool(self.unpaired)
        if lq_sources > 1 or (lq_sources and self.degradation.preset != "none"):
            raise RecipeError(
                "lq comes from pairs, from another input (unpaired), or from a degradation: "
                "set only one of pairs and unpaired, and with either set degradation.preset=none"
            )
        if self.prompt and self.embeddings:
            raise RecipeError("precomputed embeddings belong to the captions alone: leave prompt or embeddings out")
        if not 0 <= self.ema_decay < 1:
            raise RecipeError(f"ema_decay must be in [0, 1), got {self.ema_decay}")


def resolve(schema: type[Any], document: Any, overrides: Sequence[str], what: str) -> Any:
    """Merge dataclass, document and overrides into a dataclass; raise RecipeError with a suggestion for a wrong key."""
    try:
        merged = apply_overrides(schema, document, overrides)
        missing = OmegaConf.missing_keys(merged)
        if missing:
            raise RecipeError(f"{what}: no value for {', '.join(sorted(missing))}")
        return OmegaConf.to_object(merged)
    except OverrideError as error:
        raise RecipeError(f"{what}: {error}") from error
    except OmegaConfBaseException as error:
        key = str(getattr(error, "full_key", "") or getattr(error, "key", "") or "")
        reason = str(error).splitlines()[0]
        hint = "" if "ean" in reason else _near_key(key, schema)
        raise RecipeError(f"{what}: {reason}{f' ({key})' if key and key not in reason else ''}{hint}") from error


def _near_key(key: str, schema: type[Any]) -> str:
    keys = list(_keys(schema))
    if not key or key in keys:
        return ""
    return f". {did_you_mean(key, keys)}" if near_name(key, keys) else ""


def _keys(schema: type[Any], prefix: str = "") -> Iterable[str]:
    for item in dataclasses.fields(schema):
        yield prefix + item.name
        factory = item.default_factory
        if isinstance(factory, type) and dataclasses.is_dataclass(factory):
            yield from _keys(factory, f"{prefix}{item.name}.")


def as_dict(recipe: Any) -> dict[str, Any]:
    """Return the resolved recipe as plain data."""
    return dataclasses.asdict(recipe)


def identity(recipe: Recipe) -> Mapping[str, Any]:
    """Return what determines a stage's result: the resolved recipe without placement, which may differ by machine.

    A setting that a later version added is left out at its default (ADDED_LATER), so runs and models of the versions
    before keep their digests.
    """
    return {name: value for name, value in _without_defaults(recipe).items() if name != "placement"}


def _without_defaults(settings: Any) -> dict[str, Any]:
    """A dataclass as plain data without later settings that have their defaults, at any depth of dataclasses."""
    document = {}
    for item in dataclasses.fields(settings):
        value = getattr(settings, item.name)
        if not (item.metadata.get("added_later") and value == item.default):
            is_nested = dataclasses.is_dataclass(value)
            document[item.name] = _without_defaults(value) if is_nested else copy.deepcopy(value)
    return document
