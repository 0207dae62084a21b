"""Precomputed latents and embeddings in the stream and in training: equal to the encoders' values, or absent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from components.captions.views import find_view
from components.corpora import PrecomputeSpec
from components.images import encode_png
from components.priors.opening import load_prior
from components.priors.sdxl import Prior
from components.synthetic import dead_leaves
from components.systems.recipes import load_recipe
from components.tensors import collate, collate_rows
from components.types import Image, SampleError
from pipelines.core.errors import UsageError
from pipelines.core.metrics import read_metrics
from pipelines.core.pool import Pool
from pipelines.corpus.columns.computing import compute_column
from pipelines.corpus.columns.precompute import precompute
from pipelines.corpus.columns.reading import open_column
from pipelines.corpus.columns.spec import ColumnSpec
from pipelines.corpus.shards import open_corpus, write_corpus
from pipelines.stream import feed
from pipelines.stream.config import StreamConfig
from pipelines.stream.rows import check_stream, heldout_rows, load_columns, load_row
from pipelines.stream.texts import Captioning
from pipelines.training.inputs import TrainInputs, check_inputs
from pipelines.training.train import train

SIDE = 32
FLOAT16 = 1e-3
"""Tolerance relative to the largest value: float16 has 11 bits (5e-4), and batches add in another order."""


@pytest.fixture(scope="module")
def nano() -> Prior:
    return load_prior("nano")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Six pictures of several shapes, one of them broken, and two held out; every second picture has a caption."""
    shapes = [(40, 56), (64, 36), (32, 32), (80, 50), (44, 44), (36, 70)]
    samples: list[tuple[str, str, bytes, dict[str, Any]]] = [
        (
            f"p{n}",
            "png",
            encode_png(dead_leaves(96, 2, n)[: shape[0], : shape[1]]),
            {"caption": "red, bright" if n % 2 else ""},
        )
        for n, shape in enumerate([*shapes, *shapes[:2]])
    ]
    samples[4] = ("p4", "png", b"no picture", {"caption": ""})
    write_corpus(tmp_path / "corpus", "test", {"train": samples[:6], "held_out": samples[6:]}, 2)
    return tmp_path / "corpus"


@pytest.fixture
def config(corpus: Path) -> StreamConfig:
    precompute(corpus, PrecomputeSpec(prior="nano", resolution=SIDE, workers=0))
    return StreamConfig(
        sources=((str(corpus), 1.0),),
        seed=1,
        resolution=SIDE,
        crop="center",
        flip=False,
        degradation="realesrgan-nano",
        captioner="manifest",
        latents=f"latents-{SIDE}",
        embeddings="embeddings",
    )


def near(actual: Any, expected: torch.Tensor) -> bool:
    return bool((actual.float() - expected).abs().max() <= FLOAT16 * expected.abs().max())


def test_precomputed_values_equal_those_of_the_encoders(config: StreamConfig, nano: Prior) -> None:
    check_stream(config)
    batch = collate(load_columns(config, range(12)))
    assert set(batch.keys) == {"p0", "p1", "p2", "p3", "p5"}  # another sample, with its values, replaces p4
    assert batch.latents is not None and not batch.latents_missing and not batch.embeddings_missing
    with torch.no_grad():
        text, pooled = nano.embed_prompts(batch.prompts)
        assert near(batch.latents, nano.encode(batch.hq))
    assert near(batch.embeddings["text"], text) and near(batch.embeddings["pooled"], pooled)
    assert collate_rows([load_row(config, n) for n in range(3)]).latents is not None
    heldout = collate_rows(heldout_rows(config, 3))
    with torch.no_grad():
        assert heldout.latents is not None and near(heldout.latents, nano.encode(heldout.hq))


def test_columns_are_float16(config: StreamConfig) -> None:
    columns = load_columns(config, range(4))
    fields = {name: column for name, column in columns.items() if name.startswith(("latents", "embeddings"))}
    assert {name: (column.dtype, column.shape[1:]) for name, column in fields.items()} == {
        "latents": (np.float16, (12, 8, 8)),
        "latents_known": (np.bool_, ()),
        "embeddings_text": (np.float16, (16, 64)),
        "embeddings_pooled": (np.float16, (32,)),
        "embeddings_known": (np.bool_, ()),
    }
    plain = replace(config, latents="", embeddings="")
    assert feed.row_bytes(config) - feed.row_bytes(plain) == 2 * (12 * 8 * 8 + 16 * 64 + 32)
    assert fields.keys().isdisjoint(load_columns(plain, range(2)))


def test_a_row_with_a_null_value_is_marked_for_the_encoder(config: StreamConfig, corpus: Path, nano: Prior) -> None:
    """p1 and p3 have no latents: only their rows are marked, and the trainer encodes them."""
    producer = dict(open_column(open_corpus(corpus), config.latents).producer)

    def factory() -> Any:
        def encode(images: Sequence[Image], keys: Sequence[str]) -> list[Any]:
            return [SampleError("failed", "no room") if k in ("p1", "p3") else np.ones((12, 8, 8)) for k in keys]

        return encode

    column = ColumnSpec(
        name=config.latents, kind="array", producer={**producer, "note": ""}, factory=factory, shape=(12, 8, 8),
        dtype="float16",
    )  # fmt: skip
    compute_column(corpus, column, Pool(workers=0), overwrite=True, max_bad_fraction=1.0)
    batch = collate(load_columns(replace(config), range(10)))
    expected = [n for n, key in enumerate(batch.keys) if key in ("p1", "p3")]
    assert expected and list(batch.latents_missing) == expected
    assert batch.latents is not None and float(batch.latents[expected].abs().max()) == 0


