"""Polygons of Cityscapes annotations, and the label images drawn from them.

The images equal those of `json2labelImg` of the official package `cityscapesscripts`, pixel for
pixel.
"""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from lednet.data.labels import CITYSCAPES_LABELS
from lednet.errors import UserError
from lednet.files import match_files
from lednet.io import max_pixels, write_atomically
from lednet.progress import progress_bar

ENDING = "_polygons.json"
MAX_BYTES = 16 * 2**20
"""Limit of a file's size; the largest published file has less than 1 MB."""
MAX_COORDINATE = 10**6
"""Limit of coordinates, which may lie outside the image, by a few pixels in published files."""

_NAMES = {label.name for label in CITYSCAPES_LABELS}

Point = tuple[float, float]


class Annotation(NamedTuple):
    """The (height, width) of an image in pixels, and label names and corners (x, y) of objects.

    Objects are in drawing order, without deleted ones.
    """

    size: tuple[int, int]
    objects: list[tuple[str, list[Point]]]


def read_polygons(path: str | os.PathLike) -> Annotation:
    """Read a `*_polygons.json`; a `UserError` names the error if it has another format."""
    path = Path(path)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"it has more than {MAX_BYTES:,} bytes")
        return _parse_annotation(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}; check the path") from error
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise UserError(
            f"{path} is not a Cityscapes annotation ({reason}): unpack it again"
        ) from error


def _parse_annotation(content: Any) -> Annotation:
    """Convert parsed JSON. Content in another format raises any of several errors."""
    height, width = size = content["imgHeight"], content["imgWidth"]
    if type(height) is not int or type(width) is not int or min(size) < 1:
        raise ValueError("imgHeight and imgWidth must be positive integers")
    if height * width > max_pixels():
        raise ValueError(f"the image has more than {max_pixels():,} pixels")
    if not isinstance(content["objects"], list):
        raise TypeError("objects must be a list")
    rows = [row for row in content["objects"] if not row.get("deleted")]
    return Annotation(size, [(_label_name(r["label"]), _corners(r["polygon"])) for r in rows])


def _label_name(name: str) -> str:
    """The name in the label table, which lacks the group names (cargroup) of some labels."""
    single = name if name in _NAMES else name.removesuffix("group")
    if single not in _NAMES:
        raise ValueError(f"{name[:40]!r} is not a Cityscapes label")
    return single


def _corners(polygon: list[list[float]]) -> list[Point]:
    corners = [(x, y) for x, y in polygon]
    if len(corners) < 2:
        raise ValueError("a polygon has fewer than two corners")
    if not all(abs(value) <= MAX_COORDINATE for corner in corners for value in corner):  # nor NaN
        raise ValueError(f"a coordinate is not a number up to {MAX_COORDINATE:,}")
    return [(float(x), float(y)) for x, y in corners]


def draw_labels(annotation: Annotation, encoding: str = "labelIds") -> np.ndarray:
    """Draw the label image of an annotation, (H, W) uint8.

    Args:
        encoding: "labelIds" (0..33) or "labelTrainIds" (0..18, void 255).
    """
    values = {
        label.name: label.id if encoding == "labelIds" else label.train_id
        for label in CITYSCAPES_LABELS
        if label.id >= 0  # license plates keep the label of what they are on
    }
    height, width = annotation.size
    image = Image.new("L", (width, height), values["unlabeled"])
    draw = ImageDraw.Draw(image)
    for name, corners in annotation.objects:
        if name in values:
            draw.polygon(corners, fill=values[name])
    return np.array(image)


def write_missing_labels(root: Path, encoding: str = "labelIds") -> tuple[int, list[str]]:
    """Draw the label images that are missing next to the polygon files of a Cityscapes tree.

    Shows a progress bar, and skips files that cannot be read. Raises a `UserError` if the disk is
    full.

    Returns:
        How many images were written, and a sentence for each file that could not be read.
    """
    folders = [folder for kind in ("gtFine", "gtCoarse") if (folder := root / kind).is_dir()]
    paths = [path for folder in folders for path in match_files(folder, f"*/*/*{ENDING}")]
    targets = [path.with_name(path.name.replace(ENDING, f"_{encoding}.png")) for path in paths]
    missing = [pair for pair in zip(paths, targets, strict=True) if not pair[1].exists()]
    problems = []
    for path, target in progress_bar(missing, desc=encoding, unit="label"):
        try:
            label = draw_labels(read_polygons(path), encoding)
        except UserError as error:
            problems.append(str(error))
            continue
        with write_atomically(target, durable=False) as temporary:
            Image.fromarray(label).save(temporary, format="PNG")
    return len(missing) - len(problems), problems
