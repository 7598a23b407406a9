"""TensorBoard event files of a run (`--tensorboard`)."""

import re
import threading
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from lednet.training.loggers import IMAGES_TITLE, EpochSummary


class TensorBoardBackend:
    """A `LoggerBackend` that writes event files, one folder (a TensorBoard run) for each stage.

    The tag of a curve is "<chart>/<curve>" and its steps are epochs. The tab "Custom scalars"
    shows all curves of a chart together. After a resume, a new file hides the epochs in earlier
    files that are trained again.

    Args:
        log_dir: folder of the event files. It is created if necessary.
    """

    def __init__(self, log_dir: Path):
        self.log_dir = log_dir
        self.failure = f"cannot write to {log_dir}"
        self._stage, self._next_epoch = "", 1
        self._writer: SummaryWriter | None = None

    def open(self) -> None:
        self.log_dir.mkdir(parents=True, exist_ok=True)
        default_hook = threading.excepthook

        def hook(args: threading.ExceptHookArgs) -> None:
            # `flush` raises errors of the writer's thread: no traceback is printed as well.
            if not type(args.thread).__module__.startswith("tensorboard."):
                default_hook(args)

        threading.excepthook = hook

    def log(self, summary: EpochSummary) -> None:
        if self._writer is None or summary.stage != self._stage:
            self._writer = self._open_stage(summary)
        writer = self._writer
        for title, curves in summary.charts.items():
            for name, curve in curves.items():
                for epoch, value in curve:
                    if epoch >= self._next_epoch:
                        writer.add_scalar(f"{title}/{name}", value, epoch)
        for number, image in enumerate(summary.images, 1):
            writer.add_image(f"{IMAGES_TITLE}/{number}", image, summary.epoch, dataformats="HWC")
        layout = {title: ["Multiline", [f"{re.escape(title)}/"]] for title in summary.charts}
        writer.add_custom_scalars({"Curves": layout})
        writer.flush()  # raises errors of the writer's thread
        self._next_epoch = summary.epoch + 1

    def _open_stage(self, summary: EpochSummary) -> SummaryWriter:
        if self._writer is not None:
            self._writer.close()
        folder = self.log_dir / summary.stage
        has_events = any(folder.glob("events.out.tfevents.*"))
        # A run without event files, begun without --tensorboard, gets its earlier epochs too.
        self._stage, self._next_epoch = summary.stage, summary.epoch if has_events else 1
        return SummaryWriter(str(folder), purge_step=self._next_epoch)
