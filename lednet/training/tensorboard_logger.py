"""A run as event files for TensorBoard (`--tensorboard`)."""

import io
import os
import re
import socket
import time
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.summary import custom_scalars, image, scalar

from lednet.training.loggers import PICTURES_TITLE, EpochSummary


class TensorBoardBackend:
    """A `LoggerBackend` in event files, in a folder for each stage: TensorBoard calls it a run.

    The tag of a curve is "<chart>/<curve>", its steps are epochs; the tab "Custom scalars" has
    charts of all their curves. A file that goes on with a stage takes back what others have of
    its first epoch and later ones.

    Each epoch's events are appended in one go, without the queue and the thread of PyTorch's
    `SummaryWriter`: what goes wrong is raised here, not printed by the thread.

    Args:
        folder: made if need be.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.trouble = f"cannot write to {folder}"
        self.stage, self.file = "", folder
        self.titles: list[str] = []

    def open(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)

    def show(self, view: EpochSummary) -> None:
        buffer = io.BytesIO()
        records = RecordWriter(buffer)

        def add(**content: Any) -> None:
            records.write(Event(wall_time=time.time(), **content).SerializeToString())

        first = view.epoch
        if view.stage != self.stage:
            folder = self.folder / view.stage
            if not any(folder.glob("events.out.tfevents.*")):
                first = 1  # a run that had no such display before
            self.stage, self.titles = view.stage, []
            self.file = self._new_file(folder)
            add(step=first, file_version="brain.Event:2")
            add(step=first, session_log=SessionLog(status=SessionLog.START))
        if self.titles != (titles := list(view.charts)):
            self.titles = titles
            charts = {title: ["Multiline", [f"{re.escape(title)}/"]] for title in titles}
            add(summary=custom_scalars({"Curves": charts}))
        for title, curves in view.charts.items():
            for name, curve in curves.items():
                for epoch, value in curve:
                    if epoch >= first:
                        add(step=epoch, summary=scalar(f"{title}/{name}", value))
        for number, picture in enumerate(view.pictures, 1):
            tag = f"{PICTURES_TITLE}/{number}"
            add(step=view.epoch, summary=image(tag, picture, dataformats="HWC"))
        with open(self.file, "ab") as file:
            file.write(buffer.getvalue())

    @staticmethod
    def _new_file(folder: Path) -> Path:
        """Its name sorts behind those of the files before it: TensorBoard reads in this order."""
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}"
        return folder / name
