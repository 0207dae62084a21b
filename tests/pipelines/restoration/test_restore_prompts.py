"""Prompts of a restoration job: from a prompts file, from a captioner, or from the job."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
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
from components.systems import SYSTEMS
from components.systems import build_restorer as restorer_of
from components.systems.system import Networks, System
from components.types import Image, Request, Restored, Restorer
from pipelines.commands import main as cli
from pipelines.core.errors import Failure, UsageError
from pipelines.core.pictures import list_pictures
from pipelines.core.pool import Pool
from pipelines.core.rows import read_lines
from pipelines.restoration.batch import RestoreJob, RestoreResult, restore_folder
from pipelines.restoration.models import OpenedModel
from pipelines.restoration.prompts import PictureCaptioner, job_captioner, read_prompts

TAGS = CaptionSpec(model="tags")
FRAME = "the face of {caption}, 3D model"
PLAIN = Identity(name="echo", system="echo", recipe="r", digest="0" * 64)


def by_path(path: Path) -> ModuleType:
    name = f"restoray_prompts_{path.stem}"  # Ray's pickler looks the module up by this name
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


HERE = Path(__file__).parents[1]
helper = by_path(HERE / "_tiny.py")


class Echo(Restorer):
    """A restorer that returns the picture, with the request's prompt in its info."""

    def restore(self, requests: Sequence[Request], on_step: Any = None, cancelled: Any = None) -> list[Restored]:
        return [Restored(key=r.key, image=r.image.copy(), info={"prompt": r.prompt}) for r in requests]


def never(*_: Any) -> Any:
    raise AssertionError("unexpected call")


@pytest.fixture(autouse=True)
def echo_system(monkeypatch: pytest.MonkeyPatch) -> None:
    def check(options: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
        return typed_options(options, {"strength": float})

    system = System(recipe=Recipe, stages=(), networks=Networks, check_options=check)
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


def run(model: Path, src: Path, out: Path, factory: Any = Echo, **settings: Any) -> RestoreResult:
    result: RestoreResult = helper.run_job(model, src, out, factory=factory, **settings)
    return result


def read(path: Path, text: str, src: Path, frame: str = "") -> dict[str, str]:
    path.write_text(text, encoding="utf-8")
    return read_prompts(path, list_pictures(src)[0], src, frame)


def records(out: Path) -> dict[str, dict[str, Any]]:
    return {row["key"]: row for row in read_lines(out / "records.jsonl")}


def prompts_used(out: Path) -> dict[str, str]:
    keys = {path.relative_to(out).with_suffix("").as_posix(): path for path in sorted(out.rglob("*.png"))}
    return {key: read_png_text(path.read_bytes())["prompt"] for key, path in keys.items()}


# --- the file ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.jsonl", '{"key": "a", "prompt": "a red, old \\"fox\\""}\n\n{"file_name": "sub/d.png", "prompt": "two"}'),
        (
            "p.jsonl",
            '{"key": "a", "caption": "a red, old\\n \\"fox\\"", "seed": 1}\n{"key": "sub/d", "text": "two"}\n',
        ),
        ("p.csv", '\ufeffa.png,"a red, old ""fox"""\r\nd.png,two\r\n'),
        (
            "p.jsonl",
            '{"key": "a", "prompt": "a red, old \\"fox\\""}\n{"file_name": ".\\\\sub\\\\d.png", "prompt": "two"}',
        ),
        ("p.csv", '"file_name","prompt"\n./a.png,"a red, old ""fox"""\nsub\\d.png,two\n'),
        ("p.CSV", 'width,caption,file_name\n40,"a red, old ""fox""",a.png\n40,two,sub/d.png\n'),
    ],
)
def test_a_prompts_file_has_keys_or_file_names(name: str, text: str, pictures: Path, tmp_path: Path) -> None:
    assert read(tmp_path / name, text, pictures) == {"a": 'a red, old "fox"', "sub/d": "two"}


def test_line_breaks_of_windows_are_line_breaks(pictures: Path, tmp_path: Path) -> None:
    text = '{"key": "a", "prompt": "one\\r\\ntwo"}\r\n'
    assert read(tmp_path / "p.jsonl", text, pictures) == {"a": "one\ntwo"}


