"""Training and inference in several processes, started by `torchrun`."""

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lednet.device import choose_device
from lednet.errors import UserError


@dataclass(frozen=True)
class DistributedContext:
    """Rank and device of this process, and the collective operations that are used.

    Attributes:
        rank: 0 to size - 1. Only rank 0 writes files.
        size: number of processes.
        device: device of this process.
    """

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def all_reduce_sum(self, value: Tensor) -> Tensor:
        """Sum `value` over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def all_reduce_max(self, value: int) -> int:
        """The maximum of `value` over all processes."""
        if self.size == 1:
            return value
        shared = torch.tensor(value, device=self.device)
        dist.all_reduce(shared, dist.ReduceOp.MAX)
        return int(shared)

    def all_gather(self, values: list) -> list:
        """The values of all processes, in the order of their ranks."""
        if self.size == 1:
            return values
        lists: list = [None] * self.size
        dist.all_gather_object(lists, values)
        return [value for part in lists for value in part]

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            dist.barrier()

    def broadcast_buffers(self, model: nn.Module) -> None:
        """Copy the running statistics of rank 0 to all processes.

        DDP does so before each training step, but not after the last one.
        """
        if self.size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)

    def wrap_ddp(self, model: nn.Module) -> nn.Module:
        """Wrap `model` in `DistributedDataParallel` if there are several processes."""
        if self.size == 1:
            return model
        ids = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=ids)


def _require_environment() -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        value = os.environ.get(name)
        if value is None or not (value.isdecimal() or name == "MASTER_ADDR"):
            state = "not set" if value is None else repr(value)
            raise UserError(
                f"WORLD_SIZE is set in the environment, but {name} is {state}: start several "
                "processes with torchrun, or unset WORLD_SIZE for a single one"
            )


def init_distributed(device_name: str = "auto") -> DistributedContext:
    """Join the process group that `torchrun` describes in the environment, if there is one.

    Several processes use NCCL on CUDA and gloo elsewhere.

    Args:
        device_name: see `choose_device`.

    Raises:
        UserError: the device is not available, the environment describes a part of a process
            group only, or this process has no GPU of its own.
    """
    device = choose_device(device_name)
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return DistributedContext(rank=0, size=1, device=device)
    _require_environment()
    size = int(os.environ["WORLD_SIZE"])
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        if device.index >= (count := torch.cuda.device_count()):
            raise UserError(
                f"process {device.index + 1} of this machine has no GPU ({count} can be used): "
                "start one process per GPU with --nproc-per-node, or choose --device cpu"
            )
        torch.cuda.set_device(device)
    store, rank, _ = next(dist.rendezvous("env://"))
    if os.environ.get("LOCAL_WORLD_SIZE") == str(size):
        # torchrun --max-restarts keeps its store with the addresses of the previous processes.
        # The prefix separates restarts. With several machines, each has a count of its own.
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    return DistributedContext(rank, size, device)


@contextlib.contextmanager
def report_lost_process() -> Iterator[None]:
    """Turn the error of a collective operation into a `UserError`."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistBackendError) and "gloo" not in str(error):
            raise
        raise UserError(
            "another process of this run has ended or cannot be reached: see its output, and "
            "continue with --resume"
        ) from error


def destroy_distributed() -> None:
    """Destroy the process group, if there is one."""
    if dist.is_initialized():
        # PyTorch before 2.8 waits for gloo's threads while holding the GIL, which they may need to
        # release their last tensors (pytorch/pytorch#154976). The pause lets them do so first.
        time.sleep(0.1)
        dist.destroy_process_group()
