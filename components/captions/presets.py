"""Captioners by name: presets of the papers, any transformers model that writes text about a picture, or measured tags.

    captioner = build_captioner("llava")
    captioner.caption([image])          # one line of text each
    captioner.identity                  # {"model", "revision", "prompt", "max_tokens", "short_side_px", "digest"}

Torch-free: a model is found, fetched and hashed here, and loaded by components.captions.transformer.

What the papers use (reference/*.md):
    SUPIR       LLaVA-1.5-13B on the decoded robust latents (supir.md 2, 3); of its training set it names no captioner
    InstaRevive BLIP base on HQ in training, on the coarse restoration at test (instarevive.md 5.7)
    adapter     short captions by "a multimodal LLM" in training, InternVL on the LQ at test (dra.md 4)
    InstantIR   none: JourneyDB's own captions, then empty texts (instantir.md 8.11)
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from components.captions import tags
from components.naming import did_you_mean
from components.types import Captioner, Image

TAGS = "tags"
DEFAULT_PROMPT = "Describe this image in one short sentence."
"""For models with a chat template where nobody gave a prompt. Ours."""
DEFAULT_TOKENS = 128  # ours: CLIP's text encoders read 77
SHORT_SIDE_PX = 512
"""Pictures are shrunk to this first. SUPIR runs LLaVA so (supir.md 2); for models that cut large pictures into tiles it
also bounds the cost."""

PARTS = (".json", ".jinja", ".txt", ".model", ".safetensors")
"""Files that decide what a model writes; all else of a repository (code, pickles, cards) is not even fetched."""
UNFETCHED = ("original/*", "consolidated*", "onnx/*", "openvino/*")  # the same weights for other libraries
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


class CaptionerError(ValueError):
    """A captioner cannot be had; one sentence says which and why."""


class KnownCaptioner(Captioner, Protocol):
    """A captioner that can say who it is.

    Attributes:
        identity: model, revision (a commit where it came from a hub), prompt, max_tokens, short_side_px, digest (over
            the sha256 of its files), and the system message where there is one. Equal identities write equal captions.
    """

    @property
    def identity(self) -> Mapping[str, Any]: ...


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A model as a paper uses it.

    Attributes:
        model, revision: on the hub.
        prompt: the question; "" lets the model write freely.
        system: message in front of it, for chat templates.
        max_tokens: longest caption.
    """

    model: str
    revision: str = ""
    prompt: str = ""
    system: str = ""
    max_tokens: int = DEFAULT_TOKENS


PRESETS: Mapping[str, Preset | None] = {
    # supir.md 3: LLaVA-1.5-13B, template vicuna_v1 (its system message), this question, 512 tokens, line ends to
    # blanks. There it samples (temperature 0.2, top_p 0.7); here decoding is greedy, so that captions repeat.
    "llava": Preset(
        model="llava-hf/llava-1.5-13b-hf",
        prompt="Describe this image and its style in a very detailed manner.",
        system="A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions.",
        max_tokens=512,
    ),
    # instarevive.md 5.7: this model, no prompt. The revision is the one that adds safetensors; the main one has none.
    "blip": Preset(model="Salesforce/blip-image-captioning-base", revision="9cfcdbcaccbcadb2b53b36d4b50042c4eeaa0c25"),
    # Ours: no paper names it; the same free captions from a larger model.
    "blip2": Preset(model="Salesforce/blip2-opt-2.7b"),
    # dra.md 4: InternVL, "short descriptive prompts". Version, size and question are not stated: ours.
    "internvl": Preset(model="OpenGVLab/InternVL3-8B-hf", prompt=DEFAULT_PROMPT),
    TAGS: None,
}
"""Captioners by name; None: measured, without a model."""


@dataclass(frozen=True, kw_only=True)
class CaptionerPlan:
    """A captioner that was found and hashed, but not loaded: small, goes to workers.

    Attributes:
        model: hub id, folder, or "tags".
        folder: where its files lie on the machine that found it.
        identity: see KnownCaptioner.
        system: message in front of the prompt.
    """

    model: str
    identity: Mapping[str, Any]
    folder: str = ""
    system: str = ""


@dataclass(frozen=True)
class Identified:
    """A captioner with its identity beside it."""

    captioner: Captioner
    identity: Mapping[str, Any] = field(default_factory=dict)

    def caption(self, images: Sequence[Image]) -> list[str]:
        return self.captioner.caption(images)


def build_captioner(
    name_or_model: str, revision: str = "", prompt: str = "", max_tokens: int = DEFAULT_TOKENS, device: str = ""
) -> KnownCaptioner:
    """Find, fetch, hash and load a captioner.

    Args:
        name_or_model: a name in PRESETS, a folder that save_pretrained wrote, or a hub id.
        revision: branch, tag or commit of a hub model; "" takes the preset's, else the main branch.
        prompt: "" takes the preset's; a chat model without one gets DEFAULT_PROMPT.
        max_tokens: longest caption; 0 takes the preset's.
        device: as torch names it; "" takes a GPU where there is one.

    Raises:
        CaptionerError: unknown name (with the near one), nothing to be fetched, no safetensors, wrong kind of model.
    """
    return open_captioner(resolve_captioner(name_or_model, revision, prompt, max_tokens), device)


