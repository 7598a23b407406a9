"""Whether labels lie on their images: the borders in the one on the edges in the other."""

import numpy as np
import torch
from torch import Tensor


def edge_alignment(thumbnails: np.ndarray, regions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How well each label fits its image, and whether others would fit better.

    The fit is the correlation of the label's borders with the rank of the image's
    differences from pixel to pixel.

    thumbnails, regions: (N, h, w) uint8, grey pixels and label values -> two of (N,) float32:
    the fit, -1 to 1 (0 for a label without borders), and the share of the other labels that
    fit the image better.
    """
    if not len(thumbnails):
        return np.empty(0, np.float32), np.empty(0, np.float32)
    borders = _standardized(_steps(torch.from_numpy(regions).short()).ne(0).float())
    steps = _steps(torch.from_numpy(thumbnails).short())
    fit, better = [], []
    for start in range(0, len(steps), 256):
        block = steps[start : start + 256]
        ranks = _standardized(block.argsort(dim=1).argsort(dim=1).float())
        fits = ranks @ borders.T / ranks.shape[1]  # (256, N)
        own = fits.diagonal(start)[:, None]
        fit.append(own[:, 0])
        better.append((fits > own).float().sum(dim=1) / max(1, len(steps) - 1))
    return torch.cat(fit).numpy(), torch.cat(better).numpy()


def _steps(pictures: Tensor) -> Tensor:
    """Differences to the right and the lower neighbour, added up: (N, h, w) -> (N, P)."""
    right = pictures[:, :-1, 1:] - pictures[:, :-1, :-1]
    below = pictures[:, 1:, :-1] - pictures[:, :-1, :-1]
    return (right.abs() + below.abs()).flatten(1)


def _standardized(rows: Tensor) -> Tensor:
    rows = rows - rows.mean(dim=1, keepdim=True)
    return rows / rows.square().mean(dim=1, keepdim=True).sqrt().clamp(min=1e-6)
