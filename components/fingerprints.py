"""Perceptual fingerprints, and a search for near duplicates among millions of them. Torch-free.

A picture is reduced to 80 x 80 pixels. The fingerprint uses the 72 lowest frequencies of its luma (a two-dimensional
cosine transform). For each frequency it holds the sign, and whether the coefficient is larger than compression errors
(a strong sign). It also holds the signs of the middle of the picture, without 5 % at each side: they match the signs of
the whole of a copy that was cropped by 5 %. Signs of unrelated photographs agree with probability 1/2. So each strong
sign that agrees counts as about one bit of evidence. The mean colours of both views must match as well.

Definition of alike:
    alike       recompressed, rescaled (also to another aspect ratio), or with a palette; cropped by 5 % at every side.
                Of copies cropped by 5 % at one side or at two opposite sides, six of ten are found; of those cropped at
                two adjacent sides, one of six.
    not alike   mirrored or rotated copies, larger crops, other colours (a grey copy of a coloured picture).
    plain       sky, a lamp in the dark, a single edge. Such a picture resembles thousands of others, and the signs of a
                single shape are not independent. If less than 5 % of the pixels differ from their surroundings, the
                picture is alike to no other, not even to its own copy. If less than 30 % do (goods on white), no strong
                sign may differ.

Signs of low cosine frequencies are Zauner's idea (Implementation and Benchmarking of Perceptual Image Hash Functions,
2010). Strengths, the view without borders, the keys and all numbers are ours. We measured them on photographs, on
disjoint parts of photographs, and on dead leaves.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator

import cv2
import numpy as np

from components.types import Image

WORDS = 4
"""uint64 words of a fingerprint.

