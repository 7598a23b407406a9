"""What the data-set doctor found as a page, as plain values, and as a contact sheet."""

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from lednet.data.dataset import SegmentationDataset
from lednet.data.image_io import read_image
from lednet.data.labels import IGNORE_INDEX
from lednet.html import Figure, write_page
from lednet.plots import tile_sheet
from lednet.validation.checks import ValidationReport
from lednet.validation.duplicates import NearDuplicate, most_telling
from lednet.validation.issues import SEVERITIES, counted, relative_name
from lednet.validation.splits import Split
from lednet.visualization import data_uri, overlay, shrink

_WIDTH = 480  # of a picture, in pixels
_TWINS = 6  # pairs of similar images shown for two splits

Weights = Mapping[str, Sequence[float]]
"""Heading, such as "c = 1.10" -> one a class."""


class Aligned(NamedTuple):
    """A picture of the contact sheet: an image, and its label laid over it."""

    name: str
    remark: str
    image: np.ndarray
    overlaid: np.ndarray


def worst_aligned(diagnosis: ValidationReport, count: int) -> list[Aligned]:
    """The pairs, of all splits, whose labels seem to fit their images the least; small pictures.

    First those that most other labels would fit better, then by the fit itself.
    """
    candidates = [
        (-split.misfit[i], split.fit[i], number, i)
        for number, split in enumerate(diagnosis.splits)
        for i in range(len(split.pairs))
        if i not in split.unsound and not np.isnan(split.fit[i])
    ]
    rows = []
    for misfit, fit, number, i in sorted(candidates)[:count]:
        split = diagnosis.splits[number]
        image, label = SegmentationDataset(split.pairs, split.scheme).read(i)
        image, label = shrink(image, label, width=_WIDTH)
        remark = f"{split.name}, fit {fit:.2f}, {-misfit:.0%} of the other labels fit better"
        name = relative_name(split.pairs[i].image, split.pairs[i].image.parent)
        rows.append(Aligned(name, remark, image, overlay(image, label, split.scheme, 0.5)))
    return rows


def write_sheet(
    path: str | os.PathLike, rows: Sequence[Aligned], diagnosis: ValidationReport
) -> None:
    """Draw image | label overlaid, a row a pair, with a legend below, to a PNG."""
    tile_sheet(
        [(row.image, row.overlaid) for row in rows],
        ("image", "label on the image"),
        diagnosis.splits[0].scheme,
        path,
        captions=[f"{row.name}\n{row.remark}" for row in rows],
    )


def write_dataset_page(
    path: str | os.PathLike,
    title: str,
    diagnosis: ValidationReport,
    rows: Sequence[Aligned],
    weights: Weights,
) -> None:
    """Write the page: one HTML file that needs no other.

    Args:
        rows: of `worst_aligned`.
        weights: suggested, of each class.
    """
    scheme = diagnosis.splits[0].scheme
    write_page(
        path,
        "dataset.html",
        title=title,
        headline=_headline(diagnosis),
        tables=_tables(diagnosis),
        diagnosis=diagnosis,
        classes=list(zip(scheme.classes, scheme.colors, strict=True)),
        columns=_columns(diagnosis, weights),
        twins=_twins(diagnosis),
        rows=((row.name, row.remark, _picture(row.image), _picture(row.overlaid)) for row in rows),
    )


