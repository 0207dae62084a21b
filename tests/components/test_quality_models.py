"""Learned scores: the numbers of transformers' pipelines, independence of the batch, and errors."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from components import quality_models
from components.corpora import ModelScore
from components.quality_models import build_scorer, check_scorer
from components.randomness import generator, seeded_init
from components.types import SampleError

LABELS = {0: "normal", 1: "nsfw", 2: "Watermark"}


def picture(height: int, width: int, seed: int) -> np.ndarray:
    """Noise over a gradient, uint8."""
    ramp = np.linspace(0, 160, width)[None, :, None] * np.linspace(0.3, 1, height)[:, None, None]
    noise = generator(seed, "picture").uniform(0, 90, (height, width, 3))
    return (ramp + noise).clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def pictures() -> list[np.ndarray]:
    """Pictures of three sizes after a detector's preprocessing, one of them twice."""
    return [picture(48, 64, 1), picture(64, 40, 2), picture(48, 64, 3), picture(50, 50, 4)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny networks of every kind in save_pretrained's format; large weights, so that scores differ."""
    from transformers import (
        CLIPConfig,
        CLIPImageProcessor,
        CLIPModel,
        CLIPTokenizer,
        DetrConfig,
        DetrForObjectDetection,
        DetrImageProcessor,
        ResNetConfig,
        ViTConfig,
        ViTForImageClassification,
        ViTImageProcessor,
    )

    folder = tmp_path_factory.mktemp("models")
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    words = ["!", "a</w>", "b</w>", "<|startoftext|>", "<|endoftext|>"]
    (folder / "clip").mkdir()
    (folder / "clip" / "vocab.json").write_text(json.dumps({word: n for n, word in enumerate(words)}))
    (folder / "clip" / "merges.txt").write_text("#version: 0.2\n")
    with seeded_init(0, "models"):
        vision = {**small, "image_size": 32, "patch_size": 8, "initializer_range": 0.5}
        classes = {"id2label": LABELS, "label2id": {name: n for n, name in LABELS.items()}}
        classifier = ViTForImageClassification(ViTConfig(**vision, **classes))
        torch.nn.init.normal_(classifier.classifier.weight)
        many = ViTForImageClassification(ViTConfig(**vision, **classes, problem_type="multi_label_classification"))
        clip = CLIPModel(
            CLIPConfig(
                text_config={**small, "vocab_size": 5, "max_position_embeddings": 8, "bos_token_id": 3}
                | {"eos_token_id": 4, "pad_token_id": 4, "initializer_range": 0.5},
                vision_config=vision,
                projection_dim=8,
            )
        )
        backbone = ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", out_features=["stage2"]
        )
        detr = DetrConfig(
            backbone_config=backbone,
            num_queries=6,
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_ffn_dim=16,
            decoder_ffn_dim=16,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            id2label={0: "cat", 1: "face", 2: "N/A", 3: "N/A"},
            label2id={"cat": 0, "face": 1},
        )
        detector = DetrForObjectDetection(detr)
        torch.nn.init.normal_(detector.class_labels_classifier.weight, std=0.3)
        detector.class_labels_classifier.bias.data[1] = 4.0
    size = {"height": 32, "width": 32}
    for name, model in (("vit", classifier), ("many", many), ("clip", clip), ("detr", detector)):
        model.save_pretrained(folder / name)
    ViTImageProcessor(size=size).save_pretrained(folder / "vit")
    ViTImageProcessor(size=size).save_pretrained(folder / "many")
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size).save_pretrained(folder / "clip")
    CLIPTokenizer.from_pretrained(folder / "clip", model_max_length=8).save_pretrained(folder / "clip")
    DetrImageProcessor(size={"shortest_edge": 32, "longest_edge": 64}).save_pretrained(folder / "detr")
    return folder


