"""The live page: its build, its server, and what it shows in a browser."""

import base64
import functools
import http.client
import io
import re
import threading
from collections.abc import Iterator
from fractions import Fraction
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from lednet import Predictor, UserError
from lednet.checkpoint import save_checkpoint
from lednet.cli import live_page, serve
from lednet.inference.video import write_video
from lednet.model import load_model

SIZE = (48, 64)
STREET = Image.open(ROOT / "docs/toy_street.png").convert("RGB")


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    net, meta = load_model("camvid-d20")
    path = tmp_path_factory.mktemp("weights") / "small.pth"
    save_checkpoint(path, net, meta | {"size": list(SIZE)})
    return path


@pytest.fixture(scope="module")
def folder(weights, tmp_path_factory) -> Path:
    """The built page with small weights."""
    try:
        live_page.fetch_runtime()
    except UserError as error:
        pytest.skip(f"needs ONNX Runtime Web: {error}")
    folder = tmp_path_factory.mktemp("live")
    live_page.build(folder, [weights])
    return folder


@pytest.fixture(scope="module")
def url(folder) -> Iterator[str]:
    with serve.make_server(folder, 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture
def open_page(browser, url):
    """Open the page; the test fails on errors in its console and requests to other hosts."""
    pages, complaints = [], []

    def watch(request) -> None:
        if not request.url.startswith((url, "data:", "blob:")):
            complaints.append(request.url)

    def opened(width: int = 1280, scheme: str = "light"):
        page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        page.on("console", lambda m: m.type == "error" and complaints.append(m.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", watch)
        page.goto(url)
        page.get_by_role("status").get_by_text("is ready").wait_for()
        pages.append(page)
        return page

    yield opened
    for page in pages:
        page.close()
    assert complaints == []


def encode(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def give(page, name: str, content: bytes, kind: str = "image/png") -> None:
    page.locator("#file").set_input_files({"name": name, "mimeType": kind, "buffer": content})


def show(page, name: str, image: Image.Image) -> None:
    give(page, name, encode(image))
    page.locator(".facts dd", has_text=name).wait_for()


def saved(page, button: str) -> np.ndarray:
    with page.expect_download() as download:
        page.get_by_role("button", name=button).click()
    return np.asarray(Image.open(download.value.path()))


def overlay(page) -> np.ndarray:
    uri = page.locator("#overlay").evaluate("canvas => canvas.toDataURL()")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))


def test_page_label_maps_are_those_of_predictor_on_every_engine(open_page, weights):
    predictor = Predictor(weights)
    page = open_page()
    automatic, *engines = page.locator("#engine option:enabled").all_inner_texts()
    assert automatic == "Automatic" and "WebAssembly, 1 thread" in engines
    for engine in engines:
        page.locator("#engine").select_option(engine)
        for size, least in ((SIZE, 0.999), ((35, 90), 0.99)):
            image = STREET.resize(size[::-1], Image.Resampling.BILINEAR)
            name = f"{engine}-{size[0]}.png"
            give(page, name, encode(image))  # at first while the engine is prepared
            page.locator(f".facts:has(dd:text-is('{engine}'))", has_text=name).wait_for()
            labels = saved(page, "Save label map")
            assert labels.shape == size and labels.dtype == np.uint8
            assert (labels == predictor(image)).mean() >= least, (engine, size)


def test_page_legend_switches_classes_and_follows_the_cursor(open_page):
    page = open_page()
    page.get_by_role("button", name="Toy street 1").click()
    page.locator(".facts dd", has_text="sample-1.jpg").wait_for()
    labels, first = saved(page, "Save label map"), page.locator(".class-name").first.inner_text()
    classes = load_model("camvid-d20")[1]["classes"]
    assert classes.index(first) == np.bincount(labels.ravel()).argmax()
    assert np.all(overlay(page)[labels < 11, 3] == 255)
    page.get_by_role("checkbox", name=first).uncheck()
    assert np.array_equal(overlay(page)[..., 3] > 0, labels != classes.index(first))
    page.get_by_role("button", name="Hide all").click()
    assert not overlay(page).any()
    picture = np.asarray(Image.open(io.BytesIO(page.request.get(page.url + "sample-1.jpg").body())))
    difference = saved(page, "Save overlay")[..., :3].astype(int) - picture
    assert np.abs(difference).mean() < 1  # decoders differ in rounding

    height, width = labels.shape
    page.get_by_role("application").focus()
    for key, x, y in (("ArrowUp", 0.5, 0.5), ("ArrowDown", 0.5, 0.5 + 0.02 * width / height)):
        page.keyboard.press(key)
        label = labels[int(y * height), int(x * width)]
        assert page.locator("#pointed").inner_text() == [*classes, "void"][label]
    page.get_by_text("Colors", exact=True).click()
    assert page.get_by_label("Opacity").is_disabled()


def test_page_samples_use_weights_for_drawings(open_page):
    page = open_page()

    def add_toy_weights(route) -> None:
        (entry,) = route.fetch().json()
        route.fulfill(json=[entry, entry | {"name": "toy", "dataset": "toy streets"}])

    page.route("**/models.json", add_toy_weights)
    page.reload()
    chosen = page.locator("#weights option:checked")
    for drawn, expected in ((True, "toy"), (True, "toy"), (False, "small"), (False, "small")):
        if drawn:
            page.get_by_role("button", name="Toy street 1").click()
            page.locator(".facts dd", has_text="sample-1.jpg").wait_for()
        else:
            show(page, "street.png", STREET)
        assert chosen.inner_text() == expected
    page.locator("#weights").select_option("toy")
    show(page, "other.png", STREET)
    assert chosen.inner_text() == "toy"


def test_page_own_files_are_checked_before_use(open_page, folder, tmp_path):
    page = open_page()
    (exported,) = (folder / "models").iterdir()
    good = exported.read_bytes()
    bad = {
        "text.onnx": (b"no network", "damaged or no ONNX file"),
        "cut.onnx": (good[:-2000], "damaged or no ONNX file"),
        "labels.onnx": (good.replace(b"output\x12\x06logits", b"output\x12\x06labels"), "labels"),
        "size.onnx": (good.replace(b"[48, 64]", b"[48, 72]"), "does not suit its graph"),
        "classes.onnx": (good.replace(b'["sky", ', b'[       '), "are not its classes and void"),
        "text.png": (b"no image", "no image or video"),
    }  # fmt: skip
    for name, (content, words) in bad.items():
        assert content != good
        (tmp_path / name).write_bytes(content)
        page.locator("#file").set_input_files(tmp_path / name)
        page.get_by_role("alert").get_by_text(f"{name} ").get_by_text(words).wait_for()
    page.locator("#file").set_input_files(exported)
    page.get_by_role("status").get_by_text(f"{exported.name} is ready").wait_for()
    assert page.get_by_role("alert").count() == 0


def test_page_camera_and_video_are_predicted_until_stopped(open_page, tmp_path):
    page = open_page()
    page.get_by_role("button", name="Camera", exact=True).click()
    page.locator(".facts dd", has_text=re.compile(r"^\d+\.\d$")).wait_for()  # frames per second
    assert overlay(page).any()
    page.get_by_role("button", name="Front / back").click()
    page.get_by_role("button", name="Stop camera").click()
    page.locator("#engine").select_option("single")  # the last frame's classes may be others
    page.get_by_role("button", name="Drop an image").wait_for()
    path = tmp_path / "clip.mp4"
    with write_video(path, Fraction(25), Fraction(1, 25)) as writer:
        for i in range(10):
            writer.append(np.roll(np.asarray(STREET.resize((128, 64))), i, axis=1), i)
    give(page, "clip.mp4", path.read_bytes(), "video/mp4")
    page.locator(".facts dd", has_text="clip.mp4").wait_for()
    assert page.locator(".facts dd", has_text="128 × 64").is_visible()
    page.get_by_role("button", name="Pause").click()
    assert page.get_by_role("button", name="Resume").is_visible()
    show(page, "street.png", STREET)
    assert not page.get_by_role("button", name="Resume").is_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_fits_a_phone(open_page, scheme):
    page = open_page(360, scheme)
    for view in ("Overlay", "Side by side"):
        show(page, "street.png", STREET)
        page.get_by_text(view, exact=True).click()
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.locator("#overlay").bounding_box()["width"] > 300
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(17, 20, 24)"
    assert dark == (scheme == "dark")


def test_page_has_threads_on_hosts_without_headers(browser, folder):
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    handler = functools.partial(Quiet, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        page = browser.new_page()
        page.goto(f"http://127.0.0.1:{server.server_port}/")
        page.get_by_role("status").get_by_text("is ready").wait_for()
        assert page.evaluate("crossOriginIsolated")
        page.close()
        server.shutdown()


def test_server_sends_isolation_headers_and_lists_no_folders(url):
    connection = http.client.HTTPConnection(url.split("/")[2], timeout=20)
    for path, host, status in (
        ("/", "127.0.0.1:1", 200),
        ("/models/", "localhost", 404),
        ("/../weights0/small.pth", "localhost", 404),
        ("/", "evil.example", 403),
    ):
        connection.request("GET", path, headers={"Host": host})
        response = connection.getresponse()
        response.read()
        assert response.status == status
        assert response.headers["Cross-Origin-Embedder-Policy"] == "require-corp"


def test_serve_invalid_flags_are_refused(run_inside, url):
    port = url.split(":")[2].strip("/")
    run_inside("utils/serve.py", "--port", port).assert_error("--port")
    run_inside("utils/serve.py", "--port", 0, "--weights", "no.pth").assert_error("no.pth")


def test_runtime_without_npm_or_network_or_with_another_checksum_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("LEDNET_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(UserError, match="install Node"):
        live_page.fetch_runtime()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/npm").write_text("#!/bin/sh\necho no network >&2\nexit 1\n")
    (tmp_path / "bin/npm").chmod(0o755)
    with pytest.raises(UserError, match=r"\(no network\): connect to the internet once"):
        live_page.fetch_runtime()
    (tmp_path / "npm" / live_page.ARCHIVE).write_bytes(b"another")
    with pytest.raises(UserError, match="checksum"):
        live_page.fetch_runtime()
