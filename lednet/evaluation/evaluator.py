"""Run a predictor over a data set and count."""

from collections.abc import Iterable

from torch import Tensor

from lednet.data.labels import IGNORE_INDEX
from lednet.errors import UserError
from lednet.inference.predictor import Predictor
from lednet.metrics import ConfusionMatrix


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
