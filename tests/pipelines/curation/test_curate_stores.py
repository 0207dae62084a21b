"""Curating from a bucket into a bucket: the bytes of a local run, also when the first run ends half way."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import store_servers

from components.corpora import CorpusSpec, FilterSpec, SourceSpec
from components.images import encode_png
from pipelines.core.places.place import Place, place_of
from pipelines.core.places.working_copy import working_copy
from pipelines.corpus.shards import open_corpus, verify
from pipelines.corpus.stored import corpus_folder
from pipelines.curation.curate import curate, saved_spec

KEPT = ("index.json", "manifest.jsonl", "quarantine.jsonl", "train.arrow", "held_out.arrow")


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with store_servers.moto_server() as endpoint:
        yield endpoint


def corpus_bytes(folder: Path) -> dict[str, bytes]:
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*.tar")) if "work" not in path.parts]
    return {name: (folder / name).read_bytes() for name in [*KEPT, *names]}


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_a_corpus_in_a_bucket_has_the_bytes_of_one_on_a_disk(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in store_servers.environment(server).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RESTORAY_HOME", str(tmp_path / "home"))
    storage = store_servers.storage(server)
    place = place_of(f"s3://{store_servers.BUCKET}/corpus")
    assert isinstance(place, Place)
    photos = tmp_path / "photos"
    photos.mkdir()
    for index in range(5):
        pixels = np.random.default_rng(index).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        data = encode_png(pixels)[: 300 if index == 3 else None]
        (place.parent / f"photos/{index}.png").write_bytes(data)
        (photos / f"{index}.png").write_bytes(data)
    for name in ("1.txt", "2.png.caption"):
        (place.parent / "photos" / name).write_bytes(name.encode())
        (photos / name).write_bytes(name.encode())
    source = SourceSpec(kind="folder", path=str(place.parent / "photos"), storage=storage)
    spec = CorpusSpec(name="s3", sources=[source], filters=FilterSpec(min_side_px=16), max_bad_fraction=1.0)
    curate(spec, tmp_path / "local")
    expected = corpus_bytes(tmp_path / "local")
    assert not (tmp_path / "local" / "work" / ".spool").exists()
    curate(replace(spec, sources=[SourceSpec(kind="folder", path=str(photos))]), tmp_path / "files")
    assert expected == corpus_bytes(tmp_path / "files")
    assert b'"caption":"2.png.caption"' in expected["manifest.jsonl"]

    class Killed(Exception):
        pass

    def end(count: int, of: int = 0, note: str = "") -> None:
        if "shard" in note or count == of:
            raise Killed

    with pytest.raises(Killed), working_copy(place) as folder:
        curate(spec, folder, progress=end)
    assert not (place / "index.json").is_file()
    monkeypatch.setenv("RESTORAY_HOME", str(tmp_path / "another machine"))
    with working_copy(place) as folder:
        result = curate(spec, folder)
    assert (result.accepted, result.rejected) == (4, 1)
    assert {name: (place / name).read_bytes() for name in expected} == expected
    assert saved_spec(folder).sources[0].storage["secret"] != storage["secret"]
    everything = b"".join((place / name).read_bytes() for name, _ in place.files())
    assert storage["secret"].encode() not in everything
    read = corpus_folder(place)
    assert open_corpus(read).digest == hashlib.sha256(expected["manifest.jsonl"]).hexdigest()
    assert verify(open_corpus(tmp_path / "local")) == []
