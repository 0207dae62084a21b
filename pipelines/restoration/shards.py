"""Results as tars and tables: one for each tar or table of the input, written whole.

A worker restores a shard's pictures into a temporary folder of its machine, packs them and puts the shard in place at
once; then its rows go to the driver. So a kill costs the shards in work, and a shard is redone as a whole: also if one
of its pictures changed. A shard is up to date if all its pictures are, and its file has the recorded sha256. A broken
picture stays in the quarantine without a second try while its bytes are the same.

    tar        members KEY.SUFFIX in the order of the input; other members of the input are not copied
    parquet    the rows and the other columns of the input; the cell of a quarantined picture is null

The rows of records.jsonl have the shard as `output`, and also `member` and `shard_sha256`.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from components.naming import printable
from components.picture_files import probe_file
from components.restoring import picture_key
from components.types import SampleError
from components.writing import write_error_reason
from pipelines.core.errors import RetryLater, UsageError, unknown
from pipelines.core.pictures import make_keys
from pipelines.core.places.files import sha256_of, upload
from pipelines.core.places.place import Place, Where
from pipelines.restoration.parts import BYTES_FIELD, TABLES, TARS, Part, Source, open_stream
from pipelines.restoration.worker import RESTORER_CODES, Answer, RestoreWorker, Task, WorkerSettings

FORMS: Mapping[str, tuple[str, ...]] = {"files": (), "tar": TARS, "parquet": TABLES}
"""Forms of the results, and suffixes of the inputs that they need."""

MARK = "restoray"
"""What our tars have as comment and our tables as key of their metadata."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """The pictures of one tar or table.

    Attributes:
        output: path of the result below the job's folder.
        prefix: beginning of the keys that the members' names leave out.
        tasks: the pictures in the order of the input.
        rejects: rows of the earlier quarantine by key.
    """

    output: str
    prefix: str
    tasks: tuple[Task, ...]
    rejects: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def check_form(form: str, pictures: Mapping[str, Source]) -> None:
    """Check that the inputs have the form that the results shall have.

    Raises:
        UsageError: they do not, or there is no such form.
    """
    if form not in FORMS:
        raise unknown("form of results", form, tuple(FORMS))
    for source in pictures.values() if form != "files" else ():
        if not isinstance(source, Part) or not source.container.name.lower().endswith(FORMS[form]):
            kind = "tars" if form == "tar" else "parquet files"
            raise UsageError(f"--out-form {form} needs {kind} as input, and {printable(str(source))} is in none.")


def shards_of(tasks: Sequence[Task], root: Where, form: str, rejects: Mapping[str, Mapping[str, Any]]) -> list[Shard]:
    """Group the pictures of tars or tables by their files; `root` is where the names of the results start."""
    groups: dict[Where, list[Task]] = {}
    for task in tasks:
        assert isinstance(task.source, Part), "checked"
        groups.setdefault(task.source.container, []).append(task)
    names = make_keys([_name(container, root) for container in groups])
    return [
        Shard(
            output=f"{name}.{form}",
            prefix="" if container == root else f"{picture_key(_name(container, root).rpartition('.')[0])}/",
            tasks=tuple(members),
            rejects={task.key: rejects[task.key] for task in members if task.key in rejects},
        )
        for name, (container, members) in zip(names, groups.items(), strict=True)
    ]


def shard_names(pictures: Mapping[str, Source], root: Where, form: str) -> list[str]:
    """Paths of the results below the job's folder."""
    containers = dict.fromkeys(source.container for source in pictures.values() if isinstance(source, Part))
    return [f"{name}.{form}" for name in make_keys([_name(container, root) for container in containers])]


def _name(container: Where, root: Where) -> str:
    if isinstance(container, Place):
        same = container == root or not isinstance(root, Place)
        return container.name if same else container.relative_to(root).as_posix()  # type: ignore[arg-type]
    top = Path(str(root)).absolute()
    return container.name if container == top else container.relative_to(top).as_posix()


def is_shard(path: Where) -> bool:
    """Whether a tar or a table is a result of ours."""

    try:
        with open_stream(path) as stream:
            if path.name.endswith(TARS):
                with tarfile.open(fileobj=stream, mode="r:") as archive:
                    archive.next()
                    return archive.pax_headers.get("comment") == MARK
            with pq.ParquetFile(stream) as file:
                return MARK.encode() in (file.schema_arrow.metadata or {})
    except (OSError, ValueError, tarfile.TarError):
        return False


