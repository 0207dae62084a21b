"""Pairs of pictures by their names: equal names, or names that one affix of the whole set turns into each other.

    equal    hq/a/1.png      lq/a/1.jpg         the paths without suffixes
    affix    hq/1.png        lq/1x2.png         inputs are named "{}x2"
             hq/7_HR.png     lq/7_LR4.png       targets "{}_HR", inputs "{}_LR4"

Pictures are never paired by their place in a list: one file more on one side would shift all that follow.
"""

from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os.path import splitext

SHOWN = 3  # names of each side in a message
ONE_RULE = "paired by equal names, or with one prefix and suffix for all"
DIGITS = "0123456789"
MAX_AFFIX_CHARS = 32  # ours: longest affix that is searched for


class NoPairs(Exception):
    """Names that do not belong together; the message is a sentence without a full stop."""


@dataclass(frozen=True, kw_only=True)
class Affixes:
    """How the stems of both sides are named: the text before and after what they share."""

    target: tuple[str, str] = ("", "")
    input: tuple[str, str] = ("", "")

    def target_stem(self, stem: str) -> str | None:
        """The stem of an input's target; None if the input is not named so."""
        core = _strip(stem, self.input)
        return None if core is None else f"{self.target[0]}{core}{self.target[1]}"


def pair_names(
    targets: Sequence[str], inputs: Sequence[str], target_name: str = "", input_name: str = ""
) -> list[int | None]:
    """The number of each target's input among `inputs`; None for a target without an input.

    Args:
        targets, inputs: relative paths of files, with suffix and with "/" between folders.
        target_name, input_name: how the stems are named, with "{}" for what both sides share: "{}_HR"; "" finds it.

    Raises:
        NoPairs: no one rule gives every input a target of its own, or several rules do, with different pairs.
        ValueError: a name without exactly one "{}".
    """
    ours, theirs = _Names(targets), _Names(inputs)
    if target_name or input_name:
        affixes = Affixes(target=_affix(target_name or "{}"), input=_affix(input_name or "{}"))
        pairs = _apply(ours, theirs, affixes)
        if len(pairs) < len(inputs):
            raise NoPairs(_refusal(targets, inputs, pairs, f'named "{target_name or "{}"}" and "{input_name or "{}"}"'))
        return _numbers(pairs, len(targets))
    equal = _equal(ours, theirs)
    if len(equal) == len(inputs):
        return _numbers(equal, len(targets))
    by_rule: dict[tuple[tuple[int, int], ...], Affixes] = {}
    for affixes, pairs in _rules(ours, theirs):
        by_rule.setdefault(tuple(sorted(pairs.items())), affixes)
    whole = [pairs for pairs in by_rule if len(pairs) == len(targets)]
    best = whole if len(whole) == 1 else list(by_rule)
    if len(best) > 1:
        names = " and ".join(f'"{_text(by_rule[pairs].input)}"' for pairs in best[:2])
        raise NoPairs(f"the names fit in several ways, with the inputs named {names}: say which")
    if best and (best == whole or not equal):
        rule = by_rule[best[0]]
        if _may_be_numbers(rule, [theirs.stems[number] for number, _ in best[0]]):
            raise NoPairs(f'only "{_text(rule.input)}" fits the inputs, which may as well be other numbers: say which')
        return _numbers(dict(best[0]), len(targets))
    if equal and not best:
        return _numbers(equal, len(targets))
    how = f'paired by equal names, and "{_text(by_rule[best[0]].input)}" would pair them all' if best else ONE_RULE
    raise NoPairs(_refusal(targets, inputs, equal, how))


def _numbers(pairs: Mapping[int, int], count: int) -> list[int | None]:
    """Inputs in the order of the targets, from {input: target}."""
    by_target = {target: input_ for input_, target in pairs.items()}
    return [by_target.get(number) for number in range(count)]


def _refusal(targets: Sequence[str], inputs: Sequence[str], pairs: Mapping[int, int], how: str) -> str:
    """A sentence with the counts and the first names that have no partner."""
    paired = set(pairs.values())
    lonely = sorted(name for number, name in enumerate(inputs) if number not in pairs)
    others = sorted(name for number, name in enumerate(targets) if number not in paired)
    first = ", ".join(f"{name} with {other}" for name, other in list(zip(others, lonely, strict=False))[:SHOWN])
    return f"{len(lonely)} of {len(inputs)} inputs have no target of their own among {len(targets)} when {how}" + (
        f"; by their places these would be pairs: {first}" if first else f", the first is {lonely[0]}"
    )


