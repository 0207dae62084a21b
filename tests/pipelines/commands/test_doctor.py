"""The doctor: each judgement on good and bad values, and the whole command."""

from __future__ import annotations

import hashlib
import json
import socket
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.commands import machine
from pipelines.commands.findings import Finding, finding_lines
from pipelines.commands.machine import (
    check_disk,
    examine,
    exposed_ports,
    judge_amount,
    judge_bytecode,
    judge_exposure,
    judge_pair,
    judge_store,
    judge_version,
    judge_weights,
    parse_version,
)
from pipelines.core.memory import container_memory_left


@pytest.mark.parametrize(
    ("text", "numbers"), [("2.13.0+cpu", (2, 13, 0)), ("3.18.0rc1", (3, 18, 0)), ("13.0", (13, 0)), ("x", ())]
)
def test_parse_version(text: str, numbers: tuple[int, ...]) -> None:
    assert parse_version(text) == numbers


@pytest.mark.parametrize(
    ("torch", "vision", "status"),
    [
        ("2.13.0+cu130", "0.28.0+cu130", "ok"),
        ("2.13.0", "0.28.0", "ok"),
        ("2.13.0+cpu", "0.28.0", "fail"),
        ("2.13.0", "0.27.0", "fail"),
        ("2.99.0", "0.28.0", "warn"),
        (None, "0.28.0", "fail"),
    ],
)
def test_torch_pair(torch: str | None, vision: str | None, status: str) -> None:
    assert judge_pair(torch, vision).status == status


@pytest.mark.parametrize(
    ("name", "version", "status"),
    [
        ("pillow", "12.9.9", "fail"),
        ("pillow", "13.0.0", "ok"),
        ("mlflow", "3.17.1", "fail"),
        ("mlflow", "3.17.2", "ok"),
        ("ray", "2.100.0", "ok"),
        ("torch", None, "fail"),
    ],
)
def test_version_floors(name: str, version: str | None, status: str) -> None:
    assert judge_version(name, version).status == status


@pytest.mark.parametrize(
    ("has_bytecode", "forbidden", "status"), [(True, True, "ok"), (False, False, "ok"), (False, True, "warn")]
)
def test_bytecode_is_a_warning_if_nothing_writes_it(has_bytecode: bool, forbidden: bool, status: str) -> None:
    assert judge_bytecode(has_bytecode, forbidden).status == status


def test_exposure_fails_without_tokens_only() -> None:
    assert judge_exposure([], False).status == "ok"
    assert judge_exposure([8265], True).status == "ok"
    finding = judge_exposure([8265], False)
    assert finding.status == "fail" and "8265" in finding.seen and "127.0.0.1" in finding.advice


def test_exposed_ports_leaves_out_loopback() -> None:
    with socket.socket() as inside, socket.socket() as outside:
        inside.bind(("127.0.0.1", 0))
        outside.bind(("0.0.0.0", 0))
        inside.listen()
        outside.listen()
        ports = [inside.getsockname()[1], outside.getsockname()[1]]
        assert exposed_ports(ports) == [ports[1]]


