"""Splits of a data set: matched pairs of files and their inspections."""

import os
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lednet.data.labels import IGNORE_INDEX, LabelScheme
from lednet.data.pairs import FileIndex, Sample, require_file
from lednet.data.registry import DATASETS, hold_out_split, list_split
from lednet.errors import UserError
from lednet.validation.inspection import FileInspection
from lednet.validation.issues import Issue, IssueCollector

HELDOUT = ("val", "test")
"""Splits that must not overlap with the others."""

CHECKED = {
    "fine": ("train", "val", "test"),
    "coarse": ("train", "train_extra", "val"),
    "aug": ("train", "val"),
}
"""Splits to check for each kind of annotations."""


@dataclass
class Split:
    """Pairs of a split and the results of their inspection.

    Attributes:
        name: name of the split; "all" for data without splits.
        scheme: classes and label values.
        pairs: image and label files.
        inspections: one for each pair.
        invalid: indices of the pairs that training cannot read.
        alignment, better_share: (len(pairs),) float32, from
            `lednet.validation.alignment.edge_alignment`; NaN if a file of the pair is unreadable.
    """

    name: str
    scheme: LabelScheme
    pairs: list[Sample]
    inspections: list[FileInspection] = field(default_factory=list)
    invalid: set[int] = field(default_factory=set)
    alignment: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))
    better_share: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))

    @property
    def is_heldout(self) -> bool:
        return self.name in HELDOUT

    @property
    def sizes(self) -> Counter[str]:
        """Number of images of each size, such as "2048x1024"."""
        return Counter("{}x{}".format(*i.image_size) for i in self.inspections if i.image_size)

    def modes(self, what: str) -> Counter[str]:
        """Number of files of each PIL mode; what: "image" or "label"."""
        modes = (getattr(item, f"{what}_mode") for item in self.inspections)
        return Counter(mode for mode in modes if mode)

    def label(self, index: int) -> Path:
        return require_file(self.pairs[index].label, "labels")

    @property
    def histograms(self) -> np.ndarray:
        """Pixels of each value in each label, (len, 256) int64."""
        return np.array([i.histogram for i in self.inspections], np.int64).reshape(-1, 256)

    @property
    def id_counts(self) -> np.ndarray:
        """Pixels of each value, and labels that contain it, (256, 2) int64."""
        histograms = self.histograms
        return np.stack((histograms.sum(axis=0), (histograms > 0).sum(axis=0)), axis=1)

    @property
    def class_counts(self) -> np.ndarray:
        """Pixels of each class in each label, (len, num_classes + 1) int64, void last."""
        lut, classes = self.scheme.lut, self.scheme.num_classes
        index = np.where(lut == IGNORE_INDEX, classes, lut)
        one_hot = index[:, None] == np.arange(classes + 1)  # all False for undefined values
        return self.histograms @ one_hot.astype(np.int64)

    def thumbnails(self) -> tuple[np.ndarray, np.ndarray]:
        """Indices of the readable images that are not blank, and their thumbnails."""
        found = {
            i: item.thumbnail
            for i, item in enumerate(self.inspections)
            if item.thumbnail is not None and not item.is_blank
        }
        return np.array([*found], dtype=int), np.array([*found.values()], dtype=np.uint8)


def open_splits(
    name: str,
    root: str | os.PathLike,
    *,
    annotations: str = "fine",
    val_stride: int = 0,
    val_prefix: str | None = None,
    **options: Any,
) -> tuple[list[Split], list[Issue]]:
    """Open every split of a data set and match its files.

    Args:
        name: key of `DATASETS`.
        root: the data set's folder.
        annotations, val_stride, val_prefix: as for `open_dataset`.
        options: `labels` and `class_file`, as for `open_dataset`.

    Returns:
        The splits, and the issues of file names and folders.

    Raises:
        UserError: no split can be opened.
    """
    root, holds_out = Path(root), bool(val_stride or val_prefix)
    splits: list[Split] = []
    issues: list[Issue] = []
    errors: list[UserError] = []
    if holds_out:
        names = ["train", "val"]
    else:
        names = [s for s in CHECKED[annotations] if DATASETS[name].place(root, s).exists()]
    for folder in names or ["" if name == "folders" else "train"]:
        found = IssueCollector(root, folder or "all")
        try:
            scheme, index = list_split(
                name, root, folder, annotations=annotations, holds_out=holds_out, **options
            )
            pairs = match_pairs(index, found)
            pairs = hold_out_split(pairs, folder, val_stride, val_prefix, str(root))
            splits.append(Split(found.split, scheme, pairs))
        except UserError as error:
            errors.append(error)
            sentence, _, next_step = str(error).rpartition(": ")
            found.add_message("split", sentence, next_step)
        if not (holds_out and folder == "val" and len(splits) > 1):  # reported with train
            issues += found
    if not splits:
        raise errors[0]
    return splits, issues


def match_pairs(index: FileIndex, found: IssueCollector) -> list[Sample]:
    """Match images and labels by name, sorted. Files without a partner are added to `found`."""
    images, labels = index.images, index.labels
    for files in (images, labels or {}):
        groups = files.values()
        found.add("double", ((first, f"and {p.name}") for first, *others in groups for p in others))
    found.add("not-taken", index.unused)
    if labels is None:
        return [Sample(images[key][0], None) for key in sorted(images)]
    lone_images = sorted(images.keys() - labels.keys())
    lone_labels = sorted(labels.keys() - images.keys())
    by_stem = {_normalize(key): key for key in lone_labels}
    renamed = {key: by_stem[stem] for key in lone_images if (stem := _normalize(key)) in by_stem}
    found.add("name", [(images[a][0], labels[b][0].name) for a, b in renamed.items()])
    found.add("no-label", (images[key][0] for key in lone_images if key not in renamed))
    found.add("no-image", (labels[key][0] for key in lone_labels if key not in renamed.values()))
    both = sorted(images.keys() & labels.keys())
    return [Sample(images[key][0], labels[key][0]) for key in both]


_WORDS = re.compile("images?|imgs?|rgb|labels?|masks?|gt|seg|annot|annotations?|ids?")


def _normalize(name: str) -> str:
    """The name without case, leading zeros and words such as "mask"."""
    parts = re.findall(r"[^\W\d_]+|\d+", name.lower())
    return " ".join(part.lstrip("0") for part in parts if not _WORDS.fullmatch(part))
