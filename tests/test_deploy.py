"""Folding changes nothing, tiles join without a seam, and the speed card says what it measured."""

import ctypes
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from make_golden import formula_state
from PIL import Image
from torch import nn
from torchvision.transforms import v2

import lednet.model
from lednet import LEDNet, UserError, load_model
from lednet.checkpoint import load_state, save_checkpoint
from lednet.data.image_io import open_image, read_image, to_rgb
from lednet.export import formats
from lednet.export.fuse import fuse_conv_bn
from lednet.export.unshuffle import fuse_channel_shuffles
from lednet.export.wrappers import BytesToLogits
from lednet.inference import backends
from lednet.inference.backends import BACKENDS
from lednet.inference.benchmark import benchmark, benchmark_rows, count_macs, time_runs
from lednet.inference.predictor import Predictor, tile_spans
from lednet.model import Block, Down, SSnbt, argmax_at, upsample_scores

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


def assert_same_answer(net: LEDNet, other: nn.Module, image: torch.Tensor) -> None:
    """To 1e-5 of the largest value; prints how far."""
    with torch.no_grad():
        expected, found = net.decoder(net.encoder(image)), other(image)
    assert expected.std() > 0.01  # the answer must say something
    difference = ((found - expected).abs().max() / expected.abs().max()).item()
    print(f"largest difference {difference:.1e} relative")
    assert difference <= 1e-5


def assert_folds(net: LEDNet, image: torch.Tensor) -> None:
    """Without batch norms, and then without shuffles, the network answers as before."""
    folded = fuse_conv_bn(net)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    assert any(isinstance(m, nn.BatchNorm2d) for m in net.modules())
    assert_same_answer(net, nn.Sequential(folded.encoder, folded.decoder), image)
    plain = fuse_channel_shuffles(folded)
    assert not any(isinstance(m, SSnbt | nn.BatchNorm2d | nn.Dropout2d) for m in plain.modules())
    assert_same_answer(net, plain, image)


@pytest.mark.parametrize("variant", VARIANTS)
def test_folded_network_answers_alike(variant):
    assert_folds(worn(variant), torch.rand(2, 3, 65, 99))


@pytest.mark.parametrize("variant", VARIANTS)
def test_folded_reference_weights_answer_alike(variant, real_data):
    net, _ = load_model(real_data / "golden" / f"official_{variant}_model_best.pth")
    assert_folds(net, torch.rand(1, 3, 128, 256))


def test_no_shuffle_is_left_in_the_graph():
    """Nothing but convolutions and what lies between them: no transposition, no index."""
    graph = torch.export.export(
        fuse_channel_shuffles(fuse_conv_bn(worn())), (torch.rand(1, 3, 64, 64),)
    )
    names = {str(node.target) for node in graph.graph.nodes if node.op == "call_function"}
    assert "aten.conv2d.default" in names
    for word in ("transpose", "permute", "batch_norm", "index", "split", "chunk", "slice"):
        assert not any(word in name for name in names), names


def test_a_stage_without_blocks_is_not_shuffled(monkeypatch):
    stages = (Down(32), Down(64), Block(0.03, 1), Down(128))
    monkeypatch.setattr(lednet.model, "ENCODER_STAGES", stages)
    net = worn()
    assert_same_answer(net, fuse_channel_shuffles(fuse_conv_bn(net)), torch.rand(1, 3, 64, 96))


def test_folding_leaves_the_network_as_it_was():
    net = worn()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    fuse_conv_bn(net)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert all(p.requires_grad for p in net.parameters())