def test_store_is_opened_and_read(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.db", tmp_path / "bad.db"
    with sqlite3.connect(good) as connection:
        connection.execute("create table t (x)")
    bad.write_bytes(b"SQLite format 3\0" + b"\x01" * 4000)
    assert judge_store(good).status == "ok"
    assert judge_store(bad).status == "fail"
    assert judge_store(tmp_path / "absent.db").status == "fail"
    assert not (tmp_path / "absent.db").exists()


def test_weights_are_hashed(tmp_path: Path) -> None:
    assert judge_weights(tmp_path, "w").status == "fail"
    (tmp_path / "parts").mkdir()
    part = tmp_path / "parts" / "unet.safetensors"
    part.write_bytes(b"weights")
    entry = {"file": "parts/unet.safetensors", "sha256": hashlib.sha256(b"weights").hexdigest()}
    (tmp_path / "model.json").write_text(json.dumps({"parts": {"unet": entry}}))
    assert judge_weights(tmp_path, "w").status == "ok"
    part.write_bytes(b"weightz")
    finding = judge_weights(tmp_path, "w")
    assert finding.status == "fail" and "unet" in finding.seen
    part.unlink()
    assert judge_weights(tmp_path, "w").status == "fail"


def test_amounts() -> None:
    statuses = [judge_amount("d", gib << 30, 5.0, 1.0, "free", "a").status for gib in (0, 1, 4, 5, 50)]
    assert statuses == ["fail", "warn", "warn", "ok", "ok"]


def test_container_memory_counts_reclaimable_files_as_free(tmp_path: Path) -> None:
    assert container_memory_left(tmp_path) is None
    (tmp_path / "memory.max").write_text("max\n")
    assert container_memory_left(tmp_path) is None
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 400\ninactive_file 300\n")
    assert container_memory_left(tmp_path) == 600


def test_disk_of_a_folder_that_does_not_exist_yet(tmp_path: Path) -> None:
    (finding,) = check_disk(tmp_path / "a" / "b")
    assert str(tmp_path) in finding.seen
    assert not (tmp_path / "a").exists()


def test_a_check_that_breaks_is_a_finding(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken() -> list[Finding]:
        raise RuntimeError("no such symptom")

    monkeypatch.setattr(machine, "check_memory", broken)
    monkeypatch.setattr(machine, "check_torch", list)  # avoids the import of torch
    findings = [f for f in examine(tmp_path) if f.check == "memory"]
    assert [f.status for f in findings] == ["fail"]
    assert "no such symptom" in findings[0].seen


@pytest.mark.slow
def test_every_finding_that_is_not_ok_has_advice(tmp_path: Path) -> None:
    findings = examine(tmp_path)
    assert {f.check for f in findings} >= {"python", "ray", "torch", "mlflow", "disk", "memory", "nano prior"}
    assert [f for f in findings if f.status != "ok" and not f.advice] == []
    assert len(finding_lines(findings)) == len(findings) + sum(bool(f.advice) for f in findings)


@pytest.mark.slow
def test_command_exits_1_exactly_when_something_fails(repository: Path, tmp_path: Path) -> None:
    process = subprocess.run(
        [sys.executable, "-m", "pipelines.commands.main", "doctor", "--json", "--out", str(tmp_path)],
        cwd=repository,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    document = json.loads(process.stdout)
    failed = any(f["status"] == "fail" for f in document["findings"])
    assert document["ok"] is not failed
    assert process.returncode == (1 if failed else 0)


def test_a_missing_shipped_model_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("nano prior", "nano-sd3 prior", "nano model")
    assert [(one.check, one.status) for one in machine.check_weights()] == [(name, "ok") for name in names]
    for kind in ("PRIORS", "MODELS"):
        monkeypatch.setattr(machine, f"SHIPPED_{kind}", tmp_path)
        monkeypatch.setattr(machine, f"shipped_{kind.lower()}", list)
    assert [(one.check, one.status) for one in machine.check_weights()] == [
        ("nano prior", "fail"),
        ("nano model", "fail"),
    ]


def test_the_folder_of_metric_weights_is_named_and_judged(tmp_path: Path) -> None:
    folder = tmp_path / "hub" / "pyiqa"
    nothing = machine.judge_metric_weights(folder)
    assert nothing.status == "ok" and str(folder) in nothing.seen and "TORCH_HOME" in nothing.seen
    folder.mkdir(parents=True)
    (folder / "niqe.mat").write_bytes(b"weights")
    assert machine.judge_metric_weights(folder).seen.startswith("1 files")
    (folder / "musiq.pth").write_bytes(b"")
    empty = machine.judge_metric_weights(folder)
    assert empty.status == "warn" and "musiq.pth" in empty.seen and "Delete" in empty.advice
    (tmp_path / "file").write_text("")
    blocked = machine.judge_metric_weights(tmp_path / "file" / "pyiqa")
    assert blocked.status == "warn" and "TORCH_HOME" in blocked.advice
