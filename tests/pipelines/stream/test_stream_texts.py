"""Texts of the stream: captions of each source, captions written during training, negatives with their prompts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from components.captions.tags import describe
from components.captions.text import join_texts
from components.captions.views import find_view
from components.corpora import CaptionSpec
from components.degradations import build_degradation
from components.images import encode_png, to_float, to_uint8
from components.negatives import NEGATIVE_PROMPTS
from components.randomness import generator
from components.synthetic import dead_leaves
from components.systems.recipes import load_recipe
from components.tensors import collate
from components.types import Image, SampleError
from pipelines.core.errors import Failure, UsageError
from pipelines.core.metrics import read_metrics
from pipelines.core.pool import Pool as JobPool
from pipelines.core.rows import read_lines
from pipelines.corpus.columns.captioners import picture_sha256, start_captioner_pool
from pipelines.corpus.columns.captions import existing_caption
from pipelines.corpus.columns.computing import compute_column
from pipelines.corpus.columns.spec import ColumnSpec
from pipelines.corpus.shards import write_corpus
from pipelines.stream import feed
from pipelines.stream.config import StreamConfig, captioner_of
from pipelines.stream.rows import check_stream, heldout_rows, load_columns, load_row
from pipelines.stream.texts import Captioning, check_missing_captions
from pipelines.training.inputs import TrainInputs, check_inputs, stream_config
from pipelines.training.train import train

POOR = NEGATIVE_PROMPTS["supir-samples"]


def make_corpus(folder: Path, captions: Sequence[str], held_out: int = 0, kind: str = "good") -> str:
    """Write a corpus of different pictures, two per shard; those after `captions` are held out, without a caption."""
    samples = [
        (f"{kind}-{n}", "png", encode_png(dead_leaves(72, 7 if kind == "good" else 8, n)), {"caption": caption})
        for n, caption in enumerate([*captions, *[""] * held_out])
    ]
    write_corpus(folder, kind, {"train": samples[: len(captions)], "held_out": samples[len(captions) :]}, 2)
    return str(folder)


class Pool:
    """A pool in this process. Its caption holds the picture's sha256; pictures for which `mute` is true get an error.

    `calls` has the number of pictures of each call.
    """

    def __init__(self, mute: Callable[[Image], bool] = lambda image: False) -> None:
        self.mute, self.calls = mute, []

    def answers(self, images: Sequence[Image], sha256s: Sequence[str]) -> list[str | SampleError]:
        assert [picture_sha256(image) for image in images] == list(sha256s)
        self.calls.append(len(images))
        error = SampleError("empty_caption", "the captioner wrote no text about it")
        return [error if self.mute(image) else caption_of(image) for image in images]


def caption_of(image: Image) -> str:
    return f"picture {picture_sha256(image)[:12]}"


def captioning(pool: Any, view: str = "hq") -> Captioning:
    return Captioning(pool=pool, view=find_view(view))


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    return make_corpus(tmp_path / "corpus", ["a lake", "", " ", "a hill", "", ""], held_out=2)


@pytest.fixture
def config(corpus: str) -> StreamConfig:
    return StreamConfig(
        sources=((corpus, 1.0),),
        seed=3,
        resolution=32,
        short_side=48,
        degradation="realesrgan-nano",
        captioner="manifest",
    )


def test_a_captioner_is_called_once_per_block_and_only_for_missing_captions(config: StreamConfig) -> None:
    pool, plain = Pool(), load_columns(config, range(12))
    columns = load_columns(replace(config, captioning=captioning(pool)), range(12))
    missing = [n for n in range(12) if not plain["prompt"][n].strip()]
    assert len(missing) == 8 and pool.calls == [8]
    for n in range(12):
        expected = caption_of(columns["hq"][n]) if n in missing else plain["prompt"][n]
        assert (columns["prompt"][n], columns["uncaptioned"][n]) == (expected, "")
    for name in ("key", "hq", "lq", "plan", "sizes"):
        assert np.array_equal(columns[name], plain[name])
    assert load_columns(replace(config, captioner="", captioning=captioning(pool)), [0])["prompt"][0].startswith(
        "picture"
    )


def test_prompts_do_not_depend_on_the_rows_of_a_block(config: StreamConfig) -> None:
    captioned = replace(config, captioning=captioning(Pool()))
    prompts = list(load_columns(captioned, range(12))["prompt"])
    assert [load_row(captioned, n)["prompt"] for n in range(12)] == prompts
    assert [*load_columns(captioned, range(5))["prompt"], *load_columns(captioned, range(5, 12))["prompt"]] == prompts


def test_a_row_without_a_caption_stays_and_has_the_reason(config: StreamConfig) -> None:
    means = [float(load_row(config, n)["hq"].mean()) for n in range(12)]
    limit = sorted(means)[6]
    captioned = replace(config, captioning=captioning(Pool(mute=lambda image: float(image.mean()) < limit)))
    for n in range(12):
        row, plain = load_row(captioned, n), load_row(config, n)
        assert row["key"] == plain["key"]
        if means[n] < limit and not plain["prompt"].strip():
            assert row["prompt"] == "" and row["uncaptioned"].startswith(f"[empty_caption] {row['key']}: the captioner")
        else:
            assert row["prompt"] and row["uncaptioned"] == ""


def test_the_view_chooses_the_picture_to_caption(config: StreamConfig) -> None:
    position = next(n for n in range(12) if not load_row(config, n)["prompt"].strip())
    lq = replace(config, captioning=captioning(Pool(), "lq"))
    row = load_row(lq, position)
    assert row["prompt"] == caption_of(row["lq"]) != caption_of(row["hq"])
    clean = replace(lq, degradation="")
    assert load_columns(clean, [position])["prompt"][0] == caption_of(load_row(clean, position)["hq"])
    with pytest.raises(UsageError, match="from lq with degrade_on=device"):
        check_stream(replace(lq, degrade_on="device"))

    def both(hq: Image | None, lq: Image | None, preview: Image | None) -> Image:
        assert hq is not None and lq is not None and preview is None
        return np.concatenate([hq, lq])

    row = load_row(replace(config, captioning=Captioning(pool=Pool(), view=both)), position)
    assert row["prompt"] == caption_of(np.concatenate([row["hq"], row["lq"]]))

    def broken(hq: Image | None, lq: Image | None, preview: Image | None) -> Image:
        raise RuntimeError("no room")

    row = load_row(replace(config, captioning=Captioning(pool=Pool(), view=broken)), position)
    assert row["uncaptioned"] == f"[failed] {row['key']}: the view fails: RuntimeError: no room"


def test_held_out_rows_have_captions_too(config: StreamConfig) -> None:
    pool = Pool()
    rows = heldout_rows(replace(config, captioning=captioning(pool)), 5)
    assert [row["prompt"] for row in rows] == [caption_of(row["hq"]) for row in rows] and pool.calls == [5]


# --- several corpora and negatives ------------------------------------------------------------------------------------


@pytest.fixture
def mixture(tmp_path: Path, corpus: str, config: StreamConfig) -> StreamConfig:
    negatives = make_corpus(tmp_path / "negatives", [POOR, POOR, "", POOR], held_out=1, kind="poor")
    return replace(
        config,
        sources=((negatives, 1.0), (corpus, 2.0), ("dead_leaves", 1.0)),
        captioner="tags",
        captioners=("negative", "manifest", "tags"),
    )


def test_every_source_has_its_own_captioner(mixture: StreamConfig) -> None:
    pool = Pool()
    columns = load_columns(replace(mixture, captioning=captioning(pool)), range(96))
    kinds = [key.split("-")[0] for key in columns["key"]]
    assert {kind: kinds.count(kind) for kind in set(kinds)}.keys() == {"good", "poor", "dead"}
    for kind, prompt, hq in zip(kinds, columns["prompt"], columns["hq"], strict=True):
        if kind == "poor":
            assert prompt == POOR
        elif kind == "dead":
            assert prompt == describe(hq)
        else:
            assert prompt in ("a lake", "a hill", caption_of(hq))
    rows = [n for n, prompt in enumerate(columns["prompt"]) if prompt.startswith("picture ")]
    assert pool.calls == [len(rows)] and {kinds[n] for n in rows} == {"good"}


def test_a_negative_without_its_prompt_is_replaced_and_recorded(mixture: StreamConfig) -> None:
    columns = load_columns(mixture, range(128))
    assert "poor-2" not in set(columns["key"])
    records = {record.split(":")[0] for record in columns["replaced"] if record}
    assert records == {"[no_prompt] poor-2"}


def test_held_out_rows_are_not_negatives(mixture: StreamConfig) -> None:
    assert {row["key"] for row in heldout_rows(mixture, 4)} == {"good-6", "good-7"}
    with pytest.raises(Failure, match="has a held-out picture"):
        heldout_rows(replace(mixture, sources=mixture.sources[:1], captioners=("negative",)), 1)


def test_captioners_must_fit_the_sources(mixture: StreamConfig) -> None:
    with pytest.raises(UsageError, match="as many as the 3 sources"):
        replace(mixture, captioners=("negative",))
    with pytest.raises(UsageError, match='Did you mean "negative"'):
        replace(mixture, captioners=("negativ", "tags", "tags"))
    assert captioner_of(mixture, mixture.sources[1][0]) == "manifest"
    assert captioner_of(replace(mixture, captioners=()), mixture.sources[0][0]) == "tags"


def test_a_mixture_of_a_recipe_sets_sources_and_weights(tmp_path: Path, corpus: str) -> None:
    """SUPIR section 4.1: 20.07 million pictures and 100 thousand negatives; in a block of 1024: 1019 and 5."""
    negatives = make_corpus(tmp_path / "negatives", [POOR] * 2, kind="poor")
    recipe = load_recipe("instantir-dcp-nano", ["mixture=supir"])
    inputs = TrainInputs(corpora={"supir-20m": Path(corpus), "supir-negatives": Path(negatives)})
    check_inputs(recipe, inputs)
    stream = stream_config(recipe, inputs)
    assert stream.captioners == ("tags", "negative")
    from pipelines.stream.rows import source_of

    sources = [source_of(stream, position)[0] for position in range(2048)]
    assert (sources.count(corpus), sources.count(negatives)) == (2038, 10)
    with pytest.raises(UsageError, match="--input supir-negatives="):
        check_inputs(recipe, TrainInputs(corpora={"supir-20m": Path(corpus)}))
    with pytest.raises(UsageError, match="no held-out picture"):
        check_inputs(
            load_recipe("instantir-dcp-nano", ["mixture=supir-nano"]),
            TrainInputs(corpora={"corpus": Path(negatives), "negatives": Path(corpus)}),
        )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["missing_captions.model=lava"], 'Did you mean "llava"'),
        (["missing_captions.model=tags", "missing_captions.view=hk"], 'Did you mean "hq"'),
        (["missing_captions.model=tags", "missing_captions.view=lq", "degradation.degrade_on=device"], "on the device"),
    ],
)
def test_a_recipe_with_an_invalid_captioner_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_missing_captions(load_recipe("instantir-dcp-nano", overrides))


# --- through Ray ------------------------------------------------------------------------------------------------------


@pytest.fixture
def captioners(ray_session: None, tmp_path: Path) -> Iterator[Any]:
    pool = start_captioner_pool(CaptionSpec(model="tags", workers=2, batch_size=4), tmp_path / "cache", 0.25)
    yield pool
    pool.close()


@pytest.mark.slow
def test_text_plan_and_picture_stay_together_on_any_number_of_workers(
    mixture: StreamConfig, captioners: Any, tmp_path: Path
) -> None:
    """The test kills captioners, and Ray restarts them; a second run reads all captions from the cache."""
    import ray

    captioned = replace(mixture, captioning=captioning(captioners))
    rows: dict[int, dict[str, Any]] = {}
    for rank, world in ((0, 1), (0, 2), (1, 2)):
        batches = feed.rank_batches(captioned, 0, 64, 8, rank, world, own_process=False)
        for number, columns in enumerate(batches):
            if number == 1 and world == 2:
                ray.kill(captioners.actors[rank], no_restart=False)
            batch = collate(columns)
            for n, position in enumerate(batch.positions.tolist()):
                row = {name: column[n] for name, column in columns.items()}
                assert batch.prompts[n] == row["prompt"]
                first = rows.setdefault(position, row)
                assert all(np.array_equal(first[name], row[name]) for name in row)
    assert sorted(rows) == list(range(64))
    degradation, digests = build_degradation("realesrgan-nano"), set()
    for row in rows.values():
        assert np.array_equal(to_uint8(degradation.apply(to_float(row["hq"]), json.loads(row["plan"]))), row["lq"])
        kind = row["key"].split("-")[0]
        if kind == "good" and row["prompt"] not in ("a lake", "a hill"):
            digests.add(picture_sha256(row["hq"]))
            assert row["prompt"] == describe(row["hq"])
        elif kind == "poor":
            assert row["prompt"] == POOR
        assert row["uncaptioned"] == ""
    cached = {line["picture"] for path in (tmp_path / "cache").rglob("*.jsonl") for line in read_lines(path)}
    assert cached == digests
    captioners.close()
    again = load_columns(captioned, range(64))  # without captioners
    assert list(again["prompt"]) == [rows[position]["prompt"] for position in range(64)]


TINY = ["resolution=32", "short_side=48", "batch_size=8", "checkpoint_every=2", "evaluate_every=4", "heldout_triples=4"]
TINY += ["steps_at_restore=1", "resampler_dim=16", "resampler_depth=1", "resampler_head_dim=8", "resampler_heads=2"]
TINY += ["resampler_queries=4"]


@pytest.mark.slow
@pytest.mark.full
def test_a_stage_trains_on_a_mixture_with_captioners(ray_session: None, tmp_path: Path, corpus: str) -> None:
    from ray._private.state import actors

    negatives = make_corpus(tmp_path / "negatives", [POOR] * 3, kind="poor")
    cache = tmp_path / "cache"
    settings = [*TINY, "steps=2", "mixture=supir-nano", "captioner=manifest", "missing_captions.model=tags"]
    settings += [f"placement.caption_cache={cache}", "placement.cpus_per_captioner=0.5"]
    recipe = load_recipe("instantir-dcp-nano", settings)
    inputs = TrainInputs(corpora={"corpus": Path(corpus), "negatives": Path(negatives)})
    train(recipe, inputs, tmp_path / "out")
    series = read_metrics(tmp_path / "out" / "metrics.jsonl")
    assert series["uncaptioned"] == {1: 0.0, 2: 0.0} and np.isfinite(list(series["loss"].values())).all()
    expected = load_columns(replace(stream_config(recipe, inputs), captioning=captioning(Pool())), range(16))
    keys = [key for row in read_lines(tmp_path / "out" / "order.jsonl") for key in row["keys"]]
    assert keys == list(expected["key"]) and sum(key.startswith("poor") for key in keys) >= 2
    captions = {line["picture"]: line["caption"] for path in cache.rglob("*.jsonl") for line in read_lines(path)}
    for hq, prompt in zip(expected["hq"], expected["prompt"], strict=True):
        assert (captions.get(picture_sha256(hq)) == describe(hq)) == (prompt == caption_of(hq))
    alive = [a for a in actors().values() if a["State"] == "ALIVE" and "Captioner" in a["ActorClassName"]]
    assert alive == []  # the run stopped its pool


# --- several texts of a picture ---------------------------------------------------------------------------------------


@pytest.fixture
def several(tmp_path: Path) -> StreamConfig:
    """A stream of a corpus whose second picture has three texts."""
    folder = make_corpus(tmp_path / "several", ["alone", join_texts(["one", "two", "three"]), ""])
    return StreamConfig(sources=((folder, 1.0),), seed=3, resolution=32, captioner="manifest")


def test_one_of_several_texts_is_drawn_by_seed_key_and_position(several: StreamConfig) -> None:
    rows = [load_row(several, position) for position in range(90)]
    drawn = [row["prompt"] for row in rows if "1" in row["key"]]
    assert len(drawn) == 30 and set(drawn) == {"one", "two", "three"}
    assert {row["prompt"] for row in rows if "1" not in row["key"]} == {"alone", ""}
    expected = [
        ["one", "two", "three"][int(generator(3, "caption", row["key"], int(row["position"])).integers(0, 3))]
        for row in rows
        if "1" in row["key"]
    ]
    assert drawn == expected
    assert load_columns(several, range(90))["prompt"].tolist() == [row["prompt"] for row in rows]
    other = [load_row(replace(several, seed=4), position) for position in range(90)]
    assert [row["prompt"] for row in other if "1" in row["key"]] != drawn


def test_texts_of_a_column_are_drawn_too(several: StreamConfig) -> None:
    folder = Path(several.sources[0][0])
    column = ColumnSpec(name="captions", kind="text", producer={}, factory=_none, existing=existing_caption)
    compute_column(folder, column, JobPool(workers=0), max_bad_fraction=1.0)
    config = replace(several, captioner="column:captions")
    manifest = [load_row(several, position)["prompt"] for position in range(30)]
    assert [load_row(config, position)["prompt"] for position in range(30)] == manifest


def _none() -> Callable[[Sequence[Image], Sequence[str]], list[SampleError]]:
    return lambda images, keys: [SampleError("no_caption", "none", key) for key in keys]
