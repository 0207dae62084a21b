"""Inputs and outputs of a job: patterns, tars, tables, corpora; formats; results as tars and tables."""

from __future__ import annotations

import asyncio
import functools
import io
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helper_modules import load_helper_for_workers
from PIL import Image as Pillow

from components.images import decode, encode_png
from components.picture_files import SUFFIXES, read_result_text
from components.restoring import picture_seed
from components.synthetic import dead_leaves
from components.systems import SYSTEMS
from pipelines.core.errors import UsageError
from pipelines.core.places.place import place_of
from pipelines.core.rows import read_lines
from pipelines.restoration.models import open_model
from pipelines.restoration.parts import Part
from pipelines.restoration.sources import list_sources, translate
from pipelines.service.front import ServeLimits, accepted_format, read_parameters
from pipelines.service.serve import RestorerReplica

tiny = load_helper_for_workers("pipelines/_tiny.py")
PNGS = [encode_png(dead_leaves(24, 3, number)) for number in range(4)]


@pytest.fixture(autouse=True)
def tiny_system(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SYSTEMS, "tiny", tiny.SYSTEM)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("model") / "tiny")


def run(model: Path, src: object, out: Path, **settings):
    """Call restore_folder with the tiny system in this process."""
    build = functools.partial(tiny.build_tiny, model, **settings.pop("build", {}))
    return tiny.run_job(model, src, out, **{"factory": build, **settings})


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as archive:
        return {info.name: archive.extractfile(info).read() for info in archive}  # type: ignore[union-attr]


def keys(src: object, out: Path | None = None, column: str = "") -> list[str]:
    return sorted(list_sources(src, out, column).pictures)  # type: ignore[arg-type]


# --- inputs -----------------------------------------------------------------------------------------------------------


def test_patterns_give_the_keys_of_their_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["a.jpg", "b.png", "2024/c.jpg", "2024/x/d.jpg", "2024/x/[e].jpg", "-dash.jpg"]
    write(tmp_path / "pics", dict.fromkeys(names, PNGS[0]))
    monkeypatch.chdir(tmp_path)
    assert keys("pics/**/*.jpg") == ["-dash", "2024/c", "2024/x/[e]", "2024/x/d", "a"]
    assert keys("pics/*.jpg") == ["-dash", "a"] and keys("pics/2024/?.jpg") == ["c"]
    assert keys(str(tmp_path / "pics" / "[ab].*")) == ["a", "b"] and keys("p*/2024/**") == ["pics/2024/c"] + [
        f"pics/2024/x/{name}" for name in ("[e]", "d")
    ]
    assert keys("pics/2024/x/[e].jpg") == ["[e]"]  # a file of that name is no pattern
    with pytest.raises(UsageError, match=r"no file below pics matches \*\.gif"):
        keys("pics/*.gif")
    with pytest.raises(UsageError, match=r'"\.\." cannot stand behind a wildcard'):
        keys("pics/*/../a.jpg")
    assert translate("a/**/[!b]*.p?g") == r"a/(?:[^/]+/)*[^b][^/]*\.p[^/]g"


