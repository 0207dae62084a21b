"""Secrets typed into a source's storage: no file below the corpus, no message and no output holds them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem

from components.corpora import CorpusSpec, SourceSpec
from components.images import encode_png
from components.synthetic import dead_leaves
from pipelines.commands.main import build_app
from pipelines.core.errors import Failure, RestorayError, UsageError
from pipelines.corpus.catalogue import describe, load_spec
from pipelines.curation.curate import curate, saved_spec
from pipelines.curation.sources import candidates, list_parts, stores
from pipelines.runs.stages import curate_identity
from pipelines.runs.verb import CurateSettings

SECRET = "0123-s3cr3t"
TYPED = (
    f"sources.0.storage.secret={SECRET}",
    "sources.0.storage.key=00777123",
    f"sources.0.storage.client_kwargs.headers.Authorization=Bearer {SECRET}",
    f"sources.0.storage.endpoint_url=http://u:{SECRET}@127.0.0.1:9",
    "sources.0.storage.auto_mkdir=false",
)


@pytest.fixture
def corpus_spec(tmp_path: Path) -> Path:
    """A spec whose pictures come from a store that takes any option."""
    for number in range(6):
        path = tmp_path / "in" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encode_png(dead_leaves(64, 3, number)))
    path = tmp_path / "s.yaml"
    path.write_text(f"name: s\nsources: [{{kind: folder, path: 'file://{tmp_path / 'in'}'}}]\n")
    return path


def files_with(folder: Path, *texts: str) -> list[str]:
    """Files below a folder whose bytes hold one of the texts."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return [path.name for path in files if any(text.encode() in path.read_bytes() for text in texts)]


def test_typed_secrets_reach_the_store_as_texts(corpus_spec: Path) -> None:
    storage = load_spec(corpus_spec, TYPED).sources[0].storage
    assert (storage["secret"], storage["key"], storage["auto_mkdir"]) == (SECRET, "00777123", False)


def test_printed_specs_and_digests_lack_secrets(corpus_spec: Path, tmp_path: Path, capsys: Any) -> None:
    for more in ((), ("--json",)):
        build_app()(["curate", str(corpus_spec), *TYPED, "--dry-run", *more], standalone_mode=False)
    shown = capsys.readouterr()
    assert SECRET not in shown.out + shown.err and "00777123" not in shown.out
    assert "auto_mkdir" in shown.out

    text = corpus_spec.read_text()
    digests = []
    for number, secret in enumerate((SECRET, "another")):
        path = tmp_path / f"{number}.yaml"
        path.write_text(text.replace("{kind", f"{{storage: {{password: {secret}}}, kind"))
        assert secret not in "\n".join(describe(path).lines()) + json.dumps(describe(path).to_json())
        digests.append(curate_identity(CurateSettings(spec=str(path)), None, None))
    assert digests[0] == digests[1] == curate_identity(CurateSettings(spec=str(corpus_spec)), None, None)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_no_file_of_a_corpus_holds_a_secret(corpus_spec: Path, tmp_path: Path, capfd: Any) -> None:
    out = tmp_path / "out"
    first = curate(load_spec(corpus_spec, TYPED), out)
    assert first.accepted == 6
    assert files_with(out, SECRET, "00777123") == []
    shown = capfd.readouterr()
    assert SECRET not in shown.out + shown.err
    saved = saved_spec(out, [f"sources.0.storage.secret={SECRET}"])
    assert saved.sources[0].storage["secret"] == SECRET
    again = curate(load_spec(corpus_spec, TYPED), out)
    assert (again.digest, again.reused) == (first.digest, 6)


class Talkative(LocalFileSystem):  # type: ignore[misc]
    """A store whose errors repeat its options."""

    protocol = "talkative"

    def __init__(self, secret: str = "", fault: type[Exception] = ValueError, **options: Any) -> None:
        super().__init__(**options)
        self.secret, self.fault = secret, fault

    def _fail(self, *_: Any, **__: Any) -> Any:
        raise self.fault(f"secret {self.secret!r} was refused")

    find = glob = cat_file = _fail


@pytest.mark.parametrize("fault", [ValueError, PermissionError, RuntimeError, TypeError])
def test_errors_of_a_store_lack_its_secrets(fault: type[Exception]) -> None:
    fsspec.register_implementation("talkative", Talkative, clobber=True)
    storage = {"secret": SECRET, "fault": fault}
    for act in (
        lambda: list(stores.list_files("talkative://x", storage)),
        lambda: list(stores.list_files("talkative://x/*.tar", storage)),
        lambda: stores.read_range("talkative://x", storage, 0, 1),
    ):
        with pytest.raises((RestorayError, OSError), match="was refused") as caught:
            act()
        error: BaseException | None = caught.value
        while error is not None:  # what a traceback prints
            assert SECRET not in str(error)
            error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def test_a_secret_that_was_not_stored_is_asked_for(corpus_spec: Path) -> None:
    fsspec.register_implementation("talkative", Talkative, clobber=True)
    spec = load_spec(corpus_spec, ["sources.0.storage.secret=<secret, not stored>"])
    with pytest.raises(Failure, match="Its options secret are secrets, which no file holds: type them again"):
        list(stores.list_files("talkative://x", spec.sources[0].storage))


@pytest.mark.parametrize("address", ["s3://KEY:SECRET@bucket/x.tar", "https://a/x.tar?sv=1&sig=SECRET"])
def test_an_address_with_a_secret_is_refused_without_repeating_it(address: str) -> None:
    with pytest.raises(UsageError, match="holds a password or a signature") as caught:
        stores.open_store(address, {})
    assert "SECRET" not in str(caught.value)


@pytest.mark.parametrize(
    "override",
    [f"sources.0.storage=[{SECRET}", f"sources.0.storage={{a: {SECRET}", f"sources.0.storage.secret: {SECRET}"],
)
def test_a_mistyped_option_is_named_without_its_value(corpus_spec: Path, override: str) -> None:
    with pytest.raises(UsageError, match=r"sources\.0\.storage") as caught:
        load_spec(corpus_spec, [override])
    assert SECRET not in str(caught.value)


def test_an_address_with_a_password_is_quarantined_without_it(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(f"https://me:{SECRET}@example.org/a.jpg\n")
    spec = CorpusSpec(name="t", sources=[SourceSpec(kind="urls", path=str(tmp_path / "a.txt"))])
    (part,) = list_parts(spec, tmp_path / "out").parts
    (row,) = candidates(part, spec, tmp_path / "out", lambda _: False)
    assert row.problem is not None and row.problem.code == "bad_url"
    assert row.source == "https://...@example.org/a.jpg" and SECRET not in str(row.problem)
