"""Samplers that divide a data set among processes and resume within an epoch."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from lednet.distributed import DistributedContext


class DistributedEvalSampler(Sampler[int]):
    """Every `world.size`-th index: over all processes each image comes exactly once."""

    def __init__(self, length: int, world: DistributedContext):
        self.indices = range(world.rank, length, world.size)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)


class ResumableDistributedSampler(Sampler[int]):
    """A permutation that depends on (seed, epoch) alone, dealt out to the processes.

    Every process gets equally many indices, or the others would wait for it for ever:
    where the length is no multiple of the world's size, the first few come again.

    Attributes:
        epoch: set it before each.
        start: how many of this process's indices an interrupted epoch has behind it.
    """

    def __init__(self, length: int, world: DistributedContext, seed: int):
        self.length, self.world, self.seed = length, world, seed
        self.epoch = self.start = 0

    @property
    def num_samples(self) -> int:
        """Indices of this process in a whole epoch."""
        return -(-self.length // self.world.size)

    def indices(self) -> list[int]:
        """This process's indices in the whole epoch."""
        generator = torch.Generator().manual_seed(self.seed * 100_003 + self.epoch)
        order = self._joint_order(generator).tolist()
        padded = [order[i % self.length] for i in range(self.num_samples * self.world.size)]
        return padded[self.world.rank :: self.world.size]

    def _joint_order(self, generator: torch.Generator) -> Tensor:
        """(length,) indices of an epoch, of all processes together."""
        return torch.randperm(self.length, generator=generator)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices()[self.start :])

    def __len__(self) -> int:
        return self.num_samples - self.start


class ClassUniformSampler(ResumableDistributedSampler):
    """A `ResumableDistributedSampler` that draws a fraction of its images by class.

    For each of these, a class is drawn, each as likely as another, and then an image that it
    occurs in: class-uniform sampling (Zhu et al., CVPR 2019, arXiv 1812.01593) of images
    instead of crops. The others are those that the permutation has in their places.

    Args:
        counts: (len, num_classes + 1) pixels of each class in each image, void last.
        fraction: of the images, above 0 and at most 1.
    """

    def __init__(self, counts: np.ndarray, fraction: float, world: DistributedContext, seed: int):
        super().__init__(len(counts), world, seed)
        self.drawn = round(fraction * len(counts))
        # The images of one class after another, those of class c from starts[c] on.
        classes, self.images = map(torch.from_numpy, np.nonzero(counts[:, :-1].T))
        lengths = classes.bincount()
        self.lengths = lengths[lengths > 0]  # a class that never occurs is not drawn
        self.starts = self.lengths.cumsum(0) - self.lengths

    def _joint_order(self, generator: torch.Generator) -> Tensor:
        order = super()._joint_order(generator)
        if not len(self.lengths):
            return order  # all is void
        places = torch.randperm(self.length, generator=generator)[: self.drawn]
        classes = torch.randint(len(self.lengths), (self.drawn,), generator=generator)
        draws = torch.rand(self.drawn, generator=generator, dtype=torch.float64)
        order[places] = self.images[self.starts[classes] + (draws * self.lengths[classes]).long()]
        return order
