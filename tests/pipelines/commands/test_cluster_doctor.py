"""`restoray doctor --address`: what its findings say about tokens, versions, clocks, disks and the shared folder."""

from __future__ import annotations

import secrets
from pathlib import Path

import pytest

from pipelines.commands import cluster_doctor
from pipelines.commands.cluster_doctor import (
    PACKAGES,
    Sight,
    judge_node,
    judge_store,
    judge_token,
    judge_versions,
    look_around,
    store_problem,
)

GIB = 2**30


@pytest.mark.parametrize(
    ("address", "asked", "status"),
    [
        ("127.0.0.1:6379", [True, True], "ok"),
        ("192.0.2.7:6379", [True, True], "ok"),
        ("192.0.2.7:6379", [True, False], "fail"),
        ("192.0.2.7:6379", [False], "fail"),
        ("127.0.0.1:6379", [False], "warn"),  # only users of this machine reach it
        ("auto", [False], "fail"),
        ("192.0.2.7:6379", [], "fail"),
    ],
)
def test_a_reachable_cluster_without_a_token_fails(address: str, asked: list[bool], status: str) -> None:
    finding = judge_token(address, True, asked)
    assert finding.status == status and ("authOptions" in finding.advice) == (status != "ok")


def test_versions_of_nodes_are_compared_with_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_doctor, "_version", lambda name: "2.0")
    same = dict.fromkeys(PACKAGES, "2.0")
    (finding,) = judge_versions({"a": same, "b": same})
    assert (finding.status, finding.seen) == ("ok", f"{len(PACKAGES)} packages are the same on 2 nodes and here")
    findings = judge_versions({"a": same, "b": {**same, "torch": "2.1", "numpy": ""}})
    assert [(f.check, f.status, f.seen) for f in findings] == [
        ("torch", "fail", "2.0 here, 2.1 on b"),
        ("numpy", "fail", "2.0 here, none on b"),
    ]


@pytest.mark.parametrize(
    ("skew", "free", "expected"),
    [
        (0.2, 50 * GIB, ["ok", "ok", "ok"]),
        (-1.5, 3 * GIB, ["ok", "warn", "warn"]),
        (31.0, GIB // 2, ["ok", "fail", "fail"]),
        (0.0, -1, ["ok", "ok", "fail"]),
    ],
)
def test_a_node_is_judged_by_clock_and_disk(skew: float, free: int, expected: list[str]) -> None:
    findings = judge_node("node 1", Sight(gpus=["H200"], cache="/cache", free=free), skew)
    assert [finding.status for finding in findings] == expected and findings[0].seen == "GPUs: H200"


def test_a_node_must_read_and_write_the_store(tmp_path: Path) -> None:
    mark = secrets.token_hex(8)
    assert store_problem(tmp_path, mark).startswith("FileNotFoundError")  # another folder than the driver's
    (tmp_path / f".restoray-doctor-{mark}").write_text(mark)
    assert store_problem(tmp_path, mark) == ""
    assert [path.name for path in tmp_path.iterdir()] == [f".restoray-doctor-{mark}"]
    (tmp_path / f".restoray-doctor-{mark}").write_text("other")
    assert "another content" in store_problem(tmp_path, mark)
    assert judge_store("node 1", tmp_path, "").status == "ok"
    assert judge_store("node 1", tmp_path, "PermissionError: no").status == "fail"


def test_the_look_at_a_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESTORAY_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    (tmp_path / ".restoray-doctor-m").write_text("m")
    sight = Sight(**look_around(str(tmp_path), "m"))
    assert sight.token and sight.store == "" and sight.free > 0
    assert sight.cache == str(tmp_path / "home" / "cache") and sight.versions["torch"]
    (tmp_path / "home" / "cache").rmdir()
    (tmp_path / "home" / "cache").write_text("a file")
    assert Sight(**look_around("", "")).free == -1
