"""Cityscapes' polygons, and the label images that they draw.

The authority is `json2labelImg` of the official package `cityscapesscripts`: the images are its,
pixel for pixel.
"""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from lednet.data.cityscapes import ground_truth
from lednet.data.labels import CITYSCAPES_LABELS
from lednet.errors import UserError
from lednet.io import max_pixels, write_atomically

ENDING = "_polygons.json"
MAX_BYTES = 16 * 2**20
"""Of a file; the largest published one has under 1 MB."""
FARTHEST = 10**6
"""Largest coordinate. Points may lie outside of the image, the published ones by a few pixels."""

_NAMES = {label.name for label in CITYSCAPES_LABELS}

Point = tuple[float, float]


class Annotation(NamedTuple):
    """What a file of polygons says.

    Attributes:
        size: (height, width) of the image in pixels.
        objects: name of the label and corners (x, y), what is drawn later lying on top. Deleted
            ones are left out.
    """

    size: tuple[int, int]
    objects: list[tuple[str, list[Point]]]


class _Malformed(Exception):
    """What is wrong in a file."""


def read_polygons(path: str | os.PathLike) -> Annotation:
    """Read a `*_polygons.json`.

    Raises:
        UserError: no such file, or not in the published form: names what is wrong.
    """
    path = Path(path)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise _Malformed(f"more than {MAX_BYTES} bytes")
        content = json.loads(path.read_text(encoding="utf-8"))
        return _annotation(content)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}; check the path") from error
    except RecursionError as error:
        raise UserError(f"{path} is no annotation (nested too deep): unpack it again") from error
    except (ValueError, _Malformed) as error:  # ValueError: no UTF-8, no JSON, endless digits
        raise UserError(f"{path} is no annotation ({error}): unpack it again") from error


def _annotation(content: Any) -> Annotation:
    height, width = (_field(content, key, int) for key in ("imgHeight", "imgWidth"))
    if min(height, width) < 1 or height * width > max_pixels():
        raise _Malformed(f"an image of no pixels, or of more than {max_pixels():,}")
    objects = []
    for number, row in enumerate(_field(content, "objects", list)):
        try:
            name, corners = _field(row, "label", str), _field(row, "polygon", list)
            if row.get("deleted"):
                continue
            if len(corners) < 2:
                raise _Malformed("a polygon of fewer than two corners")
            objects.append((_label_name(name), [_point(corner) for corner in corners]))
        except _Malformed as error:
            raise _Malformed(f"object {number}: {error}") from error
    return Annotation((height, width), objects)


def _field(content: Any, key: str, kind: type) -> Any:
    value = content.get(key) if isinstance(content, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        raise _Malformed(f"no {key} that is {kind.__name__}")
    return value


def _label_name(name: str) -> str:
    """As in the label table, which does not have all groups (cargroup) of its labels."""
    single = name if name in _NAMES else name.removesuffix("group")
    if single not in _NAMES:
        raise _Malformed(f"the label {name[:40]!r} is none of Cityscapes'")
    return single


def _point(corner: Any) -> Point:
    if not isinstance(corner, list) or len(corner) != 2:
        raise _Malformed("a corner is not [x, y]")
    for value in corner:
        if type(value) not in (int, float) or not abs(value) <= FARTHEST:  # nor NaN
            raise _Malformed(f"a corner is not of numbers up to {FARTHEST}")
    return corner[0], corner[1]


def draw_labels(annotation: Annotation, encoding: str = "labelIds") -> np.ndarray:
    """The label image of polygons, (H, W) uint8.

    Args:
        encoding: "labelIds" (0..33) or "labelTrainIds" (0..18, void 255).
    """
    values = {
        label.name: label.id if encoding == "labelIds" else label.train_id
        for label in CITYSCAPES_LABELS
        if label.id >= 0  # a license plate is left to what it is on
    }
    height, width = annotation.size
    image = Image.new("L", (width, height), values["unlabeled"])
    draw = ImageDraw.Draw(image)
    for name, corners in annotation.objects:
        if name in values:
            draw.polygon(corners, fill=values[name])
    return np.array(image)


def write_missing_labels(root: Path, encoding: str = "labelIds") -> tuple[int, list[str]]:
    """Draw the label images that are not beside their polygons in a Cityscapes tree.

    Shows a progress bar. Files that cannot be read stop nothing.

    Returns:
        How many were written, and a sentence for each file that could not be read.

    Raises:
        UserError: the disk is full.
    """
    folders = [root / ground_truth(annotations) for annotations in ("fine", "coarse")]
    targets = {
        path: path.with_name(f"{path.name.removesuffix(ENDING)}_{encoding}.png")
        for folder in folders
        for path in sorted(folder.glob(f"*/*/*{ENDING}"))
    }
    missing = {path: target for path, target in targets.items() if not target.exists()}
    problems = []
    for path, target in tqdm(missing.items(), encoding, unit="label", dynamic_ncols=True):
        try:
            label = draw_labels(read_polygons(path), encoding)
        except UserError as error:
            problems.append(str(error))
            continue
        with write_atomically(target, durable=False) as temporary:
            Image.fromarray(label).save(temporary, format="PNG")
    return len(missing) - len(problems), problems
