"""Other texts, tables and files of real corpora: of browsers, phones, Excel, macOS, Windows and disk stations."""

from __future__ import annotations

import json
import os
import unicodedata
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helper_modules import load_helper

from components.corpora import CorpusSpec, PairSpec, SourceSpec
from pipelines.core.errors import UsageError
from pipelines.core.pictures import list_pictures
from pipelines.curation.pairs import match_inputs
from pipelines.curation.sources import Candidate, Entry, candidates, list_parts

_texts = load_helper("pipelines/curation/test_source_texts.py")
read, write, tar, captions, codes = (getattr(_texts, name) for name in ("read", "write", "tar", "captions", "codes"))


def addresses(folder: Path, **columns: str) -> list[Candidate]:
    """The candidates of a table of addresses; nothing is fetched."""
    settings: dict[str, Any] = {"kind": "urls", "path": str(folder), "caption_column": "text", **columns}
    spec = CorpusSpec(name="t", sources=[SourceSpec(**settings)])
    out = folder.parent / "out"
    return [c for part in list_parts(spec, out).parts for c in candidates(part, spec, out, lambda _: True)]


def sentences(folder: Path) -> list[str]:
    spec = CorpusSpec(name="t", sources=[SourceSpec(kind="folder", path=str(folder))])
    return list(list_parts(spec, folder.parent / "out").sentences)


# --- caption files ----------------------------------------------------------------------------------------------------


def test_caption_files_as_file_systems_and_downloaders_name_them(tmp_path: Path) -> None:
    composed, parts = (unicodedata.normalize(form, "\u00e9t\u00e9") for form in ("NFC", "NFD"))
    files = {
        f"{composed}.jpg": "x", f"{parts}.txt": "composed differently",
        "IMG_1.JPG": "x", "img_1.txt": "another case",
        "a.jpg": "x", "a.jpg.txt": "of the whole name",
        "b.jpg": "x", "b.txt": "of the stem", "b.jpg.txt": "of the whole name", "B.caption": "another case",
        "c.jpg": "x", "C.jpg": "x", "C.txt": "of the capital",
    }  # fmt: skip
    items = read(write(tmp_path / "in", files))
    assert {item.source.partition(":")[2]: item.caption for item in items.values()} | {"c.jpg": ""} == {
        f"{composed}.jpg": "composed differently", "IMG_1.JPG": "another case", "a.jpg": "of the whole name",
        "b.jpg": "of the stem", "c.jpg": "", "C.jpg": "of the capital",
    }  # fmt: skip


def test_a_caption_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "in", {"a.jpg": "x", "b.jpg": "x"})
    os.symlink("nowhere", folder / "a.txt")
    os.mkfifo(folder / "b.txt")
    items = read(folder)
    assert codes(items) == {"a": "unreadable", "b": "unreadable"}
    assert "its caption a.txt cannot be read: No such file" in str(items["a"].problem)
    (folder / "a.txt").unlink()
    (folder / "a.txt").write_text("mended")
    assert read(folder)["a"].caption == "mended"


def test_documents_of_a_tar_that_are_no_mappings_or_no_json(tmp_path: Path) -> None:
    members = {
        "a.jpg": "x", "a.json": json.dumps(["one", "two"]),
        "b.jpg": "x", "b.json": json.dumps("a text"),
        "c.jpg": "x", "c.json": json.dumps([{"caption": "p", "id": 1}, {"caption": "q"}]),
        "d.jpg": "x", "d.json": json.dumps([{"bbox": [1, 2]}]),
        "e.jpg": "x", "e.json": '{"caption": "cut',
        "f.jpg": "x", "f.json": json.dumps({"caption": "кошка"}, ensure_ascii=False).encode("cp1251"),
        "g.jpg": "x", "g.txt": "of the text", "g.json": '{"caption": "cut',
    }  # fmt: skip
    (tmp_path / "in").mkdir()
    tar(tmp_path / "in" / "a.tar", members)
    items = read(tmp_path / "in", kind="tar")
    assert captions(items) == {
        "a": ["one", "two"], "b": ["a text"], "c": ["p", "q"], "d": [], "e": [], "f": [], "g": ["of the text"],
    }  # fmt: skip
    assert codes(items) == {"e": "bad_json", "f": "not_text"}


# --- tables of addresses ----------------------------------------------------------------------------------------------

ROW = "url,text\nhttps://example.org/1.jpg,Zoë – café\n"


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("a.csv", ROW.encode("utf-8-sig")),
        ("a.csv", ROW.encode("cp1252")),
        ("a.csv", ROW.encode("utf-16")),
        ("a.csv", b"\xfe\xff" + ROW.encode("utf-16-be")),
        ("a.csv", ROW.encode("utf-16-le")),
        ("a.csv", ROW.replace(",", ";").encode("cp1252")),
        ("a.csv", b"sep=;\r\n" + ROW.replace(",", ";").encode("cp1252")),
        ("a.tsv", ROW.replace(",", "\t").encode("utf-16")),
        (
            "a.jsonl",
            json.dumps({"url": "https://example.org/1.jpg", "text": "Zoë – café"}, ensure_ascii=False).encode("cp1252"),
        ),
    ],
)
def test_tables_of_addresses_in_any_encoding(tmp_path: Path, name: str, table: bytes) -> None:
    (item,) = addresses(write(tmp_path / "in", {name: table}))
    assert (item.source, item.caption, item.problem) == ("https://example.org/1.jpg", "Zoë – café", None)


