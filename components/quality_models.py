"""Scores of pictures by learned models, for curation filters.

    kind        model                                             score
    pyiqa       any metric of pyiqa that needs no target          as the metric defines it
    classifier  AutoModelForImageClassification                   probability of `label`, 0..1
    zero_shot   AutoModelForZeroShotImageClassification (CLIP)    probability of prompt `label` against `others`, 0..1
    detector    AutoModelForObjectDetection                       highest confidence of an object `label`, 0..1

Models that work (names and labels are those of their pages; nothing here loads one by default):

    NSFW        classifier  Falconsai/nsfw_image_detection               label nsfw
    watermark   classifier  prithivMLmods/Watermark-Detection-SigLIP2    label Watermark
    aesthetic   pyiqa       laion_aes (1..10), nima, or musiq-ava; or zero_shot with your own prompts
    people      detector    facebook/detr-resnet-50                      label person
    faces       detector    aditmohan96/detr-finetuned-face, revision refs/pr/1 (the one with safetensors); its
                            config.json names the label

Weights of transformers models are read from safetensors only, pyiqa's with torch's weights-only reader. Code in a
model's repository is never run. A picture's score does not depend on other pictures of the call; see `build_scorer`.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from components.corpora import ModelScore
from components.evaluation.metrics import Metrics, metric_info
from components.images import resize_short_side
from components.naming import near_name
from components.types import Image, SampleError

if TYPE_CHECKING:
    from torch import Tensor

Scorer = Callable[[Sequence[Image]], list[float]]
"""Pictures uint8 [H, W, 3] of any sizes -> one number each; NaN if the model gives no number for a picture."""

SEED = 0
"""Seed of the random crops that some pyiqa metrics draw for each picture."""


def build_scorer(score: ModelScore, device: str = "cpu", rows: int | None = None) -> Scorer:
    """Load the model of a score column.

    Pictures are shrunk to `score.short_side_px` and preprocessed one by one, without padding to a common size. On the
    CPU the network also runs one by one. On a GPU it runs on batches of pictures of one preprocessed size, and a batch
    that is not full repeats its first picture: cuBLAS and cuDNN choose the order of their sums by the shape only.

    Args:
        score: the model and its settings.
        device: "cpu" or a torch device.
        rows: pictures per forward pass; None means 1 on the CPU and `score.batch_size` elsewhere.

    Returns:
        A function of pictures. It raises SampleError (code "shape") if a picture is not uint8 [H, W, 3].

    Raises:
        ValueError: the metric or model does not exist, the metric cannot score a single picture, the model does not
            have the label (with a suggestion), `others` is empty, or weights are missing.
    """
    build = {"pyiqa": _pyiqa, "classifier": _classifier, "zero_shot": _zero_shot, "detector": _detector}[score.kind]
    rows = rows or (1 if device == "cpu" else max(1, score.batch_size))
    judge = build(score, device, rows)

    def scores(images: Sequence[Image]) -> list[float]:
        return judge([_shrink(image, score.short_side_px) for image in images])

    return scores


def check_scorer(score: ModelScore) -> None:
    """Raise the errors of `build_scorer` for wrong names; only the model's config.json is read."""
    if score.kind == "pyiqa":
        _check_metric(score)
    elif score.kind == "zero_shot":
        _check_others(score)
        _config(score)
    else:
        _label_numbers(score, _config(score))


def _shrink(image: Image, short_side_px: int) -> Image:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        raise SampleError("shape", f"a picture must be uint8 [H, W, 3], got {image.dtype} {image.shape}")
    smaller = 0 < short_side_px < min(image.shape[:2])
    return resize_short_side(image, short_side_px) if smaller else image


# --- pyiqa ------------------------------------------------------------------------------------------------------------


def _pyiqa(score: ModelScore, device: str, rows: int) -> Scorer:
    """Score pictures one by one, because some metrics normalise over the batch; reset the random state for each."""
    _check_metric(score)
    metrics = Metrics((score.model,), device)
    with _weights_only():
        metrics.load()

    def judge(images: Sequence[Image]) -> list[float]:
        values = []
        for image in images:
            with _weights_only(), _same_draws(device):
                values.append(metrics.score(image).get(score.model, float("nan")))
        return values

    return judge


