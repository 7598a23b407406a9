"""Transforms of image classification: crops, mixup and the images of validation."""

import numpy as np
import pytest
import torch
from fakes import seeded
from torchvision.transforms import RandomResizedCrop, v2

from lednet.data import classification_transforms
from lednet.data.classification_transforms import (
    AREAS,
    ASPECTS,
    ATTEMPTS,
    BOX_DRAWS,
    IMAGENET_MEAN,
    IMAGENET_STD,
    ImageAugmentation,
    crop_resize,
    random_boxes,
    sample_mixup_lambda,
)
from lednet.data.transforms import PRESETS

PLAIN = {"mean": (0, 0, 0), "std": (1 / 255,) * 3}
"""Normalisation that leaves the values 0 to 255."""


def located(n: int, side: int = 64) -> torch.Tensor:
    """A batch whose pixels say where they are: row and column of each."""
    places = torch.arange(side, dtype=torch.uint8)
    rows, columns = places[:, None].expand(-1, side), places.expand(side, -1)
    return torch.stack((rows, columns, rows)).repeat(n, 1, 1, 1)


def noise(n: int, side: int = 32) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8, generator=seeded(9))


def targets_of(n: int, width: int = 400, height: int = 300) -> torch.Tensor:
    return torch.tensor([[i, width, height] for i in range(n)])


# boxes


def draws_for(attempts: list[tuple[float, float]], place: tuple[float, float]) -> torch.Tensor:
    """Draws that give these (area, aspect); the attempts that follow fit as badly as the last."""
    pairs = torch.tensor(attempts + attempts[-1:] * (ATTEMPTS - len(attempts)))
    areas = (pairs[:, 0] - AREAS[0]) / (AREAS[1] - AREAS[0])
    shapes = (pairs[:, 1] / ASPECTS[0]).log() / np.log(ASPECTS[1] / ASPECTS[0])
    return torch.cat((areas, shapes, torch.tensor(place)))


TOO_LARGE = (0.99, 1.0)
SMALL, WIDEST, NARROWEST = (0.16, 1.0), (0.125, 4 / 3), (0.125, 3 / 4)


@pytest.mark.parametrize(
    ("size", "attempts", "box"),
    [
        # 0.16 of 64x16 px are 12.8x12.8, at 1/4 of the 51.2 px that are left and 1/2 of the 3.2.
        ((64, 16), [SMALL], (12.8 / 64, 1.6 / 16, 12.8 / 64, 12.8 / 16)),
        # 0.125 of 400x150 px are 100x75, at 1/4 of 300 and 1/2 of 75.
        ((400, 150), [TOO_LARGE, WIDEST, SMALL], (75 / 400, 37.5 / 150, 100 / 400, 75 / 150)),
        ((150, 400), [NARROWEST], (18.75 / 150, 150 / 400, 75 / 150, 100 / 400)),
        # None fits: 4/3 wide and in the centre, 3/4 wide, or all of it.
        ((400, 150), [TOO_LARGE], (100 / 400, 0, 200 / 400, 1)),
        ((150, 400), [TOO_LARGE], (0, 100 / 400, 1, 200 / 400)),
        ((120, 100), [TOO_LARGE], (0, 0, 1, 1)),
    ],
)
def test_random_boxes_equal_hand_computed_ones(size, attempts, box):
    draws = draws_for(attempts, (0.25, 0.5))
    boxes = random_boxes(torch.tensor([size]), draws[None])
    torch.testing.assert_close(boxes, torch.tensor([box], dtype=torch.float32))


def test_random_boxes_tenth_attempt_counts_and_samples_are_independent():
    small, large = draws_for([(0.1, 1.0)], (0, 0)), draws_for([TOO_LARGE], (0, 0))
    tenth = large.clone()
    tenth[[ATTEMPTS - 1, 2 * ATTEMPTS - 1]] = small[[0, ATTEMPTS]]
    sizes = torch.tensor([[100, 100], [300, 100], [300, 100]])
    boxes = random_boxes(sizes, torch.stack((small, large, tenth)))
    torch.testing.assert_close(boxes[:, 2] * boxes[:, 3], torch.tensor([0.1, 4 / 9, 0.1]))


