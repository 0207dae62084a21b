"""Identity of a captioner: the settings that determine its captions, and their digest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from components.types import Captioner


class CaptionerError(ValueError):
    """A captioner cannot be used; the message names it and the reason."""


class IdentityCaptioner(Captioner, Protocol):
    """A captioner with an identity.

    Attributes:
        identity: model, revision (a commit for a hub model), prompt, max_tokens, short_side_px, digest (over the sha256
            of its files), and the system message if there is one. Equal identities write equal captions.
        on_gpu: whether its model is on a GPU, where a batch costs less than its pictures one by one.
    """

    @property
    def identity(self) -> Mapping[str, Any]: ...

    @property
    def on_gpu(self) -> bool: ...


@dataclass(frozen=True, kw_only=True)
class CaptionerPlan:
    """A captioner that is resolved and hashed, but not loaded; small enough to send to workers.

    Attributes:
        model: hub id, folder, or "tags".
        folder: folder of its files on the machine that resolved it.
        identity: see IdentityCaptioner.
        system: system message before the prompt.
    """

    model: str
    identity: Mapping[str, Any]
    folder: str = ""
    system: str = ""


def identity_digest(identity: Mapping[str, Any]) -> str:
    """Return the sha256 of an identity: the key of caption caches."""
    return hashlib.sha256(json.dumps(dict(identity), sort_keys=True, ensure_ascii=False).encode()).hexdigest()
