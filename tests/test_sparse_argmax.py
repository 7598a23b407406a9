"""upsample_argmax against interpolation and argmax at full size."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lednet.inference import sparse_argmax
from lednet.inference.sparse_argmax import upsample_argmax
from lednet.model import resize, upsample_scores

SIZES = [  # of the network, and wanted
    ((64, 96), (64, 96)),
    ((64, 96), (128, 192)),
    ((64, 96), (100, 131)),
    ((64, 96), (33, 50)),
    ((64, 96), (7, 200)),
    ((64, 96), (1, 1)),
    ((61, 83), (61, 83)),
    ((61, 83), (122, 249)),
    ((57, 89), (64, 64)),
    ((8, 8), (30, 17)),
    ((1, 1), (5, 3)),
    ((1, 70), (1, 70)),
    ((8, 70), (20, 100)),
    ((70, 3), (141, 9)),
    ((9, 17), (300, 411)),
]


@pytest.fixture(autouse=True)
def _fresh():
    torch.manual_seed(0)
    sparse_argmax._interp_axis.cache_clear()
    yield
    sparse_argmax._interp_axis.cache_clear()


def smooth(network_size: tuple[int, int], n: int = 1, c: int = 20) -> Tensor:
    """Blurred noise at 1/8 of the size; neighbouring cells mostly have the same class."""
    h, w = (-(-side // 8) for side in network_size)
    return F.avg_pool2d(torch.randn(n, c, h + 4, w + 4), 5, stride=1)


def assert_equals_dense(
    low: Tensor, network_size: tuple[int, int], size: tuple[int, int]
) -> Tensor:
    """Equal labels, except where the dense score of the label equals the best to rounding."""
    found = upsample_argmax(low, network_size, size)
    assert found.dtype == torch.uint8 and found.shape == (len(low), *size)
    assert found.max() < low.shape[1]
    scores = upsample_scores(resize(low, network_size), size)
    differs = found != scores.argmax(dim=1)
    lost = scores.amax(dim=1) - scores.gather(1, found.long()[:, None])[:, 0]
    assert (lost[differs] <= 1e-6 * low.abs().max()).all()
    return found


@pytest.mark.parametrize(("network_size", "size"), SIZES)
def test_upsample_argmax_equals_dense(network_size, size):
    for classes in (1, 2, 20):
        assert_equals_dense(smooth(network_size, 2, classes), network_size, size)
    noise = torch.randn_like(smooth(network_size, 2))  # several classes in every cell
    found = assert_equals_dense(noise, network_size, size)
    assert not torch.equal(found[0], found[1]) or found[0].numel() < 10
    low = smooth(network_size, c=7)
    found = assert_equals_dense(torch.cat((low, low, low), dim=1), network_size, size)
    assert found.max() < 7  # the first of equal classes


def test_upsample_argmax_channels_last_cityscapes_size_equals_dense():
    low = smooth((512, 1024)).relu().contiguous(memory_format=torch.channels_last)
    assert assert_equals_dense(low, (512, 1024), (1024, 2048)).unique().numel() == 20


@pytest.mark.parametrize("values", [2, 3, 5])
def test_upsample_argmax_exact_ties_equal_dense(values):
    """Whole numbers and weights that are multiples of 1/8: no rounding, ties everywhere."""
    low, size = torch.randint(values, (50, 4, 3, 5)).float(), (17, 33)
    scores = resize(low, size)
    top = scores.topk(2, dim=1).values
    assert (top[:, 0] == top[:, 1]).float().mean() > 0.05
    assert torch.equal(upsample_argmax(low, size, size), scores.argmax(dim=1).to(torch.uint8))


def test_upsample_argmax_zeros_give_first_class():
    sizes = (64, 96), (90, 99)
    low = (smooth(sizes[0]) - 0.4).relu()  # with areas in which no class has a score
    nothing = upsample_scores(resize(low, sizes[0]), sizes[1]).amax(dim=1) == 0
    assert 0.05 < nothing.float().mean() < 0.95
    assert not upsample_argmax(low, *sizes)[nothing].any()


@pytest.mark.parametrize("size", [(16, 16), (40, 40)])
def test_upsample_argmax_finds_class_between_corners(size):
    low = torch.zeros(1, 20, 2, 2)
    low[0, 5, :, 0] = low[0, 9, :, 1] = 10  # each wins on its side, 5 in the middle
    low[0, 13] = 6
    assert set(assert_equals_dense(low, (16, 16), size).unique().tolist()) == {5, 9, 13}


class LargestTensor(TorchDispatchMode):
    """Bytes of the largest tensor that an operation returns."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.size = max(self.size, out.numel() * out.element_size())
        return out


def test_upsample_argmax_needs_no_full_size_scores(monkeypatch):
    low, sizes = torch.randn(1, 20, 32, 64), ((256, 512), (512, 1024))
    whole = upsample_argmax(low, *sizes)
    monkeypatch.setattr(sparse_argmax, "CHUNK", 2**17)
    with LargestTensor() as largest:
        assert torch.equal(upsample_argmax(low, *sizes), whole)
    assert largest.size <= 8 * sparse_argmax.CHUNK < 4 * 20 * 512 * 1024 / 30


def test_upsample_argmax_independent_of_grad_mode():
    low = smooth((64, 96)).requires_grad_()
    with torch.inference_mode():  # caches inference tensors
        first = upsample_argmax(low, (64, 96), (128, 192))
    second = upsample_argmax(low, (64, 96), (128, 192))
    assert torch.equal(first, second) and not second.requires_grad


def test_upsample_argmax_full_size_logits_are_rejected():
    with pytest.raises(ValueError, match="larger than the network's size"):
        upsample_argmax(torch.zeros(1, 2, 64, 96), (8, 12), (64, 96))


def test_assertion_detects_wrong_interpolation(monkeypatch):
    """Of corners that are not aligned, instead of `resize`."""
    wrong = smooth((64, 96))
    monkeypatch.setattr(sparse_argmax, "resize", upsample_scores)
    with pytest.raises(AssertionError):
        assert_equals_dense(wrong, (64, 96), (128, 192))


def test_upsample_argmax_gpu_equals_cpu():
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    low = smooth((64, 96), 2)
    for size in ((64, 96), (130, 99)):
        found = upsample_argmax(low.cuda(), (64, 96), size)
        assert found.is_cuda and (found.cpu() != upsample_argmax(low, (64, 96), size)).sum() <= 3
