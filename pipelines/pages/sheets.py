"""Contact sheets: one picture of many small pictures with captions."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image as Pillow
from PIL import ImageDraw, ImageFont

from components.images import center_crop, resize_short_side
from components.types import Image

GAP_PX, LINE_PX = 8, 15
PAPER, INK = (250, 250, 250), (30, 30, 30)
JPEG_QUALITY = 92


def contact_sheet(cells: Sequence[tuple[Sequence[Image], str]], side_px: int = 192, columns: int = 0) -> bytes:
    """Lay out groups of pictures side by side, a caption below each group.

    Args:
        cells: (pictures of one group, its caption, which may have several lines). Pictures are uint8 [H, W, 3]; the
            sheet shows their middle squares.
        side_px: side of each square.
        columns: groups in a row; 0 makes the sheet about as wide as it is high.

    Returns:
        A JPEG.

    Raises:
        ValueError: no cells.
    """
    if not cells:
        raise ValueError("a contact sheet needs at least one picture")
    most = max(len(pictures) for pictures, _ in cells)
    lines = max(caption.count("\n") + 1 for _, caption in cells)
    width, height = most * side_px + GAP_PX, side_px + lines * LINE_PX + GAP_PX
    columns = columns or max(1, round((len(cells) * height / width) ** 0.5))
    columns = min(columns, len(cells))
    rows = -(-len(cells) // columns)
    sheet = Pillow.new("RGB", (columns * width + GAP_PX, rows * height + GAP_PX), PAPER)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=11)
    for number, (pictures, caption) in enumerate(cells):
        x = GAP_PX + number % columns * width
        y = GAP_PX + number // columns * height
        for place, picture in enumerate(pictures):
            sheet.paste(Pillow.fromarray(middle_tile(picture, side_px)), (x + place * side_px, y))
        pen.multiline_text((x, y + side_px + 1), caption, fill=INK, font=font, spacing=2)
    data = io.BytesIO()
    sheet.save(data, format="JPEG", quality=JPEG_QUALITY)
    return data.getvalue()


def middle_tile(picture: Image, side_px: int) -> Image:
    """The middle square of uint8 [H, W, 3]; at native size, or enlarged if the picture is too small."""
    if min(picture.shape[:2]) < side_px:
        picture = resize_short_side(picture, side_px)
    return np.ascontiguousarray(center_crop(picture, side_px, side_px))
