"""Several models in one job and in one service: names, routes, records, and the bytes of each model's own job."""

from __future__ import annotations

import asyncio
import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from helper_modules import load_helper, load_helper_for_workers
from typer.testing import CliRunner

from components.images import encode_png, read_png_text
from components.models import ModelCard, save_model
from components.restoring import picture_seed
from components.synthetic import dead_leaves
from components.systems import SYSTEMS
from components.systems.system import Networks, Sharing
from pipelines.commands.main import build_app as command_line
from pipelines.core.errors import UsageError
from pipelines.core.places.place import place_of
from pipelines.core.pool import Pool
from pipelines.restoration.batch import RestoreJob, restore_folder
from pipelines.restoration.models import OpenedModel, open_models
from pipelines.restoration.routes import UnknownModel, choose, read_routes
from pipelines.service.front import ServeLimits, build_app
from pipelines.service.serve import FrontDoor, RestorerReplica

tiny = load_helper_for_workers("pipelines/_tiny.py")
serving = load_helper("pipelines/service/test_serve.py")

SHARING = Sharing(
    prior_of=lambda model: (str(model.info["prior"]), str(model.info["prior"])),
    build=lambda folders, **_: [tiny.build_tiny(folder.path) for folder in folders],
)


@pytest.fixture(autouse=True)
def tiny_system(monkeypatch: pytest.MonkeyPatch) -> None:
    networks = Networks(build_restorer=lambda folder, **_: tiny.build_tiny(folder.path), sharing=SHARING)
    monkeypatch.setitem(SYSTEMS, "tiny", replace(tiny.SYSTEM, networks=lambda: networks))


def write(folder: Path, name: str, strength: float, prior: str = "p") -> Path:
    import torch

    card = ModelCard(name=name, system="tiny", recipe={"name": "r"}, prior={"id": prior})
    save_model(folder, card, {"filter": {"strength": torch.tensor([strength])}})
    return folder


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    names = (("portraits", 5.0), ("scans", 90.0), ("film", 40.0))
    return [write(tmp_path / "models" / name, name, strength) for name, strength in names]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    for key in "abcd":
        (folder / f"{key}.png").write_bytes(encode_png(dead_leaves(32, 0, ord(key))))
    return folder


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.stem: path.read_bytes() for path in folder.glob("*.png")}


def alone(model: Path, pictures: Path, out: Path) -> dict[str, bytes]:
    tiny.run_job(model, pictures, out, factory=lambda: tiny.build_tiny(model))
    return bytes_of(out)


def route(opened: OpenedModel, names: dict[str, str]) -> dict[str, str]:
    return {key: choose(name, opened.choices).identity.digest for key, name in names.items()}


def test_each_picture_has_the_bytes_of_its_model_s_own_job(models: list[Path], pictures: Path, tmp_path: Path) -> None:
    own = {model.name: alone(model, pictures, tmp_path / f"alone-{model.name}") for model in models}
    opened = open_models(models)
    names = {"a": "scans", "c": "film", "d": "scans"}
    job = RestoreJob(routes=route(opened, names))
    result = restore_folder(opened, pictures, tmp_path / "out", job, Pool(workers=0, batch_size=3))
    assert (result.restored, result.quarantined) == (4, 0)
    names["b"] = "portraits"  # the first one
    assert bytes_of(tmp_path / "out") == {key: own[name][key] for key, name in names.items()}
    assert len({own[name]["a"] for name in own}) == 3
    rows = [json.loads(line) for line in result.records.read_text().splitlines()]
    assert {row["key"]: row["model"] for row in rows} == names
    for row in rows:
        text = read_png_text((tmp_path / "out" / row["output"]).read_bytes())
        assert (text["model"], text["model_digest"]) == (row["model"], row["model_digest"])
    again = restore_folder(opened, pictures, tmp_path / "out", job, Pool(workers=0))
    assert again.skipped == 4
    moved = RestoreJob(routes=route(opened, {**names, "a": "film"}))
    assert restore_folder(opened, pictures, tmp_path / "out", moved, Pool(workers=0)).restored == 1
    assert bytes_of(tmp_path / "out")["a"] == own["film"]["a"]
    # the records of a job are a routes file
    sources = {key: pictures / f"{key}.png" for key in "abcd"}
    assert read_routes(result.records, sources, pictures, opened.choices) == route(opened, {**names, "a": "film"})


def test_models_of_a_store_are_fetched_by_the_machine_that_builds_them(
    models: list[Path], pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = place_of(f"memory://{tmp_path.name}")
    for path in (path for model in models for path in model.rglob("*") if path.is_file()):
        (store / path.relative_to(tmp_path).as_posix()).write_bytes(path.read_bytes())
    monkeypatch.setenv("RESTORAY_HOME", str(tmp_path / "driver"))
    opened = open_models([f"{store}/models/{model.name}" for model in models])
    names = {"a": "scans", "c": "film"}
    job = RestoreJob(routes=route(opened, names))
    shutil.rmtree(tmp_path / "driver")
    monkeypatch.setenv("RESTORAY_HOME", str(tmp_path / "worker"))
    restore_folder(opened, pictures, tmp_path / "out", job, Pool(workers=0))
    folders = open_models(models)
    restore_folder(folders, pictures, tmp_path / "local", job, Pool(workers=0))
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "local")
    assert len(list((tmp_path / "worker").rglob("model.json"))) == 3
    assert not (tmp_path / "driver").exists()


