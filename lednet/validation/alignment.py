"""Alignment of labels with their images: class borders compared with image edges."""

import numpy as np
import torch
from torch import Tensor


def edge_alignment(thumbnails: np.ndarray, regions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Score how well each label is aligned with its image.

    The score is the correlation of the label's border pixels with the rank of the image's
    gradient magnitude.

    Args:
        thumbnails: (N, h, w) uint8, grey images, N > 0.
        regions: (N, h, w) uint8, label values at the same pixels.

    Returns:
        Two arrays (N,) float32: the score in [-1, 1], 0 for a label without borders; and the share
        of the other labels that have a higher score with the same image.
    """
    borders = _standardize(_gradients(regions).ne(0).float())
    scores, better = [], []
    for start, block in enumerate(_gradients(thumbnails).split(256)):
        ranks = _standardize(block.argsort(dim=1).argsort(dim=1).float())
        correlations = ranks @ borders.T / ranks.shape[1]  # (256, N)
        own = correlations.diagonal(256 * start)
        scores.append(own)
        better.append((correlations > own[:, None]).sum(dim=1) / max(1, len(borders) - 1))
    return torch.cat(scores).numpy(), torch.cat(better).numpy()


def _gradients(images: np.ndarray) -> Tensor:
    """Sum of absolute differences to the right and lower neighbours, (N, h, w) -> (N, P)."""
    pixels = torch.from_numpy(images).short()
    right = pixels[:, :-1, 1:] - pixels[:, :-1, :-1]
    lower = pixels[:, 1:, :-1] - pixels[:, :-1, :-1]
    return (right.abs() + lower.abs()).flatten(1)


def _standardize(rows: Tensor) -> Tensor:
    """Rows (N, P) with mean 0 and standard deviation 1; constant rows become 0."""
    rows = rows - rows.mean(dim=1, keepdim=True)
    return rows / rows.square().mean(dim=1, keepdim=True).sqrt().clamp(min=1e-6)
