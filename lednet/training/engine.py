"""One training engine for every stage: train an epoch, score, save, repeat."""

import math
import time
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from lednet.data.datasets import SegmentationDataset
from lednet.data.transforms import Augmentation
from lednet.errors import UserError
from lednet.evaluation.evaluate import evaluate
from lednet.evaluation.metrics import ConfusionMatrix, none_if_nan
from lednet.precision import autocast
from lednet.training.distributed import EachOnceSampler, ShuffledSampler, World
from lednet.training.loss import WeightedCrossEntropy, resize_target
from lednet.training.schedule import set_poly_lr

CHECK_EVERY = 20
"""Steps between two looks at the loss: each one makes a GPU wait."""


def _mix(keys: tuple[int, ...]) -> int:
    """One seed for several numbers."""
    return int(np.random.SeedSequence(keys).generate_state(1, np.uint64)[0])


def seed_everything(*keys: int) -> None:
    """Seed PyTorch (and with it the loaders' workers) from `keys` alone.

    Every epoch does so from (seed, stage, epoch, rank): a resumed run needs no stored
    random state to go on as if it had never stopped.
    """
    torch.manual_seed(_mix(keys))


def step_generator(*keys: int) -> torch.Generator:
    """Randomness of one step's augmentation, on the CPU: it depends on `keys` alone.

    Every step makes its own from (seed, stage, epoch, step, rank), so that it comes out
    the same whether or not the steps before it were run.
    """
    return torch.Generator().manual_seed(_mix(keys))


def make_loaders(
    train: SegmentationDataset,
    val: SegmentationDataset,
    world: World,
    batch_size: int,
    workers: int,
    seed: int,
) -> tuple[DataLoader, DataLoader]:
    """Loaders of this process's share of both data sets; no image is left out.

    Args:
        batch_size: images a step in each process.
        workers: loading processes for each loader; 0 loads in the training process.
    """
    common = {
        "batch_size": batch_size,
        "num_workers": workers,
        "pin_memory": world.device.type == "cuda",
    }
    return (
        DataLoader(train, sampler=ShuffledSampler(len(train), world, seed), **common),
        DataLoader(val, sampler=EachOnceSampler(len(val), world), **common),
    )


