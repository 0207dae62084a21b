"""What a corpus is made from: the dataclasses behind datasets/*.yaml. Torch-free.

A spec names its sources, how pictures are split into train and held-out, what is refused, and how large shards get.
Merging is strict: a misspelt key or a value of the wrong type ends in one sentence that names it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from components.images import Limits


@dataclass(kw_only=True)
class SourceSpec:
    """One place pictures come from.

    Attributes:
        kind: folder (any directory tree), skimage (photographs inside the scikit-image wheel), demo_corpus (the
            pictures shipped with this package), dead_leaves (synthetic pictures, written as PNG).
        path: of a folder; "" where the command line gives it.
        names: file names to take (skimage); empty takes all that are cleared.
        count, size_px, seed: of dead_leaves.
        licence, credit: for pictures whose folder has no CREDITS.csv.
    """

    kind: Literal["folder", "skimage", "demo_corpus", "dead_leaves"] = MISSING
    path: str = ""
    names: list[str] = field(default_factory=list)
    count: int = 0
    size_px: int = 256
    seed: int = 0
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
        if not 0 <= self.held_out_fraction <= 0.5:
            raise ValueError(f"held_out_fraction must lie in 0..0.5, got {self.held_out_fraction}")


@dataclass(kw_only=True)
class FilterSpec:
    """What is refused. All numbers are ours.

    Attributes:
        min_side_px: shortest side.
        max_aspect: longest over shortest side.
        max_file_mib: size of the file.
        max_megapixels: width times height, from the header.
        flat_below: standard deviation of 8-bit luma under which a picture counts as one colour.
    """

    min_side_px: int = 64
    max_aspect: float = 4.0
    max_file_mib: float = 64.0
    max_megapixels: float = 50.0
    flat_below: float = 3.0

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
class CorpusSpec:
    """A corpus: name, one sentence, sources in order of precedence, split, filters, and shard size in MiB."""

    name: str = MISSING
    description: str = ""
    licence: str = ""
    sources: list[SourceSpec] = field(default_factory=list)
    split: SplitSpec = field(default_factory=SplitSpec)
    filters: FilterSpec = field(default_factory=FilterSpec)
    shard_mib: float = 64.0

    def __post_init__(self) -> None:
        if self.shard_mib <= 0:
            raise ValueError(f"shard_mib must be positive, got {self.shard_mib}")


def load_corpus_spec(path: Path, overrides: Sequence[str] = ()) -> CorpusSpec:
    """Read a datasets/*.yaml file and today's `key=value` overrides.

    Raises:
        ValueError: unknown key (with the near one), wrong type, value out of range, missing field; names the file.
        OSError: the file cannot be read.
    """
    try:
        merged = OmegaConf.merge(
            OmegaConf.structured(CorpusSpec), OmegaConf.load(path), OmegaConf.from_dotlist(list(overrides))
        )
        spec = OmegaConf.to_object(merged)
    except (OmegaConfBaseException, ValueError) as error:
        sentence = " ".join(line.strip() for line in str(error).splitlines() if line.strip())
        raise ValueError(f"{path.name}: {sentence}") from error
    assert isinstance(spec, CorpusSpec)
    return spec
