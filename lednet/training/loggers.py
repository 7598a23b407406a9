"""Curves and example predictions of a training run, sent to TensorBoard or visdom."""

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

Charts = dict[str, dict[str, list[tuple[int, float]]]]
"""Points (epoch, value) by chart title and curve name. No curve is empty."""

IMAGES_TITLE = "input, target, prediction"
MAX_IMAGE_HEIGHT = 256
"""Taller images are reduced to about this height, because those of every epoch are stored."""
_GAP = 4
"""Width in pixels of the white line between the parts of an image."""


@dataclass(frozen=True)
class EpochSummary:
    """What backends show after an epoch.

    Attributes:
        stage: name of the training stage.
        epoch: number of the epoch, from 1.
        charts: all curves of the stage up to this epoch.
        images: (H, W, 3) uint8 arrays of one size.
    """

    stage: str
    epoch: int
    charts: Charts
    images: list[np.ndarray]


class LoggerBackend(Protocol):
    """A destination for epoch summaries. Its methods raise any error that occurs.

    Attributes:
        failure: the start of the warning about such an error.
    """

    failure: str

    def open(self) -> None:
        """Prepare before the first epoch, so that problems are reported at the start."""

    def log(self, summary: EpochSummary) -> None:
        """Show an epoch. The charts replace those logged for the stage before."""


class MetricLogger:
    """Logs each epoch to several backends.

    A backend that raises an error is removed with one warning. Training continues.

    Args:
        backends: destinations of the summaries.
        scheme: class names and colours of the label maps, or None to log no images.
        num_images: number of validation images to log.
    """

    def __init__(
        self,
        backends: Sequence[LoggerBackend],
        scheme: LabelScheme | None = None,
        num_images: int = 2,
    ):
        self.backends, self.scheme, self.num_images = list(backends), scheme, num_images
        self._for_each_backend(lambda backend: backend.open())

    def log(
        self, records: Sequence[dict[str, Any]], task: Task, model: nn.Module, loader: Batches
    ) -> None:
        """Log the last epoch of `records`, the lines of `log.jsonl`.

        Args:
            task: the task that is trained.
            model: returns logits. It is evaluated on the first images of `loader`.
            loader: validation data, uint8.
        """
        if not self.backends:
            return
        stage, epoch = records[-1]["stage"], records[-1]["epoch"]
        charts = make_charts([record for record in records if record["stage"] == stage], task)
        images = []
        if self.scheme is not None:
            images = example_images(model, task, loader, self.scheme, self.num_images)
        summary = EpochSummary(stage, epoch, charts, images)
        self._for_each_backend(lambda backend: backend.log(summary))

    def _for_each_backend(self, call: Callable[[LoggerBackend], None]) -> None:
        for backend in [*self.backends]:
            try:
                call(backend)
            except Exception as error:  # network, server and disk raise errors of many types
                self.backends.remove(backend)
                reason = getattr(error, "strerror", None) or type(error).__name__
                message = f"{backend.failure} ({reason}); training continues without it"
                print(f"warning: {message}", file=sys.stderr)


@torch.inference_mode()
def example_images(
    model: nn.Module, task: Task, loader: Batches, scheme: LabelScheme, count: int
) -> list[np.ndarray]:
    """Images of input, target and prediction side by side, (H, W, 3) uint8.

    Args:
        model: returns logits. Its training mode is restored.
        count: number of images, from the start of the data set.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    images = []
    for index in range(min(count, len(loader.dataset))):
        image, target = loader.dataset[index]
        x, _ = task.normalize(image[None].to(device), target[None])
        prediction = argmax_at(model(x).float(), target.shape[-2:])[0]
        gap = np.full((len(target), _GAP, 3), 255, np.uint8)
        first, second = (colorize(label.cpu().numpy(), scheme) for label in (target, prediction))
        joined = np.hstack((image.permute(1, 2, 0).numpy(), gap, first, gap, second))
        factor = max(1, len(joined) // MAX_IMAGE_HEIGHT)
        images.append(np.asarray(Image.fromarray(joined).reduce(factor)))
    model.train(was_training)
    return images


def make_charts(records: Sequence[dict[str, Any]], task: Task) -> Charts:
    """Charts of one stage from its lines of `log.jsonl`.

    Values that are None, or that an earlier version did not log, are left out.
    """
    keys = {
        ("loss", "train"): "train_loss",
        ("loss", "val"): "val_loss",
        (task.score_name, "train"): f"train_{task.score}",
        (task.score_name, "val"): f"val_{task.score}",
        ("top-5", "val"): "val_top5",
        ("learning rate", "start of epoch"): "lr",
        ("throughput", "images per second"): "images_per_second",
        ("memory in MB", "process"): "process_memory_mb",
        ("memory in MB", "GPU"): "gpu_memory_mb",
    }
    charts: Charts = {}
    for record in records:
        values = {curve: record.get(key) for curve, key in keys.items()}
        ious = record.get("val_class_iou", {})
        values |= {("per-class IoU", name): iou for name, iou in ious.items()}
        for (title, name), value in values.items():
            if value is not None:
                points = charts.setdefault(title, {}).setdefault(name, [])
                points.append((record["epoch"], value))
    return charts
