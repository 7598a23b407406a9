"""Fonts that have the letters of a text, in any script."""

import logging
import unicodedata
from collections.abc import Iterable
from functools import cache

from PIL import ImageFont

logger = logging.getLogger(__name__)


@cache
def _font_files() -> tuple[str, ...]:
    """Installed fonts: matplotlib's own first, then upright ones of normal weight."""
    from matplotlib import font_manager

    fonts = [f for f in font_manager.fontManager.ttflist if not f.name.startswith("Last Resort")]
    fonts.sort(key=lambda f: (f.name != "DejaVu Sans", f.style != "normal", f.weight != 400))
    return tuple(dict.fromkeys(font.fname for font in fonts))


@cache
def _characters(path: str) -> frozenset[int]:
    """Code points of the glyphs of a font; none if it cannot be used at every size."""
    from matplotlib.ft2font import FT2Font

    try:
        font = FT2Font(path)
        return frozenset(font.get_charmap()) if font.scalable else frozenset()
    except (OSError, RuntimeError):  # removed since matplotlib listed it, or damaged
        return frozenset()


@cache
def find_font(text: str) -> str | None:
    """Path of an installed font with every letter of `text`; None if there is none."""
    needed = {ord(c) for c in text if not c.isspace() and unicodedata.category(c) != "Cf"}
    return next((path for path in _font_files() if needed <= _characters(path)), None)


def drawable(text: str) -> str:
    """`text`, or its character codes if no installed font has its letters, which is logged."""
    if text.isascii() or find_font(text):
        return text
    known = _characters(_font_files()[0])
    letter = next((c for c in text if not c.isspace() and ord(c) not in known), text[0])
    _warn_missing(unicodedata.name(letter, "UNKNOWN").split()[0].split("-")[0])
    return text.encode("ascii", "backslashreplace").decode()


@cache
def _warn_missing(script: str) -> None:
    logger.warning(
        "no installed font has the %s letters of some names, which are drawn as codes: install "
        "one, for example a Noto font (fonts-noto, fonts-noto-cjk)",
        script,
    )


@cache
def pil_font(text: str, size: float) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's font for a `drawable` text."""
    path = None if text.isascii() else find_font(text)
    return ImageFont.truetype(path, size) if path else ImageFont.load_default(size)


def plot_families(texts: Iterable[str]) -> list[str]:
    """Font families for matplotlib's "font.family" that have the letters of `drawable` texts."""
    from matplotlib.ft2font import FT2Font

    paths = [path for text in texts if not text.isascii() and (path := find_font(text))]
    return list(dict.fromkeys(["DejaVu Sans", *(FT2Font(path).family_name for path in paths)]))
