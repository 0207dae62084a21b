"""A list of urls becomes a corpus: each is fetched once, and only failures are fetched again."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
from helper_modules import load_helper

from components.corpora import CorpusSpec, DownloadSpec, FilterSpec, SourceSpec
from pipelines.corpus import shards
from pipelines.curation import journal, measure
from pipelines.curation.curate import curate, replay, retryable_reasons
from pipelines.curation.sources import Bytes, list_parts

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("without_ray")]


web = load_helper("pipelines/_loopback.py")


@pytest.fixture
def server() -> Iterator[object]:
    running = web.Server()
    yield running
    running.close()


def jpeg(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    return cv2.imencode(".jpg", pixels)[1].tobytes()


def test_only_failures_are_fetched_again(server: web.Server, tmp_path: Path) -> None:
    for number in range(6):
        server.routes[f"/good{number}"] = web.whole(jpeg(number))
    server.routes["/late"] = web.whole(b"", 404)
    server.routes["/page"] = web.whole(b"<html>sign in</html>")
    server.routes["/busy"] = web.whole(b"", 503)
    server.routes["/cut"] = web.whole(jpeg(50)[:700])
    names = [*(f"good{n}" for n in range(6)), "late", "page", "busy", "cut"]
    rows = [{"url": server.url(f"/{name}"), "text": f"a {name}", "name": name} for name in names]
    rows.append({"url": "ftp://example.org/x.jpg", "text": "", "name": "ftp"})
    rows.append({"url": "http://169.254.169.254/latest", "text": "", "name": "metadata"})
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = SourceSpec(
        kind="urls", path=str(tmp_path / "list.jsonl"), caption_column="text", key_column="name", licence="CC0-1.0"
    )
    spec = CorpusSpec(
        name="web",
        sources=[source],
        filters=FilterSpec(min_side_px=16),
        download=DownloadSpec(attempts=1, timeout_s=5, total_s=10, allow_hosts=["127.0.0.1"]),
        max_bad_fraction=1.0,
    )
    out = tmp_path / "out"
    first = curate(spec, out)
    bad = {row["key"]: (row["stage"], row["code"]) for row in map(json.loads, (out / "quarantine.jsonl").open())}
    assert bad == {
        "late": ("fetch", "http_error"),
        "page": ("fetch", "not_image"),
        "busy": ("fetch", "http_busy"),
        "cut": ("measure", "truncated"),
        "ftp": ("fetch", "bad_scheme"),
        "metadata": ("fetch", "private_address"),
    }
    manifest = {row["key"]: row for row in shards.open_corpus(out).rows()}
    assert {key: row["caption"] for key, row in manifest.items()} == {f"good{n}": f"a good{n}" for n in range(6)}
    assert {row["source"] for row in manifest.values()} == {server.url(f"/good{n}") for n in range(6)}
    requests = Counter(path for path, _ in server.requests)
    assert requests == Counter({f"/{name}": 1 for name in names})

    # A rerun fetches urls with temporary errors again, and no others.
    server.routes["/busy"] = web.whole(jpeg(60))
    second = curate(spec, out)
    assert (second.accepted, second.rejected) == (first.accepted + 1, first.rejected - 1)
    assert Counter(path for path, _ in server.requests) - requests == Counter({"/busy": 1})

    # A replay of one reason.
    server.routes["/late"] = web.whole(jpeg(61))
    assert retryable_reasons(out)["http_error"] == 1
    requests = Counter(path for path, _ in server.requests)
    third = replay(out, codes=["http_error"])
    assert third.accepted == 8
    assert Counter(path for path, _ in server.requests) - requests == Counter({"/late": 1})
    corpus = shards.open_corpus(out)
    assert shards.verify(corpus) == []
    sha256s = {row["key"]: row["sha256"] for row in corpus.rows()}
    assert sha256s["late"] == hashlib.sha256(jpeg(61)).hexdigest()
    assert sha256s["good3"] == hashlib.sha256(jpeg(3)).hexdigest()


class Death(BaseException):
    """Stands for the end of a process."""


def test_a_death_keeps_the_bodies_of_measured_pictures(
    server: web.Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are not fetched again, and files that no row names are removed."""
    for number in range(6):
        server.routes[f"/good{number}"] = web.whole(jpeg(number))
    (tmp_path / "list.txt").write_text("".join(server.url(f"/good{n}") + "\n" for n in range(6)))
    spec = CorpusSpec(
        name="web",
        sources=[SourceSpec(kind="urls", path=str(tmp_path / "list.txt"))],
        filters=FilterSpec(min_side_px=16),
        download=DownloadSpec(attempts=1, timeout_s=5, total_s=10, allow_hosts=["127.0.0.1"]),
    )
    out = tmp_path / "out"
    (part,) = list_parts(spec, out).parts
    monkeypatch.setattr(journal, "JOURNAL_ROWS", 1)
    keys = []

    def dying(data: bytes, filters: FilterSpec, key: str) -> dict[str, Any]:
        keys.append(key)
        if len(keys) == 4:
            raise Death
        return measure.look(data, filters, key)

    with pytest.raises(Death):
        measure.measure_part(part, spec, out, look_at=dying, run="1")
    (out / "work" / "fetched" / f"{part.name}-1.bin").write_bytes(b"of another attempt")
    requests = Counter(path for path, _ in server.requests)
    summary = measure.measure_part(part, spec, out, look_at=dying, run="1")
    assert (summary["rows"], summary["codes"], summary["fresh"]) == (6, {}, 3)
    assert Counter(path for path, _ in server.requests) - requests == Counter({f"/good{n}": 1 for n in (3, 4, 5)})
    rows = pq.read_table(measure.measured_path(out, part)).to_pylist()
    assert [Bytes(spec, out).read(row["at"]) for row in rows] == [jpeg(n) for n in range(6)]
    names = {path.name for path in (out / "work" / "fetched").iterdir()}
    assert names == {f"{part.name}-0.bin", f"{part.name}-2.bin"}
