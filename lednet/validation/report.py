"""Output of a data-set validation: HTML report, JSON summary and contact sheet."""

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lednet.data.dataset import SegmentationDataset
from lednet.data.image_io import read_image
from lednet.data.labels import IGNORE_INDEX
from lednet.html import Column, Figure, image_uri, write_page
from lednet.plots import tile_sheet
from lednet.validation.checks import ValidationReport
from lednet.validation.duplicates import NearDuplicate, most_similar
from lednet.validation.issues import SEVERITIES, counted, relative_name
from lednet.validation.splits import Split
from lednet.visualization import overlay, shrink

_WIDTH = 480  # of an image, in pixels
_MAX_DUPLICATES = 6  # pairs shown for two splits

Weights = Mapping[str, Sequence[float]]
"""Column heading, such as "c = 1.10" -> one weight for each class."""


class AlignmentRow(NamedTuple):
    """A row of the contact sheet: an image, and the image with its label as an overlay."""

    name: str
    remark: str
    image: np.ndarray
    overlaid: np.ndarray


def worst_aligned(report: ValidationReport, count: int) -> list[AlignmentRow]:
    """The pairs with the worst alignment of label and image, over all splits.

    They are sorted by the share of other labels that are aligned better, then by the alignment
    score. Images are at most 480 pixels wide.
    """
    candidates = [
        (-split.better_share[i], split.alignment[i], number, i)
        for number, split in enumerate(report.splits)
        for i in range(len(split.pairs))
        if i not in split.invalid and not np.isnan(split.alignment[i])
    ]
    rows = []
    for negative_share, score, number, i in sorted(candidates)[:count]:
        split = report.splits[number]
        image, label = SegmentationDataset(split.pairs, split.scheme).read(i)
        image, label = shrink(image, label, width=_WIDTH)
        remark = (
            f"{split.name}, alignment {score:.2f}, "
            f"{-negative_share:.0%} of the other labels are aligned better"
        )
        path = split.pairs[i].image
        overlaid = overlay(image, label, split.scheme, 0.5)
        rows.append(AlignmentRow(relative_name(path, path.parent), remark, image, overlaid))
    return rows


def write_sheet(
    path: str | os.PathLike, rows: Sequence[AlignmentRow], report: ValidationReport
) -> None:
    """Write a PNG with the image and the overlaid label of each row, and a legend."""
    tile_sheet(
        [(row.image, row.overlaid) for row in rows],
        ("image", "label on the image"),
        report.splits[0].scheme,
        path,
        captions=[f"{row.name}\n{row.remark}" for row in rows],
    )


def write_dataset_page(
    path: str | os.PathLike,
    title: str,
    report: ValidationReport,
    rows: Sequence[AlignmentRow],
    weights: Weights,
) -> None:
    """Write the self-contained HTML report.

    Args:
        path: HTML file to write.
        title: heading of the page.
        report: from `validate_dataset`.
        rows: from `worst_aligned`.
        weights: suggested class weights.
    """
    write_page(
        path,
        "dataset.html",
        title=title,
        headline=_headline(report),
        scheme=report.splits[0].scheme,
        columns=_columns(report, weights),
        tables={name: table for s in report.splits for name, table in _tables(s) if table},
        issues=report.issues,
        has_duplicates=any(report.near_duplicates.values()),
        duplicates=_duplicate_images(report),
        rows=((r.name, r.remark, image_uri(r.image), image_uri(r.overlaid)) for r in rows),
    )


def summary(report: ValidationReport, weights: Weights) -> dict[str, Any]:
    """The whole report as values for JSON."""
    classes = report.splits[0].scheme.classes
    return {
        "datadir": str(report.root),
        "counts": {severity: report.count(severity) for severity in SEVERITIES},
        "findings": [issue._asdict() for issue in report.issues],
        "splits": {split.name: _split_summary(split) for split in report.splits},
        "lookalikes": {
            f"{split.name} ~ {other.name}": [
                {
                    "image": relative_name(split.pairs[one.image].image, report.root),
                    "other": relative_name(other.pairs[one.other].image, report.root),
                    "similarity": round(one.similarity, 4),
                    "direct": one.direct,
                }
                for one in duplicates
            ]
            for split, other, duplicates in _near_duplicates(report)
        },
        "class_weights": {
            heading: dict(zip(classes, values, strict=True)) for heading, values in weights.items()
        },
    }