def test_predictor_prepares_images_as_evaluation_does():
    image = torch.randint(0, 256, (3, 50, 70), dtype=torch.uint8)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    pixels = v2.functional.resize(image, [32, 48], antialias=True)
    expected = v2.functional.normalize(v2.functional.to_dtype(pixels, scale=True), mean, std)
    predictor = Predictor(worn(), (32, 48), mean, std)
    net = BytesToLogits(worn(), mean, std)
    net.net = nn.Identity()
    found = net(predictor.prepare(image[None]))[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("fold", [True, False])
def test_predictor_answers_at_the_size_of_the_image(fold):
    net = worn()
    predictor = Predictor(net, (32, 48), fold=fold)
    image = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    labels = predictor(image)
    assert labels.shape == (50, 70) and labels.dtype == np.uint8
    x = predictor.prepare(torch.from_numpy(image).permute(2, 0, 1)[None]).permute(0, 3, 1, 2)
    with torch.no_grad():
        expected = argmax_at(net(x / 255), (50, 70))[0].numpy()
    assert (labels == expected).mean() > 0.999


@pytest.mark.parametrize("fold", [True, False])
def test_predictor_leaves_the_network_alone(fold):
    net = worn().train()
    Predictor(net, (32, 48), fold=fold)
    assert all(module.training for module in net.modules())
    assert net.encoder[1].left[0].weight.is_contiguous()


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
    """A network whose answer at a place depends on nothing else: tiles cannot change it."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.AvgPool2d(8, ceil_mode=True)
        self.decoder = nn.Conv2d(3, 5, 1)


@pytest.mark.parametrize("size", [(61, 83), (97, 201), (122, 166), (40, 50)])
def test_tiles_join_without_a_seam_at_any_size(size):
    torch.manual_seed(0)
    net = Pointwise()
    net.decoder.weight.data *= 20
    blocks = torch.randint(0, 256, (2, 3, 8, 11), dtype=torch.uint8)
    images = blocks.repeat_interleave(8, 2).repeat_interleave(8, 3)[..., :61, :83]
    whole = Predictor(net, (61, 83), fold=False).label_maps(images, size)[0]
    tiled = Predictor(net, (61, 83), fold=False, tile=(24, 32), overlap=8).label_maps(images, size)
    assert whole.unique().numel() > 2
    assert torch.equal(whole, tiled[0])


def test_enlarging_to_the_same_size_is_no_work():
    scores = torch.rand(1, 2, 3, 4)
    assert upsample_scores(scores, (3, 4)) is scores


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tile": (32, 32), "scales": (1.0, 2.0), "overlap": 8}, "does not go together"),
        ({"tile": (32, 32), "flip": True, "overlap": 8}, "does not go together"),
        ({"tile": (32, 36), "overlap": 8}, "multiples of 8"),
        ({"backend": "abacus"}, "no backend abacus: choose one of auto, eager"),
        ({"backend": "onnxruntime", "precision": "bf16"}, "--precision fp32"),
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
    black = torch.zeros_like(white)
    plain = Predictor(worn(), (40, 56))
    expected = plain.core((plain.prepare(white) * 0).float() - 255 * 2)  # (0 - 0.5) / 0.25
    torch.testing.assert_close(predictor.runner(predictor.prepare(black)), expected)
    assert Predictor.from_weights(tmp_path, height=64).size == (64, 56)


@pytest.mark.parametrize(("variant", "gmacs"), [("d20", 11.21), ("d128", 13.08)])
def test_cost_is_that_of_the_released_networks(variant, gmacs):
    net = LEDNet(20, variant).eval().to("meta")
    assert count_macs(net, (512, 1024)) / 1e9 == pytest.approx(gmacs, abs=0.005)
    with torch.device("meta"):
        assert count_macs(fuse_conv_bn(LEDNet(20, variant)), (512, 1024)) / 1e9 == (
            pytest.approx(gmacs, abs=0.005)
        )


def test_clock_leaves_the_warm_up_out():
    calls = []
    times = time_runs(lambda: calls.append(0), torch.device("cpu"), warmup=2, runs=5)
    assert len(calls) == 7 and 0 <= times["p50_ms"] <= times["p95_ms"]


def test_speed_card_states_its_conditions():
    predictor = Predictor(worn(), (32, 64))
    card = benchmark(predictor, (64, 128), batch=2, warmup=1, runs=2)
    assert card["batch_norm"] == "folded" and card["precision"] == "fp32"
    assert (card["network_size"], card["image_size"]) == ([32, 64], [64, 128])
    assert (card["batch"], card["warmup"], card["runs"]) == (2, 1, 2)
    assert card["parameters"] == 925_663 and card["peak_memory_mb"] > 10
    for part in ("forward", "image_to_label_map"):
        assert card[part]["fps"] == pytest.approx(2000 / card[part]["p50_ms"])
    text = "\n".join(f"{name} {value}" for name, value in benchmark_rows(card))
    assert "925,663" in text and "fp32" in text and "folded" in text and "batch 2" in text
    unfolded = benchmark(Predictor(worn(), (32, 64), fold=False), (32, 64), warmup=0, runs=1)
    assert unfolded["batch_norm"] == "not folded"


# Backends


def installed(backend: str) -> None:
    packages = ("onnx", "onnxscript", backend) if backend in ("onnxruntime", "openvino") else ()
    for package in packages:
        pytest.importorskip(package, reason=f"needs {package} (requirements-deploy.txt)")


def test_engines_do_not_report_to_their_makers(tmp_path):
    """In a process that has not imported them yet; ONNX Runtime's report begins as a file."""
    for name in ("onnxruntime", "openvino"):
        installed(name)
    program = (
        "import sys, torch\n"
        "from lednet import LEDNet\n"
        "from lednet.inference.predictor import Predictor\n"
        "for backend in ('onnxruntime', 'openvino'):\n"
        "    Predictor(LEDNet(3).eval(), (32, 32), backend=backend)(torch.zeros(3, 9, 9).byte())\n"
        "print('openvino.tools.ovc.telemetry_stub' in sys.modules)\n"
    )
    environ = {"PATH": os.environ["PATH"], "TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", "-c", program]
    result = subprocess.run(command, env=environ, capture_output=True, text=True)
    assert result.stdout == "True\n", result.stderr
    assert [path for path in tmp_path.iterdir() if not path.name.startswith("torch")] == []


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_backend_answers_as_the_plain_network(backend, variant):
    installed(backend)
    net = worn(variant)
    plain = Predictor(net, (64, 96), fold=False)
    predictor = Predictor(net, (64, 96), backend=backend)
    assert predictor.backend == backend
    images = torch.randint(0, 256, (1, 3, 100, 150), dtype=torch.uint8)
    expected, found = (p.forward_logits(p.prepare(images)) for p in (plain, predictor))
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
    labels = plain.label_maps(images)[0]
    assert labels.unique().numel() > 2  # one class everywhere would prove nothing
    assert (labels == predictor.label_maps(images)[0]).float().mean() >= 0.9999


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_backend_takes_any_size(backend):
    """Other scales and batches: each size is prepared at its first use."""
    installed(backend)
    images = torch.randint(0, 256, (2, 3, 40, 61), dtype=torch.uint8)
    options = {"scales": (1.0, 1.5), "flip": True}
    plain, other = (
        Predictor(worn(), (40, 61), backend=name, **options).label_maps(images)[0]
        for name in ("eager", backend)
    )
    assert plain.unique().numel() > 2
    assert (plain == other).float().mean() >= 0.9999


class SignalStack(ctypes.Structure):
    _fields_ = (("sp", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))

    @classmethod
    def current(cls) -> tuple:
        stack = cls()
        ctypes.CDLL(None).sigaltstack(None, ctypes.byref(stack))
        return stack.sp, stack.flags, stack.size


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux for the stack")
def test_openvino_leaves_the_signal_stack_alone(monkeypatch):
    """Where it does not, the end of a child process ends this one."""
    installed("openvino")
    monkeypatch.setattr(lednet.model, "ENCODER_STAGES", (Down(32), Down(64), Down(128)))
    before = SignalStack.current()
    predictor = Predictor(worn(), (32, 48), backend="openvino")
    predictor(np.zeros((32, 48, 3), np.uint8))
    assert SignalStack.current() == before
    del predictor
    assert SignalStack.current() == before


def test_auto_says_what_it_chose(monkeypatch):
    cpu = torch.device("cpu")
    for packages, choice in (
        ({"openvino", "onnxruntime", "onnx", "onnxscript"}, "openvino"),
        ({"onnxruntime", "onnx", "onnxscript"}, "onnxruntime"),
        ({"onnxruntime", "openvino"}, "eager"),  # the network cannot be handed over
        (set(), "eager"),
    ):
        monkeypatch.setattr(formats, "installed", packages.__contains__)
        assert backends.choose_backend(cpu) == choice
        if choice == "eager":
            assert Predictor(worn(), (32, 32), backend="auto").backend == "eager"
    assert backends.choose_backend(torch.device("cuda")) == "compiled"


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(formats, "installed", lambda package: False)
    with pytest.raises(UserError, match="pip install onnx onnxscript onnxruntime"):
        Predictor(LEDNet(3), (32, 32), backend="onnxruntime")


# Images in other forms


def test_images_in_any_form(tmp_path):
    """A path, a PIL image, an array and a tensor of one picture have one answer."""
    predictor = Predictor(worn(), (32, 48))
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    expected = predictor(pixels)
    forms = (
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
        Image.fromarray(pixels),
        torch.from_numpy(pixels).permute(2, 0, 1),
        np.dstack((pixels, np.full((50, 70), 9, np.uint8))),  # with transparency
        Image.fromarray(pixels).convert("RGBA"),
    )
    for form in forms:
        assert np.array_equal(predictor(form), expected)


def test_odd_modes_become_rgb(tmp_path):
    grey = np.arange(200, dtype=np.uint8).reshape(10, 20)
    rgb = grey[..., None].repeat(3, axis=2)
    assert np.array_equal(to_rgb(grey), rgb)
    for name, image in (
        ("L", Image.fromarray(grey)),
        ("LA", Image.fromarray(grey).convert("LA")),
        ("16", Image.fromarray(grey.astype(np.uint16) * 257)),
        ("CMYK", Image.fromarray(rgb).convert("CMYK")),
    ):
        assert np.array_equal(to_rgb(image), rgb), name
        path = tmp_path / f"{name}.{'tif' if name == 'CMYK' else 'png'}"
        image.save(path)
        assert np.array_equal(to_rgb(open_image(path)), rgb), name
    palette = Image.fromarray(rgb).quantize(200)
    assert np.abs(to_rgb(palette).astype(int) - rgb).max() <= 8


def test_exif_orientation_is_followed(tmp_path):
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:, :16] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: turn by 90 degrees clockwise
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    turned = to_rgb(open_image(tmp_path / "a.png"))
    assert turned.shape == (32, 16, 3) and turned[0, 0, 0] == 255 and turned[-1, 0, 0] == 0
    assert read_image(tmp_path / "a.png").shape == (16, 32, 3)  # as its label lies on disk


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (np.zeros((4, 4, 3), np.float32), "uint8, not"),
        (np.zeros((4, 4, 3), np.uint16), "uint8, not"),
        (np.zeros((3, 4, 5), np.uint8), "channels last"),
        (np.zeros((0, 4, 3), np.uint8), "uint8, not"),
        (Image.new("F", (4, 4)), "32-bit"),
    ],
)
def test_what_is_no_8_bit_image_is_refused(image, words):
    with pytest.raises(UserError, match=words):
        Predictor(LEDNet(3), (32, 32))(image)


def test_corrupt_file_is_named(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"\xff\xd8\xff nothing")
    with pytest.raises(UserError, match=r"a\.jpg is damaged"):
        Predictor(LEDNet(3), (32, 32))(tmp_path / "a.jpg")
