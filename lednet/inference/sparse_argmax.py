"""Upsampling of logits and argmax in one step, several times faster on a CPU.

The dense way interpolates all C classes to full size and takes the argmax there. But
interpolation is linear: within a cell of the low-resolution grid, every pixel is a convex
combination of the cell's corners. A class that is below a fixed mixture of other classes at each
corner is below it everywhere in the cell, and so below the best of them. Most cells of a scene
have one candidate class and are filled with it; in the others only the candidates are
interpolated, usually two.

This takes some hundred short operations. Two threads gain little over one, and on busy cores each
operation waits for its slowest thread: use one thread there, or OMP_WAIT_POLICY=passive.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lednet.model import resize

LONGEST_CELL = 64
"""Maximum side of a cell in pixels; limits the memory if there are few, large cells."""

BAND = 2**20
"""Low-resolution logits processed at once: 4 MB, a whole image at common sizes."""

CHUNK = 2**19
"""Values interpolated at once: a trade-off between call overhead and cache size."""


class InterpAxis(NamedTuple):
    """Interpolation of the rows (or columns) of a label map from those of the logits.

    A cell is a run of rows that start from the same low-resolution row. Each row is a convex
    combination of V corners: that low-resolution row and the next ones. V is 2 after one
    interpolation, 3 after two, and 1 if there is a single low-resolution row. After two
    interpolations a few rows of a cell reach slightly beyond its second corner. The third corner
    is moved towards the second as far as they allow, because close corners leave fewer
    candidate classes.

    Attributes:
        cell: (length,), cell of each row.
        members: (K, cells), rows of each cell; a short cell repeats its last row.
        nodes: (V, cells), low-resolution rows.
        reach: (cells,), the third corner is lerp(nodes[1], nodes[2], reach).
        weights: (V, K, cells) of the corners in each member.
    """

    cell: Tensor
    members: Tensor
    nodes: Tensor
    reach: Tensor
    weights: Tensor


def _row_weights(low: int, network: int, wanted: int) -> Tensor:
    """Weight of each low-resolution row in each row of the label map: (wanted, low).

    Computed by passing unit vectors through the dense functions, so that the conventions agree.
    """
    x = resize(torch.eye(low)[None, :, :, None], (network, 1))  # (1, low, network, 1)
    if wanted != network:
        x = F.interpolate(x, (wanted, 1), mode="bilinear", align_corners=False)
    return x[0, :, :, 0].T


def _runs(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Runs of equal values: the index of each value's run; start and length of each run."""
    _, run, lengths = values.unique_consecutive(return_inverse=True, return_counts=True)
    return run, lengths.cumsum(0) - lengths, lengths


