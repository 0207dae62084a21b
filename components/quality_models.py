"""Scores of pictures by learned models: what curation refuses beside what plain arithmetic can measure.

    kind        model                                             score
    pyiqa       any metric of pyiqa that needs no target          as the metric defines it
    classifier  AutoModelForImageClassification                   probability of `label`, 0..1
    zero_shot   AutoModelForZeroShotImageClassification (CLIP)    probability of prompt `label` against `others`, 0..1
    detector    AutoModelForObjectDetection                       highest confidence of an object `label`, 0..1

Models that are known to fit (names and labels as their pages give them; nothing here loads one by itself):

    NSFW        classifier  Falconsai/nsfw_image_detection               label nsfw
    watermark   classifier  prithivMLmods/Watermark-Detection-SigLIP2    label Watermark
    aesthetic   pyiqa       laion_aes (1..10), nima, or musiq-ava; or zero_shot with prompts of one's own
    people      detector    facebook/detr-resnet-50                      label person
    faces       detector    aditmohan96/detr-finetuned-face, revision refs/pr/1 (the one with safetensors); its
                            config.json names the label, and a wrong one is answered with the near one

Weights are read from safetensors only, pyiqa's without running what is pickled in them, and code that comes with a
model is never run. A picture's score does not depend on the other pictures of the call; see `build_scorer`.
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
"""Pictures uint8 [H, W, 3] of any sizes -> one number each; nan where the model gives none for that picture."""

SEED = 0
"""Of what some metrics of pyiqa draw for each picture (the places of their crops)."""

OF_SETS = frozenset({"fid", "sfid", "fid_dinov2", "inception_score"})
"""Metrics of pyiqa that judge two sets of pictures, and not one picture."""
OF_TEXT = frozenset({"clipscore"})
"""Metrics of pyiqa that need each picture's caption."""


def build_scorer(score: ModelScore, device: str = "cpu", rows: int | None = None) -> Scorer:
    """Load the model of a score column.

    Pictures are shrunk to `score.short_side_px` and prepared one by one, without padding to each other. On the CPU they
    also go through the network one by one. On a GPU they go in batches of pictures of one prepared size, and a batch
    that is not full repeats its first picture: cuBLAS and cuDNN choose their way of adding by the shape alone.

    Args:
        score: which model, and how.
        device: "cpu" or a torch device.
        rows: pictures of one pass through the network; None takes 1 on the CPU and `score.batch_size` elsewhere.

    Returns:
        A function of pictures. It raises SampleError (code "shape") for what is no uint8 [H, W, 3].

    Raises:
        ValueError: no such metric or model, a metric that cannot judge a picture alone, a label that the model does not
            know (with the near one), no `others`, or weights that are not whole.
    """
    build = {"pyiqa": _pyiqa, "classifier": _classifier, "zero_shot": _zero_shot, "detector": _detector}[score.kind]
    rows = rows or (1 if device == "cpu" else max(1, score.batch_size))
    judge = build(score, device, rows)

    def scores(images: Sequence[Image]) -> list[float]:
        return judge([_shrunk(image, score.short_side_px) for image in images])

    return scores


def check_scorer(score: ModelScore) -> None:
    """Raise what `build_scorer` would raise for wrong names; of the model, only its config.json is read."""
    if score.kind == "pyiqa":
        _check_metric(score)
    elif score.kind == "zero_shot":
        _check_others(score)
        _config(score)
    else:
        _label_numbers(score, _config(score))


def _shrunk(image: Image, short_side_px: int) -> Image:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        raise SampleError("shape", f"a picture must be uint8 [H, W, 3], got {image.dtype} {image.shape}")
    smaller = 0 < short_side_px < min(image.shape[:2])
    return resize_short_side(image, short_side_px) if smaller else image


# --- pyiqa ------------------------------------------------------------------------------------------------------------