[0] and [1]: signs and strengths of frequencies 0..63 of the whole picture. [2]: their signs in the middle (90 % of each
side). [3], from the lowest bit: 8 signs, 8 strengths and 8 signs of the middle (frequencies 64..71); mean Y, Cr, Cb of
the whole (8 bits each); the middle's means minus those (5, 4, 4 bits, with an offset); richness of detail (2 bits).
"""

SMALLEST_SIDE_PX = 8
HALVED_FROM_PX = 320
GRID_PX = 80  # 5 % of it is a whole number of pixels
BORDER_PX = 4
FREQUENCIES = 72  # three bits each, plus the means and the richness, fit into four words
REST = FREQUENCIES - 64
STRONG = 0.2  # gray levels; JPEG of quality 30 changes 95 % of the frequencies of a 64-pixel picture by less than 0.25
ZERO = 0.004  # gray levels; rounding to 8 bits turns zero coefficients into values below this
SCALE = 1 << 14  # makes cosines whole numbers, so that sums are exact in any order of addition
SURROUNDINGS_PX = 9
DETAIL_FROM = 3  # gray levels
RICHNESS = (0.05, 0.3, 0.45)  # shares of pixels that differ from their surroundings; plain below the first
MEANS_BIT, STEPS_BIT, RICHNESS_BIT = 3 * REST, 3 * REST + 24, 3 * REST + 37
STEP_BITS = (5, 4, 4)

SAME_MEANS = (3, 3, 3)  # gray levels of Y, Cr, Cb; JPEG of quality 30 changes them by up to 2
ENOUGH, ENOUGH_OF_CROP = 20, 26  # least evidence
CONFLICTS = np.array([-1, 0, 1, 1])  # most strong signs of the whole that may differ, by richness
MIDDLE_CONFLICTS = 6  # the same for the middle, where a strong frequency of the whole may be weak
RICH = 3
TRIMMED_MEANS = (6, 3, 3)  # for copies with 5 % cropped at one side
TRIMMED_CONFLICT = 2  # of such copies a twelfth of the strong signs differ: each costs this much evidence
ENOUGH_OF_TRIMMED, ENOUGH_OF_TRIMMED_MIDDLE = 44, 34

BLOCK_BITS, BLOCKS, BLOCKS_PER_KEY = 6, 7, 4  # a key is 4 of 7 blocks of the 42 lowest signs: 35 keys of 24 bits
BLOCK_CHOICES = tuple(itertools.combinations(range(BLOCKS), BLOCKS_PER_KEY))
KEY_BITS = BLOCK_BITS * BLOCKS_PER_KEY
PLACE_BITS = 28  # row and view
LARGEST_COUNT = 1 << PLACE_BITS - 1
SLICE = 1 << 18  # entries or rows of one slice
CROWD = 128  # a key with more entries is extended by two blocks
DEPTH = 128  # if a key has more than twice as many entries, a row is compared with this many first and nearest ones
NEIGHBOURS = 64  # most partners that are kept of a pending row
FEWEST_ROWS = 4096  # least number of rows of one search
ORIGINAL, COPY, PLAIN, PENDING, ACTIVE = 0, 1, 2, 3, 4  # states of a row; ACTIVE is a pending row of the current search


def fingerprint(picture: Image) -> np.ndarray:
    """Compute the fingerprint of a picture.

    Args:
        picture: uint8 RGB [H, W, 3] with sides of at least 8.

    Returns:
        uint64 [WORDS]; it depends on the pixels only.

    Raises:
        ValueError: the picture has another shape or type.
    """
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
        raise ValueError(f"expected uint8 [H, W, 3], got {picture.dtype} {picture.shape}")
    if min(picture.shape[:2]) < SMALLEST_SIDE_PX:
        raise ValueError(f"a fingerprint needs sides of at least {SMALLEST_SIDE_PX} pixels, got {picture.shape[:2]}")
    colours = cv2.cvtColor(_reduce(picture), cv2.COLOR_RGB2YCrCb)
    inside = slice(BORDER_PX, GRID_PX - BORDER_PX)
    means = [round(mean) for mean in cv2.mean(colours)[:3]]
    inner_means = [round(mean) for mean in cv2.mean(colours[inside, inside])[:3]]
    luma = np.ascontiguousarray(colours[..., 0])
    whole, middle, rows, columns = _cosines()
    deviations = luma.astype(np.float64) - means[0]
    levels = (whole @ deviations @ whole.T)[rows, columns] / (SCALE * GRID_PX) ** 2
    inner = (middle @ deviations @ middle.T)[rows, columns] / (SCALE * (GRID_PX - 2 * BORDER_PX)) ** 2
    signs, strengths, middle_signs = (_pack(bits) for bits in (levels > ZERO, np.abs(levels) > STRONG, inner > ZERO))
    last, bit = signs[1] | strengths[1] << REST | middle_signs[1] << 2 * REST, STEPS_BIT
    for place, (mean, other, width) in enumerate(zip(means, inner_means, STEP_BITS, strict=True)):
        half = 1 << width - 1
        last |= mean << MEANS_BIT + 8 * place | min(max(other - mean, -half), half - 1) + half << bit
        bit += width
    detail = cv2.absdiff(luma, cv2.blur(luma, (SURROUNDINGS_PX, SURROUNDINGS_PX)))
    detail_share = (detail >= DETAIL_FROM).mean()
    last |= sum(bool(detail_share >= threshold) for threshold in RICHNESS) << RICHNESS_BIT
    return np.array([signs[0], strengths[0], middle_signs[0], last], np.uint64)


def alike(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Whether two pictures look like copies of each other, for N pairs. The relation is symmetric.

    Args:
        left, right: uint64 [N, WORDS].

    Returns:
        bool [N].
    """
    (a_mean, a_inner), (b_mean, b_inner) = _means(left), _means(right)
    similar = _close(a_mean, b_mean, TRIMMED_MEANS) & _close(a_inner, b_inner, TRIMMED_MEANS)
    a_in_b, b_in_a = _close(a_inner, b_mean, SAME_MEANS), _close(a_mean, b_inner, SAME_MEANS)
    richness = np.minimum(*(side[:, 3] >> np.uint64(RICHNESS_BIT) & np.uint64(3) for side in (left, right)))
    max_conflicts = CONFLICTS[richness]
    is_alike = np.zeros(len(left), bool)
    some = np.flatnonzero(similar & (max_conflicts >= 0))
    if len(some):
        a, b = _parts(left[some]), _parts(right[some])
        strong = [x & y for x, y in zip(a[1], b[1], strict=True)]
        agree, differ = _evidence(a[0], b[0], strong)
        agree_middle, differ_middle = _evidence(a[2], b[2], strong)
        same = _close(a_mean[some], b_mean[some], SAME_MEANS) & _close(a_inner[some], b_inner[some], SAME_MEANS)
        same &= (differ <= max_conflicts[some]) & (differ_middle <= MIDDLE_CONFLICTS)
        same &= np.minimum(agree - differ, agree_middle - differ_middle) >= ENOUGH
        is_trimmed = agree - TRIMMED_CONFLICT * differ >= ENOUGH_OF_TRIMMED
        is_trimmed &= agree_middle - TRIMMED_CONFLICT * differ_middle >= ENOUGH_OF_TRIMMED_MIDDLE
        is_alike[some] = same | is_trimmed & (richness[some] >= RICH)
    for inner, outer, means_match in ((left, right, a_in_b), (right, left, b_in_a)):
        some = np.flatnonzero(means_match & ~is_alike & (max_conflicts >= 0))
        if len(some):
            a, b = _parts(inner[some]), _parts(outer[some])
            agree, differ = _evidence(a[2], b[0], b[1])
            is_alike[some] = (differ <= max_conflicts[some]) & (agree - differ >= ENOUGH_OF_CROP)
    return is_alike


