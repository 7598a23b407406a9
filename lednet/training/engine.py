"""One training engine for every stage: train an epoch, score, save, repeat."""

import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Adam, Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from lednet.errors import UserError
from lednet.evaluation.metrics import none_if_nan
from lednet.precision import autocast
from lednet.training.distributed import World
from lednet.training.loading import Loader, TrainLoader, batch_names
from lednet.training.schedule import lr_factor
from lednet.training.tasks import Task

Weights = tuple[Tensor, ...] | list[Tensor]

CHECK_EVERY = 20
"""Steps between two looks at the loss on a GPU, which each one makes wait; a CPU has it at once."""


class NonFiniteLoss(UserError):
    """The loss is infinite or no number; says in which step, and of which images."""


@dataclass(frozen=True)
class Optimization:
    """How the weights move: the paper's way for segmentation, and what else may be asked for.

    Attributes:
        optimizer: "adam" (betas 0.9 and 0.999, eps 1e-8) or "sgd" (momentum 0.9).
        lr: before the schedule.
        weight_decay: added to the gradient, of every weight.
        schedule: a key of `lednet.training.schedule.SCHEDULES`.
        warmup_epochs: in which the learning rate rises, before the schedule.
        precision: a key of `lednet.precision.AMP_DTYPES`.
        accumulate: batches whose gradients make one update, weighted as one large batch;
            batch norm sees them one by one.
        clip_norm: largest norm of all gradients together; None leaves them.
        ema_decay: of an exponential moving average of the weights, which is then what is
            scored and kept as best; None for no such average. In update n it is at most
            (1 + n) / (10 + n).
        channels_last: memory layout of weights and images.
        compile: `torch.compile` the network.
        skip_bad_steps: leave an update out when its loss is not finite, and go on; looks at
            every step, which makes a GPU wait.
    """

    optimizer: str = "adam"
    lr: float = 5e-4
    weight_decay: float = 1e-4
    schedule: str = "poly"
    warmup_epochs: int = 0
    precision: str = "fp32"
    accumulate: int = 1
    clip_norm: float | None = None
    ema_decay: float | None = None
    channels_last: bool = False
    compile: bool = False
    skip_bad_steps: bool = False


@dataclass(frozen=True)
class Pretrained:
    """A part of a model that has been trained before.

    Attributes:
        part: the module.
        lr_factor: its learning rate is so many times that of the rest.
        frozen_epochs: in which it stays as it is, running statistics included, and without
            dropout.
    """

    part: nn.Module
    lr_factor: float = 1.0
    frozen_epochs: int = 0


def _mix(keys: tuple[int, ...]) -> int:
    """One seed for several numbers."""
    return int(np.random.SeedSequence(keys).generate_state(1, np.uint64)[0])


def seed_everything(*keys: int) -> None:
    """Seed PyTorch from `keys` alone.

    Every step does so from (seed, stage, epoch, step, rank): a resumed run needs no stored
    random state to go on as if it had never stopped.
    """
    torch.manual_seed(_mix(keys))


def step_generator(*keys: int) -> torch.Generator:
    """Randomness of one step's augmentation, on the CPU: it depends on `keys` alone.

    Every step makes its own from (seed, stage, epoch, step, rank), so that it comes out
    the same whether or not the steps before it were run.
    """
    return torch.Generator().manual_seed(_mix(keys))


class Tally:
    """What this process has counted of an epoch so far.

    Attributes:
        step: batches behind it.
        images: of all processes behind it: where to go on, even with other batches or as
            many other processes.
        sums: (2,) sums of the loss and of its weights.
        counts: of the training batches, see `Task.count`.
        skipped: updates left out because of their loss.
    """

    def __init__(self, counts: Tensor):
        self.step = self.images = self.skipped = 0
        self.sums = torch.zeros(2, device=counts.device)
        self.counts = counts

    def state(self, world: World) -> dict[str, Any]:
        """For a checkpoint: the sums of all processes."""
        return {
            "step": self.step,
            "images": self.images,
            "skipped": self.skipped,
            "sums": world.sum(self.sums.clone()).cpu(),
            "counts": world.sum(self.counts.clone()).cpu(),
        }

    def restore(self, state: dict[str, Any], world: World) -> None:
        """Go on from `state`, which rank 0 takes to itself."""
        self.step, self.images, self.skipped = state["step"], state["images"], state["skipped"]
        if world.is_main:
            self.sums.copy_(state["sums"])
            self.counts.copy_(state["counts"])


