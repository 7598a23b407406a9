"""Data sets of an image folder, a label folder and a class file."""

import os
from pathlib import Path

from PIL import Image

from lednet.data.labels import IGNORE_INDEX, LabelScheme, camvid_scheme
from lednet.data.pairs import FileIndex, SplitSpec, name_files
from lednet.errors import UserError
from lednet.files import LABEL_SUFFIXES
from lednet.io import read_yaml

CLASS_FILES = Path(__file__).parent / "classes"
"""Class files of data sets whose classes are published as tables."""


def list_folders(image_folder: Path, label_folder: Path) -> FileIndex:
    """List the files of two folders and their subfolders.

    An image and its label have the same name before the suffix. Where several files of a folder
    have the same name, subfolders count too: `rec1/0.png` and `rec2/0.png` are two images.

    Raises:
        UserError: a folder does not exist, or there are no images.
    """
    next_step = "check --datadir and the layout in datasets/README.md"
    for relative in (False, True):
        images = name_files(image_folder, next_step, relative=relative)
        labels = name_files(label_folder, next_step, suffixes=LABEL_SUFFIXES, relative=relative)
        if all(len(files) == 1 for part in (images, labels) for files in part.names.values()):
            break
    unused = images.unused + labels.unused
    return FileIndex(images.names, labels.names, unused, str(label_folder))


def open_camvid(spec: SplitSpec) -> tuple[LabelScheme, FileIndex]:
    folders = spec.root / spec.split, spec.root / f"{spec.split}annot"
    return camvid_scheme(), list_folders(*folders)


def open_folders(spec: SplitSpec) -> tuple[LabelScheme, FileIndex]:
    """`images` and `labels`, with a folder for each split, or without if some are held out."""
    images, labels = spec.root / "images", spec.root / "labels"
    if (images / spec.split).is_dir() or not spec.holds_out:
        images, labels = images / spec.split, labels / spec.split
    scheme = read_class_file(spec.class_file or spec.root / "classes.yaml")
    return scheme, list_folders(images, labels)


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
