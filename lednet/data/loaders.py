"""Data loaders for training and validation."""

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
from lednet.errors import UserError, shared_memory_error
from lednet.signals import STOP_SIGNALS


class Loader(DataLoader[tuple[Tensor, Tensor]]):
    """Yields batches of this process's share of the samples."""

    dataset: PairDataset
    sampler: DistributedEvalSampler | ResumableDistributedSampler
    batch_size: int


class TrainLoader(Loader):
    """Yields shuffled batches."""

    sampler: ResumableDistributedSampler


Batches = Loader | DeviceLoader[DistributedEvalSampler] | DeviceLoader[ResumableDistributedSampler]
TrainBatches = TrainLoader | DeviceLoader[ResumableDistributedSampler]


def make_loaders(
    train: PairDataset,
    val: PairDataset,
    dist_context: DistributedContext,
    batch_size: int,
    workers: int,
    seed: int,
    class_counts: np.ndarray | None = None,
    class_uniform: float = 0.0,
    on_device: bool = False,
) -> tuple[TrainBatches, Batches]:
    """Build the training and the validation loader of this process.

    Args:
        batch_size: images per step and process.
        workers: worker processes of each loader; 0 loads in this process.
        seed: seed of the shuffling.
        class_counts, class_uniform: see `ClassUniformSampler`; with None and 0 every training
            image is used once per epoch.
        on_device: decode both data sets into the memory of the device now.
    """
    device = dist_context.device
    if class_counts is None:
        sampler = ResumableDistributedSampler(len(train), dist_context, seed)
    else:
        sampler = ClassUniformSampler(class_counts, class_uniform, dist_context, seed)
    val_sampler = DistributedEvalSampler(len(val), dist_context)
    common: dict[str, Any] = {
        "batch_size": batch_size, "num_workers": workers, "persistent_workers": workers > 0,
        "pin_memory": device.type == "cuda", "worker_init_fn": ignore_stop_signals,
    }  # fmt: skip
    train_loader = TrainLoader(train, sampler=sampler, **common)
    val_loader = Loader(val, sampler=val_sampler, **common)
    if not on_device:
        return train_loader, val_loader
    # Every process trains on all images in the course of the epochs, and validates on its share.
    shared_by = dist_context.size if device.type == "cpu" else 1
    return (
        load_to_device(train_loader, sampler, device, None, shared_by),
        load_to_device(val_loader, val_sampler, device, val_sampler.indices, shared_by),
    )


def end_loading(loader: Batches) -> None:
    """Shut down the worker processes of `loader`.

    They ignore SIGTERM, with which Python would otherwise try to end them after an error.
    """
    iterator = loader._iterator if isinstance(loader, DataLoader) else None
    if isinstance(iterator, _MultiProcessingDataLoaderIter):
        iterator._shutdown_workers()


def batch_names(loader: TrainBatches, number: int) -> list[str]:
    """File names of the images of training batch `number`, 0 for the first one of `loader`."""
    sampler, size = loader.sampler, loader.batch_size
    chosen = sampler.indices()[sampler.start + number * size :][:size]
    return [loader.dataset.pairs[index].image.name for index in chosen]


@contextlib.contextmanager
def worker_failures() -> Iterator[None]:
    """Turn the error of a worker process that died into a `UserError`.

    PyTorch raises it from a signal handler, at any point of the program.
    """
    try:
        yield
    except (RuntimeError, OSError, EOFError) as error:
        if full := shared_memory_error(error):
            raise full from error
        # The connection errors occur if the worker had a batch ready.
        lost = isinstance(error, ConnectionResetError | ConnectionRefusedError | EOFError)
        if not (lost or str(error).startswith("DataLoader worker (pid")):
            raise
        raise UserError(
            "a loading process died (killed, or out of memory): continue with --resume, perhaps "
            "with fewer --num-workers"
        ) from error


def ignore_stop_signals(worker: int = 0) -> None:
    """Worker initialization: ignore signals that are sent to the whole process group.

    The training process finishes its step after such a signal and then ends its workers.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
