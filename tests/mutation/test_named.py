"""The wrong versions of named.py still apply: each changes one place, to Python that parses."""

from __future__ import annotations

import ast
from pathlib import Path

from helper_modules import load_helper

named = load_helper("mutation/named.py")


def test_every_named_mutant_applies(repository: Path) -> None:
    texts = {file: (repository / file).read_text(encoding="utf-8") for file in {one.file for one in named.NAMED}}
    for one in named.NAMED:
        text = texts[one.file]
        assert text.count(one.old) == 1, f"{one.name}: occurs {text.count(one.old)} times in {one.file}: {one.old}"
        assert one.new != one.old, one.name
        ast.parse(text.replace(one.old, one.new), one.name)
        missing = [test for test in one.tests if not (repository / test).is_file()]
        assert one.tests and missing == [], f"{one.name}: no such test file: {missing}"


def test_names_differ() -> None:
    names = [one.name for one in named.NAMED]
    assert len(set(names)) == len(names)
