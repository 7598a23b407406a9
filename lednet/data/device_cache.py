"""A decoded data set in the memory of the training device, and batches gathered there."""

from collections.abc import Iterator, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from lednet.data.dataset import PairDataset
from lednet.device import free_memory
from lednet.errors import UserError
from lednet.progress import progress_bar

MEMORY_SHARE = 0.9
"""Largest part of the free memory that a data set may take; training needs the rest."""
_COPY_BATCH = 32

AnySampler = TypeVar("AnySampler", bound=Sampler[int])


class DeviceLoader(Generic[AnySampler]):
    """A data loader whose samples are tensors on one device: no decoding, no copy per step.

    Batches equal, bit for bit, those of a `DataLoader` over the same data set and sampler.

    Args:
        dataset: source of the samples.
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
        indices = range(len(images)) if stored is None else stored
        self._rows = {index: row for row, index in enumerate(indices)}

    def __len__(self) -> int:
        return -(-len(self.sampler) // self.batch_size)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        rows = torch.tensor([self._rows[index] for index in self.sampler], dtype=torch.int64)
        rows = rows.to(self.images.device)  # one copy per epoch
        for batch in rows.split(self.batch_size) if len(rows) else ():  # split gives at least one
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
        loader, sampler: the data set, batch size and worker settings to use, and the sampler.
        indices: samples to store (default: all).
        processes: number of processes that store as much in the same memory.

    Raises:
        UserError: the data set does not fit, or a sample cannot be read.
    """
    dataset = loader.dataset
    assert isinstance(dataset, PairDataset)
    chosen = range(len(dataset)) if indices is None else indices
    first, count = dataset[chosen[0]], len(chosen)
    needed, free = count * processes * sum(part.nbytes for part in first), free_memory(device)
    if free is not None and needed > MEMORY_SHARE * free:
        raise UserError(
            f"--cache-device needs {needed / 1e9:.2f} GB on {device}, where {free / 1e9:.2f} GB "
            "are free: use a smaller --height and --width, or --cache DIR instead"
        )
    stored = [torch.empty((count, *p.shape), dtype=p.dtype, device=device) for p in first]
    batches = DataLoader(
        dataset, batch_size=_COPY_BATCH, sampler=chosen, num_workers=loader.num_workers,
        worker_init_fn=loader.worker_init_fn, pin_memory=device.type == "cuda",
    )  # fmt: skip
    row = 0
    with progress_bar(total=count, desc=f"loading to {device}", unit="image") as bar:
        for batch in batches:
            for rows, part in zip(stored, batch, strict=True):
                rows[row : row + len(part)].copy_(part, non_blocking=True)
            row += len(batch[0])
            bar.update(len(batch[0]))
    images, targets = stored
    return DeviceLoader(dataset, sampler, loader.batch_size or 1, images, targets, chosen)
