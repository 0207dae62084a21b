"""Packed training states next to a model folder: `state/` holds what a training needs to go on from the model.

state/state.json            step, recipe (digest), progress, and the curve of the held-out losses so far
state/tensors.safetensors   see components.packed_states
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from components.fingerprints import fingerprint
from components.images import decode
from components.recipes import Recipe, identity
from components.systems import SYSTEMS
from components.writing import replace_file
from pipelines.core.errors import Failure, UsageError
from pipelines.core.metrics import read_metrics
from pipelines.core.rows import json_text, read_lines
from pipelines.corpus.shards import STORED_LIMITS, open_corpus, read_sample
from pipelines.corpus.stored import stored_manifest
from pipelines.training.recipes import recipe_documents, recipe_version
from pipelines.training.stage_files import METRICS

if TYPE_CHECKING:
    from torch import Tensor

    from components.models import Model

STATE, STATE_JSON, TENSORS = "state", "state.json", "tensors.safetensors"


@dataclass(frozen=True, kw_only=True)
class Packed:
    """A packed state.

    Attributes:
        model: the folder next to it, with the averaged weights.
        folder: of the state.
        step: finished steps.
        recipe: digest of the recipe, see recipe_digest.
        progress: of the objective.
        curve: held-out values by name and step.
    """

    model: Model
    folder: Path
    step: int
    recipe: str
    progress: Mapping[str, float] = field(default_factory=dict)
    curve: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of components.packed_states."""
        from components.packed_states import read_state

        return read_state(self.folder / TENSORS)


def recipe_digest(recipe: Recipe) -> str:
    """Digest of what a packed state must agree with in a recipe.

    That is everything but the weights at the start, and the number of steps: more of them go on with the curve.
    """
    fields = {name: value for name, value in recipe_documents(recipe)[1].items() if name not in ("warm_start", "steps")}
    return hashlib.sha256(json.dumps([fields, recipe_version(recipe)], sort_keys=True).encode()).hexdigest()


