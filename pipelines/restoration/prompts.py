"""Prompts of the pictures in a restoration job: from a file, or from a captioner in the worker.

A prompts file is JSON lines, {"key": "a", "prompt": "..."}, or a table (.csv), see picture_lines.py. A `prompt` is used
unchanged. A `caption` or `text` is put into the frame of the model's recipe, as in training. The `records.jsonl` of an
earlier job is a valid prompts file, if all its pictures had a prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from components.captions.identity import CaptionerError, CaptionerPlan, identity_digest
from components.captions.presets import open_captioner, resolve_captioner
from components.captions.text import CAPTION, empty_caption, fill_frame, tidy
from components.captions.views import find_view
from components.corpora import CaptionSpec
from components.restoring import MAX_PROMPT_CHARS, Identity, as_sample_error, check_text
from components.systems import SYSTEMS
from components.types import Request, Restorer, SampleError
from pipelines.core.errors import UsageError, unknown
from pipelines.core.places.place import Where
from pipelines.restoration.parts import Source
from pipelines.restoration.picture_lines import line_error, read_picture_lines

TEXTS = ("prompt", "caption", "text")
AUTO = "auto"
"""This view is the model's coarse restoration ("coarse") if it makes one, otherwise the picture itself ("lq")."""


def read_prompts(path: Path, sources: Mapping[str, Source], src: Where, frame: str = "") -> dict[str, str]:
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
    prompts: dict[str, str] = {}
    for line in read_picture_lines(path, sources, src, TEXTS, "prompts"):
        try:
            prompt = check_text(line.column, line.value)
            if line.column != "prompt":
                check_frame(frame)
                prompt = tidy(prompt) and check_text("the prompt made of it", fill_frame(frame, tidy(prompt)))
        except ValueError as error:
            raise line_error(path, line.number, f"{error}") from error
        if not prompt.strip():
            raise line_error(path, line.number, f"the {line.column} of {line.name} is empty; leave the line out")
        prompts[line.key] = prompt
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
