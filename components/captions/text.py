"""Texts as lines that are safe in logs, tables and prompts. Torch-free.

A picture may have several texts. The table of a corpus stores them in one string with SEPARATOR between them, which no
tidy text holds. So a caption of one text is that text. Its manifest and shards have "captions" too, a list.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable

from components.types import SampleError

CAPTION = "{caption}"

SEPARATOR = "\x1e"
"""Unicode's and ASCII's "record separator": it counts as a blank, and JSON escapes it."""

JOINERS = frozenset("\u200c\u200d")  # format characters of Persian, Indic scripts and emoji
KEPT_FORMATS = JOINERS | frozenset(
    "\u180e\u0600\u0601\u0602\u0603\u0604\u0605\u06dd\u070f\u0890\u0891\u08e2\U000110bd\U000110cd"
)
"""The joiners, Mongolian's separator of vowels, and visible format characters: signs above or below a number."""
FLAG, TAGS = "\U0001f3f4", range(0xE0020, 0xE0080)
"""Tag characters spell the region of a flag; elsewhere they are invisible text, which is removed."""
REMOVED_CATEGORIES = frozenset({"Cs", "Cf"})
"""Unicode categories: surrogates, and format characters (some change the writing direction)."""
REPLACEMENT = "\ufffd"  # a tokenizer decodes a character to this if the token limit cuts it


def fill_frame(frame: str, caption: str) -> str:
    """Return a picture's prompt: the recipe's frame with the caption for {caption}; "": the caption alone."""
    return frame.replace(CAPTION, caption) if frame else caption


def tidy(text: str) -> str:
    """Replace whitespace (line breaks too, as in SUPIR's code) and control characters by one blank.

    Unprintable characters are removed, but not the joiners, variation selectors and tags that letters and emoji need.
    """
    if text.isascii() and text.isprintable():
        return " ".join(text.split())
    characters: list[str] = []
    is_in_flag = False
    for character in text:
        is_in_flag = character == FLAG or (is_in_flag and ord(character) in TAGS)
        category = unicodedata.category(character)
        if character.isspace() or category == "Cc":
            characters.append(" ")
        elif is_in_flag or character in KEPT_FORMATS or not _is_removed(character, category):
            characters.append(character)
    line = " ".join("".join(characters).split())
    return "" if JOINERS.issuperset(line.replace(" ", "")) else line


def _is_removed(character: str, category: str) -> bool:
    """Whether a character is a format character, a surrogate, a replacement, or a code point that is no character."""
    code = ord(character)
    is_noncharacter = 0xFDD0 <= code <= 0xFDEF or code & 0xFFFE == 0xFFFE
    return category in REMOVED_CATEGORIES or character == REPLACEMENT or is_noncharacter


def join_texts(texts: Iterable[str]) -> str:
    """The caption of several texts, tidied and without empty ones; "" for none."""
    return SEPARATOR.join(line for line in map(tidy, texts) if line)


def split_texts(caption: str) -> list[str]:
    """The texts of a caption; [] for "" and for blanks."""
    return [text for text in caption.split(SEPARATOR) if text.strip()]


def empty_caption() -> SampleError:
    """Return the error for an empty caption."""
    return SampleError("empty_caption", "the captioner wrote no text about it")
