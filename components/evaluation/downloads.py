"""Why a metric's network could not be opened, and what to do about it, as one line.

pyiqa, torch.hub, CLIP and the Hugging Face hub fetch weights in their own ways, and most of their errors name neither
file nor folder. Both are in the frames of the error's traceback.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FILE_NAMES = ("dst", "cached_file", "download_target", "model_path", "pretrained_model_path", "regressor_path")
"""Variables of torch.hub, pyiqa and CLIP that hold the place of a weights file; the earlier, the more certain."""
MOST = 300
"""Most characters of another library's message."""


def weights_error(metric: str, error: BaseException) -> str:
    """One line: which metric, which file, where it belongs, and how to move that folder."""
    reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:MOST]
    if isinstance(error, ModuleNotFoundError):
        return f"metric {metric} needs the Python package {error.name}, which is not installed"
    values = list(_values(error))
    url = _last(values, ("url",), lambda text: text.startswith(("http://", "https://")))
    repository = _last(values, ("repo_id", "path_or_repo_id"), lambda text: "/" in text)
    place = _last(values, FILE_NAMES, lambda text: os.sep in text and "://" not in text)
    if place and Path(place).is_file():
        return (
            f"metric {metric}: its weights {place} cannot be read ({reason}). Delete the file; the next run fetches it "
            "again, or put a whole copy there"
        )
    if url and place:
        return (
            f"metric {metric}: its weights could not be downloaded ({reason}). Fetch {url} on another machine and put "
            f"the file at {place}{_moving(place)}"
        )
    if repository:
        return (
            f"metric {metric}: its weights could not be downloaded ({reason}). On a machine with a network run "
            f"`hf download {repository}`, and copy its cache to {_hub_folder()}; HF_HOME moves that folder"
        )
    return f"metric {metric} cannot be opened ({reason})"


def _values(error: BaseException) -> Iterator[dict[str, Any]]:
    """Local variables of the frames that the error and its causes came through, from the outermost frame inwards."""
    chain, seen = [error], {id(error)}
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and id(cause) not in seen:
        chain.append(cause)
        seen.add(id(cause))
    for each in chain:
        trace = each.__traceback__
        while trace is not None:
            yield trace.tb_frame.f_locals
            trace = trace.tb_next


def _last(values: list[dict[str, Any]], names: tuple[str, ...], is_right: Any) -> str:
    """The text of the first of these variables that some frame holds; of the innermost frame."""
    for name in names:
        for each in reversed(values):
            text = each.get(name)
            if isinstance(text, str | os.PathLike) and is_right(os.fspath(text)):
                return str(text)
    return ""


def _moving(place: str) -> str:
    """How to move the folder of a file; CLIP keeps its own below the home folder."""
    import torch.hub

    is_in_hub = Path(place).is_relative_to(torch.hub.get_dir())
    return "; the environment variable TORCH_HOME moves that folder" if is_in_hub else ""


def _hub_folder() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    home = Path(os.environ.get("HF_HOME") or cache / "huggingface")
    return Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