@pytest.mark.parametrize("size", [(2000, 400), (500, 1200)])
def test_random_boxes_are_distributed_as_in_torchvision(size):
    """At 5:1 no attempt fits for a quarter of the images."""
    torch.manual_seed(0)
    width, height = size
    image = torch.empty(1, 1).expand(3, height, width)
    drawn = [RandomResizedCrop.get_params(image, AREAS, ASPECTS) for _ in range(4000)]
    y, x, h, w = torch.tensor(drawn, dtype=torch.float32).T
    theirs = torch.stack((x / width, y / height, w / width, h / height), dim=1)
    draws = torch.rand(16000, BOX_DRAWS, generator=seeded())
    ours = random_boxes(torch.tensor([size]).expand(len(draws), -1), draws)
    assert (ours >= 0).all() and (ours[:, :2] + ours[:, 2:] <= 1 + 1e-6).all()

    def measures(boxes: torch.Tensor) -> list[torch.Tensor]:
        x, y, w, h = boxes.T
        return [x, y, w * h, (w * width / (h * height)).log()]

    levels = torch.linspace(0.05, 0.95, 19)
    for values, expected in zip(measures(ours), measures(theirs), strict=True):
        # Four standard errors of a uniform distribution; at least rounding to a pixel.
        tolerance = 4 * (expected.max() - expected.min()) * (0.25 / 4000 + 0.25 / 16000) ** 0.5
        error = (values.quantile(levels) - expected.quantile(levels)).abs().max()
        assert error < max(tolerance, 1 / min(size))


# crops


def test_crop_resize_box_of_whole_pixels_returns_those():
    images = noise(2, 64)
    boxes = torch.tensor([[16, 8, 32, 32], [30, 32, 32, 32]]) / 64
    out = crop_resize(images, boxes, torch.tensor([[False], [True]]), 32)
    torch.testing.assert_close(out[0], images[0, :, 8:40, 16:48] / 255)
    torch.testing.assert_close(out[1], images[1, :, 32:, 30:62].flip(-1) / 255)


