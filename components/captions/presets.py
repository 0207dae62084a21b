"""Captioners by name: presets of the papers, any image-to-text model of transformers, or measured tags.

    captioner = build_captioner("llava")
    captioner.caption([image])          # one line of text per picture
    captioner.identity                  # {"model", "revision", "prompt", "max_tokens", "short_side_px", "digest"}

Torch-free: this module resolves, fetches and hashes a model; components.captions.transformer loads it.

Captioners of the papers (reference/*.md):
    SUPIR       LLaVA-1.5-13B on the decoded robust latents (supir.md 2, 3); no captioner is stated for its training set
    InstaRevive BLIP base on hq in training, on the coarse restoration at test (instarevive.md 5.7)
    adapter     short captions by "a multimodal LLM" in training, InternVL on lq at test (dra.md 4)
    InstantIR   none: JourneyDB's own captions, then empty texts (instantir.md 8.11)
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from components.captions import tags
from components.captions.identity import CaptionerError, CaptionerPlan, IdentityCaptioner
from components.captions.transformer import TransformerCaptioner
from components.naming import did_you_mean
from components.types import Captioner, Image

TAGS = "tags"
DEFAULT_PROMPT = "Describe this image in one short sentence."
"""Prompt for models with a chat template, if no other is set. Ours."""
DEFAULT_TOKENS = 128  # ours: CLIP's text encoders read 77
SHORT_SIDE_PX = 512
"""Pictures are first shrunk to this short side, as SUPIR does for LLaVA (supir.md 2). For models that split large
pictures into tiles it also limits the cost."""

PARTS = (".json", ".jinja", ".txt", ".model", ".safetensors")
"""Suffixes of the files that a model needs; others (code, pickles, cards) are not fetched."""
OTHER_FORMATS = ("original/*", "consolidated*", "onnx/*", "openvino/*")  # the same weights for other libraries
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A model as a paper uses it.

    Attributes:
        model, revision: hub id and revision.
        prompt: the question; "" for captions without a prompt.
        system: system message before it, for chat templates.
        max_tokens: most tokens of a caption.
    """

    model: str
    revision: str = ""
    prompt: str = ""
    system: str = ""
    max_tokens: int = DEFAULT_TOKENS


PRESETS: Mapping[str, Preset | None] = {
    # supir.md 3: LLaVA-1.5-13B, template vicuna_v1 (its system message), this question, 512 tokens, line breaks become
    # blanks. SUPIR samples (temperature 0.2, top_p 0.7); decoding here is greedy, so that captions are reproducible.
    "llava": Preset(
        model="llava-hf/llava-1.5-13b-hf",
        prompt="Describe this image and its style in a very detailed manner.",
        system="A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions.",
        max_tokens=512,
    ),
    # instarevive.md 5.7: this model, no prompt. This revision has safetensors; the main branch has none.
    "blip": Preset(model="Salesforce/blip-image-captioning-base", revision="9cfcdbcaccbcadb2b53b36d4b50042c4eeaa0c25"),
    # Ours: not from a paper; a larger model that writes captions without a prompt.
    "blip2": Preset(model="Salesforce/blip2-opt-2.7b"),
    # dra.md 4: InternVL, "short descriptive prompts". Version, size and question are not stated: ours.
    "internvl": Preset(model="OpenGVLab/InternVL3-8B-hf", prompt=DEFAULT_PROMPT),
    TAGS: None,
}
"""Captioners by name; None for the captioner without a model."""


@dataclass(frozen=True)
class CaptionerWithIdentity:
    """A captioner without a model, with its identity."""

    captioner: Captioner
    identity: Mapping[str, Any] = field(default_factory=dict)
    on_gpu: bool = False

    def caption(self, images: Sequence[Image]) -> list[str]:
        return self.captioner.caption(images)


def build_captioner(
    name_or_model: str, revision: str = "", prompt: str = "", max_tokens: int = DEFAULT_TOKENS, device: str = ""
) -> IdentityCaptioner:
    """Resolve, fetch, hash and load a captioner.

    Args:
        name_or_model: a name in PRESETS, a folder written by save_pretrained, or a hub id.
        revision: branch, tag or commit of a hub model; "" uses the preset's, else the main branch.
        prompt: "" uses the preset's; a chat model without one gets DEFAULT_PROMPT.
        max_tokens: most tokens of a caption; 0 uses the preset's.
        device: torch device; "" uses a GPU if there is one.

    Raises:
        CaptionerError: unknown name (with a suggestion), failed fetch, no safetensors, or wrong kind of model.
    """
    return open_captioner(resolve_captioner(name_or_model, revision, prompt, max_tokens), device)


