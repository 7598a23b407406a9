"""Learning rate schedules: factors that depend on the progress of the training only.

Resumed runs therefore have the same learning rates.
"""

import math

POLY_POWER = 0.9
CONSTANT_EPOCHS, DECAY = 15, 0.95
WARMUP_START = 0.01


def poly(done: float, num_epochs: int) -> float:
    """(1 - epochs done / num_epochs) ** 0.9, one value an epoch: the paper's for segmentation."""
    return (1 - math.floor(done) / num_epochs) ** POLY_POWER


def exponential(done: float, num_epochs: int) -> float:
    """1 for 15 epochs, then times 0.95 an epoch: the release's for ImageNet."""
    return DECAY ** max(0, math.floor(done) + 1 - CONSTANT_EPOCHS)


def cosine(done: float, num_epochs: int) -> float:
    """Half a cosine from 1 to 0, one value a step (arXiv 1608.03983, without restarts)."""
    return (1 + math.cos(math.pi * done / num_epochs)) / 2


SCHEDULES = {"poly": poly, "exponential": exponential, "cosine": cosine}


def lr_factor(schedule: str, done: float, num_epochs: int, warmup: int = 0) -> float:
    """The factor of the learning rate.

    Args:
        schedule: a key of `SCHEDULES`.
        done: finished epochs, with the finished part of the current one; 0 <= done < num_epochs.
        num_epochs: length of the schedule, warm-up included.
        warmup: epochs of linear warm-up, which changes with every step.
    """
    if done < warmup:
        return WARMUP_START + (1 - WARMUP_START) * done / warmup
    return SCHEDULES[schedule](done - warmup, num_epochs - warmup)
