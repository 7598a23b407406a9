"""Evaluation of label maps on a data set."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from lednet.data.labels import IGNORE_INDEX
from lednet.errors import UserError
from lednet.metrics import ConfusionMatrix

LabelMapper = Callable[..., list[Tensor]]
"""(images (N, 3, H, W) uint8, *sizes) -> a label map (N, *size) uint8 for each (height, width), as
`Predictor.label_maps`."""


def evaluate(
    label_maps: LabelMapper,
    batches: Iterable[tuple[Tensor, Tensor]],
    num_classes: int,
    device: torch.device | str = "cpu",
) -> ConfusionMatrix:
    """Score predictions at the labels' size.

    Args:
        label_maps: prediction function.
        batches: images (N, 3, H, W) uint8 and class indices (N, H', W').
        num_classes: number of classes without void.
        device: device of the label maps.
    """
    confusion = ConfusionMatrix(num_classes, device)
    for images, target in batches:
        (labels,) = label_maps(images, tuple(target.shape[-2:]))
        confusion.update(labels, target.to(device))
    return confusion


def require_labels(confusion: ConfusionMatrix, where: str) -> None:
    """Check that there were labelled pixels to score.

    Raises:
        UserError: all pixels are void, as in a split whose labels are withheld.
    """
    if confusion.counts.sum() == 0:
        raise UserError(
            f"{where} has no labelled pixel (all are void, {IGNORE_INDEX}): choose another split"
        )