def summary(diagnosis: ValidationReport, weights: Weights) -> dict[str, Any]:
    """Everything that was found, ready for JSON."""
    classes = diagnosis.splits[0].scheme.classes
    return {
        "datadir": str(diagnosis.root),
        "counts": {severity: diagnosis.count(severity) for severity in SEVERITIES},
        "findings": [finding._asdict() for finding in diagnosis.findings],
        "splits": {split.name: _split_summary(split) for split in diagnosis.splits},
        "lookalikes": {
            f"{split.name} ~ {other.name}": [
                {
                    "image": relative_name(split.pairs[one.image].image, diagnosis.root),
                    "other": relative_name(other.pairs[one.other].image, diagnosis.root),
                    "similarity": round(one.similarity, 4),
                    "direct": one.direct,
                }
                for one in alike
            ]
            for split, other, alike in _alike(diagnosis)
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


def _alike(diagnosis: ValidationReport) -> Iterator[tuple[Split, Split, list[NearDuplicate]]]:
    by_name = {split.name: split for split in diagnosis.splits}
    for (split, other), alike in diagnosis.lookalikes.items():
        if alike:
            yield by_name[split], by_name[other], alike


def _size(size: tuple[int, int]) -> str:
    return "{}x{}".format(*size)


def _meaning(split: Split, value: int) -> str:
    index = split.scheme.lut[value]
    if index < 0:
        return "unknown"
    return "void" if index == IGNORE_INDEX else split.scheme.classes[index]


def _headline(diagnosis: ValidationReport) -> list[Figure]:
    pairs = ", ".join(f"{len(split.pairs):,} {split.name}" for split in diagnosis.splits)
    grave = [counted(diagnosis.count(severity), severity) for severity in SEVERITIES]
    figures = [Figure("findings", f"{len(diagnosis.findings)}", ", ".join(grave))]
    total = sum(len(split.pairs) for split in diagnosis.splits)
    figures.append(Figure("pairs", f"{total:,}", pairs))
    sizes = sum((split.sizes for split in diagnosis.splits), Counter())
    if sizes:
        more = f"and {counted(len(sizes) - 1, 'other size')}" if len(sizes) > 1 else "every image"
        figures.append(Figure("size", _size(sizes.most_common(1)[0][0]), more))
    if diagnosis.shares is not None:
        figures.append(Figure("void", f"{diagnosis.shares[-1]:.1%}", "of the pixels trained on"))
    return figures


def _columns(
    diagnosis: ValidationReport, weights: Weights
) -> list[tuple[str, list[float], list[str]]]:
    """Heading, values and their text, of the table of classes; the first one has bars."""
    columns = []
    for split in diagnosis.splits:
        counts = split.class_counts
        if not counts.any():
            continue
        shares = (counts.sum(axis=0) / counts.sum())[:-1].tolist()
        labels = (counts > 0).sum(axis=0)[:-1].tolist()
        columns.append((f"pixels, {split.name}", shares, list(map(_percent, shares))))
        columns.append((f"images, {split.name}", labels, [f"{n:,}" for n in labels]))
    columns += [
        (f"weight, {head}", list(v), [f"{w:.2f}" for w in v]) for head, v in weights.items()
    ]
    return columns


def _tables(diagnosis: ValidationReport) -> dict[str, list[tuple[str, str]]]:
    """The files of each split, and the values of their labels."""
    tables = {}
    for split in diagnosis.splits:
        counts = split.id_counts
        rows = [
            ("pairs", f"{len(split.pairs):,}"),
            ("image sizes", _list(map(_size, split.sizes.elements()))),
            ("image modes", _list(split.modes("image").elements())),
            ("label modes", _list(split.modes("label").elements())),
        ]
        tables[f"Files of {split.name}"] = rows
        total = counts[:, 0].sum()
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


def _list(values: Iterator[str], limit: int = 8) -> str:
    counts = Counter(values)
    text = ", ".join(f"{value} ({count:,})" for value, count in counts.most_common(limit))
    return text + (f" and {len(counts) - limit} more" if len(counts) > limit else "") or "none"


def _picture(pixels: np.ndarray) -> str:
    return data_uri(Image.fromarray(pixels), "WEBP", quality=80)


def _twins(diagnosis: ValidationReport) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Similarity of images of two splits, with caption and picture of both."""
    for split, other, alike in _alike(diagnosis):
        for one in most_telling(alike, _TWINS):
            sides = [
                (f"{side.name}: {side.pairs[i].image.name}", side.pairs[i].image)
                for side, i in ((split, one.image), (other, one.other))
            ]
            pictures = [
                (caption, _picture(*shrink(read_image(path), width=_WIDTH)))
                for caption, path in sides
            ]
            yield f"{one.similarity:.2f}", pictures
