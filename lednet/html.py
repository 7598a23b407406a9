"""Self-contained HTML pages, rendered from the Jinja templates in `lednet/templates`."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from lednet.io import write_atomically


class Figure(NamedTuple):
    """A headline number as text, such as "class mIoU", "0.692", "at 1024x2048"."""

    label: str
    value: str
    note: str = ""


class Column(NamedTuple):
    """A sortable column of the class table.

    Attributes:
        heading: the column's title.
        values: one number a class to sort by; None, which sorts last, where there is none.
        texts: the values as shown, one a class.
    """

    heading: str
    values: Sequence[float | None]
    texts: Sequence[str]


def format_score(value: float | None, absent: str = "–") -> str:
    """The score with three decimals, or `absent` if it is None."""
    return absent if value is None else f"{value:.3f}"


def write_page(path: str | os.PathLike, template: str, **values: Any) -> None:
    """Render a template to a file, atomically.

    The page is written while it is rendered, so of an iterable in `values` one item at a time is
    in memory.

    Args:
        path: HTML file to write.
        template: file name in `lednet/templates`. Templates that extend `layout.html` need
            `title` and `headline`.
        values: variables of the template. Text is escaped.

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
    pieces = environment.get_template(template).generate(**values)
    with (
        write_atomically(path) as temporary,
        # File names need not be valid Unicode: lone surrogates are written as escapes.
        open(temporary, "w", encoding="utf-8", errors="backslashreplace") as file,
    ):
        file.writelines(pieces)
