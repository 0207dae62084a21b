"""Columns of a corpus: a value or a reason for every sample, even after failures, deaths and changes of the corpus."""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from components.images import encode_png
from components.synthetic import dead_leaves
from components.types import Image, SampleError
from pipelines.core.errors import Failure, RetryLater, UsageError
from pipelines.core.pool import Pool
from pipelines.core.rows import read_lines
from pipelines.corpus.columns.computing import ColumnResult, compute_column
from pipelines.corpus.columns.reading import list_columns, open_column, verify_column
from pipelines.corpus.columns.spec import ColumnJob, ColumnSpec, ShardTask
from pipelines.corpus.columns.workers import ShardWorker
from pipelines.corpus.shards import Corpus, open_corpus, write_corpus

PRODUCER = {"model": "mean", "revision": "1"}
HERE = Pool(workers=0)
COUNT, HELD_OUT, PER_SHARD = 7, 2, 3  # train has shards of 3, 3 and 1 samples


def picture(number: int) -> Image:
    return dead_leaves(24 + number, 0, number)


def key_of(number: int) -> str:
    return f"picture-{number}"


def make_corpus(folder: Path, count: int = COUNT, spoilt: Sequence[int] = (), captions: bool = False) -> Corpus:
    """Pictures of different sizes. The spoilt ones are truncated; curation would refuse them."""
    samples = []
    for number in range(count):
        data = encode_png(picture(number))
        caption = f"caption {number}" if captions and number % 2 else ""
        data = data[: len(data) // 2] if number in spoilt else data
        samples.append((key_of(number), "png", data, {"caption": caption}))
    held_out = [(f"held-{n}", "png", encode_png(picture(100 + n)), {}) for n in range(HELD_OUT)]
    return write_corpus(folder, "test", {"train": samples, "held_out": held_out}, samples_per_shard=PER_SHARD)


class Means:
    """A worker: the mean of each picture. `hook` gets the keys of each call, and may raise."""

    def __init__(self, hook: Callable[[Sequence[str]], None] | None = None) -> None:
        self.hook = hook
        self.calls: list[list[str]] = []

    def __call__(self, images: Sequence[Image], keys: Sequence[str]) -> list[Any]:
        self.calls.append(list(keys))
        if self.hook:
            self.hook(keys)
        return [float(image.mean()) for image in images]

    @property
    def keys_computed(self) -> list[str]:
        return [key for call in self.calls for key in call]


def means_column(factory: Any, **changes: Any) -> ColumnSpec:
    """The column of means, in float64 and with batches of two."""
    settings: dict[str, Any] = {"kind": "float", "dtype": "float64", "batch_size": 2, **changes}
    return ColumnSpec(**{"name": "means", "producer": PRODUCER, "factory": factory, **settings})


def compute(corpus: Corpus, worker: Any, **options: Any) -> ColumnResult:
    """Compute in this process; options are those of the column and of `compute_column`."""
    run = {name: options.pop(name) for name in ("overwrite", "max_bad_fraction", "progress") if name in options}
    return compute_column(corpus.folder, means_column(lambda: worker, **options), HERE, **run)


def means(corpus: Corpus, split: str = "train") -> list[Any]:
    finished = open_column(corpus, "means")
    return [finished.value(split, sample) for sample in range(len(corpus.split(split)))]


EXPECTED = [float(picture(number).mean()) for number in range(COUNT)]


def test_every_sample_gets_its_value(tmp_path: Path) -> None:
    corpus, calls = make_corpus(tmp_path / "corpus"), []
    before = {path: path.read_bytes() for path in corpus.folder.rglob("*") if path.is_file()}
    result = compute(corpus, Means(), progress=lambda count, of=0, note="": calls.append((count, of)))
    assert means(corpus) == EXPECTED
    assert means(corpus, "held_out") == [float(picture(100 + n).mean()) for n in range(HELD_OUT)]
    assert (result.samples, result.given, result.quarantined, result.shards) == (COUNT + HELD_OUT, 0, 0, 4)
    assert calls[0] == (0, 9) and calls[-1] == (9, 9)
    assert {path.name for path in result.folder.iterdir()} == {
        ".lock",
        "column.json",
        "quarantine.jsonl",
        "shards.jsonl",
        "train-00000.arrow",
        "train-00001.arrow",
        "train-00002.arrow",
        "held_out-00000.arrow",
    }
    assert all(path.read_bytes() == data for path, data in before.items())  # the corpus itself never changes
    assert list_columns(corpus) == ["means"]


def test_column_json_and_files_have_the_documented_fields(tmp_path: Path) -> None:
    """Read with json and pyarrow only, as other tools do."""
    corpus = make_corpus(tmp_path / "corpus", spoilt=[4])
    folder = compute(corpus, Means(), dtype="float32").folder
    document = json.loads((folder / "column.json").read_text())
    assert (document["kind"], document["corpus"], document["producer"], document["dtype"]) == (
        "float",
        corpus.digest,
        PRODUCER,
        "float32",
    )
    entry = document["splits"]["train"][1]
    data = (folder / entry["name"]).read_bytes()
    assert (len(data), hashlib.sha256(data).hexdigest()) == (entry["bytes"], entry["sha256"])
    table = pa.ipc.open_file(pa.BufferReader(data)).read_all()
    assert table.column("key").to_pylist() == ["picture-3", "picture-4", "picture-5"]
    assert table.column("value").to_pylist() == [np.float32(EXPECTED[3]), None, np.float32(EXPECTED[5])]
    assert str(table.schema.field("value").type) == "float"


def test_values_do_not_depend_on_batches_and_readers(tmp_path: Path) -> None:
    files = []
    for batch_size in (1, 2, 5):
        corpus = make_corpus(tmp_path / str(batch_size))
        folder = compute(corpus, Means(), batch_size=batch_size).folder
        files.append({path.name: path.read_bytes() for path in folder.glob("*.arrow")})
    assert files[0] == files[1] == files[2]


def test_a_broken_picture_does_not_affect_other_pictures(tmp_path: Path) -> None:
    corpus, worker = make_corpus(tmp_path / "corpus", spoilt=[1]), Means()
    result = compute(corpus, worker)
    assert means(corpus) == [EXPECTED[0], None, *EXPECTED[2:]]
    assert key_of(1) not in worker.keys_computed
    (row,) = read_lines(result.folder / "quarantine.jsonl")
    data = encode_png(picture(1))
    assert row["bytes_sha256"] == hashlib.sha256(data[: len(data) // 2]).hexdigest()
    shard = corpus.split("train").shards[0]["name"]
    assert (row["key"], row["source"], row["stage"], row["code"]) == (
        "picture-1",
        f"train/{shard}",
        "means",
        "truncated",
    )
    assert result.reasons == {"truncated": 1}


def test_a_failure_over_one_picture_does_not_affect_other_pictures(tmp_path: Path) -> None:
    def hook(keys: Sequence[str]) -> None:
        if key_of(3) in keys:
            raise RuntimeError("out of memory:\n\udc80 " + "x" * 9999)
        if key_of(5) in keys:
            raise SampleError("no_face", "there is no face in it")

    corpus = make_corpus(tmp_path / "corpus")
    result = compute(corpus, Means(hook), batch_size=3)
    assert means(corpus) == [*EXPECTED[:3], None, EXPECTED[4], None, EXPECTED[6]]
    rows = [(row["key"], row["code"], row["detail"]) for row in read_lines(result.folder / "quarantine.jsonl")]
    assert rows == [
        ("picture-3", "failed", "RuntimeError: out of memory: ? ".ljust(500, "x")),
        ("picture-5", "no_face", "there is no face in it"),
    ]


def test_answers_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    answers: list[Any] = [1.0, float("nan"), np.zeros(2), 1e300, "text", 2, SampleError("dark", "too dark")]

    def worker(images: Sequence[Image], keys: Sequence[str]) -> list[Any]:
        return [answers[int(key.split("-")[1])] if key.startswith("picture") else 0.5 for key in keys]

    corpus = make_corpus(tmp_path / "corpus")
    result = compute(corpus, worker, dtype="float32", max_bad_fraction=0.9)
    assert means(corpus) == [1.0, None, None, None, None, 2.0, None]
    codes = [row["code"] for row in read_lines(result.folder / "quarantine.jsonl")]
    assert codes == ["not_finite", "wrong_shape", "out_of_range", "wrong_shape", "dark"]


def test_arrays_are_mapped_and_read_only(tmp_path: Path) -> None:
    def worker(images: Sequence[Image], keys: Sequence[str]) -> list[Any]:
        return [
            SampleError("odd", "odd") if key == key_of(4) else np.arange(6.0).reshape(2, 3) + len(key) + image.shape[0]
            for image, key in zip(images, keys, strict=True)
        ]

    corpus = make_corpus(tmp_path / "corpus")
    compute(corpus, worker, kind="array", shape=(2, 3), dtype="float16")
    column = open_column(corpus, "means")
    for number in range(COUNT):
        value = column.value("train", number)
        if number == 4:
            assert value is None
            continue
        assert isinstance(value, np.ndarray) and value.dtype == np.float16
        assert np.array_equal(value, np.arange(6.0).reshape(2, 3) + 9 + 24 + number)
        with pytest.raises(ValueError):
            value[0, 0] = 1
    one, same = column.value("train", 0), column.value("train", 0)
    assert isinstance(one, np.ndarray) and isinstance(same, np.ndarray) and np.shares_memory(one, same)


def test_whole_numbers_must_fit(tmp_path: Path) -> None:
    def worker(images: Sequence[Image], keys: Sequence[str]) -> list[Any]:
        return [np.array([300 if key == key_of(2) else 200]) for key in keys]

    corpus = make_corpus(tmp_path / "corpus")
    result = compute(corpus, worker, kind="array", shape=(1,), dtype="uint8")
    assert result.reasons == {"out_of_range": 1}
    column = open_column(corpus, "means")
    assert [None if (value := column.value("train", n)) is None else int(np.asarray(value)[0]) for n in range(4)] == [
        200,
        200,
        None,
        200,
    ]


def test_existing_values_are_copied_without_reading_the_picture(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "corpus", spoilt=[1], captions=True)

    def existing(entry: Mapping[str, Any]) -> str | None:
        return entry["caption"] or None

    def worker(images: Sequence[Image], keys: Sequence[str]) -> list[Any]:
        return [f"about {key}" if key != key_of(2) else "\ud800" for key in keys]

    result = compute(corpus, worker, kind="text", dtype="", existing=existing)
    assert means(corpus) == [
        "about picture-0",
        "caption 1",
        None,
        "caption 3",
        "about picture-4",
        "caption 5",
        "about picture-6",
    ]
    assert (result.given, result.quarantined, result.reasons) == (3, 1, {"not_text": 1})
    column = open_column(corpus, "means")
    assert [column.is_given("train", n) for n in range(4)] == [False, True, False, True]
    assert column.provenance("train", 0) == {
        "key": "picture-0",
        "producer": PRODUCER,
        "sha256": hashlib.sha256(b"about picture-0").hexdigest(),
    }
    assert column.provenance("train", 1)["producer"] == {"name": "corpus"}


def test_no_model_is_loaded_if_every_value_exists(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "corpus")

    def no_model() -> Any:
        raise AssertionError("nobody needs it")

    keys = means_column(no_model, kind="text", dtype="", existing=lambda entry: entry["key"])
    result = compute_column(corpus.folder, keys, HERE)
    assert result.given == COUNT + HELD_OUT
    assert means(corpus)[2] == "picture-2"


# --- again ------------------------------------------------------------------------------------------------------------


def test_a_finished_column_is_not_computed_again(tmp_path: Path) -> None:
    corpus, worker = make_corpus(tmp_path / "corpus"), Means()
    compute(corpus, worker)
    document = (corpus.folder / "columns" / "means" / "column.json").read_bytes()
    again = compute(corpus, worker)
    assert (again.reused, again.shards, again.samples) == (4, 4, COUNT + HELD_OUT)
    assert len(worker.keys_computed) == COUNT + HELD_OUT
    assert (corpus.folder / "columns" / "means" / "column.json").read_bytes() == document


def test_an_interrupted_computation_continues(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "corpus")

    def interrupt(keys: Sequence[str]) -> None:
        if key_of(3) in keys:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compute(corpus, Means(interrupt))
    with pytest.raises(UsageError, match="is not finished"):
        open_column(corpus, "means")
    assert list_columns(corpus) == []
    worker = Means()
    result = compute(corpus, worker)
    assert result.reused == 1 and set(worker.keys_computed) == {*map(key_of, range(3, 7)), "held-0", "held-1"}
    assert means(corpus) == EXPECTED


def test_a_torn_log_line_and_a_lost_file_are_made_again(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "corpus")
    folder = compute(corpus, Means()).folder
    (folder / "column.json").unlink()
    (folder / "train-00000.arrow").unlink()
    log = (folder / "shards.jsonl").read_bytes()
    (folder / "shards.jsonl").write_bytes(log[:-20])
    worker = Means()
    assert compute(corpus, worker).reused == 2
    assert set(worker.keys_computed) == {*map(key_of, range(3)), "held-0", "held-1"}
    assert means(corpus) == EXPECTED


def test_a_file_that_is_newer_than_the_log_is_not_trusted(tmp_path: Path) -> None:
    """A kill between the rename and the line of the log: equal sizes, other values."""
    corpus, other = make_corpus(tmp_path / "corpus"), make_corpus(tmp_path / "other", captions=True)
    folder = compute(corpus, Means()).folder
    foreign = compute(other, lambda images, keys: [0.5] * len(keys)).folder
    (folder / "column.json").unlink()
    target = folder / "train-00000.arrow"
    size = target.stat().st_size
    target.write_bytes((foreign / "train-00000.arrow").read_bytes())
    assert target.stat().st_size == size
    assert compute(corpus, Means()).reused == 3
    assert means(corpus) == EXPECTED


def test_another_producer_is_refused_or_replaces(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "corpus")
    compute(corpus, Means())
    other = {"model": "mean", "revision": "2"}

    def double(images: Sequence[Image], keys: Sequence[str]) -> list[Any]:
        return [2 * float(image.mean()) for image in images]

    with pytest.raises(UsageError, match="another producer"):
        compute(corpus, double, producer=other)
    assert means(corpus) == EXPECTED

    def interrupt(images: Sequence[Image], keys: Sequence[str]) -> list[Any]:
        if key_of(3) in keys:
            raise KeyboardInterrupt
        return double(images, keys)

    with pytest.raises(KeyboardInterrupt):
        compute(corpus, interrupt, producer=other, overwrite=True)
    with pytest.raises(UsageError, match="not finished"):  # the column does not mix two producers
        open_column(corpus, "means")
    assert compute(corpus, double, producer=other).reused == 1
    assert means(corpus) == [2 * value for value in EXPECTED]
    assert compute(corpus, Means(), producer=other, overwrite=True).reused == 4


def test_an_unfinished_column_of_another_producer_is_refused(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "corpus")

    def interrupt(keys: Sequence[str]) -> None:
        if key_of(3) in keys:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compute(corpus, Means(interrupt))
    with pytest.raises(UsageError, match="another producer"):
        compute(corpus, Means(), producer={"model": "other"})


def test_a_larger_corpus_keeps_the_values_of_unchanged_shards(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "corpus")
    compute(corpus, Means())
    larger = make_corpus(tmp_path / "corpus", count=COUNT + 4)
    with pytest.raises(UsageError, match="another state"):
        open_column(larger, "means")
    worker = Means()
    result = compute(larger, worker)
    assert set(worker.keys_computed) == set(map(key_of, range(6, COUNT + 4)))  # the third shard was not full
    assert (result.reused, result.shards) == (3, 5)
    assert means(larger) == [float(picture(number).mean()) for number in range(COUNT + 4)]
    smaller = make_corpus(tmp_path / "corpus", count=3)
    assert compute(smaller, Means()).reused == 2
    assert means(smaller) == EXPECTED[:3]
    assert sorted(path.name for path in result.folder.glob("*.arrow")) == ["held_out-00000.arrow", "train-00000.arrow"]


# --- what cannot go on ------------------------------------------------------------------------------------------------


def test_a_model_that_fails_on_everything_ends_the_run(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "corpus")

    def broken(images: Sequence[Image], keys: Sequence[str]) -> list[Any]:
        raise RuntimeError("illegal memory access")

    with pytest.raises(Failure, match=r"fails on every picture.*illegal memory access"):
        compute(corpus, broken)
    assert list_columns(corpus) == []
    assert compute(corpus, Means()).quarantined == 0
    assert means(corpus) == EXPECTED


def test_a_model_that_cannot_be_loaded_ends_the_run(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "corpus")

    def factory() -> Any:
        raise OSError("no weights")

    with pytest.raises(Failure, match="cannot be loaded: OSError: no weights"):
        compute_column(corpus.folder, means_column(factory), HERE)


def test_interrupts_while_the_model_loads_are_not_deaths(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "corpus")

    def factory() -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compute_column(corpus.folder, means_column(factory), HERE)
    assert not list(corpus.folder.rglob(".flight-loading"))


def test_a_model_whose_loading_kills_processes_ends_the_run(tmp_path: Path) -> None:
    """Two processes that died while they loaded it leave two marks. A later run tries again."""
    corpus = make_corpus(tmp_path / "corpus")
    job = ColumnJob(corpus_dir=corpus.folder, column=means_column(Means))
    job.folder.mkdir(parents=True)
    (job.folder / ".flight-loading").write_bytes(b"..")
    task = ShardTask(split="train", shard=0, samples=3, sha256=corpus.split("train").shards[0]["sha256"])
    (answer,) = ShardWorker(job)([task])
    assert "died again and again while they loaded" in answer.fatal
    (answer,) = ShardWorker(job, others=1)([task])
    assert answer.fatal == "" and answer.row["samples"] == 3, "the second mark may be of a worker that loads it now"
    (job.folder / ".flight-loading").write_bytes(b"..")
    with pytest.raises(Failure, match=r"column means: .*died again and again while they loaded"):
        compute(corpus, Means())
    assert compute(corpus, Means()).quarantined == 0


def test_too_many_bad_rows_end_the_run_and_are_tried_again(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "corpus")

    def hook(keys: Sequence[str]) -> None:
        if any(key in (key_of(0), key_of(3), key_of(6)) for key in keys):
            raise RuntimeError("flaky")

    for _ in range(4):  # repeated failures are not deaths
        with pytest.raises(Failure, match=r"3 of 9 rows have no value \(3 failed\)"):
            compute(corpus, Means(hook), max_bad_fraction=0.2)
    assert list_columns(corpus) == []
    worker = Means()
    assert compute(corpus, worker, max_bad_fraction=0.2).quarantined == 0
    assert set(worker.keys_computed) == set(map(key_of, range(7)))  # shards with a failure; the held-out one had none
    assert means(corpus) == EXPECTED


def test_a_missing_shard_is_quarantined(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "corpus")
    part = corpus.split("train")
    (part.folder / part.shards[2]["name"]).unlink()
    assert compute(corpus, Means()).reasons == {"missing_shard": 1}
    assert means(corpus) == [*EXPECTED[:6], None]


def test_a_picture_is_quarantined_after_two_deaths(tmp_path: Path) -> None:
    """A death is a run that ends in the middle. In a pool, Ray starts the next attempt."""
    corpus, deaths = make_corpus(tmp_path / "corpus"), []

    def kill(keys: Sequence[str]) -> None:
        if key_of(4) in keys:
            deaths.append(list(keys))
            raise KeyboardInterrupt  # no code catches it, as with a segmentation fault

    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            compute(corpus, Means(kill), batch_size=3)
    result = compute(corpus, Means(kill), batch_size=3)
    assert deaths == [[key_of(3), key_of(4), key_of(5)], [key_of(4)], [key_of(4)]]
    assert result.reasons == {"crashed": 1}
    assert means(corpus) == [*EXPECTED[:4], None, *EXPECTED[5:]]
    assert not list(result.folder.glob(".flight*"))


def test_other_pictures_of_a_lethal_batch_are_computed(tmp_path: Path) -> None:
    """Two deaths: one over a batch with the picture, one over the picture alone."""
    corpus, kills = make_corpus(tmp_path / "corpus"), [3, 1]

    def kill(keys: Sequence[str]) -> None:
        if key_of(3) in keys and kills and len(keys) == kills[0]:
            kills.pop(0)
            raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            compute(corpus, Means(kill), batch_size=3)
    assert not kills
    assert compute(corpus, Means(kill), batch_size=3).quarantined == 0
    assert means(corpus) == EXPECTED


def test_one_computation_at_a_time(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "corpus")
    folder = corpus.folder / "columns" / "means"
    folder.mkdir(parents=True)
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(RetryLater, match="means is in use by another process"):
            compute(corpus, Means())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "flot"}, 'Did you mean "float"'),
        ({"dtype": "float31"}, 'Did you mean "float32"'),
        ({"dtype": "int8"}, "needs a float dtype"),
        ({"kind": "array"}, "needs the shape"),
        ({"shape": (3,)}, "no shape of its own"),
        ({"batch_size": 0}, "batch_size >= 1"),
    ],
)
def test_wrong_settings_are_one_sentence(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    corpus = make_corpus(tmp_path / "corpus", count=1)
    with pytest.raises(UsageError, match=message):
        compute(corpus, Means(), **settings)
    assert not (corpus.folder / "columns").exists()


def test_column_names_are_checked(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "corpus", count=1)
    for name in ("", "../up", "a/b", ".hidden", "Big", "x" * 65):
        with pytest.raises(UsageError, match="cannot name a column"):
            compute_column(corpus.folder, means_column(Means, name=name), HERE)


def test_errors_of_open_column(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "corpus")
    folder = compute(corpus, Means()).folder
    with pytest.raises(UsageError, match='Did you mean "means"'):
        open_column(corpus, "mean")
    column = open_column(corpus, "means")
    with pytest.raises(IndexError):
        column.value("train", COUNT)
    with pytest.raises(UsageError, match='Did you mean "train"'):
        column.value("trian", 0)
    with pytest.raises(UsageError, match="no text"):
        column.provenance("train", 0)
    assert verify_column(corpus, "means") == []
    path = folder / "train-00001.arrow"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    (folder / "held_out-00000.arrow").unlink()
    problems = verify_column(corpus, "means")
    assert len(problems) == 2 and "sha256" in problems[0] and "No such file" in problems[1]
    with pytest.raises(Failure, match="cannot be read"):
        open_column(open_corpus(corpus.folder), "means").value("held_out", 0)


@pytest.mark.slow
def test_an_actor_pool_gives_the_same_bytes_and_survives_a_lethal_picture(tmp_path: Path, ray_session: None) -> None:
    here, there = make_corpus(tmp_path / "here"), make_corpus(tmp_path / "there")

    def factory() -> Any:  # local functions travel by value
        import os

        def work(images: Any, keys: Any) -> list[Any]:
            if "picture-6" in keys:  # alone in its shard, so two deaths are enough: starting actors is slow
                os._exit(1)
            return [float(image.mean()) for image in images]

        return work

    def gentle() -> Any:
        return lambda images, keys: [
            SampleError("crashed", "2 processes died over this picture alone") if key == "picture-6" else image.mean()
            for image, key in zip(images, keys, strict=True)
        ]

    result = compute_column(there.folder, means_column(factory), Pool(workers=2))
    compute_column(here.folder, means_column(gentle), HERE)
    assert result.reasons == {"crashed": 1}
    assert means(there) == [*EXPECTED[:6], None]
    for path in (here.folder / "columns" / "means").glob("*.arrow"):
        assert path.read_bytes() == (there.folder / "columns" / "means" / path.name).read_bytes()
