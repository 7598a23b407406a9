"""Learning-rate schedule, one value an epoch."""

from torch.optim import Optimizer

POLY_POWER = 0.9


def poly_factor(epoch: int, num_epochs: int) -> float:
    """(1 - (epoch - 1) / num_epochs) ** 0.9, the paper's decay; `epoch` counts from 1."""
    return (1 - (epoch - 1) / num_epochs) ** POLY_POWER


def set_poly_lr(optimizer: Optimizer, lr: float, epoch: int, num_epochs: int) -> None:
    """Set every learning rate for `epoch`; it depends on nothing else, so resuming is exact."""
    for group in optimizer.param_groups:
        group["lr"] = lr * poly_factor(epoch, num_epochs)
