"""What a picture encoder still recognises: class predictions of DINOv2 by its linear head, or by nearest class means.

`linear` is the head that the encoder's authors trained on ImageNet's labels (a Dinov2ForImageClassification, such as
facebook/dinov2-large-imagenet1k-1-layer). `nearest` trains nothing: a picture belongs to the class whose clean
reference pictures' mean feature is nearest by cosine, with any Dinov2Model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from components.types import Image

METHODS = ("linear", "nearest")


class RecognitionError(ValueError):
    """An encoder or head cannot be used; the message says why."""


@dataclass(kw_only=True)
class Recogniser:
    """An encoder that predicts classes.

    Attributes:
        model: Dinov2ForImageClassification (linear) or Dinov2Model (nearest), frozen.
        processor: how pictures are prepared for it: the one that was saved beside the weights.
        labels: of the linear head by index; empty for nearest.
        means: unit class means [classes, D], which nearest needs; see `learn`.
    """

    model: nn.Module
    processor: Any
    labels: Sequence[str] = ()
    means: Tensor | None = None

    @torch.inference_mode()
    def features(self, pictures: Sequence[Image]) -> Tensor:
        """Unit vectors [B, D] of uint8 pictures: class token and mean patch token joined, as the linear head sees."""
        encoder: Any = self.model.dinov2 if self.labels else self.model
        tokens = encoder(pixel_values=self._pixels(pictures)).last_hidden_state
        return F.normalize(torch.cat([tokens[:, 0], tokens[:, 1:].mean(dim=1)], dim=1), dim=1)

    @torch.inference_mode()
    def predict(self, pictures: Sequence[Image]) -> list[int]:
        """The class number of each uint8 picture [H, W, 3]."""
        if self.labels:
            return self.model(pixel_values=self._pixels(pictures)).logits.argmax(dim=1).tolist()
        if self.means is None:
            raise RecognitionError("nearest class means need reference pictures first: call learn")
        return (self.features(pictures) @ self.means.T).argmax(dim=1).tolist()

    def learn(self, features: Mapping[int, Tensor]) -> None:
        """Class means of clean reference features [n, D], by class number 0 .. classes - 1."""
        missing = sorted(set(range(len(features))) - set(features))
        if missing or not features:
            raise RecognitionError(f"reference features are missing for classes {missing[:5]}")
        self.means = F.normalize(torch.stack([features[i].mean(dim=0) for i in range(len(features))]), dim=1)

    def _pixels(self, pictures: Sequence[Image]) -> Tensor:
        device = next(self.model.parameters()).device
        return self.processor(images=list(pictures), return_tensors="pt").pixel_values.to(device)


def load_recogniser(name: str, method: str, device: str = "cpu") -> Recogniser:
    """A DINOv2 folder or hub id with its own picture preparation; safetensors only, every key accounted for.

    Raises:
        RecognitionError: an unknown method, no such weights, or weights without a trained head where one is needed.
    """
    from transformers import AutoImageProcessor, Dinov2ForImageClassification, Dinov2Model

    if method not in METHODS:
        raise RecognitionError(f"unknown method {method!r}; there are {', '.join(METHODS)}")
    kind = Dinov2ForImageClassification if method == "linear" else Dinov2Model
    try:
        processor = AutoImageProcessor.from_pretrained(name)
        loaded: Any = kind.from_pretrained(name, use_safetensors=True, output_loading_info=True)
    except (OSError, ValueError) as error:
        raise RecognitionError(f"{name}: no DINOv2 weights with a preprocessor there ({error})") from error
    model, told = loaded
    unexpected = set(told["unexpected_keys"]) - (
        {"classifier.weight", "classifier.bias"} if method == "nearest" else set()
    )
    if told["missing_keys"] or unexpected or told["mismatched_keys"]:
        faults = {"missing": sorted(told["missing_keys"]), "unexpected": sorted(unexpected)}
        raise RecognitionError(f"{name}: weights do not fit method {method!r}: {faults}")
    labels: tuple[str, ...] = ()
    if method == "linear":
        labels = tuple(str(model.config.id2label[i]) for i in range(model.config.num_labels))
    return Recogniser(model=model.to(device).eval().requires_grad_(False), processor=processor, labels=labels)


def class_numbers(folders: Sequence[str], labels: Sequence[str], listed: Sequence[str] = ()) -> dict[str, int]:
    """Which class each folder of pictures is.

    `listed` names folders in the head's order. Without it folders are matched to labels by name, or by order where
    there are as many of both: ImageNet's folders, sorted, are the usual order of its heads.

    Args:
        labels: of a head; empty where classes are learned from the folders themselves.

    Raises:
        RecognitionError: folders that cannot be matched.
    """
    names = sorted(folders)
    if listed:
        numbers = {name: number for number, name in enumerate(listed)}
    elif not labels or (len(names) == len(labels) and not set(names) <= set(labels)):
        numbers = {name: number for number, name in enumerate(names)}
    else:
        numbers = {name: number for number, name in enumerate(labels)}
    strange = [name for name in names if name not in numbers]
    if strange:
        raise RecognitionError(
            f"{len(strange)} of {len(names)} folders are no class of the head, first {strange[0]!r}: give the head's "
            "folder names in its order (--classes FILE, one a line)"
        )
    if labels and max(numbers.values()) >= len(labels):
        raise RecognitionError(f"{len(numbers)} classes are listed, but the head has {len(labels)}")
    return {name: numbers[name] for name in names}
