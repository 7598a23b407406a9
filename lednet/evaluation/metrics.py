"""Segmentation metrics from one integer confusion matrix, divided once, at the end."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class ConfusionMatrix:
    """Counts of (true class, predicted class) over any number of images.

    Pixels whose target is not a class (void) are left out, as the Cityscapes
    benchmark does; a prediction that is not a class (the network's void output) has
    a column of its own and counts as a miss of the true class.

    Args:
        num_classes: classes that count, void not among them.
        device: where the counts are kept; predictions are expected there.

    Attributes:
        counts: (num_classes, num_classes + 1) int64; rows are the truth.
    """

    def __init__(self, num_classes: int, device: torch.device | str = "cpu"):
        self.num_classes = num_classes
        self.counts = torch.zeros(num_classes, num_classes + 1, dtype=torch.int64, device=device)

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Add one batch.

        Args:
            prediction: (...) integers; `num_classes` and above stand for void.
            target: of the same shape; `num_classes` and above are left out.
        """
        if prediction.shape != target.shape:
            raise ValueError(f"prediction is {prediction.shape}, target {target.shape}")
        counted = target < self.num_classes
        columns = self.num_classes + 1
        predicted = prediction[counted].clamp(max=self.num_classes).long()
        cells = target[counted].long() * columns + predicted
        self.counts += torch.bincount(cells, minlength=self.counts.numel()).view_as(self.counts)

    def class_iou(self) -> Tensor:
        """(num_classes,) float64 in [0, 1]; NaN for a class that is in neither truth nor
        prediction."""
        counts = self.counts.cpu().double()
        hit = counts.diagonal()
        union = counts.sum(1) + counts[:, : self.num_classes].sum(0) - hit
        return hit / union  # 0 / 0 is NaN: the class is absent

    def mean_iou(self) -> float:
        """Mean of `class_iou` over the classes that are present; NaN if none is."""
        return self.class_iou().nanmean().item()

    def pixel_accuracy(self) -> float:
        """Share of counted pixels predicted rightly; NaN if none was counted."""
        counts = self.counts.cpu().double()
        return (counts.diagonal().sum() / counts.sum()).item()

    def summary(self, classes: Sequence[str]) -> dict[str, Any]:
        """Miou, class_iou by name (None where absent) and pixel_accuracy, ready for JSON."""
        return {
            "miou": none_if_nan(self.mean_iou()),
            "class_iou": {
                name: none_if_nan(iou)
                for name, iou in zip(classes, self.class_iou().tolist(), strict=True)
            },
            "pixel_accuracy": none_if_nan(self.pixel_accuracy()),
        }


def none_if_nan(value: float) -> float | None:
    """JSON has no NaN: what is absent is null."""
    return None if value != value else value