def test_augmentation_crops_have_original_aspect_and_half_are_mirrored():
    """The position of each crop is measured on ramps."""
    n, side, size = 400, 64, 32
    width, height = 300, 200
    augment = ImageAugmentation(size, **PLAIN)
    out, labels = augment(located(n, side), targets_of(n, width, height), seeded())
    assert out.dtype == torch.float32 and out.shape == (n, 3, size, size)
    assert labels.tolist() == list(range(n))
    rows, columns = out[:, 0, :, size // 2], out[:, 1, size // 2]
    down = (rows[:, 20] - rows[:, 10]) / 10 * size / side  # the crop's share of the height
    across = (columns[:, 20] - columns[:, 10]) / 10 * size / side
    assert 150 < (across < 0).sum() < 250
    aspects, areas = across.abs() * width / (down * height), down * across.abs()
    assert 3 / 4 - 0.01 < aspects.min() < 0.8 and 1.25 < aspects.max() < 4 / 3 + 0.01
    assert 0.08 - 0.001 < areas.min() < 0.1 and 0.8 < areas.max() < 8 / 9 + 0.001
    assert len({tuple(image.flatten().tolist()) for image in out}) == n  # no two alike


def test_augmentation_modern_changes_colours_only():
    grey = torch.full((50, 3, 16, 16), 100, dtype=torch.uint8)
    modern = ImageAugmentation(16, "modern", **PLAIN)
    out, _ = modern(grey, targets_of(50), seeded())
    brightness = out[:, 0, 0, 0] / 100
    torch.testing.assert_close(out, 100 * brightness[:, None, None, None].expand_as(out))
    assert 0.7 <= brightness.min() < 0.75 and 1.25 < brightness.max() <= 1.3
    paper = ImageAugmentation(16, "paper", **PLAIN)
    out, _ = paper(grey, targets_of(50), seeded())
    torch.testing.assert_close(out, grey.float())


def test_augmentation_modern_without_jitter_equals_paper(monkeypatch):
    monkeypatch.setattr(classification_transforms, "JITTER", 0)
    batch = noise(6), targets_of(6)
    paper, modern = (ImageAugmentation(24, name)(*batch, seeded())[0] for name in PRESETS)
    torch.testing.assert_close(paper, modern, atol=1e-5, rtol=0)


def test_augmentation_default_normalization_is_that_of_imagenet():
    flat = torch.tensor([51, 102, 204], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 8, 8)
    augment = ImageAugmentation(8)
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    expected = (torch.tensor([0.2, 0.4, 0.8]) - mean) / std
    for out, _ in (augment.normalize(flat, targets_of(1)), augment(flat, targets_of(1), seeded())):
        torch.testing.assert_close(out, expected.view(1, 3, 1, 1).expand_as(out))
    assert dict(augment.named_buffers()).keys() == {"mean", "std"}


# validation


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (256, 256)])
@pytest.mark.parametrize(("side", "crop"), [(256, 224), (160, 112)])
def test_normalize_equals_resize_and_center_crop(size, side, crop):
    width, height = size
    y, x = torch.linspace(0, 5, height)[:, None], torch.linspace(0, 4, width)
    waves = torch.stack((torch.sin(x + y), torch.cos(x - 2 * y), torch.sin(2 * x) * torch.cos(y)))
    image = (127.5 + 120 * waves).round().to(torch.uint8)
    squeezed = v2.Resize((side, side), antialias=True)(image)
    usual = v2.Compose([v2.Resize(crop * 256 // 224, antialias=True), v2.CenterCrop(crop)])(image)
    augment = ImageAugmentation(crop, "modern", mixup=0.2, **PLAIN)
    out, labels = augment.normalize(squeezed[None], torch.tensor([[7, width, height]]))
    assert labels.tolist() == [7]
    error = (out[0] - usual).abs()  # torchvision cuts at whole pixels, and rounds the values twice
    pixel = 0.6 * 120 * 5 / (crop / 0.875)  # half a pixel, on the steepest slopes
    assert error.mean() < pixel / 2 + 0.5 and error.max() < 2 * pixel + 2


# mixup


def test_augmentation_mixup_images_and_labels_have_the_same_shares():
    n = 5
    batch = noise(n), targets_of(n)
    plain, classes = ImageAugmentation(24, num_classes=7)(*batch, seeded())
    mixed, labels = ImageAugmentation(24, num_classes=7, mixup=0.4)(*batch, seeded())
    assert labels.shape == (n, 7) and labels.dtype == torch.float32
    torch.testing.assert_close(labels.sum(1), torch.ones(n))
    share = labels[0, 0]
    assert 0.01 < share < 0.99
    for i in range(n):
        before = (i - 1) % n
        torch.testing.assert_close(labels[i, classes[i]], share)
        torch.testing.assert_close(labels[i, classes[before]], 1 - share)
        torch.testing.assert_close(mixed[i], share * plain[i] + (1 - share) * plain[before])


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_sample_mixup_lambda_follows_beta_distribution(alpha):
    generator = seeded()
    shares = np.array([sample_mixup_lambda(alpha, generator) for _ in range(4000)])
    assert ((shares >= 0) & (shares <= 1)).all()
    assert shares.mean() == pytest.approx(0.5, abs=0.02)
    assert shares.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.04)


# draws


@pytest.mark.parametrize("preset", PRESETS)
def test_augmentation_depends_on_generator_only(preset):
    batch = noise(4), targets_of(4)
    augment = ImageAugmentation(24, preset, num_classes=4, mixup=0.2)
    torch.manual_seed(1)
    np.random.seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    x, y = augment(*batch, seeded())
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == np.random.get_state()[1].tolist()
    torch.manual_seed(2)
    again, labels = augment(*batch, seeded())
    assert torch.equal(x, again) and torch.equal(y, labels)
    generator = seeded()
    augment(*batch, generator)
    other, labels = augment(*batch, generator)  # the next batch
    assert not torch.equal(x, other) and not torch.equal(y, labels)
    images = batch[0].contiguous(memory_format=torch.channels_last)
    assert torch.equal(x, augment(images, batch[1], seeded())[0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("preset", PRESETS)
def test_augmentation_on_gpu_equals_cpu(preset):
    batch = noise(8), targets_of(8)
    augment = ImageAugmentation(24, preset, num_classes=8, mixup=0.2)
    expected = augment(*batch, seeded())
    found = augment.cuda()(*(tensor.cuda() for tensor in batch), seeded())
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, atol=1e-3, rtol=0)


def test_augmentation_unknown_preset_or_negative_mixup_is_refused():
    with pytest.raises(ValueError, match="autumn"):
        ImageAugmentation(24, "autumn")
    with pytest.raises(ValueError, match="mixup"):
        ImageAugmentation(24, mixup=-1)
