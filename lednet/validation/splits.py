"""The splits of a data set: the pairs that there are, what is left over, what was seen of them."""

import os
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lednet.data.labels import IGNORE_INDEX, LabelScheme
from lednet.data.pairs import FileIndex, Sample
from lednet.data.registry import DATASETS, hold_out_split, list_split
from lednet.errors import UserError
from lednet.validation.inspection import FileInspection
from lednet.validation.issues import Issue, IssueCollector

HELD_BACK = ("val", "test")
"""Splits that must show nothing of what the others show."""

CHECKED = {
    "fine": ("train", "val", "test"),
    "coarse": ("train", "train_extra", "val"),
    "aug": ("train", "val"),
}
"""Splits of a data set by the annotations that are to be checked."""

BLANK = 3
"""Grey levels between darkest and lightest pixel of a thumbnail up to which it shows nothing."""


@dataclass
class Split:
    """A split's pairs, and what was seen of them.

    Attributes:
        unsound: indices of the pairs that training could not read.
        fit, misfit: of each pair, as `lednet.validation.alignment.edge_alignment` returns
            them; NaN where image or label are unreadable.
    """

    name: str
    scheme: LabelScheme
    pairs: list[Sample]
    looks: list[FileInspection] = field(default_factory=list)
    unsound: set[int] = field(default_factory=set)
    fit: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))
    misfit: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))

    @property
    def held_back(self) -> bool:
        return self.name in HELD_BACK

    @property
    def sizes(self) -> Counter[tuple[int, int]]:
        """Images of each (width, height)."""
        return Counter(look.image_size for look in self.looks if look.image_size)

    def modes(self, what: str) -> Counter[str]:
        """Files of each mode, what: "image" or "label"."""
        modes = (getattr(look, f"{what}_mode") for look in self.looks)
        return Counter(mode for mode in modes if mode)

    @property
    def id_counts(self) -> np.ndarray:
        """Pixels of each value, and labels that hold it: (256, 2) int64."""
        counts = np.zeros((256, 2), dtype=np.int64)
        for look in self.looks:
            for value, pixels in look.ids.items():
                counts[value] += pixels, 1
        return counts

    @property
    def class_counts(self) -> np.ndarray:
        """Pixels of each class in each label: (len, num_classes + 1) int64, void last."""
        classes = self.scheme.num_classes
        counts = np.zeros((len(self.looks), classes + 1), dtype=np.int64)
        for row, look in zip(counts, self.looks, strict=True):
            for value, pixels in look.ids.items():
                index = self.scheme.lut[value]
                if index >= 0:
                    row[classes if index == IGNORE_INDEX else index] += pixels
        return counts

    def thumbnails(self) -> tuple[np.ndarray, np.ndarray]:
        """Indices of the images that could be read and are not blank, and their thumbnails."""
        seen = [
            (i, look.thumbnail)
            for i, look in enumerate(self.looks)
            if look.thumbnail is not None and np.ptp(look.thumbnail) > BLANK
        ]
        indices, thumbnails = zip(*seen, strict=True) if seen else ((), ())
        return np.array(indices, dtype=int), np.array(thumbnails, dtype=np.uint8)


def splits_there(name: str, root: Path, annotations: str, holds_out: bool) -> list[str]:
    """Names of a data set's splits; [""] for own data without any."""
    if holds_out:
        return ["train", "val"]
    there = [split for split in CHECKED[annotations] if DATASETS[name].place(root, split).exists()]
    return there or ([""] if name == "folders" else ["train"])


def open_splits(
    name: str,
    root: str | os.PathLike,
    *,
    annotations: str = "fine",
    val_every: int = 0,
    val_names: str | None = None,
    **options: Any,
) -> tuple[list[Split], list[Issue]]:
    """Every split of a data set with its pairs, and what is wrong with names and folders.

    Args:
        options: `labels` and `class_file`; as the others those of `open_dataset`.

    Raises:
        UserError: no split can be opened.
    """
    root, holds_out = Path(root), bool(val_every or val_names)
    splits: list[Split] = []
    findings: list[Issue] = []
    refusals: list[UserError] = []
    for folder in splits_there(name, root, annotations, holds_out):
        found = IssueCollector(root, folder or "all")
        try:
            scheme, listing = list_split(
                name, root, folder, annotations=annotations, holds_out=holds_out, **options
            )
            pairs = hold_out_split(pair_up(listing, found), folder, val_every, val_names, str(root))
            splits.append(Split(found.split, scheme, pairs))
        except UserError as refusal:
            refusals.append(refusal)
            sentence, _, next_step = str(refusal).rpartition(": ")
            found.say("split", sentence, next_step)
        if not (holds_out and folder == "val" and len(splits) > 1):  # its files are train's
            findings += found
    if not splits:
        raise refusals[0]
    return splits, findings


def pair_up(listing: FileIndex, found: IssueCollector) -> list[Sample]:
    """The pairs that there are, sorted by name; what is left over is added to `found`."""
    images, labels = listing.images, listing.labels
    for files in (images, labels or {}):
        doubles = [
            (first, f"and {other.name}") for first, *more in files.values() for other in more
        ]
        found.add("double", doubles)
    found.add("not-taken", [(path, "") for path in listing.unmatched_files()])
    if labels is None:
        return [Sample(images[key][0], None) for key in sorted(images)]
    lone_images = sorted(images.keys() - labels.keys())
    lone_labels = sorted(labels.keys() - images.keys())
    by_core = {_core(key): key for key in lone_labels}
    renamed = {key: by_core[core] for key in lone_images if (core := _core(key)) in by_core}
    found.add("name", [(images[a][0], labels[b][0].name) for a, b in renamed.items()])
    found.add("no-label", [(images[key][0], "") for key in lone_images if key not in renamed])
    others = set(lone_labels) - set(renamed.values())
    found.add("no-image", [(labels[key][0], "") for key in sorted(others)])
    both = sorted(images.keys() & labels.keys())
    return [Sample(images[key][0], labels[key][0]) for key in both]


_WORDS = re.compile("images?|imgs?|rgb|labels?|masks?|gt|seg|annot|annotations?|ids?")


def _core(name: str) -> str:
    """What the names of an image and its label share: no case, leading zeros, or "_mask"."""
    parts = re.findall(r"[^\W\d_]+|\d+", name.lower())
    return " ".join(part.lstrip("0") for part in parts if not _WORDS.fullmatch(part))
