"""Build backend (PEP 517) that builds visdom from its published source."""

import subprocess
import sys
import tempfile
from pathlib import Path

VISDOM = "visdom==0.2.4"


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    """Have pip build visdom in this isolated environment, where setuptools is old enough."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
        subprocess.run([*command, "--wheel-dir", folder, VISDOM], check=True)
        (wheel,) = Path(folder).glob("*.whl")
        Path(wheel_directory, wheel.name).write_bytes(wheel.read_bytes())
    return wheel.name
