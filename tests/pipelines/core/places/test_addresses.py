"""Addresses of stores where a command takes only paths: refused at once, and no folder called "s3:" appears."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.commands import main as cli
from pipelines.core.errors import UsageError
from pipelines.core.folders import check_output, folder_lock
from pipelines.core.places.addresses import is_address

ADDRESS = "s3://bucket/out"


@pytest.mark.parametrize(
    "words",
    [
        ["degrade", "pictures", ADDRESS],
        ["evaluate", "a", "--lq", "b", f"--out={ADDRESS}"],
        ["evaluate", "a", "--lq", ADDRESS, "--out", "c"],
        ["train", "supir-adaptor", "--out", ADDRESS],
        ["train", "supir-adaptor", "--input", f"corpus={ADDRESS}", "--out", "x"],
        ["run", "demo", "--out", ADDRESS],
        ["demo", f"-o{ADDRESS}"],
        ["report", ADDRESS],
        ["replay", ADDRESS],
        ["caption", ADDRESS, "--model", "tags"],
        ["weights", "import", "swinir", "all=x.pt", "--out", ADDRESS],
    ],
)
def test_an_address_is_refused_where_a_path_is_needed(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"s3://bucket/out is an address"):
        cli.build_app()(words, standalone_mode=False)
    assert list(tmp_path.iterdir()) == []


def test_a_job_started_from_python_refuses_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="s3://bucket/out"):
        check_output(Path(ADDRESS), 1)
    with pytest.raises(UsageError, match="s3://bucket/out"), folder_lock(Path(ADDRESS)):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("s3://b/x", True),
        ("memory://x", True),
        ("s3:/b/x", True),
        ("c:/x", False),
        ("a/b:/c", False),
        ("ratio:2", False),
    ],
)
def test_what_an_address_is(text: str, answer: bool) -> None:
    assert is_address(text) is answer
    assert is_address(Path(text)) is answer


def test_a_password_is_not_repeated(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is an address") as caught:
        cli.build_app()(["run", "demo", "--out", "s3://KEY:SECRET@bucket/out"], standalone_mode=False)
    assert "SECRET" not in str(caught.value)
