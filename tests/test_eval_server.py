"""test/eval_cityscapes_server.py on toy streets."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from make_golden import formula_state
from PIL import Image
from test_bad_input import assert_refused

from lednet import LEDNet
from lednet.checkpoint import load_state, save_checkpoint
from lednet.errors import UserError
from lednet.evaluation.cityscapes_evaluator import find_frames, find_predictions, score_predictions
from lednet.inference.progress_log import ProgressLog

SCRIPT = "test/eval_cityscapes_server.py"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
OFFICIAL_KEYS = {
    "confMatrix", "priors", "labels", "classScores", "classInstScores", "categoryScores",
    "categoryInstScores", "averageScoreClasses", "averageScoreInstClasses",
    "averageScoreCategories", "averageScoreInstCategories",
}  # fmt: skip


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A run folder with deterministic weights for 48x96."""
    folder = tmp_path_factory.mktemp("weights") / "run"
    net = LEDNet(20)
    load_state(net, formula_state(net), "formula")
    save_checkpoint(folder / "best.pth", net, {"size": [48, 96], "dataset": "Cityscapes"})
    return folder


@pytest.fixture
def evaluate(run_script, run_inside, toy_cityscapes, weights):
    """Run the script on the toy val split, by default without measuring the speed.

    With a `launcher` it runs in processes of its own; () starts a single one.
    """

    def run(*flags: object, root: Path = toy_cityscapes, speed: bool = False, launcher=None):
        source = () if "--predictions" in flags else ("--weights", weights)
        timing = ("--warmup", 0, "--runs", 2) if speed else ("--no-speed",)
        command = (
            SCRIPT, *source, "--datadir", root, "--device", "cpu", "--num-workers", 1, *timing,
            *flags,
        )  # fmt: skip
        if launcher is None:
            return run_inside(*command)
        return run_script(*command, launcher=launcher)

    return run


def read(path: Path) -> dict:
    """Figures of a results file or of an output folder, without the options."""
    figures = json.loads((path / "results.json" if path.is_dir() else path).read_text())
    figures.pop("options")
    return figures


