"""The data sets that are built in: where their files lie, and what the values of labels mean."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from lednet.data.labels import IGNORE_INDEX, LabelScheme, camvid_scheme, cityscapes_scheme
from lednet.data.pairs import (
    Listing,
    detect_cityscapes_encoding,
    list_cityscapes,
    list_folders,
    list_voc,
    voc_list,
)
from lednet.errors import UserError
from lednet.io import read_yaml

CLASS_FILES = Path(__file__).parent / "classes"
"""Of data sets whose classes are published as tables."""


def read_class_file(path: str | os.PathLike) -> LabelScheme:
    """Read the classes of an own data set from a YAML or JSON file.

    `classes` is a list of {name, id, color} (`id` defaults to the position, `color`
    to a generated one), `ignore` a list of ids that do not count:

        classes:
          - {name: road, id: 0, color: [128, 64, 128]}
          - {name: field, id: 1}
        ignore: [255]

    Raises:
        UserError: no such file, no such structure, an id outside 0..255 or used twice.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no class file {path}: name one with --classes")
    content = read_yaml(path)
    try:
        rows = list(content["classes"])
        names = tuple(str(row["name"]) for row in rows)
        ids = [int(row.get("id", i)) for i, row in enumerate(rows)]
        colors = [
            [int(c) for c in row.get("color", _generated_color(i))] for i, row in enumerate(rows)
        ]
        ignored = [int(i) for i in content.get("ignore", [])]
    except (TypeError, KeyError, AttributeError, ValueError, OverflowError) as error:
        raise UserError(
            f"{path} must hold `classes`, a list of {{name, id, color}}: see datasets/README.md"
        ) from error
    every = ids + ignored
    if not ids or len(set(every)) < len(every) or not all(0 <= i <= 255 for i in every):
        raise UserError(f"{path}: ids must be 0 to 255, each used once, and at least one class")
    if len(ids) >= IGNORE_INDEX:
        raise UserError(f"{path}: {len(ids)} classes are more than the 254 that fit")
    if any(len(c) != 3 or not all(0 <= v <= 255 for v in c) for c in colors):
        raise UserError(f"{path}: a color is three numbers, 0 to 255")
    file_ids = {file_id: index for index, file_id in enumerate(ids)}
    file_ids.update(dict.fromkeys(ignored, IGNORE_INDEX))
    return LabelScheme(path.stem, names, tuple((r, g, b) for r, g, b in colors), file_ids)


def _generated_color(index: int) -> tuple[int, int, int]:
    """A colour for each class index, far apart in hue (golden-angle steps)."""
    hue = round(index * 0.618034 * 255) % 256
    red, green, blue = Image.new("HSV", (1, 1), (hue, 170, 220)).convert("RGB").tobytes()
    return red, green, blue


class Query(NamedTuple):
    """Which files are asked for; the fields are the arguments of `list_split`."""

    root: Path
    split: str
    annotations: str
    labels: str
    class_file: str | os.PathLike | None
    holds_out: bool


def _cityscapes(query: Query) -> tuple[LabelScheme, Listing]:
    root, split, annotations, labels, *_ = query
    if labels == "auto":
        labels = (
            "labelIds"  # unused: there are none to read
            if split == "test"
            else detect_cityscapes_encoding(root, split, annotations)
        )
    return cityscapes_scheme(labels), list_cityscapes(root, split, annotations, labels)


def _camvid(query: Query) -> tuple[LabelScheme, Listing]:
    root, split = query.root, query.split
    return camvid_scheme(), list_folders(root / split, root / f"{split}annot")


def _folders(query: Query) -> tuple[LabelScheme, Listing]:
    root, split = query.root, query.split
    scheme = read_class_file(query.class_file or root / "classes.yaml")
    inside = split if (root / "images" / split).is_dir() or not query.holds_out else ""
    return scheme, list_folders(root / "images" / inside, root / "labels" / inside)


