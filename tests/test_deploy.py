"""Folding changes nothing, tiles join without a seam, and the speed card says what it measured."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from make_golden import formula_state
from torch import nn
from torchvision import tv_tensors

from lednet import LEDNet, UserError, load_network
from lednet.data.transforms import evaluation_transform
from lednet.deploy.fold import fold_batch_norm
from lednet.deploy.predictor import Predictor, enlarge, predict_at, tile_spans
from lednet.deploy.speed import count_macs, speed_card, speed_rows, time_runs
from lednet.weights import load_state, save_checkpoint

VARIANTS = ("d20", "d128")


def worn(variant: str = "d20", outputs: int = 20) -> LEDNet:
    """A network whose batch norms are far from fresh; some scales are negative."""
    net = LEDNet(outputs, variant).eval()
    state = formula_state(net)
    for name, value in state.items():
        if name.endswith("weight") and value.dim() == 1:
            value[::5] *= -1
    load_state(net, state, "formula")
    return net


def assert_folds(net: LEDNet, image: torch.Tensor) -> None:
    folded = fold_batch_norm(net)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    assert any(isinstance(m, nn.BatchNorm2d) for m in net.modules())
    with torch.no_grad():
        expected, found = net(image), folded(image)
    assert expected.std() > 0.01  # the answer must say something
    difference = ((found - expected).abs().max() / expected.abs().max()).item()
    print(f"largest difference {difference:.1e} relative")
    assert difference <= 1e-5


@pytest.mark.parametrize("variant", VARIANTS)
def test_folded_network_answers_alike(variant):
    assert_folds(worn(variant), torch.rand(2, 3, 65, 99))


@pytest.mark.parametrize("variant", VARIANTS)
def test_folded_reference_weights_answer_alike(variant, real_data):
    net, _ = load_network(real_data / "golden" / f"official_{variant}_model_best.pth")
    assert_folds(net, torch.rand(1, 3, 128, 256))


def test_folding_leaves_the_network_as_it_was():
    net = worn()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    fold_batch_norm(net)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert all(p.requires_grad for p in net.parameters())


def test_predictor_prepares_images_as_evaluation_does():
    image = torch.randint(0, 256, (3, 50, 70), dtype=torch.uint8)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    transform = evaluation_transform((32, 48), True, mean, std)
    expected, _ = transform(tv_tensors.Image(image), tv_tensors.Mask(image[0]))
    predictor = Predictor(worn(), (32, 48), mean, std)
    torch.testing.assert_close(predictor.prepare(image[None])[0], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("fold", [True, False])
def test_predictor_answers_at_the_size_of_the_image(fold):
    net = worn()
    predictor = Predictor(net, (32, 48), fold=fold)
    image = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    labels = predictor(image)
    assert labels.shape == (50, 70) and labels.dtype == np.uint8
    x = predictor.prepare(torch.from_numpy(image).permute(2, 0, 1)[None])
    with torch.no_grad():
        expected = predict_at(net(x), (50, 70))[0].numpy()
    assert (labels == expected).mean() > 0.999


def test_several_sizes_and_images_at_once():
    predictor = Predictor(worn(), (32, 48))
    images = torch.randint(0, 256, (3, 3, 50, 70), dtype=torch.uint8)
    full, network = predictor.label_maps(images, (50, 70), (32, 48))
    assert full.shape == (3, 50, 70) and network.shape == (3, 32, 48)
    alone = predictor(images[1].permute(1, 2, 0).numpy())
    assert (full[1].numpy() == alone).mean() > 0.999


def test_flip_makes_the_answer_symmetric():
    image = torch.randint(0, 256, (1, 3, 40, 64), dtype=torch.uint8)
    predictor = Predictor(worn(), (40, 64), flip=True)
    a = predictor.scores(image)
    b = predictor.scores(image.flip(3)).flip(3)
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    torch.testing.assert_close(a.sum(1), torch.ones(1, 40, 64))  # probabilities
    plain = Predictor(worn(), (40, 64))
    assert (plain.scores(image) - plain.scores(image.flip(3)).flip(3)).abs().max() > 1e-3


def test_scales_are_averaged_as_probabilities():
    net, image = worn(), torch.randint(0, 256, (1, 3, 60, 80), dtype=torch.uint8)
    found = Predictor(net, (32, 48), scales=(0.5, 1.0, 1.5)).scores(image)
    expected = 0
    for size in ((16, 24), (32, 48), (48, 72)):
        logits = Predictor(net, size).scores(image)
        expected = expected + F.interpolate(logits.softmax(1), (32, 48), mode="bilinear") / 3
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("length", "tile", "overlap"), [(100, 40, 8), (97, 32, 20), (64, 64, 8),
                                                         (30, 64, 8), (1000, 130, 2)])  # fmt: skip
def test_tiles_own_every_pixel_once(length, tile, overlap):
    spans = tile_spans(length, tile, overlap)
    owned = [pixel for span in spans for pixel in range(span.own_start, span.own_stop)]
    assert owned == list(range(length))
    for span in spans:
        assert 0 <= span.start <= span.own_start < span.own_stop <= span.stop <= length
        assert span.stop - span.start == min(tile, length)
        assert span.own_start - span.start >= overlap // 2 or span.start == 0
        assert span.stop - span.own_stop >= overlap // 2 or span.stop == length


class Pointwise(nn.Module):
    """A network that looks at single pixels: tiles cannot change its answer."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 1)

    def forward(self, x):
        return self.conv(torch.sin(9 * x))


