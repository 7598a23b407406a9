"""Training and evaluation of a model, one epoch at a time."""

import contextlib
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
from lednet.progress import progress_bar
from lednet.training.cuda_graph import CapturedStep, Recorder, record_cuda_graph
from lednet.training.loss_reader import LossReader
from lednet.training.lr_schedule import lr_factor
from lednet.training.tasks import Task
from lednet.training.time_budget import StageClock


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
        channels_last: use the channels-last memory format for weights and images.
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
    return int(np.random.SeedSequence(keys).generate_state(1, np.uint64)[0])


def seed_everything(*keys: int) -> None:
    """Seed PyTorch's global generators with the combination of `keys`."""
    torch.manual_seed(_combine_seeds(keys))


def step_generator(*keys: int) -> torch.Generator:
    """A CPU generator for the augmentation of one step, seeded with `keys`."""
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

    def state(self, dist_context: DistributedContext) -> dict[str, Any]:
        """Entries of a checkpoint, summed over all processes."""
        return {
            "step": self.step,
            "images": self.images,
            "skipped": self.skipped,
            "sums": dist_context.all_reduce_sum(self.sums.clone()).cpu(),
            "counts": dist_context.all_reduce_sum(self.counts.clone()).cpu(),
        }

    def restore(self, state: dict[str, Any], dist_context: DistributedContext) -> None:
        """Restore a state from a checkpoint. Rank 0 takes over the sums of all processes."""
        self.step, self.images, self.skipped = state["step"], state["images"], state["skipped"]
        if dist_context.is_main:
            self.sums.copy_(state["sums"])
            self.counts.copy_(state["counts"])


