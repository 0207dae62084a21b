"""Tests of the mutants and of the tools of `make mutate`: what may change, the draw, the choice of tests, the score."""

from __future__ import annotations

import ast
import os
import time
import tomllib
from pathlib import Path

import mutate
import mutation_runs as runs
import pytest
from mutants import Mutant, draw, named_mutant, sites
from mutation_targets import AREAS, mutated_files, own_tests

SOURCE = '''"""Text."""

from typing import Literal

import torch

__all__ = ["step"]
LIMIT: float = 0.5


def step(x: "Tensor", kind: Literal["a", "b"] = "a", rate=2) -> "Tensor":
    """Text."""
    if x.ndim < 1:
        raise ValueError(f"ndim is {x.ndim + 1}, not {1 - 2}")
    ü = "é"; y = x - rate
    y += 1
    torch.seed(rate)
    return torch.clip(y.abs(), 0, max=rate) if not kind else y
'''


def changes(source: str) -> list[tuple[str, str]]:
    """(old, new) of all mutants of a source."""
    return [(one.old, one.new) for site in sites("a.py", source) for one in site.mutants]


def test_all_changes_of_a_source_by_hand() -> None:
    assert changes(SOURCE) == [
        ("0.5", "1.5"),
        ("0.5", "1.0"),
        ('"a"', "'XXa'"),
        ("2", "3"),
        ("2", "1"),
        ("x.ndim < 1", "(x.ndim <= 1)"),
        ("x.ndim < 1", "(x.ndim >= 1)"),
        ("1", "2"),
        ("1", "0"),
        ('"é"', "'XXé'"),
        ("x - rate", "(x + rate)"),
        ("y += 1", "y -= 1"),
        ("1", "2"),
        ("1", "0"),
        ("torch.seed(rate)", "None"),
        ("torch.clip(y.abs(), 0, max=rate)", "y.abs()"),
        ("torch.clip(y.abs(), 0, max=rate)", "torch.clip(y.abs(), 0)"),
        ("torch.clip(y.abs(), 0, max=rate)", "torch.clip(0, y.abs(), max=rate)"),
        ("y.abs()", "y"),
        ("0", "1"),
        ("0", "-1"),
        ("not kind", "kind"),
    ]


@pytest.mark.parametrize(
    ("text", "news"),
    [
        ("a * b", ["(a / b)", "(a + b)"]),
        ("a // b", ["(a * b)", "(a / b)"]),
        ("-a", ["a"]),
        ("+a", []),
        ("a is None", ["(a is not None)"]),
        ("a < b <= c", ["(a <= b <= c)", "(a >= b <= c)", "(a < b < c)", "(a < b > c)"]),
        ("a and b", ["(a or b)"]),
        ("True", ["False"]),
        ("0.0", ["1.0"]),
        ("b'a'", []),
        ("f'{1 + 2}'", []),
        ("f()", ["None"]),
        ("a.f()", ["a"]),
        ("f(a, a)", ["a"]),
        ("cast(Tensor[1], a * b)", ["(a / b)", "(a + b)"]),
        ("log.warning('text %s', 1)", []),
    ],
)
def test_changes_of_an_expression(text: str, news: list[str]) -> None:
    assert [new for _, new in changes(f"z = {text}")] == news


def test_nothing_below_these_statements_changes() -> None:
    for text in ("raise E(1 + 2)", "assert a, 'b'", "if TYPE_CHECKING:\n    x = 1", "@f(1)\ndef g(): pass", "x: f(1)"):
        assert changes(text) == [], text


def test_every_mutant_is_a_program_that_differs_at_one_place() -> None:
    source = SOURCE + "\n\nclass A:\n    b = (1 +\n        2)\n"
    for site in sites("a.py", source):
        for mutant in site.mutants:
            text = mutant.apply(source)
            assert ast.dump(ast.parse(text)) != ast.dump(ast.parse(source))
            assert text[: mutant.start] == source[: mutant.start]
            assert text[mutant.start :] == mutant.new + source[mutant.stop :]
    (last,) = [m for site in sites("a.py", source) for m in site.mutants if m.kind == "arithmetic" and m.lines[0] == 22]
    assert last.lines == (22, 23) and last.at_import and last.change == "1 + 2 -> (1 - 2)"


def test_the_draw_depends_on_the_seed_and_little_on_the_code() -> None:
    body = "".join(f"x{n} = a + {n}\n" for n in range(100))
    nodes = sites("a.py", body)
    keys = [one.key for one in draw(nodes, 40, 1)]
    assert len({(one.start, one.stop) for one in draw(nodes, 40, 1)}) == 40
    assert keys == [one.key for one in draw(nodes, 40, 1)]
    assert keys[:20] == [one.key for one in draw(nodes, 20, 1)]
    assert len(set(keys) & {one.key for one in draw(nodes, 40, 2)}) < 20
    shifted = [one.key for one in draw(sites("a.py", "y = 5\n" + body), 40, 1)]
    assert len(set(keys) & set(shifted)) >= 39
    with pytest.raises(ValueError, match="only 200 nodes for 201 mutants"):
        draw(nodes, 201, 1)


