"""Class predictions of restored pictures by DINOv2, with its linear head or with nearest class means.

`linear` uses the head that the encoder's authors trained on ImageNet's labels (a Dinov2ForImageClassification, such as
facebook/dinov2-large-imagenet1k-1-layer). `nearest` needs no training and works with any Dinov2Model: it predicts the
class whose mean feature over clean reference pictures is nearest by cosine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from components.naming import list_some
from components.types import Image

METHODS = ("linear", "nearest")


class RecognitionError(ValueError):
    """An encoder or head cannot be used; the message says why."""


@dataclass(kw_only=True)
class Recogniser:
    """An encoder that predicts classes.

    Attributes:
        model: Dinov2ForImageClassification (linear) or Dinov2Model (nearest), frozen.
        processor: prepares pictures for the model; it is saved with the weights.
        labels: class labels of the linear head by index; empty for nearest.
        means: unit class means [classes, D], for nearest only; see `learn`.
    """

    model: nn.Module
    processor: Any
    labels: Sequence[str] = ()
    means: Tensor | None = None

    @torch.inference_mode()
    def features(self, pictures: Sequence[Image]) -> Tensor:
        """Unit vectors [B, D] of uint8 pictures: joined class token and mean patch token, as in the linear head."""
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
        """Sets `means` from clean reference features [n, D], by class number 0 .. classes - 1."""
        missing = sorted(set(range(len(features))) - set(features))
        if missing or not features:
            raise RecognitionError(f"reference features are missing for classes {missing[:5]}")
        self.means = F.normalize(torch.stack([features[i].mean(dim=0) for i in range(len(features))]), dim=1)

    def _pixels(self, pictures: Sequence[Image]) -> Tensor:
        device = next(self.model.parameters()).device
        return self.processor(images=list(pictures), return_tensors="pt").pixel_values.to(device)


def load_recogniser(name: str, method: str, device: str = "cpu") -> Recogniser:
    """Loads a DINOv2 folder or hub id with its processor; reads safetensors only, and every key must fit.

    Raises:
        RecognitionError: the method is unknown, the weights are missing, or `linear` has no trained head.
    """
    from transformers import AutoImageProcessor, Dinov2ForImageClassification, Dinov2Model

    if method not in METHODS:
        raise RecognitionError(f"unknown method {method!r}. Choose from {', '.join(METHODS)}")
    kind = Dinov2ForImageClassification if method == "linear" else Dinov2Model
    try:
        processor = AutoImageProcessor.from_pretrained(name)
        model_and_info: Any = kind.from_pretrained(name, use_safetensors=True, output_loading_info=True)
    except (OSError, ValueError) as error:
        raise RecognitionError(f"{name}: no DINOv2 weights with a preprocessor there ({error})") from error
    model, info = model_and_info
    unexpected = set(info["unexpected_keys"]) - (
        {"classifier.weight", "classifier.bias"} if method == "nearest" else set()
    )
    if info["missing_keys"] or unexpected or info["mismatched_keys"]:
        mismatched = [str(key) for key in info["mismatched_keys"]]
        faults = {"missing": sorted(info["missing_keys"]), "unexpected": sorted(unexpected), "mismatched": mismatched}
        text = "; ".join(f"{len(keys)} {fault}: {list_some(keys)}" for fault, keys in faults.items() if keys)
        raise RecognitionError(f"{name}: weights do not fit method {method!r}: {text}")
    labels: tuple[str, ...] = ()
    if method == "linear":
        labels = tuple(str(model.config.id2label[i]) for i in range(model.config.num_labels))
    return Recogniser(model=model.to(device).eval().requires_grad_(False), processor=processor, labels=labels)


def class_numbers(folders: Sequence[str], labels: Sequence[str], head_folders: Sequence[str] = ()) -> dict[str, int]:
    """The class number of each folder of pictures.

    Without `head_folders`, folders are matched to labels by name. If there are as many folders as labels, their sorted
    order may be used instead: ImageNet's folders, sorted, have the usual order of its heads.

    Args:
        folders: folder names.
        labels: labels of a head; empty if the folders themselves are the classes.
        head_folders: folder names in the order of the head.

    Raises:
        RecognitionError: folders that cannot be matched.
    """
    names = sorted(folders)
    if head_folders:
        numbers = {name: number for number, name in enumerate(head_folders)}
    elif not labels or (len(names) == len(labels) and not set(names) <= set(labels)):
        numbers = {name: number for number, name in enumerate(names)}
    else:
        numbers = {name: number for number, name in enumerate(labels)}
    unmatched = [name for name in names if name not in numbers]
    if unmatched:
        raise RecognitionError(
            f"{len(unmatched)} of {len(names)} folders are not classes of the head, first {unmatched[0]!r}: give the "
            "folder names in the order of the head (--classes FILE, one name per line)"
        )
    if labels and max(numbers.values()) >= len(labels):
        raise RecognitionError(f"{len(numbers)} classes are listed, but the head has {len(labels)}")
    return {name: numbers[name] for name in names}
