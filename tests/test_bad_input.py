"""Bad input ends in one sentence, exit status 2, and nothing half-written."""

import errno
import json
import os
import pickle
from functools import partial

import numpy as np
import pytest
import torch
from fakes import Result, truncate
from fuzzing import Trap
from PIL import Image

from lednet import LEDNet, UserError
from lednet.checkpoint import load_checkpoint, save_checkpoint


@pytest.fixture
def train(train, own_camvid):
    """Train on a tree that the test may damage, read in a worker process."""
    return partial(train, "--datadir", own_camvid, "--num-workers", 1)


@pytest.fixture
def score(run_inside, own_camvid, tmp_path):
    def run(weights, *flags: object) -> Result:
        return run_inside(
            "test/eval_iou.py", "--weights", weights, "--dataset", "camvid", "--datadir",
            own_camvid, "--device", "cpu", "--json", tmp_path / "out.json", *flags,
        )  # fmt: skip

    return run


DAMAGED_DATA = [
    (lambda d: (d / "trainannot/train_001.png").unlink(), ["1 of 5 images have no label (train"]),
    # In a worker process:
    (lambda d: truncate(d / "train/train_003.png"), ["train_003.png is damaged", "copy it again"]),
    (lambda d: Image.fromarray(np.full((48, 64), 200, np.uint8)).save(
        d / "trainannot/train_002.png"), ["train_002.png holds the id 200", "CamVid"]),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "words"), DAMAGED_DATA)
def test_train_damaged_data_is_refused(train, own_camvid, tmp_path, damage, words):
    damage(own_camvid)
    train().assert_error(*words)
    assert not list(tmp_path.glob("run/*.pth"))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--datadir", "nowhere"), "nowhere"),
        (("--savedir", "/dev/null/run"), "--savedir"),
        (("--savedir", "x" * 300), "File name too long; choose another --savedir"),
        (("--resume",), "start without --resume"),
        (("--state", "d128.pth"), "d128.pth does not fit LEDNet(num_classes=12, variant='d20'"),
        (("--state", "20.pth"), "20 outputs, and these classes need 12: add --reset-head"),
        (("--state", "20.pth"), "--pretrainedEncoder"),
        (("--state", "d128.pth", "--reset-head"), "d128.pth does not fit"),
        (("--reset-head",), "--reset-head goes with --state"),
        (("--num-epochs", 0), "--num-epochs: '0' is not a whole number"),
        (("--val-stride", 1), "--val-stride 1"),
        (("--precision", "fp16"), "fp16 needs a GPU"),
        (("--class-weights", "released"), "for Cityscapes"),
        (("--pyramid-channels", 20), "d128"),
        (("--clip-norm", 0), "--clip-norm is 0"),
        (("--ema-decay", 1), "--ema-decay is 1"),
        (("--accumulate", 0), "--accumulate: '0' is not a whole number"),
        (("--seed", -1), "--seed: '-1' is not a whole number from 0 to 4294967295"),
        (("--seed", 2**64), "is not a whole number from 0"),
        (("--warmup-epochs", 3, "--num-epochs", 3), "leaves nothing of a stage's 3 epochs"),
        (("--sync-batch-norm",), "needs CUDA GPUs"),
        pytest.param(
            ("--device", "cuda"), "--device cpu",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU"),
        ),
    ],
)  # fmt: skip
def test_train_invalid_flag_is_refused(train, tmp_path, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    if flags[0] == "--state":
        save_checkpoint(tmp_path / "d128.pth", LEDNet(12, "d128"), {})
        save_checkpoint(tmp_path / "20.pth", LEDNet(20), {})
    train(*flags).assert_error(words)
    assert not list(tmp_path.glob("run/*.pth"))
    assert flags[0] not in ("--datadir", "--resume") or not (tmp_path / "run").exists()


VOID, SKY, CAR = 11, 0, 8


@pytest.mark.parametrize(
    ("train_value", "val_value", "words"),
    [
        (VOID, SKY, "the training labels of CamVid (5 files) hold void only"),
        (SKY, VOID, "the validation labels of CamVid (3 files) hold void only"),
        (SKY, CAR, "training labels hold sky and validation labels hold car, and no class in"),
    ],
)
def test_train_without_a_common_class_is_refused(
    train, own_camvid, tmp_path, train_value, val_value, words
):
    for split, value in (("train", train_value), ("val", val_value)):
        for path in (own_camvid / f"{split}annot").iterdir():
            Image.new("L", (64, 48), value).save(path)
    for flags in ((), ("--class-weights", "none")):
        train(*flags).assert_error(words)
    assert not list(tmp_path.glob("run/*.pth"))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--variant", "d128"), "started with --variant d20: resume it so, not with --variant d12"),
        (("--val-stride", 2), "started without --val-stride: resume it so"),
        (("--dataset", "folders"), "started with --dataset camvid"),
        (("--with-val",), "started without --with-val"),
        (("--state", "w.pth"), "started without --state"),
    ],
)
def test_train_resume_with_other_fixed_options_is_refused(train, tmp_path, flags, words):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/log.jsonl").write_text("")
    options = {"dataset": "camvid", "variant": "d20", "val_stride": 0, "with_val": False}
    content = {"options": options | {"state": None}}
    (tmp_path / "run/options.json").write_text(json.dumps(content))
    train("--resume", *flags).assert_error(words)