@pytest.fixture(scope="module")
def reference(tmp_path_factory, toy_cityscapes, weights) -> Path:
    """The output folder of a complete evaluation; read-only."""
    out = tmp_path_factory.mktemp("reference") / "out"
    subprocess.run(
        [sys.executable, ROOT / SCRIPT, "--weights", weights, "--datadir", toy_cityscapes,
         "--out", out, "--device", "cpu", "--no-speed", "--num-workers", "1"],
        check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return out


def test_script_scores_measures_and_writes(evaluate, weights, tmp_path):
    out, figures_file = tmp_path / "out", tmp_path / "figures.json"
    result = evaluate("--out", out, "--json", figures_file, "--report", speed=True, launcher=())
    assert result.returncode == 0, result.stderr
    figures = json.loads(figures_file.read_text())
    assert figures == json.loads((out / "results.json").read_text())
    assert figures.keys() >= OFFICIAL_KEYS and figures["images"] == 3
    assert sum(map(sum, figures["confMatrix"])) == 3 * 64 * 128
    assert sum(map(sum, figures["atNetworkSize"]["confMatrix"])) == 3 * 48 * 96
    assert figures["speed"]["parameters"] == 925_663
    for words in ("network alone", "image to labels", "p95", "925,663", "folded", "48x96"):
        assert words in result.stdout
    assert f"{figures['averageScoreClasses']:.4f}" in result.stdout
    assert f"{figures['averageScoreInstCategories']:.4f}" in result.stdout
    assert f"{figures['atNetworkSize']['averageScoreClasses']:.4f}" in result.stdout
    assert "3/3" in result.stderr  # the progress bar

    names = sorted(path.name for path in (out / "predictions").iterdir())
    assert len(names) == 3 and all(name.endswith("_pred_labelIds.png") for name in names)
    image = Image.open(out / "predictions" / names[0])
    assert image.mode == "L" and image.size == (128, 64)
    page = (out / "report.html").read_text()
    assert all(name.removesuffix("_pred_labelIds.png") in page for name in names)


def test_default_output_folder_is_next_to_the_run(evaluate, weights):
    assert evaluate("--max-images", 1).returncode == 0
    assert (weights.parent / "run-eval-val" / "results.json").is_file()
    shutil.rmtree(weights.parent / "run-eval-val")


def test_scores_equal_those_of_eval_iou(reference, run_script, toy_cityscapes, weights, tmp_path):
    figures = read(reference)
    for at, ours in (("full", figures), ("network", figures["atNetworkSize"])):
        out = tmp_path / f"{at}.json"
        result = run_script(
            "test/eval_iou.py", "--weights", weights, "--datadir", toy_cityscapes, "--at", at,
            "--json", out, "--device", "cpu",
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        assert ours["averageScoreClasses"] == pytest.approx(
            json.loads(out.read_text())["miou"], abs=1e-4
        )


def test_predictions_on_disk_give_the_same_results(evaluate, reference, toy_cityscapes, tmp_path):
    flags = ("--predictions", reference / "predictions", "--json", tmp_path / "f.json")
    result = evaluate(*flags, "--report", tmp_path / "r.html")
    assert result.returncode == 0, result.stderr
    figures, expected = read(tmp_path / "f.json"), read(reference)
    for key in (*OFFICIAL_KEYS, "pixelAccuracy"):
        assert figures[key] == expected[key]
    assert (tmp_path / "r.html").stat().st_size > 10_000
    # Without a report, no images are needed.
    shutil.copytree(toy_cityscapes / "gtFine", tmp_path / "data" / "gtFine")
    assert evaluate(*flags, root=tmp_path / "data").returncode == 0
    assert read(tmp_path / "f.json")["images"] == 3


def test_two_processes_give_the_same_results(evaluate, reference, tmp_path):
    result = evaluate("--out", tmp_path / "two", launcher=TORCHRUN)
    assert result.returncode == 0, result.stderr
    assert read(tmp_path / "two") == read(reference)
    flags = ("--predictions", tmp_path / "two" / "predictions", "--json", tmp_path / "f.json")
    assert evaluate(*flags, launcher=TORCHRUN).returncode == 0
    assert read(tmp_path / "f.json")["confMatrix"] == read(reference)["confMatrix"]


def test_interrupted_run_resumes(evaluate, reference, tmp_path):
    out = tmp_path / "out"
    assert evaluate("--out", out, "--max-images", 2).returncode == 0
    log = out / "progress-0.jsonl"
    settings, first, second = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(settings + first + second[:40])  # the last line is incomplete
    kept = sorted((out / "predictions").iterdir())[0]
    before = kept.stat().st_mtime_ns
    result = evaluate("--out", out)
    assert result.returncode == 0, result.stderr
    assert "1 of 3 images are done already" in result.stdout
    assert kept.stat().st_mtime_ns == before
    assert read(out) == read(reference)
    assert len(log.read_text().splitlines()) == 4
    kept.unlink()
    assert "2 of 3 images are done" in evaluate("--out", out).stdout
    assert kept.is_file() and read(out) == read(reference)


def test_run_with_other_settings_is_refused_unless_overwritten(evaluate, reference, tmp_path):
    out = Path(shutil.copytree(reference, tmp_path / "out"))
    assert_refused(evaluate("--out", out, "--flip"), "flip False, not True")
    result = evaluate("--out", out, "--flip", "--overwrite")
    assert result.returncode == 0, result.stderr
    assert read(out) != read(reference)


def test_test_time_augmentation_scores_equal_those_of_eval_iou(
    evaluate, reference, run_inside, toy_cityscapes, weights, tmp_path
):
    flags = ("--scales", 0.75, 1, "--flip")
    assert evaluate("--out", tmp_path / "out", *flags).returncode == 0
    result = run_inside(
        "test/eval_iou.py", "--weights", weights, "--datadir", toy_cityscapes, *flags,
        "--json", tmp_path / "iou.json", "--device", "cpu", "--num-workers", 0,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "iou.json").read_text())
    assert found["scales"] == [0.75, 1] and found["flip"] is True
    expected = read(tmp_path / "out")["averageScoreClasses"]
    assert found["miou"] == pytest.approx(expected, abs=1e-4)
    assert expected != pytest.approx(read(reference)["averageScoreClasses"], 1e-4)


@pytest.mark.parametrize("flags", [("--batch-size", 3), ("--no-fold",)])
def test_options_that_do_not_change_the_scores(evaluate, reference, tmp_path, flags):
    assert evaluate("--out", tmp_path / "out", *flags).returncode == 0
    expected = read(reference)["averageScoreClasses"]
    assert read(tmp_path / "out")["averageScoreClasses"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    "flags",
    [("--tile", 32, 48, "--overlap", 16), ("--height", 64, "--width", 128),
     ("--precision", "bf16")],
)  # fmt: skip
def test_options_run(evaluate, tmp_path, flags):
    result = evaluate("--out", tmp_path / "out", "--max-images", 1, *flags)
    assert result.returncode == 0, result.stderr
    assert read(tmp_path / "out")["images"] == 1


def test_test_split_without_labels_gives_a_submission(evaluate, toy_cityscapes, tmp_path):
    shutil.copytree(toy_cityscapes / "leftImg8bit", tmp_path / "data" / "leftImg8bit")
    result = evaluate("--subset", "test", "--out", tmp_path / "out", root=tmp_path / "data")
    assert result.returncode == 0, result.stderr
    assert "1525" in result.stderr.replace(",", "")  # says how many the benchmark has
    with zipfile.ZipFile(tmp_path / "out" / "upload.zip") as archive:
        names = archive.namelist()
        with archive.open(names[0]) as file:
            ids = np.array(Image.open(file))
    images = (tmp_path / "data/leftImg8bit/test").rglob("*.png")
    assert sorted(names) == sorted(
        path.name.replace("leftImg8bit", "pred_labelIds") for path in images
    )
    assert ids.shape == (64, 128) and ids.max() <= 33


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def copy_as(name: str):
    return lambda path: shutil.copy(path, path.with_name(name.format(path.stem)))


PREDICTION_FAULTS = {
    "size": (
        lambda path: Image.new("L", (64, 32)).save(path),
        "{path.name}: .*is 128x64, the prediction for it 64x32",
    ),
    "id 34": (
        lambda path: Image.new("L", (128, 64), 34).save(path),
        "{path} holds the id 34, which Cityscapes does not have",
    ),
    "id 255": (
        lambda path: Image.new("L", (128, 64), 255).save(path),
        "{path} holds the id 255, which Cityscapes does not have",
    ),
    "mode": (lambda path: Image.new("RGB", (128, 64)).save(path), "{path} has mode RGB"),
    "truncated": (truncate, "{path} is damaged"),
    "missing": (Path.unlink, "1 of 3 frames have no prediction"),
    "without ground truth": (
        copy_as("nowhere_000001_000019_pred.png"),
        r"1 of 4 predictions have no ground truth \(nowhere_000001_000019\)",
    ),
    "name": (lambda path: path.rename(path.with_name("first.png")), "first.png is not named"),
    "duplicate": (copy_as("{}_again.png"), "are of one frame: keep one"),
}


@pytest.mark.parametrize("fault", PREDICTION_FAULTS)
def test_faulty_prediction_is_refused(reference, toy_cityscapes, tmp_path, fault):
    folder = Path(shutil.copytree(reference / "predictions", tmp_path / "pred"))
    path = sorted(folder.iterdir())[1]
    damage, message = PREDICTION_FAULTS[fault]
    damage(path)
    frames, scheme = find_frames(toy_cityscapes, "val", images=False)
    with pytest.raises(UserError, match=message.format(path=path)) as error:
        files = find_predictions(folder, frames)
        list(score_predictions(frames, scheme, [files[frame.name] for frame in frames]))
    assert "\n" not in str(error.value)


def test_script_refuses_a_faulty_prediction_and_writes_nothing(evaluate, reference, tmp_path):
    folder = Path(shutil.copytree(reference / "predictions", tmp_path / "pred"))
    path = sorted(folder.iterdir())[1]
    Image.new("L", (64, 32)).save(path)
    result = evaluate("--predictions", folder, "--json", tmp_path / "f.json", launcher=())
    assert_refused(result, path.name, "is 128x64, the prediction for it 64x32")
    assert not (tmp_path / "f.json").exists()


def test_incomplete_ground_truth_is_refused(evaluate, toy_cityscapes, tmp_path):
    root, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(toy_cityscapes, root)
    first, second = sorted((root / "gtFine/val").rglob("*_labelIds.png"))[:2]
    first.unlink()
    assert_refused(evaluate("--out", out, root=root), "1 of 3 images have no label")
    shutil.copy(second, first)
    first.with_name(first.name.replace("labelIds", "instanceIds")).unlink()
    with pytest.raises(UserError, match=r"1 of 3 labels have no \*_instanceIds.png"):
        find_frames(root, "val")
    shutil.copytree(toy_cityscapes, root, dirs_exist_ok=True)
    Image.new("L", (100, 50)).save(first)
    assert not out.exists()
    assert_refused(evaluate("--out", out, root=root), first.name, "100x50", "128x64")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--subset", "test", "--report"), ["withheld"]),
        (("--precision", "fp16"), ["fp16 needs a GPU"]),
        (("--tile", 16, 16, "--overlap", 16), ["overlap of 16"]),
        (("--weights", "w.pth"), ["w.pth has 12 outputs", "Cityscapes needs 20"]),
    ],
)
def test_invalid_options_are_refused(evaluate, tmp_path, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    save_checkpoint("w.pth", LEDNet(12), {"size": [48, 96]})
    assert_refused(evaluate("--out", tmp_path / "out", *flags), *words)
    assert not (tmp_path / "out").exists()


def test_progress_log_refuses_other_settings_and_drops_a_partial_header(tmp_path):
    log = ProgressLog(tmp_path, {"size": (1, 2)})
    log.add({"name": "a"})
    log.add({"name": "b"})
    assert set(ProgressLog(tmp_path, {"size": (1, 2)}, rank=1).entries) == {"a", "b"}
    with pytest.raises(UserError, match=r"size \[1, 2\], not \[3, 4\]"):
        ProgressLog(tmp_path, {"size": (3, 4)})
    (tmp_path / "progress-0.jsonl").write_bytes(b'{"size": [1')
    log = ProgressLog(tmp_path, {"size": (1, 2)})
    assert log.entries == {}
    log.add({"name": "c"})
    assert set(ProgressLog(tmp_path, {"size": (1, 2)}).entries) == {"c"}


def test_forward_time_needs_no_data(run_script, tmp_path):
    result = run_script(
        "test/eval_forward_time.py", "--variant", "d128", "--height", 32, "--width", 64,
        "--image-height", 64, "--image-width", 128, "--batch-size", 2, "--runs", 2, "--warmup", 1,
        "--device", "cpu", "--json", tmp_path / "card.json",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    card = json.loads((tmp_path / "card.json").read_text())
    assert card["parameters"] == 2_288_140 and card["batch"] == 2
    assert card["network_size"] == [32, 64] and card["image_size"] == [64, 128]
    assert "2,288,140" in result.stdout and "p95" in result.stdout
