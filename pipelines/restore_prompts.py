"""What a restoring job tells its model of each picture: the prompts of a file, or a captioner's words in the worker.

A file is JSON lines, {"key": "a", "prompt": "..."}, or a table (.csv) with such a header or of two columns,
picture and prompt. A picture goes by its `key` or its `file_name`. A `prompt` is said as it stands; a `caption` or
`text` goes into the frame of the model's recipe, if it has one, as it did in training. The `records.jsonl` of an
earlier job will do, if all its pictures had a prompt.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.captions.presets import (
    CaptionerError,
    CaptionerPlan,
    identity_digest,
    open_captioner,
    resolve_captioner,
)
from components.captions.text import CAPTION, framed, tidy
from components.captions.views import find_view
from components.corpora import CaptionSpec
from components.restoring import MAX_PROMPT_CHARS, Identity, as_sample_error, check_text
from components.systems import SYSTEMS
from components.types import Request, Restorer, SampleError
from pipelines.caption import unsaid
from pipelines.errors import UsageError, unknown

NAMES, TEXTS = ("key", "file_name"), ("prompt", "caption", "text")
KINDS = (".jsonl", ".csv")
AUTO = "auto"
"""The view that fits: the coarse restoration where the model makes one, else the picture as it is ("lq")."""
NAMED = 5  # strange pictures in an error

Line = tuple[int, str, str, Any]
"""(number, picture, one of TEXTS, text)."""


def read_prompts(path: Path, sources: Mapping[str, Path], src: Path, frame: str = "") -> dict[str, str]:
    """Prompts by key; a picture without a line has none.

    Args:
        path: see the module.
        sources: the job's pictures by key, as list_pictures found them below `src`.
        frame: see Identity.

    Raises:
        UsageError: names the line that is malformed, comes twice or has a text that no prompt may be, or the pictures
            that are not in `src`.
    """
    if path.suffix.lower() not in KINDS:
        raise unknown("kind of prompts file", path.suffix, KINDS)
    lines = _json_lines(path) if path.suffix.lower() == ".jsonl" else _table_lines(path)
    known = _keys_by_name(sources, src)
    prompts: dict[str, str] = {}
    places: dict[str, int] = {}
    strange = []
    for number, name, kind, text in lines:
        keys = known.get(name, set())
        if not keys:
            strange.append(f"{name} (line {number})")
            continue
        if len(keys) > 1:
            raise _wrong(path, number, f"{name} may be any of {', '.join(sorted(keys)[:NAMED])}; name one of these")
        (key,) = keys
        if key in places:
            raise _wrong(path, number, f"{name} has a {kind} already, in line {places[key]}")
        places[key] = number
        try:
            said = check_text(kind, text)
            if kind != "prompt":
                check_frame(frame)
                said = tidy(said) and check_text("the prompt made of it", framed(frame, tidy(said)))
        except ValueError as error:
            raise _wrong(path, number, f"{error}") from error
        if not said.strip():
            raise _wrong(path, number, f"the {kind} of {name} is empty; leave the line out")
        prompts[key] = said
    if strange:
        more = f" and {len(strange) - NAMED} more" if len(strange) > NAMED else ""
        raise UsageError(f"{path} names pictures that are not in {src}: {', '.join(strange[:NAMED])}{more}")
    if not prompts:
        raise UsageError(f"{path} holds no prompts")
    return prompts


def check_frame(frame: str) -> None:
    """A frame that has a place for a caption.

    Raises:
        ValueError: it says the same of every picture.
    """
    if frame and CAPTION not in frame:
        raise ValueError(f'the model was told "{frame}" of every picture, and no captions: give that as the prompt')


def _wrong(path: Path, number: int, why: str) -> UsageError:
    return UsageError(f"{path}, line {number}: {why}")


def _keys_by_name(sources: Mapping[str, Path], src: Path) -> dict[str, set[str]]:
    """What pictures may be called: by their keys, else by their paths below `src`, else by their file names alone."""
    names: dict[str, set[str]] = {}
    for key, path in sources.items():
        names.setdefault(path.name, set()).add(key)
    if src.is_dir():
        names |= {path.relative_to(src.absolute()).as_posix(): {key} for key, path in sources.items()}
    return names | {key: {key} for key in sources}


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is no UTF-8 text") from error


def _json_lines(path: Path) -> Iterator[Line]:
    for number, line in enumerate(_text(path).split("\n"), start=1):  # not splitlines: JSON text may hold others
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise _wrong(path, number, "no JSON") from error
        if not isinstance(row, dict):
            raise _wrong(path, number, "no JSON object")
        name, text = (_only(path, number, row, names) for names in (NAMES, TEXTS))
        if not isinstance(row[name], str):
            raise _wrong(path, number, f"{name} must be text, got {row[name]!r:.80}")
        yield number, row[name], text, row[text]


def _only(path: Path, number: int, row: Mapping[str, Any], names: tuple[str, ...]) -> str:
    """The one of these names that a row has."""
    given = [name for name in names if name in row]
    if len(given) != 1:
        raise _wrong(path, number, f"needs one of {', '.join(names)}, and has {' and '.join(given) or 'none'}")
    return given[0]


def _table_lines(path: Path) -> Iterator[Line]:
    rows = csv.reader(io.StringIO(_text(path), newline=""), strict=True)
    columns: list[str] = []
    try:
        for row in rows:
            number, cells = rows.line_num, [cell.strip() for cell in row]
            if not any(cells):
                continue
            if not columns:
                headed = not {*NAMES}.isdisjoint(cells) and not {*TEXTS}.isdisjoint(cells)
                columns = cells if headed else ["key", "prompt"]
                if headed:
                    continue
            if len(cells) != len(columns):
                raise _wrong(path, number, f"{len(cells)} columns where there should be {len(columns)}")
            found = dict(zip(columns, cells, strict=True))
            name, text = (_only(path, number, found, names) for names in (NAMES, TEXTS))
            yield number, found[name], text, found[text]
    except csv.Error as error:
        raise _wrong(path, rows.line_num, f"{error}") from error


# --- a captioner in the worker ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class CaptionWish:
    """Who captions a job's pictures: found and hashed, and loaded by the workers that need it.

    Attributes:
        plan: the captioner.
        view: what it looks at, see AUTO and components.captions.views; a system's own view is given the preview.
        frame, system: of the model.
        device: as torch names it.
    """

    plan: CaptionerPlan
    view: str = AUTO
    frame: str = ""
    system: str = ""
    device: str = "cpu"

    def identity(self) -> dict[str, str]:
        """What decides a caption besides the picture, the model and the options: its place in records."""
        known = self.plan.identity
        return {"model": str(known["model"]), "digest": identity_digest(known), "view": self.view}


def caption_wish(spec: CaptionSpec, view: str, model: Identity, device: str = "cpu") -> CaptionWish:
    """The captioner of a job with that model.

    Args:
        spec: captioner, revision, prompt, max_tokens; pictures go through it one by one.

    Raises:
        UsageError: no such captioner or view, or a model to which captions say nothing.
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
    return CaptionWish(plan=plan, view=view, frame=model.frame, system=model.system, device=device)


