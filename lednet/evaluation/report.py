"""HTML report of an evaluation: scores, confusion matrix and images in one self-contained file."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

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
from lednet.evaluation.evaluator import PREDICTED_ONLY, count_scored
from lednet.html import Column, Figure, Tables, format_score, image_uri, write_page
from lednet.metrics import none_if_nan
from lednet.progress import progress_bar
from lednet.visualization import shrink

ERROR_COLOR: Color = (255, 96, 32)
"""RGB of a misclassified pixel in the error pane."""

Scores = Sequence[float | None]
"""Score of each class in [0, 1]; None where the class is absent."""


class ImageRow(NamedTuple):
    """One image of the report: name, mean IoU, IoU of each class, and caption -> data URI."""

    name: str
    miou: float | None
    class_iou: Scores
    panes: Mapping[str, str]


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
        scheme: colours of the classes.
        width: maximum width of a thumbnail in pixels.

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
    # 16 grey levels halve the file; the image is only for orientation here.
    grey = np.asarray(Image.fromarray(image).convert("L")) // 16 * 8
    error = grey[..., None].repeat(3, axis=2)
    error[truth != prediction] = ERROR_COLOR
    error[truth == IGNORE_INDEX] = 0
    return {
        "input": image_uri(image),
        "truth": image_uri(scheme.palette[truth], lossless=True),
        "prediction": image_uri(scheme.palette[prediction], lossless=True),
        "error": image_uri(error, lossless=True),
    }


def score_column(
    heading: str, scores: Scores, absent: str = "–", presence: Mapping[str, str] | None = None
) -> Column:
    """A column of the class table with scores of three decimals.

    presence: of `class_presence`, to mark classes that are predicted only.
    """
    texts = [format_score(score, absent) for score in scores]
    if presence is not None:
        marks = [f" ({PREDICTED_ONLY})" * (where == PREDICTED_ONLY) for where in presence.values()]
        texts = [text + mark for text, mark in zip(texts, marks, strict=True)]
    return Column(heading, scores, texts)


def write_report(
    path: str | os.PathLike,
    title: str,
    headline: Sequence[Figure],
    scheme: LabelScheme,
    columns: Sequence[Column],
    matrix: np.ndarray,
    tables: Tables,
    images: Iterable[ImageRow],
) -> None:
    """Write a report on any data set, atomically.

    Args:
        path, title, headline, scheme, columns, tables: see `write_page`. The first column, in
            [0, 1], is also drawn as bars.
        matrix: (C, C + 1) integer counts of pixels. Rows are true classes, columns predicted
            ones, void last.
        images: consumed one at a time.

    Raises:
        UserError: the file cannot be written.
        ValueError: `matrix` does not match the number of classes.
    """
    names = (*scheme.classes, "void")
    cells, wrong = [], []
    for truth, counts in zip(scheme.classes, matrix.tolist(), strict=True):
        total = sum(counts)
        shares = [count / total if total else None for count in counts]
        cells.append(list(zip(names, counts, shares, strict=True)))
        wrong += [(share, truth, name) for name, _, share in cells[-1] if share and name != truth]
    write_page(
        path,
        "evaluation.html",
        title=title,
        headline=headline,
        scheme=scheme,
        columns=columns,
        tables=tables,
        cells=cells,
        confusions=sorted(wrong, key=lambda confusion: -confusion[0])[:8],
        error_color=ERROR_COLOR,
        images=images,
    )


def format_scores(
    full: BenchmarkScores, network: BenchmarkScores | None, size: tuple[int, int] | None
) -> str:
    """Table of classes, categories and means as text, with IoU at the network's `size` if given."""
    columns = [("IoU", full, "iou"), ("iIoU", full, "iiou")]
    if network is not None and size:
        columns.append((f"IoU at {size[0]}x{size[1]}", network, "iou"))
    lines = []
    for kind, names in (("class", EVALUATED_CLASSES), ("category", EVALUATED_CATEGORIES)):
        rows = {name: [name] for name in (kind, *names, "mean")}
        for heading, scores, metric in columns:
            values, marked = getattr(scores, f"{kind}_{metric}")(), scores.presence(kind)
            mean = scores.summary()[f"{kind}_{metric}"]
            rows[kind].append(heading)
            for name in names:
                absent = "-" if metric == "iiou" else "absent"
                mark = "* " if metric == "iou" and marked[name] == PREDICTED_ONLY else ""
                rows[name].append(f"{mark}{v:.4f}" if (v := values[name]) == v else absent)
            rows["mean"].append("-" if mean is None else f"{mean:.4f}")
        lines.append("")
        for name, *cells in rows.values():
            lines.append(f"{name:16}" + "".join(f"{cell:>16}" for cell in cells))
    if any("* " in line for line in lines):
        lines += ["", "* in no label, but predicted: IoU 0, part of the mean"]
    lines += [
        "",
        f"{count_scored(full.presence())} scored; pixel accuracy "
        f"{full.pixel_accuracy():.4f}, frequency-weighted IoU "
        f"{full.frequency_weighted_iou():.4f}; {full.images} images",
    ]
    return "\n".join(lines)


