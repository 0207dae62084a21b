"""The columns that a spec asks for besides the pictures: inputs of pairs, captions, embeddings and latents."""

from __future__ import annotations

from pathlib import Path

from components.corpora import CorpusSpec
from pipelines.core.console import Progress
from pipelines.corpus.columns.captions import caption_corpus
from pipelines.corpus.columns.precompute import precompute
from pipelines.curation.pairs import add_pairs, has_pairs


def add_columns(spec: CorpusSpec, out: Path, progress: Progress) -> None:
    """Compute the columns of a corpus, or what is missing of them; errors as in the functions that it calls."""
    if has_pairs(spec):
        add_pairs(out, spec, progress=progress)
    if spec.caption is not None:
        caption_corpus(out, spec.caption, progress=progress)
    if spec.precompute is not None:
        precompute(out, spec.precompute, progress=progress)