def test_train_second_run_in_a_folder_is_refused(train, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/log.jsonl").write_text("{}\n")
    train().assert_error("already holds a run", "--resume")
    assert (tmp_path / "run/log.jsonl").read_text() == "{}\n"


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, ["holds weights only", "--state"]), (b"torn", ["is damaged", "another --savedir"])],
)
def test_train_invalid_checkpoint_is_not_resumed(train, tmp_path, content, words):
    path = tmp_path / "run/checkpoint_000000007.pth"
    save_checkpoint(path, LEDNet(12), {})
    if content:
        path.write_bytes(content)
    (tmp_path / "run/options.json").write_text('{"options": {}}')
    train("--resume").assert_error(path.name, *words)


def test_train_reset_head_keeps_all_other_layers(train, tmp_path):
    net = LEDNet(5)
    save_checkpoint(tmp_path / "w.pth", net, {})
    result = train("--state", tmp_path / "w.pth", "--reset-head", "--lr", 0, "--decoder").check()
    assert "are new (decoder.mid, decoder.pooled, encoder_head)" in result.stdout
    found = load_checkpoint(tmp_path / "run/best.pth")["state_dict"]
    kept = {key for key, value in net.named_parameters() if torch.equal(value, found[key])}
    heads = ("decoder.mid", "decoder.pooled", "encoder_head")
    assert kept == {key for key, _ in net.named_parameters() if not key.startswith(heads)}


def test_eval_other_classes_are_refused(score, tmp_path):
    save_checkpoint(tmp_path / "w.pth", LEDNet(20), {})
    score(tmp_path / "w.pth").assert_error("20 outputs", "CamVid needs 12")
    save_checkpoint(tmp_path / "w.pth", LEDNet(12), {"classes": ["x"] * 11, "dataset": "mine"})
    score(tmp_path / "w.pth").assert_error("trained on mine")
    assert not (tmp_path / "out.json").exists()


def test_eval_weights_with_code_or_none_are_refused(score, tmp_path):
    trap = tmp_path / "trap"
    (tmp_path / "w.pth").write_bytes(pickle.dumps({"state_dict": Trap(trap, 0)}))
    score(tmp_path / "w.pth").assert_error("w.pth", "never run")
    assert not trap.exists()
    score(tmp_path / "none.pth").assert_error("none.pth", "check the path")
    score(tmp_path).assert_error("holds no best.pth")


def test_eval_unwritable_result_is_an_error(score, tmp_path):
    save_checkpoint(tmp_path / "w.pth", LEDNet(12), {"size": [48, 64]})
    score(tmp_path / "w.pth", "--json", "/dev/null/o.json").assert_error("cannot write")


@pytest.mark.parametrize("failing", ["os.fsync", "pathlib.Path.write_bytes"])
def test_save_checkpoint_full_disk_keeps_the_old_file(tmp_path, monkeypatch, failing):
    save_checkpoint(tmp_path / "w.pth", LEDNet(3), {})
    before = (tmp_path / "w.pth").read_bytes()

    def fail(target, content=None):
        if content is not None:
            with open(target, "wb") as file:
                file.write(content[:100])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(failing, fail)
    with pytest.raises(UserError, match=r"cannot write .*w\.pth: No space left"):
        save_checkpoint(tmp_path / "w.pth", LEDNet(3), {})
    assert (tmp_path / "w.pth").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1
