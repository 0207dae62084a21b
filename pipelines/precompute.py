"""Text embeddings and latents of a corpus, computed once and kept as columns beside its pictures (decision 0004).

    columns/latents-<resolution>    float16 [C, S/f, S/f]: scaled latents (the mode, no sampling) of the middle S x S of
                                    the picture, after its short side was resized to S = resolution
    columns/embeddings              float16 [L * D + P]: token embeddings [L, D] and pooled embedding [P] of the caption
                                    in one, so that the text encoders run once; `split_embeddings` parts them

Both name the prior and its digest in their producer, and `check_precomputed` says whether a training stream may use
them: latents hold one fixed crop, so they fit no stream that crops at random, mirrors, or sharpens its targets.

Sizes at SDXL's shape: latents of 512 px 32 KiB a sample, of 1024 px 128 KiB; embeddings 311 KiB (77 x 2048 + 1280).
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from components.types import Image, SampleError
from pipelines.column_workers import MAX_BLOCKS, open_shard
from pipelines.columns import (
    Column,
    ColumnJob,
    ColumnResult,
    Runner,
    ShardTask,
    Worker,
    compute_column,
    open_column,
)
from pipelines.console import Progress
from pipelines.errors import Failure, RestorayError, UsageError, unknown
from pipelines.shards import Corpus, open_corpus

if TYPE_CHECKING:
    from components.priors.sdxl import Prior

WHAT = ("latents", "embeddings")
CROP = "short side resized, middle square"
Item = TypeVar("Item")
Embedder = Callable[[Sequence[str]], list[np.ndarray]]
"""Captions -> a flat float32 array [L * D + P] each."""


@dataclass(frozen=True, kw_only=True)
class PriorShapes:
    """What a prior's folder says of its sizes, without loading it.

    Attributes:
        latent_channels, factor: C, and pixels of a latent pixel's side.
        text, pooled: (L, D) of token embeddings, and P.
    """

    latent_channels: int
    factor: int
    text: tuple[int, int]
    pooled: int


def precompute(
    corpus_dir: str | Path,
    prior: str,
    what: Sequence[str] = WHAT,
    resolution: int = 512,
    progress: Progress | None = None,
    *,
    captions: str = "",
    batch_size: int = 8,
    workers: int = 1,
    num_cpus: float = 1.0,
    num_gpus: float = 0.0,
    overwrite: bool = False,
) -> list[ColumnResult]:
    """Compute columns of a corpus with a prior, or what is missing of them.

    Args:
        corpus_dir: a curated corpus; not changed.
        prior: a shipped prior, a model folder, or a diffusers folder or hub id of an SDXL pipeline. Each worker loads
            all of it, as training does.
        what: of WHAT.
        resolution: side of the square behind the latents, pixels; 512 is SUPIR's (section 4.1).
        captions: name of a text column; "" takes the captions that came with the corpus. There, no caption is the
            empty prompt; a null in a text column gives no embedding.
        batch_size: pictures or captions a pass on a GPU; on the CPU each goes alone, so that bits never depend on it.
        workers: processes; 0 works in this one.
        num_cpus, num_gpus: of each.
        overwrite: replace columns of another prior or captions.

    Returns:
        A result for each of `what`, in that order.

    Raises:
        UsageError: no such corpus, prior or column, or a resolution that the prior cannot do.
        Failure, RetryLater: see pipelines.columns.compute_column.
    """
    from components.models import ModelError
    from components.negatives import model_folder, prior_digest

    for name in what:
        if name not in WHAT:
            raise unknown("column to precompute", name, WHAT)
    corpus = open_corpus(corpus_dir)
    try:
        digest, shapes, folder = prior_digest(prior), prior_shapes(prior), model_folder(prior)[0]
    except ModelError as error:
        raise UsageError(str(error)) from error
    # workers have another current folder; the machine's path stays out of the producer
    model, said = (str(folder.absolute()), folder.absolute().name) if folder == Path(prior) else (prior, prior)
    producer = {"model": said, "model_digest": digest, "precision": "fp32"}
    device = "cuda" if num_gpus else "cpu"
    rows = batch_size if num_gpus else 1
    settings: dict[str, Any] = {
        "dtype": "float16",
        "batch_size": batch_size,
        "workers": workers,
        "num_cpus": num_cpus,
        "num_gpus": num_gpus,
        "overwrite": overwrite,
        "progress": progress,
    }
    results = []
    for name in dict.fromkeys(what):
        if name == "latents":
            if resolution < 16 or resolution % shapes.factor:
                raise UsageError(
                    f"resolution must be a multiple of {shapes.factor} for {prior} and at least 16, got {resolution}."
                )
            side = resolution // shapes.factor
            result = compute_column(
                corpus_dir,
                f"latents-{resolution}",
                "array",
                {"name": name, **producer, "resolution": resolution, "crop": CROP, "encode": "mode"},
                functools.partial(build_encoder, model, resolution, device, rows),
                shape=(shapes.latent_channels, side, side),
                **settings,
            )
        else:
            layout = {"text": list(shapes.text), "pooled": [shapes.pooled]}
            embedder: Any = functools.partial(build_embedder, model, device, rows)  # run is what calls it
            result = compute_column(
                corpus_dir,
                "embeddings",
                "array",
                {"name": name, **producer, "captions": caption_producer(corpus, captions), "layout": layout},
                embedder,
                shape=(shapes.text[0] * shapes.text[1] + shapes.pooled,),
                run=embedding_runner(captions, num_cpus, num_gpus),
                **settings,
            )
        results.append(result)
    return results


def split_embeddings(producer: Mapping[str, Any], value: np.ndarray) -> dict[str, np.ndarray]:
    """A row of the embeddings column as {"text": [L, D], "pooled": [P]}; views, no copies.

    Args:
        producer: the column's.
        value: [L * D + P].
    """
    length, width = producer["layout"]["text"]
    return {"text": value[: length * width].reshape(length, width), "pooled": value[length * width :]}


def caption_producer(corpus: Corpus, captions: str) -> dict[str, Any]:
    """What the producer says of the captions: {} for the corpus' own, else the text column and its producer.

    Raises:
        UsageError: no such column, or one without text.
    """
    if not captions:
        return {}
    column = open_column(corpus, captions)
    if column.kind != "text":
        raise UsageError(f"column {captions} of {corpus.folder} holds {column.kind}s, and no captions.")
    return {"column": captions, "producer": dict(column.producer)}


# --- whether a stream may use them ------------------------------------------------------------------------------------


def check_precomputed(producer: Mapping[str, Any], stream: Any, model_digest: str = "") -> None:
    """Refuse a column whose values are not what a training stream would compute.

    Args:
        producer: of a column that `precompute` made.
        stream: the stream's settings: a dataclass (pipelines.stream.StreamConfig) or a mapping with the same names.
            Read are sources, resolution, short_side, scale, buckets, flip, crop ("random" where it is not said),
            degradation, degradation_options and captioner.
        model_digest: of the prior in training; "" where it is not known.

    Raises:
        UsageError: one sentence with everything that does not fit.
    """
    settings = dict(stream) if isinstance(stream, Mapping) else _fields(stream)
    if producer.get("name") not in WHAT:
        raise UsageError(
            f"a column of {producer.get('name')!r} is not precomputed for training: {', '.join(WHAT)} are."
        )
    reasons = []
    if model_digest and producer["model_digest"] != model_digest:
        reasons.append(f"they were computed with prior {producer['model']} ({producer['model_digest'][:12]})")
    synthetic = [source for source in _sources(settings) if source == "dead_leaves"]
    if synthetic:
        reasons.append("dead leaves are made while they stream and have none")
    reasons += (
        _latent_reasons(producer, settings) if producer["name"] == "latents" else _text_reasons(producer, settings)
    )
    if reasons:
        raise UsageError(f"the precomputed {producer['name']} do not fit this stream: {'; '.join(reasons)}.")


def _latent_reasons(producer: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    side, reasons = producer["resolution"], []
    if settings["resolution"] != side:
        reasons.append(f"they hold {side} px squares and the rows have {settings['resolution']} px")
    if settings.get("short_side") not in (None, 0, side):
        reasons.append(
            f"pictures were resized to a short side of {side} px, and short_side is {settings['short_side']}"
        )
    if tuple(settings.get("scale") or (1.0, 1.0)) != (1.0, 1.0):
        reasons.append("scale draws another size for each row")
    if settings.get("buckets"):
        reasons.append("buckets cut other shapes")
    if settings.get("flip", True):
        reasons.append("flip mirrors half of the rows")
    if settings.get("crop", "random") != "center":
        reasons.append("rows are cropped at random and they hold the middle square")
    preset = settings.get("degradation", "")
    if preset and not _keeps_target(preset, settings.get("degradation_options") or {}):
        reasons.append(f"degradation {preset} sharpens its targets")
    return reasons


def _text_reasons(producer: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    captioner, column = settings.get("captioner", ""), producer["captions"].get("column", "")
    if not column and captioner not in ("manifest", "negative"):
        return [f'they are of the corpus\' own captions (captioner "manifest"), and captioner is "{captioner}"']
    if column and captioner != f"column:{column}":
        return [f'they are of the text column "{column}" (captioner "column:{column}"), and captioner is "{captioner}"']
    return []


def _keeps_target(preset: str, options: Mapping[str, Any]) -> bool:
    """Whether a degradation trains towards the picture itself: asked of the degradation, on a picture with edges."""
    from components.degradations import build_degradation

    probe = np.zeros((32, 32, 3), np.float32)
    probe[8:24, 8:24] = (1.0, 0.5, 0.25)
    return bool(np.array_equal(build_degradation(preset, **options).target(probe.copy()), probe))


def _sources(settings: Mapping[str, Any]) -> list[str]:
    sources = settings.get("sources") or ()
    return [str(source if isinstance(source, str) else source[0]) for source in sources]


def _fields(stream: Any) -> dict[str, Any]:
    return {field.name: getattr(stream, field.name) for field in dataclasses.fields(stream)}


# --- priors -----------------------------------------------------------------------------------------------------------


def prior_shapes(name: str) -> PriorShapes:
    """Read a prior's sizes from its configuration files.

    Raises:
        ModelError: nothing usable under that name.
    """
    from components.models import ModelError, load_model
    from components.negatives import model_folder

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
        raise ModelError(f"{name} is no prior of SDXL's shape ({type(error).__name__}: {error})") from error


def build_encoder(name: str, resolution: int, device: str, rows: int) -> Worker:
    """The worker of the latents column: pictures uint8 [H, W, 3] -> float32 [C, S/f, S/f] each."""
    import torch

    from components.negatives import square
    from components.priors.sdxl import load_prior
    from components.tensors import images_to_tensor

    prior = load_prior(name, device)

    def encode(images: Sequence[Image]) -> list[np.ndarray]:
        with torch.no_grad():
            latents = prior.encode(images_to_tensor([square(image, resolution) for image in images]).to(device))
        return list(latents.float().cpu().numpy())

    return lambda images, keys: _in_equal_batches(encode, images, rows)


def build_embedder(name: str, device: str, rows: int) -> Embedder:
    """The worker of the embeddings column."""
    from components.priors.sdxl import load_prior

    prior = load_prior(name, device)
    return lambda captions: _in_equal_batches(functools.partial(_embed, prior), captions, rows)


def _embed(prior: Prior, captions: Sequence[str]) -> list[np.ndarray]:
    import torch

    with torch.no_grad():
        text, pooled = prior.embed_prompts(captions)
    return list(torch.cat([text.flatten(1), pooled], dim=1).float().cpu().numpy())


def _in_equal_batches(
    call: Callable[[Sequence[Item]], list[np.ndarray]], items: Sequence[Item], rows: int
) -> list[np.ndarray]:
    """Batches of exactly `rows`, the last one filled up: the way of adding follows a batch's shape, not its content."""
    values: list[np.ndarray] = []
    for start in range(0, len(items), rows):
        batch = list(items[start : start + rows])
        with _one_thread():
            values += call([*batch, *[batch[0]] * (rows - len(batch))])[: len(batch)]
    return values


