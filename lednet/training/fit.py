"""A stage of training from its first epoch, or any later one, to its last."""

from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.utils.data import DataLoader

from lednet.evaluation.report import plot_curves
from lednet.model import LEDNet
from lednet.training.dashboard import Dashboard
from lednet.training.engine import Trainer, seed_everything
from lednet.training.runs import BEST, LAST, STAGES, RunFolder
from lednet.weights import save_checkpoint


@dataclass
class Progress:
    """What a run has behind it.

    Attributes:
        stage: "encoder" or "decoder".
        epoch: finished epochs of that stage.
        best_miou: best validation mIoU of that stage; -1 before the first.
        records: the lines of `log.jsonl` so far, of both stages.
    """

    stage: str
    epoch: int = 0
    best_miou: float = -1.0
    records: list[dict[str, Any]] = field(default_factory=list)


def fit(
    trainer: Trainer,
    net: LEDNet,
    loaders: tuple[DataLoader, DataLoader],
    progress: Progress,
    run: RunFolder,
    meta: dict[str, Any],
    seed: int,
    dashboard: Dashboard | None = None,
    keep_every: int = 0,
) -> None:
    """Train the rest of a stage; after each epoch score, save and log.

    Args:
        net: the whole network, of which `trainer.model` may be a part.
        loaders: training and validation.
        progress: brought forward, epoch by epoch.
        run: written to by the main process only.
        meta: about data and classes, stored with the weights.
        keep_every: keep the weights of every n-th epoch as well; 0 keeps none.
    """
    train_loader, val_loader = loaders
    stage, main = progress.stage, trainer.world.is_main
    for epoch in range(progress.epoch + 1, trainer.num_epochs + 1):
        keys = (seed, STAGES.index(stage), epoch)
        seed_everything(*keys, trainer.world.rank)
        train_loader.sampler.epoch = epoch
        title = f"{stage} {epoch}/{trainer.num_epochs}"
        lr = trainer.start_epoch(epoch)
        trained = trainer.train_one_epoch(train_loader, title, keys)
        scored = trainer.evaluate(val_loader, f"{title} val")
        record = {
            "stage": stage,
            "epoch": epoch,
            "lr": lr,
            "train_loss": trained["loss"],
            "train_miou": trained["miou"],
            "val_loss": scored["loss"],
            "val_miou": scored["miou"],
            "val_class_iou": dict(zip(meta["classes"], scored["class_iou"], strict=True)),
            "images_per_second": trained["images_per_second"],
        }
        progress.records.append(record)
        progress.epoch = epoch
        miou = -1.0 if scored["miou"] is None else scored["miou"]
        improved = miou > progress.best_miou
        progress.best_miou = max(miou, progress.best_miou)
        if main:
            _save(trainer, net, run, progress, meta, improved, keep_every)
            run.say(_line(record, trainer.num_epochs, improved))
            if dashboard is not None:
                dashboard.show(record, trainer.model, val_loader)
    if main:
        title = f"{run.path.name}: LEDNet {net.variant}, {meta['dataset']} classes"
        plot_curves(progress.records, run.path / "curves.png", title)


def _save(
    trainer: Trainer,
    net: LEDNet,
    run: RunFolder,
    progress: Progress,
    meta: dict[str, Any],
    improved: bool,
    keep_every: int,
) -> None:
    stage, epoch = progress.stage, progress.epoch
    meta = {**meta, "stage": stage, "epoch": epoch, "miou": progress.records[-1]["val_miou"]}
    model: nn.Module = trainer.model
    if improved:
        save_checkpoint(run.path / BEST[stage], model, meta)
    if keep_every and epoch % keep_every == 0:
        save_checkpoint(run.path / f"{stage}_epoch{epoch:03d}.pth", model, meta)
    save_checkpoint(
        run.path / LAST[stage],
        net,
        meta,
        trainer=trainer.state_dict(),
        best_miou=progress.best_miou,
        records=progress.records,
    )
    run.write_records(progress.records)


def _line(record: dict[str, Any], num_epochs: int, improved: bool) -> str:
    def show(value: float | None) -> str:
        return "  -  " if value is None else f"{value:.3f}"

    return (
        f"{record['stage']} {record['epoch']:3d}/{num_epochs}  lr {record['lr']:.2e}  "
        f"loss {show(record['train_loss'])} val {show(record['val_loss'])}  "
        f"mIoU {show(record['train_miou'])} val {show(record['val_miou'])}  "
        f"{record['images_per_second']:.1f} images/s" + ("  best" if improved else "")
    )
