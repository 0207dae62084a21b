"""Inputs of a training stage: its corpora and parent models, checked on the driver before Ray starts the workers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from components.captions.presets import HUB_ID
from components.evaluation import MIN_PICTURES
from components.negatives import prior_digest
from components.recipes import Recipe
from components.systems import SYSTEMS, parent_stage
from pipelines.core.errors import UsageError
from pipelines.core.home import shipped_files, weights_folder
from pipelines.corpus.catalogue import entry_of, load_spec
from pipelines.corpus.shards import SPLIT, open_corpus
from pipelines.corpus.stored import address_of, on_this_node
from pipelines.stream.config import DEAD_LEAVES, StreamConfig, captioner_of
from pipelines.stream.texts import NEGATIVE, Captioning


@dataclass(frozen=True, kw_only=True)
class TrainInputs:
    """Inputs of a training stage.

    Attributes:
        corpora: corpus folder by the name in recipe.sources.
        parents: model folder by the stage that trained the model.
        data_digests: manifest digest by corpus name.
    """

    corpora: Mapping[str, Path] = field(default_factory=dict)
    parents: Mapping[str, Path] = field(default_factory=dict)
    data_digests: Mapping[str, str] = field(default_factory=dict)

    def addresses(self) -> dict[str, str]:
        """Addresses of the corpora in stores by their names; each node opens them in a folder of its own."""
        return {name: address for name, folder in self.corpora.items() if (address := address_of(folder))}

    def on_this_node(self, addresses: Mapping[str, str]) -> TrainInputs:
        """These inputs of another node with this node's folders of the corpora in stores.

        Raises:
            Failure: a corpus has changed since the other node opened it.
        """
        own = {name: Path(on_this_node(str(self.corpora[name]), address)) for name, address in addresses.items()}
        return replace(self, corpora={**self.corpora, **own})

    def absolute(self) -> TrainInputs:
        """These inputs with absolute paths."""
        corpora = {name: folder.absolute() for name, folder in self.corpora.items()}
        return replace(self, corpora=corpora, parents={name: path.absolute() for name, path in self.parents.items()})


def check_inputs(recipe: Recipe, inputs: TrainInputs) -> None:
    """Check on the driver for errors that would otherwise end the workers again and again.

    Raises:
        UsageError: the parent model is missing or from another stage, a source has no input or is not a corpus, no
            source has a held-out picture or enough of them for the gate, or the precomputed columns differ from the
            values that the stage computes.
    """
    stage = SYSTEMS[recipe.system].stage(recipe.stage)
    parent, stages, starts = parent_stage(recipe), sorted(inputs.parents), stage.continues
    if stage.warm_starts_beside and stages == [stage.follows]:
        parent = stage.follows
    if stages != ([parent] if parent else []) and stages not in [[start] for start in starts]:
        others = f" (or, to train its weights further, from a model of stage {' or '.join(starts)})" if starts else ""
        raise UsageError(
            f"{recipe.name}: stage {recipe.stage} starts from "
            f"{f'the model of stage {parent}' if parent else 'no model'}{others}, "
            f"but the inputs hold {' and '.join(f'a model of stage {stage}' for stage in stages) or 'no model'}."
        )
    stream = stream_config(recipe, inputs)
    folders = [folder for folder, _ in stream.sources if folder != DEAD_LEAVES]
    corpora = [open_corpus(folder).splits for folder in folders if captioner_of(stream, folder) != NEGATIVE]
    if not any(len(splits[SPLIT]) for splits in corpora if SPLIT in splits):
        names = ", ".join(folders) or "no corpus"
        raise UsageError(
            f"{recipe.name}: there is no held-out picture to measure with ({names}): "
            "a corpus needs at least 2 usable pictures."
        )
    if recipe.student_gate is not None:
        most = max(len(splits[SPLIT]) for splits in corpora if SPLIT in splits)
        if most < MIN_PICTURES:
            raise UsageError(
                f"{recipe.name}: the gate compares student and teacher on at least {MIN_PICTURES} held-out pictures, "
                f"and the largest corpus holds out {most}. Curate it with a larger split.held_out_fraction."
            )
    if recipe.unpaired:
        splits = open_corpus(stream.unpaired).splits
        if SPLIT not in splits or not len(splits[SPLIT]):
            raise UsageError(
                f"{recipe.name}: {stream.unpaired} has no held-out picture, and evaluation needs inputs from it."
            )
    _check_loss_weights(recipe)
    if recipe.latents or recipe.embeddings:
        _check_precomputed(recipe, inputs, stream)


def _check_loss_weights(recipe: Recipe) -> None:
    """Raises UsageError if weights of a loss are neither a file nor a folder here; a hub id may be downloaded."""
    for key, place in recipe.loss_weights.items():
        places = [Path(place).expanduser(), weights_folder() / place]
        if not any(path.exists() for path in places) and not HUB_ID.fullmatch(place):
            raise UsageError(
                f"{recipe.name}: {key} names weights that are not here: {place} is no file or folder, and "
                f"{places[1]} does not exist. Put the files there, name another place, or train without them: {key}="
            )


def _check_precomputed(recipe: Recipe, inputs: TrainInputs, stream: StreamConfig) -> None:
    """Raises UsageError unless the stage uses the precomputed columns and would compute the same values."""
    from components.models import ModelError
    from pipelines.stream.rows import check_stream

    system = SYSTEMS[recipe.system]
    usable = system.stage(recipe.stage).precomputed
    for what, column in (("latents", recipe.latents), ("embeddings", recipe.embeddings)):
        if column and what not in usable:
            raise UsageError(f"{recipe.name}: stage {recipe.stage} cannot train on precomputed {what}.")
    try:
        digest = prior_digest(system.networks().encoded_with(recipe, inputs.parents))
    except ModelError as error:
        raise UsageError(str(error)) from error
    check_stream(stream, digest)


def stream_config(recipe: Recipe, inputs: TrainInputs, captioning: Captioning | None = None) -> StreamConfig:
    """Return the part of a recipe that the data workers need. Raises UsageError for a source without an input."""
    names = {*recipe.sources, *([recipe.unpaired] if recipe.unpaired else [])}
    missing = sorted(names - set(inputs.corpora) - {DEAD_LEAVES})
    if missing:
        raise UsageError(f"{recipe.name}: {missing_corpora(missing, sorted(inputs.corpora))}")
    sources = [
        (name if name == DEAD_LEAVES else str(inputs.corpora[name]), weight) for name, weight in recipe.sources.items()
    ]
    return StreamConfig(
        sources=tuple(sources),
        seed=recipe.seed,
        resolution=recipe.resolution,
        short_side=recipe.short_side,
        scale=(float(recipe.scale[0]), float(recipe.scale[1])),
        small=recipe.small,
        buckets=tuple((int(height), int(width)) for height, width in recipe.buckets),
        batch_size=recipe.batch_size,
        window_samples=recipe.window_samples,
        crop=recipe.crop,
        flip=recipe.flip,
        turn=recipe.turn,
        relight=recipe.relight,
        captioner=recipe.captioner,
        captioners=tuple(recipe.captioners.get(name, recipe.captioner) for name in recipe.sources),
        captioning=captioning,
        latents=recipe.latents,
        embeddings=recipe.embeddings,
        degradation="" if recipe.pairs or recipe.unpaired else recipe.degradation.preset,
        pairs=recipe.pairs,
        unpaired=str(inputs.corpora[recipe.unpaired]) if recipe.unpaired else "",
        prompt=recipe.prompt,
        degradation_options=dict(recipe.degradation.options),
        degrade_on=recipe.degradation.degrade_on,
    )


def missing_corpora(missing: Sequence[str], inputs: Sequence[str]) -> str:
    """Return a message with one sentence per corpus that has no input: how to get the corpus.

    For a name in the catalogue, the sentence has its curate command. The user may pass any corpus under a name.
    """
    sentences = [f"sources names {', '.join(missing)}, and the inputs bring {', '.join(inputs) or 'no corpus'}."]
    for name in missing:
        if name in shipped_files("datasets"):
            entry = entry_of(load_spec(name))
            needs = "; ".join(f"{need.key} takes {need.what}" for need in entry.needs if need.what)
            sentences.append(
                f"{name}: {entry.description} ({entry.homepage or 'no homepage'}). Curate it with: {entry.command}"
                f"{f' ({needs})' if needs else ''}; then add --input {name}=CORPUS."
            )
        else:
            sentences.append(f"{name}: add --input {name}=CORPUS, any curated corpus (restoray curate).")
    return " ".join(sentences)
