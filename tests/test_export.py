"""Exported files answer as the network does, say what they are, and are not written otherwise."""

import functools
import json
import re
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_deploy import worn
from torch import nn

import lednet.export.wrappers
import lednet.model
from lednet import LEDNet, UserError
from lednet.checkpoint import save_checkpoint
from lednet.data.labels import camvid_scheme
from lednet.export import executorch
from lednet.export.exporter import (
    Parity,
    ParityError,
    check_parity,
    export,
    reference_logits,
    require_parity,
)
from lednet.export.formats import FORMATS, Format, load
from lednet.export.fuse import fuse_conv_bn
from lednet.export.wrappers import BytesToLabels
from lednet.inference.benchmark import benchmark
from lednet.inference.predictor import Predictor
from lednet.model import Block, Down

SIZE = (71, 105)
FULL_STAGES = lednet.model.ENCODER_STAGES
SHORT_STAGES = (Down(32), Block(0.03, 1), Down(64), Block(0.03, 1), Down(128), Block(0.3, 5))
META = {
    "dataset": "Streets, näher",
    "classes": [f"class {i}" for i in range(19)],
    "colors": [[i, 2 * i, 255 - i] for i in range(19)],
    "mean": [0.4, 0.5, 0.6],
    "std": [0.2, 0.3, 0.4],
    "size": list(SIZE),
}


def need(format: str) -> None:
    for package in FORMATS[format].packages:
        pytest.importorskip(package, reason=f"needs {package}: see requirements-deploy.txt")


def need_dynamic() -> None:
    if torch.__version__.startswith("2.6."):
        pytest.skip("--dynamic needs a torch newer than 2.6")


