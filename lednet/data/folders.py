"""Data sets of an image folder, a label folder and a class file."""

import os
from pathlib import Path

from PIL import Image

from lednet.data.labels import IGNORE_INDEX, LabelScheme
from lednet.data.pairs import FileIndex, _by_name, _images_below, _refuse_empty, _require_folder
from lednet.errors import UserError
from lednet.io import read_yaml


def list_folders(image_folder: str | os.PathLike, label_folder: str | os.PathLike) -> FileIndex:
    """Index the files of two folders and their subfolders.

    An image and its label have the same name before the suffix. Labels are PNG files.

    Raises:
        UserError: a folder does not exist, or there are no images.
    """
    next_step = "check --datadir and the layout in datasets/README.md"
    image_folder = _require_folder(Path(image_folder), next_step)
    label_folder = _require_folder(Path(label_folder), next_step)
    images = _by_name(_images_below(image_folder))
    _refuse_empty(images, image_folder)
    labels = _by_name(p for p in label_folder.rglob("*.png") if not p.name.startswith("."))
    folders = (image_folder, label_folder)
    return FileIndex(images, labels, folders, str(label_folder))


def read_class_file(path: str | os.PathLike) -> LabelScheme:
    """Read the classes of a custom data set from a YAML or JSON file.

    `classes` is a list of {name, id, color}, where `id` defaults to the position and `color` to
    a generated one. `ignore` is a list of ids that are not evaluated:

        classes:
          - {name: road, id: 0, color: [128, 64, 128]}
          - {name: field, id: 1}
        ignore: [255]

    Raises:
        UserError: the file does not exist or has another structure, or an id is outside 0..255 or
            used twice.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no class file {path}: specify one with --classes")
    content = read_yaml(path)
    try:
        rows = list(content["classes"])
        names = tuple(str(row["name"]) for row in rows)
        ids = [int(row.get("id", i)) for i, row in enumerate(rows)]
        colors = [tuple(map(int, r.get("color", _generated_color(i)))) for i, r in enumerate(rows)]
        ignored = [int(i) for i in content.get("ignore", [])]
    except (TypeError, KeyError, AttributeError, ValueError, OverflowError) as error:
        raise UserError(
            f"{path} must hold `classes`, a list of {{name, id, color}}: see datasets/README.md"
        ) from error
    all_ids = ids + ignored
    if not ids or len(set(all_ids)) < len(all_ids) or not all(0 <= i <= 255 for i in all_ids):
        raise UserError(f"{path}: ids must be 0 to 255, each used once, and at least one class")
    if len(ids) >= IGNORE_INDEX:
        raise UserError(f"{path} has {len(ids)} classes: reduce them to 254")
    if any(len(c) != 3 or not all(0 <= value <= 255 for value in c) for c in colors):
        raise UserError(f"{path}: a color must be three numbers from 0 to 255")
    file_ids = {file_id: index for index, file_id in enumerate(ids)}
    file_ids.update(dict.fromkeys(ignored, IGNORE_INDEX))
    return LabelScheme(path.stem, names, tuple((r, g, b) for r, g, b in colors), file_ids)


def _generated_color(index: int) -> tuple[int, int, int]:
    """A color for a class index; consecutive ones differ in hue by the golden angle."""
    hue = round(index * 0.618034 * 255) % 256
    red, green, blue = Image.new("HSV", (1, 1), (hue, 170, 220)).convert("RGB").tobytes()
    return red, green, blue