def test_hostile_names_stay_in_the_output_folder(model: Path, tmp_path: Path) -> None:
    inner = ["../../up.png", "/abs.png", "été/日本.png", "-rf.png", "x" * 240 + ".png", "con:1\n.png", "a/./b.png"]
    tar = write_tar(tmp_path / "in" / "evil.tar", dict.fromkeys(inner, PNGS[0]))
    with tarfile.open(tar, "a") as archive:  # a link and a device are no pictures
        for name, kind in (("link.png", tarfile.SYMTYPE), ("device.png", tarfile.CHRTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
    result = run(model, tar, tmp_path / "deep" / "out")
    assert (result.restored, result.quarantined, result.ignored) == (7, 0, 2)
    files = sorted(path for path in tmp_path.rglob("*.png"))
    assert len(files) == 7 and all(path.is_relative_to(tmp_path / "deep" / "out") for path in files)
    assert {"up.png", "abs.png", "-rf.png", "日本.png"} <= {path.name for path in files}


def test_members_and_cells_have_the_results_of_files(model: Path, tmp_path: Path) -> None:
    """Seeds depend on keys alone: a tar and a table give the bytes of a folder with these names."""
    files = {"a.png": PNGS[0], "s/b.png": PNGS[1]}
    run(model, write(tmp_path / "folder", files), tmp_path / "out0", seed=5)
    expected = {name: (tmp_path / "out0" / name).read_bytes() for name in files}
    tar = write_tar(tmp_path / "t.tar", {**files, "a.json": b"{}"})
    result = run(model, tar, tmp_path / "out1", seed=5)
    assert (result.restored, result.ignored) == (2, 1)
    table = pa.table({"file_name": list(files), "image": list(files.values())})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=1)
    sources = list_sources(tmp_path / "t.parquet", column="image")
    run(model, sources, tmp_path / "out2", seed=5)
    for out in ("out1", "out2"):
        assert {name: (tmp_path / out / name).read_bytes() for name in files} == expected
    assert run(model, tar, tmp_path / "out1", seed=5).skipped == 2
    assert read_lines(tmp_path / "out1" / "records.jsonl")[0]["seed"] == picture_seed(5, "a")


def test_tars_in_folders_corpora_and_stores(tmp_path: Path) -> None:
    write(tmp_path / "d", {"p.png": PNGS[0]})
    write_tar(tmp_path / "d" / "s0.tar", {"a.png": PNGS[0], "a.txt": b"x"})
    write(tmp_path / "d", {"broken.tar": b"no tar at all" * 99})
    with tarfile.open(tmp_path / "d" / "s0.tar", "a") as archive:  # a second member of the same name
        info = tarfile.TarInfo("a.png")
        info.size = len(PNGS[1])
        archive.addfile(info, io.BytesIO(PNGS[1]))
    assert keys(tmp_path / "d") == ["broken", "p", "s0/a", "s0/a~2"]
    assert keys(f"{tmp_path}/d/s*.tar")[0] == "s0/a"
    index = b'{"digest": "x", "splits": {"train": {"shards": [{"name": "train-0.tar"}]}}}'
    write(tmp_path / "c", {"index.json": index, "train.arrow": b"x"})
    write_tar(tmp_path / "c" / "train" / "train-0.tar", {"k1.png": PNGS[0], "k1.json": b"{}"})
    assert keys(tmp_path / "c") == ["k1"]
    place = place_of("memory://sources-test/d")
    (place / "s0.tar").write_bytes((tmp_path / "d" / "s0.tar").read_bytes())
    (source,) = [each for key, each in list_sources(place).pictures.items() if key == "s0/a"]
    assert isinstance(source, Part) and source.read_bytes() == PNGS[0]


def test_sentences_of_wrong_inputs(tmp_path: Path) -> None:
    pq.write_table(pa.table({"n": [1], "image": [b"x"]}), tmp_path / "t.parquet")
    write(tmp_path, {"z.tar.gz": b"x", "n.tar": b"no tar at all" * 99})
    for src, column, sentence in (
        ("t.parquet", "", r"name the column of the pictures: --column NAME. It has n, image"),
        ("t.parquet", "imag", r'Did you mean "image"\?'),
        ("t.parquet", "n", r"the column n holds int64 and no bytes"),
        ("z.tar.gz", "", r"is compressed, so no member can be read alone"),
        ("n.tar", "", r"n.tar is no tar"),
        ("none", "", r"none does not exist"),
    ):
        with pytest.raises(UsageError, match=sentence):
            list_sources(str(tmp_path / src), column=column)


def test_a_file_that_is_added_renames_no_result(model: Path, tmp_path: Path) -> None:
    src, out = write(tmp_path / "in", {"a.jpg": PNGS[0]}), tmp_path / "out"
    run(model, src, out)
    before = (out / "a.png").read_bytes()
    write(src, {"a.webp": PNGS[1], "a.png": PNGS[2]})
    result = run(model, src, out)
    assert (result.restored, result.skipped) == (2, 1) and (out / "a.png").read_bytes() == before
    assert sorted(path.name for path in out.glob("*.png")) == ["a.png", "a.png.png", "a.webp.png"]
    assert run(model, src, out).skipped == 3
    assert keys(src, tmp_path / "new") == ["a.jpg", "a.png", "a.webp"]  # without a history each has its suffix


# --- results ----------------------------------------------------------------------------------------------------------


def test_formats_and_a_change_of_format(model: Path, tmp_path: Path) -> None:
    jpeg = io.BytesIO()
    Pillow.fromarray(dead_leaves(24, 3, 7)).save(jpeg, "JPEG")
    src, out = write(tmp_path / "in", {"s/a.png": PNGS[0], "b.bin": jpeg.getvalue()}), tmp_path / "out"
    run(model, src, out)
    pixels = decode((out / "s" / "a.png").read_bytes())
    assert run(model, src, out, options={"format": "like"}).restored == 2
    assert sorted(path.relative_to(out).as_posix() for path in out.rglob("*.*g")) == ["b.jpg", "s/a.png"]
    rows = {row["key"]: row for row in read_lines(out / "records.jsonl")}
    assert rows["b"]["output"] == "b.jpg" and rows["b"]["file"] == {"format": "like"}
    assert run(model, src, out, options={"format": "tiff", "bits": 16}).restored == 2
    assert sorted(path.name for path in out.rglob("*.*") if path.suffix in SUFFIXES.values()) == ["a.tiff", "b.tiff"]
    assert (decode((out / "s" / "a.tiff").read_bytes()) == pixels).all()
    assert run(model, src, out, options={"format": "tiff", "bits": 16}).skipped == 2
    (out / "records.jsonl").unlink()  # as after a kill: the result's own text says whose it is
    assert run(model, src, out, options={"format": "tiff", "bits": 16}).restored == 2
    write(tmp_path / "other", {"b.tiff": b"not ours"})
    with pytest.raises(UsageError, match=r"b\.tiff would be overwritten"):
        run(model, src, tmp_path / "other", options={"format": "tiff"})


@pytest.mark.parametrize("options", [{}, {"format": "webp", "quality": 70}, {"format": "avif"}, {"format": "like"}])
def test_the_service_answers_with_the_bytes_of_the_job(model: Path, tmp_path: Path, options: dict) -> None:
    data = io.BytesIO()
    exif = Pillow.Exif()
    exif[0x010F], exif[0x0112] = "Canon", 6
    Pillow.fromarray(dead_leaves(32, 3, 8)[:24]).save(data, "JPEG", exif=exif)
    result = run(model, write(tmp_path / "in", {"a.jpg": data.getvalue()}), tmp_path / "out", options=options)
    (row,) = read_lines(result.records)
    opened = open_model(model)
    replica = RestorerReplica(functools.partial(tiny.build_tiny, model), opened.identity, ServeLimits(), 1)
    texts = {name: str(value) for name, value in {"key": "a", **options}.items()}
    key, seed, ask = read_parameters(texts, ServeLimits(), opened.check)
    outcome = asyncio.run(replica.restore(data.getvalue(), key, seed, ask))
    file = (result.folder / row["output"]).read_bytes()
    assert (outcome.picture, f".{outcome.format}") == (file, SUFFIXES[outcome.format].replace("jpg", "jpeg"))
    assert read_result_text(file)["key"] == "a" and Pillow.open(io.BytesIO(file)).getexif()[0x010F] == "Canon"


def test_accept_names_the_format() -> None:
    for header, expected in {
        "": "",
        "*/*": "",
        "image/webp": "webp",
        "image/avif;q=0.2, image/webp;q=0.8, */*;q=0.1": "webp",
        "application/json, image/tiff": "tiff",
        "image/*, image/jpeg;q=0.9": "",
        "image/jpeg;q=x": "",
        "image/jpeg;q=0": "",
        "text/html": "",
    }.items():
        assert accepted_format(header) == expected, header


# --- results as tars and tables ---------------------------------------------------------------------------------------


def shards(tmp_path: Path) -> Path:
    write_tar(tmp_path / "in" / "s0.tar", {"a.png": PNGS[0], "b.png": PNGS[1], "torn.png": PNGS[1][:99]})
    write_tar(tmp_path / "in" / "n" / "s1.tar", {"c.png": PNGS[2], "c.txt": b"a caption"})
    return tmp_path / "in"


def test_tars_give_tars_and_a_shard_is_redone_as_a_whole(model: Path, tmp_path: Path) -> None:
    src, out = shards(tmp_path), tmp_path / "out"
    run(model, src, tmp_path / "files")
    result = run(model, src, out, out_form="tar")
    assert (result.restored, result.quarantined) == (3, 1)
    assert list(members(out / "s0.tar")) == ["a.png", "b.png"] and list(members(out / "n" / "s1.tar")) == ["c.png"]
    assert members(out / "s0.tar")["a.png"] == (tmp_path / "files" / "s0" / "a.png").read_bytes()
    row = next(row for row in read_lines(result.records) if row["key"] == "s0/a")
    assert (row["output"], row["member"]) == ("s0.tar", "a.png")
    before = (out / "s0.tar").read_bytes()
    again = run(model, src, out, out_form="tar", build={"lethal": "s0/a"})  # nothing is restored, else it would die
    assert (again.restored, again.skipped, again.quarantined) == (0, 3, 1)
    (out / "s0.tar").write_bytes(before[:-700])
    again = run(model, src, out, out_form="tar")
    assert (again.restored, again.skipped, again.quarantined) == (2, 1, 1) and (out / "s0.tar").read_bytes() == before
    (out / "records.jsonl").unlink()  # as after a kill between the shard and its rows
    assert run(model, src, out, out_form="tar").restored == 3 and (out / "s0.tar").read_bytes() == before
    write(tmp_path / "other", {"s0.tar": b"mine"})
    with pytest.raises(UsageError, match="it is no result"):
        run(model, src, tmp_path / "other", out_form="tar")
    write(src, {"x.png": PNGS[0]})
    with pytest.raises(UsageError, match=r"--out-form tar needs tars as input, and .*x\.png is in none"):
        run(model, src, out, out_form="tar")


def test_tables_give_tables_with_their_other_columns(model: Path, tmp_path: Path) -> None:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    cells = [{"bytes": data, "path": f"p{number}.png"} for number, data in enumerate([PNGS[0], b"html", PNGS[2]])]
    table = pa.table({"label": [7, 8, 9], "image": pa.array(cells, kind)})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=2)
    sources = list_sources(tmp_path / "t.parquet", tmp_path / "out", "image")
    result = run(model, sources, tmp_path / "out", out_form="parquet", options={"format": "webp"})
    assert (result.restored, result.quarantined) == (2, 1)
    read = pq.read_table(tmp_path / "out" / "t.parquet")
    assert read.column("label").to_pylist() == [7, 8, 9] and read.schema.field("image").type == kind
    values = [cell and cell["bytes"] for cell in read.column("image").to_pylist()]
    assert values[1] is None and [read_result_text(values[at])["key"] for at in (0, 2)] == ["p0", "p2"]
    again = run(model, sources, tmp_path / "out", out_form="parquet", options={"format": "webp"})
    assert (again.skipped, again.quarantined) == (2, 1)


def test_a_broken_tar_gives_its_intact_members(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "t.tar", {"a.png": PNGS[0], "b.png": PNGS[1]})
    tar.write_bytes(tar.read_bytes()[: 512 + len(PNGS[0]) + 100])
    assert keys(tar) == ["a"]
