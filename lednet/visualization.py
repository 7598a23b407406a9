"""Visualizations of label maps: class colours, overlays and the legend."""

import base64
import io
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from lednet.data.labels import LabelScheme, camvid_scheme, cityscapes_scheme, generate_color
from lednet.errors import UserError
from lednet.fonts import drawable, pil_font
from lednet.io import write_atomically

VISUALIZATIONS = ("color", "overlay", "side")
"""Class colours, the image tinted with them, and the image and the class colours side by side."""

_FONT_SIZE = 15
"""Font size of the legend whose other measures are in the code; they are scaled with it."""
_BAND = 32
"""Rows that are blended at a time, so that their values stay in a processor's cache."""
_JPEG = {"quality": 90, "subsampling": 0}
"""With colours at full resolution, because they tell classes apart."""
_JPEG_SIDE = 65_500
"""Largest width and height that libjpeg writes."""


class ImageTooLarge(UserError):
    """An image has more pixels a side than the format of its file."""


def require_jpeg_size(path: str | os.PathLike, width: int, height: int) -> None:
    """Raise `ImageTooLarge` if the file at `path` would be a JPEG of too many pixels a side."""
    if Path(path).suffix.lower() in (".jpg", ".jpeg") and max(width, height) > _JPEG_SIDE:
        raise ImageTooLarge(
            f"cannot write {path}: it would be {width}x{height}, and a JPEG has at most "
            f"{_JPEG_SIDE:,} pixels a side; write PNG"
        )


def output_scheme(meta: dict[str, Any], num_outputs: int, source: str | os.PathLike) -> LabelScheme:
    """Names and colours of a network's outputs.

    Args:
        meta: metadata from `load_model`. Without classes in it, 20 outputs are those of
            Cityscapes, 12 those of CamVid, and others get the names "class 0" and so on.
        num_outputs: number of outputs of the network, void included.
        source: path of the weights, for the message.

    Raises:
        UserError: the metadata names another number of classes.
    """
    if "classes" not in meta:
        for scheme in (cityscapes_scheme(), camvid_scheme()):
            if scheme.num_outputs == num_outputs:
                return scheme
        indices = range(num_outputs - 1)
        names = tuple(f"class {i}" for i in indices)
        ids = {i: i for i in indices}
        return LabelScheme("unnamed", names, tuple(map(generate_color, indices)), ids)
    classes, colors = tuple(meta["classes"]), tuple(map(tuple, meta.get("colors", ())))
    if not len(classes) == len(colors) == num_outputs - 1:
        raise UserError(
            f"{source} has {num_outputs} outputs, but {len(classes)} classes and {len(colors)} "
            "colours without void: give weights as training wrote them"
        )
    name = str(meta.get("dataset", source))
    return LabelScheme(name, classes, colors, {i: i for i in range(len(classes))})


def colorize(label: np.ndarray, scheme: LabelScheme) -> np.ndarray:
    """Class indices (H, W) to RGB (H, W, 3) uint8; void is black."""
    return scheme.palette.take(label, axis=0)


