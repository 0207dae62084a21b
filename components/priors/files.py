"""What the files of other people's priors say, and one sentence for what is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from components.models import ModelError


def read_json(path: Path) -> dict[str, Any]:
    """A configuration file. Raises ModelError where there is none."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: {first_line(error)}") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path}: no configuration")
    return found


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