@pytest.fixture(scope="module", autouse=True)
def short_stages():
    """Networks with a block of each kind, because the full ones take thrice as long to export."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lednet.model, "ENCODER_STAGES", SHORT_STAGES)
        yield


def street_like(*shape: int) -> np.ndarray:
    """Images (*shape, 3) whose regions differ, with some noise."""
    rng = np.random.default_rng(sum(shape))
    coarse = torch.from_numpy(rng.uniform(0, 255, (shape[0], 3, 4, 5)))
    smooth = nn.functional.interpolate(coarse, shape[1:], mode="bicubic").permute(0, 2, 3, 1)
    noisy = smooth.numpy() + rng.normal(0, 12, (*shape, 3))
    return noisy.clip(0, 255).astype(np.uint8)


@torch.no_grad()
def lively(variant: str = "d20", outputs: int = 20) -> LEDNet:
    """A worn network in which many classes win somewhere: their means are made equal."""
    net = worn(variant, outputs)
    x = normalized(street_like(2, 72, 104))
    features = net.encoder(x)
    convolution, norm, relu = net.decoder.pooled
    norm.weight *= 0.05  # what the whole image says is not to decide alone
    pooled = norm(convolution(features.mean(dim=(2, 3), keepdim=True)))
    means = (net.decoder(features) - relu(pooled)).mean(dim=(0, 2, 3))
    norm.bias += means.max() - means + 1 - pooled.mean(dim=(0, 2, 3))
    return net


def normalized(images: np.ndarray) -> torch.Tensor:
    """Written out on its own, so that it shares no mistake with the exported graph."""
    x = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
    for channel, (mean, std) in enumerate(zip(META["mean"], META["std"], strict=True)):
        x[:, channel] = (x[:, channel] - mean) / std
    return x


def network_labels(net: LEDNet, images: np.ndarray, classes: int = 5) -> np.ndarray:
    with torch.no_grad():
        labels = net(normalized(images)).argmax(dim=1).numpy()
    assert len(np.unique(labels)) >= classes  # the answer must say something
    return labels


@pytest.fixture(scope="module")
def net(short_stages):
    return lively()


@pytest.fixture(scope="module")
def exported(net, tmp_path_factory):
    """Call it with a format for (path, parity) of a file of fixed size, written once."""

    @functools.cache
    def exported(format: str) -> tuple[Path, Parity]:
        path = tmp_path_factory.mktemp(format) / f"net{FORMATS[format].suffix}"
        return path, export(net, META, path, format, SIZE, [street_like(1, *SIZE)])

    return exported


every_format = pytest.mark.parametrize("format", tuple(FORMATS))


@every_format
def test_every_format_answers_alike(format, exported, net):
    need(format)
    path, parity = exported(format)
    assert parity.agreement >= 0.9999 and parity.max_difference < 1e-5 and parity.images == 1
    images = street_like(1, *SIZE)[:, ::-1]  # not contiguous
    found = load(path)(images)
    assert found.dtype == np.uint8 and found.shape == (1, *SIZE)
    assert (found == network_labels(net, images.copy())).mean() >= 0.9999
    suffixes = {file.suffix for file in path.parent.iterdir()}  # nothing temporary among them
    assert suffixes == {path.suffix, *FORMATS[format].beside}


@every_format
def test_every_format_says_what_it_is(format, exported):
    need(format)
    path, _ = exported(format)
    told = load(path).metadata
    assert (told["dataset"], told["output"]) == (META["dataset"], "labels")
    assert told["lednet"] == lednet.__version__
    for key in ("classes", "colors", "mean", "std", "size"):
        assert json.loads(told[key]) == META[key], key
    assert json.loads(told["outputs"]) == 20
    for file in path.parent.iterdir():
        assert b"deploy/graph.py" not in file.read_bytes(), f"{file} holds a path of this machine"


@every_format
def test_fixed_size_is_told_to_who_brings_another(format, exported):
    need(format)
    run = load(exported(format)[0])
    assert run.bounds == ((1, 1), (71, 71), (105, 105))
    with pytest.raises(UserError, match="batch 1, height 71 and width 105, not 1 x 64 x 105"):
        run(street_like(1, 64, 105))
    with pytest.raises(UserError, match="8-bit RGB"):
        run(np.zeros((1, *SIZE, 3), dtype=np.float32))


@pytest.mark.parametrize(("format", "least"), [("onnx", 1), ("openvino", 8)])
def test_dynamic_files_take_any_size(format, least, net, tmp_path):
    need(format)
    need_dynamic()
    path = tmp_path / f"net{FORMATS[format].suffix}"
    module = BytesToLabels(net, META["mean"], META["std"])
    FORMATS[format].write(module, path, (1, *SIZE), dynamic=True)
    run = load(path)
    assert run.bounds == ((1, None), (least, None), (least, None))
    for shape in ((1, 65, 65), (3, 131, 66), (1, 128, 257), (2, 67, 101)):
        images = street_like(*shape)
        assert (run(images) == network_labels(net, images)).mean() >= 0.9999, shape
    for shape in ((1, 8, 9), (2, 33, 8), (1, 64, 15)):
        images = street_like(*shape)
        assert (run(images) == network_labels(net, images, 1)).all(), shape


def test_heavier_variant_as_logits_with_threads(tmp_path):
    need("onnx")
    net, path = lively("d128", outputs=7), tmp_path / "net.onnx"
    meta = {key: META[key] for key in ("mean", "std")}
    images = street_like(1, *SIZE)
    parity = export(net, meta, path, "onnx", SIZE, [images], output="logits")
    assert parity.agreement >= 0.9999 and parity.max_difference < 1e-5
    found = load(path, threads=1)(images)
    assert found.dtype == np.float32 and found.shape == (1, 7, 9, 14)
    with torch.no_grad():
        expected = net.decoder(net.encoder(normalized(images))).numpy()
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
    assert "classes" not in load(path).metadata  # weights that do not say


def test_onnx_holds_what_runtimes_expect(exported):
    need("onnx")
    onnx = pytest.importorskip("onnx")
    model = onnx.load(exported("onnx")[0], load_external_data=False)
    assert [i.name for i in model.graph.input] == ["image"]
    assert [o.name for o in model.graph.output] == ["labels"]
    assert [o.type.tensor_type.elem_type for o in model.graph.output] == [onnx.TensorProto.UINT8]
    assert not any(i.data_location for i in model.graph.initializer)  # weights inside
    kinds = [node.op_type for node in model.graph.node]
    assert "BatchNormalization" not in kinds and kinds.count("Resize") == 4
    for node in model.graph.node:
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type == "Resize":
            assert attributes["coordinate_transformation_mode"] == b"align_corners"


def test_torch_archive_needs_no_repository(exported, net, tmp_path):
    images = street_like(1, *SIZE)
    np.save(tmp_path / "images.npy", images)
    code = (
        "import sys, numpy, torch\n"
        f"net = torch.export.load({str(exported('torch')[0])!r}).module()\n"
        "numpy.save('labels.npy', net(torch.from_numpy(numpy.load('images.npy'))).numpy())\n"
        "assert not any(name.split('.')[0] == 'lednet' for name in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=300)
    found = np.load(tmp_path / "labels.npy")
    assert (found == network_labels(net, images)).mean() >= 0.9999


# A predictor on a file


@pytest.fixture(scope="module")
def with_logits(net, tmp_path_factory):
    """Call it with a format for a file of fixed size that answers with logits, written once."""

    @functools.cache
    def with_logits(format: str) -> Path:
        path = tmp_path_factory.mktemp(format) / f"net{FORMATS[format].suffix}"
        export(net, META, path, format, SIZE, [street_like(1, *SIZE)], output="logits")
        return path

    return with_logits


@every_format
def test_predictor_takes_a_file_for_weights(format, with_logits, net):
    need(format)
    images = torch.from_numpy(street_like(3, 100, 140)).permute(0, 3, 1, 2)
    expected = Predictor(net, SIZE, META["mean"], META["std"]).label_maps(images)[0]
    predictor = Predictor.from_weights(with_logits(format))
    assert predictor.size == SIZE and predictor.meta["classes"] == META["classes"]
    assert predictor.backend == load(with_logits(format)).runtime
    found = predictor.label_maps(images)[0]  # three images, one by one
    assert found.unique().numel() > 4 and (found == expected).float().mean() >= 0.9999
    assert (predictor(images[1]) == expected[1].numpy()).mean() >= 0.9999


def test_card_of_a_file_is_that_of_its_network(with_logits, net):
    cards = [
        benchmark(predictor, SIZE, warmup=0, runs=1)
        for predictor in (Predictor(net, SIZE), Predictor.from_weights(with_logits("torch")))
    ]
    for key in ("parameters", "gmacs", "precision", "batch_norm", "forward_size"):
        assert cards[0][key] == cards[1][key], key
    assert cards[1]["backend"] == "torch.export"


def test_predictor_refuses_what_a_file_has_settled(with_logits, exported):
    path = with_logits("torch")
    with pytest.raises(UserError, match="height 71 and width 105, not 1 x 64 x 105"):
        Predictor.from_weights(path, height=64)(street_like(1, *SIZE)[0])
    for options, words in (
        ({"backend": "eager"}, "run by torch.export: leave --backend out"),
        ({"precision": "bf16"}, "--precision fp32, not bf16"),
        ({"device": "cuda"}, "--device cpu, not cuda"),
    ):
        with pytest.raises(UserError, match=words):
            Predictor.from_weights(path, **options)
    with pytest.raises(UserError, match="20 outputs, CamVid needs 12"):
        Predictor.from_weights(path, camvid_scheme())
    with pytest.raises(UserError, match="--output logits"):
        Predictor.from_weights(exported("torch")[0])


def test_foreign_file_is_no_network_of_ours(net, tmp_path):
    FORMATS["torch"].write(BytesToLabels(net), tmp_path / "net.pt2", (1, *SIZE))
    with pytest.raises(UserError, match="does not say what network"):
        Predictor.from_weights(tmp_path / "net.pt2")


# int8


@pytest.fixture
def photos(tmp_path):
    (tmp_path / "photos").mkdir()
    for i in range(3):
        Image.fromarray(street_like(1, 70 + i, 100)[0]).save(tmp_path / f"photos/{i}.png")
    return tmp_path / "photos"


def test_int8_is_small_and_near(run_inside, photos, tmp_path):
    need("openvino")
    pytest.importorskip("nncf", reason="needs nncf: see requirements-deploy.txt")
    torch.manual_seed(0)
    net = LEDNet(20).train()
    with torch.no_grad():
        for _ in range(20):  # statistics as training leaves them; `lively` overflows 8 bits
            net(normalized(street_like(2, 72, 104)))
    save_checkpoint(tmp_path / "best.pth", net, META)
    weights = tmp_path / "best.pth"
    result = run_inside("utils/export_model.py", "--weights", weights, "--format", "openvino",
                        "--output", "logits", "--precision", "int8", "--calibrate", photos,
                        "--min-agreement", 0)  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "over 3 images" in result.stdout
    path = tmp_path / "best-int8.xml"
    parameters = sum(p.numel() for p in net.parameters())
    assert path.with_suffix(".bin").stat().st_size < 2 * parameters  # 4 bytes each otherwise
    predictor = Predictor.from_weights(path)
    assert predictor.precision == "int8"
    # Classes that were made equally strong change sides easily: the logits say how near it is.
    images = torch.from_numpy(street_like(1, *SIZE)).permute(0, 3, 1, 2)
    plain = Predictor(net.eval(), SIZE, META["mean"], META["std"])
    expected, found = (p.forward_logits(p.prepare(images)) for p in (plain, predictor))
    spread = (expected - expected.mean()).norm()
    error = ((found - expected).norm() / spread).item()
    print(f"int8 error {error:.3f} of the logits' spread")
    assert 1e-4 < error < 0.1


def test_int8_that_loses_too_much_is_not_written(run_inside, camvid, tmp_path):
    """The mIoU of a data set decides; what counts as too much is set to less than nothing."""
    need("openvino")
    pytest.importorskip("nncf", reason="needs nncf: see requirements-deploy.txt")
    save_checkpoint(tmp_path / "best.pth", lively(outputs=12), {"size": [48, 64]})
    arguments = ("--weights", tmp_path / "best.pth", "--format", "openvino", "--output", "logits",
                 "--precision", "int8", "--calibrate", camvid / "train", "--dataset", "camvid",
                 "--datadir", camvid, "--min-agreement", 0, "--max-difference", 9)  # fmt: skip
    result = run_inside("utils/export_model.py", *arguments, "--max-drop", -101)
    assert result.returncode == 1
    assert re.search(r"mIoU on the 3 val images of CamVid: \d+\.\d+ before", result.stdout)
    assert "the mIoU falls from" in result.stderr and "nothing was written" in result.stderr
    assert not list(tmp_path.glob("*int8*"))


# The gate


def test_parity_counts_pixels_and_relates_logits(net):
    images = [street_like(1, *SIZE), street_like(2, 67, 101)]

    def labels_with_seven_wrong(batch):
        labels = network_labels(net, batch)
        labels[0, 0, :7] = 255
        return labels

    parity = check_parity(labels_with_seven_wrong, net, META, images)
    assert parity.agreement == 1 - 14 / (71 * 105 + 2 * 67 * 101)
    assert parity.max_difference is None and parity.images == 3

    def logits_a_hundredth_off(batch):
        logits = reference_logits(net, batch, META)
        logits[0, 0, 0, 0] += 0.01 * logits.abs().max()
        return logits.numpy()

    parity = check_parity(logits_a_hundredth_off, net, META, images[:1])
    assert parity.max_difference == pytest.approx(0.01, rel=1e-3)
    assert parity.agreement > 0.9
    with pytest.raises(ValueError, match="no images"):
        check_parity(labels_with_seven_wrong, net, META, [])


@pytest.mark.parametrize(
    ("parity", "words"),
    [
        (Parity(0.9998, 0.0, 4), "agrees with the network in 0.999800"),
        (Parity(1.0, 2e-3, 4), r"differ by 2.0e-03 of the largest"),
        (Parity(1.0, float("nan"), 4), "differ by nan"),
    ],
)
def test_thresholds(parity, words):
    with pytest.raises(ParityError, match=words):
        require_parity(parity, 0.9999, 1e-3)
    require_parity(Parity(0.9999, 1e-3, 4), 0.9999, 1e-3)
    require_parity(Parity(1.0, None, 4), 0.9999, 1e-3)


def test_logits_that_are_no_numbers_do_not_pass(net):
    def broken(batch):
        return np.full_like(reference_logits(net, batch, META).numpy(), np.nan)

    parity = check_parity(broken, net, META, [street_like(1, *SIZE)])
    with pytest.raises(ParityError):
        require_parity(parity, 0.0, 1e-3)


# The script


@pytest.fixture
def weights(net, tmp_path):
    save_checkpoint(tmp_path / "run/best.pth", net, META)
    return tmp_path / "run"


def test_script_writes_beside_the_weights(run_inside, weights, net):
    need_dynamic()
    result = run_inside("utils/export_model.py", "--weights", weights, "--format", "torch",
                        "--output", "logits", "--dynamic")  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "over 12 images" in result.stdout and "pixels agree" in result.stdout
    run = load(weights / "best.pt2")
    assert run.metadata["output"] == "logits"
    for shape in ((1, 80, 90), (3, 131, 66)):
        images = street_like(*shape)
        with torch.no_grad():
            expected = net.decoder(net.encoder(normalized(images))).numpy()
        assert np.abs(run(images) - expected).max() <= 1e-5 * expected.max(), shape
    with pytest.raises(UserError, match="height 65 or more and width 65 or more"):
        run(street_like(1, 64, 80))


def test_full_network_by_the_script(run_script, tmp_path):
    """As a user would, from weights that say nothing, on own images."""
    need("onnx")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lednet.model, "ENCODER_STAGES", FULL_STAGES)
        torch.save(worn().state_dict(), tmp_path / "net.pth")
    for i in range(2):
        Image.fromarray(street_like(1, 50, 70)[0]).save(tmp_path / f"street_{i}.png")
    arguments = ("--weights", "net.pth", "--output", "logits", "--height", 64, "--width", 96)
    result = run_script("utils/export_model.py", *arguments, "--check-images", tmp_path)
    assert result.returncode == 0, result.stderr
    assert "over 2 images: 1.0000" in result.stdout
    assert load(tmp_path / "net.onnx")(street_like(1, 64, 96)).shape == (1, 20, 8, 12)


def test_tampered_network_leaves_no_file(run_inside, weights, tmp_path, monkeypatch):
    def fold_and_spoil(net):
        folded = fuse_conv_bn(net)
        folded.decoder.mid[0].weight.mul_(1.05)
        return folded

    monkeypatch.setattr(lednet.export.wrappers, "fold_batch_norm", fold_and_spoil)
    arguments = ("--weights", weights, "--format", "torch", "--output", "logits", "--out")
    result = run_inside("utils/export_model.py", *arguments, tmp_path / "out/new.pt2")
    assert result.returncode == 1 and "nothing was written" in result.stderr
    assert not list((tmp_path / "out").iterdir())


def test_failing_gate_keeps_what_was_there(net, tmp_path, monkeypatch):
    """Of both files of a format that has two; only the gate is real here."""

    def write(module, path, *options):
        path.write_text("newer")
        path.with_suffix(".bin").write_text("newer")

    def answer(images):
        return np.zeros((1, 20, 9, 14), dtype=np.float32)

    row = Format(".xml", (), write, lambda path, options: answer, beside=(".bin",))
    monkeypatch.setitem(FORMATS, "openvino", row)
    pair = [tmp_path / "net.xml", tmp_path / "net.bin"]
    for file in pair:
        file.write_text("older")
    arguments = net, META, pair[0], "openvino", SIZE, [street_like(1, *SIZE)]
    with pytest.raises(ParityError):
        export(*arguments)
    assert sorted(tmp_path.iterdir()) == sorted(pair)
    assert [file.read_text() for file in pair] == ["older", "older"]
    export(*arguments, min_agreement=0, max_difference=np.inf)
    assert sorted(tmp_path.iterdir()) == sorted(pair)
    assert [file.read_text() for file in pair] == ["newer", "newer"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--out", "net.pt2", "--format", "onnx"), "does not end in .onnx"),
        (("--height", "0"), "--height is 0"),
        (("--check-images", "{tmp}/run"), "no image"),
        (
            ("--check-images", "{tmp}/broken", "--format", "torch", "--output", "logits"),
            "is damaged",
        ),
        (("--format", "executorch", "--dynamic"), "fixed size|pip install executorch"),
        (("--weights", "{tmp}/bare.pth"), "give --height and --width"),
        (("--precision", "int8"), "--calibrate"),
        (("--calibrate", "{tmp}"), "leave them out"),
        (("--precision", "int8", "--format", "openvino", "--calibrate", "{tmp}/run"), "no image"),
        (
            ("--precision", "int8", "--calibrate", "{tmp}/photos", "--format", "onnx"),
            "int8 is not for onnx: give --format openvino",
        ),
    ],
)
def test_script_refuses(arguments, words, run_inside, weights, photos, net, tmp_path):
    need("onnx")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/street.png").write_bytes(b"no image")
    torch.save(net.state_dict(), tmp_path / "bare.pth")
    arguments = [a.format(tmp=tmp_path) for a in arguments]
    result = run_inside("utils/export_model.py", "--weights", weights, *arguments)
    assert result.returncode == 2
    assert re.search(words, result.stderr), result.stderr
    assert result.stderr.split("\r")[-1].startswith("error: ") and "Traceback" not in result.stderr


def test_missing_package_is_named(run_inside, weights, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    result = run_inside("utils/export_model.py", "--weights", weights, "--format", "onnx")
    assert result.returncode == 2
    assert "pip install onnxscript onnxruntime\n" in result.stderr
    with pytest.raises(UserError, match="pip install onnxruntime"):
        load("net.onnx")


def test_executorch_of_another_torch_is_named(net, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "executorch", types.ModuleType("executorch"))
    partitioner = "executorch.backends.xnnpack.partition.xnnpack_partitioner"
    monkeypatch.setitem(sys.modules, partitioner, None)
    monkeypatch.setattr(executorch.importlib.metadata, "version", lambda name: "0.1")
    with pytest.raises(UserError, match=r"executorch 0.1 .* beside torch .* executorch==1.5.1"):
        executorch.write_executorch(BytesToLabels(net), tmp_path / "net.pte", (1, *SIZE))


@pytest.mark.parametrize("suffix", [row.suffix for row in FORMATS.values()])
def test_file_that_cannot_be_opened(suffix, tmp_path):
    for format, row in FORMATS.items():
        if row.suffix == suffix:
            need(format)
    path = tmp_path / f"net{suffix}"
    with pytest.raises(UserError, match="no exported network at"):
        load(path)
    path.write_bytes(b"damaged")
    with pytest.raises(UserError, match="cannot be opened"):
        load(path)
    with pytest.raises(UserError, match=r"one of \.onnx, \.xml"):
        load(tmp_path / "net.tflite")
