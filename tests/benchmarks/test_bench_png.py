"""The benchmark of PNG levels on small pictures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helper_modules import load_helper

bench = load_helper("benchmarks/bench_png.py")


def test_rows_are_relative_to_level_6(capsys: pytest.CaptureFixture[str]) -> None:
    bench.main(["--side", "96", "--pictures", "2", "--repeats", "1", "--levels", "0", "2", "6", "9"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["level"] for row in rows] == [0, 2, 6, 9]
    sizes = [row["size"] for row in rows]
    assert sizes == sorted(sizes, reverse=True) and sizes[2] == rows[2]["time"] == 1
    assert all(row["void"] for row in rows)  # one repeat has no spread
    assert rows[0]["bits_per_pixel"] > 24 > rows[1]["bits_per_pixel"]  # level 0 stores three bytes and a filter


def test_nothing_measured_is_no_row(tmp_path: Path) -> None:
    for words in (["--images", str(tmp_path)], ["--side", "32", "--pictures", "1", "--repeats", "0"]):
        with pytest.raises(SystemExit, match="at least one picture and one repeat are needed"):
            bench.main(["--levels", "1", *words])


def test_a_folder_gives_the_middles_of_its_pictures(images_dir) -> None:  # type: ignore[no-untyped-def]
    pictures = bench.pictures_of(images_dir / "hq", 128, 3)
    assert [picture.shape for picture in pictures] == [(128, 128, 3)] * 3
