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

from lednet.data.loaders import Batches, TrainBatches, batch_names
from lednet.device import autocast
from lednet.distributed import DistributedContext
from lednet.errors import UserError
from lednet.metrics import none_if_nan
from lednet.training.cuda_graph import CapturedStep, Recorder, record_cuda_graph
from lednet.training.lr_schedule import lr_factor
from lednet.training.tasks import Task
from lednet.training.time_budget import StageClock

Weights = tuple[Tensor, ...] | list[Tensor]

CHECK_EVERY = 20
"""Steps whose losses are read together on a GPU; a CPU has each at once."""


class NonFiniteLoss(UserError):
    """The loss is infinite or no number; says in which step, and of which images."""


@dataclass(frozen=True)
class TrainerConfig:
    """How the weights move: the paper's way for segmentation, and what else may be asked for.

    Attributes:
        optimizer: "adam" (betas 0.9 and 0.999, eps 1e-8) or "sgd" (momentum 0.9).
        lr: before the schedule.
        weight_decay: added to the gradient, of every weight.
        schedule: a key of `lednet.training.lr_schedule.SCHEDULES`.
        warmup_epochs: in which the learning rate rises, before the schedule.
        precision: a key of `lednet.device.AMP_DTYPES`.
        accumulate: batches whose gradients make one update, weighted as one large batch;
            batch norm sees them one by one.
        clip_norm: largest norm of all gradients together; None leaves them.
        ema_decay: of an exponential moving average of the weights, which is then what is
            scored and kept as best; None for no such average. In update n it is at most
            (1 + n) / (10 + n).
        channels_last: memory layout of weights and images.
        compile: `torch.compile` the network.
        cuda_graph: record forward pass, backward pass and update as one CUDA graph; where
            that is not possible, steps are eager and `Trainer` says why.
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
    cuda_graph: bool = False
    skip_bad_steps: bool = False


@dataclass(frozen=True)
class FinetuneConfig:
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


def _combine_seeds(keys: tuple[int, ...]) -> int:
    """One seed for several numbers."""
    return int(np.random.SeedSequence(keys).generate_state(1, np.uint64)[0])


def seed_everything(*keys: int) -> None:
    """Seed PyTorch from `keys` alone.

    Every step does so from (seed, stage, epoch, step, rank): a resumed run needs no stored
    random state to go on as if it had never stopped.
    """
    torch.manual_seed(_combine_seeds(keys))


def step_generator(*keys: int) -> torch.Generator:
    """Randomness of one step's augmentation, on the CPU: it depends on `keys` alone.

    Every step makes its own from (seed, stage, epoch, step, rank), so that it comes out
    the same whether or not the steps before it were run.
    """
    return torch.Generator().manual_seed(_combine_seeds(keys))


class EpochState:
    """What this process has counted of an epoch so far.

    Attributes:
        step: batches behind it.
        images: of all processes behind it: where to go on, even with other batches or as
            many other processes.
        sums: (2,) sums of the loss and of its weights.
        counts: of the training batches, see `PredictionJob.count`.
        skipped: updates left out because of their loss.
    """

    def __init__(self, counts: Tensor):
        self.step = self.images = self.skipped = 0
        self.sums = torch.zeros(2, device=counts.device)
        self.counts = counts

    def state(self, world: DistributedContext) -> dict[str, Any]:
        """For a checkpoint: the sums of all processes."""
        return {
            "step": self.step,
            "images": self.images,
            "skipped": self.skipped,
            "sums": world.all_reduce_sum(self.sums.clone()).cpu(),
            "counts": world.all_reduce_sum(self.counts.clone()).cpu(),
        }

    def restore(self, state: dict[str, Any], world: DistributedContext) -> None:
        """Go on from `state`, which rank 0 takes to itself."""
        self.step, self.images, self.skipped = state["step"], state["images"], state["skipped"]
        if world.is_main:
            self.sums.copy_(state["sums"])
            self.counts.copy_(state["counts"])


class LossMonitor:
    """Checks the losses of an epoch, on a GPU without making it wait.

    There, the losses of `CHECK_EVERY` steps are copied together, and read when the next ones are
    copied: the GPU is always a whole group of steps ahead.

    Args:
        check: called with (step, loss) of a group of steps, the same ones in every process.

    Attributes:
        mean: weighted mean of the losses read so far; NaN before the first.
    """

    def __init__(self, device: torch.device, check: Callable[[list[tuple[int, float]]], None]):
        self.check = check
        self.mean = math.nan
        self._cuda = device.type == "cuda"
        self._new: list[tuple[int, Tensor]] = []
        self._copied: tuple[list[int], Tensor, torch.cuda.Event | None] | None = None

    def add(self, step: int, loss: Tensor, sums: Tensor) -> None:
        """
        Args:
            loss: of this step, a scalar.
            sums: (2,) sums of loss and weights, of the epoch so far.
        """
        self._new.append((step, loss))
        if len(self._new) == (CHECK_EVERY if self._cuda else 1):
            self._copy(sums)

    def finish(self, sums: Tensor) -> None:
        """Check what is left at the end of an epoch."""
        if self._new:
            self._copy(sums)
        self._read()

    def _copy(self, sums: Tensor) -> None:
        values = torch.stack([*sums, *(loss for _, loss in self._new)])
        steps = [step for step, _ in self._new]
        self._new.clear()
        event = None
        if self._cuda:
            on_device = values
            values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            values.copy_(on_device, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self._read()
        self._copied = steps, values, event
        if not self._cuda:
            self._read()

    def _read(self) -> None:
        """Check the values that were copied last."""
        if self._copied is None:
            return
        steps, values, event = self._copied
        self._copied = None
        if event is not None:
            event.synchronize()
        loss_sum, weight_sum, *losses = values.tolist()
        self.mean = loss_sum / weight_sum if weight_sum else math.nan
        self.check(list(zip(steps, losses, strict=True)))


class Trainer:
    """A model with what moves it: loss, optimizer, schedule, loss scaling.

    Args:
        model: images (N, 3, H, W) -> logits (N, C, ...); already on `world.device`.
        task: what it is trained for.
        num_epochs: length of the schedule.
        count_training: count the training batches as well.
        pretrained: a part of `model` that is to be treated with care.
        notify: called with a sentence when steps cannot be done as `optimization` asks.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        num_epochs: int,
        world: DistributedContext,
        optimization: TrainerConfig,
        count_training: bool = True,
        pretrained: FinetuneConfig | None = None,
        notify: Callable[[str], None] = print,
    ):
        device = world.device
        self.model, self.world, self.optimization = model, world, optimization
        self.task, self.pretrained = task.to(device), pretrained
        self.num_epochs, self.count_training = num_epochs, count_training
        self.layout = torch.contiguous_format
        if optimization.channels_last:
            self.layout = torch.channels_last
            model.to(memory_format=self.layout)
        self.ema: AveragedModel | None = None
        self.updates = 0
        if (decay := optimization.ema_decay) is not None:
            mix_in = functools.partial(self._ema_update, decay)
            self.ema = AveragedModel(model, multi_avg_fn=mix_in, use_buffers=True)
        self.epoch = 1
        self.frozen = False
        self.notify = notify
        self.clock: StageClock | None = None
        self.record: Recorder | None = None
        if optimization.cuda_graph:
            if obstacle := self._graph_obstacle():
                self._step_eagerly(obstacle)
            else:
                self.record = record_cuda_graph
        self._captured: CapturedStep | None = None
        self._freeze(self._frozen_in(self.epoch))
        self.optimizer = self._make_optimizer()
        fp16 = optimization.precision == "fp16"
        self.scaler = torch.amp.GradScaler(device.type, enabled=fp16)

    def _ema_update(
        self, decay: float, averaged: Weights, current: Weights, _: Tensor | int
    ) -> None:
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
            optimizer: Optimizer = SGD(groups, momentum=0.9, **options)
        else:
            optimizer = Adam(groups, betas=(0.9, 0.999), eps=1e-8, **options)
        self._make_capturable(optimizer)
        return optimizer

    def _make_capturable(self, optimizer: Optimizer) -> None:
        """A CUDA graph reads the learning rate from the device's memory, other steps do not."""
        for group in optimizer.param_groups:
            lr = float(group["lr"])
            captured = self.record is not None
            group["lr"] = torch.tensor(lr, device=self.world.device) if captured else lr
            if "capturable" in group:
                group["capturable"] = captured

    def _graph_obstacle(self) -> str | None:
        """Why steps cannot be recorded as a CUDA graph; None if they can."""
        optimization = self.optimization
        if self.world.device.type != "cuda":
            return "it needs an NVIDIA GPU"
        if self.world.size > 1:
            return "it needs a single process"
        if optimization.precision == "fp16":
            return "the loss scaling of fp16 is not recorded"
        if optimization.accumulate > 1:
            return "it does not go with --accumulate"
        if optimization.skip_bad_steps:
            return "it does not go with --skip-bad-steps"
        return None

    def _step_eagerly(self, reason: str) -> None:
        self.record = None
        self.notify(f"--cuda-graph: steps are eager instead ({reason})")

    def _frozen_in(self, epoch: int) -> bool:
        return self.pretrained is not None and epoch <= self.pretrained.frozen_epochs

    def _freeze(self, frozen: bool) -> None:
        """Freeze or unfreeze the pretrained part; DDP has to be told anew what has gradients."""
        if self.pretrained is not None:
            self.pretrained.part.requires_grad_(not frozen)
        self.frozen = frozen
        self._captured = None
        self.wrapped = self.world.wrap_ddp(self.model)
        compiled = self.optimization.compile
        self.parallel = torch.compile(self.wrapped) if compiled else self.wrapped

    @property
    def eval_model(self) -> nn.Module:
        """The model that is evaluated and kept: the averaged one where there is one."""
        return self.model if self.ema is None else self.ema.module

    def state_dict(self) -> dict[str, Any]:
        """State of optimizer, scaler and average; the model's is kept beside it."""
        state: dict[str, Any] = {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }
        if self.ema is not None:
            state |= {"average": self.ema.state_dict(), "updates": self.updates}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self._make_capturable(self.optimizer)
        self.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            if "average" not in state:
                raise UserError("the run was begun without --ema-decay: resume it without")
            self.ema.load_state_dict(state["average"])
            self.updates = state["updates"]

    def keep_average(self) -> None:
        """Go on from the averaged weights, if there are any: those that were scored."""
        if self.ema is not None:
            self.model.load_state_dict(self.ema.module.state_dict())

    def new_epoch_state(self) -> EpochState:
        return EpochState(self.task.new_state())

    def start_epoch(self, epoch: int) -> float:
        """Get ready for `epoch`, counted from 1; returns its first learning rate."""
        self.epoch = epoch
        if self._frozen_in(epoch) != self.frozen:
            self._freeze(not self.frozen)
        return self._set_lr(0.0)

    def _set_lr(self, done: float, step: int = 0) -> float:
        """Set the learning rate of a step, `done` being the part of the epoch behind it; with a
        clock, the schedule follows the time instead."""
        optimization, behind = self.optimization, self.epoch - 1 + done
        if self.clock is not None:
            # Below the end, where schedules are not defined.
            behind = min(self.clock.share(step), 1 - 1e-6) * self.num_epochs
        factor = lr_factor(
            optimization.schedule, behind, self.num_epochs, optimization.warmup_epochs
        )
        lr = optimization.lr * factor
        factors = [1.0, self.pretrained.lr_factor] if self.pretrained else [1.0]
        for group, times in zip(self.optimizer.param_groups, factors, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr * times)
            else:
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
        joint = self.world.all_reduce_sum(sums.clone())
        done = True
        if self.optimization.skip_bad_steps:
            done = self._all_finite(joint[0], self._gradients())
        if done:
            self._move_weights(joint[1], answers)
            self._average_weights()
        self.optimizer.zero_grad(set_to_none=True)
        return done

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self.model.parameters() if p.grad is not None]

    def _move_weights(self, weight_sum: Tensor, answers: int) -> None:
        """The optimizer's step; `weight_sum` is that of all processes."""
        # DDP averages gradients over the processes; the loss is the mean over the weights.
        factor = self.world.size * answers / weight_sum.clamp(min=1e-12)
        torch._foreach_mul_(self._gradients(), factor)
        if self.optimization.clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.optimization.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def _average_weights(self) -> None:
        if self.ema is not None:
            self.ema.update_parameters(self.model)
            self.updates += 1

    def _whole_step(self, images: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Forward pass, backward pass and optimizer step, without waiting for the device: what a
        CUDA graph records. Returns logits and (loss sum, weight sum)."""
        logits, sums, answers = self._backward(images, target, update=True)
        self._move_weights(sums[1], answers)
        self.optimizer.zero_grad(set_to_none=True)
        return logits, sums

    def _changed_by_a_step(self) -> list[Tensor]:
        states = self.optimizer.state.values()
        kept = [value for state in states for value in state.values() if isinstance(value, Tensor)]
        return [*self.model.parameters(), *self.model.buffers(), *kept]

    def _captured_step(self, images: Tensor, target: Tensor) -> CapturedStep | None:
        """The recorded step, if there is one for batches of this shape. The first batch's shape
        is recorded; a smaller last batch is stepped eagerly."""
        if self.record is None:
            return None
        if self._captured is None:
            try:
                self._captured = CapturedStep(
                    self._whole_step, images, target, self._changed_by_a_step, self.layout,
                    self.record,
                )  # fmt: skip
            except RuntimeError as error:
                self.optimizer.zero_grad(set_to_none=True)
                self._step_eagerly(str(error).splitlines()[0])
                return None
        return self._captured if self._captured.fits(images, target) else None

    def _all_finite(self, loss: Tensor, gradients: list[Tensor]) -> bool:
        """Of scaled gradients, the scaler leaves out what is not finite, and scales less."""
        checked = loss if self.scaler.is_enabled() else loss + nn.utils.get_total_norm(gradients)
        return math.isfinite(checked)

    def train_one_epoch(
        self,
        loader: TrainBatches,
        title: str,
        keys: tuple[int, ...],
        tally: EpochState | None = None,
        after_update: Callable[[], None] = lambda: None,
    ) -> dict[str, Any]:
        """Train on every batch of `loader` once; with a `clock`, until its time is over.

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
        tally = tally or self.new_epoch_state()
        first, last = tally.step, tally.step + len(loader)
        images_seen, start = 0, time.perf_counter()
        group = torch.zeros(2, device=device)
        buffers = self._copied_buffers()
        monitor = LossMonitor(
            device, lambda losses: self._require_finite(losses, loader, title, first)
        )
        self.model.train()
        if self.pretrained is not None and self.frozen:
            self.pretrained.part.eval()
        with self._bar(loader, title) as bar:
            for step, batch in enumerate(loader, first):
                lr = self._set_lr(step / last, step)
                seed_everything(*keys, step, rank, 1)  # for dropout
                images, target = self._received(batch)
                generator = step_generator(*keys, step, rank)
                images, target = self.task.augment(images, target, generator)
                update = (step + 1) % self.optimization.accumulate == 0 or step + 1 == last
                captured = self._captured_step(images, target)
                if captured is not None:
                    logits, sums = captured(images, target)
                    sums = sums.clone()
                    self._average_weights()
                else:
                    logits, sums, answers = self._backward(images, target, update)
                group += sums
                if not self.optimization.skip_bad_steps:
                    monitor.add(step, sums[0], tally.sums + group)
                if self.count_training:
                    self.task.update(tally.counts, logits, target, exact=False)
                tally.step = step + 1
                tally.images += len(images) * self.world.size
                images_seen += len(images)
                if update:
                    if captured is not None or self._update(group, answers):
                        tally.sums += group
                        buffers = self._copied_buffers()
                    else:
                        tally.skipped += 1
                        self._restore_buffers(buffers)
                    group.zero_()
                    after_update()
                bar.update(len(images) * self.world.size)
                bar.set_postfix(loss=f"{monitor.mean:.3f}", lr=f"{lr:.1e}", refresh=False)
                if update and self.clock is not None and self.clock.share(step + 1) >= 1:
                    break
        monitor.finish(tally.sums)
        seconds = time.perf_counter() - start
        self.world.broadcast_buffers(self.model)
        if self.ema is not None:
            self.world.broadcast_buffers(self.ema)
        state = tally.state(self.world)
        score = self.task.score
        scores = self.task.compute(state["counts"]) if self.count_training else {score: None}
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
        self, losses: list[tuple[int, float]], loader: TrainBatches, title: str, first: int
    ) -> None:
        """Look at the losses of some steps, `first` being the loader's first; where one process
        stops, all do."""
        bad = [(step, value) for step, value in losses if not math.isfinite(value)]
        if not self.world.all_reduce_max(len(bad)):
            return
        if not bad:
            raise NonFiniteLoss(f"the loss of another process is not finite in {title}")
        step, value = bad[0]
        raise NonFiniteLoss(
            f"the loss is {value} in step {step + 1} of {title}, of "
            f"{', '.join(batch_names(loader, step - first))}"
        )

    @torch.inference_mode()
    def evaluate(
        self, loader: Batches, title: str, between: Callable[[], None] = lambda: None
    ) -> dict[str, Any]:
        """Score the model, in evaluation mode, on every image of `loader`.

        Args:
            loader: as for training.
            between: called after each batch.

        Returns:
            `loss` and the task's scores, over all processes.
        """
        model, task = self.eval_model, self.task
        was_training = model.training
        model.eval()
        counts, sums = task.new_state(), torch.zeros(2, device=self.world.device)
        with self._bar(loader, title) as bar:
            for batch in loader:
                images, target = task.normalize(*self._received(batch))
                with autocast(self.world.device, self.optimization.precision):
                    logits = model(images.contiguous(memory_format=self.layout))
                logits = logits.float()
                sums += torch.stack(task.loss(logits, target))
                task.update(counts, logits, target, exact=True)
                between()
                bar.update(len(images) * self.world.size)
        model.train(was_training)
        sums = self.world.all_reduce_sum(sums)
        return {
            "loss": none_if_nan((sums[0] / sums[1]).item()),
            **task.compute(self.world.all_reduce_sum(counts)),
        }

    def _received(self, batch: Iterable[Tensor]) -> Iterator[Tensor]:
        """The batch on this process's device; bytes, so that it is soon there."""
        return (part.to(self.world.device, non_blocking=True) for part in batch)

    def _bar(self, loader: Batches, title: str) -> tqdm:
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
