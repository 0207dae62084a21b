"""What a spec asks for beside a finished corpus' pictures: the inputs of pairs, captions, embeddings and latents."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from components.corpora import CorpusSpec
from pipelines.console import Progress


def add_columns(spec: CorpusSpec, out: Path, tell: Progress) -> None:
    """Compute the columns of a corpus, or what is missing of them; raises as they do."""
    from pipelines.pairs import add_pairs, has_pairs

    if has_pairs(spec):
        add_pairs(out, spec, progress=tell)
    if spec.caption is not None:
        from pipelines.caption import caption_corpus

        caption_corpus(out, spec.caption, progress=tell)
    if spec.precompute is not None:
        from pipelines.precompute import precompute

        settings = asdict(spec.precompute)
        precompute(out, settings.pop("prior"), progress=tell, **settings)
