"""A finished corpus: its shards, the catalogue of known corpora, and the columns beside it."""
