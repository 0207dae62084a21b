"""Sources in object stores, against a real S3-compatible server on loopback."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest

from components.corpora import CorpusSpec, FilterSpec, SourceSpec
from pipelines.core.errors import UsageError
from pipelines.corpus import shards
from pipelines.curation.curate import curate
from pipelines.curation.sources import Bytes, candidates, check_sources, list_parts, stores

CREDENTIALS = {"key": "test", "secret": "test"}


def jpeg(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    return cv2.imencode(".jpg", pixels)[1].tobytes()


def tar_of(names: dict[str, bytes]) -> bytes:
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w") as archive:
        for name, data in names.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return target.getvalue()


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """Endpoint of a server with a bucket of loose pictures, two tars (one cut) and a parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from moto.server import ThreadedMotoServer

    running = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    store, _ = stores.open_store("s3://photographs", {"endpoint_url": endpoint, **CREDENTIALS})
    store.mkdir("photographs")  # the buckets of moto are those of the process
    table = io.BytesIO()
    pq.write_table(pa.table({"image": [jpeg(30), jpeg(31)]}), table)
    objects = {
        "loose/a.jpg": jpeg(0),
        "loose/sub/b.jpg": jpeg(1),
        "loose/cut.jpg": jpeg(2)[:300],
        "loose/notes.txt": b"a sidecar",
        "tars/0.tar": tar_of({"c.jpg": jpeg(10), "d.jpeg": jpeg(11)}),
        "tars/1.tar": tar_of({"e.jpg": jpeg(20), "f.jpg": jpeg(21), "g.jpg": jpeg(22)})[:6000],
        "tables/x.parquet": table.getvalue(),
    }
    for name, data in objects.items():
        store.pipe_file(f"photographs/{name}", data)
    yield endpoint
    running.stop()


def sources(endpoint: str) -> list[SourceSpec]:
    storage = {"endpoint_url": endpoint, **CREDENTIALS}
    return [
        SourceSpec(kind="folder", path="s3://photographs/loose", storage=storage),
        SourceSpec(kind="tar", path="s3://photographs/tars/*.tar", storage=storage),
        SourceSpec(kind="parquet", path="s3://photographs/tables/x.parquet", storage=storage),
    ]


def test_the_files_of_a_bucket_are_listed_and_read_again(server: str, tmp_path: Path) -> None:
    spec = CorpusSpec(name="s3", sources=sources(server))
    items = [c for part in list_parts(spec, tmp_path).parts for c in candidates(part, spec, tmp_path, lambda _: False)]
    reader = Bytes(spec, tmp_path)
    sha256s = {c.key: hashlib.sha256(reader.read(c.at)).hexdigest() for c in items if not c.problem}
    expected = {"a": 0, "sub__b": 1, "c": 10, "d": 11, "e": 20, "f": 21, "x-00000-000000": 30, "x-00000-000001": 31}
    assert {key: sha256s[key] for key in expected} == {
        k: hashlib.sha256(jpeg(n)).hexdigest() for k, n in expected.items()
    }
    assert [(c.key, c.problem.code) for c in items if c.problem] == [("g", "truncated")]


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("s3://photographs/none/*.tar", "holds no file"),
        ("s3://photographs/none.tar", "holds no file"),
        ("s3://nobucket/x.tar", "^s3://nobucket/x.tar: the bucket does not exist.$"),
        (
            "s3://photographs/tars/{0..3}.tar",
            r"\{0..3\}.tar names a file that does not exist: .*/2.tar holds no",
        ),
        ("s3://photographs/tars/{0..1.tar", "is not closed"),
    ],
)
def test_a_missing_bucket_or_file_is_one_sentence(server: str, tmp_path: Path, path: str, sentence: str) -> None:
    storage = {"endpoint_url": server, **CREDENTIALS}
    spec = CorpusSpec(name="s3", sources=[SourceSpec(kind="tar", path=path, storage=storage)])

    def act() -> None:
        check_sources(spec, tmp_path)
        list_parts(spec, tmp_path)

    with pytest.raises(UsageError, match=sentence):
        act()


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_a_bucket_becomes_a_corpus(server: str, tmp_path: Path) -> None:
    spec = CorpusSpec(name="s3", sources=sources(server), filters=FilterSpec(min_side_px=16))
    result = curate(spec, tmp_path / "out")
    corpus = shards.open_corpus(tmp_path / "out")
    assert shards.verify(corpus) == []
    keys = {row["key"]: row["sha256"] for row in corpus.rows()}
    pictures = {"a": 0, "sub__b": 1, "c": 10, "d": 11, "e": 20, "f": 21, "x-00000-000000": 30, "x-00000-000001": 31}
    assert keys.items() >= {key: hashlib.sha256(jpeg(n)).hexdigest() for key, n in pictures.items()}.items()
    assert result.reasons == {"truncated": 2}
    assert "127.0.0.1" not in (tmp_path / "out" / "manifest.jsonl").read_text()
