"""train/main.py with a fault built in.

    python tests/sabotage.py nan 3 --datadir ...    the third step's loss is no number
    python tests/sabotage.py bug 3 --datadir ...    it raises what nobody expects
    python tests/sabotage.py full 2 --datadir ...   the disk is full at the second checkpoint

The other arguments go to train/main.py.
"""

import errno
import itertools
import math
import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

import torch
from torch import Tensor

from lednet.training.losses import WeightedCrossEntropy

CHECKPOINT_BYTES = 8e6
"""With the optimizer's state a checkpoint has more, and no other file of a run has."""


def change_loss(number: int, change: Callable[[Tensor], Tensor]) -> None:
    forward, steps = WeightedCrossEntropy.forward, itertools.count(1)

    def changed(self, logits, target):
        total, weight = forward(self, logits, target)
        in_training = torch.is_grad_enabled()
        return (change(total) if in_training and next(steps) == number else total), weight

    WeightedCrossEntropy.forward = changed


def poison_loss(number: int) -> None:
    change_loss(number, lambda total: total * math.nan)


def raise_error(number: int) -> None:
    change_loss(number, lambda total: total[0])


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
    {"nan": poison_loss, "bug": raise_error, "full": fill_disk}[fault](int(number))
    sys.argv = [str(ROOT / "train/main.py"), *flags]
    runpy.run_path(sys.argv[0], run_name="__main__")
