"""Class predictions: unit features, nearest means and a linear head by hand, folders to classes, and weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from components.evaluation.recognition import Recogniser, RecognitionError, class_numbers, load_recogniser


class Tokens(nn.Module):
    """An encoder whose tokens are the picture's pixels in reading order, or a classifier with `dinov2` as encoder."""

    def __init__(self, classifies: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        if classifies:
            self.dinov2 = Tokens()

    def forward(self, pixel_values: Tensor) -> SimpleNamespace:
        tokens = pixel_values.flatten(2).transpose(1, 2)
        return SimpleNamespace(last_hidden_state=tokens, logits=pixel_values.sum(dim=(2, 3)))


def processor(images: Sequence[np.ndarray], return_tensors: str) -> SimpleNamespace:
    """Pixels as float [B, 3, H, W]."""
    assert return_tensors == "pt"
    return SimpleNamespace(pixel_values=torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float())


def picture(*pixels: tuple[int, int, int]) -> np.ndarray:
    """A picture of one row."""
    return np.array([pixels], dtype=np.uint8)


def recogniser(labels: Sequence[str] = ()) -> Recogniser:
    """A recogniser on Tokens."""
    return Recogniser(model=Tokens(bool(labels)), processor=processor, labels=labels)


@pytest.mark.parametrize("labels", [(), ("a", "b", "c")])
def test_features_join_the_class_token_and_the_mean_patch(labels: Sequence[str]) -> None:
    """Class token (0, 3, 0), patches (4, 0, 0) and (0, 0, 8): (0, 3, 0, 2, 0, 4) over sqrt(29)."""
    features = recogniser(labels).features([picture((0, 3, 0), (4, 0, 0), (0, 0, 8))])
    torch.testing.assert_close(features, torch.tensor([[0.0, 3, 0, 2, 0, 4]]) / 29**0.5)


def test_the_nearest_mean_by_cosine_wins() -> None:
    """Means are taken of unit features and scaled to length 1, so a class of spread features has no disadvantage."""
    nearest = recogniser()
    nearest.learn({1: torch.tensor([[0.6, 0.8], [0.8, 0.6]]), 0: torch.tensor([[1.0, 0.0], [0.0, -1.0]])})
    assert nearest.means is not None
    torch.testing.assert_close(nearest.means, torch.tensor([[0.5, -0.5], [0.5, 0.5]]) * 2**0.5)
    nearest.learn({0: torch.tensor([[0.0, 1, 0, 0, 1, 0]]), 1: torch.tensor([[1.0, 0, 0, 1, 0, 0]])})
    shown = [picture((9, 1, 0), (7, 1, 0)), picture((1, 9, 0), (1, 7, 0)), picture((5, 4, 0), (5, 4, 0))]
    assert nearest.predict(shown) == [1, 0, 1]


def test_the_linear_head_decides_alone() -> None:
    assert recogniser(("a", "b", "c")).predict([picture((1, 5, 2), (0, 0, 2)), picture((1, 1, 3), (0, 0, 0))]) == [1, 2]


def test_means_are_needed_of_every_class() -> None:
    nearest = recogniser()
    with pytest.raises(RecognitionError, match="call learn"):
        nearest.predict([picture((1, 1, 1), (1, 1, 1))])
    for features in ({}, {1: torch.ones(1, 2)}):
        with pytest.raises(RecognitionError, match="missing for classes"):
            nearest.learn(features)
    with pytest.raises(RecognitionError, match=r"classes \[0, 1, 2, 3, 4\]"):
        nearest.learn({n + 9: torch.ones(1, 2) for n in range(9)})


@pytest.mark.parametrize(
    ("folders", "labels", "head_folders", "numbers"),
    [
        (["b", "a"], [], [], {"a": 0, "b": 1}),
        (["b", "a"], ["b", "a", "c"], [], {"a": 1, "b": 0}),
        (["n2", "n1"], ["cat", "dog"], [], {"n1": 0, "n2": 1}),  # as many as labels: the sorted order
        (["b", "a"], ["b", "a"], [], {"a": 1, "b": 0}),
        (["n2"], ["cat", "dog", "bird"], ["n7", "n2", "n1"], {"n2": 1}),
        (["n2"], [], ["n7", "n2"], {"n2": 1}),
    ],
)
def test_folders_get_the_numbers_of_the_head(
    folders: list[str], labels: list[str], head_folders: list[str], numbers: dict[str, int]
) -> None:
    result = class_numbers(folders, labels, head_folders)
    assert result == numbers and list(result) == sorted(folders)


@pytest.mark.parametrize(
    ("folders", "labels", "head_folders", "message"),
    [
        (["n1"], ["cat", "dog"], [], "1 of 1 folders are not classes of the head, first 'n1'"),
        (["n2", "cat", "n1"], ["cat", "dog"], [], "2 of 3 folders are not classes of the head, first 'n1'"),
        (["n3"], ["cat", "dog"], ["n1", "n2"], "1 of 1 folders are not classes"),
        (["n1"], ["cat", "dog"], ["n1", "n2", "n3"], "3 classes are listed, but the head has 2"),
    ],
)
def test_folders_without_a_class_are_refused(
    folders: list[str], labels: list[str], head_folders: list[str], message: str
) -> None:
    with pytest.raises(RecognitionError, match=message):
        class_numbers(folders, labels, head_folders)


def save(folder: Path, kind: Any, **config: Any) -> Any:
    """A tiny DINOv2 folder with random weights."""
    from transformers import BitImageProcessor, Dinov2Config

    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    model = kind(Dinov2Config(**sizes, **config)).eval()
    model.save_pretrained(folder)
    BitImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(folder)
    return model


def test_weights_come_from_a_folder_and_must_fit(tmp_path: Path) -> None:
    from transformers import Dinov2ForImageClassification, Dinov2Model

    head = save(tmp_path / "head", Dinov2ForImageClassification, id2label={0: "cat", 1: "dog", 2: "owl"})
    linear = load_recogniser(str(tmp_path / "head"), "linear")
    assert linear.labels == ("cat", "dog", "owl") and not linear.model.training
    assert not any(parameter.requires_grad for parameter in linear.model.parameters())
    shown = np.random.default_rng(0).integers(0, 256, (28, 28, 3), dtype=np.uint8)
    pixels = linear.processor(images=[shown], return_tensors="pt").pixel_values
    with torch.no_grad():
        assert linear.predict([shown]) == head(pixel_values=pixels).logits.argmax(1).tolist()
    nearest = load_recogniser(str(tmp_path / "head"), "nearest")  # the head's own weights are left out
    assert nearest.labels == () and nearest.features([shown]).shape == (1, 16)
    torch.testing.assert_close(nearest.features([shown]), linear.features([shown]))
    save(tmp_path / "bare", Dinov2Model)
    assert load_recogniser(str(tmp_path / "bare"), "nearest").labels == ()
    with pytest.raises(RecognitionError, match=r"weights do not fit method 'linear'.*classifier\.bias"):
        load_recogniser(str(tmp_path / "bare"), "linear")
    with pytest.raises(RecognitionError, match="no DINOv2 weights"):
        load_recogniser(str(tmp_path / "nowhere"), "nearest")
    with pytest.raises(RecognitionError, match=r"unknown method 'lineer'\. Choose from linear, nearest"):
        load_recogniser(str(tmp_path / "bare"), "lineer")
