"""Self-contained HTML reports, rendered from the Jinja templates in `lednet/templates`."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
from PIL import Image

from lednet.data.labels import LabelScheme
from lednet.io import write_atomically
from lednet.visualization import data_uri

Tables = Mapping[str, Sequence[tuple[str, str]]]
"""Title of each key-value table -> its rows."""


class Figure(NamedTuple):
    """A headline number as text, such as "class mIoU", "0.692", "at 1024x2048"."""

    label: str
    value: str
    note: str = ""


class Column(NamedTuple):
    """A sortable column of the class table.

    Attributes:
        heading: the column's title.
        values: one number for each class to sort by; None, which sorts last, if it has none.
        texts: the displayed values.
    """

    heading: str
    values: Sequence[float | None]
    texts: Sequence[str]


def format_score(value: float | None, absent: str = "–") -> str:
    """The score with three decimals, or `absent` if it is None."""
    return absent if value is None else f"{value:.3f}"


def image_uri(pixels: np.ndarray, lossless: bool = False) -> str:
    """Encode RGB pixels, (H, W, 3) uint8, as a data URI."""
    return data_uri(Image.fromarray(pixels), "WEBP", quality=80, lossless=lossless)


def write_page(
    path: str | os.PathLike,
    template: str,
    *,
    title: str,
    headline: Sequence[Figure],
    scheme: LabelScheme,
    columns: Sequence[Column],
    tables: Tables,
    **values: Any,
) -> None:
    """Render a template to a file, atomically. Text is escaped.

    The page is written while it is rendered: iterables in `values` are consumed one item at a time.

    Args:
        path: HTML file to write.
        template: file name in `lednet/templates`.
        title: heading of the page.
        headline: figures at the top.
        scheme: names and colours of the classes.
        columns: columns of the class table.
        tables: key-value tables.
        values: other variables of the template.

    Raises:
        UserError: the file cannot be written.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["score"] = format_score
    values |= {"title": title, "headline": headline, "columns": columns, "tables": tables}
    values["classes"] = list(zip(scheme.classes, scheme.colors, strict=True))
    with (
        write_atomically(path) as temporary,
        # File names need not be valid Unicode: lone surrogates are written as escapes.
        open(temporary, "w", encoding="utf-8", errors="backslashreplace") as file,
    ):
        file.writelines(environment.get_template(template).generate(**values))
