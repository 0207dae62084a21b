"""Texts of the stream: whose words a row carries, captions made while it runs, negatives with their prompts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from components.captions.tags import describe
from components.captions.views import find_view
from components.corpora import CaptionSpec
from components.degradations import build_degradation
from components.images import encode_png, to_float, to_uint8
from components.negatives import NEGATIVE_PROMPTS
from components.recipes import load_recipe
from components.synthetic import dead_leaves
from components.tensors import collate
from components.types import Image, SampleError
from pipelines import feed
from pipelines.caption import picture_sha256, start_captioner_pool
from pipelines.errors import Failure, UsageError
from pipelines.rows import read_lines
from pipelines.shards import write_corpus
from pipelines.stream import check_stream, heldout_rows, load_columns, load_row
from pipelines.stream_config import StreamConfig, captioner_of
from pipelines.stream_texts import Captioning, check_missing_captions
from pipelines.train import TrainInputs, check_inputs, read_metrics, stream_config, train

POOR = NEGATIVE_PROMPTS["supir-samples"]


def make_corpus(folder: Path, captions: Sequence[str], held_out: int = 0, kind: str = "good") -> str:
    """Pictures that all differ, two a shard; those beyond `captions` are held out, without a caption."""
    samples = [
        (f"{kind}-{n}", "png", encode_png(dead_leaves(72, 7 if kind == "good" else 8, n)), {"caption": caption})
        for n, caption in enumerate([*captions, *[""] * held_out])
    ]
    write_corpus(folder, kind, {"train": samples[: len(captions)], "held_out": samples[len(captions) :]}, 2)
    return str(folder)


class Pool:
    """Answers in this process, and counts: a word made of the picture, or a reason for pictures in `mute`."""

    def __init__(self, mute: Callable[[Image], bool] = lambda image: False) -> None:
        self.mute, self.questions = mute, []

    def answers(self, images: Sequence[Image], sha256s: Sequence[str]) -> list[str | SampleError]:
        assert [picture_sha256(image) for image in images] == list(sha256s)
        self.questions.append(len(images))
        silence = SampleError("empty_caption", "the captioner said nothing about it")
        return [silence if self.mute(image) else described(image) for image in images]


def described(image: Image) -> str:
    return f"picture {picture_sha256(image)[:12]}"


def asking(pool: Any, view: str = "hq") -> Captioning:
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


def test_a_captioner_is_asked_once_a_block_and_only_for_what_is_missing(config: StreamConfig) -> None:
    pool, plain = Pool(), load_columns(config, range(12))
    columns = load_columns(replace(config, captioning=asking(pool)), range(12))
    lacking = [n for n in range(12) if not plain["prompt"][n].strip()]
    assert len(lacking) == 8 and pool.questions == [8]
    for n in range(12):
        expected = described(columns["hq"][n]) if n in lacking else plain["prompt"][n]
        assert (columns["prompt"][n], columns["uncaptioned"][n]) == (expected, "")
    for name in ("key", "hq", "lq", "plan", "sizes"):
        assert np.array_equal(columns[name], plain[name])
    assert load_columns(replace(config, captioner="", captioning=asking(pool)), [0])["prompt"][0].startswith("picture")


def test_prompts_do_not_depend_on_what_is_asked_together(config: StreamConfig) -> None:
    asked = replace(config, captioning=asking(Pool()))
    whole = list(load_columns(asked, range(12))["prompt"])
    assert [load_row(asked, n)["prompt"] for n in range(12)] == whole
    assert [*load_columns(asked, range(5))["prompt"], *load_columns(asked, range(5, 12))["prompt"]] == whole


def test_a_picture_without_words_stays_and_says_why(config: StreamConfig) -> None:
    means = [float(load_row(config, n)["hq"].mean()) for n in range(12)]
    limit = sorted(means)[6]
    asked = replace(config, captioning=asking(Pool(mute=lambda image: float(image.mean()) < limit)))
    for n in range(12):
        row, plain = load_row(asked, n), load_row(config, n)
        assert row["key"] == plain["key"]
        if means[n] < limit and not plain["prompt"].strip():
            assert row["prompt"] == "" and row["uncaptioned"].startswith(f"[empty_caption] {row['key']}: the captioner")
        else:
            assert row["prompt"] and row["uncaptioned"] == ""


def test_the_view_decides_what_is_seen(config: StreamConfig) -> None:
    position = next(n for n in range(12) if not load_row(config, n)["prompt"].strip())
    lq = replace(config, captioning=asking(Pool(), "lq"))
    row = load_row(lq, position)
    assert row["prompt"] == described(row["lq"]) != described(row["hq"])
    undegraded = replace(lq, degradation="")
    assert load_columns(undegraded, [position])["prompt"][0] == described(load_row(undegraded, position)["hq"])
    with pytest.raises(UsageError, match="from lq where the device degrades"):
        check_stream(replace(lq, degrade_on="device"))

    def both(hq: Image | None, lq: Image | None, preview: Image | None) -> Image:
        assert hq is not None and lq is not None and preview is None
        return np.concatenate([hq, lq])

    row = load_row(replace(config, captioning=Captioning(pool=Pool(), view=both)), position)
    assert row["prompt"] == described(np.concatenate([row["hq"], row["lq"]]))

    def broken(hq: Image | None, lq: Image | None, preview: Image | None) -> Image:
        raise RuntimeError("no room")

    row = load_row(replace(config, captioning=Captioning(pool=Pool(), view=broken)), position)
    assert row["uncaptioned"] == f"[failed] {row['key']}: the view fails: RuntimeError: no room"


def test_held_out_rows_have_captions_too(config: StreamConfig) -> None:
    pool = Pool()
    rows = heldout_rows(replace(config, captioning=asking(pool)), 5)
    assert [row["prompt"] for row in rows] == [described(row["hq"]) for row in rows] and pool.questions == [5]


# --- several corpora and negatives ------------------------------------------------------------------------------------


@pytest.fixture
def mixed(tmp_path: Path, corpus: str, config: StreamConfig) -> StreamConfig:
    negatives = make_corpus(tmp_path / "negatives", [POOR, POOR, "", POOR], held_out=1, kind="poor")
    return replace(
        config,
        sources=((negatives, 1.0), (corpus, 2.0), ("dead_leaves", 1.0)),
        captioner="tags",
        captioners=("negative", "manifest", "tags"),
    )


def test_every_source_has_its_own_words(mixed: StreamConfig) -> None:
    pool = Pool()
    columns = load_columns(replace(mixed, captioning=asking(pool)), range(96))
    kinds = [key.split("-")[0] for key in columns["key"]]
    assert {kind: kinds.count(kind) for kind in set(kinds)}.keys() == {"good", "poor", "dead"}
    for kind, prompt, hq in zip(kinds, columns["prompt"], columns["hq"], strict=True):
        if kind == "poor":
            assert prompt == POOR
        elif kind == "dead":
            assert prompt == describe(hq)
        else:
            assert prompt in ("a lake", "a hill", described(hq))
    asked = [n for n, prompt in enumerate(columns["prompt"]) if prompt.startswith("picture ")]
    assert pool.questions == [len(asked)] and {kinds[n] for n in asked} == {"good"}


def test_a_negative_without_its_prompt_is_replaced_and_recorded(mixed: StreamConfig) -> None:
    columns = load_columns(mixed, range(128))
    assert "poor-2" not in set(columns["key"])
    records = {record.split(":")[0] for record in columns["replaced"] if record}
    assert records == {"[no_prompt] poor-2"}


def test_negatives_hold_out_nothing(mixed: StreamConfig) -> None:
    assert {row["key"] for row in heldout_rows(mixed, 4)} == {"good-6", "good-7"}
    with pytest.raises(Failure, match="holds any picture out"):
        heldout_rows(replace(mixed, sources=mixed.sources[:1], captioners=("negative",)), 1)


def test_captioners_must_fit_the_sources(mixed: StreamConfig) -> None:
    with pytest.raises(UsageError, match="as many as the 3 sources"):
        replace(mixed, captioners=("negative",))
    with pytest.raises(UsageError, match='Did you mean "negative"'):
        replace(mixed, captioners=("negativ", "tags", "tags"))
    assert captioner_of(mixed, mixed.sources[1][0]) == "manifest"
    assert captioner_of(replace(mixed, captioners=()), mixed.sources[0][0]) == "tags"


def test_a_mixture_reaches_the_stream_by_its_names(tmp_path: Path, corpus: str) -> None:
    """SUPIR section 4.1: 20.07 million pictures to 100 thousand negatives, in blocks of 1024: 1019 to 5."""
    negatives = make_corpus(tmp_path / "negatives", [POOR] * 2, kind="poor")
    recipe = load_recipe("instantir-dcp-nano", ["mixture=supir"])
    inputs = TrainInputs(corpora={"supir-20m": Path(corpus), "supir-negatives": Path(negatives)})
    check_inputs(recipe, inputs)
    stream = stream_config(recipe, inputs)
    assert stream.captioners == ("tags", "negative")
    from pipelines.stream import source_of

    drawn = [source_of(stream, position)[0] for position in range(2048)]
    assert (drawn.count(corpus), drawn.count(negatives)) == (2038, 10)
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
def test_captioners_that_cannot_be_meant_are_refused_with_the_recipe(overrides: list[str], message: str) -> None:
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
    mixed: StreamConfig, captioners: Any, tmp_path: Path
) -> None:
    """Captioners die in between, and are started anew by Ray; a second run finds all captions in the cache."""
    import ray

    asked = replace(mixed, captioning=asking(captioners))
    rows: dict[int, dict[str, Any]] = {}
    for rank, world in ((0, 1), (0, 2), (1, 2)):
        seen = feed.rank_batches(asked, 0, 64, 8, rank, world, own_process=False)
        for number, columns in enumerate(seen):
            if number == 1 and world == 2:
                ray.kill(captioners.actors[rank], no_restart=False)
            batch = collate(columns)
            for n, position in enumerate(batch.positions.tolist()):
                row = {name: column[n] for name, column in columns.items()}
                assert batch.prompts[n] == row["prompt"]
                before = rows.setdefault(position, row)
                assert all(np.array_equal(before[name], row[name]) for name in row)
    assert sorted(rows) == list(range(64))
    degradation, asked_for = build_degradation("realesrgan-nano"), set()
    for row in rows.values():
        assert np.array_equal(to_uint8(degradation.apply(to_float(row["hq"]), json.loads(row["plan"]))), row["lq"])
        kind = row["key"].split("-")[0]
        if kind == "good" and row["prompt"] not in ("a lake", "a hill"):
            asked_for.add(picture_sha256(row["hq"]))
            assert row["prompt"] == describe(row["hq"])
        elif kind == "poor":
            assert row["prompt"] == POOR
        assert row["uncaptioned"] == ""
    kept = {line["picture"] for path in (tmp_path / "cache").rglob("*.jsonl") for line in read_lines(path)}
    assert kept == asked_for
    captioners.close()
    again = load_columns(asked, range(64))  # nobody is there to ask any more
    assert list(again["prompt"]) == [rows[position]["prompt"] for position in range(64)]


TINY = ["resolution=32", "short_side=48", "batch_size=8", "checkpoint_every=2", "evaluate_every=4", "heldout_triples=4"]
TINY += ["steps_at_restore=1", "resampler_dim=16", "resampler_depth=1", "resampler_head_dim=8", "resampler_heads=2"]
TINY += ["resampler_queries=4"]


@pytest.mark.slow
@pytest.mark.full
def test_a_stage_trains_on_the_mixture_with_captions_made_meanwhile(
    ray_session: None, tmp_path: Path, corpus: str
) -> None:
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
    expected = load_columns(replace(stream_config(recipe, inputs), captioning=asking(Pool())), range(16))
    keys = [key for row in read_lines(tmp_path / "out" / "order.jsonl") for key in row["keys"]]
    assert keys == list(expected["key"]) and sum(key.startswith("poor") for key in keys) >= 2
    kept = {line["picture"]: line["caption"] for path in cache.rglob("*.jsonl") for line in read_lines(path)}
    for hq, prompt in zip(expected["hq"], expected["prompt"], strict=True):
        assert (kept.get(picture_sha256(hq)) == describe(hq)) == (prompt == described(hq))
    alive = [a for a in actors().values() if a["State"] == "ALIVE" and "Captioner" in a["ActorClassName"]]
    assert alive == []  # the pool went with the run
