"""Texts of candidates as other people write them: encodings, lists, keys, tables beside pictures, files of a system."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components.captions.text import split_texts
from components.corpora import CorpusSpec, SourceSpec
from components.images import encode_png
from components.synthetic import dead_leaves
from components.types import SampleError
from pipelines.core.errors import UsageError
from pipelines.core.pictures import list_pictures, pictures_by_key
from pipelines.corpus.shards import open_corpus
from pipelines.curation.curate import curate
from pipelines.curation.sources import Candidate, candidates, list_parts
from pipelines.curation.sources.texts import caption_of, key_of

TEXT = "A café with a “menu”, 5 € – naïve"
PERSIAN = "می\u200cخواهم 👩\u200d🚒"


def read(folder: Path, **settings: Any) -> dict[str, Candidate]:
    """The candidates of one source by key."""
    spec = CorpusSpec(name="t", sources=[SourceSpec(**{"kind": "folder", "path": str(folder), **settings})])
    out = folder.parent / "out"
    return {c.key: c for part in list_parts(spec, out).parts for c in candidates(part, spec, out, lambda _: False)}


def write(folder: Path, files: Mapping[str, str | bytes]) -> Path:
    """Write files below a folder; a text is written as UTF-8."""
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data.encode() if isinstance(data, str) else data)
    return folder


def captions(candidates: Mapping[str, Candidate]) -> dict[str, list[str]]:
    return {key: split_texts(candidate.caption) for key, candidate in candidates.items()}


def codes(candidates: Mapping[str, Candidate]) -> dict[str, str]:
    return {key: c.problem.code for key, c in candidates.items() if c.problem}


def tar(path: Path, members: Mapping[str, str | bytes]) -> None:
    with tarfile.open(path, "w") as target:
        for name, data in members.items():
            info, content = tarfile.TarInfo(name), data.encode() if isinstance(data, str) else data
            info.size = len(content)
            target.addfile(info, io.BytesIO(content))


# --- caption files ----------------------------------------------------------------------------------------------------


def test_caption_files_of_any_encoding_and_suffix(tmp_path: Path) -> None:
    encodings = {
        "cp1252": TEXT.encode("cp1252"),
        "utf16": TEXT.encode("utf-16"),
        "utf16be": b"\xfe\xff" + TEXT.encode("utf-16-be"),
        "utf16bare": TEXT.encode("utf-16-le"),
        "utf8bom": TEXT.encode("utf-8-sig"),
    }
    files: dict[str, str | bytes] = {f"{name}.txt": data for name, data in encodings.items()}
    files |= {"up.TXT": "a", "kohya.caption": "b", "loud.CAPTION": "c", "mixed.Txt": "d", "joined.txt": PERSIAN}
    files |= {"both.caption": "second", "both.txt": "first", "dot.v1.txt": "e"}
    pictures = {f"{Path(name).with_suffix('')}.jpg": b"x" for name in files}
    items = read(write(tmp_path / "in", {**files, **pictures, "none.jpg": b"x"}))
    expected = dict.fromkeys(encodings, TEXT) | {"up": "a", "kohya": "b", "loud": "c", "mixed": "d", "joined": PERSIAN}
    expected |= {"both": "first", "dot_v1": "e", "none": ""}
    assert {key: c.caption for key, c in items.items()} == expected and codes(items) == {}


def test_a_caption_that_cannot_be_decoded_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "in", {"a.jpg": b"x", "a.txt": "кошка на ковре".encode("cp1251"), "b.jpg": b"x"})
    before = read(folder)
    assert codes(before) == {"a": "not_text"} and "a.txt cannot be decoded" in str(before["a"].problem)
    (folder / "a.txt").write_text("кошка на ковре", encoding="utf-8")
    after = read(folder)
    assert codes(after) == {} and after["a"].caption == "кошка на ковре" and after["a"].id != before["a"].id


def test_the_texts_of_a_tar(tmp_path: Path) -> None:
    members = {
        "a.jpg": b"x", "a.txt": TEXT.encode("cp1252"),
        "b.jpg": b"x", "b.json": json.dumps({"caption": ["one", "two", "", None]}),
        "c.jpg": b"x", "c.json": json.dumps({"caption": [], "text": PERSIAN}),
        "d.jpg": b"x", "d.json": json.dumps({"caption": {"tokens": [1, 2]}}),
        "e.jpg": b"x", "e.CAPTION": "from a caption file",
        "f.jpg": b"x", "f.txt": "кошка".encode("koi8-r"),
        "g.jpg": b"x", "g.json": json.dumps({"caption": {"bad": 1}, "prompt": "good", "license": 0}),
        "h.jpg": b"x", "h.json": json.dumps({"captions": ["p", "q"], "caption": "p"}),
        "i.jpg": b"x", "i.json": b"\xef\xbb\xbf" + json.dumps({"caption": "with a mark"}).encode(),
    }  # fmt: skip
    (tmp_path / "in").mkdir()
    tar(tmp_path / "in" / "a.tar", members)
    items = read(tmp_path / "in", kind="tar")
    assert captions(items) == {
        "a": [TEXT], "b": ["one", "two"], "c": [PERSIAN], "d": [], "e": ["from a caption file"], "f": [],
        "g": ["good"], "h": ["p", "q"], "i": ["with a mark"],
    }  # fmt: skip
    assert codes(items) == {"d": "bad_caption", "f": "not_text"} and items["g"].licence == "0"


# --- columns ----------------------------------------------------------------------------------------------------------


def parquet(folder: Path, **columns: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    count = len(next(iter(columns.values())))
    pq.write_table(pa.table({"image": [b"x"] * count, **columns}), folder / "a.parquet")
    return folder


LISTS = [["a red fox", "a fox in snow"], ["one"], [], None, ["", "x"]]
RIGHT = [["a red fox", "a fox in snow"], ["one"], [], [], ["x"]]


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (pa.array(LISTS, pa.list_(pa.string())), RIGHT),
        (pa.array(LISTS, pa.large_list(pa.large_string())), RIGHT),
        (pa.array([["a", "b"], ["c", None]], pa.list_(pa.string(), 2)), [["a", "b"], ["c"]]),
        (pa.array(["a", "b", "a", None]).dictionary_encode(), [["a"], ["b"], ["a"], []]),
        (pa.array([{"raw": "a", "tokens": ["x"]}, {"raw": None, "tokens": []}]), [["a"], []]),
        (pa.array([[{"raw": "a", "id": 1}, {"raw": "b", "id": 2}]]), [["a", "b"]]),
        (pa.array([{"raw": ["a", "b"]}]), [["a", "b"]]),
        (pa.array([TEXT.encode("cp1252"), PERSIAN.encode()]), [[TEXT], [PERSIAN]]),
        (pa.array([0, 7], pa.int16()), [["0"], ["7"]]),
        (pa.array(["two\nlines", f"{PERSIAN}\x07"]), [["two lines"], [PERSIAN]]),
    ],
)
def test_caption_columns_of_any_type(tmp_path: Path, column: pa.Array, expected: list[list[str]]) -> None:
    items = read(parquet(tmp_path / "in", caption=column), kind="parquet", caption_column="caption")
    assert list(captions(items).values()) == expected and codes(items) == {}


@pytest.mark.parametrize(
    "column",
    [
        pa.array([[1, 2]]),
        pa.array([[["a"]]]),
        pa.array([{"tokens": ["a"]}]),
        pa.array([[("k", "v")]], pa.map_(pa.string(), pa.string())),
    ],
)
def test_caption_columns_without_a_text_are_refused_by_name(tmp_path: Path, column: pa.Array) -> None:
    with pytest.raises(UsageError, match=r'a.parquet: the column "caption" holds .* no captions'):
        read(parquet(tmp_path / "in", caption=column), kind="parquet", caption_column="caption")


@pytest.mark.parametrize("kind", [pa.int8(), pa.uint8(), pa.int64(), pa.float32(), pa.bool_(), pa.string()])
def test_a_key_of_zero_is_a_key_and_a_null_is_named(tmp_path: Path, kind: pa.DataType) -> None:
    keys = pa.array(["0", "1", None] if kind == pa.string() else [0, 1, None]).cast(kind)
    items = read(parquet(tmp_path / "in", idx=keys), kind="parquet", key_column="idx")
    names = {pa.bool_(): ("False", "True"), pa.float32(): ("0_0", "1_0")}.get(kind, ("0", "1"))
    assert list(items) == [*names, "a-00000-000002"] and codes(items) == {"a-00000-000002": "no_key"}
    assert "null in this row" in str(items["a-00000-000002"].problem)


def test_a_key_of_lists_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match='the column "idx" holds list'):
        read(parquet(tmp_path / "in", idx=[[1]]), kind="parquet", key_column="idx")


def test_values_of_numpy_and_of_python() -> None:
    assert split_texts(caption_of(np.array(["a", "b"]), "x")) == ["a", "b"]
    assert caption_of(np.str_("a"), "x") == "a" and caption_of(float("nan"), "x") == caption_of(np.array([]), "x") == ""
    assert key_of(np.int64(0), "x") == "0" and key_of(False, "x") == "False"
    for value in ({"tokens": [1]}, [["a"]], [1, 2], ["a"] * 101):
        with pytest.raises(SampleError) as error:
            caption_of(value, "x")
        assert error.value.code == "bad_caption"
    for value in (None, "", " ", float("nan")):
        with pytest.raises(SampleError, match="x is"):
            key_of(value, "x")


LISTS_AS_TEXT = {
    '["a red fox", "a fox in snow"]': ["a red fox", "a fox in snow"],
    "['it\\'s one', \"two, or three\"]": ["it's one", "two, or three"],
    "['a' 'b\\'s \"x\"']": ["a", 'b\'s "x"'],
    "['a cat'\n \"a cat's tail\"]": ["a cat", "a cat's tail"],
    "[]": [],
    "[null]": [],
    '["", "x", null]': ["x"],
    "[None, 'x',]": ["x"],
    "['a\\xq', 'b']": ["['a\\xq', 'b']"],
    f"[{'-' * 9000}1]": [f"[{'-' * 9000}1]"],
    "[sic] a cat [left]": ["[sic] a cat [left]"],
    '["x", 1]': ['["x", 1]'],
    "[1, 2]": ["[1, 2]"],
    "[" * 5000 + "]" * 5000: ["[" * 5000 + "]" * 5000],
    "__import__('os')": ["__import__('os')"],
}


def test_a_list_that_a_table_holds_as_text_is_a_list(tmp_path: Path) -> None:
    """CSV has no lists, so tools write them as JSON, or as Python and numpy print them."""
    texts, expected = list(LISTS_AS_TEXT), list(LISTS_AS_TEXT.values())
    items = read(parquet(tmp_path / "parquet", text=texts), kind="parquet", caption_column="text")
    assert list(captions(items).values()) == expected
    rows = [{"file_name": f"{n:02d}.png", "text": text} for n, text in enumerate(texts)]
    files: dict[str, str | bytes] = {row["file_name"]: b"x" for row in rows}
    folder = write(tmp_path / "folder", {**files, "metadata.jsonl": "\n".join(map(json.dumps, rows))})
    assert list(captions(read(folder)).values()) == expected
    members = {
        f"{n:02d}{end}": data
        for n, row in enumerate(rows)
        for end, data in ((".jpg", b"x"), (".json", json.dumps(row)))
    }
    (tmp_path / "tars").mkdir()
    tar(tmp_path / "tars" / "a.tar", members)
    assert list(captions(read(tmp_path / "tars", kind="tar")).values()) == expected
    addresses = [{"url": f"https://example.org/{n}.jpg", "text": text} for n, text in enumerate(texts)]
    write(tmp_path / "urls", {"a.jsonl": "".join(json.dumps(row) + "\n" for row in addresses)})
    spec = CorpusSpec(name="t", sources=[SourceSpec(kind="urls", path=str(tmp_path / "urls"), caption_column="text")])
    (part,) = list_parts(spec, tmp_path / "out").parts
    rows_of_urls = candidates(part, spec, tmp_path / "out", lambda _: True)
    assert [split_texts(row.caption) for row in rows_of_urls] == expected
    inner = pa.array([["['a']", "b"]])
    items = read(parquet(tmp_path / "lists", text=inner), kind="parquet", caption_column="text")
    assert list(captions(items).values()) == [["['a']", "b"]]


def test_lists_and_zero_keys_in_tables_of_addresses(tmp_path: Path) -> None:
    rows = [{"url": f"https://example.org/{n}.jpg", "id": n, "text": text} for n, text in enumerate(LISTS)]
    rows.append({"url": "https://example.org/9.jpg", "id": None, "text": ["z"]})
    write(tmp_path / "in", {"a.jsonl": "".join(json.dumps(row) + "\n" for row in rows), "00000_stats.json": "{}"})
    settings = {"kind": "urls", "key_column": "id", "caption_column": "text"}
    spec = CorpusSpec(name="t", sources=[SourceSpec(path=str(tmp_path / "in"), **settings)])  # type: ignore[arg-type]
    (part,) = list_parts(spec, tmp_path / "out").parts
    lines = [json.loads(line) for line in (tmp_path / "out" / "work" / "parts" / part.where["list"]).open()]
    assert [line["key"] for line in lines[:5]] == ["0", "1", "2", "3", "4"]
    assert [split_texts(line.get("texts", "")) for line in lines[:5]] == RIGHT
    assert lines[5]["refused"][0] == "no_key" and lines[5]["key"].startswith("url-")
    *_, last = candidates(part, spec, tmp_path / "out", lambda _: True)  # nothing is fetched
    assert last.problem is not None and (last.problem.code, last.source[-5:]) == ("no_key", "9.jpg")


def test_a_corpus_keeps_all_texts_of_a_picture(tmp_path: Path, without_ray: None) -> None:
    pictures = [encode_png(dead_leaves(64, 7, n)) for n in range(3)]
    (tmp_path / "in").mkdir()
    table = pa.table({"image": pictures, "text": pa.array([["one", "two"], ["alone"], []], pa.list_(pa.string()))})
    pq.write_table(table, tmp_path / "in" / "a.parquet")
    source = SourceSpec(kind="parquet", path=str(tmp_path / "in"), caption_column="text")
    result = curate(CorpusSpec(name="t", sources=[source]), tmp_path / "corpus")
    corpus = open_corpus(tmp_path / "corpus")
    rows = [(row["caption"], row.get("captions")) for row in corpus.rows()]
    assert rows == [("one", ["one", "two"]), ("alone", None), ("", None)] and result.accepted == 3
    entries = [corpus.split("train").locate(n)[1] for n in range(3)]
    assert [split_texts(entry["caption"]) for entry in entries] == [["one", "two"], ["alone"], []]
    again = read(tmp_path / "corpus" / "train", kind="tar")  # a corpus is a source of another one
    assert list(captions(again).values()) == [["one", "two"], ["alone"], []]


# --- CREDITS.csv ------------------------------------------------------------------------------------------------------

CREDITS = 'file,licence,credit\r\nx.png,CC0,Zoë\r\nsub/y.png,CC-BY-4.0,"Anna,\r\nBerlin"\r\n'


@pytest.mark.parametrize(
    "table",
    [
        CREDITS.encode("utf-8-sig"),
        CREDITS.encode("cp1252"),
        CREDITS.encode("utf-16"),
        CREDITS.replace("Anna,", "Anna;").replace(",", ";").encode("cp1252"),
        CREDITS.replace("Anna,", "Anna").replace(",", "\t").encode("utf-16"),
        b"sep=;\r\n" + CREDITS.replace("Anna,", "Anna").replace(",", ";").encode("cp1252"),
        CREDITS.replace("file,licence,credit", " File,License,CREDIT").replace("sub/", ".\\sub\\").encode(),
        CREDITS.replace("\r\n", "\n").replace("CC0,Zoë", "CC0,Zoë,,").encode(),
    ],
)
def test_credits_as_spreadsheets_save_them(tmp_path: Path, table: bytes) -> None:
    items = read(write(tmp_path / "in", {"x.png": b"x", "sub/y.png": b"x", "CREDITS.csv": table}), licence="mine")
    assert (items["x"].licence, items["x"].credit) == ("CC0", "Zoë")
    assert items["sub__y"].licence == "CC-BY-4.0" and items["sub__y"].credit.startswith("Anna")
    assert items["sub__y"].credit.endswith("Berlin")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("filename,licence,credit\nx.png,a,b\n", 'no column "file". Did you mean "filename"'),
        ("file,licens,credit\nx.png,a,b\n", 'no column "licence". Did you mean "licens"'),
        ("file,licence,author\nx.png,a,b\n", 'no column "credit"'),
        ("x.png,CC0,me\n", 'no column "file"'),
        ("", "is empty: it needs columns file, licence, credit"),
        ("file,licence,credit\nx.png,CC0\n", "line 2: 2 cells where the header has 3"),
        ("file,licence,credit\nx.png,CC0,Smith, John\n", "line 2: 4 cells"),
        ("file,licence,credit\nx.png,a,b\nx.png,a,c\n", "x.png has another row"),
        ("file,licence,credit\n,a,b\n", "line 2: the row names no file"),
        ('file,licence,credit\nx.png,"a,b\n', "line"),
    ],
)
def test_credits_that_cannot_be_read_are_named(tmp_path: Path, table: str, message: str) -> None:
    with pytest.raises(UsageError) as error:
        read(write(tmp_path / "in", {"x.png": b"x", "CREDITS.csv": table}))
    assert "CREDITS.csv" in str(error.value) and message in str(error.value)


def test_missing_rows_and_pictures_are_named(tmp_path: Path) -> None:
    table = "file,licence,credit\na.png,CC0,me\nab.png,CC0,me\n"
    folder = write(tmp_path / "in", {**{f"{n}.png": b"x" for n in "abcdefgh"}, "CREDITS.csv": table})
    listing = list_parts(CorpusSpec(name="t", sources=[SourceSpec(kind="folder", path=str(folder))]), tmp_path / "out")
    assert listing.sentences == [
        "CREDITS.csv names pictures that are not there: ab.png.",
        "CREDITS.csv has no row for b.png, c.png, d.png, e.png, f.png and 2 more.",
    ]
    assert {c.licence for c in read(folder, licence="mine").values()} == {"CC0", "mine"}


# --- metadata of an imagefolder ---------------------------------------------------------------------------------------


def test_metadata_in_any_folder_and_form(tmp_path: Path) -> None:
    pictures = ("train/a.png", "train/deep/b.png", "test/c.png", "test/d.png", "val/e.png", "f.png", "train/g.png")
    files: dict[str, str | bytes] = dict.fromkeys(pictures, b"x")
    files["train/metadata.jsonl"] = "\n".join(
        json.dumps(row)
        for row in (
            {"file_name": "a.png", "text": f"{PERSIAN}\n", "license": "CC0-1.0"},
            {"file_name": "deep/b.png", "text": ["one", "two"]},
            {"file_name": "g.png", "text": {"tokens": [1]}},
        )
    )
    files["test/metadata.csv"] = "image_file_name;caption\r\nc.png;Zoë\r\nd.png;text of the table\r\n".encode("cp1252")
    files["test/d.txt"] = "text of the file"
    folder = write(tmp_path / "in", files)
    (folder / "val").mkdir(exist_ok=True)
    pq.write_table(pa.table({"file_name": ["e.png"], "prompt": ["a prompt"]}), folder / "val" / "metadata.parquet")
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "f.png", "caption": "at the top"}) + "\n")
    items = read(folder, licence="mine")
    assert captions(items) == {
        "train__a": [PERSIAN], "train__deep__b": ["one", "two"], "test__c": ["Zoë"], "test__d": ["text of the file"],
        "val__e": ["a prompt"], "f": ["at the top"], "train__g": [],
    }  # fmt: skip
    assert codes(items) == {"train__g": "bad_caption"}
    assert (items["train__a"].licence, items["f"].licence) == ("CC0-1.0", "mine")


def test_the_caption_column_of_a_folder_and_rows_without_pictures(tmp_path: Path) -> None:
    rows = [{"file_name": "sub\\a.png", "short": "s", "text": "t"}, {"file_name": "b.png", "short": "x", "text": "t"}]
    table = "\n".join(map(json.dumps, rows)).encode("utf-8-sig")
    folder = write(tmp_path / "in", {"sub/a.png": b"x", "metadata.jsonl": table})
    assert captions(read(folder, caption_column="short")) == {"sub__a": ["s"]}
    with pytest.raises(UsageError, match=r'metadata.jsonl, line 1: no "shot". Did you mean "short"'):
        read(folder, caption_column="shot")
    listing = list_parts(CorpusSpec(name="t", sources=[SourceSpec(kind="folder", path=str(folder))]), tmp_path / "out")
    assert listing.sentences == ["metadata.jsonl names pictures that are not there: b.png."]
    (folder / "metadata.jsonl").write_text('{"id": 1}\n')  # a table of something else
    listing = list_parts(CorpusSpec(name="t", sources=[SourceSpec(kind="folder", path=str(folder))]), tmp_path / "out")
    assert listing.sentences == ['metadata.jsonl has no column "file_name", so it was not read.']
    (folder / "metadata.jsonl").write_text('{"file_name": "sub/a.png"}\n{"file_name": \n')
    with pytest.raises(UsageError, match=r"metadata.jsonl, line 2: not a JSON object"):
        read(folder)


def test_a_changed_caption_in_metadata_changes_its_part_only(tmp_path: Path) -> None:
    folder = write(tmp_path / "in", {"a.png": b"x", "metadata.jsonl": '{"file_name": "a.png", "text": "one"}'})
    spec = CorpusSpec(name="t", sources=[SourceSpec(kind="folder", path=str(folder))])
    (first,) = list_parts(spec, tmp_path / "out").parts
    before = read(folder)["a"]
    (folder / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "two"}')
    (second,) = list_parts(spec, tmp_path / "out").parts
    after = read(folder)["a"]
    assert first.digest != second.digest and before.id == after.id, "the picture is not measured again"
    assert (before.caption, after.caption) == ("one", "two")


def test_a_file_name_that_is_no_text_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "in", {"0.png": b"x", "metadata.jsonl": '{"file_name": 0, "text": "a"}'})
    with pytest.raises(UsageError, match='line 1: "file_name" must be text, got 0'):
        read(folder)


@pytest.mark.parametrize("path", ["in", "file://in"])
def test_texts_that_belong_to_no_picture_are_named(tmp_path: Path, path: str) -> None:
    files = ["captions/a.txt", "b.json", "captions.csv", "meta.jsonl", "a.tsv", "z.txt", "README.txt", "LICENSE.txt"]
    others = ["notes.md", ".hidden.txt", "a.xmp"]
    folder = write(tmp_path / "in", dict.fromkeys(["a.png", "sub/a.png", *files, *others], b"x"))
    write(tmp_path / "in", {"sub/a.txt": "read", "metadata.csv": "file_name,text\na.png,read\n"})
    spec = CorpusSpec(name="t", sources=[SourceSpec(kind="folder", path=path.replace("in", str(folder)))])
    (sentence,) = list_parts(spec, tmp_path / "out").sentences
    if path == "in":
        assert sentence == "Texts that were not read: a.tsv, b.json, captions.csv, meta.jsonl, z.txt and 1 more."
    else:  # captions of a store are not read
        assert (
            sentence == "Texts that were not read: a.tsv, b.json, captions.csv, captions/a.txt, meta.jsonl and 1 more."
        )


# --- files of systems and tools ---------------------------------------------------------------------------------------

SYSTEM = (
    "Thumbs.db", "thumbs.DB", "desktop.ini", "Desktop.ini", ".DS_Store", "._a.png", "__MACOSX/._a.png",
    "RECYCLER/d.png", "Network Trash Folder/e.png", "AlbumArtSmall.jpg", "AlbumArt_{5F2C}_Large.jpg", "ThumbsCache.db",
    "__MACOSX/b.png", "@eaDir/a.png/SYNOPHOTO_THUMB_M.jpg", "$RECYCLE.BIN/c.png", "Icon\r", "sub/ehthumbs.db",
)  # fmt: skip


def test_files_of_systems_are_no_pictures(tmp_path: Path) -> None:
    folder = write(tmp_path / "in", {**dict.fromkeys(SYSTEM, b"x"), "a.png": b"x", "sub/b.png": b"x"})
    items = read(folder)
    assert list(items) == ["a", "sub__b"] and codes(items) == {}
    assert list(list_pictures(folder)[0]) == ["a", "sub/b"]
    assert list(pictures_by_key(folder, [])) == ["a", "sub/b"]
    (tmp_path / "tars").mkdir()
    tar(tmp_path / "tars" / "a.tar", {**dict.fromkeys(SYSTEM, b"x"), "a.png": b"x"})
    items = read(tmp_path / "tars", kind="tar")
    assert (list(items), codes(items)) == (["a"], {})


def test_files_of_img2dataset_beside_tars(tmp_path: Path) -> None:
    folder = write(
        tmp_path / "in", {"00000_stats.json": "{}", "README.md": "", "Thumbs.db": "", "00000.parquet": "PAR1"}
    )
    tar(folder / "00000.tar", {"000.jpg": b"x", "000.txt": "a cat", "000.json": '{"caption": "a cat"}'})
    items = read(folder, kind="tar")
    assert captions(items) == {"000": ["a cat"]} and codes(items) == {}
    write(
        tmp_path / "files", {"00000/000.jpg": b"x", "00000/000.txt": "a cat", "00000.parquet": "", "0_stats.json": ""}
    )
    assert captions(read(tmp_path / "files")) == {"00000__000": ["a cat"]}
    tables = parquet(tmp_path / "tables", text=["a"])
    write(tables, {"_SUCCESS": "", "dataset_infos.json": "{}", ".DS_Store": ""})
    assert codes(read(tables, kind="parquet")) == {}
    spec = CorpusSpec(name="t", sources=[SourceSpec(kind="tar", path=str(tables))])
    with pytest.raises(UsageError, match="no picture to curate"):
        list_parts(replace(spec), tmp_path / "out")