class Trainer:
    """Trains and evaluates a model: loss, optimizer, schedule, loss scaling.

    Args:
        model: maps images (N, 3, H, W) to logits (N, C, ...); already on the device of
            `dist_context`.
        task: augmentation, loss and metrics.
        num_epochs: length of the schedule.
        dist_context: all processes.
        config: options of the optimization.
        count_training: compute metrics of the training batches too.
        pretrained: a part of `model` with options of its own.
        notify: called with a sentence if steps cannot be recorded as a CUDA graph.

    Attributes:
        clock: with a time limit, the clock of the stage, which the schedule then follows.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        num_epochs: int,
        dist_context: DistributedContext,
        config: TrainerConfig,
        count_training: bool = True,
        pretrained: FinetuneConfig | None = None,
        notify: Callable[[str], None] = print,
    ):
        self.model, self.dist_context, self.config = model, dist_context, config
        self.device = dist_context.device
        self.task, self.pretrained, self.notify = task.to(self.device), pretrained, notify
        self.num_epochs, self.count_training = num_epochs, count_training
        self.memory_format = torch.contiguous_format
        if config.channels_last:
            self.memory_format = torch.channels_last
            model.to(memory_format=self.memory_format)
        self.ema: AveragedModel | None = None
        if config.ema_decay is not None:
            self.ema = AveragedModel(model, multi_avg_fn=self._ema_update, use_buffers=True)
        self.epoch = 1
        self.clock: StageClock | None = None
        self.record: Recorder | None = None
        if config.cuda_graph:
            self.record = record_cuda_graph
            if obstacle := self._graph_obstacle():
                self._disable_graph(obstacle)
        self._captured: CapturedStep | None = None
        self._freeze(self._frozen_in(self.epoch))
        self.optimizer = self._make_optimizer()
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "fp16")

    def _ema_update(self, averaged: Any, current: Any, num_averaged: Any) -> None:
        """Update the moving average. The decay starts low, so that a short run does not keep its
        initial weights (as in TensorFlow's ExponentialMovingAverage)."""
        assert self.ema is not None and self.config.ema_decay is not None
        updates = int(self.ema.n_averaged)  # on the CPU, unlike `num_averaged`
        decay = min(self.config.ema_decay, (1 + updates) / (10 + updates))
        get_ema_multi_avg_fn(decay)(averaged, current, num_averaged)

    def _make_optimizer(self) -> Optimizer:
        """The optimizer; its last parameter group is the pretrained part, if there is one."""
        config = self.config
        part = [] if self.pretrained is None else list(self.pretrained.part.parameters())
        known = {id(parameter) for parameter in part}
        groups = [{"params": [p for p in self.model.parameters() if id(p) not in known]}]
        if self.pretrained is not None:
            groups.append({"params": part})
        fused = self.device.type in ("cpu", "cuda")
        options: dict[str, Any] = {
            "lr": config.lr, "weight_decay": config.weight_decay, "fused": fused,
        }  # fmt: skip
        optimizer: Optimizer
        if config.optimizer == "sgd":
            optimizer = SGD(groups, momentum=0.9, **options)
        else:
            optimizer = Adam(groups, betas=(0.9, 0.999), eps=1e-8, **options)
        self._make_capturable(optimizer)
        return optimizer

    def _make_capturable(self, optimizer: Optimizer) -> None:
        """Keep the learning rate in device memory if steps are recorded as a CUDA graph."""
        captured = self.record is not None
        for group in optimizer.param_groups:
            lr = float(group["lr"])
            group["lr"] = torch.tensor(lr, device=self.device) if captured else lr
            if "capturable" in group:
                group["capturable"] = captured

    def _graph_obstacle(self) -> str | None:
        """Why steps cannot be recorded as a CUDA graph; None if they can."""
        config, context = self.config, self.dist_context
        obstacles = {
            "it needs an NVIDIA GPU": context.device.type != "cuda",
            "it needs a single process": context.size > 1,
            "the loss scaling of fp16 is not recorded": config.precision == "fp16",
            "it does not go with --accumulate": config.accumulate > 1,
            "it does not go with --skip-bad-steps": config.skip_bad_steps,
        }
        return next((reason for reason, present in obstacles.items() if present), None)

    def _disable_graph(self, reason: str) -> None:
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
        self.wrapped = self.dist_context.wrap_ddp(self.model)
        self.parallel = torch.compile(self.wrapped) if self.config.compile else self.wrapped

    @property
    def eval_model(self) -> nn.Module:
        """The model that is evaluated and saved: the averaged one, if there is an average."""
        return self.model if self.ema is None else self.ema.module

    def state_dict(self) -> dict[str, Any]:
        """State of optimizer, scaler and average. That of the model is saved separately."""
        state = {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}
        return state if self.ema is None else state | {"average": self.ema.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self._make_capturable(self.optimizer)
        self.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            if "average" not in state:
                raise UserError("the run was started without --ema-decay: resume it without")
            self.ema.load_state_dict(state["average"])

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
        """Set and return the learning rate of `step`, before which `done` of the epoch, 0 to 1, is
        finished. With a time limit, the schedule follows the time instead of the epochs."""
        config, epochs = self.config, self.epoch - 1 + done
        if self.clock is not None:  # schedules are not defined at the end itself
            epochs = min(self.clock.share(step), 1 - 1e-6) * self.num_epochs
        lr = config.lr * lr_factor(config.schedule, epochs, self.num_epochs, config.warmup_epochs)
        factors = [1.0, self.pretrained.lr_factor] if self.pretrained else [1.0]
        for group, factor in zip(self.optimizer.param_groups, factors, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr * factor)
            else:
                group["lr"] = lr * factor
        return lr

    def _backward(self, images: Tensor, target: Tensor, update: bool) -> tuple[Tensor, Tensor, int]:
        """Accumulate the gradients of a batch; with `update`, DDP reduces them. Returns logits,
        (loss sum, weight sum), and the divisor of the loss: outputs per image."""
        sync: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if not update and isinstance(self.wrapped, DistributedDataParallel):
            sync = self.wrapped.no_sync()
        with sync:
            with autocast(self.device, self.config.precision):
                logits = self.parallel(images.contiguous(memory_format=self.memory_format))
            loss_sum, weight_sum = self.task.loss(logits, target)
            # All batches and processes have the same divisor, so that their gradients can be
            # added; `_optimizer_step` rescales the sum to the joint mean.
            divisor = math.prod(logits.shape[2:])
            self.scaler.scale(loss_sum / divisor).backward()
        return logits.detach(), torch.stack((loss_sum.detach(), weight_sum)), divisor

    def _update(self, sums: Tensor, divisor: int) -> bool:
        """Take an optimizer step, unless `skip_bad_steps` is set and loss or gradients are not
        finite; returns whether it was taken. `sums`: (loss sum, weight sum) of this process."""
        joint = self.dist_context.all_reduce_sum(sums.clone())
        finite = True
        if self.config.skip_bad_steps:
            # The scaler of fp16 checks the gradients itself.
            unscaled = not self.scaler.is_enabled()
            norm = nn.utils.get_total_norm(self._gradients()) if unscaled else 0.0
            finite = math.isfinite(joint[0] + norm)
        if finite:
            self._optimizer_step(joint[1], divisor)
            self._average_weights()
        self.optimizer.zero_grad(set_to_none=True)
        return finite

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self.model.parameters() if p.grad is not None]

    def _optimizer_step(self, weight_sum: Tensor, divisor: int) -> None:
        """Rescale the gradients to those of the joint mean, clip them, and update the weights."""
        # DDP averages gradients over the processes; the loss is the mean over the weights.
        factor = self.dist_context.size * divisor / weight_sum.clamp(min=1e-12)
        torch._foreach_mul_(self._gradients(), factor)
        if self.config.clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def _average_weights(self) -> None:
        if self.ema is not None:
            self.ema.update_parameters(self.model)

    def _whole_step(self, images: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """The part of a step that a CUDA graph records; returns logits and (loss, weight sum)."""
        logits, sums, divisor = self._backward(images, target, update=True)
        self._optimizer_step(sums[1], divisor)
        self.optimizer.zero_grad(set_to_none=True)
        return logits, sums

    def _mutable_tensors(self) -> list[Tensor]:
        """Tensors that a step changes."""
        states = self.optimizer.state.values()
        moments = [v for state in states for v in state.values() if isinstance(v, Tensor)]
        return [*self.model.parameters(), *self.model.buffers(), *moments]

    def _captured_step(self, images: Tensor, target: Tensor) -> CapturedStep | None:
        """The step recorded for the shape of the first batch; None for batches of other shapes,
        and if steps are eager."""
        if self.record is None:
            return None
        if self._captured is None:
            try:
                self._captured = CapturedStep(
                    self._whole_step, images, target, self._mutable_tensors, self.memory_format,
                    self.record,
                )  # fmt: skip
            except RuntimeError as error:
                self.optimizer.zero_grad(set_to_none=True)
                self._disable_graph(str(error).splitlines()[0])
                return None
        return self._captured if self._captured.fits(images, target) else None

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
            title: title of the progress bar.
            keys: (seed, stage, epoch). The random numbers of a step depend on them, its number and
                the rank only, so that a resumed run needs no stored random state.
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
        accumulated = torch.zeros(2, device=self.device)
        buffers = self._copy_buffers()
        reader, check = LossReader(self.device), not self.config.skip_bad_steps
        self.model.train()
        if self.pretrained is not None and self.frozen:
            self.pretrained.part.eval()
        with self._progress_bar(loader, title) as bar:
            for step, batch in enumerate(loader, first):
                lr = self._set_lr(step / last, step)
                step_keys = (*keys, step, self.dist_context.rank)
                seed_everything(*step_keys, 1)  # of dropout
                images, target = self._to_device(batch)
                images, target = self.task.augment(images, target, step_generator(*step_keys))
                update = (step + 1) % self.config.accumulate == 0 or step + 1 == last
                captured = self._captured_step(images, target)
                if captured is not None:
                    logits, sums = captured(images, target)
                    self._average_weights()
                else:
                    logits, sums, divisor = self._backward(images, target, update)
                accumulated += sums
                losses = reader.add(step, sums[0], state.sums + accumulated)
                if check:
                    self._require_finite(losses, loader, title, first)
                if self.count_training:
                    self.task.update(state.counts, logits, target, exact=False)
                state.step = step + 1
                state.images += len(images) * self.dist_context.size
                if update:
                    if captured is not None or self._update(accumulated, divisor):
                        state.sums += accumulated
                        buffers = self._copy_buffers()
                    else:
                        state.skipped += 1
                        for buffer, kept in zip(self.model.buffers(), buffers, strict=True):
                            buffer.copy_(kept)
                    accumulated.zero_()
                    after_step()
                bar.update(len(images) * self.dist_context.size)
                bar.set_postfix(loss=f"{reader.mean:.3f}", lr=f"{lr:.1e}", refresh=False)
                if update and self.clock is not None and self.clock.share(step + 1) >= 1:
                    break
        losses = reader.finish(state.sums)
        if check:
            self._require_finite(losses, loader, title, first)
        rate = (state.images - images_before) / (time.perf_counter() - start)
        self.dist_context.broadcast_buffers(self.model)
        if self.ema is not None:
            self.dist_context.broadcast_buffers(self.ema.module)
        joint, score = state.state(self.dist_context), self.task.score
        loss_sum, weight_sum = joint["sums"].tolist()
        return {
            "loss": loss_sum / max(weight_sum, 1e-12),
            score: self.task.compute(joint["counts"])[score] if self.count_training else None,
            "images_per_second": rate,
            **({"skipped": state.skipped} if state.skipped else {}),
        }

    def _copy_buffers(self) -> list[Tensor]:
        """Copies of the running statistics, which a step changes even if it is skipped later."""
        buffers = self.model.buffers() if self.config.skip_bad_steps else ()
        return [buffer.clone() for buffer in buffers]

    def _require_finite(
        self, losses: dict[int, float], loader: TrainBatches, title: str, first: int
    ) -> None:
        """Raise `NonFiniteLoss` in all processes if a loss is not finite in one of them.

        Args:
            losses: losses by step; of the same steps in all processes.
            first: number of the first step of `loader`.
        """
        bad = [(step, loss) for step, loss in losses.items() if not math.isfinite(loss)]
        if not losses or not self.dist_context.all_reduce_max(len(bad)):
            return
        if not bad:
            raise NonFiniteLoss(f"the loss of another process is not finite in {title}")
        step, value = bad[0]
        names = ", ".join(batch_names(loader, step - first))
        raise NonFiniteLoss(f"the loss is {value} in step {step + 1} of {title}, of {names}")

    @torch.inference_mode()
    def evaluate(
        self, loader: Batches, title: str, after_batch: Callable[[], None] = lambda: None
    ) -> dict[str, Any]:
        """Evaluate the model on every image of `loader`.

        Args:
            loader: yields images (N, 3, H, W) uint8 and their targets.
            title: title of the progress bar.
            after_batch: called after each batch.

        Returns:
            "loss" and the task's scores, over all processes.
        """
        model, task = self.eval_model, self.task
        was_training = model.training
        model.eval()
        counts, sums = task.new_state(), torch.zeros(2, device=self.device)
        with self._progress_bar(loader, title) as bar:
            for batch in loader:
                images, target = task.normalize(*self._to_device(batch))
                with autocast(self.device, self.config.precision):
                    logits = model(images.contiguous(memory_format=self.memory_format))
                logits = logits.float()
                sums += torch.stack(task.loss(logits, target))
                task.update(counts, logits, target, exact=True)
                after_batch()
                bar.update(len(images) * self.dist_context.size)
        model.train(was_training)
        sums = self.dist_context.all_reduce_sum(sums)
        return {
            "loss": none_if_nan((sums[0] / sums[1]).item()),
            **task.compute(self.dist_context.all_reduce_sum(counts)),
        }

    def _to_device(self, batch: Iterable[Tensor]) -> Iterator[Tensor]:
        return (part.to(self.device, non_blocking=True) for part in batch)

    def _progress_bar(self, loader: Batches, title: str) -> tqdm:
        """A progress bar in images of all processes, shown by the main process."""
        return progress_bar(
            total=len(loader.sampler) * self.dist_context.size, lines=4, desc=title, unit="image",
            disable=not self.dist_context.is_main,
        )  # fmt: skip