@pytest.mark.parametrize("size", [(61, 83), (97, 201), (122, 166), (40, 50)])
def test_tiles_join_without_a_seam_at_any_size(size):
    torch.manual_seed(0)
    net = Pointwise()
    images = torch.randint(0, 256, (2, 3, 61, 83), dtype=torch.uint8)
    whole = Predictor(net, (61, 83), fold=False).label_maps(images, size)[0]
    tiled = Predictor(net, (61, 83), fold=False, tile=(24, 32), overlap=8).label_maps(images, size)
    assert whole.unique().numel() > 2
    assert (whole == tiled[0]).float().mean() == 1


def test_enlarging_to_the_same_size_is_no_work():
    scores = torch.rand(1, 2, 3, 4)
    assert enlarge(scores, (3, 4)) is scores


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tile": (32, 32), "scales": (1.0, 2.0), "overlap": 8}, "do not go together"),
        ({"tile": (32, 32), "overlap": 32}, "does not suit"),
        ({"scales": (0.0,)}, "positive"),
        ({"precision": "fp16"}, "fp16 needs a GPU"),
    ],
)
def test_options_that_do_not_fit(options, words):
    with pytest.raises(UserError, match=words):
        Predictor(LEDNet(3), (64, 64), **options)


def test_from_weights_reads_size_and_normalisation(tmp_path):
    meta = {"size": [40, 56], "mean": [0.5] * 3, "std": [0.25] * 3}
    save_checkpoint(tmp_path / "best.pth", worn(), meta)
    predictor = Predictor.from_weights(tmp_path)  # a run's folder
    assert predictor.size == (40, 56) and predictor.parameters == 925_663
    white = torch.full((1, 3, 40, 56), 255, dtype=torch.uint8)
    assert predictor.prepare(white).unique().tolist() == [2.0]
    assert Predictor.from_weights(tmp_path, height=64).size == (64, 56)


@pytest.mark.parametrize(("variant", "gmacs"), [("d20", 11.21), ("d128", 13.08)])
def test_cost_is_that_of_the_released_networks(variant, gmacs):
    net = LEDNet(20, variant).eval().to("meta")
    assert count_macs(net, (512, 1024)) / 1e9 == pytest.approx(gmacs, abs=0.005)
    with torch.device("meta"):
        assert count_macs(fold_batch_norm(LEDNet(20, variant)), (512, 1024)) / 1e9 == (
            pytest.approx(gmacs, abs=0.005)
        )


def test_clock_leaves_the_warm_up_out():
    calls = []
    times = time_runs(lambda: calls.append(0), torch.device("cpu"), warmup=2, runs=5)
    assert len(calls) == 7 and 0 <= times["p50_ms"] <= times["p95_ms"]


def test_speed_card_states_its_conditions():
    predictor = Predictor(worn(), (32, 64))
    card = speed_card(predictor, (64, 128), batch=2, warmup=1, runs=2)
    assert card["batch_norm"] == "folded" and card["precision"] == "fp32"
    assert (card["network_size"], card["image_size"]) == ([32, 64], [64, 128])
    assert (card["batch"], card["warmup"], card["runs"]) == (2, 1, 2)
    assert card["parameters"] == 925_663 and card["peak_memory_mb"] > 10
    for part in ("forward", "image_to_label_map"):
        assert card[part]["fps"] == pytest.approx(2000 / card[part]["p50_ms"])
    text = "\n".join(f"{name} {value}" for name, value in speed_rows(card))
    assert "925,663" in text and "fp32" in text and "folded" in text and "batch 2" in text
    unfolded = speed_card(Predictor(worn(), (32, 64), fold=False), (32, 64), warmup=0, runs=1)
    assert unfolded["batch_norm"] == "not folded"