@lru_cache(maxsize=32)
def _interp_axis(low: int, network: int, wanted: int, device: torch.device) -> InterpAxis:
    """The `InterpAxis` from `low` rows by way of `network` rows to `wanted` rows."""
    row_weights = _row_weights(low, network, wanted)
    used = (row_weights > 0).view(torch.uint8)  # without a gap, because low <= network
    first = used.argmax(dim=1)
    span = int(used.sum(dim=1, dtype=torch.uint8).max())  # 3 at most

    run, starts, lengths = _runs(first)
    pieces = -(-lengths // LONGEST_CELL)
    piece = (torch.arange(wanted) - starts[run]) * pieces[run] // lengths[run]
    cell, starts, lengths = _runs(run * wanted + piece)
    members = starts + torch.arange(int(lengths.max()))[:, None].minimum(lengths - 1)

    nodes = first[starts] + torch.arange(span)[:, None]
    beyond, nodes = nodes >= low, nodes.clamp(max=low - 1)
    weights = row_weights[members, nodes[:, None]].masked_fill(beyond[:, None], 0)  # (V, K, cells)
    reach = torch.ones(len(starts))
    if span > 2:
        _, second, third = weights
        reach = (third / (second + third)).nan_to_num(0).amax(dim=0)  # 0/0: neither is used
        moved = (third / reach).nan_to_num(0)
        weights[1:] = torch.stack(((second + third - moved).clamp(min=0), moved))
    parts = (cell, members, nodes, reach, weights)
    return InterpAxis(*(part.to(device) for part in parts))


class RowBand(NamedTuple):
    """Adjacent rows of cells: the input rows, the output rows and their interpolation."""

    low: slice
    output: slice
    rows: InterpAxis


@lru_cache(maxsize=32)
def _bands(
    low: int, network: int, wanted: int, device: torch.device, height: int
) -> tuple[RowBand, ...]:
    """The axis of `_interp_axis` in bands of `height` cells."""
    whole = _interp_axis(low, network, wanted, device)
    bands = []
    for cells in torch.arange(len(whole.reach), device=device).split(height):
        start, stop = int(cells[0]), int(cells[-1]) + 1
        members, nodes = whole.members[:, start:stop], whole.nodes[:, start:stop]
        output = slice(int(members[0, 0]), int(members[-1, -1]) + 1)
        source = slice(int(nodes[0, 0]), int(nodes[-1, -1]) + 1)
        rows = InterpAxis(
            whole.cell[output] - start,
            members - output.start,
            nodes - source.start,
            whole.reach[start:stop],
            whole.weights[..., start:stop],
        )
        bands.append(RowBand(source, output, rows))
    return tuple(bands)


def _first_best(scores: Iterable[Tensor], classes: Iterable[int | Tensor]) -> Tensor:
    """Class of the highest score everywhere; the first of equal ones.

    The scores are compared one after the other, which on a CPU is several times faster than
    torch's argmax over stacked planes.

    scores: float tensors of one shape; later ones may omit the end of the last axis
    classes: for each of them an int, or a uint8 tensor along the last axis
    -> uint8 of the first one's shape
    """
    pairs = zip(scores, classes, strict=True)
    score, label = next(pairs)
    best = score.clone()
    labels = torch.zeros_like(best, dtype=torch.uint8) + label
    for score, label in pairs:
        part, so_far = (x[..., : score.shape[-1]] for x in (labels, best))
        part += (score > so_far).view(torch.uint8) * (label - part)
        torch.maximum(so_far, score, out=so_far)
    return labels


def _mix(values: Tensor, weights: Tensor) -> Tensor:
    """Sum of values times weights over the first axis; the other axes are broadcast.

    `addcmul_` is not used: it rounds differently at the end of a row, so that equal classes
    would no longer tie.
    """
    total = values[0] * weights[0]
    for value, weight in zip(values[1:], weights[1:], strict=True):
        total += value * weight
    return total


def _pick(values: Tensor, index: Tensor) -> Tensor:
    """`values[..., index]`, several times faster."""
    return values.index_select(-1, index)


class CellBatch(NamedTuple):
    """Cells of a label map, by their indices y and x, (M,) each, along the axes."""

    rows: InterpAxis
    columns: InterpAxis
    y: Tensor
    x: Tensor

    def at_nodes(self, low: Tensor) -> Tensor:
        """Low-resolution values at the nodes of each cell: (..., h, w) -> (V, V, ..., M)."""
        flat, width = low.flatten(-2), low.shape[-1]
        rows, columns = _pick(self.rows.nodes, self.y) * width, _pick(self.columns.nodes, self.x)
        return torch.stack([torch.stack([_pick(flat, a + b) for b in columns]) for a in rows])

    def at_corners(self, low: Tensor) -> Tensor:
        """Values at the corners of each cell: (..., h, w) -> (V, V, ..., M)."""
        values = self.at_nodes(low)
        if len(self.rows.nodes) > 2:
            values[2] = values[1].lerp(values[2], self.rows.reach[self.y])
        if len(self.columns.nodes) > 2:
            values[:, 2] = values[:, 1].lerp(values[:, 2], self.columns.reach[self.x])
        return values

    def take(self, order: Tensor) -> "CellBatch":
        return self._replace(y=self.y[order], x=self.x[order])

    def places(self) -> Tensor:
        """Indices into the flat label map of each cell's pixels: (K, K, M)."""
        rows = _pick(self.rows.members, self.y) * len(self.columns.cell)
        return rows[:, None] + _pick(self.columns.members, self.x)


def _candidate_classes(corners: Tensor, winners: Tensor) -> Tensor:
    """Classes that may win somewhere in a cell: those not below the mean of the winners.

    corners: (V, V, C, M), logits; winners: (V, V, M) uint8, any classes -> (C, M) bool
    """
    outer = winners[[0, 0, -1, -1], [0, -1, 0, -1]].long()[:, None, None, None]
    a, b, c, d = (corners.gather(2, index.expand(*corners.shape[:2], -1, -1)) for index in outer)
    # In pairs, because each sum of two then rounds to at most twice the larger one. If the mean
    # were rounded above the best class, no class would be left.
    mean = ((a + b) + (c + d)) / 4
    return (corners - mean).amax(dim=(0, 1)) >= 0


def _ranked(candidates: Tensor, most: int) -> Tensor:
    """Candidate classes of each cell in rising order: (C, M) bool -> (most, M) int64."""
    classes = torch.arange(len(candidates), device=candidates.device)[:, None]
    rank = (candidates.cumsum(0) - 1).where(candidates, most)
    ranked = classes.new_zeros(most + 1, candidates.shape[1])
    return ranked.scatter_(0, rank, classes.expand_as(rank))[:most]


def _interpolated(
    cells: CellBatch, corners: Tensor, ranked: Tensor, counts: list[int]
) -> Iterator[Tensor]:
    """Scores of the first, second, .. candidate in all pixels of the cells that have it.

    corners: (V, V, C * M); ranked: indices into its last axis, (candidates, M)
    counts: how many cells have a first, second, .. candidate; those cells come first
    -> (K, K, count) each
    """
    down = _pick(cells.rows.weights, cells.y)[:, :, None]  # (V, K, 1, M)
    across = _pick(cells.columns.weights, cells.x)[:, None]  # (V, 1, K, M)
    for chosen, count in zip(ranked, counts, strict=True):
        values = _pick(corners, chosen[:count])[:, None]  # (V, 1, V, count)
        values = _mix(values, down[..., :count]).transpose(0, 1)  # (V, K, count)
        yield _mix(values[:, :, None], across[..., :count])


def _fill_mixed(output: Tensor, cells: CellBatch, low: Tensor, best: Tensor) -> None:
    """Write the pixels of cells that have several candidate classes.

    output: (H, W) uint8, written to; low: (C, h, w); best: (h, w) uint8, argmax of low
    """
    corners = cells.at_corners(low)
    candidates = _candidate_classes(corners, cells.at_nodes(best))
    number, order = candidates.sum(dim=0).sort(descending=True)
    counts = (number > torch.arange(int(number[0]), device=low.device)[:, None]).sum(1).tolist()
    mixed = counts[1] if len(counts) > 1 else 0
    if not mixed:
        return
    counts[0], order = mixed, order[:mixed]
    ranked = _ranked(_pick(candidates, order), len(counts))
    cells = cells.take(order)
    index = ranked * candidates.shape[1] + order
    scores = _interpolated(cells, corners.flatten(2), index, counts)
    classes = (c[:n] for c, n in zip(ranked.to(torch.uint8), counts, strict=True))
    labels = _first_best(scores, classes)
    output.view(-1).scatter_(0, cells.places().view(-1), labels.view(-1))


def _label_band(output: Tensor, low: Tensor, rows: InterpAxis, columns: InterpAxis) -> None:
    """Write some rows of a label map: low (C, h, w) -> output (H, W) uint8."""
    low = low.contiguous()
    best = _first_best(low, range(len(low)))
    of_cell = best.index_select(0, rows.nodes[0]).index_select(1, columns.nodes[0])
    torch.index_select(of_cell.index_select(1, columns.cell), 0, rows.cell, out=output)
    differs = torch.zeros_like(of_cell, dtype=torch.bool)
    for a in rows.nodes:
        for b in columns.nodes:
            differs |= best.index_select(0, a).index_select(1, b) != of_cell
    pixels = len(rows.members) * len(columns.members)
    logits = len(rows.nodes) * len(columns.nodes) * len(low)
    for part in differs.nonzero().split(max(1, CHUNK // max(pixels, logits))):
        if len(part):
            _fill_mixed(output, CellBatch(rows, columns, *part.unbind(1)), low, best)


@torch.no_grad()
def upsample_argmax(low: Tensor, network_size: Sequence[int], size: Sequence[int]) -> Tensor:
    """Label map at `size` from the logits before the network's last upsampling.

    Equal, up to float rounding, to `resize` to the network's size, bilinear interpolation
    (align_corners=False) to `size` and argmax, but without scores at full size.

    Args:
        low: (N, C, h, w) finite float32, C at most 256.
        network_size, size: (height, width) in pixels.

    Returns:
        (N, *size) uint8 class indices on the device of `low`; the first class of equal scores.

    Raises:
        ValueError: the logits are larger than `network_size`.
    """
    if low.shape[-2] > network_size[0] or low.shape[-1] > network_size[1]:
        raise ValueError(
            f"logits of {tuple(low.shape[-2:])} are larger than the network's size "
            f"{tuple(network_size)}: give those before the last upsampling"
        )
    n, c, h, w = low.shape
    columns = _interp_axis(w, network_size[1], size[1], low.device)
    bands = _bands(h, network_size[0], size[0], low.device, max(1, BAND // (c * w)))
    output = torch.empty((n, *size), dtype=torch.uint8, device=low.device)
    for band in bands:
        for labels, image in zip(output, low, strict=True):
            _label_band(labels[band.output], image[:, band.low], band.rows, columns)
    return output
