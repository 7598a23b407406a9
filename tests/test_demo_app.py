"""utils/demo_app.py: the live page in a real browser, and what its server refuses."""

import base64
import http.client
import io
import os
import re
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from conftest import CLASSES, COLORS, ROOT
from PIL import Image
from test_bad_input import assert_refused
from test_page import chromium

from lednet import UserError
from lednet.checkpoint import save_checkpoint
from lednet.data.image_io import FORMATS
from lednet.demo.labeller import MAX_SIDE, decode_image
from lednet.inference.predictor import Predictor
from lednet.inference.video import VideoReader, write_video
from lednet.inference.writers import class_shares, count_pixels
from lednet.model import load_model
from lednet.visualization import output_scheme, overlay

STREET = ROOT / "docs/toy_street.png"
FAKE_CAMERA = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
PATIENCE = 60
"""Seconds after which something is taken not to come."""


def wait_until(happened: Callable[[], object], what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not happened():
        assert time.monotonic() < end, f"not within {PATIENCE} s: {what}"
        time.sleep(0.1)


# Uploads as images


def encoded(pixels: np.ndarray, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format, **options)
    return buffer.getvalue()


def noise(height: int = 50, width: int = 70) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)


def huge_png(side: int) -> bytes:
    """A PNG whose header promises `side` x `side` pixels and whose body is not there."""
    data = bytearray(encoded(noise(4, 4)))
    data[16:24] = side.to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


@pytest.mark.parametrize("format", FORMATS)
def test_images_are_decoded(format):
    lossless = {"lossless": True} if format == "WEBP" else {}
    decoded = decode_image(encoded(noise(), format, **lossless))
    assert decoded.dtype == np.uint8 and decoded.shape == (50, 70, 3)
    assert format == "JPEG" or np.array_equal(decoded, noise())


def test_images_are_turned_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = decode_image(encoded(noise(), exif=exif))
    assert np.array_equal(turned, np.rot90(noise(), -1))


@pytest.mark.filterwarnings("ignore:Image size")
@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "image is damaged (or no PNG"),
        (b"a letter to a friend", "image is damaged (or no PNG"),
        (encoded(noise(), "GIF"), "no PNG, JPEG, BMP, WEBP, TIFF image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "image is damaged (or no PNG"),
        (encoded(noise())[:3000], "damaged"),
        (huge_png(50_000), "far more than the 50,000,000 pixels"),
        (huge_png(10_000), "10000x10000 pixels, and 50,000,000 are the limit"),
        (encoded(np.zeros((1, MAX_SIDE + 1), np.uint8)), "a side"),
    ],
)
def test_what_is_no_image_is_told_in_a_sentence(data, words):
    with pytest.raises(UserError, match=re.escape(words)):
        decode_image(data)


def test_the_limit_of_pixels_is_exact():
    data = encoded(noise())
    assert decode_image(data, 50 * 70).shape == (50, 70, 3)
    with pytest.raises(UserError, match="70x50"):
        decode_image(data, 50 * 70 - 1)