def resolve_captioner(
    name_or_model: str, revision: str = "", prompt: str = "", max_tokens: int = DEFAULT_TOKENS
) -> CaptionerPlan:
    """Do the steps of `build_captioner` except loading; needs no torch."""
    if max_tokens < 0:
        raise CaptionerError(f"max_tokens must be 0 (the preset's) or more, got {max_tokens}")
    if name_or_model == TAGS:
        if revision or prompt:
            raise CaptionerError('the captioner "tags" measures and has neither a revision nor a prompt')
        digest = hashlib.sha256(Path(tags.__file__).read_bytes()).hexdigest()  # thresholds are its weights
        return CaptionerPlan(model=TAGS, identity=_identity(TAGS, "", "", 0, 0, digest))
    preset = PRESETS.get(name_or_model) or Preset(model=name_or_model)
    folder, commit, public = _locate(preset.model, revision or preset.revision)
    _check(folder, public)
    if not (prompt := prompt or preset.prompt) and has_chat_template(folder):
        prompt = DEFAULT_PROMPT
    tokens = max_tokens or preset.max_tokens
    identity = _identity(public, commit, prompt, tokens, SHORT_SIDE_PX, folder_digest(folder), preset.system)
    return CaptionerPlan(model=preset.model, folder=str(folder), identity=identity, system=preset.system)


def open_captioner(plan: CaptionerPlan, device: str = "") -> IdentityCaptioner:
    """Load the captioner of `resolve_captioner`; another machine fetches a hub model itself."""
    if plan.model == TAGS:
        return CaptionerWithIdentity(tags.Tags(), plan.identity)

    folder = Path(plan.folder)
    if not folder.is_dir():
        folder, _, _ = _locate(plan.model, str(plan.identity["revision"]))
    return TransformerCaptioner(folder, plan.identity, plan.system, device)


def folder_digest(folder: Path) -> str:
    """Return the sha256 over names and sha256 of a model folder's configuration, tokenizer and weights."""
    lines = []
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.suffix in PARTS and not path.name.startswith("."):
            with open(path, "rb") as source:
                lines.append(f"{path.name} {hashlib.file_digest(source, 'sha256').hexdigest()}\n")
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def has_chat_template(folder: Path) -> bool:
    """Whether the model has a chat template, judged by the files in which transformers stores it."""
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


def _locate(model: str, revision: str) -> tuple[Path, str, str]:
    """Return folder, commit ("" for a local model) and public name of a model; fetch missing hub models."""
    local = Path(model).expanduser()
    if local.is_dir():
        if revision:
            raise CaptionerError(f"{model} is a folder and has no revisions: leave out the revision {revision!r}")
        return local, "", local.resolve().name
    if not HUB_ID.fullmatch(model):
        raise CaptionerError(
            f"unknown captioner {model!r}: no preset, folder or hub id (owner/name). {did_you_mean(model, PRESETS)}"
        )
    from huggingface_hub import snapshot_download

    source = f"{model}{f' at {revision}' if revision else ''}"
    try:
        folder = snapshot_download(
            model,
            revision=revision or None,
            allow_patterns=[f"*{suffix}" for suffix in PARTS],
            ignore_patterns=list(OTHER_FORMATS),
        )
    except (OSError, ValueError) as error:  # base classes of the hub client's errors
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CaptionerError(f"the captioner {source} cannot be fetched: {reason}") from error
    return Path(folder), Path(folder).name, model


def _check(folder: Path, name: str) -> None:
    """Refuse a folder that transformers cannot load."""
    if not _json(folder / "config.json").get("model_type"):
        raise CaptionerError(f"{name} is not a transformers model: its config.json is missing or names no model_type")
    if not any(folder.glob("*.safetensors")):
        raise CaptionerError(f"{name} has no .safetensors weights, the only format that is read")


def _json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file; empty if there is none."""
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}
