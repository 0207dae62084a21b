"""The pictures of a folder: keys, what counts as a picture, links, names that are not text."""

from __future__ import annotations

import errno
import json
import os
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import pytest

from components.images import encode_png
from components.naming import printable
from components.restoring import picture_key
from components.synthetic import dead_leaves
from components.types import SampleError
from pipelines.core.errors import UsageError
from pipelines.core.pictures import list_pictures, make_keys, pictures_by_key, read_picture
from pipelines.core.rows import json_text, read_lines
from pipelines.evaluation.degrade import degrade_folder, replay
from pipelines.evaluation.evaluate import evaluate

LATIN_1 = os.fsdecode(b"caf\xe9")
NFD, NFC = (unicodedata.normalize(form, "café") for form in ("NFD", "NFC"))


def write(folder: Path, *names: str) -> None:
    """Write a different picture under each name."""
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_png(dead_leaves(32, 7, number)))


def test_keys_mirror_the_folders_and_keep_a_suffix_only_where_names_collide() -> None:
    names = ["plain.png", "sub/b.png", "dup.jpg", "dup.png", "x:y.png", f"{NFD}.png", "a.b.jpg", "sub/deep er/c.tif"]
    expected = ["plain", "sub/b", "dup.jpg", "dup.png", "x_y", NFC, "a.b", "sub/deep er/c"]
    assert make_keys(names) == expected
    assert make_keys(list(reversed(names))) == list(reversed(expected)), "the order of the names decides"


@pytest.mark.parametrize(
    "names",
    [
        ("Photo.png", "photo.png"),
        ("Sub/a.png", "sub/a.png"),
        (f"{NFD}.png", f"{NFC}.png"),
        ("x:y.png", "x_y.png"),
        ("a.jpg", "a.jpg.png", "A.JPG"),
        ("dup.png", "dup.jpg", "dup.png.png", "DUP.png.png"),
        ("a.jpg", "a.png/b.jpg", "A.PNG/b.png"),
        ("records.jsonl/a.png", "_records.jsonl/a.png"),
        (f"{LATIN_1}.png", os.fsdecode(b"caf\xe8.png"), "caf_xe9.png"),
        ("straße.png", "STRASSE.png"),
        ("sub/b.png", "sub__b.png"),
    ],
)
def test_results_of_different_pictures_never_share_a_file(names: tuple[str, ...]) -> None:
    keys = make_keys(names)
    files = [unicodedata.normalize("NFC", f"{key}.png".casefold()) for key in keys]
    places = {place for file in files for place in (file, *map(str, Path(file).parents))} - {"."}
    assert len(set(files)) == len(names) and not {"records.jsonl"} & places
    assert not set(files) & {str(parent) for file in files for parent in Path(file).parents}, "a file is also a folder"
    assert [picture_key(key) for key in keys] == keys
    assert make_keys([f"{key}.png" for key in keys]) == keys, "the results have other keys than their sources"


def test_degrade_and_evaluate_pair_every_picture(tmp_path: Path) -> None:
    hq, lq = tmp_path / "hq", tmp_path / "lq"
    names = ("plain.png", "sub/b.png", "dup.jpg", "dup.png", "x:y.png", f"{NFD}.png", f"{LATIN_1}.png", "Photo.png")
    write(hq, *names, "photo.png", f"{os.fsdecode(bytes([0xE9]))}/in.png")
    (hq / "Thumbs.db").write_bytes(b"x")
    (hq / "notes.md").write_text("x")
    result = degrade_folder(hq, lq, "none")
    assert (result.degraded, result.quarantined, result.ignored) == (10, 0, 2)
    assert result.sheet == lq / "contact.jpg"
    assert (lq / "sub" / "b.png").is_file() and (lq / "_xe9" / "in.png").is_file()
    summary = evaluate(lq, lq, hq, tmp_path / "scores", metrics=["psnr"], baselines=())
    assert sorted(summary.pictures) == sorted(list_pictures(hq)[0]) == sorted(list_pictures(lq)[0])
    assert (len(summary.pictures), summary.missing) == (10, [])
    assert min(row["scores"]["restored"]["psnr"] for row in read_lines(tmp_path / "scores" / "scores.jsonl")) >= 50
    again = degrade_folder(lq, tmp_path / "twice", "none")
    assert (again.degraded, again.quarantined, again.ignored) == (10, 0, 4), "a sheet is no picture of the folder"

    rows = {row["key"]: row for row in read_lines(lq / "records.jsonl")}
    assert rows["caf_xe9"]["source"] == "caf\\xe9.png"
    (lq / "records.jsonl").read_bytes().decode()
    replayed = replay(lq / "records.jsonl", None, tmp_path / "replayed")
    assert (replayed.degraded, replayed.quarantined, replayed.differing) == (10, 0, [])


