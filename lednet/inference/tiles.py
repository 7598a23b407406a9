"""Overlapping tiles of an image that is too large for the memory."""

import itertools
from typing import NamedTuple

STRIDE = 8
"""Input pixels per logit along each axis."""


class TileSpan(NamedTuple):
    """One tile along one axis: its input, and the part of its output that is used."""

    start: int
    stop: int
    own_start: int
    own_stop: int


def tile_spans(length: int, tile: int, overlap: int) -> list[TileSpan]:
    """Cover `length` with tiles of size `tile` that overlap by at least `overlap`.

    Each overlap is divided in the middle between its two tiles; the used parts cover the axis
    exactly once.
    """
    if tile >= length:
        return [TileSpan(0, length, 0, length)]
    starts = [*range(0, length - tile, tile - overlap), length - tile]
    borders = [0, *((a + tile + b) // 2 for a, b in itertools.pairwise(starts)), length]
    return [
        TileSpan(start, start + tile, *own)
        for start, own in zip(starts, itertools.pairwise(borders), strict=True)
    ]