def test_the_limit_may_be_above_pillows_own(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # of which it refuses twice as many
    assert decode_image(encoded(noise()), 50 * 70).shape == (50, 70, 3)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("format", FORMATS)
def test_damaged_bytes_end_in_an_image_or_a_sentence(format):
    rng = np.random.default_rng(1)
    whole = encoded(noise(), format)
    outcomes = {"image": 0, "sentence": 0}
    for _ in range(150):
        data = bytearray(whole[: rng.integers(1, len(whole) + 1)] if rng.random() < 0.3 else whole)
        head = min(len(data), 300)  # where most of what steers a decoder stands
        for _ in range(rng.integers(0, 6)):
            data[rng.integers(0, head if rng.random() < 0.7 else len(data))] = rng.integers(0, 256)
        try:
            image = decode_image(bytes(data), 1_000_000)
        except UserError:
            outcomes["sentence"] += 1
        else:
            assert image.dtype == np.uint8 and image.ndim == 3 and image.size
            outcomes["image"] += 1
    assert min(outcomes.values()) > 0


# The server


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Small and fast weights, with classes of their own, and what is uploaded."""
    folder = tmp_path_factory.mktemp("demo")
    net, meta = load_model("camvid-d20")
    meta |= {"size": [48, 64], "classes": CLASSES, "colors": COLORS}
    save_checkpoint(folder / "w.pth", net, meta)
    (folder / "noise.png").write_bytes(encoded(noise()))
    (folder / "temporary").mkdir()
    return folder


def toy_video(path: Path, frames: int, rate: int = 25, size: tuple[int, int] = (48, 64)) -> Path:
    """The street, shifted from frame to frame."""
    street = np.asarray(Image.open(STREET).convert("RGB").resize(size[::-1]))
    with write_video(path, Fraction(rate), Fraction(1, rate)) as writer:
        for i in range(frames):
            writer.append(np.roll(street, i, axis=1), i)
    return path


def answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), PATIENCE).close()
    except ConnectionRefusedError:
        return False
    return True


@pytest.fixture(scope="module")
def server(folder):
    """Port of a server with small limits, and its log, in which there is no traceback."""
    pytest.importorskip("nicegui", reason="needs nicegui: pip install nicegui")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    log = folder / "log.txt"
    options = ["--weights", "w.pth", "--port", port, "--backend", "eager", "--device", "cpu"]
    limits = ["--max-upload", 1, "--max-pixels", 2, "--max-seconds", 4, "--max-frames", 60]
    command = [sys.executable, str(ROOT / "utils/demo_app.py"), *map(str, options + limits)]
    environ = {key: value for key, value in os.environ.items() if "PYTEST" not in key}
    environ |= {"OMP_NUM_THREADS": "1", "TMPDIR": str(folder / "temporary")}
    with open(log, "w") as output:
        process = subprocess.Popen(
            command, cwd=folder, env=environ, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        started = f"http://127.0.0.1:{port} shows the page"
        wait_until(lambda: process.poll() is not None or started in log.read_text(), "the server")
        assert process.poll() is None, log.read_text()
        wait_until(lambda: answers(port), "an answer")
        of_torch = set((folder / "temporary").glob("tmp*"))  # 2.6 leaves a module there
        yield port
    finally:
        process.terminate()
        process.wait(PATIENCE)
    assert "Traceback" not in log.read_text()
    assert set((folder / "temporary").iterdir()) == of_torch


def ask(port: int, path: str = "/", method: str = "GET", body=None, **headers: str) -> tuple:
    """Status, headers and body of an answer to exactly these bytes, as no browser sends them."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    headers = {key.replace("_", "-"): value for key, value in headers.items()}
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    answer = response.status, response.headers, response.read()
    connection.close()
    return answer


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "/../../../../etc/passwd",
        "/%2e%2e/%2e%2e/%2e%2e/etc/passwd",
        "/..%2f..%2f..%2fetc/passwd",
        "//etc/passwd",
        "/_nicegui/VERSION/static/../../../../../../../etc/passwd",
        "/_nicegui/VERSION/static/%2e%2e/%2e%2e/nicegui.py",
        "/_nicegui/VERSION/static//etc/passwd",
        "/_nicegui/VERSION/components/..%2f..%2fdemo.py",
        "/w.pth",
        "/log.txt",
        "/docs",
        "/openapi.json",
    ],
)
def test_no_file_of_the_disk_is_served(server, path):
    version = pytest.importorskip("nicegui").__version__
    status, _, body = ask(server, path.replace("VERSION", version))
    assert status == 404
    assert b"root:" not in body and b"nicegui import" not in body


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:{port}", "10.0.0.1", "127.0.0.1.evil.example", "[", ""]
)
def test_other_host_names_are_refused(server, host):
    status, _, body = ask(server, Host=host.format(port=server))
    assert (status, body) == (403, b"This server is not known by that name.\n")


