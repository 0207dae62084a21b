"""Which files are candidates, and their keys, without Ray."""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components.corpora import CorpusSpec, SourceSpec, SplitSpec
from components.fingerprints import WORDS
from components.quality import SCORES
from components.types import SampleError
from pipelines.core.errors import UsageError
from pipelines.curation.journal import write_part
from pipelines.curation.measure import SCHEMA
from pipelines.curation.select import select
from pipelines.curation.sources import (
    Bytes,
    Candidate,
    candidates,
    check_sources,
    for_folder,
    list_entries,
    list_parts,
)
from pipelines.runs.engine import RunOptions, run_plan


def spec(folder: Path, split: SplitSpec | None = None) -> CorpusSpec:
    sources = [SourceSpec(kind="folder", path=str(folder))]
    return CorpusSpec(name="test", sources=sources, split=split or SplitSpec())


def decided_rows(folder: Path, contents: dict[str, str], split: SplitSpec | None = None) -> dict[str, dict]:
    """Decided rows by source, of one measured part with the pictures {"source|key": digit of the content}."""
    rows = []
    for name, content in contents.items():
        source, _, key = name.partition("|")
        row = {"id": source, "key": key or "IMG_1", "source": source, "sha256": content * 64, "bytes": 1, "code": ""}
        row |= {"width": 9, "height": 9, "ext": "png", "licence": "", "credit": "", "caption": "", "at": "{}"}
        row |= {"stage": "", "detail": "", "print": bytes(8 * WORDS)} | {f"score/{name}": 50.0 for name in SCORES}
        rows.append(row)
    with write_part(folder / "work" / "measured" / "a.parquet", SCHEMA) as output:
        for row in rows:
            output.add(row)
        output.finish({"part": "", "rules": ""})
    select(["a"], spec(folder, split), folder)
    rows = pq.read_table(folder / "work" / "decided" / "a.parquet").to_pylist()
    return {row["source"]: row for row in rows}


def names(folder: Path, out: Path | None = None) -> list[str]:
    return [entry.source.removeprefix("folder:") for entry in list_entries(spec(folder), out)[0]]


@pytest.mark.parametrize(
    ("mark", "document"),
    [
        ("plan.json", {"plan": "demo", "stages": []}),
        ("done.json", {"digest": "ab", "outputs": {}}),
        ("index.json", {"digest": "ab", "splits": {}}),
        ("records.jsonl", {"key": "x", "output_sha256": "ab", "source_sha256": "cd"}),
    ],
)
def test_outputs_of_runs_below_a_source_are_not_candidates(tmp_path: Path, mark: str, document: dict) -> None:
    for name in ("a.png", "runs/demo/restore-1/restored/x.png", "runs/demo/mlflow.db", "trip/b.png", "new/part.tar"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "runs" / "demo" / mark).write_text(json.dumps(document) + "\n")
    (tmp_path / "trip" / mark).write_text('{"stages": 3}')  # a foreign file of that name does not exclude photographs
    (tmp_path / "report.html").write_text("")
    assert names(tmp_path, tmp_path / "new") == ["a.png", "trip/b.png"]
    assert names(tmp_path) == ["a.png", "new/part.tar", "trip/b.png"]