def test_a_named_mutant_stands_at_its_only_place() -> None:
    mutant = named_mutant("a.py", SOURCE, "x - rate", "x")
    assert mutant.apply(SOURCE) == SOURCE.replace("x - rate", "x")
    assert mutant.lines == (15, 15) and not mutant.at_import
    assert named_mutant("a.py", SOURCE, "0.5", "0.4").at_import
    with pytest.raises(ValueError, match="occurs 2 times"):
        named_mutant("a.py", SOURCE, "rate)", "2)")


def test_every_mutated_file_has_tests(repository: Path) -> None:
    files = mutated_files(repository)
    assert set(files.values()) == set(AREAS)
    assert {"components/training.py", "components/samplers/ddim.py", "pipelines/stream/ordering.py"} <= set(files)
    assert [file for file in files if not own_tests(repository, file)] == []
    tests = {test for file in files for test in own_tests(repository, file)}
    assert [test for test in sorted(tests) if not (repository / test).is_file()] == []
    assert own_tests(repository, "components/samplers/ddim.py")[0] == "tests/components/test_samplers.py"


def test_there_are_many_mutants_and_each_is_a_program(repository: Path) -> None:
    """Every fiftieth node is tried: all would take half a minute."""
    count = 0
    for file in mutated_files(repository):
        source = (repository / file).read_text(encoding="utf-8")
        for site in sites(file, source):
            count += 1
            if count % 50 == 0:
                for mutant in site.mutants:
                    ast.parse(mutant.apply(source))
    assert count > 5000


def test_survivors_have_reasons(repository: Path) -> None:
    entries = tomllib.loads((repository / "tests/mutation/survivors.toml").read_text(encoding="utf-8"))["survivor"]
    assert [one for one in entries if set(one) != {"file", "line", "change", "reason"}] == []
    assert [one for one in entries if len(one["reason"].split()) < 3] == []
    assert len({(one["file"], one["line"], one["change"]) for one in entries}) == len(entries)


def profile(**lines: list[int]) -> runs.Profile:
    """A profile of tests that run lines of a.py; the test named tN takes N seconds."""
    tests = [runs.Test(name=name, seconds=float(name[1:]), lines={"a.py": one}) for name, one in lines.items()]
    return runs.Profile(tests=tests, at_import={})


def test_the_fastest_tests_of_a_line_are_chosen() -> None:
    inside, outside = (named_mutant("a.py", SOURCE, text, "1") for text in ("x - rate", "0.5"))
    profiles = {"one": profile(t3=[15], t2=[14, 16], t1=[10, 15]), "two": profile(t4=[15], t9=[15])}
    assert runs.choose(inside, ["one", "two"], profiles) == ["t1", "t3", "t4"]
    assert runs.choose(inside, ["one"], profiles, budget=3.5) == ["t1"]
    assert runs.choose(outside, ["one"], profiles) == ["t1", "t2", "t3"]
    assert runs.fastest("a.py", ["one"], profiles, budget=3.5) == ["t1", "t2"]
    assert runs.choose(inside, [], profiles) == []
    reader = runs.Profile(tests=[runs.Test(name="t5", seconds=5, lines={})], at_import={"a.py": [1]})
    assert runs.choose(outside, ["reader"], {"reader": reader}) == ["t5"], "it may read the table and run no line"
    assert runs.choose(inside, ["reader"], {"reader": reader}) == []


def job(outcome: str, name: str = "", text: str = "x - rate") -> mutate.Job:
    """A finished job."""
    mutant = named_mutant("a.py", SOURCE, text, "x")
    return mutate.Job(name=name, mutant=mutant, file="a.py", tests=[], result={"outcome": outcome, "killer": "t"})


CONTROL = mutate.Job(name="control", file="a.py", tests=[], result={"outcome": "survived"})
REASON = {("a.py", 'ü = "é"; y = x - rate', "x - rate -> x"): "equal in all cases"}


