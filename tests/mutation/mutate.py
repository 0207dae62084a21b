"""`make mutate`: do the tests see wrong mathematics? The score of mutants that a seed draws, and of those with names.

    make mutate                              200 drawn mutants and all named ones
    make mutate ARGS="--draw 400 --seed 3"   others
    make mutate ARGS="--only ddim --draw 0 --all"    every mutant of the matching files

Each mutant runs against its file's own tests (mutation_targets.py), with a limit of 20 s. It is dead if a test fails or
the time runs out. Results go to OUT/results.jsonl as they come; a second run does only what is new, what changed, and
what has other tests now. Survivors stand in survivors.toml, each with its reason.

The exit status is 0 if all named mutants die, at least 90 % of the drawn ones do, every survivor has its reason, and
the tests pass on the code as it is; else 1.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import signal
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import mutation_runs as runs
from mutants import Mutant, Site, draw, named_mutant, sites
from mutation_targets import mutated_files, own_tests
from named import NAMED

ROOT = Path(__file__).resolve().parents[2]
SURVIVORS = Path(__file__).with_name("survivors.toml")
PROFILER = "tests/mutation/mutation_runs.py"  # profiles of another version of it are no good
LOWEST_SCORE = 0.9
DEAD = ("killed", "timeout")


@dataclass(kw_only=True)
class Job:
    """One run of tests: a mutant, or a control without one.

    Attributes:
        name: of a named mutant or a control; "" for a drawn one.
        mutant: None for a control.
        file: mutated file.
        tests: test files.
        names: tests to run, from the profiles.
        digest: of the mutated file and the test files: a result is good while it stays the same.
        result: of the run.
    """

    name: str = ""
    mutant: Mutant | None = None
    file: str
    tests: list[str]
    names: list[str] = field(default_factory=list)
    digest: str = ""
    result: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Key in the file of results."""
        return f"{self.mutant.key if self.mutant else 'control ' + self.file}\n{self.digest}"


@cache
def digest(*places: Path) -> str:
    """Hash of the contents of files."""
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in places)).hexdigest()[:16]


