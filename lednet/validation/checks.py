"""Examine a data set: every file looked at once, and what was found in plain words.

Nothing here ends at a damaged file: that is a finding.
"""

import os
from collections.abc import Iterable, Set
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lednet.data.dataset import pixel_shares
from lednet.data.labels import IGNORE_INDEX
from lednet.data.pairs import Sample, list_examples, require_file
from lednet.validation.alignment import edge_alignment
from lednet.validation.duplicates import (
    NearDuplicate,
    find_copies,
    find_near_duplicates,
    most_telling,
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
from lednet.validation.splits import BLANK, Split

MIXED_UP = 0.1
"""Share of a split's pairs from which they count as mixed up: pairs whose image most other labels
fit better. Of pairs made at random it is half; of CamVid 0.01, of Cityscapes none."""

VOID = 0.5
"""Share of void pixels worth a warning; CamVid has 0.04, Cityscapes 0.11."""

_ENOUGH = 20  # pairs, to judge whether they are mixed up
_LIMIT = 12  # classes or values named in a sentence


@dataclass
class ValidationReport:
    """Of a data set.

    Attributes:
        findings: the gravest first.
        lookalikes: (split, other split) -> images of the one that show what the other shows.
    """

    root: Path
    splits: list[Split]
    findings: list[Issue]
    lookalikes: dict[tuple[str, str], list[NearDuplicate]]

    def count(self, severity: str) -> int:
        return sum(finding.severity == severity for finding in self.findings)

    @property
    def shares(self) -> np.ndarray | None:
        """Share of each class of all pixels trained on, void last; None without a label."""
        counts = [split.class_counts for split in self.splits if not split.held_back]
        return pixel_shares(np.concatenate(counts)) if np.any([c.any() for c in counts]) else None


def validate_dataset(
    root: str | os.PathLike, splits: list[Split], findings: Iterable[Issue] = (), workers: int = 0
) -> ValidationReport:
    """Look at every pair; shows progress bars.

    Args:
        splits, findings: of `open_splits`; what is seen is added to the splits.
        workers: decoding processes; 0 decodes in this one.
    """
    root, findings = Path(root), list(findings)
    looks = inspect_pairs([pair for split in splits for pair in split.pairs], workers)
    for split in splits:
        split.looks = [next(looks) for _ in split.pairs]
    next(looks, None)  # the bar's end
    lookalikes = {}
    for i, split in enumerate(splits):
        found = IssueCollector(root, split.name)
        _check_files(split, found)
        _check_values(split, found)
        _check_classes(split, found)
        _check_fit(split, found)
        _check_copies(split, found)
        for other in splits[:i] if split.held_back else ():
            alike = _near_duplicates(split, other)
            lookalikes[split.name, other.name] = alike
            _report_near_duplicates(split, other, alike, found)
        findings += found
    findings.sort(key=lambda finding: SEVERITIES.index(finding.severity))
    return ValidationReport(root, splits, findings, lookalikes)


def _check_files(split: Split, found: IssueCollector) -> None:
    """What is known of files without a class scheme."""
    problems: dict[str, list[tuple[Path, str]]] = {}
    for i, look in enumerate(split.looks):
        for kind, path, remark in look.problems:
            problems.setdefault(kind, []).append((path, remark))
            if ISSUE_TYPES[kind].severity == "error":
                split.unsound.add(i)
    for kind in ISSUE_TYPES:
        found.add(kind, problems.get(kind, ()))
    pairs = list(zip(split.pairs, split.looks, strict=True))
    blank = [
        pair.image
        for pair, look in pairs
        if look.thumbnail is not None and np.ptp(look.thumbnail) <= BLANK
    ]
    found.add("blank", [(path, "") for path in blank])
    for mode in split.modes("image"):
        if mode != "RGB":
            files = [(pair.image, "") for pair, look in pairs if look.image_mode == mode]
            found.add("mode", files, noun="image", mode=mode, reading=_reading(mode))
    palettes = [(_label(pair), "") for pair, look in pairs if look.label_mode == "P"]
    found.add("mode", palettes, noun="label", mode="P", reading="it counts by index, not by colour")
    if len(split.sizes) > 1:
        sizes = sorted(split.sizes, key=lambda size: size[0] * size[1])
        smallest, largest = ("{}x{}".format(*sizes[i]) for i in (0, -1))
        found.say("sizes", f"images of {len(sizes)} sizes, {smallest} to {largest}")


def _label(pair: Sample) -> Path:
    return require_file(pair.label, "labels")


def _reading(mode: str) -> str:
    if mode.startswith("I;16"):
        return "it is brought to 8 bits"
    return "its transparency is dropped" if mode.endswith("A") else "it is read as RGB"


def _check_values(split: Split, found: IssueCollector) -> None:
    """What the labels' values say about the scheme that they are read with."""
    other, taken = _other_encoding(split)
    inside = "labelIds" if taken == "labelTrainIds" else "labelTrainIds"
    files = [(_label(split.pairs[i]), "") for i in sorted(other)]
    found.add("encoding", files, inside=inside, taken=taken)
    unknown = []
    for i, (pair, look) in enumerate(zip(split.pairs, split.looks, strict=True)):
        values = [value for value in look.ids if split.scheme.lut[value] < 0]
        if values and i not in other:
            more = f" and {len(values) - _LIMIT} more" if len(values) > _LIMIT else ""
            unknown.append((_label(pair), " ".join(map(str, values[:_LIMIT])) + more))
            split.unsound.add(i)
    found.add("id", unknown, scheme=split.scheme.name)
    split.unsound |= other


def _other_encoding(split: Split) -> tuple[Set[int], str]:
    """Of Cityscapes, the labels whose values are those of the other encoding, and the one that
    was expected.

    Only labelIds has 19 to 33, only labelTrainIds 255. A split of labelIds without a value above
    18 would have no car, no person, no sky and no tree.
    """
    taken = "labelTrainIds" if IGNORE_INDEX in split.scheme.file_ids else "labelIds"
    if split.scheme.name != "Cityscapes":
        return set(), taken
    values = {i: look.ids.keys() for i, look in enumerate(split.looks) if look.ids}
    high = {i for i, ids in values.items() if any(19 <= value <= 33 for value in ids)}
    void = {i for i, ids in values.items() if IGNORE_INDEX in ids}
    if taken == "labelTrainIds":
        return high - void, taken
    return (values.keys() if len(values) > 2 and not high else void - high), taken


def _check_classes(split: Split, found: IssueCollector) -> None:
    counts = split.class_counts
    if not counts.any():
        return
    empty = (counts[:, :-1].sum(axis=1) == 0) & (counts[:, -1] > 0)
    found.add("all-void", [(_label(split.pairs[i]), "") for i in empty.nonzero()[0]])
    void = counts[:, -1].sum() / counts.sum()
    if void > VOID:
        found.say("void", f"{100 * void:.0f} % of the labels' pixels are void")
    absent = [
        name
        for name, pixels in zip(split.scheme.classes, counts[:, :-1].sum(axis=0), strict=True)
        if not pixels
    ]
    if absent:
        noun = counted(len(absent), "class")
        found.say(
            "unscored" if split.held_back else "absent",
            f"{noun} without a pixel ({list_examples(absent, _LIMIT)})",
            files=absent,
        )


def _check_fit(split: Split, found: IssueCollector) -> None:
    split.fit = np.full(len(split.pairs), np.nan, np.float32)
    split.misfit = split.fit.copy()
    sound = [
        (i, look.thumbnail, look.regions)
        for i, look in enumerate(split.looks)
        if look.thumbnail is not None and look.regions is not None
    ]
    if not sound:
        return
    seen = [i for i, _, _ in sound]
    thumbnails = np.stack([thumbnail for _, thumbnail, _ in sound])
    regions = np.stack([regions for _, _, regions in sound])
    split.fit[seen], split.misfit[seen] = edge_alignment(thumbnails, regions)
    worse = (split.misfit > 0.5).nonzero()[0]
    if len(seen) >= _ENOUGH and len(worse) > MIXED_UP * len(seen):
        found.add("mixed-up", [(split.pairs[i].image, "") for i in worse])


def _check_copies(split: Split, found: IssueCollector) -> None:
    indices, thumbnails = split.thumbnails()
    copies = [
        (split.pairs[indices[j]].image, f"as {split.pairs[indices[i]].image.name}")
        for i, j in find_copies(thumbnails)
    ]
    found.add("copy", copies)


def _near_duplicates(split: Split, other: Split) -> list[NearDuplicate]:
    """`find_near_duplicates` by the indices of the pairs."""
    (mine, images), (theirs, others) = split.thumbnails(), other.thumbnails()
    return [
        one._replace(image=int(mine[one.image]), other=int(theirs[one.other]))
        for one in find_near_duplicates(images, others)
    ]


def _report_near_duplicates(
    split: Split, other: Split, alike: list[NearDuplicate], found: IssueCollector
) -> None:
    if not alike:
        return

    def named(one: NearDuplicate) -> str:
        here, there = split.pairs[one.image].image, other.pairs[one.other].image
        names = (relative_name(path, found.root) for path in (here, there))
        return "{} ~ {}: {:.2f}".format(*names, one.similarity)

    direct = sum(one.direct for one in alike)
    nearest = "; ".join(map(named, most_telling(alike, 3)))
    sentence = (
        f"{len(alike)} of {len(split.pairs)} images show what {other.name} shows too, "
        f"{direct} of them directly ({nearest})"
    )
    if len(alike) > direct:
        sentence += ", the others following on these, frame by frame"
    next_step = ISSUE_TYPES["leak"].next_step.format(split=split.name)
    found.say("leak", sentence, next_step, [named(one) for one in alike])
