"""Fused graphs, the predictor, its backends and the benchmark."""

import contextlib
import ctypes
import io
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from unittest.mock import MagicMock

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
from lednet.evaluation.cityscapes_metrics import BenchmarkScores
from lednet.evaluation.report import _headline
from lednet.exporting import formats
from lednet.exporting.fuse import fuse_channel_shuffles, fuse_conv_bn
from lednet.exporting.wrappers import EndToEndModel
from lednet.inference import backends
from lednet.inference.benchmark import benchmark, benchmark_rows, count_macs, time_runs
from lednet.inference.predictor import Predictor
from lednet.inference.tiles import tile_spans
from lednet.inference.video import write_video
from lednet.model import Block, Down, SSnbt, argmax_at, upsample_scores

VARIANTS = ("d20", "d128")
SHORT_STAGES = (Down(32), Block(0.03, 1), Down(64), Block(0.03, 1), Down(128), Block(0.3, 5))
"""One block of each kind: full networks take several times as long to compile and export."""
DOWN_STAGES = (Down(32), Down(64), Down(128))


def formula_net(variant: str = "d20", outputs: int = 20) -> LEDNet:
    """A network with batch norm statistics as after training; some scales are negative."""
    net = LEDNet(outputs, variant).eval()
    state = formula_state(net)
    for name, value in state.items():
        if name.endswith("weight") and value.dim() == 1:
            value[::5] *= -1
    load_state(net, state, "formula")
    return net


@pytest.fixture(scope="module")
def net() -> LEDNet:
    """Not to be modified."""
    return formula_net()


@pytest.fixture
def short_stages(monkeypatch) -> None:
    monkeypatch.setattr(lednet.model, "ENCODER_STAGES", SHORT_STAGES)


def random_images(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def assert_equal_outputs(net: LEDNet, other: nn.Module, image: torch.Tensor) -> None:
    """To 1e-5 of the largest value."""
    with torch.no_grad():
        expected, found = net.decoder(net.encoder(image)), other(image)
    assert expected.std() > 0.01  # a constant output would prove nothing
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def assert_fuses(net: LEDNet, image: torch.Tensor) -> None:
    """Equal outputs without batch norms, then without shuffles; the network is unchanged."""
    before = {key: value.clone() for key, value in net.state_dict().items()}
    fused = fuse_conv_bn(net)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fused.modules())
    assert_equal_outputs(net, nn.Sequential(fused.encoder, fused.decoder), image)
    plain = fuse_channel_shuffles(fused)
    assert not any(isinstance(m, SSnbt | nn.BatchNorm2d | nn.Dropout2d) for m in plain.modules())
    assert_equal_outputs(net, plain, image)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert all(p.requires_grad for p in net.parameters())


@pytest.mark.parametrize("variant", VARIANTS)
def test_fuse_formula_weights_equal_outputs(variant):
    assert_fuses(formula_net(variant), torch.rand(2, 3, 65, 99))


@pytest.mark.parametrize("variant", VARIANTS)
def test_fuse_reference_weights_equal_outputs(variant, real_data):
    net, _ = load_model(real_data / "golden" / f"official_{variant}_model_best.pth")
    assert_fuses(net, torch.rand(1, 3, 128, 256))


def test_fuse_stage_without_blocks_equal_outputs(monkeypatch):
    stages = (Down(32), Down(64), Block(0.03, 1), Down(128))
    monkeypatch.setattr(lednet.model, "ENCODER_STAGES", stages)
    assert_fuses(formula_net(), torch.rand(1, 3, 64, 96))


def test_fuse_channel_shuffles_graph_has_no_shuffle(short_stages):
    """Convolutions and elementwise operations only: no transposition, no indexing."""
    fused = fuse_channel_shuffles(fuse_conv_bn(formula_net()))
    graph = torch.export.export(fused, (torch.rand(1, 3, 64, 64),)).graph
    names = {str(node.target) for node in graph.nodes if node.op == "call_function"}
    assert "aten.conv2d.default" in names
    for word in ("transpose", "permute", "batch_norm", "index", "split", "chunk", "slice"):
        assert not any(word in name for name in names), names


def test_end_to_end_model_unknown_output_is_rejected(net):
    with pytest.raises(ValueError, match="output must be one of"):
        EndToEndModel(net, output="scores")


# Predictor


