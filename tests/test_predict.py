"""utils/predict.py and the modules that it uses: pipeline, video, input files."""

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
from fakes import read, truncate
from make_toy_cityscapes import toy_scene
from PIL import Image

from lednet import LEDNet, UserError
from lednet.checkpoint import save_checkpoint
from lednet.data.labels import cityscapes_label_ids, cityscapes_scheme
from lednet.inference import video
from lednet.inference.inputs import find_inputs
from lednet.inference.pipeline import run_pipeline
from lednet.inference.predictor import Predictor
from lednet.inference.video import VideoError, VideoReader, write_video
from lednet.inference.writers import VideoWriter
from lednet.model import load_model
from lednet.visualization import Visualizer, output_scheme

NTSC = Fraction(30000, 1001)
MS = Fraction(1, 1000)


# run_pipeline


def wait(event: threading.Event) -> None:
    assert event.wait(60), "the stages do not overlap"


def test_run_pipeline_overlaps_stages_and_keeps_order():
    read_of, predicting = [[threading.Event() for _ in range(4)] for _ in range(2)]

    def read(i: int) -> int:
        if i == 2:
            wait(read_of[3])  # the second reader overtakes
        read_of[i].set()
        return i

    def predict(i: int) -> int:
        predicting[i].set()
        wait(read_of[min(i + 1, 3)])  # the next one is read while this one is predicted
        return i * 10

    def write(tens: int) -> int:
        wait(predicting[min(tens // 10 + 1, 3)])  # the next one is predicted meanwhile
        return tens + 1

    assert run_pipeline(range(4), read, predict, write, writers=1) == [1, 11, 21, 31]


def test_run_pipeline_reads_an_endless_source_only_as_needed():
    numbers, begun, predicted, steps = iter(range(50)), [], [], itertools.count()

    def read(_: None) -> int | None:
        begun.append(next(numbers, None))
        return begun[-1]

    def predict(number: int) -> int:
        predicted.append(number)
        assert len(begun) <= len(predicted) + 1
        return number

    results = run_pipeline(
        itertools.repeat(None), read, predict, lambda n: n, lambda: next(steps), readers=1
    )
    assert results == predicted == list(range(50)) and next(steps) == 50


@pytest.mark.parametrize("error", [UserError, KeyboardInterrupt])
@pytest.mark.parametrize("failing", ["read", "predict", "write"])
def test_run_pipeline_stage_raises_after_writing_what_is_predicted(failing, error):
    seen, threads = {"read": [], "predict": [], "write": []}, threading.active_count()

    def stage(name: str):
        def call(i: int) -> int:
            if name == failing and i == 3:
                raise error("failed")
            seen[name].append(i)
            return i

        return call

    with pytest.raises(error, match="failed"):
        run_pipeline(itertools.count(), *map(stage, seen))
    assert sorted(seen["write"]) == [i for i in seen["predict"] if failing != "write" or i != 3]
    assert seen["write"][:3] and threading.active_count() == threads


# video


def scene(i: int, height: int = 48, width: int = 64) -> np.ndarray:
    """A bright square that moves over blue."""
    image = np.full((height, width, 3), (20, 40, 160), np.uint8)
    image[8:24, i % (width - 16) : i % (width - 16) + 16] = (250, 200, 30)
    return image


def make_video(
    path: Path, count: int, rate=NTSC, stamps=None, size=(48, 64), matrix=None, codec="libx264",
    audio_seconds: int = 0,
) -> Path:  # fmt: skip
    """Write a video with PyAV alone.

    Args:
        stamps: timestamps in milliseconds.
        matrix: display matrix.
        audio_seconds: duration of an audio stream in seconds.
    """
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width = size
        stream.pix_fmt, stream.gop_size = "yuv420p", 5
        if audio_seconds:
            audio = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        if stamps:
            stream.codec_context.time_base = MS
        if matrix:
            stream.set_display_matrix(matrix)
        for i in range(count):
            frame = av.VideoFrame.from_ndarray(scene(i, *size), format="rgb24")
            if stamps:
                frame.pts, frame.time_base = stamps[i], MS
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        for second in range(audio_seconds):
            samples = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), layout="mono")
            samples.rate, samples.pts = 8000, 8000 * second
            container.mux(audio.encode(samples))
    return path


def read_video(path: Path) -> tuple[list[np.ndarray], list[Fraction], Fraction]:
    """Images, times and frame rate of a video, read with PyAV alone."""
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
        rate = container.streams.video[0].average_rate
    times = [frame.pts * frame.time_base for frame in frames]
    return [frame.to_ndarray(format="rgb24") for frame in frames], times, rate


@pytest.mark.parametrize(
    ("name", "rate", "stamps"),
    [
        ("in.mp4", NTSC, None),
        ("in.mp4", Fraction(15, 2), None),
        ("in.avi", Fraction(24000, 1001), None),
        ("in.mkv", NTSC, None),
        ("in.mkv", Fraction(25), [0, 40, 80, 300, 340, 1000, 1007, 1100]),
        ("in.mkv", Fraction(25), [500, 540, 620]),
        ("in.h264", Fraction(25), None),  # has no timestamps
    ],
)
def test_video_copy_keeps_frames_and_timestamps(tmp_path, name, rate, stamps):
    source, target = tmp_path / name, tmp_path / "out.mp4"
    count = len(stamps) if stamps else 20
    # H.264 in AVI has no usable timestamps.
    codec = "mpeg4" if name.endswith("avi") else "libx264"
    make_video(source, count, rate, stamps, codec=codec)
    with VideoReader(source) as reader, write_video(target, rate, reader.time_base) as writer:
        for frame in reader:
            writer.append(frame.image, frame.pts)
    assert reader.rate == rate and reader.problem is None
    assert stamps or reader.expected in (count, None)
    images, times, found_rate = read_video(target)
    stamps = stamps or [int(1000 * i / rate + Fraction(1, 2)) for i in range(count)]
    if source.suffix == ".mkv":  # which rounds to milliseconds
        assert times == [(stamp - stamps[0]) * MS for stamp in stamps]
    else:
        assert times == [i / rate for i in range(count)] and found_rate == rate
    for i, image in enumerate(images):
        errors = [np.abs(image.astype(int) - scene(k)).mean() for k in range(count)]
        assert np.argmin(errors) == i and errors[i] < 8


def test_video_reader_frames_without_or_with_equal_timestamps_advance(tmp_path, monkeypatch):
    def decode(self):
        image = np.zeros((8, 8, 3), np.uint8)
        for pts in (None, None, 90, 90, 85, 120):
            yield SimpleNamespace(
                pts=pts, width=8, height=8, side_data={}, to_ndarray=lambda **options: image
            )

    monkeypatch.setattr(VideoReader, "_decode", decode)
    with VideoReader(make_video(tmp_path / "v.mkv", 1, Fraction(25))) as reader:
        assert [frame.pts for frame in reader] == [0, 40, 80, 81, 82, 110]


def test_video_reader_appended_recordings_follow_each_other(tmp_path):
    """As `cat a.ts b.ts` joins them: the timestamps of the second begin anew."""
    parts = [make_video(tmp_path / f"{n}.ts", n, Fraction(25)).read_bytes() for n in (40, 50, 30)]
    (tmp_path / "all.ts").write_bytes(b"".join(parts))
    with VideoReader(tmp_path / "all.ts") as reader:
        seconds = [float(frame.pts * reader.time_base) for frame in reader]
    np.testing.assert_allclose(seconds, np.arange(120) / 25, atol=1e-3)


def test_write_video_keeps_class_colours_and_pixel_aspect_and_pads_odd_sides(tmp_path):
    colors = np.array(cityscapes_scheme().colors, np.uint8)
    stripes = colors.repeat(16, axis=0)[None, :-1].repeat(31, axis=0)
    with write_video(tmp_path / "v.mp4", Fraction(25), Fraction(1, 25)) as writer:
        writer.append(stripes, 0, Fraction(4, 3))
        assert writer.padded
    with VideoReader(tmp_path / "v.mp4") as reader:
        assert next(iter(reader)).pixel_aspect == Fraction(4, 3)
    (image,), _, _ = read_video(tmp_path / "v.mp4")
    assert image.shape == (32, 16 * len(colors), 3)
    assert np.abs(image[15, 8::16].astype(int) - colors).max() <= 8


def test_write_video_failure_keeps_the_earlier_file(tmp_path):
    (tmp_path / "v.mp4").write_text("earlier")
    with (
        pytest.raises(RuntimeError, match="meanwhile"),
        write_video(tmp_path / "v.mp4", Fraction(25), Fraction(1, 25)) as writer,
    ):
        writer.append(scene(0), 0)
        raise RuntimeError("meanwhile")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["earlier"]


@pytest.mark.parametrize(
    ("directions", "upright"),
    [
        ((0, 1, -1, 0), lambda x: x[::-1].swapaxes(0, 1)),  # clockwise: x goes down, y to the left
        ((0, -1, 1, 0), lambda x: x[:, ::-1].swapaxes(0, 1)),
        ((-1, 0, 0, -1), lambda x: x[::-1, ::-1]),
        ((-1, 0, 0, 1), lambda x: x[:, ::-1]),  # a front camera
        ((1, 0, 0, -1), lambda x: x[::-1]),
        ((0, 1, 1, 0), lambda x: x.swapaxes(0, 1)),
        ((0, -1, -1, 0), lambda x: x[::-1, ::-1].swapaxes(0, 1)),
    ],
)
def test_video_reader_applies_display_matrix(tmp_path, directions, upright):
    a, b, c, d = (direction << 16 for direction in directions)
    matrix = [a, b, 0, c, d, 0, 0, 0, 1 << 30]
    with VideoReader(make_video(tmp_path / "phone.mp4", 3, matrix=matrix)) as reader:
        image, expected = next(iter(reader)).image, upright(scene(0))
    assert image.shape == expected.shape and np.abs(image.astype(int) - expected).mean() < 4


def test_predict_takes_every_video_suffix():
    assert {".ts", ".mts", ".3gp", ".qt", ".flv", ".asf", ".mxf"} <= {*video.VIDEO_SUFFIXES}


def test_run_pipeline_hands_results_on_without_keeping_them():
    seen = []
    kept = run_pipeline(range(5), lambda i: i, lambda i: i, lambda i: i, on_result=seen.append)
    assert seen == [0, 1, 2, 3, 4] and kept == []


@pytest.mark.parametrize("audio", [0, 4])
def test_video_reader_truncated_file_reports_missing_frames(tmp_path, audio):
    path = make_video(tmp_path / "v.mkv", 60, audio_seconds=audio)
    with VideoReader(path) as reader:
        assert len(list(reader)) == 60 and reader.problem is None
    truncate(path, 0.7)
    with VideoReader(path) as reader:
        frames = list(reader)
    assert 5 < len(frames) < (61 if audio else 55)
    of = reader.expected
    assert reader.problem.startswith(f"{path} is damaged or cut short: {len(frames)} of about {of}")


@pytest.mark.parametrize("content", [b"", b"no video at all\n" * 50])
def test_video_reader_other_content_is_refused(tmp_path, content):
    (tmp_path / "v.mp4").write_bytes(content)
    with pytest.raises(VideoError, match=r"v\.mp4 cannot be read as a video"):
        VideoReader(tmp_path / "v.mp4")


def test_video_reader_audio_without_video_is_refused(tmp_path):
    with av.open(str(tmp_path / "audio.mkv"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), layout="mono")
        samples.rate = 8000
        container.mux(stream.encode(samples))
    with pytest.raises(VideoError, match="holds no video"):
        VideoReader(tmp_path / "audio.mkv")


def test_video_reader_checks_pixels_before_decoding(tmp_path):
    path = make_video(tmp_path / "v.mp4", 3)
    VideoReader(path, max_pixels=48 * 64)
    with pytest.raises(VideoError, match="64x48, and 3,071 pixels"):
        VideoReader(path, max_pixels=48 * 64 - 1)


# find_inputs


def test_find_inputs_names_files_folders_and_patterns(photos, tmp_path):
    Image.new("RGB", (8, 8)).save(photos / ".hidden.png")
    (photos / "out").mkdir()
    Image.new("RGB", (8, 8)).save(photos / "out/a_color.png")
    a, b, out = photos / "a.png", photos / "sub/a.png", photos / "out"
    for sources, found in (
        ([photos], {"a": a, "sub/a": b}),
        ([b], {"a": b}),
        ([f"{photos}/**/*.png"], {"a": a, "sub/a": b}),
        ([f"{photos}/s?b/*"], {"sub/a": b}),
        ([photos, f"{photos}/*.png", a], {"a": a, "sub/a": b}),  # one file by three names
    ):
        assert find_inputs(sources, out) == found
    assert find_inputs([photos / "sub"], photos) == {"a": b}  # results in the folder above
    for sources, out, words in (
        ([photos, b], "out", "same result files"),
        ([tmp_path / "none"], "out", "no file or folder .*none"),
        ([f"{photos}/*.jpg"], "out", "holds no images"),
        ([f"{photos}/*"], photos, "choose another"),
    ):
        with pytest.raises(UserError, match=words):
            find_inputs(sources, tmp_path / out)


# the script


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def predict(run_inside, weights, out):
    """Run the script on some inputs. Later flags override."""

    def run(*more: object):
        return run_inside(
            "utils/predict.py", "--weights", weights, "--out", out, "--device", "cpu",
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
def calls(monkeypatch) -> SimpleNamespace:
    """Counts images that are predicted. Ctrl-C arrives at number `interrupt`."""
    calls, original = SimpleNamespace(count=0, interrupt=None), Predictor.__call__

    def call(self, image):
        if calls.count == calls.interrupt:
            calls.interrupt = None
            raise KeyboardInterrupt
        calls.count += 1
        return original(self, image)

    monkeypatch.setattr(Predictor, "__call__", call)
    return calls


def files_in(folder: Path) -> list[str]:
    """All files except progress logs."""
    files = (p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    return sorted(name for name in files if not name.startswith("progress-"))


def names(*numbers: int) -> list[str]:
    return [f"{i}_{end}" for i in numbers for end in ("labels.png", "overlay.jpg")]


def report_in(folder: Path, name: str = "shares.json") -> dict:
    return json.loads((folder / name).read_text())


def label_of(weights: Path, image: np.ndarray) -> np.ndarray:
    return Predictor(load_model(weights)[0], (48, 64), backend="eager")(image).labels


def shares_of(labels: list[np.ndarray]) -> object:
    counts = sum(np.bincount(label.ravel(), minlength=12) for label in labels)
    return pytest.approx(counts / counts.sum())


def test_predict_images_writes_all_outputs_and_shares(predict, photos, weights, out):
    kinds = ("color", "labels", "overlay", "side")
    result = predict(photos, "--outputs", *kinds, "--image-format", "png").check()
    assert "2 of 2 images predicted" in result.stdout
    written = [f"{name}_{kind}.png" for name in ("a", "sub/a") for kind in kinds]
    assert files_in(out) == sorted([*written, "shares.json"])
    _, meta = load_model(weights)
    visualizer = Visualizer(output_scheme(meta, 12, weights))
    report, labels = report_in(out), []
    for entry, name in zip(report["images"], ("a", "sub/a"), strict=True):
        image = read(photos / f"{name}.png")
        labels.append(label_of(weights, image))
        assert Image.open(out / f"{name}_labels.png").mode == "L"
        np.testing.assert_array_equal(read(out / f"{name}_labels.png"), labels[-1])
        for kind in ("overlay", "color", "side"):
            expected = visualizer.draw(kind, image, labels[-1])
            np.testing.assert_array_equal(read(out / f"{name}_{kind}.png"), expected)
        assert (entry["name"], entry["height"], entry["width"]) == (name, *image.shape[:2])
        assert list(entry["shares"]) == [*meta["classes"], "void"]
        assert list(entry["shares"].values()) == shares_of(labels[-1:])
    assert list(report["shares"].values()) == shares_of(labels)


def test_predict_earlier_flags_write_jpeg_overlay(predict, photos, weights, out):
    flags = ("--what", "overlay", "--alpha", 1, "--photo", "jpg")
    assert predict(photos / "a.png", *flags).returncode == 0
    assert files_in(out) == ["a_overlay.jpg", "shares.json"]
    image = read(photos / "a.png")
    scheme = output_scheme(load_model(weights)[1], 12, weights)
    expected = Visualizer(scheme, 1).draw("overlay", image, label_of(weights, image))
    difference = read(out / "a_overlay.jpg").astype(int) - expected
    assert difference.any() and np.abs(difference).mean() < 12


@pytest.mark.parametrize(
    ("missing", "flags", "count"),
    [
        ([], (), 0),
        (["3_labels.png", "5_overlay.jpg"], (), 2),
        (["progress-0.jsonl"], (), 7),  # existing files may be of another run
        ([], ("--overwrite",), 7),
        ([], ("--outputs", "labels", "overlay", "color"), 7),
    ],
)
def test_predict_again_writes_only_missing_files(predict, many, calls, out, missing, flags, count):
    assert "7 of 7 images" in predict(many).stdout
    before = report_in(out)
    for name in missing:
        (out / name).unlink()
    times = {name: (out / name).stat().st_mtime_ns for name in files_in(out)}
    calls.count = 0
    result = predict(many, *flags)
    assert f"{count} of 7 images" in result.stdout and calls.count == count
    assert ("were there already" in result.stdout) == (count < 7)
    if count < 7:
        fresh = {n for n in files_in(out) if times.get(n) != (out / n).stat().st_mtime_ns}
        assert fresh == {*missing, "shares.json"}
    assert all(report_in(out)[key] == before[key] for key in ("images", "shares"))


def test_predict_interrupted_resumes(predict, many, calls, out):
    calls.interrupt = 4
    result = predict(many)
    assert result.returncode == 130 and "Traceback" not in result.stderr
    assert files_in(out) == names(0, 1, 2, 3)
    assert "3 of 7 images" in predict(many).stdout
    assert len(report_in(out)["images"]) == 7


def test_predict_damaged_image_is_named_and_others_are_done(predict, many, out):
    bad = many / "3.png"
    truncate(bad)
    result = predict(many)
    result.assert_error(str(bad), "is damaged")
    assert "6 of 7 images" in result.stdout
    assert files_in(out) == [*names(0, 1, 2, 4, 5, 6), "shares.json"]
    report = report_in(out)
    assert [entry["name"] for entry in report["images"]] == list("012456")
    assert [entry["path"] for entry in report["passed_over"]] == [str(bad)]
    shutil.copy(many / "2.png", bad)
    assert "1 of 7 images" in predict(many).stdout
    for path in many.iterdir():
        path.write_bytes(b"no image")
    predict(many, "--overwrite").assert_error("0.png is damaged", "and 4 more")


def test_predict_unwritable_images_are_named_and_others_are_done(predict, photos, out):
    Image.new("RGB", (65_501, 2)).save(photos / "wide.png")
    result = predict(photos, "--no-legend")
    result.assert_error("wide.png: cannot write", "a JPEG has at most 65,500 pixels a side")
    assert "2 of 3 images" in result.stdout and (out / "a_overlay.jpg").is_file()
    Image.fromarray(scene(0)).save(photos / ("\u5199" * 80 + ".png"))
    result = predict(photos, "--no-legend", "--image-format", "png", "--overwrite")
    result.assert_error("too long a name")
    assert "3 of 3 images" in result.stdout and not list(out.glob("\u5199*"))
    assert (out / "wide_overlay.png").is_file() and (out / "shares.json").is_file()


def test_predict_results_of_other_files_or_settings_are_refused(predict, photos, weights, out):
    photo = photos / "a.png"
    predict(photo)
    torch.manual_seed(9)
    other = weights.with_name("other.pth")
    save_checkpoint(other, LEDNet(12), load_model(weights)[1])
    predict(photos / "sub/a.png").assert_error("the results for a of", "choose another --out")
    for flags in (("--weights", other), ("--alpha", 0.1)):
        predict(photo, *flags).assert_error("holds results with", "--overwrite")
    Image.new("RGB", (33, 44)).save(photo)
    predict(photo).assert_error("before a change")
    assert predict(photo, "--overwrite").returncode == 0
    assert read(out / "a_labels.png").shape == (44, 33)


def test_predict_label_ids_of_cityscapes_weights(predict, photos, tmp_path):
    torch.manual_seed(0)
    save_checkpoint(tmp_path / "city.pth", LEDNet(20), {"size": [48, 64]})
    flags = (photos / "a.png", "--weights", tmp_path / "city.pth", "--outputs", "labels")
    predict(*flags, "--out", tmp_path / "indices")
    assert predict(*flags, "--out", tmp_path / "ids", "--label-ids").returncode == 0
    indices, ids = (read(tmp_path / f"{kind}/a_labels.png") for kind in ("indices", "ids"))
    np.testing.assert_array_equal(ids, cityscapes_label_ids()[indices])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--alpha", -1), "argument --alpha: '-1' is not a number from 0 to 1"),
        (("--num-workers", 0), "argument --num-workers: '0'"),
        (("--label-ids",), "--label-ids is for those of Cityscapes"),
        (("nowhere.mp4",), "no file or folder nowhere.mp4"),
        (("camera:99",), "/dev/video99 cannot be read"),
    ],
)
def test_predict_invalid_options_are_refused(predict, photos, flags, words, out):
    result = predict(*(() if "camera:99" in flags else (photos,)), *flags)
    assert result.returncode == 2 and words in result.stderr and "Traceback" not in result.stderr
    assert not out.exists()


def test_predict_full_disk_stops_the_run(predict, many, monkeypatch, out):
    def full(descriptor):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    predict(many).assert_error("cannot write", "No space left")
    assert not any(out.iterdir())


def test_predict_two_processes_share_the_images(run_script, many, weights, out):
    (many / "6.png").write_bytes(b"no image")
    result = run_script(
        "utils/predict.py", many, "--weights", weights, "--out", out, "--device", "cpu",
        "--backend", "eager",
        launcher=("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
    )  # fmt: skip
    assert result.returncode and "6.png is damaged" in result.stderr
    for rank, expected in enumerate((["0", "2", "4"], ["1", "3", "5"])):
        lines = (out / f"progress-{rank}.jsonl").read_text().splitlines()
        assert sorted(json.loads(line)["name"] for line in lines[1:]) == expected
    report = report_in(out)
    assert [entry["name"] for entry in report["images"]] == list("012345")
    labels = [label_of(weights, read(many / f"{i}.png")) for i in range(6)]
    assert list(report["shares"].values()) == shares_of(labels)


def test_predict_video_writes_all_outputs_and_shares(predict, weights, tmp_path, out):
    source = make_video(tmp_path / "clip.mp4", 12)
    result = predict(source, "--outputs", "labels", "overlay", "side", "--no-legend").check()
    assert "12 frames" in result.stdout
    maps = [f"clip_labels/{i:06d}.png" for i in range(12)]
    assert files_in(out) == [*maps, "clip_overlay.mp4", "clip_shares.json", "clip_side.mp4"]
    images, _, _ = read_video(source)
    labels = [label_of(weights, image) for image in images]
    for name, label in zip(maps, labels, strict=True):
        np.testing.assert_array_equal(read(out / name), label)
    for kind, width in (("overlay", 64), ("side", 128)):
        frames, times, rate = read_video(out / f"clip_{kind}.mp4")
        assert rate == NTSC and times == [i / NTSC for i in range(12)]
        assert frames[0].shape == (48, width, 3)
    np.testing.assert_allclose(frames[7][:, :64].mean(), images[7].mean(), atol=3)
    report = report_in(out, "clip_shares.json")
    assert report["frame_rate"] == "30000/1001" and (report["height"], report["width"]) == (48, 64)
    assert [frame["frame"] for frame in report["frames"]] == list(range(12))
    assert report["frames"][11]["seconds"] == pytest.approx(float(11 / NTSC))
    assert list(report["frames"][4]["shares"].values()) == shares_of(labels[4:5])
    assert list(report["shares"].values()) == shares_of(labels)


def test_predict_video_is_repeated_until_it_is_finished(predict, calls, tmp_path, out):
    source, target = make_video(tmp_path / "clip.mp4", 6), out / "clip_overlay.mp4"
    calls.interrupt = 5
    assert predict(source, "--outputs", "labels", "overlay").returncode == 130
    assert list(out.iterdir()) == []
    for flags, count in ((("--max-frames", 2), 2), ((), 6), ((), 0)):
        calls.count = 0
        result = predict(source, *flags)
        assert result.returncode == 0 and calls.count == count
        assert len(read_video(target)[0]) == (count or 6)
    assert "is done already" in result.stdout
    target.unlink()
    predict(source)
    assert calls.count == 6


def test_predict_broken_videos_are_reported_and_others_are_done(predict, photos, out):
    truncate(make_video(photos / "b.mkv", 60), 0.7)
    (photos / "c.mp4").write_bytes(b"no video")
    make_video(photos / "d.mkv", 3, size=(47, 63), codec="ffv1")
    result = predict(photos, "--no-legend")
    count = len(read_video(out / "b_overlay.mp4")[0])
    result.assert_error(f"{count} of about 60 frames", "c.mp4 cannot be read as a video")
    assert "2 of 2 images" in result.stdout and "3 frames" in result.stdout
    assert "one side of overlay is odd" in result.stdout
    assert read_video(out / "d_overlay.mp4")[0][0].shape == (48, 64, 3)
    assert not list(out.glob("c_*"))
    for name in ("b.mkv", "c.mp4"):
        make_video(photos / name, 60)
    result = predict(photos, "--no-legend")
    assert result.returncode == 0 and result.stdout.count("60 frames") == 2
    assert "d.mkv is done already" in result.stdout


def test_predict_without_pyav_refuses_videos_only(predict, monkeypatch, photos, out):
    make_video(photos / "clip.mp4", 2)
    for package, words in (
        (None, "pip install av"),
        (SimpleNamespace(__version__="14.2.0"), "PyAV 14.2.0 is too old"),
    ):
        monkeypatch.setitem(sys.modules, "av", package)
        predict(photos).assert_error(words)
    assert not out.exists()
    (photos / "clip.mp4").unlink()
    assert predict(photos).returncode == 0


@pytest.mark.parametrize("ends", ["--max-frames", "Ctrl-C"])
def test_predict_camera_records_until_it_is_stopped(predict, monkeypatch, out, ends):
    # A generated test card: machines that run tests have no camera.
    monkeypatch.setattr(video, "CAMERA_FORMAT", "lavfi")
    add, frames = VideoWriter.add, itertools.count()

    def interrupted_add(self, *frame):
        if next(frames) == 3 and ends == "Ctrl-C":
            signal.raise_signal(signal.SIGINT)
        add(self, *frame)

    monkeypatch.setattr(VideoWriter, "add", interrupted_add)
    flags = ("--max-frames", 5) if ends == "--max-frames" else ()
    predict("camera:testsrc2=size=64x48", *flags).check()
    (path,) = out.glob("*_overlay.mp4")
    images, _, rate = read_video(path)
    assert rate == 25 and (len(images) == 5 if flags else len(images) >= 4)


def test_predict_readme_command_labels_the_toy_street(run_inside, tmp_path):
    street = ROOT / "docs/toy_street.png"
    np.testing.assert_array_equal(read(street), toy_scene(1, "val", 1, 400, 200).image)
    flags = ("--weights", "toy-d20", "--out", tmp_path, "--backend", "eager", "--device", "cpu")
    run_inside("utils/predict.py", street, *flags).check()
    label = Predictor("toy-d20", backend="eager")(street).labels
    np.testing.assert_array_equal(read(tmp_path / "toy_street_labels.png"), label)
    assert (tmp_path / "toy_street_overlay.jpg").stat().st_size > 1000
