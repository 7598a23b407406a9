"""Charts of a run on a visdom server (`--visualize`)."""

import logging

import numpy as np
import visdom

from lednet.training.loggers import IMAGES_TITLE, EpochSummary


class VisdomBackend:
    """A `LoggerBackend` that draws windows on a visdom server.

    All windows are redrawn after each epoch, so that each point appears once, also after a
    resume or a restart of the server.

    Args:
        name: visdom environment, shown in the page's selector.
        server: URL of the server without the port.
        port: port of the server.
    """

    def __init__(self, name: str, server: str = "http://localhost", port: int = 8097):
        logging.getLogger("visdom").setLevel(logging.CRITICAL)  # it would print a traceback
        self.name, self.server, self.port = name, server, port
        self.failure = f"no visdom server at {server}:{port}"

    def open(self) -> None:
        self.client = visdom.Visdom(
            server=self.server, port=self.port, env=self.name, use_incoming_socket=False,
            raise_exceptions=True,
        )  # fmt: skip

    def log(self, summary: EpochSummary) -> None:
        for title, curves in summary.charts.items():
            window = f"{summary.stage} {title}"
            style = {"mode": "lines+markers", "markersize": 4, "xlabel": "epoch"}
            self.client.scatter(
                X=np.array([point for curve in curves.values() for point in curve]),
                Y=np.repeat(range(1, len(curves) + 1), [len(curve) for curve in curves.values()]),
                win=window,
                opts={**style, "title": window, "legend": list(curves)},
            )
        if summary.images:
            window = f"{summary.stage}: {IMAGES_TITLE}"
            stack = np.stack(summary.images).transpose(0, 3, 1, 2)
            self.client.images(stack, nrow=1, win=window, opts={"title": window})