def test_captions_are_put_into_the_models_frame_and_prompts_are_not(pictures: Path, tmp_path: Path) -> None:
    text = '{"key": "a", "caption": "a woman"}\n{"key": "b", "prompt": "a man"}\n'
    assert read(tmp_path / "p.jsonl", text, pictures, FRAME) == {"a": "the face of a woman, 3D model", "b": "a man"}
    with pytest.raises(UsageError, match=r'line 1: the model was trained with the prompt "at night"'):
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
def test_the_error_of_a_wrong_line_has_its_number(
    name: str, text: str, message: str, pictures: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        read(tmp_path / name, text, pictures)


@pytest.mark.parametrize(
    ("files", "name", "text"),
    [
        (
            ["\u0646\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645.png"],
            0,
            "\u0646\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",
        ),
        (["\u200eabc.png"], 0, "\u200eabc"),  # a mark of the writing direction
        (["sub/x:y.png", "sub/x_y.png"], 0, "sub/x:y"),
        (["Photo.png", "photo.png"], 1, "photo"),
    ],
)
def test_a_name_without_its_suffix_names_a_picture_of_another_key(
    files: list[str], name: int, text: str, tmp_path: Path
) -> None:
    folder = tmp_path / "pictures"
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(encode_png(dead_leaves(16, 0, 0)))
    sources, _ = list_pictures(folder)
    lines = tmp_path / "prompts.jsonl"
    lines.write_text(json.dumps({"key": text, "prompt": "a cat"}))
    (key,) = read_prompts(lines, sources, folder)
    assert sources[key] == folder / files[name] and key != text
    if len(files) > 1:
        (folder / files[name]).with_suffix(".jpg").write_bytes(encode_png(dead_leaves(16, 0, 0)))
        with pytest.raises(UsageError, match="may be any of"):
            read_prompts(lines, list_pictures(folder)[0], folder)


def test_a_file_name_of_several_pictures_is_refused(pictures: Path, tmp_path: Path) -> None:
    (pictures / "more").mkdir()
    (pictures / "more" / "d.png").write_bytes(encode_png(dead_leaves(40, 1, 7)))
    (pictures / "more" / "b.png").write_bytes(encode_png(dead_leaves(40, 1, 8)))
    with pytest.raises(UsageError, match=r"line 1: d.png may be any of more/d, sub/d"):
        read(tmp_path / "p.csv", "d.png,x\n", pictures)
    assert read(tmp_path / "p.csv", "b.png,x\nmore/d.png,y\n", pictures) == {"b": "x", "more/d": "y"}
    assert read(tmp_path / "p.csv", "a.png,x\n", pictures / "a.png") == {"a": "x"}
    with pytest.raises(UsageError, match="cannot be read"):
        read_prompts(tmp_path / "absent.csv", list_pictures(pictures)[0], pictures)
    (tmp_path / "p.csv").write_bytes(b"a,\xff\n")
    with pytest.raises(UsageError, match="not UTF-8"):
        read_prompts(tmp_path / "p.csv", list_pictures(pictures)[0], pictures)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "cp1252", "utf-16"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_a_table_as_a_spreadsheet_saves_it(pictures: Path, tmp_path: Path, encoding: str, separator: str) -> None:
    lines = (("file_name", "prompt"), ("a.png", '"a café,\nat 5 € a “menu”"'), ("b.png", '"a dog; sleeping"'))
    table = "".join(f"{name}{separator}{text}\r\n" for name, text in lines)
    (tmp_path / "p.csv").write_bytes(table.encode(encoding))
    prompts = read_prompts(tmp_path / "p.csv", list_pictures(pictures)[0], pictures)
    assert prompts["b"] == "a dog; sleeping" and prompts["a"] == "a café,\nat 5 € a “menu”"


# --- the job ----------------------------------------------------------------------------------------------------------


def test_a_picture_without_its_own_prompt_gets_the_jobs_prompt(model: Path, pictures: Path, tmp_path: Path) -> None:
    out, prompts = tmp_path / "out", {"a": "a fox", "sub/d": "a lake"}
    result = run(model, pictures, out, options={"prompt": "a photo"}, prompts=prompts, batch_size=4)
    assert (result.restored, result.unprompted) == (4, 2)
    expected = {"a": "a fox", "b": "a photo", "c": "a photo", "sub/d": "a lake"}
    assert prompts_used(out) == {key: row["prompt"] for key, row in records(out).items()} == expected
    texts = {key: json.loads(read_png_text((out / f"{key}.png").read_bytes())["options"]) for key in expected}
    assert {key: options["prompt"] for key, options in texts.items()} == expected
    # the bytes equal those of a job with this prompt for all pictures
    run(model, pictures, tmp_path / "fox", options={"prompt": "a fox"})
    assert (tmp_path / "fox" / "a.png").read_bytes() == (out / "a.png").read_bytes()
    with pytest.raises(UsageError, match="has the key of a prompt: z"):
        run(model, pictures, out, prompts={"z": "x"})


def test_a_changed_prompt_restores_its_picture_again_and_no_other(model: Path, pictures: Path, tmp_path: Path) -> None:
    out, prompts = tmp_path / "out", {"a": "a fox", "b": "a lake"}
    run(model, pictures, out, prompts=prompts)
    assert run(model, pictures, out, prompts=prompts, factory=never).skipped == 4
    result = run(model, pictures, out, prompts={**prompts, "b": "a pond"})
    assert (result.restored, result.skipped, prompts_used(out)["b"]) == (1, 3, "a pond")
    result = run(model, pictures, out, prompts={"b": "a pond"})  # without the line of a
    assert (result.restored, result.skipped, prompts_used(out)["a"]) == (1, 3, "")
    assert "prompt" not in records(out)["a"]


def test_the_records_of_a_job_are_a_prompts_file_for_the_next(model: Path, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(model, pictures, out, captioner=job_captioner(TAGS, "auto", PLAIN))
    prompts = read_prompts(out / "records.jsonl", list_pictures(pictures)[0], pictures)
    assert run(model, pictures, out, prompts=prompts, factory=never).skipped == 4


def test_a_captioner_writes_missing_prompts(model: Path, pictures: Path, tmp_path: Path) -> None:
    out, captioner = tmp_path / "out", job_captioner(TAGS, "auto", PLAIN)
    run(model, pictures, out, options={"prompt": "a photo"}, prompts={"c": "a fox"}, captioner=captioner, batch_size=3)
    expected = {name: describe(dead_leaves(40, 1, n)) for n, name in enumerate(("a", "b", "c", "sub/d"))}
    expected["c"] = "a fox"
    assert prompts_used(out) == expected == {key: row["prompt"] for key, row in records(out).items()}
    assert records(out)["a"]["captioner"] == {**captioner.identity(), "saw": "lq"}
    assert "captioner" not in records(out)["c"]


def test_an_unchanged_picture_is_not_captioned_again(
    model: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, captioner = tmp_path / "out", job_captioner(TAGS, "auto", PLAIN)
    run(model, pictures, out, captioner=captioner)
    with monkeypatch.context() as patch:
        patch.setattr("pipelines.restoration.prompts.open_captioner", never)
        assert run(model, pictures, out, captioner=captioner, factory=never).skipped == 4
    (pictures / "b.png").write_bytes(encode_png(dead_leaves(40, 2, 5)))
    result = run(model, pictures, out, captioner=captioner)
    assert (result.restored, records(out)["b"]["prompt"]) == (1, describe(dead_leaves(40, 2, 5)))
    # another view, another captioner, and no captioner
    assert run(model, pictures, out, captioner=job_captioner(TAGS, "lq", PLAIN)).restored == 4
    other = job_captioner(TAGS, "lq", PLAIN)
    object.__setattr__(other.plan, "identity", {**other.plan.identity, "digest": "1" * 64})
    assert run(model, pictures, out, captioner=other).restored == 4
    assert run(model, pictures, out).restored == 4 and not any(prompts_used(out).values())


def test_a_captioner_that_fails_quarantines_its_picture(
    model: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, captioner = tmp_path / "out", job_captioner(TAGS, "auto", PLAIN)
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
    result = run(model, pictures, out, captioner=captioner, batch_size=4)
    assert (result.restored, result.quarantined) == (2, 2)
    reasons = {row["key"]: (row["code"], row["detail"]) for row in read_lines(out / "quarantine.jsonl")}
    assert reasons["b"] == ("failed", "the captioner: no words")
    assert reasons["c"] == ("empty_caption", "the captioner wrote no text about it")
    assert {key: (out / f"{key}.png").read_bytes() for key in "bc"} == before  # the old results stay
    monkeypatch.undo()
    assert run(model, pictures, out, captioner=captioner, factory=Echo).restored == 2


def test_a_captioner_that_always_fails_ends_the_job(
    model: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    captioner = job_captioner(TAGS, "auto", PLAIN)
    monkeypatch.setattr("components.captions.tags.describe", never)
    with pytest.raises(Failure, match="nothing can be restored: the captioner: AssertionError: unexpected call"):
        run(model, pictures, tmp_path / "out", captioner=captioner)
    monkeypatch.setattr("pipelines.restoration.prompts.open_captioner", never)
    with pytest.raises(Failure, match="the captioner tags cannot be loaded: AssertionError"):
        run(model, pictures, tmp_path / "out", captioner=captioner)
    prompts = {**dict.fromkeys("abc", "a fox"), "sub/d": "a lake"}  # no picture needs the captioner
    assert run(model, pictures, tmp_path / "out", captioner=captioner, prompts=prompts).restored == 4


def test_an_unknown_captioner_or_view_is_refused() -> None:
    with pytest.raises(UsageError, match=r"unknown captioner 'blpi'.*Did you mean \"blip\""):
        job_captioner(CaptionSpec(model="blpi"), "auto", PLAIN)
    with pytest.raises(UsageError, match='unknown caption view "coarse"'):
        job_captioner(TAGS, "coarse", PLAIN)
    with pytest.raises(UsageError, match='with the prompt "at night" for every picture'):
        job_captioner(TAGS, "auto", Identity(name="m", system="tiny", recipe="r", digest="0", frame="at night"))


def test_a_caption_is_cut_to_the_longest_prompt_with_the_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    job = job_captioner(TAGS, "auto", Identity(name="m", system="tiny", recipe="r", digest="0", frame=FRAME))
    captioner = PictureCaptioner(job)
    request = Request(key="a", image=dead_leaves(40, 1, 0))
    assert captioner.prompt(Echo(), request) == (FRAME.replace("{caption}", describe(request.image)), "lq")
    monkeypatch.setattr("components.captions.tags.describe", lambda image: "word " * 1000)
    prompt, _ = captioner.prompt(Echo(), request)
    assert prompt.startswith("the face of word word") and prompt.endswith("word, 3D model")
    assert MAX_PROMPT_CHARS - 20 < len(prompt) <= MAX_PROMPT_CHARS


def test_a_model_of_transformers_captions_in_the_worker(model: Path, pictures: Path, tmp_path: Path) -> None:
    """BLIP is the paper's captioner; with random weights it may write an empty caption."""
    folder = by_path(HERE.parent / "components" / "_captioners.py").save_blip(tmp_path / "blip")
    spec = CaptionSpec(model=str(folder), max_tokens=6)
    captioner = build_captioner(str(folder), max_tokens=6)
    expected = {name: captioner.caption([dead_leaves(40, 1, n)])[0] for n, name in enumerate(("a", "b", "c", "sub/d"))}
    assert any(expected.values())
    result = run(model, pictures, tmp_path / "out", captioner=job_captioner(spec, "auto", PLAIN), batch_size=4)
    assert prompts_used(tmp_path / "out") == {key: caption for key, caption in expected.items() if caption}
    assert result.quarantined == list(expected.values()).count("")


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_on_ray_the_prompts_are_the_same(model: Path, pictures: Path, tmp_path: Path) -> None:
    captioner = job_captioner(TAGS, "auto", PLAIN)
    build = functools.partial(_register().build_tiny, model)
    for out, workers in (("here", 0), ("there", 1)):
        job: dict[str, Any] = {"prompts": {"a": "a fox"}, "captioner": captioner}
        helper.run_job(model, pictures, tmp_path / out, factory=build, workers=workers, **job)
    here, there = (records(tmp_path / out) for out in ("here", "there"))
    assert {key: (row["prompt"], row.get("captioner"), row["output_sha256"]) for key, row in here.items()} == {
        key: (row["prompt"], row.get("captioner"), row["output_sha256"]) for key, row in there.items()
    }


def _register() -> ModuleType:
    """Return the helper, pickled by value so that Ray's workers need not import it."""
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(helper)
    return helper


# --- InstaRevive: the captioner gets the coarse restoration -----------------------------------------------------------


@pytest.fixture(scope="module")
def revive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained InstaRevive on the nano prior behind a tiny SwinIR."""
    trainings = by_path(HERE.parent / "components" / "test_instarevive_training.py")
    folder = tmp_path_factory.mktemp("revive")
    coarse = trainings.coarse_model(folder / "coarse")
    recipe = trainings.recipe(coarse=str(coarse.path), prompt=FRAME)
    path: Path = trainings.save_folder(trainings.build_objective(recipe, {}), recipe, folder / "model").path
    return path


def test_the_models_own_coarse_restoration_is_captioned(revive: Path, tmp_path: Path) -> None:
    folder, image = tmp_path / "in", dead_leaves(40, 1, 0)[:, :36]
    folder.mkdir()
    (folder / "a.png").write_bytes(encode_png(image))
    model = Identity(name="m", system="instarevive", recipe="r", digest=load_model(revive).digest, frame=FRAME)
    coarse = SYSTEMS["instarevive"].views["coarse"]
    preview = type(coarse)(model=str(revive.parent / "coarse"))(hq=None, lq=image, preview=None)  # type: ignore[call-arg]
    assert not np.array_equal(preview, image)
    assert np.array_equal(restorer_of(revive).preview(Request(key="a", image=image)), preview)  # type: ignore[attr-defined]

    inputs: list[Image] = []
    captioner = job_captioner(TAGS, "auto", model)
    recorder = SimpleNamespace(caption=lambda images: inputs.extend(images) or ["a woman"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipelines.restoration.prompts.open_captioner", lambda *_: recorder)
        helper.run_job(revive, folder, tmp_path / "out", captioner=captioner)
        assert np.array_equal(inputs.pop(), preview)
        row = records(tmp_path / "out")["a"]
        assert (row["prompt"], row["captioner"]["saw"]) == ("the face of a woman, 3D model", "coarse")
        options = json.loads(read_png_text((tmp_path / "out" / "a.png").read_bytes())["options"])
        assert options == {"prompt": "the face of a woman, 3D model"}
        # without the coarse restorer, "auto" takes the picture itself and "coarse" is an error
        helper.run_job(revive, folder, tmp_path / "out", {"coarse": False}, captioner=captioner)
        assert np.array_equal(inputs.pop(), image) and records(tmp_path / "out")["a"]["captioner"]["saw"] == "lq"
        strict = job_captioner(TAGS, "coarse", model)
        with pytest.raises(UsageError, match="nothing can be restored: there is no coarse restoration to caption"):
            helper.run_job(revive, folder, tmp_path / "out", {"coarse": False}, captioner=strict)
    with pytest.raises(UsageError, match="text=photo uses one fixed prompt for all pictures"):
        helper.run_job(revive, folder, tmp_path / "out", {"text": "photo"}, prompts={"a": "a fox"})


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
    for module in ("api.restoration", "core.pool", "core.cluster"):  # it is imported first
        monkeypatch.setattr(f"pipelines.{module}.running_ray", never)
    with pytest.raises(UsageError, match=message) as info:
        cli.build_app()(["restore", str(pictures), "--model", str(revive), "-o", "x", *words], standalone_mode=False)
    assert info.value.exit_code == 2 and not (tmp_path / "x").exists()


def test_the_command_passes_prompts_and_captioner_to_the_job(
    revive: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs: list[RestoreJob] = []

    def restore(model: OpenedModel, src: Path, out: Path, job: RestoreJob, pool: Pool, progress: Any) -> RestoreResult:
        jobs.append(job)
        return restore_folder(replace(model, factory=Echo), src, out, job, replace(pool, workers=0), progress)

    monkeypatch.setattr("pipelines.api.restoration.restore_folder", restore)
    (tmp_path / "p.jsonl").write_text('{"key": "a", "caption": "a woman"}\n')
    words = ["restore", str(pictures), "--model", str(revive), "-o", str(tmp_path / "out")]
    words += ["--prompts", str(tmp_path / "p.jsonl"), "--captioner", "tags", "--caption-view", "lq"]
    monkeypatch.setattr("pipelines.api.restoration.running_ray", contextlib.nullcontext)
    assert cli.build_app()(words, standalone_mode=False) == 0
    (job,) = jobs
    assert job.prompts == {"a": "the face of a woman, 3D model"}
    assert job.captioner is not None and job.captioner.identity()["view"] == "lq"
    assert "3 of 4 pictures have no line in" in capsys.readouterr().out
    assert prompts_used(tmp_path / "out")["b"] == FRAME.replace("{caption}", describe(dead_leaves(40, 1, 1)))
