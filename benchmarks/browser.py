"""Compare the live page in headless Chromium with `Predictor` and ONNX Runtime in Python.

    python benchmarks/browser.py --images /data/camvid/val --json browser.json

First result with an empty and a filled cache; lowest agreement of the label maps with `Predictor`;
milliseconds per frame, in turn in every round with ONNX Runtime in Python; memory over many frames.
A quarter of an hour on two shared cores.
"""

import io
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from benchmarks._common import Row, add_options, alternate, make_parser, print_row, write_record
from lednet import Predictor
from lednet.cli import live_page
from lednet.cli.serve import Handler, make_server
from lednet.errors import UserError, exit_on_user_error
from lednet.exporting.formats import RunOptions, load_onnx
from lednet.files import IMAGE_SUFFIXES, find_files

CHROMIUM: Row = {"executable_path": shutil.which("chromium"), "args": ["--no-sandbox"]}
SAMPLE = "sample-1.jpg"
OPEN = """async ([threads, sample]) => {
  const [{ Network }, { checkModel }] = [await import("./engine.js"), await import("./onnx.js")];
  const [model] = await (await fetch("models.json")).json();
  const bytes = new Uint8Array(await (await fetch(model.file)).arrayBuffer());
  window.last ??= { bitmap: await createImageBitmap(await (await fetch(sample)).blob()) };
  (window.networks ??= {})[threads] = await Network.open(
    bytes, checkModel(bytes, model.name), [threads > 1 ? "threads" : "single"], threads);
}"""
RUN = """async ([threads, frames]) => {
  for (let i = 0; i < frames; i++) window.last = await networks[threads].run(last.bitmap);
  return [last.network, last.total];
}"""


class CountingHandler(Handler):
    """Counts the bytes of the files that it sends."""

    sent = 0

    def copyfile(self, source: Any, outputfile: Any) -> None:
        data = source.read()
        CountingHandler.sent += len(data)
        outputfile.write(data)


def first_result(page: Page, url: str) -> Row:
    """Megabytes loaded and seconds, from the address to the first result."""
    CountingHandler.sent, start = 0, time.perf_counter()
    page.goto(url)
    page.get_by_role("button", name="Toy street 1").click()
    page.locator(".facts dd", has_text=SAMPLE).wait_for()
    return {"MB": CountingHandler.sent / 1e6, "seconds": time.perf_counter() - start}


def agreement(page: Page, predictor: Predictor, paths: list[Path]) -> list[Row]:
    """The lowest share of equal pixels for each engine and image size."""
    height, width = predictor.size
    rows = []
    for engine in page.locator("#engine option:enabled").all_inner_texts()[1:]:
        page.locator("#engine").select_option(engine)
        row: Row = {"engine": engine}
        for path in paths:
            image, contents = Image.open(path).convert("RGB"), {"file": path.read_bytes()}
            for name, factor in (("network_size", 1), ("double_size", 2)):
                image.resize((factor * width, factor * height)).save(buffer := io.BytesIO(), "PNG")
                contents[name] = buffer.getvalue()
            for name, content in contents.items():
                file: Any = {"name": f"{name} {engine} {path.stem}.png", "buffer": content}
                page.locator("#file").set_input_files(file | {"mimeType": "image/png"})
                shown = page.locator(f".facts:has(dd:text-is('{engine}'))", has_text=name)
                shown.filter(has_text=path.stem).wait_for()
                with page.expect_download() as download:
                    page.get_by_role("button", name="Save label map").click()
                labels = np.asarray(Image.open(download.value.path()))
                row[name] = min(row.get(name, 1.0), float((labels == predictor(content)).mean()))
        print_row(row)
        rows.append(row)
    return rows


def time_python(run: Callable[[np.ndarray], np.ndarray], pixels: np.ndarray) -> float:
    start = time.perf_counter()
    run(pixels)
    return 1000 * (time.perf_counter() - start)


def speed(page: Page, model: Path, size: tuple[int, int], rounds: int) -> list[Row]:
    """Median milliseconds per frame in the browser and in Python, with 1 and 2 threads."""
    pixels = np.random.default_rng(0).integers(0, 256, (1, *size, 3)).astype(np.uint8)
    calls: dict[tuple[str, int], Callable[[], Any]] = {}
    for threads in (1, 2):
        page.evaluate(OPEN, [threads, SAMPLE])
        native = load_onnx(model, RunOptions(threads)).run
        calls["browser", threads] = partial(page.evaluate, RUN, [threads, 1])
        calls["python", threads] = partial(time_python, native, pixels)
    times = alternate(calls, rounds, warmup=2)
    rows = []
    for threads in (1, 2):
        row: Row = {"threads": threads}
        row["browser_ms"], row["browser_whole_ms"] = np.median(times["browser", threads], axis=0)
        row["python_ms"] = np.median(times["python", threads])
        rows.append({name: round(float(value)) for name, value in row.items()})
        print_row(rows[-1])
    return rows


def memory(browser: Browser, page: Page, frames: int) -> Row:
    """Memory of the page's process in megabytes after a tenth of the frames, and after all."""
    session, row = browser.new_browser_cdp_session(), {"frames": frames}
    for name, count in (("MB_early", frames // 10), ("MB_late", frames - frames // 10)):
        page.evaluate(RUN, [1, count])
        processes = session.send("SystemInfo.getProcessInfo")["processInfo"]
        pids = [process["id"] for process in processes if process["type"] == "renderer"]
        pages = (int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids)
        row[name] = round(sum(pages) * 4096 / 1e6)
    print_row(row)
    return row


def main() -> None:
    parser = make_parser(__doc__, "--json")
    parser.add_argument("--images", type=Path, required=True, help="folder of images")
    parser.add_argument("--weights", default="camvid-d20", help="weights")
    add_options(parser, count=(4, "images to compare"),
                rounds=(20, "after two untimed ones"), frames=(500, "for the memory"))  # fmt: skip
    args = parser.parse_args()
    paths = find_files(args.images, IMAGE_SUFFIXES)
    if not paths or not CHROMIUM["executable_path"]:
        raise UserError(f"needs images below {args.images}, and Chromium: check both")
    paths = [paths[i * len(paths) // args.count] for i in range(args.count)]
    predictor = Predictor(args.weights, backend="eager")
    with tempfile.TemporaryDirectory() as name, sync_playwright() as playwright:
        folder, profile = Path(name) / "live", Path(name) / "profile"
        live_page.build(folder, [args.weights])
        (model,) = (folder / "models").iterdir()
        server = make_server(folder, 0, CountingHandler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/"
        results: Row = {}
        for state in ("cold", "cached"):
            with playwright.chromium.launch_persistent_context(profile, **CHROMIUM) as context:
                results[state] = first_result(context.new_page(), url)
            print_row({"first result": state} | results[state])
        browser = playwright.chromium.launch(**CHROMIUM)
        page = browser.new_page()
        page.set_default_timeout(300_000)
        page.goto(url)
        results["agreement"] = agreement(page, predictor, paths)
        page.reload()
        results["speed"] = speed(page, model, predictor.size, args.rounds)
        results["memory"] = memory(browser, page, args.frames)
        browser.close()
        server.shutdown()
    write_record(args.json, torch.device("cpu"), results)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
