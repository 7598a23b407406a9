"""The training step as a CUDA graph: recorded once, then replayed with one launch."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

WARM_UP_STEPS = 3
"""Steps before the recording, in which cuDNN and the optimizer allocate what they keep."""

Outputs = tuple[Tensor, ...]
Recorder = Callable[[Callable[[], Outputs]], tuple[Callable[[], Any], Outputs]]
"""Records a call; returns what replays it, and the tensors that each replay writes to."""


def record_cuda_graph(call: Callable[[], Outputs]) -> tuple[Callable[[], Any], Outputs]:
    """A `Recorder` on the current CUDA device."""
    graph = torch.cuda.CUDAGraph()
    # Threads that pin the memory of loaded batches continue during the recording.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        outputs = call()
    return graph.replay, outputs


class CapturedStep:
    """A training step for batches of one shape, recorded at its construction.

    Neither the construction nor its warm-up changes weights, optimizer state or random state:
    the first call is the first step.

    Args:
        step: forward pass, backward pass and update for (images, target), without waiting for
            the device; returns tensors.
        images, target: a batch, for the shapes.
        state: returns the tensors that `step` changes. Those that only the first step makes
            (momentum, for instance) start at zero.
        memory_format: memory format of the images that `step` gets.
        record: see `Recorder`.
    """

    def __init__(
        self,
        step: Callable[[Tensor, Tensor], Outputs],
        images: Tensor,
        target: Tensor,
        state: Callable[[], Iterable[Tensor]],
        memory_format: torch.memory_format = torch.contiguous_format,
        record: Recorder = record_cuda_graph,
    ):
        device = images.device
        self.images = torch.empty_like(images, memory_format=memory_format).copy_(images)
        self.target = target.clone()
        saved = {id(tensor): tensor.detach().clone() for tensor in state()}

        def call() -> Outputs:
            return step(self.images, self.target)

        @torch.no_grad()
        def restore() -> None:
            for tensor in state():
                if id(tensor) in saved:
                    tensor.copy_(saved[id(tensor)])
                else:
                    tensor.zero_()

        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            try:
                warm_up(call, device)
                restore()
                self._replay, self.outputs = record(call)
            finally:
                restore()  # also after a failure, and where `record` has run the step

    def fits(self, images: Tensor, target: Tensor) -> bool:
        """Whether a batch has the shapes that were recorded."""
        return images.shape == self.images.shape and target.shape == self.target.shape

    def __call__(self, images: Tensor, target: Tensor) -> Outputs:
        """Take a step. The outputs are overwritten by the next one."""
        self.images.copy_(images)
        self.target.copy_(target)
        self._replay()
        return self.outputs


def warm_up(call: Callable[[], object], device: torch.device) -> None:
    """Run `call` a few times, on CUDA in a side stream, as recording requires."""
    if device.type != "cuda":
        for _ in range(WARM_UP_STEPS):
            call()
        return
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP_STEPS):
            call()
    torch.cuda.current_stream(device).wait_stream(stream)
