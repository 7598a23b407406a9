"""A stage of training from its first step, or any later one, to its last."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from lednet.data.datasets import SkippingDataset
from lednet.errors import UserError
from lednet.evaluation.report import plot_curves
from lednet.model import LEDNet
from lednet.training.checkpoints import Checkpoints
from lednet.training.dashboard import Dashboard
from lednet.training.engine import NonFiniteLoss, Tally, Trainer
from lednet.training.loading import end_loading
from lednet.training.runs import BEST, STAGES, RunFolder
from lednet.training.stopping import SAVE, Keeper, Stopped
from lednet.weights import save_checkpoint


@dataclass
class Progress:
    """What a run has behind it.

    Attributes:
        stage: "encoder" or "decoder".
        epoch: finished epochs of that stage.
        steps: updates of the weights, of both stages.
        best_miou: best validation mIoU of that stage; -1 before the first.
        records: the lines of `log.jsonl` so far, of both stages.
        tally: of the epoch that was interrupted, as `Tally.state` gave it; or None.
    """

    stage: str
    epoch: int = 0
    steps: int = 0
    best_miou: float = -1.0
    records: list[dict[str, Any]] = field(default_factory=list)
    tally: dict[str, Any] | None = None

    def state(self) -> dict[str, Any]:
        """For a checkpoint, all but stage and epoch, which its "meta" has."""
        return {key: getattr(self, key) for key in PROGRESS_KEYS}


PROGRESS_KEYS = ("steps", "best_miou", "records", "tally")


class Fit:
    """A stage under way.

    Args:
        net: the whole network, of which `trainer.model` may be a part.
        loaders: training and validation.
        progress: brought forward, step by step.
        run: written to by the main process only.
        meta: about data and classes, stored with the weights.
        keeper: says when to save and when to stop.
        keep_every: keep the weights of every n-th epoch as well; 0 keeps none.
    """

    def __init__(
        self,
        trainer: Trainer,
        net: LEDNet,
        loaders: tuple[DataLoader, DataLoader],
        progress: Progress,
        run: RunFolder,
        checkpoints: Checkpoints,
        meta: dict[str, Any],
        seed: int,
        keeper: Keeper,
        dashboard: Dashboard | None = None,
        keep_every: int = 0,
    ):
        self.trainer, self.net, self.progress, self.run = trainer, net, progress, run
        self.train_loader, self.val_loader = loaders
        self.checkpoints, self.meta, self.seed, self.keeper = checkpoints, meta, seed, keeper
        self.dashboard, self.keep_every = dashboard, keep_every
        self.main = trainer.world.is_main

    def train(self) -> None:
        """Train the rest of the stage; after each epoch score, save and log.

        Raises:
            Stopped: a signal came; the step was finished and all is saved.
            UserError: the loss is not finite, or data cannot be read.
        """
        try:
            for epoch in range(self.progress.epoch + 1, self.trainer.num_epochs + 1):
                self._epoch(epoch)
        except NonFiniteLoss as error:
            saved = self.checkpoints.paths()
            last = f"{saved[0]} is sound" if saved else "there is no checkpoint yet"
            raise UserError(
                f"{error}; {last}: go on with --resume and a lower --lr, --skip-bad-steps or "
                "--precision fp32"
            ) from error
        finally:
            end_loading(self.train_loader)
            end_loading(self.val_loader)
        if self.main:
            title = f"{self.run.path.name}: LEDNet {self.net.variant}, {self.meta['dataset']}"
            plot_curves(self.progress.records, self.run.path / "curves.png", f"{title} classes")

    def _epoch(self, epoch: int) -> None:
        trainer, progress, loader = self.trainer, self.progress, self.train_loader
        stage, world = progress.stage, trainer.world
        tally = trainer.new_tally()
        if progress.tally is not None:
            tally.restore(progress.tally, world)
            progress.tally = None
        loader.sampler.epoch = epoch
        loader.sampler.start = min(tally.images // world.size, loader.sampler.share)
        title = f"{stage} {epoch}/{trainer.num_epochs}"
        lr = trainer.start_epoch(epoch)
        keys = (self.seed, STAGES.index(stage), epoch)

        def after_update() -> None:
            progress.steps += 1
            self._obey(tally, self.keeper.order(progress.steps))

        trained = trainer.train_one_epoch(loader, title, keys, tally, after_update)

        def between() -> None:
            if world.size == 1:  # of many, some have fewer batches: they stop at the end
                self._obey(tally, self.keeper.stop())

        scored = trainer.evaluate(self.val_loader, f"{title} val", between)
        record = {
            "stage": stage,
            "epoch": epoch,
            "lr": lr,
            "train_loss": trained["loss"],
            "train_miou": trained["miou"],
            "val_loss": scored["loss"],
            "val_miou": scored["miou"],
            "val_class_iou": dict(zip(self.meta["classes"], scored["class_iou"], strict=True)),
            "images_per_second": trained["images_per_second"],
            **{key: trained[key] for key in ("skipped",) if key in trained},
            **self._damaged(),
        }
        progress.records.append(record)
        progress.epoch = epoch
        miou = -1.0 if scored["miou"] is None else scored["miou"]
        improved = miou > progress.best_miou
        progress.best_miou = max(miou, progress.best_miou)
        if self.main:
            self._require_finite()
            self._save_weights(improved)
            self._save(None)
            self.run.say(_line(record, trainer.num_epochs, improved))
            if self.dashboard is not None:
                self.dashboard.show(record, trainer.scored, self.val_loader)
        if number := self.keeper.stop():
            raise Stopped(number)

    def _obey(self, tally: Tally, order: int) -> None:
        """Save in the middle of an epoch, and stop if that is the order."""
        if not order:
            return
        state = tally.state(self.trainer.world)  # of all processes: each comes here
        if self.main:
            self._require_finite()
            path = self._save(state)
            if order > SAVE:
                self.run.say(f"saved {path}; --resume goes on from it")
        if order > SAVE:
            raise Stopped(order)

    def _require_finite(self) -> None:
        """Save no weights that a step with a finite loss has made infinite.

        Raises:
            NonFiniteLoss: it has.
        """
        if not all(value.isfinite().all() for value in self.net.state_dict().values()):
            raise NonFiniteLoss(f"the weights are not finite after {self.progress.steps} steps")

    def _damaged(self) -> dict[str, int]:
        """How many damaged images were replaced so far, if they may be."""
        data, world = self.train_loader.dataset, self.trainer.world
        if not isinstance(data, SkippingDataset):
            return {}
        found = world.sum(data.damaged.to(world.device, torch.int32))  # each process met its own
        names = [data.pairs[i].image.name for i in found.nonzero().flatten().tolist()]
        if not names:
            return {}
        self.run.say(f"damaged and replaced by others: {', '.join(names)}")
        return {"damaged": len(names)}

    def _save_weights(self, improved: bool) -> None:
        stage, epoch, meta = self.progress.stage, self.progress.epoch, self._meta()
        if improved:
            save_checkpoint(self.run.path / BEST[stage], self.trainer.scored, meta)
        if self.keep_every and epoch % self.keep_every == 0:
            path = self.run.path / f"{stage}_epoch{epoch:03d}.pth"
            save_checkpoint(path, self.trainer.scored, meta)

    def _save(self, tally: dict[str, Any] | None) -> Path:
        """Write a checkpoint, and the log that belongs to it."""
        self.progress.tally = tally
        path = self.checkpoints.save(
            self.progress.steps,
            self.net,
            self._meta(),
            trainer=self.trainer.state_dict(),
            progress=self.progress.state(),
        )
        self.progress.tally = None
        self.run.write_records(self.progress.records)
        return path

    def _meta(self) -> dict[str, Any]:
        records = self.progress.records
        return {
            **self.meta,
            "stage": self.progress.stage,
            "epoch": self.progress.epoch,
            "miou": records[-1]["val_miou"] if records else None,
        }


def _line(record: dict[str, Any], num_epochs: int, improved: bool) -> str:
    def show(value: float | None) -> str:
        return "  -  " if value is None else f"{value:.3f}"

    return (
        f"{record['stage']} {record['epoch']:3d}/{num_epochs}  lr {record['lr']:.2e}  "
        f"loss {show(record['train_loss'])} val {show(record['val_loss'])}  "
        f"mIoU {show(record['train_miou'])} val {show(record['val_miou'])}  "
        f"{record['images_per_second']:.1f} images/s"
        + (f"  {record['skipped']} steps skipped" if "skipped" in record else "")
        + ("  best" if improved else "")
    )
