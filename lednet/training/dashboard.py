"""Live curves and pictures of a run on a visdom server (`--visualize`)."""

import logging
import sys
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from lednet.data.labels import LabelScheme
from lednet.deploy.predictor import predict_at
from lednet.errors import UserError
from lednet.evaluation.draw import colorize
from lednet.training.tasks import Task


class Dashboard:
    """Sends loss, score, learning rate and, of label maps, pictures to a visdom server.

    A server that does not answer, at the start or later, costs one warning and ends
    the display, never the run.

    Args:
        name: visdom environment, shown in the page's selector.
        task: what is trained for.
        scheme: class names and colours of label maps; None where there are none to show.
        images: validation images to show.

    Raises:
        UserError: visdom is not installed.
    """

    def __init__(
        self,
        name: str,
        task: Task,
        scheme: LabelScheme | None = None,
        server: str = "http://localhost",
        port: int = 8097,
        images: int = 2,
    ):
        try:
            import visdom
        except ImportError as error:
            raise UserError(
                "--visualize needs visdom: install it as README.md says, or leave the flag out"
            ) from error
        logging.getLogger("visdom").setLevel(logging.CRITICAL)  # it would print a traceback
        self.task, self.scheme, self.images = task, scheme, images
        self.address = f"{server}:{port}"
        self.client = None
        try:
            self.client = visdom.Visdom(
                server=server, port=port, env=name, use_incoming_socket=False,
                raise_exceptions=True,
            )  # fmt: skip
        except Exception as error:
            self._give_up(error)

    def show(self, record: dict[str, Any], model: nn.Module, loader: DataLoader) -> None:
        """Add one epoch: its point on each curve, and predictions for the first images.

        Args:
            record: a line of `log.jsonl`.
            model: gives logits; evaluated on the first pictures of `loader`, uint8.
        """
        if self.client is None:
            return
        try:
            self._show_curves(record)
            if self.scheme is not None:
                self._show_pictures(record["stage"], model, loader)
        except Exception as error:  # whatever a network or a server may bring
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self.client = None
        print(
            f"warning: no visdom server answers at {self.address} ({type(error).__name__}); "
            "training goes on without the display",
            file=sys.stderr,
        )

    def _show_curves(self, record: dict[str, Any]) -> None:
        stage, score = record["stage"], self.task.score
        curves = {
            "loss": ("train_loss", "val_loss"),
            self.task.score_name: (f"train_{score}", f"val_{score}"),
            "learning rate": ("lr",),
        }
        for title, keys in curves.items():
            for key in keys:
                if record[key] is not None:
                    self.client.line(
                        X=np.array([record["epoch"]]),
                        Y=np.array([record[key]]),
                        win=f"{stage} {title}",
                        name=key.split("_")[0],
                        update="append",
                        opts={
                            "title": f"{stage} {title}",
                            "xlabel": "epoch",
                            "showlegend": len(keys) > 1,
                        },
                    )

    @torch.inference_mode()
    def _show_pictures(self, stage: str, model: nn.Module, loader: DataLoader) -> None:
        device = next(model.parameters()).device
        was_training = model.training
        model.eval()
        pictures = []
        for index in range(min(self.images, len(loader.dataset))):
            image, target = loader.dataset[index]
            x, _ = self.task.normalize(image[None].to(device), target[None])
            prediction = predict_at(model(x).float(), target.shape[-2:])
            pictures.append(image.numpy())
            for label in (target, prediction[0].cpu()):
                colors = colorize(label.numpy(), self.scheme)
                pictures.append(colors.transpose(2, 0, 1))
        model.train(was_training)
        win = f"{stage} pictures"
        opts = {"title": f"{stage}: input | target | prediction"}
        self.client.images(np.stack(pictures), nrow=3, win=win, opts=opts)