class Trainer:
    """A model with what moves it: loss, optimizer, schedule, loss scaling.

    Args:
        model: images (N, 3, H, W) -> logits (N, C, ...); already on `world.device`.
        task: what it is trained for.
        num_epochs: length of the schedule.
        count_training: count the training batches as well.
        pretrained: a part of `model` that is to be treated with care.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        num_epochs: int,
        world: World,
        optimization: Optimization,
        count_training: bool = True,
        pretrained: Pretrained | None = None,
    ):
        device = world.device
        self.model, self.world, self.optimization = model, world, optimization
        self.task, self.pretrained = task.to(device), pretrained
        self.num_epochs, self.count_training = num_epochs, count_training
        self.layout = torch.contiguous_format
        if optimization.channels_last:
            self.layout = torch.channels_last
            model.to(memory_format=self.layout)
        self.average: AveragedModel | None = None
        self.updates = 0
        if (decay := optimization.ema_decay) is not None:
            mix_in = functools.partial(self._mix_in, decay)
            self.average = AveragedModel(model, multi_avg_fn=mix_in, use_buffers=True)
        self.epoch = 1
        self.frozen = False
        self._freeze(self._frozen_in(self.epoch))
        self.optimizer = self._make_optimizer()
        fp16 = optimization.precision == "fp16"
        self.scaler = torch.amp.GradScaler(device.type, enabled=fp16)

    def _mix_in(self, decay: float, averaged: Weights, current: Weights, _: Tensor | int) -> None:
        """Add weights to their average. In a short run a steep decay would keep the first ones:
        it begins low, so that a ninth of what has been done counts (as TensorFlow's)."""
        decay = min(decay, (1 + self.updates) / (10 + self.updates))
        get_ema_multi_avg_fn(decay)(averaged, current, _)

    def _make_optimizer(self) -> Optimizer:
        """The rest of the model comes first, then what has been trained before."""
        optimization, pretrained = self.optimization, self.pretrained
        known = {id(p) for p in pretrained.part.parameters()} if pretrained else set()
        groups: list[dict[str, Any]] = [
            {"params": [p for p in self.model.parameters() if id(p) not in known]}
        ]
        if pretrained:
            groups.append({"params": list(pretrained.part.parameters())})
        options: dict[str, Any] = {
            "lr": optimization.lr,
            "weight_decay": optimization.weight_decay,
            "fused": self.world.device.type in ("cpu", "cuda"),
        }
        if optimization.optimizer == "sgd":
            return SGD(groups, momentum=0.9, **options)
        return Adam(groups, betas=(0.9, 0.999), eps=1e-8, **options)

    def _frozen_in(self, epoch: int) -> bool:
        return self.pretrained is not None and epoch <= self.pretrained.frozen_epochs

    def _freeze(self, frozen: bool) -> None:
        """Freeze or unfreeze the pretrained part; DDP has to be told anew what has gradients."""
        if self.pretrained is not None:
            self.pretrained.part.requires_grad_(not frozen)
        self.frozen = frozen
        self.wrapped = self.world.wrap(self.model)
        compiled = self.optimization.compile
        self.parallel = torch.compile(self.wrapped) if compiled else self.wrapped

    @property
    def scored(self) -> nn.Module:
        """The model that is evaluated and kept: the averaged one where there is one."""
        return self.model if self.average is None else self.average.module

    def state_dict(self) -> dict[str, Any]:
        """State of optimizer, scaler and average; the model's is kept beside it."""
        state: dict[str, Any] = {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }
        if self.average is not None:
            state |= {"average": self.average.state_dict(), "updates": self.updates}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            if "average" not in state:
                raise UserError("the run was begun without --ema-decay: resume it without")
            self.average.load_state_dict(state["average"])
            self.updates = state["updates"]

    def keep_average(self) -> None:
        """Go on from the averaged weights, if there are any: those that were scored."""
        if self.average is not None:
            self.model.load_state_dict(self.average.module.state_dict())

    def new_tally(self) -> Tally:
        return Tally(self.task.new_counts())

    def start_epoch(self, epoch: int) -> float:
        """Get ready for `epoch`, counted from 1; returns its first learning rate."""
        self.epoch = epoch
        if self._frozen_in(epoch) != self.frozen:
            self._freeze(not self.frozen)
        return self._set_lr(0.0)

    def _set_lr(self, done: float) -> float:
        """Set the learning rate of a step, `done` being the part of the epoch behind it."""
        optimization, behind = self.optimization, self.epoch - 1 + done
        factor = lr_factor(
            optimization.schedule, behind, self.num_epochs, optimization.warmup_epochs
        )
        lr = optimization.lr * factor
        factors = [1.0, self.pretrained.lr_factor] if self.pretrained else [1.0]
        for group, times in zip(self.optimizer.param_groups, factors, strict=True):
            group["lr"] = lr * times
        return lr

    def _backward(self, images: Tensor, target: Tensor, update: bool) -> tuple[Tensor, Tensor, int]:
        """Add a batch's gradients; returns logits, (loss sum, weight sum) and the number of
        answers to an image, by which the loss was divided."""
        images = images.contiguous(memory_format=self.layout)
        together: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if not update and isinstance(self.wrapped, DistributedDataParallel):
            together = self.wrapped.no_sync()
        with together:
            with autocast(self.world.device, self.optimization.precision):
                logits = self.parallel(images)
            loss_sum, weight_sum = self.task.loss(logits, target)
            # One divisor for every batch and process, so that their gradients add up;
            # `_update` brings the sum to the joint mean.
            answers = math.prod(logits.shape[2:])
            self.scaler.scale(loss_sum / answers).backward()
        return logits.detach(), torch.stack((loss_sum.detach(), weight_sum)), answers

    def _update(self, sums: Tensor, answers: int) -> bool:
        """Move the weights by the gradients of all batches since the last time.

        Args:
            sums: (loss sum, weight sum) of these batches in this process.
            answers: as `_backward` returned it.

        Returns:
            Whether it was done; not where loss or gradients are not finite and that may be
            skipped.
        """
        optimization = self.optimization
        joint = self.world.sum(sums.clone())
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        done = not optimization.skip_bad_steps or self._all_finite(joint[0], gradients)
        if done:
            # DDP averages gradients over the processes; the loss is the mean over the weights.
            factor = self.world.size * answers / joint[1].clamp(min=1e-12)
            torch._foreach_mul_(gradients, factor)
            if optimization.clip_norm is not None:
                self.scaler.unscale_(self.optimizer)
                nn.utils.clip_grad_norm_(self.model.parameters(), optimization.clip_norm)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            if self.average is not None:
                self.average.update_parameters(self.model)
                self.updates += 1
        self.optimizer.zero_grad(set_to_none=True)
        return done

    def _all_finite(self, loss: Tensor, gradients: list[Tensor]) -> bool:
        """Of scaled gradients, the scaler leaves out what is not finite, and scales less."""
        checked = loss if self.scaler.is_enabled() else loss + nn.utils.get_total_norm(gradients)
        return math.isfinite(checked)

    def train_one_epoch(
        self,
        loader: TrainLoader,
        title: str,
        keys: tuple[int, ...],
        tally: Tally | None = None,
        after_update: Callable[[], None] = lambda: None,
    ) -> dict[str, Any]:
        """Train on every batch of `loader` once.

        Args:
            loader: gives images (N, 3, H, W) uint8 and their targets.
            keys: (seed, stage, epoch). Whatever is random in a step follows from them, its
                number and the process, so that nothing needs to be stored to go on.
            tally: of the batches that an interrupted epoch has behind it, which `loader`
                leaves out. It is brought forward.
            after_update: called when weights and `tally` are in step.

        Returns:
            `loss` (mean over the epoch), the task's score (None unless asked for),
            `images_per_second` and, if there were any, `skipped` updates.

        Raises:
            NonFiniteLoss: unless such steps are to be skipped.
            RuntimeError: a loading process died; see `worker_failures`.
        """
        device, rank = self.world.device, self.world.rank
        tally = tally or self.new_tally()
        first, last = tally.step, tally.step + len(loader)
        check_every = CHECK_EVERY if device.type == "cuda" else 1
        images_seen, start, unchecked = 0, time.perf_counter(), []
        group = torch.zeros(2, device=device)
        buffers = self._copied_buffers()
        self.model.train()
        if self.pretrained is not None and self.frozen:
            self.pretrained.part.eval()
        with self._bar(loader, title) as bar:
            for step, batch in enumerate(loader, first):
                lr = self._set_lr(step / last)
                seed_everything(*keys, step, rank, 1)  # for dropout
                images, target = self._received(batch)
                generator = step_generator(*keys, step, rank)
                images, target = self.task.augment(images, target, generator)
                update = (step + 1) % self.optimization.accumulate == 0 or step + 1 == last
                logits, sums, answers = self._backward(images, target, update)
                group += sums
                unchecked.append((step, sums[0]))
                if not self.optimization.skip_bad_steps and (
                    len(unchecked) == check_every or step + 1 == last
                ):
                    self._require_finite(unchecked, loader, title, first)
                    unchecked.clear()
                if self.count_training:
                    self.task.count(tally.counts, logits, target, exact=False)
                tally.step = step + 1
                tally.images += len(images) * self.world.size
                images_seen += len(images)
                if update:
                    if self._update(group, answers):
                        tally.sums += group
                        buffers = self._copied_buffers()
                    else:
                        tally.skipped += 1
                        self._restore_buffers(buffers)
                    group.zero_()
                    after_update()
                bar.update(len(images) * self.world.size)
                if (step + 1) % check_every == 0:
                    loss = _mean(tally.sums)
                    bar.set_postfix(loss=f"{loss:.3f}", lr=f"{lr:.1e}", refresh=False)
        seconds = time.perf_counter() - start
        self.world.share_buffers(self.model)
        if self.average is not None:
            self.world.share_buffers(self.average)
        state = tally.state(self.world)
        score = self.task.score
        scores = self.task.scores(state["counts"]) if self.count_training else {score: None}
        return {
            "loss": _mean(state["sums"]),
            score: scores[score],
            "images_per_second": images_seen * self.world.size / seconds,
            **({"skipped": tally.skipped} if tally.skipped else {}),
        }

    def _copied_buffers(self) -> list[Tensor]:
        """The running statistics, which a step that is skipped has already changed."""
        if not self.optimization.skip_bad_steps:
            return []
        return [buffer.clone() for buffer in self.model.buffers()]

    def _restore_buffers(self, buffers: list[Tensor]) -> None:
        for buffer, kept in zip(self.model.buffers(), buffers, strict=True):
            buffer.copy_(kept)

    def _require_finite(
        self, losses: list[tuple[int, Tensor]], loader: TrainLoader, title: str, first: int
    ) -> None:
        """Look at the losses of the last steps, `first` being the loader's first; where one
        process stops, all do."""
        values = torch.stack([loss for _, loss in losses]).tolist()
        bad = [i for i, value in enumerate(values) if not math.isfinite(value)]
        if not self.world.largest(len(bad)):
            return
        if not bad:
            raise NonFiniteLoss(f"the loss of another process is not finite in {title}")
        step = losses[bad[0]][0]
        raise NonFiniteLoss(
            f"the loss is {values[bad[0]]} in step {step + 1} of {title}, of "
            f"{', '.join(batch_names(loader, step - first))}"
        )

    @torch.inference_mode()
    def evaluate(
        self, loader: Loader, title: str, between: Callable[[], None] = lambda: None
    ) -> dict[str, Any]:
        """Score the model, in evaluation mode, on every image of `loader`.

        Args:
            loader: as for training.
            between: called after each batch.

        Returns:
            `loss` and the task's scores, over all processes.
        """
        model, task = self.scored, self.task
        was_training = model.training
        model.eval()
        counts, sums = task.new_counts(), torch.zeros(2, device=self.world.device)
        with self._bar(loader, title) as bar:
            for batch in loader:
                images, target = task.normalize(*self._received(batch))
                with autocast(self.world.device, self.optimization.precision):
                    logits = model(images.contiguous(memory_format=self.layout))
                logits = logits.float()
                sums += torch.stack(task.loss(logits, target))
                task.count(counts, logits, target, exact=True)
                between()
                bar.update(len(images) * self.world.size)
        model.train(was_training)
        sums = self.world.sum(sums)
        return {
            "loss": none_if_nan((sums[0] / sums[1]).item()),
            **task.scores(self.world.sum(counts)),
        }

    def _received(self, batch: Iterable[Tensor]) -> Iterator[Tensor]:
        """The batch on this process's device; bytes, so that it is soon there."""
        return (part.to(self.world.device, non_blocking=True) for part in batch)

    def _bar(self, loader: Loader, title: str) -> tqdm:
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


def _mean(sums: Tensor) -> float:
    loss_sum, weight_sum = sums.tolist()
    return loss_sum / max(weight_sum, 1e-12)
