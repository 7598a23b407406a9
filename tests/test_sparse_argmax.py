"""upsample_argmax against interpolation and argmax at full size."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lednet.inference import sparse_argmax
from lednet.inference.sparse_argmax import upsample_argmax
from lednet.model import resize

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
    ((8, 8), (8, 8)),
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
    yield
    forget()


def forget() -> None:
    sparse_argmax._interp_axis.cache_clear()
    sparse_argmax._bands.cache_clear()


def low_size(network_size: tuple[int, int]) -> tuple[int, int]:
    return tuple(-(-side // 8) for side in network_size)


def smooth(network_size: tuple[int, int], n: int = 1, c: int = 20) -> Tensor:
    """Blurred noise at 1/8 of the size; neighbouring cells mostly have the same class."""
    h, w = low_size(network_size)
    return F.avg_pool2d(torch.randn(n, c, h + 4, w + 4), 5, stride=1)


def dense_scores(low: Tensor, network_size: tuple[int, int], size: tuple[int, int]) -> Tensor:
    scores = resize(low, network_size)
    if size != network_size:
        scores = F.interpolate(scores, size, mode="bilinear", align_corners=False)
    return scores


def assert_equals_dense(
    low: Tensor, network_size: tuple[int, int], size: tuple[int, int]
) -> Tensor:
    """Equal labels, except where the dense score of the label equals the best to rounding."""
    found = upsample_argmax(low, network_size, size)
    assert found.dtype == torch.uint8 and found.shape == (len(low), *size)
    assert found.max() < low.shape[1]
    scores = dense_scores(low, network_size, size)
    differs = found != scores.argmax(dim=1)
    lost = scores.amax(dim=1) - scores.gather(1, found.long()[:, None])[:, 0]
    assert (lost[differs] <= 1e-6 * low.abs().max()).all()
    return found


@pytest.mark.parametrize(("network_size", "size"), SIZES)
def test_upsample_argmax_equals_dense(network_size, size):
    for classes in (1, 2, 12, 20):
        assert_equals_dense(smooth(network_size, 2, classes), network_size, size)
    noise = torch.randn(2, 20, *low_size(network_size))  # several classes in every cell
    found = assert_equals_dense(noise, network_size, size)
    assert not torch.equal(found[0], found[1]) or found[0].numel() < 10
    low = smooth(network_size, c=7)
    found = assert_equals_dense(torch.cat((low, low, low), dim=1), network_size, size)
    assert found.max() < 7  # the first of equal classes


def test_upsample_argmax_cityscapes_size_equals_dense():
    low = smooth((512, 1024)).relu().contiguous(memory_format=torch.channels_last)
    for size in ((512, 1024), (1024, 2048)):
        assert assert_equals_dense(low, (512, 1024), size).unique().numel() == 20


@pytest.mark.parametrize("values", [2, 3, 5])
def test_upsample_argmax_exact_ties_equal_dense(values):
    """Whole numbers and weights that are multiples of 1/8: no rounding, ties everywhere."""
    low, size = torch.randint(values, (50, 4, 3, 5)).float(), (17, 33)
    scores = dense_scores(low, size, size)
    top = scores.topk(2, dim=1).values
    assert (top[:, 0] == top[:, 1]).float().mean() > 0.05
    assert torch.equal(upsample_argmax(low, size, size), scores.argmax(dim=1).to(torch.uint8))


def test_upsample_argmax_zeros_give_first_class():
    assert not upsample_argmax(torch.zeros(2, 20, 4, 6), (32, 48), (50, 70)).any()
    low = (smooth((64, 96)) - 0.4).relu()  # with areas in which no class has a score
    found, scores = upsample_argmax(low, (64, 96), (90, 99)), dense_scores(low, (64, 96), (90, 99))
    nothing = scores.amax(dim=1) == 0
    assert 0.05 < nothing.float().mean() < 0.95 and not found[nothing].any()


@pytest.mark.parametrize("size", [(16, 16), (40, 40)])
def test_upsample_argmax_finds_class_between_corners(size):
    low = torch.zeros(1, 20, 2, 2)
    low[0, 5, :, 0] = low[0, 9, :, 1] = 10  # each wins on its side, 5 in the middle
    low[0, 13] = 6
    assert set(assert_equals_dense(low, (16, 16), size).unique().tolist()) == {5, 9, 13}


def test_upsample_argmax_bands_and_chunks_equal_whole(monkeypatch):
    low, sizes = smooth((64, 96), 2), ((64, 96), (130, 99))
    whole = upsample_argmax(low, *sizes)
    monkeypatch.setattr(sparse_argmax, "BAND", 1)
    monkeypatch.setattr(sparse_argmax, "CHUNK", 1)
    assert torch.equal(upsample_argmax(low, *sizes), whole)


class LargestTensor(TorchDispatchMode):
    """Bytes of the largest tensor that an operation returns."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.size = max(self.size, out.numel() * out.element_size())
        return out


