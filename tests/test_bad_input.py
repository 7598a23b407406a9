"""Bad input ends in one sentence, exit status 2, and nothing half-written."""

import errno
import os
import pickle

import numpy as np
import pytest
import torch
from fuzzing import Trap
from PIL import Image

from lednet import LEDNet
from lednet.checkpoint import save_checkpoint


def assert_refused(result, *words: str) -> None:
    assert result.returncode == 2, result.stdout + result.stderr
    error = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(error) == 1, result.stderr
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in error[0]


@pytest.fixture
def train(run_inside, own_camvid, tmp_path):
    """Train on the small CamVid tree; nothing may be left in the run folder but a log."""

    def run(*flags: object, savedir=tmp_path / "run"):
        return run_inside(
            "train/main.py", "--dataset", "camvid", "--datadir", own_camvid, "--savedir", savedir,
            "--height", 48, "--width", 64, "--batch-size", 2, "--num-epochs", 1,
            "--num-workers", 1, "--device", "cpu", *flags,
        )  # fmt: skip

    return run


@pytest.fixture
def score(run_inside, own_camvid, tmp_path):
    def run(weights, *flags: object):
        return run_inside(
            "test/eval_iou.py", "--weights", weights, "--dataset", "camvid", "--datadir",
            own_camvid, "--device", "cpu", "--json", tmp_path / "out.json", *flags,
        )  # fmt: skip

    return run


def test_no_such_folder(train, tmp_path):
    assert_refused(train("--datadir", tmp_path / "nowhere"), "nowhere", "--datadir")
    assert not (tmp_path / "run").exists()


def test_the_shell_sees_the_same(run_script, tmp_path):
    """In a process of its own, which the other tests here spare."""
    result = run_script("train/main.py", "--datadir", tmp_path / "nowhere", "--device", "cpu")
    assert_refused(result, "nowhere", "--datadir")


def test_empty_split(train, own_camvid, tmp_path):
    for folder in ("val", "valannot"):
        for path in (own_camvid / folder).iterdir():
            path.unlink()
    assert_refused(train(), str(own_camvid / "val"), "holds no images")
    assert not (tmp_path / "run").exists()


def test_image_without_label(train, own_camvid, tmp_path):
    (own_camvid / "trainannot/train_001.png").unlink()
    assert_refused(train(), "1 of 5 images have no label (train_001)")
    assert not (tmp_path / "run").exists()


def test_label_without_image(train, own_camvid):
    (own_camvid / "val/val_002.png").unlink()
    assert_refused(train(), "1 of 3 labels have no image (val_002)")


def test_truncated_png_met_in_a_worker_process(train, own_camvid, tmp_path):
    path = own_camvid / "train/train_003.png"
    path.write_bytes(path.read_bytes()[:-60])
    assert_refused(train(), str(path), "is damaged", "copy it again")
    assert not list((tmp_path / "run").glob("*.pth"))


def test_label_of_another_size(train, own_camvid):
    Image.new("L", (60, 48)).save(own_camvid / "trainannot/train_000.png")
    assert_refused(train(), "train_000.png is 60x48")


def test_label_id_outside_the_table(train, own_camvid):
    label = np.full((48, 64), 200, np.uint8)
    Image.fromarray(label).save(own_camvid / "trainannot/train_002.png")
    assert_refused(train(), "train_002.png holds the id 200", "CamVid")


@pytest.mark.parametrize(
    ("net", "words"),
    [(LEDNet(12, "d128"), "LEDNet(num_classes=12, variant='d20'"), (LEDNet(20), "20")],
)
def test_weights_of_another_variant_or_class_count(train, tmp_path, net, words):
    save_checkpoint(tmp_path / "w.pth", net, {})
    assert_refused(train("--state", tmp_path / "w.pth"), "w.pth does not fit", words)


