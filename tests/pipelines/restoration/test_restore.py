"""The batch job that restores folders: equal bits everywhere, resume, quarantine, deaths of workers."""

from __future__ import annotations

import functools
import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helper_modules import load_helper_for_workers
from PIL import Image as Pillow
from PIL import PngImagePlugin

from components.images import ANY_SHAPE, decode, encode_png, read_png_text
from components.models import ModelCard, save_model
from components.places import SHIPPED_PRIORS
from components.restoring import Identity, Picture, file_key, parse_ask, picture_seed, restore_batch
from components.synthetic import dead_leaves
from components.systems import SYSTEMS
from components.types import Restorer, SampleError
from pipelines.core.errors import Failure, RetryLater, UsageError
from pipelines.core.pictures import list_pictures
from pipelines.core.rows import read_lines
from pipelines.corpus.shards import write_corpus
from pipelines.evaluation.degrade import degrade_folder
from pipelines.evaluation.heldout import prepare_heldout
from pipelines.restoration.models import open_model, option_check
from pipelines.service.front import Refusal, ServeLimits, read_parameters

IDENTITY = Identity(name="tiny", system="tiny", recipe="tiny-filter", digest="0" * 64)


tiny = load_helper_for_workers("pipelines/_tiny.py")


@pytest.fixture(autouse=True)
def tiny_system(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SYSTEMS, "tiny", tiny.SYSTEM)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Six good pictures of 48 px, a broken picture, and a list."""
    folder = tmp_path / "in"
    folder.mkdir()
    for index in range(6):
        (folder / f"p{index}.png").write_bytes(encode_png(dead_leaves(48, 1, index)))
    (folder / "torn.png").write_bytes(encode_png(dead_leaves(48, 1, 9))[:300])
    (folder / "list.csv").write_text("name\n")
    return folder


def run(model: Path, src: Path, out: Path, **settings):
    """Call restore_folder with the tiny system, in this process by default."""
    build = functools.partial(tiny.build_tiny, model, **settings.pop("build", {}))
    return tiny.run_job(model, src, out, **{"factory": build, **settings})


def outputs(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.glob("*.png"))}


def test_results_records_and_quarantine(model: Path, pictures: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    result = run(
        model, pictures, tmp_path / "out", seed=5, progress=lambda count, of=0, note="": calls.append((count, of))
    )
    assert (result.restored, result.quarantined, result.skipped, result.ignored) == (6, 1, 0, 1)
    assert calls[0] == (0, 7) and calls[-1] == (7, 7)
    rows = read_lines(result.records)
    assert [row["key"] for row in rows] == [f"p{index}" for index in range(6)]
    for row in rows:
        png = (result.folder / row["output"]).read_bytes()
        source = (pictures / f"{row['key']}.png").read_bytes()
        assert hashlib.sha256(png).hexdigest() == row["output_sha256"]
        assert hashlib.sha256(source).hexdigest() == row["source_sha256"]
        assert row["seed"] == picture_seed(5, row["key"])
        assert (row["width"], row["height"]) == (48, 48)
        text = read_png_text(png)
        assert text["recipe"] == "tiny-filter" and text["system"] == "tiny" and text["filter"] == "bilateral"
        assert text["model_digest"] == row["model_digest"] and text["seed"] == str(row["seed"])
        assert text["source_sha256"] == row["source_sha256"] and text["key"] == row["key"]
    (bad,) = read_lines(result.quarantine)
    assert (bad["key"], bad["stage"], bad["code"]) == ("torn", "restore", "truncated")
    assert bad["bytes_sha256"] == hashlib.sha256((pictures / "torn.png").read_bytes()).hexdigest()
    assert not list(result.folder.glob(".*tmp*"))


def test_a_reference_belongs_to_the_picture_of_its_name_and_changes_the_result(
    model: Path, pictures: Path, tmp_path: Path
) -> None:
    references, out = tmp_path / "hq", tmp_path / "out"
    references.mkdir()
    (references / "p1.png").write_bytes(encode_png(dead_leaves(96, 2, 0)))
    run(model, pictures, out)
    before = outputs(out)
    assert run(model, pictures, out, references=references).restored == 1
    after = outputs(out)
    assert [name for name in before if before[name] != after[name]] == ["p1.png"]
    digests = {row["key"]: row.get("reference_sha256") for row in read_lines(out / "records.jsonl")}
    assert digests["p1"] == hashlib.sha256((references / "p1.png").read_bytes()).hexdigest() and digests["p2"] is None
    assert run(model, pictures, out, references=references).skipped == 6
    (references / "p1.png").write_bytes(encode_png(dead_leaves(96, 2, 1)))
    assert run(model, pictures, out, references=references).restored == 1
    (references / "p1.png").rename(references / "other.png")
    with pytest.raises(UsageError, match=r"no picture in .*hq has the name of one"):
        run(model, pictures, out, references=references)


def test_a_broken_reference_is_named(model: Path, pictures: Path, tmp_path: Path) -> None:
    key, source = next(iter(list_pictures(pictures)[0].items()))
    (tmp_path / "refs").mkdir()
    (tmp_path / "refs" / f"{key}.png").symlink_to("/nowhere.png")
    (tmp_path / "refs" / "other.png").write_bytes(source.read_bytes())
    result = run(model, pictures, tmp_path / "out", references=tmp_path / "refs")
    row = next(row for row in read_lines(result.quarantine) if row["key"] == key)
    assert (row["code"], row["detail"]) == (
        "unreadable",
        f"of the reference {key}.png: cannot be read: a link that leads nowhere",
    )


def test_the_folder_of_another_command_is_refused(model: Path, pictures: Path, tmp_path: Path) -> None:
    degrade_folder(pictures, tmp_path / "out", "none")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.name != ".lock"}
    with pytest.raises(UsageError, match=r"records\.jsonl is not of an earlier job of this command"):
        run(model, pictures, tmp_path / "out")
    run(model, pictures, tmp_path / "restored")
    with pytest.raises(UsageError, match=r"records\.jsonl is not of an earlier job of this command"):
        degrade_folder(pictures, tmp_path / "restored", "none")
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.name != ".lock"}


def test_the_seed_decides_the_bits(model: Path, pictures: Path, tmp_path: Path) -> None:
    first, again, other = (tmp_path / name for name in ("a", "b", "c"))
    run(model, pictures, first, seed=5)
    run(model, pictures, again, seed=5, batch_size=3)
    run(model, pictures, other, seed=6)
    assert outputs(first) == outputs(again)
    assert all(outputs(first)[name] != outputs(other)[name] for name in outputs(first))


def test_seeds_by_key_replace_the_derived_seeds(model: Path, pictures: Path, tmp_path: Path) -> None:
    result = run(model, pictures, tmp_path / "out", seed=5, seeds={"p1": 77})
    seeds = {row["key"]: row["seed"] for row in read_lines(result.records)}
    assert seeds["p1"] == 77 and seeds["p2"] == picture_seed(5, "p2")


def test_a_second_run_restores_nothing_and_loads_no_model(model: Path, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(model, pictures, out)
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.png")}
    result = run(model, pictures, out, factory=functools.partial(tiny.build_never, model))
    assert (result.restored, result.skipped, result.quarantined) == (0, 6, 1)
    assert {path.name: path.stat().st_mtime_ns for path in out.glob("*.png")} == before
    assert len(read_lines(result.records)) == 6


def test_resume_restores_exactly_the_missing_and_wrong_results(model: Path, pictures: Path, tmp_path: Path) -> None:
    out, reference = tmp_path / "out", tmp_path / "reference"
    run(model, pictures, reference)
    run(model, pictures, out)
    (out / "p0.png").unlink()  # a missing result
    (out / "p1.png").write_bytes(b"half")  # a damaged result
    lines = (out / "records.jsonl").read_bytes().splitlines(keepends=True)
    others = b"".join(line for line in lines if b'"key": "p2"' not in line)
    (out / "records.jsonl").write_bytes(others + b'{"key": "p2", "sou')  # a kill while the record was written
    (out / ".p3.png.tmp-1").write_bytes(b"left over")
    result = run(model, pictures, out)
    assert (result.restored, result.skipped) == (3, 3)
    assert outputs(out) == outputs(reference)
    assert sorted(row["key"] for row in read_lines(result.records)) == [f"p{index}" for index in range(6)]
    assert not (out / ".p3.png.tmp-1").exists()


@pytest.mark.parametrize("change", ["source", "options", "model", "seed"])
def test_a_picture_with_changed_settings_is_not_skipped(
    change: str, model: Path, pictures: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run(model, pictures, out)
    before, settings = outputs(out), {}
    if change == "source":
        (pictures / "p0.png").write_bytes(encode_png(dead_leaves(48, 2, 0)))
    elif change == "options":
        settings = {"options": {"cfg_scale": 9.0}}
    elif change == "model":
        model = tiny.write_model(tmp_path / "other", strength=60.0)
    else:
        settings = {"seed": 1}
    result = run(model, pictures, out, **settings)
    expected = 1 if change == "source" else 6
    assert result.restored == expected and result.skipped == 6 - expected
    assert sum(before[name] != data for name, data in outputs(out).items()) == expected


def test_a_source_that_becomes_unreadable_loses_its_old_result(model: Path, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(model, pictures, out)
    (pictures / "p0.png").write_bytes(b"<html>gone</html>")
    result = run(model, pictures, out)
    assert not (out / "p0.png").exists()
    assert {row["key"]: row["code"] for row in read_lines(result.quarantine)} == {
        "p0": "not_image",
        "torn": "truncated",
    }
    assert "p0" not in {row["key"] for row in read_lines(result.records)}


def test_metadata_of_the_input_is_not_copied(model: Path, tmp_path: Path) -> None:
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("comment", "secret place")
    target = io.BytesIO()
    Pillow.fromarray(dead_leaves(32, 0, 0)).save(
        target, "PNG", pnginfo=chunks, exif=b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00\x00"
    )
    (tmp_path / "a.png").write_bytes(target.getvalue())
    result = run(model, tmp_path / "a.png", tmp_path / "out")
    png = (result.folder / "a.png").read_bytes()
    assert b"secret" not in png and b"eXIf" not in png


def test_options_reach_the_restorer_and_a_typo_ends_the_job(model: Path, pictures: Path, tmp_path: Path) -> None:
    result = run(model, pictures, tmp_path / "out", options={"width": 32, "height": 64, "steps": 2})
    png = (result.folder / "p0.png").read_bytes()
    assert decode(png).shape == (64, 32, 3)
    assert json.loads(read_png_text(png)["options"]) == {"height": 64, "steps": 2, "width": 32}
    with pytest.raises(UsageError, match=r"^unknown option 'stesp'. Did you mean \"steps\"\?$"):
        run(model, pictures, tmp_path / "typo", options={"stesp": 2})
    assert not (tmp_path / "typo").exists()  # the check came before the job
    with pytest.raises(UsageError, match=r"^unknown option 'promt'. Did you mean \"prompt\"\?$"):
        run(model, pictures, tmp_path / "typo", options={"promt": "a bird"})
    with pytest.raises(UsageError, match="width was given alone"):
        run(model, pictures, tmp_path / "alone", options={"width": 32})


@pytest.mark.parametrize("driver_checks", [True, False])
def test_a_wrong_option_deletes_no_result(
    driver_checks: bool, model: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver checks options, or the restorer for an unknown system: the same message, and no result is deleted."""
    out = tmp_path / "out"
    run(model, pictures, out)
    (pictures / "p0.png").write_bytes(encode_png(dead_leaves(48, 2, 0)))  # also if the source has changed
    before = outputs(out)
    wrong = [({"steps": 10**7}, "steps must be between 1 and 1000000, got 10000000"), ({"stps": 5}, "unknown option")]
    if not driver_checks:
        monkeypatch.delitem(SYSTEMS, "tiny")
    for options, message in wrong:
        with pytest.raises(UsageError, match=message):
            run(model, pictures, out, options=options)
        assert outputs(out) == before
    result = run(model, pictures, out)
    assert (result.restored, result.skipped) == (1, 5)


