"""Fits the Gaussian of niqe_restoray and writes it into the package.

    python tests/benchmarks/fit_niqe_restoray.py CORPUS

CORPUS is a curated corpus of cleared photographs, such as that of `restoray run nano`; its training split is used. Each
photograph counts at short sides of 512 and 256 px, cut to 1:2 at most.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from components.evaluation.niqe_restoray import FILE, fit, save
from components.images import ANY_SHAPE, Image, decode, resize_short_side
from pipelines.corpus.shards import open_corpus, read_sample

SHORT_SIDES_PX = (512, 256)


def pictures(corpus: Path) -> Iterator[Image]:
    """The corpus' training pictures at each short side, never enlarged."""
    opened = open_corpus(corpus)
    for number in range(len(opened.split("train"))):
        image = decode(read_sample(opened, "train", number), ANY_SHAPE, str(number))
        for side in SHORT_SIDES_PX:
            if min(image.shape[:2]) >= side:
                small = resize_short_side(image, side)
                yield small[: 2 * side, : 2 * side]


def main(arguments: Sequence[str] | None = None) -> None:
    (corpus,) = sys.argv[1:] if arguments is None else arguments
    save(fit(pictures(Path(corpus))))
    print(FILE)


if __name__ == "__main__":
    main()