def test_what_a_server_is_called_goes_by_its_address():
    pytest.importorskip("nicegui", reason="needs nicegui: pip install nicegui")
    from lednet.demo.guard import is_own_name

    assert is_own_name("10.0.0.7:8080", "0.0.0.0") and is_own_name("[fe80::1]:8080", "::")
    assert is_own_name("box:8080", "box") and is_own_name("[::1]", "10.0.0.7")
    assert not is_own_name("evil.example", "0.0.0.0")
    assert not is_own_name("10.0.0.8", "10.0.0.7")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost:{port}", "LOCALHOST"])
def test_own_host_names_are_served(server, host):
    status, headers, _ = ask(server, Host=host.format(port=server))
    assert status == 200
    assert "frame-ancestors 'none'" in headers["content-security-policy"]
    assert "default-src 'self'" in headers["content-security-policy"]


@pytest.mark.parametrize("path", ["/", "/_nicegui_ws/socket.io/?EIO=4&transport=polling"])
def test_other_pages_have_no_access(server, path):
    foreign = ({"Origin": "http://evil.example"}, {"Origin": "null"},
               {"Origin": "http://localhost:1"}, {"Sec-Fetch-Site": "cross-site"},
               {"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "no-cors"})  # fmt: skip
    for headers in foreign:
        assert ask(server, path, **headers)[0] == 403
    # But a link may lead here.
    link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    assert ask(server, path, **link)[0] == 200


def test_other_pages_cannot_open_the_socket(server):
    upgrade = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13",
               "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA=="}  # fmt: skip
    path = "/_nicegui_ws/socket.io/?EIO=4&transport=websocket"
    own = f"http://127.0.0.1:{server}"
    assert ask(server, path, **upgrade, Origin="http://evil.example")[0] == 403
    with socket.create_connection(("127.0.0.1", server), PATIENCE) as connection:
        lines = [f"GET {path} HTTP/1.1", f"Host: 127.0.0.1:{server}", f"Origin: {own}"]
        lines += [f"{key}: {value}" for key, value in upgrade.items()]
        connection.sendall(("\r\n".join(lines) + "\r\n\r\n").encode())
        assert connection.recv(12) == b"HTTP/1.1 101"


def test_requests_larger_than_an_upload_are_refused(server):
    assert ask(server, "/", "POST", b"x", Content_Length="2000000")[0] == 413
    assert ask(server, "/", "POST", b"1\r\nx\r\n0\r\n\r\n", Transfer_Encoding="chunked")[0] == 411


def test_bad_options_are_refused(run_inside, folder, server):
    def run(*options):
        return run_inside("utils/demo_app.py", "--device", "cpu", *options)

    assert_refused(run("--weights", folder / "none.pth"), "none.pth")
    assert_refused(run("--weights", folder / "noise.png"), "noise.png")
    assert_refused(run("--max-upload", -1), "--max-upload")
    assert_refused(run("--port", 0), "--port")
    own = ("--weights", folder / "w.pth", "--backend", "eager")
    assert_refused(run(*own, "--port", server), f"port {server}", "--port")


# The page


@pytest.fixture(scope="module")
def browser():
    with chromium(*FAKE_CAMERA) as running:
        yield running


@pytest.fixture
def open_page(browser, server):
    """Open the page; fails a test in which it complained or asked another server."""
    pages, complaints = [], []
    own = (f"http://127.0.0.1:{server}/", f"ws://127.0.0.1:{server}/", "data:", "blob:")

    def watch(url: str) -> None:
        if not url.startswith(own):
            complaints.append(url)

    def open_one(width: int = 1280):
        page = browser.new_page(viewport={"width": width, "height": 800})
        pages.append(page)
        page.set_default_timeout(1000 * PATIENCE)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: watch(request.url))
        page.on("websocket", lambda socket: watch(socket.url))
        page.goto(own[0])
        page.get_by_role("button", name="Drop an image").wait_for()
        return page

    yield open_one
    for page in pages:
        page.close()
    assert complaints == []


