"""Tasks: augmentation, loss and metrics of segmentation and of classification."""

from collections.abc import Sequence
from typing import Any, Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lednet.data.classification_transforms import ImageAugmentation
from lednet.data.transforms import Augmentation
from lednet.metrics import ConfusionMatrix
from lednet.model import argmax_at
from lednet.training.losses import WeightedCrossEntropy, resize_target


class Task(Protocol):
    """What `Trainer` needs to know about a task.

    Attributes:
        score: key of the result of `compute` that decides which epoch is best; more is better.
        score_name: its name in plots and messages.
    """

    score: str
    score_name: str

    def to(self, device: torch.device, /) -> Self: ...

    def augment(
        self, images: Tensor, target: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Turn a uint8 training batch into the input of the network and its target."""

    def normalize(self, images: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Turn a uint8 validation batch into input and target, without augmentation."""

    def loss(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """The sum of the losses, and the sum of the weights by which it is to be divided."""

    def new_state(self) -> Tensor:
        """Statistics of no batch: integers, all 0."""

    def update(self, counts: Tensor, logits: Tensor, target: Tensor, exact: bool) -> None:
        """Add a batch to the statistics `counts`.

        Args:
            exact: as in published results; otherwise, for training batches, a faster way.
        """

    def compute(self, counts: Tensor) -> dict[str, Any]:
        """Metrics from the statistics, ready for JSON; a single number under `score`."""


class Segmentation(nn.Module):
    """Semantic segmentation.

    Args:
        criterion: the loss.
        augmentation: augmentation of images (N, 3, H, W) and labels (N, H, W), both uint8.
        classes: names of the classes, without void.
    """

    score, score_name = "miou", "mIoU"

    def __init__(
        self, criterion: WeightedCrossEntropy, augmentation: Augmentation, classes: Sequence[str]
    ):
        super().__init__()
        self.loss, self.augment = criterion, augmentation
        self.classes, self.normalize = classes, augmentation.normalize

    def _confusion(self, counts: Tensor) -> ConfusionMatrix:
        confusion = ConfusionMatrix(len(self.classes), counts.device)
        confusion.counts = counts
        return confusion

    def new_state(self) -> Tensor:
        return ConfusionMatrix(len(self.classes), self.loss.weight.device).counts

    def update(self, counts: Tensor, logits: Tensor, target: Tensor, exact: bool) -> None:
        """Update at the size of the target or, if not `exact`, of the logits."""
        if exact:
            predicted = argmax_at(logits, target.shape[-2:])
        else:
            predicted, target = logits.argmax(1), resize_target(target, logits.shape[-2:])
        self._confusion(counts).update(predicted, target)

    def compute(self, counts: Tensor) -> dict[str, Any]:
        """ "miou", and "class_iou" by class name; None for absent classes."""
        summary = self._confusion(counts).summary(self.classes)
        return {name: summary[name] for name in ("miou", "class_iou")}


class Classification(nn.Module):
    """Image classification.

    Args:
        augmentation: augmentation of images (N, 3, S, S) uint8 and targets (N, 3); may return
            soft labels.
        classes: names of the classes.
        label_smoothing: share of each training target that is spread over all classes.
    """

    score, score_name = "top1", "top-1"

    def __init__(
        self, augmentation: ImageAugmentation, classes: Sequence[str], label_smoothing: float = 0.0
    ):
        super().__init__()
        self.augmentation, self.normalize = augmentation, augmentation.normalize
        self.classes, self.label_smoothing = classes, label_smoothing

    def augment(
        self, images: Tensor, target: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        images, labels = self.augmentation(images, target, generator)
        if self.label_smoothing:
            if labels.ndim == 1:
                labels = F.one_hot(labels, len(self.classes)).float()
            uniform = torch.full_like(labels, 1 / len(self.classes))
            labels = torch.lerp(labels, uniform, self.label_smoothing)
        return images, labels

    def loss(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """
        Args:
            logits: (N, C).
            target: (N,) int64, or (N, C) float shares.

        Returns:
            Sum of the cross-entropies, and N.
        """
        total = F.cross_entropy(logits.float(), target, reduction="sum")
        return total, total.new_tensor(float(len(logits)))

    def new_state(self) -> Tensor:
        """(3,) numbers of images: correct top-1, correct top-5, all."""
        return torch.zeros(3, dtype=torch.int64, device=self.augmentation.mean.device)

    def update(self, counts: Tensor, logits: Tensor, target: Tensor, exact: bool) -> None:
        """Soft targets count as their most probable class."""
        if target.ndim == 2:
            target = target.argmax(1)
        hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == target[:, None]
        total = torch.tensor(len(hits), device=hits.device)
        counts += torch.stack((hits[:, 0].sum(), hits.sum(), total))

    def compute(self, counts: Tensor) -> dict[str, Any]:
        """ "top1" and "top5" accuracy in [0, 1]; None without images."""
        first, five, total = counts.tolist()
        if not total:
            return {"top1": None, "top5": None}
        return {"top1": first / total, "top5": five / total}
