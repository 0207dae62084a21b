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
        ["degrade", ADDRESS, "out"],
        ["doctor", "--out", ADDRESS],
        ["demo", "--images", ADDRESS],
        ["run", "demo", "--out=x", f"--images={ADDRESS}"],
        ["restore", "pictures", "--out=x", "--prompts", ADDRESS],
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
    "words",
    [
        ["curate", "folder", "--images", "pictures", "--out", "s4://bucket/out"],
        ["restore", "pictures", "--out", "s4://bucket/out"],
        ["evaluate", "a", "--lq", "b", "--out", "s4://bucket/out"],
        ["run", "demo", "--out", "s4://bucket/out"],
        ["report", "s4://bucket/out"],
        ["replay", "s4://bucket/out"],
        ["caption", "s4://bucket/out", "--model", "tags"],
    ],
)
def test_what_cannot_be_a_place_is_refused_by_every_command_that_takes_places(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r'"s4" is no store\. Did you mean "s3"'):
        cli.build_app()(words, standalone_mode=False)
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
    with pytest.raises(UsageError, match="holds a password") as caught:
        cli.build_app()(["run", "demo", "--out", "s3://KEY:SECRET@bucket/out"], standalone_mode=False)
    assert "SECRET" not in str(caught.value)
