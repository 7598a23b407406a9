"""Pictures of a run: curves, per-class bars, contact sheets."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFont

from lednet.data.labels import IGNORE_INDEX, LabelScheme
from lednet.io import write_atomically
from lednet.visualization import colorize, draw_legend

_TRAIN_COLOR, _VAL_COLOR = "#4c78a8", "#f58518"


def _save(figure: Figure, path: str | os.PathLike) -> None:
    with write_atomically(path) as temporary, matplotlib.rc_context({"font.size": 10}):
        figure.savefig(temporary, dpi=110)


def plot_curves(
    records: Sequence[dict[str, Any]],
    path: str | os.PathLike,
    title: str,
    stages: Mapping[str, str],
    score: str = "miou",
    score_name: str = "mIoU",
) -> None:
    """Draw loss and score over the epochs, a column for each training stage.

    Args:
        records: the lines of a run's `log.jsonl`.
        path: PNG to write.
        stages: title of each stage, by its name in the records.
        score: key of a number in [0, 1], behind "train_" and "val_".
        score_name: how people call it.
    """
    stages = {name: t for name, t in stages.items() if any(r["stage"] == name for r in records)}
    figure = Figure(figsize=(1 + 5 * len(stages), 7), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(2, len(stages), squeeze=False, sharex="col")
    for column, (stage, heading) in enumerate(stages.items()):
        rows = [r for r in records if r["stage"] == stage]
        for row, (quantity, name) in enumerate((("loss", "cross-entropy"), (score, score_name))):
            axis = axes[row][column]
            for part, color in (("train", _TRAIN_COLOR), ("val", _VAL_COLOR)):
                points = [(r["epoch"], r[f"{part}_{quantity}"]) for r in rows]
                points = [(x, y) for x, y in points if y is not None]
                if points:
                    axis.plot(*zip(*points, strict=True), color=color, label=part, marker=".")
            axis.grid(alpha=0.3)
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            if column == 0:
                axis.set_ylabel(name)
        axes[0][column].set_title(heading)
        axes[0][column].legend()
        axes[1][column].set_ylim(0, 1)
        axes[1][column].set_xlabel("epoch")
        values = [r[f"val_{score}"] for r in rows if r[f"val_{score}"] is not None]
        best = max(values, default=None)
        if best is not None:
            axes[1][column].axhline(best, color=_VAL_COLOR, linestyle=":", linewidth=1)
            axes[1][column].annotate(
                f"best {best:.3f}", (0.98, min(best + 0.02, 0.95)), ha="right",
                xycoords=("axes fraction", "data"), color=_VAL_COLOR,
            )  # fmt: skip
    _save(figure, path)


def plot_class_iou(
    class_iou: dict[str, float | None], scheme: LabelScheme, path: str | os.PathLike, title: str
) -> None:
    """Draw a bar for each class, in the class's colour; an absent class has none."""
    names = list(class_iou)
    figure = Figure(figsize=(7, 1.2 + 0.32 * len(names)), layout="constrained")
    axis = figure.subplots()
    values = [class_iou[name] or 0.0 for name in names]
    colors = [np.array(color) / 255 for color in scheme.colors]
    axis.barh(names, values, color=colors, edgecolor="#00000040")
    for row, name in enumerate(names):
        iou = class_iou[name]
        text = "absent" if iou is None else f"{iou:.3f}"
        axis.text((iou or 0.0) + 0.01, row, text, va="center")
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
    """Draw input | truth | prediction, a row an image, with a legend below.

    Args:
        rows: (image (H, W, 3) uint8 RGB, truth (H, W), prediction (H, W)), the last two
            class indices. Where the truth is void the prediction is dimmed.
        path: PNG to write.
        tile_width: of each of the three columns, in pixels.
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
    """Draw pictures in rows, with headings above and the classes' legend below.

    Args:
        rows: (H, W, 3) uint8 RGB, a column each; those of the first are photographs.
        path: PNG to write.
        tile_width: of each column, in pixels.
        captions: of each row, written on its first picture.
    """
    margin, header = 8, 28
    heights = [round(tile_width * row[0].shape[0] / row[0].shape[1]) for row in rows]
    width = len(headings) * (tile_width + margin) + margin
    font = ImageFont.load_default(15)
    legend = draw_legend(scheme, width)
    height = header + sum(heights) + margin * len(rows) + legend.height
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    for column, heading in enumerate(headings):
        draw.text((margin + column * (tile_width + margin), 6), heading, "black", font)
    top = header
    for number, (row, tile_height) in enumerate(zip(rows, heights, strict=True)):
        for column, pixels in enumerate(row):
            resample = Image.Resampling.BILINEAR if column == 0 else Image.Resampling.NEAREST
            tile = Image.fromarray(pixels).resize((tile_width, tile_height), resample)
            sheet.paste(tile, (margin + column * (tile_width + margin), top))
        if captions:
            place = (margin + 6, top + 4)
            draw.text(place, captions[number], "white", font, stroke_width=2, stroke_fill="black")
        top += tile_height + margin
    sheet.paste(legend, (0, top))
    with write_atomically(path) as temporary:
        sheet.save(temporary)
