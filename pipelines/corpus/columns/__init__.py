"""Columns beside a corpus: captions, latents and embeddings, computed by actors and read by streams."""
