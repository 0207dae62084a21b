"""Where pictures come from, and in which units they are worked on.

files.py lists single files; stores.py is the door to s3 and its like; parts.py cuts sources into parts; listing.py
remembers them; candidates.py yields what a part holds, inside the task that looks at it.
"""

from pipelines.sources.candidates import Bytes, Candidate, candidates, forget_bodies
from pipelines.sources.files import (
    SIDECARS,
    Entry,
    check_sources,
    for_folder,
    identities,
    is_output,
    iter_entries,
    list_entries,
    negatives_folder,
)
from pipelines.sources.listing import list_tried, load_listing, save_listing, unfinished
from pipelines.sources.parts import Listing, Part, list_parts

__all__ = [
    "SIDECARS",
    "Bytes",
    "Candidate",
    "Entry",
    "Listing",
    "Part",
    "candidates",
    "check_sources",
    "for_folder",
    "forget_bodies",
    "identities",
    "is_output",
    "iter_entries",
    "list_entries",
    "list_parts",
    "list_tried",
    "load_listing",
    "negatives_folder",
    "save_listing",
    "unfinished",
]
