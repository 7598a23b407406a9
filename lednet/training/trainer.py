"""Training and evaluation of a model, one epoch at a time."""

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
"""Steps between two checks of the loss on a GPU. On a CPU each loss is checked at once."""


class NonFiniteLoss(UserError):
    """The loss is infinite or NaN; the message names the step and its images."""


@dataclass(frozen=True)
class TrainerConfig:
    """Options of the optimization. The defaults are the paper's for segmentation.

    Attributes:
        optimizer: "adam" (betas 0.9 and 0.999, eps 1e-8) or "sgd" (momentum 0.9).
        lr: initial learning rate.
        weight_decay: L2 penalty on all weights.
        schedule: a key of `lednet.training.lr_schedule.SCHEDULES`.
        warmup_epochs: epochs of linear warm-up before the schedule.
        precision: a key of `lednet.device.AMP_DTYPES`.
        accumulate: batches whose gradients are accumulated for one step. They are weighted as
            one large batch, except in batch norm.
        clip_norm: maximum norm of the gradients; None for no clipping.
        ema_decay: decay of an exponential moving average of the weights, which is then evaluated
            and saved; None for no average. In step n the decay is at most (1 + n) / (10 + n).
        channels_last: memory format of weights and images.
        compile: compile the network with `torch.compile`.
        cuda_graph: record forward pass, backward pass and optimizer step as one CUDA graph. If
            that is not possible, steps are eager, and `Trainer` reports the reason.
        skip_bad_steps: skip a step whose loss or gradients are not finite. This checks every
            step, which makes a GPU wait.
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
    """How a pretrained part of a model is trained.

    Attributes:
        part: the module.
        lr_factor: its learning rate relative to that of the other parameters.
        frozen_epochs: epochs at the start in which it is frozen, in evaluation mode.
    """

    part: nn.Module
    lr_factor: float = 1.0
    frozen_epochs: int = 0


def _combine_seeds(keys: tuple[int, ...]) -> int:
    """A single seed from several integers."""
    return int(np.random.SeedSequence(keys).generate_state(1, np.uint64)[0])


def seed_everything(*keys: int) -> None:
    """Seed PyTorch's global generators.

    The trainer does so before every step, from (seed, stage, epoch, step, rank). A resumed run
    therefore needs no stored random state.
    """
    torch.manual_seed(_combine_seeds(keys))


def step_generator(*keys: int) -> torch.Generator:
    """A CPU generator for the augmentation of one step, seeded from `keys`.

    It does not depend on the steps before, so that a resumed run draws the same numbers.
    """
    return torch.Generator().manual_seed(_combine_seeds(keys))


class EpochState:
    """State of an epoch in this process.

    Attributes:
        step: batches trained so far.
        images: images trained so far in all processes. A resumed epoch starts after them, with
            any batch size and number of processes.
        sums: (2,) sums of the losses and of their weights.
        counts: statistics of the training batches, see `Task.update`.
        skipped: steps skipped because they were not finite.
    """

    def __init__(self, counts: Tensor):
        self.step = self.images = self.skipped = 0
        self.sums = torch.zeros(2, device=counts.device)
        self.counts = counts

    def state(self, world: DistributedContext) -> dict[str, Any]:
        """Entries of a checkpoint, summed over all processes."""
        return {
            "step": self.step,
            "images": self.images,
            "skipped": self.skipped,
            "sums": world.all_reduce_sum(self.sums.clone()).cpu(),
            "counts": world.all_reduce_sum(self.counts.clone()).cpu(),
        }

    def restore(self, state: dict[str, Any], world: DistributedContext) -> None:
        """Restore a state from a checkpoint. Rank 0 takes over the sums of all processes."""
        self.step, self.images, self.skipped = state["step"], state["images"], state["skipped"]
        if world.is_main:
            self.sums.copy_(state["sums"])
            self.counts.copy_(state["counts"])


class LossMonitor:
    """Checks the losses of an epoch without making a GPU wait.

    On a GPU, the losses of `CHECK_EVERY` steps are copied together and read when the next group
    is copied, while the GPU computes.

    Args:
        check: called with (step, loss) pairs of a group of steps, the same in every process.

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
        """Add the loss of a step.

        Args:
            loss: scalar.
            sums: (2,) sums of losses and weights in the epoch so far.
        """
        self._new.append((step, loss))
        if len(self._new) == (CHECK_EVERY if self._cuda else 1):
            self._copy(sums)

    def finish(self, sums: Tensor) -> None:
        """Check the remaining losses at the end of an epoch."""
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
        """Read and check the values that were copied last."""
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
    """Trains and evaluates a model: loss, optimizer, schedule, loss scaling.

    Args:
        model: maps images (N, 3, H, W) to logits (N, C, ...); already on `world.device`.
        task: augmentation, loss and metrics.
        num_epochs: length of the schedule.
        world: all processes.
        config: options of the optimization.
        count_training: compute metrics of the training batches too.
        pretrained: a part of `model` with options of its own.
        notify: called with a sentence if steps cannot be recorded as a CUDA graph.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        num_epochs: int,
        world: DistributedContext,
        config: TrainerConfig,
        count_training: bool = True,
        pretrained: FinetuneConfig | None = None,
        notify: Callable[[str], None] = print,
    ):
        device = world.device
        self.model, self.world, self.config = model, world, config
        self.task, self.pretrained = task.to(device), pretrained
        self.num_epochs, self.count_training = num_epochs, count_training
        self.layout = torch.contiguous_format
        if config.channels_last:
            self.layout = torch.channels_last
            model.to(memory_format=self.layout)
        self.ema: AveragedModel | None = None
        self.updates = 0
        if (decay := config.ema_decay) is not None:
            mix_in = functools.partial(self._ema_update, decay)
            self.ema = AveragedModel(model, multi_avg_fn=mix_in, use_buffers=True)
        self.epoch = 1
        self.frozen = False
        self.notify = notify
        self.clock: StageClock | None = None
        self.record: Recorder | None = None
        if config.cuda_graph:
            if obstacle := self._graph_obstacle():
                self._step_eagerly(obstacle)
            else:
                self.record = record_cuda_graph
        self._captured: CapturedStep | None = None
        self._freeze(self._frozen_in(self.epoch))
        self.optimizer = self._make_optimizer()
        fp16 = config.precision == "fp16"
        self.scaler = torch.amp.GradScaler(device.type, enabled=fp16)

    def _ema_update(
        self, decay: float, averaged: Weights, current: Weights, _: Tensor | int
    ) -> None:
        """Update the moving average. The decay starts low, so that a short run does not keep its
        initial weights (as in TensorFlow's ExponentialMovingAverage)."""
        decay = min(decay, (1 + self.updates) / (10 + self.updates))
        get_ema_multi_avg_fn(decay)(averaged, current, _)

    def _make_optimizer(self) -> Optimizer:
        """The optimizer; its last parameter group is the pretrained part, if there is one."""
        config, pretrained = self.config, self.pretrained
        known = {id(p) for p in pretrained.part.parameters()} if pretrained else set()
        groups: list[dict[str, Any]] = [
            {"params": [p for p in self.model.parameters() if id(p) not in known]}
        ]
        if pretrained:
            groups.append({"params": list(pretrained.part.parameters())})
        options: dict[str, Any] = {
            "lr": config.lr,
            "weight_decay": config.weight_decay,
            "fused": self.world.device.type in ("cpu", "cuda"),
        }
        if config.optimizer == "sgd":
            optimizer: Optimizer = SGD(groups, momentum=0.9, **options)
        else:
            optimizer = Adam(groups, betas=(0.9, 0.999), eps=1e-8, **options)
        self._make_capturable(optimizer)
        return optimizer

    def _make_capturable(self, optimizer: Optimizer) -> None:
        """Keep the learning rate in device memory if steps are recorded as a CUDA graph."""
        for group in optimizer.param_groups:
            lr = float(group["lr"])
            captured = self.record is not None
            group["lr"] = torch.tensor(lr, device=self.world.device) if captured else lr
            if "capturable" in group:
                group["capturable"] = captured

    def _graph_obstacle(self) -> str | None:
        """Why steps cannot be recorded as a CUDA graph; None if they can."""
        config = self.config
        if self.world.device.type != "cuda":
            return "it needs an NVIDIA GPU"
        if self.world.size > 1:
            return "it needs a single process"
        if config.precision == "fp16":
            return "the loss scaling of fp16 is not recorded"
        if config.accumulate > 1:
            return "it does not go with --accumulate"
        if config.skip_bad_steps:
            return "it does not go with --skip-bad-steps"
        return None

    def _step_eagerly(self, reason: str) -> None:
        self.record = None
        self.notify(f"--cuda-graph: steps are eager instead ({reason})")

    def _frozen_in(self, epoch: int) -> bool:
        return self.pretrained is not None and epoch <= self.pretrained.frozen_epochs

    def _freeze(self, frozen: bool) -> None:
        """Freeze or unfreeze the pretrained part, and wrap the model in DDP again, which needs to
        know the parameters that have gradients."""
        if self.pretrained is not None:
            self.pretrained.part.requires_grad_(not frozen)
        self.frozen = frozen
        self._captured = None
        self.wrapped = self.world.wrap_ddp(self.model)
        compiled = self.config.compile
        self.parallel = torch.compile(self.wrapped) if compiled else self.wrapped

    @property
    def eval_model(self) -> nn.Module:
        """The model that is evaluated and saved: the averaged one, if there is an average."""
        return self.model if self.ema is None else self.ema.module

    def state_dict(self) -> dict[str, Any]:
        """State of optimizer, scaler and average. That of the model is saved separately."""
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
                raise UserError("the run was started without --ema-decay: resume it without")
            self.ema.load_state_dict(state["average"])
            self.updates = state["updates"]

    def copy_ema_to_model(self) -> None:
        """Replace the weights by their average, if there is one."""
        if self.ema is not None:
            self.model.load_state_dict(self.ema.module.state_dict())

    def new_epoch_state(self) -> EpochState:
        return EpochState(self.task.new_state())

    def start_epoch(self, epoch: int) -> float:
        """Prepare for `epoch`, counted from 1; returns its first learning rate."""
        self.epoch = epoch
        if self._frozen_in(epoch) != self.frozen:
            self._freeze(not self.frozen)
        return self._set_lr(0.0)

    def _set_lr(self, done: float, step: int = 0) -> float:
        """Set the learning rate of a step.

        With a time limit, the schedule follows the time instead of the epochs.

        Args:
            done: finished part of the epoch, 0 to 1.
            step: number of the step in the epoch.
        """
        config, epochs = self.config, self.epoch - 1 + done
        if self.clock is not None:
            # Schedules are not defined at the end itself.
            epochs = min(self.clock.share(step), 1 - 1e-6) * self.num_epochs
        factor = lr_factor(config.schedule, epochs, self.num_epochs, config.warmup_epochs)
        lr = config.lr * factor
        factors = [1.0, self.pretrained.lr_factor] if self.pretrained else [1.0]
        for group, times in zip(self.optimizer.param_groups, factors, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr * times)
            else:
                group["lr"] = lr * times
        return lr

    def _backward(self, images: Tensor, target: Tensor, update: bool) -> tuple[Tensor, Tensor, int]:
        """Accumulate the gradients of a batch.

        Args:
            update: whether an optimizer step follows; DDP reduces the gradients only then.

        Returns:
            Logits, (loss sum, weight sum), and the divisor of the loss: outputs per image.
        """
        images = images.contiguous(memory_format=self.layout)
        together: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if not update and isinstance(self.wrapped, DistributedDataParallel):
            together = self.wrapped.no_sync()
        with together:
            with autocast(self.world.device, self.config.precision):
                logits = self.parallel(images)
            loss_sum, weight_sum = self.task.loss(logits, target)
            # All batches and processes have the same divisor, so that their gradients can be
            # added; `_optimizer_step` rescales the sum to the joint mean.
            divisor = math.prod(logits.shape[2:])
            self.scaler.scale(loss_sum / divisor).backward()
        return logits.detach(), torch.stack((loss_sum.detach(), weight_sum)), divisor

    def _update(self, sums: Tensor, divisor: int) -> bool:
        """Take an optimizer step with the accumulated gradients.

        Args:
            sums: (loss sum, weight sum) of the accumulated batches in this process.
            divisor: as returned by `_backward`.

        Returns:
            Whether the step was taken. With `skip_bad_steps` it is skipped if loss or gradients
            are not finite.
        """
        joint = self.world.all_reduce_sum(sums.clone())
        done = True
        if self.config.skip_bad_steps:
            done = self._all_finite(joint[0], self._gradients())
        if done:
            self._optimizer_step(joint[1], divisor)
            self._average_weights()
        self.optimizer.zero_grad(set_to_none=True)
        return done

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self.model.parameters() if p.grad is not None]

    def _optimizer_step(self, weight_sum: Tensor, divisor: int) -> None:
        """Rescale the gradients to those of the joint mean, clip them, and update the weights.

        Args:
            weight_sum: sum of the loss weights over all processes.
        """
        # DDP averages gradients over the processes; the loss is the mean over the weights.
        factor = self.world.size * divisor / weight_sum.clamp(min=1e-12)
        torch._foreach_mul_(self._gradients(), factor)
        if self.config.clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def _average_weights(self) -> None:
        if self.ema is not None:
            self.ema.update_parameters(self.model)
            self.updates += 1

    def _whole_step(self, images: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """The part of a step that a CUDA graph records; it does not wait for the device.

        Returns:
            Logits, and (loss sum, weight sum).
        """
        logits, sums, divisor = self._backward(images, target, update=True)
        self._optimizer_step(sums[1], divisor)
        self.optimizer.zero_grad(set_to_none=True)
        return logits, sums

    def _changed_by_a_step(self) -> list[Tensor]:
        states = self.optimizer.state.values()
        kept = [value for state in states for value in state.values() if isinstance(value, Tensor)]
        return [*self.model.parameters(), *self.model.buffers(), *kept]

    def _captured_step(self, images: Tensor, target: Tensor) -> CapturedStep | None:
        """The recorded step, if there is one for batches of this shape.

        The step is recorded for the shape of the first batch; a smaller last batch is eager.
        """
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
        """Whether loss and gradients are finite. The scaler of fp16 checks gradients itself."""
        checked = loss if self.scaler.is_enabled() else loss + nn.utils.get_total_norm(gradients)
        return math.isfinite(checked)

    def train_one_epoch(
        self,
        loader: TrainBatches,
        title: str,
        keys: tuple[int, ...],
        state: EpochState | None = None,
        after_step: Callable[[], None] = lambda: None,
    ) -> dict[str, Any]:
        """Train on every batch of `loader` once; with a `clock`, until its time is over.

        Args:
            loader: yields images (N, 3, H, W) uint8 and their targets.
            title: of the progress bar.
            keys: (seed, stage, epoch). The random numbers of a step depend on them, its number and
                the process only, so that a resumed run needs no stored random state.
            state: state of an interrupted epoch, whose batches `loader` leaves out; updated.
            after_step: called after each optimizer step, when weights and `state` agree.

        Returns:
            "loss" (mean over the epoch), the task's score (None unless computed),
            "images_per_second", and "skipped" steps if there were any.

        Raises:
            NonFiniteLoss: a loss is not finite, unless `skip_bad_steps` is set.
            RuntimeError: a loading process died; see `worker_failures`.
        """
        state = state or self.new_epoch_state()
        first, last = state.step, state.step + len(loader)
        images_before, start = state.images, time.perf_counter()
        group = torch.zeros(2, device=self.world.device)
        buffers = self._copied_buffers()
        monitor = LossMonitor(
            self.world.device, lambda losses: self._require_finite(losses, loader, title, first)
        )
        self.model.train()
        if self.pretrained is not None and self.frozen:
            self.pretrained.part.eval()
        with self._bar(loader, title) as bar:
            for step, batch in enumerate(loader, first):
                lr = self._set_lr(step / last, step)
                images, target = self._augmented(batch, keys, step)
                update = (step + 1) % self.config.accumulate == 0 or step + 1 == last
                captured = self._captured_step(images, target)
                if captured is not None:
                    logits, sums = captured(images, target)
                    sums = sums.clone()
                    self._average_weights()
                else:
                    logits, sums, divisor = self._backward(images, target, update)
                group += sums
                if not self.config.skip_bad_steps:
                    monitor.add(step, sums[0], state.sums + group)
                if self.count_training:
                    self.task.update(state.counts, logits, target, exact=False)
                state.step = step + 1
                state.images += len(images) * self.world.size
                if update:
                    if captured is not None or self._update(group, divisor):
                        state.sums += group
                        buffers = self._copied_buffers()
                    else:
                        state.skipped += 1
                        self._restore_buffers(buffers)
                    group.zero_()
                    after_step()
                bar.update(len(images) * self.world.size)
                bar.set_postfix(loss=f"{monitor.mean:.3f}", lr=f"{lr:.1e}", refresh=False)
                if update and self.clock is not None and self.clock.share(step + 1) >= 1:
                    break
        monitor.finish(state.sums)
        rate = (state.images - images_before) / (time.perf_counter() - start)
        return self._epoch_results(state, rate)

    def _augmented(
        self, batch: Iterable[Tensor], keys: tuple[int, ...], step: int
    ) -> tuple[Tensor, Tensor]:
        """A training batch on the device, augmented; also seeds the dropout of the step."""
        rank = self.world.rank
        seed_everything(*keys, step, rank, 1)
        images, target = self._received(batch)
        return self.task.augment(images, target, step_generator(*keys, step, rank))

    def _epoch_results(self, state: EpochState, images_per_second: float) -> dict[str, Any]:
        """Results of `train_one_epoch`, over all processes."""
        self.world.broadcast_buffers(self.model)
        if self.ema is not None:
            self.world.broadcast_buffers(self.ema)
        joint, score = state.state(self.world), self.task.score
        scores = self.task.compute(joint["counts"]) if self.count_training else {score: None}
        return {
            "loss": _mean(joint["sums"]),
            score: scores[score],
            "images_per_second": images_per_second,
            **({"skipped": state.skipped} if state.skipped else {}),
        }

    def _copied_buffers(self) -> list[Tensor]:
        """Copies of the running statistics, which a skipped step has already changed."""
        if not self.config.skip_bad_steps:
            return []
        return [buffer.clone() for buffer in self.model.buffers()]

    def _restore_buffers(self, buffers: list[Tensor]) -> None:
        for buffer, kept in zip(self.model.buffers(), buffers, strict=True):
            buffer.copy_(kept)

    def _require_finite(
        self, losses: list[tuple[int, float]], loader: TrainBatches, title: str, first: int
    ) -> None:
        """Raise `NonFiniteLoss` in all processes if a loss is not finite in one of them.

        Args:
            losses: (step, loss) pairs.
            first: number of the first step of `loader`.
        """
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
        self, loader: Batches, title: str, after_batch: Callable[[], None] = lambda: None
    ) -> dict[str, Any]:
        """Evaluate the model on every image of `loader`.

        Args:
            loader: yields images (N, 3, H, W) uint8 and their targets.
            title: of the progress bar.
            after_batch: called after each batch.

        Returns:
            "loss" and the task's scores, over all processes.
        """
        model, task = self.eval_model, self.task
        was_training = model.training
        model.eval()
        counts, sums = task.new_state(), torch.zeros(2, device=self.world.device)
        with self._bar(loader, title) as bar:
            for batch in loader:
                images, target = task.normalize(*self._received(batch))
                with autocast(self.world.device, self.config.precision):
                    logits = model(images.contiguous(memory_format=self.layout))
                logits = logits.float()
                sums += torch.stack(task.loss(logits, target))
                task.update(counts, logits, target, exact=True)
                after_batch()
                bar.update(len(images) * self.world.size)
        model.train(was_training)
        sums = self.world.all_reduce_sum(sums)
        return {
            "loss": none_if_nan((sums[0] / sums[1]).item()),
            **task.compute(self.world.all_reduce_sum(counts)),
        }

    def _received(self, batch: Iterable[Tensor]) -> Iterator[Tensor]:
        """The tensors of a batch on this process's device."""
        return (part.to(self.world.device, non_blocking=True) for part in batch)

    def _bar(self, loader: Batches, title: str) -> tqdm:
        """A progress bar in images, shown by the main process for all."""
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
