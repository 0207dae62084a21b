"""Perceptual fingerprints, and finding near duplicates among millions of them. Torch-free.

A picture is reduced to 80 x 80 pixels. Of the 72 lowest frequencies of its luma (a two-dimensional cosine transform)
the fingerprint holds the sign, and whether it stands above what compression may do to it. It holds the signs once more
for the middle of the picture, without 5 % at each side: they meet the first ones of a copy that was cropped so. Signs
of unrelated photographs agree like thrown coins; so evidence is counted, about a bit for a strong sign that agrees. The
mean colours of both views must fit as well.

Decided:
    alike       recompressed, rescaled (also to another aspect ratio), with a palette; 5 % cut from every side. With 5 %
                cut from one side or two opposite ones, six of ten are found; from two adjacent ones, one of six.
    not alike   mirrored or turned copies, larger crops, other colours (a grey copy of a coloured picture).
    plain       sky, a lamp in the dark, one edge: such a picture resembles thousands of others, and signs of one shape
                are no coins. Where less than a twentieth of the pixels stands out from its surroundings, a picture is
                never called alike to anything, not even to its own copy. Where less than three tenths do (goods on
                white), no strong sign may differ.

Signs of low cosine frequencies are Zauner's idea (Implementation and Benchmarking of Perceptual Image Hash Functions,
2010). Strengths, the view without borders, the keys and all numbers are ours, measured on photographs, on parts of
photographs that do not overlap, and on dead leaves.
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

[0] signs, [1] strengths of frequencies 0..63 of the whole; [2] signs of the same in the middle 90 % (each side); [3]
from below: 8 signs, 8 strengths, 8 signs of the middle (frequencies 64..71), means of the whole's Y, Cr, Cb (8 bits
each), what the middle's means exceed them by (5, 4, 4 bits, offset), and how rich in detail it is (2 bits).
"""

SMALLEST_SIDE_PX = 8
HALVED_FROM_PX = 320
GRID_PX = 80  # 5 % of it are whole pixels
BORDER_PX = 4
FREQUENCIES = 72  # three bits for each, and 38 of colour, fill four words
REST = FREQUENCIES - 64
STRONG = 0.2  # gray levels; JPEG of quality 30 moves 95 % of the frequencies of a 64-pixel picture by less than 0.25
ZERO = 0.004  # gray levels; what rounding to 8 bits leaves of nothing
SCALE = 1 << 14  # cosines become whole numbers, so that sums are exact in whatever order a machine adds
SURROUNDINGS_PX = 9
STANDS_OUT = 3  # gray levels
RICHNESS = (0.05, 0.3, 0.45)  # shares of the pixels that stand out from their surroundings; below the first: plain
MEANS_BIT, STEPS_BIT, RICHNESS_BIT = 3 * REST, 3 * REST + 24, 3 * REST + 37
STEP_BITS = (5, 4, 4)

SAME_MEANS = (3, 3, 3)  # gray levels of Y, Cr, Cb; JPEG of quality 30 moves them by up to 2
ENOUGH, ENOUGH_OF_CROP = 20, 26  # evidence of signs that agree
CONFLICTS = np.array([-1, 0, 1, 1])  # strong signs of the whole that may differ, by richness
CONFLICTS_WITHIN = 6  # the same of the middle, where a frequency may be weak though it is strong in the whole
RICH = 3
TRIMMED_MEANS = (6, 3, 3)  # with 5 % off one side
TRIMMED_CONFLICT = 2  # then a twelfth of the strong signs differ: each costs so much evidence
ENOUGH_OF_TRIMMED, ENOUGH_OF_TRIMMED_MIDDLE = 44, 34

