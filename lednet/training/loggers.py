"""What there is to see of a run under way; the displays show it."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import nn

from lednet.data.labels import LabelScheme
from lednet.data.loaders import Batches
from lednet.model import argmax_at
from lednet.training.tasks import Task
from lednet.visualization import colorize

Curve = list[tuple[int, float]]
"""(epoch, value) of all epochs that have one."""
Charts = dict[str, dict[str, Curve]]
"""Curves by name, in charts by title."""

PICTURES_TITLE = "input, target, prediction"
PICTURE_HEIGHT = 256
"""Larger pictures are made smaller, down to this: each epoch's are kept."""
_GAP = 4
"""White pixels between two parts of a picture."""


@dataclass(frozen=True)
class EpochSummary:
    """What there is to see of a stage when an epoch has ended.

    Attributes:
        stage: its name.
        epoch: number of the epoch, from 1.
        charts: of the stage up to then, whole.
        pictures: (H, W, 3) uint8, all of one size.
    """

    stage: str
    epoch: int
    charts: Charts
    pictures: list[np.ndarray]


class LoggerBackend(Protocol):
    """A place where views are shown. It raises whatever goes wrong.

    Attributes:
        trouble: what it then is, in a few words.
    """

    trouble: str

    def open(self) -> None:
        """Get ready, before the first epoch: what is missing is told at once."""

    def show(self, view: EpochSummary) -> None:
        """Show a view in the place of the stage's last one."""


class MetricLogger:
    """Shows a run, epoch by epoch.

    A display that fails, at the start or later, costs one warning and is left out from then
    on; the run goes on.

    Args:
        scheme: class names and colours of label maps; None where there are none to show.
        images: validation images to show.
    """

    def __init__(
        self, displays: Sequence[LoggerBackend], scheme: LabelScheme | None = None, images: int = 2
    ):
        self.displays = list(displays)
        self.scheme, self.images = scheme, images
        self._each(lambda display: display.open())

    def show(
        self, records: Sequence[dict[str, Any]], task: Task, model: nn.Module, loader: Batches
    ) -> None:
        """Show an epoch that has ended.

        Args:
            records: lines of `log.jsonl`, the last one that of the epoch.
            task: what is trained for.
            model: gives logits; evaluated on the first pictures of `loader`, uint8.
        """
        if not self.displays:
            return
        stage, epoch = records[-1]["stage"], records[-1]["epoch"]
        charts = charts_of([record for record in records if record["stage"] == stage], task)
        pictures = []
        if self.scheme is not None:
            pictures = self._pictures(self.scheme, task, model, loader)
        view = EpochSummary(stage, epoch, charts, pictures)
        self._each(lambda display: display.show(view))

    def _each(self, call: Callable[[LoggerBackend], None]) -> None:
        for display in [*self.displays]:
            try:
                call(display)
            except Exception as error:  # whatever a network, a server or a disk may bring
                self.displays.remove(display)
                reason = getattr(error, "strerror", None) or type(error).__name__
                print(
                    f"warning: {display.trouble} ({reason}); training goes on without the display",
                    file=sys.stderr,
                )

    @torch.inference_mode()
    def _pictures(
        self, scheme: LabelScheme, task: Task, model: nn.Module, loader: Batches
    ) -> list[np.ndarray]:
        """The first images, each beside its label and what the model makes of it."""
        device = next(model.parameters()).device
        was_training = model.training
        model.eval()
        pictures = []
        for index in range(min(self.images, len(loader.dataset))):
            image, target = loader.dataset[index]
            x, _ = task.normalize(image[None].to(device), target[None])
            prediction = argmax_at(model(x).float(), target.shape[-2:])
            labels = (target.numpy(), prediction[0].cpu().numpy())
            gap = np.full((len(target), _GAP, 3), 255, np.uint8)
            first, second = (colorize(label, scheme) for label in labels)
            joined = np.hstack((image.permute(1, 2, 0).numpy(), gap, first, gap, second))
            factor = max(1, len(joined) // PICTURE_HEIGHT)
            pictures.append(np.asarray(Image.fromarray(joined).reduce(factor)))
        model.train(was_training)
        return pictures


def charts_of(records: Sequence[dict[str, Any]], task: Task) -> Charts:
    """Charts of a stage from its lines of `log.jsonl`; no curve is without a point."""
    charts: Charts = {}
    for record in records:
        for title, values in _points(record, task).items():
            for name, value in values.items():
                if value is not None:
                    curve = charts.setdefault(title, {}).setdefault(name, [])
                    curve.append((record["epoch"], value))
    return charts


def _points(record: dict[str, Any], task: Task) -> dict[str, dict[str, float | None]]:
    """What an epoch adds to the charts: values by curve; runs of other versions log less."""
    score = task.score
    return {
        "loss": {"train": record["train_loss"], "val": record["val_loss"]},
        task.score_name: {"train": record[f"train_{score}"], "val": record[f"val_{score}"]},
        "top-5": {"val": record.get("val_top5")},
        "per-class IoU": record.get("val_class_iou", {}),
        "learning rate": {"start of epoch": record["lr"]},
        "throughput": {"images per second": record.get("images_per_second")},
        "memory in MB": {
            "process": record.get("process_memory_mb"),
            "GPU": record.get("gpu_memory_mb"),
        },
    }