def test_rows_of_addresses_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    url = "https://example.org/{}.jpg"
    tables = {
        "a.csv": f"url,text\n{url.format(1)},кошка на ковре\n".encode("cp1251"),
        "b.csv": f"url,text\n{url.format(2)},a cat, a dog\n",
        "c.tsv": f'url\ttext\n{url.format(3)}\t"an open quote\n{url.format(4)}\tx\n',
        "d.jsonl": json.dumps({"url": [url.format(5)], "text": "x"}),
        "e.txt": f"  # a note\n{url.format(6)}\n",
    }
    rows = []
    for name, table in tables.items():
        folder = write(tmp_path / name, {name: table})
        rows += addresses(folder, caption_column="") if name == "e.txt" else addresses(folder)
    assert [item.problem.code if item.problem else "" for item in rows] == [
        "not_text", "bad_row", "bad_row", "bad_address", "",
    ]  # fmt: skip
    assert "\ufffd" not in "".join(item.caption for item in rows)


def test_addresses_of_bytes_are_texts_and_lists_are_refused(tmp_path: Path) -> None:
    for name, column in (("bytes", [b"https://example.org/1.jpg"]), ("list", [["https://example.org/1.jpg"]])):
        (tmp_path / name).mkdir()
        pq.write_table(pa.table({"url": column, "text": ["a"]}), tmp_path / name / "a.parquet")
    assert addresses(tmp_path / "bytes")[0].source == "https://example.org/1.jpg"
    with pytest.raises(UsageError, match='the column "url" holds list'):
        addresses(tmp_path / "list")


# --- tables beside pictures -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["credits.csv", "Credits.csv", "CREDITS.CSV"])
@pytest.mark.parametrize("end", [b"", b"\x1a"])
def test_credits_of_any_case_and_with_the_mark_of_the_end(tmp_path: Path, name: str, end: bytes) -> None:
    table = b"\xef\xbb\xbf\xef\xbb\xbf" + 'file, licence, credit\na.jpg, "CC0, 1", Zoë\n'.encode() + end
    item = read(write(tmp_path / "in", {"a.jpg": "x", name: table}))["a"]
    assert (item.licence, item.credit) == ("CC0, 1", "Zoë")


def test_tables_that_are_not_read_are_named(tmp_path: Path) -> None:
    table, rows = "file,licence,credit\na.jpg,CC0,me\n", '{"file_name": "a.jpg", "text": "cap"}\n'
    files = {"a.jpg": "x", "sub/b.jpg": "x", "sub/credits.csv": table, "metadata.jsonl": rows, "metadata.csv": "a,b\n"}
    folder = write(tmp_path / "in", files)
    assert sentences(folder) == [
        "metadata.csv was not read: metadata.jsonl goes before it.",
        "sub/credits.csv was not read: it belongs into the folder of the source.",
    ]
    os.symlink("nowhere", folder / "CREDITS.csv")
    with pytest.raises(UsageError, match=r"CREDITS.csv cannot be read: No such file"):
        read(folder)


def test_metadata_of_any_case_and_without_the_captions_of_some(tmp_path: Path) -> None:
    rows = [{"file_name": "b.jpg"}, {"file_name": "a.jpg", "text": "cap"}]
    folder = write(tmp_path / "in", {"a.jpg": "x", "b.jpg": "x", "Metadata.JSONL": "\n".join(map(json.dumps, rows))})
    assert captions(read(folder, caption_column="text")) == {"a": ["cap"], "b": []}
    with pytest.raises(UsageError, match=r'Metadata.JSONL, line 1: no "title"'):
        read(folder, caption_column="title")


# --- files of systems and tools, pairs --------------------------------------------------------------------------------


def test_files_of_more_systems_and_tools_are_no_pictures(tmp_path: Path) -> None:
    names = (
        "a.jpg:Zone.Identifier", "Thumbs.db:encryptable", "~$notes.docx", "ZbThumbnail.info", "IMG_1.AAE", "a.pp3",
        "a.jpg.md5", "sums.sha256",
    )  # fmt: skip
    folder = write(tmp_path / "in", {**dict.fromkeys(names, "x"), "a.jpg": "x"})
    items = read(folder)
    assert (list(items), codes(items), list(list_pictures(folder)[0])) == (["a"], {}, ["a"])
    tars = write(tmp_path / "tars", dict.fromkeys(("0.idx", "0.tar.index", "0.tar.md5", "0.tar:Zone.Identifier"), "x"))
    tar(tars / "0.tar", {"b.jpg": "x"})
    items = read(tars, kind="tar")
    assert (list(items), codes(items)) == (["b"], {})


def test_a_folder_of_inputs_inside_that_of_the_targets_is_refused(tmp_path: Path) -> None:
    (tmp_path / "hq" / "lq").mkdir(parents=True)
    entries = [Entry(key="1", source="folder:1.png")]
    for hq, lq in ((tmp_path / "hq", tmp_path / "hq" / "lq"), (tmp_path / "hq" / "lq", tmp_path / "hq")):
        with pytest.raises(UsageError, match="belong to both sides of the pairs"):
            match_inputs(entries, entries, PairSpec(hq=str(hq), lq=str(lq)))
