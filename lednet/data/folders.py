"""Data sets of an image folder, a label folder and a class file."""

import os
import re
import unicodedata
from pathlib import Path
from typing import Any

from lednet.data.labels import IGNORE_INDEX, Color, LabelScheme, camvid_scheme, generate_color
from lednet.data.pairs import FileIndex, SplitSpec, name_files
from lednet.errors import UserError
from lednet.files import LABEL_SUFFIXES, normalized
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
    if image_folder.name == "val":
        next_step += ", or hold images out with --val-prefix or --val-stride"
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

    Unquoted words such as `no` or `null` are names as written.

    Raises:
        UserError: the file does not exist, has another structure or an unknown key; an id or color
            is not a whole number from 0 to 255, an id or name is used twice, a name is empty or
            "void", or there are more than 254 classes.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no class file {path}: specify one with --classes")
    content = read_yaml(path)
    rows = content.get("classes") if isinstance(content, dict) else None
    ignored = content.get("ignore") or [] if isinstance(content, dict) else []
    if not (isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows)):
        raise UserError(
            f"{path} must hold `classes`, a list of {{name, id, color}}: see datasets/README.md"
        )
    if unknown := content.keys() - {"classes", "ignore"}:
        raise UserError(f"{path} has {min(unknown)!r}: its keys are classes and ignore")
    if not isinstance(ignored, list):
        raise UserError(f"{path}: `ignore` is {ignored!r}: give a list of ids, such as [255]")
    if len(rows) >= IGNORE_INDEX:
        raise UserError(f"{path} has {len(rows)} classes: reduce them to {IGNORE_INDEX - 1}")
    names: dict[str, int] = {}
    file_ids: dict[int, int] = {}
    colors = []
    for index, row in enumerate(rows):
        name = _class_name(row, index, path)
        where = f"{path}: the class {name!r}"
        if names.setdefault(normalized(name).strip(), index) != index:
            raise UserError(f"{where} is there twice: give each class its own name")
        if unknown := row.keys() - {"name", "id", "color"}:
            raise UserError(f"{where} has {min(unknown)!r}: its keys are name, id and color")
        colors.append(_color(row["color"], where) if "color" in row else generate_color(index))
        _add_id(file_ids, _byte(row.get("id", str(index)), "id", where), index, where)
    for value in ignored:
        where = f"{path}: `ignore`"
        _add_id(file_ids, _byte(value, "id", where), IGNORE_INDEX, where)
    return LabelScheme(path.stem, tuple(row["name"] for row in rows), tuple(colors), file_ids)


def _class_name(row: dict[str, Any], index: int, path: Path) -> str:
    """The name in a row of a class file."""
    name = row.get("name")
    where = f"{path}: class {index + 1} of the list"
    if not isinstance(name, str):
        raise UserError(f"{where} has the name {name!r}, which is not text: quote its name")
    if not name.strip() or any(unicodedata.category(letter) in ("Cc", "Cs") for letter in name):
        raise UserError(f"{where} has the name {name!r}: give it one of visible letters")
    if name.strip().casefold() == "void":
        raise UserError(
            f"{where} is called {name!r}, the reserved name of pixels without a class: list its "
            "id under `ignore`, or rename it"
        )
    return name


def _byte(value: object, what: str, where: str) -> int:
    """A whole number from 0 to 255 as it is written in a class file."""
    whole = isinstance(value, str) and re.fullmatch("0|[1-9][0-9]{0,2}", value, re.ASCII)
    if not whole or int(whole[0]) > 255:
        raise UserError(f"{where} has the {what} {value!r}: give a whole number from 0 to 255")
    return int(whole[0])


def _color(value: object, where: str) -> Color:
    if not isinstance(value, list) or len(value) != 3:
        raise UserError(f"{where} has the color {value!r}: give [red, green, blue], each 0 to 255")
    red, green, blue = (_byte(part, "color value", where) for part in value)
    return red, green, blue


def _add_id(file_ids: dict[int, int], file_id: int, index: int, where: str) -> None:
    if file_ids.setdefault(file_id, index) != index:
        raise UserError(f"{where} has the id {file_id}, which is used before: use each id once")