class Trainer:
    """A model with what moves it: loss, Adam, poly schedule, loss scaling.

    Args:
        model: (N, 3, H, W) -> logits (N, C, h, w); already on `world.device`.
        criterion: see `WeightedCrossEntropy`.
        augmentation: makes the network's input of the loaders' uint8 batches.
        num_classes: classes that count in the mIoU.
        num_epochs: length of the schedule.
        precision: "fp32", "bf16" or "fp16".
        train_iou: measure the mIoU of the training batches as well.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: WeightedCrossEntropy,
        augmentation: Augmentation,
        num_classes: int,
        num_epochs: int,
        world: World,
        lr: float = 5e-4,
        weight_decay: float = 1e-4,
        precision: str = "fp32",
        train_iou: bool = True,
    ):
        self.model, self.world, self.precision = model, world, precision
        self.criterion = criterion.to(world.device)
        self.augmentation = augmentation.to(world.device)
        self.num_classes, self.num_epochs, self.train_iou = num_classes, num_epochs, train_iou
        self.base_lr = lr
        self.parallel = world.wrap(model)
        self.optimizer = torch.optim.Adam(
            model.parameters(), lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=weight_decay
        )
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=precision == "fp16")

    def state_dict(self) -> dict[str, Any]:
        """State of optimizer and scaler; the model's is kept beside it."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])

    def start_epoch(self, epoch: int) -> float:
        """Set the learning rate of `epoch`, counted from 1; returns it."""
        set_poly_lr(self.optimizer, self.base_lr, epoch, self.num_epochs)
        return self.optimizer.param_groups[0]["lr"]

    def _step(self, images: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One update; returns logits, loss sum and weight sum of this process's batch."""
        with autocast(self.world.device, self.precision):
            logits = self.parallel(images)
        loss_sum, weight_sum = self.criterion(logits, target)
        # DDP averages gradients: dividing by the mean weight gives the joint batch's mean.
        joint = self.world.sum(weight_sum.clone()) / self.world.size
        loss = loss_sum / joint.clamp(min=1e-12)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return logits.detach(), loss_sum.detach(), weight_sum

    def train_one_epoch(
        self, loader: DataLoader, title: str, keys: tuple[int, ...]
    ) -> dict[str, Any]:
        """Train on every batch of `loader` once.

        Args:
            loader: gives images (N, 3, H, W) and labels (N, H, W), both uint8.
            keys: (seed, stage, epoch), see `step_generator`.

        Returns:
            `loss` (mean over the epoch), `miou` (None unless asked for) and
            `images_per_second`, over all processes.

        Raises:
            UserError: the loss is no longer finite.
        """
        device, lr = self.world.device, self.optimizer.param_groups[0]["lr"]
        self.model.train()
        confusion = ConfusionMatrix(self.num_classes, device)
        sums = torch.zeros(2, device=device)
        images_seen, start = 0, time.perf_counter()
        with self._bar(loader, title) as bar:
            for step, batch in enumerate(loader):
                generator = step_generator(*keys, step, self.world.rank)
                images, target = self.augmentation(*self._received(batch), generator)
                logits, loss_sum, weight_sum = self._step(images, target)
                sums += torch.stack((loss_sum, weight_sum))
                if self.train_iou:
                    confusion.update(logits.argmax(1), resize_target(target, logits.shape[-2:]))
                images_seen += len(images)
                bar.update(len(images) * self.world.size)
                if step % CHECK_EVERY == 0 or step == len(loader) - 1:
                    loss = self._checked(sums, title, step)
                    bar.set_postfix(loss=f"{loss:.3f}", lr=f"{lr:.1e}", refresh=False)
        seconds = time.perf_counter() - start
        self.world.share_buffers(self.model)
        self.world.sum(sums)
        self.world.sum(confusion.counts)
        return {
            "loss": (sums[0] / sums[1].clamp(min=1e-12)).item(),
            "miou": none_if_nan(confusion.mean_iou()) if self.train_iou else None,
            "images_per_second": images_seen * self.world.size / seconds,
        }

    def _checked(self, sums: Tensor, title: str, step: int) -> float:
        loss_sum, weight_sum = sums.tolist()
        if not math.isfinite(loss_sum):
            raise UserError(
                f"the loss is {loss_sum} ({title}, within {CHECK_EVERY} steps before step "
                f"{step + 1}): continue from the last epoch with --resume and a lower --lr, or "
                "in --precision fp32"
            )
        return loss_sum / max(weight_sum, 1e-12)

    def evaluate(self, loader: DataLoader, title: str) -> dict[str, Any]:
        """Score every image of `loader`, in uint8 as for training, at the labels' size.

        Returns:
            `loss`, `miou` and `class_iou` (a list; None where absent), over all processes.
        """
        with self._bar(loader, title) as bar:
            result = evaluate(
                self.model,
                self._counted(loader, bar),
                self.num_classes,
                self.world.device,
                self.precision,
                self.criterion,
            )
        sums = self.world.sum(torch.stack((result.loss_sum, result.loss_weight)))
        self.world.sum(result.confusion.counts)
        confusion = result.confusion
        return {
            "loss": none_if_nan((sums[0] / sums[1]).item()),
            "miou": none_if_nan(confusion.mean_iou()),
            "class_iou": [none_if_nan(iou) for iou in confusion.class_iou().tolist()],
        }

    def _counted(self, loader: Iterable, bar: tqdm) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in loader:
            yield self.augmentation.normalize(*self._received(batch))
            bar.update(len(batch[0]) * self.world.size)

    def _received(self, batch: Iterable[Tensor]) -> Iterator[Tensor]:
        """The batch on this process's device; bytes, so that it is soon there."""
        return (part.to(self.world.device, non_blocking=True) for part in batch)

    def _bar(self, loader: DataLoader, title: str) -> tqdm:
        """Progress in images, with rate and ETA; one bar for all processes."""
        return tqdm(
            total=len(loader.sampler) * self.world.size,
            desc=title,
            unit="image",
            leave=False,
            dynamic_ncols=True,
            disable=not self.world.is_main,
            mininterval=0.5,
        )