def test_upsample_argmax_needs_no_full_size_scores():
    low = torch.randn(1, 20, 64, 128)
    with LargestTensor() as largest:
        upsample_argmax(low, (512, 1024), (1024, 2048))
    print(f"largest tensor {largest.size / 1e6:.1f} MB")
    assert largest.size <= 8 * sparse_argmax.CHUNK < 4 * 20 * 1024 * 2048 / 30


def test_upsample_argmax_independent_of_grad_mode():
    low = smooth((64, 96)).requires_grad_()
    with torch.inference_mode():  # caches inference tensors
        first = upsample_argmax(low, (64, 96), (128, 192))
    second = upsample_argmax(low, (64, 96), (128, 192))
    assert torch.equal(first, second) and not second.requires_grad


def test_upsample_argmax_full_size_logits_are_rejected():
    with pytest.raises(ValueError, match="larger than the network's size"):
        upsample_argmax(torch.zeros(1, 2, 64, 96), (8, 12), (64, 96))


def shifted(low: int, network: int, wanted: int, right=sparse_argmax._row_weights) -> Tensor:
    return right(low, network, wanted)[[0, *range(wanted - 1)]]


def other_corners(low: int, network: int, wanted: int) -> Tensor:
    x = F.interpolate(torch.eye(low)[None, :, :, None], (wanted, 1), mode="bilinear")
    return x[0, :, :, 0].T


def aligned_twice(low: int, network: int, wanted: int) -> Tensor:
    return resize(torch.eye(low)[None, :, :, None], (wanted, 1))[0, :, :, 0].T


def shorter(*lengths, right=sparse_argmax._interp_axis) -> sparse_argmax.InterpAxis:
    axis = right(*lengths)
    return axis._replace(reach=axis.reach * 0.9)


def winners_only(corners: Tensor, winners: Tensor) -> Tensor:
    classes = torch.arange(corners.shape[2])[:, None]
    return (winners.flatten(0, 1)[:, None] == classes).any(dim=0)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("_row_weights", shifted),
        ("_row_weights", other_corners),
        ("_row_weights", aligned_twice),
        ("_interp_axis", shorter),
        ("_candidate_classes", winners_only),
    ],
)
def test_assertion_detects_wrong_interpolation(monkeypatch, name, wrong):
    low = smooth((64, 96))
    assert_equals_dense(low, (64, 96), (128, 192))
    forget()
    with monkeypatch.context() as patch, pytest.raises(AssertionError):
        patch.setattr(sparse_argmax, name, wrong)
        assert_equals_dense(low, (64, 96), (128, 192))


def test_upsample_argmax_gpu_equals_cpu():
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    low = smooth((64, 96), 2)
    for size in ((64, 96), (130, 99)):
        found = upsample_argmax(low.cuda(), (64, 96), size)
        assert found.is_cuda and (found.cpu() != upsample_argmax(low, (64, 96), size)).sum() <= 3
