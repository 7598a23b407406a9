"""A run on a visdom server (`--visualize`)."""

import logging

import numpy as np
import visdom

from lednet.training.loggers import PICTURES_TITLE, EpochSummary


class VisdomBackend:
    """A `LoggerBackend` in the windows of a visdom server, each drawn anew after each epoch: one
    that was restarted, or shows a resumed run, has all points once.

    Args:
        name: visdom environment, shown in the page's selector.
    """

    def __init__(self, name: str, server: str = "http://localhost", port: int = 8097):
        logging.getLogger("visdom").setLevel(logging.CRITICAL)  # it would print a traceback
        self.name, self.server, self.port = name, server, port
        self.trouble = f"no visdom server answers at {server}:{port}"

    def open(self) -> None:
        self.client = visdom.Visdom(
            server=self.server, port=self.port, env=self.name, use_incoming_socket=False,
            raise_exceptions=True,
        )  # fmt: skip

    def show(self, view: EpochSummary) -> None:
        for title, curves in view.charts.items():
            numbered = [*enumerate(curves.values(), 1)]
            window = f"{view.stage} {title}"
            self.client.scatter(
                X=np.array([point for curve in curves.values() for point in curve]),
                Y=np.array([number for number, curve in numbered for _ in curve]),
                win=window,
                opts={
                    "title": window,
                    "mode": "lines+markers",
                    "markersize": 4,
                    "xlabel": "epoch",
                    "legend": list(curves),
                },
            )
        if view.pictures:
            window = f"{view.stage}: {PICTURES_TITLE}"
            stack = np.stack(view.pictures).transpose(0, 3, 1, 2)
            self.client.images(stack, nrow=1, win=window, opts={"title": window})
