"""Label schemes: the classes of a data set and their values in label files."""

import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image

from lednet.errors import UserError
from lednet.model import LEDNet

IGNORE_INDEX = 255
"""Target value of void pixels, which are ignored by the loss and by metrics."""

Color = tuple[int, int, int]


class Label(NamedTuple):
    name: str
    id: int
    train_id: int
    category: str
    has_instances: bool
    ignore_in_eval: bool
    color: Color


CITYSCAPES_LABELS: tuple[Label, ...] = (
    Label("unlabeled", 0, 255, "void", False, True, (0, 0, 0)),
    Label("ego vehicle", 1, 255, "void", False, True, (0, 0, 0)),
    Label("rectification border", 2, 255, "void", False, True, (0, 0, 0)),
    Label("out of roi", 3, 255, "void", False, True, (0, 0, 0)),
    Label("static", 4, 255, "void", False, True, (0, 0, 0)),
    Label("dynamic", 5, 255, "void", False, True, (111, 74, 0)),
    Label("ground", 6, 255, "void", False, True, (81, 0, 81)),
    Label("road", 7, 0, "flat", False, False, (128, 64, 128)),
    Label("sidewalk", 8, 1, "flat", False, False, (244, 35, 232)),
    Label("parking", 9, 255, "flat", False, True, (250, 170, 160)),
    Label("rail track", 10, 255, "flat", False, True, (230, 150, 140)),
    Label("building", 11, 2, "construction", False, False, (70, 70, 70)),
    Label("wall", 12, 3, "construction", False, False, (102, 102, 156)),
    Label("fence", 13, 4, "construction", False, False, (190, 153, 153)),
    Label("guard rail", 14, 255, "construction", False, True, (180, 165, 180)),
    Label("bridge", 15, 255, "construction", False, True, (150, 100, 100)),
    Label("tunnel", 16, 255, "construction", False, True, (150, 120, 90)),
    Label("pole", 17, 5, "object", False, False, (153, 153, 153)),
    Label("polegroup", 18, 255, "object", False, True, (153, 153, 153)),
    Label("traffic light", 19, 6, "object", False, False, (250, 170, 30)),
    Label("traffic sign", 20, 7, "object", False, False, (220, 220, 0)),
    Label("vegetation", 21, 8, "nature", False, False, (107, 142, 35)),
    Label("terrain", 22, 9, "nature", False, False, (152, 251, 152)),
    Label("sky", 23, 10, "sky", False, False, (70, 130, 180)),
    Label("person", 24, 11, "human", True, False, (220, 20, 60)),
    Label("rider", 25, 12, "human", True, False, (255, 0, 0)),
    Label("car", 26, 13, "vehicle", True, False, (0, 0, 142)),
    Label("truck", 27, 14, "vehicle", True, False, (0, 0, 70)),
    Label("bus", 28, 15, "vehicle", True, False, (0, 60, 100)),
    Label("caravan", 29, 255, "vehicle", True, True, (0, 0, 90)),
    Label("trailer", 30, 255, "vehicle", True, True, (0, 0, 110)),
    Label("train", 31, 16, "vehicle", True, False, (0, 80, 100)),
    Label("motorcycle", 32, 17, "vehicle", True, False, (0, 0, 230)),
    Label("bicycle", 33, 18, "vehicle", True, False, (119, 11, 32)),
    Label("license plate", -1, -1, "vehicle", False, True, (0, 0, 142)),
)
"""The label table published with the data set (https://www.cityscapes-dataset.com)."""


@dataclass(frozen=True)
class LabelScheme:
    """Classes of a data set and their values in label files.

    Args:
        name: name of the data set, for messages.
        classes: class names; a class's index here is its training target.
        colors: RGB of each class, 0..255.
        file_ids: value in a label file (0..255) -> class index, or `IGNORE_INDEX`. Other values
            are errors in the data.

    Attributes:
        lut: (256,) int16, `file_ids` as a table; -1 for other values.
    """

    name: str
    classes: tuple[str, ...]
    colors: tuple[Color, ...]
    file_ids: Mapping[int, int]

    @functools.cached_property
    def lut(self) -> np.ndarray:
        """(256,) int16, `file_ids` as a table; -1 for other values."""
        lut = np.full(256, -1, dtype=np.int16)
        lut[list(self.file_ids)] = list(self.file_ids.values())
        return lut

    @property
    def num_classes(self) -> int:
        """Number of classes without void."""
        return len(self.classes)

    @property
    def num_outputs(self) -> int:
        """Output channels of a network: one for each class, and void last."""
        return len(self.classes) + 1

    @property
    def has_void(self) -> bool:
        """Whether a value in label files means void."""
        return IGNORE_INDEX in self.file_ids.values()

    @property
    def palette(self) -> np.ndarray:
        """(256, 3) uint8: colour of each class index; void and the rest are black."""
        palette = np.zeros((256, 3), dtype=np.uint8)
        palette[: len(self.colors)] = self.colors
        return palette


