"""utils/demo_app.py: its server's limits, and the live page in a browser."""

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
from test_page import chromium

from lednet import UserError
from lednet.checkpoint import save_checkpoint
from lednet.demo.labeller import MAX_SIDE, decode_image
from lednet.inference.predictor import Predictor
from lednet.inference.video import write_video
from lednet.inference.writers import class_shares, count_pixels
from lednet.model import load_model
from lednet.visualization import output_scheme

STREET = ROOT / "docs/toy_street.png"
FAKE_CAMERA = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
TIMEOUT = 60
NOISE = np.random.default_rng(0).integers(0, 256, (50, 70, 3)).astype(np.uint8)


def wait_until(happened: Callable[[], object], what: str) -> None:
    end = time.monotonic() + TIMEOUT
    while not happened():
        assert time.monotonic() < end, f"not within {TIMEOUT} s: {what}"
        time.sleep(0.1)


def encoded(pixels: np.ndarray = NOISE) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def huge_png(side: int) -> bytes:
    """A PNG whose header claims `side` x `side` pixels, without them."""
    data = bytearray(encoded(NOISE[:4, :4]))
    data[16:24] = side.to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


@pytest.mark.filterwarnings("ignore:Image size")
@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"a letter to a friend", "image is damaged (or no PNG"),
        (encoded()[:3000], "damaged"),
        (huge_png(10_000), "10000x10000 pixels, and 50,000,000 are the limit"),
        (encoded(np.zeros((1, MAX_SIDE + 1), np.uint8)), "a side"),
    ],
)
def test_decode_image_invalid_bytes_are_refused(data, words):
    with pytest.raises(UserError, match=re.escape(words)):
        decode_image(data)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Small weights with classes of their own, and an image."""
    folder = tmp_path_factory.mktemp("demo")
    net, meta = load_model("camvid-d20")
    save_checkpoint(
        folder / "w.pth", net, meta | {"size": [48, 64], "classes": CLASSES, "colors": COLORS}
    )
    (folder / "noise.png").write_bytes(encoded())
    (folder / "temporary").mkdir()
    return folder


def toy_video(path: Path, frames: int, rate: int = 25) -> Path:
    street = np.asarray(Image.open(STREET).convert("RGB").resize((64, 48)))
    with write_video(path, Fraction(rate), Fraction(1, rate)) as writer:
        for i in range(frames):
            writer.append(np.roll(street, i, axis=1), i)
    return path


@pytest.fixture(scope="module")
def server(folder):
    """Port of a server with small limits; it logs no traceback and leaves no file."""
    pytest.importorskip("nicegui", reason="needs nicegui: pip install nicegui")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    log = folder / "log.txt"
    options = ["--weights", "w.pth", "--port", port, "--backend", "eager", "--device", "cpu",
               "--max-upload", 1, "--max-pixels", 2, "--max-seconds", 4,
               "--max-frames", 60]  # fmt: skip
    environ = {key: value for key, value in os.environ.items() if "PYTEST" not in key}
    environ |= {"OMP_NUM_THREADS": "1", "TMPDIR": str(folder / "temporary")}
    with open(log, "w") as output:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "utils/demo_app.py"), *map(str, options)],
            cwd=folder, env=environ, stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def is_ready() -> bool:
        assert process.poll() is None, log.read_text()
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    try:
        wait_until(is_ready, "the server")
        before = set((folder / "temporary").glob("tmp*"))  # PyTorch 2.6 leaves a module there
        yield port
    finally:
        process.terminate()
        process.wait(TIMEOUT)
    assert "Traceback" not in log.read_text()
    assert set((folder / "temporary").iterdir()) == before


def request(port: int, path: str = "/", method: str = "GET", body=None, **headers: str) -> tuple:
    """Status, headers and body of the response to exactly these bytes."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT)
    headers = {key.replace("_", "-"): value for key, value in headers.items()}
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    result = response.status, response.headers, response.read()
    connection.close()
    return result


@pytest.mark.parametrize(
    "path",
    [
        "/../../../../etc/passwd",
        "/%2e%2e/%2e%2e/%2e%2e/etc/passwd",
        "//etc/passwd",
        "/_nicegui/VERSION/static/%2e%2e/%2e%2e/nicegui.py",
        "/_nicegui/VERSION/components/..%2f..%2fdemo.py",
        "/w.pth",
        "/openapi.json",
    ],
)
def test_server_files_of_the_disk_are_not_served(server, path):
    version = pytest.importorskip("nicegui").__version__
    assert request(server, path.replace("VERSION", version))[0] == 404


