"""Columns of a corpus: captions, latents, embeddings and inputs, computed by actors and read by streams."""