_WITH_ID = [label for label in CITYSCAPES_LABELS if label.id >= 0]
_EVALUATED = [label for label in CITYSCAPES_LABELS if not label.ignore_in_eval]  # by train id


def _cityscapes(labels: list[Label], target: str, void: int, encoding: str) -> LabelScheme:
    """The scheme of `labels`, whose class index is the field `target`; others are `void`."""
    if encoding == "labelIds":
        file_ids = {label.id: getattr(label, target) for label in _WITH_ID}
    elif encoding == "labelTrainIds":
        file_ids = {label.train_id: getattr(label, target) for label in _EVALUATED}
        file_ids[IGNORE_INDEX] = void
    else:
        raise ValueError(f"encoding must be 'labelIds' or 'labelTrainIds', not {encoding!r}")
    names, colors = tuple(x.name for x in labels), tuple(x.color for x in labels)
    return LabelScheme("Cityscapes", names, colors, file_ids)


def cityscapes_scheme(encoding: str = "labelIds") -> LabelScheme:
    """The 19 evaluated Cityscapes classes.

    Args:
        encoding: values in the label files: "labelIds" (0..33) or "labelTrainIds" (0..18, void
            255).
    """
    return _cityscapes(_EVALUATED, "train_id", IGNORE_INDEX, encoding)


def cityscapes_id_scheme(encoding: str = "labelIds") -> LabelScheme:
    """All Cityscapes labels as classes, with their ids as indices, as the benchmark counts.

    Args:
        encoding: as for `cityscapes_scheme`; void of labelTrainIds becomes id 0 (unlabeled).
    """
    return _cityscapes(_WITH_ID, "id", 0, encoding)


def cityscapes_label_ids() -> np.ndarray:
    """(256,) uint8: label id of each class index; void and the rest are id 0 (unlabeled)."""
    ids = np.zeros(256, np.uint8)
    ids[: len(_EVALUATED)] = [label.id for label in _EVALUATED]
    return ids


_CAMVID_CLASSES: dict[str, Color] = {
    "sky": (128, 128, 128), "building": (128, 0, 0), "pole": (192, 192, 128),
    "road": (128, 64, 128), "pavement": (60, 40, 222), "tree": (128, 128, 0),
    "sign": (192, 128, 128), "fence": (64, 64, 128), "car": (64, 0, 128),
    "pedestrian": (64, 64, 0), "bicyclist": (0, 128, 192),
}  # fmt: skip


def camvid_scheme() -> LabelScheme:
    """The 11 CamVid classes of the SegNet split; file value 11 is void."""
    file_ids = {index: index for index in range(11)} | {11: IGNORE_INDEX}
    return LabelScheme("CamVid", tuple(_CAMVID_CLASSES), tuple(_CAMVID_CLASSES.values()), file_ids)


def generate_color(index: int) -> Color:
    """A color for a class index; consecutive ones differ in hue by the golden angle."""
    hue = round(index * 0.618034 * 255) % 256
    red, green, blue = Image.new("HSV", (1, 1), (hue, 170, 220)).convert("RGB").tobytes()
    return red, green, blue


def require_classes(
    net: LEDNet, meta: dict, scheme: LabelScheme, source: str | os.PathLike
) -> None:
    """Raise a `UserError` if the outputs of a network are not the classes of `scheme`.

    Args:
        net, meta: as returned by `load_model`.
        source: where the weights come from, for the message.
    """
    if net.num_classes != scheme.num_outputs:
        raise UserError(
            f"{source} has {net.num_classes} outputs, {scheme.name} needs {scheme.num_outputs} "
            f"({scheme.num_classes} classes and void): choose the data set it was trained on"
        )
    if "classes" in meta and tuple(meta["classes"]) != scheme.classes:
        raise UserError(
            f"{source} was trained on {meta.get('dataset')}, whose classes are not those of "
            f"{scheme.name}: choose the data set it was trained on"
        )
