"""Run a network over a data set and count."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lednet.data.labels import IGNORE_INDEX
from lednet.deploy.predictor import Predictor, predict_at
from lednet.errors import UserError
from lednet.evaluation.metrics import ConfusionMatrix
from lednet.precision import autocast


class Evaluation(NamedTuple):
    """Result of `evaluate`: counts, and the two sums whose quotient is the mean loss."""

    confusion: ConfusionMatrix
    loss_sum: Tensor
    loss_weight: Tensor


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    num_classes: int,
    device: torch.device,
    precision: str = "fp32",
    criterion: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
) -> Evaluation:
    """Score `model`, in evaluation mode, on every image of `batches`, at the labels' size.

    Args:
        model: (N, 3, H, W) -> logits (N, C, h, w), C > `num_classes` where void has outputs.
        batches: images and targets (N, H', W').
        num_classes: classes that count.
        criterion: (logits, target) -> (loss sum, weight sum), if a loss is wanted.
    """
    was_training = model.training
    model.eval()
    confusion = ConfusionMatrix(num_classes, device)
    sums = torch.zeros(2, device=device)
    for images, target in batches:
        images = images.to(device, non_blocking=True)
        target = target.to(device, non_blocking=True)
        with autocast(device, precision):
            logits = model(images)
        logits = logits.float()
        if criterion is not None:
            sums += torch.stack(criterion(logits, target))
        confusion.update(predict_at(logits, target.shape[-2:]), target)
    model.train(was_training)
    return Evaluation(confusion, sums[0], sums[1])


def evaluate_predictor(
    predictor: Predictor, batches: Iterable[tuple[Tensor, Tensor]], num_classes: int
) -> ConfusionMatrix:
    """Score a predictor on images as they lie on disk, at the labels' size.

    Args:
        batches: images (N, 3, H, W) uint8 and class indices (N, H', W').
        num_classes: classes that count.
    """
    confusion = ConfusionMatrix(num_classes, predictor.device)
    for images, target in batches:
        (labels,) = predictor.label_maps(images, tuple(target.shape[-2:]))
        confusion.update(labels, target.to(predictor.device))
    return confusion


def require_labels(confusion: ConfusionMatrix, where: str) -> None:
    """Refuse a score without a labelled pixel, as on a split whose labels are withheld."""
    if confusion.counts.sum() == 0:
        raise UserError(
            f"{where} has no labelled pixel (all are void, {IGNORE_INDEX}): choose another split"
        )
