"""A captioner around any transformers model that writes text about a picture.

Two kinds are told apart by what comes with the model. With a chat template, the picture and the prompt go through it
(LLaVA, InternVL, Qwen-VL, ...). Without one, the prompt is a beginning that the model goes on from, or nothing (BLIP,
BLIP-2, GIT); models made of an image encoder and a text decoder take no prompt at all.

Decoding is greedy and batches are padded on the left, so a caption depends on its picture alone, but for the rounding
of sums, which differs with a batch's shape and may tip a word where two are nearly as likely. In float32 on a CPU our
tests see none, in half precision on a GPU it can happen; with batches of one it cannot.

torch and transformers are imported when a model is loaded: data workers import this package without them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.captions.presets import CaptionerError
from components.captions.text import tidy
from components.images import resize_short_side, to_uint8
from components.types import Image

if TYPE_CHECKING:
    from torch import Tensor

SHOWN = 3  # names that an error lists


class TransformerCaptioner:
    """A loaded model; meets `components.captions.presets.KnownCaptioner`.

    Args:
        folder: config.json, *.safetensors, tokenizer and processor files. No code from it is ever run.
        identity: as `resolve_captioner` made it; its prompt, max_tokens and short_side_px are obeyed.
        system: message in front of the prompt, for chat templates.
        device: as torch names it; "" takes a GPU where there is one. GPUs use the precision of the weights, CPUs
            float32.

    Raises:
        CaptionerError: wrong kind of model, missing weights, or anything that transformers cannot load.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], system: str = "", device: str = "") -> None:
        import torch

        self.identity, self.name = dict(identity), str(identity["model"])
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        try:
            self.model = self._load_model(folder)
            self.processor, self.image_processor, self.tokenizer = _load_processors(folder)
        except CaptionerError:
            raise
        except Exception as error:  # a broken folder makes these libraries raise anything
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise CaptionerError(f"the captioner {self.name} cannot be loaded: {reason}") from error
        text_config = self.model.config.get_text_config(decoder=True)
        if not any(getattr(config, "is_encoder_decoder", False) for config in (self.model.config, text_config)):
            self.tokenizer.padding_side = "left"  # a decoder goes on from the last column
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        templated = getattr(self.processor, "chat_template", None)
        self.conversation = _conversation(str(identity["prompt"]), system) if templated else []
        if self.processor is None and identity["prompt"]:
            raise CaptionerError(f"{self.name} is an image encoder with a text decoder, which takes no prompt")
        self.ends, self.marks = _special_ids(self.model, self.tokenizer)

    def caption(self, images: Sequence[Image]) -> list[str]:
        """One line for each uint8 or float32 picture [H, W, 3], all in one batch; "" where the model says nothing."""
        import torch

        if not images:
            return []
        inputs = self._inputs([self._shrunk(image) for image in images])
        inputs = inputs.to(self.device, dtype=self.model.dtype)
        prompt_ids = inputs.get("input_ids")
        with torch.inference_mode():
            written = self.model.generate(
                **inputs, do_sample=False, num_beams=1, max_new_tokens=int(self.identity["max_tokens"])
            )
        rows = _new_tokens(written, prompt_ids).tolist()
        kept = [_between_marks(row, self.ends, self.marks) for row in rows]
        return [tidy(text) for text in self.tokenizer.batch_decode(kept, skip_special_tokens=True)]

    def _load_model(self, folder: Path) -> Any:
        import torch
        from transformers import AutoModelForImageTextToText
        from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
        from transformers.utils import logging

        kind = json.loads((folder / "config.json").read_bytes())["model_type"]
        if kind not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
            raise CaptionerError(
                f"{self.name} is a {kind!r} model, of which transformers has none that writes text about pictures "
                "(code that comes with a model is not run)"
            )
        bars = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()  # whoever loads this says how far it is
        try:
            loaded: Any = AutoModelForImageTextToText.from_pretrained(
                str(folder),
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
                dtype=torch.float32 if self.device.type == "cpu" else "auto",
            )
        finally:
            if bars:
                logging.enable_progress_bar()
        model, report = loaded
        if missing := sorted(report["missing_keys"]):
            shown = ", ".join(missing[:SHOWN]) + (", ..." if len(missing) > SHOWN else "")
            raise CaptionerError(f"{self.name} lacks {len(missing)} of its weights: {shown}")
        return model.eval().requires_grad_(False).to(self.device)

    def _inputs(self, pictures: Sequence[Any]) -> Any:
        """Tensors for `generate`, batched."""
        if self.processor is None:
            return self.image_processor(images=list(pictures), return_tensors="pt")
        if self.conversation:
            return self.processor.apply_chat_template(
                [_with_picture(self.conversation, picture) for picture in pictures],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs={"padding": True},
            )
        prompt = self.identity["prompt"]
        text = {"text": [prompt] * len(pictures), "padding": True} if prompt else {}
        return self.processor(images=list(pictures), return_tensors="pt", **text)

    def _shrunk(self, image: Image) -> Any:
        """A Pillow picture whose short side is at most short_side_px: what every processor takes."""
        from PIL import Image as Pillow

        if image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"expected [H, W, 3], got {image.shape}")
        limit = int(self.identity["short_side_px"])
        if limit and min(image.shape[:2]) > limit:
            image = resize_short_side(image, limit)
        return Pillow.fromarray(to_uint8(image))


