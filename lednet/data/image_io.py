"""Image files of any origin: which are opened, how large they may be, and their RGB."""

import os
import warnings
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from lednet.errors import UserError
from lednet.io import LIMIT, max_pixels, write_atomically

FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "TIFF")
"""What is opened, by content and never by suffix: another of Pillow's readers starts Ghostscript,
and each is more code that strange bytes reach."""


ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What turns an image upright, by its EXIF orientation."""

# Pillow warns above its own limit, and what is above the one here is refused.
warnings.filterwarnings("ignore", "Image size .* exceeds limit", Image.DecompressionBombWarning)
# Of senseless EXIF, and of palettes whose transparency is dropped: such an image is used as it
# is. For good: a filter that comes and goes makes Python forget which warnings it has shown once.
warnings.filterwarnings(
    "ignore",
    "(possibly )?corrupt EXIF|truncated file read|metadata warning|tag data larger than file"
    "|palette images with transp",
    module=r"PIL\.",
)


def open_header(source: str | os.PathLike | BinaryIO, limit: int | None = None) -> Image.Image:
    """Open an image without decoding it.

    Args:
        source: a file, or its bytes as a stream.
        limit: pixels that it may have; `max_pixels()` if not given.

    Raises:
        UserError: the image has more pixels.
        Exception: of many kinds, if the bytes are damaged or of another format.
    """
    most = max_pixels() if limit is None else limit
    next_step = "shrink it" + (f", or set {LIMIT} higher" if limit is None else "")
    name = _name(source)
    if Image.MAX_IMAGE_PIXELS is not None:  # Pillow refuses what has twice as many
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, most)
    try:
        image = Image.open(source, formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise UserError(
            f"{name} has far more than the {most:,} pixels that are the limit: {next_step}"
        ) from error
    if image.width * image.height > most:
        size = f"{image.width}x{image.height}"
        image.close()
        raise UserError(f"{name} has {size} pixels, and {most:,} are the limit: {next_step}")
    return image


def _name(source: str | os.PathLike | BinaryIO) -> str:
    return os.fspath(source) if isinstance(source, str | os.PathLike) else "the image"


def open_image(source: str | os.PathLike | BinaryIO, limit: int | None = None) -> Image.Image:
    """Open and decode an image; `source` and `limit` as of `open_header`.

    Raises:
        UserError: missing, damaged, of none of `FORMATS`, or of too many pixels.
    """
    name = _name(source)
    try:
        image = open_header(source, limit)
        image.load()
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"no file {name}: it was there when the run began; restore it") from error
    except UnidentifiedImageError as error:
        raise UserError(
            f"{name} is damaged (or no {', '.join(FORMATS)} image): copy it again"
        ) from error
    except Exception as error:  # parsers of many kinds, on bytes of any kind
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{name} is damaged ({reason}): copy it again") from error
    return image


def read_image(path: Path) -> np.ndarray:
    """Decode an image file to RGB, (H, W, 3) uint8, as it lies on disk beside its label.

    Raises:
        UserError: missing, truncated, or no image of at most 16 bits.
    """
    return to_rgb(open_image(path), upright=False)


def to_rgb(image: Image.Image | np.ndarray, upright: bool = True) -> np.ndarray:
    """RGB, (H, W, 3) uint8, of an image in another form; transparency is dropped.

    Args:
        image: of any PIL mode; 16-bit grey is brought to 8 bits. Or uint8: (H, W),
            (H, W, 1), (H, W, 3) RGB or (H, W, 4).
        upright: turn a PIL image as its EXIF orientation says.

    Raises:
        UserError: an array of another kind, or an image of 32-bit values or a colour mode
            that PIL cannot convert.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or image.size == 0:
            raise UserError(
                f"an image is (H, W, 3) uint8, not {image.shape} {image.dtype}: convert it first"
            )
        planes = np.atleast_3d(image)
        if planes.shape[2] not in (1, 3, 4):
            raise UserError(f"an image has 1, 3 or 4 channels last, not {image.shape}")
        return planes.repeat(3, axis=2) if planes.shape[2] == 1 else planes[..., :3]
    name = getattr(image, "filename", "") or "the image"
    if image.mode in ("I", "F"):
        raise UserError(f"{name} has 32-bit values ({image.mode}): save it with 8 or 16 bits")
    if upright:
        image = _upright(image)
    if image.mode.startswith("I;16"):  # PIL's own conversion would clip it to white
        grey = np.array(image).astype(np.float32) / 257
        return to_rgb(grey.round().astype(np.uint8))
    try:
        return np.array(image.convert("RGB"))
    except ValueError as error:
        raise UserError(f"{name} has the colour mode {image.mode}: save it as RGB") from error


def exif_transpose_op(image: Image.Image) -> Image.Transpose | None:
    """What brings the image upright as its EXIF says, if that can be read and asks for it."""
    try:
        return ORIENTATIONS.get(image.getexif().get(ExifTags.Base.Orientation, 0))
    except Exception:  # a parser of many kinds, on bytes of any kind
        return None


def _upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF says.

    PIL's own function also writes the EXIF anew, and fails where another entry of it is odd.
    """
    turn = exif_transpose_op(image)
    return image if turn is None else image.transpose(turn)


def write_label_map(path: str | os.PathLike, ids: np.ndarray) -> None:
    """Write label ids, (H, W) uint8, to an 8-bit greyscale PNG, atomically."""
    if ids.ndim != 2 or ids.dtype != np.uint8:
        raise ValueError(f"ids must be (H, W) uint8, not {ids.shape} {ids.dtype}")
    with write_atomically(path) as temporary:
        # Label maps are runs of one value: coding just these is as fast as the lowest
        # ordinary level, and the file is half as large.
        image = Image.fromarray(ids)
        image.save(temporary, format="PNG", compress_level=1, compress_type=zlib.Z_RLE)