BLOCK_BITS, BLOCKS, CHOSEN = 6, 7, 4  # a key is 4 of the 7 blocks of the 42 lowest signs: 35 keys of 24 bits
CHOICES = tuple(itertools.combinations(range(BLOCKS), CHOSEN))
KEY_BITS = BLOCK_BITS * CHOSEN
PLACE_BITS = 28  # row and view
LARGEST_COUNT = 1 << PLACE_BITS - 1
SLICE = 1 << 18  # entries or rows handled at a time
CROWD = 128  # entries with one key above which this key gets two blocks more
DEPTH = 128  # of more entries of one key than twice this, a row is compared with the first and with its nearest
NEIGHBOURS = 64  # remembered of a waiting row, at most
FEWEST_ROWS = 4096  # searched at a time
KEPT, COPY, PLAIN, WAITING, ASKING = 0, 1, 2, 3, 4  # ASKING is WAITING while its turn lasts


def fingerprint(picture: Image) -> np.ndarray:
    """Fingerprint of a picture.

    Args:
        picture: uint8 RGB [H, W, 3], both sides at least 8.

    Returns:
        uint64 [WORDS]; a function of the pixels alone.

    Raises:
        ValueError: another shape or type.
    """
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
        raise ValueError(f"expected uint8 [H, W, 3], got {picture.dtype} {picture.shape}")
    if min(picture.shape[:2]) < SMALLEST_SIDE_PX:
        raise ValueError(f"a fingerprint needs sides of at least {SMALLEST_SIDE_PX} pixels, got {picture.shape[:2]}")
    colours = cv2.cvtColor(_reduced(picture), cv2.COLOR_RGB2YCrCb)
    inside = slice(BORDER_PX, GRID_PX - BORDER_PX)
    means = [round(mean) for mean in cv2.mean(colours)[:3]]
    inner_means = [round(mean) for mean in cv2.mean(colours[inside, inside])[:3]]
    luma = np.ascontiguousarray(colours[..., 0])
    whole, middle, rows, columns = _cosines()
    centred = luma.astype(np.float64) - means[0]
    levels = (whole @ centred @ whole.T)[rows, columns] / (SCALE * GRID_PX) ** 2
    inner = (middle @ centred @ middle.T)[rows, columns] / (SCALE * (GRID_PX - 2 * BORDER_PX)) ** 2
    signs, strengths, within = (_pack(bits) for bits in (levels > ZERO, np.abs(levels) > STRONG, inner > ZERO))
    last, bit = signs[1] | strengths[1] << REST | within[1] << 2 * REST, STEPS_BIT
    for place, (mean, other, width) in enumerate(zip(means, inner_means, STEP_BITS, strict=True)):
        half = 1 << width - 1
        last |= mean << MEANS_BIT + 8 * place | min(max(other - mean, -half), half - 1) + half << bit
        bit += width
    apart = cv2.absdiff(luma, cv2.blur(luma, (SURROUNDINGS_PX, SURROUNDINGS_PX)))
    share = (apart >= STANDS_OUT).mean()
    last |= sum(bool(share >= least) for least in RICHNESS) << RICHNESS_BIT
    return np.array([signs[0], strengths[0], within[0], last], np.uint64)