class Book:
    """A file of JSON lines that keeps results by key; the last line of a key counts."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: dict[str, dict[str, Any]] = {}
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
            try:
                entry = json.loads(line)
            except ValueError:  # the line that was written when the run was stopped
                continue
            self.entries[entry["key"]] = entry

    def add(self, key: str, entry: dict[str, Any]) -> None:
        """Append an entry."""
        self.entries[key] = {"key": key, **entry}
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(self.entries[key]) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    options = _options(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the copies go
    begin = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="mutants-"))
    try:
        copies = runs.make_copies(ROOT, folder, options.processes)
        tree = copies[0]
        areas = {name: area for name, area in mutated_files(tree).items() if _fits(name, options)}
        nodes = [site for file in areas for site in sites(file, (tree / file).read_text(encoding="utf-8"))]
        jobs = _jobs(tree, nodes, options)
        print(f"{len(jobs)} mutants of {len(nodes)} nodes in {len(areas)} files", flush=True)
        runs.load_libraries()
        controls = [
            Job(name="control", file=file, tests=own_tests(tree, file))
            for file in dict.fromkeys(job.file for job in jobs)
        ]
        profiles = _profile([*jobs, *controls], copies, options)
        for job in [*controls, *jobs]:
            job.digest = digest(*(tree / name for name in (job.file, *job.tests)))
            job.names = (
                runs.choose(job.mutant, job.tests, profiles)
                if job.mutant
                else runs.fastest(job.file, job.tests, profiles)
            )
        _run([*controls, *jobs], copies, options, begin)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return report(controls, jobs, areas, _reasons())


def _fits(file: str, options: argparse.Namespace) -> bool:
    return any(part in file for part in options.only or [""])


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Do the tests see wrong mathematics?")
    parser.add_argument("--draw", type=int, default=200, help="number of drawn mutants (default: 200)")
    parser.add_argument("--seed", type=int, default=18, help="seed of the draw (default: 18)")
    parser.add_argument("--processes", type=int, default=2, help="mutants at a time (default: 2)")
    parser.add_argument("--minutes", type=float, default=90, help="stop after so many minutes (default: 90)")
    parser.add_argument("--only", action="append", help="only files whose path contains this text; may be repeated")
    parser.add_argument("--all", action="store_true", help="every node instead of a draw")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "mutation", help="folder of the results")
    options = parser.parse_args(argv)
    if options.draw < 0 or options.processes < 1:
        parser.error("--draw must not be negative, and --processes must be at least 1")
    return options


def _jobs(tree: Path, nodes: Sequence[Site], options: argparse.Namespace) -> list[Job]:
    jobs = []
    for one in NAMED:
        if _fits(one.file, options):
            mutant = named_mutant(one.file, (tree / one.file).read_text(encoding="utf-8"), one.old, one.new)
            jobs.append(
                Job(name=one.name, mutant=mutant, file=one.file, tests=[test.partition("::")[0] for test in one.tests])
            )
    count = len(nodes) if options.all else min(options.draw, len(nodes))
    for mutant in draw(nodes, count, options.seed):
        jobs.append(Job(mutant=mutant, file=mutant.file, tests=own_tests(tree, mutant.file)))
    return jobs


def _profile(jobs: Sequence[Job], copies: Sequence[Path], options: argparse.Namespace) -> dict[str, runs.Profile]:
    """Profile the test files, and keep the profiles of those that did not change since."""
    book = Book(options.out / "profiles.jsonl")
    tree = copies[0]
    files = sorted({*mutated_files(tree), *(job.file for job in jobs)})
    profiles: dict[str, runs.Profile] = {}
    new = []
    for test in dict.fromkeys(test for job in jobs for test in job.tests):
        entry = book.entries.get(test)
        digests = {PROFILER: "", **entry["digests"]} if entry else {"": ""}
        if entry and all((tree / f).is_file() and digest(tree / f) == d for f, d in digests.items()):
            profiles[test] = runs.profile_of(entry)
        else:
            new.append(test)
    for test, result in _in_processes(new, copies, lambda copy, test: runs.start_profile(copy, test, files)):
        profile = runs.profile_of(result)
        if profile.error:
            raise SystemExit(f"tests fail without a mutant: {profile.error}")
        profiles[test] = profile
        touched = {test, PROFILER, *profile.at_import, *(file for one in profile.tests for file in one.lines)}
        fields = {name: result[name] for name in ("tests", "at_import", "error")}
        book.add(test, {"digests": {file: digest(tree / file) for file in sorted(touched)}, **fields})
        print(f"profile {len(profiles)}: {test}, {len(profile.tests)} tests, {result['seconds']:.0f} s", flush=True)
    return profiles


def known_result(job: Job, book: Book) -> dict[str, Any]:
    """The job's result from an earlier run; empty if there is none, or if it survived without some of its tests."""
    result = book.entries.get(job.key, {})
    if result.get("outcome") == "survived" and not set(job.names) <= set(result.get("names", [])):
        return {}
    return result


def _run(jobs: Sequence[Job], copies: Sequence[Path], options: argparse.Namespace, begin: float) -> None:
    """Run the jobs that have no result yet; stop when the minutes are over."""
    book = Book(options.out / "results.jsonl")
    new = []
    for job in jobs:
        job.result = known_result(job, book)
        if not job.result and not job.names:
            job.result = {"outcome": "survived", "killer": "", "note": "no test runs this line"}
        if not job.result:
            new.append(job)
    start = time.monotonic()

    def start_job(copy: Path, job: Job) -> runs.Run | None:
        if time.monotonic() - begin > 60 * options.minutes:
            return None
        return runs.start(copy, job.mutant, job.names)

    for done, (job, result) in enumerate(_in_processes(new, copies, start_job), 1):
        if result["outcome"] != "error":  # else the next `make mutate` runs it again
            job.result = result
            book.add(job.key, {**result, "names": job.names})
        rate = done / (time.monotonic() - start)
        change = f"{job.file}:{job.mutant.lines[0]} {job.name or job.mutant.change}" if job.mutant else job.file
        left = (len(new) - done) / rate / 60
        print(
            f"{done}/{len(new)} {60 * rate:.0f} a minute, {left:.0f} min left: {result['outcome']}"
            f" in {result['seconds']:.0f} s: {change[:120]}",
            flush=True,
        )


