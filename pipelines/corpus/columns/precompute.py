"""Compute text embeddings and latents of a corpus once, as columns next to its pictures (decision 0004).

    columns/latents-<resolution>    float16 [C, S/f, S/f]: scaled latents (the mode, no sampling) of the middle S x S of
                                    the picture, after its short side was resized to S = resolution
    columns/embeddings              float16 [L * D + P]: token embeddings [L, D] and pooled embedding [P] of the caption
                                    in one array, so that the text encoders run once; `split_embeddings` parts them

The producers of both columns name the prior and its digest. `check_precomputed` decides whether a training stream may
use them: latents hold one fixed crop, so they fit no stream that crops at random, mirrors, or sharpens its targets.

Sizes at SDXL's shape: latents of 512 px 32 KiB a sample, of 1024 px 128 KiB; embeddings 311 KiB (77 x 2048 + 1280).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from components.captions.text import split_texts
from components.corpora import PrecomputeSpec
from components.negatives import model_folder, prior_digest, square
from components.types import Image, SampleError
from pipelines.core.console import Progress
from pipelines.core.errors import Failure, UsageError, unknown
from pipelines.core.placement import needs_of
from pipelines.core.pool import Pool, answers_of, fixed_threads
from pipelines.corpus.columns.computing import ColumnResult, compute_column
from pipelines.corpus.columns.fitting import CROP, WHAT
from pipelines.corpus.columns.reading import Column, open_column
from pipelines.corpus.columns.spec import ColumnJob, ColumnSpec, Runner, ShardAnswer, ShardTask, Worker
from pipelines.corpus.columns.workers import answer_of, filled_batches, open_shard
from pipelines.corpus.shards import Corpus, open_corpus

if TYPE_CHECKING:
    from components.priors.sdxl import Prior

DTYPE = "float16"
LEAST_RESOLUTION = 16  # pixels

Embedder = Callable[[Sequence[str]], list[np.ndarray]]
"""Captions -> a flat float32 array [L * D + P] each."""


@dataclass(frozen=True, kw_only=True)
class PriorShapes:
    """Sizes of a prior, from its folder, without its weights.

    Attributes:
        latent_channels: C, channels of the latents.
        factor: pixels of the picture along the side of one latent pixel.
        text: (L, D) of the token embeddings.
        pooled: P, size of the pooled embedding.
    """

    latent_channels: int
    factor: int
    text: tuple[int, int]
    pooled: int


def precompute(
    corpus_dir: str | Path, spec: PrecomputeSpec, overwrite: bool = False, progress: Progress | None = None
) -> list[ColumnResult]:
    """Compute columns of a corpus with a prior, or what is missing of them.

    Each worker loads the whole prior, as training does. On a GPU a pass holds `spec.batch_size` pictures or captions;
    on the CPU each goes alone, so that bits never depend on the batch. Without `spec.captions` a missing caption is the
    empty prompt; a null in a text column gives no embedding.

    Args:
        corpus_dir: a curated corpus; it does not change.
        spec: prior, columns and pool. 0 workers work in this process. SUPIR's resolution is 512 (section 4.1).
        overwrite: replace columns of another prior or of other captions.
        progress: called with counts of samples.

    Returns:
        A result for each of `spec.what`, in that order.

    Raises:
        UsageError: there is no such corpus, prior or column, or the prior cannot work at the resolution.
        Failure, RetryLater: see compute_column.
    """
    from components.models import ModelError

    for name in spec.what:
        if name not in WHAT:
            raise unknown("column to precompute", name, WHAT)
    corpus = open_corpus(corpus_dir)
    try:
        digest, shapes, folder = prior_digest(spec.prior), prior_shapes(spec.prior), model_folder(spec.prior)[0]
    except ModelError as error:
        raise UsageError(str(error)) from error
    model, label = spec.prior, spec.prior
    if folder == Path(spec.prior):  # workers have another current folder; the machine's path stays out of the producer
        model, label = str(folder.absolute()), folder.absolute().name
    producer = {"model": label, "model_digest": digest, "precision": "fp32"}
    pool = Pool(workers=spec.workers, num_gpus=spec.num_gpus).placed(needs_of(spec.placement))
    device, rows = ("cuda", spec.batch_size) if spec.num_gpus else ("cpu", 1)
    results = []
    for name in dict.fromkeys(spec.what):
        run: Runner | None = None
        if name == "latents":
            column = latents_column(spec, shapes, producer, functools.partial(build_encoder, model, spec, device, rows))
        else:
            column = embeddings_column(spec, shapes, producer, corpus)
            run = embedding_runner(spec.captions, functools.partial(build_embedder, model, device, rows), pool)
        results.append(compute_column(corpus_dir, column, pool, overwrite, progress=progress, run=run))
    return results


def latents_column(
    spec: PrecomputeSpec, shapes: PriorShapes, producer: Mapping[str, Any], factory: Callable[[], Worker]
) -> ColumnSpec:
    """The column of latents [C, S/f, S/f].

    Raises:
        UsageError: the prior cannot work at the resolution.
    """
    if spec.resolution < LEAST_RESOLUTION or spec.resolution % shapes.factor:
        raise UsageError(
            f"resolution must be a multiple of {shapes.factor} for {spec.prior} and at least {LEAST_RESOLUTION}, got "
            f"{spec.resolution}."
        )
    side = spec.resolution // shapes.factor
    crop = {"resolution": spec.resolution, "crop": CROP, "encode": "mode"}
    return ColumnSpec(
        name=f"latents-{spec.resolution}",
        kind="array",
        producer={"name": "latents", **producer, **crop},
        factory=factory,
        shape=(shapes.latent_channels, side, side),
        dtype=DTYPE,
        batch_size=spec.batch_size,
    )


def embeddings_column(
    spec: PrecomputeSpec, shapes: PriorShapes, producer: Mapping[str, Any], corpus: Corpus
) -> ColumnSpec:
    """The column of embeddings [L * D + P]; UsageError as `caption_producer`."""
    texts = {
        "captions": caption_producer(corpus, spec.captions),
        "layout": {"text": list(shapes.text), "pooled": [shapes.pooled]},
    }
    return ColumnSpec(
        name="embeddings",
        kind="array",
        producer={"name": "embeddings", **producer, **texts},
        shape=(shapes.text[0] * shapes.text[1] + shapes.pooled,),
        dtype=DTYPE,
    )


def caption_producer(corpus: Corpus, captions: str) -> dict[str, Any]:
    """The captions in a producer: {} for those of the corpus, else the text column and its producer.

    Raises:
        UsageError: there is no such column, or it holds no text.
    """
    if not captions:
        return {}
    column = open_column(corpus, captions)
    if column.kind != "text":
        raise UsageError(f"column {captions} of {corpus.folder} holds {column.kind}s, and no captions.")
    return {"column": captions, "producer": dict(column.producer)}


# --- priors -----------------------------------------------------------------------------------------------------------


def prior_shapes(name: str) -> PriorShapes:
    """Read a prior's sizes from its configuration files.

    Raises:
        ModelError: the name leads to no usable prior.
    """
    from components.models import ModelError, load_model

    folder, ours = model_folder(name)
    try:
        if ours:
            config = load_model(folder).info["config"]
            coder, text = config["autoencoder"], config["text_encoder"]
            width = text["hidden_size"]
            return PriorShapes(
                latent_channels=coder["latent_channels"],
                factor=coder["factor"],
                text=(config["text_length"], 2 * width),
                pooled=width,
            )
        coder, first, second = (
            json.loads((folder / part / "config.json").read_bytes())
            for part in ("vae", "text_encoder", "text_encoder_2")
        )
        return PriorShapes(
            latent_channels=coder["latent_channels"],
            factor=2 ** (len(coder["block_out_channels"]) - 1),
            text=(first["max_position_embeddings"], first["hidden_size"] + second["hidden_size"]),
            pooled=second["projection_dim"],
        )
    except (OSError, KeyError, ValueError) as error:
        raise ModelError(f"{name} is not a prior with SDXL's layout ({type(error).__name__}: {error})") from error


def build_encoder(name: str, spec: PrecomputeSpec, device: str, rows: int) -> Worker:
    """The worker of the latents column: uint8 pictures [H, W, 3] -> float32 latents [C, S/f, S/f] each.

    Args:
        name: name or folder of the prior.
        spec: gives the resolution S.
        device: of the prior.
        rows: pictures of one pass.
    """
    import torch

    from components.priors.opening import load_prior
    from components.tensors import images_to_tensor

    prior = load_prior(name, device)

    def encode(images: Sequence[Image]) -> list[np.ndarray]:
        with torch.no_grad(), fixed_threads():
            squares = [square(image, spec.resolution) for image in images]
            latents = prior.encode(images_to_tensor(squares).to(device))
        return list(latents.float().cpu().numpy())

    return lambda images, keys: filled_batches(encode, images, rows)


def build_embedder(name: str, device: str, rows: int) -> Embedder:
    """The worker of the embeddings column, on batches of `rows` captions."""
    from components.priors.opening import load_prior

    prior = load_prior(name, device)
    return lambda captions: filled_batches(functools.partial(_embed, prior), captions, rows)


def _embed(prior: Prior, captions: Sequence[str]) -> list[np.ndarray]:
    import torch

    with torch.no_grad(), fixed_threads():
        text, pooled = prior.embed_prompts(captions)
        return list(torch.cat([text.flatten(1), pooled], dim=1).float().cpu().numpy())


# --- embeddings need no pictures --------------------------------------------------------------------------------------


def embedding_runner(captions: str, factory: Callable[[], Embedder], pool: Pool) -> Runner:
    """Computes the tasks of the embeddings column from the corpus' table, without reading a picture.

    Args:
        captions: name of a text column; "" for the captions of the corpus.
        factory: makes the embedder in each worker; picklable.
        pool: where the workers run.
    """

    def run(job: ColumnJob, tasks: Sequence[ShardTask]) -> Iterator[ShardAnswer]:
        return answers_of(functools.partial(EmbeddingWorker, job, captions, factory), tasks, pool)

    return run


class EmbeddingWorker:
    """Embeds the captions of shards. Every failure comes back as an answer: an exception would end the job.

    Args:
        job: what is computed.
        captions, factory: see embedding_runner.
    """

    def __init__(self, job: ColumnJob, captions: str, factory: Callable[[], Embedder]) -> None:
        self.job, self.captions, self.factory = job, captions, factory
        self.column: Column | None = None
        self.embed: Embedder | None = None

    def __call__(self, tasks: Sequence[ShardTask]) -> list[ShardAnswer]:
        """The answers in the order of the tasks."""
        return [answer_of(self.job, functools.partial(self._compute, task)) for task in tasks]

    def _compute(self, task: ShardTask) -> dict[str, Any]:
        """The row of one task."""
        shard = open_shard(self.job, task)
        if self.captions and self.column is None:
            self.column = open_column(shard.corpus, self.captions)
        part, texts = shard.corpus.split(task.split), {}
        for place in shard.missing():
            if self.column is not None:
                text = self.column.value(task.split, shard.first + place)
            else:
                text = str(part.locate(shard.first + place)[1]["caption"] or "")
            if isinstance(text, str) and len(split_texts(text)) > 1:  # a stream draws one for each row
                shard.settle(place, SampleError("several_texts", "it has several texts, and an embedding is of one"))
            elif isinstance(text, str):
                texts[place] = text
            else:
                shard.settle(place, SampleError("no_caption", f"column {self.captions} holds none"))
        for place, value in zip(texts, self._embeddings(list(texts.values())), strict=True):
            shard.settle(place, value)
        return shard.write()

    def _embeddings(self, texts: Sequence[str]) -> list[np.ndarray]:
        """A caption cannot break an encoder: an exception is the fault of the model or of the memory."""
        if not texts:
            return []
        try:
            self.embed = self.embed or self.factory()
            return self.embed(texts)
        except Exception as error:  # any error of the model ends the job with one sentence
            raise Failure(f"the text encoders fail: {type(error).__name__}: {error}") from error
