"""PNG encoding in a batch job: its level, and its thread beside the networks."""

from __future__ import annotations

import functools
import hashlib
import threading
from pathlib import Path

import pytest
from helper_modules import load_helper_for_workers

from components import picture_files
from components.images import ANY_SHAPE, encode_png
from components.restoring import Picture
from components.synthetic import dead_leaves
from components.systems import SYSTEMS
from pipelines.core.errors import UsageError
from pipelines.core.pool import Pool
from pipelines.restoration.batch import batches_per_call
from pipelines.restoration.models import open_model
from pipelines.restoration.worker import RestoreWorker, Task, WorkerSettings
from pipelines.service.front import Refusal, ServeLimits, read_parameters

tiny = load_helper_for_workers("pipelines/_tiny.py")


def run(model: Path, src: Path, out: Path, **settings):
    """Call restore_folder with the tiny system in this process."""
    return tiny.run_job(model, src, out, factory=functools.partial(tiny.build_tiny, model), **settings)


@pytest.fixture(autouse=True)
def tiny_system(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SYSTEMS, "tiny", tiny.SYSTEM)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Nine pictures and a broken one."""
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(9):
        (folder / f"p{number}.png").write_bytes(encode_png(dead_leaves(32, 0, number)))
    (folder / "torn.png").write_bytes(encode_png(dead_leaves(32, 0, 9))[:99])
    return folder


def outputs(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.png")}


def test_a_picture_is_encoded_while_the_next_one_is_restored(
    model: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first picture's encoding waits for the second restoration, which would never start in a single thread."""
    restoring, threads = threading.Event(), set()

    class Watched(tiny.TinyRestorer):
        def restore(self, requests, on_step=None, cancelled=None):
            threads.add(threading.current_thread().name)
            if requests[0].key == "p1":
                restoring.set()
            return super().restore(requests, on_step, cancelled)

    def encode_late(*arguments: object) -> bytes:
        assert restoring.wait(60)
        threads.add(threading.current_thread().name)
        return encode_png(*arguments)

    monkeypatch.setattr(picture_files, "encode_png", encode_late)
    (tmp_path / "out" / "marks").mkdir(parents=True)
    opened = open_model(model)
    settings = WorkerSettings(
        factory=functools.partial(Watched, strength=1.0),
        identity=opened.identity,
        ask=opened.request_options({}),
        limits=ANY_SHAPE,
        out=tmp_path / "out",
        marks=tmp_path / "out" / "marks",
        batch_size=1,
    )
    keys = ["p0", "p1", "p2"]
    tasks = [Task(picture=Picture(key=key, seed=1), source=pictures / f"{key}.png") for key in keys]
    answers = RestoreWorker(settings)(tasks)
    assert [(answer.status, answer.row["key"]) for answer in answers] == [("restored", key) for key in keys]
    assert len(threads) == 2 and not any(settings.marks.iterdir())
    for answer in answers:
        png = (settings.out / answer.row["output"]).read_bytes()
        assert hashlib.sha256(png).hexdigest() == answer.row["output_sha256"]


def test_large_jobs_have_several_batches_in_a_call_and_small_ones_do_not() -> None:
    assert [batches_per_call(count, Pool()) for count in (3, 7, 8)] == [1, 1, 2]
    assert batches_per_call(10_000, Pool(workers=4, batch_size=2)) == 8
    assert batches_per_call(16, Pool(workers=4)) == 1  # every worker gets its share


def test_many_pictures_in_calls_of_several_have_the_bytes_of_single_ones(
    model: Path, pictures: Path, tmp_path: Path
) -> None:
    result = run(model, pictures, tmp_path / "out")
    assert (result.restored, result.quarantined) == (9, 1)
    for number in range(9):
        run(model, pictures / f"p{number}.png", tmp_path / "single")
    assert outputs(tmp_path / "out") == outputs(tmp_path / "single")


def test_another_png_level_restores_nothing_again(model: Path, pictures: Path, tmp_path: Path) -> None:
    first = run(model, pictures, tmp_path / "out", options={"png_level": 0})
    assert first.restored == 9
    assert run(model, pictures, tmp_path / "out", options={"png_level": 9}).skipped == 9
    with pytest.raises(UsageError, match="png_level must be a whole number from 0 to 9, got 11"):
        run(model, pictures, tmp_path / "out", options={"png_level": 11})
    assert read_parameters({"png_level": "6"}, ServeLimits(), dict)[2].png_level == 6
    with pytest.raises(Refusal, match="png_level must be a whole number"):
        read_parameters({"png_level": "best"}, ServeLimits(), dict)
