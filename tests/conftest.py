"""Small data sets and the way to run a script as a user would."""

import atexit
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fakes import Result
from hypothesis import HealthCheck, settings
from make_toy_cityscapes import write_toy_cityscapes
from PIL import Image

from lednet import LEDNet
from lednet.checkpoint import save_checkpoint

# On these small tensors a second thread only waits, and for long where cores are shared.
torch.set_num_threads(1)

# Tests with the same weights share what a backend exports, and leave the user's cache alone.
os.environ["LEDNET_CACHE"] = tempfile.mkdtemp(prefix="lednet-tests-")
atexit.register(shutil.rmtree, os.environ["LEDNET_CACHE"], ignore_errors=True)

FUZZ_EXAMPLES = "LEDNET_FUZZ_EXAMPLES"
"""Environment variable: inputs that hypothesis tries for each property, at random; without it,
the same hundred each time."""

settings.register_profile(
    "lednet",
    max_examples=int(os.environ.get(FUZZ_EXAMPLES, 100)),
    derandomize=FUZZ_EXAMPLES not in os.environ,
    database=None,
    deadline=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)
settings.load_profile("lednet")

ROOT = Path(__file__).resolve().parents[1]

REAL_DATA = "LEDNET_REAL_DATA"
"""Environment variable: a folder with real images and reference outputs."""


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real images (`data/`) and reference outputs (`golden/`)."""
    folder = os.environ.get(REAL_DATA)
    if not folder:
        pytest.skip(f"needs real data: set {REAL_DATA} to its folder")
    return Path(folder)


@pytest.fixture
def run_script(tmp_path):
    """Run a script, given by its path in the repository, in a process and folder of its own."""

    def run(
        script: str, *args: object, launcher: tuple[str, ...] = (), env: dict | None = None
    ) -> Result:
        command = [sys.executable, *launcher, str(ROOT / script), *map(str, args)]
        env = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
        done = subprocess.run(
            command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600
        )
        return Result(command, done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture
def run_inside(monkeypatch, capsys):
    """`run_script` in the process of the test, which is some seconds faster."""

    def run(script: str, *args: object) -> Result:
        command = [str(ROOT / script), *map(str, args)]
        monkeypatch.setattr(sys, "argv", command)
        capsys.readouterr()
        status = 0
        try:
            runpy.run_path(command[0], run_name="__main__")
        except SystemExit as stop:
            status = stop.code or 0
        return Result(command, status, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def toy_cityscapes(tmp_path_factory) -> Path:
    """A toy Cityscapes tree: 6 training and 3 validation scenes of 128x64."""
    root = tmp_path_factory.mktemp("toy") / "cityscapes"
    write_toy_cityscapes(
        root, train=6, val=3, test=2, train_extra=2, width=128, height=64, seed=1, workers=1
    )
    return root


def make_camvid(root: Path, train: int = 5, val: int = 3, size: tuple[int, int] = (48, 64)) -> Path:
    """Write a tree in CamVid's layout: coloured bands, each band a class, and some void."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        (root / split).mkdir(parents=True)
        (root / f"{split}annot").mkdir()
        for i in range(count):
            label = np.repeat(rng.permutation(12), size[0] // 12)[:, None].repeat(size[1], 1)
            image = (label[..., None] * [20, 11, 5] + rng.integers(0, 20, (*size, 3))) % 256
            Image.fromarray(image.astype(np.uint8)).save(root / split / f"{split}_{i:03d}.png")
            Image.fromarray(label.astype(np.uint8)).save(root / f"{split}annot/{split}_{i:03d}.png")
    return root


@pytest.fixture(scope="session")
def camvid(tmp_path_factory) -> Path:
    """A small CamVid tree, not to be changed."""
    return make_camvid(tmp_path_factory.mktemp("camvid"))


@pytest.fixture
def own_camvid(tmp_path) -> Path:
    """A small CamVid tree that a test may damage."""
    return make_camvid(tmp_path / "camvid")


@pytest.fixture
def train(run_inside, camvid, tmp_path):
    """Train on the small CamVid tree, to `tmp_path / "run"`. Later flags override."""

    def run(*flags: object) -> Result:
        return run_inside(
            "train/main.py", "--dataset", "camvid", "--datadir", camvid, "--savedir",
            tmp_path / "run", "--height", 24, "--width", 32, "--batch-size", 2, "--num-epochs", 1,
            "--num-workers", 0, "--device", "cpu", *flags,
        )  # fmt: skip

    return run


CLASSES = [f"class {i}" for i in range(11)]
COLORS = [[20 * i, 255 - 20 * i, 7 * i] for i in range(11)]
"""Of `weights`."""


@pytest.fixture
def weights(tmp_path) -> Path:
    """Untrained weights for images of 48x64, 11 classes and void."""
    torch.manual_seed(0)
    meta = {"size": [48, 64], "classes": CLASSES, "colors": COLORS}
    save_checkpoint(tmp_path / "w.pth", LEDNet(12), meta)
    return tmp_path / "w.pth"


@pytest.fixture
def photos(tmp_path) -> Path:
    """Two images of one name in different folders, of different sizes, and no image."""
    rng = np.random.default_rng(1)
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    for name, size in (("a.png", (50, 70)), ("sub/a.png", (40, 90))):
        Image.fromarray(rng.integers(0, 256, (*size, 3)).astype(np.uint8)).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.fixture
def own_data(tmp_path):
    """Two folders without splits and a class file: id 7 is field, 3 is path, 9 is ignored."""
    rng = np.random.default_rng(0)
    for folder in ("images", "labels"):
        (tmp_path / "own" / folder).mkdir(parents=True)
    for i in range(6):
        label = rng.choice(np.array([7, 3, 9], np.uint8), (32, 48))
        Image.fromarray(label).save(tmp_path / f"own/labels/{i}.png")
        Image.fromarray(np.stack([label * 20] * 3, -1)).save(tmp_path / f"own/images/{i}.jpg")
    (tmp_path / "own/classes.yaml").write_text(
        "classes:\n  - {name: field, id: 7, color: [0, 200, 0]}\n  - {name: path, id: 3}\n"
        "ignore: [9]\n"
    )
    return tmp_path / "own"


CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
QUIET = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream",
    "--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader",
]  # fmt: skip


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless browser with a simulated camera, and WebGPU on the CPU; skips without one."""
    sync_api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("needs a browser: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield running
        running.close()
