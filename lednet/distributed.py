"""One process or many: the few calls that know about `torchrun`."""

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lednet.device import choose_device
from lednet.errors import UserError

Net = TypeVar("Net", bound=nn.Module)


@dataclass(frozen=True)
class DistributedContext:
    """This process's place among all that train together.

    Attributes:
        rank: 0 .. size - 1; only rank 0 writes files.
        size: number of processes.
        device: this process's device.
    """

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def all_reduce_sum(self, value: Tensor) -> Tensor:
        """`value` summed over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def all_reduce_max(self, value: int) -> int:
        """The largest `value` of all processes."""
        if self.size == 1:
            return value
        shared = torch.tensor(value, device=self.device)
        dist.all_reduce(shared, dist.ReduceOp.MAX)
        return int(shared)

    def all_gather(self, values: list) -> list:
        """The values of all processes, in the order of their ranks; every process gets them."""
        if self.size == 1:
            return values
        lists: list = [None] * self.size
        dist.all_gather_object(lists, values)
        return [value for part in lists for value in part]

    def barrier(self) -> None:
        """Wait until every process has come here."""
        if self.size > 1:
            dist.barrier()

    def broadcast_buffers(self, model: nn.Module) -> None:
        """Give every process the running statistics of rank 0.

        DDP does so before each training step; after the last one they differ.
        """
        if self.size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)

    def wrap_ddp(self, model: nn.Module) -> nn.Module:
        """`model` with gradients averaged over all processes."""
        if self.size == 1:
            return model
        ids = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=ids)


def init_distributed(device_name: str = "auto") -> DistributedContext:
    """Take this process's place: alone, or as `torchrun` says in the environment.

    Many processes talk over NCCL on CUDA and over gloo elsewhere.

    Raises:
        UserError: the device is not there.
    """
    device = choose_device(device_name)
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return DistributedContext(rank=0, size=1, device=device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    store, rank, _ = next(dist.rendezvous("env://"))
    if os.environ.get("LOCAL_WORLD_SIZE") == str(size):
        # torchrun --max-restarts keeps its store, and in it the addresses of the processes that
        # are gone. The count tells the starts apart; of many machines, each has its own.
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    return DistributedContext(rank, size, device)


def convert_sync_batch_norm(net: Net, world: DistributedContext) -> Net:
    """`net` with batch norms that take their statistics over all processes' images.

    Raises:
        UserError: not on CUDA, where PyTorch has no such norm.
    """
    if world.device.type != "cuda":
        raise UserError("--sync-batch-norm needs CUDA GPUs: leave it out")
    return nn.SyncBatchNorm.convert_sync_batchnorm(net)


@contextlib.contextmanager
def report_lost_process() -> Iterator[None]:
    """One sentence for another process of the world that has gone.

    Raises:
        UserError: one has.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistBackendError) and "gloo" not in str(error):
            raise
        raise UserError(
            "another process of this run ended or cannot be reached: see what it says, and go on "
            "with --resume"
        ) from error


def destroy_distributed() -> None:
    """Close the process group, if there is one."""
    if dist.is_initialized():
        # Before 2.8 PyTorch waits for gloo's threads with the interpreter locked, and they may need
        # it to let go of their last tensors (pytorch/pytorch#154976): they do so now.
        time.sleep(0.1)
        dist.destroy_process_group()
