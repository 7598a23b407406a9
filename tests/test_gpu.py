"""On a GPU, results agree with the CPU's; without one, no tensor is left behind on the CPU.

The tests marked `gpu` are skipped without a GPU: `python -m pytest -m gpu`. They share their
checks with the leg `proof` of benchmarks/gpu.py. The others use PyTorch's fake devices.
"""

import argparse

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import gpu_proof
from benchmarks.gpu_legs import Leg
from lednet import LEDNet
from lednet.data.transforms import PRESETS, Augmentation
from lednet.exporting.wrappers import EndToEndModel
from lednet.training.losses import WeightedCrossEntropy
from lednet.training.tasks import Segmentation

CAPTURED_FLAGS = "--precision bf16 --channels-last --cache-device --cuda-graph --ema-decay 0.9"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize(
    ("check", "arguments"),
    [
        (gpu_proof.predictor_error, ("eager", "fp32")),
        (gpu_proof.predictor_error, ("compiled", "fp32")),
        (gpu_proof.committed_error, ("d20",)),
        (gpu_proof.committed_error, ("d128",)),
        (gpu_proof.gradient_error, ()),
        (gpu_proof.fold_error, ()),
        (gpu_proof.captured_error, ()),
        (gpu_proof.resumed_difference, (True,)),
        (gpu_proof.finite_run, CAPTURED_FLAGS.split()),
    ],
)
def test_gpu_results_pass_the_checks_of_the_benchmark(check, arguments, tmp_path):
    args = argparse.Namespace(
        dry_run=True, seconds=300.0, only=None, data=None, dataset="cityscapes", golden=None,
        state=None, work=tmp_path,
    )  # fmt: skip
    torch.cuda.init()
    row = check(Leg(args, torch.device("cuda", 0), tmp_path / "leg.json"), *arguments)
    assert row["passed"], row


class Devices(TorchDispatchMode):
    """Records which operations have results on which type of device."""

    def __init__(self):
        super().__init__()
        self.found: dict[str, set[str]] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        for result in tree_leaves(results):
            if isinstance(result, Tensor):
                self.found.setdefault(result.device.type, set()).add(str(function))
        return results


def devices_of_forward_pass(module: nn.Module, shape: tuple[int, ...], dtype: torch.dtype) -> set:
    """Types of device on which a forward pass with CUDA parameters and inputs makes tensors.

    An operation that must wait for a value on the device raises.
    """
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    shapes = {name: (tuple(value.shape), value.dtype) for name, value in state.items()}
    with FakeTensorMode(), torch.no_grad():
        values = {n: torch.empty(s, dtype=d, device="cuda") for n, (s, d) in shapes.items()}
        example = torch.empty(shape, dtype=dtype, device="cuda")
        with Devices() as devices:
            try:
                output = torch.func.functional_call(module, values, (example,))
            except RuntimeError as error:
                if "driver" not in str(error):
                    raise
                pytest.skip("this version of PyTorch cannot fake a GPU")  # 2.6 cannot
    assert output.device.type == "cuda"
    return set(devices.found)


@pytest.mark.parametrize("train", [False, True])
def test_forward_pass_makes_no_tensor_on_the_cpu(train):
    net = LEDNet(20).train(train)
    assert devices_of_forward_pass(net, (2, 3, 65, 97), torch.float32) == {"cuda"}


@pytest.mark.parametrize("fold", [False, True])
def test_end_to_end_model_makes_no_tensor_on_the_cpu(fold):
    net = LEDNet(20).eval()
    module = EndToEndModel(net, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7), output="labels", fold=fold).eval()
    assert devices_of_forward_pass(module, (2, 72, 104, 3), torch.uint8) == {"cuda"}


def test_tensors_on_the_cpu_and_synchronization_are_noticed():
    class OnCpu(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.zeros(())

    class Waits(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * float(x.amax())

    assert devices_of_forward_pass(OnCpu(), (2, 3), torch.float32) == {"cpu", "cuda"}
    with pytest.raises(RuntimeError):
        devices_of_forward_pass(Waits(), (2, 3), torch.float32)


@pytest.mark.parametrize("preset", PRESETS)
def test_training_step_makes_no_tensor_on_the_cpu(preset):
    """Augmentation, forward pass, loss and backward pass, on the device "meta". There, as in a
    CUDA graph, an operation that needs a value from the device raises."""
    net = LEDNet(20).to("meta").train()
    criterion = WeightedCrossEntropy([1.0] * 19, 20)
    task = Segmentation(criterion, Augmentation(preset), [str(i) for i in range(19)]).to("meta")
    images = torch.empty(2, 3, 64, 96, dtype=torch.uint8, device="meta")
    labels = torch.empty(2, 64, 96, dtype=torch.uint8, device="meta")
    with Devices() as devices:
        x, target = task.augment(images, labels, torch.Generator().manual_seed(1))
    # The random numbers are drawn on the CPU, so that they are the same for every device.
    assert devices.found.pop("cpu") == {"aten.rand.generator"} and set(devices.found) == {"meta"}
    with Devices() as devices:
        total, weights = task.loss(net(x), target)
        (total / weights).backward()
    assert set(devices.found) == {"meta"}
    gradients = [p.grad for p in net.parameters() if p.grad is not None]
    assert gradients and all(gradient.is_meta for gradient in gradients)
