"""Corpus specs: the dataclasses behind datasets/*.yaml. Torch-free.

A spec names its sources, the split into train and held-out, the filters and the size of shards. Merging is strict: a
misspelt key or a value of the wrong type raises an error of one sentence that names it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from components.images import Limits
from components.overrides import HOLDS_TEXT, apply_overrides
from components.secrets import is_text_option, redacted, without_secrets

FILE_SIZE_OPTION = "--max-megabytes or filters.max_file_mib"


@dataclass(kw_only=True)
class NegativeSpec:
    """Poor pictures made from good ones by image-to-image with negative prompts (SUPIR sec. 3.2, app. A.4).

    Attributes:
        prior: a shipped prior, a model folder, or a diffusers folder or hub id.
        revision: revision of a hub model.
        count: number of pictures; a larger count leaves the first ones as they are.
        strength: share of the noise schedule that is run, 0..1; SUPIR uses 0.5.
        prompts: names of components.negatives.NEGATIVE_PROMPTS, or texts; one is drawn for each picture.
        resolution: side of the pictures in pixels.
        steps, cfg_scale, seed: sampler settings; steps and scale are ours, the paper states none.
        precision: precision of a diffusers model's weights.
        workers, num_gpus: actors of the pool, and GPUs of each; 0 workers means this process.
        placement: further needs of the actors: cpus, memory_gib, resources, labels.
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
    placement: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class SourceSpec:
    """One source of pictures.

    Attributes:
        kind: folder (any directory tree), tar (webdataset archives), parquet (bytes in a column), urls (a list of
            addresses to fetch), skimage (photographs inside the scikit-image wheel), demo_corpus (the pictures shipped
            with this package), dead_leaves (synthetic pictures, written as PNG).
        path: path of a folder, or a pattern of files with "*" and "?"; any fsspec address ("s3://bucket/train/*.tar").
            "" if the command line sets it.
        storage: fsspec options of that store ("endpoint_url", "anon"). Secrets come from the environment or from the
            command line; no file and no message holds them, see components.secrets.
        names: file names to use (skimage, demo_corpus); empty uses all pictures with a cleared licence.
        count, size_px, seed: settings of dead_leaves.
        image_column: parquet column of bytes, or of structs with a field "bytes".
        key_column, caption_column, licence_column: columns of parquet and url tables; "" for none.
        url_column: column of a url table (csv, tsv, jsonl, parquet; in a .txt file every line is a url).
        negatives: settings of kind negatives.
        licence, credit: values for pictures whose folder or table has none.
    """

    kind: Literal["folder", "tar", "parquet", "urls", "skimage", "demo_corpus", "dead_leaves", "negatives"] = MISSING
    path: str = ""
    storage: dict[str, Any] = field(default_factory=dict, metadata={HOLDS_TEXT: is_text_option})
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
    """Which pictures are held out: listed keys, else a share of the keys by hash; new pictures do not move old ones."""

    held_out: list[str] = field(default_factory=list)
    held_out_fraction: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.held_out_fraction <= 1:
            raise ValueError(f"held_out_fraction must lie in 0..1, got {self.held_out_fraction}")


@dataclass(kw_only=True)
class Bounds:
    """Range of a score; null means no bound on that side."""

    min: float | None = None
    max: float | None = None

    def __post_init__(self) -> None:
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min {self.min} lies above max {self.max}")

    def hold(self, score: float) -> bool:
        """Whether a score lies within the bounds; NaN does not."""
        above = self.min is None or score >= self.min
        return score == score and above and (self.max is None or score <= self.max)


