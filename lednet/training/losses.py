"""Class-weighted cross-entropy, and class weights."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lednet.data.labels import IGNORE_INDEX

WEIGHT_OFFSETS = {"encoder": 1.20, "decoder": 1.10}
"""The constant c of the weights 1 / ln(c + share) in each stage (ENet, arXiv 1606.02147)."""

RELEASED_WEIGHTS: dict[str, tuple[float, ...]] = {
    "encoder": (
        2.3654, 4.4238, 2.9691, 5.3442, 5.2984, 5.2275, 5.4394, 5.3660, 3.4170, 5.2415,
        4.7376, 5.2286, 5.4551, 4.3019, 5.4264, 5.4332, 5.4338, 5.4631, 5.3947,
    ),
    "decoder": (
        2.8149, 6.9850, 3.7890, 9.9428, 9.7702, 9.5111, 10.3114, 10.0265, 4.6323, 9.5608,
        7.8698, 9.5169, 10.3737, 6.6616, 10.2605, 10.2879, 10.2898, 10.4054, 10.1381,
    ),
}  # fmt: skip
"""Weights of the 19 Cityscapes classes in the official release, for each training stage."""


def class_weights(shares: Sequence[float] | np.ndarray, offset: float) -> np.ndarray:
    """The weight 1 / ln(offset + share) of each class; rare classes have large weights.

    Args:
        shares: share of each class of all pixels, void included, in [0, 1].
        offset: the constant c, 1.02 to 1.2 in the literature; see `WEIGHT_OFFSETS`.
    """
    return 1.0 / np.log(offset + np.asarray(shares, dtype=np.float64))


def resize_target(target: Tensor, size: Sequence[int]) -> Tensor:
    """Resize labels by nearest-neighbour interpolation (pixel centres, "nearest-exact").

    target: (N, H, W) integers -> (N, *size)
    """
    if target.shape[-2:] == torch.Size(size):
        return target
    floats = target[:, None].float()  # exact: class indices are below 256
    return F.interpolate(floats, size, mode="nearest-exact")[:, 0].to(target.dtype)


class WeightedCrossEntropy(nn.Module):
    """Cross-entropy with class weights; void pixels are ignored.

    It returns numerator and denominator of the weighted mean, so that several processes can divide
    by their joint denominator.

    Args:
        weights: weight of each class; further outputs (void) have the weight 0.
        num_outputs: channels of the logits.
    """

    weight: Tensor
    weight_by_value: Tensor

    def __init__(self, weights: Sequence[float] | np.ndarray, num_outputs: int):
        super().__init__()
        weight = torch.zeros(num_outputs)
        weight[: len(weights)] = torch.as_tensor(np.asarray(weights), dtype=torch.float32)
        self.register_buffer("weight", weight)
        by_value = torch.zeros(IGNORE_INDEX + 1)
        by_value[:num_outputs] = weight
        self.register_buffer("weight_by_value", by_value, persistent=False)

    def forward(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Compute numerator and denominator of the loss.

        Args:
            logits: (N, num_outputs, h, w).
            target: (N, H, W) class indices, void `IGNORE_INDEX`; resized to (h, w).

        Returns:
            Sum of the weighted losses, and sum of the weights (0 if all pixels are void).
        """
        target = resize_target(target, logits.shape[-2:])
        losses = F.cross_entropy(
            logits.float(), target, self.weight, ignore_index=IGNORE_INDEX, reduction="none"
        )  # on CUDA, its own sum is not deterministic
        return losses.sum(), self.weight_by_value.take(target).sum()