def _check_metric(score: ModelScore) -> None:
    info = metric_info(score.model)
    if info.full_reference:
        raise ValueError(f"score {score.name}: {score.model} compares with a target, which a single picture lacks")
    if info.judges:
        raise ValueError(f"score {score.name}: {score.model} judges {info.judges}, not a picture alone")


@contextmanager
def _weights_only() -> Iterator[None]:
    """Force torch.load to load weights only; pyiqa turns that off (arch_util.load_pretrained_network)."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@contextmanager
def _same_draws(device: str) -> Iterator[None]:
    """Seed the global random states with SEED and restore them afterwards; pyiqa draws from global states only."""
    import torch

    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002 - pyiqa draws from it
    with torch.random.fork_rng(devices=[torch.device(device)] if device.startswith("cuda") else []):
        torch.manual_seed(SEED)
        random.seed(SEED)
        np.random.seed(SEED)  # noqa: NPY002
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)  # noqa: NPY002


# --- transformers -----------------------------------------------------------------------------------------------------


def _classifier(score: ModelScore, device: str, rows: int) -> Scorer:
    """Softmax over the labels; sigmoid if the model's labels do not exclude each other."""
    config = _config(score)
    labels = _label_numbers(score, config)
    model, processor = _load(score, "AutoModelForImageClassification", device), _processor(score)
    independent = config.num_labels == 1 or config.problem_type == "multi_label_classification"
    if config.problem_type == "regression":
        raise ValueError(f"score {score.name}: {score.model} predicts a number and no probability of a label")

    def scores_of(output: Any, sizes: Sequence[tuple[int, int]]) -> list[float]:
        logits = output.logits.float()
        if independent:
            return logits.sigmoid()[:, labels].amax(dim=1).tolist()
        return logits.softmax(dim=1)[:, labels].sum(dim=1).tolist()

    return _network(model, processor, {}, scores_of, device, rows)


def _zero_shot(score: ModelScore, device: str, rows: int) -> Scorer:
    """Softmax over the prompts, also for SigLIP, whose sigmoid would score `label` without `others`."""
    from transformers import AutoTokenizer

    _check_others(score)
    config = _config(score)
    model, processor = _load(score, "AutoModelForZeroShotImageClassification", device), _processor(score)
    tokenizer = _from_pretrained(score, AutoTokenizer.from_pretrained)
    # SigLIP was trained on padded texts, and its pooling reads the last position
    full = "siglip" in config.model_type
    text = tokenizer(
        [score.label, *score.others],
        padding="max_length" if full else True,
        max_length=64 if full else None,
        truncation=True,
        return_tensors="pt",
    ).to(device)

    def scores_of(output: Any, sizes: Sequence[tuple[int, int]]) -> list[float]:
        return output.logits_per_image.float().softmax(dim=1)[:, 0].tolist()

    return _network(model, processor, dict(text), scores_of, device, rows)


def _check_others(score: ModelScore) -> None:
    if not score.others:
        raise ValueError(f"score {score.name}: zero_shot needs others, the prompts to compare {score.label!r} with")


def _detector(score: ModelScore, device: str, rows: int) -> Scorer:
    """Highest confidence of the label; the image processor turns logits into confidences (softmax or sigmoid).

    With a softmax each query counts for its most likely object only; a label that is most likely nowhere scores 0.
    """
    config = _config(score)
    labels = set(_label_numbers(score, config))
    model, processor = _load(score, "AutoModelForObjectDetection", device), _processor(score)
    if not hasattr(processor, "post_process_object_detection"):
        raise ValueError(f"score {score.name}: the processor of {score.model} cannot read detections")

    def scores_of(output: Any, sizes: Sequence[tuple[int, int]]) -> list[float]:
        answers = processor.post_process_object_detection(output, threshold=0.0, target_sizes=list(sizes))
        return [
            max((float(s) for s, n in zip(a["scores"], a["labels"], strict=True) if int(n) in labels), default=0.0)
            for a in answers
        ]

    return _network(model, processor, {}, scores_of, device, rows)


