"""Output of a data-set validation: HTML report, JSON summary and contact sheet."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from lednet.data.dataset import SegmentationDataset
from lednet.data.image_io import read_image
from lednet.data.labels import IGNORE_INDEX
from lednet.html import Column, Figure, write_page
from lednet.plots import tile_sheet
from lednet.validation.checks import ValidationReport
from lednet.validation.duplicates import NearDuplicate, most_similar
from lednet.validation.issues import SEVERITIES, counted, relative_name
from lednet.validation.splits import Split
from lednet.visualization import data_uri, overlay, shrink

_WIDTH = 480  # of an image, in pixels
_MAX_DUPLICATES = 6  # pairs shown for two splits

Weights = Mapping[str, Sequence[float]]
"""Column heading, such as "c = 1.10" -> one weight a class."""


class AlignmentRow(NamedTuple):
    """A row of the contact sheet: an image, and its label laid over it."""

    name: str
    remark: str
    image: np.ndarray
    overlaid: np.ndarray


def worst_aligned(report: ValidationReport, count: int) -> list[AlignmentRow]:
    """The pairs whose labels are aligned worst with their images, over all splits.

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
    scheme = report.splits[0].scheme
    write_page(
        path,
        "dataset.html",
        title=title,
        headline=_headline(report),
        tables=_tables(report),
        issues=report.issues,
        classes=list(zip(scheme.classes, scheme.colors, strict=True)),
        columns=_columns(report, weights),
        has_duplicates=any(report.near_duplicates.values()),
        duplicates=_duplicate_images(report),
        rows=((row.name, row.remark, _encode(row.image), _encode(row.overlaid)) for row in rows),
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
    counts, total = split.class_counts, int(split.class_counts.sum())
    return {
        "pairs": len(split.pairs),
        "image_sizes": {_size(size): n for size, n in split.sizes.most_common()},
        "image_modes": dict(split.modes("image")),
        "label_modes": dict(split.modes("label")),
        "label_values": {
            value: {"pixels": pixels, "labels": labels, "meaning": _meaning(split, value)}
            for value, (pixels, labels) in enumerate(split.id_counts.tolist())
            if labels
        },
        "void_share": counts[:, -1].sum() / total if total else None,
        "classes": {
            name: {
                "pixels": int(column.sum()),
                "share": column.sum() / total if total else None,
                "labels": int((column > 0).sum()),
            }
            for name, column in zip(split.scheme.classes, counts.T, strict=False)
        },
    }


def _near_duplicates(
    report: ValidationReport,
) -> Iterator[tuple[Split, Split, list[NearDuplicate]]]:
    by_name = {split.name: split for split in report.splits}
    for (split, other), duplicates in report.near_duplicates.items():
        if duplicates:
            yield by_name[split], by_name[other], duplicates


def _size(size: tuple[int, int]) -> str:
    return "{}x{}".format(*size)


def _meaning(split: Split, value: int) -> str:
    index = split.scheme.lut[value]
    if index < 0:
        return "unknown"
    return "void" if index == IGNORE_INDEX else split.scheme.classes[index]


def _headline(report: ValidationReport) -> list[Figure]:
    pairs = ", ".join(f"{len(split.pairs):,} {split.name}" for split in report.splits)
    total = sum(len(split.pairs) for split in report.splits)
    severities = ", ".join(counted(report.count(severity), severity) for severity in SEVERITIES)
    figures = [
        Figure("findings", f"{len(report.issues)}", severities),
        Figure("pairs", f"{total:,}", pairs),
    ]
    sizes = sum((split.sizes for split in report.splits), Counter())
    if sizes:
        more = f"and {counted(len(sizes) - 1, 'other size')}" if len(sizes) > 1 else "every image"
        figures.append(Figure("size", _size(sizes.most_common(1)[0][0]), more))
    if report.shares is not None:
        figures.append(Figure("void", f"{report.shares[-1]:.1%}", "of the training pixels"))
    return figures


def _columns(report: ValidationReport, weights: Weights) -> list[Column]:
    columns = []
    for split in report.splits:
        counts = split.class_counts
        if not counts.any():
            continue
        shares = (counts.sum(axis=0) / counts.sum())[:-1].tolist()
        images = (counts > 0).sum(axis=0)[:-1].tolist()
        columns.append(Column(f"pixels, {split.name}", shares, [_percent(s) for s in shares]))
        columns.append(Column(f"images, {split.name}", images, [f"{n:,}" for n in images]))
    return columns + [
        Column(f"weight, {heading}", values, [f"{value:.2f}" for value in values])
        for heading, values in weights.items()
    ]


def _tables(report: ValidationReport) -> dict[str, list[tuple[str, str]]]:
    """Files and label values of each split as key-value tables."""
    tables = {}
    for split in report.splits:
        counts = split.id_counts
        total = counts[:, 0].sum()
        tables[f"Files of {split.name}"] = [
            ("pairs", f"{len(split.pairs):,}"),
            ("image sizes", _list(map(_size, split.sizes.elements()))),
            ("image modes", _list(split.modes("image").elements())),
            ("label modes", _list(split.modes("label").elements())),
        ]
        tables[f"Label values of {split.name}"] = [
            (
                f"{value}: {_meaning(split, value)}",
                f"{_percent(pixels / total)} of the pixels, in {counted(labels, 'label')}",
            )
            for value, (pixels, labels) in enumerate(counts.tolist())
            if labels
        ]
    return {title: rows for title, rows in tables.items() if rows}


def _percent(share: float) -> str:
    return "<0.01%" if 0 < share < 5e-5 else f"{share:.2%}"


def _list(values: Iterable[str], limit: int = 8) -> str:
    counts = Counter(values)
    text = ", ".join(f"{value} ({count:,})" for value, count in counts.most_common(limit))
    return text + (f" and {len(counts) - limit} more" if len(counts) > limit else "") or "none"


def _encode(pixels: np.ndarray) -> str:
    return data_uri(Image.fromarray(pixels), "WEBP", quality=80)


def _duplicate_images(report: ValidationReport) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Similarity of two images of different splits, and caption and data URI of both."""
    for split, other, duplicates in _near_duplicates(report):
        for one in most_similar(duplicates, _MAX_DUPLICATES):
            sides = []
            for side, i in ((split, one.image), (other, one.other)):
                path = side.pairs[i].image
                (image,) = shrink(read_image(path), width=_WIDTH)
                sides.append((f"{side.name}: {path.name}", _encode(image)))
            yield f"{one.similarity:.2f}", sides
