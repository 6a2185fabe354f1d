"""Masks, boxes and labels drawn over an image.

torchvision.utils draws neither outlines of masks nor labels that stay inside the image.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import binary_erosion

from mfdetr_cache.ops.masks import (
    RunLengths,
    box_of_run_lengths,
    crop_run_lengths,
    decode_run_lengths,
)

# Okabe and Ito's palette for colour-blind readers, without black, and lighter tints of it.
PALETTE = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (0, 114, 178),
    (213, 94, 0),
    (204, 121, 167),
    (148, 203, 120),
    (180, 160, 255),
    (255, 140, 140),
)
_FILL = 0.45
# From improbable to certain: matplotlib's inferno at five places. The image lies dimmed under it.
_HEAT = ((0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164))
_DIMMED = 0.7
# About the longer side of a panel beside others, in pixels; labels of 13 pixels leave room on it.
PANEL_SIDE = 400


@dataclass(frozen=True, slots=True)
class OverlayItem:
    """One object to draw.

    Attributes:
        text: Label shown at the box; empty for none.
        box_xyxy: In pixels of the image; None draws no box.
        run_lengths: Its mask on the image; None draws no mask.
        colour: Palette index, modulo the palette's length; None uses the item's position.
    """

    text: str
    box_xyxy: Sequence[float] | None
    run_lengths: RunLengths | None
    colour: int | None = None


def draw_overlay(
    image: Image.Image, items: Sequence[OverlayItem], least_side: int = 0
) -> Image.Image:
    """A copy of an RGB image with masks, outlines, boxes and labels on it, the last item on top.

    Memory is that of the image and of one object's box at a time. An image whose longer side is
    smaller than ``least_side`` is first enlarged by the whole number that brings it nearest to
    this, so that labels do not hide it.
    """
    scale = max(1, round(least_side / max(image.size)))
    size_hw = (image.height, image.width)
    if scale > 1:
        image = image.resize((image.width * scale, image.height * scale), Image.Resampling.BICUBIC)
    pixels = np.array(image.convert("RGB"))
    line = max(1, round(max(image.size) / 400))
    for index, item in enumerate(items):
        if item.run_lengths is not None:
            _draw_mask(pixels, item.run_lengths, size_hw, _colour(item, index), line, scale)
    drawn = Image.fromarray(pixels)
    draw = ImageDraw.Draw(drawn)
    font = ImageFont.load_default(size=max(13, round(max(image.size) / 42)))
    for index, item in enumerate(items):
        if item.box_xyxy is not None:
            box = [scale * v for v in item.box_xyxy]
            _draw_box(draw, box, item.text, _colour(item, index), font, image.size)
    return drawn


def draw_probabilities(image: Image.Image, probabilities: NDArray[np.uint8]) -> Image.Image:
    """A gray copy of an image under a heat map, from clear over violet and orange to yellow.

    ``probabilities`` are 255 for certain, shape (height, width).
    """
    gray = np.array(image.convert("L"), dtype=np.float32)[..., None] * _DIMMED
    steps = np.linspace(0, 255, len(_HEAT))
    heat = np.array([np.interp(np.arange(256), steps, c) for c in np.transpose(_HEAT)])
    shown = np.sqrt(probabilities[..., None] / np.float32(255))
    mixed = gray * (1 - shown) + heat.T.astype(np.float32)[probabilities] * shown
    return Image.fromarray(mixed.astype(np.uint8))


def _colour(item: OverlayItem, index: int) -> tuple[int, int, int]:
    return PALETTE[(index if item.colour is None else item.colour) % len(PALETTE)]


def _draw_mask(
    pixels: NDArray[np.uint8],
    run_lengths: RunLengths,
    size_hw: tuple[int, int],
    colour: tuple[int, int, int],
    line: int,
    scale: int,
) -> None:
    box = box_of_run_lengths(run_lengths, size_hw)
    if box is None:
        return
    x0, y0, x1, y1 = box
    runs = crop_run_lengths(run_lengths, size_hw, box)
    inside = decode_run_lengths(runs, (y1 - y0, x1 - x0))
    if scale > 1:
        inside = inside.repeat(scale, axis=0).repeat(scale, axis=1)
    region = pixels[scale * y0 : scale * y1, scale * x0 : scale * x1]
    # There is nothing of the mask outside its box, so the box's border is an outline too.
    outline = inside & ~binary_erosion(inside, iterations=line)
    for channel, value in enumerate(colour):
        mixed = ((1 - _FILL) * np.arange(256) + _FILL * value).astype(np.uint8)
        values = region[..., channel]
        values[inside] = mixed[values[inside]]
        values[outline] = value


def _draw_box(
    draw: ImageDraw.ImageDraw,
    box_xyxy: Sequence[float],
    text: str,
    colour: tuple[int, int, int],
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    size_wh: tuple[int, int],
) -> None:
    x0, y0, x1, y1 = box_xyxy
    line = max(1, round(max(size_wh) / 320))
    draw.rectangle((x0, y0, max(x0, x1), max(y0, y1)), outline=colour, width=line)
    if not text:
        return
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    width, height = right - left + 4, bottom - top + 4
    # Above the box where there is room, else inside it; never off the image.
    x = min(max(x0, 0), size_wh[0] - width)
    y = y0 - height if y0 >= height else max(y0, 0)
    draw.rectangle((x, y, x + width, y + height), fill=colour)
    draw.text((x + 2 - left, y + 2 - top), text, fill=(0, 0, 0), font=font)


def side_by_side(panels: Sequence[tuple[str, Image.Image]], height: int = 360) -> Image.Image:
    """Titled images in a row on white, each scaled to ``height`` pixels."""
    title_height, gap = 26, 8
    scaled = [
        (title, image.resize((round(image.width * height / image.height), height)))
        for title, image in panels
    ]
    width = gap + sum(image.width + gap for _, image in scaled)
    sheet = Image.new("RGB", (width, height + title_height + gap), (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=15)
    x = gap
    for title, image in scaled:
        draw.text((x, 5), title, fill=(0, 0, 0), font=font)
        sheet.paste(image, (x, title_height))
        x += image.width + gap
    return sheet
