"""Prompts of the pictures in a restoration job: from a file, or from a captioner in the worker.

A prompts file is JSON lines, {"key": "a", "prompt": "..."}, or a table (.csv). A table has a header with such names, or
two columns without a header: picture and prompt. Its encoding and separator may be those of Excel. `key` or
`file_name` names the picture. A `prompt` is used unchanged. A `caption` or `text` is put into the frame of the model's
recipe, as in training. The `records.jsonl` of an earlier job is a valid prompts file, if all its pictures had a prompt.
"""

from __future__ import annotations

import csv
import io
import json
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from components.captions.identity import CaptionerError, CaptionerPlan, identity_digest
from components.captions.presets import open_captioner, resolve_captioner
from components.captions.text import CAPTION, empty_caption, fill_frame, tidy
from components.captions.views import find_view
from components.corpora import CaptionSpec
from components.naming import printable
from components.restoring import MAX_PROMPT_CHARS, Identity, as_sample_error, check_text
from components.systems import SYSTEMS
from components.types import Request, Restorer, SampleError
from pipelines.core.errors import UsageError, unknown
from pipelines.core.places.place import Place, Where
from pipelines.core.tables import read_text, separator_of

NAMES, TEXTS = ("key", "file_name"), ("prompt", "caption", "text")
KINDS = (".jsonl", ".csv")
AUTO = "auto"
"""This view is the model's coarse restoration ("coarse") if it makes one, otherwise the picture itself ("lq")."""
MAX_NAMES = 5  # pictures that an error lists

Line = tuple[int, str, str, Any]
"""(line number, key or file name of the picture, one of TEXTS, text)."""


def read_prompts(path: Path, sources: Mapping[str, Where], src: Where, frame: str = "") -> dict[str, str]:
    """Read the prompts by key; a picture without a line has no prompt.

    Args:
        path: prompts file, see the module's docstring.
        sources: the job's pictures by key, from list_pictures(src).
        src: the job's folder or picture.
        frame: see Identity.

    Raises:
        UsageError: a line is malformed, repeats a picture or has an invalid text, or pictures are not in `src`. The
            message names the line or the pictures.
    """
    if path.suffix.lower() not in KINDS:
        raise unknown("kind of prompts file", path.suffix, KINDS)
    lines = _json_lines(path) if path.suffix.lower() == ".jsonl" else _table_lines(path)
    keys_by_name = _keys_by_name(sources, src)
    prompts: dict[str, str] = {}
    line_of: dict[str, int] = {}
    absent = []
    for number, name, kind, text in lines:
        spellings = (name, unicodedata.normalize("NFC", name), _posix_name(name))
        keys = next((keys_by_name[each] for each in spellings if each in keys_by_name), set())
        if not keys:
            absent.append(f"{name} (line {number})")
            continue
        if len(keys) > 1:
            raise _error(path, number, f"{name} may be any of {', '.join(sorted(keys)[:MAX_NAMES])}; name one of these")
        (key,) = keys
        if key in line_of:
            raise _error(path, number, f"{name} has a {kind} already, in line {line_of[key]}")
        line_of[key] = number
        try:
            prompt = check_text(kind, text)
            if kind != "prompt":
                check_frame(frame)
                prompt = tidy(prompt) and check_text("the prompt made of it", fill_frame(frame, tidy(prompt)))
        except ValueError as error:
            raise _error(path, number, f"{error}") from error
        if not prompt.strip():
            raise _error(path, number, f"the {kind} of {name} is empty; leave the line out")
        prompts[key] = prompt
    if absent:
        more = f" and {len(absent) - MAX_NAMES} more" if len(absent) > MAX_NAMES else ""
        raise UsageError(f"{path} names pictures that are not in {src}: {', '.join(absent[:MAX_NAMES])}{more}")
    if not prompts:
        raise UsageError(f"{path} holds no prompts")
    return prompts


def check_frame(frame: str) -> None:
    """Check that a frame has a place for a caption.

    Raises:
        ValueError: it has none, so that the model has one prompt for all pictures.
    """
    if frame and CAPTION not in frame:
        raise ValueError(
            f'the model was trained with the prompt "{frame}" for every picture, without captions: use that prompt'
        )


def _error(path: Path, number: int, reason: str) -> UsageError:
    return UsageError(f"{path}, line {number}: {reason}")


def _keys_by_name(sources: Mapping[str, Where], src: Where) -> dict[str, set[str]]:
    """Keys of the pictures by each name that a file may use: key, path below `src`, file name; earlier kinds win.

    A path without its suffix comes last; it differs from the key where a name holds joiners, "x:y" or a rival's stem.
    Names that are no text stand escaped. A name in NFC form stands for all its forms, and "sub__b" for the key "sub/b",
    as earlier versions wrote it, unless a picture has just that name.
    """
    exact: list[dict[str, set[str]]] = [{}, {}, {}, {}]
    is_folder = src.is_dir()
    for key, path in sources.items():
        below = _below(path, src) if is_folder else PurePosixPath(path.name)
        exact[0].setdefault(printable(below.with_suffix("").as_posix()), set()).add(key)
        exact[1].setdefault(printable(path.name), set()).add(key)
        if is_folder:
            exact[2][printable(below.as_posix())] = {key}
        exact[3][key] = {key}
    names: dict[str, set[str]] = {}
    for kind in exact:
        for name, keys in kind.items():
            for other in {unicodedata.normalize("NFC", name), name.replace("/", "__")} - {name}:
                names.setdefault(other, set()).update(keys)
    return names | exact[0] | exact[1] | exact[2] | exact[3]


