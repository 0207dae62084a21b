"""The stream: the row at a position is a pure function, independent of the number of workers."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Pillow

from components.degradations import build_degradation
from components.images import to_float, to_uint8
from components.randomness import generator
from pipelines.core.errors import Failure, UsageError
from pipelines.corpus.shards import write_corpus
from pipelines.stream import feed
from pipelines.stream import rows as stream
from pipelines.stream.ordering import Order
from pipelines.stream.rows import StreamConfig, heldout_rows, load_row


def smooth_picture(seed: int, width: int = 90, height: int = 70) -> bytes:
    """A PNG whose pixels all differ, so that crops and flips are visible."""
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([x * 255 / width, y * 255 / height, np.full_like(x, seed * 20 % 256)], -1).astype(np.uint8)
    target = io.BytesIO()
    Pillow.fromarray(pixels).save(target, "PNG")
    return target.getvalue()


def make_corpus(folder: Path, train: dict[str, bytes], held_out: dict[str, bytes]) -> str:
    """Write a small corpus folder without Ray, with two samples per shard."""
    splits = {
        name: [(key, "png", data, {"caption": f"caption of {key}"}) for key, data in pictures.items()]
        for name, pictures in (("train", train), ("held_out", held_out))
    }
    write_corpus(folder, "test", splits, samples_per_shard=2)
    return str(folder)


def sample_at(n: int, seed: int, position: int) -> int:
    """Return the sample at a position in the order of a small split."""
    return int(Order([0, n], seed).samples([position])[0])


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    train = {f"t{n}": smooth_picture(n) for n in range(5)}
    return make_corpus(tmp_path / "corpus", train, {f"h{n}": smooth_picture(n + 5) for n in range(3)})


@pytest.fixture
def config(corpus: str) -> StreamConfig:
    return StreamConfig(sources=((corpus, 1.0),), seed=3, resolution=32, short_side=48, degradation="realesrgan-nano")


def same(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(np.array_equal(first[k], second[k]) for k in first)


def test_a_row_has_the_fields_of_the_contract(config: StreamConfig) -> None:
    row = load_row(dataclasses.replace(config, captioner="manifest"), 4)
    assert list(row) == ["key", "position", "hq", "lq", "prompt", "sizes", "plan", "replaced", "uncaptioned"]
    assert row["hq"].shape == row["lq"].shape == (32, 32, 3)
    assert row["hq"].dtype == row["lq"].dtype == np.uint8
    assert row["sizes"].dtype == np.int64
    assert list(row["sizes"][[0, 1, 4, 5]]) == [70, 90, 32, 32]
    assert row["prompt"] == f"caption of {row['key']}"
    assert (row["position"], row["replaced"]) == (4, "")
    assert not np.array_equal(row["hq"], row["lq"])


def test_sizes_hold_the_corner_of_the_crop(config: StreamConfig) -> None:
    """Red rises to the right and green downwards with a fixed slope, so the pixels show the crop's corner."""
    tops = set()
    for position in range(12):
        row = load_row(dataclasses.replace(config, flip=False), position)
        _, _, top, left, _, _ = row["sizes"]
        width = round(90 * 48 / 70)
        assert row["hq"][0, 0, 0] == pytest.approx((left + 0.5) * 255 / width, abs=3)
        assert row["hq"][0, 0, 1] == pytest.approx((top + 0.5) * 255 / 48, abs=4)
        tops.add(int(top))
    assert len(tops) > 3


