"""Near-duplicate images: copies, and frames of one recording a moment apart.

Images are compared as small grey thumbnails after local contrast normalization, so that
illumination, shadows and the sky have little influence. A forward-moving camera enlarges the
centre of its image, so each image is also compared with crops of the other.
"""

import itertools
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2.functional import gaussian_blur
from tqdm import tqdm

from lednet.progress import progress_bar

THUMBNAIL = (48, 64)
"""(height, width) of a thumbnail in pixels, for any aspect ratio of the image."""

COPY_SIMILARITY = 0.98
"""Least similarity of copies, which may differ in illumination, size or compression."""

MIN_SIMILARITY = 0.45
"""Least similarity of images of the same place. Of 100,000 pairs of unrelated streets (recordings
of CamVid and cities of Cityscapes) none exceeds 0.35; the median of CamVid frames one second apart
is 0.47."""

MIN_DEVIATIONS = 8.0
"""Robust standard deviations above the median of all pairs that are also required. With a fixed
camera, or with drawings, any two images are similar to some degree."""

_COMPARED = (24, 32)  # (height, width) at which crops are compared
_ZOOMS = (1, 1.1, 1.2, 1.35, 1.5, 1.7)
_SHIFTS = (-0.08, 0, 0.08)  # of a crop's centre, as a share of the image's size
_BLOCK = 64


class NearDuplicate(NamedTuple):
    """An image of one split that shows the same place as an image of another.

    Attributes:
        image, other: indices; `other` is the most similar image.
        similarity: similarity of the two, up to 1.
        direct: whether the similarity exceeds the threshold. Otherwise a chain of similar images
            in its own split links the image to one for which it does.
    """

    image: int
    other: int
    similarity: float
    direct: bool


def find_near_duplicates(images: np.ndarray, others: np.ndarray) -> list[NearDuplicate]:
    """Find the images of one split that show the same place as an image of another split.

    Args:
        images, others: thumbnails of the two splits, (N, *THUMBNAIL) uint8.
    """
    if not len(images) or not len(others):
        return []
    similarity = similarities(images, others)
    median = np.median(similarity)
    deviation = 1.4826 * np.median(np.abs(similarity - median))  # robust standard deviation
    least = np.clip(median + MIN_DEVIATIONS * deviation, MIN_SIMILARITY, COPY_SIMILARITY)
    nearest, best = similarity.argmax(axis=1), similarity.max(axis=1)
    found = direct = best >= least
    if direct.any():
        linked = similarities(images, images) >= least
        while (more := found | linked[:, found].any(axis=1)).sum() > found.sum():
            found = more
    return [
        NearDuplicate(int(i), int(nearest[i]), float(best[i]), bool(direct[i]))
        for i in found.nonzero()[0]
    ]


def most_similar(duplicates: list[NearDuplicate], count: int) -> list[NearDuplicate]:
    """The most similar direct duplicates, at most one for each of the other images."""
    direct = [one for one in duplicates if one.direct]
    best = {one.other: one for one in sorted(direct, key=lambda one: one.similarity)}
    return sorted(best.values(), key=lambda one: -one.similarity)[:count]


def find_copies(images: np.ndarray) -> list[tuple[int, int]]:
    """Find pairs (i, j), i < j, of copies among thumbnails (N, *THUMBNAIL) uint8.

    Each of several copies but the first is paired with the previous one.
    """
    if not len(images):
        return []
    whole = _crops(_normalize_contrast(images), [_WHOLE])[:, 0]
    pairs = []
    for i, image in enumerate(whole):
        previous = (whole[:i] @ image >= COPY_SIMILARITY).nonzero()
        if len(previous):
            pairs.append((int(previous[-1]), i))
    return pairs


def similarities(images: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Pairwise similarities, (len(images), len(others)) float32. Shows a progress bar."""
    mine, theirs = _normalize_contrast(images), _normalize_contrast(others)
    with progress_bar(total=len(mine) + len(theirs), desc="comparing", unit="image") as bar:
        return np.maximum(_best_crop(theirs, mine, bar).T, _best_crop(mine, theirs, bar))


def _best_crop(images: Tensor, others: Tensor, bar: tqdm) -> np.ndarray:
    """Similarity of each whole image to the most similar crop of each other image."""
    whole = _crops(images, [_WHOLE])[:, 0]  # (N, D)
    columns = []
    for block in others.split(_BLOCK):
        crops = _crops(block, _BOXES)  # (B, K, D)
        columns.append(torch.stack([(whole @ k.T).amax(1) for k in crops], dim=1))
        bar.update(len(block))
    return torch.cat(columns, dim=1).numpy()


def _normalize_contrast(thumbnails: np.ndarray) -> Tensor:
    """Local contrast normalization, (N, h, w) uint8 -> (N, 1, h, w) float32."""
    pixels = torch.from_numpy(thumbnails)[:, None].float()
    detail = pixels - gaussian_blur(pixels, [9, 9], [2.0, 2.0])
    contrast = gaussian_blur(detail.square(), [17, 17], [4.0, 4.0]).sqrt()
    return detail / (contrast + 6)  # limits noise in uniform areas


def _boxes() -> list[tuple[int, int, int, int]]:
    """(top, bottom, left, right) of every crop of a thumbnail."""
    height, width = THUMBNAIL
    boxes = set()
    for zoom, down, right in itertools.product(_ZOOMS, _SHIFTS, _SHIFTS):
        rows, columns = round(height / zoom), round(width / zoom)
        top = min(max(0, round((height - rows) / 2 + down * height)), height - rows)
        left = min(max(0, round((width - columns) / 2 + right * width)), width - columns)
        boxes.add((top, top + rows, left, left + columns))
    return sorted(boxes)


_WHOLE = (0, THUMBNAIL[0], 0, THUMBNAIL[1])
_BOXES = _boxes()


def _crops(images: Tensor, boxes: list[tuple[int, int, int, int]]) -> Tensor:
    """Crops as standardized vectors, (N, 1, h, w) -> (N, len(boxes), D).

    They have length 1; crops of little contrast are shorter.
    """
    parts = [
        F.interpolate(images[..., top:bottom, left:right], _COMPARED, mode="bilinear",
                      antialias=True)
        for top, bottom, left, right in boxes
    ]  # fmt: skip
    vectors = torch.cat(parts, dim=1).flatten(2)
    vectors -= vectors.mean(dim=2, keepdim=True)
    return vectors / vectors.norm(dim=2, keepdim=True).clamp(min=3)
