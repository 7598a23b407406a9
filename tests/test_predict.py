"""utils/predict.py and what it stands on: the overlapped stages, videos, inputs by name."""

import itertools
import json
import os
import shutil
import signal
import sys
import threading
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from conftest import ROOT
from make_toy_cityscapes import toy_scene
from PIL import Image
from test_bad_input import assert_refused

from lednet import LEDNet, UserError
from lednet.checkpoint import save_checkpoint
from lednet.data.labels import cityscapes_label_ids, cityscapes_scheme
from lednet.inference import video
from lednet.inference.inputs import find_inputs
from lednet.inference.pipeline import run_pipeline
from lednet.inference.predictor import Predictor
from lednet.inference.video import FrameClock, VideoError, VideoReader, write_video
from lednet.inference.writers import VideoWriter
from lednet.model import load_model
from lednet.visualization import Visualizer, output_scheme

PATIENCE = 60
"""Seconds after which a stage is no longer waited for."""
NTSC = Fraction(30000, 1001)


# The stages


def wait(event: threading.Event) -> None:
    assert event.wait(PATIENCE), "the stages do not overlap"


def test_reading_and_writing_go_on_while_the_network_runs():
    read_of, predicting = [[threading.Event() for _ in range(4)] for _ in range(2)]
    order = []

    def read(i: int) -> int:
        read_of[i].set()
        return i

    def predict(i: int) -> int:
        predicting[i].set()
        wait(read_of[min(i + 1, 3)])  # the next one is read while this one is predicted
        order.append(i)
        return i * 10

    def write(tens: int) -> int:
        wait(predicting[min(tens // 10 + 1, 3)])  # the next one is predicted meanwhile
        return tens + 1

    results = run_pipeline(range(4), read, predict, write, readers=1, writers=1)
    assert results == [1, 11, 21, 31] and order == [0, 1, 2, 3]


def test_order_is_kept_when_later_items_are_ready_sooner():
    second = {stage: threading.Event() for stage in ("read", "written")}

    def stage(name: str, i: int) -> int:
        if i == 0:
            wait(second[name])
        if i == 1:
            second[name].set()
        return i

    results = run_pipeline(
        range(6), lambda i: stage("read", i), lambda i: i, lambda i: stage("written", i)
    )
    assert results == list(range(6))


def test_an_endless_source_is_read_no_further_than_needed():
    numbers, begun, predicted = iter(range(50)), [], []

    def read(_: None) -> int | None:
        begun.append(next(numbers, None))
        return begun[-1]

    def predict(number: int) -> int:
        predicted.append(number)
        assert len(begun) <= len(predicted) + 1
        return number

    steps = itertools.count()
    results = run_pipeline(
        itertools.repeat(None), read, predict, lambda n: n, lambda: next(steps), readers=1
    )
    assert results == predicted == list(range(50)) and next(steps) == 50


@pytest.mark.parametrize("failing", ["read", "predict", "write"])
def test_an_error_surfaces_once_and_what_is_predicted_is_written(failing):
    predicted, written, threads = [], [], threading.active_count()

    def stage(name: str, seen: list, i: int) -> int:
        if name == failing and i == 3:
            raise UserError(f"{name} failed")
        seen.append(i)
        return i

    with pytest.raises(UserError, match=f"{failing} failed"):
        run_pipeline(
            itertools.count(),
            lambda i: stage("read", [], i),
            lambda i: stage("predict", predicted, i),
            lambda i: stage("write", written, i),
        )
    assert sorted(written) == [i for i in predicted if failing != "write" or i != 3]
    assert written[:3] and threading.active_count() == threads


def test_an_interrupt_ends_all_stages():
    written = []

    def predict(i: int) -> int:
        if i == 2:
            raise KeyboardInterrupt
        return i

    with pytest.raises(KeyboardInterrupt):
        run_pipeline(itertools.count(), lambda i: i, predict, written.append)
    assert sorted(written) == [0, 1]


# Time stamps


def ticks(clock: FrameClock, stamps) -> list[Fraction]:
    return [clock.ticks(stamp) * clock.unit for stamp in stamps]


def test_a_rate_is_exact_whatever_the_container_rounds():
    milliseconds = [round(1000 * i / NTSC) + 7 for i in range(200)]
    assert ticks(FrameClock(NTSC, Fraction(1, 1000)), milliseconds) == [
        i / NTSC for i in range(200)
    ]


def test_stamps_off_the_beat_and_gaps_stay():
    stamps = [0, 40, 95, 120, 2000, 2013]
    times = ticks(FrameClock(Fraction(25), Fraction(1, 1000)), stamps)
    assert times == [Fraction(stamp, 1000) for stamp in stamps]


def test_frames_without_stamps_and_out_of_order_still_advance():
    clock = FrameClock(Fraction(25), Fraction(1, 25))
    times = ticks(clock, [None, None, 5, 4, 6])
    assert times[:2] == [0, Fraction(1, 25)]
    assert all(a < b for a, b in itertools.pairwise(times))


# Videos


def picture(i: int, height: int = 48, width: int = 64) -> np.ndarray:
    """A bright square that walks over blue."""
    image = np.full((height, width, 3), (20, 40, 160), np.uint8)
    image[8:24, i % (width - 16) : i % (width - 16) + 16] = (250, 200, 30)
    return image


def make_video(
    path: Path, count: int, rate=NTSC, stamps=None, size=(48, 64), turn=None, codec="libx264"
) -> Path:
    """Written with PyAV alone; stamps in milliseconds, turn a display matrix."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width = size
        stream.pix_fmt = "yuv420p"
        stream.gop_size = 5
        if stamps:
            stream.codec_context.time_base = Fraction(1, 1000)
        if turn:
            stream.set_display_matrix(turn)
        for i in range(count):
            frame = av.VideoFrame.from_ndarray(picture(i, *size), format="rgb24")
            if stamps:
                frame.pts, frame.time_base = stamps[i], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def frames_of(path: Path) -> tuple[list[np.ndarray], list[Fraction], Fraction]:
    """Pictures, times and frame rate, read with PyAV alone."""
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
        rate = container.streams.video[0].average_rate
    times = [frame.pts * frame.time_base for frame in frames]
    return [frame.to_ndarray(format="rgb24") for frame in frames], times, rate


def copy_video(source: Path, target: Path) -> VideoReader:
    with VideoReader(source) as reader, write_video(target, reader.rate, reader.unit) as writer:
        for frame in reader:
            writer.append(frame.image, frame.ticks)
    return reader


@pytest.mark.parametrize("rate", [Fraction(25), NTSC, Fraction(24000, 1001), Fraction(15, 2)])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_count_rate_times_and_pictures_are_kept(tmp_path, rate, suffix):
    source = make_video(tmp_path / f"in{suffix}", 30, rate)
    reader = copy_video(source, tmp_path / "out.mp4")
    assert reader.expected == 30 and reader.problem is None
    before, _, _ = frames_of(source)
    after, times, found_rate = frames_of(tmp_path / "out.mp4")
    assert found_rate == reader.rate == rate
    assert times == [i / rate for i in range(30)]
    for a, b in zip(before, after, strict=True):
        assert a.shape == b.shape and np.abs(a.astype(int) - b).mean() < 4


def test_a_variable_frame_rate_is_kept(tmp_path):
    stamps = [0, 40, 80, 300, 340, 1000, 1007, 1100]
    source = make_video(tmp_path / "in.mkv", len(stamps), Fraction(25), stamps)
    copy_video(source, tmp_path / "out.mp4")
    _, times, _ = frames_of(tmp_path / "out.mp4")
    assert times == [Fraction(stamp, 1000) for stamp in stamps]


def test_class_colours_survive_encoding(tmp_path):
    colors = np.array(cityscapes_scheme().colors, np.uint8)
    stripes = colors.repeat(16, axis=0)[None].repeat(32, axis=0)
    with write_video(tmp_path / "v.mp4", Fraction(25), Fraction(1, 25)) as writer:
        writer.append(stripes, 0)
    (read,), _, _ = frames_of(tmp_path / "v.mp4")
    middles = read[16, 8::16].astype(int)
    assert np.abs(middles - colors).max() <= 8


def test_odd_sides_are_padded(tmp_path):
    with write_video(tmp_path / "odd.mp4", Fraction(25), Fraction(1, 25)) as writer:
        writer.append(picture(0, 47, 63), 0)
        assert writer.padded
    (read,), _, _ = frames_of(tmp_path / "odd.mp4")
    assert read.shape == (48, 64, 3)
    assert np.abs(read[:47, :63].astype(int) - picture(0, 47, 63)).mean() < 4


def test_a_turned_video_is_read_upright(tmp_path):
    one = 1 << 16
    clockwise = [0, one, 0, -one, 0, 0, 0, 0, 1 << 30]  # x goes down, y to the left
    source = make_video(tmp_path / "phone.mp4", 3, turn=clockwise)
    with VideoReader(source) as reader:
        image = next(iter(reader)).image
    assert image.shape == (64, 48, 3)
    expected = picture(0)[::-1].swapaxes(0, 1)
    assert np.abs(image.astype(int) - expected).mean() < 4


def test_a_video_that_fails_leaves_nothing(tmp_path):
    (tmp_path / "v.mp4").write_text("from before")
    with (
        pytest.raises(RuntimeError, match="in between"),
        write_video(tmp_path / "v.mp4", Fraction(25), Fraction(1, 25)) as writer,
    ):
        writer.append(picture(0), 0)
        raise RuntimeError("in between")
    assert [path.name for path in tmp_path.iterdir()] == ["v.mp4"]
    assert (tmp_path / "v.mp4").read_text() == "from before"


def cut(path: Path, share: float) -> Path:
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    return path


def test_a_video_cut_short_says_how_much_was_read(tmp_path):
    path = cut(make_video(tmp_path / "cut.mkv", 60), 0.7)
    with VideoReader(path) as reader:
        frames = list(reader)
    assert 5 < len(frames) < 55
    assert reader.problem.startswith(f"{path} is damaged or cut short: {len(frames)} of about 60")


@pytest.mark.parametrize("content", [b"", b"no video at all\n" * 50])
def test_files_that_are_no_videos(tmp_path, content):
    (tmp_path / "v.mp4").write_bytes(content)
    with pytest.raises(UserError, match=r"v\.mp4 cannot be read as a video"):
        VideoReader(tmp_path / "v.mp4")


def test_a_sound_file_holds_no_video(tmp_path):
    with av.open(str(tmp_path / "sound.mkv"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), layout="mono")
        sound.rate = 8000
        for part in (sound, None):
            container.mux(stream.encode(part))
    with pytest.raises(UserError, match="holds no video"):
        VideoReader(tmp_path / "sound.mkv")


@pytest.mark.parametrize("content", ["ffconcat version 1.0\nfile a.mp4\n", "#EXTM3U\na.mp4\n"])
def test_a_list_of_other_files_is_no_video(tmp_path, content):
    make_video(tmp_path / "a.mp4", 3)
    (tmp_path / "list.mp4").write_text(content)
    with pytest.raises(UserError, match=r"list\.mp4 cannot be read as a video"):
        VideoReader(tmp_path / "list.mp4")


@pytest.mark.parametrize("damage", [b"\xff0:00:00.", b"V0:00:00."])
def test_a_damaged_length_is_taken_for_an_unknown_one(tmp_path, damage):
    path = make_video(tmp_path / "v.mkv", 3)
    data = path.read_bytes()
    assert data.count(b"00:00:00.") == 1
    path.write_bytes(data.replace(b"00:00:00.", damage))
    with VideoReader(path) as reader:
        assert len(list(reader)) == 3


def test_the_limit_of_pixels_holds_before_a_frame_is_decoded(tmp_path):
    make_video(tmp_path / "v.mp4", 3)
    with VideoReader(tmp_path / "v.mp4", max_pixels=48 * 64) as reader:
        assert len(list(reader)) == 3
    with pytest.raises(VideoError, match="64x48, and 3,071 pixels"):
        VideoReader(tmp_path / "v.mp4", max_pixels=48 * 64 - 1)


# Inputs by name


def test_names_of_files_folders_and_patterns(photos, tmp_path):
    Image.new("RGB", (8, 8)).save(photos / ".hidden.png")
    out = tmp_path / "out"
    assert find_inputs([photos], out) == {"a": photos / "a.png", "sub/a": photos / "sub/a.png"}
    assert find_inputs([photos / "sub/a.png"], out) == {"a": photos / "sub/a.png"}
    assert find_inputs([f"{photos}/**/*.png"], out) == find_inputs([photos], out)
    assert find_inputs([f"{photos}/s?b/*"], out) == {"sub/a": photos / "sub/a.png"}
    # What is named twice is one input.
    assert len(find_inputs([photos, f"{photos}/*.png", photos / "a.png"], out)) == 2


def test_inputs_that_do_not_suit(photos, tmp_path):
    for sources, out, words in (
        ([photos, photos / "sub/a.png"], "out", "same result files"),
        ([tmp_path / "none"], "out", "no file or folder .*none"),
        ([f"{photos}/*.jpg"], "out", "holds no images"),
        ([f"{photos}/*"], photos, "choose another"),
    ):
        with pytest.raises(UserError, match=words):
            find_inputs(sources, tmp_path / out)


# The script, on images


@pytest.fixture
def predict(run_inside, weights, tmp_path):
    """Run the script on some inputs; later flags win."""

    def run(*more: object):
        return run_inside(
            "utils/predict.py", "--weights", weights, "--out", tmp_path / "out", "--device", "cpu",
            "--backend", "eager", *more,
        )  # fmt: skip

    return run


@pytest.fixture
def many(tmp_path) -> Path:
    """A folder of seven images."""
    rng = np.random.default_rng(2)
    (tmp_path / "many").mkdir()
    for i in range(7):
        pixels = rng.integers(0, 256, (6, 8, 3)).astype(np.uint8)
        Image.fromarray(pixels).resize((64, 48)).save(tmp_path / f"many/{i}.png")
    return tmp_path / "many"


@pytest.fixture
def predicted(monkeypatch) -> list:
    """Shapes of the images that the network sees from now on."""
    seen, whole = [], Predictor.__call__

    def call(self, image):
        seen.append(image.shape)
        return whole(self, image)

    monkeypatch.setattr(Predictor, "__call__", call)
    return seen


@pytest.fixture
def interrupt_at(monkeypatch):
    """Call it with the number of the image at which Ctrl-C is to come."""
    whole, calls = Predictor.__call__, itertools.count()

    def arm(number: int) -> None:
        def call(self, image):
            if next(calls) == number:
                raise KeyboardInterrupt
            return whole(self, image)

        monkeypatch.setattr(Predictor, "__call__", call)

    return arm


def written(folder: Path) -> list[str]:
    """All files but the journal's."""
    files = (p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    return sorted(name for name in files if not name.startswith("progress-"))


def read(path: Path) -> np.ndarray:
    return np.array(Image.open(path))


def answer(weights: Path, image: np.ndarray) -> np.ndarray:
    net, _ = load_model(weights)
    return Predictor(net, (48, 64))(image)


def shares_of(labels: list[np.ndarray]) -> np.ndarray:
    counts = sum(np.bincount(label.ravel(), minlength=12) for label in labels)
    return counts / counts.sum()


def test_labels_pictures_and_shares(predict, photos, weights, tmp_path):
    result = predict(photos, "--what", "labels", "overlay", "color", "side", "--photo", "png")
    assert result.returncode == 0, result.stderr
    assert "2 of 2 images predicted" in result.stdout
    kinds = ("color", "labels", "overlay", "side")
    names = [f"{name}_{kind}.png" for name in ("a", "sub/a") for kind in kinds]
    assert written(tmp_path / "out") == sorted([*names, "shares.json"])
    _, meta = load_model(weights)
    painter = Visualizer(output_scheme(meta, 12, weights))
    report = json.loads((tmp_path / "out/shares.json").read_text())
    labels = []
    for entry, name in zip(report["images"], ("a", "sub/a"), strict=True):
        image = read(photos / f"{name}.png")
        labels.append(answer(weights, image))
        label_file = Image.open(tmp_path / f"out/{name}_labels.png")
        assert label_file.mode == "L"
        np.testing.assert_array_equal(np.array(label_file), labels[-1])
        for kind in ("overlay", "color", "side"):
            expected = painter.draw(kind, image, labels[-1])
            np.testing.assert_array_equal(read(tmp_path / f"out/{name}_{kind}.png"), expected)
        assert (entry["name"], entry["height"], entry["width"]) == (name, *image.shape[:2])
        assert list(entry["shares"]) == [*meta["classes"], "void"]
        assert list(entry["shares"].values()) == pytest.approx(shares_of(labels[-1:]))
    assert sum(report["shares"].values()) == pytest.approx(1)
    assert list(report["shares"].values()) == pytest.approx(shares_of(labels))


def test_side_has_the_image_beside_the_colours():
    scheme = cityscapes_scheme()
    image, label = picture(0), np.full((48, 64), 2, np.uint8)
    pair = Visualizer(scheme, legend=False).draw("side", image, label)
    np.testing.assert_array_equal(pair[:, :64], image)
    assert (pair[:, 64:] == scheme.colors[2]).all()


def test_jpegs_are_the_pictures_nearly(predict, photos, weights, tmp_path):
    assert predict(photos / "a.png", "--what", "overlay", "--alpha", 1).returncode == 0
    assert written(tmp_path / "out") == ["a_overlay.jpg", "shares.json"]
    _, meta = load_model(weights)
    image = read(photos / "a.png")
    label = answer(weights, image)
    picture = Visualizer(output_scheme(meta, 12, weights), 1).draw("overlay", image, label)
    difference = read(tmp_path / "out/a_overlay.jpg").astype(int) - picture
    assert difference.any() and np.abs(difference).mean() < 12


def test_only_what_is_missing_is_done_again(predict, many, predicted, tmp_path):
    assert "7 of 7 images" in predict(many).stdout
    before = json.loads((tmp_path / "out/shares.json").read_text())
    out = tmp_path / "out"
    (out / "3_labels.png").unlink()
    (out / "5_overlay.jpg").unlink()
    times = {name: (out / name).stat().st_mtime_ns for name in written(out)}
    predicted.clear()
    result = predict(many)
    assert "2 of 7 images" in result.stdout and "5 were there already" in result.stdout
    assert len(predicted) == 2
    fresh = {name for name in written(out) if times.get(name) != (out / name).stat().st_mtime_ns}
    assert fresh == {"3_labels.png", "5_overlay.jpg", "shares.json"}
    after = json.loads((out / "shares.json").read_text())
    assert (after["images"], after["shares"]) == (before["images"], before["shares"])
    assert "0 of 7" in predict(many).stdout and len(predicted) == 2
    assert "7 of 7" in predict(many, "--overwrite").stdout and len(predicted) == 9


def test_a_further_kind_is_added(predict, many, tmp_path):
    predict(many, "--what", "labels")
    assert "7 of 7" in predict(many, "--what", "labels", "color").stdout
    assert len(written(tmp_path / "out")) == 15


def test_an_interrupted_folder_goes_on(predict, many, interrupt_at, tmp_path):
    interrupt_at(4)
    result = predict(many)
    assert result.returncode == 130 and "Traceback" not in result.stderr
    names = [f"{i}_{end}" for i in range(4) for end in ("labels.png", "overlay.jpg")]
    assert written(tmp_path / "out") == names
    assert "3 of 7 images" in predict(many).stdout
    assert len(json.loads((tmp_path / "out/shares.json").read_text())["images"]) == 7


def test_files_without_a_journal_are_not_trusted(predict, many, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/2_labels.png").write_text("of an older run")
    assert "7 of 7 images" in predict(many).stdout
    assert read(tmp_path / "out/2_labels.png").shape == (48, 64)


def test_a_damaged_image_is_named_and_the_others_are_done(predict, many, tmp_path):
    bad = many / "3.png"
    bad.write_bytes(bad.read_bytes()[:-40])
    result = predict(many)
    assert_refused(result, str(bad), "is damaged")
    assert "6 of 7 images" in result.stdout
    good = [i for i in range(7) if i != 3]
    assert written(tmp_path / "out") == [
        *(f"{i}_{end}" for i in good for end in ("labels.png", "overlay.jpg")), "shares.json"
    ]  # fmt: skip
    report = json.loads((tmp_path / "out/shares.json").read_text())
    assert [entry["name"] for entry in report["images"]] == [str(i) for i in good]
    assert [entry["path"] for entry in report["passed_over"]] == [str(bad)]
    # Mended, it alone is left to do.
    shutil.copy(many / "2.png", bad)
    assert "1 of 7 images" in predict(many).stdout


def test_many_damaged_images_are_one_message(predict, many):
    for path in many.iterdir():
        path.write_bytes(b"no image")
    assert_refused(predict(many), "0.png is damaged", "and 4 more")


def test_results_of_other_files_or_weights_are_not_mixed(predict, photos, tmp_path):
    predict(photos / "a.png")
    assert_refused(predict(photos / "sub/a.png"), "the results for a of", "choose another --out")
    torch.manual_seed(9)
    save_checkpoint(tmp_path / "other.pth", LEDNet(12), load_model(tmp_path / "w.pth")[1])
    for flags in (("--weights", tmp_path / "other.pth"), ("--alpha", 0.1)):
        assert_refused(predict(photos / "a.png", *flags), "holds results with", "--overwrite")
    Image.new("RGB", (33, 44)).save(photos / "a.png")
    assert_refused(predict(photos / "a.png"), "before a change")
    assert predict(photos / "a.png", "--overwrite").returncode == 0
    assert read(tmp_path / "out/a_labels.png").shape == (44, 33)


def test_label_ids_of_cityscapes_weights(predict, photos, tmp_path):
    torch.manual_seed(0)
    save_checkpoint(tmp_path / "city.pth", LEDNet(20), {"size": [48, 64]})
    flags = (photos / "a.png", "--weights", tmp_path / "city.pth", "--what", "labels")
    predict(*flags, "--out", tmp_path / "indices")
    assert predict(*flags, "--out", tmp_path / "ids", "--label-ids").returncode == 0
    indices, ids = (read(tmp_path / f"{kind}/a_labels.png") for kind in ("indices", "ids"))
    np.testing.assert_array_equal(ids, cityscapes_label_ids()[indices])
    assert (cityscapes_label_ids()[[0, 1, 18, 19]] == [7, 8, 33, 0]).all()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--alpha", -1), "--alpha is -1"),
        (("--num-workers", 0), "--num-workers is 0"),
        (("--max-frames", 0), "--max-frames is 0"),
        (("--label-ids",), "--label-ids is for those of Cityscapes"),
        (("nowhere.mp4",), "no file or folder nowhere.mp4"),
    ],
)
def test_options_that_make_no_sense(predict, photos, flags, words, tmp_path):
    assert_refused(predict(photos, *flags), words)
    assert not (tmp_path / "out").exists()


def test_a_full_disk_stops_the_run(predict, many, monkeypatch, tmp_path):
    def full(descriptor):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    assert_refused(predict(many), "cannot write", "No space left")
    assert not any((tmp_path / "out").iterdir())


def test_processes_share_a_folder(run_script, many, weights, tmp_path):
    (tmp_path / "many/6.png").write_bytes(b"no image")
    result = run_script(
        "utils/predict.py", many, "--weights", weights, "--out", tmp_path / "out", "--device",
        "cpu", "--backend", "eager",
        launcher=("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
    )  # fmt: skip
    assert result.returncode and "6.png is damaged" in result.stderr
    shards = []
    for rank in range(2):
        lines = (tmp_path / f"out/progress-{rank}.jsonl").read_text().splitlines()
        shards.append([json.loads(line)["name"] for line in lines[1:]])
    assert [sorted(shard) for shard in shards] == [["0", "2", "4"], ["1", "3", "5"]]
    report = json.loads((tmp_path / "out/shares.json").read_text())
    assert [entry["name"] for entry in report["images"]] == list("012345")
    labels = [answer(weights, read(many / f"{i}.png")) for i in range(6)]
    assert list(report["shares"].values()) == pytest.approx(shares_of(labels))


# The script, on videos


def test_a_video_keeps_frames_rate_and_size(predict, weights, tmp_path):
    source = make_video(tmp_path / "clip.mp4", 12)
    result = predict(source, "--what", "labels", "overlay", "side", "--no-legend")
    assert result.returncode == 0, result.stderr
    assert "12 frames" in result.stdout
    out = tmp_path / "out"
    names = [f"clip_labels/{i:06d}.png" for i in range(12)]
    assert written(out) == [*names, "clip_overlay.mp4", "clip_shares.json", "clip_side.mp4"]
    pictures, _, _ = frames_of(source)
    labels = [answer(weights, image) for image in pictures]
    for name, label in zip(names, labels, strict=True):
        np.testing.assert_array_equal(read(out / name), label)
    for kind, width in (("overlay", 64), ("side", 128)):
        frames, times, rate = frames_of(out / f"clip_{kind}.mp4")
        assert rate == NTSC and times == [i / NTSC for i in range(12)]
        assert frames[0].shape == (48, width, 3)
    np.testing.assert_allclose(frames[7][:, :64].mean(), pictures[7].mean(), atol=3)
    report = json.loads((out / "clip_shares.json").read_text())
    assert report["frame_rate"] == "30000/1001" and (report["height"], report["width"]) == (48, 64)
    assert [frame["frame"] for frame in report["frames"]] == list(range(12))
    assert report["frames"][11]["seconds"] == pytest.approx(float(11 / NTSC))
    assert list(report["frames"][4]["shares"].values()) == pytest.approx(shares_of(labels[4:5]))
    assert list(report["shares"].values()) == pytest.approx(shares_of(labels))


def test_a_finished_video_is_kept_and_an_unfinished_one_is_not(predict, predicted, tmp_path):
    source = make_video(tmp_path / "clip.mp4", 6)
    assert predict(source, "--max-frames", 2).returncode == 0
    assert len(predicted) == 2 and len(frames_of(tmp_path / "out/clip_overlay.mp4")[0]) == 2
    predict(source)
    assert len(predicted) == 8 and len(frames_of(tmp_path / "out/clip_overlay.mp4")[0]) == 6
    assert "is done already" in predict(source).stdout and len(predicted) == 8
    (tmp_path / "out/clip_overlay.mp4").unlink()
    predict(source)
    assert len(predicted) == 14


def test_odd_frames_are_padded_and_it_is_said(predict, tmp_path):
    source = make_video(tmp_path / "odd.mkv", 3, size=(47, 63), codec="ffv1")
    result = predict(source, "--no-legend")
    assert "one side of overlay was odd" in result.stdout
    assert frames_of(tmp_path / "out/odd_overlay.mp4")[0][0].shape == (48, 64, 3)


def test_an_interrupted_video_leaves_nothing(predict, interrupt_at, tmp_path):
    source = make_video(tmp_path / "clip.mp4", 8)
    interrupt_at(5)
    result = predict(source, "--what", "labels", "overlay")
    assert result.returncode == 130
    assert list((tmp_path / "out").iterdir()) == []


def test_a_video_cut_short_is_reported_and_the_others_are_done(predict, photos, tmp_path):
    folder = tmp_path / "mixed"
    shutil.copytree(photos, folder)
    cut(make_video(folder / "b.mkv", 60), 0.7)
    (folder / "c.mp4").write_bytes(b"no video")
    make_video(folder / "d.mp4", 3)
    result = predict(folder)
    count = len(frames_of(tmp_path / "out/b_overlay.mp4")[0])
    assert_refused(result, f"{count} of about 60 frames", "c.mp4 cannot be read as a video")
    assert 5 < count < 55
    assert "2 of 2 images" in result.stdout and "3 frames" in result.stdout
    assert not list((tmp_path / "out").glob("c_*"))
    # It is not taken for finished.
    make_video(folder / "b.mkv", 60)
    make_video(folder / "c.mp4", 4)
    result = predict(folder)
    assert result.returncode == 0 and "60 frames" in result.stdout and "4 frames" in result.stdout
    assert "d.mp4 is done already" in result.stdout


def test_videos_without_pyav(predict, monkeypatch, photos, tmp_path):
    make_video(tmp_path / "photos/clip.mp4", 2)
    monkeypatch.setitem(sys.modules, "av", None)
    assert_refused(predict(photos), "pip install av")
    monkeypatch.setitem(sys.modules, "av", SimpleNamespace(__version__="14.2.0"))
    assert_refused(predict(photos), "PyAV 14.2.0 is too old")
    assert not (tmp_path / "out").exists()
    (photos / "clip.mp4").unlink()
    assert predict(photos).returncode == 0  # images do not need it


@pytest.fixture
def camera(monkeypatch) -> str:
    """A test card in place of a camera: no machine that tests has one."""
    monkeypatch.setattr(video, "CAMERA_FORMAT", "lavfi")
    return "camera:testsrc2=size=64x48"


def test_a_camera_is_recorded_for_some_frames(predict, camera, tmp_path):
    result = predict(camera, "--max-frames", 5)
    assert result.returncode == 0, result.stderr
    (path,) = (tmp_path / "out").glob("*_overlay.mp4")
    assert len(frames_of(path)[0]) == 5 and frames_of(path)[2] == 25


def test_a_recording_ends_with_an_interrupt(predict, camera, monkeypatch, tmp_path):
    whole, calls = VideoWriter.add, itertools.count()

    def add(self, *frame):
        if next(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        whole(self, *frame)

    monkeypatch.setattr(VideoWriter, "add", add)
    result = predict(camera)
    assert result.returncode == 0, result.stderr
    (path,) = (tmp_path / "out").glob("*_overlay.mp4")
    assert len(frames_of(path)[0]) >= 4


def test_no_such_camera(predict):
    assert_refused(predict("camera:99"), "/dev/video99 cannot be read")


# The command in the README


def test_the_toy_street_and_the_released_weights(run_inside, tmp_path):
    street = ROOT / "docs/toy_street.png"
    np.testing.assert_array_equal(read(street), toy_scene(1, "val", 1, 400, 200).image)
    result = run_inside(
        "utils/predict.py", street, "--out", tmp_path, "--backend", "eager", "--device", "cpu"
    )
    assert result.returncode == 0, result.stderr
    label = Predictor.from_weights("camvid-d20")(street)
    np.testing.assert_array_equal(read(tmp_path / "toy_street_labels.png"), label)
    assert (tmp_path / "toy_street_overlay.jpg").stat().st_size > 1000
