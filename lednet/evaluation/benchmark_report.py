"""The HTML page of a Cityscapes evaluation."""

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lednet.data.dataset import read_label
from lednet.data.image_io import read_image
from lednet.data.labels import LabelScheme, cityscapes_scheme
from lednet.data.pairs import require_file
from lednet.evaluation.cityscapes_evaluator import Frame, FrameResult, total_scores
from lednet.evaluation.cityscapes_metrics import (
    EVALUATED_CATEGORIES,
    EVALUATED_CLASSES,
    BenchmarkScores,
)
from lednet.evaluation.page import ImageRow, Report, encode_panes, write_report
from lednet.html import Figure
from lednet.metrics import none_if_nan


def _evaluated(scores: Mapping[str, float]) -> list[float | None]:
    return [none_if_nan(scores[name]) for name in EVALUATED_CLASSES]


def _text(value: float | None) -> str:
    return "absent" if value is None else f"{value:.3f}"


def _headline(
    full: BenchmarkScores, network: BenchmarkScores | None, card: dict[str, Any] | None
) -> list[Figure]:
    summary = full.summary()
    classes = f"{len(EVALUATED_CLASSES)} classes, at the label files' size"
    figures = [Figure("class mIoU", _text(summary["class_iou"]), classes)]
    if network is not None:
        small = _text(network.summary()["class_iou"])
        figures.append(Figure("class mIoU, network's size", small, "labels reduced to it"))
    figures += [
        Figure("category mIoU", _text(summary["category_iou"]), "7 categories"),
        Figure("class iIoU", _text(summary["class_iiou"]), "every instance weighs the same"),
        Figure("pixel accuracy", _text(summary["pixel_accuracy"])),
    ]
    if card is not None:
        speed = card["forward"]
        note = f"network alone, {speed['p50_ms']:.1f} ms, {card['precision']}, {card['device']}"
        figures.append(Figure("FPS", f"{speed['fps']:.1f}", note))
        figures.append(Figure("parameters", f"{card['parameters'] / 1e6:.2f} M"))
    return figures


def _image_rows(
    results: Sequence[FrameResult],
    frames: Mapping[str, Frame],
    predictions: Mapping[str, Path],
    label_scheme: LabelScheme,
    workers: int,
) -> Iterator[ImageRow]:
    """One row a result, in order; a few images are in memory at a time."""
    scheme = cityscapes_scheme()

    def row(result: FrameResult) -> ImageRow:
        frame, scores = frames[result.name], total_scores([result.full])
        truth = scheme.lut[read_label(require_file(frame.label, "labels"), label_scheme)].astype(
            "uint8"
        )
        prediction = read_label(predictions[result.name], scheme)
        panes = encode_panes(
            read_image(require_file(frame.image, "images")), truth, prediction, scheme
        )
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
    """Write the page of an evaluation; the worst images are shown on it.

    Args:
        results, frames: of the same images; the frames name their image and label files.
        predictions: label-id PNG of each frame by name.
        label_scheme: to read the labels with, as `find_frames` gave it.
        network: scores at the network's size.
        card: measured speed, from `benchmark`.
        speed: the same as rows of a table, from `benchmark_rows`.
        options: of the run.
        images: how many, at most.
    """
    full = total_scores(result.full for result in results)
    tables: dict[str, list[tuple[str, str]]] = {}
    if speed:
        tables["Speed"] = list(speed)
    iou, iiou = full.category_iou(), full.category_iiou()
    tables["Categories"] = [
        (
            name,
            f"IoU {_text(none_if_nan(iou[name]))}"
            + (f", iIoU {iiou[name]:.3f}" if iiou[name] == iiou[name] else ""),
        )
        for name in EVALUATED_CATEGORIES
    ]
    tables["Options"] = [
        (key, str(value)) for key, value in options.items() if value not in (None, False)
    ]
    extra = {"iIoU": _evaluated(full.class_iiou())}
    if network is not None:
        extra["IoU, network's size"] = _evaluated(network.class_iou())
    report = Report(
        title, _headline(full, network, card), cityscapes_scheme(),
        _evaluated(full.class_iou()), full.class_matrix(), tables, extra,
    )  # fmt: skip
    worst = sorted(results, key=lambda r: total_scores([r.full]).mean_iou())[:images]
    by_name = {frame.name: frame for frame in frames}
    rows = _image_rows(worst, by_name, predictions, label_scheme, workers)
    bar = tqdm(rows, "report", len(worst), unit="image", dynamic_ncols=True)
    write_report(path, report, bar)