class PictureCaptioner:
    """A loaded captioner beside a restorer. Pictures go alone: who else is in a batch must not tip a word."""

    def __init__(self, wish: CaptionWish) -> None:
        self.wish, self.captioner = wish, open_captioner(wish.plan, wish.device)
        system = SYSTEMS.get(wish.system)
        self.views = system.views if system is not None else {}

    def prompt(self, restorer: Restorer, request: Request) -> tuple[str, str]:
        """What the model is told of a request's picture, and the view that was captioned.

        A caption that no prompt could be as long as is cut between two words; text encoders read far less.

        Raises:
            SampleError: no_view, there is no such picture; empty_caption, nothing was said; failed or out_of_memory.
            Exception: what the restorer raises of the request.
        """
        look = None if self.wish.view == "lq" else getattr(restorer, "preview", None)
        preview = look(request) if look is not None else None
        view = self.wish.view
        if view == AUTO:
            view = "lq" if preview is None else "coarse"
        seen = find_view(view, self.views)(hq=None, lq=request.image, preview=preview)
        try:
            (caption,) = self.captioner.caption([seen])
        except Exception as error:
            reason = as_sample_error(error, request.key)
            code = "failed" if reason.code == "refused" else reason.code  # "refused" is what the restorer says
            raise SampleError(code, f"the captioner: {reason.detail}", request.key) from error
        if not caption:
            raise unsaid()
        room = MAX_PROMPT_CHARS - len(self.wish.frame)
        if len(caption) > room:
            caption = caption[:room].rsplit(" ", 1)[0]
        return framed(self.wish.frame, caption), view