def test_names_of_models(models: list[Path], tmp_path: Path) -> None:
    twin = write(tmp_path / "other" / "grain", "film", 70.0)
    opened = open_models([*models, twin])
    digests = [choice.identity.digest for choice in opened.choices]
    assert choose("", opened.choices).identity.digest == digests[0]
    assert choose("grain", opened.choices).identity.digest == digests[3]  # the folder's name
    assert choose(digests[2][:8], opened.choices).identity.digest == digests[2]
    with pytest.raises(UnknownModel, match="2 models are called 'film': name one by its digest"):
        choose("film", opened.choices)
    with pytest.raises(UnknownModel, match=r"unknown model 'scan'\. Did you mean \"scans\""):
        choose("scan", opened.choices)
    with pytest.raises(UsageError, match=r"other: is on the prior .*'q'.*, and .*portraits on .*'p'"):
        open_models([models[0], write(tmp_path / "other", "other", 1.0, prior="q")])
    with pytest.raises(UsageError, match="name a model once"):
        open_models([models[0], models[0]])


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("key,model\na,scan\n", r'line 2: unknown model .scan.\. Did you mean "scans"'),
        ("key,model\nz,scans\n", r"names pictures that are not in .*: z \(line 2\)"),
        ("key,model\na,scans\na,film\n", "line 3: a has a model already, in line 2"),
        ("key,model\na,\n", "model must be the name"),
        ("key,modle\na,scans\n", "line 1: unknown model .modle."),
        ("", "holds no routes"),
    ],
)
def test_wrong_routes_files(text: str, word: str, models: list[Path], pictures: Path, tmp_path: Path) -> None:
    path, opened = tmp_path / "routes.csv", open_models(models)
    path.write_text(text)
    sources = {key: pictures / f"{key}.png" for key in ("a", "key") if key != "key"} | {"key": pictures / "a.png"}
    with pytest.raises(UsageError, match=word):
        read_routes(path, sources, pictures, opened.choices)


def test_the_service_restores_with_the_model_that_a_request_names(
    models: list[Path], pictures: Path, tmp_path: Path
) -> None:
    opened, limits = open_models(models), ServeLimits()
    siblings = {each.identity.digest: each.identity for each in opened.siblings}
    picture = (pictures / "a.png").read_bytes()
    own = {model.name: alone(model, pictures, tmp_path / f"alone-{model.name}")["a"] for model in models}
    digests = {choice.identity.name: choice.identity.digest for choice in opened.choices}

    async def exchange() -> None:
        replica = RestorerReplica(opened.factory, opened.identity, limits, 1, siblings)
        front = FrontDoor(serving.Direct(replica), opened.identity, limits, opened.check, opened.choices)
        app = build_app(front, opened.identity, limits, opened.check, opened.choices)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://front") as client:
            query = f"key=a&seed={picture_seed(0, 'a')}"
            names = ["", "scans", "film", "portraits", digests["film"], "scans"]
            calls = [client.post(f"/v1/restore?{query}&model={name}", content=picture) for name in names]
            for name, answer in zip(names, await asyncio.gather(*calls), strict=True):  # at the same time
                used = {"": "portraits", digests["film"]: "film"}.get(name, name)
                assert answer.content == own[used] and answer.headers["X-Restoray-Model"] == digests[used]
            form = await client.post("/v1/restore", files={"image": ("a.png", picture)}, data={"model": "film"})
            assert form.content == own["film"]
            wrong = await client.post("/v1/restore?model=flim", content=picture)
            detail = {"code": "unknown_model", "detail": "unknown model 'flim'. Did you mean \"film\"?"}
            assert (wrong.status_code, wrong.json()) == (422, detail)
            listing: Any = (await client.get("/v1/models")).json()["models"]
            assert [each["name"] for each in listing] == ["portraits", "scans", "film"]
            assert (await client.get("/v1/model")).json()["digest"] == digests["portraits"]

    asyncio.run(exchange())


def test_the_command_needs_routes_with_several_models(models: list[Path], pictures: Path, tmp_path: Path) -> None:
    both = ["--model", str(models[0]), "-m", str(models[1])]
    command = ["restore", str(pictures), "-o", str(tmp_path / "out")]
    for words in (both, ["--model", str(models[0]), "--routes", "r.csv"]):
        result = CliRunner().invoke(command_line(), [*command, *words])
        assert "several models need --routes FILE" in str(result.exception), result.output
    with (tmp_path / "r.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([["picture", "model"], ["b", "scan"]])
    result = CliRunner().invoke(command_line(), [*command, *both, "--routes", str(tmp_path / "r.csv")])
    assert "r.csv" in str(result.exception)
