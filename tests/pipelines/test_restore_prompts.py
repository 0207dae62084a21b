"""What a restoring job tells its model of each picture: a file's prompts, a captioner's words, the job's own."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from components.captions.presets import build_captioner
from components.captions.tags import describe
from components.corpora import CaptionSpec
from components.images import encode_png, read_png_text
from components.models import load_model
from components.options import typed_options
from components.recipes import Recipe
from components.restoring import MAX_PROMPT_CHARS, Identity
from components.synthetic import dead_leaves
from components.systems import SYSTEMS, System
from components.systems import build_restorer as restorer_of
from components.types import Image, Request, Restored
from pipelines import cli
from pipelines.errors import Failure, UsageError
from pipelines.restore import RestoreResult, list_pictures, restore_folder
from pipelines.restore_prompts import CaptionWish, PictureCaptioner, caption_wish, read_prompts
from pipelines.rows import read_lines

TAGS = CaptionSpec(model="tags")
FRAME = "the face of {caption}, 3D model"
PLAIN = Identity(name="hearing", system="hearing", recipe="r", digest="0" * 64)


def by_path(path: Path) -> ModuleType:
    name = f"restoray_prompts_{path.stem}"  # known by it, so that Ray's pickler can look it up
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


HERE = Path(__file__).parent
helper = by_path(HERE / "_tiny.py")


class Hearing:
    """A restorer that gives a picture back and says what it was told."""

    def restore(self, requests: Sequence[Request], on_step: Any = None, cancelled: Any = None) -> list[Restored]:
        return [Restored(key=r.key, image=r.image.copy(), info={"heard": r.prompt}) for r in requests]


def never(*_: Any) -> Any:
    raise AssertionError("nobody should be asked")


@pytest.fixture(autouse=True)
def hearing_system(monkeypatch: pytest.MonkeyPatch) -> None:
    def check(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
        return typed_options(given, {"strength": float})

    system = System(recipe=Recipe, stages={}, build_objective=never, check_options=check)
    monkeypatch.setitem(SYSTEMS, "tiny", system)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = helper.write_model(tmp_path_factory.mktemp("model") / "tiny")
    return folder


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    for number, name in enumerate(("a", "b", "c", "sub/d")):
        (folder / f"{name}.png").write_bytes(encode_png(dead_leaves(40, 1, number)))
    return folder


def run(model: Path, src: Path, out: Path, factory: Any = Hearing, **settings: Any) -> RestoreResult:
    return restore_folder(model, src, out, factory=factory, on_ray=False, **settings)


def read(path: Path, text: str, src: Path, frame: str = "") -> dict[str, str]:
    path.write_text(text, encoding="utf-8")
    return read_prompts(path, list_pictures(src)[0], src, frame)


def records(out: Path) -> dict[str, dict[str, Any]]:
    return {row["key"]: row for row in read_lines(out / "records.jsonl")}


def heard(out: Path) -> dict[str, str]:
    return {path.stem: read_png_text(path.read_bytes())["heard"] for path in sorted(out.glob("*.png"))}


# --- the file ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.jsonl", '{"key": "a", "prompt": "a red, old \\"fox\\""}\n\n{"file_name": "sub/d.png", "prompt": "two"}'),
        (
            "p.jsonl",
            '{"key": "a", "caption": "a red, old\\n \\"fox\\"", "seed": 1}\n{"key": "sub__d", "text": "two"}\n',
        ),
        ("p.csv", '\ufeffa.png,"a red, old ""fox"""\r\nd.png,two\r\n'),
        ("p.CSV", 'width,caption,file_name\n40,"a red, old ""fox""",a.png\n40,two,sub/d.png\n'),
    ],
)
def test_prompts_are_read_by_key_or_file_name(name: str, text: str, pictures: Path, tmp_path: Path) -> None:
    assert read(tmp_path / name, text, pictures) == {"a": 'a red, old "fox"', "sub__d": "two"}