def test_a_central_crop(config: StreamConfig) -> None:
    for position in range(4):
        _, _, top, left, _, _ = load_row(dataclasses.replace(config, crop="center"), position)["sizes"]
        assert (top, left) == ((48 - 32) // 2, (round(90 * 48 / 70) - 32) // 2)


def test_flip_mirrors_about_half_of_the_rows(config: StreamConfig) -> None:
    flips = [row["hq"][0, 0, 0] > row["hq"][0, -1, 0] for row in (load_row(config, p) for p in range(40))]
    assert 10 <= sum(flips) <= 30


def test_a_row_plan_replays_to_the_same_bits(config: StreamConfig) -> None:
    row = load_row(config, 11)
    lq = build_degradation("realesrgan-nano").apply(to_float(row["hq"]), json.loads(row["plan"]))
    assert np.array_equal(to_uint8(lq), row["lq"])


def test_rows_repeat_and_differ_by_position_and_seed(config: StreamConfig) -> None:
    first = load_row(config, 2)
    assert same(first, load_row(config, 2))
    again = load_row(config, 2 + 5 * 4)  # four epochs later
    assert again["plan"] != first["plan"]
    other = load_row(dataclasses.replace(config, seed=4), 2)
    assert other["plan"] != first["plan"]


def test_pictures_that_are_resized_anew_are_decoded_once_in_a_small_split(
    config: StreamConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows are the same with and without the cache, whose size has a limit."""
    scaled = dataclasses.replace(config, scale=(1.0, 1.4))
    keys: list[str] = []
    original = stream.decode

    def decode(data: bytes, limits: object, key: str) -> np.ndarray:
        keys.append(key)
        return original(data, limits, key)  # type: ignore[arg-type]

    monkeypatch.setattr(stream, "decode", decode)
    stream._decoded_cache.clear()
    rows = [load_row(scaled, position) for position in range(20)]
    assert len(keys) == 5 and set(keys) == {f"t{n}" for n in range(5)}
    monkeypatch.setattr(stream, "DECODED_SAMPLES", 4)
    keys.clear()
    assert all(same(row, load_row(scaled, position)) for position, row in enumerate(rows)) and len(keys) == 20
    monkeypatch.setattr(stream, "DECODED_SAMPLES", 256)
    monkeypatch.setattr(stream, "DECODED_BYTES", 2 * 90 * 70 * 3)
    stream._decoded_cache.clear()
    assert all(same(row, load_row(scaled, position)) for position, row in enumerate(rows))
    assert sum(picture.nbytes for picture in stream._decoded_cache.values()) <= 2 * 90 * 70 * 3


def test_without_degradation_and_caption(config: StreamConfig) -> None:
    row = load_row(dataclasses.replace(config, degradation=""), 0)
    assert np.array_equal(row["hq"], row["lq"])
    assert (row["plan"], row["prompt"]) == ("{}", "")


def test_turns_are_all_there_and_half_turns_alone_where_a_row_is_no_square(config: StreamConfig) -> None:
    plain = dataclasses.replace(config, flip=False)
    turned, sizes = dataclasses.replace(plain, turn=True), {(16, 24)}
    counts = [0] * 4
    for position in range(40):
        upright, row = load_row(plain, position)["hq"], load_row(turned, position)["hq"]
        matches = [quarters for quarters in range(4) if np.array_equal(np.rot90(upright, quarters), row)]
        counts[matches[0]] += 1
    assert min(counts) >= 3
    oblong = dataclasses.replace(plain, buckets=tuple(sizes), batch_size=1, degradation="")
    for position in range(12):
        upright = load_row(oblong, position)["hq"]
        row = load_row(dataclasses.replace(oblong, turn=True), position)["hq"]
        assert any(np.array_equal(np.rot90(upright, quarters), row) for quarters in (0, 2))


def test_relight_is_one_gamma_and_a_gain_for_each_colour(config: StreamConfig) -> None:
    plain = dataclasses.replace(config, flip=False, degradation="")
    lit, ratios = dataclasses.replace(plain, relight=0.4), []
    for position in range(20):
        before, after = (load_row(each, position)["hq"].astype(float) / 255 for each in (plain, lit))
        middle = (before > 0.3) & (before < 0.7) & (after > 0.02) & (after < 0.98)
        exponents = np.log(after[middle]) / np.log(before[middle])
        ratios.append(float(np.median(exponents)))
    assert max(ratios) > 1.1 and min(ratios) < 0.9 and max(ratios) < 2.2 and min(ratios) > 0.4
    rng = generator(config.seed, 3, "relight")
    gamma, gains = np.exp(0.4 * rng.uniform(-1, 1)), np.exp(0.1 * rng.uniform(-1, 1, size=3))
    before = load_row(plain, 3)["hq"].astype(float) / 255
    expected = np.rint(255 * np.clip(gains * before**gamma, 0, 1))
    assert np.array_equal(load_row(lit, 3)["hq"], expected)
    assert np.array_equal(load_row(lit, 3)["hq"], load_row(lit, 3)["lq"])  # without a degradation


def test_tags_describe_the_crop(config: StreamConfig) -> None:
    from components.captions.tags import Tags

    row = load_row(dataclasses.replace(config, captioner="tags"), 1)
    assert row["prompt"] == Tags().caption([row["hq"]])[0] != ""


def test_broken_samples_are_replaced_from_the_reserve_and_recorded(tmp_path: Path) -> None:
    pictures = {f"t{n}": smooth_picture(n) for n in range(6)}
    pictures["t2"] = pictures["t2"][:60]
    config = StreamConfig(sources=((make_corpus(tmp_path / "c", pictures, {}), 1.0),), seed=1, resolution=32)
    rows = [load_row(config, p) for p in range(12)]
    broken = [p for p in range(12) if sample_at(6, 1, p) == 2]
    assert len(broken) == 2
    for p, row in enumerate(rows):
        assert bool(row["replaced"]) == (p in broken)
        assert row["key"] != "t2"
        assert row["position"] == p
    for p in broken:
        assert rows[p]["replaced"].startswith("[truncated] t2:")
        reserve = next(
            sample for attempt in range(1, 9) if (sample := sample_at(6, 1, p + stream.RESERVE * attempt)) != 2
        )
        assert rows[p]["key"] == f"t{reserve}"


def test_a_corpus_of_broken_samples_fails_with_their_keys(tmp_path: Path) -> None:
    folder = make_corpus(tmp_path / "c", {"bad": b"no picture", "worse": b""}, {})
    with pytest.raises(Failure, match=r"position 3.*usable.*(bad|worse)"):
        load_row(StreamConfig(sources=((folder, 1.0),), seed=1, resolution=32), 3)


def test_a_mixture_has_its_weights_and_every_sample_per_epoch(corpus: str) -> None:
    config = StreamConfig(sources=((corpus, 3.0), ("dead_leaves", 1.0)), seed=2, resolution=32)
    counts = Counter(stream.source_of(config, p)[0] for p in range(2048))
    assert counts == {corpus: 1536, "dead_leaves": 512}
    position = next(p for p in range(2000) if stream.source_of(config, p)[0] == "dead_leaves")
    row = load_row(config, position)
    assert row["key"].startswith("dead-leaves-")
    assert row["hq"].shape == (32, 32, 3)
    assert same(row, load_row(config, position))
    keys = [row["key"] for p in range(40) if not (row := load_row(config, p))["key"].startswith("dead")]
    epochs = [keys[n : n + 5] for n in range(0, len(keys) - 4, 5)]
    assert all(sorted(epoch) == [f"t{n}" for n in range(5)] for epoch in epochs)


def test_rows_of_a_global_batch_share_a_bucket(config: StreamConfig) -> None:
    with_buckets = dataclasses.replace(config, buckets=((32, 48), (48, 32), (40, 40)), batch_size=4)
    sizes = [[load_row(with_buckets, 4 * batch + n)["hq"].shape[:2] for n in range(4)] for batch in range(12)]
    assert all(len(set(batch)) == 1 for batch in sizes)
    assert {batch[0] for batch in sizes} == {(32, 48), (48, 32), (40, 40)}
    row = load_row(with_buckets, 4)
    assert list(row["sizes"][4:]) == list(row["hq"].shape[:2])
    columns = stream.load_columns(with_buckets, np.arange(4, 8))
    assert np.array_equal(columns["hq"][0], row["hq"]) and np.array_equal(columns["lq"][0], row["lq"])


def test_pictures_that_would_be_enlarged_can_be_refused(tmp_path: Path) -> None:
    pictures = {f"t{n}": smooth_picture(n) for n in range(5)} | {"small": smooth_picture(9, 60, 30)}
    folder = make_corpus(tmp_path / "c", pictures, {})
    config = StreamConfig(sources=((folder, 1.0),), seed=1, resolution=32, short_side=48)
    assert "small" in {load_row(config, p)["key"] for p in range(12)}
    refusing = dataclasses.replace(config, small="refuse")
    rows = [load_row(refusing, p) for p in range(12)]
    assert "small" not in {row["key"] for row in rows}
    assert sum(row["replaced"].startswith("[too_small] small") for row in rows) == 2  # once per epoch
    scaled = dataclasses.replace(config, short_side=40, scale=(0.8, 1.6), flip=False)
    slopes = {int(row["hq"][0, -1, 0]) - int(row["hq"][0, 0, 0]) for row in (load_row(scaled, p) for p in range(12))}
    assert len(slopes) > 4  # crops of pictures resized to many sizes


def test_a_caption_column_gives_the_prompts(corpus: str, config: StreamConfig) -> None:
    from components.corpora import CaptionSpec
    from pipelines.corpus.columns.captions import caption_corpus

    caption_corpus(corpus, CaptionSpec(model="tags", workers=0, overwrite=True), name="mine")
    row = load_row(dataclasses.replace(config, captioner="column:mine"), 1)
    assert row["prompt"] and not row["prompt"].startswith("caption of")
    with pytest.raises(UsageError, match="min"):
        stream.check_stream(dataclasses.replace(config, captioner="column:min"))


def test_the_device_degrades_like_the_data_workers(config: StreamConfig) -> None:
    from components.tensors import collate_rows

    for preset in ("realesrgan-nano", "instantir"):
        here = dataclasses.replace(config, degradation=preset, resolution=48)
        device = dataclasses.replace(here, degrade_on="device")
        rows = [load_row(device, p) for p in range(4)]
        assert all("lq" not in row for row in rows)
        batch = collate_rows(rows, "cpu", stream.target_plan(device))
        expected = collate_rows([load_row(here, p) for p in range(4)])
        assert batch.plans == expected.plans
        assert float((batch.hq - expected.hq).abs().max()) <= 2 / 127.5
        assert float((batch.lq - expected.lq).abs().mean()) <= 2 / 127.5  # libjpeg against our JPEG on the device
        assert float((batch.lq - batch.hq).abs().mean()) > 2 / 127.5  # lq is degraded


def test_held_out_rows_are_fixed_and_repeat_and_are_not_in_the_stream(config: StreamConfig) -> None:
    rows = heldout_rows(config, 7)
    assert [row["key"] for row in rows] == ["h0", "h1", "h2", "h0", "h1", "h2", "h0"]
    assert [row["position"] for row in rows] == list(range(7))
    assert all(same(a, b) for a, b in zip(rows, heldout_rows(config, 7), strict=True))
    assert same(rows[1], heldout_rows(config, 2)[1])
    assert {load_row(config, p)["key"] for p in range(20)} == {f"t{n}" for n in range(5)}


def test_held_out_rows_need_a_held_out_picture(tmp_path: Path) -> None:
    folder = make_corpus(tmp_path / "c", {"a": smooth_picture(0)}, {})
    with pytest.raises(Failure, match="has a held-out picture"):
        heldout_rows(StreamConfig(sources=((folder, 1.0), ("dead_leaves", 1.0)), seed=1, resolution=32), 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sources": ()}, "sources"),
        ({"sources": (("x", 0.0),)}, "positive weights"),
        ({"resolution": 8}, "at least 16"),
        ({"short_side": 16}, "short_side"),
        ({"captioner": "tag"}, 'Did you mean "tags"'),
        ({"degrade_on": "devise"}, 'Did you mean "device"'),
        ({"crop": "centre"}, 'Did you mean "center"'),
        ({"small": "refuze"}, 'Did you mean "refuse"'),
        ({"buckets": ((32, 48),)}, "batch_size"),
        ({"scale": (0.1, 1.0)}, "scale"),
    ],
)
def test_impossible_settings_are_refused(config: StreamConfig, changes: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        dataclasses.replace(config, **changes)


def test_a_changed_corpus_is_opened_again(tmp_path: Path) -> None:
    folder = make_corpus(tmp_path / "c", {"old": smooth_picture(0)}, {})
    config = StreamConfig(sources=((folder, 1.0),), seed=1, resolution=32)
    assert load_row(config, 0)["key"] == "old"
    make_corpus(tmp_path / "c", {"new": smooth_picture(1)}, {})
    assert load_row(config, 0)["key"] == "new"


def test_workers_need_no_torch() -> None:
    modules = "pipelines.stream.feed, pipelines.stream.rows, pipelines.curation.curate"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules or 'ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(stream.__file__).parents[2]).returncode == 0


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_one_and_two_workers_see_the_same_rows_in_the_same_global_order(config: StreamConfig) -> None:
    def rows(rank: int, world: int) -> list[dict]:
        dataset = feed.rank_dataset(config, 8, 136, 8, rank=rank, world=world)
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


def test_parts_come_in_turn_and_the_consumer_gets_the_error_of_an_open_call() -> None:
    calls: list[int] = []

    def part(number: int) -> Iterator[int]:
        calls.append(number)
        if number == 3:
            raise Failure("part 3")
        return iter(range(10 * number, 10 * number + 4))

    items = feed.in_turn([partial(part, number) for number in range(4)], 4, lead=2)
    assert [next(items) for _ in range(2)] == [0, 1]
    assert calls == [0]
    assert [next(items) for _ in range(10)] == [2, 3, 10, 11, 12, 13, 20, 21, 22, 23]
    with pytest.raises(Failure, match="part 3"):
        next(items)


def test_a_consumer_can_stop_while_a_thread_opens_the_next_part() -> None:
    code = """
import threading
from pipelines.stream.feed import in_turn
never, started = threading.Event(), threading.Event()
items = in_turn([lambda: iter(range(4)), lambda: started.set() or never.wait()], 4, lead=3)
assert [next(items) for _ in range(3)] == [0, 1, 2] and started.wait(30)
"""
    folder = Path(stream.__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=folder, timeout=60).returncode == 0


def test_tasks_of_large_rows_have_a_limit_in_bytes() -> None:
    def per_task(resolution: int, degradation: str = "") -> tuple[int, int]:
        config = StreamConfig(sources=(("dead_leaves", 1.0),), seed=0, resolution=resolution, degradation=degradation)
        return feed.block_rows(config, 8, 8)

    assert per_task(64) == (64, 256)
    assert per_task(448) == (64, 256)  # 448 * 448 * 3 * 256 = 154,140,672 bytes
    assert per_task(1024) == (8, 48)  # 3 MiB a row: 13 fit a block, 53 a task
    assert per_task(1024, "realesrgan") == (4, 24)  # 6 MiB a row: 6 fit a block, 26 a task


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_first_rows_of_a_very_long_stretch_come_at_once(config: StreamConfig) -> None:
    batches = feed.rank_batches(config, 0, 10**8, 4, own_process=False)
    assert list(next(batches)["position"]) == [0, 1, 2, 3]
    assert list(next(batches)["position"]) == [4, 5, 6, 7]
    batches.close()


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_an_empty_split_fails_on_the_driver(tmp_path: Path) -> None:
    folder = make_corpus(tmp_path / "c", {"a": smooth_picture(0)}, {})
    config = StreamConfig(sources=((folder, 1.0),), seed=1, resolution=32, split="held_out")
    with pytest.raises(Failure, match="is empty"):
        feed.rank_dataset(config, 0, 8, 8)


def test_a_forked_worker_has_its_own_memory_for_blocks(config: StreamConfig) -> None:
    """A DataLoader forks its workers after this process has made blocks: they must not write into the same pages."""
    first = stream.load_columns(config, [0, 1])
    expected = first["hq"].copy()
    del first  # its memory may be used again, here and in a child
    ready, tell = os.pipe()
    if (child := os.fork()) == 0:
        os.read(ready, 1)
        stream.load_columns(config, [2, 3])["hq"][:] = 0
        os._exit(0)
    second = stream.load_columns(config, [0, 1])
    os.write(tell, b"1")
    assert os.waitpid(child, 0)[1] == 0
    assert np.array_equal(second["hq"], expected)
    os.close(ready)
    os.close(tell)