def _below(path: Where, src: Where) -> PurePosixPath:
    if isinstance(path, Place):
        return path.relative_to(src) if isinstance(src, Place) else PurePosixPath(path.name)
    return PurePosixPath(path.relative_to(str(src.absolute())).as_posix())


def _posix_name(name: str) -> str:
    """A name as tables of Windows and of `find` have it: "sub\\b.png", "./b.png"."""
    return unicodedata.normalize("NFC", name).replace("\\", "/").removeprefix("./")


def _text(path: Path) -> str:
    try:
        return read_text(path.read_bytes(), str(path))
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}") from error


def _json_lines(path: Path) -> Iterator[Line]:
    for number, line in enumerate(_text(path).split("\n"), start=1):  # not splitlines: JSON text may hold others
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise _error(path, number, "no JSON") from error
        if not isinstance(row, dict):
            raise _error(path, number, "no JSON object")
        name, text = (_only_field(path, number, row, names) for names in (NAMES, TEXTS))
        if not isinstance(row[name], str):
            raise _error(path, number, f"{name} must be text, got {row[name]!r:.80}")
        yield number, row[name], text, row[text]


def _only_field(path: Path, number: int, row: Mapping[str, Any], names: tuple[str, ...]) -> str:
    """Return the one of these names that is a field of the row."""
    fields = [name for name in names if name in row]
    if len(fields) != 1:
        raise _error(path, number, f"needs one of {', '.join(names)}, and has {' and '.join(fields) or 'none'}")
    return fields[0]


def _table_lines(path: Path) -> Iterator[Line]:
    separator, table = separator_of(_text(path), {*NAMES, *TEXTS})
    rows = csv.reader(io.StringIO(table, newline=""), delimiter=separator, strict=True)
    columns: list[str] = []
    try:
        for row in rows:
            number, cells = rows.line_num, [cell.strip() for cell in row]
            if not any(cells):
                continue
            if not columns:
                has_header = not {*NAMES}.isdisjoint(cells) and not {*TEXTS}.isdisjoint(cells)
                columns = cells if has_header else ["key", "prompt"]
                if has_header:
                    continue
            if len(cells) != len(columns):
                raise _error(path, number, f"{len(cells)} columns where there should be {len(columns)}")
            values = dict(zip(columns, cells, strict=True))
            name, text = (_only_field(path, number, values, names) for names in (NAMES, TEXTS))
            yield number, values[name], text, values[text]
    except csv.Error as error:
        raise _error(path, rows.line_num, f"{error}") from error


# --- the captioner of a job -------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class JobCaptioner:
    """The captioner of a job, checked and hashed but not loaded. A worker loads it when a picture needs it.

    Attributes:
        plan: the captioner.
        view: the picture to caption, see AUTO and components.captions.views. A system's own view gets the preview.
        frame, system: of the model.
        device: torch device of the captioner.
    """

    plan: CaptionerPlan
    view: str = AUTO
    frame: str = ""
    system: str = ""
    device: str = "cpu"

    def identity(self) -> dict[str, str]:
        """Return the record's description of the captioner: with picture, model and options it fixes the caption."""
        identity = self.plan.identity
        return {"model": str(identity["model"]), "digest": identity_digest(identity), "view": self.view}


def job_captioner(spec: CaptionSpec, view: str, model: Identity, device: str = "cpu") -> JobCaptioner:
    """Find and hash the captioner of a job.

    Args:
        spec: the fields captioner, revision, prompt and max_tokens count; pictures are captioned one by one.
        view: AUTO, "lq", or a view of the model's system.
        model: the restoration model.

    Raises:
        UsageError: the captioner or view does not exist, or the model does not use captions.
    """
    system = SYSTEMS.get(model.system)
    views = (AUTO, "lq", *(system.views if system is not None else ()))
    if view not in views:
        raise unknown("caption view", view, views)
    try:
        check_frame(model.frame)
        plan = resolve_captioner(spec.model, spec.revision, spec.prompt, spec.max_tokens)
    except CaptionerError as error:
        raise UsageError(f"{error}.") from error
    except ValueError as error:
        raise UsageError(f"{error}") from error
    return JobCaptioner(plan=plan, view=view, frame=model.frame, system=model.system, device=device)


class PictureCaptioner:
    """The loaded captioner of a worker. It gets one picture at a time: a caption must not depend on a batch."""

    def __init__(self, job: JobCaptioner) -> None:
        self.job, self.captioner = job, open_captioner(job.plan, job.device)
        system = SYSTEMS.get(job.system)
        self.views = system.views if system is not None else {}

    def prompt(self, restorer: Restorer, request: Request) -> tuple[str, str]:
        """Caption a request's picture; return the prompt and the name of the view.

        A caption above MAX_PROMPT_CHARS is cut between two words; text encoders read far fewer characters.

        Raises:
            SampleError: no_view: the view does not exist; empty_caption: the captioner wrote nothing; failed or
                out_of_memory: the captioner failed.
            Exception: any error of the restorer's preview.
        """
        preview = None if self.job.view == "lq" else restorer.preview(request)
        view = self.job.view
        if view == AUTO:
            view = "lq" if preview is None else "coarse"
        image = find_view(view, self.views)(hq=None, lq=request.image, preview=preview)
        try:
            (caption,) = self.captioner.caption([image])
        except Exception as error:
            reason = as_sample_error(error, request.key)
            code = "failed" if reason.code == "refused" else reason.code  # "refused" is a code of the restorer only
            raise SampleError(code, f"the captioner: {reason.detail}", request.key) from error
        if not caption:
            raise empty_caption()
        max_chars = MAX_PROMPT_CHARS - len(self.job.frame)
        if len(caption) > max_chars:
            caption = caption[:max_chars].rsplit(" ", 1)[0]
        return fill_frame(self.job.frame, caption), view
