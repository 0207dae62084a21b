"""Runs of tests on mutants, in copies of the working tree, in forks of a process that has loaded torch.

    make_copies      copies of all project files in a temporary folder, one per process; the tree itself stays as it is
    start_profile    one run of a test file without mutants: the seconds of each test, and the lines that it runs
    choose           the tests that run a mutant's lines, the fastest first, within BUDGET_S
    start, Run.poll  one mutant: a forked process, its limits, its result

Bytecode in the copies is checked by the hash of its source and never written again, so a mutant leaves none.
"""

from __future__ import annotations

import compileall
import contextlib
import json
import os
import py_compile
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
from mutants import Mutant

LIMIT_S = 20
"""Seconds of processor time of a mutant's tests."""

WAIT_S = 30
"""Seconds by the clock in which a process uses no processor time: it waits for something that does not come."""

BUDGET_S = 8.0
"""Seconds of processor time of a mutant's tests when nothing is changed; so a time-out is the mutant's doing."""

MEMORY_BYTES = 12 << 30
"""Address space that a mutant's tests may add; a wrong size then fails at once."""

LIBRARIES = (
    "torch", "torch.distributed", "torch._dynamo", "numpy", "cv2", "PIL.Image", "scipy.stats", "scipy.signal",
    "scipy.ndimage", "skimage", "diffusers", "transformers", "peft", "safetensors.torch", "omegaconf", "hypothesis",
    "pytest", "_pytest.assertion.rewrite", "_hypothesis_pytestplugin",
)  # fmt: skip
"""Libraries that are loaded once, before the forks. None of our own, since a mutant changes those."""

OPTIONS = ["-x", "-q", "--tb=line", "-p", "no:cacheprovider", "-p", "no:xdist", "-o", "timeout=0", "--durations=0"]
MARKS = ["-m", "not slow and not full"]


def load_libraries() -> None:
    """Load LIBRARIES. Each process has one thread, since forks of several threads may hang."""
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"
    os.environ.update(
        PYTHONDONTWRITEBYTECODE="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", RAY_USAGE_STATS_ENABLED="0"
    )
    sys.dont_write_bytecode = True
    for name in LIBRARIES:
        __import__(name)
    import hypothesis

    # the same examples in all runs, and no folder of earlier failures
    hypothesis.settings.register_profile("mutation", derandomize=True, database=None, deadline=None)
    hypothesis.settings.load_profile("mutation")