class ShardWorker:
    """Restores whole shards; a job is a shard, and its answer the list of its pictures' answers.

    Args:
        settings: as of a RestoreWorker.
        form: "tar" or "parquet".
    """

    def __init__(self, settings: WorkerSettings, form: str) -> None:
        self.settings, self.form = settings, form
        self.worker = RestoreWorker(settings)

    def __call__(self, shards: Sequence[Shard]) -> list[list[Answer]]:
        return [self._restore(shard) for shard in shards]

    def _restore(self, shard: Shard) -> list[Answer]:
        try:
            answers = self._answers_of_before(shard)
            return self._write(shard) if answers is None else answers
        except RetryLater as error:
            return _fatal(shard, str(error), later=True)
        except OSError as error:
            return _fatal(shard, f"cannot write {self.settings.out / shard.output}: {write_error_reason(error)}")

    def _answers_of_before(self, shard: Shard) -> list[Answer] | None:
        """The answers if the shard is up to date; None if it must be written."""
        answers = []
        digests = {task.record.get("shard_sha256") for task in shard.tasks if task.key not in shard.rejects}
        path = self.settings.out / shard.output
        try:
            is_current = digests == {sha256_of(path)} if digests else is_shard(path)
        except OSError:
            return None
        if not is_current:
            return None
        for task in shard.tasks:
            data = b""
            try:
                data = self.worker.read(task.source)
                reference = self.worker.read_reference(task.reference) if task.reference is not None else b""
            except SampleError:
                if task.key not in shard.rejects:
                    return None
                reference = b""
            if task.key in shard.rejects:
                if not self._is_final(shard.rejects[task.key], data):
                    return None
                answers.append(Answer(status="quarantined", row=shard.rejects[task.key]))
            elif self.worker.matches(replace(task, picture=replace(task.picture, data=data, reference=reference))):
                answers.append(Answer(status="skipped", row={"key": task.key}))
            else:
                return None
        return answers

    def _is_final(self, row: Mapping[str, Any], data: bytes) -> bool:
        """Whether a picture would be refused again: the same bytes, and no fault of the restorer or of a limit."""
        if row.get("code") in RESTORER_CODES or row.get("bytes_sha256") != (_sha256(data) if data else ""):
            return False
        if row.get("code") != "too_large":
            return True
        try:
            probe_file(data, self.settings.limits)
        except SampleError:
            return True
        return False

    def _write(self, shard: Shard) -> list[Answer]:
        """Restore all pictures of a shard and put it in place."""
        with tempfile.TemporaryDirectory(prefix="restoray-") as name:
            folder = Path(name)
            self.worker.settings = replace(self.settings, out=folder / "pictures")
            answers = self.worker([replace(task, record={}) for task in shard.tasks])
            if any(answer.status == "fatal" for answer in answers):
                return answers
            draft = folder / "shard"
            rows = {answer.row["key"]: answer.row for answer in answers if answer.status == "restored"}
            names = {key: row["output"].removeprefix(shard.prefix) for key, row in rows.items()}
            if self.form == "tar":
                _write_tar(
                    draft,
                    [(names[t.key], folder / "pictures" / rows[t.key]["output"]) for t in shard.tasks if t.key in rows],
                )
            else:
                _write_table(draft, shard, {key: folder / "pictures" / row["output"] for key, row in rows.items()})
            if self.settings.fence is not None:
                self.settings.fence.check()
            target = self.settings.out / shard.output
            target.parent.mkdir(parents=True, exist_ok=True)
            upload(target, draft)
            facts = {"output": shard.output, "shard_sha256": sha256_of(draft)}
        return [
            replace(answer, row={**answer.row, **facts, "member": names[answer.row["key"]]})
            if answer.status == "restored"
            else answer
            for answer in answers
        ]


def _write_tar(target: Path, members: Sequence[tuple[str, Path]]) -> None:
    """Write a tar of these (name, file); equal files give equal bytes."""
    headers = {"comment": MARK}
    with tarfile.open(target, "w", format=tarfile.PAX_FORMAT, pax_headers=headers) as archive:
        for name, path in members:
            info, data = tarfile.TarInfo(name), path.read_bytes()
            info.size, info.mode = len(data), 0o644
            archive.addfile(info, io.BytesIO(data))


def _write_table(target: Path, shard: Shard, files: Mapping[str, Path]) -> None:
    """Write the input's table with other cells in the column of the pictures."""

    cells: dict[tuple[int, int], Path | None] = {}
    for task in shard.tasks:
        assert isinstance(task.source, Part)
        cells[task.source.group, task.source.row] = files.get(task.key)
    first = shard.tasks[0].source
    assert isinstance(first, Part)
    with open_stream(first.container) as stream, pq.ParquetFile(stream) as file:
        schema = file.schema_arrow
        at, kind = schema.get_field_index(first.column), schema.field(first.column).type
        schema = schema.set(at, pa.field(first.column, kind)).with_metadata({**(schema.metadata or {}), MARK: "1"})
        with pq.ParquetWriter(target, schema) as writer:
            for group in range(file.num_row_groups):
                table = file.read_row_group(group)
                values: list[Any] = []
                for row in range(table.num_rows):
                    path = cells.get((group, row))
                    data = path.read_bytes() if path is not None else None
                    values.append({BYTES_FIELD: data} if data is not None and pa.types.is_struct(kind) else data)
                writer.write_table(table.set_column(at, schema.field(at), pa.array(values, kind)).cast(schema))


def _fatal(shard: Shard, detail: str, later: bool = False) -> list[Answer]:
    row = {"detail": detail, **({"later": True} if later else {})}
    return [Answer(status="fatal", row={"key": task.key, **row}) for task in shard.tasks]


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
