"""HTML report of an evaluation: scores, confusion matrix and every image in one file.

The file refers to no other file and needs no network.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from lednet.data.dataset import read_label
from lednet.data.image_io import read_image
from lednet.data.labels import IGNORE_INDEX, Color, LabelScheme, cityscapes_scheme
from lednet.data.pairs import require_file
from lednet.evaluation.cityscapes_evaluator import Frame, FrameResult, total_scores
from lednet.evaluation.cityscapes_metrics import (
    EVALUATED_CATEGORIES,
    EVALUATED_CLASSES,
    BenchmarkScores,
)
from lednet.html import Column, Figure, format_score, write_page
from lednet.metrics import none_if_nan
from lednet.visualization import data_uri, shrink

ERROR_COLOR: Color = (255, 96, 32)
"""RGB of a misclassified pixel in the error pane."""

Scores = Sequence[float | None]
"""One score in [0, 1] a class; None where the class is absent."""


class ImageRow(NamedTuple):
    """One image of the report.

    Attributes:
        name: shown above the image.
        miou: mean over the classes present in this image; None if there is none.
        class_iou: IoU of each class; None where the class is in neither label nor prediction.
        panes: caption -> data URI, from `encode_panes`.
    """

    name: str
    miou: float | None
    class_iou: Scores
    panes: Mapping[str, str]


class MatrixCell(NamedTuple):
    """A cell of the confusion matrix.

    Attributes:
        truth, prediction: class names.
        pixels: count of the cell.
        share: of the true class's pixels, in [0, 1]; None where the class is absent.
    """

    truth: str
    prediction: str
    pixels: int
    share: float | None

    @property
    def percent(self) -> str:
        return "truth absent" if self.share is None else f"{100 * self.share:.1f} %"

    def __str__(self) -> str:
        share = f"{self.percent} ({self.pixels:,} pixels)"
        return f"truth {self.truth}, predicted {self.prediction}: {share}"


def encode_panes(
    image: np.ndarray,
    truth: np.ndarray,
    prediction: np.ndarray,
    scheme: LabelScheme,
    width: int = 512,
) -> dict[str, str]:
    """Encode one image's thumbnails as data URIs.

    Args:
        image: (H, W, 3) uint8 RGB.
        truth, prediction: (H, W) uint8 class indices; void is `IGNORE_INDEX`.
        scheme: names and colours of the classes.
        width: maximum width of a thumbnail in pixels; smaller images keep their size.

    Returns:
        "input" (lossy), "truth", "prediction" and "error" (lossless). In "error", correct pixels
        are the image in dark grey, wrong ones `ERROR_COLOR`, and void in the label is black.

    Raises:
        ValueError: the three arrays differ in size.
    """
    if not image.shape[:2] == truth.shape == prediction.shape:
        raise ValueError(
            f"image {image.shape}, truth {truth.shape} and prediction {prediction.shape} "
            "differ in size"
        )
    image, truth, prediction = shrink(image, truth, prediction, width=width)
    photo = Image.fromarray(image)
    # 16 grey levels halve the file; the image is only for orientation here.
    grey = np.asarray(photo.convert("L")) // 16 * 8
    error = grey[..., None].repeat(3, axis=2)
    error[truth != prediction] = ERROR_COLOR
    error[truth == IGNORE_INDEX] = 0
    maps = {
        "truth": scheme.palette[truth],
        "prediction": scheme.palette[prediction],
        "error": error,
    }
    return {"input": data_uri(photo, "WEBP", quality=80)} | {
        key: data_uri(Image.fromarray(pixels), "WEBP", lossless=True)
        for key, pixels in maps.items()
    }


def score_column(heading: str, scores: Scores, absent: str = "–") -> Column:
    """A column of the class table with scores of three decimals."""
    return Column(heading, scores, [format_score(score, absent) for score in scores])


def confusion_cells(matrix: np.ndarray, classes: Sequence[str]) -> list[list[MatrixCell]]:
    """Cells of a confusion matrix, a list a row.

    Args:
        matrix: (C, C + 1) integer counts of pixels. Rows are true classes, columns predicted
            ones, void last.
        classes: C names.

    Raises:
        ValueError: the shape of `matrix` does not fit the number of classes.
    """
    rows = []
    for truth, counts in zip(classes, matrix.tolist(), strict=True):
        total = sum(counts)
        rows.append(
            [
                MatrixCell(truth, prediction, count, count / total if total else None)
                for prediction, count in zip((*classes, "void"), counts, strict=True)
            ]
        )
    return rows


def _largest_confusions(cells: list[list[MatrixCell]], count: int = 8) -> list[MatrixCell]:
    wrong = [
        (cell.share, cell)
        for y, row in enumerate(cells)
        for x, cell in enumerate(row)
        if cell.share and x != y
    ]
    return [cell for _, cell in sorted(wrong, key=lambda pair: -pair[0])[:count]]


def write_report(
    path: str | os.PathLike,
    title: str,
    headline: Sequence[Figure],
    scheme: LabelScheme,
    columns: Sequence[Column],
    matrix: np.ndarray,
    tables: Mapping[str, Sequence[tuple[str, str]]],
    images: Iterable[ImageRow],
) -> None:
    """Write the report, atomically. Titles, names and table entries may be any text.

    Args:
        path: HTML file to write.
        title: heading of the page.
        headline: figures at the top.
        scheme: names and colours of the classes.
        columns: of the class table; the first one, in [0, 1], is also shown as bars.
        matrix: confusion matrix, as for `confusion_cells`.
        tables: title -> (key, value) rows, such as speed and options of the run.
        images: consumed once; one image at a time is in memory.

    Raises:
        UserError: the file cannot be written.
        ValueError: `matrix` does not fit the number of classes.
    """
    cells = confusion_cells(matrix, scheme.classes)
    write_page(
        path,
        "evaluation.html",
        title=title,
        headline=headline,
        classes=list(zip(scheme.classes, scheme.colors, strict=True)),
        columns=columns,
        cells=cells,
        confusions=_largest_confusions(cells),
        tables=tables,
        error_color=ERROR_COLOR,
        images=images,
    )


def _evaluated(scores: Mapping[str, float]) -> list[float | None]:
    return [none_if_nan(scores[name]) for name in EVALUATED_CLASSES]


def _headline(
    full: BenchmarkScores, network: BenchmarkScores | None, card: dict[str, Any] | None
) -> list[Figure]:
    summary = {key: format_score(value, "absent") for key, value in full.summary().items()}
    classes = f"{len(EVALUATED_CLASSES)} classes, at the label files' size"
    figures = [Figure("class mIoU", summary["class_iou"], classes)]
    if network is not None:
        score = format_score(network.summary()["class_iou"], "absent")
        figures.append(Figure("class mIoU, network's size", score, "labels reduced to it"))
    figures += [
        Figure("category mIoU", summary["category_iou"], f"{len(EVALUATED_CATEGORIES)} categories"),
        Figure("class iIoU", summary["class_iiou"], "all instances weighted equally"),
        Figure("pixel accuracy", summary["pixel_accuracy"]),
    ]
    if card is not None:
        speed = card["forward"]
        note = f"network alone, {speed['p50_ms']:.1f} ms, {card['precision']}, {card['device']}"
        figures.append(Figure("FPS", f"{speed['fps']:.1f}", note))
        figures.append(Figure("parameters", f"{card['parameters'] / 1e6:.2f} M"))
    return figures


def _categories(full: BenchmarkScores) -> list[tuple[str, str]]:
    rows = []
    for name in EVALUATED_CATEGORIES:
        iou, iiou = (none_if_nan(s[name]) for s in (full.category_iou(), full.category_iiou()))
        text = f"IoU {format_score(iou, 'absent')}"
        rows.append((name, text if iiou is None else f"{text}, iIoU {format_score(iiou)}"))
    return rows


def _image_rows(
    results: Sequence[FrameResult],
    frames: Mapping[str, Frame],
    predictions: Mapping[str, Path],
    label_scheme: LabelScheme,
    workers: int,
) -> Iterator[ImageRow]:
    """One row a result, in order; `workers` images at a time are in memory."""
    scheme = cityscapes_scheme()

    def row(result: FrameResult) -> ImageRow:
        frame, scores = frames[result.name], total_scores([result.full])
        ids = read_label(require_file(frame.label, "labels"), label_scheme)
        image = read_image(require_file(frame.image, "images"))
        prediction = read_label(predictions[result.name], scheme)
        panes = encode_panes(image, scheme.lut[ids].astype(np.uint8), prediction, scheme)
        miou = none_if_nan(scores.mean_iou())
        return ImageRow(result.name, miou, _evaluated(scores.class_iou()), panes)

    with ThreadPoolExecutor(workers) as pool:
        for start in range(0, len(results), workers):
            yield from pool.map(row, results[start : start + workers])


def write_benchmark_report(
    path: str | os.PathLike,
    title: str,
    results: Sequence[FrameResult],
    frames: Sequence[Frame],
    predictions: Mapping[str, Path],
    label_scheme: LabelScheme,
    *,
    network: BenchmarkScores | None = None,
    card: dict[str, Any] | None = None,
    speed: Sequence[tuple[str, str]] = (),
    options: Mapping[str, Any],
    images: int = 500,
    workers: int = 2,
) -> None:
    """Write the report of a Cityscapes evaluation, with the lowest-scoring images.

    Args:
        path: HTML file to write.
        title: heading of the page.
        results, frames: scores and files of the same images.
        predictions: label-id PNG of each frame by name.
        label_scheme: scheme of the label files, from `find_frames`.
        network: scores at the network's size.
        card: measured speed, from `benchmark`.
        speed: the same as rows of a table, from `benchmark_rows`.
        options: of the run; None and False are left out.
        images: maximum number of images.
        workers: decoding threads.

    Raises:
        UserError: a file cannot be read, or the report cannot be written.
    """
    full = total_scores(result.full for result in results)
    columns = [
        score_column("IoU", _evaluated(full.class_iou()), "absent"),
        score_column("iIoU", _evaluated(full.class_iiou())),
    ]
    if network is not None:
        columns.append(score_column("IoU, network's size", _evaluated(network.class_iou())))
    tables = {"Speed": list(speed)} if speed else {}
    tables["Categories"] = _categories(full)
    tables["Options"] = [(k, str(v)) for k, v in options.items() if v not in (None, False)]
    worst = sorted(results, key=lambda result: total_scores([result.full]).mean_iou())[:images]
    by_name = {frame.name: frame for frame in frames}
    rows = _image_rows(worst, by_name, predictions, label_scheme, workers)
    write_report(
        path, title, _headline(full, network, card), cityscapes_scheme(), columns,
        full.class_matrix(), tables,
        tqdm(rows, "report", len(worst), unit="image", dynamic_ncols=True),
    )  # fmt: skip