def test_a_prompt_of_a_captioner_has_no_precomputed_embedding(config: StreamConfig) -> None:
    class Captioners:
        def answers(self, images: Sequence[Image], sha256s: Sequence[str]) -> list[str | SampleError]:
            return ["blue"] * len(images)

    captioned = replace(config, captioning=Captioning(pool=Captioners(), view=find_view("hq")))
    columns = load_columns(captioned, range(10))
    assert set(columns["prompt"]) == {"blue", "red, bright"}
    assert [not value for value in columns["embeddings_known"]] == [prompt == "blue" for prompt in columns["prompt"]]
    row = load_row(captioned, next(n for n in range(10) if columns["prompt"][n] == "blue"))
    assert row["prompt"] == "blue" and not row["embeddings_known"]


def test_dead_leaves_in_a_mixture_have_no_latents(config: StreamConfig) -> None:
    mixture = replace(config, sources=(*config.sources, ("dead_leaves", 1.0)), captioner="manifest")
    check_stream(mixture)
    columns = load_columns(mixture, range(24))
    assert [bool(value) for value in columns["latents_known"]] == [not key.startswith("dead") for key in columns["key"]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"crop": "random"}, "cropped at random"),
        ({"short_side": 48}, "short_side is 48"),
        ({"buckets": ((32, 48),), "batch_size": 2}, "other shapes"),
        ({"short_side": 32, "scale": (1.0, 1.5)}, "another size"),
        ({"degradation": "realesrgan"}, "sharpens its targets"),
        ({"captioner": "tags"}, "own captions"),
        ({"latents": "embeddings"}, "holds no precomputed latents"),
        ({"latents": "latents-33"}, 'Did you mean "latents-32"'),
    ],
)
def test_columns_that_do_not_fit_are_refused(config: StreamConfig, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_stream(replace(config, **changes))


def test_embeddings_of_older_captions_are_refused(config: StreamConfig, corpus: Path) -> None:
    def write(model: str, text: str) -> None:
        def factory() -> Any:
            return lambda images, keys: [text] * len(keys)

        column = ColumnSpec(name="mine", kind="text", producer={"model": model}, factory=factory)
        compute_column(corpus, column, Pool(workers=0), overwrite=True)

    write("one", "red")
    embeddings = PrecomputeSpec(prior="nano", what=["embeddings"], resolution=SIDE, captions="mine", workers=0)
    precompute(corpus, embeddings, overwrite=True)
    fitting = replace(config, captioner="column:mine")
    check_stream(fitting)
    write("two", "blue")
    (corpus / "index.json").touch()  # so that the corpus is opened again
    with pytest.raises(UsageError, match="have changed"):
        check_stream(fitting)


PRECOMPUTED = [f"resolution={SIDE}", f"short_side={SIDE}", "crop=center", "flip=false", "captioner=manifest"]
PRECOMPUTED += ["sources.dead_leaves=0", "batch_size=4", "steps=3"]
TINY = ["checkpoint_every=3", "evaluate_every=3", "heldout_triples=4", "steps_at_restore=1", "resampler_dim=16"]
TINY += ["resampler_depth=1", "resampler_head_dim=8", "resampler_heads=2", "resampler_queries=4"]
COLUMNS = [f"latents=latents-{SIDE}", "embeddings=embeddings"]


def test_the_prior_and_the_stage_are_checked_before_training(config: StreamConfig, corpus: Path) -> None:
    inputs = TrainInputs(corpora={"corpus": corpus})
    check_inputs(load_recipe("instantir-dcp-nano", [*PRECOMPUTED, *COLUMNS]), inputs)
    warm = "warm_start=nano"
    check_inputs(load_recipe("prior-denoiser-nano", [*PRECOMPUTED, warm, COLUMNS[0]]), inputs)
    with pytest.raises(UsageError, match="stage denoiser cannot train on precomputed embeddings"):
        check_inputs(load_recipe("prior-denoiser-nano", [*PRECOMPUTED, warm, *COLUMNS]), inputs)
    with pytest.raises(UsageError, match="stage encoder cannot train on precomputed latents"):
        check_inputs(load_recipe("prior-encoder-nano", [*PRECOMPUTED, warm, COLUMNS[0]]), inputs)
    column = corpus / "columns" / f"latents-{SIDE}" / "column.json"
    digest = open_column(open_corpus(corpus), f"latents-{SIDE}").producer["model_digest"]
    column.write_text(column.read_text().replace(digest, "0" * 64))
    (corpus / "index.json").touch()  # so that the corpus is opened again
    with pytest.raises(UsageError, match=r"computed with prior nano \(000000000000\)"):
        check_inputs(load_recipe("instantir-dcp-nano", [*PRECOMPUTED, COLUMNS[0]]), inputs)


@pytest.mark.slow
@pytest.mark.full  # two trainings; tests/components/test_precomputed.py compares the losses of the objectives
def test_training_with_and_without_the_columns_has_the_same_losses(
    ray_session: None, config: StreamConfig, corpus: Path, tmp_path: Path
) -> None:
    losses = []
    for name, more in (("plain", []), ("columns", COLUMNS)):
        recipe = load_recipe("instantir-dcp-nano", [*TINY, *PRECOMPUTED, *more])
        train(recipe, TrainInputs(corpora={"corpus": corpus}), tmp_path / name)
        series = read_metrics(tmp_path / name / "metrics.jsonl")
        losses.append([*series["loss"].values(), *series["heldout/perceptor"].values()])
    assert len(losses[0]) == 5 and np.isfinite(losses[0]).all()
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)
    assert losses[1] != losses[0]  # float16 changes the losses, so the columns were used