def upload(page, file) -> None:
    """A path, or a name and bytes."""
    if isinstance(file, tuple):
        file = {"name": file[0], "mimeType": "", "buffer": file[1]}
    page.locator("input[type=file]").set_input_files(file)


def layers(page) -> list[np.ndarray]:
    """RGBA of the image and of the classes on it, as the browser holds them."""
    uris = [
        page.locator(f"canvas.{name}").evaluate("canvas => canvas.toDataURL()")
        for name in ("image", "overlay")
    ]
    files = [io.BytesIO(base64.b64decode(uri.partition(",")[2])) for uri in uris]
    return [np.asarray(Image.open(file).convert("RGBA")) for file in files]


def shares(page) -> dict[str, str]:
    rows = page.locator(".classes li").all_inner_texts()
    return dict(text.split("\n")[-2:] for text in rows)


def facts(page) -> dict[str, str]:
    return dict(text.split("\n") for text in page.locator(".facts > div").all_inner_texts())


def expected(weights: str | Path, image: np.ndarray):
    """Label map, scheme and shares, from the Predictor alone."""
    predictor = Predictor.from_weights(weights, backend="eager")
    label = predictor(image)
    scheme = output_scheme(predictor.meta, predictor.net.num_classes, weights)
    found = class_shares([count_pixels(label, predictor.net.num_classes)], scheme)
    return label, scheme, found


def wait_for_result(page, name: str) -> None:
    page.locator(".facts dd", has_text=name).wait_for()


def assert_shows(page, weights, image: np.ndarray) -> None:
    label, scheme, found = expected(weights, image)
    base, classes = layers(page)
    assert np.abs(base[..., :3].astype(int) - image).mean() < 12  # a JPEG
    shown = label < scheme.num_classes
    assert shown.any()
    assert np.array_equal(classes[shown], np.insert(scheme.palette[label[shown]], 3, 255, axis=1))
    assert not classes[~shown].any()
    listed = shares(page)
    assert listed.keys() == found.keys()
    for name, share in found.items():
        text = listed[name].removesuffix(" %")
        assert share < 0.0005 if text == "< 0.1" else abs(float(text) - 100 * share) <= 0.0501
    order = [found[name] for name in listed]
    assert order == sorted(order, reverse=True)


def test_an_uploaded_image_is_shown_with_its_classes(open_page, folder):
    page = open_page()
    upload(page, folder / "noise.png")
    wait_for_result(page, "noise.png")
    assert_shows(page, folder / "w.pth", noise())
    found = facts(page)
    assert found["size"] == "70 × 50"
    network, whole = (float(found[name].removesuffix(" ms")) for name in ("network", "whole"))
    assert 0 < network < whole


def test_a_turned_grey_and_large_image(open_page, folder):
    """Upright; reduced where it is larger than it can be shown."""
    page = open_page()
    exif = Image.Exif()
    exif[0x0112] = 6
    grey = np.arange(100, dtype=np.uint8).repeat(25)[None].repeat(300, axis=0)  # (300, 2500)
    upload(page, ("grey.tif", encoded(grey, "TIFF", exif=exif)))
    wait_for_result(page, "grey.tif")
    assert facts(page)["size"] == "300 × 2500"
    base, classes = layers(page)
    assert base.shape == classes.shape and 2040 < base.shape[0] <= 2048
    assert base[0, 0, 0] < 20 and base[-1, 0, 0] > 80


def choose(page, label: str, option: str) -> list[str]:
    """Choose one of the options, which are returned."""
    page.get_by_label(label).click()
    options = page.get_by_role("option")
    options.last.wait_for()
    names = options.all_inner_texts()
    options.get_by_text(option, exact=True).click()
    options.first.wait_for(state="hidden")
    return names