class _Names:
    """File names split into folder, stem and suffix, in composed letters."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = [unicodedata.normalize("NFC", name) for name in names]
        self.folders = [name.rpartition("/")[0] for name in self.names]
        files = [splitext(name.rpartition("/")[2]) for name in self.names]
        self.stems = [stem for stem, _ in files]
        self.suffixes = [suffix.lower() for _, suffix in files]


def _grouped(keys: Iterable[tuple[str, str]]) -> dict[tuple[str, str], list[int]]:
    groups: dict[tuple[str, str], list[int]] = {}
    for number, key in enumerate(keys):
        groups.setdefault(key, []).append(number)
    return groups


def _equal(targets: _Names, inputs: _Names) -> dict[int, int]:
    """{input: target} of equal names: whole paths first, then paths without suffix."""
    whole = {name: number for number, name in enumerate(targets.names)}
    pairs = {number: whole[name] for number, name in enumerate(inputs.names) if name in whole}
    return pairs | _apply(targets, inputs, Affixes(), pairs)


def _apply(targets: _Names, inputs: _Names, affixes: Affixes, pairs: Mapping[int, int] | None = None) -> dict[int, int]:
    """{input: target} by a rule, in equal folders, without those of `pairs`; ambiguous names are left out.

    If no folder is on both sides, stems that are single on their side count alone.
    """
    done, used = dict(pairs or {}), set((pairs or {}).values())
    stems = [affixes.target_stem(stem) for stem in inputs.stems]
    same_folders = bool({*targets.folders} & {*inputs.folders})
    folders = (targets.folders, inputs.folders) if same_folders else ([""] * len(targets.stems), [""] * len(stems))
    candidates = _grouped(zip(folders[0], targets.stems, strict=True))
    claims = _grouped((f, "/" if s is None else s) for f, s in zip(folders[1], stems, strict=True))
    for key, numbers in claims.items():
        own = [number for number in numbers if number not in done]
        free = [number for number in candidates.get(key, []) if number not in used]
        if len(own) == len(free) == 1:
            done[own[0]] = free[0]
        for number in own if len(own) > 1 or len(free) > 1 else []:  # a.png and a.jpg on both sides
            alike = [n for n in free if targets.suffixes[n] == inputs.suffixes[number]]
            rivals = [n for n in own if inputs.suffixes[n] == inputs.suffixes[number]]
            if len(alike) == len(rivals) == 1:
                done[number] = alike[0]
    return {number: target for number, target in done.items() if number not in (pairs or {})}


def _rules(targets: _Names, inputs: _Names) -> Iterator[tuple[Affixes, dict[int, int]]]:
    """Rules that give every input a target of its own, with their pairs.

    An affix of the inputs is at an end of all of them; one of the targets, of all targets.
    """
    if not targets.stems or not inputs.stems:
        return
    stems = {*targets.stems}
    probe = min(inputs.stems, key=len)
    prefix, suffix = _common_ends(inputs.stems)
    for own, other in itertools.product(_affixes(prefix, suffix), _affixes(*_common_ends(targets.stems))):
        core = _strip(probe, own)
        if not core or f"{other[0]}{core}{other[1]}" not in stems or not _is_shortest(own, other):
            continue
        # where both sides have a prefix, "cat" and "bat" share a part of a word and not a name
        starts = not (own[0] and other[0]) or any(
            _is_border(probe[at - 1], probe[at]) for at in range(len(own[0]), min(len(prefix) + 1, len(probe)))
        )
        ends = not (own[1] and other[1]) or any(
            _is_border(probe[-at - 1], probe[-at]) for at in range(len(own[1]), min(len(suffix) + 1, len(probe)))
        )
        affixes = Affixes(target=other, input=own)
        if starts and ends and all(affixes.target_stem(stem) in stems for stem in inputs.stems):
            pairs = _apply(targets, inputs, affixes)
            if len(pairs) == len(inputs.stems):
                yield affixes, pairs


def _is_shortest(own: tuple[str, str], other: tuple[str, str]) -> bool:
    """Whether two affixes change a name, and no shorter ones make the same change."""
    is_longer = (own[0] and own[0][-1] == other[0][-1:]) or (own[1] and own[1][0] == other[1][:1])
    return own != other and not is_longer


def _is_border(left: str, right: str) -> bool:
    """Whether a word may end between two letters: cat|1, cat|_, cat|LR."""
    kinds = [(letter.isalpha(), letter.isdigit()) for letter in (left, right)]
    return kinds[0] != kinds[1] or (left.islower() and right.isupper()) or not any(kinds[0])


def _common_ends(stems: Sequence[str]) -> tuple[str, str]:
    """The longest (prefix, suffix) that all of these stems have, up to MAX_AFFIX_CHARS."""
    first, last = min(stems), max(stems)
    prefix = first[: _shared(first, last)][:MAX_AFFIX_CHARS]
    backwards = [stem[::-1] for stem in stems]
    first, last = min(backwards), max(backwards)
    return prefix, first[: _shared(first, last)][:MAX_AFFIX_CHARS][::-1]


def _affixes(prefix: str, suffix: str) -> list[tuple[str, str]]:
    """All beginnings of a prefix with all ends of a suffix."""
    ends = [suffix[start:] for start in range(len(suffix) + 1)]
    return [(prefix[:length], end) for length in range(len(prefix) + 1) for end in ends]


def _may_be_numbers(rule: Affixes, stems: Sequence[str]) -> bool:
    """Whether a rule may pair one numbering with another one: 1, 2, 3 with 11, 12, 13, or with 10, 20, 30.

    Zeros in front of a number do not change it, and 110 beside 11 is no shift by ten.
    """
    cores = [core for stem in stems if (core := _strip(stem, rule.input)) is not None]
    for before, after in (rule.input, rule.target):
        first = before[len(before.rstrip(DIGITS)) :]
        numbers = [len(core) - len(core.lstrip(DIGITS)) for core in cores]
        if first.strip("0") and all(numbers) and len(set(numbers)) == 1:
            return True
        if after[:1].isdigit() and all(core[-1].isdigit() for core in cores):
            return True
    sides = ["".join(affix) for affix in (rule.input, rule.target)]
    return len(stems) == 1 and all(any(letter.isdigit() for letter in side) for side in sides)


def _shared(one: str, other: str) -> int:
    """Number of equal characters at the start of two texts."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _affix(name: str) -> tuple[str, str]:
    if name.count("{}") != 1 or "/" in name:
        raise ValueError(f'"{name}" needs one "{{}}" for what both sides share, and no folder')
    before, _, after = name.partition("{}")
    return before, after


def _text(affix: tuple[str, str]) -> str:
    return "{}".join(affix)


def _strip(stem: str, affix: tuple[str, str]) -> str | None:
    before, after = affix
    if len(stem) <= len(before) + len(after) or not (stem.startswith(before) and stem.endswith(after)):
        return None
    return stem[len(before) : len(stem) - len(after)]
