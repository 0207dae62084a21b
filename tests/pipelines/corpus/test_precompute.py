"""Precomputed latents and embeddings: they equal the prior's values, and check_precomputed knows which streams fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from components.captions.text import join_texts
from components.corpora import PrecomputeSpec
from components.images import center_crop, decode, encode_png, resize_short_side
from components.priors.opening import load_prior
from components.priors.sdxl import Prior
from components.tensors import images_to_tensor
from components.types import SampleError
from pipelines.core.errors import UsageError
from pipelines.core.pool import Pool
from pipelines.core.rows import read_lines
from pipelines.corpus.columns.computing import compute_column
from pipelines.corpus.columns.fitting import check_precomputed, split_embeddings
from pipelines.corpus.columns.precompute import precompute, prior_shapes
from pipelines.corpus.columns.reading import open_column
from pipelines.corpus.columns.spec import ColumnSpec
from pipelines.corpus.shards import open_corpus, write_corpus
from pipelines.stream.rows import StreamConfig

NAMES = ("casa-mila", "blue-periwinkle", "solaris-grapes", "ryan-schroeder")
CAPTIONS = ("red, bright", "", "blue and white, dark, low contrast, smooth", "green")
SIDE = 64


@pytest.fixture(scope="module")
def nano() -> Prior:
    return load_prior("nano")


@pytest.fixture(scope="module")
def photographs() -> list[np.ndarray]:
    """Wide, tall, square and small photographs, uint8."""
    demo = Path(__file__).resolve().parents[3] / "pipelines" / "demo_corpus"
    whole = [decode((demo / f"{name}.jpg").read_bytes()) for name in NAMES]
    sizes = ((80, 120), (128, 96), (64, 64), (40, 60))
    return [center_crop(resize_short_side(w, 128), *size) for w, size in zip(whole, sizes, strict=True)]


@pytest.fixture
def corpus(photographs: list[np.ndarray], tmp_path: Path) -> Path:
    """Four photographs and a broken sample in shards of two, and one held-out sample."""
    samples: list[tuple[str, str, bytes, dict[str, Any]]] = [
        (name, "png", encode_png(picture), {"caption": caption})
        for name, picture, caption in zip(NAMES, photographs, CAPTIONS, strict=True)
    ]
    broken = ("broken", "png", b"no picture", {"caption": "yellow"})
    held_out = ("held", "png", encode_png(photographs[0]), {"caption": "dark"})
    write_corpus(tmp_path / "corpus", "test", {"train": [*samples, broken], "held_out": [held_out]}, 2)
    return tmp_path / "corpus"


def computed(corpus: Path, *what: str, **changes: Any) -> list[Any]:
    """Columns of the nano prior, in this process."""
    overwrite = changes.pop("overwrite", False)
    settings = {"prior": "nano", "what": list(what or ("latents", "embeddings")), "resolution": SIDE, "workers": 0}
    return precompute(corpus, PrecomputeSpec(**{**settings, **changes}), overwrite)


def files(corpus: Path, name: str) -> dict[str, list[dict[str, Any]]]:
    """Names and sha256 of a column's files by split."""
    document: dict[str, dict[str, list[dict[str, Any]]]] = json.loads(
        (corpus / "columns" / name / "column.json").read_bytes()
    )
    return document["splits"]


def test_latents_are_those_of_the_prior_for_the_middle_square(
    corpus: Path, photographs: list[np.ndarray], nano: Prior
) -> None:
    computed(corpus, "latents")
    column = open_column(open_corpus(corpus), "latents-64")
    for number, picture in enumerate(photographs):
        square = center_crop(resize_short_side(picture, SIDE), SIDE, SIDE)
        value = column.value("train", number)
        assert isinstance(value, np.ndarray) and value.dtype == np.float16 and value.shape == (12, 16, 16)
        with torch.no_grad():
            expected = nano.encode(images_to_tensor([square]))[0].numpy()
            decoded = nano.decode(torch.from_numpy(value.astype(np.float32))[None]).clamp(-1, 1)
        assert np.abs(value - expected).max() <= 1e-3 * np.abs(expected).max()  # float16 keeps 11 bits
        error = (decoded - images_to_tensor([square])).square().mean() / 4
        assert float(-10 * torch.log10(error)) > 25  # decoding gives the picture again
    assert np.array_equal(column.value("held_out", 0), column.value("train", 0))  # type: ignore[arg-type]


