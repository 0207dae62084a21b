"""A finished corpus: its shards and its columns; and the catalogue of the shipped corpora."""
