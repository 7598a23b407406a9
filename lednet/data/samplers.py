"""Samplers that divide a data set among processes and resume within an epoch."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from lednet.distributed import DistributedContext


class DistributedEvalSampler(Sampler[int]):
    """Divides the indices among the processes, each image exactly once."""

    def __init__(self, length: int, dist_context: DistributedContext):
        self.indices = range(dist_context.rank, length, dist_context.size)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)


class ResumableDistributedSampler(Sampler[int]):
    """Divides a permutation of the indices among the processes.

    The permutation depends on (seed, epoch) only. Every process gets the same number of indices:
    if the length is no multiple of the number of processes, the first indices are repeated.

    Attributes:
        epoch: to be set before each epoch.
        start: number of indices of this process to skip, in an epoch that is resumed.
    """

    def __init__(self, length: int, dist_context: DistributedContext, seed: int):
        self.length, self.dist_context, self.seed = length, dist_context, seed
        self.epoch = self.start = 0

    @property
    def num_samples(self) -> int:
        """Number of indices of this process in a whole epoch."""
        return -(-self.length // self.dist_context.size)

    def indices(self) -> list[int]:
        """Indices of this process in the whole epoch."""
        generator = torch.Generator().manual_seed(self.seed * 100_003 + self.epoch)
        order = self._joint_order(generator).tolist()
        rank, size = self.dist_context.rank, self.dist_context.size
        return [order[i % self.length] for i in range(rank, self.num_samples * size, size)]

    def _joint_order(self, generator: torch.Generator) -> Tensor:
        """Indices (length,) of an epoch, for all processes together."""
        return torch.randperm(self.length, generator=generator)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices()[self.start :])

    def __len__(self) -> int:
        return self.num_samples - self.start


class ClassUniformSampler(ResumableDistributedSampler):
    """Draws a fraction of the images by class: first a class uniformly, then an image with it.

    This is class-uniform sampling (Zhu et al., CVPR 2019, arXiv 1812.01593) of images instead of
    crops. The other images are those of the permutation.

    Args:
        counts: (len, num_classes + 1) pixels of each class in each image, void last.
        fraction: fraction of the images, above 0 and at most 1.
    """

    def __init__(
        self, counts: np.ndarray, fraction: float, dist_context: DistributedContext, seed: int
    ):
        super().__init__(len(counts), dist_context, seed)
        self.drawn = round(fraction * len(counts))
        # Images grouped by class; those of class c start at starts[c].
        classes, self.images = map(torch.from_numpy, np.nonzero(counts[:, :-1].T))
        lengths = classes.bincount()
        self.lengths = lengths[lengths > 0]  # classes that never occur are not drawn
        self.starts = self.lengths.cumsum(0) - self.lengths

    def _joint_order(self, generator: torch.Generator) -> Tensor:
        order = super()._joint_order(generator)
        if not len(self.lengths):
            return order  # all pixels are void
        places = torch.randperm(self.length, generator=generator)[: self.drawn]
        classes = torch.randint(len(self.lengths), (self.drawn,), generator=generator)
        draws = torch.rand(self.drawn, generator=generator, dtype=torch.float64)
        order[places] = self.images[self.starts[classes] + (draws * self.lengths[classes]).long()]
        return order