def test_links_and_broken_files_are_refused_by_name(tmp_path: Path) -> None:
    src, away = tmp_path / "in", tmp_path / "away"
    write(src, "real/p.png", "good.png")
    write(away, "q.png")
    (src / "linked").symlink_to(away)
    (src / "up").symlink_to(src)
    (src / "real" / "again").symlink_to(src / "real")
    (src / "broken.png").symlink_to("/nowhere.png")
    (src / "loop.png").symlink_to("loop.png")
    (src / "to-file.png").symlink_to(away / "q.png")
    os.mkfifo(src / "pipe.png")
    expected = {
        "linked": "linked_folder",
        "up": "linked_folder",
        "real/again": "linked_folder",
        "broken": "unreadable",
        "loop": "unreadable",
        "pipe": "not_image",
    }
    result = degrade_folder(src, tmp_path / "out", "none")
    assert {row["key"]: row["code"] for row in read_lines(result.quarantine)} == expected
    assert (result.degraded, result.quarantined) == (3, 6)
    assert (tmp_path / "out" / "to-file.png").is_file()

    missing: list[dict[str, str]] = []
    assert set(pictures_by_key(src, missing)) == {"real/p", "good", "to-file"}
    assert {row["key"]: row["reason"].partition("]")[0][1:] for row in missing} == expected

    (tmp_path / "shortcut").symlink_to(src)
    assert set(list_pictures(tmp_path / "shortcut")[0]) == set(list_pictures(src)[0])


def test_a_link_that_cannot_be_followed_costs_its_picture_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "in/good.png")
    (tmp_path / "in" / "long.png").symlink_to("x" * 3000)
    (tmp_path / "in" / "closed.png").symlink_to(tmp_path / "closed" / "a.png")
    stat = Path.stat

    def refuse(path: Path, **options: bool) -> os.stat_result:  # not chmod: the superuser may follow every link
        if path.name == "closed.png":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", refuse)
    result = degrade_folder(tmp_path / "in", tmp_path / "out", "none")
    details = {row["key"]: row["detail"] for row in read_lines(result.quarantine)}
    assert details == {"long": "cannot be read: File name too long", "closed": "cannot be read: Permission denied"}
    missing: list[dict[str, str]] = []
    assert (set(pictures_by_key(tmp_path / "in", missing)), len(missing)) == ({"good"}, 2)


def test_a_folder_with_nothing_but_links_says_so(tmp_path: Path) -> None:
    write(tmp_path / "away", "q.png")
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "set").symlink_to(tmp_path / "away")
    with pytest.raises(UsageError, match="holds no pictures; set: links to folders are not followed"):
        list_pictures(tmp_path / "only")


def test_a_folder_that_cannot_be_listed_has_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "in/a.png", "in/closed/b.png")
    scandir = os.scandir

    def refuse(path: str) -> Iterator[os.DirEntry[str]]:  # not chmod: the superuser may list every folder
        if Path(path).name == "closed":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    pictures, _ = list_pictures(tmp_path / "in")
    assert set(pictures) == {"a", "closed"}
    with pytest.raises(SampleError, match="cannot be listed"):
        read_picture(pictures["closed"], "closed")


def test_a_study_is_no_folder_of_pictures(tmp_path: Path) -> None:
    write(tmp_path, "seeds.png")
    (tmp_path / "study.json").write_text('{"study": "seeds", "settings": {}}')
    with pytest.raises(UsageError, match="holds a study"):
        list_pictures(tmp_path)


def test_a_users_picture_may_have_the_name_of_our_sheet(tmp_path: Path) -> None:
    write(tmp_path, "contact.jpg", "a.png")
    assert set(list_pictures(tmp_path)[0]) == {"contact", "a"}


def test_names_that_are_not_text_are_escaped_once_for_all() -> None:
    assert printable("café") == "café"
    assert printable(f"{LATIN_1}/é") == "caf\\xe9/é"
    text = json_text({LATIN_1: [LATIN_1, {"a": LATIN_1}, 1, None]})
    assert json.loads(text.encode()) == {"caf\\xe9": ["caf\\xe9", {"a": "caf\\xe9"}, 1, None]}


def test_a_companion_does_not_rename_its_picture() -> None:
    names = ["DSC_1.JPG", "DSC_1.NEF", "IMG_2.HEIC", "IMG_2.MOV", "k.png", "k.jpg", "k.raw", "x.mov", "x.mov.png"]
    keys = make_keys(names)
    assert keys == ["DSC_1", "DSC_1.NEF", "IMG_2.HEIC", "IMG_2.MOV", "k.png", "k.jpg", "k.raw", "x", "x.mov"]
    assert make_keys([f"{key}.png" for key in keys]) == keys


def test_files_of_other_trainers_and_photo_programs_are_no_pictures(tmp_path: Path) -> None:
    write(tmp_path, "a.png")
    for suffix in (".npz", ".aae", ".pp3", ".dop", ".xml", ".md5", ".XML"):
        (tmp_path / f"a{suffix}").write_bytes(b"x")
    assert list_pictures(tmp_path) == ({"a": tmp_path / "a.png"}, 7)


@pytest.mark.parametrize("name", ["records.jsonl", "quarantine.jsonl", "contact.jpg"])
def test_lists_and_sheets_of_others_stay_as_they_are(name: str, tmp_path: Path) -> None:
    write(tmp_path, "in/a.png")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text('{"id": 1}\n')
    with pytest.raises(UsageError, match=rf"{name}.*would be overwritten"):
        degrade_folder(tmp_path / "in", tmp_path / "out", "none")
    assert [path.name for path in (tmp_path / "out").iterdir() if path.name != ".lock"] == [name]
    assert (tmp_path / "out" / name).read_text() == '{"id": 1}\n'


def test_a_folder_with_a_hostile_index_is_listed(tmp_path: Path) -> None:
    write(tmp_path, "sub/a.png")
    (tmp_path / "sub" / "index.json").write_text("[" * 100_000)
    assert set(list_pictures(tmp_path)[0]) == {"sub/a"}
