"""A captioner for any image-to-text model of transformers.

The files of a model decide between two kinds. With a chat template, the picture and the prompt go through the template
(LLaVA, InternVL, Qwen-VL, ...). Without one, the model continues the prompt, which may be empty (BLIP, BLIP-2, GIT).
Models of an image encoder and a text decoder take no prompt.

Decoding is greedy and batches are padded on the left, so a caption depends on its picture only, except for rounding.
The rounding of sums depends on the batch's shape, and may change a word if two words are almost equally likely. Our
tests see no such change in float32 on a CPU. It can happen in half precision on a GPU, but not with batches of one.

torch and transformers are imported when a model is loaded: data workers import this package without them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image as Pillow

from components.captions.identity import CaptionerError
from components.captions.text import tidy
from components.images import resize_short_side, to_uint8
from components.types import Image, SampleError

if TYPE_CHECKING:
    from torch import Tensor

MAX_NAMES = 3  # names in an error


class TransformerCaptioner:
    """A loaded model; implements `components.captions.identity.IdentityCaptioner`.

    Args:
        folder: config.json, *.safetensors, tokenizer and processor files. No code from it is ever run.
        identity: result of `resolve_captioner`; its prompt, max_tokens and short_side_px are used.
        system: system message before the prompt, for chat templates.
        device: torch device; "" uses a GPU if there is one. GPUs use the precision of the weights, CPUs float32.

    Raises:
        CaptionerError: wrong kind of model, missing weights, or any other error of transformers.
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
        except Exception as error:  # these libraries raise many kinds of errors for a broken folder
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise CaptionerError(f"the captioner {self.name} cannot be loaded: {reason}") from error
        text_config = self.model.config.get_text_config(decoder=True)
        if not any(getattr(config, "is_encoder_decoder", False) for config in (self.model.config, text_config)):
            self.tokenizer.padding_side = "left"  # a decoder continues from the last column
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        template = getattr(self.processor, "chat_template", None)
        self.conversation = _conversation(str(identity["prompt"]), system) if template else []
        if self.processor is None and identity["prompt"]:
            raise CaptionerError(f"{self.name} is an image encoder with a text decoder, which takes no prompt")
        self.ends, self.marks = _special_ids(self.model, self.tokenizer)

    @property
    def on_gpu(self) -> bool:
        """Whether the model is on a GPU."""
        return bool(self.device.type != "cpu")

    def caption(self, images: Sequence[Image]) -> list[str]:
        """Write one line for each uint8 or float32 picture [H, W, 3], in one batch; "" if the model writes nothing.

        Raises:
            SampleError: "not_finite": the model made NaN over one of the pictures.
        """
        import torch

        if not images:
            return []
        inputs = self._inputs([self._shrink(image) for image in images])
        inputs = inputs.to(self.device, dtype=self.model.dtype)
        prompt_ids, watch = inputs.get("input_ids"), _NanWatch()
        with torch.inference_mode():
            token_ids = self.model.generate(
                **inputs,
                do_sample=False,
                num_beams=1,
                max_new_tokens=int(self.identity["max_tokens"]),
                logits_processor=[watch],
            )
        watch.check()
        rows = _new_tokens(token_ids, prompt_ids).tolist()
        text_ids = [_between_marks(row, self.ends, self.marks) for row in rows]
        return [tidy(text) for text in self.tokenizer.batch_decode(text_ids, skip_special_tokens=True)]

    def _load_model(self, folder: Path) -> Any:
        import torch
        from transformers import AutoModelForImageTextToText
        from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
        from transformers.utils import logging

        kind = json.loads((folder / "config.json").read_bytes())["model_type"]
        if kind not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
            raise CaptionerError(
                f"{self.name} is a {kind!r} model, and transformers has no image-to-text model of that type "
                "(code in a model's repository is not run)"
            )
        has_bars = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()  # the caller reports progress
        try:
            result: Any = AutoModelForImageTextToText.from_pretrained(
                str(folder),
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
                dtype=torch.float32 if self.device.type == "cpu" else "auto",
            )
        finally:
            if has_bars:
                logging.enable_progress_bar()
        model, report = result
        if missing := sorted(report["missing_keys"]):
            names = ", ".join(missing[:MAX_NAMES]) + (", ..." if len(missing) > MAX_NAMES else "")
            raise CaptionerError(f"{self.name} lacks {len(missing)} of its weights: {names}")
        return model.eval().requires_grad_(False).to(self.device)

    def _inputs(self, pictures: Sequence[Any]) -> Any:
        """Return batched tensors for `generate`."""
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

    def _shrink(self, image: Image) -> Any:
        """Return a Pillow picture with a short side of at most short_side_px; every processor accepts it."""
        if image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"expected [H, W, 3], got {image.shape}")
        limit = int(self.identity["short_side_px"])
        if limit and min(image.shape[:2]) > limit:
            image = resize_short_side(image, limit)
        return Pillow.fromarray(to_uint8(image))