def test_predictor_preprocessing_equals_torchvision(net):
    image = random_images(3, 50, 70)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    pixels = v2.functional.resize(image, [32, 48], antialias=True)
    expected = v2.functional.normalize(v2.functional.to_dtype(pixels, scale=True), mean, std)
    graph = EndToEndModel(net, mean, std)
    graph.net = nn.Identity()
    found = graph(Predictor(net, (32, 48), mean, std, backend="eager").prepare(image[None]))[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("fold", [True, False])
def test_predictor_equals_network_and_leaves_it_unchanged(fold):
    net = formula_net().train()
    predictor = Predictor(net, (32, 48), fold=fold, backend="eager")
    assert all(module.training for module in net.modules())
    assert net.encoder[1].left[0].weight.is_contiguous()
    image = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    labels = predictor(image).labels
    assert labels.shape == (50, 70) and labels.dtype == np.uint8
    x = predictor.prepare(torch.from_numpy(image).permute(2, 0, 1)[None]).permute(0, 3, 1, 2)
    with torch.no_grad():
        expected = argmax_at(net.eval()(x / 255), (50, 70))[0].numpy()
    assert (labels == expected).mean() > 0.999


def test_label_maps_several_sizes_and_images(net):
    predictor, images = Predictor(net, (32, 48), backend="eager"), random_images(3, 3, 50, 70)
    full, network = predictor.label_maps(images, (50, 70), (32, 48))
    assert full.shape == (3, 50, 70) and network.shape == (3, 32, 48)
    alone = predictor(images[1].permute(1, 2, 0).numpy())
    assert (full[1].numpy() == alone).mean() > 0.999


def test_scores_average_probabilities_of_scales_and_mirrored_image(net):
    image, size = random_images(1, 3, 60, 80), (32, 48)
    found = Predictor(net, size, scales=(0.5, 1.0, 1.5), flip=True, backend="eager").scores(image)
    plain = [Predictor(net, sides, backend="eager") for sides in ((16, 24), size, (48, 72))]
    parts = [(p.scores(image).softmax(1), p.scores(image.flip(3)).softmax(1)) for p in plain]
    assert (parts[1][0] - parts[1][1].flip(3)).abs().max() > 1e-3
    parts = [F.interpolate((a + b.flip(3)) / 2, size, mode="bilinear") for a, b in parts]
    torch.testing.assert_close(found, sum(parts) / 3, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("length", "tile", "overlap"), [(100, 40, 8), (97, 32, 20), (64, 64, 8), (1000, 130, 2)]
)
def test_tile_spans_cover_every_pixel_once(length, tile, overlap):
    spans = tile_spans(length, tile, overlap)
    owned = [pixel for span in spans for pixel in range(span.own_start, span.own_stop)]
    assert owned == list(range(length))
    for span in spans:
        assert 0 <= span.start <= span.own_start < span.own_stop <= span.stop <= length
        assert span.stop - span.start == min(tile, length)
        assert span.own_start - span.start >= overlap // 2 or span.start == 0
        assert span.stop - span.own_stop >= overlap // 2 or span.stop == length


class Pointwise(nn.Module):
    """A network without context: tiles must not change its output."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.AvgPool2d(8, ceil_mode=True)
        self.decoder = nn.Conv2d(3, 5, 1)


@pytest.mark.parametrize("size", [(61, 83), (122, 166), (40, 50)])
def test_predictor_tiles_equal_whole_image(size):
    torch.manual_seed(0)
    net = Pointwise()
    net.decoder.weight.data *= 20
    blocks = random_images(2, 3, 8, 11)
    images = blocks.repeat_interleave(8, 2).repeat_interleave(8, 3)[..., :61, :83]
    options = {"size": (61, 83), "fold": False, "backend": "eager"}
    whole = Predictor(net, **options).label_maps(images, size)[0]
    tiled = Predictor(net, **options, tile=(24, 32), overlap=8).label_maps(images, size)
    assert whole.unique().numel() > 2
    assert torch.equal(whole, tiled[0])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tile": (32, 32), "scales": (1.0, 2.0), "overlap": 8}, "does not go together"),
        ({"tile": (32, 32), "flip": True, "overlap": 8}, "does not go together"),
        ({"tile": (32, 36), "overlap": 8}, "multiples of 8"),
        ({"tile": (32, 32), "overlap": 32}, "does not suit"),
        ({"scales": (0.0,)}, "positive"),
        ({"backend": "abacus"}, "no backend abacus: choose one of auto, eager"),
        ({"precision": "fp16"}, "fp16 needs a GPU"),
        ({"backend": "onnxruntime", "precision": "bf16"}, "--precision fp32, not bf16"),
        ({"backend": "openvino"}, "pip install onnx onnxscript openvino"),
    ],
)
def test_predictor_wrong_options_are_rejected(options, words, monkeypatch, short_stages):
    found = "openvino" not in options.values()
    monkeypatch.setattr(formats, "installed", lambda package: found)
    with pytest.raises(UserError, match=words):
        Predictor(LEDNet(3), (64, 64), **options)


def test_from_weights_reads_size_and_normalization(net, tmp_path):
    meta = {"size": [40, 56], "mean": [0.5] * 3, "std": [0.25] * 3}
    save_checkpoint(tmp_path / "best.pth", net, meta)
    predictor = Predictor(tmp_path, backend="eager")  # a run folder
    assert predictor.size == (40, 56) and predictor.parameters == 925_663
    black = torch.zeros(1, 40, 56, 3, dtype=torch.uint8)
    expected = Predictor(net, (40, 56), backend="eager").runner(
        black.float() - 255 * 2
    )  # (0 - 0.5) / 0.25
    torch.testing.assert_close(predictor.runner(black), expected)
    assert Predictor(tmp_path, (64, None), backend="eager").size == (64, 56)
    assert Predictor.from_weights(tmp_path, height=64, backend="eager").size == (64, 56)


def test_predictor_image_types_equal_labels(net, tmp_path):
    predictor = Predictor(net, (32, 48), backend="eager")
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    expected = predictor(pixels)
    for image in (
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
        Image.fromarray(pixels),
        torch.from_numpy(pixels).permute(2, 0, 1),
        np.dstack((pixels, np.full((50, 70), 9, np.uint8))),  # with alpha
        Image.fromarray(pixels).convert("RGBA"),
        np.ascontiguousarray(pixels[:, :, ::-1])[:, :, ::-1],
        np.asfortranarray(pixels),
        (tmp_path / "a.png").read_bytes(),
        io.BytesIO((tmp_path / "a.png").read_bytes()),
    ):
        assert np.array_equal(predictor(image), expected)
    batch = predictor([pixels, tmp_path / "a.png"])
    assert len(batch) == 2 and all(np.array_equal(labels, expected) for labels in batch)
    assert predictor([]) == []


@pytest.mark.parametrize("flip", [False, True])
def test_predictor_confidence_is_the_largest_probability(net, flip):
    predictor = Predictor(net, (32, 48), backend="eager", flip=flip)
    image = random_images(3, 50, 70)
    result = predictor(image, confidence=True)
    scores = upsample_scores(predictor.scores(image[None]), (50, 70))[0]
    expected = (scores if flip else scores.softmax(0)).amax(0).numpy()
    np.testing.assert_allclose(result.confidence, expected, rtol=1e-5)
    assert np.array_equal(result.labels, predictor(image).labels)
    assert predictor(image).confidence is None


def test_predictor_stream_segments_frames_in_order(net, tmp_path):
    pytest.importorskip("av", reason="needs PyAV: pip install av")
    frames = [np.full((32, 48, 3), 20 * i, np.uint8) for i in range(6)]
    with write_video(tmp_path / "a.mp4", Fraction(5), Fraction(1, 5)) as video:
        for i, frame in enumerate(frames):
            video.append(frame, i)
    predictor = Predictor(net, (32, 48), backend="eager")
    found = list(predictor.stream(tmp_path / "a.mp4"))
    assert [round(result.image.mean() / 20) for result in found] == list(range(6))
    assert all(np.array_equal(result.labels, predictor(result.image).labels) for result in found)
    with pytest.raises(UserError, match="cannot be read as a video"):
        next(predictor.stream(tmp_path / "none.mp4"))


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (None, "NoneType is no image"),
        (5, "int is no image"),
        ([[1, 2]], "list is no image"),
        (b"no image", "damaged"),
        (io.StringIO("text"), "mode 'rb'"),
        ("", "is empty"),
        ("https://example.org/a.png", "is a URL"),
        ("none.png", "no file none.png"),
        ("a" * 300, "cannot read"),
        (np.ones((4, 4, 3)), "uint8 with at least one pixel, not .* float64"),
        (np.ones((2, 4, 4, 3), np.uint8), "as a list"),
        (np.ones((4, 0, 3), np.uint8), "one pixel"),
        (np.array(5, np.uint8), r"\(H, W, 3\)"),
        (torch.ones(3, 4, 4), "not a tensor of torch.float32"),
        (torch.ones(3, 4, 4, dtype=torch.uint8, device="meta"), "not a tensor"),
        (torch.ones(2, 3, 4, 4, dtype=torch.uint8), "as a list"),
        (torch.ones(3, 0, 4, dtype=torch.uint8), "one pixel"),
        (Image.new("RGB", (0, 4)), "0x4 pixels"),
    ],
)
def test_predictor_other_input_is_named(image, words, net):
    with pytest.raises(UserError, match=words):
        Predictor(net, (32, 48), backend="eager")(image)


def test_predictor_truncated_pil_image_is_named(net, tmp_path):
    random = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(random).save(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:5000])
    with pytest.raises(UserError, match=r"a\.png is damaged"):
        Predictor(net, (32, 48), backend="eager")(Image.open(tmp_path / "a.png"))


@pytest.mark.parametrize("backend", ["eager", "onnxruntime", "openvino"])
def test_predictor_threads_equal_one_thread(backend, short_stages):
    """The first calls of both network sizes come at once."""
    need(backend)
    images = [random_images(40 + 8 * i, 64, 3).numpy() for i in range(8)]
    net = formula_net()
    alone = list(map(Predictor(net, (32, 48), backend="eager"), images))
    shared = Predictor(net, (32, 48), backend=backend)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(shared, images * 20))
    for result, expected in zip(found, alone * 20, strict=True):
        assert (result.labels == expected.labels).mean() > 0.999


def test_openvino_first_calls_of_a_process_from_threads_end(tmp_path, short_stages):
    need("openvino")
    graph, file = EndToEndModel(LEDNet(3).eval()).eval(), tmp_path / "a.xml"
    formats.FORMATS["openvino"].write(graph, file, formats.ExportOptions((1, 32, 48)))
    program = (
        "import pathlib, sys, threading, numpy\n"
        "from concurrent.futures import ThreadPoolExecutor\n"
        "from lednet.exporting.formats import load\n"
        "sys.setswitchinterval(1e-6)\n"
        "run, start = load(sys.argv[1]), threading.Barrier(8)\n"
        "images = numpy.zeros((1, 32, 48, 3), numpy.uint8)\n"
        "with ThreadPoolExecutor(8) as pool:\n"
        "    list(pool.map(lambda i: (start.wait(), run(images)), range(8)))\n"
    )
    command = [sys.executable, "-c", program, str(file)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=300)


def test_runner_per_size_builds_once_while_threads_wait():
    built, inside = [], threading.Lock()

    def build(example: torch.Tensor):
        assert inside.acquire(blocking=False), "two threads build at once"
        time.sleep(0.05)
        built.append(tuple(example.shape))
        inside.release()
        return lambda images: images + 1

    runner = backends._RunnerPerSize(build)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(runner, [torch.zeros(1 + i % 2) for i in range(16)]))
    assert sorted(built) == [(1,), (2,)]


def test_cuda_graph_runner_keeps_threads_apart(monkeypatch):
    """With a stand-in for CUDA whose graph fails if two threads are inside."""
    record: dict = {}

    class Graph:
        def replay(self):
            images = record["images"].clone()
            time.sleep(0.001)
            assert torch.equal(images, record["images"]), "another thread is inside"
            with torch.inference_mode():
                record["logits"].copy_(images.float())

    def forward(images: torch.Tensor) -> torch.Tensor:
        record.update(images=images, logits=images.float())
        return record["logits"]

    for name in ("Event", "Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *args: MagicMock())
    for name in ("stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, lambda *args, **kwargs: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    with torch.inference_mode():
        runner = backends._CudaGraphRunner(forward, torch.zeros(4, dtype=torch.uint8))

    def ask(value: int) -> bool:
        return bool((runner(torch.full((4,), value, dtype=torch.uint8)) == value).all())

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(ask, range(100)))


def test_openvino_small_network_is_refused(net):
    need("openvino")
    with pytest.raises(UserError, match="at least 8 pixels"):
        Predictor(net, (4, 48), backend="openvino")(np.zeros((9, 9, 3), np.uint8))


def test_to_rgb_converts_every_mode(tmp_path):
    grey = np.arange(200, dtype=np.uint8).reshape(10, 20)
    rgb = grey[..., None].repeat(3, axis=2)
    assert np.array_equal(to_rgb(grey), rgb)
    for name, image in (
        ("L.png", Image.fromarray(grey)),
        ("LA.png", Image.fromarray(grey).convert("LA")),
        ("16.png", Image.fromarray(grey.astype(np.uint16) * 257)),
        ("CMYK.tif", Image.fromarray(rgb).convert("CMYK")),
    ):
        image.save(tmp_path / name)
        for found in (to_rgb(image), to_rgb(open_image(tmp_path / name))):
            assert np.array_equal(found, rgb), name
    palette = Image.fromarray(rgb).quantize(200)
    assert np.abs(to_rgb(palette).astype(int) - rgb).max() <= 8


def test_to_rgb_applies_exif_orientation(tmp_path):
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:, :16] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    rotated = to_rgb(open_image(tmp_path / "a.png"))
    assert rotated.shape == (32, 16, 3) and rotated[0, 0, 0] == 255 and rotated[-1, 0, 0] == 0
    assert read_image(tmp_path / "a.png").shape == (16, 32, 3)  # not rotated, as its label


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (np.zeros((4, 4, 3), np.float32), "one pixel, not"),
        (np.zeros((4, 4, 3), np.uint16), "one pixel, not"),
        (np.zeros((3, 4, 5), np.uint8), "channels last"),
        (np.zeros((0, 4, 3), np.uint8), "one pixel, not"),
        (Image.new("F", (4, 4)), "32-bit"),
    ],
)
def test_to_rgb_not_8_bit_image_is_rejected(image, words):
    with pytest.raises(UserError, match=words):
        to_rgb(image)


# Benchmark


@pytest.mark.parametrize(("variant", "gmacs"), [("d20", 11.21), ("d128", 13.08)])
def test_count_macs_equals_released_networks(variant, gmacs):
    with torch.device("meta"):
        net = LEDNet(20, variant).eval()
        for each in (net, fuse_conv_bn(net)):
            assert count_macs(each, (512, 1024)) / 1e9 == pytest.approx(gmacs, abs=0.005)


def test_benchmark_reports_its_conditions(net):
    card = benchmark(
        Predictor(net, (32, 64), backend="eager"), (64, 128), batch=2, warmup=1, runs=2
    )
    expected = {
        "batch_norm": "folded", "precision": "fp32", "network_size": [32, 64],
        "image_size": [64, 128], "batch": 2, "warmup": 1, "runs": 2, "parameters": 925_663,
    }  # fmt: skip
    assert expected.items() <= card.items() and card["peak_memory_mb"] > 10
    for part in ("forward", "image_to_label_map"):
        assert card[part]["fps"] == pytest.approx(2000 / card[part]["p50_ms"])
        assert 0 <= card[part]["p50_ms"] <= card[part]["p95_ms"]
    text = "\n".join(f"{name} {value}" for name, value in benchmark_rows(card))
    assert all(words in text for words in ("925,663", "fp32", "folded", "batch 2"))


def test_benchmark_marks_noisy_times(net, monkeypatch):
    times = iter([{"p50_ms": 10.0, "p95_ms": 13.1}, {"p50_ms": 10.0, "p95_ms": 12.9}])
    monkeypatch.setattr("lednet.inference.benchmark.time_runs", lambda *_: next(times))
    card = benchmark(Predictor(net, (32, 64), backend="eager"), (64, 128))
    assert (card["forward"]["noisy"], card["image_to_label_map"]["noisy"]) == (True, False)
    (_, forward), (_, whole), *_ = benchmark_rows(card)
    assert "noisy (p95 over 1.3 x p50)" in forward and "noisy" not in whole
    for noisy in (True, False):
        card["forward"]["noisy"] = noisy
        labels = [figure.label for figure in _headline(BenchmarkScores(), None, card, "best.pth")]
        assert ("FPS" in labels) is not noisy


def test_time_runs_excludes_warmup():
    calls = []
    time_runs(lambda: calls.append(0), torch.device("cpu"), warmup=2, runs=5)
    assert len(calls) == 7
    time_runs(lambda: calls.append(1), torch.device("cpu"), warmup=2, runs=50, max_seconds=0)
    assert calls.count(1) == 2 + 5


# Backends


def need(backend: str) -> None:
    packages = ("onnx", "onnxscript", backend) if backend in ("onnxruntime", "openvino") else ()
    for package in packages:
        pytest.importorskip(package, reason=f"needs {package}: pip install '.[deploy]'")


def test_backends_send_no_usage_reports(tmp_path):
    """In a new process; ONNX Runtime first writes its report to a file."""
    for name in ("onnxruntime", "openvino"):
        need(name)
    program = (
        "import sys, torch, lednet.model as model\n"
        "from lednet.inference.predictor import Predictor\n"
        "model.ENCODER_STAGES = tuple(map(model.Down, (32, 64, 128)))\n"
        "net = model.LEDNet(3).eval()\n"
        "for backend in ('onnxruntime', 'openvino'):\n"
        "    Predictor(net, (32, 32), backend=backend)(torch.zeros(3, 9, 9).byte())\n"
        "print('openvino.tools.ovc.telemetry_stub' in sys.modules)\n"
    )
    environ = {"PATH": os.environ["PATH"], "TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", "-c", program]
    result = subprocess.run(command, env=environ, capture_output=True, text=True)
    assert result.stdout == "True\n", result.stderr
    assert [path for path in tmp_path.iterdir() if not path.name.startswith("torch")] == []


@pytest.mark.parametrize(
    ("backend", "variant"),
    [("eager", "d20"), ("compiled", "d20"), ("onnxruntime", "d20"), ("openvino", "d128")],
)
def test_backend_equals_plain_network_at_several_sizes(backend, variant, short_stages, monkeypatch):
    """A runner is built for each size at its first use."""
    need(backend)
    scales: tuple[float, ...] = (1.0, 0.75)
    if backend == "compiled":  # which takes a minute
        monkeypatch.setattr(lednet.model, "ENCODER_STAGES", DOWN_STAGES)
        scales = (1.0,)
    net, images = formula_net(variant), random_images(2, 3, 100, 150)
    plain = Predictor(net, (64, 96), fold=False, backend="eager")
    predictor = Predictor(net, (64, 96), backend=backend)
    assert predictor.backend == backend
    for scale in scales:
        expected, found = (p.forward_logits(p.prepare(images, scale)) for p in (plain, predictor))
        assert expected.std() > 0.01  # a constant output would prove nothing
        assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


class SignalStack(ctypes.Structure):
    _fields_ = (("sp", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))

    @classmethod
    def current(cls) -> tuple:
        stack = cls()
        ctypes.CDLL(None).sigaltstack(None, ctypes.byref(stack))
        return stack.sp, stack.flags, stack.size


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux for the stack")
def test_openvino_keeps_signal_stack(monkeypatch):
    """Otherwise the end of a child process ends this one."""
    need("openvino")
    monkeypatch.setattr(lednet.model, "ENCODER_STAGES", DOWN_STAGES)
    before = SignalStack.current()
    predictor = Predictor(formula_net(), (32, 48), backend="openvino")
    predictor(np.zeros((32, 48, 3), np.uint8))
    assert SignalStack.current() == before
    del predictor
    assert SignalStack.current() == before


@pytest.mark.parametrize(
    ("packages", "choice"),
    [
        ("onnx onnxscript onnxruntime openvino", "openvino"),
        ("onnx onnxscript onnxruntime", "onnxruntime"),
        ("onnxruntime openvino", "eager"),  # the network cannot be exported
    ],
)
def test_backend_auto_chooses_fastest_installed(packages, choice, net, monkeypatch):
    monkeypatch.setattr(formats, "installed", packages.split().__contains__)
    assert backends.choose_backend(torch.device("cpu")) == choice
    assert backends.choose_backend(torch.device("cpu"), images=backends.FEW_IMAGES + 1) == choice
    assert backends.choose_backend(torch.device("cpu"), images=1) == "eager"
    assert backends.choose_backend(torch.device("cuda")) == "compiled"
    if choice == "eager":
        assert Predictor(net, (32, 32), backend="auto").backend == "eager"
