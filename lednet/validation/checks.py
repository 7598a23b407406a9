"""Checks of a data set: files, label values, classes, alignment, duplicates across splits.

Damaged files are reported as issues; they do not stop the checks.
"""

import os
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lednet.data.dataset import pixel_shares
from lednet.data.labels import IGNORE_INDEX
from lednet.data.pairs import list_examples
from lednet.validation.alignment import edge_alignment
from lednet.validation.duplicates import (
    NearDuplicate,
    find_copies,
    find_near_duplicates,
    most_similar,
)
from lednet.validation.inspection import inspect_pairs
from lednet.validation.issues import (
    ISSUE_TYPES,
    SEVERITIES,
    Issue,
    IssueCollector,
    counted,
    relative_name,
)
from lednet.validation.splits import Split

MAX_MISALIGNED = 0.1
"""Share of a split's pairs that may be aligned better with most of the other labels. It is 0.5 for
random pairs, 0.01 for CamVid, 0 for Cityscapes."""

MAX_VOID = 0.5
"""Share of void pixels above which there is a warning; CamVid has 0.04, Cityscapes 0.11."""

_LABEL_READING = {
    "P": "values are palette indices",
    "1": "black is id 0, white is id 1",
    "I;16": "values are ids, all below 256",
    "LA": "alpha, which is opaque, is dropped",
    "PA": "values are palette indices, and alpha, which is opaque, is dropped",
}
"""How the labels of each mode other than "L" are read."""

_MIN_PAIRS = 20  # for a meaningful share of misaligned pairs
_MAX_NAMES = 12  # classes or values in a message


@dataclass
class ValidationReport:
    """Result of `validate_dataset`.

    Attributes:
        root: the data set's folder.
        splits: splits with the inspections of their files.
        issues: issues, most severe first.
        near_duplicates: (split, other split) -> images of the split that also occur in the other.
    """

    root: Path
    splits: list[Split]
    issues: list[Issue]
    near_duplicates: dict[tuple[str, str], list[NearDuplicate]]

    def count(self, severity: str) -> int:
        """Number of issues of a severity."""
        return sum(issue.severity == severity for issue in self.issues)

    @property
    def shares(self) -> np.ndarray | None:
        """Share of each class of all training pixels, void last; None without any label."""
        counts = [split.class_counts for split in self.splits if not split.is_heldout]
        return pixel_shares(np.concatenate(counts)) if any(c.any() for c in counts) else None


def validate_dataset(
    root: str | os.PathLike, splits: list[Split], issues: Iterable[Issue] = (), workers: int = 0
) -> ValidationReport:
    """Inspect every pair and run all checks. Shows progress bars.

    Args:
        root: the data set's folder.
        splits, issues: from `open_splits`. The splits are filled with their inspections.
        workers: decoding processes; 0 decodes in this one.
    """
    root, issues = Path(root), list(issues)
    inspections = inspect_pairs([pair for split in splits for pair in split.pairs], workers)
    near_duplicates = {}
    for split in splits:
        split.inspections = [next(inspections) for _ in split.pairs]
    for i, split in enumerate(splits):
        found = IssueCollector(root, split.name)
        for check in (_check_files, _check_values, _check_classes, _check_alignment, _check_copies):
            check(split, found)
        for other in splits[:i] if split.is_heldout else ():
            duplicates = _check_near_duplicates(split, other, found)
            near_duplicates[split.name, other.name] = duplicates
        issues += found
    issues.sort(key=lambda issue: SEVERITIES.index(issue.severity))
    return ValidationReport(root, splits, issues, near_duplicates)


def _check_files(split: Split, found: IssueCollector) -> None:
    """Report unreadable files, blank images, unusual modes and differing sizes."""
    problems, modes = defaultdict(list), defaultdict(list)
    for i, (pair, item) in enumerate(zip(split.pairs, split.inspections, strict=True)):
        for kind, path, remark in item.problems:
            problems[kind].append((path, remark))
            if ISSUE_TYPES[kind].severity == "error":
                split.invalid.add(i)
        if item.image_mode not in ("", "RGB"):
            modes["image", item.image_mode].append(pair.image)
        if item.label_mode in _LABEL_READING and item.regions is not None:
            modes["label", item.label_mode].append(split.label(i))
    for kind in ISSUE_TYPES:
        found.add(kind, problems[kind])
    for (noun, mode), files in modes.items():
        reading = "it is converted to RGB"
        if noun == "label":
            reading = _LABEL_READING[mode]
        elif mode.startswith("I;16"):
            reading = "values are reduced to 8 bits"
        elif mode.endswith("A"):
            reading = "transparency is dropped"
        found.add("mode", files, noun=noun, mode=mode, reading=reading)
    if len(sizes := {i.image_size for i in split.inspections if i.image_size}) > 1:
        smallest, *_, largest = sorted(sizes, key=np.prod)
        range_ = "{}x{} to {}x{}".format(*smallest, *largest)
        found.add_message("sizes", f"images of {len(sizes)} sizes, {range_}")