def alike(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Whether two pictures look like copies of each other, pair by pair; which of them is left makes no difference.

    Args:
        left, right: uint64 [N, WORDS].

    Returns:
        bool [N].
    """
    (a_mean, a_inner), (b_mean, b_inner) = _means(left), _means(right)
    framed = _close(a_mean, b_mean, TRIMMED_MEANS) & _close(a_inner, b_inner, TRIMMED_MEANS)
    a_in_b, b_in_a = _close(a_inner, b_mean, SAME_MEANS), _close(a_mean, b_inner, SAME_MEANS)
    richness = np.minimum(*(side[:, 3] >> np.uint64(RICHNESS_BIT) & np.uint64(3) for side in (left, right)))
    allowed = CONFLICTS[richness]
    found = np.zeros(len(left), bool)
    some = np.flatnonzero(framed & (allowed >= 0))
    if len(some):
        a, b = _parts(left[some]), _parts(right[some])
        strong = [x & y for x, y in zip(a[1], b[1], strict=True)]
        agree, differ = _evidence(a[0], b[0], strong)
        agree_within, differ_within = _evidence(a[2], b[2], strong)
        same = _close(a_mean[some], b_mean[some], SAME_MEANS) & _close(a_inner[some], b_inner[some], SAME_MEANS)
        same &= (differ <= allowed[some]) & (differ_within <= CONFLICTS_WITHIN)
        same &= np.minimum(agree - differ, agree_within - differ_within) >= ENOUGH
        trimmed = agree - TRIMMED_CONFLICT * differ >= ENOUGH_OF_TRIMMED
        trimmed &= agree_within - TRIMMED_CONFLICT * differ_within >= ENOUGH_OF_TRIMMED_MIDDLE
        found[some] = same | trimmed & (richness[some] >= RICH)
    for inner, outer, fits in ((left, right, a_in_b), (right, left, b_in_a)):
        some = np.flatnonzero(fits & ~found & (allowed >= 0))
        if len(some):
            a, b = _parts(inner[some]), _parts(outer[some])
            agree, differ = _evidence(a[2], b[0], b[1])
            found[some] = (differ <= allowed[some]) & (agree - differ >= ENOUGH_OF_CROP)
    return found


def first_alike(prints: np.ndarray, earlier: int = 0, progress: Callable[[float], None] | None = None) -> np.ndarray:
    """Which pictures repeat an earlier one.

    In order, a row is kept unless it is alike to a row kept before; the result is a function of the prints and their
    order. Two alike rows meet where one of 35 keys (24 of the 42 lowest signs) of either view is the same in both,
    which copies of the kinds above nearly always have. Where more than CROWD entries share a key it is made longer, and
    where more than twice DEPTH still do, a row is compared with the first and the nearest of them only: in such a
    crowd a copy may stay.

    About 60 bytes a row are held besides the prints, up to 100 where half of them are copies. One million random prints
    take a few seconds on one core, the time grows somewhat faster than their number: about 10 minutes for 20 million,
    and a multiple of it where the pictures themselves resemble each other.

    Args:
        prints: uint64 [N, WORDS], in order of precedence; N below 2^27.
        earlier: rows 0..earlier-1 are of earlier corpora and always kept.
        progress: told now and then which share of the work is done, 0..1.

    Returns:
        int64 [N]: the first kept row that is alike, -1 for kept rows.

    Raises:
        ValueError: prints of another shape or type, too many rows, or `earlier` outside 0..N.
    """
    if prints.dtype != np.uint64 or prints.ndim != 2 or prints.shape[1] != WORDS:
        raise ValueError(f"expected uint64 [N, {WORDS}], got {prints.dtype} {list(prints.shape)}")
    count = len(prints)
    if count >= LARGEST_COUNT or not 0 <= earlier <= count:
        raise ValueError(f"expected 0 <= earlier <= N < {LARGEST_COUNT}, got earlier {earlier} and N {count}")
    of = np.full(count, -1, np.int64)
    state = np.full(count, WAITING, np.uint8)
    state[:earlier] = KEPT
    for start in range(0, count, SLICE):
        part = prints[start : start + SLICE]
        state[start : start + SLICE][~alike(part, part)] = PLAIN
    copies, originals = _equal(prints, state, earlier)
    state[copies] = COPY  # they would only lengthen the search: what holds for the first of them holds for all
    turn = 0
    while len(waiting := np.flatnonzero(state == WAITING)):
        # The first partner decides nearly all. Where partners turn out to be copies themselves (frames of one film),
        # rows need to know more of them; then only some rows ask at a time.
        few = turn > 0 and len(waiting) <= FEWEST_ROWS
        limit = NEIGHBOURS if few else min(4 ** max(turn - 3, 0), NEIGHBOURS)
        most = count if limit == 1 else max(FEWEST_ROWS, 4 * count // limit)
        state[waiting[:most]] = ASKING
        del waiting  # eight bytes a row
        pairs = _neighbours(prints, state, limit, turn, progress)
        _settle(state, of, pairs, limit)
        turn += 1
    of[copies] = np.where(of[originals] >= 0, of[originals], originals)
    of[:earlier] = -1
    if progress is not None:
        progress(1.0)
    return of


def _reduced(picture: Image) -> Image:
    """uint8 [GRID_PX, GRID_PX, 3]."""
    while min(picture.shape[:2]) >= HALVED_FROM_PX:  # four times as fast as one step; the last odd row is nothing
        height, width = (side // 2 * 2 for side in picture.shape[:2])
        halves = (width // 2, height // 2)
        picture = cv2.resize(picture[:height, :width], halves, interpolation=cv2.INTER_AREA)
    fitting = (min(picture.shape[1], GRID_PX), min(picture.shape[0], GRID_PX))
    small = cv2.resize(picture, fitting, interpolation=cv2.INTER_AREA)
    return small if fitting == (GRID_PX, GRID_PX) else cv2.resize(small, (GRID_PX, GRID_PX))


@functools.cache
def _cosines() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Whole-number cosines [F, GRID_PX] of the whole and of the middle, and each frequency's row and column.

    Frequencies are ordered by their distance from zero, the constant left out.
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
    """FREQUENCIES bits, the first lowest, as a number of 64 bits and one of the rest."""
    number = int.from_bytes(np.packbits(bits, bitorder="little").tobytes(), "little")
    return number & (1 << 64) - 1, number >> 64


def _means(prints: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean Y, Cr, Cb of the whole and of the middle, each int16 [N, 3]."""
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
    """Whether all three means [N, 3] lie that near each other: bool [N]."""
    near = np.ones(len(left), bool)
    for place, most in enumerate(within):
        near &= np.abs(left[:, place] - right[:, place]) <= most
    return near


def _parts(prints: np.ndarray) -> list[list[np.ndarray]]:
    """Signs, strengths, and signs of the middle: each a column of 64 bits and one of the rest."""
    mask = np.uint64((1 << REST) - 1)
    return [[prints[:, place], prints[:, 3] >> np.uint64(place * REST) & mask] for place in range(3)]


def _evidence(
    left: list[np.ndarray], right: list[np.ndarray], strong: list[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Evidence of the signs that agree, less that of weak ones which do not; and how many strong ones differ.

    A weak sign that is not set may be a zero, of which plain pictures have many. So of the weak signs only set ones are
    evidence, and stand for those which noise has not set.
    """
    total, conflicts = np.zeros(len(left[0]), np.int16), np.zeros(len(left[0]), np.int16)
    for a, b, sure in zip(left, right, strong, strict=True):
        differ = a ^ b
        total += np.bitwise_count(sure & ~differ)
        total += np.bitwise_count(a & b & ~sure)
        total -= np.bitwise_count(differ & ~sure)
        conflicts += np.bitwise_count(sure & differ)
    return total, conflicts


def _equal(prints: np.ndarray, state: np.ndarray, earlier: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows with the very print of a row before, and that row; rows of earlier corpora are matched among themselves."""
    rows = np.flatnonzero(state != PLAIN)
    entries = np.empty(len(rows), np.uint64)
    for start in range(0, len(rows), SLICE):
        some = rows[start : start + SLICE]
        mixed = np.zeros(len(some), np.uint64)
        for place in range(WORDS):  # the golden ratio's odd multiplier spreads any difference to the upper bits
            mixed = (mixed ^ prints[some, place]) * np.uint64(0x9E3779B97F4A7C15)
            mixed ^= mixed >> np.uint64(32)
        mixed = mixed << np.uint64(1) | (some >= earlier)
        entries[start : start + SLICE] = mixed << np.uint64(PLACE_BITS) | some.astype(np.uint64)
    del rows
    entries.sort()
    copies, originals = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for start, ids, starts in _runs(entries):
        second = np.flatnonzero(starts < start + np.arange(len(ids)))
        these = (entries[start + second] & np.uint64((1 << PLACE_BITS) - 1)).astype(np.int64)
        firsts = (entries[starts[second]] & np.uint64((1 << PLACE_BITS) - 1)).astype(np.int64)
        equal = (prints[these] == prints[firsts]).all(axis=1)  # of others the hash alone is equal: left to the search
        copies.append(these[equal])
        originals.append(firsts[equal])
    return np.concatenate(copies), np.concatenate(originals)


def _runs(entries: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Slices of grouped entries: (where it starts, the ids, where each entry's group starts)."""
    last, begin = None, 0
    for start in range(0, len(entries), SLICE):
        ids = entries[start : start + SLICE] >> np.uint64(PLACE_BITS)
        fresh = np.ones(len(ids), bool)
        fresh[1:] = ids[1:] != ids[:-1]
        fresh[0] = ids[0] != last
        starts = np.maximum.accumulate(np.where(fresh, np.arange(start, start + len(ids)), begin))
        last, begin = ids[-1], int(starts[-1])
        yield start, ids, starts


def _neighbours(
    prints: np.ndarray, state: np.ndarray, limit: int, turn: int, progress: Callable[[float], None] | None
) -> np.ndarray:
    """Of each asking row the first rows before it that are alike and kept or asking, at most `limit` of them.

    Returns:
        uint64 [P], sorted: the row in the upper half, the earlier one in the lower.
    """
    rows = np.flatnonzero((state == KEPT) | (state == ASKING)).astype(np.uint32)
    few = int(np.count_nonzero(state == ASKING)) * 4 < len(rows)
    bound = np.full(len(state), len(state), np.uint32)  # of what lies behind it, a row has enough
    pairs = np.zeros(0, np.uint64)
    for number, chosen in enumerate(CHOICES):
        entries = _entries(prints, state, rows, chosen, few)
        _part_crowds(prints, entries, chosen)
        fresh = [pairs]
        for start, _, starts in _runs(entries):
            fresh += _compare(prints, state, entries, start, starts, bound, limit)
            if sum(map(len, fresh)) > len(pairs) + 16 * SLICE:
                fresh = [_smallest(fresh, bound, limit)]
        pairs = _smallest(fresh, bound, limit)
        if progress is not None:
            progress(1 - 0.1**turn * (1 - 0.9 * (number + 1) / len(CHOICES)))  # the first turn is most of the work
    return pairs


def _entries(prints: np.ndarray, state: np.ndarray, rows: np.ndarray, chosen: tuple[int, ...], few: bool) -> np.ndarray:
    """Sorted uint64 [about 2 N]: key, row, and view (0 whole, 1 middle), from above.

    Where few rows ask, only keys that one of them has.
    """
    wanted = np.zeros(1 << KEY_BITS if few else 0, bool)
    if few:
        asking = np.flatnonzero(state == ASKING)
        for start in range(0, len(asking), SLICE):
            for view in (0, 1):
                wanted[_keys(prints[asking[start : start + SLICE], 2 * view], chosen)] = True
    entries, filled = np.empty(2 * len(rows), np.uint64), 0
    for start in range(0, len(rows), SLICE):
        some = rows[start : start + SLICE]
        for view in (0, 1):
            keys = _keys(prints[some, 2 * view], chosen)
            new = keys << np.uint64(PLACE_BITS) | some.astype(np.uint64) << np.uint64(1) | np.uint64(view)
            new = new[wanted[keys]] if few else new
            entries[filled : filled + len(new)] = new
            filled += len(new)
    entries = entries[:filled]
    entries.sort()
    return entries


def _keys(signs: np.ndarray, blocks: tuple[int, ...]) -> np.ndarray:
    """The signs of some blocks, side by side, uint64 [N]."""
    keys = np.zeros(len(signs), np.uint64)
    for block in blocks:
        keys <<= np.uint64(BLOCK_BITS)
        keys |= signs >> np.uint64(BLOCK_BITS * block) & np.uint64((1 << BLOCK_BITS) - 1)
    return keys


def _part_crowds(prints: np.ndarray, entries: np.ndarray, chosen: tuple[int, ...]) -> None:
    """Group the entries of overfull keys by two blocks more, in place.

    Pictures of one kind (pages, goods on white) may share a key by the thousand, and would all be compared.
    """
    key_of, row_of = np.uint64(PLACE_BITS), np.uint64((1 << PLACE_BITS) - 1)
    crowded: set[int] = set()
    for start in range(0, len(entries) - CROWD, SLICE):
        here = entries[start : start + SLICE + CROWD] >> key_of
        crowded.update(np.unique(here[CROWD:][here[CROWD:] == here[:-CROWD]]).tolist())
    more = tuple(block for block in range(BLOCKS) if block not in chosen)[-2:]
    bounds = [np.searchsorted(entries, np.array([key, key + 1], np.uint64) << key_of) for key in sorted(crowded)]
    for first, last in bounds:
        crowd = entries[first:last]
        places = (crowd & row_of).astype(np.int64)
        wide = _keys(prints[places >> 1, 2 * (places & 1)], more)
        crowd |= wide << np.uint64(PLACE_BITS + KEY_BITS)  # fills the word's upper end
        crowd.sort()


def _compare(
    prints: np.ndarray,
    state: np.ndarray,
    entries: np.ndarray,
    start: int,
    starts: np.ndarray,
    bound: np.ndarray,
    limit: int,
) -> list[np.ndarray]:
    """Pairs of alike rows among entries of one key, each as one number; earlier rows first, and no more than needed."""
    place = np.uint64((1 << PLACE_BITS) - 1)
    rows = ((entries[start : start + len(starts)] & place) >> np.uint64(1)).astype(np.int64)
    left = np.flatnonzero((state[rows] == ASKING) & (starts < start + np.arange(len(rows))))
    found = np.zeros(len(rows), np.uint8)
    pairs = []
    for step in range(2 * DEPTH):
        at = starts[left] + step
        if step >= DEPTH:
            at = np.maximum(at, start + left - 2 * DEPTH + step)
        others = ((entries[at] & place) >> np.uint64(1)).astype(np.int64)
        ahead = (others < rows[left]) & (others < bound[rows[left]])  # a key's entries are in order of their rows
        left, others = left[ahead], others[ahead]
        if not len(left):
            break
        hit = alike(prints[rows[left]], prints[others])
        mine, theirs = rows[left[hit]], others[hit]
        pairs.append(mine.astype(np.uint64) << np.uint64(32) | theirs.astype(np.uint64))
        found[left[hit]] += 1
        left = left[found[left] < limit]
    return pairs


def _smallest(pairs: list[np.ndarray], bound: np.ndarray, limit: int) -> np.ndarray:
    """The first `limit` partners of each row, sorted; a row that has so many needs none behind the last: `bound`."""
    every = np.unique(np.concatenate(pairs))
    if not len(every):
        return every
    rows = every >> np.uint64(32)
    fresh = np.ones(len(every), bool)
    fresh[1:] = rows[1:] != rows[:-1]
    ranks = np.arange(len(every)) - np.maximum.accumulate(np.where(fresh, np.arange(len(every)), 0))
    full = ranks == limit - 1
    bound[rows[full]] = every[full] & np.uint64(0xFFFFFFFF)
    return every[ranks < limit]


def _settle(state: np.ndarray, of: np.ndarray, pairs: np.ndarray, limit: int) -> None:
    """Decide, in order, all asking rows whose fate hangs on decided ones, at least the first; the others wait again."""
    alone = state == ASKING
    for start in range(0, len(pairs), SLICE):
        alone[pairs[start : start + SLICE] >> np.uint64(32)] = False
    state[alone] = KEPT
    fates = memoryview(state)  # type: ignore[arg-type]
    row, tried, decided = -1, 0, True
    for start in range(0, len(pairs), SLICE):
        for pair in pairs[start : start + SLICE].tolist():
            if pair >> 32 != row:
                if not decided and tried < limit:
                    fates[row] = KEPT  # all that it is alike to are copies
                row, tried, decided = pair >> 32, 0, False
            if decided:
                continue
            tried += 1
            fate = fates[pair & 0xFFFFFFFF]
            if fate == KEPT:
                fates[row] = COPY
                of[row] = pair & 0xFFFFFFFF
            decided = fate != COPY  # a partner that waits itself: next turn
    if not decided and tried < limit:
        fates[row] = KEPT
    state[state == ASKING] = WAITING
