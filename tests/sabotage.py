"""train/main.py with a fault built in.

    python tests/sabotage.py nan 3 --datadir ...    the loss of the third step is NaN
    python tests/sabotage.py bug 3 --datadir ...    the third step raises an unexpected error
    python tests/sabotage.py full 2 --datadir ...   the disk is full at the second checkpoint

The other arguments are passed to train/main.py.
"""

import errno
import itertools
import math
import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from lednet.training.losses import WeightedCrossEntropy

ROOT = Path(__file__).resolve().parents[1]

CHECKPOINT_BYTES = 8e6
"""Only checkpoints, which have the optimizer's state, are larger."""


def change_loss(number: int, change: Callable[[Tensor], Tensor]) -> None:
    forward, steps = WeightedCrossEntropy.forward, itertools.count(1)

    def changed(self, logits, target):
        total, weight = forward(self, logits, target)
        in_training = torch.is_grad_enabled()
        return (change(total) if in_training and next(steps) == number else total), weight

    WeightedCrossEntropy.forward = changed


def fill_disk(number: int) -> None:
    fsync, checkpoints = os.fsync, itertools.count(1)

    def full(descriptor: int) -> None:
        large = os.fstat(descriptor).st_size > CHECKPOINT_BYTES
        if large and next(checkpoints) == number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    os.fsync = full


if __name__ == "__main__":
    _, fault, number, *flags = sys.argv
    if fault == "full":
        fill_disk(int(number))
    else:
        change_loss(int(number), (lambda x: x * math.nan) if fault == "nan" else (lambda x: x[0]))
    sys.argv = [str(ROOT / "train/main.py"), *flags]
    runpy.run_path(sys.argv[0], run_name="__main__")
