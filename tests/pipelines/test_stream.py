"""The stream: what stands at a position is a pure function, whatever the number of workers."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Pillow

from components.degradations import build_degradation
from components.images import to_float, to_uint8
from pipelines import shards, stream
from pipelines.errors import Failure, UsageError
from pipelines.shards import Sample
from pipelines.stream import StreamConfig, heldout_rows, load_row, order, position_to_sample, rank_positions


def smooth_picture(seed: int, width: int = 90, height: int = 70) -> bytes:
    """A picture whose pixels differ everywhere, so that crops and flips show."""
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([x * 255 / width, y * 255 / height, np.full_like(x, seed * 20 % 256)], -1).astype(np.uint8)
    target = io.BytesIO()
    Pillow.fromarray(pixels).save(target, "PNG")
    return target.getvalue()


def make_corpus(folder: Path, train: dict[str, bytes], held_out: dict[str, bytes]) -> str:
    """A small corpus folder, two samples a shard, without Ray."""
    splits, rows = {}, []
    for split, pictures in (("train", train), ("held_out", held_out)):
        names, parts = list(pictures), []
        for number in range(0, len(names), 2):
            samples = [Sample(key=key, ext="png", info={}) for key in names[number : number + 2]]
            prefix = f"{split}-{number // 2:05d}"

            def read(sample: Sample, pictures: dict[str, bytes] = pictures) -> bytes:
                return pictures[sample.key]

            parts.append(shards.write_shard(folder / split, prefix, samples, read))
        splits[split] = {"samples": len(names), "shards": parts}
        rows += [{"key": key, "caption": f"caption of {key}", "split": split} for key in names]
    manifest = "".join(map(shards.json_line, rows)).encode()
    (folder / "manifest.jsonl").write_bytes(manifest)
    index = {"format": 1, "digest": hashlib.sha256(manifest).hexdigest(), "splits": splits}
    (folder / "index.json").write_text(json.dumps(index))
    return str(folder)


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    train = {f"t{n}": smooth_picture(n) for n in range(5)}
    return make_corpus(tmp_path / "corpus", train, {f"h{n}": smooth_picture(n + 5) for n in range(3)})


@pytest.fixture
def config(corpus: str) -> StreamConfig:
    return StreamConfig(sources=((corpus, 1.0),), seed=3, resolution=32, short_side=48, degradation="realesrgan-nano")


def same(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(np.array_equal(first[k], second[k]) for k in first)


def test_order_is_a_permutation_that_changes_with_epoch_and_seed() -> None:
    first = order(100, 7, 0)
    assert sorted(first) == list(range(100))
    assert np.array_equal(first, order(100, 7, 0))
    assert not np.array_equal(first, order(100, 7, 1))
    assert not np.array_equal(first, order(100, 8, 0))
    with pytest.raises(ValueError, match="read-only"):
        first[0] = 1  # the cached array is shared


def test_order_is_fair() -> None:
    """Over many epochs each sample stands first about equally often: 3000 / 6 = 500, standard deviation 20."""
    counts = Counter(int(order(6, 1, epoch)[0]) for epoch in range(3000))
    assert all(400 < counts[n] < 600 for n in range(6))


def test_each_epoch_of_positions_holds_each_sample_once() -> None:
    samples = [position_to_sample(7, 5, p) for p in range(21)]
    assert [sorted(samples[n : n + 7]) for n in (0, 7, 14)] == [list(range(7))] * 3
    assert samples[:7] != samples[7:14]


def test_empty_split_is_a_failure() -> None:
    with pytest.raises(Failure, match="empty"):
        position_to_sample(0, 1, 2)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_rank_positions_tile_the_global_batches(world: int) -> None:
    parts = [rank_positions(8, 32, 8, rank, world).reshape(3, -1) for rank in range(world)]
    assert np.array_equal(np.concatenate(parts, axis=1).ravel(), np.arange(8, 32))


@pytest.mark.parametrize(
    ("start", "stop", "batch", "rank", "world"), [(0, 8, 8, 0, 3), (0, 9, 8, 0, 2), (0, 8, 8, 2, 2), (8, 8, 8, 0, 1)]
)
def test_rank_positions_refuse_what_does_not_divide(start: int, stop: int, batch: int, rank: int, world: int) -> None:
    with pytest.raises(ValueError, match="batch"):
        rank_positions(start, stop, batch, rank, world)


def test_row_has_the_contracted_fields(config: StreamConfig) -> None:
    row = load_row(dataclasses.replace(config, captioner="manifest"), 4)
    assert list(row) == ["key", "position", "hq", "lq", "prompt", "sizes", "plan", "replaced"]
    assert row["hq"].shape == row["lq"].shape == (32, 32, 3)
    assert row["hq"].dtype == row["lq"].dtype == np.uint8
    assert row["sizes"].dtype == np.int64
    assert list(row["sizes"][[0, 1, 4, 5]]) == [70, 90, 32, 32]
    assert row["prompt"] == f"caption of {row['key']}"
    assert (row["position"], row["replaced"]) == (4, "")
    assert not np.array_equal(row["hq"], row["lq"])


def test_crop_lies_where_sizes_say(config: StreamConfig) -> None:
    """Red grows to the right and green downwards by a known slope, so the crop's corner can be read off its pixels."""
    tops = set()
    for position in range(12):
        row = load_row(dataclasses.replace(config, flip=False), position)
        _, _, top, left, _, _ = row["sizes"]
        width = round(90 * 48 / 70)
        assert row["hq"][0, 0, 0] == pytest.approx((left + 0.5) * 255 / width, abs=3)
        assert row["hq"][0, 0, 1] == pytest.approx((top + 0.5) * 255 / 48, abs=4)
        tops.add(int(top))
    assert len(tops) > 3


