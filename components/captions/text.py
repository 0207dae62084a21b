"""What a model wrote, as one line that is safe in logs, tables and prompts. Torch-free."""

from __future__ import annotations

import unicodedata

CAPTION = "{caption}"

DROPPED = frozenset({"Cc", "Cs", "Cf"})
"""Unicode categories: control characters, half surrogates, and format characters (some turn the writing direction)."""
JOINERS = frozenset("\u200c\u200d")  # format characters that Persian, Indic scripts and emoji need
REPLACEMENT = "\ufffd"  # what a tokenizer decodes half a character to, where the token limit cut it


def framed(frame: str, caption: str) -> str:
    """What a model is told of a picture: its recipe's frame with the caption in the place of {caption}; "": that."""
    return frame.replace(CAPTION, caption) if frame else caption


def tidy(text: str) -> str:
    """Runs of whitespace (line ends too, as in SUPIR's code) become one blank; unprintable characters go."""
    kept = (
        character
        for character in text
        if character.isspace()
        or character in JOINERS
        or (character != REPLACEMENT and unicodedata.category(character) not in DROPPED)
    )
    return " ".join("".join(kept).split())
