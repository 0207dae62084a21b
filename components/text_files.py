"""Text files of unknown encoding: UTF-8, UTF-16 and UTF-32, with and without a byte order mark, and cp1252. Torch-free.

Encodings cannot be told apart with certainty, so a text that could be wrong is refused rather than guessed at. UTF-8
comes first: other text is hardly ever valid UTF-8. cp1252 must look like a Western European language, since every
8-bit code page decodes as cp1252 into something.
"""

from __future__ import annotations

import codecs
import re
import unicodedata
from collections import Counter

from components.types import SampleError

MARKS = (  # UTF-32 first: its little-endian mark begins with that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
MAX_ODD = 0.2
"""Largest share of odd characters in a text. Ours: UTF-16 in the wrong byte order has over a half, text nearly none."""
LEAST_ALIKE = 0.5  # ours: share of a UTF-16 text in one block of 256 characters, or of its high bytes that are equal
ALLOWED = frozenset("\t\n\r\f\v\x1a\x85\u00ad\u061c\u200b\u200c\u200d\u200e\u200f\ufeff")
"""Controls of intact texts: blanks, soft hyphens, joiners, marks of the writing direction."""
EAST_ASIAN_SIGNS = frozenset("\u3000\u3001\u3002\uff01\uff0c\uff1f")
HIGH_BYTES = bytes([*range(0x20), 0x30])  # of the alphabets and of the Japanese syllables
JUDGED_CHARACTERS = 4096  # ours: the beginning of a text decides

CONTROLS = re.compile(rb"[\x00-\x08\x0e-\x19\x1b-\x1f]")
"""Bytes that 8-bit text does not have. UTF-16 has them: in ASCII characters, and as the low bytes of others."""

SHIFTS = re.compile(rb"\x1b(?:\$[@AB]|\$\([A-Z]|\([BIJ])")
"""Escape sequences of ISO 2022, as in Japanese mail: the bytes after them look like ASCII and are not."""

TAGS = range(0xE0020, 0xE0080)  # they spell the region of a flag

LETTER = r"[^\W\d_]"
FOREIGN = re.compile(
    "[\u00a1-\u00ffƒŠŒŽšœžŸˆ˜‚„†‡‰‹›]{3}"  # no Western European word has three in a row
    f"|(?<={LETTER})(?:[¡¢£¥¦§¨©ª«¬¯°±¶¸¹²³º»¼½¾¿“”›]{LETTER}|[‚„ƒˆ˜†‡‰‹¤])"  # a sign inside a word
    f"|(?<!{LETTER})ÿ|ƒ{LETTER}|[a-zß-öø-ÿ][À-ÖØ-ÞŠŒŽŸ]"  # the byte ff; a capital after a small letter
    rf"|(?<!{LETTER})(?:Ÿ[a-zß-ÿ]|[£¦¨¬¯¶¸¹²³†‡‰ˆ˜™]{LETTER}|(?<!\d)[¼½¾]{LETTER})|¤"  # a sign that begins a word
    f"|‚{LETTER}(?![^‘’‚]*[‘’])"  # a low quote that nothing closes
    "|[ðþÐÞ](?=.*[çğêîôûâàèùüãñÇÜ])|[çêîôûâàèùüãñÇÜ](?=.*[ðþÐÞ])"  # Icelandic with what it does not have: Turkish
    f"|ý{LETTER}*ý"  # Turkish, where all vowels of a word are alike
)
"""What letters of other 8-bit encodings become in cp1252. Single words may pass: čočka becomes èoèka."""


def decode_text(data: bytes, is_whole: bool = True) -> str:
    """Decode a text file, without its byte order mark.

    Args:
        data: the bytes.
        is_whole: false for the beginning of a file, which may end inside a character.

    Raises:
        SampleError: not_text: the bytes are not text, or text of another encoding.
    """
    for mark, encoding in MARKS:
        if data.startswith(mark):
            text = _decode(data[len(mark) :], encoding, is_whole)
            if text is None:
                raise SampleError("not_text", f"it has the mark of {encoding} and is not valid {encoding}")
            return text
    if SHIFTS.search(data):
        raise SampleError("not_text", "it is text of ISO 2022: save it as UTF-8")
    text = _decode(data, "utf-8", is_whole)
    has_controls = CONTROLS.search(data) is not None
    if text is not None and not has_controls:
        return text
    candidates = [] if text is None else [text]
    if has_controls or _is_striped(data):
        wide = (_decode(data, encoding, is_whole) for encoding in ("utf-16-le", "utf-16-be"))
        candidates += [candidate for candidate in wide if candidate is not None and _is_likely(candidate)]
    if text is None and not has_controls and not candidates:
        western = _decode(data, "cp1252", is_whole)
        candidates += [western] if western is not None and FOREIGN.search(western) is None else []
    best = min(candidates, key=_rank, default=None)
    if best is None or _share_of_odd(best) > MAX_ODD:
        raise SampleError("not_text", "it is not UTF-8, UTF-16 or cp1252 text: save it as UTF-8")
    return best


def _is_striped(data: bytes) -> bool:
    """Whether every other byte is mostly the same, as the high bytes of an alphabet in UTF-16 are."""
    halves = (data[start : 2 * JUDGED_CHARACTERS : 2] for start in (0, 1))
    return any(half.count(high) > LEAST_ALIKE * len(half) for half in halves for high in HIGH_BYTES)


def _is_likely(text: str) -> bool:
    """Whether a text without a mark is likely to be UTF-16: by ASCII, one alphabet, or CJK punctuation."""
    beginning = text[:JUDGED_CHARACTERS]
    blocks = Counter(ord(letter) >> 8 for letter in beginning)
    return (
        blocks[0] > 0
        or blocks.most_common(1)[0][1] >= LEAST_ALIKE * len(beginning)
        or not EAST_ASIAN_SIGNS.isdisjoint(text)
    )


def _rank(text: str) -> tuple[float, int, int]:
    """Lower for the better of two readings: odd characters, then ASCII ones, then blocks of 256 characters."""
    beginning = text[:JUDGED_CHARACTERS]
    return _share_of_odd(text), -sum(map(str.isascii, beginning)), len({ord(letter) >> 8 for letter in beginning})


def _decode(data: bytes, encoding: str, is_whole: bool) -> str | None:
    try:
        return codecs.getincrementaldecoder(encoding)("strict").decode(data, is_whole)
    except UnicodeDecodeError:
        return None


def _share_of_odd(text: str) -> float:
    """Share of odd characters: controls, unassigned ones, and letters next to one of another script."""
    if text.isascii() and text.isprintable():
        return 0.0
    beginning = text[:JUDGED_CHARACTERS]
    odd, before = 0, ""
    for character in beginning:
        kind = unicodedata.category(character)
        script = _script(character) if kind[0] == "L" else ""
        is_control = kind in ("Cc", "Cf", "Cn", "Co", "Cs") and character not in ALLOWED and ord(character) not in TAGS
        odd += is_control or bool(script and before and script != before)
        before = script
    return odd / max(1, len(beginning))


def _script(letter: str) -> str:
    """A rough name of a letter's script, so that neighbours of one word have the same name."""
    code = ord(letter)
    if code < 0x250 or 0x1E00 <= code < 0x1F00:
        return "latin"
    if 0x2E80 <= code < 0xA000 or 0xAC00 <= code < 0xD7B0 or 0xF900 <= code < 0xFB00 or code >= 0x20000:
        return "east asian"
    return unicodedata.name(letter, "").partition(" ")[0]
