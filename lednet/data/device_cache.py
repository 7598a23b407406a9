"""A decoded data set in the memory of the training device, and batches gathered there."""

from collections.abc import Iterator, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from tqdm import tqdm

from lednet.data.dataset import PairDataset
from lednet.device import free_memory
from lednet.errors import UserError

MEMORY_SHARE = 0.9
"""Largest part of the free memory that a data set may take; training needs the rest."""
_COPY_BATCH = 32


AnySampler = TypeVar("AnySampler", bound=Sampler[int])


class DeviceLoader(Generic[AnySampler]):
    """A data loader whose samples are tensors on one device: no decoding, no copy per step.

    Batches are equal, bit for bit, to those of a `DataLoader` over the same data set and
    sampler.

    Args:
        dataset: where the samples come from.
        sampler: indices of the samples of an epoch.
        batch_size: samples per batch; the last batch of an epoch may be smaller.
        images: (N, 3, H, W) uint8, the stored samples.
        targets: (N, ...), their labels.
        stored: index of each stored sample in `dataset`; None if all are stored, in order.
    """

    def __init__(
        self,
        dataset: PairDataset,
        sampler: AnySampler,
        batch_size: int,
        images: Tensor,
        targets: Tensor,
        stored: Sequence[int] | None = None,
    ):
        self.dataset, self.sampler, self.batch_size = dataset, sampler, batch_size
        self.images, self.targets = images, targets
        self._rows = None if stored is None else {index: row for row, index in enumerate(stored)}

    def __len__(self) -> int:
        return -(-len(self.sampler) // self.batch_size)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        indices = list(self.sampler)
        rows = indices if self._rows is None else [self._rows[index] for index in indices]
        order = torch.tensor(rows, dtype=torch.int64).to(self.images.device)  # one copy per epoch
        for batch in order.split(self.batch_size) if indices else ():  # split gives one at least
            yield self.images.index_select(0, batch), self.targets.index_select(0, batch)


def load_to_device(
    loader: DataLoader[tuple[Tensor, Tensor]],
    sampler: AnySampler,
    device: torch.device,
    indices: Sequence[int] | None = None,
    processes: int = 1,
) -> DeviceLoader[AnySampler]:
    """Decode the data set of `loader` into the memory of `device`; shows a progress bar.

    Args:
        loader: its data set, batch size and worker settings are used.
        sampler: that of the loader.
        device: where the samples are stored.
        indices: samples to store; by default all of them.
        processes: how many processes store as much in the same memory.

    Raises:
        UserError: the data set does not fit, or a sample cannot be read.
    """
    dataset = loader.dataset
    assert isinstance(dataset, PairDataset)
    chosen = range(len(dataset)) if indices is None else list(indices)
    first = dataset[chosen[0]]
    count = len(chosen)
    needed = count * processes * sum(part.nbytes for part in first)
    _require_memory(needed, device)
    images, targets = (torch.empty((count, *p.shape), dtype=p.dtype, device=device) for p in first)
    batches = DataLoader(
        dataset,
        batch_size=_COPY_BATCH,
        sampler=chosen,
        num_workers=loader.num_workers,
        worker_init_fn=loader.worker_init_fn,
        pin_memory=device.type == "cuda",
    )
    row = 0
    with tqdm(total=count, desc=f"loading to {device}", unit="image", leave=False) as bar:
        for batch_images, batch_targets in batches:
            rows = slice(row, row + len(batch_images))
            images[rows].copy_(batch_images, non_blocking=True)
            targets[rows].copy_(batch_targets, non_blocking=True)
            row = rows.stop
            bar.update(len(batch_images))
    stored = None if indices is None else chosen
    return DeviceLoader(dataset, sampler, loader.batch_size or 1, images, targets, stored)


def _require_memory(needed: int, device: torch.device) -> None:
    free = free_memory(device)
    if free is not None and needed > MEMORY_SHARE * free:
        raise UserError(
            f"--cache-device needs {needed / 1e9:.2f} GB on {device}, where {free / 1e9:.2f} GB "
            "are free: use a smaller --height and --width, or --cache DIR instead"
        )
