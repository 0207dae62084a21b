"""The phases of a curation (decision 0004): measure, score, select, write. `pipelines.curate` puts them in order."""