def _in_processes(
    items: Sequence[Any], copies: Sequence[Path], begin: Callable[[Path, Any], runs.Run | None]
) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Yield (item, result) as runs end, with one run at a time in each copy; no new run after `begin` returns None."""
    waiting = list(items)
    free = list(copies)
    active: list[tuple[Any, runs.Run]] = []
    try:
        while waiting or active:
            while waiting and free:
                run = begin(free[-1], waiting[0])
                if run is None:
                    waiting.clear()
                    break
                active.append((waiting.pop(0), run))
                free.pop()
            time.sleep(0.05)
            for item, run in list(active):
                result = run.poll()
                if result is not None:
                    active.remove((item, run))
                    free.append(run.copy)
                    yield item, result
    finally:
        for _, run in active:
            run.stop()


def _reasons() -> dict[tuple[str, str, str], str]:
    """Return the reasons of survivors.toml by (file, line, change)."""
    document = tomllib.loads(SURVIVORS.read_text(encoding="utf-8")) if SURVIVORS.exists() else {}
    return {(one["file"], one["line"], one["change"]): one["reason"] for one in document.get("survivor", [])}


def report(
    controls: Sequence[Job], jobs: Sequence[Job], areas: dict[str, str], reasons: dict[tuple[str, str, str], str]
) -> int:
    """Print the tables; return the exit status."""
    named = [job for job in jobs if job.name]
    drawn = [job for job in jobs if not job.name]
    problems = []
    failed = [job for job in controls if job.result.get("outcome") != "survived"]
    problems += [
        f"tests of {job.file} fail without a mutant: {job.result.get('killer', 'no result')}" for job in failed
    ]
    missing = [job for job in jobs if not job.result]
    if missing:
        problems.append(f"{len(missing)} mutants have no result: run make mutate again to go on")
    print("\narea          drawn  dead  score")
    for area in dict.fromkeys(areas.values()):
        part = [job for job in drawn if areas[job.file] == area]
        if part:
            print(f"{area:12} {len(part):6} {_dead(part):5} {_dead(part) / len(part):6.1%}")
    if drawn:
        score = _dead(drawn) / len(drawn)
        print(f"{'all':12} {len(drawn):6} {_dead(drawn):5} {score:6.1%}")
        if score < LOWEST_SCORE:
            problems.append(f"{score:.1%} of the drawn mutants die, and {LOWEST_SCORE:.0%} must")
    print(f"\nnamed: {_dead(named)} of {len(named)} die")
    for job in named:
        print(f"  {job.result.get('outcome', 'no result'):9} {job.name}: {job.result.get('killer', '')}")
        if job.result and job.result["outcome"] not in DEAD:
            problems.append(f"the named mutant {job.name!r} survives")
    survivors = [job for job in drawn if job.result.get("outcome") == "survived"]
    print(f"\nsurvivors: {len(survivors)}")
    for job in sorted(survivors, key=lambda one: (one.file, one.mutant.start if one.mutant else 0)):
        assert job.mutant is not None
        reason = reasons.get((job.file, job.mutant.line, job.mutant.change), "")
        if not reason:
            problems.append(f"no reason in survivors.toml: {job.file}:{job.mutant.lines[0]}: {job.mutant.change}")
        note = job.result.get("note") or f"{len(job.names)} tests"
        print(f"  {job.file}:{job.mutant.lines[0]} [{note}]\n    {job.mutant.line}\n    {job.mutant.change}")
        print(f"    reason: {reason or 'NONE'}")
    for problem in problems:
        print(f"PROBLEM: {problem}")
    return 1 if problems else 0


def _dead(jobs: Sequence[Job]) -> int:
    return sum(job.result.get("outcome") in DEAD for job in jobs)


if __name__ == "__main__":
    sys.exit(main())