def _pyiqa(score: ModelScore, device: str, rows: int) -> Scorer:
    """Each picture alone: some metrics normalise over the batch, and those that draw must draw the same."""
    _check_metric(score)
    metrics = Metrics((score.model,), device)

    def judge(images: Sequence[Image]) -> list[float]:
        found = []
        for image in images:
            with _weights_only(), _same_draws(device):
                found.append(metrics.score(image).get(score.model, float("nan")))
        return found

    return judge


def _check_metric(score: ModelScore) -> None:
    if metric_info(score.model).full_reference:
        raise ValueError(f"score {score.name}: {score.model} compares with a target, which a single picture lacks")
    if score.model in OF_SETS | OF_TEXT:
        what = "sets of pictures" if score.model in OF_SETS else "pictures with captions"
        raise ValueError(f"score {score.name}: {score.model} judges {what}, not a picture alone")


@contextmanager
def _weights_only() -> Iterator[None]:
    """torch.load refuses code inside: pyiqa asks it to run such code (arch_util.load_pretrained_network)."""
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
    """Global random states that start from SEED inside, and are as before afterwards; pyiqa knows no others."""
    import torch

    kept, kept_numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - pyiqa draws from it
    with torch.random.fork_rng(devices=[torch.device(device)] if device.startswith("cuda") else []):
        torch.manual_seed(SEED)
        random.seed(SEED)
        np.random.seed(SEED)  # noqa: NPY002
        try:
            yield
        finally:
            random.setstate(kept)
            np.random.set_state(kept_numpy)  # noqa: NPY002


# --- transformers -----------------------------------------------------------------------------------------------------


def _classifier(score: ModelScore, device: str, rows: int) -> Scorer:
    """Softmax over the labels; a sigmoid of each where the model says that labels do not exclude each other."""
    config = _config(score)
    labels = _label_numbers(score, config)
    model, processor = _load(score, "AutoModelForImageClassification", device), _processor(score)
    alone = config.num_labels == 1 or config.problem_type == "multi_label_classification"
    if config.problem_type == "regression":
        raise ValueError(f"score {score.name}: {score.model} predicts a number and no probability of a label")

    def read(output: Any, sizes: Sequence[tuple[int, int]]) -> list[float]:
        logits = output.logits.float()
        if alone:
            return logits.sigmoid()[:, labels].amax(dim=1).tolist()
        return logits.softmax(dim=1)[:, labels].sum(dim=1).tolist()

    return _network(model, processor, {}, read, device, rows)


def _zero_shot(score: ModelScore, device: str, rows: int) -> Scorer:
    """Softmax over the prompts. SigLIP's own sigmoid would judge `label` alone; here it stands against `others`."""
    from transformers import AutoTokenizer

    _check_others(score)
    config = _config(score)
    model, processor = _load(score, "AutoModelForZeroShotImageClassification", device), _processor(score)
    tokenizer = _told(score, AutoTokenizer.from_pretrained)
    # SigLIP was trained on texts of full length, and its pooling looks at the last place
    full = "siglip" in config.model_type
    text = tokenizer(
        [score.label, *score.others],
        padding="max_length" if full else True,
        max_length=64 if full else None,
        truncation=True,
        return_tensors="pt",
    ).to(device)

    def read(output: Any, sizes: Sequence[tuple[int, int]]) -> list[float]:
        return output.logits_per_image.float().softmax(dim=1)[:, 0].tolist()

    return _network(model, processor, dict(text), read, device, rows)


def _check_others(score: ModelScore) -> None:
    if not score.others:
        raise ValueError(f"score {score.name}: zero_shot needs others, the prompts that {score.label!r} stands against")


