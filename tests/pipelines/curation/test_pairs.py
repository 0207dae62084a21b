"""Pairs: two folders become a corpus with a column of inputs, and rows of the stream hold both sides."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from components.images import encode_png
from components.synthetic import dead_leaves
from components.tensors import collate_rows, images_to_tensor
from components.types import Image
from pipelines.core.errors import Failure, UsageError
from pipelines.corpus.catalogue import load_spec
from pipelines.corpus.columns.reading import open_column, verify_column
from pipelines.corpus.shards import open_corpus
from pipelines.curation.curate import curate
from pipelines.stream.config import StreamConfig
from pipelines.stream.feed import block_rows
from pipelines.stream.rows import check_stream, heldout_rows, load_columns, load_row

pytestmark = pytest.mark.usefixtures("without_ray")


def dark(picture: Image) -> Image:
    """A quarter of the light: the input of a pair in these tests, so that its pixels differ from the target's."""
    return (picture // 4).astype(np.uint8)


def write_pairs(folder: Path, count: int = 8, names: tuple[str, str] = ("p{}", "p{}")) -> None:
    """count pairs below folder/hq and folder/lq."""
    for side in ("hq", "lq"):
        (folder / side).mkdir(parents=True)
    for index in range(count):
        picture = dead_leaves(160, 7, index)[:128, :]
        (folder / "hq" / f"{names[0].format(index)}.png").write_bytes(encode_png(picture))
        (folder / "lq" / f"{names[1].format(index, index)}.png").write_bytes(encode_png(dark(picture)))


def make(folder: Path, out: Path, *more: str) -> Path:
    overrides = [f"sources.0.path={folder / 'hq'}", f"pairs.0.lq={folder / 'lq'}", "split.held_out_fraction=0.3"]
    curate(load_spec("pairs", [*overrides, *more]), out)
    return out


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    write_pairs(tmp_path / "pairs")
    return make(tmp_path / "pairs", tmp_path / "corpus")


@pytest.fixture
def config(corpus: Path) -> StreamConfig:
    return StreamConfig(sources=((str(corpus), 1.0),), seed=3, resolution=64, pairs="lq")


def test_every_picture_gets_the_input_of_its_name(corpus: Path) -> None:
    corpus_reader = open_corpus(corpus)
    column = open_column(corpus_reader, "lq")
    assert column.kind == "picture" and verify_column(corpus_reader, "lq") == []
    folder = corpus.parent / "pairs" / "lq"
    for split, part in corpus_reader.splits.items():
        for sample in range(len(part)):
            key = part.locate(sample)[1]["key"]
            assert column.value(split, sample) == (folder / f"{key}.png").read_bytes(), "files are stored as they are"


def test_both_sides_of_a_row_are_cut_and_mirrored_alike(config: StreamConfig) -> None:
    mirrored = 0
    for position in range(12):
        row = load_row(config, position)
        assert row["plan"] == "{}" and row["replaced"] == ""
        assert np.abs(row["lq"].astype(int) - row["hq"] // 4).max() <= 1
        mirrored += not np.array_equal(row["hq"], load_row(dataclasses.replace(config, flip=False), position)["hq"])
    assert 0 < mirrored < 12
    smaller = dataclasses.replace(config, resolution=48, short_side=96)  # both are shrunk, then cropped
    row = load_row(smaller, 1)
    assert np.abs(row["lq"].astype(int) * 4 - row["hq"]).mean() < 4
    columns = load_columns(config, np.arange(4))
    assert all(np.array_equal(columns[side][2], load_row(config, 2)[side]) for side in ("hq", "lq"))
    assert block_rows(config, 4, 4) == block_rows(dataclasses.replace(config, pairs="", degradation="x4"), 4, 4)


def test_held_out_rows_are_pairs_too(config: StreamConfig) -> None:
    rows = heldout_rows(config, 3)
    assert all(np.abs(row["lq"].astype(int) - row["hq"] // 4).max() <= 1 for row in rows)
    batch = collate_rows(rows)
    assert batch.lq.max() < -0.4 and batch.masks is None


def test_pairs_of_other_names_belong_together_by_their_order(tmp_path: Path) -> None:
    write_pairs(tmp_path / "pairs", names=("norain-{}", "rain-{}"))
    column = open_column(open_corpus(make(tmp_path / "pairs", tmp_path / "corpus")), "lq")
    row = load_row(StreamConfig(sources=((str(tmp_path / "corpus"), 1.0),), seed=3, resolution=64, pairs="lq"), 0)
    assert column.kind == "picture" and np.abs(row["lq"].astype(int) - row["hq"] // 4).max() <= 1


def test_a_target_without_input_is_quarantined_and_replaced(tmp_path: Path) -> None:
    write_pairs(tmp_path / "pairs")
    (tmp_path / "pairs" / "lq" / "p1.png").unlink()
    (tmp_path / "pairs" / "lq" / "p2.png").write_bytes(encode_png(dead_leaves(64, 0, 0)))
    (tmp_path / "pairs" / "lq" / "p3.png").write_bytes(b"no picture")
    corpus = make(tmp_path / "pairs", tmp_path / "corpus")
    bad = (corpus / "columns" / "lq" / "quarantine.jsonl").read_text()
    assert '"no_pair"' in bad and '"pair_size"' in bad and "64 x 64 pixels, it has 160 x 128" in bad
    assert '"not_image"' in bad and bad.count("\n") == 3
    config = StreamConfig(sources=((str(corpus), 1.0),), seed=3, resolution=64, pairs="lq")
    rows = [load_row(config, position) for position in range(8)]
    assert {row["key"] for row in rows}.isdisjoint({"p1", "p2", "p3"})
    assert any("no_pair" in row["replaced"] for row in rows)


def test_smaller_inputs_of_a_scale(tmp_path: Path) -> None:
    write_pairs(tmp_path / "pairs")
    for path in (tmp_path / "pairs" / "lq").iterdir():
        index = int(path.stem[1:])
        path.write_bytes(encode_png(dark(dead_leaves(160, 7, index)[:128])[::2, ::2]))
    corpus = make(tmp_path / "pairs", tmp_path / "corpus", "pairs.0.scale=2")
    config = StreamConfig(sources=((str(corpus), 1.0),), seed=3, resolution=64, pairs="lq")
    row = load_row(config, 0)
    assert row["lq"].shape == row["hq"].shape and np.abs(row["lq"].astype(int) * 4 - row["hq"]).mean() < 30


def test_inputs_have_the_limits_of_their_corpus(tmp_path: Path) -> None:
    """Inputs of strips, and of few pixels: neither is refused by the decoder's own defaults."""
    for side, step in (("hq", 1), ("lq", 16)):
        (tmp_path / "pairs" / side).mkdir(parents=True)
        strip = np.tile(dead_leaves(64, 7, 0), (1, 25, 1))[::step, ::step]
        (tmp_path / "pairs" / side / "a.png").write_bytes(encode_png(strip))
    corpus = make(tmp_path / "pairs", tmp_path / "corpus", "filters.max_aspect=30", "pairs.0.scale=16")
    reader = open_corpus(corpus)
    (split,) = [name for name, part in reader.splits.items() if len(part)]
    assert open_column(reader, "lq").value(split, 0) == (tmp_path / "pairs" / "lq" / "a.png").read_bytes()


def test_folders_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    write_pairs(tmp_path / "pairs", names=("cat{}", "dog{}s{}"))
    with pytest.raises(UsageError, match=r"8 of 8 inputs have no target .* 8 .* pairs: cat0.png with dog0s0.png"):
        make(tmp_path / "pairs", tmp_path / "corpus")
    with pytest.raises(UsageError, match="both the targets and the inputs"):
        make(tmp_path / "pairs", tmp_path / "other", f"pairs.0.lq={tmp_path / 'pairs' / 'hq'}")


def test_unpaired_inputs_have_an_order_of_their_own(corpus: Path, tmp_path: Path) -> None:
    write_pairs(tmp_path / "dark", count=9, names=("d{}", "d{}"))
    dark = tmp_path / "dark-corpus"
    curate(load_spec("folder", ["name=dark", "split.held_out_fraction=0.3"]), dark, images=tmp_path / "dark" / "lq")
    config = StreamConfig(sources=((str(corpus), 1.0),), seed=3, resolution=64, unpaired=str(dark))
    check_stream(config)
    rows = [load_row(config, position) for position in range(16)]
    assert all(row["lq"].max() < 64 < row["hq"].max() for row in rows)
    assert len({row["lq"].tobytes() for row in rows}) > 6
    same = [np.abs(row["lq"].astype(int) - row["hq"] // 4).max() <= 1 for row in rows]
    assert sum(same) < 4, "the input of a row must not depend on its target"
    assert np.array_equal(rows[5]["lq"], load_row(config, 5)["lq"])
    assert all(row["lq"].max() < 64 for row in heldout_rows(config, 3))


def test_wrong_streams_are_refused_on_the_driver(config: StreamConfig, corpus: Path) -> None:
    with pytest.raises(UsageError, match="from pairs, from another corpus"):
        dataclasses.replace(config, degradation="x4")
    with pytest.raises(UsageError, match="dead_leaves has no pairs"):
        dataclasses.replace(config, sources=((str(corpus), 1.0), ("dead_leaves", 1.0)))
    with pytest.raises(UsageError, match=r'unknown column .*"ql"'):
        check_stream(dataclasses.replace(config, pairs="ql"))
    with pytest.raises((UsageError, Failure), match=r"no corpus|index.json"):
        check_stream(dataclasses.replace(config, pairs="", unpaired=str(corpus.parent / "pairs")))


def test_a_prompt_is_made_of_the_caption(corpus: Path) -> None:
    config = StreamConfig(
        sources=((str(corpus), 1.0),), seed=3, resolution=64, captioner="tags", prompt="night, {caption}"
    )
    plain = load_row(dataclasses.replace(config, prompt=""), 0)["prompt"]
    assert plain and load_row(config, 0)["prompt"] == f"night, {plain}"
    assert load_columns(config, np.arange(2))["prompt"][0] == f"night, {plain}"
    assert heldout_rows(config, 1)[0]["prompt"].startswith("night, ")


def test_strokes_become_masks(corpus: Path) -> None:
    config = StreamConfig(sources=((str(corpus), 1.0),), seed=3, resolution=64, degradation="strokes")
    batch = collate_rows([load_row(config, position) for position in range(3)])
    assert batch.masks is not None and batch.masks.shape == (3, 1, 64, 64)
    assert set(batch.masks.unique().tolist()) == {0.0, 1.0}
    is_stroke = batch.masks.expand_as(batch.lq) == 1
    assert (batch.lq[is_stroke] == 1).all() and (batch.lq[~is_stroke] == batch.hq[~is_stroke]).all()


def test_floats_of_another_range_are_named() -> None:
    picture = np.zeros((4, 4, 3), np.float32)
    with pytest.raises(ValueError, match=r"must lie in 0\.\.1, got -1\.\.1"):
        images_to_tensor([picture - 1, picture + 1])


def write_coloured(folder: Path, names: dict[str, str], scale: int = 1) -> None:
    """Pairs of (name of the target: name of the input), each with dead leaves of its own."""
    for index, (target, other) in enumerate(names.items()):
        picture = dead_leaves(128, 9, index)
        for side, name, pixels in (("hq", target, picture), ("lq", other, dark(picture)[::scale, ::scale])):
            (folder / side / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / side / name).write_bytes(encode_png(pixels))


@pytest.mark.parametrize(
    ("target", "other", "overrides"),
    [
        ("{}.png", "{}x2.png", ()),
        ("{}.png", "X2/{}x2.png", ()),
        ("a/hq_{}.png", "a/lq_{}.png", ()),
        ("{}.png", "1{}x9{}.png", ("pairs.0.lq_name=1{}x9-",)),
    ],
)
def test_names_with_an_affix_never_pair_by_place(
    tmp_path: Path, target: str, other: str, overrides: tuple[str, ...]
) -> None:
    """In the order of the names 1x2.png is behind 10x2.png, and 1.png before 10.png."""
    end = "-" if overrides else ""
    names = {target.format(n): other.format(n, end) for n in range(1, 13)}
    write_coloured(tmp_path / "pairs", names, scale=2)
    corpus = open_corpus(make(tmp_path / "pairs", tmp_path / "corpus", "pairs.0.scale=2", *overrides))
    column = open_column(corpus, "lq")
    source_of = {row["key"]: row["source"].removeprefix("folder:") for row in corpus.rows()}
    assert len(source_of) == 12
    for split, part in corpus.splits.items():
        for sample in range(len(part)):
            name = names[source_of[part.locate(sample)[1]["key"]]]
            assert column.value(split, sample) == (tmp_path / "pairs" / "lq" / name).read_bytes()


def test_inputs_that_belong_to_no_target_are_named(tmp_path: Path) -> None:
    write_coloured(tmp_path / "pairs", {f"{n}.png": f"{n}.png" for n in range(6)})
    (tmp_path / "pairs" / "lq" / "5.png").rename(tmp_path / "pairs" / "lq" / "five.png")
    corpus = make(tmp_path / "pairs", tmp_path / "corpus")
    bad = (corpus / "columns" / "lq" / "quarantine.jsonl").read_text()
    assert (
        bad.count("\n") == 1
        and "no input belongs to this picture; 1 inputs belong to none, the first is five.png" in bad
    )


def test_names_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    write_coloured(tmp_path / "pairs", {f"{n}.png": f"{n:04}.png" for n in (1, 2, 10)})
    with pytest.raises(UsageError, match=r"3 of 3 inputs .* 1.png with 0001.png, 10.png with 0002.png"):
        make(tmp_path / "pairs", tmp_path / "corpus")
    with pytest.raises(UsageError, match=r"3 of 3 inputs have no target .* named"):
        make(tmp_path / "pairs", tmp_path / "other", "pairs.0.lq_name=n{}x2")
    with pytest.raises((UsageError, ValueError), match=r'lq_name "x2" needs one'):
        make(tmp_path / "pairs", tmp_path / "other", "pairs.0.lq_name=x2")
    for path in (tmp_path / "pairs" / "lq").iterdir():
        path.unlink()
    with pytest.raises(UsageError, match="lq holds no picture for a pair"):
        make(tmp_path / "pairs", tmp_path / "other")


def test_pairs_of_another_shape_are_named_with_both_sizes(tmp_path: Path) -> None:
    write_coloured(tmp_path / "pairs", {f"{n}.png": f"{n}x4.png" for n in range(8)}, scale=4)
    turned = np.rot90(dead_leaves(32, 9, 3)[:24])
    (tmp_path / "pairs" / "lq" / "3x4.png").write_bytes(encode_png(np.ascontiguousarray(turned)))
    corpus = make(tmp_path / "pairs", tmp_path / "corpus", "pairs.0.scale=4")
    bad = (corpus / "columns" / "lq" / "quarantine.jsonl").read_text()
    assert bad.count("\n") == 1 and "its input has 24 x 32 pixels, it has 128 x 128, and the pair's scale is 4" in bad
