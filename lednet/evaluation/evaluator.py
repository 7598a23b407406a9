"""Evaluation of label maps on a data set."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from lednet.data.labels import IGNORE_INDEX
from lednet.errors import UserError
from lednet.metrics import ConfusionMatrix

PREDICTED_ONLY = "predicted only"
"""A class that is in no label, but in predictions; see `class_presence`."""

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


def class_presence(
    class_iou: Mapping[str, float | None], true_pixels: Sequence[int]
) -> dict[str, str]:
    """Where each class occurs, in the order of `class_iou`.

    Args:
        class_iou: None or NaN for a class in neither labels nor predictions.
        true_pixels: pixels of each class in the labels.

    Returns:
        "present" in the labels; "predicted only", whose IoU is 0; or "absent", without an IoU.
    """
    return {
        name: "present" if pixels else "absent" if iou is None or iou != iou else PREDICTED_ONLY
        for (name, iou), pixels in zip(class_iou.items(), true_pixels, strict=True)
    }


def count_scored(presence: Mapping[str, str], noun: str = "classes") -> str:
    """How many are part of the mean, such as "16 of 19 classes"."""
    scored = sum(where != "absent" for where in presence.values())
    return f"{scored} of {len(presence)} {noun}"


def require_labels(confusion: ConfusionMatrix, where: str) -> None:
    """Check that there were labelled pixels to score.

    Raises:
        UserError: all pixels are void, as in a split whose labels are withheld.
    """
    if confusion.counts.sum() == 0:
        raise UserError(
            f"{where} has no labelled pixel (all are void, {IGNORE_INDEX}): choose another split"
        )