def make_copies(root: Path, folder: Path, count: int) -> list[Path]:
    """Copy the files that git tracks or would track into `count` folders, with the shared data beside each."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=root, capture_output=True, check=True, text=True).stdout.split("\0")
    first = folder / "0" / "restoray"
    for name in names:
        if name and (root / name).is_file():
            (first / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, first / name)
    for package in ("components", "pipelines"):
        compileall.compile_dir(first / package, quiet=2, invalidation_mode=py_compile.PycInvalidationMode.CHECKED_HASH)
    copies = [first]
    for number in range(1, count):
        copies.append(folder / str(number) / "restoray")
        shutil.copytree(first, copies[-1])
    shared = root.parent / "shared"
    if shared.is_dir():
        for path in copies:
            (path.parent / "shared").symlink_to(shared.resolve())
    return copies


@dataclass(kw_only=True)
class Test:
    """One test of a test file.

    Attributes:
        name: pytest's node id.
        seconds: of processor time, with the fixtures that it is the first to use.
        lines: lines that it runs, by mutated file.
    """

    name: str
    seconds: float
    lines: dict[str, list[int]]


@dataclass(kw_only=True)
class Profile:
    """The tests of one test file, and the lines of the mutated files that its import runs."""

    tests: list[Test]
    at_import: dict[str, list[int]]
    error: str = ""


def choose(mutant: Mutant, files: Sequence[str], profiles: dict[str, Profile], budget: float = BUDGET_S) -> list[str]:
    """Return the tests for a mutant: those that run its lines, the fastest first, while they take `budget` seconds.

    A statement that runs at import (a table, a default) concerns all tests that run any line of its file, and those
    whose test file imports it, since a test may read a table alone.

    Args:
        mutant: the mutant.
        files: test files of the mutated file.
        profiles: of these test files.
        budget: seconds of processor time.
    """
    first, last = mutant.lines
    near: list[tuple[float, str]] = []
    for file in files:
        profile = profiles[file]
        for test in profile.tests:
            lines = test.lines.get(mutant.file, [])
            reads = mutant.at_import and (lines or mutant.file in profile.at_import)
            if reads or any(first <= line <= last for line in lines):
                near.append((test.seconds, test.name))
    names: list[str] = []
    total = 0.0
    for seconds, name in sorted(near):
        total += seconds
        if total > budget:
            break
        names.append(name)
    return names


def fastest(file: str, tests: Sequence[str], profiles: dict[str, Profile], budget: float = 1.0) -> list[str]:
    """Return the fastest tests that run any line of a file, while they take `budget` seconds: those of a control."""
    near = [(test.seconds, test.name) for name in tests for test in profiles[name].tests if file in test.lines]
    names: list[str] = []
    total = 0.0
    for seconds, name in sorted(near):
        total += seconds
        if total > budget:
            break
        names.append(name)
    return names


def profile_of(entry: dict[str, Any]) -> Profile:
    """Return a profile from the fields of its report."""
    error = entry.get("error", "no report")
    return Profile(
        tests=[Test(**one) for one in entry.get("tests", [])], at_import=entry.get("at_import", {}), error=error
    )


class Recorder:
    """Pytest plugin of a profile: seconds of each test and lines that it runs."""

    def __init__(self, copy: Path, files: Sequence[str]) -> None:
        self.files = {str(copy / file): file for file in files}
        self.tests: list[Test] = []
        self.lines: dict[str, set[int]] = {}
        self.started = 0.0
        self.failures: list[str] = []
        self.at_import: dict[str, list[int]] = {}

    def trace(self, frame: FrameType, event: str, _: Any) -> Any:
        """Trace function of Python: follow only frames of mutated files."""
        file = self.files.get(frame.f_code.co_filename)
        if file is None:
            return None
        lines = self.lines.setdefault(file, set())

        def line(frame: FrameType, event: str, _: Any) -> Any:
            if event == "line":
                lines.add(frame.f_lineno)
            return line

        lines.add(frame.f_lineno)
        return line

    def _take(self) -> dict[str, list[int]]:
        lines = {file: sorted(numbers) for file, numbers in self.lines.items()}
        self.lines.clear()
        return lines

    def pytest_collection_finish(self) -> None:
        self.at_import = self._take()

    def pytest_runtest_logstart(self) -> None:
        self._take()
        self.started = time.process_time()

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self.tests.append(Test(name=nodeid, seconds=time.process_time() - self.started, lines=self._take()))

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.failures.append(report.nodeid)

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.failures.append(f"{report.nodeid}: {str(report.longrepr)[-500:]}")


class Judge:
    """Pytest plugin of a mutant: keeps the chosen tests, in their order, and the name of the one that fails."""

    def __init__(self, names: Sequence[str]) -> None:
        self.rank = {name: number for number, name in enumerate(names)}
        self.killer = ""

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items[:] = sorted((i for i in items if i.nodeid in self.rank), key=lambda item: self.rank[item.nodeid])

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and not self.killer:
            self.killer = report.nodeid

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed and not self.killer:
            self.killer = f"import of {report.nodeid}"


@dataclass(kw_only=True)
class Run:
    """A forked process with tests.

    Attributes:
        copy: folder that it works in.
        pid: of the process.
        report: file that it writes at its end.
        begun: file that it writes when its tests begin.
        mended: text of the mutated file without the mutant, to be written back; by path.
        started: clock at its start.
        used: (seconds of processor time so far, clock when they last grew).
    """

    copy: Path
    pid: int
    report: Path
    begun: Path
    mended: dict[Path, str] = field(default_factory=dict)
    started: float = 0.0
    used: tuple[float, float] = (0.0, 0.0)

    def poll(self) -> dict[str, Any] | None:
        """Return None while the process runs; then its result, with the file as it was before.

        The result has "outcome", "killer" and "seconds" by the clock. The outcome is "killed", "survived" or "timeout";
        or "error" if the process ended before its tests began, or pytest itself failed: nothing is known then.
        """
        pid, status, _ = os.wait4(self.pid, os.WNOHANG)
        late = not pid and self._waits()
        if not pid and not late:
            return None
        if not pid:
            _kill(self.pid)
            _, status, _ = os.wait4(self.pid, 0)
        self._mend()
        result: dict[str, Any] = {"killer": ""}
        if self.report.exists():
            result |= json.loads(self.report.read_text(encoding="utf-8"))
            self.report.unlink()
        out_of_time = late or (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU)
        code = os.waitstatus_to_exitcode(status)
        begun = self.begun.exists()
        self.begun.unlink(missing_ok=True)
        if not begun or (code in PYTEST_FAILS and not result["killer"]):
            result |= {"outcome": "error", "killer": f"exit status {code}"}
        elif out_of_time:
            result["outcome"] = "timeout"
        elif code in (0, NO_TESTS):
            result["outcome"] = "survived"
        else:
            result["outcome"] = "killed"
            result["killer"] = result["killer"] or f"exit status {code}"
        result["seconds"] = round(time.monotonic() - self.started, 2)
        return result

    def _waits(self) -> bool:
        """Whether the process and its children have used no processor time for WAIT_S."""
        now = time.monotonic()
        try:
            process = psutil.Process(self.pid)
            times = [one.cpu_times() for one in (process, *process.children(recursive=True))]
        except psutil.NoSuchProcess:
            return False
        seconds = sum(one.user + one.system for one in times)
        if not self.used[1] or seconds > self.used[0] + 0.05:
            self.used = seconds, now
        return now - self.used[1] > WAIT_S

    def stop(self) -> None:
        """End the process."""
        _kill(self.pid)
        os.wait4(self.pid, 0)
        self._mend()

    def _mend(self) -> None:
        _kill(self.pid)  # children that the tests left behind
        for path, text in self.mended.items():
            path.write_text(text, encoding="utf-8", newline="")


NO_TESTS = 5
"""Exit status of pytest when no test is left: a mutant that takes parameters away from a test is no failure of it."""

PYTEST_FAILS = (3, 4)
"""Exit statuses of pytest after an error of its own, and after options that it does not take."""


def _kill(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def start(copy: Path, mutant: Mutant | None, names: Sequence[str]) -> Run:
    """Start the tests `names` on a mutant; None: on the code as it is."""
    mended = {}
    if mutant is not None:
        path = copy / mutant.file
        text = path.read_text(encoding="utf-8")
        mended[path] = text
        path.write_text(mutant.apply(text), encoding="utf-8", newline="")
    judge = Judge(names)
    files = list(dict.fromkeys(name.partition("::")[0] for name in names))
    run = _fork(copy, judge, files, lambda: {"killer": judge.killer}, limited=True)
    run.mended = mended
    return run


def start_profile(copy: Path, test_file: str, files: Sequence[str]) -> Run:
    """Start a test file without mutants; its report is a Profile's fields."""
    recorder = Recorder(copy, files)

    def report() -> dict[str, Any]:
        tests = [{"name": t.name, "seconds": t.seconds, "lines": t.lines} for t in recorder.tests]
        return {"tests": tests, "at_import": recorder.at_import, "error": "; ".join(recorder.failures)}

    return _fork(copy, recorder, [test_file], report, limited=False)


