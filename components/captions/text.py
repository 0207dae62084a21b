"""Model output as one line of text that is safe in logs, tables and prompts. Torch-free."""

from __future__ import annotations

import unicodedata

from components.types import SampleError

CAPTION = "{caption}"

CONTROL_CATEGORIES = frozenset({"Cc", "Cs", "Cf"})
"""Unicode categories: control characters, surrogates, and format characters (some change the writing direction)."""
JOINERS = frozenset("\u200c\u200d")  # format characters of Persian, Indic scripts and emoji
REPLACEMENT = "\ufffd"  # a tokenizer decodes a character to this if the token limit cuts it


def fill_frame(frame: str, caption: str) -> str:
    """Return a picture's prompt: the recipe's frame with the caption for {caption}; "": the caption alone."""
    return frame.replace(CAPTION, caption) if frame else caption


def tidy(text: str) -> str:
    """Replace whitespace, line breaks too (as in SUPIR's code), by one blank; remove unprintable characters."""
    characters = (
        character
        for character in text
        if character.isspace()
        or character in JOINERS
        or (character != REPLACEMENT and unicodedata.category(character) not in CONTROL_CATEGORIES)
    )
    return " ".join("".join(characters).split())


def empty_caption() -> SampleError:
    """Return the error for an empty caption."""
    return SampleError("empty_caption", "the captioner wrote no text about it")
