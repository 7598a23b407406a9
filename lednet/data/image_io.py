"""Reading image files safely: permitted formats, size limit and conversion to RGB."""

import contextlib
import logging
import os
import warnings
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.Image import Transpose

from lednet.errors import UserError
from lednet.files import require_content
from lednet.io import LIMIT, max_pixels, write_atomically

logger = logging.getLogger(__name__)

FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "TIFF")
"""Permitted formats, detected by content, not suffix. Pillow's other readers are not exposed to
untrusted files; one of them starts Ghostscript."""

_TURNS = (Transpose.TRANSPOSE, Transpose.ROTATE_270, Transpose.TRANSVERSE, Transpose.ROTATE_90)
"""Operations that exchange width and height."""
_UPRIGHT = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}
"""Operation that makes an image upright, by its EXIF orientation."""

# Larger images than Pillow's limit are judged by ours. Invalid EXIF and palettes whose transparency
# is dropped do no harm. These filters are set once and for all, because Python forgets which
# warnings it has shown whenever a filter changes.
warnings.filterwarnings("ignore", "Image size .* exceeds limit", Image.DecompressionBombWarning)
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
        limit: largest number of pixels (default: `max_pixels()`).

    Raises:
        UserError: the image has more pixels.
        Exception: of many types, if the bytes are damaged or in another format.
    """
    most = max_pixels() if limit is None else limit
    next_step = "shrink it" + (f", or set {LIMIT} higher" if limit is None else "")
    if Image.MAX_IMAGE_PIXELS is not None:  # Pillow refuses images with twice as many
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, most)
    try:
        image = Image.open(source, formats=FORMATS)
        size = f"{image.width}x{image.height} pixels, and {most:,} are the limit"
        if image.width * image.height <= most:
            return image
        image.close()
    except Image.DecompressionBombError:
        size = f"far more than the {most:,} pixels that are the limit"
    raise UserError(f"{_name(source)} has {size}: {next_step}")


def _name(source: str | os.PathLike | BinaryIO) -> str:
    return os.fspath(source) if isinstance(source, str | os.PathLike) else "the image"


def open_image(source: str | os.PathLike | BinaryIO, limit: int | None = None) -> Image.Image:
    """Open and decode an image; `source` and `limit` as for `open_header`.

    Raises:
        UserError: missing, damaged, not one of `FORMATS`, or too large.
    """
    try:
        image = open_header(source, limit)
        image.info["raw_mode"] = _raw_mode(image)
        if (count := _count_images(image, source)) > 1:
            warn_once(
                "%s holds %d images, of which the first is used, here and in other such files: "
                "split it into a file for each image to use all", _name(source), count,
            )  # fmt: skip
        image.load()
        return image
    except (UserError, MemoryError):
        raise
    except IsADirectoryError as error:
        raise UserError(f"{_name(source)} is a folder, not an image: give a file") from error
    except FileNotFoundError as error:
        raise UserError(f"no file {_name(source)}: check the path") from error
    except OSError as error:
        if error.errno is not None:  # of the file system; decoders set none
            raise UserError(
                f"cannot read {_name(source)}: {error.strerror}; check the path"
            ) from error
        unknown = isinstance(error, UnidentifiedImageError)
        reason = f"or no {', '.join(FORMATS)} image" if unknown else _reason(error)
    except Exception as error:  # parsers raise errors of any type on damaged bytes
        reason = _reason(error)
    if isinstance(source, str | os.PathLike):
        require_content(source)
    raise UserError(f"{_name(source)} is damaged ({reason}): copy it again")


def warn_once(message: str, *values: object) -> None:
    """Log a warning, unless this process has logged the same `message` with any values."""
    if message not in _warned:
        _warned.add(message)
        logger.warning(message, *values)


_warned: set[str] = set()


def _count_images(image: Image.Image, source: str | os.PathLike | BinaryIO) -> int:
    """Images in a file: TIFF pages, or an animation; 1 if unknown.

    The second image of a JPEG is a preview.
    """
    if image.format != "TIFF":
        return 1 if image.format in ("JPEG", "MPO") else getattr(image, "n_frames", 1)
    if isinstance(source, str | os.PathLike):  # counting moves the position in an opened image
        with contextlib.suppress(Exception), Image.open(source, formats=["TIFF"]) as other:
            return getattr(other, "n_frames", 1)
    return 1


def _reason(error: Exception) -> str:
    """An error's message in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def _raw_mode(image: Image.Image) -> str:
    """How the file stores pixels, for example "L;4" for greyscale of 4 bits; "" if unknown."""
    tiles = getattr(image, "tile", ())
    arguments = tiles[0][3] if tiles else ""
    mode = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return mode if isinstance(mode, str) else ""


