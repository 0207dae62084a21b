"""A model that makes no finite values: quarantine in a job, 500 in the service, no sample sheet, a failed gate."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from helper_modules import load_helper

from components.images import encode_png
from components.models import ModelCard, save_model
from components.recipes import Placement
from components.synthetic import dead_leaves
from components.systems import SYSTEMS
from components.systems.swinir.config import SwinIRConfig
from components.systems.swinir.network import build_swinir
from components.systems.swinir.weights import parameters_of
from components.types import SampleError
from pipelines.core.errors import Failure, GateFailed
from pipelines.core.pool import Pool
from pipelines.core.rows import read_lines
from pipelines.restoration.batch import RestoreJob, restore_folder
from pipelines.restoration.models import open_model
from pipelines.service.front import ServeLimits, build_app
from pipelines.service.serve import FrontDoor, RestorerReplica

swinir = load_helper("components/test_swinir.py")


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SwinIR with one infinite weight; its digests are right."""
    config = SwinIRConfig(**swinir.TINY)
    network = build_swinir(config, seed=3)
    with torch.no_grad():
        network.conv_last.weight.view(-1)[0] = torch.inf
    card = ModelCard(name="broken", system="swinir", recipe={"resolution": 32}, config=config.to_dict())
    return save_model(tmp_path_factory.mktemp("broken") / "model", card, {"swinir": parameters_of(network)}).path


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    for index in range(4):  # more than the equal failures that end a job
        (tmp_path / "in" / f"p{index}.png").write_bytes(encode_png(dead_leaves(32, 1, index)))
    return tmp_path / "in"


def test_every_picture_of_a_broken_model_is_quarantined(broken: Path, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = restore_folder(open_model(broken), pictures, out, RestoreJob(), Pool(workers=0, batch_size=3))
    assert (result.restored, result.quarantined) == (0, 4) and not list(out.glob("*.png"))
    rows = read_lines(result.quarantine)
    assert [(row["key"], row["code"]) for row in rows] == [(f"p{n}", "not_finite") for n in range(4)]
    assert "values that are not finite" in rows[0]["detail"]


def test_an_earlier_result_survives_a_broken_model(broken: Path, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    intact = save_model(
        tmp_path / "intact",
        ModelCard(name="m", system="swinir", recipe={}, config=SwinIRConfig(**swinir.TINY).to_dict()),
        {"swinir": parameters_of(build_swinir(SwinIRConfig(**swinir.TINY), seed=3))},
    ).path
    opened = open_model(intact)
    job = RestoreJob(ask=opened.request_options({"min_side_px": 32}))
    assert restore_folder(opened, pictures, out, job, Pool(workers=0)).restored == 4
    before = {path.name: path.read_bytes() for path in out.glob("*.png")}
    (pictures / "p0.png").write_bytes(encode_png(dead_leaves(32, 1, 9)))
    restore_folder(open_model(broken), pictures, out, RestoreJob(), Pool(workers=0))
    assert {path.name: path.read_bytes() for path in out.glob("*.png")} == before  # the source is a good picture still


def test_the_service_answers_500_with_the_code(broken: Path, pictures: Path) -> None:
    opened, limits = open_model(broken), ServeLimits()

    class Method:
        def __init__(self, call: Callable[..., Awaitable[object]]) -> None:
            self.remote = call

    async def exchange() -> httpx.Response:
        replica = RestorerReplica(opened.factory, opened.identity, limits, threads=1)
        handle: Any = SimpleNamespace(setup_error=Method(replica.setup_error), restore=Method(replica.restore))
        front = FrontDoor(handle, opened.identity, limits, opened.check)
        app = build_app(front, opened.identity, limits, opened.check)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://front") as client:
            content = (pictures / "p0.png").read_bytes()
            return await client.post("/v1/restore", content=content, headers={"Content-Type": "image/png"})

    answer = asyncio.run(exchange())
    assert answer.status_code == 500 and answer.json()["code"] == "not_finite"


def test_a_training_goes_on_without_its_sample_sheet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipelines.training import worker

    pixels = torch.zeros(2, 3, 8, 8)
    heldout = SimpleNamespace(keys=["a", "b"], lq=pixels, hq=pixels, prompts=["", ""], __len__=lambda: 2)
    monkeypatch.setattr(worker, "evaluate_loss", lambda *_, **__: {"network": 1.0})
    system = SimpleNamespace(look=lambda *_: torch.full((2, 3, 8, 8), torch.nan))
    monkeypatch.setitem(SYSTEMS, "toy", system)  # type: ignore[arg-type]
    rows: list[Any] = []

    class Heldout:
        def __len__(self) -> int:
            return 2

        def __getattr__(self, name: str) -> Any:
            return getattr(heldout, name)

    state: Any = SimpleNamespace(
        rank=0,
        step=7,
        device="cpu",
        objective=None,
        heldout=[Heldout()],
        recipe=SimpleNamespace(system="toy", accumulation=1),
        world=1,
        run=SimpleNamespace(out=tmp_path),
        average_weights=contextlib.nullcontext,
        log=SimpleNamespace(write=lambda step, values: rows.append((step, values))),
    )
    worker.evaluate(state)
    assert rows == [(7, {"heldout/network": 1.0}), (7, {"samples/not_finite": 1.0})]
    assert not list(tmp_path.rglob("*.png"))


def test_a_recorded_run_of_a_study_names_the_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    from components.systems.instantir import insight
    from components.systems.instantir.options import Options
    from pipelines.analysis.instantir import runs

    good = torch.zeros(2, 1, 4, 2, 2)
    bad = good.clone()
    bad[1, 0, 3, 1, 1] = torch.nan
    subject: Any = SimpleNamespace(network=None, options=Options(), job=SimpleNamespace(seed=0))
    for previews, denoised, latents in ((bad, good, good[0]), (good, bad, good[0]), (good, good, bad[1])):
        run = SimpleNamespace(previews=previews, denoised=denoised, latents=latents)
        monkeypatch.setattr(insight, "record", lambda *_, run=run: run)
        with pytest.raises(SampleError) as error:
            runs.record_picture(subject, "k", np.zeros((8, 8, 3), np.uint8))
        assert (error.value.code, error.value.key) == ("not_finite", "k")


@pytest.mark.parametrize(("arm", "kind"), [("teacher", Failure), ("student", GateFailed)])
def test_a_gate_says_who_restored_nothing(
    arm: str, kind: type[Exception], broken: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines.evaluation import gate

    def restore(opened: Any, lq: Path, out: Path, job: Any, pool: Any, progress: Any) -> Any:
        if out.name != arm:
            return SimpleNamespace(quarantined=0, restored=4, skipped=0)
        return restore_folder(open_model(broken), pictures, out, RestoreJob(), Pool(workers=0))

    monkeypatch.setattr(gate, "restore_folder", restore)
    monkeypatch.setattr(gate, "prepare_heldout", lambda *_, **__: None)
    monkeypatch.setattr(gate, "_heldout_corpus", lambda *_: tmp_path)
    settings = SimpleNamespace(pictures=4, teacher_options={}, student_options={})
    recipe: Any = SimpleNamespace(
        name="toy",
        student_gate=settings,
        teacher=broken,
        degradation=SimpleNamespace(preset="none", options={}),
        short_side=32,
        pairs="",
        placement=Placement(),
    )
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model").symlink_to(broken)
    with pytest.raises(kind, match=f"the {arm} restored none of 4 pictures: the model made values"):
        functools.partial(gate.pass_gate, on_ray=False)(recipe, {}, tmp_path / "out")
