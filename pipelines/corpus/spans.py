"""Ranged reads of samples from a shard in a store: neighbours in one request, many requests at a time, checked.

A read checks that all bytes came, and each picture against its sha256 in the corpus' table. It does not check the rest
of the shard, nor the table: a whole shard is checked against the index, see core/places/cache.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

from pipelines.core.errors import Failure
from pipelines.core.places.place import Place

GAP_BYTES = 64 << 10
"""Unneeded bytes that are read rather than paid with one more request; ours: a request of 20 ms at 3 MB/s."""

MOST_BYTES = 16 << 20
"""Most bytes of a merged request; ours."""

Span = tuple[int, int]
"""(offset, bytes) in an object."""


def merged(spans: Sequence[Span], gap: int = GAP_BYTES, most: int = MOST_BYTES) -> list[Span]:
    """The requests that cover spans, in the order of their offsets: those with at most `gap` bytes between are one."""
    requests: list[Span] = []
    for offset, size in sorted(set(spans)):
        if requests:
            first, length = requests[-1]
            end = max(first + length, offset + size)
            if offset <= first + length + gap and end - first <= most:
                requests[-1] = first, end - first
                continue
        requests.append((offset, size))
    return requests


def read_span(place: Place, span: Span, samples: Mapping[Span, tuple[str, str]]) -> dict[Span, bytes]:
    """The bytes of the samples in one request.

    Args:
        samples: (key, sha256) of the pictures by their spans.

    Raises:
        Failure: the object ends before the samples do, or a picture is another one.
        OSError, StoreUnavailable: as of a place.
    """
    data, first = place.read_bytes(*span), span[0]
    pictures = {}
    for (offset, size), (key, sha256) in samples.items():
        if not first <= offset <= offset + size <= first + span[1]:
            continue
        picture = data[offset - first : offset - first + size]
        if len(picture) != size:
            raise Failure(f"{place} ends before the sample {key} does.")
        if hashlib.sha256(picture).hexdigest() != sha256:
            raise Failure(f"{place} does not hold the picture {key} that its table names.")
        pictures[offset, size] = picture
    return pictures
