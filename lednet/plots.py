"""Figures of a run: curves, per-class bars, contact sheets."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw

from lednet.data.labels import IGNORE_INDEX, LabelScheme
from lednet.fonts import drawable, pil_font, plot_families
from lednet.io import write_atomically
from lednet.visualization import colorize, draw_legend, require_jpeg_size

_TRAIN_COLOR, _VAL_COLOR = "#4c78a8", "#f58518"


def _save(figure: Figure, path: str | os.PathLike) -> None:
    with write_atomically(path) as temporary, matplotlib.rc_context({"font.size": 10}):
        texts = figure.findobj(Text)
        for text in texts:
            text.set_text(drawable(text.get_text()))
            text.set_parse_math(False)  # a name may contain dollar signs
        families = plot_families(text.get_text() for text in texts)
        for text in texts:
            text.set_fontfamily(families)
        figure.savefig(temporary, dpi=110)


def plot_curves(
    records: Sequence[dict[str, Any]],
    path: str | os.PathLike,
    title: str,
    stages: Mapping[str, str],
    score: str = "miou",
    score_name: str = "mIoU",
) -> None:
    """Plot loss and score over the epochs, a column for each training stage.

    Args:
        records: the lines of a run's `log.jsonl`.
        path: PNG to write.
        title: title of the figure.
        stages: title of each stage, by its name in the records.
        score: key of a number in [0, 1], after "train_" and "val_".
        score_name: label of the score's axis.
    """
    by_stage = {stage: [r for r in records if r["stage"] == stage] for stage in stages}
    by_stage = {stage: rows for stage, rows in by_stage.items() if rows}
    figure = Figure(figsize=(1 + 5 * len(by_stage), 7), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(2, len(by_stage), squeeze=False, sharex="col")
    for (loss, accuracy), (stage, rows) in zip(axes.T, by_stage.items(), strict=True):
        for axis, quantity in ((loss, "loss"), (accuracy, score)):
            for part, color in (("train", _TRAIN_COLOR), ("val", _VAL_COLOR)):
                points = [
                    (r["epoch"], y) for r in rows if (y := r[f"{part}_{quantity}"]) is not None
                ]
                if points:
                    axis.plot(*zip(*points, strict=True), color=color, label=part, marker=".")
            axis.grid(alpha=0.3)
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        loss.set_title(stages[stage])
        loss.legend()
        accuracy.set(ylim=(0, 1), xlabel="epoch")
        values = [r[f"val_{score}"] for r in rows if r[f"val_{score}"] is not None]
        if values:
            best = max(values)
            accuracy.axhline(best, color=_VAL_COLOR, linestyle=":", linewidth=1)
            accuracy.annotate(
                f"best {best:.3f}", (0.98, min(best + 0.02, 0.95)), ha="right",
                xycoords=("axes fraction", "data"), color=_VAL_COLOR,
            )  # fmt: skip
    for axis, name in zip(axes[:, 0], ("cross-entropy", score_name), strict=True):
        axis.set_ylabel(name)
    _save(figure, path)


def plot_class_iou(
    class_iou: dict[str, float | None], scheme: LabelScheme, path: str | os.PathLike, title: str
) -> None:
    """Plot a bar for each class, in the class's colour; an absent class has none."""
    figure = Figure(figsize=(7, 1.2 + 0.32 * len(class_iou)), layout="constrained")
    axis = figure.subplots()
    bars = axis.barh(
        range(len(class_iou)),
        [iou or 0.0 for iou in class_iou.values()],
        color=[np.array(color) / 255 for color in scheme.colors],
        edgecolor="#00000040",
    )
    axis.set_yticks(range(len(class_iou)), list(map(drawable, class_iou)))
    texts = ["absent" if iou is None else f"{iou:.3f}" for iou in class_iou.values()]
    axis.bar_label(bars, texts, padding=4)
    axis.set(xlim=(0, 1.1), xlabel="IoU", title=title)
    axis.invert_yaxis()
    axis.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def contact_sheet(
    rows: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]],
    scheme: LabelScheme,
    path: str | os.PathLike,
    tile_width: int = 420,
) -> None:
    """Draw input, truth and prediction of each image in a row, with a legend below.

    Args:
        rows: (image (H, W, 3) uint8 RGB, truth (H, W), prediction (H, W)), the last two
            class indices. Where the truth is void, the prediction is dimmed.
        scheme: names and colours of the classes.
        path: PNG or JPEG to write.
        tile_width: width of each of the three columns in pixels.
    """
    tiles = []
    for image, truth, prediction in rows:
        predicted = colorize(prediction, scheme)
        predicted[truth == IGNORE_INDEX] //= 3
        tiles.append((image, colorize(truth, scheme), predicted))
    tile_sheet(tiles, ("input", "truth", "prediction"), scheme, path, tile_width)


def tile_sheet(
    rows: Sequence[Sequence[np.ndarray]],
    headings: Sequence[str],
    scheme: LabelScheme,
    path: str | os.PathLike,
    tile_width: int = 420,
    captions: Sequence[str] = (),
) -> None:
    """Draw images in rows, with headings above and the legend of the classes below.

    Args:
        rows: images (H, W, 3) uint8 RGB, one for each column; those of the first are photographs.
        headings: one for each column.
        scheme: names and colours of the classes.
        path: PNG or JPEG to write.
        tile_width: width of each column in pixels.
        captions: one for each row, drawn on its first image.

    Raises:
        ImageTooLarge: see `require_jpeg_size`.
    """
    margin, top = 8, 28
    lefts = [margin + column * (tile_width + margin) for column in range(len(headings))]
    heights = [round(tile_width * row[0].shape[0] / row[0].shape[1]) for row in rows]
    legend = draw_legend(scheme, lefts[-1] + tile_width + margin)
    height = top + sum(heights) + margin * len(rows) + legend.height
    require_jpeg_size(path, legend.width, height)
    sheet = Image.new("RGB", (legend.width, height), "white")
    draw = ImageDraw.Draw(sheet)
    for left, heading in zip(lefts, headings, strict=True):
        draw.text((left, 6), heading, "black", pil_font(heading, 15))
    for number, (row, tile_height) in enumerate(zip(rows, heights, strict=True)):
        for left, pixels in zip(lefts, row, strict=True):
            photo = left == margin
            resample = Image.Resampling.BILINEAR if photo else Image.Resampling.NEAREST
            tile = Image.fromarray(pixels).resize((tile_width, tile_height), resample)
            sheet.paste(tile, (left, top))
        if captions:
            place = (margin + 6, top + 4)
            caption = drawable(captions[number])
            font = pil_font(caption, 15)
            draw.text(place, caption, "white", font, stroke_width=2, stroke_fill="black")
        top += tile_height + margin
    sheet.paste(legend, (0, top))
    with write_atomically(path) as temporary:
        sheet.save(temporary)
