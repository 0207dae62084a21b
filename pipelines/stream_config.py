"""What a training stream is made of: all that decides a row besides its position. See stream.py. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipelines.errors import UsageError, unknown
from pipelines.ordering import BLOCK, WINDOW_SAMPLES
from pipelines.stream_texts import CAPTIONERS, Captioning, known_captioner

DEAD_LEAVES = "dead_leaves"
SMALL, DEVICES, CROPS = ("enlarge", "refuse"), ("stream", "device"), ("random", "center")


@dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """All that decides a row besides its position.

    Attributes:
        sources: corpus folders, or "dead_leaves", with their relative weights.
        seed: of order, crops, flips, and degradation.
        resolution: side S of the square rows, pixels.
        short_side: pictures are resized to this short side before cropping; 0 takes S.
        scale: smallest and largest factor on the short side, drawn for each row; (1, 1) draws none.
        small: what happens to a picture that would have to be enlarged: "enlarge" it, or "refuse" it, so that another
            stands in; with a scale it is the smallest factor that decides, and none enlarges.
        buckets: (height, width) of rows instead of S x S. A global batch has one of them, drawn evenly by its number;
            pictures are resized to cover it, with the margin that short_side has over S.
        batch_size: of the global batch; only buckets need it.
        crop: where rows are cut from the resized picture: "random", or its "center".
        flip: mirror half of the rows.
        degradation: preset of components.degradations; "" leaves lq equal to hq.
        degradation_options: changes to the preset.
        degrade_on: "stream" (in the data workers) or "device" (in collate, by the batched back end).
        pairs: column of the corpora with each picture's own input (pipelines.pairs); "" for none. Both sides are cut
            alike, and nothing degrades them.
        unpaired: corpus folder whose pictures are the inputs, in an order of their own: lq and hq then show different
            things; "" for none.
        prompt: what a row's prompt is made of, with its words in the place of {caption}; "" takes them alone.
        captioner: "tags" (measured on the crop), "manifest" (the corpus's captions), "column:NAME" (a text column of
            the corpus; "" where it holds none), "negative" (the negative prompts that stand in the manifest; a sample
            without one is refused), or "" for none.
        captioners: one for each source; () takes `captioner` for all.
        captioning: who is asked where that gives no text, see stream_texts.Captioning; None for nobody.
        latents, embeddings: columns of the corpora with precomputed latents and prompts, "" for none.
        split: which split of the corpora.
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
                f"scale must be two rising factors that leave short_side ({self.short_side or self.resolution}) at "
                f"least resolution ({self.resolution}), got {list(self.scale)}."
            )
        if any(len(bucket) != 2 or min(bucket) < 16 for bucket in self.buckets):
            raise UsageError(f"buckets must be [height, width] of at least 16 pixels, got {list(self.buckets)}.")
        if self.buckets and self.batch_size < 1:
            raise UsageError("buckets need the batch_size whose batches share them.")
        if self.window_samples < 1:
            raise UsageError(f"window_samples must be at least 1, got {self.window_samples}.")
        named = (("small", self.small, SMALL), ("degrade_on", self.degrade_on, DEVICES), ("crop", self.crop, CROPS))
        for name, value, known in named:
            if value not in known:
                raise unknown(name, value, known)
        if sum(map(bool, (self.pairs, self.unpaired, self.degradation))) > 1:
            raise UsageError("a stream's lq comes from pairs, from another corpus (unpaired), or from a degradation.")
        if self.pairs and DEAD_LEAVES in [source for source, _ in self.sources]:
            raise UsageError("dead leaves have no inputs of their own: leave them out where lq comes from pairs.")
        if self.captioners and len(self.captioners) != len(self.sources):
            raise UsageError(f"captioners must be as many as the {len(self.sources)} sources, or none.")
        for captioner in (self.captioner, *self.captioners):
            if not known_captioner(captioner):
                raise unknown("captioner", captioner, CAPTIONERS)

    @property
    def degrades(self) -> bool:
        """Whether rows carry an lq that differs from hq."""
        return bool(self.pairs or self.unpaired or (self.degradation and self.degrade_on == "stream"))


def captioner_of(config: StreamConfig, source: str) -> str:
    """Whose words a source's rows carry."""
    for (name, _), captioner in zip(config.sources, config.captioners, strict=False):
        if name == source:
            return captioner
    return config.captioner
