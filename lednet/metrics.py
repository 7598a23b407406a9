"""Segmentation metrics, computed from an integer confusion matrix over all images."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def count_pairs(truth: Tensor, prediction: Tensor, rows: int, columns: int) -> Tensor:
    """Count each pair (true value, predicted value).

    Args:
        truth: (...) integers, 0 <= value < `rows`.
        prediction: of the same shape and device, 0 <= value < `columns`.

    Returns:
        (rows, columns) int64.
    """
    codes = truth.to(torch.int32) * columns + prediction  # int32: half the memory traffic of int64
    codes, bins = codes.flatten().int(), rows * columns
    if codes.is_cuda:  # bincount would wait for the GPU, to find the largest code
        counts = torch.histc(codes, bins, min=0, max=bins - 1).long()
    else:
        counts = torch.bincount(codes, minlength=bins)
    return counts.view(rows, columns)


class ConfusionMatrix:
    """Counts of (true class, predicted class) over any number of images.

    As in the Cityscapes benchmark, pixels whose target is not a class (void) are ignored. A
    prediction that is not a class (the network's void output) has a column of its own and counts
    as a miss of the true class.

    Args:
        num_classes: number of classes without void.
        device: device of the counts and of the predictions.

    Attributes:
        counts: (num_classes, num_classes + 1) int64; rows are the truth.
    """

    def __init__(self, num_classes: int, device: torch.device | str = "cpu"):
        self.num_classes = num_classes
        self.counts = torch.zeros(num_classes, num_classes + 1, dtype=torch.int64, device=device)

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Add one batch.

        Args:
            prediction: (...) integers; `num_classes` and above are void.
            target: integers of the same shape; `num_classes` and above are ignored.
        """
        if prediction.shape != target.shape:
            raise ValueError(f"prediction is {prediction.shape}, target {target.shape}")
        size = self.num_classes + 1  # the last row counts ignored pixels
        target, prediction = target.clamp(max=size - 1), prediction.clamp(max=size - 1)
        self.counts += count_pairs(target, prediction, size, size)[:-1]

    def class_iou(self) -> Tensor:
        """IoU of each class, float64; NaN for a class in neither truth nor prediction."""
        counts = self.counts.cpu().double()
        hit = counts.diagonal()
        union = counts.sum(1) + counts[:, : self.num_classes].sum(0) - hit
        return hit / union  # 0 / 0 is NaN: the class is absent

    def mean_iou(self) -> float:
        """Mean of `class_iou` over the classes present; NaN if there are none."""
        return self.class_iou().nanmean().item()

    def pixel_accuracy(self) -> float:
        """Share of the counted pixels that are predicted correctly; NaN if there are none."""
        counts = self.counts.cpu().double()
        return (counts.diagonal().sum() / counts.sum()).item()

    def frequency_weighted_iou(self) -> float:
        """Mean of `class_iou`, weighted by each class's share of the true pixels."""
        shares = self.counts.sum(1).cpu().double() / self.counts.sum().item()
        return (shares * self.class_iou().nan_to_num()).sum().item()

    def summary(self, classes: Sequence[str]) -> dict[str, Any]:
        """All scores as values for JSON, with None instead of NaN."""
        class_iou = map(none_if_nan, self.class_iou().tolist())
        return {
            "miou": none_if_nan(self.mean_iou()),
            "class_iou": dict(zip(classes, class_iou, strict=True)),
            "pixel_accuracy": none_if_nan(self.pixel_accuracy()),
            "frequency_weighted_iou": none_if_nan(self.frequency_weighted_iou()),
        }


def none_if_nan(value: float) -> float | None:
    """The value, or None for NaN, which JSON does not have."""
    return None if value != value else value
