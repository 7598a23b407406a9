"""Image files of any origin: which formats are opened, and how large an image may be."""

import os
import warnings
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from lednet.errors import UserError

FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "TIFF")
"""What is opened, by content and never by suffix: another of Pillow's readers starts Ghostscript,
and each is more code that strange bytes reach."""

LIMIT = "LEDNET_MAX_PIXELS"
"""Environment variable: pixels above which no image is decoded."""
DEFAULT_LIMIT = 100_000_000

# Pillow warns above its own limit, and what is above the one here is refused.
warnings.filterwarnings("ignore", "Image size .* exceeds limit", Image.DecompressionBombWarning)


def max_pixels() -> int:
    """Pixels that an image may have.

    Raises:
        UserError: the environment variable is no number.
    """
    told = os.environ.get(LIMIT, str(DEFAULT_LIMIT))
    if not (told.isdecimal() and told.isascii() and len(told) < 19 and int(told)):
        raise UserError(f"{LIMIT} is {told!r}: give a number of pixels")
    return int(told)


def open_header(path: str | os.PathLike) -> Image.Image:
    """Open an image file without decoding it.

    Raises:
        UserError: the image has more than `max_pixels()`.
        Exception: of many kinds, if the bytes are damaged or of another format.
    """
    limit = max_pixels()
    if Image.MAX_IMAGE_PIXELS is not None:  # Pillow refuses what has twice as many
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, limit)
    sentence = f"{path} is too large (more than {limit:,} pixels): shrink it, or set {LIMIT} higher"
    try:
        image = Image.open(path, formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise UserError(sentence) from error
    if image.width * image.height > limit:
        image.close()
        raise UserError(sentence)
    return image


def open_image(path: Path) -> Image.Image:
    """Open and decode an image file.

    Raises:
        UserError: missing, damaged, of none of `FORMATS`, or of more than `max_pixels()`.
    """
    try:
        image = open_header(path)
        image.load()
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"no file {path}: it was there when the run began; restore it") from error
    except UnidentifiedImageError as error:
        raise UserError(
            f"{path} is damaged (or no {', '.join(FORMATS)} image): copy it again"
        ) from error
    except Exception as error:  # parsers of many kinds, on bytes of any kind
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path} is damaged ({reason}): copy it again") from error
    return image