def _network(
    model: Any,
    processor: Any,
    shared_inputs: Mapping[str, Any],
    scores_of: Callable[[Any, Sequence[tuple[int, int]]], list[float]],
    device: str,
    rows: int,
) -> Scorer:
    """Build a scorer: preprocess, batch by shape, pad the batch with its first picture, run the model, read the output.

    Args:
        shared_inputs: inputs that all pictures share (the prompts).
        scores_of: (output, (height, width) of each row) -> a number for each row.
    """
    import torch

    def run(group: Sequence[Mapping[str, Tensor]], sizes: Sequence[tuple[int, int]]) -> list[float]:
        batch, sizes = [*group, *[group[0]] * (rows - len(group))], [*sizes, *[sizes[0]] * (rows - len(group))]
        inputs = {k: torch.cat([one[k] for one in batch]).to(device) for k in group[0]}
        exact = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
        with torch.inference_mode(), exact:
            output = model(**inputs, **shared_inputs)
            scores, is_nan = scores_of(output, sizes), _nan_rows(output)
        # a detector that makes NaN would find nothing, which looks like a score of 0
        return [float("nan") if bad else score for score, bad in zip(scores, is_nan, strict=True)][: len(group)]

    def judge(images: Sequence[Image]) -> list[float]:
        inputs_of = [dict(processor(images=image, return_tensors="pt")) for image in images]
        by_shape: dict[Any, list[int]] = {}
        for number, inputs in enumerate(inputs_of):
            by_shape.setdefault(tuple((k, tuple(v.shape)) for k, v in sorted(inputs.items())), []).append(number)
        values = [float("nan")] * len(images)
        for numbers in by_shape.values():
            for start in range(0, len(numbers), rows):
                group = numbers[start : start + rows]
                sizes = [(images[n].shape[0], images[n].shape[1]) for n in group]
                for number, value in zip(group, run([inputs_of[n] for n in group], sizes), strict=True):
                    values[number] = value if np.isfinite(value) else float("nan")
        return values

    return judge


def _nan_rows(output: Any) -> list[bool]:
    """Whether a network made NaN for each picture of its output."""
    logits = output.logits_per_image if hasattr(output, "logits_per_image") else output.logits
    answer: list[bool] = logits.isnan().flatten(1).any(dim=1).tolist()
    return answer


def _label_numbers(score: ModelScore, config: Any) -> list[int]:
    """Return the indices of the label among the model's outputs; several outputs may have the same name."""
    names = {int(number): str(name) for number, name in config.id2label.items()}
    numbers = [number for number, name in sorted(names.items()) if name == score.label]
    if not numbers:
        near = near_name(score.label, names.values())
        all_names = ", ".join(list(names.values())[:20]) + (", ..." if len(names) > 20 else "")
        hint = f'Did you mean "{near}"?' if near else f"Known: {all_names}."
        raise ValueError(f"score {score.name}: {score.model} has no label {score.label!r}. {hint}")
    return numbers


def _config(score: ModelScore) -> Any:
    from transformers import AutoConfig

    return _from_pretrained(score, AutoConfig.from_pretrained)


def _processor(score: ModelScore) -> Any:
    from transformers import AutoImageProcessor

    return _from_pretrained(score, AutoImageProcessor.from_pretrained)


def _load(score: ModelScore, auto: str, device: str) -> Any:
    """Load the network in float32 evaluation mode; refuse missing weights, which would be random."""
    import torch
    import transformers

    model, report = _from_pretrained(
        score,
        getattr(transformers, auto).from_pretrained,
        use_safetensors=True,
        dtype=torch.float32,
        output_loading_info=True,
    )
    absent = sorted({*map(str, report["missing_keys"]), *map(str, report["mismatched_keys"])})
    if absent:
        raise ValueError(
            f"score {score.name}: {score.model} lacks {len(absent)} of the weights of a {score.kind} "
            f"({', '.join(absent[:3])}): is it trained for that?"
        )
    return model.to(device).eval().requires_grad_(False)


def _from_pretrained(score: ModelScore, load: Callable[..., Any], **options: Any) -> Any:
    """Call `load`, a from_pretrained, without remote code; errors become one sentence."""
    if score.revision:
        options["revision"] = score.revision
    try:
        return load(score.model, trust_remote_code=False, **options)
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise ValueError(f"score {score.name}: {score.model} cannot be used as a {score.kind}: {reason}") from error
