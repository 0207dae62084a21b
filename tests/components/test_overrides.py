"""key=value texts: the type of a field decides how its value is read."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from components.corpora import CorpusSpec, load_corpus_spec
from components.overrides import PROMPTS, OverrideError, apply_overrides, read_options, yaml_text
from components.recipes import RecipeError
from components.systems.recipes import load_recipe

TEXTS = [
    "photo #1 of a dog",
    "[best quality], photo",
    "[unclosed",
    "a cat: close-up",
    "- item",
    "2024",
    "1e5",
    "0123",
    "1:30",
    "yes",
    "off",
    "true",
    "null",
    "~",
    "*a",
    "&a b",
    "!x",
    "%p",
    "@me",
    "|",
    "> x",
    "`x`",
    "? q",
    "{a}",
    "a\\b",
    "${steps}",
    "${oc.env:HOME}",
    "\\${a}",
    "\\\\${a}",
    "${",
    " blanks at the ends ",
    "\ttab",
    "two\nlines",
    "'single'",
    '"double"',
    "a=b=c",
    "café 写真 \U0001f431",
    "",
]


ALIASES = (
    "[&a [0, 0, 0, 0]"
    + "".join(f", &{new} [*{old}, *{old}, *{old}]" for old, new in zip("ab", "bc", strict=True))
    + "]"
)


@dataclass
class Inner:
    text: str = ""
    number: float = 0.0


@dataclass
class Schema:
    text: str = "x"
    maybe: str | None = "x"
    kind: Literal["off", "on"] = "on"
    count: int = 1
    bound: float | None = 1.0
    flag: bool = False
    names: list[str] = field(default_factory=list)
    numbers: list[float] = field(default_factory=list)
    by_name: dict[str, str] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict, metadata=PROMPTS)
    inner: Inner = field(default_factory=Inner)
    inners: list[Inner] = field(default_factory=lambda: [Inner(), Inner()])
    absent: Inner | None = None


def read(*overrides: str) -> Schema:
    schema = OmegaConf.to_object(apply_overrides(Schema, {}, overrides))
    assert isinstance(schema, Schema)
    return schema


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_field_takes_what_was_typed(text: str, tmp_path: Path) -> None:
    keys = ("text", "maybe", "by_name.k", "options.prompt", "inner.text", "inners.1.text", "absent.text")
    schema = read(*(f"{key}={text}" for key in keys))
    assert schema.maybe == (None if text == "null" else text)
    assert (schema.text, schema.by_name, schema.options) == (text, {"k": text}, {"prompt": text})
    assert (schema.inner.text, schema.inners[1].text, schema.inners[0].text) == (text, text, "")
    assert schema.absent == Inner(text=text)

    spec = load_corpus_spec(_folder_spec(tmp_path), [f"sources.0.path={text}", f"licence={text}"])
    assert (spec.sources[0].path, spec.licence) == (text, text)
    (tmp_path / "saved.yaml").write_text(yaml_text(asdict(spec)), encoding="utf-8")
    assert load_corpus_spec(tmp_path / "saved.yaml") == spec, "the saved spec holds another text"

    assert read_options([f"prompt={text}", "steps=2"], ("prompt",)) == {"prompt": text, "steps": 2}


def _folder_spec(folder: Path) -> Path:
    (folder / "a.yaml").write_text("name: a\nsources: [{kind: folder}]\n")
    return folder / "a.yaml"


@given(st.text(st.characters(exclude_categories=("Cs",)), max_size=20).filter(lambda text: text not in ("???", "null")))
@settings(max_examples=20, deadline=None)
def test_any_text_comes_back(text: str) -> None:
    assert read(f"text={text}", f"maybe={text}", f"options.negative_prompt={text}") == Schema(
        text=text, maybe=text, options={"negative_prompt": text}
    )
    assert OmegaConf.to_object(OmegaConf.create(yaml_text({"a": [text, {"b": text}]}))) == {"a": [text, {"b": text}]}


def test_other_fields_read_yaml() -> None:
    schema = read(
        "count=3",
        "bound=null",
        "flag=yes",
        "kind=off",
        "numbers=[1, 2e-3]",
        "inner.number=1e-4",
        "names=[007, yes, null, 'a #1']",
        "by_name={a: 1}",
        "options.steps=4",
        "options.sizes=[1, 2]",
        "options.preset=a: b",
    )
    assert (schema.count, schema.bound, schema.flag, schema.kind) == (3, None, True, "off")
    assert (schema.numbers, schema.inner.number) == ([1.0, 2e-3], 1e-4)
    assert (schema.names, schema.by_name) == (["007", "yes", "null", "a #1"], {"a": "1"})
    assert schema.options == {"steps": 4, "sizes": [1, 2], "preset": "a: b"}
    assert read_options(["first.gaussian=[1, 20]", "first.x=true", "a=2 # x", "b=1:30", "c=null", "d="]) == {
        "first": {"gaussian": [1, 20], "x": True},
        "a": "2 # x",
        "b": "1:30",
        "c": None,
        "d": "",
    }
    assert read("bound=${inner.number}").bound == 0.0, "interpolation of a number"


def test_numbers_are_decimal_and_texts_inside_lists_keep_their_spelling() -> None:
    schema = read("count=010", "numbers=[010, 0.5]", "options.sizes=[08, 010]", "inner={text: 007, number: 1e-4}")
    assert (schema.count, schema.numbers, schema.options) == (10, [10.0, 0.5], {"sizes": [8, 10]})
    assert schema.inner == Inner(text="007", number=1e-4)
    assert read("inners=[{text: yes}, {text: 'a #1'}]").inners == [Inner(text="yes"), Inner(text="a #1")]
    assert read_options(["steps=010", "x=1:30"]) == {"steps": 10, "x": "1:30"}
    for override in ("count=1:30", "bound=1:30", "numbers=[1:30]"):  # 90 in YAML 1.1
        with pytest.raises(OmegaConfBaseException, match="'1:30' of type 'str' could not be converted"):
            read(override)


def test_names_that_are_not_utf8_pass_through_yaml(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9")
    assert read(f"names=[{name}, b]", f"by_name={{a: {name}}}").names == [name, "b"]
    spec = load_corpus_spec(_folder_spec(tmp_path), [f"sources.0.path=/{name}", f"dedup.against=[/{name}/c]"])
    (tmp_path / "saved.yaml").write_text(yaml_text(asdict(spec)), encoding="utf-8")
    assert load_corpus_spec(tmp_path / "saved.yaml") == spec
    assert (spec.sources[0].path, spec.dedup.against) == (f"/{name}", [f"/{name}/c"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("names=[a: b]", "names.0 needs one text"),
        ("names=a", "names needs a list, as in"),
        ("by_name=[1]", "by_name needs names and values"),
        ("options=[1]", "options needs names and values"),
        ("inner=3", "inner needs names and values"),
        ("inners.text=x", "inners is a list; name an entry by its number"),
        ("inners.-1.text=x", "inners is a list"),
        ("inners.5.text=x", "inners has 2 entries, counted from 0"),
        ("names.0=a", "names has 0 entries"),
        ("by_name.a.b=3", "by_name.a takes one value"),
        ("nonsense", "is not key=value"),
        ("=3", "is not key=value"),
        ("numbers=[1", "numbers cannot be read as YAML: '\\[1'"),
        ("names=[a #1]", "names cannot be read as YAML"),
        ("text=???", "marks a missing value"),
        ("count=???", "count cannot be .* marks a missing value"),
        ("numbers=[1, '???']", "numbers cannot be .* marks a missing value"),
        ("count=" + "9" * 400, "count is too large"),
        ("bound=-" + "9" * 400, "bound is too large"),
        ("bound=.nan", "bound must be a number, got nan"),
        ("numbers=[1, NaN]", "numbers.1 must be a number, got nan"),
        (f"numbers={ALIASES}", "numbers cannot be read as YAML"),
    ],
)
def test_a_wrong_form_is_named(override: str, message: str) -> None:
    with pytest.raises(OverrideError, match=message):
        read(override)
    if not override.startswith("text"):
        with pytest.raises(RecipeError, match=r"swinir-nano\.yaml"):
            load_recipe("swinir-nano", [override])


def test_aliases_have_no_meaning_in_options() -> None:
    text = "- &a [x]\n- *a"
    assert read_options([f"view={text}", "mode=!!null x"]) == {"view": text, "mode": "!!null x"}
    with pytest.raises(OverrideError, match="view cannot be read as YAML"):
        read_options([f"view={ALIASES}"])


def test_a_document_holds_no_nan_and_no_endless_number(tmp_path: Path) -> None:
    for document, message in (({"inner": {"number": float("nan")}}, "inner.number"), ({"bound": 10**400}, "too large")):
        with pytest.raises(OverrideError, match=message):
            apply_overrides(Schema, document, [])
    for override in ("optimizer.lr=inf", "sources.corpus=.inf"):
        with pytest.raises(RecipeError, match="finite"):
            load_recipe("swinir-nano", [override])


def test_recipes_and_specs_name_wrong_keys_as_before(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="Did you mean: 'steps'"):
        load_recipe("swinir-nano", ["stps=3"])
    with pytest.raises(RecipeError, match=r"Integer \(steps\)"):
        load_recipe("swinir-nano", ["steps=many"])
    with pytest.raises(ValueError, match="Did you mean: 'path'"):
        load_corpus_spec(_folder_spec(tmp_path), ["sources.0.pth=x"])
    (tmp_path / "broken.yaml").write_text("name: [a\n")
    with pytest.raises(ValueError, match=r"broken\.yaml"):
        load_corpus_spec(tmp_path / "broken.yaml")
    with pytest.raises(RecipeError, match=r"broken\.yaml cannot be read"):
        load_recipe(tmp_path / "broken.yaml")
    (tmp_path / "list.yaml").write_text("system: swinir\nstage: restorer\nsources: [a]\n")
    with pytest.raises(RecipeError, match=r"list\.yaml: sources has a list where names and values belong"):
        load_recipe(tmp_path / "list.yaml")


def test_a_spec_without_changes_keeps_its_defaults(tmp_path: Path) -> None:
    spec = load_corpus_spec(_folder_spec(tmp_path), ["filters.scores.blur.min=0.5", "sources.0.count=2"])
    assert isinstance(spec, CorpusSpec)
    assert (spec.filters.scores["blur"].min, spec.sources[0].count, spec.sources[0].kind) == (0.5, 2, "folder")