def _check_values(split: Split, found: IssueCollector) -> None:
    """Report label values that the scheme does not define, and labels in the other encoding."""
    other, expected = _other_encoding(split)
    actual = "labelIds" if expected == "labelTrainIds" else "labelTrainIds"
    found.add("encoding", map(split.label, sorted(other)), found=actual, expected=expected)
    undefined = []
    for i, histogram in enumerate(split.histograms):
        values = np.flatnonzero((histogram > 0) & (split.scheme.lut < 0)).tolist()
        if values and i not in other:
            more = f" and {len(values) - _MAX_NAMES} more" if len(values) > _MAX_NAMES else ""
            undefined.append((split.label(i), " ".join(map(str, values[:_MAX_NAMES])) + more))
            split.invalid.add(i)
    found.add("id", undefined, scheme=split.scheme.name)
    split.invalid |= other


def _other_encoding(split: Split) -> tuple[set[int], str]:
    """Indices of the Cityscapes labels in the other encoding, and the encoding expected.

    Only labelIds contain 19 to 33, only labelTrainIds 255. A split of labelIds without any value
    above 18 would contain no car, person, sky or tree.
    """
    expected = "labelTrainIds" if IGNORE_INDEX in split.scheme.file_ids else "labelIds"
    if split.scheme.name != "Cityscapes":
        return set(), expected
    present: np.ndarray = split.histograms > 0
    ids, train_ids = present[:, 19:34].any(axis=1), present[:, IGNORE_INDEX]
    readable = present.any(axis=1)
    other = ids & ~train_ids if expected == "labelTrainIds" else train_ids & ~ids
    if expected == "labelIds" and readable.sum() > 2 and not ids.any():
        other = readable
    return set(np.flatnonzero(other).tolist()), expected


def _check_classes(split: Split, found: IssueCollector) -> None:
    """Report labels without any class, a large share of void, and absent classes."""
    counts = split.class_counts
    if not counts.any():
        return
    pixels, void = counts[:, :-1], counts[:, -1]
    found.add(
        "all-void", map(split.label, np.flatnonzero(~pixels.any(axis=1) & (void > 0)).tolist())
    )
    if (share := void.sum() / counts.sum()) > MAX_VOID:
        found.add_message("void", f"{100 * share:.0f} % of the labels' pixels are void")
    absent = [split.scheme.classes[i] for i in np.flatnonzero(~pixels.any(axis=0))]
    if absent:
        sentence = f"{counted(len(absent), 'class')} without a pixel"
        sentence += f" ({list_examples(absent, _MAX_NAMES)})"
        found.add_message("unscored" if split.is_heldout else "absent", sentence, files=absent)


def _check_alignment(split: Split, found: IssueCollector) -> None:
    """Compute `Split.alignment` and `Split.better_share`, and report mixed-up pairs."""
    split.alignment = np.full(len(split.pairs), np.nan, np.float32)
    split.better_share = split.alignment.copy()
    complete = {
        i: (item.thumbnail, item.regions)
        for i, item in enumerate(split.inspections)
        if item.thumbnail is not None and item.regions is not None
    }
    if not complete:
        return
    scores = edge_alignment(*map(np.stack, zip(*complete.values(), strict=True)))
    split.alignment[[*complete]], split.better_share[[*complete]] = scores
    misaligned = np.flatnonzero(split.better_share > 0.5)
    if len(complete) >= _MIN_PAIRS and len(misaligned) > MAX_MISALIGNED * len(complete):
        found.add("mixed-up", (split.pairs[i].image for i in misaligned))


def _check_copies(split: Split, found: IssueCollector) -> None:
    """Report images that occur more than once in the split."""
    indices, thumbnails = split.thumbnails()
    images = [split.pairs[i].image for i in indices]
    copies = find_copies(thumbnails)
    found.add("copy", [(images[j], f"same as {images[i].name}") for i, j in copies])


def _check_near_duplicates(
    split: Split, other: Split, found: IssueCollector
) -> list[NearDuplicate]:
    """Report images of `split` that also occur in `other`. Indices are those of the pairs."""
    (own_indices, own), (other_indices, others) = split.thumbnails(), other.thumbnails()
    duplicates = [
        one._replace(image=int(own_indices[one.image]), other=int(other_indices[one.other]))
        for one in find_near_duplicates(own, others)
    ]
    if not duplicates:
        return []

    def describe(one: NearDuplicate) -> str:
        paths = split.pairs[one.image].image, other.pairs[one.other].image
        names = " ~ ".join(relative_name(path, found.root) for path in paths)
        return f"{names}: {one.similarity:.2f}"

    direct = sum(one.direct for one in duplicates)
    examples = "; ".join(map(describe, most_similar(duplicates, 3)))
    sentence = (
        f"{len(duplicates)} of {len(split.pairs)} images show places that {other.name} shows too, "
        f"{direct} of them directly ({examples})"
    )
    if len(duplicates) > direct:
        sentence += ", the others through a chain of similar images"
    found.add_message("leak", sentence, files=list(map(describe, duplicates)))
    return duplicates
