"""Reading the losses of an epoch while it is training."""

import math

import torch
from torch import Tensor

READ_EVERY = 20
"""Steps on a GPU whose losses are read together."""


class LossReader:
    """Reads losses without making a GPU wait.

    On a CPU, a loss is read at once. On a GPU, the losses of `READ_EVERY` steps are copied
    together, and are read when the next group has been copied, so that a queue of steps remains.

    Args:
        device: device of the losses.

    Attributes:
        mean: weighted mean of the losses read so far; NaN before the first.
    """

    def __init__(self, device: torch.device):
        self.mean = math.nan
        self._on_gpu = device.type == "cuda"
        self._new: dict[int, Tensor] = {}
        self._copied: list[tuple[list[int], Tensor, torch.cuda.Event | None]] = []

    def add(self, step: int, loss: Tensor, sums: Tensor) -> dict[int, float]:
        """Add the loss of a step.

        Args:
            step: number of the step.
            loss: scalar.
            sums: (2,) sums of the losses and of their weights in the epoch so far.

        Returns:
            The losses that were read now, by step; often none.
        """
        self._new[step] = loss.clone()  # a CUDA graph writes the next one to the same memory
        if len(self._new) == (READ_EVERY if self._on_gpu else 1):
            self._copy(sums)
        return self._read(keep=1 if self._on_gpu else 0)

    def finish(self, sums: Tensor) -> dict[int, float]:
        """The losses that were not read yet, by step; `sums` as in `add`."""
        if self._new:
            self._copy(sums)
        return self._read(keep=0)

    def _copy(self, sums: Tensor) -> None:
        values = torch.stack([*sums, *self._new.values()]).to("cpu", non_blocking=True)
        event = None
        if self._on_gpu:
            event = torch.cuda.Event()
            event.record()
        self._copied.append(([*self._new], values, event))
        self._new.clear()

    def _read(self, keep: int) -> dict[int, float]:
        """Read all groups that were copied, except the last `keep`."""
        losses: dict[int, float] = {}
        while len(self._copied) > keep:
            steps, values, event = self._copied.pop(0)
            if event is not None:
                event.synchronize()
            loss_sum, weight_sum, *group = values.tolist()
            self.mean = loss_sum / weight_sum if weight_sum else math.nan
            losses |= dict(zip(steps, group, strict=True))
        return losses