class Failing(Restorer):
    """A restorer that fails for one picture."""

    def restore(self, requests, on_step=None, cancelled=None):
        if any(request.key == "p0" for request in requests):
            raise RuntimeError("no luck")
        return tiny.TinyRestorer(strength=1.0).restore(requests)


def test_a_failure_keeps_the_earlier_result_and_its_record(model: Path, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(model, pictures, out)
    (pictures / "p0.png").write_bytes(encode_png(dead_leaves(48, 2, 0)))
    before = outputs(out)["p0.png"]
    for _ in range(2):  # its record stays too, so the next job may overwrite the file
        result = run(model, pictures, out, factory=Failing, options={"steps": 2})
        assert (result.quarantined, outputs(out)["p0.png"]) == (2, before)
    assert {row["key"]: row["source_sha256"] for row in read_lines(result.records)}["p0"] == read_png_text(before)[
        "source_sha256"
    ]
    assert run(model, pictures, out).restored == 6 and outputs(out)["p0.png"] != before


@pytest.mark.parametrize("source", ["good", "broken"])
def test_files_of_other_programs_are_neither_overwritten_nor_deleted(source: str, model: Path, tmp_path: Path) -> None:
    album, old = tmp_path / "album", tmp_path / "album" / "old"
    old.mkdir(parents=True)
    data = encode_png(dead_leaves(32, 0, 0))
    (album / "a.png").write_bytes(data)
    (old / "a.jpg").write_bytes(encode_png(dead_leaves(32, 0, 1)) if source == "good" else b"<html>")
    for src in (old, album / "a.png"):
        with pytest.raises(UsageError, match=r"album/a\.png would be overwritten.*choose another output folder"):
            run(model, src, album)
    assert (album / "a.png").read_bytes() == data
    (album / "a.png").unlink()
    assert run(model, old, album).restored == (source == "good")


def test_batch_and_service_agree_on_options(model: Path, pictures: Path, tmp_path: Path) -> None:
    check = option_check("instantir", {})
    for options in ({"cfg_scale": 3}, {"sampler": "ddpm"}, {"steps": 2.0}, {"start": "noise", "preview_start": 1}):
        service = read_parameters({name: str(value) for name, value in options.items()}, ServeLimits(), check)[2]
        batch = parse_ask(options, check)
        assert json.dumps(service.document()) == json.dumps(batch.document())
    assert parse_ask({"cfg_scale": 3}, check).digest() == parse_ask({"cfg_scale": 3.0}, check).digest()
    for options in ({"steps": 2.5}, {"sampler": "ddmp"}, {"cfg_scale": "much"}):
        with pytest.raises(ValueError, match=next(iter(options))) as batch_error:
            parse_ask(options, check)
        with pytest.raises(Refusal) as service_error:
            read_parameters({name: str(value) for name, value in options.items()}, ServeLimits(), check)
        assert (service_error.value.status, service_error.value.detail) == (422, str(batch_error.value))
    with pytest.raises(Refusal, match='Did you mean "seed"') as typo:
        read_parameters({"sed": "1"}, ServeLimits(), check)
    assert typo.value.code == "unknown_parameter"
    for name, cfg_scale in (("whole", 3), ("float", 3.0)):
        run(model, pictures, tmp_path / name, options={"cfg_scale": cfg_scale})
    assert outputs(tmp_path / "whole") == outputs(tmp_path / "float")


def test_options_that_contradict_the_models_recipe_are_refused_before_its_weights_are_read(
    pictures: Path, tmp_path: Path
) -> None:
    card = ModelCard(name="plain", system="instantir", recipe={"name": "plain", "reference": "lq", "cfg_scale": 2.0})
    save_model(tmp_path / "plain", card, {"aggregator": {"w": torch.zeros(1)}})  # these weights cannot restore
    identity = open_model(tmp_path / "plain").identity
    assert identity.defaults == {"reference": "lq", "cfg_scale": 2.0}
    with pytest.raises(UsageError, match=r"adaptive paper compares previews.*got lq"):
        tiny.run_job(tmp_path / "plain", pictures, tmp_path / "out", {"preset": "paper"})
    assert not (tmp_path / "out").exists()
    with pytest.raises(Failure, match="needs perceptor and previewer"):  # valid options: the weights are read
        tiny.run_job(tmp_path / "plain", pictures, tmp_path / "out", {"steps": 2})


def test_a_model_that_cannot_be_loaded_ends_the_job_with_one_sentence(
    model: Path, pictures: Path, tmp_path: Path
) -> None:
    with pytest.raises(Failure, match="model tiny cannot be loaded: RuntimeError: weights of tiny do not fit"):
        run(model, pictures, tmp_path / "out", factory=functools.partial(tiny.build_never, model))
    with pytest.raises(UsageError, match="neither a model folder"):
        run(tmp_path / "no model", pictures, tmp_path / "out")


def test_unusable_folders_are_refused(model: Path, pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="holds no pictures"):
        run(model, tmp_path / "empty", tmp_path / "out")
    with pytest.raises(UsageError, match="does not exist"):
        run(model, tmp_path / "absent", tmp_path / "out")
    with pytest.raises(UsageError, match="both input and output"):
        run(model, pictures, pictures)
    with pytest.raises(Failure, match="cannot write"):
        run(model, pictures, pictures / "p0.png" / "out")


def test_two_jobs_on_one_output_are_refused(model: Path, pictures: Path, tmp_path: Path) -> None:
    out, refusals = tmp_path / "out", []

    def start_second_job(count: int, of: int = 0, note: str = "") -> None:
        if count == 1:
            with pytest.raises(RetryLater, match="is in use by process"):
                run(model, pictures, out)
            refusals.append(True)

    assert run(model, pictures, out, progress=start_second_job).restored == 6
    assert refusals


def test_keys_are_distinct_file_names(tmp_path: Path) -> None:
    names = [
        "a.png",
        "a.jpg",
        "B.png",
        "sub/b.png",
        "sub/A.png",
        "IMG.01.final.jpg",
        "-x.png",
        "写真 é.png",
        "x" * 240 + ".png",
    ]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old.png").write_bytes(b"x")
    (tmp_path / "earlier").mkdir()
    (tmp_path / "earlier" / "a.png").write_bytes(b"x")
    (tmp_path / "earlier" / "records.jsonl").write_text('{"output_sha256": "", "source_sha256": ""}\n{}\n')
    keys, _ = list_pictures(tmp_path, tmp_path / "out")
    assert {str(path.relative_to(tmp_path)) for path in keys.values()} == set(names)
    assert {"a.png", "a.jpg", "B", "sub/b", "sub/A", "IMG.01.final", "-x", "写真 é"} <= set(keys)
    assert all(len(f"{part}.png".encode()) < 255 for key in keys for part in key.split("/"))
    assert file_key("../../etc/x\n") == "_._.._etc_x_"


def test_a_bad_picture_in_a_batch_does_not_change_the_others() -> None:
    restorer, ask = tiny.TinyRestorer(strength=9.0), parse_ask({})
    good = [Picture(key=f"p{i}", data=encode_png(dead_leaves(32, 0, i)), seed=i) for i in range(2)]
    results = restore_batch(restorer, IDENTITY, [good[0], Picture(key="bad", data=b"", seed=0), good[1]], ask)
    assert isinstance(results[1], SampleError) and (results[1].code, results[1].key) == ("empty", "bad")
    assert results[::2] == [
        *restore_batch(restorer, IDENTITY, good[:1], ask),
        *restore_batch(restorer, IDENTITY, good[1:], ask),
    ]


class Swapping(Restorer):
    """A restorer with a bug: it returns results in the wrong order."""

    def restore(self, requests, on_step=None, cancelled=None):
        return tiny.TinyRestorer(strength=1.0).restore(requests)[::-1]


def test_results_in_the_wrong_order_are_detected() -> None:
    pictures = [Picture(key=f"p{i}", data=encode_png(dead_leaves(32, 0, i)), seed=i) for i in range(2)]
    right = restore_batch(tiny.TinyRestorer(strength=1.0), IDENTITY, pictures, parse_ask({}))
    assert restore_batch(Swapping(), IDENTITY, pictures, parse_ask({})) == right  # it restores them one by one


def test_unusual_files_do_not_end_the_job(model: Path, images_dir: Path, tmp_path: Path) -> None:
    names = (
        "truncated.jpg",
        "zero_bytes.jpg",
        "text_named.jpg",
        "animated_apng.png",
        "png_bomb_20000x20000_rgb.png",
        "one_by_one.png",
        "odd_size_333x217.jpg",
        "name with spaces & (brackets) é 写真.jpg",
        "rgba_soft_alpha.png",
    )
    folder = tmp_path / "odd"
    folder.mkdir()
    for name in names:
        (folder / name).symlink_to((images_dir / "odd" / name).resolve())
    result = run(model, folder, tmp_path / "out")
    codes = {row["key"]: row["code"] for row in read_lines(result.quarantine)}
    assert codes == {
        "truncated": "truncated",
        "zero_bytes": "empty",
        "text_named": "not_image",
        "animated_apng": "animated",
        "png_bomb_20000x20000_rgb": "too_large",
    }
    assert result.restored == 4 and decode((result.folder / "one_by_one.png").read_bytes(), ANY_SHAPE).shape == (
        1,
        1,
        3,
    )
    assert decode((result.folder / "odd_size_333x217.png").read_bytes()).shape == (217, 333, 3)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_on_ray_the_bits_are_the_same(model: Path, pictures: Path, tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    run(model, pictures, here, seed=3)
    result = run(model, pictures, there, seed=3, workers=2, batch_size=2)
    assert (result.restored, result.quarantined) == (6, 1)
    assert outputs(here) == outputs(there)
    unstable = {"seconds", "source"}
    rows = [
        [{k: v for k, v in row.items() if k not in unstable} for row in read_lines(out / "records.jsonl")]
        for out in (here, there)
    ]
    assert rows[0] == rows[1]


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_a_picture_that_kills_workers_is_quarantined(model: Path, pictures: Path, tmp_path: Path) -> None:
    out, reference = tmp_path / "out", tmp_path / "reference"
    run(model, pictures, reference)
    result = run(model, pictures, out, workers=1, batch_size=2, build={"lethal": "p2"})
    assert (result.restored, result.quarantined) == (5, 2)
    assert {row["key"]: row["code"] for row in read_lines(result.quarantine)} == {
        "p2": "worker_died",
        "torn": "truncated",
    }
    expected = outputs(reference)
    expected.pop("p2.png")
    assert outputs(out) == expected


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_a_model_whose_loading_kills_workers_ends_the_job(model: Path, pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(Failure, match="workers died again and again while loading the model tiny"):
        run(model, pictures, tmp_path / "out", workers=1, factory=functools.partial(tiny.build_dying, model))


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A corpus of three held-out pictures, one broken."""
    blobs = {
        "wide": encode_png(dead_leaves(96, 3, 0)[:70]),
        "broken": encode_png(dead_leaves(64, 3, 1))[:200],
        "tall": encode_png(dead_leaves(96, 3, 2)[:, :65]),
    }
    samples = [(key, "png", blob, {}) for key, blob in blobs.items()]
    return write_corpus(tmp_path / "corpus", "test", {"train": [], "held_out": samples}).folder


def test_heldout_pairs(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    result = prepare_heldout(corpus, out, "realesrgan-nano", seed=4, short_side=50)
    assert (result.new, result.reused, result.quarantined) == (2, 0, 1)
    shapes = {}
    for key in ("wide", "tall"):
        hq, lq = (decode((out / name / f"{key}.png").read_bytes()) for name in ("hq", "lq"))
        assert hq.shape == lq.shape and not np.array_equal(hq, lq)
        shapes[key] = hq.shape[:2]
    assert shapes == {"wide": (48, 64), "tall": (64, 48)}  # 50 x 69 and 74 x 50, down to multiples of 16
    rows = {row["key"]: row for row in read_lines(out / "heldout.jsonl")}
    assert rows["tall"]["position"] == 2 and rows["tall"]["plan"]
    assert read_lines(out / "quarantine.jsonl")[0]["key"] == "broken"


def test_heldout_keys_that_differ_in_case_only_are_those_of_their_results(model: Path, tmp_path: Path) -> None:
    samples = [(key, "png", encode_png(dead_leaves(64, 3, n)), {}) for n, key in enumerate(("IMG_1", "img_1", "z"))]
    corpus = write_corpus(tmp_path / "corpus", "test", {"train": [], "held_out": samples}).folder
    prepare_heldout(corpus, tmp_path / "set", "realesrgan-nano", seed=4, short_side=64)
    run(model, tmp_path / "set" / "lq", tmp_path / "set" / "restored")
    names = {name: set(outputs(tmp_path / "set" / name)) for name in ("hq", "lq", "restored")}
    assert names["hq"] == names["lq"] == names["restored"] and "z.png" in names["lq"] and len(names["lq"]) == 3


def test_heldout_pictures_have_the_limits_of_their_corpus(tmp_path: Path) -> None:
    """A corpus of longer strips than the decoder's default, as curation with filters.max_aspect=40 accepts them."""
    strip = encode_png(np.tile(dead_leaves(64, 3, 0), (1, 30, 1)))
    corpus = write_corpus(tmp_path / "corpus", "test", {"train": [], "held_out": [("strip", "png", strip, {})]}).folder
    assert prepare_heldout(corpus, tmp_path / "set", "none", short_side=32).new == 1
    assert decode((tmp_path / "set" / "hq" / "strip.png").read_bytes(), ANY_SHAPE).shape == (32, 960, 3)


def test_prepare_heldout_is_idempotent_and_depends_on_its_settings(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    prepare_heldout(corpus, out, "realesrgan-nano", seed=4, short_side=48)
    first = outputs(out / "lq")
    assert (
        again := prepare_heldout(corpus, out, "realesrgan-nano", seed=4, short_side=48)
    ).reused == 2 and not again.new
    (out / "lq" / "wide.png").unlink()
    assert prepare_heldout(corpus, out, "realesrgan-nano", seed=4, short_side=48).new == 1
    assert outputs(out / "lq") == first
    assert prepare_heldout(corpus, out, "realesrgan-nano", seed=5, short_side=48).new == 2
    assert all(outputs(out / "lq")[name] != first[name] for name in first)
    prepare_heldout(corpus, out, "realesrgan-nano", seed=5, short_side=48, limit=1)
    assert set(outputs(out / "hq")) == set(outputs(out / "lq")) == {"wide.png"}
    with pytest.raises(UsageError, match="realesrgan-nano"):
        prepare_heldout(corpus, out, "realesrgan-nanu")


def test_a_prior_cannot_be_opened_for_restoration() -> None:
    with pytest.raises(UsageError, match="nano is a prior model, which restores nothing"):
        open_model(SHIPPED_PRIORS / "nano")
