"""The page of an evaluation: scores, confusion matrix and every image, in one HTML file.

The file needs no network and no other file. `page.html` is its template, which extends
`layout.html`; style sheet and scripts are put into it.
"""

import io
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple
from xml.etree import ElementTree

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure as Canvas
from matplotlib.patches import Rectangle
from PIL import Image

from lednet.data.labels import IGNORE_INDEX, Color, LabelScheme
from lednet.html import Figure, write_page
from lednet.visualization import data_uri, shrink

ERROR_COLOR: Color = (255, 96, 32)
"""RGB of a wrong pixel in the error pane."""

_CELL = 36  # CSS pixels: room for "100" in the matrix's font
_FONT = 12.5
_STRONG = 0.5
"""Share from which a cell is so strongly coloured that its number changes colour."""


class ImageRow(NamedTuple):
    """One image of the page.

    Attributes:
        miou: mean over the classes present in this image; None if there is none.
        class_iou: one a class, in [0, 1]; None where the class is in neither truth
            nor prediction.
        panes: caption -> data URI, from `encode_panes`.
    """

    name: str
    miou: float | None
    class_iou: Sequence[float | None]
    panes: Mapping[str, str]


@dataclass(frozen=True)
class Report:
    """Everything on the page but the images.

    Attributes:
        class_iou: one a class, in [0, 1]; None where the class is absent.
        matrix: (C, C + 1) integer counts of pixels; rows are the truth, columns the
            prediction, void last.
        tables: title -> (key, value) rows, such as speed and options of the run.
        class_extra: heading -> one a class, further columns beside the IoU; None
            where there is no value.

    Raises:
        ValueError: an argument does not have one entry a class.
    """

    title: str
    headline: Sequence[Figure]
    scheme: LabelScheme
    class_iou: Sequence[float | None]
    matrix: np.ndarray
    tables: Mapping[str, Sequence[tuple[str, str]]]
    class_extra: Mapping[str, Sequence[float | None]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        classes = self.scheme.num_classes
        if self.matrix.shape != (classes, classes + 1):
            raise ValueError(f"matrix is {self.matrix.shape}, not {(classes, classes + 1)}")
        _check_length("class_iou", self.class_iou, classes)
        for heading, values in self.class_extra.items():
            _check_length(heading, values, classes)


@dataclass(frozen=True)
class _Cell:
    """A cell of the matrix; `share` is of its row, None where the row is empty."""

    truth: str
    prediction: str
    count: int
    share: float | None

    @property
    def percent(self) -> str:
        return "truth absent" if self.share is None else f"{100 * self.share:.1f} %"

    def __str__(self) -> str:
        pixels = f"{self.count:,} pixels"
        return f"truth {self.truth}, predicted {self.prediction}: {self.percent} ({pixels})"


def _check_length(name: str, values: Sequence, classes: int) -> None:
    if len(values) != classes:
        raise ValueError(f"{name} has {len(values)} values for {classes} classes")


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
        width: of a thumbnail, at most, in pixels; none is enlarged.

    Returns:
        "input" (lossy), "truth", "prediction" and "error" (lossless). In "error" a
        right pixel is the input's dim grey, a wrong one `ERROR_COLOR` and void truth black.

    Raises:
        ValueError: the three are not of one size.
    """
    if not image.shape[:2] == truth.shape == prediction.shape:
        raise ValueError(
            f"image {image.shape}, truth {truth.shape} and prediction {prediction.shape} "
            "differ in size"
        )
    small, truth, prediction = shrink(image, truth, prediction, width=width)
    pixels = Image.fromarray(small)
    # Few levels of grey: they halve the file, and here the photograph is only for orientation.
    grey = np.asarray(pixels.convert("L")) // 16 * 8
    error = grey[..., None].repeat(3, axis=2)
    error[truth != prediction] = ERROR_COLOR
    error[truth == IGNORE_INDEX] = 0
    labels = {
        "truth": scheme.palette[truth],
        "prediction": scheme.palette[prediction],
        "error": error,
    }
    return {
        "input": data_uri(pixels, "WEBP", quality=80),
        **{
            key: data_uri(Image.fromarray(value), "WEBP", lossless=True)
            for key, value in labels.items()
        },
    }


def _cells(report: Report) -> list[list[_Cell]]:
    """The confusion matrix, each row as shares of its sum."""
    rows = []
    for truth, counts in zip(report.scheme.classes, report.matrix.tolist(), strict=True):
        total = sum(counts)
        predicted = zip((*report.scheme.classes, "void"), counts, strict=True)
        rows.append([_Cell(truth, name, n, n / total if total else None) for name, n in predicted])
    return rows


def _draw_matrix(cells: list[list[_Cell]], scheme: LabelScheme) -> bytes:
    """Draw the matrix with matplotlib as SVG, a point a CSS pixel; gids say what is what."""
    columns = scheme.num_classes + 1
    canvas = Canvas(figsize=(columns * _CELL / 72, scheme.num_classes * _CELL / 72))
    axis = canvas.add_axes((0, 0, 1, 1), xlim=(0, columns), ylim=(scheme.num_classes, 0))
    axis.set_axis_off()
    # matplotlib would draw a name with a line break as several texts.
    names = [" ".join(name.split()) for name in scheme.classes]
    for index, name in enumerate((*names, "void")):
        axis.text(index + 0.4, -0.2, name, rotation=45, rotation_mode="anchor", gid="column")
    for index, name in enumerate(names):
        axis.text(-0.25, index + 0.5, name, ha="right", va="center_baseline", gid="row")
    for y, row in enumerate(cells):
        for x, cell in enumerate(row):
            axis.add_patch(Rectangle((x, y), 1, 1, clip_on=False, gid="cell"))
            if cell.share is not None and cell.share >= 0.005:
                gid = "strong" if cell.share >= _STRONG else "weak"
                number = f"{100 * cell.share:.0f}"
                axis.text(x + 0.5, y + 0.5, number, ha="center", va="center_baseline", gid=gid)
    buffer = io.BytesIO()
    canvas.savefig(buffer, format="svg", bbox_inches="tight", pad_inches=0.1)
    return buffer.getvalue()


def _matrix_svg(cells: list[list[_Cell]], scheme: LabelScheme) -> str:
    """The confusion matrix as an SVG element for the inside of a page.

    Where matplotlib puts colours and fonts it has classes, so that the page's style
    sheet decides in both themes. A cell's strength is its `fill-opacity`, its value in
    words its <title>.
    """
    # Text stays text, and a class called "$x$" is no formula.
    with matplotlib.rc_context(
        {"svg.fonttype": "none", "font.size": _FONT, "text.parse_math": False}
    ):
        drawn = ElementTree.fromstring(_draw_matrix(cells, scheme))
    svg = ElementTree.Element("svg", {"id": "matrix", "viewBox": drawn.attrib["viewBox"]})
    # Its natural size: a wide matrix scrolls in its box, for a shrunken one cannot be read.
    for side in ("width", "height"):
        svg.set(side, drawn.attrib[side].removesuffix("pt"))
    svg.set("data-columns", str(scheme.num_classes + 1))
    svg.set("tabindex", "0")
    svg.set("role", "img")
    svg.set("aria-label", "Confusion matrix. Arrow keys go from cell to cell.")
    remaining = (cell for row in cells for cell in row)
    for group in drawn.findall(".//{*}g"):
        kind = group.get("id", "")
        if kind == "cell":
            cell = next(remaining)
            # The root of the share: confusions of a few per cent are to be seen.
            opacity = f"{(cell.share or 0) ** 0.5:.3f}"
            path = " ".join(group.findall("{*}path")[0].attrib["d"].split())
            shape = ElementTree.SubElement(svg, "path", {"d": path, "fill-opacity": opacity})
            shape.set("class", "cell absent" if cell.share is None else "cell")
            ElementTree.SubElement(shape, "title").text = str(cell)
        elif kind in ("row", "column", "weak", "strong"):
            text = group.findall("{*}text")[0]
            label = ElementTree.SubElement(svg, "text", {"class": kind})
            label.text = text.text
            for key in ("x", "y", *(("transform",) if kind == "column" else ())):
                label.set(key, text.attrib[key])
    ElementTree.SubElement(svg, "path", {"id": "marker"})
    return ElementTree.tostring(svg, encoding="unicode", short_empty_elements=False)


def _largest_confusions(cells: list[list[_Cell]], count: int = 8) -> list[_Cell]:
    wrong = [
        cell for y, row in enumerate(cells) for x, cell in enumerate(row) if cell.share and x != y
    ]
    return sorted(wrong, key=lambda cell: -(cell.share or 0))[:count]


def _checked(images: Iterable[ImageRow], classes: int) -> Iterator[ImageRow]:
    for row in images:
        _check_length(f"class_iou of {row.name}", row.class_iou, classes)
        yield row


def write_report(path: str | os.PathLike, report: Report, images: Iterable[ImageRow]) -> None:
    """Write the page. `images` is consumed once; one image at a time is in memory.

    Names, classes and table entries may be any text: they are escaped.

    Raises:
        UserError: the file cannot be written. Neither then nor when `images` raises
            is anything left at `path` that was not there before.
        ValueError: an image does not have one IoU a class.
    """
    cells = _cells(report)
    write_page(
        path,
        "page.html",
        title=report.title,
        headline=report.headline,
        tables=report.tables,
        report=report,
        classes=list(zip(report.scheme.classes, report.scheme.colors, strict=True)),
        cells=cells,
        matrix_svg=Markup(_matrix_svg(cells, report.scheme)),
        confusions=_largest_confusions(cells),
        error_color=ERROR_COLOR,
        images=_checked(images, report.scheme.num_classes),
    )