def test_other_weights_label_anew(open_page):
    page = open_page()
    page.get_by_role("button", name="Example").click()
    wait_for_result(page, "toy_street.png")
    assert "class 0" in shares(page)
    offered = choose(page, "Weights", "camvid-d20")
    assert offered == ["w.pth", "camvid-d20", "cityscapes-d20", "cityscapes-demo-d20"]
    page.locator(".class-name", has_text="bicyclist").wait_for()
    assert_shows(page, "camvid-d20", np.asarray(Image.open(STREET).convert("RGB")))


def test_another_backend_labels_anew(open_page, folder):
    pytest.importorskip("onnxruntime", reason="needs onnxruntime: pip install onnxruntime")
    page = open_page()
    upload(page, folder / "noise.png")
    wait_for_result(page, "noise.png")
    before = facts(page)
    assert "onnxruntime" in choose(page, "Backend", "onnxruntime")
    page.get_by_text("Preparing w.pth with onnxruntime").wait_for()
    wait_until(lambda: facts(page) != before, "an answer of the other backend")
    assert_shows(page, folder / "w.pth", noise())


def mean_color(page) -> np.ndarray:
    """Of the picture as it is painted on the screen."""
    shot = page.locator(".layers").screenshot()
    return np.asarray(Image.open(io.BytesIO(shot)).convert("RGB")).mean(axis=(0, 1))


def test_opacity_and_class_toggles_act(open_page, folder):
    page = open_page()
    upload(page, folder / "noise.png")
    wait_for_result(page, "noise.png")
    label, scheme, found = expected(folder / "w.pth", noise())
    slider = page.get_by_role("slider")
    for opacity in (0, 0.5, 1):
        slider.fill(str(opacity))
        painted = overlay(noise(), label, scheme, opacity).mean(axis=(0, 1))
        assert np.abs(mean_color(page) - painted).max() < 4
    largest = max(found, key=found.get)
    assert largest != "void"
    toggle = page.get_by_role("checkbox", name=largest, exact=False).first
    toggle.uncheck()
    index = scheme.classes.index(largest)
    _, classes = layers(page)
    assert not classes[label == index].any()
    others = (label != index) & (label < scheme.num_classes)
    assert (classes[others][:, 3] == 255).all()
    page.get_by_role("button", name="Hide all").click()
    assert not layers(page)[1].any()
    page.get_by_role("button", name="Show all").click()
    assert_shows(page, folder / "w.pth", noise())


def test_pointing_names_the_class(open_page, folder):
    page = open_page()
    upload(page, folder / "noise.png")
    wait_for_result(page, "noise.png")
    label, scheme, _ = expected(folder / "w.pth", noise())
    box = page.locator("canvas.overlay").bounding_box()
    for y, x in ((5, 60), (44, 12)):
        page.mouse.move(
            box["x"] + (x + 0.5) * box["width"] / 70, box["y"] + (y + 0.5) * box["height"] / 50
        )
        name = (*scheme.classes, "void")[label[y, x]]
        assert page.locator(".pointed").inner_text() == name


def test_dropped_and_pasted_files_are_taken(open_page, folder):
    page = open_page()
    give = """([name, bytes, type]) => {
        const data = new DataTransfer();
        data.items.add(new File([new Uint8Array(bytes)], name));
        const options = {dataTransfer: data, clipboardData: data, bubbles: true, cancelable: true};
        if (type === "drop") {
            document.querySelector(".stage").dispatchEvent(new DragEvent("drop", options));
        } else {
            window.dispatchEvent(new ClipboardEvent("paste", options));
        }
    }"""
    for name, type in (("dropped.png", "drop"), ("pasted.png", "paste"), ("dropped.png", "drop")):
        page.evaluate(give, [name, list(encoded(noise())), type])
        wait_for_result(page, name)
    assert_shows(page, folder / "w.pth", noise())


