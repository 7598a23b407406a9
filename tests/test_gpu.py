"""On a GPU, results agree with the CPU's; without one, no tensor is left behind on the CPU.

The tests marked `gpu` skip where there is none: `python -m pytest -m gpu`. They share their
checks with the second leg of benchmarks/gpu.py. The others use PyTorch's pretended devices.
"""

import argparse
import json
import math

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
from lednet.export.wrappers import OUTPUTS, EndToEndModel
from lednet.training.losses import WeightedCrossEntropy
from lednet.training.tasks import Segmentation

VARIANTS = ("d20", "d128")


def gpu(test):
    """Mark a test that needs a GPU; it is skipped, and says so, without one."""
    missing = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
    return pytest.mark.gpu(missing(test))


# On a GPU


@pytest.fixture
def leg(tmp_path) -> Leg:
    """The second leg of benchmarks/gpu.py, at small sizes."""
    args = argparse.Namespace(
        dry_run=True, seconds=300.0, only=None, data=None, dataset="cityscapes", golden=None,
        state=None, work=tmp_path,
    )  # fmt: skip
    torch.cuda.init()
    return Leg(args, torch.device("cuda", 0), tmp_path / "leg.json")


def assert_passed(row: dict) -> None:
    print(row)
    assert row["passed"], row


@gpu
@pytest.mark.parametrize("backend", ["eager", "compiled"])
def test_predictor_labels_equal_those_of_the_cpu(leg, backend):
    assert_passed(gpu_proof.LabelComparison(leg)(backend, "fp32"))


@gpu
@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_equal_the_golden_file(leg, variant):
    assert_passed(gpu_proof.committed_error(leg, variant))


@gpu
def test_gradients_equal_those_of_the_cpu(leg):
    assert_passed(gpu_proof.gradient_error(leg))


@gpu
def test_folding_changes_nothing(leg):
    assert_passed(gpu_proof.fold_error(leg))


@gpu
def test_captured_steps_equal_eager_ones(leg):
    assert_passed(gpu_proof.captured_error(leg))


@gpu
def test_killed_run_resumes_bit_for_bit(leg):
    assert_passed(gpu_proof.resumed_difference(leg, deterministic=True))


@gpu
def test_data_in_device_memory_and_captured_steps_train(run_script, toy_cityscapes, tmp_path):
    folder = tmp_path / "run"
    done = run_script(
        "train/main.py", "--datadir", toy_cityscapes, "--savedir", folder, "--height", 64,
        "--width", 128, "--batch-size", 2, "--num-workers", 0, "--num-epochs", 2, "--decoder",
        "--device", "cuda", "--cache-device", "--cuda-graph", "--precision", "bf16",
        "--channels-last", "--ema-decay", 0.9,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "--cuda-graph:" not in (folder / "log.txt").read_text()  # no fallback
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert len(records) == 2 and all(math.isfinite(record["train_loss"]) for record in records)


# Without one


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


def run_on_pretended_gpu(module: nn.Module, *inputs: tuple[tuple[int, ...], torch.dtype]) -> set:
    """Types of device on which a forward pass with CUDA parameters and inputs makes tensors.

    An operation that must wait for a value on the device raises.
    """

    def fake(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="cuda")

    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    shapes = {name: (tuple(value.shape), value.dtype) for name, value in state.items()}
    with FakeTensorMode(), torch.no_grad():
        values = {name: fake(*shape) for name, shape in shapes.items()}
        given = tuple(fake(*shape) for shape in inputs)
        with Devices() as devices:
            try:
                output = torch.func.functional_call(module, values, given)
            except RuntimeError as error:
                if "driver" in str(error):  # 2.6 asks it in an interpolation
                    pytest.skip("this version of PyTorch cannot pretend a GPU")
                raise
    assert output.device.type == "cuda"
    return set(devices.found)


@pytest.mark.parametrize("variant", VARIANTS)
def test_forward_pass_makes_no_tensor_on_the_cpu(variant):
    for train in (False, True):
        net = LEDNet(20, variant).train(train)
        assert run_on_pretended_gpu(net, ((2, 3, 65, 97), torch.float32)) == {"cuda"}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("fold", [True, False])
def test_folded_graphs_make_no_tensor_on_the_cpu(variant, output, fold):
    net = LEDNet(20, variant).eval()
    module = EndToEndModel(net, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7), output=output, fold=fold).eval()
    assert run_on_pretended_gpu(module, ((2, 72, 104, 3), torch.uint8)) == {"cuda"}


def test_tensors_on_the_cpu_and_waits_are_noticed():
    class OnCpu(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.zeros(())

    class Waits(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * float(x.amax())

    assert run_on_pretended_gpu(OnCpu(), ((2, 3), torch.float32)) == {"cpu", "cuda"}
    with pytest.raises(RuntimeError):
        run_on_pretended_gpu(Waits(), ((2, 3), torch.float32))


@pytest.mark.parametrize("preset", PRESETS)
def test_training_step_leaves_nothing_on_the_cpu(preset):
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
