"""Alignment of labels with their images: class borders compared with image edges."""

import numpy as np
import torch
from torch import Tensor


def edge_alignment(thumbnails: np.ndarray, regions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Score how well each label is aligned with its image.

    The score is the correlation of the label's border pixels with the rank of the image's
    gradient magnitude.

    Args:
        thumbnails: (N, h, w) uint8, grey images.
        regions: (N, h, w) uint8, label values at the same pixels.

    Returns:
        Two arrays (N,) float32: the score in [-1, 1], 0 for a label without borders; and the share
        of the other labels that have a higher score with the same image.
    """
    if not len(thumbnails):
        return np.empty(0, np.float32), np.empty(0, np.float32)
    borders = _standardize(_gradients(torch.from_numpy(regions).short()).ne(0).float())
    gradients = _gradients(torch.from_numpy(thumbnails).short())
    scores, better = [], []
    for start in range(0, len(gradients), 256):
        block = gradients[start : start + 256]
        ranks = _standardize(block.argsort(dim=1).argsort(dim=1).float())
        correlations = ranks @ borders.T / ranks.shape[1]  # (256, N)
        own = correlations.diagonal(start)
        scores.append(own)
        above = (correlations > own[:, None]).float().sum(dim=1)
        better.append(above / max(1, len(gradients) - 1))
    return torch.cat(scores).numpy(), torch.cat(better).numpy()


def _gradients(images: Tensor) -> Tensor:
    """Sum of absolute differences to the right and lower neighbours, (N, h, w) -> (N, P)."""
    right = images[:, :-1, 1:] - images[:, :-1, :-1]
    below = images[:, 1:, :-1] - images[:, :-1, :-1]
    return (right.abs() + below.abs()).flatten(1)


def _standardize(rows: Tensor) -> Tensor:
    """Rows (N, P) with mean 0 and standard deviation 1; constant rows become 0."""
    rows = rows - rows.mean(dim=1, keepdim=True)
    return rows / rows.square().mean(dim=1, keepdim=True).sqrt().clamp(min=1e-6)