@dataclass(kw_only=True)
class ModelScore:
    """A score column from a learned model.

    Attributes:
        name: name of the column, and reason code of the pictures that it refuses.
        kind: pyiqa (any no-reference metric of pyiqa), classifier (probability of `label`), zero_shot (a CLIP-like
            model: probability of the prompt `label` against the prompts `others`), detector (highest confidence of an
            object `label`: faces, people).
        model: name of the metric, or hub id or folder of a transformers model.
        revision: revision of a hub model.
        label, others: see kind.
        bounds: accepted range.
        batch_size: pictures per call.
        num_gpus: GPUs of each worker.
        short_side_px: pictures are first shrunk to this short side; 0 leaves their size.
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
    """Filters that refuse pictures. All numbers are ours.

    Attributes:
        min_side_px: least length of the shorter side.
        max_aspect: largest ratio of the longer to the shorter side.
        min_file_kib, max_file_mib: bounds of the file size.
        max_megapixels: width times height, from the header.
        flat_below: a picture with a lower standard deviation of 8-bit luma counts as one colour.
        preset: bounds of components.quality.PRESETS: none or restoration.
        scores: changes to the preset by score name.
        models: scores by learned models.
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
        sizes = (self.max_file_mib, self.max_megapixels)
        if self.min_side_px < 8 or not self.max_aspect >= 1 or not all(0 < size < math.inf for size in sizes):
            raise ValueError("filters need min_side_px >= 8, max_aspect >= 1, max_file_mib > 0 and max_megapixels > 0")

    def limits(self) -> Limits:
        """The limits that the decoder checks, from the header where possible."""
        return Limits(
            max_pixels=int(self.max_megapixels * 1e6),
            max_bytes=int(self.max_file_mib * 2**20),
            min_side_px=self.min_side_px,
            max_aspect=self.max_aspect,
            pixels_option="--max-megapixels or filters.max_megapixels",
            bytes_option=FILE_SIZE_OPTION,
        )


@dataclass(kw_only=True)
class DedupSpec:
    """Which duplicates are removed. Of equal pictures, the first in the order of the sources stays.

    Attributes:
        exact: remove pictures with equal bytes.
        near: remove pictures that look equal: recompressed, resized, slightly cropped.
        against: corpus folders of earlier runs; pictures that they already hold are refused.
    """

    exact: bool = True
    near: bool = False
    against: list[str] = field(default_factory=list)


@dataclass(kw_only=True)
class DownloadSpec:
    """How addresses are fetched. All numbers are ours.

    Attributes:
        attempts: tries of one address after temporary errors (5xx, 429, broken connections).
        timeout_s: longest time to connect, and longest pause between two reads.
        total_s: longest time for one body, however slowly it arrives.
        max_redirects: most redirects; each target is checked like the first address.
        threads: addresses that one task fetches at the same time.
        obey_robots: obey the noai, noimageai, noindex and noimageindex directives of the response.
        allow_hosts: host names or addresses that may be private (tests, an intranet); all other private, loopback and
            link-local addresses are refused.
        user_agent: value of the User-Agent header.
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
        revision: revision of a hub model.
        prompt: "" uses the preset's.
        max_tokens: most tokens of a caption; 0 uses the preset's.
        batch_size, num_gpus, workers: settings of the actor pool; 0 workers means this process.
        placement: further needs of the actors: cpus, memory_gib, resources, labels.
        overwrite: also caption pictures that have a caption.
    """

    model: str = MISSING
    revision: str = ""
    prompt: str = ""
    max_tokens: int = 0
    batch_size: int = 8
    num_gpus: float = 0.0
    workers: int = 1
    placement: dict[str, Any] = field(default_factory=dict)
    overwrite: bool = False


@dataclass(kw_only=True)
class PrecomputeSpec:
    """The last stage: columns of text embeddings and latents, so that training does not run the encoders.

    Attributes:
        prior: prior whose encoders are used.
        what: columns to write: latents, embeddings.
        resolution: side in pixels of the square that is encoded.
        captions: name of a caption column; "" uses the captions of the corpus.
        batch_size, num_gpus, workers: settings of the actor pool; 0 workers means this process.
        placement: further needs of the actors: cpus, memory_gib, resources, labels.
    """

    prior: str = MISSING
    what: list[str] = field(default_factory=lambda: ["latents", "embeddings"])
    resolution: int = 512
    captions: str = ""
    batch_size: int = 8
    num_gpus: float = 0.0
    workers: int = 1
    placement: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class PairSpec:
    """Pairs of target and input: of a benchmark, or of a training set whose inputs are already degraded.

    Pictures are matched by their paths without suffix. Where these differ, one affix for the whole set must give every
    input a target of its own: "1x2" belongs to "1", "7_LR4" to "7_HR". Other folders are refused.

    Attributes:
        hq: folder of the targets; "" for real pictures without a reference.
        lq: folder of the inputs.
        hq_name, lq_name: how the files are named, without suffix and with "{}" for what a target and its input share:
            "{}_HR" and "{}_LR4"; "" finds it from the names.
        scale: ratio of the targets' sides to the inputs'; without targets, the scale to restore to.
        note: remarks for users.
    """

    hq: str = ""
    lq: str = ""
    hq_name: str = ""
    lq_name: str = ""
    scale: int = 1
    note: str = ""

    def __post_init__(self) -> None:
        if self.scale < 1:
            raise ValueError(f"the scale of a pair must be at least 1, got {self.scale}")
        for field_name in ("hq_name", "lq_name"):
            name = getattr(self, field_name)
            if name and (name.count("{}") != 1 or "/" in name):
                raise ValueError(f'{field_name} "{name}" needs one "{{}}" for what both names share, and no folder')


