"""HTML pages that need no other file, from Jinja templates."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from lednet.io import write_atomically


class Figure(NamedTuple):
    """A headline number, as it is to be read: "class mIoU", "0.692", "at 1024x2048"."""

    label: str
    value: str
    note: str = ""


def _score(value: float | None, absent: str = "–") -> str:
    """A score for the reader: three decimals."""
    return absent if value is None else f"{value:.3f}"


def _packed(values: Iterable[float | None]) -> str:
    """Scores for the page's script: "0.5,,0.25", nothing where absent."""
    return ",".join("" if value is None else f"{value:.6g}" for value in values)


def write_page(path: str | os.PathLike, template: str, **values: Any) -> None:
    """Write a page, atomically and as it is rendered: of iterables one item is in memory.

    Args:
        template: name of a file in lednet/templates; one that extends `layout.html` needs
            `title` and `headline`.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(score=_score, packed=_packed)
    pieces = environment.get_template(template).generate(**values)
    with (
        write_atomically(path) as temporary,
        # A file's name need not be valid text: what UTF-8 lacks is written as its code.
        open(temporary, "w", encoding="utf-8", errors="backslashreplace") as file,
    ):
        file.writelines(pieces)