def test_bad_uploads_get_a_sentence_and_the_next_is_shown(open_page, folder):
    page = open_page()
    bad = {
        "torn.png": (encoded(noise())[:3000], "The image is damaged"),
        "text.jpg": (b"a letter", "The image is damaged (or no PNG"),
        "empty.png": (b"", "The image is damaged (or no PNG"),
        "huge.png": (huge_png(50_000), "far more than the 2,000,000 pixels"),
        "large.png": (huge_png(1_500), "1500x1500 pixels, and 2,000,000 are the limit"),
        "big.png": (bytes(1_100_000), "The file is larger than 1 MB"),
        "text.mp4": (b"a letter", "text.mp4 cannot be read as a video"),
        "long.mp4": (toy_video(folder / "a.mp4", 61, 50).read_bytes(), "60 frames, the limit"),
        "slow.mp4": (toy_video(folder / "b.mp4", 5, 1).read_bytes(), "longer than 4 seconds"),
        "list.mp4": (f"ffconcat version 1.0\nfile {folder}/a.mp4\n".encode(), "list.mp4 cannot"),
    }
    for name, (data, sentence) in bad.items():
        upload(page, (name, data))
        trouble = page.get_by_role("alert")
        trouble.get_by_text(sentence).wait_for()
        assert "/" not in trouble.inner_text().replace("utils/", "")  # no path of the server's
    upload(page, folder / "noise.png")
    wait_for_result(page, "noise.png")
    assert not page.get_by_role("alert").is_visible()
    assert_shows(page, folder / "w.pth", noise())


def test_a_video_is_labelled_and_played(open_page, folder, server):
    page = open_page()
    page.get_by_role("button", name="Example").click()  # for the slider
    wait_for_result(page, "toy_street.png")
    page.get_by_role("slider").fill("1")
    source = toy_video(folder / "clip.mp4", 8)
    upload(page, source)
    wait_for_result(page, "clip.mp4")
    assert facts(page)["frames"] == "8"
    video = page.locator("video.result")
    page.wait_for_function("document.querySelector('video.result').readyState >= 2")
    assert video.evaluate("video => [video.videoWidth, video.videoHeight]") == [64, 48]
    assert video.evaluate("video => video.duration") == pytest.approx(8 / 25, abs=0.05)
    predictor = Predictor.from_weights(folder / "w.pth", backend="eager")
    with VideoReader(source) as reader:
        labels = [predictor(frame.image) for frame in reader]
    counts = [count_pixels(label, 12) for label in labels]
    scheme = output_scheme(predictor.meta, 12, "w.pth")
    for name, share in class_shares(counts, scheme).items():
        text = shares(page)[name].removesuffix(" %").removeprefix("< ")
        assert abs(float(text) - 100 * share) < 0.11
    url = video.get_attribute("src")
    # What is played has the classes' colours.
    answer = ask(server, url, Range="bytes=0-9")
    assert answer[0] == 206 and len(answer[2]) == 10
    (folder / "played.mp4").write_bytes(ask(server, url)[2])
    with VideoReader(folder / "played.mp4") as reader:
        for frame, label in zip(reader, labels, strict=True):
            kept = label < scheme.num_classes
            difference = frame.image[kept].astype(int) - scheme.palette[label[kept]]
            assert np.abs(difference).mean() < 40 and np.abs(difference.mean(axis=0)).max() < 12
    assert page.get_by_role("checkbox").first.is_disabled()
    # It is gone with its page.
    page.close()
    wait_until(lambda: not videos_on_disk(folder), "the end of a closed page's video")
    assert ask(server, url)[0] == 404


def test_a_video_cut_short_is_shown_as_far_as_it_goes(open_page, folder):
    whole = toy_video(folder / "whole.mkv", 50).read_bytes()
    page = open_page()
    upload(page, ("cut.mkv", whole[: int(0.7 * len(whole))]))
    wait_for_result(page, "cut.mkv")
    assert 5 < int(facts(page)["frames"]) < 50
    page.get_by_role("alert").get_by_text("cut.mkv is damaged or cut short").wait_for()