def _detector(score: ModelScore, device: str, rows: int) -> Scorer:
    """The image processor turns logits into confidences: softmax or sigmoid is its family's own knowledge.

    With a softmax each place counts for its likeliest object only, so that a label which wins nowhere scores 0.
    """
    config = _config(score)
    labels = set(_label_numbers(score, config))
    model, processor = _load(score, "AutoModelForObjectDetection", device), _processor(score)
    if not hasattr(processor, "post_process_object_detection"):
        raise ValueError(f"score {score.name}: the processor of {score.model} cannot read detections")

    def read(output: Any, sizes: Sequence[tuple[int, int]]) -> list[float]:
        answers = processor.post_process_object_detection(output, threshold=0.0, target_sizes=list(sizes))
        return [
            max((float(s) for s, n in zip(a["scores"], a["labels"], strict=True) if int(n) in labels), default=0.0)
            for a in answers
        ]

    return _network(model, processor, {}, read, device, rows)


def _network(
    model: Any,
    processor: Any,
    shared: Mapping[str, Any],
    read: Callable[[Any, Sequence[tuple[int, int]]], list[float]],
    device: str,
    rows: int,
) -> Scorer:
    """Prepare, batch by shape, fill up, pass, read.

    Args:
        shared: inputs that all pictures share (the prompts).
        read: output and (height, width) of each row -> a number for each row.
    """
    import torch

    def passed(group: Sequence[Mapping[str, Tensor]], sizes: Sequence[tuple[int, int]]) -> list[float]:
        filled, sizes = [*group, *[group[0]] * (rows - len(group))], [*sizes, *[sizes[0]] * (rows - len(group))]
        inputs = {k: torch.cat([one[k] for one in filled]).to(device) for k in group[0]}
        exact = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
        with torch.inference_mode(), exact:
            output = model(**inputs, **shared)
            return read(output, sizes)[: len(group)]

    def judge(images: Sequence[Image]) -> list[float]:
        prepared = [dict(processor(images=image, return_tensors="pt")) for image in images]
        by_shape: dict[Any, list[int]] = {}
        for number, inputs in enumerate(prepared):
            by_shape.setdefault(tuple((k, tuple(v.shape)) for k, v in sorted(inputs.items())), []).append(number)
        found = [float("nan")] * len(images)
        for numbers in by_shape.values():
            for start in range(0, len(numbers), rows):
                chosen = numbers[start : start + rows]
                sizes = [(images[n].shape[0], images[n].shape[1]) for n in chosen]
                for number, value in zip(chosen, passed([prepared[n] for n in chosen], sizes), strict=True):
                    found[number] = value if np.isfinite(value) else float("nan")
        return found

    return judge


def _label_numbers(score: ModelScore, config: Any) -> list[int]:
    """Places of the label among the model's outputs; a name may stand for several."""
    names = {int(number): str(name) for number, name in config.id2label.items()}
    numbers = [number for number, name in sorted(names.items()) if name == score.label]
    if not numbers:
        near = near_name(score.label, names.values())
        known = ", ".join(list(names.values())[:20]) + (", ..." if len(names) > 20 else "")
        hint = f'Did you mean "{near}"?' if near else f"Known: {known}."
        raise ValueError(f"score {score.name}: {score.model} knows no label {score.label!r}. {hint}")
    return numbers


def _config(score: ModelScore) -> Any:
    from transformers import AutoConfig

    return _told(score, AutoConfig.from_pretrained)


def _processor(score: ModelScore) -> Any:
    from transformers import AutoImageProcessor

    return _told(score, AutoImageProcessor.from_pretrained)


def _load(score: ModelScore, auto: str, device: str) -> Any:
    """The network in float32 evaluation mode. Weights that the file lacks would be random: refused."""
    import torch
    import transformers

    model, report = _told(
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


def _told(score: ModelScore, load: Callable[..., Any], **options: Any) -> Any:
    """from_pretrained without remote code; its failures in one sentence."""
    if score.revision:
        options["revision"] = score.revision
    try:
        return load(score.model, trust_remote_code=False, **options)
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise ValueError(f"score {score.name}: {score.model} cannot be used as a {score.kind}: {reason}") from error
