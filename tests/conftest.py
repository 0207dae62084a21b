"""Fixtures that several folders share: the shared data and one Ray for the whole session."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ABSENT = "shared data is absent"
LONGEST = ("test_demo.py", "test_train.py", "test_cli.py", "test_restore.py", "test_curate.py")
"""Test files that take minutes. They start first, so that two parallel test processes end at about the same time."""


def shared_folder(variable: str, name: str) -> Path:
    """Return $variable, or ../shared/<name> next to the repository; skip the test if there is no such folder."""
    folder = Path(os.environ.get(variable) or ROOT.parent / "shared" / name)
    if not folder.is_dir():
        pytest.skip(f"{ABSENT}: set {variable}; looked at {folder}")
    return folder


def golden_names(pattern: str) -> list[str]:
    """Return the matching golden files, without .json, for parametrize; [""] if there are none, for a visible skip."""
    folder = Path(os.environ.get("RESTORAY_GOLDEN") or ROOT.parent / "shared" / "golden")
    return sorted(path.stem for path in folder.glob(f"{pattern}.json")) or [""]


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Folder of tensors from the official modules: NAME.json and NAME.safetensors."""
    return shared_folder("RESTORAY_GOLDEN", "golden")


@pytest.fixture(scope="session")
def images_dir() -> Path:
    """Folder of real photographs and unusual files."""
    return shared_folder("RESTORAY_IMAGES", "images")


@pytest.fixture(scope="session")
def reference_dir() -> Path:
    """Folder of facts from papers and releases: layouts and costs as JSON."""
    folder = ROOT.parent / "shared" / "reference"
    if not folder.is_dir():
        pytest.skip(f"{ABSENT}: looked at {folder}")
    return folder


@pytest.fixture(scope="session")
def kuberay_dir() -> Path:
    """Folder of KubeRay's resource schemas."""
    folder = ROOT.parent / "shared" / "schemas" / "kuberay"
    if not folder.is_dir():
        pytest.skip(f"{ABSENT}: looked at {folder}")
    return folder


@pytest.fixture(scope="session")
def repository() -> Path:
    """The top of the checkout."""
    return ROOT


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One local Ray for all tests, since each start takes seconds."""
    from pipelines.core.cluster import local_ray

    with local_ray(num_cpus=4, object_store_mib=200):
        yield


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Undo a test's change of torch's thread count: two threads in each of two processes are 10 to 20 times slower."""
    yield
    torch, threads = sys.modules.get("torch"), os.environ.get("OMP_NUM_THREADS")
    if torch and threads and torch.get_num_threads() != int(threads):
        torch.set_num_threads(int(threads))


def pytest_configure(config: pytest.Config) -> None:
    """Set the Makefile's environment, also for `pytest` without make."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # a shell's background job ignores Ctrl-C, and so would the processes of the tests that send it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    from pipelines.core.environment import quiet_environment

    quiet_environment()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # Ray Train asks its workers for news every 2 s; tiny trainings would spend most of their time waiting for that
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first; the order within a file stays."""
    rank = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(LONGEST)))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print at the end that shared data is absent: such a run has not tested everything."""
    skipped = [report for report in terminalreporter.getreports("skipped") if ABSENT in str(report.longrepr)]
    if skipped:
        terminalreporter.write_line(f"SHARED DATA ABSENT, {len(skipped)} tests skipped", red=True, bold=True)