def _root_of(root: Path, inner: Sequence[str], sign: str, archive: str) -> Path:
    """The folder that holds `sign`: `root`, or one of those inside as the archive unpacks.

    Raises:
        UserError: none does, or several do.
    """
    found = [folder for name in ("", *inner) if ((folder := root / name) / sign).is_dir()]
    if not found:
        raise UserError(
            f"no {sign} in {root} or its {' or '.join(inner)}: unpack {archive} there, or name "
            "another folder with --datadir"
        )
    if len(found) > 1:
        raise UserError(
            f"both {found[0]} and {found[1]} hold {sign}: name the one to take with --datadir"
        )
    return found[0]


def _voc_root(root: Path) -> Path:
    inner = ("VOC2012", "VOCdevkit/VOC2012")
    return _root_of(root, inner, "ImageSets/Segmentation", "VOCtrainval_11-May-2012.tar")


def _voc(query: Query) -> tuple[LabelScheme, Listing]:
    listing = list_voc(_voc_root(query.root), query.split, query.annotations)
    return read_class_file(CLASS_FILES / "VOC.yaml"), listing


def _ade20k_folder(root: Path, kind: str, split: str) -> Path:
    """Of a split's "images" or "annotations"."""
    root = _root_of(root, ("ADEChallengeData2016",), "images", "ADEChallengeData2016.zip")
    return root / kind / {"train": "training", "val": "validation"}.get(split, split)


def _ade20k(query: Query) -> tuple[LabelScheme, Listing]:
    images, labels = (
        _ade20k_folder(query.root, kind, query.split) for kind in ("images", "annotations")
    )
    return read_class_file(CLASS_FILES / "ADE20K.yaml"), list_folders(images, labels)


class Layout(NamedTuple):
    """How a data set lies on disk.

    Attributes:
        list: class scheme and files of a split.
        place: of the data set's folder and a split, what is there where the split is.
        size: (height, width) in pixels that it is brought to if nothing else is said; None for
            that of the first image.
        annotations: kinds that it has.
    """

    list: Callable[[Query], tuple[LabelScheme, Listing]]
    place: Callable[[Path, str], Path]
    size: tuple[int, int] | None
    annotations: tuple[str, ...] = ("fine",)


# fmt: off
DATASETS = {
    "cityscapes": Layout(
        _cityscapes, lambda root, split: root / "leftImg8bit" / split, (512, 1024),
        ("fine", "coarse"),
    ),
    "camvid": Layout(_camvid, lambda root, split: root / split, (360, 480)),
    "voc": Layout(
        _voc, lambda root, split: voc_list(_voc_root(root), split), (512, 512), ("fine", "aug"),
    ),
    "ade20k": Layout(
        _ade20k, lambda root, split: _ade20k_folder(root, "images", split), (512, 512),
    ),
    "folders": Layout(_folders, lambda root, split: root / "images" / split, None),
}
# fmt: on

DEFAULT_SIZES = {name: layout.size for name, layout in DATASETS.items() if layout.size}
"""(height, width) that the published numbers of each data set refer to; of those whose images
come in many sizes, upright and lying, the square that others train on."""


def list_split(
    name: str,
    root: str | os.PathLike,
    split: str,
    *,
    annotations: str = "fine",
    labels: str = "auto",
    class_file: str | os.PathLike | None = None,
    holds_out: bool = False,
) -> tuple[LabelScheme, Listing]:
    """Which files make up a split, and what the values of their labels mean.

    Args:
        holds_out: "val" is to be held out of "train", which need then not have a folder of
            its own.
        The others as of `lednet.data.dataset.open_dataset`; of own data without splits, `split`
        is "".

    Raises:
        UserError: see `lednet.data.pairs` and `read_class_file`.
    """
    if name not in DATASETS:
        raise ValueError(f"data set must be one of {tuple(DATASETS)}, not {name!r}")
    root, layout = Path(root), DATASETS[name]
    if not root.is_dir():
        raise UserError(f"no folder {root}: give the data set's folder with --datadir")
    if annotations not in layout.annotations:
        there = " or ".join(layout.annotations)
        raise UserError(f"{name} has no {annotations} annotations: choose {there}")
    split = "train" if holds_out and split == "val" else split
    return layout.list(Query(root, split, annotations, labels, class_file, holds_out))