@contextmanager
def _one_thread() -> Iterator[None]:
    """One torch thread, as Ray's workers have: their number can change the last bit of a sum."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# --- embeddings need no pictures --------------------------------------------------------------------------------------


def embedding_runner(captions: str, num_cpus: float, num_gpus: float) -> Runner:
    """Does the tasks of the embeddings column from the corpus' table alone."""

    def run(job: ColumnJob, tasks: Sequence[ShardTask]) -> Iterator[dict[str, Any]]:
        if job.workers == 0 or not tasks:
            yield from map(EmbeddingWorker(job, captions).compute, tasks)
        else:
            yield from _through_ray(job, captions, tasks, num_cpus, num_gpus)

    return run


class EmbeddingWorker:
    """Embeds the captions of a shard. Every failure comes back as an answer: an exception would be retried for ever."""

    def __init__(self, job: ColumnJob, captions: str) -> None:
        self.job, self.captions = job, captions
        self.column: Column | None = None
        self.embed: Embedder | None = None

    def __call__(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Columns in: task (JSON text). Columns out: answer (JSON text)."""
        answers = [json.dumps(self.compute(ShardTask(**json.loads(text)))) for text in batch["task"]]
        return {"answer": np.array(answers, dtype=object)}

    def compute(self, task: ShardTask) -> dict[str, Any]:
        """The answer to one task: a row of shards.jsonl, or {"fatal": why}."""
        try:
            shard = open_shard(self.job, task)
            if self.captions and self.column is None:
                self.column = open_column(shard.corpus, self.captions)
            part, texts = shard.corpus.split(task.split), {}
            for place in shard.missing():
                if self.column is not None:
                    text = self.column.value(task.split, shard.first + place)
                else:
                    text = str(part.locate(shard.first + place)[1]["caption"] or "")
                if isinstance(text, str):
                    texts[place] = text
                else:
                    shard.settle(place, SampleError("no_caption", f"column {self.captions} holds none"))
            for place, value in zip(texts, self._embedded(list(texts.values())), strict=True):
                shard.settle(place, value)
            return shard.write()
        except OSError as error:
            return {"fatal": f"{error.filename or self.job.folder} cannot be written: {error.strerror or error}."}
        except RestorayError as error:
            return {"fatal": str(error)}

    def _embedded(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Captions hold nothing that an encoder can stumble over: what it raises is the model's fault, or memory's."""
        if not texts:
            return []
        try:
            if self.embed is None:
                embed: Any = self.job.factory()
                self.embed = embed
            return self.embed(texts)
        except Exception as error:  # whatever a model may raise ends the job with one sentence
            raise Failure(f"the text encoders fail: {type(error).__name__}: {error}") from error


def _through_ray(
    job: ColumnJob, captions: str, tasks: Sequence[ShardTask], num_cpus: float, num_gpus: float
) -> Iterator[dict[str, Any]]:
    """Answers in the order in which they come."""
    import ray
    from ray.data import ActorPoolStrategy, DataContext
    from ray.exceptions import RayError

    from pipelines.cluster import local_ray

    rows = [{"task": json.dumps(vars(task))} for task in tasks]
    with local_ray():
        context = DataContext.get_current()
        bars, context.enable_progress_bars = context.enable_progress_bars, False  # the console shows its own
        try:
            dataset = ray.data.from_items(rows, override_num_blocks=min(len(rows), MAX_BLOCKS)).map_batches(
                EmbeddingWorker,  # type: ignore[arg-type]
                fn_constructor_kwargs={"job": job, "captions": captions},
                batch_size=1,
                batch_format="numpy",
                compute=ActorPoolStrategy(min_size=1, max_size=min(job.workers, len(rows))),
                num_cpus=num_cpus,
                num_gpus=num_gpus or None,
            )
            for row in dataset.iter_rows():
                yield json.loads(row["answer"])
        except RayError as error:
            reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
            raise Failure(
                f"Ray ended the job ({type(error).__name__}: {reason}); the same command continues"
            ) from error
        finally:
            context.enable_progress_bars = bars