def test_a_broken_picture_has_a_reason_and_no_latents(corpus: Path) -> None:
    latents, embeddings = computed(corpus)
    assert (latents.samples, latents.quarantined, dict(latents.reasons)) == (6, 1, {"not_image": 1})
    assert (embeddings.samples, embeddings.quarantined) == (6, 0)  # a caption needs no picture
    assert open_column(open_corpus(corpus), "latents-64").value("train", 4) is None
    (row,) = read_lines(corpus / "columns" / "latents-64" / "quarantine.jsonl")
    assert (row["key"], row["code"]) == ("broken", "not_image")


def test_embeddings_are_those_of_the_prior_for_each_caption(corpus: Path, nano: Prior) -> None:
    computed(corpus, "embeddings")
    column = open_column(open_corpus(corpus), "embeddings")
    for number, caption in enumerate([*CAPTIONS, "yellow"]):
        value = column.value("train", number)
        assert isinstance(value, np.ndarray) and value.dtype == np.float16
        parts = split_embeddings(column.producer, value)
        with torch.no_grad():
            text, pooled = nano.embed_prompts([caption])
        for part, expected in ((parts["text"], text[0].numpy()), (parts["pooled"], pooled[0].numpy())):
            assert part.shape == expected.shape
            assert np.abs(part - expected).max() <= 1e-3 * np.abs(expected).max()
    assert not np.array_equal(column.value("train", 0), column.value("train", 3))  # type: ignore[arg-type]


def test_bits_do_not_depend_on_the_batch_and_nothing_is_computed_twice(corpus: Path) -> None:
    first = computed(corpus, batch_size=1)
    before = {name: files(corpus, name) for name in ("latents-64", "embeddings")}
    assert [(result.shards, result.reused) for result in first] == [(4, 0), (4, 0)]
    again = computed(corpus, batch_size=1)
    assert [(result.shards, result.reused) for result in again] == [(4, 4), (4, 4)]
    for name in before:
        (corpus / "columns" / name / "column.json").unlink()
        (corpus / "columns" / name / "shards.jsonl").unlink()
    threads = torch.get_num_threads()
    computed(corpus, batch_size=5)
    assert torch.get_num_threads() == threads
    assert {name: files(corpus, name) for name in before} == before


def test_captions_of_a_text_column_are_embedded_in_their_place(corpus: Path, nano: Prior) -> None:
    def factory() -> Any:
        def write(images: Any, keys: Any) -> list[str | SampleError]:
            return ["purple" if key != "held" else SampleError("dull", "nothing to say") for key in keys]

        return write

    text = ColumnSpec(name="caption-test", kind="text", producer={"model": "test"}, factory=factory)
    compute_column(corpus, text, Pool(workers=0))
    (result,) = computed(corpus, "embeddings", captions="caption-test")
    corpus_reader = open_corpus(corpus)
    column = open_column(corpus_reader, "embeddings")
    value = column.value("train", 0)
    assert isinstance(value, np.ndarray)
    with torch.no_grad():
        expected = nano.embed_prompts(["purple"])[1][0].numpy()
    assert np.abs(split_embeddings(column.producer, value)["pooled"] - expected).max() <= 1e-3 * np.abs(expected).max()
    assert (
        column.value("held_out", 0) is None and column.value("train", 4) is None
    )  # an unreadable picture has no caption
    assert result.reasons == {"no_caption": 2}
    with pytest.raises(UsageError, match="another producer"):
        computed(corpus, "embeddings")
    computed(corpus, "embeddings", overwrite=True)
    assert open_column(corpus_reader, "embeddings").value("held_out", 0) is not None
    computed(corpus, "latents")
    with pytest.raises(UsageError, match="and no captions"):
        computed(corpus, "embeddings", captions="latents-64")


def test_wrong_settings_are_refused(corpus: Path) -> None:
    with pytest.raises(UsageError, match='Did you mean "latents"'):
        computed(corpus, "latent")
    with pytest.raises(UsageError, match="multiple of 4"):
        computed(corpus, "latents", resolution=66)
    with pytest.raises(UsageError, match="no_such_prior"):
        computed(corpus, prior="no_such_prior")
    with pytest.raises(UsageError, match="caption-tset"):
        computed(corpus, "embeddings", captions="caption-tset")