@dataclass(kw_only=True)
class CorpusSpec:
    """A corpus: its description, its sources in order of precedence, and the settings of every stage.

    Attributes:
        name, description, licence, homepage: information for people.
        role: train, benchmark (pairs or pictures to score on) or regularisation (neither of them).
        papers: places where the four papers use it ("SUPIR sec. 4.1").
        sources, split, filters, dedup, download: see their classes.
        pairs: targets and inputs, if the corpus consists of pairs. Its sources are then the targets, or the inputs if
            there are no targets.
        metrics: metrics of the papers on it, by pyiqa's names ("ids" is the cosine of face embeddings, not in pyiqa).
        caption, precompute: optional last stages.
        shard_mib: size of a shard.
        max_bad_fraction: largest share of broken pictures; filtered pictures do not count. Above it the run ends with
            an error and a table.
        sample_timeout_s: longest time for one picture. Then its decoder is killed and the picture is quarantined.
        stall_timeout_s: the run ends with an error after this time without any progress.
        placement: needs of every task that reads, scores and writes: cpus, memory_gib, resources, labels.
        requests: objects of a store that one task fetches at the same time.
        spool_gib: disk below the output for pictures of stores between measuring and writing; those beyond it are
            fetched twice. At most a quarter of the free disk is taken.
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
    placement: dict[str, Any] = field(default_factory=dict)
    requests: int = 16
    spool_gib: float = 16.0

    def __post_init__(self) -> None:
        if self.requests < 1 or not self.spool_gib >= 0:
            raise ValueError(f"a spec needs requests >= 1 and spool_gib >= 0, got {self.requests} and {self.spool_gib}")
        if self.shard_mib <= 0:
            raise ValueError(f"shard_mib must be positive, got {self.shard_mib}")
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"max_bad_fraction must lie in 0..1, got {self.max_bad_fraction}")
        if self.sample_timeout_s <= 0 or self.stall_timeout_s <= 0:
            raise ValueError("sample_timeout_s and stall_timeout_s must be positive")


def shown_spec(spec: CorpusSpec) -> dict[str, Any]:
    """A spec as plain data for files and messages, without its secrets. Loaded again, it lacks only these."""
    document = asdict(spec)
    for source in document["sources"]:
        source["storage"] = redacted(source["storage"])
        source["path"] = _shown_path(source["path"])
    for pair in document["pairs"]:
        pair |= {side: _shown_path(pair[side]) for side in ("hq", "lq")}
    return document


def _shown_path(path: str) -> str:
    return without_secrets(path) if "://" in path else path


def load_corpus_spec(path: Path, overrides: Sequence[str] = ()) -> CorpusSpec:
    """Read a datasets/*.yaml file and apply `key=value` overrides ("sources.0.path=DIR" for an entry of a list).

    Raises:
        ValueError: unknown key (with a suggestion), wrong type, value out of range or missing field; names the file.
        OSError: the file cannot be read.
    """
    try:
        merged = apply_overrides(CorpusSpec, OmegaConf.load(path), overrides)
        spec = OmegaConf.to_object(merged)
    except (
        OmegaConfBaseException,
        yaml.YAMLError,
        ValueError,
        TypeError,
    ) as error:  # TypeError: a mapping instead of a list
        sentence = " ".join(line.strip() for line in str(error).splitlines() if line.strip())
        raise ValueError(f"{path.name}: {sentence}") from error
    assert isinstance(spec, CorpusSpec)
    return spec