def videos_on_disk(folder: Path) -> list[Path]:
    return list((folder / "temporary").glob("lednet-*/*/*.mp4"))


def test_stopping_and_closing_end_the_work(open_page, folder):
    page = open_page()
    choose(page, "Weights", "camvid-d20")
    source = toy_video(folder / "slow.mp4", 60)
    upload(page, source)
    page.get_by_text("of 60 frames").wait_for()
    page.get_by_role("button", name="Stop", exact=True).click()
    page.get_by_role("alert").get_by_text("slow.mp4 was stopped").wait_for()
    wait_until(lambda: not videos_on_disk(folder), "the end of a stopped video")
    upload(page, source)
    page.get_by_text("of 60 frames").wait_for()
    assert videos_on_disk(folder)
    page.close()
    wait_until(lambda: not videos_on_disk(folder), "the end of a closed page's work")


def test_the_webcam_is_labelled_frame_by_frame(open_page):
    page = open_page()
    page.get_by_role("button", name="Webcam").click()
    page.locator(".facts dd", has_text="fps").wait_for()
    first, _ = layers(page)
    assert first.shape[:2] == (480, 640)
    wait_until(lambda: not np.array_equal(layers(page)[0], first), "another frame")
    assert layers(page)[1].any()
    page.get_by_role("button", name="Stop webcam").click()
    page.get_by_role("button", name="Webcam", exact=True).wait_for()
    # An image takes its place, also while it runs.
    page.get_by_role("button", name="Webcam", exact=True).click()
    page.get_by_role("button", name="Stop webcam").wait_for()
    page.get_by_role("button", name="Example").click()
    wait_for_result(page, "toy_street.png")
    page.get_by_role("button", name="Webcam", exact=True).wait_for()


def test_a_late_frame_does_not_cover_the_image_that_was_given_after_it(open_page):
    page = open_page()
    page.evaluate(
        """() => {
          const unpacked = Response.prototype.arrayBuffer;
          Response.prototype.arrayBuffer = async function () {
            const labels = await unpacked.call(this);
            if (labels.byteLength === 640 * 480) await new Promise((go) => setTimeout(go, 3000));
            window.late = labels.byteLength === 640 * 480;
            return labels;
          };
        }"""
    )
    page.get_by_role("button", name="Webcam").click()
    page.locator(".facts dd", has_text="fps").wait_for()
    page.evaluate("window.late = false")
    page.get_by_role("button", name="Example").click()
    wait_for_result(page, "toy_street.png")
    page.wait_for_function("window.late")
    page.evaluate("new Promise(requestAnimationFrame)")
    assert facts(page)["file"] == "toy_street.png"
    # It is still the image that other weights label.
    choose(page, "Weights", "camvid-d20")
    page.locator(".classes li", has_text="Pole").wait_for()


def test_a_result_belongs_to_the_page_that_asked(open_page, folder):
    one, other = open_page(), open_page()
    upload(one, folder / "noise.png")
    wait_for_result(one, "noise.png")
    assert other.locator(".classes li").count() == 0
    other.get_by_role("button", name="Example").click()
    wait_for_result(other, "toy_street.png")
    assert facts(one)["file"] == "noise.png"


def test_a_phone_does_not_scroll_sideways(open_page, folder):
    page = open_page(width=360)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    upload(page, folder / "noise.png")
    wait_for_result(page, "noise.png")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    picture, panel = (page.locator(name).bounding_box() for name in (".layers", "aside"))
    assert picture["width"] > 300 and panel["y"] >= picture["y"] + picture["height"]


def test_real_images(real_data, open_page):
    page = open_page()
    path = sorted((real_data / "data/camvid/val").iterdir())[0]
    choose(page, "Weights", "camvid-d20")
    upload(page, path)
    wait_for_result(page, path.name)
    assert_shows(page, "camvid-d20", np.asarray(Image.open(path).convert("RGB")))