def test_sizes_are_read_from_an_sdxl_folder_without_its_weights(tmp_path: Path) -> None:
    """SDXL's own numbers: 128 x 128 x 4 latents of 1024 px, 77 x 2048 text, 1280 pooled."""
    parts = {
        "vae": {"latent_channels": 4, "block_out_channels": [128, 256, 512, 512]},
        "text_encoder": {"max_position_embeddings": 77, "hidden_size": 768, "projection_dim": 768},
        "text_encoder_2": {"max_position_embeddings": 77, "hidden_size": 1280, "projection_dim": 1280},
    }
    (tmp_path / "model_index.json").write_text("{}")
    for name, config in parts.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    shapes = prior_shapes(str(tmp_path))
    assert (shapes.latent_channels, shapes.factor, shapes.text, shapes.pooled) == (4, 8, (77, 2048), 1280)
    nano = prior_shapes("nano")
    assert (nano.latent_channels, nano.factor) == (12, 4)


LATENTS = {"name": "latents", "model": "nano", "model_digest": "abc", "resolution": 64}
EMBEDDINGS = {"name": "embeddings", "model": "nano", "model_digest": "abc", "captions": {}}
FIXED = {"resolution": 64, "flip": False, "crop": "center", "sources": [("corpus", 1.0)], "captioner": "manifest"}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"short_side": 64},
        {"degradation": "supir"},  # trains towards the picture itself
        {"degradation": "realesrgan", "degradation_options": {"sharpen_target": False}},
    ],
)
def test_latents_fit_a_stream_of_fixed_crops(changes: dict[str, Any]) -> None:
    check_precomputed(LATENTS, {**FIXED, **changes}, model_digest="abc")
    check_precomputed(LATENTS, {**FIXED, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resolution": 128}, "64 px squares and the rows have 128 px"),
        ({"short_side": 96}, "short_side is 96"),
        ({"flip": True}, "flip mirrors"),
        ({"crop": "random"}, "cropped at random"),
        ({"degradation": "realesrgan"}, "realesrgan sharpens its targets"),
        ({"scale": (1.0, 1.5)}, "another size"),
        ({"buckets": ((64, 96),)}, "other shapes"),
        ({"sources": [("corpus", 0.5), ("dead_leaves", 0.5)]}, "dead leaves"),
    ],
)
def test_latents_are_refused_where_the_rows_would_differ(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_precomputed(LATENTS, {**FIXED, **changes})


def test_a_stream_with_default_settings_is_refused_with_every_reason() -> None:
    stream = StreamConfig(sources=[("corpus", 1.0)], seed=0, resolution=64)
    with pytest.raises(UsageError, match=r"prior nano \(abc\); flip mirrors .*; rows are cropped at random"):
        check_precomputed(LATENTS, stream, model_digest="def")


def test_embeddings_fit_the_captions_that_they_were_made_of() -> None:
    check_precomputed(EMBEDDINGS, {**FIXED, "flip": True, "crop": "random"})  # a caption does not depend on the crop
    for captioner in ("tags", ""):
        with pytest.raises(UsageError, match="own captions"):
            check_precomputed(EMBEDDINGS, {**FIXED, "captioner": captioner})
    from_column = {**EMBEDDINGS, "captions": {"column": "llava", "producer": {}}}
    check_precomputed(from_column, {**FIXED, "captioner": "column:llava"})
    with pytest.raises(UsageError, match='text column "llava"'):
        check_precomputed(from_column, FIXED)
    with pytest.raises(UsageError, match="is not precomputed"):
        check_precomputed({"name": "caption"}, FIXED)


@pytest.mark.slow
@pytest.mark.full
def test_workers_write_the_same_files_as_one_process(ray_session: None, corpus: Path) -> None:
    computed(corpus)
    before = {name: files(corpus, name) for name in ("latents-64", "embeddings")}
    for name in before:
        (corpus / "columns" / name / "column.json").unlink()
        (corpus / "columns" / name / "shards.jsonl").unlink()
    results = computed(corpus, workers=2)
    assert [result.reused for result in results] == [0, 0]
    assert {name: files(corpus, name) for name in before} == before


def test_a_picture_of_several_texts_has_no_embedding(photographs: list[np.ndarray], tmp_path: Path) -> None:
    """A stream draws one of its texts for each row, and the trainer encodes that one."""
    captions = (join_texts(["red", "bright"]), "green", "blue")
    samples = [(f"p{n}", "png", encode_png(photographs[0]), {"caption": text}) for n, text in enumerate(captions)]
    write_corpus(tmp_path / "corpus", "test", {"train": samples, "held_out": []}, 4)
    (result,) = computed(tmp_path / "corpus", "embeddings")
    assert (result.samples, dict(result.reasons)) == (3, {"several_texts": 1})
    column = open_column(open_corpus(tmp_path / "corpus"), "embeddings")
    assert column.value("train", 0) is None and column.value("train", 1) is not None
