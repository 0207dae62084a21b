"""Configuration of a training stream: with a position it fixes a row, see rows.py. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipelines.core.errors import UsageError, unknown
from pipelines.stream.ordering import BLOCK, WINDOW_SAMPLES
from pipelines.stream.texts import CAPTIONERS, Captioning, is_captioner

DEAD_LEAVES = "dead_leaves"
SMALL, DEVICES, CROPS = ("enlarge", "refuse"), ("stream", "device"), ("random", "center")


@dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """Configuration of a training stream. A row is a function of it, the corpora and a position.

    Attributes:
        sources: corpus folders, or "dead_leaves", with their relative weights.
        seed: of order, crops, flips, and degradation.
        resolution: side S of the square rows, pixels.
        short_side: pictures are resized to this short side before the crop; 0: S.
        scale: smallest and largest random factor on the short side, drawn per row; (1, 1): no scaling.
        small: for a picture that is too small: "enlarge" it, or "refuse" it and use another sample. With "refuse" and a
            scale, the smallest factor decides, and no factor enlarges a picture.
        buckets: (height, width) of rows instead of S x S. A global batch has one bucket, drawn uniformly by the batch's
            number. Pictures are resized to cover the bucket, with the margin of short_side over S.
        batch_size: of the global batch; only buckets need it.
        crop: position of the crop in the resized picture: "random" or "center".
        flip: mirror half of the rows.
        turn: turn rows by a random multiple of 90 degrees; of 180, where they are no squares.
        relight: largest logarithm of a random gamma; each colour also gets a gain of up to a quarter of it.
        degradation: preset of components.degradations; "": lq equals hq.
        degradation_options: changes to the preset.
        degrade_on: "stream" (in the data workers) or "device" (in collate, by the batched back end).
        pairs: column of the corpora with each picture's own input (curation/pairs.py); "": none. Both pictures get the
            same crop and no degradation.
        unpaired: corpus folder with the inputs, in their own order; lq and hq then show different scenes. "": none.
        prompt: template of a row's prompt, with {caption} for the caption; "": the caption alone.
        captioner: source of captions: "tags" (computed from the crop), "manifest" (captions of the corpus),
            "column:NAME" (a text column of the corpus; null gives ""), "negative" (negative prompts in the manifest; a
            sample without one is refused), or "" (no captions). Of a sample's several texts one is drawn by (seed, key,
            position).
        captioners: one captioner per source; (): `captioner` for all.
        captioning: writes missing captions, see texts.Captioning; None: they stay empty.
        latents, embeddings: columns of the corpora with precomputed latents and prompt embeddings; "": none.
        split: split of the corpora.
        window_samples: samples that are shuffled together, see ordering.Order.
    """

    sources: Sequence[tuple[str, float]]
    seed: int
    resolution: int
    short_side: int = 0
    scale: tuple[float, float] = (1.0, 1.0)
    small: str = "enlarge"
    buckets: Sequence[tuple[int, int]] = ()
    batch_size: int = 0
    crop: str = "random"
    flip: bool = True
    turn: bool = False
    relight: float = 0.0
    degradation: str = ""
    degradation_options: Mapping[str, Any] = field(default_factory=dict)
    degrade_on: str = "stream"
    pairs: str = ""
    unpaired: str = ""
    prompt: str = ""
    captioner: str = ""
    captioners: Sequence[str] = ()
    captioning: Captioning | None = None
    latents: str = ""
    embeddings: str = ""
    split: str = "train"
    window_samples: int = WINDOW_SAMPLES

    def __post_init__(self) -> None:
        if not 1 <= len(self.sources) <= BLOCK or any(weight <= 0 for _, weight in self.sources):
            raise UsageError(f"a stream needs 1 to {BLOCK} sources with positive weights, got {list(self.sources)}.")
        if self.resolution < 16 or (self.short_side and self.short_side < self.resolution):
            raise UsageError(
                f"resolution must be at least 16 and short_side 0 or at least resolution, "
                f"got {self.resolution} and {self.short_side}."
            )
        low, high = self.scale
        if not 0 < low <= high or round((self.short_side or self.resolution) * low) < self.resolution:
            raise UsageError(
                f"scale must be two rising factors, and the smaller one times short_side "
                f"({self.short_side or self.resolution}) at least resolution ({self.resolution}), "
                f"got {list(self.scale)}."
            )
        if any(len(bucket) != 2 or min(bucket) < 16 for bucket in self.buckets):
            raise UsageError(f"buckets must be [height, width] of at least 16 pixels, got {list(self.buckets)}.")
        if self.buckets and self.batch_size < 1:
            raise UsageError("buckets need batch_size: all rows of a global batch have one bucket.")
        if self.window_samples < 1:
            raise UsageError(f"window_samples must be at least 1, got {self.window_samples}.")
        fields = (("small", self.small, SMALL), ("degrade_on", self.degrade_on, DEVICES), ("crop", self.crop, CROPS))
        for name, value, choices in fields:
            if value not in choices:
                raise unknown(name, value, choices)
        if sum(map(bool, (self.pairs, self.unpaired, self.degradation))) > 1:
            raise UsageError("a stream's lq comes from pairs, from another corpus (unpaired), or from a degradation.")
        if self.pairs and DEAD_LEAVES in [source for source, _ in self.sources]:
            raise UsageError("dead_leaves has no pairs: leave it out of sources if lq comes from pairs.")
        if self.captioners and len(self.captioners) != len(self.sources):
            raise UsageError(f"captioners must be as many as the {len(self.sources)} sources, or none.")
        for captioner in (self.captioner, *self.captioners):
            if not is_captioner(captioner):
                raise unknown("captioner", captioner, CAPTIONERS)

    @property
    def degrades(self) -> bool:
        """Whether rows have an lq that differs from hq."""
        return bool(self.pairs or self.unpaired or (self.degradation and self.degrade_on == "stream"))


def captioner_of(config: StreamConfig, source: str) -> str:
    """Return the captioner of a source."""
    for (name, _), captioner in zip(config.sources, config.captioners, strict=False):
        if name == source:
            return captioner
    return config.captioner