@pytest.mark.parametrize(
    ("controls", "jobs", "reasons", "problem"),
    [
        ([CONTROL], [job("killed")] * 8 + [job("timeout"), job("survived")], REASON, ""),
        ([CONTROL], [job("killed")] * 8 + [job("survived")] * 2, REASON, "80.0% of the drawn mutants die"),
        ([CONTROL], [job("killed")] * 9 + [job("survived")], {}, "no reason in survivors.toml: a.py:15"),
        ([CONTROL], [job("killed"), job("survived", name="n")], REASON, "the named mutant 'n' survives"),
        ([CONTROL], [job("killed"), mutate.Job(file="a.py", tests=[])], REASON, "1 mutants have no result"),
        ([job("killed", name="control")], [job("killed")], REASON, "tests of a.py fail without a mutant"),
    ],
)
def test_the_exit_status(
    controls: list[mutate.Job],
    jobs: list[mutate.Job],
    reasons: dict[tuple[str, str, str], str],
    problem: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert mutate.report(controls, jobs, {"a.py": "samplers"}, reasons) == bool(problem)
    output = capsys.readouterr().out
    assert problem in output and ("PROBLEM" in output) == bool(problem)


def test_results_survive_a_stop(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    book = mutate.Book(path)
    book.add("a", {"outcome": "killed"})
    book.add("a", {"outcome": "survived"})
    with path.open("a") as stream:
        stream.write('{"key": "b", "outc')
    assert mutate.Book(path).entries == {"a": {"key": "a", "outcome": "survived"}}


def test_a_survivor_of_other_tests_runs_again(tmp_path: Path) -> None:
    book = mutate.Book(tmp_path / "results.jsonl")
    survivor, victim = (mutate.Job(name="n", file=file, tests=[], names=["t1", "t2"]) for file in ("a.py", "b.py"))
    for one, outcome in ((survivor, "survived"), (victim, "killed")):
        book.add(one.key, {"outcome": outcome, "names": ["t1"]})
    assert mutate.known_result(survivor, book) == {}
    assert mutate.known_result(victim, book)["outcome"] == "killed"
    survivor.names = ["t1"]
    assert mutate.known_result(survivor, book)["outcome"] == "survived"


def test_a_result_is_good_for_its_files_only(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    (tmp_path / "b").write_text("2")
    (tmp_path / "c").write_text("1")
    digests = {mutate.digest(*(tmp_path / n for n in names)) for names in ("a", "b", "ab", "ba")}
    assert len(digests) == 4
    assert mutate.digest(tmp_path / "c") == mutate.digest(tmp_path / "a")


def forked(work: str, begun: Path) -> runs.Run:
    """A child process that runs Python code, as a Run; its tests began if there is a file `begun`."""
    pid = os.fork()
    if pid == 0:
        os.setsid()
        os.execv(os.sys.executable, [os.sys.executable, "-c", work])  # type: ignore[attr-defined]
    return runs.Run(copy=Path(), pid=pid, report=Path("/nowhere"), begun=begun, started=time.monotonic())


@pytest.mark.parametrize(
    ("work", "outcome"),
    [
        ("pass", "survived"),
        ("raise SystemExit(5)", "survived"),
        ("raise SystemExit(1)", "killed"),
        ("raise SystemExit(4)", "error"),
        ("import os; os.abort()", "killed"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGXCPU)", "timeout"),
    ],
)
def test_outcomes_of_a_process(work: str, outcome: str, tmp_path: Path) -> None:
    file = tmp_path / "a.py"
    file.write_text("changed")
    for begun in (True, False):
        if begun:
            (tmp_path / "begun").touch()
        run = forked(work, tmp_path / "begun")
        run.mended = {file: "as before\r\n"}
        while (result := run.poll()) is None:
            time.sleep(0.01)
        assert result["outcome"] == (outcome if begun else "error")
        assert file.read_bytes() == b"as before\r\n"


def test_a_process_that_waits_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "WAIT_S", 0.3)
    (tmp_path / "begun").touch()
    run = forked("import time; time.sleep(60)", tmp_path / "begun")
    while (result := run.poll()) is None:
        time.sleep(0.05)
    assert result["outcome"] == "timeout"


def test_copies_hold_the_files_and_no_stale_bytecode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A changed source of the same size and time is compiled anew, and the tree is not touched."""
    root = tmp_path / "tree" / "main"
    (root / "components").mkdir(parents=True)
    (root.parent / "shared").mkdir()
    (root / "components" / "__init__.py").touch()
    source = root / "components" / "a.py"
    source.write_text("X = 1\n")
    (root / ".gitignore").write_text("secret\n")
    (root / "secret").write_text("x")
    runs.subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    copies = runs.make_copies(root, tmp_path / "copies", 2)
    assert [sorted(p.name for p in copy.iterdir() if p.name != "__pycache__") for copy in copies] == [
        [".gitignore", "components"]
    ] * 2
    assert (copies[1].parent / "shared").resolve() == root.parent / "shared"
    for copy in copies:
        (compiled,) = (copy / "components" / "__pycache__").glob("a.*.pyc")
        before = (copy / "components" / "a.py").stat()
        (copy / "components" / "a.py").write_text("X = 2\n")
        os.utime(copy / "components" / "a.py", ns=(before.st_atime_ns, before.st_mtime_ns))
        kept = compiled.read_bytes()
        output = runs.subprocess.run(
            [runs.sys.executable, "-B", "-c", "import components.a; print(components.a.X)"],
            cwd=copy,
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        assert output == "2\n" and compiled.read_bytes() == kept
    assert source.read_text() == "X = 1\n" and not (root / "components" / "__pycache__").exists()


def test_a_mutant_has_one_line_for_people() -> None:
    mutant = named_mutant("a.py", SOURCE, "y += 1\n    torch.seed(rate)", "pass")
    assert mutant.change == "y += 1 torch.seed(rate) -> pass"
    assert isinstance(mutant, Mutant) and mutant.key == "a.py\ny += 1\ny += 1 torch.seed(rate) -> pass\n0"