def test_source_and_output_differ(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    with pytest.raises(UsageError, match="both input and output"):
        names(tmp_path, tmp_path)
    with pytest.raises(UsageError, match="both input and output"):
        run_plan("demo", out=tmp_path, options=RunOptions(images=tmp_path / "." / "", dry_run=True))
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_a_folder_seen_from_below_keeps_its_name(tmp_path: Path) -> None:
    (tmp_path / "photos" / "run").mkdir(parents=True)
    assert for_folder(spec(tmp_path), tmp_path / "photos" / "run" / "..").name == "photos"


def test_different_pictures_of_one_key_are_both_kept(tmp_path: Path) -> None:
    pictures = {"IMG 1.png": "a", "IMG_1.png": "b", "copy/IMG_1.png": "a"}
    rows = decided_rows(tmp_path, pictures)
    keys = {name: row["key"] for name, row in rows.items() if not row["code"]}
    assert keys == {"IMG 1.png": "IMG_1-aaaaaaaa", "IMG_1.png": "IMG_1-bbbbbbbb"}
    assert rows["copy/IMG_1.png"]["code"] == "duplicate"
    reverse = decided_rows(tmp_path, dict(reversed(pictures.items())))
    assert reverse["IMG_1.png"]["key"] == keys["IMG_1.png"]  # in any order
    alone = decided_rows(tmp_path, {"IMG 1.png": "a", "copy/IMG_1.png": "a"})
    assert [row["key"] for row in alone.values() if not row["code"]] == ["IMG_1"]


def test_equal_keys_get_longer(tmp_path: Path) -> None:
    rows = decided_rows(tmp_path, {"1|x": "a", "2|x": "b", "3|x-aaaaaaaa": "c"})
    assert len({row["key"] for row in rows.values()}) == 3
    assert {row["code"] for row in rows.values()} == {""}


def test_pictures_held_out_by_name_stay_out_of_training_under_a_longer_key(tmp_path: Path) -> None:
    pictures = {"IMG 1.png": "a", "IMG_1.png": "b"}
    by_name = decided_rows(tmp_path, pictures, SplitSpec(held_out=["IMG 1"]))
    assert {row["split"] for row in by_name.values()} == {"held_out"}
    by_fraction = decided_rows(tmp_path, pictures, SplitSpec(held_out_fraction=0.2))
    assert sorted(row["split"] for row in by_fraction.values()) == ["held_out", "train"]


def write_folder(folder: Path, count: int) -> None:
    folder.mkdir(exist_ok=True)
    for number in range(count):
        (folder / f"{number:05d}.jpg").write_bytes(b"x")


def test_a_new_file_changes_one_part(tmp_path: Path) -> None:
    write_folder(tmp_path / "in", 1500)
    before = list_parts(spec(tmp_path / "in"), tmp_path / "out").parts
    assert 10 < len(before) < 60
    (tmp_path / "in" / "00700-new.jpg").write_bytes(b"x")
    after = list_parts(spec(tmp_path / "in"), tmp_path / "out").parts
    same = {(part.name, part.digest) for part in before} & {(part.name, part.digest) for part in after}
    assert len(same) >= len(before) - 1
    assert {path.stem for path in (tmp_path / "out" / "work" / "parts").iterdir()} == {part.name for part in after}
    lines = [len((tmp_path / "out" / "work" / "parts" / p.where["list"]).read_text().splitlines()) for p in after]
    assert sum(lines) == 1501
    assert max(lines) <= 256


def jpeg(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    return cv2.imencode(".jpg", pixels)[1].tobytes()


def all_candidates(spec: CorpusSpec, out: Path) -> list[Candidate]:
    """All candidates of a spec, in order."""
    return [c for part in list_parts(spec, out).parts for c in candidates(part, spec, out, lambda _: False)]


def test_tars_give_every_picture_by_itself(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    members = {
        "a.jpg": jpeg(0), "a.json": b'{"caption": "two\\nlines", "license": "CC0-1.0"}',
        "b.v1.jpg": jpeg(1), "b.v2.JPG": jpeg(2), "b.txt": b"both",
        "c.JPEG": jpeg(3), "d.webp": jpeg(4), "e.json": b"{}", "../../f.jpg": jpeg(5),
    }  # fmt: skip
    for name in ("0.tar", "sub/1.tar"):
        (tmp_path / "in" / name).parent.mkdir(exist_ok=True)
        with tarfile.open(tmp_path / "in" / name, "w") as target:
            for member, data in members.items():
                info = tarfile.TarInfo(member)
                info.size = len(data)
                target.addfile(info, io.BytesIO(data))
    (tmp_path / "in" / "2.tar").write_bytes((tmp_path / "in" / "0.tar").read_bytes()[:3000])
    corpus_spec = CorpusSpec(name="t", sources=[SourceSpec(kind="tar", path=str(tmp_path / "in" / "**" / "*.tar"))])
    items = all_candidates(corpus_spec, tmp_path / "out")
    whole = [c for c in items if c.source.startswith(("tar:0.tar", "tar:sub/1.tar"))]
    assert [c.source for c in whole[:9]] == [
        "tar:0.tar/a.jpg", "tar:0.tar/b.v1.jpg", "tar:0.tar/b.v2.JPG", "tar:0.tar/c.JPEG", "tar:0.tar/d.webp",
        "tar:0.tar/e", "tar:0.tar/f_jpg", "tar:sub/1.tar/a.jpg", "tar:sub/1.tar/b.v1.jpg",
    ]  # fmt: skip
    assert [(c.key, c.problem.code if c.problem else "") for c in whole[:7]] == [
        ("a", ""), ("b_v1", ""), ("b_v2", ""), ("c", ""), ("d", ""), ("e", "no_picture"), ("f_jpg", "unsafe_member"),
    ]  # fmt: skip
    assert (whole[0].caption, whole[0].licence, whole[1].caption, whole[2].caption) == (
        "two lines",
        "CC0-1.0",
        "both",
        "both",
    )
    reader = Bytes(corpus_spec, tmp_path / "out")
    pictures = [c for c in items if not c.problem]
    assert [reader.read(c.at) for c in pictures] == [c.load() for c in pictures if c.load]
    truncated = [c for c in items if c.source.startswith("tar:2.tar")]
    assert [c.problem.code for c in truncated if c.problem] == ["truncated"]
    assert [c.key for c in truncated if not c.problem] == ["a"]
    assert len({c.id for c in items}) == len(items)


def test_parquet_rows_are_read_by_group(tmp_path: Path) -> None:
    pictures = [jpeg(n) for n in range(5)]
    cells = [{"bytes": data, "path": f"{n}.jpg"} for n, data in enumerate(pictures)]
    cells[3] = {"bytes": None, "path": "3.jpg"}
    table = pa.table({"image": cells, "text": [f"caption {n}" for n in range(5)], "name": [f"k.{n}" for n in range(5)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:200])
    source = SourceSpec(
        kind="parquet", path=str(tmp_path / "*.parquet"), caption_column="text", key_column="name", licence="CC0-1.0"
    )
    corpus_spec = CorpusSpec(name="t", sources=[source])
    items = all_candidates(corpus_spec, tmp_path / "out")
    assert [(c.key, c.caption, c.licence) for c in items[:5]] == [
        (f"k_{n}", f"caption {n}", "CC0-1.0") for n in range(5)
    ]
    reader = Bytes(corpus_spec, tmp_path / "out")
    assert [reader.read(c.at) for n, c in enumerate(items[:5]) if n != 3] == [
        p for n, p in enumerate(pictures) if n != 3
    ]
    with pytest.raises(SampleError, match="null"):
        reader.read(items[3].at)
    assert [(c.key, c.problem.code) for c in items[5:] if c.problem] == [("b_parquet", "corrupt")]
    (tmp_path / "b.parquet").unlink()
    with pytest.raises(UsageError, match='Did you mean "text"'):
        all_candidates(CorpusSpec(name="t", sources=[replace(source, caption_column="texd")]), tmp_path / "out")


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "txt", "parquet"])
def test_tables_of_addresses(tmp_path: Path, suffix: str) -> None:
    rows = [{"url": f"https://example.org/{n}.jpg", "text": f"a {n}"} for n in range(3)]
    path = tmp_path / f"list.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif suffix == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif suffix == "txt":
        path.write_text("# a comment\n" + "".join(row["url"] + "\n" for row in rows))
    else:
        separator = "\t" if suffix == "tsv" else ","
        path.write_text("\n".join(separator.join(row.values()) for row in [{"url": "url", "text": "text"}, *rows]))
    source = SourceSpec(kind="urls", path=str(path), caption_column="" if suffix == "txt" else "text")
    corpus_spec = CorpusSpec(name="t", sources=[source])
    parts = list_parts(corpus_spec, tmp_path / "out").parts
    lines = [json.loads(line) for p in parts for line in (tmp_path / "out" / "work" / "parts" / p.where["list"]).open()]
    assert [line["url"] for line in lines] == [row["url"] for row in rows]
    assert [line.get("caption", "") for line in lines] == ["" if suffix == "txt" else row["text"] for row in rows]
    assert len({line["key"] for line in lines}) == 3
    if suffix != "txt":
        with pytest.raises(UsageError, match='Did you mean "url"'):
            list_parts(CorpusSpec(name="t", sources=[replace(source, url_column="urls")]), tmp_path / "out")


def test_text_files_next_to_pictures_become_captions(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"x")
    (tmp_path / "b.jpg").write_bytes(b"x")
    (tmp_path / "a.txt").write_text("a\x07 bright\n otter  " + "z" * 20_000)
    captions = {c.key: c.caption for c in all_candidates(spec(tmp_path), tmp_path / "out")}
    assert captions["a"].startswith("a bright otter zzz")
    assert len(captions["a"]) == 10_000
    assert captions["b"] == ""


def test_an_unknown_store_is_one_sentence(tmp_path: Path) -> None:
    for address, words in (("s4://bucket/x", "s4"), ("memory://nothing/*.tar", "holds no file")):
        with pytest.raises(UsageError, match=words):
            list_parts(CorpusSpec(name="t", sources=[SourceSpec(kind="tar", path=address)]), tmp_path)


def test_a_held_out_name_that_no_shipped_picture_has_is_an_error_before_any_work() -> None:
    sources = [SourceSpec(kind="demo_corpus", names=["mr-lee.jpg", "perched-osprey.jpg"])]
    check_sources(CorpusSpec(name="c", sources=sources, split=SplitSpec(held_out=["perched-osprey"])))
    spec = CorpusSpec(name="c", sources=sources, split=SplitSpec(held_out=["perched-osprey", "mr-leo"]))
    with pytest.raises(UsageError, match=r'c: no source has the held-out picture "mr-leo".*Did you mean "mr-lee"'):
        check_sources(spec)