def test_scoring_with_another_class_count(score, tmp_path):
    save_checkpoint(tmp_path / "w.pth", LEDNet(20), {})
    assert_refused(score(tmp_path / "w.pth"), "20 outputs", "CamVid needs 12")
    assert not (tmp_path / "out.json").exists()


def test_scoring_with_the_classes_of_another_data_set(score, tmp_path):
    save_checkpoint(tmp_path / "w.pth", LEDNet(12), {"classes": ["x"] * 11, "dataset": "mine"})
    assert_refused(score(tmp_path / "w.pth"), "trained on mine")


def test_pickled_code_is_not_run(score, tmp_path):
    trap = tmp_path / "sprung"
    (tmp_path / "w.pth").write_bytes(pickle.dumps({"state_dict": Trap(trap, 0)}))
    assert_refused(score(tmp_path / "w.pth"), "w.pth", "never run")
    assert not trap.exists()


def test_missing_weights(score, tmp_path):
    assert_refused(score(tmp_path / "none.pth"), "none.pth", "check the path")


def test_run_folder_without_weights(score, tmp_path):
    assert_refused(score(tmp_path), "holds no best.pth")


def test_unwritable_save_folder(train, tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert_refused(train(savedir=tmp_path / "file/run"), "file/run", "--savedir")


def test_unwritable_result(score, tmp_path):
    save_checkpoint(tmp_path / "w.pth", LEDNet(12), {"size": [48, 64]})
    (tmp_path / "file").write_text("in the way")
    assert_refused(score(tmp_path / "w.pth", "--json", tmp_path / "file/o.json"), "cannot write")


def test_resume_without_a_checkpoint(train, tmp_path):
    assert_refused(train("--resume"), "nothing to resume", "run", "start without --resume")
    assert not (tmp_path / "run").exists()


def test_second_run_in_one_folder(train, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/log.jsonl").write_text("{}\n")
    assert_refused(train(), "already holds a run", "--resume")
    assert (tmp_path / "run/log.jsonl").read_text() == "{}\n"


CHECKPOINT = "checkpoint_000000007.pth"


def test_damaged_checkpoint_to_resume(train, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / CHECKPOINT).write_bytes(b"torn")
    (tmp_path / "run/options.json").write_text('{"options": {}}')
    assert_refused(train("--resume"), f"{CHECKPOINT} is damaged", "another --savedir")


def test_weights_alone_are_nothing_to_resume(train, tmp_path):
    save_checkpoint(tmp_path / "run" / CHECKPOINT, LEDNet(12), {})
    (tmp_path / "run/options.json").write_text('{"options": {}}')
    assert_refused(train("--resume"), f"{CHECKPOINT} holds weights only", "--state")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_no_gpu(train):
    assert_refused(train("--device", "cuda"), "--device cpu")


def test_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    """A disk that fills up while a checkpoint is written."""
    from lednet import UserError

    save_checkpoint(tmp_path / "w.pth", LEDNet(3), {})
    before = (tmp_path / "w.pth").read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"cannot write .*w\.pth: No space left"):
        save_checkpoint(tmp_path / "w.pth", LEDNet(3), {})
    assert (tmp_path / "w.pth").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--num-epochs", 0), "--num-epochs: '0' is not a whole number"),
        (("--val-stride", 1), "--val-stride 1"),
        (("--precision", "fp16"), "fp16 needs a GPU"),
        (("--class-weights", "released"), "for Cityscapes"),
        (("--pyramid-channels", 20), "d128"),
        (("--clip-norm", 0), "--clip-norm is 0"),
        (("--ema-decay", 1), "--ema-decay is 1"),
        (("--accumulate", 0), "--accumulate: '0' is not a whole number"),
        (("--warmup-epochs", 3, "--num-epochs", 3), "leaves nothing of a stage's 3 epochs"),
        (("--sync-batch-norm",), "needs CUDA GPUs"),
    ],
)
def test_options_that_make_no_sense(train, flags, words):
    assert_refused(train(*flags), words)