def score_of(models: Path, kind: str, **changes: object) -> ModelScore:
    """Make the score of one of the tiny models."""
    defaults = {
        "classifier": {"model": str(models / "vit"), "label": "nsfw"},
        "zero_shot": {"model": str(models / "clip"), "label": "a", "others": ["b", "a b"]},
        "detector": {"model": str(models / "detr"), "label": "face"},
    }[kind]
    return ModelScore(**{"name": "score", "kind": kind, "short_side_px": 0, **defaults, **changes})  # type: ignore[arg-type]


def by_pipeline(models: Path, kind: str, image: np.ndarray) -> float:
    """Compute the score with transformers' own pipeline."""
    from PIL import Image
    from transformers import pipeline

    pillow_image = Image.fromarray(image)
    if kind == "classifier":
        answers = pipeline("image-classification", model=str(models / "vit"))(pillow_image, top_k=3)
        return next(a["score"] for a in answers if a["label"] == "nsfw")
    if kind == "zero_shot":
        pipe = pipeline("zero-shot-image-classification", model=str(models / "clip"))
        answers = pipe(pillow_image, candidate_labels=["a", "b", "a b"], hypothesis_template="{}")
        return next(a["score"] for a in answers if a["label"] == "a")
    answers = pipeline("object-detection", model=str(models / "detr"))(pillow_image, threshold=0.0)
    return max((a["score"] for a in answers if a["label"] == "face"), default=0.0)


@pytest.mark.parametrize("kind", ["classifier", "zero_shot", "detector"])
def test_scores_are_those_of_the_librarys_own_pipeline(models: Path, pictures: list[np.ndarray], kind: str) -> None:
    scores = build_scorer(score_of(models, kind))(pictures)
    assert scores == pytest.approx([by_pipeline(models, kind, image) for image in pictures], abs=1e-5)
    assert all(0 <= value <= 1 for value in scores)
    assert len(set(scores)) > 1  # equal scores would prove little


def test_an_object_that_is_nowhere_the_most_likely_scores_0(models: Path, pictures: list[np.ndarray]) -> None:
    assert build_scorer(score_of(models, "detector", label="cat"))(pictures) == [0.0] * len(pictures)


@pytest.mark.parametrize("kind", ["classifier", "zero_shot", "detector"])
def test_a_network_that_makes_nan_gives_no_score(
    models: Path, pictures: list[np.ndarray], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A detector would find nothing, and the score 0 could pass a filter."""
    load = quality_models._load

    def broken(*arguments: Any) -> Any:
        model = load(*arguments)
        for weight in model.parameters():
            weight.fill_(float("nan"))
        return model

    monkeypatch.setattr(quality_models, "_load", broken)
    assert all(np.isnan(build_scorer(score_of(models, kind))(pictures)))


@pytest.mark.parametrize("kind", ["classifier", "zero_shot", "detector"])
def test_a_score_does_not_depend_on_its_batch(models: Path, pictures: list[np.ndarray], kind: str) -> None:
    """Exact on a CPU one by one; in batches, a CPU's sums may depend on the position in the batch."""
    for rows in (None, 3):
        judge = build_scorer(score_of(models, kind), rows=rows)
        alone = [judge([image])[0] for image in pictures]
        for order in ([0, 1, 2, 3], [3, 2, 1, 0], [2, 2, 2, 2, 0]):
            together, expected = judge([pictures[k] for k in order]), [alone[k] for k in order]
            assert together == (expected if rows is None else pytest.approx(expected, rel=1e-5))
        assert judge([]) == []


def test_scores_are_probabilities_of_the_label(models: Path, pictures: list[np.ndarray]) -> None:
    from transformers import ViTForImageClassification, ViTImageProcessor

    columns = [build_scorer(score_of(models, "classifier", label=label))(pictures) for label in LABELS.values()]
    assert [sum(column) for column in zip(*columns, strict=True)] == pytest.approx([1.0] * len(pictures), abs=1e-5)
    many = [build_scorer(score_of(models, "classifier", label=n, model=str(models / "many"))) for n in LABELS.values()]
    network = ViTForImageClassification.from_pretrained(models / "many")
    processor = ViTImageProcessor.from_pretrained(models / "many")
    with torch.no_grad():
        logits = network(**processor(images=pictures[0], return_tensors="pt")).logits[0].double().numpy()
    values = [judge(pictures[:1])[0] for judge in many]
    assert values == pytest.approx(list(1 / (1 + np.exp(-logits))), abs=1e-5)


def test_pictures_are_shrunk_first_and_never_enlarged(models: Path) -> None:
    from components.images import resize_short_side

    large, small = picture(96, 120, 5), picture(20, 30, 6)
    judge, judge_unshrunk = (
        build_scorer(score_of(models, "classifier", short_side_px=24)),
        build_scorer(score_of(models, "classifier")),
    )
    assert judge([large, small]) == judge_unshrunk([resize_short_side(large, 24), small])
    assert judge([large]) != judge_unshrunk([large])


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("classifier", {"label": "watermark"}, "has no label 'watermark'. Did you mean \"Watermark\""),
        ("classifier", {"label": "zzz"}, "Known: normal, nsfw, Watermark"),
        ("detector", {"label": "faces"}, 'Did you mean "face"'),
        ("zero_shot", {"others": []}, "needs others"),
        ("classifier", {"model": "no/such-model-here"}, "cannot be used as a classifier"),
    ],
)
def test_wrong_labels_and_models_are_refused(models: Path, kind: str, changes: dict[str, object], message: str) -> None:
    for judge in (build_scorer, check_scorer):
        with pytest.raises(ValueError, match="score score: ") as error:
            judge(score_of(models, kind, **changes))
        assert message in str(error.value)


