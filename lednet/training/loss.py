"""Class-weighted cross-entropy, and where the class weights come from."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lednet.data.labels import IGNORE_INDEX

WEIGHT_OFFSETS = {"encoder": 1.20, "decoder": 1.10}
"""c of the weight 1 / ln(c + share), for each training stage (ENet, arXiv 1606.02147)."""

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
    """1 / ln(offset + share) for each class: the rarer, the heavier.

    Args:
        shares: of all pixels, void included in the total, in [0, 1].
        offset: c; 1.02 to 1.2 in the literature, see `WEIGHT_OFFSETS`.
    """
    return 1.0 / np.log(offset + np.asarray(shares, dtype=np.float64))


def resize_target(target: Tensor, size: tuple[int, int]) -> Tensor:
    """Nearest-neighbour labels at another size, each taken at its cell's centre.

    target: (N, H, W) integers -> (N, *size)
    """
    if target.shape[-2:] == torch.Size(size):
        return target
    floats = target[:, None].float()  # exact: class indices are below 256
    return F.interpolate(floats, size, mode="nearest-exact")[:, 0].to(target.dtype)


class WeightedCrossEntropy(nn.Module):
    """Cross-entropy whose mean is weighted by class; void pixels count nothing.

    It returns numerator and denominator, so that several processes can divide by
    their joint denominator and get the gradient of the joint batch.

    Args:
        weights: one for each class that counts; outputs beyond them (void) weigh 0.
        num_outputs: channels of the logits.
    """

    weight: Tensor

    def __init__(
        self,
        weights: Sequence[float] | np.ndarray,
        num_outputs: int,
        region: str | None = None,
        label_smoothing: float = 0.0,
        hardest: float = 1.0,
    ):
        super().__init__()
        self.region = {None: None, "lovasz": lovasz_softmax, "dice": soft_dice}[region]
        self.label_smoothing, self.hardest = label_smoothing, hardest
        weight = torch.zeros(num_outputs)
        weight[: len(weights)] = torch.as_tensor(np.asarray(weights), dtype=torch.float32)
        self.register_buffer("weight", weight)

    def forward(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """
        Args:
            logits: (N, num_outputs, h, w).
            target: (N, H, W) class indices, void `IGNORE_INDEX`; resized to (h, w).

        Returns:
            Sum of the weighted losses, and sum of the weights (0 where all is void).
        """
        target = resize_target(target, logits.shape[-2:])
        logits = logits.float()
        if self.hardest < 1:
            return self._bootstrapped(logits, target)
        total = F.cross_entropy(
            logits,
            target,
            self.weight,
            ignore_index=IGNORE_INDEX,
            reduction="sum",
            label_smoothing=self.label_smoothing,
        )
        counted = torch.bincount(target.flatten(), minlength=256)[: len(self.weight)]
        weight = (counted * self.weight).sum()
        if self.region is not None:
            probabilities = logits[..., ::2, ::2].softmax(1)
            present = self.weight.nonzero().flatten().tolist()
            total = total + weight * self.region(probabilities, target[..., ::2, ::2], present)
        return total, weight

    def _bootstrapped(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Of the hardest share of the labelled pixels only (arXiv 1604.04339)."""
        losses = F.cross_entropy(logits, target, ignore_index=IGNORE_INDEX, reduction="none")
        labelled = target != IGNORE_INDEX
        losses, weights = losses[labelled], self.weight[target[labelled]]
        if not len(losses):
            return losses.sum(), weights.sum()
        count = max(1, round(self.hardest * len(losses)))
        hardest = losses.detach().topk(count, sorted=False).indices
        return (losses[hardest] * weights[hardest]).sum(), weights[hardest].sum()


def lovasz_softmax(probabilities: Tensor, target: Tensor, classes: Sequence[int]) -> Tensor:
    """Lovasz-softmax over the classes that occur in the batch (arXiv 1705.08790).

    probabilities: (N, C, h, w); target: (N, h, w), void `IGNORE_INDEX` -> mean over classes
    """
    labelled = target != IGNORE_INDEX
    flat, labels = probabilities.permute(0, 2, 3, 1)[labelled], target[labelled]
    losses = []
    for index in classes:
        truth = (labels == index).float()
        if truth.any():
            errors, order = (truth - flat[:, index]).abs().sort(descending=True)
            truth = truth[order]
            jaccard = 1 - (truth.sum() - truth.cumsum(0)) / (truth.sum() + (1 - truth).cumsum(0))
            losses.append(errors @ torch.diff(jaccard, prepend=jaccard.new_zeros(1)))
    return torch.stack(losses).mean() if losses else flat.sum() * 0


def soft_dice(probabilities: Tensor, target: Tensor, classes: Sequence[int]) -> Tensor:
    """1 - Dice coefficient over the classes that occur in the batch (arXiv 1606.04797, with
    plain sums below).

    As `lovasz_softmax`.
    """
    labelled = target != IGNORE_INDEX
    flat, labels = probabilities.permute(0, 2, 3, 1)[labelled], target[labelled]
    losses = []
    for index in classes:
        truth = (labels == index).float()
        if truth.any():
            overlap = 2 * (flat[:, index] * truth).sum()
            losses.append(1 - overlap / (flat[:, index].sum() + truth.sum()))
    return torch.stack(losses).mean() if losses else flat.sum() * 0