def first_alike(prints: np.ndarray, earlier: int = 0, progress: Callable[[float], None] | None = None) -> np.ndarray:
    """Find the pictures that repeat an earlier one.

    In order, a row is an original unless it is alike to an earlier original. The result depends on the prints and
    their order only. The search compares two rows if any of 35 keys (24 of the 42 lowest signs) of either view is equal
    in both; copies of the kinds above nearly always share a key. A key with more than CROWD entries is extended. If
    more than twice DEPTH entries still share it, a row is compared only with the first and the nearest of them: in such
    a crowd a copy may stay.

    The search needs about 60 bytes a row in addition to the prints, and up to 100 if half of the rows are copies. One
    million random prints take a few seconds on one core. The time grows somewhat faster than their number: about 10
    minutes for 20 million, and several times as long if the pictures resemble each other.

    Args:
        prints: uint64 [N, WORDS], in order of precedence; N below 2^27.
        earlier: rows 0..earlier-1 belong to earlier corpora and always stay.
        progress: called from time to time with the share of the work that is finished, 0..1.

    Returns:
        int64 [N]: the first original that a copy is alike to, -1 for originals.

    Raises:
        ValueError: the prints have another shape or type or too many rows, or `earlier` is outside 0..N.
    """
    if prints.dtype != np.uint64 or prints.ndim != 2 or prints.shape[1] != WORDS:
        raise ValueError(f"expected uint64 [N, {WORDS}], got {prints.dtype} {list(prints.shape)}")
    count = len(prints)
    if count >= LARGEST_COUNT or not 0 <= earlier <= count:
        raise ValueError(f"expected 0 <= earlier <= N < {LARGEST_COUNT}, got earlier {earlier} and N {count}")
    original_of = np.full(count, -1, np.int64)
    state = np.full(count, PENDING, np.uint8)
    state[:earlier] = ORIGINAL
    for start in range(0, count, SLICE):
        part = prints[start : start + SLICE]
        state[start : start + SLICE][~alike(part, part)] = PLAIN
    copies, first_rows = _exact_copies(prints, state, earlier)
    state[copies] = COPY  # exact copies are left out of the search: they share the result of their first row
    turn = 0
    while len(pending := np.flatnonzero(state == PENDING)):
        # The first partner decides nearly all rows. If partners are copies themselves (frames of one film), rows need
        # more partners; then only some of the rows are active at a time.
        last_rows = turn > 0 and len(pending) <= FEWEST_ROWS
        limit = NEIGHBOURS if last_rows else min(4 ** max(turn - 3, 0), NEIGHBOURS)
        active_count = count if limit == 1 else max(FEWEST_ROWS, 4 * count // limit)
        state[pending[:active_count]] = ACTIVE
        del pending  # frees eight bytes a row
        pairs = _neighbours(prints, state, limit, turn, progress)
        _decide(state, original_of, pairs, limit)
        turn += 1
    original_of[copies] = np.where(original_of[first_rows] >= 0, original_of[first_rows], first_rows)
    original_of[:earlier] = -1
    if progress is not None:
        progress(1.0)
    return original_of


def _reduce(picture: Image) -> Image:
    """Shrink or enlarge to uint8 [GRID_PX, GRID_PX, 3]."""
    while min(picture.shape[:2]) >= HALVED_FROM_PX:  # four times as fast as one step; an odd last row hardly matters
        height, width = (side // 2 * 2 for side in picture.shape[:2])
        halves = (width // 2, height // 2)
        picture = cv2.resize(picture[:height, :width], halves, interpolation=cv2.INTER_AREA)
    fitting = (min(picture.shape[1], GRID_PX), min(picture.shape[0], GRID_PX))
    small = cv2.resize(picture, fitting, interpolation=cv2.INTER_AREA)
    return small if fitting == (GRID_PX, GRID_PX) else cv2.resize(small, (GRID_PX, GRID_PX))


@functools.cache
def _cosines() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return whole-number cosines [F, GRID_PX] of the whole and of the middle, and each frequency's row and column.

    Frequencies are ordered by their distance from zero, without the constant.
    """
    order = sorted(((y, x) for y in range(16) for x in range(16)), key=lambda at: (at[0] ** 2 + at[1] ** 2, at))
    rows, columns = np.array(order[1 : FREQUENCIES + 1]).T
    views = []
    for border in (0, BORDER_PX):
        side = GRID_PX - 2 * border
        angles = np.pi / side * np.outer(np.arange(rows.max() + 1), np.arange(side) + 0.5)
        waves = np.cos(angles) * np.where(np.arange(len(angles)) == 0, 1.0, np.sqrt(2.0))[:, None]  # mean square 1
        views.append(np.pad(np.rint(waves * SCALE), ((0, 0), (border, border))))
    return views[0], views[1], rows, columns


def _pack(bits: np.ndarray) -> tuple[int, int]:
    """Pack FREQUENCIES bits, lowest first, into a number of 64 bits and a number of REST bits."""
    number = int.from_bytes(np.packbits(bits, bitorder="little").tobytes(), "little")
    return number & (1 << 64) - 1, number >> 64


def _means(prints: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Read mean Y, Cr, Cb of the whole and of the middle, each int16 [N, 3]."""
    whole = np.empty((len(prints), 3), np.int16)
    middle = np.empty_like(whole)
    bit = STEPS_BIT
    for place, width in enumerate(STEP_BITS):
        whole[:, place] = prints[:, 3] >> np.uint64(MEANS_BIT + 8 * place) & np.uint64(255)
        middle[:, place] = prints[:, 3] >> np.uint64(bit) & np.uint64((1 << width) - 1)
        middle[:, place] += whole[:, place] - (1 << width - 1)
        bit += width
    return whole, middle


def _close(left: np.ndarray, right: np.ndarray, within: tuple[int, int, int]) -> np.ndarray:
    """Whether all three means [N, 3] differ by at most `within`: bool [N]."""
    near = np.ones(len(left), bool)
    for place, most in enumerate(within):
        near &= np.abs(left[:, place] - right[:, place]) <= most
    return near


def _parts(prints: np.ndarray) -> list[list[np.ndarray]]:
    """Read signs, strengths and signs of the middle: each a column of 64 bits and a column of REST bits."""
    mask = np.uint64((1 << REST) - 1)
    return [[prints[:, place], prints[:, 3] >> np.uint64(place * REST) & mask] for place in range(3)]


def _evidence(
    left: list[np.ndarray], right: list[np.ndarray], strong: list[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the evidence of signs that agree, minus weak signs that differ; and the number of strong ones that differ.

    A weak sign that is not set may come from a zero coefficient, and plain pictures have many of those. So a weak sign
    counts as evidence only if it is set in both.
    """
    total, conflicts = np.zeros(len(left[0]), np.int16), np.zeros(len(left[0]), np.int16)
    for a, b, sure in zip(left, right, strong, strict=True):
        differ = a ^ b
        total += np.bitwise_count(sure & ~differ)
        total += np.bitwise_count(a & b & ~sure)
        total -= np.bitwise_count(differ & ~sure)
        conflicts += np.bitwise_count(sure & differ)
    return total, conflicts


def _exact_copies(prints: np.ndarray, state: np.ndarray, earlier: int) -> tuple[np.ndarray, np.ndarray]:
    """Find rows with the same print as a previous row, and that row; rows of earlier corpora form their own groups."""
    rows = np.flatnonzero(state != PLAIN)
    entries = np.empty(len(rows), np.uint64)
    for start in range(0, len(rows), SLICE):
        some = rows[start : start + SLICE]
        hashes = np.zeros(len(some), np.uint64)
        for place in range(WORDS):  # the golden ratio's odd multiplier spreads any difference to the upper bits
            hashes = (hashes ^ prints[some, place]) * np.uint64(0x9E3779B97F4A7C15)
            hashes ^= hashes >> np.uint64(32)
        hashes = hashes << np.uint64(1) | (some >= earlier)
        entries[start : start + SLICE] = hashes << np.uint64(PLACE_BITS) | some.astype(np.uint64)
    del rows
    entries.sort()
    copies, originals = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for start, ids, starts in _runs(entries):
        repeats = np.flatnonzero(starts < start + np.arange(len(ids)))
        later_rows = (entries[start + repeats] & np.uint64((1 << PLACE_BITS) - 1)).astype(np.int64)
        first_rows = (entries[starts[repeats]] & np.uint64((1 << PLACE_BITS) - 1)).astype(np.int64)
        equal = (prints[later_rows] == prints[first_rows]).all(axis=1)  # others share only the hash
        copies.append(later_rows[equal])
        originals.append(first_rows[equal])
    return np.concatenate(copies), np.concatenate(originals)


def _runs(entries: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yield slices of sorted entries: (start of the slice, ids, start of each entry's group)."""
    last, group_start = None, 0
    for start in range(0, len(entries), SLICE):
        ids = entries[start : start + SLICE] >> np.uint64(PLACE_BITS)
        is_first = np.ones(len(ids), bool)
        is_first[1:] = ids[1:] != ids[:-1]
        is_first[0] = ids[0] != last
        starts = np.maximum.accumulate(np.where(is_first, np.arange(start, start + len(ids)), group_start))
        last, group_start = ids[-1], int(starts[-1])
        yield start, ids, starts


def _neighbours(
    prints: np.ndarray, state: np.ndarray, limit: int, turn: int, progress: Callable[[float], None] | None
) -> np.ndarray:
    """Find for each active row the first previous rows that are alike and original or active, at most `limit` of them.

    Returns:
        uint64 [P], sorted: the row in the upper 32 bits, the previous row in the lower.
    """
    rows = np.flatnonzero((state == ORIGINAL) | (state == ACTIVE)).astype(np.uint32)
    few = int(np.count_nonzero(state == ACTIVE)) * 4 < len(rows)
    last_needed = np.full(len(state), len(state), np.uint32)  # a row needs no partner behind this one
    pairs = np.zeros(0, np.uint64)
    for number, blocks in enumerate(BLOCK_CHOICES):
        entries = _entries(prints, state, rows, blocks, few)
        _split_crowds(prints, entries, blocks)
        pair_sets = [pairs]
        for start, _, starts in _runs(entries):
            pair_sets += _compare(prints, state, entries, start, starts, last_needed, limit)
            if sum(map(len, pair_sets)) > len(pairs) + 16 * SLICE:
                pair_sets = [_first_partners(pair_sets, last_needed, limit)]
        pairs = _first_partners(pair_sets, last_needed, limit)
        if progress is not None:
            progress(1 - 0.1**turn * (1 - 0.9 * (number + 1) / len(BLOCK_CHOICES)))  # the first turn is 90 %
    return pairs


def _entries(prints: np.ndarray, state: np.ndarray, rows: np.ndarray, blocks: tuple[int, ...], few: bool) -> np.ndarray:
    """Return sorted uint64 [about 2 N]: key, row and view (0 whole, 1 middle), from the highest bit.

    If few rows are active, only keys of active rows are included.
    """
    key_needed = np.zeros(1 << KEY_BITS if few else 0, bool)
    if few:
        asking = np.flatnonzero(state == ACTIVE)
        for start in range(0, len(asking), SLICE):
            for view in (0, 1):
                key_needed[_keys(prints[asking[start : start + SLICE], 2 * view], blocks)] = True
    entries, count = np.empty(2 * len(rows), np.uint64), 0
    for start in range(0, len(rows), SLICE):
        some = rows[start : start + SLICE]
        for view in (0, 1):
            keys = _keys(prints[some, 2 * view], blocks)
            new = keys << np.uint64(PLACE_BITS) | some.astype(np.uint64) << np.uint64(1) | np.uint64(view)
            new = new[key_needed[keys]] if few else new
            entries[count : count + len(new)] = new
            count += len(new)
    entries = entries[:count]
    entries.sort()
    return entries


def _keys(signs: np.ndarray, blocks: tuple[int, ...]) -> np.ndarray:
    """Join the signs of some blocks, uint64 [N]."""
    keys = np.zeros(len(signs), np.uint64)
    for block in blocks:
        keys <<= np.uint64(BLOCK_BITS)
        keys |= signs >> np.uint64(BLOCK_BITS * block) & np.uint64((1 << BLOCK_BITS) - 1)
    return keys


def _split_crowds(prints: np.ndarray, entries: np.ndarray, blocks: tuple[int, ...]) -> None:
    """Split the entries of crowded keys by two more blocks, in place.

    Thousands of pictures of one kind (pages, goods on white) may share a key, and all would be compared.
    """
    key_of, row_of = np.uint64(PLACE_BITS), np.uint64((1 << PLACE_BITS) - 1)
    crowded_keys: set[int] = set()
    for start in range(0, len(entries) - CROWD, SLICE):
        here = entries[start : start + SLICE + CROWD] >> key_of
        crowded_keys.update(np.unique(here[CROWD:][here[CROWD:] == here[:-CROWD]]).tolist())
    extra_blocks = tuple(block for block in range(BLOCKS) if block not in blocks)[-2:]
    bounds = [np.searchsorted(entries, np.array([key, key + 1], np.uint64) << key_of) for key in sorted(crowded_keys)]
    for first, last in bounds:
        crowd = entries[first:last]
        places = (crowd & row_of).astype(np.int64)
        extra_keys = _keys(prints[places >> 1, 2 * (places & 1)], extra_blocks)
        crowd |= extra_keys << np.uint64(PLACE_BITS + KEY_BITS)  # uses the upper bits of the word
        crowd.sort()


def _compare(
    prints: np.ndarray,
    state: np.ndarray,
    entries: np.ndarray,
    start: int,
    starts: np.ndarray,
    last_needed: np.ndarray,
    limit: int,
) -> list[np.ndarray]:
    """Return pairs of alike rows among entries of one key, each as one number; for each row at most `limit`."""
    place = np.uint64((1 << PLACE_BITS) - 1)
    rows = ((entries[start : start + len(starts)] & place) >> np.uint64(1)).astype(np.int64)
    active = np.flatnonzero((state[rows] == ACTIVE) & (starts < start + np.arange(len(rows))))
    match_counts = np.zeros(len(rows), np.uint8)
    pairs = []
    for step in range(2 * DEPTH):
        places = starts[active] + step
        if step >= DEPTH:
            places = np.maximum(places, start + active - 2 * DEPTH + step)
        others = ((entries[places] & place) >> np.uint64(1)).astype(np.int64)
        is_needed = (others < rows[active]) & (others < last_needed[rows[active]])  # a key's entries are sorted by row
        active, others = active[is_needed], others[is_needed]
        if not len(active):
            break
        matches = alike(prints[rows[active]], prints[others])
        later, earlier = rows[active[matches]], others[matches]
        pairs.append(later.astype(np.uint64) << np.uint64(32) | earlier.astype(np.uint64))
        match_counts[active[matches]] += 1
        active = active[match_counts[active] < limit]
    return pairs


def _first_partners(pairs: list[np.ndarray], last_needed: np.ndarray, limit: int) -> np.ndarray:
    """Return the first `limit` partners of each row, sorted; store the last one of a row that has `limit`."""
    all_pairs = np.unique(np.concatenate(pairs))
    if not len(all_pairs):
        return all_pairs
    rows = all_pairs >> np.uint64(32)
    is_first = np.ones(len(all_pairs), bool)
    is_first[1:] = rows[1:] != rows[:-1]
    ranks = np.arange(len(all_pairs)) - np.maximum.accumulate(np.where(is_first, np.arange(len(all_pairs)), 0))
    is_last = ranks == limit - 1
    last_needed[rows[is_last]] = all_pairs[is_last] & np.uint64(0xFFFFFFFF)
    return all_pairs[ranks < limit]


def _decide(state: np.ndarray, original_of: np.ndarray, pairs: np.ndarray, limit: int) -> None:
    """Decide all active rows, in order, whose partners are decided, at least the first; the others become pending."""
    without_partner = state == ACTIVE
    for start in range(0, len(pairs), SLICE):
        without_partner[pairs[start : start + SLICE] >> np.uint64(32)] = False
    state[without_partner] = ORIGINAL
    states = memoryview(state)  # type: ignore[arg-type]
    row, partner_count, finished = -1, 0, True
    for start in range(0, len(pairs), SLICE):
        for pair in pairs[start : start + SLICE].tolist():
            if pair >> 32 != row:
                if not finished and partner_count < limit:
                    states[row] = ORIGINAL  # all its partners are copies
                row, partner_count, finished = pair >> 32, 0, False
            if finished:
                continue
            partner_count += 1
            partner_state = states[pair & 0xFFFFFFFF]
            if partner_state == ORIGINAL:
                states[row] = COPY
                original_of[row] = pair & 0xFFFFFFFF
            finished = partner_state != COPY  # an active partner leaves the row to the next turn
    if not finished and partner_count < limit:
        states[row] = ORIGINAL
    state[state == ACTIVE] = PENDING
