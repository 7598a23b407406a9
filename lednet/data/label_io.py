"""Reading label maps: the ids as the file stores them, at any bit depth."""

import os
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from lednet.data.image_io import open_header, open_image
from lednet.errors import UserError

_SCALED = {"L;2": 85, "L;2I": 85, "L;4": 17, "L;4I": 17}
"""Factor by which Pillow scales the values of a greyscale image with fewer than 8 bits."""


def read_ids(source: str | os.PathLike | BinaryIO) -> np.ndarray:
    """Decode a label map to its ids, (H, W) uint8.

    Greyscale values are ids at every bit depth (1, 2, 4, 8, or 16 with values below 256). Palette
    images store ids as palette indices. An alpha channel must be fully opaque.

    Raises:
        UserError: the file is missing or damaged, or its mode or values cannot be ids.
    """
    name = os.fspath(source) if isinstance(source, str | os.PathLike) else "the label map"
    scale = _SCALED.get(_raw_mode(source), 1)
    image = open_image(source)
    ids = np.asarray(image)
    if image.mode in ("LA", "PA"):
        if (ids[..., 1] != 255).any():
            raise UserError(
                f"{name} has transparent pixels ({image.mode}), which are not ids: save it without "
                "an alpha channel"
            )
        ids = ids[..., 0]
    elif image.mode.startswith("I"):
        if ids.min() < 0 or ids.max() > 255:
            raise UserError(
                f"{name} is a {'16' if image.mode != 'I' else '32'}-bit label map with the value "
                f"{ids.max() if ids.max() > 255 else ids.min()}: label ids are 0 to 255; convert "
                "it to 8-bit ids"
            )
    elif image.mode not in ("1", "L", "P"):
        raise UserError(
            f"{name} has mode {image.mode} ({_MODES.get(image.mode, 'color')}), not one id per "
            "pixel: convert it to an 8-bit greyscale PNG of class ids"
        )
    ids = ids.astype(np.uint8)
    return ids // scale if scale > 1 else ids


_MODES = {"RGB": "color", "RGBA": "color with alpha", "F": "floating point"}


def _raw_mode(source: str | os.PathLike | BinaryIO) -> str:
    """How the file stores its pixels, for example "L;4"; "" if that cannot be found out."""
    try:
        with Image.open(source) if isinstance(source, str | Path) else open_header(source) as image:
            tile = image.tile[0]
    except Exception:  # `open_image` reports what is wrong
        return ""
    finally:
        if not isinstance(source, str | os.PathLike):
            source.seek(0)
    raw = tile[3]
    return raw if isinstance(raw, str) else str(raw[0]) if raw else ""
