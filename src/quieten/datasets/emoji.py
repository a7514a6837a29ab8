"""Emoji: pictures from a font, and the groups that Unicode sorts them into."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .pictures import pixels

__all__ = ["FONT", "GROUPS", "draw_emoji", "emoji_groups"]

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
GROUPS = Path("/usr/share/unicode/emoji/emoji-test.txt")


def draw_emoji(size: int, font: str | Path = FONT) -> tuple[Tensor, tuple[str, ...]]:
    """Every code point that a font draws.

    Arguments:
        size: Height and width.
        font: NotoColorEmoji.ttf.

    Returns:
        Pictures, trimmed, on white: uint8 (N, 3, size, size), in the order of Unicode; and the N characters.

    Raises:
        ValueError: If the font is missing or draws none.
    """
    from PIL import Image, ImageDraw, ImageFont

    remedy = "install Debian's fonts-noto-color-emoji, or name NotoColorEmoji.ttf with `data`"
    try:  # 109 is the size of these bitmaps; basic layout: single code points need no shaping
        face = ImageFont.truetype(str(font), 109, layout_engine=ImageFont.Layout.BASIC)
    except OSError as error:
        raise ValueError(f"`font` {str(font)!r} cannot be read ({error}): {remedy}") from error
    blocks = (range(0x20, 0x3400), range(0x1F000, 0x20000), range(0xFE000, 0xFF000))  # where fonts keep emoji
    pictures, characters = [], []
    for character in (chr(code) for block in blocks for code in block):
        if face.getmask(character, mode="RGBA").getbbox() is None:
            continue  # no such glyph, or an invisible one
        canvas = Image.new("RGBA", (192, 192), (255, 255, 255, 0))
        ImageDraw.Draw(canvas).text((24, 24), character, font=face, embedded_color=True)
        pictures.append(pixels(canvas.crop(canvas.getbbox()), 3, size, "pad"))
        characters.append(character)
    if not pictures:
        raise ValueError(f"`font` {str(font)!r} draws no emoji: {remedy}")
    return torch.from_numpy(np.stack(pictures)), tuple(characters)


def emoji_groups(file: str | Path = GROUPS) -> dict[str, str]:
    """The group of every emoji that is a single code point, such as "Food & Drink".

    Arguments:
        file: Unicode's emoji-test.txt.

    Raises:
        ValueError: If it is missing, or is no such file.
    """
    remedy = "install Debian's unicode-data, or get emoji-test.txt from https://unicode.org/Public/emoji"
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read ({error}): {remedy}") from error
    groups, group = {}, ""
    for line in lines:
        if line.startswith("# group:"):
            group = line.removeprefix("# group:").strip()
        codes = line.partition(";")[0].split()
        if group and line[:1] not in ("#", "") and len([code for code in codes if code != "FE0F"]) == 1:
            groups[chr(int(codes[0], 16))] = group  # FE0F only asks for the picture instead of the letter
    if not groups:
        raise ValueError(f"{file} names no emoji: {remedy}")
    return groups