def test_flip_mirrors_about_half_of_the_rows(config: StreamConfig) -> None:
    mirrored = [row["hq"][0, 0, 0] > row["hq"][0, -1, 0] for row in (load_row(config, p) for p in range(40))]
    assert 10 <= sum(mirrored) <= 30


def test_recorded_plan_replays_to_the_same_bits(config: StreamConfig) -> None:
    row = load_row(config, 11)
    replayed = build_degradation("realesrgan-nano").apply(to_float(row["hq"]), json.loads(row["plan"]))
    assert np.array_equal(to_uint8(replayed), row["lq"])


def test_rows_repeat_and_differ_by_position_and_seed(config: StreamConfig) -> None:
    first = load_row(config, 2)
    assert same(first, load_row(config, 2))
    again = load_row(config, 2 + 5 * 4)  # four epochs later
    assert again["plan"] != first["plan"]
    other = load_row(dataclasses.replace(config, seed=4), 2)
    assert other["plan"] != first["plan"]


def test_without_degradation_and_caption(config: StreamConfig) -> None:
    row = load_row(dataclasses.replace(config, degradation=""), 0)
    assert np.array_equal(row["hq"], row["lq"])
    assert (row["plan"], row["prompt"]) == ("{}", "")


def test_tags_describe_the_crop(config: StreamConfig) -> None:
    from components.captions.tags import Tags

    row = load_row(dataclasses.replace(config, captioner="tags"), 1)
    assert row["prompt"] == Tags().caption([row["hq"]])[0] != ""


def test_broken_samples_are_replaced_from_the_reserve_and_recorded(tmp_path: Path) -> None:
    pictures = {f"t{n}": smooth_picture(n) for n in range(6)}
    pictures["t2"] = pictures["t2"][:60]
    config = StreamConfig(sources=((make_corpus(tmp_path / "c", pictures, {}), 1.0),), seed=1, resolution=32)
    rows = [load_row(config, p) for p in range(12)]
    hit = [p for p in range(12) if position_to_sample(6, 1, p) == 2]
    assert len(hit) == 2
    for p, row in enumerate(rows):
        assert bool(row["replaced"]) == (p in hit)
        assert row["key"] != "t2"
        assert row["position"] == p
    for p in hit:
        assert rows[p]["replaced"].startswith("[truncated] t2:")
        reserve = next(
            sample for attempt in range(1, 9) if (sample := position_to_sample(6, 1, p + stream.RESERVE * attempt)) != 2
        )
        assert rows[p]["key"] == f"t{reserve}"


def test_a_corpus_of_rubble_fails_with_names(tmp_path: Path) -> None:
    folder = make_corpus(tmp_path / "c", {"bad": b"no picture", "worse": b""}, {})
    with pytest.raises(Failure, match=r"position 3.*broken.*(bad|worse)"):
        load_row(StreamConfig(sources=((folder, 1.0),), seed=1, resolution=32), 3)