def read_packed(model: str | Path) -> Packed:
    """The packed state next to a model folder or shipped model.

    Raises:
        UsageError: there is no model or no state, or the state is damaged.
    """
    from components.models import ModelError, load_model

    try:
        folder = load_model(model)
        state = folder.path / STATE
        document = json.loads((state / STATE_JSON).read_bytes())
        return Packed(
            model=folder,
            folder=state,
            step=int(document["step"]),
            recipe=str(document["recipe"]),
            progress={str(name): float(value) for name, value in document["progress"].items()},
            curve=document["curve"],
        )
    except (ModelError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{model} has no packed state to start from ({type(error).__name__}: {error}).") from error


def packed_start(model: str, recipe: Recipe) -> Path | None:
    """The folder of the model if its packed state is of this recipe, and not beyond its last step; else None.

    Raises:
        UsageError: see read_packed.
    """
    if not model:
        return None
    packed = read_packed(model)
    fits = packed.recipe == recipe_digest(recipe) and packed.step <= recipe.steps
    return packed.model.path if fits else None


def _without_places(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe without paths of this machine: of an absolute path the last name stays."""
    return {
        name: Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value
        for name, value in fields.items()
    }


def picture_list(corpus: Path, credits_by_file: Mapping[str, tuple[str, str]] = MappingProxyType({})) -> str:
    """A corpus' pictures as JSON lines: key, split, source, sha256, licence, credit and fingerprint.

    Args:
        corpus: its folder.
        credits_by_file: (licence, credit) by file name, for pictures whose source has none.
    """
    opened, lines = open_corpus(corpus), []
    manifest = {row["key"]: row for row in read_lines(stored_manifest(corpus))}
    for split in opened.splits:
        for number in range(len(opened.split(split))):
            key = opened.split(split).locate(number)[1]["key"]
            row = manifest[key]
            own_credit = credits_by_file.get(str(row["source"]).rpartition(":")[2], ("", ""))
            picture = decode(read_sample(opened, split, number), STORED_LIMITS, key)
            line = {
                "key": key,
                "split": split,
                "source": row["source"],
                "sha256": row["sha256"],
                "licence": row["licence"] or own_credit[0],
                "credit": row["credit"] or own_credit[1],
                "fingerprint": [f"{int(word):016x}" for word in fingerprint(picture)],
            }
            lines.append(json.dumps(line, sort_keys=True, ensure_ascii=False))
    return "\n".join(lines) + "\n"


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A stage of a run: its recipe, the model folders that it started from by their stages, and its folder."""

    recipe: Recipe
    inputs: Mapping[str, Path]
    folder: Path


def _averaged(stage: Trained) -> tuple[dict[str, Any], Any]:
    """The newest state of a stage, and its objective with the averaged weights.

    Raises:
        Failure: there is no checkpoint.
    """
    import torch

    from components.models import load_model
    from components.training import Ema, averaged_trainables, build_optimizers, restore_state

    states = sorted((stage.folder / "ray" / "run").glob("checkpoint_*/state.pt"))
    if not states:
        raise Failure(f"{stage.folder} has no checkpoint.")
    state: dict[str, Any] = torch.load(states[-1], weights_only=True, map_location="cpu")
    recipe, parents = stage.recipe, {name: load_model(folder) for name, folder in stage.inputs.items()}
    objective = SYSTEMS[recipe.system].build_objective(recipe, parents)
    ema = Ema(averaged_trainables(objective), recipe.ema_decay) if recipe.ema_decay else None
    restore_state(state, objective, build_optimizers(objective, recipe.optimizer), ema)
    if ema is not None:
        ema.swap_in().__enter__()  # the objective is thrown away
    return state, objective


def pack_stage(
    recipe: Recipe,
    inputs: Mapping[str, Path],
    stage: Path,
    out: Path,
    files: Mapping[str, str] = MappingProxyType({}),
    licence: str = "unstated",
    permitted_use: str = "unstated",
    state_of: Trained | None = None,
    eight_bit: int = 0,
) -> Packed:
    """Write a model folder in half precision with the averaged weights of a stage's newest checkpoint, and its state.

    Args:
        recipe: of the stage.
        inputs: model folders by the stage that trained them.
        stage: the stage's folder.
        state_of: an earlier stage, whose state is packed instead; its weights are those in the model.
        eight_bit: number of the largest matrices that are stored in 8 bits.
        out: the model folder; replaced.
        files: further text files of the folder by name.
        licence, permitted_use: of the weights.

    Raises:
        Failure: the stage has no checkpoint.
    """
    from components.models import ModelCard, load_model, save_model  # imports torch
    from components.packed_states import pack_state, write_state
    from components.weight_storage import pack_8_bits

    own = Trained(recipe=recipe, inputs=inputs, folder=stage)
    state, objective = _averaged(own)
    parts, kept = objective.parts(), state_of or own
    parents = {name: load_model(folder) for name, folder in inputs.items()}
    card_fields = ModelCard(
        name=out.name,
        system=recipe.system,
        recipe=_without_places(identity(recipe)),
        config=objective.config,
        parents={name: model.digest for name, model in parents.items()},
        licence=licence,
        permitted_use=permitted_use,
        metrics={"step": state["step"], "steps": recipe.steps},
    )
    model = save_model(out, card_fields, pack_8_bits(parts, eight_bit), {**objective.files, **files}, half=True)
    (out / STATE).mkdir()
    if state_of is not None:
        state, objective = _averaged(state_of)
        parts = objective.parts()
    write_state(out / STATE / TENSORS, pack_state(state, parts))
    curve = {
        name: {str(step): value for step, value in values.items()}
        for name, values in read_metrics(kept.folder / METRICS).items()
        if name.startswith("heldout/")
    }
    document = {
        "step": int(state["step"]),
        "recipe": recipe_digest(kept.recipe),
        "progress": dict(state["progress"]),
        "curve": curve,
    }
    replace_file(out / STATE / STATE_JSON, (json_text(document, indent=1) + "\n").encode())
    return read_packed(model.path)