def overlay(image: np.ndarray, label: np.ndarray, scheme: LabelScheme, alpha: float) -> np.ndarray:
    """Tint an image with the colours of its classes; void keeps the image's own.

    Args:
        image: (H, W, 3) uint8 RGB.
        label: (H, W) class indices; those past the classes are void.
        alpha: opacity of the class colours, 0 to 1, in steps of 1/256.

    Returns:
        (H, W, 3) uint8, rounded to the nearest.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be 0 to 1, not {alpha}")
    share = round(256 * alpha)
    color = scheme.palette * np.uint16(share) + np.uint16(128)  # 128/256 rounds
    tinted = np.empty_like(image)
    for top in range(0, len(image), _BAND):
        rows = slice(top, top + _BAND)
        sums = image[rows] * np.uint16(256 - share)
        sums += color.take(label[rows], axis=0)
        np.right_shift(sums, 8, out=tinted[rows], casting="unsafe")
    void = label >= scheme.num_classes
    if void.any():
        tinted[void] = image[void]
    return tinted


def shrink(image: np.ndarray, *labels: np.ndarray, width: int) -> list[np.ndarray]:
    """An image (H, W, 3) and labels (H, W), uint8, reduced to `width` pixels if they are wider."""
    rows, columns = image.shape[:2]
    width = min(width, columns)
    size = (width, max(1, round(rows * width / columns)))
    small = Image.fromarray(image).resize(size, Image.Resampling.LANCZOS)
    return [np.asarray(small)] + [
        np.asarray(Image.fromarray(label).resize(size, Image.Resampling.NEAREST))
        for label in labels
    ]


def draw_legend(
    scheme: LabelScheme, width: int, font_size: float = _FONT_SIZE, void: bool = True
) -> Image.Image:
    """Every class with its colour, in columns, on white.

    Args:
        width: in pixels; the legend is wider if one name alone needs more.
        font_size: in pixels.
        void: whether void is one of the entries.
    """
    margin, gap, row, swatch_width, swatch_height, text_left = (
        round(length * font_size / _FONT_SIZE) for length in (8, 14, 24, 22, 15, 28)
    )
    entries = [*zip(map(drawable, scheme.classes), scheme.colors, strict=True)]
    if void:
        entries.append(("void", (0, 0, 0)))
    fonts = [pil_font(name, font_size) for name, _ in entries]
    lengths = [font.getlength(name) for font, (name, _) in zip(fonts, entries, strict=True)]
    needed = text_left + gap + round(max(lengths))
    rows = -(-len(entries) // max(1, (width - margin) // needed))
    columns = -(-len(entries) // rows)  # as few as these rows need, to spread them evenly
    width = max(width, margin + needed)
    legend = Image.new("RGB", (width, 2 * margin + (rows - 1) * row + swatch_height), "white")
    draw = ImageDraw.Draw(legend)
    for i, (name, color) in enumerate(entries):
        x = margin + (i % columns) * ((width - margin) // columns)
        y = margin + (i // columns) * row
        draw.rectangle((x, y, x + swatch_width, y + swatch_height), fill=color, outline="gray")
        draw.text((x + text_left, y + swatch_height / 2), name, "black", fonts[i], anchor="lm")
    return legend


class Visualizer:
    """Draws the label maps of one network. Threads may share it.

    Args:
        alpha: opacity of the class colours in an overlay, 0 to 1.
        legend: draw a legend below, its letters scaled with the width. It has all classes, so
            that all outputs for one network have the same layout; void, which overlays do not
            draw, is left out of theirs.
    """

    def __init__(self, scheme: LabelScheme, alpha: float = 0.5, legend: bool = True):
        self.scheme, self.alpha, self.legend = scheme, alpha, legend
        self._legend = lru_cache(maxsize=16)(
            lambda width, void: np.asarray(draw_legend(scheme, width, max(13, width / 72), void))
        )

    def draw(self, kind: str, image: np.ndarray, label: np.ndarray) -> np.ndarray:
        """Draw one of `VISUALIZATIONS`, RGB uint8.

        With a legend, an image that is narrower than a class name is padded with white.

        Args:
            image: (H, W, 3) uint8 RGB.
            label: (H, W) uint8 class indices.
        """
        if kind == "overlay":
            drawn = overlay(image, label, self.scheme, self.alpha)
        else:
            drawn = colorize(label, self.scheme)
        if kind == "side":
            drawn = np.concatenate((image, drawn), axis=1)
        if not self.legend:
            return drawn
        height, width = drawn.shape[:2]
        legend = self._legend(width, kind != "overlay")
        whole = np.full((height + len(legend), legend.shape[1], 3), 255, np.uint8)
        whole[:height, :width] = drawn
        whole[height:] = legend
        return whole


def write_picture(path: str | os.PathLike, pixels: np.ndarray) -> None:
    """Write RGB pixels (H, W, 3) uint8 to a PNG or JPEG file, by its suffix, atomically.

    Raises:
        ImageTooLarge: see `require_jpeg_size`.
    """
    require_jpeg_size(path, pixels.shape[1], pixels.shape[0])
    with write_atomically(path) as temporary:
        image = Image.fromarray(pixels)
        if temporary.suffix.lower() == ".png":
            image.save(temporary, format="PNG", compress_level=1)
        else:
            image.save(temporary, format="JPEG", **_JPEG)


def data_uri(image: Image.Image, format: str = "JPEG", **options: Any) -> str:
    """An image as a data URI, with the options of PIL for this format."""
    buffer = io.BytesIO()
    image.save(buffer, format, **(options or (_JPEG if format == "JPEG" else {})))
    encoded = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f"data:image/{format.lower()};base64,{encoded}"