def _split_summary(split: Split) -> dict[str, Any]:
    counts = split.class_counts
    total = int(counts.sum())

    def share(pixels: np.ndarray) -> float | None:
        return pixels.sum() / total if total else None

    return {
        "pairs": len(split.pairs),
        "image_sizes": dict(split.sizes.most_common()),
        "image_modes": dict(split.modes("image")),
        "label_modes": dict(split.modes("label")),
        "label_values": {
            value: {"pixels": pixels, "labels": labels, "meaning": meaning}
            for value, meaning, pixels, labels in _label_values(split)
        },
        "void_share": share(counts[:, -1]),
        "classes": {
            name: {
                "pixels": int(column.sum()),
                "share": share(column),
                "labels": int((column > 0).sum()),
            }
            for name, column in zip(split.scheme.classes, counts.T, strict=False)
        },
    }


def _label_values(split: Split) -> Iterator[tuple[int, str, int, int]]:
    """Values that occur in labels, with their meaning, pixels, and labels that contain them."""
    meanings = {-1: "unknown", IGNORE_INDEX: "void", **dict(enumerate(split.scheme.classes))}
    for value, (pixels, labels) in enumerate(split.id_counts.tolist()):
        if labels:
            yield value, meanings[int(split.scheme.lut[value])], pixels, labels


def _near_duplicates(
    report: ValidationReport,
) -> Iterator[tuple[Split, Split, list[NearDuplicate]]]:
    by_name = {split.name: split for split in report.splits}
    for (split, other), duplicates in report.near_duplicates.items():
        if duplicates:
            yield by_name[split], by_name[other], duplicates


def _headline(report: ValidationReport) -> list[Figure]:
    pairs = ", ".join(f"{len(split.pairs):,} {split.name}" for split in report.splits)
    total = sum(len(split.pairs) for split in report.splits)
    severities = ", ".join(counted(report.count(severity), severity) for severity in SEVERITIES)
    figures = [
        Figure("findings", f"{len(report.issues)}", severities),
        Figure("pairs", f"{total:,}", pairs),
    ]
    sizes = sum((split.sizes for split in report.splits), Counter[str]())
    if sizes:
        more = f"and {counted(len(sizes) - 1, 'other size')}" if len(sizes) > 1 else "every image"
        figures.append(Figure("size", sizes.most_common(1)[0][0], more))
    if report.shares is not None:
        figures.append(Figure("void", f"{report.shares[-1]:.1%}", "of the training pixels"))
    return figures


def _columns(report: ValidationReport, weights: Weights) -> list[Column]:
    columns = []
    for split in report.splits:
        counts = split.class_counts
        if counts.any():
            shares = (counts.sum(axis=0) / counts.sum())[:-1].tolist()
            images = (counts > 0).sum(axis=0)[:-1].tolist()
            columns.append(Column(f"pixels, {split.name}", shares, [*map(_percent, shares)]))
            columns.append(Column(f"images, {split.name}", images, [f"{n:,}" for n in images]))
    for heading, values in weights.items():
        columns.append(Column(f"weight, {heading}", values, [f"{value:.2f}" for value in values]))
    return columns


def _tables(split: Split) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Titles and key-value rows of a split's files and label values."""
    yield (
        f"Files of {split.name}",
        [
            ("pairs", f"{len(split.pairs):,}"),
            ("image sizes", _most_common(split.sizes)),
            ("image modes", _most_common(split.modes("image"))),
            ("label modes", _most_common(split.modes("label"))),
        ],
    )
    total = split.histograms.sum()
    yield (
        f"Label values of {split.name}",
        [
            (
                f"{value}: {meaning}",
                f"{_percent(pixels / total)} of the pixels, in {counted(labels, 'label')}",
            )
            for value, meaning, pixels, labels in _label_values(split)
        ],
    )


def _percent(share: float) -> str:
    return "<0.01%" if 0 < share < 5e-5 else f"{share:.2%}"


def _most_common(counts: Counter[str], limit: int = 8) -> str:
    text = ", ".join(f"{value} ({count:,})" for value, count in counts.most_common(limit))
    return text + (f" and {len(counts) - limit} more" if len(counts) > limit else "") or "none"


def _duplicate_images(report: ValidationReport) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Similarity of two images of different splits, and caption and data URI of both."""
    for split, other, duplicates in _near_duplicates(report):
        for one in most_similar(duplicates, _MAX_DUPLICATES):
            sides = []
            for side, i in ((split, one.image), (other, one.other)):
                path = side.pairs[i].image
                (image,) = shrink(read_image(path), width=_WIDTH)
                sides.append((f"{side.name}: {path.name}", image_uri(image)))
            yield f"{one.similarity:.2f}", sides