def _evaluated(scores: Mapping[str, float]) -> list[float | None]:
    return [none_if_nan(scores[name]) for name in EVALUATED_CLASSES]


def _headline(
    full: BenchmarkScores,
    network: BenchmarkScores | None,
    card: dict[str, Any] | None,
    source: str,
) -> list[Figure]:
    classes = f"{count_scored(full.presence())}, at the label files' size"
    categories = count_scored(full.presence("category"), "categories")
    figures = [Figure("images", f"{full.images:,}", f"{source}, {date.today().isoformat()}")]
    figures += [
        Figure(label, format_score(scores.summary()[key], "absent"), note)
        for label, scores, key, note in (
            ("class mIoU", full, "class_iou", classes),
            ("class mIoU, network's size", network, "class_iou", "labels reduced to it"),
            ("category mIoU", full, "category_iou", categories),
            ("class iIoU", full, "class_iiou", "all instances weighted equally"),
            ("pixel accuracy", full, "pixel_accuracy", ""),
        )
        if scores is not None
    ]
    if card is not None:
        speed = card["forward"]
        note = f"network alone, {speed['p50_ms']:.1f} ms, {card['precision']}, {card['device']}"
        if not speed["noisy"]:
            figures.append(Figure("FPS", f"{speed['fps']:.1f}", note))
        figures.append(Figure("parameters", f"{card['parameters'] / 1e6:.2f} M"))
    return figures


def _categories(full: BenchmarkScores) -> list[tuple[str, str]]:
    iou, iiou = full.category_iou(), full.category_iiou()
    rows = []
    for name in EVALUATED_CATEGORIES:
        text = f"IoU {format_score(none_if_nan(iou[name]), 'absent')}"
        rows.append((name, text + (f", iIoU {iiou[name]:.3f}" if iiou[name] == iiou[name] else "")))
    return rows


def _image_rows(
    results: Sequence[FrameResult],
    frames: Mapping[str, Frame],
    predictions: Mapping[str, Path],
    label_scheme: LabelScheme,
    workers: int,
) -> Iterator[ImageRow]:
    """One row for each result, in order; `workers` images at a time are in memory."""
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
    source: str = "predictions",
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
        source: weights and run, or folder of the predictions.
        network: scores at the network's input size.
        card: measured speed, from `benchmark`.
        speed: the same as rows of a table, from `benchmark_rows`.
        options: options of the run; None and False are left out.
        images: maximum number of images.
        workers: decoding threads.

    Raises:
        UserError: a file cannot be read, or the report cannot be written.
    """
    full = total_scores(result.full for result in results)
    columns = [
        score_column("IoU", _evaluated(full.class_iou()), "absent", full.presence()),
        score_column("iIoU", _evaluated(full.class_iiou())),
    ]
    if network is not None:
        scores = _evaluated(network.class_iou())
        columns.append(score_column("IoU, network's size", scores, "absent", network.presence()))
    tables = {"Speed": list(speed)} if speed else {}
    tables["Categories"] = _categories(full)
    tables["Options"] = [(k, str(v)) for k, v in options.items() if v not in (None, False)]
    worst = sorted(results, key=lambda result: total_scores([result.full]).mean_iou())[:images]
    by_name = {frame.name: frame for frame in frames}
    rows = _image_rows(worst, by_name, predictions, label_scheme, workers)
    write_report(
        path, title, _headline(full, network, card, source), cityscapes_scheme(), columns,
        full.class_matrix(), tables,
        progress_bar(rows, total=len(worst), desc="report", unit="image"),
    )  # fmt: skip
