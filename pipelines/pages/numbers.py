"""Numbers as text for people."""

from __future__ import annotations

import math

KIB = 1024.0


def digits_text(value: float | None, digits: int = 3, sign: bool = False) -> str:
    """A number with so many significant digits; a dash for None and NaN."""
    if value is None or value != value:
        return "–"
    text = f"{value:+.{digits}g}" if sign else f"{value:.{digits}g}"
    return text.replace("-", "−")


def number_text(value: float, unit: str = "") -> str:
    """A number with four significant digits, without exponent below 1e9; bytes in binary multiples."""
    if unit == "bytes":
        return bytes_text(value)
    text = f"{value:,.0f}" if abs(value) >= 1000 and abs(value) < 1e9 else f"{value:.4g}"
    return text.replace("-", "−")


def bytes_text(value: float) -> str:
    """B, KiB, MiB, GiB or TiB, with three significant digits."""
    if abs(value) < KIB:
        return f"{value:.0f} B"
    power = min(4, int(math.log(abs(value), KIB) + 1e-9))
    multiple = value / KIB**power
    digits = f"{multiple:,.0f}" if multiple >= 100 else f"{multiple:.3g}"
    return f"{digits} {'KMGT'[power - 1]}iB"


def count_text(value: float) -> str:
    """A short count: 950, 1.2k, 35k, 4M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"
