"""What a corpus is made from: the dataclasses behind datasets/*.yaml. Torch-free.

A spec names its sources, how pictures are split into train and held-out, what is refused, and how large shards get.
Merging is strict: a misspelt key or a value of the wrong type ends in one sentence that names it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from components.images import Limits


@dataclass(kw_only=True)
class NegativeSpec:
    """How poor pictures are made from good ones: image to image with negative prompts (SUPIR sec. 3.2, app. A.4).

    Attributes:
        prior: a shipped prior, a model folder, or a diffusers folder or hub id; `revision` of a hub model.
        count: how many; the first 100 stay the same when more are asked for.
        strength: share of the noise schedule that is redrawn, 0..1; SUPIR's is 0.5.
        prompts: names of components.negatives.NEGATIVE_PROMPTS, or texts; each picture draws one.
        resolution: side of the pictures, pixels.
        steps, cfg_scale, seed: of the sampler; steps and scale are ours, the paper gives none.
        precision: of a diffusers model's weights.
        workers, num_gpus: of the actor pool.
    """

    prior: str = "stabilityai/stable-diffusion-xl-base-1.0"
    revision: str = ""
    count: int = 100_000
    strength: float = 0.5
    prompts: list[str] = field(default_factory=lambda: ["supir-samples"])
    resolution: int = 1024
    steps: int = 50
    cfg_scale: float = 5.0
    seed: int = 0
    precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    workers: int = 1
    num_gpus: float = 0.0


@dataclass(kw_only=True)
class SourceSpec:
    """One place pictures come from.

    Attributes:
        kind: folder (any directory tree), tar (webdataset archives), parquet (bytes in a column), urls (a list of
            addresses to fetch), skimage (photographs inside the scikit-image wheel), demo_corpus (the pictures shipped
            with this package), dead_leaves (synthetic pictures, written as PNG).
        path: of a folder, or of files with "*" and "?" in their names; any fsspec address ("s3://bucket/train/*.tar").
            "" where the command line gives it.
        storage: fsspec's options for that store ("endpoint_url", "anon"); secrets come from the environment.
        names: file names to take (skimage); empty takes all that are cleared.
        count, size_px, seed: of dead_leaves.
        image_column: parquet: bytes, or a struct with a field "bytes".
        key_column, caption_column, licence_column: parquet and url tables; "" where there is none.
        url_column: of a url table (csv, tsv, jsonl, parquet; of a .txt every line is a url).
        negatives: of that kind.
        licence, credit: for pictures whose folder or table does not say.
    """

    kind: Literal["folder", "tar", "parquet", "urls", "skimage", "demo_corpus", "dead_leaves", "negatives"] = MISSING
    path: str = ""
    storage: dict[str, Any] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    count: int = 0
    size_px: int = 256
    seed: int = 0
    image_column: str = "image"
    key_column: str = ""
    caption_column: str = ""
    licence_column: str = ""
    url_column: str = "url"
    negatives: NegativeSpec = field(default_factory=NegativeSpec)
    licence: str = ""
    credit: str = ""

    def __post_init__(self) -> None:
        if self.kind == "dead_leaves" and (self.count < 1 or self.size_px < 16):
            raise ValueError(f"dead_leaves needs count >= 1 and size_px >= 16, got {self.count} and {self.size_px}")


@dataclass(kw_only=True)
class SplitSpec:
    """Which pictures are held out: those named, else a share of the keys by their hash (adding pictures moves none)."""

    held_out: list[str] = field(default_factory=list)
    held_out_fraction: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.held_out_fraction <= 1:
            raise ValueError(f"held_out_fraction must lie in 0..1, got {self.held_out_fraction}")


@dataclass(kw_only=True)
class Bounds:
    """What a score may be; null on a side where anything goes."""

    min: float | None = None
    max: float | None = None

    def __post_init__(self) -> None:
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min {self.min} lies above max {self.max}")

    def hold(self, score: float) -> bool:
        """Whether a score lies within; a score that is no number does not."""
        above = self.min is None or score >= self.min
        return score == score and above and (self.max is None or score <= self.max)


@dataclass(kw_only=True)
class ModelScore:
    """A score column from a learned model.

    Attributes:
        name: of the column; also the reason code of what it refuses.
        kind: pyiqa (any no-reference metric of pyiqa), classifier (probability of `label`), zero_shot (a CLIP-like
            model: probability of the prompt `label` against the prompts `others`), detector (highest confidence of an
            object `label`: faces, people).
        model: the metric's name, or a hub id or folder of a transformers model.
        revision: of a hub model.
        label, others: see kind.
        bounds: what is accepted.
        batch_size: pictures a call.
        num_gpus: of each worker.
        short_side_px: pictures are shrunk to this short side first; 0 leaves them.
    """

    name: str = MISSING
    kind: Literal["pyiqa", "classifier", "zero_shot", "detector"] = MISSING
    model: str = MISSING
    revision: str = ""
    label: str = ""
    others: list[str] = field(default_factory=list)
    bounds: Bounds = field(default_factory=Bounds)
    batch_size: int = 16
    num_gpus: float = 0.0
    short_side_px: int = 512

    def __post_init__(self) -> None:
        if self.kind not in ("pyiqa", MISSING) and not self.label:
            raise ValueError(f"score {self.name} of kind {self.kind} needs a label")


@dataclass(kw_only=True)
class FilterSpec:
    """What is refused. All numbers are ours.

    Attributes:
        min_side_px: shortest side.
        max_aspect: longest over shortest side.
        min_file_kib, max_file_mib: size of the file.
        max_megapixels: width times height, from the header.
        flat_below: standard deviation of 8-bit luma under which a picture counts as one colour.
        preset: thresholds of components.quality: none, or those for restoration.
        scores: changes to the preset, by score name.
        models: scores of learned models.
    """

    min_side_px: int = 64
    max_aspect: float = 4.0
    min_file_kib: float = 0.0
    max_file_mib: float = 64.0
    max_megapixels: float = 50.0
    flat_below: float = 3.0
    preset: Literal["none", "restoration"] = "none"
    scores: dict[str, Bounds] = field(default_factory=dict)
    models: list[ModelScore] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.min_side_px < 8 or self.max_aspect < 1 or self.max_file_mib <= 0 or self.max_megapixels <= 0:
            raise ValueError("filters need min_side_px >= 8, max_aspect >= 1, max_file_mib > 0 and max_megapixels > 0")

    def limits(self) -> Limits:
        """The part that the decoder checks, from the header where it can."""
        return Limits(
            max_pixels=int(self.max_megapixels * 1e6),
            max_bytes=int(self.max_file_mib * 2**20),
            min_side_px=self.min_side_px,
            max_aspect=self.max_aspect,
        )


@dataclass(kw_only=True)
class DedupSpec:
    """Which repeated pictures go. Of equal ones the first in the order of the sources stays.

    Attributes:
        exact: equal bytes.
        near: equal to the eye: recompressed, resized, slightly cropped.
        against: corpus folders of earlier runs; what they hold already is refused.
    """

    exact: bool = True
    near: bool = False
    against: list[str] = field(default_factory=list)


@dataclass(kw_only=True)
class DownloadSpec:
    """How addresses are fetched. All numbers are ours.

    Attributes:
        attempts: tries of one address, for what may pass (5xx, 429, broken connections).
        timeout_s: for connecting, and longest silence.
        total_s: longest time for one body; a slow drip ends here.
        max_redirects: hops; every one is checked as the first.
        threads: addresses fetched at once by one task.
        obey_robots: honour noai, noimageai, noindex and noimageindex directives of the answer.
        allow_hosts: host names or addresses that may be private (tests, an intranet); all other private, loopback and
            link-local addresses are refused.
        user_agent: how we introduce ourselves.
    """

    attempts: int = 4
    timeout_s: float = 10.0
    total_s: float = 60.0
    max_redirects: int = 5
    threads: int = 16
    obey_robots: bool = True
    allow_hosts: list[str] = field(default_factory=list)
    user_agent: str = "restoray (image curation)"

    def __post_init__(self) -> None:
        if self.attempts < 1 or self.timeout_s <= 0 or self.total_s <= 0 or self.threads < 1 or self.max_redirects < 0:
            raise ValueError("download needs attempts >= 1, timeouts > 0, threads >= 1 and max_redirects >= 0")


@dataclass(kw_only=True)
class CaptionSpec:
    """The caption stage.

    Attributes:
        model: a preset of components.captions ("llava", "blip", "blip2", "internvl", "tags"), or a hub id or folder.
        revision: of a hub model.
        prompt: "" takes the preset's.
        max_tokens: longest caption; 0 takes the preset's.
        batch_size, num_gpus, workers: of the actor pool; 0 workers work in this process.
        overwrite: caption also what has a caption.
    """

    model: str = MISSING
    revision: str = ""
    prompt: str = ""
    max_tokens: int = 0
    batch_size: int = 8
    num_gpus: float = 0.0
    workers: int = 1
    overwrite: bool = False


@dataclass(kw_only=True)
class PrecomputeSpec:
    """The last stage: columns of text embeddings and latents beside the pictures, so that training skips the encoders.

    Attributes:
        prior: whose encoders.
        what: latents, embeddings.
        resolution: side of the square behind the latents, pixels.
        captions: name of a caption column; "" takes the captions that came with the corpus.
        batch_size, num_gpus, workers: of the actor pool.
    """

    prior: str = MISSING
    what: list[str] = field(default_factory=lambda: ["latents", "embeddings"])
    resolution: int = 512
    captions: str = ""
    batch_size: int = 8
    num_gpus: float = 0.0
    workers: int = 1


@dataclass(kw_only=True)
class PairSpec:
    """Targets and inputs that belong together: a benchmark's, or those of a training set that nothing has to degrade.

    Pictures are matched by their names without suffix; where no name stands in both folders, by their order: the n-th
    name of one folder then belongs to the n-th of the other.

    Attributes:
        hq: folder of the targets; "" for real pictures without reference.
        lq: folder of the inputs.
        scale: how many times longer the targets' sides are; without targets, the enlargement that is asked for.
        note: what to know when using them.
    """

    hq: str = ""
    lq: str = ""
    scale: int = 1
    note: str = ""

    def __post_init__(self) -> None:
        if self.scale < 1:
            raise ValueError(f"the scale of a pair must be at least 1, got {self.scale}")


@dataclass(kw_only=True)
class CorpusSpec:
    """A corpus: what it is, its sources in order of precedence, and what becomes of them.

    Attributes:
        name, description, licence, homepage: for people.
        role: train, benchmark (pairs or pictures to be scored on), or both uses are none of these: regularisation.
        papers: where the four papers use it ("SUPIR sec. 4.1").
        sources, split, filters, dedup, download: see there.
        pairs: targets and inputs, where the corpus comes as pairs; its sources are the targets, or the inputs where
            there are no targets.
        metrics: what the papers score on it, by pyiqa's names ("ids": cosine of face embeddings, which pyiqa lacks).
        caption, precompute: stages at the end; none by default.
        shard_mib: size of a shard.
        max_bad_fraction: largest share of broken pictures (not of filtered ones); more end the run with a table.
        sample_timeout_s: one picture may take so long; a decoder that hangs is killed and the picture quarantined.
        stall_timeout_s: the run ends with an error when nothing at all gets done for so long.
    """

    name: str = MISSING
    description: str = ""
    licence: str = ""
    homepage: str = ""
    role: Literal["train", "benchmark", "regularisation"] = "train"
    papers: list[str] = field(default_factory=list)
    sources: list[SourceSpec] = field(default_factory=list)
    pairs: list[PairSpec] = field(default_factory=list)
    metrics: list[str] = field(default_factory=list)
    split: SplitSpec = field(default_factory=SplitSpec)
    filters: FilterSpec = field(default_factory=FilterSpec)
    dedup: DedupSpec = field(default_factory=DedupSpec)
    download: DownloadSpec = field(default_factory=DownloadSpec)
    caption: CaptionSpec | None = None
    precompute: PrecomputeSpec | None = None
    shard_mib: float = 64.0
    max_bad_fraction: float = 0.5
    sample_timeout_s: float = 120.0
    stall_timeout_s: float = 900.0

    def __post_init__(self) -> None:
        if self.shard_mib <= 0:
            raise ValueError(f"shard_mib must be positive, got {self.shard_mib}")
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"max_bad_fraction must lie in 0..1, got {self.max_bad_fraction}")
        if self.sample_timeout_s <= 0 or self.stall_timeout_s <= 0:
            raise ValueError("sample_timeout_s and stall_timeout_s must be positive")


_LIST_PLACE = re.compile(r"[.\[]\d+(?:[.\]]|$)")
"""In an override's key: a place in a list, as in "sources.0.path"."""


def load_corpus_spec(path: Path, overrides: Sequence[str] = ()) -> CorpusSpec:
    """Read a datasets/*.yaml file and today's `key=value` overrides ("sources.0.path=DIR" for a place in a list).

    Raises:
        ValueError: unknown key (with the near one), wrong type, value out of range, missing field; names the file.
        OSError: the file cannot be read.
    """
    in_lists = [override for override in overrides if _LIST_PLACE.search(override.partition("=")[0])]
    plain = [override for override in overrides if override not in in_lists]
    try:
        merged = OmegaConf.merge(OmegaConf.structured(CorpusSpec), OmegaConf.load(path), OmegaConf.from_dotlist(plain))
        merged.merge_with_dotlist(in_lists)  # merging would put a new list in the place of the whole one
        spec = OmegaConf.to_object(merged)
    except (OmegaConfBaseException, ValueError, TypeError) as error:  # TypeError: a mapping in the place of a list
        sentence = " ".join(line.strip() for line in str(error).splitlines() if line.strip())
        raise ValueError(f"{path.name}: {sentence}") from error
    assert isinstance(spec, CorpusSpec)
    return spec
