"""Sources of pictures, and their parts, the units of work.

files.py lists single files; stores.py reads s3 and other stores; parts.py cuts sources into parts; listing.py stores
the list of parts; candidates.py yields the candidates of a part inside the task that measures it.
"""

from pipelines.curation.sources.candidates import Bytes, Candidate, candidates, remove_bodies
from pipelines.curation.sources.coming import ComingParts, ListedParts
from pipelines.curation.sources.files import (
    DEFAULT_HELD_OUT_FRACTION,
    Entry,
    check_sources,
    for_folder,
    identities,
    iter_entries,
    list_entries,
    negatives_folder,
)
from pipelines.curation.sources.listing import list_again, load_listing, save_listing, unfinished_error
from pipelines.curation.sources.parts import Listing, Part, list_parts
from pipelines.curation.sources.spool import remove_spool

__all__ = [
    "DEFAULT_HELD_OUT_FRACTION",
    "Bytes",
    "Candidate",
    "ComingParts",
    "Entry",
    "ListedParts",
    "Listing",
    "Part",
    "candidates",
    "check_sources",
    "for_folder",
    "identities",
    "iter_entries",
    "list_again",
    "list_entries",
    "list_parts",
    "load_listing",
    "negatives_folder",
    "remove_bodies",
    "remove_spool",
    "save_listing",
    "unfinished_error",
]
