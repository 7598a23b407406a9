"""Images that look alike: copies, and frames that one drive took a moment apart.

They are compared as small grey thumbnails, whose contrasts are evened out first, so that
neither light nor shadow nor the sky above every street decides. A camera that drives on
sees the middle of its picture enlarged: each image is compared with crops of the other.
"""

import itertools
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2.functional import gaussian_blur
from tqdm import tqdm

THUMBNAIL = (48, 64)
"""(height, width) of a thumbnail in pixels, whatever the image's proportions."""

SAME = 0.98
"""Similarity from which two images are copies of each other, changed in light, size or codec."""

CLOSE = 0.45
"""Similarity from which they show one place. Of 100,000 pairs of unrelated streets (CamVid's
recordings and cities of Cityscapes, against each other) none has more than 0.35; two frames of
CamVid that are a second apart have 0.47 (median)."""

OUTSTANDING = 8.0
"""And by how many deviations above the median of all pairs it must lie: of a camera that stands
still, or of images that are drawn, any two look somewhat alike."""

_COMPARED = (24, 32)  # (height, width) that crops are compared at
_ZOOMS = (1, 1.1, 1.2, 1.35, 1.5, 1.7)
_SHIFTS = (-0.08, 0, 0.08)  # of a crop's middle, in units of the picture
_BLOCK = 64


class NearDuplicate(NamedTuple):
    """An image of one split that shows what an image of another one shows.

    Attributes:
        image, other: indices; `other` is the most similar one.
        similarity: of the two, up to 1.
        direct: whether that is enough by itself; otherwise the image follows, in the chain of
            similar images of its own split, on one for which it is.
    """

    image: int
    other: int
    similarity: float
    direct: bool


def find_near_duplicates(images: np.ndarray, others: np.ndarray) -> list[NearDuplicate]:
    """Those among `images` of one split that also show what `others`, another split, show.

    images, others: thumbnails, (N, *THUMBNAIL) uint8. Shows a progress bar.
    """
    if not len(images) or not len(others):
        return []
    similarity = similarities(images, others)
    least = _threshold(similarity)
    nearest, best = similarity.argmax(axis=1), similarity.max(axis=1)
    direct = best >= least
    found = direct
    if direct.any():
        linked = similarities(images, images) >= least
        while (more := found | linked[:, found].any(axis=1)).sum() > found.sum():
            found = more
    return [
        NearDuplicate(int(i), int(nearest[i]), float(best[i]), bool(direct[i]))
        for i in found.nonzero()[0]
    ]


def most_telling(lookalikes: list[NearDuplicate], count: int) -> list[NearDuplicate]:
    """The most similar of the direct ones, one for each of the other images."""
    direct = [one for one in lookalikes if one.direct]
    best = {one.other: one for one in sorted(direct, key=lambda one: one.similarity)}
    return sorted(best.values(), key=lambda one: -one.similarity)[:count]


def find_copies(images: np.ndarray) -> list[tuple[int, int]]:
    """Pairs (i, j), i < j, of the same picture among thumbnails (N, *THUMBNAIL) uint8.

    Of several copies each but the first is paired with the one before it.
    """
    if not len(images):
        return []
    whole = _crops(_even(images), [_WHOLE])[:, 0]
    pairs = []
    for start in range(0, len(whole), _BLOCK):
        rows = whole[start : start + _BLOCK] @ whole[: start + _BLOCK].T
        for i, similar in enumerate((rows >= SAME).numpy(), start):
            before = similar[:i].nonzero()[0]
            if len(before):
                pairs.append((int(before[-1]), i))
    return pairs


def similarities(images: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Similarity of each image to each other one, (len(images), len(others)) float32."""
    mine, theirs = _even(images), _even(others)
    with tqdm(total=len(mine) + len(theirs), desc="comparing", unit="image", leave=False) as bar:
        forward = _best_crop(theirs, mine, bar).T
        return np.maximum(forward, _best_crop(mine, theirs, bar))


def _best_crop(images: Tensor, others: Tensor, bar: tqdm) -> np.ndarray:
    """Of each image, as a whole, to the most similar crop of each other."""
    whole = _crops(images, [_WHOLE])[:, 0]  # (N, D)
    columns = []
    for block in others.split(_BLOCK):
        crops = _crops(block, _BOXES)  # (B, K, D)
        columns.append(torch.stack([(whole @ k.T).amax(1) for k in crops], dim=1))
        bar.update(len(block))
    return torch.cat(columns, dim=1).numpy()


def _threshold(similarity: np.ndarray) -> float:
    median = np.median(similarity)
    deviation = 1.4826 * np.median(np.abs(similarity - median))  # of a normal distribution
    return float(np.clip(median + OUTSTANDING * deviation, CLOSE, SAME))


def _even(thumbnails: np.ndarray) -> Tensor:
    """What is lighter or darker than its surroundings, in units of their contrast.

    thumbnails: (N, h, w) uint8 -> (N, 1, h, w) float32
    """
    pixels = torch.from_numpy(thumbnails)[:, None].float()
    detail = pixels - gaussian_blur(pixels, [9, 9], [2.0, 2.0])
    contrast = gaussian_blur(detail.square(), [17, 17], [4.0, 4.0]).sqrt()
    return detail / (contrast + 6)  # so that noise in an even area stays small


def _boxes() -> list[tuple[int, int, int, int]]:
    """Top, bottom, left and right of every crop in a thumbnail."""
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


def _crops(pictures: Tensor, boxes: list[tuple[int, int, int, int]]) -> Tensor:
    """Each crop of each picture as a vector of length 1; one without contrast is shorter.

    pictures: (N, 1, h, w) -> (N, len(boxes), D)
    """
    parts = [
        F.interpolate(pictures[..., top:bottom, left:right], _COMPARED, mode="bilinear",
                      antialias=True)
        for top, bottom, left, right in boxes
    ]  # fmt: skip
    vectors = torch.cat(parts, dim=1).flatten(2)
    vectors -= vectors.mean(dim=2, keepdim=True)
    return vectors / vectors.norm(dim=2, keepdim=True).clamp(min=3)
