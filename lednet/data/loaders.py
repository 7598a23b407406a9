"""Loading processes: what they deliver, how they end, and what is said when one dies."""

import contextlib
import signal
from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from lednet.data.dataset import PairDataset
from lednet.data.device_cache import DeviceLoader, load_to_device
from lednet.data.samplers import (
    ClassUniformSampler,
    DistributedEvalSampler,
    ResumableDistributedSampler,
)
from lednet.distributed import DistributedContext
from lednet.errors import UserError


class Loader(DataLoader[tuple[Tensor, Tensor]]):
    """Batches of this process's share of the samples."""

    dataset: PairDataset
    sampler: DistributedEvalSampler | ResumableDistributedSampler
    batch_size: int


class TrainLoader(Loader):
    """The same, shuffled."""

    sampler: ResumableDistributedSampler


Batches = Loader | DeviceLoader[DistributedEvalSampler] | DeviceLoader[ResumableDistributedSampler]
TrainBatches = TrainLoader | DeviceLoader[ResumableDistributedSampler]

WORKER_FAILURE = "DataLoader worker (pid"
"""What PyTorch says first when a loading process has died."""


def make_loaders(
    train: PairDataset,
    val: PairDataset,
    world: DistributedContext,
    batch_size: int,
    workers: int,
    seed: int,
    class_counts: np.ndarray | None = None,
    class_uniform: float = 0.0,
    on_device: bool = False,
) -> tuple[TrainBatches, Batches]:
    """Loaders of this process's share of both data sets; no image is left out.

    Args:
        batch_size: images a step in each process.
        workers: loading processes for each loader; 0 loads in the training process.
        class_counts, class_uniform: see `ClassUniformSampler`; None and 0 take every training
            image once an epoch.
        on_device: decode both data sets into the memory of `world.device` now.
    """
    sampler = ResumableDistributedSampler(len(train), world, seed)
    if class_counts is not None:
        sampler = ClassUniformSampler(class_counts, class_uniform, world, seed)
    common: dict[str, Any] = {
        "batch_size": batch_size,
        "num_workers": workers,
        "pin_memory": world.device.type == "cuda",
        "persistent_workers": workers > 0,
        "worker_init_fn": ignore_stop_signals,
    }
    val_sampler = DistributedEvalSampler(len(val), world)
    train_loader = TrainLoader(train, sampler=sampler, **common)
    val_loader = Loader(val, sampler=val_sampler, **common)
    if not on_device:
        return train_loader, val_loader
    # In the course of the epochs every process trains on all images; it validates on its share.
    shared_by = world.size if world.device.type == "cpu" else 1
    return (
        load_to_device(train_loader, sampler, world.device, None, shared_by),
        load_to_device(val_loader, val_sampler, world.device, val_sampler.indices, shared_by),
    )


def end_loading(loader: Batches) -> None:
    """End the loading processes of `loader`.

    After an error, Python would wait for them for ever: it ends them by SIGTERM, which they
    ignore.
    """
    if isinstance(loader, DataLoader) and isinstance(
        loader._iterator, _MultiProcessingDataLoaderIter
    ):
        loader._iterator._shutdown_workers()


def batch_names(loader: TrainBatches, number: int) -> list[str]:
    """File names of the images of a training batch, the loader's first being number 0."""
    sampler = loader.sampler
    begin = sampler.start + number * loader.batch_size
    chosen = sampler.indices()[begin : begin + loader.batch_size]
    return [loader.dataset.pairs[index].image.name for index in chosen]


@contextlib.contextmanager
def worker_failures() -> Iterator[None]:
    """One sentence for a loading process that died.

    PyTorch raises its error from a signal handler: anywhere, while there are such processes.

    Raises:
        UserError: one died.
    """
    try:
        yield
    except (RuntimeError, ConnectionResetError, ConnectionRefusedError, EOFError) as error:
        # The others come when it had a batch ready, which nobody hands over any more.
        if isinstance(error, RuntimeError) and not str(error).startswith(WORKER_FAILURE):
            raise
        raise UserError(
            "a loading process died (killed, or out of memory): go on with --resume, perhaps "
            "with fewer --num-workers"
        ) from error


STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def ignore_stop_signals(worker: int = 0) -> None:
    """For loading processes: they end with the process that they load for, which a signal
    to the whole group (a terminal's, a scheduler's) lets finish its step."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