@pytest.mark.parametrize(
    ("method", "headers", "status"),
    [
        ("GET", {"Host": "LOCALHOST"}, 200),
        ("GET", {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}, 200),  # a link
        ("GET", {"Host": "evil.example"}, 403),
        ("GET", {"Host": "127.0.0.1.evil.example"}, 403),
        ("GET", {"Host": "["}, 403),
        ("GET", {"Origin": "http://evil.example"}, 403),
        ("GET", {"Origin": "null"}, 403),
        ("GET", {"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "no-cors"}, 403),
        ("POST", {"Content_Length": "2000000"}, 413),
        ("POST", {"Transfer_Encoding": "chunked"}, 411),
    ],
)
def test_server_foreign_and_large_requests_are_refused(server, method, headers, status):
    body = b"1\r\nx\r\n0\r\n\r\n" if method == "POST" else None
    for path in ("/", "/_nicegui_ws/socket.io/?EIO=4&transport=polling"):
        found, answer, _ = request(server, path, method, body, **headers)
        assert found == status
        assert status != 200 or "frame-ancestors 'none'" in answer["content-security-policy"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--weights", "none.pth"), "none.pth"),
        (("--weights", "noise.png"), "noise.png"),
        (("--max-upload", -1), "--max-upload"),
        (("--port", 0), "--port"),
        (("--weights", "w.pth", "--backend", "eager", "--port", "{server}"), "--port"),
    ],
)
def test_demo_app_invalid_flag_is_refused(run_inside, folder, server, monkeypatch, flags, words):
    monkeypatch.chdir(folder)
    flags = [str(flag).format(server=server) for flag in flags]
    run_inside("utils/demo_app.py", "--device", "cpu", *flags).assert_error(words)


@pytest.fixture(scope="module")
def browser():
    with chromium(*FAKE_CAMERA) as running:
        yield running


@pytest.fixture
def page(browser, server):
    """The page; the test fails if it logs an error or contacts another server."""
    complaints = []
    own = (f"http://127.0.0.1:{server}/", f"ws://127.0.0.1:{server}/", "data:", "blob:")

    def watch(url: str) -> None:
        if not url.startswith(own):
            complaints.append(url)

    page = browser.new_page(viewport={"width": 1280, "height": 800})
    page.set_default_timeout(1000 * TIMEOUT)
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: watch(request.url))
    page.on("websocket", lambda socket: watch(socket.url))
    page.goto(own[0])
    page.get_by_role("button", name="Drop an image").wait_for()
    yield page
    page.close()
    assert complaints == []


def upload(page, name: str, content: bytes) -> None:
    file = {"name": name, "mimeType": "", "buffer": content}
    page.locator("input[type=file]").set_input_files(file)


def wait_for_result(page, name: str) -> None:
    page.locator(".facts dd", has_text=name).wait_for()


def classes_shown(page) -> np.ndarray:
    uri = page.locator("canvas.overlay").evaluate("canvas => canvas.toDataURL()")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))


def test_page_image_is_shown_with_its_classes(page, folder):
    bad = {"text.jpg": b"a letter", "huge.png": huge_png(50_000), "big.png": bytes(1_100_000)}
    for name, content in bad.items():
        upload(page, name, content)
        page.get_by_role("alert").get_by_text(re.compile("damaged|far more|larger")).wait_for()
    upload(page, "noise.png", encoded())
    wait_for_result(page, "noise.png")
    predictor = Predictor(folder / "w.pth", backend="eager")
    label = predictor(NOISE)
    scheme = output_scheme(predictor.meta, 12, "w.pth")
    kept = label < scheme.num_classes
    colors = np.insert(scheme.palette[label], 3, 255, axis=-1) * kept[..., None]
    assert np.array_equal(classes_shown(page), colors)
    shares = class_shares([count_pixels(label, 12)], scheme)
    listed = [text.split("\n")[-2] for text in page.locator(".classes li").all_inner_texts()]
    assert listed == sorted(shares, key=shares.get, reverse=True)
    page.get_by_role("button", name="Hide all").click()
    assert not classes_shown(page).any()


def test_page_video_is_shown_and_removed_with_the_page(page, folder):
    def on_disk() -> list[Path]:
        return list((folder / "temporary").glob("lednet-*/*/*.mp4"))

    upload(page, "long.mp4", toy_video(folder / "long.mp4", 61, 50).read_bytes())
    page.get_by_role("alert").get_by_text("60 frames, the limit").wait_for()
    upload(page, "clip.mp4", toy_video(folder / "clip.mp4", 8).read_bytes())
    wait_for_result(page, "clip.mp4")
    page.wait_for_function("document.querySelector('video.result').readyState >= 2")
    assert page.locator("video.result").evaluate("v => [v.videoWidth, v.videoHeight]") == [64, 48]
    assert on_disk()
    page.close()
    wait_until(lambda: not on_disk(), "the removal of a closed page's video")


def test_page_webcam_is_labelled_until_an_image_replaces_it(page):
    page.get_by_role("button", name="Webcam").click()
    page.locator(".facts dd", has_text="fps").wait_for()
    assert classes_shown(page).any()
    page.get_by_role("button", name="Example").click()
    wait_for_result(page, "toy_street.png")
    page.get_by_role("button", name="Webcam", exact=True).wait_for()