def prompt_ids(folder: Path, identity: Mapping[str, Any], system: str = "") -> list[int]:
    """Token ids of the question through the model's chat template, one mark standing for the picture: for engines.

    Raises:
        CaptionerError: the model has no chat template.
    """
    processor, _, tokenizer = _load_processors(folder)
    if not getattr(processor, "chat_template", None):
        raise CaptionerError(f"{identity['model']} has no chat template, which an engine needs")
    text = processor.apply_chat_template(_conversation(str(identity["prompt"]), system), add_generation_prompt=True)
    begun = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    return list(tokenizer(text, add_special_tokens=not begun)["input_ids"])


def _conversation(prompt: str, system: str) -> list[dict[str, Any]]:
    """Messages with a place for the picture."""
    question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}
    return [{"role": "system", "content": [{"type": "text", "text": system}]}, question] if system else [question]


def _load_processors(folder: Path) -> tuple[Any, Any, Any]:
    """(processor or None, image processor, tokenizer): older models have the two parts and nothing that joins them."""
    from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer

    options = {"local_files_only": True, "trust_remote_code": False}
    try:
        processor = AutoProcessor.from_pretrained(str(folder), **options)
    except (OSError, ValueError, KeyError):  # of a model type for which transformers knows no processor
        processor = None
    image_processor, tokenizer = getattr(processor, "image_processor", None), getattr(processor, "tokenizer", None)
    if image_processor is None or tokenizer is None:
        processor = None
        image_processor = AutoImageProcessor.from_pretrained(str(folder), **options)
        tokenizer = AutoTokenizer.from_pretrained(str(folder), **options)
    return processor, image_processor, tokenizer


def _with_picture(messages: Sequence[Mapping[str, Any]], picture: Any) -> list[dict[str, Any]]:
    """The conversation with the picture in its place; new lists, since transformers writes into what it gets."""
    return [
        {
            **message,
            "content": [
                {**part, "image": picture} if part["type"] == "image" else {**part} for part in message["content"]
            ],
        }
        for message in messages
    ]


def _new_tokens(written: Tensor, prompt_ids: Tensor | None) -> Tensor:
    """Token ids [B, n] without the prompt's, which decoders repeat and encoder-decoders do not.

    What is repeated is seen by comparing: BLIP repeats all but its prompt's last token, and changes the first one.
    """
    if prompt_ids is None:
        return written
    width = min(written.shape[1], prompt_ids.shape[1])
    same = (written[:, :width] == prompt_ids[:, :width]).all(dim=0).long()
    return written[:, int(same.cumprod(0).sum()) :]


def _special_ids(model: Any, tokenizer: Any) -> tuple[set[int], set[int]]:
    """Ids that end a text, and those that may stand in front of one (begin, pad and end marks)."""
    text_config = model.config.get_text_config(decoder=True)
    places = (model.generation_config, model.config, text_config, tokenizer)
    ends = _ids(places, ("eos_token_id", "sep_token_id"))
    return ends, ends | _ids(places, ("bos_token_id", "pad_token_id", "cls_token_id", "decoder_start_token_id"))


def _ids(places: Sequence[Any], names: Sequence[str]) -> set[int]:
    found: set[int] = set()
    for place in places:
        for name in names:
            value = getattr(place, name, None)
            found.update(value if isinstance(value, list | tuple) else [] if value is None else [value])
    return found


def _between_marks(row: Sequence[int], ends: set[int], marks: set[int]) -> list[int]:
    """Tokens of one text: from behind its begin marks to before its end mark; what follows is padding."""
    start = next((place for place, token in enumerate(row) if token not in marks), len(row))
    stop = next((place for place in range(start, len(row)) if row[place] in ends), len(row))
    return list(row[start:stop])