def test_names_are_checked_without_weights(models: Path, tmp_path: Path) -> None:
    bare = Path(shutil.copytree(models / "vit", tmp_path / "vit"))
    (bare / "model.safetensors").unlink()
    check_scorer(score_of(models, "classifier", model=str(bare)))
    with pytest.raises(ValueError, match="Did you mean"):
        check_scorer(score_of(models, "classifier", model=str(bare), label="nfsw"))
    check_scorer(score_of(models, "zero_shot"))
    check_scorer(ModelScore(name="score", kind="pyiqa", model="musiq"))


def test_a_network_without_its_head_is_refused(models: Path, tmp_path: Path) -> None:
    """transformers alone would fill the head with random numbers and warn."""
    from safetensors.torch import load_file, save_file

    broken = Path(shutil.copytree(models / "vit", tmp_path / "vit"))
    tensors = load_file(broken / "model.safetensors")
    rest = {k: v for k, v in tensors.items() if not k.startswith("classifier")}
    assert len(rest) < len(tensors)
    save_file(rest, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 2 of the weights .*classifier"):
        build_scorer(score_of(models, "classifier", model=str(broken)))


def test_pickled_weights_are_not_read(models: Path, tmp_path: Path) -> None:
    from transformers import ViTForImageClassification

    broken = Path(shutil.copytree(models / "vit", tmp_path / "vit"))
    weights = ViTForImageClassification.from_pretrained(broken).state_dict()
    (broken / "model.safetensors").unlink()
    torch.save(weights, broken / "pytorch_model.bin")
    with pytest.raises(ValueError, match="cannot be used as a classifier"):
        build_scorer(score_of(models, "classifier", model=str(broken)))


def test_code_of_a_model_is_not_run(models: Path, tmp_path: Path) -> None:
    evil = Path(shutil.copytree(models / "vit", tmp_path / "vit"))
    config = json.loads((evil / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}}
    (evil / "config.json").write_text(json.dumps(config))
    (evil / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    with pytest.raises(ValueError, match="cannot be used as a classifier"):
        build_scorer(score_of(models, "classifier", model=str(evil)))
    assert not (tmp_path / "ran").exists()


def test_wrong_pictures_raise_a_sample_error(models: Path) -> None:
    judge = build_scorer(score_of(models, "classifier"))
    for bad in (np.zeros((8, 8), np.uint8), np.zeros((8, 8, 3), np.float32), np.zeros((0, 8, 3), np.uint8)):
        with pytest.raises(SampleError) as error:
            judge([bad])
        assert error.value.code == "shape"


# --- pyiqa ------------------------------------------------------------------------------------------------------------


def test_pyiqa_scores_pictures_alone_and_gives_nan_if_undefined() -> None:
    from components.evaluation.metrics import Metrics

    judge = build_scorer(ModelScore(name="blocky", kind="pyiqa", model="piqe", short_side_px=0))
    pictures = [picture(64, 80, 1), picture(96, 64, 2), picture(20, 20, 3)]
    scores = judge(pictures)
    assert scores[:2] == [Metrics(("piqe",)).score(image)["piqe"] for image in pictures[:2]]
    assert np.isnan(scores[2])  # piqe needs sides of 32 px
    assert judge(pictures[1:2]) == scores[1:2]


def test_a_random_metric_draws_the_same_for_every_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """tres crops 224 px squares at random; a network with untrained weights replaces the download."""
    import pyiqa
    from torch import nn

    real = pyiqa.create_metric

    class RandomNetwork(nn.Module):
        """pyiqa's random crop, plus a draw from each other global generator."""

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            from pyiqa.archs.arch_util import random_crop

            crops = random_crop(image, crop_size=32, crop_num=3)
            return crops.mean() * 255 + torch.rand(()) + random.random()

    def create(name: str, device: str) -> nn.Module:
        metric = real("entropy", device=device)
        metric.net = RandomNetwork()
        return metric

    monkeypatch.setattr(pyiqa, "create_metric", create)
    judge = build_scorer(ModelScore(name="drawn", kind="pyiqa", model="tres", short_side_px=0))
    a, b = picture(64, 80, 1), picture(64, 80, 2)
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    random.seed(5)
    before = (torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate())  # noqa: NPY002
    first = judge([a, b, a])
    assert first[0] == first[2] != first[1]
    assert judge([b]) == [first[1]]
    after = (torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate())  # noqa: NPY002
    assert after == before


def test_code_in_pyiqas_weights_is_not_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """pyiqa loads with weights_only=False; a file with code must raise an error, and its code must not run."""
    import pyiqa
    from pyiqa.archs.arch_util import load_pretrained_network

    class Payload:
        def __reduce__(self) -> tuple[object, tuple[object, ...]]:
            return open, (str(tmp_path / "ran"), "w")

    torch.save({"params": Payload()}, tmp_path / "evil.pth")
    torch.load(tmp_path / "evil.pth", weights_only=False)["params"].close()
    assert (tmp_path / "ran").exists()  # loading without weights_only runs the code
    (tmp_path / "ran").unlink()

    def create(name: str, device: str) -> object:
        return load_pretrained_network(torch.nn.Identity(), str(tmp_path / "evil.pth"), weight_keys="params")

    monkeypatch.setattr(pyiqa, "create_metric", create)
    with pytest.raises(ValueError, match=r"metric musiq: its weights .*evil\.pth cannot be read .*Weights only"):
        build_scorer(ModelScore(name="evil", kind="pyiqa", model="musiq"))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("lpips", "compares with a target"),
        ("fid", "judges sets of pictures"),
        ("clipscore", "pictures with captions"),
        ("musik", 'Did you mean "musiq"'),
    ],
)
def test_a_metric_that_cannot_score_a_single_picture_is_refused(metric: str, message: str) -> None:
    for judge in (build_scorer, check_scorer):
        with pytest.raises(ValueError, match=message):
            judge(ModelScore(name="score", kind="pyiqa", model=metric))


def test_missing_weights_of_a_metric_end_the_scorer_and_not_each_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    import pyiqa

    def create(name: str, device: str) -> object:
        raise OSError("no network")

    monkeypatch.setattr(pyiqa, "create_metric", create)
    with pytest.raises(ValueError, match=r"metric musiq cannot be opened \(OSError: no network\)"):
        build_scorer(ModelScore(name="score", kind="pyiqa", model="musiq"))