def _fork(copy: Path, plugin: Any, files: Sequence[str], report: Any, *, limited: bool) -> Run:
    place, begun = copy.parent / "report.json", copy.parent / "begun"
    begun.unlink(missing_ok=True)
    pid = os.fork()
    if pid:
        return Run(copy=copy, pid=pid, report=place, begun=begun, started=time.monotonic())
    code = 1
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.setsid()
        os.chdir(copy)
        sys.path[:] = [str(copy), *(p for p in sys.path if Path(p).resolve() not in (HERE, HERE.parents[1]))]
        quiet = os.open(copy.parent / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        temporary = copy.parent / "tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        os.environ.update(TMPDIR=str(temporary), PYTHONPATH=str(copy))
        if limited:
            resource.setrlimit(resource.RLIMIT_CPU, (LIMIT_S, LIMIT_S + 5))
            used = psutil.Process().memory_info().vms
            resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, used + MEMORY_BYTES))
        import pytest

        begun.touch()
        if isinstance(plugin, Recorder):
            threading.settrace(plugin.trace)  # tests of workers run in threads
            sys.settrace(plugin.trace)
        code = int(pytest.main([*OPTIONS[0 if limited else 1 :], *MARKS, "--rootdir", str(copy), *files], [plugin]))
        sys.settrace(None)
        place.write_text(json.dumps(report()), encoding="utf-8")
    finally:
        os._exit(code)


HERE = Path(__file__).resolve().parent