def test_captions_go_into_the_models_frame_and_prompts_do_not(pictures: Path, tmp_path: Path) -> None:
    text = '{"key": "a", "caption": "a woman"}\n{"key": "b", "prompt": "a man"}\n'
    assert read(tmp_path / "p.jsonl", text, pictures, FRAME) == {"a": "the face of a woman, 3D model", "b": "a man"}
    with pytest.raises(UsageError, match=r'line 1: the model was told "at night" of every picture'):
        read(tmp_path / "p.jsonl", text, pictures, "at night")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.jsonl", '{"key": "z", "prompt": "x"}\n{"key": "a", "prompt": "x"}', r"not in .*in: z \(line 1\)"),
        ("p.jsonl", "".join(f'{{"key": "z{n}", "prompt": "x"}}\n' for n in range(8)), r"z4 \(line 5\) and 3 more"),
        (
            "p.jsonl",
            '{"key": "a", "prompt": "x"}\n{"file_name": "a.png", "prompt": "x"}',
            "line 2: a.png has .* line 1",
        ),
        ("p.jsonl", '{"key": "a", "prompt": "x"}\n{"key": "b", "prom', "line 2: no JSON"),
        ("p.jsonl", '["a", "x"]', "line 1: no JSON object"),
        ("p.jsonl", '{"prompt": "x"}', "line 1: needs one of key, file_name, and has none"),
        ("p.jsonl", '{"key": "a"}', "line 1: needs one of prompt, caption, text, and has none"),
        ("p.jsonl", '{"key": "a", "prompt": "x", "text": "y"}', "line 1: .*and has prompt and text"),
        ("p.jsonl", '{"key": 1, "prompt": "x"}', "line 1: key must be text"),
        ("p.jsonl", '{"key": "a", "prompt": 1}', "line 1: prompt must be text"),
        ("p.jsonl", '{"key": "a", "prompt": " "}', "line 1: the prompt of a is empty"),
        ("p.jsonl", '{"key": "a", "caption": "\\u0000"}', "line 1: caption holds control characters"),
        ("p.jsonl", json.dumps({"key": "a", "prompt": "x" * 2001}), "line 1: prompt has 2001 characters"),
        ("p.jsonl", "\n", "holds no prompts"),
        ("p.csv", "a,x\nb,y,z\n", "line 2: 3 columns where there should be 2"),
        ("p.csv", 'a,x\nb,"y\n', "line 2: "),
        ("p.csv", "a,x\nb,\n", "line 2: the prompt of b is empty"),
        ("p.tsv", "a\tx\n", 'unknown kind of prompts file ".tsv"'),
    ],
)
def test_lines_that_cannot_be_meant_are_named(
    name: str, text: str, message: str, pictures: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        read(tmp_path / name, text, pictures)


def test_a_file_name_of_several_pictures_is_refused(pictures: Path, tmp_path: Path) -> None:
    (pictures / "more").mkdir()
    (pictures / "more" / "d.png").write_bytes(encode_png(dead_leaves(40, 1, 7)))
    (pictures / "more" / "b.png").write_bytes(encode_png(dead_leaves(40, 1, 8)))
    with pytest.raises(UsageError, match=r"line 1: d.png may be any of more__d, sub__d"):
        read(tmp_path / "p.csv", "d.png,x\n", pictures)
    assert read(tmp_path / "p.csv", "b.png,x\nmore/d.png,y\n", pictures) == {"b": "x", "more__d": "y"}
    assert read(tmp_path / "p.csv", "a.png,x\n", pictures / "a.png") == {"a": "x"}
    with pytest.raises(UsageError, match="cannot be read"):
        read_prompts(tmp_path / "absent.csv", list_pictures(pictures)[0], pictures)
    (tmp_path / "p.csv").write_bytes(b"a,\xff\n")
    with pytest.raises(UsageError, match="no UTF-8"):
        read_prompts(tmp_path / "p.csv", list_pictures(pictures)[0], pictures)


# --- the job ----------------------------------------------------------------------------------------------------------


def test_each_picture_is_told_its_own_prompt_and_the_rest_the_jobs(model: Path, pictures: Path, tmp_path: Path) -> None:
    out, told = tmp_path / "out", {"a": "a fox", "sub__d": "a lake"}
    result = run(model, pictures, out, options={"prompt": "a photo"}, prompts=told, batch_size=4)
    assert (result.restored, result.unprompted) == (4, 2)
    expected = {"a": "a fox", "b": "a photo", "c": "a photo", "sub__d": "a lake"}
    assert heard(out) == {key: row["prompt"] for key, row in records(out).items()} == expected
    texts = {key: json.loads(read_png_text((out / f"{key}.png").read_bytes())["options"]) for key in expected}
    assert {key: options["prompt"] for key, options in texts.items()} == expected
    # the bytes are those of a job that tells all pictures this prompt
    run(model, pictures, tmp_path / "fox", options={"prompt": "a fox"})
    assert (tmp_path / "fox" / "a.png").read_bytes() == (out / "a.png").read_bytes()
    with pytest.raises(UsageError, match="has the key of a prompt: z"):
        run(model, pictures, out, prompts={"z": "x"})


def test_a_changed_prompt_restores_its_picture_again_and_no_other(model: Path, pictures: Path, tmp_path: Path) -> None:
    out, told = tmp_path / "out", {"a": "a fox", "b": "a lake"}
    run(model, pictures, out, prompts=told)
    assert run(model, pictures, out, prompts=told, factory=never).skipped == 4
    result = run(model, pictures, out, prompts={**told, "b": "a pond"})
    assert (result.restored, result.skipped, heard(out)["b"]) == (1, 3, "a pond")
    result = run(model, pictures, out, prompts={"b": "a pond"})  # the line of a is gone
    assert (result.restored, result.skipped, heard(out)["a"]) == (1, 3, "")
    assert "prompt" not in records(out)["a"]


def test_records_of_a_job_are_prompts_of_the_next(model: Path, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(model, pictures, out, captioner=caption_wish(TAGS, "auto", PLAIN))
    told = read_prompts(out / "records.jsonl", list_pictures(pictures)[0], pictures)
    assert run(model, pictures, out, prompts=told, factory=never).skipped == 4


def test_a_captioner_writes_what_is_missing(model: Path, pictures: Path, tmp_path: Path) -> None:
    out, wish = tmp_path / "out", caption_wish(TAGS, "auto", PLAIN)
    run(model, pictures, out, options={"prompt": "a photo"}, prompts={"c": "a fox"}, captioner=wish, batch_size=3)
    expected = {name: describe(dead_leaves(40, 1, n)) for n, name in enumerate(("a", "b", "c", "sub__d"))}
    expected["c"] = "a fox"
    assert heard(out) == expected == {key: row["prompt"] for key, row in records(out).items()}
    assert records(out)["a"]["captioner"] == {**wish.identity(), "saw": "lq"}
    assert "captioner" not in records(out)["c"]


def test_what_was_captioned_is_not_captioned_again(
    model: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, wish = tmp_path / "out", caption_wish(TAGS, "auto", PLAIN)
    run(model, pictures, out, captioner=wish)
    with monkeypatch.context() as patched:
        patched.setattr("pipelines.restore_prompts.open_captioner", never)
        assert run(model, pictures, out, captioner=wish, factory=never).skipped == 4
    (pictures / "b.png").write_bytes(encode_png(dead_leaves(40, 2, 5)))
    result = run(model, pictures, out, captioner=wish)
    assert (result.restored, records(out)["b"]["prompt"]) == (1, describe(dead_leaves(40, 2, 5)))
    # another view, another captioner, and none
    assert run(model, pictures, out, captioner=caption_wish(TAGS, "lq", PLAIN)).restored == 4
    other = caption_wish(TAGS, "lq", PLAIN)
    object.__setattr__(other.plan, "identity", {**other.plan.identity, "digest": "1" * 64})
    assert run(model, pictures, out, captioner=other).restored == 4
    assert run(model, pictures, out).restored == 4 and not any(heard(out).values())


def test_a_captioner_that_fails_quarantines_its_picture(
    model: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, wish = tmp_path / "out", caption_wish(TAGS, "auto", PLAIN)
    run(model, pictures, out)
    before = {key: (out / f"{key}.png").read_bytes() for key in "bc"}
    broken, silent = dead_leaves(40, 2, 1), dead_leaves(40, 2, 2)
    (pictures / "b.png").write_bytes(encode_png(broken))
    (pictures / "c.png").write_bytes(encode_png(silent))

    def caption(image: Image) -> str:
        if np.array_equal(image, broken):
            raise ValueError("no words")
        return "" if np.array_equal(image, silent) else describe(image)

    monkeypatch.setattr("components.captions.tags.describe", caption)
    result = run(model, pictures, out, captioner=wish, batch_size=4)
    assert (result.restored, result.quarantined) == (2, 2)
    reasons = {row["key"]: (row["code"], row["detail"]) for row in read_lines(out / "quarantine.jsonl")}
    assert reasons["b"] == ("failed", "the captioner: no words")
    assert reasons["c"] == ("empty_caption", "the captioner said nothing about it")
    assert {key: (out / f"{key}.png").read_bytes() for key in "bc"} == before  # that says nothing of the new pictures
    monkeypatch.undo()
    assert run(model, pictures, out, captioner=wish, factory=Hearing).restored == 2


def test_a_captioner_that_cannot_work_ends_the_job(
    model: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wish = caption_wish(TAGS, "auto", PLAIN)
    monkeypatch.setattr("components.captions.tags.describe", never)
    with pytest.raises(Failure, match="nothing can be restored: the captioner: AssertionError: nobody should be asked"):
        run(model, pictures, tmp_path / "out", captioner=wish)
    monkeypatch.setattr("pipelines.restore_prompts.open_captioner", never)
    with pytest.raises(Failure, match="the captioner tags cannot be loaded: AssertionError"):
        run(model, pictures, tmp_path / "out", captioner=wish)
    told = {**dict.fromkeys("abc", "a fox"), "sub__d": "a lake"}  # nobody needs to be asked
    assert run(model, pictures, tmp_path / "out", captioner=wish, prompts=told).restored == 4


def test_a_wish_that_cannot_be_granted_is_refused() -> None:
    with pytest.raises(UsageError, match=r"unknown captioner 'blpi'.*Did you mean \"blip\""):
        caption_wish(CaptionSpec(model="blpi"), "auto", PLAIN)
    with pytest.raises(UsageError, match='unknown caption view "coarse"'):
        caption_wish(TAGS, "coarse", PLAIN)
    with pytest.raises(UsageError, match='told "at night" of every picture'):
        caption_wish(TAGS, "auto", Identity(name="m", system="tiny", recipe="r", digest="0", frame="at night"))


def test_captions_are_framed_and_cut_to_what_a_prompt_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    wish = caption_wish(TAGS, "auto", Identity(name="m", system="tiny", recipe="r", digest="0", frame=FRAME))
    captioner = PictureCaptioner(wish)
    request = Request(key="a", image=dead_leaves(40, 1, 0))
    assert captioner.prompt(Hearing(), request) == (FRAME.replace("{caption}", describe(request.image)), "lq")
    monkeypatch.setattr("components.captions.tags.describe", lambda image: "word " * 1000)
    prompt, _ = captioner.prompt(Hearing(), request)
    assert prompt.startswith("the face of word word") and prompt.endswith("word, 3D model")
    assert MAX_PROMPT_CHARS - 20 < len(prompt) <= MAX_PROMPT_CHARS


def test_a_model_of_transformers_captions_in_the_worker(model: Path, pictures: Path, tmp_path: Path) -> None:
    """BLIP, as the paper does; random weights may say nothing about a picture."""
    folder = by_path(HERE.parent / "components" / "_captioners.py").save_blip(tmp_path / "blip")
    spec = CaptionSpec(model=str(folder), max_tokens=6)
    captioner = build_captioner(str(folder), max_tokens=6)
    expected = {name: captioner.caption([dead_leaves(40, 1, n)])[0] for n, name in enumerate(("a", "b", "c", "sub__d"))}
    assert any(expected.values())
    result = run(model, pictures, tmp_path / "out", captioner=caption_wish(spec, "auto", PLAIN), batch_size=4)
    assert heard(tmp_path / "out") == {key: caption for key, caption in expected.items() if caption}
    assert result.quarantined == list(expected.values()).count("")


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_on_ray_the_words_are_the_same(model: Path, pictures: Path, tmp_path: Path) -> None:
    wish = caption_wish(TAGS, "auto", PLAIN)
    build = functools.partial(_register().build_tiny, model)
    for out, where in (("here", False), ("there", True)):
        restore_folder(
            model, pictures, tmp_path / out, factory=build, on_ray=where, prompts={"a": "a fox"}, captioner=wish
        )
    here, there = (records(tmp_path / out) for out in ("here", "there"))
    assert {key: (row["prompt"], row.get("captioner"), row["output_sha256"]) for key, row in here.items()} == {
        key: (row["prompt"], row.get("captioner"), row["output_sha256"]) for key, row in there.items()
    }


def _register() -> ModuleType:
    """The helper, picklable by value so that Ray's workers need not import it."""
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(helper)
    return helper


# --- InstaRevive, whose coarse restoration is captioned ---------------------------------------------------------------


@pytest.fixture(scope="module")
def revive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained InstaRevive on the nano prior behind a tiny SwinIR."""
    trainings = by_path(HERE.parent / "components" / "test_instarevive_training.py")
    folder = tmp_path_factory.mktemp("revive")
    coarse = trainings.coarse_model(folder / "coarse")
    recipe = trainings.recipe(coarse=str(coarse.path), prompt=FRAME)
    saved: Path = trainings.saved(trainings.build_objective(recipe, {}), recipe, folder / "model").path
    return saved


def test_the_models_own_coarse_restoration_is_captioned(revive: Path, tmp_path: Path) -> None:
    folder, image = tmp_path / "in", dead_leaves(40, 1, 0)[:, :36]
    folder.mkdir()
    (folder / "a.png").write_bytes(encode_png(image))
    model = Identity(name="m", system="instarevive", recipe="r", digest=load_model(revive).digest, frame=FRAME)
    coarse = SYSTEMS["instarevive"].views["coarse"]
    made = type(coarse)(model=str(revive.parent / "coarse"))(hq=None, lq=image, preview=None)  # type: ignore[call-arg]
    assert not np.array_equal(made, image)
    assert np.array_equal(restorer_of(revive).preview(Request(key="a", image=image)), made)  # type: ignore[attr-defined]

    seen: list[Image] = []
    wish = caption_wish(TAGS, "auto", model)
    looking = SimpleNamespace(caption=lambda images: seen.extend(images) or ["a woman"])
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("pipelines.restore_prompts.open_captioner", lambda *_: looking)
        restore_folder(revive, folder, tmp_path / "out", on_ray=False, captioner=wish)
        assert np.array_equal(seen.pop(), made)
        row = records(tmp_path / "out")["a"]
        assert (row["prompt"], row["captioner"]["saw"]) == ("the face of a woman, 3D model", "coarse")
        said = json.loads(read_png_text((tmp_path / "out" / "a.png").read_bytes())["options"])
        assert said == {"prompt": "the face of a woman, 3D model"}
        # without the coarse restorer the picture itself is looked at, unless the coarse one was asked for
        restore_folder(revive, folder, tmp_path / "out", {"coarse": False}, on_ray=False, captioner=wish)
        assert np.array_equal(seen.pop(), image) and records(tmp_path / "out")["a"]["captioner"]["saw"] == "lq"
        strict = caption_wish(TAGS, "coarse", model)
        with pytest.raises(UsageError, match="nothing can be restored: there is no coarse restoration to caption"):
            restore_folder(revive, folder, tmp_path / "out", {"coarse": False}, on_ray=False, captioner=strict)
    with pytest.raises(UsageError, match="text=photo tells the network one prompt of all pictures"):
        restore_folder(revive, folder, tmp_path / "out", {"text": "photo"}, on_ray=False, prompts={"a": "a fox"})


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompts", "absent.jsonl"], "absent.jsonl cannot be read"),
        (["--prompts", "p.csv"], r"line 2: a has a prompt already, in line 1"),
        (["--captioner", "blpi"], 'Did you mean "blip"'),
        (["--captioner", "tags", "--caption-view", "coarsse"], 'Did you mean "coarse"'),
        (["--captioner", "tags", "--caption-view", "hq"], 'unknown caption view "hq"'),
        (["--caption-view", "lq"], "--caption-view needs --captioner"),
    ],
)
def test_a_wrong_command_is_exit_2_before_ray_starts(
    words: list[str], message: str, revive: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.csv").write_text("a,x\na,y\n")
    monkeypatch.setattr("pipelines.cluster.local_ray", never)
    with pytest.raises(UsageError, match=message) as caught:
        cli.app(["restore", str(pictures), "--model", str(revive), "-o", "x", *words], standalone_mode=False)
    assert caught.value.exit_code == 2 and not (tmp_path / "x").exists()


def test_the_command_hands_prompts_and_captioner_on(
    revive: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given: dict[str, Any] = {}

    def restore(model: Path, src: Path, out: Path, **settings: Any) -> RestoreResult:
        given.update(settings)
        return restore_folder(model, src, out, **{**settings, "factory": Hearing, "on_ray": False})

    monkeypatch.setattr("pipelines.restore.restore_folder", restore)
    (tmp_path / "p.jsonl").write_text('{"key": "a", "caption": "a woman"}\n')
    words = ["restore", str(pictures), "--model", str(revive), "-o", str(tmp_path / "out")]
    words += ["--prompts", str(tmp_path / "p.jsonl"), "--captioner", "tags", "--caption-view", "lq"]
    monkeypatch.setattr("pipelines.cluster.local_ray", contextlib.nullcontext)
    assert cli.app(words, standalone_mode=False) == 0
    assert given["prompts"] == {"a": "the face of a woman, 3D model"}
    assert isinstance(given["captioner"], CaptionWish) and given["captioner"].identity()["view"] == "lq"
    assert "3 of 4 pictures have no line in" in capsys.readouterr().out
    assert heard(tmp_path / "out")["b"] == FRAME.replace("{caption}", describe(dead_leaves(40, 1, 1)))