def read_ids(source: str | os.PathLike | BinaryIO) -> np.ndarray:
    """Decode a label map to its ids as the file stores them, (H, W) uint8.

    Greyscale values are ids at every bit depth (1, 2, 4, 8, or 16 with values below 256). Palette
    images store ids as palette indices. An alpha channel must be opaque everywhere.

    Raises:
        UserError: missing or damaged, or its mode or values cannot be ids.
    """
    image, name = open_image(source), _name(source)
    ids = np.asarray(image)
    if image.mode in ("LA", "PA"):
        if ids[..., 1].min() < 255:
            raise UserError(f"{name} has transparent pixels, which have no id: remove the alpha")
        ids = ids[..., 0]
    elif image.mode.startswith("I"):
        if ids.min() < 0 or ids.max() > 255:
            wrong = ids.max() if ids.max() > 255 else ids.min()
            bits = 32 if image.mode == "I" else 16
            raise UserError(
                f"{name} has {bits}-bit values ({wrong}), and ids are 0 to 255: convert it to "
                "8-bit ids"
            )
    elif image.mode not in ("1", "L", "P"):
        kind = "floating-point" if image.mode == "F" else "color"
        raise UserError(
            f"{name} is a {kind} image (mode {image.mode}), not 8-bit ids: give the greyscale or "
            "palette image of the class ids"
        )
    # Pillow scales greyscale values of fewer than 8 bits to 0..255.
    scale = {"L;2": 85, "L;4": 17}.get(image.info["raw_mode"], 1)
    return (ids // scale if scale > 1 else ids).astype(np.uint8)


def read_image(path: Path, upright: bool = False) -> np.ndarray:
    """Decode an image file to RGB, (H, W, 3) uint8; `upright` applies its EXIF orientation.

    Raises:
        UserError: missing, damaged, or not an image of at most 16 bits.
    """
    return to_rgb(open_image(path), upright)


def to_rgb(image: Image.Image | np.ndarray, upright: bool = True) -> np.ndarray:
    """Convert an image to RGB, (H, W, 3) uint8; transparency is dropped.

    Args:
        image: PIL image of any mode (16-bit grey is scaled to 8 bits), or uint8 array (H, W),
            (H, W, 1), (H, W, 3) RGB or (H, W, 4).
        upright: apply the EXIF orientation of a PIL image.

    Raises:
        UserError: an array of another type or shape, or an image with 32-bit values or a colour
            mode that PIL cannot convert.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or image.size == 0:
            raise UserError(
                f"an image is (H, W, 3) uint8 with at least one pixel, not {image.shape} "
                f"{image.dtype}: convert it first"
            )
        planes = np.atleast_3d(image)
        if planes.shape[2] not in (1, 3, 4):
            raise UserError(f"an image has 1, 3 or 4 channels last, not {image.shape}")
        return planes.repeat(3, axis=2) if planes.shape[2] == 1 else planes[..., :3]
    name = getattr(image, "filename", "") or "the image"
    try:
        image.load()
    except Exception as error:  # parsers raise errors of any type on damaged bytes
        raise UserError(
            f"{name} is damaged or was closed ({_reason(error)}): open it again, or copy it"
        ) from error
    if 0 in image.size:
        raise UserError(f"{name} has {image.width}x{image.height} pixels: give another image")
    if image.mode in ("I", "F"):
        raise UserError(f"{name} has 32-bit values ({image.mode}): save it with 8 or 16 bits")
    # ImageOps.exif_transpose would also rewrite the EXIF, and fail on other invalid entries.
    if upright and (operation := exif_transpose_op(image)) is not None:
        image = image.transpose(operation)
    if image.mode.startswith("I;16"):  # PIL's own conversion would clip it to white
        return to_rgb((np.array(image).astype(np.float32) / 257).round().astype(np.uint8))
    try:
        return np.array(image.convert("RGB"))
    except ValueError as error:
        raise UserError(f"{name} has the colour mode {image.mode}: save it as RGB") from error


def exif_transpose_op(image: Image.Image) -> Transpose | None:
    """The operation that makes the image upright according to its EXIF, or None."""
    try:
        return _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 0))
    except Exception:  # parsers raise errors of any type on damaged bytes
        return None


def transposed_size(size: tuple[int, int], operation: Transpose | None) -> tuple[int, int]:
    """Width and height of an image of `size` after `operation`."""
    return size[::-1] if operation in _TURNS else size


def match_orientation(
    operation: Transpose | None, size: tuple[int, int], label_size: tuple[int, int] | None
) -> tuple[Transpose | None, bool]:
    """Whether the EXIF orientation of an image applies to its label too.

    It does not if only the stored image has the label's size.

    Args:
        operation: see `exif_transpose_op`.
        size: width and height of the stored image.
        label_size: those of the label; None if there is none.

    Returns:
        `operation`, or None if the upright image does not have the size of the label; and whether
        both the upright and the stored image have it (square, or turned by 180 degrees).
    """
    if operation is None:
        return None, False
    upright = transposed_size(size, operation)
    return operation if label_size in (None, upright) else None, label_size == size == upright


def write_label_map(path: str | os.PathLike, ids: np.ndarray) -> None:
    """Write label ids, (H, W) uint8, to an 8-bit greyscale PNG, atomically."""
    if ids.ndim != 2 or ids.dtype != np.uint8:
        raise ValueError(f"ids must be (H, W) uint8, not {ids.shape} {ids.dtype}")
    with write_atomically(path) as temporary:
        # Run-length coding suits label maps: as fast as the lowest level, half the file size.
        image = Image.fromarray(ids)
        image.save(temporary, format="PNG", compress_level=1, compress_type=zlib.Z_RLE)