def test_mixing_follows_the_weights(corpus: str) -> None:
    config = StreamConfig(sources=((corpus, 3.0), ("dead_leaves", 1.0)), seed=2, resolution=32)
    drawn = Counter(stream.source_of(config, p) for p in range(2000))
    assert 430 < drawn["dead_leaves"] < 570  # 500 expected, standard deviation 19
    position = next(p for p in range(2000) if stream.source_of(config, p) == "dead_leaves")
    row = load_row(config, position)
    assert row["key"].startswith("dead-leaves-")
    assert row["hq"].shape == (32, 32, 3)
    assert same(row, load_row(config, position))


def test_held_out_rows_are_fixed_cycled_and_never_trained_on(config: StreamConfig) -> None:
    rows = heldout_rows(config, 7)
    assert [row["key"] for row in rows] == ["h0", "h1", "h2", "h0", "h1", "h2", "h0"]
    assert [row["position"] for row in rows] == list(range(7))
    assert all(same(a, b) for a, b in zip(rows, heldout_rows(config, 7), strict=True))
    assert same(rows[1], heldout_rows(config, 2)[1])
    assert {load_row(config, p)["key"] for p in range(20)} == {f"t{n}" for n in range(5)}


def test_held_out_rows_need_a_held_out_picture(tmp_path: Path) -> None:
    folder = make_corpus(tmp_path / "c", {"a": smooth_picture(0)}, {})
    with pytest.raises(Failure, match="holds any picture out"):
        heldout_rows(StreamConfig(sources=((folder, 1.0), ("dead_leaves", 1.0)), seed=1, resolution=32), 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sources": ()}, "sources"),
        ({"sources": (("x", 0.0),)}, "positive weights"),
        ({"resolution": 8}, "at least 16"),
        ({"short_side": 16}, "short_side"),
        ({"captioner": "tag"}, 'Did you mean "tags"'),
    ],
)
def test_impossible_settings_are_refused(config: StreamConfig, changes: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        dataclasses.replace(config, **changes)


def test_changed_corpus_is_read_anew(tmp_path: Path) -> None:
    folder = make_corpus(tmp_path / "c", {"old": smooth_picture(0)}, {})
    config = StreamConfig(sources=((folder, 1.0),), seed=1, resolution=32)
    assert load_row(config, 0)["key"] == "old"
    make_corpus(tmp_path / "c", {"new": smooth_picture(1)}, {})
    assert load_row(config, 0)["key"] == "new"


def test_workers_need_no_torch() -> None:
    code = "import sys, pipelines.stream, pipelines.curate; sys.exit('torch' in sys.modules or 'ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(stream.__file__).parents[1]).returncode == 0


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_one_and_two_workers_see_the_same_rows_in_the_same_global_order(config: StreamConfig) -> None:
    def rows(rank: int, world: int) -> list[dict]:
        dataset = stream.rank_dataset(config, 8, 136, 8, rank=rank, world=world)
        batches = list(dataset.iter_batches(batch_size=8 // world))
        assert {len(batch["key"]) for batch in batches} == {8 // world}
        return [{name: column[n] for name, column in batch.items()} for batch in batches for n in range(8 // world)]

    alone = rows(0, 1)
    assert [int(row["position"]) for row in alone] == list(range(8, 136))
    left, right = rows(0, 2), rows(1, 2)
    shared = [row for step in range(16) for part in (left, right) for row in part[step * 4 : step * 4 + 4]]
    assert all(same(a, b) for a, b in zip(alone, shared, strict=True))
    assert all(same(row, load_row(config, int(row["position"]))) for row in alone[::7])
    assert alone[0]["sizes"].dtype == np.int64


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_first_rows_of_a_very_long_stretch_come_at_once(config: StreamConfig) -> None:
    dataset = stream.rank_dataset(config, 0, 10**8, 4)
    first = next(iter(dataset.iter_batches(batch_size=4, prefetch_batches=1)))
    assert list(first["position"]) == [0, 1, 2, 3]


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_empty_split_dies_on_the_driver(tmp_path: Path) -> None:
    folder = make_corpus(tmp_path / "c", {"a": smooth_picture(0)}, {})
    config = StreamConfig(sources=((folder, 1.0),), seed=1, resolution=32, split="held_out")
    with pytest.raises(Failure, match="is empty"):
        stream.rank_dataset(config, 0, 8, 8)