def resolve_captioner(
    name_or_model: str, revision: str = "", prompt: str = "", max_tokens: int = DEFAULT_TOKENS
) -> CaptionerPlan:
    """All of `build_captioner` but the loading: needs no torch."""
    if max_tokens < 0:
        raise CaptionerError(f"max_tokens must be 0 (the preset's) or more, got {max_tokens}")
    if name_or_model == TAGS:
        if revision or prompt:
            raise CaptionerError('the captioner "tags" measures and has neither a revision nor a prompt')
        digest = hashlib.sha256(Path(tags.__file__).read_bytes()).hexdigest()  # its thresholds are its weights
        return CaptionerPlan(model=TAGS, identity=_identity(TAGS, "", "", 0, 0, digest))
    preset = PRESETS.get(name_or_model) or Preset(model=name_or_model)
    folder, commit, public = _located(preset.model, revision or preset.revision)
    _check(folder, public)
    if not (prompt := prompt or preset.prompt) and has_chat_template(folder):
        prompt = DEFAULT_PROMPT
    tokens = max_tokens or preset.max_tokens
    identity = _identity(public, commit, prompt, tokens, SHORT_SIDE_PX, folder_digest(folder), preset.system)
    return CaptionerPlan(model=preset.model, folder=str(folder), identity=identity, system=preset.system)


def open_captioner(plan: CaptionerPlan, device: str = "") -> KnownCaptioner:
    """Load what `resolve_captioner` found; on another machine a hub model is fetched there."""
    if plan.model == TAGS:
        return Identified(tags.Tags(), plan.identity)
    from components.captions.transformer import TransformerCaptioner

    folder = Path(plan.folder)
    if not folder.is_dir():
        folder, _, _ = _located(plan.model, str(plan.identity["revision"]))
    return TransformerCaptioner(folder, plan.identity, plan.system, device)


def identity_digest(identity: Mapping[str, Any]) -> str:
    """sha256 over all that decides a caption besides the picture: the key of caption caches."""
    return hashlib.sha256(json.dumps(dict(identity), sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def folder_digest(folder: Path) -> str:
    """sha256 over the names and sha256 of a model folder's configuration, tokenizer and weights."""
    lines = []
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.suffix in PARTS and not path.name.startswith("."):
            with open(path, "rb") as source:
                lines.append(f"{path.name} {hashlib.file_digest(source, 'sha256').hexdigest()}\n")
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def has_chat_template(folder: Path) -> bool:
    """Whether the model is asked through a chat template, by the files that transformers keeps one in."""
    if (folder / "chat_template.jinja").is_file() or (folder / "chat_template.json").is_file():
        return True
    return any("chat_template" in _json(folder / name) for name in ("processor_config.json", "tokenizer_config.json"))


def _identity(
    model: str, revision: str, prompt: str, max_tokens: int, short_side_px: int, digest: str, system: str = ""
) -> dict[str, Any]:
    identity = {
        "model": model,
        "revision": revision,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "short_side_px": short_side_px,
        "digest": digest,
    }
    return {**identity, "system": system} if system else identity


def _located(model: str, revision: str) -> tuple[Path, str, str]:
    """Folder, commit ("" of a local one) and public name of a model; hub models are fetched where they are missing."""
    local = Path(model).expanduser()
    if local.is_dir():
        if revision:
            raise CaptionerError(f"{model} is a folder and has no revisions, so {revision!r} cannot be meant")
        return local, "", local.resolve().name
    if not HUB_ID.fullmatch(model):
        raise CaptionerError(
            f"unknown captioner {model!r}: no preset, folder or hub id (owner/name). {did_you_mean(model, PRESETS)}"
        )
    from huggingface_hub import snapshot_download

    wanted = f"{model}{f' at {revision}' if revision else ''}"
    try:
        found = snapshot_download(
            model,
            revision=revision or None,
            allow_patterns=[f"*{suffix}" for suffix in PARTS],
            ignore_patterns=list(UNFETCHED),
        )
    except (OSError, ValueError) as error:  # what the hub client's errors are made of
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CaptionerError(f"the captioner {wanted} cannot be fetched: {reason}") from error
    return Path(found), Path(found).name, model


def _check(folder: Path, name: str) -> None:
    """Refuse early what could not be loaded."""
    if not _json(folder / "config.json").get("model_type"):
        raise CaptionerError(f"{name} is no transformers model: its config.json is missing or names no model_type")
    if not any(folder.glob("*.safetensors")):
        raise CaptionerError(f"{name} has no .safetensors weights, and no other kind is read")


def _json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; empty where there is none."""
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}
