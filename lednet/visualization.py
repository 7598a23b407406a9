"""Label maps as pictures: class colours, overlays, the legend that explains them."""

import base64
import io
import os
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lednet.data.labels import LabelScheme, camvid_scheme, cityscapes_scheme
from lednet.errors import UserError
from lednet.io import write_atomically

_FONT_SIZE = 15
"""Of the legend; its other measures are given for this size and grow with it."""
_BAND = 32
"""Rows that are mixed at a time."""
_JPEG = {"quality": 90, "subsampling": 0}
"""At full resolution of colour, which is what tells classes apart."""


def output_scheme(meta: dict[str, Any], num_outputs: int, source: str | os.PathLike) -> LabelScheme:
    """Names and colours of a network's outputs.

    Args:
        meta: as `lednet.model.load_model` returned it. Without classes in it, 20
            outputs are those of Cityscapes and 12 those of CamVid.
        num_outputs: of the network, void included.
        source: of the weights, for the message.

    Raises:
        UserError: the outputs' meaning is not known.
    """
    if "classes" not in meta:
        for scheme in (cityscapes_scheme(), camvid_scheme()):
            if scheme.num_outputs == num_outputs:
                return scheme
        raise UserError(
            f"{source} does not name its classes, and {num_outputs} outputs are neither Cityscapes "
            "(20) nor CamVid (12): give weights that this project trained"
        )
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
        alpha: share of the class's colour, 0 to 1, in steps of 1/256.

    Returns:
        (H, W, 3) uint8, rounded to the nearest.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be 0 to 1, not {alpha}")
    share = round(256 * alpha)
    color = scheme.palette * np.uint16(share) + np.uint16(128)  # and the half that rounds
    tinted = np.empty_like(image)
    for top in range(0, len(image), _BAND):  # whose values stay in a processor's cache
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
        width: in pixels; the legend is wider where one name alone needs more.
        font_size: in pixels.
        void: whether void is among the entries.
    """
    font = ImageFont.load_default(font_size)
    scale = font_size / _FONT_SIZE
    margin, gap, row = round(8 * scale), round(14 * scale), round(24 * scale)
    swatch, text_left = (round(22 * scale), round(15 * scale)), round(28 * scale)
    entries = [*zip(scheme.classes, scheme.colors, strict=True)]
    if void:
        entries.append(("void", (0, 0, 0)))
    needed = text_left + gap + round(max(font.getlength(name) for name, _ in entries))
    columns = max(1, (width - margin) // needed)
    rows = -(-len(entries) // columns)
    columns = -(-len(entries) // rows)  # as few as these rows need, to spread them evenly
    width = max(width, margin + needed)
    legend = Image.new("RGB", (width, 2 * margin + (rows - 1) * row + swatch[1]), "white")
    draw = ImageDraw.Draw(legend)
    for i, (name, color) in enumerate(entries):
        x = margin + (i % columns) * ((width - margin) // columns)
        y = margin + (i // columns) * row
        draw.rectangle((x, y, x + swatch[0], y + swatch[1]), fill=color, outline="gray")
        draw.text((x + text_left, y + swatch[1] / 2), name, "black", font, anchor="lm")
    return legend


def _legend_for(width: int, scheme: LabelScheme, void: bool) -> np.ndarray:
    return np.asarray(draw_legend(scheme, width, max(13, width / 72), void))


def _stack(upper: np.ndarray, lower: np.ndarray) -> np.ndarray:
    """One picture above another, which is at least as wide."""
    height, width = upper.shape[:2]
    picture = np.full((height + len(lower), lower.shape[1], 3), 255, np.uint8)
    picture[:height, :width] = upper
    picture[height:] = lower
    return picture


VISUALIZATIONS = ("color", "overlay", "side")
"""Kinds of pictures: class colours, those on the image, those beside it."""


class Visualizer:
    """Draws the label maps of one network. Threads may share it.

    Args:
        alpha: share of the class's colour in an overlay, 0 to 1.
        legend: whether it stands below, its letters as large as the picture's width asks for. It
            shows all classes, so that the pictures of one network keep one layout; an overlay's
            leaves void out, which is not drawn.
    """

    def __init__(self, scheme: LabelScheme, alpha: float = 0.5, legend: bool = True):
        self.scheme, self.alpha, self.legend = scheme, alpha, legend
        self._legends: dict[tuple[int, bool], np.ndarray] = {}

    def draw(self, kind: str, image: np.ndarray, label: np.ndarray) -> np.ndarray:
        """Draw one of `VISUALIZATIONS`, RGB uint8.

        With a legend, an image that is narrower than a class name is padded with white.

        Args:
            image: (H, W, 3) uint8 RGB.
            label: (H, W) uint8 class indices.
        """
        if kind == "overlay":
            picture = overlay(image, label, self.scheme, self.alpha)
        else:
            picture = colorize(label, self.scheme)
        if kind == "side":
            picture = np.concatenate((image, picture), axis=1)
        if not self.legend:
            return picture
        key = picture.shape[1], kind != "overlay"
        if key not in self._legends:
            self._legends[key] = _legend_for(key[0], self.scheme, key[1])
        return _stack(picture, self._legends[key])


def write_picture(path: str | os.PathLike, pixels: np.ndarray) -> None:
    """Write RGB pixels, (H, W, 3) uint8, to a PNG or a JPEG, as the suffix says, atomically."""
    with write_atomically(path) as temporary:
        image = Image.fromarray(pixels)
        if temporary.suffix == ".png":
            image.save(temporary, format="PNG", compress_level=1)
        else:
            image.save(temporary, format="JPEG", **_JPEG)


def data_uri(picture: Image.Image, format: str = "JPEG", **options: Any) -> str:
    """A picture as text for a page.

    Args:
        format: of PIL.
        options: of PIL for this format.
    """
    buffer = io.BytesIO()
    picture.save(buffer, format, **(options or (_JPEG if format == "JPEG" else {})))
    encoded = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f"data:image/{format.lower()};base64,{encoded}"