class _NanWatch:
    """A logits processor that changes nothing and remembers NaN.

    The greedy choice among NaN is the first token of the vocabulary, so a broken model writes "!!!!" and no error.
    """

    def __init__(self) -> None:
        self.seen: Any = False

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.seen = scores.isnan().any() | self.seen  # stays on the device: no wait at each token
        return scores

    def check(self) -> None:
        """Raise SampleError if a score was NaN."""
        if bool(self.seen):
            raise SampleError(
                "not_finite", "the captioner made NaN: its weights are broken, or their precision is too low"
            )


def prompt_ids(folder: Path, identity: Mapping[str, Any], system: str = "") -> list[int]:
    """Return token ids of the question in the model's chat template, with one token for the picture; for engines.

    Raises:
        CaptionerError: the model has no chat template.
    """
    processor, _, tokenizer = _load_processors(folder)
    if not getattr(processor, "chat_template", None):
        raise CaptionerError(f"{identity['model']} has no chat template, which an engine needs")
    text = processor.apply_chat_template(_conversation(str(identity["prompt"]), system), add_generation_prompt=True)
    has_bos = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    return list(tokenizer(text, add_special_tokens=not has_bos)["input_ids"])


def _conversation(prompt: str, system: str) -> list[dict[str, Any]]:
    """Return messages with a placeholder for the picture."""
    question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}
    return [{"role": "system", "content": [{"type": "text", "text": system}]}, question] if system else [question]


def _load_processors(folder: Path) -> tuple[Any, Any, Any]:
    """Load (processor or None, image processor, tokenizer); older models have no processor that joins the other two."""
    from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer

    options = {"local_files_only": True, "trust_remote_code": False}
    try:
        processor = AutoProcessor.from_pretrained(str(folder), **options)
    except (OSError, ValueError, KeyError):  # transformers has no processor for this model type
        processor = None
    image_processor, tokenizer = getattr(processor, "image_processor", None), getattr(processor, "tokenizer", None)
    if image_processor is None or tokenizer is None:
        processor = None
        image_processor = AutoImageProcessor.from_pretrained(str(folder), **options)
        tokenizer = AutoTokenizer.from_pretrained(str(folder), **options)
    return processor, image_processor, tokenizer


def _with_picture(messages: Sequence[Mapping[str, Any]], picture: Any) -> list[dict[str, Any]]:
    """Return a copy of the conversation with the picture; a copy, because transformers changes its input."""
    return [
        {
            **message,
            "content": [
                {**part, "image": picture} if part["type"] == "image" else {**part} for part in message["content"]
            ],
        }
        for message in messages
    ]


def _new_tokens(token_ids: Tensor, prompt_ids: Tensor | None) -> Tensor:
    """Remove the prompt from token ids [B, n]. Decoders repeat the prompt, encoder-decoders do not.

    A comparison finds the repeated part: BLIP repeats all but the prompt's last token, and changes the first one.
    """
    if prompt_ids is None:
        return token_ids
    width = min(token_ids.shape[1], prompt_ids.shape[1])
    same = (token_ids[:, :width] == prompt_ids[:, :width]).all(dim=0).long()
    return token_ids[:, int(same.cumprod(0).sum()) :]


def _special_ids(model: Any, tokenizer: Any) -> tuple[set[int], set[int]]:
    """Return ids that end a text, and ids that may come before a text (bos, pad and eos tokens)."""
    text_config = model.config.get_text_config(decoder=True)
    places = (model.generation_config, model.config, text_config, tokenizer)
    ends = _ids(places, ("eos_token_id", "sep_token_id"))
    return ends, ends | _ids(places, ("bos_token_id", "pad_token_id", "cls_token_id", "decoder_start_token_id"))


def _ids(places: Sequence[Any], names: Sequence[str]) -> set[int]:
    ids: set[int] = set()
    for place in places:
        for name in names:
            value = getattr(place, name, None)
            ids.update(value if isinstance(value, list | tuple) else [] if value is None else [value])
    return ids


def _between_marks(row: Sequence[int], ends: set[int], marks: set[int]) -> list[int]:
    """Return the tokens of one text, between the leading special tokens and the end token; the rest is padding."""
    start = next((place for place, token in enumerate(row) if token not in marks), len(row))
    stop = next((place for place in range(start, len(row)) if row[place] in ends), len(row))
    return list(row[start:stop])
