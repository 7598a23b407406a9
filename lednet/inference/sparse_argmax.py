"""Upsampling of logits and argmax in one step, several times faster on a CPU.

The dense computation interpolates all C classes to full size before the argmax. But
interpolation is linear: within a cell of the low-resolution grid, every pixel is a convex
combination of the cell's corners. A class that is below a fixed mixture of other classes at each
corner is below it everywhere in the cell, and so below the best of them. Most cells of a scene
have one candidate class and are filled with it; in the others only the candidates are
interpolated, usually two.

This takes some hundred short operations. Two threads gain little over one, and on busy cores each
operation waits for its slowest thread: use one thread there, or OMP_WAIT_POLICY=passive.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from lednet.model import resize

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

    def select(self, cells: Tensor) -> Self:
        """The axis for some of its cells; `cell` is not changed."""
        return self._replace(**{
            name: getattr(self, name).index_select(-1, cells) for name in self._fields[1:]
        })  # fmt: skip


def _row_weights(low: int, network: int, wanted: int) -> Tensor:
    """Weight of each low-resolution row in each row of the label map: (wanted, low).

    Computed by passing unit vectors through the dense functions, so that the conventions agree.
    """
    x = resize(torch.eye(low)[None, :, :, None], (network, 1))  # (1, low, network, 1)
    if wanted != network:
        x = F.interpolate(x, (wanted, 1), mode="bilinear", align_corners=False)
    return x[0, :, :, 0].T


@lru_cache(maxsize=32)
def _interp_axis(low: int, network: int, wanted: int, device: torch.device) -> InterpAxis:
    """The `InterpAxis` from `low` rows by way of `network` rows to `wanted` rows."""
    row_weights = _row_weights(low, network, wanted)
    used = (row_weights > 0).view(torch.uint8)  # without a gap, because low <= network
    span = int(used.sum(dim=1, dtype=torch.uint8).max())  # 3 at most
    first, cell, lengths = used.argmax(dim=1).unique_consecutive(
        return_inverse=True, return_counts=True
    )
    rows = torch.arange(int(lengths.max()))[:, None].minimum(lengths - 1)
    members = lengths.cumsum(0) - lengths + rows
    nodes = first + torch.arange(span)[:, None]
    beyond, nodes = nodes >= low, nodes.clamp(max=low - 1)
    weights = row_weights[members, nodes[:, None]].masked_fill(beyond[:, None], 0)  # (V, K, cells)
    reach = torch.ones(len(first))
    if span > 2:
        _, second, third = weights
        reach = (third / (second + third)).nan_to_num(0).amax(dim=0)  # 0/0: neither is used
        moved = (third / reach).nan_to_num(0)
        weights[1:] = torch.stack(((second + third - moved).clamp(min=0), moved))
    return InterpAxis(*(part.to(device) for part in (cell, members, nodes, reach, weights)))


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


def _at_nodes(low: Tensor, rows: InterpAxis, columns: InterpAxis) -> Tensor:
    """Low-resolution values at the nodes of M cells: (..., h, w) -> (..., V, V, M)."""
    index = rows.nodes[:, None] * low.shape[-1] + columns.nodes
    return low.flatten(-2).index_select(-1, index.flatten()).unflatten(-1, index.shape)


def _candidate_classes(corners: Tensor, winners: Tensor) -> Tensor:
    """Classes that may win somewhere in a cell: those not below the mean of the winners.

    corners: (C, V, V, M), logits; winners: (V, V, M) uint8, any classes -> (C, M) bool
    """
    outer = winners[[0, 0, -1, -1], [0, -1, 0, -1]].long()[:, None, None, None]
    a, b, c, d = (corners.gather(0, index.expand(1, *corners.shape[1:])) for index in outer)
    # In pairs, because each sum of two then rounds to at most twice the larger one. If the mean
    # were rounded above the best class, no class would be left.
    mean = ((a + b) + (c + d)) / 4
    return (corners - mean).amax(dim=(1, 2)) >= 0


def _ranked(candidates: Tensor, most: int) -> Tensor:
    """Candidate classes of each cell in rising order: (C, M) bool -> (most, M) int64."""
    classes = torch.arange(len(candidates), device=candidates.device)[:, None]
    rank = (candidates.cumsum(0) - 1).where(candidates, most)
    ranked = classes.new_zeros(most + 1, candidates.shape[1])
    return ranked.scatter_(0, rank, classes.expand_as(rank))[:most]


def _fill_mixed(
    output: Tensor, low: Tensor, best: Tensor, rows: InterpAxis, columns: InterpAxis
) -> None:
    """Write the pixels of those of M cells that have several candidate classes.

    output: (H, W) uint8, written to; low: (C, h, w); best: (h, w) uint8, argmax of low
    """
    corners = _at_nodes(low, rows, columns)
    if len(rows.nodes) > 2:
        corners[:, 2] = corners[:, 1].lerp(corners[:, 2], rows.reach)
    if len(columns.nodes) > 2:
        corners[:, :, 2] = corners[:, :, 1].lerp(corners[:, :, 2], columns.reach)
    candidates = _candidate_classes(corners, _at_nodes(best, rows, columns))
    number, order = candidates.sum(dim=0).sort(descending=True)
    ranks = torch.arange(int(number[0]), device=low.device)
    counts = (number > ranks[:, None]).sum(1).tolist()  # cells with a first, second, .. candidate
    if len(counts) < 2:
        return
    counts[0] = counts[1]
    order = order[: counts[0]]
    rows, columns = rows.select(order), columns.select(order)
    corners = corners.index_select(-1, order)
    ranked = _ranked(candidates.index_select(-1, order), len(counts))

    def scores() -> Iterator[Tensor]:
        """Of each candidate in all pixels of the cells that have it: (K, K, count)."""
        for classes, n in zip(ranked, counts, strict=True):
            index = classes[:n].expand(1, *corners.shape[1:3], n)
            values = corners[..., :n].gather(0, index)[0, :, None]  # (V, 1, V, n)
            values = _mix(values, rows.weights[:, :, None, :n]).transpose(0, 1)  # (V, K, n)
            yield _mix(values[:, :, None], columns.weights[:, None, :, :n])

    labels = _first_best(
        scores(), (c[:n] for c, n in zip(ranked.to(torch.uint8), counts, strict=True))
    )
    pixels = rows.members[:, None] * output.shape[1] + columns.members  # (K, K, mixed)
    output.view(-1).scatter_(0, pixels.view(-1), labels.view(-1))


def _fill(output: Tensor, low: Tensor, rows: InterpAxis, columns: InterpAxis) -> None:
    """Write a label map: low (C, h, w) -> output (H, W) uint8."""
    best = _first_best(low, range(len(low)))
    of_cell = best.index_select(0, rows.nodes[0]).index_select(1, columns.nodes[0])
    torch.index_select(of_cell.index_select(1, columns.cell), 0, rows.cell, out=output)
    differs = torch.zeros_like(of_cell, dtype=torch.bool)
    for a, b in itertools.product(rows.nodes, columns.nodes):
        differs |= best.index_select(0, a).index_select(1, b) != of_cell
    pixels = len(rows.members) * len(columns.members)
    logits = len(rows.nodes) * len(columns.nodes) * len(low)
    for cells in differs.nonzero().split(max(1, CHUNK // max(pixels, logits))):
        if len(cells):
            y, x = cells.unbind(1)
            _fill_mixed(output, low, best, rows.select(y), columns.select(x))


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
    rows, columns = (
        _interp_axis(*lengths, low.device)
        for lengths in zip(low.shape[-2:], network_size, size, strict=True)
    )
    output = torch.empty((len(low), *size), dtype=torch.uint8, device=low.device)
    for labels, image in zip(output, low, strict=True):
        _fill(labels, image.contiguous(), rows, columns)
    return output
